"""curation-CLAP: every equation by hand, CNN14 and its mel against other implementations, curation
against slow versions.
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import curation_clap
import eval as evaluator
from conftest import ROOT, config, log_of
from curation_clap import (
    CNN14,
    contrastive_loss,
    soft_divergence,
    soft_labelled_loss,
    soft_targets,
)


def unit(rows, dim, seed=0, dtype=torch.float32):
    return F.normalize(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


# Eq. (1)
def test_eq1_by_hand_and_its_gradient():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]], requires_grad=True)
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    loss = contrastive_loss(logits)
    assert loss.item() == pytest.approx((rows / 2 + columns / 2) / 2, abs=1e-6)
    loss.backward()
    p, q = logits.detach().softmax(1), logits.detach().softmax(0)
    assert torch.allclose(logits.grad, (p + q - 2 * torch.eye(2)) / 4, atol=1e-6)
    assert contrastive_loss(torch.zeros(5, 5)).item() == pytest.approx(math.log(5))


# Eq. (2), (3), (4)
def test_eq2_to_eq4_by_hand_and_negative_cosines_count_as_zero():
    audio = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    text = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.8, 0.6]])
    a2t, t2a = soft_targets(audio, text, 0.3)
    assert torch.allclose(a2t, torch.tensor([[1, 0.18, 0], [0.18, 1, 0], [0, 0, 1.0]]), atol=1e-6)
    assert torch.allclose(t2a, torch.tensor([[1, 0, 0.18], [0, 1, 0], [0.18, 0, 1.0]]), atol=1e-6)
    similar = soft_targets(audio, text, 1.0)  # C_a and C_t alone
    assert torch.allclose(similar[0], torch.tensor([[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1.0]]))
    assert torch.allclose(similar[1], torch.tensor([[1, 0, 0.6], [0, 1, 0], [0.6, 0, 1.0]]))
    hard = soft_targets(audio, text, 0.0)
    assert torch.equal(hard[0], torch.eye(3)) and torch.equal(hard[1], torch.eye(3))


# Eq. (5), and the objective, which has no number
def slow_divergence(logits, target):
    """Loops, and what torch 1.10's kl_div did with a target that is not positive: nothing."""
    B, total = len(logits), 0.0
    for i in range(B):
        norm = math.log(sum(math.exp(x) for x in logits[i].tolist()))
        total += sum(
            t * (math.log(t) - (x - norm))
            for t, x in zip(target[i].tolist(), logits[i].tolist())
            if t > 0
        )
    return total / B


def test_eq5_against_loops_gradient_and_kl_div():
    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    raw = 0.7 * torch.eye(5) + 0.3 * (lambda x: x @ x.T)(unit(5, 3, 1))
    assert (raw < 0).any()
    target = raw.double().clamp(min=0)
    assert soft_divergence(logits, target).item() == pytest.approx(
        slow_divergence(logits.detach(), raw), rel=1e-9
    )
    assert soft_divergence(logits, target).item() == pytest.approx(
        F.kl_div(logits.log_softmax(1), target, reduction="batchmean").item(), rel=1e-9
    )
    assert torch.isnan(
        F.kl_div(logits.log_softmax(1), raw.double(), reduction="batchmean")
    )  # the trap (D6)
    (gradient,) = torch.autograd.grad(soft_divergence(logits, target), logits)
    assert torch.allclose(gradient, (target.sum(1, keepdim=True) * logits.softmax(1) - target) / 5)
    assert torch.autograd.gradcheck(lambda x: soft_divergence(x, target), logits)
    # one query, two answers, by hand: p = (3/4, 1/4), target (1, 1/2)
    by_hand = math.log(4 / 3) + 0.5 * (math.log(0.5) + math.log(4))
    assert soft_divergence(
        torch.tensor([[math.log(3), 0.0]]), torch.tensor([[1.0, 0.5]])
    ).item() == pytest.approx(by_hand, abs=1e-6)


def test_the_objective_pairs_rows_with_clips_and_columns_with_captions():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 3
    a2t, t2a = soft_targets(unit(4, 6, 1), unit(4, 6, 2), 0.3)
    both = (slow_divergence(logits, a2t) + slow_divergence(logits.T, t2a)) / 2
    assert soft_labelled_loss(logits, a2t, t2a).item() == pytest.approx(both, rel=1e-5)
    assert soft_labelled_loss(logits, t2a, a2t).item() != pytest.approx(both, rel=1e-3)
    eye = torch.eye(4)
    assert soft_labelled_loss(logits, eye, eye).item() == pytest.approx(
        contrastive_loss(logits).item(), rel=1e-5
    )  # beta 0 is Eq. (1)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_training_loss_takes_beta_and_each_modality_s_own_teacher(beta, variant):
    audio, text = unit(4, 6, 1), unit(4, 6, 2)
    taught, scale = (unit(4, 6, 3), unit(4, 6, 4)), torch.tensor(400.0)
    cfg = curation_clap.Config(data=[], beta=beta, variant=variant)
    logits = audio @ text.T * scale
    if variant == "official":
        logits = logits.clamp(max=100)  # D2
    a2t, t2a = ((1 - beta) * torch.eye(4) + beta * x @ x.T for x in taught)  # Eq. (2) to (4)
    both = (slow_divergence(logits, a2t) + slow_divergence(logits.T, t2a)) / 2
    loss, sim = curation_clap.training_loss(cfg, audio, text, scale, taught)
    assert loss.item() == pytest.approx(both, rel=1e-4) and torch.equal(sim, audio @ text.T)
    hard = curation_clap.training_loss(cfg, audio, text, scale)[0]
    assert hard.item() == pytest.approx(
        F.cross_entropy(logits, torch.arange(4)).item() / 2
        + F.cross_entropy(logits.T, torch.arange(4)).item() / 2,
        rel=1e-5,
    )
    assert (logits == 100).any() == (variant == "official")


