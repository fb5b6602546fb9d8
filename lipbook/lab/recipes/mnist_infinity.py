r"""Robustness in the ∞-norm on MNIST, at ε = 0.1 and 0.3.

Dense networks of three layers whose absolute row sums are at most 1
(:class:`~lipbook.orthogonal.InfinityNormLinear`), trained with the offset cross-entropy for each
radius: with MaxMin, and with GroupSort of groups of 16. Each is certified soundly on all 10,000
test digits, and attacked by projected gradient descent at the same radii.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from lipbook.lab import networks
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.evaluation import certified_score, summary
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.orthogonal import InfinityNormLinear

__all__ = ["EPSILONS", "GROUP_SIZES", "RADII", "run", "row"]

#: Radii at which accuracies are certified and attacked.
EPSILONS = (0.05, 0.1, 0.2, 0.3)
#: Radii to train for, and the temperature of the loss for each.
RADII = {0.1: 0.1, 0.3: 0.2}
#: Of GroupSort; 2 is MaxMin.
GROUP_SIZES = (2, 16)


def row(
    digits: Mnist,
    radius: float,
    group_size: int,
    *,
    width: int = 256,
    epochs: int = 10,
    lr: float = 1e-2,
    batch_size: int = 256,
    validation: int = 5000,
    attack: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Outcome:
    """Train and certify one network.

    Parameters
    ----------
    digits : Mnist
        To train and to test on.
    radius : float
        Key of ``RADII``. The offset of the loss is its margin.
    group_size : int
        Of GroupSort.
    width : int
        Units of both hidden layers.
    epochs, lr, batch_size, validation, seed, progress
        As in :func:`lipbook.lab.training.train`, with Adam.
    attack : int
        Test digits that are attacked.

    Returns
    -------
    tuple of dict
        Results: ``radius``, ``group_size``, ``scores`` of the epochs, and ``test``, see
        :func:`~lipbook.lab.evaluation.summary`. Tensors: the network.
    """
    torch.manual_seed(seed)
    sizes = (784, width, width, 10)
    model = networks.dense(sizes, group_size, linear=InfinityNormLinear)
    history = train(
        model,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        loss=OffsetCrossEntropyLoss(margin_for_radius(radius, p=math.inf), RADII[radius]),
        optimizer=torch.optim.Adam,
        schedule="linear",
        validation=validation,
        score=certified_score(radius, math.inf),
        seed=seed,
        progress=progress,
    )
    tensors = networks.packed(model)
    stored = networks.rebuilt("dense", (sizes, group_size), tensors)
    images, labels = digits.test_images, digits.test_labels
    test = summary(stored, images, labels, EPSILONS, math.inf, attack)
    return {
        "radius": radius,
        "group_size": group_size,
        "scores": history.scores,
        "test": test,
    }, tensors


def run(
    *,
    radii: Sequence[float] = tuple(RADII),
    group_sizes: Sequence[int] = GROUP_SIZES,
    width: int = 256,
    epochs: int = 10,
    lr: float = 1e-2,
    attack: int = 1000,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train and certify a network for each radius and group size.

    Parameters
    ----------
    radii : sequence of float
        Keys of ``RADII``.
    group_sizes : sequence of int
        Of GroupSort.
    width, epochs, lr, attack
        As in :func:`row`.
    seed : int
        Of weights and batches, the same for all.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``networks``, the last one, with ``shipped``, the
        summary on the digits that ship. Tensors: that network, for
        :func:`lipbook.lab.networks.load`.
    """
    rows = rows or Rows()
    digits, few = mnist(full=True), mnist()
    table: list[dict[str, Any]] = []
    kinds = list(itertools.product(radii, group_sizes))
    for radius, size in rows.bar(kinds, "networks"):
        one = functools.partial(
            row, digits, radius, size, width=width, epochs=epochs, lr=lr, attack=attack, seed=seed
        )
        key = f"radius-{radius:g}-groups-of-{size}"
        results, state = rows.compute(key, one)
        table.append(results)
    arguments = [[784, width, width, 10], size]
    stored = networks.rebuilt("dense", arguments, state)
    again = summary(stored, few.test_images, few.test_labels, EPSILONS, math.inf, 100)
    facts = {"architecture": "dense", "arguments": arguments, "p": "inf", "shipped": again}
    tensors = {f"{key}/{name}": value for name, value in state.items()}
    return {"networks": {key: facts}, "rows": table}, tensors
