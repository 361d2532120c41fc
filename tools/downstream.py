"""Scores that need more than embeddings: trained probes, generated captions, noise, images.

  python -m tools.downstream runs/collat-1/best.pt --data data/esc50 --protocol probe noise
  python -m tools.downstream runs/cacophony-1/best.pt --data data/clotho --protocol captioning

Protocols: probe (trained classifiers), aqa (question answering by a trained probe), captioning,
noise (robustness), image (audio-image retrieval), gap (distance between the modalities). All else,
such as long audio and the intervals, is as in eval.py.
"""

import collections
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import eval as evaluation
from eval import class_prompts, embed, per_class, report_left_out, result

# ------------------------------------------------------------------------------------------------
# Probes on frozen embeddings
# ------------------------------------------------------------------------------------------------


def train_probe(
    train,
    val,
    n_classes: int,
    desc: str,
    layers: int = 4,
    width: int = 512,
    epochs: int = 60,
    seed: int = 0,
    lr: float = 1e-4,
    batch_size: int = 128,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    batch_norm: bool = False,
    standardise: bool = True,
    patience: int | None = None,
    score_of=None,
    network=None,
    device="cpu",
):
    """Train a probe on frozen embeddings, with the best epoch chosen on `val` -> function from
    inputs to logits.

    train, val: inputs (N, ..., D) and targets. Targets are class numbers (N,) or (N, W) for softmax
    cross entropy (-1: no class, never right, ignored by the loss), or 0 and 1 (N, n_classes)
    float32 for the cross entropy of one sigmoid per class. The optimiser is AdamW (without
    weight_decay: Adam). The result depends on the seed alone.
    Args
        standardise: scale every input to mean 0 and deviation 1 over the training rows.
        layers: linear layers of an MLP; all but the last are followed by optional batch norm, ReLU
        and dropout.
        network: D, n_classes -> a network to train instead of that MLP; it replaces layers, width,
        dropout and batch_norm.
        patience: training ends after this many epochs without a better score.
        score_of: validation logits (N, n_classes) -> the score to maximise, a number or a tuple
        compared entry by entry; default: accuracy. The first of equal epochs counts; without
        validation rows, the last epoch.
    """
    torch.manual_seed(seed)
    (inputs, targets), (val_inputs, val_targets) = (
        (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in (train, val)
    )
    vectors = inputs.flatten(0, -2)  # (N, D), of tokens (N L, D)
    mean, deviation = (
        (vectors.mean(0), vectors.std(0, correction=0).clamp(min=1e-6)) if standardise else (0, 1)
    )
    sizes = [inputs.shape[-1]] + [width] * (layers - 1) + [n_classes]
    if network is None:
        linear = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]

        def between():
            return ([torch.nn.BatchNorm1d(width)] if batch_norm else []) + [
                torch.nn.ReLU(),
                torch.nn.Dropout(dropout),
            ]

        def network(*_):
            return torch.nn.Sequential(
                *[part for layer in linear[:-1] for part in (layer, *between())], linear[-1]
            )

    net = network(sizes[0], n_classes).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)

    def accuracy(logits):
        return float((logits.argmax(1) == val_targets.cpu().numpy()).mean())

    def logits(x):
        return net((x - mean) / deviation if standardise else x)

    best, best_epoch, kept = -math.inf, 0, None

    @torch.no_grad()
    def logits_of(x):
        return torch.cat([logits(part) for part in x.split(1024)]).cpu().numpy()

    for epoch in tqdm(range(epochs), desc=desc, unit="epoch", leave=False):
        net.train()
        for batch in torch.randperm(len(inputs)).split(batch_size):
            if batch_norm and len(batch) == 1:  # one row has no variance
                continue
            loss = probe_loss(logits(inputs[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        net.eval()
        score = (score_of or accuracy)(logits_of(val_inputs)) if len(val_inputs) else float(epoch)
        if kept is None or score > best:
            best, best_epoch, kept = (
                score,
                epoch,
                {name: value.clone() for name, value in net.state_dict().items()},
            )
        if patience is not None and epoch - best_epoch >= patience:
            break
    net.load_state_dict(kept)
    return lambda x: logits_of(torch.from_numpy(x).to(device))


def probe_loss(logits, targets):
    """Cross entropy of one sigmoid per class (N, C) for float targets, else of a softmax, where -1
    is ignored; a float for numpy arrays.
    """
    if isinstance(logits, np.ndarray):
        return float(probe_loss(torch.from_numpy(logits), torch.from_numpy(targets)))
    if targets.is_floating_point():
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-1
    )


def embed_splits(model, clips, settings, key: str, what: str, tokens: bool = False) -> dict:
    """Embeddings of the scored split, and of the rows of train and val that have `key` (of
    "labels": that are annotated, as in the scored split).

    Returns: split -> rows (one per file), audio_embeds (N, D), prompt embeddings (N, L, D') if
    `tokens`, else None.
    """

    def usable(row):
        return row.get(key) or (key == "labels" and common.annotated([row], "labels", "events"))

    trainable = {
        split: [r for r in settings.manifest if r.get("split", "train") == split and usable(r)]
        for split in ("train", "val")
    }
    if settings.split in ("train", "all rows") or not trainable["train"]:
        raise ValueError(
            f"{what}: it needs rows of split train with '{key}', and another split to score "
            "(--split)"
        )
    return {
        settings.split: scored_split(model, clips, settings, tokens),
        **{
            split: embed_rows(model, common.merge_rows(rows), settings, split, tokens)
            for split, rows in trainable.items()
            if rows and split != settings.split
        },
    }


def scored_split(model, clips, settings, tokens: bool):
    """As `embed_rows`, for the clips to score; their clip embeddings already exist."""
    return (
        embed_rows(model, clips["rows"], settings, settings.split, True)
        if tokens
        else (clips["rows"], clips["audio_embeds"], None)
    )


def embed_rows(model, rows: list[dict], settings, name: str, tokens: bool):
    """-> rows that could be read, audio_embeds (N, D), prompt embeddings (N, L, D) or None."""
    kept, embeds, held = embed(
        model, rows, settings, tokens and "token_embeds", f"embedding {name}"
    )
    return [rows[i] for i in kept], embeds, np.stack(held) if tokens else None


# ------------------------------------------------------------------------------------------------
# Protocols: (model, clips, classes, settings) -> result, as in eval.py
# ------------------------------------------------------------------------------------------------


def aqa(model, clips, classes, settings) -> dict:
    """Audio question answering with a probe on frozen embeddings.

    A 4-layer MLP (train_probe) takes the concatenated clip and question embeddings. It is trained
    on the rows of split train, chosen on val and scored on the evaluated split. One probe answers
    yes/no questions, another all others; the classes are the answers of the training rows. Word
    R@k: the answer is among the k best; an answer never seen in training is a miss. chance: always
    the k commonest training answers. Questions whose type needs the image are left out. Source:
    Cacophony Table III, Sec. V-C (Clotho-AQA, and Music-AQA, derived from MUSIC-AVQA; its layer
    widths and learning rate are not stated).
    """
    splits = embed_splits(model, clips, settings, "qa", "aqa trains a probe")
    asked = {
        split: [
            (i, q["question"], str(q["answer"]).lower())
            for i, row in enumerate(rows)
            for q in row.get("qa", [])
            if "Audio" in q.get("type", ["Audio"])
        ]
        for split, (rows, *_) in splits.items()
    }
    scored, chance, details, told = {}, {}, {}, []
    for kind in ("binary", "word"):
        of = {
            split: [q for q in questions if (q[2] in ("yes", "no")) == (kind == "binary")]
            for split, questions in asked.items()
        }
        if not of["train"] or not of[settings.split]:
            continue
        answers = sorted({answer for _, _, answer in of["train"]})
        number = {answer: k for k, answer in enumerate(answers)}

        def data(split):
            questions = of.get(split, [])
            texts = (
                common.embed_texts(model, [q for _, q, _ in questions])
                if questions
                else np.zeros((0, clips["audio_embeds"].shape[1]))
            )
            audio = splits[split][1][[i for i, _, _ in questions]] if questions else texts
            return np.concatenate([audio, texts], 1).astype(np.float32), np.array(
                [number.get(a, -1) for _, _, a in questions], dtype=np.int64
            )

        val = "val" if settings.split != "val" else "none"  # never chosen on what is scored
        logits_of = train_probe(data("train"), data(val), len(answers), f"aqa, {kind} probe")
        inputs, targets = data(settings.split)
        logits = logits_of(inputs)
        right = np.take_along_axis(logits, np.maximum(targets, 0)[:, None], 1)
        rank = np.where(
            targets >= 0, (logits >= right).sum(1) - 1, max(10, len(answers))
        )  # never seen: never among the best
        owner = np.array([i for i, _, _ in of[settings.split]])
        counts = collections.Counter(answer for _, _, answer in of["train"])
        common_first = sorted(answers, key=lambda answer: -counts[answer])
        for name, k in {
            "binary": {"binary_accuracy": 1},
            "word": {"word_R@1": 1, "word_R@5": 5, "word_R@10": 10},
        }[kind].items():
            scored[name] = owner, rank < k
            chance[name] = float(np.mean([a in common_first[:k] for _, _, a in of[settings.split]]))
        details[kind] = [
            {
                "clip": clips["rows"][i]["audio"],
                "question": q,
                "answer": a,
                "rank": int(r) + 1 if a in number else None,
            }
            for (i, q, a), r in zip(of[settings.split], rank)
        ]
        told.append(
            f"{len(of['train'])} {kind} questions for training, {len(of.get(val, []))} for the "
            "choice of the epoch, "
            f"{len(rank)} scored, {len(answers)} answers, {int((targets < 0).sum())} never seen in "
            "training"
        )
    if not scored:
        raise ValueError(
            "aqa: no kind of question (yes/no, or other) is both in split train and in the scored "
            "split"
        )
    n = len(clips["rows"])

    def score(chosen):
        times = np.bincount(chosen, minlength=n)

        def weigh(owner, hit):
            return (
                float((hit * times[owner]).sum() / times[owner].sum())
                if times[owner].sum()
                else float("nan")
            )

        return {name: weigh(*found) for name, found in scored.items()}

    return result(
        "aqa",
        score,
        n,
        chance,
        settings,
        details=details,
        questions="; ".join(told),
        tie_rule="a tie is a miss",
        probe="MLP of 4 layers, width 512, AdamW 1e-4, 60 epochs, seed 0",
    )


class TokenProbe(torch.nn.Module):
    """A transformer decoder layer, in which one learned query attends to a clip's tokens (B, L, D),
    and a linear layer -> (B, C).

    Source: CoLLAT Sec. 5.1 and Table 2, LP ("a 1-layer transformer decoder").
    """

    def __init__(self, width: int, n_classes: int):
        super().__init__()
        self.query = torch.nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layer = decoder_layer(width)
        self.classify = torch.nn.Linear(width, n_classes)

    def forward(self, tokens):
        return self.classify(self.layer(self.query.expand(len(tokens), -1, -1), tokens)[:, 0])


def decoder_layer(width: int) -> torch.nn.TransformerDecoderLayer:
    """torch's decoder layer, with heads of at least 64 dimensions if the width allows."""
    heads = max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0)
    return torch.nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True)