def test_soft_labels_are_finite_with_gradients_for_opposite_embeddings_and_a_large_scale():
    audio = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    text = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    cfg = curation_clap.Config(data=[])
    loss, _ = curation_clap.training_loss(
        cfg, audio, text, torch.tensor(1 / 0.007), (audio.detach(), text.detach())
    )
    loss.backward()
    assert (
        torch.isfinite(loss)
        and torch.isfinite(audio.grad).all()
        and loss.item() == pytest.approx(2 / 0.007, rel=1e-4)
    )


# CNN14
def paper_size_without_memory() -> CNN14:
    mel = common.LogMel(44100)
    with torch.device("meta"), mock.patch.object(common, "LogMel", lambda *args: mel):
        return CNN14()


def test_cnn14_has_the_published_number_of_parameters():
    encoder = paper_size_without_memory()
    assert (
        sum(p.numel() for p in encoder.parameters()) == 80_753_615
    )  # PANNs: 80.8 M with its head of 527


def panns_names(encoder: CNN14, melW=None) -> dict:
    """A state dict as PANNs' files have it, with the Fourier matrices of torchlibrosa."""
    import torchlibrosa

    stft = torchlibrosa.stft.Spectrogram(
        n_fft=1024, hop_length=320, win_length=1024, window="hann", center=True, pad_mode="reflect"
    )
    state = {f"spectrogram_extractor.{k}": v for k, v in stft.state_dict().items()}
    for key, value in encoder.state_dict().items():
        state[key.replace("log_mel.mel_scale.fb", "logmel_extractor.melW")] = value.clone()
    if melW is not None:
        state["logmel_extractor.melW"] = melW
    return state


def randomise(module):
    g = torch.Generator().manual_seed(5)
    for name, value in module.state_dict().items():
        if "running_var" in name or name.endswith("bn0.weight"):
            value.copy_(torch.rand(value.shape, generator=g) + 0.5)
        elif value.is_floating_point() and "mel_scale" not in name:
            value.copy_(torch.randn(value.shape, generator=g) * 0.1)


def slow_cnn14(state: dict, waveform, hop: int, n_blocks: int):
    """PANNs' forward, with torchlibrosa's front end and running batch statistics."""
    import torchlibrosa

    power = torchlibrosa.stft.Spectrogram(
        n_fft=1024,
        hop_length=hop,
        win_length=1024,
        window="hann",
        center=True,
        pad_mode="reflect",
        freeze_parameters=True,
    )(waveform)
    x = 10 * torch.log10(
        torch.clamp(power @ state["logmel_extractor.melW"], min=1e-10)
    )  # (B, 1, T_mel, M)

    def norm(x, name):
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"],
            state[f"{name}.running_var"],
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    x = norm(x.transpose(1, 3), "bn0").transpose(1, 3)
    for i in range(1, n_blocks + 1):
        for k in (1, 2):
            x = torch.relu(
                norm(
                    F.conv2d(x, state[f"conv_block{i}.conv{k}.weight"], padding=1),
                    f"conv_block{i}.bn{k}",
                )
            )
        x = F.avg_pool2d(x, 1 if i == n_blocks else 2)
    x = torch.mean(x, dim=3)
    x = torch.max(x, dim=2)[0] + torch.mean(x, dim=2)
    return torch.relu(F.linear(x, state["fc1.weight"], state["fc1.bias"]))


@torch.no_grad()
def test_cnn14_equals_a_plain_version_and_the_mel_of_the_file_is_the_one_used(tmp_path):
    import torchlibrosa

    torch.manual_seed(0)
    made = CNN14([4, 6, 8]).eval()
    randomise(made)
    of_32k = torch.from_numpy(
        torchlibrosa.stft.LogmelFilterBank(
            sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000
        ).melW.numpy()
    )
    waveform = 0.1 * torch.randn(2, 30000)
    for melW, told in (
        (None, "that of 44100 Hz"),
        (of_32k, "that of 32000 Hz"),
        (of_32k * 0.5, "of no known rate"),
    ):
        state = panns_names(made, melW)
        loaded = CNN14([4, 6, 8]).eval()
        common.load_strict(loaded, curation_clap.published_state(state), "x")
        assert loaded.mel_rate() == told
        assert torch.allclose(
            loaded(waveform), slow_cnn14(state, waveform, 320, 3), rtol=1e-3, atol=1e-4
        )
    # stored in our checkpoints too
    again = CNN14([4, 6, 8])
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.log_mel.mel_scale.fb, of_32k * 0.5)


def test_panns_names_and_paper_shapes_load_strictly_and_wrong_ones_are_named():
    encoder = paper_size_without_memory()
    shapes = {
        k.replace("log_mel.mel_scale.fb", "logmel_extractor.melW"): tuple(v.shape)
        for k, v in encoder.state_dict().items()
    }
    expected = {
        "logmel_extractor.melW": (513, 64),
        "bn0.running_mean": (64,),
        "conv_block1.conv1.weight": (64, 1, 3, 3),
        "conv_block6.bn2.num_batches_tracked": (),
        "conv_block6.conv2.weight": (2048, 2048, 3, 3),
        "fc1.weight": (2048, 2048),
        "fc_audioset.weight": (527, 2048),
        "fc_audioset.bias": (527,),
    }
    assert {k: shapes[k] for k in expected} == expected and len(shapes) == 1 + 5 + 6 * 12 + 4
    small = CNN14([2, 3])
    state = panns_names(small)
    state["extra"] = state.pop("fc1.bias")
    with pytest.raises(
        ValueError, match=r"missing keys: 1 \(fc1.bias\); unexpected keys: 1 \(extra\)"
    ):
        common.load_strict(small, curation_clap.published_state(state), "file.pth")


