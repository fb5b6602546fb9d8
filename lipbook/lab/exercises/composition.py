"""Exercises of chapter 3, Lipschitz composition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound
from lipbook.lab.exercises.registry import exercise
from lipbook.norms import circular_convolution_norm, operator_norm

__all__: list[str] = []  # answers are asked for by their numbers


def _matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@exercise(
    "3.1",
    level=1,
    kind="warm-up",
    mistakes={
        "rows and columns exchanged": [9.0, math.sqrt(45), 7.0],
        "the Frobenius norm": [7.0, math.sqrt(50), 9.0],
        "the square of the spectral norm": [7.0, 45.0, 9.0],
        "the largest eigenvalue": [7.0, 5.0, 9.0],
    },
)
def three_norms() -> list[float]:
    matrix = _matrix([3, 0], [4, 5])
    return [operator_norm(matrix, p).item() for p in (1, 2, math.inf)]


@exercise(
    "3.2",
    level=1,
    kind="compute",
    mistakes={
        "the largest deviation": 2.0,
        "multiplied by the deviation": 0.5,
        "the mean over the channels": 11 / 3,
        "the norm of all factors": math.sqrt(45),
    },
)
def normalised_input() -> Tensor:
    deviations = torch.tensor([0.25, 0.2, 0.5], dtype=torch.float64)
    return operator_norm(torch.diag(1 / deviations))


@exercise(
    "3.3",
    level=1,
    kind="compute",
    mistakes={
        "the same with and without overlap": [1 / 3, 1 / 3],
        "nine times as much": [1 / 3, 3.0],
        "the largest weight": [1 / 9, 1 / 9],
    },
)
def means() -> list[float]:
    kernel = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    apart = lipschitz_bound(nn.AvgPool2d(3), (1, 9, 9)).value
    return [apart, circular_convolution_norm(kernel, 9).item()]


@exercise(
    "3.4",
    level=1,
    kind="derive",
    mistakes={"without the root": 784.0, "the other direction": 1.0, "the inverse": 1 / 28},
)
def between_norms() -> Tensor:
    gradient = nn.functional.normalize(torch.ones(28 * 28, dtype=torch.float64), dim=0)
    return gradient.norm(1)


@exercise(
    "3.5",
    level=2,
    kind="compute",
    mistakes={
        "the product bound": [4.0, 4.0, 4.0],
        "the entry in the corner": [4.0, 4 / math.sqrt(2), 0.0],
        "degrees in place of radians": [4.0, 2.38861, 2.14621],
    },
)
def turned() -> list[float]:
    stretch, norms = _matrix([2, 0], [0, 0.5]), []
    for angle in (0, math.pi / 4, math.pi / 2):
        c, s = math.cos(angle), math.sin(angle)
        norms.append(operator_norm(stretch @ _matrix([c, -s], [s, c]) @ stretch).item())
    return norms


@exercise(
    "3.6",
    level=2,
    kind="derive",
    mistakes={"the product bound": 1.0, "the norm of one unit": math.sqrt(0.5)},
)
def best_modulus() -> Tensor:
    row = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    return row.abs() @ row.relu()  # at x = 1


@exercise(
    "3.7",
    level=2,
    kind="derive",
    mistakes={"half of a turn": math.pi, "the length of the path": 2 * math.pi * 1.5},
)
def slit() -> float:
    return math.atan2(0.0, -1.0) - math.atan2(-0.0, -1.0)


def _no_residual(answer: Any) -> str | None:
    if not callable(answer):
        return f"Expected a function, got {type(answer).__name__}."
    x, y = torch.randn(2, 2000, 3)
    try:
        with torch.no_grad():
            at_x, at_y = answer(x), answer(y)
    except Exception as error:
        return f"Your function raises {type(error).__name__}: {error}"
    if not isinstance(at_x, Tensor) or at_x.shape != x.shape:
        return "Expected a function whose outputs have the shape of its inputs."
    steps = (x - y).norm(dim=1)
    if ((x + at_x - y - at_y).norm(dim=1) / steps).max() > 1 + 1e-6:
        return "x + g(x) stretches some of the chords that were tried."
    signs = torch.tensor(list(itertools.product((-2.0, 2.0), repeat=3)))
    steepest = [(answer(s + 1e-3 * s) - answer(s)).norm() / (1e-3 * s).norm() for s in signs]
    if max(steepest) < 1.99:
        return "With this g the rule does not say 3: g is too flat."
    return None


@exercise("3.8", level=2, kind="compute", complaint=_no_residual)
def silent_residual() -> Callable[[Tensor], Tensor]:
    return lambda x: -2 * x.relu()


A = _matrix([1, 2, 0], [0, 1, 2], [2, 0, 1])
C = _matrix([1, -1, 1], [1, 1, -1])


def _steepest(*values: float) -> float:
    masks = itertools.product(values, repeat=3)
    return max(operator_norm((C * torch.tensor(mask)) @ A).item() for mask in masks)


@exercise(
    "3.9",
    level=2,
    kind="change the experiment",
    mistakes={
        "the product bound": [operator_norm(C).item() * operator_norm(A).item()] * 2,
        "no mask": [operator_norm(C @ A).item()] * 2,
        "the masks of ReLU for both": [_steepest(0, 1)] * 2,
    },
)
def other_masks() -> list[float]:
    return [_steepest(0.0, 1.0), _steepest(-1.0, 1.0)]


@exercise(
    "3.10",
    level=3,
    kind="derive",
    mistakes={
        "the product bound": operator_norm(C).item() * operator_norm(A).item(),
        "the norm of the product": operator_norm(C @ A).item(),
        "the exact constant": _steepest(0, 1),
    },
)
def half_linear() -> Tensor:
    return (operator_norm(C @ A) + operator_norm(C) * operator_norm(A)) / 2
