"""T-CLAP's model, which is LAION-CLAP: HTS-AT and RoBERTa, one vector each, 48 kHz.

Yuan, Chen, Liu, Kang, Liu, Xie, Wang: "T-CLAP: Temporal-Enhanced Contrastive Language-Audio
Pretraining", arXiv:2404.17806. No code or weights were released; T-CLAP fine-tunes LAION-CLAP
(Wu et al., ICASSP 2023; github.com/LAION-AI/CLAP), which this file loads and evaluates. T-CLAP's own
training is not in it yet.

Letters: B clips, S samples, T frames (32 of 0.3125 s in 10 s), D joint dimension 512.

Deviations from LAION's inference code
  D1  The waveform is not rounded to int16 and back (LAION does so in its Python API only).
  D2  Audio over 10 s is cut into consecutive windows, never cropped at random. A window that is not
      full is tiled as often as it fits whole, then zero-padded, as LAION does ("repeatpad").
  D3  Frames (embed_frames) are projected one by one; neither paper uses them.

Run:  python eval.py laion/clap-htsat-unfused --data MANIFEST --protocol all
      python eval.py 630k-best.pt --text-model roberta-base --data MANIFEST
"""
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

WINDOW_S = 10.0  # LAION's training crop
MAX_TOKENS = 77  # LAION's padding and truncation length


