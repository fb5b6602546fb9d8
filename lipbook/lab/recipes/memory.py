r"""Memory of recurrent layers: the copying problem, and gradients at the first input.

Five letters of an alphabet of four come first, then as many blanks as the *delay* says, then five
steps in which the letters have to be said again, in order. The last letter carries a mark. A matrix
reads what the layer hands out in the last five steps. Chance is a quarter.

Four recurrent layers with states of 43 units:

- *lossless*: :class:`~lipbook.sequences.LosslessRNN`, of whose outputs, five a step, the matrix
  reads; from random weights;
- *orthogonal*: the tanh layer of :class:`~lipbook.lab.recipes.pixel_digits.OrthogonalRNN`, whose
  U stays orthogonal;
- *orthogonal start*: that of torch, tanh, from an orthogonal U;
- *LSTM*: that of torch, from its own initial weights.

Each learns in the same number of steps of Adam, on new sequences in batches of 32, at a rate that
falls to 0. The first rate is chosen by the letters that are recalled of other new sequences, with
the first seed; then two more layers are trained at it. Sequences of a third generator judge them.

Beside it stands the norm of a gradient. A random direction is handed to what is read at the first
recall, and the norm that arrives at the first input is averaged over sequences and directions, at
delays from 10 to 1,000, before training and after training at the shortest delay. For the lossless
layer at random weights :func:`expected` says how it falls.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.pixel_digits import OrthogonalRNN
from lipbook.lab.records import Record
from lipbook.sequences import LosslessRNN

__all__ = [
    "DELAYS",
    "LENGTHS",
    "NETWORKS",
    "RATES",
    "Recall",
    "copying",
    "expected",
    "fit",
    "first_gradient",
    "recalled",
    "row",
    "run",
    "summary",
]

#: Layers, as the page shows them.
NETWORKS = ("lossless", "orthogonal", "orthogonal start", "LSTM")
#: Delays that are learnt.
DELAYS = (30, 100)
#: Delays at which gradients are measured.
LENGTHS = (10, 30, 100, 300, 1000)
#: First rates to choose from.
RATES = (0.003, 0.01)
LETTERS, SYMBOLS, HIDDEN = 4, 5, 43
INPUTS = LETTERS + 1  # the mark
SEEDS = 3
JUDGED = 500  # sequences


def copying(count: int, delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences of the copying problem.

    Parameters
    ----------
    count : int
        Sequences.
    delay : int
        Blanks between the last letter and the first recall.
    generator : torch.Generator

    Returns
    -------
    tuple of torch.Tensor
        Sequences, (count, 5 + delay + 5, 5): a letter is one of four unit vectors, a blank is 0,
        and the fifth entry marks the last letter; and the letters, (count, 5), from 0 to 3.

    Examples
    --------
    >>> x, letters = copying(2, 30, torch.Generator().manual_seed(0))
    >>> x.shape, torch.equal(x[:, :5, :4].argmax(2), letters), x[:, 5:].count_nonzero().item()
    (torch.Size([2, 40, 5]), True, 0)

    References
    ----------
    The problem: :cite:t:`arjovsky2016unitary`, with ten letters, and a signal when to recall them.
    """
    letters = torch.randint(LETTERS, (count, SYMBOLS), generator=generator)
    x = torch.zeros(count, SYMBOLS + delay + SYMBOLS, INPUTS)
    x[:, :SYMBOLS, :LETTERS] = functional.one_hot(letters, LETTERS).float()
    x[:, SYMBOLS - 1, LETTERS] = 1
    return x, letters


class Recall(nn.Module):
    """Recurrent layer and a matrix that reads it in the last five steps.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.

    Raises
    ------
    ValueError
        There is no such network.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"name: expected one of {NETWORKS}, got {name!r}")
        layer: Any
        if name == "lossless":
            layer = LosslessRNN(INPUTS, HIDDEN, batch_first=True)
        elif name == "orthogonal":
            layer = OrthogonalRNN(INPUTS, HIDDEN)
        else:
            kind = nn.LSTM if name == "LSTM" else nn.RNN
            layer = kind(INPUTS, HIDDEN, batch_first=True)
            if name == "orthogonal start":
                nn.init.orthogonal_(layer.weight_hh_l0)
        self.layer = layer
        self.read = nn.Linear(INPUTS if name == "lossless" else HIDDEN, LETTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits (batch, 5, 4) of the letters."""
        return self.read(self.layer(x)[0][:, -SYMBOLS:])


