"""The GPU's path without a GPU: forward and loss at the papers' sizes, on fake tensors.

A fake tensor has a shape, a type and a device, and no values, so a tensor that was left on the CPU
or has the wrong type fails here as it would on a GPU. Values and the backward pass are not covered.
"""

import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cacophony
import common
from conftest import write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("devices") / "data", 6, 0, 0)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Let autocast believe that there is a GPU; no tensor ever reaches one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def config_of(method, data, **settings):
    """The script's own sizes; both encoders from nothing, as no published file is at hand."""
    script = importlib.import_module(method)
    start = {"weights": "none"} if method == "t_clap" else {"audio_weights": "none"}
    if method == "cacophony":
        start["stage"] = "contrastive"
    return common.configure(script.Config, data=[str(data)], text_model="none", **start, **settings)


def first_batch(method, cfg, model, rows):
    """A batch as the script's own Dataset makes it -> keyword arguments of forward, clip ids."""
    script, tokenize = importlib.import_module(method), model.text_encoder.tokenize
    keys = [(0, i) for i in range(3)]
    if method == "mga_clap":
        dataset = script.Pairs(rows, cfg, tokenize)
    elif method == "t_clap":
        dataset = script.Clips(script.split_sets(rows), cfg, tokenize, model.sample_rate)
        keys = [(0, *key) for key in keys]
    elif method == "curation_clap":
        dataset = script.Pairs([rows], cfg, tokenize, model.window_s)
        keys = [(0, *key) for key in keys]
    else:
        dataset = script.Clips(rows, cfg, tokenize)
    batch = dataset.collate([dataset[key] for key in keys])
    return batch, batch.pop("clip_ids", None)


def to_fake_gpu(x):
    """The same structure of tensors on a fake GPU; called under FakeTensorMode."""
    if torch.is_tensor(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return {key: to_fake_gpu(value) for key, value in x.items()} if isinstance(x, dict) else x


def move_to_fake_gpu(model):
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = to_fake_gpu(value)
                module._parameters[name] = torch.nn.Parameter(fake, value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = to_fake_gpu(value)


def check_loss(loss):
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()


CASES = [
    ("mga_clap", {}),
    ("mga_clap", {"variant": "official"}),
    ("mga_clap", {"encoder": "atst"}),
    ("t_clap", {}),
    ("cacophony", {}),
    ("collat", {}),
    ("curation_clap", {}),
]


@pytest.mark.parametrize(
    "method, settings", CASES, ids=[" ".join((m, *s.values())) for m, s in CASES]
)
def test_forward_and_loss_stay_on_the_gpu_and_the_loss_is_fp32(method, settings, data, pretend_gpu):
    script, cfg = importlib.import_module(method), config_of(method, data, **settings)
    rows = common.read_manifest(cfg.data)
    captions = [caption for row in rows for caption in row["captions"]]
    mae = [Path("none")] if method == "cacophony" else []
    model = script.start_model(cfg, captions, *mae).train()
    batch, clip_ids = first_batch(method, cfg, model, rows)
    seen = []  # types of the linear layers' outputs, to know that autocast was on
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with FakeTensorMode():
        move_to_fake_gpu(model)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(**to_fake_gpu(batch))
        if method == "mga_clap":
            audio_embeds, text_embeds, temperature, _ = outputs
            outputs = audio_embeds.float(), text_embeds.float(), temperature.float()
            check_loss(script.training_loss(cfg, *outputs, to_fake_gpu(clip_ids))[0])
        else:
            assert all(x.dtype == torch.float32 for x in outputs)  # what the loss is made of
            check_loss(script.training_loss(cfg, *outputs)[0])
        if method == "curation_clap":  # the student: targets from the teacher's embeddings
            taught = [x.detach() for x in outputs[:2]]
            check_loss(script.training_loss(cfg, *outputs, taught)[0])
    assert torch.bfloat16 in seen


def test_the_masked_autoencoder_s_loss_too(data, pretend_gpu):
    cfg = config_of("cacophony", data)
    rows = common.read_manifest(cfg.data)
    eps = cacophony.VARIANTS[cfg.variant]["eps"]
    model = cacophony.MAE(cacophony.audio_shape(cfg), cfg.mae_layers, cfg.mask_ratio, eps).train()
    dataset = cacophony.Clips(rows, cfg)
    part = dataset.collate([dataset[0, i] for i in range(3)])
    with FakeTensorMode():
        move_to_fake_gpu(model)
        with torch.autocast("cuda", torch.bfloat16):
            (of_clips,) = model(**to_fake_gpu(part))
        check_loss(of_clips.mean())


def test_a_tensor_left_on_the_cpu_fails_here(pretend_gpu):
    """That the tests above can fail: a target without a device, as a GPU refuses it."""
    with FakeTensorMode():
        logits = torch.empty(4, 4, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            torch.nn.functional.cross_entropy(logits, torch.arange(4))
