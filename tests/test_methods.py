"""The registry, and what objectives remember: worked out by hand, and again after a save."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from aevlp import losses
from aevlp.data import AevlpError
from aevlp.labelers import LABELERS, Batch, LargeLossLabeler
from aevlp.methods import METHODS, OBJECTIVES, TABLE1, TABLE2, build_objective, get, merged
from aevlp.models import Output
from aevlp.recipes import recipe

N, C = 6, 4
OBSERVED = torch.zeros(N, C, dtype=torch.int8).scatter_(1, torch.tensor([[0], [1], [2], [3], [0], [1]]), 1)
TRUTH = (OBSERVED | (torch.arange(N * C).reshape(N, C) % 3 == 0)).to(torch.int8)


def make(name, observed=OBSERVED, truth=None, seed=0, dataset="glyphs", **changes):
    made = recipe(dataset, name, **{"epochs": 3, "expected_positives": 2.0, **changes})
    return build_objective(name, made, *observed.shape, observed, truth, seed)


def batch_of(rows, observed=OBSERVED):
    rows = torch.tensor(rows)
    return Batch(ids=rows + 100, rows=rows, images=[], observed=observed[rows])


def logits_like(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).requires_grad_()


def output_of(name, logits):
    "What a classifier gives for `name`: latents where its head has them."
    b, c = logits.shape
    if name == "mime":
        return Output(logits, torch.full((b, c, 3), 0.5), torch.full((b, c, 3), -0.1))
    if name == "smile":
        beta = torch.linspace(0.5, 2, b * c).reshape(b, c)
        return Output(logits, torch.full((b, 3), 0.5), torch.full((b, 3), -0.1), beta, beta.flip(0))
    return logits


def nothing(b=None):
    return torch.zeros(N if b is None else b, C, dtype=torch.int8)


# ---- the registry

TABLES = """
full 89.42 76.78 52.08 30.90
an 85.89 64.92 42.27 18.31
role 87.77 67.04 41.63 13.66
em 89.09 70.70 47.15 20.85
em-apl 89.19 70.87 47.59 21.84
boostlu-ll-r 89.29 72.89 49.59 19.8
smile 86.31 63.33 43.61 18.61
mime 89.20 72.92 48.74 21.89
gr 89.83 73.17 49.08 21.64
vlpl 89.10 71.45 49.55 24.02
aevlp 90.46 73.54 50.70 24.89
bce+random 86.84 67.46 41.23 10.69
gpr+random 87.33 70.00 43.60 14.98
gpr+vlpl 89.52 72.83 49.93 24.22
ll-ct 89.00 70.50 48.00 20.40
gpr+ll-ct 89.5 71.66 47.72 20.41
bce+damp 88.72 71.89 48.60 24.01
"""


def test_reference_numbers():
    rows = {name: tuple(map(float, values)) for name, *values in map(str.split, TABLES.strip().splitlines())}
    assert {m.name: tuple(m.reference.values()) for m in METHODS.values() if m.reference} == rows
    assert set(TABLE1) | set(TABLE2) == set(rows) and len(TABLE1) == 11 and len(TABLE2) == 8
    assert all(tuple(m.reference) in ((), ("voc", "coco", "nus", "cub")) for m in METHODS.values())
    asked = {"clip", "clip-views", "clip-damp", "clip-tokens", "clip-piaa"}
    assert {m.name for m in METHODS.values() if m.scorer} == asked
    beside = {m.name for m in METHODS.values() if not m.reference}
    assert {"an-ls", "wan", "epr", "ll-r", "ll-cp", "aevlp-augmented"} <= beside


def test_every_name_and_combination_is_a_method():
    for method in METHODS.values():
        assert get(method.name) is method
    for loss, labeler in product(OBJECTIVES, LABELERS):
        method = get(f"{loss}+{labeler}")
        assert (method.objective, method.labeler) == (loss, labeler)
        assert method.head == {"boostlu-ll-r": "boostlu", "mime": "mime", "smile": "smile"}.get(loss, "linear")
    assert get("gpr+damp") is METHODS["aevlp"]


@pytest.mark.parametrize(
    "name, says",
    [
        ("aevpl", "method.*'aevlp'"),
        ("gppr+damp", "loss.*'gpr'"),
        ("gpr+dammp", "labeler.*'damp'"),
        ("em+apl", "labeler"),
        ("", "method"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(AevlpError, match=says) as caught:
        get(name)
    assert "\n" not in str(caught.value)


# ---- every objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_is_finite_and_has_a_gradient(name):
    observed = OBSERVED.clone()
    observed[0, 3], observed[2] = -1, 0  # an observed negative, a row without any label
    objective = make(name, observed, TRUTH)
    for epoch in (1, 2):
        objective.start_epoch(epoch, 3)
        assert (objective.epoch, objective.epochs) == (epoch, 3)
        logits, pseudo = logits_like((4, C), epoch), nothing(4)
        pseudo[1, 0], pseudo[3, 2], pseudo[2, 1] = 1, 1, -1
        loss = objective.loss(output_of(name, logits), batch_of([0, 1, 2, 5], observed), pseudo)
        loss.backward()
        assert loss.ndim == 0 and torch.isfinite(loss) and logits.grad.abs().sum() > 0
        objective.end_epoch(epoch, lambda: torch.rand(N, C, generator=torch.Generator().manual_seed(1)).numpy())


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "full"])
def test_pseudo_labels_reach_every_loss(name):
    objective, logits, pseudo = make(name), logits_like((4, C)), nothing(4)
    objective.start_epoch(1, 3)
    pseudo[0, 2] = 1
    with torch.no_grad():
        torch.manual_seed(0)
        without = objective.loss(output_of(name, logits), batch_of([0, 1, 2, 3]), nothing(4))
        torch.manual_seed(0)
        assert objective.loss(output_of(name, logits), batch_of([0, 1, 2, 3]), pseudo) != without


def test_merged_never_overrides_what_was_observed():
    observed, pseudo = torch.tensor([[1, -1, 0, 0, 0]]), torch.tensor([[-1, 1, 1, -1, 0]], dtype=torch.int8)
    assert merged(observed, pseudo).tolist() == [[1, -1, 1, -1, 0]]


def test_equal_rows():
    batch, logits, pseudo = batch_of([0, 1, 2, 3]), logits_like((4, C)).detach(), nothing(4)
    pseudo[0, 1] = pseudo[2, 3] = 1

    def value(name, pseudo, epoch=2, **changes):
        objective = make(name, **changes)
        objective.start_epoch(epoch, 3)
        return objective.loss(logits, batch, pseudo)

    torch.testing.assert_close(value("an", pseudo), value("bce", pseudo))
    torch.testing.assert_close(value("gpr", nothing(4), eta=0.0), value("gr", nothing(4)))
    torch.testing.assert_close(value("em-apl", nothing(4)), value("em", nothing(4)))
    batch.logits = logits
    corrected = LargeLossLabeler(5.0).labels(batch, 2)
    assert corrected.sum() == 1
    torch.testing.assert_close(value("ll-ct", nothing(4), ll_delta=5.0), value("bce", corrected))


def test_full_labels_are_needed_and_used():
    with pytest.raises(AevlpError, match="needs the full labels"):
        make("full")
    logits = logits_like((2, C)).detach()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, TRUTH[[1, 4]].float())
    torch.testing.assert_close(make("full", truth=TRUTH).loss(logits, batch_of([1, 4]), nothing(2)), expected)


def test_an_unknown_label_of_a_full_set_says_nothing():
    logits, truth = logits_like((2, C)), TRUTH.clone()
    truth[1, 2] = truth[4, 0] = -1
    loss = make("full", truth=truth).loss(logits, batch_of([1, 4]), nothing(2))
    loss.backward()
    known = truth[[1, 4]] >= 0
    p = logits.detach().sigmoid()
    by_hand = -torch.where(truth[[1, 4]] == 1, p.log(), (1 - p).log())[known].mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    assert (logits.grad[~known] == 0).all() and (logits.grad[known] != 0).all()


def test_epsilon_is_inside_the_logarithms_and_nowhere_else():
    far, small = torch.full((1, C), -1e4), dict(epsilon=1e-5)
    assert make("an", **small).loss(far, batch_of([0]), nothing(1)) < 11.6  # -log 1e-5 = 11.513
    logits = torch.tensor([[-15.0]], requires_grad=True)  # one entry, nothing observed, VOC's first epoch
    unknown = torch.zeros(1, 1, dtype=torch.int8)
    voc = recipe("voc", "gr", epsilon=1e-7)
    gr = build_objective("gr", voc, 1, 1, unknown)
    gr.start_epoch(1, 8)
    value = gr.loss(logits, Batch(torch.tensor([0]), torch.tensor([0]), [], unknown), unknown)
    value.backward()
    assert value.item() == pytest.approx(1.589, abs=5e-4)  # by the released code
    assert logits.grad.item() == pytest.approx(-0.098, abs=5e-4)


def test_role_s_table_has_the_epsilon_too():
    logits, theta = torch.zeros(1, 1), torch.tensor([[-12.0]], requires_grad=True)
    losses.role(logits, theta, torch.ones(1, 1, dtype=torch.int8), 1.5, epsilon=1e-5).backward()
    exact = torch.tensor([[-12.0]], requires_grad=True)
    losses.role(logits, exact, torch.ones(1, 1, dtype=torch.int8), 1.5).backward()
    q = torch.sigmoid(torch.tensor(-12.0))
    inside = q * (1 - q) / (q + 1e-5)  # minus the slope of log(q + epsilon)
    outside = q * (1 - q) / (1 - q + 1e-5)
    regular = 2 * (q - 1.5) * q * (1 - q)
    expected = 0.5 * (-inside) + 0.5 * (-0.5 * inside + 0.5 * outside) + 0.5 * regular
    assert theta.grad.item() == pytest.approx(expected.item(), rel=1e-4)
    assert exact.grad.item() < 1.3 * theta.grad.item() < 0  # without it the slope is steeper


def test_one_known_label_of_a_full_set_is_the_mean_and_none_is_nothing():
    logits, truth = logits_like((2, C)), torch.full((N, C), -1)
    assert make("full", truth=truth).loss(logits, batch_of([1, 4]), nothing(2)).item() == 0
    truth[4, 2] = 1
    loss = make("full", truth=truth).loss(logits, batch_of([1, 4]), nothing(2))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-logits[1, 2].item())), rel=1e-5)


def test_an_objective_that_was_told_nothing_is_in_epoch_1_of_seed_0():
    logits, pseudo = logits_like((4, C)).detach(), nothing(4)
    corrections = make("ll-r", ll_delta=20.0).loss(logits, batch_of([0, 1, 2, 3]), pseudo)
    torch.testing.assert_close(corrections, make("an").loss(logits, batch_of([0, 1, 2, 3]), pseudo))
    made = recipe("glyphs", "role", expected_positives=2.0)
    first = make("role", seed=0).theta
    assert torch.equal(build_objective("role", made, N, C, OBSERVED).theta, first)
    assert torch.equal(OBJECTIVES["role"](made, N, C, OBSERVED).theta, first)


def test_nobody_is_asked_for_predictions_that_none_needs():
    def predict():
        raise AssertionError("a pass over the training split")

    for name in OBJECTIVES:
        objective = make(name, truth=TRUTH, apl_warmup=2, mime_warmup=2)
        objective.start_epoch(1, 3)
        objective.end_epoch(1, predict)


# ---- hand-computed examples


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_role_two_epochs():
    observed = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    objective = make("role", observed, expected_positives=1.5)
    start = objective.theta.detach().double().tolist()
    assert start[0][0] == pytest.approx(math.log(0.995 / 0.005)) and abs(start[0][1]) <= math.log(1.5)
    (group,) = objective.param_groups(0.02)
    assert group["lr"] == pytest.approx(0.2) and group["params"][0] is objective.theta
    optimizer, logits = torch.optim.SGD([group]), [[0.3, -0.4], [1.2, 0.1]]
    table, y, m = [row[:] for row in start], observed.tolist(), 1.5
    for epoch in (1, 2):
        objective.start_epoch(epoch, 2)
        optimizer.zero_grad()
        objective.loss(torch.tensor(logits), batch_of([0, 1], observed), nothing(2)[:, :2]).backward()
        optimizer.step()
        q = [[sigmoid(t) for t in row] for row in table]
        excess = sum(map(sum, q)) / 2 - m
        for n, i in product(range(2), range(2)):  # d/dtheta of nl(q), of CE(p, q), of R(q), each with weight 1/2
            confirm = -y[n][i] * (1 - q[n][i]) / 4
            agree = (q[n][i] - sigmoid(logits[n][i])) / 4
            regular = 2 * excess / 2**2 * q[n][i] * (1 - q[n][i]) / 2
            table[n][i] -= 0.2 * 0.5 * (confirm + agree + regular)
        torch.testing.assert_close(objective.theta.detach().double(), torch.tensor(table).double(), atol=1e-5, rtol=0)


def test_role_table_comes_from_the_seed_and_knows_negatives():
    observed = torch.tensor([[1, 0, -1]] * 4, dtype=torch.int8)
    first, again, other = (make("role", observed, seed=s).theta.detach() for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first[:, 1], other[:, 1])
    torch.testing.assert_close(first[:, 2].sigmoid(), torch.full((4,), 0.005))


def test_apl_two_rounds():
    observed = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.int8)
    objective = make("em-apl", observed, apl_warmup=1, apl_proportion=0.9, em_alpha=0.1, apl_beta=0.5)
    rounds = (  # U = 4 unknown per class, 2 rounds: floor(0.9 * 4 / 2) = 1 image per class and round
        [[0.01, 0.5], [0.3, 0.02], [0.2, 0.4], [0.6, 0.1], [0.7, 0.9]],  # observed ones do not count: 0.2 and 0.1
        [[0.01, 0.5], [0.8, 0.02], [0.05, 0.4], [0.6, 0.01], [0.7, 0.45]],  # those two are taken: 0.6 and 0.4
    )
    chosen = ({(2, 0): 0.2, (3, 1): 0.1}, {(2, 0): 0.2, (3, 1): 0.1, (3, 0): 0.6, (2, 1): 0.4})
    for epoch, (probs, expected) in enumerate(zip(rounds, chosen, strict=True), 1):
        objective.start_epoch(epoch, 3)
        assert objective.needs_predictions(epoch)
        objective.end_epoch(epoch, lambda probs=probs: probs)
        found = {(n, i): objective.soft[n, i].item() for n, i in (~objective.soft.isnan()).nonzero().tolist()}
        assert found == pytest.approx(expected)
    objective.start_epoch(3, 3)
    assert not objective.needs_predictions(3)
    logits = [[0.5, -1.0], [2.0, 0.3]]  # rows 2 and 3, all four entries soft negatives by now
    terms = [
        -0.5 * (h * math.log(sigmoid(s)) + (1 - h) * math.log(1 - sigmoid(s)))
        for s, h in zip(sum(logits, []), (0.2, 0.4, 0.6, 0.1), strict=True)
    ]
    loss = objective.loss(torch.tensor(logits), batch_of([2, 3], observed), nothing(2)[:, :2])
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-6)


def test_ll_cp_two_epochs():
    observed = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.int8)
    objective = make("ll-cp", observed, ll_delta=16.0)  # k = ceil(2 * 3 * 16 %) = 1

    def nl(p):
        return -math.log(p)

    def step(epoch, logits):
        objective.start_epoch(epoch, 3)
        return objective.loss(torch.tensor(logits), batch_of([0, 1], observed), nothing(2)[:, :3]).item()

    first = [[1.0, 2.0, -1.5], [0.5, -1.0, -2.5]]
    p = [[sigmoid(s) for s in row] for row in first]
    rest = nl(p[0][0]) + nl(1 - p[0][2]) + nl(1 - p[1][0]) + nl(p[1][1]) + nl(1 - p[1][2])
    assert step(1, first) == pytest.approx((rest + nl(1 - p[0][1])) / 6, abs=1e-6)
    assert not objective.corrected.any()
    assert step(2, first) == pytest.approx((rest + nl(p[0][1])) / 6, abs=1e-6)  # (0, 1) has the largest loss
    assert objective.corrected.tolist() == [[0, 1, 0], [0, 0, 0]]
    second = [[1.0, -3.0, -2.5], [-2.0, 0.0, -3.5]]  # (0, 1) stays though its loss is small now; (1, 0) is next
    p = [[sigmoid(s) for s in row] for row in second]
    positive = nl(p[0][0]) + nl(p[0][1]) + nl(p[1][0]) + nl(p[1][1])
    assert step(3, second) == pytest.approx((positive + nl(1 - p[0][2]) + nl(1 - p[1][2])) / 6, abs=1e-6)
    assert objective.corrected.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_mime_two_epochs():
    observed = torch.tensor([[1, 0, 0], [0, 1, -1]], dtype=torch.int8)
    objective = make("mime", observed, mime_warmup=1, mime_threshold=0.9, mime_beta=0.01)
    rounds = ([[0.2, 0.95, 0.9], [0.91, 0.1, 0.99]], [[0.2, 0.1, 0.97], [0.0, 0.0, 0.0]])
    grown = ([[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 0]])  # never less; an observed negative stays
    for epoch, (probs, labels) in enumerate(zip(rounds, grown, strict=True), 1):
        objective.start_epoch(epoch, 3)
        objective.end_epoch(epoch, lambda probs=probs: probs)
        assert objective.labels.tolist() == labels
    assert not objective.needs_predictions(3)
    logits, mu, log_std = torch.tensor([[0.5, -1.0, 2.0]]), 0.3, -0.2
    p = [sigmoid(s) for s in (0.5, -1.0, 2.0)]
    bottleneck = -0.5 * (1 + 2 * log_std - mu**2 - math.exp(2 * log_std))
    expected = (-math.log(p[0]) - math.log(p[1]) - math.log(1 - p[2])) / 3 + 0.01 * bottleneck
    output = Output(logits, torch.full((1, 3, 4), mu), torch.full((1, 3, 4), log_std))
    loss = objective.loss(output, batch_of([1], observed), nothing(1)[:, :3])
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gpr_averages_the_regulariser_over_the_set():
    objective = make("gpr", eta=2.0, expected_positives=1.0)
    plain, seen = make("gpr", eta=0.0), {}
    for seed, rows in enumerate(([0, 1], [2, 3], [0, 4])):
        for o in (objective, plain):
            o.start_epoch(1, 3)
        logits = logits_like((2, C), seed)
        args = (batch_of(rows), nothing(2))
        extra = objective.loss(logits, *args) - plain.loss(logits, *args)
        p = logits.detach().sigmoid()
        seen |= dict(zip(rows, p.sum(1).tolist(), strict=True))  # row 0 is replaced the second time
        excess = (sum(seen.values()) / len(seen) - 1.0) / C
        assert extra.item() == pytest.approx(2.0 * excess**2, rel=1e-4)
    (gradient,) = torch.autograd.grad(extra, logits)
    torch.testing.assert_close(gradient, 2.0 * 2 * excess / C * p * (1 - p) / 2, rtol=1e-4, atol=1e-6)
    batch = make("gpr", eta=2.0, expected_positives=1.0, regulariser_over="batch")
    batch.start_epoch(1, 3)
    batch.loss(logits_like((2, C), 9), batch_of([5, 3]), nothing(2))  # of a batch before it nothing stays
    extra = batch.loss(logits, *args) - plain.loss(logits, *args)
    assert extra.item() == pytest.approx(2.0 * ((p.sum() / 2 - 1.0) / C).item() ** 2, rel=1e-4)


def test_gpr_follows_the_schedule_and_the_ablation_of_v4():
    logits, pseudo = logits_like((2, C)).detach(), nothing(2)
    pseudo[0, 1], pseudo[1, 3] = 1, -1
    values = {}
    for v4, epoch in product(("clip", "constant"), (1, 3)):
        objective = make("gpr", v4=v4, eta=0.0)
        objective.start_epoch(epoch, 3)
        values[v4, epoch] = objective.loss(logits, batch_of([0, 1]), pseudo)
    assert values["clip", 1] != values["clip", 3] != values["constant", 3]
    made = recipe("glyphs", "gpr", eta=0.0)
    names = "w0 wT b0 bT mu0 sigma0 muT sigmaT".split()
    now = losses.gr_schedule(3, 3, **{k: getattr(made, k) for k in names})
    rest = dict(q1=made.q1, q2=made.q2, q3=made.q3, eta=0.0, expected_positives=2.0, **now)
    constant = losses.gpr(logits, OBSERVED[:2], pseudo, lambda1=1.0, lambda2=1.0, **rest)
    torch.testing.assert_close(values["constant", 3], constant)
    objective = make("gpr", lambda1=0.3, lambda2=0.7, eta=0.0)
    objective.start_epoch(3, 3)
    clip = losses.gpr(logits, OBSERVED[:2], pseudo, lambda1=0.3, lambda2=0.7, **rest)
    torch.testing.assert_close(objective.loss(logits, batch_of([0, 1]), pseudo), clip)


# ---- state survives


def live(objective, name, epoch):
    "One epoch of two steps."
    objective.start_epoch(epoch, 3)
    groups = objective.param_groups(0.1)
    optimizer, out = torch.optim.SGD(groups) if groups else None, []
    for step, rows in enumerate(([0, 1, 2], [3, 4, 5])):
        torch.manual_seed(10 * epoch + step)
        loss = objective.loss(output_of(name, logits_like((3, C), 10 * epoch + step)), batch_of(rows), nothing(3))
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        out.append(loss.item())
    objective.end_epoch(epoch, lambda: torch.rand(N, C, generator=torch.Generator().manual_seed(epoch)))
    return out


CHANGES = {"em-apl": dict(apl_warmup=1), "mime": dict(mime_warmup=1, mime_threshold=0.5), "ll-cp": dict(ll_delta=10.0)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_objective_goes_on_the_same(name):
    through, first = (make(name, truth=TRUTH, **CHANGES.get(name, {})) for _ in range(2))
    expected = [live(through, name, e) for e in (1, 2, 3)]
    live(first, name, 1)
    live(first, name, 2)
    stored = load(save({k: v.contiguous() for k, v in first.state_dict().items()}))
    resumed = make(name, truth=TRUTH, seed=7, **CHANGES.get(name, {}))
    resumed.load_state_dict(stored)
    if name in ("role", "em-apl", "ll-cp", "mime"):
        fresh = make(name, truth=TRUTH, seed=7, **CHANGES.get(name, {}))
        assert live(fresh, name, 3) != expected[2], "the state does not matter in this example"
    assert live(resumed, name, 3) == expected[2]


def test_saved_state_does_not_change_afterwards():
    objective = make("ll-cp", ll_delta=10.0)
    saved = objective.state_dict()
    live(objective, "ll-cp", 2)
    assert saved["corrected"].sum() == 0 and objective.corrected.sum() > 0
    assert isinstance(objective.observed, torch.Tensor) and SimpleNamespace(**saved)
