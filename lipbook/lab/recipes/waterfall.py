r"""What the speedrun owes to each of its parts: one of them taken away at a time.

:mod:`lipbook.lab.recipes.speedrun` trains a network within a budget. Here its recipe of 15 seconds
runs for half as many epochs, and then again with one thing changed (:data:`CHANGES`): back to what
was usual in 2019, or to another size. Everything else stays, the seeds, too.

All changes train for as many processor seconds of one thread as the finished recipe, as far as
whole epochs allow: what costs time costs epochs. :data:`CHANGES` has their numbers, measured
before on one machine; the record has epochs and seconds of each training.

Some changes bring a number that the finished recipe does not have. Each is chosen on 5,000 training
digits, drawn at random, after a training on the other 55,000:

- the rate of Adam, for the mean of clean and certified accuracy;
- the margin of the hinge, so that the *clean* accuracy is nearest to that of the finished recipe (a
  loss can buy one accuracy with the other; where one is equal, the other can be compared);
- the margin where all is changed at once, for the mean again, since no margin gives it the clean
  accuracy of the finished recipe. The rate is that of Adam.

No other number is tuned to a change. Networks are then trained on all 60,000 digits, from five
seeds each, and certified on the 10,000 test digits, soundly in float64.

What else was seen. A first run was stopped after three seeds of some rows, when the margin 0.7
that it had chosen for the hinge gave another clean accuracy than the finished recipe, and the rate
of Adam was the largest of its grid. The grids are finer and longer since, and the margin of "all of
these" is its own; the rest was kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.fast import BORDER, AbsoluteNet, fit, windows
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.mnist_trade_off import LOSSES
from lipbook.lab.recipes.speedrun import EPSILON, timed
from lipbook.lab.records import Record
from lipbook.orthogonal import polar, qr

__all__ = [
    "CHANGES",
    "CHOICES",
    "FINISHED",
    "SEEDS",
    "Entry",
    "Recipe",
    "VariedNet",
    "difference",
    "entries",
    "halves",
    "row",
    "run",
    "spread",
]

#: Seeds behind each number.
SEEDS = 5
MEASURES = ("clean", "certified")


class VariedNet(AbsoluteNet):
    r"""The network of the speedrun with parts as they were in 2019.

    Parameters
    ----------
    sizes, seed, dtype
        As in :class:`~lipbook.lab.fast.AbsoluteNet`.
    relu : bool
        The activation is ReLU.
    adam : bool
        The steps are Adam's, for parameters of any values: a weight is the orthonormal factor of
        their QR factorisation, or has their rows scaled to the length of the last layer.
    orthonormal : bool
        The last layer has orthonormal rows, too.

    Examples
    --------
    >>> net = VariedNet((6, 4, 4, 3), 0, torch.float64, relu=True)
    >>> x = torch.rand(5, 6, dtype=torch.float64)
    >>> bool((net.network().double()(x) - net.forward(x.T)[2].T).abs().max() < 1e-6)
    True
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        relu: bool = False,
        adam: bool = False,
        orthonormal: bool = False,
    ) -> None:
        super().__init__(sizes, seed, dtype)
        self.relu, self.orthonormal = relu, orthonormal
        if orthonormal:
            self.weights[-1] /= self.length
            self.length = 1.0
        self.low[-1] = self.weights[-1].to(dtype)
        self.descent: torch.optim.Optimizer | None = None
        if adam:
            self.raw = [weight.clone().requires_grad_() for weight in self.weights]
            self.biases = [bias.requires_grad_() for bias in self.biases]
            self.descent = torch.optim.Adam([*self.raw, *self.biases])
            self._map()

    def _map(self) -> None:
        """Compute the weights from the parameters of Adam."""
        maps = (
            [qr] * len(self.raw) if self.orthonormal else [qr] * (len(self.raw) - 1) + [self._rows]
        )
        self.mapped = [each(raw) for each, raw in zip(maps, self.raw, strict=True)]
        self.weights = [weight.detach() for weight in self.mapped]
        self.low = [weight.to(self.dtype) for weight in self.weights]

    def _rows(self, raw: Tensor) -> Tensor:
        return self.length * functional.normalize(raw, dim=1)

    def _activate(self, x: Tensor) -> Tensor:
        if not self.relu:
            return super()._activate(x)
        slopes = (x > 0).to(x.dtype)
        x *= slopes
        return slopes

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:  # noqa: D102
        with torch.no_grad():
            return super().forward(x)

    def step(self, weights: list[Tensor], biases: list[Tensor], lr: float, bias_lr: float) -> None:  # noqa: D102
        if self.descent is None:
            super().step(weights, biases, lr, bias_lr)
            return
        self.descent.zero_grad()
        torch.autograd.backward(
            self.mapped, [part.to(raw) for part, raw in zip(weights, self.raw, strict=True)]
        )
        for bias, gradient in zip(self.biases, biases, strict=True):
            bias.grad = gradient.to(bias)
        self.descent.param_groups[0]["lr"] = lr
        self.descent.step()
        self._map()

    def _step_last(self, weight: Tensor, direction: Tensor, lr: float) -> None:
        if self.orthonormal:
            self._step_hidden(weight, self.low[-1], direction.to(self.dtype), lr)
        else:
            super()._step_last(weight, direction, lr)

    def _restored(self) -> tuple[list[Tensor], list[Tensor]]:
        weights, biases = super()._restored()
        if self.orthonormal:
            weights[-1] = polar(weights[-1].T).T
        return weights, [bias.detach() for bias in biases]

    def network(self) -> nn.Sequential:  # noqa: D102
        if not self.relu:
            return super().network()
        layers: list[nn.Module] = [nn.Flatten()]
        for n, m in itertools.pairwise(self.sizes):
            layers += [nn.Linear(n, m), nn.ReLU()]
        return self._filled(nn.Sequential(*layers[:-1]), *self._restored())


