from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook import wasserstein
from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import (
    HeldOut,
    TransportBracket,
    blocks,
    c_transform,
    clip_weights_,
    clouds,
    critic_difference,
    exact,
    fit_critic,
    fitting,
    gradient_penalty,
    kantorovich_dual,
    sinkhorn,
    sliced_wasserstein,
    sparse,
    transforms,
    wasserstein1,
    wasserstein1_bracket,
)
from lipbook.wasserstein import bracket as bracket_module

METHODS = ["exact", "sinkhorn", "sparse", "blocks", "critic"]
UNIT = 2.0**-53


# --------------------------------------------------------------------------------- the package

ORDER = [
    "clouds",
    "transforms",
    "exact",
    "blocks",
    "sparse",
    "critics",
    "fitting",
    "bracket",
    "baselines",
]


def imported_files(source: str) -> set[str]:
    """Files of the package that a source text imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[2] for name in found if name.startswith("lipbook.wasserstein.")}


def test_files_import_only_those_before_them() -> None:
    """And the package's page names them in that order."""
    top = Path(wasserstein.__file__).parent
    assert {path.stem for path in top.glob("*.py")} == {*ORDER, "__init__"}
    for number, name in enumerate(ORDER):
        assert imported_files((top / f"{name}.py").read_text()) <= set(ORDER[:number]), name
    listed = ", ".join(f"``{name}``" for name in ORDER)
    assert listed in " ".join((wasserstein.__doc__ or "").split())
    assert imported_files("def f():\n    from lipbook.wasserstein import exact") == {"exact"}


