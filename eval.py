"""Zero-shot evaluation of any checkpoint, one function a protocol, every rule printed with the score.

  python eval.py runs/NAME/best.pt --data MANIFEST --protocol all --json scores.json
  python eval.py A.pt B.pt laion/clap-htsat-unfused --data MANIFEST     (side by side, paired differences)
  python eval.py embed A.pt --data MANIFEST --out embeds.npz            (embeddings of audio and captions)
  python eval.py hear A.pt --task FOLDER --json scores.json             (a task of the HEAR benchmark)

Protocols: retrieval, classification, tagging, frames, sed (sound event detection), grounding
(text-to-audio grounding), t_classify (temporal order), aqa (question answering by a trained probe),
captioning, gap (distance between the modalities), image (audio-image retrieval), probe (trained
classifiers), noise (robustness), or all that the manifest has labels for but for the last two.
Audio is never cropped at random: it is zero-padded to the model's window, longer audio is cut into
consecutive windows whose embeddings are averaged by their seconds and renormalised (`--crop first`:
the first window only). Scores carry a 95 % bootstrap interval over clips.
This module also is one of HEAR's interface: load_model, get_scene_embeddings, get_timestamp_embeddings.
"""

import argparse
import collections
import csv
import hashlib
import importlib
import json
import math
import os
import re
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

METHODS = (
    "mga_clap",
    "t_clap",
    "cacophony",
    "collat",
    "curation_clap",
)  # scripts whose checkpoints name them
PROMPTS = {  # class prompts by name (MGA-CLAP: its code, bare names elsewhere; CoLLAT's is assumed)
    "bare": "{}",
    "mga_clap": "{} can be heard",
    "t_clap": "A sound of {}",
    "cacophony": "This is a sound of {}",
    "cacophony_scene": "This is a sound on {}",
    "collat": "This is a sound of {}",
    "curation_clap": "this is a sound of {}",
    "laion": "This is a sound of {}",
}


# ------------------------------------------------------------------------------------------------
# Protocols: (model, clips, classes, args) -> result
# clips: {"rows", "audio_embeds" (N, D), "frame_embeds" list of (T_i, D) or None}
# ------------------------------------------------------------------------------------------------


def retrieval(model, clips, classes, args) -> dict:
    """Text-to-audio and audio-to-text retrieval.

    Every caption queries all N clips (t2a: rank of its own clip); every clip queries all Q captions
    (a2t: best rank among its own captions; mAP@10 as common.retrieval_ranks defines it, divided by
    the number of own captions). Captions go through the method's own clean_caption. Ties count
    against the right answer. Source: the protocol WavCaps, MGA-CLAP and LAION-CLAP share; AudioCaps
    test 957-975 x 5, Clotho evaluation 1045 x 5 (MGA-CLAP Table 1).
    """
    common.require(clips["rows"], "captions")
    captions = [
        (i, model.clean_caption(c)) for i, row in enumerate(clips["rows"]) for c in row["captions"]
    ]
    owner = np.array([i for i, _ in captions])
    texts, n = [c for _, c in captions], len(clips["rows"])
    if getattr(model, "pairwise", False):
        ranks = common.retrieval_ranks(
            common.similarities(model, None, clips["frame_embeds"], texts), owner
        )
    else:  # only a block of the N x Q cosines is ever held
        text_embeds = common.embed_texts(model, texts)
        ranks = common.retrieval_ranks(
            lambda part: clips["audio_embeds"][part] @ text_embeds.T, owner, n
        )
    captioned = np.unique(owner)

    def score(chosen):
        times = np.bincount(chosen, minlength=n)
        at = np.repeat(np.arange(len(captioned)), times[captioned])
        return common.retrieval_scores(
            {
                "t2a": np.repeat(ranks["t2a"], times[owner]),
                "a2t": ranks["a2t"][at],
                "a2t_ap10": ranks["a2t_ap10"][at],
            }
        )

    details = {
        "t2a": [
            {"clip": clips["rows"][i]["audio"], "caption": c, "rank": int(k) + 1}
            for (i, c), k in zip(captions, ranks["t2a"])
        ],
        "a2t": [
            {"clip": clips["rows"][i]["audio"], "rank": int(k) + 1}
            for i, k in zip(captioned, ranks["a2t"])
        ],
    }
    return result(
        "retrieval",
        score,
        n,
        common.retrieval_chance(owner, n),
        args,
        n_captions=len(captions),
        details=details,
        prompt="captions as written, cleaned by the method",
        tie_rule="a tie counts against the right answer",
    )


def classification(model, clips, classes, args) -> dict:
    """Accuracy: the class prompt with the largest cosine to the clip, among clips with one label.

    A tie is a miss. Clips with several labels are left out and counted. Source: MGA-CLAP Table 2
    (ESC-50 mean of 5 folds, UrbanSound8K mean of 10; mean_of_folds is printed where rows have a fold).
    """
    targets = common.label_targets(clips["rows"], classes)
    single = targets.sum(1) == 1
    if not single.any():
        raise ValueError(
            "classification needs clips with exactly one label; this manifest has none"
        )
    sim = common.similarities(
        model, clips["audio_embeds"], clips["frame_embeds"], class_prompts(classes, args)
    )[single]
    right = np.take_along_axis(sim, targets[single].argmax(1)[:, None], 1)
    hit = (sim >= right).sum(1) == 1  # nothing but the right class reaches its score
    folds = np.array([str(row.get("fold", "")) for row, one in zip(clips["rows"], single) if one])

    def score(chosen):
        scores = {"accuracy": float(hit[chosen].mean())}
        if len(set(folds)) > 1:
            scores["mean_of_folds"] = float(
                np.mean(
                    [hit[chosen][folds[chosen] == f].mean() for f in sorted(set(folds[chosen]))]
                )
            )
        return scores

    truth = targets[single].argmax(1)
    details = {
        "recall": {
            c: float(hit[truth == k].mean()) for k, c in enumerate(classes) if (truth == k).any()
        }
    }
    return result(
        "classification",
        score,
        len(hit),
        {"accuracy": 1 / len(classes), "mean_of_folds": 1 / len(classes)},
        args,
        n_classes=len(classes),
        details=details,
        prompt=args.prompt,
        tie_rule="a tie is a miss",
        left_out=f"{int((~single).sum())} clips without exactly one label",
    )


def tagging(model, clips, classes, args) -> dict:
    """Macro mAP over classes that occur, from the cosine of clip and class prompt.

    Non-interpolated average precision, equal scores form one threshold. Source: MGA-CLAP Table 2
    (FSD50K, AudioSet evaluation splits).
    """
    targets = common.label_targets(clips["rows"], classes)
    sim = common.similarities(
        model, clips["audio_embeds"], clips["frame_embeds"], class_prompts(classes, args)
    )

    def score(chosen):
        return {
            "mAP": float(np.nanmean(common.class_average_precisions(sim[chosen], targets[chosen])))
        }

    details = {"AP": per_class(classes, common.class_average_precisions(sim, targets))}
    return result(
        "tagging",
        score,
        len(sim),
        {"mAP": float(targets.mean(0)[targets.any(0)].mean())},
        args,
        details=details,
        n_classes=int(targets.any(0).sum()),
        prompt=args.prompt,
        tie_rule="equal scores are one threshold",
    )


def frames(model, clips, classes, args) -> dict:
    """Frame-level mAP: each frame's cosine to each class prompt, all frames of all clips pooled.

    A frame is positive where an event covers its centre. raw: the cosine (the papers' protocol).
    centred: the frame's mean over classes taken out first, which removes how much a frame resembles
    any class text at all. Both are always reported; DESIGN: never tune on one and report the other.
    """
    if not any(row.get("events") for row in clips["rows"]):
        raise ValueError("frames needs 'events' in the manifest; there is not one")
    class_embeds = common.embed_texts(model, class_prompts(classes, args))
    occurring = set(classes) & {
        event["label"] for row in clips["rows"] for event in row.get("events", [])
    }
    if not occurring:
        raise ValueError(
            "frames: no event's label is in the class list (classes.txt beside the manifest)"
        )
    chance, details = {}, {}
    variants = [("mAP_raw", False), ("mAP_centred", True)][
        : min(2, len(classes))
    ]  # one class: nothing to take a mean over
    if not any(
        common.frame_targets(row, classes, len(f), model.frame_s).any()
        for row, f in zip(clips["rows"], clips["frame_embeds"])
    ):
        raise ValueError(
            f"frames: no event covers the centre of a frame ({model.frame_s:g} s each); are the times seconds?"
        )

    def score(chosen):
        scores = {}
        for name, centred in variants:
            precisions, level = common.frame_average_precisions(
                [clips["frame_embeds"][i] for i in chosen],
                class_embeds,
                [clips["rows"][i] for i in chosen],
                classes,
                model.frame_s,
                centred,
            )
            scores[name] = (
                float(np.nanmean(precisions)) if np.isfinite(precisions).any() else float("nan")
            )
            chance.setdefault(name, level)  # of the first call, which is on all clips
            details.setdefault(name.replace("mAP", "AP"), per_class(classes, precisions))
        return scores

    return result(
        "frames",
        score,
        len(clips["rows"]),
        chance,
        args,
        n_classes=len(occurring),
        details=details,
        prompt=args.prompt,
        tie_rule="equal scores are one threshold",
        frame_s=model.frame_s,
        n_frames=sum(len(f) for f in clips["frame_embeds"]),
    )


PSDS1 = dict(dtc=0.7, gtc=0.7)
PSDS2 = dict(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5)


def sed(model, clips, classes, args) -> dict:
    """Zero-shot sound event detection: each frame's cosine to each class prompt, median-filtered.

    PSDS1 and PSDS2 (DCASE's two scenarios, at most 100 effective false positives an hour) exact over
    all thresholds, with alpha_st 1 (the paper's script: mean less standard deviation over classes)
    and, as _st0, 0. collar_F1: an event is found if a detection's onset lies within 0.2 s and its
    offset within max(0.2 s, 20 % of the event); segment_F1: in segments of 1 s. Both F1 are macro
    means with the best threshold of each class, chosen on these very clips. raw: the cosine;
    centred: the frame's mean over classes taken out. Clips without any event are left out, as in
    the authors' code. chance: random scores. Source: MGA-CLAP Table 3 (DESED, URBAN-SED,
    AudioSet-Strong), whose code filters over 3 frames of 0.31 s.
    """
    index = [
        i
        for i, row in enumerate(clips["rows"])
        if any(e["label"] in classes for e in row.get("events", []))
    ]
    if not index:
        raise ValueError(
            "sed: no event's label is in the class list (classes.txt beside the manifest)"
        )
    rows = [with_duration(clips["rows"][i], clips["frame_embeds"][i], model.frame_s) for i in index]
    occurring = [c for c in classes if any(e["label"] == c for row in rows for e in row["events"])]
    class_embeds, width = (
        common.embed_texts(model, class_prompts(classes, args)),
        median_frames(args.median_s, model.frame_s),
    )
    raw = [clips["frame_embeds"][i] @ class_embeds.T for i in index]  # (T_i, C)
    columns = [classes.index(c) for c in occurring]
    filtered = {
        "": [median_filter(s, width)[:, columns] for s in raw],
        "_centred": [median_filter(s - s.mean(1, keepdims=True), width)[:, columns] for s in raw],
    }
    if len(classes) == 1:  # nothing to take a mean over
        del filtered["_centred"]
    rng = np.random.default_rng(0)
    random = {"": [median_filter(rng.random((len(s), len(columns))), width) for s in raw]}

    def score(chosen, filtered=filtered):
        scores, of = {}, [rows[i] for i in chosen]
        for suffix, all_scores in filtered.items():
            given = [all_scores[i] for i in chosen]
            for name, settings in (("PSDS1", PSDS1), ("PSDS2", PSDS2)):
                roc = common.psd_roc(given, of, occurring, model.frame_s, **settings)
                scores[name + suffix], scores[f"{name}_st0{suffix}"] = (
                    common.psds(roc, 1.0),
                    common.psds(roc, 0.0),
                )
            scores["collar_F1" + suffix] = float(
                np.nanmean(collar_f1(given, of, occurring, model.frame_s))
            )
            scores["segment_F1" + suffix] = float(
                np.nanmean(segment_f1(given, of, occurring, model.frame_s))
            )
        return scores

    chance = score(np.arange(len(rows)), random)
    chance |= {f"{k}_centred": v for k, v in chance.items()}
    details = {}
    for suffix, given in filtered.items():
        for name, settings in (("PSDS1", PSDS1), ("PSDS2", PSDS2)):
            roc = common.psd_roc(given, rows, occurring, model.frame_s, **settings)
            details[name + suffix] = {c: common.psds([one], 0.0) for c, one in zip(occurring, roc)}
        details["collar_F1" + suffix] = per_class(
            occurring, collar_f1(given, rows, occurring, model.frame_s)
        )
        details["segment_F1" + suffix] = per_class(
            occurring, segment_f1(given, rows, occurring, model.frame_s)
        )
    return result(
        "sed",
        score,
        len(rows),
        chance,
        args,
        n_classes=len(occurring),
        details=details,
        prompt=args.prompt,
        frame_s=model.frame_s,
        median=f"{width} frames, {width * model.frame_s:.2f} s",
        psds1=str(PSDS1),
        psds2=str(PSDS2),
        left_out=f"{len(clips['rows']) - len(index)} clips without an event",
    )


