"""The explorer: what it shows is what training sees, and nothing is slow on a slider."""

import asyncio
import os
import time
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from aevlp import glyphs, runs, train
from aevlp.controls import KEYS, OTHERS, TABS
from aevlp.data import AevlpError, decode
from aevlp.draw import verdicts
from aevlp.explore import Explore, explore
from aevlp.labelers import Batch, build_labeler
from aevlp.recipes import recipe
from aevlp.state import SLIDERS, Explorer
from aevlp.table import open_table
from aevlp.vlm import load_clip

SMALL = {"backbone_weights": "none", "grid": 2, "temperature": 0.05, "global_threshold": 0.2}
SMALL |= {"epochs": 1, "batch_size": 8, "workers": 0, "local_threshold": 0.2, "negative_ratio": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def clip():
    """The small CLIP, loaded once for all tests."""
    return load_clip(glyphs.CLIP_NAME)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Banks, tables and runs of a test are its own."""
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("aevlp.table.home", lambda: tmp_path)
    monkeypatch.setattr("aevlp.bank.home", lambda: tmp_path)


@pytest.fixture
def calls(clip, monkeypatch):
    """How many views went through CLIP, call by call."""
    seen, encode = [], clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr("aevlp.state.load_clip", lambda *_, **__: clip)
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
    state.epoch = 0
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
        heat, labels, start = page.heat.value, page.labels.value, time.process_time()
        page.sliders[name].value = value if getattr(state.recipe, name) != value else type(value)(value / 2)
        times.append(time.process_time() - start)
        assert page.heat.value == heat
        assert name != "global_threshold" or page.labels.value != labels
    assert len(calls) == before, "CLIP was asked"
    assert sorted(times)[len(times) // 2] < 0.2, times


def test_the_list_is_what_the_selectors_say(state, data):
    page = Explore(state)
    pseudo = {int(i): state.look(int(i), 0).pseudo for i in data.splits["train"]}
    missed, wrong = set(), set()
    for i, row in pseudo.items():
        for c in range(len(data.class_names)):
            if data.observed[i, c] != 1 and data.truth[i, c] == 1 and row[c] != 1:
                missed.add(i)
            if data.truth[i, c] == 0 and row[c] == 1:
                wrong.add(i)
    page.filter.value = "false negative"
    assert set(state.ids) == missed and missed
    page.filter.value = "false positive"
    assert set(state.ids) == wrong and wrong
    name = data.class_names[int(np.flatnonzero(data.truth[:10].sum(0))[0])]
    page.filter.value = "has the class"
    page.only.value = name
    assert list(state.ids) == [i for i in range(10) if data.truth[i, data.class_names.index(name)]]
    assert name in page.labels.value and "class=kept" in page.labels.value, "the class one filters by shows"
    page.clear.click()
    page.sort.value = "DAMP score"
    best = [state.look(int(i), 0).scores.final.max().item() for i in state.ids]
    assert sorted(state.ids) == list(range(10)) and best == sorted(best)
    page.falling.value = True
    assert [state.look(int(i), 0).scores.final.max().item() for i in state.ids] == best[::-1]
    page.search.value = "03.PNG"
    assert list(state.ids) == [3] and "of <b>1</b>" in page.found.value
    page.search.value = "nothing is called so"
    assert "no picture of train" in page.status.value and "of <b>0</b>" in page.found.value


def test_moved_sliders_are_said_until_all_images_are_judged_so(state):
    page = Explore(state)
    page.filter.value = "says yes"
    before = list(state.ids)
    assert "g 2" in page.told.value and "moved" not in page.told.value and page.apply.disabled
    page.sliders["global_threshold"].value = 0.95
    assert "the sliders moved (global_threshold)" in page.told.value and list(state.ids) == before
    page.apply.click()
    assert "moved" not in page.told.value and "0.95" in page.told.value
    assert [int(i) for i in state.ids] == [i for i in range(10) if page.known.says("damp")[i].any()]
    page.reset.click()
    assert "0.2" in page.told.value and "moved" not in page.told.value


def test_the_table_is_the_picture(state):
    page = Explore(state)
    for i in range(10):
        look = state.look(i)
        assert page.known.scores["damp"][i] == pytest.approx(look.scores.final[0].numpy(), abs=2e-3)
        assert page.known.scores["clip"][i] == pytest.approx(look.probs[0].numpy(), abs=2e-3)


def test_a_picture_of_the_bank_needs_no_clip(state, calls):
    page = Explore(state)
    before = len(calls)
    for _ in range(3):
        press(page, "n")
    assert len(calls) == before and "evaluation views" in page.place.value
    press(page, "d")
    assert len(calls) == before + 1 and "draw 1" in page.place.value


def test_without_truth(data, calls):
    page = Explore(Explorer(unknown(data), recipe("glyphs", "aevlp", **SMALL)))
    assert "unknown" in page.labels.value
    assert "false positive" not in page.filter.options and "confused" not in page.matrix.options
    page.sort.value = "uncertainty"
    assert page.status.value == "" and len(page.rows) == 10
    for n in range(len(TABS)):
        page.tabs.selected_index = n
        assert page.status.value == ""
    assert "the given labels" in page.error_line.value


def test_cells_rows_and_lassos_open_their_pictures(state, data):
    page = Explore(state)
    page.tabs.selected_index = TABS.index("Matrix")
    page.matrix.value = "known together"
    a, b = np.argwhere(np.triu(page.known.matrix("known together", "damp"), 1))[0]
    page.grid._msg_callbacks(page.grid, {"pick": f"{a},{b}"}, [])
    assert list(state.ids) == [i for i in range(10) if data.truth[i, a] and data.truth[i, b]]
    assert page.tabs.selected_index == TABS.index("Find") and "known together" in page.found.value
    page.filter.value = "says yes"
    assert "known together" not in page.found.value, "a cell counts until a selector moves"
    page.clear.click()
    page.tabs.selected_index = TABS.index("Map")
    assert len(page.map.points) == 10 * 2 * 4 and len(page.map.groups) == 10
    page.map._msg_callbacks(page.map, {"lasso": [2, 5]}, [])
    assert list(state.ids) == [2, 5] and "inside the lasso" in page.found.value
    page.map._msg_callbacks(page.map, {"chosen": 7}, [])
    assert state.id == 7 and page.tabs.selected_index == 0
    page.clear.click()
    page.tabs.selected_index = TABS.index("Classes")
    page.classes._msg_callbacks(page.classes, {"pick": "sun"}, [])
    assert "sun" in page.one_class.value and "least believed" in page.one_class.value
    page.one_class._msg_callbacks(page.one_class, {"pick": "row:4"}, [])
    assert state.id == 4


def test_suspects_go_to_the_review_first(state, data, tmp_path):
    page = Explore(state, tmp_path)
    page.tabs.selected_index = TABS.index("Label errors")
    first = [f"{i:02d}.png" for i in dict.fromkeys(page.suspects.row)]
    assert first and "probably" in page.errors.value and ">row:" not in page.errors.value
    page.hand.click()
    (review,) = page.review_place.children
    assert review.names[: len(first)] == first
    page.errors._msg_callbacks(page.errors, {"pick": f"row:{page.suspects.row.iloc[0]}"}, [])
    assert state.id == page.suspects.row.iloc[0]


def test_thumbnails_come_when_asked_for(state, data):
    page = Explore(state)
    sent = []
    page.gallery.send = lambda message, buffers: sent.append((message, buffers))
    page.gallery._msg_callbacks(page.gallery, {"want": [0, 3, 99], "turn": page.gallery.turn}, [])
    ((message, buffers),) = sent
    assert [item[0] for item in message["items"]] == [0, 3] and [item[1] for item in message["items"]] == [
        "00.png",
        "03.png",
    ]
    assert all(Image.open(BytesIO(b)).size[0] <= 128 for b in buffers)
    page.gallery._msg_callbacks(page.gallery, {"want": [1], "turn": page.gallery.turn - 1}, [])
    assert sent[1][0]["items"] == [], "of an earlier list"
    page.gallery._msg_callbacks(page.gallery, {"chosen": 3}, [])
    assert state.id == 3


def test_a_table_in_the_background(data, calls):
    async def opened():
        page = Explore(Explorer(data, recipe("glyphs", "aevlp", **SMALL)))
        assert page.known is None and page.stage.src, "the picture does not wait for the table"
        assert page.filter.options == ("all",)
        page.sort.value, page.tabs.selected_index = "position", TABS.index("Map")
        assert "needs a look" in page.status.value
        press(page, "n")
        here = page.state.id
        await page._task
        assert page.known is not None and page.state.id == here, "the place is kept"
        assert "false positive" in page.filter.options and page.waiting.layout.display == "none"

    asyncio.run(opened())


def test_cancelling_the_table(data, calls, monkeypatch):
    def endless(*_, tell=None, compute=True):
        while compute:
            tell(0, 10, "views through CLIP")
            time.sleep(0.01)

    async def cancelled():
        monkeypatch.setattr("aevlp.state.open_table", endless)
        page = Explore(Explorer(data, recipe("glyphs", "aevlp", **SMALL)))
        page.cancel.click()
        await page._task
        assert page.known is None and page.compute.layout.display == "" and "need one look" in page.status.value
        monkeypatch.setattr("aevlp.state.open_table", open_table)
        page.compute.click()
        await page._task
        assert page.known is not None

    asyncio.run(cancelled())


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
    page.tabs.selected_index = TABS.index("Model")
    assert "of 2" in page.epochs.value and "probability, threshold" in page.opinion.value
    assert "training loss" in page.curves.value and page.run.value == run
    page.filter.value = "moved between epochs"
    moved = [i for i in range(10) if np.ptp(np.int8(state.labels_of_run()[:, i] == 1), axis=0).any()]
    assert list(state.ids) == moved or "no picture" in page.status.value and not moved
    page.split.value = "test"
    assert "not in the training split" in page.epochs.value and "moved between epochs" not in page.filter.options
    page.judge.value = "model"
    assert page.known.scores["model"] == pytest.approx(stored["probs"], abs=1e-5)
    page.run.value = None
    assert "Choose a run" in page.opinion.value and page.known.judges == ["damp", "clip"]


def test_a_run_of_other_data_is_refused(data, run, calls):
    fewer = replace(data, splits={"train": np.arange(9), "test": np.arange(12, 16)})
    with pytest.raises(AevlpError, match="open the run with its own data set"):
        Explorer(fewer, recipe("glyphs", "aevlp", **SMALL), run=run).history(3)


def test_keys_and_buttons(state):
    page = Explore(state)
    press(page, "n")
    assert (state.index, page.gallery.current, page.strip.current, page.jump.value) == (1, 1, 1, 2)
    press(page, "ArrowLeft")
    press(page, "p")
    assert state.id == 9, "previous of the first is the last"
    boxes = page.stage.boxes
    press(page, "d")
    assert state.epoch == 1 and page.stage.boxes != boxes
    press(page, "ArrowDown")
    assert state.selected == 0 and "patch 1" in page.patch_line.value
    press(page, "Escape")
    assert state.selected is None
    page.strip._msg_callbacks(page.strip, {"chosen": 2}, [])
    assert state.index == 2
    page.jump.value = 6
    assert state.index == 5 and page.stage.alt == "05.png"
    assert set(KEYS) == set(page.stage.shortcuts)
    turn = page.stage.turn
    page.stage._msg_callbacks(page.stage, {"key": "ArrowRight", "times": 7}, [])
    assert state.index == 2 and page.stage.turn == turn + 1, "several presses are one move, and answered"


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
    controls = "run split judge filter only sort falling search clear compare previous next jump draw apply"
    for control in (getattr(page, name) for name in controls.split()):
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
    assert "training pictures only" in page.status.value


def test_fixed_damp_beside_damp_is_the_first_draw(state):
    state.epoch = 4
    assert (state.other("fixed-damp", 2) == state.look(2, epoch=1).pseudo).all()


def test_exports(state, tmp_path):
    page = Explore(state, tmp_path)
    page.sliders["top_k"].value = 2
    page.save_params.click()
    page.save_picture.click()
    page.save_list.click()
    listed = (tmp_path / "glyphs-train-list.csv").read_text().splitlines()
    assert len(listed) == 11 and listed[0].startswith("id,name,score")
    kept = yaml.safe_load((tmp_path / "glyphs-parameters.yaml").read_text())
    assert kept["overrides"]["top_k"] == 2 and set(kept["overrides"]) == set(SLIDERS)
    assert runs.run_params(**kept)["recipe"]["top_k"] == 2
    picture = decode(tmp_path / "00-draw0.png")
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
    assert page.filter.options == ("all", "has the class", "says yes")
