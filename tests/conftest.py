"""Fixtures: a tiny real corpus on disk, and checkpoints trained on it for a few steps."""
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import soundfile as sf  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(2)


def write_corpus(folder: Path, n_train=12, n_val=4, n_test=6, rate=16000) -> Path:
    """10 s demo scenes; every third clip is stereo at 44.1 kHz."""
    (folder / "audio").mkdir(parents=True)
    rows, draw = [], lambda rng: common.demo_sound(rng, rate)
    for split, count in (("train", n_train), ("val", n_val), ("test", n_test)):
        for i in range(count):
            row = common.write_scene(folder / "audio", f"{split}{i}", (7, len(split), i), draw, rate, split)
            if i % 3 == 2:
                x = sf.read(folder / row["audio"])[0]
                sf.write(folder / row["audio"], np.stack([x, 0.5 * x], 1), 44100)
                row["duration"] = len(x) / 44100
                for event in row["events"]:
                    event["onset"], event["offset"] = event["onset"] * rate / 44100, event["offset"] * rate / 44100
            rows.append(row)
    common.write_lines(folder / "classes.txt", sorted({x for r in rows for x in r["labels"]}))
    common.write_lines(folder / "manifest.jsonl", [json.dumps(r) for r in rows])
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


SMALL = dict(size="tiny", audio_dim=16, audio_depths=[1, 2], audio_heads=[2, 4], text_dim=64, text_layers=1, joint_dim=32,
             codewords=48, batch_size=6, epochs=2, eval_epochs=1, save_steps=3, log_steps=1, workers=0, device="cpu")


@pytest.fixture(scope="session")
def mga_run(corpus, tmp_path_factory):
    """-> (run folder, result of main): a codebook model trained for a few steps."""
    import mga_clap
    runs = tmp_path_factory.mktemp("runs")
    cfg = common.configure(mga_clap.Config, mga_clap.PRESETS, data=[str(corpus)], name="a", runs=str(runs), **SMALL)
    return runs / "a", mga_clap.main(cfg)
