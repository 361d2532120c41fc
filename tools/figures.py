"""Pictures: of a trained model on a manifest, and of the stored runs behind the results.

  python -m tools.figures runs/mga_clap-1/best.pt --data data/scenes --out pictures
  python -m tools.figures runs/cacophony-1/mae.pt --data data/scenes --only reconstructions
  python -m tools.figures results --data data --runs runs/claims --out results/pictures

Needs matplotlib. A picture is drawn if the model and the manifest support it: learning (the run's
log), frames (cosines over time), gap (both modalities in a plane), order (margins of T-Classify),
noise (only if it is named: it embeds the audio six times more), attention (CoLLAT), maps
(MGA-CLAP's last block and codewords), reconstructions (Cacophony's stage 1).
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cacophony
import collat
import common
import curation_clap
import eval as evaluation
import mga_clap
from eval import class_prompts
from tools import downstream

ROOT = Path(__file__).resolve().parent.parent


def pyplot():
    """matplotlib without a screen; the error says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "pictures need matplotlib; install it with: pip install matplotlib (uv: uv run --extra "
            "plot)"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# ------------------------------------------------------------------------------------------------
# Pictures of a model
# ------------------------------------------------------------------------------------------------


def save(figure, path: Path, dpi: int) -> None:
    """Write a picture atomically."""
    with common.written_whole(Path(path)) as file:
        figure.savefig(file, dpi=dpi, format="png")


def clip_order(clips, class_embeds, classes, frame_s) -> list[int]:
    """Clips with events in some but not all frames, best first by the average precision of the
    class cosines over the clip's own frames, mean over its classes."""
    quality = {}
    for i, (row, frame_embeds) in enumerate(zip(clips["rows"], clips["frame_embeds"])):
        targets = common.frame_targets(row, classes, len(frame_embeds), frame_s)
        usable = targets.any(0) & ~targets.all(0)
        if usable.any():
            quality[i] = float(
                np.mean(
                    common.class_average_precisions(
                        (frame_embeds @ class_embeds.T)[:, usable], targets[:, usable]
                    )
                )
            )
    return sorted(quality, key=quality.get, reverse=True)


