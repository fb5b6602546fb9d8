r"""Units: what an activation does, as a map of single numbers or small groups between two matrices.

The methods of :mod:`lipbook.tightness` look at several layers at once, and need more of an
activation than its Lipschitz constant: which of its numbers act alone, between which slopes, and
in which linear pieces. Each layer answers beside its definition (:func:`units_rule`); this room
holds the question, and the answer of everything that sorts.

# Note [sorting]
MaxMin sorts a pair (a, b). In the orthonormal coordinates u = (a + b)/sqrt 2 and
v = (b - a)/sqrt 2 it keeps u and returns |v|: a linear unit and an absolute value. The rotation
goes into the weights before and behind, and what is left is diagonal. A Householder activation
is the same with other coordinates. GroupSort of k > 2 keeps the mean of a group, and the
remaining k - 1 coordinates are mapped by a nonexpansive map as a whole, ||dpsi|| <= ||dz||: one
multiplier for the group, in place of one for each unit. These are the quadratic constraints of
Pauli et al. (2024): they say no more than that sums are kept and distances do not grow. A maximum
is the last entry of a sorted group, and max pooling takes it of windows that may share entries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.rules import Shape, slope_rule

__all__ = ["Kinks", "Piece", "Units", "elementwise_units", "piece_at", "sorted_units", "units_rule"]

EPS = torch.finfo(torch.float64).eps


@dataclasses.dataclass(frozen=True)
class Kinks:
    r"""Piecewise linear functions of one variable, one for each unit.

    Attributes
    ----------
    points : torch.Tensor
        Where the slope may change, ascending, (m, n).
    slopes : torch.Tensor
        Before, between and behind the points, (m + 1, n).
    start : torch.Tensor
        Values at the first points, (n,).

    Examples
    --------
    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> hat = Kinks(torch.stack((zero, zero + 1)), torch.stack((zero, zero + 1, zero)), zero)
    >>> hat(torch.tensor([[-1.0], [0.5], [3.0]])).flatten().tolist()  # x clipped to [0, 1]
    [0.0, 0.5, 1.0]
    """

    points: Tensor
    slopes: Tensor
    start: Tensor

    @property
    def offsets(self) -> Tensor:
        """Constants of the linear pieces, (m + 1, n)."""
        found = [self.start - self.slopes[0] * self.points[0]]
        for before, behind, point in zip(
            self.slopes[:-1], self.slopes[1:], self.points, strict=True
        ):
            found.append(found[-1] + (before - behind) * point)
        return torch.stack(found)

    def __call__(self, x: Tensor) -> Tensor:
        """Values of all units, for x of shape (..., n)."""
        place = (x[..., None, :] > self.points).sum(-2)
        pick = [part.mT.expand(*x.shape, -1) for part in (self.slopes, self.offsets)]
        slope, offset = (part.gather(-1, place[..., None])[..., 0] for part in pick)
        return slope * x + offset

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest slope of each unit on an interval."""
        edge = torch.full_like(low, math.inf)[None]
        first, last = torch.cat((-edge, self.points)), torch.cat((self.points, edge))
        met = (first <= high) & (last >= low)
        least = torch.where(met, self.slopes, math.inf).amin(0)
        return least, torch.where(met, self.slopes, -math.inf).amax(0)

    def image(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Interval that holds the values of each unit on an interval, up to rounding."""
        inside = torch.minimum(torch.maximum(self.points, low), high)
        values = self(torch.cat((low[None], inside, high[None])))
        return values.amin(0), values.amax(0)


@dataclasses.dataclass(frozen=True)
class Piece:
    r"""A set of points of a group and what its map is there: :math:`u \mapsto M u + c`.

    Attributes
    ----------
    normals, levels : torch.Tensor
        The set, :math:`\{u : G u \ge h\}`, (r, k) and (r,).
    matrix, offset : torch.Tensor or None
        :math:`M` and :math:`c`, (k, k) and (k,); None if the set holds several pieces.
    finer : collections.abc.Callable or None
        Gives these.
    """

    normals: Tensor
    levels: Tensor
    matrix: Tensor | None = None
    offset: Tensor | None = None
    finer: Callable[[], Sequence[Piece]] | None = None


Cell = tuple[Tensor, Sequence[Piece]]


@dataclasses.dataclass(frozen=True)
class Units:
    r"""An activation as :math:`x \mapsto B\, \varphi(A x)` with units :math:`\varphi`.

    The units come in groups. For any two points the change of a group is that of its inputs,
    :math:`\Delta_g`, by

    .. math:: \Delta\varphi_g = C \Delta_g + R\, \psi, \qquad
        \lVert\psi\rVert_2 \le \lVert\Delta_g\rVert_2, \qquad
        C = \tfrac{\alpha + \beta}{2}, \quad R = \tfrac{\beta - \alpha}{2} .

    For a group of one unit that says that its slopes are in :math:`[\alpha, \beta]`. Samples are
    flattened, and all tensors are float64.

    Attributes
    ----------
    low, high : torch.Tensor
        :math:`\alpha` and :math:`\beta`, one number for each unit, the same in a group, (n,).
    group : torch.Tensor or None
        Number of the group of each unit; each is a group of its own if not given.
    before, behind : torch.Tensor or None
        :math:`A`, (n, inputs), and :math:`B`, (outputs, n); the identity if not given.
    kinks : Kinks or None
        The functions, if each unit is alone and piecewise linear.
    cells : collections.abc.Sequence or None
        Pieces of the groups, if the map is piecewise linear and there are groups of several units:
        pairs of the numbers of units, (k,), and of their pieces. Units in no cell are linear.
    sorts : collections.abc.Sequence or None
        If the Jacobians place entries of the input: pairs of inputs and of the outputs, of which
        each gets one of these inputs.
    """

    low: Tensor
    high: Tensor
    group: Tensor | None = None
    before: Tensor | None = None
    behind: Tensor | None = None
    kinks: Kinks | None = None
    cells: Sequence[Cell] | None = None
    sorts: Sequence[tuple[Tensor, Tensor]] | None = None

    @property
    def center(self) -> Tensor:
        """Middles of the slopes."""
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Tensor:
        """Half the widths of the slopes."""
        return (self.high - self.low) / 2

    @property
    def steepest(self) -> Tensor:
        """Largest moduli of the slopes."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def groups(self) -> Tensor:
        """Number of the group of each unit."""
        return torch.arange(len(self.low)) if self.group is None else self.group

    @property
    def elementwise(self) -> bool:
        """Whether the units are the entries of the input."""
        return self.before is None and self.behind is None

    @property
    def diagonal(self) -> bool:
        """Whether each unit is alone."""
        return len(self.groups.unique()) == len(self.low)

    @property
    def piecewise_linear(self) -> bool:
        """Whether the pieces are known."""
        return self.kinks is not None or self.cells is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Give the outputs for flat samples, (batch, inputs), from the pieces."""
        if not self.piecewise_linear:
            raise ValueError("units must be piecewise linear for their values")
        z = x if self.before is None else x @ self.before.mT
        y = self.low * z if self.kinks is None else self.kinks(z)
        for own, pieces in self.cells or ():
            at = [piece_at(pieces, values) for values in z[:, own]]
            rows = [
                piece.matrix @ values + piece.offset
                for piece, values in zip(at, z[:, own], strict=True)
            ]
            y[:, own] = torch.stack(rows)
        return y if self.behind is None else y @ self.behind.mT

    def pieces(self) -> list[Cell]:
        """Pieces of all units that are not linear."""
        if self.kinks is None:
            return list(self.cells or ())
        return [
            (torch.tensor([unit]), _intervals(self.kinks, unit))
            for unit in range(len(self.low))
            if bool((self.kinks.slopes[:, unit] != self.kinks.slopes[0, unit]).any())
        ]


def piece_at(pieces: Sequence[Piece], values: Tensor) -> Piece:
    """Piece that holds at a point."""

    def depth(piece: Piece) -> float:
        return min((piece.normals @ values - piece.levels).tolist(), default=math.inf)

    piece = max(pieces, key=depth)
    return piece if piece.finer is None else piece_at(piece.finer(), values)


def _intervals(kinks: Kinks, unit: int) -> list[Piece]:
    points, found = kinks.points[:, unit], []
    one, offsets = torch.ones(1, 1, dtype=torch.float64), kinks.offsets[:, unit]
    for k, slope in enumerate(kinks.slopes[:, unit]):
        normals, levels = [], []
        if k > 0:
            normals, levels = [one], [points[k - 1]]
        if k < len(points):
            normals, levels = [*normals, -one], [*levels, -points[k]]
        found.append(
            Piece(torch.cat(normals), torch.stack(levels), slope * one, offsets[k : k + 1])
        )
    return found


@functools.singledispatch
def units_rule(module: nn.Module, input_shape: Shape) -> Units | None:
    r"""Rule of a class of activations: its units.

    A :func:`functools.singledispatch` on the class of ``module``. An elementwise layer that knows
    its slopes (:func:`~lipbook.composition.slope_rule`) needs none. With one, it can tell its
    linear pieces, which :func:`~lipbook.tightness.exact_constant` asks for.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64. A join of several inputs gets their number as the first size.
    input_shape : tuple of int
        Shape of one sample.

    Returns
    -------
    Units or None
        None for a layer that is no activation.

    Examples
    --------
    >>> from lipbook.composition import Bound, lipschitz_rule
    >>> from lipbook.tightness import exact_constant
    >>> class Hinge(nn.Module):
    ...     def forward(self, x):
    ...         return 3 * (x - 1).relu()
    >>> @lipschitz_rule.register
    ... def _(module: Hinge, input_shape, p):
    ...     return Bound(3, "exact", p)
    >>> @units_rule.register
    ... def _(module: Hinge, input_shape):
    ...     return elementwise_units(module, input_shape, points=[1.0], slopes=[0.0, 3.0])
    >>> exact_constant(nn.Sequential(nn.Linear(2, 2), Hinge(), nn.Linear(2, 1)), (2,)).kind
    'exact'
    """
    slopes = slope_rule(module, None)
    if slopes is None:
        return None
    low, high = (_entries(side, input_shape) for side in slopes)
    # A slope that solves a transcendental equation is known to double precision, not beyond.
    return Units(low - 4 * EPS * low.abs(), high + 4 * EPS * high.abs())


def _entries(values: Any, shape: Shape) -> Tensor:
    """Numbers for each entry of a flat sample; those of channels are spread over positions."""
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.dim() == 1 and len(values) == shape[0]:
        values = values.view(-1, *[1] * (len(shape) - 1))
    return values.expand(shape).flatten()


def elementwise_units(
    module: nn.Module, input_shape: Shape, points: Sequence[Any], slopes: Sequence[Any]
) -> Units:
    """Units of an elementwise layer that is continuous and piecewise linear.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    input_shape : tuple of int
        Shape of one sample.
    points : sequence of float or torch.Tensor
        Where the slope may change, ascending: numbers, one for each channel, or of a shape that
        broadcasts to a sample.
    slopes : sequence of float or torch.Tensor
        Before, between and behind the points, one more than these.

    Returns
    -------
    Units

    Raises
    ------
    ValueError
        If there is no point, or another number of slopes.
    """
    if not points or len(slopes) != len(points) + 1:
        raise ValueError(
            f"slopes must be one more than points, which are one or more, got {len(slopes)} and "
            f"{len(points)}"
        )
    at, steep = (torch.stack([_entries(v, input_shape) for v in part]) for part in (points, slopes))
    with torch.no_grad():
        start = module(at[0].view(1, *input_shape).clone()).flatten().cpu()
    return Units(steep.amin(0), steep.amax(0), kinks=Kinks(at, steep, start))


def sorted_units(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    sizes: tuple[int, int],
    largest: bool = True,
) -> Units:
    r"""Units of a map that sorts groups, or keeps their largest or least entry: Note [sorting].

    Parameters
    ----------
    inputs : sequence of torch.Tensor
        Entries of each group, (k,); groups may share entries.
    outputs : sequence of torch.Tensor
        Where they go, in ascending order, (k,); or where one of them goes, (1,).
    sizes : tuple of int
        Numbers of all inputs and outputs.
    largest : bool
        Which one is kept.

    Returns
    -------
    Units
    """
    n = sum(len(part) for part in inputs)
    before = torch.zeros(n, sizes[0], dtype=torch.float64)
    behind = torch.zeros(sizes[1], n, dtype=torch.float64)
    low, high = torch.ones(2, n, dtype=torch.float64)
    group = torch.arange(n)
    cells: list[Cell] = []
    start = 0
    for read, written in zip(inputs, outputs, strict=True):
        own = torch.arange(start, start + len(read))
        start += len(read)
        block = _helmert(len(read))
        before[own[:, None], read] = block
        whole = len(written) == len(read)
        behind[written[:, None], own] = block.mT if whole else block.mT[[-1 if largest else 0]]
        if len(read) > 1:
            low[own[1:]] = -1.0
            group[own[1:]] = own[1]
            rest = block[1:]
            pieces = _orders(rest, (), range(len(read))) if whole else _winners(rest, largest)
            cells.append((own[1:], pieces))
    pairs = max(map(len, inputs)) <= 2
    zero = torch.zeros(n, dtype=torch.float64)
    return Units(
        low,
        high,
        group=None if pairs else group,
        before=before,
        behind=behind,
        kinks=Kinks(zero[None], torch.stack((low, high)), zero) if pairs else None,
        cells=None if pairs else cells,
        sorts=list(zip(inputs, outputs, strict=True)),
    )


def _helmert(size: int) -> Tensor:
    """Orthogonal matrix whose first row is the mean, the last for two minus first plus second."""
    rows = torch.zeros(size, size, dtype=torch.float64)
    rows[0] = size**-0.5
    for k in range(1, size):
        rows[k, :k], rows[k, k] = -1.0, k
        rows[k] /= math.sqrt(k * (k + 1))
    return rows


# Note [pieces of a sort]
# With H the rows of the Helmert matrix but the first, v = H u are the coordinates of a group of
# entries u. Entry j is at least entry i where (H_j - H_i)'v >= 0 with H_j a column of H. A sort
# by the order pi is v -> H P H'v, and P H' has the rows H_pi(j). A maximum that entry w attains is
# m + (H_last)'v' for the mean m and v' = H_last H_w'v / |H_last|^2, as H_i'H_j = [i = j] - 1/k.


def _orders(block: Tensor, least: tuple[int, ...], rest: Sequence[int]) -> list[Piece]:
    """Pieces of a sort, by the entry that comes next."""
    found = []
    for i in rest:
        others = [j for j in rest if j != i]
        normals = (block[:, others] - block[:, [i]]).mT
        levels = torch.zeros(len(others), dtype=torch.float64)
        if len(others) > 1:
            finer = functools.partial(_orders, block, (*least, i), others)
            found.append(Piece(normals, levels, finer=finer))
        else:
            matrix = block @ block[:, [*least, i, *others]].mT
            found.append(Piece(normals, levels, matrix, block.new_zeros(len(block))))
    return found


def _winners(block: Tensor, largest: bool) -> list[Piece]:
    """Pieces of a maximum or minimum."""
    k, last = block.shape[1], -1 if largest else 0
    found = []
    for w in range(k):
        others = [j for j in range(k) if j != w]
        normals = (block[:, [w]] - block[:, others]).mT * (1 if largest else -1)
        matrix = torch.outer(block[:, last], block[:, w]) / (1 - 1 / k)
        zero = block.new_zeros(k)
        found.append(Piece(normals, zero[:-1], matrix, zero[:-1]))
    return found
