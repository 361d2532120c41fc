"""CoLLAT: its equations by hand, matching against a slow loop, AST and CLIP against
transformers.
"""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.signal
import torch
import torch.nn.functional as F
import transformers

import collat
import common
from conftest import SMALL_OF, config, log_of

AUDIO = dict(dim=32, layers=1, heads=2, patch=64, stride=48)
TEXTS = [
    "This is a sound of a dog, and rain",
    "This is a sound of wind",
    "This is a sound of a bell, a dog, and wind",
]


def clip_text(dim=32, vocabulary=60, joint=24):
    """transformers' CLIP text tower with random weights, its last token id the end token, and a
    stand-in for its tokenizer.
    """
    torch.manual_seed(1)
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=vocabulary,
            projection_dim=joint,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return common.TextEncoder(model, None, 12)


def small_model(text_encoder=None, seed=0):
    torch.manual_seed(seed)
    text_encoder = text_encoder or common.text_encoder_from_scratch(TEXTS, 64, 2, 1, 20)
    model = collat.Model(dict(audio=AUDIO, blocks=2), text_encoder)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("text."):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def small_batch(model, n=6):
    tokens = model.text_encoder.tokenize([TEXTS[i % 3] for i in range(n)])
    log_mel = torch.randn(n, 1024, 128, generator=torch.Generator().manual_seed(2))
    return {
        "log_mel": log_mel,
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
    }


# Losses
PREDICTED = torch.tensor(
    [[[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], [[0.0, 0.0], [4.0, 4.0], [1.0, 2.0]]]
)  # (2, 3, 2)
TEXT = torch.tensor(
    [[[2.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [9.0, 9.0]]]
)  # the second token of text 2 is padding
MASK = torch.tensor([[1, 1], [1, 0]])


def test_eq_1_by_hand_and_its_gradient():
    matched = collat.match(PREDICTED, TEXT, MASK)
    # Eq. (1) in means (D6), greedy from the right
    # text 1: its last token (0, 1) is 2, 1, 3 away -> slot 1; then (2, 1) is 2 and 1 away from
    # slots 0 and 2 -> slot 2
    # text 2: (1, 1) is 2, 6, 1 away -> slot 2
    assert matched[0].tolist() == [2, 1] and matched[1, 0] == 2
    predicted = PREDICTED.clone().requires_grad_()
    sums, counts = collat.cross_token_loss(predicted, TEXT, MASK, matched)
    assert sums.tolist() == [(1 + 0) / 2 + (0 + 1) / 2, (0 + 1) / 2] and counts.tolist() == [2, 1]
    sums.sum().backward()
    expected = torch.zeros(2, 3, 2)
    expected[0, 2, 0], expected[0, 1, 1], expected[1, 2, 1] = 0.5, 0.5, 0.5
    assert torch.equal(predicted.grad, expected)


def test_eq_2_by_hand():
    sim, scale = torch.tensor([[0.9, 0.1], [0.3, 0.5]]), torch.tensor(2.0)

    def part(right, wrong):
        return math.log(1 + math.exp(2 * (wrong - right)))

    a2t, t2a = (part(0.9, 0.1) + part(0.5, 0.3)) / 2, (part(0.9, 0.3) + part(0.5, 0.1)) / 2
    assert collat.cross_global_loss(sim, scale).item() == pytest.approx((a2t + t2a) / 2, abs=1e-6)
    assert collat.cross_global_loss(torch.zeros(7, 7), scale).item() == pytest.approx(
        math.log(7), abs=1e-6
    )


def test_eq_3_compares_slot_by_slot_without_reordering():
    noisy = PREDICTED.flip(1)
    assert collat.uni_token_loss(PREDICTED, noisy).tolist() == pytest.approx(
        [(2 + 1 + 0 + 0 + 2 + 1) / 6, (1 + 2 + 0 + 0 + 1 + 2) / 6]
    )
    assert collat.uni_token_loss(PREDICTED, PREDICTED).tolist() == [0, 0]


def test_eq_4_weighs_the_three_losses():
    audio, text = (
        F.normalize(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), dim=-1),
        F.normalize(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), dim=-1),
    )
    sums, counts, uni, scale = (
        torch.tensor([3.0, 1.0]),
        torch.tensor([2.0, 6.0]),
        torch.tensor([0.2, 0.6]),
        torch.tensor(5.0),
    )
    cfg = collat.Config(data=[])
    assert (cfg.token_weight, cfg.global_weight, cfg.uni_weight) == (1.0, 0.1, 0.01)
    loss, sim, parts = collat.training_loss(cfg, audio, text, sums, counts, uni, scale)
    of_global = collat.cross_global_loss(audio @ text.T, scale)
    assert loss.item() == pytest.approx(
        4 / 8 + 0.1 * of_global.item() + 0.01 * 0.4
    ) and torch.equal(sim, audio @ text.T)
    assert parts["loss_token"] == 0.5 and parts["loss_uni"].item() == pytest.approx(0.4)
    for weights in ((0.0, 1.0, 0.0), (2.0, 0.0, 3.0)):
        cfg = collat.Config(
            data=[], token_weight=weights[0], global_weight=weights[1], uni_weight=weights[2]
        )
        loss = collat.training_loss(cfg, audio, text, sums, counts, uni, scale)[0]
        assert loss.item() == pytest.approx(
            weights[0] * 0.5 + weights[1] * of_global.item() + weights[2] * 0.4
        )


