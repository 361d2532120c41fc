"""tools.datasets, its adapters: miniature trees of the real tables with short sounds -> manifests,
values checked.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import common
import eval as evaluate
from conftest import ROOT
from tools import datasets, downstream

FORMATS = ROOT.parent / "shared" / "formats"
SAMPLES = FORMATS / "samples"
real = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the real sample tables (../shared/formats) are not here"
)


def wav(path, seconds=0.5, rate=16000, seed=None):
    """A short tone in noise, different for every file name unless `seed` says which."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(
        int(hashlib.md5(path.name.encode()).hexdigest()[:8], 16) if seed is None else seed
    )
    t = np.arange(int(rate * seconds)) / rate
    sf.write(
        path,
        0.3 * np.sin(2 * np.pi * rng.integers(200, 4000) * t) + 0.01 * rng.standard_normal(len(t)),
        rate,
    )
    return path


def copy(sample, target):
    target = Path(target)
    if (SAMPLES / sample).is_dir():
        shutil.copytree(SAMPLES / sample, target, copy_function=shutil.copyfile)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SAMPLES / sample, target)
    return target


def text(path, content, newline="\n"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.replace("\n", newline).encode("utf-8"))
    return path


def table(path, **kinds):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f, **kinds))


def convert(name, path, out, *flags):
    """-> (report, rows as training reads them, {file name: row})."""
    report = datasets.convert(
        datasets.parse([name, str(path), "--out", str(out), "--workers", "2", *map(str, flags)])
    )
    rows = common.read_manifest([str(out)])
    return report, rows, {Path(row["audio"]).name: row for row in rows}


def classes(out):
    return (Path(out) / "classes.txt").read_text(encoding="utf-8").splitlines()


# One builder a layout: makes the miniature tree below `folder`, -> (command, path, flags)


def make_audiocaps(folder):
    root = copy("audiocaps_v1/dataset", folder / "audiocaps" / "dataset").parent
    for split in ("train", "val", "test"):
        for n, key in enumerate(
            dict.fromkeys(
                (r["youtube_id"], r["start_time"], r["audiocap_id"] if split == "train" else "")
                for r in table(root / "dataset" / f"{split}.csv")
            )
        ):
            # every naming scheme in turn
            name, start = key[0], int(key[1])
            names = [
                f"{name}_{start}",
                f"Y{name}",
                name,
                f"{name}_{start}.000_{start + 10}.000",
                f"Y{name}_{start}.000_{start + 7}.000",
                f"{name}_{start:06d}",
            ]
            wav(root / "wavs" / split / f"{names[n % len(names)]}.{'flac' if n % 2 else 'wav'}")
    return "audiocaps", root, []


def make_clotho(folder):
    root = copy("clotho_v2.1", folder / "clotho")
    for split in ("development", "validation", "evaluation"):
        for row in table(root / f"clotho_captions_{split}.csv"):
            wav(root / split / row["file_name"])
    return "clotho", root, []


def make_wavcaps(folder):
    root = copy("wavcaps", folder / "wavcaps")
    for source, file in (
        ("AudioSet_SL", "as"),
        ("BBC_Sound_Effects", "bbc"),
        ("FreeSound", "fsd"),
        ("SoundBible", "sb"),
    ):
        for record in json.loads((root / f"json_files/{source}/{file}_final.json").read_text())[
            "data"
        ]:
            wav(root / "Audio" / source / (record["id"].removesuffix(".wav") + ".flac"))
    return "wavcaps", root, []


def make_fsd50k(folder):
    root = copy("fsd50k", folder / "FSD50K")
    for part in ("dev", "eval"):
        for row in table(root / f"FSD50K.ground_truth/{part}.csv"):
            wav(root / f"FSD50K.{part}_audio" / f"{row['fname']}.wav", rate=44100)
    return "fsd50k", root, []


def make_esc50(folder):
    root = copy("esc50", folder / "ESC-50-master")
    for row in table(root / "meta/esc50.csv"):
        wav(root / "audio" / row["filename"])
    return "esc50", root, []


def make_esc10(folder):
    for name in (SAMPLES / "esc10_folders/file_list.txt").read_text().splitlines():
        if re.search(r"/[15]-\d+-A.ogg", name) and not name.startswith(("008", "009", "010")):
            wav(folder / "ESC-10" / name, 0.1)
    text(folder / "ESC-10" / "README.md", "readme")
    return "esc10", folder / "ESC-10", []


def make_urbansound8k(folder):
    root = copy("urbansound8k", folder / "UrbanSound8K")
    for row in table(root / "metadata/UrbanSound8K.csv"):
        wav(root / f"audio/fold{row['fold']}" / row["slice_file_name"], rate=22050)
    return "urbansound8k", root, []


def make_vggsound(folder):
    root = copy("vggsound", folder / "VGGSound")
    for n, row in enumerate(csv.reader((root / "data/vggsound.csv").read_text().splitlines())):
        names = [
            f"{row[0]}_{int(row[1]):06d}",
            f"{row[0]}_{int(row[1]) * 1000}_{int(row[1]) * 1000 + 10000}",
            f"Y{row[0]}",
        ]
        wav(root / "audio" / f"{names[n % 3]}.ogg")
    return "vggsound", root, []


def make_audioset(folder):
    root = copy("audioset", folder / "audioset")
    for name in ("balanced_train", "eval"):
        for line in (root / f"{name}_segments.csv").read_text().splitlines()[3:]:
            wav(root / f"{name}_segments" / f"Y{line.split(', ')[0]}.wav")
    return "audioset", root, []


def make_audioset_strong(folder):
    root = copy("audioset_strong", folder / "strong")
    for split in ("train", "eval"):
        for segment in {
            row["segment_id"]
            for row in table(root / f"audioset_{split}_strong.tsv", delimiter="\t")
        }:
            wav(
                root
                / split
                / (f"{segment}.wav" if split == "train" else f"Y{segment.rsplit('_', 1)[0]}.wav"),
                10.0,
            )
    return "audioset_strong", root, []


def make_desed(folder):
    root = copy("desed", folder / "desed")
    for name, place in (
        ("train/weak", "train/weak"),
        ("validation/validation", "validation/validation"),
        ("eval/public", "eval/public"),
    ):
        for clip in {
            row["filename"] for row in table(root / f"dataset/metadata/{name}.tsv", delimiter="\t")
        }:
            wav(
                root / "dataset/audio" / place / clip,
                11.0 if clip == "sdHVFACi42A_16_27.wav" else 10.0,
            )
    return "desed", root, []


def make_audiogrounding(folder):
    """Version 2 was never seen as a file: written by its README."""
    phrases = [
        {
            "phrase": "a dog barks",
            "start_index": 0,
            "end_index": 2,
            "segments": [[0.5, 2], [4, 4.5]],
        },
        {"phrase": "wind blows", "start_index": 4, "end_index": 5, "segments": [[0, 0]]},
    ]
    for split, videos in (("train", ["-bcDEfghi_1"]), ("test", ["-0Zzz_z_zzz", "QvATUKXYFBs"])):
        records = [
            {
                "audiocap_id": 7 + n,
                "audio_id": f"Y{video}.wav",
                "tokens": "a dog barks while wind blows"
                if n
                else ["a", "dog", "barks", "and", "wind", "blows"],
                "phrases": phrases,
            }
            for video in videos
            for n in range(2)
        ]
        text(folder / "TAG" / split / "label.json", json.dumps(records))
        for video in videos:
            wav(folder / "TAG" / split / "audio" / f"Y{video}.wav", 10.0)
    return "audiogrounding", folder / "TAG", []


def make_tut2017(folder):
    dev, test = (
        folder / "TUT-acoustic-scenes-2017-development",
        folder / "TUT-acoustic-scenes-2017-evaluation",
    )
    text(
        dev / "meta.txt",
        "audio/b020_90_100.wav\tbeach\tb020\naudio/a001_0_10.wav\tcafe/restaurant\ta001\n",
    )
    text(dev / "evaluation_setup/fold3_evaluate.txt", "audio/b020_90_100.wav\tbeach\n")
    text(dev / "evaluation_setup/fold3_train.txt", "audio/a001_0_10.wav\tcafe/restaurant\n")
    text(dev / "evaluation_setup/fold1_evaluate.txt", "audio/a001_0_10.wav\tcafe/restaurant\n")
    text(test / "meta.txt", "audio/1.wav\ttram\naudio/2.wav\tbeach\n")
    for path in (
        dev / "audio/b020_90_100.wav",
        dev / "audio/a001_0_10.wav",
        test / "audio/1.wav",
        test / "audio/2.wav",
    ):
        wav(path)
    return "tut2017", folder, []


def make_clotho_aqa(folder):
    root = folder / "aqa"
    lines = "file_name,QuestionText,answer,confidence\n"
    for file in (" Ambience Birds.wav", "Caf\u00e9, two.wav"):
        for question, answers in (
            ("Are there birds?", ("yes", "Yes", "no")),
            ("What is heard, mostly?", ("birds", "wind", "wind")),
        ):
            lines += "".join(f'"{file}","{question}",{answer},yes\n' for answer in answers)
        wav(root / "audio_files" / file)
    wav(root / "audio_files" / "unused.wav")
    (root / "clotho_aqa_test.csv").write_bytes(lines.encode("latin-1"))
    return "clotho_aqa", root, []


def make_music_avqa(folder):
    root = copy("music_avqa", folder / "avqa")
    for split in ("val", "test"):
        for record in json.loads(
            (root / f"data/json/avqa-{split}.json").read_text(encoding="utf-8")
        ):
            wav(root / "data/audio" / f"{record['video_id']}.wav")
    return "music_avqa", root, []


# ------------------------------------------------------------------------------------------------
# Values, one test a dataset
# ------------------------------------------------------------------------------------------------


