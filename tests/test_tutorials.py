"""What the tutorials rely on: looks before training, own losses and labelers, and the sweep of paper against code."""

import numpy as np
import pytest
import torch

from aevlp import look, methods, recipes, sweeps
from aevlp.damp import damp
from aevlp.data import AevlpError, LabelledImages
from aevlp.labelers import LABELERS, Batch, Labeler, build_labeler

RNG = np.random.default_rng(0)


def given_one(n, classes, per_row=1):
    observed = np.zeros((n, classes), np.int8)
    for row in observed:
        row[RNG.permutation(classes)[:per_row]] = 1
    return observed


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_recall_of_the_given_label_is_a_loop(per_row, top_k):
    scores, observed = RNG.random((40, 7)).round(1), given_one(40, 7, per_row)
    observed[5] = 0
    table = look.given_recall(scores, observed, [0.0, 0.3, 0.7, 1.0], top_k)
    for row in table.itertuples():
        hits = passed = rows = 0
        for s, o in zip(scores, observed, strict=True):
            if not o.any():
                continue
            rows += 1
            allowed = set(sorted(range(7), key=lambda c: (-s[c], c))[: top_k or 7])
            through = [c for c in allowed if s[c] >= row.threshold]
            passed += len(through)
            hits += sum(o[c] for c in through)
        assert row.recall == pytest.approx(hits / observed.sum())
        assert row.labels == pytest.approx(passed / rows)


def test_what_no_recall_can_be_had_from():
    with pytest.raises(AevlpError, match="no label is given"):
        look.given_recall(np.ones((3, 2)), np.zeros((3, 2)))
    with pytest.raises(AevlpError, match=r"\(3, 2\).*\(2, 2\)"):
        look.given_recall(np.ones((3, 2)), np.ones((2, 2)))


def test_confused_pairs_are_all_pairs_in_order():
    prototypes = torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=(6, 4))), dim=1)
    table = look.confused_names(prototypes, list("abcdef"), top=100)
    assert len(table) == 15 and table.cosine.is_monotonic_decreasing
    for row in table.itertuples():
        i, j = "abcdef".index(row.name), "abcdef".index(row.other)
        assert row.cosine == pytest.approx(float(prototypes[i] @ prototypes[j]))


class Words:
    """A CLIP whose text tower knows one direction per template and class."""

    def __init__(self, table):
        self.table = table

    def encode_text(self, texts):
        return torch.stack([self.table[t] for t in texts])


def test_prompts_are_ranked_by_the_given_label():
    names, pictures = ["a", "b", "c"], torch.eye(3)[[0, 1, 2, 0]]
    observed = np.eye(3, dtype=np.int8)[[0, 1, 2, 0]]
    table = {f"good {n}": torch.eye(3)[i] for i, n in enumerate(names)}
    table |= {f"bad {n}": torch.eye(3)[(i + 1) % 3] for i, n in enumerate(names)}
    found = look.compare_prompts(Words(table), pictures, observed, names, ["bad {}", "good {}"], 0.1, top_k=2)
    assert found.prompt.tolist() == ["good {}", "bad {}"]
    assert found["given label first"].tolist() == [1.0, 0.0]
    assert found["among the first 2"].tolist() == [1.0, 1.0]  # of two classes that are equally far
    assert found["its probability"][0] == pytest.approx(1 / (1 + 2 * np.exp(-10)), abs=1e-6)


def test_damp_is_not_told_the_given_label(tmp_path, monkeypatch):
    probs = torch.from_numpy(RNG.dirichlet(np.ones(4), (5, 3)))
    told = []

    class Blind:
        def scores(self, batch, epoch):
            told.append(batch.observed.abs().sum().item())
            settings = dict(local_threshold=0.9, global_threshold=0.5, top_k=2, negative_ratio=0.0)
            return damp(probs[batch.ids], batch.observed, **settings)

    monkeypatch.setattr(look, "decode", lambda path: np.zeros((4, 4, 3), np.uint8))
    data = LabelledImages("x", list("abcde"), list("wxyz"), given_one(5, 4), None, {"train": np.arange(5)})
    found = look.hidden_scores(Blind(), data, np.arange(5), batch_size=2)
    assert told == [0, 0, 0]
    best = (probs[:, 0] + probs[:, 1:].amax(1)) / 2
    np.testing.assert_allclose(found, best.numpy())


def test_an_own_labeler_and_an_own_loss_are_found_by_name(monkeypatch):
    class Mine(Labeler):
        pass

    class MyLoss(methods.Objective):
        def loss(self, output, batch, pseudo):
            return self.logits(output).sum()

    monkeypatch.setitem(LABELERS, "mine", lambda data, recipe, seed, device, bank_root: Mine())
    monkeypatch.setitem(methods.OBJECTIVES, "my", MyLoss)
    data = LabelledImages("x", ["a"], ["b"], [[1]], None, {"train": [0]})
    assert isinstance(build_labeler("mine", data, recipes.recipe("glyphs", "gpr+mine")), Mine)
    assert (methods.get("my+mine").objective, methods.get("my+mine").labeler) == ("my", "mine")
    made = methods.build_objective("my", recipes.recipe("glyphs", "my"), 1, 1, torch.ones(1, 1))
    batch = Batch(torch.zeros(1), torch.zeros(1), [], torch.ones(1, 1))
    assert made.loss(torch.full((1, 1), 3.0), batch, torch.zeros(1, 1)) == 3
    with pytest.raises(AevlpError, match="the nearest is 'mine'"):
        methods.get("my+min")


def test_the_sweep_of_switches_holds_each_once():
    plan = sweeps.expand("switches", seeds=[0])
    base = plan.params[0]["recipe"]
    changed = [{k: v for k, v in p["recipe"].items() if v != base[k]} for p in plan.params]
    released = recipes.released_switches("glyphs")
    differ = released[(released.field != "") & (released.paper != released.released)]
    assert changed[0] == {}
    assert changed[1:-1] == [{r.field: r.released} for r in differ.itertuples()]
    assert changed[-1] == {r.field: r.released for r in differ.itertuples()}
    assert plan.run.is_unique
