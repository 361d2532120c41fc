"""Every equation of MGA-CLAP against hand-computed values or a slow loop written from the paper."""

import math

import entmax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import mga_clap


def random_batch(B=5, D=6, seed=0, twins=False):
    g = torch.Generator().manual_seed(seed)
    a, t = (
        F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    ids = torch.tensor([0, 1, 0, 3, 1][:B]) if twins else torch.arange(B)
    return (
        (a @ t.T).requires_grad_(),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        ids[:, None] == ids[None],
    )


# Eq. (1)
def test_clap_loss_by_hand():
    sim = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    same = torch.eye(2, dtype=torch.bool)
    # tau 0.5: logits 1.6 0.4 / 0.8 1.2; rows ln(1+e^-1.2), ln(1+e^-0.4); columns ln(1+e^-0.8),
    # ln(1+e^-0.8)
    rows = (math.log(1 + math.exp(-1.2)) + math.log(1 + math.exp(-0.4))) / 2
    columns = math.log(1 + math.exp(-0.8))
    assert mga_clap.clap_loss(sim, 0.5, same).item() == pytest.approx(
        (rows + columns) / 2, abs=1e-6
    )


def test_uninformative_similarity_gives_ln_b():
    same = torch.eye(7, dtype=torch.bool)
    for loss in (
        mga_clap.clap_loss(torch.zeros(7, 7), 0.07, same),
        mga_clap.hard_negative_loss(torch.zeros(7, 7), 0.07, 0.15, same),
        mga_clap.official_loss(torch.zeros(7, 7), 0.07, 0.15, same),
    ):
        assert loss.item() == pytest.approx(math.log(7), abs=1e-5)


# Eq. (2), (3)
def test_codeword_affinity_by_hand():
    feats = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    valid = torch.tensor([[True, True, False]])
    # affinities max over the two valid frames: 1, 2, -1; eta 2: 0.5, 1, -0.5; sparsemax: 0.25,
    # 0.75, 0
    assert mga_clap.codebook_weights(feats, codebook, 2.0, valid)[0].tolist() == pytest.approx(
        [0.25, 0.75, 0.0]
    )
    # mean over valid frames: 0.5, 1, -1.5 -> /2: 0.25, 0.5, -0.75 -> tau = -0.125
    assert mga_clap.codebook_weights(feats, codebook, 2.0, valid, "mean")[
        0
    ].tolist() == pytest.approx([0.375, 0.625, 0])
    soft = torch.softmax(torch.tensor([0.5, 1.0, -0.5]), 0)
    assert torch.allclose(
        mga_clap.codebook_weights(feats, codebook, 2.0, valid, sparsity="softmax")[0], soft
    )
    # official: masked positions score 0 instead of never winning, so the third affinity is 0, not
    # -1
    assert torch.allclose(
        mga_clap.codebook_weights(
            feats, codebook, 2.0, valid, sparsity="softmax", masked_score=0.0
        )[0],
        torch.softmax(torch.tensor([0.5, 1.0, 0.0]), 0),
    )


# Sec. 3.2.2, the mixture of codewords (no number), with Eq. (2) and (3)
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("sparsity", ["sparsemax", "softmax"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_aggregate_is_the_normalised_mixture_of_codewords(pool, sparsity, variant):
    settings = dict(affinity=pool, sparsity=sparsity, variant=variant, affinity_scale=1.0)
    model = tiny_model(**settings)
    feats, lengths = torch.randn(3, 4, 16), (4, 2, 3)
    embeds, active = model.aggregate(feats, torch.arange(4) < torch.tensor(lengths)[:, None])
    slow, counts = [], []
    for clip, n in zip(feats, lengths):
        affinity = []
        for z in model.codebook:
            of_frames = [(f @ z).item() for f in clip[:n]]
            if variant == "official" and n < 4 and pool == "max":
                of_frames.append(0.0)  # D3
            value = max(of_frames) if pool == "max" else sum(of_frames) / n
            affinity.append(value / model.eta)
        affinity = torch.tensor(affinity)[None]
        weights = affinity.softmax(1)[0]
        if sparsity == "sparsemax":
            weights = entmax.sparsemax(affinity)[0]
        counts.append(int((weights > 0).sum()))
        mixture = sum(w * z for w, z in zip(weights, model.codebook))
        slow.append(mixture / mixture.norm())
    assert torch.allclose(embeds, torch.stack(slow), atol=1e-5)
    assert active.item() == pytest.approx(sum(counts) / 3)
    assert (max(counts) < 12) == (sparsity == "sparsemax")  # of 12 codewords


@pytest.mark.parametrize("twins", [False, True])
def test_training_loss_is_the_one_that_the_settings_ask_for(twins):
    sim, tau, same = random_batch(B=5, D=6, twins=twins)
    audio = F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1)
    sim, ids = audio @ text.T, same.int().argmax(1)

    def ours(**settings):
        cfg = mga_clap.Config(data=[], gamma=0.5, **settings)
        loss, returned = mga_clap.training_loss(cfg, audio, text, tau, ids)
        assert torch.equal(returned, sim)
        return loss.item()

    slow = slow_hard_negative
    assert ours() == pytest.approx(slow(sim, tau, 0.5, same).item(), abs=1e-9)
    plain = slow(sim, tau, 0.0, same).item()
    assert ours(hard_negatives=False) == pytest.approx(plain, abs=1e-9)
    extra = sum(x.abs().mean().item() / math.sqrt(5) for x in (audio, text))  # D7
    for hard in (True, False):
        core = mga_clap.official_loss(sim, tau, 0.5, same, hard).item()
        loss = ours(variant="official", hard_negatives=hard)
        assert loss == pytest.approx(core + extra, abs=1e-9)
    assert core != pytest.approx(mga_clap.official_loss(sim, tau, 0.5, same).item(), abs=1e-3)


@pytest.mark.parametrize("aggregator", ["mean", "wstag"])
def test_mean_aggregator_ignores_padding(aggregator):
    model = tiny_model(aggregator=aggregator)
    feats = torch.randn(2, 5, 16)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    # a pairwise method's vectors are means of unit vectors (D21)
    rows = feats[0, :3] if aggregator == "mean" else F.normalize(feats[0, :3], dim=-1)
    expected = F.normalize(rows.mean(0), dim=0)
    assert torch.allclose(model.aggregate(feats, valid)[0][0], expected, atol=1e-6)


# Eq. (4), (5), (6): ordinary attention, which the locality-aware block does without
@pytest.mark.parametrize("biased", [False, True])
def test_ordinary_attention_by_hand(biased):
    torch.manual_seed(0)
    attention = common.Attention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64) if biased else None
    got, w, b = attention(x, bias), attention.qkv.weight, attention.qkv.bias
    for n in range(2):
        q, k, v = ([w[i : i + 8] @ u + b[i : i + 8] for u in x[n]] for i in (0, 8, 16))  # Eq. (4)
        for here in range(5):
            heads = []
            for h in range(2):
                of = slice(4 * h, 4 * h + 4)  # d is the width of a head
                score = torch.stack([q[here][of] @ k[j][of] for j in range(5)]) / math.sqrt(4)
                score = (score + bias[0, h, here] if biased else score).exp()
                score = score / score.sum()  # Eq. (5)
                heads.append(sum(score[j] * v[j][of] for j in range(5)))  # Eq. (6)
            slow = attention.proj.weight @ torch.cat(heads) + attention.proj.bias
            assert torch.allclose(got[n, here], slow)


# Sec. 3.3, U' = V (no number)
@pytest.mark.parametrize("locality", ["paper", "official"])
def test_locality_aware_block_by_hand(locality):
    torch.manual_seed(0)
    block = common.Block(8, 2, locality=locality).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    w, b = block.attn.qkv.weight, block.attn.qkv.bias
    for n in range(2):
        for i in range(5):
            h = F.layer_norm(x[n, i], (8,), block.norm1.weight, block.norm1.bias)
            value = w[16:] @ h + b[16:]  # the third part of qkv is V
            y = x[n, i] + block.attn.proj.weight @ value + block.attn.proj.bias
            h = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias)
            if locality == "paper":
                h = F.gelu(block.mlp["fc1"].weight @ h + block.mlp["fc1"].bias)
                h = block.mlp["fc2"].weight @ h + block.mlp["fc2"].bias
            assert torch.allclose(block(x)[n, i], y + h)
    other = x.clone()
    other[:, 3] += 1  # a position never sees another
    assert torch.equal(block(other)[:, :3], block(x)[:, :3])


