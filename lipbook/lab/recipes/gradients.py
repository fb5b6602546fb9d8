r"""Gradients of three kinds of network: equal digits, epochs, batches, shape and activation.

*Standard* networks learn by cross-entropy, *adversarial* ones by cross-entropy at the end of an
attack (:cite:t:`madry2018`), *1-Lipschitz* ones keep orthonormal weights and learn by the offset
cross-entropy. All are 784-128-128-10 with MaxMin and see the 12,000 digits that ship, slightly
distorted, equally often. What differs is what makes the kind: the constraint with its optimiser,
and the loss.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.attacks import attacked_accuracy
from lipbook.composition import lipschitz_bound
from lipbook.interpretability import alignment, margin_gradient, sparsity, stability
from lipbook.lab import networks, records
from lipbook.lab.augmentation import distorted
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.recipes import Outcome, Rows, mnist_best
from lipbook.lab.training import accuracy, train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.robustness import certified_radius

__all__ = ["KINDS", "RADIUS", "SIZES", "fit", "load", "measure", "run", "walked"]

#: The kinds of network.
KINDS = ("standard", "adversarial", "1-Lipschitz")
#: Numbers of units, the same for all.
SIZES = (784, 128, 128, 10)
#: Of the attacks in training and test, and of the offset of the loss.
RADIUS = 1.5


def fit(kind: str, digits: Mnist, *, epochs: int = 15, seed: int = 0) -> nn.Sequential:
    """Train one network.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    digits : Mnist
        To train on.
    epochs : int
        Passes over the digits in batches of 128. The last parameters are taken.
    seed : int
        Of weights, batches and distortions.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode.

    Raises
    ------
    ValueError
        If there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    images, labels = digits.train_images, digits.train_labels
    if kind == "1-Lipschitz":
        loss = OffsetCrossEntropyLoss(margin_for_radius(RADIUS), 0.2)
        model, _ = mnist_best.fit(
            SIZES, images, labels, loss=loss, epsilon=RADIUS, epochs=epochs, lr=0.08,
            batch_size=128, validation=0, precision="float32", seed=seed,
        )  # fmt: skip
        return model
    torch.manual_seed(seed)
    model = networks.dense(SIZES, linear=nn.Linear)
    settings: dict[str, Any] = {
        "lr": 0.1,
        "batch_size": 128,
        "schedule": "linear",
        "augment": distorted,
    }
    if kind == "standard":
        train(model, images, labels, epochs=epochs, seed=seed, **settings)
        return model
    # The model that is trained maps images to logits at the end of an attack on their labels: the
    # labels come along as one more number for each image.
    marked = torch.cat([images.flatten(1), labels[:, None].to(images)], 1)

    def augment(batch: Tensor, rng: Any) -> Tensor:
        moved = distorted(batch[:, :-1].view(-1, *images.shape[1:]), rng)
        return torch.cat([moved.flatten(1), batch[:, -1:]], 1)

    settings["augment"] = augment
    train(_Attacked(model), marked, labels, epochs=epochs, seed=seed, **settings)
    return model.eval()


