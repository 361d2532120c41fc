"""Writes the tables of results/README.md from the files they name.

  python tests/readme.py

A table stands below a comment `<!-- results/FILE.json -->` or `<!-- results/FILE.json TABLE -->`;
its two header lines are kept (in bench.json's written, too), and name the metrics where there are
many. Below `<!-- outcomes -->` stand all claims, first those that do not hold.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402


def body(name: str, table: str, header: str) -> list[str]:
    """Lines of the table below its two header lines."""
    stored = json.loads((ROOT / f"results/{name}.json").read_text())
    if name.startswith("claims"):
        return [
            f"| {c['metric']} | {c['baseline_mean']:.3f} ± {c['baseline_std']:.3f} | "
            f"{c['method_mean']:.3f} ± {c['method_std']:.3f} | {c['chance']:.3f} "
            f"| {c['claim']}: {'holds' if c['holds'] else 'does not hold'} |"
            for c in stored
        ]
    if name.startswith("run_"):
        return [f"| {c['truth']} | {c['said']} |" for c in stored["captions"]]
    metrics = [cell.strip() for cell in header.strip("|").split("|")][2:]
    return [
        f"| {r['row']} | {r['seeds']} | "
        + " | ".join(f"{r['scores'][m]['mean']:.3f}" if m in r["scores"] else "-" for m in metrics)
        + " |"
        for r in stored
        if r["table"] == (table or "compare")
    ]


def outcomes() -> list[str]:
    """A line for each claim of results/claims_*.json, those that do not hold first."""
    lines = []
    for path in sorted((ROOT / "results").glob("claims_*.json")):
        for c in json.loads(path.read_text()):
            said = "holds" if c["holds"] else "does not hold"
            means = f"{c['baseline_mean']:.3f} -> {c['method_mean']:.3f}"
            table = path.stem.removeprefix("claims_")
            line = f"| {said} | {table} | {c['claim']} | {means} | {c['seeds']} |"
            lines.append((c["holds"], line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def written(text: str) -> str:
    """The text with every table of results as its file says."""

    def block(found):
        name, table, (header, line, *_) = found[1], found[2], found[3].splitlines()
        lines = (
            bench.table(json.loads((ROOT / "results/bench.json").read_text()))
            if name == "bench"
            else [header, line, *body(name, table, header)]
        )
        return (
            f"<!-- results/{name}.json{' ' + table if table else ''} -->\n"
            + "\n".join(lines)
            + "\n\n"
        )

    head = [
        "<!-- outcomes -->",
        "| outcome | runs | claim | means | seeds |",
        "|---|---|---|---|---|",
    ]
    opening = "\n".join([*head, *outcomes()]) + "\n\n"
    text = re.sub(r"<!-- outcomes -->\n.*?\n\n", lambda _: opening, text, flags=re.S)
    return re.sub(r"<!-- results/(\w+)\.json(?: (\w+))? -->\n(.*?)\n\n", block, text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "results/README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
