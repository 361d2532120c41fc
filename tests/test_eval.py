"""eval.py: protocols against brute force and scikit-learn, independence of order and batch size,
messages.
"""

import itertools
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.ndimage
import sklearn.metrics
import soundfile as sf
import torch

import common
import eval as evaluate
from conftest import ROOT
from test_psds import as_tables
from tools import downstream


def settings(bootstrap=0):
    """What a protocol reads of its settings."""
    plain = dict(crop="all", split="test", window_s=10.0, checkpoint="x", data=["y"])
    return types.SimpleNamespace(**plain, prompt="{}", crop_rule="", fold=None, bootstrap=bootstrap)


def run(checkpoint, data, *flags):
    return evaluate.main(
        evaluate.parse([str(checkpoint), "--data", str(data), "--device", "cpu", *map(str, flags)])
    )


@pytest.fixture(scope="module")
def results(mga_run, corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "scores.json"
    out = run(
        mga_run[0] / "best.pt", corpus, "--protocol", "all", "--json", path, "--bootstrap", 20
    )
    assert json.loads(path.read_text()) == out
    return {r["protocol"]: r for r in out}


def embeddings(mga_run, corpus):
    model = evaluate.load_model(mga_run[0] / "best.pt")
    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "test"]
    waveforms = [torch.from_numpy(common.read_audio(r["audio"], 32000))[None] for r in rows]
    audio = torch.cat([model.embed_audio(w) for w in waveforms]).numpy()
    frames = [
        model.embed_frames(w)[0].numpy()[: int(np.ceil(w.shape[1] / 32000 / 0.3125 - 1e-6))]
        for w in waveforms
    ]
    classes = (corpus / "classes.txt").read_text().split()
    return (
        model,
        rows,
        audio,
        frames,
        classes,
        model.embed_text([c.replace("_", " ") for c in classes]).numpy(),
    )


def test_results_follow_the_contract(results):
    assert set(results) == {
        "retrieval",
        "classification",
        "tagging",
        "frames",
        "sed",
        "grounding",
        "t_classify",
    }
    for r in results.values():
        assert {"protocol", "settings", "n_clips", "n_captions", "n_classes", "scores"} <= set(r)
        for s in r["scores"].values():
            assert set(s) == {"value", "low", "high"}
        assert (
            "zero-padded to 10 s; all consecutive windows" in r["settings"]["crop"]
            and r["settings"]["split"] == "test"
        )
        assert set(r["chance"]) == set(r["scores"])


