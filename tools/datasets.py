"""Convert public datasets, tables and folders to manifests; check and resample manifests.

  python -m tools.datasets audiocaps audiocaps --audio audiocaps_wavs --out data/audiocaps
  python -m tools.datasets csv mine.csv --audio file --caption text --out data/mine
  python -m tools.datasets check data/audiocaps data/mine
  python -m tools.datasets resample data/audiocaps --rate 32000 --out data/audiocaps_32k

The manifest format is described in README.md; training and evaluation read nothing else.
"""

import argparse
import collections
import concurrent.futures
import concurrent.futures.process
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
import shutil
import signal
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

# How a dataset's folder is recognised: sub-folders to search, file names of which one must exist,
# and a pattern for the start of such a file
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
        ("", "metadata", "dataset/metadata", "audio"),
        ("train/*.tsv", "validation/*.tsv", "eval/*.tsv", "*/synthetic*/soundscapes.tsv"),
        "filename",
    ),
    "audiogrounding": (
        ("", "data"),
        ("*/label.json", "*/metadata/*.json", "train.json", "val.json", "test.json"),
        r'audiocap_id"\s*:\s*\{|[^\0]*"phrases"',
    ),
    "tut2017": (
        ("",),
        (
            *("meta.txt", "TUT-acoustic-scenes-2017-*/meta.txt"),
            *(
                f"{part}evaluation_setup/evaluate.txt"
                for part in ("", "TUT-acoustic-scenes-2017-*/")
            ),
        ),
        r"audio/",
    ),
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
    """A whole text file: UTF-8 with or without a byte-order mark, else Windows-1252 or Latin-1
    (Clotho's metadata, Clotho-AQA).
    """
    data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git-LFS pointer, not the data; run 'git lfs pull' in that clone or "
            "download the file from the "
            "dataset's page"
        )
    if b"\0" in data[:4096]:
        raise ValueError(
            f"{path}: not a text file; expected UTF-8 (a spreadsheet must be saved as CSV)"
        )
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")  # never fails


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
    return max("\t,;", key=head_of(path).split("\n", 1)[0].count)


def read_table(path, *need: str, columns=None, comment=None, **dialect) -> list[dict]:
    """Rows of a CSV or TSV file as {column: text}; cells keep their blanks (Clotho's file names
    begin with some).

    Args
        need: columns that every row must have. columns: column names for a file that may have no
        header line.
        comment: prefix of lines to skip. dialect: options of csv.reader.
    """
    text, lines = read_text(path), None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    try:
        lines = list(reader)
    except csv.Error as error:
        with contextlib.suppress(csv.Error):
            lines = list(csv.reader(io.StringIO(text, newline=""), **dialect))
        # A stray quote is harmless unless it merges the rows after it into one cell
        if lines is None or any("\n" in cell for line in lines for cell in line):
            raise ValueError(
                f"{path}:{reader.line_num}: cannot be read as a table ({error}); is a closing "
                "quote missing?"
            ) from None
    lines = [line for line in lines if line and not (comment and line[0].startswith(comment))]
    need, header = need or tuple(columns or ()), lines[0] if lines else []
    if columns and not set(need) <= set(header):
        header = columns
    else:
        lines = lines[1:]
    twice = [name for name in need if list(header).count(name) > 1]
    if twice:
        raise ValueError(f"{path}: two columns are called '{twice[0]}'; rename one")
    missing = [name for name in need if name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column '{missing[0]}' (columns there: {', '.join(header) or 'none'}); "
            f"expected {', '.join(need)}"
        )
    at = max((list(header).index(name) for name in need), default=-1)
    for row, line in enumerate(lines, 1):
        if len(line) <= at or any(line[len(header) :]):
            raise ValueError(
                f"{path}: row {row} has {len(line)} cells, expected {len(header)} "
                f"({', '.join(header)}); "
                f"cells that hold the delimiter need quotes: {line}"
            )
    return [dict(zip(header, line)) for line in lines]


