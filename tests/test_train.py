"""The training loop against a plain one, and what it promises: repeatable, loud, complete folders."""

import ast
import functools
import inspect
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, precision_score, recall_score

from aevlp import batches, checkpoints, evidence, train, vlm
from aevlp.data import AevlpError, decode, epoch_order, replacing
from aevlp.labelers import LABELERS
from aevlp.methods import METHODS
from aevlp.models import build_model
from aevlp.views import student_flips, student_inputs, student_shifts

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_every_epoch_says_how_good_its_pseudo_labels_were(data, run, tmp_path):
    ids, history = data.splits["train"], pd.read_csv(run / "history.csv", index_col="epoch")
    unknown = data.observed[ids] == 0
    kept = sorted((run / "pseudo").glob("epoch_*.npz"))
    for path in kept:
        with np.load(path) as file:
            pseudo = file["pseudo"][unknown] == 1
        said, truth = history.loc[int(path.stem[-2:])], data.truth[ids][unknown] == 1
        assert said.precision == pytest.approx(precision_score(truth, pseudo), abs=1e-6)
        assert said.recall == pytest.approx(recall_score(truth, pseudo), abs=1e-6)
    assert kept
    tiny.train(tmp_path / "run", "an", data, dict(epochs=1))  # has none
    assert pd.read_csv(tmp_path / "run/history.csv")[list(evidence.QUALITY)].isna().all(axis=None)


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


# ---- the loop, one thing at a time


