"""Code that two or more of the paper scripts share, in small pieces that can be read alone.

Sections (each uses only those above it): files . several processes . audio . scenes and the demo
corpus . manifests . log-mel . transformer block . checkpoints and weight files . HTS-AT . text
encoder . sparsemax . metrics . loading batches . embedding files . settings and command line .
training. "Copied alone, needs ..." lists what a piece needs beside the imports when it is copied to
another file. A piece without this line needs whatever names of ours its code uses, often none.

Letters: B clips or pairs in a batch, S waveform samples, T audio steps after the encoder, T_mel
spectrogram frames, M mel bins, L text tokens, C channels (or classes, in a metric), D joint
dimension, K codewords, N clips and Q captions in an evaluation.
Similarity matrices have audio in rows and text in columns, everywhere.
"""

import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import fractions
import functools
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

try:
    import fcntl
except ImportError:  # Windows has no fcntl, so two runs in one folder go unnoticed there
    fcntl = None

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_lines(path: Path, lines) -> None:
    """Write text lines; the file is never left half written."""
    with written_whole(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())  # as bytes: UTF-8 and \n also on Windows


@contextlib.contextmanager
def written_whole(path: Path, who: str = ""):
    """Open a file for writing bytes under a temporary name and rename it at the end: if the process
    is killed or the disk is full, the earlier file stays whole.

    who: part of the temporary name, needed where several processes may write the same file.
    """
    # beside `path`, since os.replace does not work across file systems
    temporary = path.with_name(f"{path.name}{who}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        # after close(), which may be the first to report a full disk; there is no fsync, so a power
        # cut may still lose data
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C and SystemExit are not subclasses of Exception
        temporary.unlink(missing_ok=True)
        # disk full, file size limit reached, quota exceeded
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(
                f"{path} cannot be written ({error.strerror}); what was there before is whole"
            ) from None
        raise  # an error of the caller's block


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def start_device(name: str) -> torch.device:
    """Join torchrun's process group where there is one; pick the device ("auto", "cpu", "cuda")."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while the first process validates and embeds captions; nccl's default
        # limit is ten minutes
        dist.init_process_group(
            "nccl" if name == "cuda" else "gloo", timeout=datetime.timedelta(hours=2)
        )
    if name == "cuda":
        # LOCAL_RANK numbers the processes of this node; each takes one GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # allows TF32, with 10 bits of mantissa
    # `wrap` needs the GPU's index, and torch.device("cuda").index is None
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    if dist.is_initialized():
        # without device_ids nccl warns that it chooses a GPU itself
        dist.barrier(
            device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rank, world = rank_and_world()
        sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
        # all_gather takes equal shapes only, so the sizes are exchanged first
        dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
        sizes = torch.cat(sizes).tolist()  # a rank with an unreadable clip holds fewer rows
        # (max of B, ...): F.pad counts axes from the last one, and only axis 0 grows
        padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - len(x))).contiguous()
        parts = [torch.empty_like(padded) for _ in range(world)]  # world x (max of B, ...)
        dist.all_gather(parts, padded)
        ctx.start, ctx.size, ctx.world = sum(sizes[:rank]), len(x), world
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])  # (sum of B, ...)

    @staticmethod
    def backward(ctx, grad):
        # Every process computes the same full loss, so the gradient of its own rows is complete.
        # It is multiplied by world because DistributedDataParallel divides by it.
        return grad[ctx.start : ctx.start + ctx.size] * ctx.world


def gather_with_grad(x):
    """Gather all processes' rows in rank order: (B, ...) -> (sum of B, ...); identity when alone.

    For losses that every process computes in full: after DistributedDataParallel's averaging, the
    gradients equal those of one process with the joint batch. Copied alone, needs _Gather,
    rank_and_world.
    """
    return _Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


# ------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------


class AudioError(ValueError):
    """One audio file that cannot be used; the message names the file and the reason."""


@functools.lru_cache(maxsize=16)  # the filter is computed once per pair of rates
def _resampler(from_hz: int, to_hz: int):
    # an exact ratio like 44101 : 32000 would need a filter of gigabytes; the standard rates have
    # exact ratios
    ratio = fractions.Fraction(to_hz, from_hz).limit_denominator(1000)
    return torchaudio.transforms.Resample(ratio.denominator, ratio.numerator)


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """(S,) float32 at from_hz -> (S',) float32 at to_hz (torchaudio's windowed sinc)."""
    if from_hz == to_hz:
        return waveform
    # (1, S) -> (1, S') -> (S',)
    return _resampler(from_hz, to_hz)(torch.from_numpy(waveform)[None])[0].numpy()


def _ogg_is_cut(path) -> bool:
    """True if the last Ogg page declares more bytes than the file holds: a broken download."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        start = f.seek(max(0, size - 2**17))  # a page has at most 65,307 bytes
        tail = f.read()
    page = tail.rfind(b"OggS")  # every page starts with it (RFC 3533)
    if page < 0 or len(tail) < page + 27 or len(tail) < page + 27 + tail[page + 26]:
        return True
    segments = tail[page + 26]  # number of segments; their lengths follow, one byte each
    return start + page + 27 + segments + sum(tail[page + 27 : page + 27 + segments]) > size


def _pieces(f, wanted: int):
    """Yield at most `wanted` samples as mono float32, 2**21 values at a time: memory use depends on
    what the file holds, not on what its header claims.
    """
    while wanted > 0:
        # at most 2**21 values over all channels: 8 MiB of float32
        piece = f.read(
            min(wanted, max(1, 2**21 // f.channels)), dtype="float32", always_2d=True
        ).mean(axis=1)  # (S, channels) -> (S,)
        if not len(piece):  # the file ends earlier than its header says
            return
        wanted -= len(piece)
        yield piece


# 120 dB above full scale: not a sound, and its power spectrum may leave the range of float32
LOUDEST = 1e6


def read_audio(
    path,
    sample_rate: int,
    length_s: float | None = None,
    crop_rng=None,
    expected_s: float | None = None,
) -> np.ndarray:
    """Read a file, or one crop of it by seeking, as mono float32 at `sample_rate`.

    Args
        length_s: seconds to read; None reads all of it. A shorter file comes back whole, unpadded.
        crop_rng: numpy Generator that draws where the crop starts; None starts at 0.
        expected_s: duration the manifest gives; a file 10 % shorter is reported as truncated.
    Returns
        waveform (S,) float32, channels averaged.
    Raises
        AudioError: missing, unreadable, empty, truncated, non-finite, absurdly loud or silent file.
    Copied alone, needs AudioError, resample, _resampler, _ogg_is_cut, _pieces, LOUDEST.
    """
    if not os.path.isfile(path):  # libsndfile would say "System error"
        raise AudioError(f"{path}: file not found")
    if not os.path.getsize(path):  # libsndfile would say "Format not recognised"
        raise AudioError(f"{path}: an empty file, of 0 bytes")
    try:
        with sf.SoundFile(path) as f:
            native_hz, total = f.samplerate, len(f)
            if total <= 0:
                raise AudioError(f"{path}: holds no samples")
            if total == 2**63 - 1:
                raise AudioError(
                    f"{path}: no length in its header (a streamed FLAC); encode it anew"
                )
            # libsndfile reads a cut Ogg file as a shorter one, without an error
            if (expected_s and total / native_hz < 0.9 * expected_s - 0.1) or (
                f.format == "OGG" and _ogg_is_cut(path)
            ):
                raise AudioError(
                    f"{path}: truncated, only {total / native_hz:.2f} s can be read"
                    + (f" of {expected_s:.2f} s" if expected_s else "")
                )
            wanted = total if length_s is None else min(total, math.ceil(length_s * native_hz))
            if not 1000 <= native_hz <= 1_000_000:
                raise AudioError(
                    f"{path}: a sample rate of {native_hz} Hz; expected 1 kHz to 1 MHz"
                )
            # integers() excludes its upper end, so + 1 allows the last possible start
            start = int(crop_rng.integers(0, total - wanted + 1)) if crop_rng is not None else 0
            f.seek(start)
            waveform = np.concatenate(list(_pieces(f, wanted)) or [np.zeros(0, np.float32)])  # (S,)
            if len(waveform) < wanted:
                # without numbers that depend on the crop: a file is counted once for each text
                raise AudioError(f"{path}: truncated, its end cannot be decoded")
            if not waveform.any():
                f.seek(0)  # a silent crop of a file with sound in it is a legitimate draw
                if not any(piece.any() for piece in _pieces(f, total)):
                    raise AudioError(f"{path}: silent, every sample is 0")
    except (sf.SoundFileRuntimeError, TypeError, OSError) as error:  # TypeError: a name in .raw
        raise AudioError(f"{path}: cannot be read as audio ({str(error).rstrip('.')})") from None
    if not np.isfinite(waveform).all():  # possible in files of floats
        raise AudioError(f"{path}: holds NaN or infinite samples")
    if np.abs(waveform).max() > LOUDEST:
        raise AudioError(f"{path}: samples above {LOUDEST:g}; expected values in [-1, 1]")
    waveform = resample(waveform, native_hz, sample_rate)
    # `wanted` was rounded up, so there may be one sample too many
    return waveform if length_s is None else waveform[: round(length_s * sample_rate)]


def write_audio(path: Path, waveform: np.ndarray, rate: int) -> None:
    """Write waveform (S,) as a 16-bit file in the format of its suffix, whole or not at all."""
    held = io.BytesIO()  # in memory first: libsndfile's error would not say that the disk is full
    sf.write(held, waveform, rate, subtype="PCM_16", format=path.suffix[1:].upper())
    with written_whole(path) as file:
        file.write(held.getbuffer())


def pad_batch(waveforms: list[np.ndarray], length: int | None = None):
    """Zero-pad at the end to `length` samples, or to the longest -> (B, S) in the waveforms' dtype,
    n_samples (B).
    """
    n_samples = torch.tensor([len(w) for w in waveforms])
    length = length or int(n_samples.max())
    # B tensors (S,); a waveform of full length is not copied
    padded = [
        torch.from_numpy(w if len(w) == length else np.pad(w, (0, length - len(w))))
        for w in waveforms
    ]
    # in a worker, default_collate writes straight into memory shared with the main process
    return torch.utils.data.default_collate(padded), n_samples  # (B, S), (B,)


def cut_windows(waveform: torch.Tensor, n_samples: torch.Tensor | None, window: int):
    """Cut every clip into consecutive windows, the last one zero-padded (the evaluation rule);
    `join_windows` takes the mean of their embeddings.

    Args: waveform (B, S); n_samples (B,) valid samples, None: all; the rest is ignored; window:
        samples in a window.
    Returns: windows (W, window); owner (W,), the clip of each window; weight (W,), the share of its
        clip's seconds that a window holds (sum 1 over a clip), so that the last 0.02 s of a 10.02 s
        clip do not count for half; a list of W numbers of valid samples.
    """
    windows, owner, weight, lengths = [], [], [], []
    for clip, n in enumerate(
        [waveform.shape[1]] * len(waveform) if n_samples is None else n_samples.tolist()
    ):
        if n <= 0:
            raise ValueError(f"clip {clip} of the batch has n_samples = {n}; at least 1 is needed")
        for start in range(0, n, window):
            piece = waveform[clip, start : min(start + window, n)]
            windows.append(F.pad(piece, (0, window - len(piece))))
            owner.append(clip)
            weight.append(len(piece) / n)
            lengths.append(len(piece))
    return (
        torch.stack(windows),
        torch.tensor(owner, device=waveform.device),
        torch.tensor(weight, device=waveform.device),
        lengths,
    )


def join_windows(embeds, owner, weight):
    """Embeddings of windows (W, D), in the order of `cut_windows`, and its owner and weight ->
    embeddings of clips (B, D): the normalised mean over a clip's windows, weighted by seconds.

    Summed clip by clip, because index_add on a GPU would add in another order at every call.
    """
    return F.normalize(
        torch.stack(
            # `owner` ascends and every clip has a window, so the counts split the rows into B
            # parts, each (windows of the clip, D)
            [part.sum(0) for part in (embeds * weight[:, None]).split(owner.bincount().tolist())]
        ),
        dim=-1,
    )


# ------------------------------------------------------------------------------------------------
# Scenes and the demo corpus
# ------------------------------------------------------------------------------------------------


DEMO_HZ = 32000  # MGA-CLAP's rate; the other scripts resample

# Captions by the number of sounds; {0} is heard first, whatever the order of the words
ONE = ["{0}", "the sound of {0}", "{0} can be heard"]

TWO = ["{0} followed by {1}", "{0}, then {1}", "{0} before {1}", "{1} after {0}"]

THREE = ["{0} followed by {1}, then {2}", "{0}, then {1}, then {2}"]

# For sounds that overlap: these captions tell no order
TOGETHER = ["{0} while {1} is heard", "{0} and {1} at the same time"]


def _fade(sound: np.ndarray, rate: int) -> np.ndarray:
    n = min(len(sound) // 2, rate // 100)  # 10 ms at each end, so that a cut makes no click
    ramp = np.linspace(0, 1, n, dtype=np.float32)
    sound = sound.copy()  # the caller's may be a view of a longer sound
    sound[:n] *= ramp
    sound[len(sound) - n :] *= ramp[::-1]
    return sound


def make_scene(rng, draw_sound, rate: int, scene_s: float = 10.0):
    """One to three different sounds in a noisy scene, with captions, events, phrases and order.

    Args
        rng: numpy Generator; every choice comes from it.
        draw_sound: rng -> (label, phrase, waveform (S,) float32 at `rate`).
    Returns
        waveform (S,), row (manifest fields), swapped (S,) or None: the same sounds in reverse
        order with the same gaps, for scenes whose sounds do not overlap.
    """
    n, sounds = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2])), []
    for _ in range(200):  # bounded: a folder with one class has no second sound to find
        label, phrase, sound = draw_sound(rng)
        if label not in [s[0] for s in sounds]:
            longest = int(0.85 * scene_s / n * rate)
            start = int(rng.integers(0, max(1, len(sound) - longest + 1)))
            sound = _fade(sound[start : start + longest], rate)
            level = 10 ** (-rng.uniform(16, 26) / 20)  # RMS between -16 and -26 dB of full scale
            # 1e-9, since a sound from a folder may be silent
            sounds.append((label, phrase, sound * level / (np.sqrt(np.mean(sound**2)) + 1e-9)))
        if len(sounds) == n:
            break
    n, size = len(sounds), int(scene_s * rate)
    lengths = np.array([len(s[2]) for s in sounds])
    together = n == 2 and rng.random() < 0.3
    if together:
        # the second sound starts within the first half of the first, or earlier where it would run
        # past the end of the scene
        first = int(rng.integers(0, size - lengths[0] + 1))
        second = min(first + int(rng.integers(0, lengths[0] // 2 + 1)), size - lengths[1])
        onsets, swapped = [first, second], None
    else:  # the free time is cut at random into gaps before, between and after
        # (n,) gap before each sound; the rest of the free time follows the last one
        gaps = np.diff(np.sort(rng.integers(0, size - lengths.sum() + 1, n)), prepend=0)
        onsets = np.cumsum(gaps) + np.cumsum(lengths) - lengths
        back = np.cumsum(gaps) + np.cumsum(lengths[::-1]) - lengths[::-1]
        swapped = np.zeros(size, np.float32) if n > 1 else None
    # background: white noise, plus a little brown noise (its running sum) whose slow drift, the
    # moving average, is subtracted
    noise = np.cumsum(rng.standard_normal(size).astype(np.float32))
    noise = np.diff(noise, prepend=0) + 0.02 * (
        noise - np.convolve(noise, np.ones(64) / 64, "same")
    )
    noise *= 10 ** (-rng.uniform(42, 52) / 20) / np.sqrt(np.mean(noise**2))
    waveform = noise.astype(np.float32)
    for (_, _, sound), onset in zip(sounds, onsets):
        waveform[onset : onset + len(sound)] += sound
    if swapped is not None:
        swapped += noise  # the same noise: only the order of the sounds differs
        for (_, _, sound), onset in zip(sounds[::-1], back):
            swapped[onset : onset + len(sound)] += sound

    templates = TOGETHER if together else {1: ONE, 2: TWO, 3: THREE}[n]
    chosen = [templates[i] for i in rng.permutation(len(templates))[:2]]
    phrases = [s[1] for s in sounds]
    ordered = n > 1 and not together
    times = [
        [round(o / rate, 3), round((o + length) / rate, 3)] for o, length in zip(onsets, lengths)
    ]
    row = {
        "duration": scene_s,
        "captions": [t.format(*phrases) for t in chosen],
        "negatives": [t.format(*phrases[::-1]) if ordered else None for t in chosen],
        "labels": [s[0] for s in sounds],
        "events": [
            {"label": s[0], "onset": on, "offset": off} for s, (on, off) in zip(sounds, times)
        ],
        "phrases": [{"phrase": p, "segments": [t]} for p, t in zip(phrases, times)],
    }
    # the sounds are scaled by RMS, so their peaks may pass full scale
    return np.clip(waveform, -1, 1), row, None if swapped is None else np.clip(swapped, -1, 1)


def write_scene(
    folder: Path, name: str, seed: tuple, draw_sound, rate: int, split: str, suffix: str = "wav"
) -> dict:
    """Make one scene, write its audio (for test scenes also `name`_swapped) -> its row."""
    # a generator of its own: a scene does not depend on those made before it
    waveform, row, swapped = make_scene(np.random.default_rng(seed), draw_sound, rate)
    write_audio(folder / f"{name}.{suffix}", waveform, rate)
    row = {"audio": f"{folder.name}/{name}.{suffix}", **row, "split": split}
    if split == "test" and swapped is not None:  # eval.py compares captions with both
        write_audio(folder / f"{name}_swapped.{suffix}", swapped, rate)
        row["swapped_audio"] = f"{folder.name}/{name}_swapped.{suffix}"
    return row


def demo_sound(rng, rate: int = DEMO_HZ):
    """One of twelve synthetic sound classes -> label, phrase, waveform (S,) float32."""
    seconds = rng.uniform(0.8, 3.0)
    t = np.arange(int(seconds * rate)) / rate
    white = rng.standard_normal(len(t))
    pitch = 2 ** rng.uniform(-0.3, 0.3)  # up to 3.6 semitones down or up

    # (S,) bool, True in the first width_s of every period
    def pulses(per_s, width_s):
        return (t * per_s * pitch % 1) < width_s * per_s * pitch

    def tone(hz):
        # the phase is the running sum of the frequency, which may vary in time
        return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz * pitch, t.shape)) / rate)

    def smooth(x, n):
        return np.convolve(x, np.ones(n) / n, "same")

    # functions, so that only the drawn sound is computed
    sounds = {
        "rising_chirp": ("a rising chirp", lambda: tone(400 * 8 ** (t / seconds))),
        "falling_chirp": ("a falling chirp", lambda: tone(3200 * 8 ** (-t / seconds))),
        "low_hum": ("a low hum", lambda: tone(90) + 0.5 * tone(180) + 0.3 * tone(270)),
        "beeps": ("rapid beeps", lambda: tone(1500) * pulses(5, 0.1)),
        "alarm": ("a two-tone alarm", lambda: tone(np.where(t * 2 % 1 < 0.5, 700, 1100))),
        "siren": ("a wailing siren", lambda: tone(900 + 400 * np.sin(2 * np.pi * 0.8 * t))),
        "bell": (
            "a bell ringing",
            # frequency ratios of a free metal bar; higher partials decay faster
            lambda: sum(tone(600 * r) * np.exp(-t * (1 + r)) for r in (1, 2.76, 5.4, 8.9)),
        ),
        "clicks": ("steady clicking", lambda: white * pulses(4, 0.008)),
        "rumble": ("a deep rumble", lambda: smooth(white, 200)),
        "hiss": ("a loud hiss", lambda: white - smooth(white, 5)),
        "gusts": ("gusts of wind", lambda: smooth(white, 30) * (1 + np.sin(2 * np.pi * 0.9 * t))),
        "warble": ("a warbling whistle", lambda: tone(2200) * (1 + np.sin(2 * np.pi * 9 * t))),
    }
    label = sorted(sounds)[int(rng.integers(len(sounds)))]
    phrase, make = sounds[label]
    return label, phrase, make().astype(np.float32)


def build_demo(
    folder="data/demo", seed: int = 0, sizes=(("train", 420), ("val", 60), ("test", 60))
) -> Path:
    """The built-in corpus: synthetic 10 s scenes, the same on every machine; built on first use."""
    folder = Path(folder)
    if not (folder / "manifest.jsonl").is_file() and rank_and_world()[0] == 0:
        try:
            (folder / "audio").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"{folder}: the demo corpus cannot be written here ({error.strerror}); run from a "
                "folder that you may write to"
            ) from None
        jobs = [(split, i) for split, count in sizes for i in range(count)]
        rows = [
            write_scene(
                folder / "audio",
                f"{split}_{i:04d}",
                (seed, len(split), i),  # 5, 3 and 4 letters tell the splits apart
                demo_sound,
                DEMO_HZ,
                split,
            )
            for split, i in tqdm(jobs, desc=f"building the demo corpus in {folder}", unit="clip")
        ]
        write_lines(
            folder / "classes.txt", sorted({label for row in rows for label in row["labels"]})
        )
        # written last, because its presence marks a complete corpus
        write_lines(folder / "manifest.jsonl", [json.dumps(row) for row in rows])
    barrier()
    return folder