PROBES = {  # name -> input, settings of train_probe (ours: the paper states none)
    "linear": (
        "audio_embeds",
        dict(layers=1, lr=1e-2, weight_decay=0.0, batch_size=64, epochs=100, patience=20),
    ),
    "decoder": (
        "tokens",
        dict(
            network=TokenProbe, lr=5e-4, weight_decay=0.01, batch_size=64, epochs=100, patience=20
        ),
    ),
}


def label_task(rows: list[dict], classes: list[str]):
    """-> kind ("multiclass" where no row has two labels, else "multilabel"), targets for
    train_probe, rows that count.

    An annotated row without a label of the class list counts in a multilabel task only, as a
    negative for every class.
    """
    targets = common.label_targets(rows, classes)
    if (targets.sum(1) > 1).any():
        counted = np.array(common.annotated(rows, "labels", "events"))
        return "multilabel", targets.astype(np.float32), counted
    return "multiclass", targets.argmax(1), np.flatnonzero(targets.any(1))


METRIC_OF = {"multiclass": "accuracy", "multilabel": "mAP"}


def label_evidence(kind: str, logits, targets) -> np.ndarray:
    """What the score needs, one row per clip: right or not, or logits and targets side by side."""
    if kind == "multiclass":
        right = logits[np.arange(len(logits)), targets]
        return ((logits >= right[:, None]).sum(1) == 1)[:, None]  # a tie is a miss
    return np.concatenate([logits, targets], 1)


