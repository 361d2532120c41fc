"""MGA-CLAP: CLAP whose clip and caption embeddings are sparse mixtures of shared codewords.

Yiming Li, Zhifang Guo, Xiangdong Wang, Hong Liu: "Advancing Multi-grained Alignment for Contrastive
Language-Audio Pre-training", ACM Multimedia 2024, arXiv:2408.07919v1. Official code:
github.com/Ming-er/MGA-CLAP (HTS-AT only), called "the code" below. The idea: plain CLAP pools the
frames into one vector and the words into another, and aligns only these two. A single frame need
not match a single word. Three changes make frames match words without frame labels. (1) Both
modalities share a codebook. Every frame (or word) is compared with every codeword, and each
codeword keeps its largest value over the frames. Sparsemax turns these K values into weights, most
of them 0. The embedding is the weighted sum of the codewords. (2) The last block of the audio
encoder mixes no positions, so it blurs frames no further. (3) Negatives that lie close to the clip
(or caption) weigh more.

Equations (paper) -> code
  Eq. (1)  symmetric contrastive loss (plain CLAP)           clap_loss
  Eq. (2)  affinity to a codeword: maximum over frames / eta  codebook_weights
  Eq. (3)  affinities to weights: sparsemax                  codebook_weights
  Sec. 3.2.2  mixture of codewords (no number)               Model.aggregate
  Eq. (4)  query, key, value of an ordinary block            common.Attention.forward
  Eq. (5)  its softmax over positions                        common.Attention.forward
  Eq. (6)  its weighted sum of values                        common.Attention.forward
  Sec. 3.3  locality-aware block: U' = V, no (5) and (6)     common.Block.forward
  Eq. (7)  hard-negative guided loss                         hard_negative_loss
  Eq. (8)  its weights alpha and beta                        hard_negative_loss
  Table 4  compared methods UACA, WSTAG, PACL                *_similarity

Letters (the paper's in brackets): B pairs, S samples, T frames (HTS-AT: 32 of 0.3125 s in 10 s), L
tokens (L - 1 words [N]), D joint dimension 1024, K codewords [M] 4096, M mel bins, gamma 0.15,
temperature [tau], eta affinity divisor.

Deviations from the paper (official: what --variant official does; the code: what no flag does)
  D1  Eq. (1) and (7) are sums over the batch and both directions. Ours are means over both, so that
      they can be compared with ln B. Adam's step does not depend on the scale of the loss.
  D2  The paper gives neither eta ("a scaling term") nor the initial codewords. Ours are the code's:
      eta = sqrt(D) * 1000, codewords from N(0, 1). --size tiny: sqrt(D) * 70 for 256 codewords.
      Sec. 1 speaks of the "maximum cosine similarity", but Eq. (2) is an inner product. We and the
      code follow Eq. (2): frames, words and codewords are not normalised.
  D3  The paper does not mention masking. Here the maximum of Eq. (2) excludes [SEP] and the padding
      of a caption. Official: they enter the maximum with affinity 0. Both variants treat
      zero-padded audio like any other audio.
  D4  If a clip has two captions in the batch, its other caption is ignored: it enters neither the
      denominator of Eq. (1) and (7) nor the sum and B of Eq. (8) (the paper has one positive per
      row). Official: soft targets over all captions of the clip.
  D5  Official: weights (B - 1) E_ij / (S_j - E_ij) with E_ij = e^(gamma (<p_i, q_j> / tau - m_i)),
      where m_i is the maximum of row i of <p, q> / tau. By mistake S_j is the sum over row j of E,
      not row i. Positives have weight 1, and 1e-7 is added inside the log.
  D6  The block "removes the q-k attention", "with other components unchanged". Ours keeps the
      output projection after V, the residuals, the LayerNorms and the feed-forward. Official: no
      feed-forward (common.Block).
  D7  Official: the loss also has the term mean|A| / ||A||, where A is the matrix of the batch's
      clip embeddings, and the same term for its text embeddings.
  D8  Official: clips are padded to the longest clip of the batch, and HTS-AT stretches them to
      10 s; with several processes, to the longest of each process's share. We pad to 10 s, as the
      paper does.
  D9  Official, if --variant says so (from --weights alone: still 15): 10 epochs (paper 15). The
      schedule (warm-up of 2 epochs, cosine) is the code's; the paper names none.
  D10 bf16 autocast (code: fp16 with loss scaling; the paper names no precision). Clips of "similar
      durations are grouped within a batch". Pairs left over from a duration group form mixed
      batches here, so fewer than B pairs, drawn anew every epoch, are left out
      (common.bucketed_batches). The code drops the remainder of every group.
  D11 The checkpoint is chosen on the validation split, as in the paper; the code chooses on the
      test sets. The paper names no score. Ours is the code's, R@1 + R@5 of both directions. The
      code keeps a best checkpoint for each of its two sets. We keep one, chosen on the validation
      clips of all data together.
  D12 Captions are cut at 30 tokens, [CLS] and [SEP] included, as in the code; in the paper they are
      "randomly cropped or padded" to 30 words. They are cleaned first (clean_caption), as in the
      code; the paper does not say.
  D13 --encoder atst is ATST-Frame, the paper's "AST". No code is released for it. In ours the last
      block is locality-aware, only the last block's output is used, padded audio is attended to,
      there is no SpecAugment, and stochastic depth is as in HTS-AT. --variant official changes it
      as it changes HTS-AT.
  D14 Clip and caption embeddings are normalised, as in the code, so similarities are cosines where
      Eq. (1), (7) and (8) have "the inner product".
  D15 The output at [CLS] is not used as a word, as in the code; the paper says "word-level
      features".
  D16 The "two-layer MLP" behind an encoder has a LayerNorm before each layer and a GELU between
      them, as in the code.
  D17 HTS-AT trains with SpecAugment (2 time stripes narrower than 64 frames, 2 frequency stripes
      narrower than 8 mel bins) and stochastic depth, as in the code; the paper names neither.
  D18 A clip is "randomly cropped" from the whole file; code: from its first 300 s.
  D19 If no row has split val, 5 % of the clips (2 to 1,000) are held out for validation. The paper
      says only "validation sets".
  D20 The paper crops or pads "all the audio clips" at random to 10 s and has no separate rule for
      test clips. Ours are cut into consecutive windows of 10 s, the last one zero-padded, whose
      embeddings are averaged, weighted by duration. The code crops long clips at random for
      retrieval, and pads short ones to the longest of 32; for detection and grounding it takes
      their first 10 s and repeats short ones to 10 s. Official also repeats short clips for their
      frames, but pads to 10 s for retrieval. For the first 10 s add --crop first.
  D21 --aggregator mean, uaca, wstag, pacl: the authors' versions are not released. Ours follow Sec.
      3.2.1 ("mean pooling or attention pooling": mean) and Sec. 2.3 and 5.1.2 ("mean-mean pooling",
      "max-mean", "cross-modal attention pooling"). With --locality-blocks 0 --no-hard-negatives
      they correspond to rows of the paper's tables. Their frames include those of zero-padded audio
      (D3) in training, and for mean also in evaluation.
  D22 Gradients flow through the weights of Eq. (8), as in the code; the paper does not say.
  D23 Eq. (5) is printed for one head; HTS-AT has its own windows, heads and position bias. Its
      output is "decoupled to produce the final frame-wise features" by the mean over frequency, as
      in the code. Fig. 5 replaces more blocks than the last stage has and does not say which. We
      replace the last ones, counted backwards through all stages.
  D24 --micro-batch (ours): batch norm sees the micro-batches, not the whole batch, and updates its
      running statistics twice per micro-batch (common.cached_backward).
  D25 The paper trains a model "from scratch" for each task, on data without "the overlapped
      samples", and averages three runs (Sec. 4.2). Here one run trains one model, and the overlap
      is removed when the data are prepared (tools.datasets --exclude).

Run:  python mga_clap.py --data demo                              (two CPU cores, under 4 minutes)
      python mga_clap.py --data wavcaps.jsonl audiocaps.jsonl clotho.jsonl    (needs HTSAT.ckpt)
      torchrun --nproc-per-node 8 mga_clap.py --data ...           (one node, 8 GPUs)
      python eval.py runs/NAME/best.pt --data MANIFEST --protocol all
The loss starts near ln B (4.85 at B = 128). If it stays flat for more than an epoch, see README,
"Is my loss normal?".
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    # paper: HTS-AT + BERT-base; tiny: same family, small, random weights
    size: Literal["paper", "tiny"] = "paper"
    # official: follow the released code where it differs (D3 to D9, D20)
    variant: Literal["paper", "official"] = "paper"
    # audio encoder (Sec. 4.1): HTS-AT at 32 kHz, or ATST-Frame, the paper's "AST", at 16 kHz
    encoder: Literal["htsat", "atst"] = "htsat"
    # whole model to start from, with its own settings: a run's best.pt or the authors' model.pt;
    # none: start from --audio-weights and --text-model
    weights: str = "none"
    # initial audio encoder: the AudioSet file (Sec. 4.1; atst: atstframe_base.ckpt), a transformers
    # CLAP folder, or none
    audio_weights: str = "HTSAT.ckpt"
    # initial text encoder, and the tokenizer of model.pt: hub id or folder, or none (Sec. 4.1: BERT
    # base; uncased: code)
    text_model: str = "bert-base-uncased"
    # maximum length of a caption, [CLS] and [SEP] included (code; Sec. 4.1: 30 words, D12)
    max_tokens: common.Tokens = 30

    # model
    # codebook: MGA-CLAP; with --locality-blocks 0 --no-hard-negatives, mean is plain CLAP (Tables 2
    # to 4) and the others are the methods of Table 4 (D21)
    aggregator: Literal["codebook", "mean", "uaca", "wstag", "pacl"] = "codebook"
    # pooling of a codeword's affinities over frames or words (Sec. 3.2.2, Table 6)
    affinity: Literal["max", "mean"] = "max"
    # function from affinities to weights (Sec. 3.2.2, Table 6)
    sparsity: Literal["sparsemax", "softmax"] = "sparsemax"
    codewords: common.Count = 4096  # size of the shared codebook (Sec. 4.1, Fig. 4)
    # affinities are divided by eta = affinity_scale * sqrt(joint_dim) (code, D2)
    affinity_scale: common.Positive = 1000.0
    # number of locality-aware blocks, the last ones (Sec. 3.3, Fig. 5, D23); plain CLAP: 0
    locality_blocks: common.Whole = 1
    joint_dim: common.Count = 1024  # dimension shared by audio and text (Sec. 4.1)
    # channels in stage 1 of HTS-AT; each later stage has twice as many (atst: one stage of 768)
    audio_dim: common.Count = 96
    # blocks per stage (atst: 12)
    audio_depths: list[common.Layers] = field(default_factory=lambda: [2, 2, 6, 2])
    # heads per stage (atst: 12)
    audio_heads: list[common.Count] = field(default_factory=lambda: [4, 8, 16, 32])
    audio_patch: common.Count = 4  # HTS-AT patch, in mel bins and frames
    text_dim: common.Count = 768  # text encoder width, read only when --text-model none
    text_layers: common.Layers = 12  # text encoder layers, read only when --text-model none

    # loss
    # weight negatives by their similarity (Table 5); off: plain contrastive loss
    hard_negatives: bool = True
    gamma: common.NotNegative = 0.15  # sharpness of the hard-negative weights (Sec. 4.1, Fig. 6)
    init_temperature: common.Positive = 0.07  # initial value of the learnt tau (Sec. 4.1)

    # optimisation
    epochs: common.Count = 15  # passes over the pairs (Sec. 4.1; code: 10, D9)
    batch_size: common.Count = 128  # pairs over all processes (Sec. 4.1)
    lr: common.Positive = 5e-5  # peak learning rate of Adam (Sec. 4.1)
    warmup_epochs: common.NotNegative = 2.0  # linear warm-up, then cosine to 0 (code, D9)
    # stochastic depth, rising from 0 to this over the audio blocks (code, D17; atst: D13)
    drop_path: common.Dropout = 0.1
    eval_epochs: common.Count = 1  # epochs between validations (each may write best.pt)

    def check(self):
        width = self.audio_dim * 2 ** (len(self.audio_depths) - 1)  # of the last stage
        if self.encoder == "htsat":
            common.check_htsat(self)
        elif width % self.audio_heads[-1]:
            raise ValueError(f"--audio-heads {self.audio_heads[-1]} does not divide {width}")
        if self.locality_blocks > sum(self.audio_depths):
            raise ValueError(
                f"--locality-blocks {self.locality_blocks}: the encoder has "
                f"{sum(self.audio_depths)} blocks"
            )


# Random weights need a higher learning rate, a CPU larger patches, 256 codewords a smaller eta (D2)
TINY = dict(
    audio_weights="none",
    text_model="none",
    audio_patch=16,
    audio_dim=64,
    audio_depths=[1, 4],
    audio_heads=[4, 8],
    text_dim=128,
    text_layers=2,
    joint_dim=128,
    codewords=256,
    affinity_scale=70.0,
    batch_size=48,
    lr=1e-3,
    warmup_epochs=1.0,
    drop_path=0.0,
    eval_epochs=5,
    save_steps=100,
    workers=1,
)
OFFICIAL = dict(epochs=10)  # D9
ATST = dict(audio_weights="atstframe_base.ckpt", audio_dim=768, audio_depths=[12], audio_heads=[12])
Config.presets = {
    ("variant", "official"): OFFICIAL,
    ("encoder", "atst"): ATST,
    ("size", "tiny"): TINY,
}
WINDOW_S = 10.0  # training crop (Sec. 4.1); evaluation windows (D20)
SAMPLE_RATE = {"htsat": 32000, "atst": 16000}
PUBLISHED = dict(variant="official")  # settings of the authors' model.pt; others: Config's defaults
# settings that define a model; with --weights they are read from the file
MODEL_SETTINGS = (
    *("variant", "encoder", "max_tokens", "aggregator", "affinity", "sparsity", "codewords"),
    *("affinity_scale", "locality_blocks", "joint_dim", "audio_dim", "audio_depths"),
    *("audio_heads", "audio_patch", "drop_path"),
)
METHOD = "mga_clap"


def clean_caption(text: str) -> str:
    """Captions (not class names) before tokenising: lower case, no punctuation.

    Source: the code (D12). Neighbouring marks leave two spaces: "a dog (big). barks" becomes
    "a dog big  barks".
    """
    # remove the space before a punctuation mark, then replace every mark by a space
    text = re.sub(r"\s([,.!?;:|*\"](?:\s|$))", r"\1", text.lower())
    return re.sub(r"[(,.!?;:|*\")]", " ", text).replace("  ", " ").strip()


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def codebook_weights(
    feats,
    codebook,
    eta: float,
    valid_mask=None,
    affinity="max",
    sparsity="sparsemax",
    masked_score=float("-inf"),
):
    """Weights of the codewords for each clip or caption.

    Args
        feats (B, T, D) projected frames or words, not normalised; codebook (K, D).
        valid_mask (B, T) bool, True = a real frame or word; None = all are.
        eta: divisor of the affinities: sqrt(D) * 1000 for 4,096 codewords, sqrt(D) * 70 for 256.
        affinity: "max" or "mean" over T; sparsity: "sparsemax" or "softmax".
        masked_score: affinity of masked positions; -inf, or 0 in the official code (D3).
    Returns
        weights (B, K) fp32, non-negative, each row sums to 1.
    Source: Sec. 3.2.2, Eq. (2) and (3). Copied alone, needs sparsemax of common.py.
    """
    score = feats @ codebook.T  # (B, T, D) x (D, K) -> (B, T, K)
    if affinity == "mean":  # Table 6
        valid = torch.ones_like(score[..., :1])
        if valid_mask is not None:
            valid = valid_mask[..., None].to(score.dtype)
        affinities = (score * valid).sum(1) / valid.sum(1)
    else:
        if valid_mask is not None:
            score = score.masked_fill(~valid_mask[..., None], masked_score)  # D3
        affinities = score.amax(1)  # (B, K)
    affinities = affinities.float() / eta  # Eq. (2): product, maximum, division
    if sparsity == "softmax":  # Table 6
        return affinities.softmax(-1)
    return common.sparsemax(affinities)  # Eq. (3)


class ATSTMel(nn.Module):
    """Waveform (B, S) at 16 kHz -> log-mel (B, 64, T_mel), about -1 to 1. Source: ATST-Frame's
    released code.
    """

    def __init__(self):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(16000, 1024, 1024, 160, 60, 7800, n_mels=64)
        self.decibel = torchaudio.transforms.AmplitudeToDB("power", top_db=80)
        common.keep_out_of_checkpoints(self.mel)

    def forward(self, waveform):
        with torch.autocast(waveform.device.type, enabled=False):
            # With the channel axis, (B, 1, 64, T), torchaudio applies top_db per clip. Without it,
            # top_db would be relative to the loudest clip of the batch.
            decibels = self.decibel(self.mel(waveform.float()[:, None]))[:, 0]
            return (decibels + 79.6482) / (50.6842 + 79.6482) * 2 - 1


class ATSTFrame(nn.Module):
    """Frame-wise transformer: a token covers 40 ms of all mel bins (D13).

    Source: Li et al., ATST-Frame (TASLP 2024).

    Args: dim, depth, heads: 768, 12, 12 in the published base model; n_frames: longest input in
        tokens.
    """

    def __init__(
        self,
        dim=768,
        depth=12,
        heads=12,
        n_frames=250,
        drop_path=0.1,
        locality_blocks=0,
        locality="paper",
    ):
        super().__init__()
        self.out_dim, self.n_frames = dim, n_frames
        self.patch_embed = nn.Linear(64 * 4, dim)
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, n_frames + 1, dim), std=0.02)
        )
        drops = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            common.Block(
                dim,
                heads,
                drop_path=drops[i],
                qkv_bias=False,
                eps=1e-6,
                locality=locality if i >= depth - locality_blocks else "",
            )
            for i in range(depth)
        )
        self.norm_frame = nn.LayerNorm(dim, eps=1e-6)
        common.init_linear_layers(self)

    def forward(self, log_mel):
        """log_mel (B, 64, T_mel) -> frames (B, T_mel // 4, dim)."""
        B, M, T_mel = log_mel.shape
        T = T_mel // 4
        if T > self.n_frames:
            raise ValueError(
                f"spectrogram of {T_mel} frames; this encoder takes at most {4 * self.n_frames + 3}"
            )
        # a token's values are ordered by mel bin first, then by time
        patches = log_mel[:, :, : 4 * T].reshape(B, M, T, 4).transpose(1, 2).reshape(B, T, 4 * M)
        # position 0 is for the published model's clip token, which is not used here
        x = self.patch_embed(patches) + self.pos_embed[:, 1 : T + 1]
        for block in self.blocks:
            x = block(x)
        return self.norm_frame(x)


class Model(nn.Module):
    """An audio encoder and BERT with a shared codebook (or compared as CLAP, UACA, WSTAG or PACL).

    Args: cfg; text_encoder: a common.TextEncoder (kept in checkpoints with its tokenizer).
    """

    window_s, variants = WINDOW_S, ("paper", "official")
    clean_caption = staticmethod(clean_caption)

    def __init__(self, cfg: Config, text_encoder: common.TextEncoder):
        super().__init__()
        self.cfg, self.repeats_short_clips = cfg, cfg.variant == "official"  # D20
        self.sample_rate = SAMPLE_RATE[cfg.encoder]
        # uaca, wstag and pacl compare frames with words, pair by pair
        self.pairwise = cfg.aggregator in PAIRWISE
        if cfg.encoder == "atst":
            self.log_mel = ATSTMel()
            # D13; several stages (--size tiny) become one, as wide as the last
            self.audio_encoder = ATSTFrame(
                cfg.audio_dim * 2 ** (len(cfg.audio_depths) - 1),
                sum(cfg.audio_depths),
                cfg.audio_heads[-1],
                drop_path=cfg.drop_path,
                locality_blocks=cfg.locality_blocks,
                locality=cfg.variant,  # D6
            )
        else:
            self.log_mel = common.LogMel(
                self.sample_rate, n_fft=1024, hop=320, n_mels=64, fmin_hz=50, fmax_hz=14000
            )
            self.audio_encoder = common.HTSAT(  # D17, D23
                cfg.audio_dim,
                cfg.audio_depths,
                cfg.audio_heads,
                cfg.audio_patch,
                drop_path=cfg.drop_path,
                locality_blocks=cfg.locality_blocks,
                locality=cfg.variant,  # D6
            )
        self.text_encoder = text_encoder
        self.frame_s = WINDOW_S / self.audio_encoder.n_frames

        def two_layers(dim):
            return nn.Sequential(  # D16
                nn.LayerNorm(dim),
                nn.Linear(dim, cfg.joint_dim),
                nn.GELU(),
                nn.LayerNorm(cfg.joint_dim),
                nn.Linear(cfg.joint_dim, cfg.joint_dim),
            )

        self.frame_proj = two_layers(self.audio_encoder.out_dim)
        self.word_proj = two_layers(text_encoder.out_dim)
        # learnt without a lower limit, as in the code
        self.temperature = nn.Parameter(torch.tensor(cfg.init_temperature))
        self.eta = cfg.affinity_scale * math.sqrt(cfg.joint_dim)  # D2
        if cfg.aggregator == "codebook":
            self.codebook = nn.Parameter(torch.randn(cfg.codewords, cfg.joint_dim))  # D2

    def aggregate(self, feats, valid_mask=None):
        """Frames or words (B, T, D) -> normalised embeds (B, D), mean number of active codewords.

        Source: Sec. 3.2.2; without a codebook Sec. 3.2.1, mean pooling.
        """
        if self.cfg.aggregator == "codebook":
            weights = codebook_weights(
                feats,
                self.codebook,
                self.eta,
                valid_mask,
                self.cfg.affinity,
                self.cfg.sparsity,
                0.0 if self.cfg.variant == "official" else float("-inf"),
            )
            with torch.autocast(weights.device.type, enabled=False):  # fp32, unlike the affinities
                mixture = weights @ self.codebook  # Sec. 3.2.2
            return F.normalize(mixture, dim=-1), (weights > 0).sum(1).float().mean()  # D14
        # plain CLAP, and the clip and class vectors of the pairwise methods (D21)
        valid = torch.ones_like(feats[..., :1]) if valid_mask is None else valid_mask[..., None]
        feats = F.normalize(feats.float(), dim=-1) if self.pairwise else feats.float()
        pooled = (feats * valid).sum(1) / valid.sum(1)
        return F.normalize(pooled, dim=-1), pooled.new_zeros(())

    def frame_feats(self, waveform):
        """waveform (B, S) of at most one window -> projected frames (B, T, D)."""
        return self.frame_proj(self.audio_encoder(self.log_mel(waveform)))

    def word_feats(self, input_ids, attention_mask):
        """Token ids (B, L) -> projected words (B, L - 1, D), without [CLS]."""
        return self.word_proj(self.text_encoder(input_ids, attention_mask)[:, 1:])  # D15

    def forward(self, waveform, input_ids, attention_mask, word_mask):
        """One training batch -> audio_embeds (B, D), text_embeds (B, D), temperature, active
        codewords.

        A pairwise method returns frames (B, T, D) and words (B, max_tokens - 1, D) instead of
        embeds.
        """
        frames, words = self.frame_feats(waveform), self.word_feats(input_ids, attention_mask)
        if self.pairwise:
            words = unit_words(words, word_mask[:, 1:])
            # gathering needs the same shape on all processes
            words = F.pad(words, (0, 0, 0, self.cfg.max_tokens - 1 - words.shape[1]))
            # official: with ATST, T follows the batch's longest clip
            frames = F.pad(frames, (0, 0, 0, self.audio_encoder.n_frames - frames.shape[1]))
            return F.normalize(frames.float(), dim=-1), words, self.temperature, words.new_zeros(())
        audio_embeds, audio_active = self.aggregate(frames)  # no mask: padding counts (D3)
        text_embeds, text_active = self.aggregate(words, word_mask[:, 1:])
        active = (audio_active + text_active).detach() / 2
        return audio_embeds, text_embeds, self.temperature, active

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at `sample_rate`, n_samples (B,) valid ones -> (B, D),
        normalised.

        Deterministic: the mean over consecutive 10 s windows, weighted by duration; the last window
        is zero-padded (D20).
        """
        with common.evaluating(self):
            frame_feats, owner, weight = self._window_feats(waveform, n_samples)
            return common.join_windows(self.aggregate(frame_feats)[0], owner, weight)

    @torch.no_grad()
    def embed_frames(self, waveform, n_samples=None):
        """As embed_audio -> frames (B, T, D), normalised, one every `frame_s` seconds; zeros after
        a clip's last window.

        Frames are taken after the projection and before the codebook: Fig. 1 compares "frame
        features" with texts, and so does the code.
        """
        if self.repeats_short_clips:
            waveform, n_samples = repeated(waveform, n_samples, int(WINDOW_S * self.sample_rate))
        with common.evaluating(self):
            frame_feats, owner, _ = self._window_feats(waveform, n_samples)
            frames = F.normalize(frame_feats.float(), dim=-1)
            return nn.utils.rnn.pad_sequence(
                [frames[owner == b].flatten(0, 1) for b in range(len(waveform))], True
            )

    def _window_feats(self, waveform, n_samples):
        windows, owner, weight, _ = common.cut_windows(  # D20
            waveform, n_samples, int(WINDOW_S * self.sample_rate)
        )
        # at most 32 windows at a time: bounded memory
        feats = torch.cat([self.frame_feats(part) for part in windows.split(32)])
        return feats, owner, weight

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised. The caller applies `clean_caption` to captions, not to classes."""
        with common.evaluating(self):
            tokens = common.to_device(self.text_encoder.tokenize(texts), self.temperature.device)
            words = self.word_feats(tokens["input_ids"], tokens["attention_mask"])
            return self.aggregate(words, tokens["word_mask"][:, 1:])[0]

    @torch.no_grad()
    def pair_scores(self, frame_embeds: list, texts: list[str]):
        """frame_embeds: list of (T_i, D) arrays -> similarity (N, Q) of every clip and text.

        For pairwise methods only. Their similarity is not a product of a clip vector and a text
        vector, so retrieval and tagging score every pair.
        """
        similarity, device = PAIRWISE[self.cfg.aggregator], self.temperature.device
        with common.evaluating(self):
            words, rows = [], []
            for i in range(0, len(texts), 64):  # 64 x 64 pairs at a time: bounded memory
                tokens = common.to_device(self.text_encoder.tokenize(texts[i : i + 64]), device)
                feats = self.word_feats(tokens["input_ids"], tokens["attention_mask"])
                words.append(unit_words(feats, tokens["word_mask"][:, 1:]))
            for i in range(0, len(frame_embeds), 64):
                part = [torch.from_numpy(f).to(device) for f in frame_embeds[i : i + 64]]
                frames = nn.utils.rnn.pad_sequence(part, True)
                rows.append(torch.cat([similarity(frames, w, self.temperature) for w in words], 1))
            return torch.cat(rows).cpu().numpy()

    @classmethod
    def from_checkpoint(cls, path, text_model="bert-base-uncased", variant=None):
        """A run's last.pt or best.pt, or the authors' model.pt (with `text_model`'s config and
        tokenizer).
        variant: None keeps the variant of the training, which is official for model.pt.
        """
        content = common.read_weights(path)
        if "codebook" in content.get("model", {}) and "method" not in content:
            cfg = Config(data=[], **PUBLISHED)
            cfg = dataclasses.replace(cfg, variant=variant or cfg.variant)
            model = cls(
                cfg,
                common.text_encoder_from_pretrained(text_model, cfg.max_tokens, weights=False),
            )
            common.load_strict(model, official_state(content["model"]), path)
        else:
            content = common.read_checkpoint(path, METHOD)
            with common.rebuilding(path, content):
                cfg = Config(**content["config"])
                cfg = dataclasses.replace(cfg, variant=variant or cfg.variant)
                model = cls(
                    cfg,
                    common.text_encoder_from_description(content["text_encoder"], cfg.max_tokens),
                )
            common.load_strict(model, content["model"], path)
        return model.eval()


def repeated(waveform, n_samples, length: int):
    """Repeat clips that are shorter than `length` samples until they fill it (D20).

    waveform (B, S), n_samples (B,) or None -> the same with S at least `length`.
    """
    counts = [waveform.shape[1]] * len(waveform) if n_samples is None else n_samples.tolist()
    clips = []
    for clip, n in zip(waveform, counts):
        at = torch.arange(max(n, length), device=clip.device)
        clips.append(clip[at % n])
    n_samples = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), n_samples


