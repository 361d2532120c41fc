"""curation-CLAP: a teacher pairs unlabelled sound with text; its student learns from these pairs.

Wang, Subakan, Subramani, Wu, Tavares, Ayres, Smaragdis: "Unsupervised Improvement of Audio-Text
Cross-Modal Representations", WASPAA 2023, arXiv:2305.01864.
Official code: github.com/zhepeiw/clap_curation.

The idea: captioned audio is scarce, but unpaired sound and text are plentiful. (1) A CLAP of CNN14
and BERT, the teacher, is trained on annotated pairs. (2) It embeds unlabelled audio and known
captions, and close pairs are kept: with any caption (DU, domain-unspecific), or with the captions
near the class prompts of a target domain (ADS; DS keeps these captions with their own audio). (3) A
student starts from the teacher and trains on curated pairs, with batches of annotated ones between
(replay). Its soft-labelled loss (SL) gives part of the target to other pairs of the batch: the more
similar the teacher finds two clips (or two captions), the less the student pays for confusing them.

Equations (paper) -> code
  Eq. (1)  contrastive loss, half the sum of both directions (D15)     contrastive_loss
  Eq. (2)  the teacher's similarities C_a = a a', C_t = t t' (D16)     soft_targets
  Eq. (3)  audio-to-text target: (1 - beta) one-hot + beta row of C_a  soft_targets
  Eq. (4)  text-to-audio target: (1 - beta) one-hot + beta row of C_t  soft_targets
  Eq. (5)  the two KL losses, each a mean over the batch               soft_divergence
  unnumbered: the mean of the two, the objective (Sec. 2.3)            soft_labelled_loss
  Sec. 2.2  curation DU, DS and ADS with threshold sigma (no number)   curate

Letters: B pairs in a batch [N], S samples, T_mel or T spectrogram frames, M mel bins, C channels or
classes, L text tokens, D joint dimension 1024 [d], N clips, Q captions and P their pairs in a
curation (the paper's N is B). beta 0.3, tau temperature, sigma threshold.
Clips are in rows and captions in columns: the transpose of the paper's C = t a'. In Eq. (2) a and t
are the teacher's, with a tilde in the paper.

Deviations from the paper, and what it leaves open (official: what --variant official does; code:
what no flag does)
  D1  The projection is MS-CLAP's (residual, LayerNorm), so that its file loads. The paper: "a
      two-layer MLP".
  D2  tau starts at 0.007 (paper). official: 0.07, and logits are cut off above 100.
  D3  Shorter clips in training are "zero-padded" (paper): here at the end. official: the clip is
      put at a random place among zeros.
  D4  Evaluation and curation are never random: clips under 5 s (and last windows) are repeated to 5
      s, longer ones cut into windows. The code crops one window, at random in evaluation, at a
      place fixed by a seed in curation. Curation uses the first 60 s of a clip.
  D5  The mel matrix is part of a checkpoint and the stored one is used: PANNs' file has the matrix
      for 32 kHz.
  D6  Soft targets of Eq. (3) and (4) below 0 count as 0. torch 1.10, which the authors used, did
      so; current torch gives NaN. They are not normalised (as printed): the mass of a row is 1 or
      more.
  D7  Not stated: Adam 1e-4, 20 epochs (the example in the code's README; its yaml files have 1e-3 B
      / 1024 and 100), a tenth of the rate at the 11th epoch without progress (not counted before
      epoch 10, so never in 20 epochs), clipping at 5, both encoders trained, similarities between
      the pairs of all GPUs, an epoch of the student has as many steps as one pass over the replay
      set, of which curated batches take about half (all from the code; without replay one over the
      curated pairs, ours). The paper averages three runs (Sec. 3.2); here a run is one seed.
  D8  Not stated: validation. Its clips are the rows of split val; where there are none, 5 % of the
      clips (at most 1,000) are drawn, and all captions of a clip stay together. The code draws 17 %
      of the rows, and one clip can lie on both sides. best.pt has the smallest validation loss (the
      stage's own loss, on centre crops). The code cannot compute its soft loss there (it runs no
      teacher in validation); with use_zs_loader it selects by accuracy on the data set that is then
      evaluated. Our validation batches are one random order; the code shuffles all rows first.
  D9  Replay: "we used replay in all of our results" (Sec. 3.2). DU replays the teacher's pairs ("we
      randomly replace the batches"), ADS those of DS. Their share is not printed; here it is half
      (`curation_prob` 0.5 in the code's yaml files; 0 in its README's example, which uses no
      curated pairs). For DS the paper names no replay set, and here it has none; SL alone trains on
      the annotated pairs.
  D10 Cosines are of fp16 embeddings, as in the code, but summed in fp32. For the same embeddings,
      device, block and number of processes can change the pairs whose cosine lies within 1e-5 of
      the threshold, and no others.
  D11 --teacher-fraction keeps a share of the clips. The paper takes "10%" of the "paired audio and
      caption data", the code of the rows. --seed draws it: teacher, curation and student must have
      the same seed. Curation then takes the captions of these clips ("from the teacher training
      set", Sec. 3.1).
  D12 bf16 autocast on a GPU, also when a pool is embedded; the losses are never in bf16 (on a GPU,
      their matrix products may use TF32).
  D13 --micro-batch: batch norm sees the parts of a batch, not the whole (common.cached_backward).
  D14 The random weights of a new text encoder (--size tiny) are larger than usual: with a standard
      deviation of 0.02, which suits wide encoders, the first token of a small one hardly depends on
      the text.
  D15 Eq. (1) is printed as L(C) = 1/2 sum_i (log Softmax_t(C/tau)_ii + log Softmax_a(C/tau)_ii),
      without a minus sign and as a sum over the batch. Here with the minus sign, and the mean over
      the batch (code).
  D16 C = t a' and Eq. (2) are printed without normalisation. Here all embeddings have length 1
      (code), so that C, C_a and C_t hold cosines.
  D17 sigma: the paper has "0.7 for the domain-unspecific curation and a threshold between 0.6 and
      0.75 for the domain-specific experiments" (Sec. 3.1). It does not say which value is for which
      data set, nor whether it is for caption and prompt or for clip and caption. Here --threshold
      (sigma) and --ds-threshold are both 0.7 unless given. The code's files, for ESC-50,
      UrbanSound8K, TUT17: caption and prompt 0.7, 0.6, 0.675; clip and caption 0.7, 0.7, 0.65; for
      DU 0.75.
  D18 A caption that several rows share is curated once; in the code once a row.
  D19 Captions are compared with "class labels" (Sec. 2.2.2). Here with the prompts of Sec. 3.3, the
      labels in lower case with spaces for _ and / (code).
  D20 The student starts from the teacher's weights (code). The paper says "to train a new model",
      and of SL "further training the teacher CLAP model". Soft labels come from the same teacher,
      without dropout, also in replay.
  D21 Not printed: Hann window of 1,024 samples, hop 320, 64 mel bins from 50 to 14,000 Hz,
      bert-base-uncased, its first token, 100 tokens, captions without commas (all from the code)
      and without links, $ and * (in the code only FSD50K's, here all). Sec. 3.2 follows CLAP [9],
      also for the initial weights: CNN14 starts from PANNs' file, BERT as published (code).
  D22 "Excluding recordings that are [...] contained in AudioCaps" (Sec. 3.1): --pool is used as
      given, so leave AudioCaps out when preparing it (tools.datasets --exclude).

Run:  python curation_clap.py --data demo                              (two CPU cores, all stages)
      python curation_clap.py --stage teacher --data fsd50k_told clotho audiocaps macs --name full
      python curation_clap.py --stage curate --name full --data ... --pool ... --labels ...
      (with --dry-run first, to choose the thresholds)
      torchrun --nproc-per-node 8 curation_clap.py --stage student --name full --data ...
      python eval.py runs/full/best.pt --data esc50 --protocol classification --prompt curation_clap
DS and ADS need one curation and one student for each data set of an evaluation (--labels).
Eq. (1) starts near ln B only at tau 0.07; at 0.007 well above. The smallest value of Eq. (5) is not
0 and differs from batch to batch, as the targets are not normalised (D6).
"""

