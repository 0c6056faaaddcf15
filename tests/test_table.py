"""The table behind the explorer: plain loops give the same, a query answers at once, a file belongs to what made it."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, precision_score, recall_score

from aevlp import batches, evidence, glyphs, train
from aevlp.damp import damp
from aevlp.data import AevlpError, LabelledImages, decode
from aevlp.eyes import Eyes, clip_of, prototypes, view_settings
from aevlp.recipes import recipe
from aevlp.table import COLUMNS, MATRICES, VERDICTS, Cancelled, Query, Table, build, open_table, read_table
from aevlp.vlm import similarities

SMALL = {"backbone_weights": "none", "epochs": 2, "batch_size": 8, "workers": 0, "precision": "no"}


def made_up(n=300, classes=7, seed=0, unknown=0.0, epochs=3, names=None):
    """A table of random numbers, of which a share of the truth is unknown."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, classes)) < 0.3).astype(np.int8)
    given = np.zeros_like(truth)
    given[np.arange(n), rng.integers(0, classes, n)] = 1
    truth = np.where(given == 1, 1, truth)
    truth = np.where(rng.random(truth.shape) < unknown, -1, truth).astype(np.int8)
    scores = {j: rng.random((n, classes)).astype(np.float32) for j in ("model", "damp", "clip")}
    cuts = {j: rng.uniform(0.3, 0.7, classes).astype(np.float32) for j in scores}
    labels = {j: (s >= cuts[j]).astype(np.int8) for j, s in scores.items()}
    labels["damp"][scores["damp"] < 0.1] = -1
    names = np.array(names or [f"folder/Picture_{i:05d}.jpg" for i in range(n)])
    positive = rng.integers(0, epochs + 1, truth.shape).astype(np.int16)
    place = rng.random((n, 2)).astype(np.float32)
    class_names = tuple(f"class {c}" for c in range(classes))
    return Table(
        "train", np.arange(n) * 2, names, class_names, given, truth, scores, labels, cuts, place, positive, epochs
    )


@pytest.mark.parametrize("judge", ["model", "damp", "clip"])
@pytest.mark.parametrize("unknown", [0, 0.4])
def test_verdicts_agree_with_a_plain_loop(judge, unknown):
    table = made_up(60, unknown=unknown)

    def says(i, c, who):
        return table.labels[who][i, c] == 1 or (who == "damp" and table.given[i, c] == 1)

    def expected(verdict, i, c):
        true, yes = table.truth[i, c], says(i, c, judge)
        if verdict == "has the class":
            return true == 1 if true >= 0 else table.given[i, c] == 1
        if verdict == "says yes":
            return yes
        if verdict == "CLIP and model disagree":
            return says(i, c, "damp") != says(i, c, "model")
        if verdict == "moved between epochs":
            return 0 < table.positive[i, c] < table.epochs
        if verdict == "right":
            return yes and true == 1 and table.given[i, c] != 1
        positive, negative = yes and true == 0, not yes and true == 1
        if verdict == "false positive":
            return positive
        if verdict == "false negative":
            return negative
        p, cut = float(table.scores[judge][i, c]), float(table.thresholds[judge][c])
        return (positive and p >= (1 + cut) / 2) or (negative and p <= cut / 2)

    for verdict in table.possible()[1:]:
        found = table.where(verdict, judge)
        loop = [[expected(verdict, i, c) for c in range(found.shape[1])] for i in range(len(table))]
        assert (found == np.array(loop)).all(), verdict
        assert found.any(), verdict
        rows = table.find(Query(judge, verdict, "class 3"))
        assert rows.tolist() == np.flatnonzero(np.array(loop)[:, 3]).tolist()
    assert set(table.possible()) == set(VERDICTS)


