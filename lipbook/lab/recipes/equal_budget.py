r"""Nine convolutions that are 1-Lipschitz, and a dense layer, for equal processor seconds.

The networks of :mod:`lipbook.lab.recipes.convolution_gallery`, which differ in the constrained
layer only, with two layers more, block reflectors (BRO) and shifts of channels between orthogonal
matrices, and a dense one, 576-256-256-256-10 with orthonormal weights. There, networks of a
hundred steps are compared, at a rate that nobody chose; here each trains for the same processor
seconds of one thread, whatever a step of it costs, at a rate chosen for it. All train on the middle
24 × 24 pixels of digits in batches of 128, with the offset cross-entropy and Adam, whose rate falls
to 0 linearly *in time*. What counts is the time of the training alone: batches, steps, and the
computation of weights from parameters.

The rate is chosen among four, for each layer, on 5,000 training digits drawn at random, after a
training on the other 55,000, for the mean of clean and certified accuracy. Networks are then
trained on all 60,000, from three seeds each, and certified on the 10,000 test digits: in float64,
but as in real arithmetic, since the Fourier transforms of the Cayley layer and of block reflectors
have no bound of their rounding here.

Where a training stops depends on the machine and on what else it does: two runs differ a little,
even with the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.convolutions import BlockReflectorConv2d, ShiftConv2d
from lipbook.export import freeze
from lipbook.lab import networks
from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows, convolution_gallery
from lipbook.lab.recipes.mnist_trade_off import LOSSES
from lipbook.lab.recipes.speedrun import timed
from lipbook.lab.recipes.waterfall import halves, spread
from lipbook.lab.records import Record

__all__ = [
    "BUDGET",
    "EPSILONS",
    "LAYERS",
    "RATES",
    "SEEDS",
    "Entry",
    "compare",
    "entries",
    "row",
    "run",
    "score",
    "train_for",
]

#: Processor seconds of a training.
BUDGET = 12.0
#: Rates to choose from.
RATES = (0.001, 0.003, 0.01, 0.03)
#: Seeds behind each number.
SEEDS = 3
#: Radii at which accuracies are certified; at 0 it is the clean accuracy.
EPSILONS = (0.0, 1.0, 1.58)
CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    **{name: make for name, (make, _) in convolution_gallery.LAYERS.items()},
    "BRO": lambda channels, size: BlockReflectorConv2d(channels, channels, 3, image_size=size),
    "shift": lambda channels, _: ShiftConv2d(channels, channels),
}
#: Names of the layers that are compared.
LAYERS = (*CONVOLUTIONS, "dense")
BATCH = 128
RADIUS = 1.2  # whose margin the loss asks for
LOSS = LOSSES["offset cross-entropy"][0](RADIUS)
SIZE = 24  # of the middle of a digit


def train_for(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seconds: float,
    lr: float,
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, float]:
    r"""Train until the time is up, with Adam at a rate that falls to 0 when it is.

    After :math:`t` of :math:`T` seconds the rate is :math:`\eta (1 - t / T)`. The step that is
    begun is finished.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, and left in evaluation mode.
    images, labels : torch.Tensor
        At least 128.
    seconds : float
        :math:`T`, positive.
    lr : float
        :math:`\eta`.
    loss : callable
        ``loss(outputs, labels)``.
    seed : int
        Of the order of the images.
    clock : callable
        Tells the time in seconds.

    Returns
    -------
    epochs : float
        Passes over the images.
    seconds : float
        That they took.

    Raises
    ------
    ValueError
        There is less than a batch, or no time.

    Examples
    --------
    >>> from lipbook.lab.data import mnist
    >>> images, labels = (part[:512] for part in mnist()[:2])
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    >>> ticks = itertools.count()
    >>> loss = nn.CrossEntropyLoss()
    >>> train_for(
    ...     model, images, labels, seconds=8, lr=0.01, loss=loss, clock=lambda: next(ticks)
    ... )
    (1.75, 8)
    """
    batches = len(images) // BATCH
    if not batches:
        raise ValueError(f"images: expected {BATCH} or more, got {len(images)}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    descent = torch.optim.Adam(model.parameters(), lr=lr)
    rng = np.random.default_rng(seed)
    model.train()
    start = clock()
    for step in itertools.count():
        spent = clock() - start
        if spent >= seconds:
            break
        if step % batches == 0:
            order = torch.from_numpy(rng.permutation(len(images)))
        batch = order[step % batches * BATCH :][:BATCH]
        descent.param_groups[0]["lr"] = lr * (1 - spent / seconds)
        descent.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
        descent.step()
    model.eval()
    return step / batches, spent


def row(
    layer: str,
    fitted: Sequence[Tensor],
    judges: Sequence[Tensor],
    *,
    lr: float,
    budget: float = BUDGET,
    size: int = SIZE,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    epsilons: Sequence[float] = EPSILONS,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> Outcome:
    """Train one network and certify it.

    Parameters
    ----------
    layer : str
        One of :data:`LAYERS`.
    fitted, judges : sequence of torch.Tensor
        Images and labels, to train on and to certify on.
    lr, seed, clock
        As in :func:`train_for`; the seed is also that of the weights.
    loss : callable, optional
        As there; the offset cross-entropy of the radius 1.2 unless given.
    budget : float
        Seconds of the training.
    size : int
        Of the middle of an image that a network sees, a multiple of 4.
    epsilons : sequence of float
        Radii at which accuracies are certified.

    Returns
    -------
    tuple of dict
        Results: ``layer``, ``lr``, ``seed``; ``epochs``; ``seconds``; ``count`` of the images that
        judged; ``certified`` accuracy at each of the radii. No tensors.

    Raises
    ------
    ValueError
        There is no such layer.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer: expected one of {LAYERS}, got {layer!r}")
    torch.manual_seed(seed)
    channels, border = fitted[0].shape[1], (fitted[0].shape[-1] - size) // 2
    if layer == "dense":
        model = networks.dense((channels * size**2, 256, 256, 256, 10))
    else:
        model = convolution_gallery.network(CONVOLUTIONS[layer], channels, size)
    middle = (..., *2 * (slice(border, border + size),))
    images, labels = fitted[0][middle].contiguous(), fitted[1]
    train = functools.partial(
        train_for, model, images, labels,
        seconds=budget, lr=lr, loss=loss or LOSS, seed=seed, clock=clock,
    )  # fmt: skip
    (epochs, seconds), _ = timed(train)
    images, labels = judges
    found = certificate(freeze(model.double()), images[middle].double(), labels, sound=False)
    return {
        "layer": layer, "lr": lr, "seed": seed, "epochs": epochs, "seconds": round(seconds, 2),
        "count": len(images),
        "certified": [found.certified_accuracy(epsilon).value for epsilon in epsilons],
    }, {}  # fmt: skip


