r"""Elementwise layers of torch: slopes, global and on an interval, and ranges.

An elementwise layer applies functions :math:`\varphi_i` of one variable. With
:math:`\varphi' \in [\alpha, \beta]` on the values that it sees,

.. math:: \operatorname{Lip}_p = \max(|\alpha|, |\beta|) \quad\text{for every } p .

Each class has one entry in a table: its global slopes, how its slope runs, and where it turns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.errors import (
    _ELEMENTARY,
    Analysis,
    ForwardError,
    RangeAnalysis,
    _by_input,
    _check_single,
    _closed_form,
    _cuda_rule_of,
    _entrywise,
    _error_rule_of,
    _quantum,
    _relative,
    clipped_error,
    moved_error,
    plain_kernels,
    range_error_rule,
)
from lipbook.norms.rigorous import _UP
from lipbook.rules import (
    Bound,
    Range,
    Shape,
    _float64,
    _registered,
    _rule_of,
    lipschitz_rule,
    local_lipschitz_rule,
    outward,
    range_rule,
    slope_rule,
)
from lipbook.units import Units, elementwise_units, units_rule

__all__ = [
    "Absolute",
    "Exp",
    "Log",
    "Power",
    "Reciprocal",
    "Sine",
    "register_like",
    "register_rising",
]


class Absolute(nn.Module):
    r"""Absolute value of every entry: the activation of slope ±1 that keeps a gradient's norm.

    .. math:: x \mapsto |x|, \qquad \operatorname{Lip}_p = 1

    Examples
    --------
    >>> Absolute()(torch.tensor([-2.0, 3.0]))
    tensor([2., 3.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Take the modulus of each entry."""
        return x.abs()


class Power(nn.Module):
    r"""Power :math:`x \mapsto x^k` of every entry.

    Not Lipschitz on all of space, but for :math:`k = 1`; on a domain the slope
    :math:`k x^{k-1}` is bounded where x keeps away from 0, for k < 1.

    Parameters
    ----------
    exponent : float
        :math:`k`.
    """

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def extra_repr(self) -> str:
        """Show the exponent."""
        return f"{self.exponent:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Raise each entry to the power."""
        special = {0.5: torch.sqrt, -0.5: torch.rsqrt}.get(self.exponent)
        return special(x) if special is not None else x**self.exponent


class Exp(nn.Module):
    """Exponential of every entry; Lipschitz on domains that are bounded above."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the exponential of each entry."""
        return x.exp()


class Log(nn.Module):
    """Logarithm of every entry; Lipschitz on domains that keep away from 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the logarithm of each entry."""
        return x.log()


class Reciprocal(nn.Module):
    """Reciprocal of every entry; Lipschitz on domains that keep away from 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the reciprocal of each entry."""
        return x.reciprocal()


class Sine(nn.Module):
    r"""Sine of every entry, :math:`x \mapsto \sin(x + \omega)`.

    Parameters
    ----------
    phase : float
        0 for the sine, π/2 for the cosine.
    """

    def __init__(self, phase: float) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, x: Tensor) -> Tensor:
        """Take the sine or cosine of each entry."""
        return x.cos() if self.phase else x.sin()


# ----------------------------------------------------------------------------- the table

Slopes = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class _Curve:
    """What is known of a function of one variable."""

    extent: Callable[[Any], Slopes]  # global slopes
    local: Callable[[Any, Tensor, Tensor], Slopes] | None = None  # slopes on an interval
    turn: Callable[[Any], float] = lambda m: -math.inf  # falls before, rises behind
    positive: bool = False  # defined for positive numbers only
    exact: bool = False  # its slopes are numbers without rounding
    # points where the slope changes, and the slopes before, between and behind them
    kinks: Callable[[Any], tuple[list[Any], list[Any]]] | None = None


def _pieces(left: Callable[[Any], Any], at: Callable[[Any], float] = lambda m: 0.0) -> _Curve:
    """Two linear pieces, of slope ``left`` before a point and 1 behind."""

    def extent(m: Any) -> Slopes:
        slope = torch.as_tensor(left(m), dtype=torch.float64)
        return slope.clamp(max=1.0), slope.clamp(min=1.0)

    def local(m: Any, low: Tensor, high: Tensor) -> Slopes:
        slope = _per_channel(torch.as_tensor(left(m), dtype=torch.float64), low)
        one = torch.ones_like(low)
        first = torch.where(low >= at(m), one, slope * one)
        last = torch.where(high <= at(m), slope * one, one)
        return torch.minimum(first, last), torch.maximum(first, last)

    def turn(m: Any) -> float:
        return 0.0 if bool((torch.as_tensor(left(m)) < 0).any()) else -math.inf

    return _Curve(extent, local, turn, exact=True, kinks=lambda m: ([at(m)], [left(m), 1.0]))


def _per_channel(slope: Tensor, values: Tensor) -> Tensor:
    """Slopes of the channels of a batch, dimension 1."""
    return slope.view(-1, *[1] * (values.dim() - 2)) if slope.dim() and slope.numel() > 1 else slope


def _clip(low: Callable[[Any], float], high: Callable[[Any], float]) -> _Curve:
    def local(m: Any, least: Tensor, most: Tensor) -> Slopes:
        inside = ((least >= low(m)) & (most <= high(m))).double()
        reached = ((most > low(m)) & (least < high(m))).double()
        return inside, reached

    def kinks(m: Any) -> tuple[list[Any], list[Any]]:
        return [low(m), high(m)], [0.0, 1.0, 0.0]

    return _Curve(lambda m: (0.0, 1.0), local, exact=True, kinks=kinks)


def _rising(
    extent: Callable[[Any], Slopes],
    slope: Callable[[Any, Tensor], Tensor],
    turn: float = -math.inf,
) -> _Curve:
    """Slopes that grow with x."""
    return _Curve(extent, lambda m, low, high: (slope(m, low), slope(m, high)), lambda m: turn)


def _bell(extent: Callable[[Any], Slopes], slope: Callable[[Any, Tensor], Tensor]) -> _Curve:
    """Slopes that depend on |x| and fall with it."""

    def local(m: Any, low: Tensor, high: Tensor) -> Slopes:
        near = torch.maximum(low, -high).clamp(min=0)
        return slope(m, torch.maximum(low.abs(), high.abs())), slope(m, near)

    return _Curve(extent, local)


def _elu_slopes(m: Any) -> Slopes:
    return min(0.0, m.alpha), max(1.0, m.alpha)


def _elu_local(m: Any, low: Tensor, high: Tensor) -> Slopes:
    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, m.alpha * x.clamp(max=0).exp())

    first, last = slope(low), slope(high)
    least, most = torch.minimum(first, last), torch.maximum(first, last)
    crosses = (low <= 0) & (high >= 0)  # where the slope may jump from alpha to 1
    least = torch.where(crosses, least.clamp(max=min(1.0, m.alpha)), least)
    return least, torch.where(crosses, most.clamp(min=max(1.0, m.alpha)), most)


