"""Zero-shot evaluation of any checkpoint, one function a protocol, every rule printed with the score.

  python eval.py runs/NAME/best.pt --data MANIFEST --protocol all --json scores.json

Protocols: retrieval, classification, tagging, frames, or all that the manifest has labels for.
Audio is never cropped at random: it is zero-padded to the model's window, longer audio is cut into
consecutive windows whose embeddings are averaged by their seconds and renormalised (`--crop first`:
the first window only). Scores carry a 95 % bootstrap interval over clips.
"""
import argparse
import importlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common

METHODS = ("mga_clap",)  # scripts whose Model this file can load


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
    captions = [(i, model.clean_caption(c)) for i, row in enumerate(clips["rows"]) for c in row["captions"]]
    owner = np.array([i for i, _ in captions])
    sim = clips["audio_embeds"] @ common.embed_texts(model, [c for _, c in captions]).T
    ranks, n = common.retrieval_ranks(sim, owner), len(clips["rows"])

    def score(chosen):
        times = np.bincount(chosen, minlength=n)
        return common.retrieval_scores({"t2a": np.repeat(ranks["t2a"], times[owner]),
                                        "a2t": ranks["a2t"][chosen], "a2t_ap10": ranks["a2t_ap10"][chosen]})

    return result("retrieval", score, n, common.retrieval_chance(owner, n), args, n_captions=len(captions),
                  prompt="captions as written, cleaned by the method", tie_rule="a tie counts against the right answer")


def classification(model, clips, classes, args) -> dict:
    """Accuracy: the class prompt with the largest cosine to the clip, among clips with one label.

    A tie is a miss. Clips with several labels are left out and counted. Source: MGA-CLAP Table 2
    (ESC-50 mean of 5 folds, UrbanSound8K mean of 10; mean_of_folds is printed where rows have a fold).
    """
    targets = common.label_targets(clips["rows"], classes)
    single = targets.sum(1) == 1
    if not single.any():
        raise ValueError("classification needs clips with exactly one label; this manifest has none")
    sim = clips["audio_embeds"][single] @ class_embeddings(model, classes, args).T  # (N, C)
    right = np.take_along_axis(sim, targets[single].argmax(1)[:, None], 1)
    hit = (sim >= right).sum(1) == 1  # nothing but the right class reaches its score
    folds = np.array([str(row.get("fold", "")) for row, one in zip(clips["rows"], single) if one])

    def score(chosen):
        scores = {"accuracy": float(hit[chosen].mean())}
        if len(set(folds)) > 1:
            scores["mean_of_folds"] = float(np.mean([hit[chosen][folds[chosen] == f].mean() for f in sorted(set(folds[chosen]))]))
        return scores

    return result("classification", score, len(hit), {"accuracy": 1 / len(classes), "mean_of_folds": 1 / len(classes)}, args, n_classes=len(classes), prompt=args.prompt, tie_rule="a tie is a miss",
                  left_out=f"{int((~single).sum())} clips without exactly one label")


def tagging(model, clips, classes, args) -> dict:
    """Macro mAP over classes that occur, from the cosine of clip and class prompt.

    Non-interpolated average precision, equal scores form one threshold. Source: MGA-CLAP Table 2
    (FSD50K, AudioSet evaluation splits).
    """
    targets = common.label_targets(clips["rows"], classes)
    sim = clips["audio_embeds"] @ class_embeddings(model, classes, args).T  # (N, C)
    score = lambda chosen: {"mAP": float(np.nanmean(common.class_average_precisions(sim[chosen], targets[chosen])))}  # noqa: E731
    return result("tagging", score, len(sim), {"mAP": float(targets.mean(0)[targets.any(0)].mean())}, args,
                  n_classes=int(targets.any(0).sum()), prompt=args.prompt, tie_rule="equal scores are one threshold")