# Eq. (7), (8)
def slow_hard_negative(sim, tau, gamma, same):
    """Loops over the printed sums (their mean, D1); other pairs of a clip are left out (D4)."""
    B, total = len(sim), 0
    for s, same_way in ((sim, same), (sim.T, same.T)):
        for i in range(B):
            others = [j for j in range(B) if j == i or not same_way[i, j]]
            norm = sum(torch.exp(gamma * s[i, k] / tau) for k in others)
            denominator = torch.exp(s[i, i] / tau)
            for j in others:
                if j != i:
                    alpha = len(others) * torch.exp(gamma * s[i, j] / tau) / norm
                    denominator = denominator + alpha * torch.exp(s[i, j] / tau)
            total = total - torch.log(torch.exp(s[i, i] / tau) / denominator)
    return total / (2 * B)


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.15, 1.0])
def test_hard_negative_loss_and_gradients_equal_the_slow_loop(twins, gamma):
    sim, tau, same = random_batch(twins=twins)
    fast = mga_clap.hard_negative_loss(sim, tau, gamma, same)
    slow = slow_hard_negative(sim, tau, gamma, same)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(fast, (sim, tau)), torch.autograd.grad(slow, (sim, tau))):
        assert torch.allclose(a, b, atol=1e-12)


def test_hard_negative_loss_by_hand():
    sim = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    e = math.exp
    # tau 0.5, gamma 0.5: halves of the logits are 0.8 0.2 / 0.4 0.6
    r0 = math.log(1 + 2 * e(0.2) / (e(0.8) + e(0.2)) * e(-1.2))
    r1 = math.log(1 + 2 * e(0.4) / (e(0.4) + e(0.6)) * e(-0.4))
    c0 = math.log(1 + 2 * e(0.4) / (e(0.8) + e(0.4)) * e(-0.8))
    c1 = math.log(1 + 2 * e(0.2) / (e(0.2) + e(0.6)) * e(-0.8))
    got = mga_clap.hard_negative_loss(sim, 0.5, 0.5, torch.eye(2, dtype=torch.bool)).item()
    assert got == pytest.approx((r0 + r1 + c0 + c1) / 4, abs=1e-6)