_GELU = (1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi)  # 1.1289, at sqrt 2
_SILU = 1.0998393201288670  # at 2.3994
_SELU = 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
_MISH = 1.0884981612517279  # at 1.4906

# sup and inf of phi', on paper, or to double precision where the extreme solves a transcendental
# equation. The slopes of GELU and SiLU mirror each other at 1/2.
_CURVES: dict[type[nn.Module], _Curve] = {
    Absolute: _pieces(lambda m: -1.0),
    nn.ReLU: _pieces(lambda m: 0.0),
    nn.LeakyReLU: _pieces(lambda m: m.negative_slope),
    nn.PReLU: _pieces(lambda m: _float64(m.weight)),
    nn.RReLU: _pieces(lambda m: (m.lower + m.upper) / 2),
    nn.ReLU6: _clip(lambda m: 0.0, lambda m: 6.0),
    nn.Hardtanh: _clip(lambda m: m.min_val, lambda m: m.max_val),
    nn.CELU: _rising(
        lambda m: (0.0, 1.0) if m.alpha > 0 else (-math.inf, math.inf),
        lambda m, x: (x / m.alpha).clamp(max=0).exp(),
    ),
    nn.ELU: _Curve(_elu_slopes, _elu_local, lambda m: 0.0 if m.alpha < 0 else -math.inf),
    nn.SELU: _Curve(lambda m: (0.0, _SELU)),
    nn.GELU: _Curve(
        lambda m: {
            "none": (1 - _GELU, _GELU),
            "tanh": (1 - 1.1289930686587718, 1.1289930686587718),  # at 1.4185
        }[m.approximate],
        turn=lambda m: {"none": -0.7517915246935645, "tanh": -0.7524614220710162}[m.approximate],
    ),
    nn.SiLU: _Curve(lambda m: (1 - _SILU, _SILU), turn=lambda m: -1.2784645427610738),
    nn.Mish: _Curve(lambda m: (-_MISH, _MISH), turn=lambda m: -1.1924296110664296),
    nn.Hardswish: _Curve(lambda m: (-0.5, 1.5), turn=lambda m: -1.5),  # at -3 and 3
    nn.Hardsigmoid: _Curve(
        lambda m: (0.0, 1 / 6), kinks=lambda m: ([-3.0, 3.0], [0.0, 1 / 6, 0.0])
    ),
    nn.LogSigmoid: _Curve(
        lambda m: (0.0, 1.0), lambda m, low, high: ((-high).sigmoid(), (-low).sigmoid())
    ),
    nn.Sigmoid: _bell(lambda m: (0.0, 0.25), lambda m, x: x.sigmoid() * (-x).sigmoid()),
    nn.Tanh: _bell(lambda m: (0.0, 1.0), lambda m, x: x.cosh().pow(-2)),
    nn.Softsign: _bell(lambda m: (0.0, 1.0), lambda m, x: (1 + x).pow(-2)),
    # torch.nn.Softplus jumps by log(1 + exp(-threshold)) / beta where it turns linear: 2e-9 at
    # the default threshold of 20, which is taken for rounding.
    nn.Softplus: _Curve(
        lambda m: (0.0, 1.0) if m.threshold >= 20 and m.beta > 0 else (-math.inf, math.inf)
    ),
    nn.Softshrink: _Curve(
        lambda m: (0.0, 1.0), kinks=lambda m: ([-m.lambd, m.lambd], [1.0, 0.0, 1.0])
    ),
    nn.Tanhshrink: _Curve(lambda m: (0.0, 1.0)),
    nn.Threshold: _Curve(
        lambda m: (0.0, 1.0) if m.value == m.threshold else (-math.inf, math.inf),
        kinks=lambda m: ([m.threshold], [0.0, 1.0]),
    ),
    nn.Hardshrink: _Curve(
        lambda m: (1.0, 1.0) if m.lambd == 0 else (-math.inf, math.inf),
        kinks=lambda m: ([0.0], [1.0, 1.0]),
    ),
    nn.GLU: _Curve(lambda m: (-math.inf, math.inf)),  # a product of two halves of the input
    Sine: _Curve(lambda m: (-1.0, 1.0), turn=lambda m: math.nan),
    Exp: _rising(lambda m: (0.0, math.inf), lambda m, x: x.exp()),
    Log: _Curve(lambda m: (0.0, math.inf), lambda m, low, high: (1 / high, 1 / low), positive=True),
    Reciprocal: _Curve(
        lambda m: (-math.inf, 0.0),
        lambda m, low, high: (-1 / low**2, -1 / high**2),
        positive=True,
    ),
}


