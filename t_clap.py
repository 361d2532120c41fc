"""T-CLAP: LAION-CLAP fine-tuned to hear the order of events, with captions whose order is wrong.

Yi Yuan, Zhuo Chen, Xubo Liu, Haohe Liu, Xuenan Xu, Dongya Jia, Yuanzhe Chen, Mark D. Plumbley,
Wenwu Wang: "T-CLAP: Temporal-Enhanced Contrastive Language-Audio Pretraining", arXiv:2404.17806.
The abstract says "Our code and models will be released soon"; we found neither. The paper
fine-tunes LAION-CLAP (HTS-AT and RoBERTa, one vector each; Wu et al., ICASSP 2023,
github.com/LAION-AI/CLAP). "LAION" below means that code; it fills what the paper leaves open.

The idea: a batch rarely holds two captions with the same events in different orders, so the
contrastive loss can be small although the model ignores the order. Here a caption that tells an
order brings its own negative, the same events in another order (`tools.captions rewrite --task
negatives`, `tools.scenes --preset esc-mixed-up`). A second loss asks each clip to lie closer to its
caption than to the negative.

Table 3 (T-Classify) compares T-CLAP with three published models: MMT, Microsoft's CLAP, and
LAION-CLAP, from which T-CLAP starts. The paper trains no control without L_t; `--lt-weight 0` is
such a control, and it is ours.

Equations (paper) -> code
  Eq. (1)  cosine s_ij of clip i and caption j           training_loss
  Eq. (2)  the sum of the two losses, L_c + lambda L_t   training_loss
  Eq. (3)  temporal loss: caption against its negative   temporal_loss
Eq. (1) is printed with the names of the two encoders exchanged. L_c, the contrastive loss, has no
number: contrastive_loss.

Letters: B clips in a batch, S samples, T frames (32 of 0.3125 s in 10 s), L text tokens,
D joint dimension 512.

Deviations from the paper, and what it leaves open
  D1  LAION clips each waveform to [-1, 1] and cuts it to int16 and back, in its training loader and
      in its Python API. That moves a sample within [-1, 1] by less than 1 / 32,767, so it is left
      out here; --cache does clip and round training audio.
  D2  Evaluated audio over 10 s is cut into consecutive windows, whose vectors are averaged by their
      seconds; LAION crops at random. Training crops at random as LAION does, so a crop of a longer
      clip (Clotho) may lack an event of its caption. A window or crop that is not full is tiled as
      often as it fits whole, then zero-padded, as LAION does.
  D3  Frames (embed_frames) are projected one by one; neither T-CLAP nor LAION uses frames.
  D4  Eq. (3) is printed as a sum over N samples; N is the size of the data set in Sec. 2.1, we read
  it
      as the batch. Here it is a mean over the clips that have a negative: the sum would swamp L_c,
      which is a mean.
  D5  Not stated: Adam without weight decay and the cosine to 0 after the warm-up are LAION's, and
      so is the choice of the checkpoint by mAP@10 of both directions. LAION averages it over Clotho
      and AudioCaps; here all clips of split val are one gallery.
  D6  "a ratio of 1 : 4 to add the other three datasets within each batch" is read as one clip of
      the sets with negatives to four of Auto-ACD; within each of the two parts clips are drawn
      uniformly.
  D7  Not stated: a clip shows one of its captions, drawn anew at every visit.
  D8  Not stated: bf16 autocast on a GPU; the losses are always in fp32.
  D9  --micro-batch: batch norm sees the parts of a batch, not the whole (common.cached_backward).
  D10 --size tiny starts from nothing, the paper from LAION-CLAP: small encoders, batches of 16,
      sets mixed 1 : 1, a higher learning rate, a shorter schedule, no drop path, cosines times 14
      in Eq. (3) and lambda 2. Every start from --weights none has initial weights that let order
      through (feel_order). With lambda 0.5 one seed of three learns no order in 2,000 steps.
  D11 L_c is not printed ("original contrastive loss", Fig. 2). It is LAION's: the mean of the
      cross-entropies of both directions, of cosines times a learnt factor (at first the weight
      file's, 1 / 0.07 with --weights none; held between 1 and 100).
  D12 Not stated: the embeddings E of Eq. (3) have length 1, so its products are cosines.
  D13 L_c sees the captions of all sets and no negative. The paper calls Auto-ACD "the primary
      database for the contrastive loss", adds the other three sets to each batch, and does not say
      whether L_c sees their captions.
  D14 The paper's LLM rewrites AudioCaps and Clotho so that "each sample is combined with a negative
      caption"; its prompt is not printed. tools.captions does it by rules or by a language model.
      A caption without an order gets no negative and no part in L_t.
  D15 ESC-mixed-up is made "by mixing and concatenating". tools.scenes concatenates two recordings
      of different classes; their labels are joined by the two phrases that the paper gives as
      examples; --overlay is ours.
  D16 The file of LAION-CLAP is not named, nor whether it has feature fusion. 630k-best.pt (without)
      fits the training sets that Table 1 lists for CLAP_l: AudioCaps, Clotho, LAION-Audio-630k.
  D17 Of the model only "HTSAT", "RoBERTa" and "multi-layer perceptron (MLP) layers and activation
      functions" are named. Sizes, 48 kHz log-mel, dropout, drop path and SpecAugment are LAION's.
      Not stated: no weight is frozen, but for logit_scale_t, which no loss uses.
  D18 "we have excluded all the testing samples from the ESC-50 dataset in our mixed-up dataset and
      VGGSound audio samples in Auto-ACD" (Sec. 3.3): here --exclude of the tools does that when the
      sets are made (results/README.md).

Run:  python t_clap.py --data demo                              (two CPU cores, about 8 minutes)
      python t_clap.py --data audiocaps_order clotho_order esc_mixed_up auto_acd
      torchrun --nproc-per-node 8 t_clap.py --data ...          (one node, 8 GPUs)
      python eval.py runs/NAME/best.pt --data MANIFEST --protocol all
L_c starts near ln B from nothing, far below it from LAION's weights; L_t starts near ln 2 = 0.69.
"""