@real
def test_audiocaps_v1(tmp_path, capsys):
    name, path, _ = make_audiocaps(tmp_path)
    for lost in list(path.glob("wavs/train/*"))[:2]:
        lost.unlink()
    report, rows, by_name = convert(name, path, tmp_path / "m")
    source = {split: table(path / f"dataset/{split}.csv") for split in ("train", "val", "test")}
    n_train = len(source["train"])
    out = capsys.readouterr().out
    assert (
        f"train: {n_train - 2} of {n_train} clips, {n_train - 2} captions (published 49,838 clips, "
        "49,838 captions)" in out
    )
    assert "left out, without audio: 2" in out and len(report["missing"]) == 2
    for split in (
        "val",
        "test",
    ):  # captions in the table's order though a clip's rows are not adjacent
        expected = {}
        for r in source[split]:
            expected.setdefault(r["youtube_id"], []).append(r["caption"])
        found = {row["id"]: row["captions"] for row in rows if row["split"] == split}
        assert found == expected
    ids = {r["youtube_id"] for split in source.values() for r in split}
    assert {row["id"] for row in rows} <= ids and all(row["duration"] == 0.5 for row in rows)
    assert not any("\r" in caption for row in rows for caption in row["captions"])
    assert report["splits"]["test"]["captions"] == len(source["test"])
    line = json.loads((tmp_path / "m/manifest.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["audio"].startswith("../audiocaps/wavs/train/") and set(line) == {
        "audio",
        "duration",
        "captions",
        "id",
        "split",
    }
    with pytest.raises(FileExistsError, match="already there; choose another name or remove it"):
        convert(name, path, tmp_path / "m")


def test_audiocaps_ids_quotes_and_two_starts(tmp_path):
    text(
        tmp_path / "d/dataset2.0/train.csv",
        'audiocap_id,youtube_id,start_time,caption\n1,-a_Bcdefg_h,30,"birds, ""loud"" ones"\n'
        "2,-a_Bcdefg_h,30,second caption\n3,_-00000000A,7,it\u2019s rain\n4,_-00000000A,50,wind\n",
        "\r\n",
    )
    for name in ("-a_Bcdefg_h_30.wav", "_-00000000A_7.flac", "4.mp3"):
        wav(tmp_path / "a" / name)
    report, rows, _ = convert(
        "audiocaps", tmp_path / "d", tmp_path / "m", "--audio", tmp_path / "a"
    )
    assert [(r["id"], r["captions"]) for r in rows] == [
        ("-a_Bcdefg_h", ['birds, "loud" ones', "second caption"]),
        ("_-00000000A", ["it\u2019s rain"]),
        ("_-00000000A", ["wind"]),
    ]
    assert Path(rows[2]["audio"]).name == "4.mp3"  # by audiocap_id, the last scheme
    names = datasets.youtube_names("-a_Bcdefg_h", 30)
    assert names[:4] == [
        "-a_Bcdefg_h_30",
        "-a_Bcdefg_h_30.000_*",
        "Y-a_Bcdefg_h_30.000_*",
        "-a_Bcdefg_h_000030",
    ] and names[-2:] == ["Y-a_Bcdefg_h", "-a_Bcdefg_h"]  # these do not tell the start
    wav(tmp_path / "a/Y-a_Bcdefg_h.wav"), wav(tmp_path / "a/-a_Bcdefg_h.wav")
    assert Path(datasets.AudioTree(tmp_path / "a").find(names)).name == "-a_Bcdefg_h_30.wav"
    (tmp_path / "a/-a_Bcdefg_h_30.wav").unlink()
    assert Path(datasets.AudioTree(tmp_path / "a").find(names)).name == "Y-a_Bcdefg_h.wav"


@real
def test_audiocaps_2_and_the_wavcaps_layout(tmp_path, capsys):
    root = copy("audiocaps_2.0/dataset2.0", tmp_path / "audiocaps/dataset2.0").parent
    copy("audiocaps_v1/dataset", root / "dataset")
    for row in table(root / "dataset2.0/test.csv"):
        wav(tmp_path / "wavs" / f"Y{row['youtube_id']}.wav")
    _, rows, by_name = convert(
        "audiocaps", root, tmp_path / "m2", "--audio", tmp_path / "wavs", "--version", "2.0"
    )
    row = by_name["Y7fmOlUlwoNg.wav"]
    assert (
        row["captions"][0] == "constant rattling noise and sharp vibrations"
        and row["split"] == "test"
        and len(row["captions"]) == 5
    )
    assert "train: 0 of 0 clips (published 91,256 captions)" in capsys.readouterr().out
    _, _, v1 = convert(
        "audiocaps", root, tmp_path / "m1", "--audio", tmp_path / "wavs"
    )  # both there: v1
    assert v1["Y7fmOlUlwoNg.wav"]["captions"][0] == "Constant rattling noise and sharp vibrations"
    copy("audiocaps_wavcaps_layout", tmp_path / "other")
    _, rows, by_name = convert(
        "audiocaps", tmp_path / "other", tmp_path / "m3", "--audio", tmp_path / "wavs"
    )
    row = by_name["Y7fmOlUlwoNg.wav"]
    assert (
        row["id"] == "7fmOlUlwoNg"
        and len(row["captions"]) == 5
        and row["captions"][3] == "Clicking and screeching metal with people speaking"
    )


def test_audiocaps_version_that_is_not_there(tmp_path):
    row = "audiocap_id,youtube_id,start_time,caption\n1,AaaaaaaaaaA,0,rain\n"
    (
        text(tmp_path / "one/dataset/test.csv", row),
        text(tmp_path / "one/YAaaaaaaaaaA.txt", ""),
        wav(tmp_path / "one/YAaaaaaaaaaA.wav"),
    )
    with pytest.raises(
        FileNotFoundError, match="here or in dataset2.0, csv_files_v2 "
    ):  # not: give .../dataset
        convert("audiocaps", tmp_path / "one", tmp_path / "m", "--version", "2.0")
    with pytest.raises(
        ValueError, match="dataset: the folder's name tells AudioCaps v1, not --version 2.0"
    ):
        convert(
            "audiocaps",
            tmp_path / "one/dataset",
            tmp_path / "m",
            "--version",
            "2.0",
            "--audio",
            tmp_path / "one",
        )
    convert("audiocaps", tmp_path / "one", tmp_path / "m", "--version", "v1")


@pytest.mark.skipif(
    not (FORMATS / "captions").is_dir(),
    reason="the complete caption files (../shared/formats/captions) are not here",
)
def test_complete_tables_list_the_published_numbers(tmp_path):
    for split, inside in (
        ("audiocaps_v1", "dataset"),
        ("audiocaps_2.0", "dataset2.0"),
        ("clotho_v2.1", ""),
    ):
        shutil.copytree(
            FORMATS / "captions" / split, tmp_path / split / inside, copy_function=shutil.copyfile
        )
    for name, path, expected in (
        (
            "audiocaps",
            "audiocaps_v1",
            {"train": (49838, 49838), "val": (495, 2475), "test": (975, 4875)},
        ),
        ("audiocaps", "audiocaps_2.0", {"val": (495, 2475), "test": (975, 4875)}),
        (
            "clotho",
            "clotho_v2.1",
            {"train": (3839, 19195), "val": (1045, 5225), "test": (1045, 5225)},
        ),
    ):
        args = datasets.parse([name, str(tmp_path / path), "--out", "x"])
        entries, _, published = args.adapter(tmp_path / path, args)
        found = {}
        for entry in entries:
            clips, captions = found.get(entry["split"], (0, 0))
            found[entry["split"]] = clips + 1, captions + len(entry["captions"])
        assert found == expected
        assert all(
            published[s].get("clips", n) == n and published[s]["captions"] == k
            for s, (n, k) in expected.items()
        )


@real
def test_clotho(tmp_path, capsys):
    name, path, _ = make_clotho(tmp_path)
    source = table(path / "clotho_captions_development.csv")
    assert any(r["file_name"].startswith(" ") for r in source)
    text(
        path / "clotho_captions_validation.csv",
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\nBeat &gt; echo, "
        "two.wav,a,b,c,d,e\n".replace("Beat &gt; echo, two.wav", '"Beat &gt; echo, two.wav"'),
        "\r\n",
    )
    wav(path / "validation/Beat > echo, two.wav")  # unescaped on the disk
    report, rows, by_name = convert(name, path, tmp_path / "m", "--tags")
    assert report["missing"] == [] and report["splits"]["train"]["clips"] == len(source)
    row = by_name[" Ambience Birds.wav"]
    assert (row["id"], row["split"], row["labels"]) == (
        "327673",
        "train",
        ["Ambience", "outside", "OWI", "Birds", "night"],
    )
    assert (
        row["captions"][0] == "A wild assortment of birds are chirping and calling out in nature."
        and len(row["captions"]) == 5
    )
    assert (
        by_name["Santa Motor.wav"]["split"] == "test"
        and by_name["Santa Motor.wav"]["id"] == "116638"
    )
    assert (
        by_name["Beat > echo, two.wav"]["captions"] == ["a", "b", "c", "d", "e"]
        and by_name["Beat > echo, two.wav"]["split"] == "val"
    )
    assert "(published 3,839 clips, 19,195 captions)" in capsys.readouterr().out
    _, rows, _ = convert(name, path, tmp_path / "plain")
    assert not any("labels" in row for row in rows)


def test_the_same_caption_twice_counts_twice(tmp_path):
    text(
        tmp_path / "test.csv",
        "audiocap_id,youtube_id,start_time,caption\n1,AaaaaaaaaaA,0,rain\n2,AaaaaaaaaaA,0,rain\n",
    )
    wav(tmp_path / "YAaaaaaaaaaA.wav")
    assert convert("audiocaps", tmp_path, tmp_path / "m")[1][0]["captions"] == [
        "rain",
        "rain",
    ]  # 97 clips of AudioCaps' test


def test_clotho_same_name_in_two_splits(tmp_path):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    for split in ("development", "evaluation"):
        text(tmp_path / f"clotho_captions_{split}.csv", header + f"Bus.wav,{split},b,c,d,e \n")
    wav(tmp_path / "development/Bus.wav", 0.5), wav(tmp_path / "evaluation/Bus.wav", 0.7)
    _, rows, _ = convert("clotho", tmp_path, tmp_path / "m")
    assert [(r["split"], r["captions"][0], r["duration"]) for r in rows] == [
        ("train", "development", 0.5),
        ("test", "evaluation", 0.7),
    ]
    assert rows[0]["captions"] == ["development", "b", "c", "d", "e"]
    (tmp_path / "development/Bus.wav").rename(tmp_path / "development/Car.wav")
    report, rows, _ = convert("clotho", tmp_path, tmp_path / "m2")  # never the other split's file
    assert [r["split"] for r in rows] == ["test"] and report["missing"] == ["Bus"]


def test_split_folders_of_another_name_are_never_mixed(tmp_path, capsys):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    for split in ("development", "evaluation"):
        lines = f"Bus.wav,{split},...,c,d,e\n{split}.wav,x,b,c,d,e\n"
        text(tmp_path / f"clotho_captions_{split}.csv", header + lines)
    for parent in ("clotho_audio_development", "clotho_audio_evaluation"):
        wav(tmp_path / parent / "Bus.wav", 0.5 if "dev" in parent else 0.7)
        wav(tmp_path / parent / f"{parent.rpartition('_')[2]}.wav")
    _, rows, _ = convert("clotho", tmp_path, tmp_path / "m")
    assert [(r["split"], r["duration"]) for r in rows if "Bus" in r["audio"]] == [
        ("train", 0.5),
        ("test", 0.7),
    ]
    assert rows[0]["captions"] == ["development", "c", "d", "e"]  # "..." has no word
    for old, new in (("clotho_audio_development", "one"), ("clotho_audio_evaluation", "two")):
        (tmp_path / old).rename(tmp_path / new)
    capsys.readouterr()
    _, rows, _ = convert("clotho", tmp_path, tmp_path / "m2")
    assert sorted(Path(r["audio"]).name for r in rows) == ["development.wav", "evaluation.wav"]
    assert "development/Bus (one/Bus.wav or two/Bus.wav)" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [True, False])