def _power(m: Power) -> _Curve:
    k = m.exponent
    everywhere = k >= 1 and k == int(k)

    def slope(x: Tensor) -> Tensor:
        return k * x ** (k - 1)

    def local(_: Any, low: Tensor, high: Tensor) -> Slopes:
        ends = torch.stack([slope(low), slope(high)])
        least, most = ends.amin(0), ends.amax(0)
        if everywhere and k % 2:  # an even slope, 0 at 0 (1 for k = 1)
            crosses = (low < 0) & (high > 0)
            least = torch.where(crosses, slope(torch.zeros_like(low)), least)
        return least, most

    extent = (1.0, 1.0) if k == 1 else (-math.inf, math.inf)
    even = everywhere and k % 2 == 0
    return _Curve(
        lambda _: extent,
        local,
        turn=lambda _: 0.0 if even else -math.inf,
        positive=not everywhere,
    )


def _curve(module: nn.Module) -> _Curve:
    return _power(module) if isinstance(module, Power) else _CURVES[_registered(module)]


_ELEMENTWISE = (*_CURVES, Power)


def register_like(cls: type[nn.Module], known: type[nn.Module]) -> None:
    """Give a class the answers of one that computes the same function."""
    _register(cls, _CURVES[known])


def register_rising(
    cls: type[nn.Module], slope: Callable[[Any, Tensor], Tensor], least: float, most: float
) -> None:
    """Give a class the answers of a function with a minimum at 0, whose slope rises all the way."""
    _register(cls, _rising(lambda m: (least, most), slope, turn=0.0))


