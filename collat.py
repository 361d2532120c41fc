"""CoLLAT: audio mapped to the input token embeddings of a locked text encoder.

Silva, Whitehead, Lengerich, Leather: "CoLLAT: On Adding Fine-grained Audio Understanding to
Language Models using Token-Level Locked-Language Tuning", NeurIPS 2023 (OpenReview 2NncD8AaFK). No
code or weights were released.

The idea: CLAP tunes both encoders on audio, so its text encoder loses language understanding. Here
the text encoder (CLIP's) is locked, and the audio branch must produce its input. Cross-attention
blocks turn random slots into token embeddings, one per slot. The locked encoder then computes the
global embeddings of both branches. There are three losses: the tokens must match those of the label
prompt, in any order; the global embeddings must tell the clips of a batch apart; noise on the audio
must not change the tokens. The tokens can guide any application built on that text encoder.

Equations (paper) -> code
  Eq. (1)  cross-token loss: L1 of matched tokens       cross_token_loss
  Eq. (2)  cross-global loss: contrastive               cross_global_loss
  Eq. (3)  uni-token loss: L1 of clean against noisy    uni_token_loss
  Eq. (4)  the weighted sum of the three                training_loss
  Sec. 3.1  f_a, f_a-t, E_t and f_t (no number)         Model.forward

Letters: B clips in a batch [|B|], S samples, 1024 frames [T] of 10 ms, 128 mel bins [F], P audio
patches [M] (12 bands x 101 times; AST's states also include two class tokens, D12), N slots 77 [N],
L tokens of a batch's longest text, C width of the text encoder, D joint dimension. In the paper C
is the number of a clip's labels, and in Sec. 4.1 N is the number of patches.

Deviations from the paper, and what it leaves open
  D1  Not stated: sample rate and normalisation. Ours: 16 kHz, AST's. The paper's input has
      "128 x 100t" bins for t seconds; ours is zero-padded to AST's 1024 frames (10.24 s). The "25ms
      Hamming window" is the paper's; AST's weights were trained with a Hann window.
  D2  Not stated: which "pretrained CLIP text encoder", and where it pools audio. Ours: ViT-L/14's,
      as wide as AST. It pools a text at its end token. Predicted tokens have no end token, so they
      are pooled at the last slot. Other transformers encoders pool by the mean of their tokens.
  D3  The "cross-attention-based blocks [37]" are drawn in Fig. 3b; we had neither the figure nor
      [37]. Ours: pre-norm cross-attention to the audio, then a feed-forward layer, no
      self-attention, at AST's width; at the end LayerNorm and a linear layer to C, initialised to
      the mean and standard deviation of the text encoder's token embeddings. The paper's blocks
      "take the currently predicted text token embeddings from the previous block as input". Ours
      pass on hidden states, and only the last layer turns them into token embeddings.
  D4  Slots are "randomly initialized" from a normal distribution. Not stated: how often. Ours: anew
      for every clip and step in training, one fixed draw in evaluation. The clean and the noisy
      view share the draw.
  D5  The paper matches "all the tokens" to the "closest" one. Not stated: the distance (ours is L1,
      as in the loss) and the treatment of padding. Ours: padding tokens are not matched, slots left
      over get no token loss, and no gradient flows through the choice of the pairs. The optimal
      assignment, the paper's "future work", was tried once and is not included: tagging mAP .440,
      greedy .443 (one seed, tiny size). f_t reads the slots in their own order, as in
      Sec. 3.1.
  D6  Eq. (1) and (3) print the L1 norm, "||.||_1". It is a sum: over 77 x 768 values it is 59,136
      times the mean. Not stated: how clips are averaged. Ours: Eq. (1) is the mean over the values
      of all real tokens of the batch together, so long prompts weigh more; Eq. (3) is the mean over
      values, slots and clips. With the paper's weights the first two terms of Eq. (4) then differ
      by a factor of about ten in value and five in gradient (first 120 steps of the demo). With
      sums over 77 tokens at such distances Eq. (2) would be less than a thousandth of the loss. So
      we keep the paper's weights, but if its losses are sums, our three terms have other
      proportions. With weight 0.01 the gradient of Eq. (3) is three to four orders of magnitude
      below the others, so it has little effect. --token-weight 59136 --uni-weight 591 weight the
      means as sums over all 77 slots of 768; over its real tokens alone, the sum of Eq. (1) is
      smaller.
  D7  Eq. (2) is printed without its minus sign. tau, "a temperature parameter", multiplies cosines
      (scale). Not stated: its value and whether embeddings are normalised. Ours are normalised. As
      in CLIP, tau starts at 1 / 0.07 and is learnt; it stays between 1 (ours) and 100 (CLIP).
  D8  Eq. (3) adds "a Gaussian noise" to x^a, the log-mel. Not stated: its standard deviation. Ours:
      0.1 on the normalised log-mel; the paper prints 0.1 for the noisy clips of its evaluation
      (Sec. 5.1). White noise 20 dB below a clip changes that log-mel by 0.17 (root mean square over
      60 clips of tools.scenes). Gradients flow through both views.
  D9  Stated: the loss weights, 8 V100, "approximately 320 GPU hours". Not stated, so ours: AdamW,
      learning rates, training AST too (at a tenth of the rate), weight decay, warm-up, batch,
      steps, gradient norm at most 1, and the choice of the checkpoint (mean of the validation
      scores that the manifest has labels or captions for).
  D10 Rows with labels give the prompt "This is a sound of A, B, and C". Not stated: the form for
      one or two labels (here "A" and "A, and B"), the order of labels (here the manifest's), names
      that hold commas (kept). Rows without labels give one of their captions; the paper decides "to
      not utilize natural language descriptions".
  D11 Not stated: precision. Ours: bf16 autocast on a GPU; the losses and the matching are never in
      bf16 (on a GPU, matrix products of the losses may use TF32).
  D12 The blocks attend to all of AST's states, its two class tokens included; the paper's h^a are
      those of "the audio tokens (i.e., patches in the log mel spectrogram)".
  D13 The paper trains on 10 s clips. From audio over 10.24 s, training takes a random window, and
      evaluation takes the mean over consecutive windows, weighted by duration. token_embeds and
      prompt_embeds take the first window.
  D14 Not stated: the prompt of zero-shot evaluation. Validation uses the training prompt with one
      label. So does eval.py with --prompt collat; its default is the bare class name.

Run:  python collat.py --data demo                              (two CPU cores, about 4 minutes)
      python collat.py --data audioset --batch-size 256 --micro-batch 32
      torchrun --nproc-per-node 8 collat.py --data ...          (one node, 8 GPUs)
      python eval.py runs/NAME/best.pt --data MANIFEST --protocol all --prompt collat
Eq. (2) starts near ln B. Eq. (1) starts near its value for the mean token embedding, because the
slots start there (D3), and may rise in the first 100 steps.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from torch.utils.data import Dataset

import common

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass(init=False)
class Config(common.RunConfig):
    # data
    data: list[str]  # manifests, folders that hold manifest.jsonl, or the word demo
    # paper: AST + CLIP ViT-L/14's text tower; tiny: a small AST with random weights
    size: Literal["paper", "tiny"] = "paper"
    # whole model to start from, with its own settings: a run's best.pt; none: start from
    # --audio-weights and --text-model
    weights: str = "none"
    # initial AST, pre-trained on AudioSet as in Fig. 4b (which Sec. 5.1 calls Table 4b):
    # transformers folder or hub id, AST's own file, or none
    audio_weights: str = "MIT/ast-finetuned-audioset-10-10-0.4593"
    # the locked text encoder: hub id or folder (D2), or none: random, vocabulary of the training
    # texts
    text_model: str = "openai/clip-vit-large-patch14"
    # number N of slots, and maximum length of a text in tokens (Sec. 3.1: the longest text's, no
    # number printed; CLIP's is 77)
    max_tokens: common.Tokens = 77

    # model
    audio_dim: common.Count = 768  # width of AST (768: Sec. 4.1) and of the slots (D3)
    audio_layers: common.Layers = 12  # AST's layers (AST's own)
    audio_heads: common.Count = 12  # heads of AST (its own) and of the blocks (D3)
    audio_patch: Annotated[int, "[1, 128]"] = 16  # frames and mel bins of a patch (Sec. 4.1)
    audio_stride: common.Count = 10  # step from patch to patch (Sec. 4.1: an overlap of 6)
    # cross-attention blocks of the token interaction module (Sec. 5.1, Fig. 4a)
    blocks: common.Layers = 8
    text_dim: common.Count = 768  # text encoder width, read only when --text-model none
    text_layers: common.Layers = 12  # text encoder layers, read only when --text-model none

    # loss
    token_weight: common.NotNegative = 1.0  # lambda 1 of the cross-token loss (Sec. 4.1; D6)
    global_weight: common.NotNegative = 0.1  # lambda 2 of the cross-global loss (Sec. 4.1)
    # lambda 3 of the uni-token loss (Sec. 4.1; D6); 0: no noisy view
    uni_weight: common.NotNegative = 0.01
    # standard deviation of the noisy view's noise, on the normalised log-mel (ours, D8)
    noise_std: common.NotNegative = 0.1
    # text encoder layer whose states the token losses compare; 0: its static embeddings (Sec. 5.1,
    # Fig. 4a)
    token_layer: common.Whole = 0

    # optimisation
    # 10 passes over AudioSet's 2,041,792 clips at this batch size (ours, D9)
    steps: common.Count = 80000
    batch_size: common.Count = 256  # clips over all processes (ours, D9)
    lr: common.Positive = 1e-4  # peak learning rate of AdamW, except for AST (ours, D9)
    audio_lr: common.Positive = 1e-5  # peak learning rate for AST (ours, D9)
    warmup_steps: common.Whole = 1000  # linear warm-up, then cosine to 0 (ours, D9)
    weight_decay: common.NotNegative = 0.01  # of AdamW (ours, D9)
    eval_steps: common.Count = 1000  # steps between validations (each may write best.pt)

    def check(self):
        if not (self.token_weight or self.global_weight):
            raise ValueError(
                "--token-weight 0 --global-weight 0: no loss relates audio to text; at least one "
                "weight must be above 0"
            )
        if self.audio_stride > self.audio_patch:
            raise ValueError(
                f"--audio-patch {self.audio_patch} --audio-stride {self.audio_stride}: the stride "
                "must not exceed the patch"
            )
        if self.audio_dim % self.audio_heads:
            raise ValueError(
                f"--audio-heads {self.audio_heads} does not divide --audio-dim {self.audio_dim}"
            )


# Random weights need a larger learning rate, the same for AST; larger patches make a step
# affordable on a CPU.
TINY = dict(
    audio_weights="none",
    text_model="none",
    max_tokens=20,
    audio_dim=128,
    audio_layers=3,
    audio_heads=4,
    audio_patch=32,
    audio_stride=28,
    blocks=4,
    text_dim=128,
    text_layers=2,
    steps=400,
    batch_size=16,
    lr=1e-3,
    audio_lr=1e-3,
    warmup_steps=40,
    eval_steps=100,
    save_steps=100,
    workers=1,
)
Config.presets = {("size", "tiny"): TINY}
SAMPLE_RATE, N_MELS, N_FRAMES = 16000, 128, 1024  # 10 ms frames
WINDOW_S = 10.24  # D1
METHOD = "collat"

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def fbank(waveform):
    """waveform (S,) at 16 kHz, at most 10.24 s -> normalised log-mel (1024, 128), frames of 25 ms
    every 10 ms (D1).

    Source: kaldi's filterbank as AST uses it; padding is 0 before the normalisation.
    """
    waveform = F.pad(waveform, (0, max(0, 400 - len(waveform))))  # one frame at least
    features = torchaudio.compliance.kaldi.fbank(
        # (1, S) without its mean, as in AST's own code (dataloader.py)
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=SAMPLE_RATE,
        use_energy=False,
        window_type="hamming",  # Sec. 4.1; AST's own code: "hanning" (D1)
        num_mel_bins=N_MELS,
        dither=0.0,
        frame_shift=10,
    )[:N_FRAMES]
    features = F.pad(features, (0, 0, 0, N_FRAMES - len(features)))
    # AudioSet's mean and standard deviation in AST's recipe, which divides by twice the latter (D1)
    return (features + 4.2677393) / (2 * 4.5689974)


class AST(nn.Module):
    """Audio Spectrogram Transformer: log-mel (B, 1024, 128) -> states (B, 2 + P, dim), class tokens
    first.

    Patches are ordered band by band. Names are those of AST's own weights. Source: Gong et al.,
    Interspeech 2021.
    """

    def __init__(self, dim=768, layers=12, heads=12, patch=16, stride=10):
        super().__init__()
        self.out_dim = dim
        # (bands, times), 12 x 101 at the paper's size
        self.grid = ((N_MELS - patch) // stride + 1, (N_FRAMES - patch) // stride + 1)
        # two class tokens, because AST's weights come from a distilled DeiT
        self.cls_token, self.dist_token = (
            nn.Parameter(torch.randn(1, 1, dim) * 0.02) for _ in range(2)
        )
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + math.prod(self.grid), dim) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, patch, stride)})
        self.blocks = nn.ModuleList(common.Block(dim, heads, eps=1e-12) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, log_mel):
        # the image is (B, 1, 128, 1024), mel bins in rows, so patches come band by band
        x = (
            self.patch_embed["proj"](log_mel.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        )  # (B, P, dim)
        first = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token)]
        x = torch.cat([*first, x], 1) + self.pos_embed  # (B, 2 + P, dim), class tokens first
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CrossBlock(nn.Module):
    """One block of the token interaction module: the slots attend to the audio (D3)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)  # D3
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)  # no LayerNorm before it: AST ends in one
        self.proj = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def queries_keys_values(self, slots, audio):
        def split(x):
            # (B, L, n dim) -> (n, B, heads, L, dim / heads); n = 2 for keys and values
            return x.view(*x.shape[:2], -1, self.heads, slots.shape[2] // self.heads).permute(
                2, 0, 3, 1, 4
            )

        # (B, heads, N or 2 + P, dim / heads) each
        (q,), (k, v) = split(self.query(self.norm1(slots))), split(self.key_value(audio))
        return q, k, v

    def forward(self, slots, audio):
        """slots (B, N, dim), audio states (B, 2 + P, dim) -> slots."""
        # audio: all of AST's states (D12)
        attended = F.scaled_dot_product_attention(*self.queries_keys_values(slots, audio))
        slots = slots + self.proj(attended.transpose(1, 2).flatten(2))
        return slots + self.fc2(F.gelu(self.fc1(self.norm2(slots))))


