"""Exercises of chapter 1, Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lipbook.jacobians import convolution_matrix, jacobian, softmax_jacobian
from lipbook.lab.exercises.registry import exercise

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "1.1",
    level=1,
    kind="warm-up",
    mistakes={"the squares": [8.0, 2.0], "the shorter one first": [math.sqrt(2), math.sqrt(8)]},
)
def half_axes() -> Tensor:
    return torch.linalg.svdvals(torch.tensor([[2.0, -2.0], [1.0, 1.0]], dtype=torch.float64))


@exercise(
    "1.2",
    level=1,
    kind="warm-up",
    mistakes={
        "without the product with v": [20_000_000, 40_000, 980],
        "the rank": [21_000_000, 40_000, 20],
    },
)
def brackets() -> list[int]:
    n, rank = 1000, 20
    return [n * rank * n + n * n, rank * n + n * rank, n - rank]


@exercise(
    "1.3", level=1, kind="derive", mistakes={"the transpose": [[0, 0, 1], [1, 0, 0], [0, 1, 0]]}
)
def sorting() -> Tensor:
    x = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    return jacobian(lambda x: x.sort(dim=1).values, x)[0]


@exercise(
    "1.4",
    level=1,
    kind="compute",
    mistakes={
        "without p pᵀ": [0.5, 0.25, 0.25],
        "the bound in place of the largest": [0.5, 0.25, 0.0],
    },
)
def three_scores() -> Tensor:
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    return torch.linalg.svdvals(softmax_jacobian(p.log()))


def _products() -> list[tuple[Any, ...]]:
    draws = []
    for m, n in ((4, 6), (3, 3)):
        matrix, u, v = torch.randn(m, n), torch.randn(m), torch.randn(n)
        draws.append((matrix.T.__matmul__, u, v))
    return draws


@exercise("1.5", level=2, kind="derive", at=_products)
def two_pulls() -> Callable[..., Tensor]:
    def push(pull: Callable[[Tensor], Tensor], u: Tensor, v: Tensor) -> Tensor:
        product: Tensor = torch.func.vjp(pull, u)[1](v)[0]
        return product

    return push


@exercise(
    "1.6", level=2, kind="derive", mistakes={"normal entries": 30.0, "the standard deviation": 2.0}
)
def random_pulls() -> Tensor:
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    return torch.einsum("bi,ij,bj->b", signs, gram, signs).var(correction=0)


@exercise(
    "1.7",
    level=2,
    kind="derive",
    mistakes={
        "n − 1 in the variance": [math.sqrt(3 / 14)] * 2 + [0.0, 0.0],
        "one direction is lost, not two": [math.sqrt(2 / 7)] * 3 + [0.0],
        "ρ² in place of ρ": [2 / 7, 2 / 7, 0.0, 0.0],
    },
)
def layer_normalisation() -> Tensor:
    layer = nn.LayerNorm(4, eps=0, elementwise_affine=False)
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)
    return torch.linalg.svdvals(jacobian(layer, x)[0])


def _padded(size: int, mode: Literal["zeros", "circular"]) -> float:
    kernel = torch.tensor([[[-1.0, 2.0, 0.6]]], dtype=torch.float64)
    matrix = convolution_matrix(kernel, size, padding=1, padding_mode=mode)
    return float(torch.linalg.svdvals(matrix)[0])


@exercise(
    "1.8",
    level=2,
    kind="compute",
    mistakes={
        "a circle without room for the zeros": _padded(10, "circular"),
        "the norm in place of the bound": _padded(10, "zeros"),
        "the sum of the moduli": 3.6,
    },
)
def zero_padding() -> float:
    return _padded(11, "circular")


@exercise("1.9", level=2, kind="change the experiment")
def losses_of_differences() -> set[str]:
    logits, labels = torch.randn(8, 10), torch.arange(8)
    goal = nn.functional.one_hot(labels, 10).to(logits)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "cross-entropy": lambda z: nn.functional.cross_entropy(z, labels),
        "squared": lambda z: (z - goal).square().mean(),
        "hinge": lambda z: nn.functional.multi_margin_loss(z, labels),
        "logistic": lambda z: nn.functional.binary_cross_entropy_with_logits(z, goal),
    }
    sums = {name: torch.func.grad(loss)(logits).sum(1).abs() for name, loss in losses.items()}
    return {name for name, total in sums.items() if total.max() < 1e-12}


def _functions() -> list[tuple[Any, ...]]:
    def polynomial(x: Tensor) -> Tensor:
        return (x[:-1] * x[1:] ** 2).sum()

    return [(f, torch.randn(5), torch.randn(5)) for f in (polynomial, lambda x: x.logsumexp(0))]


@exercise("1.10", level=3, kind="compute", at=_functions)
def hessian_product() -> Callable[..., Tensor]:
    def product(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        hessian: Tensor = torch.func.hessian(f)(x)
        return hessian @ v

    return product