class Clock:
    """The time of all that a run measures; it passes where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (train, checkpoints, evidence):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now


def loop(data, tmp_path, method="an", bank=False, **recipe):
    made = train.Training(data, method, tiny.small(method, **recipe), 0, tmp_path / "run", "cpu", bank)
    made.build()
    return made


def passing(monkeypatch, clock, owner, name, seconds, also=lambda: None):
    real = getattr(owner, name)

    def slow(self, *given):
        found = real(self, *given)
        clock.now += seconds
        also()
        return found

    monkeypatch.setattr(owner, name, slow)


def test_seconds_are_those_of_the_steps_and_of_what_follows_them(data, tmp_path, monkeypatch):
    """60 pictures, 8 a batch: 8 steps; a run that was killed goes on counting."""
    clock, steps = Clock(monkeypatch), []

    def power_cut():
        steps.append(clock.now)
        if len(steps) == 3:
            raise KeyboardInterrupt

    passing(monkeypatch, clock, train.Training, "step", 2.3456789, power_cut)
    passing(monkeypatch, clock, train.Training, "validate", 1.0)
    passing(monkeypatch, clock, train.Training, "probabilities", 0.25)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "run", "an", data, checkpoint_minutes=0.02)
    assert [p.name for p in sorted((tmp_path / "run/last").iterdir())] == [
        "epoch-0001-step-00000001", "epoch-0001-step-00000002"]  # fmt: skip
    clock.now += 1e6
    metrics = tiny.train(tmp_path / "run", "an", data, checkpoint_minutes=0.02)
    assert len(steps) == 3 + 6 + 8 + 8, "the third step was not yet safe"
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert history.seconds.tolist() == [round(8 * 2.3456789 + 1.25, 3)] * 3
    assert history.images_per_second.tolist() == [round(60 / (8 * 2.3456789), 2)] * 3
    assert metrics["seconds"] == round(3 * (8 * 2.3456789 + 1.25) + 2 * 0.25, 3)
    assert metrics["images_per_second"] == pytest.approx(round(60 / (8 * 2.3456789), 2))


def test_every_draw_has_its_place(data, tmp_path, monkeypatch):
    """Weights by the seed, a step by seed, epoch, step and rank, a look at a split by seed and epoch."""
    told = []
    monkeypatch.setattr(train, "seed_everything", lambda *position: told.append(position))
    tiny.train(tmp_path / "run", "mime", data, {"epochs": 2, "mime_warmup": 1, "batch_size": 20})
    epochs = [[*((0, e, step, 0) for step in range(3)), *[(0, e)] * (3 - e)] for e in (1, 2)]  # the objective looks too
    assert told == [(0,), *epochs[0], *epochs[1], (0, 3), (0, 3)]  # test and validation with the best weights


def test_the_objective_hears_of_every_epoch_and_asks_for_the_training_split(data, tmp_path, monkeypatch):
    heard, build = [], train.build_objective

    def built(*args, **kwargs):
        objective = build(*args, **kwargs)
        start, end = objective.start_epoch, objective.end_epoch
        objective.start_epoch = lambda *given: heard.append(("start", *given)) or start(*given)
        objective.end_epoch = lambda epoch, predict: heard.append(("end", epoch, len(predict()))) or end(epoch, predict)
        return objective

    monkeypatch.setattr(train, "build_objective", built)
    monkeypatch.setattr(train.Tracking, "step", lambda self: heard.append("step"))
    tiny.train(tmp_path / "run", "an", data, {"epochs": 2, "batch_size": 30})
    steps = ["step"] * 2
    assert heard == [("start", 1, 2), *steps, ("end", 1, 60), ("start", 2, 2), *steps, ("end", 2, 60)]


def test_a_tracker_has_its_name_from_the_caller_or_outside_and_hears_the_end(data, tmp_path, monkeypatch):
    asked, heard = [], []
    monkeypatch.setenv("AEVLP_TRACKER", "outside")
    monkeypatch.setattr(train, "tracker_named", asked.append)
    monkeypatch.setattr(train.Tracking, "close", lambda self, metrics: heard.append(metrics))
    given = {"outside": None, "given": "given"}
    made = [tiny.train(tmp_path / name, "an", data, {"epochs": 1}, tracker=t) for name, t in given.items()]
    assert asked == list(given) and heard == made


@pytest.mark.parametrize("scores, best", [([0.5, 0.25, 0.5], 1), ([0.0, 0.0, 0.1], 3), ([3.0, 5.0, 4.0], 2)])
def test_the_first_of_the_best_epochs_is_the_best(data, tmp_path, monkeypatch, scores, best):
    told = iter(scores)
    monkeypatch.setattr(train, "score", lambda *given: (np.full(5, next(told)), np.full(5, np.nan)))
    metrics = tiny.train(tmp_path / "run", "an", data)
    assert metrics["best_epoch"] == best and metrics["val_map"] == scores[best - 1]
    assert evidence.load_run(tmp_path / "run")[1]["epoch"] == best and metrics["epochs_run"] == 3


@pytest.mark.parametrize("batch_size, said", [(8, None), (9, " and 1 more"), (11, " and 3 more")])
def test_the_pictures_of_a_loss_that_is_not_finite_are_named(data, tmp_path, monkeypatch, batch_size, said):
    poison(monkeypatch, epoch=1, step=2)
    steps, step = [], train.Training.step
    monkeypatch.setattr(train.Training, "step", lambda self, *given: steps.append(1) or step(self, *given))
    with pytest.raises(AevlpError, match="nan in epoch 1, step 2") as error:
        tiny.train(tmp_path / "run", "an", data, {"batch_size": batch_size})
    assert len(steps) == 3, "it goes on with a loss that is not finite"
    order = epoch_order(data.splits["train"], 0, 1)[2 * batch_size :]
    for i in order[:8]:
        assert data.paths[i] in str(error.value)
    assert (f"{said};" in str(error.value)) if said else (" more" not in str(error.value))


def test_a_classifier_that_is_not_finite_is_refused(data, tmp_path):
    made = loop(data, tmp_path)
    with torch.no_grad():
        made.net.head.bias[2] = math.nan
    with pytest.raises(AevlpError, match="outputs on the val split are not finite after epoch 1"):
        made.probabilities("val")


def test_averages_count_the_steps_of_all_epochs(data, tmp_path, monkeypatch):
    made, told = loop(data, tmp_path, ema=0.9, batch_size=16), []
    made.evidence.prepare()
    monkeypatch.setattr(made, "build", lambda: None)
    monkeypatch.setattr(made.averaged, "update", lambda net, step: told.append((net is made.net, step)))
    made.go()
    assert told == [(True, step) for step in range(1, 3 * 4 + 1)]  # 60 pictures, 16 a batch


@pytest.mark.parametrize(
    "size, drop, steps", [(7, True, 8), (7, False, 9), (60, True, 1), (64, True, 1), (59, True, 1)]
)
def test_a_short_batch_is_left_out_where_the_recipe_says_so(data, tmp_path, size, drop, steps):
    made = loop(data, tmp_path, batch_size=size, drop_last=drop)
    order = epoch_order(data.splits["train"], 0, 1)
    expected = order[: 60 // size * size] if drop and size < 60 else order
    assert made.order().tolist() == expected.tolist()
    made.at["step"] = 1
    whole, parts = made.start_epoch()
    assert np.concatenate(whole).tolist() == expected.tolist() and len(whole) == steps == len(parts) + 1
    assert made.model.training
    made.model.eval()
    made.at |= {"step": 0, "epoch": 2}
    made.start_epoch()
    assert made.model.training and made.objective.epoch == 2


def test_an_objective_starts_its_epoch_with_the_first_step(data, tmp_path):
    made = loop(data, tmp_path, "gr")
    made.at |= {"epoch": 2, "step": 3}
    made.start_epoch()
    assert made.objective.epoch == 1, "what a checkpoint brought is not begun anew"
    made.at["step"] = 0
    made.start_epoch()
    assert (made.objective.epoch, made.objective.epochs) == (2, 3)


@pytest.mark.parametrize("largest", [0.0, 0.2])
def test_pictures_are_moved_as_the_recipe_says(data, tmp_path, largest):
    made, local = loop(data, tmp_path, shift=largest), data.splits["train"][[3, 9]]
    images = [torch.from_numpy(decode(data.paths[i])).permute(2, 0, 1) for i in local]
    made.at["epoch"] = 4
    flip = student_flips(local, 0, 4)
    shift = student_shifts(local, 0.2, 0, 4) if largest else None
    expected = student_inputs(images, 32, made.net.mean, made.net.std, "cpu", flip, shift)
    assert torch.equal(made.inputs(local, images), expected)


def test_what_a_run_is_built_of(data, tmp_path):
    made = loop(data, tmp_path)
    assert not made.pictures.pin_memory and made.window == 1 and made.averaged is None and made.judged is made.net
    assert type(made.optimizer) is torch.optim.Adam and made.optimizer.defaults["fused"]
    assert train.OPTIMIZERS["sgd"]([torch.nn.Parameter(torch.ones(1))]).defaults["fused"]
    for bank, root in ((True, None), (False, False), ("folder", "folder")):
        assert train.Training(data, "an", tiny.small("an"), 0, tmp_path, "cpu", bank).bank_root == root
    fit, run = (inspect.signature(f).parameters for f in (train.fit, train.Training))
    assert {n: run[n].default for n in run} == {n: fit[n].default for n in run} | {"progress": False}
    assert fit["checkpoint_minutes"].default == inspect.signature(checkpoints.Resume).parameters["minutes"].default
    assert fit["bank"].default is fit["progress"].default is True


class TwoRanks:
    """Accelerate's second rank of two; what the first holds is what it is told."""

    num_processes, process_index = 2, 1

    def __init__(self, first):
        self.first = first

    def gather(self, local):
        return torch.cat([self.first.to(local.dtype), local])


