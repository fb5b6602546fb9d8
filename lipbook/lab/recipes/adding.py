r"""Adding problem: two numbers out of a hundred, marked where they come, have to be summed.

A step of a sequence is a number, uniform from 0 to 1, and a mark. One number of the first half is
marked and one of the second, and the answer is the sum of the two. Who always says 1 has the mean
squared error 1/6.

Two marked numbers can move together, and no other pair of sequences tells more: as a function of
sequences in the 2-norm the answer is Lipschitz with the constant :math:`\sqrt2`.

Three recurrent layers with states of 63 units, of whose last state an ordinary matrix reads the
answer, so that a constant is allowed:

- *lossless*: :class:`~lipbook.sequences.LosslessRNN`, which hands out one number a step;
- *orthogonal*: :class:`~lipbook.lab.recipes.pixel_digits.OrthogonalRNN`, from a bias of 0 and a
  third of the usual weights of inputs, so that tanh begins near its linear part;
- *LSTM*: that of torch, the bias of its forget gate at 1 in the beginning.

Each learns in 1,500 steps of Adam, on new sequences in batches of 32, at a rate that falls to 0.
Lengths grow from 10 to 100 in the first four fifths of the steps. The rate is chosen by the error
on other new sequences, with the first seed; then two more layers are trained at it. Sequences of a
third generator judge them, of the length that was learnt, of three times and of ten times that.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.pixel_digits import Last, OrthogonalRNN
from lipbook.lab.records import Record
from lipbook.sequences import LosslessRNN

__all__ = [
    "BASELINE",
    "LENGTHS",
    "NETWORKS",
    "PARTS",
    "RATES",
    "adding",
    "fit",
    "mean_squared_error",
    "network",
    "row",
    "run",
    "summary",
]

#: Layers, as the page shows them.
NETWORKS = ("lossless", "orthogonal", "LSTM")
#: Length that is learnt, and longer ones.
LENGTHS = (100, 300, 1000)
#: First rates to choose from.
RATES = (0.003, 0.01)
#: Mean squared error of the answer 1, which is the variance of a sum of two uniform numbers.
BASELINE = 1 / 6
HIDDEN = 63
SHORT = 10  # length of the first sequences
GROWING = 0.8  # part of the steps in which lengths grow
#: Parts of a training of which errors are recorded.
PARTS = 10
SEEDS = 3
JUDGED = 1000  # sequences


def adding(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences of the adding problem.

    Parameters
    ----------
    count : int
        Sequences.
    length : int
        Steps, at least 2.
    generator : torch.Generator

    Returns
    -------
    tuple of torch.Tensor
        Sequences (count, length, 2) of numbers and marks; and sums (count,) of the marked numbers.

    Examples
    --------
    >>> x, answer = adding(2, 100, torch.Generator().manual_seed(0))
    >>> x.shape, x[:, :50, 1].sum(1), x[:, 50:, 1].sum(1)
    (torch.Size([2, 100, 2]), tensor([1., 1.]), tensor([1., 1.]))
    >>> torch.equal(answer, x.prod(2).sum(1))
    True

    References
    ----------
    :cite:t:`arjovsky2016unitary`.
    """
    half = length // 2
    numbers = torch.rand(count, length, generator=generator)
    first = torch.randint(half, (count, 1), generator=generator)
    second = torch.randint(half, length, (count, 1), generator=generator)
    marks = torch.zeros(count, length).scatter_(1, torch.cat([first, second], 1), 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


def network(name: str) -> nn.Sequential:
    """Build a network.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.

    Returns
    -------
    torch.nn.Sequential
        From sequences (batch, length, 2) to answers (batch, 1).

    Raises
    ------
    ValueError
        There is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"name: expected one of {NETWORKS}, got {name!r}")
    layer: Any
    if name == "lossless":
        layer = LosslessRNN(2, HIDDEN, batch_first=True, output_size=1)
    elif name == "orthogonal":
        layer = OrthogonalRNN(2, HIDDEN)
        nn.init.zeros_(layer.entering.bias)
        layer.entering.weight.data /= 3
    else:
        layer = nn.LSTM(2, HIDDEN, batch_first=True)
        nn.init.ones_(layer.bias_ih_l0.data[HIDDEN : 2 * HIDDEN])
    return nn.Sequential(Last(layer), nn.Linear(HIDDEN, 1))


def fit(
    name: str,
    *,
    lr: float,
    length: int = LENGTHS[0],
    steps: int = 1500,
    until: int | None = None,
    seed: int = 0,
) -> tuple[nn.Sequential, list[float]]:
    """Train a network on new sequences in each step.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    length : int
        Of the last sequences.
    steps : int
        Batches of 32 sequences.
    until : int, optional
        Number of steps after which to stop; all of them if not given.
    seed : int
        Of weights and sequences.

    Returns
    -------
    tuple
        The network, a :class:`torch.nn.Sequential` in evaluation mode with the orthogonal layer as
        one of torch; and mean squared errors of its batches, the means of :data:`PARTS` equal parts
        of all steps.
    """
    torch.manual_seed(seed)
    model = network(name)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    errors = []
    for step in range(steps if until is None else until):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        grown = min(1.0, step / (GROWING * steps))
        x, answer = adding(32, round(SHORT + (length - SHORT) * grown), generator)
        loss = (model(x).squeeze(1) - answer).square().mean()
        errors.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if name == "orthogonal":
        reader: Any = model[0]
        reader.layer = reader.layer.plain()
    part = steps // PARTS
    means = [statistics.mean(errors[i : i + part]) for i in range(0, len(errors), part)]
    return model.requires_grad_(False).eval(), means


def mean_squared_error(model: nn.Module, length: int, seed: int) -> float:
    """Give the mean squared error of a network's answers to 1,000 new sequences.

    Parameters
    ----------
    model : torch.nn.Module
        From sequences to answers.
    length : int
        As in :func:`adding`.
    seed : int
        Of the sequences.

    Returns
    -------
    float

    Examples
    --------
    >>> always_one = lambda x: torch.ones(len(x), 1)
    >>> abs(mean_squared_error(always_one, 100, 0) - BASELINE) < 0.02
    True
    """
    x, answer = adding(JUDGED, length, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return (model(x).squeeze(1) - answer).square().mean().item()


def row(name: str, *, lr: float, steps: int = 1500, seed: int = 0) -> Outcome:
    """Train a network and measure its errors.

    Parameters
    ----------
    name, lr, steps, seed
        As in :func:`fit`.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``lr``, ``seed``; the ``errors`` of training by :func:`fit`; mean squared
        errors, ``validation`` at the length that was learnt and ``test`` at :data:`LENGTHS`; the
        ``bound`` of the network by the library at the length that was learnt, ``None`` if it is
        beyond the numbers of float64. No tensors.
    """
    model, errors = fit(name, lr=lr, steps=steps, seed=seed)
    bound = lipschitz_bound(model, (LENGTHS[0], 2)).value
    return {
        "name": name, "lr": lr, "seed": seed, "errors": errors,
        "validation": mean_squared_error(model, LENGTHS[0], 1000),
        "test": [mean_squared_error(model, length, 2000) for length in LENGTHS],
        "bound": bound if math.isfinite(bound) else None,
    }, {}  # fmt: skip


def run(
    *,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    steps: int = 1500,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each layer, then train it from all seeds.

    Parameters
    ----------
    rates : sequence of float
        To choose from.
    seeds : int
        Trainings of each layer.
    steps : int
        As in :func:`fit`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``lengths``; ``tried``, results of all rates; ``rows``, those of the chosen
        rate. No tensors.
    """
    rows = rows or Rows()
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for name in rows.bar(NETWORKS, "layers"):
        one = functools.partial(row, name, steps=steps)
        each = range(seed, seed + seeds)
        trials, best = rows.chosen(name, one, rates, each, lambda made: -made["validation"])
        tried += trials
        chosen += best
    return {"lengths": list(LENGTHS), "tried": tried, "rows": chosen}, {}


def summary(record: Record) -> dict[str, dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("adding")``.

    Returns
    -------
    dict
        For each layer the rate ``lr``, the largest ``bound``, infinite where one was beyond
        float64, and as ``test`` for each length of :data:`LENGTHS` the mean and the standard
        deviation of the mean squared error over the seeds.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> list(summary(records.read("adding")))
    ['lossless', 'orthogonal', 'LSTM']
    """
    found: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        mine = [one for one in record.results["rows"] if one["name"] == name]
        errors = zip(*(one["test"] for one in mine), strict=True)
        bounds = [math.inf if one["bound"] is None else one["bound"] for one in mine]
        found[name] = {
            "lr": mine[0]["lr"], "bound": max(bounds),
            "test": [(statistics.mean(each), statistics.stdev(each)) for each in errors],
        }  # fmt: skip
    return found
