"""A head on frozen embeddings: the same loop, an independent one beside it, and features from elsewhere."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from aevlp import batches, board, checkpoints, deploy, evidence, frozen, recipes, runner, runs, sweeps, train
from aevlp.data import AevlpError, Images, epoch_order
from aevlp.eyes import embeddings
from aevlp.recipes import recipe

HEAD = tiny.CLIP | {"backbone": "frozen", "epochs": 3, "view_epochs": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sixty pictures of squares, and their banks."""
    folder = tmp_path_factory.mktemp("frozen")
    return folder, tiny.shapes(folder / "pictures")


def fit(place, name, method, **given):
    folder, data = place
    overrides = HEAD | given.pop("overrides", {})
    given = {"bank": folder / "banks"} | given
    return tiny.train(folder / name, method, given.pop("data", data), overrides, **given), folder / name


def rows(data, split, root, epoch):
    """What the head reads, by a plain loop over pictures."""
    views = embeddings(data, split, tiny.small("an", **HEAD), bank_root=root, epoch=epoch).float()
    return torch.stack([torch.cat([v[0], v[1:].mean(0).half().float(), v[1:].max(0).values]) for v in views])


@pytest.mark.parametrize("hidden", [0, 16])
def test_an_epoch_is_that_of_a_plain_loop(place, hidden):
    folder, data = place
    _, run = fit(place, f"an {hidden}", "an", overrides={"epochs": 1, "frozen_hidden": hidden})
    views = torch.stack([rows(data, "train", folder / "banks", epoch) for epoch in (1, 2)])
    mean, std = views.flatten(0, 1).mean(0), views.flatten(0, 1).std(0, correction=0)
    x, y = (views[0] - mean) / std, torch.from_numpy(data.observed[data.splits["train"]]).float()
    batches.seed_everything(0)
    layers = [torch.nn.Linear(x.shape[1], hidden), torch.nn.ReLU()] if hidden else []
    net = torch.nn.Sequential(*layers, torch.nn.Linear(hidden or x.shape[1], 5))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for part in np.split(epoch_order(data.splits["train"], 0, 1), range(8, 60, 8)):
        logits = net(x[part])
        loss = -(y[part] * logits.sigmoid().log() + (1 - y[part]) * (1 - logits.sigmoid()).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = load_file(run / "best.safetensors")
    assert torch.allclose(made["backbone.mean"], mean, atol=1e-5) and torch.allclose(
        made["backbone.std"], std, rtol=1e-3
    )
    for there, here in zip(
        [v for k, v in made.items() if k.startswith("backbone.layer")], net[:-1].parameters(), strict=True
    ):
        pair = {tuple(p.shape): p for p in net[:-1].parameters()}
        assert torch.allclose(there, pair[tuple(there.shape)], atol=2e-4), here.shape
    assert torch.allclose(made["head.weight"], net[-1].weight, atol=2e-4)
    assert torch.allclose(made["head.bias"], net[-1].bias, atol=2e-4)
    judged = (rows(data, "test", folder / "banks", 0) - mean) / std
    kept = np.load(run / "predictions.npz")["probs"]
    assert np.abs(kept - net(judged).sigmoid().detach().numpy()).max() < 1e-3


def test_no_picture_is_decoded_once_the_bank_is_there(place, monkeypatch):
    without, run = fit(place, "no bank", "gpr+damp", bank=False)
    fit(place, "filling", "gpr+damp")

    def decoded(*_):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(Images, "_item", decoded)
    found, again = fit(place, "filled", "gpr+damp")
    assert tiny.result(run)[1:4] == tiny.result(again)[1:4] and without["test_map"] == found["test_map"]
    assert [p.name for p in (again / "pseudo").iterdir()] == [f"epoch_{found['best_epoch']:02d}.npz"]


def test_labels_come_in_turn_with_the_views(place):
    folder, data = place
    given = HEAD | {"view_epochs": 2}
    turned, anew = (
        train.build_labeler("damp", data, tiny.small("aevlp", **given | {"view_epochs": n}), bank_root=folder / "banks")
        for n in (2, 0)
    )
    ids = torch.arange(60)
    pictures = [Images(data.paths)[i][0] for i in range(60)]
    batch = train.Batch(ids=ids, rows=ids, images=pictures, observed=torch.from_numpy(data.observed[:60]))
    labels = [turned.labels(batch, epoch) for epoch in range(1, 6)]
    assert (
        torch.equal(labels[0], labels[2])
        and torch.equal(labels[1], labels[3])
        and not torch.equal(labels[0], labels[1])
    )
    assert torch.equal(labels[0], anew.labels(batch, 1)) and torch.equal(labels[1], anew.labels(batch, 2))


@pytest.mark.parametrize(
    "method", ["aevlp", "full", "em-apl", "ll-ct", "role", "smile", "vlpl", "gpr+random", "bce+fixed-damp"]
)
def test_any_loss_and_labeler(place, method):
    vlpl = {"vlpl_clip": "glyphs-clip", "vlpl_clip_weights": "", "apl_warmup": 1}
    found, _ = fit(place, method, method, overrides=vlpl)
    assert 0 < found["test_map"] <= 100 and found["epochs_run"] == 3


@pytest.mark.parametrize("method", ["boostlu-ll-r", "mime"])
def test_heads_that_need_a_map_refuse(place, method):
    with pytest.raises(
        AevlpError, match="backbone=frozen has embeddings and no map; BoostLU and MIME need a timm backbone"
    ):
        fit(place, method, method)


def test_settings_are_those_of_a_head():
    linear, hidden = (recipe("glyphs", "aevlp", backbone="frozen", frozen_hidden=n) for n in (0, 256))
    assert (linear.epochs, linear.batch_size, linear.lr, linear.view_epochs) == (120, 64, 5e-3, 4)
    assert (hidden.epochs, hidden.lr, hidden.head_lr) == (120, 2e-3, 2e-3)
    assert recipe("glyphs", "aevlp", backbone="frozen", epochs=7).epochs == 7
    assert recipe("voc", "aevlp", "released", backbone="frozen").train_head
    assert recipes.as_table("glyphs", "gr", backbone="frozen").loc["lr", "source"].startswith("frozen backbone")
    changed = {k for k, v in asdict(linear).items() if v != asdict(recipe("glyphs", "aevlp"))[k]}
    assert changed <= {"backbone", "epochs", "batch_size", "lr", "head_lr", "view_epochs", "ema", "shift"}
    for given in ({"features": "x"}, {"frozen_hidden": 8}):
        with pytest.raises(AevlpError, match="is of a frozen backbone; set backbone=frozen too"):
            recipe("glyphs", "aevlp", **given)


def test_an_interrupted_run_ends_with_the_same_numbers(place, monkeypatch):
    folder, _ = place
    calls, step = iter(range(1, 100)), train.Training.step
    fit(place, "whole", "gpr+damp", overrides={"epochs": 5})

    def stopped(*given):
        if next(calls) == 21:  # in the third epoch
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(train.Training, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(place, "stopped", "gpr+damp", overrides={"epochs": 5}, checkpoint_minutes=0)
    monkeypatch.undo()
    assert list((folder / "stopped" / "last").glob("epoch-0003-step-*"))
    fit(place, "stopped", "gpr+damp", overrides={"epochs": 5})
    assert tiny.result(folder / "stopped") == tiny.result(folder / "whole")


def test_files_are_written_now_and_then(place, monkeypatch):
    written = []
    original = checkpoints.save_checkpoint
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *given: (written.append(given[1]), original(*given)))
    found, run = fit(place, "seldom", "an", overrides={"epochs": 12})
    assert len(written) <= 2 and written[-1] == "epoch-0013-step-00000000"
    assert len((run / "history.csv").read_text().splitlines()) == 13
    best = evidence.run_settings(run / "best.safetensors")["epoch"]
    assert best == found["best_epoch"]


def test_new_pictures_and_export(place, monkeypatch, tmp_path):
    folder, data = place
    fit(place, "deployed", "an")
    run, kept = folder / "deployed", np.load(folder / "deployed" / "predictions.npz")
    net, settings, names = evidence.load_run(run)
    moved = replace(data, paths=np.array(data.paths)[data.splits["test"]], observed=data.observed[data.splits["test"]],
                    truth=None, splits={"test": np.arange(len(kept["ids"]))})  # fmt: skip
    probs = batches.predict(net, moved, moved.splits["test"], settings["recipe"]).numpy()
    assert np.array_equal(probs, kept["probs"]), "evaluation views are a function of the picture alone"
    model, shape, wants = frozen.whole(net, settings["recipe"])
    assert shape == (5, 3, 64, 64) and wants["views"][0] == [0, 0, 1, 1] and wants["views"][1] == [0, 0, 0.55, 0.55]
    source = frozen.Embeddings(moved, settings["recipe"], bank_root=False)
    eyes = source.eyes
    pictures = [Images(moved.paths)[i][0] for i in range(4)]
    views = torch.cat(list(eyes.parts(pictures, torch.arange(4), 0)))
    assert np.abs(torch.sigmoid(model(views)).detach().numpy() - probs[:4]).max() < 5e-3


def test_features_from_elsewhere(place, tmp_path):
    folder, data = place
    rng = np.random.default_rng(0)
    features = (data.truth @ rng.normal(size=(5, 24)) + 0.1 * rng.normal(size=(len(data), 24))).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    name = frozen.import_features(tmp_path / "features.npy", data, root=folder / "banks").folder.name
    gone = replace(data, paths=np.array([p.replace("pictures", "gone") for p in data.paths]))
    found, run = fit(place, "imported", "full", data=gone, overrides={"features": name, "epochs": 60})
    assert found["test_map"] > 95
    assert load_file(run / "best.safetensors")["head.weight"].shape == (5, 24)
    net, settings, _ = evidence.load_run(run)
    assert frozen.whole(net, settings["recipe"])[1] == (24,)
    (run / "params.yaml").write_text("{}\n")  # what says that a folder is a run
    known, test = np.load(run / "predictions.npz"), data.splits["test"]
    new = {"features": torch.from_numpy(features[test]), "ids": torch.arange(len(test))}
    save_file(new, tmp_path / "new.safetensors")
    table = deploy.predict(run, tmp_path / "new.safetensors")
    assert table.id.tolist() == [str(i) for i in range(len(test))]
    assert np.abs(table[list(data.class_names)].to_numpy() - known["probs"]).max() < 2e-3
    assert deploy.save_predictions(table, tmp_path / "found.csv") == [tmp_path / "found.csv"]
    assert deploy.save_predictions(table, tmp_path / "found.csv")  # a command made it: it may be written again
    with pytest.raises(AevlpError, match="give a .npy or .safetensors with those of the new pictures"):
        deploy.predict(run, data.paths[0])
    np.save(tmp_path / "narrow.npy", features[:, :20])
    with pytest.raises(AevlpError, match=r"a row of \(20,\) makes 20 numbers, and this head reads 24"):
        deploy.predict(run, tmp_path / "narrow.npy")
    other = replace(data, paths=np.array([p + ".jpg" for p in data.paths]))
    with pytest.raises(AevlpError, match="holds the features of other pictures than those of shapes"):
        fit(place, "other", "full", data=other, overrides={"features": name})
    fit(place, "beside", "an", overrides={"epochs": 1})
    views = [p.name for p in (folder / "banks").iterdir() if p.name != name]
    with pytest.raises(AevlpError, match="holds CLIP's views, not imported features"):
        fit(place, "views", "full", overrides={"features": views[0]})


def test_features_that_cannot_be_taken_are_named(place, tmp_path):
    folder, data = place
    features, bank = np.ones((len(data), 4), np.float32), folder / "banks"
    np.save(tmp_path / "features.npy", features)
    np.save(tmp_path / "large.npy", features * 1e6)
    wrong = [str(i) for i in range(1000, 1000 + len(data))]
    with pytest.raises(AevlpError, match=f"no features for {len(data)} of {len(data)} pictures, as 000.png"):
        frozen.import_features(tmp_path / "features.npy", data, wrong, root=bank)
    with pytest.raises(AevlpError, match=f"no features for {len(data) - 1}"):
        frozen.import_features(tmp_path / "features.npy", data, [0] * len(data), root=bank)
    with pytest.raises(AevlpError, match="above 65,504"):
        frozen.import_features(tmp_path / "large.npy", data, root=bank)
    with pytest.raises(AevlpError, match="No CLIP bank"):
        frozen.imported("nothing", data, bank)


def test_a_sweep_makes_short_runs_in_one_kernel(tmp_path, monkeypatch):
    overrides = {"backbone": "frozen", "epochs": 2, "view_epochs": 1}
    bad = {"backbone": "frozen", "clip_weights": str(tmp_path / "missing.pt"), "epochs": 1}
    plan = [runs.run_params("glyphs", method, overrides=given) for method, given in
            (("an", overrides), ("mime", overrides), ("gr", bad), ("full", overrides))]  # fmt: skip
    outcomes = runner.attempts(plan, tmp_path)
    assert [o["state"] for o in outcomes] == ["done", "failed", "failed", "done"]
    assert "no map" in outcomes[1]["error"] and "missing.pt" in outcomes[2]["error"]
    folders = [tmp_path / runs.run_name(p) for p in plan]
    kernels = [runs.status(f)["kernel"]["pid"] for f in folders]
    assert len(set(kernels)) == 1 and kernels[0] != os.getpid()
    assert all((f / "train.ipynb").is_file() and (f / "params.yaml").is_file() for f in folders)
    assert sorted(board.frame(tmp_path).state) == ["done", "done", "failed", "failed"]
    assert [o["state"] for o in runner.attempts(plan[:1], tmp_path)] == ["reused"]
    alone = runner.attempt(plan[0] | {"seed": 0}, tmp_path / "alone")
    assert alone["state"] == "done"
    one, other = (Path(root) / runs.run_name(plan[0]) / "predictions.npz" for root in (tmp_path, tmp_path / "alone"))
    assert np.array_equal(np.load(one)["probs"], np.load(other)["probs"])


def test_frozen_runs_are_handed_out_together():
    plan = [
        runs.run_params("glyphs", m, overrides={"backbone": b}) for m in ("an", "gr") for b in ("frozen", "glyphnet")
    ]
    todo = {runs.run_name(p): p for p in plan}
    frozen_names = [n for n, p in todo.items() if p["recipe"]["backbone"] == "frozen"]
    assert sweeps._units(list(todo), todo, 1) == [[n] for n in todo if n not in frozen_names] + [frozen_names]
    assert sorted(map(len, sweeps._units(list(todo), todo, 2))) == [1, 1, 1, 1]
    now, later = sweeps._waves(todo, set())
    assert sum(n in now for n in frozen_names) == 1, "one fills the bank, the other waits for it"
    assert sweeps.bank_of(plan[0]) == sweeps.bank_of(runs.run_params("glyphs", "aevlp"))