def grounding(model, clips, classes, args) -> dict:
    """Text-to-audio grounding: when does a caption's phrase sound? Every phrase of every clip is one query.

    PSDSm: the sigmoid of frame-phrase cosines at the 50 thresholds 0.01, 0.03, ... 0.99, binarised,
    median-filtered, gaps of at most 0.5 s closed, then PSDS with dtc = gtc = 0.5, one class, at most
    800 false positives an hour (the paper prints no definition; this is the reading its code and
    numbers allow). PSDS_exact: the same settings over all thresholds, on median-filtered cosines,
    gaps left open. centred: the frame's mean over all phrases of the data taken out. Phrases without
    a segment are left out; each of the others adds its clip's duration to the hours. chance: random
    scores. Source: MGA-CLAP Table 3 (AudioGrounding v2, test split).
    """
    common.require(clips["rows"], "phrases")
    queries = [
        (i, p["phrase"], [s for s in p["segments"] if s[1] > s[0]])
        for i, row in enumerate(clips["rows"])
        for p in row["phrases"]
    ]
    total, queries = len(queries), [q for q in queries if q[2]]
    if not queries:
        raise ValueError("grounding: no phrase of the manifest has a segment")
    texts = sorted({phrase for _, phrase, _ in queries})
    embeds, width = common.embed_texts(model, texts), median_frames(args.median_s, model.frame_s)
    gap = math.ceil(0.5 / model.frame_s)
    of_clip = [[] for _ in clips["rows"]]
    raw, centred, rows, rng, random = [], [], [], np.random.default_rng(0), []
    for k, (i, phrase, segments) in enumerate(queries):
        frame_embeds, text = clips["frame_embeds"][i], embeds[texts.index(phrase)]
        raw.append(frame_embeds @ text)
        centred.append(frame_embeds @ (text - embeds.mean(0)))
        random.append(rng.uniform(-1, 1, len(frame_embeds)))
        rows.append(
            with_duration(
                {
                    **clips["rows"][i],
                    "events": [{"label": "phrase", "onset": a, "offset": b} for a, b in segments],
                },
                frame_embeds,
                model.frame_s,
            )
        )
        of_clip[i].append(k)

    def all_scores(values):
        points = grounding_points(values, rows, model.frame_s, width, gap)  # (Q, 50, 2)
        filtered = [median_filter(v[:, None], width) for v in values]
        return points, filtered

    prepared = {"": all_scores(raw), "_centred": all_scores(centred)}
    if len(texts) == 1:
        del prepared["_centred"]

    def score(chosen, prepared=prepared):
        at = [k for i in chosen for k in of_clip[i]]
        scores, given = {}, [rows[k] for k in at]
        if not given:
            return {
                name + suffix: float("nan")
                for suffix in prepared
                for name in ("PSDSm", "PSDS_exact")
            }
        n_events, hours = (
            sum(len(row["events"]) for row in given),
            sum(row["duration"] for row in given) / 3600,
        )
        for suffix, (points, filtered) in prepared.items():
            found, false = points[at].sum(0).T
            scores["PSDSm" + suffix] = common.psds(
                [common.staircase(found / n_events, false / hours, 800.0)], 0.0, 800.0
            )
            roc = common.psd_roc(
                [filtered[k] for k in at],
                given,
                ["phrase"],
                model.frame_s,
                0.5,
                0.5,
                max_efpr=800.0,
            )
            scores["PSDS_exact" + suffix] = common.psds(roc, 0.0, 800.0)
        return scores

    chance = score(np.arange(len(of_clip)), {"": all_scores(random)})
    chance |= {f"{k}_centred": v for k, v in chance.items()}
    return result(
        "grounding",
        score,
        len(of_clip),
        chance,
        args,
        n_captions=len(queries),
        prompt="the phrase as written",
        frame_s=model.frame_s,
        median=f"{width} frames, {width * model.frame_s:.2f} s",
        gap=f"{gap} frames",
        psds="dtc 0.5, gtc 0.5, at most 800 false positives an hour",
        left_out=f"{total - len(queries)} phrases without a segment",
    )


CONNECTIVES = (
    "followed by",
    "and then",
    "then",
    "before",
    "after",
    "first",
    "while",
    ",",
)  # the first that occurs counts


def t_classify(model, clips, classes, args) -> dict:
    """T-Classify: is the right order of events preferred to the wrong one?

    t2a (T-CLAP's name): the share of captions with a `negative`, the same events in another order,
    for which the clip's cosine to the caption is strictly larger than to the negative. a2t: the share
    of captions of clips with a `swapped_audio`, the same sounds in another order, that lie strictly
    closer to the clip than to the swapped audio. A tie is a miss; ties are counted. Micro-average
    over all pairs; details hold each manifest and each connective alone, so that shortcuts ("first",
    commas) show, and every pair's margin. Source: T-CLAP Table 2 (AudioCaps, Clotho and ESC-mixed-up test; a2t ESC-mixed-up).
    """
    pairs = [
        (i, caption, negative)
        for i, row in enumerate(clips["rows"])
        for caption, negative in zip(row.get("captions", []), row.get("negatives", []))
        if negative
    ]
    if not pairs:
        raise ValueError("t_classify: no caption of the manifest has a negative")
    swapped, n = (
        clips["swapped"],
        len(clips["rows"]),
    )  # swapped: clip -> (embed, frames) of its reordered audio
    texts = sorted({model.clean_caption(t) for _, *two in pairs for t in two})
    column = {t: k for k, t in enumerate(texts)}
    sim = common.similarities(model, clips["audio_embeds"], clips["frame_embeds"], texts)
    right = np.array([sim[i, column[model.clean_caption(c)]] for i, c, _ in pairs])
    wrong = np.array([sim[i, column[model.clean_caption(w)]] for i, _, w in pairs])
    of_pair = {"t2a": (np.array([i for i, _, _ in pairs]), right - wrong)}
    if swapped:
        where = {i: k for k, i in enumerate(swapped)}
        back = common.similarities(
            model,
            np.stack([e for e, _ in swapped.values()]),
            [f for _, f in swapped.values()],
            texts,
        )
        chosen = [k for k, (i, _, _) in enumerate(pairs) if i in where]
        other = np.array(
            [back[where[pairs[k][0]], column[model.clean_caption(pairs[k][1])]] for k in chosen]
        )
        of_pair["a2t"] = of_pair["t2a"][0][chosen], right[chosen] - other

    def score(chosen):
        times = np.bincount(chosen, minlength=n)
        out = {}
        for way, (owner, margin) in of_pair.items():
            weight = times[owner]
            out[way] = (
                float(((margin > 0) * weight).sum() / weight.sum())
                if weight.sum()
                else float("nan")
            )
        return out

    groups = {}
    for way, (owner, margin) in of_pair.items():
        captions = [c for i, c, _ in pairs if way == "t2a" or i in swapped]
        for i, caption, m in zip(owner, captions, margin):
            connective = next(
                (
                    c
                    for c in CONNECTIVES
                    if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", caption.lower())
                ),
                "other",
            )
            for name in (
                f"set {clips['rows'][i]['where'].rpartition(':')[0]}",
                f"connective {connective!r}",
            ):
                groups.setdefault(way, {}).setdefault(name, []).append(m > 0)
    details = {
        way: {
            name: {"value": float(np.mean(hits)), "pairs": len(hits)} for name, hits in of.items()
        }
        for way, of in groups.items()
    }
    details["margins"] = {way: margin.tolist() for way, (_, margin) in of_pair.items()}
    ties = {way: int((margin == 0).sum()) for way, (_, margin) in of_pair.items()}
    return result(
        "t_classify",
        score,
        n,
        {"t2a": 0.5, "a2t": 0.5},
        args,
        n_captions=len(pairs),
        details=details,
        prompt="captions as written, cleaned by the method",
        tie_rule=f"a tie is a miss; ties: {ties}",
        pairs=f"{len(pairs)} captions with a negative, {len(of_pair['a2t'][1]) if swapped else 0} with swapped audio",
        by_connective={
            way: {
                k.partition(" ")[2]: f"{v['value']:.3f} of {v['pairs']}"
                for k, v in of.items()
                if k.startswith("conn")
            }
            for way, of in details.items()
            if way in of_pair
        },
    )


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
    """A probe on frozen embeddings whose best epoch is chosen on `val` -> function from inputs to logits.

    train, val: inputs (N, ..., D), and targets: class numbers (N,) or (N, W) for the cross entropy of a softmax (-1: no class,
    never right, nothing to learn), or 0 and 1 (N, n_classes) float32 for that of one sigmoid a class. AdamW, which without
    weight_decay is Adam; a function of the seed alone.
    Args
        standardise: bring every input to mean 0 and deviation 1 over the training rows.
        layers: linear ones of an MLP; each but the last is followed by batch norm if wanted, ReLU and dropout.
        network: D, n_classes -> the network to train in place of that MLP; layers, width, dropout and batch_norm are then its own.
        patience: epochs without a better one after which training ends.
        score_of: validation logits (N, n_classes) -> what the best epoch has most of (of tuples the first entry decides, then
            the next); default: accuracy. Of equal epochs the first counts, without validation rows the last.
    """
    torch.manual_seed(seed)
    (inputs, targets), (val_inputs, val_targets) = (
        (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in (train, val)
    )
    vectors = inputs.flatten(0, -2)  # (N, D), of tokens (N L, D)
    mean, deviation = (vectors.mean(0), vectors.std(0).clamp(min=1e-6)) if standardise else (0, 1)
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
    """Cross entropy of one sigmoid a class (N, C) for float targets, else of a softmax, -1 left out; for numpy arrays a float."""
    if isinstance(logits, np.ndarray):
        return float(probe_loss(torch.from_numpy(logits), torch.from_numpy(targets)))
    if targets.is_floating_point():
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-1
    )


def embed_splits(model, clips, args, key: str, what: str, tokens: bool = False) -> dict:
    """What a trained probe needs of the scored split and of train and val where they have `key`.

    Returns: split -> rows (one a file), audio_embeds (N, D), with `tokens` prompt embeddings (N, L, D') else None.
    """
    trainable = {
        split: [row for row in args.all_rows if row.get("split") == split and row.get(key)]
        for split in ("train", "val")
    }
    if args.split in ("train", "all rows") or not trainable["train"]:
        raise ValueError(
            f"{what}: it needs rows of split train with '{key}', and another split to score (--split)"
        )
    return {
        args.split: scored_split(model, clips, args, tokens),
        **{
            split: embed_rows(model, merge_rows(rows), args, split, tokens)
            for split, rows in trainable.items()
            if rows and split != args.split
        },
    }


def scored_split(model, clips, args, tokens: bool):
    """What `embed_rows` gives, of the clips to score, whose own embeddings are there already."""
    return (
        embed_rows(model, clips["rows"], args, args.split, True)
        if tokens
        else (clips["rows"], clips["audio_embeds"], None)
    )


def embed_rows(model, rows: list[dict], args, name: str, tokens: bool):
    """-> rows that could be read, audio_embeds (N, D), prompt embeddings (N, L, D) or None."""
    kept, embeds, held, bad = common.embed_files(
        model,
        rows,
        args.batch_size,
        args.workers,
        args.crop,
        frames=tokens and "token_embeds",
        cache=checkpoint_cache(args, args.checkpoint),
        desc=f"embedding {name}",
    )
    report_left_out(bad, len(rows), args)
    return [rows[i] for i in kept], embeds, np.stack(held) if tokens else None


