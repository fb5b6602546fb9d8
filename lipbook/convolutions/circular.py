"""Convolutions on a circle: padding, geometry, and the layers that all constructions share."""

from __future__ import annotations

import abc
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lipbook.composition import Bound
from lipbook.norms import convolution_norm_bound, convolution_norm_is_exact, dual_exponent
from lipbook.norms.arguments import _floating, _integer, _tensor
from lipbook.orthogonal.constrained import Constrained, raw_parameters

__all__ = [
    "circular_pad",
    "circular_fold",
    "circular_transpose",
    "Padding",
    "Size",
    "CONV",
    "CONV_TRANSPOSE",
    "per_axis",
    "one_size",
    "check_kernel",
    "channel_counts",
    "check_groups",
    "resolve_padding",
    "semi_orthogonal",
    "ConstrainedConv",
    "CircularConv",
    "CircularConvTranspose",
    "OnUnshuffled",
    "convolution_rule",
    "response_rule",
]

Size = int | Sequence[int]
Padding = Size | Literal["same", "valid"]

# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("_pad_whole")
torch.fx.wrap("circular_fold")
torch.fx.wrap("circular_transpose")
torch.fx.wrap("_pad_symmetric")


CONV = (functional.conv1d, functional.conv2d, functional.conv3d)