# Matching
def slow_greedy(distance, real):
    """The sentences of Sec. 3.2: over the text's tokens from the right, the closest predicted
    token not yet used.
    """
    out = []
    for d, r in zip(distance.tolist(), real.tolist()):
        used, chosen = set(), {}
        for j in reversed([j for j, is_real in enumerate(r) if is_real]):
            best = None
            for i, value in enumerate(d[j]):
                if i not in used and (best is None or value < d[j][best]):
                    best = i
            used.add(best)
            chosen[j] = best
        out.append(chosen)
    return out


def matching_cases():
    g = torch.Generator().manual_seed(0)
    for B, L, N, kind in (
        (7, 5, 5, "plain"),
        (6, 4, 9, "plain"),
        (9, 6, 8, "padded"),
        (8, 7, 7, "ties"),
        (5, 6, 11, "ties and padded"),
        (1, 1, 1, "plain"),
    ):
        distance = torch.rand(B, L, N, generator=g)
        if "ties" in kind:
            distance = (distance * 3).round()
        lengths = (
            torch.randint(1, L + 1, (B,), generator=g) if "padded" in kind else torch.full((B,), L)
        )
        yield pytest.param(distance, torch.arange(L) < lengths[:, None], id=f"{kind} {B} {L} {N}")


@pytest.mark.parametrize("distance, real", matching_cases())
def test_greedy_equals_a_slow_loop_from_the_paper_s_text(distance, real):
    matched = collat.match_greedy(distance, real)
    for b, chosen in enumerate(slow_greedy(distance, real)):
        assert {j: int(matched[b, j]) for j in chosen} == chosen


def test_match_measures_l1():
    g = torch.Generator().manual_seed(3)
    predicted, text, mask = (
        torch.randn(4, 9, 5, generator=g),
        torch.randn(4, 6, 5, generator=g),
        torch.ones(4, 6),
    )
    distance = (text[:, :, None] - predicted[:, None]).abs().sum(-1)
    matched = collat.match(predicted, text, mask)
    assert torch.equal(matched, collat.match_greedy(distance, mask.bool()))


def test_padding_of_the_texts_changes_nothing():
    model = small_model()
    batch = small_batch(model, 3)
    torch.manual_seed(0)
    whole = model(**batch)
    batch["input_ids"] = F.pad(batch["input_ids"], (0, 3))
    batch["attention_mask"] = F.pad(batch["attention_mask"], (0, 3))
    torch.manual_seed(0)
    for a, b in zip(whole, model(**batch)):
        assert torch.allclose(a, b, atol=1e-6)


