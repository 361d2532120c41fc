"""tools.downstream: protocols that train on frozen features, add noise, or look at pictures, on
made-up models whose answers are known.
"""

import itertools
import json
import types

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import common
import eval as evaluate
from tools import downstream

RATE = 8000


class Reader:
    """Reads its tokens off a clip's first samples: sample k = c / 100 is token c % 4 in slot k,
    marked from c = 4 on.
    """

    window_s, sample_rate, pairwise, patch_s = 0.5, RATE, False, 0.1
    clean_caption = staticmethod(str.lower)

    def __init__(self, slots, slot_shown=False):
        self.slots, self.slot_shown = slots, slot_shown

    def to(self, device):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def token_embeds(self, waveform, n_samples=None):
        codes = (waveform[:, : self.slots] * 100).round().long()
        content = torch.nn.functional.one_hot(codes % 4, 4).float()  # (B, slots, 4)
        if self.slot_shown:
            return torch.einsum("blc,lk->blkc", content, torch.eye(self.slots)).flatten(2)
        return torch.cat(
            [content, (codes >= 4).float()[..., None], torch.ones(*codes.shape, 3)], -1
        )

    def embed_audio(self, waveform, n_samples=None):
        return torch.nn.functional.normalize(self.token_embeds(waveform).mean(1), dim=-1)

    def embed_text(self, texts):
        return torch.nn.functional.normalize(
            torch.tensor([[len(t), 1.0, t.count("a"), 0, 0, 0, 0, 0] for t in texts]), dim=-1
        )


@pytest.fixture
def run(monkeypatch):
    """Runs tools.downstream, or eval.py, with a model on a manifest."""

    def call(model, data, *flags):
        monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: model)
        monkeypatch.setattr(evaluate, "find_model", lambda path: None)
        tool = evaluate if "tagging" in flags else downstream
        return tool.main(
            tool.parse(
                [
                    "stub",
                    "--data",
                    str(data),
                    "--device",
                    "cpu",
                    "--bootstrap",
                    "0",
                    *map(str, flags),
                ]
            )
        )

    return call


def write_clips(folder, clips):
    """clips: (codes, rest of the row) -> manifest. The codes are the first samples, quiet sound
    follows.
    """
    folder.mkdir(exist_ok=True)
    for i, (codes, row) in enumerate(clips):
        samples = 0.01 * np.sin(np.arange(2000) / 5 + i)
        samples[: len(codes)] = np.array(codes) / 100
        sf.write(folder / f"{i}.wav", samples, RATE, subtype="FLOAT")
        row.setdefault("audio", f"{i}.wav")
    common.write_lines(folder / "manifest.jsonl", [json.dumps(row) for _, row in clips])
    return folder


NAMES = ["bell", "dog", "hum", "rain"]


def marked_clips(rng, counts):
    """Every clip holds the four contents once, in any order; its class is the marked one."""
    for split, count in counts.items():
        for i in range(count):
            order = rng.permutation(4)
            yield [c + 4 * (c == i % 4) for c in order], {"labels": [NAMES[i % 4]], "split": split}


# Probes


def test_a_linear_probe_separates_what_is_separable_and_is_as_right_as_logistic_regression():
    rng = np.random.default_rng(0)
    for spread, least in ((0.15, 1.0), (0.7, 0.7)):
        targets = np.arange(900) % 3
        inputs = (np.eye(3, 16)[targets] + spread * rng.normal(size=(900, 16))).astype(np.float32)
        parts = [(inputs[a:b], targets[a:b]) for a, b in ((0, 400), (400, 600), (600, 900))]

        def score_of(logits):
            return (
                (logits.argmax(1) == parts[1][1]).mean(),
                -downstream.probe_loss(logits, parts[1][1]),
            )

        ours = (
            downstream.train_probe(
                parts[0], parts[1], 3, "x", score_of=score_of, **downstream.PROBES["linear"][1]
            )(parts[2][0]).argmax(1)
            == parts[2][1]
        ).mean()
        theirs = LogisticRegression().fit(*parts[0]).score(*parts[2])
        assert ours >= least and abs(ours - theirs) <= (0 if least == 1 else 0.02), (ours, theirs)


