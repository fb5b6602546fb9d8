"""Block reflector orthogonal convolutions (BRO), for images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_rule
from lipbook.convolutions.cayley import OneSizeConv2d, _check_size, _response
from lipbook.convolutions.circular import Size, channel_counts, response_rule
from lipbook.norms.arguments import _floating, _integer
from lipbook.orthogonal.orthonormality import without_autocast

__all__ = [
    "block_reflector_kernel",
    "BlockReflectorKernel",
    "BlockReflectorConv2d",
]


def block_reflector_kernel(weight: Tensor, image_size: Size) -> Tensor:
    r"""Orthogonal kernel by a block reflector at each frequency.

    .. math:: \hat K(\theta) = I - 2 \hat V (\hat V^* \hat V)^{-1} \hat V^*
        = I - 2 \hat Q \hat Q^*, \qquad \hat V = \hat Q \hat R

    with the response :math:`\hat V(\theta)` of a kernel of r columns. The orthogonal factor comes
    from reflections, in float64. **Guaranteed**: all singular values of the circular convolution
    are 1 on images of this size, for every weight whose response has full rank at each frequency,
    and however near it is to losing rank. The convolution is its own inverse. **Not guaranteed**:
    other orthogonal convolutions, and other sizes of images: the kernel is as large as the image.

    Parameters
    ----------
    weight : torch.Tensor
        :math:`V`, (n, r, \*k) with r at most n, its middle at the pixel itself.
    image_size : int or sequence of int
        At least k.

    Returns
    -------
    torch.Tensor
        (n, n, \*image_size), with tap t reading the pixel t ahead, around the circle.

    Raises
    ------
    ValueError
        If a kernel size exceeds the image size, or r exceeds n.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_singular_values
    >>> kernel = block_reflector_kernel(torch.randn(4, 2, 3, 3), image_size=6)
    >>> values = circular_convolution_singular_values(kernel, 6)
    >>> bool((values - 1).abs().max() < 1e-6)
    True

    References
    ----------
    :cite:t:`lai2025bro`, whose program adds 1e-5 to the Gram matrix, which takes norm away.
    """
    _floating("weight", weight, 3)
    if weight.shape[1] > weight.shape[0]:
        raise ValueError(
            f"weight must have no more columns than rows, got shape {tuple(weight.shape)}"
        )
    size, axes = _check_size(weight, image_size), tuple(range(2, weight.dim()))
    with without_autocast(weight):
        factor = torch.linalg.qr(_response(weight, size)).Q
        eye = torch.eye(len(weight), dtype=factor.dtype, device=factor.device)
        response = (eye - 2 * factor @ factor.mH).movedim((-2, -1), (0, 1))
        return torch.fft.irfftn(response, s=size, dim=axes).to(weight.dtype)


class BlockReflectorKernel(nn.Module):
    """Parametrization by :func:`block_reflector_kernel`, cut to the numbers of channels.

    Parameters
    ----------
    image_size : sequence of int
        Size of the images that it will meet.
    out_channels, in_channels : int
        Of the kernel; the larger is the number of rows of the weight.
    """

    def __init__(self, image_size: Sequence[int], out_channels: int, in_channels: int) -> None:
        super().__init__()
        self.image_size = tuple(image_size)
        self.out_channels, self.in_channels = out_channels, in_channels

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel (c_out, c_in, *image_size) of a weight (the larger, rank, *k)."""
        kernel = block_reflector_kernel(weight, self.image_size)
        return kernel[: self.out_channels, : self.in_channels]


class BlockReflectorConv2d(OneSizeConv2d):
    r"""Block reflector orthogonal convolution (BRO), for one image size.

    ``layer.weight`` is the kernel of :func:`block_reflector_kernel`, as large as the image, of
    which rows or columns are left out if there are fewer outputs or inputs; the layer applies it by
    fast Fourier transforms. **Guaranteed**: all singular values are 1, on images of the size in the
    constructor, as long as the response of the raw parameter has full rank at each frequency.
    Images of another size are refused.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    kernel_size : int
        Of the raw parameter.
    image_size : int or sequence of int
        Size of the input, a multiple of the stride.
    stride : int
        By invertible downsampling.
    bias : bool
        Whether to add one number a channel.
    rank : int, optional
        r; half of max(c_out, c_in s²) if not given.
    device, dtype
        As in :class:`torch.nn.Conv2d`.

    Raises
    ------
    ValueError
        If ``image_size`` is no multiple of ``stride`` or too small for the kernel, or ``rank`` too
        large; when called, if the image has another size.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place, as by
    ``torch.nn.init.uniform_(layer.weight)``, is lost without an error, and no weight can be
    assigned. Call ``reset_parameters()`` to draw anew, or write into the
    raw parameter, ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer, x = BlockReflectorConv2d(3, 6, 3, image_size=8, bias=False), torch.randn(2, 3, 8, 8)
    >>> torch.allclose(layer(x).norm(), x.norm())
    True

    References
    ----------
    :cite:t:`lai2025bro`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        image_size: Size,
        stride: int = 1,
        bias: bool = True,
        rank: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        in_channels, out_channels = channel_counts(in_channels, out_channels)
        kernel_size = _integer("kernel_size", kernel_size, 1)
        stride = _integer("stride", stride, 1)
        inputs = in_channels * stride**2
        larger = max(inputs, out_channels)
        rank = (larger + 1) // 2 if rank is None else _integer("rank", rank, 1)
        if rank > larger:
            raise ValueError(f"rank must be at most {larger}, got {rank}")

        def constraint(size: Sequence[int]) -> nn.Module:
            return BlockReflectorKernel(size, out_channels, inputs)

        geometry = (kernel_size, image_size, stride, bias)
        super().__init__(out_channels, (larger, rank), *geometry, constraint, device, dtype)
        self.in_channels = in_channels


lipschitz_rule.register(BlockReflectorConv2d, response_rule)
