"""What stands in the place of a layer: for each kind of layer, a 1-Lipschitz one of its shape."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lipbook.activations import AbsoluteValue, Householder, MaxMin
from lipbook.convolutions import (
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
)
from lipbook.layers.rearrangements import LinearMap, MatrixProduct
from lipbook.normalization import (
    BatchCentering,
    LayerCentering,
    ScalarBatchNorm,
    ScaleAndBias,
    Unscale,
)
from lipbook.orthogonal import OrthogonalLinear, Scale, polar
from lipbook.pooling import AveragePooling, Upsampling
from lipbook.rules import Shape, lipschitz_rule
from lipbook.sequences import LosslessRNN

__all__ = [
    "ALREADY",
    "DROPPED",
    "SLACK",
    "Activation",
    "Choice",
    "Chosen",
    "constant",
    "recurrent",
    "replacement",
    "weighted",
]

Activation = Literal["max_min", "absolute_value", "householder", "keep"]

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.LogSigmoid),
    *(nn.Tanh, nn.Sigmoid),
)
_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_LINEAR = (*_AVERAGES, LinearMap, nn.Upsample)  # which a factor takes to the constant 1
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ORTHOGONAL: Any = {1: OrthogonalConv1d, 2: OrthogonalConv2d, 3: OrthogonalConv3d}
_TRANSPOSED: Any = {
    1: OrthogonalConvTranspose1d,
    2: OrthogonalConvTranspose2d,
    3: OrthogonalConvTranspose3d,
}
_NONEXPANSIVE: Any = {1: NonexpansiveConv1d, 2: NonexpansiveConv2d, 3: NonexpansiveConv3d}
_LARGEST = 1000.0  # a constant above it is that of a division by almost nothing

DROPPED = "in training it multiplies by 1 / (1 - p)"
ALREADY = "1-Lipschitz already"
_PRESENT = "1-Lipschitz with its present weights, which training may change"

SLACK = 1e-5  # relative, of constants that are 1 but for the rounding of float32


@dataclasses.dataclass(frozen=True)
class Choice:
    """How layers are chosen, as :func:`lipschitz_network` was told."""

    activation: Activation | Callable[[int, int], nn.Module]
    keep_weights: bool
    device: torch.device
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A layer, why it was taken, and how far its weight is from the old one."""

    layer: nn.Module
    why: str
    moved: float | None = None


def constant(layer: nn.Module, shape: Shape) -> float:
    """Lipschitz constant of a layer by its rule, or the reason why there is none."""
    return lipschitz_rule(layer, shape, 2.0).value


def weighted(layer: nn.Module | None) -> bool:
    """Whether a layer has parameters that map features to features."""
    if isinstance(layer, MatrixProduct):
        return True
    return layer is not None and any(p.dim() > 1 for p in layer.parameters())


def replacement(
    old: nn.Module,
    shape: Shape,
    output_shape: Shape,
    axis: int,
    at_end: bool,
    choice: Choice,
) -> Chosen:
    """Choose what stands in the place of a layer with one input.

    Parameters
    ----------
    old : torch.nn.Module
        The layer.
    shape, output_shape : tuple of int
        Of a sample of its inputs and outputs.
    axis : int
        Dimension of the channels in a batch of them.
    at_end : bool
        Whether no weights follow.
    choice : Choice
        What the user asked for.

    Returns
    -------
    Chosen

    Raises
    ------
    TypeError or ValueError
        With the reason why there is none.
    """
    found: Chosen | None = None
    if any(cls.__module__.partition(".")[0] == "lipbook" for cls in type(old).__mro__[:2]):
        found = _own(old, shape)
    elif isinstance(old, nn.Linear):
        found = _dense(old, choice)
    elif isinstance(old, _ConvNd):
        found = _convolution(old, shape, output_shape, choice)
    elif isinstance(old, _DROPOUTS):
        found = Chosen(nn.Identity(), DROPPED)
    elif isinstance(old, (nn.Softmax, nn.LogSoftmax)) and at_end:
        found = Chosen(nn.Identity(), "returns logits, whose margins are certified")
    elif isinstance(old, _ACTIVATIONS):
        found = _activation(old, shape, axis, at_end, choice)
    else:
        found = _normalisation(old, shape) or _pooling(old, shape, output_shape)
    return found or _scaled(old, shape)


