r"""Deep 1-Lipschitz networks: 10 and 50 hidden layers, with and without centering and averages.

A hidden layer is an orthonormal matrix of 32 units and an activation: MaxMin, which keeps norms, or
ReLU, which loses some. Four ways to stack them, all 1-Lipschitz by construction:

- *chain*: one after the other, from random matrices;
- *chain from I*: the same, and all hidden matrices begin as the identity;
- *centered chain*: the chain with the mean of the batch subtracted before each activation
  (:class:`~lipbook.normalization.BatchCentering`);
- *average*: each hidden layer, random, is a branch beside a skip, averaged by a learnt weight that
  begins at one over the depth (:class:`~lipbook.residual.AverageResidual`). At 1/2 a random branch
  halves the square of the norm, and 50 of them leave nothing.

All learn the same 2,560 digits of those that ship, in 100 steps of Adam with the offset
cross-entropy, at a rate that falls to 0. The first rate is chosen among three for each network by
the mean of clean and certified accuracy on 1,000 other training digits, with the first seed; then
two more networks are trained at it. The test digits judge all three.

Beside the accuracies stands the *slope*: the mean norm of the gradient of the margin at test
digits, divided by :math:`\sqrt2`, the most that a 1-Lipschitz network can have. It says how much of
its constant a network uses.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.activations import MaxMin
from lipbook.convolutions import identity_
from lipbook.export import freeze
from lipbook.interpretability import margin_gradient
from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.records import Record
from lipbook.lab.training import train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.normalization import BatchCentering
from lipbook.orthogonal import OrthogonalLinear
from lipbook.residual import AverageResidual

__all__ = [
    "ACTIVATIONS",
    "DEPTHS",
    "EPSILON",
    "RATES",
    "WAYS",
    "fit",
    "network",
    "row",
    "run",
    "summary",
]

#: Radius of the certified accuracy, and of the loss.
EPSILON = 1.0
#: Hidden layers.
DEPTHS = (10, 50)
#: Activations between them.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"MaxMin": MaxMin, "ReLU": nn.ReLU}
#: Ways to stack them.
WAYS = ("chain", "chain from I", "centered chain", "average")
#: First rates to choose from.
RATES = (0.001, 0.005, 0.025)
WIDTH = 32
SEEDS = 3
MEASURES = ("clean", "certified", "slope")


def network(way: str, activation: str, depth: int) -> nn.Sequential:
    """Build a network.

    Parameters
    ----------
    way : str
        One of :data:`WAYS`.
    activation : str
        One of :data:`ACTIVATIONS`.
    depth : int
        Hidden layers.

    Returns
    -------
    torch.nn.Sequential

    Raises
    ------
    ValueError
        There is no such way or activation.

    Examples
    --------
    >>> len(network("average", "ReLU", 10))
    13
    """
    for name, value, known in (("way", way, WAYS), ("activation", activation, [*ACTIVATIONS])):
        if value not in known:
            raise ValueError(f"{name}: expected one of {(*known,)}, got {value!r}")

    def hidden() -> nn.Module:
        linear = OrthogonalLinear(WIDTH, WIDTH)
        if way == "chain from I":
            identity_(linear)
        centering = [BatchCentering(WIDTH)] if way == "centered chain" else []
        block = nn.Sequential(linear, *centering, ACTIVATIONS[activation]())
        return AverageResidual(block, weight=1 / depth) if way == "average" else block

    ends = OrthogonalLinear(784, WIDTH), OrthogonalLinear(WIDTH, 10)
    return nn.Sequential(nn.Flatten(), ends[0], *(hidden() for _ in range(depth)), ends[1])


def fit(
    way: str,
    activation: str,
    depth: int,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    epochs: int = 5,
    seed: int = 0,
) -> nn.Module:
    """Train a network.

    Parameters
    ----------
    way, activation, depth
        As in :func:`network`.
    images, labels : torch.Tensor
        Digits.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    epochs : int
        In batches of 128.
    seed : int
        Of weights and batches.

    Returns
    -------
    torch.nn.Module
        Frozen, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = network(way, activation, depth)
    loss = OffsetCrossEntropyLoss(margin_for_radius(EPSILON), 0.2)
    train(
        model, images, labels, epochs=epochs, lr=lr, loss=loss, optimizer=torch.optim.Adam,
        schedule="linear", seed=seed,
    )  # fmt: skip
    return freeze(model)


