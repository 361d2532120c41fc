"""The scripts as their users run them: training, resume, two processes, embeddings, weights, bad
input.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest
import soundfile as sf
import torch

import cacophony
import collat
import common
import curation_clap
import mga_clap
import t_clap
from conftest import ROOT, SMALL_OF, log_of
from conftest import config as config_of

PYTHON = [sys.executable]
SCRIPTS = {
    "mga_clap": mga_clap,
    "t_clap": t_clap,
    "cacophony": cacophony,
    "collat": collat,
    "curation_clap": curation_clap,
}
every_script = pytest.mark.parametrize("method", SCRIPTS)
config = functools.partial(config_of, "mga_clap")


def run_cli(*args, script="mga_clap.py"):
    return subprocess.run(
        [*PYTHON, str(ROOT / script), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )


# Training
def test_a_run_writes_its_log_checkpoints_and_scores(mga_run):
    folder, result = mga_run
    lines = log_of(folder)
    assert [x["step"] for x in lines] == list(range(1, 9))  # 12 clips x 2 captions / 6 x 2 epochs
    assert {
        "loss",
        "ln_B",
        "batch_R@1",
        "temperature",
        "active_codewords",
        "lr",
        "pairs_per_s",
        "skipped",
    } <= set(lines[0])
    assert (
        lines[0]["ln_B"] == pytest.approx(math.log(6)) and 1 <= lines[-1]["active_codewords"] <= 48
    )
    assert json.loads((folder / "eval.json").read_text()) == result
    assert (
        set(result["scores"]) == set(result["chance"]) and "frame_mAP_centred" in result["scores"]
    )
    best, last = (
        set(torch.load(folder / name, weights_only=True)) for name in ("best.pt", "last.pt")
    )
    assert {"method", "config", "model", "step", "versions", "text_encoder"} <= best
    assert last == best | {"optimiser"}  # which only a resumed run needs


@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        dict(aggregator="mean", locality_blocks=0, hard_negatives=False),
        dict(variant="official"),
    ],
    ids=["paper", "clap", "official"],
)
def test_overfits_eight_pairs(tmp_path, corpus, overrides):
    rows = [json.loads(x) for x in (corpus / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["duration"] == 10][:8]
    unique = [f"sound number {w}" for w in "one two three four five six seven eight".split()]
    for row, caption in zip(rows, unique):
        row.update(captions=[caption], negatives=[None], audio=str(corpus / row["audio"]))
        row.pop("split")
    common.write_lines(
        tmp_path / "eight.jsonl", [json.dumps(r) for r in [*rows, {**rows[0], "split": "val"}]]
    )
    cfg = config(
        tmp_path / "eight.jsonl",
        tmp_path / "runs",
        batch_size=8,
        epochs=40,
        eval_epochs=40,
        save_steps=100,
        lr=3e-3,
        warmup_epochs=5.0,
        joint_dim=128,
        codewords=256,
        name="o",
        **overrides,
    )
    mga_clap.main(cfg)
    lines = log_of(tmp_path / "runs/o")
    extra = 2 / math.sqrt(8 * 128) if overrides.get("variant") else 0  # D7 has a floor
    late = lines[-5:]  # masks and dropout make single steps jump
    assert (
        np.mean([x["loss"] for x in late]) < 0.5 + extra < lines[0]["loss"]
        and np.mean([x["batch_R@1"] for x in late]) > 0.85
    )


@every_script
def test_bf16_autocast_trains_on_finite_losses_close_to_fp32(corpus, tmp_path, runs_of, method):
    SCRIPTS[method].main(config_of(method, corpus, tmp_path, name="b", precision="bf16"))

    def read(folder):
        return [line["loss"] for line in log_of(folder) if "loss" in line]

    half, full = read(tmp_path / "b"), read(runs_of(method)[0])
    assert (
        half[:3] == pytest.approx(full[:3], abs=0.15) and half != full and np.isfinite(half).all()
    )


@pytest.mark.parametrize(
    "overrides",
    [
        dict(locality_blocks=2),
        dict(audio_patch=8, audio_depths=[1, 1, 1], audio_heads=[1, 2, 4]),
    ],
    ids=str,
)
def test_every_ablation_trains_and_reloads(corpus, tmp_path, overrides):
    result = mga_clap.main(config(corpus, tmp_path, name="x", epochs=1, **overrides))
    assert np.isfinite(result["scores"]["t2a_R@1"])
    model = mga_clap.Model.from_checkpoint(tmp_path / "x" / "last.pt")
    for key, value in overrides.items():
        assert getattr(model.cfg, key) == value


def strip(path):
    """Weights and, where the file has it, the optimiser's state, by name."""
    content = torch.load(path, weights_only=True)
    optimiser = content.get("optimiser", {"state": {}})["state"]
    states = {f"opt{i}.{k}": v for i, state in optimiser.items() for k, v in state.items()}
    return content["model"] | states


