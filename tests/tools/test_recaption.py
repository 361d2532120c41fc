"""tools.captions rewrite --task clean, and recaption: captions from noisy descriptions, captions by
a model of ours.
"""

import itertools
import json
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import common
import eval as evaluation
from test_rewrite import jsonl, manifest
from tools import captions as tool

DOG, RAIN, BELL = "Dog 01.wav. My dog barks in Graz", "heavy rain, recorded with a Tascam", "BELL_3"
ROWS = [
    {
        "audio": "a.wav",
        "duration": 5.0,
        "captions": ["Dog 01.wav", "My dog barks in Graz"],
        "negatives": [None, "x"],
        "split": "train",
        "id": 7,
        "note": 1,
        "group": "mine",
    },
    {"audio": "b.wav", "duration": 300.0, "captions": [RAIN], "split": "val"},
    {
        "audio": "c.wav",
        "duration": 1.0,
        "captions": ["other"],
        "description": "BELL_3",
        "labels": ["Church_bell", "Bell"],
        "split": "train",
    },
    {"audio": "d.wav", "duration": 0.9, "captions": ["a short bang"]},
    {"audio": "e.wav", "duration": 301.0, "captions": ["too long"]},
    {"audio": "f.wav", "duration": 9.0, "labels": ["dog"]},
    {"audio": "g.wav", "duration": 9.0, "captions": ["A cat purrs"]},
]
REPLIES = {
    DOG: ["A dog barks", "A dog is barking", "A dog barks"],
    RAIN: ["Heavy rain falls", "Rain recorded with a Tascam", "I'm sorry, I cannot hear rain"],
    "BELL_3 (tags: Church bell, Bell)": ["A church bell rings"] * 3,
    "A cat purrs": ["NONE", "A lion roars", ""],
}


def clean(data, out, *flags):
    report = tool.rewrite(
        tool.parse(
            ["rewrite", "--task", "clean", "--data", str(data), "--out", str(out), *map(str, flags)]
        )
    )
    return report, common.read_manifest([report["manifest"]])


@pytest.fixture
def fake_llm(monkeypatch):
    """A model that gives the k-th question about a description its k-th reply -> what was asked;
    dies before question `die_at`.
    """
    asked, state, counters = [], {"die_at": 99}, {}

    def generate(llm, prompts, max_new_tokens, temperature):
        if len(asked) >= state["die_at"]:
            raise KeyboardInterrupt
        asked.extend((prompt, temperature) for prompt in prompts)
        texts = [
            prompt.rsplit("Description: ", 1)[1].removesuffix("\nCaption:") for prompt in prompts
        ]
        return [REPLIES[text][next(counters.setdefault(text, itertools.count()))] for text in texts]

    monkeypatch.setattr(tool, "generate", generate)
    monkeypatch.setattr(tool, "load_llm", lambda name, device: "loaded")
    return asked, state


# ---- clean ----


def test_descriptions_become_captions(tmp_path, fake_llm, capsys):
    asked, _ = fake_llm
    report, rows = clean(
        manifest(tmp_path / "data", ROWS), tmp_path / "out", "--llm", "some/model", "--versions", 3
    )
    assert [row["captions"] for row in rows] == [
        ["A dog barks", "A dog is barking"],
        ["Heavy rain falls"],
        ["A church bell rings"],
    ]
    assert [row["description"] for row in rows] == [DOG, RAIN, BELL]  # nothing is lost
    assert (
        rows[0]["note"] == 1
        and rows[0]["group"] == "mine"
        and rows[0]["id"] == 7
        and not any("negatives" in row or "synthetic" in row for row in rows)
    )
    assert (
        report["clips"] == 3
        and report["captions"] == 4
        and report["left_out"]
        == {
            "unreadable": 0,
            "not of 1 to 300 s": 2,
            "without a description": 1,
            "without an accepted answer": 1,
        }
    )
    assert [
        (r["reason"], r["answer"]) for r in jsonl(tmp_path / "out/manifest.rejected.jsonl")
    ] == [
        ("recording gear", "Rain recorded with a Tascam"),
        ("refusal", "I'm sorry, I cannot hear rain"),
        ("NONE: no sound is told of", "NONE"),
        ("no word of the description", "A lion roars"),
        ("empty", ""),
    ]
    assert (tmp_path / "out/classes.txt").read_text() == "dog\nbell\n"
    assert len(asked) == 4 * 3 and {temperature for _, temperature in asked} == {0.7}
    for text, caption in tool.CLEAN_EXAMPLES:
        assert f"Description: {text}\nCaption: {caption}\n\n" in asked[0][0]
    printed = capsys.readouterr().out
    assert (
        "3 clips with 4 texts under 'captions'; left out: 2 not of 1 to 300 s, 1 without a "
        "description, 1 without an accepted answer" in printed
    )


