"""Exercises of chapter 7, Wasserstein distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbook.lab import problems
from lipbook.lab.exercises.registry import exercise
from lipbook.wasserstein import c_transform, wasserstein1

__all__: list[str] = []  # answers are asked for by their numbers


def _points(*rows: float | list[float]) -> Tensor:
    points = torch.tensor(rows, dtype=torch.float64)
    return points if points.ndim == 2 else points[:, None]


def _distance(x: Tensor, y: Tensor, *weights: Tensor) -> float:
    return wasserstein1(x, y, *weights).item()


@exercise(
    "7.1",
    level=1,
    kind="warm-up",
    mistakes={
        "the sum in place of the mean": 28.0,
        "the distance of the mean of the pile": math.hypot(14 / 3, 8),
    },
)
def point_and_pile() -> float:
    pile = _points([3, 4], [6, 8], [5, 12])
    return _distance(pile, torch.zeros_like(pile[:1]))


@exercise(
    "7.2",
    level=1,
    kind="warm-up",
    mistakes={"the difference of the means": 0.5, "the area with both weights of 1": 3.0},
)
def staircases() -> float:
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    return _distance(_points(0, 4), _points(1, 3), *weights)


@exercise(
    "7.3",
    level=1,
    kind="warm-up",
    mistakes={
        "it is not divided by the bound": 2.4,
        "the norm below 1 is left out": 2.4 / 1.98,
        "multiplied by the bound in place of divided": 2.4 * 1.782,
    },
)
def what_a_critic_proves() -> float:
    return 2.4 / math.prod((1.1, 0.9, 1.5, 1.2))


@exercise(
    "7.4",
    level=1,
    kind="derive",
    mistakes={
        "the difference of the standard deviations is the distance for squared costs": 2.0,
        "the mean of the positive part in place of the modulus": 2 / math.sqrt(2 * math.pi),
    },
)
def two_hills() -> float:
    return problems.gaussians_on_a_line(3.0, 1.0).distance


@exercise(
    "7.5",
    level=1,
    kind="compute",
    mistakes={
        "the weights of one half are left out": [4.0, 0.0, 0.0],
        "the numbers v are not subtracted from the distances": [2.0, 3.0, 1.0],
    },
)
def proof_by_hand() -> list[float]:
    x, y = _points([0, 0], [4, 0]), _points([0, 3], [4, 1])
    u = c_transform(torch.tensor([3.0, 1.0], dtype=torch.float64), y, x)
    return [_distance(x, y), *u.tolist()]


@exercise(
    "7.6",
    level=2,
    kind="derive",
    mistakes={"a best plan need not move everything": 0.0, "that is the share which moves": 0.1},
)
def moving_everything() -> float:
    before = {*range(10)}
    return len(before & {place + 1 for place in before}) / len(before)


@exercise(
    "7.7",
    level=2,
    kind="compute",
    mistakes={"the two numbers are exchanged": [8 / 3, 2.0], "sums in place of means": [6.0, 8.0]},
)
def wrong_critic() -> list[float]:
    x, y = _points(0, 1, 5), _points(2, 3, 9)
    u = c_transform(-3 * y[:, 0], y, x)
    v = c_transform(u, x, y)
    return [(u.mean() + v.mean()).item(), _distance(x, y)]


@exercise(
    "7.8",
    level=2,
    kind="compute",
    mistakes={
        "the factor d / (d + 1) is left out": 0.41490675 * 1.1,
        "the volume of the ball is left out": 10 / 11 * 1000**-0.1,
    },
)
def thousand_points() -> float:
    d, n = 10, 1000
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    return d / (d + 1) * (n * ball) ** (-1 / d)


@exercise(
    "7.9",
    level=2,
    kind="compute",
    rtol=0.01,
    mistakes={
        "that is the distance of the distributions": 1.0,
        "that is the distance of the samples": 4.3268,
    },
)
def best_line() -> float:
    moved = problems.translation(20)
    draw = torch.Generator().manual_seed(0)
    x, y = moved.sample_x(200, draw), moved.sample_y(200, draw)
    direction = (x.mean(0) - y.mean(0)).requires_grad_()
    ascent = torch.optim.Adam([direction], lr=0.05)
    best = 0.0
    for _ in range(100):
        unit = direction / direction.norm()
        value = wasserstein1((x @ unit)[:, None], (y @ unit)[:, None])
        best = max(best, value.item())
        ascent.zero_grad()
        (-value).backward()
        ascent.step()
    return best


@exercise(
    "7.10",
    level=2,
    kind="change the experiment",
    rtol=0.02,
    mistakes={
        "the lengths are not subtracted": [10.7561, 100.0154],
        "the excess does not stay": [3.3268, 3.3268],
    },
)
def farther_apart() -> list[float]:
    excesses = []
    for length in (10.0, 100.0):
        moved = problems.translation(20, length)
        draw = torch.Generator().manual_seed(0)
        pair = moved.sample_x(200, draw), moved.sample_y(200, draw)
        excesses.append(_distance(*pair) - length)
    return excesses


@exercise(
    "7.11",
    level=3,
    kind="derive",
    mistakes={"that is the farthest way, not the mean": 0.05, "that is one point": 0.25},
)
def middles() -> float:
    return 1 / (4 * 10)
