"""eval.py's HEAR interface and its probe: task folders made of tones whose right answers are known,
scores by hand.
"""

import json
import shutil
import warnings

import numpy as np
import pytest
import sklearn.metrics
import soundfile as sf
import torch

import common
import eval as evaluate
import mga_clap
from conftest import ROOT, SMALL
from tools import downstream
from tools import hear as benchmark

RATE = 8000
SPOKEN_DIGIT = (
    ROOT.parent / "shared/formats/samples/hear2021/hear-2021.0.6/tasks/spoken_digit-1.0.9-small"
)


class Ear:
    """Frames of 0.1 s: how much sound there is in each of eight bands of 500 Hz."""

    window_s, sample_rate, frame_s, pairwise = 4.0, RATE, 0.1, False

    def to(self, device):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def bands(self, waveform):
        waveform = torch.nn.functional.pad(waveform, (0, -waveform.shape[1] % 800))
        power = (
            torch.fft.rfft(waveform.unflatten(1, (-1, 800)))
            .abs()[..., :400]
            .unflatten(2, (8, 50))
            .sum(-1)
        )
        return power / (power + 50)  # (B, T, 8)

    def embed_audio(self, waveform, n_samples=None):
        return torch.nn.functional.normalize(self.bands(waveform).mean(1), dim=-1)

    def embed_frames(self, waveform, n_samples=None):
        return torch.nn.functional.normalize(self.bands(waveform) + 0.05, dim=-1)


@pytest.fixture
def hear(monkeypatch):
    """Runs tools.hear with the model above."""
    monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: Ear())
    monkeypatch.setattr(evaluate, "find_model", lambda path: None)
    monkeypatch.setattr(
        benchmark, "HEAR_PROBE", {**benchmark.HEAR_PROBE, "width": 64, "batch_size": 16}
    )  # the paper's: in a test of its own
    return lambda folder, *flags: benchmark.main(
        benchmark.parse(
            [
                "ear",
                "--task",
                str(folder),
                "--device",
                "cpu",
                "--bootstrap",
                "20",
                *map(str, flags),
            ]
        )
    )


def tone(hz, seconds, rng):
    """A whole number of periods in each frame: it stays in its band."""
    time_s = np.arange(int(seconds * RATE)) / RATE
    return rng.uniform(0.2, 0.6) * np.sin(
        2 * np.pi * (hz + 10 * rng.integers(-5, 6)) * time_s + rng.uniform(0, 6)
    )


def write_task(folder, told: dict, sounds: dict, classes, rate="8000", **metadata):
    """told: split -> {file: labels or events}; sounds: file -> waveform."""
    metadata = {
        "task_name": "tones",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        # a short patience, which keeps the tests short
        "evaluation_params": {"task_specific_param_grid": {"check_val_every_n_epoch": [1]}},
        **metadata,
    }
    folder.mkdir(exist_ok=True)
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    common.write_lines(
        folder / "labelvocabulary.csv",
        ["idx,label", *(f"{i},{c}" for i, c in reversed(list(enumerate(classes))))],
    )
    for split, of in told.items():
        (folder / f"{split}.json").write_text(json.dumps(of))
        (folder / rate / split).mkdir(parents=True)
        for name in of:
            sf.write(folder / rate / split / name, sounds[name], RATE)
    return folder


def tone_task(folder, counts, **metadata):
    """Clips of one of three tones; labels are numbers in the JSON files, as in spoken_digit."""
    rng, told, sounds = np.random.default_rng(0), {}, {}
    for split, count in counts.items():
        told[split] = {f"{split}{i}.wav": [[7, 8, 9][i % 3]] for i in range(count)}
        sounds |= {
            name: tone({7: 750, 8: 1750, 9: 2750}[label], 0.5, rng)
            for name, (label,) in told[split].items()
        }
    return write_task(folder, told, sounds, ["7", "8", "9"], **metadata)