def test_scores_equal_a_slow_computation(results, mga_run, corpus):
    model, rows, audio, frames, classes, class_embeds = embeddings(mga_run, corpus)
    captions = [(i, model.clean_caption(c)) for i, r in enumerate(rows) for c in r["captions"]]
    text = {c: model.embed_text([c]).numpy()[0] for _, c in captions}
    found = [
        sum(a @ text[c] >= audio[i] @ text[c] - 1e-6 for j, a in enumerate(audio) if j != i) == 0
        for i, c in captions
    ]
    assert results["retrieval"]["scores"]["t2a_R@1"]["value"] == pytest.approx(np.mean(found))
    assert results["retrieval"]["n_clips"] == 6 and results["retrieval"]["n_captions"] == 12

    targets = np.array([[c in r["labels"] for c in classes] for r in rows])
    ap = [
        sklearn.metrics.average_precision_score(t, s)
        for t, s in zip(targets.T, (audio @ class_embeds.T).T)
        if t.any()
    ]
    assert results["tagging"]["scores"]["mAP"]["value"] == pytest.approx(np.mean(ap), abs=1e-6)
    assert results["tagging"]["n_classes"] == targets.any(0).sum()

    single = [i for i, r in enumerate(rows) if len(set(r["labels"])) == 1]
    right = [
        classes[int((audio[i] @ class_embeds.T).argmax())] == rows[i]["labels"][0] for i in single
    ]
    assert results["classification"]["scores"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert results["classification"]["n_clips"] == len(single)
    assert results["classification"]["chance"]["accuracy"] == 1 / len(classes)

    for name, centred in (("mAP_raw", False), ("mAP_centred", True)):
        scores, truth = [], []
        for row, clip in zip(rows, frames):
            for t, frame in enumerate(clip):
                s = np.array([frame @ c for c in class_embeds])
                scores.append(s - s.mean() if centred else s)
                centre = (t + 0.5) * 0.3125
                truth.append(
                    [
                        any(
                            e["label"] == c and e["onset"] <= centre < e["offset"]
                            for e in row["events"]
                        )
                        for c in classes
                    ]
                )
        scores, truth = np.array(scores), np.array(truth)
        ap = [
            sklearn.metrics.average_precision_score(t, s)
            for t, s in zip(truth.T, scores.T)
            if t.any()
        ]
        assert results["frames"]["scores"][name]["value"] == pytest.approx(np.mean(ap), abs=1e-4)


def test_detection_and_grounding_equal_an_oracle_on_slow_scores(results, mga_run, corpus):
    """sed_scores_eval with DCASE's two scenarios written out; 3 frames of median, gaps of 2."""
    scoring = pytest.importorskip("sed_scores_eval")
    oracle = scoring.intersection_based
    model, rows, _, frames, classes, class_embeds = embeddings(mga_run, corpus)

    def filtered(scores):
        return scipy.ndimage.median_filter(scores, size=(3, 1), mode="nearest")

    found = {name: score["value"] for name, score in results["sed"]["scores"].items()}
    for suffix, centred in (("", False), ("_centred", True)):
        scores = [
            np.array([[frame @ c for c in class_embeds] for frame in clip]) for clip in frames
        ]
        if centred:
            scores = [s - s.mean(1, keepdims=True) for s in scores]
        given = as_tables([filtered(s) for s in scores], rows, classes)
        exact = dict(dtc_threshold=0.7, gtc_threshold=0.7, cttc_threshold=None, alpha_ct=0.0)
        loose = dict(dtc_threshold=0.1, gtc_threshold=0.1, cttc_threshold=0.3, alpha_ct=0.5)
        for name, scenario in (("PSDS1", exact), ("PSDS2", loose)):
            for st, alpha_st in (("", 1.0), ("_st0", 0.0)):
                value = oracle.psds(*given, **scenario, alpha_st=alpha_st, max_efpr=100.0)[0]
                assert found[name + st + suffix] == pytest.approx(value, abs=1e-6), name
        collar = scoring.collar_based.best_fscore(
            *given[:2], onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2
        )[0]
        segment = scoring.segment_based.best_fscore(*given, segment_length=1.0)[0]
        for name, of in (("collar_F1", collar), ("segment_F1", segment)):
            of_class = {c: of[c] for c in classes if c in of}
            details = results["sed"]["details"][name + suffix]
            assert details == pytest.approx({c: of_class[c] for c in details}, abs=1e-6)
            mean = np.mean(list(details.values()))
            assert found[name + suffix] == pytest.approx(mean, abs=1e-6)

    assert results["grounding"]["settings"]["gap"] == "2 frames"
    asked = [(row, clip, p) for row, clip in zip(rows, frames) for p in row["phrases"]]
    text = {p["phrase"]: model.embed_text([p["phrase"]]).numpy()[0] for _, _, p in asked}
    mean = np.mean(list(text.values()), 0)
    events = [
        [{"label": "x", "onset": a, "offset": b} for a, b in p["segments"]] for *_, p in asked
    ]
    queries = [row | {"events": of} for (row, _, _), of in zip(asked, events)]
    hours = sum(row["duration"] for row in queries) / 3600
    for suffix, less in (("", 0.0), ("_centred", mean)):
        values = [clip @ (text[p["phrase"]] - less) for _, clip, p in asked]
        right, false = evaluate.grounding_points(values, queries, 0.3125, 3, 2).sum(0).T
        curve = evaluate.staircase(right / sum(map(len, events)), false / hours, 800.0)
        value = results["grounding"]["scores"]["PSDSm" + suffix]["value"]
        assert value == pytest.approx(evaluate.psds([curve], 0.0, 800.0), abs=1e-6)
        tables = as_tables([filtered(v[:, None]) for v in values], queries, ["x"])
        half = dict(dtc_threshold=0.5, gtc_threshold=0.5, cttc_threshold=None, alpha_ct=0.0)
        exact = oracle.psds(*tables, **half, alpha_st=0.0, max_efpr=800.0)[0]
        value = results["grounding"]["scores"]["PSDS_exact" + suffix]["value"]
        assert value == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("protocol", ["classification", "tagging", "frames", "sed", "t_classify"])
def test_a_bootstrap_draw_is_the_score_of_its_clips(protocol, mga_run, corpus):
    """Each draw scored once more as a data set of the drawn clips, with repeats."""
    model, rows, audio, frames, classes, class_embeds = embeddings(mga_run, corpus)
    audio = np.random.default_rng(1).normal(size=audio.shape).astype(np.float32)
    if protocol == "classification":  # whose clips have one label; every second one is right
        rows = [{**row, "labels": row["labels"][:1], "events": []} for row in rows]
        audio[::2] = [class_embeds[classes.index(row["labels"][0])] for row in rows[::2]]
    if protocol == "t_classify":  # every draw needs a pair
        rows = [{**row, "negatives": row["captions"][::-1]} for row in rows]
    given, rng = settings(bootstrap=20), np.random.default_rng(0)
    given.median_s, given.prompt = 0.94, "{}"
    swapped = {i: (a[::-1].copy(), None) for i, a in enumerate(audio)}

    def score(chosen, bootstrap):
        given.bootstrap = bootstrap
        clips = {
            "rows": [rows[i] for i in chosen],
            "audio_embeds": audio[chosen],
            "frame_embeds": [frames[i] for i in chosen],
            "swapped": {k: swapped[i] for k, i in enumerate(chosen)},
        }
        return evaluate.PROTOCOLS[protocol].score(model, clips, classes, given)

    whole = score(np.arange(len(rows)), 20)
    assert whole["n_clips"] == len(rows) and len(whole["draws"]) == 20
    differ = 0
    for draw in whole["draws"]:
        chosen = rng.integers(0, len(rows), len(rows))
        again = score(chosen, 0)["scores"]
        assert {name: s["value"] for name, s in again.items()} == pytest.approx(draw, abs=1e-6)
        differ += draw != whole["draws"][0]
    assert differ > 5


def test_a_bootstrap_draw_of_retrieval_keeps_the_ranks_among_all_clips(mga_run, corpus):
    model, rows, audio, *_ = embeddings(mga_run, corpus)
    clips = {"rows": rows, "audio_embeds": audio, "frame_embeds": None}
    r, rng = evaluate.retrieval(model, clips, [], settings(bootstrap=20)), np.random.default_rng(0)
    ranks = {}  # clip -> ranks of its captions
    for query in r["details"]["t2a"]:
        ranks.setdefault(query["clip"], []).append((query["rank"], query["rank_text"]))
    ranks = list(ranks.values())
    for draw in r["draws"]:
        drawn = [q for i in rng.integers(0, len(ranks), len(ranks)) for q in ranks[i]]
        assert draw["t2a_R@1"] == pytest.approx(np.mean([rank == 1 for rank, _ in drawn]))
        assert draw["t2a_MRR_text"] == pytest.approx(np.mean([1 / rank for _, rank in drawn]))


def test_median_and_crop_of_the_command_reach_the_protocols(mga_run, corpus):
    flags = ("--protocol", "sed", "--bootstrap", 0, "--median-s", 0, "--crop", "first")
    (out,) = run(mga_run[0] / "best.pt", corpus, *flags)
    assert out["settings"]["median"].startswith("1 frames")
    assert out["settings"]["crop"].endswith("first window only")


def test_order_of_files_batch_size_and_workers_never_change_a_score(
    results, mga_run, corpus, tmp_path
):
    lines = (corpus / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines][::-1]
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
    shutil.copy(corpus / "classes.txt", tmp_path)
    common.write_lines(tmp_path / "manifest.jsonl", [json.dumps(r) for r in rows])
    for r in run(
        mga_run[0] / "best.pt", tmp_path, "--batch-size", 4, "--workers", 2, "--bootstrap", 0
    ):
        for name, s in r["scores"].items():
            assert s["value"] == pytest.approx(
                results[r["protocol"]]["scores"][name]["value"], abs=1e-6
            ), name
            assert s["low"] is None


def test_crop_first_uses_the_first_window_only(mga_run, tmp_path, corpus):
    row = json.loads((corpus / "manifest.jsonl").read_text().splitlines()[-1])
    x, rate = sf.read(corpus / row["audio"], dtype="float32", always_2d=True)
    first, noise = x[:, 0], np.random.default_rng(0).normal(size=len(x)).astype(np.float32) * 0.1
    sf.write(tmp_path / "short.wav", np.resize(first, 10 * rate), rate, subtype="FLOAT")
    sf.write(
        tmp_path / "long.wav",
        np.concatenate([np.resize(first, 10 * rate), noise]),
        rate,
        subtype="FLOAT",
    )
    model = evaluate.load_model(mga_run[0] / "best.pt")

    def embed(name, crop):
        return common.embed_files(model, [{"audio": str(tmp_path / name)}], crop=crop, quiet=True)[
            1
        ]

    assert np.abs(embed("long.wav", "first") - embed("short.wav", "all")).max() < 1e-3
    assert np.abs(embed("long.wav", "all") - embed("short.wav", "all")).max() > 1e-3


def test_crop_first_scores_detection_in_the_first_window_only():
    model = types.SimpleNamespace(
        frame_s=1.0,
        window_s=10.0,
        embed_text=lambda texts: torch.eye(2)[[("dog", "cat").index(t) for t in texts]],
    )
    heard = {"label": "dog", "onset": 2.0, "offset": 6.0}
    later = {"label": "dog", "onset": 30.0, "offset": 40.0}
    frames = np.tile(np.array([0.0, 0.5], np.float32), (10, 1))
    frames[2:6, 0] = 1.0
    row = {"duration": 60.0, "events": [heard, later], "where": "x"}
    given = settings()
    given.crop, given.median_s = "first", 1.0
    clips = {"rows": [row], "frame_embeds": [frames]}
    out = evaluate.sed(model, clips, ["dog", "cat"], given)
    assert {name: out["scores"][name]["value"] for name in ("PSDS1", "collar_F1")} == {
        "PSDS1": 1.0,
        "collar_F1": 1.0,
    }
    scored = evaluate.with_duration(row, frames, model, "first")
    assert scored["duration"] == 10.0 and scored["events"] == [heard]


def test_equal_texts_tie_exactly():
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(7, 512)).astype(np.float32)
    vectors = torch.from_numpy(rng.normal(size=(2, 512)).astype(np.float32))
    texts = ["b", *["a"] * 33]
    by_vectors = types.SimpleNamespace(
        embed_text=lambda texts: vectors[["ab".index(t) for t in texts]]
    )
    # one that compares pairs, and to which a text's place matters as rounding would
    by_pairs = types.SimpleNamespace(
        pairwise=True,
        pair_scores=lambda frames, texts: np.arange(7 * len(texts)).reshape(7, len(texts)) * 1.0,
    )
    for model in (by_vectors, by_pairs):
        sim = common.similarities(model, audio, None, texts)
        assert sim.shape == (7, 34) and (sim[:, 1:] == sim[:, 1:2]).all()
        assert (sim[:, 0] != sim[:, 1]).all()


