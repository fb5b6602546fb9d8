r"""Five networks for the ∞-norm on MNIST, for equal processor seconds.

Three keep every layer 1-Lipschitz in the ∞-norm and are certified by their margins, soundly for the
program in float32: rows of absolute sum 1 (:class:`~lipbook.orthogonal.InfinityNormLinear`) with
MaxMin or GroupSort, distances (:class:`~lipbook.distances.InfinityDistance`;
:cite:t:`zhang2021linfdist`), and sums of sorted deviations (SortNet; :cite:t:`zhang2022boolean`).
The last is a plain ReLU network trained with intervals (:cite:t:`gowal2018ibp`) and certified by
them: in float64, rounded outwards, for the network in real arithmetic and for pixels in [0, 1].

All see the middle 24 × 24 pixels through the largest of each 2 × 2, which is 1-Lipschitz in this
norm, and have two hidden layers. Each trains for the same processor seconds of one thread for a
radius of 0.3, at a rate chosen among two by the first seed on 5,000 training digits on which
nothing is trained. Networks of the papers are larger and train far longer. Units of distances
begin at digits here, and are centered by batches; there is no relaxation of the norm.

Where a training stops depends on the machine and on what else it does: two runs differ a little,
even with the same seed.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.attacks import attacked_accuracy
from lipbook.distances import InfinityDistance
from lipbook.export import freeze
from lipbook.lab import networks
from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.speedrun import timed
from lipbook.lab.recipes.waterfall import halves, spread
from lipbook.lab.records import Record
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.normalization import BatchCentering
from lipbook.orthogonal import InfinityNormLinear, Scale
from lipbook.rules import Range, range_rule

__all__ = [
    "BUDGET",
    "EPSILONS",
    "METHODS",
    "PUBLISHED",
    "RATES",
    "SEEDS",
    "certified_by_intervals",
    "entries",
    "network",
    "row",
    "run",
    "train",
]

#: Processor seconds of a training.
BUDGET = 12.0
#: Rates to choose from.
RATES = (0.003, 0.01)
#: Seeds behind each number.
SEEDS = 3
#: Radii in the ∞-norm; at 0 it is the clean accuracy.
EPSILONS = (0.0, 0.1, 0.3)
#: Names of the methods, and digits in a batch of each.
METHODS = {
    "rows of sum 1, MaxMin": 128,
    "rows of sum 1, GroupSort(16)": 128,
    "∞-distances": 64,
    "SortNet, decay 0.1": 64,
    "ReLU, trained by intervals": 128,
}
#: What the papers certify at 0.3, with larger networks and far longer training.
PUBLISHED = {"∞-distances": 0.931, "SortNet, decay 0.1": 0.934}
RADIUS = 0.3  # that all train for
TEMPERATURE = 0.2  # of the offset cross-entropy
INPUTS = 144


def network(method: str, digits: Tensor, seed: int = 0) -> nn.Sequential:
    """Build a network of one method.

    Parameters
    ----------
    method : str
        Key of :data:`METHODS`.
    digits : torch.Tensor
        At least 128, (count, 1, 24, 24): units of distances begin at some of them.
    seed : int
        Of the weights.

    Returns
    -------
    torch.nn.Sequential
        From (batch, 1, 24, 24) to ten logits; the first two layers have no parameters.

    Raises
    ------
    ValueError
        There is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, got {method!r}")
    torch.manual_seed(seed)
    pool, flat = nn.MaxPool2d(2), nn.Flatten()
    if method.startswith("rows"):
        size = 2 if "MaxMin" in method else 16
        return nn.Sequential(
            pool, *networks.dense((INPUTS, 256, 256, 10), size, linear=InfinityNormLinear)
        )
    sizes = list(itertools.pairwise((INPUTS, 128, 128, 10)))
    if method.startswith("ReLU"):
        layers = [part for n, m in sizes for part in (nn.Linear(n, m), nn.ReLU())]
        return nn.Sequential(pool, flat, *layers[:-1])
    decay = 0.1 if method.startswith("SortNet") else 0.0
    units: list[Any] = [
        part
        for n, m in sizes
        for part in (InfinityDistance(n, m, decay, bias=False), BatchCentering(m))
    ]
    with torch.no_grad():
        some = digits[torch.randperm(len(digits))[:128]]
        units[0].weight.copy_(flat(pool(some)))
    return nn.Sequential(pool, flat, *units, Scale(-1.0))