def test_the_decoder_probe_finds_a_marked_token_that_the_mean_does_not_show(
    tmp_path, run, monkeypatch, capsys
):
    monkeypatch.setitem(
        downstream.PROBES,
        "decoder",
        ("tokens", downstream.PROBES["decoder"][1] | dict(lr=1e-2, epochs=40)),
    )
    data = write_clips(
        tmp_path / "d",
        list(marked_clips(np.random.default_rng(0), {"train": 256, "val": 64, "test": 62})),
    )
    (r,) = run(Reader(4), data, "--protocol", "probe")
    assert (
        r["scores"]["decoder_accuracy"]["value"] == 1.0
        and r["scores"]["linear_accuracy"]["value"] <= 0.5
    )
    assert r["chance"] == {
        "linear_accuracy": pytest.approx(16 / 62),
        "decoder_accuracy": pytest.approx(16 / 62),
    }  # class 0 is the first commonest
    assert r["n_clips"] == 62 and r["n_classes"] == 4
    printed = capsys.readouterr().out
    assert (
        "test 62, train 256, val 64" in printed
        and "the epoch chosen on val" in printed
        and "AdamW 0.01, batch 64" in printed
    )
    again = run(Reader(4), data, "--protocol", "probe", "--batch-size", 7)[0]["scores"]
    assert again == r["scores"]


def planted(monkeypatch, known):
    """train_probe that is right for the clips of the first `known` classes only, and says what it
    was given.
    """
    seen = []

    def probe(train, val, n_classes, desc, **options):
        seen.append((desc, train[1].tolist(), val[1].tolist()))
        return lambda inputs: (
            np.where(np.arange(n_classes) < known(desc), inputs[:, :n_classes], -1)
            + np.arange(n_classes) * 1e-6
        )

    monkeypatch.setattr(downstream, "train_probe", probe)
    return seen


class Counter(Reader):
    """The clip embedding is one-hot in the class; there are no tokens."""

    token_embeds = property()

    def embed_audio(self, waveform, n_samples=None):
        return torch.nn.functional.one_hot((waveform[:, 0] * 100).round().long(), 8).float()


def test_folds_take_turns_and_count_alike(tmp_path, run, monkeypatch, capsys):
    seen = planted(monkeypatch, lambda desc: {"1": 4, "2": 2, "10": 1}[desc.split()[-1]])
    clips = [
        ([i % 4], {"labels": [NAMES[i % 4]], "fold": fold})
        for fold, n in ((1, 4), (2, 8), (10, 16))
        for i in range(n)
    ]
    clips.append(([0], {"labels": [], "fold": 1}))
    (r,) = run(Counter(1), write_clips(tmp_path / "d", clips), "--protocol", "probe")
    assert list(r["scores"]) == ["linear_accuracy"] and r["scores"]["linear_accuracy"][
        "value"
    ] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    assert r["details"]["linear_folds"] == {"1": 1.0, "10": 0.25, "2": 0.5} and r["n_clips"] == 28
    assert [(d, len(t), len(v)) for d, t, v in seen] == [
        ("linear probe, 1", 8, 16),
        ("linear probe, 10", 4, 8),
        ("linear probe, 2", 16, 4),
    ]
    printed = capsys.readouterr().out
    assert "3 folds, each tested once" in printed and "left_out: 1 clips without a label" in printed
    with pytest.raises(ValueError, match="rows of 2 fold.s. and none of split train"):
        run(
            Counter(1),
            write_clips(tmp_path / "d", [c for c in clips if c[1]["fold"] < 3]),
            "--protocol",
            "probe",
        )


def test_several_labels_are_scored_by_mean_average_precision(tmp_path, run, monkeypatch):
    rng = np.random.default_rng(0)
    clips = [
        ([i % 8], {"labels": [c for c in NAMES if rng.random() < 0.4], "split": split})
        for split in ("train", "test")
        for i in range(30)
    ]
    given = rng.normal(size=(30, 4)).round(1)
    monkeypatch.setattr(
        downstream, "train_probe", lambda train, val, *rest, **options: lambda inputs: given
    )
    (r,) = run(Counter(1), write_clips(tmp_path / "d", clips), "--protocol", "probe")
    truth = np.array([[c in row["labels"] for c in NAMES] for _, row in clips[30:]])
    assert r["scores"]["linear_mAP"]["value"] == pytest.approx(
        average_precision_score(truth, given), abs=1e-6
    )
    assert r["chance"]["linear_mAP"] == pytest.approx(common.chance_of_mean_ap(truth), abs=1e-6)
    assert r["n_clips"] == 30
    assert "no split val" in r["settings"]["turns"] and set(r["details"]["linear_AP"]) == set(NAMES)


