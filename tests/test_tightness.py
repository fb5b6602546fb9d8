"""Bounds of whole networks against formulas of the papers, brute force and each other.

Oracles: enumeration of activation patterns with linear programs written here, the semidefinite
program as printed in its paper in cvxpy, naive sums over subsets, exact rational arithmetic, and
difference quotients. Bounds are compared one-sidedly, up to ``SLACK``.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lipbook import composition
from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
)
from lipbook.composition import Bound, lipschitz_bound, lipschitz_lower_bound, lipschitz_rule
from lipbook.lab import ordinary
from lipbook.orthogonal import OrthogonalLinear
from lipbook.tightness import eclipse, local_lipschitz_bound, reading, semidefinite, solvers
from lipbook.units import Piece, Units, elementwise_units, units_rule

NORMS = (1, 2, math.inf)
SLACK = 1 + 1e-6  # between two bounds, each with its solver or its room for equalities
UPPER = ("lipsdp", "lipsdp-layer", "eclipse", "seqlip", "averaged", "absolute", "product")


def network(act: Callable[[], nn.Module], *widths: int, seed: int = 0, scale: float = 1.0):
    """Dense network in float64 with weights and biases from a NumPy generator."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), act()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for weight in net.parameters():
            size = scale / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.5
            weight.copy_(torch.from_numpy(size * rng.normal(size=tuple(weight.shape))))
    return net


def two_layers(first: list[list[float]], second: list[list[float]], act: nn.Module):
    net = nn.Sequential(
        nn.Linear(len(first[0]), len(first), bias=False),
        act,
        nn.Linear(len(second[0]), len(second), bias=False),
    ).double()
    net[0].weight.data = torch.tensor(first, dtype=torch.float64)
    net[2].weight.data = torch.tensor(second, dtype=torch.float64)
    return net


def value(net: nn.Module, method: str, p: float = 2, **options: object) -> float:
    return lipschitz_bound(net, (net[0].in_features,), p, method, **options).value


def matrices(net: nn.Module) -> list[np.ndarray]:
    return [layer.weight.detach().numpy() for layer in net if isinstance(layer, nn.Linear)]


def jacobian_norms(net: nn.Module, points: Tensor, p: float) -> Tensor:
    points = points.clone().requires_grad_()
    outputs = net(points).sum(0)  # samples do not meet, so that this is a gradient for each
    rows = [torch.autograd.grad(y, points, retain_graph=True)[0] for y in outputs]
    return torch.linalg.matrix_norm(torch.stack(rows, 1), p)


TWO_PIECES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "steep": lambda: nn.LeakyReLU(-1.7),
    "PReLU": lambda: nn.PReLU(4),
    "abs": AbsoluteValue,
    "MaxMin": MaxMin,
    "halves": lambda: MaxMin(pairing="halves"),
    "GroupSort2": lambda: GroupSort(2),
    "Householder": lambda: Householder(4),
}
EQUAL_SLOPES = ("ReLU", "LeakyReLU", "steep", "abs")  # within a layer
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "ELU": lambda: nn.ELU(1.5),
    "GroupSort4": lambda: GroupSort(4),
    "FullSort": FullSort,
}


# ------------------------------------------------------------------------ reading a network


class Nested(nn.Sequential):
    pass


def test_what_is_read_computes_the_network() -> None:
    net = nn.Sequential(
        nn.ReLU(),
        nn.Flatten(),
        Nested(nn.Linear(6, 5), nn.Linear(5, 8), MaxMin(pairing="halves")),
        Householder(8),
        nn.Dropout(0.5).eval(),
        parametrizations.weight_norm(nn.Linear(8, 4, bias=False)),
        nn.PReLU(4, init=0.1),
        OrthogonalLinear(4, 4),
        GroupSort(2),
        nn.Identity(),
    ).double()
    net[3].angle.data = torch.tensor([0.3, -2.0, 1.0, 2.5], dtype=torch.float64)
    read = reading._dense_layers(net, (2, 3))
    x = torch.randn(50, 2, 3, dtype=torch.float64)
    y = x.flatten(1)
    for weight, bias, layer in itertools.zip_longest(read.weights, read.biases, read.units):
        y = y @ weight.mT + bias
        if layer is not None:
            y = layer.kinks(y)
    assert torch.allclose(y, net(x), rtol=1e-12, atol=1e-12)


ELEMENTWISE = [
    *(nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-3.0), nn.RReLU(0.5, 4.5).eval(), nn.ReLU6()),
    *(nn.ELU(), nn.ELU(2.5), nn.ELU(-2.5), nn.CELU(2.5), nn.SELU(), nn.GELU(), nn.GELU("tanh")),
    *(nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softplus(3.0), nn.Softsign(), nn.Softshrink()),
    *(nn.Tanh(), nn.Tanhshrink(), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardtanh(-2, 0.5)),
    *(nn.Hardsigmoid(), nn.Hardswish(), nn.Hardshrink(0.0), nn.Threshold(0.3, 0.3)),
    AbsoluteValue(),
]


@pytest.mark.parametrize("act", ELEMENTWISE, ids=str)
def test_slopes_are_between_the_two_that_are_read(act: nn.Module) -> None:
    (layer,) = reading._dense_layers(nn.Sequential(act), (1,)).units
    grid = torch.arange(-25, 25, 1e-3, dtype=torch.float64)[:, None]
    slopes = (act(grid + 1e-3) - act(grid)) / 1e-3
    assert layer.low.item() - 1e-9 <= slopes.min()
    assert slopes.max() <= layer.high.item() + 1e-9
    if not isinstance(act, nn.Mish):  # read as [-beta, beta]
        assert layer.low.item() + 2e-3 >= slopes.min()
    assert layer.high.item() - 2e-3 <= slopes.max()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sorts_are_nonexpansive_in_the_coordinates_that_are_read(size: int) -> None:
    (layer,) = reading._dense_layers(nn.Sequential(GroupSort(size)), (2 * size,)).units
    rotation = layer.before
    assert torch.allclose(rotation @ rotation.mT, torch.eye(2 * size).double(), atol=1e-14)
    assert torch.equal(layer.behind, rotation.mT)
    x, y = torch.randn(2, 500, 2 * size, dtype=torch.float64)
    before = (x - y) @ rotation.mT
    after = (GroupSort(size)(x) - GroupSort(size)(y)) @ rotation.mT
    for g in layer.groups.unique():
        members = layer.groups == g
        if bool((layer.low == layer.high)[members].all()):
            assert torch.allclose(after[:, members], before[:, members], atol=1e-12)
        else:
            slack = 1e-12
            assert (after[:, members].norm(dim=1) <= before[:, members].norm(dim=1) + slack).all()
    assert len(layer.groups.unique()) == 4


# ------------------------------------------------------------- definitions: the papers' formulas


def test_absolute_is_the_norm_of_the_product_of_moduli() -> None:
    net = network(lambda: nn.LeakyReLU(-2.0), 3, 4, 5, 2)
    w1, w2, w3 = map(np.abs, matrices(net))
    for p in NORMS:
        expected = np.linalg.norm(w3 @ (2 * w2) @ (2 * w1), p)
        assert value(net, "absolute", p) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("p", [1, math.inf])
