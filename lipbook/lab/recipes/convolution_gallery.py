r"""Seven convolutions that are 1-Lipschitz, at equal steps and at equal multiply-adds.

The experiment of the chapter on convolutions from several seeds. Networks differ in the constrained
layer only: the middle 24 × 24 pixels of a digit; invertible downsampling to 16 channels of 6 × 6
pixels; three layers with 3 × 3 taps, MaxMin after each; an orthogonal linear layer. They train with
Adam at a rate that falls to 0, on the hinge loss with margin :math:`\sqrt 2`, in steps of 50
digits, each of them seen once. A seed sets weights and the order of the digits. No rate is tuned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.convolutions import (
    CayleyConv2d,
    NonexpansiveConv2d,
    OrthogonalConv2d,
    SkewOrthogonalConv2d,
)
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import train
from lipbook.orthogonal import OrthogonalLinear
from lipbook.pooling import InvertibleDownsampling
from lipbook.residual import CPLConv2d, SLLConv2d

__all__ = ["BUDGET", "LAYERS", "network", "row", "run"]

#: Steps of each network at equal steps; and at equal multiply-adds those of a plain convolution.
BUDGET = 100
#: Each layer, made for a number of channels and a size of images, and the multiply-adds of its
#: step, in steps of a plain convolution, as the chapter counts them.
LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], float]] = {
    "BCOP": (lambda channels, _: OrthogonalConv2d(channels, channels, 3), 1.0),
    "SOC": (lambda channels, _: SkewOrthogonalConv2d(channels, channels, 3), 8.0),
    "Cayley": (lambda channels, size: CayleyConv2d(channels, channels, 3, image_size=size), 0.5),
    "AOL": (lambda channels, _: NonexpansiveConv2d(channels, channels, 3), 1.0),
    "RKO": (lambda channels, _: NonexpansiveConv2d(channels, channels, 3, method="rko"), 1.0),
    "SLL": (lambda channels, _: SLLConv2d(channels), 2.0),
    "CPL": (lambda channels, _: CPLConv2d(channels), 2.0),
}
BATCH = 50
RATE = 0.01
SHIFT = 1e-3  # of all parameters: an orthogonal kernel is a kink of AOL


def row(digits: Mnist, layer: str, steps: int, *, seed: int = 0) -> Outcome:
    """Train one network in float64 and certify it at distance 1.

    Parameters
    ----------
    digits : Mnist
        To train and to test on.
    layer : str
        Key of ``LAYERS``.
    steps : int
        Of training, at most as many as there are batches of 50 digits.
    seed : int
        Of weights and of the order of the digits.

    Returns
    -------
    tuple of dict
        Results: ``layer``, ``steps``, ``seed``, ``certified``, the share of the test digits. No
        tensors.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        model = network(LAYERS[layer][0])
    finally:
        torch.set_default_dtype(default)
    middle = (..., slice(2, 26), slice(2, 26))
    few = slice(0, BATCH * steps)
    train(
        model,
        digits.train_images[middle][few].double(),
        digits.train_labels[few],
        epochs=1,
        lr=RATE,
        batch_size=BATCH,
        loss=_hinge,
        optimizer=torch.optim.Adam,
        schedule="cosine",
        seed=seed,
    )
    found = certificate(model, digits.test_images[middle].double(), digits.test_labels, sound=False)
    share = found.certified_accuracy(1.0).value
    return {"layer": layer, "steps": steps, "seed": seed, "certified": share}, {}


def network(
    make: Callable[[int, int], nn.Module], channels: int = 1, size: int = 24
) -> nn.Sequential:
    """Build a network, its weights drawn by torch's generator in the default dtype.

    Parameters
    ----------
    make : callable
        Gives a layer for a number of channels and a size of images, as those of ``LAYERS``.
    channels, size : int
        Of the images, which invertible downsampling makes four times smaller.

    Returns
    -------
    torch.nn.Sequential
        Downsampling, three layers, and a linear one.
    """
    layers: list[nn.Module] = [InvertibleDownsampling(4)]
    for _ in range(3):
        layers += [make(16 * channels, size // 4), MaxMin()]
    model = nn.Sequential(*layers, nn.Flatten(), OrthogonalLinear(channels * size**2, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(SHIFT * torch.randn_like(parameter))
    return model


def _hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    return 10 * functional.multi_margin_loss(outputs, targets, margin=math.sqrt(2))


def run(
    *,
    layers: Sequence[str] = tuple(LAYERS),
    budget: int = BUDGET,
    seeds: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train each layer from several seeds, at equal steps and at equal multiply-adds.

    Parameters
    ----------
    layers : sequence of str
        Keys of ``LAYERS``.
    budget : int
        Steps, and multiply-adds in steps of a plain convolution.
    seeds : int
        Trainings of each.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``budget``, and ``rows``, those of :func:`row` (one where both budgets are the
        same). No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    grid = [
        (layer, steps, each)
        for each in range(seed, seed + seeds)
        for layer in layers
        for steps in dict.fromkeys((budget, int(budget / LAYERS[layer][1])))
    ]
    table: list[dict[str, Any]] = []
    for layer, steps, each in rows.bar(grid, "networks"):
        one = functools.partial(row, digits, layer, steps, seed=each)
        table.append(rows.compute(f"{layer} {steps} steps seed {each}", one)[0])
    return {"budget": budget, "rows": table}, {}
