"""Average precision against scikit-learn, torchmetrics and a loop; pseudo-label quality against a loop."""

import math
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import multilabel_average_precision

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
