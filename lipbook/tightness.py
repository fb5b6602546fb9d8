r"""How tight is a Lipschitz bound? Bounds of dense networks that see more than one layer at once.

The product bound multiplies the norms of the layers, as if the direction that one layer stretches
most were the one that the next layer stretches most, through activations that let it pass. The
methods here look at the whole network

.. math::
    f = W_L\, \varphi_{L-1}\big( W_{L-1} \cdots \varphi_1(W_1 x + b_1) \cdots + b_{L-1}\big) + b_L .

Two facts carry all of them. **Secants**: for any two inputs, the images differ by
:math:`W_L D_{L-1} W_{L-1} \cdots D_1 W_1 (x - y)` where each :math:`D_l` is diagonal with entries
between the least slope :math:`\alpha` and the largest slope :math:`\beta` of the activation.
**Centres**: :math:`D = C + R\,\Psi` with :math:`C = (\alpha+\beta)/2`,
:math:`R = (\beta-\alpha)/2` and :math:`\lVert\Psi\rVert \le 1`.

Sorting activations are no exception (see Note [sorting]). One function reaches every method:
:func:`lipschitz_bound(module, input_shape, method=...) <lipbook.composition.lipschitz_bound>`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from lipbook import composition
from lipbook.activations import AbsoluteValue, FullSort, GroupSort, Householder, MaxMin
from lipbook.composition import Bound, bound_method, lipschitz_bound
from lipbook.norms import dual_exponent, operator_norm

__all__ = [
    "absolute_bound",
    "averaged_bound",
    "seqlip_bound",
    "lipsdp_bound",
    "lipsdp_layer_bound",
    "eclipse_bound",
    "exact_constant",
    "local_lipschitz_bound",
]

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


# ------------------------------------------------------------------------- reading a network


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


# ------------------------------------------------------------------------- products and sums


@bound_method("absolute")
def absolute_bound(module: nn.Module, input_shape: Sequence[int], p: float = 2) -> Bound:
    r"""Upper bound by absolute values, entry by entry.

    .. math::
        \operatorname{Lip}(f) \le \big\lVert\, \lvert W_L\rvert\, \hat D_{L-1} \cdots \hat D_1\,
        \lvert W_1\rvert\, \big\rVert_p, \qquad
        \hat D_l = \max(\lvert\alpha\rvert, \lvert\beta\rvert)

    since :math:`\lvert J\rvert` is entrywise at most this product, and the three norms are
    monotone in absolute values. **Guaranteed**: an upper bound; for :math:`p = 1` and
    :math:`p = \infty` never above the product bound. For :math:`p = 2` it may be above it, and
    is good where the weights have few signs. It is attained by networks with nonnegative weights
    and activations that reach slope :math:`\hat D`.

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations that act on single units. Sorting activations
        are allowed for :math:`p = 1` and :math:`p = \infty`: a Jacobian permutes the
        entries of a group, so that each gets the largest bound of its group.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is no such sequence, or p = 2 meets an activation that mixes units.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data, net[2].weight.data = torch.ones(2, 2), torch.ones(1, 2)
    >>> round(absolute_bound(net, (2,), math.inf).value, 6)  # f(x) = 2 relu(x1 + x2)
    4.0
    """
    p = composition._exponent(p)
    net = _dense_layers(module, input_shape)
    if all(layer.elementwise for layer in net.units):
        weights, units, value = net.weights, net.units, 0.0
        chain = weights[0].abs()
        for weight, layer in zip(weights[1:], units, strict=True):
            chain = weight.abs() @ (layer.steepest[:, None] * chain)
        value = operator_norm(chain, p).item()
    else:
        value = _absolute_through_sorts(net, p)
    return Bound(_widen(value, net, p), "upper bound", p, output_shape=net.output_shape)


def _absolute_through_sorts(net: _Net, p: float) -> float:
    """Bound the row sums (p = inf) or column sums (p = 1) of the Jacobian, layer by layer."""
    weights = list(net.weights)
    for k, layer in enumerate(net.units):
        if isinstance(layer.module, Householder):
            raise ValueError(f"method 'absolute' does not know {layer.module}: use 'product'")
        if p == 2 and not layer.elementwise:
            raise ValueError(
                "p must be 1 or math.inf for method 'absolute' with activations that mix units, "
                f"got 2 and {layer.module}: use 'lipsdp' or 'eclipse'"
            )
        if layer.rotation is not None:  # back to where a Jacobian permutes
            weights[k] = layer.rotation.mT @ weights[k]
            weights[k + 1] = weights[k + 1] @ layer.rotation
    order: list[tuple[Tensor, _Units | None]]
    order = list(zip(weights, [*net.units, None], strict=True))
    if p == 1:  # column sums are row sums of the transposed network
        order = list(zip([w.mT for w in weights[::-1]], [*net.units[::-1], None], strict=True))
    sums = torch.ones(order[0][0].shape[1], dtype=torch.float64)
    for weight, unit in order:
        sums = weight.abs() @ sums
        if unit is not None and unit.members is not None:
            largest = sums[unit.members].amax(1, keepdim=True)
            sums[unit.members] = largest.expand(unit.members.shape)
        elif unit is not None:
            sums = unit.steepest * sums
    return sums.max().item()


@bound_method("averaged")
def averaged_bound(module: nn.Module, input_shape: Sequence[int], p: float = 2) -> Bound:
    r"""Upper bound by averages over products, of Combettes and Pesquet.

    Writing every :math:`D_l = C_l + R_l\Psi_l` and multiplying out leaves one term for each set
    of layers at which the product is cut,

    .. math::
        \operatorname{Lip}(f) \le \sum_{S \subseteq \{1, \dots, L-1\}}
        \prod_{\text{cuts } i < j} \big\lVert R_j^{1/2}\, W_j\, C_{j-1} W_{j-1} \cdots
        C_{i+1} W_{i+1}\, R_i^{1/2} \big\rVert_p .

    For activations that are firmly nonexpansive (slopes in [0, 1], hence
    :math:`C = R = \tfrac12`) it is their average over the :math:`2^{L-1}` sets. The sum is computed
    in :math:`O(L^2)` norms: a set is a path, and the first cut splits it from the rest.

    **Guaranteed**: an upper bound, and not above the product bound where all units of a layer
    have the same slopes.

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations with bounded slopes.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`; 2 for sorting activations.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is no such sequence, or another p meets an activation that mixes units.

    Examples
    --------
    The layers of norm 1 with product 0: half of the terms see it.

    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data, net[2].weight.data = torch.eye(2)[:, :1], torch.eye(2)[1:]
    >>> round(averaged_bound(net, (1,)).value, 6), lipschitz_bound(net, (1,)).value
    (0.5, 1.0)

    References
    ----------
    :cite:t:`combettes2020`.
    """
    p = composition._exponent(p)
    net = _dense_layers(module, input_shape)
    if p != 2 and not all(layer.elementwise for layer in net.units):
        raise ValueError(f"p must be 2 for activations that mix units, got {p:g}")
    ones = [torch.ones(len(weight), dtype=torch.float64) for weight in net.weights]
    roots = [layer.radius.sqrt() for layer in net.units] + [ones[-1]]
    totals = [1.0]  # the sum over the sets whose last cut is behind layer j
    for j in range(len(net.weights)):
        segment = roots[j][:, None] * net.weights[j]
        total = 0.0
        for i in range(j, -1, -1):  # the segment of layers i..j, cut before layer i
            start = segment if i == 0 else segment * roots[i - 1]
            total += totals[i] * operator_norm(start, p).item()
            if i > 0:
                segment = (segment * net.units[i - 1].center) @ net.weights[i - 1]
        totals.append(total)
    value = _widen(totals[-1], net, p)
    return Bound(value, "upper bound", p, output_shape=net.output_shape)


@bound_method("seqlip")
def seqlip_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    max_width: int = 12,
    max_units: int = 300,
) -> Bound:
    r"""Upper bound of SeqLip: the worst activation pattern between each two layers.

    With :math:`W_l = U_l \Sigma_l V_l^\top`, the singular values of inner layers shared between
    their neighbours,

    .. math::
        \operatorname{Lip}(f) \le \prod_{l=1}^{L-1} \max_{D \in [\alpha, \beta]^{n_l}}
        \big\lVert \tilde\Sigma_{l+1} V_{l+1}^\top D\, U_l \tilde\Sigma_l \big\rVert_2,
        \qquad \tilde\Sigma_l = \Sigma_l^{1/2} \text{ or } \Sigma_l \text{ at both ends}.

    A norm is convex in :math:`D`, so that the maximum is at a vertex: an activation pattern. Up to
    ``max_width`` units all :math:`2^{n_l}` of them are visited; the maximum is NP-hard, and
    wider layers get its semidefinite relaxation (LipSDP of the pair). **Guaranteed**: an upper
    bound, never above the product bound. A search that only finds good patterns, as in the
    paper's experiments, would err on the wrong side.

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations on single units or on pairs.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.
    max_width : int
        Most units of a layer, not counting linear ones, whose patterns are enumerated.
    max_units : int
        Most units of a layer for the relaxation; beyond, the closed form of
        :func:`eclipse_bound` takes its place.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is no such sequence, or p is not 2.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.ones(1, 2)  # |x|
    >>> round(seqlip_bound(net, (1,)).value, 6), round(lipschitz_bound(net, (1,)).value, 6)
    (1.0, 2.0)

    References
    ----------
    :cite:t:`virmaux2018`, Section 5.
    """
    _euclidean("seqlip", p)
    net = _dense_layers(module, input_shape)
    _diagonal("seqlip", net)
    factors = [torch.linalg.svd(weight, full_matrices=False) for weight in net.weights]
    last = len(net.weights) - 1
    value = 1.0 if net.units else operator_norm(net.weights[0]).item()
    for k, layer in enumerate(net.units):
        u, s, _ = factors[k]
        _, t, vh = factors[k + 1]
        below = u * (s if k == 0 else s.sqrt())
        above = (t if k + 1 == last else t.sqrt())[:, None] * vh
        if (layer.radius > 0).sum() <= max_width:
            value *= _worst_pattern(above, layer, below)
        else:
            pair = _chain([below, above], [layer])
            small = pair.active[0].numel() <= max_units
            value *= min(_lipsdp(pair, "neuron", "barrier") if small else math.inf, _eclipse(pair))
    return Bound(_widen(value, net), "upper bound", p, output_shape=net.output_shape)


def _worst_pattern(above: Tensor, layer: _Units, below: Tensor) -> float:
    """Largest norm of above @ D @ below over the vertices D."""
    free = (layer.radius > 0).nonzero()[:, 0]
    best = 0.0
    for chunk in _batched(itertools.product((-1.0, 1.0), repeat=len(free)), 1024):
        signs = torch.tensor(chunk, dtype=torch.float64).reshape(len(chunk), len(free))
        slopes = layer.center.repeat(len(chunk), 1)
        slopes[:, free] += layer.radius[free] * signs
        best = max(best, operator_norm(above * slopes[:, None] @ below).max().item())
    return best


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


# --------------------------------------------------------------------- semidefinite programs

# Note [certificate]
# Let V(z) = z'Pz bound |f(x) - f(y)|^2 from layer l + 1 on, where z is the difference of its
# inputs to the activations. With M = W'PW, a step back through W(C + R psi) costs, for every
# diagonal T >= 0 that is constant on groups,
#     (Cz + R psi)' M (Cz + R psi) <= (Cz + R psi)' M (Cz + R psi) + z'Tz - psi'T psi,
# since |psi_g| <= |z_g| in each group. The right-hand side is at most z'P'z for all psi if and
# only if
#     [ P' - T - CMC    -CMR    ]
#     [   -RMC         T - RMR  ]  >= 0 .                                               (*)
# The smallest such P' is the Schur complement T + CMC + CMR (T - RMR)^{-1} RMC. So every T
# with T > RMR gives a bound, whatever solver it came from: rho = lambda_max(W_1' P_1 W_1), and
# the constant is at most sqrt(rho). Eliminating psi layer by layer is block elimination on the
# matrix of LipSDP, so that rho is the smallest that the matrix of LipSDP allows with this T.
#
# In floating point, P' is computed, (*) is assembled from it, and its least eigenvalue is found
# by eigvalsh, which errs by less than 8 eps n times the Frobenius norm. If it is -s, then adding
# 2s to P' and s to T makes (*) true: s is added to both diagonal blocks. M is raised by the same
# kind of allowance before. What is returned was proved so, not solved for.


class _Chain(NamedTuple):
    """A network with weights of norm 1; the true constant is ``scale`` times as large."""

    weights: list[Tensor]
    center: list[Tensor]
    radius: list[Tensor]
    group: list[Tensor]
    scale: float

    @property
    def active(self) -> list[Tensor]:
        return [(radius > 0).nonzero()[:, 0] for radius in self.radius]

    def shape(self, layer: int) -> Tensor:
        """Multipliers of a layer up to a factor: r (r + |c|), see Note [eclipse]."""
        center, radius = self.center[layer], self.radius[layer]
        return radius * (radius + center.abs())

    def transpose(self) -> _Chain:
        flip = [weight.mT for weight in self.weights[::-1]]
        return _Chain(flip, self.center[::-1], self.radius[::-1], self.group[::-1], self.scale)


def _chain(weights: list[Tensor], units: list[_Units]) -> _Chain:
    norms = [operator_norm(weight).item() for weight in weights]
    scale = math.prod(norms)
    if scale > 0:
        weights = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    center, radius = [u.center for u in units], [u.radius for u in units]
    return _Chain(weights, center, radius, [u.group for u in units], scale)


def _gram(weight: Tensor, form: Tensor) -> Tensor:
    """W' P W, raised by what rounding may have taken off."""
    size = 8 * EPS * sum(weight.shape) * float(weight.norm() ** 2 * form.norm())
    gram = weight.mT @ form @ weight
    return (gram + gram.mT) / 2 + size * torch.eye(weight.shape[1], dtype=torch.float64)


def _step(gram: Tensor, c: Tensor, r: Tensor, multiplier: Tensor) -> Tensor:
    """P' of Note [certificate] for this multiplier, raised until (*) is proved."""
    on = (r > 0).nonzero()[:, 0]
    outer = c[:, None] * gram * c
    coupling = r[on, None] * gram[on] * c
    inner = r[on, None] * gram[on][:, on] * r[on]
    t = multiplier[on].clamp(min=1e-12 * gram.norm().item())
    if len(on):
        root = t.rsqrt()
        excess = torch.linalg.eigvalsh(root[:, None] * inner * root)[-1].item()
        if not excess < 1 - 1e-9:  # the solver stopped on the wrong side of T > RMR
            t = t * excess * (1 + 2e-9)
    block = torch.diag(t) - inner
    form = outer + torch.zeros_like(gram).index_put((on, on), t)
    if len(on):
        form = form + coupling.mT @ torch.linalg.solve(block, coupling)
    form = (form + form.mT) / 2
    corner = form - outer - torch.zeros_like(gram).index_put((on, on), t)
    lmi = torch.cat((torch.cat((corner, -coupling.mT), 1), torch.cat((-coupling, block), 1)))
    size = form.norm() + outer.norm() + inner.norm() + 2 * coupling.norm() + 2 * t.norm()
    s = max(0.0, -torch.linalg.eigvalsh(lmi)[0].item()) + 8 * EPS * len(lmi) * size.item()
    return form + 2 * s * torch.eye(len(gram), dtype=torch.float64)


def _certify(chain: _Chain, multipliers: list[Tensor] | None) -> tuple[float, list[Tensor]]:
    """Bound for given multipliers, or for those of eclipse, with the forms P_1, ..., P_L."""
    form = torch.eye(len(chain.weights[-1]), dtype=torch.float64)
    forms = [form]
    for k in range(len(chain.center) - 1, -1, -1):
        gram = _gram(chain.weights[k + 1], form)
        if multipliers is None:
            top = torch.linalg.eigvalsh(gram)[-1]
            # 1e-8: room for units with c = 0, where T > RMR would be an equality.
            t = (1 + 1e-8 * (chain.center[k] == 0)) * chain.shape(k) * top
        else:
            t = multipliers[k].clamp(min=0.0)
        form = _step(gram, chain.center[k], chain.radius[k], t)
        forms.append(form)
    gram = _gram(chain.weights[0], form)
    rho = torch.linalg.eigvalsh(gram)[-1].item() + 8 * EPS * len(gram) * gram.norm().item()
    return chain.scale * math.sqrt(max(rho, 0.0)) * (1 + 8 * EPS), forms[::-1]


# Note [eclipse]
# With M <= m I, the right-hand side of Note [certificate] can only grow if M is replaced by m I,
# and is then diagonal: P' <= t + c^2 m + c^2 r^2 m^2 / (t - r^2 m) for each unit, least at
# t = r (r + |c|) m, where it is (|c| + r)^2 m = max(|alpha|, |beta|)^2 m. So this choice never
# loses against the product bound; the true M, of which only one eigenvalue is m, makes it better.
# ECLipsE-Fast walks from the input to the output with slopes in [0, 1], which is this walk on the
# transposed network. That is sound as well: psi_g is the image of z_g under a matrix of norm at
# most 1 (psi_g z_g' / |z_g|^2), and so is its transpose. The smaller bound is returned.


def _eclipse(chain: _Chain) -> float:
    if chain.scale == 0:
        return 0.0
    return min(_certify(chain, None)[0], _certify(chain.transpose(), None)[0])


@bound_method("eclipse")
def eclipse_bound(module: nn.Module, input_shape: Sequence[int], p: float = 2) -> Bound:
    r"""Upper bound in closed form, layer by layer: ECLipsE-Fast, in both directions.

    From :math:`P_L = I`, with :math:`M_l = W_{l+1}^\top P_{l+1} W_{l+1}`,

    .. math::
        T_l &= \lambda_{\max}(M_l)\, R_l (R_l + \lvert C_l\rvert), \\
        P_l &= T_l + C_l M_l C_l + C_l M_l R_l (T_l - R_l M_l R_l)^{-1} R_l M_l C_l, \\
        \operatorname{Lip}(f)^2 &\le \lambda_{\max}(W_1^\top P_1 W_1) .

    For ReLU, :math:`T = \lambda_{\max}(M)/2` and
    :math:`P = \tfrac12 \lambda_{\max} (I + M (2\lambda_{\max} - M)^{-1})`. This is a feasible point
    of LipSDP with one multiplier a layer. **Guaranteed**: an upper bound, in floating point as
    well; never above the product bound, up to 1e-8 relative a layer; never below
    :func:`lipsdp_layer_bound` where the units of a layer have the same slopes. The cost is that
    of some eigenvalue decompositions a layer.

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations: slope-restricted, sorting or Householder.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is no such sequence, or p is not 2.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(9, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
    >>> bool(eclipse_bound(net, (9,)).value < 0.9 * lipschitz_bound(net, (9,)).value)
    True

    References
    ----------
    :cite:t:`xu2024eclipse`. The derivation is in the source, Note [certificate] and
    Note [eclipse].
    """
    _euclidean("eclipse", p)
    net = _dense_layers(module, input_shape)
    value = _widen(_eclipse(_chain(net.weights, net.units)), net)
    return Bound(value, "upper bound", p, output_shape=net.output_shape)


@bound_method("lipsdp")
def lipsdp_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    solver: str = "barrier",
    max_units: int = 300,
) -> Bound:
    r"""Upper bound of LipSDP-Neuron: the best diagonal multiplier, one entry a unit.

    For one hidden layer with slopes in :math:`[\alpha, \beta]`,

    .. math::
        \operatorname{Lip}(f)^2 \le \min_{\rho,\, T \ge 0} \rho \quad\text{subject to}\quad
        \begin{bmatrix} -2\alpha\beta\, W_0^\top T W_0 - \rho I & (\alpha+\beta) W_0^\top T \\
        (\alpha+\beta)\, T W_0 & -2 T + W_1^\top W_1 \end{bmatrix} \preceq 0,
        \quad T \text{ diagonal}

    and likewise for any depth. **Guaranteed**: an upper bound. The value of a solver would not
    be one, so only its multipliers are taken: the smallest :math:`\rho` that they prove is
    computed by block elimination, with an allowance for rounding (Note [certificate] in the
    source). Sorting and Householder activations get the quadratic constraints of
    :cite:t:`pauli2024`.

    *LipSDP-Network*, which couples pairs of units by further multipliers, is not offered: it
    is not a bound for activations that are merely slope-restricted on each unit
    (:cite:t:`pauli2022`).

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations: slope-restricted, sorting or Householder.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.
    solver : str
        ``"barrier"``, an interior-point method for this program alone, or the name of a solver of
        cvxpy, such as ``"CLARABEL"`` (some dozens of units) or ``"SCS"``.
    max_units : int
        Most hidden units. The cost grows with their third power (the sixth for CLARABEL).

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ModuleNotFoundError
        If ``solver`` asks for cvxpy, which is not installed.
    ValueError
        If the network is no such sequence or has too many units, p is not 2, ``solver`` is
        unknown, or it fails.

    Examples
    --------
    One hidden layer of two units that computes the absolute value:

    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.ones(1, 2)
    >>> round(lipsdp_bound(net, (1,)).value, 6), round(lipschitz_bound(net, (1,)).value, 6)
    (1.0, 2.0)

    References
    ----------
    :cite:t:`fazlyab2019`, Theorem 2.
    """
    return _lipsdp_bound("neuron", module, input_shape, p, solver, max_units)


@bound_method("lipsdp-layer")
def lipsdp_layer_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    solver: str = "barrier",
    max_units: int = 300,
) -> Bound:
    r"""Upper bound of LipSDP-Layer: the best multipliers, one scalar a layer.

    The program of :func:`lipsdp_bound` with :math:`T_l = t_l I` (in general
    :math:`t_l\, R_l(R_l + \lvert C_l\rvert)`, which is the same where all units of a layer have the
    same slopes). **Guaranteed**: an upper bound, between those of :func:`lipsdp_bound` and
    :func:`eclipse_bound` up to the accuracy of the solver, if slopes are the same within a layer.

    Parameters
    ----------
    module, input_shape, p, solver, max_units
        As for :func:`lipsdp_bound`.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ModuleNotFoundError, ValueError
        As :func:`lipsdp_bound`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU())
    >>> methods = ("lipsdp", "lipsdp-layer", "eclipse", "product")
    >>> values = [lipschitz_bound(net, (5,), method=method).value for method in methods]
    >>> values == sorted(values)
    True

    References
    ----------
    :cite:t:`fazlyab2019`, Section 3.
    """
    return _lipsdp_bound("layer", module, input_shape, p, solver, max_units)


def _lipsdp_bound(
    multipliers: Literal["neuron", "layer"],
    module: nn.Module,
    input_shape: Sequence[int],
    p: float,
    solver: str,
    max_units: int,
) -> Bound:
    method = "lipsdp" if multipliers == "neuron" else "lipsdp-layer"
    _euclidean(method, p)
    net = _dense_layers(module, input_shape)
    if net.hidden() > max_units:
        raise ValueError(
            f"method {method!r} is for at most max_units={max_units} hidden units, got "
            f"{net.hidden()}: use method='eclipse', or raise max_units"
        )
    value = _lipsdp(_chain(net.weights, net.units), multipliers, solver)
    return Bound(_widen(value, net), "upper bound", p, output_shape=net.output_shape)


def _lipsdp(chain: _Chain, multipliers: str, solver: str) -> float:
    sizes = [len(on) for on in chain.active]
    start, _, rho = _feasible(chain)
    if chain.scale == 0 or rho == 0:
        return 0.0
    if not sum(sizes):
        return _certify(chain, start)[0]
    program = _program(chain, multipliers, start, rho)
    theta = _barrier(program) if solver == "barrier" else _cvxpy(program, solver)
    parts = (program.share @ theta[1:]).split(sizes)
    best = math.inf
    # At an optimum T - RMR is often singular, where the allowance is large: a step inside is tried.
    for room in (0.0, 1e-8, 1e-7, 1e-6):
        solved = []
        for k, (part, on) in enumerate(zip(parts, chain.active, strict=True)):
            solved.append(torch.zeros_like(chain.radius[k]))
            solved[-1][on] = part * (1 + room) ** (len(sizes) - k)
        best = min(best, _certify(chain, solved)[0])
    return best


class _Program(NamedTuple):
    """Minimise theta_0 subject to F = theta_0 E_x - Y + sum_i t_i (e_i e_i' - g_i g_i') >= 0."""

    maps: Tensor  # (a, N): g_i, the input to unit i as a function of (x, psi)
    offset: Tensor  # (N, N): Y
    inputs: int
    share: Tensor  # (a, k): t = share @ theta[1:]
    start: Tensor  # (1 + k,)

    def matrix(self, theta: Tensor) -> Tensor:
        t = self.share @ theta[1:]
        form = -self.offset - self.maps.mT @ (t[:, None] * self.maps)
        diagonal = torch.cat((theta[0].expand(self.inputs), t))
        return form + torch.diag(diagonal)


def _feasible(chain: _Chain) -> tuple[list[Tensor], Tensor, float]:
    """Multipliers well inside the feasible set: those of eclipse, half as large again."""
    form = torch.eye(len(chain.weights[-1]), dtype=torch.float64)
    found = []
    for k in range(len(chain.center) - 1, -1, -1):
        gram = chain.weights[k + 1].mT @ form @ chain.weights[k + 1]
        top = torch.linalg.eigvalsh((gram + gram.mT) / 2)[-1].clamp(min=0.0)
        t = 1.5 * chain.shape(k) * top
        if top == 0:
            return [torch.zeros_like(r) for r in chain.radius], form, 0.0
        form = _step(gram, chain.center[k], chain.radius[k], t)
        found.append(t)
    gram = chain.weights[0].mT @ form @ chain.weights[0]
    return found[::-1], form, torch.linalg.eigvalsh((gram + gram.mT) / 2)[-1].item()


def _program(chain: _Chain, multipliers: str, start: list[Tensor], rho: float) -> _Program:
    active = chain.active
    first = chain.weights[0]
    if first.shape[1] > first.shape[0]:  # only W W' matters: fewer inputs do
        first = torch.linalg.qr(first.mT)[1].mT
    inputs, total = first.shape[1], sum(len(on) for on in active)
    signal = torch.zeros(inputs, inputs + total, dtype=torch.float64)
    signal[:, :inputs] = torch.eye(inputs, dtype=torch.float64)
    maps, shares, column = [], [], inputs
    for k, weight in enumerate([first, *chain.weights[1:-1]]) if active else ():
        signal = weight @ signal
        on = active[k]
        maps.append(signal[on])
        signal = chain.center[k][:, None] * signal
        signal[on, column + torch.arange(len(on))] += chain.radius[k][on]
        column += len(on)
        if multipliers == "layer":
            shares.append(chain.shape(k)[on, None])
        else:
            groups = chain.group[k][on]
            shares.append((groups[:, None] == groups.unique()).double())
    signal = chain.weights[-1] @ signal
    share = torch.block_diag(*[s for s in shares if len(s)])
    t = torch.cat([t[on] for t, on in zip(start, active, strict=True)])
    theta = torch.cat((torch.tensor([1.2 * rho], dtype=torch.float64), share.mT @ t))
    theta[1:] /= (share**2).sum(0)  # least squares: exact, since t is of this form
    return _Program(torch.cat(maps), signal.mT @ signal, inputs, share, theta)


def _barrier(program: _Program) -> Tensor:
    """Path-following Newton method; only its point is used, never its value.

    Every term e e' - g g' has rank two, so that the Hessian of log det F is made of the squares of
    the entries of U F^{-1} U' with U the rows e and g: no tensor of order three is formed.
    """
    maps, inputs, share = program.maps, program.inputs, program.share
    a, size = maps.shape
    rows = torch.cat((torch.eye(size, dtype=torch.float64)[inputs:], maps))
    sign = torch.cat((torch.ones(a), -torch.ones(a))).double()
    unit = program.start  # the scale of each variable
    y = torch.ones_like(unit)
    # A whiff of all variables in the objective, lest one that does not matter runs away.
    cost = torch.full_like(unit, 1e-10 / len(unit))
    cost[0] = 1.0
    tau, last = float(size), 1e8 * size
    for _ in range(300):
        lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * y))
        if failed:
            break
        inverse = torch.cholesky_inverse(lower)
        products = rows @ inverse @ rows.mT
        mixed = rows @ inverse[:, :inputs]
        both = sign * products.diagonal()
        slope = torch.cat((inverse[:inputs, :inputs].trace()[None], share.mT @ _fold(both)))
        hessian = torch.empty(len(unit), len(unit), dtype=torch.float64)
        hessian[0, 0] = (inverse[:inputs, :inputs] ** 2).sum()
        hessian[0, 1:] = hessian[1:, 0] = share.mT @ _fold(sign * (mixed**2).sum(1))
        squares = sign[:, None] * products**2 * sign
        hessian[1:, 1:] = share.mT @ _fold(_fold(squares).mT).mT @ share
        gradient = tau * cost - unit * slope
        hessian = unit[:, None] * hessian * unit
        root = hessian.diagonal().rsqrt()
        scaled = root[:, None] * hessian * root + 1e-13 * torch.eye(len(unit)).double()
        move = -root * torch.linalg.solve(scaled, root * gradient)
        decrement = math.sqrt(max(-(gradient @ move).item(), 0.0))
        step = 1.0 if decrement < 0.25 else 1 / (1 + decrement)
        while torch.linalg.cholesky_ex(program.matrix(unit * (y + step * move)))[1] != 0:
            step /= 2
            if step < 1e-12:
                return unit * y
        y = y + step * move
        if decrement < 0.5:
            if tau * max(y[0].item(), 1e-6) >= last:
                return unit * y
            tau *= 10
    raise ValueError(
        f"solver 'barrier' did not converge on {a} units in 300 steps: use method='eclipse'"
    )


def _fold(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return first + second


def _cvxpy(program: _Program, solver: str) -> Tensor:
    try:
        import cvxpy  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"solver={solver!r} needs cvxpy: pip install 'lipbook[bounds]', or use solver='barrier'"
        ) from error
    if solver not in cvxpy.installed_solvers():
        raise ValueError(
            f"solver must be 'barrier' or one of {cvxpy.installed_solvers()}, got {solver!r}"
        )
    size = program.maps.shape[1]
    zero = torch.zeros_like(program.start)
    unit = program.start
    base = program.matrix(zero)
    columns = []
    for k in range(len(zero)):
        one = zero.clone()
        one[k] = unit[k]
        columns.append((program.matrix(one) - base).flatten())
    y = cvxpy.Variable(len(zero), nonneg=True)
    lmi = torch.stack(columns, 1).numpy() @ y + base.flatten().numpy()
    problem = cvxpy.Problem(
        cvxpy.Minimize(y[0]), [cvxpy.reshape(lmi, (size, size), order="C") >> 0]
    )
    try:
        problem.solve(solver=solver)
    except cvxpy.error.SolverError as error:
        raise ValueError(f"solver {solver!r} failed: {error}; use method='eclipse'") from error
    if y.value is None:
        raise ValueError(
            f"solver {solver!r} ended with status {problem.status!r} on {len(program.maps)} "
            "units: use solver='barrier' or method='eclipse'"
        )
    return unit * torch.from_numpy(np.asarray(y.value)).clamp(min=0.0)


# ----------------------------------------------------------------------- the exact constant


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


# ------------------------------------------------------------------------------ local bounds


def local_lipschitz_bound(
    module: nn.Module,
    center: Tensor,
    radius: float,
    p: float = 2,
    method: Literal["interval", "lipsdp"] = "interval",
) -> Bound:
    r"""Upper bound of the Lipschitz constant on a ball, from the slopes that units can have there.

    .. math::
        \lVert f(x) - f(y)\rVert_p \le L\, \lVert x - y\rVert_p \qquad
        \text{for all } x, y \text{ with } \lVert x - x_0\rVert_p,\,
        \lVert y - x_0\rVert_p \le r

    Intervals that hold the inputs of every unit are carried through the network. A ReLU whose
    interval does not meet 0 is on or off throughout the ball, and is no ReLU there; the
    slopes of tanh and sigmoid are bounded on the interval; other units keep
    :math:`[\alpha, \beta]`. Three bounds then hold for slopes in these intervals, and the smallest
    is returned: the product of norms, the norm of the interval
    :math:`\lvert J - \bar J\rvert \le E` of Jacobians, carried through by
    :math:`\bar J \leftarrow W C \bar J`, :math:`E \leftarrow \lvert W\rvert\,
    ((\lvert C\rvert + R) E + R\, \lvert\bar J\rvert)`, and for p = 2 :func:`eclipse_bound`, or
    :func:`lipsdp_bound` as well with ``method="lipsdp"``.

    **Guaranteed**: an upper bound on the ball; the exact constant if no unit is
    undecided (the kind says so).

    Parameters
    ----------
    module : torch.nn.Module
        Sequence of linear layers and activations on single units or on pairs.
    center : torch.Tensor
        :math:`x_0`, one sample without the batch dimension.
    radius : float
        :math:`r \ge 0`, in the :math:`\ell_p` norm.
    p : float
        1, 2 or :data:`math.inf`.
    method : str
        ``"interval"``, or ``"lipsdp"`` for p = 2.

    Returns
    -------
    Bound
        Of kind ``"upper bound"`` or ``"exact"``.

    Raises
    ------
    TypeError
        If ``center`` is no floating-point tensor.
    ValueError
        If the network is no such sequence, ``radius`` is negative or not finite, or ``method`` is
        unknown or not for this p.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.tensor([[1.0, 2.0]])  # x for x > 0, -2x for x < 0
    >>> [local_lipschitz_bound(net, torch.tensor([x]), 0.5).value for x in (1.0, -1.0)]
    [1.0, 2.0]
    """
    p = composition._exponent(p)
    if not isinstance(center, Tensor) or not center.is_floating_point():
        got = center.dtype if isinstance(center, Tensor) else type(center).__name__
        raise TypeError(f"center must be a floating-point tensor, got {got}")
    if not center.isfinite().all():
        raise ValueError("center must be finite, got NaN or infinite entries")
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and at least 0, got {radius}")
    if method not in ("interval", "lipsdp"):
        raise ValueError(f"method must be 'interval' or 'lipsdp', got {method!r}")
    if method == "lipsdp":
        _euclidean("lipsdp", p)
    shape = tuple(center.shape)
    whole = lipschitz_bound(module, shape, p)
    net = _dense_layers(module, shape)
    _diagonal("interval", net)
    units = _restrict(net, _values(center).flatten(), radius, p)

    masked = operator_norm(net.weights[0], p).item()
    jacobian, error = net.weights[0], torch.zeros_like(net.weights[0])  # |J - jacobian| <= error
    for weight, layer in zip(net.weights[1:], units, strict=True):
        masked *= operator_norm(weight * layer.steepest, p).item()
        spread = layer.steepest[:, None] * error + layer.radius[:, None] * jacobian.abs()
        jacobian, error = weight @ (layer.center[:, None] * jacobian), weight.abs() @ spread
    name = type(module).__name__
    title: dict[str, Any] = {"name": name, "input_shape": shape, "output_shape": whole.output_shape}
    if all(bool((layer.radius == 0).all()) for layer in units):
        return Bound(operator_norm(jacobian, p).item(), "exact", p, **title)
    values = [masked, operator_norm(jacobian.abs() + error, p).item()]
    if p == 2:
        values.append(operator_norm(jacobian).item() + operator_norm(error).item())
        chain = _chain(net.weights, units)
        values.append(_eclipse(chain))
        if method == "lipsdp":
            values.append(_lipsdp(chain, "neuron", "barrier"))
    value = min(whole.value, _widen(min(values), net, p))
    return Bound(value, "upper bound", p, **title)


def _restrict(net: _Net, center: Tensor, radius: float, p: float) -> list[_Units]:
    """Bound the slopes that units can have on the ball."""
    units = []
    middle, spread = center, torch.zeros_like(center)
    for k, layer in enumerate(net.units):
        weight, bias = net.weights[k], net.biases[k]
        reach = weight.abs() @ spread
        if k == 0:
            reach = radius * torch.linalg.vector_norm(weight, dual_exponent(p), dim=1)
        size = weight.abs() @ (middle.abs() + spread) + bias.abs() + reach
        reach = reach + 4 * EPS * (weight.shape[1] + 4) * size  # rounding
        low, high = weight @ middle + bias - reach, weight @ middle + bias + reach
        units.append(_slopes_between(layer, low, high))
        low, high = _images_between(layer, low, high)
        middle, spread = (low + high) / 2, (high - low) / 2
        spread = spread + 4 * EPS * (middle.abs() + spread)
    return units


def _slopes_between(layer: _Units, low: Tensor, high: Tensor) -> _Units:
    least, largest = layer.low, layer.high
    near = torch.maximum(low, -high).clamp(min=0.0)  # the smallest modulus in the interval
    far = torch.maximum(low.abs(), high.abs())
    if layer.pieces is not None:
        left, right = layer.pieces
        least = torch.where(low > 0, right, torch.where(high < 0, left, least))
        largest = torch.where(low > 0, right, torch.where(high < 0, left, largest))
    elif isinstance(layer.module, (nn.Tanh, nn.Sigmoid)):
        half = 0.5 if isinstance(layer.module, nn.Sigmoid) else 1.0
        slopes = [half**2 / torch.cosh(half * end).square() for end in (far, near)]
        least = (slopes[0] * (1 - 64 * EPS)).clamp(min=0.0)
        largest = torch.minimum(slopes[1] * (1 + 64 * EPS), layer.high)
    return dataclasses.replace(layer, low=least, high=largest)


def _images_between(layer: _Units, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    if layer.pieces is not None:
        left, right = layer.pieces
        ends = [torch.where(end < 0, left, right) * end for end in (low, high)]
        ends.append(torch.zeros_like(low).where((low < 0) & (high > 0), ends[0]))
        stacked = torch.stack(ends)
        return stacked.amin(0), stacked.amax(0)
    middle, spread = (low + high) / 2, (high - low) / 2
    with torch.no_grad():
        image, first, last = layer.module(torch.stack((middle, low, high)))
    reach = layer.steepest * spread
    slack = 64 * EPS * (1 + image.abs() + reach + layer.steepest * middle.abs())
    first, last = torch.minimum(first, image), torch.maximum(last, image)
    monotone = layer.low >= 0
    lower = torch.where(monotone, first, image - reach)
    return lower - slack, torch.where(monotone, last, image + reach) + slack
