"""Cacophony: its equations by hand, its front end and layers against independent ones, what must
not leak.
"""

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import cacophony
import common
import eval as evaluation
from conftest import config, log_of

AUDIO = dict(dim=32, layers=2, heads=2, mlp=64)
CAPTIONS = ["a dog barks then rain falls", "wind", "a bell rings while a man speaks"]


def small_model(variant="paper", decoder_layers=2, dropout=True, seed=0):
    torch.manual_seed(seed)
    text_encoder = common.text_encoder_from_scratch(CAPTIONS, 64, 2, 2, 30)
    model = cacophony.Model(
        dict(audio=AUDIO, joint_dim=24, decoder_layers=decoder_layers, variant=variant),
        text_encoder,
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=0.3
            )  # so that nothing is nearly linear, and captions do not repeat one word
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    return model.eval()


def batch_of(model, n=6, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(8 * steps)[None].expand(n, -1)
    valid_mask = number < 8 * torch.tensor([steps, steps - 1, steps, 1, steps, 2])[:n, None]
    tokens = model.text_encoder.tokenize([CAPTIONS[i % 3] for i in range(n)])
    return {
        "patches": torch.randn(n, 8 * steps, 256, generator=generator),
        "index": number,
        "valid_mask": valid_mask,
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
    }


# Losses: Eq. (1) to (6)
def test_eq_1_is_the_sum_of_both_directions_by_hand():
    sim, scale = torch.tensor([[0.9, 0.1], [0.3, 0.5]]), torch.tensor(2.0)

    def part(right, wrong):
        return math.log(1 + math.exp(2 * (wrong - right)))

    a2t = (part(0.9, 0.1) + part(0.5, 0.3)) / 2
    t2a = (part(0.9, 0.3) + part(0.5, 0.1)) / 2
    assert cacophony.contrastive_loss(sim, scale).item() == pytest.approx(a2t + t2a, abs=1e-6)
    assert cacophony.contrastive_loss(torch.zeros(7, 7), scale).item() == pytest.approx(
        2 * math.log(7), abs=1e-6
    )


def test_eq_2_averages_over_tokens_and_official_divides_by_the_padded_length():
    p = torch.tensor(
        [
            [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]],
            [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]],
        ]
    )
    targets, mask = torch.tensor([[0, 1, 2], [2, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    first, second = -math.log(0.7) - math.log(0.6) - math.log(0.4), -math.log(0.25)
    assert cacophony.caption_nll(p.log(), targets, mask).tolist() == pytest.approx(
        [first / 3, second], abs=1e-6
    )
    assert cacophony.caption_nll(p.log(), targets, mask, 76).tolist() == pytest.approx(
        [first / 76, second / 76], abs=1e-6
    )
    logits = p.double().log().requires_grad_()
    cacophony.caption_nll(logits, targets, mask).mean().backward()
    expected = p.double()
    for b, word, t in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 2)):
        expected[b, word, t] -= 1
    expected = expected * mask[..., None] / (2 * mask.sum(1)[:, None, None])
    assert (logits.grad - expected).abs().max() < 1e-6


def test_eq_3_adds_lambda_times_the_captioning_loss():
    audio, text = F.normalize(torch.randn(4, 6), dim=-1), F.normalize(torch.randn(4, 6), dim=-1)
    nll, scale = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor(5.0)
    cfg = cacophony.Config(data=[], caption_weight=0.5)
    loss, sim, parts = cacophony.training_loss(cfg, audio, text, nll, scale)
    assert loss.item() == pytest.approx(
        cacophony.contrastive_loss(audio @ text.T, scale).item() + 0.5 * 3.0, abs=1e-5
    )
    assert parts["loss_cap"].item() == 3.0 and torch.equal(sim, audio @ text.T)
    assert parts["modality_gap"].item() == pytest.approx(
        float(np.linalg.norm(audio.numpy().mean(0) - text.numpy().mean(0))), abs=1e-6
    )


def test_eq_4_to_6_sam_equals_a_float64_step_by_hand():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(5, 5))
    A, b, w, rho, lr, decay = A @ A.T, rng.normal(size=5), rng.normal(size=5), 0.3, 0.01, 0.1
    first, second = torch.tensor(w[:2], requires_grad=True), torch.tensor(w[2:], requires_grad=True)
    unused = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.AdamW([first, second], lr=lr, weight_decay=decay)
    losses = []

    def backward():
        x = torch.cat([first, second])
        loss = 0.5 * x @ torch.tensor(A) @ x + torch.tensor(b) @ x
        loss.backward()
        losses.append(loss.item())
        return loss

    result = cacophony.sam_backward([first, second, unused], backward, rho)
    g = A @ w + b
    moved = w + rho * g / np.linalg.norm(g)
    expected = A @ moved + b
    assert np.allclose(torch.cat([first.grad, second.grad]).numpy(), expected, atol=1e-10)
    assert np.array_equal(
        torch.cat([first, second]).detach().numpy(), w
    )  # the weights are back, to the bit

    def value(x):
        return 0.5 * x @ A @ x + b @ x

    assert (
        result.item() == pytest.approx(value(w))
        and losses[1] == pytest.approx(value(moved))
        and losses[1] > losses[0]
    )
    optimiser.step()  # the first step of Adam is lr in each direction
    after = w * (1 - lr * decay) - lr * expected / (np.abs(expected) + 1e-8)
    assert (
        np.allclose(torch.cat([first, second]).detach().numpy(), after, atol=1e-10)
        and unused.grad is None
    )


