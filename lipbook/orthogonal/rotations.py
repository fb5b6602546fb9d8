"""Rotations from skew-symmetric matrices: the Cayley transform and the exponential."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.orthogonal.orthonormality import (
    Signed,
    add_to_diagonal,
    apply,
    batched,
    check_orthonormal,
    divided,
    eye_like,
    is_elongated,
    map_tall,
    polish,
    save,
    stacked,
    times,
    two_modes,
    without_autocast,
)

__all__ = [
    "cayley",
    "matrix_exp",
    "Cayley",
    "MatrixExp",
]

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
        m, n = matrix.shape[-2:]
        square, below = divided(matrix, (n, m - n))
        limit = max(torch.finfo(matrix.dtype).eps ** -0.5, 4 * n)
        skew = square - square.mT
        skew, below = _limited(skew, limit), _limited(below, math.sqrt(limit))
        return apply(_Cayley, skew, below)

    return map_tall(transform, matrix)


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


# Note [products in float32]
# If the matrix below the square block is tall, nearly all time goes to its Gram matrix VᵀV and to
# the product with the inverse. Rounding VᵀV to float32 changes QᵀQ by less than it changes VᵀV,
# since 2 (I + A)⁻¹ has norm 2 at most. For a V of rank one, the worst that was found, singular
# values are off 1 by 7e-8 ‖V‖². So where row sums of |VᵀV|, which bound ‖V‖², exceed 12, all is in
# float64.


def _gram_in_float32(below: Tensor) -> Tensor | None:
    """Gram matrix in float32 where that is exact enough, see Note [products in float32]."""
    if not is_elongated(below):
        return None
    gram = below.mT @ below
    return gram if torch.linalg.matrix_norm(gram, math.inf).amax() <= 12 else None


@batched
@two_modes
class _Cayley(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(skew: Tensor, below: Tensor) -> Tensor:
        dtype = skew.dtype
        double = dtype == torch.float32 and skew.device.type != "mps"  # which has no float64
        half = torch.full((1, 1), 0.5, dtype=torch.float64 if double else dtype, device=skew.device)
        system, gram = skew * half, _gram_in_float32(below)
        below = below if gram is not None else below.to(half.dtype)
        if gram is not None:
            system = system + half * gram
        elif below.shape[-2]:
            system = system + below.mT @ (0.5 * below)
        system = add_to_diagonal(system, 0.5)
        if double:
            inverse = _inverse(system, dtype if not below.shape[-2] else system.dtype)
        else:  # solving from the right is faster than inverting
            eye = eye_like(system).expand_as(system)
            inverse = torch.linalg.solve_ex(system, eye, left=False).result
        if below.shape[-2]:
            bottom = times(below, -inverse.to(below.dtype))
            top = add_to_diagonal(inverse, -1).to(below.dtype)
            factor = stacked(top, bottom)
        else:
            factor = add_to_diagonal(inverse, -1)
        return factor.to(dtype) if double else polish(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        save(ctx, inputs[1], output)

    @staticmethod
    def tangent(ctx: Any, skew_tangent: Tensor, below_tangent: Tensor) -> Tensor:
        below, factor = ctx.saved_tensors
        n = factor.shape[-1]
        with without_autocast(factor):
            inverse = add_to_diagonal(factor[..., :n, :] / 2, 0.5)  # (I + A)⁻¹
            inner = below.mT @ below_tangent
            half = -inverse @ (skew_tangent + inner + inner.mT) @ inverse
            bottom = -2 * (below_tangent @ inverse + below @ half)
            return torch.cat((2 * half, bottom), -2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # d(I + A)⁻¹ = -(I + A)⁻¹ dA (I + A)⁻¹, and 2 (I + A)⁻¹ = I + S with S the square block
        below, factor = ctx.saved_tensors
        n = factor.shape[-1]
        top, bottom = gradient[..., :n, :], gradient[..., n:, :]
        with without_autocast(factor):
            root = math.sqrt(0.5)
            inverse = add_to_diagonal(root * factor[..., :n, :].mT, root)  # √2 (I + A)⁻ᵀ
            if not below.shape[-2]:
                return -inverse @ (top @ inverse), bottom
            system = -inverse @ ((top - below.mT @ bottom) @ inverse)
            return system, times(below, system + system.mT) - times(bottom, inverse / root)


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
    return map_tall(lambda tall: polish(polish(_skew_exp(tall))), matrix)


def _skew_exp(matrix: Tensor) -> Tensor:
    m, n = matrix.shape[-2:]
    square = nn.functional.pad(matrix, (0, m - n))
    skew = square - square.mT
    limit = torch.finfo(matrix.dtype).eps ** -0.5
    return torch.matrix_exp(_limited(skew, limit))[..., :n]


class Cayley(Signed):
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
        eye = eye_like(signed[:n])
        half = torch.linalg.inv(eye + signed[:n])  # (I + A) / 2
        return torch.cat(((half - half.mT) / 2, -signed[n:] @ half)), signs


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
        return map_tall(lambda tall: polish(polish(self.base.to(tall) @ _skew_exp(tall))), matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make an orthonormal ``weight`` the base."""
        tall = check_orthonormal(weight)
        completion = torch.linalg.qr(tall, mode="complete").Q[:, tall.shape[1] :]
        self.base = torch.cat((tall, completion), 1).to(weight.dtype)
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
