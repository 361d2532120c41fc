"""Turn recordings into manifests: public datasets as they ship, one's own tables, scenes; check any of them; make captions.

  python prepare.py audiocaps audiocaps --audio audiocaps_wavs --out data/audiocaps
  python prepare.py csv mine.csv --audio file --caption text --out data/mine
  python prepare.py scenes --sounds ESC-50-master --out data/scenes
  python prepare.py check data/audiocaps data/mine
  python prepare.py rewrite --task negatives --data data/audiocaps --out data/audiocaps_order
  python prepare.py rewrite --task clean --data data/freesound --out data/freesound_clean --llm Qwen/Qwen2.5-7B-Instruct
  python prepare.py recaption --data data/audioset --model runs/cacophony-1/best.pt --out data/audioset_captioned

The manifest format is described in README.md; training and evaluation read nothing else.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.pool
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

import common

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"}
VIDEO_SUFFIXES = {".mp4", ".m4a", ".webm", ".mkv", ".aac"}  # soundfile cannot read these


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
            return [
                {
                    "audio": str(folder / "audio" / r["filename"]),
                    "label": r["category"],
                    "recording": r["src_file"],
                    "fold": int(r["fold"]),
                }
                for r in csv.DictReader(f)
            ]
    if not folder.is_dir():
        raise FileNotFoundError(f"--sounds {folder}: no such folder")
    sounds = [
        {"audio": str(path), "label": path.parent.name, "recording": str(path), "fold": None}
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in AUDIO_SUFFIXES
    ]
    if not sounds:
        raise ValueError(
            f"--sounds {folder}: found neither meta/esc50.csv nor folders of sound files, one per class"
        )
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
    return splits


def active_part(waveform: np.ndarray, rate: int, floor_db: float = 40.0) -> slice:
    """Samples without the leading and trailing 20 ms frames that lie more than `floor_db` below the loudest one."""
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
IN_ORDER = ["{0} followed by {1}", "{0} and then {1}"]  # the two phrases that the paper names


def _mixed_job(job):
    """One clip of ESC-mixed-up -> its row: a recording, then one of another class. Audio that an interrupted call has written is kept."""
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
    """10 s scenes of recordings, with captions, events, phrases and swapped order.

    Preset scenes: one to three recordings, trimmed, at random times and levels in noise. Preset
    esc-mixed-up (T-CLAP, Sec. 3): two recordings of 5 s and of different classes, one after the other.
    """
    args = argparse.Namespace(**{**SCENES[args.preset], **vars(args)})
    out, mixed = Path(args.out), args.preset == "esc-mixed-up"
    check_output(out / "manifest.jsonl")
    if not 0 <= args.overlay <= 1 or (args.overlay and not mixed):
        raise ValueError(
            f"--overlay {args.overlay}: expected a share between 0 and 1, with --preset esc-mixed-up"
        )
    found = list_sounds(Path(args.sounds))
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
                f"no recording is left for the {split} split; check --train-folds, --test-folds, --val-fraction"
            )
        if mixed and counts[split] and len({sound["label"] for sound in pool}) < 2:
            raise ValueError(
                f"the {split} split has recordings of one class only; a clip needs two"
            )
    settings = json.dumps(
        {k: v for k, v in sorted(vars(args).items()) if k not in ("run", "out", "workers")}
    )
    try:
        (out / "audio").mkdir(parents=True, exist_ok=True)
        if (
            mixed
            and (out / "settings.json").exists()
            and (out / "settings.json").read_text().strip() != settings
        ):
            raise FileExistsError(
                f"--out {out}: holds a part of a set made with other settings (settings.json there); choose another folder"
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
        f"{len(jobs)} clips of 10 s at {args.rate} Hz: about {size:.1f} GB of 16-bit {args.format.upper()}"
    )
    # one thread each: torch's own threads do not survive a fork
    with multiprocessing.get_context("fork").Pool(
        args.workers, torch.set_num_threads, (1,)
    ) as pool:
        rows = list(
            tqdm(
                pool.imap(_mixed_job if mixed else _scene_job, jobs, chunksize=8),
                total=len(jobs),
                desc=args.preset,
                unit="clip",
            )
        )
    # Every class that test scenes can hold; classes that only occur in training are vocabulary
    classes = sorted({s["label"] for s in pools["test" if counts["test"] else "train"]})
    common.write_lines(out / "classes.txt", classes)
    common.write_lines(out / "manifest.jsonl", [json.dumps(row) for row in rows])
    for split, pool in pools.items():
        print(
            f"{split}: {counts[split]} scenes from {len({s['recording'] for s in pool})} recordings "
            f"of {len({s['label'] for s in pool})} classes"
        )
    print(
        f"wrote {out / 'manifest.jsonl'} and classes.txt ({len(classes)} classes of the {'test' if counts['test'] else 'training'} recordings)"
    )
    return {"manifest": str(out / "manifest.jsonl"), "left_out": unusable}


# ------------------------------------------------------------------------------------------------
# Native datasets: reading what ships, finding the audio
# ------------------------------------------------------------------------------------------------

SPLITS = {
    "train": "train",
    "training": "train",
    "development": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluate": "test",
    "evaluation": "test",
}

# What tells a dataset's folder: sub-folders to look in, files of which one must be there, what such a file starts with
SIGNS = {
    "audiocaps": (
        ("", "dataset", "dataset2.0", "csv_files", "csv_files_v1", "csv_files_v2"),
        ("train.csv", "val.csv", "test.csv"),
        r'audiocap_id|file_name,caption.*\n"?Y[\w-]{11}\.wav',
    ),
    "clotho": (("", "clotho_csv_files"), ("clotho_captions_*.csv",), "file_name"),
    "wavcaps": (
        ("", "json_files", "data/json_files"),
        ("*/*_final.json",),
        "num_captions_per_audio",
    ),
    "fsd50k": (("",), ("FSD50K.ground_truth/dev.csv", "FSD50K.ground_truth/eval.csv"), "fname"),
    "esc50": (("",), ("meta/esc50.csv",), "filename"),
    "esc10": (("",), ("001 - *", "meta/esc50.csv"), "filename"),
    "urbansound8k": (("",), ("metadata/UrbanSound8K.csv",), r"slice_file_name|\d+-\d-\d+-\d+\.wav"),
    "vggsound": (
        ("", "data"),
        ("vggsound.csv", "train.csv", "test.csv"),
        r'"?[\w-]{11},\d+,|[\w-]{11}_\d{6}\.mp4,',
    ),
    "audioset": (("", "metadata", "meta", "segments"), ("*_segments.csv",), "# Segments csv"),
    "audioset_strong": (
        ("", "metadata", "meta"),
        ("audioset_train_strong.tsv", "audioset_eval_strong.tsv", "*.tsv"),
        r"segment_id\tstart_time|filename\tonset\toffset\tevent_label",
    ),
    "desed": (
        ("", "metadata", "dataset/metadata"),
        ("train/*.tsv", "validation/*.tsv", "eval/*.tsv"),
        "filename",
    ),
    "audiogrounding": (
        ("", "data"),
        ("*/label.json", "*/metadata/*.json", "train.json", "val.json", "test.json"),
        r'audiocap_id"\s*:\s*\{|[^\0]*"phrases"',
    ),
    "tut2017": (("",), ("meta.txt", "TUT-acoustic-scenes-2017-*/meta.txt"), r"audio/"),
    "clotho_aqa": (
        ("",),
        ("clotho_aqa_train.csv", "clotho_aqa_val.csv", "clotho_aqa_test.csv"),
        "file_name",
    ),
    "music_avqa": (
        ("", "json", "data/json", "json_update", "data/json_update"),
        ("avqa-*.json",),
        r'[^\0]*"question_content"',
    ),
}


def read_text(path) -> str:
    """A whole text file: UTF-8 with or without a byte-order mark, else Latin-1 (Clotho's metadata, Clotho-AQA)."""
    data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git-LFS pointer, not the data; run 'git lfs pull' in that clone or download the file from the "
            "dataset's page"
        )
    if b"\0" in data[:4096]:
        raise ValueError(
            f"{path}: not a text file; expected UTF-8 (a spreadsheet must be saved as CSV)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def number(source, text) -> float:
    try:
        value = float(text)
    except (ValueError, TypeError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{source}: found {text!r} where a number is expected")
    return value


def read_json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); download the file again"
        ) from None


def delimiter_of(path) -> str:
    return max("\t,;", key=read_text(path).split("\n", 1)[0].count)


def read_table(path, *need: str, columns=None, comment=None, **dialect) -> list[dict]:
    """Rows of a CSV or TSV file as {column: text}; cells keep their blanks (Clotho's file names begin with some).

    Args
        need: columns every row must have. columns: their names where the file may have no header line.
        comment: start of lines to skip. dialect: as csv.reader takes it.
    """
    text, lines = read_text(path), None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    try:
        lines = list(reader)
    except csv.Error as error:
        with contextlib.suppress(csv.Error):
            lines = list(csv.reader(io.StringIO(text, newline=""), **dialect))
        # A stray quote is only untidy, unless it swallows the rows after it
        if lines is None or any("\n" in cell for line in lines for cell in line):
            raise ValueError(
                f"{path}:{reader.line_num}: cannot be read as a table ({error}); is a closing quote missing?"
            ) from None
    lines = [line for line in lines if line and not (comment and line[0].startswith(comment))]
    need, header = need or tuple(columns or ()), lines[0] if lines else []
    if columns and not set(need) <= set(header):
        header = columns
    else:
        lines = lines[1:]
    missing = [name for name in need if name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column '{missing[0]}' (columns there: {', '.join(header) or 'none'}); expected {', '.join(need)}"
        )
    at = max((list(header).index(name) for name in need), default=-1)
    for row, line in enumerate(lines, 1):
        if len(line) <= at or any(line[len(header) :]):
            raise ValueError(
                f"{path}: row {row} has {len(line)} cells, expected {len(header)} ({', '.join(header)}); "
                f"cells that hold the delimiter need quotes: {line}"
            )
    return [dict(zip(header, line)) for line in lines]


def candidates(dataset: str, folder: Path, inside=None):
    """Each (folder, path in it) that is called as a file of this dataset, in `folder` and the known sub-folders."""
    for sub, pattern in itertools.product(inside or SIGNS[dataset][0], SIGNS[dataset][1]):
        yield from ((folder / sub, path) for path in sorted((folder / sub).glob(pattern)))


def head_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(4096).decode("utf-8-sig", "replace")


def signs_of(dataset: str, folder: Path, inside=None) -> Path | None:
    """The first folder among `folder` and the known sub-folders that holds this dataset's files."""
    start = re.compile(r"version https://git-lfs|[{\s\[]*\"?(" + SIGNS[dataset][2] + ")")
    return next(
        (
            place
            for place, path in candidates(dataset, folder, inside)
            if path.is_dir() or start.match(head_of(path))
        ),
        None,
    )


def locate(dataset: str, root: Path, inside=None) -> Path:
    """The folder of the dataset's tables; otherwise one sentence that says what is wrong with `root` and what to give."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: {'a file' if root.exists() else 'no such folder'}; {dataset} takes the dataset's folder"
        )
    found = signs_of(dataset, root, inside)
    if found:
        return found
    around = [
        root.absolute().parent,
        *(d for depth in ("*", "*/*") for d in sorted(root.glob(depth)) if d.is_dir()),
    ]
    expected = " or ".join(SIGNS[dataset][1])
    for folder in around:
        if signs_of(
            dataset, folder, inside and inside[1:]
        ):  # of a version asked for, only the folders named for it
            raise ValueError(
                f"{root}: the wrong level of the tree, here is no {expected}; give {folder}"
            )
    for other in SIGNS:
        if other != dataset and signs_of(other, root):
            raise ValueError(
                f"{root}: holds the files of {other}, not of {dataset} (expected {expected}); run: prepare.py {other} {root}"
            )
    for _, path in candidates(dataset, root, inside):
        raise ValueError(
            f"{path}: not a table of {dataset}, it begins with {head_of(path)[:40]!r}; download it again, or "
            "prepare.py csv reads any table"
        )
    names = sorted(path.name for path in root.iterdir())
    below = ", ".join(filter(None, inside or SIGNS[dataset][0])) or "a sub-folder"
    there = (", ".join(names[:6]) or "nothing") + (", ..." if len(names) > 6 else "")
    raise FileNotFoundError(
        f"{root}: found no {expected} of {dataset}, here or in {below} (there: {there}); give the folder that holds it"
    )


def stem_of(name: str) -> str:
    """File name without folder and without a sound's or video's suffix; the dots of 'Yid_30.000_40.000' stay."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    stem = stem if suffix.lower() in AUDIO_SUFFIXES | VIDEO_SUFFIXES else stem + suffix
    return unicodedata.normalize("NFC", stem)  # macOS unpacks \u00e9 as e and an accent


YOUTUBE = re.compile(
    r"Y?([\w-]{11})(?:_(\d+)(?:\.\d+)?(?:_\d+(?:\.\d+)?)?)?"
)  # matched whole: an id may hold _ and begin with -


def youtube_id(stem: str, sure: bool = False) -> str | None:
    """The id in a name such as id, Yid, id_30, id_000030, Yid_30.000_40.000.

    Unless `sure`, a name without a capital is taken for words (train_00003); one id in 240 has none.
    """
    found = YOUTUBE.fullmatch(stem)
    return found[1] if found and (sure or re.search("[A-Z]", found[1])) else None


def youtube_names(name: str, start_s: float) -> list[str]:
    """How the file of a clip may be called, in the order tried; a final * stands for any end time."""
    start_s = float(start_s)
    start = f"{start_s:g}" if start_s < 1e6 else str(int(start_s))
    return [
        f"{name}_{start}",
        f"Y{name}",
        name,
        f"{name}_{start_s:.3f}_*",
        f"Y{name}_{start_s:.3f}_*",
        f"{name}_{int(start_s):06d}",
        f"{name}_{start}_*",
        f"Y{name}_{start}_*",
        f"{name}_{round(start_s * 1000)}_*",
        f"{name}_{round(start_s * 1000)}",
    ]


class AudioTree:
    """The sound files below a folder, found by name without suffix whatever the folders in between."""

    def __init__(self, folder: Path, flag: str = "--audio"):
        self.folder, self.files, self.folders, self.videos = (
            folder,
            collections.defaultdict(list),
            set(),
            [],
        )
        self.unsure, self.elsewhere = [], []
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
        seen = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(d for d in folders if not d.startswith((".", "__MACOSX")))
            if os.path.realpath(parent) in seen:  # a link back up
                folders.clear()
                continue
            seen.add(os.path.realpath(parent))
            self.folders.update(Path(os.path.relpath(parent, folder)).parts)
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in AUDIO_SUFFIXES and not name.startswith(
                    "._"
                ):  # ._name: what macOS leaves beside a file
                    stem, path = stem_of(name), os.path.join(parent, name)
                    self.files[stem].append(path)
                    timed = re.fullmatch(r"(Y?[\w-]{11}_\d+(?:\.\d+)?)_\d+(?:\.\d+)?", stem)
                    if timed:
                        self.files[timed[1] + "_*"].append(path)
                elif suffix in VIDEO_SUFFIXES:
                    self.videos.append(os.path.join(parent, name))

    def find(self, names, inside=None, written=None) -> str | None:
        """First of `names` that there is; only below a folder `inside`, if the tree has one (names repeat across splits).

        written: what a table calls the file. Files of that name in several folders are then none, unless one lies
        where the table says (`unsure`); one in another folder than the table's is noted (`elsewhere`).
        """
        for name in names:
            paths = self.files.get(name, [])
            if inside in self.folders:
                paths = [p for p in paths if inside in Path(os.path.relpath(p, self.folder)).parts]
            if paths and written:
                parts, of = (
                    Path(written).parent.parts,
                    {p: Path(os.path.relpath(p, self.folder)).parent.parts for p in paths},
                )
                paths = (
                    [p for p in paths if of[p] == parts]
                    or [p for p in paths if of[p][len(of[p]) - len(parts) :] == parts]
                    or paths
                )
                if len({of[p] for p in paths}) > 1:
                    self.unsure.append(
                        f"{written} ({' or '.join(os.path.relpath(p, self.folder) for p in sorted(paths)[:3])})"
                    )
                    return None
                if of[paths[0]][len(of[paths[0]]) - len(parts) :] != parts:
                    self.elsewhere.append(f"{written} -> {os.path.relpath(paths[0], self.folder)}")
            if paths:
                return min(paths, key=lambda p: (not p.lower().endswith(".wav"), p))
        return None

    def nothing_found(self, tried: list[str], n: int) -> ValueError:
        there = next((paths[0] for paths in self.files.values()), None)
        text = (
            f"it holds sound files, such as {os.path.relpath(there, self.folder)}"
            if there
            else f"it holds videos, such as {os.path.basename(self.videos[0])}, which must first be turned into wav or flac"
            if self.videos
            else f"it holds no {', '.join(sorted(AUDIO_SUFFIXES))} file"
        )
        return ValueError(
            f"{self.folder}: not one of the {n:,} clips has its audio here; tried names such as "
            f"{', '.join(map(repr, dict.fromkeys(tried)))} with any sound suffix; {text}; name the right folder with --audio (csv: --audio-dir)"
        )


