"""What a training computes, by value: its forward pass against the evaluation, its learning rates,
its limits, and which checkpoint becomes best.pt.
"""

import importlib
import itertools
import math
import types

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
import torchlibrosa

import cacophony
import collat
import common
import curation_clap
import eval as evaluator
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
    if method == "mga_clap":
        model.eta /= 50  # sparse weights in this small model
    audio, text, *rest = model(**batch)
    if method == "mga_clap":  # the mean of both modalities' active codewords
        words = model.word_feats(batch["input_ids"], batch["attention_mask"])
        of_text = model.aggregate(words, batch["word_mask"][:, 1:])[1]
        of_audio = model.aggregate(model.frame_feats(batch["waveform"]))[1]
        assert rest[1].item() == pytest.approx((of_audio + of_text).item() / 2)
        assert of_audio != of_text
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
    # the first step is best in one direction, the third in the other, which must not decide
    tilts = itertools.chain([0.8, 0.0, -0.8], itertools.repeat(0.0))
    if method == "curation_clap":
        losses = lambda *_: (1 - next(values), 1.0)  # noqa: E731
        monkeypatch.setattr(script, "validation_loss", losses)
        return
    names = [f"{way}_{what}" for way in ("t2a", "a2t") for what in ("R@1", "R@5", "mAP@10")]
    names += ["tagging_mAP", "loss_con"]

    def validate(*_, **__):
        value, tilt = next(values), next(tilts)
        scores = {name: value + (tilt if name[:3] == "t2a" else -tilt) for name in names}
        return scores | {"tagging_mAP": value}, {name: 0.0 for name in names}

    monkeypatch.setattr(script, "validate", validate)