def compare(
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    layers: Sequence[str],
    rates: Sequence[float],
    budget: float,
    seeds: int,
    validation: int,
    seed: int,
    rows: Rows | None,
    epsilons: Sequence[float] = EPSILONS,
    **sizes: Any,
) -> Outcome:
    """Choose a rate for each layer, then train it from all seeds.

    Parameters
    ----------
    data : tuple of torch.Tensor
        Images and labels to train on, and to test.
    layers : sequence of str
        Some of :data:`LAYERS`.
    rates : sequence of float
        To choose from.
    budget : float
        Seconds of a training.
    seeds : int
        Trainings of each layer.
    validation : int
        How many of the training images, drawn by the seed, choose. Nothing is trained on them.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.
    epsilons, **sizes
        As in :func:`row`.

    Returns
    -------
    tuple of dict
        Results: ``budget``; ``epsilons``; ``judged``, rows of :func:`row` on validation images;
        ``rows``, those on the test images. No tensors.

    Raises
    ------
    ValueError
        ``validation`` is no number of the images.
    """
    rows = rows or Rows()
    whole, test = data[:2], data[2:]
    held_out, fitted = halves(*whole, validation, seed)
    sizes |= {"budget": budget, "epsilons": epsilons}
    judged: list[dict[str, Any]] = []
    scores: dict[str, dict[float, float]] = {layer: {} for layer in layers}
    for layer, lr in rows.bar(list(itertools.product(layers, rates)), "choices"):
        one = functools.partial(row, layer, fitted, held_out, lr=lr, seed=seed, **sizes)
        results, _ = rows.compute(f"judged {layer} {lr}", one)
        judged.append(results)
        scores[layer][lr] = score(results)
    table = []
    jobs = list(itertools.product(range(seed, seed + seeds), layers))
    for each, layer in rows.bar(jobs, "networks"):
        lr = max(scores[layer], key=lambda rate: scores[layer][rate])
        one = functools.partial(row, layer, whole, test, lr=lr, seed=each, **sizes)
        table.append(rows.compute(f"{layer} seed {each}", one)[0])
    return {"budget": budget, "epsilons": epsilons, "judged": judged, "rows": table}, {}


