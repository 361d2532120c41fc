"""One door for published weights: names, shapes, embeddings against transformers' own ClapModel."""

import json

import numpy as np
import pytest
import torch
import transformers

import common
import eval as evaluator
import t_clap
from conftest import CLAP_AUDIO, CLAP_TEXT


def test_embeddings_and_retrieval_equal_transformers(clap_folder):
    folder, theirs, tokenizer = clap_folder
    ours = evaluator.load_model(str(folder))
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    texts = ["a dog barks", "rain falls and a dog barks", "dog"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    rng = np.random.default_rng(0)
    waveforms = [
        (0.3 * rng.normal(size=n)).astype(np.float32) for n in (480000, 200000, 90000)
    ]  # whole, tiled twice, five times
    features = extractor(waveforms, sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        out = theirs(
            input_features=features["input_features"],
            is_longer=torch.zeros(3, 1, dtype=torch.bool),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
    text = ours.embed_text(texts)
    assert (text - out.text_embeds).abs().max() < 1e-4
    batch, n_samples = common.pad_batch(waveforms)
    audio = ours.embed_audio(batch, n_samples)
    assert (audio - out.audio_embeds).abs().max() < 1e-4
    owner = np.array([0, 1, 2])
    ranks = [
        common.retrieval_scores(common.retrieval_ranks((a @ t.T).detach().numpy(), owner))
        for a, t in ((audio, text), (out.audio_embeds, out.text_embeds))
    ]
    assert ranks[0] == ranks[1]
    alone = ours.embed_audio(torch.from_numpy(waveforms[2])[None])
    assert (alone[0] - audio[2]).abs().max() < 1e-5


def laion_file(path, edit=None, fused=False):
    """A .pt with LAION-CLAP's names and, for HTSAT-tiny + RoBERTa-base, its shapes."""
    torch.manual_seed(0)
    audio = common.HTSAT()
    state = {}
    for key, value in audio.state_dict().items():
        if ".bias_tables." in key:
            layer, _, block = key.rpartition(".bias_tables.")
            key = f"{layer}.blocks.{block}.attn.relative_position_bias_table"
            state["module.audio_branch." + key.replace("_bias_table", "_index")] = torch.zeros(
                64, 64, dtype=torch.long
            )
        state["module.audio_branch." + key] = value
    state |= {
        "module.audio_branch." + k: torch.zeros(s)
        for k, s in {
            "spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
            "logmel_extractor.melW": (513, 64),
            "tscam_conv.weight": (527, 768, 2, 3),
            "tscam_conv.bias": (527,),
            "head.weight": (527, 527),
            "layers.0.blocks.1.attn_mask": (64, 64, 64),
        }.items()
    }
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=120,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_hidden_layers=1,
            layer_norm_eps=1e-5,
        )
    )
    state |= {"module.text_branch." + k: v for k, v in roberta.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    for side in ("audio", "text"):
        for layer, shape in (("0", (512, 768)), ("2", (512, 512))):
            (
                state[f"module.{side}_projection.{layer}.weight"],
                state[f"module.{side}_projection.{layer}.bias"],
            ) = torch.randn(shape) * 0.02, torch.zeros(512)
        for layer in ("0", "3"):
            state[f"module.{side}_transform.sequential.{layer}.weight"] = torch.zeros(512, 512)
            state[f"module.{side}_transform.sequential.{layer}.bias"] = torch.zeros(512)
        state[f"module.logit_scale_{side[0]}"] = torch.tensor(2.6)
    if fused:
        state["module.audio_branch.patch_embed.mel_conv2d.weight"] = torch.zeros(96, 1, 4, 12)
    if edit:
        edit(state)
    torch.save({"epoch": 1, "state_dict": state}, path)
    return state, roberta


def test_laion_file_loads_by_its_names_and_shapes_and_says_what_is_wrong(tmp_path):
    state, roberta = laion_file(tmp_path / "630k-best.pt")
    tokenizer = common.text_encoder_from_scratch(
        ["a dog barks and rain falls", "xyzw"], 64, 1, 1, 30
    ).tokenizer
    roberta.save_pretrained(tmp_path / "roberta"), tokenizer.save_pretrained(tmp_path / "roberta")
    model = evaluator.load_model(tmp_path / "630k-best.pt", str(tmp_path / "roberta"))
    assert isinstance(model, t_clap.Model) and model.sample_rate == 48000
    assert torch.equal(model.audio_projection[0].weight, state["module.audio_projection.0.weight"])
    assert torch.equal(
        model.audio_encoder.layers[2].blocks[5].attn.qkv.weight,
        state["module.audio_branch.layers.2.blocks.5.attn.qkv.weight"],
    )
    assert torch.equal(
        model.text_encoder.model.pooler.dense.weight,
        state["module.text_branch.pooler.dense.weight"],
    )
    assert model.embed_text(["a dog"]).shape == (1, 512)
    steady = t_clap.Model.from_published(
        tmp_path / "630k-best.pt", str(tmp_path / "roberta"), drop_path=0.0
    )
    assert (
        model.audio_encoder.layers[3].blocks[1].drop_path == pytest.approx(0.1)
        and steady.audio_encoder.layers[3].blocks[1].drop_path == 0
    )

    def reshape(s):
        s["module.audio_projection.2.weight"] = torch.zeros(512, 100)

    for edit, message in (
        (
            lambda s: s.pop("module.text_projection.0.bias"),
            r"missing keys: 1 \(text_projection.0.bias\)",
        ),
        (
            lambda s: s.update({"module.what.weight": torch.zeros(1)}),
            r"unexpected keys: 1 \(what.weight\)",
        ),
        (
            reshape,
            r"wrong shapes: 1 \(audio_projection.2.weight is \(512, 100\), expected \(512, 512\)",
        ),
    ):
        laion_file(tmp_path / "bad.pt", edit)
        with pytest.raises(ValueError, match=message):
            evaluator.load_model(tmp_path / "bad.pt", str(tmp_path / "roberta"))
    laion_file(tmp_path / "fused.pt", fused=True)
    with pytest.raises(ValueError, match="fused.pt: a CLAP with feature fusion"):
        evaluator.load_model(tmp_path / "fused.pt", str(tmp_path / "roberta"))


def test_folders_that_are_no_such_clap_are_refused_in_one_sentence(tmp_path, clap_folder):
    fused = transformers.ClapConfig(
        audio_config=dict(CLAP_AUDIO, enable_fusion=True), text_config=CLAP_TEXT
    )
    fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="a CLAP with feature fusion"):
        evaluator.load_model(tmp_path / "fused")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="of type 'bert'; expected 'clap'"):
        evaluator.load_model(tmp_path / "bert")
    with pytest.raises(ValueError, match="no/such-model: .*not to be had from the hub"):
        evaluator.load_model("no/such-model")
    with pytest.raises(FileNotFoundError, match="gone.pt: no such weight file"):
        evaluator.load_model("gone.pt")
    torch.save({"state_dict": {"x.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a checkpoint this evaluator knows"):
        evaluator.load_model(tmp_path / "other.pt")


def test_side_by_side_with_paired_differences(clap_folder, corpus, mga_run, tmp_path, capsys):
    checkpoints = [str(mga_run[0] / "best.pt"), str(clap_folder[0]), str(mga_run[0] / "last.pt")]
    out = evaluator.main(
        evaluator.parse(
            [
                *checkpoints,
                "--data",
                str(corpus),
                "--bootstrap",
                "30",
                "--json",
                str(tmp_path / "s.json"),
            ]
        )
    )
    assert json.loads((tmp_path / "s.json").read_text()) == out and "draws" not in out[0]
    first = {r["protocol"]: r for r in out if r["settings"]["checkpoint"] == checkpoints[0]}
    second = {r["protocol"]: r for r in out if r["settings"]["checkpoint"] == checkpoints[1]}
    for name, r in second.items():
        assert r["differences"]["to"] == checkpoints[0]
        for score, d in r["differences"]["scores"].items():
            assert d["value"] == pytest.approx(
                r["scores"][score]["value"] - first[name]["scores"][score]["value"]
            )
            assert d["low"] <= d["high"]
    assert "paired over clips" in capsys.readouterr().out
    # a model against itself: every paired draw is 0, though each alone has a wide interval
    out = evaluator.main(
        evaluator.parse(
            [checkpoints[0], checkpoints[0], "--data", str(corpus), "--bootstrap", "30"]
        )
    )
    for r in out[len(out) // 2 :]:
        assert all(
            d == {"value": 0.0, "low": 0.0, "high": 0.0}
            for d in r["differences"]["scores"].values()
        )
    assert any(s["high"] - s["low"] > 0.1 for s in out[0]["scores"].values())


def test_embed_writes_what_the_scores_are_made_of(mga_run, corpus, tmp_path):
    evaluator.main(
        evaluator.parse(
            [
                "embed",
                str(mga_run[0] / "best.pt"),
                "--data",
                str(corpus),
                "--out",
                str(tmp_path / "e"),
            ]
        )
    )
    audio, text = (np.load(tmp_path / f"e/{name}.npy") for name in ("audio", "text"))
    lines = [json.loads(x) for x in (tmp_path / "e/captions.jsonl").read_text().splitlines()]
    captions = [line["caption"] for line in lines]
    clips = common.read_manifest([str(tmp_path / "e/audio.jsonl")])
    assert len(clips) == len(audio) and len(lines) == len(text)
    ranks = common.retrieval_ranks(audio @ text.T, np.array([line["owner"] for line in lines]))
    out = evaluator.main(
        evaluator.parse(
            [
                str(mga_run[0] / "best.pt"),
                "--data",
                str(corpus),
                "--protocol",
                "retrieval",
                "--bootstrap",
                "0",
            ]
        )
    )
    for name, value in common.retrieval_scores(ranks).items():
        assert out[0]["scores"][name]["value"] == pytest.approx(value)
    details = {d["caption"]: d["rank"] for d in out[0]["details"]["t2a"]}
    assert details == {c: k + 1 for c, k in zip(captions, ranks["t2a"].tolist())}
    with pytest.raises(SystemExit):
        evaluator.parse(["embed", "--data", "x"])
    for folder, held in ((tmp_path / "e", "audio.jsonl"), (corpus, "manifest.jsonl")):
        before = (folder / held).read_bytes()
        given = ["embed", str(mga_run[0] / "best.pt"), "--data", str(corpus), "--out", str(folder)]
        with pytest.raises(FileExistsError, match=f"holds {held} already; give another folder"):
            evaluator.main(evaluator.parse(given))
        assert (folder / held).read_bytes() == before