def frames(model, clips, classes, args) -> dict:
    """Frame-level mAP: each frame's cosine to each class prompt, all frames of all clips pooled.

    A frame is positive where an event covers its centre. raw: the cosine (the papers' protocol).
    centred: the frame's mean over classes taken out first, which removes how much a frame resembles
    any class text at all. Both are always reported; DESIGN: never tune on one and report the other.
    """
    if not any(row.get("events") for row in clips["rows"]):
        raise ValueError("frames needs 'events' in the manifest; there is not one")
    class_embeds = class_embeddings(model, classes, args)
    occurring = set(classes) & {event["label"] for row in clips["rows"] for event in row.get("events", [])}
    if not occurring:
        raise ValueError("frames: no event's label is in the class list (classes.txt beside the manifest)")
    chance = {}

    def score(chosen):
        scores = {}
        for name, centred in (("mAP_raw", False), ("mAP_centred", True)):
            per_class, level = common.frame_average_precisions(
                [clips["frame_embeds"][i] for i in chosen], class_embeds, [clips["rows"][i] for i in chosen],
                classes, model.frame_s, centred)
            scores[name] = float(np.nanmean(per_class))
            chance.setdefault(name, level)  # of the first call, which is on all clips
        return scores

    return result("frames", score, len(clips["rows"]), chance, args, n_classes=len(occurring), prompt=args.prompt,
                  tie_rule="equal scores are one threshold", frame_s=model.frame_s,
                  n_frames=sum(len(f) for f in clips["frame_embeds"]))


PROTOCOLS = {"retrieval": (retrieval, "captions"), "classification": (classification, "labels"),
             "tagging": (tagging, "labels"), "frames": (frames, "events")}


# ------------------------------------------------------------------------------------------------
# Shared by the protocols
# ------------------------------------------------------------------------------------------------


def class_embeddings(model, classes, args) -> np.ndarray:
    """(C, D): the prompt with each class name in it, underscores to spaces."""
    return common.embed_texts(model, [args.prompt.format(c.replace("_", " ")) for c in classes])


def result(protocol, score, n_clips, chance, args, n_captions=0, n_classes=0, **settings) -> dict:
    """Evaluate `score` on all clips and on bootstrap draws of clips -> the result as --json writes it.

    Args: score: indices of clips (with repeats) -> {name: value}.
    """
    values = score(np.arange(n_clips))
    rng = np.random.default_rng(0)
    draws = [score(rng.integers(0, n_clips, n_clips)) for _ in tqdm(
        range(args.bootstrap), desc=f"{protocol}: bootstrap", unit="draw", leave=False)]
    scores = {}
    for name, value in values.items():
        low, high = np.nanpercentile([d[name] for d in draws], [2.5, 97.5]) if draws else (None, None)
        scores[name] = {"value": value, "low": low and float(low), "high": high and float(high)}
    window = "first window only" if args.crop == "first" else "all consecutive windows, averaged by their seconds"
    settings = {"crop": f"zero-padded to {args.window_s:g} s; {window}", "split": args.split, "bootstrap_draws": args.bootstrap,
                "checkpoint": str(args.checkpoint), "data": args.data, **settings}
    return {"protocol": protocol, "settings": settings, "n_clips": n_clips, "n_captions": n_captions, "n_classes": n_classes,
            "scores": scores, "chance": {k: chance[k] for k in scores}}


def show(r: dict) -> None:
    print(f"\n{r['protocol']}: {r['n_clips']} clips"
          + (f", {r['n_captions']} captions" if r["n_captions"] else "") + (f", {r['n_classes']} classes" if r["n_classes"] else ""))
    for key, value in r["settings"].items():
        if key not in ("checkpoint", "data"):
            print(f"  {key}: {value!r}" if key == "prompt" else f"  {key}: {value}")
    print(f"  {'score':<18}{'value':>8}  {'95 % interval':<16}{'chance':>8}")
    for name, s in r["scores"].items():
        interval = "" if s["low"] is None else f"[{s['low']:.3f}, {s['high']:.3f}]"
        print(f"  {name:<18}{s['value']:>8.3f}  {interval:<16}{r['chance'][name]:>8.3f}")


