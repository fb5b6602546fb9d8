"""One axis of an image: which pixel an output reads, and the circulants that contain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = []


class _Axis(NamedTuple):
    """One spatial axis: output i at tap t reads pixel stride * i + dilation * t - before."""

    taps: int
    size: int  # pixels
    outputs: int
    stride: int = 1
    dilation: int = 1
    before: int = 0  # padding
    after: int = 0
    mode: str = "zeros"

    def offsets(self) -> Tensor:  # (taps,)
        return self.dilation * torch.arange(self.taps) - self.before

    def shifts(self) -> Tensor:  # (taps,): whole strides by which a tap reads ahead
        return self.offsets().div(self.stride, rounding_mode="floor")

    def pixels(self) -> Tensor:  # (taps, outputs): the pixel read, -1 for none
        index = self.offsets()[:, None] + self.stride * torch.arange(self.outputs)
        last = self.size - 1
        if self.mode == "circular":
            return index % self.size
        if self.mode == "replicate":
            return index.clamp(0, last)
        if self.mode == "reflect":
            return last - (last - index.abs()).abs()
        return torch.where((index >= 0) & (index <= last), index, -1)

    def incidence(self) -> Tensor:  # (taps, outputs, size): 1 where a tap takes pixel to output
        return (self.pixels()[..., None] == torch.arange(self.size)).double()

    def row_counts(self) -> Tensor:  # (taps, outputs)
        return (self.pixels() >= 0).double()

    def column_counts(self) -> Tensor:  # (taps, size)
        pixels = self.pixels()
        counts = torch.zeros(self.taps, self.size + 1, dtype=torch.float64)
        counts.scatter_add_(1, pixels + 1, torch.ones_like(pixels, dtype=torch.float64))
        return counts[:, 1:]

    def taps_are_apart(self) -> Tensor:  # (outputs,): no two taps read one pixel
        pixels = self.pixels().sort(0).values
        return ~((pixels[1:] == pixels[:-1]) & (pixels[1:] >= 0)).any(0)

    def on_padded_image(self) -> tuple[_Axis, int]:
        """Return the axis on the padded image, unpadded, and how many copies a pixel has there."""
        if self.mode == "zeros":
            return self, 1
        size = self.size + self.before + self.after
        padded = _Axis(1, self.size, size, before=self.before, mode=self.mode).pixels()
        axis = _Axis(self.taps, size, self.outputs, self.stride, self.dilation)
        return axis, int(padded.flatten().bincount().max())

    def blocks(self) -> list[_Block]:
        """Ways to complete this axis to blocks, the tightest first."""
        dense = _Block(self, self.outputs, self.size)
        if self.mode == "circular" and self.size % self.stride == 0:
            period = self.size // self.stride
            whole = self.outputs % period == 0
            turns = math.sqrt(-(-self.outputs // period))
            circulant = _Block(self, 1, self.stride, _grid(period, period, 0.0), turns, whole)
            return [circulant] if whole else [dense, circulant]

        axis, copies = self.on_padded_image()
        factor = math.sqrt(copies)
        inside = axis.pixels() >= 0
        used = inside.any(1)
        shifts = axis.shifts()
        if len(shifts[used].unique()) <= 1:  # outputs share no pixels: all blocks are the same one
            whole = self.mode == "zeros" and bool(inside[used].all(0).any())
            single = _Block(axis, 1, self.stride, _grid(1, 1, 0.0), factor, whole)
            return [single] if whole else [dense, single]
        taps, i = inside.nonzero(as_tuple=True)
        q = i + shifts[taps]
        period = int(
            max(
                shifts[used].max() + i.max() - q.min() + 1,
                q.max() - i.min() - shifts[used].min() + 1,
                i.max() - i.min() + 1,
                q.max() - q.min() + 1,
            )
        )
        # Note [dilation]
        # A dilation d (in lowest terms with the stride) splits the axis into d interleaved ones.
        # A period that d divides keeps them apart, and the symbol repeats d times over the grid.
        d = self.dilation // math.gcd(self.dilation, self.stride)
        count = -(-period // d)
        return [dense] + [
            _Block(axis, 1, self.stride, _grid(n, n * d, twist), factor, exact=False)
            for n in (count, count + 1, count + 2)
            for twist in (0.5, 0.0)
        ]


def _grid(count: int, period: int, twist: float) -> Tensor:
    """Return the first ``count`` of ``period`` frequencies, in turns per step."""
    return (torch.arange(count, dtype=torch.float64) + twist) / period


class _Block(NamedTuple):
    """One axis of an operator that contains the convolution.

    Either the axis as it is, dense (no frequencies), or completed to a twisted circulant, whose
    diagonal blocks have so many ``rows`` and ``columns`` at each of its ``frequencies``.
    """

    axis: _Axis
    rows: int
    columns: int
    frequencies: Tensor | None = None
    factor: float = 1.0  # norm of the maps between the convolution and the completed operator
    exact: bool = True

    def points(self) -> int:
        return 1 if self.frequencies is None else len(self.frequencies)

    def turns(self, index: int) -> float:
        return 0.0 if self.frequencies is None else float(self.frequencies[index])

    def at(self, index: int) -> _Block:
        """Return the block at one of its frequencies."""
        if self.frequencies is None:
            return self
        return self._replace(frequencies=self.frequencies[index : index + 1])

    def matrix(self) -> Tensor:  # (taps, rows, columns, frequencies)
        if self.frequencies is None:
            return self.axis.incidence()[..., None]
        phase = self.axis.offsets() % self.axis.stride
        select = torch.nn.functional.one_hot(phase, self.axis.stride).double()
        if self.axis.mode == "zeros":
            select = select * (self.axis.pixels() >= 0).any(1, keepdim=True)
        angle = 2 * math.pi * (self.frequencies * self.axis.shifts()[:, None]).remainder(1)
        wave = torch.polar(torch.ones_like(angle), angle)
        return select[:, None, :, None] * wave[:, None, None, :]

    def around(self, peak: float) -> _Block:
        """Return the block at the two of its frequencies that enclose ``peak``."""
        if self.frequencies is None or len(self.frequencies) == 1:
            return self
        span = (self.frequencies[1] - self.frequencies[0]) * len(self.frequencies)
        distance = ((self.frequencies - peak + span / 2) % span - span / 2).abs()
        return self._replace(frequencies=self.frequencies[distance.argsort()[:2]])


def _half(blocks: Sequence[_Block]) -> list[_Block]:
    """Drop the frequencies that are the negatives of others, on the axis that has the most."""
    longest = _longest(blocks)
    frequencies = blocks[longest].frequencies
    if frequencies is None:
        return list(blocks)
    half = len(frequencies) // 2 + 1 if frequencies[0] == 0 else (len(frequencies) + 1) // 2
    return _at(blocks, longest, frequencies[:half])


def _longest(blocks: Sequence[_Block]) -> int:
    return max(range(len(blocks)), key=lambda axis: blocks[axis].points())


def _at(blocks: Sequence[_Block], axis: int, frequencies: Tensor) -> list[_Block]:
    replaced = blocks[axis]._replace(frequencies=frequencies)
    return [replaced if a == axis else block for a, block in enumerate(blocks)]


def _count(blocks: Sequence[_Block]) -> int:
    return math.prod(block.points() for block in blocks)
