"""The evidence scripts and the README's commands, in miniature."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import soundfile as sf
import torch

import bench
import claims
import common
import mga_clap
from conftest import ROOT, SMALL_OF
from test_repo import parsed, readme_commands

RESULTS = ROOT / "results"


def test_bench_prints_and_writes_what_other_tools_read(tmp_path):
    out = bench.main(["all", "--tiny", "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text()) == out
    for r in out:
        assert set(r) == {
            "name",
            "ours",
            "peer",
            "peer_name",
            "unit",
            "ratio",
            "machine",
            "settings",
        }
        more_is_better = "per second" in r["unit"]
        assert r["ratio"] == (
            pytest.approx(r["ours"] / r["peer"] if more_is_better else r["peer"] / r["ours"])
            if r["peer"]
            else None
        )
    loops = [r for r in out if r["name"].startswith("loop_")]
    assert len(loops) == 5 and all(r["settings"]["curve"][0][0] == 1 for r in loops)
    if not torch.cuda.is_available():
        assert bench.loops(tiny=False) == []
    merged = bench.main(["htsat", "--tiny", "--json", str(tmp_path / "b.json")])
    assert {r["name"] for r in json.loads((tmp_path / "b.json").read_text())} == {
        r["name"] for r in out
    } and len(merged) == 1


@pytest.fixture
def evidence(corpus, tmp_path, monkeypatch):
    """Runs a study of claims.py in miniature -> the lines of its runs.jsonl; `rows` names some of
    its rows, other keywords change the study.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus").symlink_to(corpus)
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(claims, "TAGGING_STEPS", 2)
    monkeypatch.setitem(claims.STARTS["captioning"][2], "steps", 2)
    given = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]

    def run(name, *flags, rows=None, settings=None, **changes):
        study = claims.STUDIES[name]
        rows = rows or list(study.rows)
        changes = {
            "data": ("corpus",),
            "claims": tuple(c for c in study.claims if {c.row, c.baseline} <= {*rows, "chance"}),
            "pool": ("corpus",) if study.pool else (),
            "settings": {**SMALL_OF[study.method], **(settings or {})},
            "rows": {row: study.rows[row] for row in rows},
            **changes,
        }
        monkeypatch.setitem(claims.STUDIES, name, dataclasses.replace(study, **changes))
        claims.main(claims.parse([name, *given, *flags]))
        return claims.read_runs()

    return run


def test_a_study_runs_stores_and_continues(evidence, tmp_path, monkeypatch, capsys):
    runs = evidence("mga_clap", settings=dict(epochs=1), seeds=2)
    assert [(r["seed"], r["changed"].get("aggregator")) for r in runs] == [
        (0, "mean"),
        (0, None),
        (1, "mean"),
        (1, None),
    ]  # a seed's start is followed by all that use it
    starts = [r["start_hash"] for r in runs]
    assert starts[0] == starts[1] != starts[2] == starts[3] and None not in starts
    assert len({json.dumps(r["scores"]) for r in runs}) == 4
    assert all(set(claims.MGA_METRICS) <= set(r["scores"]) and r["seconds"] > 0 for r in runs)
    text = capsys.readouterr().out
    differences = [runs[i + 1]["scores"]["t2a_R@5"] - runs[i]["scores"]["t2a_R@5"] for i in (0, 2)]
    assert f"than 0.02 | {np.mean(differences):+.3f} [" in text
    mean = np.mean([r["scores"]["t2a_R@1"] for r in runs[1::2]])
    assert f"| MGA-CLAP | 2 | {mean:.3f} ±" in text
    monkeypatch.setattr(mga_clap, "main", None)  # a second call trains nothing,
    assert evidence("mga_clap", settings=dict(epochs=1), seeds=2) == runs
    claims.RUNS.unlink()  # nor does scoring again
    again = evidence("mga_clap", "--seeds", "1", settings=dict(epochs=1), seeds=2)
    assert [r["scores"] for r in again] == [r["scores"] for r in runs[2:]]
    assert all(r["seconds"] is None for r in again) and "| open | mga_clap |" in "\n".join(
        claims.outcome_table(["mga_clap"])
    )
    # a run from another start is no pair of the stored one
    common.write_lines(claims.RUNS, [json.dumps({**again[0], "start_hash": "other"})])
    with pytest.raises(ValueError, match="start_hash of mga_clap, seed 1, .* delete this seed's"):
        evidence("mga_clap", "--seeds", "1", settings=dict(epochs=1), seeds=2)