def test_what_a_probe_lacks_is_one_sentence(tmp_path, run):
    data = write_clips(tmp_path / "d", list(marked_clips(np.random.default_rng(0), {"test": 4})))
    with pytest.raises(
        ValueError, match="probe trains a classifier: it needs rows of split train with 'labels'"
    ):
        run(Reader(4), data, "--protocol", "probe")
    data = write_clips(tmp_path / "d", list(marked_clips(np.random.default_rng(0), {"train": 4})))
    with pytest.raises(
        ValueError, match="and another split to score"
    ):  # would be scored on what it was trained on
        run(Reader(4), data, "--protocol", "probe")


# Noise


class Recorder(Counter):
    """Keeps what it hears, by the length of the clip; the class is the loudest of eight samples."""

    def __init__(self):
        self.heard = {}

    def embed_audio(self, waveform, n_samples):
        for w, n in zip(waveform, n_samples.tolist()):
            self.heard.setdefault(n, []).append(w.clone())
        return torch.nn.functional.one_hot(waveform[:, :4].argmax(1), 4).float()

    def embed_text(self, texts):
        return torch.eye(4)[[NAMES.index(t) for t in texts]]


def noisy_clips(folder, order=1):
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(8):
        n = 4000 + 500 * i
        x = (0.02 + 0.02 * i) * np.sin(np.arange(n) / 7)
        x[:4] = np.eye(4)[i % 4] * 0.05
        sf.write(folder / f"{i}.wav", x, RATE, subtype="FLOAT")
        rows.append({"audio": f"{i}.wav", "labels": [NAMES[i % 4]], "duration": n / RATE})
    common.write_lines(folder / "manifest.jsonl", [json.dumps(row) for row in rows[::order]])
    return folder


def test_noise_is_as_loud_as_said_and_belongs_to_the_clip(tmp_path, run, capsys):
    model = Recorder()
    (r,) = run(model, noisy_clips(tmp_path / "d"), "--protocol", "noise")
    levels = list(downstream.NOISE)
    assert (
        list(r["scores"])
        == [f"accuracy_{name}" for name in levels]
        == [
            "accuracy_clean",
            "accuracy_std0.1",
            "accuracy_snr20",
            "accuracy_snr15",
            "accuracy_snr10",
            "accuracy_snr5",
            "accuracy_snr0",
        ]
    )
    for n, heard in model.heard.items():
        clean = heard[0][:n]
        added = {name: x[:n] - clean for name, x in zip(levels, heard)}
        assert all((x[n:] == 0).all() for x in heard)  # padding stays silent
        assert (
            float(added["std0.1"].std()) == pytest.approx(0.1, rel=0.05)
            and abs(float(added["std0.1"].mean())) < 0.01
        )
        for db in (20, 15, 10, 5, 0):
            snr = 10 * torch.log10(clean.square().mean() / added[f"snr{db}"].square().mean())
            assert float(snr) == pytest.approx(db, abs=0.4)
            assert torch.allclose(
                added[f"snr{db}"] / added[f"snr{db}"].std(),
                added["std0.1"] / added["std0.1"].std(),
                atol=1e-3,
            )  # one draw
    by_hand = {
        name: np.mean(
            [
                int(heard[k][:4].argmax()) == (n - 4000) // 500 % 4
                for n, heard in model.heard.items()
            ]
        )
        for k, name in enumerate(levels)
    }
    assert {name: r["scores"][f"accuracy_{name}"]["value"] for name in levels} == pytest.approx(
        by_hand
    )
    assert by_hand["clean"] == 1.0 > by_hand["snr0"] and r["chance"]["accuracy_snr5"] == 0.25
    printed = capsys.readouterr().out
    assert (
        "noise: 8 clips, 4 classes" in printed
        and "prompt: '{}'" in printed
        and "crop: zero-padded" in printed
    )
    other = Recorder()  # other batches, another order, the same noise
    run(other, noisy_clips(tmp_path / "d", order=-1), "--protocol", "noise", "--batch-size", 1)
    assert all(
        torch.equal(a[:n], b[:n])
        for n in model.heard
        for a, b in zip(model.heard[n], other.heard[n])
    )
    assert not torch.equal(
        model.heard[4000][1][4:3000] - model.heard[4000][0][4:3000],
        model.heard[4500][1][4:3000] - model.heard[4500][0][4:3000],
    )


