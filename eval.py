"""Zero-shot evaluation of any checkpoint: one function per protocol, every rule is printed.

  python eval.py runs/NAME/best.pt --data MANIFEST --json scores.json
  python eval.py A.pt B.pt laion/clap-htsat-unfused --data MANIFEST   (with paired differences)
  python eval.py embed A.pt --data MANIFEST --out embeds          (audio and captions)

Protocols: retrieval, classification, tagging, frames, sed (sound event detection), grounding
(text-to-audio grounding), t_classify (temporal order). Without --protocol, all run for which the
manifest has labels. Scores that need training or generation are in tools/downstream.py.
Audio is never cropped at random: short audio is zero-padded to the model's window, longer audio is
cut into consecutive windows, whose embeddings are averaged by their seconds and renormalised
(`--crop first`: the first window only). LAION-CLAP's windows are tiled, then padded, as in its
training; curation-CLAP's are repeated to 5 s. Cacophony encodes a clip whole, without padding;
clips over 60 s are encoded in pieces that are pooled together. Frames end with the clip, and a last
window shorter than one frame adds none. Each score has a 95 % bootstrap interval over clips.

--variant makes a model compute like another variant of its script: MGA-CLAP's official repeats
clips under 10 s and scores all of their frames; Cacophony has paper, jax and official. Without it a
model computes as it was trained.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common

# Scripts that train; each checkpoint holds the name of its script
METHODS = ("mga_clap", "t_clap", "cacophony", "collat", "curation_clap")
# Class prompts by name. mga_clap is the prompt of its code for ESC-50 and VGGSound; its paper (Sec.
# 4.2) and the rest of its code use bare class names. CoLLAT's prompt is assumed.
PROMPTS = {
    "bare": "{}",
    "mga_clap": "{} can be heard",
    "t_clap": "A sound of {}",
    "cacophony": "This is a sound of {}",
    "cacophony_scene": "This sound is on {}",
    "cacophony_scene_code": "This is a sound on {}",
    "collat": "This is a sound of {}",
    "curation_clap": "this is a sound of {}",
    "laion": "This is a sound of {}",
}


@dataclasses.dataclass
class Settings:
    """What a protocol needs to know beside the model, its clips and the class list."""

    checkpoint: str
    data: list[str]  # as --data names it
    split: str  # of the scored rows: train, val, test or "all rows"
    manifest: list[dict]  # the rows of every split; a trained probe takes its own from them
    window_s: float  # the model's window
    crop: str  # all (windows) or first
    crop_rule: str | None  # how the model treats whole files, where it has a rule of its own
    prompt: str  # text with {} for the class name
    median_s: float  # length of the median filter of sed and grounding
    bootstrap: int  # draws
    flags: argparse.Namespace  # the command line as given
    fold: str | None = None  # the only fold that is scored


# ------------------------------------------------------------------------------------------------
# Protocols: (model, clips, classes, settings) -> result
# clips: {"rows", "audio_embeds" (N, D), "frame_embeds" list of (T_i, D) or None}
# ------------------------------------------------------------------------------------------------


def retrieval(model, clips, classes, settings) -> dict:
    """Text-to-audio and audio-to-text retrieval.

    Every caption queries all N clips (t2a: rank of its own clip); every clip queries all Q captions
    (a2t: best rank among its own captions; mAP@10 as common.retrieval_ranks defines it, divided by
    the number of own captions). Captions go through the method's own clean_caption. Ties count
    against the right answer. If two clips have the same caption text, each copy is right for its
    own clip only, as in published scores; in the scores named _text it is right for both. Source:
    the protocol that WavCaps, MGA-CLAP and LAION-CLAP share; AudioCaps test 957-975 x 5, Clotho
    evaluation 1045 x 5 (the sets of MGA-CLAP Table 2; the sizes are the data sets' own).
    """
    rows = clips["rows"]
    common.require(rows, "captions")
    captions = [(i, model.clean_caption(c)) for i, row in enumerate(rows) for c in row["captions"]]
    owner = np.array([i for i, _ in captions])
    texts, n = [c for _, c in captions], len(rows)
    sim = common.similarities(model, clips["audio_embeds"], clips["frame_embeds"], texts)
    # `equal`: captions with the same text have the same number
    distinct, equal = np.unique(texts, return_inverse=True)
    own = common.retrieval_ranks(sim, owner)
    by_text = common.retrieval_ranks(sim, owner, equal)
    chance = common.retrieval_chance(owner, n)
    by_chance = common.retrieval_chance(owner, n, equal)
    chance |= {f"{name}_text": value for name, value in by_chance.items()}

    def score(chosen):
        # a draw repeats queries; each keeps its rank among all clips, so copies cause no ties
        times, scores = np.bincount(chosen, minlength=n), {}
        for suffix, ranks in (("", own), ("_text", by_text)):
            drawn = {
                name: np.repeat(r, times[owner]) if name.startswith("t2a") else r[chosen]
                for name, r in ranks.items()
            }
            for name, value in common.retrieval_scores(drawn).items():
                scores[name + suffix] = value
        return scores

    details = {  # ranks counted from 1, for readers
        "t2a": [
            {"clip": rows[i]["audio"], "caption": c, "rank": int(k) + 1, "rank_text": int(e) + 1}
            for (i, c), k, e in zip(captions, own["t2a"], by_text["t2a"])
        ],
        "a2t": [
            {"clip": rows[i]["audio"], "rank": int(k) + 1, "rank_text": int(e) + 1}
            for i, (k, e) in enumerate(zip(own["a2t"], by_text["a2t"]))
        ],
    }
    return result(
        "retrieval",
        score,
        n,
        chance,
        settings,
        n_captions=len(captions),
        details=details,
        prompt="captions as written, cleaned by the method",
        tie_rule="a tie counts against the right answer",
        distinct_captions=f"{len(distinct)} of {len(captions)}; scores named _text count every "
        "caption equal in text to one of the clip's own as its own",
    )


def classification(model, clips, classes, settings) -> dict:
    """Accuracy: the class prompt with the largest cosine to the clip, among clips with one label.

    A tie is a miss. Clips with several labels are left out and counted. Source: MGA-CLAP Table 3
    (ESC-50, UrbanSound8K, VGGSound); the mean over folds, printed where rows have a fold, follows
    its code.
    """
    targets = common.label_targets(clips["rows"], classes)
    single = targets.sum(1) == 1
    if not single.any():
        raise ValueError(
            "classification needs clips with exactly one label; this manifest has none"
        )
    sim = common.similarities(
        model, clips["audio_embeds"], clips["frame_embeds"], class_prompts(classes, settings)
    )[single]
    truth = targets[single].argmax(1)
    right = np.take_along_axis(sim, truth[:, None], 1)
    hit = (sim >= right).sum(1) == 1  # only the right class reaches its score: a tie is a miss
    folds = np.array([str(row.get("fold", "")) for row, one in zip(clips["rows"], single) if one])

    def score(chosen):
        scores = {"accuracy": float(hit[chosen].mean())}
        if len(set(folds)) > 1:
            drawn = sorted(set(folds[chosen]))  # a bootstrap draw may miss a fold
            of_fold = [hit[chosen][folds[chosen] == fold].mean() for fold in drawn]
            scores["mean_of_folds"] = float(np.mean(of_fold))
        return scores

    recall = {
        name: float(hit[truth == k].mean()) for k, name in enumerate(classes) if (truth == k).any()
    }
    return result(
        "classification",
        score,
        len(hit),
        {"accuracy": 1 / len(classes), "mean_of_folds": 1 / len(classes)},
        settings,
        n_classes=len(classes),
        details={"recall": recall},
        prompt=settings.prompt,
        tie_rule="a tie is a miss",
        left_out=f"{int((~single).sum())} clips without exactly one label",
    )


def tagging(model, clips, classes, settings) -> dict:
    """Macro mAP over classes that occur, from the cosine of clip and class prompt.

    Average precision is not interpolated; equal scores form one threshold. Source: MGA-CLAP Table 3
    (FSD50K, AudioSet; the paper names no split, ours are the evaluation splits).
    """
    index = common.annotated(clips["rows"], "labels", "events")
    targets = common.label_targets([clips["rows"][i] for i in index], classes)
    sim = common.similarities(
        model, clips["audio_embeds"], clips["frame_embeds"], class_prompts(classes, settings)
    )[index]

    def score(chosen):
        precisions = common.class_average_precisions(sim[chosen], targets[chosen])
        # NaN marks a class without a positive clip in this draw, which may have none of any class
        known = np.isfinite(precisions).any()
        return {"mAP": float(np.nanmean(precisions)) if known else float("nan")}

    return result(
        "tagging",
        score,
        len(sim),
        {"mAP": common.chance_of_mean_ap(targets)},
        settings,
        details={"AP": per_class(classes, common.class_average_precisions(sim, targets))},
        n_classes=int(targets.any(0).sum()),
        prompt=settings.prompt,
        tie_rule="equal scores are one threshold",
        left_out=f"{len(clips['rows']) - len(index)} clips without labels or events",
    )


def frames(model, clips, classes, settings) -> dict:
    """Frame-level mAP: each frame's cosine to each class prompt, all frames of all clips pooled.

    A frame is positive where an event covers its centre. raw: the cosine (the papers' protocol).
    centred: the frame's mean over classes is subtracted first, which removes how much a frame
    resembles any class text at all. Both are always reported: do not tune on one of them and report
    the other.
    """
    index = common.annotated(clips["rows"], "events")
    rows, frame_embeds = [[clips[key][i] for i in index] for key in ("rows", "frame_embeds")]
    if not any(row["events"] for row in rows):
        raise ValueError("frames needs 'events' in the manifest, which has none")
    class_embeds = common.embed_texts(model, class_prompts(classes, settings))
    if not set(classes) & {event["label"] for row in rows for event in row["events"]}:
        raise ValueError(
            "frames: no event's label is in the class list (classes.txt beside the manifest)"
        )
    covered = [
        common.frame_targets(row, classes, len(f), model.frame_s).any(0)
        for row, f in zip(rows, frame_embeds)
    ]
    if not np.any(covered):
        raise ValueError(
            f"frames: no event covers the centre of a frame ({model.frame_s:g} s each); are the "
            "times seconds?"
        )
    variants = {"mAP_raw": False, "mAP_centred": True}
    if len(classes) == 1:  # centred, the scores of a single class would all be 0
        del variants["mAP_centred"]
    chance, details = {}, {}

    def score(chosen):
        scores = {}
        for name, centred in variants.items():
            precisions, level = common.frame_average_precisions(
                [frame_embeds[i] for i in chosen],
                class_embeds,
                [rows[i] for i in chosen],
                classes,
                model.frame_s,
                centred,
            )
            # a bootstrap draw may have no positive frame; `result` leaves its NaN out
            known = np.isfinite(precisions).any()
            scores[name] = float(np.nanmean(precisions)) if known else float("nan")
            chance.setdefault(name, level)  # kept from the first call, which scores all clips
            details.setdefault(name.replace("mAP", "AP"), per_class(classes, precisions))
        return scores

    return result(
        "frames",
        score,
        len(rows),
        chance,
        settings,
        n_classes=int(np.any(covered, axis=0).sum()),
        details=details,
        prompt=settings.prompt,
        tie_rule="equal scores are one threshold",
        frame_s=model.frame_s,
        frame_rule=frame_rule(model),
        n_frames=sum(len(f) for f in frame_embeds),
        left_out=f"{len(clips['rows']) - len(index)} clips without the key events",
    )


# PSDS1 asks for exact times; PSDS2 tolerates inexact ones and penalises confused classes
PSDS1 = dict(dtc=0.7, gtc=0.7)
PSDS2 = dict(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5)


def sed(model, clips, classes, settings) -> dict:
    """Zero-shot sound event detection: each frame's cosine to each class prompt, median-filtered.

    PSDS1 and PSDS2 are DCASE's two scenarios, up to 100 effective false positives an hour, exact
    over all thresholds, with alpha_st 1 (MGA-CLAP's code: mean minus standard deviation over
    classes) and, in scores named _st0, 0. collar_F1: an event is found if a detection's onset lies
    within 0.2 s and its offset within max(0.2 s, 20 % of the event); segment_F1: in segments of
    1 s. Both F1 are macro means with the best threshold of each class, chosen on the scored clips
    themselves. raw: the cosine; centred: minus the frame's mean over classes. Clips without any
    event are left out, as in the authors' code. chance: random scores. Source: MGA-CLAP Table 4
    (DESED, URBAN-SED, AudioSet-Strong); its code, which is for AudioSet-Strong only, filters over
    3 frames of 0.31 s.
    """
    index = [
        i
        for i, row in enumerate(clips["rows"])
        if any(event["label"] in classes for event in row.get("events", []))
    ]
    if not index:
        raise ValueError(
            "sed: no event's label is in the class list (classes.txt beside the manifest)"
        )
    frame_s, width = model.frame_s, median_frames(settings.median_s, model.frame_s)
    rows = [
        with_duration(clips["rows"][i], clips["frame_embeds"][i], model, settings.crop)
        for i in index
    ]
    occurring = [c for c in classes if any(e["label"] == c for row in rows for e in row["events"])]
    columns = [classes.index(c) for c in occurring]
    class_embeds = common.embed_texts(model, class_prompts(classes, settings))
    raw = [clips["frame_embeds"][i] @ class_embeds.T for i in index]  # (T_i, C)
    # all classes count in the frame's mean, also those without an event, which are not scored
    filtered = {
        "": [median_filter(s, width)[:, columns] for s in raw],
        "_centred": [median_filter(s - s.mean(1, keepdims=True), width)[:, columns] for s in raw],
    }
    if len(classes) == 1:  # centred, the scores of a single class would all be 0
        del filtered["_centred"]
    rng = np.random.default_rng(0)  # fixed: every call gives the same chance level
    # filtered like the model's scores, since the filter changes how many detections there are
    random = {"": [median_filter(rng.random((len(s), len(columns))), width) for s in raw]}
    scenarios = (("PSDS1", PSDS1), ("PSDS2", PSDS2))

    def score(chosen, filtered=filtered):
        scores, of = {}, [rows[i] for i in chosen]
        for suffix, all_scores in filtered.items():
            given = [all_scores[i] for i in chosen]
            for name, scenario in scenarios:
                roc = psd_roc(given, of, occurring, frame_s, **scenario)
                scores[name + suffix] = psds(roc, 1.0)
                scores[f"{name}_st0{suffix}"] = psds(roc, 0.0)
            for name, f1 in (("collar_F1", collar_f1), ("segment_F1", segment_f1)):
                scores[name + suffix] = float(np.nanmean(f1(given, of, occurring, frame_s)))
        return scores

    chance = score(np.arange(len(rows)), random)
    chance |= {f"{name}_centred": value for name, value in chance.items()}
    details = {}
    for suffix, given in filtered.items():
        for name, scenario in scenarios:
            roc = psd_roc(given, rows, occurring, frame_s, **scenario)
            # one class at a time has no deviation over classes, so alpha_st is 0
            details[name + suffix] = {c: psds([one], 0.0) for c, one in zip(occurring, roc)}
        for name, f1 in (("collar_F1", collar_f1), ("segment_F1", segment_f1)):
            details[name + suffix] = per_class(occurring, f1(given, rows, occurring, frame_s))
    return result(
        "sed",
        score,
        len(rows),
        chance,
        settings,
        n_classes=len(occurring),
        details=details,
        prompt=settings.prompt,
        frame_s=frame_s,
        frame_rule=frame_rule(model),
        median=f"{width} frames, {width * frame_s:.2f} s",
        psds1=str(PSDS1),
        psds2=str(PSDS2),
        left_out=f"{len(clips['rows']) - len(index)} clips without an event",
    )


def grounding(model, clips, classes, settings) -> dict:
    """Text-to-audio grounding: when does a phrase sound? Every phrase of every clip is one query.

    PSDSm: the sigmoid of frame-phrase cosines is binarised at the 50 thresholds 0.01, 0.03, ...
    0.99 and median-filtered, gaps of at most 0.5 s (rounded up to whole frames) are closed; then
    PSDS with dtc = gtc = 0.5, one class, at most 800 false positives an hour (the paper prints no
    definition; its code and numbers allow this one). PSDS_exact: the same settings over all
    thresholds, on median-filtered cosines, without closing gaps. centred: minus the frame's mean
    over all phrases of the data. Phrases without a segment are left out; each of the others adds
    its clip's duration to the hours. chance: random scores. Source: MGA-CLAP Table 4 (TAG; the
    paper names neither version nor split, here AudioGrounding v2, test).
    """
    common.require(clips["rows"], "phrases")
    # a segment [0, 0] means that the phrase is not in the clip
    queries = [
        (i, p["phrase"], [s for s in p["segments"] if s[1] > s[0]])
        for i, row in enumerate(clips["rows"])
        for p in row["phrases"]
    ]
    total, queries = len(queries), [q for q in queries if q[2]]
    if not queries:
        raise ValueError("grounding: no phrase of the manifest has a segment")
    texts = sorted({phrase for _, phrase, _ in queries})
    embeds = common.embed_texts(model, texts)
    frame_s, width = model.frame_s, median_frames(settings.median_s, model.frame_s)
    gap = math.ceil(0.5 / frame_s)  # in frames, rounded up as in the authors' code
    of_clip = [[] for _ in clips["rows"]]  # numbers of each clip's queries
    raw, centred, random, rows, rng = [], [], [], [], np.random.default_rng(0)
    for k, (i, phrase, segments) in enumerate(queries):
        frame_embeds, text = clips["frame_embeds"][i], embeds[texts.index(phrase)]
        raw.append(frame_embeds @ text)
        # equals the cosine minus the frame's mean cosine with all phrases
        centred.append(frame_embeds @ (text - embeds.mean(0)))
        random.append(rng.uniform(-1, 1, len(frame_embeds)))
        # all phrases share one class, as in the authors' code
        events = [{"label": "phrase", "onset": on, "offset": off} for on, off in segments]
        row = {**clips["rows"][i], "events": events}
        rows.append(with_duration(row, frame_embeds, model, settings.crop))
        of_clip[i].append(k)

    def points_and_filtered(values):
        points = grounding_points(values, rows, frame_s, width, gap)  # (Q, 50, 2)
        return points, [median_filter(v[:, None], width) for v in values]

    prepared = {"": points_and_filtered(raw), "_centred": points_and_filtered(centred)}
    if len(texts) == 1:  # centred, the scores of a single phrase would all be 0
        del prepared["_centred"]

    def score(chosen, prepared=prepared):
        at = [k for i in chosen for k in of_clip[i]]
        given = [rows[k] for k in at]
        names = [name + suffix for suffix in prepared for name in ("PSDSm", "PSDS_exact")]
        if not given:  # a draw of clips without any scored phrase
            return dict.fromkeys(names, float("nan"))
        scores, n_events = {}, sum(len(row["events"]) for row in given)
        hours = sum(row["duration"] for row in given) / 3600
        for suffix, (points, filtered) in prepared.items():
            found, false = points[at].sum(0).T
            curve = staircase(found / n_events, false / hours, 800.0)
            scores["PSDSm" + suffix] = psds([curve], 0.0, 800.0)
            roc = psd_roc(
                [filtered[k] for k in at], given, ["phrase"], frame_s, 0.5, 0.5, max_efpr=800.0
            )
            scores["PSDS_exact" + suffix] = psds(roc, 0.0, 800.0)
        return scores

    chance = score(np.arange(len(of_clip)), {"": points_and_filtered(random)})
    chance |= {f"{name}_centred": value for name, value in chance.items()}
    return result(
        "grounding",
        score,
        len(of_clip),
        chance,
        settings,
        n_captions=len(queries),
        prompt="the phrase as written",
        frame_s=frame_s,
        frame_rule=frame_rule(model),
        median=f"{width} frames, {width * frame_s:.2f} s",
        gap=f"{gap} frames",
        psds="dtc 0.5, gtc 0.5, at most 800 false positives an hour",
        left_out=f"{total - len(queries)} phrases without a segment",
    )


# A caption counts for the first of these that it contains
CONNECTIVES = ("followed by", "and then", "then", "before", "after", "first", "while", ",")


def t_classify(model, clips, classes, settings) -> dict:
    """T-Classify: is the right order of events preferred to the wrong one?

    t2a (T-CLAP's name): the share of captions with a `negative`, the same events in another order,
    for which the clip's cosine to the caption is strictly larger than to the negative. a2t: among
    these captions, those of clips with a `swapped_audio`, the same sounds in another order: the
    share that lies strictly closer to the clip than to the swapped audio. A tie is a miss; ties are
    counted. The score is the micro-average over all pairs; details give each manifest and each
    connective alone, so that shortcuts ("first", commas) show, and every pair's margin. Source:
    T-CLAP Table 3 (AudioCaps, Clotho and ESC-mixed-up test; a2t ESC-mixed-up).
    """
    rows = clips["rows"]
    pairs = [
        (i, caption, negative)
        for i, row in enumerate(rows)
        for caption, negative in zip(row.get("captions", []), row.get("negatives", []))
        if negative
    ]
    if not pairs:
        raise ValueError("t_classify: no caption of the manifest has a negative")
    # clip -> (embed, frames) of its reordered audio, of clips with a pair
    swapped = {i: audio for i, audio in clips["swapped"].items() if i in {i for i, _, _ in pairs}}
    texts = sorted({model.clean_caption(text) for _, *two in pairs for text in two})
    column = {text: k for k, text in enumerate(texts)}
    sim = common.similarities(model, clips["audio_embeds"], clips["frame_embeds"], texts)
    right = np.array([sim[i, column[model.clean_caption(c)]] for i, c, _ in pairs])
    wrong = np.array([sim[i, column[model.clean_caption(w)]] for i, _, w in pairs])
    of_pair = {"t2a": (np.array([i for i, _, _ in pairs]), right - wrong)}  # clips, margins
    if swapped:
        back = common.similarities(
            model,
            np.stack([embed for embed, _ in swapped.values()]),
            [frame_embeds for _, frame_embeds in swapped.values()],
            texts,
        )
        at = {i: k for k, i in enumerate(swapped)}
        chosen = [k for k, (i, _, _) in enumerate(pairs) if i in at]
        # the caption's cosine with the swapped audio takes the place of the negative's
        other = [back[at[i], column[model.clean_caption(c)]] for i, c, _ in pairs if i in at]
        of_pair["a2t"] = of_pair["t2a"][0][chosen], right[chosen] - np.array(other)

    def score(chosen):
        times, scores = np.bincount(chosen, minlength=len(rows)), {}
        for way, (owner, margin) in of_pair.items():
            weight = times[owner]
            known = weight.sum() > 0
            hits = (margin > 0) * weight
            scores[way] = float(hits.sum() / weight.sum()) if known else float("nan")
        return scores

    details, by_connective = {}, {}
    for way, (owner, margin) in of_pair.items():
        captions = [c for i, c, _ in pairs if way == "t2a" or i in swapped]
        groups = {}
        for i, caption, m in zip(owner, captions, margin):
            manifest = rows[i]["where"].rpartition(":")[0]
            for name in (f"set {manifest}", f"connective {connective_of(caption)!r}"):
                groups.setdefault(name, []).append(m > 0)
        details[way] = {
            name: {"value": float(np.mean(hits)), "pairs": len(hits)}
            for name, hits in groups.items()
        }
        by_connective[way] = {
            name.partition(" ")[2]: f"{group['value']:.3f} of {group['pairs']}"
            for name, group in details[way].items()
            if name.startswith("connective")
        }
    details["margins"] = {way: margin.tolist() for way, (_, margin) in of_pair.items()}
    ties = {way: int((margin == 0).sum()) for way, (_, margin) in of_pair.items()}
    n_swapped = len(of_pair["a2t"][1]) if swapped else 0
    return result(
        "t_classify",
        score,
        len(rows),
        {"t2a": 0.5, "a2t": 0.5},
        settings,
        n_captions=len(pairs),
        details=details,
        prompt="captions as written, cleaned by the method",
        tie_rule=f"a tie is a miss; ties: {ties}",
        pairs=f"{len(pairs)} captions with a negative, {n_swapped} with swapped audio",
        by_connective=by_connective,
    )


def connective_of(caption: str) -> str:
    for word in CONNECTIVES:
        if re.search("," if word == "," else rf"\b{word}\b", caption.lower()):
            return word
    return "other"


@dataclasses.dataclass
class Protocol:
    score: Callable  # (model, clips, classes, settings) -> result
    key: str  # what a manifest's rows must have
    methods: tuple[str, ...] = ()  # the model must have one of these
    lacking: str = ""  # how messages describe a model without them


PROTOCOLS = {
    "retrieval": Protocol(retrieval, "captions"),
    "classification": Protocol(classification, "labels"),
    "tagging": Protocol(tagging, "labels"),
    "frames": Protocol(frames, "events", ("embed_frames",), "of whole clips"),
    "sed": Protocol(sed, "events", ("embed_frames",), "of whole clips"),
    "grounding": Protocol(grounding, "phrases", ("embed_frames",), "of whole clips"),
    "t_classify": Protocol(t_classify, "negatives"),
}


# ------------------------------------------------------------------------------------------------
# Frames as detections
# ------------------------------------------------------------------------------------------------


def with_duration(row: dict, frame_embeds, model, crop="all") -> dict:
    """The row with its scored duration: the clip's, or the window's where clips are repeated. With
    crop "first" duration and events end with the first window.
    """
    duration = row.get("duration") or len(frame_embeds) * model.frame_s
    if getattr(model, "repeats_short_clips", False):
        duration = max(duration, model.window_s)
    if crop == "first":
        duration = min(duration, len(frame_embeds) * model.frame_s)
        events = [
            {**event, "offset": min(event["offset"], duration)}
            for event in row["events"]
            if event["onset"] < duration
        ]
        row = {**row, "events": events}
    return {**row, "duration": duration}


def frame_rule(model) -> str:
    if getattr(model, "repeats_short_clips", False):
        return f"clips are repeated to {model.window_s:g} s, all of their frames are scored"
    return "frames end with the clip; a last window shorter than a frame adds none"


def frame_edges(n_frames: int, frame_s: float, duration: float) -> np.ndarray:
    """(n_frames + 1,) edges of the frames in seconds; the last one is not after the clip's end."""
    edges = np.arange(n_frames + 1) * frame_s
    # at least 1 ms, since a declared duration may be shorter than the audio
    edges[-1] = max(min(edges[-1], duration), edges[-2] + 1e-3)
    return edges


def timeline(scores: list, rows: list[dict], frame_s: float):
    """Put the frames' edges of all clips one after another.

    Returns: begin (N + 1,), where each clip's edges start; edges (E,), seconds in their clip.
    """
    begin = np.cumsum([0] + [len(s) + 1 for s in scores])  # one more edge than frames
    edges = [frame_edges(len(s), frame_s, row["duration"]) for s, row in zip(scores, rows)]
    return begin, np.concatenate(edges)


def class_timeline(scores: list, column: int, begin) -> np.ndarray:
    """(E,) scores of one class on the `timeline`, -inf at the last edge of every clip."""
    # at least float32; float64 scores keep their precision
    flat = np.full(begin[-1], -np.inf, np.result_type(scores[0], np.float32))
    inside = np.ones(len(flat), bool)
    inside[begin[1:] - 1] = False
    flat[inside] = np.concatenate([s[:, column] for s in scores])
    return flat


def at_least(value, limit):
    """value >= limit, both rounded to microseconds, so that a value on the limit counts."""
    return np.round(value, 6) >= np.round(limit, 6)


def median_frames(seconds: float, frame_s: float) -> int:
    """The odd number of frames nearest to `seconds`, at least 1; odd, to have a middle frame."""
    return 2 * max(0, round((seconds / frame_s - 1) / 2)) + 1


def median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """Median of x (T, ...) over `width` (odd) frames; the first and last frames are repeated."""
    padded = np.concatenate([np.repeat(x[:1], width // 2, 0), x, np.repeat(x[-1:], width // 2, 0)])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=0), axis=-1)


def runs(active: np.ndarray):
    """active (T,) of 0 and 1, or bool -> where each run of ones starts and stops (exclusive)."""
    change = np.diff(np.concatenate([[0], active.astype(int), [0]]))
    return np.flatnonzero(change > 0), np.flatnonzero(change < 0)


def detections(scores: np.ndarray):
    """Every interval that becomes one detection at some threshold.

    As the threshold falls, a run of frames becomes a detection once the threshold is below the
    run's lowest score, and ends, in a longer run, once it is below the higher score of the two
    frames beside the run.
    Args: scores (E,), all clips one after another, -inf after each.
    Returns: start, stop (K,) indices into scores (stop exclusive), top, floor (K,): the interval is
    a detection for every threshold t with floor <= t < top (a frame is active where score > t).
    """
    n = len(scores)
    lowest, width = [scores], 1  # lowest[k][i]: the minimum of scores[i : i + 2**k]
    # until every interval of this width crosses the end of a clip, as no run does
    while width < n and (lowest[-1] > -np.inf).any():
        half = lowest[-1]
        beyond = np.full(min(width, n), -np.inf, half.dtype)
        lowest.append(np.minimum(half, np.concatenate([half[width:], beyond])))
        width *= 2
    # The run of a frame is the widest one around it in which no frame is lower. It grows to both
    # sides by powers of two, the largest first
    start = np.flatnonzero(scores > -np.inf)
    value, stop = scores[start], start + 1
    for k in reversed(range(len(lowest))):
        # equal frames have the same run and only the last of them keeps it, so a run grows over
        # equal frames to the left only
        further = np.maximum(start - 2**k, 0)
        start = np.where((start >= 2**k) & (lowest[k][further] >= value), further, start)
        further = np.minimum(stop, n - 1)
        stop = np.where((stop < n) & (lowest[k][further] > value), stop + 2**k, stop)
    floor = np.maximum(np.where(start > 0, scores[start - 1], -np.inf), scores[stop])
    lives = value > floor
    return start[lives], stop[lives], value[lives], floor[lives]


def largest_matching(pairs: list[tuple]) -> int:
    """Size of the largest set of (detection, event) pairs in which nothing occurs twice."""
    events, owner = {}, {}
    for detection, event in pairs:
        events.setdefault(detection, []).append(event)

    # augmenting paths: a matched event is freed if its detection finds another event
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
    """Largest F1 over all thresholds, from the changes of true positives and detections at each."""
    order = np.argsort(-thresholds, kind="stable")
    order = order[thresholds[order] > -np.inf]
    if not len(order):
        return 0.0
    # all changes at one threshold happen together
    last = np.append(np.diff(thresholds[order]) != 0, True)
    n_found, n_detected = np.cumsum(found[order])[last], np.cumsum(detected[order])[last]
    return float((2 * n_found / (n_detected + n_events)).max())


def collar_f1(
    scores, rows, classes, frame_s, onset_s=0.2, offset_s=0.2, offset_share=0.2
) -> np.ndarray:
    """Event-based F1 of each class (C,) at its best threshold.

    Source: Mesaros et al., Applied Sciences 2016.

    Args: scores: list of (T_i, C), column k for classes[k]; rows: with "events" [{label, onset,
    offset}] and "duration", in seconds; frame_s: seconds per frame. NaN for a class without an
    event.
    """
    begin, edges = timeline(scores, rows, frame_s)
    best = []
    for c, name in enumerate(classes):
        start, stop, top, floor = detections(class_timeline(scores, c, begin))
        # a detection appears at its top and disappears at its floor; true positives follow below
        thresholds, found = [top, floor], [np.zeros(2 * len(top))]
        detected, n_events = [np.ones(len(top)), -np.ones(len(top))], 0
        for i, row in enumerate(rows):
            events = [(e["onset"], e["offset"]) for e in row["events"] if e["label"] == name]
            if not events:
                continue
            n_events += len(events)
            own = np.arange(*np.searchsorted(start, begin[[i, i + 1]]))  # the clip's detections
            hits = []  # (detection, event)
            for g, (on, off) in enumerate(events):
                collar_s = max(offset_s, offset_share * (off - on))
                # rounded, so that a time exactly on the collar counts
                near = np.round(np.abs(edges[start[own]] - on) - onset_s, 6) <= 0
                near &= np.round(np.abs(edges[stop[own]] - off) - collar_s, 6) <= 0
                hits += [(k, g) for k in own[near]]
            # a detection and an event match once only, so each level needs a matching of its own
            before = 0
            for level in sorted({t for k, _ in hits for t in (top[k], floor[k])}, reverse=True):
                now = largest_matching([(k, g) for k, g in hits if floor[k] < level <= top[k]])
                thresholds.append(np.array([level]))
                found.append(np.array([now - before]))
                detected.append(np.zeros(1))
                before = now
        changes = [np.concatenate(parts) for parts in (thresholds, found, detected)]
        best.append(best_f1(*changes, n_events) if n_events else np.nan)
    return np.array(best)


def segment_f1(scores, rows, classes, frame_s, segment_s=1.0) -> np.ndarray:
    """Segment-based F1 of each class (C,) at its best threshold.

    Source: Mesaros et al., Applied Sciences 2016.

    A segment's score is the largest score of the frames that overlap it; a segment is positive if
    an event overlaps it. NaN for a class without an event. Args as in `collar_f1`.
    """
    values, targets = [], []
    for s, row in zip(scores, rows):
        edges = frame_edges(len(s), frame_s, row["duration"])
        n_segments = math.ceil(round(edges[-1] / segment_s, 6))  # 10.0000001 s are 10 segments
        # the last segment may be shorter: it ends with the clip
        bounds = np.round(np.append(np.arange(n_segments) * segment_s, edges[-1]), 6)
        inside = edges[:-1] < bounds[1:, None] - 1e-6  # (segments, T)
        inside &= edges[1:] > bounds[:-1, None] + 1e-6
        values.append(np.where(inside[:, :, None], s, -np.inf).max(1))
        target = np.zeros(values[-1].shape, bool)
        for e in row["events"]:
            if e["label"] in classes:
                touched = (bounds[:-1] < e["offset"]) & (bounds[1:] > e["onset"])
                target[touched, classes.index(e["label"])] = True
        targets.append(target)
    values, targets = np.concatenate(values), np.concatenate(targets)
    best = np.full(len(classes), np.nan)
    for c in np.flatnonzero(targets.any(0)):
        # a threshold below its score makes a segment a detection; the positive ones are right
        found, detected = targets[:, c].astype(float), np.ones(len(values))
        best[c] = best_f1(values[:, c], found, detected, int(targets[:, c].sum()))
    return best


def grounding_points(values, rows, frame_s, width: int, gap: int) -> np.ndarray:
    """(Q, 50, 2): found events and false detections of each query at each of PSDSm's thresholds.

    Args: values: for each query (T_i,); rows: with "events" [{onset, offset}] and "duration", in
    seconds; frame_s: seconds per frame; width (odd), gap: in frames.
    """
    thresholds, points = np.arange(0.01, 1, 0.02), np.zeros((len(values), 50, 2))
    for k, (v, row) in enumerate(zip(values, rows)):
        edges = frame_edges(len(v), frame_s, row["duration"])
        onset, offset = (np.array([e[key] for e in row["events"]]) for key in ("onset", "offset"))
        active = (1 / (1 + np.exp(-v)))[:, None] > thresholds  # (T, 50)
        # binarised first, then filtered, as in the authors' code
        active = median_filter(active.astype(np.int8), width) > 0.5
        for level in np.flatnonzero(active.any(0)):
            start, stop = runs(active[:, level])
            # a gap of at most `gap` frames joins two runs
            apart = start[1:] - stop[:-1] > gap
            start, stop = start[np.append(True, apart)], stop[np.append(apart, True)]
            begin_s, end_s = edges[start], edges[stop]
            overlap = np.minimum(end_s[:, None], offset) - np.maximum(begin_s[:, None], onset)
            overlap = np.maximum(overlap, 0)  # (detections, events)
            right = at_least(overlap.sum(1), 0.5 * (end_s - begin_s))  # dtc 0.5
            # gtc 0.5: only right detections can find an event
            found = at_least(overlap[right].sum(0), 0.5 * (offset - onset))
            points[k, level] = found.sum(), (~right).sum()
    return points


# ------------------------------------------------------------------------------------------------
# PSDS, the polyphonic sound detection score
# ------------------------------------------------------------------------------------------------


def psd_roc(
    scores: list,
    rows: list[dict],
    classes: list[str],
    frame_s: float,
    dtc: float,
    gtc: float,
    cttc: float | None = None,
    alpha_ct: float = 0.0,
    max_efpr: float | None = 100.0,
) -> list:
    """True positive ratio against effective false positives an hour, over all thresholds.

    Exact: each threshold between two scores is an operating point. Memory does not grow with the
    number of class pairs. Source: Bilen et al., ICASSP 2020 (definition); Ebbers et al., ICASSP
    2022 (all thresholds at once).

    Args
        scores: list of (T_i, C), any real numbers, column k for classes[k]; rows: with "events"
            [{label, onset, offset}] and "duration", in seconds; frame_s: seconds per frame.
        dtc: a detection counts if this share of it lies in events of its class, else it is a false
            positive; gtc: an event is found if this share of it lies in detections that count.
        cttc, alpha_ct: a false positive also costs alpha_ct * (its rate per hour of another class's
            events, mean over the other classes) if the share cttc of it lies in that class's
            events.
        max_efpr: end of the curves, in false positives an hour; None: no limit.
    A class without an event has no true positive ratio and is left out.
    Returns: for each class with events (efpr (P,), tpr (P,)), ascending, starting at (0, 0) or
    better. Copied alone, needs timeline, class_timeline, frame_edges, detections, at_least,
    events_by_class, event_coverage, coverage_by_clip, found_events, staircase.
    """
    begin, edges = timeline(scores, rows, frame_s)
    hours = sum(row["duration"] for row in rows) / 3600
    columns, events = events_by_class(rows, classes)
    if not columns:
        raise ValueError(
            "no event of the clips is of one of the classes; detection cannot be scored"
        )
    covered = event_coverage(events, begin, edges)
    by_clip, weight = [], np.zeros(len(columns))
    if cttc is not None:
        by_clip = coverage_by_clip(covered, begin)
        # cross triggers are counted per hour of the other class's events, not of all audio
        event_hours = [sum(off - on for _, on, off in of_class) / 3600 for of_class in events]
        per_hour = np.array([0.0 if h == 0 else 1 / h for h in event_hours])
        weight = alpha_ct / max(len(columns) - 1, 1) * per_hour
    roc = []
    for c, column in enumerate(tqdm(columns, desc="PSDS", unit="class", leave=False, delay=2)):
        flat = class_timeline(scores, column, begin)
        if np.isnan(flat).any():
            raise FloatingPointError(
                f"some scores of class {classes[column]!r} are NaN; the model's weights are broken"
            )
        start, stop, top, floor = detections(flat)
        # own (E,): seconds of own events before each edge, so that a difference is an overlap
        seconds, own = edges[stop] - edges[start], np.zeros(len(edges))
        for i, cover in covered[c].items():
            own[begin[i] : begin[i + 1]] = cover
        counts = at_least(own[stop] - own[start], dtc * seconds)
        wrong = ~counts
        clip = np.searchsorted(begin, start[wrong], side="right") - 1
        cost = np.full(wrong.sum(), 1 / hours)
        for other, cover in by_clip:
            inside = cover[stop[wrong]] - cover[start[wrong]]
            crosses = (other[clip] >= 0) & (other[clip] != c)
            crosses &= at_least(inside, cttc * seconds[wrong])
            cost[crosses] += weight[other[clip[crosses]]]
        levels, found = found_events(events[c], begin, edges, start, stop, top, floor, counts, gtc)
        # as the threshold falls, a false positive starts to cost at its top and stops at its floor
        thresholds = np.concatenate([top[wrong], floor[wrong], levels])
        found = np.concatenate([np.zeros(2 * wrong.sum()), found])
        costs = np.concatenate([cost, -cost, np.zeros(len(levels))])
        order = np.argsort(-thresholds)
        order = order[thresholds[order] > -np.inf]
        # the last change at each threshold: all changes at one threshold happen together
        last = np.append(np.diff(thresholds[order]) != 0, True)[: len(order)]
        tpr = np.cumsum(found[order])[last] / len(events[c])
        # rounded, so that sums of the same terms in another order are equal
        efpr = np.cumsum(costs[order])[last].round(9)
        roc.append(staircase(tpr, efpr, max_efpr))
    return roc


def events_by_class(rows: list[dict], classes: list[str]):
    """-> columns of the classes that occur; for each its (clip, onset, offset) in seconds."""
    events = {}
    for i, row in enumerate(rows):
        for event in row.get("events", []):
            events.setdefault(event["label"], []).append((i, event["onset"], event["offset"]))
    columns = [k for k, name in enumerate(classes) if name in events]
    return columns, [events[classes[k]] for k in columns]


def event_coverage(events: list, begin, edges) -> list[dict]:
    """For each class {clip: seconds of its events before each edge of the clip (T_i + 1,)}."""
    covered = [{} for _ in events]
    for of_class, cover in zip(events, covered):
        until = {}  # clip -> end of its events so far, since overlapping events cover a time once
        for i, on, off in sorted(of_class):
            on = max(on, until.get(i, on))
            off = until[i] = max(on, off)
            seconds = np.clip(edges[begin[i] : begin[i + 1]] - on, 0, off - on)
            cover[i] = cover.get(i, 0) + seconds
    return covered


def coverage_by_clip(covered: list[dict], begin) -> list[tuple]:
    """`event_coverage` arranged by clip: the k-th class that occurs in each clip, k = 0, 1, ...

    Returns: for each k (class (N,), -1 where a clip has fewer; seconds before each edge (E,)), so
    that memory grows with the largest number of classes in a clip, not with that of all classes.
    """
    n_clips, parts = len(begin) - 1, []
    taken = np.zeros(n_clips, int)
    for c, clips in enumerate(covered):
        for i, seconds in clips.items():
            if taken[i] == len(parts):
                parts.append((np.full(n_clips, -1), np.zeros(begin[-1])))
            which, cover = parts[taken[i]]
            which[i] = c
            cover[begin[i] : begin[i + 1]] = seconds
            taken[i] += 1
    return parts


def found_events(events, begin, edges, start, stop, top, floor, counts, gtc):
    """Thresholds where an event becomes found or lost -> levels (P,), 1 or -1 at each (P,)."""
    levels, changes = [np.zeros(0)], [np.zeros(0)]
    for i, on, off in events:
        own = slice(*np.searchsorted(start, begin[[i, i + 1]]))  # the clip's detections
        overlap = np.minimum(edges[stop[own]], off) - np.maximum(edges[start[own]], on)
        reach = counts[own] & (overlap > 0)
        level = np.concatenate([top[own][reach], floor[own][reach]])
        order = np.argsort(-level, kind="stable")
        # the detections at one threshold are disjoint, so their overlaps with the event add up
        within = np.cumsum(np.concatenate([overlap[reach], -overlap[reach]])[order])
        change = np.diff(at_least(within, gtc * (off - on)).astype(float), prepend=0.0)
        levels.append(level[order][change != 0])
        changes.append(change[change != 0])
    return np.concatenate(levels), np.concatenate(changes)


def staircase(tpr, efpr, max_efpr: float | None):
    """Operating points in any order -> (efpr, tpr) of the best curve's steps, from (0, 0) on."""
    tpr, efpr = np.append(0.0, tpr), np.append(0.0, efpr)
    order = np.lexsort((-tpr, efpr))  # by eFPR, for equal ones the highest TPR first
    # at each eFPR the best operating point that costs no more
    tpr, efpr = np.maximum.accumulate(tpr[order]), efpr[order]
    rises = np.append(True, np.diff(tpr) > 0)
    if max_efpr is None:  # keep the end of the axis
        rises[-1] = True
    else:
        rises &= efpr <= max_efpr
    return efpr[rises], tpr[rises]


def psds(roc: list, alpha_st: float = 1.0, max_efpr: float | None = 100.0) -> float:
    """Polyphonic sound detection score in [0, 1]: the area under the mean curve of `psd_roc`.

    Its height at an eFPR is the mean over classes of the true positive ratio, minus alpha_st times
    their population standard deviation, but not below 0. max_efpr, in false positives an hour, is
    at most that of `psd_roc`; None: up to the largest eFPR of any class. Copied alone, needs
    nothing else.
    """
    # running sums over the steps of all classes: mean and mean square need no common grid of eFPR
    at = np.concatenate([efpr for efpr, _ in roc])
    end = at.max() if max_efpr is None else max_efpr
    at = np.minimum(at, end)  # steps beyond the end have no width
    step = np.concatenate([np.diff(tpr, prepend=0.0) for _, tpr in roc])
    square = np.concatenate([np.diff(tpr**2, prepend=0.0) for _, tpr in roc])
    order = np.argsort(at, kind="stable")
    mean, mean_square = np.cumsum(step[order]) / len(roc), np.cumsum(square[order]) / len(roc)
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))  # rounding may leave less than 0
    height = np.maximum(mean - alpha_st * deviation, 0)
    return float((height * np.diff(np.append(at[order], end))).sum() / end)


# ------------------------------------------------------------------------------------------------
# Results: scores with intervals, differences
# ------------------------------------------------------------------------------------------------


def per_class(classes, values) -> dict:
    """Class name -> value, classes without one left out."""
    return {c: float(v) for c, v in zip(classes, values) if np.isfinite(v)}


def class_prompts(classes, settings) -> list[str]:
    """The prompt filled with each class name; underscores and slashes become spaces."""
    return [settings.prompt.format(re.sub("[_/]", " ", c)) for c in classes]


def interval(values: list[float]) -> dict:
    """The 95 % interval of the bootstrap draws; None without draws."""
    if not values:
        return {"low": None, "high": None}
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def result(
    protocol, score, n_clips, chance, settings, n_captions=0, n_classes=0, details=None, **told
) -> dict:
    """Evaluate `score` on all clips and on bootstrap draws of clips -> the result for --json.

    Args: score: indices of clips (with repeats) -> {name: value}; details: per query and per class;
        told: further rules to print.
    The draws depend only on the number of clips, so that those of two models are paired.
    """
    start = time.perf_counter()
    values = score(np.arange(n_clips))
    for name, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f"{protocol}: {name} has no value on these clips")
    # the draws take ten minutes at most; fewer than twenty of them give no interval
    n_draws = min(settings.bootstrap, int(600 / (time.perf_counter() - start)))
    n_draws = n_draws if n_draws >= 20 else 0
    rng, draws = np.random.default_rng(0), []
    for _ in tqdm(range(n_draws), desc=f"{protocol}: bootstrap", unit="draw", leave=False):
        draws.append(score(rng.integers(0, n_clips, n_clips)))
    scores = {
        name: {"value": value, **interval([d[name] for d in draws if np.isfinite(d[name])])}
        for name, value in values.items()
    }
    split = settings.split
    if split == "all rows":
        split += " (clips that a model was trained on may be among them)"
    if settings.fold is not None:
        split += f", fold {settings.fold}"
    return {
        "protocol": protocol,
        "settings": {
            "crop": crop_text(settings),
            "split": split,
            "bootstrap_draws": len(draws),
            "checkpoint": str(settings.checkpoint),
            "data": settings.data,
            **told,
        },
        "n_clips": n_clips,
        "n_captions": n_captions,
        "n_classes": n_classes,
        "scores": scores,
        "chance": {name: chance[name] for name in scores},
        "details": details or {},
        "draws": draws,
    }


def crop_text(settings) -> str:
    """What was done with clips that are not as long as the model's window."""
    if settings.crop_rule and settings.crop == "first":
        return f"cut to the first {settings.window_s:g} s, then: {settings.crop_rule}"
    if settings.crop_rule:
        return settings.crop_rule
    windows = "all consecutive windows, averaged by their seconds"
    if settings.crop == "first":
        windows = "first window only"
    return f"zero-padded to {settings.window_s:g} s; {windows}"


def differences(first: dict, other: dict) -> dict:
    """Score of `other` minus that of `first`, two results of one protocol, with its interval."""
    out = {}
    for name, s in other["scores"].items():
        if name in first["scores"]:
            # draw k is the same clips for both: the interval is that of a paired difference
            drawn = [b[name] - a[name] for a, b in zip(first["draws"], other["draws"])]
            value = s["value"] - first["scores"][name]["value"]
            out[name] = {"value": value, **interval([d for d in drawn if np.isfinite(d)])}
    return out


def show(r: dict) -> None:
    """Print a result: its rules, then its scores."""
    counts = [f"{r['n_clips']} clips"]
    if r["n_captions"]:
        counts.append(f"{r['n_captions']} captions")
    if r["n_classes"]:
        counts.append(f"{r['n_classes']} classes")
    print(f"\n{r['protocol']}: {', '.join(counts)}")
    for key, value in r["settings"].items():
        if key not in ("checkpoint", "data"):
            print(f"  {key}: {value!r}" if key == "prompt" else f"  {key}: {value}")
    print(f"  {'score':<22}{'value':>8}  {'95 % interval':<16}{'chance':>8}")
    for name, s in r["scores"].items():
        between = "" if s["low"] is None else f"[{s['low']:.3f}, {s['high']:.3f}]"
        print(f"  {name:<22}{s['value']:>8.3f}  {between:<16}{r['chance'][name]:>8.3f}")


def compare(checkpoints: list, all_results: list[list[dict]]) -> None:
    """Compare every further model with the first: print and store the differences of scores."""
    for other, results in zip(checkpoints[1:], all_results[1:]):
        print(f"\n{other} less {checkpoints[0]} (paired over clips; * = the interval leaves out 0)")
        for r in results:
            # with another number of clips the draws are not paired
            same = (r["protocol"], r["n_clips"])
            first = [f for f in all_results[0] if (f["protocol"], f["n_clips"]) == same]
            if not first:
                print(
                    f"  {r['protocol']}: not comparable, the first model was not scored on the "
                    "same clips"
                )
                continue
            scores = differences(first[0], r)
            r["differences"] = {"to": str(checkpoints[0]), "scores": scores}
            for name, d in scores.items():
                between = ""
                if d["low"] is not None:
                    mark = " *" if d["low"] > 0 or d["high"] < 0 else ""
                    between = f"[{d['low']:+.3f}, {d['high']:+.3f}]{mark}"
                print(f"  {r['protocol'] + ' ' + name:<32}{d['value']:>+8.3f}  {between}")


# ------------------------------------------------------------------------------------------------
# Loading any model and any manifest
# ------------------------------------------------------------------------------------------------


def find_model(path) -> None:
    """FileNotFoundError for a path that is neither a file, a folder nor a hub id."""
    is_file_name = Path(path).suffix in (".pt", ".pth", ".ckpt")
    if not Path(path).exists() and (is_file_name or str(path).count("/") != 1):
        raise FileNotFoundError(f"{path}: no such weight file, folder or hub id (owner/name)")


def load_model(path, text_model: str | None = None, variant: str | None = None):
    """The Model of a checkpoint, a published file, a folder or a hub id, ready to evaluate.

    Files are recognised by their keys: this project's checkpoints name their script; MGA-CLAP's
    model.pt, LAION-CLAP's .pt, MS-CLAP 2022's and Cacophony's torch files have keys of their own
    (all need `text_model`'s tokenizer). A folder or hub id is a transformers CLAP. variant: compute
    like this variant of the script, one of its Model's `variants`; None: as it was trained.
    """
    find_model(path)
    script, constructor, given = told_by_keys(path, text_model)
    model_class = importlib.import_module(script).Model
    if variant is not None:
        variants = getattr(model_class, "variants", ())
        if variant not in variants:
            raise ValueError(
                f"--variant {variant}: variants that change what a model of {script}.py computes: "
                f"{', '.join(variants) or 'none'}"
            )
        given["variant"] = variant
    return getattr(model_class, constructor)(path, **given)


def told_by_keys(path, text_model: str | None) -> tuple[str, str, dict]:
    """-> the script, the constructor of its Model, and that constructor's arguments."""
    if not Path(path).is_file():
        return "t_clap", "from_published", {}
    content = common.read_weights(path)
    if content.get("method") in METHODS:
        return content["method"], "from_checkpoint", {}
    # published weight files hold no tokenizer
    bert = {"text_model": text_model or "bert-base-uncased"}
    roberta = {"text_model": text_model or "roberta-base"}
    weights = content.get("model", {})
    if "codebook" in weights:
        return "mga_clap", "from_checkpoint", bert
    if any(str(key).startswith("caption_encoder.base.") for key in weights):
        return "curation_clap", "from_published", bert
    weights = content.get("state_dict", content.get("model_state_dict", content))
    keys = {str(key).removeprefix("module.") for key in weights}
    if any(key.startswith("audio_module.") for key in keys):
        return "cacophony", "from_published", roberta
    if any(key.startswith("audio_branch.") for key in keys):
        return "t_clap", "from_published", roberta
    raise ValueError(
        f"{path}: not a checkpoint this evaluator knows (method {content.get('method')!r}; known: "
        f"{', '.join(METHODS)}, MGA-CLAP's model.pt, LAION-CLAP's .pt, MS-CLAP 2022's, Cacophony's "
        "torch file, transformers CLAP folders)"
    )


def open_model(checkpoint, flags, split: str, manifest: list[dict]):
    """-> the model on its device, and the Settings under which it is scored."""
    model = load_model(checkpoint, flags.text_model, flags.variant)
    model = model.to(common.start_device(flags.device))
    settings = Settings(
        checkpoint=checkpoint,
        data=flags.data,
        split=split,
        manifest=manifest,
        window_s=model.window_s,
        crop=flags.crop,
        crop_rule=getattr(model, "crop_rule", None),
        prompt=PROMPTS.get(flags.prompt, flags.prompt),
        median_s=flags.median_s,
        bootstrap=flags.bootstrap,
        flags=flags,
        fold=flags.fold,
    )
    return model, settings


def embed(model, rows: list[dict], settings, frames=False, desc="embedding audio"):
    """Embed the rows' files; unreadable files are reported, too many of them are an error.

    Returns: indices of the rows that could be read, audio_embeds (N, D), and the frames that
    `frames` asks for (see common.embed_files): a list of (T_i, D), or None.
    """
    flags = settings.flags
    kept, audio_embeds, frame_embeds, bad = common.embed_files(
        model, rows, flags.batch_size, flags.workers, settings.crop, frames, desc
    )
    report_left_out(bad, len(rows), flags.max_bad)
    return kept, audio_embeds, frame_embeds


def report_left_out(bad: list[str], total: int, max_bad: float) -> None:
    for text in bad:
        print(f"left out: {text}")
    if len(bad) > max_bad * total:
        raise ValueError(
            f"{len(bad)} of {total} files could not be used, more than --max-bad {max_bad:.0%}; "
            "mend or remove them, or raise --max-bad"
        )


def read_rows(flags) -> tuple[list[dict], str, list[dict]]:
    """-> the manifest's rows of every split, the scored split, and its rows, one a file."""
    manifest, split = common.read_manifest(flags.data), flags.split
    if split is None:  # test rows where there are any, else everything
        split = "test" if any(row.get("split") == "test" for row in manifest) else "all"
    rows = manifest
    if split == "all":
        split = "all rows"
    else:
        rows = [row for row in manifest if row.get("split", "train") == split]
    if not rows:
        raise ValueError(
            f"--split {split}: no row of the manifest is in it (rows without a split are for "
            "training)"
        )
    for item in flags.data if len(flags.data) > 1 else []:
        path = common.manifest_path(item)
        if not any(row["where"].startswith(f"{path}:") for row in rows):
            print(f"--data {item}: none of its rows is in split {split}, so none is scored")
    if flags.fold is not None:
        # compared as text: a manifest's folds are numbers or names
        folds = sorted({str(row["fold"]) for row in rows if "fold" in row})
        rows = [row for row in rows if str(row.get("fold")) == flags.fold]
        if not rows:
            raise ValueError(
                f"--fold {flags.fold}: no row of split {split} is in it; folds there: "
                f"{', '.join(folds) or 'none'}"
            )
    merged = common.merge_rows(rows)
    if len(merged) < len(rows):
        print(
            f"{len(rows)} rows of the manifest are {len(merged)} files: rows of one file were "
            "merged"
        )
    return manifest, split, merged


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------


def check_flags(flags) -> None:
    """ValueError or PermissionError now for flags that would fail after minutes of embedding."""
    common.start_device(flags.device)
    prompt = PROMPTS.get(flags.prompt, flags.prompt)
    if prompt.count("{}") != 1 or set(prompt.replace("{}", "")) & set("{}"):
        raise ValueError(
            f"--prompt {prompt!r}: must hold {{}} once, where the class name goes, or be one of "
            f"{', '.join(PROMPTS)}"
        )
    if not 0 <= flags.median_s < math.inf:
        raise ValueError(f"--median-s {flags.median_s}: expected seconds, 0 for no filter")
    if flags.batch_size < 1 or not 0 <= flags.max_bad <= 1:
        raise ValueError(
            f"--batch-size {flags.batch_size}, --max-bad {flags.max_bad}: expected at least 1, and "
            "a share between 0 and 1"
        )
    check_target("--json", getattr(flags, "json", None))
    for checkpoint in flags.checkpoint:
        find_model(checkpoint)


def check_target(flag: str, path: str | None) -> None:
    """PermissionError if a file cannot be written, before hours of work."""
    if path and (Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK)):
        raise PermissionError(
            f"{flag} {path}: a folder, or in a folder that does not exist or cannot be written"
        )


def wanted_protocols(model, rows: list[dict], settings, protocols: dict) -> list[str]:
    """The protocols that --protocol asks for; `all`: those that rows and model allow."""
    asked, wanted = settings.flags.protocol, []
    keys = list(dict.fromkeys(protocol.key for protocol in protocols.values()))
    if not any(row.get(key) for row in rows for key in keys):
        raise ValueError(
            f"no row of split {settings.split} has anything to score; a protocol needs one of "
            f"{', '.join(keys)}"
        )
    for name, protocol in protocols.items():
        if name not in asked and "all" not in asked:
            continue
        has_key = any(row.get(protocol.key) for row in rows)
        if not has_key and name in asked:
            raise ValueError(
                f"--protocol {name} needs '{protocol.key}' in the manifest; no row of split "
                f"{settings.split} has them"
            )
        lacks = protocol.methods and not any(hasattr(model, m) for m in protocol.methods)
        message = (
            f"{settings.checkpoint} is a model {protocol.lacking} (it has no "
            f"{' or '.join(protocol.methods)} method)"
        )
        if lacks and name in asked:
            raise ValueError(f"--protocol {name}: {message}")
        if lacks and has_key:
            print(f"{name}: not run, {message}")
        elif has_key:
            wanted.append(name)
    return wanted


def embed_clips(model, rows: list[dict], settings, frames: bool) -> dict:
    """The clips as the protocols take them; a model that compares pairs always needs frames."""
    frames = frames or getattr(model, "pairwise", False)
    kept, audio_embeds, frame_embeds = embed(model, rows, settings, frames)
    return {
        "rows": [rows[i] for i in kept],
        "audio_embeds": audio_embeds,
        "frame_embeds": frame_embeds,
        "swapped": {},
    }


def embed_swapped(model, rows: list[dict], settings) -> dict:
    """{clip: (embedding, frames or None) of its swapped_audio}; without any there is no a2t."""
    owner = [k for k, row in enumerate(rows) if row.get("swapped_audio")]
    if not owner:
        return {}
    flags, files = settings.flags, [{"audio": rows[k]["swapped_audio"]} for k in owner]
    try:
        kept, embeds, frame_embeds, bad = common.embed_files(
            model,
            files,
            flags.batch_size,
            flags.workers,
            settings.crop,
            getattr(model, "pairwise", False),
            "embedding swapped audio",
        )
    except ValueError as error:
        print(f"left out: all swapped audio, so no a2t ({error})")
        return {}
    for text in bad:
        print(f"left out: {text}")
    frame_embeds = frame_embeds or [None] * len(kept)
    return {owner[i]: (embeds[k], frame_embeds[k]) for k, i in enumerate(kept)}


def evaluate(model, rows: list[dict], settings, protocols: dict):
    """Score one model by every wanted protocol, one result after the other."""
    wanted = wanted_protocols(model, rows, settings, protocols)
    # without classes.txt the labels of all splits and folds
    classes = common.read_classes(settings.data, settings.manifest)
    frames = any("embed_frames" in protocols[name].methods for name in wanted)
    clips = embed_clips(model, rows, settings, frames)
    labels = {label for row in rows for label in row.get("labels", [])}
    labels |= {event["label"] for row in rows for event in row.get("events", [])}
    outside = sorted(labels - set(classes))
    if outside:
        more = ", ..." if len(outside) > 10 else ""
        print(
            f"{len(outside)} label(s) outside the class list do not count: "
            f"{', '.join(outside[:10])}{more}"
        )
    if "t_classify" in wanted:  # no other protocol needs the swapped audio
        clips["swapped"] = embed_swapped(model, clips["rows"], settings)
    for name in wanted:
        try:
            yield protocols[name].score(model, clips, classes, settings)
        except ValueError as error:
            if name in settings.flags.protocol:
                raise
            # under `all`, a protocol that cannot run must not cost the results of the others
            print(f"\n{name}: not run, {error}")


def write_json(path: str | None, all_results: list[list[dict]]) -> list[dict]:
    """All results as one list without the bootstrap draws; also written to `path` if given."""
    flat = [r for results in all_results for r in results]
    flat = [{key: value for key, value in r.items() if key != "draws"} for r in flat]
    if path:
        common.write_lines(Path(path), [json.dumps(flat, indent=1)])
    return flat


def embed_command(flags) -> None:
    """`eval.py embed`: write a folder with the embeddings of a manifest's clips and captions.

    audio.npy (N, D) and audio.jsonl, the clips as a manifest; text.npy (Q, D) and captions.jsonl,
    each caption with its `owner`, the line of its clip in audio.jsonl, counted from 0.
    """
    out = Path(flags.out)
    # all of this is checked before hours of embedding
    for name in ("audio.jsonl", "manifest.jsonl"):
        if (out / name).exists():
            raise FileExistsError(f"--out {out}: holds {name} already; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {out}: cannot be written")
    manifest, split, rows = read_rows(flags)
    model, settings = open_model(flags.checkpoint[0], flags, split, manifest)
    kept, audio_embeds, _ = embed(model, rows, settings)
    told = []
    for owner, k in enumerate(kept):
        for caption in rows[k].get("captions", []):
            told.append({"caption": model.clean_caption(caption), "owner": owner})
    text_embeds = np.zeros((0, audio_embeds.shape[1]), np.float32)
    if told:
        text_embeds = common.embed_texts(model, [line["caption"] for line in told])
    clips = []
    for k in kept:  # absolute: a relative path would start at the new folder
        clips.append({"audio": os.path.abspath(rows[k]["audio"])})
        clips[-1] |= {key: rows[k][key] for key in ("duration", "split") if key in rows[k]}
    # audio.jsonl marks a complete folder of embeddings, and is written last
    for name, array in (("audio", audio_embeds), ("text", text_embeds)):
        with common.written_whole(out / f"{name}.npy") as file:
            np.save(file, array)
    for name, lines in (("captions", told), ("audio", clips)):
        text = [json.dumps(line, ensure_ascii=False) for line in lines]
        common.write_lines(out / f"{name}.jsonl", text)
    print(
        f"{out}: split {split}, {len(kept)} clips, {len(told)} captions, {audio_embeds.shape[1]} "
        "dimensions"
    )


def main(flags, protocols: dict = PROTOCOLS) -> list[dict]:
    """Score every model on the manifest; each result is printed and saved at once."""
    check_flags(flags)
    if flags.command == "embed":
        return embed_command(flags)
    manifest, split, rows = read_rows(flags)
    all_results = []
    for checkpoint in flags.checkpoint:
        if len(flags.checkpoint) > 1:
            print(f"\n=== {checkpoint}")
        all_results.append([])
        model, settings = open_model(checkpoint, flags, split, manifest)
        for r in evaluate(model, rows, settings, protocols):
            all_results[-1].append(r)
            show(r)
            write_json(flags.json, all_results)  # now, so that an interruption loses no result
    compare(flags.checkpoint, all_results)
    return write_json(flags.json, all_results)


def make_parser(doc: str, data=True, json=True, scores=True, **given) -> argparse.ArgumentParser:
    """The flags of every command that takes models; data: add those that choose rows of a manifest;
    scores: add those of the protocols.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        **given,
    )
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="one or more models: a run's best.pt or last.pt, MGA-CLAP's released model.pt, "
        "LAION-CLAP's .pt, MS-CLAP 2022's, Cacophony's, a transformers CLAP folder or hub id",
    )
    parser.add_argument(
        "--crop", choices=["all", "first"], default="all", help="windows to use of longer audio"
    )
    parser.add_argument(
        "--variant",
        help="compute like this variant of the model's script: mga_clap paper or official, "
        "cacophony paper, jax or official; default: as the model was trained",
    )
    parser.add_argument(
        "--text-model",
        help="folder or hub id of the tokenizer, read only for MGA-CLAP's model.pt and MS-CLAP "
        "2022's file (default bert-base-uncased), LAION-CLAP's .pt and Cacophony's (default "
        "roberta-base)",
    )
    if scores:
        parser.add_argument(
            "--bootstrap",
            type=int,
            default=200,
            help="draws for the 95 %% intervals, as many as fit in ten minutes (under 20: none)",
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
    if json:
        parser.add_argument(
            "--json",
            help="write the results to this file, with per-query ranks and per-class scores",
        )
    if not data:
        parser.set_defaults(data=[], split=None, fold=None, prompt="bare", median_s=0.94)
        return parser
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="manifests, folders that hold manifest.jsonl, or demo",
    )
    parser.add_argument(
        "--split",
        choices=["train", "val", "test", "all"],
        help="rows to use: train (also those without a split), val, test or all; default: test "
        "where there is one, else all",
    )
    parser.add_argument("--fold", metavar="N", help="only this fold of a set that has folds")
    if not scores:
        parser.set_defaults(prompt="bare", median_s=0.94, bootstrap=0, json=None)
        return parser
    parser.add_argument(
        "--prompt",
        default="bare",
        help="template for class names, for example 'a sound of {}', "
        f"or one of {', '.join(PROMPTS)}",
    )
    parser.add_argument(
        "--median-s",
        type=float,
        default=0.94,
        help="sed and grounding: length of the median filter in seconds",
    )
    return parser


def parse(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["embed"]:
        told = "Write the embeddings of a manifest's clips and captions to a folder."
        parser = make_parser(told, json=False, scores=False, prog="eval.py embed")
        parser.add_argument("--out", default="embeds", help="folder for the embeddings")
        flags = parser.parse_args(given[1:])
        flags.command = "embed"
        if len(flags.checkpoint) > 1:
            parser.error("embed takes exactly one model")
        return flags
    parser = make_parser(
        __doc__,
        epilog="eval.py embed MODEL writes a model's embeddings; see eval.py embed --help",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        choices=[*PROTOCOLS, "all"],
        default=["all"],
        help="all: those the manifest has labels for",
    )
    flags = parser.parse_args(given)
    flags.command = "scores"
    return flags


if __name__ == "__main__":
    common.run_entry(main, parse)
