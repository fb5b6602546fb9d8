"""Circular convolutions of images in the frequencies of a real Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "spectrum",
    "images_of",
    "frequency_matrices",
    "in_frequencies",
]

# Note [half a spectrum]
# The transform of a real image at θ is the conjugate of that at -θ, so half of the frequencies
# say all. With each value of that half multiplied by the root of how often it stands in the whole,
# 1 or 2, and divided by that of the number of pixels, the transform F is an isometry, FᵀF = I: Fᵀ
# is the inverse transform, and each is the derivative of the other. torch's own derivative of rfft2
# takes a transform of complex images of the full size, four times as long.


def _weights(size: Sequence[int], like: Tensor) -> Tensor:
    """Weights of the half spectrum in F, for the last of its axes."""
    real = torch.empty((), dtype=like.dtype).abs().dtype
    counts = torch.full((size[-1] // 2 + 1,), 2.0, dtype=real, device=like.device)
    counts[0] = 1
    if size[-1] % 2 == 0:
        counts[-1] = 1
    return (counts / math.prod(size)).sqrt()


class _Spectrum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor) -> Tensor:
        values = torch.fft.rfft2(images)
        values *= _weights(images.shape[-2:], values)
        return values.permute(2, 3, 1, 0).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.size = tuple(inputs[0].shape[-2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return images_of(gradient, ctx.size)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return spectrum(tangent)


class _Images(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, size: tuple[int, int]) -> Tensor:
        values = values.permute(3, 2, 0, 1) / _weights(size, values)
        return torch.fft.irfft2(values, s=size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int]], output: Tensor) -> None:
        ctx.size = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return spectrum(gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return images_of(tangent, ctx.size)


def spectrum(images: Tensor) -> Tensor:
    """Half spectrum F x of real images (batch, c, h, w), as (h, w // 2 + 1, c, batch)."""
    result: Tensor = _Spectrum.apply(images)
    return result


def images_of(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Real images Fᵀ z of a half spectrum, (batch, c, *size)."""
    result: Tensor = _Images.apply(values, size)
    return result


def frequency_matrices(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Matrices of a convolution at half of the frequencies, (h, w // 2 + 1, c_out, c_in).

    The kernel (c_out, c_in, k, k) may be larger than the image, around which it then winds.
    """
    (rows, columns), (h, w) = kernel.shape[2:], size
    down = _phases(rows, h, h)[:, None, :, None]
    across = _phases(columns, w // 2 + 1, w)[:, None]
    waves = torch.polar(torch.ones(()).double(), 2 * math.pi * (down + across)).flatten(2)
    waves = waves.to(kernel.device)
    taps = kernel.flatten(2).permute(2, 0, 1).flatten(1)
    real, imaginary = waves.real.to(taps.dtype) @ taps, waves.imag.to(taps.dtype) @ taps
    return torch.complex(real, imaginary).unflatten(-1, kernel.shape[:2])


def _phases(taps: int, frequencies: int, size: int) -> Tensor:
    """Count the turns of each wave from a pixel to each tap around it, (frequencies, taps)."""
    products = torch.arange(frequencies)[:, None] * (torch.arange(taps) - taps // 2)
    return products.remainder(size).double() / size


def in_frequencies(x: Tensor, matrices: Tensor) -> Tensor:
    """Images convolved by the matrices at the frequencies, (batch, c_out, h, w)."""
    return images_of(matrices @ spectrum(x), (x.shape[-2], x.shape[-1]))
