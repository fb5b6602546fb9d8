"""The nearest orthonormal matrix, by iterations of Björck–Bowie and of Newton–Schulz."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from lipbook.orthogonal.orthonormality import (
    Orthonormal,
    apply,
    batched,
    gram_defect,
    is_elongated,
    map_tall,
    negligible,
    polish,
    save,
    scaled_from_above,
    times,
    two_modes,
    without_autocast,
)

__all__ = [
    "bjorck",
    "polar",
    "Bjorck",
    "Polar",
]


def bjorck(matrix: Tensor, order: int = 1, steps: int = 15) -> Tensor:
    r"""Björck–Bowie orthonormalisation: a polynomial iteration towards the polar factor.

    .. math::
        A_0 = A / c, \quad c \ge \lVert A\rVert_2, \qquad
        A_{k+1} = A_k \Big(I + \tfrac12 Q_k + \tfrac38 Q_k^2 + \dots
        + \tbinom{2p}{p} 4^{-p} Q_k^p\Big), \quad Q_k = I - A_k^\top A_k

    A step maps each singular value by :math:`\sigma \mapsto f_p(\sigma)` with
    :math:`f_p'(\sigma) \propto (1 - \sigma^2)^p` and leaves the singular vectors.

    **Guaranteed** for any matrix and any number of steps: all singular values are at most 1 up to
    rounding, since :math:`f_p` has its maximum, 1, at 1 for odd :math:`p`. **Only in the limit**
    are they equal to 1: those near zero grow by :math:`f_p'(0)` a step (3/2 for order 1, 35/16 for
    order 3), so that 15 steps of order 1 reach float32 accuracy for :math:`\sigma / c` above
    about 0.02 and leave smaller ones below 1. :func:`polar` reaches further at the same cost.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n).
    order : int
        The order :math:`p`, odd. A step costs :math:`p + 1` matrix products.
    steps : int
        Number of steps.

    Returns
    -------
    torch.Tensor
        Shape (..., m, n).

    Raises
    ------
    TypeError
        If ``matrix`` is no real floating-point tensor.
    ValueError
        If ``order`` is even or not positive, ``steps`` is negative, or ``matrix`` has no
        rows and columns.

    Notes
    -----
    Even orders are refused: their :math:`f_p` increases through 1, so that a singular value that
    rounding has lifted above 1 stays above, and all of a diverging range goes unbounded.

    Examples
    --------
    >>> Q = bjorck(torch.randn(5, 3, dtype=torch.float64), steps=40)
    >>> bool((Q.mT @ Q - torch.eye(3)).abs().max() < 1e-14)
    True

    References
    ----------
    :cite:t:`bjorck1971`; :cite:t:`kovarik1970`. In 1-Lipschitz networks since
    :cite:t:`anil2019sorting`.
    """
    if order < 1 or order % 2 == 0:
        raise ValueError(
            f"order must be odd and positive, got {order}: an even order is increasing at 1 and "
            "leaves singular values above 1"
        )
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    coefficients = [math.comb(2 * j, j) / 4**j for j in range(order + 1)]

    def iterate(matrix: Tensor) -> Tensor:
        matrix = scaled_from_above(matrix)
        for _ in range(steps):
            defect = gram_defect(matrix)
            polynomial = coefficients[-1] * defect
            for coefficient in reversed(coefficients[1:-1]):
                polynomial = coefficient * defect + defect @ polynomial
            matrix = matrix + matrix @ polynomial
        return matrix

    return map_tall(iterate, matrix)


def polar(matrix: Tensor, condition: float = 1e4) -> Tensor:
    r"""Polar factor, the nearest matrix with orthonormal columns, by scaled Newton–Schulz.

    .. math::
        A = Q H, \qquad Q = A (A^\top A)^{-1/2}, \qquad
        X_{k+1} = \tfrac12 \rho_k X_k \big(3 I - \rho_k^2 X_k^\top X_k\big)

    The number of steps and their :math:`\rho_k \in [1, 3/2]` are fixed beforehand so that
    :math:`[1/\text{condition}, 1]` ends at 1 to rounding: 15 steps in float32 and 16 in float64
    for a condition of 1e4, two matrix products each.

    **Guaranteed**: all singular values are at most 1 up to rounding, for any matrix. They are
    equal to 1 (1e-6 in float32 up to n = 1024, 1e-13 in float64) if those of the matrix are all
    above :math:`c / \text{condition}`, where :math:`c` is an upper bound of the largest (some 1
    to 5 times it). A map that commutes with rotations, :math:`Q(UAV) = U\,Q(A)\,V` for
    orthogonal U, V, and that treats no column before another.

    The gradient is that of the limit, from the Sylvester equation that :math:`\mathrm dQ` solves,
    by an eigendecomposition of :math:`H`. Its largest gain is :math:`1/\sigma_n`, for square
    matrices :math:`2/(\sigma_n + \sigma_{n-1})`. It is finite at rank-deficient matrices,
    where the limit has none.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n).
    condition : float
        Ratio of largest to smallest singular value that is still orthonormalised; at least 1.

    Returns
    -------
    torch.Tensor
        Shape (..., m, n).

    Raises
    ------
    TypeError
        If ``matrix`` is no real floating-point tensor.
    ValueError
        If ``condition`` is less than 1 or infinite, or ``matrix`` has no rows and columns.

    Notes
    -----
    A step is one of :func:`bjorck` of order 1 after a stretch by :math:`\rho`, which stays inside
    its basin :math:`[0, \sqrt3)`. The stretch :math:`\rho^2 = 3 / (1 + l + l^2)` gives both ends of
    :math:`[l, 1]` the same image and so raises :math:`l` most (Chen and Chow, 2014). It tends to 3
    for small :math:`l`, which sends 1 almost to 0 and loses the digits of well-conditioned
    matrices; with 9/4 as a ceiling nothing above 1/4 falls below 1/2.

    Examples
    --------
    No orthogonal matrix is nearer:

    >>> from lipbook.orthogonal import qr
    >>> A = torch.randn(4, 4, dtype=torch.float64)
    >>> Q, other = polar(A), qr(torch.randn(4, 4, dtype=torch.float64))
    >>> bool((A - Q).norm() < (A - other).norm())
    True

    References
    ----------
    :cite:t:`higham2008`, chapter 8.
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"condition must be a finite number >= 1, got {condition}")
    return map_tall(lambda tall: apply(_Polar, tall, condition)[0], matrix)


