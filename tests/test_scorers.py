"""What CLIP says without training, against plain loops in float64; a tiny random CLIP, no download."""

import json

import numpy as np
import pytest
import torch
from test_eyes import data, made  # noqa: F401, fixtures
from test_labelers import clip_model  # noqa: F401, a fixture
from tiny import shapes, small, train

from aevlp import outcome
from aevlp.batches import predict
from aevlp.damp import damp
from aevlp.data import AevlpError
from aevlp.evidence import fuse_run, load_run
from aevlp.eyes import TokenEyes, eyes_of
from aevlp.recipes import recipe
from aevlp.registry import METHODS
from aevlp.scorers import (
    FUSION_WEIGHTS,
    SCORERS,
    beside_clip,
    build_scorer,
    fuse,
    fusion_weight,
    gaussians,
    mean_ap,
    split_scores,
    surest,
)

NAMES = tuple("abcdef")
CHANGES = dict(token_size=0, token_rule="sclip", temperature=0.05, token_temperature=0.08)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def embeddings(scorer, data, split):  # noqa: F811
    return torch.cat(list(scorer.eyes.split(data, split, False))).double().numpy()


def loop(name, e, scorer):
    """The score of one picture, class by class: e (V, K), view 0 the whole picture."""
    r, words = scorer.recipe, scorer.prototypes.double().numpy()
    tau = r.token_temperature if name == "clip-tokens" else r.temperature
    probs = [softmax([view @ word / tau for word in words]) for view in e]
    if name == "clip":
        return probs[0]
    if name == "clip-views":
        return np.mean(probs, axis=0)
    return np.array([(probs[0][c] + max(p[c] for p in probs[1:])) / 2 for c in range(len(words))])


@pytest.mark.parametrize("name", ["clip", "clip-views", "clip-damp", "clip-tokens"])
def test_scores_are_those_of_a_plain_loop(name, data, made):  # noqa: F811
    scorer = build_scorer(name, NAMES, made(**CHANGES))
    expected = np.array([loop(name, e, scorer) for e in embeddings(scorer, data, "test")])
    found = split_scores(data, "test", name, made(**CHANGES), bank_root=False)
    assert found.shape == (3, 6) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3  # it is not the same for every picture and class


@pytest.mark.parametrize("name", ["clip-damp", "clip-tokens"])
def test_damps_score_is_damps(name, data, made):  # noqa: F811
    scorer = build_scorer(name, NAMES, made(**CHANGES, local_threshold=0.4))
    e = torch.from_numpy(embeddings(scorer, data, "train")).float()
    probs = (e @ scorer.prototypes.T / scorer.temperature).softmax(-1)
    settings = dict(local_threshold=0.0, global_threshold=0.5, top_k=3, negative_ratio=0.2)
    expected = damp(probs, torch.zeros(len(e), 6), **settings).final
    assert torch.equal(scorer.read(e), expected)


def test_the_bank_and_no_bank_say_the_same(data, made, tmp_path):  # noqa: F811
    for name in SCORERS:
        one, again, none = (
            split_scores(data, "val", name, made(**CHANGES), "cpu", root) for root in (tmp_path, tmp_path, False)
        )
        assert np.array_equal(one, again) and np.array_equal(one, none)


def test_pictures_pixels_and_weights_give_the_same_scores(data, made):  # noqa: F811
    from aevlp.data import decode

    pictures = [torch.from_numpy(decode(p)).permute(2, 0, 1) for p in data.paths]
    for name in SCORERS:
        scorer = build_scorer(name, NAMES, made(**CHANGES)).fit(data, False)
        scores = scorer.scores(pictures)
        pixels = torch.cat(list(scorer.eyes.parts(pictures, np.arange(9), 0)))
        assert pixels.shape[1:] == scorer.input_shape
        with torch.no_grad():
            torch.testing.assert_close(scorer(pixels), scores, atol=5e-3, rtol=0)  # `scores` are of float16
        other = build_scorer(name, NAMES[::-1], made(**CHANGES)).load(scorer.weights())
        assert torch.equal(other.scores(pictures), scores) and set(scorer.weights()) == set(scorer.kept)
    with pytest.raises(AevlpError, match="nearest is 'clip-tokens'"):
        build_scorer("clip-tokns", NAMES, made())