def candidates(dataset: str, folder: Path, inside=None):
    """Each (folder, path in it) whose name matches a file of this dataset, in `folder` and the
    known sub-folders.
    """
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
    """The folder of the dataset's tables; the error says what is wrong with `root` and what to
    give.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: {'a file' if root.exists() else 'no such folder'}; {dataset} takes the "
            "dataset's folder"
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
        ):  # with --version, only the folders of that version
            raise ValueError(
                f"{root}: the wrong level of the tree, here is no {expected}; give {folder}"
            )
    for other in SIGNS:
        if other != dataset and signs_of(other, root):
            raise ValueError(
                f"{root}: holds the files of {other}, not of {dataset} (expected {expected}); run: "
                f"python -m tools.datasets {other} {root}"
            )
    for _, path in candidates(dataset, root, inside):
        raise ValueError(
            f"{path}: not a table of {dataset}, it begins with {head_of(path)[:40]!r}; download it "
            "again, or "
            "python -m tools.datasets csv reads any table"
        )
    names = sorted(path.name for path in root.iterdir())
    below = ", ".join(filter(None, inside or SIGNS[dataset][0])) or "a sub-folder"
    there = (", ".join(names[:6]) or "nothing") + (", ..." if len(names) > 6 else "")
    raise FileNotFoundError(
        f"{root}: found no {expected} of {dataset}, here or in {below} (there: {there}); give the "
        "folder that holds it"
    )


def stem_of(name: str) -> str:
    """File name without folder and without a sound's or video's suffix; the dots of
    'Yid_30.000_40.000' stay.
    """
    stem, suffix = os.path.splitext(os.path.basename(name))
    stem = stem if suffix.lower() in AUDIO_SUFFIXES | VIDEO_SUFFIXES else stem + suffix
    return unicodedata.normalize("NFC", stem)  # macOS stores \u00e9 as e and an accent


YOUTUBE = re.compile(
    r"Y?([\w-]{11})(?:_(\d+)(?:\.\d+)?(?:_\d+(?:\.\d+)?)?)?"
)  # for fullmatch: an id may contain _ and begin with -


# Names of ESC-50 and ESC-10, and of UrbanSound8K; some have the 11 characters of a YouTube id
FREESOUND = re.compile(r"\d-(\d+)-[A-Z](?:-\d+)?|(\d+)-\d-\d+-\d+")


def youtube_id(stem: str, sure: bool = False) -> str | None:
    """The id in a name such as id, Yid, id_30, id_000030, Yid_30.000_40.000.

    Unless `sure`, a name without a capital letter, or a word with a number (train_00003,
    Sound_00001), is taken for words; about one id in 300 is such a name.
    """
    found = YOUTUBE.fullmatch(stem)
    if not found or FREESOUND.fullmatch(stem):
        return None
    words = not re.search("[A-Z]", found[1]) or re.fullmatch(r"[A-Za-z]+[_-]?\d{3,}", found[1])
    return found[1] if sure or not words else None


def youtube_names(name: str, start_s: float) -> list[str]:
    """Names that a clip's file may have, in the order tried; a final * stands for any end time.
    Those that tell the start come first: one tree may hold two clips of a video.
    """
    start_s = float(start_s)
    start = f"{start_s:g}" if start_s < 1e6 else str(int(start_s))
    return [
        f"{name}_{start}",
        f"{name}_{start_s:.3f}_*",
        f"Y{name}_{start_s:.3f}_*",
        f"{name}_{int(start_s):06d}",
        f"{name}_{start}_*",
        f"Y{name}_{start}_*",
        f"{name}_{round(start_s * 1000)}_*",
        f"{name}_{round(start_s * 1000)}",
        f"Y{name}",
        name,
    ]


# Splits and sources of one data set whose files may have the same names
SIBLINGS = (
    ("train", "val", "test"),
    ("development", "validation", "evaluation"),
    ("AudioSet_SL", "BBC_Sound_Effects", "FreeSound", "SoundBible"),
)


class AudioTree:
    """The sound files below a folder, found by name without suffix at any depth."""

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
            if os.path.realpath(parent) in seen:  # a link to a folder already visited
                folders.clear()
                continue
            seen.add(os.path.realpath(parent))
            self.folders.update(Path(os.path.relpath(parent, folder)).parts)
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in AUDIO_SUFFIXES and not name.startswith(
                    "._"
                ):  # ._name: metadata of macOS
                    stem, path = stem_of(name), os.path.join(parent, name)
                    self.files[stem].append(path)
                    timed = re.fullmatch(r"(Y?[\w-]{11}_\d+(?:\.\d+)?)_\d+(?:\.\d+)?", stem)
                    if timed:
                        self.files[timed[1] + "_*"].append(path)
                elif suffix in VIDEO_SUFFIXES:
                    self.videos.append(os.path.join(parent, name))

    def named(self, path: str, words) -> bool:
        """Is one of the words in the path from the tree's folder on? As a whole: "development" is
        in clotho_audio_development, "val" is not in eval.
        """
        below = os.path.relpath(path, self.folder.absolute().parent)
        pattern = "|".join(map(re.escape, words))
        return bool(words) and bool(
            re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", below)
        )

    def find(self, names, inside=None, written=None) -> str | None:
        """The file with the first of `names` that exists, or None.

        inside: search only below a folder of this name, or one that contains it (names repeat
        across splits); without such a folder, below those that do not name another split or
        source. written: the path in a table. If several folders hold the name, but not the
        folder in the table, the result is None, noted in `unsure`. A file found in another folder
        than the table's is noted in `elsewhere`.
        """
        for name in names:
            paths = self.files.get(name, [])
            if inside in self.folders:
                paths = [p for p in paths if inside in Path(os.path.relpath(p, self.folder)).parts]
            elif paths and inside and not written:
                near = [p for p in paths if self.named(p, [inside])]
                others = next((group for group in SIBLINGS if inside in group), ())
                others = [name for name in others if name != inside]
                paths = near or [p for p in paths if not self.named(p, others)]
                if len({os.path.dirname(p) for p in paths}) > 1:
                    places = [os.path.relpath(p, self.folder) for p in sorted(paths)[:3]]
                    self.unsure.append(f"{inside}/{name} ({' or '.join(places)})")
                    return None
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
                    places = [os.path.relpath(p, self.folder) for p in sorted(paths)[:3]]
                    self.unsure.append(f"{written} ({' or '.join(places)})")
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
            else f"it holds videos, such as {os.path.basename(self.videos[0])}, which must first "
            "be turned into wav or flac"
            if self.videos
            else f"it holds no {', '.join(sorted(AUDIO_SUFFIXES))} file"
        )
        return ValueError(
            f"{self.folder}: not one of the {n:,} clips has its audio here; tried names such as "
            f"{', '.join(map(repr, dict.fromkeys(tried)))} with any sound suffix; {text}; name the "
            "right folder with --audio (csv: --audio-dir)"
        )


real_folder = functools.lru_cache(maxsize=None)(
    os.path.realpath
)  # resolves each folder once, not each file


def path_in(folder: Path, path: str) -> str:
    """`path` as the manifest in `folder` writes it: relative unless the two share nothing but the
    root.

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
    """Raise an error before hours of work if the file exists or cannot be written."""
    if out.exists():
        raise FileExistsError(f"--out {out}: already there; choose another name or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PermissionError(
            f"--out {out}: cannot be written "
            f"({'no permission for' if parent.is_dir() else 'a file:'} {parent})"
        )