# The locked text encoder
def test_clip_from_token_embeddings_equals_its_forward_from_ids():
    encoder = clip_text()
    locked = collat.LockedText(encoder)
    ids = torch.randint(0, 58, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 8], ids[1, 5:], ids[2, 2:] = (
        59,
        59,
        59,
    )  # padded with the end token, as CLIP's tokenizer does
    mask = (torch.arange(9) <= torch.tensor([8, 5, 2])[:, None]).long()
    with torch.no_grad():
        theirs = encoder.model(input_ids=ids)
        states = locked.states(locked.token_embeds(ids), mask)
        assert (theirs.last_hidden_state - states[-1]).abs().max() < 1e-5
        assert (theirs.text_embeds - locked.pool(states[-1], mask)).abs().max() < 1e-5
        assert theirs.text_embeds.std() > 0.1 and len(states) == 3
        # of slots, which have no end token, the last one is pooled (D2)
        assert torch.equal(
            locked.pool(states[-1]), encoder.model.text_projection(states[-1][:, -1])
        )


def test_other_encoders_are_read_from_embeddings_and_pooled_by_their_mean():
    encoder = common.text_encoder_from_scratch(TEXTS, 64, 2, 1, 20)
    locked = collat.LockedText(encoder)
    tokens = encoder.tokenize(TEXTS)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    encoder.model.eval()
    theirs = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states = locked.states(locked.token_embeds(ids), mask)
    for a, b in zip(theirs.hidden_states, states):
        assert torch.allclose(a, b, atol=1e-5)
    expected = torch.stack([x[:n].mean(0) for x, n in zip(theirs.last_hidden_state, mask.sum(1))])
    assert torch.allclose(locked.pool(states[-1], mask), expected, atol=1e-6)
    assert torch.allclose(locked.pool(states[-1]), states[-1].mean(1), atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_gradients_pass_through_the_text_encoder_and_none_stay_in_it(kind):
    if kind == "bert":
        model = small_model()
        batch = small_batch(model)
    else:
        model = small_model(clip_text())
        ids = torch.randint(0, 58, (6, 7), generator=torch.Generator().manual_seed(0))
        ids[:, 6] = 59
        batch = {
            "log_mel": torch.randn(6, 1024, 128),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
    model.train()
    assert (
        not model.text.training
        and not any(m.training for m in model.text.modules())
        and model.interaction.training
    )
    before = {k: v.clone() for k, v in model.text.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    cfg = collat.Config(
        data=[], token_weight=0.0, uni_weight=0.0, global_weight=1.0
    )  # nothing but what goes through f_t
    losses = []
    for _ in range(12):
        loss = collat.training_loss(cfg, *model(**batch))[0]
        optimiser.zero_grad()
        loss.backward()
        assert (
            model.interaction.out_proj.weight.grad.abs().max() > 1e-5
            and model.audio_encoder.patch_embed["proj"].weight.grad.abs().max() > 0
        )
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0] - 0.1
    assert all(p.grad is None for p in model.text.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.text.state_dict().items())


# AST
def test_ast_equals_transformers_and_loads_its_weights_and_ast_s_own(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.ASTModel(
        transformers.ASTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
        )
    ).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "ast")
    x = torch.randn(2, 1024, 128)
    ours = collat.AST(24, 2, 2).eval()
    assert ours.grid == (12, 101)
    collat.load_ast(ours, str(tmp_path / "ast"))
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
        assert (
            (expected - ours(x)).abs().max() < 1e-4
            and expected.std() > 0.1
            and expected[0].std(0).mean() > 0.1
        )
    own = {"module.v." + k: v for k, v in ours.state_dict().items()}
    own |= {
        "module.v.head.weight": torch.zeros(2, 24),
        "module.v.head_dist.bias": torch.zeros(2),
        "module.mlp_head.1.weight": torch.zeros(3, 24),
    }
    torch.save(own, tmp_path / "audioset_10_10_0.4593.pth")
    again = collat.AST(24, 2, 2).eval()
    collat.load_ast(again, str(tmp_path / "audioset_10_10_0.4593.pth"))
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    own.pop("module.v.norm.bias")
    torch.save(own, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: .*missing keys: 1 \(norm.bias\)"):
        collat.load_ast(again, str(tmp_path / "bad.pth"))
    with pytest.raises(
        ValueError, match="--audio-weights no/where: not a file, not a model folder"
    ):
        collat.load_ast(again, "no/where")


def test_paper_size_has_ast_s_and_vit_l_14_s_numbers():
    cfg = collat.Config(data=[])
    with torch.device("meta"):
        encoder = collat.AST(
            cfg.audio_dim, cfg.audio_layers, cfg.audio_heads, cfg.audio_patch, cfg.audio_stride
        )
        text = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
                projection_dim=768,
            )
        )
        module = collat.TokenInteraction(768, 12, cfg.blocks, 768)
    theirs = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    assert theirs["pos_embed"] == (1, 1214, 768) and theirs["blocks.11.attn.qkv.weight"] == (
        2304,
        768,
    )
    assert theirs["patch_embed.proj.weight"] == (768, 1, 16, 16)
    assert (
        sum(p.numel() for p in encoder.parameters()) == 86_187_264
    )  # without any classification head
    assert len(module.blocks) == 8 and text.text_model.embeddings.token_embedding.weight.shape == (
        49408,
        768,
    )


