r"""Bounds of whole networks against time: widths 16 to 256, depths 2 to 8.

Networks of ReLUs for digits of 7 × 7 pixels (means of blocks of the digits that ship), trained
without any constraint, and two with orthonormal weights and MaxMin. Every method of
:func:`lipbook.composition.lipschitz_bound` bounds each of them, with its processor time; a lower
bound with two points as its witness stands beside.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
from lipbook.composition.bounds import MethodName
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import accuracy, train
from lipbook.orthogonal import OrthogonalLinear

__all__ = ["ENUMERATED", "METHODS", "SIZES", "network", "row", "run", "tiny_digits"]

#: Methods, from the cheapest on.
METHODS: tuple[MethodName, ...] = (
    *("product", "absolute", "averaged", "eclipse", "seqlip", "lipsdp-layer", "lipsdp", "exact"),
)
#: Most hidden units for the exact constant.
ENUMERATED = 16
#: Kind, width of the hidden layers, and number of linear layers.
SIZES = (
    *(("ReLU", width, depth) for width in (16, 64, 256) for depth in (2, 4, 8)),
    ("MaxMin", 64, 4),
    ("MaxMin", 64, 8),
)


def tiny_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the digits that ship as 7 × 7 pixels: training images and labels, test images, labels.

    Returns
    -------
    tuple of torch.Tensor
        Images (n, 49) in float64, labels (n,).
    """
    digits = mnist()
    images = [functional.avg_pool2d(x, 4).flatten(1).double() for x in (digits[0], digits[2])]
    return images[0], digits.train_labels, images[1], digits.test_labels


def network(kind: str, width: int, depth: int, epochs: int = 5, seed: int = 0) -> nn.Sequential:
    """Train a network 49-width-...-width-10.

    Parameters
    ----------
    kind : str
        ``"ReLU"``, without a constraint, or ``"MaxMin"``, with orthonormal weights.
    width, depth : int
        Units of a hidden layer, and number of linear layers.
    epochs : int
        Of Adam at the rate 0.003, on 12,000 digits.
    seed : int
        Of weights and batches.

    Returns
    -------
    torch.nn.Sequential
        In float64 and evaluation mode.
    """
    torch.manual_seed(seed)
    linear, activation = {"ReLU": (nn.Linear, nn.ReLU), "MaxMin": (OrthogonalLinear, MaxMin)}[kind]
    sizes = [49, *[width] * (depth - 1), 10]
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [linear(n, m), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    images, labels, *_ = tiny_digits()
    train(model, images, labels, epochs=epochs, lr=3e-3, optimizer=torch.optim.Adam, seed=seed)
    return model


def row(
    kind: str,
    width: int,
    depth: int,
    *,
    epochs: int = 5,
    methods: Sequence[MethodName] = METHODS,
    seed: int = 0,
) -> Outcome:
    """Bound one network by all methods.

    Parameters
    ----------
    kind, width, depth, epochs, seed
        As in :func:`network`.
    methods : sequence of str
        Of ``METHODS``.

    Returns
    -------
    tuple of dict
        Results: ``kind``, ``width``, ``depth``, test ``accuracy``; ``lower``, the lower bound; and
        ``bounds``, for each method its ``value`` and ``seconds``, or why it was ``refused``. No
        tensors.
    """
    model = network(kind, width, depth, epochs, seed)
    *_, images, labels = tiny_digits()
    bounds: dict[str, dict[str, Any]] = {}
    for method in methods:
        if method == "exact" and width * (depth - 1) > ENUMERATED:
            bounds[method] = {"refused": f"not tried with more than {ENUMERATED} hidden units"}
            continue
        start = time.process_time()
        try:
            value = lipschitz_bound(model, (49,), method=method).value
        except ValueError as error:
            bounds[method] = {"refused": str(error)}
        else:
            bounds[method] = {"value": value, "seconds": time.process_time() - start}
    lower = lipschitz_lower_bound(model, images[:64]).value
    return {
        "kind": kind,
        "width": width,
        "depth": depth,
        "accuracy": accuracy(model, images, labels),
        "lower": lower,
        "bounds": bounds,
    }, {}


def run(
    *,
    sizes: Sequence[Sequence[Any]] = SIZES,
    epochs: int = 5,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Bound all networks.

    Parameters
    ----------
    sizes : sequence
        As ``SIZES``.
    epochs : int
        As in :func:`network`.
    seed : int
        Of weights and batches.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`. No tensors.
    """
    rows = rows or Rows()
    table = []
    for kind, width, depth in rows.bar(sizes, "networks"):
        one = functools.partial(row, kind, width, depth, epochs=epochs, seed=seed)
        table.append(rows.compute(f"{kind} {width} {depth}", one)[0])
    return {"rows": table}, {}