def start_model(cfg: Config, captions: list[str]) -> Model:
    """The model of --weights, or a new one: encoders from --audio-weights and --text-model, the
    rest with random weights.
    """
    if cfg.weights != "none":
        return Model.from_checkpoint(cfg.weights, common.published_text_model(cfg))
    # a folder or hub id has no suffix; report a missing file before fetching a text encoder
    if Path(cfg.audio_weights).suffix and not Path(cfg.audio_weights).exists():
        raise FileNotFoundError(
            f"--audio-weights {cfg.audio_weights}: no such weight file; HTS-AT's HTSAT.ckpt is at "
            "github.com/XinhaoMei/WavCaps, ATST-Frame's at "
            "github.com/Audio-WestlakeU/audiossl (or give none)"
        )
    model = Model(cfg, common.start_text_encoder(cfg, captions, cfg.max_tokens))
    if cfg.audio_weights != "none" and cfg.encoder == "atst":
        load_atst(model.audio_encoder, cfg.audio_weights)
    elif cfg.audio_weights != "none":
        common.load_htsat(model.audio_encoder, cfg.audio_weights)
    return model


# ------------------------------------------------------------------------------------------------
# Loss: sim (B, B) cosine, audio in rows; same_clip (B, B) bool, True on the diagonal and between
# captions of one clip
# ------------------------------------------------------------------------------------------------