def _own(old: nn.Module, shape: Shape) -> Chosen | None:
    """Keep a layer of this library with parameters, if its constant is 1."""
    if not any(True for _ in old.parameters()):
        return None
    value = constant(old, shape)
    if value > 1 + SLACK:
        raise ValueError(f"has the constant {value:.4g}, and no 1-Lipschitz replacement")
    varies = isinstance(old, (ScalarBatchNorm, ScaleAndBias, Unscale))
    return Chosen(copy.deepcopy(old), _PRESENT if varies else ALREADY)


def _scaled(old: nn.Module, shape: Shape) -> Chosen:
    """Keep a layer, divided by its constant where that exceeds 1, or it is linear."""
    value = constant(old, shape)
    if any(True for _ in old.parameters()):
        if value > 1 + SLACK:
            raise ValueError(f"has the constant {value:.4g}, and no 1-Lipschitz replacement")
        return Chosen(copy.deepcopy(old), _PRESENT)
    grows = isinstance(old, _LINEAR) and 0 < value < 1 - 1e-12
    if value <= 1 + 1e-12 and not grows:
        return Chosen(copy.deepcopy(old), ALREADY)
    if not 1 / _LARGEST <= value <= _LARGEST:
        raise ValueError(f"has the constant {value:.4g}, by which nothing is divided in earnest")
    scaled = nn.Sequential(copy.deepcopy(old), Scale(1 / value))
    why = (
        f"its constant {value:.4g} divided out"
        if value > 1
        else f"times {1 / value:.4g}, for the constant 1"
    )
    return Chosen(scaled, why)


def recurrent(old: Any, part: str, initial: int, choice: Choice) -> LosslessRNN:
    """Make the layer that stands in the place of a recurrent one.

    Parameters
    ----------
    old : torch.nn.Module
        The layer.
    part : str
        Which output of it is read.
    initial : int
        Number of its initial states.
    choice : Choice
        What the user asked for.

    Returns
    -------
    LosslessRNN

    Raises
    ------
    ValueError
        With the reason why there is none.
    """
    if isinstance(old, LosslessRNN):
        return copy.deepcopy(old)
    if not isinstance(old, (nn.RNN, nn.GRU, nn.LSTM)):
        raise ValueError("has no 1-Lipschitz replacement")
    if old.bidirectional or old.proj_size or part == "c" or (initial and isinstance(old, nn.LSTM)):
        raise ValueError(
            "has no 1-Lipschitz replacement if it is bidirectional or projects, or an LSTM with "
            "initial states or whose cell is read"
        )
    return LosslessRNN(
        *(old.input_size, old.hidden_size, old.num_layers, old.bias),
        batch_first=True,
        output_size=old.hidden_size,
        device=choice.device,
        dtype=choice.dtype,
    )


# ------------------------------------------------------------------------------- weights


def _like(old: Any) -> dict[str, Any]:
    return {"device": old.weight.device, "dtype": old.weight.dtype}


def _distance(old: Tensor, new: Tensor) -> float:
    old, new = old.detach().double(), new.detach().double()
    return ((old - new).norm() / old.norm()).item() if old.any() else math.inf


def _dense(old: nn.Linear, choice: Choice) -> Chosen:
    new = OrthogonalLinear(old.in_features, old.out_features, old.bias is not None, **_like(old))
    if not choice.keep_weights:
        return Chosen(new, "orthonormal rows or columns")
    with torch.no_grad():
        weight = old.weight.detach()
        new.weight = polar(weight.double()).to(weight.dtype)
        _keep_bias(old, new)
    return Chosen(
        new, "nearest orthonormal matrix, the polar factor", _distance(weight, new.weight)
    )