def test_prompt_reaches_the_text_encoder(results, mga_run, corpus):
    (out,) = run(
        mga_run[0] / "best.pt",
        corpus,
        "--protocol",
        "tagging",
        "--prompt",
        "{} followed by a bell",
        "--bootstrap",
        0,
    )
    assert out["settings"]["prompt"] == "{} followed by a bell"
    named = {"bare", "mga_clap", "t_clap", "cacophony", "collat", "curation_clap"}
    assert named <= set(evaluate.PROMPTS)
    assert out["scores"]["mAP"]["value"] != results["tagging"]["scores"]["mAP"]["value"]


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    given = settings(bootstrap=100)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        hits = rng.random(80) < 0.3
        s = evaluate.result(
            "x", lambda chosen: {"a": float(hits[chosen].mean())}, 80, {"a": 0}, given
        )["scores"]["a"]
        covered += s["low"] <= 0.3 <= s["high"]
    assert 178 <= covered <= 200
    few = evaluate.result("x", lambda chosen: {"a": 0.5}, 80, {"a": 0}, settings(bootstrap=19))
    assert few["scores"]["a"] == {"value": 0.5, "low": None, "high": None}


def test_multi_label_clips_are_left_out_of_classification_and_ties_are_misses():
    class Model:
        @staticmethod
        def embed_text(texts):
            return torch.eye(3)[[int(t) for t in texts]]

    given = settings()
    rows = [{"labels": [x], "where": "x"} for x in "012"] + [{"labels": ["0", "1"], "where": "x"}]
    audio = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.1, 0.9], [1, 1, 0]], np.float32)
    out = evaluate.classification(
        Model, {"rows": rows, "audio_embeds": audio, "frame_embeds": None}, ["0", "1", "2"], given
    )
    assert out["scores"]["accuracy"]["value"] == pytest.approx(2 / 3) and out["settings"][
        "left_out"
    ].startswith("1 clip")


