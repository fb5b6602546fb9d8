r"""Joins: where several tensors of a network meet.

A join answers for each of its inputs by how much a change of it may change the output. With
:math:`\lVert\Delta_j\rVert` the changes of the inputs and :math:`c_j` the factors,

.. math::
    \lVert\Delta\rVert_p \le \sum_j c_j \lVert\Delta_j\rVert_p \qquad\text{or}\qquad
    \lVert\Delta\rVert_p \le \big\lVert (c_j \lVert\Delta_j\rVert_p)_j \big\rVert_p ,

the second for joins that are *stacked*, which put the inputs side by side. The factors of a
product are the values of the other inputs, and so need their ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipbook.errors import (
    ForwardError,
    _cuda_rule_of,
    _entrywise,
    _quantum,
    _stacked,
    _sum,
    plain_kernels,
)
from lipbook.norms.rigorous import _gamma
from lipbook.rules import Range, Shape, outward
from lipbook.units import Units, sorted_units, units_rule

__all__ = [
    "Add",
    "Concatenate",
    "Join",
    "MatMul",
    "Maximum",
    "Multiply",
    "Subtract",
]

NEEDS_DOMAIN = (
    "is not Lipschitz on all of space: give a domain, lipschitz_bound(..., domain=Box(0, 1))"
)


class Join(nn.Module):
    """Layer with several inputs; the subclasses give its answers."""

    stacked = False

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factor of each input, (batch,) or a number as a tensor.

        Parameters
        ----------
        ranges : sequence of Range, optional
            Values of the inputs; all real numbers if not given.
        p : float
            Exponent of the norms.

        Returns
        -------
        list of torch.Tensor

        Raises
        ------
        ValueError
            If there is no such factor.
        """
        raise TypeError(f"{type(self).__name__} gives no factors")

    def range(self, ranges: Sequence[Range]) -> Range:
        """Range of the output."""
        raise TypeError(f"{type(self).__name__} gives no range")

    def pullback(
        self, cotangent: tuple[Tensor, Tensor], ranges: Sequence[Range]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Center and radius of the rows of a Jacobian before the join, for each input."""
        return None

    def errors(self, parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
        """Error of the program, given those of its inputs."""
        raise ValueError(
            f"the rounding errors of {type(self).__name__} are not bounded on all of space: give a "
            "domain, or use sound=False"
        )

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound of the error of the program on ranges, (batch,), for inputs without errors.

        Infinite where numbers may overflow.
        """
        raise ValueError(
            f"the rounding errors of {type(self).__name__} are not bounded: use sound=False"
        )


def rounded(
    size: Tensor, roundings: int, dtype: torch.dtype, p: float, factors: Tensor | float = 0.0
) -> Tensor:
    r"""Norm of :math:`\gamma_k` times bounds of sums of moduli, with what underflows.

    ``factors`` bounds, for each entry, the sum of the moduli of the factors of its products, each
    of which may be flushed to zero.
    """
    flush = 2 * roundings * _quantum(dtype) * (1 + factors)
    error = _gamma(roundings + 1, dtype) * (1 + 2.0**-30) * size + flush
    return _entrywise(torch.where(size <= torch.finfo(dtype).max / 8, error, math.inf), p)


def flushed(values: Range, dtype: torch.dtype, p: float) -> Tensor:
    """Norm of twice the least normal number in each entry."""
    return _entrywise(torch.full_like(values.low, 2 * _quantum(dtype)), p)


def _ball(ranges: Sequence[Range]) -> bool:
    return all(r.center is not None and r.radius is not None for r in ranges)


class Add(Join):
    r"""Sum of tensors of one shape, each times a number: :math:`\sum_j w_j x_j`.

    Parameters
    ----------
    *weights : float
        :math:`w_j`.
    """

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, *parts: Tensor) -> Tensor:
        """Add the parts from left to right."""
        total = parts[0] if self.weights[0] == 1 else self.weights[0] * parts[0]
        for weight, part in zip(self.weights[1:], parts[1:], strict=True):
            total = torch.add(total, part, alpha=weight) if weight != 1 else total + part
        return total

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Moduli of the weights."""
        return [torch.tensor(abs(float(weight)), dtype=torch.float64) for weight in self.weights]

    def errors(self, parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
        """Add the errors, and round the sum."""
        return _sum(parts, outputs, p, self.weights)

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound a weight, a product and each partial sum as rounded once."""
        terms: list[Tensor] = [abs(w) * r.abs() for w, r in zip(self.weights, ranges, strict=True)]
        size = sum(terms, torch.zeros((), dtype=torch.float64))
        return rounded(size, len(terms) + 2, dtype, p)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Sum of the intervals and of the balls."""
        ends = [
            (min(w * 1.0, 0.0), max(w * 1.0, 0.0), r)
            for w, r in zip(self.weights, ranges, strict=True)
        ]
        low: Tensor = sum((up * r.low + down * r.high for down, up, r in ends), torch.zeros(()))
        high: Tensor = sum((up * r.high + down * r.low for down, up, r in ends), torch.zeros(()))
        size: Tensor = sum(
            (abs(w) * r.abs() for w, r in zip(self.weights, ranges, strict=True)), torch.zeros(())
        )
        low, high = outward(low, high, size * 2.0**-45)
        lengths = self._lengths(ranges)
        if not _ball(ranges):
            return Range(low, high, lengths=lengths)
        center, radius = torch.zeros(()), torch.zeros(())
        for w, part in zip(self.weights, ranges, strict=True):
            assert part.center is not None
            assert part.radius is not None
            center, radius = center + w * part.center, radius + abs(w) * part.radius
        radius = radius * (1 + 2.0**-40) + size.flatten(1).norm(dim=1) * 2.0**-45
        return Range(low, high, center, radius, lengths)

    def _lengths(self, ranges: Sequence[Range]) -> Tensor | None:
        """Lengths of tokens, where those of a part are known."""
        if all(part.lengths is None for part in ranges):
            return None
        total = torch.zeros(())
        for weight, part in zip(self.weights, ranges, strict=True):
            own = torch.linalg.vector_norm(part.abs(), dim=-1)
            total = total + abs(weight) * (own if part.lengths is None else part.lengths)
        return total * (1 + 2.0**-40)

    def pullback(
        self, cotangent: tuple[Tensor, Tensor], ranges: Sequence[Range]
    ) -> list[tuple[Tensor, Tensor]]:
        """Give each part the cotangent, times its weight."""
        center, radius = cotangent
        return [(w * center, abs(w) * radius) for w in self.weights]


class Subtract(Add):
    r"""Difference :math:`x_1 - w x_2` of two tensors of one shape.

    Parameters
    ----------
    weight : float
        :math:`w`.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(1.0, -weight)

    def forward(self, *parts: Tensor) -> Tensor:
        """Subtract the second part from the first."""
        return torch.sub(parts[0], parts[1], alpha=-self.weights[1])


