"""--cache: audio decoded once; and reading, batching and moving what it gives."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import common
from conftest import ROOT, log_of, write_corpus
from conftest import config as config_of
from test_scripts import SCRIPTS, every_script


def sounds(folder, n=5, rate=16000, seconds=2.0):
    """16-bit files of different lengths -> manifest rows."""
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        path = folder / f"s{i}.wav"
        sf.write(path, rng.uniform(-0.9, 0.9, int(rate * (seconds + 0.1 * i))), rate)
        rows.append({"audio": str(path), "duration": seconds + 0.1 * i})
    return rows


def crops(read, rows, length_s=1.0):
    return [
        np.array(
            read(
                row["audio"],
                length_s=length_s,
                crop_rng=np.random.default_rng(i),
                expected_s=row["duration"],
            )
        )
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_crop_has_the_samples_of_the_file(tmp_path, workers):
    rows = sounds(tmp_path)
    from_files, cached = (
        common.audio_reader("", rows, 16000),
        common.audio_reader(str(tmp_path / "cache"), rows, 16000, workers),
    )
    for length_s in (1.0, None, 9.0):
        for a, b in zip(crops(from_files, rows, length_s), crops(cached, rows, length_s)):
            assert a.dtype == np.float32 and b.dtype == np.int16
            assert np.array_equal(
                common.as_float(b).numpy(), a
            )  # 16-bit sources of the model's own rate: exact
    assert sum(
        p.stat().st_size for p in (tmp_path / "cache").iterdir() if p.suffix == ".i16"
    ) == 2 * sum(int(16000 * row["duration"]) for row in rows)
    resampled = crops(
        common.audio_reader(str(tmp_path / "cache"), rows, 8000), rows, None
    )  # another rate lies beside it
    for a, b in zip(crops(common.audio_reader("", rows, 8000), rows, None), resampled):
        assert (
            np.abs(common.as_float(b).numpy() - a.clip(-1, 32767 / 32768)).max()
            <= 0.5 / 32768 + 1e-7
        )


def test_only_the_first_minute_is_kept(tmp_path):
    sf.write(tmp_path / "long.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 1000 * 75), 1000)
    rows = [{"audio": str(tmp_path / "long.wav"), "duration": 75.0}]
    assert (
        len(crops(common.audio_reader(str(tmp_path / "c"), rows, 1000), rows, None)[0]) == 60 * 1000
    )


def test_what_changed_is_decoded_again_and_nothing_else(tmp_path, monkeypatch):
    rows, decoded, read_audio = sounds(tmp_path), [], common.read_audio
    monkeypatch.setattr(
        common,
        "read_audio",
        lambda path, *rest: decoded.append(os.path.basename(path)) or read_audio(path, *rest),
    )
    folder = str(tmp_path / "cache")
    before = crops(common.audio_reader(folder, rows, 16000), rows, None)
    assert sorted(decoded) == [f"s{i}.wav" for i in range(5)]
    decoded.clear()
    common.audio_reader(folder, rows, 16000)
    assert not decoded
    x = sf.read(rows[1]["audio"])[0]
    sf.write(rows[1]["audio"], x[::-1], 16000)  # the same size
    os.utime(rows[1]["audio"], ns=(1, 1))
    rows += [{"audio": str(tmp_path / "new.wav"), "duration": 1.0}]
    sf.write(rows[-1]["audio"], x[:16000], 16000)
    after = crops(common.audio_reader(folder, rows, 16000), rows, None)
    assert sorted(decoded) == ["new.wav", "s1.wav"]
    assert np.array_equal(after[1], before[1][::-1]) and all(
        np.array_equal(after[i], before[i]) for i in (0, 2, 3, 4)
    )
    for row in rows:
        os.remove(row["audio"])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(crops(common.audio_reader(folder, rows, 16000), rows, None), after)
    )  # the cache alone serves


def test_a_killed_or_damaged_cache_is_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "CACHE_FILES", 2)
    rows, folder, read_audio, calls = sounds(tmp_path), tmp_path / "cache", common.read_audio, []
    with monkeypatch.context() as patch:

        def dies(path, *rest):
            calls.append(path)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return read_audio(path, *rest)

        patch.setattr(common, "read_audio", dies)
        with pytest.raises(KeyboardInterrupt):
            common.audio_reader(str(folder), rows, 16000)
    assert (
        len(list(folder.glob("*.json"))) == 1
    )  # the first part is whole, of the second there is nothing that counts
    whole = crops(common.audio_reader(str(folder), rows, 16000), rows, None)
    assert all(
        np.array_equal(common.as_float(a).numpy(), b)
        for a, b in zip(whole, crops(common.audio_reader("", rows, 16000), rows, None))
    )
    part = sorted(folder.glob("*.i16"))[0]
    part.write_bytes(part.read_bytes()[:-2])
    sorted(folder.glob("*.json"))[1].write_text("{")
    common._mapped.cache_clear()
    again = crops(common.audio_reader(str(folder), rows, 16000), rows, None)
    assert (
        all(np.array_equal(a, b) for a, b in zip(whole, again))
        and capsys.readouterr().out.count("damaged part of the cache") == 2
    )


def test_an_index_that_is_taken_away_meanwhile_is_a_damaged_part(tmp_path, capsys):
    sf.write(tmp_path / "a.wav", np.zeros(1000) + 0.1, 32000)
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/32000_{'0' * 16}.json").symlink_to(
        "gone"
    )  # listed, but not to be looked at
    cache = common.AudioCache(str(tmp_path / "cache"), [{"audio": str(tmp_path / "a.wav")}], 32000)
    assert (
        len(cache.read(str(tmp_path / "a.wav"))) == 1000
        and "damaged part of the cache" in capsys.readouterr().out
    )


def test_unreadable_files_are_remembered_with_their_reason(tmp_path):
    rows = sounds(tmp_path, 2)
    (tmp_path / "text.wav").write_text("no sound")
    rows += [
        {"audio": str(tmp_path / "text.wav")},
        {"audio": str(tmp_path / "gone.wav")},
        {"audio": rows[0]["audio"], "duration": 9.0},
    ]
    read = common.audio_reader(str(tmp_path / "c"), rows[:4], 16000)
    for row, reason in ((rows[2], "cannot be read as audio"), (rows[3], "file not found")):
        with pytest.raises(common.AudioError, match=reason):
            read(row["audio"])
    with pytest.raises(
        common.AudioError, match="truncated"
    ):  # the manifest declares another duration now
        common.audio_reader(str(tmp_path / "c"), rows[4:], 16000)(rows[4]["audio"])
    sf.write(tmp_path / "gone.wav", np.full(1600, 0.5), 16000)
    assert (
        len(common.audio_reader(str(tmp_path / "c"), rows, 16000)(rows[3]["audio"])) == 1600
    )  # it is there now


def test_too_little_room_and_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    rows = sounds(tmp_path, 2)
    monkeypatch.setattr(
        common.shutil, "disk_usage", lambda folder: common.shutil._ntuple_diskusage(10, 9, 1000)
    )
    with pytest.raises(ValueError, match=r"--cache .*c: about 0.0 GB are needed, 0.0 GB are free"):
        common.audio_reader(str(tmp_path / "c"), rows, 16000)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="--cache .*file.x: this folder cannot be made"):
        common.audio_reader(str(tmp_path / "file/x"), rows, 16000)


def test_two_processes_build_one_cache_together(tmp_path):
    rows = sounds(tmp_path, 8, 8000, 0.5)
    code = f"""
