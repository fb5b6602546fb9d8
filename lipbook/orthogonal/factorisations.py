"""Orthonormal columns by Gram–Schmidt: the orthogonal factor of the QR decomposition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipbook.orthogonal.orthonormality import (
    Orthonormal,
    add_to_diagonal,
    apply,
    batched,
    eye_like,
    gram_of,
    is_elongated,
    map_tall,
    negligible,
    polish,
    power_of_two,
    save,
    times,
    two_modes,
    without_autocast,
)

__all__ = [
    "qr",
    "cholesky_qr",
    "QR",
    "CholeskyQR",
]


def qr(matrix: Tensor) -> Tensor:
    r"""Orthogonal factor of the QR decomposition with a positive diagonal of R, by reflections.

    .. math:: A = Q R, \qquad R \text{ upper triangular}, \quad R_{ii} > 0

    That is Gram–Schmidt orthonormalisation of the columns from left to right, computed stably:
    by Householder reflections and one polishing step, or for large and elongated matrices in
    float32 by CholeskyQR, if a bound of the condition number says that it is as exact.

    **Guaranteed for any matrix**, of any scale and condition, rank-deficient or zero: all
    singular values are 1, to 1e-6 in float32 up to n = 1024 (5e-6 where rounding errors do not
    cancel, as for a matrix of equal entries that is not four times as long as wide) and 1e-13 in
    float64.

    The gradient solves with :math:`R` and grows with its condition number. Where :math:`R` is
    singular, :math:`Q` jumps and has no gradient; what is returned is finite.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n).

    Returns
    -------
    torch.Tensor
        Shape (..., m, n).

    Raises
    ------
    TypeError
        If ``matrix`` is no real floating-point tensor.
    ValueError
        If ``matrix`` has no rows and columns.

    Examples
    --------
    Even a matrix of rank one becomes orthogonal:

    >>> rank_one = torch.outer(torch.randn(4), torch.randn(4))
    >>> bool((torch.linalg.svdvals(qr(rank_one)) - 1).abs().max() < 1e-6)
    True
    """
    return map_tall(lambda tall: apply(_QR, tall)[0], matrix)


# Note [two passes of Cholesky]
# Reflections take LAPACK four times as long as the products of CholeskyQR, which are all that a
# well-conditioned matrix needs: Q = A R⁻¹ with RᵀR = AᵀA in float32. Rounding of the Gram matrix,
# some 1e-7 of the norms of the columns, meets the square of their condition number, at most 9 if
# their correlation matrix I + E has ‖E‖ ≤ 0.8. Then Q is as good as by reflections. Otherwise a
# second pass starts from Q, which is nearly orthonormal up to condition numbers of about 1e3;
# where it is not, reflections follow. ‖E‖ ≤ ‖E‖_F and ‖E‖² ≤ ‖E²‖_F are bounds from above: no
# matrix slips through.


def _by_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Q and R where the columns are well-conditioned, see Note [two passes of Cholesky]."""
    if not is_elongated(matrix):
        return None
    factor, triangle = matrix, eye_like(matrix)
    for _ in range(2):
        gram = gram_of(factor)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if failed.any() or squares.amin() < 1e-25:  # whose products underflow
            return None
        factor, triangle = _quotient(factor, lower.mT), lower.mT @ triangle
        scale = squares.rsqrt()
        excess = add_to_diagonal(gram * scale[..., :, None] * scale[..., None, :], -1)
        if torch.linalg.matrix_norm(excess).amax() <= 0.8:
            return factor, triangle
        if torch.linalg.matrix_norm(excess @ excess).amax() <= 0.8**2:
            return factor, triangle
    return None


def _quotient(matrix: Tensor, triangle: Tensor) -> Tensor:
    """Matrix times R⁻¹ in its layout: LAPACK solves for stored columns only."""
    if matrix.stride(-2) < matrix.stride(-1):
        return torch.linalg.solve_triangular(triangle, matrix, upper=True, left=False)
    eye = eye_like(triangle)
    return matrix @ torch.linalg.solve_triangular(triangle, eye, upper=True, left=False)


