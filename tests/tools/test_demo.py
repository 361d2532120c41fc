"""tools.demo, without a browser."""

import shutil
import sys

import numpy as np
import pytest
import soundfile as sf

import common
import curation_clap
import eval as evaluation
import mga_clap
from tools import demo


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Six sounds, in folders, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("sounds")
    for i, path in enumerate(sorted((corpus / "audio").glob("test?.wav"))):
        (folder / f"deep{i % 2}").mkdir(exist_ok=True)
        shutil.copy(path, folder / f"deep{i % 2}" / path.name)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def test_search_finds_what_eval_ranks_first(mga_run, corpus, folder, capsys):
    model = evaluation.load_model(mga_run[0] / "best.pt")
    sounds = demo.Sounds(model, folder, [])
    assert len(sounds.files) == 6 and "left out: " in capsys.readouterr().out
    out = evaluation.main(
        evaluation.parse([str(mga_run[0] / "best.pt"), "--data", str(corpus), "--bootstrap", "0"])
    )
    for told in out[0]["details"]["t2a"][:4]:
        found = sounds.search(told["caption"])
        scores = [score for _, score in found]
        assert len(found) == demo.SHOWN and scores == sorted(scores, reverse=True)
        names = [path.rpartition("/")[2] for path, _ in found]
        right = told["clip"].rpartition("/")[2]
        if told["rank"] <= demo.SHOWN:
            assert names[told["rank"] - 1] == right


def test_an_uploaded_sound_gets_the_nearest_captions(mga_run, folder, tmp_path):
    model = mga_clap.Model.from_checkpoint(mga_run[0] / "best.pt")
    captions = ["a dog barks", "rain falls", "a siren, then a bell"]
    sounds = demo.Sounds(model, folder, captions)
    sf.write(tmp_path / "up.flac", 0.1 * np.random.default_rng(0).normal(size=70000), 22050)
    found = sounds.captions_of(str(tmp_path / "up.flac"))
    _, audio, _, _ = common.embed_files(model, [tmp_path / "up.flac"], quiet=True)
    texts = common.embed_texts(model, [mga_clap.clean_caption(c) for c in captions])
    expected = {c: float(audio[0] @ text) for c, text in zip(captions, texts)}
    assert [c for c, _ in found] == sorted(captions, key=lambda c: -expected[c])
    assert all(score == pytest.approx(expected[c], abs=1e-6) for c, score in found)
    with pytest.raises(ValueError, match="none of 1 audio files could be read"):
        sounds.captions_of(str(folder / "broken.wav"))


def test_the_curve_lies_where_the_frames_are(mga_run, folder, monkeypatch):
    """With frames that match the text in one place, the red line peaks there."""
    pytest.importorskip("matplotlib")
    model = mga_clap.Model.from_checkpoint(mga_run[0] / "best.pt")
    sounds = demo.Sounds(model, folder, [])
    text = common.embed_texts(model, ["a dog barks"])[0]
    frames = np.zeros_like(sounds.frame_embeds[0])
    frames[3 * len(frames) // 4 :] = text
    sounds.frame_embeds[0] = frames
    pixels = sounds.picture(sounds.files[0], "a dog barks").astype(int)
    assert pixels.shape == (220, 800, 3)
    # tab:red is (214, 39, 40); the label of its axis is red too, and stands at the right
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
    red[:, 750:] = False
    rows, columns = np.nonzero(red)
    high = columns[rows < rows.min() + 4]
    assert abs((high.min() - columns.min()) / (high.max() - columns.min()) - 0.75) < 0.02


def test_a_model_without_frames_draws_the_spectrogram_alone(runs_of, folder):
    pytest.importorskip("matplotlib")
    model = curation_clap.Model.from_checkpoint(runs_of("curation_clap")[0] / "best.pt")
    sounds = demo.Sounds(model, folder, [])
    pixels = sounds.picture(sounds.files[0], "rain")
    assert (pixels[..., 0] == pixels[..., 1]).all()  # grey: no red curve
    sf.write(folder / "click.wav", np.ones(300), 44100)  # less than a spectrogram frame
    assert sounds.picture(str(folder / "click.wav"), "rain").shape == pixels.shape


def test_captions_come_from_the_folder_a_table_or_a_manifest(corpus, folder, tmp_path):
    (tmp_path / "c.txt").write_text("a dog barks\nrain\na dog barks\n")

    def read(*words):
        return demo.read_captions(demo.parse(["m.pt", *map(str, words)]))

    assert read("--audio", folder) == []
    assert read("--audio", folder, "--captions", tmp_path / "c.txt") == ["a dog barks", "rain"]
    rows = common.read_manifest([str(corpus)])
    captions = {text for row in rows for text in row["captions"]}
    assert set(read("--audio", corpus)) == captions
    assert set(read("--audio", folder, "--captions", corpus)) == captions


def test_wrong_folders_are_one_sentence(mga_run, folder, tmp_path):
    model = mga_clap.Model.from_checkpoint(mga_run[0] / "best.pt")
    with pytest.raises(FileNotFoundError, match=r"--audio .*gone: no such folder"):
        demo.Sounds(model, tmp_path / "gone", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no .aif, .aiff, .flac, .mp3, .ogg, .wav fi"):
        demo.Sounds(model, tmp_path / "empty", [])


def test_a_missing_gradio_is_reported_before_anything_is_embedded(mga_run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(demo, "Sounds", None)
    flags = demo.parse([str(mga_run[0] / "best.pt"), "--audio", str(folder)])
    with pytest.raises(ValueError, match=r'needs gradio and matplotlib; .* pip install "\.\[demo'):
        demo.main(flags)