def test_a_scene_task_of_one_label_a_clip(tmp_path, hear, capsys):
    folder = tone_task(tmp_path / "task", {"train": 61, "valid": 30, "test": 7})
    (r,) = hear(folder, "--json", tmp_path / "s.json")
    assert r["protocol"] == "hear_tones" and r["n_clips"] == 7 and r["n_classes"] == 3
    assert r["scores"] == {"accuracy": {"value": 1.0, "low": 1.0, "high": 1.0}}
    assert r["chance"] == {
        "accuracy": pytest.approx(3 / 7)
    }  # class 7 is the commonest of training, 3 of 7 in test
    assert json.loads((tmp_path / "s.json").read_text()) == [r] and r["details"]["folds"] == {
        "test": {"value": 1.0, "valid": 1.0, "files": 7}
    }
    printed = capsys.readouterr().out
    assert (
        "hear_tones: 7 clips, 3 classes" in printed
        and "1 hidden layer(s) of 64, lr 0.0032: the best of 8" in printed
    )


def test_the_grid_is_the_papers(tmp_path, hear, monkeypatch):
    assert [(p["layers"], p["lr"]) for p in benchmark.HEAR_GRID] == [
        (n, lr) for n in (2, 3) for lr in (3.2e-3, 1e-3, 3.2e-4, 1e-4)
    ]
    monkeypatch.undo()
    assert benchmark.HEAR_PROBE == dict(
        width=1024,
        dropout=0.1,
        batch_norm=True,
        batch_size=1024,
        weight_decay=0.0,
        standardise=False,
    )
    monkeypatch.setattr(benchmark, "HEAR_GRID", benchmark.HEAR_GRID[4:5])
    monkeypatch.setattr(evaluate, "load_model", lambda path, text=None, variant=None: Ear())
    monkeypatch.setattr(evaluate, "find_model", lambda path: None)
    (r,) = hear(tone_task(tmp_path / "task", {"train": 60, "valid": 60, "test": 12}))
    assert (
        r["scores"]["accuracy"]["value"] == 1.0
        and "2 hidden layer(s) of 1024" in r["settings"]["probe"]
    )


def test_a_scene_task_of_several_labels_a_clip(tmp_path, hear):
    rng, told, sounds = np.random.default_rng(0), {}, {}
    pitch = {"low": 750, "mid, or so": 1750, "high": 2750}
    for split, count in (("train", 28), ("valid", 14), ("test", 14)):
        for i in range(count):
            chosen = [c for k, c in enumerate(pitch) if (i % 7 + 1) >> k & 1]
            told.setdefault(split, {})[f"{split}{i}.wav"] = chosen
            sounds[f"{split}{i}.wav"] = sum(tone(pitch[c], 0.5, rng) for c in chosen)
    folder = write_task(
        tmp_path / "task",
        told,
        sounds,
        ["low", '"mid, or so"', "high"],
        prediction_type="multilabel",
    )
    (r,) = hear(folder)
    assert (
        r["scores"]["mAP"]["value"] == 1.0
        and r["chance"]["mAP"]
        == pytest.approx(common.chance_of_mean_ap(np.arange(14)[:, None] < 8))  # 8 of 14 each
        and r["n_clips"] == 14
    )


def event_task(folder, n_files=12, **metadata):
    """4 s files with a low and a high tone, not at multiples of a frame; times in ms."""
    rng, told, sounds = np.random.default_rng(1), {}, {}
    for split in ("train", "valid", "test"):
        for i in range(n_files):
            name, wave, events = f"{split}{i}.wav", 1e-4 * rng.normal(size=4 * RATE), []
            for label, hz in (("low", 750), ("high", 2250)):
                start, length = rng.uniform(0.2, 2.0), rng.uniform(0.6, 1.2)
                begin = int(start * RATE)
                sound = tone(hz, length, rng)
                wave[begin : begin + len(sound)] += sound
                events.append(
                    {"label": label, "start": 1000 * start, "end": 1000 * (start + length)}
                )
            told.setdefault(split, {})[name], sounds[name] = events, wave
    return write_task(
        folder,
        told,
        sounds,
        ["high", "low"],
        **{"embedding_type": "event", "prediction_type": "multilabel", **metadata},
    )


