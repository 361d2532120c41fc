"""Checkpoints that say something wrong: one sentence with the file's name, no endless work."""

import json

import pytest
import torch

import common
from conftest import config as config_of
from test_scripts import SCRIPTS


def with_text_config(content, changes):
    text = dict(content["text_encoder"])
    text["config"] = json.dumps({**json.loads(text["config"]), **changes})
    return content | {"text_encoder": text}


BROKEN = {
    "config is None": lambda c: c | {"config": None},
    "config is a list": lambda c: c | {"config": [1]},
    "config without max_tokens, or unknown settings": lambda c: c | {"config": {"x": 1}},
    "shape is text": lambda c: c | {"shape": "large", "config": c["config"] | {"audio_dim": "x"}},
    "shape says what no model takes": lambda c: (
        c | {"shape": {"audio": 7}, "config": c["config"] | {"audio_dim": -1}}
    ),
    "an absurd size": lambda c: (
        c
        | {
            "shape": json.loads(json.dumps(c.get("shape", {})).replace("32", str(10**9))),
            "config": c["config"] | {"audio_dim": 10**9},
        }
    ),
    "no text encoder": lambda c: {k: v for k, v in c.items() if k != "text_encoder"},
    "text encoder is text": lambda c: c | {"text_encoder": "bert"},
    "garbage tokenizer": lambda c: c | {"text_encoder": c["text_encoder"] | {"tokenizer": "{"}},
    "a million layers": lambda c: with_text_config(c, {"num_hidden_layers": 10**6}),
    "a billion dimensions": lambda c: with_text_config(c, {"hidden_size": 10**9}),
    "an unknown kind of text encoder": lambda c: with_text_config(c, {"model_type": "nonsense"}),
    "weights are text": lambda c: c | {"model": "all of them"},
    "a weight is no tensor": lambda c: c | {"model": c["model"] | {"temperature": 0.07}},
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("method", ["mga_clap", "t_clap", "cacophony", "collat", "curation_clap"])
def test_a_checkpoint_with_a_wrong_part_is_one_sentence(runs_of, tmp_path, method, how):
    if method in ("t_clap", "curation_clap") and "max_tokens" in how:
        pytest.skip("its settings are not read to make a model")
    content = torch.load(runs_of(method)[0] / "best.pt", weights_only=True)
    path = tmp_path / "wrong.pt"
    torch.save(BROKEN[how](content), path)
    with pytest.raises(ValueError) as error:
        SCRIPTS[method].Model.from_checkpoint(path)
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < 600, said


def test_a_kernel_that_a_file_names_is_not_looked_for(runs_of, tmp_path):
    """transformers would import `kernels` and fetch it from a hub."""
    content = torch.load(runs_of("mga_clap")[0] / "best.pt", weights_only=True)
    wanted = {"attn_implementation": "kernels-community/flash-attn"}
    torch.save(with_text_config(content, wanted), tmp_path / "kernel.pt")
    model = SCRIPTS["mga_clap"].Model.from_checkpoint(tmp_path / "kernel.pt")
    plain = SCRIPTS["mga_clap"].Model.from_checkpoint(runs_of("mga_clap")[0] / "best.pt")
    assert torch.equal(model.embed_text(["a dog"]), plain.embed_text(["a dog"]))
    folder = tmp_path / "bert"
    model.text_encoder.model.save_pretrained(folder)
    model.text_encoder.tokenizer.save_pretrained(folder)
    for key in ("attn_implementation", "_attn_implementation"):
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(stored | {key: wanted["attn_implementation"]})
        )
        encoder = common.text_encoder_from_pretrained(str(folder), 30)
        assert encoder.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "three"},
        {"step": None},
        {"best": None},
        {"best": {}},
        {"optimiser": {}},
        {"optimiser": "Adam"},
        {"optimiser": {"state": {}, "param_groups": []}},
    ],
    ids=str,
)
def test_a_run_that_cannot_be_continued_says_why(corpus, runs_of, tmp_path, changes):
    content = torch.load(runs_of("mga_clap")[0] / "last.pt", weights_only=True)
    (tmp_path / "a").mkdir()
    torch.save(content | changes, tmp_path / "a/last.pt")
    script = SCRIPTS["mga_clap"]
    resumed = common.configure(script.Config, resume=True, name="a", runs=str(tmp_path))
    with pytest.raises(
        ValueError, match="last.pt: (cannot be continued|its optimiser does not fit)"
    ):
        script.main(resumed)


def test_a_log_with_a_strange_line_does_not_stop_a_resumed_run(corpus, tmp_path):
    script = SCRIPTS["mga_clap"]
    script.main(config_of("mga_clap", corpus, tmp_path, name="a", epochs=1))
    with open(tmp_path / "a/log.jsonl", "a") as file:
        file.write('{}\n{"step": 99}\n{"step": 3, "validation": {"a": 1}')
    script.main(common.configure(script.Config, resume=True, name="a", runs=str(tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert {} in lines and all(line.get("step", 0) < 99 for line in lines)