def test_folds_are_averaged_when_they_are_unequal():
    class Model:
        @staticmethod
        def embed_text(texts):
            return torch.eye(2)[[int(t) for t in texts]]

    given = settings()
    rows = [{"labels": ["0"], "fold": f, "where": "x"} for f in (1, 1, 1, 2)]
    audio = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    out = evaluate.classification(
        Model, {"rows": rows, "audio_embeds": audio, "frame_embeds": None}, ["0", "1"], given
    )
    assert out["scores"]["accuracy"]["value"] == 0.75 and out["scores"]["mean_of_folds"][
        "value"
    ] == pytest.approx((2 / 3 + 1) / 2)


def test_captions_of_several_clips_count_for_each_of_them_in_a_second_line():
    """Clips 0 and 1 are told alike; caption "b" of clip 2 lies nearest to clip 0."""
    vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6]}

    class Model:
        clean_caption = staticmethod(str)
        embed_text = staticmethod(lambda texts: torch.tensor([vectors[t] for t in texts]))

    given = settings()
    rows = [{"audio": str(k), "captions": [c], "where": "x"} for k, c in enumerate("aab")]
    audio = np.array([[0.8, 0.6], [0.96, 0.28], [0.6, 0.8]], np.float32)
    out = evaluate.retrieval(
        Model, {"rows": rows, "audio_embeds": audio, "frame_embeds": None}, [], given
    )
    value = {name: s["value"] for name, s in out["scores"].items()}
    # "a" to clips: .8, .96, .6; so the first "a" has rank 2, the second 1, by text both 1
    # "b" to clips: 1, .936, .96; its clip has rank 2 in both
    assert value["t2a_R@1"] == pytest.approx(1 / 3) and value["t2a_R@1_text"] == pytest.approx(
        2 / 3
    )
    assert [d["rank"] for d in out["details"]["t2a"]] == [2, 1, 2]
    assert [d["rank_text"] for d in out["details"]["t2a"]] == [1, 1, 2]
    # clip 1: both "a" .96, so its own ties with the other; by text that is right as well
    assert [d["rank"] for d in out["details"]["a2t"]] == [3, 2, 1]
    assert [d["rank_text"] for d in out["details"]["a2t"]] == [2, 1, 1]
    assert out["settings"]["distinct_captions"].startswith("2 of 3")


def test_one_fold_alone(mga_run, corpus, tmp_path):
    def folded(rows):
        for k, row in enumerate(rows):
            row["fold"] = k % 2 + 1

    data = rows_on_disk(tmp_path, corpus, folded)
    flags = ["--protocol", "tagging", "--bootstrap", 0, "--fold"]
    (out,) = run(mga_run[0] / "best.pt", data, *flags, 2)
    assert out["n_clips"] == 3 and out["settings"]["split"] == "test, fold 2"
    with pytest.raises(ValueError, match="--fold 3: no row of split test .*folds there: 1, 2"):
        run(mga_run[0] / "best.pt", data, *flags, 3)