def write_manifest(out: Path, rows: list[dict], classes=None) -> None:
    """The rows as manifest `out`, their paths relative to it, and classes.txt beside it."""

    def clean(text):
        return text.encode("utf-8", "replace").decode(
            "utf-8"
        )  # cut JSON may end in half a surrogate pair

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if classes:
            common.write_lines(out.parent / "classes.txt", map(clean, classes))
        elif (out.parent / "classes.txt").exists():
            print(f"{out.parent / 'classes.txt'} is not of this call; remove it if it does not fit")
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

    An adapter is a function (path, args) -> (entries, classes or None, published {group: {unit:
    count}}). An entry is a manifest row without audio and duration. It also holds `names` (possible
    names of its file, in order), and where needed `path` (tried first), `inside` and `written` (see
    AudioTree.find) and `group` (the name it is counted under; default: its split).
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
            f"{args.path}: a record does not have the form described under --help "
            f"({type(error).__name__}: {error})"
        ) from None
    if not listed:
        raise ValueError(f"{args.path}: the tables list not one clip; expected one row a clip")
    if not rows and tree.unsure:
        raise ValueError(
            f"{args.path}: files of the same name lie in several folders, such as "
            f"{tree.unsure[0]}; write the folder in the table, or name the right one with --audio"
        )
    if not rows and not tried:
        raise ValueError(
            f"{args.path}: not one of the {sum(listed.values()):,} clips has a caption with a word "
            "in it"
        )
    if not rows:
        raise tree.nothing_found(tried, sum(listed.values()))
    rows, unreadable = with_durations(rows, args.workers)
    onsets = [(row, event["onset"]) for row in rows for event in row.get("events", [])]
    far = [onset for row, onset in onsets if onset > 10 * row["duration"]]
    if 2 * len(far) > len(onsets):
        raise ValueError(
            f"{args.path}: {len(far):,} of {len(onsets):,} events begin long after their file ends "
            f"(one at {far[0]:g}); expected seconds, are these milliseconds?"
        )
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
    left_out = []
    for text, items in (
        ("left out, without audio", missing),
        ("left out, unreadable", unreadable),
        ("left out, without a caption", wordless),
        (
            "left out, since files of that name lie in several folders (write the folder in the "
            "table, or name the right folder with --audio)",
            tree.unsure,
        ),
        ("found in another folder than the table says", tree.elsewhere),
    ):
        if items:
            print(f"{text}: {len(items):,}, such as {items[0]!r}")
            for item in items:  # a file name is not always valid UTF-8
                left_out.append(f"{text}: {item}".encode("utf-8", "backslashreplace").decode())
    shared = len(rows) - len({row["audio"] for row in rows})
    if shared:
        print(
            f"{shared:,} clips share their file with another one: its name does not tell the start "
            "time, or the table names it more than once"
        )
    if outside:
        print(
            "left out, events and segments without length or beginning after their file ends: "
            f"{outside:,}"
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
    if left_out:
        common.write_lines(out.parent / "left_out.txt", left_out)
        print(f"what was left out is listed in {out.parent / 'left_out.txt'}")
    return report


def with_durations(rows: list[dict], workers: int):
    """-> rows with the duration from the file header, error texts of the unreadable files."""

    def seconds(row):
        try:
            row["audio"].encode("utf-8")
            return sf.info(row["audio"]).duration
        except UnicodeEncodeError:
            return f"{row['audio']}: the file's name is not UTF-8, which manifests need; rename it"
        except (sf.SoundFileRuntimeError, OSError) as error:
            # libsndfile's text without the path, which the message has already
            return f"{row['audio']}: {getattr(error, 'error_string', error)}".strip()

    with multiprocessing.pool.ThreadPool(workers) as pool:  # libsndfile releases the GIL
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
    """Remove events and segments of no length or after the end of the file -> how many. An event
    that ends at most 1 ms too late (rounding) is cut.
    """
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
    """Stripped captions that contain a word. Duplicates stay: two people may write the same one."""
    return [str(text).strip() for text in texts if text and re.search(r"\w", str(text))]


def check_labels(path, labels, classes) -> None:
    """Raise ValueError if a table with the right columns holds a label of another dataset."""
    strange = sorted(set(labels) - set(classes))
    if strange:
        raise ValueError(
            f"{path}: '{strange[0]}' is not one of its {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...): another "
            "dataset in the same columns? python -m tools.datasets csv reads any table"
        )


# ------------------------------------------------------------------------------------------------
# Native datasets: captions
# ------------------------------------------------------------------------------------------------


def audiocaps(path: Path, args):
    """AudioCaps v1 and 2.0: {train,val,test}.csv with audiocap_id, youtube_id, start_time, caption;
    the audio is not included.

    Also reads the tables of the WavCaps code (file_name, caption or caption_1 .. caption_5). Rows
    with the same (youtube_id, start_time) are one clip. The file name gives the split. Published:
    v1 49,838 train clips with one caption, 495 and 975 with five; 2.0: 91,256 / 2,475 / 4,875
    captions.
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
                        f"{table}: expected the columns youtube_id, start_time, caption (columns "
                        f"there: {', '.join(row)})"
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
    """Clotho v2.1: clotho_captions_{development,validation,evaluation}.csv, audio in folders of
    those names.

    Splits: development -> train, validation -> val, evaluation -> test. clotho_metadata_*.csv, if
    present, gives the Freesound ids and (--tags) the keywords. File names may begin with a space
    and repeat across splits. Published: 3,839 / 1,045 / 1,045 clips, 5 captions each.
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
                    f"{about}: not there, so --exclude and check cannot recognise these clips by "
                    "a Freesound id"
                )
            for row in read_table(table, "file_name", "caption_1") if table.is_file() else []:
                stem, fact = stem_of(row["file_name"]), facts.get(row["file_name"], {})
                entry = {
                    "names": [stem, html.unescape(stem)],
                    "inside": name,
                    "split": split,
                    "captions": sentences(row.get(f"caption_{k}") for k in range(1, 6)),
                }
                if fact.get("sound_id", "").isdigit():  # else "Not found"
                    entry["id"] = fact["sound_id"]
                if args.tags and fact.get("keywords"):
                    words = map(str.strip, fact["keywords"].split(";"))
                    entry["labels"] = [word for word in words if word]
                yield entry

    return entries(), None, published


