"""Speed against a named peer, both measured in the same run.

  python tests/bench.py steps|loops|scaling|feed|htsat|psds|psds_large|curate|matching|all [--json
  results/bench.json]

Prints and writes a list of {"name", "ours", "peer", "peer_name", "unit", "ratio", "machine",
"settings"}; a ratio above 1 means ours is better.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import soundfile as sf  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.utils import flop_counter  # noqa: E402
from transformers import (  # noqa: E402
    ClapAudioConfig,
    ClapAudioModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
)

import cacophony  # noqa: E402
import collat  # noqa: E402
import common  # noqa: E402
import conftest  # noqa: E402
import curation_clap  # noqa: E402
import eval as evaluation  # noqa: E402
import mga_clap  # noqa: E402
import t_clap  # noqa: E402
from tools import datasets  # noqa: E402

SCRIPTS = {
    "mga_clap": mga_clap,
    "t_clap": t_clap,
    "cacophony": cacophony,
    "collat": collat,
    "curation_clap": curation_clap,
}


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = (
        [
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ]
        if (Path("/proc/cpuinfo").exists())
        else [platform.processor()]
    )
    return f"{names[0]}, {torch.get_num_threads()} threads"


def measured(name: str, ours: float, peer: float | None, peer_name: str, unit: str, **settings):
    """One line of the results; the ratio is above 1 where ours is better."""
    better = peer and (ours / peer if "per second" in unit else peer / ours)
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "unit": unit,
        "ratio": better,
        "machine": machine(),
        "settings": settings,
    }


def alternate(steps: dict, repeats: int, device) -> dict:
    """Median seconds of each step; the steps alternate, so that noise affects all alike."""
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def htsat(tiny: bool) -> dict:
    """Forward, backward and Adam step of HTS-AT on log-mel input, against transformers'
    ClapAudioModel.

    Same weights, same batch, drop path and dropout off in both, fp32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (
        dict(
            patch_embeds_hidden_size=16,
            depths=[2, 2],
            num_attention_heads=[2, 4],
            patch_size=16,
            patch_stride=[16, 16],
            hidden_size=32,
        )
        if tiny
        else dict(patch_embeds_hidden_size=96)
    )
    torch.manual_seed(0)
    theirs = (
        ClapAudioModel(
            ClapAudioConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        )
        .train()
        .to(device)
    )
    ours = (
        common.HTSAT(16, (2, 2), (2, 4), 16, drop_path=0.0) if tiny else common.HTSAT(drop_path=0.0)
    )
    common.load_strict(ours, common.htsat_state(theirs.state_dict()), "ClapAudioModel")
    ours.train().to(device)
    batch, repeats = (2, 2) if tiny else (4, 15)
    log_mel = torch.randn(batch, 1001, 64, device=device) * 10 - 30
    longer = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    optimisers = {
        name: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-6, fused=True)
        for name, m in (("ours", ours), ("peer", theirs))
    }

    def step(name, forward):
        forward().square().mean().backward()
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)

    medians = alternate(
        {
            "ours": lambda: step("ours", lambda: ours(log_mel)),
            "peer": lambda: step(
                "peer",
                lambda: theirs(input_features=log_mel[:, None], is_longer=longer).last_hidden_state,
            ),
        },
        repeats,
        device,
    )
    return measured(
        "htsat",
        medians["ours"],
        medians["peer"],
        "transformers ClapAudioModel",
        "s per training step",
        batch=batch,
        input="log-mel (1001, 64)",
        size="tiny" if tiny else "paper",
        dtype="float32",
        repeats=repeats,
        torch=str(torch.__version__),
    )


