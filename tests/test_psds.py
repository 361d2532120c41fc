"""PSDS against sed_scores_eval (exact, all thresholds), psds_eval and a hand-computed case."""

import numpy as np
import pytest
import scipy.ndimage

import eval as evaluator

FRAME_S = 0.3125
SETTINGS = {
    "psds1": dict(dtc=0.7, gtc=0.7),
    "psds2": dict(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5),
    "half": dict(dtc=0.5, gtc=0.5),
}


def random_case(seed):
    """Clips of 1 to 32 frames, some without events, events of different classes overlapping; every
    other case full of ties.
    """
    rng = np.random.default_rng(seed)
    ties, classes = (
        seed % 2 == 0,
        [f"c{k}" for k in range(1 if seed % 7 == 0 else rng.integers(2, 6))],
    )
    scores, rows = [], []
    for i in range(rng.integers(3, 20)):
        n = int(rng.integers(2, 33)) if rng.random() < 0.5 else 32
        values, events = rng.normal(size=(n, len(classes))), []
        for k in (
            range(rng.integers(0, 4)) if i else range(len(classes))
        ):  # the first clip holds every class
            c = int(rng.integers(len(classes))) if i else k
            onset = round(rng.uniform(0, n * FRAME_S - 0.2), 1 if ties else 3)
            offset = round(min(onset + rng.uniform(0.2, 4), n * FRAME_S), 1 if ties else 3)
            if offset <= onset or any(
                e["label"] == classes[c] and e["onset"] <= offset and onset <= e["offset"]
                for e in events
            ):
                continue  # sed_scores_eval takes no touching events of one class
            events.append({"label": classes[c], "onset": onset, "offset": offset})
            frame = np.arange(n) * FRAME_S
            values[(frame < offset) & (frame + FRAME_S > onset), c] += 2
        scores.append((values.round(1) if ties else values).astype(np.float32))
        rows.append({"duration": n * FRAME_S, "events": events})
    return scores, rows, classes


def as_tables(scores, rows, classes):
    """The same case as sed_scores_eval's score tables, ground truth and durations; classes with
    events only.
    """
    import pandas as pd

    labels = {event["label"] for row in rows for event in row["events"]}
    columns = [k for k, c in enumerate(classes) if c in labels]
    tables, truth, durations = {}, {}, {}
    for i, (values, row) in enumerate(zip(scores, rows)):
        edges = evaluator.frame_edges(len(values), FRAME_S, row["duration"])
        tables[f"f{i}"] = pd.DataFrame(
            {
                "onset": edges[:-1],
                "offset": edges[1:],
                **{classes[k]: values[:, k] for k in columns},
            }
        )
        truth[f"f{i}"] = [(e["onset"], e["offset"], e["label"]) for e in row["events"]]
        durations[f"f{i}"] = row["duration"]
    return tables, truth, durations


def test_psds_equals_sed_scores_eval_on_50_random_cases():
    oracle = pytest.importorskip("sed_scores_eval").intersection_based
    compared = 0
    for seed in range(50):
        scores, rows, classes = random_case(seed)
        tables, truth, durations = as_tables(scores, rows, classes)
        for s in SETTINGS.values():
            if len(classes) == 1 and "cttc" in s:
                continue  # no other class to cross-trigger
            for max_efpr in (100.0, 800.0):
                roc = evaluator.psd_roc(scores, rows, classes, FRAME_S, **s, max_efpr=max_efpr)
                for alpha_st in (0.0, 1.0):
                    expected = oracle.psds(
                        tables,
                        truth,
                        durations,
                        dtc_threshold=s["dtc"],
                        gtc_threshold=s["gtc"],
                        cttc_threshold=s.get("cttc"),
                        alpha_ct=s.get("alpha_ct", 0.0),
                        alpha_st=alpha_st,
                        max_efpr=max_efpr,
                    )[0]
                    assert evaluator.psds(roc, alpha_st, max_efpr) == pytest.approx(
                        expected, abs=1e-6
                    ), (seed, s, alpha_st)
                    compared += 1
    assert compared > 500


