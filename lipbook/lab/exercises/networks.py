"""Exercises of chapter 12, Networks as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from lipbook.composition import lipschitz_bound
from lipbook.lab.exercises.registry import exercise

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "12.1",
    level=1,
    kind="warm-up",
    mistakes={
        "constants multiply along a path": [1.0, 5 / 6, 0.5, 1 / 3],
        "the largest first": [1 / 6, 1 / 3, 1 / 2, 1.0],
    },
)
def paths() -> list[float]:
    g, h = 1 / 2, 1 / 3
    return [1.0, g, h, g * h]


class _Copies(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], 1)


@exercise(
    "12.2",
    level=1,
    kind="warm-up",
    mistakes={
        "there are two copies": [1.0, 1.0, 1.0],
        "the p-norm of (1, 1), not the sum": [2.0, 2.0, 2.0],
        "the exponent of the dual norm": [1.0, math.sqrt(2), 2.0],
    },
)
def copies() -> list[float]:
    return [lipschitz_bound(_Copies(), (3,), p).value for p in (1, 2, math.inf)]


@exercise(
    "12.3",
    level=1,
    kind="derive",
    mistakes={
        "both outputs move": math.sqrt(2) / 0.2,
        "a step of length 1 changes d by the root of 2, and both outputs move": 5.0,
        "the root of epsilon": 100.0,
    },
)
def two_entries() -> float:
    return lipschitz_bound(nn.LayerNorm(2, eps=0.01), (2,)).value


@exercise(
    "12.4",
    level=2,
    kind="derive",
    mistakes={
        "gamma is left out": [10.0, 4.0],
        "a constant is not negative": [-30.0, 4.0],
        "the root of n in place of n": [30.0, 8.0],
    },
)
def without_the_mean() -> list[float]:
    layer = nn.RMSNorm(4, eps=0.01)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -3.0, 2.0, 0.5]))
    return [lipschitz_bound(layer, (4,)).value, math.sqrt(4) / 0.5]


class _Couplings(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        b = b + a
        return torch.cat([a + b, b], 1)


@exercise(
    "12.5",
    level=2,
    kind="derive",
    mistakes={
        "that is one of the two couplings": (1 + math.sqrt(5)) / 2,
        "the largest entry in place of the norm": 2.0,
        "the Frobenius norm in place of the 2-norm": math.sqrt(7),
    },
)
def couplings() -> float:
    return lipschitz_bound(_Couplings(), (6,)).value


@exercise(
    "12.6",
    level=2,
    kind="compute",
    mistakes={
        "the two numbers are exchanged": [2.0, 1.0],
        "the list holds the node once": [2.0, 2.0],
    },
)
def read_twice() -> list[float]:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    (added,) = (node for node in symbolic_trace(Twice()).graph.nodes if node.op == "call_function")
    return [float(len(added.all_input_nodes)), lipschitz_bound(Twice(), (3,)).value]


@exercise(
    "12.7",
    level=2,
    kind="compute",
    mistakes={
        "the largest slope of the logistic function is 1/4": [1.7311, 101.0],
        "those are the bounds as functions of single entries": [1.0998, 1.0998],
        "the first term is left out": [0.25, 25.0],
    },
)
def gate() -> list[float]:
    return [1 / (1 + math.exp(-R)) + R / 4 for R in (1.0, 100.0)]


@exercise(
    "12.8",
    level=2,
    kind="derive",
    mistakes={
        "the set is smaller, so the exponent is negative": 600.0,
        "only pixels at the border of the domain count": -784.0,
        "the pixels inside of the domain lose nothing": -184.0,
    },
)
def inside() -> float:
    pixels = torch.full((784,), 0.5, dtype=torch.float64)
    pixels[:600] = 0
    low, high = (pixels - 0.1).clamp(min=0), (pixels + 0.1).clamp(max=1)
    return ((high - low) / 0.2).log2().sum().item()


@exercise(
    "12.9",
    level=2,
    kind="compute",
    mistakes={
        "a token also answers those who read it": 0.5 - 0.25 * math.tanh(0.5),
        "the derivative of log cosh is tanh, not 1": 0.5 - 0.5 * math.cosh(1) / (math.cosh(1) + 1),
    },
)
def step() -> float:
    x = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    energy = (x[:, None] + x[None, :]).cosh().sum(1).log().sum()
    (gradient,) = torch.autograd.grad(energy, x)
    return (x - 0.25 * gradient)[0].item()


@exercise(
    "12.10",
    level=2,
    kind="compute",
    mistakes={
        "half of the norm is a quarter of its square": 2 * math.log(2) / math.log(48 / 43),
        "a step keeps 43 parts of 48": math.log(2) / math.log(43 / 5),
        "the part that leaves is 5/48": math.log(2) / math.log(48 / 5),
    },
)
def half_life() -> float:
    kept, steps = torch.tensor(43 / 48, dtype=torch.float64), 0
    while kept ** (steps + 1) > 0.5:
        steps += 1
    return steps + ((kept**steps / 0.5).log() / -kept.log()).item()
