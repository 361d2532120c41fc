"""eval.py's captioning and gap protocols: the metrics by hand and against pycocoevalcap, the
protocols on a made-up model.
"""

import csv
import json
import time

import numpy as np
import pytest
import soundfile as sf
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import common
import eval as evaluate
from conftest import ROOT
from tools import downstream

CAPTIONS = ROOT.parent / "shared" / "formats" / "captions"
real = pytest.mark.skipif(
    not CAPTIONS.is_dir(),
    reason="the complete AudioCaps and Clotho captions (../shared/formats) are not here",
)
RATE = 8000


def toolkit(said, references):
    """pycocoevalcap on the same words: [BLEU-1..4, ROUGE-L, CIDEr-D] of the set, and each clip's
    ROUGE-L and CIDEr-D.
    """
    heard = {i: [" ".join(words)] for i, words in enumerate(said)}
    truth = {i: [" ".join(words) for words in of] for i, of in enumerate(references)}
    (rouge, rouges), (cider, ciders) = (
        Rouge().compute_score(truth, heard),
        Cider().compute_score(truth, heard),
    )
    return (
        np.array([*Bleu(4).compute_score(truth, heard, verbose=0)[0], rouge, cider]),
        rouges,
        ciders,
    )


def ours(said, references):
    evidence = downstream.caption_evidence(said, references)
    return (
        np.array([*downstream.bleu(evidence[:, :10]), *evidence[:, 10:].mean(0)]),
        evidence[:, 10],
        evidence[:, 11],
    )


def agree(said, references):
    for mine, theirs in zip(ours(said, references), toolkit(said, references)):
        assert np.abs(mine - theirs).max() < 1e-9
    return ours(said, references)[0]


def real_captions(name):
    """Each clip's captions as lists of words."""
    if name == "clotho":
        with open(
            CAPTIONS / "clotho_v2.1/clotho_captions_evaluation.csv", encoding="utf-8", newline=""
        ) as file:
            clips = [[row[f"caption_{k}"] for k in range(1, 6)] for row in csv.DictReader(file)]
    else:
        clips = {}
        with open(CAPTIONS / "audiocaps_v1/test.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row["caption"])
        clips = list(clips.values())
    return [[downstream.caption_words(c) for c in of] for of in clips]


@real
@pytest.mark.parametrize("name, clips", [("clotho", 1045), ("audiocaps", 975)])
def test_scores_of_real_captions_equal_the_coco_toolkit(name, clips):
    captions = real_captions(name)
    assert len(captions) == clips
    people = agree(
        [of[0] for of in captions], [of[1:] for of in captions]
    )  # one person against the four others
    assert people[0] > 0.4 and people[5] > 0.4
    captions = captions[:200]
    agree(
        [of[0] for of in captions[1:] + captions[:1]], captions
    )  # another clip's caption: few long n-grams
    agree(
        [of[0][:4] for of in captions], [of[1 : 2 + i % 4] for i, of in enumerate(captions)]
    )  # too short; 1 to 4 references
    agree([of[0] * 2 for of in captions], captions)  # too long, every word twice


def test_scores_of_odd_captions_equal_the_coco_toolkit():
    def words(*texts):
        return [text.split() for text in texts]

    references = [
        words("a dog barks", "the dog is barking loudly"),
        words("rain"),
        words("a a a b", "b a"),
        words("wind blows"),
    ]
    agree(
        words("a dog barks", "rain", "a a a a a", ""), references
    )  # one word, repeated words, nothing said
    agree(words("x", "y z", "q", "w w w w w"), references)  # nothing right
    agree(words("the dog"), references[:1])  # a single clip: every idf is 0


def test_bleu_by_hand():
    """`the the the` clips to 2; the closest reference length of 3 to 2 and 4 is the shorter one."""
    counts = downstream.bleu_counts(
        [["the", "the", "the"]], [[["the", "cat"], ["the", "the", "cat", "sat"]]]
    )
    assert counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3, 2]]
    assert downstream.bleu(counts)[:2] == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5], abs=1e-8)
    # two clips: counts add up before they are divided, and 4 words of 6 cost exp(1 - 6 / 4)
    counts = downstream.bleu_counts(
        [["a"], ["a", "b", "c"]], [[["a", "b"]], [["a", "x", "c", "d"]]]
    )
    assert downstream.bleu(counts)[0] == pytest.approx(3 / 4 * np.exp(1 - 6 / 4), abs=1e-8)