def test_one_version_is_greedy_the_paper_has_five_and_lengths_are_free(
    tmp_path, fake_llm, monkeypatch
):
    asked, _ = fake_llm
    monkeypatch.setitem(REPLIES, "a short bang", ["A bang"])
    report, rows = clean(
        manifest(tmp_path / "data", ROWS),
        tmp_path / "out",
        "--llm",
        "m",
        "--versions",
        1,
        "--min-s",
        0.5,
        "--max-s",
        6,
    )
    assert [row["captions"] for row in rows] == [
        ["A dog barks"],
        ["A church bell rings"],
        ["A bang"],
    ]
    assert {temperature for _, temperature in asked} == {0.0} and report["left_out"][
        "not of 0.5 to 6 s"
    ] == 4
    assert tool.TASK_FLAGS["clean"]["versions"] == 5


def test_a_killed_run_asks_for_what_is_missing_and_more_versions_for_those_alone(
    tmp_path, fake_llm
):
    asked, state = fake_llm
    data, out = manifest(tmp_path / "data", ROWS), tmp_path / "out"
    flags = ("--llm", "some/model", "--batch-size", 2)
    state["die_at"] = 4
    with pytest.raises(KeyboardInterrupt):
        clean(data, out, *flags, "--versions", 2)
    cache = out / "manifest.llm.jsonl"
    assert len(jsonl(cache)) == 4 and not (out / "manifest.jsonl").exists()
    with open(cache, "ab") as f:
        f.write(
            '{"model": "some/model", "description": "caf\u00e9'.encode()[:-1]
        )  # cut inside a letter
    state["die_at"] = 99
    clean(data, out, *flags, "--versions", 2)
    assert len(asked) == 8 and len({(r["description"], r["version"]) for r in jsonl(cache)}) == 8
    (out / "manifest.jsonl").unlink()
    clean(data, out, *flags, "--versions", 3)
    assert len(asked) == 12
    (out / "manifest.jsonl").unlink()
    with pytest.raises(
        IndexError
    ):  # another seed is another draw: asked again, and the replies have run out
        clean(data, out, *flags, "--versions", 3, "--seed", 1)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("A dog barks", None),
        (' "A dog is barking loudly." ', None),
        ("A dog barks in a 1950s radio play", None),
        ("  ", "empty"),
        ("...", "empty"),
        ("none.", "NONE: no sound is told of"),
        ("NONE (the dog is not heard)", "NONE: no sound is told of"),
        ("Here is the caption: A dog barks", "preamble"),
        ("As an AI I hear nothing", "refusal"),
        ("I can’t say what the dog does", "refusal"),
        ("A dog barks, see www.dogs", "address"),
        ("A dog barks, mail me@dogs.at", "address"),
        ("dog_bark", "file name"),
        ("A dog in bark.WAV", "file name"),
        ("A dog barks on 12/08/2011", "date"),
        ("A dog barks in 2011", "date"),
        ("A dog barks, recorded with care", "recording gear"),
        ("A dog barks on a Zoom H4n", "recording gear"),
        ("A dog barks in 24-bit", "recording gear"),
        ("A dog barks\nA cat meows", "more than one sentence"),
        ("A dog barks. It stops.", "more than one sentence"),
        ("A dog " + "barks " * 39, "more than 40 words"),
        ("A dog " + "barks " * 38, None),
        ("A lion roars in the park", "no word of the description"),
        ("A car zooms past a barking animal", None),
    ],
)
def test_answers_are_checked(answer, reason):
    text, found = tool.check_caption("Graz_dog_01.wav barked in the yard", answer)
    assert found == reason and text == (None if reason else answer.strip().strip('" '))


