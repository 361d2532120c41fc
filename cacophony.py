"""Cacophony: an audio encoder first trained on masked spectrograms, then CLAP with a captioner.

Zhu, Darefsky, Duan: "Cacophony: An Improved Contrastive Audio-Text Model", IEEE/ACM TASLP 32, 2024,
arXiv:2402.06986. Official code, inference only: github.com/gzhu06/Cacophony (JAX and a torch port).

The idea: CLAP needs good encoders and more captions than people have written. So (1) the audio
encoder, a plain ViT on spectrogram patches, is first trained on audio alone, as a masked
autoencoder (MAE): it sees 20 % of the patches, and a decoder reconstructs the spectrogram; (2)
noisy descriptions are cleaned and uncaptioned audio is captioned by machine (`tools.captions
rewrite --task clean`, `tools.captions recaption`); (3) beside the contrastive loss, a text decoder
must generate the caption, which asks for more detail than telling the clips of a batch apart; (4)
SAM, sharpness-aware minimisation, looks for flat minima and so delays overfitting.

Equations (paper) -> code
  Eq. (1)  contrastive loss, the sum of both directions, mean over the batch   contrastive_loss
  Eq. (2)  captioning loss, mean over a caption's tokens                       caption_nll
  Eq. (3)  sum of the two losses, the second one times lambda                  training_loss
  Eq. (4)  SAM: the loss to minimise is the worst case within distance rho     sam_backward
  Eq. (5)  the step to it, rho g / norm(g) to first order                      sam_backward
  Eq. (6)  the gradient there, left for the step of the unmoved weights        sam_backward
  Sec. III-A  stage 1: mean squared error of masked patches (no number)        MAE.forward

Letters: B clips in a batch (the paper's N), S samples, T time steps of 0.16 s, N = 8 T patches of
256 values (16 frames of 16 mel bins, 8 bands in a time step), V visible patches, L text tokens (the
paper's T), D joint dimension 768. rho 0.075, lambda (caption_weight) 1, scale is 1 / tau,
g the gradient of the loss at the weights.

Deviations from the paper, what it leaves open, and the variants ("code": the authors' repository)
  D1  The paper gives 16 kHz, 25 ms windows, 10 ms hop, FFT size 512, 128 mel bands (Sec. IV-A). The
      rest is the JAX code's: magnitudes, 0.2 ln(mel + 1e-5) + 0.9, 0 to 8000 Hz, each frame of 400
      samples followed by 112 zeros before the FFT, triangular filters linear in mel. --variant
      official, the torch port: window centred in 512 samples, triangular filters linear in Hz.
  D2  Pooling heads: "we choose to use n_head = 8" (Sec. IV-A), here for both modalities; for audio
      never more than the encoder has. The text pooler of jax and official has 1 head, the audio
      pooler of official has 2 (a slip of the port).
  D3  Not stated: LayerNorm eps, 1e-6 in the audio encoder (jax). official: 1e-5.
  D4  The decoder predicts all patches; the loss counts the masked ones only, and only the target is
      normalised. The paper's decoder "predicts both the masked and unmasked regions" (Sec. III-A);
      what the loss counts is not said, but the paper follows MAE and AudioMAE, which count masked
      patches, and calls the task "reconstructing these masked portions". "Between the per-patch
      normalized values of the reconstructed and the original input spectrogram patches" reads as if
      both were normalised; in MAE only the target is. Padding is neither seen nor counted. Not
      stated: the mean over a clip's masked patches, then over clips. 15 s give 744 patches, not 750
      (Sec. IV-A): they are 93.75 time steps, of which 93 are whole.
  D5  Eq. (2) is for one caption: the mean over its tokens after the start token, the end token
      included. Not stated: the mean over captions. jax, official: a caption's sum is divided by the
      padded length, max_tokens - 1, not by its own number of tokens, so that short captions weigh
      less. No released file holds this loss today, as the released code is inference only; it
      stands in an earlier commit of the JAX code (d89652f, src/caco/caco.py). The torch port never
      had a loss, so official takes the same.
  D6  Not stated. From the code: 4 text decoder layers, the standard deviation of their initial
      weights ("initialized randomly", Sec. III-B; 0.02, the head's 0.01), joint dimension 768,
      RoBERTa's base size, dropout 0.1 on text and 0 on audio, positions added again in the MAE
      decoder, 0.02 for the initial queries, mask token and band embeddings. From the torch port: a
      logit scale that starts at 1 / 0.07 and is never clamped. Ours: a linear warm-up, AdamW betas
      0.9 and 0.999, weight decay on all weights, no gradient clipping, no dropout on the text
      decoder's attention weights (code: 0.1), torch's initial weights in the linear layers of audio
      encoder, MAE decoder and poolers (jax: flax's, and 0.02 in the text pooler's keys and values).
      --size ablation: the paper gives two widths and keeps the rest "the same" (Sec. VI); so do we,
      its number of heads (8) included.
  D7  Eq. (4) to (6) are written for the whole training set. Here they refer to a step's batch over
      all processes. Not stated: both passes take the same patches, captions and dropout masks; the
      norm is one over all "trainable parameters" (Sec. IV-B), and 1e-12 is added to it.
  D8  "We exclude clips that are under one second or exceed five minutes", of Freesound (Sec. II-B).
      tools.captions leaves both out; training does not: it keeps short clips, and stage 2 takes a
      random 5 minutes of longer ones, then 512 patches of these (the paper: "from the full
      sequence", Sec. IV-A).
  D9  "[We] process the full audio sequence if it fits in the memory", else "randomly sample a
      subset of spectrogram patches" (Sec. IV-A). In evaluation ours never samples: clips over 60 s
      are encoded in pieces of 60 s, each with positions from 0, and the patches of all pieces are
      pooled together; in training, positions count on through the whole clip (D8). The code samples
      (jax) or takes the first patches (port).
  D10 Zero-shot detection is ours: a time step's frame is the mean over its 8 patches of the pooling
      layer's value and output projections. For HEAR the encoder is "frozen and used as the input
      feature vector" (Sec. V-E). Scene tasks get the pooled and projected vector, event tasks the
      encoder's states, mean over the 8 bands (both: code). The encoder's "50 Hz output" (Sec.
      III-A) counts patches; there are 6.25 time steps a second.
  D11 Not stated: the checkpoint with the best mAP@10 of both directions on the validation split.
      Stage 1 is not validated, mae.pt is its last step.
  D12 Not stated: bf16 autocast on a GPU; the losses are never in bf16 (on a GPU, their matrix
      products may use TF32).
  D13 The text encoder "follows RoBERTa's architecture" and starts from "the RoBERTa pretrained
      weights" (Sec. III-B). Its positions are counted from 0 (code), RoBERTa's from 2, so a token
      starts from the position embedding that was trained for the token two places before. The first
      two tokens start from rows that RoBERTa uses for no token; row 1 is its padding row, which is
      trained here.
  D14 Cleaned descriptions: the paper prompts GPT-3 "with 10 human annotated pairs" on 7,000
      descriptions "to fine-tune T5-XXL" (Sec. II-B). tools.captions rewrite --task clean fine-tunes
      nothing: it prompts any language model with ten pairs of ours, as the paper's are not
      published, and rejects answers by rules. The rules also reject translations of a description
      (the paper's T5 translates, Table I). Five versions a clip, as in the paper.
  D15 Machine captions: the paper's are by "HTSAT-BART pretrained on WavCaps and fine-tuned on
      AudioCaps" (Sec. II-C). tools.captions recaption takes a captioner of ours, a stage 2
      checkpoint.
  D16 Not stated: each time a clip is drawn, one of its captions is drawn at random; where it has
      machine captions, one of these in 80 % of the draws (code).
  D17 Scenes are classified with "This sound is on [label]." (Sec. V-D), eval.py's cacophony_scene,
      without the full stop, which may belong to the paper's sentence. The code has "This is a sound
      on {}", cacophony_scene_code.
  D18 Captions are sampled "at a temperature of 0.1" (Sec. V-F). caption() takes the likeliest token
      unless it is given a temperature. Not stated: at most 100 tokens (code), no padding or start
      token.

Run:  python cacophony.py --data demo                                 (two CPU cores, both stages)
      python cacophony.py --stage mae --data audioset acav --name full
      python cacophony.py --stage contrastive --name full --micro-batch 256 --data audiocaps clotho
      torchrun --nproc-per-node 8 cacophony.py --data ...             (one node, 8 GPUs)
      python eval.py runs/NAME/best.pt --data MANIFEST --protocol all
Stage 1 starts near 4/3 (variance 1 of the target, 1/3 of a new head's output) and soon has the loss
of each band's mean, a little below 1; the small model needs about 1,000 steps to leave it. Eq. (1)
starts near 2 ln B, Eq. (2) near the logarithm of the vocabulary's size (jax, official: less, D5).
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
    # manifests, folders that hold manifest.jsonl, or the word demo; stage 1 needs no captions
    data: list[str]
    # ablation: the smaller audio encoder of the paper's ablations (Sec. VI); tiny: a small model
    # from random weights
    size: Literal["paper", "ablation", "tiny"] = "paper"
    # details as in the authors' JAX code (jax) or their torch port, slips included (official)
    # (D1-D3, D5)
    variant: Literal["paper", "jax", "official"] = "paper"
    # masked autoencoder, contrastive captioning, or both in order
    stage: Literal["all", "mae", "contrastive"] = "all"
    # whole model that stage 2 starts from: a run's best.pt or the authors' torch file, with the
    # model's own settings; none: start from the two below
    weights: str = "none"
    # stage 2's audio encoder: a run's mae.pt, the authors' torch file, or none; empty:
    # runs/NAME/mae.pt
    audio_weights: str = ""
    # initial text encoder, and the tokenizer of the authors' file: hub id or folder (RoBERTa: Sec.
    # III-B; base: code, D6), or none
    text_model: str = "roberta-base"
    max_tokens: common.Tokens = 77  # captions are cut there (Sec. IV-A)
    # where a clip has synthetic captions, the probability of taking one of them (code, D16)
    synthetic_share: common.Share = 0.8

    # model
    audio_dim: common.Count = 768  # width of the audio encoder (Sec. IV-A)
    audio_layers: common.Layers = 12  # its layers (Sec. IV-A)
    audio_heads: common.Count = 8  # its heads (Sec. IV-A)
    audio_mlp: common.Count = 3072  # width of its feed-forward layers (Sec. IV-A)
    joint_dim: common.Count = 768  # dimension shared by audio and text (code, D6)
    decoder_layers: common.Layers = 4  # layers of the text decoder (code, D6)
    text_dim: common.Count = 768  # text encoder width, read only when --text-model none
    text_layers: common.Layers = 12  # text encoder layers, read only when --text-model none

    # stage 1, masked autoencoder
    mae_steps: common.Count = 200000  # optimiser steps of stage 1 (Sec. IV-A)
    mae_batch_size: common.Count = 512  # clips over all processes (Sec. IV-A)
    mae_lr: common.Positive = 2e-4  # peak of AdamW's learning rate (Sec. IV-A)
    mae_crop_s: Annotated[float, "[0.16, 300]"] = 15.0  # random crop in seconds (Sec. IV-A)
    mae_layers: common.Layers = 12  # layers of the reconstructing decoder (Sec. IV-A)
    # share of patches that the encoder never sees (Sec. III-A)
    mask_ratio: Annotated[float, "(0, 1)"] = 0.8

    # stage 2, contrastive captioning
    steps: common.Count = 300000  # optimiser steps of stage 2 (Sec. IV-A)
    batch_size: common.Count = 4096  # pairs over all processes (Sec. IV-A)
    lr: common.Positive = 1e-5  # peak of AdamW's learning rate (Sec. IV-A)
    # at most so many patches of a clip; of a longer one, this many are drawn at random (Sec. IV-A:
    # 10.24 s)
    patches: common.Count = 512
    # lambda, weight of the captioning loss (Eq. 3, Sec. IV-A); 0: no decoder
    caption_weight: common.NotNegative = 1.0
    rho: common.NotNegative = 0.075  # SAM's distance (Eq. 4, Sec. IV-B); 0: plain AdamW

    # both stages
    # steps of the warm-up (linear: D6), then cosine to min_lr (Sec. IV-A)
    warmup_steps: common.Whole = 10000
    min_lr: common.NotNegative = 1e-6  # end of the cosine (Sec. IV-A)
    weight_decay: common.NotNegative = 0.01  # AdamW's (Sec. IV-A)
    eval_steps: common.Count = 1000  # steps of stage 2 between validations (each may write best.pt)

    def check(self):
        if self.weights != "none" and self.stage != "contrastive":
            raise ValueError(
                f"--weights {self.weights} with --stage {self.stage}: stage 1 has nothing to do "
                "for a whole model; give --stage contrastive"
            )
        if self.stage != "contrastive" and self.audio_weights:
            raise ValueError(
                f"--audio-weights {self.audio_weights} with --stage {self.stage}: stage 2 would "
                "not use what stage 1 has learnt; give --stage contrastive"
            )
        if self.audio_dim % self.audio_heads or self.audio_dim % 2:
            raise ValueError(
                f"--audio-dim {self.audio_dim}: expected an even number that --audio-heads "
                f"{self.audio_heads} divides"
            )
        pool_heads = min(VARIANTS[self.variant]["heads"][0], self.audio_heads)
        if self.audio_dim % pool_heads:
            raise ValueError(
                f"--audio-dim {self.audio_dim}: expected a multiple of {pool_heads}, the heads of "
                "the audio pooler"
            )
        if self.text_model == "none" and self.text_dim % 8:
            raise ValueError(
                f"--text-dim {self.text_dim}: expected a multiple of 8, the pooler's heads"
            )
        if self.min_lr > min(self.lr, self.mae_lr):
            raise ValueError(
                f"--min-lr {self.min_lr}: expected at most --lr {self.lr} and --mae-lr "
                f"{self.mae_lr}"
            )


ABLATION = dict(audio_dim=512, audio_mlp=1024)
# Random weights need higher learning rates; fewer patches of every clip make a step affordable on a
# CPU.
TINY = dict(
    text_model="none",
    audio_dim=128,
    audio_layers=3,
    audio_heads=4,
    audio_mlp=512,
    joint_dim=128,
    decoder_layers=2,
    text_dim=128,
    text_layers=2,
    mae_steps=3000,  # up to about 1,000 it only paints the mean of each band, which helps nothing
    mae_batch_size=32,
    mae_lr=1e-3,
    mae_crop_s=2.56,
    mae_layers=1,
    steps=300,
    batch_size=32,
    lr=1e-3,
    patches=160,
    rho=0.013,  # as large a share of the norm of the random weights as 0.075 is at the paper's size
    warmup_steps=40,
    min_lr=1e-5,
    eval_steps=100,
    save_steps=100,
    workers=1,
)
Config.presets = {("size", "ablation"): ABLATION, ("size", "tiny"): TINY}
SAMPLE_RATE, HOP, N_MELS = 16000, 160, 128  # a hop of 10 ms
PATCH = 16  # frames and mel bins of a patch
N_FREQ = N_MELS // PATCH  # patches of one time step
STEP_SAMPLES = PATCH * HOP  # 0.16 s
LONGEST_S = 300.0  # D8
PIECE_S = 60.0  # D9
METHOD = "cacophony"
# Three ways to compute with the same weights. heads: those of the (audio, text) pooling layers
VARIANTS = {
    "paper": dict(heads=(8, 8), eps=1e-6, window="start"),
    "jax": dict(heads=(8, 1), eps=1e-6, window="start"),
    "official": dict(heads=(2, 1), eps=1e-5, window="centre"),
}  # D2, D3, D1

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def tf_mel_filters():
    """(257, 128) triangles over 0 to 8000 Hz, linear in mel, as TensorFlow makes them; the bin at 0
    Hz has weight 0 (D1).
    """

    def mel(hz):
        return 1127 * torch.log1p(hz / 700)  # HTK's formula, as TensorFlow has it

    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, 257, dtype=torch.float64))[1:, None]  # (256, 1)
    edges = torch.linspace(
        0,
        float(mel(torch.tensor(SAMPLE_RATE / 2.0, dtype=torch.float64))),
        N_MELS + 2,
        dtype=torch.float64,
    )
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(
        min=0
    )
    return F.pad(filters, (0, 0, 1, 0)).float()


class MagnitudeMel(nn.Module):
    """Waveform (B, S) at 16 kHz -> features (B, ceil(S / 160), 128): 0.2 ln(mel + 1e-5) + 0.9,
    -1.4 (silence) to about 2.

    Frames of 25 ms start every 10 ms; beyond the clip's end they see zeros. Source: Sec. IV-A and
    the JAX code (D1).
    """

    def __init__(self, window: str = "start"):
        super().__init__()
        # the port's torch.stft centres 400 samples in 512 (D1)
        before = 0 if window == "start" else 56
        self.spectrogram = torchaudio.transforms.Spectrogram(
            512,
            512,
            HOP,
            power=None,
            center=False,  # frame i starts at sample 160 i
            # 25 ms, periodic as in TensorFlow; the zeros pad a frame for the FFT (D1)
            window_fn=lambda n: F.pad(torch.hann_window(400), (before, 112 - before)),
        )
        filters = (
            tf_mel_filters()
            if window == "start"
            else torchaudio.functional.melscale_fbanks(257, 0, 8000, N_MELS, SAMPLE_RATE)
        )
        self.register_buffer("filters", filters)
        common.keep_out_of_checkpoints(self)

    def forward(self, waveform):
        with torch.autocast(waveform.device.type, enabled=False):  # the logarithm needs fp32
            n_frames = math.ceil(waveform.shape[1] / HOP)
            # the last frame starts before the end and reaches past it
            waveform = F.pad(waveform.float(), (0, (n_frames - 1) * HOP + 512 - waveform.shape[1]))
            spectrum = torch.view_as_real(self.spectrogram(waveform))  # (B, 257, T_mel, 2)
            # faster than torch's complex abs()
            magnitudes = (spectrum[..., 0].square() + spectrum[..., 1].square()).sqrt()
            # (B, 257, T_mel) -> (B, T_mel, 128); scale and offset: JAX code (D1)
            return 0.2 * (magnitudes.transpose(1, 2) @ self.filters + 1e-5).log() + 0.9


def n_steps(n_samples):
    """Number of whole time steps of 16 frames in n_samples (B,), at least 1; the remainder is
    dropped.
    """
    # frames are rounded up, steps down
    return ((n_samples + HOP - 1) // HOP // PATCH).clamp(min=1)


def to_patches(features):
    """(B, T_mel, 128) -> (B, N, 256): patch t * 8 + f, each 16 frames by 16 mel bins,
    flattened row by row.
    """
    B, T_mel, _ = features.shape
    if T_mel < PATCH:  # under 0.16 s: padded with the value of silence
        features = F.pad(features, (0, 0, 0, PATCH - T_mel), value=0.2 * math.log(1e-5) + 0.9)
        T_mel = PATCH
    T = T_mel // PATCH
    x = features[:, : T * PATCH].reshape(B, T, PATCH, N_FREQ, PATCH)  # (B, T, 16, 8, 16)
    # (B, T, 8, 16, 16) -> (B, N, 256); the order is that of the code, whose weights need it
    return x.transpose(2, 3).reshape(B, T * N_FREQ, PATCH * PATCH)


class AudioLayer(nn.Module):
    """Pre-norm transformer layer with SiLU."""

    def __init__(self, dim, heads, mlp, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x, valid_mask):
        """x (B, N, C), valid_mask (B, N) bool, True = a real patch."""
        B, N, C = x.shape
        qkv = (
            self.qkv(self.norm1(x))
            .view(B, N, 3, self.heads, C // self.heads)
            .permute(2, 0, 3, 1, 4)  # (3, B, heads, N, C / heads)
        )
        # only keys are masked: every later layer masks the outputs of padded queries
        h = F.scaled_dot_product_attention(
            *qkv, attn_mask=valid_mask[:, None, None]
        )  # (B, heads, N, C / heads)
        x = x + self.proj(h.transpose(1, 2).reshape(B, N, C))
        return x + self.fc2(F.silu(self.fc1(self.norm2(x))))  # SiLU: Sec. IV-A


class PatchTransformer(nn.Module):
    """Linear layer, positions, transformer layers: the audio encoder, and the MAE decoder.

    Source: Sec. III-A (embedding, positions), Sec. IV-A (sizes).
    """

    def __init__(self, input_dim, dim, layers, heads, mlp, eps=1e-6):
        super().__init__()
        self.input_proj = nn.Linear(input_dim, dim)
        self.freq_embedding = nn.Parameter(torch.randn(N_FREQ, dim) * 0.02)
        self.layers = nn.ModuleList(AudioLayer(dim, heads, mlp, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def positions(self, index):
        """Patch indices (B, N) -> (B, N, dim): sines and cosines of the time step, plus a learnt
        embedding of the band.
        """
        dim = self.freq_embedding.shape[1]
        rate = 10000 ** (-torch.arange(dim // 2, device=index.device) * 2 / dim)
        angle = (index // N_FREQ)[..., None] * rate  # (B, N, dim / 2)
        # sines first, then cosines, not in turn: the released weights need this order
        return torch.cat([angle.sin(), angle.cos()], -1) + self.freq_embedding[index % N_FREQ]

    def transform(self, x, valid_mask):
        for layer in self.layers:
            x = layer(x, valid_mask)
        return self.norm(x)

    def forward(self, patches, index, valid_mask):
        """patches (B, N, input_dim), their indices (B, N), valid_mask (B, N) bool, True = a real
        patch -> (B, N, dim).
        """
        return self.transform(self.input_proj(patches) + self.positions(index), valid_mask)


class MAE(nn.Module):
    """Stage 1: the audio encoder sees a fifth of the patches, a decoder of its size predicts all.

    Source: Sec. III-A. The loss counts the masked ones (D4).

    Args: audio: dict of dim (even), layers, heads (divides dim), mlp; layers: the decoder's.
    Copied alone, needs PatchTransformer, AudioLayer, normalised, PATCH, N_FREQ, N_MELS.
    """

    def __init__(self, audio: dict, layers: int = 12, mask_ratio: float = 0.8, eps: float = 1e-6):
        super().__init__()
        self.mask_ratio = mask_ratio
        self.audio_encoder = PatchTransformer(PATCH * PATCH, **audio, eps=eps)
        # "a 12-layer decoder with the same settings" (Sec. IV-A); dropped after stage 1
        self.decoder = PatchTransformer(audio["dim"], **{**audio, "layers": layers}, eps=eps)
        self.mask_token = nn.Parameter(torch.randn(audio["dim"]) * 0.02)
        self.head = nn.Linear(audio["dim"], PATCH * PATCH)

    def paint(self, patches, index, valid_mask):
        """-> painted (B, N, 256), predictions of every patch's normalised values; visible_mask (B,
        N) bool.
        """
        B, N, _ = patches.shape
        n_visible = (valid_mask.sum(1) * (1 - self.mask_ratio)).round().long().clamp(min=1)  # (B,)
        # the most that any clip can have; n_visible.max() would have to wait for the GPU
        most = max(1, round(N * (1 - self.mask_ratio)))
        # a random order with the real patches first
        order = torch.rand(B, N, device=patches.device).masked_fill(~valid_mask, 2.0).argsort(1)
        chosen = order[:, :most]  # (B, V)
        seen = torch.arange(most, device=patches.device) < n_visible[:, None]  # (B, V)

        def take(x):
            return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))

        # the encoder never sees a masked patch: patches that only fill a row up to V are not keys
        encoded = self.audio_encoder(take(patches), index.gather(1, chosen), seen)
        encoded = self.decoder.input_proj(encoded)  # (B, V, dim)

        visible_mask = torch.zeros_like(valid_mask).scatter(1, chosen, seen)
        # Sec. III-A appends the mask tokens; attention ignores order, so here each is in its place
        tokens = self.mask_token.to(encoded.dtype).expand(B, N, -1)
        tokens = tokens.scatter(
            1,
            chosen[..., None].expand_as(encoded),
            torch.where(seen[..., None], encoded, self.mask_token.to(encoded.dtype)),
        )
        # the decoder has a band embedding of its own (D6)
        tokens = self.decoder.transform(tokens + self.decoder.positions(index), valid_mask)
        return self.head(tokens), visible_mask

    def forward(self, patches, index, valid_mask):
        """-> (each clip's mean squared error (B,) over its masked patches (D4),); a tuple for
        common.cached_backward.

        patches (B, N, 256) of `to_patches`; index (B, N) = t * 8 + band; valid_mask (B, N) bool,
        True = a real patch.
        """
        painted, visible_mask = self.paint(patches, index, valid_mask)
        masked = (valid_mask & ~visible_mask).float()
        error = (painted.float() - normalised(patches)).square().mean(-1)  # (B, N)
        # at a small mask ratio a short clip may have no masked patch
        return ((error * masked).sum(1) / masked.sum(1).clamp(min=1),)


def normalised(patches):
    """Each patch (B, N, 256) with mean 0 and variance 1: the autoencoder's target.

    Source: Sec. III-A, "per-patch normalized values", after MAE (He et al., CVPR 2022) (D4).
    """
    # (B, N, 1) each; the variance is unbiased and 1e-6 is added, as in MAE's code
    variance, mean = torch.var_mean(patches.float(), -1, keepdim=True)
    return (patches.float() - mean) / (variance + 1e-6).sqrt()


class AttentionPool(nn.Module):
    """One learnt query attends to all positions. x (B, N, C), valid_mask (B, N) -> (B, out_dim)."""

    def __init__(self, dim, heads, out_dim):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        # keys first, then values (code); out_proj leads to the joint space (Sec. III-B)
        self.kv_proj, self.out_proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, out_dim)

    def forward(self, x, valid_mask):
        B, N, C = x.shape
        k, v = (
            self.kv_proj(x).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, C / heads) each
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(B, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=valid_mask[:, None, None])
        return self.out_proj(pooled.reshape(B, C))  # (B, heads, 1, C / heads) -> (B, out_dim)

    def pool_each_alone(self, x):
        """Pool each position as if the query attended to it alone. (B, N, C) -> (B, N, D)."""
        return self.out_proj(self.kv_proj(x)[..., x.shape[2] :])  # a softmax over one key is 1


class DecoderAttention(nn.Module):
    """Post-norm attention as in RoBERTa's decoder layers; keys and values are arguments, so that
    they can be reused.
    """

    def __init__(self, dim, memory_dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(memory_dim, dim)
        self.value = nn.Linear(memory_dim, dim)
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)  # of the output; attention weights have none (D6)

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, L, C / heads)

    def keys_values(self, memory):
        return self.split(self.key(memory)), self.split(self.value(memory))

    def forward(self, x, keys_values, mask):
        """x (B, L, C), mask (B or 1, 1, L or 1, positions of the keys) bool, True = may be attended
        to.
        """
        out = F.scaled_dot_product_attention(
            self.split(self.query(x)), *keys_values, attn_mask=mask
        )
        return self.norm(x + self.dropout(self.dense(out.transpose(1, 2).flatten(2))))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the audio, feed-forward; post-norm."""

    def __init__(self, dim, audio_dim, heads):
        super().__init__()
        self.attention = DecoderAttention(dim, dim, heads)
        self.crossattention = DecoderAttention(dim, audio_dim, heads)
        self.intermediate, self.output = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(0.1)

    def forward(self, x, audio_kv, causal_mask, audio_mask):
        """x (B, L, C), audio_kv: the audio's keys and values -> (B, L, C)."""
        x = self.attention(x, self.attention.keys_values(x), causal_mask)
        x = self.crossattention(x, audio_kv, audio_mask)
        return self.norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


def make_causal(text_encoder: common.TextEncoder) -> common.TextEncoder:
    """Turn a transformers text encoder into one whose tokens see only earlier tokens.

    Source: Sec. III-B, "causal self-attention". Positions counted from 0 are the code's (D13).
    """
    # transformers builds its mask from this flag; where it leaves the mask out, is_causal counts
    text_encoder.model.config.is_decoder = True
    for module in text_encoder.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
        if hasattr(module, "is_decoder"):
            module.is_decoder = True
    # D13: RoBERTa never trains row 1, its padding row; counted from 0 it is the second token's
    text_encoder.model.embeddings.position_embeddings.padding_idx = None
    return text_encoder


class Model(nn.Module):
    """Stage 2: audio encoder and causal text encoder, attention poolers, text decoder.

    Args
        shape: audio (dim, layers, heads, mlp), joint_dim, decoder_layers, variant.
        text_encoder: a common.TextEncoder (kept in checkpoints with its tokenizer).
    """

    sample_rate, variants = SAMPLE_RATE, ("paper", "jax", "official")
    window_s = 10.24  # for eval.py's --crop first only; otherwise a clip is encoded whole
    frame_s = STEP_SAMPLES / SAMPLE_RATE
    frame_window_s = PIECE_S  # encoded in one piece
    crop_rule = (
        f"any length as one sequence of patches; over {PIECE_S:g} s in pieces that are pooled "
        "together"
    )

    def __init__(self, shape: dict, text_encoder: common.TextEncoder):
        super().__init__()
        self.shape, variant, text_dim = shape, VARIANTS[shape["variant"]], text_encoder.out_dim
        self.log_mel = MagnitudeMel(variant["window"])
        self.audio_encoder = PatchTransformer(PATCH * PATCH, **shape["audio"], eps=variant["eps"])
        self.text_encoder = make_causal(text_encoder)
        self.audio_pool = AttentionPool(  # D2
            shape["audio"]["dim"],
            min(variant["heads"][0], shape["audio"]["heads"]),
            shape["joint_dim"],
        )
        self.text_pool = AttentionPool(text_dim, variant["heads"][1], shape["joint_dim"])
        self.decoder = nn.ModuleList(
            DecoderLayer(
                text_dim, shape["audio"]["dim"], text_encoder.model.config.num_attention_heads
            )
            for _ in range(shape["decoder_layers"])
        )
        if self.decoder:
            # not tied to the embeddings (code, D6)
            self.head = nn.Linear(text_dim, text_encoder.model.config.vocab_size)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
            for module in self.decoder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # D6

    @staticmethod
    def clean_caption(text: str) -> str:
        """The code tokenises captions as they are."""
        return text

    def text_states(self, input_ids, attention_mask):
        """Token ids (B, L) -> (B, L, C)."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, L); D13
        return self.text_encoder.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position,
            use_cache=False,  # else is_decoder makes it keep keys and values
        ).last_hidden_state

    def next_logits(self, text_states, audio_kv, audio_mask):
        """Logits (B, L, vocabulary) of the token after each; audio_kv as `audio_keys_values`."""
        L = text_states.shape[1]
        # (L, L); padding needs no mask: it follows the text, and its loss is not counted
        causal_mask = torch.ones(L, L, dtype=torch.bool, device=text_states.device).tril()
        x = text_states  # the decoder stands on top of the text encoder (Sec. III-B)
        for layer, kv in zip(self.decoder, audio_kv):
            x = layer(x, kv, causal_mask[None, None], audio_mask[:, None, None])
        return self.head(x)

    def audio_keys_values(self, audio_states):
        # keys and values of each layer, (B, heads, N, C / heads); caption() computes them once
        return [layer.crossattention.keys_values(audio_states) for layer in self.decoder]

    def forward(self, patches, index, valid_mask, input_ids, attention_mask):
        """One training batch -> audio_embeds, text_embeds (B, D), caption nll (B,), scale.

        Shapes: patches (B, N, 256), index and valid_mask (B, N), input_ids and attention_mask (B,
        L).
        """
        audio_states = self.audio_encoder(patches, index, valid_mask)
        text_states = self.text_states(input_ids, attention_mask)
        audio_embeds = F.normalize(self.audio_pool(audio_states, valid_mask).float(), dim=-1)
        text_embeds = F.normalize(
            self.text_pool(text_states, attention_mask.bool()).float(), dim=-1
        )
        nll = audio_embeds.new_zeros(len(patches))
        if self.decoder:  # the last token has no successor
            logits = self.next_logits(
                text_states[:, :-1], self.audio_keys_values(audio_states), valid_mask
            )
            # D5: jax and official divide by the padded length
            n_most = None if self.shape["variant"] == "paper" else self.text_encoder.max_tokens - 1
            nll = caption_nll(logits, input_ids[:, 1:], attention_mask[:, 1:], n_most)
        return audio_embeds, text_embeds, nll, self.log_scale.exp()

    def audio_states(self, waveform, n_samples=None):
        """waveform (B, S), n_samples (B,) valid ones -> states (B, N, C), valid_mask (B, N): the
        whole clip (D9).
        """
        # a piece holds whole time steps, so that no step is cut in two (D9)
        piece = min(int(PIECE_S * SAMPLE_RATE) // STEP_SAMPLES * STEP_SAMPLES, waveform.shape[1])
        pieces, owner, _, lengths = common.cut_windows(waveform, n_samples, piece)
        steps = n_steps(torch.tensor(lengths))
        # a few pieces at a time: bounded memory
        patches = torch.cat([to_patches(self.log_mel(part)) for part in pieces.split(8)])
        index = torch.arange(patches.shape[1], device=waveform.device)[None].expand(
            len(patches), -1
        )
        valid_mask = index < (N_FREQ * steps.to(waveform.device))[:, None]  # (pieces, N)
        states = torch.cat(
            [
                self.audio_encoder(*part)
                for part in zip(patches.split(8), index.split(8), valid_mask.split(8))
            ]
        )
        if len(pieces) == len(waveform):  # no clip was cut
            return states, valid_mask
        # for each clip (its real patches, C), piece after piece
        of_clip = [states[owner == b][valid_mask[owner == b]] for b in range(len(waveform))]
        n_patches = torch.tensor([len(x) for x in of_clip], device=waveform.device)
        states = nn.utils.rnn.pad_sequence(of_clip, batch_first=True)
        return states, torch.arange(states.shape[1], device=waveform.device) < n_patches[:, None]

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at 16 kHz, n_samples (B,) valid ones -> (B, D), normalised;
        never random.
        """
        with common.evaluating(self):
            return F.normalize(
                self.audio_pool(*self.audio_states(waveform, n_samples)).float(), dim=-1
            )

    @torch.no_grad()
    def embed_frames(self, waveform, n_samples=None):
        """As embed_audio -> (B, T, D), normalised, every 0.16 s (D10); zeros behind a clip's last
        frame.

        If a clip ends within a step, the frame of its last whole step is repeated for the rest.
        """
        with common.evaluating(self):
            states, valid_mask = self.audio_states(waveform, n_samples)
            frames = self._steps(
                self.audio_pool.pool_each_alone(states), valid_mask, waveform, n_samples
            )
            return nn.utils.rnn.pad_sequence([F.normalize(x.float(), dim=-1) for x in frames], True)

    @torch.no_grad()
    def event_feats(self, waveform, n_samples=None):
        """The encoder's own states, mean over the bands -> (B, T, C), every 0.16 s.

        HEAR's event tasks use them (Sec. V-E); the mean over the bands is the code's (D10).
        """
        with common.evaluating(self):
            states, valid_mask = self.audio_states(waveform, n_samples)
            return nn.utils.rnn.pad_sequence(
                [x.float() for x in self._steps(states, valid_mask, waveform, n_samples)], True
            )

    def _steps(self, x, valid_mask, waveform, n_samples) -> list:
        """x (B, N, C) -> for each clip (ceil(its time steps), C), mean over the bands."""
        lengths = [waveform.shape[1]] * len(x) if n_samples is None else n_samples.tolist()
        out = []
        for clip, mask, n in zip(x, valid_mask, lengths):
            steps = clip[mask].view(-1, N_FREQ, x.shape[2]).mean(1)  # (T, C)
            # patches drop an incomplete last step, but frames cover it
            missing = max(0, math.ceil(n / STEP_SAMPLES) - len(steps))
            out.append(torch.cat([steps, steps[-1:].expand(missing, -1)]))
        return out

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised. Class prompts come from eval.py (D17)."""
        with common.evaluating(self):
            tokens = common.to_device(self.text_encoder.tokenize(texts), self.log_scale.device)
            states = self.text_states(tokens["input_ids"], tokens["attention_mask"])
            return F.normalize(
                self.text_pool(states, tokens["attention_mask"].bool()).float(), dim=-1
            )

    @torch.no_grad()
    def caption(
        self,
        waveform,
        n_samples=None,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 100,
    ) -> list[str]:
        """A caption for each clip of waveform (B, S) at 16 kHz, token by token.

        temperature: 0 takes the likeliest token, else tokens are drawn (Sec. V-F: 0.1; D18); what a
        clip draws depends on `seed` alone, not on the other clips. Each step encodes the whole
        caption so far again: captions are short, and the interface of transformers' key-value cache
        changes between versions.
        """
        if not self.decoder:
            raise ValueError("this model was trained without a captioner (--caption-weight 0)")
        tokenizer = self.text_encoder.tokenizer
        with common.evaluating(self):
            audio_states, audio_mask = self.audio_states(waveform, n_samples)
            audio_kv = self.audio_keys_values(audio_states)
            ids = torch.full((len(waveform), 1), tokenizer.cls_token_id, device=audio_states.device)
            ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            generator = torch.Generator().manual_seed(seed)  # on the CPU: equal on all devices
            for _ in range(
                min(max_tokens, self.text_encoder.model.config.max_position_embeddings) - 1
            ):
                states = self.text_states(ids, torch.ones_like(ids))
                logits = self.next_logits(states, audio_kv, audio_mask)[:, -1].float()
                logits[:, [tokenizer.pad_token_id, tokenizer.cls_token_id]] = -math.inf  # D18
                # the largest of logits plus Gumbel noise is a draw from the softmax
                if temperature > 0:
                    noise = -torch.empty(logits.shape[1]).exponential_(generator=generator).log()
                    logits = logits / temperature + noise.to(logits.device)
                token = torch.where(ended, tokenizer.pad_token_id, logits.argmax(-1))
                # (B, L + 1); an ended caption gets padding, which decode() leaves out
                ids = torch.cat([ids, token[:, None]], 1)
                ended = ended | (token == tokenizer.sep_token_id)
                if ended.all():
                    break
        return [
            tokenizer.decode(
                row, skip_special_tokens=True, clean_up_tokenization_spaces=True
            ).strip()
            for row in ids.tolist()
        ]

    @classmethod
    def from_checkpoint(cls, path, variant: str | None = None):
        """A run's last.pt or best.pt of stage 2; variant: None, as it was trained."""
        content = common.read_checkpoint(path, METHOD)
        if content.get("stage") != "contrastive":
            raise ValueError(
                f"{path}: holds stage 1 only, an audio encoder that knows no text; stage 2 takes "
                "it as --audio-weights"
            )
        with common.rebuilding(path, content):
            text_encoder = common.text_encoder_from_description(
                content["text_encoder"], content["config"]["max_tokens"]
            )
            shape = {**content["shape"], "variant": variant or content["shape"]["variant"]}
            model = cls(shape, text_encoder)
        common.load_strict(model, content["model"], path)
        return model.eval()

    @classmethod
    def from_published(cls, source, text_model: str = "roberta-base", variant: str = "jax"):
        """The authors' torch file. The JAX code trained it, so the model computes like that code
        (jax); official: like their torch port, whose 2 audio pooling heads are a slip (D2).
        """
        state = port_state(common.read_weights(source))
        common.check_keys(source, state, "audio_encoder.", "the authors' torch file")
        # 100: the code's length
        text_encoder = common.text_encoder_from_pretrained(text_model, 100, weights=False)
        dim, layers, mlp, joint, decoders = port_size(state)
        model = cls(
            dict(
                # no shape shows the number of heads; the paper's 8 have 96 channels (Sec. IV-A)
                audio=dict(dim=dim, layers=layers, heads=max(1, dim // 96), mlp=mlp),
                joint_dim=joint,
                decoder_layers=decoders,
                variant=variant,
            ),
            text_encoder,
        )
        common.load_strict(model, state, source)
        return model.eval()


def audio_shape(cfg: Config) -> dict:
    return dict(
        dim=cfg.audio_dim, layers=cfg.audio_layers, heads=cfg.audio_heads, mlp=cfg.audio_mlp
    )


def start_model(cfg: Config, captions: list[str], mae_file: Path) -> Model:
    """The model of --weights, or a new one: the audio encoder from stage 1, the text encoder from
    --text-model, the rest random.
    """
    if cfg.weights != "none":
        own = "method" in common.read_weights(cfg.weights)
        model = (
            Model.from_checkpoint(cfg.weights)
            if own
            else Model.from_published(cfg.weights, common.published_text_model(cfg))
        )
        if cfg.caption_weight and not model.decoder:
            raise ValueError(f"--weights {cfg.weights}: has no captioner; give --caption-weight 0")
        if model.decoder and not cfg.caption_weight:  # weights without a gradient would stop DDP
            model.shape["decoder_layers"], model.decoder = 0, nn.ModuleList()
            del model.head
        return model
    text_encoder = common.start_text_encoder(cfg, captions, cfg.max_tokens)
    shape = dict(
        audio=audio_shape(cfg),
        joint_dim=cfg.joint_dim,
        decoder_layers=cfg.decoder_layers if cfg.caption_weight else 0,
        variant=cfg.variant,
    )
    model = Model(shape, text_encoder)
    if cfg.audio_weights != "none":
        if not cfg.audio_weights and not mae_file.is_file():
            raise FileNotFoundError(
                f"{mae_file}: no such file; run --stage mae --name {cfg.name or 'NAME'} first, or "
                "give --audio-weights (a run's mae.pt, the authors' torch file, or none)"
            )
        load_audio_encoder(model.audio_encoder, cfg.audio_weights or mae_file, cfg)
    return model


# ------------------------------------------------------------------------------------------------
# Loss: embeds (B, D) normalised, of all processes
# ------------------------------------------------------------------------------------------------


def contrastive_loss(sim, scale):
    """sim (B, B) cosine, audio in rows -> the sum (not the mean) of both directions' cross-entropy.

    Source: Eq. (1), with scale = 1 / tau.
    """
    target = torch.arange(len(sim), device=sim.device)
    return F.cross_entropy(sim * scale, target) + F.cross_entropy(sim.T * scale, target)  # Eq. (1)


def caption_nll(logits, targets, target_mask, n_most: int | None = None):
    """Each caption's negative log-likelihood (B,), mean over its tokens. Source: Eq. (2).

    With n_most it is the sum over the tokens divided by n_most (D5).
    logits (B, L, vocabulary); targets (B, L): the tokens that follow; target_mask (B, L), 1 = a
    real token.
    """
    # (B, L); cross_entropy takes the vocabulary on axis 1
    nll = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none") * target_mask
    return nll.sum(1) / (n_most or target_mask.sum(1))  # Eq. (2)


def training_loss(cfg: Config, audio_embeds, text_embeds, nll, scale):
    """Outputs of Model.forward in this process -> loss, sim (B, B), losses, over all processes.

    Source: Eq. (3).
    """
    audio_embeds = common.gather_with_grad(audio_embeds)
    text_embeds = common.gather_with_grad(text_embeds)
    nll = common.gather_with_grad(nll)  # from here on B is the whole batch
    sim = audio_embeds @ text_embeds.T  # (B, B)
    contrastive, captioning = contrastive_loss(sim, scale), nll.mean()  # over captions (D5)
    loss = contrastive + cfg.caption_weight * captioning  # Eq. (3)
    gap = modality_gap(audio_embeds.detach(), text_embeds.detach())  # logged, not minimised
    losses = {"loss_con": contrastive, "loss_cap": captioning, "modality_gap": gap}
    return loss, sim.detach(), losses


def modality_gap(audio_embeds, text_embeds):
    """Distance between the mean clip and the mean caption, here of a training batch.

    Source: Sec. V-G, after Liang et al., NeurIPS 2022.
    """
    return (audio_embeds.mean(0) - text_embeds.mean(0)).norm()


def sam_backward(parameters: list, backward, rho: float):
    """Leave the gradient of sharpness-aware minimisation in the parameters; their values stay.

    SAM minimises the largest loss within distance rho of the weights, the inner maximum of Eq. (4).
    A first pass gives the gradient; to first order, the maximum lies a step of length rho along it,
    Eq. (5). A second pass, on the same batch with the same random draws (D7), gives the gradient
    there, Eq. (6). Source: Sec. IV-B; Foret et al., ICLR 2021.

    Args: backward: computes the loss of the same batch with the same random draws (it seeds them
        itself) and adds its gradient; called twice, once if rho is 0. Gradients must be None or 0
        before (optimiser.zero_grad()).
    Returns: what its first call gives.
    """
    result = backward()
    if rho == 0:
        return result
    moved = [p for p in parameters if p.grad is not None]
    with torch.no_grad():
        # copies, since adding and subtracting a step would not restore the same bits
        before = [p.clone() for p in moved]
        norm = torch.stack([p.grad.float().norm() for p in moved]).norm()  # one over all (D7)
        factor = rho / (norm + 1e-12)  # D7
        for p in moved:
            p.add_(p.grad * factor)  # Eq. (5): the weights are now moved by the step
            p.grad = None  # the second pass would add to it
    # Eq. (4): what backward() computes now is the loss at the worst case, to first order
    backward()  # Eq. (6): its gradient
    with torch.no_grad():
        for p, value in zip(moved, before):
            # the weights are back; p.grad is still that of the moved ones
            p.copy_(value)
    return result


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


class Clips(Dataset):
    """Patches of clips, with one caption each in stage 2. An item's key is (epoch, index), which
    seeds all draws; its last entry is the file's name (common.Readable).

    Patches are computed here on the CPU: of a clip of 5 minutes (D8) only 512 of 15,000 patches go
    to the GPU.
    """

    def __init__(self, rows: list[dict], cfg: Config, tokenize=None):
        self.rows = rows
        self.cfg = cfg
        self.tokenize = tokenize  # None: stage 1, which needs no captions
        self.crop_s = LONGEST_S if tokenize else cfg.mae_crop_s
        self.log_mel = MagnitudeMel(VARIANTS[cfg.variant]["window"])

    def __getitem__(self, key):
        row = self.rows[key[1]]
        rng = np.random.default_rng((self.cfg.seed, *key))
        waveform = common.read_audio(
            row["audio"], SAMPLE_RATE, self.crop_s, rng, expected_s=row.get("duration")
        )
        patches = to_patches(self.log_mel(torch.from_numpy(waveform)[None]))[0]  # (N, 256)
        index = torch.arange(len(patches))
        if self.tokenize and len(patches) > self.cfg.patches:
            # from the full sequence, as PaSST does (Sec. IV-A)
            drawn = rng.choice(len(patches), self.cfg.patches, replace=False)
            index = torch.from_numpy(np.sort(drawn))
        caption = self.draw_caption(row, rng) if self.tokenize else None
        return patches[index], index, caption, row["audio"]

    def draw_caption(self, row: dict, rng) -> str:
        """Draw a synthetic caption, if there is one, in the set share of the draws, else one of the
        others (D16).

        `captions` are people's, or cleaned descriptions (D14); `synthetic` are a captioner's (D15).
        """
        written, synthetic = row.get("captions", []), row.get("synthetic", [])
        texts = (
            synthetic
            if synthetic and (not written or rng.random() < self.cfg.synthetic_share)
            else written
        )
        return texts[int(rng.integers(len(texts)))]

    def collate(self, items) -> dict:
        """-> what the model's forward takes."""
        patches, indices, captions, _ = zip(*items)
        lengths = torch.tensor([len(p) for p in patches])
        batch = {
            "patches": nn.utils.rnn.pad_sequence(patches, True),  # (B, N, 256)
            "index": nn.utils.rnn.pad_sequence(indices, True),  # (B, N), 0 where padded
            "valid_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }
        if self.tokenize:
            tokens = self.tokenize(list(captions))
            batch |= {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        return batch


# ------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------


def learning_rate(cfg: Config, peak: float, step: int, total: int) -> float:
    """Warm-up (linear: D6) to the peak, then half a cosine to min_lr (Sec. IV-A)."""
    factor = common.warmup_cosine(step, cfg.warmup_steps, total)
    # warmup_cosine ends at 0; only its cosine part is raised, to end at min_lr
    return peak * factor if step < cfg.warmup_steps else cfg.min_lr + (peak - cfg.min_lr) * factor


def require_texts(rows: list[dict]) -> None:
    """ValueError for a row that stage 2 cannot use: without captions, written or synthetic."""
    for row in rows:
        if not row.get("synthetic"):
            common.require([row], "captions")


def texts_of(rows: list[dict]) -> list[str]:
    return [t for row in rows for t in (*row.get("captions", []), *row.get("synthetic", []))]


def train_mae(cfg: Config, run: common.Run, checkpoint: dict | None) -> None:
    """Stage 1, masked autoencoding (Sec. III-A) -> runs/NAME/mae.pt; needs audio only."""
    rows = common.read_manifest(cfg.data)
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)
    batch_size = min(cfg.mae_batch_size, len(train_rows))
    common.check_batch(cfg, batch_size, len(train_rows), "clip", "mae_batch_size")
    if cfg.stage == "all":  # what stage 2 needs is checked now, not after stage 1
        require_texts(train_rows + val_rows)
        n = len(train_rows)
        common.check_batch(cfg, min(cfg.batch_size, n), n, "clip")
        if not checkpoint:  # any text will do
            common.start_text_encoder(cfg, ["a"], cfg.max_tokens)
    torch.manual_seed(cfg.seed)
    eps = VARIANTS[cfg.variant]["eps"]
    model = MAE(audio_shape(cfg), cfg.mae_layers, cfg.mask_ratio, eps)
    if checkpoint:
        common.load_strict(model, checkpoint["model"], run.path / "last.pt")
    model.to(run.device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=cfg.mae_lr, weight_decay=cfg.weight_decay, fused=True
    )
    forward = run.begin(
        model,
        optimiser,
        cfg.mae_steps,
        len(train_rows),
        f"{len(train_rows)} clips; batches of {batch_size}",
        checkpoint,
        stage="mae",
        shape=audio_shape(cfg),
        warmup_steps=cfg.warmup_steps,
    )
    sampler = common.training_batches(
        len(train_rows), batch_size, cfg.seed, run.step, cfg.mae_steps
    )

    def loss_of(of_clips):
        return (common.gather_with_grad(of_clips).mean(),)

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(Clips(train_rows, cfg), sampler):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(cfg, cfg.mae_lr, run.step, cfg.mae_steps)

        optimiser.zero_grad(set_to_none=True)
        (loss,) = common.cached_backward(  # D12
            forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
        )
        optimiser.step()

        run.step_done(loss)
        run.save_if_due()
    run.save("mae.pt")  # D11
    common.barrier()  # stage 2 reads mae.pt in every process


@torch.no_grad()
def validate(model: Model, rows: list[dict], cfg: Config, quiet=True) -> tuple[dict, dict]:
    """Retrieval and loss_con use whole clips; loss_cap uses patches drawn as in training, the same
    ones each time; both losses use first captions -> scores, chance levels.
    """
    rows, audio_embeds, _ = common.embed_validation(model, rows, quiet=quiet)
    texts = [row.get("captions") or row["synthetic"] for row in rows]
    scores, chance, sim = common.caption_retrieval(model, audio_embeds, None, texts)
    # column of each clip's first caption, so that sim becomes square
    first = np.concatenate([[0], np.cumsum([len(of) for of in texts])[:-1]])
    scale = model.log_scale.exp().cpu()
    scores["loss_con"] = float(contrastive_loss(torch.from_numpy(sim[:, first]), scale))
    chance["loss_con"] = 2 * math.log(len(rows))
    if model.decoder:
        of_first = [{**row, "captions": [of[0]], "synthetic": []} for row, of in zip(rows, texts)]
        dataset, nll, shares = Clips(of_first, cfg, model.text_encoder.tokenize), [], []
        with common.evaluating(model):
            for i in range(0, len(rows), 32):
                # epoch 0 at every validation, so that the draws are the same
                items = [dataset[0, j] for j in range(i, min(i + 32, len(rows)))]
                batch = common.to_device(dataset.collate(items), model.log_scale.device)
                nll += model(**batch)[2].tolist()
                # a guess costs log(vocabulary) a token; jax and official divide by `most` (D5)
                tokens = batch["attention_mask"][:, 1:].sum(1)
                most = model.text_encoder.max_tokens - 1
                shares += (
                    tokens / (tokens if model.shape["variant"] == "paper" else most)
                ).tolist()
        scores["loss_cap"] = float(np.mean(nll))
        vocab_size = model.text_encoder.model.config.vocab_size
        chance["loss_cap"] = math.log(vocab_size) * float(np.mean(shares))
    return scores, chance


def train_contrastive(cfg: Config, run: common.Run, checkpoint: dict | None) -> dict:
    """Stage 2, contrastive captioning (Sec. III-B, Eq. 1-3; SAM: Sec. IV-B, Eq. 4-6) ->
    runs/NAME/last.pt, best.pt.

    Returns: the best checkpoint's scores on the validation split.
    """
    rows = common.read_manifest(cfg.data)
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)
    require_texts(train_rows + val_rows)
    batch_size = min(cfg.batch_size, len(train_rows))
    common.check_batch(cfg, batch_size, len(train_rows), "clip")
    # seeded again, so that stage 2 starts the same whether or not stage 1 ran in this call
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = Model.from_checkpoint(run.path / "last.pt")
    else:
        model = start_model(cfg, texts_of(train_rows), run.path / "mae.pt")
        if cfg.weights != "none":
            cfg = run.starts_from(
                variant=model.shape["variant"], max_tokens=model.text_encoder.max_tokens
            )
    model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    forward = run.begin(
        model,
        optimiser,
        cfg.steps,
        len(train_rows),
        f"{len(train_rows)} clips, {len(val_rows)} clips for validation; batches of {batch_size}, "
        f"2 ln B = {2 * math.log(batch_size):.2f}",
        checkpoint,
        stage="contrastive",
        shape=model.shape,
        continues=not run.opened and mae_is_finished(run.path / "last.pt"),
        warmup_steps=cfg.warmup_steps,
    )
    if not checkpoint:
        run.save("last.pt")  # from here on --resume continues in this stage
        if cfg.weights != "none" and val_rows and run.rank == 0:
            run.log_scores(validate(model, val_rows, cfg)[0])  # scores before any fine-tuning
    clips = Clips(train_rows, cfg, model.text_encoder.tokenize)
    sampler = common.training_batches(len(train_rows), batch_size, cfg.seed, run.step, cfg.steps)

    def loss_of(*outputs):
        return training_loss(cfg, *outputs)

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(clips, sampler):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(cfg, cfg.lr, run.step, cfg.steps)

        # called twice by SAM; reseed gives both passes the same dropout masks (D7)
        def backward():
            return common.cached_backward(  # D12
                forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
            )

        optimiser.zero_grad(set_to_none=True)
        loss, sim, losses = sam_backward(parameters, backward, cfg.rho)
        optimiser.step()

        run.step_done(loss, sim, **losses, scale=model.log_scale.exp())
        if run.is_due(cfg.eval_steps):
            score, scores = run.step, {}  # without validation clips the last step is the best
            if val_rows and run.rank == 0:
                scores, _ = validate(model, val_rows, cfg)
                score = (scores["t2a_mAP@10"] + scores["a2t_mAP@10"]) / 2  # D11
            run.keep_best(score, scores)
        run.save_if_due()

    # Result: the best checkpoint on the validation split
    if run.rank > 0 or not val_rows:
        return {}
    model = Model.from_checkpoint(run.path / "best.pt").to(run.device)
    scores, chance = validate(model, val_rows, cfg, quiet=False)
    result = run.finish(scores, chance, len(val_rows))
    if model.decoder:
        show_captions(model, val_rows[:3])
    plain = dict(stage="contrastive", rho=0.0, caption_weight=0.0)
    if cfg.weights == "none":
        plain["audio_weights"] = cfg.audio_weights or str(run.path / "mae.pt")
    run.say_next("the same start, without captioner and SAM", **plain)
    return result


def mae_is_finished(path: Path) -> bool:
    """True if this last.pt is a finished stage 1: stage 2 may continue in its folder."""
    if not path.is_file():
        return False
    stored = common.read_checkpoint(path, METHOD)
    return stored["stage"] == "mae" and stored["step"] == stored["config"]["mae_steps"]


def show_captions(model: Model, rows: list[dict]) -> None:
    """Print the model's captions of these clips beside the clips' own first captions."""
    print()
    for row in rows:
        try:
            waveform = common.read_audio(row["audio"], SAMPLE_RATE, PIECE_S)
        except common.AudioError:  # validate() has reported this file
            continue
        waveform = torch.from_numpy(waveform)[None].to(model.log_scale.device)
        print(f"  heard: {model.caption(waveform)[0]}")
        print(f"  truth: {(row.get('captions') or row['synthetic'])[0]}")


def main(cfg: Config) -> dict:
    """Train -> stage, best_step, n_clips, scores and chance of the best checkpoint on the
    validation split, as in eval.json; {} without that split; for --stage mae the path of mae.pt.
    """
    run = common.Run(cfg, METHOD)
    checkpoint = run.checkpoint()
    # --resume continues in the stage of last.pt
    in_stage_2 = checkpoint is not None and checkpoint["stage"] == "contrastive"
    if cfg.stage != "contrastive" and not in_stage_2:
        train_mae(cfg, run, checkpoint)
        if cfg.stage == "mae":
            flags = common.flags_of(cfg, name=run.name, stage="contrastive")
            run.say(f"\nNext:\n  python cacophony.py {flags}")
            return {"mae": str(run.path / "mae.pt")}
    return train_contrastive(cfg, run, checkpoint if in_stage_2 else None)


# ------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------


def port_state(weights: dict) -> dict:
    """Rename the weights of the authors' torch port to ours. Unknown names stay, so that strict
    loading lists them.
    """
    for wrapper in ("model_state_dict", "state_dict"):  # a file may have either, or none
        weights = weights.get(wrapper, weights)
    state = {}
    for key, value in weights.items():
        # constants, not weights
        if key.endswith("position_ids") or key.endswith("token_type_ids"):
            continue
        for theirs, ours in (
            (r"^audio_module\.freq_positional_embedding$", "audio_encoder.freq_embedding"),
            (r"^audio_module\.", "audio_encoder."),
            (r"^audio_attention_pool\.", "audio_pool."),
            (r"^text_module\.pooler\.attention_pool_query$", "text_pool.query"),
            (r"^text_module\.pooler\.", "text_pool."),
            (r"^text_module\.encoder\.layers\.", "text_encoder.model.encoder.layer."),
            (r"^text_module\.", "text_encoder.model."),
            (r"^text_proj\.", "text_pool.out_proj."),
            (r"^decoder_module\.decoder_proj\.", "head."),
            (r"^decoder_module\.encoder\.layers\.", "decoder."),
            (r"^logit_scale$", "log_scale"),
        ):
            key = re.sub(theirs, ours, key)
        if key.startswith("audio_encoder."):
            key = (
                key.replace(".attn.in_proj_", ".qkv.")
                .replace(".attn.out_proj.", ".proj.")
                .replace(".mlp.", ".")
            )
        if key.startswith("decoder."):
            key = key.replace("attention.self.", "attention.").replace(
                "attention.output.dense", "attention.dense"
            )
            key = key.replace("attention.output.LayerNorm", "attention.norm").replace(
                ".intermediate.dense", ".intermediate"
            )
            key = key.replace(".output.dense", ".output").replace(".output.LayerNorm", ".norm")
        state[key] = value.reshape(-1) if key == "text_pool.query" else value  # (1, C) in the port
    for kind in ("weight", "bias"):
        # the port's text pooler has two layers for keys and values, its audio pooler one, as ours
        parts = [state.pop(f"text_pool.{name}_proj.{kind}", None) for name in ("key", "value")]
        if all(part is not None for part in parts):
            state[f"text_pool.kv_proj.{kind}"] = torch.cat(parts)
    return state


def port_size(state: dict) -> tuple:
    """dim, layers, mlp, joint_dim, decoder layers, read from shapes; the paper's where keys are
    missing.
    """

    def count(prefix):
        return len({m[1] for k in state if (m := re.match(rf"{prefix}\.(\d+)\.", k))})

    def size(key, default):
        return len(state[key]) if key in state else default

    return (
        size("audio_encoder.norm.weight", 768),
        count(r"audio_encoder\.layers") or 12,
        size("audio_encoder.layers.0.fc1.weight", 3072),
        size("audio_pool.out_proj.weight", 768),
        count("decoder") or 4,
    )


def load_audio_encoder(encoder: PatchTransformer, path, cfg: Config) -> None:
    """Load stage 1's encoder (a run's mae.pt), or the audio encoder in the authors' torch file."""
    content = common.read_weights(path)
    if content.get("method") == METHOD:
        # heads and the variant's details change no tensor's shape, so loading would not notice them
        # content["shape"] is the encoder's alone in a stage 1 file; stage 2 has it under "audio"
        stored = {**content["config"], **content["shape"].get("audio", content["shape"])}
        for name, now in (*audio_shape(cfg).items(), ("variant", cfg.variant)):
            # paper and jax have the same audio encoder
            if stored[name] != now and {stored[name], now} != {"paper", "jax"}:
                raise ValueError(
                    f"{path}: trained with {name} = {stored[name]}, and this run has {now}; repeat "
                    "stage 1's flags"
                )
        state = content["model"]
    else:
        state = port_state(content)
    state = {
        k.removeprefix("audio_encoder."): v
        for k, v in state.items()
        if k.startswith("audio_encoder.")
    }
    common.load_strict(encoder, state, path)


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    common.run_entry(main, common.cli, Config, __doc__)
