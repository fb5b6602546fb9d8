r"""The trade-off between accuracy and radius on MNIST, along margins, offsets and temperatures.

One architecture (784-256-256-10, orthonormal weights, MaxMin) and one training, but for the loss:
the multi-class hinge of several margins, the offset cross-entropy of several offsets at one
temperature, and the tempered cross-entropy without an offset. Each row is one network, certified
soundly on all 10,000 test digits. The grid of each family goes on at one end until the accuracy
certified at 1.58 falls again, and at the other until clean accuracy no longer rises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lipbook.lab.data import Mnist, mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows, mnist_best
from lipbook.losses import MultiMarginLoss, OffsetCrossEntropyLoss, margin_for_radius

__all__ = ["LOSSES", "EPSILONS", "run", "row"]

Loss = Callable[[Tensor, Tensor], Tensor]


def _hinge(radius: float) -> Loss:
    return MultiMarginLoss(margin_for_radius(radius))


def _offset(radius: float) -> Loss:
    return OffsetCrossEntropyLoss(margin_for_radius(radius), 0.2)


def _tempered(temperature: float) -> Loss:
    return OffsetCrossEntropyLoss(0.0, temperature)


#: For each family of losses, how a number makes a loss, and the numbers. The first two take the
#: radius whose margin is asked for, the last one the temperature.
LOSSES: dict[str, tuple[Callable[[float], Loss], tuple[float, ...]]] = {
    "multi-margin": (_hinge, (0.1, 0.3, 0.75, 1.5, 2.5, 4.0, 6.0)),
    "offset cross-entropy": (_offset, (0.1, 0.3, 0.75, 1.2, 1.6, 2.5, 4.0, 6.0)),
    "tempered cross-entropy": (_tempered, (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)),
}
#: Radii at which accuracies are certified.
EPSILONS = (*(round(0.1 * k, 1) for k in range(31)), 1.58)


def row(
    digits: Mnist,
    family: str,
    number: float,
    *,
    width: int = 256,
    epochs: int = 8,
    lr: float = 0.08,
    precision: str = "bfloat16",
    validation: int = 5000,
    seed: int = 0,
) -> Outcome:
    """Train and certify one network.

    Parameters
    ----------
    digits : Mnist
        To train and to test on.
    family : str
        Key of ``LOSSES``.
    number : float
        Of the loss.
    width : int
        Units of both hidden layers.
    epochs, lr, precision, validation, seed
        As in :func:`lipbook.lab.recipes.mnist_best.fit`.

    Returns
    -------
    tuple of dict
        Results: ``family``, ``number``, and ``certified``, the accuracy at each of ``EPSILONS``.
        No tensors.
    """
    make, _ = LOSSES[family]
    model, _ = mnist_best.fit(
        (784, width, width, 10),
        digits.train_images,
        digits.train_labels,
        loss=make(number),
        epsilon=number if family != "tempered cross-entropy" else 0.5,
        epochs=epochs,
        lr=lr,
        precision=precision,
        validation=validation,
        seed=seed,
    )
    found = certificate(model, digits.test_images, digits.test_labels)
    certified = [found.certified_accuracy(epsilon).value for epsilon in EPSILONS]
    return {"family": family, "number": number, "certified": certified}, {}


def run(
    *,
    epochs: int = 8,
    lr: float = 0.08,
    precision: str = "bfloat16",
    families: Sequence[str] = tuple(LOSSES),
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train all networks.

    Parameters
    ----------
    epochs, lr, precision
        As in :func:`row`.
    families : sequence of str
        Keys of ``LOSSES``.
    seed : int
        Of weights and batches, the same for all.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``epsilons``, and ``rows``, those of :func:`row`. No tensors.
    """
    rows = rows or Rows()
    digits = mnist(full=True)
    kinds = [(family, number) for family in families for number in LOSSES[family][1]]
    table: list[dict[str, Any]] = []
    for family, number in rows.bar(kinds, "networks"):
        one = functools.partial(
            row, digits, family, number, epochs=epochs, lr=lr, precision=precision, seed=seed
        )
        table.append(rows.compute(f"{family} {number:g}", one)[0])
    return {"epsilons": list(EPSILONS), "rows": table}, {}