def detection_clips(n_clips: int, n_classes: int, n_frames=32, frame_s=0.3125, seed=0):
    """Random scores (one per frame and class), raised within four random events per clip."""
    rng = np.random.default_rng(seed)
    classes, rows, scores = [f"c{k:03d}" for k in range(n_classes)], [], []
    edges = np.arange(n_frames + 1) * frame_s
    for _ in range(n_clips):
        events, values = [], rng.normal(size=(n_frames, n_classes)).astype(np.float32)
        for c in rng.choice(n_classes, min(4, n_classes), replace=False):
            onset = rng.uniform(0, 8)
            events.append(
                {
                    "label": classes[c],
                    "onset": onset,
                    "offset": min(10.0, onset + rng.uniform(0.3, 4)),
                }
            )
            values[(edges[:-1] < events[-1]["offset"]) & (edges[1:] > onset), c] += 2
        scores.append(values)
        rows.append({"duration": 10.0, "events": events})
    return scores, rows, classes


PSDS = {
    "PSDS1": dict(dtc=0.7, gtc=0.7, cttc=None, alpha_ct=0.0),
    "PSDS2": dict(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5),
}


def measure_psds(who: str, n_clips: int, n_classes: int) -> dict:
    """Seconds, values and peak memory (GB, less that of the inputs) of both scores; to be run in a
    process of its own.
    """
    scores, rows, classes = detection_clips(n_clips, n_classes)
    if who == "peer":
        import pandas as pd
        from sed_scores_eval import intersection_based

        edges = np.arange(33) * 0.3125
        tables = {
            f"f{i}": pd.DataFrame(
                {"onset": edges[:-1], "offset": edges[1:], **dict(zip(classes, values.T))}
            )
            for i, values in enumerate(scores)
        }
        truth = {
            f"f{i}": [(e["onset"], e["offset"], e["label"]) for e in row["events"]]
            for i, row in enumerate(rows)
        }
        durations = {f"f{i}": 10.0 for i in range(n_clips)}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    values = {}
    for name, s in PSDS.items():
        if who == "peer":
            values[name] = float(
                intersection_based.psds(
                    tables,
                    truth,
                    durations,
                    dtc_threshold=s["dtc"],
                    gtc_threshold=s["gtc"],
                    cttc_threshold=s["cttc"],
                    alpha_ct=s["alpha_ct"],
                    alpha_st=0.0,
                    max_efpr=100.0,
                )[0]
            )
        else:
            values[name] = evaluation.psds(
                evaluation.psd_roc(scores, rows, classes, 0.3125, **s), 0.0
            )
    return {
        "values": values,
        "seconds": time.perf_counter() - start,
        "extra_GB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
        "total_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_own_process(*args) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_psds, args)


def psds(tiny: bool) -> dict:
    """PSDS1 and PSDS2 over all thresholds, against sed_scores_eval; the values must agree."""
    size = (20, 5) if tiny else (1000, 100)
    ours, peer = in_own_process("ours", *size), in_own_process("peer", *size)
    for name in PSDS:
        if abs(ours["values"][name] - peer["values"][name]) > 1e-6:
            raise AssertionError(
                f"{name}: ours {ours['values'][name]}, sed_scores_eval {peer['values'][name]}"
            )
    return measured(
        "psds",
        ours["seconds"],
        peer["seconds"],
        "sed_scores_eval",
        "s for PSDS1 + PSDS2",
        clips=size[0],
        classes=size[1],
        frames=32,
        values=ours["values"],
        ours_extra_GB=ours["extra_GB"],
        peer_extra_GB=peer["extra_GB"],
    )


def psds_large(tiny: bool) -> dict:
    """As large as AudioSet-Strong's evaluation set; no peer: sed_scores_eval cannot finish it."""
    size = (30, 6) if tiny else (16996, 407)
    ours = in_own_process("ours", *size)
    return measured(
        "psds_large",
        ours["seconds"],
        None,
        "none: sed_scores_eval runs out of memory",
        "s for PSDS1 + PSDS2",
        clips=size[0],
        classes=size[1],
        frames=32,
        values=ours["values"],
        extra_GB=ours["extra_GB"],
        total_GB=ours["total_GB"],
    )


# keeps 2 in 100,000 random pairs, as many as DU keeps in the paper
DIM, CURATE_SIGMA, CURATE_BLOCK = 1024, 0.128, 8192


def curate_pool(folder: Path, n_clips: int, n_captions: int, peer: bool) -> dict:
    """Curate n_clips random embeddings of a file, block by block; to be run in a process of its
    own.

    -> seconds of ours and of the matrix products of the same blocks alone, number of pairs, total
    peak memory (GB).
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def half(rows):
        return curation_clap.half(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    text = half(torch.randn(n_captions, DIM).numpy())
    captions = [f"caption {q}" for q in range(n_captions)]
    columns = torch.from_numpy(text).to(device).float().T
    held = torch.empty(512, n_captions, device=device)
    seconds, pairs = {"ours": 0.0, "peer": 0.0}, 0
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    pool = np.load(folder / f"pool_{n_clips}.npy", mmap_mode="r")
    for first in range(0, n_clips, CURATE_BLOCK):
        start, embeds = time.perf_counter(), half(pool[first : first + CURATE_BLOCK])
        found = curation_clap.similar_pairs(embeds, text, CURATE_SIGMA, 0, device)
        found = zip(*(x.tolist() for x in found))
        of_block = [({"audio": f"/{first + i:09d}.wav"}, captions[q], c) for i, q, c in found]
        curation_clap.write_pairs(folder / "pairs.jsonl", of_block)
        sync()
        seconds["ours"] += time.perf_counter() - start
        pairs += len(of_block)
        start = time.perf_counter()
        for i in range(0, len(embeds) if peer else 0, 512):
            part = torch.from_numpy(embeds[i : i + 512]).to(device).float()
            torch.mm(part, columns, out=held[: len(part)])
        sync()
        seconds["peer"] += time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**seconds, "pairs": pairs, "peak_GB": peak}


def curate(tiny: bool) -> dict:
    """Curation from stored embeddings to manifest lines, against the matrix products alone; also
    the memory for a pool five times as large.
    """
    sizes, n_captions = ((500, 1500), 700) if tiny else ((20_000, 100_000), 50_000)
    context = multiprocessing.get_context("spawn")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in sizes:
            rows = np.random.default_rng(n).standard_normal((n, DIM), dtype=np.float32)
            np.save(folder / f"pool_{n}.npy", rows)
        for n, peer in ((sizes[0], False), (sizes[1], False), (sizes[1], True)):
            if tiny:
                results.append(curate_pool(folder, n, n_captions, peer))
            else:  # one process each, to measure its own peak memory
                with context.Pool(1) as pool:
                    results.append(pool.apply(curate_pool, (folder, n, n_captions, peer)))
    large = results[2]
    n_pairs = sizes[1] * n_captions
    return measured(
        "curate",
        large["ours"],
        large["peer"],
        "bare matrix products of the same blocks",
        f"s for {n_pairs / 1e6:,.0f} million pairs",
        million_pairs_per_s=round(n_pairs / large["ours"] / 1e6),
        clips=sizes[1],
        captions=n_captions,
        dimensions=DIM,
        sigma=CURATE_SIGMA,
        pairs_kept=large["pairs"],
        peak_GB={str(n): round(r["peak_GB"], 3) for n, r in zip(sizes, results)},
    )


def matching(tiny: bool) -> dict:
    """CoLLAT's greedy matching of 64 clips, all 77 tokens real, against a training step of 64 clips
    at --size paper.

    On a CPU the step is timed on 2 clips and multiplied by 32. It is forward and backward of both
    views, without the optimiser.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, layers, heads, batch, N = (32, 1, 2, 8, 20) if tiny else (768, 12, 12, 64, 77)
    part = batch if device.type == "cuda" or tiny else 2
    torch.manual_seed(0)
    tower = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            projection_dim=width,
            max_position_embeddings=N,
        )
    )
    model = (
        collat.Model(
            dict(
                audio=dict(
                    dim=width, layers=layers, heads=heads, patch=16, stride=48 if tiny else 10
                ),
                blocks=8,
            ),
            common.TextEncoder(tower, None, N),
        )
        .to(device)
        .train()
    )
    log_mel, mask = (
        torch.randn(part, 1024, 128, device=device),
        torch.ones(batch, N, dtype=torch.long, device=device),
    )
    ids = torch.randint(1, 49000, (batch, N), device=device)
    predicted, text = torch.randn(batch, N, width, device=device), model.text.token_embeds(ids)
    cfg, autocast = (
        collat.Config(data=[]),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    )

    def step():
        with autocast:
            outputs = model(log_mel, ids[:part], mask[:part])
        collat.training_loss(cfg, *outputs)[0].backward()

    medians = alternate(
        {"ours": lambda: collat.match(predicted, text, mask), "peer": step},
        1 if device.type == "cpu" else 10,
        device,
    )
    medians["peer"] *= batch / part
    return measured(
        "matching",
        medians["ours"],
        medians["peer"],
        "a training step, matching included",
        f"s for {batch} clips",
        share_of_the_step=medians["ours"] / medians["peer"],
        clips=batch,
        slots=N,
        tokens=N,
        width=width,
        clips_timed=part,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )


