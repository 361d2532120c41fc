"""Training that starts from a whole model (--weights), in all five scripts."""

import importlib
import json

import pytest
import torch
import transformers

import cacophony
import collat
import common
import eval as evaluator
import mga_clap
import t_clap
from conftest import config, write_corpus
from test_scripts import official_names

# what belongs to the model, and is given otherwise here
OTHERWISE = {
    "mga_clap": dict(codewords=24, max_tokens=20, drop_path=0.3),
    "t_clap": dict(joint_dim=16),
    "cacophony": dict(stage="contrastive", max_tokens=20, joint_dim=16),
    "collat": dict(max_tokens=12, audio_dim=32),
    "curation_clap": dict(joint_dim=16, hop=512, stage="teacher"),
}


def first_validation(folder) -> dict:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return next(line for line in lines if "validation" in line)


def scores_by_eval(path, data, *flags) -> dict:
    """What eval.py gives on the validation split."""
    flags = ["--data", str(data), "--split", "val", "--protocol", "retrieval", *flags]
    results = evaluator.main(evaluator.parse([str(path), *flags, "--bootstrap", "0"]))
    return {name: score["value"] for name, score in results[0]["scores"].items()}


def assert_equal_scores(validation: dict, told: dict):
    shared = set(validation) & set(told)
    assert {"t2a_R@1", "t2a_R@5", "a2t_mAP@10", "t2a_median_rank"} <= shared
    for name in shared:
        assert validation[name] == pytest.approx(told[name], abs=1e-9), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", OTHERWISE)
def test_a_run_goes_on_as_another(method, runs_of, corpus, tmp_path, capsys, monkeypatch):
    """The model and its settings are the file's; the first validation is eval.py's; --resume gives
    what an uninterrupted run gives.
    """
    script = importlib.import_module(method)
    folder, _ = runs_of(method)
    start = folder / ("teacher.pt" if method == "curation_clap" else "best.pt")
    flags = dict(OTHERWISE[method], weights=str(start), batch_size=4, lr=1e-4)
    script.main(config(method, corpus, tmp_path, name="b", **flags))
    said = capsys.readouterr().out
    assert f"starts from --weights {start}" in said and "before the first step: validation" in said
    before, after = common.read_checkpoint(start), common.read_checkpoint(tmp_path / "b/last.pt")
    shapes = [{k: v.shape for k, v in stored["model"].items()} for stored in (before, after)]
    assert shapes[0] == shapes[1] and after["text_encoder"] == before["text_encoder"]
    assert after.get("shape") == before.get("shape") and after["config"]["batch_size"] == 4
    kept = {"mga_clap": mga_clap.MODEL_SETTINGS, "cacophony": ("variant", "max_tokens")}
    for name in kept.get(method, ("max_tokens",) if method == "collat" else ()):
        assert after["config"][name] == before["config"][name], name
    line = first_validation(tmp_path / "b")
    assert line["step"] == 0
    assert_equal_scores(line["validation"], scores_by_eval(start, corpus))

    # killed and resumed: the same weights, and one first validation
    seed_step = common.seed_step

    def killer(seed, step, *place):
        if step == 3:  # after a write of last.pt
            raise Killed
        seed_step(seed, step, *place)

    monkeypatch.setattr(common, "seed_step", killer)
    with pytest.raises(Killed):
        script.main(config(method, corpus, tmp_path, name="c", **flags))
    monkeypatch.setattr(common, "seed_step", seed_step)
    script.main(common.configure(script.Config, name="c", runs=str(tmp_path), resume=True))
    again = common.read_checkpoint(tmp_path / "c/last.pt")
    assert again["step"] == after["step"] > 3
    assert all(torch.equal(v, again["model"][k]) for k, v in after["model"].items())
    assert (tmp_path / "c/log.jsonl").read_text().count('"step": 0') == 1


def test_a_whole_model_is_not_an_audio_encoder(runs_of, corpus, tmp_path):
    for method in ("mga_clap", "collat", "curation_clap"):
        folder, _ = runs_of(method)
        flags = dict(audio_weights=str(folder / "last.pt"), name="a")
        with pytest.raises(ValueError, match=r"last.pt: a whole model; give it as --weights"):
            importlib.import_module(method).main(config(method, corpus, tmp_path, **flags))


