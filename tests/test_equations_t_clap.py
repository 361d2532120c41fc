"""T-CLAP's losses, sampling and gradient caching against hand-computed cases and slow obvious
versions.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import common
import eval as evaluator
import t_clap
from conftest import SMALL_OF, config, log_of

# L_c, which has no number


def test_contrastive_loss_by_hand():
    # scale ln 3 and orthogonal pairs: the right one of two has probability 3 / 4, both ways
    assert t_clap.contrastive_loss(torch.eye(2), math.log(3)).item() == pytest.approx(
        math.log(4 / 3)
    )
    sim = torch.tensor(
        [[1.0, 0.5], [0.0, 1.0]]
    )  # rows: ln(1 + e^-1), ln(1 + e^-2); columns: the other way round
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert t_clap.contrastive_loss(sim, 2.0).item() == pytest.approx(by_hand)
    assert t_clap.contrastive_loss(torch.zeros(5, 5), 14.0).item() == pytest.approx(
        math.log(5)
    )  # knows nothing


# Eq. (3)


AUDIO = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
TEXT = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
NEGATIVE = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.8, 0.6]])  # the second clip has none


def test_temporal_loss_by_hand():
    # margins a.t - a.n: 0.6, -, -0.8; as the paper prints it, -log(e^at / (e^at + e^an)), averaged
    # over the two (D4)
    by_hand = (
        -math.log(math.exp(0.6) / (math.exp(0.6) + 1)) - math.log(1 / (1 + math.exp(0.8)))
    ) / 2
    loss, order = t_clap.temporal_loss(AUDIO, TEXT, NEGATIVE)
    assert loss.item() == pytest.approx(by_hand) and order.item() == 0.5
    assert t_clap.temporal_loss(AUDIO, TEXT, NEGATIVE, 14.0)[0].item() == pytest.approx(
        (math.log1p(math.exp(-14 * 0.6)) + math.log1p(math.exp(14 * 0.8))) / 2
    )
    same = t_clap.temporal_loss(AUDIO[:1], TEXT[:1], TEXT[:1])
    assert (
        same[0].item() == pytest.approx(math.log(2)) and same[1].item() == 0
    )  # a tie is not the right order
    # the range of a normalised pair: 0.127 at a margin of 2, 2.127 at -2
    for sign, value in ((1, 0.126928), (-1, 2.126928)):
        assert t_clap.temporal_loss(AUDIO[:1], sign * AUDIO[:1], -sign * AUDIO[:1])[
            0
        ].item() == pytest.approx(value, abs=1e-6)


def test_temporal_gradient_by_hand_reaches_audio_text_and_negative_of_ordered_clips_only():
    audio, text, negative = (x.clone().requires_grad_() for x in (AUDIO, TEXT, NEGATIVE))
    t_clap.temporal_loss(audio, text, negative)[0].backward()
    for i, margin in ((0, 0.6), (2, -0.8)):
        pull = -1 / (1 + math.exp(margin)) / 2  # d/dm softplus(-m), mean of two
        assert torch.allclose(audio.grad[i], pull * (TEXT - NEGATIVE)[i])
        assert torch.allclose(text.grad[i], pull * AUDIO[i]) and torch.allclose(
            negative.grad[i], -pull * AUDIO[i]
        )
    assert not any(x.grad[1].any() for x in (audio, text, negative))
    none = t_clap.temporal_loss(audio, text, torch.zeros(3, 2))
    assert none[0].item() == 0 and none[1].item() == 0


# Eq. (1), (2)


def test_training_loss_is_the_weighted_sum_and_the_contrastive_part_never_sees_negatives():
    for weight in (0.5, 2.0):
        cfg = t_clap.Config(data=[], lt_weight=weight)
        loss, sim, parts = t_clap.training_loss(cfg, AUDIO, TEXT, NEGATIVE, torch.tensor(10.0))
        assert loss.item() == pytest.approx(
            parts["loss_c"].item() + weight * parts["loss_t"].item()
        )
        assert torch.equal(sim, AUDIO @ TEXT.T)
        slow = 0.0
        for i in range(3):
            for scores in (10 * sim[i], 10 * sim[:, i]):
                slow -= math.log(scores[i].exp() / scores.exp().sum()) / 6
        assert parts["loss_c"].item() == pytest.approx(slow, abs=1e-5)
    assert t_clap.Config(data=[]).lt_weight == 0.5  # lambda, Sec. 3.2
    cfg = t_clap.Config(data=[], lt_scale=3.0)
    parts = t_clap.training_loss(cfg, AUDIO, TEXT, NEGATIVE, torch.tensor(10.0))[2]
    by_hand = (math.log1p(math.exp(-3 * 0.6)) + math.log1p(math.exp(3 * 0.8))) / 2
    assert parts["loss_t"].item() == pytest.approx(by_hand, abs=1e-6)
    cfg = t_clap.Config(data=[], lt_weight=0.0)
    parts = t_clap.training_loss(cfg, AUDIO, TEXT, NEGATIVE, torch.tensor(10.0))[2]
    assert set(parts) == {"loss_c"}  # what is not trained is not reported as 0


# Gradient caching


def small_model(seed=0):
    torch.manual_seed(seed)
    cfg = t_clap.Config(
        data=[], **{k: v for k, v in {**t_clap.TINY, **SMALL_OF["t_clap"]}.items() if k != "size"}
    )
    return t_clap.start_model(cfg, ["a dog barks", "rain falls then a bell rings"]), cfg


def small_batch(model, captions, negatives):
    waveforms = torch.randn(len(captions), 480000, generator=torch.Generator().manual_seed(1)) * 0.1
    items = [(w.numpy(), c, n, "x.wav") for w, c, n in zip(waveforms, captions, negatives)]
    clips = t_clap.Clips([], t_clap.Config(data=[]), model.text_encoder.tokenize, 48000)
    return lambda part: common.Readable(clips, part).collate(items)[0]


CAPTIONS = [
    "a dog barks then rain falls",
    "a bell rings",
    "rain falls",
    "a bell rings then a dog barks",
    "a dog barks",
]
NEGATIVES = ["rain falls then a dog barks", None, None, "a dog barks then a bell rings", None]


@pytest.mark.parametrize("part", [1, 2, 3])
def test_parts_with_gradient_caching_equal_one_big_batch(part):
    gradients = []
    for micro_batch in (0, part):
        model, cfg = small_model()
        model.eval()  # dropout off, batch norm on its running statistics (D9)
        batch = small_batch(model, CAPTIONS, NEGATIVES)(micro_batch)
        assert len(batch) == (math.ceil(5 / part) if micro_batch else 1)
        loss, sim, _ = common.cached_backward(
            model, batch, lambda *x: t_clap.training_loss(cfg, *x), lambda i: None
        )
        gradients.append(
            ({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, loss.item(), sim)
        )
    (whole, loss, sim), (cached, cached_loss, cached_sim) = gradients
    assert cached_loss == pytest.approx(loss, abs=1e-6) and torch.allclose(
        sim, cached_sim, atol=1e-6
    )
    assert whole["logit_scale_a"].abs() > 1e-4
    for name, grad in whole.items():
        assert torch.allclose(grad, cached[name], atol=1e-5, rtol=1e-4), (
            name
        )  # single precision, gradients up to 5


def test_both_passes_of_a_part_draw_the_same_masks():
    model, cfg = small_model()
    model.train()
    seen = []

    def spy(**part):
        out = model(**part)
        seen.append([x.detach().clone() for x in out])
        return out

    parts = small_batch(model, CAPTIONS, NEGATIVES)(2)
    common.cached_backward(
        spy, parts, lambda *x: t_clap.training_loss(cfg, *x), lambda i: common.seed_step(0, 7, 0, i)
    )
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    common.seed_step(0, 7, 0, 0)
    other = [torch.rand(1).item()]
    common.seed_step(0, 7, 0, 1)
    assert torch.rand(1).item() != other[0]


def test_processes_add_up_their_gradients_once():
    """no_sync for all parts but the last; without it every part would be reduced."""

    class Wrapped(torch.nn.Linear):
        entered = 0

        @contextlib.contextmanager
        def no_sync(self):
            Wrapped.entered += 1
            yield

        def forward(self, x):
            return (super().forward(x),)

    common.cached_backward(
        Wrapped(3, 2),
        [{"x": torch.randn(2, 3)} for _ in range(4)],
        lambda y: (y.square().sum(),),
        lambda i: None,
    )
    assert Wrapped.entered == 3


# Data


def row(audio, negatives=(), where="a.jsonl:1", captions=("x then y",)):
    return {
        "audio": audio,
        "captions": list(captions),
        "negatives": list(negatives),
        "where": where,
    }


def test_sets_with_negatives_are_told_from_sets_without_by_manifest():
    rows = [row("1", ["y then x"]), row("2", [None], "a.jsonl:2"), row("3", [], "b.jsonl:1")]
    ordered, plain = t_clap.split_sets(rows)
    assert [r["audio"] for r in ordered] == ["1", "2"] and [r["audio"] for r in plain] == ["3"]


def test_a_batch_of_512_has_102_clips_of_sets_with_negatives_and_410_of_the_others():
    assert t_clap.clip_counts([10000, 100000], 512, 4.0) == [102, 410]
    assert t_clap.clip_counts([10000, 0], 512, 4.0) == [512, 0] and t_clap.clip_counts(
        [0, 300], 512, 4.0
    ) == [0, 300]
    assert t_clap.clip_counts([10000, 100000], 512, 1.0) == [256, 256]
    assert t_clap.clip_counts([10000, 100000], 512, 1e6) == [
        1,
        511,
    ]  # never without an ordered clip


def test_batches_mix_the_sets_visit_every_clip_and_continue_from_any_step(monkeypatch):
    sizes, counts = [7, 23], [2, 5]
    batches = list(t_clap.mixed_batches(sizes, counts, 3, 0, 12))
    assert list(t_clap.mixed_batches(sizes, counts, 3, 5, 12)) == batches[5:]
    assert all([g for g, _, _ in batch] == [0] * 2 + [1] * 5 for batch in batches)
    for group, (size, count) in enumerate(zip(sizes, counts)):
        for epoch in (0, 1):
            visited = [i for batch in batches for g, e, i in batch if (g, e) == (group, epoch)]
            assert len(visited) == len(set(visited)) == size // count * count  # once an epoch
    assert (
        len({i for batch in t_clap.mixed_batches([7, 0], [2, 0], 3, 0, 40) for _, _, i in batch})
        == 7
    )
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank_and_world", lambda: (rank, 2))
        parts.append(list(t_clap.mixed_batches(sizes, counts, 3, 0, 12)))
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in batches]
    assert all(
        sum(g == 0 for g, _, _ in part) == 1 for part in parts[0] + parts[1]
    )  # ordered clips on both


def test_an_item_is_a_caption_with_its_own_negative_tiled_to_ten_seconds(tmp_path):
    x = np.random.default_rng(0).normal(size=48000 * 4).astype(np.float32) * 0.1
    sf.write(tmp_path / "four.wav", x, 48000, subtype="FLOAT")
    rows = [
        row(
            str(tmp_path / "four.wav"),
            ["b then a", None, "f then e"],
            captions=["a then b", "c", "e then f"],
        )
    ]
    clips = t_clap.Clips([rows], t_clap.Config(data=[]), None, 48000)
    drawn = [clips[0, epoch, 0] for epoch in range(30)]
    assert {(c, n) for _, c, n, _ in drawn} == {
        ("a then b", "b then a"),
        ("c", None),
        ("e then f", "f then e"),
    }  # D7
    assert [clips[0, 4, 0][1] for _ in range(3)] == [drawn[4][1]] * 3  # a function of the epoch

    def tokenize(texts):
        return {
            "input_ids": torch.zeros(len(texts), 3),
            "attention_mask": torch.ones(len(texts), 3),
        }

    clips.tokenize = tokenize
    items = [(x, "c", None, "1"), (x, "a then b", "b then a", "2")]
    ((batch,), names, bad) = common.Readable(clips, 0).collate(items)
    assert batch["waveform"].shape == (2, 480000) and torch.equal(
        batch["waveform"][0, :192000], batch["waveform"][0, 192000:384000]
    )
    assert not batch["waveform"][:, 384000:].any()  # D2: twice whole, then zeros
    assert (
        batch["ordered"].tolist() == [1]
        and len(batch["input_ids"]) == 3
        and names == ["1", "2"]
        and bad == []
    )
    plain = t_clap.Clips([rows], t_clap.Config(data=[], lt_weight=0.0), tokenize, 48000)
    assert {plain[0, epoch, 0][2] for epoch in range(30)} == {
        None
    }  # without the temporal loss no negative is read
    missing = t_clap.Clips([[row("no.wav")]], t_clap.Config(data=[]), None, 48000)
    assert isinstance(common.Readable(missing, 0)[0, 0, 0], common.AudioError)


# Training


def test_a_run_logs_both_losses_and_its_checkpoint_reloads_and_scores(runs_of, corpus):
    folder, result = runs_of("t_clap")
    lines = log_of(folder)
    assert [x["step"] for x in lines] == list(range(1, 9)) and lines[0]["ln_B"] == pytest.approx(
        math.log(6)
    )
    for x in lines:
        assert x["loss"] == pytest.approx(
            x["loss_c"] + 2 * x["loss_t"], rel=1e-5
        )  # weight 2 at size tiny
    assert lines[0]["lr"] == pytest.approx(5e-4 / 200) and lines[-1]["lr"] == pytest.approx(
        8 * 5e-4 / 200
    )
    assert json.loads((folder / "eval.json").read_text()) == result
    model = evaluator.load_model(folder / "best.pt")
    again, _ = t_clap.validate(
        model, [r for r in common.read_manifest([str(corpus)]) if r["split"] == "val"]
    )
    assert again == result["scores"]
    given = [str(folder / "best.pt"), "--data", str(corpus), "--bootstrap", "0", "--split", "val"]
    results = {r["protocol"]: r for r in evaluator.main(evaluator.parse(given))}
    assert {"retrieval", "t_classify", "tagging", "frames"} <= set(results)
    order = results["t_classify"]["scores"]["t2a"]["value"]
    assert result["scores"]["t_classify_t2a"] == order
    assert all(
        "the last one tiled as often as it fits whole, then zero-padded" in r["settings"]["crop"]
        for r in results.values()
    )


def test_the_temporal_loss_teaches_the_text_encoder_the_order_of_two_events():
    """Fixed clip vectors: only a caption whose order is read tells a pair's two clips apart."""
    torch.manual_seed(0)
    names = ["dog", "bell", "rain", "siren"]
    model = t_clap.start_model(
        t_clap.Config(data=[], **t_clap.TINY), ["dog bell rain siren then"]
    ).eval()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    swap = [pairs.index((j, i)) for i, j in pairs]
    clips = F.normalize(
        torch.randn(len(pairs), 128, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    tokens = model.text_encoder.tokenize([f"{names[i]} then {names[j]}" for i, j in pairs])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)
    orders = []
    for _ in range(40):
        texts = F.normalize(model.text_feats(tokens["input_ids"], tokens["attention_mask"]), dim=-1)
        loss, order = t_clap.temporal_loss(clips, texts, texts[swap], 14.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        orders.append(order.item())
    assert orders[0] < 0.8 and orders[-1] == 1.0 and loss.item() < 0.2, (
        orders[0],
        orders[-1],
        loss.item(),
    )


def test_positives_only_manifests_are_mixed_in_and_get_no_temporal_loss(corpus, tmp_path, capsys):
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "train"]
    shutil.copytree(corpus / "audio", tmp_path / "audio")  # rows of one file would be merged
    plain = [{"audio": f"audio/{Path(r['audio']).name}", "captions": r["captions"]} for r in rows]
    common.write_lines(tmp_path / "plain.jsonl", [json.dumps(r) for r in plain])
    given = config("t_clap", corpus, tmp_path, steps=2, name="m", mix=2.0)
    t_clap.main(dataclasses.replace(given, data=[str(corpus), str(tmp_path / "plain.jsonl")]))
    assert (
        "12 clips of sets with negatives" in (out := capsys.readouterr().out)
        and "12 of sets without" in out
        and "2 + 4 clips" in out
    )


@pytest.mark.parametrize("order", [("plain", "told"), ("told", "plain")])
def test_a_clip_in_two_manifests_changes_the_sets_of_no_other(tmp_path, order):
    """Rows of one file are merged; the manifest of the first is not one with negatives thereby."""
    told = [{"audio": f"{i}.wav", "captions": ["x"], "negatives": ["y"]} for i in range(3)]
    plain = [{"audio": f"{i}.wav", "captions": ["z"]} for i in range(2, 9)]
    for name, rows in (("told", told), ("plain", plain)):
        common.write_lines(tmp_path / f"{name}.jsonl", map(json.dumps, rows))
    rows = common.read_manifest([str(tmp_path / f"{name}.jsonl") for name in order])
    train, _ = common.split_train_val([*rows, {"audio": "v.wav", "split": "val"}])
    sets = t_clap.split_sets(train, rows)
    names = [sorted(int(Path(row["audio"]).stem) for row in group) for group in sets]
    assert names == [[0, 1, 2], [3, 4, 5, 6, 7, 8]]


def test_fine_tuning_starts_at_the_scores_of_the_published_model(
    corpus, tmp_path, clap_folder, capsys
):
    clap_folder, _, _ = clap_folder
    model = t_clap.start_model(t_clap.Config(data=[], weights=str(clap_folder)), [])
    drops = [
        [block.drop_path for stage in m.audio_encoder.layers for block in stage.blocks]
        for m in (
            model,
            t_clap.start_model(t_clap.Config(data=[], weights=str(clap_folder), drop_path=0.3), []),
        )
    ]
    assert drops[0][-1] == pytest.approx(0.1) and drops[1] == pytest.approx(
        [3 * p for p in drops[0]]
    )
    published = evaluator.load_model(str(clap_folder))
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "val"]
    assert t_clap.validate(model, rows) == t_clap.validate(published, rows)
    given = {
        **SMALL_OF["t_clap"],
        "size": "paper",
        "steps": 2,
        "batch_size": 4,
        "weights": str(clap_folder),
        "name": "f",
    }
    result = t_clap.main(t_clap.Config(data=[str(corpus)], runs=str(tmp_path), **given))
    assert (
        "before the first step: validation t2a_R@1 "
        f"{t_clap.validate(published, rows)[0]['t2a_R@1']:.3f}" in capsys.readouterr().out
    )
    reloaded = t_clap.Model.from_checkpoint(
        tmp_path / "f/best.pt"
    )  # the sizes are the folder's, not the Config's
    assert (
        reloaded.shape["audio"]["dim"] == 16
        and t_clap.validate(reloaded, rows)[0] == result["scores"]
    )
    again = t_clap.start_model(
        t_clap.Config(data=[], weights=str(tmp_path / "f/best.pt")), []
    )  # a T-CLAP checkpoint as the start
    assert torch.equal(again.embed_text(["a dog"]), reloaded.embed_text(["a dog"]))
    torch.save({"method": "mga_clap", "config": {}, "model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: a checkpoint of mga_clap, not of t_clap"):
        t_clap.start_model(t_clap.Config(data=[], weights=str(tmp_path / "other.pt")), [])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            dict(weights="630k-best.pt"),
            "--weights 630k-best.pt: no such file; 630k-best.pt is in the hub repository",
        ),
        (dict(batch_size=1), "at least 2 clips are needed in each"),
        (dict(mix=-1.0), r"--mix -1.0: expected a number in \[0, inf\)"),
        (dict(steps=0), r"--steps 0: expected a number in \[1, 1e9\]"),
    ],
)
def test_bad_settings_are_one_clear_sentence(corpus, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        t_clap.main(config("t_clap", corpus, tmp_path, **overrides))


def test_data_without_negatives_says_how_to_make_them_and_trains_without_the_temporal_loss(
    corpus, tmp_path, capsys
):
    rows = [
        {k: v for k, v in r.items() if k != "negatives"}
        for r in common.read_manifest([str(corpus)])
    ]
    common.write_lines(tmp_path / "plain.jsonl", [json.dumps(r) for r in rows])
    with pytest.raises(
        ValueError, match="no training row has a negative.*rewrite --task negatives"
    ):
        t_clap.main(config("t_clap", tmp_path / "plain.jsonl", tmp_path))
    capsys.readouterr()
    result = t_clap.main(
        config("t_clap", tmp_path / "plain.jsonl", tmp_path, lt_weight=0.0, steps=2, name="p")
    )
    said = capsys.readouterr().out
    assert "the learning rate rises to the last step: warm-up of 200 steps" in said
    again = said.splitlines()[-1]
    assert " --seed 1 " in again and again.endswith("(another seed, to compare)")
    assert "t_classify_t2a" not in result["scores"] and np.isfinite(result["scores"]["t2a_R@1"])


def test_a_start_from_nothing_feels_order():
    """A swap moves a new text encoder's vector by a good part of the distance between captions
    (D10); BERT's 0.02 does not.
    """
    words = "dog rain bell siren crow clock".split()
    captions, swapped = (
        [
            f"{pair[k]} then {pair[1 - k]}"
            for pair in ((a, b) for a in words for b in words if a < b)
        ]
        for k in (0, 1)
    )

    def share(model):
        x, y = model.embed_text(captions), model.embed_text(swapped)
        return (
            (x - y).square().sum(1).mean()
            / torch.cdist(x, x).square().sum()
            * len(x)
            * (len(x) - 1)
        ).item()

    cfg = t_clap.Config(data=[], **{k: v for k, v in t_clap.TINY.items() if k != "size"})
    torch.manual_seed(0)
    assert share(t_clap.start_model(cfg, captions)) > 0.3
    torch.manual_seed(0)
    text = common.text_encoder_from_scratch(captions, 128, 2, 2, 77, pooler=True)
    assert (
        share(t_clap.Model(text, dict(dim=16, depths=[1, 1], heads=[2, 2], patch=16), 128)) < 0.02
    )


def test_embedded_text_is_the_projected_pooler_output():
    model, _ = small_model()
    model.eval()
    tokens = model.text_encoder.tokenize(["a dog barks"])
    hidden = model.text_encoder.model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
    ).last_hidden_state
    pooled = torch.tanh(
        F.linear(
            hidden[:, 0],
            model.text_encoder.model.pooler.dense.weight,
            model.text_encoder.model.pooler.dense.bias,
        )
    )
    expected = F.normalize(model.text_projection(pooled), dim=-1)
    assert (model.embed_text(["a dog barks"]) - expected).abs().max() < 1e-6