ONE_BY_ONE = {
    "mga_clap": dict(epochs=3, eval_epochs=1),
    "t_clap": dict(steps=3, eval_steps=1),
    "cacophony": dict(stage="contrastive", audio_weights="none", steps=3, eval_steps=1),
    "collat": dict(steps=3, eval_steps=1),
    "curation_clap": dict(stage="teacher", teacher_epochs=3, epoch_steps=1, clip=1.5),
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
    limit = {"collat": {1.0}, "curation_clap": {1.5}}  # D9, --clip; the others do not clip
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


@pytest.mark.parametrize("start_at, limit", [(1000, 100), (0.1, 1)])
@pytest.mark.parametrize("method, name", [("t_clap", "logit_scale_a"), ("collat", "log_scale")])
def test_the_scale_stays_between_1_and_100(
    method, name, start_at, limit, corpus, tmp_path, monkeypatch
):
    script = importlib.import_module(method)
    start = script.start_model

    def hot(*given):
        model = start(*given)
        getattr(model, name).data.fill_(math.log(start_at))
        return model

    monkeypatch.setattr(script, "start_model", hot)
    monkeypatch.setattr(
        script, "validate", lambda *_, **__: ({"t2a_mAP@10": 0, "a2t_mAP@10": 0}, {})
    )
    monkeypatch.setattr(common.Run, "finish", lambda *_: {})
    script.main(config(method, corpus, tmp_path, name="a", steps=1, eval_steps=1))
    stored = torch.load(tmp_path / "a/last.pt", weights_only=True)["model"][name]
    assert stored.exp().item() == pytest.approx(limit, rel=1e-5)


def test_curation_clap_s_rate_drops_to_a_tenth_without_progress(corpus, tmp_path, monkeypatch):
    """Patience 1 (D7): the first epoch sets the mark, the third is the second without progress."""
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


# What settings reach, and what is drawn
class Stop(Exception):
    """Ends a training where it calls a recorded function."""


def record(*given, **named):
    raise Stop(given, named)


@pytest.mark.parametrize(
    "method, flags, read",
    [
        ("mga_clap", dict(init_temperature=0.2), lambda m: m.temperature.item()),
        (
            "mga_clap",
            dict(drop_path=0.3),
            lambda m: m.audio_encoder.layers[-1].blocks[-1].drop_path,
        ),
        ("t_clap", dict(drop_path=0.3), lambda m: m.audio_encoder.layers[-1].blocks[-1].drop_path),
        ("curation_clap", dict(temperature=0.2), lambda m: 1 / m.log_scale.exp().item()),
        ("curation_clap", dict(window_s=3.0), lambda m: m.window_s),
        ("curation_clap", dict(block_dropout=0.3), lambda m: m.audio_encoder.block_dropout),
        ("curation_clap", dict(dropout=0.3), lambda m: m.text_projection.dropout),
    ],
)
def test_a_setting_reaches_the_model(method, flags, read, corpus):
    script = importlib.import_module(method)
    model = script.start_model(config(method, corpus, "x", **flags), ["a dog"])
    assert read(model) == pytest.approx(*flags.values())


def test_atst_s_drop_path_rises_over_the_blocks():
    encoder = mga_clap.ATSTFrame(dim=16, depth=3, heads=2, drop_path=0.2)
    assert [block.drop_path for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    "method, flags, name",
    [
        ("cacophony", dict(stage="mae", weight_decay=0.07), "AdamW"),
        ("cacophony", dict(stage="contrastive", audio_weights="none", weight_decay=0.07), "AdamW"),
        ("collat", dict(weight_decay=0.07), "AdamW"),
    ],
)
def test_the_weight_decay_reaches_the_optimiser(method, flags, name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, name, record)
    with pytest.raises(Stop) as stop:
        importlib.import_module(method).main(config(method, corpus, tmp_path, **flags))
    assert stop.value.args[1]["weight_decay"] == 0.07


def test_stage_1_has_the_set_mask_ratio_and_its_variant_s_eps(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cacophony, "MAE", record)
    flags = dict(stage="mae", mask_ratio=0.6, variant="official")
    with pytest.raises(Stop) as stop:
        cacophony.main(config("cacophony", corpus, tmp_path, **flags))
    assert stop.value.args[0][2:] == (0.6, 1e-5)  # D3


def test_the_replay_has_its_set_probability(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(curation_clap, "mixed_batches", record)
    flags = dict(stage="teacher", replay_prob=0.3)
    with pytest.raises(Stop) as stop:
        curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    assert stop.value.args[0][2] == 0.3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_synthetic_captions(share, corpus):
    clips = cacophony.Clips([], config("cacophony", corpus, "x", synthetic_share=share))
    row, rng = {"captions": ["written"], "synthetic": ["made"]}, np.random.default_rng(0)
    drawn = {clips.draw_caption(row, rng) for _ in range(30)}
    assert drawn == {"made" if share else "written"}


def test_every_step_process_and_part_has_draws_of_its_own():
    draws = set()
    for of in itertools.product((0, 1), repeat=4):  # seed, step, rank, part
        common.seed_step(*of)
        draws.add(torch.rand(1).item())
    assert len(draws) == 16


@pytest.mark.parametrize("locality", ["", "paper", "official"])
def test_both_branches_of_a_block_are_dropped_by_clip(locality, monkeypatch):
    calls = []
    monkeypatch.setattr(
        common, "drop_path", lambda x, p, training, parts: calls.append((p, training, parts)) or x
    )
    block = common.Block(8, 2, drop_path=0.3, locality=locality)
    block(torch.randn(6, 4, 8), parts=3)
    assert calls == [(0.3, True, 3)] * 2


def test_dropout_acts_where_the_papers_models_have_it(runs_of, corpus, monkeypatch):
    model, rows, cfg = trained("cacophony", runs_of, corpus)
    batch, _ = first_batch("cacophony", cfg, model, rows)
    called = []
    for name, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**batch)
    assert len(called) == len(set(called)) == 3 * len(model.decoder) > 0

    model, rows, cfg = trained("curation_clap", runs_of, corpus)
    model.audio_encoder.block_dropout, calls = 0.25, []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append((p, training)) or x)
    model.train()
    model.clip_embeds(torch.randn(2, 44100 * 5))
    blocks, rest = len(model.audio_encoder.blocks), model.audio_encoder.dropout
    # CNN14's blocks, before and after its last layer, and the projection
    assert calls == [(0.25, True)] * blocks + [(rest, True)] * 3


def test_a_new_text_encoder_of_curation_clap_starts_wide(corpus):
    """D14: a deviation of 1 / sqrt(width)."""
    cfg = config("curation_clap", corpus, "x", text_dim=256)
    model = curation_clap.start_model(cfg, ["a dog barks"])
    query = model.text_encoder.model.encoder.layer[0].attention.self.query.weight
    assert query.std().item() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("method, rate", [("mga_clap", 32000), ("t_clap", 48000)])
def test_the_mel_filters_are_those_of_torchlibrosa(method, rate, runs_of):
    script = importlib.import_module(method)
    model = script.Model.from_checkpoint(runs_of(method)[0] / "best.pt")
    theirs = torchlibrosa.LogmelFilterBank(rate, 1024, 64, 50, 14000, freeze_parameters=True).melW
    assert (model.log_mel.mel_scale.fb - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["mga_clap", "t_clap", "cacophony"])
def test_frames_have_length_1(method, runs_of):
    script = importlib.import_module(method)
    model = script.Model.from_checkpoint(runs_of(method)[0] / "best.pt")
    frames = model.embed_frames(torch.randn(1, 3 * model.sample_rate) * 0.1)[0]
    assert frames.norm(dim=-1) == pytest.approx(np.ones(len(frames)), abs=1e-5)


