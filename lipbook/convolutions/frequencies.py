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
    "large_kernel_matrices",
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


def _transformed(images: Tensor) -> Tensor:
    values = torch.fft.rfft2(images)
    values = values * _weights(images.shape[-2:], values)
    return values.permute(2, 3, 1, 0).contiguous()


def _transformed_back(values: Tensor, size: Sequence[int]) -> Tensor:
    values = values.permute(3, 2, 0, 1) / _weights(size, values)
    return torch.fft.irfft2(values, s=size)


class _Spectrum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor) -> Tensor:
        return _transformed(images)

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
        return _transformed_back(values, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int]], output: Tensor) -> None:
        ctx.size = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return spectrum(gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return images_of(tangent, ctx.size)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def spectrum(images: Tensor) -> Tensor:
    """Half spectrum F x of real images (batch, c, h, w), as (h, w // 2 + 1, c, batch)."""
    result: Tensor = _transformed(images) if _traced() else _Spectrum.apply(images)
    return result


def images_of(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Real images Fᵀ z of a half spectrum, (batch, c, *size)."""
    result: Tensor = _transformed_back(values, size) if _traced() else _Images.apply(values, size)
    return result


def frequency_matrices(kernel: Tensor, size: Sequence[int], ahead: bool = True) -> Tensor:
    """Matrices of a convolution at half of the frequencies, (*size but half, c_out, c_in).

    A tap behind the middle reads a pixel ahead, as in torch, or behind. The kernel
    (c_out, c_in, *k) may be larger than the image, around which it then winds.
    """
    turns, dims = torch.zeros((), dtype=torch.float64), len(size)
    for axis, (k, n) in enumerate(zip(kernel.shape[2:], size, strict=True), 1):
        phases = _phases(k, n // 2 + 1 if axis == dims else n, n)
        later = [1] * (dims - axis)
        turns = turns + phases.view(*phases.shape[:1], *later, *[1] * (axis - 1), k, *later)
    angle = 2 * math.pi if ahead else -2 * math.pi
    waves = torch.polar(torch.ones((), dtype=torch.float64), angle * turns.flatten(dims))
    taps = kernel.flatten(2).permute(2, 0, 1).flatten(1)
    taps = taps.to(torch.promote_types(taps.dtype, torch.complex64))
    return (waves.to(taps) @ taps).unflatten(-1, kernel.shape[:2])


def _phases(taps: int, frequencies: int, size: int) -> Tensor:
    """Count the turns of each wave from a pixel to each tap around it, (frequencies, taps)."""
    products = torch.arange(frequencies)[:, None] * (torch.arange(taps) - taps // 2)
    return products.remainder(size).double() / size


def large_kernel_matrices(kernel: Tensor) -> Tensor:
    """Matrices of a convolution by a kernel as large as the image, which reads the pixels ahead."""
    values = spectrum(kernel).mH
    return values / _weights(kernel.shape[-2:], values).view(-1, 1, 1)


def in_frequencies(x: Tensor, matrices: Tensor) -> Tensor:
    """Images (batch, c_in, h, w) convolved by the matrices at the frequencies."""
    return images_of(matrices @ spectrum(x), (x.shape[-2], x.shape[-1]))