@pytest.mark.parametrize("act", [GroupSort(2), GroupSort(4), MaxMin(pairing="halves")], ids=str)
def test_absolute_bounds_every_permutation(act: nn.Module, p: float) -> None:
    net = network(lambda: act, 3, 4, 2)
    w1, w2 = matrices(net)
    pairs = {"halves": [(0, 2), (1, 3)]}.get(getattr(act, "pairing", ""), [(0, 1), (2, 3)])
    swaps = [np.eye(4)]
    for i, j in pairs if getattr(act, "group_size", 2) == 2 else []:
        swap = np.eye(4)
        swap[[i, j]] = swap[[j, i]]
        swaps += [swap @ other for other in swaps]
    if len(swaps) == 1:
        swaps = [np.eye(4)[list(order)] for order in itertools.permutations(range(4))]
    worst = max(np.linalg.norm(w2 @ swap @ w1, p) for swap in swaps)
    bound = value(net, "absolute", p)
    assert worst <= bound * (1 + 1e-12)
    # |w2| applied to the largest row of each group; the transpose for p = 1
    groups = pairs if len(swaps) == 4 else [(0, 1, 2, 3)]
    outer, inner = (w2, w1) if p == math.inf else (w1.T, w2.T)
    sums = np.abs(inner).sum(1)
    for group in groups:
        sums[list(group)] = sums[list(group)].max()
    assert bound == pytest.approx((np.abs(outer) @ sums).max(), rel=1e-10)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_averaged_is_the_average_over_subsets(depth: int, p: float) -> None:
    net = network(nn.ReLU, *[3] * (depth + 1), seed=depth)
    weights = matrices(net)
    total = 0.0
    for cuts in itertools.product((False, True), repeat=depth - 1):
        norms, segment = 1.0, weights[0]
        for weight, cut in zip(weights[1:], cuts, strict=True):
            if cut:
                norms *= np.linalg.norm(segment, p)
                segment = weight
            else:
                segment = weight @ segment
        total += norms * np.linalg.norm(segment, p) / 2 ** (depth - 1)
    assert value(net, "averaged", p) == pytest.approx(total, rel=1e-12)


def test_averaged_weighs_the_linear_part_of_each_slope() -> None:
    net = network(lambda: nn.LeakyReLU(0.5), 3, 4, 2)
    w1, w2 = matrices(net)  # D = 3/4 + Psi/4
    norm = np.linalg.norm
    expected = 0.75 * norm(w2 @ w1, 2) + 0.25 * norm(w2, 2) * norm(w1, 2)
    assert value(net, "averaged") == pytest.approx(expected, rel=1e-12)


def seqlip_by_hand(net: nn.Module, slopes: tuple[float, float]) -> float:
    factors = [np.linalg.svd(w, full_matrices=False) for w in matrices(net)]
    result = 1.0
    for k in range(len(factors) - 1):
        (u, s, _), (_, t, vh) = factors[k], factors[k + 1]
        s = s if k == 0 else np.sqrt(s)
        t = t if k + 2 == len(factors) else np.sqrt(t)
        result *= max(
            np.linalg.norm(np.diag(t) @ vh @ np.diag(d) @ u @ np.diag(s), 2)
            for d in itertools.product(slopes, repeat=len(u))
        )
    return result


def test_seqlip_is_the_product_over_pairs_and_its_relaxation_is_above() -> None:
    for act, slopes in ((nn.ReLU, (0.0, 1.0)), (lambda: nn.LeakyReLU(-0.4), (-0.4, 1.0))):
        net = network(act, 3, 5, 4, 2)
        expected = seqlip_by_hand(net, slopes)
        assert value(net, "seqlip") == pytest.approx(expected, rel=1e-12)
        relaxed = value(net, "seqlip", max_width=3)
        closed = value(net, "seqlip", max_width=3, max_units=3)
        assert expected < relaxed < closed < value(net, "product")


def lipsdp_as_printed(net: nn.Module, alpha: float, beta: float, layerwise: bool) -> float:
    """Theorem 2 of Fazlyab et al., in cvxpy."""
    cvxpy = pytest.importorskip("cvxpy")
    *hidden, last = matrices(net)
    n, m, widths = hidden[0].shape[1], len(last[0]), [len(w) for w in hidden]
    total = sum(widths)
    first = np.zeros((total, n + total))
    row = column = 0
    for w in hidden:
        first[row : row + len(w), column : column + w.shape[1]] = w
        row, column = row + len(w), column + w.shape[1]
    second = np.hstack([np.zeros((total, n)), np.eye(total)])
    rho = cvxpy.Variable()
    if layerwise:
        scalars = cvxpy.Variable(len(widths), nonneg=True)
        t = np.repeat(np.eye(len(widths)), widths, axis=0) @ scalars
    else:
        t = cvxpy.Variable(total, nonneg=True)
    T = cvxpy.diag(t)
    cross = (alpha + beta) * first.T @ T @ second
    form = -2 * alpha * beta * first.T @ T @ first + cross + cross.T - 2 * second.T @ T @ second
    ends = np.zeros((n + total, n + total))
    ends[-m:, -m:] = last.T @ last
    inputs = np.diag([1.0] * n + [0.0] * total)
    problem = cvxpy.Problem(cvxpy.Minimize(rho), [form - rho * inputs + ends << 0])
    problem.solve(solver="CLARABEL")
    return math.sqrt(rho.value)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    ("act", "alpha", "beta"),
    [(nn.ReLU, 0, 1), (lambda: nn.LeakyReLU(-0.5), -0.5, 1), (nn.Sigmoid, 0, 0.25)],
)
def test_lipsdp_is_the_program_of_the_paper(
    act: Callable[[], nn.Module], alpha: float, beta: float, layerwise: bool
) -> None:
    net = network(act, 3, 5, 4, 2, seed=3)
    expected = lipsdp_as_printed(net, alpha, beta, layerwise)
    method = "lipsdp-layer" if layerwise else "lipsdp"
    assert value(net, method) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("act", [MaxMin, lambda: GroupSort(4)], ids=["MaxMin", "GroupSort(4)"])
def test_lipsdp_for_sorts_is_the_program_of_pauli(act: Callable[[], nn.Module]) -> None:
    """Norms of groups do not grow, their sums are kept: multipliers as printed, in cvxpy."""
    cvxpy = pytest.importorskip("cvxpy")
    net = network(act, 3, 4, 2, seed=1)
    w1, w2 = matrices(net)
    size = 4 if isinstance(net[1], GroupSort) else 2
    groups = 4 // size
    norms = cvxpy.Variable(groups, nonneg=True)
    free = [cvxpy.Variable(groups) for _ in range(3)]
    eye = np.kron(np.eye(groups), np.ones((size, 1)))  # unit to group
    ones = [np.kron(np.diag(row), np.ones((size, size))) for row in np.eye(groups)]
    gamma, nu, tau = (sum(f[g] * ones[g] for g in range(groups)) for f in free)
    T = cvxpy.diag(eye @ norms) + gamma
    rho = cvxpy.Variable()
    top = w1.T @ (T - 2 * tau) @ w1 - rho * np.eye(3)
    corner = w1.T @ (nu + tau)
    form = cvxpy.bmat([[top, corner], [corner.T, -T - 2 * nu + w2.T @ w2]])
    cvxpy.Problem(cvxpy.Minimize(rho), [form << 0]).solve(solver="CLARABEL")
    assert value(net, "lipsdp") == pytest.approx(math.sqrt(rho.value), rel=1e-4)


