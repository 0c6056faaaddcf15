"""The review: every decision is kept, whatever dies."""

import csv
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny

from aevlp import datasets, glyphs
from aevlp.data import AevlpError
from aevlp.review import review
from aevlp.reviewed import Review

SMALL = {"clip": glyphs.CLIP_NAME, "clip_weights": "", "grid": 2, "temperature": 0.05, "global_threshold": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.scenes(tmp_path_factory.mktemp("scenes"))


def press(page, key):
    """What the browser sends for a key."""
    page.stage._msg_callbacks(page.stage, {"key": key}, [])


@pytest.fixture(autouse=True)
def banks(tmp_path_factory, monkeypatch):
    """Banks of the tests' own."""
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture
def page(data, tmp_path):
    return review(data, overrides=SMALL, out=tmp_path / "reviewed.csv")


def lines(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_every_decision_is_saved_and_the_next_open_picture_shows(page, data, tmp_path):
    path, names = tmp_path / "reviewed.csv", page.names
    assert not path.exists() and page.name == names[0] and page.labels[page.given].all()
    press(page, "Enter")
    assert len(lines(path)) == 2 and page.name == names[1]
    press(page, "2")
    assert len(lines(path)) == 3 and page.name == names[1]
    kept = page.labels.copy()
    again = review(data, overrides=SMALL, out=path)
    assert again.names == names and again.name == names[2] and (again.notes.rows[names[1]] == kept).all()
    press(again, "ArrowLeft")
    assert (again.labels == kept).all() and "reviewed" in again.title.value
    header, *rows = lines(path)
    assert header == ["image", "split", *data.class_names] and [r[:2] for r in rows] == [
        [n, "train"] for n in sorted(names[:2])
    ]


def test_undo(page, tmp_path):
    path, first = tmp_path / "reviewed.csv", page.names[0]
    proposal = page.labels.copy()
    press(page, "1")
    press(page, "3")
    third = page.labels.copy()
    press(page, "Enter")
    press(page, "u")
    assert page.name == first and (page.labels == third).all()
    for _ in range(3):
        press(page, "u")
    assert (page.labels == proposal).all() and len(lines(path)) == 1


def test_undo_goes_back_to_the_split_it_was_in(page, tmp_path):
    press(page, "Enter")
    page.split.value = "test"
    press(page, "u")
    assert page.split.value == "train" and page.notes.rows == {} and len(lines(tmp_path / "reviewed.csv")) == 1


def test_a_class_that_is_not_proposed_can_be_added(page, data):
    name = next(n for c, n in enumerate(data.class_names) if c not in page.candidates)
    page.add.value = name
    assert page.notes.rows[page.name][data.class_names.index(name)] == 1 and page.add.value == ""


def all_off(page):
    for n in range(int(page.labels.sum())):
        press(page, str(n + 1))


def test_a_training_picture_without_any_class_is_refused_and_a_test_picture_is_not(page, tmp_path):
    name = page.name
    all_off(page)
    assert "at least one" in page.status.value and (name not in page.notes.rows or page.notes.rows[name].any())
    page.split.value = "test"
    name = page.name
    all_off(page)
    press(page, "Enter")
    assert not page.notes.rows[name].any() and page.name != name


def test_two_pages_on_one_file_do_not_overwrite_each_other(page, data, tmp_path):
    other = review(data, overrides=SMALL, out=tmp_path / "reviewed.csv")
    press(page, "Enter")
    press(other, "Enter")
    assert "something else changed the file" in other.status.value
    assert len(lines(tmp_path / "reviewed.csv")) == 2


def test_reviewed_labels_can_be_trained_on(page, data, tmp_path):
    for split in ("train", "val", "test"):
        page.split.value = split
        for _ in page.names:
            press(page, "Enter")
        assert page.unreviewed(0) is None and "pictures reviewed" in page.summary.value
    root = os.path.dirname(data.paths[0])
    full = datasets.load("csv", root=root, csv=tmp_path / "reviewed.csv")
    assert full.class_names == data.class_names and len(full) == 16
    assert {k: v.tolist() for k, v in full.splits.items()} == {k: v.tolist() for k, v in data.splits.items()}
    assert (full.truth == np.stack([page.notes.rows[f"{i:02d}.png"] for i in range(16)])).all()


def test_the_order_is_free_until_the_first_decision(page, tmp_path):
    before = page.names
    page.order.value = "random"
    assert page.plan["order"] == "random" and page.names != before and sorted(page.names) == sorted(before)
    press(page, "s")
    assert page.order.disabled and page.plan["skipped"] == page.names[:1]
    assert json.loads((tmp_path / "reviewed.plan.json").read_text())["train"] == page.plan


def test_a_skipped_picture_is_left_out_and_can_be_decided_later(page, data, tmp_path):
    name = page.name
    press(page, "s")
    assert page.name == page.names[1]
    press(page, "ArrowLeft")
    assert "skipped" in page.title.value
    press(page, "Enter")
    assert page.plan["skipped"] == [] and name in page.notes.rows
    again = review(data, overrides=SMALL, out=tmp_path / "reviewed.csv")
    assert again.plan["skipped"] == [] and again.name == page.names[1]


def test_the_uncertain_come_first(page, data):
    """By the plain formula: entropy of DAMP's scores and the share of a class, each with mean 1."""
    final = np.stack([page.opinion(i)[0] for i in range(10)]).astype(float).clip(1e-6, 1 - 1e-6)
    entropy = np.array([-sum(p * np.log(p) + (1 - p) * np.log(1 - p) for p in row) for row in final])
    rare = np.array([max(row[c] / final[:, c].sum() for c in range(len(row))) for row in final])
    value = entropy / entropy.mean() + rare / rare.mean()
    assert page.names == [f"{i:02d}.png" for i in np.argsort(-value, kind="stable")]


def test_patches_and_zoom_come_on_demand_and_go_with_the_picture(page):
    assert page.stage.boxes == [] and not page.glass.on
    press(page, "v")
    press(page, "z")
    assert len(page.stage.boxes) == len(page.stage.tips) == 4 and page.glass.on
    press(page, "ArrowRight")
    assert page.stage.boxes == [] and not page.glass.on
    press(page, "v")
    press(page, "v")
    assert page.stage.boxes == []


def test_the_summary_counts_what_changed(page, data):
    """A reviewer who takes the truth; counted again class by class."""
    added = wrong = 0
    for _ in range(4):
        id = page.state.id
        added += int(((data.truth[id] == 1) & (data.observed[id] != 1)).sum())
        wrong += int(((page.opinion(id)[1] == 1) & (data.truth[id] == 0) & (data.observed[id] == 0)).sum())
        page.labels = data.truth[id].copy()
        press(page, "Enter")
    page.act("summary")
    total = page.summary.value.rpartition("<b>all</b></td>")[2]
    counts = [int(n) for n in re.findall(r"<b>(\d+)</b>", total)]
    assert counts[1] == added and counts[2] == 0 and counts[4] == wrong and "4 pictures reviewed" in page.summary.value


def test_pictures_asked_for_come_first(data, tmp_path):
    page = review(data, overrides=SMALL, out=tmp_path / "r.csv", split="test", first=["15.png", "13.png"])
    assert page.names[:2] == ["15.png", "13.png"] and sorted(page.names) == ["12.png", "13.png", "14.png", "15.png"]


def test_a_file_of_an_earlier_version_is_gone_on_with(data, tmp_path):
    old = tmp_path / "reviewed.csv"
    row = ["03.png", "1", *"0" * (len(data.class_names) - 1)]
    old.write_text("\n".join([",".join(["image", *data.class_names]), ",".join(row)]) + "\n")
    page = review(data, overrides=SMALL, out=old)
    assert "1 of 10" in page.status.value and page.order.disabled
    press(page, "Enter")
    assert [r[1] for r in lines(old)[1:]] == ["train", "train"] and not page.notes.plan_path.exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("image,cat\na.png,1\n", "line 1"),
        ("", "line 1"),
        ("image,cat,dog\na.png,1\n", "line 2"),
        ("image,cat,dog\na.png,1,2\n", "line 2"),
        ("image,cat,dog\na.png,1,0\nc.png,0,1\n", "line 3.*'c.png' is not a picture"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, text, said):
    path = tmp_path / "reviewed.csv"
    path.write_text(text)
    with pytest.raises(AevlpError, match=said):
        Review(path, ["a.png", "b.png"], ["cat", "dog"])
    assert path.read_text() == text


def test_reserved_class_names_are_refused(tmp_path):
    with pytest.raises(AevlpError, match="rename the class"):
        Review(tmp_path / "r.csv", ["a.png"], ["cat", "Label"])


REVIEWER = """
import sys, numpy as np
from aevlp.reviewed import Review
names, rng = [f"{i:03d}.png" for i in range(30)], np.random.default_rng(0)
notes = Review(sys.argv[1], names, ["cat", "dog, wet", 'a "b"'])
while True:
    labels = rng.integers(0, 2, 3)
    labels[0] = 1
    notes.decide(names[rng.integers(30)], labels)
    print(len(notes.rows), flush=True)
"""


def test_kill_9_loses_nothing(tmp_path):
    path, counts = tmp_path / "reviewed.csv", []
    child = subprocess.Popen([sys.executable, "-c", REVIEWER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        counts = [int(child.stdout.readline()) for _ in range(12)]
    finally:
        os.kill(child.pid, signal.SIGKILL)
        counts += [int(line) for line in child.stdout.read().split()]
        child.wait()
    kept = Review(path, [f"{i:03d}.png" for i in range(30)], ["cat", "dog, wet", 'a "b"'])
    assert counts[-1] <= len(kept.rows) <= counts[-1] + 1 and len(kept.rows) > 5


def test_the_review_opens_on_a_folder_with_a_csv(data, tmp_path):
    root = os.path.dirname(data.paths[0])
    table = tmp_path / "labels.csv"
    rows = [f"{i:02d}.png,{data.class_names[data.observed[i].argmax()]}" for i in range(16)]
    table.write_text("\n".join(["image,label", *rows]) + "\n")
    notes = review(root=root, csv=str(table), overrides=SMALL, out=tmp_path / "r.csv").notes
    assert all(os.path.exists(os.path.join(root, name)) for name in notes.names)
