"""Operations: the layer that each function, method and operator of torch equals.

A handler gets a call and returns the layer and the tensors that it reads, so that no rule is
written twice: ``F.relu(x)``, ``x.relu()`` and ``torch.relu(x)`` all are :class:`torch.nn.ReLU`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.layers.attention import ScaledDotProduct
from lipbook.layers.elementwise import Absolute, Exp, Log, Power, Reciprocal, Sine
from lipbook.layers.joins import Add, Concatenate, MatMul, Maximum, Multiply, Subtract
from lipbook.layers.normalization import UnitNormalize
from lipbook.layers.rearrangements import (
    Cast,
    Clamp,
    Diagonal,
    LinearMap,
    MatrixProduct,
    Rearrangement,
    Shift,
    sum_norms,
)
from lipbook.layers.resampling import check_padding

__all__ = ["HANDLERS", "Call", "Step", "handler_of", "moving", "traced_as"]

# A step of a handler: the layer, and what it reads, tensors or earlier steps.
Step = tuple[nn.Module, tuple[Any, ...]]


class Call:
    """One call of a torch function while a network is traced.

    Parameters
    ----------
    function : callable
        What was called.
    args, kwargs
        Its arguments.
    tracked : callable
        Says whether a tensor depends on the input of the network.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tracked: Callable[[Any], bool],
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.tracked = tracked

    def constant(self, value: Any, like: Tensor) -> Tensor:
        """Constant operand for samples such as those of ``like``, without a batch dimension."""
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch.float64)  # torch rounds numbers when it runs
        value = value.detach()
        if value.dim() < like.dim():
            return value
        if value.dim() > like.dim():
            raise ValueError(
                f"a constant of shape {tuple(value.shape)} does not fit samples of shape "
                f"{tuple(like.shape[1:])}"
            )
        if len(value) > 1 and not bool((value == value[:1]).all()):
            raise ValueError("a constant has other values for each sample of the batch")
        return value[0]