def run(
    *,
    layers: Sequence[str] = LAYERS,
    rates: Sequence[float] = RATES,
    budget: float = BUDGET,
    seeds: int = SEEDS,
    validation: int = 5000,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each layer on digits, then train it from all seeds.

    Parameters
    ----------
    layers, rates, budget, seeds, validation, seed, rows
        As in :func:`compare`.

    Returns
    -------
    tuple of dict
        Of :func:`compare`.
    """
    return compare(
        mnist(full=True), layers=layers, rates=rates, budget=budget, seeds=seeds,
        validation=validation, seed=seed, rows=rows,
    )  # fmt: skip


def score(results: Mapping[str, Any]) -> float:
    """Mean of clean accuracy and of that certified at the largest radius.

    Parameters
    ----------
    results : mapping
        Of :func:`row`.

    Returns
    -------
    float
    """
    return float(results["certified"][0] + results["certified"][-1]) / 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a table says of one layer.

    Attributes
    ----------
    layer : str
    lr : float
        That was chosen.
    epochs, seconds : float
        Means of the trainings.
    certified : tuple
        For each of :data:`EPSILONS`, mean and standard deviation over the seeds, on all test
        digits.
    """

    layer: str
    lr: float
    epochs: float
    seconds: float
    certified: tuple[tuple[float, float], ...]


def entries(record: Record) -> dict[str, Entry]:
    """Read the layers of a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("equal_budget")``.

    Returns
    -------
    dict
        An entry for each layer, in order of :data:`LAYERS`.

    Raises
    ------
    ValueError
        A layer is missing or unknown, or has not each of the seeds once, or has more than one rate.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> [*entries(records.read("equal_budget"))][:3]
    ['BCOP', 'SOC', 'Cayley']
    """
    rows = record.results["rows"]
    wanted = sorted({one["seed"] for one in rows})
    found = {}
    for layer in LAYERS:
        mine = [one for one in rows if one["layer"] == layer]
        seeds = sorted(one["seed"] for one in mine)
        rates = {one["lr"] for one in mine}
        if seeds != wanted or len(seeds) < 2 or len(rates) > 1:
            raise ValueError(
                f"record {record.name!r}: expected each of the seeds {wanted} once for {layer}, "
                f"two at least, at one rate, got {seeds} at {rates}"
            )
        found[layer] = Entry(
            layer,
            rates.pop(),
            statistics.mean(one["epochs"] for one in mine),
            statistics.mean(one["seconds"] for one in mine),
            tuple(
                spread(values) for values in zip(*(one["certified"] for one in mine), strict=True)
            ),
        )
    if unknown := {one["layer"] for one in rows} - {*LAYERS}:
        raise ValueError(f"record {record.name!r}: unknown layers {unknown}")
    return found