class _Attacked(nn.Module):
    """Logits at the end of two steps of an attack within RADIUS."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, marked: Tensor) -> Tensor:
        x, labels = marked[:, :-1], marked[:, -1].long()
        shift = torch.zeros_like(x)
        for _ in range(2):
            shift = shift.detach().requires_grad_()
            loss = functional.cross_entropy(self.model(x + shift), labels, reduction="sum")
            (ascent,) = torch.autograd.grad(loss, shift)
            length = ascent.norm(dim=1, keepdim=True).clamp(min=1e-12)
            moved = shift.detach() + RADIUS * ascent / length
            shift = moved * (RADIUS / moved.norm(dim=1, keepdim=True).clamp(min=RADIUS))
        return self.model(x + shift.detach())


@torch.no_grad()
def walked(
    model: nn.Module, x: Tensor, y: Tensor, gradient: Tensor, lengths: Sequence[float]
) -> Tensor:
    r"""Walk against the gradient until the decision changes.

    Parameters
    ----------
    model : torch.nn.Module
        To (batch, classes).
    x, y : torch.Tensor
        Inputs and their decisions.
    gradient : torch.Tensor
        Like ``x``.
    lengths : sequence of float
        To try, from small to large; the same for every input and every network.

    Returns
    -------
    torch.Tensor
        The first length at which the decision is another one, infinite if there is none.

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.eye(2))
    >>> x, y, g = torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([[1.0, -1.0]])
    >>> walked(model, x, y, g, [0.5, 0.7, 0.8]).item()  # the border is 0.707 away
    0.800000011920929
    """
    size = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    found = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for length in reversed(lengths):
        changed = model(x - length * gradient / size).argmax(1) != y
        found = torch.where(changed, torch.tensor(length, dtype=x.dtype), found)
    return found


def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Measure the gradients of one network at digits that it reads correctly.

    Parameters
    ----------
    model : torch.nn.Module
        In float64.
    x, y : torch.Tensor
        Digits and labels.

    Returns
    -------
    dict
        Medians over the digits: ``cosine``, ``alignment``, ``sparsity``, ``stability`` at the
        distance 2, the ``linearised`` distance of the border, its ``gap`` to the alignment, the
        ``certified`` radius, the length ``walked`` until the decision changes, on one grid of step
        0.02, and that length as a ``multiple`` of the certified radius; the accuracy ``attacked``
        within ``RADIUS``; and the Lipschitz ``bound``.
    """
    g = margin_gradient(model, x)
    top = model(x).detach().topk(2, dim=1).values
    linearised = (top[:, 0] - top[:, 1]) / g.flatten(1).norm(dim=1)
    aligned = alignment(x, g)
    bound = lipschitz_bound(model, x.shape[1:]).value
    certified = certified_radius(model(x).detach(), y, bound)
    walk = walked(model, x, y, g, [0.02 * k for k in range(401)])
    medians = {
        "cosine": alignment(x, g, cosine=True),
        "alignment": aligned,
        "sparsity": sparsity(g),
        "stability": stability(model, x, 2.0, samples=4),
        "linearised": linearised,
        "gap": (linearised - aligned).abs(),
        "certified": certified,
        "walked": walk,
        "multiple": walk / certified,
    }
    numbers = {name: values.median().item() for name, values in medians.items()}
    return numbers | {
        "attacked": attacked_accuracy(model, [(x, y)], RADIUS, steps=50).value,
        "bound": bound,
    }


def load(kind: str) -> nn.Sequential:
    """Build a recorded network, of seed 0, with weights that are rounded to half precision.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.

    Returns
    -------
    torch.nn.Sequential
        In float32 and evaluation mode.

    Raises
    ------
    ValueError
        If there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    tensors = records.read("gradients").tensors
    weights = {k.removeprefix(f"{kind}/"): v for k, v in tensors.items() if k.startswith(kind)}
    return networks.rebuilt("dense", (SIZES,), weights)


def run(
    *,
    count: int = 200,
    epochs: int = 15,
    seeds: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train all networks and measure their gradients.

    Parameters
    ----------
    count : int
        Test digits that are measured, the first that all networks of a seed read correctly.
    epochs : int
        As in :func:`fit`.
    seeds : int
        Networks of each kind.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows`` with ``kind``, ``seed``, the ``accuracy`` on all test digits, and what
        :func:`measure` returns. Tensors: the networks of the first seed, for :func:`load`.
    """
    rows = rows or Rows()
    digits = mnist()
    names = list(itertools.product(range(seed, seed + seeds), KINDS))
    found: dict[tuple[int, str], nn.Sequential] = {}
    kept: dict[str, Tensor] = {}
    for i, kind in rows.bar(names, "networks"):
        one: Callable[[], Outcome] = functools.partial(_trained, kind, digits, epochs, i)
        tensors = rows.compute(f"{kind} seed {i}", one)[1]
        found[i, kind] = networks.rebuilt("dense", (SIZES,), tensors).double()
        if i == seed:
            kept |= {f"{kind}/{key}": value for key, value in tensors.items()}
    images, labels = digits.test_images.double(), digits.test_labels
    table: list[dict[str, Any]] = []
    for i in range(seed, seed + seeds):
        models = {kind: found[i, kind] for kind in KINDS}
        right = torch.stack([model(images).argmax(1) == labels for model in models.values()])
        x, y = (values[right.all(0)][:count] for values in (images, labels))
        for kind, model in models.items():
            row = {"kind": kind, "seed": i, "accuracy": accuracy(model, images, labels)}
            table.append(row | measure(model, x, y))
    return {"rows": table}, kept


def _trained(kind: str, digits: Mnist, epochs: int, seed: int) -> Outcome:
    return {}, networks.packed(fit(kind, digits, epochs=epochs, seed=seed))
