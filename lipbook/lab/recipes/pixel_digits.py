r"""Digits as sequences: 28 rows, or 49 patches in an order that was shuffled once.

A recurrent layer reads a digit step by step, and a matrix reads the layer. Four networks:

- *lossless, all*: :class:`~lipbook.sequences.LosslessRNN`, of which all outputs and the last state
  are read, with constant 1 by :class:`Everything`;
- *lossless, last*: the same, of which the last state is read;
- *orthogonal*: the tanh layer of :class:`OrthogonalRNN`, last state;
- *LSTM*: that of torch, last state, with an ordinary matrix behind it.

States have 100 entries. *Rows* are 28 steps of 28 pixels. *Patches* are 49 steps of :math:`4 \times
4` pixels, in one random order for all digits. Two sequences are as far apart as their digits, and
certificates are of the digit.

All are trained alike, on 5,000 digits, with Adam at a rate that falls to 0 and the offset
cross-entropy of the radius that is certified. The first rate is chosen for each by the mean of
clean and certified accuracy on 1,000 other training digits, with the first seed; then two more
networks are trained at it. The test digits judge all three.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.attacks import attacked_accuracy
from lipbook.composition import lipschitz_bound
from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.records import Record
from lipbook.lab.training import train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.orthogonal import OrthogonalLinear
from lipbook.pooling import AveragePooling
from lipbook.rules import Bound, Shape, lipschitz_rule
from lipbook.sequences import LosslessRNN

__all__ = [
    "EPSILON",
    "NETWORKS",
    "RATES",
    "VIEWS",
    "Everything",
    "Last",
    "OrthogonalRNN",
    "View",
    "fit",
    "network",
    "row",
    "run",
    "summary",
]

#: Radius of the certified accuracy, and of the loss.
EPSILON = 1.0
#: Networks, as the page shows them.
NETWORKS = ("lossless, all", "lossless, last", "orthogonal", "LSTM")
#: Steps, numbers a step, entries of a state and epochs of training, for each way to read a digit.
#: The last two are those of :mod:`~lipbook.lab.recipes.permuted_pixels`.
VIEWS = {
    "rows": (28, 28, 100, 6),
    "patches": (49, 16, 100, 4),
    "pixels": (196, 1, 63, 4),
    "permuted": (196, 1, 63, 4),
}
#: First rates to choose from.
RATES = (0.003, 0.01)
SEEDS = 3
ATTACKED = 4  # one test digit of so many


class View(nn.Module):
    """Digit as a sequence, its pixels in another order.

    A pixel of the two views with one number a step is half the sum of four, so that the map is
    1-Lipschitz, as it is for rows and patches.

    Parameters
    ----------
    view : str
        One of :data:`VIEWS`.
    """

    order: Tensor

    def __init__(self, view: str) -> None:
        super().__init__()
        order = torch.arange(784).view(28, 28)
        if view == "patches":
            patches = order.view(7, 4, 7, 4).transpose(1, 2).reshape(49, 16)
            order = patches[np.random.default_rng(0).permutation(49)]
        elif view != "rows":
            order = torch.arange(196).view(196, 1)
            if view == "permuted":
                order = order[np.random.default_rng(0).permutation(196)]
        self.pool = AveragePooling(2) if VIEWS[view][1] == 1 else nn.Identity()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """Give sequences (batch, steps, pixels) of digits (batch, 1, 28, 28)."""
        pixels = self.pool(x).flatten(1)
        return pixels[:, self.order.flatten()].unflatten(1, tuple(self.order.shape))


class Everything(nn.Module):
    r"""All outputs and the last state of a lossless layer, side by side: one map with constant 1.

    A pass over the graph sees two tensors with the constant 1 each, and :math:`\sqrt2` together.
    The theorem is about both.

    Parameters
    ----------
    layer : LosslessRNN
        With the batch first.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = Everything(LosslessRNN(2, 6, batch_first=True))
    >>> layer(torch.zeros(1, 50, 2)).shape, round(lipschitz_bound(layer, (50, 2)).value, 4)
    (torch.Size([1, 106]), 1.0)
    """

    def __init__(self, layer: LosslessRNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run over sequences (batch, time, size)."""
        outputs, last = self.layer(x)
        return torch.cat([outputs.flatten(1), last.transpose(0, 1).flatten(1)], 1)