def test_a_timestamp_task(tmp_path, hear, capsys):
    (r,) = hear(event_task(tmp_path / "task"))
    assert (
        r["scores"]["onset_F1"]["value"] == 1.0
        and r["chance"]["onset_F1"] < 0.6
        and r["n_clips"] == 12
    )
    assert r["details"]["clips"][0]["events"] == 2 and r["details"]["clips"][0]["found"] == 2
    printed = capsys.readouterr().out
    assert (
        "tolerance: 200 ms" in printed
        and "median: 3 frames (250 ms)" in printed
        and "events of at least 0.125 s" in printed
    )
    folder = event_task(
        tmp_path / "music",
        n_files=2,
        evaluation=["event_onset_50ms_fms", "event_onset_offset_50ms_20perc_fms"],
        evaluation_params={},
    )
    task = benchmark.read_hear_task(folder, RATE)
    assert task["tolerance_s"] == 0.05
    # 20 validations, every third epoch; HEAR's own default for events
    rules = ("epochs", "patience", "median_s", "least_s", "by_loss")
    assert [task[rule] for rule in rules] == [500, 60, 0.25, [0.125, 0.25], False]
    told = dict(task_name="dcase2016_task2", evaluation_params={})
    folder = event_task(tmp_path / "dcase", n_files=2, **told)
    assert benchmark.read_hear_task(folder, RATE)["patience"] == 200
    told = {
        "use_scoring_for_early_stopping": False,
        "evaluation_params": {
            "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]},
            "task_specific_param_grid": {"max_epochs": [50], "check_val_every_n_epoch": [1]},
        },
    }  # as MAESTRO's metadata
    folder = event_task(tmp_path / "maestro", n_files=2, **told)
    task = benchmark.read_hear_task(folder, RATE)
    assert [task[rule] for rule in rules] == [50, 20, 0.15, [0.05], True]


@pytest.mark.parametrize(
    "rules",
    [["x"], {"task_specific_param_grid": {"patience": 20}}, {"event_postprocessing_grid": 3}],
)
def test_rules_of_another_form_are_one_sentence(tmp_path, rules):
    folder = tone_task(
        tmp_path / "task", {"train": 3, "valid": 3, "test": 3}, evaluation_params=rules
    )
    with pytest.raises(ValueError, match="'evaluation_params' is .*expected lists of numbers"):
        benchmark.read_hear_task(folder, RATE)


def test_a_task_is_judged_by_the_score_and_the_loss_that_it_names(tmp_path, monkeypatch):
    """mAP of a multiclass task: each class over all clips, by probability, not by logit."""
    counts = {"train": 4, "valid": 4, "test": 4}
    folder = tone_task(tmp_path / "task", counts, evaluation=["mAP", "top1_acc"])
    task = benchmark.read_hear_task(folder, RATE)
    assert (task["kind"], task["scored"]) == ("multiclass", "multilabel")
    task["classes"] = ["a", "b"]
    logits, part = np.array([[9.0, 8], [1, 5], [2, 0]]), {"targets": np.array([0, 1, 0])}
    evidence = benchmark.hear_evidence(task, logits, part, None, 0.0)
    probability = torch.from_numpy(logits).softmax(1).numpy()
    by_class = [
        sklearn.metrics.average_precision_score(part["targets"] == k, probability[:, k])
        for k in range(2)
    ]
    assert benchmark.hear_score("multilabel", evidence) == pytest.approx(np.mean(by_class))
    plain = [
        sklearn.metrics.average_precision_score(part["targets"] == k, logits[:, k])
        for k in range(2)
    ]
    assert np.mean(plain) < np.mean(by_class)
    # mean AP over the orders of three clips: one right clip 11/18, two right ones 29/36
    expected = (11 / 18 + 29 / 36) / 2
    assert benchmark.hear_chance(task, part, part, logits, None, 0.0) == pytest.approx(expected)
    # the probe with the smallest loss, where the task says so
    valid = {"inputs": np.zeros((2, 1), np.float32), "targets": np.array([0, 1])}
    sure, right = np.array([[0.1, 0], [5.0, 0]]), np.array([[0.2, 0], [0.1, 0]])
    probes = iter([sure, right])

    def probe(train, val, n, desc, score_of, **_):
        logits = next(probes)
        assert score_of(logits) == -benchmark.probe_loss(logits, valid["targets"])
        return lambda inputs: logits

    monkeypatch.setattr(benchmark, "train_probe", probe)
    task |= {"by_loss": True}
    grid = [{"layers": 2, "lr": 1.0}, {"layers": 3, "lr": 1.0}]
    best = benchmark.hear_probe(task, valid, valid, grid, None, "cpu", "x")
    assert best["point"] == grid[1]


