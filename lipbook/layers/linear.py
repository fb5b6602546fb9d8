"""Linear layers of torch, convolutions and batch normalisation: matrices that are known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lipbook.errors import (
    Analysis,
    _absolute_norm,
    _Affine,
    _after_cast,
    _bias_norm,
    _check_direct,
    _computing_dtype,
    _cuda_rule_of,
    _error_rule_of,
    _exactly,
    _norms,
    forward_error_rule,
    plain_kernels,
)
from lipbook.norms import (
    convolution_norm_bound,
    convolution_norm_is_exact,
    dual_exponent,
    operator_norm,
)
from lipbook.norms.precision import _scale
from lipbook.norms.rigorous import (
    _UP,
    _gamma,
    _nonnegative_norm,
    rigorous_convolution_norm,
    rigorous_matrix_norm,
)
from lipbook.rules import (
    Affine,
    Bound,
    Kind,
    Shape,
    _axes,
    _float64,
    _rule_of,
    affine_rule,
    lipschitz_rule,
)

__all__ = ["weighted_affine"]


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


# Note [matrices of weighted layers]
# With its weights replaced by |W| a layer multiplies by |A|, and by W * W it multiplies by A * A,
# as long as no input meets two weights of one output. Reflecting and replicating padding copies
# inputs; then |A| is bounded still (|a + b| <= |a| + |b|), squares are not.


def weighted_affine(module: Any, input_shape: Shape) -> Affine:
    """Affine form of a layer whose weight is its attribute ``weight``, in float64."""

    def mapped(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        twin = copy.copy(module)
        twin.__dict__["_parameters"] = dict(module._parameters)
        twin._parameters["weight"] = nn.Parameter(function(module.weight.detach()), False)
        if "bias" in twin._parameters:
            twin._parameters["bias"] = None
        vars(twin).pop("forward", None)
        return twin

    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    weight = module.weight.detach()
    transposed = bool(getattr(module, "transposed", False))
    copies = getattr(module, "padding_mode", "zeros") != "zeros"
    terms = weight.numel() // weight.shape[1 if transposed else 0]
    return Affine(
        mapped(lambda w: w),
        mapped(torch.abs),
        None if copies else mapped(torch.square),
        module(zero)[0].detach(),
        terms,
    )


for _class in (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
):
    affine_rule.register(_class, weighted_affine)


@_rule_of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, dispatch=affine_rule)
def _(module: Any, input_shape: Shape) -> Affine:
    scale = (_float64(module.running_var) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * _float64(module.weight)
    scale = scale.view(-1, *[1] * (len(input_shape) - 1))
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    return Affine(
        lambda x: scale * x,
        lambda x: scale.abs() * x,
        lambda x: scale**2 * x,
        module(zero)[0].detach(),
        8,
    )


# ------------------------------------------------------------------- errors of programs


# Note [products of moduli]
# For any y and v, |W||x| = y (v . |x|) + (|W| - y vᵀ) |x|. With v near the first singular vector of
# |W| and y = |W| v, the second matrix is small, since |W| is near a matrix of rank one. So
# ‖|W||x|‖ <= ‖y‖ (v . |x|) + ‖|W| - y vᵀ‖ ‖x‖ takes one product of vectors, where |W||x| would take
# as long as W x. In other norms than p = 2 it is formed.


@forward_error_rule.register
def _(module: nn.Linear, example: Tensor, p: float) -> Analysis:
    dtype = _computing_dtype(example, module.weight)
    weight = module.weight.detach().to(dtype)
    positions = example[0, ..., 0].numel()
    absolute_norm, magnitude = _products_of_moduli(weight, p)

    affine = _Affine(
        layer=module,
        norm=rigorous_matrix_norm(weight, p),
        absolute_norm=absolute_norm,
        bias_norm=_bias_norm(module.bias, dtype, positions, p),
        largest=weight.abs().max().item(),
        terms=module.in_features,
        magnitude=magnitude,
        plain_sums=True,
    )
    return _after_cast(affine, dtype, p)


def _products_of_moduli(
    weight: Tensor, p: float
) -> tuple[float, Callable[[Tensor, Tensor], Tensor]]:
    """Bounds of ‖|W|‖ and, for a batch and its norms, of ‖|W||x|‖."""
    working = torch.promote_types(weight.dtype, torch.float32)
    gamma = _gamma(weight.shape[1] + 2, working)
    if p != 2:
        absolute = weight.abs().to(working)

        def formed(x: Tensor, size: Tensor) -> Tensor:
            inside = _exactly(functional.linear, x.abs().to(working), absolute)
            return _norms(inside, p) * (1 + 2 * gamma)

        return rigorous_matrix_norm(weight, p), formed
    norm, vector = _first_of_moduli(weight)
    vector = vector / torch.linalg.vector_norm(vector)
    vector = vector.to(working)
    moduli, along = weight.detach().double().cpu().abs(), vector.double()
    image = moduli @ along
    rest = moduli - image[:, None] * along
    length = torch.linalg.vector_norm(image).item() * (1 + _gamma(len(image) + 4, torch.float64))
    hidden = 2.0**-50 * torch.linalg.matrix_norm(moduli).item()  # by the rounding of the rest
    apart = (rigorous_matrix_norm(rest, 2) + hidden) * _UP
    row = vector.to(weight.device).unsqueeze(0)

    def magnitude(x: Tensor, size: Tensor) -> Tensor:
        parts = _exactly(functional.linear, x.abs().to(working), row).view(len(x), -1)
        share = _norms(parts, 2) * (1 + 2 * gamma)
        return torch.minimum(norm * size, length * share + apart * size) * _UP

    return norm, magnitude


def _first_of_moduli(weight: Tensor) -> tuple[float, Tensor]:
    """Bound of ‖|W|‖ in the 2-norm, and a vector near the first singular one."""
    moduli = weight.detach().double().cpu().abs()
    scale = _scale(moduli).item()
    moduli = moduli / scale
    norm, vector = _nonnegative_norm(lambda v: functional.linear(v, moduli), weight.shape[1:])
    return norm * scale * _UP, vector


def matrix_of_moduli(weight: Tensor, p: float) -> float:
    """Bound of ‖|W|‖; see Note [the norm of a matrix of moduli]."""
    return _first_of_moduli(weight)[0] if p == 2 else rigorous_matrix_norm(weight, p)


def _of_weight(module: Any, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Convolve as a layer does, with another weight and no bias; None if it has no weight."""
    constrained = parametrize.is_parametrized(module, "weight")
    if not constrained and "weight" not in module._parameters:
        return None
    cls: Any = type(module).__mro__[1] if constrained else type(module)
    twin = cls.__new__(cls)
    parameters = {"weight": nn.Parameter(weight, False), "bias": None}
    twin.__dict__.update(vars(module), _parameters=parameters, _modules={})
    twin.__dict__.pop("forward", None)
    forward: Callable[[Tensor], Tensor] = twin.forward
    return forward