@pytest.mark.parametrize(
    "method, workers, other",
    [
        pytest.param("mga_clap", 0, "codewords", marks=pytest.mark.slow),
        ("mga_clap", 2, "codewords"),
        ("t_clap", 2, "joint_dim"),
        ("collat", 2, "blocks"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    corpus, tmp_path, monkeypatch, runs_of, capsys, method, workers, other
):
    class Killed(Exception):
        pass

    script, seed_step = SCRIPTS[method], common.seed_step

    def killer(seed, step, *place):
        if step == 5:  # after the write of last.pt at step 4
            raise Killed
        seed_step(seed, step, *place)

    monkeypatch.setattr(common, "seed_step", killer)
    with pytest.raises(Killed):
        script.main(config_of(method, corpus, tmp_path, name="a", workers=workers))
    monkeypatch.setattr(common, "seed_step", seed_step)
    resumed = common.configure(script.Config, resume=True, name="a", runs=str(tmp_path))
    assert getattr(resumed, other) == SMALL_OF[method][other] and resumed.resume
    result, (folder, uninterrupted) = script.main(resumed), runs_of(method)
    whole = strip(folder / "last.pt")
    for key, value in strip(tmp_path / "a/last.pt").items():
        assert torch.equal(value, whole[key]), key
    assert result["scores"] == uninterrupted["scores"]

    def drop(line):
        return {k: v for k, v in json.loads(line).items() if k != "pairs_per_s"}

    logs = [
        [drop(x) for x in (p / "log.jsonl").read_text().splitlines()]
        for p in (tmp_path / "a", folder)
    ]
    assert logs[0] == logs[1]
    capsys.readouterr()
    moved = dict(resume=True, name="a", runs=str(tmp_path), data=[f"{corpus}/manifest.jsonl"])
    common.Run(common.configure(script.Config, **moved), method).checkpoint()
    assert f"the run was started with --data {corpus}; goes on" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=f"--resume: --{other.replace('_', '-')} is 7 but the run was started with"
    ):
        script.main(
            common.configure(
                script.Config,
                resume=True,
                name="a",
                runs=str(tmp_path),
                **{other: 7},
            )
        )
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        script.main(config_of(method, corpus, tmp_path, name="a"))


@pytest.mark.parametrize("stage", ["mae", "contrastive"])
def test_cacophony_killed_in_either_stage_resumes_bit_for_bit(
    corpus, tmp_path, monkeypatch, runs_of, stage
):
    class Killed(Exception):
        pass

    seed_step = common.seed_step

    def killer(seed, step, *place):
        if step == 3 and (tmp_path / "a/mae.pt").exists() == (
            stage == "contrastive"
        ):  # after the write of last.pt at step 2
            raise Killed
        seed_step(seed, step, *place)

    monkeypatch.setattr(common, "seed_step", killer)
    with pytest.raises(Killed):
        cacophony.main(config_of("cacophony", corpus, tmp_path, name="a"))
    monkeypatch.setattr(common, "seed_step", seed_step)
    assert torch.load(tmp_path / "a/last.pt", weights_only=True)["stage"] == stage
    result = cacophony.main(
        common.configure(cacophony.Config, resume=True, name="a", runs=str(tmp_path))
    )
    folder, uninterrupted = runs_of("cacophony")
    for name in ("mae.pt", "last.pt"):
        whole = strip(folder / name)
        for key, value in strip(tmp_path / "a" / name).items():
            assert torch.equal(value, whole[key]), key
    assert result == uninterrupted

    def drop(line):
        return {k: v for k, v in json.loads(line).items() if not k.endswith("_per_s")}

    logs = [
        [drop(x) for x in (p / "log.jsonl").read_text().splitlines()]
        for p in (tmp_path / "a", folder)
    ]
    stages = [line["stage"] for line in log_of(tmp_path / "a")]
    assert logs[0] == logs[1] and stages == ["mae"] * 4 + ["contrastive"] * 4


@pytest.mark.parametrize("stage", ["teacher", "curate", "student"])
def test_curation_clap_killed_in_any_stage_resumes_bit_for_bit(
    corpus, tmp_path, monkeypatch, runs_of, stage
):
    class Killed(Exception):
        pass

    seed_step, write = common.seed_step, curation_clap.write_pairs

    def killer(seed, step, *place):
        if (
            step == 3
            and (tmp_path / "a/ads.jsonl").exists() == (stage == "student")
            and stage != "curate"
        ):
            raise Killed
        seed_step(seed, step, *place)

    def stop(*args):
        raise Killed

    monkeypatch.setattr(common, "seed_step", killer)
    if stage == "curate":
        monkeypatch.setattr(curation_clap, "write_pairs", stop)
    with pytest.raises(Killed):
        curation_clap.main(config_of("curation_clap", corpus, tmp_path, name="a"))
    monkeypatch.setattr(common, "seed_step", seed_step)
    monkeypatch.setattr(curation_clap, "write_pairs", write)
    result = curation_clap.main(
        common.configure(curation_clap.Config, resume=True, name="a", runs=str(tmp_path))
    )
    folder, uninterrupted = runs_of("curation_clap")
    for name in ("teacher.pt", "last.pt"):
        whole = strip(folder / name)
        for key, value in strip(tmp_path / "a" / name).items():
            assert torch.equal(value, whole[key]), key
    assert (
        result == uninterrupted
        and (tmp_path / "a/ads.jsonl").read_bytes() == (folder / "ads.jsonl").read_bytes()
    )

    def drop(line):
        return {k: v for k, v in json.loads(line).items() if not k.endswith("_per_s")}

    logs = [
        [drop(x) for x in (p / "log.jsonl").read_text().splitlines()]
        for p in (tmp_path / "a", folder)
    ]
    assert logs[0] == logs[1]


def test_a_training_of_few_steps_says_what_would_be_enough(corpus, tmp_path, capsys):
    mga_clap.main(config(corpus, tmp_path, epochs=1))
    said = capsys.readouterr().out  # 12 clips of 2 captions in batches of 6: 4 steps an epoch
    assert "only 4 steps: random weights need some 200 (--epochs 50)" in said
    assert "of 24 captions are distinct" in said
    # the one epoch is all warm-up
    assert "the learning rate rises to the last step: warm-up of 4 steps" in said
    run = common.Run(common.RunConfig(), "x")
    common.say_if_few(run, "--epochs", 15, 200, ["a"])
    assert "only" not in capsys.readouterr().out


def test_the_commands_at_the_end_of_a_run_can_be_pasted(corpus, tmp_path, runs_of, capsys):
    """Also with a space in a path; a run that starts from a model is not compared with plain CLAP,
    which would start from the same codebook.
    """
    data = tmp_path / "two words"
    data.symlink_to(corpus)
    mga_clap.main(config(data, tmp_path / "my runs", epochs=1, name="a"))
    score, plain = capsys.readouterr().out.split("Next:\n")[1].splitlines()
    words = shlex.split(score)
    assert words[2:5] == [str(tmp_path / "my runs/a/best.pt"), "--data", str(data)]
    words = shlex.split(plain.split("     (plain CLAP")[0])[2:]
    cfg = common.cli(mga_clap.Config, mga_clap.__doc__, words)
    assert (cfg.data, cfg.aggregator, cfg.locality_blocks) == ([str(data)], "mean", 0)
    weights = str(runs_of("mga_clap")[0] / "best.pt")
    capsys.readouterr()
    mga_clap.main(config(corpus, tmp_path, epochs=1, name="b", weights=weights))
    said = capsys.readouterr().out.split("Next:")[1]
    assert "--no-hard-negatives" in said and "--aggregator mean" not in said


def test_runs_without_a_name_are_numbered(corpus, tmp_path):
    for number in (1, 2):
        mga_clap.main(config(corpus, tmp_path, epochs=1))
        assert (tmp_path / f"mga_clap-{number}" / "best.pt").exists()


@pytest.mark.parametrize(
    "method, flags",
    [
        ("cacophony", dict(mae_steps=1, steps=1)),
        ("curation_clap", dict(teacher_epochs=1, stage="teacher")),
    ],
)
def test_stages_share_a_numbered_folder_and_the_caller_s_settings_stay(
    corpus, tmp_path, method, flags
):
    cfg = config_of(method, corpus, tmp_path, **flags)
    SCRIPTS[method].main(cfg)
    assert [p.name for p in tmp_path.iterdir()] == [f"{method}-1"] and cfg.name == ""


# DESIGN: SyncBatchNorm does not run on a CPU, so batch norm stays on running statistics, and masks
# are off, since every process draws its own
TWO_PROCESSES = """
import sys; sys.path.insert(0, {root!r})
import torch, common, {method} as script
train = script.Model.train
script.Model.train = lambda self, mode=True: train(self, False)
script.main(common.cli(script.Config, "x"))
"""


@pytest.mark.parametrize(
    "method, bad, only_two",
    [
        pytest.param("mga_clap", False, (), marks=pytest.mark.slow),
        ("mga_clap", True, ("--micro-batch", "2")),
        ("t_clap", True, ("--micro-batch", "2")),
        ("cacophony", True, ("--micro-batch", "2")),
        ("collat", True, ("--micro-batch", "2")),
        ("curation_clap", True, ("--micro-batch", "2")),
    ],
    ids=[
        "mga_clap",
        "mga_clap, one unreadable, gradient caching in two only",
        "t_clap, one unreadable, gradient caching in two only",
        "cacophony with SAM, one unreadable, gradient caching in two only",
        "collat, one unreadable, gradient caching in two only",
        "curation_clap, a curation and a soft-labelled student, one unreadable, gradient caching "
        "in two only",
    ],
)
def test_two_gloo_processes_equal_one_with_the_joint_batch(
    corpus, tmp_path, monkeypatch, method, bad, only_two, runs_of
):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    if bad:
        (data / "audio/train4.wav").write_text("broken")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), method=method))
    flags = [
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--max-bad",
        "0.5",
        "--precision",
        "fp32",
    ]
    if method == "cacophony":  # stage 1 masks at random, in every process anew
        flags += ["--stage", "contrastive", "--audio-weights", "none"]
    if method == "collat":  # every process draws its own noise
        flags += ["--uni-weight", "0"]
    if method == "curation_clap":
        flags += ["--teacher", str(runs_of(method)[0] / "teacher.pt")]
    for key, value in SMALL_OF[method].items():
        flags += [
            "--" + key.replace("_", "-"),
            *map(str, value if isinstance(value, list) else [value]),
        ]
    module = SCRIPTS[method]
    train = module.Model.train
    monkeypatch.setattr(module.Model, "train", lambda self, mode=True: train(self, False))
    module.main(common.cli(module.Config, "x", [*flags, "--name", "one"]))
    two = subprocess.run(
        [
            *PYTHON,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            *flags,
            "--name",
            "two",
            *only_two,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert two.returncode == 0, two.stderr[-8000:]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    if method == "curation_clap":
        assert (tmp_path / "one/ads.jsonl").read_bytes() == (
            tmp_path / "two/ads.jsonl"
        ).read_bytes()
        one, two = ([x for x in run if x["stage"] == "student"] for run in (one, two))
    losses = [[x["loss"] for x in run] for run in (one, two)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)  # later, Adam has amplified the rounding
    a, b = (
        torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("one", "two")
    )
    # Adam turns a gradient that is rounding noise (a bias of the keys, say) into a step of +-lr, so
    # single entries differ; test_gradients_of_two_processes_equal_one is the sharp test.
    apart = torch.cat(
        [(a[key] - b[key]).abs().flatten() for key in a if a[key].is_floating_point()]
    )
    assert (apart > 1e-5).float().mean() < 0.05 and apart.mean() < 1e-5
    skipped = (tmp_path / "two/skipped.txt").read_text().splitlines() if bad else []
    assert len(skipped) == bad


def test_gradients_of_two_processes_equal_one(tmp_path):
    """The sharp version: gather + DDP averaging give the joint batch's gradient within 1e-5."""
    script = tmp_path / "g.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist, common, mga_clap
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.tau = nn.Linear(5, 4), nn.Linear(5, 4), nn.Parameter(torch.tensor(0.1))
    def forward(self, x, y):
        return F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1), self.tau
torch.manual_seed(0)
m = M()
x, y, ids = torch.randn(7, 5), torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 4, 5, 6])
def grads(model, rows):
    a, t, tau = model(x[rows], y[rows])
    a, t, i = (common.gather_with_grad(v) for v in (a, t, ids[rows]))
    loss = mga_clap.hard_negative_loss(a @ t.T, tau, 0.15, i[:, None] == i[None]); loss.backward()
    return [p.grad.clone() for p in m.parameters()]