real_folder = functools.lru_cache(maxsize=None)(
    os.path.realpath
)  # one look-up a folder, not a file


def path_in(folder: Path, path: str) -> str:
    """`path` as the manifest in `folder` writes it: relative unless the two share nothing but the root.

    Only folders are resolved: a file that is a link keeps its own name.
    """
    path, base = (
        os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path)),
        real_folder(str(folder)),
    )
    shared = (
        os.path.commonpath([path, base])
        if os.path.splitdrive(path)[0] == os.path.splitdrive(base)[0]
        else os.sep
    )
    return path if shared == os.path.dirname(shared) else os.path.relpath(path, base)


def check_output(out: Path) -> None:
    """Said now, not after hours of work: the file is not there yet, and it can be written."""
    if out.exists():
        raise FileExistsError(f"--out {out}: already there; choose another name or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PermissionError(
            f"--out {out}: cannot be written ({'no permission for' if parent.is_dir() else 'a file:'} {parent})"
        )


def write_manifest(out: Path, rows: list[dict], classes=None) -> None:
    """The rows as manifest `out`, their paths relative to it, and classes.txt beside it."""

    def clean(text):
        return text.encode("utf-8", "replace").decode(
            "utf-8"
        )  # half a surrogate pair, from cut JSON

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if classes:
            common.write_lines(out.parent / "classes.txt", map(clean, classes))
        common.write_lines(
            out,
            (
                clean(
                    json.dumps(
                        {
                            key: path_in(out.parent, value)
                            if key in ("audio", "image", "swapped_audio")
                            else value
                            for key, value in row.items()
                            if key != "where"
                        },
                        ensure_ascii=False,
                    )
                )
                for row in rows
            ),
        )
    except OSError as error:
        raise PermissionError(
            f"--out {out}: cannot be written ({error.strerror or error})"
        ) from None
    print(f"wrote {out}" + (f" and classes.txt ({len(classes)} classes)" if classes else ""))


COUNTED = ("captions", "events", "phrases", "qa")


def convert(args) -> dict:
    """Run one adapter and write DIR/manifest.jsonl and classes.txt.

    An adapter is a function (path, args) -> (entries, classes or None, published {group: {unit: count}}).
    An entry is a manifest row without audio and duration, plus `names` (how its file may be called, in
    order), and where needed `path` (tried first), `inside` (the folder it lies in) and `written` (the path as
    a table tells it), for both see AudioTree.find, and `group` (what it is counted under; default: its split).
    """
    out = Path(args.out) / "manifest.jsonl"
    check_output(out)
    for manifest in args.exclude:
        common.manifest_path(manifest)
    listed, rows, missing, wordless, tried = collections.Counter(), [], [], [], []
    root = Path(args.audio_dir or args.path)
    try:
        entries, classes, published = args.adapter(Path(args.path), args)
        tree = AudioTree(
            root if args.audio_dir or root.is_dir() else root.parent,
            "--audio-dir" if args.adapter is any_table else "--audio",
        )
        for entry in entries:
            names, inside, path, written = (
                entry.pop("names"),
                entry.pop("inside", None),
                entry.pop("path", None),
                entry.pop("written", None),
            )
            entry.setdefault("group", entry.get("split", "all"))
            listed[entry["group"]] += 1
            listed_file = (
                path
                and os.path.splitext(path)[1].lower() not in VIDEO_SUFFIXES
                and os.path.isfile(path)
            )
            n_unsure = len(tree.unsure)
            found = str(path) if listed_file else tree.find(names, inside, written)
            if entry.get("captions") == []:
                wordless.append(names[0])
            elif found:
                rows.append({"audio": found, "duration": None, **entry})
            elif len(tree.unsure) == n_unsure:
                missing.append(names[0])
                tried = tried or names
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{args.path}: a record does not have the form described under --help ({type(error).__name__}: {error})"
        ) from None
    if not listed:
        raise ValueError(f"{args.path}: the tables list not one clip; expected one row a clip")
    if not rows and tree.unsure:
        raise ValueError(
            f"{args.path}: files of the same name lie in several folders, such as {tree.unsure[0]}; write the folder in the table"
        )
    if not rows and not tried:
        raise ValueError(
            f"{args.path}: not one of the {sum(listed.values()):,} clips has a caption with a word in it"
        )
    if not rows:
        raise tree.nothing_found(tried, sum(listed.values()))
    rows, unreadable = with_durations(rows, args.workers)
    outside = sum(drop_outside(row) for row in rows)
    rows = exclude(rows, args.exclude)
    report = {"manifest": str(out), "splits": {}, "missing": missing, "unreadable": unreadable}
    for group in [*published, *(g for g in listed if g not in published)]:
        members = [row for row in rows if row["group"] == group]
        units = {unit: sum(len(row.get(unit, [])) for row in members) for unit in COUNTED}
        report["splits"][group] = {"clips": len(members), "listed": listed[group], **units}
        known = ", ".join(f"{count:,} {unit}" for unit, count in published.get(group, {}).items())
        print(
            f"{group}: {len(members):,} of {listed[group]:,} clips"
            + "".join(f", {n:,} {unit}" for unit, n in units.items() if n)
            + (f" (published {known})" if known else "")
        )
    folds = collections.Counter(row["fold"] for row in rows if "fold" in row)
    if folds:
        print(
            "folds: "
            + ", ".join(
                f"{fold}: {folds[fold]:,}"
                for fold in sorted(folds, key=lambda f: (str(type(f)), f))
            )
        )
    for text, items in (
        ("left out, without audio", missing),
        ("left out, unreadable", unreadable),
        ("left out, without a caption", wordless),
        (
            "left out, since files of that name lie in several folders (write the folder in the table)",
            tree.unsure,
        ),
        ("found in another folder than the table says", tree.elsewhere),
    ):
        if items:
            print(f"{text}: {len(items):,}, such as {items[0]!r}")
    shared = len(rows) - len({row["audio"] for row in rows})
    if shared:
        print(
            f"{shared:,} clips share their file with another one: its name does not tell the start time"
        )
    if outside:
        print(
            f"left out, events and segments without length or beginning after their file ends: {outside:,}"
        )
    late = sum(
        event["offset"] > row["duration"] + 0.001 for row in rows for event in row.get("events", [])
    )
    if late:
        print(f"{late:,} events end after their file does (kept as published)")
    if not rows:
        raise ValueError(
            f"{args.path}: no clip is left to write; every one was unreadable or excluded"
        )
    for row in rows:
        del row["group"]
    write_manifest(out, rows, classes)
    return report


def with_durations(rows: list[dict], workers: int):
    """-> rows with the seconds that the file's header tells, texts of the unreadable files."""

    def seconds(row):
        try:
            row["audio"].encode("utf-8")
            return sf.info(row["audio"]).duration
        except UnicodeEncodeError:
            return (
                f"{row['audio']}: the file's name is not UTF-8, as a manifest needs it; rename it"
            )
        except (sf.SoundFileRuntimeError, OSError) as error:
            return f"{row['audio']}: {str(error).strip()}"

    with multiprocessing.pool.ThreadPool(workers) as pool:  # libsndfile lets other threads run
        found = list(
            tqdm(
                pool.imap(seconds, rows, chunksize=64),
                total=len(rows),
                desc="audio headers",
                unit="file",
                leave=False,
            )
        )
    good, bad = [], []
    for row, s in zip(rows, found):
        if isinstance(s, float) and s > 0:
            row["duration"] = s
            good.append(row)
        else:
            bad.append(s if isinstance(s, str) else f"{row['audio']}: holds no samples")
    return good, bad


def drop_outside(row: dict) -> int:
    """Take out events and segments that hold no sound of the file -> how many; rounding dust at the end is cut off."""
    end, events, dropped = row["duration"], row.get("events", []), 0
    for event in events:
        if 0 < event["offset"] - end <= 0.001:
            event["offset"] = end
    if events:
        row["events"] = [event for event in events if event["onset"] < min(event["offset"], end)]
        dropped = len(events) - len(row["events"])
        row["labels"] = labels_of(row["events"]) if dropped else row["labels"]
    for phrase in row.get("phrases", []):
        inside = [segment for segment in phrase["segments"] if segment[0] < min(segment[1], end)]
        dropped += len(phrase["segments"]) - len(inside)
        phrase["segments"] = inside
    return dropped


def sentences(texts) -> list[str]:
    """Captions that hold a word, without blanks at the ends. Two people may write the same one: both count."""
    return [text.strip() for text in texts if text and re.search(r"\w", text)]


def check_labels(path, labels, classes) -> None:
    """ValueError where a table that looks right holds other classes than the dataset has."""
    strange = sorted(set(labels) - set(classes))
    if strange:
        raise ValueError(
            f"{path}: '{strange[0]}' is not one of its {len(classes)} classes ({', '.join(classes[:3])}, ...): another "
            "dataset in the same columns? prepare.py csv reads any table"
        )


# ------------------------------------------------------------------------------------------------
# Native datasets: captions
# ------------------------------------------------------------------------------------------------


def audiocaps(path: Path, args):
    """AudioCaps v1 and 2.0: {train,val,test}.csv with audiocap_id, youtube_id, start_time, caption; audio fetched by oneself.

    Also the re-layout of the WavCaps code (file_name, caption or caption_1 .. caption_5). Rows of one
    (youtube_id, start_time) are one clip. Split = file name. Published: v1 49,838 train clips with one
    caption, 495 and 975 with five; 2.0: 91,256 / 2,475 / 4,875 captions.
    Licence: repository MIT, "free to use for academic purposes only"; audio of the YouTube owners.
    """
    folders = {
        "v1": ("dataset", "csv_files", "csv_files_v1"),
        "2.0": ("dataset2.0", "csv_files_v2"),
    }
    folder = locate("audiocaps", path, args.version and ("", *folders[args.version]))
    told = next(
        (version for version, names in folders.items() if folder.absolute().name in names),
        args.version,
    )
    if args.version not in (None, told):
        raise ValueError(
            f"{folder}: the folder's name tells AudioCaps {told}, not --version {args.version}"
        )
    new = told == "2.0" or (told is None and bool(re.search(r"2\.0|v2", folder.absolute().name)))
    published = {
        "train": {"captions": 91256} if new else {"clips": 49838, "captions": 49838},
        "val": {"clips": 495, "captions": 2475},
        "test": {"clips": 975, "captions": 4875},
    }

    def entries():
        for split in published:
            table, clips = folder / f"{split}.csv", {}
            for row in read_table(table) if table.is_file() else []:
                if "file_name" in row:  # one row a clip
                    name = stem_of(row["file_name"])
                    key, names = (name,), [name, name.removeprefix("Y")]
                    captions = [
                        text for column, text in row.items() if column.startswith("caption")
                    ]
                elif {"youtube_id", "start_time", "caption"} <= set(row):
                    key = (row["youtube_id"], row["start_time"])
                    names, captions = (
                        youtube_names(row["youtube_id"], number(table, row["start_time"])),
                        [row["caption"]],
                    )
                else:
                    raise ValueError(
                        f"{table}: expected the columns youtube_id, start_time, caption (columns there: {', '.join(row)})"
                    )
                own = (
                    names[-1] if "file_name" in row else row["youtube_id"]
                )  # an id may itself begin with Y
                clip = clips.setdefault(
                    key,
                    {"names": names, "inside": split, "captions": [], "id": own, "split": split},
                )
                clip["captions"] += captions
                clip["names"] += filter(None, [row.get("audiocap_id")])
            yield from (clip | {"captions": sentences(clip["captions"])} for clip in clips.values())

    return entries(), None, published


def clotho(path: Path, args):
    """Clotho v2.1: clotho_captions_{development,validation,evaluation}.csv, audio in folders of those names.

    Splits development -> train, validation -> val, evaluation -> test; clotho_metadata_*.csv, where there,
    gives the Freesound id and (--tags) the keywords. File names may begin with a blank, and repeat across
    splits. Published: 3,839 / 1,045 / 1,045 clips, 5 captions each.
    Licence: Tampere University, non-commercial with attribution; clips under their own CC licences.
    """
    folder = locate("clotho", path)
    published = {
        s: {"clips": n, "captions": 5 * n}
        for s, n in (("train", 3839), ("val", 1045), ("test", 1045))
    }

    def entries():
        for name, split in (
            ("development", "train"),
            ("validation", "val"),
            ("evaluation", "test"),
        ):
            table, about = (
                folder / f"clotho_captions_{name}.csv",
                folder / f"clotho_metadata_{name}.csv",
            )
            facts = (
                {
                    row["file_name"]: row
                    for row in read_table(about, "file_name", "sound_id", "keywords")
                }
                if about.is_file()
                else {}
            )
            if table.is_file() and not facts:
                print(
                    f"{about}: not there, so these clips have no Freesound id by which --exclude and check could tell them"
                )
            for row in read_table(table, "file_name", "caption_1") if table.is_file() else []:
                stem, fact = stem_of(row["file_name"]), facts.get(row["file_name"], {})
                entry = {
                    "names": [stem, html.unescape(stem)],
                    "inside": name,
                    "split": split,
                    "captions": [
                        row[f"caption_{k}"].strip()
                        for k in range(1, 6)
                        if row.get(f"caption_{k}", "").strip()
                    ],
                }
                if fact.get("sound_id", "").isdigit():  # else "Not found"
                    entry["id"] = fact["sound_id"]
                if args.tags and fact.get("keywords"):
                    entry["labels"] = [word for word in fact["keywords"].split(";") if word]
                yield entry

    return entries(), None, published


WAVCAPS = {
    "AudioSet_SL": 108317,
    "BBC_Sound_Effects": 31201,
    "FreeSound": 262300,
    "SoundBible": 1232,
}


def wavcaps(path: Path, args):
    """WavCaps: json_files/<Source>/*_final.json; audio <id>.flac below a folder of the source's name.

    Sources AudioSet_SL (Y<youtube id>), BBC_Sound_Effects, FreeSound, SoundBible; all for training. --blacklist
    takes files or the names of its own lists (exclude_all_ac, exclude_test_ac, exclude_ub8k_esc50_vggsound),
    also aac-datasets' CSVs. Published: 108,317 + 31,201 + 262,300 + 1,232 clips, one caption each.
    Licence: academic use only; sources keep their own.
    """
    folder, banned = locate("wavcaps", path), {"AudioSet_SL": set(), "FreeSound": set()}
    for item in args.blacklist:
        file = first_file(
            Path(item),
            folder / "blacklist" / f"{item}.json",
            folder / "blacklist" / f"blacklist_{item}.json",
        )
        if file is None:
            known = sorted(
                f.stem.removeprefix("blacklist_") for f in (folder / "blacklist").glob("*.json")
            )
            raise FileNotFoundError(
                f"--blacklist {item}: no such file; WavCaps' own lists here: {', '.join(known) or 'none'}"
            )
        lists = (
            read_json(file)
            if file.suffix == ".json"
            else {"both": [row["id"] for row in read_table(file, "id")]}
        )
        for name in itertools.chain(*lists.values()):
            banned["FreeSound" if stem_of(name).isdigit() else "AudioSet_SL"].add(stem_of(name))
    tables = [
        (source, file)
        for source in args.sources or WAVCAPS
        for file in sorted((folder / source).glob("*_final.json"))
    ]
    if not tables:
        raise FileNotFoundError(
            f"{folder}: no JSON file of {', '.join(args.sources)}; expected for example FreeSound/fsd_final.json"
        )

    def entries():
        for source, file in tables:
            content, dropped = read_json(file), 0
            if not isinstance(content, dict) or "data" not in content:
                raise ValueError(
                    f'{file}: expected WavCaps\' {{"num_captions_per_audio", "data"}}, found other JSON'
                )
            for record in content["data"]:
                stem = stem_of(str(record["id"]))
                if stem in banned.get(source, ()):
                    dropped += 1
                    continue
                # SoundBible's and BBC's numbers are no Freesound ids: keep them apart
                own = (
                    stem.removeprefix("Y")
                    if source == "AudioSet_SL"
                    else stem
                    if source == "FreeSound"
                    else f"{source}:{stem}"
                )
                entry = {
                    "names": [stem, stem.removeprefix("Y")] if source == "AudioSet_SL" else [stem],
                    "inside": source,
                    "group": source,
                    "captions": sentences([record["caption"]]),
                    "id": own,
                    "split": "train",
                }
                if args.tags and record.get("tags"):
                    entry["labels"] = record["tags"]
                yield entry
            if args.blacklist:
                print(f"--blacklist: {dropped:,} clips of {source} left out")

    return (
        entries(),
        None,
        {source: {"clips": WAVCAPS[source], "captions": WAVCAPS[source]} for source, _ in tables},
    )