def clap_loss(sim, temperature, same_clip):
    """Cross-entropy with the matching pair as target, mean of both directions. Source: Eq. (1)."""
    diagonal = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    logits = (sim / temperature).masked_fill(same_clip & ~diagonal, float("-inf"))  # D4
    target = torch.arange(len(sim), device=sim.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2  # Eq. (1), D1


def hard_negative_loss(sim, temperature, gamma: float, same_clip):
    """clap_loss in which each negative has a weight alpha that grows with its similarity; all are
    1 if gamma is 0. Source: Sec. 3.4, Eq. (7) and (8).

    sim (B, B) cosines, audio in rows, are divided by temperature; same_clip (B, B) bool, True
    between captions of one clip.
    """
    diagonal = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    twin = same_clip & ~diagonal  # D4

    def one_way(logits):
        # logarithm of alpha_ij = B e^(gamma <p_i, q_j> / tau) / sum over k of
        # e^(gamma <p_i, q_k> / tau); for the transposed matrix it is that of beta
        gamma_logits = (gamma * logits).masked_fill(twin, float("-inf"))
        n_in_sum = (~twin).sum(1, keepdim=True)  # B where no clip has two captions in the batch
        log_sum = gamma_logits.logsumexp(1, keepdim=True)
        log_alpha = n_in_sum.to(logits.dtype).log() + gamma_logits - log_sum  # Eq. (8), D22
        log_alpha = log_alpha.masked_fill(diagonal, 0.0)  # the positive has weight 1
        return (torch.logsumexp(logits + log_alpha, 1) - logits.diagonal()).mean()  # Eq. (7), D1

    logits = sim / temperature
    return (one_way(logits) + one_way(logits.T)) / 2  # twin is symmetric


def official_loss(sim, temperature, gamma: float, same_clip, hard_negatives: bool = True):
    """What the released code computes: D4, D5."""
    targets = same_clip / same_clip.sum(1, keepdim=True)  # D4; symmetric

    def one_way(logits):
        logits = logits - logits.amax(1, keepdim=True).detach()
        E = torch.exp(gamma * logits)  # as in D5
        # the code's mistake: without keepdim, column j gets the sum of row j, not i (D5); clamped,
        # because the difference is 0 for a single pair
        others = (E.sum(1) - E).clamp(min=1e-30)
        weight = (len(sim) - 1) * E / others  # D5
        weight = weight.masked_fill(targets > 0, 1.0) if hard_negatives else torch.ones_like(E)
        log_prob = logits - torch.log((weight * logits.exp()).sum(1, keepdim=True) + 1e-7)
        return -(targets * log_prob).sum(1).mean()

    logits = sim / temperature
    return (one_way(logits) + one_way(logits.T)) / 2


def embedding_regulariser(embeds):
    """Extra term of the official loss (D7), which favours few large entries. embeds (B, D) are
    normalised, so their norm is constant and only the mean absolute value varies.
    """
    return embeds.abs().mean() / embeds.norm()


def training_loss(cfg: Config, audio_embeds, text_embeds, temperature, clip_ids):
    """Embeddings of the whole batch (all processes), or frames and words for a pairwise method ->
    loss, sim (B, B).
    """
    if cfg.aggregator in PAIRWISE:
        sim = PAIRWISE[cfg.aggregator](audio_embeds, text_embeds, temperature)
    else:
        sim = audio_embeds @ text_embeds.T  # (B, B)
    same_clip = clip_ids[:, None] == clip_ids[None, :]
    if cfg.variant == "official":
        loss = official_loss(sim, temperature, cfg.gamma, same_clip, cfg.hard_negatives)
        # D7
        return loss + embedding_regulariser(audio_embeds) + embedding_regulariser(text_embeds), sim
    if cfg.hard_negatives:
        return hard_negative_loss(sim, temperature, cfg.gamma, same_clip), sim
    return clap_loss(sim, temperature, same_clip), sim


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    """One item per (clip, caption) pair. A key is (epoch, index), which seeds the random crop. An
    item's last entry is the file's name (common.Readable).
    """

    def __init__(self, rows: list[dict], cfg: Config, tokenize):
        self.pairs = [(i, row, text) for i, row in enumerate(rows) for text in row["captions"]]
        self.durations = [row.get("duration", WINDOW_S) for _, row, _ in self.pairs]
        self.cfg, self.tokenize, self.rate = cfg, tokenize, SAMPLE_RATE[cfg.encoder]

    def __getitem__(self, key):
        epoch, index = key
        clip, row, caption = self.pairs[index]
        rng = np.random.default_rng((self.cfg.seed, epoch, index))
        waveform = common.read_audio(  # D18
            row["audio"], self.rate, WINDOW_S, rng, expected_s=row.get("duration")
        )
        return waveform, clean_caption(caption), clip, row["audio"]

    def collate(self, items) -> dict:
        """-> the arguments of Model.forward, and the clips' numbers."""
        waveforms, captions, clips, _ = zip(*items)
        length = int(WINDOW_S * self.rate)
        if self.cfg.variant == "official":  # D8; at least one STFT window of 1024 samples
            length = max(1024, *(len(w) for w in waveforms))
        return {
            "waveform": common.pad_batch(waveforms, length)[0],
            **self.tokenize(list(captions)),
            "clip_ids": torch.tensor(clips),
        }


def same_length(waveforms: list) -> list:
    """Micro-batches (B_i, S_i), zero-padded to the longest clip of the batch (D8)."""
    longest = max(waveform.shape[1] for waveform in waveforms)
    return [F.pad(waveform, (0, longest - waveform.shape[1])) for waveform in waveforms]


# ------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------


def validate(model: Model, rows: list[dict], classes: list[str], quiet=True) -> tuple[dict, dict]:
    """-> scores on `rows` and their chance levels: retrieval; tagging and frame-level mAP where
    rows are labelled.
    """
    frames = bool(classes) and any(row.get("events") for row in rows)
    rows, audio_embeds, frame_embeds = common.embed_validation(
        model, rows, frames or model.pairwise, quiet
    )
    captions = [[clean_caption(text) for text in row["captions"]] for row in rows]
    scores, chance, _ = common.caption_retrieval(model, audio_embeds, frame_embeds, captions)
    if classes and any(row.get("labels") or row.get("events") for row in rows):
        names = [re.sub("[_/]", " ", c) for c in classes]
        tagged = common.annotated(rows, "labels", "events")
        targets = common.label_targets([rows[i] for i in tagged], classes)
        sim = common.similarities(model, audio_embeds, frame_embeds, names)[tagged]
        scores["tagging_mAP"] = float(np.nanmean(common.class_average_precisions(sim, targets)))
        chance["tagging_mAP"] = common.chance_of_mean_ap(targets)
        if frames and any(row.get("events") for row in rows):
            class_embeds = common.embed_texts(model, names)
            timed = common.annotated(rows, "events")
            timed_frames, timed_rows = [frame_embeds[i] for i in timed], [rows[i] for i in timed]
            # centred: each frame's mean over the classes is subtracted
            for name, centred in (("frame_mAP_raw", False), ("frame_mAP_centred", True)):
                per_class, chance[name] = common.frame_average_precisions(
                    timed_frames, class_embeds, timed_rows, classes, model.frame_s, centred
                )
                scores[name] = float(np.nanmean(per_class))
    return scores, chance


def main(cfg: Config) -> dict:
    """Train -> best_step, n_clips, scores and chance of the best checkpoint on the validation
    split, as in eval.json; {} without validation clips.
    """
    run = common.Run(cfg, METHOD)

    # Data
    rows = common.read_manifest(cfg.data)  # D25
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)  # D19
    common.require(train_rows + val_rows, "captions")
    classes = common.read_classes(cfg.data, val_rows)
    if classes and any(row.get("labels") or row.get("events") for row in val_rows):
        # report a wrong class list now, not after the training
        common.label_targets(val_rows, classes)
    captions = [clean_caption(text) for row in train_rows for text in row["captions"]]
    batch_size = min(cfg.batch_size, len(captions))
    common.check_batch(cfg, batch_size, len(captions), "pair")

    # Model
    checkpoint = run.checkpoint()
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = Model.from_checkpoint(run.path / "last.pt")
    else:
        model = start_model(cfg, captions)
        if cfg.weights != "none":
            cfg = run.starts_from(**{name: getattr(model.cfg, name) for name in MODEL_SETTINGS})
    model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=cfg.lr, fused=True)

    # Steps: floor(pairs / batch) per epoch
    pairs = Pairs(train_rows, cfg, model.text_encoder.tokenize)
    steps_per_epoch = len(captions) // batch_size
    total_steps = cfg.epochs * steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * steps_per_epoch)
    forward = run.begin(
        model,
        optimiser,
        total_steps,
        len(train_rows),
        f"{len(train_rows)} clips, {len(captions)} pairs for training, {len(val_rows)} clips for "
        f"validation; batches of {batch_size}, ln B = {math.log(batch_size):.2f}",
        checkpoint,
        warmup_steps=warmup_steps,
    )
    common.say_if_few(run, "--epochs", cfg.epochs, total_steps, captions)
    if cfg.weights != "none" and val_rows and run.rank == 0 and not checkpoint:
        run.log_scores(validate(model, val_rows, [])[0])  # before fine-tuning
    sampler = common.training_batches(  # D10
        len(captions), batch_size, cfg.seed, run.step, total_steps, pairs.durations
    )

    def loss_of(audio_embeds, text_embeds, temperature, active):
        """Outputs for all micro-batches of a batch -> loss, sim (B, B), active codewords.

        The loop sets clip_ids to those of the current batch.
        """
        loss, sim = training_loss(
            cfg,
            common.gather_with_grad(audio_embeds),
            common.gather_with_grad(text_embeds),
            temperature,
            clip_ids,
        )
        return loss, sim.detach(), active

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(pairs, sampler):
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(run.step, warmup_steps, total_steps)
        # clip_ids go to the loss, not to the model
        clip_ids = common.gather_with_grad(torch.cat([part.pop("clip_ids") for part in parts]))
        for part, waveform in zip(parts, same_length([part["waveform"] for part in parts])):
            part["waveform"] = waveform  # D8

        optimiser.zero_grad(set_to_none=True)
        loss, sim, active = common.cached_backward(  # D10, D24
            forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
        )
        optimiser.step()

        run.step_done(
            loss,
            sim,
            epoch=(run.step + 1) / steps_per_epoch,  # run.step does not count this step yet
            temperature=model.temperature,
            active_codewords=active,
        )
        if run.is_due(cfg.eval_epochs * steps_per_epoch):
            score, scores = run.step, {}  # without validation clips the last step wins
            if val_rows and run.rank == 0:
                scores, _ = validate(model, val_rows, [])  # retrieval only
                used = ("t2a_R@1", "t2a_R@5", "a2t_R@1", "a2t_R@5")
                score = sum(scores[k] for k in used)  # D11
            run.keep_best(score, scores)
        run.save_if_due()

    # Result: the best checkpoint on the validation split
    if run.rank > 0 or not val_rows:
        return {}
    model = Model.from_checkpoint(run.path / "best.pt").to(run.device)
    scores, chance = validate(model, val_rows, classes, quiet=False)
    result = run.finish(scores, chance, len(val_rows))
    if cfg.weights == "none" and cfg.aggregator == "codebook":
        plain = dict(aggregator="mean", locality_blocks=0, hard_negatives=False)
        run.say_next("plain CLAP", **plain)
    else:  # with --weights the file decides on the model
        how = "without" if cfg.hard_negatives else "with"
        run.say_next(f"{how} hard negatives", hard_negatives=not cfg.hard_negatives)
    return result