def test_noise_of_clips_with_several_labels_is_scored_by_mean_average_precision(tmp_path, run):
    data = noisy_clips(tmp_path / "d")
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    rows[0]["labels"].append("rain")
    common.write_lines(data / "manifest.jsonl", [json.dumps(row) for row in rows])
    model = Recorder()
    tagged = run(model, data, "--protocol", "tagging")[0]["scores"]["mAP"]
    (r,) = run(model, data, "--protocol", "noise")
    assert (
        r["scores"]["mAP_clean"]["value"] == pytest.approx(tagged["value"])
        and "mAP_snr20" in r["scores"]
    )
    (one,) = run(model, data, "--protocol", "noise", "--noise-levels", "snr20")
    assert one["scores"] == {"mAP_snr20": r["scores"]["mAP_snr20"]}


# Pictures


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of a few dimensions, saved as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=dict(small, image_size=16, patch_size=8),
        text_config=dict(small, vocab_size=20),
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    for parameter in model.vision_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(
        folder
    )
    return folder, model


def test_image_retrieval_equals_transformers_and_ranks_counted_one_by_one(
    tmp_path, run, clip_folder, capsys
):
    from PIL import Image

    rng, (folder, clip), clips = np.random.default_rng(0), clip_folder, []
    (tmp_path / "d").mkdir()
    for i in range(23):
        mode = ("RGB", "L", "RGBA")[i % 3]
        pixels = rng.integers(
            0, 256, (20 + i, 30, {"RGB": 3, "L": 1, "RGBA": 4}[mode]), dtype=np.uint8
        ).squeeze()
        Image.fromarray(pixels).save(tmp_path / f"d/{i}.png")
        clips.append(([i % 8], {"image": f"{i}.png"}))
    (tmp_path / "d/21.png").write_bytes(b"no picture")
    del clips[22][1]["image"]

    class Ear(Counter):
        def embed_audio(self, waveform, n_samples=None):
            return torch.nn.functional.normalize(
                torch.sin(waveform[:, :8] * 900 + torch.arange(8)), dim=-1
            )

    data, flags = write_clips(tmp_path / "d", clips), ("--protocol", "image", "--max-bad", 0.1)
    (r,) = run(Ear(1), data, *flags, "--image-model", folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        pictures = torch.cat(
            [
                clip.visual_projection(
                    clip.vision_model(
                        **processor(
                            images=[Image.open(tmp_path / f"d/{i}.png").convert("RGB")],
                            return_tensors="pt",
                        )
                    ).pooler_output
                )
                for i in range(21)
            ]
        )
    pictures = torch.nn.functional.normalize(pictures, dim=-1).numpy()
    waveforms = np.stack(
        [sf.read(tmp_path / f"d/{i}.wav", dtype="float32")[0][:8] for i in range(21)]
    )
    sim = Ear(1).embed_audio(torch.from_numpy(waveforms)).numpy() @ pictures.T
    for way, table in (("a2i", sim), ("i2a", sim.T)):
        ranks = np.array(
            [sum(other >= row[i] - 1e-7 for other in row) for i, row in enumerate(table)]
        )
        for name, value in {
            "MRR": (1 / ranks).mean(),
            "R@1": (ranks <= 1).mean(),
            "R@5": (ranks <= 5).mean(),
            "R@10": (ranks <= 10).mean(),
        }.items():
            assert r["scores"][f"{way}_{name}"]["value"] == pytest.approx(value), (way, name)
    assert (
        r["n_clips"] == 21
        and len(r["scores"]) == 8
        and r["chance"]["a2i_R@5"] == pytest.approx(5 / 21) == r["chance"]["i2a_R@5"]
    )
    assert r["chance"]["a2i_MRR"] == pytest.approx((1 / np.arange(1, 22)).mean())
    printed = capsys.readouterr().out
    assert (
        "21.png: cannot be read as an image" in printed
        and "1 clips without a picture, 1 whose picture could not be read" in printed
    )
    with pytest.raises(ValueError, match="image needs --image-model"):
        run(Ear(1), data, *flags)
    with pytest.raises(
        ValueError, match="its space has 8 dimensions, the model's audio embeddings 4"
    ):
        run(Recorder(), data, *flags, "--image-model", folder)
    with pytest.raises(ValueError, match="--image-model .*nowhere: not a transformers CLIP folder"):
        run(Ear(1), data, *flags, "--image-model", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="2 of 22|1 of 22"):
        run(Ear(1), data, "--protocol", "image", "--max-bad", 0.01, "--image-model", folder)


def test_ranks_of_pictures_by_hand_with_ties(tmp_path, run, monkeypatch):
    """Clips 0 and 1 sound the same; picture 2 is the same as picture 1."""
    sounds, pictures = [0, 0, 1], np.eye(8, dtype=np.float32)[[0, 1, 1]]
    monkeypatch.setattr(
        downstream, "load_image_model", lambda name, dim: (torch.nn.Identity(), None)
    )
    monkeypatch.setattr(
        downstream,
        "embed_images",
        lambda encoder, processor, rows, batch_size: ([0, 1, 2], pictures, []),
    )
    data = write_clips(tmp_path / "d", [([s], {"image": "x.png"}) for s in sounds])
    (r,) = run(Counter(1), data, "--protocol", "image", "--image-model", "x")
    # sim: rows clips [1 0 0], [1 0 0], [0 1 1]; a2i ranks 1, 3 (0 ties with 0), 2 (tie); i2a ranks
    # 2 (tie), 3, 1
    assert r["scores"]["a2i_MRR"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3) and r[
        "scores"
    ]["a2i_R@1"]["value"] == pytest.approx(1 / 3)
    assert r["scores"]["i2a_MRR"]["value"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)


def test_no_readable_clip_with_a_picture_is_a_sentence():
    with pytest.raises(ValueError, match="none of 0 images .* no readable clip has one"):
        downstream.embed_images(torch.nn.Linear(1, 1), None, [], 8)


def test_without_pillow_there_is_a_sentence(tmp_path, run, monkeypatch, clip_folder):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ValueError, match="image needs pillow to read pictures; install it with: pip install pillow"
    ):
        run(
            Counter(1),
            write_clips(tmp_path / "d", [([1], {"image": "x.png"})]),
            "--protocol",
            "image",
            "--image-model",
            clip_folder[0],
        )