def test_wrong_weights_are_one_sentence(runs_of, corpus, tmp_path):
    other = str(runs_of("collat")[0] / "best.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"a": torch.ones(2)}, tmp_path / "strange.pt")
    stages = {"curation_clap": {"stage": "teacher"}, "cacophony": {"stage": "contrastive"}}
    for method in ("mga_clap", "t_clap", "curation_clap", "cacophony"):
        main, stage = importlib.import_module(method).main, stages.get(method, {})
        for weights, sentence in (
            (other, f"a checkpoint of collat, not of {method}; load it with collat.py"),
            (str(tmp_path / "gone.pt"), "gone.pt: no such (weight )?file"),
            (str(tmp_path / "broken.pt"), "not a weight file that can be read safely"),
            # the file is blamed, not the tokenizer that its kind would need
            (str(tmp_path / "strange.pt"), r"strange.pt: n.* a checkpoint .*\(keys: 'a'\)"),
            (str(tmp_path), "a folder; give the weight file in it|not a model folder"),
        ):
            with pytest.raises((ValueError, OSError), match=sentence):
                main(config(method, corpus, tmp_path, name="a", weights=weights, **stage))
    with pytest.raises(ValueError, match="--stage all: stage 1 has nothing to do for a whole mode"):
        config("cacophony", corpus, tmp_path, weights="x.pt")
    with pytest.raises(ValueError, match="best.pt: has no captioner; give --caption-weight 0"):
        flags = dict(stage="contrastive", audio_weights="none", caption_weight=0.0)
        cacophony.main(config("cacophony", corpus, tmp_path, name="plain", **flags))
        whole = dict(stage="contrastive", weights=str(tmp_path / "plain/best.pt"))
        cacophony.main(config("cacophony", corpus, tmp_path, name="b", **whole))
    with pytest.raises(ValueError, match="--token-layer 9: the text encoder has layers 1 to 1"):
        collat.main(config("collat", corpus, tmp_path, name="b", weights=other, token_layer=9))


def test_an_authors_file_needs_a_tokenizer_even_at_the_tiny_size(corpus, tmp_path):
    """--size tiny and --data demo set --text-model none, which is for new models."""
    for method, text_model in (
        ("mga_clap", "bert-base-uncased"),
        ("t_clap", "roberta-base"),
        ("cacophony", "roberta-base"),
        ("curation_clap", "bert-base-uncased"),
    ):
        cfg = config(method, corpus, tmp_path)
        assert cfg.text_model == "none" and common.published_text_model(cfg) == text_model
    assert (
        common.published_text_model(config("t_clap", corpus, tmp_path, text_model="x/y")) == "x/y"
    )


def test_a_captioner_that_is_not_trained_is_left_out(runs_of, corpus, tmp_path):
    start = str(runs_of("cacophony")[0] / "best.pt")
    flags = dict(stage="contrastive", weights=start, caption_weight=0.0)
    cacophony.main(config("cacophony", corpus, tmp_path, name="b", **flags))
    model = cacophony.Model.from_checkpoint(tmp_path / "b/best.pt")
    assert len(model.decoder) == 0 and not hasattr(model, "head")


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """Sixty recordings for training, twenty for validation."""
    folder = tmp_path_factory.mktemp("sixty") / "data"
    return write_corpus(folder, n_train=60, n_val=20, n_test=1, mixed=False)


def small_text(kind: str, captions: list[str], folder):
    """A small random BERT or RoBERTa, saved with a tokenizer of these captions -> the folder."""
    tokenizer = common.text_encoder_from_scratch(captions, 64, 1, 1, 30).tokenizer
    size = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    given = dict(size, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if kind == "bert":
        text = transformers.BertModel(transformers.BertConfig(**given))
    else:
        text = transformers.RobertaModel(transformers.RobertaConfig(**given))
    text.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


def laion_names(state: dict) -> dict:
    """A T-CLAP's state dict under LAION's names."""
    theirs = {}
    for key, value in state.items():
        key = key.replace("audio_encoder.", "audio_branch.").replace(
            "text_encoder.model.", "text_branch."
        )
        if ".bias_tables." in key:
            layer, _, block = key.rpartition(".bias_tables.")
            key = f"{layer}.blocks.{block}.attn.relative_position_bias_table"
        theirs["module." + key] = value
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("start", ["released", "laion", "own"])
def test_fine_tuning_on_sixty_clips_finds_more(start, sixty, tmp_path, monkeypatch):
    """Validation R@5 rises above that of MGA-CLAP's released layout, LAION's, and an own run."""
    captions = [text for row in common.read_manifest([str(sixty)]) for text in row["captions"]]
    tiny = dict(audio_dim=32, audio_depths=[1, 2], audio_heads=[2, 4], audio_patch=16)
    torch.manual_seed(0)
    flags = dict(name="b", lr=1e-3, batch_size=12)
    if start == "laion":
        text_model = small_text("roberta", captions, tmp_path / "text")
        text = common.text_encoder_from_pretrained(text_model, 77, pooler=True)
        audio = dict(dim=16, depths=[1, 1, 1, 1], heads=[1, 2, 4, 4])
        model = t_clap.Model(text, audio, 64)
        t_clap.feel_order(model, text=True)  # with smaller weights so small a model stays at ln B
        torch.save({"state_dict": laion_names(model.state_dict())}, tmp_path / "630k.pt")
        flags |= dict(weights=str(tmp_path / "630k.pt"), text_model=text_model)
        flags |= dict(steps=400, eval_steps=400, lt_weight=0.0, warmup_steps=20)
    else:
        flags |= dict(epochs=12, eval_epochs=12, warmup_epochs=1.0)
    if start == "released":
        text_model = small_text("bert", captions, tmp_path / "text")
        released = dict(tiny, codewords=64, joint_dim=64, affinity_scale=35.0, variant="official")
        monkeypatch.setattr(mga_clap, "PUBLISHED", released)
        text = common.text_encoder_from_pretrained(text_model, 30)
        model = mga_clap.Model(mga_clap.Config(data=[], **released), text)
        torch.save({"model": official_names(model)}, tmp_path / "model.pt")
        flags |= dict(weights=str(tmp_path / "model.pt"), text_model=text_model)
    elif start == "own":  # one epoch on the same clips
        own = dict(flags, **tiny, name="a", epochs=1, codewords=64, affinity_scale=35.0)
        mga_clap.main(config("mga_clap", sixty, tmp_path, **own))
        flags |= dict(weights=str(tmp_path / "a/best.pt"))
    method = "t_clap" if start == "laion" else "mga_clap"
    script = importlib.import_module(method)
    result = script.main(config(method, sixty, tmp_path, **flags))
    before = first_validation(tmp_path / "b")["validation"]
    least = 0.05 if start == "laion" else 0.1  # of random weights that learn slowly
    assert result["scores"]["t2a_R@5"] > before["t2a_R@5"] + least
    assert_equal_scores(
        before,
        scores_by_eval(flags["weights"], sixty, "--text-model", flags.get("text_model", "none")),
    )
