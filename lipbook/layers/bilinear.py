r"""Bilinear layers: products of two inputs, Lipschitz on bounded sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.layers.joins import NEEDS_DOMAIN, Join, rounded
from lipbook.rules import Range, outward

__all__ = ["BilinearCall"]

_UP = 1 + 2.0**-40


class BilinearCall(Join):
    r"""One call of :class:`torch.nn.Bilinear`, :math:`y_k = x_1^\top A_k x_2 + b_k`.

    **Guaranteed** on the ranges: the derivative with respect to :math:`x_1` is the matrix
    :math:`B_{ki} = \sum_j A_{kij} x_{2,j}`, which differs from that of the middle
    :math:`\bar x_2` of the box by at most :math:`\sum_j |A_{kij}| h_j` in each entry, h being half
    the widths; so its p-norm is at most
    :math:`\lVert B(\bar x_2)\rVert_p + \lVert |A| h\rVert_p`. Likewise for :math:`x_2`.

    Parameters
    ----------
    module : torch.nn.Bilinear
        The layer.
    """

    def __init__(self, module: nn.Bilinear) -> None:
        super().__init__()
        self.module = module

    def forward(self, *parts: Tensor) -> Tensor:
        """Call the module."""
        return self.module(*parts)

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Norms of the matrices of the other input, the largest over leading dimensions."""
        if ranges is None:
            raise ValueError(f"a product of two inputs {NEEDS_DOMAIN}")
        weight = self.module.weight.detach().double()
        factors = []
        for other, equation in ((1, "kij,...j->...ki"), (0, "kij,...i->...kj")):
            values = ranges[other]
            middle = torch.einsum(equation, weight, values.middle)
            half = torch.einsum(equation, weight.abs(), values.half)
            rounding = torch.einsum(equation, weight.abs(), values.abs()) * values.shape[-1]
            norm = torch.linalg.matrix_norm(middle, p)
            norm = norm + torch.linalg.matrix_norm(half + rounding * 2.0**-48, p)
            factors.append((norm.flatten(1).amax(1) if norm.dim() > 1 else norm) * _UP)
        return factors

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        r"""Bound sums of products of three, :math:`\gamma (|A| |x_1| |x_2| + |b|)`."""
        if dtype != self.module.weight.dtype:
            raise ValueError(f"must run in the dtype of its weight, got {dtype}: use sound=False")
        weight, bias = self.module.weight.detach().double().abs(), self.module.bias
        first, second = (r.abs() for r in ranges)
        size = torch.einsum("kij,...i,...j->...k", weight, first, second)
        if bias is not None:
            size = size + bias.detach().double().abs()
        m, n = weight.shape[1:]
        largest = (1 + weight.amax()) * (1 + first.amax()) * (1 + second.amax())
        return rounded(size, m + n + m * n + 4, dtype, p, m * n * largest)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Interval product, by middle and radius."""
        weight, bias = self.module.weight.detach().double(), self.module.bias
        first, second = ranges

        def product(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("kij,...i,...j->...k", w, a, b)

        middle = product(weight, first.middle, second.middle)
        if bias is not None:
            middle = middle + bias.detach().double()
        size = weight.abs()
        spread = product(size, first.half, second.middle.abs() + second.half)
        spread = spread + product(size, first.middle.abs(), second.half)
        slack = product(size, first.abs(), second.abs()) + middle.abs()
        terms = weight.shape[1] * weight.shape[2] + 8
        return Range(*outward(middle - spread, middle + spread, slack * terms * 2.0**-50))


def bilinear_call(
    module: nn.Bilinear,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,
    tracked: Callable[[Any], bool],
) -> list[tuple[Tensor, nn.Module, tuple[Any, ...]]]:
    """One call as a layer."""
    given = dict(zip(("input1", "input2"), args, strict=False)) | kwargs
    inputs = (given["input1"], given["input2"])
    if inputs[0].dim() < 2:
        raise ValueError("must keep samples apart, but got a vector without a batch")
    return [(outputs, BilinearCall(module), inputs)]
