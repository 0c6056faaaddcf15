"""The training loop against a plain one, and what it promises: repeatable, loud, complete folders."""

import ast
import functools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score

from aevlp import batches, checkpoints, evidence, train, vlm
from aevlp.data import AevlpError, decode, epoch_order, replacing
from aevlp.labelers import LABELERS
from aevlp.methods import METHODS
from aevlp.models import build_model
from aevlp.views import student_flips, student_inputs


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


def sklearn_map(probs, targets):
    columns = range(targets.shape[1])
    return 100 * np.mean(
        [average_precision_score(targets[:, c], probs[:, c]) if targets[:, c].any() else 0 for c in columns]
    )


def test_a_plain_loop_gives_the_same_losses(data, tmp_path):
    """Assume-negative training as in a tutorial, on the same order and flips (Adam would magnify the last digits)."""
    recipe = tiny.small("an", epochs=2, head_lr=6e-3, optimizer="sgd")
    ours = []
    train.fit(
        data, "an", recipe, 0, tmp_path / "run", device="cpu", progress=False, on_epoch=lambda r: ours.append(r["loss"])
    )
    batches.seed_everything(0)
    model = build_model(recipe, 5)
    groups = [{"params": model.backbone.parameters(), "lr": 3e-3}, {"params": model.head.parameters(), "lr": 6e-3}]
    optimizer, losses = torch.optim.SGD(groups, momentum=0.9), []
    for epoch in (1, 2):
        model.train()
        total, order = 0.0, epoch_order(data.splits["train"], 0, epoch)
        for ids in np.split(order, range(8, len(order), 8)):
            images = [torch.from_numpy(decode(data.paths[i])).permute(2, 0, 1) for i in ids]
            flip = student_flips(torch.from_numpy(ids), 0, epoch)
            x = student_inputs(images, 32, model.mean, model.std, "cpu", flip)
            targets = torch.from_numpy((data.observed[ids] == 1).astype(np.float32))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(ids)
        losses.append(total / len(order))
    np.testing.assert_allclose(ours, losses, rtol=1e-5)


@pytest.mark.parametrize("how", ["again", "workers", "not kept in memory"])
def test_same_numbers_to_the_last_digit(data, run, tmp_path, monkeypatch, how):
    if how == "not kept in memory":
        monkeypatch.setattr(batches, "Pictures", functools.partial(batches.Pictures, limit=0))
    overrides = {"workers": 2} if how == "workers" else {}
    tiny.train(tmp_path / "again", "gpr+random", data, overrides)
    (*ours, weights), (*first, first_weights) = tiny.result(tmp_path / "again"), tiny.result(run)
    assert ours == first
    if how == "again":  # elsewhere the recipe in the header differs
        assert weights == first_weights


def test_another_seed_gives_other_numbers(data, run, tmp_path):
    train.fit(
        data, "gpr+random", tiny.small("gpr+random"), 1, tmp_path / "run", device="cpu", bank=False, progress=False
    )
    assert tiny.result(tmp_path / "run")[2] != tiny.result(run)[2]


def test_the_best_epoch_is_tested(data, run):
    metrics, history = json.loads((run / "metrics.json").read_text()), pd.read_csv(run / "history.csv")
    assert list(history.columns) == list(evidence.HISTORY)
    assert metrics["best_epoch"] == history.epoch[history.val_map.idxmax()]
    assert metrics["val_map"] == pytest.approx(history.val_map.max(), abs=1e-9)
    model, settings, names = evidence.load_run(run)
    assert names == data.class_names and settings["epoch"] == metrics["best_epoch"]
    val = batches.predict(model, data, data.splits["val"], settings["recipe"]).numpy()
    assert sklearn_map(val, data.targets("val")) == pytest.approx(metrics["val_map"], abs=1e-3)
    saved = np.load(run / "predictions.npz", allow_pickle=False)
    assert (saved["ids"] == data.splits["test"]).all() and (saved["targets"] == data.targets("test")).all()
    assert saved["probs"].dtype == np.float32
    assert sklearn_map(saved["probs"], saved["targets"]) == pytest.approx(metrics["test_map"], abs=1e-3)
    assert np.mean(list(metrics["per_class"].values())) == pytest.approx(metrics["test_map"], abs=1e-3)