def test_the_official_variant_repeats_short_clips_and_scores_all_their_frames(
    mga_run, corpus, tmp_path
):
    """A clip of 5 s: 16 frames and its own end, or the 32 frames of the same clip played twice."""
    paper = evaluate.load_model(mga_run[0] / "best.pt")
    official = evaluate.load_model(mga_run[0] / "best.pt", variant="official")
    clip = torch.randn(1, 160000, generator=torch.Generator().manual_seed(0)) * 0.1
    sf.write(tmp_path / "short.wav", clip[0].numpy(), 32000, "FLOAT")
    sf.write(tmp_path / "long.wav", torch.cat([clip, clip], 1)[0].numpy(), 32000, "FLOAT")
    rows = [{"audio": str(tmp_path / f"{name}.wav"), "captions": []} for name in ("short", "long")]
    short, long = common.embed_files(official, rows, frames="embed_frames")[2]
    assert len(short) == len(long) == 32 and np.allclose(short, long, atol=1e-6)
    short, long = common.embed_files(paper, rows, frames="embed_frames")[2]
    assert len(short) == 16 and len(long) == 32 and not np.allclose(short[8:], long[8:16])
    # the seconds that are scored
    for model, n_frames, declared, scored in (
        (official, 32, 5.0, 10.0),
        (paper, 16, 5.0, 5.0),
        (paper, 32, 9.9, 9.9),
        (paper, 32, 9.0, 9.0),  # a declared duration ends the clip, whatever the file holds
        (official, 39, 12.0, 12.0),
    ):
        row = evaluate.with_duration({"duration": declared}, np.zeros((n_frames, 2)), model)
        assert row["duration"] == scored


def test_variant_reaches_the_model_and_the_rule(mga_run, runs_of, corpus):
    flags = ["--protocol", "frames", "--bootstrap", 0]
    rules = [
        run(mga_run[0] / "best.pt", corpus, *flags, *variant)[0]["settings"]["frame_rule"]
        for variant in ([], ["--variant", "official"])
    ]
    assert rules == [
        "frames end with the clip; a last window shorter than a frame adds none",
        "clips are repeated to 10 s, all of their frames are scored",
    ]
    with pytest.raises(ValueError, match=r"--variant paper: .* of t_clap.py computes: none"):
        evaluate.load_model(runs_of("t_clap")[0] / "best.pt", variant="paper")


def test_rows_without_a_split_say_what_they_are(mga_run, corpus, tmp_path, capsys):
    rows = [
        {"audio": str(r["audio"]), "captions": r["captions"]}
        for r in common.read_manifest([str(corpus)])
    ][:3]
    common.write_lines(tmp_path / "plain.jsonl", [json.dumps(r) for r in rows])
    for flags, split in (
        ([], "all rows (clips that a model was trained on may be among them)"),
        (["--split", "train"], "train"),
    ):
        (out,) = run(
            mga_run[0] / "best.pt",
            tmp_path / "plain.jsonl",
            "--protocol",
            "retrieval",
            "--bootstrap",
            0,
            *flags,
        )
        assert (
            out["settings"]["split"] == split
            and out["n_clips"] == 3
            and split in capsys.readouterr().out
        )
    with pytest.raises(SystemExit):
        evaluate.parse(["a.pt"])
    assert "the following arguments are required: --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["CKPT", "--data", "nowhere"], "nowhere: no such manifest"),
        (["none.pt", "--data", "CORPUS"], "none.pt: no such weight file"),
        (["TEXT", "--data", "CORPUS"], "not a .*safely"),
        (["OTHER", "--data", "CORPUS"], "not a checkpoint this evaluator knows"),
        (
            ["CKPT", "--data", "CORPUS", "--prompt", "a sound"],
            "must hold {} once, where the class name goes",
        ),
        (["CKPT", "--data", "CORPUS", "--json", "/no/x.json"], "--json /no/x.json"),
        (
            ["CKPT", "--data", "PLAIN", "--split", "val"],
            r"--split val: no row of the manifest is in it .rows without a split are for training",
        ),
        (["CKPT", "--data", "PLAIN", "--protocol", "tagging"], "--protocol tagging needs 'labels'"),
    ],
)
def test_bad_input_is_one_clear_sentence(flags, message, mga_run, corpus, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"method": "other", "config": {}}, tmp_path / "other.pt")
    common.write_lines(
        tmp_path / "plain.jsonl", [json.dumps({"audio": "a.wav", "captions": ["x"]})]
    )
    names = {
        "CKPT": mga_run[0] / "best.pt",
        "CORPUS": corpus,
        "TEXT": tmp_path / "text.pt",
        "OTHER": tmp_path / "other.pt",
        "PLAIN": tmp_path / "plain.jsonl",
    }
    with pytest.raises((ValueError, FileNotFoundError, PermissionError), match=message) as error:
        evaluate.main(evaluate.parse([str(names.get(f, f)) for f in flags]))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_left_out_and_past_the_limit_stop(
    mga_run, corpus, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    (data / "audio/test0.wav").write_text("broken")
    out = run(
        mga_run[0] / "best.pt", data, "--protocol", "retrieval", "--max-bad", 0.5, "--bootstrap", 0
    )
    assert out[0]["n_clips"] == 5 and "left out: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 6 files could not be used"):
        run(mga_run[0] / "best.pt", data)