def test_rouge_l_by_hand():
    assert downstream.longest_common_subsequence("a b c d".split(), "b x d a".split()) == 2
    # precision 2 / 4 from the first reference, recall 1 / 1 from the second, beta 1.2
    value = downstream.rouge_l([["a", "b", "c", "d"]], [[["b", "x", "d", "x", "x"], ["c"]]])
    assert value == pytest.approx([(1 + 1.44) * 0.5 * 1 / (1 + 1.44 * 0.5)])


def test_cider_d_by_hand():
    """Two clips, one word in common to both (idf 0): of clip 1 only `dog` counts, once though said
    twice.
    """
    found = downstream.cider_d([["a", "dog", "dog"], ["x"]], [[["a", "dog"]], [["a", "cat"]]])
    # n = 1: both vectors lie along `dog`, said 2 idf clipped to 1 idf: idf^2 / (2 idf x idf) = 1 /
    # 2; n = 2: of the bigrams `a dog`, `dog dog` (norm sqrt 2) one is right: 1 / sqrt 2; n = 3, 4:
    # none. One word too long: exp(-1 / 72).
    assert found == pytest.approx([10 * (0.5 + 2**-0.5) / 4 * np.exp(-1 / 72), 0.0])


@pytest.mark.parametrize(
    "text, words",
    [
        ("A dog barks, then -- rain.", "a dog barks then rain"),
        ("A man's walkie-talkie (old) beeps!", "a man's walkie-talkie old beeps"),
        ("'Quoted' at 3:30 p.m.; caf\u00e9", "quoted at 3 30 p m caf\u00e9"),
        ("...", ""),
    ],
)
def test_words_of_a_caption(text, words):
    assert downstream.caption_words(text) == words.split()


class Talker:
    """Says what the pitch of a sound is; its embeddings are fixed by it as well."""

    window_s, sample_rate, frame_s, pairwise = 1.0, RATE, 0.25, False
    clean_caption = staticmethod(str.lower)
    phrases = {200: "A low hum.", 400: "a dog barks", 800: "a high whistle blows"}

    def __init__(self):
        self.calls = []

    def to(self, device):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def pitch(self, waveform, n_samples):
        spectra = [
            torch.fft.rfft(w[:n]).abs().argmax() * RATE / n
            for w, n in zip(waveform, n_samples.tolist())
        ]
        return [min(self.phrases, key=lambda hz: abs(hz - float(s))) for s in spectra]

    def caption(self, waveform, n_samples=None, temperature=0.0, seed=0):
        self.calls.append((len(waveform), temperature, seed))
        return [self.phrases[hz] for hz in self.pitch(waveform, n_samples)]

    def embed_audio(self, waveform, n_samples=None):
        return torch.eye(4)[
            [list(self.phrases).index(hz) for hz in self.pitch(waveform, n_samples)]
        ]

    def embed_text(self, texts):
        return torch.tensor(
            [[0.6, 0.0, 0.0, 0.8] if "hum" in t else [0.0, 0.6, 0.0, 0.8] for t in texts]
        )


CLIPS = [
    (200, 1.0, ["a low hum", "a deep hum"]),
    (400, 2.5, ["a dog barks", "A dog barks!"]),
    (800, 0.5, ["a whistle blows", "the wind"]),
    (200, 1.2, ["a dog barks", "humming"]),
]


