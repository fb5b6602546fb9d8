"""Reading a network as weights, biases and units between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound
from lipbook.graphs import Graph, Node, trace
from lipbook.layers.joins import Add, Concatenate, Join
from lipbook.layers.rearrangements import Constant
from lipbook.norms import operator_norm
from lipbook.rules import Affine, Shape, _shape, affine_rule, lipschitz_rule
from lipbook.units import EPS, Units, units_rule

__all__: list[str] = []

MOST_ENTRIES = 2**24  # of a dense matrix: 128 MiB

# Note [folding]
# Every node of a graph is an affine function of the outputs of one activation, or of the input, as
# long as no path goes around an activation. The function is a matrix, found by running the layers
# on all unit vectors at once, and its value at 0. Between two activations nothing else is left of
# convolutions, normalisations, means, slices and sums.

# Note [allowance]
# The matrices that a method works with are computed, and so is what is multiplied afterwards.
# A layer A turns the error e of a matrix M, in the Frobenius norm, into at most
#     ||A|| e + gamma || |A| |M| ||_F,
# whatever cancels in A M; sums add the errors of their parts. This is the sum over all paths of the
# products of the norms of their factors, each with its rounding. `_widen` bounds by how much such
# errors e_k of the matrices can change a product of them, sum_k e_k prod_{j != k} (||W_j|| + e_j),
# and adds 8 eps times the widths and the product bound for the arithmetic of the method. The
# semidefinite bounds carry, in addition, the bounds of Note [certificate].


class _Net(NamedTuple):
    weights: list[Tensor]  # W_1, ..., W_L, in the coordinates of the units
    biases: list[Tensor]
    units: list[Units]  # between them
    errors: list[float]  # of the weights, in the Frobenius norm
    shifts: list[float]  # errors of the biases
    segments: list[Tensor]  # the weights in the coordinates of the activations
    layers: list[Node]  # the activations
    shapes: list[Shape]  # of what they see
    output_shape: Shape

    def hidden(self) -> int:
        return sum(len(layer.low) for layer in self.units)


class _Segment(NamedTuple):
    """An affine function of the outputs of one activation."""

    source: int | None  # number of activations up to it; None for a constant
    matrix: Tensor  # images of the unit vectors, (columns, *shape)
    bias: Tensor  # (*shape)
    error: float
    shift: float


def _dense_layers(
    module: nn.Module, input_shape: Sequence[int], output: str | int | None = None
) -> _Net:
    """Read a network whose activations lie on one chain, or refuse it by name."""
    shape = _shape(input_shape)
    lipschitz_bound(module, shape, output=output)  # which refuses hooks, randomness, NaN, shapes
    with torch.inference_mode(False), torch.no_grad():
        graph = trace(module, shape, output=output).double()
        return _Reading(graph).net()


class _Reading:
    """Segments of all nodes of a graph, and the activations between them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.units: list[Units] = []
        self.entering: list[_Segment] = []  # what the activations see
        self.nodes: list[Node] = []
        self.segments = [self.start(0, graph.nodes[0].shape)]

    def net(self) -> _Net:
        for node in self.graph.nodes[1:]:
            with node.located():
                self.segments.append(self.segment(node))
        last = self.segments[self.graph.output]
        if last.source is None:  # a constant, of which nothing is left but its value
            shape = self.graph.nodes[0].shape
            last = last._replace(matrix=torch.zeros(math.prod(shape), *last.bias.shape))
        net = _Net([], [], [], [], [], [], [], [], tuple(last.bias.shape))
        behind: Tensor | None = None
        for units, segment in zip([*self.units, None], [*self.entering, last], strict=True):
            self.fold(net, behind, segment, None if units is None else units.before)
            behind = None if units is None else units.behind
        net.units.extend(self.units)
        net.layers.extend(self.nodes)
        net.shapes.extend(tuple(segment.bias.shape) for segment in self.entering)
        return net

    @staticmethod
    def fold(net: _Net, behind: Tensor | None, segment: _Segment, before: Tensor | None) -> None:
        """Put a segment between two layers of units."""
        matrix, bias = segment.matrix.flatten(1).mT.double(), segment.bias.flatten().double()
        error, shift = segment.error, segment.shift
        net.segments.append(matrix)
        if behind is not None:  # entries of a rotation are off by some eps, too
            gamma = (len(behind) + 16) * EPS
            error = _norm(behind) * error + gamma * _size(matrix.abs() @ behind.abs())
            matrix = matrix @ behind
        if before is not None:
            gamma, norm = (before.shape[1] + 16) * EPS, _norm(before)
            error = norm * error + gamma * _size(before.abs() @ matrix.abs())
            shift = norm * shift + gamma * _size(before.abs() @ bias.abs())
            matrix, bias = before @ matrix, before @ bias
        net.weights.append(matrix)
        net.biases.append(bias)
        net.errors.append(error * (1 + 2.0**-40))
        net.shifts.append(shift * (1 + 2.0**-40))

    def start(self, source: int, shape: Shape) -> _Segment:
        """Identity on the outputs of an activation, or on the input."""
        n = math.prod(shape)
        self.check_size(n, shape)
        eye = torch.eye(n, dtype=torch.float64).view(n, *shape)
        return _Segment(source, eye, torch.zeros(shape, dtype=torch.float64), 0.0, 0.0)

    def check_size(self, columns: int, shape: Shape) -> None:
        rows = math.prod(shape)
        if rows * columns > MOST_ENTRIES:
            raise ValueError(
                f"input_shape {self.graph.nodes[0].shape} would need a dense matrix of "
                f"{rows} x {columns} entries here, more than {MOST_ENTRIES}: use "
                "method='product', or bound a smaller part of the network"
            )

    def segment(self, node: Node) -> _Segment:
        layer = node.layer
        assert layer is not None
        layer.cpu()
        parts = [self.segments[k] for k in node.inputs]
        sources = sorted({part.source for part in parts if part.source is not None})
        if not sources or isinstance(layer, Constant):
            return self.constant(node, parts)
        if len(sources) > 1:
            raise ValueError(
                f"joins what is before {self.title(sources[0])} with what is behind it: {_CHAIN}"
            )
        columns = next(len(part.matrix) for part in parts if part.source is not None)
        self.check_size(columns, node.shape)
        if isinstance(layer, (Add, Concatenate)):
            return _joined(layer, parts, columns)
        if isinstance(layer, Join):
            units = units_rule(layer, (len(parts), *parts[0].bias.shape))
            seen = _joined(_Stack(), parts, columns)
        else:
            (seen,) = parts
            affine = affine_rule(layer, tuple(seen.bias.shape))
            norm = lipschitz_rule(layer, tuple(seen.bias.shape), 2.0).value
            if affine is not None:
                return _applied(affine, norm, seen)
            units = units_rule(layer, tuple(seen.bias.shape))
        if units is None:
            raise ValueError(
                "the methods of lipbook.tightness read affine layers and activations with "
                "bounded slopes, sorts and maxima among them; use method='product' for others"
            )
        return self.activation(node, units, seen)

    def activation(self, node: Node, units: Units, seen: _Segment) -> _Segment:
        assert seen.source is not None
        if seen.source < len(self.units):
            raise ValueError(f"stands beside {self.title(seen.source)} and not behind it: {_CHAIN}")
        self.units.append(units)
        self.entering.append(seen)
        self.nodes.append(node)
        return self.start(len(self.units), node.shape)

    def constant(self, node: Node, parts: Sequence[_Segment]) -> _Segment:
        assert node.layer is not None
        bias = node.layer(*(part.bias[None] for part in parts))[0].double().cpu()
        shift = 0.0 if isinstance(node.layer, Constant) else EPS * bias.numel() * _size(bias)
        return _Segment(None, bias.new_zeros(0), bias, 0.0, shift + sum(p.shift for p in parts))

    def title(self, number: int) -> str:
        """Name an activation, and the line in which it stands."""
        node = self.nodes[number]
        where = f" ({node.place}: {node.code})" if node.place else ""
        path = f"{node.path!r} " if node.path else ""
        return f"{path}({type(node.layer).__name__}){where}"


