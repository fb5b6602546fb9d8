"""Point clouds: their checks, their scale, and the distances between their points."""

from __future__ import annotations

import math
import os
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "UNIT",
    "TINY",
    "Cloud",
    "Pair",
    "check_clouds",
    "checked_pair",
    "check_tensor",
    "check_finite",
    "check_points",
    "check_weights",
    "check_count",
    "common_exponent",
    "down",
    "up",
    "check_memory",
    "distances",
    "pair_distances",
]

UNIT = 2.0**-53  # unit roundoff of float64

# Note [rounding]
# A bound must survive float64. Points are scaled by a power of two so that no square overflows;
# distances come with a relative error bound (distances), sums are those of math.fsum, and each
# further operation is moved outward by at least its own error. The potentials are float64 numbers
# and feasible as such: f(i) + g(j) <= c(i, j) for the real distance c of the given points. TINY
# is far above what underflow of squares can do to a distance, in units where the largest
# coordinate is about 1.
TINY = 2.0**-500


class Cloud(NamedTuple):
    """A checked weighted cloud, without the points of weight zero."""

    points: Tensor  # (k, d) float64, scaled
    zero: Tensor  # (size - k, d), those of weight zero
    mass: np.ndarray  # (k,) positive float64, not normalised
    total: float  # sum of the masses, up to half an ulp
    support: Tensor  # (k,) indices into the given points
    size: int  # number of the given points


class Pair(NamedTuple):
    """Two checked clouds in the same units."""

    x: Cloud
    y: Cloud
    exponent: int  # points were multiplied by 2**-exponent,
    exact: bool  # without loss
    integer: bool  # masses are integers with equal totals below 2**53


def check_clouds(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> None:
    """Refuse two clouds that are none, or do not fit each other."""
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
    check_points("x", x)
    check_points("y", y)
    check_weights("x_weights", x_weights, x)
    check_weights("y_weights", y_weights, y)


def checked_pair(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> Pair:
    """Check two clouds and bring them to float64, scale 1 and positive masses."""
    check_clouds(x, y, x_weights, y_weights)
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    points = [z.detach().to(device, torch.float64).flatten(1) for z in (x, y)]
    exponent = common_exponent(*points)
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
        clouds.append(Cloud(*parts, mass, math.fsum(mass), support, len(z)))
    integer = x_weights is None and y_weights is None and clouds[0].total < 2**53
    return Pair(clouds[0], clouds[1], exponent, exact, integer)


def check_points(name: str, points: Tensor) -> None:
    """Refuse what is no cloud of finite points."""
    _check_kind(name, points)
    check_finite(name, points)


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor. ``name`` may end with the verb: "critic must return"."""
    if not isinstance(value, Tensor):
        demand = name if " must " in name else f"{name} must be"
        hint = ": torch.from_numpy makes a tensor of it" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{demand} a tensor, got {type(value).__name__}{hint}")


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinite entries, and name the first."""
    wrong = ~values.isfinite()
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {values[tuple(index)].item():g} at {index}")


def _check_kind(name: str, points: Tensor) -> None:
    check_tensor(name, points)
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {points.dtype}")
    if points.dim() < 2 or 0 in points.shape:
        hint = f": use {name}[:, None] for points on a line" if points.dim() == 1 else ""
        raise ValueError(
            f"{name} must have shape (n, d) with n, d >= 1, got {tuple(points.shape)}{hint}"
        )


def check_weights(name: str, weights: Tensor | None, points: Tensor) -> None:
    """Refuse what are no masses of the points with sum 1."""
    if weights is None:
        return
    check_tensor(name, weights)
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {weights.dtype}")
    if weights.shape != points.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(points)},), one for each point, "
            f"got {tuple(weights.shape)}"
        )
    check_finite(name, weights)
    if (weights < 0).any():
        raise ValueError(f"{name} must be >= 0, got {weights.min().item():g}")
    total = math.fsum(weights.detach().cpu().double().tolist())
    if abs(total - 1) > 16 * math.sqrt(len(weights)) * torch.finfo(weights.dtype).eps:
        hint = "divide by the sum" if total else "all of them are 0"
        raise ValueError(f"{name} must sum to 1, got {total:.9g}: {hint}")


def check_count(name: str, value: int, least: int = 1) -> int:
    """Give an integer, Python's or NumPy's, as Python's; refuse others and what is too small."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def common_exponent(*points: Tensor) -> int:
    """Exponent e such that 2**-e times the largest coordinate is in [1/2, 1)."""
    largest = max(z.abs().max().item() for z in points)
    return min(max(math.frexp(largest)[1], -1000), 1000) if largest else 0


def down(value: float) -> float:
    """Give the next smaller number."""
    return math.nextafter(value, -math.inf)


def up(value: float) -> float:
    """Give the next larger number."""
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


def check_memory(rows: int, columns: int, size: int) -> None:
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


def distances(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Distance matrix (n, m), and a bound of the relative error of its entries."""
    d = x.shape[1]
    if d <= 32:
        matrix = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return matrix, (d + 4) * UNIT
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
    return matrix, 64 * (d + 8) * UNIT


def pair_distances(x: Tensor, y: Tensor, i: np.ndarray, j: np.ndarray) -> np.ndarray:
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