@torch.no_grad()
def test_ms_clap_file_is_recognised_by_its_keys_and_loads_strictly(tmp_path, monkeypatch):
    """MS-CLAP 2022's names; small, by a smaller default of channels and of BERT."""
    import transformers

    monkeypatch.setattr(CNN14.__init__, "__defaults__", ((4, 6), 320, 0.2, 0.5))
    monkeypatch.setattr(curation_clap.Model.__init__, "__defaults__", (None, 16, 5.0, 0.007))
    tokenizer = common.text_encoder_from_scratch(["a dog barks"], 64, 1, 1, 30).tokenizer
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    bert.save_pretrained(tmp_path / "bert"), tokenizer.save_pretrained(tmp_path / "bert")
    encoder = CNN14()
    randomise(encoder)
    state = {f"audio_encoder.base.{k}": v for k, v in panns_names(encoder).items()}
    state |= {f"caption_encoder.base.{k}": v for k, v in bert.state_dict().items()}
    state["caption_encoder.base.embeddings.position_ids"] = torch.arange(512)[None]
    for side, dim in (("audio", 6), ("caption", 24)):
        projection = nn.ModuleDict(
            {
                "linear1": nn.Linear(dim, 16, bias=False),
                "linear2": nn.Linear(16, 16, bias=False),
                "layer_norm": nn.LayerNorm(16),
            }
        )
        state |= {f"{side}_encoder.projection.{k}": v for k, v in projection.state_dict().items()}
    state["logit_scale"] = torch.tensor(3.3)
    torch.save({"model": state, "epoch": 1}, tmp_path / "CLAP_weights_2022.pth")
    model = evaluator.load_model(tmp_path / "CLAP_weights_2022.pth", str(tmp_path / "bert"))
    assert (
        isinstance(model, curation_clap.Model)
        and model.log_scale.item() == pytest.approx(3.3)
        and model.sample_rate == 44100
        and model.clean_caption("A dog, barks_") == "A dog, barks_"  # as Microsoft's wrapper
    )
    # the forward of a clip and a caption, written out
    waveform = 0.1 * torch.randn(1, 220500)
    part = {k.removeprefix("audio_encoder.base."): v for k, v in state.items()}
    e1 = slow_cnn14(part, waveform, 320, 2) @ state["audio_encoder.projection.linear1.weight"].T
    e2 = F.gelu(e1) @ state["audio_encoder.projection.linear2.weight"].T

    def norm(x, side):
        return F.layer_norm(
            x,
            (16,),
            state[f"{side}_encoder.projection.layer_norm.weight"],
            state[f"{side}_encoder.projection.layer_norm.bias"],
        )

    assert torch.allclose(
        model.embed_audio(waveform), F.normalize(norm(e1 + e2, "audio"), dim=-1), atol=1e-4
    )
    tokens = tokenizer(["a dog"], return_tensors="pt")
    e1 = (
        bert.eval()(tokens["input_ids"]).last_hidden_state[:, 0]
        @ state["caption_encoder.projection.linear1.weight"].T
    )
    e2 = F.gelu(e1) @ state["caption_encoder.projection.linear2.weight"].T
    assert torch.allclose(
        model.embed_text(["a dog"]), F.normalize(norm(e1 + e2, "caption"), dim=-1), atol=1e-5
    )
    # and it starts a teacher
    cfg = common.configure(
        curation_clap.Config,
        data=["x"],
        weights=str(tmp_path / "CLAP_weights_2022.pth"),
        text_model=str(tmp_path / "bert"),
    )
    assert torch.equal(
        curation_clap.start_model(cfg, []).audio_encoder.fc1.weight, encoder.fc1.weight
    )
    torch.save(
        {"model": panns_names(encoder)}, tmp_path / "Cnn14.pth"
    )  # PANNs' own: the audio encoder only
    cfg.weights, cfg.audio_weights = "none", str(tmp_path / "CLAP_weights_2022.pth")
    with pytest.raises(ValueError, match="2022.pth: a whole model; give it as --weights"):
        curation_clap.start_model(cfg, [])
    cfg.audio_weights, cfg.audio_channels, cfg.joint_dim = str(tmp_path / "Cnn14.pth"), [4, 6], 16
    started = curation_clap.start_model(cfg, [])
    assert torch.equal(
        started.audio_encoder.fc1.weight, encoder.fc1.weight
    ) and started.log_scale.exp().item() == pytest.approx(1 / 0.007, rel=1e-4)
    state.pop("logit_scale")
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"missing keys: 1 \(log_scale\)"):
        curation_clap.Model.from_published(tmp_path / "bad.pth", str(tmp_path / "bert"))


def small_model():
    torch.manual_seed(0)
    text = common.text_encoder_from_scratch(["a dog barks loudly", "rain"], 64, 1, 1, 100)
    return curation_clap.Model(text, dict(channels=[4, 6, 8], hop=1024, dropout=0.5), 16).eval()


def test_short_clips_are_repeated_long_ones_windowed_and_padding_is_not_heard():
    model = small_model()
    x = 0.1 * torch.randn(2, 441000, generator=torch.Generator().manual_seed(1))
    short = x[:1, :50000]
    repeated = torch.cat([short] * 5, 1)[:, :220500]
    assert (model.embed_audio(short) - model.embed_audio(repeated)).abs().max() < 1e-6
    n = torch.tensor([50000, 441000])
    batch = x.clone()
    batch[0, 50000:] = 9.0  # behind a clip's end
    batch[0, :50000] = short
    together = model.embed_audio(batch, n)
    assert (together[0] - model.embed_audio(short)[0]).abs().max() < 1e-5
    halves = [model.embed_audio(x[1:2, i : i + 220500]) for i in (0, 220500)]
    assert (together[1] - F.normalize(halves[0] + halves[1], dim=-1)[0]).abs().max() < 1e-5
    model.train()
    assert torch.equal(together, model.embed_audio(batch, n)) and model.training
    assert model.embed_audio(torch.full((1, 3), 0.1)).isfinite().all()