def plot_frames(model, clips, classes, settings, folder: Path) -> list[Path]:
    """Plot the cosine of frames and the prompt of each class in the clip, with true events shaded.
    The second column subtracts the frame's mean over all classes.

    The clips are the two best and the two worst by `clip_order`, not chosen by hand. As Fig. 1, 8
    and 9 of MGA-CLAP.
    """
    plt, class_embeds = pyplot(), common.embed_texts(model, class_prompts(classes, settings))
    order, paths = clip_order(clips, class_embeds, classes, model.frame_s), []
    for label, i in [
        *((f"best{k + 1}", i) for k, i in enumerate(order[:2])),
        *((f"worst{k + 1}", i) for k, i in enumerate(order[:1:-1][:2])),
    ]:
        row, cosines = clips["rows"][i], clips["frame_embeds"][i] @ class_embeds.T
        names = [c for c in classes if any(e["label"] == c for e in row["events"])]
        figure, axes = plt.subplots(
            len(names),
            2,
            figsize=(11, 1.2 + 1.6 * len(names)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        edges = np.arange(len(cosines) + 1) * model.frame_s
        centred = cosines - cosines.mean(1, keepdims=True)
        for column, (what, shown) in enumerate((("cosine", cosines), ("centred", centred))):
            for axis, name in zip(axes[:, column], names):
                # stairs, so that the first and the last frame are as wide as the others
                axis.stairs(shown[:, classes.index(name)], edges, baseline=None, linewidth=1.5)
                for event in row["events"]:
                    if event["label"] == name:
                        axis.axvspan(
                            event["onset"], event["offset"], alpha=0.25, color="tab:green", lw=0
                        )
                axis.set_ylabel(what)
                prompt = repr(evaluation.class_prompts([name], settings)[0])
                axis.set_title(prompt + ", true event shaded", fontsize=9, loc="left")
            axes[-1, column].set_xlabel("time (s)")
            axes[-1, column].set_xlim(0, row.get("duration") or edges[-1])
        figure.suptitle(f"{label}: {Path(row['audio']).name}", fontsize=10)
        paths.append(folder / f"frames_{label}.png")
        save(figure, paths[-1], 110)
        plt.close(figure)
    return paths


def principal_plane(vectors: np.ndarray):
    """vectors (N, D) -> first two principal components (N, 2), their shares of variance (2,)."""
    left, size, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    return left[:, :2] * size[:2], size[:2] ** 2 / (size**2).sum()


def plot_gap(model, clips, folder: Path) -> list[Path]:
    """Plot clips and their first captions in the plane of their joint principal components (numpy's
    SVD). Lines join forty evenly spaced pairs. Cacophony draws UMAP, which needs a further package
    and does not preserve distances.
    """
    plt, rows = pyplot(), clips["rows"]
    texts = common.embed_texts(model, [model.clean_caption(row["captions"][0]) for row in rows])
    points, share = principal_plane(np.concatenate([clips["audio_embeds"], texts]))
    audio, text = points[: len(rows)], points[len(rows) :]
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for k in np.unique(np.linspace(0, len(rows) - 1, 40).astype(int)):
        axis.plot(*zip(audio[k], text[k]), color="gray", lw=0.5, zorder=1)
    axis.scatter(*audio.T, s=8, label="audio")
    axis.scatter(*text.T, s=8, label="text")
    axis.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)")
    axis.set_ylabel(f"second ({share[1]:.0%})")
    axis.set_title("embeddings of clips and captions, PCA of both together", fontsize=10)
    axis.legend()
    save(figure, folder / "gap.png", 110)
    plt.close(figure)
    return [folder / "gap.png"]


def plot_order(results: dict, folder: Path, note: str = "") -> Path:
    """Plot histograms of the margin of the true order, per direction and model, with logarithmic
    counts. results: {name: a result of t_classify}. note: the title.
    """
    plt = pyplot()
    ways = {
        "t2a": "cosine to the caption less that to its negative",
        "a2t": "cosine to the clip less that to the swapped audio",
    }
    ways = {
        way: text
        for way, text in ways.items()
        if any(way in r["details"]["margins"] for r in results.values())
    }
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.5 * len(ways), 3), squeeze=False, layout="constrained"
    )
    for axis, (way, text) in zip(axes[0], ways.items()):
        widest = (
            max(np.abs(r["details"]["margins"].get(way, [0])).max() for r in results.values()) or 1
        )
        for name, r in results.items():
            if way in r["details"]["margins"]:
                axis.hist(
                    r["details"]["margins"][way],
                    np.linspace(-widest, widest, 42),
                    alpha=0.6,
                    label=f"{name}: {r['scores'][way]['value']:.1%} right, "
                    f"{len(r['details']['margins'][way])} pairs",
                )
        axis.axvline(0, color="black", lw=1)
        axis.set_yscale("log")
        # bars of one pair stay visible, and the legend fits above the bars
        axis.set_ylim(0.5, 6 * axis.get_ylim()[1])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(text)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("pairs")
    if note:
        figure.suptitle(note, fontsize=9)
    save(figure, folder / "order.png", 100)
    plt.close(figure)
    return folder / "order.png"


