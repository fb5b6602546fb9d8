"""Where training starts: the identity, or a random orthogonal matrix at one pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lipbook.convolutions.bcop import BCOP
from lipbook.convolutions.block_convolution import _turns
from lipbook.convolutions.circular import semi_orthogonal
from lipbook.orthogonal import OrthogonalLinear
from lipbook.orthogonal.constrained import raw_parameters

__all__ = ["identity_", "orthogonal_"]

Layer = TypeVar("Layer", bound=nn.Module)


def orthogonal_(layer: Layer, generator: torch.Generator | None = None) -> Layer:
    r"""Start a layer from a random orthogonal matrix; of a convolution, at the middle tap.

    .. math:: W = Q, \qquad K_t = \begin{cases} Q & t = 0 \\ 0 & t \ne 0 \end{cases}

    with :math:`Q` uniform among the matrices with orthonormal columns, or rows if they are fewer.
    That is the delta-orthogonal start: all singular values of the layer are 1, and it mixes
    channels and no pixels, of which training makes what it needs. The bias is left as it is, as
    ``torch.nn.init`` does.

    Parameters
    ----------
    layer : torch.nn.Module
        :class:`torch.nn.Linear`, :class:`~lipbook.orthogonal.OrthogonalLinear` by any method,
        :class:`torch.nn.Conv2d` and its kin or :class:`OrthogonalConv2d` and its kin, with odd
        kernel and without a stride. An orthogonal one needs projectors of half the channels, as
        they are by default for an even number.
    generator : torch.Generator, optional
        Source of the matrix; torch's global generator if not given.

    Returns
    -------
    torch.nn.Module
        The layer, changed in place.

    Raises
    ------
    TypeError
        If ``layer`` is none of these.
    ValueError
        If its kernel is even, it has a stride, or its projectors have another rank.

    Examples
    --------
    >>> from lipbook.convolutions import OrthogonalConv2d
    >>> layer = orthogonal_(OrthogonalConv2d(4, 4, 3), torch.Generator().manual_seed(0))
    >>> bool(layer.weight.flatten(2)[..., [0, 1, 2, 3, 5, 6, 7, 8]].abs().max() < 1e-6)
    True

    References
    ----------
    :cite:t:`xiao2018`, Algorithm 1.
    """
    return _started(layer, lambda like: semi_orthogonal(like, generator), generator)


def identity_(layer: Layer) -> Layer:
    r"""Start a layer from the identity; with other numbers of channels, from its first part.

    .. math:: W = I, \qquad K_t = \begin{cases} I & t = 0 \\ 0 & t \ne 0 \end{cases}

    Of m outputs and n inputs the first :math:`\min(m, n)` are connected; with groups, in each.
    Deep chains of MaxMin learn from there what they do not from random matrices. The bias is left
    as it is.

    Parameters
    ----------
    layer : torch.nn.Module
        As in :func:`orthogonal_`.

    Returns
    -------
    torch.nn.Module
        The layer, changed in place.

    Raises
    ------
    TypeError, ValueError
        As in :func:`orthogonal_`.

    Examples
    --------
    >>> from lipbook.convolutions import OrthogonalConv2d
    >>> layer, x = identity_(OrthogonalConv2d(4, 4, 3, bias=False)), torch.randn(2, 4, 6, 6)
    >>> torch.allclose(layer(x), x, atol=1e-5)
    True
    """
    return _started(layer, lambda like: torch.eye(*like.shape[-2:]).to(like).expand_as(like))


@torch.no_grad()
def _started(layer: Layer, matrices: Callable[[Tensor], Tensor], generator: Any = None) -> Layer:
    """Set the weight by a function from a tensor (..., rows, columns) to such matrices."""
    module = cast(Any, layer)
    if isinstance(layer, OrthogonalLinear):
        module.weight = matrices(torch.empty_like(module.weight))
    elif isinstance(layer, nn.Linear) and not parametrize.is_parametrized(layer):
        module.weight.copy_(matrices(module.weight))
    elif isinstance(layer, _ConvNd) and not layer.transposed:
        _check_middle(layer)
        if not parametrize.is_parametrized(layer):
            weight = layer.weight
            taps = torch.zeros_like(weight).unflatten(0, (layer.groups, -1))
            middle = (..., *(k // 2 for k in layer.kernel_size))
            taps[middle] = matrices(taps[middle])
            weight.copy_(taps.flatten(0, 1))
        else:
            _start_bcop(module, matrices, generator)
    else:
        raise _unknown(layer)
    return layer


def _unknown(layer: nn.Module) -> TypeError:
    return TypeError(
        "layer must be Linear, Conv1d, Conv2d, Conv3d, OrthogonalLinear or an OrthogonalConv, "
        f"got {type(layer).__name__}"
    )


def _check_middle(layer: _ConvNd) -> None:
    if any(k % 2 == 0 for k in layer.kernel_size) or max(layer.stride) > 1:
        raise ValueError(
            "layer must have an odd kernel and no stride, or no tap is the middle one, "
            f"got kernel_size {layer.kernel_size} and stride {layer.stride}"
        )


# Note [a kernel of one tap]
# With P and I - P in the place of two projectors of one axis the product of their factors is
# (P + z (I - P)) ((I - P) + z P) = z I, a shift by one pixel. The factors of all axes commute if
# all projectors are P and I - P. So k - 1 factors that alternate give the middle tap of k.


def _start_bcop(layer: Any, matrices: Callable[[Tensor], Tensor], generator: Any) -> None:
    constraint = layer.parametrizations.weight[0]
    if not isinstance(constraint, BCOP):
        raise _unknown(layer)
    seed, projectors = raw_parameters(layer)
    factors, groups, n, rank = projectors.shape
    if factors and 2 * rank != n:
        raise ValueError(
            "layer must have projectors of half its channels for a kernel of one tap, "
            f"got rank {rank} of {n} channels"
        )
    rows = layer.out_channels // groups, layer.in_channels // groups
    start = matrices(seed.new_empty(groups, *rows))
    seed.copy_(start.mT if constraint.transposed else start)
    if factors:
        basis = semi_orthogonal(seed.new_empty(groups, n, n), generator)
        turns = _turns([k - 1 for k in layer.kernel_size])
        for number, axis in enumerate(turns):
            behind = turns[:number].count(axis) % 2
            projectors[number] = basis[..., rank:] if behind else basis[..., :rank]
