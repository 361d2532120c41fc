"""T-CLAP: LAION-CLAP fine-tuned to tell the order of events, with misordered captions as negatives.

Yi Yuan, Zhuo Chen, Xubo Liu, Haohe Liu, Xuenan Xu, Dongya Jia, Yuanzhe Chen, Mark D. Plumbley,
Wenwu Wang: "T-CLAP: Temporal-Enhanced Contrastive Language-Audio Pretraining", arXiv:2404.17806.
The abstract says "Our code and models will be released soon"; we found neither. The paper
fine-tunes LAION-CLAP (HTS-AT and RoBERTa, one vector each; Wu et al., ICASSP 2023,
github.com/LAION-AI/CLAP). "LAION" below means that code; we follow it where the paper is silent.

The idea: a batch rarely holds two captions with the same events in different orders, so the
contrastive loss can be small although the model ignores the order. Here a caption that states an
order has its own negative, the same events in another order (`tools.captions rewrite --task
negatives`, `tools.scenes --preset esc-mixed-up`). A second loss makes each clip lie closer to its
caption than to the negative.

Table 3 (T-Classify) compares T-CLAP with three published models: MMT, Microsoft's CLAP, and
LAION-CLAP, from which T-CLAP starts. The paper trains no control without L_t; `--lt-weight 0` is
such a control, and it is ours.

Equations (paper) -> code
  Eq. (1)  cosine s_ij of clip i and caption j           training_loss
  Eq. (2)  the sum of the two losses, L_c + lambda L_t   training_loss
  Eq. (3)  temporal loss: caption against its negative   temporal_loss
Eq. (1) is printed with the names of the two encoders exchanged. The contrastive loss L_c
(contrastive_loss) has no equation number.

Letters: B clips in a batch, S samples, T frames (32 of 0.3125 s in 10 s), L text tokens,
D joint dimension 512. Embeddings a, t and n are the paper's E^a, E^t and E^t-bar (the negative's).

Deviations from the paper, and what it leaves open
  D1  LAION's training loader and Python API clip each waveform to [-1, 1] and convert it to int16
      and back. This changes a sample within [-1, 1] by less than 1 / 32,767, so we omit it; louder
      samples stay as they are.
  D2  In evaluation, audio over 10 s is cut into consecutive windows, whose embeddings are averaged,
      weighted by duration; LAION crops at random. Training crops at random as LAION does, so a crop
      of a longer clip (Clotho) may lack an event of its caption. A window or crop shorter than 10 s
      is tiled as often as it fits whole, then zero-padded, as LAION does.
  D3  Frames (embed_frames) are projected one by one; neither T-CLAP nor LAION uses frames.
  D4  Eq. (3) is printed as a sum over N samples. In Sec. 2.1 N is the size of the data set; we read
      it as the batch. Ours is a mean over the clips that have a negative: a sum would dominate L_c,
      which is a mean.
  D5  Not stated, so taken from LAION: Adam without weight decay, the cosine to 0 after the warm-up,
      and the choice of the checkpoint by mAP@10 of both directions. LAION averages mAP@10 over
      Clotho and AudioCaps; here all clips of split val are one gallery, or, if there are none, 5 %
      of the clips (2 to 1,000). The paper averages three trainings (Sec. 4); here a run is one
      seed.
  D6  "a ratio of 1 : 4 to add the other three datasets within each batch" is read as one clip of
      the sets with negatives to four of Auto-ACD. Within each of the two parts, clips are drawn
      uniformly.
  D7  Not stated, so LAION's: a clip is paired with one of its captions, drawn each time.
  D8  Not stated: precision. Ours: bf16 autocast on a GPU; the losses are never in bf16 (on a GPU,
      their matrix products may use TF32).
  D9  --micro-batch: batch norm sees micro-batches, not the whole batch (common.cached_backward).
  D10 --size tiny starts from random weights, the paper from LAION-CLAP. It has small encoders,
      batches of 16, sets mixed 1 : 1, a higher learning rate, a shorter schedule, no drop path,
      cosines times 14 in Eq. (3) and lambda 2. New encoders (--weights none) have larger initial
      weights, so that their embeddings depend on order (feel_order). With lambda 0.5 one seed of
      three learns no order in 2,000 steps.
  D11 The paper does not print L_c ("original contrastive loss", Fig. 2). Ours is LAION's: the mean
      of the cross-entropies of both directions, with cosines times a learnt scale as logits. The
      scale starts at the weight file's (1 / 0.07 with --weights none), clamped to 1 to 100.
  D12 Not stated: the norm of the embeddings E of Eq. (3). Ours is 1, so its products are cosines.
  D13 L_c uses the captions of all sets and no negative. The paper calls Auto-ACD "the primary
      database for the contrastive loss", adds the other three sets to each batch, and does not say
      whether L_c uses their captions.
  D14 The paper's LLM rewrites AudioCaps and Clotho so that "each sample is combined with a negative
      caption"; its prompt is not printed. tools.captions uses rules or a language model. A caption
      without an order gets no negative and does not enter L_t.
  D15 ESC-mixed-up is made "by mixing and concatenating". tools.scenes concatenates two recordings
      of different classes and joins their labels by the two phrases that the paper gives as
      examples; --overlay is ours.
  D16 The paper does not say which LAION-CLAP file it starts from, nor whether that has feature
      fusion. 630k-best.pt (without fusion) fits the training sets that Table 1 lists for CLAP_l:
      AudioCaps, Clotho, LAION-Audio-630k.
  D17 Of the model only "HTSAT", "RoBERTa" and "multi-layer perceptron (MLP) layers and activation
      functions" are named. Sizes, 48 kHz log-mel, dropout, drop path and SpecAugment are LAION's.
      Not stated: which weights are frozen. Ours: only logit_scale_t, which no loss uses.
  D18 "we have excluded all the testing samples from the ESC-50 dataset in our mixed-up dataset and
      VGGSound audio samples in Auto-ACD" (Sec. 3.3). Here the tools' --exclude does this when the
      sets are made (results/README.md).

Run:  python t_clap.py --data demo                              (two CPU cores, about 8 minutes)
      python t_clap.py --data audiocaps_order clotho_order esc_mixed_up auto_acd
      torchrun --nproc-per-node 8 t_clap.py --data ...          (one node, 8 GPUs)
      python eval.py runs/NAME/best.pt --data MANIFEST --protocol all
L_c starts near ln B with random weights and far below it with LAION's. L_t starts near ln 2 = 0.69.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

import common

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass(init=False)
class Config(common.RunConfig):
    # data
    # manifests, folders that hold manifest.jsonl, or the word demo; manifests with negatives and
    # those without form the two parts of a batch (D6, D14, D15, D18)
    data: list[str]
    # paper: HTS-AT + RoBERTa (Sec. 2.2; sizes: LAION, D17); tiny: same family, small, random
    # weights (D10)
    size: Literal["paper", "tiny"] = "paper"
    # initial model: a LAION-CLAP file (D16), a transformers CLAP folder or hub id, a T-CLAP
    # checkpoint, or none
    weights: str = "630k-best.pt"
    # tokenizer of a LAION-CLAP file; with --weights none: initial text encoder, or none
    text_model: str = "roberta-base"

    # model, read only when --weights none
    joint_dim: common.Count = 512  # dimension shared by audio and text (LAION, D17)
    # channels in stage 1 of HTS-AT; each later stage has twice as many
    audio_dim: common.Count = 96
    # blocks per stage
    audio_depths: list[common.Layers] = field(default_factory=lambda: [2, 2, 6, 2])
    # heads per stage
    audio_heads: list[common.Count] = field(default_factory=lambda: [4, 8, 16, 32])
    audio_patch: common.Count = 4  # HTS-AT patch, in mel bins and frames
    text_dim: common.Count = 768  # text encoder width, read only when --text-model none
    text_layers: common.Layers = 12  # text encoder layers, read only when --text-model none

    # loss
    # weight lambda of the temporal loss (Eq. 2; 0.5: Sec. 3.2); 0: fine-tuning without it, our
    # control (the paper has none)
    lt_weight: common.NotNegative = 0.5
    # factor on the cosines in the temporal loss (Eq. 3 has none, D10)
    lt_scale: common.Positive = 1.0

    # optimisation
    steps: common.Count = 30000  # Sec. 3.2
    batch_size: common.Count = 512  # clips over all processes (Sec. 3.2)
    # clips of sets without negatives per clip of sets with negatives (Sec. 3.2, D6)
    mix: common.NotNegative = 4.0
    lr: common.Positive = 1e-4  # peak learning rate (Sec. 3.2) of Adam (D5)
    warmup_steps: common.Whole = 10000  # linear warm-up (Sec. 3.2), then cosine to 0 (D5)
    # stochastic depth in HTS-AT, rising from 0 to this over its blocks (LAION, D17); a T-CLAP
    # checkpoint keeps its own
    drop_path: common.Dropout = 0.1
    eval_steps: common.Count = 1000  # steps between validations (each may write best.pt)

    def check(self):
        if self.weights == "none":
            common.check_htsat(self)


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
    # Few ordered clips per batch. As there are few classes, a larger batch would often hold two
    # clips with the same sounds in different orders, and L_c alone would learn order.
    steps=2000,
    batch_size=16,
    mix=1.0,  # D10
    lr=5e-4,
    warmup_steps=200,
    drop_path=0.0,
    eval_steps=500,
    workers=1,
)
Config.presets = {("size", "tiny"): TINY}
WINDOW_S = 10.0  # LAION's training crop (D2)
MAX_TOKENS = 77  # LAION's padding and truncation length
METHOD = "t_clap"

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def tile(waveform, window: int):
    """waveform (S,), S <= window -> (window,): repeated as often as it fits whole, then
    zeros (D2).
    """
    waveform = waveform.repeat(window // len(waveform))  # LAION's "repeatpad"
    return F.pad(waveform, (0, window - len(waveform)))


class Model(nn.Module):
    """LAION-CLAP without feature fusion (D16, D17).

    Args
        text_encoder: a common.TextEncoder with its pooler (RoBERTa's tanh layer on <s>).
        audio: HTS-AT's dim, depths, heads; joint_dim: D; mel: keyword arguments of common.LogMel.
    """

    window_s = WINDOW_S
    # D2
    crop_rule = (
        f"all consecutive windows of {WINDOW_S:g} s, the last one tiled as often as it fits whole, "
        "then zero-padded; averaged by their seconds"
    )
    # LAION's basic path tokenises captions as they are
    clean_caption = staticmethod(lambda text: text)

    def __init__(
        self,
        text_encoder: common.TextEncoder,
        audio: dict,
        joint_dim: int = 512,
        mel: dict | None = None,
    ):
        super().__init__()
        # LAION's settings (D17); a transformers folder brings its own
        laion = dict(sample_rate=48000, n_fft=1024, hop=480, n_mels=64, fmin_hz=50, fmax_hz=14000)
        mel = laion | (mel or {})
        # arguments of __init__, kept in checkpoints; they rebuild the model, with the text encoder
        self.shape = {"audio": dict(audio), "joint_dim": joint_dim, "mel": mel}
        self.sample_rate, self.log_mel = mel["sample_rate"], common.LogMel(**mel)
        self.audio_encoder, self.text_encoder = common.HTSAT(**audio), text_encoder
        self.frame_s = WINDOW_S / self.audio_encoder.n_frames

        def head(dim):  # Sec. 2.2 names an MLP; the two layers and ReLU are LAION's (D17)
            return nn.Sequential(
                nn.Linear(dim, joint_dim), nn.ReLU(), nn.Linear(joint_dim, joint_dim)
            )

        self.audio_projection = head(self.audio_encoder.out_dim)
        self.text_projection = head(text_encoder.out_dim)
        # logarithms of logit scales; LAION's plain loss uses only the first (D11)
        self.logit_scale_a = nn.Parameter(torch.tensor(1 / 0.07).log())
        # not trained (D17); kept so that LAION's files load with every key
        self.logit_scale_t = nn.Parameter(torch.tensor(1 / 0.07).log(), requires_grad=False)

    def clip_feats(self, waveform):
        """waveform (B, S) of one window, tiled -> projected clips (B, D)."""
        # (B, S) -> log-mel (B, T_mel, 64) -> frames (B, T, C) -> mean (B, C) -> (B, D)
        return self.audio_projection(self.audio_encoder(self.log_mel(waveform)).mean(1))

    def text_feats(self, input_ids, attention_mask):
        """Token ids (B, L) -> projected texts (B, D), from the pooler's tanh(dense(<s>))."""
        # token states (B, L, C) -> pooler (B, C) -> (B, D)
        return self.text_projection(
            self.text_encoder.model.pooler(self.text_encoder(input_ids, attention_mask))
        )

    def forward(self, waveform, input_ids, attention_mask, ordered):
        """One training batch -> audio_embeds, text_embeds, negative_embeds (B, D), scale.

        The texts are the B captions, then the negatives of the clips with indices `ordered`. The
        other rows of negative_embeds are 0.
        """
        B = len(waveform)
        audio_embeds = F.normalize(self.clip_feats(waveform).float(), dim=-1)  # fp32 (D8)
        texts = F.normalize(
            self.text_feats(input_ids, attention_mask).float(), dim=-1
        )  # (B + len(ordered), D)
        # a row of zeros means no negative; temporal_loss ignores it
        negative_embeds = torch.zeros_like(texts[:B]).index_copy(0, ordered, texts[B:])
        return audio_embeds, texts[:B], negative_embeds, self.logit_scale_a.exp()

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at `sample_rate`, n_samples (B,) valid ones -> (B, D),
        normalised; deterministic.
        """
        with common.evaluating(self):
            frame_feats, owner, weight = self._window_feats(waveform, n_samples)
            # each window is normalised before the weighted mean: (windows, D) -> (B, D)
            return common.join_windows(
                F.normalize(self.audio_projection(frame_feats.mean(1)).float(), dim=-1),
                owner,
                weight,
            )

    @torch.no_grad()
    def embed_frames(self, waveform, n_samples=None):
        """As embed_audio -> frames (B, T, D), normalised, one every `frame_s` seconds (D3); zeros
        after a clip's last window.
        """
        with common.evaluating(self):
            frame_feats, owner, _ = self._window_feats(waveform, n_samples)
            # (windows, T, D); the projection was trained on means of frames only (D3)
            frames = F.normalize(self.audio_projection(frame_feats), dim=-1)
            return nn.utils.rnn.pad_sequence(
                [frames[owner == b].flatten(0, 1) for b in range(len(waveform))], True
            )

    def _window_feats(self, waveform, n_samples):
        window = int(WINDOW_S * self.sample_rate)
        windows, owner, weight, lengths = common.cut_windows(waveform, n_samples, window)
        # cut_windows zero-pads the last window: remove the padding, then tile (D2)
        windows = torch.stack([tile(piece[:n], window) for piece, n in zip(windows, lengths)])
        # at most 32 windows at a time: bounded memory
        feats = torch.cat([self.audio_encoder(self.log_mel(part)) for part in windows.split(32)])
        return feats, owner, weight  # feats (windows, T, C)

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
        with common.rebuilding(path, content):
            model = cls(
                common.text_encoder_from_description(
                    content["text_encoder"], MAX_TOKENS, pooler=True
                ),
                **content["shape"],
            )
        common.load_strict(model, content["model"], path)
        return model.eval()

    @classmethod
    def from_published(cls, source, text_model: str = "roberta-base", drop_path: float = 0.1):
        """A transformers CLAP folder or hub id, or a LAION-CLAP .pt file (with `text_model`'s
        config and tokenizer).
        """
        if Path(source).is_file():
            weights = common.read_weights(source)
            weights = weights.get("state_dict", weights)
            weights = {k.removeprefix("module."): v for k, v in weights.items()}  # added by DDP
            if any("mel_conv2d" in k or "fusion_model" in k for k in weights):
                raise ValueError(f"{source}: {FUSED}")
            common.check_keys(source, weights, "audio_branch.", "a LAION-CLAP file")
            text_encoder = common.text_encoder_from_pretrained(
                text_model, MAX_TOKENS, pooler=True, weights=False
            )
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
    """The model that training starts from: that of --weights, or a new one."""
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
    # only this project's checkpoints hold a method; from_checkpoint rejects another method's
    if Path(cfg.weights).is_file() and "method" in common.read_weights(cfg.weights):
        return Model.from_checkpoint(cfg.weights)
    # otherwise a misspelt file name would be looked up on the hub
    if cfg.weights.endswith((".pt", ".ckpt", ".pth")) and not Path(cfg.weights).is_file():
        raise FileNotFoundError(
            f"--weights {cfg.weights}: no such file; 630k-best.pt is in the hub repository "
            "lukewys/laion_clap (or give laion/clap-htsat-unfused, which is fetched, or none)"
        )
    return Model.from_published(cfg.weights, common.published_text_model(cfg), cfg.drop_path)


@torch.no_grad()
def feel_order(model: Model, text: bool) -> None:
    """Enlarge the initial weights of new encoders, so that embeddings depend on the order of events
    (D10). text: the text encoder is new, too.

    L_t compares a clip with two captions. If swapping the events changes neither the clip's
    embedding nor the caption's, the gradient of L_t is almost zero and nothing is learnt. So the
    initial weights must already react to order. The usual standard deviation of 0.02 suits wide
    encoders. In small ones, a swap then moves a caption by less than 1 % of the mean squared
    distance between captions, and 500 steps change nothing. With the weights here, a swap moves it
    by a quarter to a half of that distance. With even larger audio weights the contrastive loss
    alone also learns order, so the effect of L_t could not be measured.
    """
    for name, parameter in model.audio_encoder.named_parameters():
        if "bias_tables" in name:
            parameter *= (
                2.0 / 0.02
            )  # new deviation / old; makes attention depend on relative position
        elif name.endswith("weight") and parameter.dim() == 2:
            parameter *= 0.05 / 0.02
    if text:
        for module in model.text_encoder.model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 1 / math.sqrt(module.in_features) / 0.02
        model.text_encoder.model.embeddings.position_embeddings.weight *= 2.0


# ------------------------------------------------------------------------------------------------
# Loss: embeds (B, D) normalised, of all processes
# ------------------------------------------------------------------------------------------------


def contrastive_loss(sim, scale):
    """L_c: cross-entropy with the matching pair as target, mean of both directions.

    sim (B, B) cosine, audio in rows. Source: LAION's loss; the paper prints none (D11).
    """
    target = torch.arange(len(sim), device=sim.device)  # row i matches column i
    a2t = F.cross_entropy(sim * scale, target)
    t2a = F.cross_entropy(sim.T * scale, target)
    return (a2t + t2a) / 2  # L_c (D11)


def temporal_loss(audio_embeds, text_embeds, negative_embeds, lt_scale: float = 1.0):
    """L_t: each clip must tell its caption from the caption's negative (B, D; zeros: none).

    -> mean over the clips with a negative (D4) of log(1 + exp(a.n - a.t)), which is
    -log(exp(a.t) / (exp(a.t) + exp(a.n))); share of these clips with a.t > a.n. All vectors have
    length 1 (D12). Source: Eq. (3), which has no factor lt_scale (D10).
    """
    told = negative_embeds.detach().any(-1).float()  # (B,), 1 for a clip with a negative
    margin = (audio_embeds * (text_embeds - negative_embeds)).sum(-1)  # (B,)
    n = told.sum().clamp(min=1)  # without such a clip the loss is 0, not 0 / 0
    loss = (F.softplus(-lt_scale * margin) * told).sum() / n  # Eq. (3)
    # T-Classify asks for s > s', so a tie is wrong (Sec. 3.3)
    return loss, ((margin.detach() > 0) * told).sum() / n


def training_loss(cfg: Config, audio_embeds, text_embeds, negative_embeds, scale):
    """Outputs of Model.forward in this process -> loss, sim (B, B), losses, over all processes.

    Source: Eq. (1), whose division by the norms is in Model.forward, and Eq. (2).
    """
    audio_embeds = common.gather_with_grad(audio_embeds)  # from here on B is the whole batch
    text_embeds = common.gather_with_grad(text_embeds)
    negative_embeds = common.gather_with_grad(negative_embeds)
    sim = audio_embeds @ text_embeds.T  # (B, B), cosines of unit vectors: Eq. (1)
    contrastive = contrastive_loss(sim, scale)  # positives only, of all sets (D13)
    temporal, order = temporal_loss(audio_embeds, text_embeds, negative_embeds, cfg.lt_scale)
    loss = contrastive + cfg.lt_weight * temporal  # Eq. (2)
    losses = {"loss_c": contrastive}
    if cfg.lt_weight:
        losses |= {"loss_t": temporal, "order_accuracy": order}
    return loss, sim.detach(), losses


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def has_negatives(row: dict) -> bool:
    return any(row.get("negatives", []))


def texts_of(rows: list[dict]) -> list[str]:
    """Captions and negatives, for a vocabulary."""
    texts = []
    for row in rows:
        texts += row["captions"] + [text for text in row.get("negatives", []) if text]
    return texts


def split_sets(rows: list[dict], as_read: list[dict] | None = None) -> list[list[dict]]:
    """-> rows of the manifests with negatives, rows of the manifests without.

    as_read: the training rows before split_train_val merged them by file and held some out
    (default: rows).
    """

    def manifest(row):
        return row["where"].rpartition(":")[0]  # where: "FILE:LINE"

    # by manifest, so that a clip without a negative stays with the rest of its set
    ordered = {manifest(row) for row in as_read or rows if has_negatives(row)}
    first = [row for row in rows if has_negatives(row) or manifest(row) in ordered]
    second = [row for row in rows if not has_negatives(row) and manifest(row) not in ordered]
    return [first, second]


def clip_counts(sizes: list[int], batch_size: int, mix: float) -> list[int]:
    """Number of clips per batch from each of the two groups: 1 : mix, or all from the non-empty
    group if one is empty (D6).
    """
    if 0 in sizes:
        return [min(size, batch_size) for size in sizes]
    first = max(1, round(batch_size / (1 + mix)))  # 512 at 1 : 4 are 102 and 410
    return [min(sizes[0], first), min(sizes[1], batch_size - first)]


def mixed_batches(sizes, counts, seed: int, start_step: int, total_steps: int):
    """Yield this process's share of every batch as [(group, epoch, index), ...].

    Each group is shuffled anew every epoch. Clips that do not fill a batch's share are left out of
    that epoch.
    """
    rank, world = common.rank_and_world()
    orders = [(None, None), (None, None)]  # per group: its epoch, and the order of its clips
    for step in range(start_step, total_steps):
        batch = []
        for group, (size, count) in enumerate(zip(sizes, counts)):
            if count:
                epoch, place = divmod(step, size // count)  # from the step alone, for --resume
                if orders[group][0] != epoch:
                    orders[group] = (
                        epoch,
                        np.random.default_rng((seed, group, epoch)).permutation(size),
                    )
                chosen = orders[group][1][place * count : (place + 1) * count]
                batch += [(group, epoch, int(i)) for i in chosen]
        # ordered clips come first, so the stride gives each process its share of them
        yield batch[rank::world]


class Clips(Dataset):
    """One item per clip, with one of its captions. A key is (group, epoch, index), which seeds the
    crop and the choice of the caption. An item's last entry is the file's name (common.Readable).
    """

    def __init__(self, groups: list[list[dict]], cfg: Config, tokenize, sample_rate: int):
        self.groups, self.cfg, self.tokenize, self.rate = groups, cfg, tokenize, sample_rate

    def __getitem__(self, key):
        group, epoch, index = key
        row = self.groups[group][index]
        rng = np.random.default_rng((self.cfg.seed, *key))
        chosen = int(rng.integers(len(row["captions"])))  # D7
        negatives = row.get("negatives", []) if self.cfg.lt_weight else []
        negative = negatives[chosen] if chosen < len(negatives) else None  # D14
        waveform = common.read_audio(  # D1, D2
            row["audio"], self.rate, WINDOW_S, rng, expected_s=row.get("duration")
        )
        return waveform, row["captions"][chosen], negative, row["audio"]

    def collate(self, items) -> dict:
        """-> the arguments of Model.forward."""
        waveforms, captions, negatives, _ = zip(*items)
        window = int(WINDOW_S * self.rate)
        ordered = [i for i, negative in enumerate(negatives) if negative]
        tokens = self.tokenize([*captions, *(negatives[i] for i in ordered)])  # (B + ordered, L)
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
    """Retrieval and, where rows have negatives, T-Classify (text to audio) -> scores, chance
    levels.
    """
    rows, audio_embeds, _ = common.embed_validation(model, rows, quiet=quiet)
    captions = [row["captions"] for row in rows]
    scores, chance, _ = common.caption_retrieval(model, audio_embeds, None, captions)
    pairs = [
        (i, caption, negative)
        for i, row in enumerate(rows)
        for caption, negative in zip(row["captions"], row.get("negatives", []))
        if negative
    ]
    if pairs:
        clips = audio_embeds[[i for i, _, _ in pairs]]
        right = common.embed_texts(model, [caption for _, caption, _ in pairs])
        wrong = common.embed_texts(model, [negative for _, _, negative in pairs])
        margin = (clips * (right - wrong)).sum(1)
        scores["t_classify_t2a"], chance["t_classify_t2a"] = float((margin > 0).mean()), 0.5
    return scores, chance


def main(cfg: Config) -> dict:
    """Train -> best_step, n_clips, scores and chance of the best checkpoint on the validation
    split, as in eval.json; {} without validation clips.
    """
    run = common.Run(cfg, METHOD)

    # Data
    rows = common.read_manifest(cfg.data)
    train_rows, val_rows = common.split_train_val(rows, cfg.seed)
    common.require(train_rows + val_rows, "captions")
    groups = split_sets(train_rows, [r for r in rows if r.get("split", "train") == "train"])
    sizes = [len(group) for group in groups]
    if cfg.lt_weight and not sizes[0]:
        raise ValueError(
            "no training row has a negative, so the temporal loss has nothing to learn from; make "
            "them with python -m tools.captions rewrite --task negatives, or give --lt-weight 0 "
            "for plain contrastive training"
        )
    counts = clip_counts(sizes, cfg.batch_size, cfg.mix)
    common.check_batch(cfg, sum(counts), len(train_rows), "clip")

    # Model
    checkpoint = run.checkpoint()
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = Model.from_checkpoint(run.path / "last.pt")
    else:
        model = start_model(cfg, texts_of(train_rows))
        if cfg.weights != "none":
            run.starts_from()
    model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=cfg.lr, fused=True)  # no weight decay (D5)

    clips = Clips(groups, cfg, model.text_encoder.tokenize, model.sample_rate)
    with_negative = sum(map(has_negatives, groups[0]))
    forward = run.begin(
        model,
        optimiser,
        cfg.steps,
        len(train_rows),
        f"{sizes[0]} clips of sets with negatives ({with_negative} have one), {sizes[1]} of sets "
        f"without, {len(val_rows)} clips for validation; batches of {counts[0]} + {counts[1]} "
        f"clips, ln B = {math.log(sum(counts)):.2f}",
        checkpoint,
        shape=model.shape,
        warmup_steps=cfg.warmup_steps,
    )
    if cfg.weights != "none" and val_rows and run.rank == 0 and not checkpoint:
        run.log_scores(validate(model, val_rows)[0])  # before fine-tuning
    sampler = mixed_batches(sizes, counts, cfg.seed, run.step, cfg.steps)

    def loss_of(*outputs):
        return training_loss(cfg, *outputs)

    # Loop; parts: the micro-batches of a batch, usually one
    for parts in run.batches(clips, sampler):
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * common.warmup_cosine(run.step, cfg.warmup_steps, cfg.steps)

        optimiser.zero_grad(set_to_none=True)
        loss, sim, losses = common.cached_backward(  # D8, D9
            forward, parts, loss_of, run.reseed, run.autocast, cfg.micro_batch
        )
        optimiser.step()
        with torch.no_grad():
            model.logit_scale_a.clamp_(0, math.log(100))  # the scale stays in [1, 100] (D11)

        run.step_done(loss, sim, **losses, scale=model.logit_scale_a.exp())
        if run.is_due(cfg.eval_steps):
            score, scores = run.step, {}  # without validation clips the last step wins
            if val_rows and run.rank == 0:
                scores, _ = validate(model, val_rows)
                score = (scores["t2a_mAP@10"] + scores["a2t_mAP@10"]) / 2  # D5
            run.keep_best(score, scores)
        run.save_if_due()

    # Result: the best checkpoint on the validation split
    if run.rank > 0 or not val_rows:
        return {}
    model = Model.from_checkpoint(run.path / "best.pt").to(run.device)
    scores, chance = validate(model, val_rows, quiet=False)
    result = run.finish(scores, chance, len(val_rows))
    if cfg.lt_weight:
        run.say_next("no temporal loss", lt_weight=0.0)
    else:
        run.say_next("another seed", seed=cfg.seed + 1)
    return result


# ------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------


FUSED = (
    "a CLAP with feature fusion: its audio encoder has branches for long audio that this model "
    "does not have; take the file without fusion (laion/clap-htsat-unfused, 630k-best.pt)"
)


def htsat_size(weights: dict, prefix: str) -> dict:
    """dim, depths, heads of an HTS-AT, from the shapes of its weights; LAION's if keys are
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
            depths[layer] = max(depths.get(layer, 0), int(found[2]) + 1)
            heads[layer] = value.shape[1]  # table (offsets, heads)
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
            r"audio_branch\.|(audio|text)_transform\.|"
            r"text_branch\.embeddings\.(position|token_type)_ids$",
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
            # ClapTextModel is a copy of RobertaModel, names included
            key = key.replace("text_model.", "text_encoder.model.")
            state[
                key.replace("projection.linear1", "projection.0").replace(
                    "projection.linear2", "projection.2"
                )
            ] = value
    return state


def _transformers_clap(name):
    """-> TextEncoder (weights not loaded yet), ClapConfig, state dict, LogMel arguments."""
    with common.from_hub(f"{name}: not a weight file,") as transformers:
        config = common.transformers_config(name)
    if config.model_type != "clap":
        raise ValueError(
            f"{name}: a transformers model of type {config.model_type!r}; expected 'clap'"
        )
    if config.audio_config.enable_fusion:
        raise ValueError(f"{name}: {FUSED}")
    with common.from_hub(f"{name}:"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        weights = transformers.ClapModel.from_pretrained(
            name, config=config, dtype=torch.float32
        ).state_dict()
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
    common.run_entry(main, common.cli, Config, __doc__)