# Captions by a trained decoder


def talking_reader():
    model = Reader(2, slot_shown=True)
    model.text_encoder = common.text_encoder_from_scratch(
        [f"a {n} before the" for n in NAMES] + ["never said word"], 16, 1, 1, 30
    )
    return model


def test_a_trained_decoder_says_planted_captions_back(tmp_path, run, monkeypatch, capsys):
    pairs = list(itertools.product(range(4), repeat=2))

    def say(a, b):
        return f"A {NAMES[a]} before the {NAMES[b]}" if a != b else f"a {NAMES[a]}"

    clips = [
        ((a, b), {"captions": [say(a, b)], "split": split})
        for split, times in (("train", 8), ("val", 1), ("test", 1))
        for a, b in pairs * times
    ]
    clips[-17][1]["captions"] = ["never said word"]  # of val: tokens that training never saw
    data, model = write_clips(tmp_path / "d", clips), talking_reader()
    monkeypatch.setattr(
        downstream,
        "CAPTION_DECODER",
        downstream.CAPTION_DECODER | dict(lr=1e-2, epochs=60, patience=20),
    )
    (r,) = run(model, data, "--protocol", "captioning")
    assert [c["said"] for c in r["details"]["captions"]] == [say(a, b).lower() for a, b in pairs]
    assert r["scores"]["BLEU-1"]["value"] == pytest.approx(1) == r["scores"]["ROUGE-L"]["value"]
    printed = capsys.readouterr().out
    assert (
        "trained here on 128 captions of 128 clips of split train, 8 tokens" in printed
        and "crop: zero-padded" not in printed
    )
    assert "the best on 16 clips of val" in printed and "temperature: 0 (greedy)" in printed
    with pytest.raises(ValueError, match="is greedy; leave out --temperature"):
        run(model, data, "--protocol", "captioning", "--temperature", 0.5)
    data = write_clips(tmp_path / "d", clips[-3:])
    with pytest.raises(
        ValueError,
        match="captioning trains a decoder for this model, .*: it needs rows of split train with "
        "'captions'",
    ):
        run(model, data, "--protocol", "captioning")