def test_psds_by_hand():
    # one hour in one clip of 4 frames of 900 s; the event fills frame 1
    rows = [{"duration": 3600.0, "events": [{"label": "dog", "onset": 900.0, "offset": 1800.0}]}]
    scores = [np.array([[0.5], [0.4], [0.1], [0.3]])]
    # t < .5: frame 0, false (1/h). t < .4: frames 0-1, half of it right: with dtc 0.5 found, no
    # false one left. t < .3: frame 3 is false as well (1/h). t < .1: everything, a quarter right:
    # false, nothing found.
    ((efpr, tpr),) = evaluator.psd_roc(
        scores, rows, ["dog"], 900.0, dtc=0.5, gtc=0.5, max_efpr=10.0
    )
    assert efpr.tolist() == [0.0] and tpr.tolist() == [1.0]
    ((efpr, tpr),) = evaluator.psd_roc(
        scores, rows, ["dog"], 900.0, dtc=0.2, gtc=0.5, max_efpr=10.0
    )
    assert efpr.tolist() == [0.0] and tpr.tolist() == [1.0]
    roc = evaluator.psd_roc(
        scores, rows, ["dog"], 900.0, dtc=0.6, gtc=0.5, max_efpr=10.0
    )  # never right
    assert evaluator.psds(roc, 1.0, 10.0) == 0.0
    scores = [
        np.array([[0.5], [0.4], [0.45], [0.3]])
    ]  # two false ones before the right one would come
    roc = evaluator.psd_roc(scores, rows, ["dog"], 900.0, dtc=0.3, gtc=0.5, max_efpr=10.0)
    assert roc[0][1].max() == 1.0  # frames 0-2, a third right
    assert evaluator.psds(
        [(np.array([0.0, 2.0]), np.array([0.0, 1.0]))], 1.0, 10.0
    ) == pytest.approx(0.8)
    two = [(np.array([0.0]), np.array([1.0])), (np.array([0.0, 5.0]), np.array([0.0, 1.0]))]
    assert evaluator.psds(two, 0.0, 10.0) == pytest.approx(0.75)
    assert evaluator.psds(two, 1.0, 10.0) == pytest.approx(
        0.5
    )  # mean .5 - std .5 = 0 up to 5/h, then 1 - 0


def test_psds_without_a_limit_ends_at_the_largest_efpr():
    scores, rows, classes = random_case(3)
    roc = evaluator.psd_roc(scores, rows, classes, FRAME_S, 0.5, 0.5, max_efpr=None)
    end = max(efpr[-1] for efpr, _ in roc)
    assert evaluator.psds(roc, 0.0, None) == pytest.approx(evaluator.psds(roc, 0.0, end), abs=1e-12)
    limited = evaluator.psd_roc(scores, rows, classes, FRAME_S, 0.5, 0.5, max_efpr=end)
    assert evaluator.psds(limited, 0.0, end) == pytest.approx(
        evaluator.psds(roc, 0.0, None), abs=1e-12
    )


def test_psds_of_a_curve_that_goes_further_than_its_limit():
    """Steps beyond max_efpr count for nothing, and the score stays in [0, 1]."""
    steps = [(np.array([50.0, 400.0]), np.array([0.5, 1.0]))]
    assert evaluator.psds(steps, 0.0, 100.0) == pytest.approx(0.25)  # by hand: 0.5 * (100 - 50)
    assert evaluator.psds([(np.array([400.0]), np.array([1.0]))], 0.0, 100.0) == 0.0
    scores, rows, classes = random_case(3)
    limited, further = (
        evaluator.psd_roc(scores, rows, classes, FRAME_S, 0.5, 0.5, max_efpr=end)
        for end in (100.0, 800.0)
    )
    for alpha_st in (0.0, 1.0):
        expected = evaluator.psds(limited, alpha_st, 100.0)
        assert evaluator.psds(further, alpha_st, 100.0) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_an_event_is_left_out_and_none_at_all_is_an_error():
    scores, rows, classes = random_case(5)
    wider = [np.concatenate([s, s[:, :1]], 1) for s in scores]
    assert evaluator.psds(
        evaluator.psd_roc(wider, rows, [*classes, "silent"], FRAME_S, 0.5, 0.5)
    ) == evaluator.psds(evaluator.psd_roc(scores, rows, classes, FRAME_S, 0.5, 0.5))
    with pytest.raises(ValueError, match="no event of the clips is of one of the classes"):
        evaluator.psd_roc(scores, rows, ["x"] * len(classes), FRAME_S, 0.5, 0.5)


