"""A web page that searches a folder of sounds by a sentence, and given captions by a sound.

  python -m tools.demo runs/mga_clap-1/best.pt --audio sounds
  python -m tools.demo CLAP_weights_2022.pth --audio sounds --captions captions.txt

Needs gradio and matplotlib. Each sound found is shown with its spectrogram. If the model embeds
frames, a curve shows the cosine of every frame to the sentence. For an uploaded sound, the page
lists the nearest of --captions.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

import common
import eval as evaluation
from tools import datasets, figures

SHOWN = 5  # sounds or captions per answer


def best(names: list[str], scores: np.ndarray) -> list[tuple[str, float]]:
    """The SHOWN names with the largest scores, each with its score."""
    return [(names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:SHOWN]]


class Sounds:
    """A folder of sounds, embedded by a model, and captions for other sounds.

    Raises
        ValueError, FileNotFoundError: no folder, no sound in it, or no readable sound.
    """

    def __init__(self, model, folder: Path, captions: list[str]):
        paths = datasets.AudioTree(folder).files.values()
        files = sorted({path for some in paths for path in some})
        if not files:
            suffixes = ", ".join(sorted(datasets.AUDIO_SUFFIXES))
            raise ValueError(f"--audio {folder}: holds no {suffixes} file")
        self.model, self.captions = model, captions
        self.has_frames = hasattr(model, "embed_frames")
        kept, self.audio_embeds, self.frame_embeds, bad = common.embed_files(
            model, files, frames=self.has_frames
        )
        self.files = [files[i] for i in kept]
        for error in bad:
            print(f"left out: {error}")

    def search(self, sentence: str) -> list[tuple[str, float]]:
        """The files nearest to a sentence, best first, each with its similarity."""
        texts = [self.model.clean_caption(sentence)]
        scores = common.similarities(self.model, self.audio_embeds, self.frame_embeds, texts)
        return best(self.files, scores[:, 0])

    def captions_of(self, path: str) -> list[tuple[str, float]]:
        """The captions nearest to a sound file, best first, each with its similarity."""
        _, audio_embeds, frame_embeds, _ = common.embed_files(
            self.model, [path], frames=self.has_frames, quiet=True
        )
        texts = [self.model.clean_caption(caption) for caption in self.captions]
        scores = common.similarities(self.model, audio_embeds, frame_embeds, texts)
        return best(self.captions, scores[0])

    def picture(self, path: str, sentence: str) -> np.ndarray:
        """A file's log-mel spectrogram, overlaid with the cosine of every frame to the sentence ->
        (H, W, 3) uint8.
        """
        plt, rate = figures.pyplot(), self.model.sample_rate
        waveform = torch.from_numpy(common.read_audio(path, rate))[None]
        seconds = waveform.shape[1] / rate
        # a very short sound is padded to a spectrogram frame
        waveform = torch.nn.functional.pad(waveform, (0, max(0, 1024 - waveform.shape[1])))
        log_mel = common.LogMel(rate, 1024, rate // 100, 64, 50, min(14000, rate / 2))(waveform)[0]
        figure, axis = plt.subplots(figsize=(8, 2.2), dpi=100, layout="constrained")
        place = dict(origin="lower", aspect="auto", extent=(0, seconds, 0, 64))
        axis.imshow(log_mel.T, cmap="Greys", **place)
        axis.set(xlabel="time (s)", ylabel="mel bin")
        if self.has_frames:
            text = common.embed_texts(self.model, [self.model.clean_caption(sentence)])[0]
            cosines = self.frame_embeds[self.files.index(path)] @ text
            edges = np.arange(len(cosines) + 1) * self.model.frame_s
            over = axis.twinx()
            over.stairs(cosines, edges, baseline=None, color="tab:red", linewidth=1.5)
            over.set(ylabel="cosine", xlim=(0, seconds))
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        plt.close(figure)
        return pixels


def load_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ValueError(
            'the page needs gradio and matplotlib; install them with: pip install ".[demo]", or '
            "start it with: uv run --extra demo -m tools.demo"
        ) from None
    return gradio


def page(sounds: Sounds, name: str):
    """The gradio page: a tab for search and, if there are captions, a tab for uploaded sounds."""
    gradio = load_gradio()

    def find(sentence: str) -> list:
        shown = []
        for path, score in sounds.search(sentence) if sentence.strip() else []:
            label = f"{score:.3f}  {Path(path).name}"
            shown.append(gradio.Audio(path, label=label, visible=True))
            picture = sounds.picture(path, sentence)
            shown.append(gradio.Image(picture, show_label=False, visible=True))
        hidden = [gradio.Audio(visible=False), gradio.Image(visible=False)] * SHOWN
        return (shown + hidden)[: 2 * SHOWN]  # a folder may hold fewer sounds

    def captions_of(path: str | None) -> list:
        try:  # path is None when the sound is removed
            found = sounds.captions_of(path) if path else []
            return [[f"{score:.3f}", caption] for caption, score in found]
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title=name) as blocks:
        gradio.Markdown(f"## {name}: {len(sounds.files)} sounds")
        with gradio.Tab("Search"):
            sentence = gradio.Textbox(label="What do you want to hear?", submit_btn=True)
            places = []
            for _ in range(SHOWN):
                places += [gradio.Audio(visible=False), gradio.Image(visible=False)]
            sentence.submit(find, sentence, places)
        if sounds.captions:
            with gradio.Tab("Name a sound"):
                upload = gradio.Audio(type="filepath", sources=["upload", "microphone"])
                table = gradio.Dataframe(headers=["cosine", "caption"], interactive=False)
                upload.change(captions_of, upload, table)
    return blocks


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tools.demo", allow_abbrev=False
    )
    parser.add_argument("model", help="any model that eval.py takes")
    parser.add_argument("--audio", type=Path, required=True, help="folder of sounds, at any depth")
    parser.add_argument(
        "--captions",
        nargs="+",
        help="captions for an uploaded sound: a .txt with one per line, or manifests; default: the "
        "folder's manifest.jsonl, if there is one",
    )
    parser.add_argument("--text-model", help="tokenizer of a published file, as in eval.py")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--port", type=int, default=7860, help="local port of the page")
    return parser.parse_args(argv)


def read_captions(flags) -> list[str]:
    """Each caption once, in the order of the files."""
    given = flags.captions
    if given is None:
        given = [str(flags.audio)] if (flags.audio / "manifest.jsonl").is_file() else []
    if len(given) == 1 and given[0].endswith(".txt"):
        return list(dict.fromkeys(common.read_lines(given[0])))
    rows = common.read_manifest(given) if given else []
    return list(dict.fromkeys(text for row in rows for text in row.get("captions", [])))


def main(flags) -> None:
    load_gradio()  # a missing package is reported before the folder is embedded
    captions = read_captions(flags)
    model = evaluation.load_model(flags.model, flags.text_model)
    sounds = Sounds(model.to(common.start_device(flags.device)), flags.audio, captions)
    blocks = page(sounds, flags.model)
    blocks.launch(server_port=flags.port, allowed_paths=[str(flags.audio.resolve())])


if __name__ == "__main__":
    common.run_entry(main, parse)
