r"""Rules: the questions that every layer answers, and what an answer is.

A network is a graph of layers, and whoever reads it asks each layer the same questions: by how much
may it stretch (:func:`lipschitz_rule`), on which values does it work (:func:`range_rule`), between
which slopes (:func:`slope_rule`), which matrix is it (:func:`affine_rule`). The answers of a layer
stand beside its definition; this room holds the questions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lipbook.norms.arguments import _real

__all__ = [
    "Affine",
    "Ball",
    "Bound",
    "Box",
    "Range",
    "affine_rule",
    "image_rule",
    "lipschitz_rule",
    "local_lipschitz_rule",
    "outward",
    "pullback_rule",
    "range_rule",
    "slope_rule",
]

Shape = tuple[int, ...]
Kind = Literal["exact", "upper bound", "lower bound", "estimate"]


@dataclasses.dataclass(frozen=True)
class Bound:
    r"""A number about a Lipschitz constant, with all that says what it means.

    Parameters
    ----------
    value : float
        The number, in units of output norm per unit of input norm.
    kind : str
        ``"exact"``, ``"upper bound"``, ``"lower bound"`` or ``"estimate"``.
    p : float
        Norm on both sides: 1, 2 or :data:`math.inf`.
    name : str
        Name in the parent and class of the module. :func:`lipschitz_bound` fills it in.
    parts : tuple of Bound
        Bounds of the children that ``value`` was made of.
    input_shape, output_shape : tuple of int
        Shapes without the batch dimension. :func:`lipschitz_bound` fills them in.
    witness : pair of torch.Tensor, optional
        Two points whose difference quotient proves a lower bound.
    code : str
        Line of the reader's code in which a node of a graph stands.
    so_far : float, optional
        Bound of the map from the input of the network to this node.

    Raises
    ------
    ValueError
        If ``value`` is negative or NaN, or ``kind`` or ``p`` is none of the above.

    Examples
    --------
    >>> print(Bound(2.5, "exact", 2, "Linear", output_shape=(3,)))
    2-norm  output shape  value  kind
    Linear  (3,)            2.5  exact
    """

    value: float
    kind: Kind
    p: float
    name: str = ""
    parts: tuple[Bound, ...] = ()
    input_shape: Shape = ()
    output_shape: Shape = ()
    witness: tuple[Tensor, Tensor] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    code: str = ""
    so_far: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if not self.value >= 0:
            raise ValueError(f"value must be a number >= 0, got {self.value}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        object.__setattr__(self, "p", _exponent(self.p))

    def __float__(self) -> float:
        return self.value

    def table(self) -> str:
        """Parts of a graph as text: node, shape, constant, product so far, line of code."""
        rows = [("node", "shape", "constant", "so far", "code")]
        rows += [
            (
                part.name,
                str(part.output_shape),
                f"{part.value:.6g}",
                "" if part.so_far is None else f"{part.so_far:.6g}",
                part.code,
            )
            for part in self.parts
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        )

    def __str__(self) -> str:
        header = (f"{_norm_name(self.p)}-norm", "output shape", "value", "kind")
        rows = [header, *self._rows(0)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {value:>{widths[2]}}  {kind}"
            for name, shape, value, kind in rows
        )

    def _rows(self, depth: int) -> Iterator[tuple[str, str, str, str]]:
        shape = str(self.output_shape)
        yield "  " * depth + self.name, shape, f"{self.value:.6g}", self.kind
        for part in self.parts:
            yield from part._rows(depth + 1)


@functools.singledispatch
def lipschitz_rule(module: nn.Module, input_shape: Shape, p: float) -> Bound:
    r"""Lipschitz rule of a module: what is asked of each class of layers.

    A :func:`functools.singledispatch` on the class of ``module``, which
    :func:`~lipbook.composition.lipschitz_bound` calls. A subclass inherits the rule of
    its parent as long as it does not redefine what is computed. A rule gets the shape of one sample
    and p in {1.0, 2.0, inf}, and returns a :class:`Bound` of kind ``"exact"`` or
    ``"upper bound"``. It may trust that the weights are real and finite and that the layer
    runs on this shape. The rule of a container bounds its children by that
    function (with ``name=``) and hands them over as ``parts``.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    input_shape : tuple of int
        Shape of one sample.
    p : float
        Exponent of the norm on both sides.

    Returns
    -------
    Bound
        Name and shapes may be left out.

    Raises
    ------
    TypeError
        For a class with no rule.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> class Halve(nn.Module):
    ...     def forward(self, inputs):
    ...         return inputs / 2
    >>> @lipschitz_rule.register
    ... def _(module: Halve, input_shape, p):
    ...     return Bound(0.5, "exact", p)
    >>> lipschitz_bound(nn.Sequential(Halve(), nn.ReLU(), Halve()), (3,)).value
    0.25
    """
    kind = type(module)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} has no Lipschitz rule: register one with "
        f"@lipschitz_rule.register for {kind.__qualname__}"
    )


# Modules that only call others: a graph goes through them. Modules above add theirs.
CONTAINERS: set[type[nn.Module]] = {nn.Sequential}

# Registries whose classes are layers of a graph. Rooms above add theirs.
LEAVES: list[Any] = [lipschitz_rule]

# Attributes that decide what calling a module computes, and that a rule therefore relies on.
_COMPUTATION = ("forward", "__call__", "_call_impl", "_conv_forward", "__iter__")


def _check(module: nn.Module) -> None:
    """Refuse a module that may not compute what the rule of its class is about."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise TypeError(
            "takes indices, which are no points of a normed space, so that no Lipschitz constant "
            "is defined: bound what comes behind it"
        )
    cls, registered = type(module), _registered(module)
    for name in _COMPUTATION if registered is not object else ():
        if name == "forward" and registered in CONTAINERS:
            continue  # which is traced
        if name in vars(module) or getattr(cls, name, None) is not getattr(registered, name, None):
            raise TypeError(
                f"{name} is redefined, so the Lipschitz rule of {registered.__name__} does not "
                f"apply: register one with @lipschitz_rule.register for {cls.__name__}"
            )
    weights: dict[str, Any] = {**module._parameters, **module._buffers}
    if parametrize.is_parametrized(module):
        twin = copy.deepcopy(module)  # since reading may change the state behind a weight
        versions = [buffer._version for buffer in twin.buffers()]
        for name in cast(nn.ModuleDict, twin.parametrizations):
            weights[name] = getattr(twin, name)
            _check_weight(name, weights[name])
            steady = torch.equal(weights[name], getattr(twin, name))
            if not steady or versions != [buffer._version for buffer in twin.buffers()]:
                raise ValueError(f"{name} is updated each time it is read: call .eval()")
    for name, weight in weights.items():
        _check_weight(name, weight)
    of_all = nn.modules.module  # which holds the hooks that run in every module
    hooks = {**of_all._global_forward_pre_hooks, **of_all._global_forward_hooks}
    hooks |= {**module._forward_pre_hooks, **module._forward_hooks}
    if hooks:
        names = [getattr(hook, "__qualname__", repr(hook)) for hook in hooks.values()]
        raise ValueError(f"forward hooks may change what it computes: remove them, got {names}")