_CHAIN = (
    "the methods of lipbook.tightness read networks whose activations lie on one chain; "
    "lipschitz_bound with method='product', the default, takes this one"
)


class _Stack(nn.Module):
    """Tensors of one shape along a new first dimension of a sample."""

    stacked = True

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts, 1)


def _joined(layer: nn.Module, parts: Sequence[_Segment], columns: int) -> _Segment:
    """Sum of segments with one source, or side by side."""
    matrices = [
        part.matrix if part.source is not None else part.bias.new_zeros(columns, *part.bias.shape)
        for part in parts
    ]
    weights: list[float] = [abs(w) for w in getattr(layer, "weights", [1.0] * len(parts))]
    gamma = (len(parts) + 2) * EPS if isinstance(layer, Add) else 0.0
    error = sum(
        w * (part.error + gamma * _size(matrix))
        for w, part, matrix in zip(weights, parts, matrices, strict=True)
    )
    shift = sum(
        w * (part.shift + gamma * _size(part.bias)) for w, part in zip(weights, parts, strict=True)
    )
    source = next(part.source for part in parts if part.source is not None)
    bias = layer(*(part.bias[None] for part in parts))[0]
    return _Segment(source, layer(*matrices), bias, error, shift)


def _applied(affine: Affine, norm: float, seen: _Segment) -> _Segment:
    gamma = (affine.terms + 8) * EPS
    matrix, bias = affine.apply(seen.matrix), affine.apply(seen.bias[None])[0] + affine.bias
    error = norm * seen.error + gamma * _size(affine.absolute(seen.matrix.abs()))
    size = affine.absolute(seen.bias.abs()[None])[0] + affine.bias.abs()
    return _Segment(seen.source, matrix, bias, error, norm * seen.shift + gamma * _size(size))