def test_what_chooses_the_best_epoch(data, tmp_path):
    val = data.splits["val"]

    def known(n):
        return replace(data, truth=np.where(np.isin(np.arange(len(data)), val[:n])[:, None], data.truth, -1))

    chosen = train.chosen_by
    assert chosen("auto", data) == "map" and chosen("auc_observed", data) == "auc_observed"
    assert chosen("auto", known(len(val))) == "map" and chosen("map", known(10)) == "map"
    assert chosen("auto", known(10)) == "auc_observed", "too few reviewed pictures"
    ungiven = replace(data, truth=None, observed=0 * data.observed)
    assert chosen("auto", ungiven) is None and chosen("auto", replace(data, observed=0 * data.observed)) == "map"
    positives = replace(data, truth=np.where(data.truth == 1, 1, -1))
    assert chosen("auto", positives) == "auc_observed", "positives alone are no truth"
    for rule, lacking in (("map", replace(data, truth=None)), ("auc_observed", ungiven)):
        with pytest.raises(AevlpError, match=f"select_by={rule} needs validation pictures with .*select_by=auto"):
            tiny.train(tmp_path / rule, "an", lacking, {"select_by": rule})
        assert not (tmp_path / rule).exists()
    metrics = tiny.train(tmp_path / "run", "gpr+random", data, {"select_by": "auc_observed", "epochs": 4})
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert metrics["select_by"] == "auc_observed" and metrics["test_map"] is not None
    assert metrics["best_epoch"] == history.epoch[history.val_auc_observed.idxmax()]


def test_an_early_stop_follows_the_rule_that_selects(data, tmp_path, monkeypatch):
    told = iter([70.0, 60.0, 90.0])

    def said(data, ids, probs):
        return (np.full(5, np.nan), np.full(5, next(told, 1.0)))

    monkeypatch.setattr(train, "score", said)
    tiny.train(tmp_path / "run", "an", replace(data, truth=None), {"early_stop": "em", "epochs": 3})
    assert pd.read_csv(tmp_path / "run" / "history.csv").val_auc_observed.tolist() == [70.0, 60.0]


def test_without_validation_the_last_epoch_counts(data, tmp_path):
    metrics = tiny.train(tmp_path / "run", "an", replace(data, splits={"train": data.splits["train"]}), {"epochs": 2})
    assert (metrics["best_epoch"], metrics["val_map"], metrics["test_map"], metrics["per_class"]) == (2, None, None, {})


def poison(monkeypatch, epoch, step):
    """The loss of one step is NaN."""

    def build(*args, **kwargs):
        objective, real = build_objective(*args, **kwargs), None
        real, calls = objective.loss, iter(range(10**6))

        def loss(*args):
            value = real(*args)
            return value * math.nan if objective.epoch == epoch and next(calls) == step else value

        objective.loss = loss
        return objective

    build_objective = train.build_objective
    monkeypatch.setattr(train, "build_objective", build)


@pytest.mark.parametrize("window", [1, 16])
def test_a_loss_that_is_not_finite_stops_the_run(data, run, tmp_path, monkeypatch, window):
    order = epoch_order(data.splits["train"], 0, 2)[5 * 8 : 6 * 8]
    build = train.Training.build

    def windowed(self):
        build(self)
        self.window = window  # 16 on a GPU

    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "build", windowed)
        poison(patched, epoch=2, step=5)
        with pytest.raises(AevlpError, match="nan in epoch 2, step 5") as error:
            tiny.train(tmp_path / "run", "gpr+random", data)
    assert all(data.paths[i] in str(error.value) for i in order) and "\n" not in str(error.value)
    left = tmp_path / "run" / "nonfinite"
    assert json.loads((left / "batch.json").read_text())["images"] == [data.paths[i] for i in order]
    batch = load_file(left / "batch.safetensors")
    assert batch["ids"].tolist() == order.tolist() and batch["logits"].shape == batch["pseudo"].shape == (8, 5)
    assert load_file(left / "weights.safetensors").keys() == load_file(run / "best.safetensors").keys()
    tiny.train(tmp_path / "run", "gpr+random", data)  # the cause is gone: on from the checkpoint before it
    assert tiny.result(tmp_path / "run")[:4] == tiny.result(run)[:4]


