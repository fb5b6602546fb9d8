r"""Operator norms of matrices and of convolutions.

The operator norm of a linear map is the most it can stretch a vector,

.. math:: \lVert A\rVert_{p\to q} = \max_{\lVert x\rVert_p \le 1} \lVert A x\rVert_q ,

and its Lipschitz constant from :math:`\ell_p` to :math:`\ell_q`. Each function of this module says
in its name or first line what it returns: the norm itself, an upper bound, or a lower estimate.
Norms and bounds are computed and returned in float64 whatever the dtype of the weights, and keep
the graph, so that they can be differentiated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "dual_exponent",
    "operator_norm",
    "gram_iteration",
    "power_iteration",
    "circular_convolution_singular_values",
    "circular_convolution_norm",
    "circular_convolution_gram_iteration",
    "convolution_norm_bound",
    "convolution_norm_is_exact",
]

Size = int | Sequence[int]


# Note [rounding]
# An upper bound that rounding pushes below the norm is no bound. Sums, matrix products, Fourier
# sums and symmetric eigenvalues of length or order `inner` are off by at most a small multiple of
# eps * inner, relative to a Frobenius norm or to a sum of absolute values, which exceed the
# spectral norm by at most sqrt(rank), or rank for a Gram matrix. Upper bounds are therefore
# multiplied by 1 + 4 * eps * inner * rank: 1e-14 for one channel, 1e-11 for sixty-four. Functions
# that return the norm itself carry no such margin.


def _margin(inner: int, rank: float) -> float:
    return 1 + 4 * torch.finfo(torch.float64).eps * inner * rank


# ------------------------------------------------------------------------------- matrices


def dual_exponent(p: float) -> float:
    r"""Dual (Hölder conjugate) exponent.

    .. math:: \frac1p + \frac1{p^*} = 1

    The :math:`\ell_{p^*}` norm is the dual of the :math:`\ell_p` norm,
    :math:`\lVert y\rVert_{p^*} = \max_{\lVert x\rVert_p\le1} y^\top x`.

    Parameters
    ----------
    p : float
        Exponent in :math:`[1, \infty]`.

    Returns
    -------
    float
        The exponent :math:`p^*`, with :math:`1^* = \infty` and :math:`\infty^* = 1`.

    Raises
    ------
    TypeError
        ``p`` is not a number.
    ValueError
        ``p`` is NaN or below 1.

    Examples
    --------
    >>> [dual_exponent(p) for p in (1, 1.5, 2, 4, float("inf"))]
    [inf, 3.0, 2.0, 1.3333333333333333, 1.0]
    """
    p = _exponent("p", p)
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1)


def operator_norm(matrix: Tensor, p: float = 2, q: float | None = None) -> Tensor:
    r"""Operator norm of a matrix from :math:`\ell_p` to :math:`\ell_q`.

    .. math::
        \lVert A\rVert_{1\to q} = \max_j \lVert A_{:,j}\rVert_q, \qquad
        \lVert A\rVert_{p\to\infty} = \max_i \lVert A_{i,:}\rVert_{p^*}, \qquad
        \lVert A\rVert_{2\to2} = \sigma_1(A)

    These are the norms for which a polynomial algorithm is known, and the value is exact up to
    rounding. They hold the largest absolute column sum (:math:`1\to1`), the largest absolute row
    sum (:math:`\infty\to\infty`), the largest entry (:math:`1\to\infty`), the longest column
    (:math:`1\to2`) and the longest row (:math:`2\to\infty`). Every other pair is refused.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n): m outputs, n inputs.
    p : float
        Exponent of the norm of the inputs, in :math:`[1, \infty]`.
    q : float, optional
        Exponent of the norm of the outputs; ``p`` if not given.

    Returns
    -------
    torch.Tensor
        The norms in float64, shape (...). Differentiable wherever the maximum is attained once.

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or an exponent is no number.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; an exponent is
        outside :math:`[1, \infty]`; or the norm from ``p`` to ``q`` is out of reach.

    Notes
    -----
    Why the two families are easy: a convex function on the :math:`\ell_1` ball is largest at a
    vertex :math:`\pm e_j`, which gives the first; :math:`\lVert A\rVert_{p\to q} =
    \lVert A^\top\rVert_{q^*\to p^*}` turns it into the second. Why the others are refused: for
    :math:`q < p` the norm is NP-hard (Steinberg, 2005; :math:`\infty\to1` already by Rohn, 2000),
    for rational :math:`p = q` other than 1, 2, :math:`\infty` as well (Hendrickx and Olshevsky,
    2010), and for :math:`1 < p < q < \infty` no polynomial algorithm is known.

    Examples
    --------
    >>> A = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    >>> inf = float("inf")
    >>> [operator_norm(A, p, q).item() for p, q in ((1, 1), (inf, inf), (2, inf))]
    [6.0, 7.0, 5.0]

    The spectral norm is attained at the first right singular vector, and nowhere exceeded:

    >>> v = torch.linalg.svd(A).Vh[0]
    >>> bool((torch.linalg.vector_norm(A @ v) - operator_norm(A)).abs() < 1e-6)
    True
    """
    p = _exponent("p", p)
    q = p if q is None else _exponent("q", q)
    matrix = _matrix(matrix)
    scale = _scale(matrix)
    matrix = matrix / scale[..., None, None]
    if p == 1:
        return scale * torch.linalg.vector_norm(matrix, q, dim=-2).amax(-1)
    if q == math.inf:
        return scale * torch.linalg.vector_norm(matrix, dual_exponent(p), dim=-1).amax(-1)
    if p == q == 2:
        return scale * torch.linalg.svdvals(matrix)[..., 0]
    pair = f"{p:g}→{q:g}".replace("inf", "∞")
    hard = "no polynomial algorithm is known for it" if p < q else "it is NP-hard"
    raise ValueError(
        f"p and q must be such that p = 1, q = inf or p = q = 2; "
        f"got the {pair} norm, which is refused: {hard}"
    )


def gram_iteration(matrix: Tensor, steps: int = 6) -> Tensor:
    r"""Upper bound of the spectral norm by Gram iteration.

    .. math::
        A^{(0)} = A, \qquad A^{(t+1)} = A^{(t)*} A^{(t)}, \qquad
        \sigma_1(A) \le \lVert A^{(t)}\rVert_F^{2^{-t}} \le r^{2^{-(t+1)}}\,\sigma_1(A)

    with :math:`r` the rank. **Guaranteed**, at every step count: the bound is never below
    :math:`\sigma_1`, also in floating point (it carries a margin for rounding); it decreases with
    each step (up to that margin) and is within the factor above: six steps at rank 512 leave at
    most 5 %. Only matrix products are used, so that it batches well and is differentiable wherever
    the matrix is not zero, also where singular values coincide.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n).
    steps : int
        Number of Gram products :math:`t`; 0 gives the Frobenius norm.

    Returns
    -------
    torch.Tensor
        The bounds in float64, shape (...).

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or ``steps`` no integer.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; or ``steps`` is
        negative.

    Notes
    -----
    :math:`\lVert A^{(t)}\rVert_F^{2^{-t}} = (\sum_i \sigma_i^{2^{t+1}})^{2^{-(t+1)}}` is the
    Schatten norm of order :math:`2^{t+1}`, from which both inequalities follow. Each iterate is
    divided by a power of two to stay in range, and the logarithms of the divisors are added up.

    References
    ----------
    :cite:t:`delattre2023gram`, who also apply it to the blocks of a circular convolution
    (:func:`circular_convolution_gram_iteration`).

    Examples
    --------
    >>> A = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> [f"{gram_iteration(A, steps).item():.4f}" for steps in range(5)]
    ['3.6056', '3.1383', '3.0144', '3.0003', '3.0000']
    """
    matrix = _matrix(matrix)
    steps = _integer("steps", steps, 0)
    m, n = matrix.shape[-2:]
    size = _scale(matrix)
    gram = (matrix if n <= m else matrix.mH) / size[..., None, None]
    log_scale = torch.zeros_like(size)
    for step in range(1, steps + 1):
        gram = gram.mH @ gram
        scale = _scale(gram)
        gram = gram / scale[..., None, None]
        log_scale = log_scale + scale.log() / 2**step
    norm = torch.linalg.matrix_norm(gram)
    positive = torch.where(norm > 0, norm, 1.0)  # keeps log and its gradient finite at zero
    bound = torch.where(norm > 0, torch.exp(positive.log() / 2**steps + log_scale), norm)
    return bound * size * _margin(max(m, n), math.sqrt(min(m, n)))


def power_iteration(
    matrix: Tensor, steps: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    r"""Lower estimate of the spectral norm by power iteration.

    .. math::
        v \leftarrow \frac{A^* A v}{\lVert A^* A v\rVert_2}, \qquad
        \lVert A v\rVert_2 \le \sigma_1(A)

    from a Gaussian start. **Guaranteed**: the value never exceeds :math:`\sigma_1`, up to
    rounding. **Only hoped**: that it is close. The error falls like
    :math:`(\sigma_2/\sigma_1)^{4 t}`, which is slow when the two are close, and a start that is
    nearly orthogonal to the first singular vector delays it. It is therefore never a certificate:
    a Lipschitz constant needs :func:`operator_norm` or :func:`gram_iteration`.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n).
    steps : int
        Number of iterations :math:`t`, at least 1.
    generator : torch.Generator, optional
        Source of the start; torch's global generator if not given.

    Returns
    -------
    torch.Tensor
        The estimates in float64, shape (...). The gradient treats :math:`v` as a constant, as in
        :cite:t:`miyato2018`.

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or ``steps`` no integer.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; or ``steps`` is
        below 1.

    Examples
    --------
    Two singular values that differ by 1 %: twenty steps are not enough.

    >>> A = torch.diag(torch.tensor([1.0] + 63 * [0.99], dtype=torch.float64))
    >>> seed = torch.Generator().manual_seed
    >>> [f"{power_iteration(A, t, seed(0)).item():.2f}" for t in (1, 20, 1000)]
    ['0.99', '0.99', '1.00']
    """
    matrix = _matrix(matrix)
    steps = _integer("steps", steps, 1)
    start = torch.randn(
        (*matrix.shape[:-2], matrix.shape[-1], 1),
        dtype=matrix.dtype,
        device=matrix.device,
        generator=generator,
    )
    scale = _scale(matrix)
    matrix = matrix / scale[..., None, None]
    with torch.no_grad():
        v = torch.nn.functional.normalize(start, dim=-2)
        for _ in range(steps):
            v = torch.nn.functional.normalize(matrix.mH @ (matrix @ v), dim=-2, eps=1e-300)
    return scale * torch.linalg.vector_norm(matrix @ v, dim=(-2, -1))


# ------------------------------------------------------------------ circular convolutions


def circular_convolution_singular_values(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    r"""All singular values of a circular convolution, exactly, through the Fourier transform.

    .. math::
        \sigma(A) = \bigcup_{\theta} \sigma\bigl(\hat K(\theta)\bigr), \qquad
        \hat K(\theta) = \sum_t K_t\, e^{\mathrm i\langle\theta, t\rangle}
        \in \mathbb C^{c_{out}\times c_{in}}

    with :math:`\theta` on the grid of :math:`2\pi j/N`. A stride :math:`s` is a convolution without
    stride on the :math:`s^d` polyphase components of the input, so that :math:`\hat K(\theta)`
    has :math:`c_{in}s^d` columns and the grid has :math:`N/s` points an axis. Groups are diagonal
    blocks: their singular values are joined. Exact up to rounding for any kernel, even or longer
    than the image (it wraps around).

    Parameters
    ----------
    weight : torch.Tensor
        Kernel of a convolution in one, two or three dimensions as torch stores it:
        (c_out, c_in / groups, k, ...), or (c_in, c_out / groups, k, ...) when ``transposed``.
    input_size : int or sequence of int
        Spatial size of the input, which the stride must divide (unless ``transposed``).
    stride, dilation : int or sequence of int
        As in :class:`torch.nn.Conv2d`. There is no padding argument: on a circle it shifts the
        image, which leaves the singular values as they are.
    groups : int
        Number of groups of channels.
    transposed : bool
        Whether the operator is the adjoint, from ``input_size`` to ``input_size * stride``.

    Returns
    -------
    torch.Tensor
        The min(inputs, outputs) singular values in float64, in descending order, shape (count,).

    Raises
    ------
    TypeError
        ``weight`` is no real floating-point tensor, or a size is no integer.
    ValueError
        ``weight`` has a wrong shape or entries that are not finite; a size is too small or has a
        wrong length; or ``stride`` does not divide ``input_size``.

    References
    ----------
    :cite:t:`sedghi2019`, for two dimensions and stride 1.

    Examples
    --------
    Their squares add up to those of all entries of the matrix, in which a weight occurs 16 times:

    >>> weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    >>> values = circular_convolution_singular_values(weight, 4)
    >>> len(values), torch.allclose(values.square().sum(), 4 * 4 * weight.square().sum())
    (32, True)
    """
    kernel, blocks = _circular_blocks(weight, input_size, stride, dilation, groups, transposed)
    parts = [
        torch.linalg.svdvals(_symbol(kernel, part)).flatten() for part in _parts(kernel, blocks)
    ]
    return torch.cat(parts).sort(descending=True).values


def circular_convolution_norm(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    r"""Spectral norm of a circular convolution, exactly, through the Fourier transform.

    .. math:: \lVert A\rVert_2 = \max_\theta \sigma_1\bigl(\hat K(\theta)\bigr)

    in the notation of :func:`circular_convolution_singular_values`, whose first value this is, at
    less than half the price: a real kernel has the same singular values at :math:`\theta` and
    :math:`-\theta`, and frequencies whose Frobenius norm is too small are passed over. The maximum
    is taken over groups as well. It depends on the image size: the grid of a small image can miss
    the peak of :math:`\sigma_1(\hat K)`, so that the norm for one size is not a bound for another.

    Parameters
    ----------
    weight, input_size, stride, dilation, groups, transposed
        As in :func:`circular_convolution_singular_values`.

    Returns
    -------
    torch.Tensor
        The norm in float64, a scalar. Differentiable wherever the maximum is attained once.

    Raises
    ------
    TypeError, ValueError
        As in :func:`circular_convolution_singular_values`.

    Examples
    --------
    A non-negative kernel of one channel is largest at frequency zero, where it is its sum:

    >>> circular_convolution_norm(torch.ones(1, 1, 3, 3), 32).item()
    9.0

    The same kernel as torch's ``spectral_norm`` sees it, a 1 × 9 matrix, has norm 3.
    """
    kernel, blocks = _circular_blocks(weight, input_size, stride, dilation, groups, transposed)
    return _completed_norm(kernel, _half(blocks))[0]


def circular_convolution_gram_iteration(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
    steps: int = 6,
) -> Tensor:
    r"""Upper bound of the spectral norm of a circular convolution by Gram iteration.

    .. math:: \lVert A\rVert_2 \le \max_\theta \lVert \hat K(\theta)^{(t)}\rVert_F^{2^{-t}}

    :func:`gram_iteration` at every frequency, with its guarantee: never below the norm, and within
    a factor :math:`r^{2^{-(t+1)}}` of it, :math:`r` the smaller side of :math:`\hat K`. It takes
    matrix products only, and singular values that coincide at one frequency do not disturb its
    gradient. For a value alone, :func:`circular_convolution_norm` costs no more on a CPU.

    Parameters
    ----------
    weight, input_size, stride, dilation, groups, transposed
        As in :func:`circular_convolution_singular_values`.
    steps : int
        Number of Gram products :math:`t`.

    Returns
    -------
    torch.Tensor
        The bound in float64, a scalar, differentiable wherever one frequency attains the maximum.

    Raises
    ------
    TypeError, ValueError
        As in :func:`circular_convolution_singular_values` and :func:`gram_iteration`.

    References
    ----------
    :cite:t:`delattre2023gram`.

    Examples
    --------
    >>> weight = torch.randn(4, 4, 3, 3)
    >>> norm = circular_convolution_norm(weight, 16)
    >>> bound = circular_convolution_gram_iteration(weight, 16)
    >>> bool(norm <= bound <= 4 ** (1 / 128) * norm * (1 + 1e-9))
    True
    """
    kernel, blocks = _circular_blocks(weight, input_size, stride, dilation, groups, transposed)
    parts = _parts(kernel, _half(blocks))
    bounds = [gram_iteration(_symbol(kernel, part), steps).amax() for part in parts]
    taps = kernel[0, 0, 0].numel()
    return torch.stack(bounds).amax() * _margin(taps, math.sqrt(taps * min(kernel.shape[1:3])))


# ----------------------------------------------------- convolutions as torch computes them


def convolution_norm_bound(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    p: float = 2,
    transposed: bool = False,
    output_padding: Size = 0,
) -> Tensor:
    r"""Upper bound of the operator norm of a convolution, for the operator that torch computes.

    .. math:: \lVert A\rVert_p \le \text{bound}, \qquad p \in \{1, 2, \infty\}

    **Guaranteed** for any kernel, stride, dilation, groups, padding and padding mode that the
    layers of torch accept, at this image size, in floating point (the bound carries a margin for
    rounding). :func:`convolution_norm_is_exact` says when the bound is the norm itself.

    **Only hoped** is how close it is elsewhere. With zero padding, :math:`p = 2` and images of
    32 × 32 pixels it was within 1 % of the norm for every 3 × 3 kernel that was measured, and for
    5 × 5 kernels but those with all their weight in the corners (up to 3.4 %); the longer the
    kernel is beside the image, the looser the bound. Reflect and replicate padding copy pixels,
    which can raise the norm well above that of a circular convolution. The bound counts the copies
    and can be too large by about the square root of their number.

    Parameters
    ----------
    weight : torch.Tensor
        Kernel of a convolution in one, two or three dimensions as torch stores it:
        (c_out, c_in / groups, k, ...), or (c_in, c_out / groups, k, ...) when ``transposed``.
    input_size : int or sequence of int
        Spatial size of the input.
    stride, padding, dilation, groups, padding_mode
        As in :class:`torch.nn.Conv2d`, ``padding="same"`` and ``"valid"`` included.
    p : float
        Exponent of the norm on both sides: 1, 2 or ``math.inf``.
    transposed : bool
        Whether the layer is a transposed convolution, such as :class:`torch.nn.ConvTranspose2d`.
    output_padding : int or sequence of int
        As in :class:`torch.nn.ConvTranspose2d`.

    Returns
    -------
    torch.Tensor
        The bound in float64, a scalar. Differentiable wherever the maximum is attained once.

    Raises
    ------
    TypeError
        ``weight`` is no real floating-point tensor, or a size is no integer.
    ValueError
        ``weight`` has a wrong shape or entries that are not finite; ``p`` is another exponent; or
        torch has no such layer: no output is left, the padding is larger than the image allows for
        its mode, ``"same"`` comes with a stride, or a transposed layer pads other than with zeros.

    Notes
    -----
    *p = 1 and p = ∞.* The largest column and row sums of :math:`|K|`, counted on the true image, so
    that taps that only ever see padding do not count.

    *p = 2.* Write one axis with stride :math:`s` as :math:`y_i = \sum_v K_v\, x_{i+v}`, where
    :math:`x_q` gathers the :math:`s` pixels :math:`sq, \dots, sq+s-1` in its channels. The rows
    :math:`i` lie in a box :math:`[0, R)` and the columns :math:`q` in a box :math:`[0, Q)`, and
    :math:`x` vanishes outside: :math:`A` is block Toeplitz. For a period :math:`M` and an angle
    :math:`\varphi` let :math:`C` be the twisted block circulant

    .. math::
        C_{iq} = \sum_{j\in\mathbb Z} e^{\mathrm i j\varphi} K_{q-i+jM},
        \qquad 0 \le i, q < M .

    If :math:`M \ge \max(v_{max} + R,\ Q - v_{min},\ R,\ Q)`, no term with :math:`j \ne 0` meets the
    box: there :math:`q - i + jM > v_{max}` for :math:`j \ge 1` and :math:`< v_{min}` for
    :math:`j \le -1`. So :math:`A` is a submatrix of :math:`C`, and :math:`\lVert A\rVert_2 \le
    \lVert C\rVert_2`. The vectors :math:`e^{\mathrm i\theta q}\,u` with
    :math:`\theta M \in \varphi + 2\pi\mathbb Z` block-diagonalise :math:`C`, hence

    .. math::
        \lVert A\rVert_2 \le \max\bigl\{\sigma_1(\hat K(\theta)) :
        \theta = (2\pi j + \varphi)/M\bigr\}
        \quad\text{for every } M \text{ and } \varphi .

    The truth lies below the peak of :math:`\sigma_1(\hat K)`, by an amount of order
    :math:`1/N^2`, and a grid that straddles the peak lies below it by nearly the same: the
    tridiagonal matrix with :math:`a` on and :math:`b` beside the diagonal has
    :math:`M = N + 1`, and :math:`\varphi = \pi` gives :math:`|a| + 2|b|\cos(\pi/(N+1))`, exact
    for :math:`a, b` of one sign. The least bound over :math:`\varphi \in \{0, \pi\}` and three
    periods an axis is sought. An axis short enough to stay a dense matrix is not completed at all.

    *Other padding.* Padding by copies is a matrix :math:`P` with
    :math:`P^\top P = \operatorname{diag}(\text{copies})`, so :math:`\lVert A\rVert_2 \le
    \sqrt{\max\text{copies}}\,\lVert A_0\rVert_2` with :math:`A_0` the convolution of the padded
    image. All modes are also held against :math:`\lVert A\rVert_2 \le
    \sqrt{\lVert A\rVert_1\lVert A\rVert_\infty}`. A transposed convolution is the adjoint of a
    convolution, and :math:`\lVert A^\top\rVert_p = \lVert A\rVert_{p^*}`.

    Examples
    --------
    The average over 3 × 3 pixels has norm 1 on a circle, less where zeros are averaged in. Where
    the border is reflected, pixels next to it count for more:

    >>> average = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    >>> for mode in ("circular", "zeros", "reflect"):
    ...     bound = convolution_norm_bound(average, 64, padding=1, padding_mode=mode)
    ...     print(f"{mode:8s} {bound.item():.4f}")
    circular 1.0000
    zeros    0.9984
    reflect  1.3333
    """
    kernel, axes = _geometry(
        weight,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        transposed,
        output_padding,
    )
    p = _convolution_exponent(p)
    magnitude = kernel.abs()
    row_sum = _contract(magnitude.sum(2, keepdim=True), [axis.row_counts() for axis in axes])
    column_sum = _contract(magnitude.sum(1, keepdim=True), [axis.column_counts() for axis in axes])
    sums = {math.inf: row_sum.amax(), 1.0: column_sum.amax()}
    margin = _margin(max(kernel.shape[1:3]) * kernel[0, 0, 0].numel(), 1)
    if p != 2:
        return sums[dual_exponent(p) if transposed else p] * margin
    interpolated = _root(sums[1.0]) * _root(sums[math.inf]) * margin
    return torch.minimum(interpolated, _least_completion(kernel, axes))


def convolution_norm_is_exact(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    p: float = 2,
    transposed: bool = False,
    output_padding: Size = 0,
) -> bool:
    r"""Whether :func:`convolution_norm_bound` is the operator norm itself, up to rounding.

    It is for :math:`p = 1` and :math:`\infty` when no two taps meet at one pixel (never with zero
    padding), and for :math:`p = 2` when on each axis

    * the layer is circular: circular padding, ``stride`` divides ``input_size``, and the output
      goes round a whole number of times; or
    * outputs do not share pixels (:math:`k = 1`, or :math:`k \le s`, without padding); or
    * the axis is short enough, with few enough channels, to be treated as a dense matrix.

    Parameters
    ----------
    weight, input_size, stride, padding, dilation, groups
        As in :func:`convolution_norm_bound`. Only the shape of ``weight`` matters.
    padding_mode, p, transposed, output_padding
        As in :func:`convolution_norm_bound`.

    Returns
    -------
    bool
        True if the bound is known to be the norm. False says only that this is not known.

    Raises
    ------
    TypeError, ValueError
        As in :func:`convolution_norm_bound`.

    Examples
    --------
    >>> weight = torch.ones(64, 64, 3, 3)
    >>> convolution_norm_is_exact(weight, 32, padding=1, padding_mode="circular")
    True
    >>> convolution_norm_is_exact(weight, 32, padding=1, padding_mode="zeros")
    False
    """
    kernel, axes = _geometry(
        weight,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        transposed,
        output_padding,
    )
    p = _convolution_exponent(p)
    if p == 2:
        return all(block.exact for block in _completions(kernel, axes)[0])
    # With copies every row sums to the same |K|: one row without coincident taps attains it.
    by_rows = (p == math.inf) != transposed
    return all(
        bool(axis.taps_are_apart().any() if by_rows else axis.taps_are_apart().all())
        for axis in axes
    )


# ------------------------------------------------------------------- one axis of the image


class _Axis(NamedTuple):
    """One spatial axis: output i at tap t reads pixel stride * i + dilation * t - before."""

    taps: int
    size: int  # pixels
    outputs: int
    stride: int = 1
    dilation: int = 1
    before: int = 0  # padding
    after: int = 0
    mode: str = "zeros"

    def offsets(self) -> Tensor:  # (taps,)
        return self.dilation * torch.arange(self.taps) - self.before

    def shifts(self) -> Tensor:  # (taps,): whole strides by which a tap reads ahead
        return self.offsets().div(self.stride, rounding_mode="floor")

    def pixels(self) -> Tensor:  # (taps, outputs): the pixel read, -1 for none
        index = self.offsets()[:, None] + self.stride * torch.arange(self.outputs)
        last = self.size - 1
        if self.mode == "circular":
            return index % self.size
        if self.mode == "replicate":
            return index.clamp(0, last)
        if self.mode == "reflect":
            return last - (last - index.abs()).abs()
        return torch.where((index >= 0) & (index <= last), index, -1)

    def incidence(self) -> Tensor:  # (taps, outputs, size): 1 where a tap takes pixel to output
        return (self.pixels()[..., None] == torch.arange(self.size)).double()

    def row_counts(self) -> Tensor:  # (taps, outputs)
        return (self.pixels() >= 0).double()

    def column_counts(self) -> Tensor:  # (taps, size)
        pixels = self.pixels()
        counts = torch.zeros(self.taps, self.size + 1, dtype=torch.float64)
        counts.scatter_add_(1, pixels + 1, torch.ones_like(pixels, dtype=torch.float64))
        return counts[:, 1:]

    def taps_are_apart(self) -> Tensor:  # (outputs,): no two taps read one pixel
        pixels = self.pixels().sort(0).values
        return ~((pixels[1:] == pixels[:-1]) & (pixels[1:] >= 0)).any(0)

    def on_padded_image(self) -> tuple[_Axis, int]:
        """Return the axis on the padded image, unpadded, and how many copies a pixel has there."""
        if self.mode == "zeros":
            return self, 1
        size = self.size + self.before + self.after
        padded = _Axis(1, self.size, size, before=self.before, mode=self.mode).pixels()
        axis = _Axis(self.taps, size, self.outputs, self.stride, self.dilation)
        return axis, int(padded.flatten().bincount().max())

    def blocks(self) -> list[_Block]:
        """Ways to complete this axis to blocks, the tightest first."""
        dense = _Block(self, self.outputs, self.size)
        if self.mode == "circular" and self.size % self.stride == 0:
            period = self.size // self.stride
            whole = self.outputs % period == 0
            turns = math.sqrt(-(-self.outputs // period))
            circulant = _Block(self, 1, self.stride, _grid(period, period, 0.0), turns, whole)
            return [circulant] if whole else [dense, circulant]

        axis, copies = self.on_padded_image()
        factor = math.sqrt(copies)
        inside = axis.pixels() >= 0
        used = inside.any(1)
        shifts = axis.shifts()
        if len(shifts[used].unique()) <= 1:  # outputs share no pixels: all blocks are the same one
            whole = self.mode == "zeros" and bool(inside[used].all(0).any())
            single = _Block(axis, 1, self.stride, _grid(1, 1, 0.0), factor, whole)
            return [single] if whole else [dense, single]
        taps, i = inside.nonzero(as_tuple=True)
        q = i + shifts[taps]
        period = int(
            max(
                shifts[used].max() + i.max() - q.min() + 1,
                q.max() - i.min() - shifts[used].min() + 1,
                i.max() - i.min() + 1,
                q.max() - q.min() + 1,
            )
        )
        # Note [dilation]
        # A dilation d (in lowest terms with the stride) splits the axis into d interleaved ones.
        # A period that d divides keeps them apart, and the symbol repeats d times over the grid.
        d = self.dilation // math.gcd(self.dilation, self.stride)
        count = -(-period // d)
        return [dense] + [
            _Block(axis, 1, self.stride, _grid(n, n * d, twist), factor, exact=False)
            for n in (count, count + 1, count + 2)
            for twist in (0.5, 0.0)
        ]


def _grid(count: int, period: int, twist: float) -> Tensor:
    """Return the first ``count`` of ``period`` frequencies, in turns per step."""
    return (torch.arange(count, dtype=torch.float64) + twist) / period


class _Block(NamedTuple):
    """One axis of an operator that contains the convolution.

    Either the axis as it is, dense (no frequencies), or completed to a twisted circulant, whose
    diagonal blocks have so many ``rows`` and ``columns`` at each of its ``frequencies``.
    """

    axis: _Axis
    rows: int
    columns: int
    frequencies: Tensor | None = None
    factor: float = 1.0  # norm of the maps between the convolution and the completed operator
    exact: bool = True

    def points(self) -> int:
        return 1 if self.frequencies is None else len(self.frequencies)

    def turns(self, index: int) -> float:
        return 0.0 if self.frequencies is None else float(self.frequencies[index])

    def matrix(self) -> Tensor:  # (taps, rows, columns, frequencies)
        if self.frequencies is None:
            return self.axis.incidence()[..., None]
        phase = self.axis.offsets() % self.axis.stride
        select = torch.nn.functional.one_hot(phase, self.axis.stride).double()
        if self.axis.mode == "zeros":
            select = select * (self.axis.pixels() >= 0).any(1, keepdim=True)
        angle = 2 * math.pi * (self.frequencies * self.axis.shifts()[:, None]).remainder(1)
        wave = torch.polar(torch.ones_like(angle), angle)
        return select[:, None, :, None] * wave[:, None, None, :]

    def around(self, peak: float) -> _Block:
        """Return the block at the two of its frequencies that enclose ``peak``."""
        if self.frequencies is None or len(self.frequencies) == 1:
            return self
        span = (self.frequencies[1] - self.frequencies[0]) * len(self.frequencies)
        distance = ((self.frequencies - peak + span / 2) % span - span / 2).abs()
        return self._replace(frequencies=self.frequencies[distance.argsort()[:2]])


def _half(blocks: Sequence[_Block]) -> list[_Block]:
    """Drop the frequencies that are the negatives of others, on the axis that has the most."""
    longest = _longest(blocks)
    frequencies = blocks[longest].frequencies
    if frequencies is None:
        return list(blocks)
    half = len(frequencies) // 2 + 1 if frequencies[0] == 0 else (len(frequencies) + 1) // 2
    return _at(blocks, longest, frequencies[:half])


def _longest(blocks: Sequence[_Block]) -> int:
    return max(range(len(blocks)), key=lambda axis: blocks[axis].points())


def _at(blocks: Sequence[_Block], axis: int, frequencies: Tensor) -> list[_Block]:
    replaced = blocks[axis]._replace(frequencies=frequencies)
    return [replaced if a == axis else block for a, block in enumerate(blocks)]


def _count(blocks: Sequence[_Block]) -> int:
    return math.prod(block.points() for block in blocks)


# ------------------------------------------------------------------ frequency by frequency


def _symbol(kernel: Tensor, blocks: Sequence[_Block]) -> Tensor:
    """Diagonal blocks of the completed operator, (groups, *frequencies, rows, columns)."""
    symbol = _contract(kernel, [block.matrix() for block in blocks])  # g o i, then r c f an axis
    rows, columns, frequencies = (range(start, symbol.dim(), 3) for start in (3, 4, 5))
    symbol = symbol.permute(0, *frequencies, 1, *rows, 2, *columns)
    dims = len(blocks)
    return symbol.flatten(2 + 2 * dims).flatten(1 + dims, 1 + 2 * dims)


def _contract(kernel: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply each spatial axis of ``kernel`` (from axis 3 on) by its matrix, taps first."""
    dtype = torch.complex128 if any(m.is_complex() for m in matrices) else torch.float64
    kernel = kernel.to(dtype)
    for matrix in matrices:
        kernel = torch.tensordot(kernel, matrix.to(kernel.device, dtype), dims=([3], [0]))
    return kernel