def test_features_equal_transformers_extractor_but_for_the_window(monkeypatch):
    extractor = transformers.ASTFeatureExtractor()
    waveform = torch.randn(16000 * 3, generator=torch.Generator().manual_seed(0)) * 0.1
    waveform -= waveform.mean()  # transformers leaves the mean in, AST takes it out
    theirs = torch.from_numpy(
        np.asarray(extractor(waveform.numpy(), sampling_rate=16000)["input_values"][0])
    )
    hamming = collat.fbank(waveform + 0.3)
    fbank = collat.torchaudio.compliance.kaldi.fbank
    monkeypatch.setattr(
        collat.torchaudio.compliance.kaldi,
        "fbank",
        lambda *a, **k: fbank(*a, **{**k, "window_type": "hanning"}),
    )
    hanning = collat.fbank(waveform)
    assert hanning.shape == (1024, 128) and (theirs - hanning).abs().max() < 1e-3
    assert 0.01 < (hamming - hanning)[:298].abs().max() and torch.equal(
        hamming[298:], hanning[298:]
    )  # 3 s are 298 frames, then padding
    assert hamming[-1, 0].item() == pytest.approx(4.2677393 / (2 * 4.5689974))


def test_hamming_frames_by_a_slow_formula():
    """Window, pre-emphasis and power spectrum of one frame, as kaldi documents them, against
    fbank's through a flat bank.
    """
    waveform = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 0.1
    x = (waveform - waveform.mean()).numpy()
    x = x - x.mean()  # kaldi removes each frame's mean
    x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
    spectrum = (
        np.abs(np.fft.rfft(x * scipy.signal.get_window("hamming", 400, fftbins=False), 512)) ** 2
    )

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(20), mel(8000), 130)
    bins = mel(np.arange(256) * 16000 / 512)
    banks = np.maximum(
        0,
        np.minimum(
            (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None],
            (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None],
        ),
    )
    expected = np.log(np.maximum(banks @ spectrum[:256], np.finfo(np.float32).eps))
    ours = collat.fbank(waveform.float())[0] * 2 * 4.5689974 - 4.2677393
    assert np.abs(ours.numpy() - expected).max() < 2e-3


# Token interaction module
def test_a_block_equals_torch_s_own_attention():
    torch.manual_seed(0)
    block = collat.CrossBlock(12, 3).eval()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
        theirs.out_proj.weight.copy_(block.proj.weight), theirs.out_proj.bias.copy_(block.proj.bias)
        slots, audio = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
        x = slots + theirs(block.norm1(slots), audio, audio)[0]
        expected = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        assert torch.allclose(block(slots, audio), expected, atol=1e-5)
        module = collat.TokenInteraction(12, 3, 1, 8)
        module.blocks[0] = block
        weights = theirs(block.norm1(slots), audio, audio, average_attn_weights=True)[1]
        assert torch.allclose(module.attention(slots, audio), weights, atol=1e-5)


