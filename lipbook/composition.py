r"""Lipschitz composition: bounds of networks from bounds of their layers.

A map :math:`f` is :math:`L`-Lipschitz when
:math:`\lVert f(x) - f(y)\rVert_p \le L\,\lVert x - y\rVert_p` for all :math:`x, y`; its Lipschitz
constant :math:`\operatorname{Lip}(f)` is the least such :math:`L`. Constants multiply along
compositions and add along sums. :func:`lipschitz_bound` walks a network and does that
arithmetic from above, :func:`lipschitz_lower_bound` searches two points that show how far the
result can be from the truth. A layer joins by one function, registered with
:func:`lipschitz_rule`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lipbook.norms import (
    convolution_norm_bound,
    convolution_norm_is_exact,
    operator_norm,
)

__all__ = [
    "Bound",
    "Residual",
    "Sum",
    "lipschitz_bound",
    "lipschitz_lower_bound",
    "lipschitz_rule",
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if not self.value >= 0:
            raise ValueError(f"value must be a number >= 0, got {self.value}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        object.__setattr__(self, "p", _exponent(self.p))

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


class Residual(nn.Module):
    r"""Residual block :math:`x \mapsto x + g(x)`, with a Lipschitz rule.

    .. math:: \operatorname{Lip}(\mathrm{id} + g) \le 1 + \operatorname{Lip}(g)

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`, whose outputs have the shape of its inputs.

    Raises
    ------
    ValueError
        When called, if the branch changes the shape: broadcasting has a norm of its own.

    Examples
    --------
    >>> block = Residual(nn.Tanh())
    >>> lipschitz_bound(block, (3,)).value
    2.0
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, inputs: Tensor) -> Tensor:
        """Add the branch to a batch of inputs; the shape stays."""
        outputs = self.branch(inputs)
        if outputs.shape != inputs.shape:
            raise ValueError(
                f"branch must keep the shape {tuple(inputs.shape)}, got {tuple(outputs.shape)}"
            )
        return inputs + outputs


class Sum(nn.Module):
    r"""Sum of branches :math:`x \mapsto \sum_i g_i(x)`, with a Lipschitz rule.

    .. math:: \operatorname{Lip}\Big(\sum_i g_i\Big) \le \sum_i \operatorname{Lip}(g_i)

    Parameters
    ----------
    *branches : torch.nn.Module
        One or more modules :math:`g_i` with outputs of one shape.

    Raises
    ------
    ValueError
        If there is no branch; when called, if the shapes of two branches differ.

    Examples
    --------
    >>> lipschitz_bound(Sum(nn.Tanh(), nn.Sigmoid()), (3,)).value
    1.25
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches must hold at least one module, got none")
        self.branches = nn.ModuleList(branches)

    def forward(self, inputs: Tensor) -> Tensor:
        """Sum the outputs of the branches on a batch of inputs."""
        outputs = [branch(inputs) for branch in self.branches]
        shapes = {tuple(output.shape) for output in outputs}
        if len(shapes) > 1:
            raise ValueError(f"branches must agree on the output shape, got {sorted(shapes)}")
        return functools.reduce(torch.add, outputs)


# ------------------------------------------------------------------------------- the walk


def lipschitz_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    method: str = "product",
    *,
    name: str = "",
    **options: Any,
) -> Bound:
    r"""Upper bound of the Lipschitz constant of a network, composed from its layers.

    .. math::
        \operatorname{Lip}(f_L \circ \dots \circ f_1) \le \prod_l \operatorname{Lip}(f_l), \qquad
        \operatorname{Lip}(f + g) \le \operatorname{Lip}(f) + \operatorname{Lip}(g)

    The result holds for all real inputs of the given shape, in the :math:`\ell_p` norm of all
    entries of a sample on both sides, for the module with its present weights in real arithmetic.
    Weights are read in their own dtype (a parametrized weight as the layer uses it) and all
    that follows is float64: a value is off by rounding, some units of 1e-15 relative a layer.
    A single layer is mostly ``"exact"``; a product of exact constants is an upper bound, since
    nothing makes the directions that two layers stretch most meet.

    Layers are looked up with :func:`lipschitz_rule`, and a network whose bound cannot be vouched
    for is refused.

    Parameters
    ----------
    module : torch.nn.Module
        The network. It is not changed: trial runs use a copy.
    input_shape : sequence of int
        Shape of one sample, without the batch dimension: ``(1, 28, 28)``, not ``(28, 28)``.
    p : float
        1, 2 or :data:`math.inf`.
    method : str
        ``"product"``, or a bound that looks at several layers at once: ``"absolute"``,
        ``"averaged"``, ``"eclipse"``, ``"seqlip"``, ``"lipsdp-layer"``, ``"lipsdp"`` or
        ``"exact"``. They cost more, are for dense networks only, and live in
        :mod:`lipbook.tightness`. Their bounds have no parts.
    name : str
        Name of the module in its parent, for the table and for errors. Rules of containers
        pass it when they bound a child by this function.
    **options
        Of the method; the product bound has none.

    Returns
    -------
    Bound
        With kind ``"exact"`` or ``"upper bound"`` and one part for each child.

    Raises
    ------
    TypeError
        If a module has no rule (the message says what to register), redefines the computation
        of the class that the rule is for, or has complex weights; if the method has no such option.
    ValueError
        If ``method`` is none of the above, or refuses the network.
        If a module has forward hooks, NaN or infinite weights, a weight that changes when it is
        read (:func:`torch.nn.utils.parametrizations.spectral_norm` in training mode), is in
        training mode where that changes its function, is not Lipschitz, or does not fit
        the shape. All messages give the path of the module.

    Examples
    --------
    Two layers of norm 1 whose product is 0: the bound holds and is as loose as can be.

    >>> first, second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    >>> first.weight.data, second.weight.data = torch.eye(2)[:, :1], torch.eye(2)[1:]
    >>> print(lipschitz_bound(nn.Sequential(first, second), (1,)))
    2-norm      output shape  value  kind
    Sequential  (1,)              1  upper bound
      0 Linear  (2,)              1  exact
      1 Linear  (1,)              1  exact
    >>> (second.weight @ first.weight).item()
    0.0

    References
    ----------
    The product bound is as old as :cite:t:`szegedy2014` in this field;
    :cite:t:`virmaux2018` (AutoLip) extend it to any computation graph.
    """
    p = _exponent(p)
    shape = _shape(input_shape)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    title = f"{name} {type(module).__name__}".strip()
    if method != "product":
        bound = _method(method)(module, shape, p, **options)
        return dataclasses.replace(bound, name=title, input_shape=shape)
    if options:
        raise TypeError(f"method 'product' takes no options, got {sorted(options)}")
    try:
        _check(module)
        children = [child for child, _ in module.named_children() if child != "parametrizations"]
        is_layer = not children and _registered(module) is not object
        output_shape = _run(module, shape)[0] if is_layer else ()
        bound = lipschitz_rule(module, shape, p)
        if not isinstance(bound, Bound):
            raise TypeError(f"its Lipschitz rule must return a Bound, got {type(bound).__name__}")
        if bound.kind not in ("exact", "upper bound") or bound.p != p:
            raise ValueError(
                f"its Lipschitz rule must return an exact value or an upper bound for p={p:g}, "
                f"got: {bound.kind} for p={bound.p:g}"
            )
        output_shape = output_shape or bound.output_shape or _run(module, shape)[0]
    except (TypeError, ValueError) as error:
        raise _located(error, name, module) from (error.__cause__ or error)
    return dataclasses.replace(bound, name=title, input_shape=shape, output_shape=output_shape)


# Note [methods]
# The bounds of whole networks stand on this module, so it cannot import theirs: imports go down
# only. They register themselves here, and the first call that names one loads their module, so
# that a user meets one function and not an order of imports.

Method = Callable[..., Bound]
_METHODS: dict[str, Method] = {}


def bound_method(name: str) -> Callable[[Method], Method]:
    """Register a bound of whole networks under the name that ``lipschitz_bound`` takes."""

    def register(method: Method) -> Method:
        _METHODS[name] = method
        return method

    return register


def _method(name: str) -> Method:
    if name not in _METHODS:
        importlib.import_module("lipbook.tightness")  # see Note [methods]
    if name not in _METHODS:
        known = ", ".join(map(repr, ("product", *sorted(_METHODS))))
        raise ValueError(f"method must be one of {known}, got {name!r}")
    return _METHODS[name]


@functools.singledispatch
def lipschitz_rule(module: nn.Module, input_shape: Shape, p: float) -> Bound:
    r"""Lipschitz rule of a module: what :func:`lipschitz_bound` asks of each class of layers.

    A :func:`functools.singledispatch` on the class of ``module``. A subclass inherits the rule of
    its parent as long as it does not redefine what is computed. A rule gets the shape of one sample
    and p in {1.0, 2.0, inf}, and returns a :class:`Bound` of kind ``"exact"`` or
    ``"upper bound"``. It may trust that the weights are real and finite and that the layer
    runs on this shape. The rule of a container bounds its children by :func:`lipschitz_bound`
    (with ``name=``) and hands them over as ``parts``.

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
        f"@lipschitz_rule.register for {kind.__qualname__}, or build the network from "
        "torch.nn.Sequential, Residual and Sum"
    )


# Attributes that decide what calling a module computes, and that a rule therefore relies on.
_COMPUTATION = ("forward", "__call__", "_call_impl", "_conv_forward", "__iter__")


def _check(module: nn.Module) -> None:
    """Refuse a module that may not compute what the rule of its class is about."""
    cls, registered = type(module), _registered(module)
    for name in _COMPUTATION if registered is not object else ():
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


def _run(module: nn.Module, input_shape: Shape) -> tuple[Shape, bool]:
    """Run a copy on zeros: shape of an output sample, and whether the input was written to."""
    weights = itertools.chain(module.parameters(), module.buffers())
    device = next((weight.device for weight in weights), torch.device("cpu"))
    sample = torch.zeros(2, *input_shape, dtype=torch.float64, device=device)
    version = sample._version
    try:
        with torch.no_grad():
            outputs = _plain_copy(module).double()(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"does not run on inputs of shape {input_shape}: {error}") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"must return one tensor, got {type(outputs).__name__}")
    if outputs.dim() == 0 or len(outputs) != 2:
        raise ValueError(
            f"must keep samples apart, but made shape {tuple(outputs.shape)} of a batch of 2"
        )
    return tuple(outputs.shape[1:]), sample._version != version


# Note [plain copies]
# Copies are evaluated in float64, but a parametrized weight must keep the value that the layer
# uses, so it is computed first and cast then. remove_parametrizations() is no way to do that: it
# edits a class that the copy shares with the original.


def _plain_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with plain parameters in place of parametrized ones."""
    module = copy.deepcopy(module)
    for layer in list(module.modules()):
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


# ------------------------------------------------------------------- rules of the containers


@lipschitz_rule.register
def _(module: nn.Sequential, input_shape: Shape, p: float) -> Bound:
    parts: list[Bound] = []
    shape = input_shape
    for name, child in module._modules.items():  # named_children() skips a child used twice
        parts.append(lipschitz_bound(child, shape, p, name=name))
        shape = parts[-1].output_shape
    kind: Kind = parts[0].kind if len(parts) == 1 else "upper bound" if parts else "exact"
    value = math.prod(part.value for part in parts)
    return Bound(value, kind, p, parts=tuple(parts), output_shape=shape)


@lipschitz_rule.register
def _(module: Residual, input_shape: Shape, p: float) -> Bound:
    branch = _branch_bound(module.branch, input_shape, p, "branch")
    if branch.output_shape != input_shape:
        raise ValueError(f"branch must keep the shape {input_shape}, got {branch.output_shape}")
    return Bound(1 + branch.value, "upper bound", p, parts=(branch,), output_shape=input_shape)


@lipschitz_rule.register
def _(module: Sum, input_shape: Shape, p: float) -> Bound:
    parts = tuple(
        _branch_bound(branch, input_shape, p, f"branches.{i}")
        for i, branch in enumerate(module.branches)
    )
    shapes = {part.output_shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"branches must agree on the output shape, got {sorted(shapes)}")
    kind: Kind = parts[0].kind if len(parts) == 1 else "upper bound"
    return Bound(sum(b.value for b in parts), kind, p, parts=parts, output_shape=shapes.pop())


def _branch_bound(branch: nn.Module, input_shape: Shape, p: float, name: str) -> Bound:
    bound = lipschitz_bound(branch, input_shape, p, name=name)
    if _run(branch, input_shape)[1]:
        raise ValueError(f"{name} overwrites the input it shares with others: use inplace=False")
    return bound


# ------------------------------------------------------------------- rules of linear layers


@lipschitz_rule.register
def _(module: nn.Linear, input_shape: Shape, p: float) -> Bound:
    return Bound(operator_norm(_float64(module.weight), p).item(), "exact", p)


@_rule_of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
@_rule_of(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed")
    geometry: dict[str, Any] = {name: getattr(module, name) for name in names} | {
        "weight": _float64(module.weight),
        "input_size": [size for (size,) in _axes(module, input_shape)],
        "output_padding": module.output_padding,
        "p": p,
    }
    kind: Kind = "exact" if convolution_norm_is_exact(**geometry) else "upper bound"
    return Bound(convolution_norm_bound(**geometry).item(), kind, p)


@_rule_of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    if module.training or module.running_var is None:
        raise ValueError("normalises by statistics of the batch: track them and call .eval()")
    scale = (_float64(module.running_var) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * _float64(module.weight)
    return Bound(scale.abs().max().item(), "exact", p)


# Note [one axis at a time]
# Average pooling, padding and interpolation treat all channels alike and work on one axis after
# the other: their matrix is a Kronecker product, and operator norms of Kronecker factors
# multiply for p in {1, 2, inf}. Each factor comes from torch's own function in one dimension.


def _separable(matrices: list[Tensor], p: float) -> Bound:
    return Bound(math.prod(operator_norm(m.mT, p).item() for m in matrices), "exact", p)


@_rule_of(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    divisor = getattr(module, "divisor_override", None)
    matrices = [
        _windows(n, k, s, pad, 1, module.ceil_mode)
        if divisor
        else functional.avg_pool1d(
            _eye(n), k, s, pad, module.ceil_mode, module.count_include_pad
        ).flatten(1)
        for n, k, s, pad in _axes(module, input_shape, "kernel_size", "stride", "padding")
    ]
    matrices[0] = matrices[0] / (divisor or 1)
    return _separable(matrices, p)


@_rule_of(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    names = ("kernel_size", "stride", "padding", "dilation")
    axes = _axes(module, input_shape, *names)
    return _max_pool([_windows(*axis, module.ceil_mode) for axis in axes], p)


@_rule_of(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    return _separable(_adaptive_means(module, input_shape), p)


@_rule_of(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    return _max_pool([(m > 0).double() for m in _adaptive_means(module, input_shape)], p)


def _max_pool(windows: list[Tensor], p: float) -> Bound:
    """Attained where one pixel exceeds all others: it alone decides every window it is in."""
    overlap = math.prod(window.sum(1).max().item() for window in windows)
    return Bound(overlap ** (1 / p), "exact", p)


def _windows(size: int, *window: Any) -> Tensor:
    """Which windows each pixel is in, (size, windows); ``window`` as ``max_pool1d`` takes it."""
    return (functional.max_pool1d(_eye(size), *window)[:, 0] == 1).double()


def _adaptive_means(module: Any, input_shape: Shape) -> list[Tensor]:
    axes = _axes(module, input_shape, "output_size")
    return [functional.adaptive_avg_pool1d(_eye(n), n if k is None else k)[:, 0] for n, k in axes]


@_rule_of(nn.Upsample)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(module.mode, module.mode)
    extra = [1] if mode == "bicubic" else []  # which torch has in two dimensions only
    matrices = [
        functional.interpolate(
            _eye(n).reshape(n, 1, n, *extra),
            size=None if size is None else [size, *extra],
            scale_factor=None if scale is None else [scale, *map(float, extra)],
            mode=mode,
            align_corners=module.align_corners,
            recompute_scale_factor=module.recompute_scale_factor,
        ).flatten(1)
        for n, size, scale in _axes(
            module, input_shape, "size", "scale_factor", dims=len(input_shape) - 1
        )
    ]
    return _separable(matrices, p)


def _padding(mode: str, module: Any, input_shape: Shape, p: float) -> Bound:
    pairs = zip(module.padding[::2], module.padding[1::2], strict=True)
    if mode == "circular" and any(min(pair) < 0 < max(pair) for pair in pairs):
        raise ValueError(  # torch copies from entries that it has not written
            "padding must not crop one side of an axis and pad the other in a circular layer, "
            f"where torch returns uninitialised memory, got {tuple(module.padding)}"
        )
    axes = enumerate(reversed(_axes(module, input_shape)))  # torch pads the last axis first
    pads = [
        functional.pad(_eye(n), module.padding[2 * i : 2 * i + 2], mode)[:, 0] for i, (n,) in axes
    ]
    return _separable(pads, p)


_PADDING_MODES: dict[str, tuple[type[nn.Module], ...]] = {
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
}
for _mode, _classes in _PADDING_MODES.items():
    _rule_of(*_classes)(functools.partial(_padding, _mode))


# ------------------------------------------------------------------- rules of activations


@_rule_of(nn.Identity, nn.Flatten, nn.Unflatten)
@_rule_of(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _(module: nn.Module, input_shape: Shape, p: float) -> Bound:
    return Bound(1, "exact", p)  # a permutation of the entries


@_rule_of(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
@_rule_of(nn.AlphaDropout, nn.FeatureAlphaDropout)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    if module.training and module.p > 0:
        raise ValueError("is random in training mode: call .eval()")
    return Bound(1, "exact", p)


# sup |phi'| of elementwise activations: on paper, or to double precision where the maximiser
# solves a transcendental equation.
_SLOPES: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.CELU: lambda m: 1.0 if m.alpha > 0 else math.inf,
    nn.ELU: lambda m: max(1.0, abs(m.alpha)),
    nn.GELU: lambda m: {
        "none": (1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi),  # 1.1289, at sqrt 2
        "tanh": 1.1289930686587718,  # at 1.4185
    }[m.approximate],
    nn.GLU: lambda m: math.inf,  # a product of two halves of the input; not elementwise
    nn.Hardshrink: lambda m: 1.0 if m.lambd == 0 else math.inf,  # jumps at -lambd and lambd
    nn.Hardsigmoid: lambda m: 1 / 6,
    nn.Hardswish: lambda m: 1.5,  # at 3, from the left
    nn.Hardtanh: lambda m: 1.0,
    nn.LeakyReLU: lambda m: max(1.0, abs(m.negative_slope)),
    nn.LogSigmoid: lambda m: 1.0,
    nn.Mish: lambda m: 1.0884981612517279,  # at 1.4906
    nn.PReLU: lambda m: max(1.0, _float64(m.weight).abs().max().item()),
    nn.ReLU: lambda m: 1.0,
    nn.ReLU6: lambda m: 1.0,
    nn.SELU: lambda m: 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717,
    nn.Sigmoid: lambda m: 0.25,
    nn.SiLU: lambda m: 1.0998393201288670,  # at 2.3994
    # torch.nn.Softplus jumps by log(1 + exp(-threshold)) / beta where it turns linear: 2e-9 at
    # the default threshold of 20, which is taken for rounding.
    nn.Softplus: lambda m: 1.0 if m.threshold >= 20 else math.inf,
    nn.Softshrink: lambda m: 1.0,
    nn.Softsign: lambda m: 1.0,
    nn.Tanh: lambda m: 1.0,
    nn.Tanhshrink: lambda m: 1.0,
    nn.Threshold: lambda m: 1.0 if m.value == m.threshold else math.inf,
}


@lipschitz_rule.register
def _(module: nn.RReLU, input_shape: Shape, p: float) -> Bound:
    if module.training:
        raise ValueError("is random in training mode: call .eval()")
    return Bound(max(1, abs(module.lower + module.upper) / 2), "exact", p)


@_rule_of(*_SLOPES)
def _(module: nn.Module, input_shape: Shape, p: float) -> Bound:
    slope = _SLOPES[_registered(module)](module)
    if slope == math.inf:
        raise ValueError(f"is not Lipschitz: {module} has unbounded slope or jumps")
    return Bound(slope, "exact", p)


# Note [softmax]
# J = diag(s) - s s^T is symmetric with row sums of moduli 2 s_i (1 - s_i) <= 1/2, so that
# ||J||_2 <= ||J||_inf = ||J||_1 <= 1/2; two equal logits, the others at minus infinity, attain it.
# Log-softmax has J = I - 1 s^T, and a norm is convex in s, hence largest at a corner
# s = e_j: an oblique projection of 2-norm sqrt(n), with row sums up to 2, column sums up to n - 1.


@_rule_of(nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    dim = getattr(module, "dim", -3)  # Softmax2d has none
    if dim is None or dim % (len(input_shape) + 1) == 0:
        raise ValueError(f"dim must be a dimension of a sample, got {dim}")
    n = (2, *input_shape)[dim]
    if n == 1:
        return Bound(0, "exact", p)
    log_softmax = {1: n - 1, 2: math.sqrt(n), math.inf: 2}[p]
    return Bound(log_softmax if isinstance(module, nn.LogSoftmax) else 0.5, "exact", p)


# ------------------------------------------------------------------------- the lower bound


@torch.enable_grad()
def lipschitz_lower_bound(
    module: nn.Module,
    inputs: Tensor,
    p: float = 2,
    *,
    radius: float = 1.0,
    steps: int = 100,
    seed: int = 0,
) -> Bound:
    r"""Lower bound of the Lipschitz constant of a network, with the two points that prove it.

    .. math::
        \operatorname{Lip}(f) \ge \frac{\lVert f(x) - f(y)\rVert_p}{\lVert x - y\rVert_p}
        \qquad \text{for every } x \ne y

    The pair is searched from every input, and the best one wins:

    1. *turn*: a short chord through the input is turned towards the steepest direction by the
       power method (Boyd's for p = 1 and p = inf) on :math:`J^\top J`;
    2. *climb*: the chord, now of length ``radius``, follows the gradient of its own quotient in
       both ends. The Jacobian of a ReLU network is piecewise constant and has no
       gradient to follow; the quotient of a chord that crosses kinks has;
    3. *halve*: by the triangle inequality one half of a chord is at least as steep as the
       whole, so the better half is kept, ten times, and turned once more.

    What is returned is a difference quotient and not the norm of a Jacobian: at a kink autograd
    returns what its rules say (it differentiates ``x - relu(x) + relu(-x)``, which is
    0 everywhere, to 1 at 0), while two points cannot err. How near to the constant it comes is only
    hoped: the constant is NP-hard to compute, also for two layers :cite:p:`virmaux2018`.

    The arithmetic is float64 on a copy, with parametrized weights at their present value. The
    quotient is reduced by an allowance for rounding, which is measured: float32 evaluates
    the same points, and float64 is taken to err :math:`2^{29}` times less than the worst of
    them, with a factor of 8 to spare.

    Parameters
    ----------
    module : torch.nn.Module
        Any differentiable module that is deterministic and keeps samples apart; no rules needed.
    inputs : torch.Tensor
        Points to start from, (batch, \*shape), on the device of the module. Data is better than
        noise if the constant on data matters.
    p : float
        1, 2 or :data:`math.inf`.
    radius : float
        Length of the first chords in the :math:`\ell_p` norm, in units of the inputs.
    steps : int
        Steps of Adam in the climb.
    seed : int
        Seed of the first directions.

    Returns
    -------
    Bound
        Of kind ``"lower bound"``; ``witness`` is the pair, float64, without batch dimension.

    Raises
    ------
    TypeError
        If ``inputs`` is not a real floating-point tensor.
    ValueError
        If ``inputs`` is empty or not finite, ``radius`` or ``steps`` is out of range, or the module
        is random or lets samples mix (dropout, batch norm in training mode).

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> below = lipschitz_lower_bound(layer, torch.zeros(1, 4), steps=5)
    >>> above = lipschitz_bound(layer, (4,))
    >>> bool(0.999999 * above.value < below.value <= above.value)
    True
    """
    p = _exponent(p)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {got}")
    if inputs.numel() == 0 or not inputs.isfinite().all():
        raise ValueError(f"inputs must be finite and not empty, got shape {tuple(inputs.shape)}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    if not (isinstance(steps, int) and steps >= 0):
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    x = _float64(inputs)
    module = _plain_copy(module).double().requires_grad_(False)
    twice = [module(torch.cat([x, other]))[: len(x)] for other in (x, 1 - x)]
    if not torch.allclose(twice[0], twice[1], rtol=1e-6, equal_nan=True):
        raise ValueError("module must be deterministic and keep samples apart: call .eval()")

    generator = torch.Generator(x.device).manual_seed(seed)
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    direction = _turn(module, x, start, p, radius)
    short = _chord(x, direction, 1e-4 * radius)
    steep = _halve(module, _climb(module, _chord(x, direction, radius), p, radius, steps), p)
    middle = steep.mean(0)
    turned = _chord(middle, _turn(module, middle, steep[1] - steep[0], p, radius), 1e-4 * radius)
    chords = torch.cat([short, steep, turned], dim=1)  # (2, 3 batch, *shape)
    values = _slope(module, chords, p) - _rounding(module, chords, p)
    best = torch.where(values.isfinite(), values, 0.0).argmax()
    return Bound(
        max(values[best].item(), 0.0),
        "lower bound",
        p,
        name=type(module).__name__,
        input_shape=tuple(x.shape[1:]),
        output_shape=tuple(module(x[:1]).shape[1:]),
        witness=(chords[0, best], chords[1, best]),
    )


# A bundle of chords is one tensor (2, batch, *shape): the two ends of each.


def _chord(middle: Tensor, direction: Tensor, length: float) -> Tensor:
    return torch.stack([middle - length / 2 * direction, middle + length / 2 * direction])


def _norms(difference: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(difference.flatten(1), p, dim=1)


def _rise(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    """Distance of the images of the ends, (batch,)."""
    outputs = module(chords.flatten(0, 1).clone())  # a first layer may work in place
    return _norms(outputs[chords.shape[1] :] - outputs[: chords.shape[1]], p)


def _slope(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    return _rise(module, chords, p) / _norms(chords[1] - chords[0], p).clamp(min=1e-300)


def _rounding(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    """Bound what float64 may have added to the slope, judged by the error of float32."""
    points = chords.flatten(0, 1)
    outputs = module(points.clone())
    in_float32 = copy.deepcopy(module).float()(points.float()).double()
    errors = 2**-26 * _norms(in_float32 - outputs, p) + 2**-50 * _norms(outputs, p)
    error = torch.nan_to_num(errors, nan=math.inf).max()  # of all, lest the luckiest chord win
    run = _norms(chords[1] - chords[0], p).clamp(min=1e-300)
    entries = chords[0, 0].numel() + outputs[0].numel()
    return 2 * error / run + 2**-50 * entries * _slope(module, chords, p)


def _turn(module: nn.Module, middle: Tensor, direction: Tensor, p: float, radius: float) -> Tensor:
    """Power method on a short chord: 20 times the unit vector that increases its rise most."""
    direction = _steepest(direction, direction, p)
    for _ in range(20):
        direction.requires_grad_()
        rise = _rise(module, _chord(middle, direction, 1e-4 * radius), p).sum()
        (gradient,) = torch.autograd.grad(rise, direction)
        direction = _steepest(gradient, direction.detach(), p)
    return direction


def _steepest(gradient: Tensor, otherwise: Tensor, p: float) -> Tensor:
    """Maximise the inner product with ``gradient`` over the unit ball of the p-norm."""
    flat = gradient.flatten(1)
    if p == 2:
        unit = functional.normalize(flat, dim=1, eps=1e-300)
    elif p == math.inf:
        unit = flat.sign()
    else:
        unit = functional.one_hot(flat.abs().argmax(1), flat.shape[1]) * flat.sign()
    stuck = (flat == 0).all(1, keepdim=True)
    return torch.where(stuck, otherwise.flatten(1), unit).view_as(gradient)


def _climb(module: nn.Module, chords: Tensor, p: float, radius: float, steps: int) -> Tensor:
    """Ascend by Adam; torch.optim would import the compiler on first use, for seconds."""
    rate = radius / 20 / chords[0, 0].numel() ** (1 / p)  # a step moves an end by radius / 20
    best, record = chords, torch.zeros(chords.shape[1]).to(chords)
    mean, square = torch.zeros_like(chords), torch.zeros_like(chords)
    for step in range(1, steps + 2):
        chords = chords.detach().requires_grad_()
        slope = _slope(module, chords, p)
        best = torch.where(_columns(slope > record, chords), chords, best).detach()
        record = torch.maximum(record, slope).detach()
        (gradient,) = torch.autograd.grad(slope.sum(), chords)
        mean = mean.lerp(gradient, 0.1)
        square = square.lerp(gradient**2, 0.001)
        chords = chords + rate * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
    return best


def _halve(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    for _ in range(10):
        middle = chords.mean(0)
        left, right = torch.stack([chords[0], middle]), torch.stack([middle, chords[1]])
        wins = _slope(module, right, p) > _slope(module, left, p)
        chords = torch.where(_columns(wins, chords), right, left)
    return chords


def _columns(mask: Tensor, chords: Tensor) -> Tensor:
    return mask.view(1, -1, *[1] * (chords.dim() - 2))


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
    if not shape or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"input_shape must hold one or more positive integers, got {shape}")
    return shape