# Entries of a symbol that are held in memory at a time, 16 bytes each.
_ENTRIES = 2**24


def _parts(kernel: Tensor, blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """Split the axis that has the most frequencies so that each symbol fits in memory."""
    longest = _longest(blocks)
    frequencies = blocks[longest].frequencies
    if frequencies is None:
        yield list(blocks)
        return
    entries = _count(blocks) * math.prod(_block_shape(kernel, blocks)) * kernel.shape[0]
    for part in frequencies.split(max(1, _ENTRIES * len(frequencies) // entries)):
        yield _at(blocks, longest, part)


def _completed_norm(kernel: Tensor, blocks: Sequence[_Block]) -> tuple[Tensor, list[float]]:
    """Return the spectral norm of a completed operator, and the frequencies that attain it.

    Diagonal blocks come in the order of their Frobenius norms, which bound all that follow.
    """
    scale = _scale(kernel.flatten(0, -2))
    kernel = kernel / scale
    largest, peak = 0 * kernel.sum(), [0.0] * len(blocks)
    for part in _parts(kernel, blocks):
        symbol = _symbol(kernel, part)
        grid = symbol.shape[:-2]
        symbol = symbol.flatten(0, -3)
        if symbol.shape[-2] < symbol.shape[-1]:
            symbol = symbol.mH
        norms, order = torch.linalg.matrix_norm(symbol.detach()).sort(descending=True)
        for start in range(0, len(order), 32):
            if norms[start] <= largest:
                break
            chunk = symbol[order[start : start + 32]]
            top, where = torch.linalg.eigvalsh(chunk.mH @ chunk)[:, -1].max(0)
            if _root(top) > largest:
                largest = _root(top)
                _, *index = np.unravel_index(int(order[start + where]), grid)
                peak = [block.turns(int(i)) for block, i in zip(part, index, strict=True)]
    return largest * scale, peak


# Note [work]
# Multiply-adds, about a second on one core, that the dense axes may take and that the search for a
# better completion may take before it stops. They are counted, the clock is never read: the same
# weights have the same bound everywhere. To make an entry of a block costs as much as some 150.
_WORK = 2e9


def _work(kernel: Tensor, blocks: Sequence[_Block]) -> float:
    rows, columns = _block_shape(kernel, blocks)
    entries = kernel.shape[0] * _count(blocks) * rows * columns
    complexity = 1 if all(block.frequencies is None for block in blocks) else 4
    return complexity * entries * (min(rows, columns) + 150)


def _block_shape(kernel: Tensor, blocks: Sequence[_Block]) -> tuple[int, int]:
    rows = kernel.shape[1] * math.prod(block.rows for block in blocks)
    return rows, kernel.shape[2] * math.prod(block.columns for block in blocks)


def _completions(kernel: Tensor, axes: Sequence[_Axis]) -> list[list[_Block]]:
    """Up to 64 completions with as many dense axes as affordable, the likeliest first."""
    choices = []
    for ranked in itertools.product(*(enumerate(axis.blocks()) for axis in axes)):
        blocks = [block for _, block in ranked]
        dense = sum(block.frequencies is None for block in blocks)
        choices.append((dense, sum(rank for rank, _ in ranked), blocks))
    choices.sort(key=lambda choice: choice[1])
    work = [_work(kernel, _half(blocks)) for _, _, blocks in choices]
    limit = max(_WORK, 1.5 * min(work))
    affordable = [choice for choice, cost in zip(choices, work, strict=True) if cost <= limit]
    most = max(dense for dense, _, _ in affordable)
    return [blocks for dense, _, blocks in affordable if dense == most][:64]


def _least_completion(kernel: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Least spectral norm among the completed operators, times what leads to them.

    The norm near the peak of the first completion is a floor for each of the others. They are
    tried from the lowest floor upwards until the floor has passed the least norm found.
    """
    taps = kernel[0, 0, 0].numel()

    def bound(blocks: Sequence[_Block]) -> tuple[Tensor, list[float]]:
        rows, columns = _block_shape(kernel, blocks)
        rank = max(min(rows, columns), math.sqrt(taps * min(rows, columns)))
        factor = math.prod(block.factor for block in blocks) * _margin(rows + columns + taps, rank)
        norm, peak = _completed_norm(kernel, blocks)
        return norm * factor, peak

    first, *others = _completions(kernel, axes)
    least, peak = bound(_half(first))
    floors: list[tuple[float, list[_Block]]] = []
    budget = max(_WORK, _work(kernel, _half(first)))
    for blocks in others:
        near = [block.around(turns) for block, turns in zip(blocks, peak, strict=True)]
        budget -= _work(kernel, near)
        if budget < 0:
            break
        with torch.no_grad():
            floors.append((bound(near)[0].item(), blocks))
    budget = _WORK
    for floor, blocks in sorted(floors, key=lambda pair: pair[0]):
        if floor >= least or budget < 0:
            break
        least = torch.minimum(least, bound(_half(blocks))[0])
        budget -= _work(kernel, _half(blocks))
    return least


# ------------------------------------------------------------------------------ arguments


def _circular_blocks(
    weight: Tensor, input_size: Size, stride: Size, dilation: Size, groups: int, transposed: bool
) -> tuple[Tensor, list[_Block]]:
    kernel, dims = _kernel(weight, groups)
    sizes = _tuple("input_size", input_size, dims, 1)
    strides = _tuple("stride", stride, dims, 1)
    dilations = _tuple("dilation", dilation, dims, 1)
    if transposed:
        sizes = [size * s for size, s in zip(sizes, strides, strict=True)]
    blocks = []
    for taps, size, s, d in zip(kernel.shape[3:], sizes, strides, dilations, strict=True):
        if size % s:
            raise ValueError(
                "input_size must be a multiple of stride for a convolution to be circular, "
                f"got input_size {tuple(sizes)} and stride {tuple(strides)}"
            )
        axis = _Axis(taps, size, size // s, s, d, mode="circular")
        blocks += axis.blocks()
    return kernel, blocks


def _geometry(
    weight: Tensor,
    input_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    padding_mode: str,
    transposed: bool,
    output_padding: Size,
) -> tuple[Tensor, list[_Axis]]:
    """Check what torch would check, and lay out the axes of the convolution (or its adjoint)."""
    kernel, dims = _kernel(weight, groups)
    sizes = _tuple("input_size", input_size, dims, 1)
    strides = _tuple("stride", stride, dims, 1)
    dilations = _tuple("dilation", dilation, dims, 1)
    extra = _tuple("output_padding", output_padding, dims, 0)
    spans = [d * (k - 1) for d, k in zip(dilations, kernel.shape[3:], strict=True)]
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise ValueError(
            "padding_mode must be 'zeros', 'circular', 'reflect' or 'replicate', "
            f"got {padding_mode!r}"
        )
    if transposed and padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' with transposed=True, got {padding_mode!r}")
    if not transposed and any(extra):
        raise ValueError(f"output_padding must be 0 unless transposed=True, got {output_padding!r}")
    pads = _padding(padding, spans, strides, transposed)
    axes = []
    for taps, n, s, d, span, (before, after), more in zip(
        kernel.shape[3:], sizes, strides, dilations, spans, pads, extra, strict=True
    ):
        most = {"circular": n, "reflect": n - 1}.get(padding_mode, math.inf)
        if max(before, after) > most:
            raise ValueError(
                f"padding must be at most {most} with padding_mode {padding_mode!r} and "
                f"input_size {n}, got {max(before, after)}"
            )
        if more >= max(s, d):
            raise ValueError(
                f"output_padding must be below stride or dilation ({max(s, d)}), got {more}"
            )
        if transposed:
            size, outputs = (n - 1) * s - before - after + span + 1 + more, n
        else:
            size, outputs = n, (n + before + after - span - 1) // s + 1
        if min(size, outputs) < 1:
            raise ValueError(
                f"input_size must leave an output, got {n} with kernel {taps}, stride {s}, "
                f"padding {before} and {after}, dilation {d}"
            )
        mode = padding_mode if before or after else "zeros"
        axes.append(_Axis(taps, size, outputs, s, d, before, after, mode))
    return kernel, axes


def _padding(
    padding: Size | str, spans: list[int], strides: list[int], transposed: bool
) -> list[tuple[int, int]]:
    if not isinstance(padding, str):
        return [(pad, pad) for pad in _tuple("padding", padding, len(spans), 0)]
    if padding not in ("same", "valid") or transposed:
        wanted = "integers" if transposed else "integers, 'same' or 'valid'"
        raise ValueError(f"padding must be {wanted}, got {padding!r}")
    if padding == "valid":
        return [(0, 0) for _ in spans]
    if any(s != 1 for s in strides):
        raise ValueError(f"padding must be integers with a stride, got 'same' and stride {strides}")
    return [(span // 2, span - span // 2) for span in spans]


def _kernel(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """View the weight as (groups, first / groups, second, *k) in float64, and count its axes."""
    weight = _finite("weight", weight)
    if weight.is_complex():
        raise TypeError(f"weight must be real, got {weight.dtype}")
    if weight.dim() not in (3, 4, 5) or weight.numel() == 0:
        raise ValueError(
            "weight must have shape (c_out, c_in, *k) with one to three sizes k, all positive, "
            f"got {tuple(weight.shape)}"
        )
    groups = _integer("groups", groups, 1)
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the first axis of weight, {weight.shape[0]}, got {groups}"
        )
    return weight.unflatten(0, (groups, -1)), weight.dim() - 2


def _matrix(matrix: Tensor) -> Tensor:
    matrix = _finite("matrix", matrix)
    if matrix.dim() < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    return matrix


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _scale(matrix: Tensor) -> Tensor:
    """Return the power of two below the largest entry of each matrix, a constant to divide by.

    Squares of what is left neither overflow nor underflow, and the division does not round.
    """
    largest = matrix.detach().abs().amax((-2, -1))
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)


def _root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where a norm has 0 among its subgradients."""
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def _exponent(name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name} must be a number in [1, inf], got {type(p).__name__}")
    if not p >= 1:
        raise ValueError(f"{name} must be in [1, inf], got {p}")
    return float(p)


def _convolution_exponent(p: float) -> float:
    p = _exponent("p", p)
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf for a convolution, got {p:g}")
    return p


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _tuple(name: str, value: Size, dims: int, least: int) -> list[int]:
    values = list(value) if isinstance(value, Iterable) else [value] * dims
    if len(values) != dims:
        raise ValueError(f"{name} must be one integer or {dims}, got {value!r}")
    return [_integer(name, entry, least) for entry in values]
