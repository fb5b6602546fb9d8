"""Frequency responses: the diagonal blocks of circulants, and the largest of their norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipbook.norms.axes import _at, _Block, _count, _grid, _half, _longest
from lipbook.norms.precision import _root, _scale

__all__ = []


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


# Note [the Gram matrices of all frequencies]
# The Gram matrices of the responses (on their shorter side) are values of one trigonometric
# polynomial of the frequency, whose degree is the length of the kernel. Interpolated once, it
# serves every grid, period and twist, so that the price does not grow with the image.


class _Polynomial(NamedTuple):
    """Gram matrices of the responses, by coefficients at lags -J, ..., J of ``steps`` an axis."""

    coefficients: Tensor  # (*lags, groups, n, n), real
    steps: list[int]

    def at(self, blocks: Sequence[_Block]) -> Tensor:  # (groups, *frequencies, n, n)
        lags = self.coefficients.shape[:-3]
        waves = [
            _waves(block, step * (torch.arange(count) - count // 2))
            for block, step, count in zip(blocks, self.steps, lags, strict=True)
        ]
        wave, flat = _product(waves), self.coefficients.flatten(0, -4).flatten(1)
        gram = torch.complex(wave.real @ flat, wave.imag @ flat)
        shape = [len(factor) for factor in waves] + list(self.coefficients.shape[-3:])
        return gram.view(shape).movedim(-3, 0)


def _gram_polynomial(kernel: Tensor, blocks: Sequence[_Block]) -> _Polynomial | None:
    """Interpolate the Gram matrices, if that takes fewer frequencies than ``blocks`` have."""
    if any(block.frequencies is None for block in blocks):
        return None
    shifts = [block.axis.shifts() - block.axis.shifts()[0] for block in blocks]
    steps = [max(1, math.gcd(*s.tolist())) for s in shifts]
    lags = [2 * int(s.max() - s.min()) // step + 1 for s, step in zip(shifts, steps, strict=True)]
    points = math.prod(lags)
    entries = kernel.shape[0] * min(_block_shape(kernel, blocks)) ** 2 * points
    if points > 2 * _count(blocks) or entries > _ENTRIES:
        return None
    samples = [
        block._replace(frequencies=_grid(count, count * step, 0.0))
        for block, count, step in zip(blocks, lags, steps, strict=True)
    ]
    half, longest = _half(samples), _longest(samples)
    waves = [
        _waves(block, step * (count // 2 - torch.arange(count))) / count
        for block, step, count in zip(half, steps, lags, strict=True)
    ]
    waves[longest][1:] *= 2  # the other half are their conjugates
    grams = _gram(_symbol(kernel, half)).movedim(0, -3)
    shape, values, wave = grams.shape[-3:], grams.flatten(0, -4).flatten(1), _product(waves).mT
    coefficients = wave.real @ values.real - wave.imag @ values.imag
    return _Polynomial(coefficients.view(*lags, *shape), steps)


def _waves(block: _Block, lags: Tensor) -> Tensor:  # (frequencies, lags)
    turns = torch.outer(torch.as_tensor(block.frequencies), lags.double()).remainder(1)
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)


def _product(waves: Sequence[Tensor]) -> Tensor:  # (all frequencies, all lags)
    return functools.reduce(torch.kron, waves)


def _gram(symbol: Tensor) -> Tensor:
    tall = symbol if symbol.shape[-2] >= symbol.shape[-1] else symbol.mH
    return tall.mH @ tall


class _Peak(NamedTuple):
    """Where the largest diagonal block of a completed operator is, and its spectral norm."""

    norm: float
    group: int
    blocks: list[_Block]  # at one frequency


def _peak(
    kernel: Tensor,
    blocks: Sequence[_Block],
    polynomial: _Polynomial | None,
    enough: float = math.inf,
) -> _Peak:
    """Find the largest block, up to rounding, or any whose norm is above ``enough``."""
    top, group, place = 0.0, 0, [block.at(0) for block in blocks]
    for part in _parts(kernel, blocks):
        grams = polynomial.at(part) if polynomial else _gram(_symbol(kernel, part))
        top, where = _largest_eigenvalue(grams.flatten(0, -3), top, enough**2)
        if where is not None:
            group, *index = map(int, np.unravel_index(where, grams.shape[:-2]))
            place = [block.at(i) for block, i in zip(part, index, strict=True)]
    return _Peak(math.sqrt(top), group, place)


# Note [the largest of many norms]
# The largest eigenvalue of one Gram matrix is computed, and the others are only compared with it:
# by their Frobenius norms, which are at least their eigenvalues, then by Cholesky's factorisation
# of level * I - G, which exists if and only if all eigenvalues of G are below the level. That is
# seven times as fast. Those that are not below are ordered by Ritz values, the likeliest first.


def _largest_eigenvalue(
    grams: Tensor, least: float = 0.0, enough: float = math.inf
) -> tuple[float, int | None]:
    """Return the largest eigenvalue of many matrices and its matrix, or ``least`` if that is more.

    Any eigenvalue above ``enough`` ends the search.
    """
    top, where = least, None
    sizes = torch.linalg.matrix_norm(grams)
    left, count = sizes.argsort(descending=True), 1
    while top <= enough:
        level = top * (1 + 8 * torch.finfo(torch.float64).eps * grams.shape[-1])
        left = left[sizes[left] > level]
        if level and len(left):
            left = left[_exceed(grams[left], level)]
        if level and len(left) > count:
            left = left[_ritz_values(grams[left]).argsort(descending=True)]
        if not len(left):
            break
        largest, which = torch.linalg.eigvalsh(grams[left[:count]])[:, -1].max(0)
        if largest > top:
            top, where = largest.item(), int(left[which])
        left, count = left[count:], 2 * count
    return top, where


def _exceed(grams: Tensor, level: float) -> Tensor:
    """Tell which matrices have eigenvalues above the level, or so close that rounding hides it."""
    shifted = -grams
    shifted.diagonal(dim1=-2, dim2=-1).add_(level)
    return torch.linalg.cholesky_ex(shifted).info != 0


def _ritz_values(grams: Tensor, steps: int = 12) -> Tensor:
    """Estimate the largest eigenvalues from below, from Krylov spaces of so many dimensions."""
    longest = grams.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    v = grams[torch.arange(len(grams)), :, longest, None]
    basis = []
    for _ in range(min(steps, grams.shape[-1])):
        v = torch.nn.functional.normalize(v, dim=-2, eps=1e-300)
        basis.append(v)
        v = grams @ v
    Q = torch.linalg.qr(torch.cat(basis, -1)).Q
    return torch.linalg.eigvalsh(Q.mH @ (grams @ Q))[:, -1]


def _norm_at(kernel: Tensor, peak: _Peak) -> Tensor:
    """Return the spectral norm of one block, with its graph."""
    symbol = _symbol(kernel[peak.group : peak.group + 1], peak.blocks).flatten(0, -3)[0]
    return _root(torch.linalg.eigvalsh(_gram(symbol))[-1])


def _completed_norm(kernel: Tensor, blocks: Sequence[_Block]) -> Tensor:
    """Return the spectral norm of a completed operator."""
    scale = _scale(kernel.flatten(0, -2))
    kernel = kernel / scale
    values = kernel.detach()
    return _norm_at(kernel, _peak(values, blocks, _gram_polynomial(values, blocks))) * scale


def _block_shape(kernel: Tensor, blocks: Sequence[_Block]) -> tuple[int, int]:
    rows = kernel.shape[1] * math.prod(block.rows for block in blocks)
    return rows, kernel.shape[2] * math.prod(block.columns for block in blocks)
