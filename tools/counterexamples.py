"""Search for inputs that contradict a certificate, with rounding accounted for and without.

Networks are built to round badly: large terms that cancel, hidden layers far from zero, half
precision, inputs next to the border of a class. Each certified radius is attacked from within by
inputs on its edge, towards the nearest class and beside. A counterexample is a number of the
inputs' dtype, no further than the radius in rational arithmetic, with another prediction.

    python tools/counterexamples.py                      # a million attempts, some minutes
    python tools/counterexamples.py --attempts 20000     # fewer
    python tools/counterexamples.py --measure            # radius and time lost, on digits

The exit status is 1 if a certificate with ``sound=True`` was contradicted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook import attacks, robustness
from lipbook.activations import MaxMin
from lipbook.attacks import pgd
from lipbook.convolutions import OrthogonalConv2d
from lipbook.lab.data import mnist
from lipbook.lab.training import train
from lipbook.losses import MultiMarginLoss, margin_for_radius
from lipbook.orthogonal import InfinityNormLinear, OrthogonalLinear, UnitNormLinear
from lipbook.robustness import certify

CANDIDATES = 250  # inputs that are tried for a radius


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


def far_from_zero(generator: torch.Generator, most: int = 5) -> tuple[nn.Module, Tensor]:
    """Draw a net with biases that lift what its layers add up far from zero."""
    width, n = 2 * integer(generator, 2, 8), integer(generator, 2, 6)
    layers = [OrthogonalLinear(n, width), MaxMin(), OrthogonalLinear(width, width), MaxMin()]
    net = nn.Sequential(*layers, OrthogonalLinear(width, 3))
    lift = 10.0 ** integer(generator, 1, most)
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


FAMILIES = (
    Family("cancelling terms, float32", cancelling),
    Family("cancelling terms, float32, p = inf", cancelling, p=float("inf")),
    Family("cancelling terms, float64", cancelling, dtype=torch.float64),
    Family("far from zero, float32", far_from_zero),
    Family("far from zero, float32, p = inf", infinity, p=float("inf")),
    Family("next to the border, float32", next_to_the_border),
    Family("ordinary, bfloat16", ordinary, autocast=torch.bfloat16),
    Family("ordinary, float16", ordinary, autocast=torch.float16),
    Family("far from zero, float16", partial(far_from_zero, most=1), autocast=torch.float16),
    Family("convolutional, bfloat16", convolutional, autocast=torch.bfloat16),
)


def candidates(net: nn.Module, x: Tensor, radius: float, p: float, seed: int) -> Tensor:
    """Choose inputs on the edge of the ball: towards other classes, beside that, and anywhere."""
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
    return sum(gap * gap for gap in gaps) <= Fraction(radius) ** 2


@torch.no_grad()
def contradictions(family: Family, seed: int) -> tuple[dict[bool, int], int, int]:
    """Certificates of one network contradicted, by ``sound``; attempts; radii above 0."""
    torch.manual_seed(seed)  # the layers draw from torch's own generator
    net, x = family.build(torch.Generator().manual_seed(seed))
    net, x = net.to(family.dtype).eval(), x.to(family.dtype)
    found, attempts, positive = {False: 0, True: 0}, 0, 0
    context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if family.autocast is not None:
        context = torch.autocast("cpu", family.autocast)
    with context, parametrize.cached():
        labels = torch.zeros(1, dtype=torch.int64)
        for sound in (False, True):
            shape = tuple(x.shape[1:])
            certificate = certify(net, [(x, labels)], shape, family.p, sound=sound)
            radius, predicted = certificate.radius.item(), certificate.predictions.item()
            positive += sound and radius > 0
            moved = candidates(net, x, min(radius, 1e30), family.p, seed)
            attempts += CANDIDATES
            for candidate in moved[net(moved).argmax(1) != predicted]:
                if within(x[0], candidate, radius, family.p):
                    found[sound] += 1
                    break
    return found, attempts, positive


def rounds(attempts: int) -> Iterator[tuple[Family, int]]:
    """Families in turn with new seeds, until there are enough attempts."""
    for seed in range(-(-attempts // (2 * CANDIDATES * len(FAMILIES)))):
        for family in FAMILIES:
            yield family, seed


def search(attempts: int) -> dict[bool, int]:
    """Search, print a line a family, and return the certificates contradicted by ``sound``."""
    start = time.perf_counter()
    rows = {family.name: [0, 0, 0, 0, 0] for family in FAMILIES}
    for family, seed in rounds(attempts):
        found, tried, positive = contradictions(family, seed)
        row = rows[family.name]
        for column, value in enumerate((1, tried, found[False], found[True], positive)):
            row[column] += value
    header = ("nets", "attempts", "contradicted", "with sound", "sound radius > 0")
    print(f"{'':36}" + "".join(f"{title:>18}" for title in header))
    for name, row in rows.items():
        print(f"{name:36}" + "".join(f"{value:18,}" for value in row))
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    print(f"{'all':36}" + "".join(f"{value:18,}" for value in total))
    print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    return {False: total[2], True: total[3]}


def digit_nets() -> dict[str, nn.Sequential]:
    """Return the nets whose losses are measured, as they start."""
    torch.manual_seed(0)
    dense = [nn.Flatten(), OrthogonalLinear(784, 256), MaxMin(), OrthogonalLinear(256, 256)]
    convolutions = [OrthogonalConv2d(1, 16, 4, stride=2), MaxMin()]
    convolutions += [OrthogonalConv2d(16, 32, 4, stride=2), MaxMin(), nn.Flatten()]
    return {
        "784-256-256-10": nn.Sequential(*dense, MaxMin(), UnitNormLinear(256, 10)),
        "conv 16-32, 100-10": nn.Sequential(
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


def measure(epochs: int) -> None:
    """Print what soundness costs on nets that are trained on the digits."""
    data, shape = mnist(), (1, 28, 28)
    batches = list(zip(data.test_images.split(500), data.test_labels.split(500), strict=True))
    for name, net in digit_nets().items():
        loss = MultiMarginLoss(margin_for_radius(1.5))
        images, labels = data.train_images, data.train_labels
        train(net, images, labels, epochs=epochs, lr=2e-3, optimizer=torch.optim.Adam, loss=loss)
        real, sound = (certify(net, batches, shape, sound=sound) for sound in (False, True))
        print(f"\n{name}, float32: {sound.certified_accuracy(0)} right")
        medians = [c.radius[c.correct].median().item() for c in (real, sound)]
        print(f"median radius {medians[0]:.4f}, sound {medians[1]:.4f}", end=", ")
        print(f"lost {100 * (1 - medians[1] / medians[0]):.2f} %")
        x = batches[0][0]
        with torch.no_grad(), parametrize.cached():
            body, head = robustness._split(net)
            with_errors = robustness._radius_of_program(body, head, x, 2.0)
            without = robustness._radius_in_real_arithmetic(body, head, shape, 2.0)
            runs: list[Callable[[Tensor], object]] = [net, without, with_errors]
            times = [seconds(partial(run, x)) for run in runs]
        print("time of a batch relative to the net alone:", end=" ")
        print(f"{times[1] / times[0]:.2f} real, {times[2] / times[0]:.2f} sound")
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                half = certify(net, batches[:1], shape)
            print(f"lost under autocast in {dtype}: {100 * half.facts['lost_to_rounding']:.0f} %")
        moved = pgd(net, x, sound.predictions[: len(x)], sound.radius[: len(x)], steps=20)
        kept = net(moved).argmax(1) == sound.predictions[: len(x)]
        print(f"withstand PGD at the radius: {int(kept.sum())} of {len(x)}")
        for epsilon in (0.5, 1.0, 1.5):
            attacked = attacks.attacked_accuracy(net, batches[:1], epsilon, steps=20)
            right = (sound.radius >= epsilon)[: len(x)] & sound.correct[: len(x)]
            print(f"at {epsilon}: certified {100 * right.double().mean():.1f} %", end=", ")
            print(f"under PGD {100 * attacked.value:.1f} %")


def main(arguments: list[str] | None = None) -> int:
    """Search or measure, and return the exit status."""
    parser = argparse.ArgumentParser(description="Search counterexamples to certificates.")
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--measure", action="store_true", help="measure the cost instead")
    parser.add_argument("--epochs", type=int, default=10, help="of training, for --measure")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(options.epochs)
        return 0
    return int(search(options.attempts)[True] > 0)


if __name__ == "__main__":
    sys.exit(main())