# ------------------------------------------------------------------------------------------------
# Native datasets: labels
# ------------------------------------------------------------------------------------------------

ESC50 = """dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets chirping_birds water_drops
wind pouring_water toilet_flush thunderstorm crying_baby sneezing clapping breathing coughing footsteps laughing brushing_teeth
snoring drinking_sipping door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine vacuum_cleaner
clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn engine train church_bells airplane fireworks
hand_saw""".split()  # in the order of `target`
ESC10 = {
    "Dog bark": "dog",
    "Rooster": "rooster",
    "Rain": "rain",
    "Sea waves": "sea_waves",
    "Fire crackling": "crackling_fire",
    "Baby cry": "crying_baby",
    "Person sneeze": "sneezing",
    "Clock tick": "clock_tick",
    "Helicopter": "helicopter",
    "Chainsaw": "chainsaw",
}
URBANSOUND8K = """air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer siren
street_music""".split()  # in the order of classID
TUT2017 = """beach bus cafe/restaurant car city_center forest_path grocery_store home library metro_station office park
residential_area train tram""".split()
DESED = """Alarm_bell_ringing Blender Cat Dishes Dog Electric_shaver_toothbrush Frying Running_water Speech Vacuum_cleaner""".split()


def fsd50k(path: Path, args):
    """FSD50K: FSD50K.ground_truth/{dev,eval,vocabulary}.csv, audio FSD50K.{dev,eval}_audio/<fname>.wav.

    Splits: dev's own train / val, eval -> test; 200 classes, parents included. --captions takes title and
    description of FSD50K.metadata/*_clips_info_FSD50K.json as captions; clips without either are left out.
    Published: 36,796 / 4,170 / 10,231 clips. Licence: CC BY 4.0; clips CC0, BY, BY-NC or Sampling+.
    """
    truth = locate("fsd50k", path) / "FSD50K.ground_truth"
    tables = {
        part: read_table(truth / f"{part}.csv", "fname", "labels", *["split"] * (part == "dev"))
        for part in ("dev", "eval")
        if (truth / f"{part}.csv").is_file()
    }
    labels = {
        label for rows in tables.values() for row in rows for label in row["labels"].split(",")
    }
    vocabulary = truth / "vocabulary.csv"
    classes = (
        [row["label"] for row in read_table(vocabulary, columns=["index", "label", "mid"])]
        if vocabulary.is_file()
        else []
    )
    if not labels <= set(classes):
        print(
            f"{vocabulary}: {f'lists {len(labels & set(classes))} of {len(labels)} labels' if classes else 'not there'}; classes.txt "
            "is the sorted list of labels instead"
        )
        classes = sorted(labels | set(classes))

    def entries():
        for part, rows in tables.items():
            texts = {}
            if args.captions:
                info = path / "FSD50K.metadata" / f"{part}_clips_info_FSD50K.json"
                if not info.is_file():
                    raise FileNotFoundError(f"--captions: needs {info} (FSD50K.metadata.zip)")

                def plain(words):
                    return " ".join(
                        html.unescape(re.sub("<[^>]*>", " ", words)).split()
                    )  # they hold HTML

                texts = {
                    name: sentences(
                        [
                            re.sub(
                                r"\.(wav|aiff?|flac|ogg|mp3)$",
                                "",
                                plain(clip.get("title", "")),
                                flags=re.I,
                            ),
                            plain(clip.get("description", "")),
                        ]
                    )
                    for name, clip in read_json(info).items()
                }
            for row in rows:
                captions = {"captions": texts.get(row["fname"], [])} if args.captions else {}
                yield {
                    "names": [row["fname"]],
                    "inside": f"FSD50K.{part}_audio",
                    **captions,
                    "labels": row["labels"].split(","),
                    "id": row["fname"],
                    "split": SPLITS[row["split"]] if part == "dev" else "test",
                }

    return (
        entries(),
        classes,
        {s: {"clips": n} for s, n in (("train", 36796), ("val", 4170), ("test", 10231))},
    )


def esc50(path: Path, args):
    """ESC-50: meta/esc50.csv, audio/{fold}-{Freesound id}-{take}-{target}.wav.

    No split: five folds, each tested by the other four. Published: 2,000 clips, 50 classes, 400 a fold; mirrors
    with a part of them work. Licence: CC BY-NC 3.0 (its ESC-10 part CC BY 3.0).
    """
    locate("esc50", path)
    table = path / "meta" / "esc50.csv"
    rows = read_table(table, "filename", "fold", "category", "src_file")
    check_labels(table, [row["category"] for row in rows], ESC50)
    return esc_entries(table, rows), ESC50, {"all": {"clips": 2000}}


def esc_entries(table: Path, rows):
    for row in rows:
        yield {
            "names": [stem_of(row["filename"])],
            "labels": [row["category"]],
            "id": row["src_file"],
            "fold": int(number(table, row["fold"])),
        }


def esc10(path: Path, args):
    """ESC-10: the old folders '001 - Dog bark/{fold}-{Freesound id}-{take}.ogg', or the rows of ESC-50 that are marked esc10.

    Labels are ESC-50's words. No split, five folds. Published: 400 clips, 10 classes. Licence: CC BY 3.0.
    """
    locate("esc10", path)
    classes, table = [c for c in ESC50 if c in ESC10.values()], path / "meta" / "esc50.csv"
    published = {"all": {"clips": 400}}
    if table.is_file():
        rows = [
            row
            for row in read_table(table, "filename", "fold", "category", "src_file", "esc10")
            if row["esc10"].lower() == "true"
        ]
        return esc_entries(table, rows), classes, published
    files = [
        file
        for file in sorted(path.glob("[0-9][0-9][0-9] - */*"))
        if file.suffix.lower() in AUDIO_SUFFIXES
    ]
    check_labels(path, [file.parent.name.split(" - ", 1)[1] for file in files], list(ESC10))
    strange = next(
        (file for file in files if not re.fullmatch(r"\d-\d+-[A-Z](-\d+)?", file.stem)), None
    )
    if strange:
        raise ValueError(
            f"{strange}: not an ESC-10 clip, which is called FOLD-FREESOUNDID-TAKE; move the file elsewhere"
        )
    entries = (
        {
            "names": [file.stem],
            "path": file,
            "labels": [ESC10[file.parent.name.split(" - ", 1)[1]]],
            "id": file.stem.split("-")[1],
            "fold": int(file.stem.split("-")[0]),
        }
        for file in files
    )
    return entries, classes, published


def urbansound8k(path: Path, args):
    """UrbanSound8K: metadata/UrbanSound8K.csv (with or without header), audio/fold{1..10}/{fsID}-{classID}-{n}-{n}.wav.

    No split: ten folds, never reshuffled. start and end in the table are positions in the source recording.
    Published: 8,732 clips, 10 classes. Licence: CC BY-NC 3.0.
    """
    locate("urbansound8k", path)
    table = path / "metadata" / "UrbanSound8K.csv"
    rows = read_table(
        table,
        "slice_file_name",
        "fsID",
        "fold",
        "class",
        columns=["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"],
    )
    check_labels(table, [row["class"] for row in rows], URBANSOUND8K)
    entries = (
        {
            "names": [stem_of(row["slice_file_name"])],
            "labels": [row["class"]],
            "id": row["fsID"],
            "fold": int(number(table, row["fold"])),
        }
        for row in rows
    )
    return entries, URBANSOUND8K, {"all": {"clips": 8732}}


def vggsound(path: Path, args):
    """VGGSound: vggsound.csv without header (id, start, label, split), else data/{train,test}.csv (id_start.mp4, label).

    309 classes from data/stat.csv, else from the table; misspellings are official. Audio <id>_<start:06d>.* first.
    Published: 183,730 / 15,446 clips. Licence: metadata CC BY 4.0, audio of the owners.
    """
    folder, rows = locate("vggsound", path), []
    tables = [
        f
        for f in (folder / "vggsound.csv", folder / "train.csv", folder / "test.csv")
        if f.is_file()
    ]
    tables = tables[:1] if tables[0].name == "vggsound.csv" else tables
    for table in tables:
        if table.name == "vggsound.csv":
            rows += [
                (r["youtube_id"], int(number(table, r["start"])), r["label"], SPLITS[r["split"]])
                for r in read_table(table, columns=["youtube_id", "start", "label", "split"])
            ]
        else:
            for r in read_table(table, columns=["file", "label"]):
                name, _, start = stem_of(r["file"]).rpartition("_")
                rows.append((name, int(number(table, start)), r["label"], table.stem))
    stat = first_file(folder / "stat.csv", folder / "data" / "stat.csv", path / "stat.csv")
    classes = (
        [r["label"] for r in read_table(stat, columns=["label", "count", "group"])]
        if stat
        else sorted({row[2] for row in rows})
    )
    check_labels(tables[0], [row[2] for row in rows], classes)
    entries = (
        {
            "names": [f"{name}_{start:06d}", *youtube_names(name, start)],
            "labels": [label],
            "id": name,
            "split": split,
        }
        for name, start, label, split in rows
    )
    return entries, classes, {"train": {"clips": 183730}, "test": {"clips": 15446}}


def audioset(path: Path, args):
    """AudioSet, weak labels: {balanced_train,unbalanced_train,eval}_segments.csv and class_labels_indices.csv.

    Splits: both train files -> train, eval -> test; 527 classes by display name, several a clip. A blank follows
    each comma of the tables. Published: 22,160 (balanced) and 2,042,985 / 20,371 clips; much audio is gone.
    Licence: CC BY 4.0; ontology CC BY-SA 4.0; audio of the owners.
    """
    folder = locate("audioset", path)
    names = first_file(
        *(place / "class_labels_indices.csv" for place in (folder, path, path.absolute().parent))
    )
    if names is None:
        raise FileNotFoundError(
            f"{folder}: class_labels_indices.csv is missing, which names the 527 classes; put it beside the "
            "*_segments.csv files"
        )
    display = {
        row["mid"]: row["display_name"]
        for row in read_table(names, columns=["index", "mid", "display_name"])
    }

    def entries():
        for group in ("balanced_train", "unbalanced_train", "eval"):
            table = folder / f"{group}_segments.csv"
            if not table.is_file():
                continue
            for row in read_table(
                table, columns=["id", "start", "end", "labels"], comment="# ", skipinitialspace=True
            ):
                mids = row["labels"].split(",")
                if not set(mids) <= set(display):
                    raise ValueError(
                        f"{table}: clip {row['id']} has {set(mids) - set(display)}, which {names} does not list"
                    )
                yield {
                    "names": youtube_names(row["id"], number(table, row["start"])),
                    "group": group,
                    "labels": [display[mid] for mid in mids],
                    "id": row["id"],
                    "split": "test" if group == "eval" else "train",
                }

    published = {
        "balanced_train": {"clips": 22160},
        "unbalanced_train": {"clips": 2042985},
        "eval": {"clips": 20371},
    }
    return entries(), list(display.values()), published


def tut2017(path: Path, args):
    """TUT Acoustic Scenes 2017: TUT-acoustic-scenes-2017-{development,evaluation}/{meta.txt, audio/, evaluation_setup/}.

    Give one of the two folders or the one that holds both. development -> train, with the fold whose
    fold*_evaluate.txt holds the clip; evaluation -> test. 15 scenes. Published: 4,680 / 1,620 clips of 10 s.
    Licence: non-commercial.
    """
    root = locate("tut2017", path)
    parts = (
        [root]
        if (root / "meta.txt").is_file()
        else sorted(f.parent for f in root.glob("TUT-acoustic-scenes-2017-*/meta.txt"))
    )

    def entries():
        for part in parts:
            rows = read_table(
                part / "meta.txt",
                "file",
                "scene",
                columns=["file", "scene", "recording"],
                delimiter="\t",
            )
            check_labels(part / "meta.txt", [row["scene"] for row in rows], TUT2017)
            folds = {
                row["file"]: fold
                for fold in range(1, 5)
                for setup in [part / "evaluation_setup" / f"fold{fold}_evaluate.txt"]
                if setup.is_file()
                for row in read_table(setup, "file", columns=["file", "scene"], delimiter="\t")
            }
            # The evaluation part has evaluate.txt, without folds
            test = (
                "evaluation" in part.absolute().name
                or (part / "evaluation_setup" / "evaluate.txt").is_file()
            )
            for row in rows:
                entry = {
                    "names": [stem_of(row["file"])],
                    "path": part / row["file"],
                    "inside": part.name,
                    "labels": [row["scene"]],
                    "split": "test" if test else "train",
                }
                yield entry | ({"fold": folds[row["file"]]} if row["file"] in folds else {})

    return entries(), TUT2017, {"train": {"clips": 4680}, "test": {"clips": 1620}}


# ------------------------------------------------------------------------------------------------
# Native datasets: events and phrases
# ------------------------------------------------------------------------------------------------


def event_of(source, label, onset, offset) -> dict:
    event = {"label": label, "onset": number(source, onset), "offset": number(source, offset)}
    if not 0 <= event["onset"] <= event["offset"]:
        raise ValueError(
            f"{source}: an event of '{label}' from {onset} to {offset} s; expected 0 <= onset <= offset"
        )
    return event


def events_by_file(
    table, rows: list[dict], name: str, onset: str, offset: str, label: str
) -> dict[str, list[dict]]:
    """{file: events} in the table's order; a row without a label is a file in which nothing happens (DESED)."""
    files = collections.defaultdict(list)
    for row in rows:
        files[row[name]] += (
            [event_of(table, row[label], row[onset], row[offset])] if row.get(label) else []
        )
    return files


def labels_of(events: list[dict]) -> list[str]:
    return list(dict.fromkeys(event["label"] for event in events))


