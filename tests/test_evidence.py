"""The evidence scripts and the README's first command, in miniature."""
import json
import shutil
import subprocess
import sys

import pytest

import bench
import claims
import mga_clap
from conftest import ROOT, SMALL

RESULTS = ROOT / "results"


def test_bench_prints_and_writes_what_other_tools_read(tmp_path):
    out = bench.main(["all", "--tiny", "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text()) == out
    for r in out:
        assert set(r) == {"name", "ours", "peer", "peer_name", "unit", "ratio", "machine", "settings"}
        assert r["ratio"] == pytest.approx(r["peer"] / r["ours"])


@pytest.mark.parametrize("start", ["random", "tagging"])
def test_claims_run_store_and_continue(corpus, tmp_path, monkeypatch, start):
    monkeypatch.setattr(claims.tagging_start, "__defaults__", (3,))  # steps
    budget = {k: v for k, v in SMALL.items() if k != "size"} | {"epochs": 1}
    flags = ["mga_clap", "--data", str(corpus), "--seeds", "2", "--budget", json.dumps(budget), "--start", start, "--results", str(tmp_path),
             "--json", str(tmp_path / "c.json")]
    out = claims.main(flags)
    assert len(list(tmp_path.glob("run_*.json"))) == 4
    keys = {"claim", "method", "baseline", "metric", "method_mean", "method_std", "baseline_mean", "baseline_std", "seeds", "holds",
            "seconds"}
    assert len(list(tmp_path.glob("tagging_start_*.pt"))) == (start == "tagging")
    for c in out:
        assert keys <= set(c) and c["seeds"] == 2
        runs = [json.loads(p.read_text()) for p in tmp_path.glob("run_mga_clap_*.json")]
        assert c["method_mean"] == pytest.approx(sum(r["scores"][c["metric"]] for r in runs) / 2)
    monkeypatch.setattr(mga_clap, "main", None)  # a second call trains nothing
    assert claims.main(flags) == out


@pytest.mark.parametrize("name", ["claims_mga_clap", "claims_mga_clap_random_start"])
def test_stored_claims_follow_from_the_stored_runs(name):
    for c in json.loads((RESULTS / f"{name}.json").read_text()):
        for role in ("method", "baseline"):
            runs = [json.loads(p.read_text()) for p in RESULTS.glob(f"run_{c[role]}_*.json")]
            runs = [r for r in runs if r["settings"]["start"] == c["start"]]
            assert len(runs) == c["seeds"]
            assert c[f"{role}_mean"] == pytest.approx(sum(r["scores"][c["metric"]] for r in runs) / len(runs))


def test_the_method_copied_out_trains_on_the_demo_in_an_empty_folder(tmp_path):
    for name in ("mga_clap.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "mga_clap.py", "--data", "demo", "--epochs", "1"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chance" in done.stdout and "Next:" in done.stdout and (tmp_path / "runs/mga_clap-1/best.pt").exists()
    assert "ln B 3.87" in done.stderr and "active" in done.stderr and "building the demo corpus" in done.stderr
