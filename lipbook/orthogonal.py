r"""Orthogonal and norm-bounded linear layers.

First the maps: each takes any real matrix to one with orthonormal columns (orthonormal rows if
it is wide) or with a bounded norm. Then one torch parametrization for each map, so that
``layer.weight`` *is* the constrained matrix. Then the layers, which are :class:`torch.nn.Linear`
with the constraint registered.

All maps are functions of the matrix alone: no state, no random start, no norm estimated from
below. They are computed in the dtype of the matrix, in float32 if that is float16 or bfloat16,
whatever autocast says. So weight decay, gradient clipping, averaging or anything else that
happens to the raw parameter leaves the constraint intact.

The layers have no Lipschitz rule of their own. :func:`~lipbook.composition.lipschitz_bound`
reads the constrained weight and takes its exact operator norm, as for any
:class:`torch.nn.Linear`, so that a bound never rests on what a method promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook.composition import Bound, lipschitz_rule

__all__ = [
    "bjorck",
    "polar",
    "qr",
    "cholesky_qr",
    "cayley",
    "matrix_exp",
    "householder_product",
    "clip_spectral_norm",
    "project_l1_ball",
    "unit_rows",
    "Bjorck",
    "Polar",
    "QR",
    "CholeskyQR",
    "Cayley",
    "MatrixExp",
    "HouseholderProduct",
    "SpectralNorm",
    "InfinityNorm",
    "UnitNorm",
    "OrthogonalLinear",
    "SpectralNormLinear",
    "InfinityNormLinear",
    "UnitNormLinear",
    "Scale",
]

# Note [polishing]
# LAPACK's orthogonal factors are off by 1e-6 in float32 at n = 1024, those of a Cayley transform
# or an exponential by 1e-7 times the norm of the argument. One Björck step squares such an error:
# singular values 1 + e become 1 - 3e²/2. It also takes every singular value in [0, 2] into [0, 1],
# so that what it cannot mend is at least nonexpansive. On an orthonormal matrix the step is the
# identity to first order along all directions that stay orthonormal, so the hand-written
# gradients below leave it out.


def _tall(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Apply a map of tall matrices to a tall or wide one, in float32 at least."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"matrix must be a real floating-point tensor, got {kind}")
    if matrix.dim() < 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    wide = matrix.shape[-2] < matrix.shape[-1]
    with torch.autocast(matrix.device.type, enabled=False):
        tall = (matrix.mT if wide else matrix).to(_working_dtype(matrix.dtype))
        result = function(tall)
    return (result.mT if wide else result).to(matrix.dtype)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _eye_like(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _defect(matrix: Tensor) -> Tensor:
    gram = matrix.mT @ matrix
    return _eye_like(gram) - gram


def _add_to_diagonal(matrix: Tensor, value: float | Tensor) -> Tensor:
    """Add to the diagonal of a matrix in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix


def _polish(matrix: Tensor) -> Tensor:
    """Take one Björck step, see Note [polishing]."""
    return matrix @ _add_to_diagonal(-0.5 * (matrix.mT @ matrix), 1.5)


def _negligible(dtype: torch.dtype) -> float:
    """Scale below which a matrix counts as zero, to keep its gradient finite."""
    return torch.finfo(dtype).eps ** 2


# Note [why from above]
# A spectral norm estimated by power iteration is too small, and a matrix divided by it too large.
# Both divisors here are upper bounds, √(‖A‖₁‖A‖∞) and then the norm of the Gram matrix that
# is at hand anyway. The second is 1 if the columns are orthonormal already: no step is wasted on
# bringing such a matrix back up.


def _scaled_from_above(matrix: Tensor) -> Tensor:
    """Divide by an upper bound of the spectral norm."""
    least = _negligible(matrix.dtype)
    row_sum = matrix.abs().sum(-1).amax(-1).clamp(min=least)
    column_sum = matrix.abs().sum(-2).amax(-1).clamp(min=least)
    matrix = matrix / (row_sum.sqrt() * column_sum.sqrt())[..., None, None]
    gram = matrix.mT @ matrix
    norm = torch.minimum(gram.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(gram))
    return matrix / norm.clamp(min=torch.finfo(gram.dtype).eps).sqrt()[..., None, None]


# -------------------------------------------------------------------- orthonormal matrices


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
        matrix = _scaled_from_above(matrix)
        for _ in range(steps):
            defect = _defect(matrix)
            polynomial = coefficients[-1] * defect
            for coefficient in reversed(coefficients[1:-1]):
                polynomial = coefficient * defect + defect @ polynomial
            matrix = matrix + matrix @ polynomial
        return matrix

    return _tall(iterate, matrix)


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
    return _tall(lambda tall: _Polar.apply(tall, condition), matrix)