def test_every_kind_of_start_in_miniature(evidence, tmp_path):
    runs = evidence("cacophony", settings=dict(stage="contrastive", steps=2), seeds=1)
    assert len(runs[0]["said"]) == 6 and {"said", "truth"} == set(runs[0]["said"][0])
    assert {"val_loss_con", "CIDEr-D", "gap"} <= set(runs[0]["scores"])
    assert runs[0]["scores"] != runs[1]["scores"]
    missing = {"CIDEr-D", "val_loss_con", "val_loss_cap"} - set(runs[2]["scores"])
    assert missing == {"CIDEr-D", "val_loss_cap"}  # without a captioner
    (line,) = [x for x in claims.outcome_table(["cacophony"]) if "above chance" in x]
    assert line.startswith("| open")  # one seed has no interval

    # a start trained on other data, from which the loss of the validation clips is followed
    settings = dict(stage="contrastive", steps=4, eval_steps=2)
    data = dict(seeds=1, start_data=("corpus",), split="test")
    runs = evidence("cacophony_sam_search", settings=settings, **data)[3:]
    assert runs[0]["start_hash"] == runs[1]["start_hash"] and runs[0]["scores"] != runs[1]["scores"]
    for r in runs:
        losses = [loss for _, _, loss in r["curve"]]
        assert [(step, train is None) for step, train, _ in r["curve"]] == [
            (0, True),
            (2, False),
            (4, False),
        ]
        assert r["scores"]["val_loss_lowest"] == min(losses)
        assert r["scores"]["val_loss_last"] == losses[-1]
    assert runs[0]["curve"][0] == runs[1]["curve"][0]  # the same start

    small = dict(teacher_epochs=1, student_epochs=1, text_model="none")
    runs = evidence("curation_clap", settings=small, rows=["teacher", "ADS + SL"], seeds=1)[5:]
    assert [r["trained"] for r in runs] == [False, True] and runs[0]["seconds"] is None
    assert runs[0]["start_hash"] == runs[1]["start_hash"]
    assert len(list((tmp_path / "runs").glob("start_*/teacher.pt"))) == 1

    settings = dict(steps=2, eval_steps=2, text_model=claims.MINILM)
    runs = evidence("collat", settings=settings, rows=["CoLLAT", "no uni-token loss"], seeds=1)[7:]
    assert len({json.dumps(r["scores"]) for r in runs}) == 2
    assert all(r["changed"]["text_model"] == claims.MINILM for r in runs)
    assert all(0 < r["scores"]["mAP_snr20"] <= 1 for r in runs)


def test_claims_are_decided_by_the_t_interval_of_paired_differences(monkeypatch):
    rng = np.random.default_rng(0)
    ours, base = rng.normal(0.4, 0.1, 5), rng.normal(0.3, 0.1, 5)
    oracle = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
    mean, low, high = claims.interval(list(ours - base))
    assert (low, high) == pytest.approx((oracle.low, oracle.high))
    # by hand: differences 1, 2, 3: mean 2, deviation 1, t(2) = 4.303
    assert claims.interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)

    study = claims.Study("mga_clap", ("x",), {}, {"A": {}, "B": dict(epochs=2)}, ("m",), seeds=3)

    def decided(differences, **claim):
        runs = []
        for seed, difference in enumerate(differences):
            for row, score in (("A", 0.5 + difference), ("B", 0.5)):
                told = claims.identity(study, row, seed)
                runs.append({**told, "scores": {"m": score}, "chance": {"m": 0.4}})
        return claims.outcome(study, claims.Claim("m", "A", "B", **claim), runs)["outcome"]

    assert decided([0.10, 0.11, 0.12]) == "holds"
    assert decided([0.10, 0.11, 0.12], lower=True) == "contradicted"
    assert decided([-0.10, -0.11, -0.12], lower=True) == "holds"
    assert decided([0.00, 0.11, 0.22]) == "not shown"  # the interval crosses 0
    assert decided([-0.22, -0.11, -0.00], lower=True) == "not shown"
    assert decided([-0.10, -0.11, -0.12]) == "contradicted"
    assert decided([-0.010, -0.011, -0.012], margin=-0.02) == "holds"
    assert decided([-0.019, -0.020, -0.021], margin=-0.02) == "not shown"
    assert decided([0.10, 0.11]) == "open"