@pytest.fixture
def encoded(monkeypatch):
    """How many views CLIP's image tower has been shown."""
    seen, encode = [], vlm.Clip.encode_images
    monkeypatch.setattr(vlm.Clip, "encode_images", lambda self, x: seen.append(len(x)) or encode(self, x))
    return seen


def test_with_and_without_a_bank(data, tmp_path, encoded):
    with_bank, without = (
        tiny.train(tmp_path / f"run {i}", "aevlp", data, {"epochs": 2}, bank=b)
        for i, b in enumerate((tmp_path / "banks", False))
    )
    assert sum(encoded) == 2 * (2 * 60 + 60) * 5  # runs, epochs of 60 images and the evaluation of 60, views
    assert with_bank["test_map"] == pytest.approx(without["test_map"], abs=0.1)
    for epoch in (1, 2):
        a, b = (np.load(tmp_path / f"run {i}" / f"pseudo/epoch_{epoch:02d}.npz")["pseudo"] for i in (0, 1))
        assert (a == b).mean() >= 0.999 and len(np.unique(a)) == 3


def test_a_sweep_of_ten_ratios_calls_clip_for_one(data, tmp_path, encoded):
    ratios = [i / 20 for i in range(10)]
    negatives = []
    for i, ratio in enumerate(ratios):
        given = {"negative_ratio": ratio, "epochs": 1}
        tiny.train(tmp_path / f"run {i}", "aevlp", data, given, bank=tmp_path / "banks")
        negatives.append(int((np.load(tmp_path / f"run {i}/pseudo/epoch_01.npz")["pseudo"] == -1).sum()))
    assert sum(encoded) == 2 * 60 * 5  # views of training, and evaluation views of validation and test
    assert negatives == sorted(negatives) and negatives[0] < negatives[-1]


def test_early_stop(data, tmp_path):
    """A classifier that stands still: the second epoch is no new best."""
    still = {"lr": 0.0, "head_lr": 0.0, "backbone": "test_convnext", "early_stop": "em", "epochs": 5}
    metrics = tiny.train(tmp_path / "run", "an", data, still)
    assert (metrics["epochs_run"], metrics["best_epoch"]) == (2, 1)


@pytest.mark.parametrize(
    "overrides", [{"precision": "bf16"}, {"channels_last": True}, {"optimizer": "sgd"}, {"optimizer": "adamax"}]
)
def test_switches_train(data, tmp_path, overrides):
    losses = []
    tiny.train(tmp_path / "run", "an", data, overrides | {"epochs": 2}, on_epoch=lambda row: losses.append(row["loss"]))
    assert losses[1] < losses[0] < 1


@pytest.mark.slow
def test_compiled_classifier(data, tmp_path):
    losses = []
    tiny.train(
        tmp_path / "run", "an", data, {"compile": True, "epochs": 2}, on_epoch=lambda row: losses.append(row["loss"])
    )
    assert losses[1] < losses[0] < 1


def test_learning_rates_of_all_groups(data, tmp_path):
    recipe = tiny.small("role", lr=1e-3, head_lr=5e-3, role_lr_factor=7.0, weight_decay=0.01)
    loop = train.Training(data, "role", recipe, 0, tmp_path, "cpu")
    loop.build()
    groups = loop.optimizer.param_groups
    assert [g["lr"] for g in groups] == pytest.approx([1e-3, 5e-3, 7e-3])
    assert [g["weight_decay"] for g in groups] == [0.01, 0.01, 0.0]
    assert groups[2]["params"][0].shape == (60, 5)
    trained = sum(p.numel() for g in groups[:2] for p in g["params"])
    assert trained == sum(p.numel() for p in loop.net.parameters())


