r"""Attention: Lipschitz on balls, and not on all of space.

.. math:: o_i = \sum_j P_{ij} v_j, \qquad P_i = \operatorname{softmax}(s\, K q_i)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipbook.layers.joins import NEEDS_DOMAIN, Join
from lipbook.rules import Range

__all__ = ["ScaledDotProduct"]


class ScaledDotProduct(Join):
    r"""Scaled dot-product attention of queries, keys and values, (..., tokens, features).

    With tokens of norms at most :math:`R_q, R_k, R_v` and column sums of P at most c,

    .. math::
        \lVert\Delta o\rVert_2 \le s R_k R_v \lVert\Delta q\rVert_2
        + s \sqrt{c}\, R_q R_v \lVert\Delta k\rVert_2 + \sqrt{c}\, \lVert\Delta v\rVert_2 .

    Parameters
    ----------
    **options
        Mask, causality and scale of
        :func:`torch.nn.functional.scaled_dot_product_attention`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *parts: Tensor) -> Tensor:
        """Attend."""
        query, key, value = parts
        options = dict(self.options)
        mask = options.pop("attn_mask", None)
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, mask, **options)

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factors of the formula above; for p = 1 and ∞ times the root of the number of entries."""
        if ranges is None:
            raise ValueError(f"attention {NEEDS_DOMAIN}")
        query, _, value = ranges
        sizes = [token_norms(r) for r in ranges]
        scale = self.options.get("scale")
        s = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
        columns = math.sqrt(query.shape[-2])
        q, k, v = sizes
        ones = torch.ones_like(v)
        factors = [s * k * v, s * columns * q * v, columns * ones]
        outputs = math.prod(query.shape[:-1]) * value.shape[-1]
        slack = 1 + 2.0**-40
        if p == 2:
            return [factor * slack for factor in factors]
        entries = [outputs if p == 1 else math.prod(r.shape) for r in ranges]
        return [factor * slack * math.sqrt(n) for factor, n in zip(factors, entries, strict=True)]

    def range(self, ranges: Sequence[Range]) -> Range:
        """Averages of the values."""
        query, _, value = ranges
        low, high = value.low.amin(-2, keepdim=True), value.high.amax(-2, keepdim=True)
        shape = (*low.shape[:-2], query.shape[-2], low.shape[-1])
        return Range(low.expand(shape), high.expand(shape))


def token_norms(values: Range) -> Tensor:
    """Largest Euclidean norm of a token, (batch,)."""
    norms = torch.linalg.vector_norm(values.abs(), dim=-1)
    if values.center is not None and values.radius is not None:
        reach = torch.linalg.vector_norm(values.center, dim=-1)
        reach = reach + values.radius.view(-1, *[1] * (reach.dim() - 1))
        norms = torch.minimum(norms, reach)
    return norms.flatten(1).amax(1) * (1 + 2.0**-40)