def aqa(model, clips, classes, args) -> dict:
    """Audio question answering with a probe on frozen embeddings.

    Clip and question embedding side by side go into a 4-layer MLP (train_probe), trained on the rows of split train,
    chosen on val, scored on the evaluated split; one probe for yes/no questions, one for the others, whose classes are the
    answers of the training rows. Word R@k: the answer among the k best; an answer never seen in training is
    a miss. Of questions with a type, those that need a picture are left out. Source: Cacophony Table 5 (Clotho-AQA, MUSIC-AVQA;
    its layer widths and learning rate are not stated).
    """
    splits = embed_splits(model, clips, args, "qa", "aqa trains a probe")
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
        if not of["train"] or not of[args.split]:
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

        logits_of = train_probe(data("train"), data("val"), len(answers), f"aqa, {kind} probe")
        inputs, targets = data(args.split)
        logits = logits_of(inputs)
        right = np.take_along_axis(logits, np.maximum(targets, 0)[:, None], 1)
        rank = np.where(
            targets >= 0, (logits >= right).sum(1) - 1, max(10, len(answers))
        )  # never seen: never among the best
        owner = np.array([i for i, _, _ in of[args.split]])
        for name, k in {
            "binary": {"binary_accuracy": 1},
            "word": {"word_R@1": 1, "word_R@5": 5, "word_R@10": 10},
        }[kind].items():
            scored[name], chance[name] = (owner, rank < k), min(1.0, k / len(answers))
        details[kind] = [
            {
                "clip": clips["rows"][i]["audio"],
                "question": q,
                "answer": a,
                "rank": int(r) + 1 if a in number else None,
            }
            for (i, q, a), r in zip(of[args.split], rank)
        ]
        told.append(
            f"{len(of['train'])} {kind} questions for training, {len(of.get('val', []))} for the choice of the epoch, "
            f"{len(rank)} scored, {len(answers)} answers, {int((targets < 0).sum())} never seen in training"
        )
    if not scored:
        raise ValueError(
            "aqa: no kind of question (yes/no, or other) is both in split train and in the scored split"
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
        args,
        details=details,
        questions="; ".join(told),
        tie_rule="a tie is a miss",
        probe="MLP of 4 layers, width 512, AdamW 1e-4, 60 epochs, seed 0",
    )


class TokenProbe(torch.nn.Module):
    """One transformer decoder layer whose one learned query reads a clip's tokens (B, L, D), then a linear layer -> (B, C).

    Source: CoLLAT, linear probing ("a 1-layer transformer decoder").
    """

    def __init__(self, width: int, n_classes: int):
        super().__init__()
        self.query = torch.nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layer = decoder_layer(width)
        self.classify = torch.nn.Linear(width, n_classes)

    def forward(self, tokens):
        return self.classify(self.layer(self.query.expand(len(tokens), -1, -1), tokens)[:, 0])


def decoder_layer(width: int) -> torch.nn.TransformerDecoderLayer:
    """torch's own, heads of at least 64 dimensions."""
    heads = max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0)
    return torch.nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True)


PROBES = {  # name -> what it reads, train_probe's settings; ours: the paper names none
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
    """-> kind ("multiclass" where no row has two labels, else "multilabel"), targets as the probes take them, rows that count.

    Without a label in the class list a row counts only beside rows of several labels, as no class's example.
    """
    targets = common.label_targets(rows, classes)
    if (targets.sum(1) > 1).any():
        return "multilabel", targets.astype(np.float32), np.arange(len(rows))
    return "multiclass", targets.argmax(1), np.flatnonzero(targets.any(1))


def probe(model, clips, classes, args) -> dict:
    """Labels from frozen features, by classifiers trained on split train, chosen on val, scored on the evaluated split.

    linear: one linear layer on the clip embedding. decoder, for models with token_embeds: a transformer decoder layer with one
    learned query over the token embeddings of the first window (TokenProbe). Accuracy where no clip has two labels, else macro
    mAP, as classification and tagging count them; of epochs equal on val the one with the smallest loss there. Inputs are
    standardised over the training clips. Rows with folds and no split train: each fold is tested once, the next one chooses
    the epoch, the others train; mean over folds. chance:
    `hear_chance`. Source: CoLLAT, linear probing (ESC-50, UrbanSound8K, TUT, FSD50K, AudioSet); its settings are not stated.
    """
    tokens = hasattr(model, "token_embeds")
    folds = sorted({str(row["fold"]) for row in clips["rows"] if "fold" in row})
    if folds and not any(row.get("split") == "train" for row in args.all_rows):
        if len(folds) < 3:
            raise ValueError(
                f"probe: rows of {len(folds)} fold(s) and none of split train; it needs three folds, or split train"
            )
        turns, splits = fold_turns(folds), {"all": scored_split(model, clips, args, tokens)}
        fold_of = np.array([str(row.get("fold")) for row in splits["all"][0]])
    else:
        splits = embed_splits(model, clips, args, "labels", "probe trains a classifier", tokens)
        turns = [(["train"], "val" if args.split != "val" else None, args.split)]
        fold_of = np.array(
            [split for split, (rows, *_) in splits.items() for _ in rows]
        )  # the splits are the folds of one turn
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
    task, metric, evidence, chance, of_fold = (
        {"kind": kind, "classes": classes},
        METRIC_OF[kind],
        {},
        {},
        [],
    )
    for k, (train_names, val_name, test_name) in enumerate(turns):
        train, test = join_inputs([parts[name] for name in train_names]), parts[test_name]
        val = parts[val_name] if val_name else {key: x[:0] for key, x in test.items()}
        of_fold += [k] * len(test["rows"])
        for name, (key, settings) in PROBES.items():
            if key in inputs:
                logits_of = train_probe(
                    (train[key], train["targets"]),
                    (val[key], val["targets"]),
                    len(classes),
                    f"{name} probe, {test_name}",
                    score_of=lambda logits: (
                        hear_score(kind, hear_evidence(task, logits, val, None, 0)),
                        -probe_loss(logits, val["targets"]),
                    ),
                    device=next(model.parameters()).device,
                    **settings,
                )
                evidence.setdefault(name, []).append(
                    hear_evidence(task, logits_of(test[key]), test, None, 0)
                )
                chance.setdefault(f"{name}_{metric}", []).append(
                    hear_chance(task, train, test, None, None, 0)
                )
    evidence, of_fold = (
        {name: np.concatenate(of) for name, of in evidence.items()},
        np.array(of_fold),
    )

    def score(chosen):
        turns_of = [chosen[of_fold[chosen] == k] for k in np.unique(of_fold[chosen])]
        return {
            f"{name}_{metric}": float(np.mean([hear_score(kind, of[at]) for at in turns_of]))
            for name, of in evidence.items()
        }

    details = {
        f"{name}_folds": {
            turn[2]: hear_score(kind, of[of_fold == k]) for k, turn in enumerate(turns)
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
        args,
        n_classes=len(classes),
        details=details,
        clips=", ".join(f"{name} {len(part['rows'])}" for name, part in parts.items()),
        turns=f"{len(turns)} folds, each tested once, the next chooses the epoch; mean over folds"
        if folds == sorted(parts)
        else "trained on split train, the epoch "
        + (
            "chosen on val" if turns[0][1] and parts["val"]["rows"] else "is the last: no split val"
        ),
        left_out=f"{len(rows) - sum(len(part['rows']) for part in parts.values())} clips without a label of the class list",
        **{name: f"{read[name]}, {told_settings(PROBES[name][1])}" for name in evidence},
        tie_rule="a tie is a miss" if kind == "multiclass" else "equal scores are one threshold",
    )


def told_settings(settings: dict) -> str:
    """Of train_probe, for print."""
    return f"AdamW {settings['lr']:g}, batch {settings['batch_size']}, at most {settings['epochs']} epochs, seed 0"


class NoisyModel:
    """A model that hears every clip with Gaussian noise added, behind which it is as it was.

    The noise is drawn by a generator seeded by the clip's own samples, so neither batches nor the order of files change it, and
    it has the same shape at every level. Args: std: its standard deviation, or snr_db: 10 log10 of the clip's power to its.
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


def noise(model, clips, classes, args) -> dict:
    """Zero-shot accuracy (macro mAP where a clip has several labels) of clips with Gaussian noise added to their samples.

    clean: without; std0.1: mean 0, standard deviation 0.1, of samples in [-1, 1] (the paper's); snr20 to snr0: the noise scaled to
    lie so many dB below each clip's own power. Added at the model's rate before any padding, not clipped, one draw a clip
    (NoisyModel). Ties as in classification and tagging. Source: CoLLAT Table 3a (ESC-50 and FSD50K, std 0.1).
    """
    kind, targets, counted = label_task(clips["rows"], classes)
    task, part, evidence = {"kind": kind, "classes": classes}, {"targets": targets[counted]}, {}
    for name, added in NOISE.items():
        embeds, frame_embeds, cache = (
            clips["audio_embeds"],
            clips["frame_embeds"],
            checkpoint_cache(args, args.checkpoint),
        )
        if added:
            _, embeds, frame_embeds, bad = common.embed_files(
                NoisyModel(model, **added),
                clips["rows"],
                args.batch_size,
                args.workers,
                args.crop,
                getattr(model, "pairwise", False),
                desc=f"embedding, noise {name}",
                cache=cache and cache / f"noise_{name}",
            )
            if bad:
                raise ValueError(
                    f"noise: a file that could be read before cannot any more: {bad[0]}"
                )
        sim = common.similarities(model, embeds, frame_embeds, class_prompts(classes, args))[
            counted
        ]
        evidence[name] = hear_evidence(task, sim, part, None, 0)
    metric, level = (
        METRIC_OF[kind],
        1 / len(classes) if kind == "multiclass" else float(targets.mean(0)[targets.any(0)].mean()),
    )

    def score(chosen):
        return {f"{metric}_{name}": hear_score(kind, of[chosen]) for name, of in evidence.items()}

    return result(
        "noise",
        score,
        len(counted),
        dict.fromkeys((f"{metric}_{name}" for name in NOISE), level),
        args,
        prompt=args.prompt,
        n_classes=len(classes) if kind == "multiclass" else int(targets.any(0).sum()),
        noise="Gaussian, added to the samples at the model's rate before padding, seeded by the clip",
        left_out=f"{len(clips['rows']) - len(counted)} clips without a label of the class list",
        tie_rule="a tie is a miss" if kind == "multiclass" else "equal scores are one threshold",
    )


def pillow():
    """pillow's Image, or one sentence on how to get it."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "image needs pillow to read pictures; install it with: pip install pillow"
        ) from None
    return Image


def load_image_model(name: str, dim: int):
    """CLIP's image tower and its preprocessing from a folder or hub id, for audio embeddings of `dim` dimensions."""
    pillow()  # the preprocessing needs it as well
    transformers = common.quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if (
            config.model_type == "clip"
        ):  # the width of the common space stands outside the image tower's own settings
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
            f"--image-model {name}: not a transformers CLIP folder or reachable hub id ({str(error).strip().splitlines()[0]})"
        ) from None
    if info["missing_keys"]:
        raise ValueError(
            f"--image-model {name}: holds no complete CLIP image tower, {len(info['missing_keys'])} weights such as "
            f"{min(info['missing_keys'])} are missing"
        )
    if encoder.config.projection_dim != dim:
        raise ValueError(
            f"--image-model {name}: its space has {encoder.config.projection_dim} dimensions, the model's audio embeddings {dim}; "
            "give the CLIP whose text encoder the model was trained with"
        )
    return encoder.eval(), processor


@torch.no_grad()
def embed_images(encoder, processor, rows: list[dict], batch_size: int):
    """-> indices of rows whose image could be read, their embeddings (N, D) of length 1, error texts of the others."""
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
        raise ValueError(f"image: none of {len(rows)} images could be read; first: {bad[0]}")
    return kept, np.concatenate(embeds), bad


def image(model, clips, classes, args) -> dict:
    """Retrieval between clips and pictures, for models whose audio lies in CLIP's space: MRR and R@1, 5, 10 both ways.

    One picture a clip (`image`), encoded by --image-model; a2i: the clip's own picture among all, i2a: the picture's clip. Clips
    without a picture are left out. Ties count against the right answer. Source: Wav2CLIP's protocol on VGGSound's test split
    (15K clips), CoLLAT's audio-image retrieval.
    """
    if not args.image_model:
        raise ValueError(
            "image needs --image-model, a transformers CLIP folder or hub id in whose space the audio embeddings lie"
        )
    index = [i for i, row in enumerate(clips["rows"]) if row.get("image")]
    encoder, processor = load_image_model(args.image_model, clips["audio_embeds"].shape[1])
    kept, image_embeds, bad = embed_images(
        encoder.to(next(model.parameters()).device),
        processor,
        [clips["rows"][i] for i in index],
        args.batch_size,
    )
    report_left_out(bad, len(index), args)
    rows, audio_embeds = (
        [clips["rows"][index[k]] for k in kept],
        clips["audio_embeds"][[index[k] for k in kept]],
    )
    n = len(rows)
    ranks = common.retrieval_ranks(
        lambda part: audio_embeds[part] @ image_embeds.T, np.arange(n), n
    )  # the pictures in the place of captions

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
        args,
        details=details,
        image_model=args.image_model,
        left_out=f"{len(clips['rows']) - len(index)} clips without a picture, {len(bad)} whose picture could not be read",
        tie_rule="a tie counts against the right answer",
    )


