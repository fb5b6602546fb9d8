r"""Bounds on a domain: ranges, slopes and the interval of all Jacobians there.

Two bounds hold for a network on a convex set. The product of what its layers may stretch on the
values that they see; and, with :math:`\bar J` and :math:`E` such that
:math:`|J(x) - \bar J| \le E` entry by entry for all x,

.. math:: \operatorname{Lip}_p \le \lVert\, |\bar J| + E\, \rVert_p .

The rows of the second are carried from the outputs to the input, each layer backwards, through
sums, slices and products alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition.reading import compose, times
from lipbook.graphs import Graph
from lipbook.layers.joins import Join
from lipbook.layers.rearrangements import Rearrangement
from lipbook.norms import dual_exponent
from lipbook.rules import (
    Affine,
    Bound,
    Range,
    Shape,
    affine_rule,
    image_rule,
    lipschitz_rule,
    local_lipschitz_rule,
    pullback_rule,
    range_rule,
    slope_rule,
)

__all__ = [
    "answered",
    "images_of",
    "matrix_norms",
    "ranges_of",
    "row_bounds",
    "row_constants",
    "row_norms",
    "stretches",
]


class _Answered(nn.Module):
    """A layer with its answers that depend on no values, for graphs that are read many times."""

    def __init__(self, layer: nn.Module, shape: Shape, p: float) -> None:
        super().__init__()
        self.layer, self.affine = layer, affine_rule(layer, shape)
        exponents = {p, 2.0} if self.affine is not None else {p, 2.0, math.inf}
        self.bounds = {q: lipschitz_rule(layer, shape, q) for q in exponents}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@lipschitz_rule.register
def _(module: _Answered, input_shape: Shape, p: float) -> Bound:
    return module.bounds[p]


@affine_rule.register
def _(module: _Answered, input_shape: Shape) -> Affine | None:
    return module.affine


def answered(graph: Graph, p: float) -> Graph:
    """Graph whose layers with weights have said once what depends on no values.

    The readings of this room are the same, and spare the norms of the weights at each of them.

    Parameters
    ----------
    graph : Graph
        In float64.
    p : float
        Exponent of the norms that will be asked for.

    Returns
    -------
    Graph
    """
    nodes = []
    for node in graph.nodes:
        layer = node.layer
        if (
            layer is not None
            and not isinstance(layer, (Join, Rearrangement))
            and (*layer.parameters(), *layer.buffers())
            and all(rule.dispatch(type(layer)) is rule.dispatch(object) for rule in _OF_VALUES)
        ):
            with node.located():
                layer = _Answered(layer, graph.nodes[node.inputs[0]].shape, p)
        nodes.append(dataclasses.replace(node, layer=layer))
    return Graph(tuple(nodes), graph.output)


_OF_VALUES: tuple[Any, ...] = (slope_rule, range_rule, local_lipschitz_rule, pullback_rule)


def ranges_of(graph: Graph, domain: Range) -> list[Range]:
    """Range of every node of a graph in float64, given that of the input."""
    ranges = [domain]
    for node in graph.nodes[1:]:
        parts = [ranges[j] for j in node.inputs]
        layer = node.layer
        assert layer is not None
        with node.located():
            found = layer.range(parts) if isinstance(layer, Join) else range_rule(layer, parts[0])
            if not bool((found.low <= found.high).all()):
                raise ValueError(f"its range rule returned an empty or NaN interval: {layer}")
        ranges.append(found)
    return ranges


def images_of(graph: Graph) -> list[Range | None]:
    """Range of every node of a graph for inputs anywhere, None where it is not bounded."""
    nothing: list[Range | None] = [None] * len(graph.nodes)
    bounded = [image_rule.dispatch(type(node.layer)) for node in graph.nodes[1:]]
    if all(rule is image_rule.dispatch(object) for rule in bounded):
        return nothing
    images = nothing[:1]
    for node in graph.double().nodes[1:]:
        parts = [image for j in node.inputs if (image := images[j]) is not None]
        layer = node.layer
        assert layer is not None
        with node.located():
            if len(parts) < len(node.inputs):
                images.append(image_rule(layer, graph.nodes[node.inputs[0]].shape))
            elif isinstance(layer, Join):
                images.append(layer.range(parts))
            else:
                images.append(range_rule(layer, parts[0]))
    return images


def stretches(graph: Graph, ranges: Sequence[Range], p: float) -> list[Tensor]:
    """Product bound of the map from the input to each node, on the domain."""
    answers: list[list[Tensor]] = [[]]
    for node in graph.nodes[1:]:
        parts = [ranges[j] for j in node.inputs]
        layer = node.layer
        assert layer is not None
        with node.located():
            if isinstance(layer, Join):
                answers.append(layer.factors(parts, p))
            else:
                answers.append([local_lipschitz_rule(layer, parts[0], p)])
    return compose(graph, answers, p)


def row_bounds(
    graph: Graph,
    ranges: Sequence[Range],
    rows: Tensor,
    p: float,
    narrow: Callable[[int, tuple[Tensor, Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor] | None:
    r"""Interval of the Jacobian of linear functions of the output, over the domain.

    Parameters
    ----------
    graph : Graph
        In float64.
    ranges : sequence of Range
        Those of the nodes.
    rows : torch.Tensor
        The functions, (batch or 1, k, \*output shape).
    p : float
        Exponent of the norm.
    narrow : callable, optional
        Told of each node through which all paths run, and of the interval there.

    Returns
    -------
    pair of torch.Tensor, or None
        Center and radius, (batch, k, \*input shape), or None where a layer on the way has no such
        answer.
    """
    batch = max(len(r.low) for r in ranges)
    center = rows.expand(batch, *rows.shape[1:])
    pending = {graph.output: (center, torch.zeros_like(center))}
    for k in range(graph.output, 0, -1):
        if k not in pending:
            continue
        if narrow is not None and len(pending) == 1:
            narrow(k, pending[k])
        cotangent = pending.pop(k)
        node = graph.nodes[k]
        layer = node.layer
        assert layer is not None
        parts = [ranges[j] for j in node.inputs]
        if isinstance(layer, Join):
            given = layer.pullback(cotangent, parts)
        else:
            back = pullback_rule(layer, cotangent, parts[0])
            given = None if back is None else [back]
        if given is None:
            return None
        for j, part in zip(node.inputs, given, strict=True):
            pending[j] = _plus(pending[j], part) if j in pending else part
    interval = pending.get(0)
    if interval is None:  # no path from the input
        zero = torch.zeros(*rows.shape[:2], *graph.nodes[0].shape, dtype=torch.float64)
        return zero, zero
    if narrow is not None:
        narrow(0, interval)
    return interval


def row_constants(graph: Graph, ranges: Sequence[Range], rows: Tensor, p: float) -> Tensor:
    r"""Lipschitz constants of linear functions of the output, on the domain.

    The rows are carried backwards; wherever all paths run through one node :math:`u`, their dual
    norm there times the product bound of the map to u is a bound, and the least of them counts:
    the last layer's rows with the product of the rest, and the Jacobian of the whole network,
    are the two ends.

    Parameters
    ----------
    graph : Graph
        In float64.
    ranges : sequence of Range
        Those of the nodes.
    rows : torch.Tensor
        The functions, (batch or 1, k, \*output shape).
    p : float
        1, 2 or :data:`math.inf`.

    Returns
    -------
    torch.Tensor
        Upper bounds, (batch, k).
    """
    total = stretches(graph, ranges, p)
    best: list[Tensor] = []

    def narrow(node: int, cotangent: tuple[Tensor, Tensor]) -> None:
        bound = row_norms(cotangent, p)
        best.append(times(bound, total[node].expand(len(bound))[:, None]))

    row_bounds(graph, ranges, rows, p, narrow)
    return torch.stack(torch.broadcast_tensors(*best)).amin(0) * (1 + 2.0**-40)


def _plus(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    center = first[0] + second[0]
    return center, (first[1] + second[1]) * (1 + 2.0**-48) + center.abs() * 2.0**-48


def row_norms(interval: tuple[Tensor, Tensor], p: float) -> Tensor:
    """Largest Lipschitz constant of each row, (batch, k)."""
    center, radius = interval
    entries = (center.abs() + radius).flatten(2)
    norm = torch.linalg.vector_norm(entries, dual_exponent(p), dim=2)
    return norm * (1 + 2.0**-40)


def matrix_norms(interval: tuple[Tensor, Tensor], p: float) -> Tensor:
    """Largest Lipschitz constant of the map of all rows, (batch,)."""
    center, radius = (part.flatten(2) for part in interval)
    slack = 1 + 2.0**-36
    norms = torch.linalg.matrix_norm(center.abs() + radius, p)
    if p == 2:
        apart = torch.linalg.matrix_norm(center, 2) + torch.linalg.matrix_norm(radius, 2)
        norms = torch.minimum(norms, apart)
    return norms * slack