Handler = Callable[..., Step]
HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def traced_as(make: Callable[..., nn.Module], inputs: int = 1) -> Callable[[Any], Any]:
    """Decorate a function of the library: a call is one layer, made of what follows its inputs.

    It takes the way that torch keeps for functions which are no methods of tensors: a mode that
    watches functions is told of the call, and of nothing inside it.
    """

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def called(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = (x, *args[: inputs - 1])
            if torch.overrides.has_torch_function(parts):
                return torch.overrides.handle_torch_function(called, parts, x, *args, **kwargs)
            return function(x, *args, **kwargs)

        def handler(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Step:
            others = args[inputs - 1 :]
            _constants(call, *others, *kwargs.values())
            return make(*others, **kwargs), (x, *args[: inputs - 1])

        HANDLERS[function.__name__.strip("_")] = handler
        return called

    return decorate


def handler_of(function: Callable[..., Any]) -> tuple[str, Handler | None]:
    """Name of a torch function, the same for methods, operators and in-place forms; its handler."""
    name = torch.overrides.resolve_name(function) or getattr(function, "__name__", str(function))
    parts = name.split(".")
    short = parts[-2] if parts[-1] == "__get__" else parts[-1]
    plain = short.strip("_")
    plain = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}.get(plain, plain)
    plain = plain.lower()
    return plain, HANDLERS.get(plain)


# -------------------------------------------------------------------- elementwise functions


def _elementwise(name: str, make: Callable[..., nn.Module]) -> None:
    def handler(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Step:
        kwargs.pop("inplace", None)
        return make(*args, **kwargs), (x,)

    HANDLERS[name] = handler


_ELEMENTWISE: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "tanhshrink": nn.Tanhshrink,
    "logsigmoid": nn.LogSigmoid,
    "threshold": nn.Threshold,
    "expit": nn.Sigmoid,
    "exp": Exp,
    "log": Log,
    "reciprocal": Reciprocal,
    "sqrt": lambda: Power(0.5),
    "rsqrt": lambda: Power(-0.5),
    "square": lambda: Power(2.0),
    "sin": lambda: Sine(0.0),
    "cos": lambda: Sine(math.pi / 2),
    "abs": Absolute,
    "absolute": Absolute,
    "clamp_min": lambda low: Clamp(_number(low), None),
    "clamp_max": lambda high: Clamp(None, _number(high)),
}
for _name, _layer in _ELEMENTWISE.items():
    _elementwise(_name, _layer)


def _number(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float64)


@_handles("clamp", "clip")
def _(call: Call, x: Tensor, min: Any = None, max: Any = None) -> Step:
    if call.tracked(min) or call.tracked(max):
        raise TypeError("clips to values that depend on the input")
    return Clamp(_number(min), _number(max)), (x,)


@_handles("pow")
def _(call: Call, x: Any, exponent: Any) -> Step:
    if isinstance(exponent, Tensor) and exponent.numel() == 1 and not call.tracked(exponent):
        exponent = exponent.item()
    if not call.tracked(x) or not isinstance(exponent, (int, float)):
        raise TypeError("is a power with a base or exponents that are no numbers")
    return Power(float(exponent)), (x,)


@_handles("prelu")
def _(call: Call, x: Tensor, weight: Tensor) -> Step:
    layer = nn.PReLU(weight.numel())
    layer.weight = nn.Parameter(weight.detach(), False)
    return layer, (x,)


@_handles("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
def _(call: Call, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Step:
    if training and p > 0:
        raise ValueError(
            "is random in training mode: call .eval(), and pass training=self.training"
        )
    return nn.Identity(), (x,)


@_handles("softmax", "softmin", "log_softmax")
def _(call: Call, x: Tensor, dim: int | None = None, *_: Any, dtype: Any = None, **__: Any) -> Step:
    kinds = {"softmin": nn.Softmin, "log_softmax": nn.LogSoftmax}
    layer = kinds.get(handler_of(call.function)[0], nn.Softmax)(dim)
    return layer, (x if dtype is None else (Cast(dtype), (x,)),)


@_handles("glu")
def _(call: Call, x: Tensor, dim: int = -1) -> Step:
    return nn.GLU(dim), (x,)


@_handles("float", "double", "half", "bfloat16", "to", "type", "type_as")
def _(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Step:
    with torch.no_grad():
        dtype = call.function(x.detach()[:0], *args, **kwargs).dtype
    if not dtype.is_floating_point:
        raise TypeError(f"casts to {dtype}")
    return Cast(dtype), (x,)


# ------------------------------------------------------------------------------- arithmetic


def _fit(shape: Sequence[int], part: Any) -> Any:
    """Expand a tracked operand to the shape of a result."""
    if isinstance(part, Tensor) and tuple(part.shape) != tuple(shape):
        return moving("expand", lambda x: x.expand(len(x), *shape[1:]), part), (part,)
    return part


def _like(call: Call, *parts: Any) -> Tensor:
    return next(part for part in parts if call.tracked(part))


def _result(call: Call, *parts: Any) -> Sequence[int]:
    shapes = [part.shape for part in parts if isinstance(part, Tensor)]
    shape = torch.broadcast_shapes(*shapes)
    batch = len(_like(call, *parts))
    if len(shape) != _like(call, *parts).dim() or shape[0] != batch:
        raise ValueError("broadcasts over the dimension of the batch, which mixes samples")
    return shape


@_handles("add", "radd", "sub", "subtract", "rsub")
def _(call: Call, x: Any, y: Any, alpha: float = 1) -> Step:
    name = handler_of(call.function)[0]
    if name == "rsub":
        x, y, name = y, x, "sub"
    shape = _result(call, x, y)
    minus = name in ("sub", "subtract")
    if call.tracked(x) and call.tracked(y):
        layer = Subtract(alpha) if minus else Add(1.0, alpha)
        return layer, (_fit(shape, x), _fit(shape, y))
    if call.tracked(x):
        constant = call.constant(y, x) * alpha
        return Shift(-constant if minus else constant), (_fit(shape, x),)
    constant = call.constant(x, y)
    if minus:
        return Shift(constant, -1), ((Diagonal(torch.tensor(float(alpha))), (_fit(shape, y),)),)
    return Shift(constant), ((Diagonal(torch.tensor(float(alpha))), (_fit(shape, y),)),)


@_handles("mul", "multiply", "rmul")
def _(call: Call, x: Any, y: Any) -> Step:
    shape = _result(call, x, y)
    if call.tracked(x) and call.tracked(y):
        return Multiply(), (_fit(shape, x), _fit(shape, y))
    x, y = (x, y) if call.tracked(x) else (y, x)
    return Diagonal(call.constant(y, x)), (_fit(shape, x),)


@_handles("div", "divide", "true_divide", "rtruediv", "rdiv")
def _(call: Call, x: Any, y: Any, rounding_mode: Any = None) -> Step:
    if rounding_mode is not None:
        raise TypeError("rounds, so that it is not continuous")
    if handler_of(call.function)[0] in ("rtruediv", "rdiv"):
        x, y = y, x
    shape = _result(call, x, y)
    if not call.tracked(y):
        return Diagonal(call.constant(y, x), divides=True), (_fit(shape, x),)
    inverse = (Reciprocal(), (y,))
    if call.tracked(x):
        y_fits = _fit(shape, y)
        return Multiply(), (_fit(shape, x), (Reciprocal(), (y_fits,)))
    return Diagonal(call.constant(x, y)), (inverse,)


@_handles("neg", "negative")
def _(call: Call, x: Tensor) -> Step:
    return Diagonal(torch.tensor(-1.0)), (x,)


@_handles("maximum", "minimum")
def _(call: Call, x: Any, y: Any) -> Step:
    largest = handler_of(call.function)[0] == "maximum"
    shape = _result(call, x, y)
    if call.tracked(x) and call.tracked(y):
        return Maximum(largest), (_fit(shape, x), _fit(shape, y))
    x, y = (x, y) if call.tracked(x) else (y, x)
    constant = call.constant(y, x)
    return (Clamp(constant, None) if largest else Clamp(None, constant)), (_fit(shape, x),)


@_handles("masked_fill")
def _(call: Call, x: Tensor, mask: Tensor, value: Any) -> Step:
    if call.tracked(mask) or call.tracked(value):
        raise TypeError("fills where the input decides")
    mask = call.constant(mask, x)
    return Shift(mask * float(value)), ((Diagonal((~mask).to(x.dtype)), (x,)),)


# ---------------------------------------------------------------------------- linear maps


@_handles("linear")
def _(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Step:
    _constants(call, weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with_weights(layer, weight, bias), (x,)


def _constants(call: Call, *parts: Any) -> None:
    if any(call.tracked(part) for part in parts):
        raise TypeError("has weights that depend on the input")


def _with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach(), False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), False)
    return layer


def _convolution(name: str, cls: Any) -> None:
    transposed = "transpose" in name

    def handler(
        call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Step:
        _constants(call, weight, bias)
        keys = ["stride", "padding", "dilation", "groups"]
        if transposed:
            keys = ["stride", "padding", "output_padding", "groups", "dilation"]
        options = dict(zip(keys, args, strict=False)) | kwargs
        groups = options.get("groups", 1)
        c_in, c_out = weight.shape[1] * groups, weight.shape[0]
        if transposed:
            c_in, c_out = weight.shape[0], weight.shape[1] * groups
        size = tuple(weight.shape[2:])
        layer = cls(c_in, c_out, size, bias=bias is not None, device="meta", **options)
        return _with_weights(layer, weight, bias), (x,)

    HANDLERS[name] = handler


for _dims in (1, 2, 3):
    _convolution(f"conv{_dims}d", getattr(nn, f"Conv{_dims}d"))
    _convolution(f"conv_transpose{_dims}d", getattr(nn, f"ConvTranspose{_dims}d"))


@_handles("matmul", "mm", "bmm", "rmatmul")
def _(call: Call, x: Any, y: Any) -> Step:
    if handler_of(call.function)[0] == "rmatmul":
        x, y = y, x
    if call.tracked(x) and call.tracked(y):
        if min(x.dim(), y.dim()) < 3 or x.shape[:-2] != y.shape[:-2]:
            raise ValueError("multiplies matrices that mix samples, or that broadcast")
        return MatMul(), (x, y)
    left = not call.tracked(x)
    tracked, matrix = (y, x) if left else (x, y)
    matrix = matrix.detach()
    if matrix.dim() != 2:
        raise ValueError(f"multiplies by a constant of shape {tuple(matrix.shape)}: use a matrix")
    if left and tracked.dim() < 3:
        raise ValueError("multiplies a batch from the left, which mixes samples")
    return MatrixProduct(matrix, left), (tracked,)


@_handles("addmm")
def _(
    call: Call, bias: Tensor, x: Tensor, weight: Tensor, beta: float = 1, alpha: float = 1
) -> Step:
    _constants(call, bias, weight)
    product: Any = MatrixProduct(weight.detach()), (x,)
    if alpha != 1:
        product = Diagonal(torch.tensor(float(alpha))), (product,)
    return Shift(call.constant(bias, x) * beta), (product,)


@_handles("einsum")
def _(call: Call, equation: str, *operands: Any) -> Step:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    tracked = [k for k, part in enumerate(operands) if call.tracked(part)]
    if len(tracked) != 1:
        raise TypeError("multiplies several tensors that depend on the input: write it by matmul")
    (place,) = tracked
    x = operands[place]

    others = [part.detach() if isinstance(part, Tensor) else part for part in operands]
    others[place] = None
    function = functools.partial(_einsum, equation, others, place)
    return LinearMap(f"einsum {equation}", function, x[0].numel()), (x,)


def _einsum(equation: str, operands: Sequence[Any], place: int, v: Tensor) -> Tensor:
    parts = [part.to(v.dtype) if isinstance(part, Tensor) else part for part in operands]
    parts[place] = v
    return torch.einsum(equation, *parts)


def _reduction(x: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == ():
        raise ValueError("sums over the batch, which mixes samples: name the dimensions")
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    if 0 in dims:
        raise ValueError("sums over the batch, which mixes samples")
    return dims


@_handles("mean", "sum")
def _(
    call: Call, x: Tensor, dim: Any = None, keepdim: bool = False, *, axis: Any = None, **_: Any
) -> Step:
    dims = _reduction(x, axis if dim is None else dim)
    terms = math.prod(x.shape[d] for d in dims)
    average = handler_of(call.function)[0] == "mean"
    name = "mean" if average else "sum"

    function = functools.partial(_reduced, average, dims, keepdim)
    norms = sum_norms(terms, 1 / terms if average else 1.0)
    return LinearMap(f"{name} {tuple(dims)}", function, terms, norms), (x,)


# Functions of layers are named, so that networks of these layers can be pickled.
def _reduced(average: bool, dims: list[int], keepdim: bool, v: Tensor) -> Tensor:
    return v.mean(dims, keepdim) if average else v.sum(dims, keepdim)


@_handles("cumsum")
def _(call: Call, x: Tensor, dim: int) -> Step:
    _reduction(x, dim)
    return LinearMap(f"cumsum {dim}", functools.partial(torch.cumsum, dim=dim), x.shape[dim]), (x,)


# ------------------------------------------------------------------------------ pooling


def _module(name: str, cls: Any, *keys: str) -> None:
    """Register a function whose arguments are those of a torch module."""

    def handler(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Step:
        options = dict(zip(keys, args, strict=False)) | kwargs
        if options.pop("return_indices", False):
            raise TypeError("returns indices, which are no function of the input with a bound")
        return cls(**{key: value for key, value in options.items() if key in keys}), (x,)

    HANDLERS[name] = handler


for _dims in (1, 2, 3):
    _tail = ("divisor_override",) if _dims > 1 else ()
    _module(
        f"avg_pool{_dims}d",
        getattr(nn, f"AvgPool{_dims}d"),
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        *_tail,
    )
    _module(
        f"max_pool{_dims}d",
        getattr(nn, f"MaxPool{_dims}d"),
        *("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    )
    _module(f"adaptive_avg_pool{_dims}d", getattr(nn, f"AdaptiveAvgPool{_dims}d"), "output_size")
    _module(f"adaptive_max_pool{_dims}d", getattr(nn, f"AdaptiveMaxPool{_dims}d"), "output_size")


@_handles("interpolate", "upsample")
def _(
    call: Call,
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Step:
    if antialias:
        function = functools.partial(
            functional.interpolate,
            size=size,
            scale_factor=scale_factor,
            mode=mode,
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
            antialias=antialias,
        )
        return LinearMap("interpolate", function, x[0].numel()), (x,)
    return nn.Upsample(size, scale_factor, mode, align_corners, recompute_scale_factor), (x,)


# -------------------------------------------------------------------------- normalisation


@_handles("batch_norm")
def _(
    call: Call,
    x: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Step:
    if training or running_var is None:
        raise ValueError("normalises by statistics of the batch: track them and call .eval()")
    cls: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    layer = cls(len(running_var), eps=eps, affine=weight is not None).to(running_var.dtype)
    layer.running_mean, layer.running_var = running_mean.detach(), running_var.detach()
    return (layer if weight is None else _with_weights(layer, weight, bias)).eval(), (x,)


@_handles("layer_norm")
def _(
    call: Call,
    x: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Step:
    layer = nn.LayerNorm(tuple(normalized_shape), eps, weight is not None, bias is not None)
    return layer if weight is None else _with_weights(layer, weight, bias), (x,)


@_handles("rms_norm")
def _(
    call: Call, x: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Step:
    layer = nn.RMSNorm(tuple(normalized_shape), eps, weight is not None)
    return layer if weight is None else _with_weights(layer, weight, None), (x,)


@_handles("group_norm")
def _(
    call: Call, x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Step:
    layer = nn.GroupNorm(num_groups, x.shape[1], eps, weight is not None)
    return layer if weight is None else _with_weights(layer, weight, bias), (x,)


@_handles("normalize")
def _(
    call: Call, x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> Step:
    if p != 2:
        raise TypeError(f"divides by another norm than the Euclidean one, got p={p}")
    return UnitNormalize(dim, eps), (x,)


@_handles("scaled_dot_product_attention")
def _(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Step:
    if dropout_p > 0:
        raise ValueError("drops attention at random: pass dropout_p=0 in evaluation mode")
    if call.tracked(attn_mask) or enable_gqa:
        raise TypeError("has a mask that depends on the input, or grouped queries")
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    return ScaledDotProduct(**options), (query, key, value)


# ------------------------------------------------------------------------------ recurrence


@_handles("rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell")
def _(call: Call, *_: Any) -> Step:
    kind = {"gru_cell": "GRU", "lstm_cell": "LSTM"}.get(handler_of(call.function)[0], "RNN")
    raise TypeError(
        f"is one step of a recurrence, whose bound is known for a sequence: call torch.nn.{kind} "
        "with batch_first=True on inputs (batch, time, features) in place of the loop"
    )


# --------------------------------------------------------------------------------- joins


@_handles("cat", "concat", "concatenate")
def _(call: Call, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Step:
    dim = (dim if axis is None else axis) % tensors[0].dim()
    if dim == 0:
        raise ValueError("concatenates along the batch, which mixes samples")
    return Concatenate(dim), tuple(tensors)


@_handles("stack")
def _(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Step:
    dim = dim % (tensors[0].dim() + 1)
    if dim == 0:
        raise ValueError("stacks along the batch, which mixes samples")
    parts = [
        (moving("unsqueeze", lambda x: x.unsqueeze(dim), part), (part,))
        if call.tracked(part)
        else part.unsqueeze(dim)
        for part in tensors
    ]
    return Concatenate(dim), tuple(parts)


# ------------------------------------------------------------------------ moving entries


@_handles("pad")
def _(call: Call, x: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Step:
    check_padding(mode, tuple(pad))
    return moving("pad", lambda v: functional.pad(v, pad, mode, value), x), (x,)


MOVING = frozenset(
    [
        "flatten",
        "unflatten",
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "permute",
        "transpose",
        "swapaxes",
        "swapdims",
        "t",
        "mt",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "clone",
        "detach",
        "data",
        "movedim",
        "moveaxis",
        "flip",
        "roll",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "getitem",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "select",
        "narrow",
        "index_select",
        "unfold",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "rot90",
        "diagonal",
        "tril",
        "triu",
        "cpu",
        "cuda",
        "requires",
        "alias",
        "adjoint",
    ]
)


def moving(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> nn.Module:
    """Rearrangement that a function is, found by moving numbers that name their place."""
    n = x[0].numel()
    names = torch.arange(1, 2 * n + 1, dtype=torch.float64).view(2, n)
    names = names[torch.arange(len(x)) % 2].view(x.shape)
    zero = function(torch.zeros_like(names))
    moved = function(names)
    if moved.dim() < 1 or len(moved) != len(x):
        raise ValueError(
            f"must keep samples apart, but made shape {tuple(moved.shape)} of a batch of {len(x)}"
        )
    if moved.shape == x.shape and torch.equal(moved, names):
        return nn.Identity()
    place = moved - zero
    index = place[0].round().long() - 1
    second = place[1].round().long() - 1
    if not (
        bool((index < n).all()) and torch.equal(torch.where(index < 0, index, index + n), second)
    ):
        raise ValueError("moves entries from one sample to another")
    return Rearrangement(name, index, zero[0].to(x.dtype))