def load_model(path, text_model="bert-base-uncased"):
    """The Model that a checkpoint names, in evaluation mode; MGA-CLAP's released model.pt needs `text_model`'s tokenizer."""
    content = common.read_weights(path)
    if "method" not in content and "codebook" in content.get("model", {}):
        return importlib.import_module("mga_clap").Model.from_checkpoint(path, text_model)
    if content.get("method") not in METHODS:
        raise ValueError(f"{path}: not a checkpoint this evaluator knows (method {content.get('method')!r}; known: {', '.join(METHODS)})")
    return importlib.import_module(content["method"]).Model.from_checkpoint(path)


def main(args) -> list[dict]:
    device = common.start_device(args.device)
    if "{}" not in args.prompt:
        raise ValueError(f"--prompt {args.prompt!r}: must hold {{}} where the class name goes")
    if args.json and not os.access(Path(args.json).absolute().parent, os.W_OK):
        raise PermissionError(f"--json {args.json}: its folder does not exist or cannot be written")
    model = load_model(args.checkpoint, args.text_model).to(device)
    args.window_s = model.window_s
    rows = common.read_manifest(args.data)
    if args.split is None:  # test rows where there are any, else everything
        args.split = "test" if any(row.get("split") == "test" for row in rows) else "all rows"
    if args.split != "all rows":
        rows = [row for row in rows if row.get("split", args.split) == args.split]
        if not rows:
            raise ValueError(f"--split {args.split}: no row of the manifest is in it")
    wanted = [args.protocol] if args.protocol != "all" else [
        name for name, (_, key) in PROTOCOLS.items() if any(row.get(key) for row in rows)]
    for name in wanted:
        if not any(row.get(PROTOCOLS[name][1]) for row in rows):
            raise ValueError(f"--protocol {name} needs '{PROTOCOLS[name][1]}' in the manifest; no row of split "
                             f"{args.split} has them")
    classes = common.read_classes(args.data, rows)
    kept, audio_embeds, frame_embeds, bad = common.embed_files(
        model, rows, args.batch_size, args.workers, args.crop, frames="frames" in wanted)
    for text in bad:
        print(f"left out: {text}")
    if len(bad) > args.max_bad * len(rows):
        raise ValueError(f"{len(bad)} of {len(rows)} files could not be used, more than --max-bad {args.max_bad:.0%}")
    clips = {"rows": [rows[i] for i in kept], "audio_embeds": audio_embeds, "frame_embeds": frame_embeds}
    results = []
    for name in wanted:
        try:
            results.append(PROTOCOLS[name][0](model, clips, classes, args))
            show(results[-1])
        except ValueError as error:
            if args.protocol != "all":
                raise
            print(f"\n{name}: not run, {error}")
    if args.json:
        common.write_lines(Path(args.json), [json.dumps(results, indent=1)])
    return results


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="a run's best.pt or last.pt, or MGA-CLAP's released model.pt")
    parser.add_argument("--data", nargs="+", required=True, help="manifests, folders that hold manifest.jsonl, or demo")
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "all"], default="all", help="all: those the manifest has labels for")
    parser.add_argument("--split", help="rows to use; default: test where there is one, else all")
    parser.add_argument("--crop", choices=["all", "first"], default="all", help="windows of longer audio")
    parser.add_argument("--prompt", default="{}", help="text a class name is put into, for example 'a sound of {}'")
    parser.add_argument("--text-model", default="bert-base-uncased", help="folder or hub id, read only for a released model.pt")
    parser.add_argument("--bootstrap", type=int, default=200, help="draws for the 95 %% intervals; 0: none")
    parser.add_argument("--batch-size", type=int, default=32, help="clips at once; never changes a score")
    parser.add_argument("--workers", type=int, default=0, help="processes that read audio; never changes a score")
    parser.add_argument("--max-bad", type=float, default=0.05, help="largest share of unreadable files")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    common.run_entry(main, parse)