# ------------------------------------------------------------------------------------------------
# Manifests
# ------------------------------------------------------------------------------------------------


# Key -> type of its JSON value; other keys are allowed unless they resemble one of these
MANIFEST_KEYS = {
    "audio": str,
    "duration": (int, float),
    "captions": list,
    "similarity": list,
    "synthetic": list,
    "description": str,
    "negatives": list,
    "labels": list,
    "events": list,
    "phrases": list,
    "id": (str, int),
    "image": str,
    "split": str,
    "fold": (int, str),
    "qa": list,
    "swapped_audio": str,
}


def read_manifest(data: list[str]) -> list[dict]:
    """Read manifests (JSON Lines) into one list of rows; audio paths get the manifest's folder.

    Args
        data: manifests, folders that hold a manifest.jsonl, or the word "demo".
    Raises
        FileNotFoundError, ValueError: naming file, line and key.
    """
    return list(iter_manifest(data))


def iter_manifest(data: list[str]):
    """`read_manifest`, row by row: for manifests that do not fit into memory."""
    for item in [data] if isinstance(data, str) else data:
        path = manifest_path(item)
        found = 0
        with open(path, "rb") as f:  # bytes, so that `_parse_row` can name a line that is not UTF-8
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = _parse_row(line, f"{path}:{number}")
                found += 1
                for key in ("audio", "image", "swapped_audio"):
                    if key in row:
                        # pathlib drops the left side where the right one is an absolute path
                        row[key] = str(path.parent / row[key])
                yield row
        if not found:
            raise ValueError(f"{path}: the manifest is empty; expected one JSON object a line")


def require(rows: list[dict], *keys: str) -> None:
    """ValueError naming file, line and key where a row lacks one of `keys`."""
    for row in rows:
        for key in keys:
            if row.get(key) in (None, []):
                raise ValueError(
                    f"{row['where']}: has no '{key}', which this run needs (keys there: "
                    f"{' '.join(', '.join(k for k in row if k != 'where').split())[:200]})"
                )


def manifest_path(item) -> Path:
    """A manifest given as a file, as a folder that holds manifest.jsonl, or as "demo"."""
    path = build_demo() if str(item) == "demo" else Path(item)
    if path.is_dir():
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such manifest; expected a .jsonl file, a folder that holds "
            "manifest.jsonl, or the word demo (python -m tools.datasets makes manifests)"
        )
    if path.suffix in (".csv", ".tsv"):
        raise ValueError(
            f"{path}: a table, not a manifest; make one first: python -m tools.datasets csv {path} "
            "--audio COLUMN --caption COLUMN --out FOLDER"
        )
    return path


def _parse_row(line: bytes, where: str) -> dict:
    """Parse one line of a manifest and check all that later code relies on -> its row."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # Windows' editors begin a file with a mark
    except (ValueError, RecursionError) as error:  # RecursionError: endless nesting
        raise ValueError(f"{where}: not valid JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for key, value in row.items():
        # cutoff 0.8 finds "captions" for "caption"; a key that resembles none is allowed
        near = [] if key in MANIFEST_KEYS else difflib.get_close_matches(key, MANIFEST_KEYS, 1, 0.8)
        if near:
            raise ValueError(f"{where}: unknown key {key!r}; did you mean '{near[0]}'?")
        if key in MANIFEST_KEYS and not isinstance(value, MANIFEST_KEYS[key]):
            raise ValueError(f"{where}: '{key}' has the wrong type {type(value).__name__}")
    if row.get("split", "train") not in ("train", "val", "test"):
        raise ValueError(f"{where}: split '{row['split']}'; expected train, val or test")
    if not row.get("audio"):
        keys = " ".join(", ".join(row).split())[:200]
        raise ValueError(
            f"{where}: no key 'audio' (keys there: {keys or 'none'}); it must name the sound file"
        )
    for key in ("audio", "image", "swapped_audio"):
        check_text(row.get(key, "x"), f"'{key}'", where)
    for key, name in (("captions", "caption"), ("synthetic", "synthetic caption")):
        for number, caption in enumerate(row.get(key, []), 1):
            check_text(caption, f"{name} {number}", where, words=True)
    for number, label in enumerate(row.get("labels", []), 1):
        check_text(label, f"label {number}", where)
    duration = row.get("duration", 1.0)
    # json accepts NaN, which fails this comparison
    if isinstance(duration, bool) or not 0 < duration < 1e9:
        raise ValueError(
            f"{where}: duration {duration!r}; expected seconds above 0, or no such key"
        )
    for number, negative in enumerate(row.get("negatives", []), 1):
        if negative is not None:
            check_text(negative, f"negative {number}", where, words=True)
    n_negatives, n_captions = len(row.get("negatives", [])), len(row.get("captions", []))
    if n_negatives not in (0, n_captions):  # else captions and negatives could not be paired
        raise ValueError(
            f"{where}: {n_negatives} negatives for {n_captions} captions; expected one, or null, a "
            "caption"
        )
    for event in row.get("events", []):
        if not isinstance(event, dict) or not {"label", "onset", "offset"} <= set(event):
            raise ValueError(f"{where}: an event needs label, onset and offset, found {event!r}")
        check_text(event["label"], "an event's label", where)
        _check_times(
            event, duration=row.get("duration"), where=f"{where}: event {event['label']!r}"
        )
    for phrase in row.get("phrases", []):
        if not isinstance(phrase, dict) or not isinstance(phrase.get("segments"), list):
            raise ValueError(f"{where}: a phrase needs 'phrase' and 'segments', found {phrase!r}")
        check_text(phrase.get("phrase"), "a phrase", where, words=True)
        for segment in phrase["segments"]:
            if not isinstance(segment, list) or len(segment) != 2:
                raise ValueError(
                    f"{where}: segment {segment!r} of {phrase['phrase']!r}; expected [onset, "
                    "offset] in seconds"
                )
            if segment != [0, 0]:  # AudioGrounding's mark for "not in the clip"
                times = dict(zip(("onset", "offset"), segment))
                _check_times(times, row.get("duration"), f"{where}: phrase {phrase['phrase']!r}")
    for number, pair in enumerate(row.get("qa", []), 1):
        if not isinstance(pair, dict):
            raise ValueError(f"{where}: qa {number} needs a question and an answer, found {pair!r}")
        for key in ("question", "answer"):
            check_text(pair.get(key), f"the {key} of qa {number}", where)
    row["where"] = where
    return row


def check_text(value, what: str, where: str, words: bool = False) -> None:
    """ValueError for a value that is not text, is empty (with `words`: has no letter or digit), or
    holds characters that no file name or tokenizer accepts.
    """
    if not isinstance(value, str) or not (re.search(r"\w", value) if words else value.strip()):
        raise ValueError(f"{where}: {what} is empty ({value!r}); write one or remove it")
    # JSON's \ud800 becomes half a surrogate pair, which UTF-8 cannot encode
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        raise ValueError(
            f"{where}: {what} holds a NUL or half a surrogate pair ({value!r}); remove it"
        )


def _check_times(times: dict, duration, where: str) -> None:
    onset, offset = times["onset"], times["offset"]
    for t in (onset, offset):
        if not isinstance(t, (int, float)) or isinstance(t, bool) or not abs(t) < 1e9:
            raise ValueError(
                f"{where}: onset {onset!r}, offset {offset!r}; expected seconds as numbers"
            )
    if not 0 <= onset < offset:
        raise ValueError(f"{where}: onset {onset}, offset {offset}; expected 0 <= onset < offset")
    # annotations may run past a shortened file, but not that far
    if duration and onset > 10 * duration:
        raise ValueError(
            f"{where}: onset {onset} in a clip of {duration} s; are these milliseconds? expected "
            "seconds"
        )


def read_lines(path) -> list[str]:
    """The non-empty lines of a text file, without the white space around them."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as UTF-8, one class a line") from None
    lines = [line.strip() for line in lines if line.strip()]
    for line in lines:
        check_text(line, "a class", str(path))
    return lines


def read_classes(data: list[str], rows: list[dict]) -> list[str]:
    """Class list: classes.txt beside the first manifest (order kept), else all labels, sorted."""
    path = manifest_path(data if isinstance(data, str) else data[0]).parent / "classes.txt"
    if path.is_file():
        classes = read_lines(path)
        if not classes:
            raise ValueError(
                f"{path}: the class list is empty; write one class a line, or remove the file"
            )
        twice = sorted({c for c in classes if classes.count(c) > 1})
        if twice:
            raise ValueError(f"{path}: class '{twice[0]}' is listed twice; list each class once")
        return classes
    labels = {label for row in rows for label in row.get("labels", [])}
    return sorted(labels | {event["label"] for row in rows for event in row.get("events", [])})