def convolution_of_moduli(module: Any, weight: Tensor, shape: Shape) -> float:
    """Bound of ‖|A|‖ in the 2-norm, if the layer has its weight as ``weight``; else infinity."""
    moduli = weight.double().cpu().abs()
    scale = _scale(moduli.flatten(1))
    twin = _of_weight(module, moduli / scale)
    return math.inf if twin is None else _nonnegative_norm(twin, shape)[0] * scale.item() * _UP


def convolution_error(
    module: Any,
    example: Tensor,
    p: float,
    norm_of: Callable[[Tensor, float], float] | None = None,
) -> Analysis:
    """Bound the error of a convolution, plain, constrained or transposed.

    ``norm_of`` bounds the norm from the weight, for padding that torch does not know.
    """
    if example.device.type == "cpu":
        _check_direct(module.weight)
    dtype = _computing_dtype(example, module.weight)
    weight = module.weight.detach().to(dtype)
    size: list[int] = list(example.shape[2:])
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    geometry: dict[str, Any] = {name: getattr(module, name) for name in names}
    adjoint = module.transposed and module.padding_mode == "circular"
    if adjoint:  # of a convolution of the larger image, as in lipbook.convolutions
        size = [n * s for n, s in zip(size, module.stride, strict=True)]
    elif module.transposed:
        geometry |= {"transposed": True, "output_padding": module.output_padding}

    def norm(q: float) -> float:
        if norm_of is not None:
            return norm_of(weight, q)
        exponent = dual_exponent(q) if adjoint else q
        return rigorous_convolution_norm(weight, size, p=exponent, **geometry)

    # An output sums over the channels and taps of a group. Folding a circle adds the same products.
    channels = weight.shape[0] // module.groups if module.transposed else weight.shape[1]
    outputs = module(example)
    terms = channels * weight[0, 0].numel()
    absolute_norm = _absolute_norm(norm, p)
    if p == 2 and norm_of is None:
        absolute_norm = min(absolute_norm, convolution_of_moduli(module, weight, example.shape[1:]))
    affine = _Affine(
        layer=module,
        norm=norm(p),
        absolute_norm=absolute_norm,
        bias_norm=_bias_norm(module.bias, dtype, outputs[0, 0].numel(), p),
        largest=weight.abs().max().item(),
        terms=terms,
        plain_sums=True,
        sums_in_half=module.transposed,  # torch adds up overlapping windows in the output's dtype
    )
    return _after_cast(affine, dtype, p)


