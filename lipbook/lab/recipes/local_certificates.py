r"""Certificates of a convolutional network that was trained without a thought of them.

The radius of the largest ball on which a digit provably keeps its class, in three ways: the
product bound, interval arithmetic (no Lipschitz constant, but ranges of the logits' differences on
a box), and the local Lipschitz bound. The smallest radius at which an attack succeeds is beside
them: no certificate can pass it. Same network, same digits; three seeds.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.attacks import pgd
from lipbook.composition.local import ranges_of
from lipbook.graphs import trace
from lipbook.lab.data import mnist
from lipbook.lab.ordinary import SmallConvNet
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import accuracy, train
from lipbook.robustness import certify
from lipbook.rules import Range

__all__ = ["attacked_radius", "fit", "interval_radius", "row", "run"]

SHAPE = (1, 28, 28)


class _Features(nn.Module):
    def __init__(self, net: SmallConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.features(x)


def fit(epochs: int = 3, seed: int = 0) -> SmallConvNet:
    """Train the network on 6,000 digits, without any constraint.

    Parameters
    ----------
    epochs : int
        Of descent at the rate 0.05.
    seed : int
        Of weights and batches.

    Returns
    -------
    SmallConvNet
        In float64 and evaluation mode.
    """
    torch.manual_seed(seed)
    net = SmallConvNet().double()
    digits = mnist()
    images, labels = digits.train_images[:6000].double(), digits.train_labels[:6000]
    train(net, images, labels, epochs=epochs, lr=0.05, seed=seed)
    return net.eval()


def _largest(holds: Callable[[Tensor], Tensor], count: int, halvings: int = 20) -> Tensor:
    """Bisect, for each of ``count`` samples, in [0, 1]; what is returned holds, or is 0."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(halvings):
        middle = (low + high) / 2
        held = holds(middle)
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return low


def interval_radius(net: SmallConvNet, images: Tensor, labels: Tensor) -> Tensor:
    r"""Largest radius of a box on which interval arithmetic proves the class.

    The ranges of the features :math:`h` on the box go through the difference of two rows of the
    head, :math:`z_y - z_j = (w_y - w_j)^\top h + b_y - b_j`, whose smallest value must be positive
    for all :math:`j`. The box holds the Euclidean ball of the same radius, so that the radius holds
    for p = 2 and for p = :math:`\infty`.

    Parameters
    ----------
    net : SmallConvNet
        In float64.
    images : torch.Tensor
        (batch, 1, 28, 28) in float64.
    labels : torch.Tensor
        (batch,).

    Returns
    -------
    torch.Tensor
        (batch,), in real arithmetic; 0 where nothing is proved.
    """
    graph = trace(_Features(net).eval(), SHAPE)
    weight = net.fc.weight.detach()[labels][:, None] - net.fc.weight.detach()
    bias = net.fc.bias.detach()[labels][:, None] - net.fc.bias.detach()
    others = torch.arange(len(net.fc.bias)) != labels[:, None]

    def proved(radius: Tensor) -> Tensor:
        half = radius[:, None, None, None]
        found = ranges_of(graph, Range(images - half, images + half))[-1]
        low = (weight * found.middle[:, None]).sum(2) + bias
        low -= (weight.abs() * found.half[:, None]).sum(2)
        return ((low > 0) | ~others).all(1)

    return _largest(proved, len(images))


def attacked_radius(
    net: nn.Module, images: Tensor, labels: Tensor, p: float, steps: int = 50
) -> Tensor:
    r"""Smallest radius at which an attack by projected gradients succeeds, by bisection.

    Parameters
    ----------
    net : torch.nn.Module
        In evaluation mode.
    images, labels : torch.Tensor
        (batch, \*shape) and (batch,), read correctly.
    p : float
        1, 2 or :data:`math.inf`.
    steps : int
        Of each attack.

    Returns
    -------
    torch.Tensor
        (batch,), up to 2⁻¹² of the range [0, 8] that is searched.
    """

    def survives(radius: Tensor) -> Tensor:
        found = pgd(net, images, labels, 8 * radius, p, steps=steps)
        return net(found).argmax(1) == labels

    with torch.no_grad():
        return 8 * (_largest(survives, len(images), 12) + 2.0**-12)


def row(p: float, *, count: int = 50, epochs: int = 3, seed: int = 0) -> Outcome:
    """Certify the first test digits that one network reads correctly.

    Parameters
    ----------
    p : float
        2 or :data:`math.inf`.
    count : int
        Digits.
    epochs, seed
        As in :func:`fit`.

    Returns
    -------
    tuple of dict
        Results: ``p``, ``seed``, test ``accuracy``; ``radii``, for each of ``"product"``,
        ``"intervals"``, ``"local"`` and ``"attack"`` those of the digits. No tensors.
    """
    net = fit(epochs, seed)
    digits = mnist()
    images, labels = digits.test_images.double(), digits.test_labels
    with torch.no_grad():
        right = (net(images).argmax(1) == labels).nonzero()[:count, 0]
    x, y = images[right], labels[right]
    radii: dict[str, Tensor] = {}
    for method in ("product", "local"):
        radii[method] = certify(net, [(x, y)], SHAPE, p, method=method).radius
    radii["intervals"] = interval_radius(net, x, y)
    radii["attack"] = attacked_radius(net, x, y, p)
    return {
        "p": "inf" if p == math.inf else p,
        "seed": seed,
        "accuracy": accuracy(net, images, labels),
        "radii": {name: found.tolist() for name, found in radii.items()},
    }, {}


def run(
    *,
    norms: Sequence[float] = (2, math.inf),
    count: int = 50,
    epochs: int = 3,
    seeds: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Certify three networks in two norms.

    Parameters
    ----------
    norms : sequence of float
        2, :data:`math.inf`.
    count, epochs
        As in :func:`row`.
    seeds : int
        Networks.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``medians``, over all digits of all networks, for
        each norm and method. No tensors.
    """
    rows = rows or Rows()
    table: list[dict[str, Any]] = []
    grid = list(itertools.product(norms, range(seed, seed + seeds)))
    for p, i in rows.bar(grid, "networks"):
        one = functools.partial(row, p, count=count, epochs=epochs, seed=i)
        table.append(rows.compute(f"p {p} seed {i}", one)[0])
    medians: dict[str, dict[str, float]] = {}
    for p in dict.fromkeys(found["p"] for found in table):
        same = [found["radii"] for found in table if found["p"] == p]
        medians[str(p)] = {
            name: statistics.median(itertools.chain.from_iterable(radii[name] for radii in same))
            for name in same[0]
        }
    return {"rows": table, "medians": medians}, {}
