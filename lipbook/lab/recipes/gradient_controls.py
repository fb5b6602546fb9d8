r"""Gradients, one change at a time: the constraint or the loss, and a test by random weights.

The networks of :mod:`lipbook.lab.recipes.gradients` differ in the constraint, the loss and the
optimiser together. Here all have one architecture with MaxMin, one optimiser (Adam), the same
digits, epochs and batches, and those of one seed begin with the same orthonormal weights. What
differs is whether the weights *stay* orthonormal (:data:`CONSTRAINTS`), and the loss. Two tasks:

- *ten digits*: 784-128-128-10, with cross-entropy, offset cross-entropy or the hinge-KR loss;
- *two digits*: 784-64-64-1, zeros against eights, with cross-entropy, hinge-KR or its first term
  alone (KR), a critic. The gradient is compared with the exact plan of transport.

Without a constraint neither KR nor hinge-KR has a minimum. Such networks are trained all the same,
for the same number of epochs at a rate that falls to 0.

The rate is chosen for each network out of :data:`RATES` by its accuracy on validation digits, with
the first seed; then networks of all seeds are trained at it.

The test of :cite:t:`adebayo2018`: the last layer of a trained network is replaced by a random one,
then the last two, then all (:func:`randomised`). A picture that stays the same does not show what
was learnt. Beside that stand the measures of the network whose layers are all random.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import lipschitz_bound
from lipbook.export import freeze
from lipbook.interpretability import alignment, margin_gradient, sparsity, stability
from lipbook.lab import networks
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.recipes import Outcome, Rows, gradients
from lipbook.lab.records import Record
from lipbook.lab.training import train
from lipbook.losses import OffsetCrossEntropyLoss, hinge_kr, margin_for_radius
from lipbook.wasserstein import wasserstein1_bracket

__all__ = [
    "CONSTRAINTS",
    "RATES",
    "TASKS",
    "Task",
    "Ways",
    "digits_of",
    "fit",
    "measure_ten",
    "measure_two",
    "network",
    "randomised",
    "rank_correlation",
    "run",
    "summary",
    "ways",
]

Loss = Callable[[Tensor, Tensor], Tensor]
#: Whether the weights stay orthonormal.
CONSTRAINTS = ("none", "orthonormal")
#: First rates of Adam to choose from.
RATES = (0.001, 0.003, 0.01, 0.03)
SEEDS = 3
FRESH = 1000  # added to a seed for random layers
PLANNED = 600  # points of a class in the plan


class Task(NamedTuple):
    """Numbers of units, passes over the digits, and losses by name."""

    sizes: tuple[int, ...]
    epochs: int
    losses: dict[str, Loss]


def _binary(alpha: float) -> Loss:
    return lambda outputs, labels: hinge_kr(outputs[:, 0], labels, alpha=alpha, margin=1)


#: The two tasks.
TASKS = {
    "ten digits": Task(
        (784, 128, 128, 10),
        8,
        {
            "cross-entropy": functional.cross_entropy,
            "offset": OffsetCrossEntropyLoss(margin_for_radius(gradients.RADIUS), 0.2),
            "hinge-KR": functools.partial(hinge_kr, alpha=10, margin=1),
        },
    ),
    "two digits": Task(
        (784, 64, 64, 1),
        20,
        {
            "cross-entropy": lambda outputs, labels: functional.softplus(
                -labels * outputs[:, 0]
            ).mean(),
            "hinge-KR": _binary(10),
            "KR": _binary(0),
        },
    ),
}


def network(sizes: Sequence[int], constraint: str, seed: int) -> nn.Sequential:
    """Build a network of orthonormal weights.

    Parameters
    ----------
    sizes : sequence of int
        Of :class:`Task`.
    constraint : str
        One of :data:`CONSTRAINTS`: whether the weights stay orthonormal when they are trained.
    seed : int
        Of weights and biases, the same with and without constraint.

    Returns
    -------
    torch.nn.Sequential

    Raises
    ------
    ValueError
        There is no such constraint.

    Examples
    --------
    >>> bound, free = (network((6, 4, 3), constraint, 0) for constraint in CONSTRAINTS)
    >>> torch.equal(bound[1].weight, free[1].weight), len(list(free.parameters()))
    (True, 4)
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint: expected one of {CONSTRAINTS}, got {constraint!r}")
    torch.manual_seed(seed)
    model = networks.dense(sizes)
    if constraint == "orthonormal":
        return model
    plain = networks.dense(sizes, linear=nn.Linear)
    plain.load_state_dict(freeze(model.eval()).state_dict())
    return plain