def test_ranks_share_pictures_statistics_and_labels(data, tmp_path, monkeypatch):
    made, sent = loop(data, tmp_path, "gpr+random", backbone="test_convnext"), []
    made.net.register_buffer("running", torch.zeros(3))
    monkeypatch.setattr(train, "broadcast", sent.append)
    val = data.splits["val"]  # 30: 15 each
    made.accelerator = TwoRanks(torch.full((15, 5), 0.5))
    probs = made.probabilities("val")
    assert any(t is made.net.running for t in sent) and len(sent) == len(list(made.net.buffers()))
    expected = batches.predict(made.net, data, val[1::2], made.recipe)
    assert (probs[::2] == 0.5).all() and torch.equal(probs[1::2], expected)
    ids = data.splits["train"][[4, 8, 2, 6]]
    asked, answer = [], made.labeler.labels
    monkeypatch.setattr(made.labeler, "labels", lambda batch, epoch: asked.append(batch) or answer(batch, epoch))
    made.accelerator = TwoRanks(torch.full((2, 5), 7))
    everything, pseudo = made.labels(ids, ids[1::2], ["b", "d"], torch.zeros(4, 5))
    assert asked[-1].ids.tolist() == ids[1::2].tolist() and asked[-1].images == ["b", "d"]
    assert (pseudo[::2] == 7).all() and torch.equal(pseudo[1::2], answer(asked[-1], 1)) and len(everything.ids) == 4
    made.labeler.needs_logits = True  # of the whole batch, which every rank knows
    made.labels(ids, ids[1::2], ["b", "d"], torch.zeros(4, 5))
    assert asked[-1] is not everything and asked[-1].ids.tolist() == ids.tolist() and asked[-1].logits.shape == (4, 5)
    sent.clear()
    made.accelerator = SimpleNamespace(num_processes=1, process_index=0)
    assert torch.equal(made.probabilities("val"), batches.predict(made.net, data, val, made.recipe)) and not sent


