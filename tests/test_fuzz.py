"""Anything at all as a manifest, an audio file or a checkpoint: a result or one clear error, no
hang, bounded memory.
"""

import io
import json
import math
import os
import resource
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
from test_scripts import SCRIPTS

CASES = int(os.environ.get("FUZZ_CASES", 200))  # the same ones every time; more are drawn at random
cases = settings(
    max_examples=CASES,
    derandomize=CASES == 200,
    database=None,
    deadline=20_000,
    suppress_health_check=list(HealthCheck),
)  # ms: none may hang
MOST_GB = 1.0  # that a call may add to this process's memory


def one_sentence(error: Exception, path) -> None:
    text = str(error)
    assert str(path) in text and "\n" not in text.strip() and len(text) < 1000, text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 < MOST_GB


# Manifests: known keys with any JSON value, other JSON, other text, other bytes
texts = st.text(st.characters(), max_size=20)  # half surrogate pairs and NUL, too
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
plausible = st.fixed_dictionaries(
    {"audio": st.just("a.wav") | texts},
    optional={
        "duration": st.floats(0.1, 100) | anything,
        "captions": st.lists(texts, max_size=3) | anything,
        "synthetic": st.lists(texts, max_size=3),
        "image": texts,
        "labels": st.lists(texts, max_size=3) | anything,
        "events": st.lists(
            st.fixed_dictionaries(
                {"label": st.text(max_size=5), "onset": st.floats(), "offset": st.floats()}
            ),
            max_size=3,
        )
        | anything,
        "phrases": st.lists(
            st.fixed_dictionaries({"phrase": st.text(max_size=5), "segments": anything}), max_size=2
        )
        | anything,
        "negatives": anything,
        "qa": anything,
        "split": st.sampled_from(["train", "val", "test"]) | anything,
        "similarity": anything,
        "fold": anything,
    },
)
lines = st.lists(
    plausible.map(json.dumps)
    | st.dictionaries(st.sampled_from(list(common.MANIFEST_KEYS)), anything).map(json.dumps)
    | anything.map(json.dumps)
    | st.text(max_size=30),
    min_size=1,
    max_size=4,
)


@cases
@given(content=lines | st.binary(max_size=200))
def test_any_manifest(place, content):
    path = place / "manifest.jsonl"
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else "\n".join(content).encode("utf-8", "surrogatepass")
    )
    try:
        rows = common.read_manifest([str(path)])
        common.split_train_val(rows)  # what every training does next
    except ValueError as error:
        one_sentence(error, path)
        return
    for row in rows:
        held = [row["audio"], *row.get("captions", []), *row.get("labels", [])]
        assert all("\0" not in text and text.encode("utf-8") for text in held)
        assert len(row.get("negatives", [])) in (0, len(row.get("captions", [])))
    classes = common.read_classes([str(path)], rows)
    if classes:
        common.label_targets(rows, classes)


# Audio: whole files with some bytes changed, cut or added, and headers that claim what is not there
def encoded(kind, subtype, channels) -> bytes:
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, channels))
    held = io.BytesIO()
    sf.write(held, x, 16000, format=kind, subtype=subtype)
    return held.getvalue()


FILES = [
    encoded(*of)
    for of in (
        ("WAV", "PCM_16", 1),
        ("WAV", "FLOAT", 2),
        ("FLAC", "PCM_16", 2),
        ("OGG", "VORBIS", 1),
        ("MP3", "MPEG_LAYER_III", 1),
        ("AIFF", "PCM_24", 1),
    )
]
edits = st.lists(
    st.tuples(
        st.integers(0, 200) | st.integers(0, 10**5),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from(
            [
                b"\xff" * 4,
                b"\0" * 4,
                b"\xff\xff\xff\x7f",
                struct.pack("<I", 36_000 * 44_100),
                struct.pack(">I", 2**31 - 1),
            ]
        ),
    ),
    max_size=4,
)


@cases
@given(which=st.integers(0, len(FILES) - 1), changes=edits, cut=st.just(0) | st.integers(0, 3000))
def test_any_audio(place, which, changes, cut):
    content = bytearray(FILES[which])
    for start, new in changes:
        start %= len(content)
        content[start : start + len(new)] = new
    path = place / "x.wav"
    path.write_bytes(bytes(content[: max(0, len(content) - cut)]))
    for length_s, rng in ((None, None), (1.0, np.random.default_rng(0))):
        try:
            waveform = common.read_audio(path, 8000, length_s, rng)
        except common.AudioError as error:
            one_sentence(error, path)
            continue
        assert (
            waveform.dtype == np.float32
            and waveform.ndim == 1
            and np.isfinite(waveform).all()
            and len(waveform) <= 8 * max(3000, len(content))
        )