# Training steps at the papers' sizes
# -----------------------------------------------------------------


def untrained(name: str, max_tokens: int, pooler: bool = False) -> common.TextEncoder:
    """The text encoder of a hub id with random weights and no tokenizer: nothing is fetched."""
    kinds = {
        "bert-base-uncased": (transformers.BertModel, transformers.BertConfig()),
        "roberta-base": (
            transformers.RobertaModel,
            transformers.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
            ),
        ),
    }
    kind, config = kinds[name]
    return common.TextEncoder(kind(config, add_pooling_layer=pooler), None, max_tokens, pooler)


def token_batch(B: int, L: int, words: int, device) -> dict:
    return {
        "input_ids": torch.randint(5, words, (B, L), device=device),
        "attention_mask": torch.ones(B, L, dtype=torch.long, device=device),
    }


def seconds_of_sound(B: int, seconds: float, rate: int, device):
    return torch.randn(B, round(seconds * rate), device=device) * 0.1


def paper_step(method: str, tiny: bool, device) -> tuple:
    """-> model, batch(B), loss_of(outputs), cfg, at the paper's size."""
    script = SCRIPTS[method]
    sizes = conftest.SMALL_OF[method] if tiny else {}
    cfg = common.configure(
        script.Config,
        data=["none"],
        **{k: v for k, v in sizes.items() if k not in ("steps", "batch_size")},
    )
    text = (
        (
            lambda pooler=False: common.text_encoder_from_scratch(
                ["a dog barks"], 64, 1, 1, 77, pooler=pooler
            )
        )
        if tiny
        else (lambda pooler=False: untrained(cfg.text_model, 77, pooler))
    )
    L, words = 30, 20 if tiny else 20000
    if method == "mga_clap":
        model = mga_clap.Model(cfg, text())

        def batch(B):
            return {
                "waveform": seconds_of_sound(B, 10, 32000, device),
                **token_batch(B, L, words, device),
                "word_mask": torch.ones(B, L, dtype=torch.bool, device=device),
            }

        def loss_of(a, t, temperature, active):
            return mga_clap.training_loss(
                cfg, a.float(), t.float(), temperature.float(), torch.arange(len(a), device=device)
            )
    elif method == "t_clap":
        model = t_clap.Model(
            text(True),
            dict(
                dim=cfg.audio_dim,
                depths=cfg.audio_depths,
                heads=cfg.audio_heads,
                patch=cfg.audio_patch,
                drop_path=cfg.drop_path,
            ),
            cfg.joint_dim,
        )

        def batch(B):
            return {
                "waveform": seconds_of_sound(B, 10, 48000, device),
                "ordered": torch.arange(max(1, B // 5), device=device),
                **token_batch(B + max(1, B // 5), L, words, device),
            }

        def loss_of(*embeds):
            return t_clap.training_loss(cfg, *embeds)
    elif method == "cacophony":
        model = cacophony.Model(
            dict(
                audio=cacophony.audio_shape(cfg),
                joint_dim=cfg.joint_dim,
                decoder_layers=cfg.decoder_layers,
                variant="paper",
            ),
            text(),
        )
        N = cfg.patches

        def batch(B):
            return {
                "patches": torch.randn(B, N, 256, device=device),
                "index": torch.arange(N, device=device).expand(B, N),
                "valid_mask": torch.ones(B, N, dtype=torch.bool, device=device),
                **token_batch(B, L, words, device),
            }

        def loss_of(*outputs):
            return cacophony.training_loss(cfg, *outputs)
    elif method == "collat":
        width, layers, heads = (64, 1, 1) if tiny else (768, 12, 12)
        tower = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                projection_dim=width,
            )
        )
        model = collat.Model(
            dict(
                audio=dict(
                    dim=cfg.audio_dim,
                    layers=cfg.audio_layers,
                    heads=cfg.audio_heads,
                    patch=cfg.audio_patch,
                    stride=cfg.audio_stride,
                ),
                blocks=cfg.blocks,
            ),
            common.TextEncoder(tower, None, cfg.max_tokens),
        )

        def batch(B):
            return {
                "log_mel": torch.randn(B, 1024, 128, device=device),
                **token_batch(B, min(L, cfg.max_tokens), words, device),
            }

        def loss_of(*outputs):
            return collat.training_loss(cfg, *outputs)
    else:
        model = curation_clap.Model(
            text(),
            dict(
                channels=cfg.audio_channels,
                hop=cfg.hop,
                block_dropout=cfg.block_dropout,
                dropout=cfg.dropout,
            ),
            cfg.joint_dim,
            cfg.window_s,
            cfg.temperature,
        )

        def batch(B):
            return {
                "waveform": seconds_of_sound(B, cfg.window_s, 44100, device),
                **token_batch(B, L, words, device),
            }

        def loss_of(*embeds):
            return curation_clap.training_loss(cfg, *embeds, None)

    return model.to(device).train(), batch, loss_of, cfg


# Pairs whose graph fits on a GPU of 140 GB; larger batches use gradient caching
MICRO = {"mga_clap": 128, "t_clap": 128, "cacophony": 256, "collat": 64, "curation_clap": 128}
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense, as the manufacturer states


def measure_step(method: str, tiny: bool, compiled: bool, repeats: int, pairs: int = 0) -> dict:
    """Seconds, FLOP and peak memory of one training step as in a script's loop, on a batch that is
    already on the device: of `pairs`, or of the paper's batch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model, batch, loss_of, cfg = paper_step(method, tiny, device)
    on_gpu = device.type == "cuda"
    B = pairs or (cfg.batch_size if on_gpu else 2 if tiny else 4)
    parts = [batch(min(MICRO[method], B - i)) for i in range(0, B, MICRO[method])]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, 1e-6, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    if compiled:
        common.compile_training(model)

    def backward():
        return common.cached_backward(
            model, parts, loss_of, lambda i: torch.manual_seed(i), autocast
        )

    def step():
        optimiser.zero_grad(set_to_none=True)
        cacophony.sam_backward(
            parameters, backward, cfg.rho
        ) if method == "cacophony" else backward()
        optimiser.step()

    with flop_counter.FlopCounterMode(display=False) as counter:
        if not compiled:
            step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = alternate({"ours": step}, repeats, device)["ours"]
    return {
        "seconds": seconds,
        "pairs": B,
        "pairs_per_s": B / seconds,
        "flop": counter.get_total_flops(),
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def measure_peer(which: str, tiny: bool, repeats: int) -> dict:
    """A contrastive step of the same clips with transformers' ClapModel (from its log-mel), or as
    in MGA-CLAP's released code.

    released: fp16 autocast with a gradient scaler, attention as matrix products and a softmax,
    unfused Adam; written from its description.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    B = 128 if on_gpu else 2 if tiny else 4
    half = torch.float16 if which == "released" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and which == "released")
    autocast = torch.autocast(device.type, half, enabled=on_gpu)
    if which == "ClapModel":
        audio = (
            dict(conftest.CLAP_AUDIO)
            if tiny
            else dict(
                patch_embeds_hidden_size=96, depths=[2, 2, 6, 2], num_attention_heads=[4, 8, 16, 32]
            )
        )
        text = dict(conftest.CLAP_TEXT, vocab_size=30000) if tiny else {}
        model = (
            transformers.ClapModel(transformers.ClapConfig(audio_config=audio, text_config=text))
            .to(device)
            .train()
        )
        parts = {
            "input_features": torch.randn(B, 1, 1001, 64, device=device),
            "is_longer": torch.zeros(B, 1, dtype=torch.bool, device=device),
            **token_batch(B, 30, 20 if tiny else 20000, device),
        }

        def loss_of():
            return model(**parts, return_loss=True).loss
    else:
        model, batch, of_outputs, _ = paper_step("mga_clap", tiny, device)
        parts = batch(B)
        for module in model.modules():
            if isinstance(module, common.Attention):
                module.forward = types.MethodType(unfused_attention, module)

        def loss_of():
            return of_outputs(*model(**parts))[0]

    optimiser = torch.optim.Adam(model.parameters(), 1e-6, fused=False)

    def step():
        optimiser.zero_grad()
        with autocast:
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

    return {"seconds": alternate({"peer": step}, repeats, device)["peer"], "pairs": B}


def unfused_attention(self, x, bias=None):
    """Attention as separate matrix products, bias and softmax."""
    N, L, C = x.shape
    q, k, v = self.qkv(x).reshape(N, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
    attention = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        attention = (attention.view(-1, *bias.shape) + bias).view(N, self.heads, L, L)
    return self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(N, L, C))


def steps(tiny: bool) -> list[dict]:
    """A training step of every script at the paper's size, eager and compiled; MGA-CLAP's against
    two peers.
    """
    on_gpu, rows = torch.cuda.is_available(), []
    repeats = 10 if on_gpu else 1 if tiny else 3
    peers = {which: measure_peer(which, tiny, repeats) for which in ("ClapModel", "released")}
    for method in SCRIPTS:
        eager = None
        for compiled in (False,) if tiny else (False, True):  # compiling takes minutes
            ours = measure_step(method, tiny, compiled, repeats)
            eager = eager or ours
            peak = next((value for name, value in BF16_PEAK.items() if name in machine()), None)
            for which, peer in (
                peers.items()
                if method == "mga_clap"
                else [("eager" if compiled else None, eager if compiled else None)]
            ):
                parts = ["step", method]
                parts += ["compiled"] if compiled else []
                parts += [which] if which in peers else []
                rows.append(
                    measured(
                        "_".join(parts),
                        ours["seconds"],
                        peer and peer["seconds"],
                        which or "none",
                        "s per training step",
                        pairs=ours["pairs"],
                        pairs_per_s=ours["pairs_per_s"],
                        dtype="bfloat16" if on_gpu else "float32",
                        TFLOP=eager["flop"] / 1e12,
                        share_of_bf16_peak=peak and eager["flop"] / ours["seconds"] / peak,
                        peak_GB=ours["peak_GB"],
                        compiled=compiled,
                    )
                )
            torch.cuda.empty_cache() if on_gpu else None
    return rows


# The loop's settings that make 200 steps of it, without a validation before the last
LOOP_STEPS = 200
LOOPS = {
    "mga_clap": {},  # in epochs, whose length the corpus decides
    "t_clap": dict(weights="none", steps=LOOP_STEPS, eval_steps=LOOP_STEPS),
    "cacophony": dict(
        audio_weights="none", stage="contrastive", steps=LOOP_STEPS, eval_steps=LOOP_STEPS
    ),
    "collat": dict(audio_weights="none", steps=LOOP_STEPS, eval_steps=LOOP_STEPS),
    "curation_clap": dict(
        audio_weights="none", stage="teacher", teacher_epochs=1, epoch_steps=LOOP_STEPS
    ),
}


def loops(tiny: bool) -> list[dict]:
    """A run of each script at the paper's size on the demo corpus, from random weights: pairs per
    second of the loop, reading included, against the step alone on the same batch.

    Needs a GPU; without one there are no rows.
    """
    rows, on_gpu = [], torch.cuda.is_available()
    if not tiny and not on_gpu:
        print("loops: no rows, they need a GPU")
        return rows
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        conftest.write_corpus(data) if tiny else common.build_demo(data)
        captions = [
            text
            for row in common.read_manifest([str(data)])
            if row["split"] == "train"
            for text in row["captions"]
        ]
        for method, script in SCRIPTS.items():
            B = 6 if tiny else MICRO[method]
            settings = dict(size="paper", text_model="none", batch_size=B, log_steps=10)
            settings |= LOOPS[method]
            if method == "mga_clap":
                epochs = -(-LOOP_STEPS // (len(captions) // B))
                settings |= dict(audio_weights="none", epochs=epochs, eval_epochs=epochs)
            if tiny:
                settings |= {**conftest.SMALL_OF[method], "batch_size": B}
            step = measure_step(method, tiny, False, 1 if tiny else 5, B)
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            script.main(script.Config(data=[str(data)], runs=folder, name=method, **settings))
            log = [json.loads(line) for line in open(Path(folder) / method / "log.jsonl")]
            log = [line for line in log if "pairs_per_s" in line]
            ours = statistics.median(line["pairs_per_s"] for line in log[len(log) // 2 :])
            curve = [[line["step"], line["loss"]] for line in log]
            first, last = curve[0], curve[-1]
            rows.append(
                measured(
                    f"loop_{method}",
                    ours,
                    step["pairs_per_s"],
                    "the step alone",
                    "pairs per second",
                    pairs=B,
                    dtype="bfloat16" if on_gpu else "float32",
                    peak_GB=torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
                    loss=f"{first[1]:.2f} at step {first[0]}; {last[1]:.2f} at {last[0]}",
                    curve=curve,
                )
            )
    return rows


LINKS = {
    "8 GPUs of one node, 450 GB/s each": (8, 450e9),
    "16 GPUs of two nodes, 50 GB/s each": (16, 50e9),
}  # NVLink 4 and 400 Gb/s InfiniBand


def scaling(tiny: bool) -> list[dict]:
    """Computed, not measured: seconds for a ring all-reduce of the fp32 gradients of one step,
    which sends 2 (n - 1) / n times their bytes over a link.
    """
    rows = []
    for method in SCRIPTS:
        model = paper_step(method, tiny, torch.device("cpu"))[0]
        n_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        passes = 2 if method == "cacophony" else 1  # SAM
        rows += [
            measured(
                f"scaling_{method}",
                passes * 2 * (n - 1) / n * n_bytes / speed,
                None,
                f"computed, {name}",
                "s per step to add up the gradients",
                gradient_GB=n_bytes / 1e9,
                passes=passes,
            )
            | {"machine": "none"}
            for name, (n, speed) in LINKS.items()
        ]
    return rows


# Reading audio
# ---------------------------------------------------------------------------------------


FEED_FORMATS = ("wav", "flac", "ogg")


def feed(tiny: bool) -> list[dict]:
    """Crops of 10 s from files of 30 s (44.1 kHz, for a model at 32 kHz), against reading and
    resampling whole files; and crops from files that were resampled before.
    """
    n, repeats, rows = (3, 1, []) if tiny else (16, 5, [])
    rng, crops, threads = (
        np.random.default_rng(0),
        np.random.default_rng(1),
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)

    def crops_of(paths):
        return lambda: [common.read_audio(path, 32000, 10.0, crops) for path in paths]

    def compare(name, ours, peer, peer_name):
        medians = alternate({"ours": ours, "peer": peer}, repeats, torch.device("cpu"))
        values, unit = (n / medians["ours"], n / medians["peer"]), "clips per second and core"
        settings = {"files": n, "file_s": 30, "crop_s": 10, "from_hz": 44100, "to_hz": 32000}
        rows.append(measured(name, *values, peer_name, unit, **settings))

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        noise = np.cumsum(rng.normal(size=(n, 44100 * 30)), 1)
        noise = 0.5 * noise / np.abs(noise).max(1, keepdims=True)
        files = {suffix: [folder / f"{i}.{suffix}" for i in range(n)] for suffix in FEED_FORMATS}
        for suffix, paths in files.items():
            for path, x in zip(paths, noise):
                common.write_audio(path, x, 44100) if suffix != "ogg" else sf.write(
                    path, x, 44100, format="OGG", subtype="VORBIS"
                )
            compare(
                f"feed_{suffix}",
                crops_of(paths),
                lambda: [common.read_audio(path, 32000)[:320_000] for path in paths],
                "whole files read and resampled",
            )
        # 16-bit wav at the model's rate, as `tools.datasets resample` writes it
        names = [{"audio": f"{i}.flac"} for i in range(n)]
        common.write_lines(folder / "manifest.jsonl", map(json.dumps, names))
        words = ["resample", str(folder), "--rate", "32000", "--out", str(folder / "out")]
        datasets.resample(datasets.parse([*words, "--workers", "1"]))
        ready = [row["audio"] for row in common.read_manifest([str(folder / "out")])]
        for suffix, paths in files.items():
            peer_name = f"crops from the {suffix} files of 44.1 kHz"
            compare(f"feed_resampled_{suffix}", crops_of(ready), crops_of(paths), peer_name)
    torch.set_num_threads(threads)
    return rows


BENCHES = {
    "steps": steps,
    "loops": loops,
    "scaling": scaling,
    "feed": feed,
    "matching": matching,
    "htsat": htsat,
    "psds": psds,
    "psds_large": psds_large,
    "curate": curate,
}


def table(results: list[dict]) -> list[str]:
    """Lines of the README's performance table."""

    def short(x):
        return "-" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"

    shown = (
        "pairs",
        "pairs_per_s",
        "dtype",
        "TFLOP",
        "share_of_bf16_peak",
        "peak_GB",
        "loss",
        "million_pairs_per_s",
        "share_of_the_step",
        "ours_extra_GB",
        "peer_extra_GB",
        "total_GB",
        "gradient_GB",
    )
    lines = [
        "| bench | unit | ours | peer | its value | ratio | more | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        more = ", ".join(
            f"{k.replace('_', ' ')} {short(v) if isinstance(v, (int, float)) else v}"
            for k, v in r["settings"].items()
            if k in shown and v is not None and not isinstance(v, dict)
        )
        lines.append(
            f"| {r['name']} | {r['unit']} | {short(r['ours'])} | {r['peer_name']} | "
            f"{short(r['peer'])} | {short(r['ratio'])} | {more} | {r['machine']} |"
        )
    return lines


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", help="write the list to this file")
    parser.add_argument(
        "--tiny", action="store_true", help="miniature sizes, to check that it runs"
    )
    args = parser.parse_args(argv)
    results = []
    for name in [args.name] if args.name != "all" else BENCHES:
        measured = BENCHES[name](args.tiny)
        results += measured if isinstance(measured, list) else [measured]
    print("\n".join(table(results)))
    if args.json:  # the other benches' last results stay
        path, names = Path(args.json), {r["name"] for r in results}
        kept = (
            [r for r in json.loads(path.read_text()) if r["name"] not in names]
            if path.exists()
            else []
        )
        common.write_lines(path, ["[", ",\n".join(map(json.dumps, kept + results)), "]"])
    return results


if __name__ == "__main__":
    main()