@lipschitz_rule.register
def _(module: Everything, input_shape: Shape, p: float) -> Bound:
    """Answer with the bound of a part: the one that the library gives is of all parts."""
    return Bound(lipschitz_bound(module.layer, input_shape, p, output=0).value, "upper bound", p)


class OrthogonalRNN(nn.Module):
    r"""Recurrent layer :math:`h_{t+1} = \tanh(W x_t + U h_t + b)` with an orthogonal U.

    Parameters
    ----------
    input_size, hidden_size : int
        Entries of an input and of a state.

    Examples
    --------
    >>> layer = OrthogonalRNN(2, 4)
    >>> x = torch.randn(3, 5, 2)
    >>> torch.allclose(layer(x)[0], layer.plain()(x)[0], atol=1e-6)
    True

    References
    ----------
    :cite:t:`arjovsky2016unitary`.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.entering = nn.Linear(input_size, hidden_size)
        self.again = OrthogonalLinear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give states (batch, time, hidden size), and the last one (1, batch, hidden size)."""
        again = self.again.weight.mT
        h, states = x.new_zeros(len(x), again.shape[0]), []
        for share in self.entering(x).unbind(1):
            h = torch.addmm(share, h, again).tanh()
            states.append(h)
        return torch.stack(states, 1), h.unsqueeze(0)

    def plain(self) -> nn.RNN:
        """Give the same layer as torch's, whose bound for a length is known."""
        plain = nn.RNN(self.entering.in_features, self.entering.out_features, batch_first=True)
        parts: dict[str, Any] = {
            "weight_ih_l0": self.entering.weight, "bias_ih_l0": self.entering.bias,
            "weight_hh_l0": self.again.weight, "bias_hh_l0": torch.zeros_like(self.entering.bias),
        }  # fmt: skip
        plain.load_state_dict({name: value.detach() for name, value in parts.items()})
        return plain


class Last(nn.Module):
    """Last state of a recurrent layer.

    Parameters
    ----------
    layer : torch.nn.Module
        Of one layer, with the batch first.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run over sequences (batch, time, size), to (batch, hidden size)."""
        _, last = self.layer(x)
        return last[0][0] if isinstance(last, tuple) else last[0]


def network(name: str, view: str) -> nn.Sequential:
    """Build a network.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    view : str
        One of :data:`VIEWS`.

    Returns
    -------
    torch.nn.Sequential
        From digits to ten logits: sequence, recurrence, matrix.

    Raises
    ------
    ValueError
        There is no such network or view.

    Examples
    --------
    >>> network("lossless, all", "patches")(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    for what, value, known in (("name", name, NETWORKS), ("view", view, (*VIEWS,))):
        if value not in known:
            raise ValueError(f"{what}: expected one of {known}, got {value!r}")
    steps, size, hidden, _ = VIEWS[view]
    if name == "LSTM":
        layer = nn.LSTM(size, hidden, batch_first=True)
        return nn.Sequential(View(view), Last(layer), nn.Linear(hidden, 10))
    if name == "orthogonal":
        read: nn.Module = Last(OrthogonalRNN(size, hidden))
    else:
        lossless = LosslessRNN(size, hidden, batch_first=True)
        read = Everything(lossless) if name == "lossless, all" else Last(lossless)
    features = hidden + steps * size * (name == "lossless, all")
    return nn.Sequential(View(view), read, OrthogonalLinear(features, 10))


def fit(
    name: str,
    view: str,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    epochs: int | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Train a network.

    Parameters
    ----------
    name, view
        As in :func:`network`.
    images, labels : torch.Tensor
        Digits.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    epochs : int, optional
        In batches of 128; those of the view if not given.
    seed : int
        Of weights and batches.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode, the orthogonal layer as one of torch.
    """
    torch.manual_seed(seed)
    model = network(name, view)
    loss = OffsetCrossEntropyLoss(margin_for_radius(EPSILON), 0.2)
    train(
        model, images, labels, epochs=VIEWS[view][3] if epochs is None else epochs, lr=lr,
        loss=loss, optimizer=torch.optim.Adam, schedule="linear", seed=seed,
    )  # fmt: skip
    if name == "orthogonal":
        reader: Any = model[1]
        reader.layer = reader.layer.plain()
    return model.requires_grad_(False).eval()


