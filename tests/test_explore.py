"""The explorer: what it shows is what training sees, and nothing is slow on a slider."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from aevlp import glyphs, runs, train
from aevlp.data import AevlpError, LabelledImages, decode
from aevlp.explore import FILTERS, KEYS, OTHERS, SLIDERS, Explore, Explorer, explore, verdicts
from aevlp.labelers import Batch, build_labeler
from aevlp.recipes import recipe
from aevlp.vlm import load_clip

SMALL = {"backbone_weights": "none", "grid": 2, "temperature": 0.05, "global_threshold": 0.2}
SMALL |= {"epochs": 1, "batch_size": 8, "workers": 0, "local_threshold": 0.2, "negative_ratio": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes = [glyphs.draw_scene(5, i) for i in range(16)]
    truth = np.zeros((16, len(glyphs.CLASS_NAMES)), np.int8)
    for i, scene in enumerate(scenes):
        scene.image.save(root / f"{i:02d}.png")
        truth[i, [t.label for t in scene.things]] = 1
    observed = np.zeros_like(truth)
    observed[np.arange(16), truth.argmax(1)] = 1
    splits = {"train": np.arange(10), "val": np.arange(10, 12), "test": np.arange(12, 16)}
    paths = [str(root / f"{i:02d}.png") for i in range(16)]
    return LabelledImages("glyphs", paths, glyphs.CLASS_NAMES, observed, truth, splits)


@pytest.fixture(scope="module")
def clip():
    """The small CLIP, loaded once for all tests."""
    return load_clip(glyphs.CLIP_NAME)


@pytest.fixture
def calls(clip, monkeypatch):
    """How many views went through CLIP, call by call."""
    seen, encode = [], clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr("aevlp.explore.load_clip", lambda *_, **__: clip)
    monkeypatch.setattr("aevlp.eyes.load_clip", lambda *_, **__: clip)
    return seen


@pytest.fixture
def state(data, calls):
    return Explorer(data, recipe("glyphs", "aevlp", **SMALL))


def press(page, key):
    """What the browser sends for a key."""
    page.stage._msg_callbacks(page.stage, {"key": key}, [])


def unknown(data):
    return replace(data, truth=None)


@pytest.mark.parametrize("epoch", [1, 3])
def test_the_explorer_shows_the_labels_of_training(state, data, epoch):
    labeler = build_labeler("damp", data, state.recipe, bank_root=False)
    ids = data.splits["train"]
    images = [torch.from_numpy(decode(data.paths[i])).permute(2, 0, 1) for i in ids]
    batch = Batch(torch.from_numpy(ids), torch.arange(10), images, torch.from_numpy(data.observed[ids]))
    expected = labeler.labels(batch, epoch).numpy()
    shown = np.stack([state.look(int(i), epoch).pseudo for i in ids])
    assert (shown == expected).all() and (expected == 1).any() and (expected == -1).any()


def test_only_views_need_clip(state, calls):
    state.look()
    assert calls == [5]
    for name, value in {"temperature": 0.2, "local_threshold": 0.5, "global_threshold": 0.9, "top_k": 1}.items():
        state.recipe = replace(state.recipe, **{name: value})
        state.look()
    assert calls == [5]
    state.recipe = replace(state.recipe, grid=3)
    state.look()
    state.epoch = 2
    state.look()
    assert calls == [5, 10, 10]
    state.epoch = 1
    state.look()
    assert len(calls) == 3, "a draw seen before is not encoded again"


def test_kept_views_are_bounded(data, calls):
    few = Explorer(data, recipe("glyphs", "aevlp", **SMALL), keep=3)
    few.scores(range(10))
    few.look(0)
    assert len(few._views) <= 3


def test_a_threshold_answers_within_a_fifth_of_a_second(state, calls):
    page = Explore(state)
    before, times = len(calls), []
    for name, value in (("global_threshold", 0.3), ("local_threshold", 0.1), ("top_k", 2), ("negative_ratio", 0.4)) * 2:
        heat, bars, start = page.heat.value, page.bars.value, time.process_time()
        page.sliders[name].value = value if getattr(state.recipe, name) != value else type(value)(value / 2)
        times.append(time.process_time() - start)
        assert page.heat.value == heat
        assert name != "global_threshold" or page.bars.value != bars
    assert len(calls) == before, "CLIP was asked"
    assert sorted(times)[len(times) // 2] < 0.2, times


def test_filters_agree_with_a_plain_loop(state, data):
    pseudo = {int(i): state.look(int(i)).pseudo for i in data.splits["train"]}
    missed, wrong = {}, {}
    for i, row in pseudo.items():
        for c in range(len(data.class_names)):
            if data.observed[i, c] != 1 and data.truth[i, c] == 1 and row[c] != 1:
                missed[i] = missed.get(i, 0) + 1
            if data.truth[i, c] == 0 and row[c] == 1:
                wrong[i] = wrong.get(i, 0) + 1
    assert dict(state.survey("missed positives")) == missed and missed
    assert dict(state.survey("wrong positives")) == wrong and wrong
    name = data.class_names[int(np.flatnonzero(data.truth[:10].sum(0))[0])]
    only = [i for i, _ in state.survey("all images", name)]
    assert only == [i for i in range(10) if data.truth[i, data.class_names.index(name)]]
    order = [i for i, _ in state.survey("low confidence")]
    best = [state.look(i).scores.final.max().item() for i in order]
    assert sorted(order) == list(range(10)) and best == sorted(best)


def test_disagreement_without_a_run_compares_three_draws(state, data):
    found = dict(state.survey("disagreement between epochs"))
    for i in data.splits["train"]:
        draws = np.stack([state.look(int(i), e).pseudo == 1 for e in (1, 2, 3)])
        assert found.get(int(i), 0) == (draws.any(0) & ~draws.all(0)).sum()
    assert found


def test_without_truth(data, calls):
    page = Explore(Explorer(unknown(data), recipe("glyphs", "aevlp", **SMALL)))
    assert "unknown" in page.labels.value
    page.filter.value = "missed positives"
    assert "need the truth" in page.status.value
    page.filter.value = "low confidence"
    assert page.status.value == "" and len(page.hits) == 10


@pytest.fixture(scope="module")
def run(data, clip, tmp_path_factory):
    """A run of two epochs on ten scenes, random weights throughout."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aevlp.eyes.load_clip", lambda *_, **__: clip)
        settings = recipe("glyphs", "aevlp", **(SMALL | {"epochs": 2}))
        train.fit(data, "aevlp", settings, 0, folder, bank=False, progress=False)
    return folder


