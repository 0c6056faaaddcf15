"""Recipes against methods' published values, overrides, the switches to the released code."""

from dataclasses import FrozenInstanceError, asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest

from aevlp.data import AevlpError
from aevlp.models import MimeHead
from aevlp.recipes import (
    DATASETS,
    FIDELITIES,
    FIELDS,
    SETTINGS,
    SOURCES,
    SWITCHES,
    Recipe,
    as_table,
    estimates,
    parse_overrides,
    recipe,
    released_switches,
    should_stop,
)

PUBLISHED = {  # the authors' configurations, VOC COCO NUS CUB; lambda1 is the lower bound
    "epochs": (8, 8, 10, 10),
    "batch_size": (8, 16, 16, 8),
    "lr": (1e-5,) * 4,
    "w0": (0, 0, 0, 0),
    "wT": (2, 10, 10, 10),
    "b0": (-2,) * 4,
    "bT": (-2, -8, -8, -8),
    "mu0": (0.5,) * 4,
    "sigma0": (2,) * 4,
    "muT": (0.8,) * 4,
    "sigmaT": (0.5,) * 4,
    "q1": (1, 1, 1, 1.5),
    "q2": (0.01,) * 4,
    "q3": (0.9,) * 4,
    "lambda1": (0.4, 0.5, 0.5, 0.2),
    "lambda2": (0.7, 0.7, 0.7, 0.8),
    "eta": (0.05, 0.001, 0.001, 0.01),
    "expected_positives": (1.5, 2.9, 1.9, 31.4),
    "temperature": (0.01, 0.01, 0.01, 0.1),
    "local_threshold": (0.0, 0.3, 0.3, 0.005),
    "global_threshold": (0.5, 0.5, 0.6, 0.005),
    "top_k": (3, 3, 3, 32),
    "grid": (4, 4, 4, 5),
    "negative_ratio": (0.2, 0.3, 0.2, 0.2),
}
BY_METHOD = {  # (method, field): VOC COCO NUS CUB
    ("em", "em_alpha"): (0.2, 0.1, 0.1, 0.01),
    ("em-apl", "apl_beta"): (0.02, 0.9, 0.2, 0.4),
    ("em-apl", "apl_warmup"): (5, 5, 4, 3),
    ("ll-r", "ll_delta"): (0.2, 0.4, 0.4, 0.4),
    ("ll-ct", "ll_delta"): (0.2, 0.2, 0.2, 0.4),
    ("gpr+ll-ct", "ll_delta"): (0.2, 0.2, 0.2, 0.4),
    ("ll-cp", "ll_delta"): (0.1, 0.2, 0.2, 0.2),
    ("boostlu-ll-r", "ll_delta"): (0.5,) * 4,
    ("boostlu-ll-r", "boost_alpha"): (5,) * 4,
    ("mime", "mime_warmup"): (2, 2, 2, 5),
    ("vlpl", "vlpl_threshold"): (0.3,) * 4,
    ("role", "role_lr_factor"): (10,) * 4,
}
OWN = {  # the same under the methods' own repositories
    ("em", "lr"): (1e-5, 1e-5, 1e-5, 1e-4),
    ("em", "head_lr"): (1e-5, 1e-5, 1e-5, 1e-4),
    ("em", "early_stop"): ("em",) * 4,
    ("ll-ct", "optimizer"): ("sgd", "adam", "adam", "adam"),
    ("ll-ct", "lr"): (5e-3, 1e-5, 1e-5, 7.5e-5),
    ("boostlu-ll-r", "batch_size"): (16,) * 4,
    ("boostlu-ll-r", "head_lr"): (1e-4,) * 4,
    ("mime", "optimizer"): ("adamax",) * 4,
    ("mime", "lr"): (1e-4,) * 4,
    ("mime", "head_lr"): (1e-3,) * 4,
    ("mime", "batch_size"): (32, 32, 16, 16),
    ("vlpl", "batch_size"): (8,) * 4,
    ("gr", "epochs"): (8,) * 4,
    ("gr", "early_stop"): ("gr",) * 4,
    ("aevlp", "early_stop"): ("aevlp",) * 4,
    ("aevlp", "head_lr"): (1e-4,) * 4,
    ("aevlp", "neighbours"): (20, 62, 50, 312),
}


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("field", PUBLISHED)
def test_configurations_of_the_paper(field, fidelity):
    assert tuple(getattr(recipe(d, "aevlp", fidelity), field) for d in DATASETS[:4]) == PUBLISHED[field]