def _stretches(condition: float, accuracy: float) -> Iterator[float]:
    """Yield the factors that take [1 / condition, 1] to 1 by Newton–Schulz steps."""
    least = 1 / condition
    while 1 - least > accuracy:
        square = min(3 / (1 + least + least**2), 9 / 4)
        stretch = math.sqrt(square)
        yield stretch
        least = min(stretch * (3 - square * end**2) * end / 2 for end in (least, 1.0))


class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, condition: float) -> Tensor:
        factor = _scaled_from_above(matrix)
        for stretch in _stretches(condition, torch.finfo(matrix.dtype).eps):
            gram = factor.mT @ factor
            factor = 1.5 * stretch * factor - factor @ (0.5 * stretch**3 * gram)
        return _polish(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # dQ = Q Ω + (I - QQᵀ) dA H⁻¹ with the skew solution of Ω H + H Ω = Qᵀ dA - dAᵀ Q
        matrix, factor = ctx.saved_tensors
        m, n = matrix.shape[-2:]
        with torch.autocast(matrix.device.type, enabled=False):
            stretch = factor.mT @ matrix
            stretch = (stretch + stretch.mT) / 2
            inner = factor.mT @ gradient
            result = factor @ _SymmetricSolve.apply(stretch, inner - inner.mT, True)
            if m > n:
                outside = gradient - factor @ inner
                result = result + _SymmetricSolve.apply(stretch, outside, False)
            return result, None


class _SymmetricSolve(torch.autograd.Function):
    """Solution Y of YH = K, or of YH + HY = K (a Sylvester equation), for H = Hᵀ ≥ 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, sylvester: bool) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        # Where H is singular there is no solution: a least eigenvalue keeps this one finite.
        least = values[..., -1:] * (matrix.shape[-1] * torch.finfo(matrix.dtype).eps)
        values = values.clamp(min=least.clamp(min=_negligible(matrix.dtype)))
        if sylvester:
            right, values = vectors.mT @ right, values[..., None] + values[..., None, :]
            return vectors @ ((right @ vectors) / values) @ vectors.mT
        return (right @ vectors) / values[..., None, :] @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.sylvester = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, solution = ctx.saved_tensors
        adjoint = _SymmetricSolve.apply(matrix, gradient, ctx.sylvester)
        product = solution.mT @ adjoint
        if ctx.sylvester:
            product = product + adjoint @ solution.mT
        return -product, adjoint, None


def qr(matrix: Tensor) -> Tensor:
    r"""Orthogonal factor of the QR decomposition with a positive diagonal of R, by reflections.

    .. math:: A = Q R, \qquad R \text{ upper triangular}, \quad R_{ii} > 0

    That is Gram–Schmidt orthonormalisation of the columns from left to right, computed stably
    (Householder reflections, then one polishing step).

    **Guaranteed for any matrix**, of any scale and condition, rank-deficient or zero: all
    singular values are 1, to 1e-6 in float32 up to n = 1024 (5e-6 for a matrix of equal entries,
    whose rounding errors do not cancel) and 1e-13 in float64.

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
    return _tall(lambda tall: _QR.apply(tall)[0], matrix)


class _QR(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, triangle = torch.linalg.qr(matrix)
        signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
        return _polish(factor * signs[..., None, :]), triangle * signs[..., :, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, triangle_gradient: Tensor | None) -> Tensor:
        # dA = (dQ + Q sym(tril(R dRᵀ - dQᵀ Q))) R⁻ᵀ. dR is None but for second derivatives.
        factor, triangle = ctx.saved_tensors
        gradient = torch.zeros_like(factor) if gradient is None else gradient
        with torch.autocast(factor.device.type, enabled=False):
            inner = gradient.mT @ factor
            if triangle_gradient is not None:
                inner = inner - triangle @ triangle_gradient.mT
            lower = inner.tril()
            inner = _add_to_diagonal(lower + lower.mT, -lower.diagonal(dim1=-2, dim2=-1))
            gradient = gradient - factor @ inner
            # Where R is singular there is no derivative: a least diagonal keeps this one finite.
            diagonal = triangle.diagonal(dim1=-2, dim2=-1)
            least = diagonal.amax(-1, keepdim=True) * (
                factor.shape[-2] * torch.finfo(factor.dtype).eps
            )
            diagonal = diagonal.maximum(least.clamp(min=_negligible(factor.dtype)))
            triangle = triangle.diagonal_scatter(diagonal, dim1=-2, dim2=-1)
            return torch.linalg.solve_triangular(triangle.mT, gradient, upper=False, left=False)


def cholesky_qr(matrix: Tensor) -> Tensor:
    r"""Orthogonal factor of the QR decomposition, by two shifted Cholesky factorisations.

    .. math::
        R_1^\top R_1 = A^\top A + s \lVert A\rVert^2 I, \quad Q_1 = A R_1^{-1}, \qquad
        R_2^\top R_2 = Q_1^\top Q_1 + s I, \quad Q_2 = Q_1 R_2^{-1}

    The factor that :func:`qr` finds, from matrix products, Cholesky factorisations and triangular
    solves instead of reflections. It is no faster on a processor whose LAPACK is good, and meant
    for hardware that favours products. The shift :math:`s = 2 \sqrt n\,\varepsilon` keeps the
    factorisations from breaking down, and a polishing step undoes its effect.

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
    return _tall(lambda tall: _CholeskyQR.apply(tall)[0], matrix)


class _CholeskyQR(_QR):
    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        gram = matrix.mT @ matrix
        shift = 2 * math.sqrt(gram.shape[-1]) * torch.finfo(gram.dtype).eps
        norm = gram.abs().sum(-1).amax(-1, keepdim=True).clamp(min=_negligible(gram.dtype) ** 2)
        first = torch.linalg.cholesky_ex(_add_to_diagonal(gram, shift * norm)).L.mT
        factor = torch.linalg.solve_triangular(first, matrix, upper=True, left=False)
        gram = factor.mT @ factor
        second = torch.linalg.cholesky_ex(_add_to_diagonal(gram, shift)).L.mT
        factor = torch.linalg.solve_triangular(second, factor, upper=True, left=False)
        return _polish(factor), second @ first


# Note [limits]
# Rounding costs a Cayley transform or an exponential digits in proportion to the norm of A, until
# nothing is left. Both maps therefore stop growing at a norm of about 3e3 in float32 and 7e7 in
# float64 (where polishing still mends the damage): a larger A is scaled back. The exponential
# loses nothing by it, since rotation angles beyond π repeat; the Cayley transform loses rotation
# angles within 1e-3 of π in float32, which Cayley's signs avoid.


def _limited(matrix: Tensor, limit: float) -> Tensor:
    """Scale a matrix back to the limit where its Frobenius norm exceeds it."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix * (limit / norm.clamp(min=limit))


def cayley(matrix: Tensor) -> Tensor:
    r"""Cayley transform of the skew-symmetric part, extended to tall matrices.

    .. math::
        \begin{pmatrix} U \\ V \end{pmatrix} \mapsto
        \begin{pmatrix} (I - A)(I + A)^{-1} \\ -2 V (I + A)^{-1} \end{pmatrix}, \qquad
        A = U - U^\top + V^\top V

    **Guaranteed for any matrix**: all singular values are 1, to 1e-6 in float32 up to n = 1024 and
    1e-13 in float64. A square result is a rotation without the eigenvalue -1. Those with one lie
    at infinity: gradients fade like :math:`1 / \lVert A\rVert^2` on the way, and from
    :math:`\lVert U - U^\top\rVert_F` or :math:`\lVert V\rVert_F^2` of
    :math:`\max(\varepsilon^{-1/2}, 4n)` on, that is 2900 in float32, a matrix is scaled back.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n). The symmetric part of the square block :math:`U` has no effect.

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
    A rotation of the plane by twice the arc tangent of -1:

    >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> torch.allclose(cayley(torch.tensor([[0.0, 0.0], [1.0, 0.0]])), quarter_turn, atol=1e-6)
    True

    References
    ----------
    :cite:t:`trockman2021`, for rectangular matrices too.
    """

    def transform(matrix: Tensor) -> Tensor:
        n = matrix.shape[-1]
        square, below = matrix[..., :n, :], matrix[..., n:, :]
        limit = max(torch.finfo(matrix.dtype).eps ** -0.5, 4 * n)
        skew = square - square.mT
        skew, below = _limited(skew, limit), _limited(below, math.sqrt(limit))
        return _Cayley.apply(skew, below)

    return _tall(transform, matrix)


# Note [inverse by halves]
# LAPACK inverts a matrix of 512 rows at a fifth of the speed of a product. Block elimination is
# made of products, and needs no pivots for a system whose symmetric part is at least a multiple of
# I, as have its Schur complements. Without pivots errors grow like ε‖A‖², not ε‖A‖: in float64 and
# up to the limit of float32 that is 1e-8, which rounds to a result in float32 without polishing.
# For a float64 result LAPACK's pivots remain.


def _inverse(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of a matrix with a positive definite symmetric part, rounded to a dtype."""
    n = matrix.shape[-1] // 2
    if n < 64:
        inverse = torch.linalg.inv_ex(matrix).inverse  # which waits for no verdict on singularity
        return inverse.to(dtype)
    (a, b), (c, d) = (rows.tensor_split([n], -1) for rows in matrix.tensor_split([n], -2))
    inverse = _inverse(a, matrix.dtype)
    left, right = inverse @ b, c @ inverse
    schur = _inverse(d - c @ left, matrix.dtype)
    minus = -schur
    result = matrix.new_empty(matrix.shape, dtype=dtype)
    upper = left @ minus
    result[..., :n, :n] = inverse - upper @ right
    result[..., :n, n:] = upper
    result[..., n:, :n] = minus @ right
    result[..., n:, n:] = schur
    return result


class _Cayley(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(skew: Tensor, below: Tensor) -> Tensor:
        dtype = skew.dtype
        double = dtype == torch.float32 and skew.device.type != "mps"  # which has no float64
        half = torch.full((1, 1), 0.5, dtype=torch.float64 if double else dtype, device=skew.device)
        system, below = skew * half, below.to(half.dtype)
        if below.shape[-2]:
            system = system + below.mT @ (0.5 * below)
        system = _add_to_diagonal(system, 0.5)
        if double:
            inverse = _inverse(system, dtype if not below.shape[-2] else system.dtype)
        else:  # solving from the right is faster than inverting
            eye = _eye_like(system).expand_as(system)
            inverse = torch.linalg.solve_ex(system, eye, left=False).result
        if below.shape[-2]:
            bottom = -below @ inverse
            factor = torch.cat((_add_to_diagonal(inverse, -1), bottom), -2)
        else:
            factor = _add_to_diagonal(inverse, -1)
        return factor.to(dtype) if double else _polish(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # d(I + A)⁻¹ = -(I + A)⁻¹ dA (I + A)⁻¹, and 2 (I + A)⁻¹ = I + S with S the square block
        below, factor = ctx.saved_tensors
        n = factor.shape[-1]
        top, bottom = gradient[..., :n, :], gradient[..., n:, :]
        with torch.autocast(factor.device.type, enabled=False):
            root = math.sqrt(0.5)
            inverse = _add_to_diagonal(root * factor[..., :n, :].mT, root)  # √2 (I + A)⁻ᵀ
            if not below.shape[-2]:
                return -inverse @ (top @ inverse), bottom
            system = -inverse @ ((top - below.mT @ bottom) @ inverse)
            return system, below @ (system + system.mT) - bottom @ inverse / root


def matrix_exp(matrix: Tensor) -> Tensor:
    r"""First columns of the exponential of a skew-symmetric matrix.

    .. math::
        \begin{pmatrix} U \\ V \end{pmatrix} \mapsto \exp(A)
        \begin{pmatrix} I \\ 0 \end{pmatrix}, \qquad
        A = \begin{pmatrix} U - U^\top & -V^\top \\ V & 0 \end{pmatrix}

    **Guaranteed for any matrix**: all singular values are 1, to 1e-6 in float32 up to n = 1024 and
    1e-13 in float64. Every rotation is reached. From :math:`\lVert A\rVert_F` of
    :math:`\varepsilon^{-1/2}` on, that is 2900 in float32, a matrix is scaled back. The
    exponential costs several times what the other maps do, and m×m for tall matrices.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n). The symmetric part of the square block :math:`U` has no effect.

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
    A rotation of the plane by the angle itself:

    >>> angle = torch.tensor(torch.pi / 3, dtype=torch.float64)
    >>> Q = matrix_exp(torch.tensor([[0.0, 0.0], [angle, 0.0]], dtype=torch.float64))
    >>> torch.allclose(Q[0], torch.stack((angle.cos(), -angle.sin())))
    True

    References
    ----------
    :cite:t:`lezcano2019`.
    """
    return _tall(lambda tall: _polish(_polish(_skew_exp(tall))), matrix)


def _skew_exp(matrix: Tensor) -> Tensor:
    m, n = matrix.shape[-2:]
    square = nn.functional.pad(matrix, (0, m - n))
    skew = square - square.mT
    limit = torch.finfo(matrix.dtype).eps ** -0.5
    return torch.matrix_exp(_limited(skew, limit))[..., :n]


def householder_product(matrix: Tensor) -> Tensor:
    r"""Product of Householder reflections, one for each column.

    .. math::
        A \mapsto H_1 H_2 \cdots H_n \begin{pmatrix} I \\ 0 \end{pmatrix}, \qquad
        H_j = I - \frac{2 v_j v_j^\top}{v_j^\top v_j}, \quad
        v_j = (0, \dots, 0, 1, A_{j+1,j}, \dots, A_{m,j})^\top

    **Guaranteed for any matrix**: all singular values are 1, to 1e-6 in float32 up to n = 1024
    (5e-6 for a matrix of equal entries) and 1e-13 in float64. A square result has determinant
    :math:`(-1)^n`. The backward pass of :func:`torch.linalg.householder_product` makes this one
    of the slow maps.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape (..., m, n). Only entries below the diagonal have an effect.

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
    The coefficient :math:`2 / v^\top v` is computed here and the diagonal is not a parameter. In
    :func:`torch.nn.utils.parametrizations.orthogonal` the diagonal stores signs as numbers that
    are cut to integers, which one step of weight decay turns from 1 into 0, and the weight with
    them.

    Examples
    --------
    >>> householder_product(torch.zeros(3, 2))
    tensor([[-1.,  0.],
            [ 0., -1.],
            [ 0.,  0.]])
    """

    def reflect(matrix: Tensor) -> Tensor:
        eye = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
        vectors = matrix.tril(-1) + eye
        coefficients = 2 / vectors.square().sum(-2)
        return _polish(torch.linalg.householder_product(vectors, coefficients))

    return _tall(reflect, matrix)


# ------------------------------------------------------------------- matrices of bounded norm


def clip_spectral_norm(matrix: Tensor) -> Tensor:
    r"""Divide a matrix by its spectral norm if that exceeds 1.

    .. math:: A \mapsto A / \max(1, \sigma_1(A))

    **Guaranteed**: :math:`\sigma_1 \le 1` up to rounding, 1e-6 in float32 up to n = 1024. The norm
    is the exact one, from the largest eigenvalue of the smaller Gram matrix. **Nothing** is said
    of the other singular values: training pulls most of them down.

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
    >>> clip_spectral_norm(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([[1.0000, 0.0000],
            [0.0000, 0.2500]])

    References
    ----------
    :cite:t:`gouk2021`, with an exact norm in place of power iteration.
    """

    def clip(matrix: Tensor) -> Tensor:
        # The result does not depend on this scale: it keeps the Gram matrix in range.
        scale = matrix.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1)
        scaled = matrix / scale
        square = torch.linalg.eigvalsh(scaled.mT @ scaled)[..., -1, None, None]
        return scaled / square.clamp(min=scale**-2).sqrt()

    return _tall(clip, matrix)


def project_l1_ball(rows: Tensor) -> Tensor:
    r"""Euclidean projection of each row on the unit :math:`\ell_1` ball.

    .. math::
        w \mapsto \operatorname*{arg\,min}_{\lVert u\rVert_1 \le 1} \lVert u - w\rVert_2
        = \operatorname{sign}(w) \max(\lvert w\rvert - \tau, 0)

    with :math:`\tau = 0` for a row inside the ball, which is returned as it is, and otherwise the
    :math:`\tau` for which the result has :math:`\ell_1` norm 1. **Guaranteed**: the largest
    absolute row sum, and so the :math:`\infty\to\infty` norm of the matrix, is at most 1 up to
    rounding (1e-6 in float32 up to n = 1024).

    Parameters
    ----------
    rows : torch.Tensor
        Shape (..., n).

    Returns
    -------
    torch.Tensor
        Shape (..., n). Long rows come out sparse.

    Raises
    ------
    TypeError
        If ``rows`` is no real floating-point tensor.
    ValueError
        If ``rows`` has no entries.

    Examples
    --------
    >>> project_l1_ball(torch.tensor([[0.2, -0.3], [1.0, -0.5], [9.0, 1.0]]))
    tensor([[ 0.2000, -0.3000],
            [ 0.7500, -0.2500],
            [ 1.0000,  0.0000]])

    References
    ----------
    :cite:t:`duchi2008`; :cite:t:`condat2016` compares the algorithms.
    """
    _check_rows(rows)
    work = rows.to(_working_dtype(rows.dtype))
    magnitude = work.abs()
    inside = magnitude.sum(-1, keepdim=True) <= 1
    # Entries more than 1 below the largest end at zero. Measuring all from there keeps the sums
    # below small, and their rounding.
    largest = magnitude.detach().amax(-1, keepdim=True).clamp(min=1)
    magnitude = (magnitude - largest + 1).clamp(min=0)
    ordered = magnitude.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, rows.shape[-1] + 1, dtype=work.dtype, device=work.device)
    kept = (ordered * count > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, kept - 1) / kept
    outside = work.sign() * torch.where(magnitude > threshold, magnitude - threshold, 0)
    outside = outside / outside.detach().abs().sum(-1, keepdim=True).clamp(min=1)
    return torch.where(inside, work, outside).to(rows.dtype)


def unit_rows(rows: Tensor) -> Tensor:
    r"""Divide each row by its Euclidean norm.

    .. math:: w \mapsto w / \lVert w\rVert_2

    **Guaranteed**: each output of the linear map is 1-Lipschitz in the :math:`\ell_2` norm, that
    is, the :math:`2\to\infty` norm is 1. The map as a whole is not: its spectral norm can reach
    the square root of the number of rows. A row of zeros stays one.

    Parameters
    ----------
    rows : torch.Tensor
        Shape (..., n).

    Returns
    -------
    torch.Tensor
        Shape (..., n).

    Raises
    ------
    TypeError
        If ``rows`` is no real floating-point tensor.
    ValueError
        If ``rows`` has no entries.

    Examples
    --------
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])

    References
    ----------
    :cite:t:`singla2022improved`, for the last layer of a classifier.
    """
    _check_rows(rows)
    work = rows.to(_working_dtype(rows.dtype))
    least = _negligible(work.dtype)
    work = work / work.detach().abs().amax(-1, keepdim=True).clamp(min=least)
    norm = torch.linalg.vector_norm(work, dim=-1, keepdim=True).clamp(min=1)
    return (work / norm).to(rows.dtype)


def _check_rows(rows: Tensor) -> None:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a real floating-point tensor, got {kind}")
    if rows.dim() < 1 or 0 in rows.shape:
        raise ValueError(f"rows must have shape (..., n), got {tuple(rows.shape)}")


# ---------------------------------------------------------------------------- parametrizations

# Note [what assigning a weight does]
# ``layer.weight = Q`` calls right_inverse, which finds a raw parameter whose image is Q. A Q that
# is no image is refused: to take the nearest one instead would change a network in silence.


class _Orthonormal(nn.Module):
    """Parametrization by a map that leaves orthonormal matrices as they are."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an orthonormal ``weight`` itself as the raw parameter."""
        _check_orthonormal(weight)
        return weight


class Bjorck(_Orthonormal):
    """Parametrization by :func:`bjorck`.

    Parameters
    ----------
    order, steps : int
        As there.
    """

    def __init__(self, order: int = 1, steps: int = 15) -> None:
        super().__init__()
        self.order = order
        self.steps = steps

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return bjorck(matrix, self.order, self.steps)


class Polar(_Orthonormal):
    """Parametrization by :func:`polar`.

    Parameters
    ----------
    condition : float
        As there.
    """

    def __init__(self, condition: float = 1e4) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return polar(matrix, self.condition)


class QR(_Orthonormal):
    """Parametrization by :func:`qr`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return qr(matrix)


class CholeskyQR(_Orthonormal):
    """Parametrization by :func:`cholesky_qr`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return cholesky_qr(matrix)


class _Signed(nn.Module):
    """Parametrization by a map that reaches orthonormal matrices up to signs of their columns.

    The signs (of the rows, if these are fewer) are a buffer, chosen when a weight is assigned.
    """

    signs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("signs", None)

    def _signed(self, matrix: Tensor) -> Tensor:
        wide = matrix.shape[-2] < matrix.shape[-1]
        return matrix * (self.signs[:, None] if wide else self.signs)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Find signs and a raw parameter for an orthonormal ``weight``."""
        tall = _check_orthonormal(weight)
        raw, signs = self._invert(tall)
        self.signs = signs.to(weight.dtype)
        return (raw if weight.shape[0] >= weight.shape[1] else raw.mT).to(weight.dtype)

    def _invert(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Cayley(_Signed):
    r"""Parametrization by :func:`cayley`, times fixed signs :math:`Q = \operatorname{cayley}(A) D`.

    A single Cayley transform misses orthogonal matrices with the eigenvalue -1, half of all. With
    a suitable diagonal :math:`D` of signs every one is reached, by an :math:`A` of moderate
    entries. The signs are found when a weight is assigned and stay while it is trained. They are a
    buffer: average parameters only, as ``torch.optim.swa_utils.AveragedModel`` does by itself. An
    average of the signs of two assignments leaves the weight nonexpansive only.

    Notes
    -----
    O'Dorney (Linear Algebra and its Applications 448, 2014) shows that suitable signs exist;
    Helfrich, Willmott and Ye (ICML 2018) train with a fixed :math:`D`.
    """

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return self._signed(cayley(matrix))

    def _invert(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        # Elimination of Q + D has pivots of at least 1 if each sign is that of the pivot that it is
        # added to. They are the pivots of QR by reflections, which change sign there on reflection.
        n = tall.shape[-1]
        triangle, coefficients = torch.geqrf(tall)
        signs = triangle.diagonal().sign() * torch.where(coefficients == 0, 1, -1)
        signed = tall * signs
        eye = _eye_like(signed[:n])
        half = torch.linalg.inv(eye + signed[:n])  # (I + A) / 2
        return torch.cat(((half - half.mT) / 2, -signed[n:] @ half)), signs


class HouseholderProduct(_Signed):
    r"""Parametrization by :func:`householder_product`, times fixed signs of the columns.

    The signs are a buffer, as those of :class:`Cayley`.
    """

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return self._signed(householder_product(matrix))

    def _invert(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        raw = torch.geqrf(tall).a.tril(-1)
        return raw, (householder_product(raw) * tall).sum(0).sign()


class MatrixExp(nn.Module):
    r"""Parametrization by :func:`matrix_exp`, from a fixed base :math:`Q = B \exp(A)`.

    Assigning a weight makes it the base (a buffer, completed to a square matrix), with
    :math:`A = 0`. An average of two bases, as of the signs of :class:`Cayley`, leaves the weight
    nonexpansive only.
    """

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return _tall(lambda tall: _polish(_polish(self.base.to(tall) @ _skew_exp(tall))), matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make an orthonormal ``weight`` the base."""
        tall = _check_orthonormal(weight)
        completion = torch.linalg.qr(tall, mode="complete").Q[:, tall.shape[1] :]
        self.base = torch.cat((tall, completion), 1).to(weight.dtype)
        return torch.zeros_like(weight)


class SpectralNorm(nn.Module):
    """Parametrization by :func:`clip_spectral_norm`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return clip_spectral_norm(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` of spectral norm at most 1 as the raw parameter."""
        exact = weight.double()
        finite = bool(exact.isfinite().all())  # LAPACK refuses others in words of its own
        norm = torch.linalg.matrix_norm(exact, 2) if finite else exact.abs().amax()
        _check_small("weight must have spectral norm at most 1", norm, norm - 1, weight)
        return weight


class InfinityNorm(nn.Module):
    """Parametrization of the rows by :func:`project_l1_ball`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return project_l1_ball(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` with absolute row sums of at most 1 as the raw parameter."""
        norm = torch.linalg.matrix_norm(weight.double(), math.inf)
        _check_small("weight must have absolute row sums of at most 1", norm, norm - 1, weight)
        return weight


class UnitNorm(nn.Module):
    """Parametrization of the rows by :func:`unit_rows`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return unit_rows(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` with unit rows as the raw parameter."""
        norms = torch.linalg.vector_norm(weight.double(), dim=-1)
        worst = norms[(norms - 1).abs().argmax()]
        _check_small("weight must have rows of norm 1", worst, (worst - 1).abs(), weight)
        return weight


def _check_orthonormal(weight: Tensor) -> Tensor:
    """Refuse a weight that is not orthonormal; return it tall and in float64."""
    tall = (weight if weight.shape[0] >= weight.shape[1] else weight.mT).detach().double()
    which = "columns" if tall.shape == weight.shape else "rows"
    defect = _defect(tall).abs().max()
    _check_small(f"weight must have orthonormal {which}", defect, defect, weight)
    return tall


def _check_small(expected: str, value: Tensor, excess: Tensor, weight: Tensor) -> None:
    tolerance = math.sqrt(torch.finfo(weight.dtype).eps)
    if not excess <= tolerance:
        raise ValueError(f"{expected} (to {tolerance:.1e}), got {value.item():.6g}")


# ------------------------------------------------------------------------------------- layers

Method = Literal["qr", "cholesky_qr", "polar", "cayley", "exp", "householder", "bjorck"]
_METHODS: dict[str, Callable[[], nn.Module]] = {
    "qr": QR,
    "cholesky_qr": CholeskyQR,
    "polar": Polar,
    "cayley": Cayley,
    "exp": MatrixExp,
    "householder": HouseholderProduct,
    "bjorck": Bjorck,
}


class _ConstrainedLinear(nn.Linear):
    """Linear layer whose weight is the image of a raw parameter."""

    def __init__(
        self,
        constraint: nn.Module,
        in_features: int,
        out_features: int,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        parametrize.register_parametrization(self, "weight", constraint)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        weight = self._draw(torch.empty_like(self.weight, requires_grad=False))
        if parametrize.is_parametrized(self):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def _draw(self, weight: Tensor) -> Tensor:
        """Draw a matrix with orthonormal columns or rows, uniformly among all."""
        gaussian = torch.randn_like(weight, dtype=_working_dtype(weight.dtype))
        return qr(gaussian).to(weight.dtype)


class OrthogonalLinear(_ConstrainedLinear):
    r"""Linear layer whose weight has orthonormal rows, or columns if it has fewer of them.

    .. math:: x \mapsto W x + b, \qquad W W^\top = I \ (m \le n)
        \quad\text{or}\quad W^\top W = I \ (m \ge n)

    All singular values of the weight are 1: a square layer keeps the norm of every vector and of
    every gradient, a layer that widens keeps the norm of every vector, and one that narrows keeps
    the norm of every gradient.

    The methods reach the same matrices by different paths. How exact each is, for which raw
    parameters, is said in the docstring of its map; those that are not exact everywhere fall
    short of 1 and do not exceed it.

    ``"qr"`` (the default)
        :func:`qr`: exact for every raw parameter, and fast.
    ``"cholesky_qr"``
        :func:`cholesky_qr`: the same map from matrix products and triangular solves. Exact for
        condition numbers up to 2e3.
    ``"polar"``
        :func:`polar`: the best conditioned gradient, and no row or column is treated before
        another. Exact for condition numbers up to about 1e4. Matrix products and one
        eigendecomposition.
    ``"cayley"``
        :func:`cayley`: exact for every raw parameter, and as fast. Learns slowly far from where
        it starts, and keeps the component of the orthogonal group (the sign of the determinant)
        that it starts in.
    ``"exp"``
        :func:`matrix_exp`: exact for every raw parameter, slow. Keeps the component.
    ``"householder"``
        :func:`householder_product`: exact for every raw parameter, slow backward pass. Keeps the
        component.
    ``"bjorck"``
        :func:`bjorck` of order 1 with 15 steps, the method of the first Lipschitz networks:
        nonexpansive always, orthogonal while the raw parameter is well-conditioned.

    Parameters
    ----------
    in_features, out_features : int
        Numbers n and m of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    method : str
        One of the above.
    device, dtype
        Of the parameters. In float16 and bfloat16 the weight is computed in float32 and rounded.

    Raises
    ------
    ValueError
        If ``method`` is unknown; if a weight is assigned that is not orthonormal.

    Examples
    --------
    >>> layer = OrthogonalLinear(5, 3)
    >>> bool((torch.linalg.svdvals(layer.weight) - 1).abs().max() < 1e-6)
    True

    Any treatment of the raw parameter leaves the weight orthonormal, and an orthonormal weight can
    be assigned:

    >>> with torch.no_grad():
    ...     _ = layer.parametrizations.weight.original.mul_(0.01).add_(1)
    >>> bool((torch.linalg.svdvals(layer.weight) - 1).abs().max() < 1e-6)
    True
    >>> layer.weight = torch.eye(3, 5)
    >>> torch.equal(layer.weight, torch.eye(3, 5))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        method: Method = "qr",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method must be one of {tuple(_METHODS)}, got {method!r}")
        super().__init__(
            _METHODS[method](), in_features, out_features, bias, device=device, dtype=dtype
        )


class SpectralNormLinear(_ConstrainedLinear):
    r"""Linear layer whose weight has spectral norm at most 1.

    .. math:: x \mapsto W x + b, \qquad \lVert W\rVert_2 \le 1

    1-Lipschitz in the :math:`\ell_2` norm, by :func:`clip_spectral_norm`. Only the largest singular
    value is controlled: the layer starts orthogonal and need not stay so.

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose spectral norm exceeds 1.

    Examples
    --------
    >>> layer = SpectralNormLinear(5, 3)
    >>> with torch.no_grad():
    ...     _ = layer.parametrizations.weight.original.mul_(10)
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-6)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            SpectralNorm(), in_features, out_features, bias, device=device, dtype=dtype
        )