def _check_weight(name: str, weight: Tensor | None) -> None:
    if weight is None:
        return
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(f"{name} has no values yet: initialise it first")
    if weight.is_complex():
        raise TypeError(f"{name} must be real, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _registered(module: nn.Module) -> type:
    """Class that the rule of the module was registered for."""
    return next(c for c in type(module).__mro__ if c in lipschitz_rule.registry)


# Note [plain copies]
# Copies are evaluated in float64, but a parametrized weight must keep the value that the layer
# uses, so it is computed first and cast then. remove_parametrizations() is no way to do that: it
# edits a class that the copy shares with the original.


def _plain_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with plain parameters in place of parametrized ones."""
    module = copy.deepcopy(module)
    for layer in list(module.modules()):
        vars(layer).pop("_compiled_call_impl", None)
        for name, weight in layer._parameters.items():
            if weight is not None and weight.is_inference():
                layer._parameters[name] = nn.Parameter(weight.detach().clone(), False)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_inference():
                layer._buffers[name] = buffer.clone()
        if parametrize.is_parametrized(layer):
            names = cast(nn.ModuleDict, layer.parametrizations)
            weights = {name: getattr(layer, name).detach() for name in names}
            del layer.parametrizations
            layer.__class__ = type(layer).__mro__[1]
            for name, weight in weights.items():
                layer.register_parameter(name, nn.Parameter(weight))
    return module


def _located(error: Exception, name: str, module: nn.Module) -> Exception:
    """Put ``name`` in front of the path that an error gathers on its way up."""
    path, cls, reason = getattr(error, "refused", ("", type(module).__name__, str(error)))
    path = ".".join(filter(None, (name, path)))
    message = f"{path!r} ({cls}): {reason}" if path else f"{cls}: {reason}"
    located = TypeError(message) if isinstance(error, TypeError) else ValueError(message)
    located.refused = (path, cls, reason)  # type: ignore[union-attr]
    return located


def _rule_of(*classes: type[nn.Module], dispatch: Any = lipschitz_rule) -> Callable[[Any], Any]:
    """Register one rule for several classes."""

    def register(rule: Any) -> Any:
        for cls in classes:
            dispatch.register(cls, rule)
        return rule

    return register


# ------------------------------------------------------------------------------ arguments


def _float64(weight: Tensor) -> Tensor:
    return weight.detach().double()


def _eye(n: int) -> Tensor:
    """Signals of length n with a single 1, as a batch with one channel: (n, 1, n)."""
    return torch.eye(n, dtype=torch.float64)[:, None]


def _axes(
    module: nn.Module, input_shape: Shape, *names: str, dims: int | None = None
) -> list[tuple[Any, ...]]:
    """Size of each spatial axis, with its entry of each of the attributes called ``names``."""
    dims = dims or int(_registered(module).__name__[-2])  # as in AvgPool2d
    if len(input_shape) != dims + 1:
        raise ValueError(f"input_shape must be channels and {dims} sizes, got {input_shape}")
    values = [getattr(module, name) for name in names]
    columns = [v if isinstance(v, (tuple, list)) else (v,) * dims for v in values]
    return list(zip(input_shape[1:], *columns, strict=True))


def _exponent(p: float) -> float:
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or math.inf, got {p!r}")
    return float(p)


def _norm_name(p: float) -> str:
    return "∞" if p == math.inf else f"{p:g}"


def _shape(input_shape: Sequence[int]) -> Shape:
    try:
        shape = tuple(input_shape)
    except TypeError:
        raise TypeError(
            f"input_shape must be a sequence of integers, got {input_shape!r}"
        ) from None
    if not shape or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
        raise ValueError(f"input_shape must hold one or more positive integers, got {shape}")
    return tuple(int(n) for n in shape)


# -------------------------------------------------------------------------------- domains

# Note [ranges]
# A range is a set of values that holds what a layer sees while the input runs through a domain: the
# box low <= v <= high and, where known, the Euclidean ball ||v - center|| <= radius. Both are
# convex, so that a bound of a layer's Jacobian on its range is a Lipschitz constant there.
# Ranges carry a batch in front: one domain for each sample, or one for all (batch 1). They are
# computed in float64 and widened by what rounding may hide, by `outward`.


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a number or a tensor, got {type(value).__name__}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Box:
    r"""Domain :math:`\{x : l \le x \le h\}`, entry by entry: images have ``Box(0, 1)``.

    Parameters
    ----------
    low, high : float or torch.Tensor
        :math:`l` and :math:`h`, numbers or of a shape that broadcasts to a sample.

    Raises
    ------
    ValueError
        If a bound is NaN or infinite, or the box is empty.

    Examples
    --------
    >>> Box(0, 1).enlarged(0.5, 2)
    Box(low=-0.5, high=1.5)
    """

    low: float | Tensor
    high: float | Tensor

    def __post_init__(self) -> None:
        low, high = _numbers("low", self.low), _numbers("high", self.high)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"low and high must be finite, got {self.low} and {self.high}")
        if not (low <= high).all():
            raise ValueError(f"low must not exceed high, got {self.low} and {self.high}")

    def enlarged(self, radius: float, p: float) -> Box:
        """Box that holds all points within a distance of this one, in any of the norms."""
        return Box(self.low - radius, self.high + radius)

    def range(self, shape: Shape) -> Range:
        """Range of a sample of this shape."""
        low, high = (
            _broadcast(name, side, shape) for name, side in (("low", self.low), ("high", self.high))
        )
        middle = (low + high) / 2
        radius = torch.linalg.vector_norm((high - low).flatten(1), dim=1) / 2 * (1 + 2.0**-40)
        return Range(low, high, middle, radius)


@dataclasses.dataclass(frozen=True)
class Ball:
    r"""Domain :math:`\{x : \lVert x - c\rVert_p \le r\}`.

    Parameters
    ----------
    center : torch.Tensor
        :math:`c`, of a shape that broadcasts to a sample.
    radius : float
        :math:`r \ge 0`.
    p : float
        1, 2 or :data:`math.inf`.

    Raises
    ------
    ValueError
        If the center is not finite, or the radius is negative, NaN or infinite.

    Examples
    --------
    >>> bool(Ball(torch.zeros(3), 1.0).range((3,)).high.min() >= 1)
    True
    """

    center: Tensor
    radius: float
    p: float = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", _numbers("center", self.center))
        _real("radius", self.radius)
        object.__setattr__(self, "radius", float(self.radius))
        object.__setattr__(self, "p", _exponent(self.p))
        if not self.center.isfinite().all():
            raise ValueError("center must be finite, got NaN or infinite entries")
        if not 0 <= self.radius < math.inf:
            raise ValueError(f"radius must be finite and at least 0, got {self.radius}")

    def enlarged(self, radius: float, p: float) -> Domain:
        """Set that holds all points within a distance of this one."""
        if p <= self.p:  # then the p-ball lies in the ball of the larger exponent
            return Ball(self.center, self.radius + radius, self.p)
        spread = self.radius + radius
        return Box(self.center - spread, self.center + spread)

    def range(self, shape: Shape) -> Range:
        """Range of a sample of this shape."""
        center = _broadcast("center", self.center, shape)
        spread = self.radius * (1 + 2.0**-40)
        entries = math.prod(shape) ** 0.5 if self.p == math.inf else 1.0
        radius = torch.full((1,), spread * entries * (1 + 2.0**-40), dtype=torch.float64)
        return Range(*outward(center - spread, center + spread), center, radius)


Domain = Box | Ball


def _broadcast(name: str, values: float | Tensor, shape: Shape) -> Tensor:
    values = torch.as_tensor(values).detach().double().cpu()
    try:
        return values.expand(shape)[None]
    except RuntimeError:
        raise ValueError(
            f"{name} of the domain must broadcast to a sample of shape {shape}, "
            f"got {tuple(values.shape)}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Range:
    r"""Values that a layer works on, see Note [ranges].

    Attributes
    ----------
    low, high : torch.Tensor
        Least and largest value of each entry, (batch, \*shape), float64.
    center : torch.Tensor or None
        Of a Euclidean ball that holds the values, (batch, \*shape).
    radius : torch.Tensor or None
        Of that ball, (batch,).
    lengths : torch.Tensor or None
        Upper bounds of the Euclidean norms along the last dimension, those of tokens,
        (batch, \*shape without its last entry).
    """

    low: Tensor
    high: Tensor
    center: Tensor | None = None
    radius: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """Shape of a sample."""
        return tuple(self.low.shape[1:])

    @property
    def middle(self) -> Tensor:
        """Middle of the box."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> Tensor:
        """Half the widths of the box, rounded up."""
        low, high = outward(self.low, self.high)
        return (high - low) / 2

    def abs(self) -> Tensor:
        """Largest modulus of each entry."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def norms(self, p: float = 2) -> Tensor:
        """Largest p-norm of a value, (batch,)."""
        norms = torch.linalg.vector_norm(self.abs().flatten(1), p, dim=1)
        if self.center is not None and self.radius is not None and p == 2:
            norms = torch.minimum(norms, self.center.flatten(1).norm(dim=1) + self.radius)
        return norms * (1 + 2.0**-40)

    def holds(self, values: Tensor) -> bool:
        """Whether a batch of values lies in the box."""
        return bool(((values >= self.low) & (values <= self.high)).all())


def outward(low: Tensor, high: Tensor, slack: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Widen an interval by a slack and by a relative 2^-45 for the rounding of its ends."""
    relative, tiny = 2.0**-45, 2.0**-1000
    return (
        low - (low.abs() * relative + slack + tiny),
        high + (high.abs() * relative + slack + tiny),
    )


@dataclasses.dataclass(frozen=True)
class Affine:
    r"""Affine layer :math:`v \mapsto A v + b` of one sample, as functions of a batch in float64.

    Attributes
    ----------
    apply, absolute, squares
        :math:`v \mapsto A v`, and entrywise bounds of :math:`|A| v` and :math:`(A \circ A) v` for
        nonnegative v, each from (batch, \*shape) to (batch, \*output shape). ``squares`` may be
        None.
    bias : torch.Tensor
        :math:`b`, (\*output shape).
    terms : int
        Most products in a sum.
    """

    apply: Callable[[Tensor], Tensor]
    absolute: Callable[[Tensor], Tensor]
    squares: Callable[[Tensor], Tensor] | None
    bias: Tensor
    terms: int

    def matrix(self, shape: Shape) -> Tensor:
        """Dense matrix A, (outputs, inputs)."""
        n = math.prod(shape)
        columns = self.apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
        return columns.reshape(n, -1).mT

    def range(self, values: Range) -> Range:
        """Range of the outputs."""
        gamma = (self.terms + 8) * 2.0**-52
        middle, half = values.middle, values.half
        image = self.apply(middle) + self.bias
        reach = self.absolute(half)
        size = self.absolute(middle.abs() + half) + self.bias.abs()
        slack = 2 * gamma * size
        low, high = outward(image - reach, image + reach, slack)
        if values.center is None or values.radius is None:
            return Range(low, high)
        center = self.apply(values.center) + self.bias
        off = gamma * (self.absolute(values.center.abs()) + self.bias.abs())
        if self.squares is not None:
            rows = self.squares(torch.ones_like(middle[:1])).clamp(min=0).sqrt() * (1 + 2 * gamma)
            spread = rows * values.radius.view(-1, *[1] * (rows.dim() - 1)) + off
            near, far = outward(center - spread, center + spread)
            low, high = torch.maximum(low, near), torch.minimum(high, far)
        return Range(low, high, center, off.flatten(1).norm(dim=1))


# ------------------------------------------------------------------- questions about values


@functools.singledispatch
def affine_rule(module: nn.Module, input_shape: Shape) -> Affine | None:
    r"""Matrix of an affine layer; ``None`` for a layer that is not affine.

    A :func:`functools.singledispatch` on the class of ``module``, whose weights are float64.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64 and without parametrizations.
    input_shape : tuple of int
        Shape of one sample.

    Returns
    -------
    Affine or None
    """
    return None


@functools.singledispatch
def slope_rule(module: nn.Module, values: Range | None) -> tuple[Any, Any] | None:
    r"""Least and largest slopes of an elementwise layer; ``None`` for one that is not.

    .. math::
        \alpha_i\, (x_i - y_i)^2 \le (\varphi_i(x_i) - \varphi_i(y_i))(x_i - y_i)
        \le \beta_i\, (x_i - y_i)^2

    for all x, y in the range.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    values : Range, optional
        What it sees; all real numbers if not given.

    Returns
    -------
    pair of torch.Tensor or float, or None
        :math:`\alpha` and :math:`\beta`, of a shape that broadcasts to the values.
    """
    return None


@functools.singledispatch
def range_rule(module: nn.Module, values: Range) -> Range:
    r"""Range rule of a class of layers: the values that it can return, given those that it sees.

    A layer without a rule gets one from its other answers: that of its matrix, or the ball around
    the image of the center, with the radius times the Lipschitz bound.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    values : Range
        What it sees.

    Returns
    -------
    Range
        Holds all outputs.
    """
    affine = affine_rule(module, values.shape)
    if affine is not None:
        image = affine.range(values)
        if image.center is None or values.radius is None or image.radius is None:
            return image
        stretch = local_lipschitz_rule(module, values, 2.0) * (1 + 2.0**-40)
        return dataclasses.replace(image, radius=values.radius * stretch + image.radius)
    return ball_range(module, values)


def ball_range(module: nn.Module, values: Range) -> Range:
    """Range of the outputs from the Lipschitz bound of a layer alone."""
    middle = values.middle
    image = module(middle.clone())
    wide = values.half.flatten(1).amax(1) * local_lipschitz_rule(module, values, math.inf)
    spread = wide.view(-1, *[1] * (image.dim() - 1)) * (1 + 2.0**-40)
    low, high = outward(image - spread, image + spread, image.abs() * 2.0**-36)
    if values.center is None or values.radius is None:
        return Range(low, high)
    center = module(values.center.clone())
    radius = values.radius * local_lipschitz_rule(module, values, 2.0) * (1 + 2.0**-40)
    radius = radius + center.flatten(1).norm(dim=1) * 2.0**-36
    reach = radius.view(-1, *[1] * (center.dim() - 1))
    near, far = outward(center - reach, center + reach)
    return Range(torch.maximum(low, near), torch.minimum(high, far), center, radius)


@functools.singledispatch
def image_rule(module: nn.Module, input_shape: Shape) -> Range | None:
    r"""Image rule of a class of layers: the values that it can return, whatever it sees.

    ``None`` for a layer whose outputs are not bounded, or not known to be. What stands behind a
    layer with bounded outputs works on a bounded set, even if the input may be anywhere: a join
    that is Lipschitz on bounded sets only, as attention is, has a constant there.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    input_shape : tuple of int
        Shape of one sample.

    Returns
    -------
    Range or None
        Of one sample (batch 1), holds all outputs.
    """
    return None


@functools.singledispatch
def local_lipschitz_rule(module: nn.Module, values: Range, p: float) -> Tensor:
    r"""Lipschitz rule on a domain: by how much a layer may stretch on the values that it sees.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    values : Range
        What it sees.
    p : float
        Exponent of the norm on both sides.

    Returns
    -------
    torch.Tensor
        An upper bound for each sample of the batch, (batch,), at most the global one.
    """
    slopes = slope_rule(module, values)
    if slopes is not None:
        low, high = (torch.as_tensor(side, dtype=torch.float64) for side in slopes)
        steepest = torch.maximum(low.abs(), high.abs()).expand_as(values.low)
        return steepest.flatten(1).amax(1)
    return torch.full_like(
        values.low.flatten(1)[:, 0], lipschitz_rule(module, values.shape, p).value
    )


@functools.singledispatch
def pullback_rule(
    module: nn.Module, cotangent: tuple[Tensor, Tensor], values: Range
) -> tuple[Tensor, Tensor] | None:
    r"""Carry an interval of rows of a Jacobian backwards through a layer.

    .. math:: \bar J \leftarrow \bar J A, \quad E \leftarrow E |A| \qquad\text{and}\qquad
        [\bar J \pm E] \leftarrow [\bar J \pm E] \odot [\alpha, \beta]

    for an affine layer and for an elementwise one.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in float64.
    cotangent : pair of torch.Tensor
        Center and radius behind the layer, (batch, k, \*output shape).
    values : Range
        What the layer sees.

    Returns
    -------
    pair of torch.Tensor, or None
        The same before the layer, or None where no interval is known.
    """
    center, radius = cotangent
    affine = affine_rule(module, values.shape)
    if affine is not None:
        batch, rows = center.shape[:2]
        off = (affine.terms + 8) * 2.0**-50

        def back(function: Callable[[Tensor], Tensor], rows_of: Tensor) -> Tensor:
            zero = torch.zeros(batch * rows, *values.shape, dtype=torch.float64)
            with torch.enable_grad():
                zero.requires_grad_()
                image = function(zero)
                (pulled,) = torch.autograd.grad(image, zero, rows_of.flatten(0, 1))
            return pulled.unflatten(0, (batch, rows))

        spread = back(affine.absolute, radius + off * center.abs())
        return back(affine.apply, center), spread * (1 + off)
    slopes = slope_rule(module, values)
    if slopes is None:
        return None
    low, high = (torch.as_tensor(side, dtype=torch.float64) for side in slopes)
    low, high = (side.expand_as(values.low)[:, None] for side in (low, high))
    middle, half = (low + high) / 2, (high - low) / 2
    spread = radius * (middle.abs() + half) + center.abs() * half
    image = center * middle
    return image, spread * (1 + 2.0**-45) + image.abs() * 2.0**-50
