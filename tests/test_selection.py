"""Rules of selection against scikit-learn, scipy and loops; candidates against a run; the page from made-up choices."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score
from test_experiments import executed

from aevlp import metrics, plots, results, selection, train
from aevlp.data import AevlpError


def split(seed, n=220, classes=6):
    """Scores with ties, a truth, and one label of each picture."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, classes)) < 0.3).astype(int)
    truth[np.arange(n), rng.integers(0, classes, n)] = 1
    given = np.zeros_like(truth)
    for i, row in enumerate(truth):
        given[i, rng.choice(np.flatnonzero(row))] = 1
    return (truth + rng.normal(size=truth.shape)).round(1), given, truth


@pytest.mark.parametrize("seed", range(3))
def test_rules_equal_their_definitions(seed):
    probs, given, truth = split(seed)
    names, drawn = selection.review_draws(len(probs), repeats=2, seed=seed)
    said = selection.rule_scores(probs, given, truth, (names, drawn))
    columns = range(probs.shape[1])

    def ap(labels, rows):
        return np.mean(
            [average_precision_score(labels[rows, c], probs[rows, c]) for c in columns if labels[rows, c].any()]
        )

    everything = slice(None)
    assert said["clean mAP"] == pytest.approx(100 * ap(truth, everything))
    assert said["AP"] == pytest.approx(100 * ap(given, everything))
    assert said["AUC"] == pytest.approx(100 * np.mean([roc_auc_score(given[:, c], probs[:, c]) for c in columns]))
    assert said["rank"] == pytest.approx(-rankdata(-probs, axis=1)[given == 1].mean())
    assert said["hit@3"] == pytest.approx(100 * metrics.recall_at(3, probs, given).mean())
    for name, column in zip(names, drawn.T, strict=True):
        assert column.sum() == int(name.split()[0]) and set(column.tolist()) == {0.0, 1.0}
        assert said[name] == pytest.approx(100 * ap(truth, column == 1)), name
    assert {n.split(" #")[0] for n in said} == set(selection.RULES)


def test_reviews_need_as_many_pictures():
    with pytest.raises(AevlpError, match="199 validation pictures are fewer than the 200"):
        selection.review_draws(199)


def test_regrets_equal_plain_loops():
    rng = np.random.default_rng(0)
    rows = [
        dict(method=m, seed=s, observation=o, epoch=e, test_map=rng.uniform(50, 90), AUC=rng.random())
        | {"clean mAP": rng.random(), "20 reviewed #0": rng.random(), "20 reviewed #1": rng.random()}
        for o in ("uniform", "size") for s in (0, 1) for m in "abc" for e in range(1, 5)
    ]  # fmt: skip
    found = selection.regrets(pd.DataFrame(rows)).set_index(["scope", "observation", "seed", "method", "rule"]).regret

    def best(part, rule):
        return max(part, key=lambda r: r[rule])["test_map"]

    for o in ("uniform", "size"):
        for s in (0, 1):
            every = [r for r in rows if r["observation"] == o and r["seed"] == s]
            top = max(r["test_map"] for r in every)
            assert found["method", o, s, "", "AUC"] == pytest.approx(top - best(every, "AUC"))
            two = np.mean([top - best(every, f"20 reviewed #{i}") for i in (0, 1)])
            assert found["method", o, s, "", "20 reviewed"] == pytest.approx(two)
            kept = [max((r for r in every if r["method"] == m), key=lambda r: r["AUC"]) for m in "abc"]
            steps = np.mean([top - best(kept, f"20 reviewed #{i}") for i in (0, 1)])
            assert found["method", o, s, "", "AUC, then 20 reviewed"] == pytest.approx(steps)
            for m in "abc":
                run = [r for r in every if r["method"] == m]
                expected = max(r["test_map"] for r in run) - best(run, "clean mAP")
                assert found["epoch", o, s, m, "clean mAP"] == pytest.approx(expected)
    assert (found >= 0).all()
    means = [found["epoch", "size", s, :, "AUC"].mean() for s in (0, 1)]
    shown = selection.prices(found.reset_index(), "epoch")
    assert shown.loc["AUC", "size"] == results.spread(means)


def test_candidates_are_the_epochs_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "REVIEWED", (5, 10))
    data = tiny.shapes(tmp_path / "pictures")
    given = tiny.CLIP | dict(backbone="frozen", view_epochs=1, epochs=4, lr=5e-3, head_lr=5e-3)
    recipe = tiny.small("an", **given)
    found = selection.candidates(data, "an", recipe, 0, every=1, bank=tmp_path / "banks")
    banks = tmp_path / "banks"
    made = train.fit(data, "an", recipe, 0, tmp_path / "run", device="cpu", bank=banks, progress=False)
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert found.epoch.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found["clean mAP"], history.val_map, atol=1e-9)
    np.testing.assert_allclose(found["AUC"], history.val_auc_observed, atol=1e-9)
    best = found.set_index("epoch").test_map[made["best_epoch"]]
    assert best == pytest.approx(made["test_map"], abs=1e-9)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["select_by"] == "map"