def test_a_run_adds_history_and_probabilities(data, run, calls):
    state = Explorer(data, recipe("glyphs", "aevlp", **SMALL), run=run)
    past = state.history(3)
    assert past.shape == (2, len(data.class_names))
    for epoch in (1, 2):
        assert (past[epoch - 1] == state.look(3, epoch).pseudo).all(), "the run's labels are the explorer's"
    assert state.history(13) is None
    probs, stored = state.probabilities(13), np.load(run / "predictions.npz")
    assert probs == pytest.approx(stored["probs"][list(stored["ids"]).index(13)], abs=1e-5)
    page = Explore(state)
    assert "of 2" in page.epochs.value and "probability of the model" in page.opinion.value
    page.filter.value = "disagreement between epochs"
    page.split.value = "test"
    assert "not in the training split" in page.epochs.value or page.status.value


def test_a_run_of_other_data_is_refused(data, run, calls):
    fewer = replace(data, splits={"train": np.arange(9), "test": np.arange(12, 16)})
    with pytest.raises(AevlpError, match="open the run with its own data set"):
        Explorer(fewer, recipe("glyphs", "aevlp", **SMALL), run=run).history(3)


def test_keys_and_buttons(state):
    page = Explore(state)
    press(page, "n")
    assert (state.index, page.gallery.current, page.jump.value) == (1, 1, 2)
    press(page, "ArrowLeft")
    press(page, "p")
    assert state.id == 9, "previous of the first is the last"
    boxes = page.stage.boxes
    press(page, "d")
    assert state.epoch == 2 and page.stage.boxes != boxes
    press(page, "ArrowDown")
    assert state.selected == 0 and "patch 1" in page.patch_line.value
    press(page, "Escape")
    assert state.selected is None
    page.gallery._msg_callbacks(page.gallery, {"chosen": 2}, [])
    assert state.index == 2
    page.jump.value = 6
    assert state.index == 5 and page.stage.alt == "05.png"
    assert set(KEYS) == set(page.stage.shortcuts)