def audioset_strong(path: Path, args):
    """AudioSet-Strong: audioset_{train,eval}_strong.tsv and mid_to_display_name.tsv, or TSVs `filename onset offset event_label`.

    Splits train, eval -> test (converted files: by their names). segment_id is <youtube id>_<start in ms>, times are
    relative to the segment. classes.txt: the 407 classes that occur in both splits. Clips without events are not listed.
    Published: 103,463 clips with 934,821 events / 16,996 with 139,538. Licence: CC BY 4.0; audio of the owners.
    """
    folder = locate("audioset_strong", path)
    tables = [
        f
        for f in (folder / "audioset_train_strong.tsv", folder / "audioset_eval_strong.tsv")
        if f.is_file()
    ]
    names = first_file(folder / "mid_to_display_name.tsv", path / "mid_to_display_name.tsv")
    if tables and names is None:
        raise FileNotFoundError(
            f"{folder}: mid_to_display_name.tsv is missing, which names the classes; put it beside {tables[0].name}"
        )
    display = (
        []
        if names is None
        else read_table(names, columns=["mid", "name"], delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    display = {row["mid"]: row["name"] for row in display}
    splits = {table: "test" if "eval" in table.name else "train" for table in tables}
    for table in [] if tables else sorted(folder.glob("*.tsv")):
        if read_text(table).startswith("filename\tonset\toffset\tevent_label"):
            words = set(re.split(r"[^a-z]+", table.stem.lower())) & set(SPLITS)
            if len(words) != 1:
                raise ValueError(
                    f"{table}: its name tells no split; rename it so that it holds one of train, val, test, eval"
                )
            splits[table] = SPLITS[words.pop()]

    columns = (
        ("segment_id", "start_time_seconds", "end_time_seconds", "label")
        if tables
        else ("filename", "onset", "offset", "event_label")
    )

    def entries():
        for table, split in splits.items():
            rows = read_table(table, *columns, delimiter="\t")
            for name, events in events_by_file(table, rows, *columns).items():
                stem = stem_of(name)
                for event in events:
                    if tables and event["label"] not in display:
                        raise ValueError(
                            f"{table}: clip {name} has {event['label']!r}, which {names} does not list"
                        )
                    event["label"] = display.get(event["label"], event["label"])
                video = youtube_id(stem, sure=True) or stem
                start = stem.rsplit("_", 1)[1] if re.fullmatch(r"Y?[\w-]{11}_\d+", stem) else None
                more = youtube_names(video, int(start) / 1000) if start else [f"Y{video}", video]
                yield {
                    "names": [stem, f"Y{stem}", *more],
                    "events": events,
                    "labels": labels_of(events),
                    "id": video,
                    "split": split,
                }

    classes = read_text(Path(__file__).parent / "classes" / "audioset_strong_407.txt").splitlines()
    return (
        entries(),
        classes,
        {"train": {"clips": 103463, "events": 934821}, "test": {"clips": 16996, "events": 139538}},
    )


def desed(path: Path, args):
    """DESED: metadata/{train,validation,eval}/*.tsv, audio/... as the desed package lays it out.

    --sets names tables: weak (labels), validation (-> val) and public (-> test) by default; also unlabel_in_domain,
    synthetic21_train and synthetic21_validation (their soundscapes.tsv). A row without an event is a clip in which
    nothing happens. Published: 1,578 weak clips; validation 1,168 with 4,224 events; public 692 with 2,765;
    unlabelled 14,412; synthetic 10,000. Licence: metadata MIT; audio per file, from YouTube and Freesound.
    """
    folder = locate("desed", path)
    published = {
        "weak": {"clips": 1578},
        "validation": {"clips": 1168, "events": 4224},
        "public": {"clips": 692, "events": 2765},
        "unlabel_in_domain": {"clips": 14412},
        "synthetic21_train": {"clips": 10000},
    }
    tables = {
        name: table
        for name in args.sets
        for pattern in (f"**/{name}.tsv", f"**/{name}/soundscapes.tsv")
        for table in sorted(path.glob(pattern))
    }
    if not tables:
        there = ", ".join(sorted(f.stem for f in folder.glob("**/*.tsv")))
        raise FileNotFoundError(
            f"{folder}: no table of --sets {' '.join(args.sets)} (there: {there})"
        )

    def entries():
        for group, table in tables.items():
            rows = read_table(table, "filename", delimiter="\t")
            print(f"{group}: reading {table}")  # copies of other years may lie beside it
            strong = bool(rows) and "event_label" in rows[0]
            split = next(
                (
                    SPLITS[part]
                    for part in reversed(table.relative_to(path).parts)
                    if part in SPLITS
                ),
                "train",
            )
            files = events_by_file(table, rows, "filename", "onset", "offset", "event_label")
            weak = {
                row["filename"]: [
                    label for label in (row.get("event_labels") or "").split(",") if label
                ]
                for row in rows
            }
            for name, events in files.items():
                labels = labels_of(events) if strong else weak[name]
                check_labels(table, labels, DESED)
                stem = stem_of(name)
                entry = {
                    "names": [stem],
                    "inside": group if group.startswith("synth") else None,
                    "group": group,
                    "split": split,
                }
                entry |= {"events": events} if strong else {}
                entry |= {"labels": labels} if strong or labels else {}
                video = youtube_id(stem, sure=True)  # None for Freesound's and synthetic clips
                yield entry | ({"id": video} if video else {})

    return entries(), DESED, {group: published.get(group, {}) for group in args.sets}


def audiogrounding(path: Path, args):
    """AudioGrounding v2 (TAG): {train,val,test}/label.json, {split}/metadata/{split}.json or {split}.json; audio Y<id>.wav.

    A JSON list of captions with audiocap_id, audio_id, tokens and phrases with segments; segments [[0, 0]] mean
    that the phrase is not heard: it is kept without a segment. Captions of one audio file are one row. Version 1 (one
    dictionary of columns) is read by prepare.py csv, see README. Published (version 1): 4,489 / 31 / 70 clips.
    Licence: repository MIT, Zenodo CC BY 4.0.
    """
    folder = locate("audiogrounding", path)

    def entries():
        for split in ("train", "val", "test"):
            table = first_file(
                folder / split / "label.json",
                folder / split / "metadata" / f"{split}.json",
                folder / f"{split}.json",
            )
            records, clips = read_json(table) if table else [], {}
            if isinstance(records, dict):
                raise ValueError(
                    f"{table}: AudioGrounding version 1 (columns such as {', '.join(list(records)[:3])}); run: prepare.py csv "
                    f"{table} --audio filename --caption caption --phrase soundtag --segments timestamps --split {split}"
                )
            for record in records:
                stem, tokens = stem_of(record["audio_id"]), record["tokens"]
                clip = clips.setdefault(stem, {"captions": [], "phrases": []})
                clip["captions"].append(tokens if isinstance(tokens, str) else " ".join(tokens))
                clip["phrases"] += [
                    {"phrase": p["phrase"], "segments": real_segments(p["segments"])}
                    for p in record["phrases"]
                    if p["phrase"].strip()
                ]
            for stem, clip in clips.items():
                video = youtube_id(stem, sure=True) or stem
                yield {
                    "names": [stem, f"Y{video}", video],
                    "inside": split,
                    "captions": sentences(clip["captions"]),
                    "phrases": clip["phrases"],
                    "id": video,
                    "split": split,
                }

    return entries(), None, {}


def real_segments(segments) -> list[list[float]]:
    """Segments without AudioGrounding's [0, 0], which says that there is none."""
    return [[float(on), float(off)] for on, off in segments if off > on >= 0]


# ------------------------------------------------------------------------------------------------
# Native datasets: questions
# ------------------------------------------------------------------------------------------------


def clotho_aqa(path: Path, args):
    """Clotho-AQA: clotho_aqa_{train,val,test}.csv (file_name, QuestionText, answer, confidence), audio_files/*.wav.

    Three people answer each question: `answer` is what most say (else what the first says), in lower case,
    `answers` are all three. clotho_aqa_metadata.csv gives the Freesound id where it has a column sound_id. Published:
    1,991 clips, 35,838 answers to 11,946 questions. Licence: see its LICENSE.txt.
    """
    folder = locate("clotho_aqa", path)
    about = folder / "clotho_aqa_metadata.csv"
    ids = (
        {
            row.get("file_name"): row.get("sound_id", "")
            for row in read_table(about, delimiter=delimiter_of(about))
        }
        if about.is_file()
        else {}
    )
    if not any(map(str.isdigit, ids.values())):
        print(
            f"{about}: no sound_id there, so --exclude and check can tell these clips by their content alone; exclude Clotho's too"
        )

    def entries():
        for split in ("train", "val", "test"):
            table, clips = folder / f"clotho_aqa_{split}.csv", collections.defaultdict(dict)
            for row in (
                read_table(table, "file_name", "QuestionText", "answer") if table.is_file() else []
            ):
                clips[row["file_name"]].setdefault(row["QuestionText"].strip(), []).append(
                    row["answer"].strip().lower()
                )
            for name, questions in clips.items():
                qa = [
                    {
                        "question": q,
                        "answer": collections.Counter(a).most_common(1)[0][0],
                        "answers": a,
                    }
                    for q, a in questions.items()
                ]
                yield {
                    "names": [stem_of(name), html.unescape(stem_of(name))],
                    "qa": qa,
                    "split": split,
                    **({"id": ids[name]} if ids.get(name, "").isdigit() else {}),
                }

    return (
        entries(),
        None,
        {"train": {"clips": 1174}, "val": {"clips": 344}, "test": {"clips": 473}},
    )


def music_avqa(path: Path, args):
    """MUSIC-AVQA: data/json/avqa-{train,val,test}.json (--version json_update: the corrected ones), audio <video_id>.wav.

    Placeholders of a question are filled in order from templ_values; the answer's key is spelled `anser`; type and
    templ_values are JSON inside text. Published: val 4,595 questions on 3,815 videos, test 9,185 on 6,399
    (updated: 4,568 / 9,129 questions), 45,867 on 9,288 in all. Licence: repository MIT; videos of the owners.
    """
    folder = locate("music_avqa", path, ("", args.version, f"data/{args.version}"))
    old = folder.absolute().name != "json_update"

    def entries():
        for split in ("train", "val", "test"):
            table, videos = folder / f"avqa-{split}.json", collections.defaultdict(list)
            for record in read_json(table) if table.is_file() else []:
                values = iter(json.loads(record["templ_values"]))
                question = re.sub(
                    r"<\w+>", lambda hole: str(next(values, hole[0])), record["question_content"]
                ).strip()
                videos[record["video_id"]].append(
                    {
                        "question": question,
                        "answer": record["anser"],
                        "type": json.loads(record["type"]),
                    }
                )
            yield from (
                {"names": [video], "qa": qa, "id": video, "split": split}
                for video, qa in videos.items()
            )

    return (
        entries(),
        None,
        {
            "train": {},
            "val": {"clips": 3815, "qa": 4595} if old else {"qa": 4568},
            "test": {"clips": 6399, "qa": 9185} if old else {"qa": 9129},
        },
    )


# ------------------------------------------------------------------------------------------------
# Any table, any folders
# ------------------------------------------------------------------------------------------------


def records_of(file: Path, args, need=()) -> list[dict]:
    """A table, JSON Lines, a JSON list, {"data": list} or {column: {row: value}} (pandas) as a list of dictionaries."""
    if file.suffix in (".jsonl", ".ndjson"):
        records = []
        for row, line in enumerate(
            read_text(file).split("\n"), 1
        ):  # splitlines() would cut at U+2028 inside a caption
            try:
                records += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{row}: not valid JSON ({error.msg})") from None
    elif file.suffix == ".json":
        records = read_json(file)
        if isinstance(records, dict) and isinstance(records.get("data"), list):
            records = records["data"]
        elif (
            isinstance(records, dict)
            and records
            and all(isinstance(column, dict) for column in records.values())
        ):
            records = [
                {name: column.get(row) for name, column in records.items()}
                for row in next(iter(records.values()))
            ]
    else:
        delimiter = {"tab": "\t", "\\t": "\t", None: delimiter_of(file)}.get(
            args.delimiter, args.delimiter
        )
        return read_table(file, *need, columns=args.columns, delimiter=delimiter)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{file}: expected a list of JSON objects, one a clip, caption or event")
    return records


def any_table(path: Path, args):
    """Any CSV, TSV, JSON Lines or JSON: name its columns; rows of one audio file become one clip.

    PATH is one table, or a folder of tables, one a clip: then `file` is the table's name without suffix and `folder`
    that of its folder, to be used like columns. The columns' values may be lists in JSON.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such table or folder of tables")
    files = (
        [path]
        if path.is_file()
        else sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".csv", ".tsv", ".jsonl"))
    )
    if not files:
        raise FileNotFoundError(f"{path}: a folder without .txt, .csv, .tsv or .jsonl tables")
    literal = args.split if args.split in ("train", "val", "test") else None
    wanted = [
        c
        for c in (
            args.audio,
            *args.caption,
            args.label,
            args.onset,
            args.offset,
            args.phrase,
            args.segments,
            args.id,
            args.fold,
            None if literal else args.split,
        )
        if c
    ]
    if (
        bool(args.onset) != bool(args.offset)
        or (args.onset and not args.label)
        or bool(args.phrase) != bool(args.segments)
    ):
        raise ValueError(
            "--onset, --offset and --label go together, and so do --phrase and --segments"
        )
    clips = {}
    for file in files:
        about = {} if path.is_file() else {"file": file.stem, "folder": file.parent.name}
        records = records_of(file, args, [c for c in wanted if c not in about])
        records = [about | record for record in records] if about else records
        known = set(itertools.chain(about, *records[:1000]))
        absent = [c for c in wanted if c not in known] if records else []
        if absent:
            raise ValueError(
                f"{file}: no column '{absent[0]}' (columns there: {', '.join(sorted(known))})"
            )
        for record in records or [about] * bool(
            about
        ):  # an empty table: a clip in which nothing happens
            add_record(clips, record, literal, file, args)
    classes = sorted({label for clip in clips.values() for label in clip.get("labels", [])}) or None

    def entries():  # names only now: a dozen for each of two million clips would fill the memory
        for (name, _), clip in clips.items():
            stem = stem_of(name)
            youtube = (
                YOUTUBE.fullmatch(stem)
                if youtube_id(stem, sure=True) in (youtube_id(stem), clip.get("id"))
                else None
            )
            yield clip | {
                "names": [
                    stem,
                    html.unescape(stem),
                    *(youtube_names(youtube[1], youtube[2] or 0) if youtube else []),
                ],
                "inside": os.path.basename(os.path.dirname(name)),
                "written": name,
            }

    return entries(), classes, {}


def add_record(clips: dict, record: dict, literal, file: Path, args) -> None:
    """Merge one row of a table into the clip of its audio file."""
    name = str(record.get(args.audio) or "")
    if not name:
        raise ValueError(f"{file}: a row has nothing in column '{args.audio}': {record}")
    split = literal or (str(record[args.split]) if args.split else None)
    if split and split.lower() not in SPLITS:
        raise ValueError(
            f"{file}: '{split}' in column '{args.split}' is no split; known: {', '.join(SPLITS)}"
        )
    stem, texts = stem_of(name), [record.get(column) for column in args.caption]
    clip = clips.setdefault(
        (name, split),
        {
            "path": os.path.join(args.audio_dir or file.parent, name),
            **({"captions": []} if args.caption else {}),
            **({"events": []} if args.onset else {}),
            **({"labels": []} if args.label else {}),
            **({"phrases": []} if args.phrase else {}),
            **({"split": SPLITS[split.lower()]} if split else {}),
        },
    )
    told = str(record[args.id]) if args.id and record.get(args.id) not in (None, "") else None
    own = youtube_id(stem_of(told), sure=True) or told if told else youtube_id(stem)
    clip |= {"id": own} if own else {}
    if args.fold:
        clip["fold"] = (
            int(record[args.fold]) if str(record[args.fold]).isdigit() else str(record[args.fold])
        )
    if args.caption:
        new = sentences(itertools.chain(*(t if isinstance(t, list) else [t] for t in texts)))
        per_part = (
            args.onset or args.phrase
        )  # then each row of an event or phrase repeats its clip's caption
        clip["captions"] += [
            caption for caption in new if not per_part or caption not in clip["captions"]
        ]
    label = record.get(args.label) if args.label else None
    labels = label if isinstance(label, list) else [] if label in (None, "") else [str(label)]
    if args.label_separator:
        labels = [part for text in labels for part in text.split(args.label_separator)]
    clip.get("labels", []).extend(
        x for x in dict.fromkeys(str(x).strip() for x in labels) if x not in clip["labels"]
    )
    if args.onset and labels:
        clip["events"] += [
            event_of(file, str(x).strip(), record.get(args.onset), record.get(args.offset))
            for x in labels
        ]
    if args.phrase:
        segments = record[args.segments]
        try:
            real = real_segments(json.loads(segments) if isinstance(segments, str) else segments)
        except (ValueError, TypeError):
            raise ValueError(
                f"{file}: {segments!r} in column '{args.segments}'; expected [[onset, offset], ...] in seconds"
            ) from None
        clip["phrases"].append({"phrase": record[args.phrase], "segments": real})


def folders(path: Path, args):
    """One folder of sound files per class; above them, if you like, one folder per split (train, val, test)."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    files = [
        f
        for f in sorted(path.rglob("*"))
        if f.suffix.lower() in AUDIO_SUFFIXES and not f.name.startswith(".")
    ]
    parts = [f.relative_to(path).parts for f in files]
    by_split = bool(files) and all(len(p) == 3 and p[0].lower() in SPLITS for p in parts)
    if not files or not (by_split or all(len(p) == 2 for p in parts)):
        strange = next((f for f, p in zip(files, parts) if len(p) != 2), "no sound file")
        raise ValueError(
            f"{path}: expected CLASS/file or SPLIT/CLASS/file, found {strange}; give the folder that holds the class folders"
        )
    entries = (
        {
            "names": [f.stem],
            "path": f,
            "labels": [f.parent.name],
            **({"split": SPLITS[p[0].lower()]} if by_split else {}),
        }
        for f, p in zip(files, parts)
    )
    return entries, sorted({f.parent.name for f in files}), {}


ADAPTERS = (
    audiocaps,
    clotho,
    wavcaps,
    fsd50k,
    esc50,
    esc10,
    urbansound8k,
    vggsound,
    audioset,
    tut2017,
    audioset_strong,
    desed,
    audiogrounding,
    clotho_aqa,
    music_avqa,
    any_table,
    folders,
)


# ------------------------------------------------------------------------------------------------
# Check, and the same recording in two places
# ------------------------------------------------------------------------------------------------


def keys_of(row: dict) -> list[str]:
    """Names under which a row's recording may turn up elsewhere: its id, a YouTube or Freesound id in the file's name."""
    name, keys = stem_of(Path(row["audio"]).name), []
    if row.get("id") not in (None, ""):
        keys.append(youtube_id(stem_of(str(row["id"]))) or str(row["id"]))
    freesound = re.fullmatch(
        r"\d-(\d+)-[A-Z](?:-\d+)?|(\d+)-\d-\d+-\d+", name
    )  # ESC-50 and ESC-10; UrbanSound8K
    found = youtube_id(name) or (freesound and (freesound[1] or freesound[2]))
    return keys + [found] * bool(found and found not in keys)


def file_hash(path) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def middle_of(path) -> int:
    """Of 4 KB from the middle: uncompressed files of one length share their size, not their middle."""
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return hash(file.read(4096))


def hashes_of(paths, others=None) -> dict[str, str]:
    """{path: SHA-256} of the files that may equal another one of `paths`, or one of `others`: same size, same middle."""
    paths, others = (
        [p for p in paths if os.path.isfile(p)],
        others and [p for p in others if os.path.isfile(p)],
    )
    for mark in (os.path.getsize, middle_of):
        own = {path: mark(path) for path in paths}
        if others is None:
            wanted = {
                value for value, count in collections.Counter(own.values()).items() if count > 1
            }
        else:
            theirs = {path: mark(path) for path in others}
            wanted = set(theirs.values()) & set(own.values())
            others = [path for path in others if theirs[path] in wanted]
        paths = [path for path in own if own[path] in wanted]
    with multiprocessing.pool.ThreadPool() as pool:  # hashing lets other threads run
        return dict(
            zip(
                paths,
                tqdm(
                    pool.imap(file_hash, paths),
                    total=len(paths),
                    desc="comparing files",
                    unit="file",
                    leave=False,
                ),
            )
        )


def exclude(rows: list[dict], manifests: list[str]) -> list[dict]:
    """The rows whose recording none of `manifests` holds: by id, by the id in the file's name, by the file's content."""
    for manifest in manifests:
        held = common.read_manifest([manifest])
        keys = {key for row in held for key in keys_of(row)}
        kept = [row for row in rows if keys.isdisjoint(keys_of(row))]
        hashes = hashes_of([row["audio"] for row in kept], [row["audio"] for row in held])
        contents = (
            set(hashes_of([row["audio"] for row in held], list(hashes)).values())
            if hashes
            else set()
        )
        by_id, unlike = (
            len(rows) - len(kept),
            [row for row in kept if hashes.get(row["audio"]) not in contents],
        )
        print(
            f"--exclude {manifest}: {len(rows) - len(unlike):,} clips left out, {by_id:,} by id and {len(kept) - len(unlike):,} by content"
        )
        rows = unlike
    return rows


def _check_file(row):
    """-> (sample rate or None, seconds, error text or None); decodes the whole file."""
    try:
        rate = sf.info(row["audio"]).samplerate if os.path.isfile(row["audio"]) else 16000
        waveform = common.read_audio(row["audio"], rate, expected_s=row.get("duration"))
        return rate, len(waveform) / rate, None
    except (common.AudioError, sf.SoundFileRuntimeError) as error:
        return (
            None,
            0.0,
            str(error) if isinstance(error, common.AudioError) else f"{row['audio']}: {error}",
        )


def leaks_of(rows: list[dict], places: list[str]) -> dict:
    """{(place, place): sorted keys} of the recordings that two places share; the file's content counts where no id tells."""
    hashes = hashes_of({row["audio"] for row in rows}) if len(set(places)) > 1 else {}
    keys = [
        [*keys_of(row), os.path.realpath(row["audio"]), *filter(None, [hashes.get(row["audio"])])]
        for row in rows
    ]
    owners = collections.defaultdict(set)
    for place, of_row in zip(places, keys):
        for key in of_row:
            owners[key].add(place)
    leaks, told = collections.defaultdict(set), set()
    for rank in range(max(map(len, keys))):  # ids first, so that one shared clip is one leak
        for n, of_row in enumerate(keys):
            if rank < len(of_row) and len(owners[of_row[rank]]) > 1 and n not in told:
                told.add(n)
                for pair in itertools.combinations(sorted(owners[of_row[rank]]), 2):
                    leaks[pair].add(of_row[rank])
    return {pair: sorted(found) for pair, found in sorted(leaks.items())}


def check(args) -> dict:
    """Report on manifests: counts, durations, rates, unreadable files, classes, recordings shared between splits or manifests."""
    rows = common.read_manifest(args.data)
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        found = list(
            tqdm(
                pool.imap(_check_file, rows, chunksize=16),
                total=len(rows),
                desc="decoding",
                unit="file",
            )
        )
    report = {
        "clips": len(rows),
        "unreadable": [text for _, _, text in found if text],
        "splits": {},
    }
    manifests, places = [row["where"].rsplit(":", 1)[0] for row in rows], []
    several = len(set(manifests)) > 1
    for row, manifest, (rate, seconds, error) in zip(rows, manifests, found):
        places.append(
            f"{manifest} {row.get('split', 'no split')}"
            if several
            else row.get("split", "no split")
        )
        part = report["splits"].setdefault(places[-1], collections.defaultdict(list))
        part["clips"].append(1)
        part["captions"].append(len(row.get("captions", [])))
        part["labels"] += row.get("labels", [])
        if not error:
            part["seconds"].append(seconds)
            part["rates"].append(rate)
    for place, part in report["splits"].items():
        seconds = np.array(part["seconds"] or [0])
        counts = collections.Counter(part["labels"])
        print(
            f"{place}: {len(part['clips'])} clips, {sum(part['captions'])} captions, {seconds.sum() / 3600:.2f} h, "
            f"duration {seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f} s (min / median / max), "
            f"rates {dict(collections.Counter(part['rates']))}"
        )
        if counts:
            print(
                f"  {len(counts)} classes: "
                + ", ".join(f"{k} {v}" for k, v in counts.most_common(12))
                + (", ..." if len(counts) > 12 else "")
            )
        report["splits"][place] = {
            "clips": len(part["clips"]),
            "captions": sum(part["captions"]),
            "classes": len(counts),
            "seconds": float(seconds.sum()),
        }
    print(f"unreadable files: {len(report['unreadable'])}")
    for text in report["unreadable"][:20]:
        print(f"  {text}")
    report["leaks"] = leaks_of(rows, places)
    report["shared"] = sorted({key for keys in report["leaks"].values() for key in keys})
    print(f"recordings shared between splits: {len(report['shared'])} {report['shared'][:5] or ''}")
    for (first, second), keys in report["leaks"].items():
        print(f"  {first} and {second}: {len(keys)}, such as {', '.join(keys[:3])}")
    return report


# ------------------------------------------------------------------------------------------------
# Rewritten captions: rules that reverse the order of events
# ------------------------------------------------------------------------------------------------

# What joins two events of which one follows the other: name -> the words between them, longer forms first
ORDERING = {
    "is followed by": r"(?:is|are|was|were) (?:then )?followed (?:\w+ly )?by",
    "followed by": r"(?:(?:and|which|that) (?:is|are|was|were) )?(?:and )?(?:then )?"
    r"(?:(?:shortly|closely|immediately|directly|soon) )?followed (?:(?:\w+ly|soon|later) )?by",
    "after which": r"(?:and )?after (?:which|that),?",
    "then": r"(?:(?:and|but) )?then(?: (?:later|finally|eventually|lastly))?,?",
    "later": r"and (?:(?:moments|shortly|soon) )?(?:later|afterwards?|finally|eventually|subsequently|lastly),?"
    r"|(?<=, )(?:later|afterwards|finally),?",
    "before": r"(?:(?:just|right|shortly|immediately|moments|seconds) )?before|prior to",
    "after": r"(?:(?:just|right|shortly|immediately|moments|seconds) )?after",
    "until": r"until",
}
CONNECTIVE = re.compile(
    ",? (?:"
    + "|".join(f"(?P<{name.replace(' ', '_')}>{words})" for name, words in ORDERING.items())
    + ") ",
    re.I,
)
REVERSED = {
    "prior to": "after",
    "before": "after",
    "after": "before",
    "until": "after",
}  # the same two sides, the other order

# An event with one of these cannot move: it looks back (again, louder, replies), names its own place in time (at the end, the
# first), or only makes sense last (stops, fades). The last line: an ordering word that joins no two events.
BOUND_WORDS = r"""
again another more others? else still also too same both each either one\sby\sone back off once already together itself
themselves in\sturn turns?\s(?:down|up|into|to) (?:shut\w*|power\w*|winds?|runs?)\sdown first second third last final finally
initial\w* eventual\w* subsequent\w* previous\w* next ends? ended ending beginning throughout entire\w* whole meanwhile time
times\sover moments? pause\w* seconds? minutes? continue[sd]? continuing resum\w* repeats? repeating repetition return\w*
repl(?:y|ies|ied|ying) respon\w* answer\w* react\w* echo\w* reverb\w* imitat\w* mimic\w* stop\w* ceas\w* fad(?:e|es|ed|ing)
finish\w* quit\w* halts? subsid\w* taper\w* trails? dies? dying quiets calms? settl\w* silent interrupt\w* join\w* result\w*
caus\w* due because so instead rather than chang\w* switch\w* increases? increasing decreas\w* becom\w* gets? getting
(?:loud|soft|quiet|fast|slow|high|low|clos|near|deep|heav|light|larg|hard|strong|short|long|bigg|small|great|sharp|clear|quick)i?er
before after afterwards? then followed following follows later prior until preced\w* proceed\w* as\ssoon\sas now only"""
BOUND = re.compile(r"\b(?:" + "|".join(BOUND_WORDS.split()) + r")\b|[\"“”();:!?.]", re.I)
# An event that begins so is no clause and no noun phrase of its own
NO_START = set(
    """as while when with during in on at by from over under near nearby amid among for to into onto through of and
or but it its he she they his her their this that these those who what if is are was were be been being has have one away out up
down not very suddenly slowly quickly blown broken torn thrown driven shaken struck shut hit cut put set run shot ran blew went
came spoke rang sang said made took left""".split()
)
NO_END = set("and but or the a an with shortly soon right just".split())
PRONOUNS = set("it he she they him her hers his its their them this that these those".split())
POSSESSIVES = {"his", "her", "its", "their"}
TOGETHER = set(
    "as while when whenever where which that who whose if because".split()
)  # what follows keeps the form of its verbs
NO_START |= TOGETHER
BE, AUXILIARY = (
    {"is", "are", "was", "were"},
    {"has", "have", "had", "can", "could", "does", "did", "will"},
)
PLURAL = {"people", "men", "women", "children", "geese", "mice", "sheep", "they", "police"}
ADVERBS = {"just", "often", "sometimes", "twice"}
PEOPLE = "man|men|woman|women|boy|girl|child|kid|person|people|male|female|dog|cat|baby"
# "the engine" of before: not to be told first
KNOWN_BEFORE = re.compile(
    rf"\bthe (?:\w+ )?(?:{PEOPLE}|guy|lady|speaker|animal|bird|crowd|audience|vehicle|car|truck|bus|engine|machine|"
    r"motor|motorcycle|train|sound|noise)s?\b",
    re.I,
)
# "a man then a woman talking": the verb comes later
NO_VERB_YET = re.compile(
    rf"(?:.*\b(?:with|and|of|by) )?(?:(?:an?|the) )?(?:\w+ )?(?:{PEOPLE})s?(?: (?:as|while|when) .*)?",
    re.I,
)
# Nouns that an event may begin with where one would expect a verb: "a man laughs, then silence"
NOUNS = set(
    """silence laughter music speech static applause gunfire thunder rain wind water footsteps voices noises sounds
gunshots sirens bells chimes drums birds people men women adults children traffic acceleration explosions""".split()
)
# Words after which "honks" or "honk" is a noun
BEFORE_NOUNS = set(
    """a an the of in on at by with from to and or for into over through his her its their some two three four
five six several many few multiple various numerous loud soft light low high pitched long short quick brief electronic digital
metallic small large big heavy sharp faint distant repeated repetitive rapid repeating hard single constant continuous gentle
muffled fast slow deep strange odd weird distinct different audible quiet high-pitched""".split()
)
MANY = set("two three four five six several many few multiple various numerous".split())
SERIES = set("series couple number set sound sequence".split())
# Stems of the verbs that captions of sounds use most
VERBS = """speak talk run blow chirp laugh rev sound hum idle splash bark pass play rustle cry occur move make click fall ring
buzz accelerate whistle flow hiss start begin drive snore walk go beep give clank meow honk type sing tap gurgle cheer spray fly
sew flush yell tick speed sizzle pour open bleat quack rattle scream scrape crinkle vibrate work rumble squeak roar whir clap
come hit trickle drip whimper operate thump squeal crash close chime burp growl grunt breathe clack sneeze shout approach pop
croak clang oink turn shuffle rush whoosh creak drill clink fry murmur mutter take flap crackle applaud crumple knock race whine
blare screech clop call cough tweet rub chug roll howl baa pant drop spin clatter drain trot bubble crack say burst bang step
grind shut crunch squawk break strike crow slide communicate slam neigh wail vocalize skid scratch whisper converse narrate
giggle sputter wash fill travel cross snort shift ding bounce pull decelerate slow boom pound hammer groan beat sniffle chuckle
chatter gallop yip shake sleep belch jingle ride emit chant blast snap eat write stir slosh babble thud flip chop sob resonate
purr sniff rotate perform whirl gasp explode smack dial zoom hoot shoot drag mumble holler toll swish slap drone cluck swoosh
sweep brush moan churn bleep announce tear burble toot rip boil swing shriek fart yelp rise tinkle splatter push jump cackle
wheeze exhale stomp inhale hiccup whinny whoop trill putter sway spit coo caw moo gobble chew crawl discuss argue chat crush
plunge pump sip gulp fizz squirt carry throw land arrive depart use cook cut put get do leave clean dig deliver clear lift rock
scrub wipe peel yawn snicker snarl sigh bellow crank fire twitter clunk stutter exclaim reel""".split()


def inflections(stem: str) -> dict:
    """A regular verb's stem -> {"base", "third", "ing"}: "bark", "barks", "barking"."""
    third = (
        stem + "es"
        if re.search(r"(s|x|z|ch|sh|[^aeo]o)$", stem)
        else re.sub(r"(?<=[^aeiou])y$", "ie", stem) + "s"
    )
    doubled = stem == "begin" or re.fullmatch(
        r"[^aeiou]*[aeiou][bdgmnptv]|stir|whir|occur|emit", stem
    )
    return {
        "base": stem,
        "third": third,
        "ing": (stem + stem[-1] if doubled else re.sub(r"(?<=[^eyo])e$", "", stem)) + "ing",
    }


FORMS = {
    word: (form, stem) for stem in VERBS for form, word in inflections(stem).items()
}  # "barks" -> ("third", "bark")
NOT_ING = set(
    """thing something anything everything nothing ring string spring sing king wing swing bring sting fling ping ding
ting morning evening " "building ceiling clothing lightning during""".split()
)


def form_of(word: str) -> str | None:
    return "ing" if word.endswith("ing") and word not in NOT_ING else FORMS.get(word, (None,))[0]


def plain(words: list[str]) -> list[str]:
    return [re.sub(r"^\W+|\W+$", "", word).lower() for word in words]


def find_verb(words: list[str]):
    """The verb that an event's subject comes before -> (index, "third", "base", "ing", "be" or "aux"); None: a noun phrase.

    "honks" is a verb in "a horn honks" and a noun in "two loud honks", "sounds" mostly a noun: the third person needs a
    singular subject, the base form a plural one, and right before either stands no adjective, number or preposition.
    """
    words = plain(words)
    for i in range(1, len(words)):
        form = form_of(words[i])
        if words[i] in TOGETHER:
            return None
        if i + 1 < len(words) and words[i + 1] in BE:  # "air bubbles are forming"
            continue
        if words[i] in BE | AUXILIARY:
            return i, "be" if words[i] in BE else "aux"
        last = (
            i - 1 - (i > 1 and (words[i - 1].endswith("ly") or words[i - 1] in ADVERBS))
        )  # "a man loudly speaks"
        plural = words[last] in PLURAL or re.search(r"[^su]s$", words[last])
        if words[last] in BEFORE_NOUNS or words[last].endswith("ly"):
            continue
        if words[i] == "sounds" and not (i == 2 and words[0] in ("a", "an", "the")):
            continue
        if form == "third" and (MANY & set(words[max(0, i - 3) : i]) or SERIES & set(words[:i])):
            continue  # "two nearby honks", "a series of bell dings"
        if form == "ing" and form_of((words + [""])[i + 1]) == "third":  # "loud barking occurs"
            continue
        if (
            form == "ing"
            or (form == "third" and not plural)
            or (form == "base" and (plural or "and" in words[:last]))
        ):
            return i, form
    return None


def find_predicate(words: list[str]):
    """The verb that an event without a subject begins with ("then loudly growls") -> (index, form); None: begins otherwise."""
    words = plain(words) + [""]
    i = next(
        (i for i, word in enumerate(words[:-1]) if not word.endswith("ly") and word not in ADVERBS),
        0,
    )
    if words[i].endswith("ed") and words[i + 1] in BEFORE_NOUNS | TOGETHER | PRONOUNS | {
        "",
        "up",
        "down",
    }:
        return i, "past"  # "then turned on", not "then muffled speech"
    return (i, form_of(words[i])) if form_of(words[i]) else None


def with_form(words: list[str], i: int, form: str) -> list[str] | None:
    """The verb at index i, and those joined to it by "and", in another form; None: not a verb the rules know."""
    known, new = plain(words), list(words)
    old = form_of(known[i])
    for j in range(i, len(words)):
        if j > i and known[j] in TOGETHER:
            break
        joined = (
            j == i
            or known[j - 1] in ("and", "or")
            or (known[j - 1].endswith("ly") and known[j - 2] == "and")
        )
        if joined and form_of(known[j]) == old and not BE & set(known[j + 1 : j + 2]):
            if known[j] not in FORMS:
                return None
            new[j] = re.sub(r"\w+", inflections(FORMS[known[j]][1])[form], words[j], count=1)
    return new


def to_ing(words: list[str]) -> list[str] | None:
    """A clause as it follows "followed by": "a man is speaking and a dog barks" -> "a man speaking and a dog barking".

    None where a verb is not certain; a noun phrase stays as it is.
    """
    known, found = plain(words), find_verb(words)
    if known[0] == "there" and BE & set(known[1:2]):  # "there is a bang" -> "a bang"
        return to_ing(words[2:]) if words[2:] else None
    if known[0] in BE | {"there"} or (found and found[1] == "aux"):
        return None
    if not found:  # a word that is no known verb but stands like one: "a man hollars", "bees swarm"
        odd = [
            b
            for a, b in zip(known, known[1:])
            if a not in BEFORE_NOUNS
            and not form_of(b)
            and (
                known[0] in ("a", "an", "the", "someone")
                and re.search(r"[^su'’]s$", b)
                or re.search(r"[^su'’]s$", a)
                and not (b in BEFORE_NOUNS | TOGETHER or re.search(r"(ed|ly|s)$", b))
            )
        ]
        odd = odd or [
            b for a, b in zip(known, known[1:]) if a in PLURAL and form_of(b) == "third"
        ]  # "women speaks"
        return None if odd else words
    i, form = found
    if form == "ing":
        return words
    if form == "be":
        new = (
            words[:i]
            + ([] if re.match(r"(\w+ly )?\w+ing\b", " ".join(known[i + 1 :])) else ["being"])
            + words[i + 1 :]
        )
    else:
        new = with_form(words, i, "ing")
    cut = next((j for j in range(i, len(words)) if known[j] in TOGETHER), len(words))
    joined = next(
        (
            j
            for j in range(i, cut - 1)
            if known[j] == "and" and (not form_of(known[j + 1]) or BE & set(known[j + 2 : j + 3]))
        ),
        None,
    )
    if joined:  # a second subject, or an object
        rest = to_ing(words[joined + 1 :])
        tail = len(words) - joined - 1
        new = new and rest and new[: len(new) - tail] + rest
    return new


def split_events(body: str):
    """ "a dog barks, then a bell rings" -> ([["a", "dog", "barks"], ["a", "bell", "rings"]], [", then"], ["then"])."""
    matches = list(CONNECTIVE.finditer(body))
    events = [
        body[a:b]
        for a, b in zip(
            [0, *(m.end() for m in matches)], [*(m.start() for m in matches), len(body)]
        )
    ]
    joints, names = (
        [m[0].rstrip() for m in matches],
        [m.lastgroup.replace("_", " ") for m in matches],
    )
    listed = events[0].split(", ") if joints and joints[0].startswith(",") else []
    if len(listed) > 1:  # "A, B, then C" tells three events
        events, joints, names = (
            listed + events[1:],
            [","] * (len(listed) - 1) + joints,
            ["then"] * (len(listed) - 1) + names,
        )
    # "A is followed by B" -> "A followed by B": "is" need not agree with what comes to stand there
    joints = [
        re.sub(r"(?:(?:and|which|that) )?(?:is|are|was|were) ", "", joint) for joint in joints
    ]
    return [event.split() for event in events], joints, names


def swap_predicates(events: list[list[str]]) -> list[list[str]] | None:
    """One subject, several verbs: "a dog barks", "growls" -> "a dog growls", "barks"; None: the subject is not certain."""
    found, known = find_verb(events[0]), plain(events[0])
    if not found or found[1] == "aux" or TOGETHER & set(known):
        return None
    i = found[0] + (found[1] == "be")  # "a man is" speaking
    subject, phrases, pronoun = events[0][:i], [events[0][i:], *events[1:]], []
    owner = {
        "he": r"\b(man|boy|male|guy)\b",
        "she": r"\b(woman|girl|female|lady)\b",
        "it": r"^(?!.*\b(man|woman|people|person)\b)",
    }
    first = plain(events[1])[0]
    if first in owner and len(events) == 2 and len(events[1]) > 1:
        if not re.search(owner[first], " ".join(plain(subject))) or (
            first == "it" and {"a", "an", "the"} & set(plain(phrases[0]))
        ):
            return None  # "a man drops a ball, then it bounces"
        pronoun, phrases[1] = [first], events[1][1:]
    predicates = [phrase and find_predicate(phrase) for phrase in phrases]
    for phrase in phrases:
        second = any(
            find_verb(part.split()) for part in " ".join(phrase).split(" and ")[1:]
        )  # "... and a bell rings"
        if second or (PRONOUNS - POSSESSIVES) & set(plain(phrase)):
            return None
    if (
        not all(predicates)
        or "past" in [form for _, form in predicates]
        or (found[1] == "be") > (predicates[0][1] == "ing")
    ):
        return None
    for n, (phrase, (j, form)) in enumerate(zip(phrases, predicates)):
        stem = FORMS.get(plain(phrase)[j], ("", ""))[1]
        if stem in ("start", "begin") and not any(
            form_of(word) for word in plain(phrase)[j + 1 : j + 3]
        ):
            return None  # what starts only now cannot have been heard before
        after = plain(phrase)[j + 1 :] + ["", ""]
        noun = (
            after[0] == "and"
            and not form_of(after[1])
            or not (
                after[0]
                in BEFORE_NOUNS | TOGETHER | PRONOUNS | {"", "up", "down", "idle", "around", "away"}
                or after[0].endswith("ly")
            )
        )
        if n and form == "ing" and (noun or found[1] in ("third", "base")):
            return None  # "then hooting and applause", "then skidding tires", "tones sound, then whooshing": whose?
        if {form, predicates[0][1]} == {"third", "base"}:
            return None
        if (
            n
            and form != "ing"
            and not pronoun
            and (stem in SOUNDS or (found[1] == "ing" and len(phrase) == 1))
        ):
            return None  # "a man speaks, then beeps": he or a device?
    moved = [
        phrase if form == new else with_form(phrase, j, new)
        for phrase, (j, form), (_, new) in zip(phrases[::-1], predicates[::-1], predicates)
    ]
    return None if None in moved else [subject + moved[0], pronoun + moved[1], *moved[2:]]


SOUNDS = set(
    """click beep clank bang thump thud ding chime splash clang knock tap pop clack boom crash clink ring scrape toot
honk rattle""".split()
)
GLUE = set(
    """a an the and or but then of in on at by with to as while is are was were be being been it he she they his her its their
some there after afterwards before when until which that who later first once finally followed following preceded""".split()
)


def content(words: list[str]) -> list[str]:
    """What words speak of: without those that only connect, cut to stems ("barks", "barking", "barked" -> "bark")."""
    stems = [
        re.sub(r"(?<=\w\w)(?:ing|ies|es|ed|(?<!s)s)$", "", word)
        for word in plain(words)
        if word and word not in GLUE
    ]
    return [
        re.sub(r"([bdglmnprtv])\1$", r"\1", re.sub(r"(?<=\w\w)[ey]$", "", stem)) for stem in stems
    ]


def dependent(events, names, verbs) -> tuple[list[int], bool]:
    """Which events have no subject of their own ("then growls", "then he growls"), and whether another leans on its neighbours."""
    no_subject, leans = (
        [],
        plain(events[0])[0] in NO_START
        or any(
            NO_VERB_YET.fullmatch(" ".join(event)) or set(plain(event)) <= BEFORE_NOUNS
            for event in events
        ),
    )  # "low, then high"
    for i, (event, name, verb) in enumerate(zip(events[1:], names, verbs[1:]), 1):
        words = plain(event)
        told = (
            "|".join(
                re.escape(word)
                for before in events[:i]
                for word in plain(before)
                if word and word not in GLUE
            )
            or "-"
        )
        predicate, pronouns = find_predicate(event), PRONOUNS & set(words)
        if predicate and not (
            verb and verb[0] == 1 and verb[1] != "ing"
        ):  # "tapping occurs" has its subject
            # "followed by growling", "rustling, then growling": a noun
            predicate = name != "followed by" and (
                predicate[1] != "ing" or verbs[i - 1] or name in REVERSED
            )
        else:
            predicate = None
        if predicate or words[0] in ("it", "he", "she", "they"):
            no_subject.append(i)
            continue
        named = (
            words[0] in BEFORE_NOUNS | NOUNS
            or words[0].endswith("ing")
            or verb
            or name == "followed by"
        )
        follows_clause = verbs[i - 1] and verbs[i - 1][1] != "ing"
        leans = (
            leans
            or words[0] in NO_START
            or bool(
                KNOWN_BEFORE.search(" ".join(event))
                or re.search(
                    rf"\bthe (?:\w+ )?(?:{told})\b", " ".join(event)
                )  # "the dog" of before
                or (
                    pronouns
                    and not TOGETHER & set(words)
                    and not (verb and pronouns <= POSSESSIVES)
                )
                or (follows_clause and not named)  # "a thrum rises, then remains steady"
                or (
                    re.search("[^su]s$", words[0])
                    and not verb
                    and len(words) > 1  # "then lays it down"
                    and (
                        words[1] not in BEFORE_NOUNS
                        or words[1] in {"to", "a", "an", "the", "into"} | POSSESSIVES
                    )
                )
            )
        )
    return no_subject, leans


def in_order(events, joints) -> str:
    return " ".join(events[0]) + "".join(
        f"{joint} {' '.join(event)}" for joint, event in zip(joints, events[1:])
    )


def lower_first(text: str) -> str:
    first = text.split(" ")[0]
    return (
        text
        if re.search("[A-Z0-9]", first[1:]) or first in ("I", "English", "Christmas")
        else text[:1].lower() + text[1:]
    )


def reverse_order(caption: str) -> tuple[str | None, str]:
    """A caption -> (its events in the opposite order in time or None, the connective or why there is None).

    What the connectives of ORDERING join changes places, the last event first; the connectives stay, verbs take the
    form of their new place. Where the two sides of "before" or "after" are not alike, that word is reversed instead.
    In doubt the answer is None: a missing negative costs nothing, a wrong one teaches the wrong order.
    """
    text = " ".join(caption.split())
    opening, body = re.fullmatch(
        r"((?:at first|first|initially),? (?=.* then ))?(.*?)[\s.,]*", text, re.I
    ).groups("")
    body = lower_first(body)
    events, joints, names = split_events(body)
    leading = re.match(r"(after|before) ([^,]+), (.+)$", body)  # "after A, B"
    if leading:
        events, joints, names = [leading[2].split(), leading[3].split()], [","], [leading[1]]
    if not joints:
        return None, "no ordering connective"
    if any(not event or BOUND.search(" ".join(event)) for event in events):
        return None, "a word bound to its place"
    if any(plain(event)[0] in ("and", "or") or plain(event)[-1] in NO_END for event in events):
        return None, "half an event"
    if any("," in word for event in events for word in event):
        return None, "commas"
    verbs = [find_verb(event) for event in events]
    kinds = ["clause" if verb and verb[1] != "ing" else "noun" for verb in verbs]
    if any(
        name == "is followed by" and (kind == "clause" or TOGETHER & set(plain(event)))
        for name, kind, event in zip(names, kinds, events)
    ):
        return None, "unclear verb"
    names = [name.removeprefix("is ") for name in names]
    stems = [set(content(event)) for event in events]

    def alike(others):
        return [a <= b or b <= a for a, b in zip(stems, others)]

    if any(alike(stems[1:])) or all(alike(stems[::-1])):
        return None, "sides alike"

    no_subject, leans = (
        dependent(events, names, verbs) if not leading else ([], plain(events[1])[0] in NO_START)
    )
    against = {"before", "after", "until"} & set(names)
    if (
        (len(names) > 1 and against - {"before"})
        or (opening and len(set(kinds)) > 1)
        or ("after" in names and joints[0].startswith(",") and not leading)
    ):
        return None, "several orders"
    unlike = (
        no_subject or leans or kinds[0] != kinds[1] or "until" in names or "prior to" in joints[0]
    )
    if against and len(names) == 1 and unlike:
        if (not leading and plain(events[0])[0] in NO_START) or (
            "until" in names and (no_subject or not verbs[1])
        ):
            return None, "unclear subject or reference"
        word = names[0] if leading else next(word for word in REVERSED if word in joints[0])
        body = (
            body.replace(word, REVERSED[word], 1)
            if leading
            else in_order(events, [joints[0].replace(word, REVERSED[word])])
        )
    elif no_subject or leans:
        order = (
            swap_predicates(events)
            if not leans and not against and len(no_subject) == len(names)
            else None
        )
        if not order:
            return None, "unclear subject or reference"
        body = in_order(order, joints)
    else:
        order = events[::-1]
        for i, name in enumerate(names, 1):
            order[i] = to_ing(order[i]) if name == "followed by" else order[i]
            if order[i] is None or (
                name in ("after which", "before") and kinds[::-1][i] != kinds[i]
            ):
                return None, "unclear verb"
        body = (leading[1] + " " if leading else "") + in_order(order, joints)
    body = opening + body
    body = (body[0].upper() if text[0].isupper() else body[0].lower()) + body[1:]
    return body + "." * text.endswith("."), names[0] if len(set(names)) == 1 else "several"


# ------------------------------------------------------------------------------------------------
# Rewritten captions: a language model, a file of others' answers, the command
# ------------------------------------------------------------------------------------------------

NEGATIVES_PROMPT = """A caption tells what is heard in a recording. Rewrite it so that the same events happen in the opposite order in time. \
Keep every event and its words, change nothing but the order, and use the connectives of the caption. \
If its events happen at the same time, or there is only one, answer NONE. Answer with one line.

Caption: A dog barks, then a car passes by
Answer: A car passes by, then a dog barks

Caption: A man speaks followed by a door closing
Answer: A door closing followed by a man speaking

Caption: A woman sings while people clap
Answer: NONE

Caption: Water runs before a toilet flushes and a man coughs
Answer: A toilet flushes and a man coughs before water runs

Caption: {caption}
Answer:"""


def tells_backwards(text: str) -> bool:
    """Whether a text tells the later event first: "A after B", "before B, A"."""
    return (
        len(
            re.findall(
                r"(?<=[\w,] )(?:after(?! (?:which|that))|preceded by)\b|^before\b", text.lower()
            )
        )
        % 2
        == 1
    )


def check_order(caption: str, answer: str) -> tuple[str | None, str | None]:
    """A model's answer to NEGATIVES_PROMPT -> (negative or None, why it is rejected or None). NONE, no order, is no reject.

    Same events: caption and answer hold the same `content` words equally often (articles, connectives and pronouns do
    not count, endings -s -es -ed -ing -y -e and a doubled last consonant are cut). Other order: these words stand in
    another order, or before and after have changed, but not both, which tells the same order again.
    """
    answer = answer.strip().strip('"“”').strip()
    if re.fullmatch(r"none\W*", answer, re.I):
        return None, None
    if not re.search(r"\w", answer):
        return None, "empty"
    if "\n" in answer:
        return None, "more than one line"
    if same_text(caption, answer):
        return None, "copy of the caption"
    own, new = content(caption.split()), content(answer.split())
    if collections.Counter(own) != collections.Counter(new):
        return None, "other events"
    if (own != new) == (tells_backwards(caption) != tells_backwards(answer)):
        return None, "same order"
    return answer, None


def same_text(a: str, b: str) -> bool:
    return re.findall(r"\w+", a.lower()) == re.findall(r"\w+", b.lower())


def load_llm(name: str, device: str):
    """A causal language model of the hub or of a folder and its tokenizer: bfloat16 on a GPU, float32 on a CPU."""
    transformers, device = common.quiet_transformers(), common.start_device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--llm {name}: no causal language model and tokenizer, neither as a folder nor on the hub ({reason}); give a folder "
            "with config.json, weights and tokenizer, or connect to a network"
        ) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--llm {name}: its tokenizer has neither a padding nor an end token, of which batches need one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def generate(llm, prompts: list[str], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """Answers to one batch of prompts, in the tokenizer's chat template where it has one; temperature 0: greedy.

    Above 0 all tokens are drawn from, whatever top-k or top-p the model's own settings name. A model without a template continues the text, often with further examples: its answer ends at the line's end.
    """
    model, tokenizer = llm
    chat = tokenizer.chat_template is not None
    if chat:  # enable_thinking: a variable of some templates, unknown to the others
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(
        model.device
    )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    answers = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        answer.strip() if chat else (answer.strip().splitlines() or [""])[0] for answer in answers
    ]