def test_choices_among_finished_runs_equal_plain_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "REVIEWED", (20,))
    rows, said = [], []
    for k in range(6):
        probs, given, truth = split(k % 2)
        probs = probs + np.random.default_rng(k).normal(size=probs.shape)
        kept, past = dict(val_probs=probs, val_observed=given, val_targets=truth), dict(val_map=[10.0 + k, 30, 20])
        (tmp_path / str(k)).mkdir()
        np.savez(tmp_path / str(k) / "predictions.npz", **kept)
        pd.DataFrame(past | dict(val_auc_observed=[1, 2, 3.0])).to_csv(tmp_path / str(k) / "history.csv")
        rows.append(dict(label=f"m{k // 2}", seed=k % 2, test_map=50.0 + 3 * k, folder=str(tmp_path / str(k))))
        auc = np.mean([roc_auc_score(given[:, c], probs[:, c]) for c in range(6)])
        said.append((k % 2, auc, 50.0 + 3 * k))
    found = selection.among_runs(pd.DataFrame(rows))
    assert (found[found.scope == "epoch of a run"].regret == 10).all()
    for seed in (0, 1):
        every = [s for s in said if s[0] == seed]
        lost = max(s[2] for s in every) - max(every, key=lambda s: s[1])[2]
        one = found[(found.scope == "run") & (found.seed == seed)].set_index("rule").regret
        assert one["AUC"] == pytest.approx(lost) and set(one.index) == set(selection.RULES) - {
            "50 reviewed",
            "100 reviewed",
            "200 reviewed",
        }


def test_the_experiment_trains_heads_unless_told_otherwise(tmp_path, monkeypatch):
    seen = []

    def candidate(data, method, recipe, seed, every):
        seen.append((method, recipe.backbone, recipe.epochs, recipe.view_seed))
        said = {rule: 1.0 for rule in selection.RULES if "reviewed" not in rule} | {"20 reviewed #0": 1.0}
        return pd.DataFrame([dict(epoch=3, test_map=50.0) | said])

    monkeypatch.setattr(selection, "candidates", candidate)
    monkeypatch.setattr("aevlp.runs.load_data", lambda params: None)
    found = selection.experiment(["an", "gr"], [0], ["size"], folder=tmp_path)
    assert seen == [("an", "frozen", 60, 0), ("gr", "frozen", 60, 0)] and (found.regret == 0).all()
    selection.experiment(["an", "gr"], [0], ["size"], folder=tmp_path)
    assert len(seen) == 2  # kept


def choices():
    """Made-up regrets of which the page must find the best."""
    rng, rows = np.random.default_rng(0), []
    two = [f"AUC, then {n} reviewed" for n in selection.REVIEWED]
    for o, s in [(o, s) for o in ("uniform", "size") for s in (0, 1, 2)]:
        for rule in selection.RULES:
            price = {"clean mAP": 0.5, "AUC": 1.0, "100 reviewed": 0.9}.get(rule, 3.0) + 0.1 * rng.random()
            place = dict(observation=o, seed=s, rule=rule)
            rows += [dict(scope="epoch", method=m, regret=price, **place) for m in ("an", "gr")]
        place = dict(scope="method", method="", observation=o, seed=s)
        rows += [dict(rule=r, regret=4.0, **place) for r in [*selection.RULES, *two]]
        rows += [dict(rule=r, regret=2.0, **place | dict(scope="run")) for r in selection.RULES]
        rows += [dict(rule="AUC", regret=1.0, **place | dict(scope="epoch of a run", method="an"))]
    return pd.DataFrame(rows)


def test_the_page_says_what_the_numbers_say(tmp_path, monkeypatch):
    reference = tmp_path / "reference" / "glyphs"
    reference.mkdir(parents=True)
    choices().to_csv(reference / "selection.csv", index=False)
    monkeypatch.setattr(results, "figures_root", lambda: tmp_path)
    space = executed("selection", seeds=[0, 1, 2], figures_dir=str(tmp_path / "made"))
    said = "\n".join(space["lines"])
    assert "AUC (given labels) loses least" in said and "from 100 on it is as good as AUC" in said
    assert "Observed by size" in said and space["n_methods"] == 2
    assert (tmp_path / "made" / "glyphs" / "selection.png").stat().st_size > 10_000
    figure = plots.selection_prices(choices())
    shown = figure.axes[0].containers[0].lines[0].get_xdata()
    means = choices().query("scope == 'epoch' and observation == 'uniform'").groupby("rule", sort=False).regret.mean()
    np.testing.assert_allclose(np.asarray(shown, float), means)
