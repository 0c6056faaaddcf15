"""Average precision against scikit-learn, torchmetrics and a loop; single positives against scikit-learn and scipy."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.functional.classification import multilabel_average_precision

from aevlp import metrics
from aevlp.metrics import PseudoLabelMeter, average_precision, mean_average_precision, pseudo_label_quality


def loop_average_precision(scores, targets):
    """The definition: a threshold at every distinct score, from the highest down."""
    positives, seen, ap = sum(targets), 0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, targets, strict=True) if s >= threshold]
        ap += (sum(chosen) - seen) / positives * sum(chosen) / len(chosen)
        seen = sum(chosen)
    return ap


@pytest.mark.parametrize("decimals", [1, 2, 9])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_with_ties(seed, decimals):
    rng = np.random.default_rng(seed)
    n, classes = rng.integers(2, 60), rng.integers(1, 8)
    scores, targets = rng.random((n, classes)).round(decimals), rng.integers(0, 2, (n, classes))
    targets[0] = 1
    found = average_precision(scores, targets).numpy()
    assert found == pytest.approx([average_precision_score(t, s) for t, s in zip(targets.T, scores.T, strict=True)])
    assert found == pytest.approx([loop_average_precision(s, t) for t, s in zip(targets.T, scores.T, strict=True)])


def test_average_precision_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(500, 12, generator=generator).mul(50).round() / 50
    targets = (torch.rand(500, 12, generator=generator) < 0.2).int()
    reference = multilabel_average_precision(scores, targets, num_labels=12, average=None)
    torch.testing.assert_close(average_precision(scores, targets).float(), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
def test_types(dtype, target_dtype):
    scores = torch.tensor([[0.5, 0.25], [0.25, 0.5], [0.125, 1.0]], dtype=dtype)
    targets = torch.tensor([[1, 0], [0, 1], [0, 1]]).to(target_dtype)
    assert average_precision(scores, targets).tolist() == [1, 1]


def test_class_without_positives():
    scores, targets = torch.rand(10, 3), torch.zeros(10, 3)
    targets[4, 1] = 1
    with pytest.warns(UserWarning, match="No positive"):
        assert average_precision_score(targets[:, 0], scores[:, 0]) == 0
    expected = average_precision_score(targets[:, 1], scores[:, 1])
    assert average_precision(scores, targets).tolist() == pytest.approx([0, expected, 0])
    assert mean_average_precision(scores, targets) == pytest.approx(100 * expected / 3)
    assert mean_average_precision(scores, targets, empty=math.nan) == pytest.approx(100 * expected)


def test_all_scores_equal_and_all_positive():
    assert average_precision(torch.ones(8, 1), torch.tensor([[1], [0]] * 4)).item() == 0.5
    assert average_precision(torch.rand(8, 2), torch.ones(8, 2)).tolist() == [1, 1]
    assert average_precision(torch.rand(0, 2), torch.ones(0, 2)).tolist() == [0, 0]


def test_order_of_images_is_irrelevant():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40, 3), generator=generator) / 5
    targets = torch.randint(2, (40, 3), generator=generator)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(average_precision(scores, targets), average_precision(scores[order], targets[order]))


def test_coco_size_takes_under_a_second():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40137, 80, generator=generator)
    targets = torch.rand(40137, 80, generator=generator) < 0.036
    times = []
    for _ in range(3):
        start = time.process_time()  # of all threads: an upper bound on the wall time of an idle machine
        average_precision(scores, targets)
        times.append(time.process_time() - start)
    assert min(times) < 2  # two cores for one second


def loop_quality(pseudo, observed, truth):
    tp = fp = missing = negative = right = 0
    for row in zip(pseudo.tolist(), observed.tolist(), truth.tolist(), strict=True):
        for label, known, true in zip(*row, strict=True):
            if known:
                continue
            missing += true
            tp, fp = tp + (label == 1 and true), fp + (label == 1 and not true)
            negative, right = negative + (label == -1), right + (label == -1 and not true)
    counts = dict(tp=tp, fp=fp, missing=missing)
    return dict(precision=tp / (tp + fp), recall=tp / missing, negative_precision=right / negative, **counts)


def example(seed, n=40, classes=7):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(2, (n, classes), generator=generator)
    observed = truth * (torch.rand(n, classes, generator=generator) < 0.3)
    observed[0, truth[0] == 0] = -1
    return truth, observed, lambda: torch.randint(-1, 2, (n, classes), generator=generator).to(torch.int8)


@pytest.mark.parametrize("seed", range(5))
def test_quality_equals_loop(seed):
    truth, observed, draw = example(seed)
    pseudo = draw()
    assert pseudo_label_quality(pseudo, observed, truth) == pytest.approx(loop_quality(pseudo, observed, truth))


def test_meter_average_accumulated_and_resume():
    truth, observed, draw = example(0)
    meter, union = PseudoLabelMeter(truth, observed), torch.zeros_like(truth)
    for epoch in range(3):
        pseudo = draw()
        for ids in torch.randperm(40).split(16):
            meter.update(ids, pseudo[ids])
        union |= (pseudo == 1).long()
        assert torch.equal(meter.pseudo, pseudo)
        row = meter.end_epoch()
        now, ever = loop_quality(pseudo, observed, truth), loop_quality(union - (union == 0).long(), observed, truth)
        assert row["precision"] == pytest.approx(now["precision"]) and row["recall"] == pytest.approx(now["recall"])
        assert row["negative_precision"] == pytest.approx(now["negative_precision"])
        assert row["accumulated_precision"] == pytest.approx(ever["precision"])
        assert row["accumulated_recall"] == pytest.approx(ever["recall"])
        assert len(meter.history) == epoch + 1 and not meter.pseudo.any()
    assert meter.history[2]["accumulated_recall"] > max(row["recall"] for row in meter.history)


def test_meter_resumes_in_the_middle_of_an_epoch():
    truth, observed, draw = example(1)
    first, second = draw(), draw()
    straight, killed = PseudoLabelMeter(truth, observed), PseudoLabelMeter(truth, observed)
    for meter in (straight, killed):
        meter.update(range(40), first)
        meter.end_epoch()
        meter.update(range(20), second[:20])
    state = killed.state_dict()
    killed.update(range(40), -second)  # after the checkpoint: lost
    resumed = PseudoLabelMeter(truth, observed)
    resumed.load_state_dict(state)
    for meter in (straight, resumed):
        meter.update(range(20, 40), second[20:])
    assert straight.end_epoch() == resumed.end_epoch()
    assert straight.history == resumed.history


def test_fixed_labels_accumulate_nothing():
    truth, observed, draw = example(2)
    pseudo, meter = draw(), PseudoLabelMeter(truth, observed)
    for _ in range(2):
        meter.update(range(40), pseudo)
        row = meter.end_epoch()
    assert row["accumulated_recall"] == row["recall"] and row["accumulated_precision"] == row["precision"]


def test_nothing_to_measure_is_nan():
    truth, observed, draw = example(3)
    assert all(math.isnan(v) for v in PseudoLabelMeter(None, observed).end_epoch().values())
    row = PseudoLabelMeter(truth, observed).end_epoch()
    assert math.isnan(row["precision"]) and math.isnan(row["negative_precision"]) and row["recall"] == 0


def holes(seed, n=60, classes=5):
    """Scores with ties, targets of which a third is unknown."""
    rng = np.random.default_rng(seed)
    scores, targets = rng.random((n, classes)).round(1), rng.integers(0, 2, (n, classes))
    targets[rng.random((n, classes)) < 1 / 3] = -1
    targets[:2] = [[0], [1]]
    return scores, targets


@pytest.mark.parametrize("seed", range(5))
def test_unknown_targets_are_left_out_of_their_class(seed):
    scores, targets = holes(seed)
    known = [t >= 0 for t in targets.T]
    expected = [average_precision_score(t[k], s[k]) for t, s, k in zip(targets.T, scores.T, known, strict=True)]
    assert average_precision(scores, targets).numpy() == pytest.approx(expected)
    assert average_precision(scores, torch.tensor(targets).to(torch.int8)).numpy() == pytest.approx(expected)


def test_positives_alone_are_no_truth():
    scores = np.random.default_rng(0).random((20, 3))
    targets = np.full((20, 3), -1)
    targets[:5, 0] = targets[:5, 1] = 1
    targets[5, 1] = 0  # the one known negative
    found = average_precision(scores, targets, math.nan)
    assert found[0].isnan() and found[2].isnan()
    assert found[1].item() == pytest.approx(average_precision_score(targets[:6, 1], scores[:6, 1]))
    assert metrics.map_interval(scores, targets, math.nan)[0] == pytest.approx(100 * found[1].item())
    assert metrics.map_interval(scores, np.full((20, 3), -1), math.nan) is None


def one_label(seed, n=50, classes=6, several=False):
    """Scores with ties; one observed positive in most rows, and none of the last class."""
    rng = np.random.default_rng(seed)
    observed = np.zeros((n, classes), int)
    observed[np.arange(n), rng.integers(0, classes - 1, n)] = 1
    observed[-3:] = -1
    if several:
        observed[:20][rng.random((20, classes)) < 0.3] = 1
        observed[:, -1] = 0
    return rng.random((n, classes)).round(1), observed


@pytest.mark.parametrize("seed", range(5))
def test_auc_observed_equals_scikit_learn(seed):
    scores, observed = one_label(seed, several=seed % 2)
    found = metrics.auc_observed(scores, observed)
    given = [c for c in range(6) if (observed[:, c] == 1).any()]
    assert found[given] == pytest.approx([roc_auc_score(observed[:, c] == 1, scores[:, c]) for c in given])
    assert np.isnan(found[-1]) and np.isnan(metrics.auc_observed(scores, np.ones_like(observed))).all()


@pytest.mark.parametrize("several", [False, True])
def test_ranks_equal_scipy_and_recall_equals_every_order_of_the_ties(several):
    scores, observed = one_label(3, several=several)
    for row, (s, o) in enumerate(zip(scores, observed, strict=True)):
        given = np.flatnonzero(o == 1)
        ranks = rankdata(-s)
        expected = ranks[given].mean() if len(given) else math.nan
        assert metrics.rank_of_given(scores, observed)[row] == pytest.approx(expected, nan_ok=True)
        for k in (1, 3, 5):
            hits = []
            for c in given:
                above, level = sum(s > s[c]), sum(s == s[c])
                places = [above + 1 + i for i in range(level)]  # a fair draw among those that score the same
                hits.append(sum(p <= k for p in places) / level)
            expected = np.mean(hits) if hits else math.nan
            assert metrics.recall_at(k, scores, observed)[row] == pytest.approx(expected, nan_ok=True)


def test_a_drawn_picture_counts_as_often_as_it_was_drawn():
    """Every draw of the interval against scikit-learn on the repeated rows."""
    scores, targets = holes(0, n=25)
    weights = metrics.bootstrap_weights(25, 20, seed=3)
    aps = metrics.weighted_ap(scores, targets, weights)
    aucs = metrics.auc_observed(scores, targets, weights)
    for b in range(21):
        rows = np.repeat(np.arange(25), weights[:, b].astype(int))
        for c in range(5):
            known = rows[targets[rows, c] >= 0]
            s, t = scores[known, c], targets[known, c]
            expected = average_precision_score(t, s) if t.any() else math.nan
            assert aps[c, b] == pytest.approx(expected, nan_ok=True)
            positive = targets[rows, c] == 1
            expected = roc_auc_score(positive, scores[rows, c]) if positive.any() and not positive.all() else math.nan
            assert aucs[c, b] == pytest.approx(expected, nan_ok=True)


def test_a_picture_may_count_for_a_part_of_one():
    rng = np.random.default_rng(5)
    scores, targets = rng.random((60, 4)).round(1), rng.integers(0, 2, (60, 4))  # with ties
    weights = np.stack([rng.gamma(1, 0.01, size=60), np.ones(60)], 1)
    expected = [
        [average_precision_score(targets[:, c], scores[:, c], sample_weight=w) for w in weights.T] for c in range(4)
    ]
    np.testing.assert_allclose(metrics.weighted_ap(scores, targets, weights), expected, rtol=1e-12)
    assert np.isnan(metrics.weighted_ap(scores, targets * [1, 1, 1, 0], weights)[3]).all()


def test_intervals_are_repeatable_and_as_wide_as_the_standard_error_says():
    rng = np.random.default_rng(0)
    scores, observed = rng.random((900, 8)), np.eye(8, dtype=int)[rng.integers(0, 8, 900)]
    found = metrics.single_positive(scores, observed)
    assert found == metrics.single_positive(torch.tensor(scores), torch.tensor(observed))
    assert found != metrics.single_positive(scores, observed, seed=1)
    hits = metrics.recall_at(3, scores, observed)
    value, low, high = found["recall@3"]
    assert value == pytest.approx(100 * hits.mean()) and low < value < high
    assert high - low == pytest.approx(100 * 2 * 1.96 * hits.std() / 30, rel=0.15)
    rank = found["mean_rank"]
    spread = metrics.rank_of_given(scores, observed).std()
    assert rank[2] - rank[1] == pytest.approx(2 * 1.96 * spread / 30, rel=0.15)
    assert found["auc_observed"][0] == pytest.approx(100 * np.mean(metrics.auc_observed(scores, observed)))
    assert metrics.single_positive(scores, observed, replicates=0)["recall@1"][1:] == [None, None]


def test_five_hundred_draws_of_one_seed_are_made_if_nothing_else_is_said():
    scores, observed = one_label(0)
    weights = metrics.bootstrap_weights(50)
    assert weights.shape == (50, 501) and (weights[:, 0] == 1).all() and (weights.sum(0) == 50).all()
    np.testing.assert_array_equal(weights, metrics.bootstrap_weights(50, 500, seed=0))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(weights[:, 1], np.bincount(rng.integers(0, 50, 50), minlength=50))
    assert metrics.single_positive(scores, observed) == metrics.single_positive(scores, observed, 500, 0)
    assert [*metrics.single_positive(scores, observed)] == [m for m in metrics.MEASURES if m != "map"]
    assert metrics.map_interval(scores, observed == 1) == metrics.map_interval(scores, observed == 1, 0.0, 500, 0)
    np.testing.assert_array_equal(metrics.bootstrap_weights(0, 3), np.ones((0, 4)))


def test_an_interval_is_the_middle_95_percent_of_its_draws_or_their_reflection():
    draws = np.array([60.0, *range(101), math.nan])
    assert metrics._interval(draws) == [60, 2.5, 97.5]
    assert metrics._interval(draws, reflect=True) == [60, 22.5, 100]
    assert metrics._interval(np.array([40.0, *range(101)]), reflect=True) == [40, 0, 77.5]
    assert metrics._interval(np.array([math.nan, 1.0])) is None
    assert metrics._interval(np.array([3.0, math.nan])) == [3.0, None, None]


def test_a_run_is_spoken_of_by_map_or_by_auc():
    whole, given = {"test_map": 60.0, "test": {"map": [60.0, 50.0, 70.0]}}, {"val": {"auc_observed": [80, 70, 90]}}
    assert metrics.headline(whole) == ("map", [60.0, 50.0, 70.0]) and metrics.headline(whole, "val") == (None, None)
    assert metrics.headline({"test_map": 60.0}) == ("map", [60.0, None, None])
    assert metrics.headline({"test_map": 0.0})[0] == "map"
    assert metrics.headline(given, "val") == ("auc_observed", [80, 70, 90]) and metrics.headline(given) == (None, None)
    assert list(metrics.MEASURES) == ["map", "auc_observed", "recall@1", "recall@3", "recall@5", "mean_rank"]


@pytest.mark.parametrize("empty", [0.0, math.nan])
def test_the_interval_of_map_is_around_map(empty):
    scores, targets = holes(1)
    targets = np.concatenate([targets, np.zeros((60, 1), int)], 1)
    scores = np.concatenate([scores, scores[:, :1]], 1)
    value, low, high = metrics.map_interval(scores, targets, empty)
    assert value == pytest.approx(mean_average_precision(scores, targets, empty)) and 0 <= low < value < high <= 100
    draws = 100 * np.nanmean(metrics.weighted_ap(scores, targets, metrics.bootstrap_weights(60))[:-1], 0)
    low_, high_ = (2 * draws[0] - np.percentile(draws[1:], p) for p in (97.5, 2.5))
    wide = metrics.map_interval(scores, targets, math.nan)
    assert wide == pytest.approx([draws[0], max(low_, 0), min(high_, 100)], abs=1e-4)
    if empty == 0:  # one more class that is 0 in every draw
        assert [value, low, high] == pytest.approx([5 / 6 * v for v in wide])


def test_of_nothing_nothing_is_said():
    scores = np.random.default_rng(0).random((10, 3))
    assert set(metrics.single_positive(scores, np.zeros((10, 3), int)).values()) == {None}
    assert set(metrics.single_positive(scores[:0], np.zeros((0, 3), int)).values()) == {None}
    assert metrics.map_interval(scores[:0], np.zeros((0, 3), int), math.nan) is None
    for wrong in (np.zeros((3, 10)), np.zeros((10, 4))):
        for measure in (lambda s, t: metrics.recall_at(1, s, t), average_precision):
            with pytest.raises(ValueError, match="images, classes"):
                measure(scores, wrong)
    for measure in (lambda s, t: metrics.recall_at(1, s, t), average_precision):
        with pytest.raises(ValueError, match="images, classes"):
            measure(scores[0], np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        average_precision(np.full((2, 2), math.nan), np.ones((2, 2)))


def test_pseudo_labels_are_judged_where_the_truth_is_known():
    truth, observed, draw = example(4)
    pseudo, hidden = draw(), torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    partial = torch.where(hidden, -1, truth)
    seen_as_given = torch.where(hidden, 1, observed)  # what is unknown counts as little as what is given
    assert pseudo_label_quality(pseudo, observed, partial) == pytest.approx(loop_quality(pseudo, seen_as_given, truth))


def test_words_and_headlines_need_no_torch():
    code = (
        "import sys, aevlp.metrics as m; assert m.headline({'test_map': 1})[0] == 'map' and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_mean_over_classes_is_of_those_that_have_a_value():
    assert metrics.class_mean([40.0, 60.0, 80.0]) == 60
    assert metrics.class_mean([np.nan, 50.0, 70.0]) == 60
    assert metrics.class_mean([np.nan, np.nan]) is None