def plot_noise(r: dict, folder: Path) -> Path:
    """Plot the score against the signal-to-noise ratio. Lines show the clean score and that with
    noise of standard deviation 0.1.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    scores = {name.partition("_")[2]: s for name, s in r["scores"].items()}
    levels = sorted(int(name[3:]) for name in scores if name.startswith("snr"))
    at = [scores[f"snr{db}"] for db in levels]
    axis.plot(levels, [s["value"] for s in at], marker="o", label="noise of that power")
    if all(s["low"] is not None for s in at):
        axis.fill_between(
            levels,
            [s["low"] for s in at],
            [s["high"] for s in at],
            alpha=0.2,
            lw=0,
            label="95 % interval",
        )
    axis.axhline(scores["clean"]["value"], color="black", lw=1, label="clean")
    axis.axhline(
        scores["std0.1"]["value"], color="tab:red", ls="--", lw=1, label="standard deviation 0.1"
    )
    axis.axhline(next(iter(r["chance"].values())), color="gray", ls=":", lw=1, label="chance")
    axis.set_xlabel("signal-to-noise ratio (dB)")
    axis.set_ylabel(next(iter(r["scores"])).partition("_")[0])
    axis.set_ylim(0, 1.02)
    axis.set_title(f"zero-shot scores under Gaussian noise, {r['n_clips']} clips", fontsize=10)
    axis.legend(fontsize=8)
    save(figure, folder / "noise.png", 110)
    plt.close(figure)
    return folder / "noise.png"


FUNCTION_WORDS = set(
    "a an the and or of in on at is are was be being to as with by for from it its while then "
    "there this that into over".split()
)


def content_tokens(tokens: list[str]) -> list[tuple[int, str]]:
    """Index and text of the content tokens: no special tokens, punctuation, function words or
    pieces of words.
    """
    # marks of words: </w> ends one (CLIP), \u0120 (byte-level BPE) or \u2581 (SentencePiece)
    # begins one, ## continues one (WordPiece)
    ends = any(token.endswith("</w>") for token in tokens)
    begins = any(token[:1] in ("\u0120", "\u2581") for token in tokens)
    found = []
    for k, token in enumerate(tokens):
        before, after = tokens[k - 1] if k else "", tokens[k + 1] if k + 1 < len(tokens) else ""
        if ends:
            whole = token.endswith("</w>") and (before.endswith("</w>") or before.startswith("<"))
        elif begins:
            next_ends = after[:1] in ("\u0120", "\u2581", "<", "") or not after[:1].isalnum()
            whole = (token[:1] in ("\u0120", "\u2581") or before.startswith("<")) and next_ends
        else:
            whole = not token.startswith("##") and not after.startswith("##")
        word = token.removesuffix("</w>").lstrip("\u0120\u2581")
        if whole and re.fullmatch(r"[\w'-]+", word) and word.lower() not in FUNCTION_WORDS:
            found.append((k, word))
    return found


def plot_attention(model, rows: list[dict], folder: Path, n_tokens: int = 5) -> Path:
    """Plot three evenly spaced clips with captions, first window only: the log-mel spectrogram, and
    the share of attention over it from the slot of each of the first content tokens of the first
    caption (dark: most).
    """
    plt = pyplot()
    usable = [row for row in rows if row.get("captions")]
    usable = [usable[k] for k in np.unique(np.linspace(0, len(usable) - 1, 3).astype(int))]
    log_mel = common.LogMel(
        model.sample_rate, 512, model.sample_rate // 100, 64, 20, model.sample_rate // 2
    )
    figure, axes = plt.subplots(
        1 + n_tokens,
        len(usable),
        figsize=(4.2 * len(usable), 1.3 * (2 + n_tokens)),
        squeeze=False,
        layout="constrained",
    )
    for column, row in zip(axes.T, usable):
        waveform = torch.from_numpy(
            common.read_audio(row["audio"], model.sample_rate, model.window_s)
        )[None]
        seconds, text = (
            waveform.shape[1] / model.sample_rate,
            model.clean_caption(row["captions"][0]),
        )
        padded = torch.nn.functional.pad(
            waveform, (0, round(model.window_s * model.sample_rate) - waveform.shape[1])
        )
        (tokens,), (maps,) = model.token_attention(
            padded.to(next(model.parameters()).device), [text]
        )
        column[0].imshow(
            log_mel(waveform)[0].T.clamp(min=-80),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, 64),
            cmap="magma",
        )
        column[0].set_title(text if len(text) < 60 else text[:57] + "...", fontsize=8)
        for axis, (k, word) in zip(column[1:], content_tokens(tokens)[:n_tokens]):
            share = np.asarray(maps[k], dtype=float)  # (F, T)
            axis.imshow(
                share,
                origin="lower",
                aspect="auto",
                extent=(0, share.shape[1] * model.patch_s, 0, len(share)),
                cmap="Greys",
                vmin=0,
            )
            axis.set_title(word, fontsize=9, loc="left", pad=2)
            axis.set_xlim(0, seconds)
        for axis in column:
            axis.set_yticks([])
            axis.tick_params(labelsize=7)
            axis.set_visible(bool(axis.images))
        [axis for axis in column if axis.images][-1].set_xlabel("time (s)", fontsize=8)
    axes[0, 0].set_ylabel("mel band", fontsize=8)
    save(figure, folder / "attention.png", 80)
    plt.close(figure)
    return folder / "attention.png"


def plot_learning(checkpoint: Path, folder: Path) -> list[Path]:
    """Plot all that the run logged in its last stage (loss, in-batch R@1, ...) and its validations,
    from the log beside the checkpoint.
    """
    path = Path(checkpoint).parent / "log.jsonl"
    if not path.exists():
        return []
    plt, lines = pyplot(), []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # a run that is still writing, or was killed
            break
    if not lines:
        return []
    lines = [line for line in lines if line.get("stage") == lines[-1].get("stage")]
    validations = [line for line in lines if "validation" in line]
    lines = [line for line in lines if "validation" not in line]
    if not lines:
        return []
    keys = [
        k
        for k in lines[0]
        if k != "stage"
        and all(k in line for line in lines)
        and k not in ("step", "epoch", "ln_B", "skipped", "pairs_per_s")
    ]
    # the loss of guessing: ln B, or 2 ln B where both directions are added (Cacophony)
    guessing = {"loss_con": (2, "2 ln B")} if "loss_cap" in keys else {"loss": (1, "ln B")}
    n = len(keys) + bool(validations)
    figure, axes = plt.subplots(
        n, 1, figsize=(7, 1.7 * n), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes[:, 0], keys):
        axis.plot([line["step"] for line in lines], [line[key] for line in lines])
        axis.set_ylabel(key)
        if key in guessing and "ln_B" in lines[0]:
            times, name = guessing[key]
            height = times * lines[0]["ln_B"]
            axis.axhline(height, color="gray", ls=":", label=f"{name} (guessing)")
            axis.legend()
    if validations:
        steps = [line["step"] for line in validations]
        of_all = set.intersection(*(set(line["validation"]) for line in validations))
        for name in ("t2a_R@5", "a2t_R@5", "t_classify_t2a", "tagging_mAP", "val_loss"):
            if name in of_all:
                scores = [line["validation"][name] for line in validations]
                axes[-1, 0].plot(steps, scores, marker="o", markersize=4, label=name)
        axes[-1, 0].set_ylabel("validation")
        axes[-1, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("step")
    save(figure, folder / "learning.png", 110)
    plt.close(figure)
    return [folder / "learning.png"]


@torch.no_grad()
def last_block_maps(model, waveform):
    """Frame-to-frame maps of the encoder's last block, computed as for ordinary attention (without
    HTS-AT's position bias).

    waveform (1, S) -> query-key attention (T, T), mean over heads; value-value cosine (T, T), mean
    over heads. HTS-AT's two halves of the frequency band are averaged.
    """
    captured = {}
    atst = isinstance(model.audio_encoder, mga_clap.ATSTFrame)
    block = model.audio_encoder.blocks[-1] if atst else model.audio_encoder.layers[-1].blocks[-1]
    handle = block.norm1.register_forward_hook(lambda module, given, out: captured.update(x=out))
    with common.evaluating(model):
        model.frame_feats(waveform)
    handle.remove()
    x, heads = captured["x"][:1].float(), block.attn.heads  # (1, L, C)
    q, k, v = (
        block.attn.qkv(x).view(x.shape[1], 3, heads, -1).permute(1, 2, 0, 3)
    )  # (heads, L, C / heads)
    attention = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1).mean(0)
    v = F.normalize(v, dim=-1)
    maps = [attention, (v @ v.transpose(1, 2)).mean(0)]
    if (
        not atst
    ):  # cell (row, column) of the grid, rows = chunk x frequency -> frame = chunk x column
        stage, chunks = model.audio_encoder.layers[-1], model.audio_encoder.chunks
        G, f = stage.grid, stage.grid // chunks
        maps = [
            m.view(chunks, f, G, chunks, f, G).mean((1, 4)).reshape(chunks * G, chunks * G)
            for m in maps
        ]
        maps[0] = maps[0] * f  # rows sum to 1 again
    return [m.cpu().numpy() for m in maps]


def plot_maps(model, row: dict, class_names: list[str], folder: Path) -> list[Path]:
    """Pictures of one clip (its first window), as MGA-CLAP Fig. 3 and, with a codebook, Fig. 7.

    Fig. 3 shows plain CLAP and a softmax of the values; we draw their cosine. Fig. 7 draws the
    cosine of frame and codeword; we draw the affinity of Eq. (2) before its maximum.
    """
    plt, device = pyplot(), model.temperature.device
    waveform = torch.from_numpy(
        common.read_audio(row["audio"], model.sample_rate, mga_clap.WINDOW_S)
    )[None]
    waveform = F.pad(
        waveform, (0, int(mga_clap.WINDOW_S * model.sample_rate) - waveform.shape[1])
    ).to(device)
    end_s, paths = model.frame_s * model.audio_encoder.n_frames, [folder / "last_block.png"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, values, title in zip(
        axes, last_block_maps(model, waveform), ("query-key attention", "value-value cosine")
    ):
        figure.colorbar(axis.imshow(values, extent=(0, end_s, end_s, 0)), ax=axis)
        axis.set(title=f"{title}, last block", xlabel="time attended to (s)", ylabel="time (s)")
    figure.suptitle(
        Path(row["audio"]).name
        + (
            ", a locality-aware block: query and key are not used"
            if model.cfg.locality_blocks
            else ""
        ),
        fontsize=10,
    )
    save(figure, paths[0], 110)
    plt.close(figure)
    if model.cfg.aggregator == "codebook":
        with common.evaluating(model), torch.no_grad():
            frames = model.frame_feats(waveform)
            weights = mga_clap.codebook_weights(
                frames,
                model.codebook,
                model.eta,
                affinity=model.cfg.affinity,
                sparsity=model.cfg.sparsity,
            )[0]
            cosines = (
                F.normalize(model.codebook, dim=-1) @ model.embed_text(class_names).T
            )  # (K, classes)
            activity = (frames[0].float() @ model.codebook.T / model.eta).cpu().numpy()  # (T, K)
        top = weights.argsort(descending=True)[:5].tolist()
        figure, axes = plt.subplots(
            len(top),
            1,
            figsize=(8, 1.4 * len(top)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, codeword in zip(axes[:, 0], top):
            nearest = cosines[codeword].argsort(descending=True)[:3].tolist()
            edges = np.arange(len(activity) + 1) * model.frame_s
            axis.stairs(activity[:, codeword], edges, baseline=None, linewidth=1.5)
            axis.set_xlim(0, edges[-1])
            for event in row.get("events", []):
                axis.axvspan(event["onset"], event["offset"], alpha=0.15, color="tab:green", lw=0)
            axis.set_title(
                f"codeword {codeword}, weight {weights[codeword]:.3f}, nearest: "
                + ", ".join(f"{class_names[c]} ({cosines[codeword, c]:.2f})" for c in nearest),
                fontsize=9,
                loc="left",
            )
        axes[-1, 0].set_xlabel(
            "time (s); events shaded: "
            + ", ".join(
                f"{e['label']} {e['onset']:.1f}-{e['offset']:.1f}" for e in row.get("events", [])
            )
        )
        figure.supylabel("affinity", fontsize=9)
        figure.suptitle(f"the five heaviest codewords of {Path(row['audio']).name}", fontsize=10)
        paths.append(folder / "codewords.png")
        save(figure, paths[-1], 110)
        plt.close(figure)
    return paths


@torch.no_grad()
def plot_reconstructions(model: cacophony.MAE, dataset: cacophony.Clips, path: Path) -> Path:
    """Plot the first two clips at least as loud as the median of the first twenty readable ones:
    spectrogram, visible patches, target (each patch normalised) and reconstruction.
    """
    plt = pyplot()
    readable = common.Readable(dataset, 0)
    items = [readable[0, i] for i in range(min(20, len(dataset.rows)))]
    items = [item for item in items if not isinstance(item, common.AudioError)]
    levels = [float(dataset.collate([item])["patches"].mean()) for item in items]
    items = [item for item, level in zip(items, levels) if level >= np.median(levels)][:2]
    figure, axes = plt.subplots(
        4, len(items), figsize=(5.5 * len(items), 9), squeeze=False, layout="constrained"
    )
    device = model.mask_token.device
    for column, item in zip(axes.T, items):
        batch = common.to_device(dataset.collate([item]), device)
        torch.manual_seed(0)
        painted, visible_mask = model.paint(**batch)
        whole, target = batch["patches"], cacophony.normalised(batch["patches"])
        rows = [
            ("spectrogram: " + Path(item[-1]).name, whole),
            ("seen", torch.where(visible_mask[..., None], whole, torch.nan)),
            ("target: each patch with mean 0 and variance 1", target),
            ("painted", torch.where(visible_mask[..., None], torch.nan, painted.float())),
        ]
        for row, (axis, (title, patches)) in enumerate(zip(column, rows)):
            image = (
                patches[0]
                .view(-1, cacophony.N_FREQ, cacophony.PATCH, cacophony.PATCH)
                .transpose(1, 2)
                .reshape(-1, cacophony.N_MELS)
                .T.cpu()
            )
            low, high = (whole.min(), whole.max()) if row < 2 else (-2, 2)
            drawn = axis.imshow(
                image,
                origin="lower",
                aspect="auto",
                vmin=low,
                vmax=high,
                extent=(
                    0,
                    image.shape[1] * cacophony.HOP / cacophony.SAMPLE_RATE,
                    0,
                    cacophony.N_MELS,
                ),
            )
            figure.colorbar(drawn, ax=axis, label="log magnitude" if row < 2 else "deviations")
            axis.set_title(title, fontsize=9)
            axis.set_ylabel("mel bin")
        column[-1].set_xlabel("time (s)")
    save(figure, path, 72)
    plt.close(figure)
    return path


# ------------------------------------------------------------------------------------------------
# The pictures of results/
# ------------------------------------------------------------------------------------------------


def stored_runs():
    """Import tests/claims.py, which lists the runs; it needs the extra `test`."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import claims

    return claims