WAVCAPS = {
    "AudioSet_SL": 108317,
    "BBC_Sound_Effects": 31201,
    "FreeSound": 262300,
    "SoundBible": 1232,
}


def wavcaps(path: Path, args):
    """WavCaps: json_files/<Source>/*_final.json; audio <id>.flac below a folder named after the
    source.

    Sources AudioSet_SL (Y<youtube id>), BBC_Sound_Effects, FreeSound, SoundBible; all for training.
    --blacklist takes files (also aac-datasets' CSVs) or the names of WavCaps' own lists
    (exclude_all_ac, exclude_test_ac, exclude_ub8k_esc50_vggsound). Published: 108,317 + 31,201 +
    262,300 + 1,232 clips, one caption each.
    Licence: academic use only; each source keeps its own licence.
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
                f"--blacklist {item}: no such file; WavCaps' own lists here: "
                f"{', '.join(known) or 'none'}"
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
    absent = sorted({*(args.sources or [])} - {source for source, _ in tables})
    if absent or not tables:
        raise FileNotFoundError(
            f"{folder}: no JSON file of {', '.join(absent or WAVCAPS)}; expected for example "
            "FreeSound/fsd_final.json"
        )

    def entries():
        for source, file in tables:
            content, dropped = read_json(file), 0
            if not isinstance(content, dict) or "data" not in content:
                raise ValueError(
                    f'{file}: expected WavCaps\' {{"num_captions_per_audio", "data"}}, found other '
                    "JSON"
                )
            for record in content["data"]:
                stem = stem_of(str(record["id"]))
                if stem in banned.get(source, ()):
                    dropped += 1
                    continue
                # SoundBible's and BBC's numbers are not Freesound ids: a prefix keeps them apart
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

ESC50 = """
    dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets
    chirping_birds water_drops wind pouring_water toilet_flush thunderstorm crying_baby sneezing
    clapping breathing coughing footsteps laughing brushing_teeth snoring drinking_sipping
    door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine
    vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn engine
    train church_bells airplane fireworks hand_saw
""".split()  # in the order of `target`
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
URBANSOUND8K = """
    air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer
    siren street_music
""".split()  # in the order of classID
TUT2017 = """
    beach bus cafe/restaurant car city_center forest_path grocery_store home library metro_station
    office park residential_area train tram
""".split()
DESED = """
    Alarm_bell_ringing Blender Cat Dishes Dog Electric_shaver_toothbrush Frying Running_water Speech
    Vacuum_cleaner
