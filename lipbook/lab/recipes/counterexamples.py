"""Inputs that contradict a certificate, searched for, and what it costs that there are none.

Networks are built to round badly: large terms that cancel, hidden layers far from zero, half
precision, inputs next to the border of a class. Each certified radius is attacked from within by
inputs on its edge, towards the nearest class and beside. A counterexample is a number of the
inputs' dtype, no further than the radius in rational arithmetic, with another prediction. It is
searched for with rounding accounted for (``sound=True``) and without.

On two networks for digits, the record says how much of the radius and how much time the errors of
the program take.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook import attacks
from lipbook.activations import MaxMin
from lipbook.convolutions import OrthogonalConv2d
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.training import train
from lipbook.losses import MultiMarginLoss, margin_for_radius
from lipbook.orthogonal import InfinityNormLinear, OrthogonalLinear, UnitNormLinear
from lipbook.robustness import certify
from lipbook.robustness.lipschitz import Reader

__all__ = ["CANDIDATES", "FAMILIES", "Family", "run", "contradictions", "candidates", "cost"]

#: Inputs that are tried for a radius.
CANDIDATES = 250


class Family(NamedTuple):
    """Networks of one kind, each with an input, and how they are run."""

    name: str
    build: Callable[[torch.Generator], tuple[nn.Module, Tensor]]
    p: float = 2.0
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32


def integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def cancelling(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Draw a linear classifier with a large common part; the small rest makes the difference."""
    n, scale = integer(generator, 2, 12), 2.0 ** integer(generator, 4, 14)
    common, small = normal(generator, 1, n) * scale, normal(generator, 3, n)
    small[:, : n // 2] = 0  # the common part moves nothing
    common[:, n // 2 :] = 0
    net = nn.Sequential(nn.Linear(n, 3))
    net[0].weight.data, net[0].bias.data = common + small, torch.zeros(3)
    return net, normal(generator, 1, n)


def far_from_zero(
    generator: torch.Generator, least: int = 1, most: int = 5
) -> tuple[nn.Module, Tensor]:
    """Draw a net with biases that lift what its layers add up far from zero."""
    width, n = 2 * integer(generator, 2, 8), integer(generator, 2, 6)
    layers = [OrthogonalLinear(n, width), MaxMin(), OrthogonalLinear(width, width), MaxMin()]
    net = nn.Sequential(*layers, OrthogonalLinear(width, 3))
    lift = 10.0 ** integer(generator, least, most)
    for index in (0, 2):
        net[index].bias.data = lift * (1 + normal(generator, width))
    centre = normal(generator, 1, n)
    with torch.no_grad():
        net[4].bias.data -= net(centre)[0] + 0.01 * lift**0.5 * normal(generator, 3)
    return net, centre + 0.1 * normal(generator, 1, n)


def next_to_the_border(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Draw an ordinary net, and bring its input close to the border of its class by bisection."""
    net, x = ordinary(generator)
    other = 3 * normal(generator, *x.shape)
    with torch.no_grad():
        first = net(x).argmax(1)
        for _ in range(integer(generator, 3, 22)):
            middle = (x + other) / 2
            if net(middle).argmax(1) == first:
                x = middle
            else:
                other = middle
    return net, x


def ordinary(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Draw orthogonal layers and MaxMin as they start."""
    width, n = 2 * integer(generator, 2, 16), integer(generator, 2, 16)
    layers = [OrthogonalLinear(n, width), MaxMin(), OrthogonalLinear(width, width), MaxMin()]
    return nn.Sequential(*layers, UnitNormLinear(width, 4)), 2 * normal(generator, 1, n)


def infinity(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Draw a net with row sums of 1, for the ∞-norm, far from zero."""
    width, n = 2 * integer(generator, 2, 8), integer(generator, 2, 6)
    layers = [InfinityNormLinear(n, width), MaxMin(), InfinityNormLinear(width, width), MaxMin()]
    net = nn.Sequential(*layers, InfinityNormLinear(width, 3))
    lift, x = 10.0 ** integer(generator, 1, 4), normal(generator, 1, n)
    net[0].bias.data = lift * (1 + normal(generator, width))
    with torch.no_grad():
        net[4].bias.data -= net(x)[0] + 0.001 * lift**0.5 * normal(generator, 3)
    return net, x + 0.1 * normal(generator, 1, n)


def convolutional(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Draw an orthogonal convolution before dense layers."""
    layers = [OrthogonalConv2d(1, 4, 2, stride=2), MaxMin(), nn.Flatten(), OrthogonalLinear(36, 8)]
    return nn.Sequential(*layers, MaxMin(), UnitNormLinear(8, 3)), normal(generator, 1, 1, 6, 6)


#: Kinds of networks.
FAMILIES = (
    Family("cancelling terms, float32", cancelling),
    Family("cancelling terms, float32, p = inf", cancelling, p=float("inf")),
    Family("cancelling terms, float64", cancelling, dtype=torch.float64),
    Family("far from zero, float32", far_from_zero),
    Family("far from zero, float32, p = inf", infinity, p=float("inf")),
    Family("next to the border, float32", next_to_the_border),
    Family("ordinary, bfloat16", ordinary, autocast=torch.bfloat16),
    Family("ordinary, float16", ordinary, autocast=torch.float16),
    Family(
        "far from zero, float16", partial(far_from_zero, least=-1, most=0), autocast=torch.float16
    ),
    Family("convolutional, bfloat16", convolutional, autocast=torch.bfloat16),
)


def candidates(net: nn.Module, x: Tensor, radius: float, p: float, seed: int) -> Tensor:
    """Choose inputs on the edge of the ball: towards other classes, beside that, and anywhere.

    Parameters
    ----------
    net : torch.nn.Module
        The network.
    x : torch.Tensor
        One input, (1, ...).
    radius, p : float
        Of the ball.
    seed : int
        Of what is beside.

    Returns
    -------
    torch.Tensor
        ``CANDIDATES`` inputs, (n, ...).
    """
    generator = torch.Generator().manual_seed(seed)
    copies = x.expand(CANDIDATES, *x.shape[1:]).contiguous()
    noise = torch.randn(copies.shape, generator=generator, dtype=torch.float64)
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = net(x)[0].double()
        top = int(logits.argmax())
        others = [j for j in range(len(logits)) if j != top]
        gradients = [
            torch.autograd.grad(logits[j] - logits[top], x, retain_graph=True)[0] for j in others
        ]
    towards = torch.cat(gradients).double()[torch.arange(CANDIDATES) % len(others)]
    if p == float("inf"):
        towards, noise = towards.sign(), noise.sign()
    towards = towards / towards.flatten(1).norm(dim=1).clamp(min=1e-300).view(
        -1, *[1] * (x.dim() - 1)
    )
    noise = noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    share = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64) ** 4
    direction = towards + share.view(-1, *[1] * (x.dim() - 1)) * noise
    length = torch.linalg.vector_norm(direction.flatten(1), p, dim=1).clamp(min=1e-300)
    bound = torch.full((CANDIDATES,), radius, dtype=torch.float64)
    direction = direction * (bound / length).view(-1, *[1] * (x.dim() - 1))
    return attacks._within(copies, direction, bound, p)


def within(x: Tensor, moved: Tensor, radius: float, p: float) -> bool:
    """Whether a distance is at most a radius, in rational numbers."""
    pairs = zip(x.flatten().tolist(), moved.flatten().tolist(), strict=True)
    gaps = [abs(Fraction(a) - Fraction(b)) for a, b in pairs]
    if p == float("inf"):
        return max(gaps) <= Fraction(radius)
    if p == 1:
        return sum(gaps) <= Fraction(radius)
    return sum(gap * gap for gap in gaps) <= Fraction(radius) ** 2


@torch.no_grad()
def contradictions(family: Family, seed: int) -> dict[str, Any]:
    """Certify one network with one input, and attack both certificates.

    Parameters
    ----------
    family : Family
        One of ``FAMILIES``.
    seed : int
        Of the network and its input.

    Returns
    -------
    dict
        ``attempts`` made; whether the radius in real arithmetic (``real``) and the sound one
        (``sound``) are contradicted; whether the sound one is ``positive``.
    """
    torch.manual_seed(seed)  # the layers draw from torch's own generator
    net, x = family.build(torch.Generator().manual_seed(seed))
    net, x = net.to(family.dtype).eval(), x.to(family.dtype)
    outcome: dict[str, Any] = {"attempts": 0}
    context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if family.autocast is not None:
        context = torch.autocast("cpu", family.autocast)
    with context, parametrize.cached():
        labels = torch.zeros(1, dtype=torch.int64)
        for name in ("real", "sound"):
            shape = tuple(x.shape[1:])
            found = certify(net, [(x, labels)], shape, family.p, sound=name == "sound")
            radius, predicted = found.radius.item(), found.predictions.item()
            moved = candidates(net, x, min(radius, 1e30), family.p, seed)
            outcome["attempts"] += CANDIDATES
            changed = moved[net(moved).argmax(1) != predicted]
            # A radius of 0 says nothing, not even of x itself in another batch.
            outcome[name] = radius > 0 and any(within(x[0], c, radius, family.p) for c in changed)
        outcome["positive"] = radius > 0
    return outcome


def _search(family: Family, networks: int, seed: int) -> Outcome:
    row: dict[str, Any] = {"family": family.name, "networks": networks}
    row |= dict.fromkeys(("attempts", "real", "sound", "positive"), 0)
    for k in range(networks):
        for key, value in contradictions(family, seed + k).items():
            row[key] += int(value)
    return row, {}


def digit_nets() -> dict[str, nn.Sequential]:
    """Return the nets whose losses are measured, as they start."""
    dense = [nn.Flatten(), OrthogonalLinear(784, 256), MaxMin(), OrthogonalLinear(256, 256)]
    convolutions = [OrthogonalConv2d(1, 16, 4, stride=2), MaxMin()]
    convolutions += [OrthogonalConv2d(16, 32, 4, stride=2), MaxMin(), nn.Flatten()]
    return {
        "dense": nn.Sequential(*dense, MaxMin(), UnitNormLinear(256, 10)),
        "convolutional": nn.Sequential(
            *convolutions, OrthogonalLinear(1568, 100), MaxMin(), UnitNormLinear(100, 10)
        ),
    }


def seconds(function: Callable[[], object], repetitions: int = 15) -> float:
    """Least processor time of a call."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def cost(name: str, epochs: int, count: int = 2000, seed: int = 0) -> Outcome:
    """Measure what soundness costs on a network that is trained on the digits.

    Parameters
    ----------
    name : str
        ``"dense"``, 784-256-256-10, or ``"convolutional"``, 16 and 32 channels before 100-10.
    epochs : int
        Of training, on the digits that ship.
    count : int
        Test digits that are certified.
    seed : int
        Of the weights.

    Returns
    -------
    tuple of dict
        Results: median radii of the right predictions in real arithmetic (``real``) and ``sound``;
        ``time``, of a batch of 500 with its certificates in real arithmetic and sound, relative to
        the network alone (least of 15); ``lost``, the median share of the radius lost in each
        precision. No tensors.
    """
    torch.manual_seed(seed)
    net, data, shape = digit_nets()[name], mnist(), (1, 28, 28)
    images, labels = data.test_images[:count], data.test_labels[:count]
    batches = list(zip(images.split(500), labels.split(500), strict=True))
    train(
        net, data.train_images, data.train_labels, epochs=epochs, lr=2e-3,
        optimizer=torch.optim.Adam, loss=MultiMarginLoss(margin_for_radius(1.5)),
    )  # fmt: skip
    real, sound = (certify(net, batches, shape, sound=sound) for sound in (False, True))
    x = batches[0][0]
    with torch.no_grad(), parametrize.cached():
        runs: list[Callable[[Tensor], object]] = [
            net,
            *(Reader(net, shape, 2.0, sound=sound) for sound in (False, True)),
        ]
        times = [seconds(partial(run, x)) for run in runs]
    lost = {"float32": sound.facts["lost_to_rounding"]}
    for dtype in ("float16", "bfloat16"):
        with torch.autocast("cpu", getattr(torch, dtype)):
            lost[dtype] = certify(net, batches[:1], shape).facts["lost_to_rounding"]
    return {
        "network": name,
        "real": real.radius[real.correct].median().item(),
        "sound": sound.radius[sound.correct].median().item(),
        "time": {"real": times[1] / times[0], "sound": times[2] / times[0]},
        "lost": lost,
    }, {}


def run(
    *,
    networks: int = 200,
    epochs: int = 10,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Search in all families, and measure the cost.

    Parameters
    ----------
    networks : int
        In each family, with 500 attempts each.
    epochs : int
        As in :func:`cost`.
    seed : int
        Of the first network; the others have the following ones.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, one a family: ``networks``, ``attempts``, how many radii were
        contradicted in ``real`` arithmetic and with ``sound``, and how many sound ones are
        ``positive``; ``cost``, see :func:`cost`. No tensors.
    """
    rows = rows or Rows()
    table = []
    for family in rows.bar(FAMILIES, "families"):
        one = partial(_search, family, networks, seed)
        table.append(rows.compute(family.name, one)[0])
    costs = [
        rows.compute(f"cost {name}", partial(cost, name, epochs))[0]
        for name in ("dense", "convolutional")
    ]
    return {"rows": table, "cost": costs}, {}
