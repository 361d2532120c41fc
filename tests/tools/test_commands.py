"""Every tool once as a user starts it: a process of its own, in the repository's folder, on a small
corpus.
"""

import json
import subprocess
import sys

import pytest
import soundfile as sf

from conftest import ROOT
from test_hear import event_task


def start(*words):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory, corpus):
    """Two classes of three sounds each."""
    folder = tmp_path_factory.mktemp("sounds")
    for i, path in enumerate(sorted((corpus / "audio").glob("train*.wav"))[:6]):
        waveform, rate = sf.read(path, frames=16000)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        sf.write(folder / "ab"[i % 2] / f"{i}.wav", waveform, rate)
    return folder


def test_datasets(class_folders, tmp_path):
    done = start("tools.datasets", "folders", class_folders, "--out", tmp_path / "m")
    assert done.returncode == 0 and "all: 6 of 6 clips" in done.stdout, done.stderr
    assert (tmp_path / "m/classes.txt").read_text() == "a\nb\n"
    done = start("tools.datasets", "check", tmp_path / "m")
    assert done.returncode == 0 and "unreadable files: 0" in done.stdout, done.stderr


def test_scenes(class_folders, tmp_path):
    given = ["--train", 2, "--val", 0, "--test", 1, "--rate", 16000, "--workers", 1]
    done = start("tools.scenes", "--sounds", class_folders, "--out", tmp_path / "s", *given)
    assert done.returncode == 0 and "wrote " in done.stdout, done.stderr
    assert len((tmp_path / "s/manifest.jsonl").read_text().splitlines()) == 3


def test_captions(corpus, tmp_path):
    given = ["--task", "negatives", "--overwrite-negatives", "--data", corpus]
    done = start("tools.captions", "rewrite", *given, "--out", tmp_path / "n.jsonl")
    assert done.returncode == 0 and "captions have a negative" in done.stdout, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "n.jsonl").read_text().splitlines()]
    assert any(text for row in rows for text in row["negatives"])


def test_downstream(mga_run, corpus, tmp_path):
    given = ["--data", corpus, "--protocol", "gap", "probe", "--bootstrap", 5]
    out = tmp_path / "s.json"
    done = start("tools.downstream", mga_run[0] / "best.pt", *given, "--json", out)
    assert done.returncode == 0, done.stderr
    assert [r["protocol"] for r in json.loads(out.read_text())] == ["probe", "gap"]


def test_hear(mga_run, tmp_path):
    task = event_task(tmp_path / "task", n_files=2)
    given = ["--task", task, "--bootstrap", 5, "--json", tmp_path / "s.json"]
    done = start("tools.hear", mga_run[0] / "best.pt", *given)
    assert done.returncode == 0 and "hear_tones: 2 clips, 2 classes" in done.stdout, done.stderr
    assert "onset_F1" in json.loads((tmp_path / "s.json").read_text())[0]["scores"]


def test_figures(mga_run, corpus, tmp_path):
    pytest.importorskip("matplotlib")
    given = ["--data", corpus, "--only", "learning", "--out", tmp_path / "pictures"]
    done = start("tools.figures", mga_run[0] / "best.pt", *given)
    assert done.returncode == 0 and "learning.png" in done.stdout, done.stderr
    assert (tmp_path / "pictures/learning.png").stat().st_size > 5000