import hashlib
import itertools
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

import common

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass(init=False)
class Config(common.RunConfig):
    # data
    data: list[str]  # annotated manifests, folders that hold manifest.jsonl, or the word demo
    # paper: CNN14 + BERT; tiny: the same family, small and from random weights
    size: Literal["paper", "tiny"] = "paper"
    # official: details as in the released code (D2, D3)
    variant: Literal["paper", "official"] = "paper"
    # one of the three stages, or all in order
    stage: Literal["all", "teacher", "curate", "student"] = "all"
    # unlabelled audio: manifests (captions and labels are not read; D22)
    pool: list[str] = field(default_factory=list)
    # without --pool: share of the training clips that lose their captions and form the pool (ours;
    # the demo has no other pool); give --pool in all stages or in none
    pool_share: Annotated[float, "[0, 1)"] = 0.0
    # classes of the domain (DS, ADS): a .txt, one a line, or manifests; none: those of --data
    labels: list[str] = field(default_factory=list)
    # teacher of stages curate and student: a run's teacher.pt or MS-CLAP 2022's file; empty:
    # runs/NAME/teacher.pt
    teacher: str = ""
    # share of the annotated clips that is used (0.1 in Table 3; D11)
    teacher_fraction: Annotated[float, "(0, 1]"] = 1.0

    # curation
    # kind of curation (Sec. 2.2); none: the student trains on the annotated pairs (SL alone)
    curation: Literal["ads", "du", "ds", "none"] = "ads"
    # sigma, least cosine of clip and caption (Sec. 3.1: DU 0.7, DS and ADS 0.6 to 0.75; D17)
    threshold: Annotated[float, "[-1, 1]"] = 0.7
    # least cosine of caption and class prompt (code: 0.7, 0.6, 0.675 for ESC-50, US8K, TUT17; D17)
    ds_threshold: Annotated[float, "[-1, 1]"] = 0.7
    # DU, ADS: number of best captions per clip, used instead of the threshold (5: code)
    top_k: common.Whole = 0
    # DS, ADS: number of nearest captions per class, used instead of ds_threshold (ours)
    ds_top_k: common.Whole = 0
    # instead of curating, print similarities, yields and examples of a sample, to choose sigma
    dry_run: bool = False
    # clips in a block, after which an interrupted curation can resume
    block: common.Count = 8192

    # model
    # channels of CNN14's blocks
    audio_channels: list[common.Count] = field(
        default_factory=lambda: [64, 128, 256, 512, 1024, 2048]
    )
    hop: Annotated[int, "[1, 44100]"] = 320  # samples between spectrogram frames (code; D21)
    window_s: Annotated[float, "[0.1, 60]"] = 5.0  # seconds heard at once (Sec. 3.1)
    joint_dim: common.Count = 1024  # dimension shared by audio and text (Sec. 3.2)
    block_dropout: common.Dropout = 0.2  # after each of CNN14's blocks (PANNs)
    # around CNN14's last layer and in the projections (PANNs, MS-CLAP)
    dropout: common.Dropout = 0.5
    # whole model that the teacher starts from: a run's teacher.pt or MS-CLAP 2022's file, with the
    # model's own settings; none: start from the two below
    weights: str = "none"
    audio_weights: str = "Cnn14_mAP=0.431.pth"  # the teacher's audio encoder: PANNs' file, or none
    # the teacher's text encoder, and the tokenizer of MS-CLAP's file: hub id or folder (Sec. 3.2:
    # BERT; D21), or none
    text_model: str = "bert-base-uncased"
    text_dim: common.Count = 768  # text encoder width, read only when --text-model none
    text_layers: common.Layers = 12  # text encoder layers, read only when --text-model none

    # loss
    temperature: common.Positive = 0.007  # initial tau (Sec. 3.2; D2)
    # SL: the student's targets are softened by the teacher (Sec. 2.3, Eq. 2-5)
    soft_labels: bool = True
    beta: common.Share = 0.3  # the teacher's share of the targets (Sec. 3.2)

    # optimisation
    teacher_epochs: common.Count = 20  # code (D7)
    student_epochs: common.Count = 20  # code (D7)
    # steps per epoch; 0: one pass over the pairs, for a student with replay over the replay pairs
    # (D7)
    epoch_steps: common.Whole = 0
    batch_size: common.Count = 128  # pairs over all processes (Sec. 3.2: 64 on each of 2 GPUs; D7)
    lr: common.Positive = 1e-4  # Adam's learning rate (code; D7)
    # ReduceLROnPlateau's patience in epochs, and the first epoch that it sees (code; D7)
    patience: common.Whole = 10
    clip: common.Positive = 5.0  # largest norm of the gradient (code; D7)
    replay: bool = True  # batches of annotated pairs between the curated ones (Sec. 3.2; D9)
    replay_prob: Annotated[float, "[0, 1)"] = 0.5  # probability of a replay batch (code; D9)

    def check(self):
        # every block of CNN14 but the last halves the spectrogram
        frames = int(self.window_s * SAMPLE_RATE) // self.hop + 1
        least = 2 ** (len(self.audio_channels) - 1)
        if min(frames, N_MELS) < least:
            raise ValueError(
                f"--window-s {self.window_s} --hop {self.hop}: {frames} spectrogram frames of "
                f"{N_MELS} mel bins; {len(self.audio_channels)} --audio-channels need at least "
                f"{least} of both"
            )
        if self.stage == "teacher" and self.teacher:
            raise ValueError(
                "--stage teacher trains a teacher: --weights is what it starts from; --teacher is "
                "for the other stages"
            )
        if self.curation == "none" and (self.stage == "curate" or self.dry_run):
            raise ValueError("--curation none: there is nothing to curate; choose du, ds or ads")
        if self.dry_run and self.stage not in ("all", "curate"):
            raise ValueError(f"--dry-run is for --stage curate, not {self.stage}")


# Random weights need a larger learning rate, less dropout and a higher temperature; coarser frames
# make a step affordable on a CPU. A small teacher's cosines have another scale (0.3 was a good
# threshold), so it curates by rank.
TINY = dict(
    audio_weights="none",
    text_model="none",
    audio_channels=[8, 16, 32, 64, 128],
    hop=1024,
    joint_dim=128,
    block_dropout=0.0,
    dropout=0.1,
    text_dim=128,
    text_layers=2,
    temperature=0.07,
    pool_share=0.5,
    top_k=2,
    ds_top_k=30,
    teacher_epochs=10,
    student_epochs=5,
    epoch_steps=30,
    batch_size=32,
    lr=1e-3,
    patience=2,
    save_steps=100,
    workers=1,
)
OFFICIAL = dict(temperature=0.07)  # D2
Config.presets = {("size", "tiny"): TINY, ("variant", "official"): OFFICIAL}
SAMPLE_RATE, N_FFT, N_MELS, FMIN_HZ, FMAX_HZ = 44100, 1024, 64, 50, 14000  # rate: Sec. 3.1; D21
MAX_TOKENS = 100  # code (D21)
PROMPT = "this is a sound of {}"  # Sec. 3.3; in curation D19
CURATION_S = 60.0  # D4
EMBED_BATCH = 32  # clips of a pool embedded at once
SAMPLE_CLIPS = 2000  # clips that a dry run embeds
METHOD = "curation_clap"

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU, then average pooling over squares of
    side `pool`.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x, pool: int):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, pool) if pool > 1 else x


