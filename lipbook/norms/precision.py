"""What keeps squares in range, and upper bounds above the rounding of their computation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = []

# Note [rounding]
# An upper bound that rounding pushes below the norm is no bound. Sums, matrix products, Fourier
# sums and symmetric eigenvalues of length or order `inner` are off by at most a small multiple of
# eps * inner, relative to a Frobenius norm or to a sum of absolute values, which exceed the
# spectral norm by at most sqrt(rank), or rank for a Gram matrix. Upper bounds are therefore
# multiplied by 1 + 4 * eps * inner * rank: 1e-14 for one channel, 1e-11 for sixty-four. Functions
# that return the norm itself carry no such margin.


def _margin(inner: int, rank: float) -> float:
    return 1 + 4 * torch.finfo(torch.float64).eps * inner * rank


def _scale(matrix: Tensor) -> Tensor:
    """Return the power of two below the largest entry of each matrix, a constant to divide by.

    Squares of what is left neither overflow nor underflow, and the division does not round.
    """
    largest = matrix.detach().abs().amax((-2, -1))
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)


def _root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where a norm has 0 among its subgradients."""
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