def _keep_bias(old: Any, new: Any) -> None:
    if old.bias is not None:
        new.bias.copy_(old.bias.detach())


def _convolution(old: Any, shape: Shape, output_shape: Shape, choice: Choice) -> Chosen:
    """Take the first of the layers that exist for this geometry and keep the shape."""
    kept = choice.keep_weights and not old.transposed
    reasons = []
    for make, why in _kernels(old) if kept else _convolutions(old):
        try:
            new = make()
            found = _shape_of(new, shape)
        except (ValueError, RuntimeError) as error:
            reasons.append(str(error))
            continue
        if found != output_shape:
            continue
        if not kept:
            return Chosen(new, why + ("; drawn anew" if choice.keep_weights else ""))
        with torch.no_grad():
            new.parametrizations.weight.original.copy_(old.weight.detach())
            _keep_bias(old, new)
        return Chosen(new, why, _distance(old.weight, new.weight))
    raise ValueError("; ".join(["no 1-Lipschitz convolution has its geometry", *reasons[:1]]))


def _shape_of(layer: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        like = next(layer.parameters())
        return tuple(layer(like.new_zeros(1, *shape)).shape[1:])


Candidate = tuple[Callable[[], Any], str]


def _geometry(old: Any) -> dict[str, Any]:
    return {
        "stride": old.stride,
        "dilation": old.dilation,
        "groups": old.groups,
        "bias": old.bias is not None,
        **_like(old),
    }


def _convolutions(old: Any) -> Iterator[Candidate]:
    dims = len(old.kernel_size)
    channels, geometry = (old.in_channels, old.out_channels), _geometry(old)
    orthogonal = (_TRANSPOSED if old.transposed else _ORTHOGONAL)[dims]
    if old.transposed:
        zeros = {"padding": old.padding, "output_padding": old.output_padding}
    else:
        zeros = {"padding": old.padding}

    def make(cls: Any, size: Any, **options: Any) -> Callable[[], Any]:
        return lambda: cls(*channels, size, **options, **geometry)

    larger = tuple(max(k, s) for k, s in zip(old.kernel_size, old.stride, strict=True))
    yield make(orthogonal, old.kernel_size), "orthogonal, on a circle"
    if larger != tuple(old.kernel_size):
        yield make(orthogonal, larger), f"orthogonal, with a kernel {larger} that reads every pixel"
    border = "the border is cut" if _pads(old) else "nothing is padded"
    yield make(orthogonal, old.kernel_size, padding_mode="zeros", **zeros), f"orthogonal, {border}"
    if not old.transposed:
        yield from _kernels(old)


def _pads(old: Any) -> bool:
    return old.padding == "same" or any(old.padding)


def _kernels(old: Any) -> Iterator[Candidate]:
    """Nonexpansive convolutions with the padding of the old one."""
    modes = ("circular", "zeros") if old.padding_mode == "circular" else ("zeros",)
    cls = _NONEXPANSIVE[len(old.kernel_size)]
    for mode in modes:
        yield (
            lambda mode=mode: cls(  # type: ignore[misc]
                *(old.in_channels, old.out_channels, old.kernel_size),
                padding=old.padding,
                padding_mode=mode,
                **_geometry(old),
            ),
            "nonexpansive, columns rescaled (AOL)",
        )


# --------------------------------------------------------------------------- activations


def _activation(old: nn.Module, shape: Shape, axis: int, at_end: bool, choice: Choice) -> Chosen:
    if at_end and not isinstance(old, nn.PReLU):
        kept = _scaled(old, shape)
        return dataclasses.replace(kept, why=f"shapes the output, {kept.why}")
    if choice.activation == "keep":
        return _scaled(old, shape)
    channels = shape[axis - 1]
    if callable(choice.activation):
        new = choice.activation(channels, axis)
        if not isinstance(new, nn.Module):
            raise TypeError(f"activation must return a module, got {type(new).__name__}")
        return Chosen(new, "the activation that was given")
    if channels % 2 or choice.activation == "absolute_value":
        why = "keeps the norm of gradients"
        odd = choice.activation != "absolute_value"
        return Chosen(AbsoluteValue(), f"{why}; {channels} channels have no pairs" if odd else why)
    if choice.activation == "householder":
        new = Householder(channels, axis, device=choice.device, dtype=choice.dtype)
        return Chosen(new, "keeps the norm of gradients")
    return Chosen(MaxMin(axis), "keeps the norm of gradients")


# -------------------------------------------------------------------------- normalisation


def _normalisation(old: Any, shape: Shape) -> Chosen | None:
    if isinstance(old, (_BatchNorm, _InstanceNorm)) and old.track_running_stats:
        like = cast(Tensor, old.running_mean)
        centering = BatchCentering(
            old.num_features, old.momentum, old.affine, device=like.device, dtype=like.dtype
        )
        return Chosen(centering, "subtracts means, and divides by nothing")
    if isinstance(old, nn.RMSNorm):
        size = old.normalized_shape
        return Chosen(nn.RMSNorm(size, 1.0, False), "eps = 1, without a scale")
    dims = range(1, len(shape) + 1)
    if isinstance(old, nn.LayerNorm):
        centered = dims[len(shape) - len(old.normalized_shape) :]
    elif isinstance(old, nn.GroupNorm) and 1 < old.num_groups < old.num_channels:
        parts = (old.num_groups, old.num_channels // old.num_groups)
        inside = LayerCentering(tuple(range(2, len(shape) + 2)))
        grouped = nn.Sequential(nn.Unflatten(1, parts), inside, nn.Flatten(1, 2))
        return Chosen(grouped, "subtracts means, and divides by nothing")
    elif isinstance(old, (nn.GroupNorm, _InstanceNorm)):
        centered = dims[:] if getattr(old, "num_groups", 0) == 1 else dims[1:]
    else:
        return None
    if math.prod(shape[d - 1] for d in centered) == 1:
        return Chosen(nn.Identity(), "a mean of one number would leave nothing")
    return Chosen(LayerCentering(tuple(centered)), "subtracts means, and divides by nothing")


# ------------------------------------------------------------------------------- pooling


def _pooling(old: Any, shape: Shape, output_shape: Shape) -> Chosen | None:
    sizes = list(zip(shape[1:], output_shape[1:], strict=False))
    whole = len(shape) == len(output_shape) > 1 and 0 not in output_shape
    if isinstance(old, _AVERAGES) and whole and all(n % m == 0 for n, m in sizes):
        window = tuple(n // m for n, m in sizes)
        apart = _per_axis(getattr(old, "kernel_size", window), len(sizes)) == window
        plain = getattr(old, "divisor_override", None) is None
        if apart and plain and not any(_per_axis(getattr(old, "padding", 0), len(sizes))):
            why = "the mean times the square root of the window"
            return Chosen(AveragePooling(window), why)
    if isinstance(old, _MAXIMA) and whole and constant(old, shape) > 1:
        stride = _per_axis(old.stride, len(sizes))
        if all(n // s == m for (n, m), s in zip(sizes, stride, strict=True)):
            return Chosen(type(old)(stride), "windows that do not overlap")
    copies = isinstance(old, nn.Upsample) and old.mode == "nearest"
    if copies and all(m % n == 0 for n, m in sizes):
        return Chosen(Upsampling(tuple(m // n for n, m in sizes)), "rescaled to keep the norm")
    return None


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,) * dims
    return cast(tuple[int, ...], values)