def test_columns_agree_with_scikit_learn_and_by_hand():
    table = made_up(40)
    p, truth = table.scores["model"].astype(float), table.truth
    loss = [log_loss(truth[i], p[i], labels=[0, 1]) for i in range(40)]
    assert table.column("loss", "model") == pytest.approx(loss, rel=1e-5, abs=1e-6)
    one = [log_loss([truth[i, 2]], [p[i, 2]], labels=[0, 1]) for i in range(40)]
    assert table.column("loss", "model", "class 2") == pytest.approx(one, rel=1e-5, abs=1e-6)
    bits = [np.mean([-q * np.log2(q) - (1 - q) * np.log2(1 - q) for q in row]) for row in p]
    assert table.column("uncertainty", "model") == pytest.approx(bits, rel=1e-4)
    agreement = []
    for i in range(40):
        a = {c for c in range(7) if table.labels["damp"][i, c] == 1 or table.given[i, c] == 1}
        b = {c for c in range(7) if table.labels["model"][i, c] == 1}
        agreement.append(len(a & b) / len(a | b))
    assert table.column("agreement", "clip") == pytest.approx(agreement)
    assert table.column("moved", "clip").tolist() == ((table.positive > 0) & (table.positive < 3)).sum(1).tolist()
    assert table.column("wrong", "model").tolist() == (table.labels["model"] != truth).sum(1).tolist()
    assert list(table.frame().columns) == ["id", "name", *COLUMNS[2:]]


def test_loss_uses_only_what_is_known():
    table = made_up(30, unknown=1.0)
    assert not table.has_truth
    given = table.given.argmax(1)
    expected = -np.log(table.scores["damp"][np.arange(30), given].clip(1e-7))
    assert table.column("loss", "damp") == pytest.approx(expected, rel=1e-5)
    assert np.isnan(table.column("wrong", "damp")).all() and np.isnan(table.column("true", "damp")).all()


def test_classes_agree_with_scikit_learn():
    table = made_up(200)
    found = table.classes("model").set_index("class")
    for c, name in enumerate(table.class_names):
        ap = average_precision_score(table.truth[:, c], table.scores["model"][:, c])
        said, true = table.labels["model"][:, c], table.truth[:, c]
        assert found.AP[name] == pytest.approx(ap, abs=1e-9)
        assert found.precision[name] == pytest.approx(precision_score(true, said))
        assert found.recall[name] == pytest.approx(recall_score(true, said))


def test_average_precision_leaves_unknown_truth_out():
    table = made_up(200, unknown=0.5)
    found = table.classes("model").set_index("class")
    for c, name in enumerate(table.class_names):
        known = table.truth[:, c] >= 0
        ap = average_precision_score(table.truth[known, c], table.scores["model"][known, c])
        assert found.AP[name] == pytest.approx(ap, abs=1e-9)


@pytest.mark.parametrize("kind", list(MATRICES))
def test_a_cell_of_a_matrix_counts_its_pictures(kind):
    table = made_up(80)
    matrix = table.matrix(kind, "model")
    for a in range(7):
        for b in range(7):
            rows = table.find(Query("model", pair=(kind, f"class {a}", f"class {b}")))
            if kind == "confused":
                right = [
                    i
                    for i in range(80)
                    if table.truth[i, a] == 1
                    and table.labels["model"][i, a] != 1
                    and table.truth[i, b] == 0
                    and table.labels["model"][i, b] == 1
                ]
            else:
                what = table.labels["model"] == 1 if kind == "said together" else table.truth == 1
                right = [i for i in range(80) if what[i, a] and what[i, b]]
            assert rows.tolist() == right and matrix[a, b] == len(right)


def test_sorting_searching_and_lassoing():
    table = made_up(50, unknown=1.0, names=[f"{'Dog' if i % 3 else 'cat'}_{49 - i:02d}.png" for i in range(50)])
    assert [n.lower() for n in table.names[table.find(Query(sort="name"))]] == sorted(n.lower() for n in table.names)
    assert table.find(Query(text="dOg")).tolist() == [i for i in range(50) if i % 3]
    falling = table.column("score", "damp")[table.find(Query(sort="score", falling=True))]
    assert (np.diff(falling) <= 0).all()
    assert table.find(Query(sort="true")).tolist() == list(range(50)), "what says nothing stays in place"
    assert table.find(Query(falling=True)).tolist() == list(range(49, -1, -1))
    assert table.find(Query(chosen=(3, 7, 9), text="dog")).tolist() == [7]


