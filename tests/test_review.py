"""The review: every decision is kept, whatever dies."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from aevlp import benchmarks, glyphs
from aevlp.data import AevlpError, LabelledImages
from aevlp.review import Review, review

SMALL = {"clip": glyphs.CLIP_NAME, "clip_weights": "", "grid": 2, "temperature": 0.05, "global_threshold": 0.2}


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


def press(page, key):
    """What the browser sends for a key."""
    page.stage._msg_callbacks(page.stage, {"key": key}, [])


@pytest.fixture
def page(data, tmp_path):
    return review(data, overrides=SMALL, out=tmp_path / "reviewed.csv")


def test_review_saves_every_decision_and_goes_on(page, data, tmp_path):
    path = tmp_path / "reviewed.csv"
    assert not path.exists() and page.labels[data.observed[0] == 1].all()
    press(page, "Enter")
    assert len(path.read_text().splitlines()) == 2 and page.name == "01.png"
    press(page, "2")
    assert len(path.read_text().splitlines()) == 3 and page.name == "01.png"
    kept = page.labels.copy()
    again = review(data, overrides=SMALL, out=path)
    assert again.name == "02.png" and (again.notes.rows["01.png"] == kept).all()
    press(again, "ArrowLeft")
    assert (again.labels == kept).all() and "reviewed" in again.title.value
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", *data.class_names] and [r[0] for r in rows] == ["00.png", "01.png"]


def test_review_undo(page, tmp_path):
    path = tmp_path / "reviewed.csv"
    proposal = page.labels.copy()
    press(page, "1")
    press(page, "3")
    third = page.labels.copy()
    press(page, "Enter")
    press(page, "u")
    assert page.name == "00.png" and (page.labels == third).all()
    press(page, "u")
    press(page, "u")
    press(page, "u")
    assert (page.labels == proposal).all() and len(path.read_text().splitlines()) == 1


def test_review_adds_a_class_that_is_not_proposed(page, data):
    name = next(n for c, n in enumerate(data.class_names) if c not in page.candidates)
    page.add.value = name
    assert page.notes.rows["00.png"][data.class_names.index(name)] == 1 and page.add.value == ""


def test_review_refuses_an_image_without_any_class(page, tmp_path):
    for n in range(int(page.labels.sum())):
        press(page, str(n + 1))
    assert "at least one" in page.status.value
    page.go(0)
    saved = tmp_path / "reviewed.csv"
    assert not saved.exists() or set(saved.read_text().splitlines()[-1].split(",")[1:]) == {"0", "1"}


def test_two_pages_on_one_file_do_not_overwrite_each_other(page, data, tmp_path):
    other = review(data, overrides=SMALL, out=tmp_path / "reviewed.csv")
    press(page, "Enter")
    press(other, "Enter")
    assert "something else changed the file" in other.status.value
    assert len((tmp_path / "reviewed.csv").read_text().splitlines()) == 2


def test_reviewed_labels_can_be_trained_on(page, data, tmp_path):
    for _ in range(10):
        press(page, "Enter")
    assert page.unreviewed(0) is None
    root = os.path.dirname(data.paths[0])
    full = benchmarks.load("csv", root=root, csv=tmp_path / "reviewed.csv")
    assert full.class_names == data.class_names and len(full) == 10
    assert (full.truth == np.stack(list(page.notes.rows.values()))).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("image,cat\na.png,1\n", "line 1"),
        ("", "line 1"),
        ("image,cat,dog\na.png,1\n", "line 2"),
        ("image,cat,dog\na.png,1,2\n", "line 2"),
        ("image,cat,dog\na.png,1,0\nc.png,0,1\n", "line 3.*'c.png' is not an image"),
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
from aevlp.review import Review
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