def test_the_browser_rounding_a_value_changes_nothing(data, calls):
    page = Explore(Explorer(data, recipe("glyphs", "aevlp", **(SMALL | {"global_threshold": 0.2033}))))
    page.sliders["global_threshold"].value = 0.205
    assert page.state.recipe.global_threshold == 0.2033
    page.sliders["global_threshold"].value = 0.21
    assert page.state.recipe.global_threshold == 0.21
    assert page.sliders["temperature"].value == 0.05


def test_every_control_says_what_it_is(state):
    page = Explore(state)
    for name in SLIDERS:
        assert "section 5" in page.sliders[name].tooltip
    for control in (page.split, page.filter, page.only, page.compare, page.previous, page.next, page.draw):
        assert control.tooltip


def test_reset_and_compare(state):
    page = Explore(state)
    page.pin.click()
    assert "pinned settings" in page.labels.value
    page.sliders["global_threshold"].value = 1.0
    assert page.state.recipe.global_threshold == 1
    pinned = state.other("pinned settings", state.id, page.pinned)
    assert (pinned == 1).sum() > (state.look().pseudo == 1).sum()
    page.reset.click()
    assert page.state.recipe == state.start
    for name in OTHERS:
        page.compare.value = name
        assert page.status.value == "" and (name == "nothing" or name in page.labels.value)
    page.split.value = "test"
    page.compare.value = "vlpl"
    assert "training images only" in page.status.value


def test_fixed_damp_beside_damp_is_the_first_draw(state):
    state.epoch = 4
    assert (state.other("fixed-damp", 2) == state.look(2, epoch=1).pseudo).all()


def test_exports(state, tmp_path):
    page = Explore(state, tmp_path)
    page.sliders["top_k"].value = 2
    page.save_params.click()
    page.save_picture.click()
    kept = yaml.safe_load((tmp_path / "glyphs-parameters.yaml").read_text())
    assert kept["overrides"]["top_k"] == 2 and set(kept["overrides"]) == set(SLIDERS)
    assert runs.run_params(**kept)["recipe"]["top_k"] == 2
    picture = decode(tmp_path / "00-draw1.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 900 and len(np.unique(picture)) > 50


def test_class_names_are_text_not_html(data, calls):
    names = ("<script>alert(1)</script>", *data.class_names[1:])
    page = Explore(Explorer(replace(data, class_names=names), recipe("glyphs", "aevlp", **(SMALL | {"top_k": 20}))))
    page.sliders["global_threshold"].value = 0.0
    assert "&lt;script&gt;" in page.labels.value and "<script>" not in page.labels.value


def test_an_empty_split_is_said(state, data):
    with pytest.raises(AevlpError, match="'val' is empty"):
        Explorer(replace(data, splits={"train": np.arange(10), "val": np.arange(0)}), state.recipe, split="val")


def test_verdicts_against_the_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        pseudo, observed, truth = rng.integers(-1, 2, 6), rng.integers(0, 2, 6), rng.integers(0, 2, 6)
        found = verdicts(pseudo, observed, truth)
        assert found.count("right") == ((pseudo == 1) & (truth == 1) & (observed == 0)).sum()
        assert found.count("wrong") == ((pseudo == 1) & (truth == 0) & (observed == 0)).sum()
        missed = (pseudo != 1) & (truth == 1) & (observed == 0)
        assert sum(v.startswith("missed") for v in found) == missed.sum()


def test_the_explorer_opens_on_a_folder_with_a_csv(data, calls, tmp_path):
    root = os.path.dirname(data.paths[0])
    table = tmp_path / "labels.csv"
    rows = [f"{i:02d}.png,{data.class_names[data.observed[i].argmax()]}" for i in range(16)]
    table.write_text("\n".join(["image,label", *rows]) + "\n")
    own = SMALL | {"clip": glyphs.CLIP_NAME}
    page = explore(root=root, csv=str(table), overrides=own)
    assert page.state.parameters()["csv"] == str(table) and page.state.data.name == "csv"
    assert set(page.filter.options) == set(FILTERS)