# ------------------------------------------------------------------------------------------------
# Published weights, and the other methods of Table 4
# ------------------------------------------------------------------------------------------------


def load_atst(encoder: ATSTFrame, path: str) -> None:
    """Load a released atstframe_*.ckpt (its teacher), a fine-tuned one, or a saved state dict."""
    weights = common.read_encoder_weights(path)
    weights = weights.get("state_dict", weights)
    prefixes = ("model.teacher.encoder.", "encoder.encoder.")
    found = [p for p in prefixes if any(key.startswith(p + "blocks.") for key in weights)]
    prefix = found[0] if found else ""
    state = {}
    for key, value in weights.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        if key != "mask_embed":  # the mask token is used only in pre-training
            state[key.replace("patch_embed.patch_embed.", "patch_embed.")] = value
    common.load_strict(encoder, state, path)


def official_state(weights: dict) -> dict:
    """The authors' model.pt names -> ours. Unknown names stay, so strict loading lists them."""
    prefix = "audio_encoder.audio_enc."
    audio = common.htsat_state(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    state = {f"audio_encoder.{k}": v for k, v in audio.items()}
    for key, value in weights.items():
        if not key.startswith(prefix) and not key.endswith("embeddings.position_ids"):
            key = key.replace("text_encoder.text_encoder.", "text_encoder.model.")
            state["temperature" if key == "temp" else key] = value
    return state


def unit_words(words, mask):
    """Normalised words (B, L, D), zero where mask (B, L) is False."""
    return F.normalize(words.float(), dim=-1) * mask[..., None]


# The other methods of Table 4, as we read them (D21). Each maps normalised frames (A, T, D) and
# words (Q, L, D) to similarity (A, Q). A vector of zeros is padding; any(-1) is False there.


def uaca_similarity(frames, words, temperature=None):
    """Mean over words of the mean over frames (Sec. 2.3). Xie et al., ICASSP 2022 (UACA)."""

    def mean(x):
        return x.sum(1) / x.any(-1).sum(1, keepdim=True)

    return mean(frames) @ mean(words).T


def wstag_similarity(frames, words, temperature=None):
    """Mean over words of the best frame (Sec. 2.3). Xu et al., ICASSP 2023 workshop (WSTAG)."""
    cells = torch.einsum("atd,qld->aqlt", frames, words)
    best = cells.masked_fill(~frames.any(-1)[:, None, None], float("-inf")).amax(-1)  # (A, Q, L)
    valid = words.any(-1)
    return (best * valid).sum(-1) / valid.sum(-1)


def pacl_similarity(frames, words, temperature):
    """Frames weighted by their match to the caption, then pooled (Sec. 5.1.2).

    Source: Mukhoti et al., CVPR 2023 (PACL).
    """
    text = F.normalize(words.sum(1), dim=-1)  # (Q, D)
    logits = torch.einsum("atd,qd->aqt", frames, text) / temperature
    weights = logits.masked_fill(~frames.any(-1)[:, None], float("-inf")).softmax(-1)
    pooled = F.normalize(torch.einsum("aqt,atd->aqd", weights, frames), dim=-1)
    return torch.einsum("aqd,qd->aq", pooled, text)


PAIRWISE = {"uaca": uaca_similarity, "wstag": wstag_similarity, "pacl": pacl_similarity}


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    common.run_entry(main, common.cli, Config, __doc__)