def test_the_caption_decoder_does_not_look_ahead():
    torch.manual_seed(0)
    decoder = downstream.CaptionDecoder(torch.randn(3, 5, 16), 9, 7).eval()
    inputs = torch.tensor([[2, 0, 3, 4, 5, 6]])
    changed = torch.tensor([[2, 0, 3, 4, 8, 1]])
    assert torch.allclose(
        decoder(inputs)[:, :3], decoder(changed)[:, :3], atol=1e-6
    ) and not torch.allclose(decoder(inputs)[:, 3], decoder(changed)[:, 3])
    other = torch.tensor([[1, 0, 3, 4, 5, 6]])
    assert not torch.allclose(decoder(inputs), decoder(other)) and not any(
        "clips" in name for name in decoder.state_dict()
    )


# Question answering


def test_a_probe_learns_what_is_linear_in_its_inputs_and_keeps_the_best_validation_epoch():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 8)).astype(np.float32)
    targets = (inputs[:, 0] > 0).astype(np.int64) + 2 * (inputs[:, 1] > 0)
    logits_of = downstream.train_probe(
        (inputs[:400], targets[:400]), (inputs[400:500], targets[400:500]), 4, "probe"
    )
    assert (logits_of(inputs[500:]).argmax(1) == targets[500:]).mean() > 0.8
    again = downstream.train_probe(
        (inputs[:400], targets[:400]), (inputs[400:500], targets[400:500]), 4, "probe"
    )
    assert np.array_equal(logits_of(inputs[500:]), again(inputs[500:]))
    # labels that are noise on training rows but wrong on validation rows: the first epochs, not the
    # last, are kept
    flipped = downstream.train_probe(
        (inputs[:100], targets[:100]),
        (inputs[:100], (targets[:100] + 1) % 4),
        4,
        "probe",
        epochs=40,
    )
    assert (flipped(inputs[:100]).argmax(1) == targets[:100]).mean() < 0.7


def test_question_answering_scores_by_hand(corpus, tmp_path, monkeypatch, capsys):
    """The logits are given: binary 2 of 3 right; words: rank 1, rank 2, and an answer never seen in
    training.
    """
    rows = [json.loads(x) for x in (corpus / "manifest.jsonl").read_text().splitlines()]
    chosen = {
        split: [row for row in rows if row["split"] == split][:3]
        for split in ("train", "val", "test")
    }
    qa = {
        "train": [("loud?", "yes"), ("loud?", "no"), ("what?", "bell")],
        "test": [("loud?", "yes"), ("loud?", "no"), ("loud?", "yes")],
    }
    out = []
    for split, of in chosen.items():
        for i, row in enumerate(of):
            questions = [dict(zip(("question", "answer"), qa.get(split, qa["train"])[i]))]
            if split == "train":
                questions.append({"question": "what?", "answer": ["siren", "hum", "bell"][i]})
            if split == "test":
                questions.append({"question": "what?", "answer": ["siren", "hum", "goat"][i]})
                questions.append(
                    {"question": "seen?", "answer": "yes", "type": ["Visual", "Counting"]}
                )  # needs a picture
            out.append({"audio": str(corpus / row["audio"]), "split": split, "qa": questions})
    common.write_lines(tmp_path / "qa.jsonl", [json.dumps(row) for row in out])
    given = {
        2: np.array([[0, 1], [1, 0], [1, 0]]),
        3: np.array([[0, 0, 1], [2, 1, 3], [1, 1, 1]]),
    }  # no, yes; bell, hum, siren
    seen = []

    def probe(train, val, n_classes, desc, **options):
        seen.append((train[0].shape, train[1].tolist(), val[1].tolist()))
        return lambda inputs: given[n_classes].astype(np.float32)

    class Stub:
        window_s, sample_rate, pairwise = 10.0, 32000, False
        clean_caption = staticmethod(lambda text: text)

        def to(self, device):
            return self

        def parameters(self):
            return iter([torch.zeros(1)])

        def embed_audio(self, waveform, n):
            return torch.nn.functional.normalize(waveform[:, :4], dim=-1)

        def embed_text(self, texts):
            return torch.eye(4)[[len(t) % 4 for t in texts]]

    monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: Stub())
    monkeypatch.setattr(evaluate, "find_model", lambda path: None)
    monkeypatch.setattr(downstream, "train_probe", probe)
    (r,) = downstream.main(
        downstream.parse(
            ["stub", "--data", str(tmp_path / "qa.jsonl"), "--protocol", "aqa", "--bootstrap", "0"]
        )
    )
    assert {k: s["value"] for k, s in r["scores"].items()} == pytest.approx(
        {"binary_accuracy": 2 / 3, "word_R@1": 1 / 3, "word_R@5": 2 / 3, "word_R@10": 2 / 3}
    )
    assert r["chance"] == pytest.approx(
        {"binary_accuracy": 1 / 3, "word_R@1": 0.0, "word_R@5": 2 / 3, "word_R@10": 2 / 3}
    )  # always "no", of two equally common answers; always "bell"
    assert seen[0] == ((2, 8), [1, 0], [1, 0]) and seen[1][:2] == ((4, 8), [2, 1, 0, 0])
    assert [d["rank"] for d in r["details"]["word"]] == [
        1,
        3,
        None,
    ] and "1 never seen in training" in capsys.readouterr().out
    common.write_lines(
        tmp_path / "test.jsonl", [json.dumps(row) for row in out if row["split"] == "test"]
    )
    with pytest.raises(ValueError, match="aqa trains a probe: it needs rows of split train"):
        downstream.main(
            downstream.parse(["stub", "--data", str(tmp_path / "test.jsonl"), "--protocol", "aqa"])
        )
    common.write_lines(
        tmp_path / "bare.jsonl", [json.dumps({"audio": row["audio"]}) for row in out]
    )
    with pytest.raises(
        ValueError, match="has anything to score; a protocol needs one of captions, labels"
    ):
        evaluate.main(evaluate.parse(["stub", "--data", str(tmp_path / "bare.jsonl")]))