CONV_TRANSPOSE = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def circular_pad(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    r"""Circular padding: continues the last axes periodically.

    The values of :func:`torch.nn.functional.pad` in mode ``"circular"``, with a backward pass that
    takes less time: :func:`circular_fold`.

    Parameters
    ----------
    x : torch.Tensor
        (\*any, \*size).
    pads : sequence of tuple of int
        Pixels before and after, for each of the last axes in their order. At most the size.

    Returns
    -------
    torch.Tensor
        (\*any, \*(size + before + after)).

    Raises
    ------
    ValueError
        If a pad exceeds the size of its axis.

    Examples
    --------
    >>> circular_pad(torch.arange(5), [(2, 1)])
    tensor([3, 4, 0, 1, 2, 3, 4, 0])
    """
    _check_axes(x, pads)
    for size, pair in zip(x.shape[x.dim() - len(pads) :], pads, strict=True):
        if max(pair) > size:
            raise ValueError(f"pads must be at most the size {size}, got {pair}")
    if not any(map(any, pads)):
        return x
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _padded_by_copies(x, pads)
    result: Tensor = _Pad.apply(x, tuple(pads))
    return result


def _padded_by_copies(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    for axis, (before, after) in zip(range(-1, -len(pads) - 1, -1), reversed(pads), strict=True):
        size = x.shape[axis]
        if before or after:
            parts = x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)
            x = torch.cat(parts, axis)
    return x


def circular_fold(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    r"""Adjoint of circular padding: adds what lies outside to where it came from.

    Parameters
    ----------
    x : torch.Tensor
        (\*any, \*(size + before + after)).
    pads : sequence of tuple of int
        As for :func:`circular_pad`.

    Returns
    -------
    torch.Tensor
        (\*any, \*size).

    Raises
    ------
    ValueError
        If a pad exceeds the size of its axis.

    Examples
    --------
    >>> circular_fold(torch.tensor([10, 20, 0, 1, 2, 3, 4, 30]), [(2, 1)])
    tensor([30,  1,  2, 13, 24])
    """
    _check_axes(x, pads)
    for size, pair in zip(x.shape[x.dim() - len(pads) :], pads, strict=True):
        if max(pair) > size - sum(pair):
            raise ValueError(f"pads must be at most the size {size - sum(pair)}, got {pair}")
    if not any(map(any, pads)):
        return x
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _folded(x, pads)
    result: Tensor = _Fold.apply(x, tuple(pads))
    return result


def _folded(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """Add the ends of the last axis to its middle, each folded along the axes before."""
    first = x.dim() - len(pads)

    def folded(part: Tensor, axes: int) -> Tensor:
        if axes == 0:
            return part.clone()
        axis, (before, after) = first + axes - 1, pads[axes - 1]
        inner = part.shape[axis] - before - after
        middle = folded(part.narrow(axis, before, inner), axes - 1)
        for start, to, length in (0, inner - before, before), (before + inner, 0, after):
            if length:
                end = folded(part.narrow(axis, start, length), axes - 1)
                middle.narrow(axis, to, length).add_(end)
        return middle

    return folded(x, len(pads))


# Note [padding and folding]
# Each is the derivative of the other. As two functions of autograd they take a third of the time of
# copies with theirs, which torch makes for each axis and each end.


class _Pad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, pads: tuple[tuple[int, int], ...]) -> Tensor:
        if len(pads) + 2 == x.dim() <= 5:
            return functional.pad(x, [pad for pair in reversed(pads) for pad in pair], "circular")
        return _padded_by_copies(x, pads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        ctx.pads = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(gradient, ctx.pads), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Pad.apply(tangent, ctx.pads)


class _Fold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, pads: tuple[tuple[int, int], ...]) -> Tensor:
        return _folded(x, pads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        ctx.pads = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Pad.apply(gradient, ctx.pads), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Fold.apply(tangent, ctx.pads)


def circular_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """Transposed convolution on a circle, whose output begins ``before`` pixels into the whole."""
    geometry = tuple(before), tuple(strides), tuple(dilations), groups
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    batch = x.dim() == weight.dim() and x.dtype == weight.dtype
    if traced or not batch or x.device.type not in ("cpu", "cuda"):
        return _transposed(x, weight, bias, *geometry)
    if torch.is_autocast_enabled(x.device.type):
        return _transposed(x, weight, bias, *geometry)
    result: Tensor = _Transposed.apply(x, weight, bias, *geometry)
    return result


# Note [transposed on a circle]
# The forward pass continues the input, which a stride makes the smaller image, and cuts the output;
# nothing is folded. The backward pass continues the gradient instead, and so cuts nothing: each
# computes no pixel that it does not need.


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    groups: int,
) -> Tensor:
    pads, cuts, extra = [], [], []
    for k, b, s, d in zip(weight.shape[2:], before, strides, dilations, strict=True):
        span = d * (k - 1)
        left, right = (span - b) // s, (b + s - 1) // s  # the pixels that reach across the ends
        longer = (left - right + 1) * s + 2 * b - span - 1  # than torch cuts at the far end
        left, right = left + max(-(longer // s), 0), right + max(longer // s, 0)
        pads.append((left, right))
        cuts.append(left * s + b)
        extra.append(longer % s)
    convolve: Any = CONV_TRANSPOSE[len(pads) - 1]
    ends = (strides, cuts, extra, groups, dilations)
    return cast(Tensor, convolve(circular_pad(x, pads), weight, bias, *ends))


class _Transposed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return _transposed(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.geometry = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        before, strides, dilations, groups = ctx.geometry
        pads, extra = [], []
        for k, b, s, d in zip(weight.shape[2:], before, strides, dilations, strict=True):
            after = d * (k - 1) + 1 - s - b
            pads.append((b, max(after, 0)))
            extra.append(max(-after, 0))
        whole = circular_pad(gradient, pads)
        none = [0] * len(pads)
        wanted = [*ctx.needs_input_grad[:2], False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            whole, x, weight, None, strides, none, dilations, True, extra, groups, wanted
        )
        axes = [axis for axis in range(gradient.dim()) if axis != gradient.dim() - len(pads) - 1]
        of_bias = gradient.sum(axes) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor, of_weight: Tensor, of_bias: Tensor | None, *_: None) -> Tensor:
        x, weight = ctx.saved_tensors
        along = _transposed(of_x, weight, of_bias, *ctx.geometry)
        return along + _transposed(x, of_weight, None, *ctx.geometry)


def _check_axes(x: Tensor, pads: Sequence[tuple[int, int]]) -> None:
    _tensor("x", x)
    if x.dim() < len(pads):
        raise ValueError(f"x must have {len(pads)} axes or more, got shape {tuple(x.shape)}")


def per_axis(name: str, value: Size, dims: int, least: int = 1) -> tuple[int, ...]:
    """One integer for each axis, from one for all or a sequence."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims or not all(hasattr(v, "__index__") and v >= least for v in values):
        raise ValueError(f"{name} must be one or {dims} integers >= {least}, got {value!r}")
    return tuple(operator.index(v) for v in values)


def one_size(image_size: Size, kernel_size: int, stride: int) -> tuple[int, ...]:
    """Size of the images of a layer that has a kernel as large as they are."""
    sizes = per_axis("image_size", image_size, 2)
    if any(n % stride or n < kernel_size * stride for n in sizes):
        raise ValueError(
            f"image_size must be a multiple of stride {stride} and hold {kernel_size} of them, "
            f"got {sizes}"
        )
    return sizes


def check_kernel(weight: Tensor, groups: int) -> int:
    """Refuse what is no kernel of a convolution with these groups; return its number of axes."""
    _floating("weight", weight)
    dims = weight.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(
            "weight must be a real floating-point kernel (c_out, c_in / groups, *k) with one to "
            f"three sizes k, got shape {tuple(weight.shape)}"
        )
    check_groups(len(weight), groups)
    return dims


def channel_counts(in_channels: int, out_channels: int) -> tuple[int, int]:
    """Refuse what are no numbers of channels."""
    return _integer("in_channels", in_channels, 1), _integer("out_channels", out_channels, 1)


def check_groups(channels: int, groups: int) -> None:
    """Refuse groups that do not divide the channels."""
    _integer("groups", groups, -math.inf)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of the weight, got {groups}")


def resolve_padding(
    padding: Padding, spans: Sequence[int], strides: Sequence[int], mode: str
) -> tuple[tuple[int, ...] | str, list[tuple[int, int]]]:
    """Resolve padding as torch takes it, and to pixels before and after on each axis."""
    totals = [max(span + 1 - s, 0) for span, s in zip(spans, strides, strict=True)]
    if padding == "same" and max(strides) == 1 and any(total % 2 for total in totals):
        return "same", [(total // 2, total - total // 2) for total in totals]
    if padding == "same":  # one more before than after, as torch's integers have it with a stride
        before = tuple((total + 1) // 2 for total in totals)
        if any(2 * pad > span for pad, span in zip(before, spans, strict=True)):
            raise ValueError(
                "padding='same' needs an odd kernel on the axes without stride if there are axes "
                f"with one, got dilation * (kernel_size - 1) {tuple(spans)}, stride {strides}"
            )
    elif padding == "valid":
        before = (0,) * len(spans)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    else:
        before = per_axis("padding", padding, len(spans), least=0)
    if mode != "zeros" and any(2 * pad > span for pad, span in zip(before, spans, strict=True)):
        raise ValueError(
            f"padding must be at most half of dilation * (kernel_size - 1) with {mode} padding, or "
            "pixels are read too often and the norm exceeds 1, got "
            f"{before} and {tuple(spans)}"
        )
    pairs = zip(before, totals, strict=True)
    return before, [(pad, max(total - pad, 0) if 2 * pad >= total else pad) for pad, total in pairs]


def semi_orthogonal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random matrices with orthonormal columns, or rows if they are fewer, (..., m, n)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    wide = like.shape[-2] < like.shape[-1]
    shape = like.mT.shape if wide else like.shape
    normal = torch.randn(shape, dtype=dtype, device=like.device, generator=generator)
    factor, triangle = torch.linalg.qr(normal)
    factor = factor * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return (factor.mT if wide else factor).contiguous().to(like.dtype)


# Note [circular]
# On a circle of N pixels with a stride s that divides N, the layer has at most N / s outputs
# an axis: with more it would repeat some of them, and its norm would exceed 1. With exactly
# N / s outputs ("same") nothing is lost. Zero padding embeds the image in a longer circle and cuts
# the output, neither of which can increase a norm.


class ConstrainedConv(Constrained, _ConvNd):
    """What the constrained layers share: geometry, initial values, the check of the circle."""

    _dims: int
    _padding_modes: tuple[str, ...] = ("circular", "zeros")

    def _geometry(
        self, kernel_size: Size, stride: Size, dilation: Size, padding_mode: str
    ) -> tuple[tuple[int, ...], ...]:
        if padding_mode not in self._padding_modes:
            modes = " or ".join(map(repr, self._padding_modes))
            raise ValueError(
                f"padding_mode must be {modes} (other padding copies pixels, which takes the norm "
                f"above 1), got {padding_mode!r}"
            )
        arguments = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        return tuple(per_axis(name, value, self._dims) for name, value in arguments.items())

    def _constrain(self, constraint: nn.Module) -> None:
        parametrize.register_parametrization(self, "weight", constraint)
        if not hasattr(constraint, "right_inverse"):  # which draws when it is registered
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new raw parameters for the weight, and a bias as torch does."""
        if not parametrize.is_parametrized(self, "weight"):
            return super().reset_parameters()
        raw = raw_parameters(self)
        constraint: Any = cast(Any, self.parametrizations).weight[0]
        with torch.no_grad():
            for tensor, value in zip(raw, constraint.initial(raw[0]), strict=True):
                tensor.copy_(value)
            if self.bias is not None:
                inputs = self.out_channels if self.transposed else self.in_channels
                bound = 1 / math.sqrt(inputs // self.groups * math.prod(self.kernel_size))
                self.bias.uniform_(-bound, bound)


def _pad_whole(x: Tensor, pads: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Pad circles that are whole numbers of strides, see Note [circular]."""
    size = x.shape[x.dim() - len(pads) :]
    if any(n % s for n, s in zip(size, strides, strict=True)):
        raise ValueError(
            "input must have a size that stride divides, "
            f"got size {tuple(size)} and stride {tuple(strides)}"
        )
    return circular_pad(x, pads)


def _pad_symmetric(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """Continue the last axes by their mirror image, the outermost pixel first."""
    for axis, (before, after) in zip(range(-1, -len(pads) - 1, -1), reversed(pads), strict=True):
        size = x.shape[axis]
        if max(before, after) > size:
            raise ValueError(
                "input must be at least as large as its padding, with symmetric padding, "
                f"got size {size} and padding {(before, after)}"
            )
        start, end = x.narrow(axis, 0, before), x.narrow(axis, size - after, after)
        x = torch.cat([start.flip(axis), x, end.flip(axis)], axis)
    return x


class CircularConv(ConstrainedConv):
    """Convolution with a constrained kernel, on a circle or with a border around the image."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Padding,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        sizes, strides, dilations = self._geometry(kernel_size, stride, dilation, padding_mode)
        spans = [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)]
        pads, self._pads = resolve_padding(padding, spans, strides, padding_mode)
        channels = channel_counts(in_channels, out_channels)
        groups = _integer("groups", groups, 1)
        geometry: Any = (sizes, strides, pads, dilations, groups, bias)
        super().__init__(*channels, *geometry, "zeros", device, dtype)  # type: ignore[call-arg]
        self.padding_mode = cast(Any, padding_mode)  # torch's classes do not know all of them

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, *size) to (batch, c_out, *size / stride)."""
        padding: Any = self.padding
        if self.padding_mode == "circular":
            input, padding = _pad_whole(input, self._pads, self.stride), 0
        elif self.padding_mode == "symmetric":
            input, padding = _pad_symmetric(input, self._pads), 0
        elif padding == "same":  # by an even kernel; torch would do so with a warning
            ends = itertools.chain.from_iterable(reversed(self._pads))
            input, padding = functional.pad(input, list(ends)), 0
        convolve: Any = CONV[self._dims - 1]
        geometry = (self.stride, padding, self.dilation, self.groups)
        return cast(Tensor, convolve(input, self.weight, self.bias, *geometry))


class CircularConvTranspose(ConstrainedConv):
    """Transposed convolution with a constrained kernel, on a circle or with its border cut off."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Padding,
        output_padding: Size,
        groups: int,
        bias: bool,
        dilation: Size,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        sizes, strides, dilations = self._geometry(kernel_size, stride, dilation, padding_mode)
        extra = per_axis("output_padding", output_padding, self._dims, least=0)
        spans = [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)]
        pads, self._pads = resolve_padding(padding, spans, strides, padding_mode)
        totals = [span + 1 - s for span, s in zip(spans, strides, strict=True)]
        if min(totals) < 0:
            raise ValueError(
                "kernel_size must be at least stride, that is dilation * (kernel_size - 1) + 1, or "
                f"some pixels of the output are never written, got kernel_size {sizes}, stride "
                f"{strides} and dilation {dilations}"
            )
        if padding_mode == "circular":
            around = [sum(pair) for pair in self._pads]
            if around != totals or any(extra):
                raise ValueError(
                    "padding must be 'same' and output_padding 0 for a transposed convolution on a "
                    f"circle, got {padding!r} and {output_padding!r}"
                )
        elif padding == "same":
            pads = tuple((total + 1) // 2 for total in totals)
            extra = tuple(total % 2 for total in totals)
            if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
                raise ValueError(
                    "padding must be integers for an even kernel without stride and dilation "
                    f"and with zero padding, got 'same' and kernel_size {sizes}"
                )
        channels = channel_counts(in_channels, out_channels)
        groups = _integer("groups", groups, 1)
        geometry: Any = (sizes, strides, 0, extra, groups, bias, dilations, "zeros")
        super().__init__(*channels, *geometry, device, dtype)  # type: ignore[call-arg]
        self.padding, self.padding_mode = pads, cast(Any, padding_mode)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, *size) to (batch, c_out, *size * stride)."""
        weight, bias = self.weight, self.bias
        if self.padding_mode == "circular":
            before = [pad for pad, _ in self._pads]
            geometry = (self.stride, self.dilation, self.groups)
            return circular_transpose(input, weight, bias, before, *geometry)
        transpose: Any = CONV_TRANSPOSE[self._dims - 1]
        ends = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return cast(Tensor, transpose(input, weight, bias, *ends))


class OnUnshuffled(Constrained):
    """Strides by invertible downsampling, then a circular map of channels with a weight."""

    weight: Tensor
    transposed = False  # or the map first, then upsampling

    def __init__(
        self,
        out_channels: int,
        stride: int,
        bias: bool,
        weight: Tensor,
        constraint: nn.Module,
        new_shape: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels, self.stride = out_channels, stride
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_empty(out_channels)) if bias else None
        self.reset_parameters()
        parametrize.register_parametrization(self, "weight", constraint, unsafe=new_shape)

    def reset_parameters(self) -> None:
        """Draw a new raw parameter for the weight as torch does; the bias is zero."""
        nn.init.kaiming_uniform_(raw_parameters(self)[0], a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @abc.abstractmethod
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the map of channels with this weight, without the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h / stride, w / stride)."""
        output = self.linear(functional.pixel_unshuffle(input, self.stride), self.weight)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


def convolution_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    """Norm of the convolution with its present kernel: computed, not taken for 1."""
    size = list(input_shape[1:])
    geometry: dict[str, Any] = {
        "weight": module.weight.detach().double(),
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "p": p,
    }
    if module.transposed and module.padding_mode == "circular":  # the adjoint, which norms knows
        size = [n * s for n, s in zip(size, module.stride, strict=True)]
        geometry |= {"p": dual_exponent(p)}
    elif module.transposed:
        geometry |= {"transposed": True, "output_padding": module.output_padding}
    kind = "exact" if convolution_norm_is_exact(input_size=size, **geometry) else "upper bound"
    return Bound(convolution_norm_bound(input_size=size, **geometry).item(), cast(Any, kind), p)


def response_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    """Norm of the circular convolution whose kernel is the response to one bright pixel."""
    stride = 1 if module.transposed else module.stride  # shuffling entries changes no norm
    channels = input_shape[0] * stride**2
    size = [n // stride for n in input_shape[1:]]
    pixel = torch.zeros(size, dtype=torch.float64)
    pixel[0, 0] = 1
    pixels = torch.eye(channels, dtype=torch.float64)[:, :, None, None] * pixel
    with torch.no_grad():
        kernel = module.linear(pixels, module.weight.double()).transpose(0, 1)
    geometry: dict[str, Any] = {"padding": "same", "padding_mode": "circular", "p": p}
    kind = "exact" if convolution_norm_is_exact(kernel, size, **geometry) else "upper bound"
    return Bound(convolution_norm_bound(kernel, size, **geometry).item(), cast(Any, kind), p)


# Note [strides on a circle]
# torch pads both ends alike and leaves the last pixels unread: the same numbers, but from an image
# of another size, for which the sums may be taken in another order. It also accepts images that
# the stride does not divide, where the norm exceeds 1.


def torch_computes(module: Any) -> bool:
    """Whether torch's class of a convolution makes the same calls on the same padded image."""
    if module.padding_mode == "circular":
        return not module.transposed and max(module.stride) == 1
    return module.padding_mode == "zeros" and bool(module.padding != "same")