def test_a_split_without_its_folder_takes_no_other_split_s_file(tmp_path, inside):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    for split in ("development", "evaluation"):
        text(tmp_path / f"clotho_captions_{split}.csv", header + f"Bus.wav,{split},b,c,d,e\n")
    wav(tmp_path / "evaluation/Bus.wav")
    flags = () if inside else ("--audio", tmp_path / "evaluation")
    report, rows, _ = convert("clotho", tmp_path, tmp_path / "m", *flags)
    assert [row["split"] for row in rows] == ["test"] and report["missing"] == ["Bus"]


@real
def test_wavcaps(tmp_path, capsys):
    name, path, _ = make_wavcaps(tmp_path)
    wav(path / "Audio/FreeSound/2219.flac", 0.9)  # SoundBible's numbers are not Freesound's
    report, rows, by_name = convert(name, path, tmp_path / "m", "--tags")
    assert (
        len(rows) == 9
        and report["splits"]["SoundBible"]["clips"] == 6
        and {r["split"] for r in rows} == {"train"}
    )
    assert by_name["Yb0RFKhbpFJA.flac"]["captions"] == [
        "Wind and a man speaking are heard, accompanied by buzzing and ticking."
    ]
    assert (
        by_name["Yb0RFKhbpFJA.flac"]["id"] == "b0RFKhbpFJA"
        and by_name["NHU05051026.flac"]["id"] == "BBC_Sound_Effects:NHU05051026"
    )
    assert by_name["180913.flac"]["id"] == "180913" and by_name["180913.flac"]["labels"] == [
        "Standard",
        "ringtone",
        "basic",
        "traditional",
    ]
    assert all(
        r["id"].startswith("SoundBible:") and r["duration"] == 0.5
        for r in rows
        if "SoundBible" in r["audio"]
    )
    assert (
        "FreeSound: 1 of 1 clips, 1 captions (published 262,300 clips, 262,300 captions)"
        in capsys.readouterr().out
    )
    # its own lists by name, files, and aac-datasets' CSV
    (path / "json_files/blacklist/blacklist_mine.json").write_text(
        json.dumps({"AudioSet": ["Yb0RFKhbpFJA.wav"], "FreeSound": []})
    )
    text(tmp_path / "more.csv", "index,id\n0,180913\n", "\r\n")
    _, rows, _ = convert(
        name, path, tmp_path / "m2", "--blacklist", "mine", "exclude_test_ac", tmp_path / "more.csv"
    )
    assert {r["id"].split(":")[0] for r in rows} == {"SoundBible", "BBC_Sound_Effects"}
    with pytest.raises(
        FileNotFoundError,
        match="--blacklist nothing: no such file; WavCaps' own lists here: exclude_all_ac",
    ):
        convert(name, path, tmp_path / "m3", "--blacklist", "nothing")
    _, rows, _ = convert(name, path, tmp_path / "m4", "--sources", "SoundBible")
    assert len(rows) == 6
    shutil.rmtree(path / "json_files/AudioSet_SL")
    with pytest.raises(FileNotFoundError, match="no JSON file of AudioSet_SL; expected"):
        convert(name, path, tmp_path / "m5", "--sources", "AudioSet_SL", "SoundBible")


