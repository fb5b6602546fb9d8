r"""The layers of :mod:`lipbook.lab.recipes.equal_budget` on colour images, for equal seconds.

The networks are the same, but see whole images of 3 × 32 × 32, which downsampling makes 48 channels
of 8 × 8 pixels; the dense one is 3072-256-256-256-10. The loss is that of
:mod:`lipbook.lab.recipes.speedrun_cifar10`. Images are a lossy copy (JPEG) of CIFAR-10, as ``data``
says, with 5,000 of the training images to choose rates on; the 10,000 test images are certified at
36/255.
"""

from __future__ import annotations

from collections.abc import Sequence

from lipbook.lab.data import cifar10
from lipbook.lab.recipes import Outcome, Rows, equal_budget
from lipbook.losses import OffsetCrossEntropyLoss

__all__ = ["BUDGET", "EPSILONS", "run"]

#: Processor seconds of a training.
BUDGET = 12.0
#: Radii at which accuracies are certified; at 0 it is the clean accuracy.
EPSILONS = (0.0, 36 / 255)
LOSS = OffsetCrossEntropyLoss(0.65, 0.2)


def run(
    *,
    layers: Sequence[str] = equal_budget.LAYERS,
    rates: Sequence[float] = equal_budget.RATES,
    budget: float = BUDGET,
    seeds: int = equal_budget.SEEDS,
    validation: int = 5000,
    jpeg: bool = True,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each layer, then train it from all seeds.

    Parameters
    ----------
    layers, rates, budget, seeds, validation, seed, rows
        As in :func:`lipbook.lab.recipes.equal_budget.compare`.
    jpeg : bool
        As in :func:`lipbook.lab.data.cifar10`.

    Returns
    -------
    tuple of dict
        Results of :func:`lipbook.lab.recipes.equal_budget.compare`, and ``data``. No tensors.
    """
    images = cifar10(jpeg=jpeg)
    results, tensors = equal_budget.compare(
        images[:4], layers=layers, rates=rates, budget=budget, seeds=seeds,
        validation=validation, seed=seed, rows=rows, epsilons=EPSILONS, size=32, loss=LOSS,
    )  # fmt: skip
    return {"data": images.name, **results}, tensors