class Model(nn.Module):
    """LAION-CLAP without feature fusion.

    Args
        text_encoder: a common.TextEncoder that kept its pooler (RoBERTa's tanh layer on <s>).
        audio: HTS-AT's dim, depths, heads; joint_dim: D; mel: keyword arguments of common.LogMel.
    """

    window_s = WINDOW_S
    clean_caption = staticmethod(lambda text: text)  # LAION's basic path tokenises captions as they are

    def __init__(self, text_encoder: common.TextEncoder, audio: dict, joint_dim: int = 512, mel: dict | None = None):
        super().__init__()
        mel = {"sample_rate": 48000, "n_fft": 1024, "hop": 480, "n_mels": 64, "fmin_hz": 50, "fmax_hz": 14000, **(mel or {})}
        self.sample_rate, self.log_mel = mel["sample_rate"], common.LogMel(**mel)
        self.audio_encoder, self.text_encoder = common.HTSAT(**audio), text_encoder
        self.frame_s = WINDOW_S / self.audio_encoder.n_frames
        head = lambda dim: nn.Sequential(nn.Linear(dim, joint_dim), nn.ReLU(), nn.Linear(joint_dim, joint_dim))  # noqa: E731
        self.audio_projection, self.text_projection = head(self.audio_encoder.out_dim), head(text_encoder.out_dim)
        self.logit_scale_a = nn.Parameter(torch.tensor(1 / 0.07).log())  # logs of the factors on cosines;
        self.logit_scale_t = nn.Parameter(torch.tensor(1 / 0.07).log())  # LAION's plain loss uses the first

    @torch.no_grad()
    def embed_audio(self, waveform, n_samples=None):
        """waveform (B, S) in [-1, 1] at `sample_rate`, n_samples (B,) valid ones -> (B, D), normalised; never random."""
        with common.evaluating(self):
            frame_feats, owner, weight = self._window_feats(waveform, n_samples)
            embeds = F.normalize(self.audio_projection(frame_feats.mean(1)), dim=-1) * weight[:, None]
            total = embeds.new_zeros(len(waveform), embeds.shape[1])
            return F.normalize(total.index_add(0, owner.to(embeds.device), embeds), dim=-1)

    @torch.no_grad()
    def embed_frames(self, waveform, n_samples=None):
        """As embed_audio -> frames (B, T, D), normalised, every `frame_s` seconds (D3); zeros behind a clip's last window."""
        with common.evaluating(self):
            frame_feats, owner, _ = self._window_feats(waveform, n_samples)
            frames = F.normalize(self.audio_projection(frame_feats), dim=-1)
            return nn.utils.rnn.pad_sequence([frames[owner == b].flatten(0, 1) for b in range(len(waveform))], True)

    def _window_feats(self, waveform, n_samples):
        n_samples = torch.full((len(waveform),), waveform.shape[1]) if n_samples is None else n_samples
        window = int(WINDOW_S * self.sample_rate)
        windows, owner, weight = common.cut_windows(waveform, n_samples, window)
        valid = (weight.cpu() * n_samples[owner.cpu()]).round().long().tolist()
        for piece, n in zip(windows, valid):  # D2
            piece[:window // n * n] = piece[:n].repeat(window // n)
        return torch.cat([self.audio_encoder(self.log_mel(part)) for part in windows.split(32)]), owner, weight

    @torch.no_grad()
    def embed_text(self, texts: list[str]):
        """-> (B, D), normalised."""
        with common.evaluating(self):
            tokens = {k: v.to(self.logit_scale_a.device) for k, v in self.text_encoder.tokenize(texts).items()}
            hidden = self.text_encoder(tokens["input_ids"], tokens["attention_mask"])
            pooled = self.text_encoder.model.pooler(hidden)  # tanh(dense(<s>))
            return F.normalize(self.text_projection(pooled), dim=-1)

    @classmethod
    def from_published(cls, source, text_model: str = "roberta-base"):
        """A transformers CLAP folder or hub id, or a LAION-CLAP .pt file (then with `text_model`'s tokenizer)."""
        if Path(source).is_file():
            weights = common.read_weights(source)
            weights = weights.get("state_dict", weights)
            weights = {k.removeprefix("module."): v for k, v in weights.items()}
            if any("mel_conv2d" in k or "fusion_model" in k for k in weights):
                raise ValueError(f"{source}: {FUSED}")
            text_encoder = common.text_encoder_from_pretrained(text_model, MAX_TOKENS, pooler=True)
            model = cls(text_encoder, htsat_size(weights, "audio_branch."), _rows(weights, "audio_projection.0.weight"))
            state = laion_state(weights)
        else:
            text_encoder, config, weights, mel = _transformers_clap(source)
            audio = config.audio_config
            model = cls(text_encoder, dict(
                dim=audio.patch_embeds_hidden_size, depths=audio.depths, heads=audio.num_attention_heads, patch=audio.patch_size,
                window=audio.window_size, spec_size=audio.spec_size, n_mels=audio.num_mel_bins), config.projection_dim, mel)
            state = transformers_state(weights)
        common.load_strict(model, state, source)
        return model.eval()


FUSED = ("a CLAP with feature fusion: its audio encoder has branches for long audio that no paper here uses; take the file "
         "without fusion (laion/clap-htsat-unfused, 630k-best.pt)")


def _rows(weights: dict, key: str) -> int:
    return len(weights[key]) if key in weights else 512


def htsat_size(weights: dict, prefix: str) -> dict:
    """dim, depths and heads of an HTS-AT, read from the shapes of its weights; the paper's where keys are missing."""
    depths, heads = {}, {}
    for key, value in weights.items():
        found = re.match(re.escape(prefix) + r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$", key)
        if found:
            layer = int(found[1])
            depths[layer], heads[layer] = max(depths.get(layer, 0), int(found[2]) + 1), value.shape[1]
    if sorted(depths) != [0, 1, 2, 3]:
        depths, heads = dict(enumerate((2, 2, 6, 2))), dict(enumerate((4, 8, 16, 32)))
    return dict(dim=len(weights.get(prefix + "patch_embed.proj.weight", range(96))),
                depths=[depths[i] for i in range(4)], heads=[heads[i] for i in range(4)])


def laion_state(weights: dict) -> dict:
    """LAION's names -> ours. Unknown names stay, so that strict loading lists them."""
    audio = common.htsat_state({k.removeprefix("audio_branch."): v for k, v in weights.items() if k.startswith("audio_branch.")})
    state = {f"audio_encoder.{k}": v for k, v in audio.items()}
    for key, value in weights.items():
        # the MLP heads are trained but unused without LAION's mlp_loss
        if not re.match(r"audio_branch\.|(audio|text)_transform\.|text_branch\.embeddings\.(position|token_type)_ids$", key):
            state[key.replace("text_branch.", "text_encoder.model.")] = value
    return state


def transformers_state(weights: dict) -> dict:
    """transformers ClapModel's names -> ours."""
    audio = common.htsat_state({k: v for k, v in weights.items() if k.startswith("audio_model.")})
    state = {f"audio_encoder.{k}": v for k, v in audio.items()}
    for key, value in weights.items():
        if not re.match(r"audio_model\.|text_model\.embeddings\.(position|token_type)_ids$", key):
            key = key.replace("text_model.", "text_encoder.model.")
            state[key.replace("projection.linear1", "projection.0").replace("projection.linear2", "projection.2")] = value
    return state


def _transformers_clap(name):
    """-> TextEncoder (its weights not yet those of the file), ClapConfig, state dict, LogMel arguments."""
    transformers = common.quiet_transformers()
    try:
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except ValueError:
            raise ValueError(f"{name}: not a model folder; expected a transformers CLAP with its config.json, or a weight file") from None
        if config.model_type != "clap":
            raise ValueError(f"{name}: a transformers model of type {config.model_type!r}; expected 'clap'")
        if config.audio_config.enable_fusion:
            raise ValueError(f"{name}: {FUSED}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        weights = transformers.ClapModel.from_pretrained(name, dtype=torch.float32).state_dict()
    except OSError as error:
        raise ValueError(f"{name}: neither a checkpoint file nor a CLAP folder, and not to be had from the hub "
                         f"({str(error).strip().splitlines()[0]})") from None
    text = config.text_config.to_dict()
    text.pop("model_type")
    text_encoder = common.TextEncoder(transformers.RobertaModel(transformers.RobertaConfig(**text)), tokenizer, MAX_TOKENS, pooler=True)
    try:
        given = transformers.AutoFeatureExtractor.from_pretrained(name).to_dict()
    except (OSError, ValueError):  # a folder without preprocessor_config.json: LAION's settings
        given = {}
    names = {"sampling_rate": "sample_rate", "fft_window_size": "n_fft", "hop_length": "hop", "feature_size": "n_mels",
             "frequency_min": "fmin_hz", "frequency_max": "fmax_hz"}
    mel = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return text_encoder, config, weights, mel