def eclipse_by_hand(weights: list[np.ndarray]) -> float:
    form = np.eye(len(weights[-1]))
    for w in weights[:0:-1]:
        gram = w.T @ form @ w
        top = np.linalg.eigvalsh(gram)[-1]
        inverse = np.linalg.inv(2 * top * np.eye(len(gram)) - gram)
        form = top / 2 * (np.eye(len(gram)) + gram @ inverse)
    return math.sqrt(np.linalg.eigvalsh(weights[0].T @ form @ weights[0])[-1])


@pytest.mark.parametrize("seed", range(4))
def test_eclipse_is_its_closed_form_in_the_better_direction(seed: int) -> None:
    net = network(nn.ReLU, 3, 5, 4, 2, seed=seed)
    weights = matrices(net)
    both = eclipse_by_hand(weights), eclipse_by_hand([w.T for w in weights[::-1]])
    assert value(net, "eclipse") == pytest.approx(min(both), rel=1e-10)


def brute_force(net: nn.Module, p: float) -> float:
    """Largest norm over all patterns whose region holds a ball, for ReLU-like networks."""
    weights = matrices(net)
    biases = [layer.bias.detach().numpy() for layer in net if isinstance(layer, nn.Linear)]
    slope = getattr(net[1], "negative_slope", -1.0 if isinstance(net[1], AbsoluteValue) else 0.0)
    widths = [len(w) for w in weights[:-1]]
    best, n = 0.0, weights[0].shape[1]
    for pattern in itertools.product((False, True), repeat=sum(widths)):
        jacobian, offset, rows, ends = np.eye(n), np.zeros(n), [], []
        for w, b, on in zip(weights, biases, split(pattern, widths), strict=False):
            jacobian, offset = w @ jacobian, w @ offset + b
            sign = np.where(on, 1.0, -1.0)
            rows.append(sign[:, None] * jacobian)
            ends.append(sign * offset)
            d = np.where(on, 1.0, slope)
            jacobian, offset = d[:, None] * jacobian, d * offset
        a, b = np.vstack(rows), np.concatenate(ends)
        lengths = np.linalg.norm(a, axis=1)
        if ((lengths < 1e-12) & (b < 0)).any():
            continue
        ball = linprog(
            [0.0] * n + [-1.0],
            A_ub=np.hstack([-a, lengths[:, None]]),
            b_ub=b,
            bounds=[(None, None)] * n + [(0.0, 1.0)],
        )
        if ball.status == 0 and ball.x[-1] > 1e-7:
            best = max(best, float(np.linalg.norm(weights[-1] @ jacobian, p)))
    return best


def split(pattern: tuple[bool, ...], widths: list[int]) -> list[np.ndarray]:
    return np.split(np.array(pattern), np.cumsum(widths)[:-1])


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "steep", "abs"])
def test_exact_is_the_largest_norm_of_any_region(name: str, p: float) -> None:
    for seed, widths in enumerate([(2, 4, 3, 2), (1, 3, 3, 1)]):
        net = network(TWO_PIECES[name], *widths, seed=seed)
        assert value(net, "exact", p) == pytest.approx(brute_force(net, p), rel=1e-9)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", TWO_PIECES)
