"""Draws the README's pictures from the runs of claims.py.

  python tests/figures.py --data data --runs runs/claims --out results/pictures

One a paper (order, reconstructions, attention, curation; MGA-CLAP's own is eval.py's --plot) and one of all
on the same ground. The runs are those of seed 0; one that is not there is named with the call that makes it.
"""

import argparse
import json
import shlex
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402

import cacophony  # noqa: E402
import claims  # noqa: E402
import collat  # noqa: E402
import common  # noqa: E402
import curation_clap  # noqa: E402
import eval as evaluator  # noqa: E402


def run_folder(table: str, args, **flags) -> tuple[Path, dict, types.SimpleNamespace]:
    """A run of one of claims.EVIDENCE's tables, seed 0 -> its folder, all its flags, what claims.py was told."""
    words = shlex.split(claims.EVIDENCE[table].replace("DIR", str(args.data)))
    told = types.SimpleNamespace(
        data=[w for w in words if w.startswith(str(args.data)) and w != f"{args.data}/pool"],
        pool=[f"{args.data}/pool"],
        start="random" if "random" in words else "tagging",
        runs=str(args.runs),
        budget=words[words.index("--budget") + 1] if "--budget" in words else "{}",
    )
    _, settings, flags, _ = claims.described(words[0], flags, 0, told)
    return present(Path(args.runs) / claims.key_of(settings), table), flags, told


def present(path: Path, table: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; python tests/claims.py {claims.EVIDENCE[table].replace('DIR', 'data')} makes it"
        )
    return path


def order(args) -> Path:
    """T-CLAP: how far the true order is preferred to the other, without and with the temporal loss."""
    results = {}
    for name, flags in (("CLAP", dict(lt_weight=0.0)), ("T-CLAP", {})):
        folder, _, told = run_folder("claims_t_clap", args, **flags)
        (results[name],) = evaluator.main(
            evaluator.parse(
                [
                    str(folder / "best.pt"),
                    "--data",
                    told.data[0],
                    "--protocol",
                    "t_classify",
                    "--bootstrap",
                    "0",
                ]
            )
        )
    return evaluator.plot_order(results, args.out)


def reconstructions(args) -> Path:
    """Cacophony's stage 1: test scenes that it never heard, painted from a fifth of their patches."""
    _, flags, told = run_folder("claims_cacophony", args)
    cfg = common.configure(
        cacophony.Config, cacophony.PRESETS, data=told.data, seed=0, **{**flags, "stage": "mae"}
    )
    folder = present(claims.mae_folder(cfg, told), "claims_cacophony")
    model = cacophony.MAE(
        cacophony.audio_shape(cfg),
        cfg.mae_layers,
        cfg.mask_ratio,
        cacophony.VARIANTS[cfg.variant]["eps"],
    ).eval()
    common.load_strict(
        model, common.read_checkpoint(folder / "last.pt", "cacophony")["model"], folder / "last.pt"
    )
    rows = [row for row in common.read_manifest(told.data) if row["split"] == "test"]
    rows = [
        row for row in rows if row["labels"] in (["rooster"], ["crying_baby"])
    ] or rows  # sounds with a pattern, rather than noises
    return cacophony.plot_reconstructions(
        model, cacophony.Clips(rows, cfg), args.out / "reconstructions.png", clips=2, dpi=55
    )


def attention(args) -> Path:
    """CoLLAT: where the tokens of a caption look."""
    folder, _, told = run_folder("claims_collat", args)
    rows = [
        row
        for row in common.read_manifest(told.data)
        if row["split"] == "test" and len(row["labels"]) > 1
    ]
    return evaluator.plot_attention(
        collat.Model.from_checkpoint(folder / "best.pt"), rows, args.out, n_tokens=3
    )


