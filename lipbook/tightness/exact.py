"""The exact constant of a small piecewise linear network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lipbook import composition
from lipbook.composition import Bound, bound_method
from lipbook.norms import operator_norm
from lipbook.rules import Shape
from lipbook.tightness.eclipse import _certify, _chain
from lipbook.tightness.reading import _dense_layers, _Net
from lipbook.units import Piece, Units, piece_at

__all__ = ["exact_constant"]


@bound_method("exact")
def exact_constant(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    max_regions: int = 10_000,
    output: str | int | None = None,
) -> Bound:
    r"""Exact Lipschitz constant of a small piecewise linear network, by branch and bound.

    .. math::
        \operatorname{Lip}(f) = \max_{\text{regions } \Omega \text{ with interior}}
        \lVert J_\Omega\rVert_p

    where :math:`J_\Omega` is the Jacobian on a region of one activation pattern: the regions with
    interior cover the space but for a set of measure zero, and a segment crosses
    finitely many of them. A pattern gives each unit one of its linear pieces, a half-line or an
    interval, and each group that is sorted one of its orders, which is a cone; it is built unit by
    unit and comparison by comparison. A linear program decides whether a region has interior (the
    largest ball in it), and a subtree is left out if an upper bound of all its Jacobians does not
    exceed the best norm found.

    **Guaranteed** when it returns: the constant, up to rounding, of the network with regions
    narrower than 1e-8 left out (in units of the largest distance of a first-layer kink from the
    origin). The linear programs are solved to 1e-10. A region so thin is missed, and
    there is one only if kinks almost coincide.

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`),
        and are piecewise linear: ReLU, leaky ReLU, PReLU, ReLU6, clipping, absolute value, soft
        shrinkage, MaxMin, GroupSort, FullSort and Householder activations, maxima and max pooling,
        or another that tells its pieces (:func:`~lipbook.units.units_rule`).
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`.
    max_regions : int
        Most linear programs. The number of regions is exponential in the number of units for many
        inputs, and a power of it for few; a sort of k entries alone has up to k! of them.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"exact"``; ``witness`` is a pair of points of one region, float64.

    Raises
    ------
    ValueError
        If the pieces of an activation are not known, or the search is longer than
        ``max_regions``.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.tensor([[1.0, 2.0]])  # x for x > 0, -2x for x < 0
    >>> exact_constant(net, (1,)).value
    2.0

    References
    ----------
    :cite:t:`jordan2020` reach the same number by mixed-integer programming.
    """
    p = composition._exponent(p)
    net = _dense_layers(module, input_shape, output)
    for units, node in zip(net.units, net.layers, strict=True):
        if not units.piecewise_linear:
            raise ValueError(
                "method 'exact' needs activations whose linear pieces are known, got "
                f"{node.layer}: use 'lipsdp' or 'eclipse', or register its pieces with units_rule"
            )
    search = _Search(net, p, max_regions)
    search.run()
    shape, witness = net.output_shape, search.witness(tuple(input_shape))
    return Bound(search.best, "exact", p, output_shape=shape, witness=witness)


class _Region(NamedTuple):
    """Where the pieces decided so far hold: rows @ x + offsets >= 0."""

    rows: np.ndarray  # (k, n), of norm 1
    offsets: np.ndarray  # (k,)
    point: np.ndarray  # (n,) center of a ball in the region
    width: float  # its radius


class _State(NamedTuple):
    """A layer of units of which some have their pieces: outputs as functions of the input."""

    matrix: np.ndarray  # (n, inputs); the inputs of undecided units times their steepest slopes
    offset: np.ndarray  # (n,)
    moduli: np.ndarray  # (n, inputs), bounds of the entries of what `matrix` can become


class _Layer:
    """Units as arrays, with lengths in multiples of a unit."""

    def __init__(self, units: Units, length: float) -> None:
        self.length = length
        self.cells = [(own.numpy(), pieces) for own, pieces in units.pieces()]
        self.steepest = units.steepest.numpy()
        self.linear = units.low.numpy()
        kinks = units.kinks
        offsets = torch.zeros_like(units.low) if kinks is None else kinks.offsets[0]
        self.offsets = offsets.numpy() / length
        self.together = (units.groups[:, None] == units.groups).double().numpy()

    def start(self, matrix: np.ndarray, bias: np.ndarray) -> _State:
        """Units without a piece, but for the linear ones."""
        slopes, offset = self.linear.copy(), self.linear * bias + self.offsets
        for own, _ in self.cells:
            slopes[own], offset[own] = self.steepest[own], 0.0
        matrix = slopes[:, None] * matrix
        return _State(matrix, offset, np.sqrt(self.together @ matrix**2))

    def levels(self, piece: Piece) -> np.ndarray:
        return piece.levels.numpy() / self.length

    def decided(
        self, state: _State, own: np.ndarray, piece: Piece, rows: np.ndarray, bias: np.ndarray
    ) -> _State:
        """Give the units of one cell a piece."""
        assert piece.matrix is not None
        assert piece.offset is not None
        matrix, offset, moduli = (part.copy() for part in state)
        matrix[own] = piece.matrix.numpy() @ rows
        offset[own] = piece.matrix.numpy() @ bias + piece.offset.numpy() / self.length
        moduli[own] = np.abs(matrix[own])
        return _State(matrix, offset, moduli)


class _Search:
    """Depth-first search over the pieces of all units, layer by layer."""

    thin = 1e-8

    def __init__(self, net: _Net, p: float, max_regions: int) -> None:
        self.p, self.max_regions, self.visited, self.net = p, max_regions, 0, net
        self.weights = [weight.numpy() for weight in net.weights]
        self.unit = self.farthest_kink()  # of length, for the inputs
        self.biases = [bias.numpy() / self.unit for bias in net.biases]
        self.layers = [_Layer(units, self.unit) for units in net.units]
        # From layer k on: a form that bounds the 2-norm, and an absolute product for all norms.
        chain = _chain(net.weights, net.units)
        forms = _certify(chain, None)[1] if chain.scale > 0 else []
        norms = [operator_norm(weight).item() for weight in net.weights]
        self.forms = [f.numpy() * math.prod(norms[i + 1 :]) ** 2 for i, f in enumerate(forms)]
        self.tails: list[np.ndarray] = []
        tail = np.eye(len(self.weights[-1]))
        for weight, layer in zip(self.weights[:0:-1], self.layers[::-1], strict=True):
            tail = tail @ np.abs(weight)  # from the outputs of an activation on
            self.tails.insert(0, tail)
            tail = tail * layer.steepest @ layer.together
        self.stretch = [math.inf] * len(net.units)
        for k in range(len(net.units)):
            if forms:
                gram = self.weights[k + 1].T @ self.forms[k + 1] @ self.weights[k + 1]
                self.stretch[k] = math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))
        self.best, self.where, self.jacobian = -1.0, np.zeros(0), np.zeros((0, 0))
        self.width = 0.0

    def farthest_kink(self) -> float:
        """Largest distance of a kink of the first layer from the origin, or 1."""
        distances = [0.0]
        for own, pieces in self.net.units[0].pieces() if self.net.units else ():
            rows, bias = self.net.weights[0][own], self.net.biases[0][own]
            for piece in pieces:
                lengths = (piece.normals @ rows).norm(dim=1)
                values = (piece.normals @ bias - piece.levels).abs()
                distances += (values[lengths > 0] / lengths[lengths > 0]).tolist()
        return max(distances) or 1.0

    def run(self) -> None:
        n = self.weights[0].shape[1]
        space = _Region(np.zeros((0, n)), np.zeros(0), np.zeros(n), 1.0)
        self.enter(0, self.weights[0], self.biases[0], space)

    def enter(self, k: int, matrix: np.ndarray, bias: np.ndarray, region: _Region) -> None:
        """Start layer k, whose units see matrix @ x + bias in the region."""
        if k == len(self.layers):
            value = float(np.linalg.norm(matrix, self.p))
            if value > self.best:
                self.best, self.jacobian = value, matrix
                self.where, self.width = region.point, region.width
            return
        if self.p == 2 and self.forms:
            above = np.linalg.eigvalsh(matrix.T @ self.forms[k] @ matrix)[-1]
            if math.sqrt(max(above, 0.0)) <= self.best:
                return
        state = self.layers[k].start(matrix, bias)
        cells = self.layers[k].cells
        order = sorted(cells, key=lambda cell: -float(np.linalg.norm(state.matrix[cell[0]])))
        self.decide(k, matrix, bias, region, state, order)

    def decide(
        self,
        k: int,
        matrix: np.ndarray,
        bias: np.ndarray,
        region: _Region,
        state: _State,
        left: Sequence[tuple[np.ndarray, Sequence[Piece]]],
    ) -> None:
        """Give the next cell each of its pieces that the region meets."""
        if self.above(k, state) <= self.best:
            return
        if not left:
            follow = self.weights[k + 1]
            behind = follow @ state.offset + self.biases[k + 1]
            return self.enter(k + 1, follow @ state.matrix, behind, region)
        layer, (own, pieces) = self.layers[k], left[0]
        rows, shift = matrix[own], bias[own]
        size = float(np.linalg.norm(rows))
        if size <= 1e-13 * max(float(np.linalg.norm(matrix)), 1e-300):  # a constant
            piece = piece_at(pieces, torch.from_numpy(shift * self.unit))
            choices = iter([(piece, region)])
        else:
            choices = self.choices(layer, pieces, rows, shift, region)
        for piece, inside in choices:
            changed = layer.decided(state, own, piece, rows, shift)
            self.decide(k, matrix, bias, inside, changed, left[1:])
        return None

    def choices(
        self,
        layer: _Layer,
        pieces: Sequence[Piece],
        rows: np.ndarray,
        bias: np.ndarray,
        region: _Region,
    ) -> Iterator[tuple[Piece, _Region]]:
        """Pieces that hold on a part of the region with interior, the steepest first."""

        def steepness(piece: Piece) -> float:
            return (
                0.0 if piece.matrix is None else -float(np.abs(piece.matrix.numpy() @ rows).sum())
            )

        for piece in sorted(pieces, key=steepness):
            normals = piece.normals.numpy()
            inside = self.cut(region, normals @ rows, normals @ bias - layer.levels(piece))
            if inside is not None and piece.finer is not None:
                yield from self.choices(layer, piece.finer(), rows, bias, inside)
            elif inside is not None:
                yield piece, inside

    def above(self, k: int, state: _State) -> float:
        """Bound of the norm of all that may follow the outputs of layer k."""
        value = float(np.linalg.norm(self.tails[k] @ state.moduli, self.p))
        if self.p == 2 and self.forms:
            value = min(value, self.stretch[k] * float(np.linalg.norm(state.matrix, 2)))
        return value

    def cut(self, region: _Region, rows: np.ndarray, offsets: np.ndarray) -> _Region | None:
        """Keep the part where rows @ x + offsets >= 0, or nothing if it has no interior."""
        lengths = np.linalg.norm(rows, axis=1)
        flat = lengths <= 1e-13 * max(float(lengths.max(initial=0.0)), 1e-300)
        if bool((offsets[flat] < -1e-12 * np.abs(offsets).max(initial=1.0)).any()):
            return None
        rows, offsets = rows[~flat] / lengths[~flat, None], offsets[~flat] / lengths[~flat]
        value = float((rows @ region.point + offsets).min(initial=math.inf))
        rows, offsets = np.vstack([region.rows, rows]), np.append(region.offsets, offsets)
        if value > max(0.1 * region.width, 1e-4):  # the point that is known will do
            return _Region(rows, offsets, region.point, min(region.width, value))
        self.visited += 1
        if self.visited > self.max_regions:
            raise ValueError(
                f"method 'exact' visited max_regions={self.max_regions} regions of a network with "
                f"{self.net.hidden()} units and {rows.shape[1]} inputs without an end: use "
                "'lipsdp' or 'eclipse' for a bound, or raise max_regions"
            )
        from scipy.optimize import linprog  # noqa: PLC0415 - slow to import

        k, n = rows.shape
        answer = linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.hstack([-rows, np.ones((k, 1))]),
            b_ub=offsets,
            bounds=[(None, None)] * n + [(-1.0, 1.0)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if answer.status == 2:  # no point within 1 of the region
            return None
        if answer.status != 0:
            raise ValueError(f"linear program of a region of {k} units failed: {answer.message}")
        width = float(answer.x[-1])
        return _Region(rows, offsets, answer.x[:-1], width) if width > self.thin else None

    def witness(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Two points of the best region, in the direction that it stretches most."""
        if self.p == 2:
            direction = np.linalg.svd(self.jacobian)[2][0]
        elif self.p == math.inf:
            row = self.jacobian[np.abs(self.jacobian).sum(1).argmax()]
            direction = np.where(row < 0, -1.0, 1.0)
        else:
            direction = np.eye(self.jacobian.shape[1])[np.abs(self.jacobian).sum(0).argmax()]
        move = 0.5 * self.width * direction / np.linalg.norm(direction)
        ends = (self.unit * (self.where + move), self.unit * (self.where - move))
        return tuple(torch.from_numpy(end).reshape(shape) for end in ends)  # type: ignore[return-value]