def _middle(images: Tensor, _: np.random.Generator) -> Tensor:
    """Cut out what :func:`~lipbook.lab.fast.windows` would distort."""
    return images[:, 0, BORDER:-BORDER, BORDER:-BORDER].flatten(1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a training depends on, but for its seed.

    Parameters
    ----------
    width, depth, epochs, lr, batch_size
        As in :func:`lipbook.lab.fast.fit`.
    loss : str
        Key of :data:`lipbook.lab.recipes.mnist_trade_off.LOSSES`.
    radius : float
        Whose margin the loss asks for.
    activation : str
        ``"MaxMin"`` or ``"ReLU"``.
    optimiser : str
        ``"StiefelMuon"`` or ``"Adam"``.
    last_layer : str
        Rows of the last layer: ``"one length"`` or ``"orthonormal"``.
    distortions : bool
        Whether digits are distorted.

    Raises
    ------
    ValueError
        There is no such loss, activation, optimiser or last layer.

    Examples
    --------
    >>> dataclasses.replace(FINISHED, activation="ReLU").width
    256
    """

    width: int = 256
    depth: int = 4
    epochs: int = 4
    lr: float = 0.1
    batch_size: int = 1024
    loss: str = "offset cross-entropy"
    radius: float = 1.03
    activation: str = "MaxMin"
    optimiser: str = "StiefelMuon"
    last_layer: str = "one length"
    distortions: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("loss", (*LOSSES,)),
            ("activation", ("MaxMin", "ReLU")),
            ("optimiser", ("StiefelMuon", "Adam")),
            ("last_layer", ("one length", "orthonormal")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")

    def fit(self, images: Tensor, labels: Tensor, precision: str, seed: int) -> nn.Sequential:
        """Train a network.

        Parameters
        ----------
        images, labels : torch.Tensor
            Digits.
        precision : str
            Of products.
        seed : int
            Of the training.

        Returns
        -------
        torch.nn.Sequential
            As of :func:`lipbook.lab.fast.fit`.
        """
        make = functools.partial(
            VariedNet,
            relu=self.activation == "ReLU",
            adam=self.optimiser == "Adam",
            orthonormal=self.last_layer == "orthonormal",
        )
        return fit(
            images, labels, width=self.width, depth=self.depth,
            loss=LOSSES[self.loss][0](self.radius), epochs=self.epochs, lr=self.lr,
            batch_size=self.batch_size, precision=precision, seed=seed, make=make,
            view=windows if self.distortions else _middle,
        )  # fmt: skip


#: The recipe of the speedrun for 15 seconds, for half as many epochs.
FINISHED = Recipe()
_FORMER: dict[str, Any] = {
    "activation": "ReLU", "optimiser": "Adam", "loss": "multi-margin",
    "last_layer": "orthonormal", "distortions": False,
}  # fmt: skip
#: For each row of the table what differs from :data:`FINISHED`. Where a change brings a number, the
#: one here is replaced by one of :data:`CHOICES`.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "ReLU": {"activation": "ReLU"},
    "Adam": {"optimiser": "Adam", "epochs": 3},
    "hinge": {"loss": "multi-margin"},
    "orthonormal last layer": {"last_layer": "orthonormal"},
    "no distortions": {"distortions": False},
    "all of these": {**_FORMER, "epochs": 3},
    "width 128": {"width": 128, "epochs": 8},
    "width 384": {"width": 384, "epochs": 2},
    "2 hidden layers": {"depth": 2, "epochs": 6},
    "8 hidden layers": {"depth": 8, "epochs": 2},
    "batches of 256": {"batch_size": 256, "epochs": 2},
    "batches of 4096": {"batch_size": 4096, "epochs": 5},
    "three times the rate": {"lr": 0.3},
    "a third of the rate": {"lr": 0.1 / 3},
}
#: The name of the number that a change brings, and the values to choose from.
CHOICES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "Adam": ("lr", (0.01, 0.03, 0.1)),
    "hinge": ("radius", (0.7, 0.85, 1.0, 1.4)),
    "all of these": ("radius", (1.0, 1.4, 1.9, 2.5, 3.3)),
}


def row(
    change: str,
    fitted: Sequence[Tensor],
    judges: Sequence[Tensor],
    *,
    sound: bool = True,
    precision: str = "bfloat16",
    seed: int = 0,
    **numbers: Any,
) -> Outcome:
    """Train with one change and certify.

    Parameters
    ----------
    change : str
        Key of :data:`CHANGES`.
    fitted, judges : sequence of torch.Tensor
        Images and labels, to train on and to certify on.
    sound : bool
        Certify soundly in float64; otherwise in real arithmetic.
    precision : str
        As in :func:`lipbook.lab.fast.fit`.
    seed : int
        Of the training.
    **numbers
        More fields of :class:`Recipe` that differ from the finished one.

    Returns
    -------
    tuple of dict
        Results: ``change``; ``numbers``; ``epochs``, ``seed``; ``seconds``; ``count`` of the digits
        that judged; ``clean`` and ``certified`` accuracy. No tensors.
    """
    recipe = dataclasses.replace(FINISHED, **{**CHANGES[change], **numbers})
    model, seconds = timed(functools.partial(recipe.fit, fitted[0], fitted[1], precision, seed))
    images, labels = judges
    if sound:
        model, images = model.double(), images.double()
    found = certificate(model, images, labels, sound=sound)
    return {
        "change": change, "numbers": numbers, "epochs": recipe.epochs, "seed": seed,
        "seconds": round(seconds, 1), "count": len(images),
        "clean": found.certified_accuracy(0).value,
        "certified": found.certified_accuracy(EPSILON).value,
    }, {}  # fmt: skip


def run(
    *,
    seeds: int = SEEDS,
    validation: int = 5000,
    precision: str = "bfloat16",
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose the numbers of two changes, then train all rows from all seeds.

    Parameters
    ----------
    seeds : int
        Trainings of each row.
    validation : int
        How many of the training digits, drawn by the seed, choose. Nothing is trained on them.
    precision : str
        As in :func:`row`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``epsilon``; ``judged``, rows of :func:`row` on validation digits; ``rows``, those
        on the test digits. No tensors.

    Raises
    ------
    ValueError
        ``validation`` is no number of the digits.
    """
    rows = rows or Rows()
    digits = mnist(full=True)
    whole = digits.train_images, digits.train_labels
    held_out, fitted = halves(*whole, validation, seed)
    judged: list[dict[str, Any]] = []

    def choose(change: str, **numbers: Any) -> dict[str, Any]:
        one = functools.partial(
            row, change, fitted, held_out,
            sound=False, precision=precision, seed=seed, **numbers,
        )  # fmt: skip
        judged.append(rows.compute(f"judged {change} {[*numbers.values()]}", one)[0])
        return judged[-1]

    finished = choose("nothing")["clean"]
    chosen: dict[str, dict[str, Any]] = {}
    for change, (name, values) in CHOICES.items():
        also = chosen["Adam"] if change == "all of these" else {}
        found = {value: choose(change, **also, **{name: value}) for value in values}
        if change == "hinge":
            best = min(values, key=lambda value: abs(found[value]["clean"] - finished))
        else:
            best = max(values, key=lambda value: found[value]["clean"] + found[value]["certified"])
        chosen[change] = {**also, name: best}
    table = []
    jobs = [(each, change) for each in range(seed, seed + seeds) for change in CHANGES]
    for each, change in rows.bar(jobs, "networks"):
        one = functools.partial(
            row, change, whole, digits[2:],
            precision=precision, seed=each, **chosen.get(change, {}),
        )  # fmt: skip
        table.append(rows.compute(f"{change} seed {each}", one)[0])
    return {"epsilon": EPSILON, "judged": judged, "rows": table}, {}


def halves(
    images: Tensor, labels: Tensor, validation: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw digits that choose, and leave the others for training.

    Parameters
    ----------
    images, labels : torch.Tensor
        Training digits.
    validation : int
        How many are drawn.
    seed : int
        Of the draw.

    Returns
    -------
    tuple
        Images and labels of those that choose, and of the others.

    Raises
    ------
    ValueError
        ``validation`` is no number of the digits.
    """
    if not 0 < validation < len(images):
        raise ValueError(
            f"validation: expected a number of the {len(images)} training digits, got {validation}"
        )
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(images)))
    first, rest = order[:validation], order[validation:]
    return (images[first], labels[first]), (images[rest], labels[rest])


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a table says of one change.

    Attributes
    ----------
    change : str
        Key of :data:`CHANGES`.
    numbers : dict
        What was chosen for it, if anything.
    epochs : int
    seconds : float
        Mean of the trainings.
    clean, certified : tuple of float
        Mean and standard deviation over the seeds, on all test digits.
    """

    change: str
    numbers: Mapping[str, float]
    epochs: int
    seconds: float
    clean: tuple[float, float]
    certified: tuple[float, float]


def entries(record: Record) -> dict[str, Entry]:
    """Read the rows of a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("waterfall")``.

    Returns
    -------
    dict
        An entry for each change, in the order of :data:`CHANGES`.

    Raises
    ------
    ValueError
        A change is missing or unknown, or has not each of the seeds once, or has more than one
        setting.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> next(iter(entries(records.read("waterfall"))))
    'nothing'
    """
    found = {}
    for change, table in _table(record).items():
        settings = {(one["epochs"], *one["numbers"].items()) for one in table}
        if len(settings) > 1:
            raise ValueError(f"expected one setting for {change!r}, got {settings}")
        clean, certified = (spread([one[measure] for one in table]) for measure in MEASURES)
        seconds = statistics.mean(one["seconds"] for one in table)
        first = table[0]
        found[change] = Entry(change, first["numbers"], first["epochs"], seconds, clean, certified)
    return found


def difference(record: Record, change: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Say what a change does to accuracy, seed by seed.

    A seed has the same digits in the same order with the change and without it, as far as the
    change leaves them alike.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        As in :func:`entries`.
    change : str
        Key of :data:`CHANGES`.

    Returns
    -------
    clean, certified : tuple of float
        Mean and standard deviation, over the seeds, of the accuracy with the change less that
        without.

    Raises
    ------
    ValueError
        As in :func:`entries`; or there is no such change.
    """
    if change not in CHANGES:
        raise ValueError(f"change: expected one of {(*CHANGES,)}, got {change!r}")
    table = _table(record)
    pairs = [*zip(table[change], table["nothing"], strict=True)]
    clean, certified = (spread([a[one] - b[one] for a, b in pairs]) for one in MEASURES)
    return clean, certified


def _table(record: Record) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each change, in order of their seeds."""
    rows = record.results["rows"]
    wanted = sorted({one["seed"] for one in rows})
    found: dict[str, list[Mapping[str, Any]]] = {change: [] for change in CHANGES}
    for one in rows:
        if one["change"] not in found:
            raise ValueError(f"record {record.name!r}: unknown change {one['change']!r}")
        found[one["change"]].append(one)
    for change, mine in found.items():
        mine.sort(key=lambda one: one["seed"])
        seeds = [one["seed"] for one in mine]
        if seeds != wanted or len(seeds) < 2:
            raise ValueError(
                f"record {record.name!r}: expected each of the seeds {wanted} once for "
                f"{change!r}, two at least, got {seeds}"
            )
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation.

    Parameters
    ----------
    values : sequence of float
        Two or more.

    Returns
    -------
    tuple of float
    """
    return statistics.mean(values), statistics.stdev(values)