import json, sys, time; sys.path.insert(0, {str(ROOT)!r})
import common
common.CACHE_FILES = 1
common.start_device("cpu")
rows = json.loads({json.dumps(json.dumps(rows))})
read, decoded = common.read_audio, []
common.read_audio = lambda path, *rest: decoded.append(path) or time.sleep(0.3) or read(path, *rest)
common.barrier()
cache = common.audio_reader({str(tmp_path / "c")!r}, rows, 8000)
counts = [len(decoded), sum(len(cache(row["audio"])) for row in rows)]
open(f"{tmp_path}/{{common.rank_and_world()[0]}}.json", "w").write(json.dumps(counts))
common.barrier()
"""
    (tmp_path / "build.py").write_text(code)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29617",
            str(tmp_path / "build.py"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    pairs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [total for _, total in pairs] == [sum(int(8000 * row["duration"]) for row in rows)] * 2
    assert 8 <= sum(n for n, _ in pairs) <= 10 and all(
        n for n, _ in pairs
    )  # shared, at most a part or two done twice


@every_script
def test_training_from_the_cache_is_training_from_the_files_bit_for_bit(tmp_path, method):
    """16-bit files of the model's own rate lose nothing; others are rounded to 16 bits after they
    are resampled.
    """
    data = write_corpus(
        tmp_path / "data",
        8,
        2,
        0,
        {"mga_clap": 32000, "t_clap": 48000, "curation_clap": 44100}.get(method, 16000),
        mixed=False,
    )
    losses = []
    for cache in ("", str(tmp_path / "cache")):
        folder = tmp_path / f"runs{bool(cache)}"
        SCRIPTS[method].main(config_of(method, data, folder, name="a", cache=cache))
        losses.append([line.get("loss") for line in log_of(folder / "a")])
    assert losses[0] == losses[1] and list((tmp_path / "cache").glob("*.i16"))


def test_batches_keep_their_type_until_they_are_on_the_device():
    batch, n_samples = common.pad_batch(
        [np.array([16384, -32768], np.int16), np.array([1], np.int16)], 3
    )
    assert batch.dtype == torch.int16 and n_samples.tolist() == [2, 1]
    moved = common.to_device(
        [{"waveform": batch, "ids": torch.tensor([3])}, ["a.wav"], None], torch.device("cpu")
    )
    assert moved[0]["waveform"].tolist() == [[0.5, -1.0, 0.0], [1 / 32768, 0.0, 0.0]] and moved[
        1:
    ] == [["a.wav"], None]
    assert moved[0]["ids"].dtype == torch.int64


def test_every_batch_comes_once_and_in_order():
    batches = [(torch.full((2,), i), f"{i}.wav") for i in range(4)]
    got = list(common.batches_on(torch.device("cpu"), batches))
    assert [(x.tolist(), name) for x, name in got] == [(x.tolist(), name) for x, name in batches]