def stored_answers(file: Path, key: dict, field: str) -> dict:
    """{(what was asked about, version): answer} of a file that `store_answers` wrote under the same settings `key`.

    A line that a kill cut in two is taken out of the file: it is asked for again.
    """
    answers, whole = {}, []
    for line in file.read_bytes().decode("utf-8", "replace").split("\n") if file.is_file() else []:
        try:
            record = json.loads(line)
            if {name: record.get(name) for name in key} == key:
                answers[record[field], record.get("version", 0)] = record["answer"]
            whole.append(line)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            continue  # blank, or cut by the kill
    if file.is_file():
        common.write_lines(file, whole)
    return answers


def store_answers(file, key: dict, field: str, answers: dict) -> None:
    """Append a batch of {(what was asked about, version): answer} to an open file, JSON Lines, one answer a line."""
    for (asked, version), answer in answers.items():
        file.write(
            json.dumps(
                {**key, field: asked, "version": version, "answer": answer}, ensure_ascii=False
            )
            + "\n"
        )
    file.flush()


def draw_seed(*parts) -> int:
    """A seed that is a function of `parts`: a batch draws the same whatever was asked before it."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def ask_llm(
    texts: list[str],
    prompt: str,
    args,
    cache: Path,
    field="caption",
    versions=1,
    temperature=0.0,
    max_new_tokens: int = 96,
) -> dict:
    """{(text, version): answer} of args.llm to `prompt`, which holds {caption}; answers in `cache` are not asked for again.

    An answer there is found by model, prompt hash, temperature and seed (null if greedy), text and version. It is
    written after every batch: a killed run goes on where it was.
    """
    key = {
        "model": args.llm,
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "temperature": temperature or None,
        "seed": args.seed if temperature else None,
    }
    print(f"prompt {key['prompt']}, once a {field}:\n\n{prompt}\n")
    answers, asked = (
        stored_answers(cache, key, field),
        {(text, version) for text in texts for version in range(versions)},
    )
    todo = sorted(
        asked - set(answers), key=lambda question: (len(question[0]), question)
    )  # alike in length: little padding
    print(f"{cache}: {len(asked) - len(todo):,} of {len(asked):,} questions answered before")
    if todo:
        llm = load_llm(args.llm, args.device)
        with (
            open(cache, "a", encoding="utf-8") as file,
            tqdm(total=len(todo), desc=args.llm, unit=field) as bar,
        ):
            for start in range(0, len(todo), args.batch_size):
                batch = todo[start : start + args.batch_size]
                torch.manual_seed(draw_seed(args.seed, batch))
                made = generate(
                    llm,
                    [prompt.replace("{caption}", text) for text, _ in batch],
                    max_new_tokens,
                    temperature,
                )
                store_answers(file, key, field, dict(zip(batch, made)))
                answers |= dict(zip(batch, made))
                bar.update(len(batch))
    return answers


def checked_answers(pairs, check, rejects: Path, field="caption") -> dict:
    """{(asked, answer): text or None} of what `check(asked, answer) -> (text, reason)` lets pass; the rest is counted and listed in a file."""
    results, rejected = {}, []
    for asked, answer in dict.fromkeys(pairs):
        results[asked, answer], reason = check(asked, answer)
        if reason:
            rejected.append({"reason": reason, field: asked, "answer": answer})
    print(
        f"{len(results):,} different answers: {sum(text is not None for text in results.values()):,} taken, {len(rejected):,} rejected"
        + "".join(
            f"; {reason} {n:,}"
            for reason, n in collections.Counter(r["reason"] for r in rejected).most_common()
        )
    )
    common.write_lines(rejects, [json.dumps(r, ensure_ascii=False) for r in rejected])
    return results


def json_lines(flag: str, file: Path, need: tuple[str, ...], optional=()):
    """The objects of a JSON Lines file -> [("FLAG FILE:NUMBER", object)]. `need` are its keys; those and `optional` hold texts or null."""
    wanted = " and ".join(f"'{name}'" for name in need)
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {file}: no such file; expected JSON Lines with {wanted}")
    records = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        where = f"{flag} {file}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON ({error.msg}); expected one object a line"
            ) from None
        if not isinstance(record, dict) or not set(need) <= set(record):
            raise ValueError(
                f"{where}: expected an object with {wanted}, found {line.strip()[:80]}"
            )
        for name in (*need, *optional):
            if not isinstance(record.get(name), (str, type(None))):
                raise ValueError(f"{where}: '{name}' is {record[name]!r}; expected a text or null")
        records.append((where, record))
    return records


def import_texts(
    file: Path, places: list[tuple[int, str]], rows: list[dict], source: str, field: str
) -> tuple[dict, dict]:
    """Texts that others made: JSON Lines {source, field, "id" or "audio"} -> ({(row number, source text): [texts]}, counts).

    A record belongs to those of `places` (row number, source text) with its source text, its id and its audio file (name
    without folder and suffix), as far as it gives them. A record with a null text, or a copy of its caption, gives none.
    """
    stem, squeeze = lambda path: stem_of(Path(str(path)).name), lambda text: " ".join(text.split())
    owners, texts, unused, copies, empty = (
        collections.defaultdict(list),
        collections.defaultdict(list),
        0,
        0,
        0,
    )
    for place in dict.fromkeys(places):
        names = {
            source: squeeze(place[1]),
            "id": str(rows[place[0]].get("id")),
            "audio": stem(rows[place[0]]["audio"]),
        }
        for name in names.items():
            owners[name].append((place, names))
    records = json_lines(
        "--import", file, ("caption", "negative") if field == "negative" else (field,), (source,)
    )
    for where, record in records:
        given = {
            source: squeeze(record.get(source) or ""),
            "id": str(record.get("id") or ""),
            "audio": stem(record.get("audio") or ""),
        }
        given = {name: value for name, value in given.items() if value}
        if not given or (field == "negative" and "caption" not in given):
            raise ValueError(
                f"{where}: does not tell what it belongs to; expected '{source}'"
                + " or 'id' or 'audio'" * (field != "negative")
            )
        found = [
            place
            for place, names in owners.get(next(iter(given.items())), [])
            if given.items() <= names.items()
        ]
        text = record[field]
        unused += not found
        if not text or not re.search(r"\w", text):
            empty += bool(found)
        elif field == "negative" and same_text(
            record["caption"], text
        ):  # a description may be a good caption as it is
            copies += bool(found)
        else:
            for place in found:
                texts[place].append(squeeze(text))
    counts = {
        "records": len(records),
        "matched": len(records) - unused,
        "unused": unused,
        "copies": copies,
        "empty": empty,
    }
    print(
        f"--import {file}: {len(records):,} records, {len(records) - unused:,} matched a {source} ({copies:,} copies of it and {empty:,} null "
        f"or empty left out), {unused:,} not used"
    )
    return texts, counts


def told(counts: dict) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "0"


def distinct(texts) -> list[str]:
    """Versions of a caption without those that are None or there already."""
    return list(dict.fromkeys(text for text in texts if text))


def check_counts(args) -> None:
    """ValueError for a flag whose number makes no sense; --versions and --temperature where the command has them."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected 1 or more")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    versions, temperature = getattr(args, "versions", 1), getattr(args, "temperature", 0.0)
    if versions < 1 or not 0 <= temperature < math.inf or (versions > 1 and not temperature):
        raise ValueError(
            f"--versions {versions}, --temperature {temperature:g}: expected 1 or more, and a temperature above 0 where there "
            "are several, which would be equal without"
        )


