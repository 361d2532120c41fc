"""HEAR (hearbenchmark.com): its common interface, and a probe for its task folders.

  python -m tools.hear runs/cacophony-1/best.pt --task tasks/esc50-v2.0.0-full --json scores.json

This module implements HEAR's interface: load_model, get_scene_embeddings, get_timestamp_embeddings.
"""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

import common
import eval as evaluation
from eval import embed, largest_matching, median_filter, median_frames, result, runs
from tools.downstream import (
    METRIC_OF,
    fold_turns,
    join_inputs,
    label_chance,
    label_evidence,
    label_score,
    probe_loss,
    train_probe,
)

# ------------------------------------------------------------------------------------------------
# HEAR's common interface
# ------------------------------------------------------------------------------------------------


def load_model(model_file_path, text_model: str | None = None):
    """HEAR's interface: the model from eval.load_model, with its embedding sizes added.

    These are scene_embedding_size, and timestamp_embedding_size if it has frames.
    """
    model = evaluation.load_model(model_file_path, text_model)
    hum = torch.full((1, model.sample_rate // 10), 0.1)
    model.scene_embedding_size = model.embed_audio(hum).shape[1]
    if hasattr(model, "embed_frames"):
        model.timestamp_embedding_size = getattr(model, hear_frames(model))(hum).shape[2]
    return model


def get_scene_embeddings(audio, model):
    """HEAR's interface: audio (n_sounds, n_samples) in [-1, 1] at model.sample_rate -> (n_sounds,
    scene_embedding_size).
    """
    return model.embed_audio(audio)


def hear_frames(model) -> str:
    """Name of the method that gives HEAR's frames: the encoder's own frames if the model offers
    them, else those in the joint space.
    """
    return "event_feats" if hasattr(model, "event_feats") else "embed_frames"


def get_timestamp_embeddings(audio, model):
    """HEAR's interface: audio as above -> embeddings (n_sounds, n_timestamps,
    timestamp_embedding_size), timestamps (n_sounds, n_timestamps) in milliseconds: the centres of
    the frames, without frames after the end of the audio.

    These are true times; Cacophony's evaluation stretches them so that the last one is the end of
    the audio, which shifts events.
    """
    n_frames = max(1, math.floor(audio.shape[1] / model.sample_rate / model.frame_s + 0.5 + 1e-6))
    embeds = getattr(model, hear_frames(model))(audio)[:, :n_frames]
    centre_ms = (torch.arange(embeds.shape[1], device=embeds.device) + 0.5) * model.frame_s * 1000
    return embeds, centre_ms.repeat(len(audio), 1)


# ------------------------------------------------------------------------------------------------
# A task folder
# ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """Read a JSON object of a HEAR task folder."""
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
    """A folder that hear-preprocess wrote -> {"name", "kind", "scored", "classes", "splits":
    {split: rows}} and the task's rules: "tolerance_s", "median_s", "least_s", "epochs", "patience",
    "by_loss".

    kind: multiclass, multilabel (both: a row has `labels`) or event (`events` in seconds). scored:
    the kind by whose score it is judged, the first that the task names: multilabel (mAP) for some
    multiclass tasks. Audio comes from the folder RATE/SPLIT at the model's rate if present, else at
    the highest rate.
    """
    metadata, path = read_json(folder / "task_metadata.json"), folder / "labelvocabulary.csv"
    kind = "event" if metadata.get("embedding_type") == "event" else metadata.get("prediction_type")
    if kind not in ("multiclass", "multilabel", "event") or (
        kind == "event" and metadata.get("prediction_type") != "multilabel"
    ):
        raise ValueError(
            f"{folder / 'task_metadata.json'}: embedding_type {metadata.get('embedding_type')!r}, "
            "prediction_type "
            f"{metadata.get('prediction_type')!r}; expected scene with multiclass or multilabel, "
            "or event with multilabel"
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
            f"{folder}: expected train.json, valid.json and test.json, or at least three of "
            "fold00.json, fold01.json ..."
        )
    rates = sorted(
        (int(f.name) for f in folder.iterdir() if f.is_dir() and f.name.isdigit()),
        key=lambda hz: (hz != sample_rate, -hz),
    )
    if not rates:
        raise ValueError(
            f"{folder}: holds no folder of audio named by its sample rate, such as 48000"
        )
    scores = metadata.get("evaluation") or []
    if not isinstance(scores, list):
        raise ValueError(
            f"{folder}: task_metadata.json: 'evaluation' is {scores!r}; expected a list of names"
        )
    onset_ms = re.findall(r"event_onset_(\d+)ms_fms", " ".join(map(str, scores)))
    name, rules = metadata.get("task_name", folder.name), metadata.get("evaluation_params") or {}
    try:
        own = rules.get("task_specific_param_grid", {})
        cut = rules.get("event_postprocessing_grid", {})
        # epochs from validation to validation in HEAR's evaluator, which counts its patience in
        # these
        every = own.get("check_val_every_n_epoch", [10 if name == "dcase2016_task2" else 3])[0]
        of_task = {
            "median_s": cut.get("median_filter_ms", [250])[0] / 1000,
            "least_s": [ms / 1000 for ms in cut.get("min_duration", [125, 250])],
            "epochs": own.get("max_epochs", [500])[0],
            "patience": own.get("patience", [20])[0] * every,
        }
    except (TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{folder}: task_metadata.json: 'evaluation_params' is {rules!r}; expected lists of "
            "numbers in task_specific_param_grid and event_postprocessing_grid"
        ) from None
    return {
        "name": name,
        "kind": kind,
        "scored": "multilabel" if kind == "multiclass" and scores[:1] == ["mAP"] else kind,
        "classes": classes,
        "tolerance_s": int(onset_ms[0]) / 1000 if onset_ms else 0.2,
        "by_loss": metadata.get("use_scoring_for_early_stopping") is False,
        **of_task,
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
            or kind == "event"
            and not all(isinstance(e[key], (int, float)) for e in told for key in ("start", "end"))
        ):
            raise ValueError(
                f"{path}: {name}: expected a list of "
                + ("{label, start, end}, times in milliseconds" if kind == "event" else "labels")
            )
        labels = [
            str(e["label"] if kind == "event" else e) for e in told
        ]  # spoken_digit has numbers, the vocabulary has text
        unknown = sorted(set(labels) - set(classes))
        if unknown:
            raise ValueError(f"{path}: {name}: label {unknown[0]!r} is not in labelvocabulary.csv")
        if kind == "multiclass" and len(labels) != 1:
            raise ValueError(
                f"{path}: {name} has {len(labels)} labels; a multiclass task has one per file"
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


# ------------------------------------------------------------------------------------------------
# The probe
# ------------------------------------------------------------------------------------------------


HEAR_GRID = [
    dict(layers=1 + hidden, lr=lr) for hidden in (1, 2) for lr in (3.2e-3, 1e-3, 3.2e-4, 1e-4)
]


HEAR_PROBE = dict(
    width=1024,
    dropout=0.1,
    batch_norm=True,
    batch_size=1024,
    weight_decay=0.0,
    standardise=False,
)


def hear_inputs(model, task: dict, split: str, settings) -> dict:
    """Embeddings and targets of one split, per clip or (timestamp task) per frame: {"rows",
    "inputs", "targets", "lengths"}.
    """
    rows, event = task["splits"][split], task["kind"] == "event"
    kept, embeds, frame_embeds = embed(
        model, rows, settings, event and hear_frames(model), f"embedding {split}"
    )
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


def onset_counts(
    logits,
    row: dict,
    classes: list[str],
    frame_s: float,
    width: int,
    min_s: float,
    tolerance_s: float,
) -> np.ndarray:
    """Counts of matched events, detections and true events of one file, over all classes (3,).

    A frame is active if its probability, median-filtered over `width` frames, is above one half.
    Consecutive active frames are one detection, from the start of the first to the end of the last,
    if it lasts at least `min_s`. A detection matches an event if their onsets differ by at most the
    tolerance; each is matched at most once. logits (T, C).
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
    """What the score needs, one row per file: right or not, logits and targets, or `onset_counts`.

    shift: events are compared with the detections of the file so many places later (for the chance
    level).
    """
    if task["kind"] != "event":
        if task["scored"] != task["kind"]:  # each class over all clips, by its probability
            logits = torch.from_numpy(logits).softmax(1).numpy()
        return label_evidence(task["scored"], logits, scored_targets(task, part))
    files = np.split(logits, np.cumsum(part["lengths"])[:-1])
    files, width = files[shift:] + files[:shift], median_frames(task["median_s"], frame_s)
    return np.stack(
        [
            onset_counts(x, row, task["classes"], frame_s, width, min_s, task["tolerance_s"])
            for x, row in zip(files, part["rows"])
        ]
    )


def scored_targets(task: dict, part: dict) -> np.ndarray:
    """Targets as the score needs them: one-hot if a multiclass task is judged by mAP."""
    if task["scored"] == task["kind"]:
        return part["targets"]
    return np.eye(len(task["classes"]), dtype=np.float32)[part["targets"]]


def hear_score(kind: str, evidence: np.ndarray) -> float:
    """`label_score`, or onset F1 with the events of all classes counted together."""
    if kind != "event":
        return label_score(kind, evidence)
    found, detections, events = evidence.sum(0)
    return float(2 * found / max(1, detections + events))


def hear_probe(
    task: dict, train: dict, valid: dict, grid: list[dict], frame_s, device, desc: str
) -> dict:
    """The probe of `grid` with the largest score on `valid`, or the smallest loss where the task
    says so: {"score", "point", "min_s", "logits_of"}, the first of equals.
    """
    best = {"score": -math.inf}
    lengths_s = task["least_s"] if task["kind"] == "event" else [0.0]

    def score_with(logits, min_s):
        if task["by_loss"]:
            return -probe_loss(logits, valid["targets"])
        return hear_score(task["scored"], hear_evidence(task, logits, valid, frame_s, min_s))

    def score_of(logits):
        return max(score_with(logits, min_s) for min_s in lengths_s)

    for k, point in enumerate(grid, 1):
        logits_of = train_probe(
            (train["inputs"], train["targets"]),
            (valid["inputs"], valid["targets"]),
            len(task["classes"]),
            f"{desc}, probe {k} of {len(grid)}",
            score_of=score_of,
            device=device,
            epochs=task["epochs"],
            patience=task["patience"],
            **HEAR_PROBE,
            **point,
        )
        logits = logits_of(valid["inputs"])
        for min_s in lengths_s:
            score = score_with(logits, min_s)
            if score > best["score"]:
                best = {"score": score, "point": point, "min_s": min_s, "logits_of": logits_of}
    return best


def hear_chance(task: dict, train: dict, test: dict, logits, frame_s, min_s: float) -> float:
    """`label_chance`; for events, the score of the next file's detections."""
    if task["kind"] != "event":
        return label_chance(task["scored"], train["targets"], scored_targets(task, test))
    return (
        hear_score("event", hear_evidence(task, logits, test, frame_s, min_s, shift=1))
        if len(test["rows"]) > 1
        else 0.0
    )


def hear(model, task: dict, settings) -> dict:
    """A HEAR task: an MLP (train_probe) on frozen embeddings of whole clips, or of single frames
    for timestamp tasks.

    Score: accuracy (multiclass; macro mAP if the task names it first), macro mAP (multilabel), F1
    of event onsets (event; within 200 ms unless the task's metadata names another tolerance). Eight
    probes, HEAR's hidden layers times learning rates, are trained for up to 500 epochs, and stop
    after 60 (DCASE 2016: 200) without a better score on split valid, HEAR's 20 validations every
    third (tenth) epoch. Epoch, probe and shortest event are those with the best score there. A
    task's own evaluation_params and use_scoring_for_early_stopping (MAESTRO's) replace these. With
    folds, each one is tested once, the next one is for validation and the others for training. The
    grid is searched with the first test fold only, as in HEAR's evaluator; the score is the mean
    over folds. Differences from that evaluator: torch's default initialisation (its grid draws
    among two of Xavier's), validation after every epoch, true frame times, detections that last to
    the end of their last frame, an odd median filter. chance: `hear_chance`. Source: Turian et al.,
    HEAR 2021; Cacophony's evaluation on it.
    """
    kind, scored, folds, told = task["kind"], task["scored"], [], []
    if kind == "event" and not hasattr(model, "embed_frames"):
        raise ValueError(
            f"{task['name']} is a timestamp task: it needs a model with embed_frames, which this "
            "one lacks"
        )
    frame_s = getattr(model, "frame_s", None)
    splits = {name: hear_inputs(model, task, name, settings) for name in task["splits"]}
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
                "score": hear_score(scored, evidence),
                "chance": hear_chance(task, train, test, logits, frame_s, best["min_s"]),
                "min_s": best["min_s"],
            }
        )
        told.append(
            f"{test_name}: {'loss ' * task['by_loss']}{abs(best['score']):.3f}"
            + (f", events of at least {best['min_s']:g} s" if kind == "event" else "")
        )
    of_fold = np.concatenate([np.full(len(fold["rows"]), k) for k, fold in enumerate(folds)])
    evidence = np.concatenate([fold["evidence"] for fold in folds])

    def score(chosen):
        of_folds = [
            hear_score(scored, evidence[chosen[of_fold[chosen] == k]])
            for k in np.unique(of_fold[chosen])
        ]
        return {name: float(np.mean(of_folds))}

    name = "onset_F1" if kind == "event" else METRIC_OF[scored]
    rules = {}
    if kind == "event":
        rules = {
            "tolerance": f"{task['tolerance_s'] * 1000:g} ms",
            "frame_s": frame_s,
            "median": f"{median_frames(task['median_s'], frame_s)} frames "
            f"({task['median_s'] * 1000:g} ms)",
        }
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
    if scored != "multilabel":
        details["clips"] = [
            {
                "clip": row["audio"],
                **dict(
                    zip(
                        ("right",) if scored == "multiclass" else ("found", "detected", "events"),
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
        settings,
        n_classes=len(task["classes"]),
        details=details,
        task=f"{kind}, {len(folds)} fold(s), mean over folds",
        probe=f"MLP, {grid[0]['layers'] - 1} hidden layer(s) of {HEAR_PROBE['width']}, lr "
        f"{grid[0]['lr']:g}: the best of {len(HEAR_GRID)}",
        validation="; ".join(told),
        tie_rule="a tie is a miss" if scored == "multiclass" else "equal scores are one threshold",
        **rules,
    )


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = evaluation.make_parser(__doc__, data=False, prog="python -m tools.hear")
    parser.add_argument("--task", required=True, help="a task folder as hear-preprocess writes it")
    flags = parser.parse_args(argv)
    if len(flags.checkpoint) > 1:
        parser.error("hear takes exactly one checkpoint")
    return flags


def main(flags) -> list[dict]:
    """One model on one task folder."""
    evaluation.check_flags(flags)
    model, settings = evaluation.open_model(flags.checkpoint[0], flags, "test", [])
    settings.data = [flags.task]
    r = hear(model, read_hear_task(Path(flags.task), model.sample_rate), settings)
    evaluation.show(r)
    return evaluation.write_json(flags.json, [[r]])


if __name__ == "__main__":
    common.run_entry(main, parse)