def test_nan_scores_are_an_error():
    scores, rows, classes = random_case(1)
    scores[0][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="some scores of class 'c0' are NaN"):
        evaluator.psd_roc(scores, rows, classes, FRAME_S, 0.5, 0.5)


def test_same_class_events_may_overlap():
    rows = [
        {
            "duration": 10.0,
            "events": [
                {"label": "dog", "onset": 0.0, "offset": 5.0},
                {"label": "dog", "onset": 2.5, "offset": 7.5},
            ],
        }
    ]
    scores = [np.where(np.arange(32) < 24, 1.0, 0.0)[:, None]]
    ((efpr, tpr),) = evaluator.psd_roc(scores, rows, ["dog"], FRAME_S, 0.7, 0.7)
    assert efpr.tolist() == [0.0] and tpr.tolist() == [1.0]
    # two events at the same time cover it once: 1.4 s of a detection of 4 s are too few
    event = {"label": "dog", "onset": 0.0, "offset": 1.4}
    rows = [{"duration": 10.0, "events": [event, event]}]
    scores = [np.where(np.arange(10) < 4, 1.0, 0.0)[:, None]]
    ((efpr, tpr),) = evaluator.psd_roc(scores, rows, ["dog"], 1.0, 0.3, 0.7)
    assert efpr.tolist() == [0.0] and tpr.tolist() == [1.0]  # 0.35 of it is enough for dtc 0.3
    ((efpr, tpr),) = evaluator.psd_roc(scores, rows, ["dog"], 1.0, 0.7, 0.7)
    assert tpr.tolist() == [0.0]


def test_collar_and_segment_f1_equal_sed_scores_eval():
    oracle = pytest.importorskip("sed_scores_eval")
    for seed in range(20):
        scores, rows, classes = random_case(seed)
        tables, truth, durations = as_tables(scores, rows, classes)
        labels = {event["label"] for row in rows for event in row["events"]}
        collar = oracle.collar_based.best_fscore(
            tables, truth, onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2
        )[0]
        ours = dict(zip(classes, evaluator.collar_f1(scores, rows, classes, FRAME_S)))
        segment = oracle.segment_based.best_fscore(tables, truth, durations, segment_length=1.0)[0]
        ours_segment = dict(zip(classes, evaluator.segment_f1(scores, rows, classes, FRAME_S)))
        for c in labels:
            assert ours[c] == pytest.approx(collar[c], abs=1e-9), (seed, c)
            assert ours_segment[c] == pytest.approx(segment[c], abs=1e-9), (seed, c)


def test_matching_is_the_largest_not_the_first_found():
    assert evaluator.largest_matching([(0, "a"), (0, "b"), (1, "a")]) == 2
    assert evaluator.largest_matching([(0, "a"), (1, "a"), (2, "a")]) == 1
    assert evaluator.largest_matching([]) == 0


@pytest.mark.parametrize("width", [1, 3, 7])
def test_median_filter_equals_scipy(width):
    x = np.random.default_rng(0).normal(size=(20, 3))
    expected = scipy.ndimage.median_filter(x, size=(width, 1), mode="nearest")
    assert np.array_equal(evaluator.median_filter(x, width), expected)
    assert [evaluator.median_frames(s, FRAME_S) for s in (0.0, 0.3, 0.94, 1.5)] == [1, 1, 3, 5]
    assert evaluator.median_frames(0.94, 0.04) == 23