def stored_checkpoint(name: str, row: str, args) -> Path:
    """The best checkpoint of a study's row, seed 0; "start": the one its rows started from."""
    claims = stored_runs()
    study = claims.STUDIES[name]
    if row == "start":
        path = claims.start_path(study, 0, args)
    else:
        path = Path(args.runs) / claims.key_of(claims.identity(study, row, 0)) / "best.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; python tests/claims.py {name} --seeds 0 makes it, if "
            "results/runs.jsonl does not hold that run"
        )
    return path


def study_rows(name: str, args) -> list[dict]:
    """The manifest of a study's scenes."""
    return common.read_manifest([args.data / scene for scene in stored_runs().STUDIES[name].data])


def order(args) -> Path:
    """T-CLAP: by how much the true order is preferred, without and with the temporal loss."""
    study, results = stored_runs().STUDIES["t_clap"], {}
    for row in ("without L_t", "T-CLAP"):
        checkpoint = stored_checkpoint("t_clap", row, args)
        data = [str(args.data / scene) for scene in study.data]
        flags = [str(checkpoint), "--data", *data, "--split", "test", "--bootstrap", "0"]
        (results[row],) = evaluation.main(evaluation.parse([*flags, "--protocol", "t_classify"]))
    return plot_order(results, args.out, "one run each, seed 0")