def captioning(model, clips, classes, args) -> dict:
    """What the model says about each clip, against all the captions of the clip.

    BLEU-1 to 4, ROUGE-L and CIDEr-D as the COCO caption toolkit defines them (`bleu`, `rouge_l`, `cider_d`). Words are those of
    `caption_words`; the toolkit's own tokenizer needs Java, and so do METEOR and SPICE, which are not run. chance: always
    saying the most frequent reference (of equally frequent ones the first in the alphabet). Above temperature 0 each clip
    is captioned alone, seeded by its file's name, so that neither batches nor the order of files change a word. CIDEr-D's
    document frequencies are those of all clips, in every bootstrap draw. A model with token_embeds but no caption method gets
    a decoder, trained on the captions of split train (`decoded_captions`). Source: Cacophony, automatic captioning (AudioCaps,
    Clotho; its temperature is 0.1); CoLLAT's captioning (AudioCaps, a trained 1-layer decoder).
    """
    common.require(clips["rows"], "captions")
    rows, trained = clips["rows"], {}
    if hasattr(model, "caption"):
        said = caption_files(model, rows, args)
    else:
        rows, said, trained = decoded_captions(model, clips, args)
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
        args,
        n_captions=sum(map(len, references)),
        details=details,
        crop="first window only"
        if args.crop == "first" or trained
        else "whole files, longer ones as the model does it",
        **trained,
        temperature=f"{args.temperature:g}" + (" (greedy)" if args.temperature == 0 else ""),
        words="lower case, punctuation removed but for hyphens and apostrophes inside a word",
        not_run="METEOR, SPICE and what is made of them: they need Java",
        chance_is=f"always saying {commonest!r}, the most frequent of the references ({times[commonest]} times)",
    )


def gap(model, clips, classes, args) -> dict:
    """Modality gap: the distance between the mean audio embedding and the mean text embedding, all of length 1.

    Every caption and its clip are one pair; the means are over pairs. 0: both modalities lie around the same point; 2 at
    most. No score to maximise: what it says depends on the model's temperature and dimensions. chance: the same vectors
    with their modality drawn at random, mean over 20 draws. Source: Liang et al., NeurIPS 2022; Cacophony's gap on its
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
        args,
        n_captions=len(owner),
        prompt="captions as written, cleaned by the method",
        chance_is="modality drawn at random, mean of 20 draws",
    )


PROTOCOLS = {
    "retrieval": (retrieval, "captions"),
    "classification": (classification, "labels"),
    "tagging": (tagging, "labels"),
    "frames": (frames, "events"),
    "sed": (sed, "events"),
    "grounding": (grounding, "phrases"),
    "t_classify": (t_classify, "negatives"),
    "aqa": (aqa, "qa"),
    "captioning": (captioning, "captions"),
    "gap": (gap, "captions"),
    "image": (image, "image"),
    "probe": (probe, "labels"),
    "noise": (noise, "labels"),
}
BY_NAME = {"probe", "noise"}  # not in `all`: they train, or embed the audio six times more
FRAME_PROTOCOLS = {"frames", "sed", "grounding"}


# ------------------------------------------------------------------------------------------------
# Sound event detection
# ------------------------------------------------------------------------------------------------


def with_duration(row: dict, frame_embeds, frame_s: float) -> dict:
    return {**row, "duration": row.get("duration") or len(frame_embeds) * frame_s}


def median_frames(seconds: float, frame_s: float) -> int:
    """The odd number of frames nearest to `seconds`, at least 1."""
    return 2 * max(0, round((seconds / frame_s - 1) / 2)) + 1


def median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """x (T, ...), median over `width` (odd) frames; the first and last frame are repeated beyond the ends."""
    padded = np.concatenate([np.repeat(x[:1], width // 2, 0), x, np.repeat(x[-1:], width // 2, 0)])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=0), axis=-1)


def runs(active: np.ndarray):
    """active (T,) of 0 and 1, or bool -> where each run of ones starts and stops (exclusive)."""
    change = np.diff(np.concatenate([[0], active.astype(int), [0]]))
    return np.flatnonzero(change > 0), np.flatnonzero(change < 0)


def largest_matching(pairs: list[tuple]) -> int:
    """Size of the largest set of (detection, event) pairs in which nothing occurs twice."""
    events, owner = {}, {}
    for detection, event in pairs:
        events.setdefault(detection, []).append(event)

    def place(detection, seen):
        for event in events[detection]:
            if event not in seen:
                seen.add(event)
                if event not in owner or place(owner[event], seen):
                    owner[event] = detection
                    return True
        return False

    return sum(place(detection, set()) for detection in events)


def best_f1(thresholds, found, detected, n_events: int) -> float:
    """Largest F1 over all thresholds, from changes of true positives and of detections at each."""
    order = np.argsort(-thresholds, kind="stable")
    order = order[thresholds[order] > -np.inf]
    if not len(order):
        return 0.0
    last = np.append(np.diff(thresholds[order]) != 0, True)
    return float(
        (2 * np.cumsum(found[order])[last] / (np.cumsum(detected[order])[last] + n_events)).max()
    )


def collar_f1(
    scores, rows, classes, frame_s, onset_s=0.2, offset_s=0.2, offset_share=0.2
) -> np.ndarray:
    """Event-based F1 of each class (C,) at its best threshold. Source: Mesaros et al., Applied Sciences 2016.

    Args: scores: list of (T_i, C); rows: with `events`, `duration`. NaN for a class without an event.
    """
    lengths = np.array([len(s) + 1 for s in scores])
    begin = np.concatenate([[0], np.cumsum(lengths)])
    edges = np.concatenate(
        [common.frame_edges(len(s), frame_s, row["duration"]) for s, row in zip(scores, rows)]
    )
    best = []
    for c, name in enumerate(classes):
        flat = np.full(len(edges), -np.inf)
        for i, s in enumerate(scores):
            flat[begin[i] : begin[i] + len(s)] = s[:, c]
        start, stop, top, floor = common.detections(flat)
        thresholds, found, detected = (
            [top, floor],
            [np.zeros(2 * len(top))],
            [np.ones(len(top)), -np.ones(len(top))],
        )
        n_events = 0
        for i, row in enumerate(rows):
            events = [(e["onset"], e["offset"]) for e in row["events"] if e["label"] == name]
            n_events += len(events)
            run = np.arange(*np.searchsorted(start, begin[[i, i + 1]])) if events else []
            hits = []  # (detection, event)
            for g, (on, off) in enumerate(events):
                near = np.round(np.abs(edges[start[run]] - on) - onset_s, 6) <= 0
                near &= (
                    np.round(
                        np.abs(edges[stop[run]] - off) - max(offset_s, offset_share * (off - on)), 6
                    )
                    <= 0
                )
                hits += [(k, g) for k in run[near]]
            before = 0
            for level in sorted({t for k, _ in hits for t in (top[k], floor[k])}, reverse=True):
                now = largest_matching([(k, g) for k, g in hits if floor[k] < level <= top[k]])
                thresholds.append(np.array([level]))
                found.append(np.array([now - before]))
                detected.append(np.zeros(1))
                before = now
        best.append(
            best_f1(*(np.concatenate(x) for x in (thresholds, found, detected)), n_events)
            if n_events
            else np.nan
        )
    return np.array(best)


def segment_f1(scores, rows, classes, frame_s, segment_s=1.0) -> np.ndarray:
    """Segment-based F1 of each class (C,) at its best threshold. Source: Mesaros et al., Applied Sciences 2016.

    A segment's score is its best frame's, also of frames that only reach into it; it is positive if
    any part of an event lies in it. NaN for a class without an event.
    """
    values, targets = [], []
    for s, row in zip(scores, rows):
        edges = common.frame_edges(len(s), frame_s, row["duration"])
        bounds = np.round(
            np.append(np.arange(math.ceil(round(edges[-1] / segment_s, 6))) * segment_s, edges[-1]),
            6,
        )
        inside = (edges[:-1] < bounds[1:, None] - 1e-6) & (
            edges[1:] > bounds[:-1, None] + 1e-6
        )  # (segments, T)
        values.append(np.where(inside[:, :, None], s, -np.inf).max(1))
        target = np.zeros(values[-1].shape, bool)
        for e in row["events"]:
            if e["label"] in classes:
                target[
                    (bounds[:-1] < e["offset"]) & (bounds[1:] > e["onset"]),
                    classes.index(e["label"]),
                ] = True
        targets.append(target)
    values, targets = np.concatenate(values), np.concatenate(targets)
    return np.array(
        [
            best_f1(
                values[:, c],
                targets[:, c].astype(float),
                np.ones(len(values)),
                int(targets[:, c].sum()),
            )
            if targets[:, c].any()
            else np.nan
            for c in range(len(classes))
        ]
    )


def grounding_points(values, rows, frame_s, width: int, gap: int) -> np.ndarray:
    """(Q, 50, 2): found events and false detections of each query at each of PSDSm's thresholds."""
    thresholds, points = np.arange(0.01, 1, 0.02), np.zeros((len(values), 50, 2))
    for k, (v, row) in enumerate(zip(values, rows)):
        edges = common.frame_edges(len(v), frame_s, row["duration"])
        onset, offset = (np.array([e[key] for e in row["events"]]) for key in ("onset", "offset"))
        active = (1 / (1 + np.exp(-v)))[:, None] > thresholds  # (T, 50)
        active = median_filter(active.astype(np.int8), width) > 0.5
        for level in np.flatnonzero(active.any(0)):
            start, stop = runs(active[:, level])
            apart = start[1:] - stop[:-1] > gap
            start, stop = start[np.append(True, apart)], stop[np.append(apart, True)]
            overlap = np.minimum(edges[stop][:, None], offset) - np.maximum(
                edges[start][:, None], onset
            )
            overlap = np.maximum(overlap, 0)  # (detections, events)
            right = np.round(overlap.sum(1), 6) >= np.round(0.5 * (edges[stop] - edges[start]), 6)
            found = np.round(overlap[right].sum(0), 6) >= np.round(0.5 * (offset - onset), 6)
            points[k, level] = found.sum(), (~right).sum()
    return points


# ------------------------------------------------------------------------------------------------
# Captions: lists of words against several references, one row a clip
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def caption_files(model, rows: list[dict], args) -> list[str]:
    """One caption a row."""
    said = [""] * len(rows)
    loader = common.file_batches(
        model, rows, args.batch_size if args.temperature == 0 else 1, args.workers, args.crop
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
            temperature=args.temperature,
            seed=seed,
        )
        for i, text in zip(indices, texts):
            said[i] = text
    return said


