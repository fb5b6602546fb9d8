"""Circular convolutions, exactly, through the Fourier transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbook.norms.arguments import Size
from lipbook.norms.axes import _half
from lipbook.norms.geometry import _circular_blocks
from lipbook.norms.matrices import gram_iteration
from lipbook.norms.precision import _margin
from lipbook.norms.responses import _completed_norm, _parts, _symbol

__all__ = [
    "circular_convolution_singular_values",
    "circular_convolution_norm",
    "circular_convolution_gram_iteration",
]


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
    return _completed_norm(kernel, _half(blocks))


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
