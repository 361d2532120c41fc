"""Turn recordings into manifests: build captioned scenes from single sounds, and check any manifest.

  python prepare.py scenes --sounds ESC-50-master --out data/scenes
  python prepare.py check data/scenes

The manifest format is described in README.md; training and evaluation read nothing else.
"""
import argparse
import collections
import csv
import functools
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

import common

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"}


# ------------------------------------------------------------------------------------------------
# Scenes
# ------------------------------------------------------------------------------------------------


def list_sounds(folder: Path) -> list[dict]:
    """Single-label recordings as {audio, label, recording, fold or None}.

    ESC-50 layout (meta/esc50.csv and audio/, folds given), or one folder of files per class. A
    recording is the unit that may not appear in two splits: ESC-50's src_file, else the file.
    """
    table = folder / "meta" / "esc50.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8-sig") as f:
            return [{"audio": str(folder / "audio" / r["filename"]), "label": r["category"], "recording": r["src_file"],
                     "fold": int(r["fold"])} for r in csv.DictReader(f)]
    if not folder.is_dir():
        raise FileNotFoundError(f"--sounds {folder}: no such folder")
    sounds = [{"audio": str(path), "label": path.parent.name, "recording": str(path), "fold": None}
              for path in sorted(folder.glob("*/*")) if path.suffix.lower() in AUDIO_SUFFIXES]
    if not sounds:
        raise ValueError(f"--sounds {folder}: found neither meta/esc50.csv nor folders of sound files, one per class")
    return sounds