def test_question_answering_from_a_manifest_to_a_printed_score(
    corpus, mga_run, tmp_path, monkeypatch
):
    rows = [json.loads(x) for x in (corpus / "manifest.jsonl").read_text().splitlines()]
    common.write_lines(
        tmp_path / "qa.jsonl",
        [
            json.dumps(
                {
                    "audio": str(corpus / row["audio"]),
                    **({} if row["split"] == "train" else {"split": row["split"]}),
                    "qa": [
                        {
                            "question": "is there one sound?",
                            "answer": "yes" if len(row["labels"]) == 1 else "no",
                        },
                        {"question": "what is heard first?", "answer": row["labels"][0]},
                    ],
                }
            )
            for row in rows
        ],
    )
    given = [str(mga_run[0] / "best.pt"), "--data", str(tmp_path / "qa.jsonl")]
    given += ["--protocol", "aqa", "--bootstrap", "20"]
    (r,) = downstream.main(downstream.parse(given))
    assert r["protocol"] == "aqa" and set(r["scores"]) == {
        "binary_accuracy",
        "word_R@1",
        "word_R@5",
        "word_R@10",
    }
    assert all(0 <= s["low"] <= s["value"] <= s["high"] <= 1 for s in r["scores"].values())
    # the epoch is never chosen on the scored questions
    probe, chosen_on = downstream.train_probe, []

    def spy(train, val, *given, **more):
        chosen_on.append(len(val[1]))
        return probe(train, val, *given, **more, epochs=1)

    monkeypatch.setattr(downstream, "train_probe", spy)
    (
        downstream.main(downstream.parse(given)),
        downstream.main(downstream.parse([*given, "--split", "val"])),
    )
    assert chosen_on == [4, 4, 0, 0]  # yes or no, and words; of test, of val


def test_clips_without_annotation_do_not_count():
    rows = [{"labels": ["a", "b"]}, {"labels": []}, {"captions": ["x"]}, {"labels": ["a"]}]
    kind, targets, counted = downstream.label_task(rows, ["a", "b"])
    assert kind == "multilabel" and counted.tolist() == [0, 1, 3]
    assert targets[counted].tolist() == [[1, 1], [0, 0], [1, 0]]


def test_annotated_rows_without_a_label_are_trained_on_as_they_are_scored(monkeypatch):
    told = [{"labels": ["a", "b"]}, {"labels": []}, {"captions": ["x"]}, {"events": []}]
    rows = [{**row, "audio": f"{i}.wav", "split": "train"} for i, row in enumerate(told)]
    monkeypatch.setattr(downstream, "scored_split", lambda *given: None)
    monkeypatch.setattr(downstream, "embed_rows", lambda model, rows, *given: rows)
    settings = types.SimpleNamespace(manifest=rows, split="test")
    splits = downstream.embed_splits(None, None, settings, "labels", "probe")
    assert [row["audio"] for row in splits["train"]] == ["0.wav", "1.wav", "3.wav"]
