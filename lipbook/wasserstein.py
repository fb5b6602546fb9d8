r"""The Wasserstein distance W₁: exactly, between two bounds, and as the ascent of a critic.

For two distributions :math:`P, Q` on :math:`\mathbb R^d` with finite first moments,

.. math::
    W_1(P, Q) = \min_{\pi \in \Pi(P, Q)} \operatorname{E}_{(X, Y) \sim \pi} \lVert X - Y\rVert_2
    = \max_{\operatorname{Lip}(f) \le 1} \operatorname{E}_P f - \operatorname{E}_Q f .

The minimum, the primal, runs over the couplings of :math:`P` and :math:`Q`; the maximum, the
Kantorovich–Rubinstein dual, over the 1-Lipschitz functions. So **every coupling gives an upper
bound and every 1-Lipschitz critic a lower bound**, and a pair of both with equal values is a proof.
:func:`wasserstein1` solves the problem between two finite sets, :func:`wasserstein1_bracket` proves
bounds at any size, :func:`fit_critic` ascends the dual and :func:`kantorovich_dual` reads off the
lower bound. :func:`critic_difference`, :func:`sliced_wasserstein` and :func:`sinkhorn` are
estimates, for comparison.

Clouds are tensors of shape (n, d) and (m, d), float32 or float64; (n, ...) counts as flattened.
All distances are Euclidean and all values are :math:`W_1` itself, in the units of the points.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import ot
import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound

__all__ = [
    "wasserstein1",
    "c_transform",
    "TransportBracket",
    "wasserstein1_bracket",
    "critic_difference",
    "kantorovich_dual",
    "gradient_penalty",
    "clip_weights_",
    "HeldOut",
    "CriticHistory",
    "fit_critic",
    "sliced_wasserstein",
    "sinkhorn",
]

Method = Literal["auto", "exact", "sinkhorn", "blocks", "critic"]
Sampler = Callable[[int, torch.Generator], Tensor]
Penalty = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]

_UNIT = 2.0**-53  # unit roundoff of float64
_EXACT_SIZE = 2048**2  # entries of the cost matrix up to which "auto" is "exact"
_DENSE_SIZE = 6000**2  # and "sinkhorn"
_SAMPLE = 1500  # points a side whose exact potentials start the lower bound of "blocks"
_SAMPLES = 4  # so many times, and averaged
_CHUNK = 2**20  # entries of a cost matrix that are in memory at a time
_TILE = 256  # points a side of a tile of the cost matrix and of a block of a coupling

# Note [rounding]
# A bound must survive float64. Points are scaled by a power of two so that no square overflows;
# distances come with a relative error bound (_distances), sums are those of math.fsum, and each
# further operation is moved outward by at least its own error. The potentials are float64 numbers
# and feasible as such: f(i) + g(j) <= c(i, j) for the real distance c of the given points. _TINY
# is far above what underflow of squares can do to a distance, in units where the largest
# coordinate is about 1.
_TINY = 2.0**-500


# ------------------------------------------------------------------------------ the clouds


class _Cloud(NamedTuple):
    """A checked weighted cloud, without the points of weight zero."""

    points: Tensor  # (k, d) float64, scaled
    zero: Tensor  # (size - k, d), those of weight zero
    mass: np.ndarray  # (k,) positive float64, not normalised
    total: float  # sum of the masses, up to half an ulp
    support: Tensor  # (k,) indices into the given points
    size: int  # number of the given points


class _Pair(NamedTuple):
    x: _Cloud
    y: _Cloud
    exponent: int  # points were multiplied by 2**-exponent,
    exact: bool  # without loss
    integer: bool  # masses are integers with equal totals below 2**53


def _check_clouds(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> None:
    _check_kind("x", x)
    _check_kind("y", y)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"y must have points of the shape of those of x, {tuple(x.shape[1:])}, "
            f"got {tuple(y.shape[1:])}"
        )
    if x.dtype != y.dtype:
        raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    _check_points("x", x)
    _check_points("y", y)
    _check_weights("x_weights", x_weights, x)
    _check_weights("y_weights", y_weights, y)


def _pair(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> _Pair:
    """Check two clouds and bring them to float64, scale 1 and positive masses."""
    _check_clouds(x, y, x_weights, y_weights)
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    points = [z.detach().to(device, torch.float64).flatten(1) for z in (x, y)]
    exponent = _exponent(*points)
    scaled = [z * 2.0**-exponent for z in points]
    exact = all(torch.equal(z * 2.0**exponent, w) for z, w in zip(scaled, points, strict=True))
    clouds = []
    divisor = math.gcd(len(x), len(y))
    for z, weights, other in zip(scaled, (x_weights, y_weights), (y, x), strict=True):
        if weights is None:  # n points of mass m/gcd against m points of mass n/gcd
            mass = np.full(len(z), float(len(other) // divisor))
            support = torch.arange(len(z))
        else:
            mass = weights.detach().cpu().double().numpy()
            support = torch.from_numpy(np.flatnonzero(mass))
            mass = mass[support.numpy()]
        rest = torch.ones(len(z), dtype=torch.bool)
        rest[support] = False
        parts = z[support.to(device)], z[rest.to(device)]
        clouds.append(_Cloud(*parts, mass, math.fsum(mass), support, len(z)))
    integer = x_weights is None and y_weights is None and clouds[0].total < 2**53
    return _Pair(clouds[0], clouds[1], exponent, exact, integer)


def _check_points(name: str, points: Tensor) -> None:
    _check_kind(name, points)
    if not points.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _check_kind(name: str, points: Tensor) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(points).__name__}")
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {points.dtype}")
    if points.dim() < 2 or 0 in points.shape:
        hint = f": use {name}[:, None] for points on a line" if points.dim() == 1 else ""
        raise ValueError(
            f"{name} must have shape (n, d) with n, d >= 1, got {tuple(points.shape)}{hint}"
        )


def _check_weights(name: str, weights: Tensor | None, points: Tensor) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {weights.dtype}")
    if weights.shape != points.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(points)},), one for each point, "
            f"got {tuple(weights.shape)}"
        )
    if not weights.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    if (weights < 0).any():
        raise ValueError(f"{name} must be >= 0, got {weights.min().item():g}")
    total = math.fsum(weights.detach().cpu().double().tolist())
    if abs(total - 1) > 16 * math.sqrt(len(weights)) * torch.finfo(weights.dtype).eps:
        raise ValueError(f"{name} must sum to 1, got {total:.9g}: divide by the sum")


def _exponent(*points: Tensor) -> int:
    """Exponent e such that 2**-e times the largest coordinate is in [1/2, 1)."""
    largest = max(z.abs().max().item() for z in points)
    return min(max(math.frexp(largest)[1], -1000), 1000) if largest else 0


def _down(value: float) -> float:
    return math.nextafter(value, -math.inf)


def _up(value: float) -> float:
    return math.nextafter(value, math.inf)


def _memory() -> int:
    """Bytes of memory of this machine; 8 GiB where it does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 2**33
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    try:
        return min(memory, int(limit.read_text()))
    except (OSError, ValueError):
        return memory


def _check_memory(rows: int, columns: int, size: int) -> None:
    """Refuse a cost matrix for which solvers need more memory than there is.

    ``size`` is the bytes for each entry, as measured.
    """
    needed, memory = rows * columns * size, _memory()
    if needed > memory:
        raise ValueError(
            f"x and y have {rows} and {columns} points, whose cost matrix and plan need "
            f"{needed / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB here: "
            'use wasserstein1_bracket(x, y, method="blocks"), which needs O(n + m)'
        )


