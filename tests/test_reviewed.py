"""Reviewed pictures as truth: samples that measure, numbers against scikit-learn and plain loops, the commands."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score
from tiny import shapes

from aevlp import cli, outcome, reviewed, runs
from aevlp.data import AevlpError
from aevlp.reviewed import Review, bounds, draw, in_percent, names_of, resampled, sample

RNG = np.random.default_rng(0)
NAMES = [f"{i}.png" for i in range(90)]


@pytest.mark.parametrize("order", ["random", "weighted"])
@pytest.mark.parametrize("k", [5, 30, 89, 90])
def test_totals_of_a_sample_are_met_on_average(order, k):
    """The Horvitz-Thompson property, for every length of the sample."""
    value, worth = RNG.gamma(1, size=90), RNG.random(90)
    totals = []
    for seed in range(600):
        plan = draw(NAMES, order, value, seed)
        part = sample(plan, plan["names"][:k])
        assert list(part.names) == plan["names"][:k] and part.order == order
        totals.append(sum(w * worth[int(n[:-4])] for n, w in zip(part.names, part.weights, strict=True)))
    error = np.std(totals) / 600**0.5
    assert abs(np.mean(totals) - worth.sum()) < 4 * error + 1e-9


def test_nothing_counts_more_than_three_times_the_average():
    value = np.r_[np.zeros(80), np.full(10, 100.0)]
    plan = draw(NAMES, "weighted", value)
    weights = dict(zip(plan["names"], plan["weights"], strict=True))
    assert min(weights.values()) == pytest.approx(1 / 3) and np.mean(list(weights.values())) == pytest.approx(1)


def test_the_order_is_the_same_for_a_seed_and_another_for_another():
    one, again, other = (draw(NAMES, "random", seed=s)["names"] for s in (0, 0, 1))
    assert one == again != other and sorted(one) == sorted(NAMES)


def test_bounds_by_hand():
    """What was measured stands first, a hundred draws behind it."""
    draws = np.array([2.0, *range(101)])
    assert bounds(draws) == [2.0, 2.5, 97.5] and bounds(np.array([np.nan, np.nan])) == [None] * 3
    assert bounds(draws, mend=True) == [-46.0, -93.5, 1.5]  # 2 - 48 and so on: draws lie 48 too high
    assert in_percent(np.array([99.0, *np.full(100, 97.0)])) == [100.0] * 3  # mended, and no share is above one
    assert resampled(np.ones(5), draws=3).sum(1).tolist() == [5.0] * 4


def test_what_cannot_be_kept_is_said(tmp_path):
    path = tmp_path / "reviewed.csv"
    two = dict(names=["a.png", "b.png"], class_names=["cat", "dog, wet"], splits={"train": [0], "test": [1]})
    notes = Review(path, **two)
    notes.plan("test", lambda: draw(["b.png"], "random"))
    notes.decide("b.png", [0, 0])  # a test picture may show nothing
    with pytest.raises(AevlpError, match="at least one"):
        notes.decide("a.png", [0, 0])
    path.write_text("image,cat\n")
    with pytest.raises(AevlpError, match="changed"):
        notes.decide("a.png", [1, 0])
    with pytest.raises(AevlpError, match="line 1"):
        Review(path, **two)
    notes.plan_path.write_text('{"test": 1}')
    with pytest.raises(AevlpError, match="drawn"):
        Review(path, **two)


def test_gaps_and_skips():
    plan = draw(NAMES, "random")
    first = plan["names"]
    assert (sample(plan, [first[0], first[2]]).names, sample(plan, [first[0], first[2]]).out_of_turn) == ([first[0]], 1)
    plan["skipped"] = [first[1]]
    part = sample(plan, [first[0], first[2]])
    assert (part.names, part.skipped, part.out_of_turn) == ([first[0], first[2]], 1, 0)
    assert sample(None, NAMES[:3]).order is None
    assert sample(draw(NAMES, "uncertain", RNG.random(90)), NAMES[:3]).order == "uncertain"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs on pictures with one given label each: one as trained, one that is told the truth."""
    from aevlp import train

    folder = tmp_path_factory.mktemp("own")
    data = shapes(folder / "pictures", 60)
    split = {i: name for name, ids in data.splits.items() for i in ids}
    names = [path.rsplit("/", 1)[1] for path in data.paths]
    labels = [data.class_names[c] for c in data.observed.argmax(1)]
    table = pd.DataFrame({"image": names, "split": [split[i] for i in range(len(data))], "label": labels})
    table.to_csv(folder / "labels.csv", index=False)
    small = {"backbone": "glyphnet", "backbone_weights": "none", "image_size": 32, "workers": 0, "epochs": 1}
    params = runs.run_params("csv", "an", 0, folder / "pictures", folder / "labels.csv", overrides=small)
    run = runs.open_folder(params, folder / "runs/plain")
    own = runs.load_data(params)
    train.fit(own, "an", train.Recipe(**params["recipe"]), 0, run, device="cpu", bank=False, progress=False)
    (run / "status.json").write_text(json.dumps({"state": "done"}))
    told = folder / "runs/told"
    shutil.copytree(run, told)
    kept = dict(np.load(told / "predictions.npz"))
    order = [list(data.class_names).index(n) for n in own.class_names]
    truth = data.truth[:, order]
    for prefix, ids in (("", kept["ids"]), ("val_", kept["val_ids"])):
        kept[f"{prefix}probs"] = np.clip(truth[ids] * 0.6 + 0.2, 0, 1).astype(np.float32)
    np.savez_compressed(told / "predictions.npz", **kept)
    return folder, own, truth