def test_exact_is_attained_by_its_witness_and_exceeded_nowhere(name: str, p: float) -> None:
    seed = NORMS.index(p)  # another network for each
    net = network(TWO_PIECES[name], 3, 4, 4, 2, seed=seed)
    bound = lipschitz_bound(net, (3,), p, "exact")
    assert bound.kind == "exact"
    x, y = bound.witness
    rise = torch.linalg.vector_norm(net(x[None]) - net(y[None]), p)
    quotient = rise / torch.linalg.vector_norm(x - y, p)
    assert quotient.item() == pytest.approx(bound.value, rel=1e-8)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2000, 3, generator=generator).double()
    points *= 10 ** torch.linspace(-1, 2, 2000).double()[:, None]
    assert jacobian_norms(net, points, p).max() <= bound.value * (1 + 1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_exact_does_not_leave_out_what_may_still_grow(p: float) -> None:
    """The first slope is 3 for x < 0 and 1 for x > 0, but 3 and 3 follow on the right only."""
    weights = (1.0, -1.0, 1.0, 1.0)
    layers = [nn.Linear(1, 1, bias=False).double() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.fill_(weight)
    act = nn.LeakyReLU(3.0)
    net = nn.Sequential(layers[0], act, layers[1], act, layers[2], act, layers[3])
    ends = torch.tensor([[-1.0], [0.0], [1.0]]).double()
    assert net(ends).diff(dim=0).abs().flatten().tolist() == [3.0, 9.0]
    assert value(net, "exact", p) == 9.0


# ------------------------------------------------------------------------ theorems: the order


def finite(net: nn.Module, method: str) -> float:
    """Value of a bound, or inf where it is not for these activations."""
    mixes = isinstance(net[1], (MaxMin, GroupSort, FullSort, Householder))
    wide = isinstance(net[1], FullSort) or getattr(net[1], "group_size", 2) > 2
    if (mixes and method == "absolute") or (wide and method == "seqlip"):
        return math.inf
    return value(net, method)


@pytest.mark.parametrize("name", TWO_PIECES)
@pytest.mark.parametrize("seed", range(3))
def test_every_bound_is_above_the_constant(name: str, seed: int) -> None:
    net = network(TWO_PIECES[name], 3, 4, 4, 2, seed=10 + seed, scale=10.0 ** (2 * seed - 2))
    exact = value(net, "exact")
    for method in UPPER:
        bound = finite(net, method)
        assert bound >= exact * (1 - 1e-12), method
    assert value(net, "lipsdp") <= SLACK * value(net, "lipsdp-layer")
    assert value(net, "eclipse") <= SLACK * value(net, "product")
    assert value(net, "seqlip") <= SLACK * value(net, "product")
    if name in EQUAL_SLOPES:
        assert value(net, "lipsdp-layer") <= SLACK * value(net, "eclipse")
        assert value(net, "averaged") <= SLACK * value(net, "product")


@pytest.mark.parametrize("name", OTHERS)
def test_every_bound_is_above_a_lower_bound(name: str) -> None:
    for seed in range(2):
        net = network(OTHERS[name], 3, 4, 4, 2, seed=seed, scale=2.0)
        lower = lipschitz_lower_bound(net, torch.randn(8, 3).double(), steps=10).value
        points = torch.randn(1000, 3).double()
        lower = max(lower, jacobian_norms(net, points, 2).max().item() * (1 - 1e-12))
        for method in UPPER:
            assert finite(net, method) >= lower, method
        assert value(net, "lipsdp") <= SLACK * value(net, "lipsdp-layer")
        assert value(net, "lipsdp-layer") <= SLACK * value(net, "eclipse")
        assert value(net, "eclipse") <= SLACK * value(net, "product")


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.data())
def test_the_order_of_the_bounds(seed: int, data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    decade = data.draw(st.integers(-6, 6))
    act = data.draw(st.sampled_from([nn.ReLU, nn.Tanh, AbsoluteValue, lambda: nn.LeakyReLU(2.0)]))
    net = network(act, *widths, seed=seed, scale=10.0**decade)
    order = [value(net, m) for m in ("lipsdp", "lipsdp-layer", "eclipse", "product")]
    for below, above in itertools.pairwise(order):
        assert below <= SLACK * above
    for p in NORMS:
        lower = jacobian_norms(net, torch.randn(50, widths[0]).double(), p).max().item()
        for method in ("absolute", "averaged"):
            bound = value(net, method, p)
            assert bound >= lower * (1 - 1e-12)
            if p != 2 or method == "averaged":
                assert bound <= value(net, "product", p) * (1 + 1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(-6, 6))
def test_certificates_hold_in_exact_arithmetic(seed: int, decade: int) -> None:
    """One unit: the constant is |w2| |w1|, whose square is a rational number."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 3)) * 10.0**decade
    for act in (nn.ReLU(), AbsoluteValue(), nn.LeakyReLU(0.25)):
        net = two_layers([first.tolist()], second[:, None].tolist(), act)
        square = sum(Fraction(w) ** 2 for w in first) * sum(Fraction(w) ** 2 for w in second)
        for method in ("lipsdp", "lipsdp-layer", "eclipse", "seqlip", "averaged", "absolute"):
            bound = value(net, method)
            assert Fraction(bound) ** 2 >= square, method
            assert Fraction(bound) ** 2 <= square * Fraction(SLACK) ** 2, method


def test_a_step_is_proved_in_exact_arithmetic() -> None:
    """One unit: no multiplier can prove less than (|c| + r)^2 m, and the best one proves that."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        gram, r, c = (torch.tensor([x]).double() for x in rng.uniform(0.1, 1, size=3))
        form = eclipse._step(gram[:, None], c, r, r * (r + c) * gram)
        least = (Fraction(c.item()) + Fraction(r.item())) ** 2 * Fraction(gram.item())
        assert least <= Fraction(form.item()) <= least * (1 + Fraction(1e-12))


@pytest.mark.parametrize("seed", range(5))
def test_a_step_bounds_every_slope_for_any_multiplier(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = torch.from_numpy(rng.normal(size=(3, 4)))
    c, r = (torch.from_numpy(x) for x in (rng.normal(size=4), rng.uniform(size=4)))
    r[seed % 4] = 0.0
    for size in (0.0, 1e-3, 1.0, 1e3):
        multiplier = size * torch.from_numpy(rng.uniform(size=4))
        form = eclipse._step(root.mT @ root, c, r, multiplier)
        for signs in itertools.product((-1.0, 1.0), repeat=4):
            after = root * (c + r * torch.tensor(signs).double())
            slack = 1e-14 * form.norm()
            assert torch.linalg.eigvalsh(form - after.mT @ after)[0] >= -slack


def test_a_bad_solver_cannot_make_a_bad_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever multipliers a solver returns, what is proved for them is a bound."""
    net = network(nn.ReLU, 3, 4, 4, 2)
    exact, good = value(net, "exact"), value(net, "lipsdp")
    rng = np.random.default_rng(0)

    def guess(program: solvers._Program) -> Tensor:
        noise = torch.from_numpy(rng.normal(size=len(program.start)))
        return program.start * noise.abs() * 10.0 ** rng.integers(-9, 9)

    monkeypatch.setattr(semidefinite, "_barrier", guess)
    for _ in range(30):
        assert value(net, "lipsdp") >= max(exact, good / SLACK)
    monkeypatch.setattr(semidefinite, "_barrier", lambda program: 0 * program.start)
    assert value(net, "lipsdp") >= exact


def test_a_tangent_that_leads_too_far_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bolder steps along the path the barrier still ends at the optimum, in 300 steps."""
    net = network(nn.ReLU, 3, 8, 8, 2)
    expected = value(net, "lipsdp")
    monkeypatch.setattr(solvers, "_PARTS", (1 - 1e-6, *solvers._PARTS))
    assert value(net, "lipsdp") == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------ tightness: known numbers


def test_the_absolute_value_out_of_two_relus() -> None:
    net = two_layers([[1.0], [-1.0]], [[1.0, 1.0]], nn.ReLU())
    assert value(net, "product") == pytest.approx(2, rel=1e-12)
    for method in ("exact", "seqlip", "lipsdp"):
        assert value(net, method) == pytest.approx(1, rel=1e-6), method
    # eclipse on paper: M = [[1, 1], [1, 1]], T = 1, and W1 is in the kernel of M: P = T
    assert value(net, "eclipse") == pytest.approx(math.sqrt(2), rel=1e-6)


def test_two_hyperplanes_that_are_one() -> None:
    """x = relu(x) - relu(-x): both units are on together at 0 only, which is no region."""
    net = two_layers([[1.0], [-1.0]], [[1.0, -1.0]], nn.ReLU())
    assert value(net, "exact") == 1.0
    twice = two_layers([[1.0], [1.0]], [[1.0, 1.0]], nn.ReLU())
    assert value(twice, "exact") == 2.0


def test_orthogonal_directions() -> None:
    net = two_layers([[1.0], [0.0]], [[0.0, 1.0]], nn.ReLU())
    assert value(net, "product") == 1
    for method in ("exact", "seqlip", "absolute"):
        assert value(net, method) < 1e-12, method
    assert value(net, "lipsdp") < 1e-3  # T = 0 is the limit, where T > RMR fails
    assert value(net, "averaged") == pytest.approx(0.5, rel=1e-12)


def test_linear_activations_leave_the_norm_of_the_product() -> None:
    net = network(lambda: nn.LeakyReLU(1.0), 4, 5, 3, 4)
    w1, w2, w3 = matrices(net)
    expected = np.linalg.norm(w3 @ w2 @ w1, 2)
    for method in ("exact", "lipsdp", "lipsdp-layer", "eclipse", "averaged"):
        assert value(net, method) == pytest.approx(expected, rel=1e-10), method
    only = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).double()
    expected = np.linalg.norm(np.linalg.multi_dot(matrices(only)[::-1]), 2)
    for method in ("exact", "lipsdp", "eclipse", "averaged", "seqlip"):
        assert value(only, method) == pytest.approx(expected, rel=1e-10), method


def test_gradient_norm_preserving_networks_leave_nothing_to_gain() -> None:
    net = nn.Sequential(OrthogonalLinear(4, 4), MaxMin(), OrthogonalLinear(4, 4), FullSort())
    for method in ("lipsdp", "lipsdp-layer", "eclipse", "product"):
        bound = lipschitz_bound(net.double(), (4,), method=method).value
        assert 1 - 1e-9 <= bound <= SLACK, method


def test_networks_that_are_constant() -> None:
    dead = two_layers([[0.0], [0.0]], [[1.0, 1.0]], nn.ReLU())
    cut = two_layers([[1.0], [1.0]], [[0.0, 0.0]], nn.ReLU())
    for net in (dead, cut):
        for method in (*UPPER, "exact"):
            assert value(net, method) <= 1e-12, method
    part = two_layers([[1.0], [0.0], [2.0]], [[1.0, 1.0, 0.0]], nn.ReLU())
    for method in ("exact", "lipsdp"):
        assert value(part, method) == pytest.approx(1, rel=1e-3), method


def test_a_wide_network_gains_from_each_step() -> None:
    net = network(nn.ReLU, 20, 40, 40, 5, scale=math.sqrt(2))
    values = [value(net, m) for m in ("lipsdp", "lipsdp-layer", "eclipse", "product")]
    assert values == sorted(values)
    assert values[0] < 0.6 * values[-1]


# ------------------------------------------------------------------------ reading any network


class Functional(nn.Module):
    """Functions, a skip and a concatenation inside an affine part, slices and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(6, 3)
        self.place = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 2 * self.body(x) - x.flip(1)
        x = torch.cat([self.side(x), x], 1) + self.place
        x = functional.leaky_relu(x, 0.3)
        return self.head(x) - x[:, :3] / 2


class Images(nn.Module):
    """Convolution, normalisation, sorts over channels, max and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.sort, self.head = MaxMin(), nn.Linear(4, 2)
        self.norm.running_mean.copy_(torch.randn(4))
        self.norm.running_var.copy_(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sort(self.norm(self.conv(x)))
        x = functional.max_pool2d(x, 2, stride=1)
        return self.head(functional.adaptive_avg_pool2d(x.relu(), 1).flatten(1))


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.maximum(self.first(x), self.second(x))
        return self.last(torch.minimum(x, x.flip(1)).clamp(-0.5, 2))


def window(size: int, stride: int) -> nn.Module:
    pool = nn.MaxPool1d(size, stride)
    return nn.Sequential(
        *(nn.Linear(2, 6), nn.Unflatten(1, (1, 6)), pool, nn.Flatten()),
        nn.Linear((6 - size) // stride + 1, 2),
    )


ORDINARY = ("reused layers", "parametrizations", "dictionary", "lightning")
READ: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "functional": (Functional, (4,)),
    "wrapped": (lambda: ordinary.Wrapper(nn.Sequential(Functional(), nn.ReLU())), (4,)),
    "images": (Images, (1, 5, 5)),
    "maxout": (Maxout, (3,)),
    "rows": (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Flatten(2)), (3, 2)),
    "channels": (lambda: nn.Sequential(nn.PReLU(3), GroupSort(3), nn.AvgPool1d(2)), (3, 4)),
    "overlapping": (lambda: window(3, 1), (2,)),
    **{name: (ordinary.NETWORKS[name].build, ordinary.NETWORKS[name].shape) for name in ORDINARY},
}


def passed(units: Units, layer: nn.Module, shape: tuple[int, ...], z: Tensor) -> Tensor:
    """What units make of a batch: by their kinks, by all their pieces, or by the layer itself."""
    if units.kinks is not None:
        return units.kinks(z)
    if units.cells is None:
        return layer(z.view(-1, *shape)).flatten(1)
    result = z.clone()  # of the linear units
    for own, pieces in units.cells:
        for row in range(len(z)):
            found = [p for p in leaves(pieces) if bool((p[0] @ z[row, own] >= -1e-12).all())]
            result[row, own] = found[0][1] @ z[row, own]
    return result


def leaves(pieces: Sequence[Piece], above: tuple[Tensor, ...] = ()) -> Iterator[tuple[Tensor, ...]]:
    for piece in pieces:
        assert not piece.levels.any()
        if piece.finer is not None:
            yield from leaves(piece.finer(), (*above, piece.normals))
        else:
            yield torch.cat((*above, piece.normals)), piece.matrix


@pytest.mark.parametrize("name", READ)
def test_any_chain_is_read_as_what_it_computes(name: str) -> None:
    torch.manual_seed(0)
    build, shape = READ[name]
    net, output = build().double().eval(), "logits" if name == "dictionary" else None
    read = reading._dense_layers(net, shape, output)
    x = torch.randn(20, *shape, dtype=torch.float64)
    y = net(x) if output is None else net(x)[output]
    z = x.flatten(1)
    for k, (weight, bias) in enumerate(zip(read.weights, read.biases, strict=True)):
        z = z @ weight.mT + bias
        if k < len(read.units):
            units = read.units[k]
            z = passed(units, read.layers[k].layer, read.shapes[k], z)
    assert torch.allclose(z, y.flatten(1), rtol=1e-11, atol=1e-11)
    assert read.output_shape == tuple(y.shape[1:])


@pytest.mark.parametrize("name", ["functional", "wrapped", "rows"])
def test_folded_matrices_are_jacobians(name: str) -> None:
    torch.manual_seed(1)
    build, shape = READ[name]
    net = build().double().eval()
    read = reading._dense_layers(net, shape)
    for _ in range(5):
        x = torch.randn(shape, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
        jacobian, z = read.weights[0], read.weights[0] @ x.flatten() + read.biases[0]
        for units, weight, bias in zip(read.units, read.weights[1:], read.biases[1:], strict=True):
            slope = units.kinks.slopes[(z > 0).long(), torch.arange(len(z))]
            jacobian, z = weight @ (slope[:, None] * jacobian), weight @ units.kinks(z) + bias
        assert torch.allclose(jacobian, expected.reshape(jacobian.shape), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", READ)
def test_bounds_of_any_chain_are_above_its_jacobians(name: str) -> None:
    torch.manual_seed(0)
    build, shape = READ[name]
    net, output = build().double().eval(), "logits" if name == "dictionary" else None
    plain = net if output is None else ordinary.Wrapper(net)
    if output is not None:
        plain.forward = lambda x: net(x)["logits"]
    x = torch.randn(200, *shape, dtype=torch.float64).requires_grad_()
    y = plain(x).flatten(1)
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0].flatten(1) for part in y.T]
    found = torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max().item()
    sorts = name in ("images", "maxout", "channels", "overlapping")
    for method in ("eclipse", "lipsdp", "averaged", *(() if sorts else ("absolute", "seqlip"))):
        assert lipschitz_bound(net, shape, 2, method, output=output).value >= found, method


class Cancelling(nn.Module):
    """ReLU of (a b - c) x, where c is a b rounded."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.tensor(v, dtype=torch.float64) for v in (a, b, a * b))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a * x * self.b - self.c * x)


@pytest.mark.parametrize("seed", range(5))
def test_what_cancels_between_paths_leaves_its_error(seed: int) -> None:
    a, b = np.random.default_rng(seed).uniform(1, 2, size=2)
    net = Cancelling(a, b)
    exact = abs(Fraction(a) * Fraction(b) - Fraction(a * b))
    assert exact > 0
    for method in ("lipsdp", "eclipse", "averaged", "absolute", "seqlip"):
        bound = lipschitz_bound(net, (1,), method=method).value
        assert exact <= Fraction(bound) <= Fraction(1e-13), method


@pytest.mark.parametrize("seed", range(8))
def test_what_cancels_in_a_product_leaves_its_error(seed: int) -> None:
    """Two layers in a row whose product is 0 but for rounding, as a rational number."""
    first, second = np.random.default_rng(seed).normal(size=(2, 20))
    second[-1] = -(first[:-1] @ second[:-1]) / first[-1]
    linear = two_layers(first[:, None].tolist(), [second.tolist()], nn.Identity())
    net = nn.Sequential(*linear, nn.ReLU())
    exact = abs(sum(Fraction(a) * Fraction(b) for a, b in zip(first, second, strict=True)))
    for method in ("lipsdp", "eclipse", "averaged", "absolute", "seqlip"):
        bound = lipschitz_bound(net, (1,), method=method).value
        assert exact <= Fraction(bound) <= Fraction(1e-11), method


# ------------------------------------------------------------------------ units of many pieces

MANY_PIECES: dict[str, Callable[[], nn.Module]] = {
    "ReLU6": nn.ReLU6,
    "Hardtanh": lambda: nn.Hardtanh(-0.4, 0.3),
    "Softshrink": nn.Softshrink,
    "Hardsigmoid": nn.Hardsigmoid,
    "Threshold": lambda: nn.Threshold(0.2, 0.2),
    "GroupSort(3)": lambda: GroupSort(3),
    "FullSort": FullSort,
}


def steps(act: nn.Module, n: int) -> list[list[tuple[np.ndarray, ...]]]:
    """Pieces (M, c, G, h) of each group of entries, on paper: u -> M u + c where G u >= h."""
    if isinstance(act, (GroupSort, FullSort, nn.MaxPool1d)):
        size = getattr(act, "group_size", getattr(act, "kernel_size", n))
        pieces = []
        for order in itertools.permutations(range(size)):
            matrix = np.eye(size)[list(order)]
            rises = np.diff(matrix, axis=0)
            kept = matrix[-1:] if isinstance(act, nn.MaxPool1d) else matrix
            pieces.append((kept, np.zeros(len(kept)), rises, np.zeros(size - 1)))
        return [pieces] * (n // size)
    kinks, slopes = {
        nn.ReLU6: ([0, 6], [0, 1, 0]),
        nn.Hardtanh: ([-0.4, 0.3], [0, 1, 0]),
        nn.Softshrink: ([-0.5, 0.5], [1, 0, 1]),
        nn.Hardsigmoid: ([-3, 3], [0, 1 / 6, 0]),
        nn.Threshold: ([0.2], [0, 1]),
    }[type(act)]
    ends = [-math.inf, *kinks, math.inf]
    pieces = []
    for slope, low, high in zip(slopes, ends, ends[1:], strict=False):
        inside = 0.0 if not math.isfinite(low + high) else (low + high) / 2
        inside = high - 1 if low == -math.inf else low + 1 if high == math.inf else inside
        value = float(act(torch.tensor([inside], dtype=torch.float64)))
        sides = [(1.0, low)] * math.isfinite(low) + [(-1.0, -high)] * math.isfinite(high)
        normals, levels = zip(*sides, strict=True)
        piece = ([[slope]], [value - slope * inside], np.array(normals)[:, None], levels)
        pieces.append(tuple(np.array(part) for part in piece))
    return [pieces] * n


def largest_of_all_regions(first: nn.Linear, act: nn.Module, last: nn.Linear, p: float) -> float:
    """Enumerate all combinations of pieces of one layer, each with a linear program."""
    w, b, v = (t.detach().numpy() for t in (first.weight, first.bias, last.weight))
    groups = steps(act, len(w))
    size, best, n = len(w) // len(groups), 0.0, w.shape[1]
    for choice in itertools.product(*groups):
        rows, ends, jacobian = [], [], []
        for k, (matrix, _, normals, levels) in enumerate(choice):
            own = slice(k * size, (k + 1) * size)
            rows.append(normals @ w[own])
            ends.append(normals @ b[own] - levels)
            jacobian.append(matrix @ w[own])
        a, c = np.vstack(rows), np.concatenate(ends)
        lengths = np.linalg.norm(a, axis=1)
        ball = linprog(
            [0.0] * n + [-1.0],
            A_ub=np.hstack([-a, lengths[:, None]]),
            b_ub=c,
            bounds=[(None, None)] * n + [(0.0, 1.0)],
        )
        if ball.status == 0 and ball.x[-1] > 1e-7:
            best = max(best, float(np.linalg.norm(v @ np.vstack(jacobian), p)))
    return best


@pytest.mark.parametrize("name", [*MANY_PIECES, "MaxPool1d"])
def test_exact_is_the_largest_of_all_combinations_of_pieces(name: str) -> None:
    for seed, p in enumerate(NORMS):
        if name == "MaxPool1d":
            pool = nn.MaxPool1d(3)
            first, _, last = network(nn.ReLU, 2, 6, 2, seed=seed)
            last = nn.Linear(2, 2).double()
            parts = (first, nn.Unflatten(1, (1, 6)), pool, nn.Flatten(), last)
            net, act = nn.Sequential(*parts), pool
        else:
            widths = (2, 4, 2) if name == "FullSort" else (2, 6, 2) if "3" in name else (2, 4, 2)
            net = network(MANY_PIECES[name], *widths, seed=seed, scale=2.0)
            first, act, last = net
        expected = largest_of_all_regions(first, act, last, p)
        found = lipschitz_bound(net, (2,), p, "exact", max_regions=100_000).value
        assert found == pytest.approx(expected, rel=1e-9), p


def check_exact(net: nn.Module, n: int, p: float, seed: int) -> Bound:
    """The witness attains the constant, and no sampled Jacobian exceeds it."""
    bound = lipschitz_bound(net, (n,), p, "exact", max_regions=100_000)
    assert bound.kind == "exact"
    x, y = bound.witness
    rise = torch.linalg.vector_norm(net(x[None]) - net(y[None]), p)
    quotient = rise / torch.linalg.vector_norm(x - y, p)
    assert quotient.item() == pytest.approx(bound.value, rel=1e-7, abs=1e-12)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(1000, n, generator=generator).double()
    points *= 10 ** torch.linspace(-1, 2, 1000).double()[:, None]
    single = any(
        isinstance(layer, nn.Hardsigmoid) for layer in net.modules()
    )  # torch's 1/6 in backward
    slack = 1 + (1e-7 if single else 1e-11)
    assert jacobian_norms(net, points, p).max() <= bound.value * slack + 1e-12
    return bound


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", MANY_PIECES)
def test_exact_of_many_pieces_is_attained_and_exceeded_nowhere(name: str, p: float) -> None:
    widths = (2, 3, 3, 2)
    net = network(MANY_PIECES[name], *widths, seed=4, scale=2.0)
    exact = check_exact(net, 2, p, 0)
    for method in ("eclipse", "lipsdp", "seqlip") if p == 2 else ("absolute",):
        bound = finite(net, method) if p == 2 else value(net, method, p)
        assert bound >= exact.value * (1 - 1e-12), method


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["functional", "maxout", "overlapping"])
def test_exact_of_any_chain_is_attained_and_exceeded_nowhere(name: str, p: float) -> None:
    torch.manual_seed(3)
    build, (n,) = READ[name]
    net = build().double().eval()
    exact = check_exact(net, n, p, 0).value
    for method in ("eclipse", "lipsdp") if p == 2 else ("absolute",):
        assert lipschitz_bound(net, (n,), p, method).value >= exact * (1 - 1e-12), method


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.data())
def test_exact_of_small_networks_of_any_units(seed: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*MANY_PIECES, *TWO_PIECES]))
    widths = [data.draw(st.integers(1, 2)), *[data.draw(st.integers(1, 2))] * 2, 2]
    if name in ("MaxMin", "halves", "GroupSort2", "Householder", "PReLU"):
        widths[1:3] = [4, 4]
    if name == "GroupSort(3)":
        widths[1:3] = [3, 3]
    act = {**MANY_PIECES, **TWO_PIECES}[name]
    net = network(act, *widths, seed=seed, scale=10.0 ** data.draw(st.integers(-2, 2)))
    check_exact(net, widths[0], data.draw(st.sampled_from(NORMS)), seed % 1000)


def bent() -> HouseholderOrder2:
    layer = HouseholderOrder2(4, dtype=torch.float64)
    layer.angles.data = torch.tensor([[0.4, -1.0], [1.2, 5.0], [0.7, 0.0]], dtype=torch.float64)
    return layer


def zigzag() -> NActivation:
    layer = NActivation(4, dtype=torch.float64)
    layer.kinks.data = torch.tensor([[-0.2, 0.1, 0.4, 0.0], [0.3, -0.1, 0.0, 0.0]]).double()
    return layer


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("act", [bent, zigzag])
def test_exact_of_learnt_activations(act: Callable[[], nn.Module], p: float) -> None:
    net = network(act, 2, 4, 4, 2, seed=4, scale=2.0)
    exact = check_exact(net, 2, p, 0)
    for method in ("eclipse", "lipsdp") if p == 2 else ():
        assert lipschitz_bound(net, (2,), p, method).value >= exact.value * (1 - 1e-12), method


SORTING = [GroupSort(4), GroupSort(3, dim=-1), nn.MaxPool1d(3, 2, 1), nn.AdaptiveMaxPool1d(4)]


@pytest.mark.parametrize("act", SORTING, ids=str)
def test_pieces_of_sorts_are_nonexpansive_in_their_coordinates(act: nn.Module) -> None:
    """What the semidefinite bounds take for granted: || J_g || <= 1, with nothing else."""
    units = units_rule(act, (4, 9))
    for own, pieces in units.cells:
        assert len(units.groups[own].unique()) == 1
        assert (units.low[own] == -1).all()
        assert (units.high[own] == 1).all()
        norms = [torch.linalg.matrix_norm(matrix, 2).item() for _, matrix in leaves(pieces)]
        assert max(norms) == pytest.approx(1, abs=1e-14)
    linear = torch.ones(len(units.low), dtype=torch.bool)
    linear[torch.cat([own for own, _ in units.cells])] = False
    assert (units.low[linear] == 1).all()


def test_local_knows_the_pieces_of_a_clipped_unit() -> None:
    """x clipped to [-1, 1], twice: 2 x for |x| < 1, behind which nothing moves."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Hardtanh(), nn.Linear(1, 1), nn.Hardtanh(-4, 4))
    for layer, weight in ((net[0], 1.0), (net[2], 2.0)):
        layer.weight.data.fill_(weight)
        layer.bias.data.zero_()
    net = net.double()
    for center, radius, number in ((0.0, 0.9, 2.0), (3.0, 1.9, 0.0), (3.0, 2.1, 2.0)):
        bound = local_lipschitz_bound(net, torch.tensor([center]).double(), radius)
        assert bound.value == pytest.approx(number)
        assert bound.kind == ("exact" if radius < 2 else "upper bound")


class Staircase(nn.Module):
    """A layer of one's own: 3 x up to 1, level up to 2, then 3 (x - 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.minimum(x, torch.ones_like(x)) + 3 * (x - 2).relu()


def test_a_layer_of_ones_own_says_its_pieces() -> None:
    lipschitz_rule.register(Staircase, lambda module, shape, p: Bound(3, "exact", p))
    net = network(Staircase, 2, 3, 2)
    with pytest.raises(ValueError, match=r"'1' \(Staircase\): .*use method='product'"):
        value(net, "eclipse")

    @units_rule.register(Staircase)
    def _(module: Staircase, input_shape: tuple[int, ...]) -> Units:
        return elementwise_units(module, input_shape, points=[1.0, 2.0], slopes=[3.0, 0.0, 3.0])

    exact = check_exact(net, 2, 2, 0).value
    assert exact <= value(net, "lipsdp") * (1 + 1e-9)
    assert value(net, "lipsdp") <= SLACK * value(net, "eclipse") <= SLACK**2 * value(net, "product")
    with pytest.raises(ValueError, match="slopes must be one more than points"):
        elementwise_units(Staircase(), (2,), points=[1.0], slopes=[1.0])


class Parallel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), x.tanh()], 1)


def test_a_network_that_is_no_chain_is_refused_where_it_stands() -> None:
    skip = ordinary.made(ordinary.NETWORKS["ResNet-18"])
    with pytest.raises(ValueError, match="joins what is before") as caught:
        lipschitz_bound(skip, (3, 16, 16), method="eclipse")
    message = str(caught.value)
    assert message.startswith("'layer1.0' (Add): (ordinary.py:")
    assert "out += identity): joins what is before 'layer1.0.relu' (ReLU)" in message
    assert "lipschitz_bound with method='product', the default, takes this one" in message
    assert lipschitz_bound(skip, (3, 16, 16)).value > 0
    with pytest.raises(ValueError, match=r"\(Tanh\).*\) stands beside|Tanh: .*stands beside"):
        lipschitz_bound(Parallel(), (2,), method="lipsdp")


def test_a_matrix_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_ENTRIES", 1000)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    message = (
        r"'0' \(Conv2d\): .*input_shape \(1, 5, 5\) would need a dense matrix of 72 x 25 entries "
        r"here, more than 1000: use method='product'"
    )
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(net, (1, 5, 5), method="eclipse")


# ------------------------------------------------------------------------------ local bounds


def in_ball(center: Tensor, radius: float, p: float, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, len(center), generator=generator).double()
    steps /= torch.linalg.vector_norm(steps, p, dim=1, keepdim=True)
    if p == math.inf:
        steps = steps.sign()
    return center + radius * torch.rand(count, 1, generator=generator).double() * steps


SMOOTH = ("tanh", "sigmoid", "GELU", "SiLU", "ELU")


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", [*TWO_PIECES, *SMOOTH])
def test_local_is_between_the_sampled_and_the_global(name: str, p: float) -> None:
    act = {**TWO_PIECES, **OTHERS}[name]
    seed = NORMS.index(p)  # another network for each
    net = network(act, 3, 4, 4, 2, seed=seed, scale=2.0)
    center = torch.from_numpy(np.random.default_rng(seed).normal(size=3))
    bounds = []
    for radius in (0.0, 0.01, 0.1, 1.0, 100.0):
        bound = local_lipschitz_bound(net, center, radius, p)
        bounds.append(bound.value)
        points = in_ball(center, radius, p, 300, seed)
        assert jacobian_norms(net, points, p).max() <= bound.value * (1 + 1e-12)
        assert bound.value <= value(net, "product", p)
        if p == 2:
            assert bound.value <= value(net, "eclipse") * (1 + 1e-9)
            tight = local_lipschitz_bound(net, center, radius, p, "lipsdp").value
            assert jacobian_norms(net, points, p).max() <= tight * (1 + 1e-12)
            assert tight <= bound.value * (1 + 1e-12)
    assert bounds[0] <= bounds[2] * (1 + 1e-9) <= bounds[4] * (1 + 2e-9)
    if name not in ("GELU", "SiLU", "ELU"):  # which keep their slopes everywhere
        here = jacobian_norms(net, center[None], p).item()
        assert bounds[0] == pytest.approx(here, rel=1e-6)  # the ball is a point


def test_local_is_exact_where_no_unit_is_undecided() -> None:
    net = two_layers([[1.0], [-1.0]], [[1.0, 2.0]], nn.ReLU())  # x for x > 0, -2x for x < 0
    expected = {0.9: (1.0, "exact"), 1.1: (2.0, "upper bound")}
    for radius, (number, kind) in expected.items():
        bound = local_lipschitz_bound(net, torch.tensor([1.0]), radius, 2, "lipsdp")
        assert bound.value == pytest.approx(number, rel=1e-5)
        assert bound.kind == kind
    assert (bound.input_shape, bound.output_shape, bound.p) == ((1,), (1,), 2)


def test_local_is_the_norm_of_an_interval_of_jacobians() -> None:
    net = network(nn.ReLU, 2, 3, 2, seed=4)
    w1, w2 = matrices(net)
    inputs = w1 @ np.ones(2) + net[0].bias.detach().numpy()
    distances = np.abs(inputs) / np.abs(w1).sum(1)  # of the kinks, for p = inf
    radius = float(np.sort(distances)[1]) * 1.01
    undecided = distances < radius
    assert undecided.sum() == 2
    on = np.where(undecided, 0.5, inputs > 0)
    middle = np.abs(w2 @ np.diag(on) @ w1)
    spread = np.abs(w2) @ np.diag(undecided / 2) @ np.abs(w1)
    bound = local_lipschitz_bound(net, torch.ones(2), radius, math.inf).value
    assert bound == pytest.approx((middle + spread).sum(1).max(), rel=1e-9)


def test_local_knows_what_a_second_layer_receives() -> None:
    """relu(relu(x) - 1) is 0 for x < 1, which only the image of the first layer shows."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU()).double()
    for layer, bias in ((net[0], 0.0), (net[2], -1.0)):
        layer.weight.data.fill_(1.0)
        layer.bias.data.fill_(bias)
    center = torch.tensor([-5.0], dtype=torch.float64)
    for radius, number in ((4.0, 0.0), (5.9, 0.0), (6.1, 1.0)):
        assert local_lipschitz_bound(net, center, radius).value == pytest.approx(number)


@pytest.mark.parametrize("p", NORMS)
def test_local_reaches_as_far_as_the_ball(p: float) -> None:
    """A unit is decided up to the distance of its kink, b / ||a||_q, and no further."""
    net = two_layers([[3.0, 4.0]], [[1.0]], nn.ReLU())
    center = torch.tensor([1.0, 1.0], dtype=torch.float64)
    distance = 7 / {1: 4, 2: 5, math.inf: 7}[p]
    for factor, kind in ((0.999, "exact"), (1.001, "upper bound")):
        assert local_lipschitz_bound(net, center, factor * distance, p).kind == kind


# ------------------------------------------------------------------------------ the interface


def test_methods_register_themselves_when_they_are_named() -> None:
    """Composition alone is imported, and no order of imports is asked of the reader."""
    code = (
        "import sys; from torch import nn; from lipbook.composition import lipschitz_bound; "
        "assert 'lipbook.tightness' not in sys.modules; "
        "print(lipschitz_bound(nn.Linear(2, 3), (2,), method='eclipse').value > 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_a_bound_says_what_it_is() -> None:
    net = network(nn.ReLU, 2, 4, 3)
    for method in (*UPPER, "exact"):
        bound = lipschitz_bound(net, (2,), method=method)
        assert bound.kind == ("exact" if method == "exact" else "upper bound")
        assert (bound.name, bound.p) == ("Sequential", 2)
        assert (bound.input_shape, bound.output_shape) == ((2,), (3,))
    image = nn.Sequential(nn.Flatten(), *net)
    bound = lipschitz_bound(image, (1, 1, 2), method="exact")
    assert bound.witness[0].shape == (1, 1, 2)


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
@pytest.mark.parametrize("method", ["lipsdp", "lipsdp-layer"])
def test_solvers_agree(solver: str, method: str) -> None:
    pytest.importorskip("cvxpy")
    for act in (nn.ReLU, MaxMin):
        net = network(act, 3, 4, 4, 2)
        bound = value(net, method, solver=solver)
        assert bound == pytest.approx(value(net, method), rel=1e-3 if solver == "SCS" else 1e-5)


NET = network(nn.ReLU, 2, 3, 2)
POINT = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "method must be one of 'product', 'absolute', .*'seqlip', got 'lipsdp-network'",
            lambda: value(NET, "lipsdp-network"),
        ),
        (
            TypeError,
            r"'product' takes no options, got \['max_units'\]",
            lambda: value(NET, "product", max_units=3),
        ),
        (
            TypeError,
            "unexpected keyword argument 'solver'",
            lambda: value(NET, "eclipse", solver="SCS"),
        ),
        *(
            (ValueError, f"p must be 2 for method '{m}', got 1", lambda m=m: value(NET, m, 1))
            for m in ("seqlip", "lipsdp", "lipsdp-layer", "eclipse")
        ),
        (
            ValueError,
            "at most max_units=2 hidden units, got 3: use method='eclipse'",
            lambda: value(NET, "lipsdp", max_units=2),
        ),
        (
            ValueError,
            r"solver must be 'barrier' or one of \[.*\], got 'NOPE'",
            lambda: value(NET, "lipsdp", solver="NOPE"),
        ),
        (
            ValueError,
            r"visited max_regions=5 regions of a network with 20 units and 3 inputs.*'lipsdp'",
            lambda: value(network(nn.ReLU, 3, 20, 1), "exact", max_regions=5),
        ),
        (
            ValueError,
            "whose linear pieces are known, got Tanh",
            lambda: value(network(nn.Tanh, 2, 2, 1), "exact"),
        ),
        (
            ValueError,
            "single units or on pairs, got FullSort",
            lambda: value(network(FullSort, 2, 4, 1), "seqlip"),
        ),
        (
            ValueError,
            "mix units, got 2 and MaxMin",
            lambda: value(network(MaxMin, 2, 4, 1), "absolute"),
        ),
        (ValueError, "mix units, got 1", lambda: value(network(MaxMin, 2, 4, 1), "averaged", 1)),
        (
            ValueError,
            "does not know Householder",
            lambda: value(network(lambda: Householder(4), 2, 4, 1), "absolute", 1),
        ),
        (
            ValueError,
            r"'1.0' \(Softmax\): .*the methods of lipbook.tightness read .* use method='product'",
            lambda: value(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Softmax(1))), "eclipse"),
        ),
        (
            ValueError,
            r"'0' \(Add\): .*joins what is before '0.branch' \(ReLU\) .*lipschitz_bound with",
            lambda: lipschitz_bound(
                nn.Sequential(composition.Residual(nn.ReLU())), (2,), method="eclipse"
            ),
        ),
        (
            ValueError,
            "does not run on inputs of shape",
            lambda: lipschitz_bound(NET, (5,), method="lipsdp"),
        ),
        (
            ValueError,
            "random in training mode",
            lambda: lipschitz_bound(nn.Sequential(nn.Dropout()), (2,), method="exact"),
        ),
        (
            TypeError,
            "center must be a floating-point tensor, got torch.int64",
            lambda: local_lipschitz_bound(NET, torch.tensor([1, 2]), 1),
        ),
        (
            TypeError,
            "center must be a floating-point tensor, got list",
            lambda: local_lipschitz_bound(NET, [1.0, 2.0], 1),
        ),
        (ValueError, "center must be finite", lambda: local_lipschitz_bound(NET, POINT / 0, 1)),
        (
            ValueError,
            "radius must be finite and at least 0, got -1",
            lambda: local_lipschitz_bound(NET, POINT, -1),
        ),
        (
            ValueError,
            "radius must be finite and at least 0, got nan",
            lambda: local_lipschitz_bound(NET, POINT, math.nan),
        ),
        (
            ValueError,
            "method must be 'interval' or 'lipsdp', got 'exact'",
            lambda: local_lipschitz_bound(NET, POINT, 1, 2, "exact"),
        ),
        (
            ValueError,
            "p must be 2 for method 'lipsdp', got inf",
            lambda: local_lipschitz_bound(NET, POINT, 1, math.inf, "lipsdp"),
        ),
        (
            ValueError,
            "p must be 1, 2 or math.inf, got 3",
            lambda: local_lipschitz_bound(NET, POINT, 1, 3),
        ),
        (
            ValueError,
            "single units or on pairs",
            lambda: local_lipschitz_bound(network(FullSort, 2, 4, 1), POINT, 1),
        ),
    ],
)
def test_refusals(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    if "NOPE" in message:
        pytest.importorskip("cvxpy")
    with pytest.raises(error, match=message):
        call()


def test_without_cvxpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lipbook\[bounds\]'"):
        value(NET, "lipsdp", solver="CLARABEL")
    assert value(NET, "lipsdp") > 0
