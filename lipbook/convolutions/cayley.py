"""Orthogonal convolutions by a Cayley transform at each frequency, for images of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_rule
from lipbook.convolutions.circular import (
    OnUnshuffled,
    Size,
    channel_counts,
    one_size,
    per_axis,
    response_rule,
)
from lipbook.convolutions.frequencies import (
    frequency_matrices,
    in_frequencies,
    large_kernel_matrices,
)
from lipbook.norms.arguments import _floating, _integer
from lipbook.orthogonal.orthonormality import without_autocast

__all__ = [
    "cayley_kernel",
    "CayleyKernel",
    "CayleyConv2d",
]


# Steps of their own in torch.fx, see circular.py.
torch.fx.wrap("_of_size")
torch.fx.wrap("_in_frequencies")
torch.fx.wrap("_adjoint_in_frequencies")


def cayley_kernel(weight: Tensor, image_size: Size) -> Tensor:
    r"""Orthogonal kernel by a Cayley transform at each frequency.

    .. math::
        \hat W(\theta) = \begin{pmatrix} U \\ V \end{pmatrix}, \quad
        M = U - U^* + V^* V, \qquad
        \hat K(\theta) = \begin{pmatrix} 2 (I + M)^{-1} - I \\ -2 V (I + M)^{-1} \end{pmatrix}

    for no more inputs than outputs, and the adjoint otherwise. :math:`I + M` is invertible for
    every weight, since its Hermitian part is at least :math:`I`.

    **Guaranteed**: all singular values of the circular convolution are 1 on images of this size,
    and of no other: the kernel is as large as the image, though it mostly decays.

    Parameters
    ----------
    weight : torch.Tensor
        (c_out, c_in, \*k), its middle at the pixel itself.
    image_size : int or sequence of int
        At least k.

    Returns
    -------
    torch.Tensor
        (c_out, c_in, \*image_size), with tap t reading the pixel t ahead, around the circle.

    Raises
    ------
    ValueError
        If a kernel size exceeds the image size.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_singular_values
    >>> kernel = cayley_kernel(torch.randn(4, 3, 3, 3), image_size=6)
    >>> values = circular_convolution_singular_values(kernel, 6)
    >>> bool((values - 1).abs().max() < 1e-6)
    True

    References
    ----------
    :cite:t:`trockman2021`, section 4.
    """
    _floating("weight", weight, 3)
    size, axes = _check_size(weight, image_size), tuple(range(2, weight.dim()))
    with without_autocast(weight):
        response = _response(weight, size)
        wide = weight.shape[0] < weight.shape[1]
        response = response.mH if wide else response
        n = response.shape[-1]
        eye = torch.eye(n, dtype=response.dtype, device=response.device)
        U, V = response[..., :n, :], response[..., n:, :]
        system = eye + U - U.mH
        if V.shape[-2] == 0:
            response = 2 * torch.linalg.inv(system) - eye
        else:
            inverse = torch.linalg.inv(system + V.mH @ V)
            response = torch.cat([2 * inverse - eye, -2 * V @ inverse], -2)
        response = (response.mH if wide else response).movedim((-2, -1), (0, 1))
        return torch.fft.irfftn(response, s=size, dim=axes).to(weight.dtype)


def _check_size(weight: Tensor, image_size: Size) -> tuple[int, ...]:
    size = per_axis("image_size", image_size, weight.dim() - 2)
    if any(k > n for k, n in zip(weight.shape[2:], size, strict=True)):
        raise ValueError(
            f"image_size must be at least the kernel size {tuple(weight.shape[2:])}, got {size}"
        )
    return size


def _response(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Frequency response of a small kernel whose middle is the pixel itself, matrices last."""
    working = torch.float32 if weight.device.type == "mps" else torch.float64
    return frequency_matrices(weight.to(working), size, ahead=False)