class TokenInteraction(nn.Module):
    """f_a-t: random slots (B, N, dim) and audio states -> text-token embeddings (B, N, C).

    slots from N(0, 1); audio (B, 2 + P, dim); dim: a multiple of heads; out_dim: C. Source: Sec.
    3.1. Copied alone, needs CrossBlock.
    """

    def __init__(self, dim, heads, blocks, out_dim):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in range(blocks))
        self.norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, out_dim)

    def forward(self, slots, audio):
        for block in self.blocks:
            slots = block(slots, audio)
        return self.out_proj(self.norm(slots))  # only here do slots become token embeddings (D3)

    def attention(self, slots, audio):
        """Attention of slots to audio states (B, N, 2 + P) in the last block, mean over heads."""
        for block in self.blocks[:-1]:
            slots = block(slots, audio)
        q, k, _ = self.blocks[-1].queries_keys_values(slots, audio)
        # written out: scaled_dot_product_attention does not return its weights
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1).mean(1)


class LockedText(nn.Module):
    """f_t: a transformers text encoder that is never trained and never in training mode.

    Its input is token embeddings, and gradients flow through it to them. Args: encoder: a
    common.TextEncoder.
    """

    def __init__(self, encoder: common.TextEncoder):
        super().__init__()
        self.encoder, model = encoder, encoder.model
        self.is_clip = hasattr(model, "text_model")  # CLIPTextModelWithProjection
        self.dim = encoder.out_dim
        self.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # model.train() must not turn its dropout on

    def token_embeds(self, input_ids):
        """Static embeddings (B, L, C) of token ids (B, L), without positions."""
        return self.encoder.model.get_input_embeddings()(input_ids)  # E_t of Sec. 3.1

    def states(self, token_embeds, attention_mask=None) -> list:
        """Token embeddings (B, L, C) -> input of the first layer, then output of each layer, the
        last normalised; (B, L, C) each.
        """
        if not self.is_clip:
            # the model itself adds positions to inputs_embeds, as it does for ids
            out = self.encoder.model(
                inputs_embeds=token_embeds, attention_mask=attention_mask, output_hidden_states=True
            )
            return list(out.hidden_states)
        tower, L = self.encoder.model.text_model, token_embeds.shape[1]
        states = [tower.embeddings(inputs_embeds=token_embeds)]
        causal = torch.full(
            (L, L), -math.inf, dtype=states[0].dtype, device=token_embeds.device
        ).triu(1)[None, None]  # (1, 1, L, L), -inf where a token would see a later one
        # padding follows the end token, so the causal mask hides it
        for layer in tower.encoder.layers:
            out = layer(states[-1], attention_mask=causal)
            states.append(out[0] if isinstance(out, tuple) else out)
        return [*states[:-1], tower.final_layer_norm(states[-1])]

    def pool(self, last_states, attention_mask=None):
        """(B, L, C) -> (B, D); attention_mask (B, L), 1 = a real token; None: all are slots."""
        if self.is_clip:
            end = -1 if attention_mask is None else attention_mask.sum(1) - 1  # D2
            return self.encoder.model.text_projection(
                last_states[torch.arange(len(last_states), device=last_states.device), end]
            )
        mask = (
            torch.ones_like(last_states[..., 0])
            if attention_mask is None
            else attention_mask.to(last_states.dtype)
        )
        return (last_states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Model(nn.Module):
    """AST, the token interaction module, and the locked text encoder that both branches end in.

    Args: shape: audio (dim, layers, heads, patch, stride), blocks; text_encoder: a
    common.TextEncoder (kept in checkpoints).
    """

    sample_rate, window_s = SAMPLE_RATE, WINDOW_S
    clean_caption = staticmethod(lambda text: text)

    def __init__(self, shape: dict, text_encoder: common.TextEncoder):
        super().__init__()
        self.shape, audio = shape, shape["audio"]
        self.audio_encoder, self.text = AST(**audio), LockedText(text_encoder)
        self.interaction = TokenInteraction(
            audio["dim"], audio["heads"], shape["blocks"], self.text.dim
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # D7
        self.patch_s = audio["stride"] / 100  # seconds from patch to patch: 100 frames a second
        # a separate generator, so that the draw does not depend on --seed
        slots = torch.randn(
            1, text_encoder.max_tokens, audio["dim"], generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("slots", slots)  # used in evaluation (D4)

    @property
    def text_encoder(self) -> common.TextEncoder:
        return self.text.encoder

    def forward(self, log_mel, input_ids, attention_mask, token_layer=0, noise_std=0.1):
        """One training batch -> audio_embeds, text_embeds (B, D), cross-token sums (B,) and counts
        (B,), uni-token means (B,), scale.

        Shapes: log_mel (B, 1024, 128), input_ids and attention_mask (B, L). noise_std None: no
        noisy view, uni-token means of 0.
        """
        B, noisy = len(log_mel), noise_std is not None
        if self.training:
            slots = torch.randn(B, *self.slots.shape[1:], device=log_mel.device)  # D4
        else:
            slots = self.slots.expand(B, -1, -1)
        views = log_mel
        if noisy:
            views = torch.cat([log_mel, log_mel + noise_std * torch.randn_like(log_mel)])  # D8
        slots = slots.repeat(len(views) // B, 1, 1)  # both views have the same slots
        # h^(a-t) = f_a-t(f_a(x^a)), (B or 2 B, N, C)
        predicted = self.interaction(slots, self.audio_encoder(views))
        with torch.no_grad():
            h_t = self.text.token_embeds(input_ids)  # h^t (B, L, C)
            text_states = self.text.states(h_t, attention_mask)
            text_embeds = F.normalize(
                self.text.pool(text_states[-1], attention_mask).float(), dim=-1
            )
        states = self.text.states(predicted[:B])  # of the clean view, slots in their own order (D5)
        audio_embeds = F.normalize(self.text.pool(states[-1]).float(), dim=-1)
        clean, noised = predicted[:B], predicted[B:]  # without a noisy view the second is empty
        if token_layer:  # the ablation of Fig. 4a
            h_t, clean = text_states[token_layer], states[token_layer]
            noised = self.text.states(noised)[token_layer] if noisy else noised
        # g of Sec. 3.2, computed before the weights are updated; no gradient (D5). The token losses
        # are taken here, so that only numbers are gathered from all processes
        matched = match(clean.detach(), h_t, attention_mask)
        token_sums, token_counts = cross_token_loss(clean, h_t, attention_mask, matched)
        uni = uni_token_loss(clean, noised) if noisy else token_sums.new_zeros(B)
        return audio_embeds, text_embeds, token_sums, token_counts, uni, self.log_scale.exp()

    def log_mel_of(self, waveform, n_samples=None):
        """waveform (B, S), n_samples (B,) -> log-mel (B, 1024, 128) of each clip's first
        10.24 s.
        """
        n_samples = [waveform.shape[1]] * len(waveform) if n_samples is None else n_samples.tolist()
        window = round(WINDOW_S * SAMPLE_RATE)
        return torch.stack(
            [fbank(clip[: min(n, window)].float()) for clip, n in zip(waveform, n_samples)]
        )

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at 16 kHz, n_samples (B,) valid ones -> (B, D), normalised;
        deterministic.
        """
        with common.evaluating(self):
            # D13
            windows, owner, weight, lengths = common.cut_windows(
                waveform, n_samples, round(WINDOW_S * SAMPLE_RATE)
            )
            embeds = []
            # at most 32 windows at a time: bounded memory
            for part, n in zip(windows.split(32), torch.tensor(lengths).split(32)):
                tokens = self._tokens(self.log_mel_of(part, n))
                embeds.append(
                    F.normalize(self.text.pool(self.text.states(tokens)[-1]).float(), dim=-1)
                )
            return common.join_windows(torch.cat(embeds), owner, weight)

    def _tokens(self, log_mel):
        return self.interaction(
            self.slots.expand(len(log_mel), -1, -1), self.audio_encoder(log_mel)
        )

    @torch.no_grad()
    def token_embeds(self, waveform, n_samples=None):
        """h^(a-t) (B, N, C) of the first 10.24 s (D13), to use instead of the text encoder's static
        token embeddings.
        """
        with common.evaluating(self):
            return self._tokens(self.log_mel_of(waveform, n_samples)).float()

    @torch.no_grad()
    def prompt_embeds(self, waveform, n_samples=None):
        """The text encoder's last states (B, N, C) for the first 10.24 s (D13), in place of a
        prompt's.

        For diffusers: pipeline(prompt_embeds=model.prompt_embeds(waveform)), where the pipeline is
        built on this text encoder (Stable Diffusion 1.x on CLIP ViT-L/14).
        """
        with common.evaluating(self):
            return self.text.states(self._tokens(self.log_mel_of(waveform, n_samples)))[-1].float()

    @torch.no_grad()
    def token_attention(self, waveform, texts: list[str]):
        """Which audio patches the slot of each text token attends to, in the first 10.24 s.

        -> two lists with an entry per clip: the tokens of its text, and their attention weights
        (tokens, bands, times).
        """
        with common.evaluating(self):
            ids = common.to_device(self.text_encoder.tokenize(texts), self.slots.device)
            audio = self.audio_encoder(self.log_mel_of(waveform))
            slots = self.slots.expand(len(audio), -1, -1)
            matched = match(
                self.interaction(slots, audio),
                self.text.token_embeds(ids["input_ids"]),
                ids["attention_mask"],
            )
            # (B, N, bands, times); without the class tokens a slot's weights sum to less than 1
            shares = self.interaction.attention(slots, audio)[:, :, 2:].unflatten(
                2, self.audio_encoder.grid
            )
        tokens, maps = [], []
        for b, length in enumerate(ids["attention_mask"].sum(1).tolist()):
            tokens.append(
                self.text_encoder.tokenizer.convert_ids_to_tokens(
                    ids["input_ids"][b, :length].tolist()
                )
            )
            maps.append(shares[b, matched[b, :length]].cpu().numpy())
        return tokens, maps

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised."""
        with common.evaluating(self):
            tokens = common.to_device(self.text_encoder.tokenize(texts), self.slots.device)
            states = self.text.states(
                self.text.token_embeds(tokens["input_ids"]), tokens["attention_mask"]
            )
            return F.normalize(self.text.pool(states[-1], tokens["attention_mask"]).float(), dim=-1)

    @classmethod
    def from_checkpoint(cls, path):
        """A run's last.pt or best.pt."""
        content = common.read_checkpoint(path, METHOD)
        with common.rebuilding(path, content):
            model = cls(
                content["shape"],
                common.text_encoder_from_description(
                    content["text_encoder"], content["config"]["max_tokens"]
                ),
            )
        common.load_strict(model, content["model"], path)
        return model.eval()


def start_model(cfg: Config, texts: list[str]) -> Model:
    """The model of --weights, or a new one: AST from --audio-weights, the locked text encoder from
    --text-model, the token interaction module with random weights.
    """
    if cfg.weights != "none":
        model = Model.from_checkpoint(cfg.weights)
        check_token_layer(cfg, model)
        return model
    text_encoder = (
        common.start_text_encoder(cfg, texts, cfg.max_tokens)
        if cfg.text_model == "none"
        else locked_text(cfg.text_model, cfg.max_tokens)
    )
    audio = dict(
        dim=cfg.audio_dim,
        layers=cfg.audio_layers,
        heads=cfg.audio_heads,
        patch=cfg.audio_patch,
        stride=cfg.audio_stride,
    )
    model = Model(dict(audio=audio, blocks=cfg.blocks), text_encoder)
    check_token_layer(cfg, model)
    start_at_the_mean_token(model)
    if cfg.audio_weights != "none":
        load_ast(model.audio_encoder, cfg.audio_weights)
    return model


def check_token_layer(cfg: Config, model: Model) -> None:
    n_layers = model.text_encoder.model.config.num_hidden_layers
    if cfg.token_layer > n_layers:
        raise ValueError(
            f"--token-layer {cfg.token_layer}: the text encoder has layers 1 to {n_layers}, and 0 "
            "for its static embeddings"
        )


@torch.no_grad()
def start_at_the_mean_token(model: Model) -> None:
    """Start every slot near the mean of the token-embedding table (D3).

    In each dimension, slots vary around it by the table's standard deviation.
    """
    table = model.text_encoder.model.get_input_embeddings().weight
    out_proj = model.interaction.out_proj
    out_proj.bias.copy_(table.mean(0))
    # for normalised input, torch's initial weights give a standard deviation of 1 / sqrt(3)
    out_proj.weight.mul_(math.sqrt(3) * table.std(0)[:, None])


# ------------------------------------------------------------------------------------------------
# Loss: embeds (B, D) normalised, of all processes
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def match(predicted, text, attention_mask):
    """Assign a different slot to every text token -> slot indices (B, L).

    From a text's last token to its first, each takes the nearest free slot, the first one in a tie.
    Indices at padding are arbitrary. Source: Sec. 3.2.
    predicted (B, N, C), text (B, L, C), attention_mask (B, L), 1 = a real token; N >= L.
    Copied alone, needs match_greedy.
    """
    distance = torch.cdist(text.float(), predicted.float(), p=1)  # (B, L, N); D5
    return match_greedy(distance, attention_mask.bool())


def match_greedy(distance, real):
    """`match` from distance (B, L, N); real (B, L) bool, True = not padding -> (B, L)."""
    B, L, N = distance.shape
    taken, matched = torch.zeros(B, N, dtype=torch.bool, device=distance.device), []
    for column in range(L - 1, -1, -1):  # from the right-most token on (Sec. 3.2)
        nearest = distance[:, column].masked_fill(taken, math.inf).argmin(1)  # (B,)
        # a padding token does not occupy a slot
        taken = taken | (F.one_hot(nearest, N).bool() & real[:, column, None])
        matched.append(nearest)
    return torch.stack(matched[::-1], 1)  # (B, L), in the text's order again


def cross_token_loss(predicted, text, attention_mask, matched):
    """L1 distance of each real text token to its slot, mean over values (D6) -> each clip's sum
    over tokens (B,), their number (B,).

    predicted (B, N, C); text (B, L, C); attention_mask (B, L), 1 = a real token; matched (B, L) as
    from `match`.
    """
    # g(h^(a-t)), (B, L, C)
    reordered = predicted.gather(1, matched[..., None].expand(-1, -1, predicted.shape[2]))
    distance = (reordered.float() - text.float()).abs().mean(-1)  # Eq. (1)
    return (distance * attention_mask).sum(1), attention_mask.sum(1).float()


def cross_global_loss(sim, scale):
    """Cross-entropy with the matching pair as target, mean of both directions (D7).

    sim (B, B) cosine, audio in rows.
    """
    target = torch.arange(len(sim), device=sim.device)
    return (
        F.cross_entropy(sim * scale, target) + F.cross_entropy(sim.T * scale, target)
    ) / 2  # Eq. (2)


def uni_token_loss(predicted, noisy):
    """L1 distance of a clip's tokens with and without noise, both (B, N, C), slot by slot; mean
    (D6) -> (B,).
    """
    return (predicted.float() - noisy.float()).abs().mean((1, 2))  # Eq. (3)


def training_loss(cfg: Config, audio_embeds, text_embeds, token_sums, token_counts, uni, scale):
    """Outputs of Model.forward in this process -> loss, sim (B, B) and the parts, over all
    processes.
    """
    audio_embeds, text_embeds, token_sums, token_counts, uni = (
        common.gather_with_grad(x)
        for x in (audio_embeds, text_embeds, token_sums, token_counts, uni)
    )
    sim = audio_embeds @ text_embeds.T  # (B, B)
    token = token_sums.sum() / token_counts.sum()  # the mean over all tokens (D6)
    of_global = cross_global_loss(sim, scale)
    uni = uni.mean()
    # Eq. (4)
    loss = cfg.token_weight * token + cfg.global_weight * of_global + cfg.uni_weight * uni
    return loss, sim.detach(), {"loss_token": token, "loss_global": of_global, "loss_uni": uni}


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def label_prompt(labels: list[str]) -> str:
    """["a", "b", "c"] -> "This is a sound of a, b, and c". Source: Sec. 4.1 (D10)."""
    return "This is a sound of " + ", ".join(
        [*labels[:-1], ("and " if len(labels) > 1 else "") + labels[-1]]
    )


def texts_of_row(row: dict) -> list[str]:
    return [label_prompt(row["labels"])] if row.get("labels") else row["captions"]  # D10


class Clips(Dataset):
    """One item per clip, with its text. A key is (epoch, index), which seeds the crop and the
    choice of the caption. An item's last entry is the file's name (common.Readable).
    """

    def __init__(self, rows: list[dict], cfg: Config, tokenize):
        self.rows, self.cfg, self.tokenize = rows, cfg, tokenize

    def __getitem__(self, key):
        row = self.rows[key[1]]
        rng = np.random.default_rng((self.cfg.seed, *key))
        waveform = common.read_audio(  # D13
            row["audio"], SAMPLE_RATE, WINDOW_S, rng, expected_s=row.get("duration")
        )
        texts = texts_of_row(row)
        return fbank(torch.from_numpy(waveform)), texts[int(rng.integers(len(texts)))], row["audio"]

    def collate(self, items) -> dict:
        """-> the arguments of Model.forward."""
        features, texts, _ = zip(*items)
        tokens = self.tokenize(list(texts))
        return {
            "log_mel": torch.stack(features),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


# ------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------


def validate(model: Model, rows: list[dict], quiet=True) -> tuple[dict, dict]:
    """Tagging by single-label prompts where rows have labels, retrieval where they have captions ->
    scores, chance levels.
    """
    rows, audio_embeds, _ = common.embed_validation(model, rows, quiet=quiet)
    scores, chance = {}, {}
    classes = sorted({label for row in rows for label in row.get("labels", [])})
    if classes:
        labelled = common.annotated(rows, "labels")
        targets = common.label_targets([rows[i] for i in labelled], classes)
        # the prompt of training with one label (D14)
        prompts = common.embed_texts(model, [label_prompt([c]) for c in classes])
        sim = audio_embeds[labelled] @ prompts.T
        scores["tagging_mAP"] = float(np.nanmean(common.class_average_precisions(sim, targets)))
        chance["tagging_mAP"] = common.chance_of_mean_ap(targets)
    captions = [row.get("captions", []) for row in rows]
    if any(captions):
        retrieval = common.caption_retrieval(model, audio_embeds, None, captions)
        scores |= retrieval[0]
        chance |= retrieval[1]
    return scores, chance


def main(cfg: Config) -> dict:
    """Train -> best_step, n_clips, scores and chance of the best checkpoint on the validation
    split, as in eval.json; {} without validation clips.
    """
    run = common.Run(cfg, METHOD)

    # Data
    rows = common.read_manifest(cfg.data)
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)
    for row in train_rows + val_rows:
        if not row.get("labels"):
            common.require([row], "captions")
    batch_size = min(cfg.batch_size, len(train_rows))
    common.check_batch(cfg, batch_size, len(train_rows), "clip")

    # Model
    checkpoint = run.checkpoint()
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = Model.from_checkpoint(run.path / "last.pt")
    else:
        classes = sorted({label for row in train_rows for label in row.get("labels", [])})
        texts = [
            text for row in train_rows for text in (*texts_of_row(row), *row.get("captions", []))
        ]
        model = start_model(cfg, texts + classes)
        if cfg.weights != "none":
            cfg = run.starts_from(max_tokens=model.text_encoder.max_tokens)
    model.to(run.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_audio = [p for name, p in trained.items() if name.startswith("audio_encoder.")]
    others = [p for name, p in trained.items() if not name.startswith("audio_encoder.")]
    optimiser = torch.optim.AdamW(
        # the optimiser keeps the unknown key "peak", which the loop reads
        [{"params": of_audio, "peak": cfg.audio_lr}, {"params": others, "peak": cfg.lr}],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    forward = run.begin(
        model,
        optimiser,
        cfg.steps,
        len(train_rows),
        f"{len(train_rows)} clips, {len(val_rows)} clips for validation; batches of {batch_size}, "
        f"ln B = {math.log(batch_size):.2f}",
        checkpoint,
        shape=model.shape,
        warmup_steps=cfg.warmup_steps,
    )
    if cfg.weights != "none" and val_rows and run.rank == 0 and not checkpoint:
        run.log_scores(validate(model, val_rows)[0])  # before fine-tuning
    clips = Clips(train_rows, cfg, model.text_encoder.tokenize)
    sampler = common.training_batches(len(train_rows), batch_size, cfg.seed, run.step, cfg.steps)
    options = dict(token_layer=cfg.token_layer, noise_std=cfg.noise_std if cfg.uni_weight else None)

    def loss_of(*outputs):
        return training_loss(cfg, *outputs)

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(clips, sampler):
        parts = [part | options for part in parts]  # the arguments of Model.forward
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * common.warmup_cosine(
                run.step, cfg.warmup_steps, cfg.steps
            )

        optimiser.zero_grad(set_to_none=True)
        loss, sim, losses = common.cached_backward(  # D11
            forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
        )
        nn.utils.clip_grad_norm_(trained.values(), 1.0)  # D9
        optimiser.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(100))  # tau stays in [1, 100] (D7)

        run.step_done(loss, sim, **losses, scale=model.log_scale.exp())
        if run.is_due(cfg.eval_steps):
            score, scores = run.step, {}  # without validation clips the last step wins
            if val_rows and run.rank == 0:
                scores, _ = validate(model, val_rows)
                names = ("tagging_mAP", "t2a_mAP@10", "a2t_mAP@10")
                used = [scores[name] for name in names if name in scores]
                score = sum(used) / len(used)  # D9
            run.keep_best(score, scores)
        run.save_if_due()

    # Result: the best checkpoint on the validation split
    if run.rank > 0 or not val_rows:
        return {}
    model = Model.from_checkpoint(run.path / "best.pt").to(run.device)
    scores, chance = validate(model, val_rows, quiet=False)
    result = run.finish(scores, chance, len(val_rows))
    baseline = dict(token_weight=0.0, uni_weight=0.0, global_weight=1.0)
    run.say_next("the global loss alone: what Fig. 5 calls CLAP", "--prompt collat", **baseline)
    return result


# ------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------


def ast_state(weights: dict) -> dict:
    """transformers' ASTModel -> AST's own names, which are ours. Unknown names stay, so that strict
    loading lists them.
    """
    state = {}
    for key, value in weights.items():
        key = re.sub(r"^(module\.v\.|audio_spectrogram_transformer\.)", "", key)
        for theirs, ours in (
            (r"^embeddings\.cls_token$", "cls_token"),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^layers\.", "blocks."),
            (r"^layernorm\.", "norm."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
        ):
            key = re.sub(theirs, ours, key)
        state[key] = value
    for key in [k for k in state if ".attention.q_proj." in k]:
        parts = [
            state.pop(key.replace("q_proj", name), None) for name in ("q_proj", "k_proj", "v_proj")
        ]
        if all(part is not None for part in parts):
            # q, k and v are stacked in rows, as in AST's own file
            state[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    # AST's file also has its own head (module.mlp_head.*) and its image model's; neither is used
    return {
        k: v
        for k, v in state.items()
        if not re.match(r"^(head|head_dist|module\.mlp_head|classifier)\.", k)
    }


def load_ast(encoder: AST, source: str) -> None:
    """Load the audio encoder's weights from a transformers folder or hub id, AST's own .pth file,
    or a saved state dict of `AST`.
    """
    if Path(source).is_file():
        weights = common.read_encoder_weights(source)
    else:
        with common.from_hub(f"--audio-weights {source}: not a file,") as transformers:
            config = common.transformers_config(source)
            weights = transformers.ASTModel.from_pretrained(source, config=config).state_dict()
    common.load_strict(encoder, ast_state(weights), source)


def locked_text(name: str, max_tokens: int) -> common.TextEncoder:
    """A pre-trained text encoder and its tokenizer; of a CLIP, only the text tower and its
    projection.
    """
    with common.from_hub(f"--text-model {name}:") as transformers:
        config = common.transformers_config(name)
    limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", max_tokens)
    if max_tokens > limit:
        raise ValueError(f"--max-tokens {max_tokens}: {name} has positions for {limit}")
    if not config.model_type.startswith("clip"):
        return common.text_encoder_from_pretrained(name, max_tokens)
    if config.model_type == "clip":
        # the joint dimension is a setting of the whole CLIP, not of the text tower
        config.text_config.projection_dim = config.projection_dim
        config = config.text_config
    model = transformers.CLIPTextModelWithProjection.from_pretrained(
        name, config=config, dtype=torch.float32
    )
    return common.TextEncoder(model, transformers.AutoTokenizer.from_pretrained(name), max_tokens)


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    common.run_entry(main, common.cli, Config, __doc__)