def _register(cls: type[nn.Module], curve: _Curve) -> None:
    _CURVES[cls] = curve
    rules: tuple[Any, ...] = (lipschitz_rule, slope_rule, range_rule, units_rule)
    for rule in rules:
        rule.register(cls, rule.dispatch(nn.ReLU))


def _largest(module: nn.Module) -> float:
    """Return the largest modulus of a slope on all of space."""
    low, high = _curve(module).extent(module)
    ends = torch.stack(
        [torch.as_tensor(side, dtype=torch.float64).abs().max() for side in (low, high)]
    )
    return float(ends.max())


def _check_random(module: Any) -> None:
    if isinstance(module, nn.RReLU) and module.training:
        raise ValueError("is random in training mode: call .eval()")


@_rule_of(*_ELEMENTWISE)
def _(module: nn.Module, input_shape: Shape, p: float) -> Bound:
    _check_random(module)
    slope = _largest(module)
    if slope == math.inf:
        raise ValueError(
            f"is not Lipschitz on all of space: {module} has unbounded slope or jumps; where "
            "its slope is bounded on a domain, give one: lipschitz_bound(..., domain=Box(0, 1))"
        )
    return Bound(slope, "exact", p)


@_rule_of(*_ELEMENTWISE, dispatch=slope_rule)
def _(module: nn.Module, values: Range | None) -> Slopes | None:
    _check_random(module)
    if isinstance(module, nn.GLU):
        return None  # which is not elementwise
    curve = _curve(module)
    extent = curve.extent(module)
    if values is None or curve.local is None:
        if math.inf in (abs(float(torch.as_tensor(side).abs().max())) for side in extent):
            raise ValueError(f"is not Lipschitz: {module} has unbounded slope or jumps")
        low, high = (torch.as_tensor(side, dtype=torch.float64) for side in extent)
        if values is not None:
            low, high = (_per_channel(side, values.low) for side in (low, high))
        return low, high
    _check_values(curve, module, values)
    low, high = curve.local(module, values.low, values.high)
    if curve.exact:
        return low, high
    low, high = outward(low, high)
    # Rounded up a slope may exceed the global bound, which holds too.
    least, most = (
        _per_channel(torch.as_tensor(side, dtype=torch.float64), values.low) for side in extent
    )
    return torch.maximum(low, least.expand_as(low)), torch.minimum(high, most.expand_as(high))


@_rule_of(*_ELEMENTWISE, dispatch=units_rule)
def _(module: nn.Module, input_shape: Shape) -> Units | None:
    slopes = units_rule.dispatch(object)(module, input_shape)  # which refuses jumps
    kinks = _curve(module).kinks
    return slopes if kinks is None else elementwise_units(module, input_shape, *kinks(module))


def _check_values(curve: _Curve, module: nn.Module, values: Range) -> None:
    if curve.positive and not bool((values.low > 0).all()):
        raise ValueError(
            f"{module} needs values above 0, but on the domain they reach "
            f"{values.low.min().item():.6g}: give a smaller domain, or add a constant before it"
        )


@_rule_of(*_ELEMENTWISE, dispatch=range_rule)
def _(module: nn.Module, values: Range) -> Range:
    curve = _curve(module)
    if isinstance(module, nn.GLU):
        return _glu_range(module, values)
    _check_values(curve, module, values)
    turn = curve.turn(module)
    if math.isnan(turn):
        low, high = torch.full_like(values.low, -1.0), torch.full_like(values.low, 1.0)
    else:
        ends = [module(end.clone()) for end in (values.low, values.high)]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        if turn > -math.inf:
            least = module(
                torch.minimum(torch.maximum(values.low, _full(turn, values)), values.high)
            )
            low = torch.minimum(low, least)
            high = torch.maximum(high, least)
    slack = values.abs() * 2.0**-45 if curve.local is None else 0.0
    low, high = outward(low, high, slack)
    if values.center is None or values.radius is None:
        return Range(low, high)
    stretch = local_lipschitz_rule(module, values, 2.0)
    center = module(values.center.clone())
    radius = values.radius * stretch * (1 + 2.0**-40)
    return Range(low, high, center, radius + values.norms() * stretch * 2.0**-45)