def label_score(kind: str, evidence: np.ndarray) -> float:
    """Accuracy, or macro mAP over classes that occur."""
    if kind == "multiclass":
        return float(evidence.mean())
    scores, targets = np.split(evidence, 2, axis=1)
    precisions = common.class_average_precisions(scores, targets > 0)
    return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else float("nan")


def label_chance(kind: str, train_targets, test_targets) -> float:
    """Accuracy of the commonest training class, or the mean AP of random scores."""
    if kind == "multiclass":
        return float((test_targets == np.bincount(train_targets).argmax()).mean())
    return common.chance_of_mean_ap(test_targets)


def join_inputs(parts: list[dict]) -> dict:
    """Concatenate several splits."""
    return {
        key: np.concatenate([part[key] for part in parts])
        if isinstance(value, np.ndarray)
        else [x for part in parts for x in part[key]]
        for key, value in parts[0].items()
    }


def fold_turns(folds: list[str]) -> list[tuple]:
    """(training folds, validation fold, test fold): each fold is tested once, with the next one for
    validation.
    """
    return [
        ([f for f in folds if f not in (test, valid)], valid, test)
        for test, valid in zip(folds, folds[1:] + folds[:1])
    ]


def probe(model, clips, classes, settings) -> dict:
    """Labels from frozen features: classifiers are trained on split train, chosen on val and scored
    on the evaluated split.

    linear: one linear layer on the clip embedding. decoder, for models with token_embeds: a
    transformer decoder layer with one learned query over the token embeddings of the first window
    (TokenProbe). The score is accuracy if no clip has two labels, else macro mAP, as in
    classification and tagging. Of epochs with equal scores on val, the one with the smallest loss
    there is taken. Inputs are standardised over the training clips. Rows with folds and no split
    train: each fold is tested once, the next one chooses the epoch, the others train; the score is
    the mean over folds. chance: `label_chance`.
    Source: CoLLAT, linear probing (ESC-50, UrbanSound8K, TUT, FSD50K, AudioSet); its settings are
    not stated.
    """
    tokens = hasattr(model, "token_embeds")
    folds = sorted({str(row["fold"]) for row in clips["rows"] if "fold" in row})
    if folds and not any(row.get("split") == "train" for row in settings.manifest):
        if len(folds) < 3:
            raise ValueError(
                f"probe: rows of {len(folds)} fold(s) and none of split train; it needs three "
                "folds, or split train"
            )
        turns, splits = fold_turns(folds), {"all": scored_split(model, clips, settings, tokens)}
        fold_of = np.array([str(row.get("fold")) for row in splits["all"][0]])
    else:
        splits = embed_splits(model, clips, settings, "labels", "probe trains a classifier", tokens)
        turns = [(["train"], "val" if settings.split != "val" else None, settings.split)]
        fold_of = np.array(
            [split for split, (rows, *_) in splits.items() for _ in rows]
        )  # the splits act as the folds of one turn
    rows = [row for of, *_ in splits.values() for row in of]
    inputs = {"audio_embeds": np.concatenate([embeds for _, embeds, _ in splits.values()])}
    if tokens:
        inputs["tokens"] = np.concatenate([held for *_, held in splits.values()])
    kind, targets, counted = label_task(rows, classes)
    parts = {}
    for name in sorted(
        {name for train, val, test in turns for name in (*train, val, test) if name}
    ):
        at = counted[fold_of[counted] == name]
        parts[name] = {
            "rows": [rows[i] for i in at],
            "targets": targets[at],
            **{key: x[at] for key, x in inputs.items()},
        }
        if name != "val" and not len(at):
            raise ValueError(f"probe: no clip of {name} has a label of the class list")
    metric, evidence, chance, of_fold = METRIC_OF[kind], {}, {}, []
    for k, (train_names, val_name, test_name) in enumerate(turns):
        train, test = join_inputs([parts[name] for name in train_names]), parts[test_name]
        val = parts[val_name] if val_name else {key: x[:0] for key, x in test.items()}
        of_fold += [k] * len(test["rows"])
        for name, (key, training) in PROBES.items():
            if key in inputs:
                logits_of = train_probe(
                    (train[key], train["targets"]),
                    (val[key], val["targets"]),
                    len(classes),
                    f"{name} probe, {test_name}",
                    score_of=lambda logits: (
                        label_score(kind, label_evidence(kind, logits, val["targets"])),
                        -probe_loss(logits, val["targets"]),
                    ),
                    device=next(model.parameters()).device,
                    **training,
                )
                evidence.setdefault(name, []).append(
                    label_evidence(kind, logits_of(test[key]), test["targets"])
                )
                chance.setdefault(f"{name}_{metric}", []).append(
                    label_chance(kind, train["targets"], test["targets"])
                )
    evidence, of_fold = (
        {name: np.concatenate(of) for name, of in evidence.items()},
        np.array(of_fold),
    )

    def score(chosen):
        turns_of = [chosen[of_fold[chosen] == k] for k in np.unique(of_fold[chosen])]
        return {
            f"{name}_{metric}": float(np.mean([label_score(kind, of[at]) for at in turns_of]))
            for name, of in evidence.items()
        }

    details = {
        f"{name}_folds": {
            turn[2]: label_score(kind, of[of_fold == k]) for k, turn in enumerate(turns)
        }
        for name, of in evidence.items()
    }
    if kind == "multilabel":
        details |= {
            f"{name}_AP": per_class(
                classes, common.class_average_precisions(*np.split(of, 2, axis=1))
            )
            for name, of in evidence.items()
        }
    read = {
        "linear": "one linear layer on the clip embedding",
        "decoder": "one decoder layer with one query over the tokens of the first window",
    }
    return result(
        "probe",
        score,
        len(of_fold),
        {name: float(np.mean(of)) for name, of in chance.items()},
        settings,
        n_classes=len(classes),
        details=details,
        clips=", ".join(f"{name} {len(part['rows'])}" for name, part in parts.items()),
        turns=f"{len(turns)} folds, each tested once, the next chooses the epoch; mean over folds"
        if folds == sorted(parts)
        else "trained on split train, the epoch "
        + (
            "chosen on val" if turns[0][1] and parts["val"]["rows"] else "is the last: no split val"
        ),
        left_out=f"{len(rows) - sum(len(part['rows']) for part in parts.values())} clips without "
        + ("labels" if kind == "multilabel" else "a label of the class list"),
        **{name: f"{read[name]}, {told_settings(PROBES[name][1])}" for name in evidence},
        tie_rule="a tie is a miss" if kind == "multiclass" else "equal scores are one threshold",
    )


