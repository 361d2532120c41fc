"""Does each paper's effect show? Trains the method and its baseline alike and compares them.

  python prepare.py scenes --sounds DIR --out SCENES
  python tests/claims.py mga_clap --data SCENES --seeds 3 --json results/claims_mga_clap.json

Every finished run is kept in results/ under the hash of its settings, so a second call continues.
Writes a list of {"claim", "method", "baseline", "metric", "method_mean", "method_std",
"baseline_mean", "baseline_std", "seeds", "holds", "seconds"}.
"""
import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import bench  # noqa: E402
import common  # noqa: E402
import mga_clap  # noqa: E402

# Same encoder, start, data, steps and learning rate; only the method differs.
CLAP = dict(aggregator="mean", locality_blocks=0, hard_negatives=False)
MGA_BUDGET = dict(size="tiny", epochs=6, eval_epochs=3)
MGA_CLAIMS = [  # metric, what the paper's effect predicts, test on (method mean, baseline mean)
    ("frame_mAP_raw", "frame-level mAP (raw cosine) at least twice CLAP's", lambda m, b: m >= 2 * b),
    ("frame_mAP_centred", "frame-level mAP (class-centred) above CLAP's", lambda m, b: m > b),
    ("t2a_R@1", "T2A R@1 not below CLAP's", lambda m, b: m >= b),
    ("t2a_R@5", "T2A R@5 not below CLAP's", lambda m, b: m >= b),
    ("a2t_R@1", "A2T R@1 not below CLAP's", lambda m, b: m >= b),
    ("tagging_mAP", "tagging mAP not below CLAP's", lambda m, b: m >= b)]


