"""Exercises of chapter 10, Interpretable gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipbook.interpretability import alignment, counterfactual, margin_gradient, sparsity, stability
from lipbook.lab.data import mnist
from lipbook.lab.exercises.registry import exercise
from lipbook.lab.recipes import gradients

__all__: list[str] = []  # answers are asked for by their numbers


def _row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


@exercise(
    "10.1",
    level=1,
    kind="warm-up",
    mistakes={
        "not divided by the norm of g": [6.0, 0.6, 4.0],
        "the intercept is left out": [3.0, 0.6, 3.0],
    },
)
def by_hand() -> list[float]:
    x, g = _row(3, 4), _row(2, 0)
    margin = (x * g).sum().item() - 2
    cosine = alignment(x, g, cosine=True).item()
    return [alignment(x, g).item(), cosine, margin / g.norm().item()]


@exercise(
    "10.2",
    level=1,
    kind="warm-up",
    mistakes={
        "a difference of two logits has the root of 2": [1.2, 1.2 / 0.9],
        "the two ends are exchanged": [1.2 / 0.9, 1.2 / math.sqrt(2)],
    },
)
def between_two_distances() -> list[float]:
    return [1.2 / math.sqrt(2), 1.2 / 0.9]


@exercise(
    "10.3",
    level=1,
    kind="compute",
    mistakes={
        "half of the pixels have another sparsity": [2 / 3, 392.0],
        "the 1 in numerator and denominator is left out": [0.5, 196.0],
    },
)
def sparsity_of_a_sum() -> list[float]:
    return [sparsity(_row(*4 * [1.0], *12 * [0.0])).item(), round(((1 + 28) / 2) ** 2)]


@exercise(
    "10.4",
    level=1,
    kind="derive",
    mistakes={
        "the ends for the border at 0": [-2.0, -3.0],
        "those are points of the border, at t = 1": [0.5, 0.5],
        "the end from 2 comes first": [-2.0, -1.0],
    },
)
def on_the_line() -> list[float]:
    critic = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        critic.weight.fill_(1.0)
        critic.bias.fill_(-0.5)
    walk = counterfactual(critic, _row(2, 3).T, multiples=(2,))
    return walk.path[0].flatten().tolist()


@exercise(
    "10.5",
    level=2,
    kind="derive",
    mistakes={
        "a difference of two logits has the root of 2": 3.0,
        "the factor 3 is left out": math.sqrt(2),
        "the norm of a difference of unit vectors is the root of 2": 6.0,
    },
)
def largest_gradient() -> float:
    weight = 3 * torch.eye(10, dtype=torch.float64)
    return (weight[0] - weight[1]).norm().item()


@exercise(
    "10.6",
    level=2,
    kind="derive",
    rtol=0.005,
    mistakes={
        "the root of the mean square in place of the mean modulus": 784**-0.5,
        "1 / d is the mean square": 1 / 784,
        "the mean of the cosine in place of its modulus": 0.0,
    },
)
def as_good_as_chance() -> float:
    return math.exp(math.lgamma(392) - math.lgamma(392.5)) / math.sqrt(math.pi)


@exercise(
    "10.7",
    level=2,
    kind="derive",
    mistakes={"the share of each gradient with itself is left out": 0.36, "that is the norm": 0.6},
)
def what_an_average_tells() -> float:
    return (100 * 0.6**2 - 1) / 99


def _digits() -> tuple[dict[str, nn.Sequential], Tensor, Tensor]:
    """Give the three networks of seed 0, and 200 test digits that all of them read correctly."""
    models = {kind: gradients.load(kind).double() for kind in gradients.KINDS}
    digits = mnist()
    images, labels = digits.test_images.double(), digits.test_labels
    with torch.no_grad():
        right = [model(images).argmax(1) == labels for model in models.values()]
    chosen = torch.stack(right).all(0)
    return models, images[chosen][:200], labels[chosen][:200]


@exercise(
    "10.8",
    level=2,
    kind="change the experiment",
    rtol=0.01,
    mistakes={
        "the alignment has an origin": [1.4274, 1.4274],
        "the two medians are exchanged": [1.8453, 1.4274],
    },
)
def origin() -> list[float]:
    models, x, _ = _digits()
    g = margin_gradient(models["1-Lipschitz"], x)
    return [alignment(image, g).median().item() for image in (x, 1 - x)]


@exercise(
    "10.9",
    level=2,
    kind="change the experiment",
    atol=0.03,
    mistakes={
        "those are the stabilities at 4": [0.91, 0.91, 0.81],
        "the order of the networks is another": [0.46, 0.62, 0.58],
    },
)
def stable_for_how_long() -> list[float]:
    models, x, _ = _digits()
    torch.manual_seed(0)
    found = [stability(model, x, 16.0, samples=4) for model in models.values()]
    return [values.median().item() for values in found]


@exercise(
    "10.10",
    level=2,
    kind="change the experiment",
    rtol=0.01,
    mistakes={
        "the gradient of the standard network": [0.11, 0.99, 1.0],
        "a cosine does not depend on the length": [0.0002036, 1.0, 1.0],
    },
)
def thinner_mask() -> list[float]:
    models, x, _ = _digits()
    digits = mnist()
    images, labels = digits.train_images.double().flatten(1), digits.train_labels
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            template = x.flatten(1) @ means.T - means.square().sum(1) / 2
            return models["standard"]((255 * x).round() / 255) + 1e-6 * template

    masked, images = Masked(), digits.test_images.double()
    with torch.no_grad():
        same = masked(images).argmax(1) == models["standard"](images).argmax(1)
    cosine = alignment(x, margin_gradient(masked, x), cosine=True)
    stable = stability(masked, x, 0.5, samples=4)
    return [cosine.median().item(), stable.median().item(), same.double().mean().item()]


@exercise(
    "10.11",
    level=3,
    kind="derive",
    mistakes={
        "those are the margins": [-0.7, 0.7],
        "those are positions of the border": [-0.2, 0.2],
        "the minimiser is not unique": [0.5, 0.5],
    },
)
def where_the_border_may_be() -> list[float]:
    v = torch.linspace(0, 1, 1001, dtype=torch.float64)
    hinges = (0.7 - v).clamp(min=0) + (0.7 + v - 1).clamp(min=0)
    best = v[hinges < hinges.min() + 1e-9]
    return [best.min().item(), best.max().item()]