class CaptionDecoder(torch.nn.Module):
    """One transformer decoder layer that writes a caption token by token over a clip's prompt embeddings.

    clips (N, L, D): of all clips, no part of the weights. Inputs (B, 1 + W): a clip's number, then the caption so far.
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
        later = torch.ones(W, W, dtype=torch.bool, device=inputs.device).triu(
            1
        )  # True: not to be seen
        return self.classify(
            self.layer(self.embed(tokens) + self.position[:W], self.clips[numbers], tgt_mask=later)
        )  # (B, W, vocabulary)


CAPTION_DECODER = dict(
    lr=5e-4, weight_decay=0.01, batch_size=64, epochs=30, patience=5
)  # ours: the paper names none
MOST_TOKENS = 77


def decoded_captions(model, clips, args):
    """Captions by a CaptionDecoder trained on split train over the frozen model -> rows, captions, what to print about it.

    Tokens are those of the model's own tokenizer that occur in the training captions, plus one for begin and end; longer
    captions are cut at 76. The epoch is the likeliest for the first caption of up to 500 clips of val. Greedy.
    """
    if args.temperature:
        raise ValueError("captioning: a decoder trained here is greedy; leave out --temperature")
    splits = embed_splits(
        model,
        clips,
        args,
        "captions",
        "captioning trains a decoder for this model, which has no caption method",
        True,
    )
    tokenizer = model.text_encoder.tokenizer

    def ids_of(text):
        return tokenizer(model.clean_caption(text), add_special_tokens=False)["input_ids"][
            : MOST_TOKENS - 1
        ]

    captions = {
        split: [
            (i, ids_of(text)) for i, row in enumerate(splits[split][0]) for text in row["captions"]
        ]
        for split in splits
        if split == "train"
    }
    if "val" in splits and args.split != "val":
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
    tokens = torch.from_numpy((tokens - spread.mean(0)) / np.maximum(spread.std(0), 1e-6)).float()

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
    rows, said = splits[args.split][0], []
    for start in tqdm(range(0, len(rows), 64), desc="captioning", unit="batch", leave=False):
        numbers = first[args.split] + np.arange(start, min(start + 64, len(rows)))
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
            "decoder": f"one transformer decoder layer over the frozen model's prompt embeddings, trained here on {len(captions['train'])} captions of "
            f"{len(splits['train'][0])} clips of split train, {len(vocabulary) + 1} tokens, {told_settings(CAPTION_DECODER)}",
            "epoch": f"the best on {len(val[0])} clips of val"
            if len(val[0])
            else "the last: no split val",
        },
    )


def caption_words(text: str) -> list[str]:
    """Lower case; what is no letter or digit separates words, but for a hyphen or an apostrophe inside one."""
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())


def ngrams(words: list[str]) -> collections.Counter:
    """How often each run of one to four words occurs."""
    return collections.Counter(
        tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)
    )


def caption_evidence(said: list, references: list) -> np.ndarray:
    """All that the scores need of each clip, (N, 12): ten BLEU counts, ROUGE-L, CIDEr-D."""
    return np.column_stack(
        [bleu_counts(said, references), rouge_l(said, references), cider_d(said, references)]
    )


def bleu_counts(said: list, references: list) -> np.ndarray:
    """(N, 10): n-grams that are also in a reference (n = 1 ... 4; each as often as in one reference at most), n-grams
    said (n = 1 ... 4), words said, and words of the reference closest to that length (of two the shorter)."""
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
    """BLEU-1 to 4 (4,) of a set of clips from its `bleu_counts`: counts are summed first, then divided.

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
    """ROUGE-L of each clip (N,): F-measure of the best precision and the best recall over its references.

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
    """CIDEr-D of each clip (N,), at most 10: cosine of tf-idf n-gram vectors, n = 1 ... 4, mean over n and references.

    An n-gram's idf comes from the number of clips with it in a reference. What is said more often than in the
    reference counts no more than there, and a difference in length is punished (sigma, in words).
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
# HEAR (hearbenchmark.com): its common interface, with load_model, and a probe for its task folders
# ------------------------------------------------------------------------------------------------


def get_scene_embeddings(audio, model):
    """HEAR's interface: audio (n_sounds, n_samples) in [-1, 1] at model.sample_rate -> (n_sounds, scene_embedding_size)."""
    return model.embed_audio(audio)


def hear_frames(model) -> str:
    """The method whose frames HEAR gets: the encoder's own where a model offers them beside those in the joint space."""
    return "event_feats" if hasattr(model, "event_feats") else "embed_frames"


def get_timestamp_embeddings(audio, model):
    """HEAR's interface: audio as above -> embeddings (n_sounds, n_timestamps, timestamp_embedding_size), timestamps
    (n_sounds, n_timestamps) in milliseconds: the centres of the frames, those behind the audio's end left out.

    True times: Cacophony's evaluation stretches them so that the last is the end of the audio, which moves events.
    """
    n_frames = max(1, math.floor(audio.shape[1] / model.sample_rate / model.frame_s + 0.5 + 1e-6))
    embeds = getattr(model, hear_frames(model))(audio)[:, :n_frames]
    centre_ms = (torch.arange(embeds.shape[1], device=embeds.device) + 0.5) * model.frame_s * 1000
    return embeds, centre_ms.repeat(len(audio), 1)


HEAR_GRID = [
    dict(layers=1 + hidden, lr=lr) for hidden in (1, 2) for lr in (3.2e-3, 1e-3, 3.2e-4, 1e-4)
]
HEAR_PROBE = dict(
    width=1024,
    dropout=0.1,
    batch_norm=True,
    batch_size=1024,
    epochs=500,
    patience=20,
    weight_decay=0.0,
    standardise=False,
)
HEAR_MEDIAN_S, HEAR_MIN_S = 0.25, (0.125, 0.25)


def read_json(path: Path) -> dict:
    """An object of a HEAR task folder."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --task expects a task folder as hear-preprocess writes it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_hear_task(folder: Path, sample_rate: int) -> dict:
    """A folder that hear-preprocess wrote -> {"name", "kind", "classes", "tolerance_s", "splits": {split: rows}}.

    kind: multiclass, multilabel (both: a row has `labels`) or event (`events` in seconds). Audio comes from the folder
    RATE/SPLIT of the model's own rate, else of the highest.
    """
    metadata, path = read_json(folder / "task_metadata.json"), folder / "labelvocabulary.csv"
    kind = "event" if metadata.get("embedding_type") == "event" else metadata.get("prediction_type")
    if kind not in ("multiclass", "multilabel", "event") or (
        kind == "event" and metadata.get("prediction_type") != "multilabel"
    ):
        raise ValueError(
            f"{folder / 'task_metadata.json'}: embedding_type {metadata.get('embedding_type')!r}, prediction_type "
            f"{metadata.get('prediction_type')!r}; expected scene with multiclass or multilabel, or event with multilabel"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; it lists the task's classes (columns idx,label)"
        )
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not all(
        (line.get("idx") or "").isdigit() and line.get("label") is not None for line in lines
    ):
        raise ValueError(
            f"{path}: expected the columns idx,label, with a number and a name on every line"
        )
    classes = [line["label"] for line in sorted(lines, key=lambda line: int(line["idx"]))]
    names = (
        ["train", "valid", "test"]
        if (folder / "train.json").exists()
        else sorted(f.stem for f in folder.glob("fold*.json"))
    )
    if len(names) < 3:
        raise ValueError(
            f"{folder}: expected train.json, valid.json and test.json, or at least three of fold00.json, fold01.json ..."
        )
    rates = sorted(
        (int(f.name) for f in folder.iterdir() if f.is_dir() and f.name.isdigit()),
        key=lambda hz: (hz != sample_rate, -hz),
    )
    if not rates:
        raise ValueError(
            f"{folder}: holds no folder of audio, which is named by its sample rate, as 48000"
        )
    onset_ms = re.findall(
        r"event_onset_(\d+)ms_fms", " ".join(map(str, metadata.get("evaluation") or []))
    )
    return {
        "name": metadata.get("task_name", folder.name),
        "kind": kind,
        "classes": classes,
        "tolerance_s": int(onset_ms[0]) / 1000 if onset_ms else 0.2,
        "splits": {
            name: hear_rows(folder / f"{name}.json", folder / str(rates[0]) / name, kind, classes)
            for name in names
        },
    }


def hear_rows(path: Path, audio: Path, kind: str, classes: list[str]) -> list[dict]:
    """Rows of one split: file name -> labels, or events from `start` to `end` in milliseconds."""
    rows = []
    for name, told in read_json(path).items():
        if (
            not isinstance(told, list)
            or kind == "event"
            and not all(isinstance(e, dict) and {"label", "start", "end"} <= e.keys() for e in told)
        ):
            raise ValueError(
                f"{path}: {name}: expected a list of "
                + ("{label, start, end}" if kind == "event" else "labels")
            )
        labels = [
            str(e["label"] if kind == "event" else e) for e in told
        ]  # spoken_digit has numbers, the vocabulary has text
        unknown = sorted(set(labels) - set(classes))
        if unknown:
            raise ValueError(f"{path}: {name}: label {unknown[0]!r} is not in labelvocabulary.csv")
        if kind == "multiclass" and len(labels) != 1:
            raise ValueError(
                f"{path}: {name} has {len(labels)} labels; a multiclass task has one a file"
            )
        events = (
            [
                {"label": x, "onset": e["start"] / 1000, "offset": e["end"] / 1000}
                for x, e in zip(labels, told)
            ]
            if kind == "event"
            else []
        )
        rows.append({"audio": str(audio / name), "labels": labels, "events": events})
    if not any(row["labels"] for row in rows):
        raise ValueError(f"{path}: not one label in it")
    return rows


def hear_inputs(model, task: dict, split: str, args) -> dict:
    """Embeddings and targets of one split's clips, of a timestamp task's frames: {"rows", "inputs", "targets", "lengths"}."""
    rows, event = task["splits"][split], task["kind"] == "event"
    kept, embeds, frame_embeds, bad = common.embed_files(
        model,
        rows,
        args.batch_size,
        args.workers,
        args.crop,
        frames=event and hear_frames(model),
        cache=checkpoint_cache(args, args.checkpoint),
        desc=f"embedding {split}",
    )
    report_left_out(bad, len(rows), args)
    rows = [rows[i] for i in kept]
    if event:
        targets = np.concatenate(
            [
                common.frame_targets(row, task["classes"], len(f), model.frame_s)
                for row, f in zip(rows, frame_embeds)
            ]
        )
        return {
            "rows": rows,
            "inputs": np.concatenate(frame_embeds),
            "targets": targets.astype(np.float32),
            "lengths": [len(f) for f in frame_embeds],
        }
    targets = common.label_targets(rows, task["classes"])
    targets = targets.argmax(1) if task["kind"] == "multiclass" else targets.astype(np.float32)
    return {"rows": rows, "inputs": embeds, "targets": targets, "lengths": [1] * len(rows)}


def join_inputs(parts: list[dict]) -> dict:
    """Several splits as one."""
    return {
        key: np.concatenate([part[key] for part in parts])
        if isinstance(value, np.ndarray)
        else [x for part in parts for x in part[key]]
        for key, value in parts[0].items()
    }


def fold_turns(folds: list[str]) -> list[tuple]:
    """(folds for training, for validation, for the test): each is tested once, the next one is for validation."""
    return [
        ([f for f in folds if f not in (test, valid)], valid, test)
        for test, valid in zip(folds, folds[1:] + folds[:1])
    ]


def onset_counts(
    logits,
    row: dict,
    classes: list[str],
    frame_s: float,
    width: int,
    min_s: float,
    tolerance_s: float,
) -> np.ndarray:
    """Events of one file found, detections, and true events, all classes together (3,).

    A frame is active where its probability, median-filtered over `width` frames, is above one half; active frames in a row
    are one detection, from where the first begins to where the last ends, if that lasts `min_s`. A detection is right if its
    onset lies within the tolerance of an event's; of each at most one. logits (T, C).
    """
    active, counts = median_filter(logits, width) > 0, np.zeros(3)
    for c, name in enumerate(classes):
        start, stop = runs(active[:, c])
        start = start[np.round((stop - start) * frame_s - min_s, 6) >= 0] * frame_s
        onset = np.array([e["onset"] for e in row["events"] if e["label"] == name])
        near = np.round(np.abs(start[:, None] - onset) - tolerance_s, 6) <= 0
        counts += largest_matching(list(zip(*np.nonzero(near)))), len(start), len(onset)
    return counts


def hear_evidence(
    task: dict, logits, part: dict, frame_s, min_s: float, shift: int = 0
) -> np.ndarray:
    """What the score needs of each file, one row a file: right or not, logits and targets, or `onset_counts`.

    shift: events are held against the detections of the file so many places on (for the chance level).
    """
    if task["kind"] == "multiclass":
        right = logits[np.arange(len(logits)), part["targets"]]
        return ((logits >= right[:, None]).sum(1) == 1)[:, None]  # a tie is a miss
    if task["kind"] == "multilabel":
        return np.concatenate([logits, part["targets"]], 1)
    files = np.split(logits, np.cumsum(part["lengths"])[:-1])
    files, width = files[shift:] + files[:shift], median_frames(HEAR_MEDIAN_S, frame_s)
    return np.stack(
        [
            onset_counts(x, row, task["classes"], frame_s, width, min_s, task["tolerance_s"])
            for x, row in zip(files, part["rows"])
        ]
    )


METRIC_OF = {"multiclass": "accuracy", "multilabel": "mAP", "event": "onset_F1"}


def hear_score(kind: str, evidence: np.ndarray) -> float:
    """Accuracy, macro mAP over classes that occur, or F1 of onsets, events of all classes counted together."""
    if kind == "multiclass":
        return float(evidence.mean())
    if kind == "multilabel":
        scores, targets = np.split(evidence, 2, axis=1)
        precisions = common.class_average_precisions(scores, targets > 0)
        return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else float("nan")
    found, detections, events = evidence.sum(0)
    return float(2 * found / max(1, detections + events))


def hear_probe(
    task: dict, train: dict, valid: dict, grid: list[dict], frame_s, device, desc: str
) -> dict:
    """The probe of `grid` with the largest score on `valid`: {"score", "point", "min_s", "logits_of"}, the first of equals."""
    best = {"score": -1.0}
    lengths_s = HEAR_MIN_S if task["kind"] == "event" else (0.0,)

    def score_of(logits):
        return max(
            hear_score(task["kind"], hear_evidence(task, logits, valid, frame_s, min_s))
            for min_s in lengths_s
        )

    for k, point in enumerate(grid, 1):
        logits_of = train_probe(
            (train["inputs"], train["targets"]),
            (valid["inputs"], valid["targets"]),
            len(task["classes"]),
            f"{desc}, probe {k} of {len(grid)}",
            score_of=score_of,
            device=device,
            **HEAR_PROBE,
            **point,
        )
        logits = logits_of(valid["inputs"])
        for min_s in lengths_s:
            score = hear_score(task["kind"], hear_evidence(task, logits, valid, frame_s, min_s))
            if score > best["score"]:
                best = {"score": score, "point": point, "min_s": min_s, "logits_of": logits_of}
    return best


def hear_chance(task: dict, train: dict, test: dict, logits, frame_s, min_s: float) -> float:
    """The commonest class of the training rows; the mean share of clips with a class; the next file's detections."""
    if task["kind"] == "multiclass":
        return float((test["targets"] == np.bincount(train["targets"]).argmax()).mean())
    if task["kind"] == "multilabel":
        return float(test["targets"].mean(0)[test["targets"].any(0)].mean())
    return (
        hear_score("event", hear_evidence(task, logits, test, frame_s, min_s, shift=1))
        if len(test["rows"]) > 1
        else 0.0
    )


