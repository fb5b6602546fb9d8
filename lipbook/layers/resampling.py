"""Layers of torch that move, average or select entries: reshaping, padding, pooling, upsampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.errors import (
    Analysis,
    ForwardError,
    _Affine,
    _check_single,
    _closed_form,
    _cuda_rule_of,
    _entries,
    _error_rule_of,
    _moved,
    _quantum,
    moved_error,
    plain_kernels,
)
from lipbook.norms import operator_norm
from lipbook.norms.rigorous import _UP, _gamma
from lipbook.rules import (
    Affine,
    Bound,
    Range,
    Shape,
    _axes,
    _eye,
    _rule_of,
    affine_rule,
    lipschitz_rule,
    pullback_rule,
    range_rule,
)
from lipbook.units import Units, sorted_units, units_rule

__all__: list[str] = []


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
    return _max_pool(_pooled(module, input_shape), p)


@_rule_of(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    return _separable(_adaptive_means(module, input_shape), p)


@_rule_of(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    return _max_pool(_pooled(module, input_shape), p)


def _max_pool(windows: list[Tensor], p: float) -> Bound:
    """Attained where one pixel exceeds all others: it alone decides every window it is in."""
    overlap = math.prod(window.sum(1).max().item() for window in windows)
    return Bound(overlap ** (1 / p), "exact", p)


def _windows(size: int, *window: Any) -> Tensor:
    """Which windows each pixel is in, (size, windows); ``window`` as ``max_pool1d`` takes it."""
    return (functional.max_pool1d(_eye(size), *window)[:, 0] == 1).double()


def _pooled(module: Any, input_shape: Shape) -> list[Tensor]:
    """Which windows of a pooling layer each pixel is in, axis by axis."""
    if hasattr(module, "output_size"):
        return [(m > 0).double() for m in _adaptive_means(module, input_shape)]
    names = ("kernel_size", "stride", "padding", "dilation")
    axes = _axes(module, input_shape, *names)
    return [_windows(*axis, module.ceil_mode) for axis in axes]


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


def check_padding(mode: str, padding: Sequence[int]) -> None:
    """Refuse circular padding that torch computes from memory it has not written."""
    pairs = zip(padding[::2], padding[1::2], strict=True)
    if mode == "circular" and any(min(pair) < 0 < max(pair) for pair in pairs):
        raise ValueError(
            "padding must not crop one side of an axis and pad the other in a circular layer, "
            f"where torch returns uninitialised memory, got {tuple(padding)}"
        )


def _padding(mode: str, module: Any, input_shape: Shape, p: float) -> Bound:
    check_padding(mode, module.padding)
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


# ------------------------------------------------------------------- matrices and ranges

_MEANS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_MOVES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ChannelShuffle, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(cls for classes in _PADDING_MODES.values() for cls in classes),
)


@_rule_of(*_MOVES, *_MEANS, nn.Upsample, dispatch=affine_rule)
def _(module: Any, input_shape: Shape) -> Affine:
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    offset = module(zero)

    def apply(x: Tensor) -> Tensor:
        return module(x) - offset

    moves = isinstance(module, _MOVES)
    negative = isinstance(module, nn.Upsample) and module.mode == "bicubic"
    divisor = getattr(module, "divisor_override", None)
    if negative or (divisor is not None and divisor < 0):
        matrix = _dense(apply, input_shape)

        def absolute(x: Tensor) -> Tensor:
            return (x.flatten(1) @ matrix.abs().mT).view(len(x), *offset.shape[1:])

        return Affine(apply, absolute, None, offset[0], math.prod(input_shape))
    terms = 1 if moves else -(-math.prod(input_shape) // max(1, offset.numel())) + 16
    return Affine(apply, apply, apply if moves else None, offset[0], terms)


def _dense(apply: Any, input_shape: Shape) -> Tensor:
    n = math.prod(input_shape)
    return apply(torch.eye(n, dtype=torch.float64).reshape(n, *input_shape)).flatten(1).mT


_MAXIMA = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


@_rule_of(*_MAXIMA, dispatch=range_rule)
def _(module: Any, values: Range) -> Range:
    low, high = module(values.low), module(values.high)  # monotone
    if values.center is None or values.radius is None:
        return Range(low, high)
    stretch = lipschitz_rule(module, values.shape, 2.0).value * (1 + 2.0**-40)
    return Range(low, high, module(values.center), values.radius * stretch)


@_rule_of(*_MAXIMA, dispatch=units_rule)
def _(module: Any, input_shape: Shape) -> Units:
    places = torch.arange(math.prod(input_shape)).view(input_shape)
    inputs = list(places.flatten(1))  # of each channel, then of each window of the channel
    for axis, window in enumerate(_pooled(module, input_shape), 1):
        inputs = [
            part.view(-1, *input_shape[axis:])[:, column > 0].flatten()
            for part in inputs
            for column in window.mT
        ]
    outputs = list(torch.arange(len(inputs))[:, None])
    return sorted_units(inputs, outputs, (places.numel(), len(inputs)))


# Note [undecided windows]
# A window whose largest lower end no other upper end reaches has one winner. Else the entry of a
# candidate, whose upper end does reach it, lies between 0 and the cotangent, and the others are 0.


@_rule_of(nn.MaxPool1d, nn.MaxPool2d, dispatch=pullback_rule)
def _(module: Any, cotangent: tuple[Tensor, Tensor], values: Range) -> tuple[Tensor, Tensor] | None:
    if module.ceil_mode:
        return None
    one = isinstance(module, nn.MaxPool1d)
    names = ("kernel_size", "stride", "padding", "dilation")
    axes = _axes(module, values.shape, *names)
    options = [tuple(axis[k] for axis in axes) for k in range(1, 5)]
    if one:
        options = [(k, *option) for k, option in zip((1, 1, 0, 1), options, strict=True)]
    kernel, stride, padding, dilation = options
    window: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": 0,
        "dilation": dilation,
    }
    edge = (padding[1], padding[1], padding[0], padding[0])

    def windows(image: Tensor) -> Tensor:  # (batch, c, taps, windows)
        image = functional.pad(image.unsqueeze(2) if one else image, edge, value=-math.inf)
        return functional.unfold(image, **window).unflatten(1, (values.shape[0], -1))

    low, high = windows(values.low), windows(values.high)
    candidates = (high >= low.amax(2, keepdim=True)).double()
    least = torch.where(candidates.sum(2, keepdim=True) == 1, candidates, 0.0)
    shape = tuple(values.shape[1:])
    sizes = (1, *shape) if one else shape
    padded = tuple(n + 2 * k for n, k in zip(sizes, padding, strict=True))
    result = []
    center, radius = (part.flatten(3)[:, :, :, None] for part in cotangent)  # one tap axis
    middle, half = ((candidates + least) / 2)[:, None], ((candidates - least) / 2)[:, None]
    for part in (center * middle, radius * (middle + half) + center.abs() * half):
        batch, rows = part.shape[:2]
        image = functional.fold(part.flatten(0, 1).flatten(1, 2), padded, **window)
        image = functional.pad(image, tuple(-k for k in edge))
        image = image.squeeze(2) if one else image
        result.append(image.unflatten(0, (batch, rows)))
    return result[0], result[1] * (1 + 2.0**-40) + result[0].abs() * 2.0**-45


# ------------------------------------------------------------------- errors of programs

_SELECTING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *_MAXIMA,
)
_error_rule_of(*_SELECTING)(moved_error)
_cuda_rule_of(*_SELECTING, *_MEANS)(plain_kernels)


@_error_rule_of(nn.Upsample)
def _(module: nn.Upsample, example: Tensor, p: float) -> Analysis:
    r"""Bound linear interpolation, of rounded positions, weights and sums; copies round nothing.

    A position :math:`s (i + 1/2) - 1/2` on an axis of n entries is off by :math:`4 u (n + 1)`, and
    the interpolant, whose slope is at most :math:`2 \max|x|`, by twice that times
    :math:`\max|x|`. Weights of :math:`2^d` corners with d + 4 roundings each sum to 1.
    """
    lipschitz = _closed_form(module, example, p)
    if module.mode == "nearest":
        return _moved(module, lipschitz, p)
    if module.mode not in ("linear", "bilinear", "trilinear"):
        raise ValueError(
            "mode must be 'nearest' or linear for its rounding to be known, got "
            f"{module.mode!r}: use sound=False"
        )
    _check_single(example)
    sizes = example.shape[2:]
    units = 8 * sum(n + 1 for n in sizes) + 2 ** len(sizes) + 4 * len(sizes) + 8

    def analysis(x: Tensor) -> ForwardError:
        largest = x.flatten(1).abs().amax(1).double()
        outputs = module(x)
        entries, info = _entries(outputs, p), torch.finfo(outputs.dtype)
        slope = _gamma(units, outputs.dtype) * entries * _UP
        error = slope * largest + units * _quantum(outputs.dtype) * entries
        return ForwardError(outputs, lipschitz, error * _UP, slope, info.max / 8 - largest)

    return analysis


@_error_rule_of(*_MEANS)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    if hasattr(module, "kernel_size"):
        axes = _axes(module, tuple(example.shape[1:]), "kernel_size")
        window = math.prod(kernel for _, kernel in axes)
    else:
        sizes = zip(example.shape[2:], module(example).shape[2:], strict=True)
        window = math.prod(-(-n // size) + 1 for n, size in sizes)
    norm = _closed_form(module, example, p)
    affine = _Affine(module, norm, norm * window, 0.0, 1.0, window + 2)  # the sum comes undivided
    return lambda x: affine(x, p)
