"""Rigorous operator norms: upper bounds of float64 with its own rounding accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipbook.norms.arguments import (
    Padding,
    PaddingMode,
    Size,
    _convolution_exponent,
    _matrix,
    _tensor,
)
from lipbook.norms.axes import _half
from lipbook.norms.convolutions import _completions, convolution_norm_bound
from lipbook.norms.geometry import _geometry
from lipbook.norms.matrices import operator_norm
from lipbook.norms.precision import _scale
from lipbook.norms.responses import _largest_eigenvalue, _parts, _symbol

__all__ = ["rigorous_matrix_norm", "rigorous_convolution_norm"]

# Note [the model of rounding]
# u is half the distance from 1 to the next number of a dtype. A sum of n products, of any order,
# blocked, threaded, with fused multiply-adds or without, is off by at most
# gamma_n = n u / (1 - n u) times the sum of the absolute products, as long as each operation on its
# way is a rounded sum or product (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
# section 3.1). That excludes algorithms that form other sums: Winograd, Strassen and Fourier
# convolutions. Numbers below the smallest normal one may be flushed to zero, also where a layer
# only moves them. For half precision u is doubled, since some processors round its sums to odd and
# not to nearest. Where a handful of scalars in float64 is combined at the end, _UP covers their
# rounding, and _FLOOR is added to products of constants, which may underflow.

_UP, _FLOOR = 1 + 2.0**-40, 2.0**-1000


def _gamma(terms: float, dtype: torch.dtype) -> float:
    product = terms * torch.finfo(dtype).eps / 2
    return product / (1 - product) if product < 0.5 else math.inf


def rigorous_matrix_norm(matrix: Tensor, p: float = 2) -> float:
    r"""Upper bound of the operator norm of a matrix that rounding cannot push below it.

    .. math::
        \lVert A\rVert_2 \le \frac{\lVert AV\rVert_2}{\sqrt{1 - \lVert I - V^*V\rVert_2}}, \qquad
        \lVert AV\rVert_2^2 \le \lVert (AV)^*AV\rVert_\infty

    for any :math:`V`, since :math:`x = Vy` has :math:`\lVert x\rVert^2 \ge
    (1 - \lVert I - V^*V\rVert)\lVert y\rVert^2`. With the eigenvectors of :math:`A^*A` both
    inequalities are equalities up to rounding; nothing is assumed about how well LAPACK computed
    them. The rounding of the three products is bounded (:math:`\gamma_n` times Frobenius
    norms) and added.

    **Guaranteed**: never below the norm of the matrix as stored. **Measured**: above it by a
    relative 1e-10 for n = 256 and 2e-9 for n = 1024. For p = 1 and p = ∞ it is the largest sum,
    rounded up.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, (m, n).
    p : float
        1, 2 or :data:`math.inf`.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    TypeError, ValueError
        As in :func:`~lipbook.norms.operator_norm`, and for another ``p``.

    References
    ----------
    :cite:t:`rump2011`.

    Examples
    --------
    >>> Q = torch.linalg.qr(torch.randn(64, 64)).Q
    >>> 1 - 1e-6 < rigorous_matrix_norm(Q) < 1 + 1e-6
    True
    """
    p = _convolution_exponent(p)
    matrix = _matrix(matrix).detach().cpu()
    if p == 2:
        return _spectral_bounds(matrix).item()
    terms = matrix.shape[0 if p == 1 else 1] + 4
    bound = operator_norm(matrix, p).item() * (1 + _gamma(2 * terms, torch.float64)) * _UP
    return math.nextafter(bound, math.inf) if bound else bound


def _tall(blocks: Tensor) -> Tensor:
    return blocks.mH if blocks.shape[-2] < blocks.shape[-1] else blocks


def _gram_bound(factor: Tensor, gamma: float, minus: Tensor | float = 0.0) -> Tensor:
    """Largest row sum of |F* F - minus|, at least the spectral norm, with what rounding hides.

    The product is off by gamma |F*||F|, with row sums of at most max_i ‖f_i‖ times sum_j ‖f_j‖.
    """
    columns = torch.linalg.vector_norm(factor, dim=-2)
    sums = (factor.mH @ factor - minus).abs().sum(-1).amax(-1)
    return sums + gamma * columns.amax(-1) * columns.sum(-1)


def _spectral_bounds(blocks: Tensor) -> Tensor:
    """Upper bound of the spectral norm of each block, see rigorous_matrix_norm."""
    scale = _scale(blocks)
    A = _tall(blocks / scale[..., None, None])
    m, n = A.shape[-2:]
    gamma = _gamma(4 * (m + n) + 16, torch.float64)  # complex products are four real ones
    V = torch.linalg.eigh(A.mH @ A).eigenvectors
    image, size = A @ V, torch.linalg.matrix_norm(A)
    lost = gamma * size * torch.linalg.matrix_norm(V)  # ‖image - A V‖
    defect = _gram_bound(V, gamma, torch.eye(n, dtype=V.dtype))
    bound = (_gram_bound(image, gamma).sqrt() + lost) / (1 - defect).clamp(min=0).sqrt()
    bound = torch.where(defect < 0.5, bound, size)  # the Frobenius norm, if the eigensolver failed
    bound = bound * (1 + 4 * gamma) * _UP * scale  # at least the scale, a power of two
    return torch.where(bound > 0, bound.nextafter(bound.new_tensor(math.inf)), bound)  # denormal


# Note [the spectral norm without eigenvectors]
# For any factor R and level c, A* A = c I - R* R + E with E = A* A + R* R - c I, so that
# ‖A‖² ≤ c + ‖E‖. With c just above the largest eigenvalue and R from Cholesky, E is all rounding.


def _largest_spectral_bound(blocks: Tensor) -> float:
    """Upper bound of the spectral norms of many blocks."""
    A = _tall(blocks)
    m, n = A.shape[-2:]
    gamma = _gamma(4 * (m + n) + 16, torch.float64)
    slack = (1 + 4 * gamma) * _UP
    columns, grams = torch.linalg.vector_norm(A, dim=-2), A.mH @ A
    hidden = gamma * columns.amax(-1) * columns.sum(-1)  # by the rounding of the Gram matrices
    cheap = (grams.abs().sum(-1).amax(-1) + hidden).sqrt() * slack
    level = _largest_eigenvalue(grams)[0] * (1 + 2.0**-40)
    largest = math.sqrt(level) * _UP
    for some in (cheap > largest).nonzero()[:, 0].split(64):
        rest = level * torch.eye(n, dtype=A.dtype) - grams[some]
        factor, info = torch.linalg.cholesky_ex(rest, upper=True)
        bounds = (level + _gram_bound(factor, gamma, rest) + hidden[some]).sqrt() * slack
        bounds = torch.where((info == 0) & bounds.isfinite(), bounds, math.inf)
        failed = bounds > largest * (1 + 2.0**-22)
        if failed.any():
            bounds[failed] = torch.minimum(_spectral_bounds(A[some[failed]]), bounds[failed])
        largest = max([largest, *bounds.tolist()])
    return largest


def rigorous_convolution_norm(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    p: float = 2,
    transposed: bool = False,
    output_padding: Size = 0,
) -> float:
    r"""Upper bound of the norm of a convolution that rounding cannot push below it.

    The theorem of :func:`~lipbook.norms.convolution_norm_bound` (the convolution is part of a
    circulant, whose norm is the largest of its frequency responses :math:`B = \hat K(\theta)`) and

    .. math::
        \lVert B\rVert_2^2 \le c + \lVert B^*B + R^*R - cI\rVert_\infty

    for any number :math:`c` and matrix :math:`R`. It is an equality up to rounding with :math:`c`
    just above the largest eigenvalue and :math:`R` the Cholesky factor of :math:`cI - B^*B`;
    nothing is assumed about how well LAPACK computed them. The sums :math:`B` are rounded, too:

    .. math::
        \lVert \hat K(\theta)\rVert_2 \le \lVert \hat K_{\mathrm{fl}}(\theta)\rVert_2
        + \varepsilon \sqrt{\lVert |A|\rVert_1 \lVert |A|\rVert_\infty}

    with :math:`\varepsilon` for the rounding of the Fourier sums. **Guaranteed**: never below the
    norm of the kernel as stored, provided that torch's cosines and sines of float64 are off by at
    most 16 units in the last place.

    Parameters
    ----------
    weight, ..., output_padding
        As in :func:`~lipbook.norms.convolution_norm_bound`.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    TypeError, ValueError
        As in :func:`~lipbook.norms.convolution_norm_bound`.

    Examples
    --------
    >>> average = torch.full((1, 1, 3, 3), 1 / 8)
    >>> rigorous_convolution_norm(average, 8, padding=1, padding_mode="circular") - 9 / 8 < 1e-11
    True
    """
    geometry: dict[str, Any] = {
        "input_size": input_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "transposed": transposed,
        "output_padding": output_padding,
    }
    _tensor("weight", weight)
    weight = weight.detach().cpu()

    def sums(p: float) -> float:  # its margin is 4 n eps for sums of n terms, which is above 2 n u
        bound = convolution_norm_bound(weight, p=p, **geometry).item() * _UP
        return math.nextafter(bound, math.inf) if bound else bound

    p = _convolution_exponent(p)
    if p != 2:
        return sums(p)
    kernel, axes = _geometry(weight, **geometry)
    scale = _scale(kernel.flatten(0, -2))  # without which squares underflow
    kernel = kernel / scale
    magnitude = kernel.abs().flatten(3).sum(3)  # (groups, c_out, c_in)
    # In a completed operator a tap takes one pixel to an output, and a pixel to that many outputs.
    copies = math.prod(max(1.0, axis.column_counts().max().item()) for axis in axes)
    rows, columns = (magnitude.sum(axis).max().item() for axis in (2, 1))
    blocks = _half(_completions(kernel, axes)[0])
    eps = torch.finfo(torch.float64).eps
    rounding = sum(
        (8 * axis.shifts().abs().max().item() + 4 * axis.taps + 48) * eps for axis in axes
    )
    largest = max(
        _largest_spectral_bound(_symbol(kernel, part).flatten(0, -3))
        for part in _parts(kernel, blocks)
    )
    factor = math.prod(block.factor for block in blocks)
    completed = factor * (largest + rounding * math.sqrt(rows * columns * copies) * _UP) * _UP
    completed = math.nextafter(completed * scale.item(), math.inf) if completed else 0.0
    return min(completed, _mean(sums(1), sums(math.inf)))


# Note [the norm of a matrix of moduli]
# B with entries >= 0 has ‖B‖² = ρ(Bᵀ B) <= max_i (Bᵀ B v)_i / v_i for each v > 0 (Collatz and
# Wielandt): with D = diag(v), that is the largest row sum of D⁻¹ Bᵀ B D, which has the eigenvalues
# of Bᵀ B. With v of ones it is at most ‖B‖_1 ‖B‖_∞, and steps of the power method lower it. Sums of
# numbers >= 0 are computed with a small relative error, whatever their order.

_STEPS = 12


def _nonnegative_norm(
    apply: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> tuple[float, Tensor]:
    """Upper bound of the spectral norm of a map with coefficients >= 0 and < 2, and a vector.

    ``apply`` is linear and maps one sample of the shape, a batch of one, in float64 by sums of
    products. The vector is near the first singular one, positive and at most 1 in each entry.
    """
    vector, best, gamma = torch.ones(1, *shape, dtype=torch.float64), math.inf, math.inf
    for _ in range(_STEPS):
        with torch.enable_grad():
            inputs = vector.detach().requires_grad_()
            outputs = apply(inputs)
            (image,) = torch.autograd.grad(outputs, inputs, outputs.detach())
        gamma = _gamma(outputs.numel() + vector.numel() + 8, torch.float64)
        best = min(best, (image / vector).max().item())
        largest = image.max()
        if not largest > 0:
            break
        vector = (image / largest).clamp(min=2.0**-20)
    return math.sqrt(best * (1 + gamma) + 2.0**-900) * _UP, vector[0]


def _mean(a: float, b: float) -> float:
    """Geometric mean from above, of numbers whose product may underflow or overflow."""
    return math.nextafter(math.sqrt(a) * math.sqrt(b) * _UP, math.inf) if a and b else 0.0