def test_the_command_prints_protocol_and_chance(mga_run, corpus):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "eval.py",
            mga_run[0] / "best.pt",
            "--data",
            corpus,
            "--bootstrap",
            "5",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "retrieval: 6 clips, 12 captions",
        "tie_rule",
        "prompt: '{}'",
        "chance",
        "mAP_centred",
    ):
        assert expected in done.stdout


def test_every_protocol_docstring_names_its_source():
    for name, protocol in {**evaluate.PROTOCOLS, **downstream.PROTOCOLS}.items():
        text = protocol.score.__doc__
        assert name == protocol.score.__name__ and ("Source:" in text or "papers" in text)
    assert list(itertools.islice(evaluate.PROTOCOLS, 1)) == ["retrieval"]


@pytest.mark.parametrize(
    "encoder, aggregator",
    [("atst", "codebook"), ("htsat", "wstag"), ("atst", "pacl"), ("htsat", "uaca")],
)
def test_every_encoder_and_compared_method_trains_resumes_and_is_evaluated(
    corpus, tmp_path, encoder, aggregator
):
    import mga_clap
    from conftest import SMALL

    local = {} if aggregator == "codebook" else dict(locality_blocks=0, hard_negatives=False)
    given = dict(
        data=[str(corpus)],
        name="a",
        runs=str(tmp_path),
        **{**SMALL, "epochs": 1, "save_steps": 1, **local},
    )
    cfg = common.configure(mga_clap.Config, encoder=encoder, aggregator=aggregator, **given)
    result = mga_clap.main(cfg)
    model = evaluate.load_model(tmp_path / "a" / "best.pt")
    assert model.sample_rate == (16000 if encoder == "atst" else 32000)
    assert model.frame_s == pytest.approx(0.04 if encoder == "atst" else 0.3125)
    out = {
        r["protocol"]: r
        for r in run(tmp_path / "a" / "best.pt", corpus, "--bootstrap", 0, "--split", "val")
    }
    assert out["retrieval"]["scores"]["t2a_R@1"]["value"] == pytest.approx(
        result["scores"]["t2a_R@1"]
    )
    assert out["tagging"]["scores"]["mAP"]["value"] == pytest.approx(
        result["scores"]["tagging_mAP"], abs=1e-6
    )
    for name in ("mAP_raw", "mAP_centred"):
        of_training = result["scores"][f"frame_{name}"]
        assert out["frames"]["scores"][name]["value"] == pytest.approx(of_training, abs=1e-6)

    rows = [r for r in common.read_manifest([str(corpus)]) if r["split"] == "test"][:3]
    waveforms = [torch.from_numpy(common.read_audio(r["audio"], model.sample_rate)) for r in rows]
    batch, n_samples = common.pad_batch([w.numpy() for w in waveforms])
    together = model.embed_frames(batch, n_samples)
    for i, w in enumerate(waveforms):  # neither padding nor the company changes a frame
        alone = model.embed_frames(w[None])[0]
        assert (together[i, : len(alone)] - alone).abs().max() < 1e-5
    if (
        aggregator != "codebook"
    ):  # pair scores: alone as in company, and as the training's similarity
        frames = [f.numpy() for f in together]
        texts = [c for r in rows for c in r["captions"]]
        scores = model.pair_scores(frames, texts)
        assert scores.shape == (3, len(texts))
        assert scores[1, 2] == pytest.approx(
            float(model.pair_scores(frames[1:2], texts[2:3])[0, 0]), abs=1e-5
        )