def test_tokens_are_seen_whole_larger_and_pooled(data, made):  # noqa: F811
    from aevlp.data import decode

    clip = build_scorer("clip", NAMES, made()).clip
    image = [torch.from_numpy(decode(data.paths[3])).permute(2, 0, 1)]
    every, larger, pooled = (
        eyes_of(made(token_size=size, token_grid=t), clip, tokens=True) for size, t in ((0, 0), (48, 0), (0, 2))
    )
    assert (every.shape, larger.shape, pooled.shape) == ((17, 24), (37, 24), (5, 24)) and type(every) is TokenEyes
    tokens = every.encode(image, [3], 0)[0].double().numpy()
    assert np.allclose(np.linalg.norm(tokens, axis=1), 1, atol=2e-3)
    square = tokens[1:].reshape(4, 4, 24)
    means = np.array([square[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled.encode(image, [3], 0)[0, 1:].double().numpy(), expected, atol=3e-3)
    assert larger.encode(image, [3], 0).shape == (1, 37, 24)
    with pytest.raises(AevlpError, match="token_grid=5 is more than the 4 x 4"):
        eyes_of(made(token_size=0, token_grid=5), clip, tokens=True)


def test_tokens_of_training_change_with_the_epoch(data, made, tmp_path):  # noqa: F811
    eyes = eyes_of(made(), build_scorer("clip", NAMES, made()).clip, tokens=True)
    first, again, second, judged = (torch.cat(list(eyes.split(data, "train", tmp_path, e))) for e in (1, 1, 2, 0))
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, judged)


def test_gaussians_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    k, classes = 5, 4
    x = rng.standard_normal((40, k)) + 1
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    probs = rng.dirichlet(np.ones(classes) * 0.3, 40)
    probs[:, 3] = 0  # wins nothing
    text = rng.standard_normal((classes, k))
    won = probs.argmax(1)
    means = text.copy()
    for c in range(3):
        rows = [i for i in range(40) if won[i] == c]
        means[c] = sum(probs[i, c] * x[i] for i in rows) / sum(probs[i, c] for i in rows)
    centred = np.array([x[i] - means[won[i]] for i in range(40)])
    covariance = np.cov(centred, rowvar=False)
    inverse = k * np.linalg.inv(39 * covariance + np.trace(covariance) * np.eye(k))
    weight, bias = gaussians(torch.tensor(x), torch.tensor(probs), torch.tensor(text))
    for c in range(classes):
        np.testing.assert_allclose(weight[:, c], inverse @ means[c], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias[c], -means[c] @ inverse @ means[c] / 2 - np.log(classes), rtol=1e-4)


def test_the_surest_tokens_of_each_class():
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.99, 0.01], [0.3, 0.7], [0.7, 0.3]], dtype=torch.float64)
    tokens, kept = surest(torch.arange(5.0)[:, None], probs, 2)
    assert sorted(tokens[:, 0].tolist()) == [0, 2, 3] and torch.equal(kept, probs[tokens[:, 0].long()])


def test_piaa_is_a_plain_loop_and_learns_in_parts_what_it_learns_at_once(data, made, monkeypatch):  # noqa: F811
    r = made(**CHANGES, piaa_tokens=3, piaa_sharpness=20.0, piaa_temperature=2.0, piaa_local=7.0, piaa_global=9.0)
    scorer = build_scorer("clip-piaa", NAMES, r).fit(data, False)
    words, e = scorer.prototypes.double().numpy(), embeddings(scorer, data, "train")
    tokens = e[:, 1:].reshape(-1, 24)
    probs = np.array([softmax(20 * words @ t) for t in tokens])
    entropy, won = -(probs * np.log(probs)).sum(1), probs.argmax(1)
    chosen = [i for c in set(won) for i in sorted(np.flatnonzero(won == c), key=lambda i: entropy[i])[:3]]
    weight, bias = gaussians(torch.tensor(tokens[chosen]), torch.tensor(probs[chosen]), torch.tensor(words))
    torch.testing.assert_close(scorer.weight, weight, atol=1e-2, rtol=1e-3)
    found = scorer.over(data, "test", False)
    for row, picture in zip(found, embeddings(scorer, data, "test"), strict=True):
        local = np.max([softmax((t @ scorer.weight.numpy() + scorer.bias.numpy()) / 2) for t in picture[1:]], axis=0)
        expected = 0.1 * softmax(9 * words @ picture[0]) + 0.9 * softmax(7 * local)
        np.testing.assert_allclose(row, expected, atol=1e-5, rtol=1e-3)
    monkeypatch.setattr("aevlp.eyes._BATCH", 1)
    again = build_scorer("clip-piaa", NAMES, r).fit(data, False)
    torch.testing.assert_close(again.weight, scorer.weight, atol=1e-4, rtol=1e-4)


