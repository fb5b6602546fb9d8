"""Reading a network as weights, biases and units between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipbook import composition
from lipbook.activations import AbsoluteValue, FullSort, GroupSort, Householder, MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.norms import operator_norm

__all__: list[str] = []

Shape = tuple[int, ...]
EPS = torch.finfo(torch.float64).eps

# Note [sorting]
# MaxMin sorts a pair (a, b). In the orthonormal coordinates u = (a + b)/sqrt 2 and
# v = (b - a)/sqrt 2 it keeps u and returns |v|: a linear unit and an absolute value. The rotation
# goes into the weights before and behind, and what is left is diagonal. A Householder activation
# is the same with other coordinates. GroupSort of k > 2 keeps the mean of a group, and the
# remaining k - 1 coordinates are mapped by a nonexpansive map as a whole, ||dpsi|| <= ||dz||: one
# multiplier for the group, in place of one for each unit. These are the quadratic constraints of
# Pauli et al. (2024): they say no more than that sums are kept and distances do not grow.

# Note [allowance]
# The weights that a method works with are products of floats (a rotation, two linear layers in a
# row), off by some eps * width relative to their norms; so is what is multiplied afterwards. The
# effect on a bound is at most the product bound times the sum of these relative errors, which
# `_widen` adds. The semidefinite bounds carry, in addition, the bounds of Note [certificate].


@dataclasses.dataclass(frozen=True)
class _Units:
    """One layer of activations in the coordinates where it is diagonal, or nearly."""

    module: nn.Module
    low: Tensor  # (n,) least slope of each unit
    high: Tensor  # (n,) largest slope
    group: Tensor  # (n,) units with one number share a multiplier: psi is one map of them
    pieces: tuple[Tensor, Tensor] | None  # slopes left and right of 0 if there are two pieces
    rotation: Tensor | None = None  # to these coordinates from those of the module
    members: Tensor | None = None  # channels of each group that is sorted, (groups, size)

    @property
    def center(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Tensor:
        return (self.high - self.low) / 2

    @property
    def steepest(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def elementwise(self) -> bool:
        return self.rotation is None

    @property
    def diagonal(self) -> bool:
        return len(self.group.unique()) == len(self.group)


class _Net(NamedTuple):
    weights: list[Tensor]  # W_1, ..., W_L
    biases: list[Tensor]
    units: list[_Units]  # between them
    output_shape: Shape

    def product(self, p: float = 2) -> float:
        value = math.prod(operator_norm(weight, p).item() for weight in self.weights)
        return value * math.prod(layer.steepest.max().item() for layer in self.units)

    def hidden(self) -> int:
        return sum(len(layer.low) for layer in self.units)


_ISOMETRIES = (nn.Identity, nn.Dropout)

# Monotone activations: slopes in [0, beta]. Others that composition knows have slopes in
# [-beta, beta] at worst; those of SiLU and GELU mirror each other at 1/2.
_MONOTONE = (
    *(nn.CELU, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.ReLU6, nn.SELU, nn.Sigmoid),
    *(nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_MIRRORED = (nn.GELU, nn.SiLU)
_TWO_PIECES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, AbsoluteValue)
_SORTS = (GroupSort, FullSort, MaxMin, Householder)


def _dense_layers(module: nn.Module, input_shape: Sequence[int]) -> _Net:
    """Read a sequence of flattening, linear layers and activations, or refuse it by name."""
    shape = composition._shape(input_shape)
    whole = lipschitz_bound(module, shape)  # which refuses hooks, randomness, NaN, other shapes
    net = _Net([], [], [], whole.output_shape)
    matrix, bias = torch.eye(math.prod(shape), dtype=torch.float64), torch.zeros(())
    fresh = True  # whether `matrix` is still the identity
    for path, child in _leaves(module, ""):
        cls = _class(child)
        title = f"{path!r} ({type(child).__name__})" if path else type(child).__name__
        if cls is nn.Flatten:
            start, end = (d % (len(shape) + 1) for d in (child.start_dim, child.end_dim))
            if start != 1 or end != len(shape):
                raise ValueError(
                    f"{title}: Flatten must flatten whole samples, that is start_dim=1, "
                    f"end_dim=-1; got {child}"
                )
            shape = (math.prod(shape),)
            continue
        if cls in _ISOMETRIES:
            continue
        if len(shape) > 1 and (cls is nn.Linear or cls in _SORTS or cls is nn.PReLU):
            raise ValueError(f"{title}: samples of shape {shape} must be flattened first")
        if cls is nn.Linear:
            weight = _values(child.weight)
            offset = 0.0 if child.bias is None else _values(child.bias)
            matrix, bias = (weight if fresh else weight @ matrix), weight @ _column(bias, weight)
            bias, fresh = bias + offset, False
            shape = (len(weight),)
            continue
        layer = _activation(title, child, cls, math.prod(shape))
        rotation = layer.rotation
        net.weights.append(matrix if rotation is None else rotation @ matrix)
        bias = _column(bias, net.weights[-1].mT)
        net.biases.append(bias if rotation is None else rotation @ bias)
        net.units.append(layer)
        matrix = torch.eye(len(layer.low), dtype=torch.float64)
        matrix, fresh = (matrix, True) if rotation is None else (rotation.mT, False)
        bias = torch.zeros(())
    net.weights.append(matrix)
    net.biases.append(_column(bias, matrix.mT))
    return net


def _column(bias: Tensor, weight: Tensor) -> Tensor:
    """Give the bias that reaches the columns of ``weight`` in full."""
    return bias.double().expand(weight.shape[1]).clone()


def _values(parameter: Tensor) -> Tensor:
    return parameter.detach().double().cpu()


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    if _class(module) is not nn.Sequential:
        yield path, module
        return
    for name, child in module._modules.items():
        yield from _leaves(child, f"{path}.{name}".strip("."))  # type: ignore[arg-type]


_READ: tuple[type[nn.Module], ...] = (
    *(nn.Sequential, nn.Flatten, nn.Linear, *_ISOMETRIES),
    *(*_SORTS, *_TWO_PIECES, *composition._SLOPES),
)


def _class(module: nn.Module) -> type[nn.Module]:
    """Class of ours or torch's that says what the module computes; ``nn.Module`` if none."""
    for cls in _READ:
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return cls
    return nn.Module