def row(
    name: str,
    view: str,
    fitted: Sequence[Tensor],
    judges: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    epochs: int | None = None,
    attacked: int = ATTACKED,
    seed: int = 0,
) -> Outcome:
    """Train on some digits and measure on others.

    Parameters
    ----------
    name, view, lr, epochs, seed
        As in :func:`fit`.
    fitted : sequence of torch.Tensor
        Images and labels.
    judges : sequence of sequence of torch.Tensor
        The same, of validation and of test.
    attacked : int
        One test digit of so many is attacked.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``view``, ``lr``, ``seed``; the ``bound`` of the network by the library,
        ``None`` if it is beyond the numbers of float64; ``validation`` and ``test``, each with
        ``clean`` and ``certified`` accuracy, in real arithmetic; and of the test digits that
        are attacked, as ``few``, ``certified`` and ``attacked`` accuracy. No tensors.
    """
    model = fit(name, view, *fitted, lr=lr, epochs=epochs, seed=seed)
    bound = lipschitz_bound(model, (1, 28, 28)).value
    results: dict[str, Any] = {
        "name": name, "view": view, "lr": lr, "seed": seed,
        "bound": bound if math.isfinite(bound) else None,
    }  # fmt: skip
    for part, (images, labels) in zip(("validation", "test"), judges, strict=True):
        found = certificate(model, images, labels, sound=False)
        results[part] = {
            "clean": found.certified_accuracy(0).value,
            "certified": found.certified_accuracy(EPSILON).value,
        }
    few = images[::attacked], labels[::attacked]
    found = certificate(model, *few, sound=False)
    results["few"] = {
        "certified": found.certified_accuracy(EPSILON).value,
        "attacked": attacked_accuracy(model, [few], EPSILON, steps=20, seed=seed).value,
    }
    return results, {}


def run(
    *,
    views: Sequence[str] = ("rows", "patches"),
    names: Sequence[str] = NETWORKS,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    train_count: int = 5000,
    validation: int = 1000,
    attacked: int = ATTACKED,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each network and view, then train it from all seeds.

    Parameters
    ----------
    views : sequence of str
        Ways to read a digit.
    names : sequence of str
        Networks.
    rates : sequence of float
        To choose from.
    seeds : int
        Trainings of each network.
    train_count, validation : int
        Training digits to train on, and others to choose the rate on, drawn by the seed.
    attacked : int
        As in :func:`row`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``epsilon``; ``tried``, rows of :func:`row` of all rates; ``rows``, those of the
        chosen rate. No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(digits.train_images)))
    fitted, held_out = (
        (digits.train_images[part], digits.train_labels[part])
        for part in order[: train_count + validation].split([train_count, validation])
    )
    judges = (held_out, digits[2:])
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for view, name in rows.bar(list(itertools.product(views, names)), "networks"):
        one = functools.partial(row, name, view, fitted, judges, attacked=attacked)
        trials, best = rows.chosen(f"{view} {name}", one, rates, range(seed, seed + seeds), _score)
        tried += trials
        chosen += best
    return {"epsilon": EPSILON, "tried": tried, "rows": chosen}, {}


def _score(one: dict[str, Any]) -> float:
    return float(one["validation"]["clean"] + one["validation"]["certified"])


def summary(record: Record) -> dict[tuple[str, str], dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("pixel_digits")``, or ``"permuted_pixels"``.

    Returns
    -------
    dict
        For each view and network the rate ``lr``, the largest ``bound``, infinite where one was
        beyond float64, and mean and standard deviation over the seeds of ``clean`` and
        ``certified`` accuracy on all test digits, and of ``few certified`` and ``few attacked``
        accuracy on those that were attacked.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> found = summary(records.read("pixel_digits"))
    >>> round(found["rows", "lossless, all"]["bound"], 3)
    1.0
    """
    cells: dict[tuple[str, str], list[Any]] = {}
    for one in record.results["rows"]:
        cells.setdefault((one["view"], one["name"]), []).append(one)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, mine in cells.items():
        bounds = [math.inf if one["bound"] is None else one["bound"] for one in mine]
        found[cell] = {"lr": mine[0]["lr"], "bound": max(bounds)}
        for part, prefix in (("test", ""), ("few", "few ")):
            for measure in mine[0][part]:
                values = [one[part][measure] for one in mine]
                found[cell][prefix + measure] = statistics.mean(values), statistics.stdev(values)
    return found