import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

import common

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # data
    data: list[  # manifests, folders that hold manifest.jsonl, or the word demo; manifests with negatives and those without form the two parts of a batch (D6, D14, D15, D18)
        str
    ]
    size: Literal["paper", "tiny"] = (
        "paper"  # paper: HTS-AT + RoBERTa (Sec. 2.2; sizes: LAION, D17); tiny: same family, small, from nothing (D10)
    )
    weights: str = "630k-best.pt"  # start: a LAION-CLAP file (D16), a transformers CLAP folder or hub id, a T-CLAP checkpoint, or none
    text_model: str = "roberta-base"  # tokenizer of a LAION-CLAP file; with --weights none the text encoder's start, or none
    # model, read only when --weights none
    joint_dim: int = 512  # dimension shared by audio and text (LAION, D17)
    audio_dim: int = 96  # channels in stage 1 of HTS-AT; each later stage has twice as many
    audio_depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # blocks a stage
    audio_heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])  # heads a stage
    audio_patch: int = 4  # HTS-AT patch, in mel bins and frames
    text_dim: int = 768  # text encoder width, read only when --text-model none
    text_layers: int = 12  # text encoder layers, read only when --text-model none
    # loss
    lt_weight: float = 0.5  # weight lambda of the temporal loss (Eq. 2; 0.5: Sec. 3.2); 0: fine-tuning without it, our control (the paper has none)
    lt_scale: float = 1.0  # factor on the cosines in the temporal loss (Eq. 3 has none, D10)
    # optimisation
    steps: int = 30000  # Sec. 3.2
    batch_size: int = 512  # clips over all processes (Sec. 3.2)
    micro_batch: int = 0  # clips a process holds the graph of at a time (gradient caching); 0: all of its share (ours, D9)
    mix: float = (
        4.0  # clips of sets without negatives for each clip of sets with them (Sec. 3.2, D6)
    )
    lr: float = 1e-4  # peak learning rate (Sec. 3.2), of Adam (D5)
    warmup_steps: int = 10000  # linear warm-up (Sec. 3.2), then cosine to 0 (D5)
    drop_path: float = 0.1  # stochastic depth in HTS-AT, 0 to this over its blocks (LAION, D17); a T-CLAP checkpoint keeps its own
    precision: Literal["auto", "bf16", "fp32"] = (
        "auto"  # autocast; auto: bf16 on a GPU, fp32 on a CPU (D8)
    )
    seed: int = 0  # of weights, order, crops, captions, masks (Sec. 4: means of three runs)
    # run
    name: str = ""  # folder under --runs; empty: t_clap-1, t_clap-2, ...
    runs: str = "runs"  # where run folders go
    resume: bool = False  # continue runs/NAME/last.pt with its stored settings
    eval_steps: int = 1000  # steps between validations (each may write best.pt)
    save_steps: int = 500  # steps between writes of last.pt
    log_steps: int = 10  # steps between lines of log.jsonl
    workers: int = 4  # processes that read audio
    cache: str = ""  # folder in which the training audio is kept decoded, int16 at the model's rate, the first minute of every clip; empty: files are read
    compile: bool = False  # torch.compile of the training pass; a minute or more at the start, then faster on a GPU
    max_bad: float = 0.05  # largest share of unreadable clips before the run stops
    device: str = "auto"  # auto, cpu or cuda


