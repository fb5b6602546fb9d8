r"""The product bound of a graph: constants multiply along edges and join where branches meet.

# Note [blocks]
Branches that read disjoint slices of one node :math:`u` see less than all of it. Let
:math:`s_i` be the slices, :math:`\lVert\Delta_j\rVert_p \le \sum_i A_{ji}\lVert\Delta s_i\rVert_p`
the branches :math:`j` of a join. Then
:math:`\lVert(\lVert\Delta_j\rVert_p)_j\rVert_p \le \lVert A\rVert_p\,
\lVert(\lVert\Delta s_i\rVert_p)_i\rVert_p \le \lVert A\rVert_p \lVert\Delta u\rVert_p` for a
concatenation, as the entries of A are not negative and the slices are disjoint; a sum has one row
in place of many. A is diagonal where each branch reads a slice of its own, and its norm is the
largest constant; a coupling layer :math:`(x_1, x_2 + t(x_1))` has rows (1, 0) and (L, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipbook.graphs import Graph
from lipbook.layers.joins import Join
from lipbook.layers.rearrangements import Rearrangement

__all__ = ["compose", "times"]

_WHOLE = -1
Row = dict[int, Tensor]  # from slices of a node, or all of it, to factors


def times(a: Tensor, b: Tensor) -> Tensor:
    """Product of constants from above: 0 only if one of them is, also after an overflow."""
    tiny = torch.finfo(torch.float64).tiny  # below which products lose digits, or vanish
    return torch.where((a == 0) | (b == 0), 0.0, (a * b).clamp(min=tiny))


def compose(graph: Graph, answers: Sequence[Sequence[Tensor]], p: float) -> list[Tensor]:
    """Bound of the map from the input to each node.

    Parameters
    ----------
    graph : Graph
        The network.
    answers : sequence of sequence of torch.Tensor
        For each node the factor of each of its inputs (a join that is stacked may give one for
        all), numbers or (batch,); the input's is not read.
    p : float
        Exponent of the norms.

    Returns
    -------
    list of torch.Tensor
    """
    slices = _disjoint_slices(graph)
    total = [torch.ones((), dtype=torch.float64)]
    # For each node: how it depends on earlier nodes, through which all of it runs.
    rows: list[dict[int, Row]] = [{0: {_WHOLE: total[0]}}]
    for k, node in enumerate(graph.nodes[1:], 1):
        factors = list(answers[k])
        parts = node.inputs
        if len(factors) < len(parts):
            factors = factors * len(parts)
        stacked = isinstance(node.layer, Join) and node.layer.stacked
        shared = set.intersection(*(set(rows[j]) | ({j} & set(slices)) for j in parts))
        best: Tensor | None = None
        own: dict[int, Row] = {}
        for base in shared:
            each = [
                {key: times(factor, value) for key, value in _row(rows, slices, j, base, k).items()}
                for j, factor in zip(parts, factors, strict=True)
            ]
            own[base] = _joined(each, p, stacked)
            value = times(_norm(each, p, stacked), total[base])
            best = value if best is None else torch.minimum(best, value)
        direct = [times(f, total[j]) for j, f in zip(parts, factors, strict=True)]
        value = _vector_norm(direct, p) if stacked else _sum(direct)
        total.append(value if best is None else torch.minimum(best, value))
        rows.append(own)
    return total


def _row(
    rows: list[dict[int, Row]],
    slices: dict[int, dict[int, int]],
    source: int,
    base: int,
    reader: int,
) -> Row:
    """How what a reader gets from a source depends on a base."""
    if source == base and base in slices:
        key = slices[base].get(reader, _WHOLE)
        return {key: torch.ones((), dtype=torch.float64)}
    return rows[source][base]


def _disjoint_slices(graph: Graph) -> dict[int, dict[int, int]]:
    """Nodes of which several readers take slices that do not meet, and the slice of each."""
    found: dict[int, dict[int, int]] = {}
    for k, readers in enumerate(graph.readers()):
        slices: dict[frozenset[int], int] = {}
        place: dict[int, int] = {}
        for r in dict.fromkeys(readers):
            layer = graph.nodes[r].layer
            if not isinstance(layer, Rearrangement):
                continue
            sources = frozenset(layer.sources())
            if sources in slices or not any(sources & other for other in slices):
                place[r] = slices.setdefault(sources, len(slices))
        if len(slices) > 1:
            found[k] = place
    return found


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _vector_norm(values: Sequence[Tensor], p: float) -> Tensor:
    if len(values) == 1:
        return values[0]
    stack = torch.stack(torch.broadcast_tensors(*values))
    if p == math.inf:
        return stack.amax(0)
    if p == 1:
        return stack.sum(0)
    largest = stack.amax(0)
    scaled = torch.where(largest > 0, stack / largest.clamp(min=1e-300), 0.0)
    return times(largest, torch.linalg.vector_norm(scaled, dim=0)) * (1 + 2.0**-50)


def _joined(each: Sequence[Row], p: float, stacked: bool) -> Row:
    keys = dict.fromkeys(key for row in each for key in row)
    join = _vector_norm if stacked else (lambda values, p: _sum(values))
    return {key: join([row[key] for row in each if key in row], p) for key in keys}


def _norm(each: Sequence[Row], p: float, stacked: bool) -> Tensor:
    """Norm of the matrix of the rows, and of what reads all of the base besides."""
    whole = [row[_WHOLE] for row in each if _WHOLE in row]
    keys = list(dict.fromkeys(key for row in each for key in row if key != _WHOLE))
    value = torch.zeros((), dtype=torch.float64)
    if whole:
        value = _vector_norm(whole, p) if stacked else _sum(whole)
    if not keys:
        return value
    if not stacked:
        summed = _joined(each, p, stacked=False)
        dual = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[p]
        return value + _vector_norm([summed[key] for key in keys], dual)
    zero = torch.zeros((), dtype=torch.float64)
    entries = [row.get(key, zero) for row in each for key in keys]
    matrix = torch.stack(torch.broadcast_tensors(*entries), -1)
    matrix = matrix.unflatten(-1, (len(each), len(keys)))
    if bool((matrix.count_nonzero(-1) <= 1).all() and (matrix.count_nonzero(-2) <= 1).all()):
        return value + matrix.flatten(-2).amax(-1)  # a permutation of a diagonal: the maximum
    if not bool(matrix.isfinite().all()):
        return torch.full_like(matrix[..., 0, 0], math.inf)
    return value + torch.linalg.matrix_norm(matrix, p) * (1 + 2.0**-44)
