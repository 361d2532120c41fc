"""tools.figures: a model's pictures are drawn and their numbers are right; those of results/ are
drawn in test_evidence.py.
"""

import json

import numpy as np
import pytest
import torch

import cacophony
import common
import eval as evaluate
import mga_clap
import test_captioning
from conftest import config
from test_probe import Recorder, noisy_clips
from tools import figures

pytest.importorskip("matplotlib")
import matplotlib.image  # noqa: E402


def drawn(path):
    """Whether a picture shows something."""
    return matplotlib.image.imread(path)[..., :3].std() > 0.05


talker = test_captioning.talker


@pytest.fixture
def draw(monkeypatch):
    """Runs tools.figures with a model on a manifest."""

    def call(model, data, *flags):
        monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: model)
        monkeypatch.setattr(evaluate, "find_model", lambda path: None)
        given = ["stub", "--data", str(data), "--device", "cpu", "--bootstrap", "20"]
        return figures.main(figures.parse([*given, *map(str, flags)]))

    return call


def test_the_picture_of_the_gap(draw, talker, tmp_path, capsys):
    (path,) = draw(talker[0], tmp_path, "--out", tmp_path / "pictures")
    assert path == tmp_path / "pictures/gap.png" and drawn(path)
    assert "gap.png" in capsys.readouterr().out
    corners = np.array(
        [[3.0, 1, 7], [-3, 1, 7], [3, -1, 7], [-3, -1, 7]]
    )  # a rectangle of 6 x 2 in a plane
    points, share = figures.principal_plane(corners)
    assert np.abs(points) == pytest.approx(np.array([[3.0, 1]] * 4)) and share == pytest.approx(
        [0.9, 0.1]
    )


# The picture of attention


def test_content_tokens_of_three_tokenizers():
    def said(tokens):
        return figures.content_tokens(tokens)

    assert said(
        [
            "<|startoftext|>",
            "a</w>",
            "dog</w>",
            "barks</w>",
            ",</w>",
            "then</w>",
            "rain</w>",
            "<|endoftext|>",
        ]
    ) == [(2, "dog"), (3, "barks"), (6, "rain")]
    # pieces of words say nothing
    assert said(["[CLS]", "the", "whist", "##ling", "dog", ".", "[SEP]"]) == [(4, "dog")]
    assert said(["<s>", "A", "\u0120dog", "</s>"]) == [(2, "dog")]
    words = ["<s>", "Rain", "\u0120snee", "zing", "\u0120dog", ".", "</s>"]
    assert said(words) == [(1, "Rain"), (4, "dog")]
    clip = ["<|startoftext|>", "snee", "zing</w>", "dog</w>", ".</w>", "<|endoftext|>"]
    assert said(clip) == [(3, "dog")]


def test_the_picture_of_attention(tmp_path, draw, capsys):
    asked = []

    class Watcher(Recorder):
        window_s = 2.0

        def token_attention(self, waveform, texts):
            asked.append((waveform.shape, texts[0]))
            tokens, maps = texts[0].split(), []
            for k in range(len(tokens)):
                share = (
                    np.exp(-((np.arange(20) - 3 * k) ** 2) / 4)[None]
                    * np.exp(-((np.arange(12) - 2 * k) ** 2) / 9)[:, None]
                )
                maps.append(share / share.sum())
            return [tokens], [np.stack(maps)]

        def embed_text(self, texts):
            return torch.eye(4)[[len(t) % 4 for t in texts]]

    data = noisy_clips(tmp_path / "d")
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    common.write_lines(
        data / "manifest.jsonl",
        [
            json.dumps(
                {
                    **row,
                    "captions": [
                        f"A loud {row['labels'][0]} falls on the old roof, then wind blows softly"
                    ],
                }
            )
            for row in rows
        ],
    )
    paths = draw(Watcher(), data, "--out", tmp_path / "pictures")
    path = tmp_path / "pictures" / "attention.png"
    assert [p.name for p in paths] == ["gap.png", "attention.png"]
    assert (
        path.stat().st_size < 200_000 and drawn(path) and "attention.png" in capsys.readouterr().out
    )
    assert [text.split()[2] for _, text in asked] == ["bell", "rain", "rain"] and asked[0][0] == (
        1,
        16000,
    )  # clips 0, 3 and 7


