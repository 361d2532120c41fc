"""tools.scenes: scenes without leaks, from both layouts; check finds what is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf

import common
from conftest import ROOT
from tools import datasets, scenes

REAL = ROOT.parent / "shared" / "data" / "esc50_part"


def tone(path, hz, seconds=1.0, rate=22050, lead=0.5):
    t = np.arange(int(rate * seconds)) / rate
    sf.write(
        path, np.concatenate([np.zeros(int(lead * rate)), 0.3 * np.sin(2 * np.pi * hz * t)]), rate
    )


@pytest.fixture
def class_folders(tmp_path):
    for k, label in enumerate(["dog_bark", "bell", "siren"]):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for i in range(10):
            tone(tmp_path / "sounds" / label / f"{i}.wav", 300 + 200 * k + 5 * i)
    return tmp_path / "sounds"


def build(*flags):
    return scenes.scenes(scenes.parse([*map(str, flags)]))


def test_one_folder_per_class(class_folders, tmp_path, capsys):
    (class_folders / "bell" / "0.wav").write_text("broken")
    flags = ["--sounds", class_folders, "--train", 12, "--val", 4, "--test", 12, "--rate", 16000]
    out = build(*flags, "--out", tmp_path / "a", "--workers", 2)
    assert len(out["left_out"]) == 1 and "left out: " in capsys.readouterr().out
    rows = common.read_manifest([str(tmp_path / "a")])
    common.require(rows, "captions", "events", "phrases", "labels")
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [12, 4, 12]
    assert (tmp_path / "a/classes.txt").read_text().split() == ["bell", "dog_bark", "siren"]
    text = json.dumps([r["captions"] for r in rows])
    assert "dog bark" in text and "dog_bark" not in text
    # a swapped scene holds the same sounds, the reverse order: energies agree, onsets are mirrored
    # in order
    row = next(r for r in rows if r.get("swapped_audio"))
    x, y = (sf.read(row[k])[0] for k in ("audio", "swapped_audio"))
    assert (
        len(x) == len(y)
        and (x**2).sum() == pytest.approx((y**2).sum(), rel=0.05)
        and not np.array_equal(x, y)
    )
    build(*flags, "--out", tmp_path / "b", "--workers", 1)  # the number of workers changes nothing
    for name in ("manifest.jsonl", "audio/train_00003.wav"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(FileExistsError, match="already there; choose another name or remove it"):
        build(*flags, "--out", tmp_path / "a")


def test_no_recording_is_in_two_splits():
    sounds = [
        {
            "audio": f"{label}{i}{take}",
            "label": label,
            "recording": f"{label}{i}",
            "fold": 1 + i % 5,
        }
        for label in "abc"
        for i in range(20)
        for take in "AB"
    ]
    for folds in (True, False):
        given = [{**s, "fold": s["fold"] if folds else None} for s in sounds]
        splits = scenes.split_sounds(given, [1, 2, 3], [5], 0.2, seed=0)
        owned = {k: {s["recording"] for s in v} for k, v in splits.items()}
        assert (
            not owned["train"] & owned["val"]
            and not owned["train"] & owned["test"]
            and not owned["val"] & owned["test"]
        )
        assert all(len({s["label"] for s in v}) == 3 for v in splits.values())
        if folds:
            assert {s["fold"] for s in splits["test"]} == {5} and {
                s["fold"] for s in splits["train"] + splits["val"]
            } == {1, 2, 3}
    # one recording cut into two classes, in a training and a test fold, as ESC-50's 234879
    shared = {**sounds[0], "audio": "shared", "label": "d", "recording": "b4"}  # of fold 5
    splits = scenes.split_sounds([*sounds, shared], [1, 2, 3], [5], 0.2, seed=0)
    assert "shared" not in {s["audio"] for s in splits["train"] + splits["val"]}


def test_takes_of_a_recording_are_known_by_their_names(tmp_path):
    (tmp_path / "rain").mkdir()
    for name in ("1-234-A-0.wav", "1-234-B-0.wav", "rain.wav"):
        tone(tmp_path / "rain" / name, 300)
    assert [s["recording"] for s in scenes.list_sounds(tmp_path)] == [
        "234",
        "234",
        str(tmp_path / "rain/rain.wav"),
    ]


def test_active_part_trims_silence():
    x = np.concatenate([np.zeros(8000), np.ones(4000), np.zeros(4000)]).astype(np.float32)
    kept = scenes.active_part(x, 16000)
    assert (kept.start, kept.stop) == (pytest.approx(8000, abs=320), pytest.approx(12000, abs=320))


def test_esc_mixed_up_is_two_recordings_in_order_with_the_swapped_caption_and_audio(
    class_folders, tmp_path
):
    flags = [
        "--preset",
        "esc-mixed-up",
        "--sounds",
        class_folders,
        "--train",
        20,
        "--val",
        4,
        "--test",
        8,
    ]
    build(*flags, "--out", tmp_path / "m")
    rows = common.read_manifest([str(tmp_path / "m")])
    common.require(rows, "captions", "negatives", "events", "labels")
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [20, 4, 8]
    connectives = set()
    for row in rows:
        first, second = (label.replace("_", " ") for label in row["labels"])
        word = row["captions"][0].removeprefix(first).removesuffix(second).strip()
        connectives.add(word)
        assert (
            first != second
            and row["captions"] == [f"{first} {word} {second}"]
            and row["negatives"] == [f"{second} {word} {first}"]
        )
        assert (
            row["audio"].endswith(".flac")
            and sf.info(row["audio"]).samplerate == 22050
            and sf.info(row["audio"]).frames == 220500
        )
        assert ("swapped_audio" in row) == (row["split"] == "test")
        x = sf.read(row["audio"])[0]
        for k, event in enumerate(
            row["events"]
        ):  # 0.5 s of silence, then 1 s of tone, in each half
            assert event["label"] == row["labels"][k] and event["onset"] == pytest.approx(
                5 * k + 0.5, abs=0.03
            )
            assert event["offset"] == pytest.approx(5 * k + 1.5, abs=0.03)
            inside = x[round(event["onset"] * 22050) : round(event["offset"] * 22050)]
            assert (inside**2).sum() == pytest.approx(
                (x[k * 110250 : (k + 1) * 110250] ** 2).sum(), rel=0.01
            )
        if row["split"] == "test":
            assert np.array_equal(sf.read(row["swapped_audio"])[0], np.roll(x, 110250))
    assert connectives == {"followed by", "and then"}
    # interrupted: no manifest yet, some audio there; the second call continues to the same bytes
    files = {p.name: p.read_bytes() for p in (tmp_path / "m/audio").iterdir()}
    manifest = (tmp_path / "m/manifest.jsonl").read_bytes()
    (tmp_path / "m/manifest.jsonl").unlink()
    kept = tmp_path / "m/audio/train_00001.flac"
    stamp = kept.stat().st_mtime_ns
    for name in ("train_00000.flac", "test_00003_swapped.flac"):
        (tmp_path / "m/audio" / name).unlink()
    with pytest.raises(FileExistsError, match="made with other settings"):
        build(*flags, "--out", tmp_path / "m", "--seed", 1)
    extra = next(class_folders.glob("*/*"))
    extra = extra.with_name("another" + extra.suffix)
    sf.write(extra, 0.3 * np.sin(np.arange(22050)), 22050)
    # the folder of sounds has grown: old audio must not stand under new captions
    with pytest.raises(FileExistsError, match="other settings or of other sounds"):
        build(*flags, "--out", tmp_path / "m")
    extra.unlink()
    build(*flags, "--out", tmp_path / "m", "--workers", 1)
    assert (
        kept.stat().st_mtime_ns == stamp
        and (tmp_path / "m/manifest.jsonl").read_bytes() == manifest
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "m/audio").iterdir()} == files


def test_esc_mixed_up_options(class_folders, tmp_path):
    flags = [
        "--preset",
        "esc-mixed-up",
        "--sounds",
        class_folders,
        "--train",
        40,
        "--val",
        0,
        "--test",
        4,
    ]
    build(
        *flags, "--out", tmp_path / "o", "--overlay", 0.5, "--rate", 16000, "--format", "wav"
    )  # resampled in forked workers
    rows = common.read_manifest([str(tmp_path / "o")])
    over = [r for r in rows if r["negatives"] == [None]]
    assert 10 < len(over) < 34 and all(
        r["duration"] == 5.0 and "swapped_audio" not in r for r in over
    )
    assert all("while" in r["captions"][0] or "at the same time" in r["captions"][0] for r in over)
    assert all(
        sf.info(r["audio"]).frames == 16000 * r["duration"] and r["audio"].endswith(".wav")
        for r in rows
    )
    with pytest.raises(
        ValueError,
        match="--overlay 0.2: expected a share between 0 and 1, with --preset esc-mixed-up",
    ):
        build("--sounds", class_folders, "--out", tmp_path / "p", "--overlay", 0.2)
    for label in ("bell", "siren"):
        for path in (class_folders / label).iterdir():
            path.unlink()
    with pytest.raises(ValueError, match="has recordings of one class only; a clip needs two"):
        build(*flags, "--out", tmp_path / "q")


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the real sounds (../shared/data/esc50_part) are not here"
)
def test_esc50_layout_on_real_sounds(tmp_path):
    build(
        "--sounds",
        REAL,
        "--out",
        tmp_path / "s",
        "--train",
        20,
        "--val",
        4,
        "--test",
        10,
        "--rate",
        16000,
    )
    rows = common.read_manifest([str(tmp_path / "s")])
    assert len((tmp_path / "s/classes.txt").read_text().split()) == 10
    assert len(rows) == 34
    report = datasets.check(datasets.parse(["check", str(tmp_path / "s")]))
    assert (
        report["unreadable"] == []
        and report["shared"] == []
        and report["splits"]["test"]["clips"] == 10
    )
    sounds = scenes.list_sounds(REAL)
    assert len(sounds) == 560 and len({s["label"] for s in sounds}) == 50


def test_check_reports_leaks_rates_and_broken_files(tmp_path, capsys):
    for name, rate in (("1-100-A-0.wav", 8000), ("1-100-B-0.wav", 16000), ("b.wav", 16000)):
        tone(tmp_path / name, 440, rate=rate)
    (tmp_path / "c.wav").write_text("no sound")
    rows = [
        {"audio": "1-100-A-0.wav", "split": "train", "labels": ["dog"]},
        {"audio": "1-100-B-0.wav", "split": "test"},
        {"audio": "b.wav", "split": "test", "duration": 9.0},
        {"audio": "c.wav", "split": "train"},
    ]
    common.write_lines(tmp_path / "m.jsonl", [json.dumps(r) for r in rows])
    report = datasets.check(datasets.parse(["check", str(tmp_path / "m.jsonl"), "--workers", "1"]))
    assert report["shared"] == ["100"] and report["clips"] == 4
    assert sorted(os.path.basename(t.split(":")[0]) for t in report["unreadable"]) == [
        "b.wav",
        "c.wav",
    ]
    out = capsys.readouterr().out
    assert (
        "rates {8000: 1}" in out
        and "recordings shared between splits: 1 ['100']" in out
        and "1 classes: dog 1" in out
    )


def test_recordings_of_other_manifests_are_left_out(class_folders, tmp_path, capsys):
    held = sorted((class_folders / "bell").glob("*.wav"))[:4]
    rows = [{"audio": str(path), "split": "test"} for path in held]
    common.write_lines(tmp_path / "held.jsonl", [json.dumps(row) for row in rows])
    flags = ["--train", 6, "--val", 0, "--test", 3, "--rate", 16000, "--workers", 1]
    flags += ["--sounds", class_folders, "--out", tmp_path / "s"]
    build(*flags, "--exclude", tmp_path / "held.jsonl")
    assert "4 clips left out, 0 by id and 4 by content" in capsys.readouterr().out
    with pytest.raises(ValueError, match="every recording of it is excluded"):
        rows = [{"audio": str(path)} for path in class_folders.glob("*/*.wav")]
        common.write_lines(tmp_path / "all.jsonl", [json.dumps(row) for row in rows])
        build(*flags[:-1], tmp_path / "t", "--exclude", tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            [scenes, "--sounds", "nowhere", "--out", "OUT"],
            "--sounds nowhere: no such folder",
        ),
        (
            [scenes, "--sounds", "EMPTY", "--out", "OUT"],
            "found neither meta/esc50.csv nor folders",
        ),
        ([scenes, "--sounds", "ONE", "--out", "OUT"], "no recording is left for the"),
        (
            [scenes, "--sounds", "ONE", "--out", "OUT", "--train", "-4"],
            "--train, --val, --test (-4, 150, 300): expected numbers",
        ),
        (
            [scenes, "--sounds", "ONE", "--out", "OUT", "--val-fraction", "nan"],
            "--val-fraction nan: expected a share",
        ),
        ([datasets, "check", "nowhere"], "nowhere: no such manifest"),
    ],
)
def test_bad_input_is_one_clear_sentence(tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "bell").mkdir(parents=True)
    tone(tmp_path / "one" / "bell" / "x.wav", 300)
    names = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "ONE": tmp_path / "one"}
    tool, *words = flags
    with pytest.raises(SystemExit) as stop:  # as the command ends; any other error fails the test
        run = scenes.scenes if tool is scenes else datasets.main
        common.run_entry(run, lambda: tool.parse([str(names.get(w, w)) for w in words]))
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["scenes", "resample"])
def test_kill_9_at_random_moments_and_again_gives_the_uninterrupted_result(
    class_folders, tmp_path, tool
):
    words = ["-m", f"tools.{tool}", "--preset", "esc-mixed-up", "--sounds", str(class_folders)]
    words += ["--train", "400", "--val", "20", "--test", "40", "--rate", "8000", "--seed", "1"]
    if tool == "resample":
        lines = [
            json.dumps({"audio": str(path), "captions": ["x"]})
            for path in sorted(class_folders.glob("*/*"))
        ]
        common.write_lines(tmp_path / "m.jsonl", lines)
        words = ["-m", "tools.datasets", "resample", str(tmp_path / "m.jsonl"), "--rate", "8000"]

    def files(folder):
        found = sorted(p for p in folder.rglob("*") if p.is_file())
        return {p.relative_to(folder): p.read_bytes() for p in found if p.suffix != ".tmp"}

    def start(folder):
        call = [sys.executable, *words, "--out", str(folder), "--workers", "2"]
        return subprocess.Popen(
            call,
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds, draw, kills = time.monotonic() - began, random.Random(0), 0
    for _ in range(6):
        process = start(tmp_path / "killed")
        time.sleep(draw.uniform(0.5, 1.0) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    if not (tmp_path / "killed/manifest.jsonl").exists():
        assert start(tmp_path / "killed").wait() == 0
    assert kills and files(tmp_path / "killed") == files(tmp_path / "whole")