def test_captions_are_cleaned_as_in_the_code():
    assert (
        curation_clap.clean_caption(' Dog_barks, then\nrain* <a href="x">link</a> $5 ')
        == "Dog barks then rain 5"
    )
    assert (
        curation_clap.clean_caption("<a href='x'>only a link</a>") == "<a href='x'>only a link</a>"
    )


def test_crops_zero_padding_and_the_official_place(corpus):
    import soundfile as sf

    path = corpus / "audio/short.wav"
    sf.write(path, np.full(44100, 0.5), 44100, subtype="FLOAT")
    for variant in ("paper", "official"):
        cfg = curation_clap.Config(data=[], variant=variant)
        pairs = curation_clap.Pairs(
            [[{"audio": str(path), "captions": ["x", "y"]}]], cfg, None, 5.0
        )
        assert [pairs[0, 0, i][1] for i in (0, 1)] == ["x", "y"]
        starts = {int(np.flatnonzero(pairs[0, epoch, 0][0])[0]) for epoch in range(3)}
        assert starts == {0} if variant == "paper" else len(starts) == 3
        assert all(len(pairs[0, epoch, 0][0]) == 220500 for epoch in range(3))
    sf.write(path, np.arange(441001) / 441001, 44100, subtype="FLOAT")
    centre = curation_clap.Pairs(
        [[{"audio": str(path), "captions": ["x"]}]], cfg, None, 5.0, centre=True
    )[0, 0, 0][0]
    assert centre[0] == pytest.approx(0.25, abs=1e-4)
    path.unlink()


# Batches
def test_whole_batches_come_from_replay_with_its_probability_and_resume_anywhere():
    steps = list(curation_clap.mixed_batches([10, 7], 3, 0.25, 0, 0, 400))
    groups = [{g for g, _, _ in batch} for batch in steps]
    assert all(len(g) == 1 for g in groups) and 0.2 < np.mean([g == {0} for g in groups]) < 0.3
    for group, size in ((0, 10), (1, 7)):
        own = [batch for batch in steps if batch[0][0] == group]
        for epoch in range(5):
            seen = [i for batch in own for _, e, i in batch if e == epoch]
            assert len(seen) == len(set(seen)) == size // 3 * 3
    assert list(curation_clap.mixed_batches([10, 7], 3, 0.25, 0, 123, 400)) == steps[123:]
    assert {
        g for batch in curation_clap.mixed_batches([5], 3, 0.5, 0, 0, 20) for g, _, _ in batch
    } == {0}


# Curation
def fp16(rows, dim, seed):
    return unit(rows, dim, seed).numpy().astype(np.float16)


def slow_pairs(audio, text, threshold, top_k):
    out = []
    for i, a in enumerate(audio):
        scored = sorted(
            (-float(a.astype(np.float64) @ t.astype(np.float64)), q) for q, t in enumerate(text)
        )
        chosen = scored[:top_k] if top_k else [x for x in scored if -x[0] >= threshold]
        out += [(i, q, -c) for c, q in chosen]
    return out


@pytest.mark.parametrize("threshold, top_k", [(0.3, 0), (-1.1, 0), (0.0, 1), (0.0, 5), (0.0, 999)])
def test_selection_equals_a_slow_version(threshold, top_k):
    audio, text = fp16(37, 24, 0), fp16(90, 24, 1)
    expected = slow_pairs(audio, text, threshold, top_k)
    row, caption, cosine = curation_clap.similar_pairs(audio, text, threshold, top_k)
    assert list(zip(row.tolist(), caption.tolist())) == [(i, q) for i, q, _ in expected]
    assert cosine == pytest.approx([c for _, _, c in expected], abs=1e-6)


def test_equal_captions_stand_in_their_order_and_blocks_change_no_pair():
    audio, text = fp16(300, 24, 0), fp16(20_000, 24, 1)  # more than one product of rows
    text[400:600], audio[7] = (
        text[3],
        text[3],
    )  # many equal captions, and a clip that is one of them
    row, caption, _ = curation_clap.similar_pairs(audio, text, 0.6)
    equal = caption[row == 7][:201].tolist()
    assert equal == [3, *range(400, 600)]
    parts = [curation_clap.similar_pairs(audio[i : i + 77], text, 0.6) for i in range(0, 300, 77)]
    assert np.array_equal(np.concatenate([part[1] for part in parts]), caption)


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="NaN or infinite; the teacher is broken"):
        curation_clap.half(np.array([[1.0, np.nan]], np.float32))


def test_domain_captions_by_the_nearest_prompt():
    prompts, text = fp16(4, 16, 0), fp16(50, 16, 1)
    sim = text.astype(np.float64) @ prompts.astype(np.float64).T
    chosen, nearness = curation_clap.near_labels(prompts, text, 0.3, 0)
    assert chosen.tolist() == np.flatnonzero(
        sim.max(1) >= 0.3
    ).tolist() and nearness == pytest.approx(sim.max(1)[chosen])
    chosen, _ = curation_clap.near_labels(prompts, text, 0.0, 3)
    assert chosen.tolist() == sorted(
        {q for column in sim.T for q in np.argsort(-column)[:3].tolist()}
    )


