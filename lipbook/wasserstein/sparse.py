"""Candidates: the few pairs of points that matter, and Sinkhorn's iteration on them alone."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipbook._processes import ALONE, Team
from lipbook.errors import _check_arithmetic
from lipbook.wasserstein.clouds import TINY, UNIT

__all__ = [
    "Filter",
    "Graph",
    "filter_of",
    "fine_enough",
    "nearest",
    "transform_with_candidates",
    "scale_on_graph",
    "seconds_of_a_round",
]

NEAREST = 16  # candidates of each point among all,
THINNED = (4, 16, 64)  # and FEW among each of these parts of them
FEW = 8
_CHECKED = 8  # candidates whose distance is taken in float64
_ENTRIES = 2**18  # of a cost matrix, in memory at a time

# Note [candidates]
# min_j c(z, y_j) - g_j over all j needs all distances, but only roughly: a lower bound of each, by
# ‖z‖² + ‖y‖² - 2zᵀy in float32, rules out all but a few, and these are taken by differences in
# float64. With the norms multiplied by 1 - 2e, e = 1.1 (d + 16) units of float32, the expression
# is below ‖z - y‖²: points rounded to float32 and the d + 3 additions err by at most
# (2d + 13)(‖z‖² + ‖y‖²) units. Where torch may take products in another precision, and beyond 2^18
# dimensions, all is done in float64.
#
# The k smallest of the bounds lie in the k groups of points with the smallest minima, since every
# other group has k entries below it. So only minima are taken of all entries. Groups are random:
# the minima of the first few are those of a random part of the cloud. The candidates that they
# give reach further, by the factor by which the part is thinner.


class Filter(NamedTuple):
    """A cloud, and what bounds distances from it from below."""

    points: Tensor  # (n, d) float64
    rough: Tensor  # (n, d), centred
    norms: Tensor  # (n,), squared and too small
    order: Tensor  # (groups * size,), random, the first points again at its end
    groups: int
    in_order: Tensor  # (d, groups * size), rough
    norms_in_order: Tensor


class Graph(NamedTuple):
    """Pairs of points, sorted by i and then j, and what each of them costs."""

    i: np.ndarray
    j: np.ndarray
    cost: np.ndarray
    shape: tuple[int, int]


def filter_of(points: Tensor, centre: Tensor, rng: np.random.Generator) -> Filter:
    """Prepare a cloud for passes over all pairs."""
    n, d = points.shape
    size = max(1, min(64, math.isqrt(n // NEAREST)))
    groups = -(-n // size)
    order = torch.from_numpy(np.resize(rng.permutation(n), groups * size)).to(points.device)
    dtype = torch.float32
    try:
        _check_arithmetic(points.float())
    except ValueError:
        dtype = torch.float64
    if d > 2**18:
        dtype = torch.float64
    return _filter(points, points - centre, order, groups, dtype)


def _filter(
    points: Tensor, centred: Tensor, order: Tensor, groups: int, dtype: torch.dtype
) -> Filter:
    d = points.shape[1]
    norms = (centred.square().sum(1) * (1 - _slack(d, dtype)) - d * 1e-36).to(dtype)
    rough = centred.to(dtype)
    return Filter(points, rough, norms, order, groups, rough[order].mT.contiguous(), norms[order])


def _slack(d: int, dtype: torch.dtype) -> float:
    return 2.2 * (d + 16) * torch.finfo(dtype).eps / 2


def fine_enough(side: Filter, centre: Tensor, error: float, distance: float) -> Filter:
    """Give the same filter, in float64 if float32 errs by more at a distance of this size."""
    dtype = side.rough.dtype
    squares = side.norms.double().mean().item()
    if dtype == torch.float64 or _slack(side.points.shape[1], dtype) * squares <= error * distance:
        return side
    return _filter(side.points, side.points - centre, side.order, side.groups, torch.float64)


def nearest(
    at: Filter, cloud: Filter, potential: Tensor, team: Team = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the smallest lower bounds of c(at_k, points_i) - potential_i, some rows at a time.

    Returns their values (k, NEAREST) in ascending order, their indices i, and the indices of
    candidates further away.
    """
    groups, dtype = cloud.groups, cloud.rough.dtype
    size, count = len(cloud.order) // groups, min(NEAREST, groups)
    offset = potential.to(dtype)[cloud.order]

    def of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounds = torch.addmm(cloud.norms_in_order, at.rough[rows], cloud.in_order, alpha=-2)
        bounds.add_(at.norms[rows, None]).clamp_(min=0).sqrt_().sub_(offset)
        table = bounds.view(len(rows), groups, size)
        minima = table.amin(2)
        best = minima.topk(count, 1, largest=False)[1]
        entries = _members(table, best).flatten(1)
        values, place = entries.topk(count, 1, largest=False)
        near = best.gather(1, place // size) * size + place % size
        far = [near[:, :0]]
        for thinner in THINNED:
            if groups // thinner < FEW:
                break
            some = minima[:, : groups // thinner].topk(FEW, 1, largest=False)[1]
            far.append(some * size + _members(table, some).argmin(2))
        return values, cloud.order[near], cloud.order[torch.cat(far, 1)]

    rows = torch.arange(len(at.rough), device=offset.device)
    parts = team.map(of, rows.split(max(8, _ENTRIES // len(offset))))
    values, near, far_away = (torch.cat(column) for column in zip(*parts, strict=True))
    return values, near, far_away


def _members(table: Tensor, groups: Tensor) -> Tensor:
    return table.gather(1, groups[:, :, None].expand(-1, -1, table.shape[2]))


def transform_with_candidates(
    at: Filter, cloud: Filter, potential: Tensor, team: Team = ALONE
) -> tuple[Tensor, Tensor]:
    """Bound the c-transform from below, see Note [candidates]; give all candidates (k, ...)."""
    values, near, far = nearest(at, cloud, potential, team)
    n, d = cloud.points.shape
    count = near.shape[1] if near.shape[1] == n else min(_CHECKED, near.shape[1] - 1)
    least = torch.empty(len(near), dtype=torch.float64, device=near.device)
    for rows in torch.arange(len(near), device=near.device).split(max(1, 2**20 // (d * count))):
        chosen = near[rows, :count]
        each = (at.points[rows, None] - cloud.points[chosen]).square_().sum(2).sqrt_()
        least[rows] = each.mul_(1 - (d + 16) * UNIT).sub_(potential[chosen]).amin(1)
    if count < n:
        beyond = values[:, count].double()
        error = 2 * torch.finfo(values.dtype).eps * (beyond.abs() + potential.abs().max())
        least = torch.minimum(least, beyond - error)
    below = torch.tensor(-math.inf).to(potential)
    least = torch.nextafter(least, below) - math.sqrt(d) * TINY
    return torch.nextafter(least, below), torch.cat((near, far), 1)


def scale_on_graph(
    graph: Graph,
    masses: tuple[np.ndarray, np.ndarray],
    potentials: tuple[np.ndarray, np.ndarray],
    entropy: float,
    enough: float,
    steps: int = 200,
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, float]:
    """Sinkhorn's iteration with the pairs of a graph: potentials, masses of the pairs, astray.

    It is over-relaxed by 1.5 once a step changes no factor by more than 4, and starts again from
    the potentials it has come to before factors leave float32.
    """
    from scipy import sparse  # noqa: PLC0415 - slow to import

    i, j, cost, shape = graph
    (f, g), (a, b) = potentials, (mass.astype(np.float32) for mass in masses)
    by_column = np.argsort(j, kind="stable")
    starts = np.searchsorted(i, np.arange(shape[0] + 1))
    column_starts = np.searchsorted(j[by_column], np.arange(shape[1] + 1))
    columns, rows = j.astype(np.int32), i[by_column].astype(np.int32)

    def kernel() -> tuple[Any, ...]:
        exponent = (f[i] + g[j] - cost) / entropy
        u = -np.maximum.reduceat(exponent, starts[:-1])
        exponent += u[i]
        v = -np.maximum.reduceat(exponent[by_column], column_starts[:-1])
        exponent += v[j]
        entries = np.exp(np.maximum(exponent, -80)).astype(np.float32)
        return (
            f + entropy * u,
            g + entropy * v,
            entries,
            sparse.csr_matrix((entries, columns, starts), shape),
            sparse.csr_matrix((entries[by_column], rows, column_starts), shape[::-1]),
            np.ones(shape[0], np.float32),
            np.ones(shape[1], np.float32),
        )

    f, g, entries, matrix, transposed, u, v = kernel()
    astray = math.inf
    for _ in range(steps):
        change = 1 / (transposed @ (u * a) * v)
        largest = max(change.max(), 1 / change.min())
        v = v * change ** (1.5 if largest < 4 else 1)
        change = 1 / (matrix @ (v * b) * u)
        largest = max(largest, change.max(), 1 / change.min())
        astray = float(np.abs(a * (1 / change - 1)).sum()) / 2
        u = u * change ** (1.5 if largest < 4 else 1)
        if astray <= enough:
            break
        if max(u.max(), v.max(), 1 / u.min(), 1 / v.min()) > 1e12:
            f, g = f + entropy * np.log(u.astype(float)), g + entropy * np.log(v.astype(float))
            f, g, entries, matrix, transposed, u, v = kernel()
    mass = (entries * (u * a)[i] * (v * b)[j]).astype(float)
    f, g = f + entropy * np.log(u.astype(float)), g + entropy * np.log(v.astype(float))
    return (f, g), mass, astray


def seconds_of_a_round(x: Filter, y: Filter) -> float:
    """Estimate the time of two passes over all pairs by a few of their rows."""
    total = 0.0
    for at, cloud in ((x, y), (y, x)):
        count = min(len(at.points), 256)
        some = at._replace(points=at.points[:count], rough=at.rough[:count])
        begin = time.perf_counter()
        transform_with_candidates(some, cloud, torch.zeros_like(cloud.points[:, 0]))
        total += (time.perf_counter() - begin) * len(at.points) / count
    return total