def told_settings(training: dict) -> str:
    """Settings of train_probe as text."""
    return (
        f"AdamW {training['lr']:g}, batch {training['batch_size']}, "
        f"at most {training['epochs']} epochs, seed 0"
    )


class NoisyModel:
    """A wrapper that adds Gaussian noise to every clip before the model.

    The clip's own samples seed the noise, so neither batches nor the order of files change it, and
    all levels scale the same draw. Args: std: standard deviation of the noise, or snr_db: 10 log10
    of clip power / noise power.
    """

    def __init__(self, model, std: float | None = None, snr_db: float | None = None):
        self.model, self.std, self.snr_db = model, std, snr_db

    def __getattr__(self, name):
        return getattr(self.model, name)

    def noisy(self, waveform, n_samples):
        heard = waveform.clone()
        for row, n in zip(heard, n_samples.tolist()):
            samples = row[:n].cpu().numpy()
            drawn = torch.randn(
                n, generator=torch.Generator().manual_seed(zlib.crc32(samples.tobytes()))
            )
            power = float(np.mean(samples.astype(float) ** 2))
            row[:n] += (
                self.std if self.snr_db is None else (power / 10 ** (self.snr_db / 10)) ** 0.5
            ) * drawn.to(row.device)
        return heard

    def embed_audio(self, waveform, n_samples):
        return self.model.embed_audio(self.noisy(waveform, n_samples), n_samples)

    def embed_frames(self, waveform, n_samples):
        return self.model.embed_frames(self.noisy(waveform, n_samples), n_samples)


NOISE = {
    "clean": {},
    "std0.1": dict(std=0.1),
    **{f"snr{db}": dict(snr_db=db) for db in (20, 15, 10, 5, 0)},
}


def noise(model, clips, classes, settings) -> dict:
    """Zero-shot accuracy (macro mAP where a clip has several labels) of clips with Gaussian noise
    added to their samples.

    clean: no noise; std0.1: mean 0, standard deviation 0.1 (the paper's), for samples in [-1, 1]
    (ours); snr20 to snr0: the noise power is so many dB below the clip's own power. The noise is
    added at the model's rate before any padding, without clipping, one draw per clip (NoisyModel).
    Ties as in classification and tagging. Source: CoLLAT Table 3a (ESC-50 and FSD50K), Sec. 5.1
    (std 0.1).
    """
    kind, targets, counted = label_task(clips["rows"], classes)
    evidence = {}
    levels = [name for name in NOISE if name in settings.flags.noise_levels]
    for name in levels:
        added = NOISE[name]
        embeds, frame_embeds = clips["audio_embeds"], clips["frame_embeds"]
        if added:
            _, embeds, frame_embeds, bad = common.embed_files(
                NoisyModel(model, **added),
                clips["rows"],
                settings.flags.batch_size,
                settings.flags.workers,
                settings.crop,
                getattr(model, "pairwise", False),
                desc=f"embedding, noise {name}",
            )
            if bad:
                raise ValueError(
                    f"noise: a file that could be read before cannot any more: {bad[0]}"
                )
        sim = common.similarities(model, embeds, frame_embeds, class_prompts(classes, settings))[
            counted
        ]
        evidence[name] = label_evidence(kind, sim, targets[counted])
    metric, level = METRIC_OF[kind], 1 / len(classes)
    if kind == "multilabel":
        targets = targets[counted]
        level = common.chance_of_mean_ap(targets)

    def score(chosen):
        return {f"{metric}_{name}": label_score(kind, of[chosen]) for name, of in evidence.items()}

    return result(
        "noise",
        score,
        len(counted),
        dict.fromkeys((f"{metric}_{name}" for name in levels), level),
        settings,
        prompt=settings.prompt,
        n_classes=len(classes) if kind == "multiclass" else int(targets.any(0).sum()),
        noise="Gaussian, added to the samples at the model's rate before padding, seeded by the "
        "clip",
        left_out=f"{len(clips['rows']) - len(counted)} clips without "
        + ("labels" if kind == "multilabel" else "a label of the class list"),
        tie_rule="a tie is a miss" if kind == "multiclass" else "equal scores are one threshold",
    )


