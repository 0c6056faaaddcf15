"""Every loss against float64 loops over entries, gradcheck, extreme logits, and the GR = GPR identity."""

import math

import pytest
import torch
import torch.nn.functional as F

from aevlp import losses

SCHEDULED = dict(w=3.0, b=-2.0, mu=0.7, sigma=0.6)
GR = dict(q1=1.5, q2=0.01, **SCHEDULED)
GPR = dict(**GR, q3=0.9, lambda1=0.3, lambda2=0.6, eta=0.05, expected_positives=2.0)


def batch(seed=0, rows=6, classes=5, scale=3.0):
    """Logits and every combination of observed and pseudo-label, negatives and rows without observation included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    observed = torch.randint(-1, 2, (rows, classes), generator=generator)
    observed[-1] = 0
    pseudo = torch.randint(-1, 2, (rows, classes), generator=generator)
    soft = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    soft[torch.rand(rows, classes, generator=generator) < 0.5] = torch.nan
    theta = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, observed, pseudo, soft, theta


def sigmoid(s):
    return 1 / (1 + math.exp(-s))


INSIDE = {"epsilon": 0.0}  # every logarithm


def log(p):
    return math.log(p + INSIDE["epsilon"])


def entropy(p):
    return -p * log(p) - (1 - p) * log(1 - p)


def gr_entry(p, y):
    if y:
        return -log(p if y == 1 else 1 - p)
    v = math.exp(-((p - 0.7) ** 2) / (2 * 0.6**2))
    k = sigmoid(3 * p - 2)
    return v * ((1 - k) * (1 - (1 - p) ** 1.5) / 1.5 + k * (1 - p**0.01) / 0.01)


def gpr_entry(p, y, pseudo):
    v = math.exp(-((p - 0.7) ** 2) / (2 * 0.6**2))
    if y == 0 and pseudo == -1:
        return v * -log(1 - p)
    if y == 0 and pseudo == 1:
        return min(max(1 - v, 0.3), 0.6) * (-0.1 * log(1 - p) - 0.9 * log(p))
    return gr_entry(p, y)


def vlpl_entry(p, y, pseudo):
    if y:
        return -log(p if y == 1 else 1 - p)
    return {0: -0.2 * entropy(p), 1: 0.7 * (-0.9 * log(p) - 0.1 * log(1 - p)), -1: 0.0}[pseudo]


def apl_entry(p, y, h):
    if y:
        return -log(p if y == 1 else 1 - p)
    return -0.2 * entropy(p) if math.isnan(h) else 0.4 * (-h * log(p) - (1 - h) * log(1 - p))


def ce(target, p):
    return -target * log(p) - (1 - target) * log(1 - p)


ENTRIES = {  # name: (loss of a batch, loss of an entry)
    "bce": (lambda s, y, x, h, **k: losses.bce(s, torch.sigmoid(s.detach()), **k), lambda p, y, x, h, C: entropy(p)),
    "an": (lambda s, y, x, h, **k: losses.an(s, y, **k), lambda p, y, x, h, C: ce(y == 1, p)),
    "an_ls": (lambda s, y, x, h, **k: losses.an_ls(s, y, **k), lambda p, y, x, h, C: ce(0.9 if y == 1 else 0.1, p)),
    "wan": (
        lambda s, y, x, h, **k: losses.wan(s, y, **k),
        lambda p, y, x, h, C: ce(y == 1, p) / (C - 1 if y == 0 else 1),
    ),
    "bce_pl": (
        lambda s, y, x, h, **k: losses.bce_pl(s, y, x, **k),
        lambda p, y, x, h, C: ce(y == 1 or (y == 0 and x == 1), p),
    ),
    "em": (
        lambda s, y, x, h, **k: losses.em(s, y, 0.2, **k),
        lambda p, y, x, h, C: ce(y == 1, p) if y else -0.2 * entropy(p),
    ),
    "apl": (lambda s, y, x, h, **k: losses.apl(s, y, h, 0.2, 0.4, **k), lambda p, y, x, h, C: apl_entry(p, y, h)),
    "vlpl": (
        lambda s, y, x, h, **k: losses.vlpl(s, y, x, alpha=0.2, beta_pos=0.7, **k),
        lambda p, y, x, h, C: vlpl_entry(p, y, x),
    ),
    "gr": (lambda s, y, x, h, **k: losses.gr(s, y, **GR, **k), lambda p, y, x, h, C: gr_entry(p, y)),
    "gpr": (
        lambda s, y, x, h, **k: losses.gpr(s, y, x, **(GPR | {"eta": 0.0}), **k),
        lambda p, y, x, h, C: gpr_entry(p, y, x),
    ),
}


def looped(entry, logits, observed, pseudo, soft):
    rows = zip(logits.tolist(), observed.tolist(), pseudo.tolist(), soft.tolist(), strict=True)
    classes = logits.shape[1]
    values = [[entry(sigmoid(s), y, x, h, classes) for s, y, x, h in zip(*row, strict=True)] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ENTRIES)
def test_matrix_and_mean_equal_loops(name, seed):
    loss, entry = ENTRIES[name]
    logits, observed, pseudo, soft, _ = batch(seed)
    expected = looped(entry, logits, observed, pseudo, soft)
    torch.testing.assert_close(loss(logits, observed, pseudo, soft, reduction="none"), expected)
    torch.testing.assert_close(loss(logits, observed, pseudo, soft), expected.mean())
    single = loss(logits.float(), observed.to(torch.int8), pseudo.to(torch.int8), soft.float(), reduction="none")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENTRIES)
def test_epsilon_is_inside_every_logarithm_and_nowhere_else(monkeypatch, name):
    """As the released codes have it: not in the powers of L2."""
    loss, entry = ENTRIES[name]
    logits, observed, pseudo, soft, _ = batch()
    monkeypatch.setitem(INSIDE, "epsilon", 0.01)
    expected = looped(entry, logits, observed, pseudo, soft)
    found = loss(logits, observed, pseudo, soft, reduction="none", epsilon=0.01)
    torch.testing.assert_close(found, expected)
    assert (found - loss(logits, observed, pseudo, soft, reduction="none")).abs().max() > 0.01


def test_epsilon_reaches_the_losses_of_whole_batches(monkeypatch):
    logits, observed, _, _, theta = batch()
    monkeypatch.setitem(INSIDE, "epsilon", 0.01)
    assert losses.epr(logits, observed, 2, 0.01).item() == pytest.approx(looped_epr(logits, observed, 2))
    assert losses.role(logits, theta, observed, 2, 0.01).item() == pytest.approx(looped_role(logits, theta, observed))
    one, bottleneck = torch.ones(6, 5, 4).double(), losses.mime(logits, observed == 1, *[torch.ones(6, 5, 4)] * 2, 0.1)
    bottleneck = bottleneck - losses.an(logits, observed)
    an = looped(ENTRIES["an"][1], logits, observed, observed, theta).mean()
    torch.testing.assert_close(losses.mime(logits, observed == 1, one, one, 0.1, 0.01), an + bottleneck)


def regulariser(logits, m):
    return ((sum(sigmoid(s) for row in logits.tolist() for s in row) / len(logits) - m) / logits.shape[1]) ** 2


def looped_epr(logits, observed, m):
    pairs = zip(logits.flatten().tolist(), observed.flatten().tolist(), strict=True)
    terms = [ce(y == 1, sigmoid(s)) if y else 0.0 for s, y in pairs]
    return sum(terms) / len(terms) + regulariser(logits, m)


def looped_role(logits, theta, observed, m=2):
    p, q = ([sigmoid(s) for s in x.flatten().tolist()] for x in (logits, theta))
    taught = sum(ce(b, a) + ce(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    return (looped_epr(logits, observed, m) + looped_epr(theta, observed, m) + taught) / 2


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_whole_batches_equal_loops(seed):
    logits, observed, pseudo, soft, theta = batch(seed)
    assert losses.expected_positive_regulariser(logits, 2).item() == pytest.approx(regulariser(logits, 2))
    assert losses.epr(logits, observed, 2).item() == pytest.approx(looped_epr(logits, observed, 2))
    mean = looped(ENTRIES["gpr"][1], logits, observed, pseudo, soft).mean().item()
    assert losses.gpr(logits, observed, pseudo, **GPR).item() == pytest.approx(mean + 0.05 * regulariser(logits, 2))
    assert losses.role(logits, theta, observed, 2).item() == pytest.approx(looped_role(logits, theta, observed))


@pytest.mark.parametrize("k", [0, 1, 4, 1000])
@pytest.mark.parametrize("scheme", ["r", "ct"])
def test_large_losses_equal_loop(scheme, k):
    logits, observed, *_ = batch()
    entries = [(i, j) for i in range(6) for j in range(5)]
    unknown = sorted((e for e in entries if observed[e] == 0), key=lambda e: -logits[e].item())[:k]
    expected = []
    for e in entries:
        p, large = sigmoid(logits[e].item()), e in unknown
        expected.append(0.0 if large and scheme == "r" else ce(large or observed[e].item() == 1, p))
    found = losses.ll(logits, observed, k, scheme, reduction="none")
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert set(map(tuple, losses.large_loss_mask(logits, observed, k).nonzero().tolist())) == set(unknown)


def test_large_losses_take_ties_and_never_known_labels():
    observed = torch.tensor([[1, 0, 0, -1]])
    mask = losses.large_loss_mask(torch.tensor([[5.0, 1.0, 1.0, 9.0]]), observed, 1)
    assert mask.tolist() == [[False, True, True, False]]
    assert not losses.large_loss_mask(torch.zeros(2, 3), torch.ones(2, 3), 4).any()


def test_mime_equals_loop():
    logits, observed, *_ = batch()
    labels, mu, log_std = (observed == 1).int(), torch.randn(6, 5, 4).double(), torch.randn(6, 5, 4).double()
    pairs = zip(mu.flatten().tolist(), log_std.flatten().tolist(), strict=True)
    kl = sum(-0.5 * (1 + 2 * t - m**2 - math.exp(2 * t)) for m, t in pairs) / mu.numel()
    expected = losses.an(logits, observed).item() + 0.1 * kl
    assert losses.mime(logits, labels, mu, log_std, 0.1).item() == pytest.approx(expected)


def test_smile_equals_closed_forms():
    logits, observed, *_ = batch()
    a, b = torch.rand(6, 5).double() * 3 + 0.1, torch.rand(6, 5).double() * 3 + 0.1
    mu, log_std, d = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.rand(6, 5).double() * 0.9 + 0.05
    psi = torch.digamma
    beta = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    beta = beta + (a - 1) * psi(a) + (b - 1) * psi(b) + (2 - a - b) * psi(a + b)
    normal = 0.5 * (mu**2 + torch.exp(log_std) ** 2 - 2 * log_std - 1)
    p, y = torch.sigmoid(logits), (observed == 1).double()
    taught, classifier, enhanced = (F.binary_cross_entropy(*x) for x in ((p, d), (p, y), (d, y)))
    expected = 2 * taught + 3 * classifier + 4 * enhanced + 0.5 * (beta.mean() + normal.mean())
    weights = dict(theta=2, a=3, b=4, kl=0.5)
    torch.testing.assert_close(losses.smile(logits, observed, a, b, mu, log_std, **weights, enhanced=d), expected)
    torch.manual_seed(0)
    first = losses.smile(logits, observed, a, b, mu, log_std, **weights)
    assert first.isfinite() and first != losses.smile(logits, observed, a, b, mu, log_std, **weights)


def test_smile_has_epsilon_in_its_three_cross_entropies_and_bounds_enhanced_labels(monkeypatch):
    logits, observed, *_ = batch()
    one, y = torch.ones(6, 5).double(), (observed == 1).double()
    d = torch.tensor([0.0, 1e-7, 0.3, 1 - 1e-7, 1.0]).double().expand(6, 5)
    inside = d.clamp(1e-6, 1 - 1e-6)
    monkeypatch.setitem(INSIDE, "epsilon", 0.01)
    pairs = ((logits, inside), (logits, y), (torch.logit(inside), y))
    bces = [
        sum(ce(t, sigmoid(s)) for s, t in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 30
        for a, b in pairs
    ]
    found = losses.smile(
        logits, observed, one, one, one[:, :4] * 0, one[:, :4] * 0, theta=2, a=3, b=4, kl=9, enhanced=d, epsilon=0.01
    )
    assert found.item() == pytest.approx(
        2 * bces[0] + 3 * bces[1] + 4 * bces[2]
    )  # no divergence of uniform and N(0, 1)


def test_smile_is_differentiable_with_tiny_concentrations():
    logits, observed, *_ = batch()
    tiny = torch.full((6, 5), 1e-6, requires_grad=True)
    value = losses.smile(
        logits.float(), observed, tiny, tiny * 1, torch.zeros(6, 4), torch.zeros(6, 4), theta=1, a=1, b=1, kl=1e-5
    )
    value.backward()
    assert value.isfinite() and tiny.grad.isfinite().all()


ALL = {
    **{name: loss for name, (loss, _) in ENTRIES.items()},
    "gpr with R": lambda s, y, x, h: losses.gpr(s, y, x, **GPR),
    "epr": lambda s, y, x, h: losses.epr(s, y, 2.0),
    "ll-r": lambda s, y, x, h: losses.ll(s, y, 3, "r"),
    "ll-ct": lambda s, y, x, h: losses.ll(s, y, 3, "ct"),
    "role": lambda s, y, x, h: losses.role(s, s.flip(0) / 2, y, 2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_finite_from_minus_100_to_100(name, dtype):
    values = torch.linspace(-100, 100, 201)
    labels = torch.cartesian_prod(torch.tensor([-1, 0, 1]), torch.tensor([-1, 0, 1]))
    observed, pseudo = (labels[:, i : i + 1].expand(-1, 201) for i in (0, 1))
    soft = torch.where(torch.arange(201) % 2 == 0, torch.nan, torch.linspace(0, 1, 201)).expand(9, -1)
    logits = values.to(dtype).repeat(9, 1).requires_grad_()
    value = ALL[name](logits, observed, pseudo, soft)
    (value * value.numel() * 1000).backward()
    assert value.isfinite().all() and value.dtype == torch.float32
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0 and logits.grad.dtype == dtype


@pytest.mark.parametrize("name", [n for n in ALL if "gr" not in n and "gpr" not in n and n not in ("bce", "role")])
def test_gradients_are_those_of_the_value(name):
    logits, observed, pseudo, soft, _ = batch(1)
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, observed, pseudo, soft), logits.requires_grad_())


def test_gradcheck_of_gr_and_gpr_with_weights_held_fixed(monkeypatch):
    """k and v carry no gradient: with both frozen at the base point, autograd must equal finite differences."""
    logits, observed, pseudo, *_ = batch(1)
    p = torch.sigmoid(logits)
    frozen = {
        "false_negative_rate": losses.false_negative_rate(p, 3.0, -2.0),
        "unknown_weight": losses.unknown_weight(p, 0.7, 0.6),
    }
    free = logits.clone().requires_grad_()
    losses.gpr(free, observed, pseudo, **GPR).backward()
    for name, value in frozen.items():
        monkeypatch.setattr(losses, name, lambda *args, value=value: value)
    again = logits.clone().requires_grad_()
    losses.gpr(again, observed, pseudo, **GPR).backward()
    torch.testing.assert_close(free.grad, again.grad)
    for loss in (lambda s: losses.gr(s, observed, **GR), lambda s: losses.gpr(s, observed, pseudo, **GPR)):
        assert torch.autograd.gradcheck(loss, again.detach().requires_grad_())


def test_role_teaches_both_without_gradient_through_the_teacher():
    logits, observed, _, _, theta = batch()
    s, t = logits.clone().requires_grad_(), theta.clone().requires_grad_()
    losses.role(s, t, observed, 2).backward()
    fixed = torch.sigmoid(theta)
    alone = logits.clone().requires_grad_()
    ((losses.epr(alone, observed, 2) + losses.bce(alone, fixed)) / 2).backward()
    torch.testing.assert_close(s.grad, alone.grad)
    assert t.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gpr_without_pseudo_labels_is_gr_bit_for_bit(dtype):
    logits, observed, pseudo, *_ = batch(2, rows=32, classes=20, scale=10.0)
    ours, theirs = (logits.to(dtype).clone().requires_grad_() for _ in range(2))
    first = losses.gpr(ours, observed, 0 * pseudo, **(GPR | {"eta": 0.0}))
    second = losses.gr(theirs, observed, **GR)
    first.backward()
    second.backward()
    assert torch.equal(first, second) and torch.equal(ours.grad, theirs.grad)


def test_the_regulariser_belongs_to_the_mean_alone():
    logits, observed, pseudo, *_ = batch()
    with_, without = (losses.gpr(logits, observed, pseudo, **(GPR | e), reduction="none") for e in ({}, {"eta": 0.0}))
    assert torch.equal(with_, without)
    exact = 0.1 * F.softplus(logits) + 0.9 * F.softplus(-logits)
    torch.testing.assert_close(losses.positive_pseudo_loss(logits, 0.9), exact)


def test_what_diverged_is_nan_and_raises_nothing_here():
    logits, observed, *_ = batch()
    broken, flat = torch.full((6, 5), torch.nan), torch.zeros(6, 4)
    assert losses.smile(logits, observed, broken, broken, flat, flat, theta=1, a=1, b=1, kl=1).isnan()


def test_constant_weight_is_equal_bounds():
    p = torch.linspace(0, 1, 11)
    assert losses.positive_pseudo_weight(p, 0.8, 0.5, 0.55, 0.55).unique().tolist() == pytest.approx([0.55])


def test_pseudo_labels_on_observed_entries_change_nothing():
    logits, observed, pseudo, *_ = batch()
    shifted = torch.where(observed == 0, pseudo, -pseudo)
    for loss in (
        lambda x: losses.gpr(logits, observed, x, **GPR),
        lambda x: losses.bce_pl(logits, observed, x),
        lambda x: losses.vlpl(logits, observed, x, alpha=0.2, beta_pos=0.7),
    ):
        assert torch.equal(loss(pseudo), loss(shifted))
        assert not torch.equal(loss(pseudo), loss(-pseudo))


@pytest.mark.parametrize("epochs,linear_init", [(8, 0), (10, 0), (8, 2), (1, 0)])
def test_schedule(epochs, linear_init):
    ends = dict(w0=1.0, wT=11.0, b0=-2.0, bT=-8.0, mu0=0.5, muT=0.8, sigma0=2.0, sigmaT=0.5)
    length = epochs - linear_init
    for epoch in range(1, epochs + 1):
        late, early = max(epoch - linear_init - 1, 0) / length, max(epoch - linear_init, 0) / length
        expected = dict(w=1 + 10 * late, b=-2 - 6 * late, mu=0.5 + 0.3 * early, sigma=2 - 1.5 * early)
        assert losses.gr_schedule(epoch, epochs, **ends, linear_init=linear_init) == pytest.approx(expected)
    assert losses.gr_schedule(epochs, epochs, **ends)["mu"] == pytest.approx(0.8)
    assert losses.gr_schedule(epochs, epochs, **ends)["w"] == pytest.approx(1 + 10 * (epochs - 1) / epochs)


def test_unknown_reduction_and_scheme():
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        losses.an(torch.zeros(1, 2), torch.zeros(1, 2), reduction="sum")
    with pytest.raises(ValueError, match="'r' or 'ct'"):
        losses.ll(torch.zeros(1, 2), torch.zeros(1, 2), 1, "cp")


def test_one_class():
    logits, observed = torch.zeros(2, 1), torch.tensor([[1], [0]])
    assert losses.wan(logits, observed).item() == pytest.approx(math.log(2))