def sam(args) -> Path:
    """Cacophony: training and validation loss over the steps, without and with SAM (Fig. 4)."""
    claims = stored_runs()
    study, runs, plt = claims.STUDIES["cacophony_sam"], claims.read_runs(), pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, row in enumerate(study.rows):
        found = [claims.find(runs, claims.identity(study, row, s)) for s in range(study.seeds)]
        if not any(found):
            raise FileNotFoundError(
                f"{claims.RUNS} has no run of cacophony_sam, {row}; python tests/claims.py "
                "cacophony_sam makes it"
            )
        for seed, run in enumerate(r for r in found if r):
            steps, *losses = np.array(run["curve"], float).T
            for axis, values in zip(axes, losses):
                axis.plot(steps, values, color=f"C{number}", lw=1, label="" if seed else row)
    for axis, of in zip(axes, ("training, batches of 32 pairs", "validation, 150 clips at once")):
        axis.set_xlabel("step after the fork")
        axis.set_title(of, fontsize=10)
    axes[0].set_ylabel("contrastive + captioning loss")
    axes[0].legend(fontsize=8, title="one line a seed", title_fontsize=8)
    save(figure, args.out / "sam.png", 100)
    plt.close(figure)
    return args.out / "sam.png"


def loops(args) -> Path:
    """Loss of each script at the paper's size on a GPU, from `tests/bench.py loops`."""
    path, plt = ROOT / "results/bench.json", pyplot()
    rows = [r for r in json.loads(path.read_text()) if r["name"].startswith("loop_")]
    figure, axes = plt.subplots(1, len(rows), figsize=(2.6 * len(rows), 2.4), layout="constrained")
    for axis, row in zip(axes, rows):
        axis.plot(*zip(*row["settings"]["curve"]))
        axis.set_title(row["name"].removeprefix("loop_"), fontsize=10)
        axis.set_xlabel("step")
    axes[0].set_ylabel("loss of the batch")
    figure.suptitle(rows[0]["machine"], fontsize=10)
    save(figure, args.out / "loops.png", 100)
    plt.close(figure)
    return args.out / "loops.png"