def pillow():
    """pillow's Image; the error says how to install it."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "image needs pillow to read pictures; install it with: pip install pillow"
        ) from None
    return Image


def load_image_model(name: str, dim: int):
    """CLIP's image tower and its preprocessing from a folder or hub id, for audio embeddings of
    `dim` dimensions.
    """
    pillow()  # the preprocessing needs it as well
    transformers = common.quiet_transformers()
    try:
        config = common.transformers_config(name)
        if (
            config.model_type == "clip"
        ):  # the joint dimension is not part of the image tower's own config
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        elif config.model_type != "clip_vision_model":
            raise ValueError(f"its type is {config.model_type}")
        encoder, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
        processor = transformers.CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"--image-model {name}: not a transformers CLIP folder or reachable hub id "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    if info["missing_keys"]:
        raise ValueError(
            f"--image-model {name}: holds no complete CLIP image tower, "
            f"{len(info['missing_keys'])} weights such as "
            f"{min(info['missing_keys'])} are missing"
        )
    if encoder.config.projection_dim != dim:
        raise ValueError(
            f"--image-model {name}: its space has {encoder.config.projection_dim} dimensions, the "
            f"model's audio embeddings {dim}; "
            "give the CLIP whose text encoder the model was trained with"
        )
    return encoder.eval(), processor


@torch.no_grad()
def embed_images(encoder, processor, rows: list[dict], batch_size: int):
    """-> indices of rows whose image could be read, their embeddings (N, D) of length 1, error
    texts of the others.
    """
    Image = pillow()
    kept, embeds, bad, device = [], [], [], next(encoder.parameters()).device
    for start in tqdm(
        range(0, len(rows), batch_size), desc="embedding images", unit="batch", leave=False
    ):
        images = []
        for i in range(start, min(start + batch_size, len(rows))):
            try:
                with Image.open(rows[i]["image"]) as image:
                    images.append(image.convert("RGB"))
                kept.append(i)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                bad.append(f"{rows[i]['image']}: cannot be read as an image ({error})")
        if images:
            pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
            embeds.append(
                torch.nn.functional.normalize(encoder(pixel_values=pixels).image_embeds, dim=-1)
                .cpu()
                .numpy()
            )
    if not kept:
        first = bad[0] if bad else "no readable clip has one"
        raise ValueError(f"image: none of {len(rows)} images could be read; first: {first}")
    return kept, np.concatenate(embeds), bad


def image(model, clips, classes, settings) -> dict:
    """Retrieval between clips and images, for models whose audio lies in CLIP's space: MRR and
    R@1, 5, 10 both ways.

    Each clip has one `image`, encoded by --image-model. a2i: rank of the clip's image among all
    images; i2a: rank of the image's clip. Clips without an image are left out. Ties count against
    the right answer. Source: Wav2CLIP's protocol on VGGSound's test split (15K clips), CoLLAT Sec.
    5.2 and Table 3b.
    """
    if not settings.flags.image_model:
        raise ValueError(
            "image needs --image-model, a transformers CLIP folder or hub id in whose space the "
            "audio embeddings lie"
        )
    index = [i for i, row in enumerate(clips["rows"]) if row.get("image")]
    encoder, processor = load_image_model(
        settings.flags.image_model, clips["audio_embeds"].shape[1]
    )
    kept, image_embeds, bad = embed_images(
        encoder.to(next(model.parameters()).device),
        processor,
        [clips["rows"][i] for i in index],
        settings.flags.batch_size,
    )
    report_left_out(bad, len(index), settings.flags.max_bad)
    rows, audio_embeds = (
        [clips["rows"][index[k]] for k in kept],
        clips["audio_embeds"][[index[k] for k in kept]],
    )
    n = len(rows)
    # images take the place of captions
    ranks = common.retrieval_ranks(audio_embeds @ image_embeds.T, np.arange(n))

    def named(scores):
        return {
            name.replace("a2t", "a2i").replace("t2a", "i2a"): v
            for name, v in scores.items()
            if "R@" in name or "MRR" in name
        }

    def score(chosen):
        return named(common.retrieval_scores({name: r[chosen] for name, r in ranks.items()}))

    details = {
        new: [
            {"clip": row["audio"], "image": row["image"], "rank": int(r) + 1}
            for row, r in zip(rows, ranks[old])
        ]
        for new, old in (("a2i", "a2t"), ("i2a", "t2a"))
    }
    return result(
        "image",
        score,
        n,
        named(common.retrieval_chance(np.arange(n), n)),
        settings,
        details=details,
        image_model=settings.flags.image_model,
        left_out=f"{len(clips['rows']) - len(index)} clips without a picture, {len(bad)} whose "
        "picture could not be read",
        tie_rule="a tie counts against the right answer",
    )


def captioning(model, clips, classes, settings) -> dict:
    """Generated captions, scored against all captions of each clip.

    BLEU-1 to 4, ROUGE-L and CIDEr-D as the COCO caption toolkit defines them (`bleu`, `rouge_l`,
    `cider_d`). Words are those of `caption_words`; the toolkit's own tokenizer needs Java, and so
    do METEOR and SPICE, which are not run. chance: always saying the most frequent reference (of
    equally frequent ones the first in the alphabet). Above temperature 0 each clip is captioned
    alone, seeded by its file's name, so that neither batches nor file order change the result.
    CIDEr-D's document frequencies are those of all clips, in every bootstrap draw. A model with
    token_embeds but no caption method gets a decoder, trained on the captions of split train
    (`decoded_captions`). Source: Cacophony, automatic captioning (AudioCaps, Clotho; its
    temperature is 0.1); CoLLAT Table 4 and Sec. 5.3 (AudioCaps, a trained 1-layer decoder).
    """
    common.require(clips["rows"], "captions")
    rows, trained = clips["rows"], {}
    if hasattr(model, "caption"):
        said = caption_files(model, rows, settings)
    else:
        rows, said, trained = decoded_captions(model, clips, settings)
    references = [[caption_words(c) for c in row["captions"]] for row in rows]
    times = collections.Counter(" ".join(words) for of in references for words in of)
    commonest = min(times, key=lambda text: (-times[text], text))
    evidence = caption_evidence([caption_words(text) for text in said], references)
    blind = caption_evidence([commonest.split()] * len(rows), references)

    def score(chosen, evidence=evidence):
        part = evidence[chosen]
        names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
        return {
            name: float(v) for name, v in zip(names, [*bleu(part[:, :10]), *part[:, 10:].mean(0)])
        }

    details = {
        "captions": [
            {
                "clip": row["audio"],
                "said": text,
                "references": row["captions"],
                "CIDEr-D": float(cider),
            }
            for row, text, cider in zip(rows, said, evidence[:, 11])
        ]
    }
    return result(
        "captioning",
        score,
        len(rows),
        score(np.arange(len(rows)), blind),
        settings,
        n_captions=sum(map(len, references)),
        details=details,
        crop="first window only"
        if settings.crop == "first" or trained
        else "whole files, longer ones as the model does it",
        **trained,
        temperature=f"{settings.flags.temperature:g}"
        + (" (greedy)" if settings.flags.temperature == 0 else ""),
        words="lower case, punctuation removed but for hyphens and apostrophes inside a word",
        not_run="METEOR, SPICE and what is made of them: they need Java",
        chance_is=f"always saying {commonest!r}, the most frequent of the references "
        f"({times[commonest]} times)",
    )


def gap(model, clips, classes, settings) -> dict:
    """Modality gap: distance between the mean audio and the mean text embedding, all of length 1.

    Every caption and its clip are one pair; the means are over pairs. The gap is 0 if both
    modalities have the same mean, and 2 at most. It is not a score to maximise: it depends on the
    model's temperature and dimensions. chance: the same vectors with their modality drawn at
    random, mean over 20 draws. Source: Liang et al., NeurIPS 2022; Cacophony's gap on its
    validation pairs.
    """
    common.require(clips["rows"], "captions")
    captions = [
        (i, model.clean_caption(c)) for i, row in enumerate(clips["rows"]) for c in row["captions"]
    ]
    owner, n = np.array([i for i, _ in captions]), len(clips["rows"])
    text_embeds = common.embed_texts(model, [c for _, c in captions]).astype(float)  # (Q, D)
    audio_embeds = clips["audio_embeds"][owner].astype(float)  # (Q, D)
    n_pairs, difference = np.bincount(owner, minlength=n), np.zeros((n, text_embeds.shape[1]))
    np.add.at(
        difference, owner, audio_embeds - text_embeds
    )  # (N, D), summed over the pairs of a clip

    def score(chosen):
        times = np.bincount(chosen, minlength=n)
        return {"gap": float(np.linalg.norm(times @ difference) / (times @ n_pairs))}

    both, rng, drawn = np.concatenate([audio_embeds, text_embeds]), np.random.default_rng(0), []
    for _ in range(20):
        order = rng.permutation(len(both))
        drawn.append(
            np.linalg.norm(both[order[: len(owner)]].mean(0) - both[order[len(owner) :]].mean(0))
        )
    return result(
        "gap",
        score,
        n,
        {"gap": float(np.mean(drawn))},
        settings,
        n_captions=len(owner),
        prompt="captions as written, cleaned by the method",
        chance_is="modality drawn at random, mean of 20 draws",
    )


# ------------------------------------------------------------------------------------------------
# Captions: lists of words against several references, one row a clip
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def caption_files(model, rows: list[dict], settings) -> list[str]:
    """One generated caption per row."""
    said = [""] * len(rows)
    loader = common.file_batches(
        model,
        rows,
        settings.flags.batch_size if settings.flags.temperature == 0 else 1,
        settings.flags.workers,
        settings.crop,
    )
    for indices, waveform, n_samples, errors in tqdm(
        loader, desc="captioning", unit="batch", leave=False
    ):
        if errors:
            raise ValueError(f"captioning: {errors[0][1]}")
        seed = zlib.crc32(Path(rows[indices[0]]["audio"]).name.encode())
        texts = model.caption(
            waveform.to(next(model.parameters()).device),
            n_samples,
            temperature=settings.flags.temperature,
            seed=seed,
        )
        for i, text in zip(indices, texts):
            said[i] = text
    return said


class CaptionDecoder(torch.nn.Module):
    """One transformer decoder layer that writes a caption token by token over a clip's prompt
    embeddings.

    clips (N, L, D): the prompt embeddings of all clips, not saved as weights. Inputs (B, 1 + W): a
    clip's number, then the caption so far.
    """

    def __init__(self, clips, vocabulary: int, max_tokens: int):
        super().__init__()
        width = clips.shape[2]
        self.register_buffer("clips", clips, persistent=False)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.position = torch.nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.layer = decoder_layer(width)
        self.classify = torch.nn.Linear(width, vocabulary)

    def forward(self, inputs):
        numbers, tokens = inputs[:, 0], inputs[:, 1:]
        W = tokens.shape[1]
        later = torch.ones(W, W, dtype=torch.bool, device=inputs.device).triu(1)  # True: masked
        return self.classify(
            self.layer(self.embed(tokens) + self.position[:W], self.clips[numbers], tgt_mask=later)
        )  # (B, W, vocabulary)


CAPTION_DECODER = dict(
    lr=5e-4, weight_decay=0.01, batch_size=64, epochs=30, patience=5
)  # ours: the paper states none


MOST_TOKENS = 77


def decoded_captions(model, clips, settings):
    """Captions by a CaptionDecoder trained on split train over the frozen model -> rows, captions,
    settings to print.

    The vocabulary is the tokens of the model's tokenizer that occur in the training captions, plus
    one for begin and end; captions are cut at 76. The best epoch gives the first caption of up to
    500 clips of val the highest likelihood. Decoding is greedy.
    """
    if settings.flags.temperature:
        raise ValueError("captioning: a decoder trained here is greedy; leave out --temperature")
    splits = embed_splits(
        model,
        clips,
        settings,
        "captions",
        "captioning trains a decoder for this model, which has no caption method",
        True,
    )
    tokenizer = model.text_encoder.tokenizer

    def ids_of(text):
        return tokenizer(model.clean_caption(text), add_special_tokens=False)["input_ids"][
            : MOST_TOKENS - 1
        ]

    train_rows = splits["train"][0]
    captions = {
        "train": [(i, ids_of(t)) for i, row in enumerate(train_rows) for t in row["captions"]]
    }
    if "val" in splits and settings.split != "val":
        captions["val"] = [
            (i, ids_of(row["captions"][0])) for i, row in enumerate(splits["val"][0][:500])
        ]
    vocabulary = sorted({token for _, ids in captions["train"] for token in ids})
    number = {token: k for k, token in enumerate(vocabulary, 1)}  # 0: begin and end
    longest = max(len(ids) for _, ids in captions["train"]) + 1
    first = dict(
        zip(splits, np.cumsum([0, *(len(rows) for rows, *_ in splits.values())]))
    )  # number of each split's first clip
    tokens = np.concatenate([held for *_, held in splits.values()])
    spread = splits["train"][2].reshape(-1, tokens.shape[2])
    mean, deviation = spread.mean(0), np.maximum(spread.std(0), 1e-6)
    tokens -= mean  # in place: the tokens of a large set take many GB
    tokens /= deviation
    tokens = torch.from_numpy(tokens).float()

    def data(split):
        known = [
            (i, [number[t] for t in ids if t in number][: longest - 1])
            for i, ids in captions.get(split, [])
        ]
        inputs, targets = (
            np.zeros((len(known), 1 + longest), np.int64),
            np.full((len(known), longest), -1, np.int64),
        )
        for row, target, (i, ids) in zip(inputs, targets, known):
            row[0], row[2 : 2 + len(ids)] = first[split] + i, ids
            target[: len(ids) + 1] = [*ids, 0]
        return inputs, targets

    val = data("val")
    logits_of = train_probe(
        data("train"),
        val,
        len(vocabulary) + 1,
        "caption decoder",
        score_of=lambda logits: -probe_loss(logits, val[1]),
        standardise=False,
        network=lambda _, n: CaptionDecoder(tokens, n, longest),
        device=next(model.parameters()).device,
        **CAPTION_DECODER,
    )
    rows, said = splits[settings.split][0], []
    for start in tqdm(range(0, len(rows), 64), desc="captioning", unit="batch", leave=False):
        numbers = first[settings.split] + np.arange(start, min(start + 64, len(rows)))
        written = np.stack([numbers, np.zeros_like(numbers)], 1)
        while written.shape[1] <= longest and not (written[:, 2:] == 0).any(1).all():
            written = np.concatenate([written, logits_of(written)[:, -1].argmax(1)[:, None]], 1)
        for ids in written[:, 2:].tolist():
            ids = ids[: ids.index(0)] if 0 in ids else ids
            said.append(
                tokenizer.decode([vocabulary[k - 1] for k in ids], skip_special_tokens=True).strip()
            )
    return (
        rows,
        said,
        {
            "decoder": "one transformer decoder layer over the frozen model's prompt embeddings, "
            f"trained here on {len(captions['train'])} captions of "
            f"{len(splits['train'][0])} clips of split train, {len(vocabulary) + 1} tokens, "
            f"{told_settings(CAPTION_DECODER)}",
            "epoch": f"the best on {len(val[0])} clips of val"
            if len(val[0])
            else "the last: no split val",
        },
    )


def caption_words(text: str) -> list[str]:
    """Lower-case words of letters and digits; a hyphen or an apostrophe inside a word stays."""
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())


def ngrams(words: list[str]) -> collections.Counter:
    """How often each run of one to four words occurs."""
    return collections.Counter(
        tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)
    )


def caption_evidence(said: list, references: list) -> np.ndarray:
    """What the scores need of each clip, (N, 12): ten BLEU counts, ROUGE-L, CIDEr-D."""
    return np.column_stack(
        [bleu_counts(said, references), rouge_l(said, references), cider_d(said, references)]
    )


def bleu_counts(said: list, references: list) -> np.ndarray:
    """(N, 10): n-grams also in a reference (n = 1 ... 4; clipped to the most in one reference),
    n-grams said (n = 1 ... 4), words said, and words of the reference closest in length (of two the
    shorter).
    """
    counts = np.zeros((len(said), 10))
    for row, words, of in zip(counts, said, references):
        allowed = collections.Counter()
        for reference in of:
            allowed |= ngrams(reference)  # the larger of the two counts
        for gram, times in (ngrams(words) & allowed).items():  # the smaller of the two counts
            row[len(gram) - 1] += times
        row[4:8] = [max(0, len(words) - n) for n in range(4)]
        row[8:] = (
            len(words),
            min((abs(len(reference) - len(words)), len(reference)) for reference in of)[1],
        )
    return counts


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 (4,) of a set of clips from its `bleu_counts`: counts are summed first, then
    divided.

    Source: Papineni et al., ACL 2002, with the COCO toolkit's 1e-15 and 1e-9 against 0 / 0.
    """
    total = counts.sum(0)
    precision = (total[:4] + 1e-15) / (total[4:8] + 1e-9)
    length_ratio = (total[8] + 1e-15) / (total[9] + 1e-9)
    brevity = math.exp(min(0.0, 1 - 1 / length_ratio))
    return np.cumprod(precision) ** (1 / np.arange(1, 5)) * brevity