ORDER = [q for i in range(40) for q in ([i, i + 40] if i < 20 else [i])]  # captions, by clip


@pytest.fixture(scope="module")
def embeds(tmp_path_factory):
    """A teacher, a pool and captioned clips, all without audio, and embeddings for both."""
    folder = tmp_path_factory.mktemp("embeds")
    model = small_model()
    common.save_checkpoint(
        folder / "teacher.pt",
        {
            "method": "curation_clap",
            "config": {},
            "shape": model.shape,
            "model": model.state_dict(),
            "text_encoder": model.text_encoder.description(),
        },
    )
    np.save(folder / "audio.npy", unit(520, 16, 3).numpy())
    np.save(folder / "text.npy", unit(62, 16, 5).numpy())
    # clips and captions of the other splits are never curated
    splits = ["train"] * 500 + ["val"] * 10 + ["test"] * 10
    rows = [{"audio": f"/pool/{i}.wav", "split": split} for i, split in enumerate(splits)]
    common.write_lines(folder / "pool.jsonl", map(json.dumps, rows))
    told = [[i, i + 40] if i < 20 else [i, 3] if i == 20 else [i] for i in range(40)]
    rows = [
        {
            "audio": f"/told/{i}.wav",
            "captions": [f"caption number {q}" for q in of_clip],
            "split": "train" if i < 40 else ["val", "test"][i - 40],
        }
        for i, of_clip in enumerate([*told, [60], [61]])
    ]
    common.write_lines(folder / "told.jsonl", map(json.dumps, rows))
    (folder / "classes.txt").write_text("Dog_bark\nrain/storm\n")
    return folder


def curated(embeds, runs, name, **overrides):
    """Curate without audio: the embedding of a clip or caption is the one of its number."""
    audio, text = np.load(embeds / "audio.npy"), np.load(embeds / "text.npy")
    embed_texts = common.embed_texts

    def of_block(model, rows, *_):
        numbers = [int(Path(row["audio"]).stem) for row in rows]
        return np.arange(len(rows)), curation_clap.half(audio[numbers]), []

    def of_texts(model, texts):
        if not texts[0].startswith("caption number"):
            return embed_texts(model, texts)  # of the prompts
        return text[[int(caption.split()[-1]) for caption in texts]]

    flags = dict(
        stage="curate",
        name=name,
        teacher=str(embeds / "teacher.pt"),
        pool=[str(embeds / "pool.jsonl")],
        labels=[str(embeds / "classes.txt")],
        top_k=0,
        ds_top_k=0,
        threshold=0.4,
        ds_threshold=0.1,
    )
    cfg = config("curation_clap", embeds / "told.jsonl", runs, **{**flags, **overrides})
    with (
        mock.patch.object(curation_clap, "embed_block", of_block),
        mock.patch.object(common, "embed_texts", of_texts),
    ):
        curation_clap.main(cfg)
    return None if cfg.dry_run else (runs / name / f"{cfg.curation}.jsonl").read_bytes()


def test_du_ds_and_ads_equal_a_slow_version(embeds, tmp_path, capsys):
    audio = curation_clap.half(np.load(embeds / "audio.npy")[:500])
    text = curation_clap.half(np.load(embeds / "text.npy")[ORDER])
    model = curation_clap.Model.from_checkpoint(embeds / "teacher.pt")
    prompts = curation_clap.half(
        model.embed_text(["this is a sound of dog bark", "this is a sound of rain storm"]).numpy()
    )
    near = (text.astype(np.float64) @ prompts.astype(np.float64).T).max(1)
    domain = np.flatnonzero(near >= 0.1)
    assert 0 < len(domain) < 60

    def read(data):
        return [
            (r["audio"], c, s)
            for r in map(json.loads, data.decode().splitlines())
            for c, s in zip(r["captions"], r["similarity"])
        ]

    def caption(place):
        return f"caption number {ORDER[place]}"

    du = read(curated(embeds, tmp_path, "du", curation="du"))
    assert du == [
        (f"/pool/{i}.wav", caption(q), round(c, 4)) for i, q, c in slow_pairs(audio, text, 0.4, 0)
    ]
    ads = read(curated(embeds, tmp_path, "ads"))
    assert ads == [
        (f"/pool/{i}.wav", caption(domain[q]), round(c, 4))
        for i, q, c in slow_pairs(audio, text[domain], 0.4, 0)
    ]
    top = read(curated(embeds, tmp_path, "top", curation="du", top_k=3))
    assert top == [
        (f"/pool/{i}.wav", caption(q), round(c, 4)) for i, q, c in slow_pairs(audio, text, 0, 3)
    ]
    ds = read(curated(embeds, tmp_path, "ds", curation="ds"))
    owners = [(q % 40, place) for place, q in enumerate(ORDER)] + [(20, ORDER.index(3))]
    expected = [
        (f"/told/{clip}.wav", caption(place), round(float(near[place]), 4))
        for clip, place in owners
        if near[place] >= 0.1
    ]
    assert sorted(ds) == sorted(expected) and ds == read(
        (tmp_path / "ads/ads_replay.jsonl").read_bytes()
    )
    assert common.read_manifest([str(tmp_path / "ads/ads.jsonl")])[0][
        "similarity"
    ]  # a key of the contract
    capsys.readouterr()
    curated(embeds, tmp_path, "dry", dry_run=True)
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith("       0.40 "))
    sim = audio.astype(np.float32) @ text[domain].astype(np.float32).T
    assert row[1] == f"{(sim >= 0.4).sum():,}" and row[2] == f"{(sim >= 0.4).any(1).sum():,}"
    assert not (tmp_path / "dry/ads.jsonl").exists() and "class prompts" in out


