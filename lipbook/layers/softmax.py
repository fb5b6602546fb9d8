"""Softmax and its kin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.rules import Bound, Range, Shape, _rule_of, outward, range_rule

__all__: list[str] = []


# Note [softmax]
# J = diag(s) - s s^T is symmetric with row sums of moduli 2 s_i (1 - s_i) <= 1/2, so that
# ||J||_2 <= ||J||_inf = ||J||_1 <= 1/2; two equal logits, the others at minus infinity, attain it.
# Log-softmax has J = I - 1 s^T, and a norm is convex in s, hence largest at a corner
# s = e_j: an oblique projection of 2-norm sqrt(n), with row sums up to 2, column sums up to n - 1.


@_rule_of(nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    dim = getattr(module, "dim", -3)  # Softmax2d has none
    if dim is None or dim % (len(input_shape) + 1) == 0:
        raise ValueError(f"dim must be a dimension of a sample, got {dim}")
    n = (2, *input_shape)[dim]
    if n == 1:
        return Bound(0, "exact", p)
    log_softmax = {1: n - 1, 2: math.sqrt(n), math.inf: 2}[p]
    return Bound(log_softmax if isinstance(module, nn.LogSoftmax) else 0.5, "exact", p)


def sum_of_others(terms: Tensor, dim: int) -> Tensor:
    """Sum of all entries but one's own, without a difference."""
    before = terms.cumsum(dim).roll(1, dim)
    behind = terms.flip(dim).cumsum(dim).flip(dim).roll(-1, dim)
    n = terms.shape[dim]
    place = torch.arange(n).view([n if d == dim % terms.dim() else 1 for d in range(terms.dim())])
    return before.where(place > 0, 0.0) + behind.where(place < n - 1, 0.0)


@_rule_of(nn.Softmax, nn.Softmin, nn.Softmax2d, dispatch=range_rule)
def _(module: Any, values: Range) -> Range:
    r"""Take corners: a probability falls with every logit but its own."""
    dim = getattr(module, "dim", -3)
    sign = -1.0 if isinstance(module, nn.Softmin) else 1.0
    low, high = (values.low, values.high) if sign == 1 else (-values.high, -values.low)

    def chance(own: Tensor, others: Tensor) -> Tensor:
        shift = torch.maximum(own, others).amax(dim, keepdim=True)
        return (own - shift).exp() / (
            (own - shift).exp() + sum_of_others((others - shift).exp(), dim)
        )

    least, most = outward(chance(low, high), chance(high, low), 2.0**-40)
    least, most = least.clamp(min=0), most.clamp(max=1)
    if values.center is None or values.radius is None:
        return Range(least, most)
    return Range(least, most, module(values.center), values.radius * 0.5 * (1 + 2.0**-40))