def test_folds_take_turns_and_the_grid_is_searched_once(tmp_path, hear, monkeypatch):
    """Probes that are right for all, for two of three and for one of three classes, in the order of
    their training.
    """
    folder = tone_task(
        tmp_path / "task",
        {"fold00": 3, "fold01": 6, "fold02": 9},
        split_mode="new_split_kfold",
        nfolds=3,
    )
    seen = []

    def probe(train, val, n_classes, desc, **options):
        seen.append((len(train[0]), len(val[0]), options["layers"], options["lr"]))
        known = {"fold00": 3, "fold01": 2, "fold02": 1}[
            desc.split()[1].rstrip(",")
        ]  # classes the probe knows

        def of_file(x):
            return np.eye(3)[np.arange(len(x)) % 3]

        if len(seen) <= 8 and len(seen) != 3:  # all but the third point of the grid are never right
            return lambda x: -of_file(x)
        return lambda x: np.where(np.arange(3) < known, of_file(x), -1)

    monkeypatch.setattr(benchmark, "train_probe", probe)
    (r,) = hear(folder, "--bootstrap", 0)
    third = (benchmark.HEAR_GRID[2]["layers"], benchmark.HEAR_GRID[2]["lr"])
    assert [s[2:] for s in seen[8:]] == [third, third] and len(seen) == 10
    assert {s[:2] for s in seen[:8]} == {(9, 6)} and [s[:2] for s in seen[8:]] == [
        (3, 9),
        (6, 3),
    ]  # train, valid: fold02 | 01 ...
    assert [fold["value"] for fold in r["details"]["folds"].values()] == pytest.approx(
        [1, 2 / 3, 1 / 3]
    )
    assert (
        r["scores"]["accuracy"]["value"] == pytest.approx(2 / 3) and r["n_clips"] == 18
    )  # of folds, not of clips: 10 / 18


@pytest.mark.skipif(
    not SPOKEN_DIGIT.is_dir(),
    reason="HEAR's own spoken_digit metadata (../shared/formats/samples) is not here",
)
def test_a_real_task_folder_is_read(tmp_path):
    """Metadata, vocabulary and five folds as HEAR ships them, without the audio."""
    shutil.copytree(SPOKEN_DIGIT, tmp_path / "task")
    for rate in ("16000", "44100", "48000"):
        (tmp_path / "task" / rate).mkdir()
    task = benchmark.read_hear_task(tmp_path / "task", 44100)
    assert (task["name"], task["kind"], task["classes"]) == (
        "spoken_digit",
        "multiclass",
        [str(k) for k in range(10)],
    )
    assert list(task["splits"]) == [f"fold0{k}" for k in range(5)] and all(
        len(row["labels"]) == 1 for row in task["splits"]["fold03"]
    )
    first = json.loads((SPOKEN_DIGIT / "fold00.json").read_text())
    row = task["splits"]["fold00"][0]
    assert row["audio"] == str(tmp_path / "task/44100/fold00" / next(iter(first))) and row[
        "labels"
    ] == [str(first[next(iter(first))][0])]
    assert (
        "/48000/"
        in benchmark.read_hear_task(tmp_path / "task", 32000)["splits"]["fold00"][0]["audio"]
    )  # no folder of the model's rate