def _full(value: float, values: Range) -> Tensor:
    return torch.full_like(values.low, value)


@local_lipschitz_rule.register
def _(module: nn.GLU, values: Range, p: float) -> Tensor:
    r"""Bound a ⊙ σ(b), whose gate is at most 1 and has a slope of at most 1/4."""
    a = Range(*(side.chunk(2, module.dim)[0] for side in (values.low, values.high)))
    b = Range(*(side.chunk(2, module.dim)[1] for side in (values.low, values.high)))
    gate = b.high.sigmoid() * (1 + 2.0**-40)
    steep = a.abs() * slope_rule(nn.Sigmoid(), b)[1]  # type: ignore[index]
    if p == 2:  # each output reads one entry of a and one of b
        rows: Tensor = (gate**2 + steep**2).sqrt()
    elif p == 1:
        rows = torch.maximum(gate, steep)
    else:
        rows = gate + steep
    return rows.flatten(1).amax(1) * (1 + 2.0**-40)


def _glu_range(module: nn.GLU, values: Range) -> Range:
    (a_low, b_low), (a_high, b_high) = (
        side.chunk(2, module.dim) for side in (values.low, values.high)
    )
    gates = b_low.sigmoid(), b_high.sigmoid()
    ends = torch.stack([a * gate for a in (a_low, a_high) for gate in gates])
    return Range(*outward(ends.amin(0), ends.amax(0)))


# ------------------------------------------------------------------- errors of programs

_error_rule_of(nn.ReLU, nn.ReLU6, Absolute)(moved_error)
_cuda_rule_of(nn.ReLU, nn.ReLU6, Absolute, nn.Hardtanh, nn.LeakyReLU, nn.PReLU)(plain_kernels)


@_error_rule_of(nn.Hardtanh)
def _(module: nn.Hardtanh, example: Tensor, p: float) -> Analysis:
    return clipped_error(module, example, p, (module.min_val, module.max_val))


@_error_rule_of(nn.LeakyReLU, nn.PReLU, nn.RReLU)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    return lambda x: _relative(module, x, p, lipschitz, 3)  # the slope and the product


# Note [errors of elementwise functions]
# E stands for the error of an elementary function, 64u (Note [elementary functions]).
#
# Relative to the output: tanh (E); sigmoid 1 / (1 + exp(-x)), whose denominator is off by E at
# most, and two roundings; softsign, hardsigmoid and hardswish, which are a few sums, products and
# quotients of one sign: x + 3 is rounded once, and clipped at 0 and at 6 as the exact sum is, up to
# that rounding.
#
# Relative to the input: GELU is x/2 (1 + erf(x / √2)). The argument is off by 3u, which moves erf
# by at most 3u max |z erf'(z)| <= 2u, erf itself by 32u, and 1 + erf is at most 2 before it is
# rounded: 20u |x| in all. With tanh, the argument √(2/π) (x + 0.044715 x³) is a sum of numbers of
# one sign and off by 10u, which moves tanh by at most 10u max |z tanh'(z)| <= 5u: with E and the
# last roundings 40u |x|. SiLU: x times a sigmoid that is off by E + 4u. Mish: softplus here is off
# by a relative 2E + 2u, and tanh has the condition number 1 at most: 3E + 8u. Tanhshrink:
# |tanh x| <= |x|.
#
# Absolute: exp - 1 with exp <= 1 is off by E + 2u, so ELU, CELU and SELU by (E + 8u) alpha for
# negative inputs, and by three roundings of the output for others; where CELU and SELU divide
# the input or multiply it, |z e^z| <= 1 covers its rounding. Sines are assumed to be off by 16u.
#
# Softplus log(1 + exp(bx)) / b: exp(bx) is off by E + |bx|u, of which softplus keeps a share
# p/(p + 1) b / log(1 + p) <= 1 as a relative error, and log1p adds E: 2E + 8u of the output,
# 4u |x| of the input as sigmoid <= 1. Beyond the threshold x is returned, which is off by
# exp(-threshold) / b at most. Logsigmoid is -softplus(-x), with no threshold.

