"""The exact constant of a small piecewise linear network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lipbook import composition
from lipbook.composition import Bound, bound_method
from lipbook.norms import operator_norm
from lipbook.tightness.eclipse import _certify, _chain
from lipbook.tightness.reading import Shape, _dense_layers, _Net

__all__ = ["exact_constant"]


@bound_method("exact")
def exact_constant(
    module: nn.Module, input_shape: Sequence[int], p: float = 2, *, max_regions: int = 10_000
) -> Bound:
    r"""Exact Lipschitz constant of a small piecewise linear network, by branch and bound.

    .. math::
        \operatorname{Lip}(f) = \max_{\text{regions } \Omega \text{ with interior}}
        \lVert J_\Omega\rVert_p

    where :math:`J_\Omega` is the Jacobian on a region of one activation pattern: the regions with
    interior cover the space but for a set of measure zero, and a segment crosses
    finitely many of them. Patterns are built unit by unit. A linear program decides whether a
    region has interior (the largest ball in it), and a subtree is left out if an upper
    bound of all its Jacobians does not exceed the best norm found.

    **Guaranteed** when it returns: the constant, up to rounding, of the network with regions
    narrower than 1e-8 left out (in units of the largest distance of a first-layer kink from the
    origin). The linear programs are solved to 1e-10. A region so thin is missed, and
    there is one only if kinks almost coincide.

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and ReLU, leaky ReLU, PReLU, absolute value, MaxMin,
        GroupSort(2) or Householder activations.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`.
    max_regions : int
        Most linear programs; the number of regions is exponential in the number of units for
        many inputs, and a power of it for few.

    Returns
    -------
    Bound
        Of kind ``"exact"``; ``witness`` is a pair of points of one region, float64.

    Raises
    ------
    ValueError
        If an activation has other than two linear pieces, or the search is longer than
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
    net = _dense_layers(module, input_shape)
    for layer in net.units:
        if layer.pieces is None:
            raise ValueError(
                "method 'exact' needs activations of two linear pieces, got "
                f"{layer.module}: use 'lipsdp' or 'eclipse'"
            )
    search = _Search(net, p, max_regions)
    search.run()
    shape, witness = net.output_shape, search.witness(tuple(input_shape))
    return Bound(search.best, "exact", p, output_shape=shape, witness=witness)


class _Region(NamedTuple):
    """Where the units decided so far have their signs: rows @ x + offsets >= 0."""

    rows: np.ndarray  # (k, n), of norm 1
    offsets: np.ndarray  # (k,)
    point: np.ndarray  # (n,) center of a ball in the region
    width: float  # its radius


class _Search:
    """Depth-first search over activation patterns."""

    thin = 1e-8

    def __init__(self, net: _Net, p: float, max_regions: int) -> None:
        self.p, self.max_regions, self.visited, self.net = p, max_regions, 0, net
        self.weights = [weight.numpy() for weight in net.weights]
        lengths = np.linalg.norm(self.weights[0], axis=1)
        offsets = np.abs(net.biases[0].numpy())[lengths > 0] / lengths[lengths > 0]
        self.unit = float(offsets.max(initial=0.0)) or 1.0  # of length, for the inputs
        self.biases = [bias.numpy() / self.unit for bias in net.biases]
        self.pieces = [(u.pieces[0].numpy(), u.pieces[1].numpy()) for u in net.units if u.pieces]
        # From layer k on: a form that bounds the 2-norm, and an absolute product for all norms.
        chain = _chain(net.weights, net.units)
        forms = _certify(chain, None)[1] if chain.scale > 0 else []
        norms = [operator_norm(weight).item() for weight in net.weights]
        self.forms = [f.numpy() * math.prod(norms[i + 1 :]) ** 2 for i, f in enumerate(forms)]
        self.tails: list[np.ndarray] = []
        tail = np.eye(len(self.weights[-1]))
        for weight, layer in zip(self.weights[:0:-1], net.units[::-1], strict=True):
            tail = tail @ np.abs(weight)  # from the outputs of an activation on
            self.tails.insert(0, tail)
            tail = tail * layer.steepest.numpy()
        self.stretch = [math.inf] * len(net.units)
        for k in range(len(net.units)):
            if forms:
                gram = self.weights[k + 1].T @ self.forms[k + 1] @ self.weights[k + 1]
                self.stretch[k] = math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))
        self.best, self.where, self.jacobian = -1.0, np.zeros(0), np.zeros((0, 0))
        self.width = 0.0

    def run(self) -> None:
        n = self.weights[0].shape[1]
        space = _Region(np.zeros((0, n)), np.zeros(0), np.zeros(n), 1.0)
        self.enter(0, self.weights[0], self.biases[0], space)

    def enter(self, k: int, matrix: np.ndarray, bias: np.ndarray, region: _Region) -> None:
        """Start layer k, whose inputs to the activations are matrix @ x + bias in the region."""
        if k == len(self.pieces):
            value = float(np.linalg.norm(matrix, self.p))
            if value > self.best:
                self.best, self.jacobian = value, matrix
                self.where, self.width = region.point, region.width
            return
        if self.p == 2 and self.forms:
            above = np.linalg.eigvalsh(matrix.T @ self.forms[k] @ matrix)[-1]
            if math.sqrt(max(above, 0.0)) <= self.best:
                return
        slopes = np.maximum(*np.abs(self.pieces[k]))
        order = np.argsort(-np.linalg.norm(matrix, axis=1) * (slopes > 0))
        linear = self.pieces[k][0] == self.pieces[k][1]
        slopes = np.where(linear, self.pieces[k][0], slopes)
        self.decide(k, matrix, bias, region, slopes, [i for i in order if not linear[i]])

    def decide(
        self,
        k: int,
        matrix: np.ndarray,
        bias: np.ndarray,
        region: _Region,
        slopes: np.ndarray,  # of the decided units; the steepest ones of the others
        left: list[int],
    ) -> None:
        """Decide the sign of the next unit, both ways."""
        if self.above(k, slopes[:, None] * matrix) <= self.best:
            return
        if not left:
            follow, step = self.weights[k + 1], slopes[:, None] * matrix
            return self.enter(
                k + 1, follow @ step, follow @ (slopes * bias) + self.biases[k + 1], region
            )
        i, left = left[0], left[1:]
        length = float(np.linalg.norm(matrix[i]))
        if length <= 1e-13 * max(float(np.linalg.norm(matrix)), 1e-300):  # a constant
            choices = [(bias[i] >= 0, region)]
        else:
            row, offset = matrix[i] / length, bias[i] / length
            value = float(row @ region.point + offset)
            choices = []
            for on in (value >= 0, value < 0):
                sign = 1.0 if on else -1.0
                inside = self.cut(region, sign * row, sign * offset, sign * value)
                if inside is not None:
                    choices.append((on, inside))
        pieces = self.pieces[k]
        choices.sort(key=lambda choice: -abs(pieces[int(choice[0])][i]))
        for on, inside in choices:
            changed = slopes.copy()
            changed[i] = pieces[int(on)][i]
            self.decide(k, matrix, bias, inside, changed, left)
        return None

    def above(self, k: int, matrix: np.ndarray) -> float:
        """Bound of the norm of all that may follow the outputs of layer k."""
        value = float(np.linalg.norm(self.tails[k] @ np.abs(matrix), self.p))
        if self.p == 2 and self.forms:
            value = min(value, self.stretch[k] * float(np.linalg.norm(matrix, 2)))
        return value

    def cut(self, region: _Region, row: np.ndarray, offset: float, value: float) -> _Region | None:
        """Keep the part where row @ x + offset >= 0, or nothing if it has no interior."""
        rows, offsets = np.vstack([region.rows, row]), np.append(region.offsets, offset)
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