def reconstructions(args) -> Path:
    """Cacophony's stage 1: unseen test scenes, reconstructed from a fifth of their patches."""
    rows = [row for row in study_rows("cacophony", args) if row["split"] == "test"]
    rows = [
        row for row in rows if row["labels"] in (["rooster"], ["crying_baby"])
    ] or rows  # sounds with a pattern, rather than noises
    return draw_stage_1(stored_checkpoint("cacophony", "start", args), rows, args.out)


def attention(args) -> Path:
    """CoLLAT: attention of caption tokens over the spectrogram."""
    rows = [
        row
        for row in study_rows("collat", args)
        if row["split"] == "test" and len(row["labels"]) > 1
    ]
    model = collat.Model.from_checkpoint(stored_checkpoint("collat", "CoLLAT", args))
    return plot_attention(model, rows, args.out, n_tokens=3)


def curation(args) -> Path:
    """curation-CLAP: cosines of pool clips and annotated captions, and how often such pairs are
    right (only this picture uses the pool's labels).
    """
    model = curation_clap.Model.from_checkpoint(stored_checkpoint("curation_clap", "start", args))
    sounds = {
        caption: set(row["labels"])
        for row in study_rows("curation_clap", args)
        if row["split"] == "train"
        for caption in row["captions"]
    }
    pool = common.read_manifest(
        [args.data / scene for scene in stored_runs().STUDIES["curation_clap"].pool]
    )
    kept, audio, *_ = common.embed_files(model, pool, desc="pool")
    cosines = audio @ common.embed_texts(model, [model.clean_caption(c) for c in sounds]).T
    right = np.array(
        [
            [len(told_of & set(pool[i]["labels"])) / len(told_of) for told_of in sounds.values()]
            for i in kept
        ]
    )
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    edges = np.linspace(cosines.min(), cosines.max(), 30)
    axis.hist(cosines.ravel(), edges, color="lightgray")
    axis.set_yscale("log")
    axis.set_xlabel("teacher's cosine of clip and caption")
    axis.set_ylabel("pairs")
    second, levels = (
        axis.twinx(),
        np.quantile(cosines, [0, 0.5, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999]),
    )
    second.plot(levels, [right[cosines >= level].mean() for level in levels], marker="o")
    second.axhline(right.mean(), color="tab:blue", ls=":", lw=1)
    second.set_ylabel(
        "share of the caption's sounds present,\nof pairs above the cosine (dotted: all)",
        color="tab:blue",
    )
    second.set_ylim(0, 1)
    axis.set_title(
        f"{len(kept):,} clips without captions, {len(sounds):,} annotated captions", fontsize=10
    )
    save(figure, args.out / "curation.png", 100)
    plt.close(figure)
    return args.out / "curation.png"


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