def test_both_opinions_are_the_sum_of_logits_and_the_weight_is_the_best():
    rng = np.random.default_rng(1)
    truth = (rng.random((300, 5)) < 0.3).astype(int)
    weak, strong = (1 / (1 + np.exp(-(2 * truth - 1 + s * rng.standard_normal(truth.shape)))) for s in (4, 1))
    joint = fuse(weak, strong, 2.0).astype(np.float64)
    odds = weak / (1 - weak) * (strong / (1 - strong)) ** 2
    np.testing.assert_allclose(joint, odds / (1 + odds), atol=1e-5)
    assert np.isfinite(fuse(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), 4.0)).all()
    found = fusion_weight(weak, strong, truth)
    assert found == max(FUSION_WEIGHTS, key=lambda w: mean_ap(fuse(weak, strong, w), truth)) > 1
    assert fusion_weight(strong, weak, truth) < 1
    assert fusion_weight(weak[:0], strong[:0], truth[:0]) == 1


def test_a_weight_is_chosen_on_pictures_that_are_wholly_known(data, made):  # noqa: F811
    from dataclasses import replace

    probs = {s: np.random.default_rng(0).random((len(data.splits[s]), 6)).astype(np.float32) for s in ("test", "val")}
    numbers, arrays = beside_clip(data, probs, "clip-damp", made(**CHANGES), bank_root=False)
    said = {f"{a}_{s}_{m}" for a in ("clip", "fused") for s in probs for m in ("map", "auc_observed")}
    assert set(numbers) == {"with_clip", "fusion_weight"} | said
    assert arrays["probs"].shape == (3, 6) and arrays["val_probs"].shape == (2, 6)
    expected = mean_ap(fuse(probs["test"], arrays["probs"], numbers["fusion_weight"]), data.targets("test"))
    assert numbers["fused_test_map"] == pytest.approx(expected)
    unknown = replace(data, truth=np.where(np.arange(6) == 2, -1, data.truth))
    assert beside_clip(unknown, probs, "clip", made(**CHANGES), bank_root=False)[0]["fusion_weight"] == 1
    blind = beside_clip(replace(data, truth=None), probs, "clip", made(**CHANGES), bank_root=False)[0]
    assert blind["fusion_weight"] == 1 and blind["fused_test_map"] is None and blind["clip_val_map"] is None


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("shapes"), n=40)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.scorer])
def test_a_row_without_training_is_a_run(name, drawn, tmp_path):
    given = dict(clip="glyphs-clip", clip_weights="", token_size=96, piaa_tokens=8)
    metrics = train(tmp_path, name, drawn, given, bank=tmp_path / "banks")
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["epochs_run"] == metrics["best_epoch"] == 0 and "clip_test_map" not in metrics
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("0,")
    expected = split_scores(drawn, "test", name, small(name, **given), bank_root=False)
    kept = outcome.scored(tmp_path)
    assert np.array_equal(kept.probs, expected)
    assert metrics["test_map"] == pytest.approx(mean_ap(expected, drawn.targets("test")))
    model, settings, names = load_run(tmp_path)
    again = predict(model, drawn, drawn.splits["test"], settings["recipe"]).numpy()
    np.testing.assert_allclose(again, expected, atol=1e-5)
    assert names == drawn.class_names and train(tmp_path, name, drawn, given) == metrics
    assert (tmp_path / "best.safetensors").stat().st_size < 20_000
    with pytest.raises(AevlpError, match="nothing to join"):
        fuse_run(tmp_path, drawn)