def test_without_truth_or_run_the_filters_are_off():
    table = made_up(20, unknown=1.0, epochs=0)
    only = replace(table, scores={k: v for k, v in table.scores.items() if k != "model"})
    assert only.possible() == ["all", "has the class", "says yes"]
    for verdict, why in (("false positive", "the truth, which is unknown"), ("moved between epochs", "needs a run")):
        with pytest.raises(AevlpError, match=why):
            only.find(Query(verdict=verdict))
    with pytest.raises(AevlpError, match="no verdict is called 'wrong'"):
        only.find(Query(verdict="wrong"))
    with pytest.raises(AevlpError, match="no class 'dog'"):
        only.find(Query(verdict="says yes", class_name="dog"))


def test_planted_label_errors_come_first():
    rng = np.random.default_rng(3)
    table = made_up(400, 5, seed=3)
    clean = table.truth == 1
    scores = np.where(clean, rng.beta(12, 3, clean.shape), rng.beta(2, 14, clean.shape)).astype(np.float32)
    flipped = rng.choice(clean.size, 40, replace=False)
    noisy = clean.copy().ravel()
    noisy[flipped] ^= True
    noisy = noisy.reshape(clean.shape).astype(np.int8)
    table = replace(table, truth=noisy, scores={"model": scores})
    found = table.errors("model", most=40)
    cells = {(r, n) for r, n in zip(found.row, found["class"], strict=True)}
    planted = {(i // 5, f"class {i % 5}") for i in flipped}
    assert len(cells & planted) >= 30, "of 40 planted errors among the first 40; by chance 1"
    assert (np.diff(found.suspicion) <= 0).all()
    kinds = {(r, n): k for r, n, k in zip(found.row, found["class"], found.kind, strict=True)}
    assert all((kinds[i, n] == "probably missing") == (noisy[i, int(n[-1])] == 0) for i, n in cells)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    truth = np.zeros((20, len(glyphs.CLASS_NAMES)), np.int8)
    for i in range(20):
        scene = glyphs.draw_scene(5, i)
        scene.image.save(root / f"{i:02d}.png")
        truth[i, [t.label for t in scene.things]] = 1
    observed = np.zeros_like(truth)
    observed[np.arange(20), truth.argmax(1)] = 1
    splits = {"train": np.arange(10), "val": np.arange(10, 14), "test": np.arange(14, 20)}
    return LabelledImages(
        "glyphs", [str(root / f"{i:02d}.png") for i in range(20)], glyphs.CLASS_NAMES, observed, truth, splits
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.fit(data, "aevlp", recipe("glyphs", "aevlp", **SMALL), 0, folder, bank=False, progress=False)
    return folder


def test_scores_are_those_of_clip_and_damp_one_by_one(data):
    settings = recipe("glyphs", "aevlp", **SMALL)
    table = build(data, "test", settings, bank_root=False)
    clip = clip_of(settings)
    eyes, words = Eyes(clip, view_settings(settings, clip), 0), prototypes(settings, clip, data.class_names)
    for row, i in enumerate(data.splits["test"]):
        image = torch.from_numpy(decode(data.paths[i])).permute(2, 0, 1)
        probs = similarities(eyes.encode([image], torch.tensor([i]), 0).float(), words, settings.temperature)
        found = damp(
            probs,
            torch.from_numpy(data.observed[[i]]),
            local_threshold=settings.local_threshold,
            global_threshold=settings.global_threshold,
            top_k=settings.top_k,
            negative_ratio=settings.negative_ratio,
        )
        assert table.scores["clip"][row] == pytest.approx(probs[0, 0].numpy(), abs=2e-3)
        assert table.scores["damp"][row] == pytest.approx(found.final[0].numpy(), abs=2e-3)
        assert (table.labels["damp"][row] == found.pseudo[0].numpy()).mean() > 0.95
    assert table.judges == ["damp", "clip"] and table.place.min() >= 0 and table.place.max() <= 1


def test_a_run_adds_its_model_and_its_epochs(data, run):
    settings = recipe("glyphs", "aevlp", **SMALL)
    table = open_table(data, "train", settings, run, bank_root=False)
    stacked = np.stack([np.load(f)["pseudo"] for f in sorted((run / "pseudo").glob("*.npz"))])
    assert table.epochs == 2 and (table.positive == (stacked == 1).sum(0)).all()
    model, kept, _ = evidence.load_run(run)
    probs = batches.predict(model, data, data.splits["train"], kept["recipe"]).numpy()
    assert table.scores["model"] == pytest.approx(probs, abs=1e-6)
    assert (table.labels["model"] == (probs >= table.thresholds["model"])).all()
    test = open_table(data, "test", settings, run, bank_root=False)
    assert test.scores["model"] == pytest.approx(np.load(run / "predictions.npz")["probs"], abs=1e-6)
    assert test.epochs == 0 and "moved between epochs" not in test.possible()
    assert (run / "table_train.npz").is_file() and (run / "table_test.npz").is_file()


def test_a_table_is_read_and_not_computed_again(data, run, monkeypatch):
    settings = recipe("glyphs", "aevlp", **SMALL)
    first = open_table(data, "train", settings, run, bank_root=False)
    with monkeypatch.context() as patch:
        patch.setattr("aevlp.table.build", lambda *_: pytest.fail("computed again"))
        again = open_table(data, "train", settings, run, bank_root=False)
    for name in ("ids", "names", "given", "truth", "place", "positive"):
        assert (getattr(again, name) == getattr(first, name)).all()
    assert again.key == first.key and (again.scores["damp"] == first.scores["damp"]).all()
    assert open_table(data, "train", replace(settings, temperature=0.2), run, compute=False) is None, (
        "of another recipe"
    )
    other = replace(data, observed=np.roll(data.observed, 1, 0))
    assert open_table(other, "train", settings, run, compute=False) is None, "of other labels"
    (run / "table_train.npz").write_bytes(b"PK torn")
    with pytest.raises(AevlpError, match="not a table"):
        read_table(run / "table_train.npz")
    assert len(open_table(data, "train", settings, run, bank_root=False)) == 10, "a torn file is computed again"


def test_without_a_run_the_table_lies_with_the_downloads(data, tmp_path, monkeypatch):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path))
    settings = recipe("glyphs", "aevlp", **SMALL)
    open_table(data, "val", settings, bank_root=tmp_path / "banks")
    (kept,) = (tmp_path / "tables").glob("*.npz")
    assert read_table(kept).split == "val"


def test_cancelling_keeps_the_embeddings(data, tmp_path, monkeypatch):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path))
    monkeypatch.setattr("aevlp.table.FEW", 4)
    settings, seen = recipe("glyphs", "aevlp", **SMALL), []

    def impatient(done, total, what):
        seen.append((done, total, what))
        if done == 8:
            raise Cancelled

    with pytest.raises(Cancelled):
        open_table(data, "train", settings, bank_root=tmp_path / "banks", tell=impatient)
    assert not (tmp_path / "tables").exists()
    again = []
    open_table(data, "train", settings, bank_root=tmp_path / "banks", tell=lambda *a: again.append(a))
    assert (8, 10, "views through CLIP") in seen
    assert max(total for _, total, what in again if what == "views through CLIP" and total < 10) == 2, "two are left"


