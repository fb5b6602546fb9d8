r"""Unfolding into patches and folding back: matrices of zeros and ones.

# Note [patches]
# Unfold copies: each output is one input, or 0 in the padding, so that its matrix A has at most a
# single 1 in a row, and A^T A = diag(m) for the number m_j of patches that pixel j is in. Hence
# ||A||_inf = 1 (if a pixel is in a patch), ||A||_1 = max m and ||A||_2 = sqrt(max m). Fold is A^T:
# its norms are those of A for the dual exponent, 1/p + 1/q = 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.rules import Affine, Bound, Shape, _rule_of, affine_rule, lipschitz_rule

__all__: list[str] = []


def _patches(module: Any, size: Any) -> Tensor:
    """Count the patches that each pixel is in."""
    window = (module.kernel_size, module.dilation, module.padding, module.stride)
    one = torch.ones(1, 1, *size, dtype=torch.float64)
    patches = torch.ones_like(functional.unfold(one, *window))
    return functional.fold(patches, (size[0], size[1]), *window)


@lipschitz_rule.register
def _(module: nn.Unfold, input_shape: Shape, p: float) -> Bound:
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be channels and 2 sizes, got {input_shape}")
    most = _patches(module, input_shape[1:]).max().item()
    return Bound(min(most, 1.0) if p == math.inf else most ** (1 / p), "exact", p)


@lipschitz_rule.register
def _(module: nn.Fold, input_shape: Shape, p: float) -> Bound:
    if len(input_shape) != 2:
        raise ValueError(f"input_shape must be entries of a patch and patches, got {input_shape}")
    size = module.output_size
    most = _patches(module, (size, size) if isinstance(size, int) else size).max().item()
    return Bound(min(most, 1.0) if p == 1 else most ** (1 - 1 / p), "exact", p)


@_rule_of(nn.Unfold, nn.Fold, dispatch=affine_rule)
def _(module: Any, input_shape: Shape) -> Affine:
    shape = tuple(module(torch.zeros(1, *input_shape, dtype=torch.float64)).shape[1:])
    terms = math.prod(input_shape) if isinstance(module, nn.Fold) else 1
    bias = torch.zeros(shape, dtype=torch.float64)
    return Affine(module, module, module, bias, terms)