class CNN14(nn.Module):
    """PANNs' CNN14 with its own log-mel: waveform (B, S) -> clip features (B, channels of the last
    block).

    Source: Kong et al., TASLP 2020. Names as in its files; the unused head of 527 AudioSet classes
    is kept so that these files load. The mel matrix is stored with the weights (D5).
    """

    def __init__(
        self,
        channels=(64, 128, 256, 512, 1024, 2048),
        hop: int = 320,
        block_dropout: float = 0.2,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.log_mel = common.LogMel(SAMPLE_RATE, N_FFT, hop, N_MELS, FMIN_HZ, FMAX_HZ)
        # D5: registered again, since common.LogMel keeps its buffers out of checkpoints
        self.log_mel.mel_scale.register_buffer("fb", self.log_mel.mel_scale.fb, persistent=True)
        self.block_dropout, self.dropout, self.out_dim = block_dropout, dropout, channels[-1]
        self.bn0 = nn.BatchNorm2d(N_MELS)
        self.blocks = [f"conv_block{i}" for i in range(1, len(channels) + 1)]
        for name, channels_in, out in zip(self.blocks, (1, *channels), channels):
            self.add_module(name, ConvBlock(channels_in, out))
        self.fc1 = nn.Linear(self.out_dim, self.out_dim)
        self.fc_audioset = nn.Linear(self.out_dim, 527)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.fc_audioset.requires_grad_(False)  # an unused layer would stop DDP

    def forward(self, waveform):
        x = self.log_mel(waveform)[:, None]  # (B, 1, T_mel, M)
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)  # batch norm of each mel bin, on axis 1
        for name in self.blocks:
            # the last block does not pool (PANNs)
            x = getattr(self, name)(x, pool=1 if name == self.blocks[-1] else 2)
            x = F.dropout(x, self.block_dropout, self.training)
        x = x.mean(3)  # over frequency: (B, C, T)
        # max plus mean over time (PANNs)
        x = F.dropout(x.amax(2) + x.mean(2), self.dropout, self.training)
        return F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)

    def mel_rate(self) -> str:
        """Whose mel matrix the stored one is, in words (D5)."""
        for rate in (SAMPLE_RATE, 32000):
            # the hop, here 320, does not change the matrix
            of_rate = common.LogMel(rate, N_FFT, 320, N_MELS, FMIN_HZ, FMAX_HZ).mel_scale.fb
            if (self.log_mel.mel_scale.fb.cpu() - of_rate).abs().max() < 1e-4 * of_rate.max():
                return f"that of {rate} Hz"
        return "of no known rate"


class Projection(nn.Module):
    """MS-CLAP's projection: a linear layer, plus GELU and a second one, then LayerNorm (D1)."""

    def __init__(self, dim_in: int, dim: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(dim_in, dim, bias=False)
        self.linear2 = nn.Linear(dim, dim, bias=False)
        self.layer_norm, self.dropout = nn.LayerNorm(dim), dropout

    def forward(self, x):
        x = self.linear1(x)
        return self.layer_norm(x + F.dropout(self.linear2(F.gelu(x)), self.dropout, self.training))


def repeat_to(waveform, length: int):
    """waveform (S,), S <= length -> (length,): repeated, the last repeat cut (D4)."""
    return waveform.repeat(math.ceil(length / len(waveform)))[:length]


def clean_caption(text: str) -> str:
    """Remove commas, links, dollar signs, asterisks and line breaks; underscores become spaces
    (D21).
    """
    cleaned = re.sub(r"<a\b.*?</a>|[,$*]", "", text, flags=re.S)
    cleaned = re.sub(r"[\s_]+", " ", cleaned).strip()
    # a caption of which no word is left stays as it was, since every text needs a token
    return cleaned if re.search(r"\w", cleaned) else text


class Model(nn.Module):
    """CNN14 and BERT's first token, each through a projection; one vector a clip and a caption.

    Args: text_encoder: a common.TextEncoder; audio: keyword arguments of CNN14; temperature: start
    of tau.
    """

    clean_caption = staticmethod(clean_caption)
    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        text_encoder: common.TextEncoder,
        audio: dict | None = None,
        joint_dim: int = 1024,
        window_s: float = 5.0,
        temperature: float = 0.007,
    ):
        super().__init__()
        audio = {"dropout": 0.5, **(audio or {})}
        # stored in checkpoints: what rebuilds the model together with the text encoder
        self.shape = {"audio": audio, "joint_dim": joint_dim, "window_s": window_s}
        self.window_s = window_s
        self.crop_rule = (
            f"repeated to {window_s:g} s; all consecutive windows, the last one repeated too, "
            "averaged by their seconds"
        )
        self.audio_encoder, self.text_encoder = CNN14(**audio), text_encoder
        self.audio_projection = Projection(self.audio_encoder.out_dim, joint_dim, audio["dropout"])
        self.text_projection = Projection(text_encoder.out_dim, joint_dim, audio["dropout"])
        # log(1 / tau), the factor on cosines
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def clip_embeds(self, waveform):
        """waveform (B, S) of one window -> (B, D), normalised."""
        return F.normalize(self.audio_projection(self.audio_encoder(waveform)).float(), dim=-1)

    def caption_embeds(self, input_ids, attention_mask):
        """Token ids (B, L) -> (B, D), normalised; BERT's first token (code; D21)."""
        return F.normalize(
            self.text_projection(self.text_encoder(input_ids, attention_mask)[:, 0]).float(), dim=-1
        )

    def forward(self, waveform, input_ids, attention_mask):
        """One training batch -> audio_embeds, text_embeds (B, D), scale."""
        audio_embeds = self.clip_embeds(waveform)
        return audio_embeds, self.caption_embeds(input_ids, attention_mask), self.log_scale.exp()

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at `sample_rate`, n_samples (B,) valid ones -> (B, D),
        normalised; never random (D4).
        """
        with common.evaluating(self):
            window = round(self.window_s * self.sample_rate)
            windows, owner, weight, lengths = common.cut_windows(waveform, n_samples, window)
            # repeats take the place of the zeros that cut_windows pads with (D4)
            windows = torch.stack(
                [repeat_to(piece[:n], window) for piece, n in zip(windows, lengths)]
            )
            # 32 windows at a time, so that long clips do not exhaust the memory
            return common.join_windows(
                torch.cat([self.clip_embeds(part) for part in windows.split(32)]), owner, weight
            )

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised."""
        with common.evaluating(self):
            tokens = common.to_device(self.text_encoder.tokenize(texts), self.log_scale.device)
            return self.caption_embeds(tokens["input_ids"], tokens["attention_mask"])

    @classmethod
    def from_checkpoint(cls, path):
        """A run's teacher.pt, last.pt or best.pt."""
        content = common.read_checkpoint(path, METHOD)
        with common.rebuilding(path, content):
            model = cls(
                common.text_encoder_from_description(content["text_encoder"], MAX_TOKENS),
                **content["shape"],
            )
        common.load_strict(model, content["model"], path)
        return model.eval()

    @classmethod
    def from_published(cls, source, text_model: str = "bert-base-uncased"):
        """MS-CLAP 2022's CLAP_weights_2022.pth, with `text_model`'s config and tokenizer."""
        weights = common.read_weights(source)
        weights = weights.get("model", weights)
        common.check_keys(source, weights, "audio_encoder.base.", "MS-CLAP 2022's file")
        model = cls(common.text_encoder_from_pretrained(text_model, MAX_TOKENS, weights=False))
        common.load_strict(model, published_state(weights), source)
        model.clean_caption = str  # Microsoft's wrapper tokenises captions as they are
        return model.eval()