def test_t_classify_by_hand_and_on_files(results, mga_run, corpus):
    """Cosines chosen so that every count is known: 4 captions with a negative, 1 tie, 1 clip
    swapped.
    """
    vectors = {
        "x then y": [1, 0],
        "y then x": [0, 1],
        "x, y": [1, 0],
        "y, x": [1, 0],
        "first x": [0, 1],
        "first y": [1, 0],
        "x followed by y": [1, 0],
        "y followed by x": [0, 1],
    }

    class Model:
        clean_caption = staticmethod(lambda text: text)
        embed_text = staticmethod(
            lambda texts: torch.tensor([vectors[t] for t in texts], dtype=torch.float32)
        )

    given = settings()
    rows = [
        {"where": "a.jsonl:1", "captions": ["x then y", "x, y"], "negatives": ["y then x", "y, x"]},
        {
            "where": "b.jsonl:1",
            "captions": ["first x", "x followed by y", "alone"],
            "negatives": ["first y", "y followed by x", None],
        },
    ]
    clips = {
        "rows": rows,
        "audio_embeds": np.array([[1, 0], [0.8, 0.6]], np.float32),
        "frame_embeds": None,
        "swapped": {1: (np.array([0.6, 0.8], np.float32), None)},
    }
    out = evaluate.t_classify(Model, clips, [], given)
    # t2a: right, tie, wrong, right; a2t of clip 1: "first x" .6 < .8 wrong, "x followed by y" .8 >
    # .6 right
    assert (
        out["scores"]["t2a"]["value"] == 0.5
        and out["scores"]["a2t"]["value"] == 0.5
        and "'t2a': 1" in out["settings"]["tie_rule"]
    )
    assert out["details"]["t2a"]["connective 'then'"] == {"value": 1.0, "pairs": 1}
    assert [m > 0 for m in out["details"]["margins"]["t2a"]].count(True) / len(
        out["details"]["margins"]["t2a"]
    ) == out["scores"]["t2a"]["value"]
    assert out["details"]["t2a"]["connective 'first'"]["value"] == 0 and out["details"]["t2a"][
        "set b.jsonl"
    ] == {"value": 0.5, "pairs": 2}
    assert out["details"]["a2t"]["connective 'followed by'"]["value"] == 1.0
    assert out["details"]["t2a"]["connective ','"] == {"value": 0.0, "pairs": 1}
    # swapped audio of a clip without a negative leaves the other direction's score
    rows[1]["negatives"] = [None] * 3
    out = evaluate.t_classify(Model, clips, [], given)
    assert set(out["scores"]) == {"t2a"} and out["scores"]["t2a"]["value"] == 0.5

    model, scenes, audio, *_ = embeddings(mga_run, corpus)
    hits, back = [], []
    for row, a in zip(scenes, audio):
        for caption, negative in zip(row["captions"], row["negatives"]):
            if negative:
                right, wrong = (
                    a @ model.embed_text([model.clean_caption(t)]).numpy()[0]
                    for t in (caption, negative)
                )
                hits.append(right > wrong)
                swapped = model.embed_audio(
                    torch.from_numpy(common.read_audio(row["swapped_audio"], 32000))[None]
                ).numpy()[0]
                back.append(
                    right > swapped @ model.embed_text([model.clean_caption(caption)]).numpy()[0]
                )
    assert results["t_classify"]["n_captions"] == len(hits) > 0
    assert results["t_classify"]["scores"]["t2a"]["value"] == pytest.approx(np.mean(hits))
    assert results["t_classify"]["scores"]["a2t"]["value"] == pytest.approx(np.mean(back))


def rows_on_disk(tmp_path, corpus, edit):
    """A manifest of the test rows, changed by `edit`, beside the same audio and class list."""
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["split"] == "test"]
    for row in rows:
        for key in ("audio", "swapped_audio"):
            if key in row:
                row[key] = str(corpus / row[key])
    rows = edit(rows) or rows
    shutil.copy(corpus / "classes.txt", tmp_path / "classes.txt")
    common.write_lines(tmp_path / "manifest.jsonl", [json.dumps(r) for r in rows])
    return tmp_path


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("duration", -10, "duration -10; expected seconds above 0"),
        ("duration", True, "duration True"),
        (
            "events",
            [{"label": "x", "onset": 3, "offset": 1}],
            "onset 3, offset 1; expected 0 <= onset < offset",
        ),
        ("events", [{"label": "x", "onset": "1.0", "offset": 2}], "expected seconds as numbers"),
        ("events", [{"label": "x", "onset": 3000, "offset": 4000}], "are these milliseconds"),
        ("phrases", [{"phrase": "a dog"}], "a phrase needs 'phrase' and 'segments'"),
        ("phrases", ["dog"], "a phrase needs"),
        ("phrases", [{"phrase": "a dog", "segments": [1, 2]}], r"expected \[onset, offset\]"),
        ("labels", [3], "label 1 is empty .3."),
        ("negatives", [3, 4], "negative 1 is empty .3."),
    ],
)
def test_a_bad_value_in_a_manifest_is_named_with_its_line(corpus, tmp_path, key, value, message):
    data = rows_on_disk(tmp_path, corpus, lambda rows: rows[1].update({key: value}))
    with pytest.raises(ValueError, match=message) as error:
        common.read_manifest([str(data)])
    assert "manifest.jsonl:2: " in str(error.value)


def test_one_caption_a_row_gives_the_scores_of_one_row_a_clip(
    mga_run, corpus, tmp_path, results, capsys
):
    def split_up(rows):
        return [
            {**r, "captions": [c], "negatives": [n], "labels": [r["labels"][-1]]}
            for r in rows
            for c, n in zip(r["captions"], r["negatives"])
        ]

    out = run(mga_run[0] / "best.pt", rows_on_disk(tmp_path, corpus, split_up), "--bootstrap", 0)
    for r in out:
        for name, s in r["scores"].items():
            assert s["value"] == pytest.approx(
                results[r["protocol"]]["scores"][name]["value"], abs=1e-9
            ), (r["protocol"], name)
    assert "12 rows of the manifest are 6 files" in capsys.readouterr().out