def say_unreadable(errors: list[str]) -> None:
    if errors:
        print(f"left out, unreadable: {len(errors):,}, such as {errors[0]}")


def of_length(rows: list[dict], min_s: float, max_s: float, workers: int):
    """-> rows of min_s to max_s seconds, {why: how many others}. A row that does not tell its seconds is given its file header's."""
    if not 0 <= min_s < max_s:
        raise ValueError(
            f"--min-s {min_s:g}, --max-s {max_s:g}: expected seconds, the first below the second"
        )
    unknown = [row for row in rows if not row.get("duration")]
    unreadable = with_durations(unknown, workers)[1] if unknown else []
    say_unreadable(unreadable)
    kept = [row for row in rows if min_s <= (row.get("duration") or -1) <= max_s]
    return kept, collections.Counter(
        {
            "unreadable": len(unreadable),
            f"not of {min_s:g} to {max_s:g} s": len(rows) - len(kept) - len(unreadable),
        }
    )


def finished(rows: list[dict], key: str, source: str, report: dict):
    """Print what was made -> rows without those that have no text at all, (row's `source`, text) pairs, report."""
    kept = [row for row in rows if row.get(key) or row.get("captions")]
    report["left_out"]["without an accepted answer"] = len(rows) - len(kept)
    pairs = [(row[source], text) for row in kept for text in row.get(key, [])]
    print(
        f"{len(kept):,} clips with {len(pairs):,} texts under '{key}'; left out: {told(report['left_out'])}"
    )
    if not pairs:
        raise ValueError(
            f"not one answer was accepted, nothing is written (left out: {told(report['left_out'])})"
        )
    return (
        kept,
        pairs,
        report | {"clips": len(kept), key: len(pairs), "left_out": dict(report["left_out"])},
    )


