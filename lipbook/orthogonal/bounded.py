"""Bounded instead of orthonormal: the spectral norm, the maximum norm, unit rows."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from lipbook.norms.arguments import _got
from lipbook.orthogonal.orthonormality import (
    admitted,
    apply,
    check_matrix,
    map_tall,
    negligible,
    raw_of,
    save,
    two_modes,
    working_dtype,
)

__all__ = [
    "clip_spectral_norm",
    "project_l1_ball",
    "unit_rows",
    "SpectralNorm",
    "InfinityNorm",
    "UnitNorm",
]


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
        # Not eigvalsh, which rounds otherwise where no gradient is asked for.
        square = torch.linalg.eigh(scaled.mT @ scaled).eigenvalues[..., -1, None, None]
        return scaled / square.clamp(min=scale**-2).sqrt()

    return map_tall(clip, matrix)


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
    work = rows.to(working_dtype(rows.dtype))
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
    work = rows.to(working_dtype(rows.dtype))
    return cast(Tensor, apply(_UnitRows, work)[0]).to(rows.dtype)


# Note [norms of rows]
# Of u = r w with r = 1 / |w| the differentials are du = r (dw - u (u . dw)), dr = -r^2 (u . dw), so
# that a backward pass needs u and r alone. A row of zeros is divided by a small constant, and so
# is its gradient.


@two_modes
class _UnitRows(torch.autograd.Function):
    """Unit rows, and the inverse norms that they were multiplied by."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=negligible(rows.dtype))
        unit = rows / largest
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp(min=0.5)
        return unit.div_(norm), 1 / norm / largest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        save(ctx, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_inverse: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        along = (unit * gradient).sum(-1, keepdim=True) + inverse * of_inverse
        along = along * (inverse * negligible(unit.dtype) < 1.5)  # 2 for a row of zeros
        return torch.addcmul(gradient, unit, along, value=-1) * inverse

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse = ctx.saved_tensors
        along = (unit * tangent).sum(-1, keepdim=True)
        along = along * (inverse * negligible(unit.dtype) < 1.5)
        return (tangent - unit * along) * inverse, -inverse.square() * along


def _check_rows(rows: Tensor) -> None:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"rows must be a real floating-point tensor, got {_got(rows)}")
    if rows.dim() < 1 or 0 in rows.shape:
        raise ValueError(f"rows must have shape (..., n), got {tuple(rows.shape)}")


class SpectralNorm(nn.Module):
    """Parametrization by :func:`clip_spectral_norm`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return clip_spectral_norm(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` of spectral norm at most 1 as the raw parameter."""
        exact = check_matrix(weight)
        # LAPACK refuses what is not finite in words of its own.
        finite = exact.is_meta or bool(exact.isfinite().all())
        norm = torch.linalg.matrix_norm(exact, 2) if finite else exact.abs().amax()
        expected, way = "weight must have spectral norm at most 1", "clip_spectral_norm"
        exact = admitted(weight, exact, norm, norm - 1, expected, way, clip_spectral_norm)
        return raw_of(exact, weight)


class InfinityNorm(nn.Module):
    """Parametrization of the rows by :func:`project_l1_ball`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return project_l1_ball(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` with absolute row sums of at most 1 as the raw parameter."""
        exact = check_matrix(weight)
        norm = torch.linalg.matrix_norm(exact, math.inf)
        expected, way = "weight must have absolute row sums of at most 1", "project_l1_ball"
        exact = admitted(weight, exact, norm, norm - 1, expected, way, project_l1_ball)
        return raw_of(exact, weight)


class UnitNorm(nn.Module):
    """Parametrization of the rows by :func:`unit_rows`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Map the raw parameter to the weight."""
        return unit_rows(matrix)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a ``weight`` with unit rows as the raw parameter."""
        exact = check_matrix(weight)
        norms = torch.linalg.vector_norm(exact, dim=-1)
        worst = norms.take((norms - 1).abs().argmax())
        expected, way = "weight must have rows of norm 1", "unit_rows"
        exact = admitted(weight, exact, worst, (worst - 1).abs(), expected, way, unit_rows)
        return raw_of(exact, weight)