@pytest.fixture
def notes(made, tmp_path):
    """Ten pictures of every split, as a reviewer who knows the truth decides; the test ones weighted."""
    folder, data, truth = made
    found = Review(tmp_path / "reviewed.csv", names_of(data), data.class_names, data.splits)
    for split, order in (("train", "random"), ("val", "random"), ("test", "weighted")):
        ids = data.splits[split]
        value = RNG.random(len(ids))
        plan = found.plan(split, lambda i=ids, o=order, v=value: draw([found.names[j] for j in i], o, v))
        for name in plan["names"][:10]:
            found.decide(name, truth[found.names.index(name)])
    return found


def test_the_map_is_scikit_learns_with_the_weights(made, notes):
    folder, data, truth = made
    part = sample(notes.plans["test"], notes.rows)
    ids = [notes.names.index(n) for n in part.names]
    said = outcome.scored(folder / "runs/plain", "test")
    probs = said.probs[[said.names.index(n) for n in part.names]]
    some = [c for c in range(truth.shape[1]) if truth[ids, c].any()]
    every = [average_precision_score(truth[ids, c], probs[:, c], sample_weight=part.weights) for c in some]
    found = reviewed.map_of(folder / "runs/plain", notes, "test")
    assert found[0] == pytest.approx(100 * np.mean(every)) and found.shape == (1001,)
    value, low, high = reviewed.in_percent(found)
    assert 0 <= low <= value <= high <= 100 and low < high
    assert value == pytest.approx(min(2 * found[0] - found[1:].mean(), 100)), "less what few pictures add"
    assert reviewed.map_of(folder / "runs/told", notes, "test")[0] == pytest.approx(100)


def test_the_precision_of_labels_is_a_loop(made, notes):
    folder, data, truth = made
    run = folder / "runs/plain"
    pseudo = RNG.choice([-1, 0, 1], (len(data.splits["train"]), len(data.class_names))).astype(np.int8)
    best = json.loads((run / "metrics.json").read_text())["best_epoch"]
    (run / "pseudo").mkdir(exist_ok=True)
    np.savez_compressed(run / f"pseudo/epoch_{best:02d}.npz", pseudo=pseudo)
    right = said = there = 0
    for name in sample(notes.plans["train"], notes.rows).names:
        i = notes.names.index(name)
        for c in range(len(data.class_names)):
            if data.observed[i, c] == 0:
                marked = pseudo[list(data.splits["train"]).index(i), c] == 1
                on = bool(truth[i, c])
                right, said, there = right + (marked and on), said + int(marked), there + on
    found = reviewed.labels_of(run, notes, data)
    (run / f"pseudo/epoch_{best:02d}.npz").unlink()
    assert found["precision"][0] == pytest.approx(100 * right / said)
    assert found["recall"][0] == pytest.approx(100 * right / there)
    assert found["precision"][1] < found["precision"][0] < found["precision"][2]


def test_thresholds_have_the_highest_f1_where_enough_was_seen(made, notes):
    folder, data, truth = made
    own = pd.Series(0.123, index=list(data.class_names))
    for name in notes.plans["val"]["names"][10:]:
        notes.decide(name, truth[notes.names.index(name)])
    table = reviewed.thresholds(folder / "runs/plain", notes, own)
    said = outcome.scored(folder / "runs/plain", "val")
    ids = data.splits["val"]
    assert (table.positives == truth[ids].sum(0)).all()
    for c, row in enumerate(table.itertuples()):
        if row.positives < reviewed.ENOUGH:
            assert (row.threshold, row.source) == (0.123, "run")
            continue
        mine = f1_score(truth[ids, c], said.probs[:, c] >= row.threshold)
        best = max(f1_score(truth[ids, c], said.probs[:, c] >= t) for t in said.probs[:, c])
        assert row.source == "reviewed" and mine == pytest.approx(best)
    assert (table.source == "reviewed").any()


def test_the_choice_is_paired_and_says_how_sure_it_is(made, notes):
    folder, data, _ = made
    table = reviewed.measure([folder / "runs/plain", folder / "runs/told"], notes, [data, data])
    assert table.run.tolist() == ["told", "plain"] and table.chosen_by[0] == "val"
    assert table.minus_best[0] == 0 and table.minus_best[1] == pytest.approx(table.val[1] - table.val[0])
    assert table.minus_best_low[1] <= table.minus_best[1] <= table.minus_best_high[1] < 0
    assert "told; no other run is within chance" in reviewed.choice(table)