@pytest.mark.parametrize(
    "device, there, recipe, says",
    [
        (None, False, {}, {"cpu": True}),
        (None, True, {}, {"cpu": False}),
        ("cpu", True, {"precision": "bf16"}, {"cpu": True, "mixed_precision": "bf16"}),
        ("cuda", True, {"precision": "fp16"}, {"cpu": False, "mixed_precision": "fp16"}),
        ("cpu", False, {"compile": True}, {"dynamo_backend": "inductor"}),
        ("cuda", False, {}, "sees no GPU"),
        ("cuda:1", True, {}, "which GPU"),
        ("cpu", True, {"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_the_device_that_is_asked_for(monkeypatch, device, there, recipe, says):
    reset = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(train, "Accelerator", lambda **given: given)
    monkeypatch.setattr(train.AcceleratorState, "_reset_state", lambda **given: reset.append(given))
    if isinstance(says, str):
        with pytest.raises(AevlpError, match=says):
            train._accelerator(device, tiny.small("an", **recipe))
        return
    given = train._accelerator(device, tiny.small("an", **recipe), "tensorboard", "folder")
    rest = {"mixed_precision": "no", "dynamo_backend": None, "log_with": "tensorboard", "project_dir": "folder"}
    assert given == {"cpu": None} | rest | says | ({} if "cpu" in says else {"cpu": device == "cpu"})
    assert reset == [{"reset_partial_state": True}]


def test_every_small_split_is_judged_by_what_it_has():
    """Against loops over all splits of three pictures and two classes, each label known or not, given or not."""

    def chosen(rule, truth, observed):
        data = SimpleNamespace(
            name="d", class_names="ab", truth=truth, observed=observed, splits={"val": np.arange(len(observed))}
        )
        try:
            return train.chosen_by(rule, data)
        except AevlpError:
            return "refused"

    for labels in itertools.product((-1, 0, 1), repeat=6):
        truth = np.array(labels).reshape(3, 2)
        mean = possible = 0
        for c in range(2):
            column = truth[:, c].tolist()
            mean += sum(v != -1 for v in column) / 2
            possible |= 1 in column and (0 in column or column == [1, 1, 1])
        for given in (-1, 0, 1):
            observed = np.zeros((3, 2), int)
            observed[1, 0] = given
            known = ["map"] * possible + ["auc_observed"] * (given == 1)
            assert chosen("map", truth, observed) == ("map" if possible else "refused")
            assert chosen("auc_observed", truth, observed) == ("auc_observed" if given == 1 else "refused")
            order = known if mean >= 3 else known[::-1]
            assert chosen("auto", truth, observed) == (order[0] if order else None), (truth, given)
    assert chosen("auto", None, np.eye(3, 2)) == "auc_observed" and chosen("map", None, np.eye(3, 2)) == "refused"
    assert train.chosen_by("auto", SimpleNamespace(class_names="ab", truth=None, observed=observed, splits={})) is None
    for known, rule in ((199, "auc_observed"), (200, "map")):  # of 300 pictures
        truth = np.full((300, 2), -1)
        truth[:known], truth[0] = 0, 1
        assert chosen("auto", truth, np.ones((300, 2))) == rule


def test_a_run_computes_alike_whatever_its_caller_does(data, tmp_path):
    seen = []

    def told(row):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))

    tiny.train(tmp_path / "run", "an", data, {"epochs": 1, "threads": 2}, on_epoch=told)
    assert seen == [(True, 2)] and not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1


@pytest.mark.parametrize("method", ["clip", "clip-piaa"])
def test_a_teacher_is_asked_and_kept_as_a_run(data, tmp_path, monkeypatch, method):
    clock, waited = Clock(monkeypatch), []
    passing(monkeypatch, clock, train.Asked, "validate", 7.12345)
    monkeypatch.setattr(train.Accelerator, "wait_for_everyone", lambda self: waited.append(self))
    metrics = tiny.train(tmp_path / "run", method, data, tiny.CLIP)
    (row,) = pd.read_csv(tmp_path / "run/history.csv").to_dict("records")
    assert (row["epoch"], row["seconds"], metrics["best_epoch"], metrics["epochs_run"]) == (0, 7.123, 0, 0)
    assert row["images_per_second"] == pytest.approx((120 if method == "clip-piaa" else 30) / 7.12345)
    assert math.isnan(row["loss"]) and row["val_map"] == metrics["val_map"] and metrics["seconds"] == 7.123
    model, settings, _ = evidence.load_run(tmp_path / "run")
    assert settings["epoch"] == 0 and settings["method"] == method and len(waited) == 3
    saved = np.load(tmp_path / "run/predictions.npz")
    assert sklearn_map(saved["val_probs"], data.targets("val")) == pytest.approx(metrics["val_map"], abs=1e-3)
    images = [torch.from_numpy(decode(data.paths[i])).permute(2, 0, 1) for i in saved["ids"]]
    np.testing.assert_allclose(model.scores(images).numpy(), saved["probs"], atol=1e-3)