def test_the_label_of_the_prompt_and_markdown_are_no_caption():
    for answer in ("Caption: A dog barks", "**A dog barks**", '*Caption:* "A dog barks"'):
        assert tool.check_caption("a dog", answer) == ("A dog barks", None)


def test_our_examples_pass_the_check_and_their_descriptions_do_not():
    assert len(tool.CLEAN_EXAMPLES) == 10
    for text, caption in tool.CLEAN_EXAMPLES:
        expected = (None, "NONE: no sound is told of") if caption == "NONE" else (caption, None)
        assert tool.check_caption(text, caption) == expected
        assert tool.check_caption(text, text)[1], text


def test_examples_from_a_file(tmp_path, fake_llm):
    asked, _ = fake_llm
    file = tmp_path / "examples.jsonl"
    common.write_lines(
        file, [json.dumps({"description": "snow_1.wav,\n my garden", "caption": "Snow falls"})]
    )
    clean(
        manifest(tmp_path / "data", ROWS),
        tmp_path / "out",
        "--llm",
        "m",
        "--versions",
        1,
        "--examples",
        file,
    )
    assert asked[0][0].endswith(
        "\n\nDescription: snow_1.wav, my garden\nCaption: Snow falls\n\nDescription: A cat "
        "purrs\nCaption:"
    )
    assert asked[0][0].count("Description: ") == 2
    for content, message in (
        ("{", "examples.jsonl:1: not valid JSON"),
        ('{"caption": "x"}', "expected an object with 'description' and 'caption'"),
        ('{"caption": "x", "description": ""}', "expected two texts"),
        ("", "no example there"),
        ('{"caption": "{caption}", "description": "x"}', "expected two texts"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            clean(tmp_path / "data", tmp_path / "out2", "--llm", "m", "--examples", file)
    with pytest.raises(FileNotFoundError, match="--examples .*nothing: no such file"):
        clean(
            tmp_path / "data", tmp_path / "out2", "--llm", "m", "--examples", tmp_path / "nothing"
        )
    assert not (tmp_path / "out2").exists()


def test_import_by_description_id_or_file_is_checked_too(tmp_path):
    records = [
        {"description": " Dog 01.wav.  My dog barks in Graz", "caption": "A dog barks"},
        {"id": "7", "caption": "A dog barks loudly"},
        {"id": 7, "caption": "A dog on 1/1/2001"},
        {"audio": "x/b.flac", "caption": RAIN},
        {"audio": "b", "caption": "Heavy  rain"},
        {"description": "A cat purrs", "caption": "A cat purrs"},
        {"description": "A cat purrs", "id": "7", "caption": "no such clip"},
        {"description": BELL, "caption": None},
    ]
    file = tmp_path / "made.jsonl"
    common.write_lines(file, map(json.dumps, records))
    report, rows = clean(manifest(tmp_path / "data", ROWS), tmp_path / "out", "--import", file)
    assert [row["captions"] for row in rows] == [
        ["A dog barks", "A dog barks loudly"],
        ["Heavy rain"],
        ["A cat purrs"],
    ]
    assert report["import"] == {"records": 8, "matched": 7, "unused": 1, "copies": 0, "empty": 1}
    assert {r["reason"] for r in jsonl(tmp_path / "out/manifest.rejected.jsonl")} == {
        "date",
        "recording gear",
    }
    file.write_text('{"caption": "A dog barks"}', encoding="utf-8")
    with pytest.raises(
        ValueError,
        match="made.jsonl:1: does not tell what it belongs to; expected 'description' or 'id' or "
        "'audio'",
    ):
        clean(tmp_path / "data", tmp_path / "out2", "--import", file)
    file.write_text('{"caption": null, "negative": "x", "id": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match="does not tell what it belongs to; expected 'caption'$"):
        tool.rewrite(
            tool.parse(
                [
                    "rewrite",
                    "--task",
                    "negatives",
                    "--data",
                    str(tmp_path / "data"),
                    "--out",
                    str(tmp_path / "out3"),
                    "--overwrite-negatives",
                    "--import",
                    str(file),
                ]
            )
        )


def test_bad_flags_and_inputs_of_clean_are_one_sentence(tmp_path, fake_llm, monkeypatch):
    data = manifest(tmp_path / "data", ROWS)
    for flags, message in (
        ((), "--task clean: no rules can do this; give --llm HF_ID or --import FILE"),
        (("--llm", "m", "--versions", 0), "--versions 0, --temperature 0.7: expected 1 or more"),
        (
            ("--llm", "m", "--temperature", 0),
            "--versions 5, --temperature 0: expected 1 or more, and a temperature above 0",
        ),
        (
            ("--llm", "m", "--min-s", 9, "--max-s", 3),
            "--min-s 9, --max-s 3: expected seconds, the first below the second",
        ),
        (("--llm", "m", "--min-s", 500, "--max-s", 600), "no clip is left .7 not of 500 to 600 s"),
        (
            ("--llm", "m", "--overwrite-negatives"),
            "--overwrite-negatives: --task clean has no such flag",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            clean(data, tmp_path / "out", *flags)
    with pytest.raises(ValueError, match="--min-s: --task negatives has no such flag"):
        tool.rewrite(
            tool.parse(
                [
                    "rewrite",
                    "--task",
                    "negatives",
                    "--data",
                    str(data),
                    "--out",
                    str(tmp_path / "out"),
                    "--min-s",
                    "1",
                ]
            )
        )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(tool, "generate", lambda llm, prompts, *_: [""] * len(prompts))
    with pytest.raises(ValueError, match="not one answer was accepted, nothing is written"):
        clean(data, tmp_path / "out", "--llm", "m")
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_a_real_model_draws_versions_that_the_seed_decides(tmp_path, tiny_llm, monkeypatch):
    whole = tool.generate
    monkeypatch.setattr(
        tool,
        "generate",
        lambda llm, prompts, _, temperature: whole(llm, prompts, 8, temperature),
    )
    monkeypatch.setattr(
        tool, "check_caption", lambda text, answer: (answer, None) if answer else (None, "empty")
    )
    file, data = tmp_path / "one.jsonl", manifest(tmp_path / "data", ROWS[:2])
    file.write_text(
        '{"description": "A dog barks and a car passes", "caption": "A dog barks"}',
        encoding="utf-8",
    )
    flags = ("--llm", tiny_llm, "--device", "cpu", "--examples", file, "--temperature", 1)
    made = [
        [row["captions"] for row in clean(data, tmp_path / name, *flags, *more)[1]]
        for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--versions", 1)))
    ]
    assert made[0] == made[1] != made[2] and all(len(set(captions)) >= 4 for captions in made[0])
    assert all(len(captions) == 1 for captions in made[3])


def test_an_answers_file_that_was_cut_inside_a_batch_gives_the_same_answers(
    tmp_path, tiny_llm, monkeypatch
):
    """A batch draws by all of its questions, so that a part of one must not be asked alone."""
    whole, asked = tool.generate, []

    def short(llm, prompts, _, temperature):
        asked.append(len(prompts))
        return whole(llm, prompts, 8, temperature)

    monkeypatch.setattr(tool, "generate", short)
    args = types.SimpleNamespace(llm=str(tiny_llm), device="cpu", batch_size=4, seed=0)
    texts = [f"a sound number {i}" for i in range(10)]
    given = dict(prompt="Say {caption}", args=args, temperature=1.0)
    first = tool.ask_llm(texts, cache=tmp_path / "whole.jsonl", **given)
    assert asked == [4, 4, 2] and len(set(first.values())) > 5
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[:6]) + "\n")  # one batch and a half
    asked.clear()
    assert tool.ask_llm(texts, cache=tmp_path / "cut.jsonl", **given) == first
    assert asked == [4, 2]


# ---- recaption ----


class Captioner(torch.nn.Module):
    """Says how loud a clip is; a clip all of whose samples are above 0 leaves it speechless."""

    sample_rate = 8000

    def __init__(self):
        super().__init__()
        self.heard, self.seeds, self.die_at = [], [], 99

    def caption(self, waveform, n_samples=None, temperature=0.0, seed=0):
        if len(self.heard) >= self.die_at:
            raise KeyboardInterrupt
        assert (
            waveform.shape == (len(n_samples), int(n_samples.max()))
            and waveform.dtype == torch.float32
        )
        self.seeds.append(seed)
        texts = []
        for clip, n in zip(waveform, n_samples.tolist()):
            level = round(clip[:n].abs().max().item(), 1)
            texts.append(
                ""
                if clip[:n].min() > 0
                else f"a tone of {level}" + " again" * (temperature > 0.5 and seed % 2)
            )
            self.heard.append(level)
        return texts


@pytest.fixture
def captioner(monkeypatch):
    model = Captioner()
    monkeypatch.setattr(evaluation, "load_model", lambda path: model)
    return model


@pytest.fixture
def sounds(tmp_path):
    """Tones of amplitudes 0.1 to 0.6 and 1 to 2 s, stereo at 16 kHz; clips that are broken,
    missing, too short, or not a tone.
    """
    rows, folder = [], tmp_path / "data"
    folder.mkdir()
    for i in range(1, 7):
        t = np.arange(16000 + 2000 * i) / 16000
        sf.write(
            folder / f"{i}.wav", np.stack([np.sin(2 * np.pi * 440 * t) * i / 10] * 2, 1), 16000
        )
        rows.append(
            {
                "audio": f"{i}.wav",
                "split": "train",
                **({"duration": len(t) / 16000, "captions": [f"caption {i}"]} if i < 4 else {}),
            }
        )
    sf.write(folder / "short.wav", np.ones(4000) * 0.5, 8000)
    sf.write(folder / "flat.wav", np.ones(16000) * 0.5, 8000)
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    rows += [
        {"audio": "short.wav"},
        {"audio": "flat.wav"},
        {"audio": "flat.wav", "duration": 2.0, "captions": ["a plateau"]},
        {"audio": "broken.wav"},
        {"audio": "missing.wav", "duration": 3.0, "captions": ["lost"]},
        {"audio": "1.wav", "captions": ["another of 1"], "synthetic": ["old"]},
    ]
    return manifest(folder, rows)


def recaption(data, out, *flags):
    report = tool.recaption(
        tool.parse(
            [
                "recaption",
                "--data",
                str(data),
                "--model",
                "runs/a/best.pt",
                "--out",
                str(out),
                "--workers",
                "0",
                "--device",
                "cpu",
                *map(str, flags),
            ]
        )
    )
    return report, common.read_manifest([report["manifest"]])


def test_clips_are_captioned_by_what_is_heard(tmp_path, sounds, captioner, capsys):
    report, rows = recaption(sounds, tmp_path / "out", "--batch-size", 4)
    assert [
        (row["audio"].rsplit("/", 1)[1], row.get("captions"), row["synthetic"]) for row in rows
    ] == [
        *(
            (f"{i}.wav", [f"caption {i}"] if i < 4 else None, [f"a tone of {i / 10}"])
            for i in range(1, 7)
        ),
        ("flat.wav", ["a plateau"], []),
        ("1.wav", ["another of 1"], ["a tone of 0.1"]),
    ]
    assert report["left_out"] == {
        "unreadable": 2,
        "not of 1 to 300 s": 1,
        "without an accepted answer": 1,
    }
    assert report["clips"] == 8 and report["synthetic"] == 7
    rejected = jsonl(tmp_path / "out/manifest.rejected.jsonl")
    assert [(r["reason"], r["audio"], r["answer"]) for r in rejected] == [
        ("empty", str(sounds / "flat.wav"), "")
    ]
    assert all(row["duration"] >= 1 for row in rows) and (tmp_path / "out/classes.txt").is_file()
    assert (
        len(captioner.heard) == 7 and len(set(captioner.seeds)) == 2
    )  # seven files, two batches; the file told twice is heard once
    printed = capsys.readouterr().out
    assert (
        "missing.wav: file not found" in printed
        and "8 clips with 7 texts under 'synthetic'" in printed
    )


def test_a_killed_captioning_goes_on_where_it_was(tmp_path, sounds, captioner, monkeypatch):
    captioner.die_at = 4
    with pytest.raises(KeyboardInterrupt):
        recaption(sounds, tmp_path / "out", "--batch-size", 2)
    assert (
        sorted(captioner.heard) == [0.1, 0.2, 0.3, 0.4]
        and not (tmp_path / "out/manifest.jsonl").exists()
    )
    captioner.die_at = 99
    rows = recaption(sounds, tmp_path / "out", "--batch-size", 2)[1]
    assert sorted(captioner.heard) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.6] and rows[0][
        "synthetic"
    ] == ["a tone of 0.1"]
    seeds, whole = captioner.seeds[:], Captioner()
    monkeypatch.setattr(evaluation, "load_model", lambda path: whole)
    recaption(sounds, tmp_path / "whole", "--batch-size", 2)
    assert whole.seeds == seeds  # the draws are those of an uninterrupted run
    assert recaption(sounds, tmp_path / "whole/b.jsonl", "--temperature", 0.5)[0]["synthetic"] == 7
    assert len(whole.heard) == 14


def test_versions_are_different_draws(tmp_path, sounds, captioner):
    report, rows = recaption(sounds, tmp_path / "out", "--versions", 8, "--temperature", 1)
    assert rows[1]["synthetic"] and set(rows[1]["synthetic"]) == {
        "a tone of 0.2",
        "a tone of 0.2 again",
    }
    assert len(set(captioner.seeds)) == 8 and report["synthetic"] == 14


def test_bad_inputs_of_recaption_are_one_sentence(tmp_path, sounds, captioner, monkeypatch):
    with pytest.raises(
        ValueError,
        match="--versions 2, --temperature 0: expected 1 or more, and a temperature above 0",
    ):
        recaption(sounds, tmp_path / "out", "--versions", 2, "--temperature", 0)
    with pytest.raises(ValueError, match="--batch-size 0: expected 1 or more"):
        recaption(sounds, tmp_path / "out", "--batch-size", 0)
    with pytest.raises(ValueError, match="--seed -1: expected 0 or more"):
        recaption(sounds, tmp_path / "out", "--seed", -1)
    with pytest.raises(FileExistsError, match="already there; choose another name or remove it"):
        recaption(sounds, sounds)
    with pytest.raises(
        ValueError,
        match="not one answer was accepted, nothing is written .left out: 1 unreadable, 11 not of "
        "200 to 300 s",
    ):
        recaption(sounds, tmp_path / "none", "--min-s", 200)
    monkeypatch.setattr(evaluation, "load_model", lambda path: torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError,
        match="--model runs/a/best.pt: a model of .*linear.py, which writes no captions; give a "
        "checkpoint of a script",
    ):
        recaption(sounds, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="runs/a/best.pt: no such weight file"):
        recaption(sounds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_synthetic_captions_are_checked_as_captions_are(tmp_path):
    for bad, message in (
        ([" "], "synthetic caption 1 is empty"),
        ("text", "'synthetic' has the wrong type str"),
    ):
        with pytest.raises(ValueError, match=message):
            common.read_manifest(
                [str(manifest(tmp_path / "bad", [{"audio": "a.wav", "synthetic": bad}]))]
            )