OF_A_MODEL = ("learning", "frames", "gap", "order", "attention", "maps", "noise", "reconstructions")
OF_RESULTS = {f.__name__: f for f in (order, loops, reconstructions, sam, attention, curation)}


def draw_model(model, rows: list[dict], settings, names, folder: Path) -> list[Path]:
    """Draw the pictures in `names` that the model and the rows support."""
    has = {key: any(row.get(key) for row in rows) for key in ("captions", "events", "negatives")}
    with_frames = hasattr(model, "embed_frames") and has["events"]
    classes = common.read_classes(settings.data, settings.manifest)
    clips = evaluation.embed_clips(model, rows, settings, with_frames)
    paths = []
    if "frames" in names and with_frames:
        paths += plot_frames(model, clips, classes, settings, folder)
    if "gap" in names and all(row.get("captions") for row in clips["rows"]):
        paths += plot_gap(model, clips, folder)
    if "noise" in names:
        paths.append(plot_noise(downstream.noise(model, clips, classes, settings), folder))
    if "order" in names and has["negatives"]:
        clips["swapped"] = evaluation.embed_swapped(model, clips["rows"], settings)
        r = evaluation.t_classify(model, clips, classes, settings)
        paths.append(plot_order({Path(settings.checkpoint).name: r}, folder, seed_of(settings)))
    if "attention" in names and hasattr(model, "token_attention") and has["captions"]:
        paths.append(plot_attention(model, clips["rows"], folder))
    if "maps" in names and isinstance(model, mga_clap.Model) and classes:
        prompts, best = class_prompts(classes, settings), 0
        if with_frames:
            class_embeds = common.embed_texts(model, prompts)
            best = next(iter(clip_order(clips, class_embeds, classes, model.frame_s)), 0)
        paths += plot_maps(model, clips["rows"][best], prompts, folder)
    return paths