def test_onset_counts_by_hand():
    """Frames of 0.1 s, median over 3. Class a: events at 0.35 and 2.0; detections from 0.5 (late by
    0.15: right), from 1.3 and, one frame which the median takes out, from 1.9. Class b: two events
    near one detection are one hit.
    """
    a, b = -np.ones((30, 1)), -np.ones((30, 1))
    a[5:9], a[13:16], a[19], b[10:20] = 1, 1, 1, 1
    row = {
        "events": [
            {"label": "a", "onset": 0.35, "offset": 0.9},
            {"label": "a", "onset": 2.0, "offset": 2.1},
            {"label": "b", "onset": 0.9, "offset": 2.0},
            {"label": "b", "onset": 1.2, "offset": 2.0},
        ]
    }
    logits, names = np.concatenate([a, b], 1), ["a", "b"]

    def counts(min_s, tolerance_s):
        return benchmark.onset_counts(logits, row, names, 0.1, 3, min_s, tolerance_s).tolist()

    assert counts(0.125, 0.2) == [2, 3, 4]
    assert counts(0.3, 0.2) == [2, 3, 4]  # three frames last 0.3 s, which is enough
    assert counts(0.35, 0.2) == [2, 2, 4]  # the detection from 1.3 is too short
    assert counts(0.125, 0.1) == [
        1,
        3,
        4,
    ]  # exactly on the limit counts (b at 0.9 and 1.0), 0.15 does not
    evidence = np.array([counts(0.125, 0.2), [0, 1, 0]])
    assert benchmark.hear_score("event", evidence) == pytest.approx(2 * 2 / (4 + 4))
    assert benchmark.hear_score("event", np.zeros((2, 3))) == 0.0


def test_onset_f1_equals_sed_eval():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sed_eval
    rng, names, evidence = np.random.default_rng(0), ["a", "b"], []
    metric = sed_eval.sound_event.EventBasedMetrics(
        names, t_collar=0.2, evaluate_onset=True, evaluate_offset=False
    )
    for _ in range(20):
        logits = np.repeat(rng.normal(size=(12, 2)), 3, axis=0)  # 36 frames of 0.1 s
        events = [
            {"label": str(rng.choice(names)), "onset": o, "offset": o + 0.5}
            for o in rng.uniform(0, 3, 6)
        ]
        evidence.append(benchmark.onset_counts(logits, {"events": events}, names, 0.1, 1, 0.0, 0.2))
        detected = [
            {"event_label": c, "event_onset": a * 0.1, "event_offset": b * 0.1, "file": "x"}
            for k, c in enumerate(names)
            for a, b in zip(*evaluate.runs(logits[:, k] > 0))
        ]
        metric.evaluate(
            [
                {
                    "event_label": e["label"],
                    "event_onset": e["onset"],
                    "event_offset": e["offset"],
                    "file": "x",
                }
                for e in events
            ],
            detected,
        )
    theirs = metric.results_overall_metrics()["f_measure"]["f_measure"]
    assert (
        benchmark.hear_score("event", np.array(evidence)) == pytest.approx(theirs, abs=1e-12)
        and 0.2 < theirs < 0.8
    )


def test_scores_of_scene_tasks_by_hand():
    task = {"kind": "multiclass", "scored": "multiclass", "classes": ["a", "b"]}
    logits = np.array([[2.0, 1], [1, 2], [1, 1]])
    evidence = benchmark.hear_evidence(task, logits, {"targets": np.array([0, 0, 1])}, None, 0.0)
    assert evidence.ravel().tolist() == [1, 0, 0] and benchmark.hear_score(
        "multiclass", evidence
    ) == pytest.approx(1 / 3)
    task, targets = (
        {"kind": "multilabel", "scored": "multilabel", "classes": ["a", "b", "c"]},
        np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]),
    )
    logits = np.array([[3.0, 5, 1], [2, 4, 1], [1, 3, 1]])
    evidence = benchmark.hear_evidence(task, logits, {"targets": targets}, None, 0.0)
    # a: hits at ranks 1 and 3: (1 + 2 / 3) / 2; b: at ranks 2 and 3: (1 / 2 + 2 / 3) / 2; c does
    # not occur
    assert benchmark.hear_score("multilabel", evidence) == pytest.approx(
        ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    )