def test_pot_is_loaded_on_first_use() -> None:
    code = (
        "import sys, torch, lipbook.wasserstein as w; assert 'ot' not in sys.modules; "
        "print(w.wasserstein1(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).item()); "
        "assert 'ot' in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(wasserstein.__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert ran.stdout == "5.0\n"


# ------------------------------------------------------------------- oracles in exact arithmetic


def distance(x: np.ndarray, y: np.ndarray) -> Decimal:
    """Distance of the float64 points as they are, to 60 digits."""
    return sum(
        ((Decimal(float(a)) - Decimal(float(b))) ** 2 for a, b in zip(x, y, strict=True)),
        Decimal(0),
    ).sqrt()


def assignment(cost: list[list[Decimal]]) -> Decimal:
    """Cheapest assignment, by dynamic programming over the sets of used columns."""
    best: dict[int, Decimal] = {0: Decimal(0)}
    for row in cost:
        following: dict[int, Decimal] = {}
        for used, value in best.items():
            for j, c in enumerate(row):
                if not used >> j & 1:
                    key = used | 1 << j
                    if key not in following or value + c < following[key]:
                        following[key] = value + c
        best = following
    return best[(1 << len(cost)) - 1]


def exact_by_copies(x: Tensor, y: Tensor, copies_x: list[int], copies_y: list[int]) -> Decimal:
    """W₁ to 60 digits if point i has mass copies[i] / sum(copies): copies are assigned."""
    rows = [p for p, k in zip(x.double().numpy(), copies_x, strict=True) for _ in range(k)]
    columns = [p for p, k in zip(y.double().numpy(), copies_y, strict=True) for _ in range(k)]
    assert len(rows) == len(columns) <= 8
    return assignment([[distance(p, q) for q in columns] for p in rows]) / len(rows)


def exact_on_the_line(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Fraction:
    """Integral of |F - G|, in rational arithmetic."""
    jumps: dict[Fraction, Fraction] = {}
    for points, weights, sign in ((x, a, 1), (y, b, -1)):
        ones = torch.ones(len(points)) if weights is None else weights
        masses = [Fraction(w) for w in ones.tolist()]
        for point, mass in zip(points[:, 0].tolist(), masses, strict=True):
            key = Fraction(point)
            jumps[key] = jumps.get(key, Fraction(0)) + sign * mass / sum(masses)
    ends, total, height = sorted(jumps), Fraction(0), Fraction(0)
    for left, right in itertools.pairwise(ends):
        height += jumps[left]
        total += abs(height) * (right - left)
    return total


def exact_two_by_two(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Decimal:
    """W₁ between pairs of points: linear in the mass of one move, so at an end of its range."""
    a1, a2, b1, b2 = (Decimal(w) for w in a.tolist() + b.tolist())
    a1, b1 = a1 / (a1 + a2), b1 / (b1 + b2)
    c = [[distance(p, q) for q in y.numpy()] for p in x.numpy()]
    return min(
        t * c[0][0] + (a1 - t) * c[0][1] + (b1 - t) * c[1][0] + (1 - a1 - b1 + t) * c[1][1]
        for t in (max(Decimal(0), a1 + b1 - 1), min(a1, b1))
    )


def linear_program(x: Tensor, y: Tensor, a: np.ndarray, b: np.ndarray) -> float:
    """W₁ by SciPy's general LP solver, on the distances by differences."""
    cost = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    result = scipy.optimize.linprog(
        cost.ravel(), A_eq=np.vstack((rows, columns)), b_eq=np.concatenate((a, b))
    )
    assert result.status == 0
    return float(result.fun)


def feasible(bracket: TransportBracket, x: Tensor, y: Tensor) -> bool:
    """f + g <= c, for the real distances up to the 64 bits of an extended float."""
    f, g = (p.numpy().astype(np.longdouble) for p in (bracket.x_potential, bracket.y_potential))
    x, y = (z.double().numpy().astype(np.longdouble) for z in (x, y))
    cost = np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))
    assert np.finfo(np.longdouble).eps < 1e-18
    return bool((f[:, None] + g <= cost * (1 + np.longdouble(x.shape[1] + 4) * 2.0**-63)).all())


# ----------------------------------------------------------------------------- small problems


def cloud(kind: str, rng: np.random.Generator, n: int) -> Tensor:
    d = int(rng.integers(1, 5))
    points = rng.standard_normal((n, 4))
    if kind == "duplicates":
        points = np.round(points)
    elif kind == "collinear":
        points = np.outer(rng.integers(-4, 5, n) / 4, [1.0, 2.0, -1.0, 0.5])
    elif kind == "line":
        d = 1
    elif kind == "offset":
        points = points * 1e-6 + 1e3
    elif kind == "clusters":
        points = points * 1e-8 + rng.integers(0, 2, (n, 1))
    elif kind == "huge":
        points = points * 1e150
    elif kind == "tiny":
        points = points * 1e-150
    elif kind == "subnormal":
        points = points * 1e-310
    elif kind == "largest":
        points = points / 10 * np.finfo(np.float64).max
    elif kind == "mixed":
        points = points * 10.0 ** rng.integers(-300, 300, (n, 4))
    else:
        assert kind == "normal"
    return torch.from_numpy(points[:, :d].copy())


KINDS = ["normal", "duplicates", "collinear", "line", "offset", "clusters"]
SCALES = ["huge", "tiny", "subnormal", "largest", "mixed"]


def problem(
    kind: str, seed: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[int], list[int]]:
    """Two small clouds whose masses are multiples of 1/6 (uniform) or 1/8 (some of them 0)."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        n, m = [(1, 1), (2, 3), (3, 2), (6, 3), (1, 5), (4, 4), (6, 6)][seed // 2 % 7]
        common = math.lcm(n, m)
        copies_x, copies_y = [common // n] * n, [common // m] * m
        weights = [None, None]
    else:
        n, m = rng.integers(1, 7, 2)
        copies_x, copies_y = (
            rng.multinomial(8, np.full(k, 1 / k)).tolist() for k in (int(n), int(m))
        )
        weights = [torch.tensor(c, dtype=torch.float64) / 8 for c in (copies_x, copies_y)]
    x = cloud(kind, rng, int(n))
    while (y := cloud(kind, rng, int(m))).shape[1] != x.shape[1]:
        pass
    return x, y, weights[0], weights[1], copies_x, copies_y


def bracket_of(
    method: str, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, **more: Any
) -> TransportBracket:
    critic = (lambda z: z.abs().amax(1)) if method == "critic" else None
    return wasserstein1_bracket(x, y, critic, a, b, method=method, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS + SCALES)
def test_bounds_are_never_the_wrong_way_round(kind: str) -> None:
    """1,100 problems, judged in 60 digits; the other methods on a part of them."""
    with localcontext() as context:
        context.prec = 60
        for seed in range(100):
            x, y, a, b, copies_x, copies_y = problem(kind, seed)
            truth = exact_by_copies(x, y, copies_x, copies_y)
            for method in METHODS if seed < 8 else METHODS[:1]:
                bracket = bracket_of(method, x, y, a, b)
                assert Decimal(bracket.lower) <= truth, (method, seed)
                assert math.isinf(bracket.upper) or truth <= Decimal(bracket.upper), (method, seed)
            gap = float(bracket.gap if seed >= 8 else bracket_of("exact", x, y, a, b).gap)
            largest = max(x.abs().max().item(), y.abs().max().item())
            if kind in ("normal", "duplicates", "collinear", "huge", "tiny"):
                # n + m + 8 units of mass astray, the rest of rounding, times the diameter
                assert gap <= (2 * 20 + 80) * UNIT * 4 * largest, seed


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_for_weights_that_no_float_sum_is_exact_for(method: str) -> None:
    rng = np.random.default_rng(0)
    with localcontext() as context:
        context.prec = 60
        for _ in range(100 if method == "exact" else 10):
            x, y = (torch.from_numpy(rng.standard_normal((2, 3))) for _ in range(2))
            a, b = (torch.from_numpy(rng.dirichlet([0.3, 0.3])) for _ in range(2))
            truth = exact_two_by_two(x, y, a, b)
            bracket = bracket_of(method, x, y, a, b)
            assert Decimal(bracket.lower) <= truth <= Decimal(bracket.upper)
            if method == "exact":
                assert bracket.gap <= 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_on_the_line(method: str) -> None:
    rng = np.random.default_rng(1)
    for round_ in range(60 if method == "exact" else 5):
        n, m = rng.integers(1, 30, 2)
        points = [torch.from_numpy(np.round(rng.standard_normal((k, 1)), 1)) for k in (n, m)]
        a, b = (torch.from_numpy(rng.dirichlet(np.full(k, 0.5))) for k in (n, m))
        weights = (a, b) if round_ % 2 else (None, None)
        truth = exact_on_the_line(*points, *weights)
        bracket = bracket_of(method, *points, *weights)
        assert Fraction(bracket.lower) <= truth <= Fraction(bracket.upper)
        if method == "exact":
            assert bracket.gap <= 1e-13
            assert abs(wasserstein1(*points, *weights).item() - truth) <= 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [2, 40])  # both ways to compute distances
def test_bracket_holds_what_pot_and_scipy_find(method: str, d: int) -> None:
    rng = np.random.default_rng(d)
    x, y = (torch.from_numpy(rng.standard_normal((n, d))) for n in (30, 41))
    a, b = (rng.dirichlet(np.ones(n)) for n in (30, 41))
    found = linear_program(x, y, a, b)
    assert found == pytest.approx(ot.emd2(a, b, np.linalg.norm(x[:, None] - y, axis=2)), rel=1e-9)
    bracket = bracket_of(method, x, y, torch.from_numpy(a), torch.from_numpy(b))
    assert bracket.lower * (1 - 1e-8) <= found <= bracket.upper * (1 + 1e-8)
    assert feasible(bracket, x, y)
    if method == "exact":
        assert bracket.relative_gap <= 1e-11
    if method == "sinkhorn":
        assert bracket.relative_gap <= 0.01


# -------------------------------------------------------------------------- the exact distance


def loop(x: Tensor, y: Tensor) -> float:
    """The definition for n = m without weights: the best of all assignments."""
    cost = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)
    n = len(cost)
    return min(sum(cost[range(n), p]) for p in itertools.permutations(range(n))) / n


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.integers(0, 999),
)
def test_wasserstein1_is_the_best_assignment(
    n: int, d: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(scale * rng.standard_normal((n, d))).to(dtype) for _ in range(2))
    value = wasserstein1(x, y)
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.item() == pytest.approx(loop(x.double(), y.double()), rel=torch.finfo(dtype).eps)


def test_wasserstein1_agrees_with_pot_and_scipy() -> None:
    rng = np.random.default_rng(3)
    for n, m, d in ((40, 60, 1), (50, 50, 3), (64, 37, 50)):
        x, y = (torch.from_numpy(rng.standard_normal((k, d))) for k in (n, m))
        a, b = (torch.from_numpy(rng.dirichlet(np.ones(k))) for k in (n, m))
        cost = np.linalg.norm(x[:, None] - y[None], axis=2)
        expected = ot.emd2(a.numpy(), b.numpy(), cost)
        assert wasserstein1(x, y, a, b).item() == pytest.approx(expected, rel=1e-12)
        if n == m:
            chosen = scipy.optimize.linear_sum_assignment(cost)
            assert wasserstein1(x, y).item() == pytest.approx(cost[chosen].mean(), rel=1e-12)
        if d == 1:
            expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0], a, b)
            assert wasserstein1(x, y, a, b).item() == pytest.approx(expected, rel=1e-12)


def test_wasserstein1_in_closed_form() -> None:
    """Translation; a centre and its sphere; the expectation of two Gaussians' quantiles."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((100, 5)))
    t = torch.tensor([1.0, -2, 0, 4, 2], dtype=torch.float64)  # of norm 5
    assert wasserstein1(x, x + t).item() == pytest.approx(5, rel=1e-14)
    sphere = nn.functional.normalize(x) * 3 + t
    assert wasserstein1(t[None], sphere).item() == pytest.approx(3, rel=1e-14)
    ranks = torch.arange(1, 20000, 2, dtype=torch.float64)[:, None] / 20000
    normal = torch.special.ndtri(ranks)  # equal means, deviations 1 and 3
    expected = 2 * math.sqrt(2 / math.pi)
    assert wasserstein1(normal, 3 * normal).item() == pytest.approx(expected, rel=1e-3)
    assert wasserstein1(x, x).item() == 0


def test_images_count_as_flattened() -> None:
    x, y = torch.rand(5, 2, 3, 4, dtype=torch.float64), torch.rand(6, 2, 3, 4, dtype=torch.float64)
    assert wasserstein1(x, y).item() == wasserstein1(x.flatten(1), y.flatten(1)).item()
    bracket = wasserstein1_bracket(x, y)
    assert bracket.lower <= wasserstein1(x, y).item() * (1 + 1e-13)


@pytest.mark.parametrize("d", [1, 3])
def test_gradients_are_those_of_finite_differences(d: int) -> None:
    rng = np.random.default_rng(5 + d)
    x, y = (torch.from_numpy(rng.standard_normal((n, d))).requires_grad_() for n in (6, 8))
    a, b = (torch.from_numpy(rng.dirichlet(np.full(n, 5))).requires_grad_() for n in (6, 8))
    (2 * wasserstein1(x, y, a, b)).backward()
    step = 1e-6
    for argument, tangent in (
        (x, rng.standard_normal((6, d))),
        (y, rng.standard_normal((8, d))),
        (a, rng.standard_normal(6)),
        (b, rng.standard_normal(8)),
    ):
        direction = torch.from_numpy(tangent)
        if argument is a or argument is b:
            direction -= direction.mean()  # weights keep the sum 1
            assert abs(argument.grad.sum().item()) <= 1e-14
        ends = []
        for sign in (1, -1):
            moved = [
                (z + sign * step * direction if z is argument else z).detach() for z in (x, y, a, b)
            ]
            ends.append(2 * wasserstein1(*moved).item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (argument.grad * direction).sum().item() == pytest.approx(slope, abs=1e-7)


def test_gradients_agree_with_those_of_pot() -> None:
    rng = np.random.default_rng(6)
    grads = []
    points = [torch.from_numpy(rng.standard_normal((n, 3))) for n in (7, 9)]
    weights = [torch.from_numpy(rng.dirichlet(np.full(n, 5))) for n in (7, 9)]
    for function in (
        wasserstein1,
        lambda x, y, a, b: ot.emd2(a, b, torch.cdist(x, y)),
    ):
        leaves = [z.clone().requires_grad_() for z in points + weights]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradient_of_equal_points_is_a_subgradient() -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    wasserstein1(x, torch.zeros(3, 2)).backward()
    assert torch.equal(x.grad, torch.zeros(3, 2))


def test_gradient_for_a_weight_of_zero_is_that_of_moving_mass_there() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    y = torch.tensor([[0.0]], dtype=torch.float64)
    a = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    wasserstein1(x, y, a).backward()
    slope = (a.grad[2] - a.grad[1]).item()
    moved = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    assert slope == pytest.approx(9)
    assert (wasserstein1(x, y, moved).item() - 0.5) / 0.1 == pytest.approx(9)


CLOUD = torch.zeros(3, 2)
BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((np.zeros((3, 2)), CLOUD), TypeError, "x must be a tensor, got ndarray"),
    ((CLOUD, np.zeros((3, 2))), TypeError, "y must be .* got ndarray: torch.from_numpy makes"),
    ((CLOUD, CLOUD, np.ones(3) / 3), TypeError, "x_weights must be .* got ndarray: torch.from_num"),
    ((CLOUD, torch.tensor([[0, 1], [0, math.nan]])), ValueError, r"y must be .* nan at \[1, 1\]"),
    ((CLOUD, CLOUD, torch.tensor([0, math.inf, 1])), ValueError, r"weights .* inf at \[1\]"),
    ((CLOUD.int(), CLOUD.int()), TypeError, "x must be float32 or float64, got torch.int32"),
    ((CLOUD, CLOUD.half()), TypeError, "y must be float32 or float64, got torch.float16"),
    ((CLOUD, CLOUD.double()), TypeError, "y must have the dtype of x, torch.float32, got"),
    ((CLOUD[:, 0], CLOUD), ValueError, r"x must have shape .* got \(3,\): use x\[:, None\]"),
    ((CLOUD[:0], CLOUD), ValueError, r"x must have shape .* got \(0, 2\)"),
    ((CLOUD, CLOUD[:, :0]), ValueError, r"y must have shape .* got \(3, 0\)"),
    ((CLOUD, torch.zeros(3, 4)), ValueError, r"of those of x, \(2,\), got \(4,\)"),
    ((CLOUD, CLOUD + math.inf), ValueError, "y must be finite"),
    ((CLOUD + math.nan, CLOUD), ValueError, "x must be finite"),
    ((CLOUD, CLOUD, [0.5, 0.5, 0]), TypeError, "x_weights must be a tensor, got list"),
    ((CLOUD, CLOUD, torch.tensor([1, 0, 0])), TypeError, "x_weights must be float32 or"),
    ((CLOUD, CLOUD, None, torch.ones(2) / 2), ValueError, r"y_weights must have shape \(3,\)"),
    ((CLOUD, CLOUD, torch.ones(3, 1) / 3), ValueError, r"got \(3, 1\)"),
    ((CLOUD, CLOUD, torch.ones(3)), ValueError, "x_weights must sum to 1, got 3: divide"),
    (
        (CLOUD, CLOUD, torch.zeros(3)),
        ValueError,
        "x_weights must sum to 1, got 0: all of them are 0",
    ),
    ((CLOUD, CLOUD, torch.tensor([1.5, -0.5, 0])), ValueError, "must be >= 0, got -0.5"),
    ((CLOUD, CLOUD, torch.tensor([math.nan, 1, 0])), ValueError, "x_weights must be finite"),
    ((CLOUD, CLOUD.to("meta")), ValueError, "y must be on the device of x, cpu, got meta"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_clouds_are_refused_everywhere(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    x, y, a, b = (*arguments, None, None)[:4]
    critic = nn.Linear(2, 1)
    for function in (
        wasserstein1,
        lambda x, y, a, b: wasserstein1_bracket(x, y, None, a, b),
        lambda x, y, a, b: kantorovich_dual(critic, x, y, a, b),
        lambda x, y, a, b: critic_difference(critic, x, y, a, b),
        sliced_wasserstein,
        functools.partial(sinkhorn, entropy=1.0),
    ):
        with pytest.raises(error, match=message):
            function(x, y, a, b)


def test_what_does_not_fit_in_memory_is_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert clouds._memory() >= 2**28
    monkeypatch.setattr(clouds, "_memory", lambda: 2**20)
    x = torch.randn(300, 2)
    for function in (
        wasserstein1,
        functools.partial(wasserstein1_bracket, method="exact"),
        functools.partial(wasserstein1_bracket, method="sinkhorn"),
        functools.partial(sinkhorn, entropy=1.0),
    ):
        with pytest.raises(ValueError, match=r"300 and 300 points.* 0\.0 GiB .*wasserstein1_brack"):
            function(x, x)
    assert wasserstein1_bracket(x, x, method="blocks").lower == 0
    assert wasserstein1(x[:, :1], x[:, 1:]) > 0  # on the line there is no matrix


def test_a_failure_of_the_solver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = ot.emd
    monkeypatch.setattr(ot, "emd", lambda *a, **k: solver(*a, **{**k, "numItermax": 1}))
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    with pytest.raises(RuntimeError, match=r"ot\.emd found no optimal plan"):
        wasserstein1(x, y)


# --------------------------------------------------------------------------------- c-transforms


def test_c_transform_is_its_definition() -> None:
    rng = np.random.default_rng(7)
    points, at = rng.standard_normal((40, 3)), rng.standard_normal((50, 3))
    potential = rng.standard_normal(40)
    expected = [
        min(math.dist(z, p) - f for p, f in zip(points, potential, strict=True)) for z in at
    ]
    found = c_transform(*(torch.from_numpy(v) for v in (potential, points, at)))
    assert np.abs(found.numpy() - expected).max() <= 1e-14
    assert c_transform(*(torch.from_numpy(v).float() for v in (potential, points, at))).dtype == (
        torch.float32
    )


def test_c_transforms_are_1_lipschitz_improve_once_and_then_stop() -> None:
    rng = np.random.default_rng(8)
    x, y, z = (torch.from_numpy(rng.standard_normal((30, 4))) for _ in range(3))
    f = torch.from_numpy(rng.standard_normal(30))
    fc = c_transform(f, x, y)
    fcc = c_transform(fc, y, x)
    assert (fcc >= f - 1e-14).all()
    assert torch.allclose(c_transform(fcc, x, y), fc, rtol=0, atol=1e-14)
    far = 10 * z
    slopes = (c_transform(f, x, z) - c_transform(f, x, far)).abs() / (z - far).norm(dim=1)
    assert slopes.max() <= 1 + 1e-14


@pytest.mark.parametrize("d", [1, 2, 5, 20, 60])
def test_tiles_give_the_minimum_over_all(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(d)
    x, y = (torch.from_numpy(rng.standard_normal((n, d))) for n in (700, 900))
    for f in (torch.zeros(700), x[:, 0], 1e6 * x[:, 0], torch.from_numpy(rng.standard_normal(700))):
        potential = f.double()
        whole = c_transform(potential, x, y)
        sizes: list[int] = []
        distances = transforms.distances
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "CHUNK", 2**14)
            patch.setattr(transforms, "_TILE", 64)

            def counted(
                a: Tensor, b: Tensor, sizes: list[int] = sizes, distances: Any = distances
            ) -> tuple[Tensor, float]:
                sizes.append(len(a) * len(b))
                return distances(a, b)

            patch.setattr(transforms, "distances", counted)
            tiled = c_transform(potential, x, y)
        # of high dimensions the products of all points and of tiles differ, by 64 (d + 8) units
        size = 1 + potential.abs().max().item()
        assert (tiled - whole).abs().max() <= (4 if d < 33 else 64 * (d + 8)) * 16 * UNIT * size
        assert max(sizes) <= 2**16
        if d == 1 and f is x[:, 0]:
            assert sum(sizes) < 700 * 900 / 2  # most tiles are never looked at


C_BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((torch.zeros(2), CLOUD, CLOUD), ValueError, r"potential must have shape \(3,\), .* got \(2,"),
    ((torch.zeros(3) / 0, CLOUD, CLOUD), ValueError, "potential must be finite"),
    ((torch.zeros(3), CLOUD, torch.zeros(3, 4)), ValueError, "at must be points like those of"),
    ((torch.zeros(3), CLOUD, CLOUD.double()), ValueError, "at must be points like those of"),
    ((torch.zeros(3), [0], CLOUD), TypeError, "points must be a tensor, got list"),
    (([0], CLOUD, CLOUD), TypeError, "potential must be a tensor, got list"),
    ((np.zeros(3), CLOUD, CLOUD), TypeError, "potential must .* got ndarray: torch.from_numpy"),
    ((torch.zeros(3), CLOUD, CLOUD / 0), ValueError, r"at must be finite, got nan at \[0, 0\]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), C_BAD)
def test_c_transform_refuses(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        c_transform(*arguments)


# ---------------------------------------------------------------------------------- the bracket


def shells(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three centres at distance 2 and the unit spheres around them: W₁ is about 1."""
    rng = np.random.default_rng(seed)
    centres = np.zeros((3, d))
    centres[:, 0] = -2, 0, 2
    ball = rng.standard_normal((n, d))
    sphere = centres[np.arange(n) % 3] + ball / np.linalg.norm(ball, axis=1, keepdims=True)
    return torch.from_numpy(centres[np.arange(n) % 3]), torch.from_numpy(sphere)


def mixture(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) + 3 * rng.integers(0, 2, (n, 1))
    return torch.from_numpy(x), torch.from_numpy(1.5 * rng.standard_normal((m, d)) + 1)


INTERIOR = [
    ("shells, d=2", *shells(400, 2)),
    ("shells, d=10", *shells(400, 10)),
    ("mixture, d=2", *mixture(300, 350, 2)),
    ("mixture, d=40", *mixture(350, 300, 40)),
    ("itself", mixture(200, 1, 3)[0], mixture(200, 1, 3)[0]),
]


@pytest.mark.parametrize(("name", "x", "y"), INTERIOR, ids=[row[0] for row in INTERIOR])
def test_interior_methods_come_within_a_percent(name: str, x: Tensor, y: Tensor) -> None:
    exact = wasserstein1_bracket(x, y, method="exact")
    assert exact.relative_gap <= 1e-10
    for method in ("sinkhorn", "sparse", "blocks"):
        bracket = wasserstein1_bracket(x, y, method=method)  # type: ignore[arg-type]
        assert bracket.lower <= exact.upper, method
        assert exact.lower <= bracket.upper, method
        assert bracket.gap <= 0.01 * exact.upper + 1e-9, method
        assert feasible(bracket, x, y), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_plan_and_potentials_are_what_the_bounds_say(method: str, weighted: bool) -> None:
    x, y = mixture(70, 90, 3, seed=9)
    rng = np.random.default_rng(9)
    a, b = (torch.from_numpy(rng.dirichlet(np.ones(n))) for n in (70, 90))
    a[:5], b[-5:] = 0, 0
    weights = (a / a.sum(), b / b.sum()) if weighted else (None, None)
    bracket = bracket_of(method, x, y, *weights)
    a, b = weights if weighted else (torch.full((n,), 1 / n, dtype=torch.float64) for n in (70, 90))
    plan = bracket.plan.to_dense()
    assert (plan >= 0).all()
    assert torch.allclose(plan.sum(1), a, rtol=0, atol=1e-15 * 70)
    assert torch.allclose(plan.sum(0), b, rtol=0, atol=1e-15 * 90)
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    assert bracket.upper == pytest.approx((plan * cost).sum().item(), rel=1e-12)
    assert feasible(bracket, x, y)
    dual = a @ bracket.x_potential + b @ bracket.y_potential
    assert bracket.lower == pytest.approx(dual.item(), rel=1e-12)
    assert bracket.lower <= bracket.upper
    critic = c_transform(bracket.y_potential, y, x)  # a critic on the whole space
    assert torch.allclose(critic[a > 0], bracket.x_potential[a > 0], rtol=0, atol=1e-12)


def test_blocks_never_hold_the_cost_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixture(3000, 2500, 2)
    sizes: list[int] = []
    distances = clouds.distances

    def counted(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        sizes.append(len(a) * len(b))
        return distances(a, b)

    for module in (bracket_module, blocks, exact, transforms):
        monkeypatch.setattr(module, "distances", counted)
    bracket = wasserstein1_bracket(x, y, method="blocks", sweeps=4)
    assert max(sizes) <= 1500**2 < 3000 * 2500
    assert bracket.relative_gap <= 0.05
    assert bracket.plan._nnz() <= 2 * 5500


def test_cells_are_halves_of_halves_across_their_longest_axes() -> None:
    corners = np.array([[0, 0], [9, 1], [0, 1], [9, 0]], float)
    order = blocks.order_of_cells(corners, 2)
    assert order.tolist() == [0, 2, 3, 1]
    place = np.random.default_rng(0).standard_normal((1000, 2))
    order = blocks.order_of_cells(place, 10)
    assert np.array_equal(np.sort(order), np.arange(1000))
    cells = place[order].reshape(8, 125, 2)
    widths = np.linalg.norm(np.ptp(cells, axis=1), axis=1)
    assert widths.mean() < np.linalg.norm(np.ptp(place, axis=0)) / 2


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(2, 60))
@settings(max_examples=20, deadline=None)
def test_a_refined_plan_has_the_marginals_and_the_cells_of_the_coarse_one(
    seed: int, n: int, m: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.multinomial(1000, np.full(k, 1 / k)) + 0.0 for k in (n, m))
    a, b = a[a > 0], b[b > 0]
    cells = [(np.arange(len(z)) << 1) // len(z) for z in (a, b)]
    sums = [np.bincount(c, z) for c, z in zip(cells, (a, b), strict=True)]
    coarse = exact.northwest(sums[0], sums[1][::-1])
    coarse = coarse._replace(j=len(sums[1]) - 1 - coarse.j)
    fine = blocks.refined(coarse, a, b)
    assert np.array_equal(np.bincount(fine.i, fine.mass, len(a)), a)
    assert np.array_equal(np.bincount(fine.j, fine.mass, len(b)), b)
    moved, wanted = np.zeros((2, 2)), np.zeros((2, 2))
    np.add.at(moved, (cells[0][fine.i], cells[1][fine.j]), fine.mass)
    np.add.at(wanted, (coarse.i, coarse.j), coarse.mass)
    assert np.array_equal(moved, wanted)


@pytest.mark.parametrize(("d", "gap"), [(2, 0.1), (3, 0.2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_beyond_all_pairs_prove_their_bounds(
    d: int, gap: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = mixture(400, 300, d, seed=5)
    y[:100] = x[:100]  # where f + g <= 0 is tight
    a, b = (
        torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(len(z)))) if weighted else None
        for z in (x, y)
    )
    monkeypatch.setattr(bracket_module, "_TRANSFORMED_SIZE", 0)
    monkeypatch.setattr(bracket_module, "_SAMPLE", 250)
    monkeypatch.setattr(blocks, "COARSE", 16)
    bracket = wasserstein1_bracket(x, y, None, a, b, method="blocks")
    value = wasserstein1(x, y, a, b).item()
    assert bracket.lower <= value <= bracket.upper
    assert bracket.relative_gap <= gap
    assert bracket.lower_from == "the mean of exact potentials of samples"
    assert feasible(bracket, x, y)


# ------------------------------------------------------------------------------- sparse graphs


def sides(x: Tensor, y: Tensor) -> list[sparse.Filter]:
    rng = np.random.default_rng(0)
    return [sparse.filter_of(z, (x.mean(0) + y.mean(0)) / 2, rng) for z in (x, y)]


def awkward(kind: str, d: int) -> tuple[Tensor, Tensor]:
    """Clouds whose distances float32 gets wrong, in coordinates below 1."""
    rng = np.random.default_rng(3)
    x, y = (torch.from_numpy(rng.standard_normal((n, d))) / 8 for n in (300, 250))
    if kind == "close":  # two clusters far from the centre, with distances near its error
        x, y = ((torch.arange(len(z)) % 2)[:, None] - 0.5 + 0.01 * z for z in (x, y))
    if kind == "equal":
        y[:200] = x[:200]
    return x, y


@pytest.mark.parametrize("kind", ["normal", "close", "equal"])
@pytest.mark.parametrize("d", [2, 20, 300])
def test_candidates_give_the_minimum_over_all_and_never_more(kind: str, d: int) -> None:
    x, y = awkward(kind, d)
    at, cloud = sides(x, y)
    g = torch.from_numpy(np.random.default_rng(4).standard_normal(len(y))) / 30
    g = g * (kind != "close")
    found, candidates = sparse.transform_with_candidates(at, cloud, g)
    costs = (x[:, None] - y).square().sum(2).sqrt()
    naive = (costs - g).amin(1)
    assert (found <= naive).all()
    # what float32 cannot see of a distance near its error is given away
    error = 2 * sparse._slack(d, torch.float32) * max(at.norms.max(), cloud.norms.max()).item()
    lost = 1e-12 if kind == "normal" else math.sqrt(error)
    assert torch.allclose(found, naive, rtol=0, atol=lost)
    best = (costs - g).argmin(1)
    if kind == "normal":
        assert (candidates[:, 0] == best).all()
        assert candidates.shape[1] == sparse.NEAREST + sparse.FEW * sum(
            cloud.groups // part >= sparse.FEW for part in sparse.THINNED
        )


def test_bounds_of_the_filter_are_below_all_distances_and_the_smallest_are_listed() -> None:
    x, y = awkward("close", 40)
    at, cloud = sides(x, y)
    assert cloud.rough.dtype == torch.float32
    values, near, _ = sparse.nearest(at, cloud, torch.zeros(len(y), dtype=torch.float64))
    costs = (x[:, None] - y).square().sum(2).sqrt()
    assert (values <= costs.gather(1, near) * (1 + 1e-7)).all()
    squares = at.norms[:, None] + cloud.norms - 2 * at.rough @ cloud.rough.mT
    bounds = squares.clamp(min=0).sqrt()
    # in another order of additions
    assert torch.allclose(values, bounds.sort(1)[0][:, : values.shape[1]], rtol=0, atol=2e-3)


def test_the_filter_is_in_float64_where_products_of_float32_may_be_rougher() -> None:
    x, y = awkward("normal", 3)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert sides(x, y)[0].rough.dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


def test_clusters_nearer_than_float32_can_tell_are_told_apart() -> None:
    x, y = mixture(200, 200, 30)
    x, y = (torch.cat((1e-5 * z, 10 + 1e-5 * z)) for z in (x, y))
    bracket = wasserstein1_bracket(x, y, method="sparse")
    assert bracket.lower <= wasserstein1(x, y).item() <= bracket.upper
    assert bracket.relative_gap <= 0.01


def test_steps_on_the_whole_graph_are_those_of_sinkhorn() -> None:
    x, y = mixture(40, 30, 2)
    cost = torch.cdist(x, y).numpy()
    i, j = (k.ravel() for k in np.indices(cost.shape))
    graph = sparse.Graph(i, j, cost.ravel(), cost.shape)
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1, 2, n) for n in cost.shape)
    a, b = a / a.sum(), b / b.sum()
    entropy = 0.2
    (f, g), mass, astray = sparse.scale_on_graph(
        graph, (a, b), (np.zeros(40), np.zeros(30)), entropy, 1e-6, 5000
    )
    u, v = np.zeros(40), np.zeros(30)  # POT and the textbook: potentials in turn
    for _ in range(5000):
        u = -entropy * np.log(np.exp((v - cost) / entropy) @ b)
        v = -entropy * np.log(np.exp((u[:, None] - cost) / entropy).T @ a)
    assert astray <= 1e-6
    shift = (f - u).mean()
    assert np.allclose(f - shift, u, atol=1e-4)
    assert np.allclose(g + shift, v, atol=1e-4)
    plan = ot.sinkhorn(a, b, cost, entropy, numItermax=5000, stopThr=1e-12)
    assert np.allclose(mass.reshape(cost.shape), plan, atol=1e-6)


@pytest.mark.parametrize("d", [2, 20])
def test_sparse_comes_within_a_percent_without_a_cost_matrix(
    d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = mixture(1100, 1000, d)
    exact_value = wasserstein1(x, y).item()
    monkeypatch.setattr(bracket_module, "_SOFT", 200)
    monkeypatch.setattr(sparse, "_ENTRIES", 2**12)
    sizes: list[int] = []
    distances = clouds.distances

    def counted(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        sizes.append(len(a) * len(b))
        return distances(a, b)

    for module in (bracket_module, blocks, exact, transforms):
        monkeypatch.setattr(module, "distances", counted)
    seen: list[tuple[float, float]] = []
    bracket = wasserstein1_bracket(
        x, y, method="sparse", progress=lambda *bounds: seen.append(bounds), seconds=600
    )
    assert max(sizes) <= 1100 * 256
    assert bracket.lower <= exact_value <= bracket.upper
    assert bracket.relative_gap <= 0.01
    lower, upper = zip(*seen, strict=True)
    assert list(lower) == sorted(lower)
    assert list(upper) == sorted(upper, reverse=True)
    assert upper[-1] == pytest.approx(bracket.upper, rel=1e-12)
    assert lower[-1] == pytest.approx(bracket.lower, rel=1e-12)


def test_auto_is_exact_where_that_is_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixture(60, 60, 2)
    monkeypatch.setattr(bracket_module, "_EXACT_SIZE", 50**2)
    monkeypatch.setattr(bracket_module, "_DENSE_SIZE", 70**2)
    assert "exact plan" in wasserstein1_bracket(x[:50], y[:50]).upper_from
    assert "Sinkhorn" in wasserstein1_bracket(x, y).upper_from
    assert "blocks" in wasserstein1_bracket(torch.cat((x, x)), y).upper_from
    high = mixture(80, 80, 4)
    assert "sparse" in wasserstein1_bracket(*high).upper_from
    assert "monotone" in wasserstein1_bracket(x[:, :1], y[:, :1]).upper_from


def test_a_bracket_of_many_points_on_a_line() -> None:
    x = torch.arange(100_000, dtype=torch.float64)[:, None]
    bracket = wasserstein1_bracket(x, 2 * x)
    assert bracket.lower <= 49999.5 <= bracket.upper
    assert bracket.relative_gap <= 1e-9


def test_bracket_is_deterministic_and_prints_its_reasons() -> None:
    x, y = mixture(100, 90, 2)
    for method in METHODS:
        first, second = bracket_of(method, x, y), bracket_of(method, x, y)
        assert first == second
        assert torch.equal(first.x_potential, second.x_potential)
    text = str(first)
    assert text.splitlines()[0].startswith(f"{first.lower:.6g} <= W1 <= {first.upper:.6g} (gap")
    assert first.lower_from in text
    assert first.upper_from in text
    assert (first.lower + first.upper) / 2 in first
    assert first.lower - 1e-9 not in first
    assert first.upper + 1e-9 not in first


def critics() -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))
    return {
        "constant": lambda z: torch.full((len(z),), 7.0),
        "zero": lambda z: torch.zeros(len(z)),
        "steep": lambda z: 100 * z.norm(dim=1),
        "steeper than floats": lambda z: 1e300 * z[:, 0],
        "flat": lambda z: 1e-300 * z.norm(dim=1, keepdim=True),
        "backwards": lambda z: -z.norm(dim=1),
        "noise": lambda z: torch.sin(1e6 * z.sum(1)),
        "one spike": lambda z: 1e6 * (z[:, 0] == z[:, 0].max()),
        "network": network,
    }


@pytest.mark.parametrize("name", list(critics()))
@pytest.mark.parametrize("method", METHODS)
def test_no_critic_puts_the_bounds_the_wrong_way_round(name: str, method: str) -> None:
    x, y = mixture(60, 50, 3, seed=1)
    exact = wasserstein1_bracket(x, y)
    bracket = wasserstein1_bracket(x, y, critics()[name], method=method)  # type: ignore[arg-type]
    assert 0 <= bracket.lower <= exact.upper
    assert exact.lower <= bracket.upper
    assert feasible(bracket, x, y)
    if method == "critic":
        # the zero potential is always tried: the mean distance to the nearest point of x
        nearest = torch.cdist(x, y).amin(0).mean().item()
        assert bracket.lower >= nearest * (1 - 1e-12)


def test_a_perfect_critic_closes_the_gap_from_below() -> None:
    """As it is, and up to a constant and a power of two."""
    x, y = mixture(80, 90, 3)
    exact = wasserstein1_bracket(x, y)
    for factor, shift in ((1.0, 0.0), (1.0, 1e3), (2.0**200, 0.0), (2.0**-200, 0.0)):

        def critic(z: Tensor, factor: float = factor, shift: float = shift) -> Tensor:
            return shift + factor * c_transform(exact.y_potential, y, z)

        bracket = wasserstein1_bracket(x, y, critic, method="critic")
        assert bracket.lower_from == "the critic, c-transformed"
        assert bracket.lower >= exact.lower - 1e-12 * max(1, shift)


def test_a_critic_in_float32_starts_a_bracket_of_float64_points() -> None:
    x, y = mixture(60, 50, 3)
    critic = nn.Linear(3, 1)
    assert critic.weight.dtype == torch.float32
    bracket = wasserstein1_bracket(x, y, critic, method="sinkhorn")
    assert bracket.lower_from.startswith("the critic, improved by")
    assert feasible(bracket, x, y)


BRACKET_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "simplex"}, ValueError, "method must be one of .*'blocks'.* got 'simplex'"),
    ({"method": "critic"}, ValueError, "critic must be given"),
    ({"tolerance": 0.0}, ValueError, r"tolerance must be in \(0, 1\), got 0"),
    ({"sweeps": -1}, ValueError, "sweeps must be >= 0, got -1"),
    ({"sweeps": 1.5}, TypeError, "sweeps must be an int, got float"),
    ({"critic": 3}, TypeError, "critic must be callable, got int"),
    ({"critic": lambda z: z / 0}, ValueError, r"one value for each of 3 points, .* \(3, 2\)"),
    ({"critic": lambda z: z[:, 0] / 0}, ValueError, "critic must give finite values"),
    ({"critic": lambda z: z[:, 0] + math.inf}, ValueError, "critic must give finite values"),
    ({"critic": lambda z: z.mean()}, ValueError, r"critic must return one value .* got shape \(\)"),
    ({"critic": lambda z: 1.0}, TypeError, "critic must return a tensor, got float"),
    ({"critic": lambda z: z.numpy()[:, 0]}, TypeError, "must return a tensor, got ndarray: torch."),
    ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
    ({"method": "sparse", "seconds": 0}, ValueError, "seconds must be > 0, got 0"),
    ({"method": "sparse", "seconds": math.nan}, ValueError, "seconds must be"),
    ({"method": "sparse", "seconds": 1e-9}, ValueError, "seconds must be >= .* for one round, got"),
    ({"method": "sparse", "progress": 3}, TypeError, "progress must be callable, got int"),
    ({"method": "blocks", "seconds": 9.0}, ValueError, 'seconds must be None unless .*"sparse"'),
    ({"progress": print}, ValueError, 'progress must be None unless method is "sparse"'),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BRACKET_BAD)
def test_bracket_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wasserstein1_bracket(CLOUD, CLOUD, **arguments)


def test_equal_points_cost_nothing() -> None:
    x = torch.full((5, 3), 2.0)
    assert wasserstein1(x, x[:2]).item() == 0
    for method in METHODS:
        bracket = bracket_of(method, x, x[:2])
        assert bracket.lower == 0
        # a distance that came out as 0 may be one whose square underflows
        assert bracket.upper <= (1e-149 if method == "sinkhorn" else 0)


def test_bounds_leave_their_arguments_alone() -> None:
    x, y = mixture(30, 20, 2)
    x.requires_grad_()
    copies = x.detach().clone(), y.clone()
    for method in METHODS:
        bracket = bracket_of(method, x, y)
        assert not bracket.x_potential.requires_grad
    assert torch.equal(x.detach(), copies[0])
    assert torch.equal(y, copies[1])
    assert x.grad is None


# ------------------------------------------------------------------------------- critic values


def network(d: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrthogonalLinear(d, 8), MaxMin(), OrthogonalLinear(8, 1))


@pytest.mark.parametrize("function", [critic_difference, kantorovich_dual])
def test_critic_values_are_mean_over_x_minus_mean_over_y(
    function: Callable[..., Tensor],
) -> None:
    critic = nn.Linear(2, 1, dtype=torch.float64)
    critic.weight.data = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    y = torch.tensor([[5.0, 5]], dtype=torch.float64)
    assert function(critic, x, y).item() == pytest.approx(0.7 - 7)
    a = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert function(critic, x, y, a).item() == pytest.approx(0.75 - 7)
    assert function(critic, y, x, None, a).item() == pytest.approx(7 - 0.75)
    assert function(critic, x, y).shape == ()
    calls = []
    critic.register_forward_hook(lambda *_: calls.append(1))
    critic_difference(critic, x, y)
    assert calls == [1]  # one forward pass for both


def test_dual_is_divided_by_the_bound_and_never_multiplied() -> None:
    x, y = mixture(50, 60, 3)
    exact = wasserstein1(x, y).item()
    for scale in (0.01, 1.0, 37.0):
        critic = nn.Sequential(network(3), nn.Linear(1, 1)).double()
        critic[1].weight.data.fill_(-scale)
        bound = lipschitz_bound(critic, (3,)).value
        assert bound == pytest.approx(scale)
        dual, difference = kantorovich_dual(critic, x, y), critic_difference(critic, x, y)
        assert dual.item() == pytest.approx(difference.item() / max(1, bound), rel=1e-12)
        assert abs(dual.item()) <= exact
    assert kantorovich_dual(lambda z: 3 * z[:, 0], x, y, lipschitz=3.0).item() <= exact
    assert kantorovich_dual(nn.Flatten(0), x[:, :1], y[:, :1], lipschitz=1) < exact


def test_dual_of_a_perfect_critic_is_the_distance() -> None:
    x, y = shells(60, 4)
    truth = wasserstein1(x, y).item()
    assert truth == pytest.approx(1, abs=1e-9)
    centres = torch.tensor([[-2.0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]], dtype=torch.float64)
    dual = kantorovich_dual(lambda z: -torch.cdist(z, centres).amin(1), x, y, lipschitz=1)
    assert dual.item() == pytest.approx(1, rel=1e-14)


def test_critic_values_are_differentiable() -> None:
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    a = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    critic = network(3).double()
    kantorovich_dual(critic, x, y, a).backward()
    assert all(leaf.grad is not None for leaf in (x, y, a, *critic.parameters()))
    assert torch.autograd.gradcheck(
        lambda x, y: kantorovich_dual(critic, x, y), (x.detach().requires_grad_(), y.detach())
    )


CRITIC_BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (lambda z: z[:, 0], {}, TypeError, r"critic must be a torch\.nn\.Module.* pass lipschitz="),
    (lambda z: z[:, 0], {"lipschitz": -1.0}, ValueError, "lipschitz must be finite and >= 0"),
    (lambda z: z[:, 0], {"lipschitz": math.inf}, ValueError, "lipschitz must be finite and >= 0"),
    (lambda z: z[:, 0], {"lipschitz": math.nan}, ValueError, "lipschitz must be finite and >= 0"),
    (lambda z: z / 0, {"lipschitz": 1}, ValueError, "critic must return one value for each of 6"),
    (lambda z: z[:, 0] / 0, {"lipschitz": 1}, ValueError, "critic must give finite values"),
    (nn.Linear(2, 3), {}, ValueError, r"one value for each of 6 points, got shape \(6, 3\)"),
    (nn.Bilinear(2, 2, 1), {}, TypeError, "has several inputs, and so no Lipschitz rule"),
    (nn.Linear(4, 1), {}, ValueError, "does not run on inputs of shape"),
    (7, {"lipschitz": 1}, TypeError, "critic must be callable, got int"),
]


@pytest.mark.parametrize(("critic", "arguments", "error", "message"), CRITIC_BAD)
def test_dual_refuses(
    critic: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kantorovich_dual(critic, CLOUD, CLOUD, **arguments)


# -------------------------------------------------------------------------- fitting a critic


def normal(mean: float, d: int = 2) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: mean + torch.randn(n, d, generator=generator)


def test_fitting_climbs_to_the_distance() -> None:
    """|x|: one point against two around it. MaxMin can, and 1-Lipschitz cannot do more."""
    x = torch.tensor([[-1.0], [1.0]])
    y = torch.zeros(1, 1)
    critic = network(1)
    history = fit_critic(critic, x, y, steps=100, lr=0.1, schedule="cosine")
    assert not critic.training
    assert history.steps == list(range(1, 101))
    assert len(history.values) == 100
    assert history.held_out == []
    assert 0.999 <= kantorovich_dual(critic, x, y).item() <= 1 + 1e-6
    assert max(history.values) <= 1 + 1e-5


def test_values_are_those_before_each_update() -> None:
    """Plain ascent on a linear critic, by hand."""
    critic = nn.Linear(2, 1, dtype=torch.float64)
    x, y = mixture(5, 7, 2)
    a = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    slope = a @ x - y.mean(0)
    weight = critic.weight.detach().clone()[0]
    history = fit_critic(critic, x, y, steps=3, lr=0.1, x_weights=a, optimizer=torch.optim.SGD)
    expected = [((weight + 0.1 * k * slope) @ slope).item() for k in range(3)]
    assert history.values == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(critic.weight[0], weight + 0.3 * slope, rtol=1e-12)


def test_one_forward_pass_a_step_and_one_penalty() -> None:
    sizes: list[int] = []
    critic = nn.Sequential(nn.Linear(2, 1))
    critic[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    x, y = torch.randn(10, 2), torch.randn(20, 2)
    fit_critic(critic, x, y, steps=2, lr=0.1)
    assert sizes == [30, 30]
    sizes.clear()
    fit_critic(critic, x, y, steps=2, lr=0.1, batch_size=4)
    assert sizes == [8, 8]
    sizes.clear()
    seen: list[tuple[int, int]] = []

    def penalty(module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        assert module is critic
        seen.append((len(x), len(y)))
        return 1e3 * critic[0].weight.square().sum()

    history = fit_critic(critic, x, y, steps=50, lr=0.1, penalty=penalty)
    assert seen == [(10, 20)] * 50
    assert critic[0].weight.norm() < 0.1
    assert abs(history.values[-1]) < 0.1  # without the penalty


def test_learning_rate_is_constant_or_half_a_cosine() -> None:
    rates: list[float] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    for schedule, expected in (
        ("constant", [0.1] * 4),
        ("cosine", [0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
    ):
        rates.clear()
        critic = nn.Linear(2, 1)
        fit_critic(critic, CLOUD, CLOUD, steps=4, lr=0.1, optimizer=Recorder, schedule=schedule)
        assert rates == pytest.approx(expected)


def test_batches_follow_the_weights_and_the_seed() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0]])
    seen: list[Tensor] = []

    class Spy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs.detach().clone())
            return super().forward(inputs)

    weights = torch.tensor([0.2, 0.0, 0.8])
    for seed in (0, 0, 1):
        fit_critic(Spy(1, 1), x, x, steps=1, lr=0.1, batch_size=4000, x_weights=weights, seed=seed)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    on_x, on_y = seen[0][:4000, 0], seen[0][4000:, 0]
    error = 4 / math.sqrt(4000) / 2  # four standard deviations of a frequency
    assert (on_x == 1).sum() == 0
    assert (on_x == 2).double().mean().item() == pytest.approx(0.8, abs=error)
    for value in (0, 1, 2):
        assert (on_y == value).double().mean().item() == pytest.approx(1 / 3, abs=error)


def test_held_out_interval_is_that_of_the_central_limit_theorem() -> None:
    critic = nn.Linear(2, 1, bias=False)
    critic.weight.data = torch.tensor([[3.0, 4.0]])
    covered = 0
    for seed in range(40):
        history = fit_critic(
            critic,
            normal(1.0),
            normal(0.0),
            steps=1,
            lr=1e-30,
            batch_size=2,
            held_out=500,
            confidence=0.9,
            seed=seed,
        )
        (look,) = history.held_out
        assert isinstance(look, HeldOut)
        assert look.step == 1
        # each mean is of 500 draws of deviation 5; the quantile of 95 % is 1.645
        width = 1.6449 * 5 * math.sqrt(2 / 500)
        assert (look.high - look.low) / 2 == pytest.approx(width, rel=0.15)
        assert look.value == pytest.approx((look.low + look.high) / 2)
        covered += look.low <= 7 <= look.high
    assert 28 <= covered <= 40  # binomial(40, 0.9): below 28 once in 10,000


def test_held_out_points_are_looked_at_when_asked() -> None:
    x, y = torch.randn(50, 2), torch.randn(40, 2)
    critic = network(2)
    history = fit_critic(critic, x, y, steps=25, lr=0.01, held_out=(x + 1, y), held_out_every=10)
    assert [look.step for look in history.held_out] == [10, 20, 25]
    expected = critic_difference(critic, x + 1, y).item()
    assert history.held_out[-1].value == pytest.approx(expected, rel=1e-5)
    assert fit_critic(critic, x, y, steps=5, lr=0.01, held_out=(x, y)).held_out[0].step == 5


def test_held_out_points_are_not_those_of_the_batches() -> None:
    drawn: list[Tensor] = []

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        drawn.append(torch.randn(n, 1, generator=generator))
        return drawn[-1]

    fit_critic(nn.Linear(1, 1), sampler, sampler, steps=3, lr=0.1, batch_size=8, held_out=8)
    assert len(drawn) == 2 + 2 * 3
    assert len({points[0].item() for points in drawn}) == len(drawn)


def test_gradient_penalty_is_its_formula() -> None:
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = (torch.randn(n, 3, dtype=torch.float64) for n in (4, 6))
    generator = torch.Generator().manual_seed(3)
    found = gradient_penalty(critic, x, y, generator, weight=7.0)
    t = torch.rand(6, generator=torch.Generator().manual_seed(3)).double()
    terms = []
    for k in range(6):
        point = t[k] * x[k % 4] + (1 - t[k]) * y[k]
        slope = torch.autograd.functional.jacobian(critic, point)
        terms.append((slope.norm() - 1) ** 2)
    assert found.item() == pytest.approx(7 * sum(terms).item() / 6, rel=1e-12)
    found.backward()
    assert critic[0].weight.grad.abs().max() > 0


def test_baselines_fit_and_end_without_a_promise() -> None:
    """Their numbers can exceed the distance; the clipped weights stay where they must."""
    x, y = shells(64, 2)
    x, y = x.float(), y.float()

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))

    clipped = plain()
    fit_critic(clipped, x, y, steps=20, lr=0.1, project=functools.partial(clip_weights_, limit=0.3))
    assert all(p.abs().max() <= 0.3 for p in clipped.parameters())
    penalised = plain()
    fit_critic(penalised, x, y, steps=60, lr=0.02, penalty=gradient_penalty)
    assert kantorovich_dual(penalised, x, y) < 1 < lipschitz_bound(penalised, (2,)).value
    with pytest.raises(ValueError, match="limit must be > 0, got 0"):
        clip_weights_(clipped, 0)


def test_divergence_is_an_error() -> None:
    critic = nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="at step 2: the learning rate may be too large"):
        fit_critic(critic, CLOUD + 1e30, CLOUD, steps=9, lr=1e30, optimizer=torch.optim.SGD)


FIT_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"critic": nn.Flatten()}, TypeError, r"critic must be a torch\.nn\.Module with parameters"),
    ({"critic": lambda z: z}, TypeError, r"critic must be a torch\.nn\.Module with parameters"),
    ({"x": 3}, TypeError, r"x must be a tensor or a sampler\(n, generator\), got int"),
    ({"y": CLOUD[:, 0]}, ValueError, r"y must have shape \(n, d\)"),
    ({"y": torch.zeros(3, 4)}, ValueError, r"of those of x, \(2,\), got \(4,\)"),
    ({"x": normal(0)}, ValueError, "batch_size must be given, since x is a sampler"),
    (
        {"x": normal(0), "batch_size": 2, "x_weights": torch.ones(1)},
        ValueError,
        "x_weights must be None, since x is a sampler",
    ),
    ({"x": lambda n, g: 0, "batch_size": 2}, TypeError, "x must return a tensor, got int"),
    ({"x": lambda n, g: CLOUD, "batch_size": 2}, ValueError, r"return 2 points.* got \(3, 2\)"),
    ({"x_weights": torch.ones(3)}, ValueError, "x_weights must sum to 1"),
    ({"x": np.zeros((3, 2))}, TypeError, "x must be a tensor, got ndarray: torch.from_numpy"),
    (
        {"y": lambda n, g: np.zeros((n, 2)), "batch_size": 2},
        TypeError,
        "y must return a tensor, got ndarray: torch.from_numpy",
    ),
    (
        {"y": lambda n, g: CLOUD[:n] / 0, "batch_size": 2},
        ValueError,
        r"points of the sampler y must be finite, got nan at \[0, 0\]",
    ),
    ({"held_out": (CLOUD, CLOUD / 0)}, ValueError, "held_out must be finite, got nan"),
    (
        {"critic": nn.Linear(2, 1).requires_grad_(False)},
        ValueError,
        "critic must have a parameter that requires a gradient, got none",
    ),
    ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
    ({"steps": True}, TypeError, "steps must be an int, got bool"),
    ({"steps": np.bool_(True)}, TypeError, "steps must be an int, got bool"),
    ({"steps": np.int64(0)}, ValueError, "steps must be >= 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be >= 1, got 0"),
    ({"held_out_every": 0}, ValueError, "held_out_every must be >= 1, got 0"),
    ({"held_out_every": 5}, ValueError, "held_out must be given with held_out_every"),
    ({"held_out": 5}, ValueError, "held_out must be a pair of tensors unless x and y are samplers"),
    ({"held_out": 1}, ValueError, "held_out must be >= 2, got 1"),
    ({"held_out": [CLOUD]}, TypeError, "held_out must be an int or a pair of tensors"),
    ({"held_out": (CLOUD, CLOUD[:1])}, ValueError, "held_out must have 2 points a side, got 1"),
    ({"lr": 0.0}, ValueError, "lr must be finite and > 0, got 0"),
    ({"lr": math.nan}, ValueError, "lr must be finite and > 0, got nan"),
    ({"schedule": "linear"}, ValueError, "schedule must be .* got 'linear'"),
    ({"confidence": 1.0}, ValueError, r"confidence must be in \(0, 1\), got 1"),
    ({"optimizer": "adam"}, TypeError, "optimizer must be callable, got 'adam'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), FIT_BAD)
def test_fitting_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    settings_ = {"critic": nn.Linear(2, 1), "x": CLOUD, "y": CLOUD, "steps": 1, "lr": 0.1}
    with pytest.raises(error, match=message):
        fit_critic(**(settings_ | arguments))


# --------------------------------------------------------------------------------- checkpoints


# A fit with every kind of state: dropout, Adam, a sampler, mini-batches, looks. As text, since
# another process runs it too.
FIT = """
import torch
from torch import nn
from lipbook.activations import MaxMin
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import fit_critic

def fit(path, project=None, **more):
    torch.manual_seed(7)
    layers = OrthogonalLinear(2, 8), MaxMin(), nn.Dropout(0.2), OrthogonalLinear(8, 1)
    critic = nn.Sequential(*layers)
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    sampler = lambda n, generator: 1 + torch.randn(n, 2, generator=generator)
    arguments = {
        "steps": 12, "lr": 0.05, "schedule": "cosine", "batch_size": 8,
        "held_out": (points + 1, points), "held_out_every": 4,
        "checkpoint": path, "checkpoint_every": 3, "project": project or (lambda module: None),
    }
    return critic, fit_critic(critic, sampler, points, **{**arguments, **more})
"""
namespace: dict[str, Any] = {}
exec(FIT, namespace)
fit = namespace["fit"]


def stop_at(number: int) -> Callable[[nn.Module], None]:
    steps = iter(range(1, number + 1))

    def project(module: nn.Module) -> None:
        if next(steps) == number:
            raise KeyboardInterrupt

    return project


def test_a_stopped_fit_continues_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "critic.pt"
    whole, history = fit(None)
    for stop in (2, 7, 12):
        with pytest.raises(KeyboardInterrupt):
            fit(path, stop_at(stop))
        assert path.exists() == (stop > 3)
        resumed, again = fit(path)
        assert again == history
        for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        finished, same = fit(path, stop_at(1))  # nothing is left to do
        assert same == history
        assert torch.equal(finished[0].weight, whole[0].weight)
        path.unlink()
    assert list(tmp_path.iterdir()) == []  # no temporary file is left


KILLED = """
import os, signal, sys
from pathlib import Path
write = torch.save

def half(state, file):
    write(state, file)
    if len(state["values"]) == 9:
        file.truncate(100)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
fit(Path(sys.argv[1]))
"""


def test_a_fit_killed_while_it_saves_continues_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 half-way through the writing of a file: the one before is still there."""
    path = tmp_path / "critic.pt"
    top = str(Path(wasserstein.__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", FIT + KILLED, str(path)],
        env=environment | {"PYTHONPATH": top},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(torch.load(path, weights_only=True)["values"]) == 6
    whole, history = fit(None)
    resumed, again = fit(path)
    assert again == history
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [file.name for file in tmp_path.iterdir()] == ["critic.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "critic.pt"
    fit(path)
    with pytest.raises(ValueError, match=r"of another run: lr 0\.05 not 0\.1, seed 0 not 1"):
        fit(path, lr=0.1, seed=1)
    more = {"steps": 12, "lr": 0.05, "schedule": "cosine", "batch_size": 8, "project": print}
    with pytest.raises(ValueError, match="is of another critic"):
        fit_critic(nn.Linear(2, 1), normal(0), torch.zeros(40, 2), checkpoint=path, **more)
    for content in (b"", b"not a checkpoint", path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of fit_critic"):
            fit(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is no checkpoint of fit_critic"):
        fit(path)


def test_progress_is_shown_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    fit_critic(nn.Linear(2, 1), CLOUD, CLOUD, steps=3, lr=0.1)
    assert capfd.readouterr().err == ""
    fit_critic(nn.Linear(2, 1), CLOUD, CLOUD, steps=3, lr=0.1, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_the_library_runs_without_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    spec = importlib.util.spec_from_file_location("fresh", fitting.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    spec.loader.exec_module(fresh)
    assert len(fresh.fit_critic(nn.Linear(2, 1), CLOUD, CLOUD, steps=2, lr=0.1).values) == 2
    with pytest.raises(ImportError):
        fresh.fit_critic(nn.Linear(2, 1), CLOUD, CLOUD, steps=2, lr=0.1, progress=True)


def test_integers_of_numpy_are_integers(tmp_path: Path) -> None:
    """And a checkpoint of one fit continues the other."""
    numbers: dict[str, Any] = {"steps": 4, "batch_size": 3, "checkpoint_every": 2, "seed": 5}
    numbers |= {"held_out": 6, "held_out_every": 2}
    theirs = {name: np.int64(value) for name, value in numbers.items()}
    histories, path = [], tmp_path / "critic.pt"
    for more in (numbers, theirs, theirs | {"checkpoint": path}, numbers | {"checkpoint": path}):
        torch.manual_seed(0)
        lr = np.float64(0.1) if more["steps"] is theirs["steps"] else 0.1
        histories.append(fit_critic(nn.Linear(2, 1), normal(0), normal(1), lr=lr, **more))
    assert histories[0] == histories[1] == histories[2] == histories[3]
    x, y = mixture(40, 30, 2)
    for function, more in (
        (wasserstein1_bracket, {"sweeps": 2, "seed": 3, "method": "blocks"}),
        (sliced_wasserstein, {"projections": 5, "seed": 3}),
        (functools.partial(sinkhorn, entropy=0.5), {"steps": 5000}),
    ):
        theirs = {k: v if isinstance(v, str) else np.int32(v) for k, v in more.items()}
        assert function(x, y, **theirs) == function(x, y, **more)  # type: ignore[operator]


# --------------------------------------------------------------------------------------- modes


def small_critic() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(OrthogonalLinear(2, 8), MaxMin(), OrthogonalLinear(8, 1))


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_are_the_same_in_every_mode(mode: Any, made_inside: bool) -> None:
    def values() -> list[float]:
        x, y = (torch.stack((z[:, 0], z[:, 1] ** 2), 1) for z in mixture(30, 20, 2))
        critic = small_critic() if made_inside else outer
        weights = x.abs().sum(1) / x.abs().sum()
        numbers = [
            wasserstein1(x, y, weights),
            wasserstein1(x[:, :1], y[:, :1]),
            kantorovich_dual(critic, x, y, weights),
            critic_difference(critic, x, y, weights),
            sinkhorn(x, y, weights, entropy=0.5),
            sliced_wasserstein(x, y, weights),
            c_transform(weights, x, y).sum(),
        ]
        brackets = [wasserstein1_bracket(x, y, critic, weights, method=m) for m in METHODS]  # type: ignore[arg-type]
        return [v.item() for v in numbers] + [end for b in brackets for end in (b.lower, b.upper)]

    outer = small_critic()
    expected = values()
    with mode():
        assert values() == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_critic_is_fitted_in_every_mode(mode: Any, sampled: bool) -> None:
    def fit() -> tuple[Any, Tensor]:
        critic = small_critic() if inside is None else inside
        x, y = normal(0), normal(1)
        more: dict[str, Any] = {"batch_size": 8, "held_out": 5}
        if not sampled:  # with points and weights that are made here
            points = torch.arange(8.0).view(4, 2) + 1
            x, y = points, points.flip(1) ** 2  # type: ignore[assignment]
            more = {"x_weights": points[:, 0] / points[:, 0].sum(), "held_out": (x, y)}
        history = fit_critic(critic, x, y, steps=5, lr=0.1, penalty=gradient_penalty, **more)
        return history, nn.utils.parameters_to_vector(critic.parameters()).detach()

    inside = None
    expected = fit()
    inside = small_critic()
    with mode():
        found = fit()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_a_critic_made_in_inference_mode_is_not_fitted() -> None:
    with torch.inference_mode():
        critic = small_critic()
        with pytest.raises(
            ValueError, match=r"critic must have .* made under torch.inference_mode"
        ):
            fit_critic(critic, CLOUD, CLOUD, steps=1, lr=0.1)
    assert kantorovich_dual(critic, CLOUD + 1, CLOUD).item() <= math.sqrt(2)


# ----------------------------------------------------------------------------------- estimates


def test_sliced_distance_is_the_mean_over_sorted_projections() -> None:
    x, y = mixture(30, 30, 4)
    found = sliced_wasserstein(x, y, projections=7, seed=3).item()
    directions = np.random.default_rng(3).standard_normal((4, 7))
    directions /= np.linalg.norm(directions, axis=0)
    ends = [np.sort(z.numpy() @ directions, axis=0) for z in (x, y)]
    assert found == pytest.approx(np.abs(ends[0] - ends[1]).mean(), rel=1e-12)
    assert found <= wasserstein1(x, y).item()
    assert sliced_wasserstein(x.float(), y.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="projections must be >= 1, got 0"):
        sliced_wasserstein(x, y, projections=0)


def test_sinkhorn_is_the_cost_of_the_entropic_plan() -> None:
    x, y = mixture(12, 15, 2)
    rng = np.random.default_rng(0)
    a, b = (rng.dirichlet(np.ones(n)) for n in (12, 15))
    cost = np.linalg.norm(x[:, None] - y[None], axis=2)
    kernel, v = np.exp(-cost / 0.5), np.ones(15)
    for _ in range(5000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    expected = (u[:, None] * kernel * v * cost).sum()
    weights = torch.from_numpy(a), torch.from_numpy(b)
    found = sinkhorn(x, y, *weights, entropy=0.5, steps=5000).item()
    assert found == pytest.approx(expected, rel=1e-7)
    exact = wasserstein1(x, y, *weights).item()
    assert exact < found <= exact + 0.5 * math.log(12)
    for arguments, message in (
        ({"entropy": 0.0}, "entropy must be finite and > 0, got 0"),
        ({"entropy": 1.0, "steps": 0}, "steps must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn(x, y, **arguments)  # type: ignore[arg-type]


def entropic_problem(n: int, m: int, zeros: int, seed: int) -> list[Tensor]:
    """Clouds and weights; the first weights of x and the last of y are 0."""
    rng = np.random.default_rng(seed)
    a, b = (rng.dirichlet(np.ones(k)) for k in (n, m))
    a[: min(zeros, n - 1)], b[m - min(zeros, m - 1) :] = 0, 0
    values = [rng.standard_normal((n, 2)), rng.standard_normal((m, 2)), a / a.sum(), b / b.sum()]
    return [torch.from_numpy(value) for value in values]


@pytest.mark.parametrize("entropy", [0.05, 0.3, 5.0])
@pytest.mark.parametrize(
    ("n", "m", "zeros"), [(5, 7, 0), (7, 5, 1), (6, 6, 3), (1, 4, 1), (4, 1, 2), (1, 1, 0)]
)
def test_sinkhorn_gradients_are_those_of_finite_differences(
    n: int, m: int, zeros: int, entropy: float
) -> None:
    """Points in any direction; mass moved from the heaviest point to each, one-sided at 0."""

    def cost(values: list[Tensor]) -> Tensor:
        return sinkhorn(*values, entropy=entropy, steps=10**5, tolerance=1e-13)

    given = entropic_problem(n, m, zeros, seed=n)
    leaves = [value.clone().requires_grad_() for value in given]
    cost(leaves).backward()
    step = 1e-5
    for k, leaf in enumerate(leaves):
        assert leaf.grad is not None
        if k >= 2:
            assert leaf.grad.sum().abs() <= 1e-12
        heaviest = int(leaf.argmax())
        for place in range(leaf.numel()):
            if k >= 2 and place == heaviest:
                continue
            direction = torch.zeros_like(given[k])
            direction.view(-1)[place] = 1
            if k >= 2:
                direction[heaviest] = -1
            ends = []
            for number in range(4):
                moved = list(given)
                moved[k] = given[k] + number * step * direction
                ends.append(cost(moved).item())
            slope = np.dot([-11, 18, -9, 2], ends) / (6 * step)  # error of order step^3
            assert (leaf.grad * direction).sum().item() == pytest.approx(slope, abs=1e-7)


def test_sinkhorn_gradients_agree_with_those_of_pot() -> None:
    """POT differentiates its iteration; of weights, gradients count up to a constant."""
    for n, m, entropy in ((5, 7, 0.1), (7, 5, 1.0), (1, 4, 0.3), (20, 20, 0.3)):
        ours, theirs = (
            [value.requires_grad_() for value in entropic_problem(n, m, 0, seed=n)] for _ in "ab"
        )
        sinkhorn(*ours, entropy=entropy, tolerance=1e-12).backward()
        cost = torch.cdist(theirs[0], theirs[1])
        ot.sinkhorn2(
            *theirs[2:], cost, entropy, "sinkhorn_log", numItermax=3000, stopThr=1e-13, warn=False
        ).backward()
        for k, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert mine.grad is not None
            assert other.grad is not None
            centre = other.grad.mean() if k >= 2 else 0
            assert torch.allclose(mine.grad, other.grad - centre, rtol=0, atol=1e-9)


@pytest.mark.parametrize("entropy", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_gradients_are_finite_at_weights_of_zero(
    dtype: torch.dtype, entropy: float
) -> None:
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=dtype)
    a = torch.tensor([0.0, 1, 0, 0], dtype=dtype, requires_grad=True)
    b = torch.tensor([1.0, 0, 0, 0], dtype=dtype, requires_grad=True)
    x, y = corners.clone().requires_grad_(), corners.clone().requires_grad_()
    value = sinkhorn(x, y, a, b, entropy=entropy)
    value.backward()
    assert value.item() == pytest.approx(1, rel=1e-6)
    # all mass of y is in one corner: mass of x costs its distance from there, less a constant
    costs = torch.tensor([0, 1, 1, math.sqrt(2)], dtype=torch.float64)
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.dtype == dtype
    assert torch.allclose(a.grad.double(), costs - costs.mean(), rtol=0, atol=1e-6)
    from_other = torch.tensor([1, 0, math.sqrt(2), 1], dtype=torch.float64)
    assert torch.allclose(b.grad.double(), from_other - from_other.mean(), rtol=0, atol=1e-6)
    unit = torch.zeros(4, 2, dtype=dtype)
    unit[1, 1] = 1
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, unit, rtol=0, atol=1e-6)
    assert torch.allclose(y.grad, -unit.roll(-1, 0), rtol=0, atol=1e-6)


def test_sinkhorn_gradients_in_float32_are_those_in_float64() -> None:
    rng = np.random.default_rng(1)
    given = [value.float() for value in mixture(30, 20, 2)]
    for n in (30, 20):  # in 1/64, which sum to 1 in either
        given.append(torch.from_numpy(rng.multinomial(64, np.ones(n) / n) / 64).float())
    assert all((weights == 0).any() for weights in given[2:])
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in given]
        sinkhorn(*leaves, entropy=0.2).backward()
        grads.append([leaf.grad for leaf in leaves])
    for single, double in zip(*grads, strict=True):
        assert torch.equal(single, double.float())


def test_sinkhorn_gives_first_derivatives_only() -> None:
    x, y, a, b = entropic_problem(4, 3, 0, seed=0)
    a.requires_grad_()
    value = sinkhorn(x, y, a, b, entropy=0.3).square()
    (slope,) = torch.autograd.grad(value, a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope[0].backward()


def test_sinkhorn_without_convergence_is_an_error() -> None:
    x, y = mixture(30, 20, 2)
    message = (
        r"not converged in steps=5: its marginals are off by .*, more than tolerance=1e-09; "
        "raise steps, entropy or tolerance"
    )
    with pytest.raises(RuntimeError, match=message):
        sinkhorn(x, y, entropy=0.05, steps=5)
    for rescue in ({"steps": 5000}, {"entropy": 10.0}, {"tolerance": 0.5}):
        assert sinkhorn(x, y, **({"entropy": 0.05, "steps": 5} | rescue)) > 0  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="raise steps, entropy or tolerance"):
        sinkhorn(x, y, entropy=1e-320)
    for tolerance in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\), got"):
            sinkhorn(x, y, entropy=1.0, tolerance=tolerance)
    for scale in (1e-300, 1e300):  # no square overflows
        z = scale * torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
        assert sinkhorn(z[:1], z[1:], entropy=scale).item() == pytest.approx(5 * scale)