def test_queries_at_10000_pictures_and_80_classes():
    table = made_up(10_000, 80)
    table.find(Query("model", sort="suspicion"))
    times = {}
    queries = {f"filter: {v}": Query("model", v, "class 7") for v in table.possible()}
    queries |= {f"any class: {v}": Query("model", v) for v in table.possible()}
    queries |= {f"sort: {c}": Query("model", sort=c, falling=True) for c in COLUMNS}
    queries |= {f"sort of a class: {c}": Query("model", class_name="class 7", sort=c) for c in COLUMNS}
    queries |= {"search": Query("model", text="0123"), "lasso": Query("model", chosen=tuple(range(0, 10_000, 5)))}
    for name, query in queries.items():
        start = time.perf_counter()
        table.find(query)
        times[name] = time.perf_counter() - start
    for kind in MATRICES:
        start = time.perf_counter()
        table.matrix(kind, "model")
        times[f"matrix: {kind}"] = time.perf_counter() - start
    start = time.perf_counter()
    table.errors("model")
    times["likely label errors"] = time.perf_counter() - start
    print("\n10,000 pictures x 80 classes, milliseconds")
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        print(f"{1000 * seconds:7.1f}  {name}")
    assert max(times.values()) < 1.0, "ten times the aim of 100 ms"