def test_sam_without_a_distance_is_one_plain_pass():
    w, calls = torch.ones(2, requires_grad=True), []
    cacophony.sam_backward([w], lambda: (calls.append(1), (3 * w).sum().backward()), 0.0)
    assert w.grad.tolist() == [3.0, 3.0] and calls == [1]


def gradients(model, parts, rho, seed=3):
    cfg = cacophony.Config(data=[])
    model.train()
    model.zero_grad(set_to_none=True)
    cacophony.sam_backward(
        list(model.parameters()),
        lambda: common.cached_backward(
            model,
            parts,
            lambda *outputs: cacophony.training_loss(cfg, *outputs),
            lambda i: common.seed_step(seed, 0, 0, i),
        ),
        rho,
    )
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_both_passes_of_sam_draw_the_same_dropout():
    model = small_model()  # with dropout
    batch = batch_of(model)
    plain, near = gradients(model, [batch], 0.0), gradients(model, [batch], 1e-6)
    other = gradients(model, [batch], 0.0, seed=4)
    key = "decoder.0.intermediate.weight"
    assert (
        (plain[key] - near[key]).abs().max()
        < 1e-3 * plain[key].abs().max()
        < (plain[key] - other[key]).abs().max() * 1e-1
    )


@pytest.mark.parametrize("rho", [0.0, 0.075])
def test_micro_batches_with_gradient_caching_equal_one_batch(rho):
    model = small_model(dropout=False)
    batch = batch_of(model)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    one, three = gradients(model, [batch], rho), gradients(model, parts, rho)
    assert one.keys() == three.keys()
    for name in one:
        assert (one[name] - three[name]).abs().max() <= 1e-5 * max(1.0, one[name].abs().max()), name