def split_train_val(rows: list[dict], seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Rows for training (split "train" or none) and validation (split "val"; without such rows 5 %
    of the files are held out, at least 2 and at most 1,000, and none of three files or fewer).

    Rows of one file are merged. Copied alone, needs merge_rows, negatives_of.
    """
    train = [row for row in rows if row.get("split", "train") == "train"]
    val = [row for row in rows if row.get("split") == "val"]
    audio = sorted({row["audio"] for row in train})  # a set's order changes from run to run
    if not val and len(audio) > 3:
        n_held = min(1000, max(2, len(audio) // 20))  # with 1, retrieval is trivial
        held = {audio[i] for i in np.random.default_rng(seed).permutation(len(audio))[:n_held]}
        val = [row for row in train if row["audio"] in held]
        train = [row for row in train if row["audio"] not in held]
    if not train:
        first = rows[0].get("where") if rows else "none"
        raise ValueError(
            f"no row of the manifest is for training (first: {first}); expected split 'train' or "
            "no split at all"
        )
    return merge_rows(train), merge_rows(val)


def merge_rows(rows: list[dict]) -> list[dict]:
    """One row a file: a manifest may hold one caption or one label a line."""
    merged = {}
    for row in rows:
        first = merged.setdefault(row["audio"], row)
        if first is row:
            continue
        one = merged[row["audio"]] = {**first}  # the caller's rows stay as they are
        if first.get("negatives") or row.get("negatives"):  # one entry a caption
            one["negatives"] = negatives_of(first) + negatives_of(row)
        for key in ("captions", "synthetic", "labels", "events", "phrases", "qa"):
            old, new = first.get(key, []), row.get(key, [])
            # equal captions stay: two people may write the same
            if key not in ("captions", "synthetic"):
                new = [x for x in new if x not in old]
            if key in first or key in row:
                one[key] = old + new
    return list(merged.values())


def negatives_of(row: dict) -> list:
    """One entry a caption, None where there is no negative."""
    n = len(row.get("captions", []))
    return (row.get("negatives", []) + [None] * n)[:n]


def annotated(rows: list[dict], *keys: str) -> list[int]:
    """Indices of the rows that have one of these keys. An empty list says that nothing is there; a
    row without the key says nothing, and is no negative example.
    """
    return [i for i, row in enumerate(rows) if any(key in row for key in keys)]


# ------------------------------------------------------------------------------------------------
# Log-mel
# ------------------------------------------------------------------------------------------------


def keep_out_of_checkpoints(module: nn.Module) -> None:
    """Make every buffer of `module` non-persistent: constants that each new module recomputes."""
    for name, buffer in list(module.named_buffers()):  # a copy, since the loop changes the buffers
        parent, _, leaf = name.rpartition(".")  # parent "": `module` itself
        module.get_submodule(parent).register_buffer(leaf, buffer, persistent=False)


class LogMel(nn.Module):
    """Waveform (B, S) in [-1, 1] -> log-mel (B, T_mel, M) in dB, always in fp32.

    Hann window of n_fft samples, centred, reflect padding, power spectrum, Slaney filters,
    10 log10(max(x, 1e-10)) without a top_db. T_mel = S // hop + 1; S > n_fft / 2. Source: HTS-AT's
    torchlibrosa settings.
    Copied alone, needs keep_out_of_checkpoints.
    """

    def __init__(
        self, sample_rate=32000, n_fft=1024, hop=320, n_mels=64, fmin_hz=50, fmax_hz=14000
    ):
        super().__init__()
        # power=None gives complex values, which `power` squares
        self.spectrogram = torchaudio.transforms.Spectrogram(n_fft, n_fft, hop, power=None)
        # norm and scale "slaney": librosa's defaults, which torchlibrosa uses
        self.mel_scale = torchaudio.transforms.MelScale(
            n_mels, sample_rate, fmin_hz, fmax_hz, n_fft // 2 + 1, "slaney", "slaney"
        )
        keep_out_of_checkpoints(self)

    def forward(self, waveform):
        with torch.autocast(waveform.device.type, enabled=False):  # bf16 has 8 significant bits
            # on a CPU a few clips at a time stay in cache: 3 times faster than the batch at once
            parts = waveform.float().split(len(waveform) if waveform.is_cuda else 4)
            power = torch.cat([self.mel_scale(self.power(part)) for part in parts])  # (B, M, T_mel)
            return 10 * torch.log10(power.clamp(min=1e-10)).transpose(1, 2)  # (B, T_mel, M)

    def power(self, waveform):
        spectrum = torch.view_as_real(self.spectrogram(waveform))  # (B, bins, T_mel, 2)
        # torchaudio's abs() would first take a slow square root
        return spectrum[..., 0].square() + spectrum[..., 1].square()


def spec_augment(x, time_width: int, mel_width: int, stripes: int = 2):
    """Zero `stripes` random stripes a clip along time and along mel. x (B, T_mel, M).

    Widths are uniform in [0, width), positions uniform where the stripe fits (SpecAugment as in
    torchlibrosa). Drawn on x's device without synchronisation.
    """
    for dim, width in ((1, time_width), (2, mel_width)):
        size = x.shape[dim]
        widths = (torch.rand(len(x), stripes, device=x.device) * width).floor()  # (B, stripes)
        starts = (torch.rand(len(x), stripes, device=x.device) * (size - widths)).floor()
        position = torch.arange(size, device=x.device)
        hit = ((position >= starts[..., None]) & (position < (starts + widths)[..., None])).any(
            1
        )  # (B, size)
        x = x.masked_fill(hit[:, :, None] if dim == 1 else hit[:, None, :], 0.0)
    return x


# ------------------------------------------------------------------------------------------------
# Transformer block
# ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection. x (N, L, C) -> (N, L, C).

    bias (P, heads, L, L) is added to the logits; row n of x takes bias[n % P]. Source: MGA-CLAP
    Eq. (4) to (6), there for one head and without a bias.
    """

    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        self.heads = heads
        # rows of q, then of k, then of v, as in HTS-AT's files
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, bias=None):
        N, L, C = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.heads, C // self.heads)  # MGA-CLAP Eq. (4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, L, C / heads) each
        if bias is not None:
            # P rows of x move to the axis of heads, so that one bias fits all groups of P rows
            P = len(bias)
            # (N / P, P * heads, L, C / heads) each
            q, k, v = (x.reshape(N // P, P * self.heads, L, -1) for x in (q, k, v))
            bias = bias.to(q.dtype).flatten(0, 1)  # (P * heads, L, L); fp32 under autocast
        # MGA-CLAP Eq. (5): softmax over positions of the logits plus the bias
        # MGA-CLAP Eq. (6): sum of the values, weighted by that softmax
        # torch scales the logits by 1 / sqrt(C / heads) unless told otherwise
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        # (N, heads, L, C / heads) -> (N, L, heads, C / heads) -> (N, L, C)
        return self.proj(x.reshape(N, self.heads, L, -1).transpose(1, 2).reshape(N, L, C))

    def values(self, x):
        """proj(V(x)): every position keeps its own value, nothing is mixed over positions.

        Source: MGA-CLAP Sec. 3.3, U' = V; the output projection, one of the "other components",
        stays.
        """
        C = x.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[2 * C :]
        return self.proj(F.linear(x, self.qkv.weight[2 * C :], bias))


def drop_path(x, probability: float, training: bool, parts: int = 1):
    """Drop the whole residual branch of a clip, scaling the others by 1 / (1 - p).

    `parts`: consecutive rows of x (N, L, C) that belong to one clip (the windows of Swin) and
    therefore share one draw.
    """
    if not training or probability == 0:
        return x
    keep = torch.rand(len(x) // parts, 1, 1, device=x.device) >= probability  # (clips, 1, 1)
    return x * (keep.to(x.dtype) / (1 - probability)).repeat_interleave(parts, 0)  # (N, 1, 1)


def init_linear_layers(model: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as vision transformers start."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # torch cuts at -2 and 2, not at 2 deviations; timm's function does the same
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block; with `locality`, MGA-CLAP's locality-aware block.

    locality: "" ordinary attention; "paper" the projected values replace attention, all else
    unchanged (MGA-CLAP Sec. 3.3, not numbered: without Eq. (5) and (6), U' = V); "official" as its
    released code: the FFN is left out too and the second LayerNorm's output is added directly.
    Copied alone, needs Attention, drop_path.
    """

    def __init__(
        self, dim, heads, mlp_ratio=4, drop_path=0.0, qkv_bias=True, eps=1e-5, locality=""
    ):
        super().__init__()
        self.drop_path, self.locality = drop_path, locality
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        # fc1 and fc2 are the names in HTS-AT's files
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, mlp_ratio * dim), "fc2": nn.Linear(mlp_ratio * dim, dim)}
        )
        if locality == "official":
            self.mlp.requires_grad_(False)  # unused, kept so that the authors' weights load

    def feed_forward(self, x):
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))  # exact GELU, no tanh approximation

    def forward(self, x, bias=None, parts=1):
        """x (N, L, C); bias (P, heads, L, L) as in `Attention`; parts as in `drop_path`."""

        def drop(branch):
            return drop_path(branch, self.drop_path, self.training, parts)

        if self.locality:
            values = self.attn.values(self.norm1(x))  # MGA-CLAP Sec. 3.3: U' = V
            x = x + drop(values)
            if self.locality == "official":
                return x + drop(self.norm2(x))
            return x + drop(self.feed_forward(self.norm2(x)))
        x = x + drop(self.attn(self.norm1(x), bias))
        return x + drop(self.feed_forward(self.norm2(x)))


# ------------------------------------------------------------------------------------------------
# Checkpoints and weight files
# ------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, payload: dict) -> None:
    """Write a checkpoint. Only last.pt continues a run, so all others leave out the optimiser,
    which takes two thirds of the bytes.
    """
    if path.name != "last.pt":
        payload = {key: value for key, value in payload.items() if key != "optimiser"}
    held = io.BytesIO()  # in memory first: torch's error would not say that the disk is full
    torch.save(payload, held)
    with written_whole(path) as file:
        file.write(held.getbuffer())


def versions() -> dict:
    """Versions of the packages that a checkpoint is written with."""
    packages = (torch, torchaudio, quiet_transformers(), np)
    return {package.__name__: str(package.__version__) for package in packages}


def allowed_globals() -> list:
    """Types that published checkpoints contain beside their weights; no other type in a file is
    ever instantiated.
    """
    from numpy._core.multiarray import scalar

    # scalar under its numpy 2 name and its numpy 1 name
    allowed = [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
    return allowed + [type(np.dtype(t)) for t in "fdil"]  # float, double, C int and C long


def read_weights(path) -> dict:
    """torch.load without executing anything in the file (see `allowed_globals`)."""
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: a folder; give the weight file in it, as {path}/best.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        with torch.serialization.safe_globals(allowed_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many types: not a torch file, cut off, or asking for a class
        raise ValueError(
            f"{path}: not a weight file that can be read safely; expected tensors and plain values "
            "written by torch.save. If it was downloaded, it may be cut off; if it holds a whole "
            "module, save its state_dict() instead"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a dictionary of weights, found {type(content).__name__}"
        )
    return content


def read_encoder_weights(path) -> dict:
    """Read the file of --audio-weights, which must hold an encoder, not a whole model."""
    content = read_weights(path)
    keys = [str(key) for key in (*content, *(content.get("model") or ()))]
    if any(key in ("method", "codebook") or key.startswith("caption_encoder.") for key in keys):
        raise ValueError(f"--audio-weights {path}: a whole model; give it as --weights")
    return content


def read_checkpoint(path, method: str | None = None) -> dict:
    """Read one of this project's checkpoints; `method`: the method it must belong to."""
    content = read_weights(path)
    if "method" not in content or "config" not in content:
        raise ValueError(
            f"{path}: not a checkpoint of this project (keys: "
            f"{', '.join(repr(key)[:40] for key in list(content)[:5])})"
        )
    if method and content["method"] != method:
        raise ValueError(
            f"{path}: a checkpoint of {content['method']}, not of {method}; load it with "
            f"{content['method']}.py"
        )
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(
            f"{path}: a checkpoint of {content['method']} without weights (key 'model')"
        )
    if not isinstance(content["config"], dict):
        raise ValueError(f"{path}: a checkpoint of {content['method']} without its settings")
    return content


def check_keys(path, weights: dict, prefix: str, kind: str) -> None:
    """ValueError for a file that is not of this kind, before its tokenizer is fetched from the
    hub.
    """
    if not any(str(key).startswith(prefix) for key in weights):
        raise ValueError(
            f"{path}: neither a checkpoint of this script nor {kind} (keys: "
            f"{', '.join(repr(key)[:40] for key in list(weights)[:5])})"
        )


def check_sizes(path, sizes: dict, state: dict) -> None:
    """ValueError for a size that a file's weights cannot have: building such a model could take all
    memory, or never end, before its shapes are compared with the file's.
    """
    # at least a million: some settings, such as sample rates, are not sizes of a tensor
    n_weights = max(10**6, sum(tensor.numel() for tensor in state.values()))
    for name, value in sizes.items():
        if isinstance(value, dict):
            check_sizes(path, value, state)
        # a layer has at least one tensor, and a width of n at least n weights
        of_layers = "layers" in name or "depths" in name
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > (len(state) if of_layers else n_weights):
                raise ValueError(
                    f"{path}: {name} is {size}, and the file holds at most {n_weights:,} weights "
                    f"in {len(state):,} tensors"
                )


@contextlib.contextmanager
def rebuilding(path, content: dict):
    """Inside this block a model is built from a checkpoint; any failure becomes one ValueError."""
    text_encoder = content.get("text_encoder")
    try:
        text_config = json.loads(text_encoder["config"])
        settings = {name: content["config"].get(name) for name in MODEL_SETTINGS}
        check_sizes(path, content.get("shape", {}) | settings | text_config, content["model"])
        yield  # errors of the caller's block are caught below too
    except Exception as error:  # of every type: the file may say anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: no model can be built from its settings ({reason})") from None


# Config fields that hold sizes of a model, for methods whose models are built from their Config
MODEL_SETTINGS = ("audio_dim", "audio_depths", "joint_dim", "codewords")


def load_strict(module: nn.Module, state: dict, source) -> None:
    """load_state_dict with one error message that names missing, unexpected and misshapen keys."""
    own = module.state_dict()
    found = {
        "missing keys": [key for key in own if key not in state],
        "unexpected keys": [str(key) for key in state if key not in own],
        "wrong shapes": [
            f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
            for key in own
            if torch.is_tensor(state.get(key)) and state[key].shape != own[key].shape
        ],
        "not tensors": [str(key) for key in state if not torch.is_tensor(state[key])],
    }
    # load_state_dict would list every key
    problems = [
        f"{kind}: {len(names)} ({', '.join(names[:4])})" for kind, names in found.items() if names
    ]
    if problems:
        raise ValueError(f"{source}: these are not weights of this model; " + "; ".join(problems))
    module.load_state_dict(state)


def quiet_transformers():
    import transformers  # not at the top: --help does not need it and starts faster

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def transformers_config(name: str):
    """The config of a transformers folder or hub id.

    The file's choice of attention is dropped: it may name a kernel that would be downloaded.
    """
    config = quiet_transformers().AutoConfig.from_pretrained(name)
    config._attn_implementation = None
    return config


@contextlib.contextmanager
def from_hub(what: str):
    """Gives transformers; if it cannot load the model, one sentence, which begins with `what`."""
    try:
        yield quiet_transformers()
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{what} not a model folder and not to be had from the hub "
            f"({reason}); give a folder that holds config.json and weights (of a text encoder its "
            "tokenizer, too), or connect to a network"
        ) from None


def transformers_weights(name: str) -> dict:
    """State dict of a transformers CLAP folder or hub id."""
    with from_hub(f"{name}:") as transformers:
        config = transformers_config(name)
        kinds = {"clap": transformers.ClapModel, "clap_audio_model": transformers.ClapAudioModel}
        if config.model_type in kinds:
            return kinds[config.model_type].from_pretrained(name, config=config).state_dict()
    raise ValueError(f"{name}: a transformers model of type '{config.model_type}'; expected CLAP")


# ------------------------------------------------------------------------------------------------
# HTS-AT
# ------------------------------------------------------------------------------------------------


class SwinStage(nn.Module):
    """Blocks on one grid of G x G cells, then a 2 x 2 patch merging (absent in the last stage).

    Every block attends within windows of `window` x `window` cells; every second block shifts them
    by half a window. Source: Liu et al., Swin Transformer, ICCV 2021.
    """

    def __init__(self, dim, grid, heads, window, drop_paths, localities, merge):
        super().__init__()
        # source: Swin's code, where a grid below the window is one window
        self.grid, self.window = grid, min(window, grid)
        self.shift = self.window // 2 if grid > self.window else 0  # one window: nothing to shift
        self.blocks = nn.ModuleList(
            Block(dim, heads, drop_path=p, locality=kind) for p, kind in zip(drop_paths, localities)
        )
        # ((2 w - 1)^2, heads): a row for each offset between two cells of a window
        self.bias_tables = nn.ParameterList(
            nn.init.trunc_normal_(
                nn.Parameter(torch.empty((2 * self.window - 1) ** 2, heads)), std=0.02
            )
            for _ in self.blocks
        )
        for block, table in zip(self.blocks, self.bias_tables):
            table.requires_grad_(not block.locality)  # DDP stops at a parameter without a gradient
        self.downsample = None
        if merge:
            self.downsample = nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(4 * dim),  # 2 x 2 cells side by side
                    "reduction": nn.Linear(4 * dim, 2 * dim, bias=False),
                }
            )

        side = torch.arange(self.window)
        row, column = torch.cartesian_prod(side, side).T  # (L,) each, L cells in a window
        row_offset = row[:, None] - row[None, :] + self.window - 1  # (L, L), from 0 to 2 w - 2
        column_offset = column[:, None] - column[None, :] + self.window - 1
        index = row_offset * (2 * self.window - 1) + column_offset  # (L, L) rows of a bias table
        self.register_buffer("bias_index", index.flatten(), persistent=False)  # (L * L,)
        if self.shift:  # cells that the roll brought together from opposite edges must not attend
            edge = torch.zeros(grid, dtype=torch.long)
            # the shift is smaller than the window, so the 2 overwrites a part of the 1
            edge[-self.window :], edge[-self.shift :] = 1, 2
            region = 3 * edge[:, None] + edge  # (G, G)
            region = self.to_windows(region[None, :, :, None]).squeeze(-1)  # (windows, L)
            # not -100 as elsewhere: exp(-100) is a denormal number, which slows a CPU's products
            # fivefold
            mask = (region[:, :, None] != region[:, None, :]) * -1e4
            self.register_buffer("shift_mask", mask, persistent=False)  # (windows, L, L)

    def to_windows(self, x):
        """x (B, G, G, C) -> (B * windows, L, C)."""
        B, G, _, C = x.shape
        n, w = G // self.window, self.window
        # (B, n, w, n, w, C) -> (B, n, n, w, w, C): the cells of a window become neighbours
        return x.view(B, n, w, n, w, C).transpose(2, 3).reshape(-1, w * w, C)

    def from_windows(self, x):
        """The inverse of `to_windows`."""
        G, w, C = self.grid, self.window, x.shape[-1]
        n = G // w
        # (B, n, n, w, w, C) -> (B, n, w, n, w, C) -> (B, G, G, C)
        return x.view(-1, n, n, w, w, C).transpose(2, 3).reshape(-1, G, G, C)

    def attention_bias(self, i: int, shift: int):
        """What block i adds to its logits: (1 or windows, heads, L, L)."""
        L = self.window**2
        # (L * L, heads) -> (1, L, L, heads)
        bias = F.embedding(self.bias_index, self.bias_tables[i]).view(1, L, L, -1)
        bias = bias.permute(0, 3, 1, 2)  # (1, heads, L, L)
        return bias + self.shift_mask[:, None] if shift else bias  # (windows, heads, L, L)

    def forward(self, x):
        """x (B, G, G, C) -> (B, G / 2, G / 2, 2 C), or (B, G, G, C) in the last stage."""
        B = len(x)
        for i, block in enumerate(self.blocks):
            shift = self.shift if i % 2 else 0
            if shift:
                x = torch.roll(x, (-shift, -shift), (1, 2))  # rolling the cells shifts the windows
            bias = None if block.locality else self.attention_bias(i, shift)
            x = self.to_windows(x)  # (B * windows, L, C)
            x = self.from_windows(block(x, bias, parts=len(x) // B))
            if shift:
                x = torch.roll(x, (shift, shift), (1, 2))
        if self.downsample is None:
            return x
        # (B, G / 2, G / 2, 4 C), in the order of Swin's PatchMerging, on which the weights depend
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.downsample["reduction"](self.downsample["norm"](x))  # (B, G / 2, G / 2, 2 C)


class HTSAT(nn.Module):
    """HTS-AT audio encoder (Swin on a folded spectrogram), without its tagging heads.

    Source: Chen et al., ICASSP 2022; official htsat.py. The spectrogram is stretched to
    spec_size * chunks frames, cut into `chunks` pieces of time that are stacked along frequency,
    and the square image goes through Swin stages. For the paper's size the output grid is 8 x 8:
    4 chunks x 2 frequency halves by 8 columns, so 32 frames, each 1/32 of the clip (0.3125 s of
    10 s); shorter clips also give 32.

    Args
        dim, depths, heads: channels of stage 1, blocks and heads a stage ("tiny" in HTS-AT's words;
            LAION's "base" is dim 128, depths 2 2 12 2).
        patch: side of a patch, in mel bins and frames; window: side of an attention window, in
            cells of a stage's grid of spec_size / (patch * 2^i), i = 0, 1, ...; it divides every
            grid that is larger.
        spec_size: side of the image; n_mels: M, divides spec_size. The last grid is a multiple of
            the chunks, spec_size / n_mels.
        drop_path: probability in the last block, rising from 0 in the first.
        locality_blocks: how many blocks are locality-aware, from the last one backwards through all
            stages.
        locality: "paper" or "official", see `Block`.
    Copied alone, needs SwinStage, Block, Attention, drop_path, init_linear_layers, spec_augment.
    """

    def __init__(
        self,
        dim=96,
        depths=(2, 2, 6, 2),
        heads=(4, 8, 16, 32),
        patch=4,
        window=8,
        spec_size=256,
        n_mels=64,
        drop_path=0.1,
        locality_blocks=0,
        locality="paper",
    ):
        super().__init__()
        self.spec_size, self.chunks = spec_size, spec_size // n_mels
        self.out_dim = dim * 2 ** (len(depths) - 1)
        # 4 chunks of 8 columns for the paper's size
        self.n_frames = self.chunks * (spec_size // (patch * 2 ** (len(depths) - 1)))
        self.bn0 = nn.BatchNorm1d(n_mels)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(1, dim, patch, patch), "norm": nn.LayerNorm(dim)}
        )
        drops = torch.linspace(0, drop_path, sum(depths)).tolist()  # as Swin: rising with depth
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            behind = sum(depths[i:])  # blocks from the first of this stage to the last of all
            kinds = [locality if behind - j <= locality_blocks else "" for j in range(depth)]
            self.layers.append(
                SwinStage(
                    dim * 2**i,
                    spec_size // (patch * 2**i),
                    heads[i],
                    window,
                    [drops.pop(0) for _ in range(depth)],
                    kinds,
                    merge=i < len(depths) - 1,
                )
            )
        self.norm = nn.LayerNorm(self.out_dim)
        init_linear_layers(self)

    def forward(self, log_mel):
        """log_mel (B, T_mel, M) in dB, T_mel <= spec_size * chunks -> frame_feats (B, T,
        out_dim).
        """
        B, T_mel, M = log_mel.shape
        x = self.bn0(log_mel.transpose(1, 2)).transpose(1, 2)  # BatchNorm1d wants (B, M, T_mel)
        if self.training:  # after bn0, so that 0 is each bin's mean
            x = spec_augment(x, time_width=64, mel_width=8)
        length = self.spec_size * self.chunks  # 1024 frames for the paper's size, 10.24 s
        if T_mel > length:
            raise ValueError(f"spectrogram of {T_mel} frames; this encoder takes at most {length}")
        # (B, 1, length, M); source: official reshape_wav2img
        x = F.interpolate(x[:, None], (length, M), mode="bicubic", align_corners=True)
        # row = chunk * M + mel, column = time
        x = x.view(B, self.chunks, self.spec_size, M).transpose(2, 3)  # (B, chunks, M, spec_size)
        # image (B, 1, chunks * M, spec_size) -> patches (B, C, G, G)
        x = self.patch_embed["proj"](x.reshape(B, 1, self.spec_size, self.spec_size))
        x = self.patch_embed["norm"](x.permute(0, 2, 3, 1))  # (B, G, G, C)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)  # (B, 8, 8, C) for the paper's size
        _, G, _, C = x.shape
        # (B, chunks, G / chunks, G, C) -> (B, chunks, G, C)
        x = x.view(B, self.chunks, G // self.chunks, G, C).mean(2)  # mean over frequency
        return x.reshape(B, self.n_frames, C)  # the chunks follow one another in time


def check_htsat(cfg) -> None:
    """ValueError for settings that cannot build an HTS-AT with an image of 256 x 256."""
    stages = len(cfg.audio_depths)
    if len(cfg.audio_heads) != stages:
        raise ValueError(
            f"--audio-depths has {stages} numbers, --audio-heads {len(cfg.audio_heads)}: expected "
            "one number per stage in both"
        )
    for i, heads in enumerate(cfg.audio_heads):
        if cfg.audio_dim * 2**i % heads:
            raise ValueError(
                f"--audio-heads: {heads} heads do not divide the {cfg.audio_dim * 2**i} channels "
                f"of stage {i + 1} (--audio-dim {cfg.audio_dim}, doubled every stage)"
            )
    # the last grid holds four pieces of the spectrogram, one below the other
    least = 4 * cfg.audio_patch * 2 ** (stages - 1)
    if 256 % least:
        raise ValueError(
            f"--audio-patch {cfg.audio_patch} with {stages} stages: 4 * patch * 2^(stages - 1) = "
            f"{least} must divide 256"
        )


def htsat_state(weights: dict) -> dict:
    """Rename the HTS-AT weights of any published file to our names; keys that this encoder does not
    use are dropped by name.

    Takes the state dict of the authors' AudioSet file (prefix "sed_model."), of MGA-CLAP and LAION
    files with their prefix already removed, and of transformers' ClapModel or ClapAudioModel.
    """
    state, qkv = {}, {}
    # masks and indices that are computed here, tagging heads, the front ends of the authors and of
    # MGA-CLAP, LAION's fusion
    unused = re.compile(
        r"attn_mask$|relative_position_index$|^(tscam_conv|head)\.|"
        r"^(spectrogram|logmel)_extractor\.|"
        r"^(audio_feats_extractor|mel_trans)\.|position_ids$|patch_embed\.mel_conv2d\."
    )
    for key, value in weights.items():
        key = re.sub(r"^(sed_model\.|(audio_model\.)?audio_encoder\.)", "", key)
        if unused.search(key):
            continue
        # transformers' names; "attention.output.dense" goes first because it contains
        # "output.dense"
        for theirs, ours in (
            ("batch_norm.", "bn0."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("attention.self.relative", "attn.relative"),
        ):
            key = key.replace(theirs, ours)
        # published files have a table in each block, ours a list of tables in each stage
        table = re.match(r"(layers\.\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$", key)
        part = re.match(r"(.*)\.attention\.self\.(query|key|value)\.(weight|bias)$", key)
        if table:
            state[f"{table[1]}.bias_tables.{table[2]}"] = value
        elif part:
            qkv.setdefault(f"{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = value
        else:
            state[key] = value
    for key, parts in qkv.items():
        if len(parts) == 3:  # else `load_strict` names what is missing
            # (3 C, C) or (3 C,), in the order of `Attention.qkv`
            state[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return state


def load_htsat(encoder: HTSAT, path: str) -> None:
    """Start an HTS-AT from HTSAT_AudioSet*.ckpt, a transformers CLAP folder, or a saved
    state dict.
    """
    folder = Path(path)
    if folder.is_dir() or not (folder.suffix or folder.is_file()):  # a folder, or a hub id
        weights = transformers_weights(path)
        weights = {
            k: v
            for k, v in weights.items()
            if k.startswith(("audio_model.audio_encoder.", "audio_encoder."))
        }
    else:
        weights = read_encoder_weights(path)
        weights = weights.get("state_dict", weights)  # Lightning nests them
        if any(str(key).startswith("sed_model.") for key in weights):
            weights = {k: v for k, v in weights.items() if str(k).startswith("sed_model.")}
    load_strict(encoder, htsat_state(weights), path)


# ------------------------------------------------------------------------------------------------
# Text encoder
# ------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """A transformers text encoder and its tokenizer, in one module that a checkpoint can rebuild.

    Args
        model: transformers encoder; tokenizer: its fast tokenizer; max_tokens: captions are cut
            there, special tokens included; pooler: keep the encoder's pooling layer, for a caller
            that uses it.
    """

    def __init__(self, model, tokenizer, max_tokens: int, pooler: bool = False):
        super().__init__()
        if getattr(model, "pooler", None) is not None and not pooler:
            model.pooler = None  # an unused layer would stop DDP
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.out_dim = model.config.hidden_size

    def tokenize(self, texts: list[str]) -> dict:
        """-> input_ids (B, L), attention_mask (B, L), word_mask (B, L) bool, True = a real word
        piece.
        """
        tokens = self.tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        word_mask = tokens["special_tokens_mask"] == 0  # [UNK] counts as a word, padding does not
        if not word_mask.any(1).all():
            empty = texts[int((~word_mask.any(1)).nonzero()[0, 0])]
            raise ValueError(
                f"the text {empty!r} has no token to embed; every text needs at least one word"
            )
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "word_mask": word_mask,
        }

    def forward(self, input_ids, attention_mask):
        """The first two of what `tokenize` returns -> last hidden state (B, L, out_dim)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def description(self) -> dict:
        """What `text_encoder_from_description` needs, as plain strings."""
        special = {k: v for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return {
            "config": json.dumps(self.model.config.to_dict()),
            "special_tokens": json.dumps(special),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }


def text_encoder_from_pretrained(
    name: str, max_tokens: int, pooler: bool = False, weights: bool = True
) -> TextEncoder:
    """From a hub id or a local folder, e.g. "bert-base-uncased". Without weights: config and
    tokenizer only, for a file that holds the weights.
    """
    with from_hub(f"--text-model {name}:") as transformers:
        config = transformers_config(name)
        # transformers 5 would keep half precision where the file has it
        if weights:
            model = transformers.AutoModel.from_pretrained(name, config=config, dtype=torch.float32)
        else:
            model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return TextEncoder(model, tokenizer, max_tokens, pooler)


def text_encoder_from_scratch(
    captions: list[str],
    dim: int,
    layers: int,
    heads: int,
    max_tokens: int,
    vocabulary=4000,
    pooler=False,
) -> TextEncoder:
    """A small random BERT whose WordPiece vocabulary is learnt from the training captions.

    It holds the most frequent words, plus single characters for all others. The WordPiece trainer
    of tokenizers is not used: it breaks ties at random, so two runs of one seed would differ.
    Copied alone, needs TextEncoder, quiet_transformers.
    """
    transformers = quiet_transformers()
    # only its lower-casing and its splitting into words are used
    backend = transformers.BertTokenizer().backend_tokenizer
    words = collections.Counter()
    for caption in captions:
        caption = backend.normalizer.normalize_str(caption)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(caption))
    characters = sorted({character for word in words for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    # ## is WordPiece's mark of a piece that continues a word
    pieces += ["##" + character for character in characters]
    # by count, ties in alphabetical order
    ranked = sorted(words, key=lambda word: (-words[word], word))
    frequent = [word for word in ranked if len(word) > 1]  # single characters are pieces already
    pieces += frequent[: max(0, vocabulary - len(pieces))]
    tokenizer = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        max_position_embeddings=max(64, max_tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(transformers.BertModel(config), tokenizer, max_tokens, pooler)


def published_text_model(cfg) -> str:
    """--text-model for an authors' file, which needs a tokenizer. "none", as --size tiny and
    --data demo have it, is for new models: the default of the script's Config is taken instead.
    """
    return type(cfg).text_model if cfg.text_model == "none" else cfg.text_model


def start_text_encoder(cfg, texts: list[str], max_tokens: int, pooler: bool = False) -> TextEncoder:
    """The text encoder of a new model: that of --text-model, or, if that is "none", a random one
    with the vocabulary of `texts`.
    """
    if cfg.text_model != "none":
        return text_encoder_from_pretrained(cfg.text_model, max_tokens, pooler)
    heads = max(1, cfg.text_dim // 64)  # of 64 channels, as in BERT
    if cfg.text_dim % heads:
        raise ValueError(f"--text-dim {cfg.text_dim}: expected a multiple of 64")
    return text_encoder_from_scratch(
        texts, cfg.text_dim, cfg.text_layers, heads, max_tokens, pooler=pooler
    )


def text_encoder_from_description(
    description: dict, max_tokens: int, pooler: bool = False
) -> TextEncoder:
    """Rebuild the module stored in a checkpoint (random weights, to be loaded), without a
    network.
    """
    transformers = quiet_transformers()
    from tokenizers import Tokenizer

    config = json.loads(description["config"])
    config = transformers.AutoConfig.for_model(**config)
    config._attn_implementation = None  # as in `transformers_config`
    if config.model_type == "clip_text_model":  # CoLLAT needs its projection
        # float(), since the stored config may name half precision
        model = transformers.CLIPTextModelWithProjection(config).float()
    else:
        model = transformers.AutoModel.from_config(config).float()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(description["tokenizer"]),
        **json.loads(description["special_tokens"]),
    )
    return TextEncoder(model, tokenizer, max_tokens, pooler)


# ------------------------------------------------------------------------------------------------
# Sparsemax
# ------------------------------------------------------------------------------------------------


def sparsemax(z):
    """Euclidean projection of z (..., K) onto the simplex, in fp32 (or fp64): many exact zeros.

    Source: Martins & Astudillo, ICML 2016: max(z - threshold, 0), with the threshold that makes the
    sum 1, found by sorting. Copied alone, needs nothing else.
    """
    z = z if z.dtype == torch.float64 else z.float()
    z = z - z.detach().amax(-1, keepdim=True)  # changes the rounding, but not the projection
    ranked = z.sort(-1, descending=True).values  # (..., K), largest first
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    excess = ranked.cumsum(-1) - 1  # (..., K): sum of the k largest, less 1
    # number of outputs that are not 0; at least 1, except with NaN, hence the clamp
    size = (rank * ranked > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, size - 1) / size  # (..., 1), tau in the paper
    return (z - threshold).clamp(min=0)


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------


def retrieval_ranks(sim: np.ndarray, owner: np.ndarray, text=None) -> dict:
    """Ranks (0 = best) in both directions; a tie counts against the right answer.

    Args: sim (N, Q) cosine, audio in rows; owner (Q,), the clip of each caption, any number of
        captions a clip, in any order; text (Q,): captions with the same number have the same text,
        and every clip with such a caption is a right answer for them. None: a caption belongs to
        its own clip alone.
    Returns
        t2a (Q,): rank of the best of the caption's clips among N, one query a caption.
        a2t (N,): rank of the best of the clip's captions among all Q.
        t2a_ap10 (Q,), a2t_ap10 (N,): sum of i / (r_i + 1) over the right answers in the top 10 (the
            i-th has rank r_i), divided by the number of right answers.
    Clips without a caption are only distractors for t2a and are left out of a2t.
    Copied alone, needs right_answers, ranks_of_right.
    """
    if not np.isfinite(sim).all():
        raise FloatingPointError(
            "some similarities are NaN or infinite; the model's weights are broken"
        )
    captions_of, clips_of = right_answers(owner, len(sim), text)
    found = {}
    for way, scores, right in (("t2a", sim.T, clips_of), ("a2t", sim, captions_of)):
        queries = tqdm(zip(scores, right), "ranks", len(right), leave=False, delay=2)
        ranks = [ranks_of_right(of_query, of) for of_query, of in queries if len(of)]
        found[way] = np.array([best[0] for best in ranks])
        found[f"{way}_ap10"] = np.array(
            [(np.arange(1, len(r) + 1) / (r + 1))[r < 10].sum() / len(r) for r in ranks]
        )
    return found


def ranks_of_right(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Ranks of one query's right answers, best first. scores (n,), right: their indices."""
    best_first = -np.sort(-scores[right])
    wrong = np.sort(np.delete(scores, right))
    # wrong answers that score at least as high, and the right ones that rank before
    return len(wrong) - np.searchsorted(wrong, best_first) + np.arange(len(right))


def right_answers(owner: np.ndarray, n_clips: int, text=None) -> tuple[list, list]:
    """The captions of each clip, with `text` also those of other clips that have an equal text, and
    the clips of each caption; all as index arrays.
    """
    text = np.arange(len(owner)) if text is None else text
    captions_of = [np.flatnonzero(np.isin(text, text[owner == clip])) for clip in range(n_clips)]
    clips_of = [np.unique(owner[text == number]) for number in text]
    return captions_of, clips_of


def retrieval_scores(ranks: dict) -> dict:
    """R@1, R@5, R@10, mAP@10, MRR and median rank (from 1) of `retrieval_ranks`, both directions.

    Copied alone, needs nothing else.
    """
    scores = {}
    for way in ("t2a", "a2t"):
        r = ranks[way]
        for k in (1, 5, 10):
            scores[f"{way}_R@{k}"] = float((r < k).mean())
        scores[f"{way}_mAP@10"] = float(ranks[f"{way}_ap10"].mean())
        scores[f"{way}_MRR"] = float((1 / (r + 1)).mean())
        scores[f"{way}_median_rank"] = float(np.median(r) + 1)
    return scores


def retrieval_chance(owner: np.ndarray, n_clips: int, text=None) -> dict:
    """The chance levels of `retrieval_scores`, its metrics for random scores; args as in
    `retrieval_ranks`.
    """
    captions_of, clips_of = right_answers(owner, n_clips, text)
    chance = {}
    for way, right, n in (("t2a", clips_of, n_clips), ("a2t", captions_of, len(owner))):
        # most queries have equally many right answers
        sizes, times = np.unique([len(of) for of in right if len(of)], return_counts=True)
        share = times / times.sum()
        levels, survival = zip(*[chance_of_best(int(m), n) for m in sizes])
        for name in levels[0]:
            chance[f"{way}_{name}"] = float(share @ [of_size[name] for of_size in levels])
        # where half of the best answers of all queries are found; between two ranks if exactly half
        survival = share @ np.array(survival)
        median = int(np.argmax(survival < 0.5 + 1e-9))
        chance[f"{way}_median_rank"] = median + (0.5 if survival[median] > 0.5 - 1e-9 else 0.0)
    return chance


def chance_of_best(m: int, n: int) -> tuple[dict, np.ndarray]:
    """Metrics of one query with m right answers among n, all in random order, but the median rank;
    (n + 1,) the chance that no right answer is among the first r.
    """
    # survival[r]: no right answer among the first r, C(n - m, r) / C(n, r)
    steps = [max(0, n - m - r) / (n - r) for r in range(n)]
    survival = np.concatenate([[1.0], np.cumprod(steps)])
    chance = {f"R@{k}": 1 - survival[min(k, n)] for k in (1, 5, 10)}
    # E[i / (r + 1)] summed over right answers: each lies at rank r with probability 1 / n
    # at rank r, E[i] = 1 + r (m - 1) / (n - 1); the sum over m answers and the division by m cancel
    gains = [(1 + r * (m - 1) / max(1, n - 1)) / (r + 1) for r in range(min(10, n))]
    chance["mAP@10"] = sum(gains) / n
    # -diff(survival)[r]: the chance that the best answer is at rank r
    chance["MRR"] = (-np.diff(survival) / np.arange(1, n + 1)).sum()
    return chance, survival


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Area under the precision-recall steps; equal scores form one threshold (as scikit-learn).

    scores (N,), targets (N,) bool; NaN if no target is True. Copied alone, needs nothing else.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(targets[order])
    if not len(hits) or hits[-1] == 0:
        return float("nan")
    # last index of each threshold
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    gained = np.diff(hits[ends], prepend=0)
    return float((gained / hits[-1] * hits[ends] / (ends + 1)).sum())  # recall gained * precision


def class_average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N, C) scores and bool targets -> (C,) AP, NaN for a class without a positive; mAP is
    np.nanmean of it. Copied alone, needs average_precision.
    """
    return np.array([average_precision(s, t) for s, t in zip(scores.T, targets.T)])


def chance_of_mean_ap(targets: np.ndarray) -> float:
    """Expected mean AP of random scores over the classes of targets (N, C) bool with a positive.

    A positive at rank r (from 0, each with probability 1 / N) has a precision of
    (1 + r (m - 1) / (N - 1)) / (r + 1), m positives: for large N their share, for small N more.
    Copied alone, needs nothing else.
    """
    n, positives = len(targets), targets.sum(0)[targets.any(0)]
    harmonic = (1 / np.arange(1, n + 1)).sum()
    others = (positives - 1) / max(1, n - 1)
    return float(((harmonic + others * (n - harmonic)) / n).mean())


def label_targets(rows: list[dict], classes: list[str]) -> np.ndarray:
    """(N, C) bool: is the class among a row's labels or events? Labels outside `classes` do not
    count.
    """
    index = {c: i for i, c in enumerate(classes)}
    targets = np.zeros((len(rows), len(classes)), bool)
    for n, row in enumerate(rows):
        found = [*row.get("labels", []), *(event["label"] for event in row.get("events", []))]
        targets[n, [index[label] for label in found if label in index]] = True
    if not targets.any():
        raise ValueError(
            f"none of the manifest's labels is among the {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...); is classes.txt beside the manifest the right list?"
        )
    return targets


def frame_targets(row: dict, classes: list[str], n_frames: int, frame_s: float) -> np.ndarray:
    """(n_frames, C) bool: True where an event of the class covers the frame's centre."""
    targets = np.zeros((n_frames, len(classes)), bool)
    centre_s = (np.arange(n_frames) + 0.5) * frame_s
    for event in row.get("events", []):
        if event["label"] in classes:
            targets[
                (centre_s >= event["onset"]) & (centre_s < event["offset"]),
                classes.index(event["label"]),
            ] = True
    return targets


def frame_average_precisions(
    frame_embeds, class_embeds, rows, classes, frame_s: float, centred: bool
):
    """Frame-level AP of each class over all frames of all clips.

    Args
        frame_embeds: list of (T_i, D); class_embeds (C, D), both normalised, row k for classes[k].
        rows: row i has "events" [{label, onset, offset}], in seconds, of frame_embeds[i].
        frame_s: seconds per frame.
        centred: subtract each frame's mean over classes from its scores. Raw cosines (the papers'
            protocol) also compare frames by how much they resemble any class at all.
    Returns: AP (C,), NaN for a class without a frame; chance level of their mean.
    Copied alone, needs class_average_precisions, average_precision, frame_targets,
    chance_of_mean_ap.
    """
    scores = np.concatenate(frame_embeds) @ class_embeds.T  # (frames, C)
    if centred:
        scores = scores - scores.mean(1, keepdims=True)
    # (frames, C), in the order of `scores`
    targets = np.concatenate(
        [frame_targets(row, classes, len(f), frame_s) for row, f in zip(rows, frame_embeds)]
    )
    return class_average_precisions(scores, targets), chance_of_mean_ap(targets)


# ------------------------------------------------------------------------------------------------
# Loading batches
# ------------------------------------------------------------------------------------------------


def to_device(x, device):
    """Move the tensors of nested lists and dicts to the device."""
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)  # asynchronous only from pinned memory
    if isinstance(x, dict):
        return {key: to_device(value, device) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(to_device(value, device) for value in x)
    return x


def outlive_signals(_worker: int) -> None:
    """Let a loader's worker ignore the signals that torchrun, batch systems and Ctrl-C send to the
    whole process group, so that the training can save. Workers end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose workers have both signals blocked from their start, so that none is killed
    and the training can save. Windows cannot block them; there `outlive_signals` ignores them.
    """

    def __init__(self, *given, num_workers=0, **more):
        # torch warns of more workers than the cores it may use, which gain nothing
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        workers = min(num_workers, len(affinity(0)) if affinity else os.cpu_count() or 1)
        super().__init__(*given, num_workers=workers, worker_init_fn=outlive_signals, **more)

    def __iter__(self):
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        # a new process inherits the mask of its parent
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            return super().__iter__()
        except OSError as error:  # no more files or processes
            # the started ones block the SIGTERM that Python sends them at exit before it waits
            for child in multiprocessing.active_children():
                child.kill()
            raise OSError(
                f"--workers {self.num_workers}: they cannot all be started ({error.strerror}); "
                "give fewer"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------------
# Embedding files
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model):
    """Turn off dropout, masking and batch statistics inside the block, then restore the mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class AudioFiles(torch.utils.data.Dataset):
    """Whole files (or their first `length_s`) for evaluation; an unusable file is returned as its
    error.
    """

    def __init__(self, rows, sample_rate, length_s=None):
        self.rows, self.sample_rate, self.length_s = rows, sample_rate, length_s

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        try:
            return i, read_audio(
                row["audio"], self.sample_rate, self.length_s, expected_s=row.get("duration")
            )
        except AudioError as error:
            return i, error  # if raised, it would end the loader


def collate_audio(items):
    """[(index, waveform or AudioError)] -> indices, waveform (B, S), n_samples (B), [(index, error
    text)].
    """
    good = [(i, w) for i, w in items if not isinstance(w, AudioError)]
    bad = [(i, str(w)) for i, w in items if isinstance(w, AudioError)]
    waveform, n_samples = pad_batch([w for _, w in good]) if good else (None, None)
    return [i for i, _ in good], waveform, n_samples, bad


def header_seconds(path) -> float:
    """A file's duration; 30 s for a file that cannot be read, which is left out later."""
    try:
        return sf.info(path).duration
    except (sf.SoundFileRuntimeError, TypeError, OSError):
        return 30.0


def file_batches(model, rows: list[dict], batch_size=32, workers=0, crop="all"):
    """Loader of all files in batches of similar length, as `collate_audio` returns them.

    crop "all": whole files; "first": at most the first window of each; a number: at most so many
    seconds of each.
    """
    length_s = None if isinstance(crop, str) else crop
    if crop == "first" and math.isfinite(model.window_s):
        length_s = model.window_s
    durations = [row.get("duration") or header_seconds(row["audio"]) for row in rows]
    seconds = [min(duration, length_s or math.inf) for duration in durations]
    batches = [[]]
    # in order of length: little padding, and bounded memory
    for i in np.argsort(seconds, kind="stable").tolist():
        most_s = max(seconds[i], 30.0 * batch_size)  # limit of a batch, padding included
        # clip i is the longest so far, so all are padded to its length
        if len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * seconds[i] > most_s:
            batches.append([])
        batches[-1].append(i)
    return Loader(
        AudioFiles(rows, model.sample_rate, length_s),
        batch_sampler=[b for b in batches if b],
        num_workers=workers,
        collate_fn=collate_audio,
    )


@torch.no_grad()
def embed_files(
    model,
    rows: list[dict],
    batch_size=32,
    workers=0,
    crop="all",
    frames=False,
    desc="embedding audio",
    quiet=False,
    autocast=contextlib.nullcontext(),
    none_is_fine=False,
):
    """Embed every readable file of `rows`, whatever their length.

    Args
        rows: manifest rows, or paths of files.
        crop: "all": every consecutive window; "first": the first window only; a number: the windows
            of the first so many seconds.
        frames: the name of the model's method that gives them (True: embed_frames), or False.
        autocast: around embed_audio alone.
        none_is_fine: if no file can be read, return None in place of arrays, not an error.
    Returns
        kept: indices into rows; audio_embeds (N, D) float32; frame_embeds: list of (T_i, D), padded
            frames cut off, or None; bad: error texts of the files left out.
    """
    found, bad = {}, {}
    rows = [row if isinstance(row, dict) else {"audio": os.fspath(row)} for row in rows]
    frames = "embed_frames" if frames is True else frames
    device = next(model.parameters()).device
    loader = file_batches(model, rows, batch_size, workers, crop)
    for indices, waveform, n_samples, errors in tqdm(
        loader, desc=desc, unit="batch", leave=False, disable=quiet
    ):
        bad.update(errors)
        if not indices:
            continue
        waveform = waveform.to(device)
        with autocast:  # around the model alone: audio is resampled in fp32 when it is read
            embeds = model.embed_audio(waveform, n_samples)
        embeds = embeds.float().cpu().numpy()
        if not np.isfinite(embeds).all():
            raise FloatingPointError(
                "some embeddings are NaN or infinite; the model's weights are broken"
            )
        clips = [None] * len(indices)
        if frames:
            clips = getattr(model, frames)(waveform, n_samples).cpu().numpy()
        for i, embed, clip, n in zip(indices, embeds, clips, n_samples.tolist()):
            if frames and frames != "token_embeds":  # their number is the same for every clip
                if getattr(model, "repeats_short_clips", False):
                    # such a model fills its window with repeats, so no frame is padding
                    n = max(n, round(model.window_s * model.sample_rate))
                clip = clip[: frames_in(model, n)]  # (T_i, D)
            found[i] = embed, clip
    if not found and none_is_fine:
        return [], None, None, [bad[i] for i in sorted(bad)]
    if not found:
        if not rows:
            raise ValueError("no audio files were given")
        raise ValueError(f"none of {len(rows)} audio files could be read; first: {bad[min(bad)]}")
    kept = sorted(found)  # batches come by length, results by row
    return (
        kept,
        np.stack([found[i][0] for i in kept]),
        [found[i][1] for i in kept] if frames else None,
        [bad[i] for i in sorted(bad)],
    )


def embed_validation(model, rows: list[dict], frames=False, quiet=True):
    """embed_files for a validation; unreadable clips are reported -> rows of the others,
    audio_embeds (N, D), frame_embeds or None.
    """
    kept, audio_embeds, frame_embeds, bad = embed_files(
        model, rows, frames=frames, desc="validation", quiet=quiet
    )
    for text in bad:
        tqdm.write(f"validation: left out {text}")
    return [rows[i] for i in kept], audio_embeds, frame_embeds


def caption_retrieval(model, audio_embeds, frame_embeds, captions: list[list[str]]):
    """Retrieval among N clips with a list of captions for each -> scores, chance levels, sim (N, Q)
    with the captions in order.
    """
    owner = np.repeat(np.arange(len(captions)), [len(of_clip) for of_clip in captions])  # (Q,)
    texts = [text for of_clip in captions for text in of_clip]
    sim = similarities(model, audio_embeds, frame_embeds, texts)
    scores = retrieval_scores(retrieval_ranks(sim, owner))
    return scores, retrieval_chance(owner, len(captions)), sim


def frames_in(model, n_samples: int) -> int:
    """The number of frames that cover a clip; a last window shorter than one frame adds none.

    Such a window holds a few milliseconds, but its frame would be scored as if it were whole: a
    file of 10.02 s has the 32 frames of its first 10 s.
    """
    frames = n_samples / model.sample_rate / model.frame_s
    rest = frames % (getattr(model, "frame_window_s", model.window_s) / model.frame_s)
    if rest < min(frames, 1) - 1e-6:  # 1e-6: rounding of the divisions
        frames -= rest
    return math.ceil(frames - 1e-6)


def file_key(row: dict) -> str:
    """A key that changes with a row's file (path, size, time of the last change) or its declared
    duration; "" without a file.
    """
    try:
        stat = os.stat(row["audio"])
    except OSError:
        return ""
    return (
        f"{os.path.abspath(row['audio'])}|{stat.st_size}|{stat.st_mtime_ns}|{row.get('duration')}"
    )


def embed_texts(model, texts: list[str], batch_size=256) -> np.ndarray:
    """(Q, D) float32; equal texts are embedded once."""
    unique, places = each_once(texts)
    parts = [
        model.embed_text(unique[i : i + batch_size]).cpu().numpy()
        for i in range(0, len(unique), batch_size)
    ]
    return np.concatenate(parts)[places]


def each_once(texts: list[str]) -> tuple[list[str], list[int]]:
    """The distinct texts, and the place of each text among them."""
    unique = sorted(set(texts))  # np.unique would pad every text to the length of the longest
    place = {text: i for i, text in enumerate(unique)}
    return unique, [place[text] for text in texts]


def similarities(model, audio_embeds, frame_embeds, texts: list[str]) -> np.ndarray:
    """(N, Q) similarity of clips and texts: cosines, or the scores of a model that compares every
    pair. Equal texts are scored once, so that they tie exactly.
    """
    unique, places = each_once(texts)
    if getattr(model, "pairwise", False):
        scores = model.pair_scores(frame_embeds, unique)
    else:
        scores = audio_embeds @ embed_texts(model, unique).T
    return scores[:, places]


# ------------------------------------------------------------------------------------------------
# Settings and command line
# ------------------------------------------------------------------------------------------------


# Types of numeric settings with their ranges; a round bracket excludes the end
Count = Annotated[int, "[1, 1e9]"]

Whole = Annotated[int, "[0, 1e9]"]

Layers = Annotated[int, "[1, 200]"]

Tokens = Annotated[int, "[3, 512]"]  # two are special tokens; BERT has 512 positions

Positive = Annotated[float, "(0, inf)"]

NotNegative = Annotated[float, "[0, inf)"]

Share = Annotated[float, "[0, 1]"]

Dropout = Annotated[float, "[0, 1)"]


@dataclass(init=False)
class RunConfig:
    """The settings of every training; a script's Config adds those of its paper.

    Config(data=["demo"], epochs=2) equals the command line --data demo --epochs 2: a given value
    overrides a preset, a preset overrides the default; then all values are checked.

    Raises
        ValueError: a field is unknown, missing, of another type or outside its range.
    """

    presets: ClassVar[dict] = {}  # {("size", "tiny"): {field: value}}

    # run
    name: str = ""  # folder under --runs; empty: METHOD-1, METHOD-2, ...
    runs: str = "runs"  # where run folders go
    resume: bool = False  # continue runs/NAME/last.pt with its stored settings
    # items that a process passes through the model at a time, to save memory; the loss still sees
    # the whole batch (gradient caching); 0: all of its share
    micro_batch: Whole = 0
    # autocast; auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: Annotated[int, "[0, 1e18]"] = 0  # seeds weights, order, crops and every other draw
    save_steps: Count = 500  # steps between writes of last.pt
    log_steps: Count = 10  # steps between lines of log.jsonl
    # processes that read audio; 0: the training process itself reads it
    workers: Annotated[int, "[0, 256]"] = 8
    # torch.compile of the training pass: costs two minutes or more at the start
    compile: bool = False
    max_bad: Share = 0.05  # largest share of unreadable clips before the run stops
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train

    def __init__(self, **given):
        if given.get("data") == ["demo"]:
            given.setdefault("size", "tiny")
        chosen = {}
        for (name, choice), preset in self.presets.items():
            if given.get(name) == choice:
                chosen |= copy.deepcopy(preset)  # its lists are this Config's own
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"no such setting: {', '.join(unknown)}; there are {', '.join(names)}")
        chosen |= given
        for field in dataclasses.fields(self):
            value = chosen.get(field.name, default_of(field))
            if value is dataclasses.MISSING:
                raise ValueError(f"the setting {field.name} is missing")
            setattr(self, field.name, value)
        check_settings(self)
        self.check()

    def check(self) -> None:
        """ValueError for settings that do not fit one another; each script overrides it."""


def default_of(field):
    """A field's default (a new list at every call); MISSING where there is none."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def settings_of(config_class) -> dict:
    """Field name -> its type with its range, for all fields, those of the paper first."""
    # without extras the ranges in Annotated would be lost
    hints = typing.get_type_hints(config_class, include_extras=True)
    fields = [field.name for field in dataclasses.fields(config_class)]
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    # False sorts before True, and sorted() keeps the order of equal keys
    return {name: hints[name] for name in sorted(fields, key=lambda name: name in shared)}


def check_settings(cfg) -> None:
    """ValueError for a value of another type, outside its range or not among its choices."""
    for name, kind in settings_of(type(cfg)).items():
        check_value("--" + name.replace("_", "-"), getattr(cfg, name), kind)


def check_value(flag: str, value, kind) -> None:
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, list) or (not value and inner is not str):
            raise ValueError(f"{flag} {value!r}: expected a list")
        for item in value:
            check_value(flag, item, inner)
        return
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{flag} {value}: expected {' or '.join(typing.get_args(kind))}")
        return
    interval = None
    if typing.get_origin(kind) is Annotated:
        kind, interval = typing.get_args(kind)
    right = isinstance(value, (int, float) if kind is float else kind)  # Config(lr=1) is valid
    if not right or (isinstance(value, bool) and kind is not bool):  # True is an int to Python
        raise ValueError(f"{flag} {value!r}: expected {kind.__name__}")
    if interval:
        low, high = map(float, interval[1:-1].split(","))
        above = value > low or (value == low and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        if not (above and below):  # nan is neither
            raise ValueError(f"{flag} {value}: expected a number in {interval}")


def cli(config_class, doc: str, argv: list[str] | None = None):
    """Build a Config from --dash-flags; the comment on each field is its help text.

    Args
        doc: module docstring; its first line heads the help, its "Run:" lines end it.
    """
    parser = argparse.ArgumentParser(
        description=doc.strip().splitlines()[0],
        epilog=doc[doc.find("Run:") :] if "Run:" in doc else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the line breaks of `doc`
        allow_abbrev=False,  # an abbreviated flag is an error too
        argument_default=argparse.SUPPRESS,  # only flags that are given override a preset
    )
    comments = field_comments(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    kinds = typing.get_type_hints(config_class)  # without ranges, which `check_settings` checks
    groups = {}
    for name in settings_of(config_class):
        flag, default = "--" + name.replace("_", "-"), default_of(fields[name])
        if default is dataclasses.MISSING:
            default = "required"
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        section, text = comments[name]
        text = f"{text} [{shown}]".replace("%", "%%")  # argparse formats help with %
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        group, kind = groups[section], kinds[name]
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(kind) is Literal:
            group.add_argument(flag, choices=typing.get_args(kind), help=text)
        elif typing.get_origin(kind) is list:
            inner = typing.get_args(kind)[0]
            group.add_argument(flag, nargs="+", type=inner, metavar="X", help=text)
        else:
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    given = vars(parser.parse_args(argv))
    if "data" in fields and "data" not in given and not given.get("resume"):
        parser.error(
            "--data is missing: give a manifest, a folder that holds manifest.jsonl, or the word "
            "demo"
        )
    try:
        return configure(config_class, **given)
    except ValueError as error:
        parser.error(str(error))


@functools.cache
def field_comments(config_class) -> dict[str, tuple[str, str]]:
    """Field name -> its heading and its comment, which stands above it or behind it.

    A heading is the first comment line after an empty one.
    """
    comments = {}
    for owner in reversed(config_class.__mro__[:-1]):  # base class first, without object
        source, section = textwrap.dedent(inspect.getsource(owner)), ""
        lines = source.split("\n")
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            above, at = [], node.lineno - 2  # the line before, counted from 0
            while lines[at].strip().startswith("#"):
                above.insert(0, lines[at].strip().lstrip("# "))
                at -= 1
            if above and (not lines[at].strip() or lines[at].startswith("class ")):
                section = above.pop(0)
            behind = lines[node.end_lineno - 1].partition("  # ")[2]
            comments[node.target.id] = section, " ".join([*above, behind]).strip()
    return comments


def configure(config_class, **given):
    """A script's Config from some of its fields, as its command line builds it.

    With resume=True the other fields are those stored in runs/<name>/last.pt.
    """
    if not given.get("resume"):
        return config_class(**given)
    if not given.get("name"):
        raise ValueError("--resume needs --name, the folder under runs/ to continue")
    path = Path(given.get("runs", "runs")) / given["name"] / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is not there; start without --resume")
    stored = read_checkpoint(path)
    method = stored["method"]
    differing = set(stored["config"]) ^ {field.name for field in dataclasses.fields(config_class)}
    if differing and method != Path(inspect.getfile(config_class)).stem:
        raise ValueError(f"--resume: {path} holds a run of {method}; continue it with {method}.py")
    if differing:
        raise ValueError(
            f"--resume: {path} was written by another version of {method}.py, with other settings "
            f"({', '.join(sorted(differing))}); continue it with that version or start a new --name"
        )
    # later entries win; `check_resume` refuses flags that contradict the stored settings
    return config_class(**{**stored["config"], "runs": given.get("runs", "runs"), **given})


def flags_of(cfg, **changed) -> str:
    """The flags that give `cfg` with some fields changed: --data, and all fields whose value is
    neither a default nor a preset's.
    """
    cfg = dataclasses.replace(cfg, **changed)
    choosers = {name for name, _ in cfg.presets}  # --size and the like
    chosen = {name: getattr(cfg, name) for name in choosers}
    usual = type(cfg)(data=cfg.data)  # --data demo chooses a size
    preset = type(cfg)(data=cfg.data, **chosen)
    words = ["--data", *cfg.data]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        default = getattr(usual if field.name in choosers else preset, field.name)
        if field.name not in ("data", "resume") and value != default:
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


class UntilClosed:
    """A stream whose reader may stop reading, as in `| head`: later output is dropped, and the
    program continues.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.stream = open(os.devnull, "w")
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.stream = open(os.devnull, "w")


END_SIGNALS = []  # signals that asked a training, started as a script, to save and end


def ask_for_the_end(number, _frame) -> None:
    """First SIGTERM or Ctrl-C: the loop saves and ends (`Run.end_if_told`). A second one ends it at
    once, or is ignored under torchrun.
    """
    END_SIGNALS.append(number)
    # under torchrun a process gets two signals, the batch system's and torchrun's
    signal.signal(number, signal.SIG_IGN if "RANK" in os.environ else signal.SIG_DFL)
    if number == signal.SIGINT:  # not by print(), which the signal may have interrupted
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of stderr
            os.write(2, b"\nsaving after this step; Ctrl-C again ends at once, without saving\n")


def run_entry(main, parse, *given):
    """Run `main(parse(*given))` as a script. An error that the user can fix becomes one line on
    stderr and exit code 1 (TRACEBACK=1: a traceback); SIGTERM and Ctrl-C let a training save first.
    """
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    streams = sys.stdout, sys.stderr
    if None not in streams:  # pythonw has none
        sys.stdout, sys.stderr = map(UntilClosed, streams)
    try:
        settings = parse(*given)
        if hasattr(settings, "resume"):  # a training
            END_SIGNALS.clear()
            for number in before:
                signal.signal(number, ask_for_the_end)
        main(settings)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        sentence = str(error)
        # raised by torch; some kinds are not bugs of ours
        if isinstance(error, (RuntimeError, ConnectionError)):
            sentence = what_torch_says(error)
        if sentence is None or os.environ.get("TRACEBACK"):
            raise
        if not dist.is_initialized():
            raise SystemExit(f"error: {sentence}") from None
        # flushed now, since `finally` lets torchrun's SIGTERM through
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    finally:
        if None not in streams:
            sys.stdout.flush()
            # the original streams, or os.devnull where a reader has stopped
            sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream
        END_SIGNALS.clear()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler not set from Python


def what_torch_says(error: Exception) -> str | None:
    """An error message for too little memory, a killed loader or a lost process; None for any other
    error.
    """
    text, first_line = str(error), (str(error).splitlines() or [""])[0]
    # torch has a type for a full GPU, but only messages for full main memory; the last is oneDNN's
    full = re.search("can't allocate memory|could not create a (primitive|memory)", text)
    if isinstance(error, torch.OutOfMemoryError) or full:
        return (
            "out of memory; try a smaller --batch-size, in a training --micro-batch (gradient "
            f"caching, the same gradients), or --precision bf16 ({first_line})"
        )
    # the connection is that to a worker
    killed = re.search(r"DataLoader worker .* (killed|exited)", text)
    if killed or isinstance(error, ConnectionError):
        return (
            "a process that reads audio was killed, as systems do when memory runs out; try fewer "
            f"--workers, then continue with --resume ({first_line})"
        )
    lost = re.search("connection|peer|timed out|timeout", text, re.I)
    if dist.is_initialized() and (lost or isinstance(error, dist.DistError)):
        return (
            f"process {dist.get_rank()} of {dist.get_world_size()} stopped, since another one "
            "ended or cannot be reached; look above for the first error, then continue with "
            f"--resume ({first_line})"
        )
    return None


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int = 0, part: int = 0) -> None:
    """Make every draw of a step (dropout, masks) a function of (seed, step, rank, part of the
    batch).

    So a resumed run needs no stored generator state to repeat the uninterrupted one.
    """
    # SeedSequence mixes the four numbers, so neighbouring steps get unrelated draws; manual_seed
    # also seeds the GPUs
    torch.manual_seed(
        int(np.random.SeedSequence((seed, step, rank, part)).generate_state(1, np.uint64)[0] >> 1)
    )


def compile_training(model) -> None:
    """--compile: torch.compile of the training pass; embedding stays eager. Names in checkpoints do
    not change.

    Masks are drawn as in eager mode, so that runs can be compared and both passes of gradient
    caching draw the same ones.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # draws as eager torch does
    model.compile()  # torch.compile(model) would put _orig_mod. before names


def wrap(model, device, compiled: bool, micro_batch: int = 0):
    """The module that the training loop calls: the model itself, compiled if asked for; of several
    processes, inside DistributedDataParallel.

    On several GPUs batch norm sees the whole batch; on a CPU, where torch does not offer that, each
    process's share. With gradient caching it sees the parts of one process, because the processes
    may have different numbers of parts.
    """
    if compiled:
        compile_training(model)
    if rank_and_world()[1] == 1:
        return model
    on_gpu = device.type == "cuda"
    synchronised = (
        nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpu and not micro_batch else model
    )
    # for a model on a CPU device_ids must be None
    return nn.parallel.DistributedDataParallel(synchronised, [device.index] if on_gpu else None)


def cached_backward(
    model,
    parts: list[dict],
    loss_of,
    reseed,
    autocast=contextlib.nullcontext(),
    micro_batch: int = 0,
):
    """Backward pass of a loss over a batch given in parts, with the graph of one part in memory at
    a time.

    Gradient caching (Gao et al., RepL4NLP 2021): every part is run without a graph; the loss of the
    joint outputs gives the gradient of each output; then each part is run again with its graph,
    which propagates its outputs' gradients to the weights. The result equals one pass over the
    whole batch, except for batch norm, which sees parts, and each of them twice.

    Args
        model: called as model(**part) under `autocast` -> tuple of float tensors, each (B, ...) or
            0-dim: a scale that is equal in every part, or a mean that is only reported (over the
            parts). It may be wrapped for several processes. A single part is run in one ordinary
            pass.
        loss_of: joint outputs -> (loss, anything else ...), which is returned.
        reseed: called with the number of a part before each of its passes, so that both draw the
            same masks.
        micro_batch: not 0 where processes may have different numbers of parts; then every process
            runs its parts twice, even a single one: DistributedDataParallel exchanges messages in
            passes with gradients, and an ordinary single pass would not meet the others'.
    Copied alone, needs rank_and_world.
    """

    def outputs(i):
        reseed(i)
        with autocast:
            return model(**parts[i])

    if len(parts) == 1 and not (micro_batch and rank_and_world()[1] > 1):
        result = loss_of(*outputs(0))
        result[0].backward()
        return result
    with torch.no_grad():
        # leaves of a new graph, so that .grad keeps the gradient of each output
        cached = [[x.detach().requires_grad_() for x in outputs(i)] for i in range(len(parts))]
    joint = []
    for same_output in zip(*cached):
        if same_output[0].dim():
            joint.append(torch.cat(same_output))
        else:  # a scale or a mean, not one row per clip
            joint.append(torch.stack(same_output).mean())
    result = loss_of(*joint)
    # this pass ends at the cached outputs, below which there is no graph yet
    result[0].backward()
    for i, of_part in enumerate(cached):
        # the processes add up their gradients once, in the last part's pass
        waits = hasattr(model, "no_sync") and i < len(cached) - 1
        with model.no_sync() if waits else contextlib.nullcontext():
            # scalars whose gradient with respect to an output is the cached one: the chain rule
            terms = [
                (x * held.grad).sum()
                for x, held in zip(outputs(i), of_part)
                if held.grad is not None  # the loss may not use an output
            ]
            sum(terms).backward()
    return result


def bucketed_batches(
    durations, batch_size: int, seed: int, epoch: int, edges_s=(5, 10, 15, 20, 25, 30)
):
    """Indices of one epoch as batches of clips of similar length, in random order.

    N mod batch_size clips, drawn anew every epoch, are left out first; then the clips that do not
    fill a batch of their bucket form mixed batches: always floor(N / batch_size) batches (one if N
    is smaller). Inside a bucket the order is random: in order of length, a clip's negatives would
    come from its own source, and MGA-CLAP's official variant would stretch the shortest clips most.
    Source: the seven buckets of MGA-CLAP's code, which drops every bucket's remainder.
    """
    # from seed and epoch alone: equal in every process and after --resume
    rng, durations = np.random.default_rng((seed, epoch)), np.asarray(durations)
    order = rng.permutation(len(durations))
    order = order[: len(order) // batch_size * batch_size] if len(order) >= batch_size else order
    bucket = np.digitize(durations[order], edges_s)  # an edge itself is in the bucket above it
    batches, left = [], []
    for b in np.unique(bucket):
        members = order[bucket == b]
        full = len(members) // batch_size * batch_size
        batches += list(members[:full].reshape(-1, batch_size))
        left.append(members[full:])
    left = np.concatenate(left)
    batches += [left[i : i + batch_size] for i in range(0, len(left), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(
    n_clips: int, batch_size: int, seed: int, start_step: int, total_steps: int, durations=None
):
    """Yield [(epoch, index), ...] for every step from start_step on: this process's share of the
    batch.

    Batches are random; if durations (n_clips,) in seconds are given, a batch is drawn among clips
    of similar length.
    """
    rank, world = rank_and_world()
    steps_per_epoch = max(1, n_clips // batch_size)
    durations = np.zeros(n_clips) if durations is None else durations  # all in one bucket
    for epoch in range(start_step // steps_per_epoch, math.ceil(total_steps / steps_per_epoch)):
        batches = bucketed_batches(durations, batch_size, seed, epoch)
        for step, batch in enumerate(batches, epoch * steps_per_epoch):
            if start_step <= step < total_steps:
                # shares may differ by one clip; `gather_with_grad` allows that
                yield [(epoch, int(i)) for i in np.array_split(batch, world)[rank]]


def say_if_few(run, flag: str, epochs: int, total_steps: int, captions: list[str]) -> None:
    """Warn before a training of few steps: how many are enough, how many captions are distinct."""
    enough = 200  # by then the loss of small models from random weights has left ln B
    if total_steps < enough:
        wanted = math.ceil(enough * epochs / max(1, total_steps))
        run.say(
            f"only {total_steps} steps: random weights need some {enough} ({flag} {wanted}), "
            f"published ones fewer; {len(set(captions))} of {len(captions)} captions are distinct"
        )


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the peak learning rate: up to 1 in equal steps, then half a cosine towards 0. step
    counts from 0 and is < total_steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # not 0 at the first step
    return 0.5 * (
        1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))
    )


def check_batch(cfg, size: int, n: int, what: str, flag: str = "batch_size") -> None:
    """ValueError if a batch of `size` (of n training clips or pairs) gives a process fewer than
    two: the contrastive loss of a single one is 0.
    """
    world = rank_and_world()[1]
    if size < 2 * world:
        raise ValueError(
            f"--{flag.replace('_', '-')} {getattr(cfg, flag)} with {n} training {what}(s) on "
            f"{world} process(es): at least 2 {what}s are needed in each"
        )


def check_resume(cfg, stored: dict) -> None:
    """A flag given beside --resume that contradicts the stored settings is an error, not
    ignored.
    """
    may_change = (
        "resume name runs workers device log_steps save_steps eval_epochs eval_steps max_bad data "
        "compile micro_batch"
    )
    for key, value in stored.items():
        if key not in may_change.split() and getattr(cfg, key) != value:
            raise ValueError(
                f"--resume: --{key.replace('_', '-')} is {getattr(cfg, key)} but the run was "
                f"started with {value}; leave the flag out or start a new --name"
            )


def check_finite(recent: list, run, model=None) -> None:
    """Stop on a non-finite loss among `recent` [(step, loss, file names)], or on broken weights;
    empties `recent`.

    It waits for the GPU, so it is called at log, save and validation steps only.
    """
    advice = "the last checkpoint is from before; try a smaller --lr or --precision fp32"
    for step, loss, names in recent:
        if not torch.isfinite(loss):
            rank, world = rank_and_world()
            # each process lists its share
            path = run.path / f"nonfinite_batch{f'_{rank}' if world > 1 else ''}.txt"
            write_lines(path, names)
            raise FloatingPointError(
                f"the loss of step {step} is {loss.item()}; the batch's files are listed in "
                f"{path}, {advice}"
            )
    recent.clear()
    if model is not None and not all(torch.isfinite(p).all() for p in model.parameters()):
        raise FloatingPointError(
            f"a weight became NaN or infinite though the loss did not; nothing was saved, {advice}"
        )


class Readable(torch.utils.data.Dataset):
    """A training set whose unusable clips are left out of their batch and reported, not raised.

    Also cuts a batch into micro-batches.

    Args
        dataset: its items are tuples whose last entry is the file's name; its `collate` turns a
            list of them into the model's keyword arguments.
    """

    def __init__(self, dataset, micro_batch: int):
        self.dataset, self.micro_batch = dataset, micro_batch

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except AudioError as error:
            return error  # raised in a worker process it would arrive as a traceback

    def collate(self, items):
        """-> [dataset.collate(items) of each micro-batch], file names, error texts."""
        bad = [str(item) for item in items if isinstance(item, AudioError)]
        good = [item for item in items if not isinstance(item, AudioError)]
        size = self.micro_batch or max(1, len(good))  # range() takes no step of 0
        parts = [self.dataset.collate(good[i : i + size]) for i in range(0, len(good), size)]
        return parts, [item[-1] for item in good], bad


class Run:
    """One training's bookkeeping, the same whatever the method: device and processes, the folder
    runs/NAME, what --resume continues, unreadable clips, log.jsonl, checkpoints, signals.

        forward = run.begin(model, optimiser, total_steps, ...)
        for parts in run.batches(dataset, batch_sampler):
            ...                                      # the method: forward, loss, backward, step
            run.step_done(loss, sim, scale=scale)
            if run.is_due(cfg.eval_steps):
                run.keep_best(score, scores)
            run.save_if_due()

    Only the first of several processes writes. A method with several stages calls `begin` for each.
    """

    locks = {}  # folder -> the open lock file of this process

    def __init__(self, cfg: RunConfig, method: str):
        self.cfg, self.method, self.stage = cfg, method, ""
        self.device = start_device(cfg.device)
        self.rank, self.world = rank_and_world()
        # bf16 has the range of fp32, so no loss scaling is needed, unlike with fp16
        self.autocast = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=cfg.precision == "bf16"
            or (cfg.precision == "auto" and self.device.type == "cuda"),
        )
        # without a name the folder is numbered in `open_folder`
        self.name, self.path = cfg.name, Path(cfg.runs) / cfg.name
        self.opened = self.all_told = False
        for (name, choice), preset in cfg.presets.items():
            if getattr(cfg, name) == choice:
                self.say("preset: " + " ".join(f"{k}={getattr(cfg, k)}" for k in preset))

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def starts_from(self, **settings) -> RunConfig:
        """Report that the training starts from --weights. `settings` of that model replace those of
        this run -> the settings from here on.
        """
        kept = {k: v for k, v in settings.items() if v != getattr(self.cfg, k)}
        self.cfg = dataclasses.replace(self.cfg, **kept)
        line = f"starts from --weights {self.cfg.weights}"
        if hasattr(self.cfg, "audio_weights"):
            line += "; --audio-weights is not read"
        if kept:
            line += "; its own settings: " + " ".join(f"{k}={v}" for k, v in kept.items())
        self.say(line)
        return self.cfg

    def checkpoint(self) -> dict | None:
        """last.pt of the run that --resume continues."""
        if not self.cfg.resume:
            return None
        path = self.path / "last.pt"
        stored = read_checkpoint(path, self.method)
        check_resume(self.cfg, stored["config"])
        if self.cfg.data != stored["config"]["data"]:  # allowed, since files may have moved
            told = " ".join(stored["config"]["data"])
            self.say(f"--resume: the run was started with --data {told}; goes on with the new one")
        step, best = stored.get("step"), stored.get("best")
        if not isinstance(step, int) or not isinstance(best, dict) or "score" not in best:
            raise ValueError(f"{path}: cannot be continued: step {step!r}, best {best!r}")
        return stored

    def open_folder(self, n_clips: int, continues: bool) -> None:
        """Create the run's folder, or continue in an existing one.

        Args
            n_clips: number of clips, of which the share --max-bad may be unreadable.
            continues: continue an existing run; otherwise one is an error, never overwritten.
        """
        number = 1
        while not self.name and (self.path / f"{self.method}-{number}").exists():
            number += 1
        shared = [self.name or f"{self.method}-{number}"]
        if dist.is_initialized():
            # the first process chooses: one that looks later would already see its folder
            dist.broadcast_object_list(shared)
        self.name, self.path = shared[0], Path(self.cfg.runs) / shared[0]
        continues = continues or self.opened  # opened by an earlier stage of this call
        if not continues and (self.path / "last.pt").exists():
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume or choose another "
                "--name"
            )
        if self.rank == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if fcntl and self.path not in Run.locks:  # a second stage already holds the lock
                    Run.locks.clear()  # earlier runs of this process are over
                    held = open(self.path / "lock", "w")
                    try:  # the system releases the lock of a killed process
                        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError as error:
                        # some network file systems have no locks
                        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                            raise
                    Run.locks[self.path] = held
                if not continues:
                    (self.path / "log.jsonl").write_text("")
                    (self.path / "skipped.txt").write_text("")
            except BlockingIOError:
                raise FileExistsError(
                    f"{self.path} is held by another process (one that writes to it, or a notebook "
                    "that did); choose another --name"
                ) from None
            except OSError as error:
                raise PermissionError(
                    f"--runs {self.cfg.runs}: cannot write to {self.path} ({error.strerror})"
                ) from None
        barrier()  # no process goes on before the folder is there
        # listed: errors in skipped.txt, also those of earlier parts of the run. skipped: errors
        # since the start or the last --resume, so that a run continues once its files are back
        self.n_clips, self.listed, self.skipped, self.opened = n_clips, set(), set(), True
        if continues and (self.path / "skipped.txt").exists():
            listed = (self.path / "skipped.txt").read_text(encoding="utf-8").splitlines()
            self.listed.update(listed)

    def begin(
        self,
        model,
        optimiser,
        total_steps: int,
        n_clips: int,
        summary: str,
        checkpoint: dict | None = None,
        stage: str = "",
        shape: dict | None = None,
        scheduler=None,
        continues: bool = False,
        warmup_steps: int = 0,
    ):
        """Open the folder and restore the checkpoint -> what the loop calls in place of `model`.

        Args
            n_clips: number of clips, of which the share --max-bad may be unreadable.
            summary: the data in words, for the first line that a training prints.
            checkpoint: from `self.checkpoint`; its weights are in the model already.
            stage: its name, where the method has several; written to the log and to checkpoints.
            shape: what is needed beside the settings to rebuild the model; stored in checkpoints.
            scheduler: anything with a state_dict, stored beside the optimiser's.
            continues: the folder may already hold the run of an earlier stage.
            warmup_steps: of the learning rate; told if the training ends before them.
        """
        continues = continues or checkpoint is not None
        self.open_folder(n_clips, continues)
        self.model, self.optimiser, self.scheduler, self.shape = model, optimiser, scheduler, shape
        self.stage, self.total_steps = stage, total_steps
        self.title = f"{self.method}, {stage}" if stage else self.method
        self.step, self.best, self.validated = 0, {"score": -math.inf, "step": 0}, 0
        if checkpoint:
            try:
                optimiser.load_state_dict(checkpoint["optimiser"])
                if scheduler:
                    scheduler.load_state_dict(checkpoint["scheduler"])
            except Exception as error:  # of every type: the file may hold anything
                raise ValueError(
                    f"{self.path / 'last.pt'}: its optimiser does not fit this model "
                    f"({type(error).__name__}: {error})"
                ) from None
            self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.drop_log_after(self.step)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        locked = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
        self.say(
            f"{self.title}: {summary}; {trained:.1f} M parameters"
            + (f" and {locked:.1f} M locked ones" if locked >= 0.05 else "")
            + f"; {total_steps} steps on {self.world} x {self.device.type}; writing to {self.path}"
        )
        if warmup_steps >= total_steps > 0:
            self.say(f"the learning rate rises to the last step: warm-up of {warmup_steps} steps")
        return wrap(model, self.device, self.cfg.compile, self.cfg.micro_batch)

    def load(self, dataset, batch_sampler):
        """Yield the batches: a list of parts (see `Readable`), keyword arguments of the model on
        the device; names of the files; errors of those that cannot be used.
        """
        readable = Readable(dataset, self.cfg.micro_batch)
        loader = Loader(
            readable,
            batch_sampler=batch_sampler,
            num_workers=self.cfg.workers,
            collate_fn=readable.collate,
            pin_memory=self.device.type == "cuda",
        )
        for parts, names, bad in loader:
            yield to_device(parts, self.device), names, bad

    def batches(self, dataset, batch_sampler):
        """Yield the parts of every batch from the current step on; a bar shows the training's
        progress.
        """
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc=self.stage or None,
            disable=self.rank > 0,
            dynamic_ncols=True,
        )
        self.recent, self.unreadable = [], []
        self.clock, self.seen = time.perf_counter(), 0
        self.model.train()
        for parts, names, bad in self.load(dataset, batch_sampler):
            self.names = names  # files of this batch, reported if its loss is not finite
            self.unreadable += bad
            if not parts:
                raise ValueError(f"no clip of a batch of {len(bad)} could be read; first: {bad[0]}")
            yield parts
        self.bar.close()
        barrier()  # no process leaves while another computes

    def reseed(self, part: int) -> None:
        """Seed the forward pass of one part of this step's batch (see `seed_step`)."""
        seed_step(self.cfg.seed, self.step, self.rank, part)

    def step_done(self, loss, sim=None, **values) -> None:
        """Count a step; every --log-steps write its line to log.jsonl, with `values`.

        In one process only logging, validating and saving wait for the GPU.
        """
        # detached, and its value is read later, so that this line does not wait for the GPU
        self.recent.append((self.step, loss.detach(), self.names))
        self.step += 1
        # sim has the rows of all processes, names those of this one
        self.seen += len(self.names) * self.world if sim is None else len(sim)
        self.bar.update()
        if self.step % self.cfg.log_steps and self.step < self.total_steps:
            return
        check_finite(self.recent, self)
        self.settle_skipped(self.unreadable)
        self.unreadable.clear()
        line = {"step": self.step, "loss": loss.item()}
        if sim is not None:
            right = sim.argmax(1) == torch.arange(len(sim), device=sim.device)
            # ln B is the InfoNCE loss of one direction if all similarities are equal
            line |= {"ln_B": math.log(len(sim)), "batch_R@1": right.float().mean().item()}
        for name, value in values.items():
            line[name] = value.item() if torch.is_tensor(value) else value
        shown = f"loss {line['loss']:.3f}"
        if sim is not None:
            shown += f" (ln B {line['ln_B']:.2f}) R@1 {line['batch_R@1']:.2f}"
        shown += "".join(f" {name} {line[name]:.3g}" for name in values if name != "epoch")
        per_s = self.seen / (time.perf_counter() - self.clock)
        unit = "clips" if sim is None else "pairs"
        # the last group, since CoLLAT's first one is the audio encoder with a rate of its own
        line |= {"lr": self.optimiser.param_groups[-1]["lr"], f"{unit}_per_s": per_s}
        self.log(line | {"skipped": len(self.skipped)})
        self.bar.set_postfix_str(f"{shown} {per_s:.0f} {unit}/s")
        self.clock, self.seen = time.perf_counter(), 0

    def is_due(self, every: int) -> bool:
        """True after every `every` steps and after the last one: time to validate.

        Raises: FloatingPointError if a loss or a weight is not finite, before the validation.
        """
        if self.step % every and self.step < self.total_steps:
            return False
        check_finite(self.recent, self, self.model)
        self.validated = self.step
        return True

    def log_scores(self, scores: dict) -> None:
        """Write a validation's scores to log.jsonl and print them."""
        if scores:
            self.log({"step": self.step, "validation": scores})
            hidden = ("R@10", "MRR", "median_rank")
            words = " ".join(f"{k} {v:.3f}" for k, v in scores.items() if not k.endswith(hidden))
            when = f"step {self.step}" if self.step else "before the first step"
            self.say(f"{when}: validation {words}")

    def keep_best(self, score: float, scores: dict, name: str = "best.pt") -> None:
        """Log a validation and write best.pt if no earlier `score` was as large."""
        self.log_scores(scores)
        if self.rank == 0 and score > self.best["score"]:
            self.best = {"score": score, "step": self.step}
            self.save(name)
        self.model.train()

    def save_if_due(self) -> None:
        """Write last.pt every --save-steps, after a validation and at the end; if a signal asked
        the run to end, write it now and exit.
        """
        regular = self.step % self.cfg.save_steps == 0
        if not (regular or self.step in (self.validated, self.total_steps) or self.stop):
            return
        check_finite(self.recent, self, self.model)
        self.save("last.pt")
        barrier()
        self.end_if_told(f"step {self.step}")
        self.clock, self.seen = time.perf_counter(), 0  # the rate leaves out validation and writing

    def save(self, name: str) -> None:
        """Write a checkpoint, in the first process."""
        if self.rank > 0:
            return
        payload = {
            "method": self.method,
            # self.name, since open_folder numbers a run without a name
            "config": dataclasses.asdict(self.cfg) | {"name": self.name, "resume": False},
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),  # keys of the DDP wrapper would begin with module.
            "optimiser": self.optimiser.state_dict(),
            "versions": versions(),
        }
        if self.stage:
            payload["stage"] = self.stage
        if self.shape:
            payload["shape"] = self.shape
        if self.scheduler:
            payload["scheduler"] = self.scheduler.state_dict()
        if hasattr(self.model, "text_encoder"):
            payload["text_encoder"] = self.model.text_encoder.description()
        save_checkpoint(self.path / name, payload)

    def finish(self, scores: dict, chance: dict, n_clips: int) -> dict:
        """Write and print the best checkpoint's scores -> what `main` returns."""
        result = {"stage": self.stage} if self.stage else {}
        result |= {"best_step": self.best["step"], "n_clips": n_clips}
        result |= {"scores": scores, "chance": chance}
        write_lines(self.path / "eval.json", [json.dumps(result, indent=1)])
        title = f"{self.title} on {n_clips} validation clips (step {self.best['step']})"
        print(f"\n{title}\n  {'score':<22}{'value':>9}{'chance':>9}")
        for key, value in scores.items():
            print(f"  {key:<22}{value:>9.3f}{chance[key]:>9.3f}")
        return result

    def say_next(self, why: str, scored_with: str = "", **changed) -> None:
        """Print the commands that score this run, and that train another one to compare with."""
        best, data = shlex.quote(f"{self.path}/best.pt"), shlex.join(self.cfg.data)
        score = f"python eval.py {best} --data {data} --protocol all {scored_with}".rstrip()
        self.say(
            f"\nNext:\n  {score}\n"
            f"  python {self.method}.py {flags_of(self.cfg, name='', **changed)}     ({why}, to "
            "compare)"
        )

    @property
    def stop(self) -> bool:
        """True if a signal asked the run to end; with several processes, once all know of it."""
        return self.all_told or (self.world == 1 and bool(END_SIGNALS))

    def end_if_told(self, saved: str, again: str = "") -> None:
        """Exit if a signal asked for it; `saved` says what has just been saved, `again` what
        continues the run, if that is not --resume.
        """
        if self.stop:
            # SIGTERM where only another process got the signal
            number = END_SIGNALS[0] if END_SIGNALS else signal.SIGTERM
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            again = again or f"--resume --name {self.name}"
            self.say(f"{name}: saved {saved}; continue with {again}")
            raise SystemExit(128 + number)  # the exit code that shells use for a signal

    def drop_log_after(self, step: int) -> None:
        """Drop this stage's log lines later than the checkpoint that a killed run resumes from."""
        if self.rank > 0:
            return
        lines, path = [], self.path / "log.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a killed run may leave half a line
                line = json.loads(text)
                if line.get("stage", "") != self.stage or line.get("step", 0) <= step:
                    lines.append(text)
        write_lines(path, lines)

    def log(self, line: dict) -> None:
        line = ({"stage": self.stage} if self.stage else {}) | line
        if self.rank == 0:
            with open(self.path / "log.jsonl", "a") as f:  # closed at once, so a kill loses no line
                f.write(json.dumps(line) + "\n")

    def settle_skipped(self, errors: list[str]) -> None:
        """Count and list the unreadable clips of all processes; ValueError past --max-bad.

        A collective call, in which the processes also agree on `stop`.
        """
        everyone = [(errors, bool(END_SIGNALS))] * self.world
        if dist.is_initialized():
            dist.all_gather_object(everyone, (errors, bool(END_SIGNALS)))
        self.all_told = any(told for _, told in everyone)
        self.skipped.update(text for part, _ in everyone for text in part)
        new = sorted(self.skipped - self.listed)
        self.listed.update(new)
        if new and self.rank == 0:
            with open(self.path / "skipped.txt", "a", encoding="utf-8") as f:
                f.writelines(text + "\n" for text in new)
            tqdm.write(f"{len(new)} clips cannot be used, listed in {self.path / 'skipped.txt'}")
        if len(self.skipped) > self.cfg.max_bad * self.n_clips:
            raise ValueError(
                f"{len(self.skipped)} of {self.n_clips} clips could not be used, more than "
                f"--max-bad {100 * self.cfg.max_bad:g}%; first: {sorted(self.skipped)[0]} (all in "
                f"{self.path / 'skipped.txt'}); mend or remove them, or raise --max-bad"
            )
