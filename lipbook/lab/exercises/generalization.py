"""Exercises of chapter 9, Generalisation."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from torch import nn

from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.generalization import margin_loss, margins, spectral_complexity
from lipbook.lab.data import mnist
from lipbook.lab.exercises.registry import exercise
from lipbook.lab.recipes import small_data
from lipbook.lab.training import train
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import wasserstein1

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "9.1",
    level=1,
    kind="warm-up",
    mistakes={
        "quotients without the power 2/3": [10 * 2.5, 10.0, 52**0.5],
        "the Lipschitz constant is less than the product": [35.1174, 10.0, 10.0],
    },
)
def by_hand() -> list[float]:
    norms, rows = (2, 5), (3, 5)
    product = math.prod(norms)
    total = sum((b / s) ** (2 / 3) for s, b in zip(norms, rows, strict=True))
    return [product * total**1.5, product, math.hypot(6, 4)]


@exercise(
    "9.2",
    level=1,
    kind="warm-up",
    mistakes={
        "shares of what is right in place of losses": [0.75, 0.675, 0.5],
        "sums in place of means": [1.0, 1.3, 2.0],
    },
)
def three_losses() -> list[float]:
    logits = [[2, 0.5, 0], [0.2, 0.9, 0.1], [1, 1, 3], [0.4, 0.1, 0.3]]
    found = margins(torch.tensor(logits, dtype=torch.float64), torch.tensor([0, 1, 2, 2]))
    ramp = (1 - found).clamp(0, 1).mean().item()
    return [margin_loss(found, 0.0), ramp, margin_loss(found, 1.0)]


@exercise(
    "9.3",
    level=1,
    kind="warm-up",
    mistakes={
        "not divided by n": 1.5,
        "that is the bound from above": 0.5,
        "that is the complexity of a single function": 0.0,
    },
)
def class_of_two() -> float:
    sums = [abs(sum(signs)) / 4 for signs in itertools.product((-1, 1), repeat=4)]
    return sum(sums) / len(sums)


@exercise(
    "9.4",
    level=1,
    kind="compute",
    mistakes={"half of the distance": [0.1, 0.5], "the two labellings are exchanged": [0.25, 0.05]},
)
def signs_in_a_row() -> list[float]:
    x = torch.arange(1, 11, dtype=torch.float64)[:, None] / 10
    halves = (x[::2], x[1::2]), (x[:5], x[5:])
    return [wasserstein1(*pair).item() / 2 for pair in halves]


@exercise(
    "9.5",
    level=1,
    kind="derive",
    mistakes={
        "those are the Frobenius norms": [2.0, 2.0],
        "orthonormal rows are as many as the norm says": [4.0, 12.0],
        "the rows of the second matrix are shorter than 1": [4.0, 9.0],
    },
)
def rows_and_frobenius() -> list[float]:
    return [math.sqrt(m) * math.sqrt(min(m, n)) for m, n in ((4, 9), (9, 4))]


@exercise(
    "9.6",
    level=2,
    kind="compute",
    mistakes={
        "the factor 3 is squared": [18444.4, 14978.7],
        "the root of n in place of n": [407.43, 122.387],
    },
)
def all_at_once() -> list[float]:
    return [9 * math.log(2 / 0.05) / (2 * 0.01**2), math.log(1 / 0.05) / (2 * 0.01**2)]


@exercise(
    "9.7",
    level=2,
    kind="derive",
    mistakes={
        "the sum of the three layers without the power 3/2": [24.0, 8.0],
        "the layer itself counts as well": [2**1.5 * 8, 8.0],
    },
)
def deeper() -> list[float]:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.eye_(layer.weight)
    network = nn.Sequential(*layers)
    references = [torch.eye(8), torch.eye(8), torch.zeros(8, 8)]
    found = (spectral_complexity(network, (8,), given) for given in (None, references))
    return [complexity.value for complexity in found]


@exercise(
    "9.8",
    level=2,
    kind="derive",
    mistakes={
        "the term falls like R over the root of n": [2**1.5, 2.0],
        "n grows like the square of R": [2**0.75, 2**0.5],
    },
)
def twice_as_deep() -> list[float]:
    def complexity(width: int, depth: int) -> float:
        layers = [OrthogonalLinear(width, width, bias=False) for _ in range(depth)]
        return spectral_complexity(nn.Sequential(*layers), (width,)).value

    return [(complexity(*size) / complexity(4, 2)) ** 2 for size in ((4, 4), (8, 2))]


@exercise(
    "9.9",
    level=2,
    kind="compute",
    mistakes={
        "the step has the values 0 and 1, and half of the signs ask for 0": [1.0, 40**-0.5],
        "the norm of the data is not divided by n": [0.5, 40**0.5],
    },
)
def contraction() -> list[float]:
    step = sum(max(0, sign) for sign in (-1, 1)) / 2
    return [step, math.sqrt(40) / 40]


def _relu_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = (784, 128), (128, 128), (128, 10)
    first, second, last = (nn.Linear(*n, bias=False, dtype=torch.float64) for n in sizes)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


@functools.cache  # the training takes seconds
def _trained() -> tuple[nn.Sequential, nn.Sequential]:
    """Train on true and on shuffled labels, as the chapter does."""
    images, labels = small_data.subset(mnist(), 60, seed=0)
    order = np.random.default_rng(0).permutation(len(images))
    true, shuffled = _relu_network(0), _relu_network(0)
    for network, targets in ((true, labels), (shuffled, labels[torch.from_numpy(order)])):
        train(
            network,
            images.double(),
            targets,
            epochs=60,
            lr=0.002,
            batch_size=50,
            optimizer=torch.optim.Adam,
            schedule="cosine",
        )
    return true, shuffled


@exercise(
    "9.10",
    level=2,
    kind="change the experiment",
    rtol=0.03,
    mistakes={
        "the two complexities are exchanged in the quotient": [1.422, 1.245],
        "that is another seed": [1.16, 1.10],
        "true and shuffled labels are exchanged": [0.803, 0.703],
    },
)
def measured_from_the_start() -> list[float]:
    factors = []
    for network in _trained():
        near, far = (
            spectral_complexity(network, (1, 28, 28), reference=reference).value
            for reference in (_relu_network(0), None)
        )
        factors.append(near / far)
    return factors


@exercise(
    "9.11",
    level=3,
    kind="derive",
    mistakes={
        "the two bounds are exchanged in the quotient": 0.5,
        "both units can see the same thing": 1.0,
        "the two units add up": math.sqrt(2),
    },
)
def product_stays_with_sorting() -> float:
    r, w = 3.0, torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    both = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    adds = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    sorting = nn.Sequential(both, MaxMin(), adds)
    with torch.no_grad():
        both.weight.copy_(torch.cat([w, w]) / math.sqrt(2))
        adds.weight.fill_(r / math.sqrt(2))
        slope = sorting(w).item()
    return slope / (lipschitz_bound(sorting, (2,)).value / 2)
