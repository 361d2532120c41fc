"""What a training computes, by value: its forward pass against the evaluation, its learning rates,
its limits, and which checkpoint becomes best.pt.
"""

import importlib
import math

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import cacophony
import common
import mga_clap
import t_clap
from conftest import config, log_of
from test_devices import first_batch

SCRIPTS = ["mga_clap", "t_clap", "cacophony", "collat", "curation_clap"]


def trained(method, runs_of, corpus):
    script = importlib.import_module(method)
    model = script.Model.from_checkpoint(runs_of(method)[0] / "best.pt").eval()
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "train"]
    return model, rows, config(method, corpus, "x", seed=0)


def alone(model, texts):
    """Text embeddings one at a time: without padding."""
    return torch.cat([model.embed_text([text]) for text in texts])


# Forward pass
@pytest.mark.parametrize("method", ["mga_clap", "t_clap", "curation_clap"])
def test_a_batch_s_embeddings_are_those_of_the_evaluation(method, runs_of, corpus):
    model, rows, cfg = trained(method, runs_of, corpus)
    rows.sort(key=t_clap.has_negatives)
    rows = [rows[-1], rows[0], rows[-2]]  # with a negative, without, with
    tokenize, texts = model.text_encoder.tokenize, []
    model.text_encoder.tokenize = lambda given: texts.extend(given) or tokenize(given)
    batch, _ = first_batch(method, cfg, model, rows)
    model.text_encoder.tokenize = tokenize
    audio, text, *rest = model(**batch)
    assert (audio - model.embed_audio(batch["waveform"])).abs().max() < 1e-5
    assert not batch["attention_mask"].all()  # some are padded
    embeds = alone(model, texts)
    assert (text - embeds[: len(text)]).abs().max() < 1e-5
    if method == "t_clap":
        negative, ordered = rest[0], batch["ordered"].tolist()
        assert ordered == [0, 2] and (negative[ordered] - embeds[3:]).abs().max() < 1e-5
        assert not negative[1].any()


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("aggregator", ["uaca", "wstag", "pacl"])
def test_a_pairwise_method_trains_on_the_similarities_that_it_is_scored_by(
    aggregator, variant, corpus
):
    plain = dict(aggregator=aggregator, locality_blocks=0, hard_negatives=False)
    cfg = config("mga_clap", corpus, "x", variant=variant, **plain)
    rows = common.read_manifest([str(corpus)])
    captions = [mga_clap.clean_caption(rows[0]["captions"][k]) for k in (0, 1)]
    captions.append(mga_clap.clean_caption(rows[1]["captions"][0]))  # the keys of first_batch
    torch.manual_seed(0)
    model = mga_clap.start_model(cfg, captions).eval()
    batch, clip_ids = first_batch("mga_clap", cfg, model, rows)
    frames, words, temperature, _ = model(**batch)
    sim = mga_clap.training_loss(cfg, frames, words, temperature, clip_ids)[1]
    scores = model.pair_scores([f.detach().numpy() for f in frames], captions)
    assert np.abs(sim.detach().numpy() - scores).max() < 1e-5


@pytest.mark.parametrize("variant", ["paper", "jax", "official"])
def test_cacophony_s_forward_token_by_token(variant, runs_of, corpus):
    """Embeddings of whole clips, and for every token the logits of the prefix before it alone."""
    model, rows, cfg = trained("cacophony", runs_of, corpus)
    model.shape = model.shape | {"variant": variant}
    cfg = config("cacophony", corpus, "x", patches=1000)  # all patches of a clip
    dataset = cacophony.Clips(rows, cfg, model.text_encoder.tokenize)
    batch = dataset.collate([dataset[0, i] for i in range(3)])
    audio, text, nll, _ = model(**batch)
    waveforms = [common.read_audio(row["audio"], 16000) for row in rows[:3]]
    clips, n_samples = common.pad_batch(waveforms)
    assert (audio - model.embed_audio(clips, n_samples)).abs().max() < 1e-4
    with torch.no_grad():
        states = model.audio_encoder(batch["patches"], batch["index"], batch["valid_mask"])
        for b in range(3):
            ids = batch["input_ids"][b][batch["attention_mask"][b].bool()]
            kv = model.audio_keys_values(states[b : b + 1])
            total = 0.0
            for t in range(1, len(ids)):
                prefix = ids[None, :t]
                of_prefix = model.text_states(prefix, torch.ones_like(prefix))
                logits = model.next_logits(of_prefix, kv, batch["valid_mask"][b : b + 1])
                total -= logits[0, -1].log_softmax(0)[ids[t]].item()
            count = len(ids) - 1 if variant == "paper" else model.text_encoder.max_tokens - 1
            assert nll[b].item() == pytest.approx(total / count, rel=1e-4)
            of_text = model.text_states(ids[None], torch.ones_like(ids[None]))
            pooled = model.text_pool(of_text, torch.ones_like(ids[None]).bool())
            assert (text[b] - F.normalize(pooled[0], dim=-1)).abs().max() < 1e-5