def test_the_manifest_does_not_depend_on_block_processes_or_a_kill(embeds, tmp_path, monkeypatch):
    whole = curated(embeds, tmp_path, "whole", block=8192)
    assert curated(embeds, tmp_path, "small", block=32) == whole
    write, calls, runs = curation_clap.write_pairs, [], tmp_path / "other"

    def stops(path, pairs):
        calls.append(path)
        if len(calls) == 6:  # the replay's pairs, four blocks, and half of the next one
            path.with_name(path.name + ".tmp").write_text("half a bl")
            raise KeyboardInterrupt
        write(path, pairs)

    monkeypatch.setattr(curation_clap, "write_pairs", stops)
    with pytest.raises(KeyboardInterrupt):
        curated(embeds, runs, "killed", block=32)
    held = {path: path.stat().st_mtime_ns for path in (runs / "embeds").glob("*.npz")}
    assert len(held) == 5
    assert curated(embeds, runs, "killed", block=32) == whole
    now = {path: path.stat().st_mtime_ns for path in (runs / "embeds").glob("*.npz")}
    # 500 clips in blocks of 32; no block is embedded twice
    assert len(now) == 16 and held.items() <= now.items()
    # other settings, the first ones again, and a smaller pool: nothing is left of another curation
    assert curated(embeds, runs, "killed", block=32, threshold=0.5) != whole
    assert curated(embeds, runs, "killed", block=32) == whole
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join((embeds / "pool.jsonl").read_text().splitlines(True)[:100]))
    few = curated(embeds, runs, "killed", block=32, pool=[str(pool)])
    lines = whole.splitlines(True)
    assert few.splitlines(True) == [
        x for x in lines if int(Path(json.loads(x)["audio"]).stem) < 100
    ]