@batched
@two_modes
class _QR(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _by_cholesky(matrix) or _QR.by_reflections(matrix)

    @staticmethod
    def by_reflections(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, triangle = torch.linalg.qr(matrix)
        signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
        return polish(factor * signs[..., None, :]), triangle * signs[..., :, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, *output)

    @staticmethod
    def regular(triangle: Tensor, rows: int) -> Tensor:
        # Where R is singular there is no derivative: a least diagonal keeps this one finite.
        diagonal = triangle.diagonal(dim1=-2, dim2=-1)
        least = diagonal.amax(-1, keepdim=True) * (rows * torch.finfo(triangle.dtype).eps)
        diagonal = diagonal.maximum(least.clamp(min=negligible(triangle.dtype)))
        return triangle.diagonal_scatter(diagonal, dim1=-2, dim2=-1)

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        # dQ = dA R⁻¹ - Q U and dR = U R, with U = triu(S) + tril(S, -1)ᵀ and S = Qᵀ dA R⁻¹
        factor, triangle = ctx.saved_tensors
        with without_autocast(factor):
            regular = _QR.regular(triangle, factor.shape[-2])
            quotient = torch.linalg.solve_triangular(regular, tangent, upper=True, left=False)
            inner = factor.mT @ quotient
            upper = inner.triu() + inner.tril(-1).mT
            return quotient - times(factor, upper), upper @ triangle

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, triangle_gradient: Tensor | None) -> Tensor:
        # dA = (dQ + Q sym(tril(R dRᵀ - dQᵀ Q))) R⁻ᵀ. dR is None but for second derivatives.
        factor, triangle = ctx.saved_tensors
        gradient = torch.zeros_like(factor) if gradient is None else gradient
        with without_autocast(factor):
            inner = gradient.mT @ factor
            if triangle_gradient is not None:
                inner = inner - triangle @ triangle_gradient.mT
            lower = inner.tril()
            inner = add_to_diagonal(lower + lower.mT, -lower.diagonal(dim1=-2, dim2=-1))
            gradient = gradient - times(factor, inner)
            triangle = _QR.regular(triangle, factor.shape[-2])
            return torch.linalg.solve_triangular(triangle.mT, gradient, upper=False, left=False)


def cholesky_qr(matrix: Tensor) -> Tensor:
    r"""Orthogonal factor of the QR decomposition, by two shifted Cholesky factorisations.

    .. math::
        R_1^\top R_1 = A^\top A + s \lVert A\rVert^2 I, \quad Q_1 = A R_1^{-1}, \qquad
        R_2^\top R_2 = Q_1^\top Q_1 + s I, \quad Q_2 = Q_1 R_2^{-1}

    The factor that :func:`qr` finds, from matrix products, Cholesky factorisations and triangular
    solves instead of reflections. It is no faster on a processor whose LAPACK is good, and meant
    for hardware that favours products. The shift :math:`s = 2 \sqrt n\,\varepsilon` keeps the
    factorisations from breaking down, and a polishing step undoes its effect. A matrix out of the
    ordinary range is first divided by a power of two.

    **Guaranteed**: finite, with all singular values at most 1 up to rounding, for any matrix.
    They are equal to 1, to 1e-6 in float32 up to n = 1024 (1e-13 in float64), for condition
    numbers up to 2e3 (1e7); smaller singular values end below 1.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n).

    Returns
    -------
    torch.Tensor
        Shape (..., m, n).

    Raises
    ------
    TypeError
        If ``matrix`` is no real floating-point tensor.
    ValueError
        If ``matrix`` has no rows and columns.

    Notes
    -----
    CholeskyQR2 with the shift of Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (SIAM
    Journal on Scientific Computing 42, 2020), smaller than their worst case demands.

    Examples
    --------
    >>> A = torch.randn(6, 3, dtype=torch.float64)
    >>> torch.allclose(cholesky_qr(A), qr(A))
    True
    """
    return map_tall(lambda tall: apply(_CholeskyQR, tall / power_of_two(tall, (-2, -1)))[0], matrix)


@batched
@two_modes
class _CholeskyQR(_QR):
    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _by_cholesky(matrix) or _CholeskyQR.shifted(matrix)

    @staticmethod
    def shifted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        gram = matrix.mT @ matrix
        shift = 2 * math.sqrt(gram.shape[-1]) * torch.finfo(gram.dtype).eps
        norm = gram.abs().sum(-1).amax(-1, keepdim=True).clamp(min=negligible(gram.dtype) ** 2)
        first = torch.linalg.cholesky_ex(add_to_diagonal(gram, shift * norm)).L.mT
        factor = torch.linalg.solve_triangular(first, matrix, upper=True, left=False)
        gram = factor.mT @ factor
        second = torch.linalg.cholesky_ex(add_to_diagonal(gram, shift)).L.mT
        factor = torch.linalg.solve_triangular(second, factor, upper=True, left=False)
        return polish(factor), second @ first


class QR(Orthonormal):
    """Parametrization by :func:`qr`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return qr(matrix)


class CholeskyQR(Orthonormal):
    """Parametrization by :func:`cholesky_qr`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return cholesky_qr(matrix)