def grounding_case(seed, n_queries=12):
    rng = np.random.default_rng(seed)
    values, rows = [], []
    for _ in range(n_queries):
        n, events, onset = int(rng.integers(4, 33)), [], 0.0
        value = rng.normal(scale=0.5, size=n)
        while onset < n * FRAME_S - 0.5:
            onset, length = onset + rng.uniform(0.1, 3), rng.uniform(0.2, 3)
            if onset + length < n * FRAME_S:
                events.append({"label": "phrase", "onset": onset, "offset": onset + length})
                frame = np.arange(n) * FRAME_S
                value[(frame < onset + length) & (frame + FRAME_S > onset)] += 1
            onset += length
        if events:
            values.append(np.clip(value, -1, 1))
            rows.append({"duration": n * FRAME_S, "events": events})
    return values, rows


@pytest.mark.filterwarnings("ignore")
def test_psdsm_equals_psds_eval(monkeypatch):
    psds_eval = pytest.importorskip("psds_eval")
    import pandas as pd

    # its int(array of one element) is an error since numpy 2.4
    monkeypatch.setattr(psds_eval.psds, "int", lambda x: np.ravel(x)[0].item(), raising=False)
    for seed in range(6):
        values, rows = grounding_case(seed)
        points = evaluator.grounding_points(values, rows, FRAME_S, 3, 2).sum(0)
        n_events, hours = (
            sum(len(r["events"]) for r in rows),
            sum(r["duration"] for r in rows) / 3600,
        )
        ours = evaluator.psds(
            [evaluator.staircase(points[:, 0] / n_events, points[:, 1] / hours, 800.0)], 0.0, 800.0
        )
        truth = pd.DataFrame(
            [
                {
                    "filename": f"f{i}",
                    "onset": e["onset"],
                    "offset": e["offset"],
                    "event_label": "phrase",
                }
                for i, row in enumerate(rows)
                for e in row["events"]
            ]
        )
        meta = pd.DataFrame(
            [{"filename": f"f{i}", "duration": row["duration"]} for i, row in enumerate(rows)]
        )
        oracle = psds_eval.PSDSEval(
            dtc_threshold=0.5,
            gtc_threshold=0.5,
            cttc_threshold=0.3,
            ground_truth=truth,
            metadata=meta,
        )
        for threshold in np.arange(
            0.01, 1, 0.02
        ):  # the same post-processing, written frame by frame
            found = []
            for i, v in enumerate(values):
                on = [1 / (1 + np.exp(-x)) > threshold for x in v]
                on = [
                    sorted(on[max(0, t - 1) : t + 2] + [on[t]] * (t in (0, len(on) - 1)))[1]
                    for t in range(len(on))
                ]
                runs, t = [], 0
                while t < len(on):
                    if on[t]:
                        stop = t
                        while stop < len(on) and on[stop]:
                            stop += 1
                        if runs and t - runs[-1][1] <= 2:
                            runs[-1][1] = stop
                        else:
                            runs.append([t, stop])
                        t = stop
                    t += 1
                found += [
                    {
                        "filename": f"f{i}",
                        "onset": a * FRAME_S,
                        "offset": b * FRAME_S,
                        "event_label": "phrase",
                    }
                    for a, b in runs
                ]
            oracle.add_operating_point(
                pd.DataFrame(found, columns=["filename", "onset", "offset", "event_label"])
            )
        # its eFPR is NaN where there is one class only; without cross-triggers it is the FPR
        curve = oracle.psd_roc_curves(alpha_ct=0.0)[0]
        assert ours == pytest.approx(oracle._auc(curve.xp, curve.yp[0], 800.0) / 800.0, abs=1e-6), (
            seed
        )
        assert 0 < ours < 1