def test_clips_without_annotation_are_no_negatives(mga_run, corpus, tmp_path, results):
    """Copies of every clip without labels and events must change neither tagging nor frames."""

    def double(rows):
        for i, row in enumerate(list(rows)):
            copy = tmp_path / f"{i}.wav"
            shutil.copy(row["audio"], copy)
            rows.append({"audio": str(copy), "captions": row["captions"], "split": "test"})

    data = rows_on_disk(tmp_path, corpus, double)
    flags = ("--protocol", "tagging", "frames", "--bootstrap", 0)
    for r in run(mga_run[0] / "best.pt", data, *flags):
        assert r["settings"]["left_out"].startswith("6 clips without") and r["n_clips"] == 6
        for name, s in results[r["protocol"]]["scores"].items():
            assert r["scores"][name]["value"] == pytest.approx(s["value"], abs=1e-6)


def test_all_splits_are_scored_together_and_a_folder_without_a_scored_row_is_named(
    mga_run, corpus, tmp_path, capsys
):
    rows = [json.loads(x) for x in (corpus / "manifest.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(corpus / row["audio"])} for row in rows]
    plain = [{k: v for k, v in row.items() if k != "split"} for row in rows[:2]]
    common.write_lines(tmp_path / "plain.jsonl", map(json.dumps, plain))
    flags = ("--protocol", "retrieval", "--bootstrap", 0)
    (out,) = run(mga_run[0] / "best.pt", corpus, *flags, "--split", "all")
    assert out["n_clips"] == len(rows)
    capsys.readouterr()
    data = [str(corpus), str(tmp_path / "plain.jsonl")]
    given = [str(mga_run[0] / "best.pt"), "--data", *data, *map(str, flags)]
    (out,) = evaluate.main(evaluate.parse(given))
    assert out["n_clips"] == sum(row["split"] == "test" for row in rows)
    assert f"--data {tmp_path}/plain.jsonl: none of its rows is in split test" in (
        capsys.readouterr().out
    )


def test_underscores_and_slashes_of_class_names_become_spaces():
    given = settings()
    given.prompt = "this is a sound of {}"
    assert evaluate.class_prompts(["cafe/restaurant", "dog_bark"], given) == [
        "this is a sound of cafe restaurant",
        "this is a sound of dog bark",
    ]


def test_labels_outside_the_list_are_named_and_results_survive_a_late_failure(
    mga_run, corpus, tmp_path, capsys, monkeypatch
):
    data = rows_on_disk(tmp_path, corpus, lambda rows: rows[0]["labels"].append("zebra"))
    (tmp_path / "classes.txt").write_bytes(
        b"\xef\xbb\xbf" + (corpus / "classes.txt").read_bytes()
    )  # a BOM is no part of a name
    broken = evaluate.Protocol(lambda *given: 1 / 0, "events")
    monkeypatch.setitem(evaluate.PROTOCOLS, "sed", broken)
    with pytest.raises(ZeroDivisionError):
        run(mga_run[0] / "best.pt", data, "--bootstrap", 0, "--json", tmp_path / "s.json")
    assert [r["protocol"] for r in json.loads((tmp_path / "s.json").read_text())] == [
        "retrieval",
        "classification",
        "tagging",
        "frames",
    ]
    assert "1 label(s) outside the class list do not count: zebra" in capsys.readouterr().out
    for content, message in (
        (b"", "class list is empty"),
        ("caf\u00e9".encode("latin-1"), "not UTF-8"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            common.read_classes([str(data)], [])


def test_f1_draws_leave_absent_classes_out():
    rows = [{"duration": 10.0, "events": [{"label": "a", "onset": 2.5, "offset": 5.0}]}]
    scores = [
        np.stack([(np.arange(32) >= 8) & (np.arange(32) < 16), np.zeros(32)], 1).astype(float)
    ]
    for f1 in (evaluate.collar_f1, evaluate.segment_f1):
        found = f1(scores, rows, ["a", "b"], 0.3125)
        assert found[0] == 1.0 and np.isnan(found[1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "{} {}"], "must hold {} once"),
        (["--prompt", "{{}}"], "must hold {} once"),
        (["--median-s", "-1"], "--median-s -1"),
        (["--median-s", "inf"], "--median-s inf"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--json", "FOLDER"], "--json .*a folder"),
        (["--max-bad", "-1"], "--max-bad -1"),
    ],
)
def test_bad_flags_are_said_before_any_work(mga_run, corpus, tmp_path, flags, message):
    flags = [str(tmp_path) if f == "FOLDER" else f for f in flags]
    with pytest.raises((ValueError, PermissionError), match=message):
        run(mga_run[0] / "best.pt", corpus, "--bootstrap", 0, *flags)


def test_broken_weights_and_a_missing_second_model(mga_run, corpus, tmp_path):
    content = torch.load(mga_run[0] / "best.pt", weights_only=True)
    content["model"]["frame_proj.1.weight"] = content["model"]["frame_proj.1.weight"] * float("nan")
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(FloatingPointError, match="weights are broken"):
        run(tmp_path / "nan.pt", corpus, "--protocol", "tagging", "--bootstrap", 0)
    with pytest.raises(FileNotFoundError, match="gone.pt"):  # said before the first model is scored
        evaluate.main(
            evaluate.parse([str(mga_run[0] / "best.pt"), "gone.pt", "--data", str(corpus)])
        )