one = grads(m, slice(None)); m.zero_grad()
common.start_device("cpu"); rank = dist.get_rank()
two = grads(nn.parallel.DistributedDataParallel(m), slice(0, 4) if rank == 0 else slice(4, 7))
worst = max((a - b).abs().max().item() for a, b in zip(one, two))
assert worst < 1e-5, worst
print("EQUAL", worst)
""")
    out = subprocess.run(
        [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.stdout.count("EQUAL") == 2, out.stderr[-2000:]


def test_no_process_goes_on_before_the_run_s_folder_is_there(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import time; from pathlib import Path; import common
common.start_device("cpu")
mkdir = Path.mkdir
Path.mkdir = lambda *args, **flags: (time.sleep(2), mkdir(*args, **flags))
run = common.Run(common.RunConfig(runs={str(tmp_path / "runs")!r}), "late")
run.open_folder(1, False)
print("FOUND" if run.path.is_dir() else "MISSING")
""")
    out = subprocess.run(
        [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.stdout.count("FOUND") == 2, out.stdout + out.stderr[-2000:]


# Embeddings
def test_embeddings_repeat_bit_for_bit_and_ignore_padding_and_neighbours(mga_run):
    model = mga_clap.Model.from_checkpoint(mga_run[0] / "best.pt")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 400000, generator=g) * 0.1
    n = torch.tensor([400000, 90000, 1])
    alone = [model.embed_audio(x[i : i + 1, : n[i]], n[i : i + 1]) for i in range(3)]
    together = model.embed_audio(x, n)
    assert torch.equal(together, model.embed_audio(x, n))
    assert (torch.cat(alone) - together).abs().max() < 1e-5
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    model.train()  # a user who forgets eval() gets the same, and stays in training mode
    assert torch.equal(together, model.embed_audio(x, n)) and model.training
    model.eval()
    texts = ["a bell", "a low hum followed by rapid beeps, then a loud hiss", "clicking"]
    together = model.embed_text(texts)
    assert torch.equal(together, model.embed_text(texts))
    assert (torch.cat([model.embed_text([t]) for t in texts]) - together).abs().max() < 1e-5
    frames = model.embed_frames(x, n)
    assert frames.shape[:2] == (3, 64) and (frames[1, 32:] == 0).all()
    assert (model.embed_frames(x[1:2, :90000], n[1:2])[0] - frames[1, :32]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="'' has no token to embed"):
        model.embed_text(["a dog", ""])


@pytest.mark.parametrize("method", ["mga_clap", "t_clap"])
def test_longer_audio_is_the_weighted_mean_of_its_windows(runs_of, method):
    model = SCRIPTS[method].Model.from_checkpoint(runs_of(method)[0] / "best.pt")
    rate, generator = model.sample_rate, torch.Generator().manual_seed(1)
    x = torch.randn(1, 15 * rate, generator=generator) * 0.1
    first, second = model.embed_audio(x[:, : 10 * rate]), model.embed_audio(x[:, 10 * rate :])
    expected = torch.nn.functional.normalize(2 * first + second, dim=-1)
    assert (model.embed_audio(x) - expected).abs().max() < 1e-5


def test_clean_caption_by_hand():
    assert mga_clap.clean_caption("A Dog barks , loudly (twice); then: silence!") == (
        "a dog barks loudly twice  then silence"
    )  # the source collapses double spaces in one pass


def test_an_official_batch_left_with_one_pair_has_finite_gradients():
    sim = torch.ones(1, 1, requires_grad=True)
    mga_clap.official_loss(sim, 0.07, 0.15, torch.ones(1, 1, dtype=torch.bool)).backward()
    assert torch.isfinite(sim.grad).all()


def test_official_variant_pads_to_the_batch_and_paper_to_ten_seconds(corpus):
    items = [(np.zeros(n, np.float32) + 0.1, "a dog", 0, "x.wav") for n in (32000, 64000)]
    rows = [{"audio": "x.wav", "captions": ["a dog"], "where": "x"}]

    def tokenize(texts):
        return {"input_ids": torch.zeros(len(texts), 2)}

    for variant, samples in (("paper", 320000), ("official", 64000)):
        cfg = mga_clap.Config(data=[], variant=variant)
        batch = mga_clap.Pairs(rows, cfg, tokenize).collate(items)
        assert batch["waveform"].shape == (2, samples)


def test_parts_of_an_official_batch_are_as_long_as_its_longest_clip():
    parts = [torch.ones(2, 3), torch.ones(1, 5)]
    padded = mga_clap.same_length(parts)
    assert [x.tolist() for x in padded] == [[[1, 1, 1, 0, 0]] * 2, [[1, 1, 1, 1, 1]]]


def test_crops_of_long_files_move_with_the_epoch(tmp_path):
    sf.write(tmp_path / "long.wav", np.random.default_rng(0).normal(size=32000 * 12) * 0.1, 32000)
    rows = [
        {"audio": str(tmp_path / "long.wav"), "captions": ["x"], "where": "x", "duration": 12.0}
    ]
    pairs = mga_clap.Pairs(rows, mga_clap.Config(data=[]), None)
    assert len(pairs[0, 0][0]) == 320000
    assert np.array_equal(pairs[0, 0][0], pairs[0, 0][0]) and not np.array_equal(
        pairs[0, 0][0], pairs[1, 0][0]
    )


# Published weights
def official_names(model: mga_clap.Model) -> dict:
    """Our state dict under the names of the released model.pt, with the leftovers it carries."""
    theirs = {}
    for key, value in model.state_dict().items():
        key = key.replace("audio_encoder.", "audio_encoder.audio_enc.").replace(
            "text_encoder.model.", "text_encoder.text_encoder."
        )
        if ".bias_tables." in key:
            layer, _, block = key.rpartition(".bias_tables.")
            key = f"{layer}.blocks.{block}.attn.relative_position_bias_table"
            theirs[key.replace("_bias_table", "_index")] = torch.zeros(64, 64, dtype=torch.long)
        theirs["temp" if key == "temperature" else key] = value
    enc = "audio_encoder.audio_enc."
    theirs[enc + "layers.0.blocks.1.attn_mask"] = torch.zeros(64, 64, 64)
    theirs[enc + "audio_feats_extractor.mel_trans.stft.conv_real.weight"] = torch.zeros(
        513, 1, 1024
    )
    theirs[enc + "audio_feats_extractor.mel_trans.log_trans.melW"] = torch.zeros(513, 64)
    theirs[enc + "tscam_conv.weight"], theirs[enc + "tscam_conv.bias"] = (
        torch.zeros(527, 768, 2, 3),
        torch.zeros(527),
    )
    theirs[enc + "head.weight"], theirs[enc + "head.bias"] = torch.zeros(527, 527), torch.zeros(527)
    theirs["text_encoder.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return theirs


def test_released_model_file_loads_by_its_names_and_shapes(tmp_path):
    """Paper size: names and shapes as the fact sheet lists them."""
    import transformers

    tokenizer = common.text_encoder_from_scratch(["a dog barks"], 64, 1, 1, 30).tokenizer
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=30522), add_pooling_layer=False
    )
    bert.save_pretrained(tmp_path / "bert"), tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    model = mga_clap.Model(
        mga_clap.Config(data=[], variant="official"),
        common.text_encoder_from_pretrained(tmp_path / "bert", 30),
    )
    theirs = official_names(model)
    shapes = {k: tuple(v.shape) for k, v in theirs.items()}
    expected = {
        "codebook": (4096, 1024),
        "temp": (),
        "frame_proj.0.weight": (768,),
        "frame_proj.1.weight": (1024, 768),
        "frame_proj.3.weight": (1024,),
        "word_proj.4.weight": (1024, 1024),
        "audio_encoder.audio_enc.bn0.running_var": (64,),
        "audio_encoder.audio_enc.patch_embed.proj.weight": (96, 1, 4, 4),
        "audio_encoder.audio_enc.layers.2.blocks.5.attn.relative_position_bias_table": (225, 16),
        "audio_encoder.audio_enc.layers.3.blocks.1.attn.qkv.weight": (2304, 768),
        "audio_encoder.audio_enc.layers.0.downsample.reduction.weight": (192, 384),
        "audio_encoder.audio_enc.layers.1.blocks.0.mlp.fc1.weight": (768, 192),
        "audio_encoder.audio_enc.norm.weight": (768,),
        "text_encoder.text_encoder.encoder.layer.11.output.dense.weight": (768, 3072),
    }
    assert {k: shapes[k] for k in expected} == expected
    torch.save(
        {"model": theirs, "epoch": 9, "config": {"lr": 5e-5}, "optimizer": {}},
        tmp_path / "model.pt",
    )
    loaded = mga_clap.Model.from_checkpoint(
        tmp_path / "model.pt", text_model=str(tmp_path / "bert")
    )
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert (
        loaded.cfg.variant == "official"
        and loaded.audio_encoder.layers[-1].blocks[-1].locality == "official"
    )
    (
        theirs.pop("codebook"),
        theirs.update({"codebook": torch.zeros(4096, 512), "extra": torch.zeros(1)}),
    )
    theirs.pop("frame_proj.1.bias")
    torch.save({"model": theirs}, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError,
        match=r"missing keys: 1 \(frame_proj.1.bias\); unexpected keys: 1 \(extra\); wrong shapes: "
        r"1 \(codebook",
    ):
        mga_clap.Model.from_checkpoint(tmp_path / "bad.pt", text_model=str(tmp_path / "bert"))


