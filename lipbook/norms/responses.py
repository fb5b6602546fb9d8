"""Frequency responses: the diagonal blocks of circulants, and the largest of their norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lipbook.norms.axes import _at, _Block, _count, _longest
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


def _block_shape(kernel: Tensor, blocks: Sequence[_Block]) -> tuple[int, int]:
    rows = kernel.shape[1] * math.prod(block.rows for block in blocks)
    return rows, kernel.shape[2] * math.prod(block.columns for block in blocks)