def longest_common_subsequence(a: list, b: list) -> int:
    """Length of the longest sequence that both contain in order, gaps allowed."""
    best = [0] * (len(b) + 1)  # best[j]: of the words of a so far and b[:j]
    for word in a:
        above = best[:]
        for j, other in enumerate(b):
            best[j + 1] = above[j] + 1 if word == other else max(above[j + 1], best[j])
    return best[-1]


def rouge_l(said: list, references: list, beta: float = 1.2) -> np.ndarray:
    """ROUGE-L of each clip (N,): F-measure of the best precision and the best recall over its
    references.

    Source: Lin, 2004; beta and the two separate maxima are the COCO toolkit's.
    """
    scores = np.zeros(len(said))
    for i, (words, of) in enumerate(zip(said, references)):
        shared = [longest_common_subsequence(words, reference) for reference in of]
        precision = max(shared) / max(1, len(words))
        recall = max(n / max(1, len(reference)) for n, reference in zip(shared, of))
        if precision > 0:
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def cider_d(said: list, references: list, sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of each clip (N,), at most 10: cosine of tf-idf n-gram vectors, n = 1 ... 4, mean
    over n and references.

    An n-gram's idf comes from the number of clips with it in a reference. Its count is clipped to
    that in the reference, and a Gaussian (sigma, in words) penalises a difference in length.
    Source: Vedantam et al., CVPR 2015, the variant D, as the COCO toolkit's `Cider`.
    """
    grams = [[ngrams(words) for words in of] for of in references]
    clips_with = collections.Counter(gram for of in grams for gram in set().union(*of))

    def weigh(counts):
        """-> weight of each n-gram, norm of the vector of each n (4,)."""
        weights = {
            gram: times * math.log(len(references) / max(1, clips_with[gram]))
            for gram, times in counts.items()
        }
        squares = np.zeros(4)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, np.sqrt(squares)

    scores = np.zeros(len(said))
    for i, (words, of) in enumerate(zip(said, grams)):
        weights, norm = weigh(ngrams(words))
        for reference, counts in zip(references[i], of):
            own, own_norm = weigh(counts)
            product = np.zeros(4)
            for gram in weights.keys() & own.keys():
                product[len(gram) - 1] += min(weights[gram], own[gram]) * own[gram]
            scale = norm * own_norm
            cosine = product / np.where(scale > 0, scale, 1)
            apart = max(0, len(words) - 1) - max(
                0, len(reference) - 1
            )  # the toolkit's length is the number of bigrams
            scores[i] += 10 * cosine.mean() * math.exp(-(apart**2) / (2 * sigma**2)) / len(of)
    return scores


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

PROTOCOLS = {
    "probe": evaluation.Protocol(probe, "labels"),
    "aqa": evaluation.Protocol(aqa, "qa"),
    "captioning": evaluation.Protocol(
        captioning, "captions", ("caption", "token_embeds"), "that writes no captions"
    ),
    "noise": evaluation.Protocol(noise, "labels"),
    "image": evaluation.Protocol(image, "image"),
    "gap": evaluation.Protocol(gap, "captions"),
}


def parse(argv=None):
    parser = evaluation.make_parser(__doc__, prog="python -m tools.downstream")
    parser.add_argument(
        "--protocol", nargs="+", required=True, choices=list(PROTOCOLS), help="one or more"
    )
    parser.add_argument(
        "--image-model",
        help="image: transformers CLIP folder or hub id in whose space the audio embeddings lie",
    )
    parser.add_argument(
        "--noise-levels",
        nargs="+",
        choices=list(NOISE),
        default=list(NOISE),
        help="noise: these only; each but clean embeds the audio anew (default: all)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="captioning: 0 takes the likeliest word, above 0 draws (Cacophony: 0.1)",
    )
    parser.set_defaults(command="scores")
    return parser.parse_args(argv)


def main(flags) -> list[dict]:
    if not 0 <= flags.temperature < math.inf:
        raise ValueError(f"--temperature {flags.temperature}: expected 0 (greedy) or more")
    return evaluation.main(flags, PROTOCOLS)


if __name__ == "__main__":
    common.run_entry(main, parse)