def hear(model, task: dict, args) -> dict:
    """A HEAR task: an MLP (train_probe) on frozen embeddings of whole clips, for timestamp tasks of single frames.

    Score: accuracy (multiclass), macro mAP (multilabel), F1 of event onsets (event; within 200 ms unless the task's
    metadata names another tolerance). All eight probes of HEAR's grid are trained, each up to 500 epochs until 20 bring no
    better score on split valid; epoch, probe and shortest event are those with the best score there. With folds each is tested
    once, the next one is for validation, the others for training; the grid is searched with the first one tested, as HEAR's
    evaluator does, and the score is the mean over folds. Differences from that evaluator: torch's own first weights,
    validation after every epoch, true frame times, detections that last to the end of their last frame, an odd median filter. chance: `hear_chance`. Source: Turian et al., HEAR 2021; Cacophony's
    evaluation on it.
    """
    kind, folds, told = task["kind"], [], []
    if kind == "event" and not hasattr(model, "embed_frames"):
        raise ValueError(
            f"{task['name']} is a timestamp task: it needs a model with embed_frames, which this one has not"
        )
    frame_s = getattr(model, "frame_s", None)
    splits = {name: hear_inputs(model, task, name, args) for name in task["splits"]}
    names, grid = list(splits), HEAR_GRID
    turns = [(names[:1], "valid", "test")] if "train" in names else fold_turns(names)
    for train_names, valid, test_name in turns:
        train, test = join_inputs([splits[name] for name in train_names]), splits[test_name]
        best = hear_probe(
            task,
            train,
            splits[valid],
            grid,
            frame_s,
            next(model.parameters()).device,
            f"{task['name']} {test_name}",
        )
        grid, logits = [best["point"]], best["logits_of"](test["inputs"])
        evidence = hear_evidence(task, logits, test, frame_s, best["min_s"])
        folds.append(
            {
                "split": test_name,
                "evidence": evidence,
                "rows": test["rows"],
                "valid": best["score"],
                "score": hear_score(kind, evidence),
                "chance": hear_chance(task, train, test, logits, frame_s, best["min_s"]),
                "min_s": best["min_s"],
            }
        )
        told.append(
            f"{test_name}: {best['score']:.3f}"
            + (f", events of at least {best['min_s']:g} s" if kind == "event" else "")
        )
    of_fold = np.concatenate([np.full(len(fold["rows"]), k) for k, fold in enumerate(folds)])
    evidence = np.concatenate([fold["evidence"] for fold in folds])

    def score(chosen):
        of_folds = [
            hear_score(kind, evidence[chosen[of_fold[chosen] == k]])
            for k in np.unique(of_fold[chosen])
        ]
        return {name: float(np.mean(of_folds))}

    name = METRIC_OF[kind]
    settings = (
        {
            "tolerance": f"{task['tolerance_s'] * 1000:g} ms",
            "frame_s": frame_s,
            "median": f"{median_frames(HEAR_MEDIAN_S, frame_s)} frames (250 ms)",
        }
        if kind == "event"
        else {}
    )
    details = {
        "folds": {
            fold["split"]: {
                "value": fold["score"],
                "valid": fold["valid"],
                "files": len(fold["rows"]),
            }
            for fold in folds
        }
    }
    if kind != "multilabel":
        details["clips"] = [
            {
                "clip": row["audio"],
                **dict(
                    zip(
                        ("right",) if kind == "multiclass" else ("found", "detected", "events"),
                        map(int, counts),
                    )
                ),
            }
            for fold in folds
            for row, counts in zip(fold["rows"], fold["evidence"])
        ]
    return result(
        f"hear_{task['name']}",
        score,
        len(evidence),
        {name: float(np.mean([fold["chance"] for fold in folds]))},
        args,
        n_classes=len(task["classes"]),
        details=details,
        task=f"{kind}, {len(folds)} fold(s), mean over folds",
        probe=f"MLP, {grid[0]['layers'] - 1} hidden layer(s) of {HEAR_PROBE['width']}, lr {grid[0]['lr']:g}: the best of {len(HEAR_GRID)}",
        validation="; ".join(told),
        tie_rule="a tie is a miss" if kind == "multiclass" else "equal scores are one threshold",
        **settings,
    )


def hear_command(args) -> list[dict]:
    """`eval.py hear`: one model on one task folder."""
    args.checkpoint, args.data, args.split = args.checkpoint[0], [args.task], "test"
    model = load_model(args.checkpoint, args.text_model).to(common.start_device(args.device))
    args.window_s, args.crop_rule = model.window_s, getattr(model, "crop_rule", None)
    r = hear(model, read_hear_task(Path(args.task), model.sample_rate), args)
    show(r)
    return write_json(args, [[r]])


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def clip_order(clips, class_embeds, classes, frame_s) -> list[int]:
    """Clips with events in some but not all frames, best first: mean over the clip's classes of the
    average precision of that class's cosine over the clip's own frames."""
    quality = {}
    for i, (row, frame_embeds) in enumerate(zip(clips["rows"], clips["frame_embeds"])):
        targets = common.frame_targets(row, classes, len(frame_embeds), frame_s)
        usable = targets.any(0) & ~targets.all(0)
        if usable.any():
            quality[i] = float(
                np.mean(
                    common.class_average_precisions(
                        (frame_embeds @ class_embeds.T)[:, usable], targets[:, usable]
                    )
                )
            )
    return sorted(quality, key=quality.get, reverse=True)


def plot_frames(model, clips, classes, args, folder: Path) -> list[Path]:
    """Cosine of frames to the prompt of each class that sounds, over time, the true events shaded.

    The two best and the two worst clips by `clip_order`: a rule, not a choice by hand. As Fig. 1, 8
    and 9 of MGA-CLAP.
    """
    plt, class_embeds = common.pyplot(), common.embed_texts(model, class_prompts(classes, args))
    order, paths = clip_order(clips, class_embeds, classes, model.frame_s), []
    for label, i in [
        *((f"best{k + 1}", i) for k, i in enumerate(order[:2])),
        *((f"worst{k + 1}", i) for k, i in enumerate(order[:1:-1][:2])),
    ]:
        row, cosines = clips["rows"][i], clips["frame_embeds"][i] @ class_embeds.T
        names = [c for c in classes if any(e["label"] == c for e in row["events"])]
        figure, axes = plt.subplots(
            len(names),
            1,
            figsize=(8, 1.2 + 1.6 * len(names)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        centre = (np.arange(len(cosines)) + 0.5) * model.frame_s
        for axis, name in zip(axes[:, 0], names):
            axis.step(centre, cosines[:, classes.index(name)], where="mid")
            for event in row["events"]:
                if event["label"] == name:
                    axis.axvspan(
                        event["onset"], event["offset"], alpha=0.25, color="tab:green", lw=0
                    )
            axis.set_ylabel("cosine")
            axis.set_title(
                repr(args.prompt.format(name.replace("_", " "))) + ", true event shaded",
                fontsize=9,
                loc="left",
            )
        axes[-1, 0].set_xlabel("time (s)")
        axes[-1, 0].set_xlim(0, row.get("duration") or len(cosines) * model.frame_s)
        figure.suptitle(f"{label}: {Path(row['audio']).name}", fontsize=10)
        paths.append(folder / f"frames_{label}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def principal_plane(vectors: np.ndarray):
    """vectors (N, D) -> their first two principal components (N, 2), the share of the variance each holds (2,)."""
    left, size, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    return left[:, :2] * size[:2], size[:2] ** 2 / (size**2).sum()


def plot_gap(model, clips, folder: Path) -> list[Path]:
    """Clips and the first caption of each in the plane of their joint principal components (numpy's SVD), lines join
    forty pairs at equal distances in the data. Cacophony draws UMAP, which needs a package of its own and keeps no distances."""
    plt, rows = common.pyplot(), clips["rows"]
    texts = common.embed_texts(model, [model.clean_caption(row["captions"][0]) for row in rows])
    points, share = principal_plane(np.concatenate([clips["audio_embeds"], texts]))
    audio, text = points[: len(rows)], points[len(rows) :]
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for k in np.unique(np.linspace(0, len(rows) - 1, 40).astype(int)):
        axis.plot(*zip(audio[k], text[k]), color="gray", lw=0.5, zorder=1)
    axis.scatter(*audio.T, s=8, label="audio")
    axis.scatter(*text.T, s=8, label="text")
    axis.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)")
    axis.set_ylabel(f"second ({share[1]:.0%})")
    axis.set_title("embeddings of clips and captions, PCA of both together", fontsize=10)
    axis.legend()
    figure.savefig(folder / "gap.png", dpi=110)
    plt.close(figure)
    return [folder / "gap.png"]


def plot_order(results: dict, folder: Path) -> Path:
    """{name: a result of t_classify}: by how much the true order is preferred, a histogram a direction and model."""
    plt = common.pyplot()
    ways = {
        "t2a": "cosine to the caption less that to its negative",
        "a2t": "cosine to the clip less that to the swapped audio",
    }
    ways = {
        way: text
        for way, text in ways.items()
        if any(way in r["details"]["margins"] for r in results.values())
    }
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.5 * len(ways), 3), squeeze=False, layout="constrained"
    )
    for axis, (way, text) in zip(axes[0], ways.items()):
        widest = (
            max(np.abs(r["details"]["margins"].get(way, [0])).max() for r in results.values()) or 1
        )
        for name, r in results.items():
            if way in r["details"]["margins"]:
                axis.hist(
                    r["details"]["margins"][way],
                    np.linspace(-widest, widest, 42),
                    alpha=0.6,
                    label=f"{name}: {r['scores'][way]['value']:.1%} right, {len(r['details']['margins'][way])} pairs",
                )
        axis.axvline(0, color="black", lw=1)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(text)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("pairs")
    figure.savefig(folder / "order.png", dpi=100)
    plt.close(figure)
    return folder / "order.png"