def test_quiet_and_told(data, tmp_path, capfd):
    rows = []
    tiny.train(tmp_path / "run", "an", data, {"epochs": 2}, on_epoch=rows.append)
    assert [(r["epoch"], r["epochs"]) for r in rows] == [(1, 2), (2, 2)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"device": "abacus"}, "'abacus' is unknown"),
        ({"recipe": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"splits": {"val": np.arange(3)}}, "training split is empty"),
        ({"method": "anx"}, "anx"),
    ],
)
def test_what_cannot_be_trained(data, tmp_path, change, message):
    data = replace(data, splits=change.get("splits", data.splits))
    recipe = tiny.small("an", **change.get("recipe", {}))
    with pytest.raises(AevlpError, match=message):
        train.fit(
            data, change.get("method", "an"), recipe, 0, tmp_path, device=change.get("device", "cpu"), progress=False
        )


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AevlpError, match="No space left on device"), replacing(tmp_path / "a") as file:
        file.write(b"a")
    assert not (tmp_path / "a").exists()


def test_the_loop_names_no_method():
    trees = [ast.parse(Path(m.__file__).read_text()) for m in (train, batches, checkpoints, evidence)]
    literals = {
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    trained = {name for name, method in METHODS.items() if not method.scorer}  # a teacher is asked by name
    assert not literals & ((trained | set(LABELERS)) - {"none"})


def test_the_test_split_is_scored_with_the_best_weights_not_the_last(data, tmp_path, monkeypatch):
    whole, last = train.Training.epoch, []

    def spoiled(self, *args):
        whole(self, *args)
        if self.at["epoch"] == 3:
            with torch.no_grad():
                self.net.head.weight.neg_()
            last.append({k: v.clone() for k, v in self.net.state_dict().items()})

    monkeypatch.setattr(train.Training, "epoch", spoiled)
    tiny.train(tmp_path / "run", "an", data)
    model, settings, _ = evidence.load_run(tmp_path / "run")
    saved = np.load(tmp_path / "run" / "predictions.npz")["probs"]
    assert settings["epoch"] < 3
    of_best = batches.predict(model, data, data.splits["test"], settings["recipe"]).numpy()
    np.testing.assert_allclose(saved, of_best, atol=1e-6)
    model.load_state_dict(last[0])
    assert np.abs(batches.predict(model, data, data.splits["test"], settings["recipe"]).numpy() - saved).max() > 1e-3


def test_averaged_weights_are_those_of_a_plain_loop(tmp_path, monkeypatch):
    data, seen, step = tiny.shapes(tmp_path / "pictures", n=60), [], train.Training.step

    def watched(self, *args):
        if not seen:
            seen.append({k: v.clone() for k, v in self.net.state_dict().items()})
        step(self, *args)
        seen.append({k: v.clone() for k, v in self.net.state_dict().items()})

    monkeypatch.setattr(train.Training, "step", watched)
    recipe = tiny.small("an", ema=0.9, epochs=1)
    run = train.fit(data, "an", recipe, 0, tmp_path / "run", device="cpu", progress=False)
    expected = seen[0]
    for n, new in enumerate(seen[1:]):  # the first step replaces, later ones weigh by 1 - (n + 1)^(-2/3), at most 0.9
        decay = 0.0 if n == 0 else min(1 - (n + 1) ** (-2 / 3), 0.9)
        for name, v in new.items():
            expected[name] = decay * expected[name] + (1 - decay) * v if v.is_floating_point() else v
    kept = load_file(tmp_path / "run" / "best.safetensors")
    assert run["best_epoch"] == 1 and not torch.allclose(kept["head.weight"], seen[-1]["head.weight"])
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)


def test_the_head_alone_learns_first_and_a_short_batch_is_left_out(data, tmp_path, monkeypatch):
    whole, kept = train.Training.epoch, []

    def watched(self, *args):
        kept.append({k: v.clone() for k, v in self.net.named_parameters()})
        whole(self, *args)
        kept.append({k: v.clone() for k, v in self.net.named_parameters()})
        kept.append(self.at["step"])

    monkeypatch.setattr(train.Training, "epoch", watched)
    tiny.train(tmp_path / "run", "an", data, {"linear_init": 1, "epochs": 2, "batch_size": 7, "drop_last": True})
    before, after, steps, _, later, _ = kept
    assert steps == len(data.splits["train"]) // 7 < len(data.splits["train"]) / 7
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith("head"), name
    assert any(not torch.equal(after[n], later[n]) for n in after if n.startswith("backbone"))