# The interface


@pytest.fixture(params=["clap", "htsat", "atst"])
def model(request, clap_folder, tmp_path):
    """Untrained models of both kinds this far, by load_model: HEAR calls it with a path alone."""
    if request.param == "clap":
        return benchmark.load_model(str(clap_folder[0]))
    cfg = common.configure(mga_clap.Config, data=["x"], **{**SMALL, "encoder": request.param})
    torch.manual_seed(0)
    text_encoder = common.text_encoder_from_scratch(["a dog barks"], 64, 1, 1, cfg.max_tokens)
    torch.manual_seed(0)
    made = mga_clap.Model(cfg, text_encoder)
    common.save_checkpoint(
        tmp_path / "a.pt",
        {
            "method": "mga_clap",
            "config": cfg.__dict__,
            "model": made.state_dict(),
            "text_encoder": text_encoder.description(),
        },
    )
    return benchmark.load_model(tmp_path / "a.pt")


def test_the_interface_of_hear(model):
    """What HEAR's validator asks, at its lengths; the embeddings are the model's own."""
    assert isinstance(model, torch.nn.Module) and model.sample_rate in (16000, 32000, 48000)
    for seconds in (1.07, 2.74, 10.5):
        audio = (
            torch.rand(
                2, int(seconds * model.sample_rate), generator=torch.Generator().manual_seed(0)
            )
            * 2
            - 1
        )
        scene = benchmark.get_scene_embeddings(audio, model)
        assert scene.shape == (2, model.scene_embedding_size) and scene.dtype == torch.float32
        assert torch.equal(scene, model.embed_audio(audio)) and not torch.equal(scene[0], scene[1])
        embeds, stamps = benchmark.get_timestamp_embeddings(audio, model)
        assert (
            embeds.shape == (2, stamps.shape[1], model.timestamp_embedding_size)
            and embeds.dtype == torch.float32
        )
        assert torch.equal(embeds, model.embed_frames(audio)[:, : embeds.shape[1]])
        assert stamps[1].tolist() == pytest.approx(
            [(k + 0.5) * model.frame_s * 1000 for k in range(stamps.shape[1])], rel=1e-5
        )
        assert 1000 * (seconds - model.frame_s) < stamps[0, -1] <= 1000 * seconds
        assert isinstance(model.scene_embedding_size, int) and isinstance(
            model.timestamp_embedding_size, int
        )


def test_a_tone_is_in_the_frames_whose_time_it_covers():
    wave = np.zeros(2 * RATE, np.float32)
    wave[4800:9600] = np.sin(np.arange(4800))  # 0.6 s to 1.2 s
    embeds, stamps = benchmark.get_timestamp_embeddings(torch.from_numpy(wave)[None], Ear())
    loud = embeds[0].std(1) > 0.05
    assert stamps[0][loud].tolist() == pytest.approx([650, 750, 850, 950, 1050, 1150])
    assert benchmark.get_timestamp_embeddings(torch.zeros(1, 300), Ear())[1].tolist() == [
        [50.0]
    ]  # less than half a frame: one


# The probe that aqa and hear share


def test_a_probe_of_several_classes_at_once_with_batch_norm_learns_and_is_reproduced():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(301, 6)).astype(
        np.float32
    )  # 1 + 2 batches of 100 + a row alone, when split 201 : 100
    targets = np.stack([inputs[:, 0] > 0, inputs[:, 1] * inputs[:, 2] > 0], 1).astype(np.float32)
    settings = dict(
        layers=3,
        width=64,
        epochs=40,
        lr=1e-2,
        batch_size=100,
        batch_norm=True,
        dropout=0.1,
        weight_decay=0.0,
    )

    def score_of(logits):
        return float(((logits > 0) == targets[201:]).mean())

    def make():
        return downstream.train_probe(
            (inputs[:201], targets[:201]),
            (inputs[201:], targets[201:]),
            2,
            "x",
            score_of=score_of,
            **settings,
        )

    probe = make()
    logits = probe(inputs[201:])
    assert score_of(logits) > 0.85 and np.array_equal(logits, make()(inputs[201:]))
    assert np.allclose(
        probe(inputs[201:202]), logits[:1], atol=1e-5
    )  # no batch statistics, no dropout when it is used