def test_what_the_numbers_are_of_is_said(notes):
    said = " ".join(reviewed.about(notes))
    assert "test: 10 pictures, a weighted random sample of test" in said and "val: 10 pictures, a plain random" in said
    notes.plans["val"] = draw(notes.plans["val"]["names"], "uncertain", np.ones(15))
    del notes.plans["test"]
    said = " ".join(reviewed.about(notes))
    assert "the most uncertain of val, no random sample" in said and "chosen in an unknown way from test" in said


def test_reviewed_pictures_are_all_the_truth_there_is(made, notes):
    folder, data, truth = made
    known = reviewed.with_truth(data, notes)
    rows = [notes.names.index(n) for n in notes.rows]
    assert (known.truth[rows] == truth[rows]).all() and (np.delete(known.truth, rows, 0) == -1).all()
    assert [known.clean(s).sum() for s in ("train", "val", "test")] == [10, 10, 10]
    seen = [i for i in rows if i in set(data.splits["train"])]
    assert (known.observed[seen] == 2 * truth[seen] - 1).all(), "labels to train on"
    assert (np.delete(known.observed, seen, 0) == np.delete(data.observed, seen, 0)).all()
    (said, measured) = known.extra["notes"][-2:]
    assert "10 of 30 train and 10 of 15 val and 10 of 15 test" in said and "results --reviewed" in measured


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_commands(made, notes, capsys, monkeypatch):
    folder, data, _ = made
    monkeypatch.setenv("AEVLP_RUNS", str(folder / "runs"))
    code, out, err = call(capsys, "results", "--reviewed", notes.path)
    assert (code, err) == (0, "") and "val mAP" in out and "Best by the reviewed val pictures: told" in out
    code, out, _ = call(capsys, "results", "--reviewed", notes.path, "--json")
    rows = json.loads(out)
    assert [r["run"] for r in rows] == ["told", "plain"] and rows[0]["val"] == pytest.approx(100)
    code, _, err = call(capsys, "results", "--reviewed", folder / "nothing.csv")
    assert code == 2 and "no such file" in err
    pictures = folder / "pictures/000.png"
    code, out, err = call(capsys, "predict", "plain", pictures, "--reviewed", notes.path)
    assert code == 0 and "000.png" in out, err
    code, _, err = call(capsys, "predict", "plain", pictures, "--reviewed", notes.path, "--threshold", "0.5")
    assert code == 2 and "either" in err


def test_train_takes_a_review_as_labels(made, notes, capsys, monkeypatch, tmp_path):
    folder, data, truth = made
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path / "runs"))
    for i in data.splits["val"]:
        notes.decide(notes.names[i], truth[i])
    small = ["backbone=glyphnet", "backbone_weights=none", "image_size=32", "workers=0", "epochs=2"]
    own = ["--root", folder / "pictures", "--csv", folder / "labels.csv", "--reviewed", notes.path]
    own += [word for given in small for word in ("--set", given)]
    code, out, err = call(capsys, "train", "--method", "an", *own)
    assert code == 0, err
    run = runs.find(out.split()[-1])
    said, kept = json.loads((run / "metrics.json").read_text()), np.load(run / "predictions.npz")
    rows = [i for i, k in enumerate(kept["ids"]) if notes.names[k] in notes.rows]
    known, probs = truth[kept["ids"][rows]], kept["probs"][rows]
    some = known.any(0)
    assert len(rows) == 10 and said["select_by"] == "map" and set(said["per_class_n"].values()) == {10}
    wanted = 100 * average_precision_score(known[:, some], probs[:, some], average="macro")
    assert said["test_map"] == pytest.approx(wanted, abs=1e-3) and said["val_map"] is not None
    key = runs.run_key(runs.read_params(run))
    notes.decide(notes.names[data.splits["val"][0]], 1 - truth[data.splits["val"][0]])
    (tmp_path / "two.yaml").write_text("{name: two, methods: [an], seeds: [0, 1]}")
    code, out, err = call(capsys, "sweep", tmp_path / "two.yaml", *own, "--dry-run", "--json")
    planned = [r["run"] for r in json.loads(out)]
    assert code == 0 and len(planned) == 2 and not any(n.endswith(key) for n in planned), "one decision, another run"
    code, _, err = call(capsys, "train", "--dataset", "glyphs", "--reviewed", notes.path)
    assert code == 2 and "the labels of glyphs are known" in err
    code, _, err = call(capsys, "train", *own, "--reviewed", folder / "nothing.csv")
    assert code == 2 and "no such file" in err


def test_a_file_of_other_data_is_refused(made, notes, tmp_path):
    folder, data, _ = made
    other = tmp_path / "other.csv"
    other.write_text("image,split,cat\n000.png,test,1\n")
    with pytest.raises(AevlpError, match="other.csv, line 1"):
        reviewed.of_runs(other, [folder / "runs/plain"])
    notes.plan_path.write_text("{torn")
    with pytest.raises(AevlpError, match="how the pictures of a review were drawn"):
        reviewed.of_runs(notes.path, [folder / "runs/plain"])