def plot_noise(r: dict, folder: Path) -> Path:
    """Score against the signal-to-noise ratio, the clean value and that with noise of standard deviation 0.1 as lines."""
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    scores = {name.partition("_")[2]: s for name, s in r["scores"].items()}
    levels = sorted(int(name[3:]) for name in scores if name.startswith("snr"))
    at = [scores[f"snr{db}"] for db in levels]
    axis.plot(levels, [s["value"] for s in at], marker="o", label="noise of that power")
    if all(s["low"] is not None for s in at):
        axis.fill_between(
            levels,
            [s["low"] for s in at],
            [s["high"] for s in at],
            alpha=0.2,
            lw=0,
            label="95 % interval",
        )
    axis.axhline(scores["clean"]["value"], color="black", lw=1, label="clean")
    axis.axhline(
        scores["std0.1"]["value"], color="tab:red", ls="--", lw=1, label="standard deviation 0.1"
    )
    axis.axhline(next(iter(r["chance"].values())), color="gray", ls=":", lw=1, label="chance")
    axis.set_xlabel("signal-to-noise ratio (dB)")
    axis.set_ylabel(next(iter(r["scores"])).partition("_")[0])
    axis.set_ylim(0, 1.02)
    axis.set_title(f"zero-shot scores under Gaussian noise, {r['n_clips']} clips", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(folder / "noise.png", dpi=110)
    plt.close(figure)
    return folder / "noise.png"


FUNCTION_WORDS = set(
    "a an the and or of in on at is are was be being to as with by for from it its while then there this that into over".split()
)


def content_tokens(tokens: list[str]) -> list[tuple[int, str]]:
    """Number and text of the tokens that say something: neither special ones nor punctuation nor function words."""
    bare = [
        (k, token.replace("</w>", "").lstrip("\u0120\u2581").replace("##", ""))
        for k, token in enumerate(tokens)
    ]
    return [
        (k, word)
        for k, word in bare
        if re.fullmatch(r"[\w'-]+", word) and word.lower() not in FUNCTION_WORDS
    ]


def plot_attention(model, rows: list[dict], folder: Path, n_tokens: int = 5) -> Path:
    """Of three clips at equal distances among those with captions: the log-mel spectrogram, and where in it the slot of each of
    the first content tokens of the first caption looks (share of its attention, dark: most). The first window only."""
    plt = common.pyplot()
    usable = [row for row in rows if row.get("captions")]
    usable = [usable[k] for k in np.unique(np.linspace(0, len(usable) - 1, 3).astype(int))]
    log_mel = common.LogMel(
        model.sample_rate, 512, model.sample_rate // 100, 64, 20, model.sample_rate // 2
    )
    figure, axes = plt.subplots(
        1 + n_tokens,
        len(usable),
        figsize=(4.2 * len(usable), 1.3 * (2 + n_tokens)),
        squeeze=False,
        layout="constrained",
    )
    for column, row in zip(axes.T, usable):
        waveform = torch.from_numpy(
            common.read_audio(row["audio"], model.sample_rate, model.window_s)
        )[None]
        seconds, text = (
            waveform.shape[1] / model.sample_rate,
            model.clean_caption(row["captions"][0]),
        )
        padded = torch.nn.functional.pad(
            waveform, (0, round(model.window_s * model.sample_rate) - waveform.shape[1])
        )
        (tokens,), (maps,) = model.token_attention(
            padded.to(next(model.parameters()).device), [text]
        )
        column[0].imshow(
            log_mel(waveform)[0].T.clamp(min=-80),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, 64),
            cmap="magma",
        )
        column[0].set_title(text if len(text) < 60 else text[:57] + "...", fontsize=8)
        for axis, (k, word) in zip(column[1:], content_tokens(tokens)[:n_tokens]):
            share = np.asarray(maps[k], dtype=float)  # (F, T)
            axis.imshow(
                share,
                origin="lower",
                aspect="auto",
                extent=(0, share.shape[1] * model.patch_s, 0, len(share)),
                cmap="Greys",
                vmin=0,
            )
            axis.set_title(word, fontsize=9, loc="left", pad=2)
            axis.set_xlim(0, seconds)
        for axis in column:
            axis.set_yticks([])
            axis.tick_params(labelsize=7)
            axis.set_visible(bool(axis.images))
        [axis for axis in column if axis.images][-1].set_xlabel("time (s)", fontsize=8)
    axes[0, 0].set_ylabel("mel band", fontsize=8)
    figure.savefig(folder / "attention.png", dpi=80)
    plt.close(figure)
    return folder / "attention.png"