def _lipschitz_loss(layers: nn.Module, x: Tensor, labels: Tensor, share: float) -> Tensor:
    loss = OffsetCrossEntropyLoss(margin_for_radius(RADIUS, p=math.inf), TEMPERATURE)
    found: Tensor = loss(layers(x), labels)
    return found


def _interval_loss(layers: Any, x: Tensor, labels: Tensor, share: float) -> Tensor:
    """Mix the loss of the worst logits, whose share grows to 1/2 while the radius grows."""
    ramp = min(1.0, 2 * share)
    low, high = (x - ramp * RADIUS).clamp(min=0), (x + ramp * RADIUS).clamp(max=1)
    *hidden, last = layers
    middle, half = (low + high) / 2, (high - low) / 2
    for layer in hidden:
        if isinstance(layer, nn.Linear):
            middle, half = layer(middle), functional.linear(half, layer.weight.abs())
        else:
            low, high = layer(middle - half), layer(middle + half)
            middle, half = (low + high) / 2, (high - low) / 2
    rows = last.weight - last.weight[labels][:, None]
    worst = last(middle) - last(middle).gather(1, labels[:, None])
    worst = worst + (rows.abs() * half[:, None]).sum(-1)
    plain, robust = (functional.cross_entropy(z, labels) for z in (layers(x), worst))
    return (1 - ramp / 2) * plain + ramp / 2 * robust