def test_slots_are_drawn_anew_in_training_fixed_in_evaluation_and_shared_by_both_views(monkeypatch):
    model = small_model()
    batch = small_batch(model, 3)
    seen = []
    forward = collat.TokenInteraction.forward
    monkeypatch.setattr(
        collat.TokenInteraction,
        "forward",
        lambda self, slots, audio: seen.append(slots) or forward(self, slots, audio),
    )
    model.train()
    model(**batch), model(**batch)
    assert seen[0].shape == (6, 20, 32) and torch.equal(seen[0][:3], seen[0][3:])
    assert not torch.equal(seen[0][0], seen[0][1]) and not torch.equal(seen[0], seen[1])
    assert abs(seen[0].std().item() - 1) < 0.05
    x = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    model.embed_audio(x), model.embed_audio(x)
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2][0], seen[2][1])
    monkeypatch.undo()
    assert model(**batch, noise_std=0.0)[4].abs().max() < 1e-5  # without noise both views are one


def test_the_noisy_view_has_the_stated_noise_and_is_left_out_at_weight_0(monkeypatch):
    model, seen = small_model(), []
    forward = collat.AST.forward
    monkeypatch.setattr(collat.AST, "forward", lambda self, x: seen.append(x) or forward(self, x))
    batch = small_batch(model, 3)
    model(**batch), model(**batch, noise_std=None)
    noise = seen[0][3:] - seen[0][:3]
    assert (
        noise.std().item() == pytest.approx(0.1, rel=0.02)
        and abs(noise.mean().item()) < 1e-3
        and torch.equal(seen[0][:3], batch["log_mel"])
    )
    assert seen[1].shape[0] == 3 and model(**batch, noise_std=None)[4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_token_layer_compares_states_of_that_layer(layer):
    """Layer 0: the predicted tokens of the clean view with the static token embeddings."""
    model = small_model()
    batch = small_batch(model, 3)
    sums = model(**batch, token_layer=layer)[2]
    slots = model.slots.expand(3, -1, -1)
    predicted = model.interaction(slots, model.audio_encoder(batch["log_mel"]))
    text = model.text.token_embeds(batch["input_ids"])
    if layer:
        predicted = model.text.states(predicted)[layer]
        text = model.text.states(text, batch["attention_mask"])[layer]
    for b in range(3):
        n = int(batch["attention_mask"][b].sum())
        distance = torch.cdist(text[b, :n], predicted[b], p=1)[None]
        chosen = slow_greedy(distance, torch.ones(1, n))[0]
        expected = sum((text[b, j] - predicted[b, i]).abs().mean() for j, i in chosen.items())
        assert sums[b].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("part", [1, 4])
def test_parts_with_gradient_caching_equal_one_big_batch(part):
    gradients, cfg = [], collat.Config(data=[], uni_weight=0.0)
    for size in (6, part):
        model = small_model()  # in evaluation, slots are fixed
        batch = small_batch(model)
        parts = [
            {k: v[i : i + size] for k, v in batch.items()} | {"noise_std": None}
            for i in range(0, 6, size)
        ]
        loss, sim, _ = common.cached_backward(
            model, parts, lambda *x: collat.training_loss(cfg, *x), lambda i: None
        )
        gradients.append(
            ({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, loss.item(), sim)
        )
    (whole, loss, sim), (cached, cached_loss, cached_sim) = gradients
    assert cached_loss == pytest.approx(loss, abs=1e-5) and torch.allclose(
        sim, cached_sim, atol=1e-5
    )
    for name, grad in whole.items():
        assert torch.allclose(grad, cached[name], atol=1e-5, rtol=1e-3), name


# Data
def test_label_prompts_by_the_paper_s_template():
    # one or two labels: ours (D10)
    assert collat.label_prompt(["dog"]) == "This is a sound of dog"
    assert collat.label_prompt(["dog", "rain"]) == "This is a sound of dog, and rain"
    assert collat.label_prompt(["dog", "rain", "wind"]) == "This is a sound of dog, rain, and wind"
    assert collat.texts_of_row({"labels": ["dog"], "captions": ["x"]}) == ["This is a sound of dog"]
    assert (
        collat.texts_of_row({"captions": ["x", "y"]})
        == ["x", "y"]
        == collat.texts_of_row({"captions": ["x", "y"], "labels": []})
    )


# The trained model
def test_a_run_logs_its_losses_locks_the_text_and_embeds_alike_from_call_to_call(runs_of, corpus):
    folder, result = runs_of("collat")
    lines = log_of(folder)
    assert [x["step"] for x in lines] == list(range(1, 9)) and lines[0]["ln_B"] == pytest.approx(
        math.log(6)
    )
    for x in lines:
        assert x["loss"] == pytest.approx(
            x["loss_token"] + 0.1 * x["loss_global"] + 0.01 * x["loss_uni"], rel=1e-5
        )
    model = collat.Model.from_checkpoint(folder / "best.pt")
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "val"]
    assert collat.validate(model, rows)[0] == result["scores"] and {
        "tagging_mAP",
        "t2a_R@1",
    } <= set(result["scores"])
    # the text encoder is the one the run started with, bit for bit
    cfg = config("collat", corpus, "x")
    torch.manual_seed(cfg.seed)
    train = common.split_train_val(common.read_manifest([str(corpus)]))[0]
    classes = sorted({label for row in train for label in row["labels"]})
    start = collat.start_model(
        cfg, [t for row in train for t in (*collat.texts_of_row(row), *row["captions"])] + classes
    ).eval()
    assert all(
        torch.equal(v, start.text.state_dict()[k]) for k, v in model.text.state_dict().items()
    )
    assert torch.equal(model.embed_text(TEXTS), start.embed_text(TEXTS))
    assert not torch.equal(model.interaction.out_proj.weight, start.interaction.out_proj.weight)
    x, n = (
        torch.randn(3, 300000, generator=torch.Generator().manual_seed(0)) * 0.1,
        torch.tensor([300000, 90000, 5]),
    )
    together = model.embed_audio(x, n)
    assert torch.equal(together, model.embed_audio(x, n)) and torch.allclose(
        together.norm(dim=1), torch.ones(3), atol=1e-5
    )
    alone = torch.cat([model.embed_audio(x[i : i + 1, : n[i]], n[i : i + 1]) for i in range(3)])
    assert (alone - together).abs().max() < 1e-5
    window = 163840
    parts = [model.embed_audio(x[:1, :window]), model.embed_audio(x[:1, window:])]
    expected = F.normalize(window * parts[0] + (300000 - window) * parts[1], dim=-1)
    assert (expected - together[:1]).abs().max() < 1e-5


def test_prompts_are_what_the_text_encoder_makes_of_the_tokens_and_have_the_scale_of_text():
    model = small_model()
    x = torch.randn(2, 40000, generator=torch.Generator().manual_seed(0)) * 0.1
    tokens, prompts = model.token_embeds(x), model.prompt_embeds(x)
    assert tokens.shape == prompts.shape == (2, 20, 64)
    pooled = F.normalize(model.text.pool(prompts), dim=-1)
    assert torch.allclose(pooled, model.embed_audio(x), atol=1e-5)
    ids = model.text_encoder.tokenize(TEXTS)
    of_text = model.text.states(model.text.token_embeds(ids["input_ids"]), ids["attention_mask"])[
        -1
    ]
    assert prompts.norm(dim=-1).mean() / of_text.norm(dim=-1).mean() == pytest.approx(1, abs=0.05)


def test_training_brings_the_tokens_to_the_scale_of_the_embeddings():
    model = small_model().train()
    batch = small_batch(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def rms(x):
        return x.square().mean().sqrt().item()

    target = rms(model.text.token_embeds(batch["input_ids"])[batch["attention_mask"].bool()])
    before = rms(model.token_embeds(torch.ones(1, 16000) * 0.1))
    for step in range(60):
        torch.manual_seed(step)
        loss, _, parts = collat.training_loss(collat.Config(data=[]), *model(**batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = rms(model.interaction(model.slots, model.audio_encoder(batch["log_mel"][:1])))
    assert before > 5 * target and 0.3 * target < after < 3 * target, (before, after, target)


def test_attention_of_a_token_is_that_of_its_slot_and_names_the_token():
    model = small_model()
    x = torch.randn(3, 60000, generator=torch.Generator().manual_seed(0)) * 0.1
    tokens, maps = model.token_attention(x, TEXTS)
    assert tokens[1] == [
        "[CLS]",
        "this",
        "is",
        *model.text_encoder.tokenizer.tokenize("a sound of wind"),
        "[SEP]",
    ]
    assert [m.shape for m in maps] == [
        (len(t), *model.audio_encoder.grid) for t in tokens
    ] and model.patch_s == 0.48
    audio = model.audio_encoder(model.log_mel_of(x))
    shares = model.interaction.attention(model.slots.expand(3, -1, -1), audio)
    assert torch.allclose(shares.sum(-1), torch.ones(3, 20), atol=1e-5)
    ids = model.text_encoder.tokenize(TEXTS)
    distance = torch.cdist(model.text.token_embeds(ids["input_ids"]), model.token_embeds(x), p=1)
    for b, chosen in enumerate(slow_greedy(distance, ids["attention_mask"].bool())):
        for j, i in chosen.items():
            assert np.allclose(maps[b][j].ravel(), shares[b, i, 2:].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(token_layer=1),
        dict(blocks=3),
        dict(token_weight=0.0, uni_weight=0.0, global_weight=1.0),
        dict(global_weight=0.0, micro_batch=2),
        dict(noise_std=0.0),
    ],
    ids=str,
)
def test_every_ablation_trains_and_reloads(corpus, tmp_path, runs_of, overrides):
    result = collat.main(
        config("collat", corpus, tmp_path, name="x", steps=2, eval_steps=2, **overrides)
    )
    assert np.isfinite(result["scores"]["t2a_R@1"])
    model = collat.Model.from_checkpoint(tmp_path / "x/last.pt")
    assert len(model.interaction.blocks) == overrides.get("blocks", SMALL_OF["collat"]["blocks"])
    both_views_alike = all(line["loss_uni"] < 1e-5 for line in log_of(tmp_path / "x"))
    assert both_views_alike == (overrides.get("noise_std") == 0 or overrides.get("uni_weight") == 0)


def test_a_clip_text_encoder_goes_through_training_and_checkpoint(corpus, tmp_path):
    """With a CLIP text tower and its projection: the kind the paper locks, small."""
    backend = common.text_encoder_from_scratch(
        ["this is a sound of rain and a bell, chirp"], 64, 1, 1, 30
    ).tokenizer
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=len(backend),
            projection_dim=24,
            bos_token_id=backend.cls_token_id,
            eos_token_id=backend.sep_token_id,
            max_position_embeddings=30,
        )
    )
    model.save_pretrained(tmp_path / "clip"), backend.save_pretrained(tmp_path / "clip")
    result = collat.main(
        config(
            "collat",
            corpus,
            tmp_path,
            name="c",
            steps=2,
            eval_steps=2,
            max_tokens=30,
            text_model=str(tmp_path / "clip"),
        )
    )
    again = collat.Model.from_checkpoint(tmp_path / "c/best.pt")
    assert (
        again.text.is_clip
        and again.text.encoder.model.text_projection.out_features == 24
        and np.isfinite(result["scores"]["tagging_mAP"])
    )
    ids = again.text_encoder.tokenize(["a bell"])
    expected = F.normalize(
        model.eval()(**{k: ids[k] for k in ("input_ids", "attention_mask")}).text_embeds, dim=-1
    )
    assert torch.allclose(again.embed_text(["a bell"]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="--max-tokens 31: .*clip has positions for 30"):
        collat.locked_text(str(tmp_path / "clip"), 31)


def test_a_new_model_starts_at_the_mean_token():
    cfg = collat.Config(
        data=[],
        text_model="none",
        audio_weights="none",
        audio_dim=128,
        audio_layers=1,
        audio_heads=2,
        blocks=2,
        text_dim=64,
        text_layers=1,
    )
    torch.manual_seed(0)
    model = collat.start_model(cfg, TEXTS)
    table = model.text_encoder.model.get_input_embeddings().weight
    with torch.no_grad():
        tokens = model.interaction(torch.randn(400, 20, 128), torch.randn(400, 30, 128)).flatten(
            0, 1
        )  # (8000, C)
    distance = (tokens - table.mean(0)) / table.std(0)
    assert (
        distance.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
        and distance.mean().abs() < 0.1
    )