# Which checkpoint is best
def scripted(method, script, monkeypatch, values):
    """Let the validations of a training return these values, higher is better, one by one."""
    values = iter([*values, *[0.5] * 5])
    if method == "curation_clap":
        losses = lambda *_: (1 - next(values), 1.0)  # noqa: E731
        monkeypatch.setattr(script, "validation_loss", losses)
        return
    names = [f"{way}_{what}" for way in ("t2a", "a2t") for what in ("R@1", "R@5", "mAP@10")]
    names += ["tagging_mAP", "loss_con"]

    def validate(*_, **__):
        value = next(values)
        return {name: value for name in names}, {name: 0.0 for name in names}

    monkeypatch.setattr(script, "validate", validate)


ONE_BY_ONE = {
    "mga_clap": dict(epochs=3, eval_epochs=1),
    "t_clap": dict(steps=3, eval_steps=1),
    "cacophony": dict(stage="contrastive", audio_weights="none", steps=3, eval_steps=1),
    "collat": dict(steps=3, eval_steps=1),
    "curation_clap": dict(stage="teacher", teacher_epochs=3, epoch_steps=1),
}


@pytest.mark.parametrize("method", SCRIPTS)
def test_best_pt_is_the_checkpoint_with_the_best_validation(method, corpus, tmp_path, monkeypatch):
    script, norms = importlib.import_module(method), []
    scripted(method, script, monkeypatch, [0.2, 0.9, 0.3])
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or clip(p, most)
    )
    result = script.main(config(method, corpus, tmp_path, name="a", **ONE_BY_ONE[method]))
    second = 8 if method == "mga_clap" else 2  # of four steps an epoch
    name = "teacher.pt" if method == "curation_clap" else "best.pt"
    stored = torch.load(tmp_path / "a" / name, weights_only=True)
    assert result["best_step"] == second == stored["step"]
    limit = {"collat": {1.0}, "curation_clap": {5.0}}  # D9, D7; the others do not clip
    assert set(norms) == limit.get(method, set())


# Learning rates and limits
def cosine(peak, least, place, total):
    return least + (peak - least) * (1 + math.cos(math.pi * place / total)) / 2


def test_logged_learning_rates_follow_the_schedule(runs_of):
    """Linear to the peak, then half a cosine, to 0 or to Cacophony's min_lr."""
    rates = {
        method: [line["lr"] for line in log_of(runs_of(method)[0])]
        for method in ("mga_clap", "cacophony")
    }
    peak = 1e-3
    mga = [peak * k / 4 for k in (1, 2, 3, 4)] + [cosine(peak, 0, k, 4) for k in range(4)]
    assert rates["mga_clap"] == pytest.approx(mga)
    mae = [1.5e-3, 3e-3, 3e-3, cosine(3e-3, 1e-5, 1, 2)]
    stage_2 = [0.5e-3, 1e-3, 1e-3, cosine(1e-3, 1e-5, 1, 2)]
    assert rates["cacophony"] == pytest.approx(mae + stage_2)
    stored = torch.load(runs_of("collat")[0] / "last.pt", weights_only=True)
    at_the_end = cosine(1, 0, 5, 6)  # the last of 8 steps, 2 of them warm-up
    groups = sorted({g["lr"] for g in stored["optimiser"]["param_groups"]})
    assert groups == pytest.approx([1e-4 * at_the_end, 1e-3 * at_the_end])  # AST, the rest (D9)


@pytest.mark.parametrize("method, name", [("t_clap", "logit_scale_a"), ("collat", "log_scale")])
def test_the_scale_never_exceeds_100(method, name, corpus, tmp_path, monkeypatch):
    script = importlib.import_module(method)
    start = script.start_model

    def hot(*given):
        model = start(*given)
        getattr(model, name).data.fill_(math.log(1000))
        return model

    monkeypatch.setattr(script, "start_model", hot)
    monkeypatch.setattr(
        script, "validate", lambda *_, **__: ({"t2a_mAP@10": 0, "a2t_mAP@10": 0}, {})
    )
    monkeypatch.setattr(common.Run, "finish", lambda *_: {})
    script.main(config(method, corpus, tmp_path, name="a", steps=1, eval_steps=1))
    stored = torch.load(tmp_path / "a/last.pt", weights_only=True)["model"][name]
    assert stored.exp().item() == pytest.approx(100, rel=1e-5)