class CayleyKernel(nn.Module):
    """Parametrization by :func:`cayley_kernel`: an orthogonal kernel as large as the image.

    Parameters
    ----------
    image_size : sequence of int
        Size of the images that it will meet.
    """

    def __init__(self, image_size: Sequence[int]) -> None:
        super().__init__()
        self.image_size = tuple(image_size)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel (c_out, c_in, *image_size) of a weight (c_out, c_in, *k)."""
        return cayley_kernel(weight, self.image_size)


class OneSizeConv2d(OnUnshuffled):
    """Convolution by a kernel as large as the image, in frequencies."""

    not_in_onnx = "multiplies complex numbers, which torch cannot write as ONNX"

    def __init__(
        self,
        out_channels: int,
        raw: tuple[int, int],
        kernel_size: int,
        image_size: Size,
        stride: int,
        bias: bool,
        constraint: Callable[[Sequence[int]], nn.Module],
        device: Any,
        dtype: Any,
    ) -> None:
        sizes = one_size(image_size, kernel_size, stride)
        weight = torch.empty(*raw, kernel_size, kernel_size, device=device, dtype=dtype)
        kernel = constraint([n // stride for n in sizes])
        super().__init__(out_channels, stride, bias, weight, kernel, new_shape=True)
        self.kernel_size, self.image_size = kernel_size, sizes

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h / stride, w / stride)."""
        return super().forward(_of_size(input, self.image_size))

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply by the frequency response, from the phases (batch, c_in s², h / s, w / s)."""
        return _in_frequencies(x, weight)


class CayleyConv2d(OneSizeConv2d):
    r"""Orthogonal convolution by the Cayley transform at each frequency, for one image size.

    ``layer.weight`` is the kernel of :func:`cayley_kernel`, as large as the image; the layer
    applies it by fast Fourier transforms. **Guaranteed**: all singular values are 1, on images
    of the size in the constructor. Images of another size are refused.

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
    device, dtype
        As in :class:`torch.nn.Conv2d`.

    Raises
    ------
    ValueError
        If ``image_size`` is no multiple of ``stride`` or too small for the kernel; when called, if
        the image has another size.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place, as by
    ``torch.nn.init.uniform_(layer.weight)``, is lost without an error, and no weight can be
    assigned. Call ``reset_parameters()`` to draw anew, or write into the
    raw parameter, ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer, x = CayleyConv2d(3, 6, 3, image_size=8, bias=False), torch.randn(2, 3, 8, 8)
    >>> torch.allclose(layer(x).norm(), x.norm())
    True

    References
    ----------
    :cite:t:`trockman2021`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        image_size: Size,
        stride: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        in_channels, out_channels = channel_counts(in_channels, out_channels)
        kernel_size = _integer("kernel_size", kernel_size, 1)
        stride = _integer("stride", stride, 1)
        raw = (out_channels, in_channels * stride**2)
        geometry = (kernel_size, image_size, stride, bias)
        super().__init__(out_channels, raw, *geometry, CayleyKernel, device, dtype)
        self.in_channels = in_channels


def _of_size(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(images.shape[-2:]) != size:
        raise ValueError(f"input must have the image size {size}, got {tuple(images.shape[-2:])}")
    return images


def _in_frequencies(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution with a kernel as large as the image, by its frequency response."""
    with without_autocast(x):
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
        images = x.to(weight.dtype).reshape(-1, *x.shape[-3:])
        outputs = in_frequencies(images, large_kernel_matrices(weight))
        return outputs.reshape(*x.shape[:-3], *outputs.shape[-3:]).to(x.dtype)


def _adjoint_in_frequencies(x: Tensor, weight: Tensor) -> Tensor:
    """Adjoint of :func:`_in_frequencies`, from the outputs of the kernel to its inputs."""
    with without_autocast(x):
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
        images = torch.fft.rfft2(x.to(weight.dtype))
        outputs = torch.einsum("oihw,...ohw->...ihw", torch.fft.rfft2(weight), images)
        return torch.fft.irfft2(outputs, s=x.shape[-2:]).to(x.dtype)


lipschitz_rule.register(CayleyConv2d, response_rule)