def split_sounds(sounds, train_folds, test_folds, val_fraction: float, seed: int) -> dict:
    """{"train": [...], "val": [...], "test": [...]} with every recording in one split only.

    With folds: as they say; without: a fifth of the recordings of each class is for test. Then
    `val_fraction` of the training recordings goes to val.
    """
    rng = np.random.default_rng(seed)
    splits = {"train": [], "val": [], "test": []}
    by_label = collections.defaultdict(list)
    for sound in sounds:
        by_label[sound["label"]].append(sound)
    for label in sorted(by_label):
        members = by_label[label]
        recordings = rng.permutation(sorted({s["recording"] for s in members}))
        held = set(recordings[:max(1, len(recordings) // 5)])
        test = [s for s in members if (s["fold"] in test_folds if s["fold"] is not None else s["recording"] in held)]
        used = {s["recording"] for s in test}
        rest = [s for s in members if s["recording"] not in used and (s["fold"] is None or s["fold"] in train_folds)]
        names = rng.permutation(sorted({s["recording"] for s in rest}))
        val = set(names[:round(val_fraction * len(names))])
        splits["test"] += test
        splits["val"] += [s for s in rest if s["recording"] in val]
        splits["train"] += [s for s in rest if s["recording"] not in val]
    return splits


def active_part(waveform: np.ndarray, rate: int, floor_db: float = 40.0) -> np.ndarray:
    """Cut leading and trailing 20 ms frames that lie more than `floor_db` below the loudest one."""
    hop = rate // 50
    frames = waveform[:len(waveform) // hop * hop].reshape(-1, hop)
    if len(frames) == 0:
        return waveform
    power = (frames ** 2).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-floor_db / 10))
    return waveform[loud[0] * hop:(loud[-1] + 1) * hop]


@functools.lru_cache(maxsize=4096)
def load_sound(path: str, rate: int) -> np.ndarray:
    return active_part(common.read_audio(path, rate), rate)


def draw_recording(rng, sounds: list[dict], rate: int):
    """A random recording -> label, phrase, waveform. Uniform over recordings."""
    sound = sounds[int(rng.integers(len(sounds)))]
    return sound["label"], sound["label"].replace("_", " "), load_sound(sound["audio"], rate)


def _scene_job(job):
    split, number, seed, out, rate = job
    return common.write_scene(Path(out) / "audio", f"{split}_{number:05d}", (seed, len(split), number),
                              functools.partial(draw_recording, sounds=_scene_job.pools[split], rate=rate), rate, split)


def scenes(args) -> dict:
    """10 s scenes of one to three recordings with captions, events, phrases and swapped order."""
    out = Path(args.out)
    if (out / "manifest.jsonl").exists():
        raise FileExistsError(f"--out {out}: already holds a manifest.jsonl; choose another folder or remove it")
    sounds, unusable = [], []
    for sound in tqdm(list_sounds(Path(args.sounds)), desc="reading sounds", unit="file"):
        try:
            load_sound(sound["audio"], args.rate)
            sounds.append(sound)
        except common.AudioError as error:
            unusable.append(str(error))
    for text in unusable:
        print(f"left out: {text}")
    if not sounds:
        raise ValueError(f"--sounds {args.sounds}: not one file could be read")
    pools = split_sounds(sounds, args.train_folds, args.test_folds, args.val_fraction, args.seed)
    counts = {"train": args.train, "val": args.val, "test": args.test}
    for split, pool in pools.items():
        if counts[split] and not pool:
            raise ValueError(f"no recording is left for the {split} split; check --train-folds, --test-folds, --val-fraction")
    try:
        (out / "audio").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"--out {out}: cannot be written ({error.strerror})") from None
    _scene_job.pools = pools
    jobs = [(split, i, args.seed, args.out, args.rate) for split, n in counts.items() for i in range(n)]
    print(f"{len(jobs)} scenes of 10 s at {args.rate} Hz, about {len(jobs) * args.rate * 10 * 2.1 / 1e9:.1f} GB of 16-bit WAV")
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        rows = list(tqdm(pool.imap(_scene_job, jobs, chunksize=8), total=len(jobs), desc="scenes", unit="scene"))
    # Every class that test scenes can hold; classes that only occur in training are vocabulary
    classes = sorted({s["label"] for s in pools["test" if counts["test"] else "train"]})
    common.write_lines(out / "classes.txt", classes)
    common.write_lines(out / "manifest.jsonl", [json.dumps(row) for row in rows])
    for split, pool in pools.items():
        print(f"{split}: {counts[split]} scenes from {len({s['recording'] for s in pool})} recordings "
              f"of {len({s['label'] for s in pool})} classes")
    print(f"wrote {out / 'manifest.jsonl'} and classes.txt ({len(classes)} classes with test recordings)")
    return {"manifest": str(out / "manifest.jsonl"), "left_out": unusable}


# ------------------------------------------------------------------------------------------------
# Check
# ------------------------------------------------------------------------------------------------


def _check_file(row):
    """-> (sample rate or None, seconds, error text or None); decodes the whole file."""
    try:
        rate = sf.info(row["audio"]).samplerate if os.path.isfile(row["audio"]) else 16000
        waveform = common.read_audio(row["audio"], rate, expected_s=row.get("duration"))
        return rate, len(waveform) / rate, None
    except (common.AudioError, sf.SoundFileRuntimeError) as error:
        return None, 0.0, str(error) if isinstance(error, common.AudioError) else f"{row['audio']}: {error}"


def check(args) -> dict:
    """Report on a manifest: counts, durations, rates, unreadable files, classes, recordings shared between splits."""
    rows = common.read_manifest(args.data)
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        found = list(tqdm(pool.imap(_check_file, rows, chunksize=16), total=len(rows), desc="decoding", unit="file"))
    report = {"clips": len(rows), "unreadable": [text for _, _, text in found if text], "splits": {}, "shared": []}
    owners = collections.defaultdict(set)
    for row, (rate, seconds, error) in zip(rows, found):
        owners[recording_of(row)].add(row.get("split", "none"))
        part = report["splits"].setdefault(row.get("split", "none"), collections.defaultdict(list))
        part["clips"].append(1)
        part["captions"].append(len(row.get("captions", [])))
        part["labels"] += row.get("labels", [])
        if not error:
            part["seconds"].append(seconds)
            part["rates"].append(rate)
    report["shared"] = sorted(name for name, splits in owners.items() if len(splits) > 1)
    for split, part in report["splits"].items():
        seconds = np.array(part["seconds"] or [0])
        counts = collections.Counter(part["labels"])
        print(f"{split}: {len(part['clips'])} clips, {sum(part['captions'])} captions, {seconds.sum() / 3600:.2f} h, "
              f"duration {seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f} s (min / median / max), "
              f"rates {dict(collections.Counter(part['rates']))}")
        if counts:
            print(f"  {len(counts)} classes: " + ", ".join(f"{k} {v}" for k, v in counts.most_common(12))
                  + (", ..." if len(counts) > 12 else ""))
        report["splits"][split] = {"clips": len(part["clips"]), "captions": sum(part["captions"]), "classes": len(counts),
                                   "seconds": float(seconds.sum())}
    print(f"unreadable files: {len(report['unreadable'])}")
    for text in report["unreadable"][:20]:
        print(f"  {text}")
    print(f"recordings shared between splits: {len(report['shared'])} {report['shared'][:5] or ''}")
    return report


def recording_of(row: dict) -> str:
    """What makes two clips the same recording: the id, else ESC-50's source in the name, else the file."""
    esc = re.match(r"\d-(\d+)-[A-Z]-\d+\.", Path(row["audio"]).name)
    return str(row.get("id") or (esc and esc[1]) or os.path.realpath(row["audio"]))


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = functools.partial(commands.add_parser, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = add("scenes", help="captioned scenes from single-label sounds")
    p.add_argument("--sounds", required=True, help="ESC-50 layout, or one folder of files per class")
    p.add_argument("--out", required=True, help="folder for audio/, manifest.jsonl and classes.txt")
    p.add_argument("--train", type=int, default=1500, help="training scenes")
    p.add_argument("--val", type=int, default=150, help="validation scenes")
    p.add_argument("--test", type=int, default=300, help="test scenes (with order-swapped audio)")
    folds = lambda text: [int(x) for x in text.split(",") if x]  # noqa: E731
    p.add_argument("--train-folds", type=folds, default=[1, 2, 3, 4], help="comma-separated; ESC-50 layout only")
    p.add_argument("--test-folds", type=folds, default=[5], help="comma-separated; ESC-50 layout only")
    p.add_argument("--val-fraction", type=float, default=0.1, help="of the training recordings")
    p.add_argument("--rate", type=int, default=32000, help="sample rate of the scenes, Hz")
    p.add_argument("--seed", type=int, default=0, help="every scene is a function of it")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; the result does not depend on it")
    p.set_defaults(run=scenes)
    p = add("check", help="look a manifest over")
    p.add_argument("data", nargs="+", help="manifests, or folders that hold manifest.jsonl")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p.set_defaults(run=check)
    return parser.parse_args(argv)


if __name__ == "__main__":
    common.run_entry(lambda args: args.run(args), parse)