@pytest.mark.parametrize("method, field", BY_METHOD)
def test_values_of_single_methods(method, field):
    assert tuple(getattr(recipe(d, method), field) for d in DATASETS[:4]) == BY_METHOD[method, field]


@pytest.mark.parametrize("method, field", OWN)
def test_own_training_only_under_released(method, field):
    assert tuple(getattr(recipe(d, method, "released"), field) for d in DATASETS[:4]) == OWN[method, field]


def test_one_protocol_for_all_methods():
    common = "epochs batch_size lr head_lr optimizer weight_decay early_stop backbone image_size".split()
    methods = ("full", "an", "em", "ll-r", "mime", "aevlp")
    for dataset in DATASETS:
        own = ("epochs", "lr", "head_lr") if dataset == "glyphs" else ()  # there each trains to its plateau
        alike = [f for f in common if f not in own]
        rows = {tuple(getattr(recipe(dataset, m), f) for f in alike) for m in methods}
        assert len(rows) == 1 and recipe(dataset, "aevlp").early_stop == "none"


def test_the_embedded_benchmark_trains_as_long_as_a_method_gains():
    for method in ("full", "aevlp", "gpr+tokens", "em", "an", "gr", "aevlp-augmented"):
        assert recipe("glyphs", method).epochs == (12 if method in ("an", "gr") else 24)


def test_every_value_has_a_source_and_its_type():
    for dataset in DATASETS:
        for fidelity in FIDELITIES:
            made = recipe(dataset, "aevlp", fidelity)
            assert all(type(v) is FIELDS[k] for k, v in asdict(made).items()), dataset
    assert {s.field for s in SETTINGS} == set(FIELDS) == set(SOURCES)
    assert as_table().source.str.len().min() > 3
    assert as_table("coco", lr=3).loc["lr"].tolist() == [3.0, "override"]


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        recipe("voc", "an").lr = 1.0


def test_switches_flip_one_by_one():
    released = recipe("glyphs", "gpr+damp", "released")
    switched = [s for s in SWITCHES if s.field]
    assert [s.number for s in SWITCHES] == list(range(1, 21))
    for switch in switched:
        value = getattr(released, switch.field)
        assert getattr(recipe("glyphs", "aevlp", **{switch.field: value}), switch.field) == value
    flipped = {s.field for s in switched if getattr(released, s.field) != getattr(recipe("glyphs", "aevlp"), s.field)}
    assert flipped == {s.field for s in switched} - {"train_head"}  # the embedded benchmark's head is always trained
    everything = {s.field: getattr(released, s.field) for s in switched}
    assert recipe("glyphs", "aevlp", **everything) == released  # the switches are all that differs
    table = released_switches("glyphs")
    assert len(table) == 20 and (table.paper != table.released).sum() == len(flipped)


@pytest.mark.parametrize(
    "backbone, trained, head_lr",
    [
        ("resnet50.tv_in1k", True, 1e-4),
        ("convnext_large.fb_in1k", True, 1e-5),
        ("vit_large_patch14_clip_224.openai", False, 1e-4),
        ("resnet101.tv_in1k", False, 1e-4),
    ],
)
def test_released_code_leaves_other_heads_untrained(backbone, trained, head_lr):
    released = recipe("voc", "aevlp", "released", backbone=backbone)
    assert (released.train_head, released.head_lr) == (trained, head_lr)
    assert recipe("voc", "aevlp", backbone=backbone).train_head


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda f: f.name)
def test_text_overrides_give_the_same_recipe(field):
    value = getattr(recipe("glyphs", "aevlp"), field.name)
    assert recipe("glyphs", "aevlp", **parse_overrides([f"{field.name}={value}"])) == recipe("glyphs", "aevlp")


