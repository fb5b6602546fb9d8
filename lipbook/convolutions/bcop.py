"""Orthogonal convolutions, transposed ones too: the parametrization BCOP and its layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lipbook.composition import lipschitz_rule
from lipbook.convolutions.block_convolution import bcop_kernel
from lipbook.convolutions.circular import (
    CircularConv,
    CircularConvTranspose,
    Padding,
    Size,
    check_groups,
    convolution_rule,
    per_axis,
    semi_orthogonal,
    torch_computes,
)
from lipbook.errors import (
    _cuda_rule_of,
    _error_rule_of,
)
from lipbook.freezing import register_plain
from lipbook.layers.linear import convolution_error, convolution_kernels
from lipbook.norms.arguments import _integer

__all__ = [
    "BCOP",
    "OrthogonalConv2d",
    "OrthogonalConv1d",
    "OrthogonalConv3d",
    "OrthogonalConvTranspose2d",
    "OrthogonalConvTranspose1d",
    "OrthogonalConvTranspose3d",
]

OrthogonalMethod = Literal["bcop", "bcop_unshuffle"]


class BCOP(nn.Module):
    r"""Parametrization by :func:`bcop_kernel`, for the weight of any torch convolution.

    Its raw parameters are the seed and the projectors, orthonormal at the start. They take the
    place of the weight, which cannot be assigned: factoring a given kernel is not implemented.

    Parameters
    ----------
    weight_shape : sequence of int
        Shape of the weight: (c_out, c_in / groups, \*k), or (c_in, c_out / groups, \*k) for a
        transposed convolution.
    stride : int or sequence of int
        Stride of the convolution; at most the kernel size.
    groups : int
        Groups of channels, each with a kernel of its own.
    rank : int, optional
        Rank of the projectors, half the channels n that they act on if not given.
    unshuffle : bool
        How to stride. False: a seed with s × s taps, then projectors on n = c_in / groups
        channels (transposed, n = c_out / groups > c_in / groups, without a stride). True: BCOP
        of size k / s on the n ≥ c_in s² / groups channels that invertible downsampling makes,
        with its pixels put back in their place. That is a richer family with
        :math:`s^{4}` times the parameters of a projector and :math:`s^{6}` times the cost.

    Raises
    ------
    ValueError
        If no orthogonal kernel exists or none that could be trained; the message says which.

    Notes
    -----
    *Rank.* The projectors of rank r are connected, those of different ranks are not: training
    never changes the rank. Half the channels is the largest component, and twice the channels with
    half the rank hold all others (:cite:t:`li2019preventing`, Theorem 2).

    *One channel per group.* A kernel from one channel to one channel is orthogonal only if it is a
    shift with a sign, :math:`|\hat K(\theta)| = 1` for a polynomial: nothing is left to train,
    and such groups (depthwise convolutions without a stride) are refused. With a stride, or with
    several outputs a channel, there is something to train and they are not.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
    >>> layer = parametrize.register_parametrization(layer, "weight", BCOP(layer.weight.shape))
    >>> x = torch.randn(1, 4, 10, 10)
    >>> torch.allclose((layer(x) - layer(0 * x)).norm(), x.norm())
    True
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        stride: Size = 1,
        groups: int = 1,
        rank: int | None = None,
        unshuffle: bool = False,
    ) -> None:
        super().__init__()
        first, columns, *sizes = weight_shape
        strides = per_axis("stride", stride, len(sizes))
        if any(k < s for k, s in zip(sizes, strides, strict=True)):
            raise ValueError(
                f"kernel_size must be at least stride, or some pixels are never read, "
                f"got kernel_size {tuple(sizes)} and stride {strides}"
            )
        self.unshuffled = strides if unshuffle else (1,) * len(sizes)
        if any(k % s for k, s in zip(sizes, self.unshuffled, strict=True)):
            raise ValueError(
                "kernel_size must be a multiple of stride with method 'bcop_unshuffle', "
                f"got kernel_size {tuple(sizes)} and stride {strides}"
            )
        check_groups(first, groups)
        self.groups, rows = groups, first // groups
        if rows * columns * math.prod(strides) == 1:
            raise ValueError(
                "groups must leave more than one channel: from one channel to one channel only a "
                "shift with a sign is orthogonal, and nothing of it can be trained; use fewer "
                f"groups or a nonexpansive convolution, got groups {groups}"
            )
        columns *= math.prod(self.unshuffled)
        self.kernel_size = tuple(k // s for k, s in zip(sizes, self.unshuffled, strict=True))
        self.stride = (1,) * len(sizes) if unshuffle else strides
        self.transposed = max(self.stride) == 1 and rows > columns
        rows, n = (columns, rows) if self.transposed else (rows, columns)
        rank = n // 2 if rank is None else rank
        if _integer("rank", rank, 0) > n:
            raise ValueError(f"rank must be between 0 and the {n} channels, got {rank}")
        factors = sum(self.kernel_size) - sum(self.stride)
        self.seed_shape = (groups, rows, n * math.prod(self.stride))
        self.projectors_shape = (factors, groups, n, rank)
        self.registered = False

    def extra_repr(self) -> str:
        """Sizes of the raw parameters."""
        return f"seed={self.seed_shape}, projectors={self.projectors_shape}"

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raw parameters to start from: random, with orthonormal rows or columns."""
        shapes = (self.seed_shape, self.projectors_shape)
        return tuple(semi_orthogonal(weight.new_empty(shape)) for shape in shapes)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Start from orthonormal raw parameters, once, when the parametrization is registered."""
        if self.registered:
            raise NotImplementedError(
                "weight cannot be assigned: no inverse of BCOP is implemented"
            )
        self.registered = True
        return self.initial(weight)

    def forward(self, seed: Tensor, projectors: Tensor) -> Tensor:
        """Kernel, in the layout of the weight."""
        kernel = bcop_kernel(seed, projectors, self.kernel_size, self.stride)
        if self.transposed:
            kernel = kernel.transpose(1, 2).flip(list(range(3, kernel.dim())))
        kernel = kernel.flatten(0, 1)
        if max(self.unshuffled) > 1:  # (c_out, c_in * s * s, k, k) -> (c_out, c_in, k * s, k * s)
            dims = len(self.unshuffled)
            kernel = kernel.unflatten(1, (-1, *self.unshuffled))
            order = itertools.chain.from_iterable((2 + dims + i, 2 + i) for i in range(dims))
            kernel = kernel.permute(0, 1, *order)
            for axis in range(2, 2 + dims):
                kernel = kernel.flatten(axis, axis + 1)
        return kernel


class _OrthogonalConv(CircularConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["circular", "zeros"] = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: OrthogonalMethod = "bcop",
        rank: int | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        self._constrain(_bcop(self, method, rank))


# Note [common divisors]
# With a divisor g common to stride and dilation, only each g-th pixel is read: the layer takes
# these pixels, which is a map with orthonormal rows, and convolves them with stride and dilation
# over g. If the rows of that convolution are orthonormal, which takes no more outputs than inputs
# that are read, so are those of the product. Its columns cannot be.


def _bcop(layer: _ConvNd, method: str, rank: int | None) -> BCOP:
    if method not in get_args(OrthogonalMethod):
        raise ValueError(
            f"method must be one of {get_args(OrthogonalMethod)}, got {method!r}; "
            "'rko' and 'aol' are not orthogonal: see NonexpansiveConv2d"
        )
    common = [math.gcd(s, d) for s, d in zip(layer.stride, layer.dilation, strict=True)]
    stride = [s // g for s, g in zip(layer.stride, common, strict=True)]
    rows, columns = len(layer.weight) // layer.groups, layer.weight.shape[1] * math.prod(stride)
    if max(common) > 1 and rows > columns:
        raise ValueError(
            "stride and dilation must have no common divisor, or some pixels are never read and "
            f"their norm is lost, got stride {layer.stride} and dilation {layer.dilation}; with "
            f"one, as many outputs as the pixels that are read are possible, {columns} a group, "
            f"and norms of gradients are kept; got {rows}"
        )
    return BCOP(layer.weight.shape, stride, layer.groups, rank, method == "bcop_unshuffle")


class OrthogonalConv2d(_OrthogonalConv, nn.Conv2d):
    r"""Orthogonal convolution in two dimensions (BCOP).

    :class:`torch.nn.Conv2d` whose weight is a kernel from :func:`bcop_kernel`.

    **Guaranteed** with circular padding, in training and evaluation, after any number of
    optimiser steps: all :math:`\min(m, n)` singular values of the layer are 1 (1e-6 in float32), at
    every image size that the stride divides, as long as the raw parameters are not close to losing
    rank (:func:`bcop_kernel` says how close); and at most 1 in any case. With c_out = s² c_in the
    layer is orthogonal; with more outputs it keeps the norm of its inputs (isometry), with fewer
    that of gradients (semi-orthogonal). **With zero padding** it is 1-Lipschitz only.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype
        As in :class:`torch.nn.Conv2d`. The kernel must be at least as large as the stride. If
        stride and dilation have a common divisor g, not all pixels are read, and there must be no
        more outputs than that leaves inputs: c_out ≤ (s/g)² c_in. A group must not be one channel
        in, one channel out, without a stride: see :class:`BCOP`.
    padding : str or int or sequence of int
        ``"same"``: as many outputs as the image has strides, of which nothing is lost. Less padding
        leaves rows of the matrix out: norms of gradients are still kept if c_out ≤ s² c_in, those
        of inputs are not. More is refused with circular padding.
    padding_mode : str
        ``"circular"`` or ``"zeros"``.
    method : str
        ``"bcop"``: a stride by composition with a strided factor. ``"bcop_unshuffle"``: a stride by
        invertible downsampling, for kernels whose size is a multiple of the stride. Without a
        stride they are the same. See :class:`BCOP` for what they cost.
    rank : int, optional
        Rank of the projectors; half of their channels if not given.

    Raises
    ------
    ValueError
        If no such kernel exists, or padding would raise the norm; when called, if the stride
        does not divide the size of the image (with circular padding).

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place, as by
    ``torch.nn.init.uniform_(layer.weight)``, is lost without an error, and no weight can be
    assigned. Call ``reset_parameters()`` to draw anew, or write into the
    raw parameters, ``layer.parametrizations.weight.original0`` and
    ``original1``.

    Examples
    --------
    >>> import torch
    >>> layer, x = OrthogonalConv2d(3, 12, 4, stride=2, bias=False), torch.randn(5, 3, 8, 8)
    >>> torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    True

    References
    ----------
    :cite:t:`li2019preventing`; :cite:t:`boissin2025aoc`; with zero padding a "same" convolution
    cannot be orthogonal beyond trivial cases: :cite:t:`achour2022`.
    """

    _dims = 2


class OrthogonalConv1d(_OrthogonalConv, nn.Conv1d):
    """Orthogonal convolution in one dimension (BCOP).

    All min(m, n) singular values are 1 with circular padding, and at most 1 with zero padding. The
    arguments are those of :class:`OrthogonalConv2d`.
    """

    _dims = 1


class OrthogonalConv3d(_OrthogonalConv, nn.Conv3d):
    """Orthogonal convolution in three dimensions (BCOP).

    All min(m, n) singular values are 1 with circular padding, and at most 1 with zero padding. The
    arguments are those of :class:`OrthogonalConv2d`.
    """

    _dims = 3


class _OrthogonalConvTranspose(CircularConvTranspose):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = "same",
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["circular", "zeros"] = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: OrthogonalMethod = "bcop",
        rank: int | None = None,
    ) -> None:
        geometry = (stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, device, dtype)
        self._constrain(_bcop(self, method, rank))


class OrthogonalConvTranspose2d(_OrthogonalConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    r"""Orthogonal transposed convolution in two dimensions (BCOP).

    The adjoint of :class:`OrthogonalConv2d` from ``out_channels`` to ``in_channels``:
    :class:`torch.nn.ConvTranspose2d` with such a weight, and with circular padding, which torch
    does not offer. **Guaranteed**: all singular values are 1 with circular padding and at
    most 1 with zero padding. Without any padding (``padding=0, padding_mode="zeros"``) nothing
    is cut, and they are 1 as well, provided that c_in ≤ s² c_out.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, groups, bias, dilation, device, dtype
        As in :class:`torch.nn.ConvTranspose2d`.
    padding : str or int or sequence of int
        ``"same"``: an output of size · stride.
    output_padding : int or sequence of int
        As in torch; for zero padding with integers only.
    padding_mode : str
        ``"circular"`` or ``"zeros"``.
    method, rank
        As in :class:`OrthogonalConv2d`.

    Raises
    ------
    ValueError
        As in :class:`OrthogonalConv2d`, and if the output would not be the whole circle.

    Examples
    --------
    >>> import torch
    >>> layer = OrthogonalConvTranspose2d(12, 3, 4, stride=2, bias=False)
    >>> x = torch.randn(5, 12, 4, 4)
    >>> torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    True
    """

    _dims = 2


class OrthogonalConvTranspose1d(_OrthogonalConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """Orthogonal transposed convolution in one dimension (BCOP).

    All min(m, n) singular values are 1 with circular padding, and at most 1 with zero padding. The
    arguments are those of :class:`OrthogonalConvTranspose2d`.
    """

    _dims = 1


class OrthogonalConvTranspose3d(_OrthogonalConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """Orthogonal transposed convolution in three dimensions (BCOP).

    All min(m, n) singular values are 1 with circular padding, and at most 1 with zero padding. The
    arguments are those of :class:`OrthogonalConvTranspose2d`.
    """

    _dims = 3


for _layer in (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
):
    lipschitz_rule.register(_layer, convolution_rule)


_LAYERS = (
    *(OrthogonalConv1d, OrthogonalConv2d, OrthogonalConv3d),
    *(OrthogonalConvTranspose1d, OrthogonalConvTranspose2d, OrthogonalConvTranspose3d),
)
_error_rule_of(*_LAYERS)(convolution_error)
_cuda_rule_of(*_LAYERS)(convolution_kernels)


register_plain(OrthogonalConv1d, nn.Conv1d, torch_computes)
register_plain(OrthogonalConv2d, nn.Conv2d, torch_computes)
register_plain(OrthogonalConv3d, nn.Conv3d, torch_computes)
register_plain(OrthogonalConvTranspose1d, nn.ConvTranspose1d, torch_computes)
register_plain(OrthogonalConvTranspose2d, nn.ConvTranspose2d, torch_computes)
register_plain(OrthogonalConvTranspose3d, nn.ConvTranspose3d, torch_computes)