def start_model(cfg: Config, captions: list[str]) -> Model:
    """The teacher that training starts from."""
    if cfg.weights != "none":
        return whole_model(cfg.weights, common.published_text_model(cfg))
    if cfg.audio_weights != "none":
        if not Path(cfg.audio_weights).is_file():
            raise FileNotFoundError(
                f"--audio-weights {cfg.audio_weights}: no such file; PANNs' Cnn14_mAP=0.431.pth is "
                "in its authors' Zenodo record 3987831, MS-CLAP 2022's CLAP_weights_2022.pth in "
                "record 7312125 (or give none)"
            )
    text_encoder = common.start_text_encoder(cfg, captions, MAX_TOKENS)
    audio = dict(
        channels=cfg.audio_channels,
        hop=cfg.hop,
        block_dropout=cfg.block_dropout,
        dropout=cfg.dropout,
    )
    model = Model(text_encoder, audio, cfg.joint_dim, cfg.window_s, cfg.temperature)
    if cfg.text_model == "none":
        with torch.no_grad():
            for module in text_encoder.model.modules():
                if isinstance(module, nn.Linear):  # D14: from deviation 0.02 to 1 / sqrt(width)
                    module.weight *= 1 / math.sqrt(module.in_features) / 0.02
    if cfg.audio_weights != "none":
        weights = common.read_encoder_weights(cfg.audio_weights)
        state = published_state(weights.get("model", weights))
        common.load_strict(model.audio_encoder, state, cfg.audio_weights)
    return model


def load_teacher(cfg: Config, folder: Path) -> tuple[Model, Path]:
    """--teacher, or the teacher.pt of the run in `folder`."""
    path = Path(cfg.teacher) if cfg.teacher else folder / "teacher.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such teacher; run --stage teacher --name {cfg.name or 'NAME'} first, or "
            "give --teacher (a run's teacher.pt, or MS-CLAP 2022's file)"
        )
    return whole_model(path, common.published_text_model(cfg)), path


def whole_model(path, text_model: str) -> Model:
    """A run's checkpoint, or MS-CLAP 2022's file with `text_model`'s config and tokenizer."""
    if "method" in common.read_weights(path):
        return Model.from_checkpoint(path)
    return Model.from_published(path, text_model)


# ------------------------------------------------------------------------------------------------
# Loss: embeds (B, D) normalised, of all processes; sim (B, B) cosine, audio in rows
# ------------------------------------------------------------------------------------------------


def contrastive_loss(logits):
    """logits (B, B); mean over both directions of the cross-entropy of the right partner (D15)."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2  # Eq. (1)


def soft_targets(teacher_audio, teacher_text, beta: float):
    """The teacher's embeds (B, D), length 1, of the same batch -> targets of the rows (a2t) and of
    the columns (t2a), each (B, B), >= 0.

    For clip i, caption j is right to the degree that the teacher finds clips i and j similar; for
    caption i, clip j is right to the degree that it finds captions i and j similar.
    """
    hard = torch.eye(len(teacher_audio), device=teacher_audio.device)
    # Eq. (2): C_a and C_t, cosines (D16)
    clip_sim, caption_sim = teacher_audio @ teacher_audio.T, teacher_text @ teacher_text.T
    target_a2t = (1 - beta) * hard + beta * clip_sim  # Eq. (3)
    target_t2a = (1 - beta) * hard + beta * caption_sim  # Eq. (4)
    return target_a2t.clamp(min=0), target_t2a.clamp(min=0)  # D6


def soft_divergence(logits, target):
    """logits, target (B, B), queries in rows: the mean over rows of sum target * (log target - log
    softmax), with 0 log 0 = 0.

    Source: L_t with clips in rows and their targets a2t, L_a with captions in rows and theirs t2a.
    """
    # xlogy is 0 at a target of 0 (D6), where target * target.log() would be NaN
    return (torch.xlogy(target, target) - target * logits.log_softmax(1)).sum(1).mean()  # Eq. (5)


def soft_labelled_loss(logits, target_a2t, target_t2a):
    """Rows of logits are clips and are compared with the clips' targets, columns are captions and
    are compared with the captions' targets.

    logits (B, B) are cosines / tau; targets (B, B) from `soft_targets`. Source: Sec. 2.3, the
    unnumbered mean of L_t and L_a. Copied alone, needs soft_divergence.
    """
    return (soft_divergence(logits, target_a2t) + soft_divergence(logits.T, target_t2a)) / 2


def training_loss(cfg: Config, audio_embeds, text_embeds, scale, of_teacher=None):
    """Embeds (B, D) of Model.forward and the teacher's (or None), both of all processes -> loss,
    sim (B, B).
    """
    sim = audio_embeds @ text_embeds.T  # (B, B); of embeds of length 1 (D16)
    logits = sim * scale
    if cfg.variant == "official":
        logits = logits.clamp(max=100)  # D2
    if of_teacher is None:
        return contrastive_loss(logits), sim.detach()
    return soft_labelled_loss(logits, *soft_targets(*of_teacher, cfg.beta)), sim.detach()


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def read_corpus(cfg: Config) -> dict:
    """-> annotated rows (train, val) and the pool's items."""
    # validation clips first: neither the pool nor --teacher-fraction may change them
    train_rows, val_rows = common.split_train_val(common.read_manifest(cfg.data), cfg.seed)
    pool = cfg.pool
    if not pool and cfg.pool_share:
        # 1 here, 2 to 4 below: independent draws
        train_rows, forgotten = split_clips(train_rows, 1 - cfg.pool_share, (cfg.seed, 1))
        pool = [forgotten]  # its captions are not read (`pool_clips`)
    train_rows, _ = split_clips(train_rows, cfg.teacher_fraction, (cfg.seed, 2))
    common.require(train_rows + val_rows, "captions")
    return {"train": train_rows, "val": val_rows, "pool": pool}


def split_clips(rows: list[dict], share: float, seed: tuple) -> tuple[list[dict], list[dict]]:
    """Rows of a random share of the clips, and the others, in their order (D11)."""
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = {*order[: max(1, round(share * len(rows)))].tolist()}
    others = [row for i, row in enumerate(rows) if i not in chosen]
    return [row for i, row in enumerate(rows) if i in chosen], others


class Centre:
    """Takes the place of a random generator where the middle crop is wanted."""

    @staticmethod
    def integers(low: int, high: int) -> int:
        return (low + high - 1) // 2