def train(
    model: nn.Sequential,
    images: Tensor,
    labels: Tensor,
    *,
    seconds: float,
    lr: float,
    batch: int,
    loss: Callable[[nn.Module, Tensor, Tensor, float], Tensor] = _lipschitz_loss,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> float:
    r"""Train until the time is up, with Adam at a rate that falls to 0 when it is.

    Parameters
    ----------
    model : torch.nn.Sequential
        Changed in place, and left in evaluation mode. Its first two layers have no parameters and
        are applied once.
    images, labels : torch.Tensor
        At least a batch.
    seconds : float
        Positive.
    lr : float
        The rate at the start.
    batch : int
        Images of a step.
    loss : callable
        ``loss(layers, inputs, labels, share)`` of the other layers, and the share of the time that
        is spent.
    seed : int
        Of the order of the images.
    clock : callable
        Tells the time in seconds.

    Returns
    -------
    float
        Passes over the images.

    Raises
    ------
    ValueError
        There is less than a batch, or no time.
    """
    if len(images) < batch:
        raise ValueError(f"images: expected {batch} or more, got {len(images)}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    inputs, layers = model[:2](images), model[2:]
    descent = torch.optim.Adam(layers.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-10)
    rng, batches = np.random.default_rng(seed), len(images) // batch
    model.train()
    start = clock()
    for step in itertools.count():
        share = (clock() - start) / seconds
        if share >= 1:
            break
        if step % batches == 0:
            order = torch.from_numpy(rng.permutation(len(images)))
        chosen = order[step % batches * batch :][:batch]
        descent.param_groups[0]["lr"] = lr * (1 - share)
        descent.zero_grad()
        loss(layers, inputs[chosen], labels[chosen], share).backward()
        descent.step()
    model.eval()
    return step / batches


@torch.no_grad()
def certified_by_intervals(
    model: nn.Sequential, images: Tensor, labels: Tensor, epsilon: float
) -> Tensor:
    r"""Certify a network by intervals: which images keep their label within a radius.

    .. math:: \min_{x'} (w_y - w_j)^\top h(x') + b_y - b_j > 0 \quad\text{for all } j \ne y

    with :math:`h(x')` in the box that intervals give for all :math:`x'` in
    :math:`[0, 1]^n` with :math:`\lVert x' - x\rVert_\infty \le \varepsilon`. In float64, rounded
    outwards: a proof for the network in real arithmetic.

    Parameters
    ----------
    model : torch.nn.Sequential
        In float64, the last layer linear; all layers have a range rule.
    images, labels : torch.Tensor
        In float64, in [0, 1], and their classes.
    epsilon : float
        The radius.

    Returns
    -------
    torch.Tensor
        Booleans, (batch,).

    References
    ----------
    :cite:t:`gowal2018ibp`, with the last layer eliminated.

    Examples
    --------
    >>> plane = nn.Linear(2, 2, dtype=torch.float64)
    >>> _ = plane.weight.data.copy_(torch.eye(2))
    >>> _ = plane.bias.data.zero_()
    >>> model = nn.Sequential(nn.Identity(), plane)
    >>> images, labels = torch.tensor([[0.9, 0.4]]).double(), torch.tensor([0])
    >>> [certified_by_intervals(model, images, labels, e).item() for e in (0.2, 0.3)]
    [True, False]
    """
    values = Range((images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1))
    *hidden, last = cast(Any, model)
    for layer in hidden:
        values = range_rule(layer, values)
    found = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = labels == label
        margins = nn.Linear(last.in_features, last.out_features, dtype=torch.float64)
        margins.weight.copy_(last.weight[label] - last.weight)
        margins.bias.copy_(last.bias[label] - last.bias)
        low = range_rule(margins, Range(values.low[mine], values.high[mine])).low
        low[:, label] = math.inf
        found[mine] = (low > 0).all(1)
    return found


def _certified(method: str, model: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
    """Tell which images are certified, (radii, images)."""
    if method.startswith("ReLU"):
        exact = model.double()
        right = exact(images.double()).argmax(1) == labels
        found = [certified_by_intervals(exact, images.double(), labels, e) for e in EPSILONS[1:]]
        model.float()
        return torch.stack([right, *found])
    radii = certificate(model, images, labels, math.inf)
    return torch.stack([radii.correct & (radii.radius >= e) for e in EPSILONS])


def row(
    method: str,
    fitted: Sequence[Tensor],
    chosen: Sequence[Tensor],
    judges: Sequence[Tensor],
    *,
    lr: float,
    seed: int = 0,
    budget: float = BUDGET,
    attack: int = 500,
    steps: int = 10,
    clock: Callable[[], float] = time.process_time,
) -> Outcome:
    """Train one network, certify and attack it.

    Parameters
    ----------
    method : str
        Key of :data:`METHODS`.
    fitted, chosen, judges : sequence of torch.Tensor
        Images of digits and labels: to train on, to choose a rate by, and to certify on.
    lr, seed, clock
        As in :func:`train`; the seed is also that of the weights.
    budget : float
        Seconds of the training.
    attack : int
        How many of the first judges are attacked, within [0, 1].
    steps : int
        Of the attack, projected gradient ascent.

    Returns
    -------
    tuple of dict
        Results: ``method``, ``lr``, ``seed``, ``epochs``, ``seconds``; accuracies at each of
        :data:`EPSILONS`, ``validation``, ``certified`` (of ``count`` judges), ``attacked`` and
        ``certified_of_attacked`` (of ``attack_count``). No tensors.
    """
    parts = [(i[..., 2:26, 2:26].contiguous(), labels) for i, labels in (fitted, chosen, judges)]
    model = network(method, parts[0][0], seed)
    loss = _interval_loss if method.startswith("ReLU") else _lipschitz_loss
    fit = functools.partial(
        train, model, *parts[0], seconds=budget, lr=lr, batch=METHODS[method], loss=loss,
        seed=seed, clock=clock,
    )  # fmt: skip
    epochs, seconds = timed(fit)
    plain: Any = freeze(model)
    validation, test = (_certified(method, plain, *part) for part in parts[1:])
    first = [(images[:attack], labels[:attack]) for images, labels in parts[2:]]
    box: dict[str, Any] = {"bounds": (0.0, 1.0), "steps": steps}
    return {
        "method": method, "lr": lr, "seed": seed, "epochs": epochs, "seconds": round(seconds, 2),
        "validation": validation.double().mean(1).tolist(),
        "count": len(judges[1]), "certified": test.double().mean(1).tolist(),
        "attack_count": min(attack, len(judges[1])),
        "attacked": [attacked_accuracy(plain, first, e, math.inf, **box).value for e in EPSILONS],
        "certified_of_attacked": test[:, :attack].double().mean(1).tolist(),
    }, {}  # fmt: skip


def run(
    *,
    methods: Sequence[str] = tuple(METHODS),
    rates: Sequence[float] = RATES,
    budget: float = BUDGET,
    seeds: int = SEEDS,
    validation: int = 5000,
    attack: int = 500,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each method by the first seed, then train it from all seeds.

    Parameters
    ----------
    methods : sequence of str
        Keys of :data:`METHODS`.
    rates : sequence of float
        To choose from, by the mean of clean accuracy and of that certified at 0.3.
    budget : float
        Seconds of a training.
    seeds : int
        Trainings of each method.
    validation : int
        How many of the training digits, drawn by the seed, choose. Nothing is trained on them.
    attack : int
        As in :func:`row`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``budget``, ``epsilons``; ``tried``, rows of :func:`row` of all rates; ``rows``,
        those of all seeds. No tensors.
    """
    rows = rows or Rows()
    digits = mnist(full=True)
    chosen, fitted = halves(digits.train_images, digits.train_labels, validation, seed)
    tried: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for method in rows.bar(list(methods), "methods"):
        one = functools.partial(
            row, method, fitted, chosen, digits[2:], budget=budget, attack=attack
        )
        places = range(seed, seed + seeds)
        found = rows.chosen(method, one, rates, places, _score)
        tried += found[0]
        table += found[1]
    return {"budget": budget, "epsilons": EPSILONS, "tried": tried, "rows": table}, {}


def _score(results: dict[str, Any]) -> float:
    return float(results["validation"][0] + results["validation"][-1]) / 2


def entries(record: Record) -> dict[str, dict[str, Any]]:
    """Read the methods of a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("infinity_norm")``.

    Returns
    -------
    dict
        For each of :data:`METHODS`: ``lr`` that was chosen, ``epochs``, their mean, and
        ``certified``, for each of :data:`EPSILONS` mean and standard deviation over the seeds.

    Raises
    ------
    ValueError
        A method has not each of the seeds once, or more than one rate.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> [*entries(records.read("infinity_norm"))][2:4]
    ['∞-distances', 'SortNet, decay 0.1']
    """
    rows = record.results["rows"]
    wanted = sorted({one["seed"] for one in rows})
    found = {}
    for method in METHODS:
        mine = [one for one in rows if one["method"] == method]
        seeds, rates = sorted(one["seed"] for one in mine), {one["lr"] for one in mine}
        if seeds != wanted or len(seeds) < 2 or len(rates) > 1:
            raise ValueError(
                f"record {record.name!r}: expected each of the seeds {wanted} once for {method}, "
                f"two at least, at one rate, got {seeds} at {rates}"
            )
        columns = zip(*(one["certified"] for one in mine), strict=True)
        found[method] = {
            "lr": rates.pop(),
            "epochs": statistics.mean(one["epochs"] for one in mine),
            "certified": [spread(values) for values in columns],
        }
    return found