@pytest.mark.parametrize("twins", [False, True])
def test_gamma_zero_is_plain_clap(twins):
    sim, tau, same = random_batch(twins=twins)
    assert mga_clap.hard_negative_loss(sim, tau, 0.0, same).item() == pytest.approx(
        mga_clap.clap_loss(sim, tau, same).item(), abs=1e-12
    )


@pytest.mark.parametrize("tau", [1e-3, 1e3])
def test_losses_survive_extreme_temperatures(tau):
    sim, _, same = random_batch(twins=True)
    sim = sim.detach().float().requires_grad_()
    for loss in (
        mga_clap.hard_negative_loss(sim, tau, 0.15, same),
        mga_clap.clap_loss(sim, tau, same),
    ):
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, sim)[0]).all()


def test_losses_do_not_depend_on_the_order_of_the_batch():
    sim, tau, same = random_batch(twins=True)
    p = torch.tensor([3, 0, 4, 1, 2])
    for f in (
        lambda s, m: mga_clap.hard_negative_loss(s, tau, 0.15, m),
        lambda s, m: mga_clap.clap_loss(s, tau, m),
    ):
        assert f(sim, same).item() == pytest.approx(
            f(sim[p][:, p], same[p][:, p]).item(), abs=1e-12
        )


@pytest.mark.parametrize("twins", [False, True])
def test_official_loss_equals_a_loop_over_the_released_formula(twins):
    sim, tau, same = random_batch(twins=twins)
    B, gamma, total = len(sim), 0.15, 0
    for s in (sim, sim.T):
        logits = s / tau
        shifted = logits - logits.max(1, keepdim=True).values.detach()
        hard = torch.exp(gamma * shifted)
        for i in range(B):
            denominator = 1e-7
            for j in range(B):
                row_sum_of_j = hard[
                    j
                ].sum()  # the released broadcast: the sum of row j, not of row i
                weight = 1.0 if same[i, j] else (B - 1) * hard[i, j] / (row_sum_of_j - hard[i, j])
                denominator = denominator + weight * torch.exp(shifted[i, j])
            for j in range(B):
                total = total - same[i, j] / same[i].sum() * (
                    shifted[i, j] - torch.log(denominator)
                )
    fast = mga_clap.official_loss(sim, tau, gamma, same)
    assert fast.item() == pytest.approx(total.item() / (2 * B), abs=1e-12)
    for a, b in zip(
        torch.autograd.grad(fast, (sim, tau)), torch.autograd.grad(total / (2 * B), (sim, tau))
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_embedding_regulariser_by_hand():
    assert mga_clap.embedding_regulariser(
        torch.tensor([[0.6, -0.8], [1.0, 0.0]])
    ).item() == pytest.approx(0.6 / math.sqrt(2), abs=1e-6)


# The sparsemax of Eq. (3)
@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 30.0])
def test_sparsemax_equals_entmax_and_a_bisection(scale):
    z = (
        torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    ).requires_grad_()
    g = torch.randn(6, 40, dtype=torch.float64)
    p = common.sparsemax(z)
    theirs = entmax.sparsemax(z)
    assert torch.allclose(p, theirs, atol=1e-10)
    assert torch.allclose(
        torch.autograd.grad(p, z, g)[0], torch.autograd.grad(theirs, z, g)[0], atol=1e-10
    )
    for row, ours in zip(z.detach().numpy(), p.detach().numpy()):
        low, high = row.min() - 1, row.max()
        for _ in range(200):
            tau = (low + high) / 2
            low, high = (tau, high) if np.maximum(row - tau, 0).sum() > 1 else (low, tau)
        assert np.abs(np.maximum(row - tau, 0) - ours).max() < 1e-9