def fit(name: str, delay: int, *, lr: float, steps: int = 500, seed: int = 0) -> Recall:
    """Train a network on new sequences in each step.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    delay : int
        As in :func:`copying`.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    steps : int
        Batches of 32 sequences.
    seed : int
        Of weights and sequences.

    Returns
    -------
    Recall
        In evaluation mode.
    """
    torch.manual_seed(seed)
    model = Recall(name)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x, letters = copying(32, delay, generator)
        loss = functional.cross_entropy(model(x).flatten(0, 1), letters.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def recalled(model: nn.Module, delay: int, seed: int) -> float:
    """Give the part of letters that a network recalls, of 500 new sequences.

    Parameters
    ----------
    model : torch.nn.Module
        A :class:`Recall`.
    delay : int
        As in :func:`copying`.
    seed : int
        Of the sequences.

    Returns
    -------
    float
    """
    x, letters = copying(JUDGED, delay, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return (model(x).argmax(2) == letters).float().mean().item()


def first_gradient(model: Recall, delay: int, seed: int = 0) -> float:
    """Norm of the gradient at the first input of what is read at the first recall.

    Parameters
    ----------
    model : Recall
        The matrix that reads is not part of it.
    delay : int
        As in :func:`copying`.
    seed : int
        Of 16 sequences, and of a direction of norm 1 for each.

    Returns
    -------
    float
        Root of the mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    x = copying(16, delay, generator)[0].requires_grad_()
    read = model.layer(x)[0][:, -SYMBOLS]
    handed = functional.normalize(torch.randn(read.shape, generator=generator), dim=1)
    (gradient,) = torch.autograd.grad((read * handed).sum(), x)
    return gradient[:, 0].norm(dim=1).square().mean().sqrt().item()


def expected(delay: int) -> float:
    r"""Give what :func:`first_gradient` is expected to be of a lossless layer at random weights.

    Steps that are independent uniform rotations send the part c / (h + c) of a square to the
    outputs, of c entries, and keep the part h / (h + c) in the state, of h entries. What is read at
    step t = delay + 5 has stayed t times and left once:

    .. math:: \sqrt{\tfrac{c}{h + c}} \left(\sqrt{\tfrac{h}{h + c}}\right)^{t}

    Parameters
    ----------
    delay : int
        As in :func:`copying`.

    Returns
    -------
    float

    Examples
    --------
    >>> [float(f"{expected(delay):.1g}") for delay in (30, 100, 300)]
    [0.05, 0.001, 2e-08]
    """
    whole = HIDDEN + INPUTS
    return math.sqrt(INPUTS / whole * (HIDDEN / whole) ** (delay + SYMBOLS))


def row(name: str, delay: int, *, lr: float, steps: int = 500, seed: int = 0) -> Outcome:
    """Train a network and measure what it recalls.

    Parameters
    ----------
    name, delay, lr, steps, seed
        As in :func:`fit`.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``delay``, ``lr``, ``seed``; the parts of letters recalled, of
        ``validation`` and ``test`` sequences; ``gradients`` at :data:`LENGTHS` for a network that
        learnt the shortest delay, else none. No tensors.
    """
    model = fit(name, delay, lr=lr, steps=steps, seed=seed)
    found = [first_gradient(model, n) for n in LENGTHS] if delay == min(DELAYS) else []
    return {
        "name": name, "delay": delay, "lr": lr, "seed": seed,
        "validation": recalled(model, delay, 1000), "test": recalled(model, delay, 2000),
        "gradients": found,
    }, {}  # fmt: skip


def start(name: str, seed: int) -> Outcome:
    """Measure gradients before training.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    seed : int
        Of the weights.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``seed`` and ``gradients`` at :data:`LENGTHS`. No tensors.
    """
    torch.manual_seed(seed)
    model = Recall(name)
    gradients = [first_gradient(model, n) for n in LENGTHS]
    return {"name": name, "seed": seed, "gradients": gradients}, {}


def run(
    *,
    delays: Sequence[int] = DELAYS,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    steps: int = 500,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each layer and delay, then train it from all seeds.

    Parameters
    ----------
    delays : sequence of int
        As in :func:`copying`.
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
        Results: ``start``, gradients before training; ``tried``, rows of :func:`row` of all rates;
        ``rows``, those of the chosen rate. No tensors.
    """
    rows = rows or Rows()
    first = [
        rows.compute(f"start {name} seed {each}", functools.partial(start, name, each))[0]
        for name in NETWORKS
        for each in range(seed, seed + seeds)
    ]
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for delay, name in rows.bar(list(itertools.product(delays, NETWORKS)), "layers"):
        one = functools.partial(row, name, delay, steps=steps)
        each = range(seed, seed + seeds)
        trials, best = rows.chosen(
            f"{name} delay {delay}", one, rates, each, lambda made: made["validation"]
        )
        tried += trials
        chosen += best
    return {"start": first, "tried": tried, "rows": chosen}, {}


def summary(record: Record) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("memory")``.

    Returns
    -------
    dict
        For each layer and delay the rate, and mean and standard deviation over the seeds of the
        part of letters recalled of test sequences.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> sorted(summary(records.read("memory")))[0]
    ('LSTM', 30)
    """
    cells: dict[tuple[str, int], list[Any]] = {}
    for one in record.results["rows"]:
        cells.setdefault((one["name"], one["delay"]), []).append(one)
    found = {}
    for cell, mine in cells.items():
        values = [one["test"] for one in mine]
        found[cell] = mine[0]["lr"], statistics.mean(values), statistics.stdev(values)
    return found