@pytest.mark.parametrize(
    "pair, says",
    [
        ("temprature=1", "nearest is 'temperature'"),
        ("delta_neg=0.1", "nearest is "),
        ("grid=2.5", "grid='2.5' should be a whole number"),
        ("lr=fast", "lr='fast' should be a number"),
        ("noise=2", "noise='2' should be true or false"),
        ("lr", "should be key=value"),
        ("grid=0", "at least 1"),
        ("temperature=0", "above 0"),
        ("temperature=nan", "not a finite number"),
        ("lr=inf", "not a finite number"),
        ("negative_ratio=20", "between 0 and 1"),
        ("augment=strong", "weak, flip, none"),
        ("negatives_as=2", "-1, 0"),
    ],
)
def test_wrong_overrides_are_one_sentence(pair, says):
    with pytest.raises(AevlpError) as caught:
        recipe("voc", "aevlp", **parse_overrides([pair]))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_from_notebooks_keep_their_types():
    made = recipe("voc", "aevlp", lr=1, grid=3.0, noise=False)
    assert (made.lr, type(made.lr), made.grid, type(made.grid), made.noise) == (1.0, float, 3, int, False)
    for wrong in (dict(grid=2.5), dict(grid=True), dict(backbone=3), dict(noise=1), dict(lr=None)):
        with pytest.raises(AevlpError, match="should be"):
            recipe("voc", "aevlp", **wrong)


def test_unknown_fidelity():
    with pytest.raises(AevlpError, match="'paper' or 'released'"):
        recipe("voc", "aevlp", "Paper")


def test_own_pictures_are_like_voc_with_their_own_counts():
    assert {k: v for k, v in asdict(recipe("csv", "aevlp")).items() if not k.startswith("mime_")} == {
        k: v for k, v in asdict(recipe("voc", "aevlp")).items() if not k.startswith("mime_")
    }
    truth = np.zeros((10, 9), np.int8)
    truth[:5, :6], truth[5:, :1] = 1, 1
    data = SimpleNamespace(truth=truth, splits=dict(val=np.arange(10)))
    assert estimates(data) == dict(expected_positives=3.5, random_positives=2.5, top_k=4)
    made = recipe("my-birds", "aevlp", data=data, top_k=2)
    assert (made.expected_positives, made.top_k) == (3.5, 2)
    assert recipe("voc", "aevlp", data=data).expected_positives == 1.5
    assert estimates(SimpleNamespace(truth=None, splits={})) == {}
    truth[5:, 3] = -1  # five pictures of which not all is known count nowhere
    assert estimates(data) == dict(expected_positives=6.0, random_positives=5.0, top_k=6)


@pytest.mark.parametrize(
    "scores, stops",
    [
        ([50.0], ""),
        ([50.0, 51.0], ""),
        ([50.0, 49.0], "em"),
        ([50.0, 50.0], "em"),
        ([50.0, 49.0, 49.5], "em aevlp"),
        ([50.0, 47.5], "em gr aevlp"),
        ([50.0, 48.0], "em"),
        ([50.0, 46.0], "em gr ll aevlp"),
    ],
)
def test_early_stopping(scores, stops):
    assert [r for r in ("em", "gr", "ll", "aevlp", "none") if should_stop(r, scores)] == stops.split()


def test_mime_is_small_on_a_set_without_published_values():
    sizes = {d: recipe(d, "mime") for d in ("voc", "csv")}
    assert (sizes["voc"].mime_width, sizes["voc"].mime_ffn, sizes["voc"].mime_z) == (2048, 8192, 256)
    weights = {d: sum(p.numel() for p in MimeHead(64, 20, *_sizes(r)).parameters()) for d, r in sizes.items()}
    assert weights["csv"] < 5e6 < 1e8 < weights["voc"]


def _sizes(r):
    return r.mime_width, r.mime_heads, r.mime_ffn, r.mime_dropout, r.mime_z, r.mime_samples
