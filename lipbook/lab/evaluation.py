"""What a record says of a robust classifier: certified from below, attacked from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, distributed, nn

from lipbook.attacks import Bounds, attacked_accuracy
from lipbook.robustness import Certificate, certify

__all__ = ["certificate", "certified_score", "summary"]

BATCH = 500


def _batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def certificate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    p: float = 2,
    sound: bool = True,
    group: distributed.ProcessGroup | None = None,
) -> Certificate:
    """Certify a network on images, batch by batch.

    Parameters
    ----------
    model, images, labels, p, sound, group
        As in :func:`lipbook.robustness.certify`, with all images in one tensor.

    Returns
    -------
    lipbook.robustness.Certificate
    """
    return certify(model, _batches(images, labels), images.shape[1:], p, sound=sound, group=group)


def certified_score(epsilon: float, p: float = 2) -> Callable[[nn.Module, Tensor, Tensor], float]:
    r"""Make a score for choosing an epoch: the mean of clean and certified accuracy.

    Parameters
    ----------
    epsilon : float
        Radius of the certified accuracy.
    p : float
        Exponent of the norm.

    Returns
    -------
    callable
        ``score(model, images, labels)`` in [0, 1], in real arithmetic.
    """

    def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
        found = certificate(model.eval(), images, labels, p, sound=False)
        return (found.certified_accuracy(0).value + found.certified_accuracy(epsilon).value) / 2

    return score


def summary(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    p: float = 2,
    attack: int = 1000,
    bounds: Bounds | None = None,
) -> dict[str, Any]:
    """Collect what a record keeps of a network.

    Parameters
    ----------
    model, images, labels, p
        As in :func:`certificate`.
    epsilons : sequence of float
        Radii.
    attack : int
        How many of the first images are attacked, one at least.
    bounds : (low, high), optional
        Box of the points that the attack may visit, two numbers; the whole space without it.

    Returns
    -------
    dict
        ``count``; ``clean`` accuracy; ``certified``, sound in floating point, for each of
        ``epsilons``; ``attacked`` and ``certified_of_attacked`` for each on the first images;
        ``mean_radius`` of the right predictions; ``bounds`` if they were given.
    """
    box = {} if bounds is None else {"bounds": [float(side) for side in bounds]}
    attack = min(attack, len(images))
    batches = _batches(images[:attack], labels[:attack])
    found = certificate(model, images, labels, p)
    first = Certificate(found.radius[:attack], found.predictions[:attack], labels[:attack], p, True)
    return {
        "p": str(p),
        "count": len(images),
        "clean": found.certified_accuracy(0).value,
        "epsilons": list(epsilons),
        "certified": [found.certified_accuracy(e).value for e in epsilons],
        "attack_count": attack,
        "attacked": [
            attacked_accuracy(model, batches, e, p, bounds=bounds).value for e in epsilons
        ],
        "certified_of_attacked": [first.certified_accuracy(e).value for e in epsilons],
        "mean_radius": found.radius[found.correct].mean().item(),
        **box,
    }