def _stretches(condition: float, accuracy: float) -> Iterator[float]:
    """Yield the factors that take [1 / condition, 1] to 1 by Newton–Schulz steps."""
    least = 1 / condition
    while 1 - least > accuracy:
        square = min(3 / (1 + least + least**2), 9 / 4)
        stretch = math.sqrt(square)
        yield stretch
        least = min(stretch * (3 - square * end**2) * end / 2 for end in (least, 1.0))


# Note [the iteration on eigenvalues]
# The steps are a polynomial in AᵀA, and so one of its eigenvalues. For an elongated float32 matrix
# an eigendecomposition in float64 of that small matrix takes the place of the 30 products of the
# steps, and gives the derivative as well. The polynomial is applied to the matrix in float64 too,
# unless all singular values that it meets are within a factor of 3 of each other, where float32
# rounds Q no worse than its entries.


@batched
@two_modes
class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, condition: float) -> tuple[Tensor, Tensor, Tensor]:
        if is_elongated(matrix):
            return _Polar.by_eigenvalues(matrix, condition)
        factor = scaled_from_above(matrix)
        for stretch in _stretches(condition, torch.finfo(matrix.dtype).eps):
            gram = factor.mT @ factor
            factor = 1.5 * stretch * factor - factor @ (0.5 * stretch**3 * gram)
        none = matrix.new_empty((*matrix.shape[:-2], 0))
        return polish(factor), none, none.clone()

    @staticmethod
    def by_eigenvalues(matrix: Tensor, condition: float) -> tuple[Tensor, Tensor, Tensor]:
        """Polar factor, and eigenvalues and -vectors of H."""
        double = matrix.double()
        gram = double.mT @ double
        norm = torch.minimum(gram.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(gram))
        squares, vectors = torch.linalg.eigh(gram)
        values = squares.clamp(min=0).sqrt()
        factor = norm.clamp(min=negligible(matrix.dtype) ** 2).rsqrt()[..., None]
        for stretch in (*_stretches(condition, torch.finfo(matrix.dtype).eps), 1.0):
            factor = factor * (stretch * (3 - (stretch * factor * values).square()) / 2)
        root = (vectors * factor[..., None, :]) @ vectors.mT
        near = bool((values[..., 0] * 3 >= values[..., -1]).all())
        result = times(matrix, root.to(matrix.dtype)) if near else times(double, root)
        dtype = matrix.dtype
        return result.to(dtype), values.to(dtype), vectors.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, inputs[0], *output)

    @staticmethod
    def derivative(ctx: Any, tangent: Tensor) -> Tensor:
        # dQ = Q Ω + (I - QQᵀ) dA H⁻¹ with the skew solution of Ω H + H Ω = Qᵀ dA - dAᵀ Q, a map of
        # dA that is its own adjoint.
        matrix, factor, values, vectors = ctx.saved_tensors
        m, n = matrix.shape[-2:]
        with without_autocast(matrix):
            inner = factor.mT @ tangent
            if values.shape[-1] and not torch.is_grad_enabled():
                values, divided = _divisors(values, sylvester=True)
                skew = vectors.mT @ (inner - inner.mT) @ vectors / divided
                inverse = (vectors / values[..., None, :]) @ vectors.mT
                outer = vectors @ skew @ vectors.mT - inner @ inverse
                return times(factor, outer) + times(tangent, inverse)
            stretch = factor.mT @ matrix
            stretch = (stretch + stretch.mT) / 2
            result = factor @ apply(_SymmetricSolve, stretch, inner - inner.mT, True)
            if m > n:
                outside = tangent - factor @ inner
                result = result + apply(_SymmetricSolve, stretch, outside, False)
            return cast(Tensor, result)

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None, None]:
        return _Polar.derivative(ctx, tangent), None, None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        return None if gradient is None else _Polar.derivative(ctx, gradient), None