class Concatenate(Join):
    r"""Concatenation along a dimension; the p-norms of the parts join by the p-norm.

    Parameters
    ----------
    dim : int
        Dimension of a batch, at least 1.
    """

    stacked = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        """Name the dimension."""
        return f"dim={self.dim}"

    def forward(self, *parts: Tensor) -> Tensor:
        """Concatenate the parts."""
        return torch.cat(parts, self.dim)

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factor 1 for any number of parts."""
        return [torch.ones((), dtype=torch.float64)]

    def errors(self, parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
        """Join the errors by the p-norm; nothing is rounded."""
        return _stacked(parts, outputs, p)

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound what is flushed to zero."""
        return flushed(self.range(ranges), dtype, p)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Concatenate the intervals; the radii join by the Euclidean norm."""
        batch = max(len(r.low) for r in ranges)

        def together(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], self.dim)

        low, high = together([r.low for r in ranges]), together([r.high for r in ranges])
        if not _ball(ranges):
            return Range(low, high)
        radii = torch.stack([r.radius.expand(batch) for r in ranges])  # type: ignore[union-attr]
        center = together([r.center for r in ranges])  # type: ignore[misc]
        return Range(low, high, center, radii.norm(dim=0) * (1 + 2.0**-40))

    def pullback(
        self, cotangent: tuple[Tensor, Tensor], ranges: Sequence[Range]
    ) -> list[tuple[Tensor, Tensor]]:
        """Split the cotangent."""
        sizes = [r.low.shape[self.dim] for r in ranges]
        dim = self.dim + 1  # behind the rows
        return list(
            zip(cotangent[0].split(sizes, dim), cotangent[1].split(sizes, dim), strict=True)
        )


class Maximum(Join):
    r"""Entrywise maximum or minimum, :math:`|\Delta_i| \le \max_j |\Delta_{ji}|`.

    Parameters
    ----------
    largest : bool
        Whether the maximum is taken.
    """

    stacked = True

    def __init__(self, largest: bool = True) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, *parts: Tensor) -> Tensor:
        """Take the maximum of two parts."""
        return (torch.maximum if self.largest else torch.minimum)(*parts)

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factor 1 for both parts."""
        return [torch.ones((), dtype=torch.float64)]

    def errors(self, parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
        """Join the errors by the p-norm; nothing is rounded."""
        return _stacked(parts, outputs, p)

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound what is flushed to zero."""
        return flushed(self.range(ranges), dtype, p)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Take the maximum of the ends."""
        first, second = ranges
        return Range(self(first.low, second.low), self(first.high, second.high))


@units_rule.register
def _(module: Maximum, input_shape: Shape) -> Units:
    pairs = torch.arange(math.prod(input_shape)).view(input_shape[0], -1).mT
    outputs = torch.arange(len(pairs))[:, None]
    return sorted_units(list(pairs), list(outputs), (pairs.numel(), len(pairs)), module.largest)


class Multiply(Join):
    r"""Product of two tensors of one shape, entry by entry.

    .. math:: \lVert\Delta(a \odot b)\rVert_p
        \le \max_i|b_i|\,\lVert\Delta a\rVert_p + \max_i|a_i|\,\lVert\Delta b\rVert_p
    """

    def forward(self, *parts: Tensor) -> Tensor:
        """Multiply two parts."""
        return parts[0] * parts[1]

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Largest modulus of the other part."""
        if ranges is None:
            raise ValueError(f"a product of two tensors {NEEDS_DOMAIN}")
        first, second = (r.abs().flatten(1).amax(1) for r in ranges)
        return [second, first]

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound one rounding of each product."""
        first, second = (r.abs() for r in ranges)
        return rounded(first * second, 1, dtype, p, first + second)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Hull of the products of the ends."""
        first, second = ranges
        if first is second:
            return Range(*outward(first.low.clamp(min=0) ** 2, first.abs() ** 2))
        ends = torch.stack(
            torch.broadcast_tensors(
                first.low * second.low,
                first.low * second.high,
                first.high * second.low,
                first.high * second.high,
            )
        )
        return Range(*outward(ends.amin(0), ends.amax(0)))

    def pullback(
        self, cotangent: tuple[Tensor, Tensor], ranges: Sequence[Range]
    ) -> list[tuple[Tensor, Tensor]]:
        """Multiply the cotangent by the interval of the other part."""
        first, second = ranges
        return [
            interval_product(cotangent, other.middle[:, None], other.half[:, None])
            for other in (second, first)
        ]


class MatMul(Join):
    r"""Matrix product of two tensors, (..., m, k) and (..., k, n).

    .. math:: \lVert\Delta(AB)\rVert_F
        \le \lVert B\rVert\,\lVert\Delta A\rVert_F + \lVert A\rVert\,\lVert\Delta B\rVert_F

    with the largest norm of a block; for p = 1 and p = ∞ the norms of :math:`x \mapsto x B` and
    :math:`x \mapsto A x` on entries.
    """

    def forward(self, *parts: Tensor) -> Tensor:
        """Multiply two parts."""
        return parts[0] @ parts[1]

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Norm of the other part."""
        if ranges is None:
            raise ValueError(f"a product of two tensors {NEEDS_DOMAIN}")
        a, b = (r.abs() for r in ranges)
        slack = 1 + 2.0**-40
        if p == 2:
            norms = [torch.linalg.matrix_norm(part) for part in (b, a)]
        else:
            # x -> x B has the transpose of B as its blocks, x -> A x has A.
            dims = {1.0: (-1, -2), float("inf"): (-2, -1)}[p]
            norms = [b.sum(dims[0]).amax(-1), a.sum(dims[1]).amax(-1)]
        return [(norm.flatten(1).amax(1) if norm.dim() > 1 else norm) * slack for norm in norms]

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        r"""Bound sums of k products, :math:`\gamma_k |A| |B|`."""
        a, b = (r.abs() for r in ranges)
        terms = a.shape[-1]
        return rounded(a @ b, terms, dtype, p, a.sum(-1, keepdim=True) + b.sum(-2, keepdim=True))

    def range(self, ranges: Sequence[Range]) -> Range:
        """Interval matrix product, by middle and radius."""
        a, b = ranges
        middle = a.middle @ b.middle
        spread = a.half @ (b.middle.abs() + b.half) + a.middle.abs() @ b.half
        size = a.abs() @ b.abs()
        return Range(*outward(middle - spread, middle + spread, size * a.low.shape[-1] * 2.0**-45))


def interval_product(
    interval: tuple[Tensor, Tensor], middle: Tensor, half: Tensor
) -> tuple[Tensor, Tensor]:
    """Product of intervals, each a center and a radius."""
    center, radius = interval
    spread = radius * (middle.abs() + half) + center.abs() * half
    image = center * middle
    return image, spread * (1 + 2.0**-45) + image.abs() * 2.0**-45


_cuda_rule_of(Add, Subtract, Concatenate, Maximum)(plain_kernels)