TWO_CURATIONS = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import test_equations_curation_clap as tests
tests.curated(Path({embeds!r}), Path({runs!r}), "two", block=32)
"""


def test_two_processes_take_the_blocks_in_turn(embeds, tmp_path):
    whole = curated(embeds, tmp_path, "whole")
    script = tmp_path / "two.py"
    given = dict(root=str(ROOT), embeds=str(embeds), runs=str(tmp_path))
    script.write_text(TWO_CURATIONS.format(**given))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    # only the first process has the manifest at the end
    assert (tmp_path / "two/ads.jsonl").read_bytes() == whole, done.stderr[-3000:]
    assert len(list((tmp_path / "two/curation").glob("*.jsonl"))) == 16


def test_replaced_vanished_and_returned_sounds_are_noticed(corpus, tmp_path, runs_of, monkeypatch):
    data = tmp_path / "pool"
    shutil.copytree(corpus, data)
    teacher = str(runs_of("curation_clap")[0] / "teacher.pt")
    flags = dict(stage="curate", name="a", teacher=teacher, pool=[str(data)], max_bad=0.5, block=4)
    embedded, embed_block = [], curation_clap.embed_block

    def counted(model, rows, *args):
        embedded.append(len(rows))
        return embed_block(model, rows, *args)

    def again():
        embedded.clear()
        curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
        rows = common.read_manifest([str(tmp_path / "a/ads.jsonl")])
        return {Path(row["audio"]).name: row["captions"] for row in rows}

    monkeypatch.setattr(curation_clap, "embed_block", counted)
    first = again()
    assert len(first) == 12 and embedded == [4, 4, 4]
    assert again() == first and embedded == []
    away = (data / "audio/train5.wav").rename(tmp_path / "train5.wav")
    assert set(first) - set(again()) == {"train5.wav"} and embedded == [4]  # its block alone
    assert "train5.wav: file not found" in (tmp_path / "a/skipped.txt").read_text()
    away.rename(data / "audio/train5.wav")
    assert again() == first and embedded == []  # as it was
    shutil.copy(data / "audio/train0.wav", data / "audio/train5.wav")
    changed = again()
    assert embedded == [4] and changed["train5.wav"] == first["train0.wav"]


def test_audio_is_embedded_once_and_unreadable_clips_are_counted(
    corpus, tmp_path, runs_of, monkeypatch
):
    import shutil

    data = tmp_path / "pool"
    shutil.copytree(corpus, data)
    (data / "audio/train3.wav").write_text("broken")
    teacher = str(runs_of("curation_clap")[0] / "teacher.pt")
    flags = dict(stage="curate", name="a", teacher=teacher, pool=[str(data)], max_bad=0.1)
    curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    rows = common.read_manifest([str(tmp_path / "a/ads.jsonl")])
    assert len(rows) == 11 and all(
        len(r["captions"]) == 2 for r in rows
    )  # top 2; test and val rows are not in the pool
    assert [
        line.split(": ")[0].rpartition("/")[2]
        for line in (tmp_path / "a/skipped.txt").read_text().splitlines()
    ] == ["train3.wav"]
    monkeypatch.setattr(
        curation_clap, "embed_block", None
    )  # another run of the same teacher and pool embeds nothing
    curation_clap.main(
        config(
            "curation_clap",
            corpus,
            tmp_path,
            **{**flags, "name": "b", "curation": "du", "top_k": 1},
        )
    )
    assert len(common.read_manifest([str(tmp_path / "b/du.jsonl")])) == 11
    with pytest.raises(ValueError, match="1 of 12 clips could not be used, more than --max-bad 2%"):
        curation_clap.main(
            config("curation_clap", corpus, tmp_path, **{**flags, "name": "c", "max_bad": 0.02})
        )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(teacher=""), "run --stage teacher --name x first, or give --teacher"),
        (dict(threshold=0.9999), "--threshold 0.9999: no clip of the pool is that close to any of"),
        (
            dict(ds_threshold=0.9999),
            "--ds-threshold 0.9999: no caption is that near to a class prompt",
        ),
        (dict(pool=["gone"]), "gone: no such manifest"),
        (dict(labels=["gone.txt"]), "--labels gone.txt: no such file; expected one class a line"),
        (dict(pool=[], pool_share=0.0), "pairs captions with unlabelled audio; give --pool"),
        (dict(beta=1.5), "--beta 1.5: expected"),
    ],
)
def test_bad_input_is_one_sentence(embeds, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        curated(embeds, tmp_path, "x", **overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(pool_share=0.0), "pairs captions with unlabelled audio; give --pool"),
        (dict(pool=["gone.jsonl"]), "gone.jsonl: no such manifest"),
        (dict(labels=["gone.txt"]), "--labels gone.txt: no such file"),
    ],
)
def test_what_a_curation_lacks_is_said_before_the_teacher_is_trained(
    corpus, tmp_path, overrides, message
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        curation_clap.main(config("curation_clap", corpus, tmp_path, name="x", **overrides))
    assert not (tmp_path / "x").exists()


def test_a_finished_run_is_refused_before_its_manifests_are_touched(corpus, runs_of):
    folder, _ = runs_of("curation_clap")
    names = ("ads.jsonl", "ads_replay.jsonl", "log.jsonl")
    before = [(folder / name).stat().st_mtime_ns for name in names]
    with pytest.raises(FileExistsError, match="already holds a run"):
        curation_clap.main(
            config(
                "curation_clap",
                corpus,
                folder.parent,
                name="a",
                teacher=str(folder / "teacher.pt"),
                curation="du",
            )
        )
    for flags in (dict(stage="curate"), dict(stage="student")):
        with pytest.raises(FileExistsError, match="already holds a run"):
            curation_clap.main(config("curation_clap", corpus, folder.parent, name="a", **flags))
    assert [(folder / name).stat().st_mtime_ns for name in names] == before
    # a student never learns from the pairs of another curation
    student = dict(name="a", stage="student", curation="du")
    cfg = config("curation_clap", corpus, folder.parent, **student)
    with pytest.raises(FileNotFoundError, match="du.jsonl: no such manifest; run --stage curate"):
        curation_clap.student_sets(cfg, folder, {"train": []})


def test_what_a_student_learns_from_and_replays(corpus, tmp_path):
    """The replay comes first, where there is one (D9)."""
    for name in ("du", "ds", "ads", "ads_replay"):
        row = json.dumps({"audio": f"/{name}.wav", "captions": [name]})
        common.write_lines(tmp_path / f"{name}.jsonl", [row])

    def sets(**overrides):
        cfg = config("curation_clap", corpus, tmp_path, stage="student", **overrides)
        train = [{"audio": "/told.wav"}]
        learnt = curation_clap.student_sets(cfg, tmp_path, {"train": train})
        return [Path(row["audio"]).stem for (row,) in learnt]

    assert sets() == ["ads_replay", "ads"] and sets(replay=False) == ["ads"]
    assert sets(curation="du") == ["told", "du"] and sets(curation="du", replay=False) == ["du"]
    assert sets(curation="ds") == ["ds"] and sets(curation="none") == ["told"]


def test_chance_of_the_validation_loss_is_what_equal_cosines_give(corpus, runs_of):
    folder, result = runs_of("curation_clap")
    model, cfg = (
        curation_clap.Model.from_checkpoint(folder / "best.pt"),
        config("curation_clap", corpus, "x"),
    )
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "val"]
    held_out = curation_clap.Pairs(
        [rows], cfg, model.text_encoder.tokenize, model.window_s, centre=True
    )
    n = min(cfg.batch_size, len(held_out.sets[0]))
    run = common.Run(cfg, "curation_clap")
    hard = curation_clap.validation_loss(cfg, run, model, None, held_out)[1]
    assert hard == pytest.approx(math.log(n), abs=1e-6)
    teacher = curation_clap.Model.from_checkpoint(folder / "teacher.pt")
    with torch.no_grad():
        order = np.random.default_rng(0).permutation(len(held_out.sets[0])).tolist()
        part = held_out.collate([held_out[0, 0, i] for i in order[:n]])
        targets = curation_clap.soft_targets(*teacher(**part)[:2], cfg.beta)
    assert len(held_out.sets[0]) < 2 * n  # one batch
    divergence = (
        sum(
            t * (math.log(t) + math.log(n))
            for target in targets
            for t in target.flatten().tolist()
            if t > 0
        )
        / n
        / 2
    )
    loss = curation_clap.validation_loss(cfg, run, model, None, held_out)[0]
    with torch.no_grad():
        logits = model.embed_audio(part["waveform"]) @ model(**part)[1].T * model.log_scale.exp()
    assert loss == pytest.approx(contrastive_loss(logits).item(), rel=1e-4)
    assert result["chance"]["val_loss"] == pytest.approx(
        divergence, rel=1e-4
    ) and divergence > math.log(n)
    one = [{**rows[0], "captions": rows[0]["captions"][:1]}]
    one = curation_clap.Pairs([one], cfg, model.text_encoder.tokenize, model.window_s, centre=True)
    with pytest.raises(ValueError, match="no batch of two or more validation pairs"):
        curation_clap.validation_loss(cfg, run, model, None, one)


def test_a_block_without_a_readable_clip_is_counted_and_a_dry_run_may_draw_none(
    corpus, tmp_path, runs_of, monkeypatch, capsys
):
    data = tmp_path / "pool"
    shutil.copytree(corpus, data)
    (data / "audio/train11.wav").unlink()  # the last of 12, a block of its own below
    teacher = str(runs_of("curation_clap")[0] / "teacher.pt")
    flags = dict(stage="curate", name="a", teacher=teacher, pool=[str(data)], max_bad=0.5, block=11)
    curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    assert len(common.read_manifest([str(tmp_path / "a/ads.jsonl")])) == 11
    assert "train11.wav: file not found" in (tmp_path / "a/skipped.txt").read_text()
    # equal blocks of missing files are not taken for one another
    for i in (0, 1, 4, 5):
        (data / f"audio/train{i}.wav").unlink()
    curation_clap.main(config("curation_clap", corpus, tmp_path, **flags | dict(name="b", block=2)))
    errors = (tmp_path / "b/skipped.txt").read_text().splitlines()
    missing = sorted(Path(line.split(":")[0]).stem for line in errors)
    assert missing == [f"train{i}" for i in (0, 1, 11, 4, 5)]
    for i in (0, 1, 4, 5):
        shutil.copy(corpus / f"audio/train{i}.wav", data / "audio")
    monkeypatch.setattr(curation_clap, "SAMPLE_CLIPS", 1)
    flags |= dict(name="dry", block=2, dry_run=True)
    curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    assert "Cosines of 1 of 12 clips of the pool" in capsys.readouterr().out
    shutil.rmtree(data / "audio")
    with pytest.raises(ValueError, match="no clip of the pool's sample can be read"):
        curation_clap.main(config("curation_clap", corpus, tmp_path, **flags))
    assert "1 clips of the sample cannot be used; first: " in capsys.readouterr().out


# Stages
def test_a_run_writes_teacher_manifests_student_and_a_log_of_all_stages(runs_of):
    folder, result = runs_of("curation_clap")
    lines = log_of(folder)
    assert [x["stage"] for x in lines] == ["teacher"] * 4 + ["curate"] + ["student"] * 4
    assert {"loss", "ln_B", "batch_R@1", "scale", "lr", "pairs_per_s"} <= set(lines[0]) and result[
        "stage"
    ] == "student"
    assert {p.name for p in folder.iterdir()} >= {
        "teacher.pt",
        "best.pt",
        "last.pt",
        "ads.jsonl",
        "ads_replay.jsonl",
        "eval.json",
    }
    content = {
        name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("teacher", "best")
    }
    assert [content[name]["stage"] for name in ("teacher", "best")] == ["teacher", "student"]
    assert torch.equal(
        content["best"]["model"]["audio_encoder.log_mel.mel_scale.fb"],
        content["teacher"]["model"]["audio_encoder.log_mel.mel_scale.fb"],
    )


@pytest.mark.parametrize(
    "overrides",
    [
        dict(curation="du", soft_labels=False),
        dict(curation="ds", variant="official", micro_batch=4),
        dict(replay=False),
    ],
    ids=str,
)
def test_every_student_goes_on_from_a_given_teacher(corpus, tmp_path, runs_of, overrides):
    teacher = runs_of("curation_clap")[0] / "teacher.pt"
    before = hashlib.sha256(teacher.read_bytes()).hexdigest()
    result = curation_clap.main(
        config(
            "curation_clap",
            corpus,
            tmp_path,
            name="s",
            teacher=str(teacher),
            student_epochs=1,
            lr=1e-6,
            **overrides,
        )
    )
    assert (
        np.isfinite(result["scores"]["val_loss"])
        and hashlib.sha256(teacher.read_bytes()).hexdigest() == before
    )
    weights = [
        torch.load(p, weights_only=True)["model"]["audio_encoder.fc1.weight"]
        for p in (teacher, tmp_path / "s/best.pt")
    ]
    assert 0 < (weights[0] - weights[1]).abs().max() < 1e-4  # the student starts from it
    assert not list((tmp_path / "s").glob("teacher.pt"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        curation_clap.main(
            config(
                "curation_clap",
                corpus,
                tmp_path,
                name="s",
                stage="student",
                teacher=str(teacher),
                **overrides,
            )
        )


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(stage="teacher", teacher="t.pt"), "--weights is what it starts from"),
        (dict(stage="curate", curation="none"), "there is nothing to curate"),
        (dict(dry_run=True, curation="none"), "there is nothing to curate"),
        (dict(dry_run=True, stage="student"), "--dry-run is for --stage curate"),
        (dict(audio_channels=[2] * 8, hop=64), "64 mel bins; 8 --audio-channels need at least 128"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        config("curation_clap", "x", "y", **flags)


def test_a_single_validation_pair_is_refused_before_the_training(corpus, tmp_path):
    rows = common.read_manifest([str(corpus)])
    train = [{**row, "split": "train"} for row in rows[:6]]
    alone = {"audio": rows[6]["audio"], "captions": ["rain"], "split": "val"}
    lines = [json.dumps(row) for row in (*train, alone)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    flags = dict(name="t", stage="teacher", pool_share=0.0)
    with pytest.raises(ValueError, match="one pair; its loss needs two"):
        curation_clap.main(config("curation_clap", tmp_path, tmp_path, **flags))


def test_a_tenth_of_the_clips_and_the_forgotten_ones(corpus):
    rows = [{"audio": f"{i}.wav", "captions": ["x"]} for i in range(100)]
    kept, left = curation_clap.split_clips(rows, 0.1, (0, 2))
    assert (
        len(kept) == 10
        and len(kept) + len(left) == 100
        and not {r["audio"] for r in kept} & {r["audio"] for r in left}
    )
    cfg = config("curation_clap", corpus, "x", pool_share=0.5, teacher_fraction=0.5)
    found = curation_clap.read_corpus(cfg)
    assert len(found["train"]) == 3 and len(found["pool"][0]) == 6
    # of the forgotten clips no caption is read
    clips = list(curation_clap.pool_clips(found["pool"][0]))
    assert len(clips) == 6 and set(clips[0]) == {"audio", "duration"}