def test_stored_runs_are_those_of_the_studies():
    runs = claims.read_runs()
    told = [claims.identity(s, row, 0) for s in claims.STUDIES.values() for row in s.rows]
    for r in runs:
        assert any(all(r[k] == v for k, v in i.items() if k != "seed") for i in told), (
            "a run of no study"
        )
    keys = [json.dumps([r[k] for k in told[0]], sort_keys=True) for r in runs]
    assert len(set(keys)) == len(keys) > 30
    for study in claims.STUDIES.values():
        assert set(study.data) | set(study.pool) <= set(claims.SCENES)
        names = {*study.rows, "chance"}
        assert all({c.row, c.baseline} <= names for c in study.claims)
        for row in study.rows.values():  # every row names settings that exist
            settings = {**study.settings, **(row or {})}
            common.configure(claims.SCRIPTS[study.method].Config, data=["x"], **settings)


def test_missing_scenes_are_made_from_the_sounds(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for label in ("dog", "rain", "bell"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for i in range(6):
            sf.write(tmp_path / f"sounds/{label}/{i}.wav", rng.normal(0, 0.1, 16000), 16000)
    told = "--train 12 --val 3 --test 6 --rate 16000 --val-fraction 0.3 --workers 1"
    monkeypatch.setattr(claims, "SCENES", {"few": told, "pool": "--train 4"})
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(claims, "run", lambda study, row, seed, args: {"row": row})
    study = claims.Study("mga_clap", ("few",), {}, {"A": {}}, (), seeds=1)
    monkeypatch.setattr(claims, "STUDIES", {"one": study})
    flags = ["all", "--data", str(tmp_path / "data")]
    with pytest.raises(ValueError, match="data/few is not there; --sounds ESC-50-master makes it"):
        claims.main(claims.parse(flags))
    monkeypatch.setattr(claims, "score_table", lambda name: [])
    claims.run_study("one", claims.parse([*flags, "--sounds", str(tmp_path / "sounds")]))
    assert (tmp_path / "data/few/manifest.jsonl").exists()
    assert not (tmp_path / "data/pool").exists()  # no study asks for it
    assert claims.read_runs() == [{"row": "A"}]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder that holds data/demo, with a part of the demo's scenes."""
    whole = common.build_demo(tmp_path_factory.mktemp("whole") / "demo")
    folder, rows = tmp_path_factory.mktemp("demo"), common.read_manifest([str(whole)])
    (folder / "data/demo").mkdir(parents=True)
    few = []
    for split, most in (("train", 96), ("val", 12), ("test", 12)):
        few += [row for row in rows if row["split"] == split][:most]
    for row in few:
        del row["where"]
    common.write_lines(folder / "data/demo/manifest.jsonl", [json.dumps(row) for row in few])
    shutil.copy(whole / "classes.txt", folder / "data/demo")
    return folder / "data"


def test_readme_commands_that_need_no_outside_data_run(
    tmp_path, monkeypatch, demo, runs_of, capsys
):
    """Trainings with fewer steps (those of one method and the demo alone are run by the next test),
    everything else as printed.
    """
    short = {"mga_clap": ["--epochs", "1"], "collat": ["--steps", "3", "--eval-steps", "3"]}
    shutil.copytree(demo, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("mga_clap-1", "mga_clap-2"):
        shutil.copytree(runs_of("mga_clap")[0], tmp_path / "runs" / name)
    ran = []
    for command in readme_commands():
        name, words = parsed(command) or ("", [])
        if "demo" not in words or words == ["--data", "demo"]:
            continue
        module = importlib.import_module(name)
        if name in claims.SCRIPTS:
            module.main(common.cli(module.Config, module.__doc__, words + short[name]))
        else:
            module.main(module.parse(words))
        ran.append(name)
    assert sorted(ran) == ["collat", *["eval"] * 3, "mga_clap", *["tools.figures"] * 2]
    for made in (
        "embeds/audio.npy",
        "pictures/frames_best1.png",
        "runs/clap/best.pt",
        "runs/mga_clap-3/best.pt",
    ):
        assert (tmp_path / made).exists(), made
    assert "less runs/mga_clap-1/best.pt (paired over clips" in capsys.readouterr().out
    # and its lines of Python
    (tmp_path / "data/demo/audio").mkdir()
    for row in common.read_manifest(["demo"])[:8]:
        shutil.copy(row["audio"], tmp_path / "data/demo/audio")
    shutil.copy(row["audio"], tmp_path / "dog.wav")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for block in blocks:
        exec(block, {})
    found = capsys.readouterr().out.splitlines()[-5:]
    scores = [float(line.split()[0]) for line in found]
    assert len(blocks) == 2 and scores == sorted(scores, reverse=True)
    assert all(re.search(r"data/demo/audio/\w+\.wav at \d+\.\d s$", line) for line in found)


def test_pictures_of_the_results_in_miniature(evidence, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    from tools import figures

    monkeypatch.setattr(claims, "scores_of", lambda *_: {"scores": {}, "chance": {}})
    monkeypatch.setattr(claims, "outcome_table", lambda _: [])
    given = ["results", "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    flags = figures.parse([*given, "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="t_clap --seeds 0 makes it"):
        figures.main(flags)
    with pytest.raises(FileNotFoundError, match="data/scenes_12: no such manifest"):
        figures.main(figures.parse([*given, "reconstructions", "--out", str(tmp_path / "out")]))
    settings = dict(steps=2, eval_steps=2)
    evidence("t_clap", settings=settings, seeds=1)
    settings = dict(steps=2, stage="contrastive")
    evidence("cacophony", settings=settings, rows=["Cacophony"], seeds=1)
    sam = settings | dict(eval_steps=2)
    small = dict(teacher_epochs=1, text_model="none")
    evidence("curation_clap", settings=small, rows=["teacher"], seeds=1)
    settings = dict(steps=2, eval_steps=2, text_model=claims.MINILM)
    evidence("collat", settings=settings, rows=["CoLLAT"], seeds=0)
    with pytest.raises(FileNotFoundError, match="no run of cacophony_sam, rho 0;"):
        figures.main(figures.parse([*given, "sam", "--out", str(tmp_path / "out")]))
    evidence("cacophony_sam", settings=sam, seeds=1, start_data=("corpus",))
    with pytest.raises(FileNotFoundError, match="claims.py collat --seeds 0 makes it"):
        figures.main(flags)
    evidence("collat", settings=settings, rows=["CoLLAT"], seeds=1)
    paths = figures.main(flags)
    assert [path.stem for path in paths] == list(figures.OF_RESULTS)
    assert all(matplotlib.image.imread(path)[..., :3].std() > 0.05 for path in paths)


@pytest.mark.parametrize(
    "name, flags, shown",
    [
        ("collat", ["--steps", "5"], "ln B 2.77"),
        (
            "curation_clap",
            ["--teacher-epochs", "1", "--student-epochs", "1", "--epoch-steps", "4"],
            "ln B 3.47",
        ),
        ("cacophony", ["--mae-steps", "5", "--steps", "5"], "2 ln B = 6.93"),
        ("mga_clap", ["--epochs", "1"], "ln B 3.87"),
        ("t_clap", ["--steps", "10"], "ln B 2.77"),
    ],
)
def test_the_method_copied_out_trains_on_the_demo_in_an_empty_folder(
    tmp_path, name, flags, shown, request
):
    if name != "collat":  # one builds the corpus itself, the others find it there
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "data")
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    done = subprocess.run(
        [sys.executable, f"{name}.py", "--data", "demo", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "chance" in done.stdout
        and "Next:" in done.stdout
        and (tmp_path / f"runs/{name}-1/best.pt").exists()
    )
    assert shown in done.stdout + done.stderr and ("building the demo corpus" in done.stderr) == (
        name == "collat"
    )