class Pairs(Dataset):
    """The (clip, caption) pairs of one or two sets. An item's key is (set, epoch, index), which
    seeds the crop; its last entry is the file's name (common.Readable).
    """

    def __init__(
        self, sets: list[list[dict]], cfg: Config, tokenize, window_s: float, centre: bool = False
    ):
        self.sets = [[(row, text) for row in rows for text in row["captions"]] for rows in sets]
        self.cfg, self.tokenize, self.window_s, self.centre = cfg, tokenize, window_s, centre

    def __getitem__(self, key):
        group, epoch, index = key
        row, caption = self.sets[group][index]
        rng = Centre if self.centre else np.random.default_rng((self.cfg.seed, *key))
        waveform = common.read_audio(
            row["audio"], SAMPLE_RATE, self.window_s, rng, expected_s=row.get("duration")
        )
        free = round(self.window_s * SAMPLE_RATE) - len(waveform)
        before = int(rng.integers(0, free + 1)) if self.cfg.variant == "official" else 0  # D3
        waveform = np.pad(waveform, (before, free - before))
        return waveform, clean_caption(caption), row["audio"]

    def collate(self, items) -> dict:
        """-> what Model.forward takes."""
        waveforms, captions, _ = zip(*items)
        tokens = self.tokenize(list(captions))
        return {
            "waveform": default_collate([torch.from_numpy(w) for w in waveforms]),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


def mixed_batches(
    sizes: list[int], batch_size: int, replay_prob: float, seed: int, start: int, total_steps: int
):
    """Yield this process's share of every batch as [(set, epoch, index), ...]; all of a batch comes
    from one set (D9).

    With two sets, a batch comes from the first with probability replay_prob. Each epoch of a set
    has a new random order; pairs that do not fill a batch are left out of that epoch.
    """
    rank, world = common.rank_and_world()
    # the set of every step, drawn for all steps at once, so that a resumed run draws the same
    chosen = np.zeros(total_steps, int)
    if len(sizes) > 1:
        draws = np.random.default_rng((seed, 3)).random(total_steps)
        chosen = (draws >= replay_prob).astype(int)
    orders = {}  # set -> epoch, order
    for step in range(start, total_steps):
        group = int(chosen[step])
        count = min(batch_size, sizes[group])
        # the number of earlier batches of this set gives its epoch and the place within it
        epoch, place = divmod(int((chosen[:step] == group).sum()), sizes[group] // count)
        if group not in orders or orders[group][0] != epoch:
            rng = np.random.default_rng((seed, 4, group, epoch))
            orders[group] = epoch, rng.permutation(sizes[group])
        batch = orders[group][1][place * count : (place + 1) * count].tolist()
        yield [(group, epoch, i) for i in batch][rank::world]


# ------------------------------------------------------------------------------------------------
# Curation: similar pairs of N clips and Q captions
# ------------------------------------------------------------------------------------------------


def half(embeds: np.ndarray) -> np.ndarray:
    """Embeddings (n, D) of length 1 as fp16, half the memory (D10)."""
    if not np.isfinite(embeds).all():
        raise FloatingPointError("some embeddings are NaN or infinite; the teacher is broken")
    return embeds.astype(np.float16)


def similar_pairs(embeds, text_embeds, threshold: float, top_k: int = 0, device="cpu"):
    """Every pair of a row of embeds (n, D) and a caption of text_embeds (Q, D) whose cosine is at
    least `threshold`, or each row's top_k captions. Both numpy fp16, of length 1.

    -> i (row), q (caption) (P,) int, cosine (P,) fp32; by row, the most similar caption first.
    Source: Sec. 2.2.
    """
    text = torch.from_numpy(text_embeds).to(device).float().T  # (D, Q)
    # rows whose cosines are in memory at a time: few enough for a CPU's caches
    n_rows = max(1, (2**28 if text.is_cuda else 2**22) // len(text_embeds))
    found = []
    for start in range(0, max(1, len(embeds)), n_rows):  # one empty part if there are no rows
        part = torch.from_numpy(embeds[start : start + n_rows]).to(device).float()
        sim = part @ text  # (rows, Q)
        if top_k:
            cosine, q = sim.topk(min(top_k, len(text_embeds)))  # (rows, top_k)
            i = torch.arange(len(sim), device=device)[:, None].expand_as(q)
        else:
            i, q = (sim >= threshold).nonzero(as_tuple=True)
            cosine = sim[i, q]
        found.append([x.flatten().cpu().numpy() for x in (i + start, q, cosine)])
    i, q, cosine = (np.concatenate(x) for x in zip(*found))
    # equal cosines in the order of the captions, so that devices and block sizes agree; which of
    # equal captions top_k keeps is torch's choice
    order = np.lexsort((q, -cosine, i))
    return i[order], q[order], cosine[order]


def pool_blocks(pool: list, size: int):
    """Yield the pool's clips in blocks of at most `size`; only one block is in memory at a time."""
    for item in pool:
        clips = pool_clips(item)
        while block := list(itertools.islice(clips, size)):
            yield block


def pool_clips(item):
    """Audio and duration of a manifest's training rows (or of given rows), one a clip."""
    last = None  # only adjacent rows of a clip are merged: a pool's names may not fit into memory
    for row in item if isinstance(item, list) else common.iter_manifest([item]):
        if row.get("split", "train") == "train" and row["audio"] != last:
            last = row["audio"]
            yield {key: row[key] for key in ("audio", "duration") if key in row}


def embed_block(model: Model, rows: list[dict], cfg: Config, run: common.Run, desc: str):
    """-> indices into rows of the clips that can be read, embeds (n, D) fp16, error texts."""
    kept, embeds, _, bad = common.embed_files(
        model,
        rows,
        EMBED_BATCH,
        cfg.workers,
        CURATION_S,  # D4
        desc=desc,
        quiet=run.rank > 0,
        autocast=run.autocast,  # D12
        none_is_fine=True,  # --max-bad decides, over the whole pool
    )
    if not kept:
        embeds = np.zeros((0, model.shape["joint_dim"]))
    return np.array(kept, int), half(embeds), bad


def stored_block(model: Model, rows, cfg: Config, run: common.Run, teacher_key: str, number: int):
    """embed_block with its result kept in runs/embeds, under a key of the teacher and of every
    file's size and time, so that later and resumed curations do not embed the block again.
    """
    # precision and device change embeddings; the key of a missing file is empty
    files = [[row["audio"], common.file_key(row)] for row in rows]
    told = [teacher_key, cfg.precision, run.device.type, files]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    path = Path(cfg.runs) / "embeds" / f"{key}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        kept, embeds, bad = embed_block(model, rows, cfg, run, f"embedding block {number}")
        # runs/embeds is shared: another curation may write the same block at the same time
        with common.written_whole(path, f"_{run.rank}_{os.getpid()}") as file:
            np.savez(file, kept=kept, embeds=embeds, bad=np.array(bad, dtype=str))
    with np.load(path, allow_pickle=False) as held:
        return [rows[i] for i in held["kept"]], held["embeds"], held["bad"].tolist()


def read_captions(train_rows: list[dict], model: Model):
    """-> unique captions (D18), for each the clips that it describes, embeds (Q, D) fp16."""
    described = {}  # caption -> clips
    for row in train_rows:
        clip = {key: row[key] for key in ("audio", "duration") if key in row}
        for caption in row["captions"]:
            described.setdefault(clean_caption(caption), []).append(clip)
    captions = list(described)
    return captions, list(described.values()), half(common.embed_texts(model, captions))


def read_labels(cfg: Config, rows: list[dict]) -> list[str]:
    """The domain's classes, written as in the prompt (D19)."""
    classes = []
    for item in cfg.labels:
        if not str(item).endswith(".txt"):
            classes += common.read_classes([item], common.read_manifest([item]))
            continue
        if not Path(item).is_file():
            raise FileNotFoundError(
                f"--labels {item}: no such file; expected one class a line, or a manifest"
            )
        classes += common.read_lines(item)
    if not cfg.labels:
        classes = common.read_classes(cfg.data, rows)
    if not classes:
        raise ValueError(
            f"--curation {cfg.curation} looks for captions near the domain's classes, and there "
            "are none; give --labels (a classes.txt or a manifest with labels), or --curation du"
        )
    return [re.sub(r"[_/]", " ", name).lower() for name in dict.fromkeys(classes)]


def near_labels(prompt_embeds, text_embeds, threshold: float, top_k: int):
    """Captions near the domain (Sec. 2.2.2) -> their numbers in ascending order, and the largest
    cosine of each to a class prompt that chose it. Copied alone, needs similar_pairs.
    """
    _, q, cosine = similar_pairs(prompt_embeds, text_embeds, threshold, top_k)
    nearness = np.full(len(text_embeds), -np.inf, np.float32)
    np.maximum.at(nearness, q, cosine)
    chosen = np.unique(q)
    return chosen, nearness[chosen]


def count_pool(cfg: Config, corpus: dict) -> int:
    """Clips in the pool; 0 for DS, which needs none."""
    if cfg.curation == "ds":
        return 0
    if not corpus["pool"]:
        raise ValueError(
            f"--curation {cfg.curation} pairs captions with unlabelled audio; give --pool "
            "(manifests)"
        )
    n_pool = sum(1 for item in corpus["pool"] for _ in pool_clips(item))
    if not n_pool:
        raise ValueError(
            "the pool (--pool, or --pool-share of --data) has no training row; rows of split val "
            "and test are never curated"
        )
    return n_pool


def curate(cfg: Config, run: common.Run, corpus: dict, n_pool: int, prompts: list[str]) -> dict:
    """Stage 2 -> runs/NAME/du.jsonl, ds.jsonl or ads.jsonl (and ads_replay.jsonl, the pairs of
    DS), or the report of a dry run.

    DU (Sec. 2.2.1): all captions, with the audio of the pool. DS (Sec. 2.2.2): the captions near a
    class prompt of the domain, with their own audio. ADS: these captions, with the pool's audio.
    """
    model, teacher_path = load_teacher(cfg, run.path)
    model.to(run.device)
    # with a log, the folder is that of the teacher or of an earlier curation, and is continued
    run.open_folder(n_pool, (run.path / "log.jsonl").exists())
    run.say(
        f"{METHOD}, curation {cfg.curation}: teacher {teacher_path}, mel matrix "
        f"{model.audio_encoder.mel_rate()}"
    )
    captions, described, text_embeds = read_captions(corpus["train"], model)
    if cfg.curation != "du":
        prompt_embeds = half(common.embed_texts(model, prompts))
        if cfg.dry_run and run.rank == 0:
            report_domain(prompts, captions, prompt_embeds, text_embeds)
        chosen, nearness = near_labels(prompt_embeds, text_embeds, cfg.ds_threshold, cfg.ds_top_k)
        if not len(chosen) and not cfg.dry_run:
            nearest = similar_pairs(prompt_embeds, text_embeds, 0.0, top_k=1)[2].max()
            raise ValueError(
                f"--ds-threshold {cfg.ds_threshold}: no caption is that near to a class prompt "
                f"(the nearest: {nearest:.3f}); choose a lower one with --dry-run"
            )
        rule = f"top-k {cfg.ds_top_k}" if cfg.ds_top_k else f"threshold {cfg.ds_threshold}"
        run.say(
            f"{len(chosen):,} of {len(captions):,} captions lie near one of {len(prompts)} classes "
            f"(--ds-{rule})"
        )
        described = [described[q] for q in chosen]
        captions, text_embeds = [captions[q] for q in chosen], text_embeds[chosen]
    if cfg.dry_run:
        if cfg.curation != "ds" and captions and run.rank == 0:
            report_pool(cfg, run, model, corpus["pool"], n_pool, captions, text_embeds)
        common.barrier()
        return {}
    if cfg.curation != "du" and run.rank == 0:
        path = run.path / ("ds.jsonl" if cfg.curation == "ds" else "ads_replay.jsonl")
        told = zip(captions, described, nearness.tolist())
        pairs = [(clip, caption, value) for caption, clips, value in told for clip in clips]
        write_pairs(path, pairs)
        run.say(
            f"DS: {len(pairs):,} pairs of {len({c['audio'] for c, *_ in pairs}):,} clips in {path}"
        )
    if cfg.curation != "ds":
        # DU: Sec. 2.2.1, all captions; ADS: Sec. 2.2.2, those near the domain
        teacher_key = common.file_key({"audio": str(teacher_path)})
        mine(cfg, run, model, teacher_key, corpus["pool"], n_pool, captions, text_embeds)
    common.barrier()
    return {"curated": str(run.path / f"{cfg.curation}.jsonl")}


def write_pairs(path: Path, pairs) -> None:
    """pairs (clip's row, caption, cosine) -> a manifest, one line a clip."""
    lines = {}
    for row, caption, cosine in pairs:
        # absolute: a relative path would start at the run's folder
        line = {**row, "audio": os.path.abspath(row["audio"]), "captions": [], "similarity": []}
        line = lines.setdefault(row["audio"], line)
        line["captions"].append(caption)
        line["similarity"].append(round(cosine, 4))
    common.write_lines(path, [json.dumps(line, ensure_ascii=False) for line in lines.values()])


def mine(
    cfg: Config, run: common.Run, model: Model, teacher_key: str, pool, n_pool: int, captions, text
) -> None:
    """Pair the pool's audio with captions (Q,), their embeds text (Q, D) fp16 -> runs/NAME/du.jsonl
    or ads.jsonl, one line a clip.

    The processes take blocks in turn: memory depends on the captions and one block. teacher_key: of
    its file.
    """
    folder = run.path / "curation"
    folder.mkdir(exist_ok=True)
    bar = tqdm(total=n_pool, unit="clip", desc="curating", disable=run.rank > 0, dynamic_ncols=True)
    bad, number = [], -1
    for number, block in enumerate(pool_blocks(pool, cfg.block)):
        if number % run.world == run.rank:
            rows, embeds, errors = stored_block(model, block, cfg, run, teacher_key, number)
            found = similar_pairs(embeds, text, cfg.threshold, cfg.top_k, run.device)
            pairs = zip(*(x.tolist() for x in found))
            write_pairs(
                folder / f"{number:06d}.jsonl", [(rows[i], captions[q], c) for i, q, c in pairs]
            )
            bad += errors
        bar.update(len(block))
        # a collective call: made only when every process has had a block
        if number % run.world == run.world - 1:
            run.settle_skipped(bad)
            bad = []
            own = cfg.stage == "all" and not cfg.teacher  # --resume knows only a training's stage
            saved = f"the embeddings of {number + 1} blocks"
            run.end_if_told(saved, "" if own else "the same call again")
    bar.close()
    run.settle_skipped(bad)
    common.barrier()
    if run.rank > 0:
        return
    n_clips, n_pairs, manifest = 0, 0, run.path / f"{cfg.curation}.jsonl"
    with common.written_whole(manifest) as whole:
        for i in range(number + 1):  # files of later numbers are left over from a longer pool
            for line in (folder / f"{i:06d}.jsonl").read_bytes().splitlines(keepends=True):
                whole.write(line)
                n_clips, n_pairs = n_clips + 1, n_pairs + len(json.loads(line)["captions"])
    if not n_pairs:
        manifest.unlink()
        raise ValueError(
            f"--threshold {cfg.threshold}: no clip of the pool is that close to any of "
            f"{len(captions)} captions; choose a lower one with --dry-run, or give --top-k"
        )
    counts = {"captions": len(captions), "pool": n_pool, "clips": n_clips, "pairs": n_pairs}
    run.log({"stage": "curate", "step": 0, **counts, "skipped": len(run.skipped)})
    rule = f"top-k {cfg.top_k}" if cfg.top_k else f"threshold {cfg.threshold}"
    run.say(
        f"{cfg.curation.upper()}: {n_pairs:,} pairs of {n_clips:,} of {n_pool:,} clips (--{rule}) "
        f"in {manifest}"
    )


# Thresholds whose yields a dry run reports
LEVELS = np.round(np.arange(-0.2, 1.0, 0.05), 2) + 0.0  # + 0.0: not -0.00


def report_domain(prompts, captions, prompt_embeds, text_embeds) -> None:
    """Print how many captions every --ds-threshold would leave, and examples."""
    sim = text_embeds.astype(np.float32) @ prompt_embeds.astype(np.float32).T  # (Q, C)
    nearest = sim.max(1)
    print(f"\nCaptions by their nearest of {len(prompts)} class prompts (--ds-threshold):")
    for level in LEVELS:
        at = np.flatnonzero((nearest >= level) & (nearest < level + 0.05))[:2]
        examples = "".join(
            f"   {captions[q]!r} ({nearest[q]:.2f}, {prompts[sim[q].argmax()]!r})" for q in at
        )
        print(f"  >= {level:.2f}: {(nearest >= level).sum():>9,} captions{examples}")


def report_pool(cfg: Config, run, model, pool, n_pool: int, captions, text_embeds) -> None:
    """Print what every --threshold would give, from a sample of clips, and examples."""
    rng = np.random.default_rng(cfg.seed)
    wanted = set(rng.permutation(n_pool)[:SAMPLE_CLIPS].tolist())
    clips = itertools.chain.from_iterable(map(pool_clips, pool))
    sample = [clip for i, clip in enumerate(clips) if i in wanted]
    kept, embeds, bad = embed_block(model, sample, cfg, run, "embedding a sample")
    if bad:
        print(f"{len(bad)} clips of the sample cannot be used; first: {bad[0]}")
    if not len(kept):
        raise ValueError("no clip of the pool's sample can be read, so there is nothing to compare")
    columns = text_embeds.astype(np.float32).T  # (D, Q)
    pairs, clips, examples = 0, 0, {level: [] for level in LEVELS}
    for i in tqdm(rng.permutation(len(embeds)), desc="similarities", unit="clip", leave=False):
        sim = embeds[i].astype(np.float32) @ columns  # (Q,), one clip at a time: bounded memory
        above = (sim >= LEVELS[:, None]).sum(1)  # captions at or above each level
        pairs, clips = pairs + above, clips + (above > 0)
        for level in LEVELS:
            near = np.flatnonzero((sim >= level) & (sim < level + 0.05))
            if len(near) and len(examples[level]) < 2:
                q, name = rng.choice(near), Path(sample[kept[i]]["audio"]).name
                examples[level].append(f"{name}: {captions[q]!r} ({sim[q]:.2f})")
    share = n_pool / len(embeds)  # scales the sample's counts to the whole pool
    print(
        f"\nCosines of {len(embeds):,} of {n_pool:,} clips of the pool with {len(captions):,} "
        f"captions; pairs and clips of the whole pool{'' if share == 1 else ', estimated'}:\n"
        f"  {'threshold':>9} {'pairs':>14} {'clips':>12} {'captions a clip':>16}"
    )
    for level, n_pairs, n_clips in zip(LEVELS, pairs, clips):
        if n_pairs:
            print(
                f"  {level:>9.2f} {round(n_pairs * share):>14,} {round(n_clips * share):>12,} "
                f"{n_pairs / n_clips:>16.1f}   {'   '.join(examples[level])}"
            )


# ------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------


def validate(model: Model, rows: list[dict], quiet=True) -> tuple[dict, dict]:
    """Retrieval among whole validation clips -> scores, chance levels."""
    rows, audio_embeds, _ = common.embed_validation(model, rows, quiet=quiet)
    # the model's own rule, as in eval.py: a model from MS-CLAP's file takes captions as they are
    captions = [[model.clean_caption(text) for text in row["captions"]] for row in rows]
    return common.caption_retrieval(model, audio_embeds, None, captions)[:2]


def embeds_of(model, parts: list[dict], autocast) -> list:
    """Audio and text embeds (B, D) of a batch in parts, in this process, without a graph."""
    with torch.no_grad(), autocast:
        embeds = [model(**part)[:2] for part in parts]
    return [torch.cat(column) for column in zip(*embeds)]


def teacher_embeds_of(teacher, parts: list[dict], autocast):
    """The teacher's embeds of the whole batch, over all processes, without dropout; None without a
    teacher.
    """
    if teacher is None:
        return None
    return [common.gather_with_grad(embeds) for embeds in embeds_of(teacher, parts, autocast)]


@torch.no_grad()
def validation_loss(cfg: Config, run, model: Model, teacher, dataset: Pairs) -> tuple[float, float]:
    """Mean of the stage's loss over full batches of validation pairs (D8), and the mean loss that
    equal cosines would give.

    Computed by one process alone, however many there are. With hard targets equal cosines give ln
    B, with soft ones another value, which depends on the teacher's cosines (D6).
    """
    n = len(dataset.sets[0])
    # in the manifest's order, the captions of a clip would be each other's negatives
    order = np.random.default_rng(0).permutation(n).tolist()
    # full batches only: the loss grows with the number of pairs it is computed over
    size = min(cfg.batch_size, n)
    batches = [
        [(0, 0, i) for i in order[start : start + size]] for start in range(0, n - size + 1, size)
    ]
    total, chance, count = 0.0, 0.0, 0
    with common.evaluating(model):
        for parts, names, _ in run.load(dataset, batches):
            if len(names) < 2:  # the loss of a single pair is 0
                continue
            embeds = embeds_of(model, parts, run.autocast)
            of_teacher = embeds_of(teacher, parts, run.autocast) if teacher else None
            loss, _ = training_loss(cfg, *embeds, model.log_scale.exp(), of_teacher)
            of_equal, _ = training_loss(cfg, *embeds, 0.0, of_teacher)  # all logits are 0
            total += loss.item() * len(names)
            chance += of_equal.item() * len(names)
            count += len(names)
    if not count:
        raise ValueError("no batch of two or more validation pairs can be read")
    return total / count, chance / count


def train(
    cfg: Config,
    run: common.Run,
    stage: str,
    model: Model,
    teacher,
    sets: list[list[dict]],
    corpus: dict,
    checkpoint: dict | None,
) -> dict:
    """Train stage 1 or 3 -> runs/NAME/last.pt, and the best model by validation loss as teacher.pt
    or best.pt; returns its scores on the validation split.

    sets: rows of the pairs to learn from; if there are two sets, the first is the replay.
    """
    if sum(len(row["captions"]) for row in corpus["val"]) == 1:
        raise ValueError("the validation split has one pair; its loss needs two")
    sizes = [sum(len(row["captions"]) for row in rows) for rows in sets]
    common.check_batch(cfg, min(cfg.batch_size, *sizes), min(sizes), "pair")
    model.to(run.device)
    pairs = Pairs(sets, cfg, model.text_encoder.tokenize, model.window_s)
    held_out = Pairs([corpus["val"]], cfg, model.text_encoder.tokenize, model.window_s, centre=True)
    # the smaller of two sets may not fill a batch
    batch_sizes = list(dict.fromkeys(min(cfg.batch_size, size) for size in sizes))
    epochs = cfg.teacher_epochs if stage == "teacher" else cfg.student_epochs
    # one pass over the pairs, of the replay if there is one (D7)
    epoch_steps = cfg.epoch_steps or sizes[0] // batch_sizes[0]
    steps = epochs * epoch_steps
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=cfg.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(  # D7
        optimiser, factor=0.1, patience=cfg.patience, min_lr=1e-8
    )
    forward = run.begin(
        model,
        optimiser,
        steps,
        len({row["audio"] for rows in sets for row in rows}),
        f"{' + '.join(f'{n:,}' for n in sizes)} "
        f"pairs{' (replay + curated)' if len(sizes) > 1 else ''}, {len(corpus['val'])} clips for "
        f"validation; mel matrix {model.audio_encoder.mel_rate()}; {epochs} epochs of "
        f"{epoch_steps} steps; batches of {' or '.join(map(str, batch_sizes))}, ln B = "
        f"{' or '.join(f'{math.log(n):.2f}' for n in batch_sizes)}",
        checkpoint,
        stage=stage,
        shape=model.shape,
        scheduler=scheduler,
        continues=stage == "student" and (run.path / "log.jsonl").exists(),
    )
    if stage == "teacher":
        captions = [text for row in corpus["train"] for text in row["captions"]]
        common.say_if_few(run, "--teacher-epochs", epochs, steps, captions)
        if cfg.weights != "none" and corpus["val"] and run.rank == 0 and not checkpoint:
            run.log_scores(validate(model, corpus["val"])[0])  # scores before any fine-tuning
    best_file = "teacher.pt" if stage == "teacher" else "best.pt"
    sampler = mixed_batches(sizes, cfg.batch_size, cfg.replay_prob, cfg.seed, run.step, steps)

    def loss_of(audio_embeds, text_embeds, scale):
        # the similarities are between the pairs of all processes (D7)
        embeds = [common.gather_with_grad(x) for x in (audio_embeds, text_embeds)]
        # of_teacher: the teacher's embeds of the loop's current batch
        return training_loss(cfg, *embeds, scale, of_teacher)

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(pairs, sampler):
        of_teacher = teacher_embeds_of(teacher, parts, run.autocast)

        optimiser.zero_grad(set_to_none=True)
        loss, sim = common.cached_backward(  # D12, D13
            forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
        )
        nn.utils.clip_grad_norm_(parameters, cfg.clip)
        optimiser.step()

        run.step_done(loss, sim, scale=model.log_scale.exp())
        if run.is_due(epoch_steps):
            value = [0.0]
            if run.rank == 0 and corpus["val"]:
                value = [validation_loss(cfg, run, model, teacher, held_out)[0]]
            if dist.is_initialized():
                dist.broadcast_object_list(value)  # all processes need the same learning rate
            # D7: epochs before epoch `patience` do not count
            if corpus["val"] and run.step >= cfg.patience * epoch_steps:
                scheduler.step(value[0])
            # D8; without validation clips the last epoch is the best
            score = -value[0] if corpus["val"] else run.step
            run.keep_best(score, {"val_loss": value[0]} if corpus["val"] else {}, best_file)
        run.save_if_due()

    # Result: the best checkpoint on the validation split
    if run.rank > 0 or not corpus["val"]:
        return {}
    model = Model.from_checkpoint(run.path / best_file).to(run.device)
    scores, chance = validate(model, corpus["val"], quiet=False)
    scores["val_loss"] = -run.best["score"]
    chance["val_loss"] = validation_loss(cfg, run, model, teacher, held_out)[1]
    return run.finish(scores, chance, len(corpus["val"]))


def student_sets(cfg: Config, folder: Path, corpus: dict) -> list[list[dict]]:
    """What the student learns from: the replay first, where there is one (D9)."""
    if cfg.curation == "none":
        return [corpus["train"]]
    names = [f"{cfg.curation}.jsonl"]
    if cfg.curation == "ads" and cfg.replay:
        names = ["ads_replay.jsonl", *names]
    sets = [corpus["train"]] if cfg.curation == "du" and cfg.replay else []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such manifest; run --stage curate --curation {cfg.curation} "
                f"--name {cfg.name or 'NAME'} first"
            )
        sets.append(common.read_manifest([str(folder / name)]))
        common.require(sets[-1], "captions")
    return sets


def main(cfg: Config) -> dict:
    """Train -> best_step, n_clips, scores and chance of the best checkpoint on the validation
    split, as in eval.json; {} without that split and after a dry run. Stage curate -> {"curated":
    path}.
    """
    run = common.Run(cfg, METHOD)
    checkpoint = run.checkpoint()
    in_student = checkpoint is not None and checkpoint["stage"] == "student"
    curates = cfg.stage in ("all", "curate") and cfg.curation != "none" and not in_student
    dry = curates and cfg.dry_run
    # a student may follow a teacher in its folder, so only an earlier student is refused here
    if not cfg.resume and cfg.name and cfg.stage != "teacher" and not dry:
        last = run.path / "last.pt"
        if last.exists() and common.read_checkpoint(last, METHOD)["stage"] == "student":
            raise FileExistsError(
                f"{run.path} already holds a run; continue it with --resume or choose another "
                "--name"
            )
    corpus, result = read_corpus(cfg), {}
    if curates:  # missing input is reported now, not after the teacher's training
        n_pool, prompts = count_pool(cfg, corpus), []
        if cfg.curation != "du":
            prompts = [PROMPT.format(name) for name in read_labels(cfg, corpus["train"])]

    trains_teacher = cfg.stage == "teacher" or (cfg.stage == "all" and not cfg.teacher)
    if trains_teacher and not in_student:
        torch.manual_seed(cfg.seed)
        if cfg.resume:
            model = Model.from_checkpoint(run.path / "last.pt")
        else:
            captions = [clean_caption(text) for row in corpus["train"] for text in row["captions"]]
            model = start_model(cfg, captions)
            if cfg.weights != "none":
                run.starts_from()
        result = train(cfg, run, "teacher", model, None, [corpus["train"]], corpus, checkpoint)
    if curates:
        result = curate(cfg, run, corpus, n_pool, prompts) or result
        if dry:
            return {}
    if cfg.stage in ("all", "student"):
        teacher = None
        if cfg.soft_labels:
            teacher = load_teacher(cfg, run.path)[0].to(run.device).requires_grad_(False)
        if in_student:
            model = Model.from_checkpoint(run.path / "last.pt")
        else:
            model = load_teacher(cfg, run.path)[0]  # D20
        sets = student_sets(cfg, run.path, corpus)
        of_student = checkpoint if in_student else None
        result = train(cfg, run, "student", model, teacher, sets, corpus, of_student)
    # the command printed next curates, also after a stage that was given no pool
    no_pool = cfg.curation in ("du", "ads") and not cfg.pool and not cfg.pool_share
    pool = ["POOL"] if no_pool else cfg.pool
    if cfg.stage == "teacher":
        flags = common.flags_of(cfg, name=run.name, stage="curate", dry_run=True, pool=pool)
        run.say(f"\nNext:\n  python curation_clap.py {flags}     (to choose a threshold)")
    elif cfg.stage == "curate":
        flags = common.flags_of(cfg, name=run.name, stage="student")
        run.say(f"\nNext:\n  python curation_clap.py {flags}")
    else:
        teacher_file = cfg.teacher or str(run.path / "teacher.pt")
        other = dict(stage="all", teacher=teacher_file, soft_labels=not cfg.soft_labels, pool=pool)
        how = "hard" if cfg.soft_labels else "soft"
        run.say_next(f"a student with {how} labels", "--prompt curation_clap", **other)
    return result


# ------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------


def published_state(weights: dict) -> dict:
    """PANNs' and MS-CLAP 2022's names -> ours. Unknown names stay, so that strict loading lists
    them.
    """
    # our front end computes the Fourier matrices; the first token is taken before BERT's pooler
    unused = re.compile(
        r"spectrogram_extractor\.|caption_encoder\.base\.(pooler\.|embeddings\.position_ids$)"
    )
    state = {}
    for key, value in weights.items():
        if unused.search(key):
            continue
        for theirs, ours in (
            ("logmel_extractor.melW", "log_mel.mel_scale.fb"),
            ("audio_encoder.base.", "audio_encoder."),
            ("audio_encoder.projection.", "audio_projection."),
            ("caption_encoder.projection.", "text_projection."),
            ("caption_encoder.base.", "text_encoder.model."),
            ("logit_scale", "log_scale"),
        ):
            key = key.replace(theirs, ours)
        state[key] = value
    return state


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    common.run_entry(main, common.cli, Config, __doc__)
