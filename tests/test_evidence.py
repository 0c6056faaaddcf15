"""What a run says of itself, counted again by hand; what cannot be said is left out; whose folder it is."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from aevlp import evidence, train
from aevlp.data import AevlpError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.shapes(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny.train(folder, "gpr+random", data)
    return folder


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