def stored(settings: dict, results: Path, run) -> dict:
    """run(settings), or what an earlier call with equal settings and data left in results/."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = results / f"run_{settings['name']}_{key}.json"
    if not path.exists():
        print(f"running {settings}", flush=True)
        common.write_lines(path, [json.dumps({"settings": settings, **run(settings)}, indent=1)])
    return json.loads(path.read_text())


def data_hash(data: list[str]) -> str:
    return hashlib.sha256(common.manifest_path(data[0]).read_bytes()).hexdigest()[:12]


def tagging_start(flags: dict, data: list[str], results: Path, steps: int = 250) -> str:
    """One audio encoder for all methods and seeds, pre-trained to tag the training scenes -> its file.

    Labels only: a linear layer on every frame, logits averaged over the frames, as HTS-AT's own
    AudioSet training, which the paper starts from. The validation and test recordings are not heard.
    """
    cfg = common.configure(mga_clap.Config, mga_clap.PRESETS, data=data, **flags)
    shape = dict(dim=cfg.audio_dim, depths=cfg.audio_depths, heads=cfg.audio_heads, patch=cfg.audio_patch)
    key = hashlib.sha256(json.dumps([shape, steps, cfg.batch_size, data_hash(data)]).encode()).hexdigest()[:12]
    path = results / f"tagging_start_{key}.pt"
    if path.exists():
        return str(path)
    torch.manual_seed(0)
    rows, _ = common.split_train_val(common.read_manifest(data))
    classes = sorted({label for row in rows for label in row["labels"]})
    targets = torch.from_numpy(common.label_targets(rows, classes)).float()
    encoder, log_mel = common.HTSAT(**shape, drop_path=0.0).train(), common.LogMel()
    head = torch.nn.Linear(encoder.out_dim, len(classes))
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
    rng, batch_size = np.random.default_rng(0), min(cfg.batch_size, len(rows))
    batches = [rng.choice(len(rows), batch_size, replace=False).tolist() for _ in range(steps)]
    loader = torch.utils.data.DataLoader(common.AudioFiles(rows, 32000, 10.0), batch_sampler=batches, num_workers=cfg.workers,
                                         collate_fn=common.collate_audio)
    for step, (indices, waveform, _, _) in enumerate(tqdm(loader, desc="tagging start", unit="step")):
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(step, steps // 8, steps)
        waveform = torch.nn.functional.pad(waveform, (0, 320000 - waveform.shape[1]))
        logits = head(encoder(log_mel(waveform))).mean(1)  # (B, T, classes) -> (B, classes)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[indices])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    common.save_checkpoint(path, encoder.state_dict())
    return str(path)


def run_mga_clap(settings: dict, data: list[str], results: Path) -> dict:
    """Train with `settings`, test the best validation checkpoint on the test scenes."""
    start_from = {"audio_weights": tagging_start(settings["flags"], data, results)} if settings["start"] == "tagging" else {}
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        cfg = common.configure(mga_clap.Config, mga_clap.PRESETS, data=data, runs=runs, seed=settings["seed"],
                               name="claim", **{**settings["flags"], **start_from})
        mga_clap.main(cfg)
        seconds = time.perf_counter() - start
        model = mga_clap.Model.from_checkpoint(Path(runs) / "claim" / "best.pt")
        log = [json.loads(line) for line in (Path(runs) / "claim" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in common.read_manifest(data) if row.get("split") == "test"]
    scores, chance = mga_clap.validate(model, rows, common.read_classes(data, rows))
    return {"scores": scores, "chance": chance, "seconds": seconds, "n_clips": len(rows), "machine": bench.machine(),
            "final_loss": log[-1]["loss"], "active_codewords": log[-1]["active_codewords"]}


def claims_mga_clap(args) -> list[dict]:
    results, budget = Path(args.results), {**MGA_BUDGET, **json.loads(args.budget)}
    runs = {}
    for seed in range(args.seeds):
        for name, flags in (("mga_clap", {}), ("clap", CLAP)):
            settings = {"name": name, "seed": seed, "start": args.start, "flags": {**budget, **flags}, "data": data_hash(args.data)}
            runs.setdefault(name, []).append(stored(settings, results, lambda s: run_mga_clap(s, args.data, results)))
    out = []
    for metric, claim, holds in MGA_CLAIMS:
        of = lambda name: [r["scores"][metric] for r in runs[name]]  # noqa: E731
        spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0  # noqa: E731
        m, b = statistics.mean(of("mga_clap")), statistics.mean(of("clap"))
        out.append({"claim": claim, "method": "mga_clap", "baseline": "clap", "metric": metric, "method_mean": m,
                    "method_std": spread(of("mga_clap")), "baseline_mean": b, "baseline_std": spread(of("clap")),
                    "seeds": args.seeds, "start": args.start, "holds": bool(holds(m, b)), "chance": runs["clap"][0]["chance"][metric],
                    "n_clips": runs["clap"][0]["n_clips"], "machine": runs["clap"][0]["machine"],
                    "seconds": statistics.mean(r["seconds"] for r in runs["mga_clap"] + runs["clap"])})
    return out


METHODS = {"mga_clap": claims_mga_clap}


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("method", choices=[*METHODS, "all"])
    parser.add_argument("--data", nargs="+", required=True, help="scenes made by prepare.py, with train, val and test rows")
    parser.add_argument("--seeds", type=int, default=1, help="runs per method, seeds 0, 1, ...")
    parser.add_argument("--start", choices=["tagging", "random"], default="tagging",
                        help="audio encoder of all runs: pre-trained to tag the training scenes, or random")
    parser.add_argument("--budget", default="{}", help="JSON of mga_clap flags that change both methods alike")
    parser.add_argument("--results", default=str(ROOT / "results"), help="where finished runs are kept")
    parser.add_argument("--json", help="write the list of claims to this file")
    args = parser.parse_args(argv)
    claims = [c for name in ([args.method] if args.method != "all" else METHODS) for c in METHODS[name](args)]
    print(f"\n| metric | {claims[0]['baseline']} | {claims[0]['method']} | chance | claim |\n|---|---|---|---|---|")
    for c in claims:
        print(f"| {c['metric']} | {c['baseline_mean']:.3f} ± {c['baseline_std']:.3f} | {c['method_mean']:.3f} ± {c['method_std']:.3f} "
              f"| {c['chance']:.3f} | {c['claim']}: {'holds' if c['holds'] else 'does not hold'} |")
    if args.json:
        common.write_lines(Path(args.json), [json.dumps(claims, indent=1)])
    return claims


if __name__ == "__main__":
    main()