def test_a_run_is_joined_with_clip_when_it_ends_or_afterwards(drawn, tmp_path):
    given = dict(clip="glyphs-clip", clip_weights="", epochs=1)
    asked = train(tmp_path / "asked", "an", drawn, given | dict(with_clip="clip-views"))
    plain = train(tmp_path / "plain", "an", drawn, given)
    assert "fused_test_map" not in plain and not (tmp_path / "plain" / "clip.npz").exists()
    after = fuse_run(tmp_path / "plain", drawn, "clip-views", bank=False)
    assert after == {k: asked[k] for k in after} and asked["test_map"] == plain["test_map"]
    with np.load(tmp_path / "asked" / "clip.npz") as one, np.load(tmp_path / "plain" / "clip.npz") as other:
        assert all(np.array_equal(one[k], other[k]) for k in one)
        student, teacher = outcome.scored(tmp_path / "asked").probs, one["probs"]
    expected = mean_ap(fuse(student, teacher, asked["fusion_weight"]), drawn.targets("test"))
    assert asked["fused_test_map"] == pytest.approx(expected)
    assert json.loads((tmp_path / "plain" / "metrics.json").read_text())["fused_test_map"] == after["fused_test_map"]


def test_the_default_is_what_the_labeler_sees():
    teacher = {m: recipe("voc", m).with_clip for m in ("aevlp", "bce+damp", "gpr+vlpl", "vlpl", "an", "full")}
    assert teacher == dict(aevlp="clip-damp", an="", full="", vlpl="clip") | {
        "bce+damp": "clip-damp",
        "gpr+vlpl": "clip",
    }
    with pytest.raises(AevlpError, match="with_clip='clip-x' should be empty or one of"):
        recipe("voc", "an", with_clip="clip-x")


def test_predict_joins_clip_and_cuts_by_thresholds_of_both(drawn, tmp_path):
    from aevlp import deploy

    run = tmp_path / "run"
    train(run, "an", drawn, dict(clip="glyphs-clip", clip_weights="", epochs=1, with_clip="clip-damp"))
    (run / "params.yaml").write_text("dataset: shapes\nmethod: an\nrecipe: {}\n")
    pictures = [drawn.paths[i] for i in drawn.splits["test"]]
    alone, joint = (deploy.predict(run, pictures, with_clip=w) for w in (False, True))
    with np.load(run / "clip.npz") as kept:
        weight, of_val, of_test = float(kept["weight"]), kept["val_probs"], kept["probs"]
    expected = fuse(outcome.scored(run).probs, of_test, weight)
    np.testing.assert_allclose(joint.iloc[:, 2:].to_numpy(), expected, atol=1e-4)
    assert not np.allclose(alone.iloc[:, 2:].to_numpy(), expected, atol=1e-3)
    val = outcome.scored(run, "val")
    for c, name in enumerate(drawn.class_names):
        cut = outcome.best_f1_threshold(fuse(val.probs, of_val, weight)[:, c], val.targets[:, c])
        assert [name in deploy.label_list(labels) for labels in joint.labels] == (joint[name] >= cut).tolist()


@pytest.mark.parametrize("name", ["clip-damp", "clip-tokens", "clip-piaa"])
def test_tower_and_prototypes_are_exported_as_one_model(name, drawn, tmp_path):
    from aevlp import deploy

    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    run = tmp_path / "run"
    train(run, name, drawn, dict(clip="glyphs-clip", clip_weights="", token_size=96, piaa_tokens=8, grid=2))
    (run / "params.yaml").write_text(f"dataset: shapes\nmethod: {name}\nrecipe: {{}}\n")
    assert deploy.export(run, "onnx")["difference"] < 1e-4
    about = json.loads((run / "model.json").read_text())
    assert about["input"] == (["batch", 5, 3, 64, 64] if name == "clip-damp" else ["batch", 1, 3, 96, 96])
    assert about["views"][0] == [0, 0, 1, 1] and len(about["views"]) == about["input"][1]
    if name == "clip-damp":
        assert about["views"][4] == pytest.approx([0.45, 0.45, 1, 1])