def _activation(title: str, module: Any, cls: type[nn.Module], n: int) -> _Units:
    one = torch.ones(n, dtype=torch.float64)
    each = torch.arange(n)
    if cls in _SORTS:
        return _sorting(title, module, cls, n)
    if cls in _TWO_PIECES:
        left: Any = {
            nn.ReLU: lambda: 0.0,
            nn.LeakyReLU: lambda: module.negative_slope,
            nn.PReLU: lambda: _values(module.weight),
            nn.RReLU: lambda: (module.lower + module.upper) / 2,
            AbsoluteValue: lambda: -1.0,
        }[cls]()
        left = one * left
        low, high = torch.minimum(left, one), torch.maximum(left, one)
        return _Units(module, low, high, each, (left, one))
    if cls not in composition._SLOPES:
        raise ValueError(
            f"{title}: the methods of lipbook.tightness read Flatten, Linear and activations with "
            "bounded slopes in torch.nn.Sequential; use method='product' for other modules"
        )
    beta = composition._SLOPES[cls](module)
    alpha = -beta
    if cls is nn.ELU:
        alpha, beta = min(0.0, module.alpha), max(1.0, module.alpha)
    elif cls in _MONOTONE:
        alpha = 0.0
    elif cls in _MIRRORED:
        alpha = 1 - beta
    # A slope that solves a transcendental equation is known to double precision, not beyond.
    low, high = one * alpha * (1 + 4 * EPS), one * beta * (1 + 4 * EPS if cls in _MIRRORED else 1)
    return _Units(module, low, high, each, None)


def _sorting(title: str, module: Any, cls: type[nn.Module], n: int) -> _Units:
    """Coordinates in which a sorting activation is diagonal: see Note [sorting]."""
    if module.dim not in (1, -1):
        raise ValueError(f"{title}: dim must be the dimension of the features, got {module.dim}")
    size = {GroupSort: lambda: module.group_size, FullSort: lambda: n}.get(cls, lambda: 2)()
    index = torch.arange(n).reshape(-1, size)
    if cls is MaxMin and module.pairing == "halves":
        # Maxima come first, so that the difference is first minus second.
        index = torch.arange(n).reshape(2, -1).mT.flip(1)
    blocks = _helmert(size).expand(len(index), size, size)
    if cls is Householder:
        half = _values(module.angle) / 2
        cosine, sine = half.cos(), half.sin()
        rows = (torch.stack((cosine, sine), -1), torch.stack((-sine, cosine), -1))
        blocks = torch.stack(rows, -2)
    rotation = torch.zeros(n, n, dtype=torch.float64)
    for own, block in zip(index, blocks, strict=True):
        rotation[own[:, None], own] = block
    low, high = torch.ones(2, n, dtype=torch.float64)
    low[index[:, 1:]] = -1.0
    group = torch.arange(n)
    pieces: tuple[Tensor, Tensor] | None = (low.clone(), high.clone())
    if size > 2:
        group[index[:, 1:]] = index[:, 1:2]
        pieces = None
    return _Units(module, low, high, group, pieces, rotation, index)


def _helmert(size: int) -> Tensor:
    """Orthogonal matrix whose first row is the mean, the last for two minus first plus second."""
    rows = torch.zeros(size, size, dtype=torch.float64)
    rows[0] = size**-0.5
    for k in range(1, size):
        rows[k, :k], rows[k, k] = -1.0, k
        rows[k] /= math.sqrt(k * (k + 1))
    return rows


def _widen(value: float, net: _Net, p: float = 2) -> float:
    """Add what rounding may have taken off: see Note [allowance]."""
    widths = sum(max(weight.shape) for weight in net.weights)
    return value * (1 + 8 * EPS) + 8 * EPS * widths * net.product(p)


def _euclidean(method: str, p: float) -> None:
    if p != 2:
        raise ValueError(f"p must be 2 for method {method!r}, got {p:g}: use 'absolute'")


def _diagonal(method: str, net: _Net) -> None:
    for layer in net.units:
        if not layer.diagonal:
            raise ValueError(
                f"method {method!r} needs activations that act on single units or on pairs, got "
                f"{layer.module}: use 'lipsdp' or 'eclipse'"
            )