# Note [distances]
# Up to 32 dimensions distances are those of differences, coordinate by coordinate. Beyond, that
# costs 10 times more than ‖x‖² + ‖y‖² - 2xᵀy of centred points, whose error is relative to
# (‖x‖ + ‖y‖)², not to the distance: entries for which that is too much are computed again by
# differences. Either way the error bound is relative, for any order of the d additions.


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Distance matrix (n, m), and a bound of the relative error of its entries."""
    d = x.shape[1]
    if d <= 32:
        matrix = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return matrix, (d + 4) * _UNIT
    centre = (x.mean(0) + y.mean(0)) / 2
    x, y, given_x, given_y = x - centre, y - centre, x, y
    norms_x, norms_y = x.square().sum(1), y.square().sum(1)
    squares = torch.addmm(norms_y[None], x, y.mT, alpha=-2).add_(norms_x[:, None])
    poor = squares < 0.02 * (norms_x[:, None] + norms_y)
    matrix = squares.clamp_(min=0).sqrt_()
    rows, columns = poor.nonzero(as_tuple=True)
    step = max(1, 2**22 // d)
    for i, j in zip(rows.split(step), columns.split(step), strict=True):
        matrix[i, j] = (given_x[i] - given_y[j]).square().sum(1).sqrt()
    return matrix, 64 * (d + 8) * _UNIT


def _pair_distances(x: Tensor, y: Tensor, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Distances (k,) of the points x_i and y_j by differences: relative error (d + 8) units."""
    parts = []
    step = max(1, 2**22 // x.shape[1])
    rows, columns = (torch.from_numpy(k).to(x.device).split(step) for k in (i, j))
    for row, column in zip(rows, columns, strict=True):
        difference = (x[row] - y[column]).abs_()
        largest = difference.amax(1, keepdim=True)
        difference /= torch.where(largest > 0, largest, 1)
        parts.append(largest[:, 0] * difference.square_().sum(1).sqrt())
    return torch.cat(parts).cpu().numpy()


# ------------------------------------------------------------------- plans and potentials


class _Plan(NamedTuple):
    """A coupling of the points in the supports, as a list of moves."""

    i: np.ndarray  # (k,)
    j: np.ndarray  # (k,)
    mass: np.ndarray  # (k,), >= 0, in the units of x.mass


def _northwest(a: np.ndarray, b: np.ndarray) -> _Plan:
    """North-west corner rule: fill up the points of y in their order, those of x in theirs."""
    ends_a, ends_b = np.cumsum(a), np.cumsum(b)
    ends_b = ends_b * (ends_a[-1] / ends_b[-1])
    ends = np.sort(np.concatenate((ends_a, ends_b)), kind="stable")
    mass = np.diff(ends, prepend=0.0)
    keep = mass > 0
    middle = ends[keep] - mass[keep] / 2
    i = np.searchsorted(ends_a[:-1], middle, side="right")
    j = np.searchsorted(ends_b[:-1], middle, side="right")
    return _Plan(i, j, mass[keep])


def _emd(cost: Tensor, a: np.ndarray, b: np.ndarray) -> tuple[_Plan, np.ndarray, np.ndarray]:
    """POT's exact solver: an optimal plan, and potentials f + g <= cost up to rounding."""
    scale = cost.max().item() or 1.0  # since POT compares costs with an absolute tolerance
    matrix = (cost / scale).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the status is checked below
        plan, log = ot.emd(a, b, matrix, numItermax=10**9, log=True, center_dual=False)
    if log["warning"] is not None:
        raise RuntimeError(f"ot.emd found no optimal plan: {log['warning']}")
    i, j = np.nonzero(plan > 0)
    return _Plan(i, j, plan[i, j]), scale * log["u"], scale * log["v"]


def _line(pair: _Pair) -> tuple[_Plan, np.ndarray, np.ndarray]:
    r"""Optimal plan and potentials on the line, by sorting.

    The plan is the monotone coupling. The potentials f and -f are those of the function whose
    slope is the sign of G - F, the difference of the distribution functions. Its values are
    multiples of a quantum, and add up without rounding: f is 1-Lipschitz as a list of numbers.
    """
    x, y = pair.x, pair.y
    points_x, points_y = x.points[:, 0].cpu().numpy(), y.points[:, 0].cpu().numpy()
    order_x, order_y = np.argsort(points_x, kind="stable"), np.argsort(points_y, kind="stable")
    mass_y = y.mass * (x.total / y.total)
    plan = _northwest(x.mass[order_x], mass_y[order_y])
    plan = _Plan(order_x[plan.i], order_y[plan.j], plan.mass)

    points = np.concatenate((points_x, points_y))
    order = np.argsort(points, kind="stable")
    ahead = np.cumsum(np.concatenate((x.mass, -mass_y))[order])[:-1]  # F - G
    gaps = np.diff(points[order])
    quantum = math.ldexp(1.0, math.frexp(points.max() - points.min())[1] - 51)
    whole = np.maximum(np.floor(gaps / quantum) - 2, 0)
    rises = np.cumsum(-np.sign(ahead) * whole)
    potential = np.empty(len(points))
    potential[order] = quantum * np.concatenate(([0.0], rises))
    return plan, potential[: len(points_x)], -potential[len(points_x) :]


def _transform(
    at: Tensor, points: Tensor, potential: Tensor, costs: tuple[Tensor, float] | None = None
) -> Tensor:
    """Bound the c-transform min_i c(at_k, points_i) - potential_i from below, see Note [rounding].

    ``costs`` is what :func:`_distances` gives for all of ``at`` and ``points``, if at hand.
    """
    if costs is None and len(at) * len(points) > _CHUNK:
        least = _tiled_transform(at, points, potential)
    else:
        matrix, error = _distances(at, points) if costs is None else costs
        step = max(1, _CHUNK // len(points))
        least = torch.cat([_least(rows, error, potential) for rows in matrix.split(step)])
    below = torch.tensor(-math.inf).to(potential)
    least = torch.nextafter(least, below) - math.sqrt(points.shape[1]) * _TINY
    return torch.nextafter(least, below)


def _least(matrix: Tensor, error: float, potential: Tensor) -> Tensor:
    return matrix.mul(1 - error - 4 * _UNIT).sub_(potential).amin(1)


def _tiled_transform(at: Tensor, points: Tensor, potential: Tensor) -> Tensor:
    """Take the minima tile by tile, those first and only that can hold them.

    Between two tiles no distance is below that of their centres less both radii. The margin is
    far above rounding.
    """
    rows, columns = _tiles(at), _tiles(points)
    centres, radii = _balls(points, columns)
    highest = torch.stack([potential[k].max() for k in columns])
    margin = 1e-12 * potential.abs().max()
    least = torch.full((len(at),), math.inf).to(potential)
    for row in rows:
        centre, radius = _balls(at, [row])
        between = _distances(centre, centres)[0][0]
        bounds = between - radius - radii - 1e-9 * (between + radius + radii) - highest - margin
        bounds, order = bounds.sort()
        best, near = least[row], at[row]
        for bound, k in zip(bounds.tolist(), order.tolist(), strict=True):
            if bound > best.max():
                break
            part = _least(*_distances(near, points[columns[k]]), potential[columns[k]])
            best = torch.minimum(best, part)
        least[row] = best
    return least


def _tiles(points: Tensor) -> list[Tensor]:
    """Cut a cloud into tiles: of neighbours where that can help, in few dimensions."""
    if points.shape[1] > 16:
        return list(torch.arange(len(points), device=points.device).split(4 * _TILE))
    cells = _cells(points.cpu().numpy(), np.random.default_rng(0))
    return [torch.from_numpy(cell).to(points.device) for cell in cells]


def _balls(points: Tensor, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Centres (k, d) and radii (k,) of balls around the tiles."""
    centres = torch.stack([points[tile].mean(0) for tile in tiles])
    radii = [_distances(c[None], points[t])[0].max() for c, t in zip(centres, tiles, strict=True)]
    return centres, torch.stack(radii)


def _cells(place: np.ndarray, rng: np.random.Generator) -> Iterable[np.ndarray]:
    """Cut a cloud into cells of at most _TILE points, by halves across long directions."""
    stack = [np.arange(len(place))]
    while stack:
        cell = stack.pop()
        if len(cell) <= _TILE:
            yield cell
            continue
        centred = place[cell] - place[cell].mean(0)
        direction = rng.standard_normal(place.shape[1])
        direction = centred.T @ (centred @ direction)
        order = np.argsort(centred @ direction, kind="stable")
        stack += [cell[order[: len(cell) // 2]], cell[order[len(cell) // 2 :]]]


def _dual_value(cloud: _Cloud, potential: Tensor) -> float:
    """Mean of the potential over the cloud, rounded down."""
    products = cloud.mass * potential.cpu().numpy()
    mean = math.fsum(products) / cloud.total
    size = math.fsum(np.abs(products)) / cloud.total + 1e-300
    return _down(mean - 16 * _UNIT * size)


def _plan_value(pair: _Pair, plan: _Plan, costs: tuple[Tensor, float] | None = None) -> float:
    r"""Upper bound of the cost of a coupling that is next to a plan, scaled.

    Cut the rows of the plan and then its columns to the masses that they must have, and couple
    what is missing arbitrarily: that moves at most the sum of the positive parts of
    mass - row sum and of column sum - mass, each at most over the diameter.
    """
    (x, y), d = (pair.x, pair.y), pair.x.points.shape[1]
    if costs is None:
        each, error = _pair_distances(x.points, y.points, plan.i, plan.j), (d + 8) * _UNIT
    else:
        i, j = (torch.from_numpy(k).to(x.points.device) for k in (plan.i, plan.j))
        each, error = costs[0][i, j].cpu().numpy(), costs[1]
    each *= 1 + error + 8 * _UNIT
    if costs is not None or not pair.exact:
        each += math.sqrt(d) * _TINY
    cost = math.fsum(plan.mass * each) * (1 + 8 * _UNIT)
    rows = np.bincount(plan.i, plan.mass, len(x.mass))
    columns = np.bincount(plan.j, plan.mass, len(y.mass))
    astray = math.fsum(np.maximum(x.mass - rows, 0))
    astray += math.fsum(np.maximum(columns - y.mass * (x.total / y.total), 0))
    if not (pair.integer and np.array_equal(plan.mass, np.floor(plan.mass))):
        terms = np.bincount(plan.i).max() + np.bincount(plan.j).max()
        astray += 2 * (terms + 8) * _UNIT * x.total
    corners = torch.cat((x.points, y.points))
    extent = (corners.amax(0) - corners.amin(0)).cpu().numpy()
    diameter = math.sqrt(math.fsum(extent**2)) * (1 + 16 * _UNIT) + math.sqrt(d) * _TINY
    total = (cost + astray * diameter) / x.total * (1 + 8 * _UNIT)
    return _up(total) if total else 0.0


# ------------------------------------------------------------------------ the exact distance


def wasserstein1(
    x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None
) -> Tensor:
    r"""Wasserstein distance W₁ between two finite weighted clouds, by linear programming.

    .. math::
        W_1 = \min_{P \ge 0} \sum_{ij} P_{ij} \lVert x_i - y_j\rVert_2
        \quad\text{with}\quad \sum_j P_{ij} = a_i,\; \sum_i P_{ij} = b_j
        \;=\; \max_{f, g} \sum_i a_i f_i + \sum_j b_j g_j
        \quad\text{with}\quad f_i + g_j \le \lVert x_i - y_j\rVert_2

    Solved by POT's network simplex in float64, on the line by sorting. The result is exact up to
    rounding and the solver's tolerance; :func:`wasserstein1_bracket` proves how close. Time grows
    as a power of n between 2 and 3 (seconds at n = m = 2048), memory is :math:`50\,nm` bytes; on
    the line they are :math:`O(n \log n)` and :math:`O(n)`.

    It is the distance between the two finite sets. Of independent samples of two
    distributions, it overestimates the distance between the distributions on average, in high
    dimension by far: between a distribution and itself it decays as :math:`n^{-1/d}`
    (:cite:t:`weed2019`).

    **Gradients** are those of the optimal plan and potentials: :math:`P_{ij}` times the
    unit vector from :math:`y_j` to :math:`x_i` for a point, :math:`f_i` for a weight (up to a
    constant, chosen such that they sum to 0: weights must sum to 1). Where the optimum is not
    unique they are one of the subgradients; a pair of equal points adds 0.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64, on a CPU or GPU.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1 up to rounding (they are divided by their sum);
        1/n and 1/m unless given.

    Returns
    -------
    torch.Tensor
        :math:`W_1`, of shape (), in the dtype and on the device of ``x``.

    Raises
    ------
    TypeError
        If an argument is no tensor, or neither float32 nor float64, or ``x`` and ``y`` differ.
    ValueError
        If a shape does not fit, a set is empty, an entry is not finite, weights are negative
        or do not sum to 1, or the cost matrix would not fit in memory.
    RuntimeError
        If POT's solver fails.

    Examples
    --------
    A translation by :math:`t` costs :math:`\lVert t\rVert_2`, and no plan is cheaper:

    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> t = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    >>> round(wasserstein1(x, x + t).item(), 12)
    5.0

    References
    ----------
    :cite:t:`villani2009`, chapter 6, for the distance; :cite:t:`flamary2021` for the solver.
    """
    pair = _pair(x, y, x_weights, y_weights)
    plan, f, g = _solve_exactly(pair)
    flat = [z.flatten(1).double() * 2.0**-pair.exponent for z in (x, y)]
    i, j = (
        cloud.support[torch.from_numpy(k)].to(x.device)
        for cloud, k in ((pair.x, plan.i), (pair.y, plan.j))
    )
    mass = torch.from_numpy(plan.mass / pair.x.total).to(x.device)
    value = mass @ torch.linalg.vector_norm(flat[0][i] - flat[1][j], dim=1)
    for weights, cloud, other, potential in (
        (x_weights, pair.x, pair.y, g),
        (y_weights, pair.y, pair.x, f),
    ):
        if weights is not None and weights.requires_grad:
            points = (flat[0] if cloud is pair.x else flat[1]).detach().to(cloud.points.device)
            slope = _transform(points, other.points, torch.from_numpy(potential).to(points))
            slope = (slope - slope.mean()).to(weights.device)
            value = value + (weights - weights.detach()).double() @ slope
    return (value * 2.0**pair.exponent).to(x.dtype)


def _solve_exactly(pair: _Pair) -> tuple[_Plan, np.ndarray, np.ndarray]:
    x, y = pair.x, pair.y
    if x.points.shape[1] == 1:
        return _line(pair)
    _check_memory(len(x.mass), len(y.mass), 50)
    costs = _distances(x.points, y.points)[0]
    return _emd(costs, x.mass, y.mass * (x.total / y.total))


def c_transform(potential: Tensor, points: Tensor, at: Tensor) -> Tensor:
    r"""c-transform of a potential on a cloud, for the cost :math:`\lVert x - y\rVert_2`.

    .. math:: f^c(z) = \min_i\; \lVert z - x_i\rVert_2 - f_i

    It is the largest function with :math:`f_i + f^c(z) \le \lVert x_i - z\rVert_2` for all
    :math:`i` and :math:`z`, and, as a minimum of 1-Lipschitz functions, 1-Lipschitz on all of
    :math:`\mathbb R^d`, whatever the numbers :math:`f_i`. So :math:`(f, f^c)` is feasible for the
    dual. Two transforms improve a critic as far as transforms can:
    :math:`f^{cc} \ge f` and :math:`f^{ccc} = f^c`. With the ``y_potential`` g of a bracket,
    :math:`g^c` is a 1-Lipschitz critic on the whole space that attains the lower bound.

    Computed in chunks, in :math:`O(nk)` time and :math:`O(n + k)` memory.

    Parameters
    ----------
    potential : torch.Tensor
        The numbers :math:`f_i`, shape (n,).
    points : torch.Tensor
        The points :math:`x_i`, shape (n, d), float32 or float64.
    at : torch.Tensor
        The points :math:`z`, shape (k, d).

    Returns
    -------
    torch.Tensor
        The values :math:`f^c(z)`, shape (k,), in the dtype of ``points``; without gradient.

    Raises
    ------
    TypeError, ValueError
        If an argument is no finite float32 or float64 tensor, or shapes or dtypes do not fit.

    Examples
    --------
    One point and the potential 0 give the distance from it; transforming twice more adds nothing:

    >>> x, z = torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> fc = c_transform(torch.zeros(1), x, z)
    >>> fc
    tensor([5., 1.])
    >>> c_transform(c_transform(fc, z, x), x, z)
    tensor([5., 1.])

    References
    ----------
    :cite:t:`villani2009`, definition 5.2; :cite:t:`peyre2019`, section 5.1.
    """
    _check_points("points", points)
    _check_points("at", at)
    if points.shape[1:] != at.shape[1:] or points.dtype != at.dtype:
        raise ValueError(
            f"at must be points like those of points, {tuple(points.shape[1:])} {points.dtype}, "
            f"got {tuple(at.shape[1:])} {at.dtype}"
        )
    if not isinstance(potential, Tensor):
        raise TypeError(f"potential must be a tensor, got {type(potential).__name__}")
    if potential.shape != points.shape[:1]:
        raise ValueError(
            f"potential must have shape ({len(points)},), one number for each point, "
            f"got {tuple(potential.shape)}"
        )
    if not potential.isfinite().all():
        raise ValueError("potential must be finite, got NaN or infinite entries")
    ends = [z.detach().double().flatten(1) for z in (points, at)]
    scale = 2.0 ** -_exponent(*ends)
    values = _transform(ends[1] * scale, ends[0] * scale, potential.detach().double() * scale)
    return (values / scale).to(points.dtype)


# ------------------------------------------------------------------------------ the bracket


@dataclasses.dataclass(frozen=True)
class TransportBracket:
    r"""Two proven bounds of W₁, and what proves them.

    Parameters
    ----------
    lower, upper : float
        ``lower`` :math:`\le W_1 \le` ``upper``.
    lower_from, upper_from : str
        How each was obtained.
    x_potential, y_potential : torch.Tensor
        Feasible dual point, shapes (n,) and (m,), float64:
        :math:`f_i + g_j \le \lVert x_i - y_j\rVert_2` for all points of positive weight.
        :math:`\sum a_i f_i + \sum b_j g_j` is the lower bound, up to rounding; ``lower`` is the
        number below.
    plan : torch.Tensor
        The coupling, a sparse (n, m) float64 tensor whose entries sum to 1. Its marginals are
        the weights up to rounding, for which ``upper`` makes up.

    Examples
    --------
    >>> x = torch.zeros(1, 2)
    >>> y = torch.tensor([[3.0, 4.0]])
    >>> bracket = wasserstein1_bracket(x, y)
    >>> bracket.lower <= 5 <= bracket.upper
    True
    >>> print(bracket)
    5 <= W1 <= 5 (gap 0.0 %)
    from below: potentials of POT's exact plan, c-transformed
    from above: POT's exact plan
    """

    lower: float
    upper: float
    lower_from: str
    upper_from: str
    x_potential: Tensor = dataclasses.field(repr=False, compare=False)
    y_potential: Tensor = dataclasses.field(repr=False, compare=False)
    plan: Tensor = dataclasses.field(repr=False, compare=False)

    @property
    def gap(self) -> float:
        """Difference of the bounds."""
        return self.upper - self.lower

    @property
    def relative_gap(self) -> float:
        """Difference of the bounds in units of the upper one; 0 if both are 0."""
        return self.gap / self.upper if self.upper else 0.0

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def __str__(self) -> str:
        return (
            f"{self.lower:.6g} <= W1 <= {self.upper:.6g} (gap {100 * self.relative_gap:.1f} %)\n"
            f"from below: {self.lower_from}\nfrom above: {self.upper_from}"
        )


def wasserstein1_bracket(
    x: Tensor,
    y: Tensor,
    critic: Callable[[Tensor], Tensor] | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    method: Method = "auto",
    tolerance: float = 0.01,
    sweeps: int = 10,
    seed: int = 0,
) -> TransportBracket:
    r"""Proven bounds of W₁ between two finite clouds: a feasible dual point and a coupling.

    .. math::
        \sum_i a_i f_i + \sum_j b_j g_j \;\le\; W_1 \;\le\;
        \sum_{ij} P_{ij} \lVert x_i - y_j\rVert_2, \qquad
        f_i + g_j \le \lVert x_i - y_j\rVert_2, \quad P \in \Pi(a, b)

    **Guaranteed**, for every input that is not refused: ``lower`` :math:`\le W_1 \le` ``upper``, in
    real arithmetic for the points as given (the weights divided by their sum). The potentials are
    c-transforms (:func:`c_transform`) rounded towards feasibility; a plan whose marginals are off
    by rounding pays for it; distances, products and sums carry error bounds. The critic need not be
    Lipschitz: only its values on the points matter, and it can make the lower bound better or
    worse, never wrong. **Hoped**: a small gap.

    ========== ====================================== ========================== ==============
    method     from below                             from above                 time, memory
    ========== ====================================== ========================== ==============
    "exact"    the potentials of POT's exact plan     POT's exact plan           ~n³, n²
    "sinkhorn" Sinkhorn's iteration with decreasing   its plan, rounded to the   n² a step, n²
               entropy, started at the critic         marginals
    "blocks"   the critic or the exact potentials     the monotone coupling      n², n
               of samples of the coupling, as the     along an axis, improved
               better one on a sample of y            by exact plans in blocks
    "critic"   the critic                             as for "blocks"            n², n
    ========== ====================================== ========================== ==============

    All lower bounds end with two c-transforms on all points. On the line, "exact" is by sorting;
    "exact" needs no critic and makes no use of one.
    "auto" is "exact" on the line and up to 2048² pairs of points, "sinkhorn" up to 6000², "blocks"
    beyond; it does not depend on the machine, and all methods are deterministic. "sinkhorn" halves
    the entropy until the gap is below ``tolerance`` or float32, in which it iterates, is
    exhausted.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    critic : callable, optional
        Maps points (n, d), in the shape of ``x`` and the dtype of its parameters, to values (n,)
        or (n, 1); large on ``x``, small on ``y``. Its values are used as they are, or times a
        power of two or 0 where that gives a better bound on a sample.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    method : str
        As in the table.
    tolerance : float
        Relative gap at which "sinkhorn" stops.
    sweeps : int
        How often "blocks" and "critic" solve all blocks.
    seed : int
        Seed of the directions of the blocks and of samples.

    Returns
    -------
    TransportBracket

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if the critic's values are NaN or infinite or have another
        shape; if ``method`` is unknown or is "critic" without a critic.

    Examples
    --------
    The points of a sphere against its centre, with the exact solver and without:

    >>> y = nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64))
    >>> x = torch.zeros(50, 3, dtype=torch.float64)
    >>> exact = wasserstein1_bracket(x, y)
    >>> exact.lower <= 1 <= exact.upper, exact.gap < 1e-14
    (True, True)
    >>> 1 in wasserstein1_bracket(x, y, method="sinkhorn")
    True

    References
    ----------
    :cite:t:`peyre2019` for Sinkhorn's iteration and c-transforms; :cite:t:`altschuler2017`,
    algorithm 2, for rounding to the marginals.
    """
    pair = _pair(x, y, x_weights, y_weights)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if method == "critic" and critic is None:
        raise ValueError('critic must be given for method="critic", got None')
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    _check_count("sweeps", sweeps, 0)
    rng = np.random.default_rng(seed)
    size = len(pair.x.mass) * len(pair.y.mass)
    if method == "auto":
        line = pair.x.points.shape[1] == 1
        method = "exact" if line or size <= _EXACT_SIZE else "sinkhorn"
        method = method if line or size <= _DENSE_SIZE else "blocks"
    start = None if critic is None else _critic_start(pair, _critic_values(critic, x), rng)

    if method == "exact":
        return _exact_bracket(pair)
    if method == "sinkhorn":
        return _sinkhorn_bracket(pair, start, tolerance)
    return _blocks_bracket(pair, start, sweeps, rng, method == "critic")


def _bracket(
    pair: _Pair,
    f: Tensor,
    g: Tensor,
    plan: _Plan,
    lower_from: str,
    upper_from: str,
    costs: tuple[Tensor, float] | None = None,
) -> TransportBracket:
    """Evaluate a feasible dual point and a plan; put both in the units of the given points."""
    x, y, scale = pair.x, pair.y, 2.0**pair.exponent
    lower = _down(_dual_value(x, f) + _dual_value(y, g))
    if lower < 0:
        f, g, lower = torch.zeros_like(f), torch.zeros_like(g), 0.0
    lower = min(_down(lower * scale), sys.float_info.max) if lower else 0.0
    upper = _plan_value(pair, plan, costs)
    upper = _up(upper * scale) if upper else 0.0
    f = _spread(x, f, y.points, g)
    g = _spread(y, g, x.points, f[x.support.to(f.device)])
    moves = [x.support[torch.from_numpy(plan.i)], y.support[torch.from_numpy(plan.j)]]
    shares = torch.from_numpy(plan.mass / plan.mass.sum())
    coupling = torch.sparse_coo_tensor(
        torch.stack(moves), shares, (x.size, y.size), check_invariants=True
    )
    f, g = f.cpu() * scale, g.cpu() * scale
    return TransportBracket(lower, upper, lower_from, upper_from, f, g, coupling.coalesce())


def _spread(cloud: _Cloud, potential: Tensor, points: Tensor, other: Tensor) -> Tensor:
    """Give the points of weight zero the largest potential that is feasible with ``other``."""
    if not len(cloud.zero):
        return potential
    whole = torch.empty(cloud.size, dtype=torch.float64, device=potential.device)
    rest = torch.ones(cloud.size, dtype=torch.bool)
    rest[cloud.support] = False
    whole[cloud.support] = potential
    whole[rest] = _transform(cloud.zero, points, other)
    return whole


def _exact_bracket(pair: _Pair) -> TransportBracket:
    x, y = pair.x.points, pair.y.points
    if x.shape[1] == 1:
        plan, *line = _line(pair)
        f, g = (torch.from_numpy(values).to(x) for values in line)
        return _bracket(
            pair, f, g, plan, "the potential of the sorted points", "the monotone coupling"
        )
    _check_memory(len(x), len(y), 50)
    costs = _distances(x, y)
    plan, potential, _ = _emd(costs[0], pair.x.mass, pair.y.mass * (pair.x.total / pair.y.total))
    f, g = _improve(x, y, torch.from_numpy(potential).to(x), costs)
    lower_from = "potentials of POT's exact plan, c-transformed"
    return _bracket(pair, f, g, plan, lower_from, "POT's exact plan")


def _improve(
    x: Tensor, y: Tensor, f: Tensor, costs: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Make a feasible pair of a potential on x by two c-transforms."""
    flipped = None if costs is None else (costs[0].mT, costs[1])
    g = _transform(y, x, f - f.mean(), flipped)
    return _transform(x, y, g, costs), g


def _critic_values(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Values (n,) of the critic in float64, evaluated in chunks in the critic's dtype."""
    like = _critic_parameter(critic)
    with torch.no_grad():
        parts = [
            _values(critic, chunk.detach() if like is None else chunk.detach().to(like))
            for chunk in points.split(4096)
        ]
    values = torch.cat(parts).double()
    if not values.isfinite().all():
        raise ValueError("critic must give finite values, got NaN or infinite ones")
    return values


def _critic_parameter(critic: Callable[[Tensor], Tensor]) -> Tensor | None:
    if not isinstance(critic, nn.Module):
        if not callable(critic):
            raise TypeError(f"critic must be callable, got {type(critic).__name__}")
        return None
    return next(critic.parameters(), None)


def _values(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    values = critic(points)
    if not isinstance(values, Tensor):
        raise TypeError(f"critic must return a tensor, got {type(values).__name__}")
    if values.shape not in ((len(points),), (len(points), 1)):
        raise ValueError(
            f"critic must return one value for each of {len(points)} points, "
            f"got shape {tuple(values.shape)}"
        )
    return values.flatten()


def _sample(mass: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw indices independently; give all indices if there are no more than ``size``."""
    if len(mass) <= size:
        return np.arange(len(mass))
    return rng.choice(len(mass), size, p=mass / mass.sum())


def _critic_start(pair: _Pair, values: Tensor, rng: np.random.Generator) -> Tensor:
    """Values on x, in scaled units, times the factor that is best on a sample."""
    x, y = pair.x, pair.y
    device = x.points.device
    values, size = _unit(values[x.support.to(values.device)].to(device))
    values, spread = _unit(values - values.mean())
    i, j = (torch.from_numpy(_sample(c.mass, 1024, rng)).to(device) for c in (x, y))
    a, b = (
        torch.from_numpy(c.mass / c.total).to(device)
        if len(k) == len(c.mass)
        else torch.full((len(k),), 1 / len(k), dtype=torch.float64, device=device)
        for c, k in ((x, i), (y, j))
    )
    costs = _distances(x.points[i], y.points[j])
    given = min(spread * size * 2.0**-pair.exponent, sys.float_info.max)
    digits = math.frexp(math.frexp(spread)[0] * math.frexp(size)[0])[0]
    largest = math.frexp(costs[0].max().item())[1]
    best, factor = -math.inf, 0.0
    for candidate in (given, 0.0, *(math.ldexp(digits, largest + k) for k in range(-6, 7))):
        f, g = _improve(x.points[i], y.points[j], candidate * values[i], costs)
        value = (a @ f + b @ g).item()
        if value > best:
            best, factor = value, candidate
    return factor * values


def _unit(values: Tensor) -> tuple[Tensor, float]:
    """Divide by the largest absolute value, unless that is 0."""
    size = values.abs().max().item()
    return (values / size if size else values), size


# Note [decreasing entropy]
# Sinkhorn's iteration with entropy eps needs many steps if started far away, few if started at
# the potentials for 2 eps. At each level the kernel exp((f + g - c) / eps) is formed once, in
# float32, and the iterations are matrix-vector products, over-relaxed by 1.5. c-transforms
# before each level give every row and column of the kernel an entry 1, so that none underflows.


def _sinkhorn_bracket(pair: _Pair, start: Tensor | None, tolerance: float) -> TransportBracket:
    x, y = pair.x.points, pair.y.points
    _check_memory(len(x), len(y), 40)
    costs = _distances(x, y)
    cost, mean = costs[0], costs[0].mean().item()
    a, b = (torch.from_numpy(c.mass / c.total).to(x) for c in (pair.x, pair.y))
    f, g = _improve(x, y, torch.zeros_like(a) if start is None else start, costs)
    best = (a @ f + b @ g).item(), f, g
    scale = mean or 1.0
    entropy, steps = scale / 16, 0
    while True:
        kernel = _kernel(f, g, cost, entropy)
        enough = max(0.25 * tolerance * best[0] / scale, 1e-6)  # of float32 no more
        u, v, astray, taken = _scale(kernel, a.float(), b.float(), enough)
        steps += taken
        f, g = _improve(x, y, f + entropy * u.double().log(), costs)
        value = (a @ f + b @ g).item()
        if value > best[0]:
            best = value, f, g
        elif not math.isfinite(value):
            f, g = best[1:]
        upper = _plan_cost(kernel, u * a.float(), v * b.float(), cost) + astray * mean
        if upper - best[0] <= 0.8 * tolerance * upper or entropy < 1e-5 * scale:
            break
        entropy /= 2
    dense = kernel.double().mul_((u.double() * a)[:, None]).mul_(v.double() * b)
    lower_from = f"the potentials of {steps} Sinkhorn steps, c-transformed"
    if start is not None:
        lower_from = f"the critic, improved by {steps} Sinkhorn steps and c-transforms"
    entropy *= 2.0**pair.exponent
    upper_from = f"Sinkhorn's plan with entropy {entropy:.2g}, rounded to the marginals"
    return _bracket(pair, *best[1:], _rounded(pair, dense), lower_from, upper_from, costs)


def _kernel(f: Tensor, g: Tensor, cost: Tensor, entropy: float) -> Tensor:
    step = max(1, _CHUNK // len(g))
    parts = [
        (f[k : k + step, None] + g - cost[k : k + step]).div_(entropy).float().exp_()
        for k in range(0, len(f), step)
    ]
    return torch.cat(parts)


def _scale(
    kernel: Tensor, a: Tensor, b: Tensor, enough: float
) -> tuple[Tensor, Tensor, float, int]:
    """Sinkhorn's iteration on a kernel: factors, the mass astray, and the steps taken."""
    u, v, relax, astray = torch.ones_like(a), torch.ones_like(b), 1.5, math.inf
    for step in range(1, 501):
        rows = (kernel @ (v * b)).clamp(min=1e-30)
        if step % 10 == 0:
            columns = (kernel.mT @ (u * a)).clamp(min=1e-30)
            errors = a @ (rows * u - 1).abs() + b @ (columns * v - 1).abs()
            astray = errors.item() / 2
            if astray <= enough:
                break
            if not math.isfinite(astray) and relax > 1:  # start again, without relaxing
                u, v, relax = torch.ones_like(a), torch.ones_like(b), 1.0
                continue
        u = u ** (1 - relax) * rows**-relax
        columns = (kernel.mT @ (u * a)).clamp(min=1e-30)
        v = v ** (1 - relax) * columns**-relax
    return u.clamp(1e-30, 1e30), v.clamp(1e-30, 1e30), astray, step


def _plan_cost(kernel: Tensor, u: Tensor, v: Tensor, cost: Tensor) -> float:
    step = max(1, _CHUNK // len(v))
    rows = [(kernel[k : k + step] * cost[k : k + step].float()) @ v for k in range(0, len(u), step)]
    return (torch.cat(rows) @ u).item()


def _rounded(pair: _Pair, dense: Tensor) -> _Plan:
    """Round a matrix to the marginals; couple what is missing monotonely along an axis."""
    a, b = (torch.from_numpy(c.mass / c.total).to(dense) for c in (pair.x, pair.y))
    dense[~(dense >= 1e-5 / len(b) * a[:, None])] = 0  # NaN as well
    dense *= (a / dense.sum(1).clamp(min=1e-300)).clamp(max=1)[:, None]
    dense *= (b / dense.sum(0).clamp(min=1e-300)).clamp(max=1)
    i, j = (k.cpu().numpy() for k in dense.nonzero(as_tuple=True))
    mass = dense[dense > 0].cpu().numpy()
    missing = [
        np.maximum(m.cpu().numpy() - np.bincount(k, mass, len(m)), 0) for m, k in ((a, i), (b, j))
    ]
    plan = _Plan(i, j, mass)
    if min(m.sum() for m in missing) > 0:
        axis = _axes(pair, 1, np.random.default_rng(0))
        order = [np.argsort((c.points @ axis)[:, 0].cpu().numpy()) for c in (pair.x, pair.y)]
        rest = _northwest(missing[0][order[0]], missing[1][order[1]])
        plan = _Plan(
            np.concatenate((i, order[0][rest.i])),
            np.concatenate((j, order[1][rest.j])),
            np.concatenate((mass, rest.mass)),
        )
    return _Plan(plan.i, plan.j, plan.mass * pair.x.total)


def _axes(pair: _Pair, number: int, rng: np.random.Generator) -> Tensor:
    """Orthonormal directions (d, number) along which both clouds together spread most."""
    points = torch.cat((pair.x.points, pair.y.points))
    points = points - points.mean(0)
    directions = torch.from_numpy(rng.standard_normal((points.shape[1], number))).to(points)
    for _ in range(3):
        directions = torch.linalg.qr(points.mT @ (points @ directions))[0]
    return directions


# Note [blocks]
# A coupling is a list of moves, a few times n + m of them. A sweep cuts the list into blocks of
# moves whose middles are close to each other, along other directions each time, and replaces every
# block by the exact plan between its own marginals. Marginals stay, the cost cannot grow.


def _blocks_bracket(
    pair: _Pair, start: Tensor | None, sweeps: int, rng: np.random.Generator, only_critic: bool
) -> TransportBracket:
    x, y = pair.x, pair.y
    axes = _axes(pair, min(8, x.points.shape[1]), rng)
    ends = [(c.points @ axes).cpu().numpy() for c in (x, y)]
    order = [np.argsort(z[:, 0], kind="stable") for z in ends]
    plan = _northwest(x.mass[order[0]], (y.mass * (x.total / y.total))[order[1]])
    plan = _Plan(order[0][plan.i], order[1][plan.j], plan.mass)
    for _ in range(sweeps):
        plan = _sweep(pair, plan, ends[0][plan.i] + ends[1][plan.j], rng)
    upper_from = f"the monotone coupling along an axis, {sweeps} sweeps of exact plans in blocks"

    candidates = {} if start is None else {"the critic": start}
    if not only_critic:
        number = _SAMPLES if len(plan.mass) > _SAMPLE else 1
        samples = [_sample_start(pair, plan, rng) for _ in range(number)]
        candidates["exact potentials of samples"] = torch.stack(samples).mean(0)
    best = _better(pair, candidates, rng)
    f, g = _improve(x.points, y.points, candidates[best])
    return _bracket(pair, f, g, plan, f"{best}, c-transformed", upper_from)


def _better(pair: _Pair, candidates: dict[str, Tensor], rng: np.random.Generator) -> str:
    """Name the potential on x whose lower bound is best, judged by a sample of y."""
    if len(candidates) == 1:
        return next(iter(candidates))
    x, y = pair.x, pair.y
    j = _sample(y.mass, _SAMPLE, rng)
    b = y.mass / y.total if len(j) == len(y.mass) else np.full(len(j), 1 / len(j))
    points = y.points[torch.from_numpy(j).to(y.points.device)]
    values = {
        name: x.mass @ f.cpu().numpy() / x.total + b @ _transform(points, x.points, f).cpu().numpy()
        for name, f in candidates.items()
    }
    return max(values, key=lambda name: values[name])


def _sweep(pair: _Pair, plan: _Plan, place: np.ndarray, rng: np.random.Generator) -> _Plan:
    """Replace the moves of each block of neighbours by an exact plan."""
    parts = []
    for block in _cells(place, rng):
        i, at_i = np.unique(plan.i[block], return_inverse=True)
        j, at_j = np.unique(plan.j[block], return_inverse=True)
        if len(i) == 1 or len(j) == 1:
            parts.append(_Plan(plan.i[block], plan.j[block], plan.mass[block]))
            continue
        a, b = np.bincount(at_i, plan.mass[block]), np.bincount(at_j, plan.mass[block])
        device = pair.x.points.device
        cost = _distances(
            pair.x.points[torch.from_numpy(i).to(device)],
            pair.y.points[torch.from_numpy(j).to(device)],
        )[0]
        part = _emd(cost, a, b)[0]
        parts.append(_Plan(i[part.i], j[part.j], part.mass))
    return _Plan(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sample_start(pair: _Pair, plan: _Plan, rng: np.random.Generator) -> Tensor:
    r"""Extend the exact potentials of a sample of the coupling to all of x.

    If the coupling is optimal, so are its restriction to any set of moves and the optimal
    potentials restricted to their ends.
    """
    k = _sample(plan.mass, _SAMPLE, rng)
    i, at_i = np.unique(plan.i[k], return_inverse=True)
    j, at_j = np.unique(plan.j[k], return_inverse=True)
    weights = plan.mass[k] if len(k) == len(plan.mass) else np.ones(len(k))
    device = pair.x.points.device
    x = pair.x.points[torch.from_numpy(i).to(device)]
    y = pair.y.points[torch.from_numpy(j).to(device)]
    _, _, g = _emd(_distances(x, y)[0], np.bincount(at_i, weights), np.bincount(at_j, weights))
    return _transform(pair.x.points, y, torch.from_numpy(g).to(x))


# ------------------------------------------------------------------------------- the critic


def critic_difference(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    r"""Mean of a critic over x minus its mean over y: an **estimate**, on no side of W₁.

    .. math:: \sum_i a_i f(x_i) - \sum_j b_j f(y_j)

    It is a lower bound of :math:`W_1` for a 1-Lipschitz critic only, and of no meaning for one
    whose Lipschitz constant is unknown, as after weight clipping or with a gradient penalty:
    see :func:`kantorovich_dual` for a bound. Both clouds go through the critic in one batch,
    so that constrained weights are computed once.

    Parameters
    ----------
    critic : callable
        :math:`f`, from (batch, ...) to (batch,) or (batch, 1). Points are cast to the dtype and
        moved to the device of its parameters, if it has any.
    x, y : torch.Tensor
        Points (n, ...) and (m, ...), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in everything.

    Raises
    ------
    TypeError, ValueError
        If an argument is unusable, as for :func:`wasserstein1`, or the critic returns anything
        but one finite number a point.

    Examples
    --------
    Ten times the critic, ten times the number; W₁ is 5 all the same:

    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> critic_difference(lambda z: 10 * z.norm(dim=1), x, y)
    tensor(50.)
    """
    _check_clouds(x, y, x_weights, y_weights)
    return _difference(critic, x, y, x_weights, y_weights)


def _difference(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
) -> Tensor:
    like = _critic_parameter(critic)
    points = torch.cat((x, y))
    values = _values(critic, points if like is None else points.to(like))
    if not values.isfinite().all():
        raise ValueError("critic must give finite values, got NaN or infinite ones")
    on_x, on_y = values.split([len(x), len(y)])
    means = [
        v.mean() if w is None else v @ (w / w.sum()).to(v)
        for v, w in ((on_x, x_weights), (on_y, y_weights))
    ]
    return means[0] - means[1]


def kantorovich_dual(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    lipschitz: float | None = None,
) -> Tensor:
    r"""Kantorovich–Rubinstein dual value of a critic: a lower bound of W₁.

    .. math::
        \frac{1}{\max(1, L)} \Big(\sum_i a_i f(x_i) - \sum_j b_j f(y_j)\Big) \;\le\; W_1,
        \qquad \operatorname{Lip}(f) \le L

    Sign: mean over ``x`` **minus** mean over ``y``. A critic of larger bound than 1 is divided by
    it, one of smaller bound is not scaled up.

    **Guaranteed**: a lower bound of :math:`W_1` *between the two weighted clouds given*, whatever
    the critic, up to the rounding of its forward pass (:func:`wasserstein1_bracket` accounts for
    rounding too). **Not guaranteed**: that it bounds the distance of the distributions that the
    clouds were sampled from. On the points that the critic was fitted to, it overestimates that on
    average; on fresh points its mean is the critic's population value, which is at most
    the population's :math:`W_1` (see the held-out interval of :func:`fit_critic`).

    Parameters
    ----------
    critic : torch.nn.Module or callable
        :math:`f`, from (batch, ...) to (batch,) or (batch, 1).
    x, y : torch.Tensor
        Points (n, ...) and (m, ...), float32 or float64, cast to the dtype of the critic.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    lipschitz : float, optional
        An upper bound :math:`L` that you vouch for. Unless given, it is
        :func:`~lipbook.composition.lipschitz_bound` of the critic.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable but for :math:`L`, which counts as a constant.

    Raises
    ------
    TypeError, ValueError
        As :func:`critic_difference`, and if the critic has no Lipschitz bound.

    Examples
    --------
    A critic of norm 10 is worth no more than one of norm 1:

    >>> critic = nn.Linear(2, 1, bias=False)
    >>> critic.weight.data = torch.tensor([[6.0, 8.0]])
    >>> kantorovich_dual(critic, torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(5., grad_fn=<DivBackward0>)

    References
    ----------
    :cite:t:`kantorovich1958`; :cite:t:`villani2009`, remark 6.5.
    """
    _check_clouds(x, y, x_weights, y_weights)
    if lipschitz is None:
        if not isinstance(critic, nn.Module):
            raise TypeError(
                f"critic must be a torch.nn.Module, got {type(critic).__name__}: "
                "pass lipschitz= for a function whose Lipschitz bound you know"
            )
        lipschitz = lipschitz_bound(critic, x.shape[1:]).value
    if not 0 <= lipschitz < math.inf:
        raise ValueError(f"lipschitz must be finite and >= 0, got {lipschitz}")
    return _difference(critic, x, y, x_weights, y_weights) / max(1.0, lipschitz)


def gradient_penalty(
    critic: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    *,
    weight: float = 10.0,
) -> Tensor:
    r"""Gradient penalty of WGAN-GP: pulls the slope of a critic towards 1 between two batches.

    .. math::
        \lambda \operatorname{E} \big(\lVert \nabla f(t x + (1 - t) y)\rVert_2 - 1\big)^2,
        \qquad t \sim U[0, 1]

    A penalty for :func:`fit_critic`. **Not guaranteed**: any Lipschitz bound. The critic's
    dual value is an estimate, too large or too small.

    Parameters
    ----------
    critic : torch.nn.Module
        :math:`f`.
    x, y : torch.Tensor
        Batches (n, ...) and (m, ...); the shorter one is repeated.
    generator : torch.Generator, optional
        For :math:`t`; on the CPU.
    weight : float
        :math:`\lambda`.

    Returns
    -------
    torch.Tensor
        The penalty, of shape ().

    Examples
    --------
    >>> critic = nn.Linear(2, 1)
    >>> critic.weight.data = torch.tensor([[0.0, 3.0]])
    >>> gradient_penalty(critic, torch.randn(8, 2), torch.randn(4, 2), weight=1.0).item()
    4.0

    References
    ----------
    :cite:t:`gulrajani2017`, equation 3.
    """
    number = max(len(x), len(y))
    x, y = (z.detach()[torch.arange(number, device=z.device) % len(z)] for z in (x, y))
    mix = torch.rand(number, generator=generator).to(x).view(-1, *[1] * (x.dim() - 1))
    points = torch.lerp(y, x, mix).requires_grad_()
    (slope,) = torch.autograd.grad(_values(critic, points).sum(), points, create_graph=True)
    return weight * (slope.flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def clip_weights_(critic: nn.Module, limit: float = 0.01) -> None:
    r"""Weight clipping of WGAN: clamps all parameters to [-limit, limit], in place.

    A projection for :func:`fit_critic`. It bounds the Lipschitz constant by an unknown number, far
    from 1 as a rule; :func:`~lipbook.composition.lipschitz_bound` tells from above.

    Parameters
    ----------
    critic : torch.nn.Module
        Its parameters are changed.
    limit : float
        The bound, > 0.

    Raises
    ------
    ValueError
        If ``limit`` is not positive.

    Examples
    --------
    >>> critic = nn.Linear(1, 1)
    >>> critic.weight.data.fill_(7.0)
    tensor([[7.]])
    >>> clip_weights_(critic, 0.5)
    >>> critic.weight.item()
    0.5

    References
    ----------
    :cite:t:`arjovsky2017`, algorithm 1.
    """
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")
    for parameter in critic.parameters():
        parameter.clamp_(-limit, limit)


class HeldOut(NamedTuple):
    """Difference of a critic's means on points that it was not fitted to.

    ``low`` and ``high`` are the ends of a confidence interval for its value on the distributions
    that the points were drawn from: asymptotic, by the central limit theorem.
    """

    step: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class CriticHistory:
    """What :func:`fit_critic` saw on its way.

    All numbers are differences of means, without any division by a Lipschitz bound.

    Parameters
    ----------
    steps : list of int
        1, 2, ...
    values : list of float
        The difference on the batch of each step, before its update and without penalty.
    held_out : list of HeldOut
        The differences on held-out points; empty without any.

    Examples
    --------
    >>> critic = nn.Linear(1, 1, bias=False)
    >>> history = fit_critic(critic, torch.ones(1, 1), torch.zeros(1, 1), steps=3, lr=0.1)
    >>> history.steps, history.values[0] < history.values[-1]
    ([1, 2, 3], True)
    """

    steps: list[int]
    values: list[float]
    held_out: list[HeldOut]


def fit_critic(
    critic: nn.Module,
    x: Tensor | Sampler,
    y: Tensor | Sampler,
    *,
    steps: int,
    lr: float,
    batch_size: int | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    schedule: Literal["constant", "cosine"] = "constant",
    penalty: Penalty | None = None,
    project: Callable[[nn.Module], object] | None = None,
    held_out: int | tuple[Tensor, Tensor] | None = None,
    held_out_every: int | None = None,
    confidence: float = 0.95,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> CriticHistory:
    r"""Fit a critic by gradient ascent on the Kantorovich–Rubinstein dual.

    .. math:: \max_\theta\; \operatorname{E}_P f_\theta - \operatorname{E}_Q f_\theta

    The constraint :math:`\operatorname{Lip}(f_\theta) \le 1` is the critic's own business: one
    built of the layers of :mod:`lipbook.orthogonal` and :mod:`lipbook.activations` has it for
    every :math:`\theta`, and ends as a lower bound (:func:`kantorovich_dual`). One that is kept in
    check by ``project=clip_weights_``, by ``penalty=gradient_penalty`` or by torch's
    ``spectral_norm``, whose norm is estimated from below, ends as an estimate.

    :math:`P` and :math:`Q` are finite clouds, given as tensors, or distributions, given as
    samplers. In the first case the value that is maximised is at most :math:`W_1` between the
    clouds, which overestimates that between the distributions they came from; in the second, no
    point is seen twice and the ascent is on the population. Either way, held-out points
    give an honest interval.

    With the same seed, the same critic ends with the same parameters bit for bit (same machine,
    same number of threads). With ``checkpoint``, so does a run that was killed at any time and is
    started again: the file holds the parameters, the optimiser, the random states, torch's
    global one included, and the history. It is replaced in one move, never half-written.

    Parameters
    ----------
    critic : torch.nn.Module
        Maps (batch, ...) to (batch,) or (batch, 1). It is fitted in place, in its dtype and on
        its device, and left in evaluation mode.
    x, y : torch.Tensor or callable
        Points (n, ...) of float32 or float64, or ``sampler(n, generator)``, which
        returns n points and draws from the CPU generator only.
    steps : int
        Number of updates.
    lr : float
        Learning rate.
    batch_size : int, optional
        Points a side in a step: fresh draws from a sampler, draws with replacement from a tensor.
        All points unless given; samplers need it. Both batches go through the critic as one.
    x_weights, y_weights : torch.Tensor, optional
        Masses of the points of a tensor, >= 0 with sum 1.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` makes a :class:`torch.optim.Optimizer`.
    schedule : str
        ``"constant"``, or ``"cosine"``: from ``lr`` to 0 as half a cosine.
    penalty : callable, optional
        ``penalty(critic, x_batch, y_batch, generator)`` is subtracted from the value.
    project : callable, optional
        ``project(critic)`` runs after each update.
    held_out : int or pair of torch.Tensor, optional
        Points to judge by: how many to draw from each sampler, once, or two tensors.
    held_out_every : int, optional
        Steps between two looks at them; only after the last step unless given.
    confidence : float
        Of the held-out interval.
    checkpoint : path, optional
        File to save to, and to continue from if it exists. Settings and shapes are compared
        with those of the run that wrote it; points, samplers and functions cannot be.
    checkpoint_every : int
        Steps between two saves; the last step saves too.
    seed : int
        Seed of batches; that of held-out points is derived from it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    CriticHistory

    Raises
    ------
    TypeError, ValueError
        An argument is unusable, or the checkpoint is of another run; the message says which.
    FloatingPointError
        The value became NaN or infinite.

    Examples
    --------
    Two points at distance 5; the critic learns the direction, and its constraint the slope:

    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> critic = OrthogonalLinear(2, 1)
    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> history = fit_critic(critic, x, y, steps=200, lr=0.05, schedule="cosine")
    >>> bool(4.99 < kantorovich_dual(critic, x, y) < 5.001)
    True

    References
    ----------
    :cite:t:`arjovsky2017`; :cite:t:`anil2019sorting` for constrained critics.
    """
    like = _critic_parameter(critic)
    if not isinstance(critic, nn.Module) or like is None:
        raise TypeError(f"critic must be a torch.nn.Module with parameters, got {critic!r}")
    if not callable(optimizer):
        raise TypeError(f"optimizer must be callable, got {optimizer!r}")
    _check_count("seed", seed, 0)
    _check_fit(steps, lr, schedule, confidence, checkpoint_every, held_out_every)
    sides = [_Side("x", x, x_weights, batch_size), _Side("y", y, y_weights, batch_size)]
    judge = _held_out(held_out, sides, seed)
    if held_out_every is not None and judge is None:
        raise ValueError("held_out must be given with held_out_every, got None")
    run = _Run(critic, optimizer(critic.parameters(), lr=lr), torch.Generator().manual_seed(seed))
    setting = {
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "schedule": schedule,
        "seed": seed,
        "optimizer": type(run.optimizer).__name__,
        "penalty": penalty is not None,
        "project": project is not None,
        "x": sides[0].describe(),
        "y": sides[1].describe(),
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path, setting)

    critic.train()
    for step in _counted(range(len(run.values) + 1, steps + 1), progress):
        if schedule == "cosine":
            for group in run.optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        _ascend(run, [side.batch(run.generator).to(like) for side in sides], sides, penalty)
        if project is not None:
            project(critic)
        last = step == steps
        if judge is not None and (last or (held_out_every and step % held_out_every == 0)):
            run.held_out.append(_judged(critic, judge, step, confidence))
        if path is not None and (last or step % checkpoint_every == 0):
            run.save(path, setting)
    critic.eval()
    return CriticHistory(list(range(1, len(run.values) + 1)), run.values, run.held_out)


def _check_fit(
    steps: int,
    lr: float,
    schedule: str,
    confidence: float,
    checkpoint_every: int,
    held_out_every: int | None,
) -> None:
    _check_count("steps", steps)
    _check_count("checkpoint_every", checkpoint_every)
    if held_out_every is not None:
        _check_count("held_out_every", held_out_every)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be finite and > 0, got {lr}")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f'schedule must be "constant" or "cosine", got {schedule!r}')
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def _ascend(run: _Run, batches: list[Tensor], sides: list[_Side], penalty: Penalty | None) -> None:
    """Take one step on a pair of batches, in one forward pass."""
    if batches[0].shape[1:] != batches[1].shape[1:]:
        raise ValueError(
            f"y must have points of the shape of those of x, {tuple(batches[0].shape[1:])}, "
            f"got {tuple(batches[1].shape[1:])}"
        )
    values = _values(run.critic, torch.cat(batches))
    on_x, on_y = (
        v.mean() if side.weights is None or side.batch_size else v @ side.weights.to(v)
        for v, side in zip(values.split([len(b) for b in batches]), sides, strict=True)
    )
    loss = on_y - on_x
    if penalty is not None:
        loss = loss + penalty(run.critic, batches[0], batches[1], run.generator)
    if not loss.isfinite():
        raise FloatingPointError(
            f"the value is {(on_x - on_y).item():g}, the loss {loss.item():g} "
            f"at step {len(run.values) + 1}: the learning rate may be too large for this critic"
        )
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.values.append((on_x - on_y).item())


@dataclasses.dataclass
class _Side:
    """One of the two distributions of a fit."""

    name: str
    source: Tensor | Sampler
    weights: Tensor | None
    batch_size: int | None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            _check_count("batch_size", self.batch_size)
        if isinstance(self.source, Tensor):
            _check_points(self.name, self.source)
            _check_weights(f"{self.name}_weights", self.weights, self.source)
        elif not callable(self.source):
            raise TypeError(
                f"{self.name} must be a tensor or a sampler(n, generator), "
                f"got {type(self.source).__name__}"
            )
        elif self.batch_size is None:
            raise ValueError(f"batch_size must be given, since {self.name} is a sampler, got None")
        elif self.weights is not None:
            raise ValueError(f"{self.name}_weights must be None, since {self.name} is a sampler")

    def describe(self) -> str:
        if isinstance(self.source, Tensor):
            return f"tensor of shape {tuple(self.source.shape)}"
        return "sampler"

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Ask the sampler for points."""
        points = cast(Sampler, self.source)(number, generator)
        if not isinstance(points, Tensor):
            raise TypeError(f"{self.name} must return a tensor, got {type(points).__name__}")
        if points.dim() < 2 or len(points) != number:
            raise ValueError(
                f"{self.name} must return {number} points, of shape ({number}, ...), "
                f"got {tuple(points.shape)}"
            )
        return points

    def batch(self, generator: torch.Generator) -> Tensor:
        if not isinstance(self.source, Tensor):
            return self.draw(cast(int, self.batch_size), generator)
        if self.batch_size is None:
            return self.source
        if self.weights is None:
            chosen = torch.randint(len(self.source), (self.batch_size,), generator=generator)
        else:
            weights = self.weights.cpu()
            chosen = torch.multinomial(weights, self.batch_size, True, generator=generator)
        return self.source[chosen.to(self.source.device)]


def _held_out(
    held_out: int | tuple[Tensor, Tensor] | None, sides: list[_Side], seed: int
) -> list[Tensor] | None:
    if held_out is None:
        return None
    if isinstance(held_out, int):
        _check_count("held_out", held_out, 2)
        if any(isinstance(side.source, Tensor) for side in sides):
            raise ValueError(
                f"held_out must be a pair of tensors unless x and y are samplers, got {held_out}"
            )
        other = np.random.SeedSequence([seed, 1]).generate_state(1)
        generator = torch.Generator().manual_seed(int(other[0]))
        return [side.draw(held_out, generator) for side in sides]
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be an int or a pair of tensors, got {held_out!r}")
    for points in held_out:
        _check_points("held_out", points)
        if len(points) < 2:
            raise ValueError(f"held_out must have 2 points a side, got {len(points)}")
    return list(held_out)


def _judged(critic: nn.Module, judge: list[Tensor], step: int, confidence: float) -> HeldOut:
    critic.eval()
    try:
        x, y = (_critic_values(critic, points) for points in judge)
    finally:
        critic.train()
    value = (x.mean() - y.mean()).item()
    spread = math.sqrt(x.var().item() / len(x) + y.var().item() / len(y))
    width = NormalDist().inv_cdf((1 + confidence) / 2) * spread
    return HeldOut(step, value, value - width, value + width)


def _counted(steps: range, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from tqdm import tqdm  # noqa: PLC0415 - not needed without a bar

    return tqdm(steps, desc="critic")


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


@dataclasses.dataclass
class _Run:
    """State of a fit: all that a checkpoint holds."""

    critic: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    values: list[float] = dataclasses.field(default_factory=list)
    held_out: list[HeldOut] = dataclasses.field(default_factory=list)

    def save(self, path: Path, setting: dict[str, Any]) -> None:
        """Write to a temporary file and move it, so that ``path`` is always whole."""
        state = {
            "setting": setting,
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "values": self.values,
            "held_out": [tuple(look) for look in self.held_out],
        }
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path, setting: dict[str, Any]) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["setting"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {path} is no checkpoint of fit_critic: {error}"
            ) from error
        wrong = [f"{k} {found.get(k)} not {v}" for k, v in setting.items() if found.get(k) != v]
        if wrong:
            raise ValueError(f"checkpoint {path} is of another run: {', '.join(wrong)}")
        try:
            self.critic.load_state_dict(state["critic"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {path} is of another critic: {error}") from error
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.values = state["values"]
        self.held_out = [HeldOut(*look) for look in state["held_out"]]


# --------------------------------------------------------------------- estimates, to compare


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    projections: int = 100,
    seed: int = 0,
) -> Tensor:
    r"""Sliced Wasserstein distance: mean of W₁ between projections to random lines.

    .. math:: \frac1k \sum_{l=1}^k W_1(\theta_l^\top x,\, \theta_l^\top y), \qquad \theta_l
        \text{ uniform on the unit sphere}

    A Monte Carlo **estimate** of another distance. A projection is 1-Lipschitz, so that each
    summand, and their mean, is at most :math:`W_1(x, y)`; for a translation in :math:`d`
    dimensions it is smaller by a factor of about :math:`\sqrt{\pi d / 2}`.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    projections : int
        Their number :math:`k`.
    seed : int
        Seed of the directions.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in the points.

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if ``projections`` is no positive integer.

    Examples
    --------
    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> y = x + torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    >>> 0 < sliced_wasserstein(x, y).item() < wasserstein1(x, y).item()
    True

    References
    ----------
    :cite:t:`flamary2021`, whose function this is.
    """
    _check_clouds(x, y, x_weights, y_weights)
    _check_count("projections", projections)
    directions = np.random.default_rng(seed).standard_normal((x.shape[1:].numel(), projections))
    directions /= np.linalg.norm(directions, axis=0)
    return ot.sliced_wasserstein_distance(
        x.flatten(1),
        y.flatten(1),
        x_weights,
        y_weights,
        p=1,
        projections=torch.from_numpy(directions).to(x),
    )


def sinkhorn(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    entropy: float,
    steps: int = 1000,
) -> Tensor:
    r"""Cost of the entropic optimal plan, by POT's Sinkhorn iteration in the log domain.

    .. math::
        \langle P_\varepsilon, C\rangle, \qquad P_\varepsilon = \operatorname*{arg\,min}_{P \in
        \Pi(a, b)} \langle P, C\rangle + \varepsilon \sum_{ij} P_{ij} \log P_{ij}, \qquad
        C_{ij} = \lVert x_i - y_j\rVert_2

    An **estimate** of :math:`W_1`: the converged cost is above it by at most
    :math:`\varepsilon \log \min(n, m)`, but after finitely many steps the marginals are off, and
    the cost can be on either side. ``wasserstein1_bracket(method="sinkhorn")`` gives bounds.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    entropy : float
        :math:`\varepsilon > 0`, in the units of the points.
    steps : int
        Most iterations.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in points and weights.

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if ``entropy`` or ``steps`` is not positive.

    Examples
    --------
    >>> x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    >>> sinkhorn(x, y, entropy=0.1)
    tensor(5.)

    References
    ----------
    :cite:t:`peyre2019`, section 4; :cite:t:`flamary2021`, whose function this is.
    """
    _check_clouds(x, y, x_weights, y_weights)
    _check_memory(len(x), len(y), 40)
    _check_count("steps", steps)
    if not 0 < entropy < math.inf:
        raise ValueError(f"entropy must be finite and > 0, got {entropy}")
    weights = [
        torch.full((len(z),), 1 / len(z)).to(z) if w is None else w
        for z, w in ((x, x_weights), (y, y_weights))
    ]
    ends = x.flatten(1), y.flatten(1)
    cost = torch.cdist(*ends, compute_mode="donot_use_mm_for_euclid_dist")
    return ot.sinkhorn2(*weights, cost, entropy, "sinkhorn_log", numItermax=steps, warn=False)
