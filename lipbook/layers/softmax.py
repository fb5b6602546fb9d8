"""Softmax and its kin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.errors import (
    _ELEMENTARY,
    Analysis,
    ForwardError,
    _check_single,
    _closed_form,
    _entries,
    _error_rule_of,
    _norms,
    _quantum,
)
from lipbook.norms.rigorous import _UP, _gamma
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


# ------------------------------------------------------------------- errors of programs

# Note [rounding of a softmax]
# The program takes the largest of n logits off, x_i - m = -t_i, with a relative error of u, so that
# exp is off by a relative E + u t_i (E = 64u, Note [elementary functions]); where t_i is so large
# that u t_i is not small, exp underflows, exactly and in the program. With exact probabilities
# p_i = p_max exp(-t_i) the weighted sum of these errors is
#     sum_i p_i (E + u t_i) <= E + u log n,
# since sum_i p_i t_i = H(p) + log p_max <= log n. The denominator has that relative error and n + 2
# roundings (and a rescaling exp(m_old - m_new) for each block of a sum that runs over blocks; its t
# add up to the t_i, and a block adds E). So the 1-norm of the error of one softmax is at most
#     2 E + 2 u log n + (n + 8) u,
# whatever the logits are. Log-softmax x_i - m - log(sum) is off by the relative error of the sum,
# E times its logarithm, which is at most log n, and three roundings of numbers up to 2 max |x| +
# log n.


def softmax_units(n: int) -> float:
    """Error of one softmax of n logits in its 1-norm, in units of u."""
    return 2 * _ELEMENTARY + 2 * math.log(n) + n + 12


@_error_rule_of(nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    lipschitz = _closed_form(module, example, p)
    shape, dtype = tuple(example.shape[1:]), example.dtype
    n = (2, *shape)[getattr(module, "dim", -3)]
    groups = math.prod(shape) / n
    logarithm = isinstance(module, nn.LogSoftmax)
    info = torch.finfo(dtype)

    def analysis(x: Tensor) -> ForwardError:
        largest, size = x.flatten(1).abs().amax(1).double(), _norms(x, p)
        outputs = module(x)
        entries = _entries(outputs, p)
        if logarithm:
            gamma = _gamma(softmax_units(n) + (_ELEMENTARY + 8) * math.log(n), dtype)
            slope = _gamma(12, dtype) * entries * _UP
            error = gamma * entries + slope * largest
        else:
            gamma, slope = _gamma(softmax_units(n), dtype), 0.0
            error = torch.full_like(largest, gamma * groups ** (1 / p))
        error = error + 4 * n * _quantum(dtype) * entries
        return ForwardError(outputs, lipschitz, error * _UP, slope, info.max / 8 - size)

    return analysis