def small_encoder():
    torch.manual_seed(3)
    return common.HTSAT(16, (1, 2), (2, 4), 16)


def test_audio_start_from_the_audioset_file_and_from_a_transformers_folder(tmp_path, corpus):
    encoder = small_encoder()
    lightning = {"sed_model." + k: v for k, v in encoder.state_dict().items()}
    for key in [k for k in lightning if ".bias_tables." in k]:
        layer, _, block = key.rpartition(".bias_tables.")
        lightning[f"{layer}.blocks.{block}.attn.relative_position_bias_table"] = lightning.pop(key)
    lightning |= {
        "sed_model.tscam_conv.weight": torch.zeros(527, 32, 2, 3),
        "sed_model.head.weight": torch.zeros(527, 527),
        "sed_model.spectrogram_extractor.stft.conv_real.weight": torch.zeros(513, 1, 1024),
        "sed_model.logmel_extractor.melW": torch.zeros(513, 64),
        "other.weight": torch.zeros(1),
    }
    torch.save({"state_dict": lightning, "epoch": 1}, tmp_path / "HTSAT.ckpt")
    torch.save(encoder.state_dict(), tmp_path / "ours.pt")
    from transformers import ClapConfig, ClapModel

    audio = dict(
        patch_embeds_hidden_size=16,
        depths=[1, 2],
        num_attention_heads=[2, 4],
        patch_size=16,
        patch_stride=[16, 16],
        hidden_size=32,
    )
    text = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    clap = ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=16))
    clap.save_pretrained(tmp_path / "clap")
    expected = {
        "HTSAT.ckpt": encoder.state_dict(),
        "ours.pt": encoder.state_dict(),
        "clap": common.htsat_state(
            {k: v for k, v in clap.state_dict().items() if k.startswith("audio_model.")}
        ),
    }
    for name, state in expected.items():
        fresh = common.HTSAT(16, (1, 2), (2, 4), 16)
        common.load_htsat(fresh, str(tmp_path / name))
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    result = mga_clap.main(
        config(
            corpus,
            tmp_path / "runs",
            audio_weights=str(tmp_path / "HTSAT.ckpt"),
            epochs=1,
            name="w",
        )
    )
    assert np.isfinite(result["scores"]["tagging_mAP"])
    lightning.pop("sed_model.norm.weight")
    torch.save({"state_dict": lightning}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt: .*missing keys: 1 \(norm.weight\)"):
        common.load_htsat(common.HTSAT(16, (1, 2), (2, 4), 16), str(tmp_path / "bad.ckpt"))


# Bad input
@every_script
def test_unreadable_files_are_skipped_counted_and_past_the_limit_stop_the_run(
    corpus, tmp_path, method
):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    (data / "audio/train0.wav").write_text("not sound")
    (data / "audio/train1.wav").unlink()
    sf.write(data / "audio/val0.wav", np.zeros(16000), 16000)
    result = SCRIPTS[method].main(config_of(method, data, tmp_path / "runs", name="s", max_bad=0.4))
    skipped = sorted((tmp_path / "runs/s/skipped.txt").read_text().splitlines())
    assert (
        len(skipped) == 2
        and "train0.wav: cannot be read as audio" in skipped[0]
        and "train1.wav: file not found" in skipped[1]
    )
    assert np.isfinite(result["scores"]["t2a_R@1"])
    with pytest.raises(
        # curation-CLAP's teacher reads the half that is not the pool
        ValueError,
        match=r"of (12|6) clips could not be used, more than --max-bad 5%; first: .*train",
    ):
        SCRIPTS[method].main(config_of(method, data, tmp_path / "runs", name="t"))


def test_a_run_whose_files_are_back_goes_on(tmp_path):
    def folder(resume):
        run = common.Run(common.RunConfig(runs=str(tmp_path), name="a", max_bad=0.15), "x")
        run.open_folder(10, resume)
        return run

    run = folder(False)
    run.settle_skipped(["a.wav: file not found"])
    with pytest.raises(ValueError, match="2 of 10 clips could not be used"):
        run.settle_skipped(["b.wav: file not found"])
    again = folder(True)
    again.settle_skipped([])  # both are back
    again.settle_skipped(["b.wav: file not found"])  # but this one
    assert again.skipped == {"b.wav: file not found"}
    listed = (tmp_path / "a/skipped.txt").read_text().splitlines()
    assert listed == ["a.wav: file not found", "b.wav: file not found"]  # each once


@pytest.mark.parametrize(
    "method, name",
    [
        ("mga_clap", "hard_negative_loss"),
        ("t_clap", "contrastive_loss"),
        ("cacophony", "contrastive_loss"),
        ("collat", "cross_global_loss"),
        ("curation_clap", "contrastive_loss"),
    ],
)
def test_a_non_finite_loss_stops_the_run_and_names_the_clips(
    corpus, tmp_path, monkeypatch, method, name
):
    script, flags = (
        SCRIPTS[method],
        dict(stage="contrastive", audio_weights="none", rho=0.0) if method == "cacophony" else {},
    )
    loss = getattr(script, name)
    calls = []

    def poisoned(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(script, name, poisoned)
    with pytest.raises(
        FloatingPointError, match="the loss of step 1 is nan; the batch's files are listed in"
    ):
        script.main(config_of(method, corpus, tmp_path, name="n", **flags))
    assert len((tmp_path / "n/nonfinite_batch.txt").read_text().splitlines()) == 6
    last = tmp_path / "n/last.pt"  # broken weights are never saved; stage 2 starts with one
    assert common.read_checkpoint(last)["step"] == 0 if method == "cacophony" else not last.exists()
    monkeypatch.setattr(script, name, loss)
    step = torch.optim.Adam.step

    def breaks(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][1].data.fill_(float("inf"))  # the first, a scale, is clamped

    for optimiser in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimiser, "step", breaks)
    with pytest.raises((FloatingPointError), match="a weight became NaN|the loss of step"):
        script.main(
            config_of(method, corpus, tmp_path, name="m", log_steps=50, save_steps=1, **flags)
        )
    last = tmp_path / "m/last.pt"
    assert common.read_checkpoint(last)["step"] == 0 if method == "cacophony" else not last.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nowhere.jsonl"], "error: nowhere.jsonl: no such manifest"),
        (["--data", "demo", "--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--epochs", "1"], "--data is missing"),
        (["--resume", "--data", "demo"], "--resume needs --name"),
        (
            ["--data", "CORPUS", "--size", "tiny", "--batch-size", "1"],
            "at least 2 pairs are needed in each",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--runs", "/proc/nothing"],
            "cannot write to /proc/nothing",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--text-model", "no/model"],
            "--text-model no/model: not a model folder",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--audio-weights", "none.ckpt"],
            "none.ckpt: no such weight file",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--locality-blocks", "6"],
            "--locality-blocks 6: the encoder has 5 blocks",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--log-steps", "0"],
            "--log-steps 0: expected a number in [1, 1e9]",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--max-tokens", "2"],
            "--max-tokens 2: expected a number in [3, 512]",
        ),
        (
            ["--resume", "--name", "nothing"],
            "nothing/last.pt is not there; start without --resume",
        ),
        (
            ["--data", "CORPUS", "--size", "tiny", "--device", "cuda"],
            "--device cuda: torch sees no GPU",
        ),
    ],
)
def test_bad_flags_are_one_clear_sentence(corpus, tmp_path, capsys, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    words = [str(corpus) if f == "CORPUS" else f for f in flags]
    words += [] if "--runs" in flags or "--epochs" in flags else ["--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:  # as the script ends; any other error fails the test
        common.run_entry(
            mga_clap.main,
            lambda: common.cli(mga_clap.Config, mga_clap.__doc__, words),
        )
    printed = f"{capsys.readouterr().err}\n{stop.value}"
    sentence = next(line for line in reversed(printed.splitlines()) if "error: " in line)
    assert stop.value.code != 0 and message in sentence, printed


def test_help_needs_no_network_and_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        common.cli(mga_clap.Config, mga_clap.__doc__, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        stop.value.code == 0
        and "--no-hard-negatives" in text
        and "[5e-05]" in text
        and "(Sec. 4.1)" in text
    )


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("data", [["demo"], ["a b.jsonl", "c"]])
def test_flags_of_a_config_give_it_again(method, data):
    """Every field changed, one after the other, and all presets."""
    script = SCRIPTS[method]
    flags = {"data": data}
    assert common.flags_of(common.configure(script.Config, **flags)) == shlex.join(
        ["--data", *data]
    )
    for field in dataclasses.fields(script.Config):
        if field.name in ("data", "resume"):
            continue
        plain = getattr(common.configure(script.Config, **flags), field.name)
        choices = typing.get_args(typing.get_type_hints(script.Config)[field.name])
        if isinstance(plain, bool):
            others = [not plain]
        elif isinstance(plain, str):
            others = choices or ["a b"]
        elif isinstance(plain, list):
            others = [[3] * len(plain), [2] * len(plain), [1] * len(plain), ["c d", "e"]]
        else:
            others = [plain + 1, plain * 2, plain / 2, 0.5]
        made, stage = [], {}
        if method == "cacophony" and field.name in ("audio_weights", "weights"):
            stage = {"stage": "contrastive"}
        for value in others:
            with contextlib.suppress(ValueError):  # not every one is in the field's range
                made.append(script.Config(**flags, **stage, **{field.name: value}))
        assert made and any(getattr(cfg, field.name) != plain for cfg in made), field.name
        for cfg in made:
            words = shlex.split(common.flags_of(cfg))
            assert common.cli(script.Config, script.__doc__, words) == cfg


def test_one_pair_is_an_error(corpus, tmp_path):
    row = json.loads((corpus / "manifest.jsonl").read_text().splitlines()[0])
    row.update(captions=["one"], negatives=[None], audio=str(corpus / row["audio"]))
    common.write_lines(tmp_path / "one.jsonl", [json.dumps(row)])
    with pytest.raises(ValueError, match=r"with 1 training pair\(s\) on 1 process"):
        mga_clap.main(config(tmp_path / "one.jsonl", tmp_path, name="one"))
    with pytest.raises(
        ValueError, match=r"--mae-batch-size 6 with 1 training clip\(s\) on 1 process"
    ):
        cacophony.main(config_of("cacophony", tmp_path / "one.jsonl", tmp_path, name="one"))
    with pytest.raises(ValueError, match=r"--batch-size 6 with 1 training pair\(s\) on 1 process"):
        curation_clap.main(
            config_of(
                "curation_clap",
                tmp_path / "one.jsonl",
                tmp_path,
                name="one",
                pool_share=0.0,
                curation="none",
            )
        )


def test_a_run_of_another_method_cannot_be_resumed_here(tmp_path):
    (tmp_path / "x").mkdir()
    torch.save({"method": "other", "config": {"data": []}, "model": {}}, tmp_path / "x/last.pt")
    with pytest.raises(ValueError, match="holds a run of other; continue it with other.py"):
        common.configure(mga_clap.Config, resume=True, name="x", runs=str(tmp_path))


def test_a_run_of_another_version_names_the_settings_that_differ(tmp_path, mga_run):
    stored = common.read_checkpoint(mga_run[0] / "last.pt")
    stored["config"]["momentum"] = stored["config"].pop("gamma")
    (tmp_path / "x").mkdir()
    torch.save(stored, tmp_path / "x/last.pt")
    with pytest.raises(
        ValueError,
        match=r"another version of mga_clap.py, with other settings \(gamma, momentum\); continue "
        r"it with that version",
    ):
        common.configure(mga_clap.Config, resume=True, name="x", runs=str(tmp_path))
    done = run_cli(
        "--resume", "--name", "x", "--runs", tmp_path
    )  # as a script its module has another name
    assert "another version of mga_clap.py, with other settings (gamma, momentum)" in done.stderr
