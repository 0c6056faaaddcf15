"""A finished run put to use: calibrated thresholds, predictions, exported models, the model card."""

import json
import os
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from tiny import shapes

from aevlp import batches, deploy, evidence, outcome, runs, train
from aevlp.data import AevlpError, AevlpWarning, made_here
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
    model, said, names = evidence.load_run(run)
    probs = batches.predict(model, data, data.splits["val"], said["recipe"]).numpy()
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
    assert f"{metrics['test_map']:.2f}" in line and "heart" in text and "`backbone=glyphnet`" in text
    assert (run / "report.html").is_file() and Image.open(run / "report.png").format == "PNG"
    assert (
        all(f"## {part}" in text for part in ("Data", "Method", "Results", "Limits", "Settings")) and "{run" not in text
    )


def test_what_a_run_is_called_is_text_in_its_card(run, tmp_path):
    evil, copy = "<img src=x onerror=alert(1)>", tmp_path / "run"
    shutil.copytree(run, copy)
    params = yaml.safe_load((run / "params.yaml").read_text())
    strange = params | {k: evil for k in ("dataset", "fidelity", "version", "commit", "torch", "device")}
    strange |= {"overrides": {"lr": evil}, "observation": evil, "recipe": params["recipe"] | {"clip_weights": evil}}
    (copy / "params.yaml").write_text(yaml.safe_dump(strange))
    about = json.loads((run / "run.json").read_text())
    about["summary"][0]["split"] = about["note"] = evil
    (copy / "run.json").write_text(json.dumps(about))
    text = deploy.card(copy).read_text()
    assert "<img" not in text and text.count("&lt;img") > 8 and "<img src=x" not in (copy / "report.html").read_text()


def test_weights_that_do_not_name_their_data_are_of_other_data(run, tmp_path):
    tensors = load_file(run / "best.safetensors")
    header = evidence.run_settings(run / "best.safetensors")
    (tmp_path / "params.yaml").write_text((run / "params.yaml").read_text())
    for change, same in (({}, True), ({"fingerprint": [1]}, False), ({"fingerprint": None}, False)):
        settings = {k: v for k, v in (header | change).items() if v is not None}
        (tmp_path / "best.safetensors").write_bytes(evidence.run_weights(tensors, settings))
        assert (deploy.unchanged(tmp_path)[0] is not None) == same


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


@pytest.fixture
def moved(run, tmp_path):
    """A run of its own, with its pictures and labels, to be spoiled."""
    folder = shutil.copytree(run.parent, tmp_path / "moved")
    text = (folder / run.name / "params.yaml").read_text().replace(str(run.parent), str(folder))
    (folder / run.name / "params.yaml").write_text(text)
    return folder / run.name