def row(
    way: str,
    activation: str,
    depth: int,
    fitted: Sequence[Tensor],
    judges: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    epochs: int = 5,
    seed: int = 0,
) -> Outcome:
    """Train on some digits and measure on others.

    Parameters
    ----------
    way, activation, depth, lr, epochs, seed
        As in :func:`fit`.
    fitted : sequence of torch.Tensor
        Images and labels.
    judges : sequence of sequence of torch.Tensor
        The same, of validation and of test.

    Returns
    -------
    tuple of dict
        Results: the arguments that are no tensors; ``validation`` and ``test``, each with ``clean``
        and ``certified`` accuracy, in real arithmetic, and ``slope``. No tensors.
    """
    model = fit(way, activation, depth, *fitted, lr=lr, epochs=epochs, seed=seed)
    results: dict[str, Any] = {
        "way": way, "activation": activation, "depth": depth, "lr": lr, "epochs": epochs,
        "seed": seed,
    }  # fmt: skip
    for name, (images, labels) in zip(("validation", "test"), judges, strict=True):
        found = certificate(model, images, labels, sound=False)
        gradients = margin_gradient(model, images[:1000], labels[:1000]).flatten(1)
        results[name] = {
            "clean": found.certified_accuracy(0).value,
            "certified": found.certified_accuracy(EPSILON).value,
            "slope": gradients.norm(dim=1).mean().item() / math.sqrt(2),
        }
    return results, {}


def run(
    *,
    depths: Sequence[int] = DEPTHS,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    train_count: int = 2560,
    validation: int = 1000,
    epochs: int = 5,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each network, then train it from all seeds.

    Parameters
    ----------
    depths : sequence of int
        Hidden layers.
    rates : sequence of float
        To choose from.
    seeds : int
        Trainings of each network.
    train_count, validation : int
        Training digits to train on, and others to choose the rate on, drawn by the seed.
    epochs : int
        As in :func:`fit`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``epsilon``; ``tried``, rows of :func:`row` of all rates; ``rows``, those of the
        chosen rate. No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(digits.train_images)))
    fitted, held_out = (
        (digits.train_images[part], digits.train_labels[part])
        for part in order[: train_count + validation].split([train_count, validation])
    )
    judges = (held_out, digits[2:])
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    cells = list(itertools.product(depths, ACTIVATIONS, WAYS))
    for depth, activation, way in rows.bar(cells, "networks"):
        one = functools.partial(row, way, activation, depth, fitted, judges, epochs=epochs)
        trials, best = rows.chosen(
            f"{way} {activation} {depth}", one, rates, range(seed, seed + seeds), _score
        )
        tried += trials
        chosen += best
    return {"epsilon": EPSILON, "tried": tried, "rows": chosen}, {}


def _score(one: dict[str, Any]) -> float:
    return float(one["validation"]["clean"] + one["validation"]["certified"])


def summary(record: Record) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("deep_networks")``.

    Returns
    -------
    dict
        For each way, activation and depth the rate ``lr``, and of ``clean``, ``certified`` and
        ``slope`` on test digits a pair: mean and standard deviation over the seeds.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> sorted(summary(records.read("deep_networks"))["chain", "MaxMin", 50])
    ['certified', 'clean', 'lr', 'slope']
    """
    cells: dict[tuple[str, str, int], list[Any]] = {}
    for one in record.results["rows"]:
        cells.setdefault((one["way"], one["activation"], one["depth"]), []).append(one)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell, mine in cells.items():
        found[cell] = {"lr": mine[0]["lr"]}
        for measure in MEASURES:
            values = [one["test"][measure] for one in mine]
            found[cell][measure] = statistics.mean(values), statistics.stdev(values)
    return found