def _size(values: Tensor) -> float:
    return float(values.norm())


def _norm(matrix: Tensor) -> float:
    """Bound of the 2-norm, by those of rows and columns."""
    return math.sqrt(float(matrix.abs().sum(0).max() * matrix.abs().sum(1).max()))


def _widen(value: float, net: _Net, p: float = 2) -> float:
    """Add what rounding may have taken off: see Note [allowance]."""
    norms = [operator_norm(weight, p).item() for weight in net.weights]
    steepest = math.prod(layer.steepest.max().item() for layer in net.units)
    widths = sum(max(weight.shape) for weight in net.weights)
    grown, errors = [], []
    for norm, error, weight in zip(norms, net.errors, net.weights, strict=True):
        errors.append(error * (1.0 if p == 2 else math.sqrt(max(weight.shape))))
        grown.append(norm + errors[-1])
    folded = sum(error * math.prod(grown[:k] + grown[k + 1 :]) for k, error in enumerate(errors))
    mixed = 1.0  # groups are mapped by matrices of 2-norm 1
    if p != 2:
        for layer in net.units:
            mixed *= math.sqrt(int(layer.groups.bincount().max()))
    arithmetic = 8 * EPS * widths * math.prod(norms)
    return value * (1 + 8 * EPS) + steepest * mixed * (arithmetic + folded)


def _euclidean(method: str, p: float) -> None:
    if p != 2:
        raise ValueError(f"p must be 2 for method {method!r}, got {p:g}: use 'absolute'")


def _diagonal(method: str, net: _Net) -> None:
    for units, node in zip(net.units, net.layers, strict=True):
        if not units.diagonal:
            raise ValueError(
                f"method {method!r} needs activations that act on single units or on pairs, got "
                f"{node.layer}: use 'lipsdp' or 'eclipse'"
            )
