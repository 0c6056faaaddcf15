"""A finished run put to use: calibrated thresholds, predictions, exported models, the model card."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score
from tiny import shapes

from aevlp import deploy, outcome, runs, train
from aevlp.data import AevlpError
from aevlp.recipes import Recipe

SMALL = {"backbone": "glyphnet", "backbone_weights": "none", "image_size": 32, "workers": 0, "epochs": 1}


def trained(folder, truth):
    """A run on a folder and a CSV, with full labels or one given label a picture."""
    data = shapes(folder / "pictures", 60)
    split = {i: name for name, ids in data.splits.items() for i in ids}
    names = [path.rsplit("/", 1)[1] for path in data.paths]
    table = pd.DataFrame({"image": names, "split": [split[i] for i in range(len(data))]})
    if truth:
        table[list(data.class_names)] = data.truth
    else:
        table["label"] = [data.class_names[c] for c in data.observed.argmax(1)]
    table.to_csv(folder / "labels.csv", index=False)
    params = runs.run_params("csv", "an", root=folder / "pictures", csv=folder / "labels.csv", overrides=SMALL)
    run = runs.open_folder(params, folder / runs.run_name(params))
    train.fit(runs.load_data(params), "an", Recipe(**params["recipe"]), 0, run, progress=False)
    (run / "status.json").write_text('{"state": "done"}')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("full"), truth=True)


def test_predictions_are_the_model_s_and_labels_follow_the_thresholds(run, tmp_path):
    folder = run.parent / "pictures"
    table = deploy.predict(run, [folder / "000.png", folder / "001.png"])
    everything = deploy.predict(run, [folder])
    assert len(everything) == 60 and everything.image.is_monotonic_increasing
    pd.testing.assert_frame_equal(everything.head(2), table, rtol=1e-4)
    data, names = runs.load_data(runs.read_params(run)), list(table.columns[2:])
    kept = np.load(run / "predictions.npz", allow_pickle=False)
    places = {path: i for i, path in enumerate(everything.image)}
    rows = [places[data.paths[i]] for i in kept["ids"]]
    np.testing.assert_allclose(everything[names].to_numpy()[rows], kept["probs"], rtol=1e-4, atol=1e-6)
    cut = deploy.thresholds(run)[names].to_numpy()
    for _, row in everything.iterrows():
        given = {n for n, yes in zip(names, row[names].to_numpy(float) >= cut, strict=True) if yes}
        assert set(filter(None, row.labels.split("; "))) == given
    assert set(deploy.predict(run, [folder / "000.png"], threshold=0.0).labels[0].split("; ")) == set(names)
    for name in ("out.csv", "out.parquet"):
        saved, picture = deploy.save_predictions(everything, tmp_path / name)
        read = pd.read_csv(saved) if name.endswith("csv") else pd.read_parquet(saved)
        assert read.shape == everything.shape and Image.open(picture).format == "PNG"


def test_thresholds_come_from_validation_and_are_kept(run):
    found = deploy.thresholds(run)
    data = runs.load_data(runs.read_params(run))
    model, said, names = train.load_run(run)
    probs = train.predict(model, data, data.splits["val"], said["recipe"]).numpy()
    for c, name in enumerate(names):
        best = max(f1_score(data.targets("val")[:, c], probs[:, c] >= t, zero_division=0) for t in probs[:, c])
        assert np.isclose(f1_score(data.targets("val")[:, c], probs[:, c] >= found[name], zero_division=0), best)
    (run / "thresholds.json").write_text(json.dumps(dict.fromkeys(names, 0.25)))
    assert (deploy.thresholds(run) == 0.25).all(), "computed again, though kept"
    (run / "thresholds.json").unlink()


scores = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(scores)
def test_no_threshold_has_a_higher_f1(pairs):
    probs, truth = (np.array([p[i] for p in pairs], dtype=float) for i in (0, 1))
    found = outcome.best_f1_threshold(probs, truth)
    if truth.any():
        ours = f1_score(truth, probs >= found, zero_division=0)
        assert np.isclose(ours, max(f1_score(truth, probs >= t, zero_division=0) for t in (*probs, 0.0, 1.1)))
    assert outcome.given_threshold(probs, truth) <= max(probs.max(), 0.5)


def test_without_truth_nine_of_ten_given_labels_pass(tmp_path):
    run = trained(tmp_path, truth=False)
    cut, data = deploy.thresholds(run), runs.load_data(runs.read_params(run))
    table = deploy.predict(run, data.paths[data.splits["val"]])
    for c, name in enumerate(data.class_names):
        given = data.targets("val")[:, c] == 1
        assert not given.any() or (table[name][given] >= cut[name]).mean() >= 0.9
    assert "never given as a positive" in deploy.card(run).read_text()


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_an_exported_model_gives_pytorch_s_probabilities(run, tmp_path, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    made = deploy.export(run, form, tmp_path / f"model.{form}")
    assert made["difference"] < 1e-4
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["input"] == ["batch", 3, 32, 32] and len(about["classes"]) == 5 and len(about["mean"]) == 3


def test_a_model_file_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "_write_torchscript", lambda *a: (a[2].touch(), lambda x: np.zeros((len(x), 5)))[1])
    with pytest.raises(runs.RunFailed, match="differs from PyTorch"):
        deploy.export(run, "torchscript", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_the_card_says_what_a_reader_must_know(run):
    text = deploy.card(run).read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    line = next(line.split() for line in text.splitlines() if line.startswith("| mAP, %"))
    assert line[-2] == f"{metrics['test_map']:.2f}" and "heart" in text and "`backbone=glyphnet`" in text
    assert (run / "report.html").is_file() and Image.open(run / "report.png").format == "PNG"
    assert (
        all(f"## {part}" in text for part in ("Data", "Method", "Results", "Limits", "Settings")) and "{run" not in text
    )


def test_wrong_input_is_one_sentence(run, tmp_path):
    (tmp_path / "no.png").write_text("not an image")
    for images, said in [(["/nowhere.png"], "nowhere"), ([tmp_path / "no.png"], "no.png"), ([], "no picture")]:
        with pytest.raises(AevlpError, match=said):
            deploy.predict(run, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AevlpError, match="no picture in this folder"):
        deploy.predict(run, [tmp_path / "empty"])
    with pytest.raises(AevlpError, match=".csv or .parquet"):
        deploy.save_predictions(pd.DataFrame(), tmp_path / "out.xlsx")
    with pytest.raises(AevlpError, match="onnx or torchscript"):
        deploy.export(run, "pickle")
    with pytest.raises(AevlpError, match="not a run|no run"):
        deploy.card(tmp_path)
