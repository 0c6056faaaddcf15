"""DAMP against the paper's section 5.2 written as plain loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aevlp.damp import DampScores, aggregate, damp, local_threshold, negatives, positives


def loop_damp(probs, observed, nu, zeta, top_k, ratio, strict, rule, negatives_as):
    """One image at a time, one class at a time."""
    labels, thresholds, finals, averages = [], [], [], []
    for views, known in zip(probs.tolist(), observed.tolist(), strict=True):
        whole, patches, classes = views[0], views[1:], len(known)
        scores = [whole[c] for c in range(classes) if known[c] == 1]
        threshold = min([nu, *scores]) if scores else 0.0
        final, average = [], []
        for c in range(classes):
            best, worst = max(p[c] for p in patches), min(p[c] for p in patches)
            trusted = best > threshold if strict else best >= threshold
            final.append((whole[c] + (best if trusted else worst)) / 2)
            average.append((whole[c] + np.mean([p[c] for p in patches])) / 2)
        ranked = sorted(range(classes), key=lambda c: (-final[c], c))[:top_k]
        row = [1 if c in ranked and final[c] >= zeta else 0 for c in range(classes)]
        if rule == "floor":
            lowest = sorted(range(classes), key=lambda c: (average[c], c))[: int(ratio * classes + 1e-9)]
        else:
            percentile = np.percentile(average, 100 * ratio)
            lowest = [c for c in range(classes) if ratio > 0 and average[c] <= percentile + 1e-12]
        for c in lowest:
            row[c] = negatives_as
        for rows, new in zip((labels, thresholds, finals, averages), (row, threshold, final, average), strict=True):
            rows.append(new)
    return DampScores(
        *(None, None),
        torch.tensor(finals, dtype=torch.float64),
        torch.tensor(np.array(averages)),
        torch.tensor(thresholds, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.int8),
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 4),
    patches=st.integers(1, 9),
    classes=st.integers(1, 12),
    coarse=st.booleans(),
    nu=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    zeta=st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    top_k=st.integers(0, 14),
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.9, 1.0]),
    strict=st.booleans(),
    rule=st.sampled_from(["percentile", "floor"]),
    negatives_as=st.sampled_from([-1, 0]),
)
def test_damp_equals_loops(seed, images, patches, classes, coarse, nu, zeta, top_k, ratio, strict, rule, negatives_as):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(images, 1 + patches, classes, generator=generator, dtype=torch.float64)
    # Eighths, and patches in powers of two, make sums exact: ties are ties in both implementations.
    probs = (probs * 8).round() / 8 if coarse and patches in (1, 2, 4, 8) else probs.softmax(-1)
    observed = torch.randint(-1, 2, (images, classes), generator=generator)
    scores = damp(
        probs, observed, local_threshold=nu, global_threshold=zeta, top_k=top_k, negative_ratio=ratio,
        strict=strict, rule=rule, negatives_as=negatives_as,
    )  # fmt: skip
    expected = loop_damp(probs, observed, nu, zeta, top_k, ratio, strict, rule, negatives_as)
    assert torch.equal(scores.pseudo, expected.pseudo)
    for name in ("local_threshold", "final", "average"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert torch.equal(scores.global_probs, probs[:, 0])
    torch.testing.assert_close(scores.aggregated, 2 * scores.final - probs[:, 0], rtol=0, atol=1e-12)
    assert scores.pseudo.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_realistic_batch(dtype):
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(16, 17, 80, generator=generator, dtype=torch.float64) * 3).softmax(-1)
    observed = torch.nn.functional.one_hot(torch.randint(80, (16,), generator=generator), 80)
    observed[3] = 0  # an image without observed positive
    args = dict(local_threshold=0.3, global_threshold=0.1, top_k=3, negative_ratio=0.3)
    found = damp(probs.to(dtype), observed, **args).pseudo
    assert torch.equal(found, loop_damp(probs, observed, 0.3, 0.1, 3, 0.3, False, "percentile", -1).pseudo)
    assert (found == 1).any() and ((found == -1).sum(1) == 24).all()


def test_batch_equals_single_images():
    probs = torch.rand(6, 5, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    observed = torch.eye(10, dtype=torch.int8)[:6]
    args = dict(local_threshold=0.1, global_threshold=0.1, top_k=3, negative_ratio=0.2)
    single = [damp(probs[i : i + 1], observed[i : i + 1], **args).pseudo for i in range(6)]
    assert torch.equal(damp(probs, observed, **args).pseudo, torch.cat(single))


def test_no_observed_positive_trusts_every_maximum():
    probs = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    observed = torch.tensor([[0, -1, 0, 0, 0, 0]]).expand(2, 6)
    threshold = local_threshold(probs[:, 0], observed, 0.9)
    assert threshold.tolist() == [0, 0]
    assert torch.equal(aggregate(probs[:, 1:], threshold), probs[:, 1:].amax(1))


def test_the_threshold_is_the_least_observed_probability_or_nu():
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.7]]).expand(3, 4)
    observed = torch.tensor([[1, 1, 0, -1], [1, 0, 0, 0], [0, 0, 1, 1]])
    torch.testing.assert_close(local_threshold(probs, observed, 0.4), torch.tensor([0.2, 0.4, 0.1]))


def test_threshold_is_inclusive_unless_strict():
    local = torch.tensor([[[0.25], [0.5]]])
    assert aggregate(local, torch.tensor([0.5])).item() == 0.5
    assert aggregate(local, torch.tensor([0.5]), strict=True).item() == 0.25
    probs = torch.tensor([[[0.5], [0.25], [0.5]]])  # the threshold is what the whole picture says, 0.5
    args = dict(local_threshold=1.0, global_threshold=0.5, top_k=1, negative_ratio=0)
    assert damp(probs, torch.ones(1, 1), **args).aggregated.item() == 0.5
    assert damp(probs, torch.ones(1, 1), **args, strict=True).aggregated.item() == 0.25


def test_ties_at_the_last_place_keep_exactly_k():
    for classes in (5, 200):  # PyTorch sorts small and large rows differently
        found = positives(torch.full((3, classes), 0.5), 4, 0.5)
        assert found.sum(1).tolist() == [4] * 3 and found[:, :4].all()
        lowest = negatives(torch.full((3, classes), 0.5), 0.2, "floor")
        assert lowest.sum(1).tolist() == [classes // 5] * 3 and lowest[:, : classes // 5].all()
    assert positives(torch.rand(2, 5), 99, 0.0).all()
    assert not positives(torch.rand(2, 5), 0, 0.0).any()


@pytest.mark.parametrize("classes,ratio", [(20, 0.2), (80, 0.3), (81, 0.2), (312, 0.2), (101, 0.29), (1, 0.5)])
def test_percentile_is_numpys(classes, ratio):
    average = np.random.default_rng(0).random((50, classes))
    threshold = np.percentile(average, 100 * ratio, axis=1, keepdims=True)
    assert np.array_equal(negatives(torch.as_tensor(average), ratio).numpy(), average <= threshold + 1e-12)


def test_ratio_zero_and_one_and_ties():
    average = torch.tensor([[0.1, 0.1, 0.5, 0.1]])
    assert not negatives(average, 0).any() and not negatives(average, 0, "floor").any()
    assert negatives(average, 1).all() and negatives(average, 1, "floor").all()
    assert negatives(average, 0.25).tolist() == [[True, True, False, True]]  # everything at the percentile
    assert negatives(average, 0.25, "floor").tolist() == [[True, False, False, False]]  # exactly one


def test_released_negatives_never_appear_but_cancel_positives():
    probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]])
    args = dict(local_threshold=0.0, global_threshold=0.3, top_k=2, negative_ratio=0.5)
    assert damp(probs, torch.zeros(1, 2), **args, rule="floor").pseudo.tolist() == [[1, -1]]
    assert damp(probs, torch.zeros(1, 2), **args, rule="floor", negatives_as=0).pseudo.tolist() == [[1, 0]]


@pytest.mark.parametrize("wrong", [dict(negative_ratio=1.5), dict(rule="lowest")])
def test_errors(wrong):
    args = dict(local_threshold=0.1, global_threshold=0.1, top_k=3, negative_ratio=0.2) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        damp(torch.rand(1, 2, 3), torch.zeros(1, 3), **args)
    with pytest.raises(ValueError, match="patch"):
        damp(torch.rand(1, 1, 3), torch.zeros(1, 3), **args)
