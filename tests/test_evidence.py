"""What a run says of itself, counted again by hand; what cannot be said is left out; whose folder it is."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from aevlp import evidence, train
from aevlp.data import AevlpError, LabelledImages, write_json
from aevlp.metrics import map_interval
from aevlp.models import FROZEN

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pseudo_label_numbers_from_the_saved_labels(data, run):
    """Precision and recall of each epoch on missing positives only, counted by hand."""
    history, train_ids = pd.read_csv(run / "history.csv"), data.splits["train"]
    missing = (data.truth[train_ids] == 1) & (data.observed[train_ids] != 1)
    for row in history.itertuples():
        pseudo = np.load(run / "pseudo" / f"epoch_{row.epoch:02d}.npz", allow_pickle=False)["pseudo"]
        guessed = (pseudo == 1) & (data.observed[train_ids] != 1)
        assert pseudo.dtype == np.int8 and guessed.sum() > 10
        for value, count in ((row.precision, guessed.sum()), (row.recall, missing.sum())):
            share = (guessed & missing).sum() / count
            assert min(abs(value - share), abs(value - 100 * share)) < 1e-6
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["average_precision"] == pytest.approx(history.precision.mean())
    assert metrics["accumulated_recall"] == pytest.approx(history.accumulated_recall.iloc[-1])


def test_without_truth_nothing_is_called_map(data, tmp_path):
    """Given labels alone: their AUC, recall and rank, counted here with scikit-learn and scipy."""
    unknown = replace(data, truth=None)
    metrics = tiny.train(tmp_path / "run", "gpr+random", unknown, {"epochs": 4})
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history[list(evidence.QUALITY)].isna().all(axis=None) and history.val_map.isna().all()
    assert metrics["average_precision"] is None and metrics["accumulated_recall"] is None
    assert metrics["test_map"] is metrics["val_map"] is metrics["test"]["map"] is metrics["val"]["map"] is None
    assert set(metrics["per_class"].values()) == {None} and set(metrics["per_class_n"].values()) == {0}
    saved = np.load(tmp_path / "run" / "predictions.npz")
    assert (saved["targets"] == (data.observed[data.splits["test"]] == 1)).all()
    for split, probs in (("test", saved["probs"]), ("val", saved["val_probs"])):
        given, said = data.observed[data.splits[split]] == 1, metrics[split]
        auc = [100 * roc_auc_score(given[:, c], probs[:, c]) for c in range(5)]
        ranks = rankdata(-probs, axis=1)[given]
        assert said["auc_observed"][0] == pytest.approx(np.mean(auc))
        assert said["mean_rank"][0] == pytest.approx(ranks.mean())
        for k in (1, 3, 5):
            assert said[f"recall@{k}"][0] == pytest.approx(100 * (ranks <= k).mean())
        assert all(low <= value <= high for value, low, high in filter(None, said.values()))
        if split == "test":
            assert list(metrics["per_class_auc_observed"].values()) == pytest.approx(auc)
            assert list(metrics["per_class_given"].values()) == given.sum(0).tolist()
            assert metrics["per_class_positives"] == metrics["per_class_given"], "no other positive is known"
    assert metrics["select_by"] == "auc_observed"
    assert metrics["best_epoch"] == history.epoch[history.val_auc_observed.idxmax()]
    assert metrics["val"]["auc_observed"][0] == pytest.approx(history.val_auc_observed.max())


def test_own_classes_without_evidence_are_left_out(data, tmp_path):
    """A class without a positive in the test split has no AP, and its zero is not in the mean; a benchmark keeps it."""
    test, truth = data.splits["test"], data.truth.copy()
    truth[test, 2] = 0
    truth[test[:10], 1] = -1  # ten pictures of which this class is unknown
    observed = data.observed * (truth == 1)
    own = replace(data, truth=truth, observed=observed, own=True)
    metrics = tiny.train(tmp_path / "own", "an", own, {"epochs": 1})
    saved = np.load(tmp_path / "own" / "predictions.npz")
    names, t, p = data.class_names, truth[test], saved["probs"]
    expected = [100 * average_precision_score(t[t[:, c] >= 0, c], p[t[:, c] >= 0, c]) for c in (0, 1, 3, 4)]
    assert metrics["per_class"][names[2]] is None and metrics["per_class_positives"][names[2]] == 0
    assert [metrics["per_class"][names[c]] for c in (0, 1, 3, 4)] == pytest.approx(expected)
    assert metrics["test_map"] == metrics["test"]["map"][0] == pytest.approx(np.mean(expected))
    assert metrics["per_class_n"] == {n: len(test) - 10 * (n == names[1]) for n in names}
    assert metrics["per_class_positives"] == dict(zip(names, (t == 1).sum(0).tolist(), strict=True))
    field = tiny.train(tmp_path / "field", "an", replace(own, own=False), {"epochs": 1})
    assert field["per_class"][names[2]] == 0 and field["test_map"] == pytest.approx(np.sum(expected) / 5)


def test_folders_that_cannot_be_used(data, run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AevlpError, match="cannot be made"):
        tiny.train(tmp_path / "file" / "run", "an", data)
    with pytest.raises(AevlpError, match="lr=0.003, not 0.1"):
        tiny.train(run, "gpr+random", data, {"lr": 0.1})
    (tmp_path / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-10])
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AevlpError, match="not the weights of a run"):
            evidence.load_run(folder)


def test_a_tracker_is_asked_for_by_name(data, run, tmp_path, monkeypatch):
    def events(folder):
        return [p for p in folder.rglob("*tfevents*") if p.stat().st_size]

    assert not events(run)
    tiny.train(tmp_path / "named", "an", data, {"epochs": 1}, tracker="tensorboard")
    assert events(tmp_path / "named")
    monkeypatch.setenv("AEVLP_TRACKER", "tensorbord")
    with pytest.raises(AevlpError, match="'tensorbord' is unknown to Accelerate or not installed"):
        tiny.train(tmp_path / "other", "an", data, {"epochs": 1})
    monkeypatch.delenv("AEVLP_TRACKER")
    plain = tiny.train(tmp_path / "plain", "an", data, {"epochs": 1})
    assert not events(tmp_path / "plain") and plain["test_map"] is not None


def test_the_bar_counts_the_steps_that_are_left(data, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, iterable, desc, total):
            self.desc, self.total, self.n, self.said, self.closed = desc, total, 0, [], False
            bars.append(self)

        def update(self):
            self.n += 1

        def set_postfix_str(self, text):
            self.said.append(text)

        def close(self):
            self.closed = True

    def power_cut(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "progress", Bar)
    given = (data, "an", tiny.small("an"), 0, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train.fit(*given, device="cpu", bank=False, on_epoch=power_cut)
    train.fit(*given, device="cpu", bank=False)
    first, second = bars
    assert (first.desc, first.total, first.n) == ("an on shapes", 3 * 8, 8)  # 60 pictures, 8 a batch
    assert (second.total, second.n) == (2 * 8, 2 * 8) and first.closed and second.closed
    history = pd.read_csv(tmp_path / "run" / "history.csv").val_map
    assert first.said + second.said == [f"validation mAP {value:.1f}" for value in history]


# ---- numbers, by loops


def test_a_number_is_finite_or_none():
    assert [evidence.number(v) for v in (np.float32(0.5), 0, math.nan, math.inf)] == [0.5, 0.0, None, None]
    assert evidence._mean([1.0, None, 4.0]) == 2.5 and evidence._mean([None]) is evidence._mean([]) is None


def split(own=False, known=True, n=40):
    """Five classes: all known, some unknown, without positives, of which nothing is known, of which all is true."""
    rng = np.random.default_rng(0)
    truth = (rng.random((n, 5)) < 0.3).astype(np.int8)
    truth[:7, 1], truth[:, 2], truth[:, 3], truth[:, 4] = -1, 0, -1, 1
    observed = np.where(rng.random((n, 5)) < 0.2, 1, 0).astype(np.int8)
    observed[:, 1], observed[0, 0] = 0, -1
    paths = [f"/{i}.png" for i in range(n)]
    data = LabelledImages("d", paths, "abcde", observed, truth if known else None, {"val": np.arange(n)}, own=own)
    return data, torch.from_numpy(rng.random((n, 5)).astype(np.float32))


def by_class(data, ids, probs):
    """AP and AUC of each class in percent, NaN where nothing is known or given."""
    average, auc = [], []
    for c in range(5):
        truth = np.full(len(ids), -1) if data.truth is None else data.truth[ids, c]
        known, given, p = truth != -1, data.observed[ids, c] == 1, probs[:, c].numpy()
        some = 100 * average_precision_score(truth[known], p[known]) if (truth == 1).any() else None
        average.append((math.nan if data.own else 0.0) if some is None else some)
        average[-1] = average[-1] if known.any() else math.nan
        auc.append(100 * roc_auc_score(given, p) if given.any() else math.nan)
    return np.array(average), np.array(auc)


@pytest.mark.parametrize("own, known", [(False, True), (True, True), (False, False)])
def test_scores_of_every_class(own, known):
    data, probs = split(own, known)
    ids = np.arange(3, 36)
    found, expected = evidence.score(data, ids, probs[ids]), by_class(data, ids, probs[ids])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    said, named = evidence.measured(data, ids, probs[ids])
    average, auc = expected
    if known:
        low, high = said["map"][1:]
        assert said["map"][0] == pytest.approx(np.nanmean(average), rel=1e-5) and low < said["map"][0] < high
        truth = data.truth[ids]
        there = [0, 1, 2, 4]  # of a class of which nothing is known nothing is said: its zero is in no interval either
        assert said["map"][1:] == map_interval(probs[ids][:, there], truth[:, there], math.nan if own else 0.0)[1:]
    else:
        truth = np.full((len(ids), 5), -1)
        assert said["map"] is None
    assert said["auc_observed"][0] == pytest.approx(np.nanmean(auc)) and set(said) == set(evidence.MEASURES)
    given = data.observed[ids] == 1
    for key, values in (("per_class", average), ("per_class_auc_observed", auc)):
        assert list(named[key]) == list("abcde")
        for value, other in zip(named[key].values(), values, strict=True):
            assert value is None if math.isnan(other) else value == pytest.approx(other, rel=1e-5)
    positives = [(truth[:, c] == 1).sum() if (truth[:, c] != -1).any() else given[:, c].sum() for c in range(5)]
    assert named["per_class_positives"] == dict(zip("abcde", positives, strict=True))
    assert named["per_class_n"] == dict(zip("abcde", (truth != -1).sum(0), strict=True))
    assert named["per_class_given"] == dict(zip("abcde", given.sum(0), strict=True))


def test_nothing_is_said_of_an_empty_split():
    data, probs = split()
    said, named = evidence.measured(data, np.array([], int), probs[:0])
    assert set(said.values()) == {None} and list(named.values()) == [{}] * 5


# ---- weights and their header

HEADER = {"method": "an", "recipe": {}, "class_names": ["a"], "epoch": 3}


@pytest.mark.parametrize(
    "change",
    [{"method": 1}, {"recipe": []}, {"class_names": "a"}, {"class_names": []}, {"class_names": ["a", 2]}, {"epoch": 4}],
)
def test_a_header_is_that_of_a_run(tmp_path, change):
    weights = {"w": torch.arange(6.0).reshape(2, 3).T.requires_grad_()}
    (tmp_path / "w").write_bytes(evidence.run_weights(weights, HEADER | change))
    assert torch.equal(load_file(tmp_path / "w")["w"], weights["w"])
    if change == {"epoch": 4}:
        assert evidence.run_settings(tmp_path / "w") == HEADER | change
    else:
        with pytest.raises(AevlpError, match=r"not the weights of a run \(ValueError\)"):
            evidence.run_settings(tmp_path / "w")


def test_quality_is_what_is_said_of_pseudo_labels():
    named = ("precision", "recall", "accumulated_precision", "accumulated_recall", "negative_precision")
    assert evidence.QUALITY == named and set(named) < set(evidence.HISTORY)


# ---- files of a run, which is only made up


def made_up(folder, **changes):
    """A run of two epochs of three, as `Evidence` and `Tracking` see it."""
    told = []
    accelerator = SimpleNamespace(
        wait_for_everyone=lambda: told.append("waited"),
        init_trackers=lambda *given: told.append(given),
        log=lambda numbers, step: told.append((numbers, step)),
        trackers=[SimpleNamespace(finish=lambda: told.append("finished"))],
    )
    data, probs = split()
    data = replace(data, splits={"train": np.arange(5), "val": np.arange(5, 20), "test": np.arange(20, 40)})
    empty = dict.fromkeys(evidence.HISTORY)
    rows = [
        {"epoch": 1, "val_map": 60.5, "precision": 50.0, "recall": None, "accumulated_precision": 1.0,
         "accumulated_recall": 11.0, "images_per_second": 10.0},
        {"epoch": 2, "val_map": 40.5, "precision": 70.0, "recall": 9.0, "accumulated_precision": 2.0,
         "accumulated_recall": 12.0, "images_per_second": 30.0},
    ]  # fmt: skip
    at = {"epoch": 3, "step": 2, "best_epoch": 1, "seconds": 5.00049, "history": [empty | row for row in rows]}
    settings = HEADER | {"arithmetic": "portable", "recipe": {"lr": 0.1, "sizes": [1, 2]}, "class_names": list("abcde")}
    return SimpleNamespace(**{
        "run_dir": folder, "main": True, "labelled": True, "accelerator": accelerator, "told": told, "data": data,
        "ids": data.splits, "probabilities": lambda split: probs[data.splits[split]], "at": at, "settings": settings,
        "recipe": SimpleNamespace(backbone="resnet50", with_clip="", epochs=3, batch_size=2), "select_by": "map",
        "device": torch.device("cpu"), "method": SimpleNamespace(name="an", scorer=None), "bank_root": "banks",
        "judged": torch.nn.Linear(2, 1), "order": lambda: np.arange(5), "observed": torch.from_numpy(data.observed),
        "row_of": np.arange(40)[::-1].copy(),
    } | changes)  # fmt: skip


def test_a_folder_is_made_and_what_a_kill_left_is_removed(tmp_path):
    run = made_up(tmp_path / "some/where")
    made = evidence.Evidence(run)
    made.prepare()
    left = [tmp_path / f"some/where/{n}" for n in (".best.safetensors.1.tmp", "pseudo/.epoch_01.npz.1.tmp")]
    stays = [tmp_path / f"some/where/{n}" for n in (".status.json.1.tmp", "best.safetensors")]
    for path in (*left, *stays):
        path.write_bytes(b"")
    made.prepare()
    assert not any(p.exists() for p in left) and all(p.exists() for p in stays) and run.told == ["waited"] * 2
    evidence.Evidence(made_up(tmp_path / "other", main=False)).prepare()
    assert not (tmp_path / "other").exists(), "rank 0 makes it"


@pytest.mark.parametrize("main", [True, False])
def test_a_finished_run_is_not_begun_again(tmp_path, main):
    run = made_up(tmp_path, main=main)
    made = evidence.Evidence(run)
    assert made.finished() is None
    write_json(tmp_path / "metrics.json", {"test_map": 1.5})
    elsewhere = run.settings | {"arithmetic": "native"}
    (tmp_path / "best.safetensors").write_bytes(evidence.run_weights({}, elsewhere))
    assert made.finished() == {"test_map": 1.5}
    (tmp_path / "last/epoch").mkdir(parents=True)
    assert made.finished() == {"test_map": 1.5} and (tmp_path / "last").exists() == (not main)
    (tmp_path / "best.safetensors").write_bytes(evidence.run_weights({}, run.settings | {"method": "role"}))
    with pytest.raises(AevlpError, match="a run with method='role', not 'an'"):
        made.finished()


def test_the_history_is_a_table(tmp_path):
    evidence.Evidence(made_up(tmp_path, main=False)).history()
    assert not list(tmp_path.iterdir())
    evidence.Evidence(made_up(tmp_path)).history()
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == ",".join(evidence.HISTORY) and lines[2] == "2,,,40.5,,70.0,9.0,2.0,12.0,,,30.0"


def test_pseudo_labels_of_every_epoch_and_of_a_head_only_the_best(tmp_path):
    (tmp_path / "pseudo").mkdir()
    labels = torch.tensor([[1, -1]])
    for change in ({"main": False}, {"labelled": False}):
        evidence.Evidence(made_up(tmp_path, **change)).labels(1, labels)
    assert not list((tmp_path / "pseudo").iterdir())
    for epoch in (1, 2):
        evidence.Evidence(made_up(tmp_path)).labels(epoch, labels * epoch)
    assert sorted(p.name for p in (tmp_path / "pseudo").iterdir()) == ["epoch_01.npz", "epoch_02.npz"]
    kept = np.load(tmp_path / "pseudo/epoch_02.npz")["pseudo"]
    assert kept.dtype == np.int8 and kept.tolist() == [[2, -2]]
    run = made_up(tmp_path)
    run.recipe.backbone, run.at["best_epoch"] = FROZEN, 3
    head = evidence.Evidence(run)
    head.labels(4, labels)
    assert len(list((tmp_path / "pseudo").iterdir())) == 2, "no epoch was better than those that are written"
    head.best_labels = labels * 3
    head.labels(4, labels)
    assert [p.name for p in (tmp_path / "pseudo").iterdir()] == ["epoch_03.npz"] and head.best_labels is None
    assert np.load(tmp_path / "pseudo/epoch_03.npz")["pseudo"].tolist() == [[3, -3]]


def test_a_loss_that_is_not_finite_leaves_its_batch(tmp_path):
    run = made_up(tmp_path)
    made, ids = evidence.Evidence(run), np.array([7, 3])
    for step in (5, 6):
        given = torch.ones(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.int8)
        assert made.nonfinite(step, ids, math.nan, *given) == tmp_path / "nonfinite"
        batch = load_file(tmp_path / "nonfinite/batch.safetensors")
        assert batch["ids"].tolist() == [7, 3] and batch["logits"].dtype == torch.float32
        assert batch["observed"].tolist() == run.data.observed[[32, 36]].tolist()
        assert json.loads((tmp_path / "nonfinite/batch.json").read_text()) == {
            "epoch": 3, "step": step, "loss": "nan", "images": ["/7.png", "/3.png"]}  # fmt: skip
    weights = evidence.run_settings(tmp_path / "nonfinite/weights.safetensors")
    assert weights["epoch"] == 3 and weights["method"] == "an"
    made = evidence.Evidence(made_up(tmp_path / "other", main=False))
    assert (
        made.nonfinite(5, ids, math.nan, *given) == tmp_path / "other/nonfinite" and not (tmp_path / "other").exists()
    )


@pytest.mark.parametrize("main", [True, False])
def test_what_a_run_says_at_its_end(tmp_path, monkeypatch, main):
    run, asked = made_up(tmp_path, main=main), []
    run.recipe.with_clip = "clip-damp"
    now = iter([100.0, 102.00071, 0.0])
    monkeypatch.setattr(evidence, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(evidence, "beside_clip", lambda *given: asked.append(given) or ({"fused": 2.5}, {"w": [4.0]}))
    (tmp_path / "last/epoch").mkdir(parents=True)
    metrics = evidence.Evidence(run).end()
    test, per_class = evidence.measured(run.data, run.ids["test"], run.probabilities("test"))
    assert metrics == {
        "test_map": test["map"][0], "val_map": 60.5, "test": test,
        "val": evidence.measured(run.data, run.ids["val"], run.probabilities("val"))[0], "select_by": "map",
        "best_epoch": 1, "epochs_run": 2, "average_precision": 60.0, "average_recall": 9.0,
        "accumulated_precision": 2.0, "accumulated_recall": 12.0, "seconds": 7.001, "images_per_second": 20.0,
        "device": "cpu", "arithmetic": "portable", "threads": 1,
    } | per_class | ({"fused": 2.5} if main else {})  # fmt: skip
    assert run.told == ["waited"] and (tmp_path / "last").exists() == (not main)
    if not main:
        assert [p.name for p in tmp_path.iterdir()] == ["last"]
        return
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    saved = np.load(tmp_path / "predictions.npz")["probs"]
    assert np.array_equal(saved, run.probabilities("test")) and np.load(tmp_path / "clip.npz")["w"].tolist() == [4.0]
    (data, probs, *rest) = asked[0]
    assert data is run.data and np.array_equal(probs["val"], run.probabilities("val"))
    assert rest == ["clip-damp", run.recipe, run.device, "banks"]


@pytest.mark.parametrize("change", [{"with_clip": ""}, {"scorer": "clip"}, {"unknown": True}])
def test_what_cannot_be_said_at_the_end(tmp_path, monkeypatch, change):
    run = made_up(tmp_path)
    run.recipe.with_clip, run.method.scorer = change.get("with_clip", "clip"), change.get("scorer")
    if "unknown" in change:
        run.recipe.with_clip, run.data = "", replace(run.data, truth=None)
    monkeypatch.setattr(evidence, "beside_clip", lambda *given: pytest.fail("CLIP is asked"))
    metrics = evidence.Evidence(run).end()
    assert (metrics["test_map"] is None) == ("unknown" in change) and not (tmp_path / "clip.npz").exists()
    run.at |= {"best_epoch": 0, "history": [dict.fromkeys(evidence.HISTORY) | {"epoch": 0, "val_map": 3.5}]}
    metrics = evidence.Evidence(run).end()  # of a teacher
    assert (metrics["epochs_run"], metrics["val_map"], metrics["average_precision"]) == (0, 3.5, None)


# ---- CLIP beside a finished run


def test_a_finished_run_is_joined_with_clip(data, run, tmp_path, monkeypatch):
    asked, folder = [], tmp_path / "run"
    shutil.copytree(run, folder)
    monkeypatch.setattr(evidence, "beside_clip", lambda *given: asked.append(given) or ({"fused": 2.5}, {"w": [4.0]}))
    before = json.loads((folder / "metrics.json").read_text())
    for given, name, root in (({}, "clip-damp", None), ({"with_clip": "clip", "bank": False}, "clip", False)):
        assert evidence.fuse_run(folder, data, **given) == {"fused": 2.5}
        about, probs, *rest = asked.pop()
        assert about is data and (rest[0], *rest[2:]) == (name, "cpu", root) and rest[1].epochs == 3
        saved = np.load(folder / "predictions.npz")
        assert np.array_equal(probs["test"], saved["probs"]) and np.array_equal(probs["val"], saved["val_probs"])
    assert json.loads((folder / "metrics.json").read_text()) == before | {"fused": 2.5}
    assert np.load(folder / "clip.npz")["w"].tolist() == [4.0]
    monkeypatch.setattr(evidence.outcome, "scored", lambda *given: None)  # of a run that kept none
    evidence.fuse_run(folder, data)
    np.testing.assert_allclose(asked[-1][1]["test"], saved["probs"], atol=1e-6)
    without = replace(data, splits={"train": data.splits["train"], "test": data.splits["test"]})
    evidence.fuse_run(folder, without)
    empty = asked[-1][1]["val"]
    assert empty.shape == (0, 5) and empty.dtype == np.float32
    monkeypatch.undo()
    fewer = replace(data, splits=data.splits | {"test": data.splits["test"][:-1]})
    with pytest.raises(AevlpError, match="30 predictions of the test split, which has 29 pictures today"):
        evidence.fuse_run(folder, fewer)
    renamed = replace(data, class_names=["moon", *data.class_names[1:]])
    with pytest.raises(AevlpError, match="a run of other classes than shapes has today"):
        evidence.fuse_run(folder, renamed)


def test_a_recipe_s_own_teacher_is_asked_and_a_teacher_s_run_is_not_joined(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "beside_clip", lambda *given: asked.append(given[2]) or ({}, {}))
    tiny.train(tmp_path / "run", "an", data, {"epochs": 1, "with_clip": "clip-views"})
    evidence.fuse_run(tmp_path / "run", data)
    assert asked == ["clip-views"] * 2
    tiny.train(tmp_path / "teacher", "clip", data, tiny.CLIP)
    with pytest.raises(AevlpError, match="method clip is CLIP's own opinion"):
        evidence.fuse_run(tmp_path / "teacher", data)
    (tmp_path / "run/best.safetensors").write_bytes(
        evidence.run_weights({}, HEADER | {"recipe": {"dropped": 1}, "version": "0.0.1"})
    )
    with pytest.raises(AevlpError, match="made by aevlp 0.0.1, whose recipes differ"):
        evidence.load_run(tmp_path / "run")


# ---- who hears of a run


def test_trackers_that_are_installed(monkeypatch):
    installed = [SimpleNamespace(value=name) for name in ("tensorboard", "wandb")]
    monkeypatch.setattr(evidence, "get_available_trackers", lambda: installed)
    assert [evidence.tracker_named(name) for name in ("wandb", "", None)] == ["wandb", None, None]
    with pytest.raises(AevlpError, match="'mlflow' .*installed here: tensorboard, wandb$"):
        evidence.tracker_named("mlflow")
    installed.clear()
    with pytest.raises(AevlpError, match="installed here: none$"):
        evidence.tracker_named("wandb")


@pytest.mark.parametrize("shown, main", [(True, True), (True, False), (False, True)])
def test_who_hears_of_steps_epochs_and_the_end(tmp_path, monkeypatch, shown, main):
    run, bar, heard = made_up(tmp_path, main=main), [], []
    run.at |= {"epoch": 2, "step": 1}  # 5 pictures, 2 a batch: the last one joins, 2 steps an epoch, 2 epochs left

    class Bar:
        def __init__(self, *given, **named):
            bar.append((*given, named))

        update = lambda self: bar.append("step")  # noqa: E731
        set_postfix_str = lambda self, text: bar.append(text)  # noqa: E731
        close = lambda self: bar.append("closed")  # noqa: E731

    monkeypatch.setattr(evidence, "progress", Bar)
    with evidence.Tracking(run, shown, heard.append) as tracking:
        tracking.step()
        tracking.epoch({"epoch": 2, "val_map": 60.55, "loss": 0.5, "precision": None})
        tracking.epoch({"epoch": 3, "val_map": None, "loss": 0.25})
    drawn = [(None, "an on d", {"total": 2 * 2 - 1}), "step", "validation mAP 60.5", "", "closed"]
    assert bar == (drawn if shown and main else [])
    rows = [{"epoch": 2, "val_map": 60.55, "loss": 0.5, "precision": None}, {"epoch": 3, "val_map": None, "loss": 0.25}]
    assert heard == ([row | {"epochs": 3} for row in rows] if main else [])
    tracking.close({"best_epoch": 1, "test": {"map": [70.5, 60.0, 80.0]}, "test_map": 70.5})
    tracking.close({"best_epoch": 1, "test": {}, "test_map": None})
    flat = {"method": "an", "epoch": 3, "arithmetic": "portable", "class_names": str(list("abcde")), "lr": 0.1}
    assert run.told == [
        ("aevlp", flat | {"sizes": "[1, 2]"}), ({"val_map": 60.55, "loss": 0.5}, 2), ({"loss": 0.25}, 3),
        ({"test_map": 70.5}, 1), "finished", ({}, 1), "finished"]  # fmt: skip


def test_nobody_has_to_listen(tmp_path):
    run = made_up(tmp_path)
    with evidence.Tracking(run) as tracking:
        tracking.step()
        tracking.epoch({"epoch": 2, "val_map": 1.0})
    assert tracking.bar is None and len(run.told) == 2
