"""Exercises of chapter 11, on how tight a Lipschitz bound is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import nn

from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.composition.bounds import MethodName
from lipbook.lab.exercises.registry import exercise
from lipbook.tightness import averaged_bound

__all__: list[str] = []  # answers are asked for by their numbers


def _network(*weights: list[list[float]], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1]).eval()


def _bounds(network: nn.Sequential, *methods: MethodName) -> list[float]:
    shape = (next(network.parameters()).shape[1],)
    return [lipschitz_bound(network, shape, method=method).value for method in methods]


@exercise(
    "11.1",
    level=1,
    kind="warm-up",
    mistakes={"sums in place of 2-norms": [7.0, 7.0], "squares of the norms": [100.0, 100.0]},
)
def one_unit() -> list[float]:
    return _bounds(_network([[3, 4]], [[2], [0]]), "product", "exact")


@exercise(
    "11.2",
    level=1,
    kind="warm-up",
    mistakes={
        "the norm of one layer in place of the product": [math.sqrt(2), 1.0, 1.0],
        "the difference of the two slopes is 1 at most": [2.0, 2.0, 1.0],
    },
)
def absolute_value() -> list[float]:
    return _bounds(_network([[1], [-1]], [[1, 1]]), "product", "seqlip", "exact")


@exercise(
    "11.3",
    level=1,
    kind="warm-up",
    mistakes={
        "here the two slopes add up": [2.0, 1.0, 1.0],
        "no input opens both units": [2.0, 2.0, 2.0],
    },
)
def identity() -> list[float]:
    return _bounds(_network([[1], [-1]], [[1, -1]]), "product", "seqlip", "exact")


@exercise(
    "11.4",
    level=1,
    kind="compute",
    mistakes={
        "planes through the origin make fewer regions": [4096, 134],
        "a unit has two states: a power of 2": [144, 299],
        "those are the regions of a plane": [4096, 79],
    },
)
def patterns_and_regions() -> list[int]:
    return [2**12, sum(math.comb(12, i) for i in range(4))]


@exercise(
    "11.5",
    level=2,
    kind="derive",
    mistakes={
        "t is the square of the norm": [3.0, 3.0],
        "the bound is the root of rho": [9.0, 9.0],
        "at half of that t the matrix is singular": [4.5, 3.0],
    },
)
def scalar_multiplier() -> list[float]:
    norm = max(3, 1)
    return [norm**2, norm]


@exercise(
    "11.6",
    level=2,
    kind="compute",
    mistakes={
        "the bound is the root of rho": [36.0, 12.76, 9.0],
        "the closed form is not the best number": [6.0, 4.5356, 3.0],
    },
    rtol=1e-3,
)
def one_number_or_one_a_unit() -> list[float]:
    network = _network([[3, 0], [0, 1]], [[1, 0], [0, 2]])
    return _bounds(network, "product", "lipsdp-layer", "lipsdp")


@exercise(
    "11.7",
    level=2,
    kind="derive",
    atol=1e-3,
    mistakes={
        "the bound is the root of rho": [1.0, 0.5, 0.25, 0.0],
        "one number for the layer does not see it": [1.0, 0.7071, 0.0, 0.0],
    },
)
def no_units_to_blame() -> list[float]:
    network = _network([[1], [0]], [[0, 1]])
    return _bounds(network, "product", "eclipse", "lipsdp-layer", "lipsdp")


@exercise(
    "11.8",
    level=2,
    kind="derive",
    mistakes={
        "squares of the norms": [10002.0, 4.0],
        "only the first unit is counted": [100.0, 1.0],
    },
)
def rescaling() -> list[float]:
    before, after = _network([[100], [1]], [[0.01, 1]]), _network([[1], [1]], [[1, 1]])
    return [*_bounds(before, "product"), *_bounds(after, "product")]


@exercise(
    "11.9",
    level=2,
    kind="compute",
    mistakes={
        "the sign": 1.0,
        "the inequality of one unit in place of two": 0.0,
        "the differences of the inputs are equal": -2.0,
    },
)
def multiplier_too_many() -> float:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0])
    z, w = high - low, high.relu() - low.relu()
    return ((w[0] - w[1]) * ((z[0] - z[1]) - (w[0] - w[1]))).item()


@exercise(
    "11.10",
    level=2,
    kind="compute",
    mistakes={
        "the terms in which C meets R vanish": [2.0, 16.0],
        "those are the bounds for ReLUs": [1.0, 1.0],
    },
)
def terms_for_each_set() -> list[float]:
    one = [[1.0, 0.0], [0.0, 1.0]]
    networks = (_network(*depth * [one], activation=MaxMin) for depth in (2, 5))
    return [averaged_bound(network, (2,)).value for network in networks]


@exercise(
    "11.11",
    level=2,
    kind="change the experiment",
    rtol=1e-3,
    mistakes={
        "those are the quotients of LipSDP": [1.0, 1.9832, 2.6971],
        "the quotient grows with the depth": [1.667, 1.667, 1.667],
    },
)
def deeper() -> list[float]:
    quotients = []
    for depth in (2, 3, 4):
        rng = np.random.default_rng(5)
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise((2, *[5] * (depth - 1), 2)):
            layer = nn.Linear(n, m, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(rng.standard_normal((m, n)) * math.sqrt(2 / n)))
                layer.bias.copy_(torch.from_numpy(0.1 * rng.standard_normal(m)))
            layers += [layer, nn.ReLU()]
        product, exact = _bounds(nn.Sequential(*layers[:-1]).eval(), "product", "exact")
        quotients.append(product / exact)
    return quotients