class InfinityNormLinear(_ConstrainedLinear):
    r"""Linear layer whose absolute row sums are at most 1.

    .. math:: x \mapsto W x + b, \qquad
        \lVert W\rVert_\infty = \max_i \sum_j \lvert W_{ij}\rvert \le 1

    1-Lipschitz in the :math:`\ell_\infty` norm, by :func:`project_l1_ball`. With such layers and
    GroupSort every function that is 1-Lipschitz in that norm can be approximated
    (:cite:t:`anil2019sorting`, theorem 3).

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose absolute row sums exceed 1.

    Examples
    --------
    >>> layer = InfinityNormLinear(5, 3)
    >>> bool(layer.weight.abs().sum(1).max() <= 1 + 1e-6)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            InfinityNorm(), in_features, out_features, bias, device=device, dtype=dtype
        )

    def _draw(self, weight: Tensor) -> Tensor:
        return project_l1_ball(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))


class UnitNormLinear(_ConstrainedLinear):
    r"""Linear layer whose rows have Euclidean norm 1, for the last layer of a classifier.

    .. math:: x \mapsto W x + b, \qquad \lVert w_i\rVert_2 = 1 \text{ for each row}

    **Each output** is 1-Lipschitz in the :math:`\ell_2` norm, and the difference of outputs i and j
    is :math:`\lVert w_i - w_j\rVert_2`-Lipschitz, which is all that a certificate needs. The layer
    is not 1-Lipschitz: its norm is between 1 and the square root of the number of rows.

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose rows do not have norm 1.

    Examples
    --------
    >>> layer = UnitNormLinear(5, 3)
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
    True

    References
    ----------
    :cite:t:`singla2022improved`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(UnitNorm(), in_features, out_features, bias, device=device, dtype=dtype)

    def _draw(self, weight: Tensor) -> Tensor:
        return unit_rows(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))


class Scale(nn.Module):
    r"""Multiplication by a constant, which turns a 1-Lipschitz network into a K-Lipschitz one.

    .. math:: x \mapsto K x

    Its Lipschitz constant is :math:`\lvert K\rvert` in every norm.

    Parameters
    ----------
    constant : float
        The factor :math:`K`, fixed.

    Raises
    ------
    ValueError
        If ``constant`` is not finite.

    Examples
    --------
    >>> Scale(3.0)(torch.tensor([1.0, -2.0]))
    tensor([ 3., -6.])
    """

    def __init__(self, constant: float) -> None:
        super().__init__()
        if not math.isfinite(constant):
            raise ValueError(f"constant must be finite, got {constant}")
        self.constant = float(constant)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` by the constant."""
        return self.constant * x

    def extra_repr(self) -> str:
        """Show the constant."""
        return f"{self.constant:g}"


@lipschitz_rule.register
def _(module: Scale, input_shape: tuple[int, ...], p: float) -> Bound:
    return Bound(abs(module.constant), "exact", p)