def _divisors(values: Tensor, sylvester: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H, and what a solution in its eigenvectors is divided by."""
    # Where H is singular there is no solution: a least eigenvalue keeps this one finite.
    least = values[..., -1:] * (values.shape[-1] * torch.finfo(values.dtype).eps)
    values = values.clamp(min=least.clamp(min=negligible(values.dtype)))
    pairs = values[..., None] + values[..., None, :] if sylvester else values[..., None, :]
    return values, pairs


@two_modes
class _SymmetricSolve(torch.autograd.Function):
    """Solution Y of YH = K, or of YH + HY = K (a Sylvester equation), for H = Hᵀ ≥ 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, sylvester: bool) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        divisors = _divisors(values, sylvester)[1]
        if sylvester:
            return vectors @ ((vectors.mT @ right @ vectors) / divisors) @ vectors.mT
        return (right @ vectors) / divisors @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        save(ctx, inputs[0], output)
        ctx.sylvester = inputs[2]

    @staticmethod
    def tangent(ctx: Any, matrix_tangent: Tensor, right_tangent: Tensor, _: None) -> Tensor:
        matrix, solution = ctx.saved_tensors
        right = right_tangent - solution @ matrix_tangent
        if ctx.sylvester:
            right = right - matrix_tangent @ solution
        return cast(Tensor, apply(_SymmetricSolve, matrix, right, ctx.sylvester))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, solution = ctx.saved_tensors
        adjoint = apply(_SymmetricSolve, matrix, gradient, ctx.sylvester)
        product = solution.mT @ adjoint
        if ctx.sylvester:
            product = product + adjoint @ solution.mT
        return -product, adjoint, None


class Bjorck(Orthonormal):
    """Parametrization by :func:`bjorck`.

    Parameters
    ----------
    order : int
        Order p of a step, odd.
    steps : int
        Number of steps.
    """

    def __init__(self, order: int = 1, steps: int = 15) -> None:
        super().__init__()
        self.order = order
        self.steps = steps

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return bjorck(matrix, self.order, self.steps)


class Polar(Orthonormal):
    """Parametrization by :func:`polar`.

    Parameters
    ----------
    condition : float
        Ratio of the singular values of the raw parameter up to which the weight is orthogonal.
    """

    def __init__(self, condition: float = 1e4) -> None:
        super().__init__()
        # As text: torch.compile may take a number for a symbol, and the steps depend on it.
        self._condition = repr(float(condition))

    @property
    def condition(self) -> float:
        """The ratio, as it was given."""
        return float(self._condition)

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return polar(matrix, self.condition)