_RELATIVE: dict[type[nn.Module], int] = {
    nn.Tanh: _ELEMENTARY,
    nn.Sigmoid: _ELEMENTARY + 4,
    nn.Softsign: 4,
    nn.Hardsigmoid: 6,
    nn.Hardswish: 8,
}
_BY_INPUT: dict[type[nn.Module], Callable[[Any], int]] = {
    nn.GELU: lambda m: _ELEMENTARY,
    nn.SiLU: lambda m: _ELEMENTARY + 8,
    nn.Mish: lambda m: 4 * _ELEMENTARY,
    nn.Tanhshrink: lambda m: _ELEMENTARY + 4,
}


@_error_rule_of(*_RELATIVE)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    lipschitz = _closed_form(module, example, p)
    roundings = next(_RELATIVE[c] for c in type(module).__mro__ if c in _RELATIVE)
    return lambda x: _relative(module, x, p, lipschitz, roundings)


@_error_rule_of(*_BY_INPUT)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    lipschitz = _closed_form(module, example, p)
    units = next(_BY_INPUT[c] for c in type(module).__mro__ if c in _BY_INPUT)(module)
    return lambda x: _by_input(module, x, p, lipschitz, units)


@_error_rule_of(nn.ELU, nn.CELU, nn.SELU)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    lipschitz = _closed_form(module, example, p)
    alpha = abs(getattr(module, "alpha", 2.0))
    constant = (_ELEMENTARY + 16) * max(1.0, alpha) * torch.finfo(example.dtype).eps
    return lambda x: _by_input(module, x, p, lipschitz, 4 * max(1.0, lipschitz), constant)


@_error_rule_of(nn.Softplus, nn.LogSigmoid)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    lipschitz = _closed_form(module, example, p)
    beta, threshold = getattr(module, "beta", 1.0), getattr(module, "threshold", math.inf)
    if isinstance(module, nn.Softplus) and math.exp(min(threshold, 709.0)) > (
        torch.finfo(example.dtype).max / 8
    ):
        raise ValueError(
            f"its exponential overflows below the threshold of {threshold:g}: use 20, or "
            "sound=False"
        )
    jump = math.exp(-threshold) / beta * _UP

    def analysis(x: Tensor) -> ForwardError:
        result = _relative(module, x, p, lipschitz, 2 * _ELEMENTARY + 8)
        other = _by_input(module, x, p, lipschitz, 4.0, jump)
        return dataclasses.replace(
            result,
            error=(result.error + other.error) * _UP,
            slope=(result.slope + other.slope) * _UP,
            limit=torch.minimum(result.limit, other.limit / max(beta, 1.0)),
        )

    return analysis


@_error_rule_of(nn.Softshrink)
def _(module: nn.Softshrink, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    constant = abs(module.lambd) * torch.finfo(example.dtype).eps
    return lambda x: _by_input(module, x, p, 1.0, 2, constant)


@_error_rule_of(nn.Threshold)
def _(module: nn.Threshold, example: Tensor, p: float) -> Analysis:
    return clipped_error(module, example, p, (module.value,))


@_error_rule_of(Sine)
def _(module: Sine, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    constant = 16 * torch.finfo(example.dtype).eps
    return lambda x: _by_input(module, x, p, 1.0, 2, constant)


@_rule_of(Exp, Log, Reciprocal, Power, nn.GLU, dispatch=range_error_rule)
def _(module: Any, example: Tensor, p: float) -> RangeAnalysis:
    r"""Errors relative to the largest output of each entry.

    One rounding for quotients and roots, :math:`k - 1` for a small power, E for the others, and
    :math:`|k \log x|` times the rounding of an exponent :math:`k` that the dtype does not hold.
    GLU: a product with a sigmoid.
    """
    _check_single(example)
    dtype = example.dtype
    info = torch.finfo(dtype)

    def analysis(values: Range) -> Tensor:
        size = range_rule(module, values).abs()
        units = torch.full_like(size, _ELEMENTARY + 8.0)
        if isinstance(module, Power):
            k = module.exponent
            if k != torch.tensor(k, dtype=dtype).item():
                units = units + 2 * abs(k) * torch.maximum(
                    values.low.log().abs(), values.high.log().abs()
                )
        gamma = units * info.eps / 2
        error = gamma * (1 + gamma) * size + units * _quantum(dtype) * (1 + values.abs().amax())
        error = torch.where(size <= info.max / 8, error, math.inf)
        if not isinstance(module, nn.GLU) and _curve(module).positive:
            error = torch.where(values.low >= info.tiny, error, math.inf)  # flushed to 0
        return _entrywise(error, p)

    return analysis
