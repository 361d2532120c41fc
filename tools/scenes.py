"""Make captioned scenes from single-label recordings (one folder per class, or ESC-50's layout).

  python -m tools.scenes --sounds ESC-50-master --out data/scenes
  python -m tools.scenes --sounds ESC-50-master --preset esc-mixed-up --out data/mixed_up

The manifest format is described in README.md; no recording is in two splits.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

import common
from tools.datasets import (
    AUDIO_SUFFIXES,
    at_least_one,
    check_output,
    exclude,
    in_processes,
    keys_of,
    number,
    read_table,
)


def list_sounds(folder: Path) -> list[dict]:
    """Single-label recordings as {audio, label, recording, fold or None}.

    ESC-50 layout (meta/esc50.csv and audio/, folds given), or one folder of files per class. A
    recording (ESC-50's src_file, else what the file's name tells) must not occur in two splits.
    """
    table = folder / "meta" / "esc50.csv"
    if table.is_file():
        rows = read_table(table, "filename", "category", "src_file", "fold")
        return [
            {
                "audio": str(folder / "audio" / row["filename"]),
                "label": row["category"],
                "recording": row["src_file"],
                "fold": int(number(table, row["fold"])),
            }
            for row in rows
        ]
    if not folder.is_dir():
        raise FileNotFoundError(f"--sounds {folder}: no such folder")
    sounds = [
        {
            "audio": str(path),
            "label": path.parent.name,
            "recording": next(iter(keys_of({"audio": str(path)})), str(path)),
            "fold": None,
        }
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in AUDIO_SUFFIXES
    ]
    if not sounds:
        raise ValueError(
            f"--sounds {folder}: found neither meta/esc50.csv nor folders of sound files, one per "
            "class"
        )
    return sounds


def split_sounds(sounds, train_folds, test_folds, val_fraction: float, seed: int) -> dict:
    """{"train": [...], "val": [...], "test": [...]} with every recording in one split only.

    The folds decide; without folds, a fifth of the recordings of each class is for test. Then
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
        held = set(recordings[: max(1, len(recordings) // 5)])
        test = [
            s
            for s in members
            if (s["fold"] in test_folds if s["fold"] is not None else s["recording"] in held)
        ]
        used = {s["recording"] for s in test}
        rest = [
            s
            for s in members
            if s["recording"] not in used and (s["fold"] is None or s["fold"] in train_folds)
        ]
        names = rng.permutation(sorted({s["recording"] for s in rest}))
        val = set(names[: round(val_fraction * len(names))])
        splits["test"] += test
        splits["val"] += [s for s in rest if s["recording"] in val]
        splits["train"] += [s for s in rest if s["recording"] not in val]
    # ESC-50 has recordings of two classes in two folds
    taken = set()
    for split in ("test", "val", "train"):
        splits[split] = [s for s in splits[split] if s["recording"] not in taken]
        taken |= {s["recording"] for s in splits[split]}
    return splits


def active_part(waveform: np.ndarray, rate: int, floor_db: float = 40.0) -> slice:
    """Samples without the leading and trailing 20 ms frames that lie more than `floor_db` below the
    loudest one.
    """
    hop = rate // 50
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    if len(frames) == 0:
        return slice(0, len(waveform))
    power = (frames**2).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-floor_db / 10))
    return slice(int(loud[0]) * hop, int(loud[-1] + 1) * hop)


@functools.lru_cache(maxsize=4096)
def load_sound(path: str, rate: int) -> np.ndarray:
    waveform = common.read_audio(path, rate)
    return waveform[active_part(waveform, rate)]


def draw_recording(rng, sounds: list[dict], rate: int):
    """A random recording -> label, phrase, waveform. Uniform over recordings."""
    sound = sounds[int(rng.integers(len(sounds)))]
    return sound["label"], sound["label"].replace("_", " "), load_sound(sound["audio"], rate)


def _scene_job(job):
    split, number, args = job
    return common.write_scene(
        Path(args.out) / "audio",
        f"{split}_{number:05d}",
        (args.seed, len(split), number),
        functools.partial(draw_recording, sounds=_scene_job.pools[split], rate=args.rate),
        args.rate,
        split,
        args.format,
    )


HALF_S = 5.0  # an ESC-50 recording
# the phrases that the paper names as examples (T-CLAP, Sec. 2.3)
IN_ORDER = ["{0} followed by {1}", "{0} and then {1}"]


def _mixed_job(job):
    """Make a clip of ESC-mixed-up, a recording and one of another class -> its row. Audio that an
    interrupted call has written is kept.
    """
    split, number, args = job
    rng, pool = np.random.default_rng((args.seed, len(split), number)), _scene_job.pools[split]
    first = pool[int(rng.integers(len(pool)))]
    others = [sound for sound in pool if sound["label"] != first["label"]]
    sounds = [first, others[int(rng.integers(len(others)))]]
    together = rng.random() < args.overlay
    template = (common.TOGETHER if together else IN_ORDER)[int(rng.integers(2))]
    phrases = [sound["label"].replace("_", " ") for sound in sounds]
    starts_s = [0.0, 0.0 if together else HALF_S]
    times = [
        [round(start + t, 3) for t in sound["active_s"]] for start, sound in zip(starts_s, sounds)
    ]
    name = f"{split}_{number:05d}"
    row = {
        "audio": f"audio/{name}.{args.format}",
        "duration": HALF_S + starts_s[1],
        "captions": [template.format(*phrases)],
        "negatives": [None if together else template.format(*phrases[::-1])],
        "labels": [sound["label"] for sound in sounds],
        "events": [
            {"label": sound["label"], "onset": on, "offset": off}
            for sound, (on, off) in zip(sounds, times)
        ],
        "phrases": [{"phrase": phrase, "segments": [time]} for phrase, time in zip(phrases, times)],
        "split": split,
    }
    files = [(row["audio"], sounds)]
    if split == "test" and not together:
        row["swapped_audio"] = f"audio/{name}_swapped.{args.format}"
        files.append((row["swapped_audio"], sounds[::-1]))
    for file, order in files:
        path = Path(args.out) / file
        if not path.is_file():
            halves = common.pad_batch(
                [common.read_audio(s["audio"], args.rate, HALF_S) for s in order],
                round(HALF_S * args.rate),
            )[0].numpy()
            common.write_audio(path, halves.mean(0) if together else halves.reshape(-1), args.rate)
    return row


SCENES = {
    "scenes": dict(train=1500, val=150, test=300, rate=32000, format="wav", overlay=0.0),
    "esc-mixed-up": dict(train=50000, val=500, test=1000, rate=0, format="flac", overlay=0.0),
}


def scenes(args) -> dict:
    """Make 10 s scenes from recordings, with captions, events, phrases and swapped order.

    Preset scenes: one to three recordings, trimmed, at random times and levels in noise. Preset
    esc-mixed-up (T-CLAP, Sec. 2.3 and 3.1): two recordings of 5 s and of different classes, one
    after the other. The number of events per clip, the validation and test counts and --overlay
    are ours.
    """
    args = argparse.Namespace(**{**SCENES[args.preset], **vars(args)})
    out, mixed = Path(args.out), args.preset == "esc-mixed-up"
    check_output(out / "manifest.jsonl")
    if args.rate and not 1000 <= args.rate <= 1_000_000:
        raise ValueError(f"--rate {args.rate}: expected 1000 to 1000000 Hz")
    if not 0 <= args.overlay <= 1 or (args.overlay and not mixed):
        raise ValueError(
            f"--overlay {args.overlay}: expected a share between 0 and 1, with --preset "
            "esc-mixed-up"
        )
    counts = (args.train, args.val, args.test)
    if min(counts) < 0 or not any(counts) or not 0 <= args.val_fraction < 1:
        raise ValueError(
            f"--train, --val, --test {counts}: expected numbers of clips, not all 0; "
            f"--val-fraction {args.val_fraction}: expected a share of at least 0 and below 1"
        )
    found = exclude(list_sounds(Path(args.sounds)), args.exclude)
    if not found:
        raise ValueError(f"--sounds {args.sounds}: every recording of it is excluded")
    sounds, unusable = [], []
    for sound in tqdm(found, desc="reading sounds", unit="file"):
        try:
            args.rate = (
                args.rate or sf.info(sound["audio"]).samplerate
            )  # 0: the first readable file's
            if mixed:
                waveform = common.read_audio(sound["audio"], args.rate, HALF_S)
                active = (
                    active_part(waveform, args.rate) if waveform.any() else slice(0, len(waveform))
                )
                sound["active_s"] = [active.start / args.rate, active.stop / args.rate]
            else:
                load_sound(sound["audio"], args.rate)
            sounds.append(sound)
        except (common.AudioError, sf.SoundFileError) as error:
            unusable.append(str(error))
    for text in unusable:
        print(f"left out: {text}")
    if not sounds:
        raise ValueError(f"--sounds {args.sounds}: not one file could be read")
    pools = split_sounds(sounds, args.train_folds, args.test_folds, args.val_fraction, args.seed)
    counts = {"train": args.train, "val": args.val, "test": args.test}
    for split, pool in pools.items():
        if counts[split] and not pool:
            raise ValueError(
                f"no recording is left for the {split} split; check --train-folds, --test-folds, "
                "--val-fraction"
            )
        if mixed and counts[split] and len({sound["label"] for sound in pool}) < 2:
            raise ValueError(
                f"the {split} split has recordings of one class only; a clip needs two"
            )
    # the scenes depend on these settings and on the sounds (their names and sizes)
    told = {k: v for k, v in sorted(vars(args).items()) if k not in ("run", "out", "workers")}
    sizes = [(sound["audio"], os.path.getsize(sound["audio"])) for sound in sounds]
    told["sounds_found"] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
    settings = json.dumps(told)
    try:
        (out / "audio").mkdir(parents=True, exist_ok=True)
        if (
            mixed
            and (out / "settings.json").exists()
            and (out / "settings.json").read_text().strip() != settings
        ):
            raise FileExistsError(
                f"--out {out}: holds a part of a set made with other settings or of other sounds "
                "(settings.json there); choose another folder, or remove this one"
            )
        common.write_lines(out / "settings.json", [settings])
    except PermissionError as error:
        raise PermissionError(f"--out {out}: cannot be written ({error.strerror})") from None
    _scene_job.pools = pools
    jobs = [(split, i, args) for split, n in counts.items() for i in range(n)]
    size = (
        sum(2 if split == "test" else 1 for split, _, _ in jobs)
        * 10
        * args.rate
        * (2 if args.format == "wav" else 1.1)
        / 1e9
    )
    print(
        f"{len(jobs)} clips of 10 s at {args.rate} Hz: about {size:.1f} GB of 16-bit "
        f"{args.format.upper()}"
    )
    job = _mixed_job if mixed else _scene_job
    rows = in_processes(job, jobs, args.workers, f"making {args.preset}", "clip")
    # Every class that test scenes can hold; a class that only occurs in training is not scored
    classes = sorted({s["label"] for s in pools["test" if counts["test"] else "train"]})
    common.write_lines(out / "classes.txt", classes)
    common.write_lines(out / "manifest.jsonl", [json.dumps(row) for row in rows])
    for split, pool in pools.items():
        print(
            f"{split}: {counts[split]} scenes from {len({s['recording'] for s in pool})} "
            "recordings "
            f"of {len({s['label'] for s in pool})} classes"
        )
    print(
        f"wrote {out / 'manifest.jsonl'} and classes.txt ({len(classes)} classes of the "
        f"{'test' if counts['test'] else 'training'} recordings)"
    )
    return {"manifest": str(out / "manifest.jsonl"), "left_out": unusable}


def parse(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m tools.scenes",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--sounds", required=True, help="ESC-50 layout, or one folder of files per class"
    )
    p.add_argument("--out", required=True, help="folder for audio/, manifest.jsonl and classes.txt")
    p.add_argument(
        "--preset",
        choices=list(SCENES),
        default="scenes",
        help="esc-mixed-up: T-CLAP's pairs of recordings, one after the other",
    )

    def of_preset(name):
        return {"default": argparse.SUPPRESS, "type": type(SCENES["scenes"][name])}

    def told(name):
        mixed = SCENES["esc-mixed-up"][name] or "that of the sounds"
        return f"[{SCENES['scenes'][name]}; esc-mixed-up: {mixed}]"

    p.add_argument("--train", **of_preset("train"), help=f"training clips {told('train')}")
    p.add_argument("--val", **of_preset("val"), help=f"validation clips {told('val')}")
    p.add_argument(
        "--test", **of_preset("test"), help=f"test clips, with order-swapped audio {told('test')}"
    )
    p.add_argument(
        "--rate", **of_preset("rate"), help=f"sample rate of the clips, Hz {told('rate')}"
    )
    p.add_argument(
        "--format",
        choices=["wav", "flac"],
        default=argparse.SUPPRESS,
        help=f"file format of the clips, 16 bit {told('format')}",
    )
    p.add_argument(
        "--overlay",
        **of_preset("overlay"),
        help="share of esc-mixed-up's clips (then 5 s) with both sounds at once and no negative "
        "[0]",
    )

    def folds(text):
        return [int(x) for x in text.split(",") if x]

    p.add_argument(
        "--train-folds",
        type=folds,
        default=[1, 2, 3, 4],
        help="comma-separated; ESC-50 layout only",
    )
    p.add_argument(
        "--test-folds", type=folds, default=[5], help="comma-separated; ESC-50 layout only"
    )
    p.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="MANIFEST",
        help="leave out the recordings of these, by Freesound id or the file's content",
    )
    p.add_argument("--val-fraction", type=float, default=0.1, help="share of train recordings")
    p.add_argument("--seed", type=int, default=0, help="random seed of all scenes")
    p.add_argument(
        "--workers",
        type=at_least_one,
        default=os.cpu_count(),
        help="processes; the result does not depend on it",
    )
    return p.parse_args(argv)


if __name__ == "__main__":
    common.run_entry(scenes, parse)