def test_every_picture_of_a_folder_gets_a_row_or_is_named(run, tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    picture = run.parent / "pictures/000.png"
    for name in ("a.png", "inner/b.PNG"):
        shutil.copy(picture, folder / name)
    for name in ("c.jfif", "d.jpe", "e.JPG"):
        Image.open(picture).convert("RGB").save(folder / name, "JPEG")
    for name in ("IMG_7.HEIC", "notes.txt", "raw.CR2", "._a.png"):
        (folder / name).write_bytes(b"no picture that can be read")
    with pytest.warns(AevlpWarning) as said:
        table = deploy.predict(run, [folder])
    assert [os.path.relpath(p, folder) for p in table.image] == ["a.png", "c.jfif", "d.jpe", "e.JPG", "inner/b.PNG"]
    assert all(name in str(said[0].message) for name in ("IMG_7.HEIC", "notes.txt", "raw.CR2", "._a.png"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none/x.heic").write_bytes(b"")
    with pytest.raises(AevlpError, match="x.heic"):
        deploy.predict(run, [tmp_path / "none"])


def test_what_it_drew_is_not_taken_for_a_picture_later(run, tmp_path):
    folder = shutil.copytree(run.parent / "pictures", tmp_path / "photos")
    first = deploy.predict(run, [folder])
    _, drawn = deploy.save_predictions(first, folder / "out.csv")
    assert made_here(drawn) and not made_here(folder / "000.png")
    with pytest.warns(AevlpWarning, match="made by aevlp"):
        again = deploy.predict(run, [folder])
    assert list(again.image) == list(first.image)


@pytest.mark.parametrize("name", ["out.csv", "out-grid.png", "out.parquet"])
def test_predictions_replace_predictions_and_nothing_else(run, tmp_path, name):
    table = deploy.predict(run, [run.parent / "pictures/000.png"])
    out = tmp_path / ("out.parquet" if name.endswith("parquet") else "out.csv")
    deploy.save_predictions(table, out)
    deploy.save_predictions(table, out)
    mine = {
        "out.csv": lambda p: shutil.copy(run.parent / "labels.csv", p),
        "out-grid.png": lambda p: shutil.copy(run.parent / "pictures/000.png", p),
        "out.parquet": lambda p: pd.DataFrame({"image": ["a"], "labels": ["b"], "mine": [0.5]}).to_parquet(p),
    }
    mine[name](tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(AevlpError, match=f"{name} is there already"):
        deploy.save_predictions(table, out)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["mine.json", "mine.pt"])
def test_an_export_replaces_an_export_and_nothing_else(run, tmp_path, name):
    deploy.export(run, "torchscript", tmp_path / "other.pt")
    deploy.export(run, "torchscript", tmp_path / "other.pt")
    about = json.loads((tmp_path / "other.json").read_text())
    assert about["thresholds"] == deploy.thresholds(run).to_dict() and list(about["thresholds"]) == about["classes"]
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(AevlpError, match="is there already"):
        deploy.export(run, "torchscript", tmp_path / "mine.pt")
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    with pytest.raises(AevlpError, match="beside the model"):
        deploy.export(run, "torchscript", tmp_path / "model.json")


def test_thresholds_are_part_of_a_finished_run(run):
    kept, said = json.loads((run / "thresholds.json").read_text()), json.loads((run / "run.json").read_text())
    assert list(kept) == said["class_names"] and set(said["thresholds_from"].values()) == {"truth"}


WRONG = {
    "'Cat' is no class": lambda found: found | {"Cat": 0.5},
    "'sun' has no threshold": lambda found: {k: v for k, v in found.items() if k != "sun"},
    "'sun' has the threshold '0.5'": lambda found: found | {"sun": "0.5"},
    "'sun' has the threshold 50": lambda found: found | {"sun": 50},
    "'sun' has the threshold nan": lambda found: found | {"sun": float("nan")},
    "'sun' has the threshold True": lambda found: found | {"sun": True},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_mistyped_threshold_is_one_sentence(moved, said):
    path = moved / "thresholds.json"
    path.write_text(json.dumps(WRONG[said](json.loads(path.read_text()))))
    for use in (
        lambda: deploy.predict(moved, [moved.parent / "pictures/000.png"]),
        lambda: deploy.export(moved, "torchscript"),
    ):
        with pytest.raises(AevlpError, match=said) as error:
            use()
        assert "thresholds.json" in str(error.value)


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_run_is_used_without_the_data_it_was_of(moved, what, tmp_path):
    picture, csv = shutil.copy(moved.parent / "pictures/000.png", tmp_path / "new.png"), moved.parent / "labels.csv"
    expected = deploy.predict(moved, [picture])
    if what == "gone":
        shutil.rmtree(moved.parent / "pictures")
        csv.unlink()
    else:
        table = pd.read_csv(csv)
        table.insert(2, "airship", 0)
        table.loc[0, "airship"] = 1
        table.to_csv(csv, index=False)
    pd.testing.assert_frame_equal(deploy.predict(moved, [picture]), expected)
    text = deploy.card(moved).read_text()
    assert "of 5 classes" in text and "Since then: " in text and "airship" not in text
    (moved / "thresholds.json").unlink()
    pd.testing.assert_frame_equal(deploy.predict(moved, [picture]), expected)
    (moved / "thresholds.json").unlink()
    (moved / "predictions.npz").unlink()
    with pytest.raises(AevlpError, match="--threshold"):
        deploy.predict(moved, [picture])
    assert len(deploy.predict(moved, [picture], threshold=0.5)) == 1


def test_a_run_that_finished_before_it_kept_thresholds_asks_its_data(moved):
    expected = deploy.thresholds(moved)
    kept = np.load(moved / "predictions.npz", allow_pickle=False)
    np.savez(moved / "predictions.npz", **{k: kept[k] for k in ("ids", "probs", "targets")})
    for name in ("thresholds.json", "run.json"):
        (moved / name).unlink()
    pd.testing.assert_series_equal(deploy.thresholds(moved), expected, rtol=1e-4)
    assert "of 5 classes" in deploy.card(moved).read_text()


def test_a_folder_that_cannot_be_written_is_a_warning(moved, monkeypatch):
    def full(path, value):
        raise AevlpError(f"{path}: cannot be written (Read-only file system)")

    expected = deploy.thresholds(moved)
    (moved / "thresholds.json").unlink()
    monkeypatch.setattr(deploy, "write_json", full)
    with pytest.warns(AevlpWarning, match="are not kept"):
        pd.testing.assert_series_equal(deploy.thresholds(moved), expected)


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), unique=True, max_size=5
    )
)
def test_labels_in_one_text_are_read_back(names):
    assert deploy.label_list(deploy.label_text(names)) == names


def test_classes_called_as_the_columns_are(run, tmp_path):
    table = pd.DataFrame(
        [[str(run.parent / "pictures/000.png"), '"cup; mug"; image', 0.9, 0.8, 0.1]],
        columns=["image", "labels", *deploy._columns(["cup; mug", "image", "labels"])],
    )
    assert table.columns.is_unique
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved, drawn = deploy.save_predictions(table, tmp_path / "out.csv")
    assert deploy.label_list(pd.read_csv(saved).labels[0]) == ["cup; mug", "image"] and drawn.is_file()
