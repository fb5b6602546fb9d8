"""Exercises of chapter 4, Activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.activations import GroupSort, full_sort, max_min
from lipbook.jacobians import jacobian
from lipbook.lab.exercises.registry import exercise

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "4.1",
    level=1,
    kind="warm-up",
    mistakes={
        "one group of six": torch.eye(6)[[1, 2, 0, 3, 5, 4]].flip(0),
        "the transpose": torch.eye(6)[[1, 2, 0, 3, 5, 4]].T,
        "in descending order": torch.eye(6)[[0, 2, 1, 4, 5, 3]],
    },
)
def sorted_groups() -> Tensor:
    x = torch.tensor([[3.0, 1.0, 2.0, 4.0, 6.0, 5.0]], dtype=torch.float64)
    return jacobian(GroupSort(3), x)[0]


@exercise(
    "4.2",
    level=1,
    kind="warm-up",
    mistakes={
        "the mean of the square": [2.0**-10, 0.5],
        "a sum in place of a product": [10 * math.sqrt(0.5), math.sqrt(0.5)],
        "the others give it back": [1 / 32, 1.0],
    },
)
def leaks() -> list[float]:
    return [math.prod([math.sqrt(0.5)] * 10), math.sqrt(0.5)]


def _ceiling(weights: int) -> float:
    odd = weights % 2
    return math.sqrt((weights - 1) / (weights + 3)) if odd else weights / (weights + 2)


@exercise(
    "4.3",
    level=1,
    kind="compute",
    mistakes={"odd numbers only": [39, 2], "hidden layers": [37, 1], "one weight": [38, 1]},
)
def depth_for_a_slope() -> list[int]:
    return [next(weights for weights in itertools.count(2) if _ceiling(weights) >= 0.95), 2]


@exercise("4.4", level=2, kind="derive", at=lambda: [(torch.randn(8, 4),) for _ in range(3)])
def four_by_pairs() -> Callable[[Tensor], Tensor]:
    return full_sort


def _layers(answer: Any) -> list[tuple[Tensor, Tensor]]:
    layers = [[torch.as_tensor(part).detach().double() for part in pair] for pair in answer]
    if [len(layer) for layer in layers] != [2, 2, 2]:
        raise ValueError
    return [(weight, bias) for weight, bias in layers]


def _no_letter(answer: Any) -> str | None:
    try:
        layers = _layers(answer)
    except (TypeError, ValueError):
        return "Expected a list of three pairs (W, b) of nested lists or tensors."
    norms = [torch.linalg.svdvals(weight).max().item() for weight, _ in layers if weight.ndim == 2]
    if len(norms) < 3 or max(norms) > 1 + 1e-6:
        return (
            f"Expected three matrices of norm at most 1, got {[round(norm, 4) for norm in norms]}."
        )
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    (first, a), (second, b), (third, c) = layers
    try:
        found = max_min(max_min(x @ first.T + a) @ second.T + b) @ third.T + c
        errors = (found - (x.abs() - 1).abs()).abs().reshape(61)
    except (RuntimeError, ValueError) as error:
        return f"The shapes do not fit: {error}"
    wrong = int((errors > 1e-3).sum())
    return f"It is wrong at {wrong} of 61 points of [-3, 3]." if wrong else None


@exercise("4.6", level=2, kind="derive", complaint=_no_letter)
def letter() -> list[tuple[list[list[float]], list[float]]]:
    s = math.sqrt(0.5)
    return [
        ([[s], [-s]], [0.0, 0.0]),
        ([[-0.5, 0.5], [0.5, -0.5]], [-s, s]),
        ([[-s, s]], [0.0]),
    ]


@exercise(
    "4.8",
    level=2,
    kind="change the experiment",
    mistakes={
        "the ceiling of ReLU": 0.5,
        "what is left of a gradient on average": 0.75,
        "the fold": 1.0,
    },
)
def leaky_ceiling() -> Tensor:
    s = math.sqrt(0.5)
    first, last = torch.tensor([[s], [-s]]), torch.tensor([s, s])
    ends, middle = torch.tensor([[-1.0], [1.0]]), torch.zeros(1, 1)
    values = [nn.functional.leaky_relu(x @ first.T, 0.5) @ last for x in (ends, middle)]
    return values[0].mean() - values[1].mean()


@exercise(
    "4.9",
    level=3,
    kind="compute",
    mistakes={
        "not divided by the norm": [2.0, 1.0, 1.0],
        "without the active unit": [0.0, math.sqrt(0.5), math.sqrt(0.5)],
        "all alike": [math.sqrt(1 / 3)] * 3,
    },
)
def last_row() -> Tensor:
    first = torch.tensor([[1.0], [-1.0]]) / math.sqrt(2)
    second = torch.tensor([[2.0, 2.0], [2.0, -1.0], [-1.0, 2.0]]) / 3
    ends = torch.tensor([[1.0], [-1.0]])
    hidden = ((ends @ first.T).relu() @ second.T).relu()  # (2, 3)
    return torch.linalg.lstsq(hidden, ends.abs() / math.sqrt(3), driver="gelsd").solution[:, 0]
