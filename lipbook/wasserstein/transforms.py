"""The c-transform of a potential, and the feasible dual points that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lipbook._processes import ALONE, Team
from lipbook.wasserstein.clouds import (
    TINY,
    UNIT,
    Cloud,
    check_finite,
    check_points,
    check_tensor,
    common_exponent,
    distances,
    down,
)

__all__ = [
    "CHUNK",
    "c_transform",
    "transform_from_below",
    "two_transforms",
    "cut_into_cells",
    "dual_value",
]

CHUNK = 2**20  # entries of a cost matrix that are in memory at a time
_TILE = 256  # points a side of a tile of the cost matrix and of a block of a coupling


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
    check_points("points", points)
    check_points("at", at)
    if points.shape[1:] != at.shape[1:] or points.dtype != at.dtype:
        raise ValueError(
            f"at must be points like those of points, {tuple(points.shape[1:])} {points.dtype}, "
            f"got {tuple(at.shape[1:])} {at.dtype}"
        )
    check_tensor("potential", potential)
    if potential.shape != points.shape[:1]:
        raise ValueError(
            f"potential must have shape ({len(points)},), one number for each point, "
            f"got {tuple(potential.shape)}"
        )
    check_finite("potential", potential)
    ends = [z.detach().double().flatten(1) for z in (points, at)]
    scale = 2.0 ** -common_exponent(*ends)
    values = transform_from_below(
        ends[1] * scale, ends[0] * scale, potential.detach().double() * scale
    )
    return (values / scale).to(points.dtype)


def transform_from_below(
    at: Tensor,
    points: Tensor,
    potential: Tensor,
    costs: tuple[Tensor, float] | None = None,
    team: Team = ALONE,
) -> Tensor:
    """Bound the c-transform min_i c(at_k, points_i) - potential_i from below, see Note [rounding].

    ``costs`` is what :func:`distances` gives for all of ``at`` and ``points``, if at hand.
    """
    if costs is None and len(at) * len(points) > CHUNK:
        least = _tiled_transform(at, points, potential, team)
    else:
        matrix, error = distances(at, points) if costs is None else costs
        step = max(1, CHUNK // len(points))
        least = torch.cat([_least(rows, error, potential) for rows in matrix.split(step)])
    below = torch.tensor(-math.inf).to(potential)
    least = torch.nextafter(least, below) - math.sqrt(points.shape[1]) * TINY
    return torch.nextafter(least, below)


def _least(matrix: Tensor, error: float, potential: Tensor) -> Tensor:
    return matrix.mul(1 - error - 4 * UNIT).sub_(potential).amin(1)


def _tiled_transform(at: Tensor, points: Tensor, potential: Tensor, team: Team) -> Tensor:
    """Take the minima tile by tile, those first and only that can hold them.

    Between two tiles no distance is below that of their centres less both radii. The margin is
    far above rounding.
    """
    rows, columns = _tiles(at), _tiles(points)
    centres, radii = _balls(points, columns)
    highest = torch.stack([potential[k].max() for k in columns])
    margin = 1e-12 * potential.abs().max()
    infinite = torch.tensor(math.inf).to(potential)

    def of(row: Tensor) -> Tensor:
        centre, radius = _balls(at, [row])
        between = distances(centre, centres)[0][0]
        bounds = between - radius - radii - 1e-9 * (between + radius + radii) - highest - margin
        bounds, order = bounds.sort()
        best, near = infinite.expand(len(row)), at[row]
        for bound, k in zip(bounds.tolist(), order.tolist(), strict=True):
            if bound > best.max():
                break
            part = _least(*distances(near, points[columns[k]]), potential[columns[k]])
            best = torch.minimum(best, part)
        return best

    least = torch.empty(len(at)).to(potential)
    least[torch.cat(rows)] = torch.cat(team.map(of, rows))
    return least


def _tiles(points: Tensor) -> list[Tensor]:
    """Cut a cloud into tiles: of neighbours where that can help, in few dimensions."""
    if points.shape[1] > 16:
        return list(torch.arange(len(points), device=points.device).split(4 * _TILE))
    cells = cut_into_cells(points.cpu().numpy(), np.random.default_rng(0))
    return [torch.from_numpy(cell).to(points.device) for cell in cells]


def _balls(points: Tensor, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Centres (k, d) and radii (k,) of balls around the tiles."""
    centres = torch.stack([points[tile].mean(0) for tile in tiles])
    radii = [distances(c[None], points[t])[0].max() for c, t in zip(centres, tiles, strict=True)]
    return centres, torch.stack(radii)


def cut_into_cells(place: np.ndarray, rng: np.random.Generator) -> Iterable[np.ndarray]:
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


def two_transforms(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    costs: tuple[Tensor, float] | None = None,
    team: Team = ALONE,
) -> tuple[Tensor, Tensor]:
    """Make a feasible pair of a potential on x by two c-transforms."""
    flipped = None if costs is None else (costs[0].mT, costs[1])
    g = transform_from_below(y, x, f - f.mean(), flipped, team)
    return transform_from_below(x, y, g, costs, team), g


def dual_value(cloud: Cloud, potential: Tensor) -> float:
    """Mean of the potential over the cloud, rounded down."""
    products = cloud.mass * potential.cpu().numpy()
    mean = math.fsum(products) / cloud.total
    size = math.fsum(np.abs(products)) / cloud.total + 1e-300
    return down(mean - 16 * UNIT * size)