def fit(
    task: str,
    constraint: str,
    loss: str,
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
    task : str
        Key of :data:`TASKS`.
    constraint : str
        As in :func:`network`.
    loss : str
        A loss of the task.
    images, labels : torch.Tensor
        Digits, with labels of 1 and -1 for two of them.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    epochs : int, optional
        In batches of 128; those of the task unless given.
    seed : int
        Of weights and batches.

    Returns
    -------
    torch.nn.Sequential
        Plain layers with weights rounded to half precision, in float32 and evaluation mode.

    Raises
    ------
    ValueError
        The task has no such loss.
    """
    sizes, usual, losses = TASKS[task]
    if loss not in losses:
        raise ValueError(f"loss: expected one of {(*losses,)}, got {loss!r}")
    model = network(sizes, constraint, seed)
    train(
        model, images, labels, epochs=epochs or usual, lr=lr, loss=losses[loss],
        optimizer=torch.optim.Adam, schedule="linear", seed=seed,
    )  # fmt: skip
    return networks.rebuilt("dense", (sizes,), networks.packed(model))


def randomised(model: nn.Sequential, layers: int, seed: int) -> nn.Sequential:
    """Replace the last layers of a network by those of a fresh one.

    Parameters
    ----------
    model : torch.nn.Sequential
        Of plain layers, as :func:`fit` returns it. It is not changed.
    layers : int
        How many linear layers, from the last one.
    seed : int
        Of the fresh one, as in :func:`network`.

    Returns
    -------
    torch.nn.Sequential

    Examples
    --------
    >>> model = network((6, 4, 3), "none", 0)
    >>> other = randomised(model, 1, 1)
    >>> torch.equal(other[1].weight, model[1].weight), torch.equal(other[3].weight, model[3].weight)
    (True, False)
    """
    model = copy.deepcopy(model)
    linear = [each for each in model if isinstance(each, nn.Linear)]
    sizes = [linear[0].in_features, *(each.out_features for each in linear)]
    fresh = [each for each in network(sizes, "none", seed) if isinstance(each, nn.Linear)]
    for old, new in list(zip(linear, fresh, strict=True))[len(linear) - layers :]:
        old.load_state_dict(new.state_dict())
    return model


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of the sizes of entries, by Spearman.

    Parameters
    ----------
    first, second : torch.Tensor
        (batch, ...); entries of different sizes, since ties are ranked by their places.

    Returns
    -------
    torch.Tensor
        (batch,), from -1 to 1.

    Examples
    --------
    >>> g = torch.tensor([[1.0, -3.0, 2.0]])
    >>> for other in (g.square(), 1 / g):
    ...     print(f"{rank_correlation(g, other).item():.3f}")
    1.000
    -1.000
    """
    ranks = [g.flatten(1).abs().argsort(1).argsort(1).double() for g in (first, second)]
    first, second = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return functional.cosine_similarity(first, second)


def _median(values: Tensor) -> float:
    return values.median().item()


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return functional.cosine_similarity(first.flatten(1), second.flatten(1))


def _tested(model: nn.Sequential, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Test gradients by random layers: medians of cosines and of rank correlations."""
    g = margin_gradient(model, x, y)
    count = sum(isinstance(each, nn.Linear) for each in model)
    others = [
        margin_gradient(randomised(model, k, FRESH + seed), x, y) for k in range(1, count + 1)
    ]
    return {
        "turned": [_median(_cosine(g, other)) for other in others],
        "ranks": [_median(rank_correlation(g, other)) for other in others],
    }


def measure_ten(model: nn.Sequential, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Measure gradients of a network for ten digits, and test them.

    Parameters
    ----------
    model : torch.nn.Sequential
        In float64.
    x, y : torch.Tensor
        Digits that it reads correctly, and their labels.
    seed : int
        Of the random layers, with another number added to it.

    Returns
    -------
    dict
        What :func:`lipbook.lab.recipes.gradients.measure` returns; ``turned`` and ``ranks``,
        medians of the cosine with the gradient after one, two, ... layers were randomised, and of
        :func:`rank_correlation`; ``random``: ``cosine``, ``alignment``, ``sparsity`` and
        ``stability`` where all layers are random, for the same labels.
    """
    random = randomised(model, 3, FRESH + seed)
    h = margin_gradient(random, x, y)
    return {
        **gradients.measure(model, x, y),
        **_tested(model, x, y, seed),
        "random": {
            "cosine": _median(alignment(x, h, cosine=True)),
            "alignment": _median(alignment(x, h)),
            "sparsity": _median(sparsity(h)),
            "stability": _median(stability(random, x, 2.0, samples=4)),
        },
    }


def digits_of(digits: Mnist) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Select zeros, with the label 1, and eights, with -1.

    Parameters
    ----------
    digits : lipbook.lab.data.Mnist
        All of them.

    Returns
    -------
    tuple of tuple of torch.Tensor
        Zeros and eights to train on, and to test on.
    """
    train_zeros, train_eights, zeros, eights = (
        images[labels == digit] for images, labels in (digits[:2], digits[2:]) for digit in (0, 8)
    )
    return (train_zeros, train_eights), (zeros, eights)


def _labelled(zeros: Tensor, eights: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.ones(len(zeros) + len(eights), dtype=torch.int64)
    labels[len(zeros) :] = -1
    return torch.cat([zeros, eights]), labels


class Ways(NamedTuple):
    """Zeros, and the directions in which plans send them: one of the same size for each plan."""

    zeros: Tensor
    directions: tuple[Tensor, ...]


def ways(zeros: Tensor, *eights: Tensor) -> Ways:
    """Plan the transport of zeros to each set of eights.

    Parameters
    ----------
    zeros : torch.Tensor
        Images in float64.
    *eights : torch.Tensor
        Sets of images.

    Returns
    -------
    Ways
        The direction of a zero is from its partner, that with most of its mass, to it.
    """
    flat = zeros.flatten(1)
    found = []
    for each in eights:
        plan = wasserstein1_bracket(flat, each.flatten(1)).plan.to_dense()
        found.append(flat - each.flatten(1)[plan.argmax(1)])
    return Ways(zeros, tuple(found))


def measure_two(
    model: nn.Sequential, x: Tensor, y: Tensor, known: Ways, held_out: Ways, seed: int
) -> dict[str, Any]:
    """Compare gradients of a network for two digits with plans, and test them.

    Parameters
    ----------
    model : torch.nn.Sequential
        In float64.
    x, y : torch.Tensor
        Test digits, and labels of 1 and -1.
    known, held_out : Ways
        Of digits for training and for tests.
    seed : int
        As in :func:`measure_ten`.

    Returns
    -------
    dict
        ``accuracy``; ``transport`` and ``held_out``, mean cosines of gradients with plans;
        ``random``, the same of the network whose layers are all random; ``seen``, the share of the
        distance of ``known`` that the network sees, over its ``bound``; ``turned`` and ``ranks``
        as in :func:`measure_ten`, at the test digits.
    """
    plain = randomised(model, 3, FRESH + seed)
    bound = lipschitz_bound(model, x.shape[1:]).value
    (way,) = known.directions
    ends = known.zeros - way.view_as(known.zeros)
    drop = (model(known.zeros) - model(ends)).mean()
    return {
        "accuracy": (model(x)[:, 0] * y > 0).double().mean().item(),
        "transport": _agreement(model, known),
        "held_out": _agreement(model, held_out),
        "random": _agreement(plain, known),
        "seen": (drop / way.norm(dim=1).mean()).item() / bound,
        "bound": bound,
        **_tested(model, x, y, seed),
    }


def _agreement(model: nn.Module, known: Ways) -> float:
    g = margin_gradient(model, known.zeros, torch.ones(len(known.zeros), dtype=torch.int64))
    return sum(_cosine(g, way).mean().item() for way in known.directions) / len(known.directions)


def run(
    *,
    count: int = 200,
    validation: int = 2000,
    epochs: int | None = None,
    seeds: int = SEEDS,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose rates, train all networks, measure and test their gradients.

    Parameters
    ----------
    count : int
        Of ten digits, those that are measured: the first test digits that all networks read
        correctly.
    validation : int
        Of ten digits, how many of those for training choose the rate, drawn by the seed. Of two
        digits a fifth of this number does, those after the first 600 of each class, which the
        plan is made of.
    epochs : int, optional
        As in :func:`fit`.
    seeds : int
        Networks of each kind.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``tried``, with the ``validation`` accuracy of each rate; ``ten`` and ``two``,
        rows of :func:`measure_ten` and :func:`measure_two`, with ``constraint``, ``loss``,
        ``lr``, ``seed``, and the ``accuracy`` on all test digits; ``constant``, agreements of the
        constant direction from the mean eight to the mean zero with plans of ``transport`` and
        ``held_out``, and ``ceiling``, the most that a direction can have that is independent of
        the eights held out. No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    train_two, test_two = digits_of(digits)
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(digits.train_images)))
    split = order.split([validation, len(order) - validation])
    judges, fitted = ((digits.train_images[part], digits.train_labels[part]) for part in split)
    few = validation // 10
    middle = PLANNED + few
    data = {
        "ten digits": (fitted, judges),
        "two digits": (
            _labelled(*(torch.cat([d[:PLANNED], d[middle:]]) for d in train_two)),
            _labelled(*(d[PLANNED:middle] for d in train_two)),
        ),
    }
    kinds = [
        (task, constraint, loss)
        for task in TASKS
        for constraint, loss in itertools.product(CONSTRAINTS, TASKS[task].losses)
    ]
    tried: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str, int], tuple[float, nn.Sequential]] = {}
    for kind in rows.bar(kinds, "kinds of networks"):
        task, constraint, loss = kind
        one = functools.partial(_trained, *kind, *data[task], epochs=epochs)

        def compute(lr: float, each: int, one: Any = one, name: str = " ".join(kind)) -> Outcome:
            return rows.compute(
                f"{name} rate {lr} seed {each}", functools.partial(one, lr=lr, seed=each)
            )

        trials = {lr: compute(lr, seed) for lr in RATES}
        marks = {lr: results["validation"] for lr, (results, _) in trials.items()}
        names = {"task": task, "constraint": constraint, "loss": loss}
        tried += [{**names, "lr": lr, "validation": mark} for lr, mark in marks.items()]
        best = max(RATES, key=marks.__getitem__)
        for each in range(seed, seed + seeds):
            tensors = compute(best, each)[1]
            model = networks.rebuilt("dense", (TASKS[task].sizes,), tensors).double()
            found[task, constraint, loss, each] = best, model
    (zeros, eights), (held_zeros, held_eights) = (
        [part.double() for part in pair] for pair in (train_two, test_two)
    )
    known = ways(zeros[:PLANNED], eights[:PLANNED])
    held_out = ways(held_zeros, *held_eights.chunk(2))
    x, y = digits.test_images.double(), digits.test_labels
    ten = {key: model for key, (_, model) in found.items() if key[0] == "ten digits"}
    right = torch.stack([model(x).argmax(1) == y for model in ten.values()])
    at = right.all(0).nonzero()[:count, 0]
    two = _labelled(held_zeros, held_eights)
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for (task, constraint, loss, each), (lr, model) in rows.bar([*found.items()], "networks"):

        def measured(task: str = task, each: int = each, model: Any = model) -> Outcome:
            if task == "two digits":
                return measure_two(model, *two, known, held_out, each), {}
            accuracy = (model(x).argmax(1) == y).double().mean().item()
            return {"accuracy": accuracy} | measure_ten(model, x[at], y[at], each), {}

        kind_of = {"constraint": constraint, "loss": loss, "lr": lr, "seed": each}
        key = f"{task} {constraint} {loss} measured {each}"
        table[task].append(kind_of | rows.compute(key, measured)[0])
    mean = (zeros.mean(0) - eights.mean(0)).flatten()[None]
    both = {"transport": known, "held_out": held_out}
    constant = {
        name: sum(_cosine(mean, way).mean().item() for way in each.directions)
        / len(each.directions)
        for name, each in both.items()
    }
    first, second = held_out.directions
    return {
        "tried": tried,
        "ten": table["ten digits"],
        "two": table["two digits"],
        "constant": constant | {"ceiling": _cosine(first, second).mean().item() ** 0.5},
        "count": len(at),
    }, {}


def _trained(
    task: str,
    constraint: str,
    loss: str,
    fitted: tuple[Tensor, Tensor],
    judges: tuple[Tensor, Tensor],
    *,
    lr: float,
    epochs: int | None,
    seed: int,
) -> Outcome:
    model = fit(task, constraint, loss, *fitted, lr=lr, epochs=epochs, seed=seed)
    images, labels = judges
    outputs = model(images)
    right = outputs.argmax(1) == labels if outputs.shape[1] > 1 else outputs[:, 0] * labels > 0
    return {"validation": right.double().mean().item()}, networks.packed(model)


def summary(record: Record, task: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("gradient_controls")``.
    task : str
        ``"ten"`` or ``"two"``.

    Returns
    -------
    dict
        For each constraint and loss, each measure with its values of all seeds.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> len(summary(records.read("gradient_controls"), "ten")["none", "hinge-KR"]["cosine"])
    3
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in record.results[task]:
        mine = found.setdefault((one["constraint"], one["loss"]), {})
        for name, value in one.items():
            mine.setdefault(name, []).append(value)
    return found
