"""Exercises of chapter 8, Provable robustness."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from scipy import special

from lipbook.composition import lipschitz_bound
from lipbook.lab.data import mnist
from lipbook.lab.exercises.registry import exercise
from lipbook.losses import multi_margin, offset_cross_entropy
from lipbook.robustness import Standardize, certified_radius

__all__: list[str] = []  # answers are asked for by their numbers

FIRST = torch.tensor([0])  # the label of one input of class 0


def _radius(*logits: float, **options: Any) -> float:
    rows = torch.tensor([logits], dtype=torch.float64)
    return certified_radius(rows, FIRST, **options).item()


@exercise(
    "8.1",
    level=1,
    kind="warm-up",
    mistakes={
        "that is the margin": [1.2, 1.2],
        "two logits use up the margin of 2-norms by the root of 2": [0.6, 0.6],
        "the third class in place of the second": [2.6 / math.sqrt(2), 1.3],
    },
)
def by_hand() -> list[float]:
    return [_radius(3.1, 1.9, 0.5), _radius(3.1, 1.9, 0.5, p=math.inf)]


@exercise(
    "8.2",
    level=1,
    kind="warm-up",
    mistakes={
        "the standardisation is not counted": 1.1 / (math.sqrt(2) * 0.8),
        "the radius is divided by the standard deviation in place of multiplied": 1.1
        / (0.31 * math.sqrt(2) * 0.8),
    },
)
def in_pixels() -> float:
    front = lipschitz_bound(Standardize([0.13], [0.31]), (1, 28, 28)).value
    return _radius(1.1, 0.0, lipschitz=0.8 * front)


@exercise(
    "8.3",
    level=1,
    kind="derive",
    mistakes={
        "a radius is not negative": -0.35,
        "one output has no root of 2": 0.35 / math.sqrt(2),
        "L is left out": 0.7,
    },
)
def two_classes() -> float:
    output, sign = torch.tensor([-0.7], dtype=torch.float64), torch.tensor([-1])
    return certified_radius(output, sign, 2.0).item()


@exercise(
    "8.4",
    level=1,
    kind="compute",
    mistakes={
        "the 2-norm of ones is the root of their number": [1.4 / 784, 1.4],
        "the two norms are exchanged": [1.4, 0.05],
    },
)
def brightness() -> list[float]:
    one = torch.ones(28, 28, dtype=torch.float64)
    return [1.4 / one.norm().item(), 1.4 / one.abs().max().item()]


@exercise(
    "8.5",
    level=2,
    kind="derive",
    mistakes={"that is the mean of the radii": math.sqrt(2), "that is the margin": 2.5},
)
def averages() -> float:
    return _radius(3.0, 0.5, 0.5)


@exercise(
    "8.6",
    level=2,
    kind="compute",
    mistakes={
        "the two forms are exchanged": [0.5590, 0.2243],
        "that is the third class": [0.2243, 0.9],
        "the root of 2 is left out in the first form": [0.5 / 1.5764, 0.5590],
    },
)
def rows_of_the_head() -> list[float]:
    head = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64)
    norm = torch.linalg.matrix_norm(head, 2).item()
    return [_radius(2.0, 1.5, 0.2, lipschitz=norm), _radius(2.0, 1.5, 0.2, head=head)]


@exercise(
    "8.7",
    level=2,
    kind="derive",
    mistakes={
        "the right class counts as well": [0.25 * math.log(9), 0.0],
        "the factor t is left out": [math.log(10), 0.0],
    },
)
def softly() -> list[float]:
    logits = torch.tensor([[1.0] + 9 * [0.0]], dtype=torch.float64)
    soft = offset_cross_entropy(logits, FIRST, 1.0, 0.25)
    return [soft.item(), multi_margin(logits, FIRST, 1.0).item()]


@exercise(
    "8.8",
    level=2,
    kind="compute",
    mistakes={
        "rounded down": [300, 218104],
        "the distribution function at half of the radius": [40, 301],
    },
)
def how_many_copies() -> list[int]:
    return [math.ceil(math.log(0.001) / special.log_ndtr(r)) for r in (2, 4)]


@exercise(
    "8.9",
    level=2,
    kind="compute",
    mistakes={
        "n u is less than gamma": [1677721, 204, 25],
        "a unit roundoff of half the size": [3050402, 372, 46],
    },
)
def sums_that_round() -> list[int]:
    return [int(Fraction(2**bits, 11)) for bits in (24, 11, 8)]


@exercise(
    "8.11",
    level=2,
    kind="derive",
    mistakes={
        "the certificate is not exact here": [1.0, 1.0],
        "the sum of the entries in place of the 2-norm": [1.0, 784.0],
        "the two numbers are exchanged": [28.0, 1.0],
    },
)
def slope_one() -> list[float]:
    x = -torch.ones(784, dtype=torch.float64)
    return [x.min().abs().item(), x.norm().item()]


@exercise(
    "8.12",
    level=3,
    kind="compute",
    mistakes={
        "the whole distance in place of half of it": 3.7778,
        "the square of the distance": 14.2715,
    },
)
def halfway() -> float:
    digits = mnist()
    flat = digits.test_images.double().flatten(1)
    apart = torch.cdist(flat, flat)
    apart[digits.test_labels[:, None] == digits.test_labels] = math.inf
    return apart.min().item() / 2