@real
def test_fsd50k(tmp_path, capsys):
    name, path, _ = make_fsd50k(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    row = by_name["64760.wav"]
    assert row["labels"] == [
        "Electric_guitar",
        "Guitar",
        "Plucked_string_instrument",
        "Musical_instrument",
        "Music",
    ]
    assert (row["split"], by_name["345111.wav"]["split"], by_name["322614.wav"]["split"]) == (
        "train",
        "val",
        "test",
    )
    assert row["id"] == "64760" and classes(tmp_path / "m") == sorted(
        {label for r in rows for label in r["labels"]} | {"Crushing"}
    )
    out = capsys.readouterr().out
    assert (
        "classes.txt is the sorted list of labels instead" in out
        and "(published 36,796 clips)" in out
    )
    names = (FORMATS / "labels/fsd50k.txt").read_text().split()
    text(
        path / "FSD50K.ground_truth/vocabulary.csv",
        "".join(f"{k},{label},/m/x{k}\n" for k, label in enumerate(names)),
    )
    convert(name, path, tmp_path / "whole")
    assert classes(tmp_path / "whole") == names and len(names) == 200
    copy_of = json.loads((path / "FSD50K.metadata/dev_clips_info_FSD50K.json").read_text())
    copy_of["16399"] = {
        "title": "riff w/ bass &amp; drum.AIFF",
        "description": "<b>loud</b>\r\n guitar",
        "tags": [],
    }
    text(path / "FSD50K.metadata/dev_clips_info_FSD50K.json", json.dumps(copy_of))
    with pytest.raises(FileNotFoundError, match="--captions: needs .*eval_clips_info_FSD50K.json"):
        convert(name, path, tmp_path / "c", "--captions")
    text(
        path / "FSD50K.metadata/eval_clips_info_FSD50K.json",
        json.dumps({"322614": {"title": "Cows", "description": ""}}),
    )
    capsys.readouterr()
    _, _, by_name = convert(name, path, tmp_path / "c", "--captions")
    assert "left out, without a caption: " in capsys.readouterr().out
    assert {n: r["captions"] for n, r in by_name.items()} == {
        "64760.wav": ["guitarras_63", "electric guitar"],
        "16399.wav": ["riff w/ bass & drum", "loud guitar"],
        "322614.wav": ["Cows"],
    }


@real
def test_esc50(tmp_path, capsys):
    name, path, _ = make_esc50(tmp_path)
    table_file = path / "meta/esc50.csv"
    content = table_file.read_text()
    table_file.write_bytes(
        b"\xef\xbb\xbf" + content.replace("True", "TRUE").replace("\n", "\r\n").encode()
    )  # a re-saved copy
    _, rows, by_name = convert(name, path, tmp_path / "m")
    assert by_name["1-100032-A-0.wav"] | {"audio": "", "where": ""} == {
        "audio": "",
        "where": "",
        "duration": 0.5,
        "labels": ["dog"],
        "id": "100032",
        "fold": 1,
    }
    assert classes(tmp_path / "m") == (FORMATS / "labels/esc50.txt").read_text().split()
    assert (
        len(rows) == 20
        and "all: 20 of 20 clips (published 2,000 clips)\nfolds: 1: 4, 2: 4, 3: 4, 4: 4, 5: 4"
        in capsys.readouterr().out
    )
    _, ten, _ = convert("esc10", path, tmp_path / "ten")
    assert {r["id"] for r in ten} == {
        r["src_file"] for r in csv.DictReader(content.splitlines()) if r["esc10"] == "True"
    }
    assert classes(tmp_path / "ten") == (FORMATS / "labels/esc10.txt").read_text().split()
    table_file.write_text(content.replace(",dog,", ",motor_7,"))
    with pytest.raises(ValueError, match="esc50.csv: 'motor_7' is not one of its 50 classes"):
        convert(name, path, tmp_path / "bad")


@real
def test_esc10_folders(tmp_path, capsys):
    name, path, _ = make_esc10(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    assert (
        {r["fold"] for r in rows} == {1, 5}
        and by_name["1-100032-A.ogg"]["labels"] == ["dog"]
        and by_name["1-100032-A.ogg"]["fold"] == 1
    )
    assert {label for r in rows for label in r["labels"]} == {
        "dog",
        "rain",
        "sea_waves",
        "crying_baby",
        "clock_tick",
        "sneezing",
        "helicopter",
    }
    assert len(classes(tmp_path / "m")) == 10 and by_name["1-100032-A.ogg"]["id"] == "100032"
    assert "(published 400 clips)" in capsys.readouterr().out
    wav(path / "002 - Rain/notes.wav")
    with pytest.raises(ValueError, match="notes.wav: not an ESC-10 clip"):
        convert(name, path, tmp_path / "foreign")


@real
def test_urbansound8k(tmp_path, capsys):
    name, path, _ = make_urbansound8k(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    row = by_name["100648-1-0-0.wav"]
    assert (row["labels"], row["fold"], row["id"], row["duration"]) == (
        ["car_horn"],
        10,
        "100648",
        0.5,
    )  # the slice, not its place in the source
    assert classes(tmp_path / "m") == (
        FORMATS / "labels/urbansound8k.txt"
    ).read_text().split() and {r["fold"] for r in rows} == set(range(1, 11))
    assert "published 8,732" in capsys.readouterr().out
    file = path / "metadata/UrbanSound8K.csv"
    file.write_text(file.read_text().split("\n", 1)[1])  # copies without a header exist
    _, again, _ = convert(name, path, tmp_path / "headless")
    assert [{**r, "where": ""} for r in again] == [
        {**r, "where": "", "audio": r["audio"].replace("/m/", "/headless/")} for r in rows
    ]


@real
def test_vggsound(tmp_path, capsys):
    name, path, _ = make_vggsound(tmp_path)
    report, rows, by_name = convert(name, path, tmp_path / "m")
    assert report["missing"] == [] and {r["split"] for r in rows} == {"train", "test"}
    row = next(r for r in rows if r["id"] == "--Lj4Y_96f0")
    assert row["labels"] == ["bee, wasp, etc. buzzing"] and row["split"] == "train"
    assert (
        classes(tmp_path / "m") == (FORMATS / "labels/vggsound.txt").read_text().splitlines()
        and len(classes(tmp_path / "m")) == 309
    )
    assert "(published 183,730 clips)" in capsys.readouterr().out
    (path / "data/vggsound.csv").unlink()  # the repository's own lists
    (path / "data/stat.csv").unlink()
    wav(path / "audio/glLQrEijrKg_000300.wav")
    _, rows, _ = convert(name, path, tmp_path / "lists")
    assert [(r["id"], r["labels"], r["split"]) for r in rows] == [
        ("glLQrEijrKg", ["playing hammond organ"], "test")
    ]


def test_vggsound_lists_of_another_form(tmp_path):
    wav(tmp_path / "glLQrEijrKg_000300.wav")
    for file, content, message in (
        (
            "test.csv",
            "glLQrEijrKg_000300.mp4,dog\nnostart.mp4,dog\n",
            "test.csv: found 'nostart' where a number is expected",
        ),
        ("vggsound.csv", "glLQrEijrKg,300,dog,holdout\n", "does not have the form .*'holdout'"),
    ):
        text(tmp_path / file, content)
        with pytest.raises(ValueError, match=message):
            convert("vggsound", tmp_path, tmp_path / "m")


@real
def test_audioset(tmp_path, capsys):
    name, path, _ = make_audioset(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    row = by_name["Y--PJHxphWEs.wav"]
    assert (row["labels"], row["id"], row["split"]) == (["Speech", "Gush"], "--PJHxphWEs", "train")
    assert (
        by_name["Y--4gqARaEJE.wav"]["split"] == "test"
        and len(by_name["Y--4gqARaEJE.wav"]["labels"]) == 4
    )
    assert classes(tmp_path / "m") == (FORMATS / "labels/audioset.txt").read_text().splitlines()
    assert "eval: 12 of 12 clips (published 20,371 clips)" in capsys.readouterr().out
    file = path / "class_labels_indices.csv"
    file.write_text(file.read_text().split("\n", 1)[1])
    convert(name, path, tmp_path / "headless")
    assert len(classes(tmp_path / "headless")) == 527
    file.unlink()
    with pytest.raises(FileNotFoundError, match="class_labels_indices.csv is missing"):
        convert(name, path, tmp_path / "none")


@real
def test_audioset_strong_both_forms(tmp_path, capsys):
    name, path, _ = make_audioset_strong(tmp_path)
    report, rows, by_name = convert(name, path, tmp_path / "m")
    row = by_name["Y-9O1cb8z7Mk.wav"]
    assert (
        row["id"] == "-9O1cb8z7Mk"
        and row["split"] == "test"
        and row["labels"] == ["Gunshot, gunfire"]
    )
    assert (
        row["events"][0] == {"label": "Gunshot, gunfire", "onset": 1.598, "offset": 2.307}
        and len(row["events"]) == 3
    )
    assert (
        "--EnKcYsPas_210000.wav" in by_name
        and by_name["--EnKcYsPas_210000.wav"]["id"] == "--EnKcYsPas"
    )
    assert (
        classes(tmp_path / "m")
        == (FORMATS / "labels/audioset_strong_common407.txt").read_text().splitlines()
    )
    events = table(path / "audioset_train_strong.tsv", delimiter="\t")
    assert report["splits"]["train"]["events"] == len(events)
    assert "(published 16,996 clips, 139,538 events)" in capsys.readouterr().out
    # converted: `filename onset offset event_label`
    shown = dict(
        line.split("\t") for line in (path / "mid_to_display_name.tsv").read_text().splitlines()
    )
    text(
        tmp_path / "conv/as_strong_train.tsv",
        "filename\tonset\toffset\tevent_label\n"
        + "".join(
            f"{r['segment_id']}.wav\t{r['start_time_seconds']}\t{r['end_time_seconds']}\t"
            f"{shown[r['label']]}\n"
            for r in events
        ),
    )
    _, again, _ = convert(name, tmp_path / "conv", tmp_path / "m2", "--audio", path / "train")

    def strip(row):
        return {k: v for k, v in row.items() if k not in ("audio", "where")}

    assert [strip(r) for r in again] == [strip(r) for r in rows if r["split"] == "train"]
    (path / "mid_to_display_name.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="mid_to_display_name.tsv is missing"):
        convert(name, path, tmp_path / "m3")


def test_strong_overlaps_of_one_class_stay(tmp_path):
    text(
        tmp_path / "eval.tsv",
        "filename\tonset\toffset\tevent_label\n"
        "a_B1-cdefgh_30000.wav\t1.0\t3.0\tDog\n"
        "a_B1-cdefgh_30000.wav\t2.0\t4.0\tDog\n",
    )
    wav(tmp_path / "Ya_B1-cdefgh.wav", 5.0)
    _, rows, _ = convert("audioset_strong", tmp_path, tmp_path / "m")
    assert (
        rows[0]["id"] == "a_B1-cdefgh" and rows[0]["split"] == "test"
    )  # rsplit: the id holds an underscore
    assert rows[0]["events"] == [
        {"label": "Dog", "onset": 1.0, "offset": 3.0},
        {"label": "Dog", "onset": 2.0, "offset": 4.0},
    ]


@real
def test_desed(tmp_path, capsys):
    name, path, _ = make_desed(tmp_path)
    report, rows, by_name = convert(name, path, tmp_path / "m")
    empty = [r for r in rows if r["split"] == "val" and r["events"] == []]
    assert {Path(r["audio"]).name for r in empty} >= {
        "YU0Cg_t_3TdI_30.000_40.000.wav",
        "Y-jLujkP1aaw_30.000_40.000.wav",
    }
    assert by_name["Y-jLujkP1aaw_30.000_40.000.wav"]["id"] == "-jLujkP1aaw"
    public = by_name["1Ro0FgMWTUE_120_130.wav"]
    assert (
        public["split"] == "test"
        and public["id"] == "1Ro0FgMWTUE"
        and public["labels"] == ["Speech", "Frying", "Dishes"]
    )
    assert (
        public["events"][2] == {"label": "Frying", "onset": 3.847, "offset": 10.0}
        and len(public["events"]) == 7
    )
    assert (
        by_name["sdHVFACi42A_16_27.wav"]["events"][0]["offset"] == 11.0
        and by_name["sdHVFACi42A_16_27.wav"]["duration"] == 11.0
    )
    weak = by_name["YKK227gPpRn4_30.000_40.000.wav"]
    assert (
        weak["labels"] == ["Alarm_bell_ringing", "Speech"]
        and weak["split"] == "train"
        and "events" not in weak
    )
    assert classes(tmp_path / "m") == (FORMATS / "labels/desed.txt").read_text().split()
    out = capsys.readouterr().out
    assert "(published 1,168 clips, 4,224 events)" in out and report["splits"]["validation"][
        "events"
    ] == sum(len(r["events"]) for r in rows if r["split"] == "val")
    # synthetic part: names are only numbers, so the folder decides
    for part, split in (("synthetic21_train", "train"), ("synthetic21_validation", "validation")):
        text(
            path / f"dcase_synth/audio/{split}/{part}/soundscapes.tsv",
            "filename\tonset\toffset\tevent_label\n5.wav\t0.008\t1.022\tDog\n",
        )
        wav(
            path / f"dcase_synth/audio/{split}/{part}/soundscapes/5.wav",
            1.0 if split == "train" else 2.0,
        )
    _, rows, _ = convert(
        name, path, tmp_path / "s", "--sets", "synthetic21_train", "synthetic21_validation"
    )
    assert [(r["split"], r["duration"], r["events"][0]["offset"]) for r in rows] == [
        ("train", 1.0, 1.022),
        ("val", 2.0, 1.022),
    ]
    convert(name, path, tmp_path / "typo", "--sets", "public", "validaton")
    assert "validaton: 0 of 0 clips" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no table of --sets nothing"):
        convert(name, path, tmp_path / "n", "--sets", "nothing")


def test_audiogrounding_v2(tmp_path):
    name, path, _ = make_audiogrounding(tmp_path)
    report, rows, by_name = convert(name, path, tmp_path / "m")
    row = by_name["Y-0Zzz_z_zzz.wav"]
    assert (
        row["captions"] == ["a dog barks and wind blows", "a dog barks while wind blows"]
        and row["id"] == "-0Zzz_z_zzz"
    )
    assert row["phrases"] == 2 * [
        {"phrase": "a dog barks", "segments": [[0.5, 2.0], [4.0, 4.5]]},
        {"phrase": "wind blows", "segments": []},
    ]
    assert [r["split"] for r in rows] == ["train", "test", "test"] and report["splits"]["test"][
        "phrases"
    ] == 8


@real
def test_audiogrounding_v1_through_csv(tmp_path):
    root = copy("audiogrounding_v1", tmp_path / "v1")
    source = json.loads((root / "data/test.json").read_text())
    for file in set(source["filename"].values()):
        wav(root / "audio" / file, 10.0)
    with pytest.raises(
        ValueError, match="AudioGrounding version 1 .*tools.datasets csv .*--audio filename"
    ):
        convert("audiogrounding", root, tmp_path / "no")
    _, rows, by_name = convert(
        "csv",
        root / "data/test.json",
        tmp_path / "m",
        "--audio",
        "filename",
        "--caption",
        "caption",
        "--phrase",
        "soundtag",
        "--segments",
        "timestamps",
        "--audio-dir",
        root / "audio",
        "--split",
        "test",
    )
    row = by_name["QvATUKXYFBs_60.000_70.000.wav"]
    assert row["id"] == "QvATUKXYFBs" and row["split"] == "test"
    assert (
        row["captions"]
        == ["bells ring followed by humming and vibrations as a train passes while blowing a horn"]
        and len(row["phrases"]) == 5
    )
    assert sum(len(r["phrases"]) for r in rows) == len(source["soundtag"])
    absent = [source["soundtag"][k] for k, v in source["timestamps"].items() if v == [[0, 0]]]
    assert sorted(p["phrase"] for r in rows for p in r["phrases"] if not p["segments"]) == sorted(
        absent
    )


def test_tut2017(tmp_path):
    name, path, _ = make_tut2017(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    assert [(Path(r["audio"]).name, r["labels"][0], r.get("fold"), r["split"]) for r in rows] == [
        ("b020_90_100.wav", "beach", 3, "train"),
        ("a001_0_10.wav", "cafe/restaurant", 1, "train"),
        ("1.wav", "tram", None, "test"),
        ("2.wav", "beach", None, "test"),
    ]
    assert len(classes(tmp_path / "m")) == 15
    of_test = path / "TUT-acoustic-scenes-2017-evaluation"
    _, rows, _ = convert(name, of_test, tmp_path / "e")
    assert [r["split"] for r in rows] == ["test", "test"]
    (of_test / "evaluation_setup").mkdir()
    (of_test / "meta.txt").rename(of_test / "evaluation_setup/evaluate.txt")
    for given, n in ((path, 4), (of_test, 2)):
        _, rows, _ = convert(name, given, tmp_path / f"without{n}")
        assert len(rows) == n and [r["split"] for r in rows[-2:]] == ["test", "test"]


def test_clotho_aqa(tmp_path, capsys):
    name, path, _ = make_clotho_aqa(tmp_path)
    _, rows, by_name = convert(name, path, tmp_path / "m")
    assert "clotho_aqa_metadata.csv: no Freesound id there" in capsys.readouterr().out and not any(
        "id" in row for row in rows
    )
    assert sorted(by_name) == [" Ambience Birds.wav", "Caf\u00e9, two.wav"] and {
        r["split"] for r in rows
    } == {"test"}
    assert by_name[" Ambience Birds.wav"]["qa"] == [
        {"question": "Are there birds?", "answer": "yes", "answers": ["yes", "yes", "no"]},
        {
            "question": "What is heard, mostly?",
            "answer": "wind",
            "answers": ["birds", "wind", "wind"],
        },
    ]
    text(
        path / "clotho_aqa_metadata.csv",
        "file_name;sound_id;start_end_samples\n Ambience Birds.wav;327673;[1, 2]\n",
        "\r\n",
    )
    _, _, by_name = convert(name, path, tmp_path / "ids")
    assert (
        by_name[" Ambience Birds.wav"]["id"] == "327673"
        and "id" not in by_name["Caf\u00e9, two.wav"]
    )
    link = "https://freesound.org/people/someone/sounds/327674"
    text(
        path / "clotho_aqa_metadata.csv",
        f"file_name;sound_link;start_end_samples\n Ambience Birds.wav;{link};[1, 2]\n",
        "\r\n",
    )
    assert convert(name, path, tmp_path / "links")[2][" Ambience Birds.wav"]["id"] == "327674"


@real
def test_music_avqa(tmp_path, capsys):
    name, path, _ = make_music_avqa(tmp_path)
    report, rows, by_name = convert(name, path, tmp_path / "m")
    assert by_name["00000028.wav"]["id"] == "00000028"
    assert by_name["00000108.wav"]["qa"][0] == {
        "question": "Is the guzheng louder than the piano?",
        "answer": "yes",
        "type": ["Audio", "Comparative"],
    }
    assert not any(
        "<" in q["question"] or q["question"] != q["question"].strip()
        for r in rows
        for q in r["qa"]
    )
    assert report["splits"]["val"]["qa"] == len(
        json.loads((path / "data/json/avqa-val.json").read_text(encoding="utf-8"))
    )
    assert "(published 3,815 clips, 4,595 qa)" in capsys.readouterr().out
    convert(name, path, tmp_path / "u", "--version", "json_update")
    assert "(published 4,568 qa)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Any table, any folders
# ------------------------------------------------------------------------------------------------


def test_csv_rows_of_one_file_become_one_clip(tmp_path):
    text(
        tmp_path / "mine.csv",
        "file;text;part\na/x.wav;Rain, heavy;training\nb/x.wav;Wind;eval\na/x.wav;It "
        "rains;training\n",
        "\r\n",
    )
    wav(tmp_path / "a/x.wav"), wav(tmp_path / "b/x.wav", 0.7)
    _, rows, _ = convert(
        "csv",
        tmp_path / "mine.csv",
        tmp_path / "m",
        "--audio",
        "file",
        "--caption",
        "text",
        "--split",
        "part",
    )
    assert [(r["captions"], r["split"], r["duration"]) for r in rows] == [
        (["Rain, heavy", "It rains"], "train", 0.5),
        (["Wind"], "test", 0.7),
    ]
    text(
        tmp_path / "events.jsonl",
        "".join(
            json.dumps({"f": "a/x", "l": lab, "on": on, "off": on + 0.1, "yt": "-aBcdefghij"})
            + "\n"
            for lab, on in (("dog", 0.1), ("cat", 0.2), ("dog", 0.3))
        ),
    )
    _, rows, _ = convert(
        "csv",
        tmp_path / "events.jsonl",
        tmp_path / "e",
        "--audio",
        "f",
        "--label",
        "l",
        "--onset",
        "on",
        "--offset",
        "off",
        "--id",
        "yt",
        "--split",
        "val",
    )
    assert (
        len(rows) == 1
        and rows[0]["labels"] == ["dog", "cat"]
        and rows[0]["id"] == "-aBcdefghij"
        and rows[0]["split"] == "val"
    )
    assert rows[0]["events"][1] == {
        "label": "cat",
        "onset": 0.2,
        "offset": pytest.approx(0.3),
    } and classes(tmp_path / "e") == ["cat", "dog"]
    text(tmp_path / "labels.tsv", "n\tl\tfold\na/x\tdog,cat\t2\n")
    _, rows, _ = convert(
        "csv",
        tmp_path / "labels.tsv",
        tmp_path / "l",
        "--audio",
        "n",
        "--label",
        "l",
        "--label-separator",
        ",",
        "--fold",
        "fold",
    )
    assert rows[0]["labels"] == ["dog", "cat"] and rows[0]["fold"] == 2
    text(tmp_path / "whole.tsv", "n\tl\nb/x\tGunshot, gunfire\n")
    _, rows, _ = convert(
        "csv", tmp_path / "whole.tsv", tmp_path / "w", "--audio", "n", "--label", "l"
    )
    assert rows[0]["labels"] == ["Gunshot, gunfire"]


def test_csv_of_a_row_a_label_with_empty_cells(tmp_path):
    wav(tmp_path / "a.wav")
    lines = ["audio,caption,label,fold,phrase,at", "a.wav,a dog and a cat,dog;cat; ,1.0,dog,[]"]
    lines += ["a.wav,a dog and a cat,rain,1.0,,[]", "a.wav,It\u2019s \u2013 caf\xe9,,1.0,,[]"]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    flags = "--audio audio --caption caption --label label --fold fold --phrase phrase"
    flags = [*flags.split(), "--segments", "at", "--label-separator", ";"]
    _, (row,), _ = convert("csv", tmp_path / "t.csv", tmp_path / "m", *flags)
    assert row["captions"] == ["a dog and a cat", "It\u2019s \u2013 caf\xe9"]
    assert row["labels"] == ["dog", "cat", "rain"] and row["fold"] == 1
    assert [p["phrase"] for p in row["phrases"]] == ["dog"]
    (tmp_path / "s.jsonl").write_text('{"audio": "a.wav", "caption": "x", "part": null}\n')
    flags = ["--audio", "audio", "--caption", "caption", "--split", "part"]
    _, (row,), _ = convert("csv", tmp_path / "s.jsonl", tmp_path / "m2", *flags)
    assert "split" not in row


@real
def test_csv_reads_urban_sed_acav_and_auto_acd(tmp_path):
    root = copy("urbansed", tmp_path / "sed")
    (
        wav(root / "audio/train/soundscape_train_uniform1736.wav", 10.0),
        wav(root / "audio/validate/soundscape_validate_uniform0.wav", 10.0),
    )
    text(root / "annotations/validate/soundscape_validate_uniform0.txt", "")
    _, rows, by_name = convert(
        "csv",
        root / "annotations",
        tmp_path / "u",
        "--columns",
        "onset,offset,label",
        "--audio",
        "file",
        "--label",
        "label",
        "--onset",
        "onset",
        "--offset",
        "offset",
        "--split",
        "folder",
        "--audio-dir",
        root / "audio",
    )
    row = by_name["soundscape_train_uniform1736.wav"]
    assert (
        row["events"][0] == {"label": "gun_shot", "onset": 1.265813, "offset": 1.6759810000000002}
        and len(row["events"]) == 6
    )
    assert (
        row["events"][-1]["offset"] == 10.0 and row["split"] == "train"
    )  # 10.000000000000002 in the file
    assert (
        by_name["soundscape_validate_uniform0.wav"]["events"] == []
        and by_name["soundscape_validate_uniform0.wav"]["split"] == "val"
    )
    wav(tmp_path / "acav/NnWTPUAjT-w_205.flac")
    report, rows, _ = convert(
        "csv",
        SAMPLES / "acav100m/examples/output.csv",
        tmp_path / "a",
        "--columns",
        "shard,file,youtube,times",
        "--audio",
        "file",
        "--id",
        "youtube",
        "--audio-dir",
        tmp_path / "acav",
    )
    assert [r["id"] for r in rows] == ["NnWTPUAjT-w"] and len(report["missing"]) == 2
    text(
        tmp_path / "auto.csv",
        "youtube_id,caption\noPRC3zComfA_000117,A dog barks.\n-PRC3z_omfA_000030,Rain.\n",
    )
    wav(tmp_path / "auto/oPRC3zComfA_000117.wav"), wav(tmp_path / "auto/Y-PRC3z_omfA.wav")
    _, rows, _ = convert(
        "csv",
        tmp_path / "auto.csv",
        tmp_path / "d",
        "--audio",
        "youtube_id",
        "--caption",
        "caption",
        "--audio-dir",
        tmp_path / "auto",
    )
    assert [(r["id"], r["captions"]) for r in rows] == [
        ("oPRC3zComfA", ["A dog barks."]),
        ("-PRC3z_omfA", ["Rain."]),
    ]


def test_a_missing_file_is_never_another_one(tmp_path):
    text(tmp_path / "t.csv", "f,t\nmy_sound_01_30.wav,rain\nmy_sound_01.wav,wind\n")
    wav(tmp_path / "my_sound_01.wav")
    report, rows, _ = convert(
        "csv", tmp_path / "t.csv", tmp_path / "m", "--audio", "f", "--caption", "t"
    )
    assert (
        [r["captions"] for r in rows] == [["wind"]]
        and report["missing"] == ["my_sound_01_30"]
        and "id" not in rows[0]
    )


def test_the_table_tells_the_folder(tmp_path):
    text(tmp_path / "t.csv", "f,t\na/x.wav,rain\nb/x.wav,wind\na/y.wav,dog\n")
    wav(tmp_path / "b/x.wav"), wav(tmp_path / "a/y.wav")
    report, rows, _ = convert(
        "csv", tmp_path / "t.csv", tmp_path / "m", "--audio", "f", "--caption", "t"
    )
    assert [r["captions"] for r in rows] == [["wind"], ["dog"]] and report["missing"] == [
        "x"
    ]  # a/x.wav is not b/x.wav


def test_csv_never_guesses_between_folders(tmp_path, capsys):
    text(
        tmp_path / "t.csv",
        "f,t\n1.wav,rain\nc/2.wav,wind\nc/3.wav,dog\n4.wav,cat\n4.wav,cow\nx/5.wav,owl\n",
    )
    for name in (
        "a/1.wav",
        "b/1.wav",
        "a/2.wav",
        "b/2.wav",
        "z/3.wav",
        "4.wav",
        "a/4.wav",
        "a/x/5.wav",
        "b/5.wav",
    ):
        wav(tmp_path / name)
    report, rows, _ = convert(
        "csv", tmp_path / "t.csv", tmp_path / "m", "--audio", "f", "--caption", "t"
    )
    found = {os.path.relpath(r["audio"], tmp_path): r["captions"] for r in rows}
    assert (
        found == {"z/3.wav": ["dog"], "4.wav": ["cat", "cow"], "a/x/5.wav": ["owl"]}
        and report["missing"] == []
    )
    said = capsys.readouterr().out
    assert (
        "left out, since files of that name lie in several folders (write the folder in the "
        "table, or name the right folder with --audio): 2, such as '1.wav (a/1.wav or b/1.wav)'"
        in said
    )
    assert "found in another folder than the table says: 1, such as 'c/3.wav -> z/3.wav'" in said
    text(tmp_path / "one.csv", "f,t\n1.wav,rain\n")
    with pytest.raises(
        ValueError,
        match="files of the same name lie in several folders, such as 1.wav .a/1.wav or b/1.wav.; "
        "write the folder",
    ):
        convert("csv", tmp_path / "one.csv", tmp_path / "n", "--audio", "f", "--caption", "t")
    with pytest.raises(FileNotFoundError, match="--audio-dir .*nowhere: no such folder"):
        convert(
            "csv",
            tmp_path / "one.csv",
            tmp_path / "n",
            "--audio",
            "f",
            "--caption",
            "t",
            "--audio-dir",
            tmp_path / "nowhere",
        )


def test_csv_takes_the_sound_beside_the_video(tmp_path):
    (
        text(tmp_path / "t.csv", "f,t\nx.mp4,rain\n"),
        text(tmp_path / "x.mp4", "film"),
        wav(tmp_path / "x.wav"),
    )
    _, rows, by_name = convert(
        "csv", tmp_path / "t.csv", tmp_path / "m", "--audio", "f", "--caption", "t"
    )
    assert list(by_name) == ["x.wav"]


def test_csv_youtube_ids_without_a_capital(tmp_path):
    text(tmp_path / "t.csv", "youtube_id,t\nabcdefghij1_000030,rain\nAbcdefghij1_000030,wind\n")
    (
        wav(tmp_path / "Yabcdefghij1.wav"),
        wav(tmp_path / "AbcdefghijA.wav"),
        wav(tmp_path / "YAbcdefghij1.wav"),
    )
    _, rows, _ = convert(
        "csv",
        tmp_path / "t.csv",
        tmp_path / "m",
        "--audio",
        "youtube_id",
        "--id",
        "youtube_id",
        "--caption",
        "t",
    )
    assert [(r["id"], r["captions"]) for r in rows] == [
        ("abcdefghij1", ["rain"]),
        ("Abcdefghij1", ["wind"]),
    ]
    text(tmp_path / "j.jsonl", json.dumps({"f": "YAbcdefghij1.wav", "id": "YAbcdefghij1.wav"}))
    _, rows, _ = convert("csv", tmp_path / "j.jsonl", tmp_path / "j", "--audio", "f", "--id", "id")
    assert rows[0]["id"] == "Abcdefghij1"


def test_names_in_either_unicode_form_and_half_a_character(tmp_path):
    text(
        tmp_path / "t.jsonl", '{"f": "caf\u00e9", "t": "rain \\ud83d"}\n'
    )  # JSON cut amid an emoji
    wav(tmp_path / "cafe\u0301.wav")  # as macOS unpacks it
    _, rows, _ = convert(
        "csv", tmp_path / "t.jsonl", tmp_path / "m", "--audio", "f", "--caption", "t"
    )
    assert rows[0]["captions"] == ["rain ?"]


def test_folders(tmp_path):
    for name in (
        "one/dog/a.wav",
        "one/sea waves/b.flac",
        "two/train/dog/a.wav",
        "two/valid/dog/b.wav",
    ):
        wav(tmp_path / name)
    _, rows, _ = convert("folders", tmp_path / "one", tmp_path / "m1")
    assert [(r["labels"], "split" in r) for r in rows] == [
        (["dog"], False),
        (["sea waves"], False),
    ] and classes(tmp_path / "m1") == ["dog", "sea waves"]
    wav(tmp_path / "elsewhere/c.wav")
    (tmp_path / "one/cat").symlink_to(tmp_path / "elsewhere")
    for name in ("again", "latest"):  # links to a folder above end
        (tmp_path / "one" / name).symlink_to(tmp_path / "one")
    _, rows, _ = convert("folders", tmp_path / "one", tmp_path / "m4")
    assert [r["labels"] for r in rows] == [["cat"], ["dog"], ["sea waves"]]
    _, rows, _ = convert("folders", tmp_path / "two", tmp_path / "m2")
    assert [r["split"] for r in rows] == ["train", "val"]
    with pytest.raises(ValueError, match="expected CLASS/file or SPLIT/CLASS/file"):
        convert("folders", tmp_path, tmp_path / "m3")
    wav(tmp_path / "two/zdev/dog/c.wav")
    with pytest.raises(ValueError, match="'zdev' is no split; known: train, "):
        convert("folders", tmp_path / "two", tmp_path / "m3")
    wav(tmp_path / "flat/train/a.wav"), wav(tmp_path / "flat/test/b.wav")
    with pytest.raises(ValueError, match="its folders are splits without class folders"):
        convert("folders", tmp_path / "flat", tmp_path / "m3")


def test_files_of_other_types_are_named(tmp_path, capsys):
    (
        wav(tmp_path / "s/cat/a.wav"),
        text(tmp_path / "s/cat/b.m4a", ""),
        text(tmp_path / "s/c.opus", ""),
    )
    convert("folders", tmp_path / "s", tmp_path / "m")
    assert "not .aif, .aiff, .flac, .mp3, .ogg, .wav: 2, such as" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Bad input: one sentence
# ------------------------------------------------------------------------------------------------


@real
def test_wrong_level_wrong_dataset_pointer_and_nothing(tmp_path):
    def message(name, path, *flags):
        with pytest.raises((ValueError, FileNotFoundError, PermissionError)) as caught:
            convert(name, path, tmp_path / "out", *flags)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    esc, clotho, caps = (
        make_esc50(tmp_path / "e")[1],
        make_clotho(tmp_path / "c")[1],
        make_audiocaps(tmp_path / "a")[1],
    )
    assert f"wrong level of the tree, here is no meta/esc50.csv; give {esc}" in message(
        "esc50", esc / "audio"
    )
    assert f"wrong level of the tree, here is no meta/esc50.csv; give {esc}" in message(
        "esc50", esc.parent
    )
    assert f"give {caps}" in message("audiocaps", caps / "wavs")
    assert (
        "holds the files of clotho, not of esc50 (expected meta/esc50.csv); run: python -m "
        "tools.datasets clotho" in message("esc50", clotho)
    )
    assert "holds the files of audiocaps, not of vggsound" in message("vggsound", caps / "dataset")
    copy("wavcaps_github_clone", tmp_path / "lfs")
    assert re.search(
        r"fsd_final.json: a Git-LFS pointer, not the data; run 'git lfs pull'",
        message("wavcaps", tmp_path / "lfs"),
    )
    (tmp_path / "x/empty").mkdir(parents=True)
    assert "found no clotho_captions_*.csv of clotho" in message("clotho", tmp_path / "x/empty")
    assert "no such folder; clotho takes the dataset's folder" in message(
        "clotho", tmp_path / "nowhere"
    )
    nothing = message("audiocaps", caps, "--audio", tmp_path / "x/empty")
    assert re.search(r"not one of the \d+ clips has its audio here", nothing)
    first = table(caps / "dataset/train.csv")[0]
    for tried in datasets.youtube_names(first["youtube_id"], int(first["start_time"])) + [
        first["audiocap_id"]
    ]:
        assert repr(tried) in nothing
    text(tmp_path / "x/empty/r1nicOVtvkQ.mp4", "film")
    assert "holds videos, such as r1nicOVtvkQ.mp4, which must first be turned into wav" in message(
        "audiocaps", caps, "--audio", tmp_path / "x/empty"
    )
    wav(tmp_path / "x/empty/other.wav")
    assert "it holds sound files, such as other.wav" in message(
        "audiocaps", caps, "--audio", tmp_path / "x/empty"
    )
    assert "--audio" in message("audiocaps", caps, "--audio", tmp_path / "nowhere")
    good = (esc / "meta/esc50.csv").read_text()
    for content in ("", "<!DOCTYPE html>"):
        text(esc / "meta/esc50.csv", content)
        assert f"meta/esc50.csv: not a table of esc50, it begins with {content!r}" in message(
            "esc50", esc
        )
    text(esc / "meta/esc50.csv", re.sub("[^,\n]+", r'"\g<0>"', good))  # every cell quoted
    assert len(convert("esc50", esc, tmp_path / "quoted")[1]) == 20


def test_out_that_is_a_file_is_said_before_the_work(tmp_path, monkeypatch):
    wav(tmp_path / "s/dog/a.wav"), text(tmp_path / "file", "")
    monkeypatch.setattr(
        datasets, "with_durations", lambda *_: pytest.fail("read the headers first")
    )
    with pytest.raises(PermissionError, match="--out .*cannot be written .a file: .*file"):
        convert("folders", tmp_path / "s", tmp_path / "file")


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ("a,b\nx.wav,1\n", ["--audio", "file"], "t.csv: no column 'file' (columns there: a, b)"),
        (
            "a,b\nx.wav,1\n",
            ["--audio", "a", "--label", "b", "--onset", "b"],
            "--onset, --offset and --label go together",
        ),
        ("a,b\nx.wav,1\n", ["--audio", "a", "--split", "b"], "'1' in column 'b' is no split"),
        (
            "a,l,on,off\nx.wav,dog,soon,2\n",
            ["--audio", "a", "--label", "l", "--onset", "on", "--offset", "off"],
            "t.csv, row 1: found 'soon' where a number is expected",
        ),
        (
            "a,l,on,off\nx.wav,dog,3,2\n",
            ["--audio", "a", "--label", "l", "--onset", "on", "--offset", "off"],
            "t.csv, row 1: an event of 'dog' from 3 to 2 s; expected 0 <= onset <= offset",
        ),
        (
            "a,b\nx.wav,Rain, heavy\n",
            ["--audio", "a", "--caption", "b"],
            "row 1 has 3 cells, expected 2 (a, b); cells that hold the delimiter need quotes",
        ),
        ("a,b\nx.wav\n", ["--audio", "a", "--caption", "b"], "row 1 has 1 cells, expected 2"),
        ("a\0b\n", ["--audio", "a"], "t.csv: not a text file"),
        (
            'a,b\nx.wav,"Rain\nx.wav,wind\n',
            ["--audio", "a", "--caption", "b"],
            "t.csv:3: cannot be read as a table",
        ),
        (
            'a,b\nx.wav,"Rain\nx.wav,"wind, too"\n',
            ["--audio", "a", "--caption", "b"],
            "is a closing quote missing?",
        ),
        ("a,b\nx.wav,1\n", ["--audio", "a", "--exclude", "nowhere"], "nowhere: no such manifest"),
        ("a,b\n", ["--audio", "a"], "the tables list not one clip"),
    ],
)
def test_bad_tables(tmp_path, content, flags, message):
    wav(tmp_path / "x.wav")
    text(tmp_path / "t.csv", content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert("csv", tmp_path / "t.csv", tmp_path / "m", *flags)
    assert message in str(caught.value)


def test_quotes_that_are_only_untidy(tmp_path):
    (
        text(tmp_path / "t.tsv", 'a\tb\nx.wav\t"Woof" says a dog\nx.wav\t"one\ttwo"\n'),
        wav(tmp_path / "x.wav"),
    )
    _, rows, _ = convert(
        "csv", tmp_path / "t.tsv", tmp_path / "m", "--audio", "a", "--caption", "b"
    )
    assert rows[0]["captions"] == ["Woof says a dog", "one\ttwo"]
    text(tmp_path / "lines.csv", 'a,b\nx.wav,"Rain\nand wind"\n')  # a whole cell of two lines
    _, rows, _ = convert(
        "csv", tmp_path / "lines.csv", tmp_path / "l", "--audio", "a", "--caption", "b"
    )
    assert rows[0]["captions"] == ["Rain\nand wind"]


def test_events_that_the_file_does_not_hold_are_left_out(tmp_path, capsys):
    wav(tmp_path / "x.wav", 1.0)
    text(tmp_path / "t.csv", "a,l,on,off\nx.wav,dog,0.5,2\nx.wav,cat,1.5,2\nx.wav,cow,0.5,0.5\n")
    _, rows, _ = convert(
        "csv",
        tmp_path / "t.csv",
        tmp_path / "m",
        "--audio",
        "a",
        "--label",
        "l",
        "--onset",
        "on",
        "--offset",
        "off",
    )
    assert rows[0]["events"] == [{"label": "dog", "onset": 0.5, "offset": 2.0}]
    out = capsys.readouterr().out
    assert (
        "beginning after their file ends: 2" in out
        and "1 events end after their file does (kept as published)" in out
    )


def test_times_in_milliseconds_are_refused(tmp_path):
    wav(tmp_path / "x.wav", 2.0), wav(tmp_path / "y.wav", 2.0)
    text(tmp_path / "t.csv", "a,l,on,off\nx.wav,dog,0,1500\nx.wav,cat,700,1900\ny.wav,cat,90,95\n")
    flags = ("--audio", "a", "--label", "l", "--onset", "on", "--offset", "off")
    with pytest.raises(ValueError, match="2 of 3 events .*one at 700.*milliseconds"):
        convert("csv", tmp_path / "t.csv", tmp_path / "m", *flags)


def test_what_a_table_leaves_empty(tmp_path):
    """An empty fold is none; pandas' 345515.0 is the id 345515; a phrase needs a word."""
    wav(tmp_path / "x.wav"), wav(tmp_path / "y.wav")
    rows = 'x.wav,345515.0,1.0,-,"[[0, 0.2]]"\ny.wav,,,rain,"[[0, 0.2]]"\n'
    text(tmp_path / "t.csv", "a,i,f,p,s\n" + rows)
    flags = ("--audio", "a", "--id", "i", "--fold", "f", "--phrase", "p", "--segments", "s")
    found = convert("csv", tmp_path / "t.csv", tmp_path / "m", *flags)[1]
    assert [row.get("id") for row in found] == ["345515", None]
    assert [row.get("fold") for row in found] == [1, None]
    assert [[p["phrase"] for p in row["phrases"]] for row in found] == [[], ["rain"]]


def test_command_line_ends_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.datasets", "clotho", tmp_path, "--out", tmp_path / "m"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )
    assert "found no clotho_captions_*.csv of clotho" in done.stderr


def test_json_of_another_form_is_one_sentence(tmp_path):
    text(tmp_path / "test/label.json", json.dumps([{"phrases": [], "audio": 1}]))
    with pytest.raises(ValueError, match="a record does not have the form described under --help"):
        convert("audiogrounding", tmp_path, tmp_path / "m")
    # a record without the split's key is a row without a split, as an empty cell is
    text(tmp_path / "t.jsonl", '{"a": "x", "s": "train"}\n{"a": "y"}\n')
    wav(tmp_path / "x.wav"), wav(tmp_path / "y.wav")
    flags = ("--audio", "a", "--split", "s")
    rows = convert("csv", tmp_path / "t.jsonl", tmp_path / "m2", *flags)[1]
    assert [row.get("split") for row in rows] == ["train", None]
    text(tmp_path / "p.jsonl", '{"a": "x", "p": "rain", "s": [[1]]}\n')
    with pytest.raises(
        ValueError, match=r"\[\[1\]\] in column 's'; expected \[\[onset, offset\], ...\] in seconds"
    ):
        convert(
            "csv",
            tmp_path / "p.jsonl",
            tmp_path / "m",
            "--audio",
            "a",
            "--phrase",
            "p",
            "--segments",
            "s",
        )
    text(tmp_path / "test/label.json", '[{"phrases": [')
    with pytest.raises(ValueError, match="label.json:1: not valid JSON"):
        convert("audiogrounding", tmp_path, tmp_path / "m")


def test_broken_audio_is_left_out_and_counted(tmp_path, capsys):
    wav(tmp_path / "dog/a.wav")
    text(tmp_path / "dog/b.wav", "no sound"), text(tmp_path / "dog/._a.wav", "left by macOS")
    shutil.copyfile(
        tmp_path / "dog/a.wav", os.fsencode(tmp_path / "dog") + b"/caf\xe9.wav"
    )  # a name from a Latin-1 archive
    report, rows, _ = convert("folders", tmp_path, tmp_path / "m")
    assert (
        len(rows) == 1
        and len(report["unreadable"]) == 2
        and "left out, unreadable: 2" in capsys.readouterr().out
    )
    listed = (tmp_path / "m/left_out.txt").read_text().splitlines()
    assert len(listed) == 2 and any("caf\\udce9.wav: the file's name is not" in t for t in listed)
    assert f"{tmp_path}/dog/b.wav: Format not recognised." in "\n".join(listed)


# ------------------------------------------------------------------------------------------------
# The same recording twice
# ------------------------------------------------------------------------------------------------


def test_exclude_by_youtube_id_freesound_id_and_content(tmp_path, capsys):
    held = tmp_path / "held"
    names = ["Y-bCdefgh_jk.wav", "1-777-A-3.wav", "copy.wav", "other.wav"]
    for n, name in enumerate(names):
        wav(held / name, seed=n)
    common.write_lines(
        held / "manifest.jsonl", [json.dumps({"audio": name, "split": "test"}) for name in names]
    )
    own = tmp_path / "own"
    for name, seed in (
        ("-bCdefgh_jk_000030.wav", 10),
        ("777.wav", 11),
        ("renamed.wav", 2),
        ("new.wav", 12),
    ):
        wav(own / name, seed=seed)
    text(
        own / "t.csv",
        "file,text,id\n-bCdefgh_jk_000030.wav,a,\n777.wav,b,777\nrenamed.wav,c,\nnew.wav,d,\n",
    )
    flags = ["--audio", "file", "--caption", "text", "--id", "id"]
    _, rows, _ = convert("csv", own / "t.csv", tmp_path / "m", *flags, "--exclude", held)
    assert [r["captions"] for r in rows] == [["d"]]
    assert "3 clips left out, 2 by id and 1 by content" in capsys.readouterr().out
    # check finds the same three between the manifests
    convert("csv", own / "t.csv", tmp_path / "all", *flags, "--split", "train")
    report = datasets.check(
        datasets.parse(["check", str(held), str(tmp_path / "all"), "--workers", "1"])
    )
    ((pair, keys),) = report["leaks"].items()
    assert (
        keys
        == sorted(["-bCdefgh_jk", "777", datasets.file_hash(held / "copy.wav")])
        == report["shared"]
    )
    assert pair == (
        f"{tmp_path / 'all' / 'manifest.jsonl'} train",
        f"{held / 'manifest.jsonl'} test",
    )
    assert "recordings shared between splits: 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no clip is left to write"):
        convert("csv", own / "t.csv", tmp_path / "none", *flags, "--exclude", tmp_path / "all")


def test_only_files_that_may_be_equal_are_hashed(tmp_path, monkeypatch):
    for n in range(6):
        wav(tmp_path / f"{n}.wav", seed=n // 2 if n < 2 else n)  # one size; 0 and 1 are equal
    hashed, sha = [], datasets.file_hash
    monkeypatch.setattr(
        datasets, "file_hash", lambda path: hashed.append(Path(path).stem) or sha(path)
    )
    paths = [str(tmp_path / f"{n}.wav") for n in range(6)] + [str(tmp_path / "lost.wav")]
    assert len(set(datasets.hashes_of(paths).values())) == 1 and sorted(hashed) == ["0", "1"]
    assert (
        list(datasets.hashes_of(paths[1:], paths[:1])) == paths[1:2]
        and datasets.hashes_of(paths, []) == {}
    )


def resample(data, out, rate=16000, **flags):
    words = ["resample", *map(str, data), "--out", str(out), "--rate", str(rate), "--workers", "2"]
    return datasets.resample(datasets.parse(words))


def test_resample_writes_audio_of_one_rate_and_a_manifest_that_differs_in_nothing_else(
    tmp_path, capsys
):
    source, rows = tmp_path / "source", []
    for n, (rate, channels) in enumerate([(16000, 1), (44100, 2), (48000, 1)]):
        noise = np.random.default_rng(n).uniform(-0.9, 0.9, (rate * (n + 1), channels))
        (source / f"d{n}").mkdir(parents=True)
        sf.write(source / f"d{n}" / "same.wav", noise, rate)
        row = {
            "audio": f"d{n}/same.wav",
            "duration": n + 1.0,
            "captions": [f"c{n}"],
            "split": "val",
        }
        rows += [row, {**row, "captions": ["another"]}]  # a clip in two rows
    rows.append({"audio": "lost.wav", "captions": ["x"]})
    common.write_lines(source / "manifest.jsonl", [json.dumps(row) for row in rows])
    common.write_lines(source / "classes.txt", ["dog", "cat"])
    report = resample([source], tmp_path / "out")
    assert report == {"files": 4, "written": 3, "unreadable": 1}
    said = capsys.readouterr().out
    assert "4 of 4 files to write, about 0.00 GB" in said and "lost.wav: file not found" in said
    before, after = (common.read_manifest([str(f)]) for f in (source, tmp_path / "out"))
    hidden = ("audio", "where")
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in old.items() if k not in hidden} == {
            k: v for k, v in new.items() if k not in hidden
        }
        if "lost" in old["audio"]:  # stays where it was, so that a training reports it
            assert Path(new["audio"]).resolve() == Path(old["audio"]).resolve()
            continue
        assert sf.info(new["audio"]).samplerate == 16000 and sf.info(new["audio"]).channels == 1
        whole = common.read_audio(old["audio"], 16000)
        assert np.abs(common.read_audio(new["audio"], 16000) - whole.clip(-1, 1)).max() < 1e-4
    assert (tmp_path / "out/classes.txt").read_text() == "dog\ncat\n"
    with pytest.raises(FileExistsError, match="manifest.jsonl: already there"):
        resample([source], tmp_path / "out")


def test_resample_keeps_ids_and_loud_files_and_takes_the_swapped_audio(tmp_path, capsys):
    names = ("AbCdefghijk_000030.wav", "1-30226-A-0.wav", "loud.wav", "swapped.wav")
    for name in names:
        wav(tmp_path / "in" / name, rate=8000)
    t = np.arange(8000) / 8000
    sf.write(tmp_path / "in/loud.wav", 5 * np.sin(2 * np.pi * 440 * t), 8000, subtype="FLOAT")
    rows = [{"audio": name} for name in names[:3]]
    rows[0]["swapped_audio"] = "swapped.wav"
    common.write_lines(tmp_path / "in/manifest.jsonl", map(json.dumps, rows))
    resample([tmp_path / "in"], tmp_path / "out")
    rows = common.read_manifest([str(tmp_path / "out")])
    assert [row.get("id") for row in rows] == ["AbCdefghijk", "30226", None]
    assert "swapped_" in rows[0]["swapped_audio"]
    assert sf.info(rows[0]["swapped_audio"]).samplerate == 16000
    assert rows[2]["audio"].endswith("in/loud.wav")
    assert "its peak of 5.0 does not fit into 16-bit audio" in capsys.readouterr().out


def test_resample_continues_after_a_kill_and_notices_a_changed_file(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for n in range(6):
        wav(folder / f"{n}.wav", seed=n)
    lines = [json.dumps({"audio": f"{n}.wav"}) for n in range(6)]
    common.write_lines(folder / "manifest.jsonl", lines)
    source = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, signal, common
from tools import datasets
write = common.write_audio
def dies(path, *args):
    write(path, *args)
    if len(list(path.parent.glob("*.wav"))) == 3:
        os.killpg(0, signal.SIGKILL)
common.write_audio = dies
words = ["resample", {str(folder)!r}, "--out", {str(tmp_path / "out")!r}, "--rate", "8000"]
datasets.resample(datasets.parse([*words, "--workers", "1"]))
"""
    killed = subprocess.run([sys.executable, "-c", source], start_new_session=True)
    assert killed.returncode == -9 and not (tmp_path / "out/manifest.jsonl").exists()
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/audio").glob("*.wav")}
    wav(folder / "0.wav", seconds=2.0, seed=9)
    report = resample([folder], tmp_path / "out", 8000)
    assert report["files"] == 6 and report["written"] == 6 - 3 + ("0" in [n[0] for n in first])
    for path in (tmp_path / "out/audio").glob("*.wav"):
        assert path.stat().st_mtime_ns == first.get(path.name, path.stat().st_mtime_ns)
    rows = common.read_manifest([str(tmp_path / "out")])
    assert len(common.read_audio(rows[0]["audio"], 8000)) == 16000  # the new file, not the old one


def test_resample_of_manifests_that_share_their_audio_and_of_a_killed_worker(tmp_path):
    (tmp_path / "audio").mkdir()
    for n in range(12):
        wav(tmp_path / f"audio/{n}.wav", seed=n)
    lines = [json.dumps({"audio": f"../audio/{n}.wav"}) for n in range(12)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        common.write_lines(tmp_path / name / "manifest.jsonl", lines)
    report = resample([tmp_path / "a", tmp_path / "b"], tmp_path / "out", 8000)
    assert report["written"] == 12 and len(list((tmp_path / "out/audio").iterdir())) == 12
    source = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, common
from tools import datasets
read = common.read_audio
def dies(path, *args, **given):
    if path.endswith("7.wav"):
        os.kill(os.getpid(), 9)
    return read(path, *args, **given)
common.read_audio = dies
common.run_entry(datasets.main, datasets.parse, [*sys.argv[1:], "--workers", "2"])
"""
    resampling = ["resample", tmp_path / "a", "--out", tmp_path / "o", "--rate", "8000"]
    for words, doing in ((resampling, "resampling"), (["check", tmp_path / "a"], "decoding")):
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f"error: a process was killed while {doing}" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--rate", "-1"], "--rate -1: expected 1000 to 1000000 Hz"),
        (["--rate", "8000", "--out", "FILE/x"], "cannot be written|cannot be made"),
    ],
)
def test_resample_says_what_is_wrong(tmp_path, flags, sentence):
    wav(tmp_path / "a.wav")
    common.write_lines(tmp_path / "manifest.jsonl", ['{"audio": "a.wav"}'])
    flags = [flag.replace("FILE", str(tmp_path / "a.wav")) for flag in flags]
    words = ["resample", str(tmp_path), "--out", str(tmp_path / "out"), *flags]
    with pytest.raises((ValueError, OSError), match=sentence):
        datasets.resample(datasets.parse(words))


def test_check_of_many_rows(tmp_path):
    common.write_lines(
        tmp_path / "manifest.jsonl",
        [json.dumps({"audio": f"{n}.wav", "split": "train"}) for n in range(20000)],
    )
    began = time.process_time()
    report = datasets.check(datasets.parse(["check", str(tmp_path), "--workers", "1"]))
    assert len(report["unreadable"]) == 20000 and time.process_time() - began < 4, (
        "grows with the square of the rows"
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Y-bCdefgh_jk", "-bCdefgh_jk"),
        ("-bCdefgh_jk_30", "-bCdefgh_jk"),
        ("Y-bCdefgh_jk_30.000_40.000", "-bCdefgh_jk"),
        ("-bCdefgh_jk_120_130", "-bCdefgh_jk"),
        ("_bCdefgh_jk_000030", "_bCdefgh_jk"),
        ("Yabcdefghijk", None),
        ("train_00003", None),
        ("Sound_00001", None),
        ("AbCdefghijk", "AbCdefghijk"),
        ("2219", None),
        ("1-30226-A-0", None),  # 11 characters, of ESC-50
    ],
)
def test_youtube_ids_in_names(name, expected):
    assert datasets.youtube_id(name) == expected


@pytest.mark.parametrize(
    "name, expected",
    [("1-30226-A-0", "30226"), ("1-100032-A-0", "100032"), ("4-917-A", "917")]
    + [("99180-9-0-7", "99180"), ("Y-bCdefgh_jk_30", "-bCdefgh_jk")],
)
def test_ids_that_exclude_knows_a_recording_by(name, expected):
    assert datasets.keys_of({"audio": f"x/{name}.wav"}) == [expected]


@real
def test_every_adapter_takes_exclude(tmp_path):
    name, path, _ = make_wavcaps(tmp_path)
    text(
        tmp_path / "ac/manifest.jsonl",
        json.dumps({"audio": "b0RFKhbpFJA_30.wav", "id": "b0RFKhbpFJA"})
        + "\n"
        + json.dumps({"audio": "z.wav", "id": 180913})
        + "\n",
    )
    _, rows, _ = convert(name, path, tmp_path / "m", "--exclude", tmp_path / "ac")
    assert {r["id"].split(":")[0] for r in rows} == {"SoundBible", "BBC_Sound_Effects"}
    for adapter in datasets.ADAPTERS:
        command = "csv" if adapter is datasets.any_table else adapter.__name__
        args = datasets.parse(
            [
                command,
                "x",
                "--out",
                "y",
                "--exclude",
                "a",
                "b",
                *["--audio", "c"] * (command == "csv"),
            ]
        )
        assert args.exclude == ["a", "b"]


# ------------------------------------------------------------------------------------------------
# Native files to a printed score
# ------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    "make, protocol",
    [
        (make_audiocaps, "retrieval"),
        (make_clotho, "retrieval"),
        (make_wavcaps, "retrieval"),
        (make_fsd50k, "tagging"),
        (make_esc50, "classification"),
        (make_esc10, "classification"),
        (make_urbansound8k, "classification"),
        (make_vggsound, "classification"),
        (make_audioset, "tagging"),
        (make_audioset_strong, "sed"),
        (make_desed, "sed"),
        (make_audiogrounding, "grounding"),
        (make_tut2017, "classification"),
        (make_clotho_aqa, "aqa"),
        (make_music_avqa, "aqa"),
    ],
    ids=lambda value: getattr(value, "__name__", value).removeprefix("make_"),
)
def test_native_files_to_a_printed_score(make, protocol, mga_run, tmp_path, capsys):
    name, path, flags = make(tmp_path)
    if protocol == "aqa":  # the samples hold no training split
        tables = {
            make_clotho_aqa: ("clotho_aqa_test.csv", "clotho_aqa_train.csv"),
            make_music_avqa: ("data/json/avqa-val.json", "data/json/avqa-train.json"),
        }
        shutil.copyfile(*(path / file for file in tables[make]))
    convert(name, path, tmp_path / "m", *flags)
    tool = downstream if protocol in downstream.PROTOCOLS else evaluate
    results = tool.main(
        tool.parse(
            [
                str(mga_run[0] / "last.pt"),
                "--data",
                str(tmp_path / "m"),
                "--protocol",
                protocol,
                "--bootstrap",
                "0",
                "--device",
                "cpu",
            ]
        )
    )
    assert results[0]["protocol"] == protocol and results[0]["n_clips"] > 0
    assert f"{protocol}: {results[0]['n_clips']} clips" in capsys.readouterr().out


def test_two_columns_of_one_name_and_a_long_delimiter_are_refused(tmp_path):
    wav(tmp_path / "a.wav")
    table = tmp_path / "t.csv"
    table.write_text("file,text,text\na.wav,one,two\n")
    words = [
        "csv",
        str(table),
        "--audio",
        "file",
        "--caption",
        "text",
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(ValueError, match="t.csv: two columns are called 'text'; rename one"):
        datasets.main(datasets.parse(words))
    table.write_text("file::text\na.wav::one\n")
    with pytest.raises(ValueError, match="--delimiter ::: expected one character, or the word tab"):
        datasets.main(datasets.parse([*words, "--delimiter", "::"]))


@pytest.mark.parametrize("workers", ["0", "-2", "two"])
def test_workers_are_at_least_one(workers, capsys):
    with pytest.raises(SystemExit):
        datasets.parse(["check", "x", "--workers", workers])
    assert f"{workers}: expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, sentence",
    [
        ("filename,category\na.wav,dog\n", "no column 'fold'"),
        ("filename,fold,target,category,esc10,src_file,take\na.wav,1\n", "row 1 has 2 cells"),
        (
            "filename,fold,target,category,esc10,src_file,take\n"
            + ",".join(["a" * 200_000, "1", "0", "dog", "False", "1", "A"])
            + "\n",
            "cannot be read as a table|found no audio|field larger|not found",
        ),
    ],
    ids=["no fold", "short row", "a cell of 200 kB"],
)
def test_a_broken_esc50_table_is_one_sentence(tmp_path, table, sentence):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    wav(tmp_path / "audio/a.wav")
    (tmp_path / "meta/esc50.csv").write_text(table)
    words = ["esc50", str(tmp_path), "--out", str(tmp_path / "o")]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        datasets.main(datasets.parse(words))
    assert len(str(error.value)) < 1000
