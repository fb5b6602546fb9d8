r"""Generalisation from 30 and 100 digits a class, and from labels that mean nothing.

*Small data.* A standard ReLU network, the same with weight decay, with dropout and with a margin
loss, and a 1-Lipschitz network (orthonormal weights, MaxMin, the same margin loss) learn few
digits. All are dense, 784-128-128-10 without biases, and have as many settings to choose from. The
choice is made on 1,000 other training digits, and the test digits are looked at once, after it.

*Labels.* A ReLU network and a 1-Lipschitz one learn 1,000 digits with their labels, and with the
same labels shuffled; what is kept are quantiles of their margins, as they are and normalised by
the spectral complexity.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.generalization import data_norm, margins, normalized_margins, spectral_complexity
from lipbook.lab import networks
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.descent import StiefelMuon
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import accuracy, train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius

__all__ = ["LEVELS", "METHODS", "Method", "choose", "fit", "interval", "run", "subset", "learn"]

WIDTH = 128
HELD_OUT = 1000  # training digits, the last ones, on which settings are chosen
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Method:
    """How to train one kind of network, and the settings to choose from.

    Parameters
    ----------
    settings : tuple of float
        What is chosen on held-out digits.
    meaning : str
        What a setting is.
    lipschitz : bool
        Whether weights are orthonormal and activations MaxMin; else they are free, with ReLU.
    """

    settings: tuple[float, ...]
    meaning: str
    lipschitz: bool = False


#: The methods, each with three settings. A radius is that whose margin the offset cross-entropy, at
#: a temperature of 0.2, asks for.
METHODS = {
    "standard": Method((3e-4, 1e-3, 3e-3), "learning rate"),
    "weight decay": Method((0.3, 1.0, 3.0), "decay"),
    "dropout": Method((0.2, 0.4, 0.6), "rate"),
    "margin loss": Method((0.5, 1.0, 2.0), "radius"),
    "Lipschitz": Method((0.5, 1.0, 2.0), "radius", lipschitz=True),
}
#: Levels of the quantiles of margins that are kept.
LEVELS = tuple(round(0.05 * k, 2) for k in range(21))


def subset(digits: Mnist, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw training digits, as many of each class, and none of the last 1,000.

    Parameters
    ----------
    digits : Mnist
        To draw from.
    per_class : int
        Digits of each class.
    seed : int
        Of the draw.

    Returns
    -------
    tuple of torch.Tensor
        Images and labels, class by class.

    Examples
    --------
    >>> images, labels = subset(mnist(), 3, seed=0)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([30, 1, 28, 28]), [3, 3, 3, 3, 3, 3, 3, 3, 3, 3])
    """
    rng = np.random.default_rng(seed)
    pool = digits.train_labels[:-HELD_OUT].numpy()
    drawn = [rng.choice(np.flatnonzero(pool == c), per_class, replace=False) for c in range(10)]
    chosen = torch.from_numpy(np.concatenate(drawn))
    return digits.train_images[chosen], digits.train_labels[chosen]


def fit(
    method: str, setting: float, images: Tensor, labels: Tensor, *, epochs: int = 60, seed: int = 0
) -> nn.Sequential:
    """Train one network, with Adam or, among orthonormal weights, with Muon.

    Parameters
    ----------
    method : str
        Key of ``METHODS``.
    setting : float
        One of its settings, or another.
    images, labels : torch.Tensor
        To learn.
    epochs : int
        Passes over them in batches of 50, with a cosine schedule.
    seed : int
        Of weights, batches and dropout.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode.
    """
    torch.manual_seed(seed)
    loss: Loss = nn.functional.cross_entropy
    rate, optimizer = 1e-3, functools.partial(torch.optim.AdamW, weight_decay=0.0)
    if method in ("margin loss", "Lipschitz"):
        loss = OffsetCrossEntropyLoss(margin_for_radius(setting), 0.2)
    if METHODS[method].lipschitz:
        sizes = (784, WIDTH, WIDTH, 10)
        model = networks.dense(sizes, linear=functools.partial(nn.Linear, bias=False))
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
        rate, optimizer = 0.05, StiefelMuon  # type: ignore[assignment]
    else:
        model = _relu(setting if method == "dropout" else 0.0)
        rate = setting if method == "standard" else rate
        if method == "weight decay":
            optimizer = functools.partial(torch.optim.AdamW, weight_decay=setting)
    train(
        model, images, labels, epochs=epochs, lr=rate, batch_size=50, loss=loss,
        optimizer=optimizer, schedule="cosine", seed=seed,
    )  # fmt: skip
    return model


def _relu(dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for n in (784, WIDTH):
        layers += [nn.Linear(n, WIDTH, bias=False), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10, bias=False))