def test_a_header_that_claims_ten_hours_allocates_nothing(tmp_path):
    rate = 44_100
    samples = 36_000 * rate
    pcm = np.full(16_000, 1000, np.int16).tobytes()
    header = (
        b"RIFF"
        + struct.pack("<I", 36 + 2 * samples)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    )
    (tmp_path / "long.wav").write_bytes(header + b"data" + struct.pack("<I", 2 * samples) + pcm)
    flac = bytearray(encoded("FLAC", "PCM_16", 1))
    start = (
        flac.index(b"fLaC") + 4 + 4 + 13
    )  # STREAMINFO: the low 36 bits of these bytes are the number of samples
    flac[start : start + 5] = bytes([flac[start] & 0xF0 | samples >> 32]) + struct.pack(
        ">I", samples & 0xFFFFFFFF
    )
    (tmp_path / "long.flac").write_bytes(flac)
    tracemalloc.start()  # numpy's arrays too, touched or not
    for name in ("long.wav", "long.flac"):
        try:
            assert len(common.read_audio(tmp_path / name, rate)) <= 16_000
        except common.AudioError as error:
            one_sentence(error, tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# Checkpoints
@pytest.fixture(scope="module")
def checkpoint(place):
    path = place / "good.pt"
    torch.save(
        {
            "method": "mga_clap",
            "config": {"seed": 0},
            "step": 3,
            "model": {"w": torch.arange(50.0), "b": torch.zeros(2, 3)},
        },
        path,
    )
    return path.read_bytes()


@cases
@given(changes=edits, cut=st.just(0) | st.integers(0, 2000))
def test_any_checkpoint(place, checkpoint, changes, cut):
    content = bytearray(checkpoint)
    for start, new in changes:
        start %= len(content)
        content[start : start + len(new)] = new
    path = place / "fuzzed.pt"
    path.write_bytes(bytes(content[: max(0, len(content) - cut)]))
    try:
        held = common.read_checkpoint(path)
    except ValueError as error:
        one_sentence(error, path)
        return
    assert set(held) >= {"method", "config", "model"}


@cases
@given(
    content=anything
    | st.fixed_dictionaries({"method": anything, "config": anything, "model": anything})
)
def test_any_content_of_a_checkpoint(place, content):
    path = place / "content.pt"
    torch.save(content, path)
    try:
        common.read_checkpoint(path)
    except ValueError as error:
        one_sentence(error, path)


absurd = st.sampled_from(
    [None, True, 0, -1, 10**6, 10**12, 2**63, math.nan, math.inf, "", "x", [], {}, [10**9], b"x"]
)


@settings(cases, max_examples=max(60, CASES // 4) if CASES == 200 else CASES)
@given(data=st.data())
def test_any_part_of_a_trained_checkpoint(place, runs_of, data):
    """A key dropped, of another type, or absurd; in the file, its config, shape or text encoder."""
    method = data.draw(st.sampled_from(list(SCRIPTS)))
    content = torch.load(runs_of(method)[0] / "best.pt", weights_only=True)
    of_text = json.loads(content["text_encoder"]["config"])
    parts = [content, content["config"], content.get("shape", {}), content["text_encoder"], of_text]
    part = data.draw(st.sampled_from([part for part in parts if part]))
    key = data.draw(st.sampled_from(sorted(part)))
    if data.draw(st.booleans()):
        del part[key]
    else:
        part[key] = data.draw(absurd | anything)
    if part is of_text:
        content["text_encoder"]["config"] = json.dumps(of_text, default=repr)
    path = place / "part.pt"
    torch.save(content, path)
    try:
        SCRIPTS[method].Model.from_checkpoint(path)
    except ValueError as error:
        one_sentence(error, path)


# Settings
@cases
@given(data=st.data())
def test_any_setting(data):
    config_class = SCRIPTS[data.draw(st.sampled_from(list(SCRIPTS)))].Config
    name = data.draw(st.sampled_from(list(common.settings_of(config_class))))
    try:
        config_class(**{"data": ["x"], name: data.draw(absurd | anything)})
    except ValueError as error:
        assert str(error).startswith(("--", "the setting")) and "\n" not in str(error)[:100]


@pytest.mark.slow
def test_two_thousand_cases_of_each():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__],
        env={**os.environ, "FUZZ_CASES": "2000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