def test_curation_clap_s_rate_drops_to_a_tenth_without_progress(corpus, tmp_path, monkeypatch):
    """Patience 1 (D7): the first epoch sets the mark, the third is the second without progress."""
    import curation_clap

    scripted("curation_clap", curation_clap, monkeypatch, [0.5] * 5)
    flags = dict(stage="teacher", teacher_epochs=5, epoch_steps=1, patience=1, name="a")
    curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    rates = [line["lr"] for line in log_of(tmp_path / "a")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-4])


# What validation and curation read
def test_cacophony_s_validation_losses_are_those_of_whole_clips_and_first_captions(runs_of, corpus):
    model, rows, cfg = trained("cacophony", runs_of, corpus)
    rows = rows[:4]
    scores = cacophony.validate(model, rows, cfg)[0]
    waveforms = [common.read_audio(row["audio"], 16000) for row in rows]
    audio = model.embed_audio(*common.pad_batch(waveforms))
    sim = audio @ model.embed_text([row["captions"][0] for row in rows]).T * model.log_scale.exp()
    target = torch.arange(4)
    both = F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)  # Eq. (1)
    assert scores["loss_con"] == pytest.approx(both.item(), rel=1e-4)
    dataset = cacophony.Clips(
        [{**row, "captions": row["captions"][:1]} for row in rows], cfg, model.text_encoder.tokenize
    )
    with torch.no_grad():
        nll = model(**dataset.collate([dataset[0, i] for i in range(4)]))[2]
    assert scores["loss_cap"] == pytest.approx(nll.mean().item(), rel=1e-4)
    # chance: equal logits, under the jax variant divided by the padded length
    ignorance = math.log(model.text_encoder.model.config.vocab_size)
    assert cacophony.validate(model, rows, cfg)[1]["loss_cap"] == pytest.approx(ignorance)
    model.shape = model.shape | {"variant": "jax"}
    tokenize, most = model.text_encoder.tokenize, model.text_encoder.max_tokens - 1
    tokens = [tokenize(row["captions"][:1])["input_ids"].shape[1] - 1 for row in rows]
    expected = ignorance * np.mean(tokens) / most
    assert cacophony.validate(model, rows, cfg)[1]["loss_cap"] == pytest.approx(expected)


def test_curation_hears_the_first_60_s(runs_of, corpus, tmp_path):
    import curation_clap

    model, _, cfg = trained("curation_clap", runs_of, corpus)
    sound = 0.1 * np.random.default_rng(0).normal(size=70 * 44100)
    sound[60 * 44100 :] = np.sin(np.arange(10 * 44100) / 20)
    for name, seconds in (("long", 70), ("cut", 60)):
        sf.write(tmp_path / f"{name}.wav", sound[: seconds * 44100], 44100)
    rows = [{"audio": str(tmp_path / f"{name}.wav")} for name in ("long", "cut")]
    run = common.Run(cfg, "curation_clap")
    embeds = curation_clap.embed_block(model, rows, cfg, run, "x")[1].astype(np.float32)
    assert embeds[0] @ embeds[1] == pytest.approx(1, abs=1e-3)  # fp16
    whole = common.embed_files(model, rows[:1])[1][0]
    assert whole @ embeds[1] < 0.99


def test_official_mga_clap_pads_short_clips_for_retrieval_and_repeats_them_for_frames(corpus):
    """D20"""
    models = {}
    for variant in ("paper", "official"):
        torch.manual_seed(0)
        cfg = config("mga_clap", corpus, "x", variant=variant)
        models[variant] = mga_clap.start_model(cfg, ["a dog barks"]).eval()
    official = models["official"]
    x = torch.randn(1, 3 * 32000, generator=torch.Generator().manual_seed(0)) * 0.1
    padded = F.pad(x, (0, 7 * 32000))
    assert torch.allclose(official.embed_audio(x), official.embed_audio(padded), atol=1e-6)
    again = torch.cat([x] * 4, 1)[:, : 10 * 32000]
    frames = official.embed_frames(x)
    assert torch.allclose(frames, official.embed_frames(again), atol=1e-6)
    assert not torch.allclose(frames, official.embed_frames(padded), atol=1e-3)
    plain = models["paper"].embed_frames(x)
    assert torch.allclose(
        plain, models["paper"].embed_frames(padded)[:, : plain.shape[1]], atol=1e-6
    )