def seed_of(settings) -> str:
    """ "seed 0" of a run's checkpoint, "" of other models."""
    path = Path(settings.checkpoint)
    config = common.read_weights(path).get("config", {}) if path.is_file() else {}
    return f"seed {config['seed']}" if "seed" in config else ""


def draw_stage_1(path: Path, rows: list[dict], folder: Path) -> Path:
    """The reconstructions of Cacophony's masked autoencoder in a run's mae.pt or last.pt."""
    content = common.read_checkpoint(path, "cacophony")
    known = {field.name for field in dataclasses.fields(cacophony.Config)}
    cfg = cacophony.Config(**{k: v for k, v in content["config"].items() if k in known})
    eps = cacophony.VARIANTS[cfg.variant]["eps"]
    model = cacophony.MAE(content["shape"], cfg.mae_layers, cfg.mask_ratio, eps).eval()
    common.load_strict(model, content["model"], path)
    return plot_reconstructions(model, cacophony.Clips(rows, cfg), folder / "reconstructions.png")


def of_models(flags) -> list[Path]:
    """Draw the pictures of each model; several models get one folder each."""
    evaluation.check_flags(flags)
    pyplot()  # raises an error early if matplotlib is missing
    manifest, split, rows = evaluation.read_rows(flags)
    names = flags.only or [name for name in OF_A_MODEL if name != "noise"]
    paths = []
    for number, checkpoint in enumerate(flags.checkpoint, 1):
        folder = Path(flags.out)
        if len(flags.checkpoint) > 1:
            folder = folder / f"model{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"--out {folder}: this folder cannot be made ({error.strerror})"
            ) from None
        path = Path(checkpoint)
        if "learning" in names:
            paths += plot_learning(path, folder)
        if path.is_file() and common.read_weights(path).get("stage") == "mae":
            if "reconstructions" in names:
                paths.append(draw_stage_1(path, rows, folder))
        elif set(names) - {"learning", "reconstructions"}:
            model, settings = evaluation.open_model(checkpoint, flags, split, manifest)
            paths += draw_model(model, rows, settings, names, folder)
    if not paths:
        raise ValueError(
            f"no picture was made: model and manifest support none of {', '.join(names)}"
        )
    return paths


def of_results(flags) -> list[Path]:
    """The pictures in results/pictures, from the runs that tests/claims.py made (seed 0)."""
    flags.out.mkdir(parents=True, exist_ok=True)
    return [OF_RESULTS[name](flags) for name in flags.names or OF_RESULTS]


def parse(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["results"]:
        parser = argparse.ArgumentParser(
            prog="python -m tools.figures results",
            description=of_results.__doc__,
            allow_abbrev=False,
        )
        parser.add_argument("names", nargs="*", choices=[*OF_RESULTS, []], help="default: all")
        parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the scenes")
        parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims", help="checkpoints")
        parser.add_argument("--out", type=Path, default=ROOT / "results/pictures")
        parser.set_defaults(draw=of_results)
        return parser.parse_args(argv[1:])
    parser = evaluation.make_parser(
        __doc__,
        json=False,
        prog="python -m tools.figures",
        epilog="results: draw the pictures of results/; see python -m tools.figures results --help",
    )
    parser.add_argument("--out", default="pictures", help="folder for the pictures")
    parser.add_argument("--only", nargs="+", choices=OF_A_MODEL, help="default: all but noise")
    parser.set_defaults(draw=of_models, noise_levels=list(downstream.NOISE))
    return parser.parse_args(argv)


def main(flags) -> list[Path]:
    paths = flags.draw(flags)
    print("pictures: " + " ".join(map(str, paths)))
    return paths


if __name__ == "__main__":
    common.run_entry(main, parse)
