"""Writes the tables of results/README.md from results/runs.jsonl and results/bench.json.

  python tests/readme.py

A table stands below a comment: `<!-- outcomes -->` (all claims of tests/claims.py, those that do
not hold first), `<!-- study NAME -->` (scores of its rows), `<!-- said NAME -->` (captions that
the first row of a study wrote, seed 0) or `<!-- bench -->`.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402
import claims  # noqa: E402


def said(name: str) -> list[str]:
    study = claims.STUDIES[name]
    run = claims.find(claims.read_runs(), claims.identity(study, next(iter(study.rows)), 0))
    return [
        "| truth | said |",
        "|---|---|",
        *[f"| {c['truth']} | {c['said']} |" for c in run["said"]],
    ]


def written(text: str) -> str:
    """The text with every table as the stored runs make it."""

    def block(found):
        kind, _, name = found[1].partition(" ")
        if kind == "outcomes":
            lines = claims.outcome_table()
        elif kind == "study":
            lines = claims.score_table(name)
        elif kind == "said":
            lines = said(name)
        else:
            lines = bench.table(json.loads((ROOT / "results/bench.json").read_text()))
        return "\n".join([f"<!-- {found[1]} -->", *lines]) + "\n\n"

    pattern = r"<!-- (outcomes|study \w+|said \w+|bench) -->\n.*?\n\n"
    return re.sub(pattern, block, text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "results/README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
