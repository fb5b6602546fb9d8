"""The exact distance: optimal plans by POT's network simplex, on the line by sorting."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipbook.wasserstein.clouds import (
    TINY,
    UNIT,
    Pair,
    check_memory,
    checked_pair,
    distances,
    pair_distances,
    up,
)
from lipbook.wasserstein.transforms import transform_from_below

__all__ = [
    "wasserstein1",
    "Plan",
    "northwest",
    "network_simplex",
    "solve_on_the_line",
    "plan_value",
]


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
    pair = checked_pair(x, y, x_weights, y_weights)
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
            slope = transform_from_below(
                points, other.points, torch.from_numpy(potential).to(points)
            )
            slope = (slope - slope.mean()).to(weights.device)
            value = value + (weights - weights.detach()).double() @ slope
    return (value * 2.0**pair.exponent).to(x.dtype)


def _solve_exactly(pair: Pair) -> tuple[Plan, np.ndarray, np.ndarray]:
    x, y = pair.x, pair.y
    if x.points.shape[1] == 1:
        return solve_on_the_line(pair)
    check_memory(len(x.mass), len(y.mass), 50)
    costs = distances(x.points, y.points)[0]
    return network_simplex(costs, x.mass, y.mass * (x.total / y.total))


class Plan(NamedTuple):
    """A coupling of the points in the supports, as a list of moves."""

    i: np.ndarray  # (k,)
    j: np.ndarray  # (k,)
    mass: np.ndarray  # (k,), >= 0, in the units of x.mass


def northwest(a: np.ndarray, b: np.ndarray) -> Plan:
    """North-west corner rule: fill up the points of y in their order, those of x in theirs."""
    ends_a, ends_b = np.cumsum(a), np.cumsum(b)
    ends_b = ends_b * (ends_a[-1] / ends_b[-1])
    ends = np.sort(np.concatenate((ends_a, ends_b)), kind="stable")
    mass = np.diff(ends, prepend=0.0)
    keep = mass > 0
    middle = ends[keep] - mass[keep] / 2
    i = np.searchsorted(ends_a[:-1], middle, side="right")
    j = np.searchsorted(ends_b[:-1], middle, side="right")
    return Plan(i, j, mass[keep])


def network_simplex(
    cost: Tensor, a: np.ndarray, b: np.ndarray
) -> tuple[Plan, np.ndarray, np.ndarray]:
    """POT's exact solver: an optimal plan, and potentials f + g <= cost up to rounding."""
    import ot  # noqa: PLC0415 - takes a second, which only its users wait for

    scale = cost.max().item() or 1.0  # since POT compares costs with an absolute tolerance
    matrix = (cost / scale).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the status is checked below
        plan, log = ot.emd(a, b, matrix, numItermax=10**9, log=True, center_dual=False)
    if log["warning"] is not None:
        raise RuntimeError(f"ot.emd found no optimal plan: {log['warning']}")
    i, j = np.nonzero(plan > 0)
    return Plan(i, j, plan[i, j]), scale * log["u"], scale * log["v"]


def solve_on_the_line(pair: Pair) -> tuple[Plan, np.ndarray, np.ndarray]:
    r"""Optimal plan and potentials on the line, by sorting.

    The plan is the monotone coupling. The potentials f and -f are those of the function whose
    slope is the sign of G - F, the difference of the distribution functions. Its values are
    multiples of a quantum, and add up without rounding: f is 1-Lipschitz as a list of numbers.
    """
    x, y = pair.x, pair.y
    points_x, points_y = x.points[:, 0].cpu().numpy(), y.points[:, 0].cpu().numpy()
    order_x, order_y = np.argsort(points_x, kind="stable"), np.argsort(points_y, kind="stable")
    mass_y = y.mass * (x.total / y.total)
    plan = northwest(x.mass[order_x], mass_y[order_y])
    plan = Plan(order_x[plan.i], order_y[plan.j], plan.mass)

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


def plan_value(pair: Pair, plan: Plan, costs: tuple[Tensor, float] | None = None) -> float:
    r"""Upper bound of the cost of a coupling that is next to a plan, scaled.

    Cut the rows of the plan and then its columns to the masses that they must have, and couple
    what is missing arbitrarily: that moves at most the sum of the positive parts of
    mass - row sum and of column sum - mass, each at most over the diameter.
    """
    (x, y), d = (pair.x, pair.y), pair.x.points.shape[1]
    if costs is None:
        each, error = pair_distances(x.points, y.points, plan.i, plan.j), (d + 8) * UNIT
    else:
        i, j = (torch.from_numpy(k).to(x.points.device) for k in (plan.i, plan.j))
        each, error = costs[0][i, j].cpu().numpy(), costs[1]
    each *= 1 + error + 8 * UNIT
    if costs is not None or not pair.exact:
        each += math.sqrt(d) * TINY
    cost = math.fsum(plan.mass * each) * (1 + 8 * UNIT)
    rows = np.bincount(plan.i, plan.mass, len(x.mass))
    columns = np.bincount(plan.j, plan.mass, len(y.mass))
    astray = math.fsum(np.maximum(x.mass - rows, 0))
    astray += math.fsum(np.maximum(columns - y.mass * (x.total / y.total), 0))
    if not (pair.integer and np.array_equal(plan.mass, np.floor(plan.mass))):
        terms = np.bincount(plan.i).max() + np.bincount(plan.j).max()
        astray += 2 * (terms + 8) * UNIT * x.total
    corners = torch.cat((x.points, y.points))
    extent = (corners.amax(0) - corners.amin(0)).cpu().numpy()
    diameter = math.sqrt(math.fsum(extent**2)) * (1 + 16 * UNIT) + math.sqrt(d) * TINY
    total = (cost + astray * diameter) / x.total * (1 + 8 * UNIT)
    return up(total) if total else 0.0