def plot_learning(checkpoint: Path, folder: Path) -> list[Path]:
    """Loss, in-batch R@1 and whatever else the run logged beside the checkpoint."""
    path = Path(checkpoint).parent / "log.jsonl"
    if not path.exists():
        return []
    plt, lines = common.pyplot(), []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # a run that is still writing, or was killed
            break
    if not lines:
        return []
    keys = [
        k
        for k in lines[0]
        if all(k in line for line in lines)
        and k not in ("step", "epoch", "ln_B", "skipped", "pairs_per_s")
    ]
    figure, axes = plt.subplots(
        len(keys), 1, figsize=(7, 1.7 * len(keys)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes[:, 0], keys):
        axis.plot([line["step"] for line in lines], [line[key] for line in lines])
        axis.set_ylabel(key)
        if key == "loss" and "ln_B" in lines[0]:
            axis.axhline(lines[0]["ln_B"], color="gray", ls=":", label="ln B (chance)")
            axis.legend()
    axes[-1, 0].set_xlabel("step")
    figure.savefig(folder / "learning.png", dpi=110)
    plt.close(figure)
    return [folder / "learning.png"]


# ------------------------------------------------------------------------------------------------
# Shared by the protocols
# ------------------------------------------------------------------------------------------------


def per_class(classes, values) -> dict:
    """Class name -> value, classes without one left out."""
    return {c: float(v) for c, v in zip(classes, values) if np.isfinite(v)}


def class_prompts(classes, args) -> list[str]:
    """The prompt with each class name in it, underscores to spaces."""
    return [args.prompt.format(c.replace("_", " ")) for c in classes]


def result(
    protocol, score, n_clips, chance, args, n_captions=0, n_classes=0, details=None, **settings
) -> dict:
    """Evaluate `score` on all clips and on bootstrap draws of clips -> the result as --json writes it.

    Args: score: indices of clips (with repeats) -> {name: value}; details: per query and per class.
    The draws depend on the number of clips only, so that those of two models are paired.
    """
    start = time.perf_counter()
    values = score(np.arange(n_clips))
    n_draws = min(args.bootstrap, int(600 / (time.perf_counter() - start)))  # ten minutes at most
    rng = np.random.default_rng(0)
    draws = [
        score(rng.integers(0, n_clips, n_clips))
        for _ in tqdm(
            range(n_draws if n_draws >= min(args.bootstrap, 20) else 0),
            desc=f"{protocol}: bootstrap",
            unit="draw",
            leave=False,
        )
    ]
    scores = {}
    for name, value in values.items():
        known = [d[name] for d in draws if np.isfinite(d[name])]
        low, high = np.percentile(known, [2.5, 97.5]) if known else (None, None)
        if not np.isfinite(value):
            raise ValueError(f"{protocol}: {name} has no value on these clips")
        scores[name] = {"value": value, "low": low and float(low), "high": high and float(high)}
    window = (
        "first window only"
        if args.crop == "first"
        else "all consecutive windows, averaged by their seconds"
    )
    crop = f"zero-padded to {args.window_s:g} s; {window}"
    if args.crop_rule:
        crop = f"the first {args.window_s:g} s only" if args.crop == "first" else args.crop_rule
    unsplit = (
        " (none is in split test: clips that a model was trained on may be among them)"
        if args.split == "all rows"
        else ""
    )
    settings = {
        "crop": crop,
        "split": args.split + unsplit,
        "bootstrap_draws": len(draws),
        "checkpoint": str(args.checkpoint),
        "data": args.data,
        **settings,
    }
    return {
        "protocol": protocol,
        "settings": settings,
        "n_clips": n_clips,
        "n_captions": n_captions,
        "n_classes": n_classes,
        "scores": scores,
        "chance": {k: chance[k] for k in scores},
        "details": details or {},
        "draws": draws,
    }


def differences(first: dict, other: dict) -> dict:
    """Score of `other` less that of `first`, both results of one protocol, with the interval of the paired draws."""
    out = {}
    for name, s in other["scores"].items():
        if name in first["scores"]:
            of_draws = [b[name] - a[name] for a, b in zip(first["draws"], other["draws"])]
            of_draws = [d for d in of_draws if np.isfinite(d)]
            low, high = np.percentile(of_draws, [2.5, 97.5]) if of_draws else (None, None)
            out[name] = {
                "value": s["value"] - first["scores"][name]["value"],
                "low": low and float(low),
                "high": high and float(high),
            }
    return out


def show(r: dict) -> None:
    print(
        f"\n{r['protocol']}: {r['n_clips']} clips"
        + (f", {r['n_captions']} captions" if r["n_captions"] else "")
        + (f", {r['n_classes']} classes" if r["n_classes"] else "")
    )
    for key, value in r["settings"].items():
        if key not in ("checkpoint", "data"):
            print(f"  {key}: {value!r}" if key == "prompt" else f"  {key}: {value}")
    print(f"  {'score':<18}{'value':>8}  {'95 % interval':<16}{'chance':>8}")
    for name, s in r["scores"].items():
        interval = "" if s["low"] is None else f"[{s['low']:.3f}, {s['high']:.3f}]"
        print(f"  {name:<18}{s['value']:>8.3f}  {interval:<16}{r['chance'][name]:>8.3f}")


def find_model(path) -> None:
    """FileNotFoundError for what is neither a file, a folder nor a hub id."""
    if not Path(path).exists() and (
        Path(path).suffix in (".pt", ".pth", ".ckpt") or str(path).count("/") != 1
    ):
        raise FileNotFoundError(f"{path}: no such weight file, folder or hub id (owner/name)")


def load_model(model_file_path, text_model=None):
    """The Model that a checkpoint, a published file, a folder or a hub id is of, in evaluation mode.

    With the sizes of its embeddings, HEAR's interface: scene_embedding_size, and timestamp_embedding_size if it has frames.
    """
    model = read_model(model_file_path, text_model)
    hum = torch.full((1, model.sample_rate // 10), 0.1)
    model.scene_embedding_size = model.embed_audio(hum).shape[1]
    if hasattr(model, "embed_frames"):
        model.timestamp_embedding_size = getattr(model, hear_frames(model))(hum).shape[2]
    return model


def read_model(path, text_model=None):
    """The same without sizes.

    Told by its keys: this project's checkpoints name their script; MGA-CLAP's model.pt, LAION-CLAP's .pt,
    MS-CLAP 2022's and Cacophony's torch file have theirs (all need `text_model`'s tokenizer); a folder or hub id is a transformers CLAP.
    """
    find_model(path)
    if not Path(path).is_file():
        return importlib.import_module("t_clap").Model.from_published(path)
    content = common.read_weights(path)
    if content.get("method") in METHODS:
        return importlib.import_module(content["method"]).Model.from_checkpoint(path)
    if "codebook" in content.get("model", {}):
        return importlib.import_module("mga_clap").Model.from_checkpoint(
            path, text_model or "bert-base-uncased"
        )
    if any(str(key).startswith("caption_encoder.base.") for key in content.get("model", {})):
        return importlib.import_module("curation_clap").Model.from_published(
            path, text_model or "bert-base-uncased"
        )
    keys = {
        str(key).removeprefix("module.")
        for key in content.get("state_dict", content.get("model_state_dict", content))
    }
    if any(key.startswith("audio_module.") for key in keys):
        return importlib.import_module("cacophony").Model.from_published(
            path, text_model or "roberta-base"
        )
    if any(key.startswith("audio_branch.") for key in keys):
        return importlib.import_module("t_clap").Model.from_published(
            path, text_model or "roberta-base"
        )
    raise ValueError(
        f"{path}: not a checkpoint this evaluator knows (method {content.get('method')!r}; known: {', '.join(METHODS)}, "
        "MGA-CLAP's model.pt, LAION-CLAP's .pt, MS-CLAP 2022's, Cacophony's torch file, transformers CLAP folders)"
    )


def checkpoint_cache(args, checkpoint) -> Path | None:
    """Folder of --cache for this checkpoint and crop; the same weights elsewhere find it again."""
    if not args.cache:
        return None
    files = (
        [Path(checkpoint)] if Path(checkpoint).is_file() else sorted(Path(checkpoint).glob("*.*"))
    )
    digest = hashlib.sha256(f"{'' if files else checkpoint}{args.crop}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return Path(args.cache) / digest.hexdigest()[:16]


def report_left_out(bad: list[str], total: int, args) -> None:
    for text in bad:
        print(f"left out: {text}")
    if len(bad) > args.max_bad * total:
        raise ValueError(
            f"{len(bad)} of {total} files could not be used, more than --max-bad {args.max_bad:.0%}"
        )


def merge_rows(rows: list[dict]) -> list[dict]:
    """One row a file: a manifest may hold one caption or one label a line."""
    merged = {}
    for row in rows:
        if row["audio"] not in merged:
            merged[row["audio"]] = {**row}
            continue
        one = merged[row["audio"]]
        if one.get("negatives") or row.get("negatives"):  # one entry a caption
            one["negatives"] = [
                (r.get("negatives", []) + [None] * len(r.get("captions", [])))[k]
                for r in (one, row)
                for k in range(len(r.get("captions", [])))
            ]
        for key in ("captions", "labels", "events", "phrases", "qa"):
            if row.get(key):
                new = (
                    row[key]
                    if key == "captions"
                    else [x for x in row[key] if x not in one.get(key, [])]
                )
                one[key] = one.get(key, []) + new
    if len(merged) < len(rows):
        print(
            f"{len(rows)} rows of the manifest are {len(merged)} files: rows of one file were merged"
        )
    return list(merged.values())


def embed_command(args, rows) -> None:
    """`eval.py embed`: audio_embeds (N, D), audio (N,), text_embeds (Q, D), captions (Q,), owner (Q,) rows of audio -> --out."""
    model = load_model(args.checkpoint[0], args.text_model).to(common.start_device(args.device))
    kept, audio_embeds, _, bad = common.embed_files(
        model,
        rows,
        args.batch_size,
        args.workers,
        args.crop,
        cache=checkpoint_cache(args, args.checkpoint[0]),
    )
    report_left_out(bad, len(rows), args)
    captions = [
        (i, model.clean_caption(c)) for i, k in enumerate(kept) for c in rows[k].get("captions", [])
    ]
    text_embeds = (
        common.embed_texts(model, [c for _, c in captions])
        if captions
        else np.zeros((0, audio_embeds.shape[1]), np.float32)
    )
    with common.written_whole(Path(args.out)) as file:
        np.savez(
            file,
            audio_embeds=audio_embeds,
            audio=np.array([rows[k]["audio"] for k in kept]),
            text_embeds=text_embeds,
            captions=np.array([c for _, c in captions], dtype=str),
            owner=np.array([i for i, _ in captions], dtype=int),
        )
    print(
        f"{args.out}: {len(kept)} clips, {len(captions)} captions, {audio_embeds.shape[1]} dimensions"
    )


def main(args) -> list[dict]:
    common.start_device(args.device)
    args.prompt = PROMPTS.get(args.prompt, args.prompt)
    if args.prompt.count("{}") != 1 or set(args.prompt.replace("{}", "")) & set("{}"):
        raise ValueError(
            f"--prompt {args.prompt!r}: must hold {{}} once, where the class name goes, or be one of {', '.join(PROMPTS)}"
        )
    if not 0 <= args.median_s < math.inf:
        raise ValueError(f"--median-s {args.median_s}: expected seconds, 0 for no filter")
    if args.batch_size < 1 or not 0 <= args.max_bad <= 1:
        raise ValueError(
            f"--batch-size {args.batch_size}, --max-bad {args.max_bad}: expected at least 1, and a share between 0 and 1"
        )
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: expected 0 (greedy) or more")
    for flag in ("json", "out"):
        target = getattr(args, flag)
        if target and (
            Path(target).is_dir() or not os.access(Path(target).absolute().parent, os.W_OK)
        ):
            raise PermissionError(
                f"--{flag} {target}: a folder, or in a folder that does not exist or cannot be written"
            )
    for checkpoint in args.checkpoint:
        find_model(checkpoint)
    if args.plot:
        common.pyplot()
        try:
            Path(args.plot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"--plot {args.plot}: this folder cannot be made ({error.strerror})"
            ) from None
    if args.command == "hear":
        return hear_command(args)
    rows = common.read_manifest(args.data)
    args.all_rows = rows
    if args.split is None:  # test rows where there are any, else everything
        args.split = "test" if any(row.get("split") == "test" for row in rows) else "all rows"
    if args.split != "all rows":
        rows = [row for row in rows if row.get("split", "train") == args.split]
        if not rows:
            raise ValueError(
                f"--split {args.split}: no row of the manifest is in it (rows without a split are for training)"
            )
    rows = merge_rows(rows)
    if args.command == "embed":
        return embed_command(args, rows)
    checkpoints, all_results = args.checkpoint, []
    pictures = args.plot
    for number, checkpoint in enumerate(checkpoints, 1):
        if len(checkpoints) > 1:
            print(f"\n=== {checkpoint}")
            args.plot = pictures and str(Path(pictures) / f"model{number}")
        args.checkpoint = checkpoint
        all_results.append([])
        evaluate(args, rows, all_results[-1], lambda: write_json(args, all_results))
    for other, results in zip(checkpoints[1:], all_results[1:]):
        print(f"\n{other} less {checkpoints[0]} (paired over clips; * = the interval leaves out 0)")
        for r in results:
            first = next(
                (
                    f
                    for f in all_results[0]
                    if f["protocol"] == r["protocol"] and f["n_clips"] == r["n_clips"]
                ),
                None,
            )
            if first is None:
                print(
                    f"  {r['protocol']}: not comparable, the first model was not scored on the same clips"
                )
                continue
            r["differences"] = {"to": str(checkpoints[0]), "scores": differences(first, r)}
            for name, d in r["differences"]["scores"].items():
                interval = (
                    ""
                    if d["low"] is None
                    else f"[{d['low']:+.3f}, {d['high']:+.3f}]"
                    + (" *" if d["low"] > 0 or d["high"] < 0 else "")
                )
                print(f"  {r['protocol'] + ' ' + name:<32}{d['value']:>+8.3f}  {interval}")
    return write_json(args, all_results)


def write_json(args, all_results) -> list[dict]:
    results = [
        {k: v for k, v in r.items() if k != "draws"} for of_one in all_results for r in of_one
    ]
    if args.json:
        common.write_lines(Path(args.json), [json.dumps(results, indent=1)])
    return results


def evaluate(args, rows, results: list, save) -> None:
    """One model on every wanted protocol: each result is printed, appended to `results` and saved at once."""
    model = load_model(args.checkpoint, args.text_model).to(common.start_device(args.device))
    args.window_s, args.crop_rule = model.window_s, getattr(model, "crop_rule", None)
    wanted = (
        [args.protocol]
        if args.protocol != "all"
        else [
            name
            for name, (_, key) in PROTOCOLS.items()
            if name not in BY_NAME and any(row.get(key) for row in rows)
        ]
    )
    if not wanted:
        raise ValueError(
            f"no row of split {args.split} has anything to score; a protocol needs one of "
            f"{', '.join(dict.fromkeys(key for _, key in PROTOCOLS.values()))}"
        )
    for name in wanted:
        if not any(row.get(PROTOCOLS[name][1]) for row in rows):
            raise ValueError(
                f"--protocol {name} needs '{PROTOCOLS[name][1]}' in the manifest; no row of split "
                f"{args.split} has them"
            )
    needed = {
        "captioning": ("caption", "that writes no captions"),
        **dict.fromkeys(FRAME_PROTOCOLS, ("embed_frames", "of whole clips")),
    }
    for name in [name for name in wanted if name in needed and not hasattr(model, needed[name][0])]:
        method, kind = needed[name]
        message = f"{args.checkpoint} is a model {kind} (it has no {method} method)"
        if name == "captioning" and hasattr(model, "token_embeds"):
            if args.protocol == name:
                continue
            message = f"{args.checkpoint} needs a trained decoder for it; ask for it with --protocol captioning"
        if args.protocol == name:
            raise ValueError(f"--protocol {name}: {message}")
        wanted.remove(name)
        print(f"{name}: not run, {message}")
    classes = common.read_classes(args.data, rows)
    kept, audio_embeds, frame_embeds, bad = common.embed_files(
        model,
        rows,
        args.batch_size,
        args.workers,
        args.crop,
        cache=checkpoint_cache(args, args.checkpoint),
        frames=getattr(model, "pairwise", False) or bool(FRAME_PROTOCOLS & set(wanted)),
    )
    report_left_out(bad, len(rows), args)
    outside = sorted(
        {e["label"] for row in rows for e in row.get("events", [])}
        | {x for row in rows for x in row.get("labels", [])}
    )
    outside = [label for label in outside if label not in set(classes)]
    if outside:
        print(
            f"{len(outside)} label(s) outside the class list do not count: {', '.join(outside[:10])}{', ...' if len(outside) > 10 else ''}"
        )
    clips = {
        "rows": [rows[i] for i in kept],
        "audio_embeds": audio_embeds,
        "frame_embeds": frame_embeds,
        "swapped": {},
    }
    if "t_classify" in wanted:
        owner = [k for k, row in enumerate(clips["rows"]) if row.get("swapped_audio")]
        if owner:
            of = [{"audio": clips["rows"][k]["swapped_audio"]} for k in owner]
            try:
                found, embeds, frame_lists, bad = common.embed_files(
                    model,
                    of,
                    args.batch_size,
                    args.workers,
                    args.crop,
                    cache=checkpoint_cache(args, args.checkpoint),
                    frames=getattr(model, "pairwise", False),
                    desc="embedding swapped audio",
                )
                clips["swapped"] = {
                    owner[i]: (embeds[k], frame_lists[k] if frame_lists else None)
                    for k, i in enumerate(found)
                }
            except ValueError as error:  # not one could be read
                bad = [f"all swapped audio, so no a2t ({error})"]
            for text in bad:
                print(f"left out: {text}")
    for name in wanted:
        try:
            results.append(PROTOCOLS[name][0](model, clips, classes, args))
            show(results[-1])
            save()
        except ValueError as error:
            if args.protocol != "all":
                raise
            print(f"\n{name}: not run, {error}")
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(exist_ok=True)
        paths = plot_learning(args.checkpoint, folder)
        if frame_embeds is not None and any(row.get("events") for row in clips["rows"]):
            paths += plot_frames(model, clips, classes, args, folder)
        if any(r["protocol"] == "gap" for r in results):
            paths += plot_gap(model, clips, folder)
        paths += [plot_noise(r, folder) for r in results if r["protocol"] == "noise"]
        paths += [
            plot_order({Path(args.checkpoint).name: r}, folder)
            for r in results
            if r["protocol"] == "t_classify"
        ]
        if hasattr(model, "token_attention") and any(row.get("captions") for row in clips["rows"]):
            paths.append(plot_attention(model, clips["rows"], folder))
        script = importlib.import_module(type(model).__module__)
        if hasattr(script, "plot") and classes:
            order = (
                clip_order(
                    clips,
                    common.embed_texts(model, class_prompts(classes, args)),
                    classes,
                    model.frame_s,
                )
                if frame_embeds
                else [0]
            )
            paths += script.plot(
                model,
                clips["rows"][order[0]],
                class_prompts(classes, args),
                folder,
                common.pyplot(),
            )
        print("\npictures: " + " ".join(str(path) for path in paths))


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="one or more models: a run's best.pt or last.pt, MGA-CLAP's released model.pt, "
        "LAION-CLAP's .pt, MS-CLAP 2022's, a transformers CLAP folder or hub id; after the word embed or hear: the one to embed with",
    )
    parser.add_argument(
        "--data", nargs="+", help="manifests, folders that hold manifest.jsonl, or demo"
    )
    parser.add_argument("--task", help="hear: a task folder as hear-preprocess writes it")
    parser.add_argument(
        "--protocol",
        choices=[*PROTOCOLS, "all"],
        default="all",
        help="all: those the manifest has labels for, but for probe and noise",
    )
    parser.add_argument(
        "--image-model",
        help="image: transformers CLIP folder or hub id in whose space the audio embeddings lie",
    )
    parser.add_argument(
        "--split",
        help="rows to use: train (also those without a split), val or test; default: test where there is one, else all rows",
    )
    parser.add_argument(
        "--crop", choices=["all", "first"], default="all", help="windows of longer audio"
    )
    parser.add_argument(
        "--prompt",
        default="bare",
        help=f"text a class name is put into, for example 'a sound of {{}}', or one of {', '.join(PROMPTS)}",
    )
    parser.add_argument(
        "--median-s",
        type=float,
        default=0.94,
        help="sed and grounding: length of the median filter in seconds",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="captioning: 0 takes the likeliest word, above 0 draws (Cacophony: 0.1)",
    )
    parser.add_argument(
        "--text-model",
        help="folder or hub id of the tokenizer, read only for "
        "MGA-CLAP's model.pt and MS-CLAP 2022's file (default bert-base-uncased), LAION-CLAP's .pt and Cacophony's (default roberta-base)",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=200, help="draws for the 95 %% intervals; 0: none"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="clips at once; never changes a score"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read audio; never changes a score"
    )
    parser.add_argument(
        "--max-bad", type=float, default=0.05, help="largest share of unreadable files"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--cache",
        help="folder that keeps embeddings, so that an interrupted or repeated call continues",
    )
    parser.add_argument(
        "--json", help="write the results to this file, with per-query ranks and per-class scores"
    )
    parser.add_argument("--out", default="embeds.npz", help="embed: where the embeddings go")
    parser.add_argument("--plot", help="draw pictures into this folder (needs matplotlib)")
    args = parser.parse_args(argv)
    args.command = args.checkpoint.pop(0) if args.checkpoint[0] in ("embed", "hear") else "scores"
    if not args.checkpoint or (args.command != "scores" and len(args.checkpoint) > 1):
        parser.error(f"{args.command} takes exactly one checkpoint")
    if args.command == "embed" and args.json:
        parser.error("embed writes to --out; --json is for scores")
    if args.command != "hear" and not args.data:
        parser.error(
            "--data is missing: give manifests, folders that hold manifest.jsonl, or the word demo"
        )
    if (args.command == "hear") != bool(args.task) or (args.command == "hear") == bool(args.data):
        parser.error(
            "hear takes a --task and no --data; everything else takes --data and no --task"
        )
    return args


if __name__ == "__main__":
    common.run_entry(main, parse)
