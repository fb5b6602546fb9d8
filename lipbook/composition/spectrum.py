"""Singular values of one affine layer, and its stable rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lipbook.norms import circular_convolution_singular_values
from lipbook.rules import Shape, _check, _plain_copy, _shape, affine_rule

__all__ = ["layer_singular_values", "stable_rank"]

_LARGEST = 2**26  # entries of a dense matrix: half a gigabyte


def layer_singular_values(layer: nn.Module, input_shape: Shape) -> Tensor:
    r"""All singular values of the linear part of an affine layer, on inputs of a given shape.

    .. math:: \sigma_1 \ge \dots \ge \sigma_r \ge 0 \quad\text{of } A, \qquad
        \text{layer}(x) = A x + b, \quad r = \min(m, n)

    A convolution on a circle is taken apart by the Fourier transform
    (:func:`~lipbook.norms.circular_convolution_singular_values`); every other layer, a convolution
    with zero padding among them, is written as a dense matrix. Exact up to rounding, in float64,
    for the weights as they are.

    Parameters
    ----------
    layer : torch.nn.Module
        A linear layer, a convolution or another affine layer, plain or constrained.
    input_shape : tuple of int
        Shape of one sample.

    Returns
    -------
    torch.Tensor
        The values in descending order, float64, shape (r,).

    Raises
    ------
    TypeError
        If ``layer`` is no module, or is not known to be affine.
    ValueError
        If ``layer`` does not run on ``input_shape``, its weights are not finite, or its dense
        matrix would have more than 2²⁶ entries.

    Examples
    --------
    >>> layer = nn.Linear(5, 3)
    >>> values = layer_singular_values(layer, (5,))
    >>> torch.allclose(values, torch.linalg.svdvals(layer.weight.double()))
    True

    A circular convolution, and the same kernel with zeros around the image:

    >>> kernel = torch.ones(1, 1, 3, 3) / 9
    >>> for mode in ("circular", "zeros"):
    ...     layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)
    ...     layer.weight = nn.Parameter(kernel)
    ...     print(f"{layer_singular_values(layer, (1, 8, 8))[0].item():.4f}")
    1.0000
    0.9212
    """
    shape = _shape(input_shape)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
    _check(layer)
    plain = _plain_copy(layer).double().cpu().eval()
    affine = affine_rule(plain, shape)
    if affine is None:
        raise TypeError(
            f"layer must be affine, which {type(layer).__name__} is not known to be: its Jacobian "
            "at a point has lipbook.jacobians.singular_values"
        )
    circle = _on_a_circle(plain, shape, tuple(affine.bias.shape))
    if circle is not None:
        return circle
    entries = math.prod(shape) * affine.bias.numel()
    if entries > _LARGEST:
        raise ValueError(
            f"input_shape must be smaller, got {shape}: the dense matrix would have {entries} "
            f"entries, more than {_LARGEST}; a convolution with circular padding needs none"
        )
    return torch.linalg.svdvals(affine.matrix(shape))


def _on_a_circle(layer: Any, shape: Shape, outputs: Shape) -> Tensor | None:
    """Singular values of a convolution that goes round once, None for another layer."""
    if not isinstance(layer, _ConvNd) or layer.padding_mode != "circular":
        return None
    sizes = (outputs, shape) if layer.transposed else (shape, outputs)
    long, short = (each[1:] for each in sizes)
    if any(n != m * s for n, m, s in zip(long, short, layer.stride, strict=True)):
        return None
    weight, groups, transposed = layer.weight.detach(), layer.groups, layer.transposed
    return circular_convolution_singular_values(
        weight, shape[1:], layer.stride, layer.dilation, groups, transposed
    )


def stable_rank(layer: nn.Module, input_shape: Shape) -> float:
    r"""Stable rank of an affine layer: how many directions share its norm.

    .. math::
        \operatorname{srank}(A) = \frac{\lVert A\rVert_F^2}{\lVert A\rVert_2^2}
        = \sum_i \Big(\frac{\sigma_i}{\sigma_1}\Big)^2 \in [1, \operatorname{rank} A]

    Small changes of :math:`A` change it little, as they do not the rank. Of an orthogonal layer it
    is :math:`\min(m, n)`, the most that there is. Of a convolution it is that of the operator on
    images, not of the kernel reshaped to a matrix.

    Parameters
    ----------
    layer, input_shape
        As in :func:`layer_singular_values`.

    Returns
    -------
    float
        The stable rank, 0 for a layer of zeros.

    Raises
    ------
    TypeError, ValueError
        As in :func:`layer_singular_values`.

    Examples
    --------
    >>> layer = nn.Linear(3, 3)
    >>> layer.weight = nn.Parameter(torch.diag(torch.tensor([2.0, 1.0, 0.0])))
    >>> stable_rank(layer, (3,))
    1.25

    References
    ----------
    :cite:t:`sanyal2020stable`, who bound it beside the norm.
    """
    values = layer_singular_values(layer, input_shape)
    largest = values[0]
    return 0.0 if largest == 0 else (values / largest).square().sum().item()
