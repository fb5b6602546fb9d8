"""Geometry of a convolution: kernel, stride, padding and dilation, checked, axis by axis."""

from __future__ import annotations

import math

from torch import Tensor

from lipbook.norms.arguments import Size, _finite, _integer, _tuple
from lipbook.norms.axes import _Axis, _Block

__all__ = []


def _circular_blocks(
    weight: Tensor, input_size: Size, stride: Size, dilation: Size, groups: int, transposed: bool
) -> tuple[Tensor, list[_Block]]:
    kernel, dims = _kernel(weight, groups)
    sizes = _tuple("input_size", input_size, dims, 1)
    strides = _tuple("stride", stride, dims, 1)
    dilations = _tuple("dilation", dilation, dims, 1)
    if transposed:
        sizes = [size * s for size, s in zip(sizes, strides, strict=True)]
    blocks = []
    for taps, size, s, d in zip(kernel.shape[3:], sizes, strides, dilations, strict=True):
        if size % s:
            raise ValueError(
                "input_size must be a multiple of stride for a convolution to be circular, "
                f"got input_size {tuple(sizes)} and stride {tuple(strides)}"
            )
        axis = _Axis(taps, size, size // s, s, d, mode="circular")
        blocks += axis.blocks()
    return kernel, blocks


def _geometry(
    weight: Tensor,
    input_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    padding_mode: str,
    transposed: bool,
    output_padding: Size,
) -> tuple[Tensor, list[_Axis]]:
    """Check what torch would check, and lay out the axes of the convolution (or its adjoint)."""
    kernel, dims = _kernel(weight, groups)
    sizes = _tuple("input_size", input_size, dims, 1)
    strides = _tuple("stride", stride, dims, 1)
    dilations = _tuple("dilation", dilation, dims, 1)
    extra = _tuple("output_padding", output_padding, dims, 0)
    spans = [d * (k - 1) for d, k in zip(dilations, kernel.shape[3:], strict=True)]
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise ValueError(
            "padding_mode must be 'zeros', 'circular', 'reflect' or 'replicate', "
            f"got {padding_mode!r}"
        )
    if transposed and padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' with transposed=True, got {padding_mode!r}")
    if not transposed and any(extra):
        raise ValueError(f"output_padding must be 0 unless transposed=True, got {output_padding!r}")
    pads = _padding(padding, spans, strides, transposed)
    axes = []
    for taps, n, s, d, span, (before, after), more in zip(
        kernel.shape[3:], sizes, strides, dilations, spans, pads, extra, strict=True
    ):
        most = {"circular": n, "reflect": n - 1}.get(padding_mode, math.inf)
        if max(before, after) > most:
            raise ValueError(
                f"padding must be at most {most} with padding_mode {padding_mode!r} and "
                f"input_size {n}, got {max(before, after)}"
            )
        if more >= max(s, d):
            raise ValueError(
                f"output_padding must be below stride or dilation ({max(s, d)}), got {more}"
            )
        if transposed:
            size, outputs = (n - 1) * s - before - after + span + 1 + more, n
        else:
            size, outputs = n, (n + before + after - span - 1) // s + 1
        if min(size, outputs) < 1:
            raise ValueError(
                f"input_size must leave an output, got {n} with kernel {taps}, stride {s}, "
                f"padding {before} and {after}, dilation {d}"
            )
        mode = padding_mode if before or after else "zeros"
        axes.append(_Axis(taps, size, outputs, s, d, before, after, mode))
    return kernel, axes


def _padding(
    padding: Size | str, spans: list[int], strides: list[int], transposed: bool
) -> list[tuple[int, int]]:
    if not isinstance(padding, str):
        return [(pad, pad) for pad in _tuple("padding", padding, len(spans), 0)]
    if padding not in ("same", "valid") or transposed:
        wanted = "integers" if transposed else "integers, 'same' or 'valid'"
        raise ValueError(f"padding must be {wanted}, got {padding!r}")
    if padding == "valid":
        return [(0, 0) for _ in spans]
    if any(s != 1 for s in strides):
        raise ValueError(f"padding must be integers with a stride, got 'same' and stride {strides}")
    return [(span // 2, span - span // 2) for span in spans]


def _kernel(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """View the weight as (groups, first / groups, second, *k) in float64, and count its axes."""
    weight = _finite("weight", weight)
    if weight.is_complex():
        raise TypeError(f"weight must be real, got {weight.dtype}")
    if weight.dim() not in (3, 4, 5) or weight.numel() == 0:
        raise ValueError(
            "weight must have shape (c_out, c_in, *k) with one to three sizes k, all positive, "
            f"got {tuple(weight.shape)}"
        )
    groups = _integer("groups", groups, 1)
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the first axis of weight, {weight.shape[0]}, got {groups}"
        )
    return weight.unflatten(0, (groups, -1)), weight.dim() - 2
