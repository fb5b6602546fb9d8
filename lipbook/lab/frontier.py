r"""How far the field is: published accuracies of Lipschitz networks, with their conditions.

All are deterministic certificates in the 2-norm, of test images with pixels in [0, 1], in per cent
and as first published. None was made here. ``seen`` says where we read a number: in the ``paper``,
in the ``repository`` of its authors, or in a ``secondary`` source, which is to be doubted.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["LOOKED_UP", "PUBLISHED", "RADII", "Published", "entries"]

#: When the numbers were looked up.
LOOKED_UP = "2026-11-28"
#: Radii, in the order of the certified accuracies of an entry.
RADII = ("36/255", "72/255", "108/255", "1")


class Published(NamedTuple):
    r"""Accuracies of one network.

    Parameters
    ----------
    dataset : str
        Name of the images.
    network : str
        Name of the network, with the number of its parameters where we know it.
    source : str
        Key in ``book/references.bib``.
    generated : str
        Generated training images: their number, ``"yes"``, ``"no"``, or ``"?"`` where the source
        that we read does not say.
    clean : float
        Accuracy, in per cent.
    certified : tuple
        Certified accuracies at the first of ``RADII``, in per cent; None where there is none.
    seen : str
        ``"paper"``, ``"repository"`` or ``"secondary"``.
    settings : str
        Size and budget, where the configuration in the authors' repository says them.
    """

    dataset: str
    network: str
    source: str
    generated: str
    clean: float
    certified: tuple[float | None, ...]
    seen: str
    settings: str = ""

    @property
    def cells(self) -> list[str]:
        """Clean and certified accuracies for a table, with † if the source is secondary."""
        numbers = [self.clean, *self.certified]
        mark = "†" if self.seen == "secondary" else ""
        cells = ["" if number is None else f"{number:.1f}{mark}" for number in numbers]
        return cells + [""] * (1 + len(RADII) - len(cells))


def entries(dataset: str) -> list[Published]:
    r"""List what is published on one data set.

    Parameters
    ----------
    dataset : str
        ``"CIFAR-10"``, ``"CIFAR-100"``, ``"Tiny-ImageNet"`` or ``"ImageNet"``.

    Returns
    -------
    list of Published
        Oldest first.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> entries("CIFAR-10")[0].cells
    ['72.4', '58.7', '', '', '']
    """
    found = [entry for entry in PUBLISHED if entry.dataset == dataset]
    if not found:
        known = sorted({entry.dataset for entry in PUBLISHED})
        raise ValueError(f"dataset must be one of {known}, got {dataset!r}")
    return found


_cifar10 = functools.partial(Published, "CIFAR-10")
_cifar100 = functools.partial(Published, "CIFAR-100")
_tiny = functools.partial(Published, "Tiny-ImageNet")
_imagenet = functools.partial(Published, "ImageNet")
#: By data set, oldest first.
PUBLISHED = [
    _cifar10("BCOP, Large", "li2019preventing", "no", 72.4, (58.7,), "repository"),
    _cifar10("Cayley, Large", "trockman2021", "no", 75.3, (59.2,), "paper"),
    _cifar10("SOC-25", "singla2021soc", "no", 76.4, (61.9,), "paper"),
    _cifar10(
        "SOC-15, certificate loss", "singla2022improved", "no", 76.4, (63.0, 48.5, 35.5), "paper"
    ),
    _cifar10("CPL-XL", "meunier2022cpl", "no", 78.5, (64.4, 48.0, 33.0), "paper"),
    _cifar10("AOL, Large", "prach2022aol", "no", 71.6, (64.0, 56.4, 49.0, 23.7), "paper"),
    _cifar10("SLL-XL", "araujo2023sll", "no", 73.3, (65.8, 58.4, 51.3, 27.3), "paper"),
    _cifar10("LiResNet", "hu2023liresnet", "no", 81.0, (69.8, 56.3, 42.9), "secondary"),
    _cifar10(
        "LiResNet++",
        "hu2024recipe",
        "4 million",
        87.0,
        (78.1, 66.6, 53.5),
        "repository",
        "12 blocks of 512 channels, 800 epochs",
    ),
    _cifar10(
        "BRONet-L",
        "lai2025bro",
        "no",
        81.6,
        (70.6, 57.2, 42.5),
        "paper",
        "12 blocks of 512 channels, 800 epochs, 1 GPU",
    ),
    _cifar10(
        "LiResNet, BRO, annealing",
        "lai2025bro",
        "4 million",
        87.2,
        (78.3, 67.4, 54.5),
        "paper",
        "12 blocks of 512 channels, 800 epochs, 2 GPUs",
    ),
    _cifar10("LipNeXt, 64 million", "hu2026lipnext", "?", 81.5, (71.2, 59.2, 45.9), "secondary"),
    _cifar10("LipNeXt, 256 million", "hu2026lipnext", "?", 85.0, (73.2, 58.8, 43.3), "secondary"),
    _cifar100("LiResNet", "hu2023liresnet", "no", 53.0, (40.2, 28.3, 19.2), "secondary"),
    _cifar100("LiResNet++", "hu2024recipe", "yes", 62.1, (50.1, 38.5, 29.0), "repository"),
    _cifar100("BRONet", "lai2025bro", "no", 54.3, (40.2, 29.1, 20.3), "secondary", "1 GPU"),
    _cifar100("LipNeXt, 256 million", "hu2026lipnext", "?", 57.4, (44.1, 31.9, 22.2), "secondary"),
    _tiny("LiResNet++", "hu2024recipe", "yes", 48.4, (37.0, 26.8, 18.6), "repository"),
    _tiny("BRONet", "lai2025bro", "no", 41.2, (29.0, 19.0, 12.1), "secondary", "2 GPUs"),
    _tiny("LipNeXt, 256 million", "hu2026lipnext", "?", 45.5, (35.0, 25.9, 18.0), "secondary"),
    _imagenet("LiResNet", "hu2023liresnet", "no", 45.6, (35.0, None, None, 14.2), "secondary"),
    _imagenet(
        "LiResNet++",
        "hu2024recipe",
        "yes",
        49.0,
        (38.3,),
        "repository",
        "12 blocks of 588 channels, 400 epochs",
    ),
    _imagenet(
        "BRONet",
        "lai2025bro",
        "no",
        49.3,
        (37.6,),
        "secondary",
        "14 blocks of 588 channels, 400 epochs, 8 GPUs",
    ),
    _imagenet(
        "LipNeXt, 1 billion", "hu2026lipnext", "?", 55.9, (40.3, None, None, 21.1), "secondary"
    ),
    _imagenet(
        "LipNeXt, 2 billion", "hu2026lipnext", "?", 57.0, (41.2, None, None, 22.4), "secondary"
    ),
]