def curation(args) -> Path:
    """curation-CLAP: the pool's cosines to the annotated captions, and how right such pairs are (its labels are known to this picture only)."""
    _, flags, told = run_folder("claims_curation_clap", args)
    cfg = common.configure(
        curation_clap.Config,
        curation_clap.PRESETS,
        data=told.data,
        seed=0,
        **{**flags, "stage": "teacher"},
    )
    model = curation_clap.Model.from_checkpoint(
        present(claims.teacher_folder(cfg, told) / "teacher.pt", "claims_curation_clap")
    )
    sounds = {
        caption: set(row["labels"])
        for row in common.read_manifest(told.data)
        if row["split"] == "train"
        for caption in row["captions"]
    }
    pool = common.read_manifest(told.pool)
    kept, audio, *_ = common.embed_files(model, pool, desc="pool")
    cosines = audio @ common.embed_texts(model, [model.clean_caption(c) for c in sounds]).T
    right = np.array(
        [
            [len(told_of & set(pool[i]["labels"])) / len(told_of) for told_of in sounds.values()]
            for i in kept
        ]
    )
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    edges = np.linspace(cosines.min(), cosines.max(), 30)
    axis.hist(cosines.ravel(), edges, color="lightgray")
    axis.set_yscale("log")
    axis.set_xlabel("teacher's cosine of clip and caption")
    axis.set_ylabel("pairs")
    second, levels = (
        axis.twinx(),
        np.quantile(cosines, [0, 0.5, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999]),
    )
    second.plot(levels, [right[cosines >= level].mean() for level in levels], marker="o")
    second.axhline(right.mean(), color="tab:blue", ls=":", lw=1)
    second.set_ylabel(
        "sounds told that are there,\nof pairs above the cosine (dotted: all)", color="tab:blue"
    )
    second.set_ylim(0, 1)
    axis.set_title(
        f"{len(kept):,} clips without captions, {len(sounds):,} annotated captions", fontsize=10
    )
    figure.savefig(args.out / "curation.png", dpi=100)
    plt.close(figure)
    return args.out / "curation.png"


def one_ground(args) -> Path:
    """Every score beside CLAP's, and the costs."""
    rows = json.loads((Path(args.results) / "one_ground.json").read_text())
    plt = common.pyplot()
    shown = [
        m
        for m in (*claims.GROUND_METRICS, *claims.GROUND_COSTS[:2])
        if m != "gap" and sum(m in r["scores"] for r in rows) > 1
    ]
    figure, axes = plt.subplots(
        2,
        -(-len(shown) // 2),
        figsize=(1.7 * -(-len(shown) // 2), 5),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, shown):
        values = [r["scores"].get(metric, {}).get("mean", 0.0) for r in rows]
        axis.bar(range(len(rows)), values, color=[f"C{k}" for k in range(len(rows))])
        axis.axhline(values[0], color="black", lw=0.8, ls=":")
        chance = rows[0]["chance"].get(metric)
        if chance is not None:
            axis.axhline(chance, color="gray", lw=0.8)
        for k, r in enumerate(rows):
            if metric not in r["scores"]:
                axis.text(k, 0, "-", ha="center", va="bottom")
        axis.set_title(metric, fontsize=8)
        axis.set_xticks([])
        axis.tick_params(labelsize=7)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=f"C{k}") for k in range(len(rows))],
        [r["row"] for r in rows],
        loc="outside lower center",
        ncols=len(rows),
        fontsize=8,
    )
    figure.suptitle("dotted: CLAP; gray: chance", fontsize=8)
    figure.savefig(args.out / "one_ground.png", dpi=100)
    plt.close(figure)
    return args.out / "one_ground.png"


FIGURES = {f.__name__: f for f in (order, reconstructions, attention, curation, one_ground)}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], help="default: all")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the scenes")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/claims", help="checkpoints of claims.py"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "results/pictures")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [FIGURES[name](args) for name in args.names or FIGURES]
    print("pictures: " + " ".join(map(str, paths)))
    return paths


if __name__ == "__main__":
    common.run_entry(main, parse)