TINY = dict(
    weights="none",
    text_model="none",
    audio_patch=16,
    audio_dim=64,
    audio_depths=[1, 4],
    audio_heads=[4, 8],
    text_dim=128,
    text_layers=2,
    joint_dim=128,
    lt_weight=2.0,
    lt_scale=14.0,  # D10
    # Few ordered clips a batch. There are few classes: with more of them two clips would often hold
    # the same sounds in different orders, and L_c alone would learn order.
    steps=2000,
    batch_size=16,
    mix=1.0,  # D10
    lr=5e-4,
    warmup_steps=200,
    drop_path=0.0,
    eval_steps=500,
    workers=1,
)
PRESETS = {("size", "tiny"): TINY}
WINDOW_S = 10.0  # LAION's training crop (D2)
MAX_TOKENS = 77  # LAION's padding and truncation length
METHOD = "t_clap"

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def tile(waveform, window: int):
    """waveform (S,), S <= window -> (window,): repeated as often as it fits whole, then zeros (D2)."""
    waveform = waveform.repeat(window // len(waveform))
    return F.pad(waveform, (0, window - len(waveform)))


class Model(nn.Module):
    """LAION-CLAP without feature fusion (D16, D17).

    Args
        text_encoder: a common.TextEncoder that kept its pooler (RoBERTa's tanh layer on <s>).
        audio: HTS-AT's dim, depths, heads; joint_dim: D; mel: keyword arguments of common.LogMel.
    """

    window_s = WINDOW_S
    # D2
    crop_rule = f"all consecutive windows of {WINDOW_S:g} s, the last one tiled as often as it fits whole, then zero-padded; averaged by their seconds"
    clean_caption = staticmethod(
        lambda text: text
    )  # LAION's basic path tokenises captions as they are

    def __init__(
        self,
        text_encoder: common.TextEncoder,
        audio: dict,
        joint_dim: int = 512,
        mel: dict | None = None,
    ):
        super().__init__()
        mel = {
            "sample_rate": 48000,
            "n_fft": 1024,
            "hop": 480,
            "n_mels": 64,
            "fmin_hz": 50,
            "fmax_hz": 14000,
            **(mel or {}),
        }
        self.shape = {
            "audio": dict(audio),
            "joint_dim": joint_dim,
            "mel": mel,
        }  # rebuilds the model, with the text encoder
        self.sample_rate, self.log_mel = mel["sample_rate"], common.LogMel(**mel)
        self.audio_encoder, self.text_encoder = common.HTSAT(**audio), text_encoder
        self.frame_s = WINDOW_S / self.audio_encoder.n_frames

        def head(dim):
            return nn.Sequential(
                nn.Linear(dim, joint_dim), nn.ReLU(), nn.Linear(joint_dim, joint_dim)
            )

        self.audio_projection, self.text_projection = (
            head(self.audio_encoder.out_dim),
            head(text_encoder.out_dim),
        )
        self.logit_scale_a = nn.Parameter(
            torch.tensor(1 / 0.07).log()
        )  # logs of the factors on cosines;
        self.logit_scale_t = nn.Parameter(
            torch.tensor(1 / 0.07).log(), requires_grad=False
        )  # LAION's plain loss uses the first

    def clip_feats(self, waveform):
        """waveform (B, S) of one window, tiled, not cut to int16 (D1) -> projected clips (B, D)."""
        return self.audio_projection(self.audio_encoder(self.log_mel(waveform)).mean(1))

    def text_feats(self, input_ids, attention_mask):
        """Token ids (B, L) -> projected texts (B, D), of the pooler's tanh(dense(<s>))."""
        return self.text_projection(
            self.text_encoder.model.pooler(self.text_encoder(input_ids, attention_mask))
        )

    def forward(self, waveform, input_ids, attention_mask, ordered):
        """One training batch -> audio_embeds, text_embeds, negative_embeds (B, D), scale.

        Texts: the B captions, then the negatives of the clips whose numbers are in `ordered`; the
        other rows of negative_embeds are 0.
        """
        B = len(waveform)
        audio_embeds = F.normalize(self.clip_feats(waveform).float(), dim=-1)
        texts = F.normalize(
            self.text_feats(input_ids, attention_mask).float(), dim=-1
        )  # (B + len(ordered), D)
        negative_embeds = torch.zeros_like(texts[:B]).index_copy(0, ordered, texts[B:])
        return audio_embeds, texts[:B], negative_embeds, self.logit_scale_a.exp()

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at `sample_rate`, n_samples (B,) valid ones -> (B, D),
        normalised; never random.
        """
        with common.evaluating(self):
            frame_feats, owner, weight = self._window_feats(waveform, n_samples)
            return common.join_windows(
                F.normalize(self.audio_projection(frame_feats.mean(1)).float(), dim=-1),
                owner,
                weight,
            )

    @torch.no_grad()
    def embed_frames(self, waveform, n_samples=None):
        """As embed_audio -> frames (B, T, D), normalised, every `frame_s` seconds (D3); zeros
        behind a clip's last window.
        """
        with common.evaluating(self):
            frame_feats, owner, _ = self._window_feats(waveform, n_samples)
            frames = F.normalize(self.audio_projection(frame_feats), dim=-1)
            return nn.utils.rnn.pad_sequence(
                [frames[owner == b].flatten(0, 1) for b in range(len(waveform))], True
            )

    def _window_feats(self, waveform, n_samples):
        window = int(WINDOW_S * self.sample_rate)
        windows, owner, weight, lengths = common.cut_windows(waveform, n_samples, window)
        windows = torch.stack([tile(piece[:n], window) for piece, n in zip(windows, lengths)])
        return (
            torch.cat([self.audio_encoder(self.log_mel(part)) for part in windows.split(32)]),
            owner,
            weight,
        )

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised."""
        with common.evaluating(self):
            tokens = common.to_device(self.text_encoder.tokenize(texts), self.logit_scale_a.device)
            return F.normalize(
                self.text_feats(tokens["input_ids"], tokens["attention_mask"]).float(), dim=-1
            )

    @classmethod
    def from_checkpoint(cls, path):
        """A run's last.pt or best.pt."""
        content = common.read_checkpoint(path, METHOD)
        model = cls(
            common.text_encoder_from_description(content["text_encoder"], MAX_TOKENS, pooler=True),
            **content["shape"],
        )
        common.load_strict(model, content["model"], path)
        return model.eval()

    @classmethod
    def from_published(cls, source, text_model: str = "roberta-base", drop_path: float = 0.1):
        """A transformers CLAP folder or hub id, or a LAION-CLAP .pt file (then with `text_model`'s
        tokenizer).
        """
        if Path(source).is_file():
            weights = common.read_weights(source)
            weights = weights.get("state_dict", weights)
            weights = {k.removeprefix("module."): v for k, v in weights.items()}
            if any("mel_conv2d" in k or "fusion_model" in k for k in weights):
                raise ValueError(f"{source}: {FUSED}")
            text_encoder = common.text_encoder_from_pretrained(text_model, MAX_TOKENS, pooler=True)
            audio = htsat_size(weights, "audio_branch.") | {"drop_path": drop_path}
            model = cls(
                text_encoder, audio, len(weights.get("audio_projection.0.weight", range(512)))
            )
            state = laion_state(weights)
        else:
            text_encoder, config, weights, mel = _transformers_clap(source)
            audio = config.audio_config
            model = cls(
                text_encoder,
                dict(
                    dim=audio.patch_embeds_hidden_size,
                    depths=audio.depths,
                    heads=audio.num_attention_heads,
                    patch=audio.patch_size,
                    window=audio.window_size,
                    spec_size=audio.spec_size,
                    n_mels=audio.num_mel_bins,
                    drop_path=drop_path,
                ),
                config.projection_dim,
                mel,
            )
            state = transformers_state(weights)
        common.load_strict(model, state, source)
        return model.eval()


def start_model(cfg: Config, captions: list[str]) -> Model:
    """The model that training starts from: --weights, or a new one."""
    if cfg.weights == "none":
        text_encoder = common.start_text_encoder(cfg, captions, MAX_TOKENS, pooler=True)
        model = Model(
            text_encoder,
            dict(
                dim=cfg.audio_dim,
                depths=cfg.audio_depths,
                heads=cfg.audio_heads,
                patch=cfg.audio_patch,
                drop_path=cfg.drop_path,
            ),
            cfg.joint_dim,
        )
        feel_order(model, text=cfg.text_model == "none")
        return model
    if Path(cfg.weights).is_file() and "method" in common.read_weights(cfg.weights):
        return Model.from_checkpoint(cfg.weights)
    if cfg.weights.endswith((".pt", ".ckpt", ".pth")) and not Path(cfg.weights).is_file():
        raise FileNotFoundError(
            f"--weights {cfg.weights}: no such file; 630k-best.pt is in the hub repository "
            "lukewys/laion_clap (or give laion/clap-htsat-unfused, which is fetched, or none)"
        )
    return Model.from_published(cfg.weights, cfg.text_model, cfg.drop_path)


@torch.no_grad()
def feel_order(model: Model, text: bool) -> None:
    """Larger initial weights for new encoders, so that their vectors depend on the order of what
    they see (D10).

    L_t compares a clip with two captions. If exchanging the events changes neither the clip's
    vector nor the caption's, its gradient is almost zero and nothing is learnt, so the first
    weights must already react to order. With the usual deviation of 0.02, made for wide encoders,
    small ones do not: an exchange moves a caption by less than 1 % of the mean squared distance
    between captions, and 500 steps change nothing. With these it is a quarter to a half of it.
    Larger ones for the audio let the contrastive loss alone find order too, and then there is
    nothing to compare with.
    """
    for name, parameter in model.audio_encoder.named_parameters():
        if "bias_tables" in name:
            parameter *= 2.0 / 0.02  # who attends to whom in time
        elif name.endswith("weight") and parameter.dim() == 2:
            parameter *= 0.05 / 0.02
    for module in model.text_encoder.model.modules() if text else ():
        if isinstance(module, nn.Linear):
            module.weight *= 1 / math.sqrt(module.in_features) / 0.02
    if text:
        model.text_encoder.model.embeddings.position_embeddings.weight *= 2.0


# ------------------------------------------------------------------------------------------------
# Loss: embeds (B, D) normalised, of all processes
# ------------------------------------------------------------------------------------------------


def contrastive_loss(sim, scale):
    """L_c: mean over both directions of the cross-entropy of the right partner.

    sim (B, B) cosine, audio in rows. Source: LAION's loss; the paper prints none (D11).
    """
    target = torch.arange(len(sim), device=sim.device)
    return (
        F.cross_entropy(sim * scale, target) + F.cross_entropy(sim.T * scale, target)
    ) / 2  # L_c (D11)


def temporal_loss(audio_embeds, text_embeds, negative_embeds, lt_scale: float = 1.0):
    """L_t: each clip must tell its caption from the caption's negative (B, D; 0: it has none).

    -> mean over the clips that have one (D4) of log(1 + exp(a.n - a.t)), which is
    -log(exp(a.t) / (exp(a.t) + exp(a.n))); share of them for which a.t > a.n. All vectors have
    length 1 (D12). Source: Eq. (3), which has no factor lt_scale (D10).
    """
    ordered = negative_embeds.detach().any(-1).float()  # (B,)
    margin = (audio_embeds * (text_embeds - negative_embeds)).sum(-1)
    n = ordered.sum().clamp(min=1)
    loss = (F.softplus(-lt_scale * margin) * ordered).sum() / n  # Eq. (3)
    return loss, ((margin.detach() > 0) * ordered).sum() / n


def training_loss(cfg: Config, audio_embeds, text_embeds, negative_embeds, scale):
    """Outputs of Model.forward in this process -> loss, sim (B, B), parts, over all processes.

    Source: Eq. (1), whose division by the norms is in Model.forward, and Eq. (2).
    """
    audio_embeds, text_embeds, negative_embeds = (
        common.gather_with_grad(x) for x in (audio_embeds, text_embeds, negative_embeds)
    )
    sim = audio_embeds @ text_embeds.T  # (B, B), cosines of unit vectors: Eq. (1)
    contrastive = contrastive_loss(sim, scale)  # positives only, of all sets (D13)
    temporal, order = temporal_loss(audio_embeds, text_embeds, negative_embeds, cfg.lt_scale)
    loss = contrastive + cfg.lt_weight * temporal  # Eq. (2)
    return (
        loss,
        sim.detach(),
        {"loss_c": contrastive.detach(), "loss_t": temporal.detach(), "order_accuracy": order},
    )


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def has_negatives(row: dict) -> bool:
    return any(row.get("negatives", []))


def split_sets(rows: list[dict]) -> list[list[dict]]:
    """Rows of the manifests that have negatives, and rows of those that have none."""

    def manifest(row):
        return row["where"].rpartition(":")[0]

    ordered = {manifest(row) for row in rows if has_negatives(row)}
    return [
        [row for row in rows if manifest(row) in ordered],
        [row for row in rows if manifest(row) not in ordered],
    ]


def shares(sizes: list[int], batch_size: int, mix: float) -> list[int]:
    """Clips of each of the two groups in a batch, 1 : mix, or all from the group that is not empty
    (D6).
    """
    if 0 in sizes:
        return [min(size, batch_size) for size in sizes]
    first = max(1, round(batch_size / (1 + mix)))
    return [min(sizes[0], first), min(sizes[1], batch_size - first)]


def mixed_batches(sizes, counts, seed: int, start_step: int, total_steps: int):
    """Yield this process's share of every batch as [(group, epoch, index), ...].

    Each group is gone through in a new random order every epoch; what does not fill a batch's share
    is left out of that epoch.
    """
    rank, world = common.rank_and_world()
    orders = [(None, None), (None, None)]
    for step in range(start_step, total_steps):
        batch = []
        for group, (size, count) in enumerate(zip(sizes, counts)):
            if count:
                epoch, place = divmod(step, size // count)
                if orders[group][0] != epoch:
                    orders[group] = (
                        epoch,
                        np.random.default_rng((seed, group, epoch)).permutation(size),
                    )
                chosen = orders[group][1][place * count : (place + 1) * count]
                batch += [(group, epoch, int(i)) for i in chosen]
        yield batch[rank::world]


class Clips(Dataset):
    """One item a clip with one of its captions. Items are asked for as (group, epoch, index), which
    seeds both draws.
    """

    def __init__(self, groups: list[list[dict]], cfg: Config, tokenize, sample_rate: int):
        self.groups, self.cfg, self.tokenize, self.rate = groups, cfg, tokenize, sample_rate
        self.read = common.audio_reader(
            cfg.cache, [row for group in groups for row in group], sample_rate, cfg.workers
        )

    def __getitem__(self, key):
        group, epoch, index = key
        row = self.groups[group][index]
        rng = np.random.default_rng((self.cfg.seed, *key))
        chosen = int(rng.integers(len(row["captions"])))  # D7
        negatives = row.get("negatives", []) if self.cfg.lt_weight else []
        negative = negatives[chosen] if chosen < len(negatives) else None  # D14
        try:
            waveform = self.read(
                row["audio"], length_s=WINDOW_S, crop_rng=rng, expected_s=row.get("duration")
            )
        except common.AudioError as error:
            return error
        return waveform, row["captions"][chosen], negative, row["audio"]

    def collate(self, items):
        """-> list of dicts of tensors for Model.forward (one a micro-batch), file names, error
        texts.
        """
        return common.collate_parts(items, self.cfg.micro_batch, self.tensors)

    def tensors(self, items) -> dict:
        waveforms, captions, negatives, _ = zip(*items)
        window = int(WINDOW_S * self.rate)
        ordered = [i for i, negative in enumerate(negatives) if negative]
        tokens = self.tokenize([*captions, *(negatives[i] for i in ordered)])
        return {
            "waveform": default_collate([tile(torch.from_numpy(w), window) for w in waveforms]),
            "ordered": torch.tensor(ordered, dtype=torch.long),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


# ------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------


def validate(model: Model, rows: list[dict], quiet=True) -> tuple[dict, dict]:
    """Retrieval and, where rows have negatives, T-Classify (text to audio) -> scores, what chance
    gives.
    """
    kept, audio_embeds, _, bad = common.embed_files(model, rows, desc="validation", quiet=quiet)
    for text in bad:
        tqdm.write(f"validation: left out {text}")
    rows = [rows[i] for i in kept]
    captions = [(i, c) for i, row in enumerate(rows) for c in row["captions"]]
    owner = np.array([i for i, _ in captions])
    sim = common.similarities(model, audio_embeds, None, [c for _, c in captions])
    scores, chance = (
        common.retrieval_scores(common.retrieval_ranks(sim, owner)),
        common.retrieval_chance(owner, len(rows)),
    )
    pairs = [
        (i, c, n)
        for i, row in enumerate(rows)
        for c, n in zip(row["captions"], row.get("negatives", []))
        if n
    ]
    if pairs:
        right, wrong = (common.embed_texts(model, [pair[k] for pair in pairs]) for k in (1, 2))
        clips = audio_embeds[[i for i, _, _ in pairs]]
        scores["t_classify_t2a"], chance["t_classify_t2a"] = (
            float(((clips * (right - wrong)).sum(1) > 0).mean()),
            0.5,
        )
    return scores, chance


def selection_score(model, val_rows, say, step) -> float:
    """mAP@10 of both directions on the validation split (D5); without one, the last step wins."""
    if not val_rows:
        return float(step)
    scores, _ = validate(model, val_rows)
    shown = [
        k
        for k in ("t2a_R@1", "a2t_R@1", "t2a_mAP@10", "a2t_mAP@10", "t_classify_t2a")
        if k in scores
    ]
    say(
        (f"step {step}" if step else "before the first step")
        + ": validation "
        + " ".join(f"{k} {scores[k]:.3f}" for k in shown)
    )
    return (scores["t2a_mAP@10"] + scores["a2t_mAP@10"]) / 2


def main(cfg: Config) -> dict:
    """Train -> best_step, n_clips, scores and chance of the best checkpoint on the validation
    split, as in eval.json; {} without one.
    """
    device, autocast, say = common.start(cfg, PRESETS)
    rank, world = common.rank_and_world()

    # Data
    rows = common.read_manifest(cfg.data)
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)
    common.require(train_rows + val_rows, "captions")
    groups = split_sets(train_rows)
    sizes = [len(group) for group in groups]
    common.check_counts(cfg, "steps", "eval_steps", "save_steps", "log_steps")
    if cfg.mix < 0 or cfg.micro_batch < 0:
        raise ValueError(f"--mix {cfg.mix}, --micro-batch {cfg.micro_batch}: must not be negative")
    if cfg.lt_weight and not sizes[0]:
        raise ValueError(
            "no training row has a negative, so the temporal loss has nothing to learn from; make "
            "them with python -m tools.captions rewrite --task negatives, or give --lt-weight 0 "
            "for plain contrastive training"
        )
    counts = shares(sizes, cfg.batch_size, cfg.mix)
    batch_size = sum(counts)
    common.check_batch(cfg, batch_size, len(train_rows), "clip")

    # Model
    checkpoint = (
        common.read_checkpoint(Path(cfg.runs) / cfg.name / "last.pt", METHOD)
        if cfg.resume
        else None
    )
    torch.manual_seed(cfg.seed)
    if checkpoint:
        common.check_resume(cfg, checkpoint["config"])
        model = Model.from_checkpoint(Path(cfg.runs) / cfg.name / "last.pt")
    else:
        model = start_model(
            cfg,
            [
                text
                for row in train_rows
                for text in (*row["captions"], *filter(None, row.get("negatives", [])))
            ],
        )
    model.to(device)
    wrapped = common.wrap(model, device, cfg.compile, cfg.micro_batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=cfg.lr, fused=True)
    dataset = Clips(groups, cfg, model.text_encoder.tokenize, model.sample_rate)
    step, best = 0, {"score": -1.0, "step": 0}
    run = common.RunFolder(cfg.runs, cfg.name, METHOD, cfg.resume, len(train_rows), cfg.max_bad)
    if checkpoint:
        optimiser.load_state_dict(checkpoint["optimiser"])
        step, best = checkpoint["step"], checkpoint["best"]
        run.drop_log_after(step)
    with_negative = sum(map(has_negatives, groups[0]))
    say(
        f"{METHOD}: {sizes[0]} clips of sets with negatives ({with_negative} have one), {sizes[1]} "
        f"of sets without, {len(val_rows)} clips for validation; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {cfg.steps} steps "
        f"of {counts[0]} + {counts[1]} clips on {world} x {device.type}; ln B = "
        f"{math.log(batch_size):.2f}; writing to {run.path}"
    )

    def save(name):
        common.save_checkpoint(
            run.path / name,
            {
                "method": METHOD,
                "config": dataclasses.asdict(cfg) | {"name": run.name, "resume": False},
                "step": step,
                "best": best,
                "shape": model.shape,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "text_encoder": model.text_encoder.description(),
                "versions": common.versions(),
            },
        )

    # Loop
    if not checkpoint and cfg.weights != "none" and rank == 0:
        selection_score(model, val_rows, say, step)
    loader = common.Loader(
        dataset,
        batch_sampler=mixed_batches(sizes, counts, cfg.seed, step, cfg.steps),
        num_workers=cfg.workers,
        collate_fn=dataset.collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=common.outlive_signals,
    )
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    recent, unreadable, clock, pairs_seen = [], [], time.perf_counter(), 0
    model.train()
    for parts, names, bad in common.batches_on(device, loader):
        unreadable += bad
        if not parts:
            raise ValueError(f"no clip of a batch of {len(bad)} could be read; first: {bad[0]}")
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(step, cfg.warmup_steps, cfg.steps)

        optimiser.zero_grad(set_to_none=True)
        loss, sim, of_loss = common.cached_backward(
            wrapped,
            parts,
            lambda *embeds: training_loss(cfg, *embeds),
            lambda i: common.seed_step(cfg.seed, step, rank, i),
            autocast,
            cfg.micro_batch,
        )
        optimiser.step()
        with torch.no_grad():
            model.logit_scale_a.clamp_(0, math.log(100))

        # Log: the only place, with saving, where a GPU is waited for
        recent.append((step, loss.detach(), names))
        step += 1
        pairs_seen += len(sim)
        bar.update()
        if step % cfg.log_steps == 0 or step == cfg.steps:
            common.check_finite(recent, run)
            run.settle_skipped(unreadable)
            unreadable.clear()
            r1 = (sim.argmax(1) == torch.arange(len(sim), device=device)).float().mean().item()
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            line = {
                "step": step,
                "loss": loss.item(),
                "ln_B": math.log(len(sim)),
                **{k: v.item() for k, v in of_loss.items()},
                "batch_R@1": r1,
                "scale": model.logit_scale_a.exp().item(),
                "lr": optimiser.param_groups[0]["lr"],
                "pairs_per_s": pairs_seen / seconds,
                "skipped": len(run.skipped),
            }
            run.log(line)
            bar.set_postfix_str(
                f"loss {line['loss_c']:.3f} (ln B {line['ln_B']:.2f}) + {line['loss_t']:.3f} R@1 "
                f"{r1:.2f} order {line['order_accuracy']:.2f} {line['pairs_per_s']:.0f} pairs/s"
            )
            pairs_seen = 0
        eval_now = step % cfg.eval_steps == 0 or step == cfg.steps
        if eval_now or step % cfg.save_steps == 0 or run.stop:
            common.check_finite(recent, run, model)
            if eval_now and rank == 0:
                score = selection_score(model, val_rows, say, step)
                if score > best["score"]:
                    best = {"score": score, "step": step}
                    save("best.pt")
                model.train()
            if rank == 0:
                save("last.pt")
            common.barrier()
            run.end_if_told(f"step {step}")
            clock, pairs_seen = time.perf_counter(), 0
    bar.close()

    # Result: the best checkpoint on the validation split
    common.barrier()
    if rank > 0 or not val_rows:
        return {}
    model = Model.from_checkpoint(run.path / "best.pt").to(device)
    scores, chance = validate(model, val_rows, quiet=False)
    result = {
        "best_step": best["step"],
        "n_clips": len(val_rows),
        "scores": scores,
        "chance": chance,
    }
    common.write_lines(run.path / "eval.json", [json.dumps(result, indent=1)])
    common.print_scores(
        f"{METHOD} on {len(val_rows)} validation clips (step {best['step']})", scores, chance
    )
    control = common.flags_of(cfg, PRESETS, name="", lt_weight=0.0)
    print(
        "\nNext:\n"
        f"  python eval.py {run.path}/best.pt --data {' '.join(cfg.data)} --protocol all\n"
        f"  python t_clap.py {control}     (no temporal loss, to compare)"
    )
    return result


# ------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------


FUSED = (
    "a CLAP with feature fusion: its audio encoder has branches for long audio that this model "
    "does not have; take the file without fusion (laion/clap-htsat-unfused, 630k-best.pt)"
)


def htsat_size(weights: dict, prefix: str) -> dict:
    """dim, depths, heads of an HTS-AT, from the shapes of its weights; LAION's where keys are
    missing.
    """
    depths, heads = {}, {}
    for key, value in weights.items():
        found = re.match(
            re.escape(prefix)
            + r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$",
            key,
        )
        if found:
            layer = int(found[1])
            depths[layer], heads[layer] = (
                max(depths.get(layer, 0), int(found[2]) + 1),
                value.shape[1],
            )
    if sorted(depths) != [0, 1, 2, 3]:
        depths, heads = dict(enumerate((2, 2, 6, 2))), dict(enumerate((4, 8, 16, 32)))
    return dict(
        dim=len(weights.get(prefix + "patch_embed.proj.weight", range(96))),
        depths=[depths[i] for i in range(4)],
        heads=[heads[i] for i in range(4)],
    )


def laion_state(weights: dict) -> dict:
    """LAION's names -> ours. Unknown names stay, so that strict loading lists them."""
    audio = common.htsat_state(
        {
            k.removeprefix("audio_branch."): v
            for k, v in weights.items()
            if k.startswith("audio_branch.")
        }
    )
    state = {f"audio_encoder.{k}": v for k, v in audio.items()}
    for key, value in weights.items():
        # LAION's MLP heads are in the file, but unused without its mlp_loss
        if not re.match(
            r"audio_branch\.|(audio|text)_transform\.|text_branch\.embeddings\.(position|token_type)_ids$",
            key,
        ):
            state[key.replace("text_branch.", "text_encoder.model.")] = value
    return state


def transformers_state(weights: dict) -> dict:
    """transformers ClapModel's names -> ours."""
    audio = common.htsat_state({k: v for k, v in weights.items() if k.startswith("audio_model.")})
    state = {f"audio_encoder.{k}": v for k, v in audio.items()}
    for key, value in weights.items():
        if not re.match(r"audio_model\.|text_model\.embeddings\.(position|token_type)_ids$", key):
            key = key.replace("text_model.", "text_encoder.model.")
            state[
                key.replace("projection.linear1", "projection.0").replace(
                    "projection.linear2", "projection.2"
                )
            ] = value
    return state


def _transformers_clap(name):
    """-> TextEncoder (its weights not yet those of the file), ClapConfig, state dict, LogMel
    arguments.
    """
    transformers = common.quiet_transformers()
    try:
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except ValueError:
            raise ValueError(
                f"{name}: not a model folder; expected a transformers CLAP with its config.json, "
                "or a weight file"
            ) from None
        if config.model_type != "clap":
            raise ValueError(
                f"{name}: a transformers model of type {config.model_type!r}; expected 'clap'"
            )
        if config.audio_config.enable_fusion:
            raise ValueError(f"{name}: {FUSED}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        weights = transformers.ClapModel.from_pretrained(name, dtype=torch.float32).state_dict()
    except OSError as error:
        raise ValueError(
            f"{name}: neither a checkpoint file nor a CLAP folder, and not to be had from the hub "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    text = config.text_config.to_dict()
    text.pop("model_type")
    text_encoder = common.TextEncoder(
        transformers.RobertaModel(transformers.RobertaConfig(**text)),
        tokenizer,
        MAX_TOKENS,
        pooler=True,
    )
    try:
        given = transformers.AutoFeatureExtractor.from_pretrained(name).to_dict()
    except (OSError, ValueError):  # a folder without preprocessor_config.json: LAION's settings
        given = {}
    names = {
        "sampling_rate": "sample_rate",
        "fft_window_size": "n_fft",
        "hop_length": "hop",
        "feature_size": "n_mels",
        "frequency_min": "fmin_hz",
        "frequency_max": "fmax_hz",
    }
    mel = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return text_encoder, config, weights, mel


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    common.run_entry(main, lambda: common.cli(Config, PRESETS, __doc__))