def learn(digits: Mnist, method: str, shuffled: bool, *, epochs: int, seed: int) -> Outcome:
    """Learn 1,000 digits with their labels or with shuffled ones, and measure the margins.

    Parameters
    ----------
    digits : Mnist
        To learn from and to test on.
    method : str
        ``"standard"`` at the rate 0.001, or ``"Lipschitz"`` at the radius 1.
    shuffled : bool
        Whether the labels are permuted.
    epochs, seed
        As in :func:`fit`; the seed is that of the draw and of the permutation, too.

    Returns
    -------
    tuple of dict
        Results: errors of training and test, ``product`` of the norms and ``complexity``,
        quantiles at ``LEVELS`` of ``margins`` and of ``normalized`` margins. No tensors.
    """
    images, labels = subset(digits, 100, seed)
    if shuffled:
        labels = labels[torch.from_numpy(np.random.default_rng([seed, 1]).permutation(1000))]
    setting = 1.0 if METHODS[method].lipschitz else 1e-3
    model = fit(method, setting, images, labels, epochs=epochs, seed=seed)
    complexity = spectral_complexity(model, images.shape[1:])
    with torch.no_grad():
        logits = model(images)
    kinds = {
        "margins": margins(logits, labels),
        "normalized": normalized_margins(logits, labels, complexity, data_norm(images)),
    }
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return {
        "train_error": 1 - accuracy(model, images, labels),
        "test_error": 1 - accuracy(model, digits.test_images, digits.test_labels),
        "product": complexity.product,
        "complexity": complexity.value,
    } | {name: values.quantile(levels).tolist() for name, values in kinds.items()}, {}


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    r"""Mean of independent runs, and half the length of its t-interval.

    .. math:: \bar v \pm t_{n - 1}\, \frac{s}{\sqrt n}

    Parameters
    ----------
    values : sequence of float
        Two numbers or more.
    confidence : float
        Of the interval, if the numbers are normal.

    Returns
    -------
    tuple of float
        :math:`\bar v`, and what is added and subtracted.

    Raises
    ------
    ValueError
        If there are fewer than two values.

    Examples
    --------
    >>> mean, half = interval([0.1, 0.2, 0.3])
    >>> f"{mean:.2f} ± {half:.4f}"
    '0.20 ± 0.2484'
    """
    from scipy.stats import t  # noqa: PLC0415 - slow to import

    n = len(values)
    if n < 2:
        raise ValueError(f"values must be two or more, got {n}")
    half = t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def choose(runs: Sequence[dict[str, float]]) -> float:
    """Choose the setting with the least mean error on held-out digits, the first of equal ones.

    Parameters
    ----------
    runs : sequence of dict
        With ``setting`` and ``validation``.

    Returns
    -------
    float

    Examples
    --------
    >>> errors = ((1.0, 0.2), (1.0, 0.4), (2.0, 0.25), (2.0, 0.3))
    >>> choose([{"setting": setting, "validation": error} for setting, error in errors])
    2.0
    """
    settings = dict.fromkeys(run["setting"] for run in runs)

    def error(setting: float) -> float:
        return float(np.mean([run["validation"] for run in runs if run["setting"] == setting]))

    return min(settings, key=error)


def run(
    *,
    per_class: Sequence[int] = (30, 100),
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 6,
    choosing: int = 3,
    epochs: int = 60,
    fits: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train all networks.

    Parameters
    ----------
    per_class : sequence of int
        Digits of each class.
    methods : sequence of str
        Keys of ``METHODS``.
    seeds : int
        Networks with the setting chosen, each with digits, weights and batches of its own.
    choosing : int
        How many of the seeds try every setting.
    epochs : int
        Of each network; for shuffled labels and the true ones beside them 40 more.
    fits : int
        Seeds of the experiment on labels.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``cells`` with ``per_class``, ``method``, the ``setting`` chosen, ``tried`` (runs
        on held-out digits), ``test`` (errors of the seeds), their ``mean`` and the ``half`` length
        of its 95 % interval; ``labels`` with ``method``, ``shuffled``, ``seed`` and what
        :func:`learn` returns. No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    grid = [(k, name) for k in per_class for name in methods]
    cells: list[dict[str, Any]] = []
    for k, name in rows.bar(grid, "cells"):
        row = functools.partial(_row, digits, name, k, epochs=epochs)
        errors: dict[tuple[float, int], dict[str, float]] = {}
        for s, i in itertools.product(METHODS[name].settings, range(seed, seed + choosing)):
            one = functools.partial(row, s, seed=i)
            errors[s, i] = rows.compute(f"{k} {name} {s:g} seed {i}", one)[0]
        tried = [
            {"setting": s, "seed": i, "validation": found["validation"]}
            for (s, i), found in errors.items()
        ]
        best = choose(tried)
        for i in range(seed + choosing, seed + seeds):
            one = functools.partial(row, best, seed=i)
            errors[best, i] = rows.compute(f"{k} {name} {best:g} seed {i}", one)[0]
        test = [errors[best, i]["test"] for i in range(seed, seed + seeds)]
        mean, half = interval(test)
        cells.append(
            {"per_class": k, "method": name, "setting": best, "tried": tried, "test": test}
            | {"mean": mean, "half": half}
        )
    labels: list[dict[str, Any]] = []
    kinds = list(
        itertools.product(("standard", "Lipschitz"), (False, True), range(seed, seed + fits))
    )
    for name, shuffled, i in rows.bar(kinds, "labels"):
        more = functools.partial(learn, digits, name, shuffled, epochs=epochs + 40, seed=i)
        found, _ = rows.compute(f"labels {name} {shuffled} seed {i}", more)
        labels.append({"method": name, "shuffled": shuffled, "seed": i} | found)
    return {"cells": cells, "labels": labels, "epochs": epochs, "levels": list(LEVELS)}, {}


def _row(
    digits: Mnist, method: str, per_class: int, setting: float, *, epochs: int, seed: int
) -> Outcome:
    images, labels = subset(digits, per_class, seed)
    model = fit(method, setting, images, labels, epochs=epochs, seed=seed)
    held_out = digits.train_images[-HELD_OUT:], digits.train_labels[-HELD_OUT:]
    return {
        "validation": 1 - accuracy(model, *held_out),
        "test": 1 - accuracy(model, digits.test_images, digits.test_labels),
    }, {}