# Front end
def slow_features(waveform, window):
    """Frame by frame in float64: the front end of the JAX code, or of the torch port (D1)."""
    frames = math.ceil(len(waveform) / 160)
    padded = np.concatenate([waveform, np.zeros(1000)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    hz = np.arange(257) * 16000 / 512

    def to_mel(f):
        return 1127 * np.log(1 + f / 700)

    if window == "start":
        edges, places = np.linspace(0, to_mel(8000), 130), to_mel(hz)
    else:
        edges, places = (
            700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1),
            hz,
        )
    bank = np.zeros((257, 128))
    for m in range(128):
        low, centre, high = edges[m : m + 3]
        for k in range(257):
            if low < places[k] <= centre:
                bank[k, m] = (places[k] - low) / (centre - low)
            elif centre < places[k] < high:
                bank[k, m] = (high - places[k]) / (high - centre)
    out = np.zeros((frames, 128))
    for i in range(frames):
        frame = np.zeros(512)
        if window == "start":
            frame[:400] = padded[i * 160 : i * 160 + 400] * hann
        else:
            frame[56:456] = padded[i * 160 + 56 : i * 160 + 456] * hann
        out[i] = 0.2 * np.log(np.abs(np.fft.rfft(frame)) @ bank + 1e-5) + 0.9
    return out, bank


@pytest.mark.parametrize("window", ["start", "centre"])
def test_features_equal_a_slow_loop(window):
    waveform = np.random.default_rng(0).normal(size=5000) * 0.1
    expected, bank = slow_features(waveform, window)
    mel = cacophony.MagnitudeMel(window)
    assert np.abs(mel.filters.numpy() - bank).max() < 2e-5
    got = mel(torch.tensor(waveform, dtype=torch.float32)[None])[0].numpy()
    assert got.shape == (32, 128) and np.abs(got - expected).max() < 2e-4
    assert (mel.filters.sum(0) == 0).sum() == 1  # one of the 128 filters lies between two bins
    silence = mel(torch.zeros(1, 1600))
    assert silence.min() == silence.max() and silence[0, 0, 0].item() == pytest.approx(
        -1.4026, abs=1e-3
    )


def test_the_two_windows_differ_by_56_samples():
    x = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    start, centre = cacophony.MagnitudeMel("start"), cacophony.MagnitudeMel("centre")
    start.filters = centre.filters
    shifted = centre(x)[:, :90]
    assert (start(F.pad(x[:, 56:], (0, 56)))[:, :90] - shifted).abs().max() < 1e-4
    assert (
        start(x)[:, :90] - shifted
    ).abs().mean() > 0.03  # 0.054 between the two front ends on white noise


def test_patches_are_time_major_and_the_remainder_is_dropped():
    features = torch.arange(2 * 37 * 128, dtype=torch.float32).view(2, 37, 128)
    patches = cacophony.to_patches(features)
    assert patches.shape == (2, 16, 256)
    for t in range(2):
        for f in range(8):
            assert torch.equal(
                patches[1, t * 8 + f],
                features[1, t * 16 : t * 16 + 16, f * 16 : f * 16 + 16].flatten(),
            )
    assert cacophony.to_patches(features[:, :5]).shape == (2, 8, 256)
    samples = torch.tensor([1, 2560, 5119, 5120, 160000, 163840])
    assert cacophony.n_steps(samples).tolist() == [1, 1, 2, 2, 62, 64]


def test_positions_by_the_formula():
    encoder = cacophony.PatchTransformer(256, 12, 1, 2, 16)
    got = encoder.positions(torch.tensor([[0, 9, 8 * 61 + 7]]))[0].detach().numpy()
    for row, number in zip(got, (0, 9, 8 * 61 + 7)):
        t, f = divmod(number, 8)
        angles = [t * 10000 ** (-2 * i / 12) for i in range(6)]
        expected = (
            np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
            + encoder.freq_embedding[f].detach().numpy()
        )
        assert np.allclose(row, expected, atol=1e-5)


def test_audio_layer_equals_torch_s_own():
    torch.manual_seed(0)
    ours = cacophony.AudioLayer(32, 4, 48, 1e-6)
    theirs = torch.nn.TransformerEncoderLayer(
        32, 4, 48, 0.0, F.silu, 1e-6, batch_first=True, norm_first=True
    )
    names = {
        "qkv.": "self_attn.in_proj_",
        "proj.": "self_attn.out_proj.",
        "fc1": "linear1",
        "fc2": "linear2",
    }
    state = {}
    for key, value in ours.state_dict().items():
        for a, b in names.items():
            key = b + key.removeprefix(a) if key.startswith(a) else key
        state[key] = value
    theirs.load_state_dict(state)
    x, valid = torch.randn(3, 9, 32), torch.arange(9) < torch.tensor([[9], [4], [1]])
    assert (ours(x, valid) - theirs(x, src_key_padding_mask=~valid))[valid].abs().max() < 1e-5


def test_attention_pool_by_a_loop_over_heads():
    torch.manual_seed(0)
    pool, x = cacophony.AttentionPool(12, 3, 5), torch.randn(2, 7, 12)
    valid = torch.arange(7) < torch.tensor([[7], [3]])
    got = pool(x, valid)
    for b, n in ((0, 7), (1, 3)):
        k, v = pool.kv_proj(x[b, :n]).split(12, -1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            weights = (k[:, part] @ pool.query[part] / math.sqrt(4)).softmax(0)
            heads.append(weights @ v[:, part])
        assert (got[b] - pool.out_proj(torch.cat(heads))).abs().max() < 1e-5
    assert (pool.pool_each_alone(x[:, :1])[:, 0] - pool(x[:, :1], valid[:, :1])).abs().max() < 1e-5


# Stage 1
def test_masked_patches_never_reach_the_encoder():
    torch.manual_seed(0)
    mae = cacophony.MAE(AUDIO, layers=1)
    patches, number = torch.randn(3, 40, 256), torch.arange(40)[None].expand(3, -1)
    valid = number < torch.tensor([[40], [24], [8]])

    def paint(patches):
        torch.manual_seed(5)
        return mae.paint(patches, number, valid)

    painted, visible = paint(patches)
    assert visible.sum(1).tolist() == [8, 5, 2] and not (visible & ~valid).any()  # a fifth
    changed = torch.where(visible[..., None], patches, torch.randn_like(patches) * 100)
    again, same = paint(changed)
    assert torch.equal(same, visible) and torch.equal(
        again[valid], painted[valid]
    )  # bit for bit, padding included
    moved = torch.where(visible[..., None], patches + 1, patches)
    assert not torch.equal(paint(moved)[0], painted)


def test_mae_clip_by_clip_and_its_loss_by_a_loop_over_masked_patches():
    torch.manual_seed(1)
    mae = cacophony.MAE(AUDIO, layers=2, mask_ratio=0.5)
    patches, place = torch.randn(2, 16, 256) * 3 + 1, torch.arange(16)[None].expand(2, -1)
    valid = place < torch.tensor([[16], [8]])
    number = 3 * place + 5  # a clip's patches may be any of it
    torch.manual_seed(7)
    painted, visible = mae.paint(patches, number, valid)
    torch.manual_seed(7)
    (loss,) = mae(patches, number, valid)
    for b, n in enumerate((16, 8)):
        seen = visible[b].nonzero()[:, 0]
        all_seen = torch.ones(1, len(seen), dtype=torch.bool)
        encoded = mae.audio_encoder(patches[b, seen][None], number[b, seen][None], all_seen)[0]
        tokens = [mae.mask_token] * n
        for place, state in zip(seen.tolist(), encoded):
            tokens[place] = mae.decoder.input_proj(state)
        tokens = torch.stack(tokens)[None] + mae.decoder.positions(number[b : b + 1, :n])
        slow = mae.head(mae.decoder.transform(tokens, torch.ones(1, n, dtype=torch.bool)))
        assert (painted[b, :n] - slow[0]).abs().max() < 1e-5
        errors = []
        for n in range(16):
            if valid[b, n] and not visible[b, n]:
                x = patches[b, n].double().numpy()
                target = (x - x.mean()) / math.sqrt(x.var(ddof=1) + 1e-6)
                errors.append(((painted[b, n].detach().numpy() - target) ** 2).mean())
        assert (
            loss[b].item() == pytest.approx(np.mean(errors), rel=1e-4) and len(errors) == (8, 4)[b]
        )


# Text
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_text_encoder_sees_no_later_token_and_counts_from_0(kind):
    torch.manual_seed(0)
    text_encoder = common.text_encoder_from_scratch(CAPTIONS, 64, 2, 2, 30)
    if kind == "roberta":
        shape = dict(
            vocab_size=len(text_encoder.tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
            pad_token_id=1,
        )
        bare = transformers.RobertaModel(
            transformers.RobertaConfig(**shape), add_pooling_layer=False
        ).eval()
        native = transformers.RobertaModel(
            transformers.RobertaConfig(**shape, is_decoder=True), add_pooling_layer=False
        ).eval()
        native.load_state_dict(bare.state_dict())
        text_encoder = common.TextEncoder(bare, text_encoder.tokenizer, 30)
    model = cacophony.Model(
        dict(audio=AUDIO, joint_dim=24, decoder_layers=0, variant="paper"), text_encoder
    ).eval()
    ids = torch.randint(5, 30, (2, 9))
    mask = torch.ones_like(ids)
    states = model.text_states(ids, mask)
    later = ids.clone()
    later[:, 5:] = 7
    changed = model.text_states(later, mask)
    assert torch.allclose(states[:, :5], changed[:, :5], atol=1e-6) and not torch.allclose(
        states[:, 5:], changed[:, 5:], atol=1e-3
    )
    padded = model.text_states(F.pad(ids, (0, 3), value=0), F.pad(mask, (0, 3)))
    assert torch.allclose(padded[:, :9], states, atol=1e-5)
    if kind == "roberta":
        expected = native(
            input_ids=ids, attention_mask=mask, position_ids=torch.arange(9)[None], use_cache=False
        ).last_hidden_state
        assert torch.allclose(states, expected, atol=1e-6)
        model.train()
        model.text_states(ids, mask).sum().backward()
        assert (
            bare.embeddings.position_embeddings.weight.grad[1] != 0
        ).any()  # not frozen as RoBERTa's padding row


def test_decoder_equals_transformers_layers_under_the_port_s_names(tmp_path):
    """Independent oracle of the decoder and of the key map at once."""
    torch.manual_seed(0)
    tokenizer = common.text_encoder_from_scratch(CAPTIONS, 64, 1, 1, 30).tokenizer
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_attention_heads=2,
        intermediate_size=384,
        max_position_embeddings=120,
        pad_token_id=1,
    )
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(**shape, num_hidden_layers=2), add_pooling_layer=False
    )
    decoder = transformers.RobertaModel(
        transformers.RobertaConfig(
            **shape, num_hidden_layers=3, is_decoder=True, add_cross_attention=True
        ),
        add_pooling_layer=False,
    ).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    roberta.save_pretrained(tmp_path / "roberta"), tokenizer.save_pretrained(tmp_path / "roberta")
    port = {
        "audio_module.input_proj.weight": torch.randn(96, 256),
        "audio_module.input_proj.bias": torch.randn(96),
        "audio_module.freq_positional_embedding": torch.randn(8, 96),
        "audio_module.norm.weight": torch.ones(96),
        "audio_module.norm.bias": torch.zeros(96),
    }
    for i in range(2):
        for name, size in (
            ("norm1.weight", (96,)),
            ("norm1.bias", (96,)),
            ("attn.in_proj_weight", (288, 96)),
            ("attn.in_proj_bias", (288,)),
            ("attn.out_proj.weight", (96, 96)),
            ("attn.out_proj.bias", (96,)),
            ("norm2.weight", (96,)),
            ("norm2.bias", (96,)),
            ("mlp.fc1.weight", (192, 96)),
            ("mlp.fc1.bias", (192,)),
            ("mlp.fc2.weight", (96, 192)),
            ("mlp.fc2.bias", (96,)),
        ):
            port[f"audio_module.layers.{i}.{name}"] = torch.randn(size) * 0.1
    for name, size in (
        ("query", (96,)),
        ("kv_proj.weight", (192, 96)),
        ("kv_proj.bias", (192,)),
        ("out_proj.weight", (48, 96)),
        ("out_proj.bias", (48,)),
    ):
        port[f"audio_attention_pool.{name}"] = torch.randn(size) * 0.1
    port |= {
        "text_module." + k.replace("encoder.layer.", "encoder.layers."): v
        for k, v in roberta.state_dict().items()
    }
    port |= {
        "text_module.pooler.attention_pool_query": torch.randn(1, 96),
        "text_proj.weight": torch.randn(48, 96),
        "text_proj.bias": torch.randn(48),
    }
    for name in ("key_proj", "value_proj"):
        port |= {
            f"text_module.pooler.{name}.weight": torch.randn(96, 96),
            f"text_module.pooler.{name}.bias": torch.randn(96),
        }
    port |= {
        "decoder_module." + k.replace("encoder.layer.", "encoder.layers."): v
        for k, v in decoder.encoder.state_dict(prefix="encoder.").items()
    }
    port |= {
        "decoder_module.decoder_proj.weight": torch.randn(len(tokenizer), 96) * 0.1,
        "decoder_module.decoder_proj.bias": torch.zeros(len(tokenizer)),
        "logit_scale": torch.tensor(2.0),
        "text_module.embeddings.position_ids": torch.arange(120)[None],
    }
    torch.save({"model_state_dict": port}, tmp_path / "port.pt")

    model = cacophony.Model.from_published(
        tmp_path / "port.pt", str(tmp_path / "roberta"), "official"
    )
    assert (
        model.shape["variant"] == "official"
        and model.audio_pool.heads == 1
        and model.text_pool.heads == 1
    )  # one head of 96 here
    assert model.audio_encoder.norm.eps == 1e-5 and model.log_scale.item() == 2.0
    states, audio, audio_mask = (
        torch.randn(2, 5, 96),
        torch.randn(2, 16, 96),
        torch.arange(16) < torch.tensor([[16], [8]]),
    )
    logits = model.next_logits(states, model.audio_keys_values(audio), audio_mask)
    causal = torch.zeros(1, 1, 5, 5).masked_fill(
        ~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf
    )
    cross = torch.zeros(2, 1, 1, 16).masked_fill(~audio_mask[:, None, None], -math.inf)
    expected = decoder.encoder(
        states,
        attention_mask=causal,
        encoder_hidden_states=audio,
        encoder_attention_mask=cross,
        use_cache=False,
    ).last_hidden_state
    assert (logits - model.head(expected)).abs().max() < 1e-4
    assert torch.equal(
        model.text_pool.kv_proj.weight[:96], port["text_module.pooler.key_proj.weight"]
    )
    # the file was trained by the JAX code, and computes as that unless it is told otherwise
    jax = evaluation.load_model(tmp_path / "port.pt", str(tmp_path / "roberta"))
    assert jax.shape["variant"] == "jax"
    assert jax.audio_encoder.norm.eps == 1e-6 and not torch.equal(
        jax.log_mel.filters, model.log_mel.filters
    )
    port_way = evaluation.load_model(tmp_path / "port.pt", str(tmp_path / "roberta"), "official")
    sound = torch.randn(1, 16000, generator=torch.Generator().manual_seed(2)) * 0.1
    assert torch.equal(port_way.embed_audio(sound), model.embed_audio(sound))
    assert not torch.allclose(jax.embed_audio(sound), model.embed_audio(sound), atol=1e-3)
    with pytest.raises(
        ValueError, match="--variant best: .* cacophony.py computes: paper, jax, of"
    ):
        evaluation.load_model(tmp_path / "port.pt", str(tmp_path / "roberta"), "best")
    port.pop("text_proj.bias"), port.update({"other.weight": torch.zeros(1)})
    torch.save(port, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError,
        match=r"missing keys: 1 \(text_pool.out_proj.bias\); unexpected keys: 1 \(other.weight\)",
    ):
        cacophony.Model.from_published(tmp_path / "bad.pt", str(tmp_path / "roberta"))
    encoder = cacophony.PatchTransformer(256, 96, 2, 1, 192)
    cacophony.load_audio_encoder(encoder, tmp_path / "port.pt", cacophony.Config(data=[]))
    assert torch.equal(encoder.layers[1].fc2.weight, port["audio_module.layers.1.mlp.fc2.weight"])


@pytest.mark.parametrize(
    "variant, heads, eps",
    [("paper", (8, 8), 1e-6), ("jax", (8, 1), 1e-6), ("official", (2, 1), 1e-5)],
)
def test_a_variant_s_model_has_its_pooling_heads_and_eps(variant, heads, eps):
    """D2, D3; the window of the front end (D1) is tested above."""
    shape = dict(audio={**AUDIO, "dim": 64, "heads": 8}, joint_dim=8, decoder_layers=0)
    text = common.text_encoder_from_scratch(CAPTIONS, 64, 1, 1, 30)
    model = cacophony.Model(shape | {"variant": variant}, text)
    assert (model.audio_pool.heads, model.text_pool.heads) == heads
    assert model.audio_encoder.norm.eps == eps


def test_paper_size_has_the_published_numbers_of_parameters():
    """Of the authors' checkpoints; the paper prints no numbers of parameters."""

    def count(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    shape = cacophony.audio_shape(cacophony.Config(data=[]))
    with torch.device("meta"):
        roberta = transformers.RobertaModel(
            transformers.RobertaConfig(
                vocab_size=50265,
                max_position_embeddings=514,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
            ),
            add_pooling_layer=False,
        )
        mae_decoder = cacophony.PatchTransformer(768, **shape)
        encoder = cacophony.PatchTransformer(256, **shape)
        head = torch.nn.Linear(768, 256)
        layers = torch.nn.ModuleList(cacophony.DecoderLayer(768, 768, 12) for _ in range(4))
        vocabulary = torch.nn.Linear(768, 50265)
    assert count(encoder) == pytest.approx(85.26, abs=0.01)
    assert count(mae_decoder) + count(head) == pytest.approx(85.85, abs=0.01)
    assert count(layers) + count(vocabulary) == pytest.approx(76.46, abs=0.01)
    assert count(roberta) == pytest.approx(
        125.23, abs=1.3
    )  # that of the code holds the pooler's keys and values


# Inference
def test_padded_and_unpadded_clips_give_equal_embeddings_frames_and_captions():
    model, x = (
        small_model(),
        torch.randn(3, 40000, generator=torch.Generator().manual_seed(0)) * 0.1,
    )
    n = torch.tensor([40000, 17000, 100])
    together = model.embed_audio(x, n)  # behind a clip's end lies noise
    alone = torch.cat([model.embed_audio(x[i : i + 1, :k]) for i, k in enumerate(n.tolist())])
    assert (together - alone).abs().max() < 1e-5 and (together[0] - together[1]).abs().max() > 1e-3
    frames = model.embed_frames(x, n)
    assert (
        frames.shape == (3, 16, 24)
        and (frames[1, 7:] == 0).all()
        and torch.equal(frames[1, 5], frames[1, 6])
    )  # 6.6 steps: 6 and a remainder
    assert (frames[1, :7] - model.embed_frames(x[1:2, :17000])[0]).abs().max() < 1e-5
    states, mask = model.audio_states(x[:1])
    assert (model.event_feats(x[:1])[0, :15] - states[0].view(15, 8, 32).mean(1)).abs().max() < 1e-5
    assert model.caption(x, n) == [
        model.caption(x[i : i + 1, :k])[0] for i, k in enumerate(n.tolist())
    ]
    assert (
        model.caption(x, n, temperature=1.0, seed=3)[1]
        == model.caption(x[1:2, :17000], temperature=1.0, seed=3)[0]
    )


def test_long_audio_is_heard_in_pieces_and_pooled_together(monkeypatch):
    model, x = (
        small_model(),
        torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1,
    )
    whole, mask = model.audio_states(x, torch.tensor([16000, 7000]))
    monkeypatch.setattr(cacophony, "PIECE_S", 0.48)  # 7680 samples, 3 steps
    states, valid = model.audio_states(x, torch.tensor([16000, 7000]))
    assert valid.sum(1).tolist() == [8 * (3 + 3 + 1), 8 * 2] and mask.sum(1).tolist() == [
        8 * 6,
        8 * 2,
    ]
    assert (states[1, :16] - whole[1, :16]).abs().max() < 1e-5
    second = model.audio_states(x[:1, 7680:15360])[0]
    assert (states[0, 24:48] - second[0]).abs().max() < 1e-5
    assert (
        model.embed_audio(x[:1]) - F.normalize(model.audio_pool(states[:1], valid[:1]), dim=-1)
    ).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captions_equal_a_decoding_by_the_training_pass(temperature):
    """The training pass on the whole growing prefix, as the slow obvious version."""
    model, x = (
        small_model(),
        torch.randn(2, 30000, generator=torch.Generator().manual_seed(1)) * 0.1,
    )
    tokenizer = model.text_encoder.tokenizer
    states, mask = model.audio_states(x)
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((2, 1), tokenizer.cls_token_id)
    ended = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(19):
            logits = model.next_logits(
                model.text_states(ids, torch.ones_like(ids)), model.audio_keys_values(states), mask
            )[:, -1]
            logits[:, [tokenizer.pad_token_id, tokenizer.cls_token_id]] = -math.inf
            if temperature:
                logits = (
                    logits / temperature
                    - torch.empty(logits.shape[1]).exponential_(generator=generator).log()
                )
            token = torch.where(ended, tokenizer.pad_token_id, logits.argmax(-1))
            ids, ended = (
                torch.cat([ids, token[:, None]], 1),
                ended | (token == tokenizer.sep_token_id),
            )
    expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers announces what it will take away by them
        got = model.caption(x, temperature=temperature, seed=5, max_tokens=20)
    assert got == expected and (not temperature or len(set(got[0].split())) > 3)


def test_drawn_tokens_follow_the_softmax():
    """One step, many seeds: frequencies of the first token against its probabilities."""
    model, x = small_model(), torch.randn(1, 8000, generator=torch.Generator().manual_seed(1)) * 0.1
    torch.nn.init.normal_(model.head.weight, std=0.05)
    tokenizer = model.text_encoder.tokenizer
    states, mask = model.audio_states(x)
    ids = torch.full((1, 1), tokenizer.cls_token_id)
    with torch.no_grad():
        logits = model.next_logits(
            model.text_states(ids, torch.ones_like(ids)), model.audio_keys_values(states), mask
        )[0, -1]
    logits[[tokenizer.pad_token_id, tokenizer.cls_token_id]] = -math.inf
    p = (logits / 0.5).softmax(-1)
    said = [model.caption(x, temperature=0.5, seed=s, max_tokens=2)[0] for s in range(300)]
    for token in p.topk(3).indices.tolist():
        word = tokenizer.decode([token], skip_special_tokens=True).strip()
        share, spread = (
            np.mean([s == word for s in said]),
            math.sqrt(p[token].item() * (1 - p[token].item()) / 300),
        )
        assert abs(share - p[token].item()) < 4 * spread + 1e-3, word


def test_a_model_without_a_captioner_says_so():
    with pytest.raises(ValueError, match=r"trained without a captioner \(--caption-weight 0\)"):
        small_model(decoder_layers=0).caption(torch.zeros(1, 4000))


# Data
def test_patches_of_long_clips_are_drawn_sorted_and_anew_each_epoch(tmp_path):
    import soundfile as sf

    sf.write(tmp_path / "long.wav", np.random.default_rng(0).normal(size=16000 * 20) * 0.1, 16000)
    sf.write(tmp_path / "short.wav", np.random.default_rng(0).normal(size=16000 * 3) * 0.1, 16000)
    rows = [
        {"audio": str(tmp_path / name), "captions": ["x"], "where": "x"}
        for name in ("long.wav", "short.wav")
    ]
    model = small_model()
    clips = cacophony.Clips(
        rows, cacophony.Config(data=[], patches=512), model.text_encoder.tokenize
    )
    patches, number, *_ = clips[0, 0]
    assert len(number) == 512 and (number.diff() > 0).all() and number.max() < 125 * 8
    whole = cacophony.to_patches(
        clips.log_mel(torch.from_numpy(common.read_audio(rows[0]["audio"], 16000))[None])
    )[0]
    assert torch.equal(patches, whole[number])
    assert torch.equal(number, clips[0, 0][1]) and not torch.equal(number, clips[1, 0][1])
    assert torch.equal(clips[0, 1][1], torch.arange(18 * 8))
    batch = clips.collate([clips[0, 0], clips[0, 1]])
    assert batch["valid_mask"].sum(1).tolist() == [512, 144] and batch["patches"].shape == (
        2,
        512,
        256,
    )
    crops = cacophony.Clips(rows, cacophony.Config(data=[]))
    assert (
        len(crops[0, 0][1]) == 744 and crops[0, 0][2] is None
    )  # 15 s: 93 whole steps; the paper's 750 patches are 93.75 steps
    assert not torch.equal(crops[0, 0][0], crops[1, 0][0])


def test_synthetic_captions_are_drawn_with_their_share():
    row = {"captions": ["written"], "synthetic": ["made 1", "made 2"]}
    clips = cacophony.Clips([row], cacophony.Config(data=[]))
    rng = np.random.default_rng(0)
    drawn = [clips.draw_caption(row, rng) for _ in range(4000)]
    assert np.mean([d == "written" for d in drawn]) == pytest.approx(0.2, abs=0.02)
    assert np.mean([d == "made 1" for d in drawn]) == pytest.approx(0.4, abs=0.03)
    assert {clips.draw_caption({"synthetic": ["a"]}, rng) for _ in range(20)} == {"a"}
    assert {clips.draw_caption({"captions": ["b"]}, rng) for _ in range(20)} == {"b"}


def test_learning_rate_ends_at_its_minimum():
    cfg = cacophony.Config(data=[])
    assert cacophony.learning_rate(cfg, 1e-5, 9999, 300000) == pytest.approx(1e-5)
    assert cacophony.learning_rate(cfg, 1e-5, 4999, 300000) == pytest.approx(5e-6)
    assert cacophony.learning_rate(cfg, 1e-5, 300000, 300000) == pytest.approx(1e-6)
    assert cacophony.learning_rate(cfg, 1e-5, 155000, 300000) == pytest.approx(5.5e-6)


# Stages
def test_stages_alone_equal_both_in_order_and_the_encoder_is_handed_over(corpus, tmp_path):
    cacophony.main(config("cacophony", corpus, tmp_path, name="both"))
    cacophony.main(config("cacophony", corpus, tmp_path, name="alone", stage="mae"))
    with pytest.raises(ValueError, match="holds stage 1 only"):
        cacophony.Model.from_checkpoint(tmp_path / "alone/last.pt")
    cacophony.main(config("cacophony", corpus, tmp_path, name="alone", stage="contrastive"))
    cacophony.main(
        config(
            "cacophony",
            corpus,
            tmp_path,
            name="other",
            stage="contrastive",
            audio_weights=str(tmp_path / "both/mae.pt"),
        )
    )

    def read(name, stage):
        return [line for line in log_of(tmp_path / name) if line["stage"] == stage]

    losses = {
        name: [x["loss"] for x in read(name, "contrastive")] for name in ("both", "alone", "other")
    }
    assert losses["both"] == losses["alone"] == losses["other"] and len(losses["both"]) == 4
    assert [x["loss"] for x in read("both", "mae")] == [x["loss"] for x in read("alone", "mae")]
    weights = str(tmp_path / "both/mae.pt")
    cfg = config("cacophony", corpus, tmp_path, stage="contrastive", audio_weights=weights)
    model = cacophony.start_model(cfg, CAPTIONS, Path("none"))
    mae = torch.load(tmp_path / "both/mae.pt", weights_only=True)["model"]
    assert all(
        torch.equal(value, mae["audio_encoder." + key])
        for key, value in model.audio_encoder.state_dict().items()
    )
    with pytest.raises(
        FileNotFoundError, match="run --stage mae --name fresh first, or give --audio-weights"
    ):
        cacophony.main(config("cacophony", corpus, tmp_path, name="fresh", stage="contrastive"))
    fresh = config(
        "cacophony",
        corpus,
        tmp_path,
        name="none",
        stage="contrastive",
        audio_weights="none",
        caption_weight=0.0,
        rho=0.0,
    )
    assert "loss_cap" not in cacophony.main(fresh)["scores"]


def test_stage_1_needs_no_captions(corpus, tmp_path):
    import json

    rows = [json.loads(x) for x in (corpus / "manifest.jsonl").read_text().splitlines()]
    common.write_lines(
        tmp_path / "sound.jsonl",
        [json.dumps({"audio": str(corpus / row["audio"])}) for row in rows],
    )
    cacophony.main(config("cacophony", tmp_path / "sound.jsonl", tmp_path, name="s", stage="mae"))
    with pytest.raises(ValueError, match="has no 'captions'"):
        cacophony.main(
            config("cacophony", tmp_path / "sound.jsonl", tmp_path, name="s", stage="contrastive")
        )
    with pytest.raises(ValueError, match="has no 'captions'"):  # said before stage 1
        cacophony.main(config("cacophony", tmp_path / "sound.jsonl", tmp_path, name="t"))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "changed, name", [(dict(audio_heads=1), "heads = 2"), (dict(variant="official"), "variant")]
)
def test_stage_2_refuses_a_stage_1_of_other_settings(corpus, tmp_path, runs_of, changed, name):
    """Heads and the variant's details change no tensor's shape: loading alone would not notice."""
    mae = runs_of("cacophony")[0] / "mae.pt"
    flags = dict(stage="contrastive", audio_weights=str(mae), **changed)
    with pytest.raises(ValueError, match=f"mae.pt: trained with {name}.*repeat stage 1's flags"):
        cacophony.main(config("cacophony", corpus, tmp_path, **flags))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(audio_weights="none"), "with --stage all: stage 2 would not use"),
        (dict(audio_weights="x.pt", stage="mae"), "with --stage mae: stage 2 would not use"),
        (dict(audio_dim=300, audio_heads=12), "a multiple of 8, the heads of the audio pooler"),
        (dict(audio_heads=7), "expected an even number that --audio-heads 7 divides"),
        (dict(text_dim=60), "--text-dim 60: expected a multiple of 8"),
        (dict(min_lr=1.0), "--min-lr 1.0: expected at most --lr"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_said_before_anything_is_read(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        cacophony.Config(data=["nowhere"], size="tiny", **flags)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(text_model="no/model"), "--text-model no/model: not a model folder"),
        (dict(text_dim=200), "--text-dim 200: expected a multiple of 64"),
        (dict(batch_size=1), "--batch-size 1 with 12 training clip"),
    ],
    ids=str,
)
def test_what_stage_2_lacks_is_said_before_stage_1(corpus, tmp_path, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        cacophony.main(config("cacophony", corpus, tmp_path, name="a", **flags))
    assert not (tmp_path / "a").exists()


def test_stage_2_takes_the_encoder_of_the_other_paper_variant(corpus, tmp_path, runs_of):
    """paper and jax differ in the text's pooler only."""
    mae = runs_of("cacophony")[0] / "mae.pt"
    cfg = config("cacophony", corpus, tmp_path, audio_weights=str(mae), stage="contrastive")
    encoder = cacophony.PatchTransformer(256, **cacophony.audio_shape(cfg))
    cacophony.load_audio_encoder(encoder, mae, dataclasses.replace(cfg, variant="jax"))
    stored = torch.load(mae, weights_only=True)["model"]
    assert torch.equal(encoder.state_dict()["norm.weight"], stored["audio_encoder.norm.weight"])


def test_a_kill_in_stage_2_before_its_first_checkpoint_resumes_in_stage_2(corpus, tmp_path):
    class Killed(Exception):
        pass

    cacophony.main(config("cacophony", corpus, tmp_path, name="a", stage="mae"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.Run, "step_done", lambda *args, **values: (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            cacophony.main(config("cacophony", corpus, tmp_path, name="a", stage="contrastive"))
    resumed = common.configure(cacophony.Config, resume=True, name="a", runs=str(tmp_path))
    assert resumed.stage == "contrastive"
    assert cacophony.main(resumed)["stage"] == "contrastive"
    assert common.read_checkpoint(tmp_path / "a/last.pt")["step"] == 4