def test_noise_is_drawn_if_it_is_named(tmp_path, draw):
    model, data = Recorder(), noisy_clips(tmp_path / "d")
    with pytest.raises(ValueError, match="no picture was made"):
        draw(model, data, "--out", tmp_path / "pictures")
    (path,) = draw(model, data, "--only", "noise", "--out", tmp_path / "pictures")
    assert 5_000 < path.stat().st_size < 200_000 and path.name == "noise.png"


def test_stage_1_is_drawn_from_its_checkpoint(corpus, tmp_path):
    cacophony.main(config("cacophony", corpus, tmp_path, name="s", stage="mae"))
    paths = figures.main(
        figures.parse(
            [str(tmp_path / "s/mae.pt"), "--data", str(corpus), "--out", str(tmp_path / "pictures")]
        )
    )
    assert [path.name for path in paths] == ["learning.png", "reconstructions.png"]
    assert paths[1].stat().st_size > 10000 and drawn(paths[1])


def test_pictures_are_drawn_and_their_numbers_are_right(
    mga_run, corpus, tmp_path, monkeypatch, capsys
):
    flags = [str(mga_run[0] / "best.pt"), "--data", str(corpus), "--out", str(tmp_path / "pics")]
    figures.main(figures.parse(flags))
    printed = capsys.readouterr().out
    for name in (
        "learning",
        "frames_best1",
        "frames_worst1",
        "gap",
        "order",
        "last_block",
        "codewords",
    ):
        assert drawn(tmp_path / "pics" / f"{name}.png") and f"{name}.png" in printed, name

    model = mga_clap.Model.from_checkpoint(mga_run[0] / "best.pt")
    waveform = torch.randn(1, 320000) * 0.1
    attention, values = figures.last_block_maps(model, waveform)
    assert attention.shape == values.shape == (32, 32)
    assert np.allclose(attention.sum(1), 1, atol=1e-5) and (np.abs(values) <= 1 + 1e-5).all()
    # one cell by hand: frame 3 = chunk 0, column 3; frame 13 = chunk 1, column 5 of the 8 x 8 grid,
    # two rows each
    block, caught = model.audio_encoder.layers[-1].blocks[-1], {}
    block.norm1.register_forward_hook(lambda module, given, out: caught.update(x=out[0]))
    with torch.no_grad(), common.evaluating(model):
        model.frame_feats(waveform)
        q, k, v = block.attn.qkv(caught["x"]).view(64, 3, block.attn.heads, -1).unbind(1)
    expected_a = expected_v = 0.0
    for h in range(block.attn.heads):
        soft = torch.softmax(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5, -1)
        cells, others = [3, 11], [2 * 8 + 5, 3 * 8 + 5]
        expected_a += sum(soft[a, b].item() for a in cells for b in others) / 2 / block.attn.heads
        expected_v += (
            sum(torch.cosine_similarity(v[a, h], v[b, h], 0).item() for a in cells for b in others)
            / 4
            / block.attn.heads
        )
    assert attention[3, 13] == pytest.approx(expected_a, abs=1e-5) and values[
        3, 13
    ] == pytest.approx(expected_v, abs=1e-5)

    eye = np.eye(2, dtype=np.float32)
    event = {"label": "a", "onset": 0.0, "offset": 1.0}
    clips = {
        "rows": [{"events": [event]}, {"events": [event]}, {"events": []}],
        "frame_embeds": [eye[[1, 0, 1]], eye[[0, 1, 1]], eye[[0, 0, 0]]],
    }
    assert figures.clip_order(clips, eye, ["a", "b"], 1.0) == [1, 0]

    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pictures need matplotlib; install it"):
        figures.main(figures.parse(flags))


def test_a_picture_that_cannot_be_made_is_said(tmp_path, draw):
    with pytest.raises(ValueError, match="support none of attention"):
        draw(Recorder(), noisy_clips(tmp_path / "d"), "--only", "attention", "--out", tmp_path)


def test_the_command_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt: no such weight file, folder or hub id"):
        figures.main(figures.parse(["gone.pt", "--data", str(tmp_path)]))
