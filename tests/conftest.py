"""Fixtures: a tiny real corpus on disk, and checkpoints trained on it for a few steps."""

import functools
import importlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network
# tests run side by side, and threads that wait for one another spin
os.environ["OMP_NUM_THREADS"] = "1"
# processes that tests start read torch and transformers as bytecode instead of compiling them anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import soundfile as sf  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
from tools import captions  # noqa: E402


def write_corpus(folder: Path, n_train=12, n_val=4, n_test=6, rate=16000, mixed=True) -> Path:
    """10 s demo scenes; mixed: every third clip is stereo at 44.1 kHz."""
    (folder / "audio").mkdir(parents=True)
    rows, draw = [], lambda rng: common.demo_sound(rng, rate)
    for split, count in (("train", n_train), ("val", n_val), ("test", n_test)):
        for i in range(count):
            row = common.write_scene(
                folder / "audio", f"{split}{i}", (7, len(split), i), draw, rate, split
            )
            if mixed and i % 3 == 2:
                x = sf.read(folder / row["audio"])[0]
                sf.write(folder / row["audio"], np.stack([x, 0.5 * x], 1), 44100)
                row["duration"] = len(x) / 44100
                for event in row["events"]:
                    event["onset"], event["offset"] = (
                        event["onset"] * rate / 44100,
                        event["offset"] * rate / 44100,
                    )
            rows.append(row)
    common.write_lines(folder / "classes.txt", sorted({x for r in rows for x in r["labels"]}))
    common.write_lines(folder / "manifest.jsonl", [json.dumps(r) for r in rows])
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


SHARED = dict(
    size="tiny",
    audio_dim=16,
    audio_depths=[1, 2],
    audio_heads=[2, 4],
    text_dim=64,
    text_layers=1,
    joint_dim=32,
    batch_size=6,
    save_steps=3,
    log_steps=1,
    workers=0,
    device="cpu",
)
SMALL_OF = {
    "mga_clap": dict(**SHARED, codewords=48, epochs=2, eval_epochs=1),
    "t_clap": dict(**SHARED, steps=8, eval_steps=4),
    "curation_clap": dict(
        size="tiny",
        audio_channels=[4, 8, 16],
        hop=1024,
        text_dim=64,
        text_layers=1,
        joint_dim=32,
        block=32,
        teacher_epochs=2,
        student_epochs=2,
        epoch_steps=2,
        batch_size=6,
        save_steps=2,
        log_steps=1,
        workers=0,
        device="cpu",
    ),
    "cacophony": dict(
        size="tiny",
        audio_dim=16,
        audio_layers=1,
        audio_heads=2,
        audio_mlp=32,
        joint_dim=32,
        decoder_layers=1,
        text_dim=64,
        text_layers=1,
        mae_steps=4,
        mae_batch_size=6,
        mae_lr=3e-3,  # not the peak of stage 2
        mae_crop_s=2.0,
        steps=4,
        batch_size=6,
        patches=48,
        warmup_steps=2,
        eval_steps=2,
        save_steps=2,
        log_steps=1,
        workers=0,
        device="cpu",
    ),
    "collat": dict(
        size="tiny",
        audio_dim=16,
        audio_layers=1,
        audio_heads=2,
        audio_patch=64,
        audio_stride=48,
        blocks=2,
        text_dim=64,
        text_layers=1,
        audio_lr=1e-4,
        steps=8,
        batch_size=6,
        warmup_steps=2,
        eval_steps=4,
        save_steps=3,
        log_steps=1,
        workers=0,
        device="cpu",
    ),
}
SMALL = SMALL_OF["mga_clap"]


def config(method, data, runs, **overrides):
    """A Config of the script `method` that trains for a few steps on `data`."""
    script = importlib.import_module(method)
    return common.configure(
        script.Config,
        data=[str(data)],
        runs=str(runs),
        **{**SMALL_OF[method], **overrides},
    )


def log_of(folder):
    """The lines of a run's log.jsonl but those of validations."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "validation" not in line]


@pytest.fixture(scope="session")
def runs_of(corpus, tmp_path_factory):
    """method -> (run folder, result of main): a model trained for a few steps."""

    @functools.cache
    def train(method):
        runs = tmp_path_factory.mktemp("runs")
        return runs / "a", importlib.import_module(method).main(
            config(method, corpus, runs, name="a")
        )

    return train


@pytest.fixture(scope="session")
def mga_run(runs_of):
    return runs_of("mga_clap")


CLAP_AUDIO = dict(
    patch_embeds_hidden_size=16,
    depths=[1, 1, 2, 1],
    num_attention_heads=[1, 2, 4, 4],
    hidden_size=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CLAP_TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=90,
)


@pytest.fixture(scope="session")
def clap_folder(tmp_path_factory):
    """transformers' ClapModel with random weights, saved with a tokenizer and LAION's audio
    settings.
    """
    folder = tmp_path_factory.mktemp("clap")
    tokenizer = common.text_encoder_from_scratch(
        ["a dog barks and rain falls"], 64, 1, 1, 30
    ).tokenizer
    torch.manual_seed(0)
    model = transformers.ClapModel(
        transformers.ClapConfig(
            audio_config=CLAP_AUDIO,
            text_config=dict(
                CLAP_TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
            ),
            projection_dim=24,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name and "table" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    transformers.ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=48000,
        hop_length=480,
        fft_window_size=1024,
        padding="repeatpad",
        truncation="rand_trunc",
        frequency_min=50,
        frequency_max=14000,
    ).save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """A random GPT-2 of two layers and a word tokenizer trained here, saved as a folder."""
    folder = tmp_path_factory.mktemp("llm")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        [captions.NEGATIVES_PROMPT],
        tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<end>"]),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=backend.get_vocab_size(),
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