def test_sparsemax_gradcheck_ties_shift_and_half_precision():
    z = torch.tensor(
        [[0.3, 0.3, -2.0, 0.1], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(common.sparsemax, z)
    assert torch.allclose(common.sparsemax(z + 1000), common.sparsemax(z), atol=1e-9)
    assert common.sparsemax(z[1:])[0].tolist() == pytest.approx([0.25] * 4)
    half = common.sparsemax(torch.randn(3, 4096).to(torch.bfloat16))
    assert half.dtype == torch.float32 and torch.allclose(half.sum(1), torch.ones(3), atol=1e-5)


def tiny_model(**overrides):
    torch.manual_seed(0)
    cfg = common.configure(
        mga_clap.Config,
        **{
            **dict(
                data=["x"],
                size="tiny",
                audio_dim=16,
                audio_depths=[1, 2],
                text_dim=64,
                text_layers=1,
                joint_dim=16,
                codewords=12,
            ),
            **overrides,
        },
    )
    return mga_clap.Model(
        cfg, common.text_encoder_from_scratch(["a dog barks", "rain falls"], 64, 1, 1, 30)
    ).eval()


def test_paper_size_has_the_paper_dimensions():
    cfg = mga_clap.Config(data=["x"])
    model = mga_clap.Model(cfg, common.text_encoder_from_scratch(["a dog"], 768, 1, 12, 30))
    assert model.codebook.shape == (4096, 1024) and model.frame_s == 0.3125 and model.eta == 32000
    assert (cfg.batch_size, cfg.lr, cfg.epochs, cfg.gamma) == (128, 5e-5, 15, 0.15)
    encoder = sum(p.numel() for p in model.audio_encoder.parameters())
    assert 27e6 < encoder < 28.5e6  # HTS-AT without its tagging heads
    assert model.audio_encoder.n_frames == 32 and model.audio_encoder.out_dim == 768


def slow_pair_score(method, frames, words, temperature):
    """One clip's frames (T, D) and one caption's words (L, D), by the sentences of the papers."""
    cos = frames @ words.T  # (T, L)
    if method == "uaca":
        return sum(cos[t, n] for t in range(len(frames)) for n in range(len(words))) / cos.numel()
    if method == "wstag":
        return sum(max(cos[t, n] for t in range(len(frames))) for n in range(len(words))) / len(
            words
        )
    text = sum(words) / len(words)
    text = text / text.norm()
    weights = [math.exp(float(f @ text) / temperature) for f in frames]
    pooled = sum(w * f for w, f in zip(weights, frames)) / sum(weights)
    return pooled @ text / pooled.norm()


@pytest.mark.parametrize("method", ["uaca", "wstag", "pacl"])
def test_compared_methods_equal_a_slow_reading_with_padding(method):
    torch.manual_seed(0)
    n_frames, n_words = [3, 5, 2], [4, 1]
    frames, words = torch.zeros(3, 5, 6), torch.zeros(2, 4, 6)
    for i, n in enumerate(n_frames):
        frames[i, :n] = torch.nn.functional.normalize(torch.randn(n, 6), dim=-1)
    for j, n in enumerate(n_words):
        words[j, :n] = torch.nn.functional.normalize(torch.randn(n, 6), dim=-1)
    got = mga_clap.PAIRWISE[method](frames, words, torch.tensor(0.2))
    for i, t in enumerate(n_frames):
        for j, n in enumerate(n_words):
            expected = float(slow_pair_score(method, frames[i, :t], words[j, :n], 0.2))
            assert float(got[i, j]) == pytest.approx(expected, abs=1e-5), (i, j)


def slow_atst(encoder, log_mel):
    """ATST-Frame block by block for one clip (64, T_mel), attention written out."""
    state, F = {k: v.double() for k, v in encoder.state_dict().items()}, torch.nn.functional
    dim, heads = encoder.out_dim, encoder.blocks[0].attn.heads
    T = log_mel.shape[1] // 4
    tokens = torch.stack(
        [torch.cat([log_mel[m, 4 * t : 4 * t + 4] for m in range(64)]) for t in range(T)]
    ).double()
    x = tokens @ state["patch_embed.weight"].T + state["patch_embed.bias"]
    x = torch.stack([x[t] + state["pos_embed"][0, t + 1] for t in range(T)])
    for i, block in enumerate(encoder.blocks):

        def part(name):
            return state[f"blocks.{i}.{name}"]

        y = F.layer_norm(x, (dim,), part("norm1.weight"), part("norm1.bias"), 1e-6)
        q, k, v = (y @ part("attn.qkv.weight").T).split(dim, -1)
        if not block.locality:
            mixed = []
            for h in range(heads):
                of = slice(h * dim // heads, (h + 1) * dim // heads)
                weight = ((q[:, of] @ k[:, of].T) / math.sqrt(dim // heads)).softmax(-1)
                mixed.append(weight @ v[:, of])
            v = torch.cat(mixed, -1)
        x = x + v @ part("attn.proj.weight").T + part("attn.proj.bias")
        y = F.layer_norm(x, (dim,), part("norm2.weight"), part("norm2.bias"), 1e-6)
        y = F.gelu(y @ part("mlp.fc1.weight").T + part("mlp.fc1.bias"))
        x = x + y @ part("mlp.fc2.weight").T + part("mlp.fc2.bias")
    return F.layer_norm(x, (dim,), state["norm_frame.weight"], state["norm_frame.bias"], 1e-6)


@pytest.mark.parametrize("locality_blocks", [0, 1])
def test_atst_frame_equals_a_slow_reading(locality_blocks):
    torch.manual_seed(0)
    encoder = mga_clap.ATSTFrame(24, 2, 3, locality_blocks=locality_blocks).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    log_mel = torch.randn(2, 64, 43)  # 10 tokens, 3 frames left over
    got = encoder(log_mel)
    assert got.shape == (2, 10, 24)
    for clip, one in zip(got, log_mel):
        assert (clip - slow_atst(encoder, one)).abs().max() < 1e-5


def test_atst_mel_by_hand_and_alone_as_in_a_batch():
    mel = mga_clap.ATSTMel()
    t = torch.arange(16000) / 16000
    loud, quiet = torch.sin(2 * math.pi * 1000 * t), 1e-4 * torch.sin(2 * math.pi * 1000 * t)
    both = mel(torch.stack([loud, quiet]))
    assert both.shape == (2, 64, 101)
    assert torch.equal(both[1], mel(quiet[None])[0])  # top_db is of the clip, not of the batch

    # HTK mel scale, 64 triangles between 60 and 7800 Hz: 1000 Hz lies in bin 23 or 24 of 0..63
    def to_mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    position = (to_mel(1000) - to_mel(60)) / (to_mel(7800) - to_mel(60)) * 65 - 1
    assert abs(both[0, :, 50].argmax().item() - position) <= 0.75
    # 80 dB below the loudest bin is the floor; 40 dB in amplitude 1e-4 -> 80 dB between the two
    # maxima
    assert (both[0].max() - both[0].min()).item() == pytest.approx(
        2 * 80 / (50.6842 + 79.6482), abs=1e-4
    )
    assert (both[0].max() - both[1].max()).item() == pytest.approx(
        2 * 80 / (50.6842 + 79.6482), abs=1e-3
    )


def test_a_file_with_atst_frames_published_names_and_shapes_loads(tmp_path):
    state = {
        "model.teacher.encoder.patch_embed.patch_embed.weight": torch.randn(768, 256),
        "model.teacher.encoder.patch_embed.patch_embed.bias": torch.randn(768),
        "model.teacher.encoder.pos_embed": torch.randn(1, 251, 768),
        "model.teacher.encoder.mask_embed": torch.randn(768),
        "model.teacher.encoder.norm_frame.weight": torch.randn(768),
        "model.teacher.encoder.norm_frame.bias": torch.randn(768),
        "model.teacher.projector.0.weight": torch.randn(3, 3),
        "model.student.encoder.pos_embed": torch.randn(1, 251, 768),
    }
    for i in range(12):
        for name, shape in (
            ("norm1.weight", 768),
            ("norm1.bias", 768),
            ("attn.qkv.weight", (2304, 768)),
            ("attn.proj.weight", (768, 768)),
            ("attn.proj.bias", 768),
            ("norm2.weight", 768),
            ("norm2.bias", 768),
            ("mlp.fc1.weight", (3072, 768)),
            ("mlp.fc1.bias", 3072),
            ("mlp.fc2.weight", (768, 3072)),
            ("mlp.fc2.bias", 768),
        ):
            state[f"model.teacher.encoder.blocks.{i}.{name}"] = torch.zeros(shape) + i
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "atstframe_base.ckpt")
    encoder = mga_clap.ATSTFrame(locality_blocks=1)
    mga_clap.load_atst(encoder, str(tmp_path / "atstframe_base.ckpt"))
    assert torch.equal(
        encoder.patch_embed.weight, state["model.teacher.encoder.patch_embed.patch_embed.weight"]
    )
    assert encoder.blocks[11].attn.qkv.weight[0, 0] == 11 and encoder.n_frames == 250
    del state["model.teacher.encoder.norm_frame.bias"]
    torch.save({"state_dict": state}, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match="norm_frame.bias"):
        mga_clap.load_atst(encoder, str(tmp_path / "cut.ckpt"))