def convolution_kernels(module: Any, example: Tensor) -> None:
    """Answer to :func:`cuda_rule`: windows are summed as the definition says.

    Torch is asked which of its algorithms it takes for such a geometry.
    """
    dims = example.dim() - 2
    padding: Any = module.padding if module.padding_mode == "zeros" else 0
    if isinstance(padding, str):  # whose zeros torch adds before, or on both sides
        padding = 0
    weight = module.weight.detach()
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, weight.shape[2:], strict=True)]
    size = [max(n, r) for n, r in zip(example.shape[2:], reach, strict=True)]
    backend = torch._C._select_conv_backend(
        example.new_empty(len(example), example.shape[1], *size),
        weight,
        module.bias,
        list(module.stride),
        list(padding) if padding else [0] * dims,
        list(module.dilation),
        module.transposed,
        list(module.output_padding),
        module.groups,
    )
    if backend.name not in _SUMMING:
        raise ValueError(
            f"torch convolves by {backend.name} on this GPU, of whose sums nothing is known: "
            "certify on the CPU, by .cpu(), or use sound=False"
        )


_SUMMING = frozenset(  # of copied windows by matrix products, or window by window
    [
        *("Slow2d", "Slow3d", "SlowDilated2d", "SlowDilated3d"),
        *("SlowTranspose2d", "SlowTranspose3d", "CudaDepthwise2d", "CudaDepthwise3d"),
    ]
)
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_error_rule_of(*_CONVOLUTIONS)(convolution_error)
_cuda_rule_of(*_CONVOLUTIONS)(convolution_kernels)
_cuda_rule_of(nn.Linear)(plain_kernels)


@_error_rule_of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    norm = lipschitz_rule(module, tuple(example.shape[1:]), p).value * _UP
    variance, mean = module.running_var.double(), module.running_mean.double()
    scale = (variance + module.eps).rsqrt()
    shift = mean * scale
    if module.affine:
        scale, shift = scale * module.weight.detach(), shift * module.weight.detach()
        shift = shift.abs() + module.bias.detach().abs()
    positions = example[0, 0].numel()
    bias_norm = _bias_norm(shift, torch.float64, positions, p)
    affine = _Affine(module, norm, norm, bias_norm, scale.abs().max().item() * _UP, 10)
    return lambda x: affine(x, p)