def fill_negatives(rows: list[dict], out: Path, args):
    """Task negatives, by rules, a language model or a file -> rows, (caption, negative) pairs, report."""
    for row in rows:
        old = row.get("negatives", [])
        if old and len(old) != len(row.get("captions", [])):
            raise ValueError(
                f"{row['where']}: {len(old)} negatives for {len(row.get('captions', []))} captions; expected one, or null, a caption"
            )
        if row.get("captions"):
            row["negatives"] = (
                [None] * len(row["captions"]) if args.overwrite_negatives or not old else list(old)
            )
    todo = [
        (n, k, caption)
        for n, row in enumerate(rows)
        for k, caption in enumerate(row.get("captions", []))
        if row["negatives"][k] is None
    ]
    captions, total = (
        [caption for *_, caption in todo],
        sum(len(row.get("captions", [])) for row in rows),
    )
    if not total:
        raise ValueError(
            f"--data {args.data}: not one of its {len(rows):,} clips has 'captions', which --task negatives rewrites"
        )
    print(
        f"{args.data}: {len(rows):,} clips, {total:,} captions, {total - len(todo):,} negatives kept"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    report, how = {"captions": total}, collections.Counter()
    if args.llm:
        answers = ask_llm(captions, NEGATIVES_PROMPT, args, out.with_suffix(".llm.jsonl"))
        made = checked_answers(
            [(caption, answers[caption, 0]) for caption in captions],
            check_order,
            out.with_suffix(".rejected.jsonl"),
        )
        texts = [made[caption, answers[caption, 0]] for caption in captions]
    elif args.import_file:
        made, report["import"] = import_texts(
            Path(args.import_file),
            [(n, caption) for n, row in enumerate(rows) for caption in row.get("captions", [])],
            rows,
            "caption",
            "negative",
        )
        texts = [made[n, caption][-1] if (n, caption) in made else None for n, _, caption in todo]
    else:
        made = {
            caption: reverse_order(caption)
            for caption in tqdm(dict.fromkeys(captions), desc="captions", leave=False)
        }
        texts = [made[caption][0] for caption in captions]
        how.update(("made: " if made[c][0] else "none: ") + made[c][1] for c in captions)
    for (n, k, _), text in zip(todo, texts):
        rows[n]["negatives"][k] = text

    pairs = [
        (caption, text)
        for row in rows
        for caption, text in zip(row.get("captions", []), row.get("negatives", []))
        if text
    ]
    report |= {"negatives": len(pairs), "splits": {}, "how": dict(how)}
    for split in sorted({row.get("split", "none") for row in rows}):
        members = [row for row in rows if row.get("split", "none") == split and row.get("captions")]
        counts = [
            sum(text is not None for row in members for text in row["negatives"]),
            sum(len(row["captions"]) for row in members),
        ]
        report["splits"][split] = dict(zip(("negatives", "captions"), counts))
        print(
            f"{split}: {counts[0]:,} of {counts[1]:,} captions have a negative ({counts[0] / max(1, counts[1]):.1%})"
        )
    for name, count in how.most_common():
        print(f"  {name} {count:,}")
    print(f"without a negative: {total - len(pairs):,} captions")
    return rows, pairs, report


# ---- cleaned captions ----

CLEAN_PROMPT = """The uploader of a recording describes it. Write what is heard in it as one caption: one plain English sentence. \
Keep only sounds that the description or its tags tell of; leave out names, places, dates, equipment, files, addresses and remarks. \
If no sound is told of, answer NONE. Answer with one line.

"""
CLEAN_EXAMPLES = [  # ours: the ten of Cacophony are not published
    (
        "dog_bark_02.wav. My neighbour's dog barking at the postman, recorded with a Zoom H4n from the kitchen window (tags: dog, bark)",
        "A dog is barking",
    ),
    (
        "Rain on tent. Heavy rain falling on my tent at the campsite near Lake Garda, 12/08/2011. Some thunder far away. Enjoy!",
        "Heavy rain falls on a tent with thunder far away",
    ),
    (
        "Door Slam 3. wooden door slammed shut, 24bit/96kHz, Rode NT1-A. Please credit me if you use it!",
        "A wooden door slams shut",
    ),
    (
        "Tram line 4. Tram arriving at the stop, doors opening, then it pulls away again. Recorded in Zagreb, spring 2009",
        "A tram arrives at a stop, its doors open, and it pulls away",
    ),
    (
        "kettle. Water boiling in an old kettle until it starts to whistle. more of my sounds on www.kettles.example",
        "Water boils in a kettle until it whistles",
    ),
    (
        "Market ambience. Stereo recording of a busy market: people talking, vendors shouting, a child laughing. iPhone, so sorry for the quality",
        "People talk and vendors shout at a busy market while a child laughs",
    ),
    ("BD_808_hit (tags: drum, kick, one-shot)", "A single hit of a kick drum"),
    (
        "typing. Me writing my thesis on a mechanical keyboard at 3 a.m., the chair squeaks near the end. For a film project by M. Weber",
        "Someone types on a mechanical keyboard and then a chair squeaks",
    ),
    (
        "church bells sunday. bells of the village church from about 200 m, with swallows and a car passing by :) contact: bells@mail.example",
        "Church bells ring at a distance while birds chirp and a car passes by",
    ),
    ("untitled 17. Test upload, please ignore. Levels are too low, will be replaced soon", "NONE"),
]
MOST_WORDS = 40  # of a caption; a description is cut after 150, what follows is about its uploader
LEFT_OVER = {
    name: re.compile(pattern, re.I)
    for name, pattern in {  # what no caption of a sound holds
        "refusal": r"\bI(?: a|['’])m (?:sorry|unable)|\bI can(?:no|['’])t\b|\bas an AI\b|\blanguage model\b",
        "address": r"https?:|www\.|\S@\S|\w\.(?:com|org|net)\b",
        "file name": r"\w\.(?:wav|aiff?|flac|ogg|mp3|m4a)\b|\w_\w",
        "date": r"\b\d{1,4}[./-]\d{1,2}[./-]\d{2,4}\b|\b(?:19|20)\d\d\b",
        "recording gear": r"\brecorded (?:with|on|using|by|via|through|at|in)\b|\bzoom h\d|\bh[1-6]n\b|\br[oø]de nt|\b(?:16|24|32)[ -]?bits?\b|"
        r"\b(?:44|48|96|192)[.,\d]* ?khz\b|\b(?:tascam|sennheiser|neumann|marantz|edirol|audacity|iphone|shure|olympus)\b",
    }.items()
}


def described(row: dict) -> str:
    """What --task clean asks about: the row's `description`, cut after 150 words, and its labels as tags."""
    tags = ", ".join(row.get("labels", [])).replace("_", " ")
    return " ".join(row["description"].split()[:150]) + f" (tags: {tags})" * bool(tags)


def check_caption(description: str, answer: str) -> tuple[str | None, str | None]:
    """A cleaned caption -> (caption or None, why it is rejected or None).

    One line and one sentence of at most MOST_WORDS words, nothing of LEFT_OVER, and at least one `content` word of the
    description or its tags: a caption that shares none is made up (or a translation, which is lost).
    """
    answer = answer.strip().strip('"“”').strip()

    def words(text):
        return set(
            content([w for w in re.findall(r"[^\W\d_]+", text.lower()) if w not in BEFORE_NOUNS])
        )

    if not re.search(r"\w", answer):
        return None, "empty"
    if re.fullmatch(r"none\W*", answer, re.I):
        return None, "NONE: no sound is told of"
    for reason, pattern in LEFT_OVER.items():
        if pattern.search(answer):
            return None, reason
    if "\n" in answer or re.search(r"[.!?]\s+[^\W\d_]", answer):
        return None, "more than one sentence"
    if len(answer.split()) > MOST_WORDS:
        return None, f"more than {MOST_WORDS} words"
    if not words(answer) & words(description):
        return None, "no word of the description"
    return answer, None


def clean_prompt(file: str | None) -> str:
    """CLEAN_PROMPT with the examples of --examples, JSON Lines {"description", "caption"}, or with our own."""
    examples = CLEAN_EXAMPLES
    if file:
        examples = []
        for where, record in json_lines("--examples", Path(file), ("description", "caption")):
            examples.append(
                tuple(" ".join((record[name] or "").split()) for name in ("description", "caption"))
            )
            if not all(examples[-1]) or "{caption}" in "".join(examples[-1]):
                raise ValueError(
                    f"{where}: expected two texts that are not empty and do not hold the word {{caption}}"
                )
        if not examples:
            raise ValueError(
                f"--examples {file}: no example there; expected JSON Lines with 'description' and 'caption'"
            )
    return (
        CLEAN_PROMPT
        + "".join(f"Description: {text}\nCaption: {caption}\n\n" for text, caption in examples)
        + "Description: {caption}\nCaption:"
    )


def clean(rows: list[dict], out: Path, args):
    """Task clean (Cacophony's of Freesound): noisy descriptions -> rows with captions, (description, caption) pairs, report.

    A description is no caption, so `captions` hold the cleaned ones alone; the text stays as `description`. `negatives`,
    which belong to the old texts, go.
    """
    if not (args.llm or args.import_file):
        raise ValueError("--task clean: no rules can do this; give --llm HF_ID or --import FILE")
    prompt = clean_prompt(args.examples)
    rows, left_out = of_length(rows, args.min_s, args.max_s, os.cpu_count())
    for row in rows:
        row["description"] = row.get("description") or ". ".join(row.pop("captions", []))
        row.pop("negatives", None)
    left_out["without a description"] = sum(not row["description"].strip() for row in rows)
    rows = [row for row in rows if row["description"].strip()]
    if not rows:
        raise ValueError(
            f"--data {args.data}: no clip is left ({told(left_out)}); a description is the key 'description' or the captions"
        )
    print(f"{args.data}: {len(rows):,} descriptions; left out: {told(left_out)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts, report = [described(row) for row in rows], {}
    if args.llm:
        temperature = args.temperature if args.versions > 1 else 0.0
        answers = ask_llm(
            texts,
            prompt,
            args,
            out.with_suffix(".llm.jsonl"),
            "description",
            args.versions,
            temperature,
        )
        answers = [[answers[text, version] for version in range(args.versions)] for text in texts]
    else:
        places = [(n, row["description"]) for n, row in enumerate(rows)]
        found, report["import"] = import_texts(
            Path(args.import_file), places, rows, "description", "caption"
        )
        answers = [found.get(place, []) for place in places]
    pairs = [(text, answer) for text, several in zip(texts, answers) for answer in several]
    made = checked_answers(pairs, check_caption, out.with_suffix(".rejected.jsonl"), "description")
    for row, text, several in zip(rows, texts, answers):
        row["captions"] = distinct(made[text, answer] for answer in several)
    return finished(rows, "captions", "description", report | {"left_out": left_out})


TASK_FLAGS = {
    "negatives": {
        "overwrite_negatives": False
    },  # what a flag is where it is not given; no other task knows it
    "clean": {"examples": None, "versions": 5, "temperature": 0.7, "min_s": 1.0, "max_s": 300.0},
}


def open_rows(args):
    """What rewrite and recaption begin with, before hours of work -> rows of --data, class list or None, manifest to write."""
    source, out = common.manifest_path(args.data), Path(args.out)
    out = out if out.suffix == ".jsonl" else out / "manifest.jsonl"
    check_output(out)
    check_counts(args)
    classes = source.parent / "classes.txt"
    keep = classes.is_file() and not (out.parent / "classes.txt").exists()
    return (
        common.read_manifest([str(source)]),
        read_text(classes).splitlines() if keep else None,
        out,
    )


def write_rows(out: Path, rows: list[dict], classes, pairs, args) -> None:
    """What they end with: some pairs to look at, the manifest."""
    for i in np.random.default_rng(args.seed).permutation(len(pairs))[: args.show]:
        print(f"  {pairs[i][0]}\n    -> {pairs[i][1]}")
    write_manifest(out, rows, classes)


def rewrite(args) -> dict:
    """Write a manifest again with texts made from its texts, by rules, a language model or a file."""
    for flag in (
        flag
        for task, flags in TASK_FLAGS.items()
        if task != args.task
        for flag in flags
        if flag in vars(args)
    ):
        raise ValueError(f"--{flag.replace('_', '-')}: --task {args.task} has no such flag")
    args = argparse.Namespace(**{**TASK_FLAGS[args.task], **vars(args)})
    rows, classes, out = open_rows(args)
    rows, pairs, report = (clean if args.task == "clean" else fill_negatives)(rows, out, args)
    write_rows(out, rows, classes, pairs, args)
    return {"manifest": str(out), **report}


# ------------------------------------------------------------------------------------------------
# Captions by a captioner of ours
# ------------------------------------------------------------------------------------------------


def recaption(args) -> dict:
    """Write a manifest again with `synthetic` captions, those that a model of ours gives its clips; `captions` stay.

    The model's `caption` hears a whole clip; what it does with one that is longer than its window is its own affair.
    """
    import eval as evaluation  # here alone a model of ours runs

    rows, classes, out = open_rows(args)
    device = common.start_device(args.device)
    model = evaluation.load_model(args.model).to(device)
    if not hasattr(model, "caption"):
        raise ValueError(
            f"--model {args.model}: a model of {type(model).__module__}.py, which writes no captions; give a checkpoint of a "
            "script whose Model has caption()"
        )
    rows, left_out = of_length(rows, args.min_s, args.max_s, os.cpu_count())
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = out.with_suffix(".captions.jsonl")
    key = {
        "model": file_hash(args.model) if os.path.isfile(args.model) else args.model,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    answers, versions = stored_answers(cache, key, "audio"), range(args.versions)
    files = {common.file_key(row): row for row in rows}  # rows of one file are one question
    todo = [name for name in files if not all((name, version) in answers for version in versions)]
    print(f"{cache}: {len(files) - len(todo):,} of {len(files):,} files captioned before")
    loader = common.file_batches(
        model, [files[name] for name in todo], args.batch_size, args.workers
    )
    unreadable = []
    with (
        open(cache, "a", encoding="utf-8") as file,
        tqdm(total=len(todo), desc="captions", unit="clip") as bar,
        torch.inference_mode(),
    ):
        for indices, waveform, n_samples, errors in loader:  # waveform (B, S)
            names = [todo[i] for i in indices]
            made = {}
            for version in versions if names else ():
                seed = draw_seed(
                    args.seed, version, [os.path.basename(files[name]["audio"]) for name in names]
                )
                texts = model.caption(
                    waveform.to(device), n_samples, temperature=args.temperature, seed=seed
                )
                made |= {(name, version): text for name, text in zip(names, texts)}
            store_answers(file, key, "audio", made)
            answers |= made
            unreadable += [text for _, text in errors]
            bar.update(len(names) + len(errors))
    say_unreadable(unreadable)
    heard = [row for row in rows if (common.file_key(row), 0) in answers]
    left_out["unreadable"] += len(rows) - len(heard)
    said = [
        [(row["audio"], answers[common.file_key(row), version]) for version in versions]
        for row in heard
    ]

    def spoken(_, text):
        return (" ".join(text.split()), None) if re.search(r"\w", text) else (None, "empty")

    made = checked_answers(
        itertools.chain(*said), spoken, out.with_suffix(".rejected.jsonl"), "audio"
    )
    for row, pairs in zip(heard, said):
        row["synthetic"] = distinct(made[pair] for pair in pairs)
    heard, pairs, report = finished(heard, "synthetic", "audio", {"left_out": left_out})
    write_rows(out, heard, classes, pairs, args)
    return {"manifest": str(out), **report}


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = functools.partial(
        commands.add_parser,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p = add("scenes", help="captioned scenes from single-label sounds")
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
        return f"[{SCENES['scenes'][name]}; esc-mixed-up: {SCENES['esc-mixed-up'][name] or 'that of the sounds'}]"

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
        help=f"of the clips, 16 bit {told('format')}",
    )
    p.add_argument(
        "--overlay",
        **of_preset("overlay"),
        help="share of esc-mixed-up's clips (then 5 s) with both sounds at once and no negative [0]",
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
    p.add_argument("--val-fraction", type=float, default=0.1, help="of the training recordings")
    p.add_argument("--seed", type=int, default=0, help="every scene is a function of it")
    p.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes; the result does not depend on it",
    )
    p.set_defaults(run=scenes)
    for adapter in ADAPTERS:
        name = "csv" if adapter is any_table else adapter.__name__
        p = commands.add_parser(
            name,
            allow_abbrev=False,
            help=adapter.__doc__.splitlines()[0],
            description=inspect.getdoc(adapter),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument(
            "path",
            metavar="PATH",
            help="a table, or a folder of tables, one a clip"
            if adapter is any_table
            else "the dataset's folder",
        )
        p.add_argument("--out", required=True, help="folder for manifest.jsonl and classes.txt")
        p.add_argument(
            "--audio-dir" if adapter is any_table else "--audio",
            dest="audio_dir",
            metavar="DIR",
            help="where the sound files are, at any depth; default: PATH"
            + ("'s folder" if adapter is any_table else ""),
        )
        p.add_argument(
            "--exclude",
            nargs="+",
            default=[],
            metavar="MANIFEST",
            help="leave out what these hold, by YouTube id, Freesound id or the file's SHA-256",
        )
        p.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="threads that read file headers"
        )
        p.set_defaults(run=convert, adapter=adapter)
        if adapter is audiocaps:
            p.add_argument(
                "--version", choices=["v1", "2.0"], help="default: what PATH holds, v1 before 2.0"
            )
        if adapter is music_avqa:
            p.add_argument(
                "--version", choices=["json", "json_update"], default="json", help="default: json"
            )
        if adapter in (clotho, wavcaps):
            p.add_argument(
                "--tags",
                action="store_true",
                help="keywords, free words of the uploaders, as labels",
            )
        if adapter is wavcaps:
            p.add_argument(
                "--sources", nargs="+", choices=list(WAVCAPS), help="default: all that are there"
            )
            p.add_argument(
                "--blacklist",
                nargs="+",
                default=[],
                metavar="FILE",
                help="files, or names of WavCaps' own lists",
            )
        if adapter is fsd50k:
            p.add_argument(
                "--captions", action="store_true", help="title and description as captions"
            )
        if adapter is desed:
            p.add_argument(
                "--sets",
                nargs="+",
                default=["weak", "validation", "public"],
                help="default: weak validation public",
            )
        if adapter is any_table:
            p.add_argument(
                "--audio",
                required=True,
                metavar="COL",
                help="column of the sound file: path, name or name without suffix",
            )
            p.add_argument(
                "--caption", nargs="+", default=[], metavar="COL", help="columns of captions"
            )
            for flag, text in (
                ("label", "column of labels"),
                ("onset", "column of event onsets, seconds"),
                ("offset", "column of event offsets, seconds"),
                ("phrase", "column of phrases"),
                ("segments", "column of the phrase's [[on, off], ...]"),
                ("split", "column of splits, or train, val or test for all rows"),
                ("id", "column of YouTube or Freesound ids"),
                ("fold", "column of folds"),
                ("label-separator", "what separates several labels in a cell"),
                (
                    "delimiter",
                    "of the table's cells, or the word tab; default: the commonest of tab , ; in the first line",
                ),
            ):
                p.add_argument(
                    f"--{flag}", metavar="COL" if "column" in text else "TEXT", help=text
                )
            p.add_argument(
                "--columns",
                type=lambda text: text.split(","),
                help="names, comma-separated, for a table without header line",
            )
    p = add(
        "check",
        help="look manifests over: counts, durations, unreadable files, recordings shared between splits or manifests",
    )
    p.add_argument("data", nargs="+", help="manifests, or folders that hold manifest.jsonl")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p.set_defaults(run=check)
    p = add(
        "rewrite",
        help="make texts from a manifest's texts: captions in another order, captions from noisy descriptions",
    )
    p.add_argument(
        "--task",
        required=True,
        choices=list(TASK_FLAGS),
        help="negatives: for each caption the same events in another order in time, "
        "or null where it tells no order; one that is there already is kept. clean: captions of what is heard from the key "
        "description, else from the captions (title, description), which stay as description; labels count as tags",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="MANIFEST",
        help="a manifest, a folder that holds one, or the word demo",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="MANIFEST_OR_FOLDER",
        help="NAME.jsonl, or a folder for manifest.jsonl; classes.txt is copied beside it",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--llm",
        metavar="HF_ID",
        help="ask this language model, an id on the hub or a folder; its answers are kept in "
        "NAME.llm.jsonl beside the output, from which a killed run goes on, rejected ones are listed in NAME.rejected.jsonl",
    )
    how.add_argument(
        "--import",
        dest="import_file",
        metavar="FILE",
        help="take the texts from JSON Lines: {caption, negative, and if you like id or audio}; clean: {caption, and "
        "description, id or audio}, one line a version",
    )
    of_task = {"default": argparse.SUPPRESS}
    p.add_argument(
        "--overwrite-negatives",
        action="store_true",
        **of_task,
        help="negatives: make all anew; otherwise those that are there stay "
        "and only gaps are filled",
    )
    p.add_argument(
        "--examples",
        metavar="FILE",
        **of_task,
        help="clean: examples for the prompt, JSON Lines {description, caption} [ten of our own]",
    )
    p.add_argument(
        "--versions",
        type=int,
        **of_task,
        help="clean: captions asked for a clip, equal ones kept once [5, the paper's]",
    )
    p.add_argument(
        "--temperature",
        type=float,
        **of_task,
        help="clean: of the draws where there are several versions, one is greedy [0.7]",
    )
    p.add_argument(
        "--min-s",
        type=float,
        **of_task,
        help="clean: leave out shorter clips, seconds [1, the paper's]",
    )
    p.add_argument(
        "--max-s",
        type=float,
        **of_task,
        help="clean: leave out longer clips, seconds [300, the paper's]",
    )
    p.add_argument(
        "--batch-size", type=int, default=32, help="prompts the language model answers at a time"
    )
    p.add_argument("--device", default="auto", help="of the language model: auto, cpu or cuda")
    p.add_argument("--show", type=int, default=5, help="random pairs to print")
    p.add_argument("--seed", type=int, default=0, help="of the draws and of the pairs to print")
    p.set_defaults(run=rewrite)
    p = add(
        "recaption",
        help="caption a manifest's clips with a captioner trained here, as synthetic captions",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="MANIFEST",
        help="a manifest, a folder that holds one, or the word demo",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="CKPT",
        help="a checkpoint of a script whose Model has caption()",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="MANIFEST_OR_FOLDER",
        help="NAME.jsonl, or a folder for manifest.jsonl, with the key synthetic in "
        "each row, and its captions where it has some; classes.txt is copied beside it, the answers are kept in NAME.captions.jsonl, from "
        "which a killed run goes on, rejected ones are listed in NAME.rejected.jsonl",
    )
    p.add_argument(
        "--versions", type=int, default=1, help="captions drawn for a clip, equal ones kept once"
    )
    p.add_argument(
        "--temperature", type=float, default=0.1, help="of the draws (the paper's); 0: greedy"
    )
    p.add_argument(
        "--min-s", type=float, default=1.0, help="leave out shorter clips, seconds (the paper's)"
    )
    p.add_argument(
        "--max-s", type=float, default=300.0, help="leave out longer clips, seconds (the paper's)"
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="clips at a time, fewer where they are longer than 30 s",
    )
    p.add_argument("--workers", type=int, default=4, help="processes that read audio")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--show", type=int, default=5, help="random captions to print")
    p.add_argument("--seed", type=int, default=0, help="of the draws and of the captions to print")
    p.set_defaults(run=recaption)
    return parser.parse_args(argv)


if __name__ == "__main__":
    common.run_entry(lambda args: args.run(args), parse)