@pytest.fixture
def talker(monkeypatch, tmp_path):
    """The model, and a function that runs tools.downstream on the four clips."""
    model, rows = Talker(), []
    for i, (hz, seconds, captions) in enumerate(CLIPS):
        time_s = np.arange(int(seconds * RATE)) / RATE
        sf.write(tmp_path / f"{i}.wav", 0.5 * np.sin(2 * np.pi * hz * time_s), RATE)
        rows.append({"audio": f"{i}.wav", "duration": seconds, "captions": captions})
    common.write_lines(tmp_path / "manifest.jsonl", [json.dumps(row) for row in rows])
    monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: model)
    monkeypatch.setattr(evaluate, "find_model", lambda path: None)
    return model, lambda *flags: downstream.main(
        downstream.parse(["talker", "--data", str(tmp_path), "--device", "cpu", *map(str, flags)])
    )


def test_captioning_from_files_to_a_printed_score(talker, capsys, tmp_path):
    model, run = talker
    (r,) = run("--protocol", "captioning", "--bootstrap", 20, "--json", tmp_path / "s.json")
    said = ["a low hum", "a dog barks", "a high whistle blows", "a low hum"]
    references = [[downstream.caption_words(c) for c in captions] for *_, captions in CLIPS]
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert [r["scores"][name]["value"] for name in names] == pytest.approx(
        toolkit([s.split() for s in said], references)[0], abs=1e-9
    )
    assert [r["chance"][name] for name in names] == pytest.approx(
        toolkit([["a", "dog", "barks"]] * 4, references)[0], abs=1e-9
    )
    assert r["n_clips"] == 4 and r["n_captions"] == 8
    assert r["details"]["captions"][0] == {
        "clip": str(tmp_path / "0.wav"),
        "said": "A low hum.",
        "references": CLIPS[0][2],
        "CIDEr-D": pytest.approx(toolkit([s.split() for s in said], references)[2][0]),
    }
    assert all(s["low"] <= s["value"] <= s["high"] for s in r["scores"].values()) and json.loads(
        (tmp_path / "s.json").read_text()
    ) == [r]
    printed = capsys.readouterr().out
    for part in (
        "captioning: 4 clips, 8 captions",
        "crop: whole files",
        "temperature: 0 (greedy)",
        "METEOR, SPICE",
        "Java",
        "lower case, punctuation removed",
        "always saying 'a dog barks', the most frequent of the references (3 times)",
    ):
        assert part in printed, part
    for flags in (("--batch-size", 1), ("--workers", 1)):
        assert (
            run("--protocol", "captioning", "--bootstrap", 0, *flags)[0]["scores"]["CIDEr-D"][
                "value"
            ]
            == r["scores"]["CIDEr-D"]["value"]
        )


def test_equally_frequent_references_the_first_in_the_alphabet_is_the_blind_one(
    talker, capsys, tmp_path
):
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    common.write_lines(
        tmp_path / "manifest.jsonl",
        [
            json.dumps({**row, "captions": [text]})
            for row, text in zip(rows, ("rain", "b", "b", "Rain"))
        ],
    )
    talker[1]("--protocol", "captioning", "--bootstrap", 0)
    assert (
        "always saying 'b', the most frequent of the references (2 times)"
        in capsys.readouterr().out
    )


def test_at_a_temperature_every_clip_is_drawn_alone_by_its_name(talker, capsys):
    model, run = talker
    run("--protocol", "captioning", "--bootstrap", 0)
    assert sorted(size for size, *_ in model.calls) == [4] and model.calls[0][1] == 0.0
    model.calls.clear()
    run("--protocol", "captioning", "--bootstrap", 0, "--temperature", 0.1)
    assert [(size, t) for size, t, _ in model.calls] == [(1, 0.1)] * 4 and len(
        {seed for *_, seed in model.calls}
    ) == 4
    seeds = {seed for *_, seed in model.calls}
    model.calls.clear()
    run("--protocol", "captioning", "--bootstrap", 0, "--temperature", 0.1, "--batch-size", 2)
    assert {
        seed for *_, seed in model.calls
    } == seeds and "temperature: 0.1\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--temperature -1.0: expected 0 .greedy. or more"):
        run("--protocol", "captioning", "--temperature", -1)


