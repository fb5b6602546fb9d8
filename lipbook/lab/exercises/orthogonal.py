"""Exercises of chapter 5, Orthogonal linear layers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lipbook.lab.exercises.registry import exercise
from lipbook.orthogonal import polar, project_l1_ball, qr

__all__: list[str] = []  # answers are asked for by their numbers


def _matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _jacobian(at: Tensor) -> Tensor:
    jacobian: Tensor = torch.func.jacrev(polar)(at)
    return jacobian.reshape(at.numel(), at.numel())


@exercise(
    "5.1",
    level=1,
    kind="warm-up",
    mistakes={
        "QR": [[0.6, -0.8], [0.8, 0.6]],
        "not divided": [[4.0, -2.0], [2.0, 4.0]],
        "the reflection": np.array([[-1.0, 2.0], [2.0, 1.0]]) / math.sqrt(5),
    },
)
def nearest_rotation() -> Tensor:
    return polar(_matrix([3, 0], [4, 5]))


@exercise(
    "5.2",
    level=1,
    kind="warm-up",
    mistakes={
        "the signs are lost": [0.0, 0.9, 0.1, 0.0],
        "divided by the norm": np.array([0.5, -2.0, 1.2, 0.1]) / 3.8,
        "k = 1": [0.0, -1.0, 0.0, 0.0],
        "k = 3": [0.0, -1.1, 0.3, 0.0],
    },
)
def on_the_ball() -> Tensor:
    return project_l1_ball(_matrix([0.5, -2.0, 1.2, 0.1]))[0]


def _raised(sigma: float, order: int) -> float:
    terms = [math.comb(2 * j, j) / 4**j * (1 - sigma**2) ** j for j in range(order + 1)]
    return sigma * math.fsum(terms)


@exercise(
    "5.3",
    level=1,
    kind="warm-up",
    mistakes={
        "the factor 3/2": [0.75, 1.125, 0.9375],
        "only the last term of order 2": [0.6875, 0.86877, 0.10547],
        "twice order 2": [0.6875, 0.86877, 0.94764],
    },
)
def two_steps() -> list[float]:
    one = _raised(0.5, 1)
    return [one, _raised(one, 1), _raised(0.5, 2)]


@exercise(
    "5.4",
    level=1,
    kind="derive",
    mistakes={
        "all equations, also below the diagonal": [6, 0],
        "without the lengths of the columns": [12, 6],
        "all entries": [15, 9],
    },
)
def directions() -> list[int]:
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(m, 3, generator=draw, dtype=torch.float64) for m in (5, 3)]
    return [int(torch.linalg.matrix_rank(_jacobian(start), rtol=1e-9)) for start in starts]


@exercise(
    "5.5",
    level=2,
    kind="compute",
    mistakes={
        "the squares": [0.753468, 1.597009],
        "largest first": [1.263728, 0.868025],
    },
)
def fixed_points() -> list[float]:
    a, b, c = 3.4445, -4.775, 2.0315
    squares = np.roots([c, b, a - 1])
    return sorted(math.sqrt(square) for square in squares)


def _slope(beta: float) -> float:
    one = torch.ones((), dtype=torch.float64)
    slope: Tensor = torch.func.grad(lambda s: (1 + beta) * s - beta * s**3)(one)
    return slope.item()


@exercise(
    "5.6",
    level=2,
    kind="derive",
    mistakes={
        "exchanged": [0.5, 1.0],
        "the gradient of the norm without 1/4": [0.25, 0.125],
        "the slope 0 for both": [0.5, 0.5],
    },
)
def attracting() -> list[float]:
    at_0, at_1 = _slope(0), _slope(1)  # the slope is affine in beta
    return [(wanted - at_0) / (at_1 - at_0) for wanted in (-1, 0)]


@exercise(
    "5.7",
    level=2,
    kind="compute",
    mistakes={
        "without the 2": [1 / 0.11, 1 / 1.01, 1 / 1.1],
        "the squares": [(2 / s) ** 2 for s in (0.11, 1.01, 1.1)],
        "single singular values": [100.0, 10.0, 1.0],
    },
)
def gains() -> Tensor:
    at = torch.diag(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64))
    return torch.linalg.svdvals(_jacobian(at))[:3]


@exercise("5.8", level=2, kind="derive")
def silent_columns() -> set[int]:
    draw = torch.Generator().manual_seed(0)
    raw, slope = torch.randn(2, 5, 5, generator=draw, dtype=torch.float64)
    raw.requires_grad_()
    (gradient,) = torch.autograd.grad((qr(raw) * slope).sum(), raw)
    silent = gradient.norm(dim=0) < 1e-12
    return {column + 1 for column in range(5) if silent[column]}


@exercise(
    "5.9",
    level=2,
    kind="change the experiment",
    mistakes={
        "it arrives": 0.0,
        "the norm, not squared": math.sqrt(32),
        "the distance of the components": 4.0,
    },
)
def opposite() -> Tensor:
    weight = torch.eye(8, dtype=torch.float64)
    slope = 2 * (weight + torch.eye(8))  # of the loss, and symmetric: no step along the rotations
    weight = torch.linalg.matrix_exp(slope.T - slope) @ weight
    return (weight + torch.eye(8)).square().sum()


@exercise(
    "5.10",
    level=3,
    kind="compute",
    mistakes={
        "the widths that were there": [3, 3],
        "added to the layer before only": [5, 6],
        "without the input": [3, 6],
    },
)
def widths() -> list[int]:
    narrow = [2, 3, 3]
    return [sum(narrow[: layer + 1]) for layer in (1, 2)]