""".split()


def fsd50k(path: Path, args):
    """FSD50K: FSD50K.ground_truth/{dev,eval,vocabulary}.csv, audio
    FSD50K.{dev,eval}_audio/<fname>.wav.

    Splits: dev's own train / val, eval -> test; 200 classes, with parent classes. --captions takes
    title and description of FSD50K.metadata/*_clips_info_FSD50K.json as captions; clips without
    either are left out.
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
        what = "not there"
        if classes:
            what = f"lists {len(labels & set(classes))} of {len(labels)} labels"
        print(f"{vocabulary}: {what}; classes.txt is the sorted list of labels instead")
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
                    )  # the texts contain HTML

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
                    "labels": [label for label in row["labels"].split(",") if label],
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

    No split: five folds for cross-validation. Published: 2,000 clips, 50 classes, 400 per fold;
    incomplete mirrors work. Licence: CC BY-NC 3.0 (its ESC-10 part CC BY 3.0).
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
    """ESC-10: the old folders '001 - Dog bark/{fold}-{Freesound id}-{take}.ogg', or the rows of
    ESC-50 that are marked esc10.

    Labels are spelled as in ESC-50. No split, five folds. Published: 400 clips, 10 classes.
    Licence: CC BY 3.0.
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
            f"{strange}: not an ESC-10 clip, which is called FOLD-FREESOUNDID-TAKE; move the file "
            "elsewhere"
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
    """UrbanSound8K: metadata/UrbanSound8K.csv (with or without header),
    audio/fold{1..10}/{fsID}-{classID}-{n}-{n}.wav.

    No split: ten folds, used as published. start and end in the table are positions in the source
    recording.
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
    """VGGSound: vggsound.csv without header (id, start, label, split), else data/{train,test}.csv
    (id_start.mp4, label).

    309 classes from data/stat.csv, else from the table; misspellings are official. Audio
    files named <id>_<start:06d>.* are tried first.
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
    """AudioSet, weak labels: {balanced_train,unbalanced_train,eval}_segments.csv and
    class_labels_indices.csv.

    Splits: both train files -> train, eval -> test; 527 classes by display name, several per clip.
    A space follows each comma in the tables. Published: 22,160 (balanced) and 2,042,985 / 20,371
    clips; many are no longer online.
    Licence: CC BY 4.0; ontology CC BY-SA 4.0; audio of the owners.
    """
    folder = locate("audioset", path)
    names = first_file(
        *(place / "class_labels_indices.csv" for place in (folder, path, path.absolute().parent))
    )
    if names is None:
        raise FileNotFoundError(
            f"{folder}: class_labels_indices.csv is missing, which names the 527 classes; put it "
            "beside the "
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
                        f"{table}: clip {row['id']} has {set(mids) - set(display)}, which {names} "
                        "does not list"
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
    """TUT Acoustic Scenes 2017: TUT-acoustic-scenes-2017-{development,evaluation}/{meta.txt,
    audio/, evaluation_setup/}.

    PATH is one of the two folders or their parent. Without meta.txt, evaluation_setup/evaluate.txt
    is read. development -> train, with the fold whose fold*_evaluate.txt lists the clip;
    evaluation -> test. 15 scenes. Published: 4,680 / 1,620
    clips of 10 s.
    Licence: non-commercial.
    """
    root = locate("tut2017", path)

    def table_of(part):
        return first_file(part / "meta.txt", part / "evaluation_setup" / "evaluate.txt")

    parts = [root, *sorted(root.glob("TUT-acoustic-scenes-2017-*"))]

    def entries():
        for part in filter(table_of, parts):
            columns = ["file", "scene", "recording"]
            rows = read_table(table_of(part), "file", "scene", columns=columns, delimiter="\t")
            check_labels(table_of(part), [row["scene"] for row in rows], TUT2017)
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
            f"{source}: an event of '{label}' from {onset} to {offset} s; expected 0 <= onset <= "
            "offset"
        )
    return event


def events_by_file(
    table, rows: list[dict], name: str, onset: str, offset: str, label: str
) -> dict[str, list[dict]]:
    """{file: events} in the table's order; a row without a label: a file without events (DESED)."""
    files = collections.defaultdict(list)
    for row in rows:
        files[row[name]] += (
            [event_of(table, row[label], row[onset], row[offset])] if row.get(label) else []
        )
    return files


def labels_of(events: list[dict]) -> list[str]:
    return list(dict.fromkeys(event["label"] for event in events))


def audioset_strong(path: Path, args):
    """AudioSet-Strong: audioset_{train,eval}_strong.tsv and mid_to_display_name.tsv, or TSVs
    `filename onset offset event_label`.

    Splits: train, eval -> test (converted files: by file name). segment_id is <youtube id>_<start
    in ms>, times are relative to the segment. classes.txt: the 407 classes that occur in both
    splits. Clips without events are not listed.
    Published: 103,463 clips with 934,821 events / 16,996 with 139,538. Licence: CC BY 4.0; audio of
    the owners.
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
            f"{folder}: mid_to_display_name.tsv is missing, which names the classes; put it beside "
            f"{tables[0].name}"
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
                    f"{table}: no split in its name; rename it so that it contains one of train, "
                    "val, test, eval"
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
                            f"{table}: clip {name} has {event['label']!r}, which {names} does not "
                            "list"
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

    --sets selects tables: weak (labels), validation (-> val) and public (-> test) by default; also
    unlabel_in_domain, synthetic21_train and synthetic21_validation (their soundscapes.tsv). A row
    without an event is a clip without events. Published: 1,578 weak clips; validation
    1,168 with 4,224 events; public 692 with 2,765; unlabelled 14,412; synthetic 10,000. Licence:
    metadata MIT; audio per file, from YouTube and Freesound.
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
    """AudioGrounding v2 (TAG): {train,val,test}/label.json, {split}/metadata/{split}.json or
    {split}.json; audio Y<id>.wav.

    A table is a JSON list of captions with audiocap_id, audio_id, tokens and phrases with segments.
    Segments [[0, 0]] mean that the phrase is not heard; it is kept without a segment. The captions
    of one audio file are one row. Version 1 (one dictionary of columns) is read by python -m
    tools.datasets csv, see README. Published (version 1): 4,489 / 31 / 70 clips.
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
                    f"{table}: AudioGrounding version 1 (columns such as "
                    f"{', '.join(list(records)[:3])}); run: python -m tools.datasets csv "
                    f"{table} --audio filename --caption caption --phrase soundtag --segments "
                    f"timestamps --split {split}"
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
    """Segments without AudioGrounding's [0, 0], which marks a phrase that is not heard."""
    return [[float(on), float(off)] for on, off in segments if off > on >= 0]


# ------------------------------------------------------------------------------------------------
# Native datasets: questions
# ------------------------------------------------------------------------------------------------


def clotho_aqa(path: Path, args):
    """Clotho-AQA: clotho_aqa_{train,val,test}.csv (file_name, QuestionText, answer, confidence),
    audio_files/*.wav.

    Three people answer each question. `answer` is the majority answer (else the first) in lower
    case, `answers` holds all three. clotho_aqa_metadata.csv gives the Freesound id, in sound_id or
    at the end of sound_link. Published: 1,991 clips, 35,838 answers to 11,946 questions. Licence:
    see its LICENSE.txt.
    """
    folder = locate("clotho_aqa", path)
    about = folder / "clotho_aqa_metadata.csv"
    ids = (
        {
            row.get("file_name"): row.get("sound_id")
            or "".join(re.findall(r"/sounds/(\d+)", row.get("sound_link", ""))[-1:])
            for row in read_table(about, delimiter=delimiter_of(about))
        }
        if about.is_file()
        else {}
    )
    if not any(map(str.isdigit, ids.values())):
        print(
            f"{about}: no Freesound id there, so --exclude and check recognise these clips by "
            "their content alone; exclude Clotho's too"
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
                        "answer": collections.Counter(filter(None, a)).most_common(1)[0][0],
                        "answers": a,
                    }
                    for q, a in questions.items()
                    if any(a)
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
    """MUSIC-AVQA: data/json/avqa-{train,val,test}.json (--version json_update: the corrected ones),
    audio <video_id>.wav.

    The placeholders of a question are filled in order from templ_values; the key of the answer is
    spelled `anser`; type and templ_values are JSON strings. Published: val 4,595 questions on 3,815
    videos, test 9,185 on 6,399 (updated: 4,568 / 9,129 questions), 45,867 on 9,288 in all. Licence:
    repository MIT; videos of the owners.
    """
    folder = locate("music_avqa", path, ("", args.version, f"data/{args.version}"))
    old = folder.absolute().name != "json_update"

    def entries():
        for split in ("train", "val", "test"):
            table, videos = folder / f"avqa-{split}.json", collections.defaultdict(list)
            for record in read_json(table) if table.is_file() else []:
                try:
                    values = iter(json.loads(record["templ_values"]))
                    kind = json.loads(record["type"])
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{table}: question {record.get('question_id')}: type or templ_values is "
                        f"not valid JSON ({error.msg})"
                    ) from None
                if not record["anser"]:
                    continue
                question = re.sub(
                    r"<\w+>", lambda hole: str(next(values, hole[0])), record["question_content"]
                ).strip()
                videos[record["video_id"]].append(
                    {
                        "question": question,
                        "answer": record["anser"],
                        "type": kind,
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
    """A table, JSON Lines, a JSON list, {"data": list} or {column: {row: value}} (pandas) as a list
    of dictionaries.
    """
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        records = []
        for row, line in enumerate(
            read_text(file).split("\n"), 1
        ):  # splitlines() would cut at U+2028 inside a caption
            try:
                records += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{row}: not valid JSON ({error.msg})") from None
    elif file.suffix.lower() == ".json":
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
        if len(delimiter) != 1:
            raise ValueError(f"--delimiter {delimiter}: expected one character, or the word tab")
        return read_table(file, *need, columns=args.columns, delimiter=delimiter)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{file}: expected a list of JSON objects, one a clip, caption or event")
    return records


def files_below(path: Path) -> list[Path]:
    """The files below a folder, without hidden ones, links to folders followed; sorted."""
    found, seen = [], set()
    for parent, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(parent) in seen:  # a link to a folder already visited
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found)


def any_table(path: Path, args):
    """Any CSV, TSV, JSON Lines or JSON: name its columns; rows of one audio file become one clip.

    PATH is one table, or a folder with one table per clip. A folder adds two columns: `file` (the
    table's name without suffix) and `folder` (the name of its folder). In JSON a value may be a
    list.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such table or folder of tables")
    files = (
        [path]
        if path.is_file()
        else [
            f for f in files_below(path) if f.suffix.lower() in (".txt", ".csv", ".tsv", ".jsonl")
        ]
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
        # an empty table: a clip without events
        for row, record in enumerate(records or [about] * bool(about), 1):
            add_record(clips, record, literal, file, row, args)
    classes = sorted({label for clip in clips.values() for label in clip.get("labels", [])}) or None

    def entries():  # a generator: a dozen names for each of two million clips fill the memory
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


def add_record(clips: dict, record: dict, literal, file: Path, row: int, args) -> None:
    """Merge one row of a table into the clip of its audio file."""
    name, where = str(record.get(args.audio) or ""), f"{file}, row {row}"
    if not name:
        raise ValueError(f"{where}: nothing in column '{args.audio}': {record}")
    split = literal or (str(record.get(args.split) or "") if args.split else None)
    if split and split.lower() not in SPLITS:
        raise ValueError(
            f"{where}: '{split}' in column '{args.split}' is no split; known: {', '.join(SPLITS)}"
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
    told = re.sub(r"^(\d+)\.0$", r"\1", told) if told else None  # pandas writes 345515.0
    own = youtube_id(stem_of(told), sure=True) or told if told else youtube_id(stem)
    clip |= {"id": own} if own else {}
    if args.fold and record.get(args.fold) not in (None, ""):
        fold = str(record[args.fold]).removesuffix(".0")
        clip["fold"] = int(fold) if fold.isdigit() else fold
    if args.caption:
        new = sentences(itertools.chain(*(t if isinstance(t, list) else [t] for t in texts)))
        # a row an event, phrase or label repeats the caption of its clip
        per_part = args.onset or args.phrase
        per_part = per_part or (args.label and not isinstance(record.get(args.label), list))
        clip["captions"] += [
            caption for caption in new if not per_part or caption not in clip["captions"]
        ]
    label = record.get(args.label) if args.label else None
    labels = label if isinstance(label, list) else [] if label in (None, "") else [str(label)]
    if args.label_separator:
        labels = [part for text in labels for part in text.split(args.label_separator)]
    labels = [text for text in (str(label).strip() for label in labels) if text]
    clip.get("labels", []).extend(x for x in dict.fromkeys(labels) if x not in clip["labels"])
    if args.onset and labels:
        clip["events"] += [
            event_of(where, x, record.get(args.onset), record.get(args.offset)) for x in labels
        ]
    if args.phrase and re.search(r"\w", str(record.get(args.phrase) or "")):
        segments = record.get(args.segments)
        try:
            real = real_segments(json.loads(segments) if isinstance(segments, str) else segments)
        except (ValueError, TypeError):
            raise ValueError(
                f"{where}: {segments!r} in column '{args.segments}'; expected [[onset, offset], "
                "...] in seconds"
            ) from None
        clip["phrases"].append({"phrase": str(record[args.phrase]), "segments": real})


def folders(path: Path, args):
    """One folder of sound files per class, optionally within one folder per split (train, val,
    test).
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    below = files_below(path)
    files = [f for f in below if f.suffix.lower() in AUDIO_SUFFIXES]
    others = [f for f in below if f.suffix.lower() in (*VIDEO_SUFFIXES, ".opus")]
    if others:
        print(
            f"left out, not {', '.join(sorted(AUDIO_SUFFIXES))}: {len(others):,}, such as "
            f"{str(others[0])!r}"
        )
    parts = [f.relative_to(path).parts for f in files]
    by_split = bool(files) and all(len(p) == 3 and p[0].lower() in SPLITS for p in parts)
    if len({p[0] for p in parts}) > 1 and all(
        len(p) == 2 and p[0].lower() in SPLITS for p in parts
    ):
        raise ValueError(f"{path}: its folders are splits without class folders in them")
    if not files or not (by_split or all(len(p) == 2 for p in parts)):
        unknown = next((p[0] for p in parts if len(p) == 3 and p[0].lower() not in SPLITS), None)
        if unknown and any(p[0].lower() in SPLITS for p in parts):
            raise ValueError(f"{path}: '{unknown}' is no split; known: {', '.join(SPLITS)}")
        strange = next((f for f, p in zip(files, parts) if len(p) != 2), "no sound file")
        raise ValueError(
            f"{path}: expected CLASS/file or SPLIT/CLASS/file, found {strange}; give the folder "
            "that holds the class folders"
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
# Check; recordings that occur in two places
# ------------------------------------------------------------------------------------------------


def keys_of(row: dict) -> list[str]:
    """Ids by which a row's recording is recognised elsewhere: its id, and a YouTube or Freesound id
    in the file name.
    """
    name, keys = stem_of(Path(row["audio"]).name), []
    if row.get("id") not in (None, ""):
        keys.append(youtube_id(stem_of(str(row["id"]))) or str(row["id"]))
    freesound = FREESOUND.fullmatch(name)
    found = youtube_id(name) or (freesound and (freesound[1] or freesound[2]))
    return keys + [found] * bool(found and found not in keys)


def file_hash(path) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def middle_of(path) -> int:
    """Hash of 4 KB from the middle; unlike size, it separates uncompressed files of one length."""
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return hash(file.read(4096))


def hashes_of(paths, others=None) -> dict[str, str]:
    """{path: SHA-256} of those `paths` that may equal one of `others` (default: another of
    `paths`): those with the same size and the same middle.
    """
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
    with multiprocessing.pool.ThreadPool() as pool:  # hashing releases the GIL
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
    """The rows whose recording is in none of `manifests`, compared by id, by the id in the file
    name and by file content.
    """
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
            f"--exclude {manifest}: {len(rows) - len(unlike):,} clips left out, {by_id:,} by id "
            f"and {len(kept) - len(unlike):,} by content"
        )
        rows = unlike
    return rows


def _start_process() -> None:
    """Set up a worker: Ctrl-C is for the main process; torch's threads do not survive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def in_processes(function, jobs: list, workers: int, doing: str, unit: str) -> list:
    """[function(job) for job in jobs], computed by `workers` processes.

    Raises: OSError if one of them was killed.
    """
    # not multiprocessing.Pool, which would wait forever for a process that the system has killed
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_process) as pool:
        done = pool.map(function, jobs, chunksize=8)
        try:
            return list(tqdm(done, total=len(jobs), desc=doing, unit=unit))
        except concurrent.futures.process.BrokenProcessPool:
            raise OSError(
                f"a process was killed while {doing}, probably because memory ran out; repeat the "
                "call with fewer --workers"
            ) from None


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
    """{(place, place): sorted keys} of the recordings that two places share, by id, else by path
    or file content.
    """
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
    """Report on manifests: counts, durations, rates, unreadable files, classes, recordings shared
    between splits or manifests.
    """
    rows = common.read_manifest(args.data)
    found = in_processes(_check_file, rows, args.workers, "decoding", "file")
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
        part["captions"] += row.get("captions", [])
        part["labels"] += row.get("labels", [])
        if not error:
            part["seconds"].append(seconds)
            part["rates"].append(rate)
    for place, part in report["splits"].items():
        seconds = np.array(part["seconds"] or [0])
        counts = collections.Counter(part["labels"])
        print(
            f"{place}: {len(part['clips'])} clips, {len(part['captions'])} captions "
            f"({len(set(part['captions']))} distinct), "
            f"{seconds.sum() / 3600:.2f} h, "
            f"duration {seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f} s (min "
            "/ median / max), "
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
            "captions": len(part["captions"]),
            "distinct_captions": len(set(part["captions"])),
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
# Resample: audio at a model's rate, which training reads faster
# ------------------------------------------------------------------------------------------------


def resampled_name(row: dict, rate: int) -> str:
    """A file name that changes with the source file (path, size, time of change) and the rate."""
    made_from = f"{common.file_key(row)}|{rate}"
    return f"{Path(row['audio']).stem}_{hashlib.sha256(made_from.encode()).hexdigest()[:12]}.wav"


def _resample_file(job):
    """-> error text or None. A file that exists was written completely by an earlier call."""
    row, rate, path = job
    if path.exists():
        return None
    try:
        waveform = common.read_audio(row["audio"], rate, expected_s=row.get("duration"))
    except common.AudioError as error:
        return str(error)
    peak = np.abs(waveform).max()
    if peak > 2:  # up to there, what resampling adds to full-scale audio
        return f"{row['audio']}: its peak of {peak:.1f} does not fit into 16-bit audio"
    common.write_audio(path, np.clip(waveform, -1.0, 1.0), rate)
    return None


def resample(args) -> dict:
    """Write the audio of manifests as 16-bit wav files of one rate, mono, and their manifest."""
    if not 1000 <= args.rate <= 1_000_000:
        raise ValueError(f"--rate {args.rate}: expected 1000 to 1000000 Hz")
    out, rows = Path(args.out), common.read_manifest(args.data)
    classes = common.read_classes(args.data, rows)
    check_output(out / "manifest.jsonl")  # written last, so an interrupted call has none
    try:
        (out / "audio").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"--out {out}: this folder cannot be made ({error.strerror})"
        ) from None
    jobs = {}
    for row in rows:
        for key in {"audio", "swapped_audio"} & set(row):
            source = {**row, "audio": row[key]}
            jobs[row[key]] = source, args.rate, out / "audio" / resampled_name(source, args.rate)
    # keyed by the file to write: two manifests may name one source differently
    todo = list({job[2]: job for job in jobs.values() if not job[2].exists()}.values())
    size = sum(2 * args.rate * (row.get("duration") or 10.0) for row, _, _ in todo)
    free = shutil.disk_usage(out).free
    print(
        f"{len(todo):,} of {len(jobs):,} files to write, about {size / 1e9:.2f} GB "
        f"({free / 1e9:.0f} GB free)"
    )
    if size > free:
        raise ValueError(
            f"--out {out}: about {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
        )
    bad = list(filter(None, in_processes(_resample_file, todo, args.workers, "resampling", "file")))
    for error in bad:
        print(f"kept at its place: {error}")
    for row in rows:
        if "id" not in row and keys_of(row):  # the new name tells none
            row["id"] = keys_of(row)[0]
        for key in {"audio", "swapped_audio"} & set(row):
            path = jobs[row[key]][2]
            if path.exists():  # a file that was left out keeps its path, and training reports it
                row[key] = str(path)
    write_manifest(out / "manifest.jsonl", rows, classes)
    return {"files": len(jobs), "written": len(todo) - len(bad), "unreadable": len(bad)}


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """The argparse type of --workers and other counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.datasets", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for adapter in ADAPTERS:
        name = "csv" if adapter is any_table else adapter.__name__
        p = commands.add_parser(
            name,
            allow_abbrev=False,
            help=" ".join(inspect.getdoc(adapter).split("\n\n")[0].split()),
            description=inspect.getdoc(adapter),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument(
            "path",
            metavar="PATH",
            help="a table, or a folder with one table per clip"
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
            help="leave out the clips of these, by YouTube id, Freesound id or the file's SHA-256",
        )
        p.add_argument(
            "--workers",
            type=at_least_one,
            default=os.cpu_count(),
            help="threads that read file headers",
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
                help="use the uploaders' keywords (free text) as labels",
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
                "--captions", action="store_true", help="use title and description as captions"
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
                    "of the table's cells, or the word tab; default: the commonest of tab , ; in "
                    "the first line",
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
    p = commands.add_parser(
        "check",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="report on manifests: counts, durations, unreadable files, recordings shared between "
        "splits or manifests",
    )
    p.add_argument("data", nargs="+", help="manifests, or folders that hold manifest.jsonl")
    p.add_argument("--workers", type=at_least_one, default=os.cpu_count(), help="processes")
    p.set_defaults(run=check)
    p = commands.add_parser(
        "resample",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="write a manifest's audio at a model's rate, which training reads faster; repeat an "
        "interrupted call to continue",
    )
    p.add_argument("data", nargs="+", help="manifests, or folders that hold manifest.jsonl")
    p.add_argument(
        "--rate",
        type=int,
        required=True,
        help="Hz: 32000 for MGA-CLAP, 48000 for T-CLAP, 16000 for Cacophony and CoLLAT, 44100 for "
        "curation-CLAP",
    )
    p.add_argument("--out", required=True, help="folder for audio/, manifest.jsonl, classes.txt")
    p.add_argument("--workers", type=at_least_one, default=os.cpu_count(), help="processes")
    p.set_defaults(run=resample)
    return parser.parse_args(argv)


def main(args) -> dict:
    return args.run(args)


if __name__ == "__main__":
    common.run_entry(main, parse)