def test_mga_clap_knows_the_captions_of_one_clip_and_cleans_them(corpus, monkeypatch):
    rows = common.read_manifest([str(corpus)])[:2]
    rows = [{**row, "captions": ["A Dog, barks!", "rain"]} for row in rows]
    cfg = config("mga_clap", corpus, "x")
    pairs = mga_clap.Pairs(rows, cfg, lambda texts: {"texts": texts})
    batch = pairs.collate([pairs[0, i] for i in range(3)])
    assert batch["clip_ids"].tolist() == [0, 0, 1]  # D4
    assert batch["texts"] == ["a dog barks", "rain", "a dog barks"]
    monkeypatch.setattr(
        common, "embed_validation", lambda model, rows, frames, quiet: (rows, None, None)
    )
    monkeypatch.setattr(common, "caption_retrieval", record)
    with pytest.raises(Stop) as stop:
        mga_clap.validate(types.SimpleNamespace(pairwise=False), rows, [])
    assert stop.value.args[0][3] == [["a dog barks", "rain"]] * 2


def test_curation_clap_cleans_captions_in_training_and_curation(corpus):
    row = common.read_manifest([str(corpus)])[0]
    rows = [{**row, "captions": ["a dog, barks"]}, {**row, "captions": ["a dog barks"]}]
    pairs = curation_clap.Pairs([rows], config("curation_clap", corpus, "x"), None, 1.0)
    assert [pairs[0, 0, i][1] for i in range(2)] == ["a dog barks"] * 2
    model = types.SimpleNamespace(embed_text=lambda texts: torch.ones(len(texts), 2))
    captions, described, embeds = curation_clap.read_captions(rows, model)
    assert captions == ["a dog barks"] and len(described[0]) == 2 and embeds.shape == (1, 2)


def test_t_clap_s_validation_counts_a_tie_as_wrong(runs_of, corpus):
    model, rows, _ = trained("t_clap", runs_of, corpus)
    rows = [{**row, "negatives": row["captions"]} for row in rows[:3]]
    assert t_clap.validate(model, rows)[0]["t_classify_t2a"] == 0.0


def test_collat_draws_captions_and_crops_anew_every_epoch(corpus):
    row = {**common.read_manifest([str(corpus)])[0], "captions": ["one", "two"], "labels": []}
    clips = collat.Clips([row], config("collat", corpus, "x"), None)
    assert {clips[epoch, 0][1] for epoch in range(30)} == {"one", "two"}


def test_collat_validates_with_the_prompt_of_its_training(runs_of, corpus):
    folder, result = runs_of("collat")
    flags = [str(folder / "best.pt"), "--data", str(corpus), "--split", "val", "--bootstrap", "0"]
    flags += ["--protocol", "tagging", "--prompt", "collat"]
    (out,) = evaluator.main(evaluator.parse(flags))
    assert out["scores"]["mAP"]["value"] == pytest.approx(result["scores"]["tagging_mAP"], abs=1e-6)


def test_batch_r1_asks_each_clip_and_the_first_of_equal_scores_stays(corpus, tmp_path):
    run = common.Run(config("mga_clap", corpus, tmp_path, name="a", log_steps=1), "mga_clap")
    model = torch.nn.Linear(1, 1)
    optimiser, lines, saved = torch.optim.Adam(model.parameters()), [], []
    run.begin(model, optimiser, 10, 2, "x")
    run.bar = types.SimpleNamespace(update=lambda n=1: 0, set_postfix_str=lambda text: 0)
    run.log, run.save = lines.append, lambda name: saved.append(run.step)
    run.names, run.recent, run.unreadable, run.seen, run.clock = ["x"], [], [], 2, 0.0
    # clip 0 prefers caption 1, clip 1 its own; each caption prefers its own clip or clip 1
    run.step_done(torch.tensor(0.5), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    assert lines[-1]["batch_R@1"] == 0.5
    for run.step, score in enumerate((0.2, 0.9, 0.9), 1):
        run.keep_best(score, {})
    assert saved == [1, 2] and run.best == {"score": 0.9, "step": 2}


def test_a_swapped_scene_has_the_sounds_in_the_other_order():
    tones, rate = {"a": 400, "b": 1300, "c": 3000}, 16000

    def draw_sound(rng):
        label = str(rng.choice(list(tones)))
        return label, label, np.sin(2 * np.pi * tones[label] * np.arange(rate) / rate)

    def heard(waveform):
        """The tones in the order in which each is loudest."""
        parts = np.abs(np.fft.rfft(waveform.reshape(-1, rate // 4), axis=1))
        return sorted(tones, key=lambda name: parts[:, tones[name] // 4].argmax())

    tested = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        waveform, row, swapped = common.make_scene(rng, draw_sound, rate)
        if swapped is not None:
            order = [event["label"] for event in row["events"]]
            played = [name for name in heard(waveform) if name in order]
            assert played == order
            assert [name for name in heard(swapped) if name in order] == order[::-1]
            tested += 1
    assert tested > 5