def test_a_model_without_captions_is_named(talker, monkeypatch):
    monkeypatch.delattr(Talker, "caption")
    with pytest.raises(
        ValueError, match="--protocol captioning: talker is a model that writes no captions"
    ) as error:
        talker[1]("--protocol", "captioning")
    assert "\n" not in str(error.value)


def test_the_bootstrap_of_captions_is_fast(monkeypatch):
    """1,000 clips x 5 references x 200 draws; captions meet their references once."""
    rng = np.random.default_rng(0)

    def draw():
        return [str(w) for w in rng.integers(0, 300, 10)]

    said, references = (
        [draw() for _ in range(1000)],
        [[draw() for _ in range(5)] for _ in range(1000)],
    )
    evidence = downstream.caption_evidence(said, references)
    start = time.perf_counter()
    for _ in range(200):
        part = evidence[rng.integers(0, 1000, 1000)]
        downstream.bleu(part[:, :10]), part[:, 10:].mean(0)
    assert time.perf_counter() - start < 2


# The gap between the modalities


def test_gap_by_hand(talker, monkeypatch):
    """Pairs: axis 1 with (.6, 0, 0, .8) twice, axis 2 with (0, .6, 0, .8) twice, axis 3 with that
    twice, axis 1 with each once.
    """
    (r,) = talker[1]("--protocol", "gap", "--bootstrap", 20)
    audio = np.array([4, 2, 2, 0]) / 8
    text = np.array([0.6 * 3, 0.6 * 5, 0, 0.8 * 8]) / 8
    assert r["scores"]["gap"]["value"] == pytest.approx(np.linalg.norm(audio - text))
    assert (
        r["n_clips"] == 4
        and r["n_captions"] == 8
        and r["scores"]["gap"]["low"] < r["scores"]["gap"]["value"] < r["scores"]["gap"]["high"]
    )
    assert (
        0 < r["chance"]["gap"] < 0.5
        and talker[1]("--protocol", "gap", "--bootstrap", 0)[0]["chance"] == r["chance"]
    )
    monkeypatch.setattr(
        Talker, "embed_text", lambda self, texts: torch.eye(4)[[3] * len(texts)]
    )  # far from every clip
    (r,) = talker[1]("--protocol", "gap", "--bootstrap", 0)
    assert (
        r["scores"]["gap"]["value"] == pytest.approx((0.5**2 + 0.25**2 * 2 + 1) ** 0.5)
        and r["chance"]["gap"] < 0.6
    )


def test_a_bootstrap_draw_of_the_gap_is_the_gap_of_the_drawn_clips():
    class Model:
        clean_caption = staticmethod(lambda text: text)
        embed_text = staticmethod(
            lambda texts: torch.nn.functional.one_hot(
                torch.tensor([int(t) for t in texts]), 5
            ).float()
        )

    class Args:
        bootstrap, crop, split, window_s, checkpoint, data, crop_rule, fold = (
            10,
            "all",
            "test",
            10.0,
            "x",
            ["y"],
            "",
            None,
        )

    rng = np.random.default_rng(0)
    audio = np.linalg.qr(rng.normal(size=(5, 5)))[0].astype(np.float32)
    rows = [
        {"where": "x", "captions": [str(k) for k in rng.integers(0, 5, 1 + i)]} for i in range(5)
    ]
    draws = downstream.gap(Model, {"rows": rows, "audio_embeds": audio}, [], Args)["draws"]
    rng = np.random.default_rng(0)
    for draw in draws:
        chosen = rng.integers(0, 5, 5)
        pairs = [(audio[i], np.eye(5)[int(c)]) for i in chosen for c in rows[i]["captions"]]
        assert draw["gap"] == pytest.approx(
            np.linalg.norm(np.mean([a - t for a, t in pairs], 0)), abs=1e-6
        )