def test_a_probe_stops_when_its_patience_ends_and_keeps_the_first_of_the_best():
    inputs, targets, given = np.eye(4, dtype=np.float32), np.arange(4), []

    def score_of(logits):
        given.append(logits)
        return [0.2, 0.5, 0.5, 0.1, 0.5, 0.4, 0.9][len(given) - 1]

    probe = downstream.train_probe(
        (inputs, targets), (inputs, targets), 4, "x", score_of=score_of, patience=3, lr=0.1
    )
    assert len(given) == 5 and np.allclose(
        probe(inputs), given[1]
    )  # the second epoch, then three that are not better


# Bad input


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "task_metadata.json",
            None,
            "task_metadata.json: no such file; --task expects a task folder as hear-preprocess "
            "writes it",
        ),
        ("task_metadata.json", "{", "task_metadata.json: not JSON"),
        ("task_metadata.json", "[]", "expected a JSON object, found list"),
        (
            "task_metadata.json",
            '{"embedding_type": "scene", "prediction_type": "regression"}',
            "prediction_type 'regression'; expected scene with",
        ),
        (
            "labelvocabulary.csv",
            None,
            "labelvocabulary.csv: no such file; it lists the task's classes",
        ),
        ("labelvocabulary.csv", "label\n7\n", "expected the columns idx,label"),
        ("labelvocabulary.csv", "idx,label\n0,7\n1,8\n", "label '9' is not in labelvocabulary.csv"),
        (
            "task_metadata.json",
            '{"embedding_type": "scene", "prediction_type": "multiclass", "evaluation": 5}',
            "'evaluation' is 5; expected a list of names",
        ),
        ("valid.json", None, "valid.json: no such file"),
        ("valid.json", "{}", "valid.json: not one label in it"),
        ("test.json", '{"a.wav": "7"}', "test.json: a.wav: expected a list of labels"),
        ("test.json", '{"a.wav": [7, 8]}', "a.wav has 2 labels"),
        ("test.json", '{"a.wav": [7]}', "none of 1 audio files could be read"),
        ("train.json", None, "expected train.json, valid.json and test.json, or at"),
        ("8000", None, "holds no folder of audio"),
    ],
)
def test_bad_task_folders_are_one_clear_sentence(tmp_path, hear, name, change, message):
    folder = tone_task(tmp_path / "task", {"train": 3, "valid": 3, "test": 3})
    if change is None:
        (folder / name).rename(tmp_path / "gone")
    else:
        (folder / name).write_text(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        hear(folder)
    assert "\n" not in str(error.value)


def test_other_bad_input(tmp_path, hear, monkeypatch, capsys):
    folder = event_task(tmp_path / "task", n_files=1)
    (folder / "test.json").write_text('{"test0.wav": ["low"]}')
    with pytest.raises(ValueError, match="test0.wav: expected a list of {label, start, end}"):
        hear(folder)
    for start in (None, "1"):
        told = {"test0.wav": [{"label": "low", "start": start, "end": 2}]}
        (folder / "test.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match="expected a list of .*times in milliseconds"):
            hear(folder)
    (folder / "test.json").write_text('{"test0.wav": [{"label": "low", "start": 1, "end": 2}]}')
    monkeypatch.delattr(Ear, "embed_frames")
    with pytest.raises(
        ValueError, match="tones is a timestamp task: it needs a model with embed_frames"
    ):
        hear(folder)
    for flags in (
        ["a.pt", "--task", "x", "--data", "y"],
        ["a.pt", "b.pt", "--task", "x"],
        ["a.pt"],
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(flags)
    assert "the following arguments are required: --task" in capsys.readouterr().err
