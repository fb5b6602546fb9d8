"""Exercises of chapter 2, Jacobians and optimisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lipbook.lab.exercises.registry import exercise

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "2.1",
    level=1,
    kind="warm-up",
    mistakes={
        "the longest stable step": [2 / 15, 1.0],
        "the inverse of the largest eigenvalue": [1 / 15, 14 / 15],
        "twice the inverse of the difference": [2 / 14, 8 / 7],
    },
)
def best_step() -> list[float]:
    low, high = 1.0, 15.0
    return [2 / (low + high), (high - low) / (high + low)]


@exercise(
    "2.2",
    level=1,
    kind="warm-up",
    mistakes={"sums": [45.0, 55.0], "one layer": [0.9, 1.1], "49 layers": [0.9**49, 1.1**49]},
)
def sandwich() -> list[float]:
    return [math.prod([0.9] * 50), math.prod([1.1] * 50)]


@exercise(
    "2.3",
    level=1,
    kind="derive",
    mistakes={"the variance": 1.6, "the gain of ReLU": math.sqrt(2), "a, not a²": math.sqrt(4 / 3)},
)
def leaky_gain() -> Tensor:
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    outputs = torch.nn.functional.leaky_relu(signs, 0.5)
    (slopes,) = torch.autograd.grad(outputs.sum(), signs)
    return slopes.square().mean().rsqrt()


@exercise(
    "2.4",
    level=1,
    kind="compute",
    mistakes={"without the signs": [0.9, 1.1], "without the 1": [1.9, 2.1]},
)
def signed_factors() -> list[float]:
    return [1 - share for share in (1.9, 2.1)]


@exercise(
    "2.5",
    level=1,
    kind="compute",
    mistakes={
        "the spectral radius": [0, 1.0],
        "t between two steps": [-1 / math.log(0.9), 19.3977],
    },
)
def peak_of_powers() -> list[float]:
    matrix = np.array([[0.9, 5.0], [0.0, 0.9]])
    norms = [np.linalg.norm(np.linalg.matrix_power(matrix, t), 2) for t in range(200)]
    return [int(np.argmax(norms)), float(max(norms))]


@exercise(
    "2.6",
    level=2,
    kind="derive",
    mistakes={
        "the limit, where s = 1": 1 / 8,
        "s(−t) in place of s(t)": (1 + math.exp(4)) / 8,
        "the inverse": 8 / (1 + math.exp(-4)),
    },
)
def remainder_and_curvature() -> Tensor:
    point = torch.tensor([2.0, 2.0], dtype=torch.float64)
    logit = torch.func.grad(torch.prod)(point)
    through = torch.sigmoid(point.prod())
    curvature = through * (1 - through) * torch.outer(logit, logit)
    hessian = torch.func.hessian(lambda p: torch.nn.functional.softplus(-p.prod()))(point)
    norms = torch.linalg.matrix_norm(torch.stack([hessian - curvature, curvature]), 2)
    return norms[0] / norms[1]


@exercise(
    "2.7",
    level=2,
    kind="derive",
    mistakes={
        "the limit of infinite depth": [math.exp(-1), math.e],
        "one block": [0.99, 1.01],
        "the simpler bound from below": [math.exp(-1.5), 1.01**100],
    },
)
def residual_bounds() -> list[float]:
    return [math.prod([1 - 1 / 100] * 100), math.prod([1 + 1 / 100] * 100)]


@exercise(
    "2.8",
    level=2,
    kind="compute",
    mistakes={
        "1 as the norm of H": [2 / 1117.5, 2 / 277.5],
        "the step that is best for one eigenvalue": [1 / 1117.5, 1 / 277.5],
        "the image in every layer": [4 / (50 * 88.5), 4 / (10 * 88.5)],
    },
)
def promised_step() -> list[float]:
    halves = torch.tensor([[0.25, -0.25], [-0.25, 0.25]], dtype=torch.float64)
    worst = torch.linalg.eigvalsh(halves)[-1].item()
    return [2 / (worst * (67.5 + layers * 21.0)) for layers in (50, 10)]


@exercise(
    "2.9",
    level=2,
    kind="change the experiment",
    mistakes={"a sum": [2.0, 64], "51 blocks": [1.02**51, 64], "without the gain": [1.0, 64]},
)
def fold_with_gain() -> list[float]:
    draw = np.random.default_rng(0)
    product = np.eye(64)
    h = draw.standard_normal(64)
    for _ in range(50):
        weight = 1.02 * np.linalg.qr(draw.standard_normal((64, 64)))[0]
        h = weight @ h
        product = np.sign(h)[:, None] * (weight @ product)
        h = abs(h)
    values = np.linalg.svd(product, compute_uv=False)
    return [float(np.median(values)), int((values > 0.01 * values[0]).sum())]


@exercise(
    "2.10",
    level=3,
    kind="derive",
    mistakes={
        "the approximation for large n": math.exp(-50 / 64),
        "the root mean square": 1.0,
        "the logarithm of the square": math.exp(-2 * 0.78940),
    },
)
def typical_gradient() -> Tensor:
    half = torch.tensor(16.0, dtype=torch.float64)
    return (25 * (torch.special.digamma(half) - half.log())).exp()
