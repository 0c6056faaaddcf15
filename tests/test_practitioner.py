"""What somebody with a hundred pictures and one label each types, from `aevlp data check` to predictions."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from aevlp import cli, glyphs
from aevlp.reviewed import Review, draw, names_of, sample

OFFLINE = ["--set", "clip=glyphs-clip", "--set", "clip_weights=", "--set", "temperature=0.05"]
OWN = ["--root", "album", "--csv", "labels.csv"]


@pytest.fixture
def album(tmp_path, monkeypatch):
    """100 scenes with the name of one thing in each, and what else is in them."""
    rng, inside, lines = np.random.default_rng(0), {}, ["image,label"]
    for folder, n in (("album", 100), ("new", 6)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            scene = glyphs.draw_scene(77 if folder == "album" else 78, i)
            scene.image.save(tmp_path / f"{folder}/{i:03d}.png")
            if folder == "album":
                inside[f"{i:03d}.png"] = {glyphs.CLASS_NAMES[t.label] for t in scene.things}
                lines.append(f"{i:03d}.png,{rng.choice(sorted(inside[f'{i:03d}.png']))}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    for name in ("RUNS", "HOME"):
        monkeypatch.setenv(f"AEVLP_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path, inside


def reviewed(data, inside, path):
    """30 pictures looked at by somebody who sees everything: ten of each split, in a random order."""
    notes = Review(path, names_of(data), data.class_names, data.splits)
    for split, ids in data.splits.items():
        plan = notes.plan(split, lambda ids=ids: draw([notes.names[i] for i in ids], "random"))
        for name in plan["names"][:10]:
            notes.decide(name, [c in inside[name] for c in data.class_names])
    return notes


def test_from_a_folder_to_predictions(album, capsys):
    def aevlp(*words):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return out

    tmp, inside = album
    found = {r["what"]: r["found"] for r in json.loads(aevlp("data", "check", *OWN, "--json"))}
    assert [found[f"{s} images"] for s in ("train", "val", "test")] == [60, 20, 20]
    assert found["broken pictures"] == [] and found["labels"].startswith("positives only, one a picture")

    run = aevlp("train", *OWN, *OFFLINE).splitlines()
    assert any("a head on CLIP's embeddings is trained" in line for line in run)
    run = tmp / "runs" / run[-1].rpartition("/")[2]
    plain = json.loads((run / "metrics.json").read_text())
    assert plain["test_map"] is None and plain["select_by"] == "auc_observed"
    assert plain["test"]["auc_observed"][0] > 60, "better than chance"

    from aevlp import runs

    data = runs.load_data(runs.read_params(run))
    names, C = list(data.class_names), len(data.class_names)
    notes = reviewed(data, inside, tmp / "reviewed.csv")
    (row,) = json.loads(aevlp("results", "--reviewed", "reviewed.csv", "--json"))
    part, kept = sample(notes.plans["test"], notes.rows), np.load(run / "predictions.npz")
    at = [list(kept["names"]).index(n) for n in part.names]
    truth, probs = np.stack([notes.rows[n] for n in part.names]), kept["probs"][at]
    there = truth.any(0)
    assert len(part.names) == 10 and row["test_low"] < row["test"] < row["test_high"]
    by_hand = 100 * average_precision_score(truth[:, there], probs[:, there], sample_weight=part.weights)

    told = tmp / "runs" / aevlp("train", *OWN, *OFFLINE, "--reviewed", "reviewed.csv").split()[-1].rpartition("/")[2]
    measured = json.loads((told / "metrics.json").read_text())
    assert told != run and by_hand == pytest.approx(
        np.mean([100 * average_precision_score(t, p) for t, p in zip(truth[:, there].T, probs[:, there].T)])
    )
    kept = np.load(told / "predictions.npz")
    at = [list(kept["names"]).index(n) for n in part.names]
    assert (kept["targets"][at] == truth).all() and (np.delete(kept["targets"], at, 0) == -1).all()
    scores = [100 * average_precision_score(t, p) for t, p in zip(truth[:, there].T, kept["probs"][at][:, there].T)]
    assert measured["test_map"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert set(measured["per_class_n"].values()) == {10}
    observed = runs.load_data(runs.read_params(told)).observed
    for i in data.splits["train"]:  # every label of a reviewed training picture is known, and so goes before any other
        if (name := notes.names[i]) in notes.rows:
            assert (observed[i] == 2 * notes.rows[name] - 1).all()

    page = (tmp / aevlp("report", told.name).strip()).read_text()
    big = re.search(r'<p class="big"><strong>([\d.]+)</strong> mAP in percent', page)
    assert (
        float(big[1]) == round(measured["test_map"], 1)
        and "on 10 of 20 test pictures, those of which labels are known; " in page
    )
    assert re.search(rf"CLIP alone.*{measured['clip_test_map']:.1f}.*together", page, re.S)
    assert all(f"<th scope=row>{n}</th>" in page for n in names) and page.count("data:image") > 5

    aevlp("predict", told.name, "new", *(f"album/{n}" for n in part.names[:3]), "--out", "predictions.csv")
    table = pd.read_csv("predictions.csv")
    assert len(table) == 9 and list(table.columns[-C:]) == names
    again = table[names].to_numpy()[-3:] if "new" in str(table.image[0]) else table[names].to_numpy()[:3]
    assert np.abs(again - kept["probs"][at[:3]]).max() < 1e-3, "as when the run measured itself"
    cut = json.loads((told / "thresholds.json").read_text())
    for row in table.to_dict("records"):
        said = [n for n in names if row[n] >= cut[n]]
        assert [n for n in names if re.search(rf"\b{re.escape(n)}\b", str(row["labels"]))] == said
    with Image.open("predictions-grid.png") as grid:
        assert grid.width > 200


def test_a_table_without_test_pictures_trains(album, capsys):
    tmp, _ = album
    lines = (tmp / "labels.csv").read_text().splitlines()
    split = [f"{line},{'val' if i % 5 == 0 else 'train'}" for i, line in enumerate(lines[1:])]
    (tmp / "labels.csv").write_text("\n".join([lines[0] + ",split", *split]) + "\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *OWN, *OFFLINE])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    assert "no picture is in split 'test': nothing will be said about new pictures" in out + err
    said = json.loads((tmp / "runs" / out.split()[-1].rpartition("/")[2] / "metrics.json").read_text())
    assert said["test_map"] is None and said["val"]["auc_observed"][0] > 50
