r"""Rounding: norms and errors with bounds that floating point cannot break.

A theorem about a network speaks of real numbers. What runs is a program in floating point, which
differs from the function at an input *and* at its neighbours. This room bounds both ends:
:func:`rigorous_matrix_norm` and :func:`rigorous_convolution_norm` are operator norms from above by
float64 with its own rounding accounted for, and :func:`forward_error` bounds layer by layer how far
a program can be from its function near an input. A layer joins by :func:`forward_error_rule`.
:func:`lipbook.robustness.certify` puts them together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook import activations, composition, convolutions, orthogonal, pooling, residual
from lipbook.composition import lipschitz_rule
from lipbook.norms import dual_exponent
from lipbook.norms.rigorous import (
    _FLOOR,
    _UP,
    _gamma,
    _mean,
    rigorous_convolution_norm,
    rigorous_matrix_norm,
)

__all__ = [
    "ForwardError",
    "forward_error",
    "forward_error_rule",
    "rigorous_convolution_norm",
    "rigorous_matrix_norm",
]


# ----------------------------------------------------------------- the error of a program


@dataclasses.dataclass(frozen=True)
class ForwardError:
    r"""How far a program may be from its function near an input.

    With the function :math:`f` in real arithmetic, of the weights as they are stored, and any
    program :math:`P` that computes it (in any order of summation, for any size of batch),

    .. math::
        \lVert P(v) - f(v)\rVert_p \le a + c\, \lVert v - x\rVert_p
        \quad\text{for all } \lVert v - x\rVert_p \le d, \qquad \operatorname{Lip}(f) \le L .

    Parameters
    ----------
    outputs : torch.Tensor
        :math:`P(x)` as this run computed it, (batch, \*shape).
    lipschitz : float
        :math:`L`.
    error : torch.Tensor
        :math:`a`, float64, (batch,).
    slope : float
        :math:`c`.
    limit : torch.Tensor
        :math:`d`, up to which nothing overflows, float64, (batch,).
    """

    outputs: Tensor
    lipschitz: float
    error: Tensor
    slope: float
    limit: Tensor


Analysis = Callable[[Tensor], ForwardError]


@torch.no_grad()
def forward_error(module: nn.Module, inputs: Tensor, p: float = 2) -> ForwardError:
    r"""Bound how far the program of a module is from its function, at inputs and around them.

    Layer by layer, each with its rule (:func:`forward_error_rule`). If the first of two layers has
    :math:`(L_1, a_1, c_1)` and the second :math:`(L_2, a_2, c_2)`, the second one starts within
    :math:`\rho = (L_1 + c_1)\lVert v - x\rVert + 2 a_1` of the value that it saw, so that both have

    .. math::
        L = L_1 L_2, \qquad a = L_2 a_1 + a_2 + 2 c_2 a_1, \qquad
        c = L_2 c_1 + c_2 (L_1 + c_1) .

    The program is the module as it runs now: with autocast if that is on, on any CPU. Assumed
    is the model of rounding :math:`|\mathrm{fl}(w^\top x) - w^\top x| \le \gamma_n |w|^\top|x|`
    with :math:`\gamma_n = nu / (1 - nu)`, sums in float32 for bfloat16 and float16 (and one
    rounding of the sum and one of the bias). torch computes so on CPUs: its convolutions are direct
    or matrix products, never by Winograd's algorithm, which NNPACK would use. What is known to
    break the model is refused.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    inputs : torch.Tensor
        (batch, \*shape).
    p : float
        1, 2 or :data:`math.inf`.

    Returns
    -------
    ForwardError

    Raises
    ------
    TypeError
        If a module has no rule.
    ValueError
        If reduced precision is allowed, or the device is not the CPU.

    References
    ----------
    The composition is that of :cite:t:`murray2026`, with constants that depend on the input.

    Examples
    --------
    >>> layer = nn.Linear(100, 50)
    >>> x = torch.randn(8, 100)
    >>> bound = forward_error(layer, x)
    >>> exact = x.double() @ layer.weight.double().mT + layer.bias.double()
    >>> error = (bound.outputs - exact).norm(dim=1)
    >>> bool((error <= bound.error).all())
    True
    """
    p = composition._exponent(p)
    return _analysis(module, inputs, p, "")(inputs)


@functools.singledispatch
def forward_error_rule(module: nn.Module, example: Tensor, p: float) -> Analysis:
    r"""Rule of a class of layers: what :func:`forward_error` asks.

    A :func:`functools.singledispatch` on the class of ``module``, as
    :func:`~lipbook.composition.lipschitz_rule` is. A rule looks at the weights once and returns a
    function from a batch to its :class:`ForwardError`, all of whose bounds are rigorous.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    example : torch.Tensor
        A batch as it arrives at the layer: of this shape, dtype and device.
    p : float
        Exponent of the norms.

    Returns
    -------
    callable
        ``analysis(x)``, a :class:`ForwardError`.

    Raises
    ------
    TypeError
        For a class with no rule.

    Examples
    --------
    A layer that only moves numbers rounds nothing:

    >>> class Reverse(nn.Module):
    ...     def forward(self, x):
    ...         return x.flip(1)
    >>> @forward_error_rule.register
    ... def _(module: Reverse, example, p):
    ...     def analysis(x):
    ...         zero = torch.zeros(len(x), dtype=torch.float64)
    ...         return ForwardError(module(x), 1.0, zero, 0.0, zero + math.inf)
    ...     return analysis
    >>> forward_error(Reverse(), torch.randn(2, 3)).error
    tensor([0., 0.], dtype=torch.float64)
    """
    kind = type(module)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} has no bound of its rounding errors: register one "
        f"with @forward_error_rule.register for {kind.__qualname__}, or use sound=False"
    )


def _analysis(module: nn.Module, example: Tensor, p: float, name: str) -> Analysis:
    try:
        registered = next(c for c in type(module).__mro__ if c in forward_error_rule.registry)
        for method in composition._COMPUTATION if registered is not object else ():
            own, known = (getattr(c, method, None) for c in (type(module), registered))
            if own is not known or method in vars(module):
                raise TypeError(
                    f"{method} is redefined, so the rounding errors of {registered.__name__} do "
                    "not apply: register @forward_error_rule for it"
                )
        _check_arithmetic(example)
        return forward_error_rule(module, example, p)
    except (TypeError, ValueError) as error:
        raise composition._located(error, name, module) from (error.__cause__ or error)


def _check_arithmetic(example: Tensor) -> None:
    """Refuse settings under which products are not what the model of rounding says."""
    device = example.device.type
    if device != "cpu":
        raise ValueError(f"device must be the CPU for a sound certificate, got {device}")
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            "torch.set_float32_matmul_precision must be 'highest', "
            f"got {torch.get_float32_matmul_precision()!r}"
        )
    backends: Any = torch.backends
    for name in ("", "mkldnn.", "mkldnn.matmul.", "mkldnn.conv."):
        setting = functools.reduce(
            lambda part, attribute: getattr(part, attribute, None), name.split(".")[:-1], backends
        )
        precision = getattr(setting, "fp32_precision", "none")  # since torch 2.9
        if precision not in ("none", "ieee"):
            raise ValueError(
                f"torch.backends.{name}fp32_precision must be 'ieee', got {precision!r}"
            )
    reduced = getattr(torch._C, "_get_cpu_allow_fp16_reduced_precision_reduction", bool)
    if reduced():  # sums of float16 in float16, on some processors
        raise ValueError("sums of float16 must not be of reduced precision, but torch allows it")
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        mode = os.environ.get(name, "STRICT").upper()
        if mode != "STRICT":
            raise ValueError(f"{name} must be STRICT, got {mode}")


# Note [quantities of an analysis]
# x is what the layer sees in this run, v what it may see, D = ‖v - x‖. Norms of a batch are
# (batch,) in float64. A local error that is proportional to |v| splits into a part at x and a part
# times D.


def _norms(x: Tensor, p: float) -> Tensor:
    """Upper bounds of the p-norms of the samples, summed in float32 where that will do."""
    flat = x.flatten(1)
    n, working = flat.shape[1], torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(flat, p, dim=1, dtype=working).double()
    if n >= 2**18 or not norm.isfinite().all():
        working = torch.float64
        norm = torch.linalg.vector_norm(flat, p, dim=1, dtype=working)
    lost = n * math.sqrt(torch.finfo(working).tiny)  # squares that underflow
    return (norm * (1 + 2 * _gamma(n + 8, working)) + lost) * _UP


def _entries(x: Tensor, p: float) -> float:
    """p-norm of a sample of ones."""
    return x[0].numel() ** (1 / p)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _quantum(dtype: torch.dtype) -> float:
    """Absolute error of one rounding, below which the relative one may not hold."""
    info = torch.finfo(dtype)
    return info.tiny * (info.eps if dtype == torch.float16 else 1)  # others may flush to zero


def _then(first: ForwardError, second: ForwardError) -> ForwardError:
    gap, stretch = 2 * first.error, (first.lipschitz + first.slope) * _UP
    return ForwardError(
        second.outputs,
        second.lipschitz * first.lipschitz * _UP + _FLOOR,
        (second.lipschitz * first.error + second.error + second.slope * gap) * _UP + _FLOOR,
        (second.lipschitz * first.slope + second.slope * stretch) * _UP + _FLOOR,
        torch.minimum(first.limit, (second.limit - gap) / max(stretch, 1e-300)),
    )


def _unrounded(x: Tensor, outputs: Tensor, lipschitz: float = 1.0) -> ForwardError:
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    return ForwardError(outputs, lipschitz, zero, 0.0, zero + math.inf)


def _relative(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    p: float,
    lipschitz: float,
    roundings: int,
    shift: float = 0.0,
) -> ForwardError:
    """Bound the error of outputs each of which took so many relative roundings.

    On the way the inputs may be cast to the dtype of the outputs, and moved by a shift.
    """
    before = _norms(x, p) + shift  # of the inputs, on which the layer may work in place
    outputs = layer(x)
    gamma = _gamma(roundings + 1, outputs.dtype)
    size, info = _norms(outputs, p), torch.finfo(outputs.dtype)
    tiny = roundings * _quantum(outputs.dtype) * _entries(outputs, p)
    return ForwardError(
        outputs,
        lipschitz,
        (gamma * (1 + 4 * gamma) * size + tiny) * _UP,
        gamma * lipschitz * _UP,
        torch.minimum((info.max / 4 - size) / max(lipschitz, 1e-300), info.max / 4 - before),
    )


def _sum(parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
    """Sum of the outputs of the parts, from left to right."""
    dtype = max((part.outputs.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)
    gamma, flushed = _gamma(len(parts), dtype), len(parts) * _quantum(dtype) * _entries(outputs, p)
    error = functools.reduce(torch.add, [part.error for part in parts])
    sizes = [_norms(part.outputs, p) + 2 * part.error for part in parts]
    size = functools.reduce(torch.add, sizes)
    lipschitz = sum(part.lipschitz for part in parts) * _UP
    slope = sum(part.slope for part in parts)
    limits = [part.limit for part in parts]
    limits.append((torch.finfo(dtype).max / 4 - size) / max(lipschitz + slope, 1e-300))
    return ForwardError(
        outputs,
        lipschitz,
        (error + gamma * size + flushed) * _UP,
        (slope + gamma * (lipschitz + slope)) * _UP,
        functools.reduce(torch.minimum, limits),
    )


def _cast(x: Tensor, dtype: torch.dtype, p: float) -> ForwardError:
    exact = torch.finfo(dtype).eps <= torch.finfo(x.dtype).eps and dtype != torch.float16
    return _unrounded(x, x.to(dtype)) if exact else _relative(lambda v: v.to(dtype), x, p, 1.0, 1)


class _Affine(NamedTuple):
    """An affine map v -> A v + b as a program computes it, with bounds of its parts."""

    layer: Callable[[Tensor], Tensor]
    norm: float  # ‖A‖
    absolute_norm: float  # ‖|A|‖
    bias_norm: float  # ‖b‖, of a whole sample
    largest: float  # entry of |A|
    terms: int  # products in a sum
    magnitude: Callable[[Tensor], Tensor] | None = None  # bound of ‖|A||x|‖
    sums_in_half: bool = False

    def __call__(self, x: Tensor, p: float) -> ForwardError:
        outputs = self.layer(x)
        half = _is_half(outputs.dtype)
        working = torch.float32 if half and not self.sums_in_half else outputs.dtype
        gamma = _gamma(self.terms + 2, working) if not half else _gamma(2 * self.terms + 4, working)
        size = _norms(x, p)
        inside = self.absolute_norm * size if self.magnitude is None else self.magnitude(x)
        inside = inside + self.bias_norm  # ‖|A||x| + |b|‖
        entries = _entries(outputs, p)
        underflow = 2 * (self.terms + 2) * torch.finfo(working).tiny * entries
        error = gamma * inside + underflow * (1 + self.largest + size)
        slope = gamma * self.absolute_norm + underflow
        if half and not self.sums_in_half:
            # The sum is rounded, the bias added and the result rounded: off by h (|s| + |b|) with
            # h = 2u + u² and s = A v. Solving ‖s‖ ≤ ‖outputs‖ + ‖b‖ + its error costs 1 + 4h.
            rounding = torch.finfo(outputs.dtype).eps
            rounding *= 1 + 4 * rounding
            error = error + rounding * (
                _norms(outputs, p) + 2 * self.bias_norm + 2 * gamma * inside
            )
            error = error + 2 * _quantum(outputs.dtype) * entries
            slope += rounding * (self.norm + 2 * gamma * self.absolute_norm)
        room = torch.finfo(outputs.dtype).max / 4 - inside
        return ForwardError(
            outputs,
            self.norm,
            error * _UP,
            slope * _UP,
            room / max(self.absolute_norm, 1e-300),
        )


def _computing_dtype(example: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype in which a product of the two runs: autocast's, if it applies."""
    device = example.device.type
    if torch.float64 not in (example.dtype, weight.dtype) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _exactly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function of the analysis, which autocast must not touch."""
    with torch.autocast("cpu", enabled=False):
        return function(*arguments)


# ---------------------------------------------------------------------- rules of the layers


_rule_of = functools.partial(composition._rule_of, dispatch=forward_error_rule)


@forward_error_rule.register
def _(module: nn.Sequential, example: Tensor, p: float) -> Analysis:
    analyses = []
    example = example.clone()  # a first layer may work in place
    for name, child in module._modules.items():
        analyses.append(_analysis(child, example, p, name))
        example = child(example)

    def analysis(x: Tensor) -> ForwardError:
        total = _unrounded(x, x)
        for step in analyses:
            total = _then(total, step(total.outputs))
        return total

    return analysis


@_rule_of(composition.Residual)
def _(module: composition.Residual, example: Tensor, p: float) -> Analysis:
    branch = _analysis(module.branch, example, p, "branch")

    def analysis(x: Tensor) -> ForwardError:
        part = branch(x)
        return _sum([_unrounded(x, x), part], x + part.outputs, p)

    return analysis


@_rule_of(composition.Sum)
def _(module: composition.Sum, example: Tensor, p: float) -> Analysis:
    branches = [
        _analysis(branch, example, p, f"branches.{i}") for i, branch in enumerate(module.branches)
    ]

    def analysis(x: Tensor) -> ForwardError:
        parts = [branch(x) for branch in branches]
        return _sum(parts, functools.reduce(torch.add, [part.outputs for part in parts]), p)

    return analysis


@forward_error_rule.register
def _(module: nn.Linear, example: Tensor, p: float) -> Analysis:
    dtype = _computing_dtype(example, module.weight)
    weight = module.weight.detach().to(dtype)
    absolute = weight.abs().to(torch.promote_types(dtype, torch.float32))
    positions = example[0, ..., 0].numel()
    gamma = _gamma(module.in_features + 2, absolute.dtype)

    def magnitude(x: Tensor) -> Tensor:
        inside = _exactly(functional.linear, x.abs().to(absolute.dtype), absolute)
        return _norms(inside, p) * (1 + 2 * gamma)

    affine = _Affine(
        layer=module,
        norm=rigorous_matrix_norm(weight, p),
        absolute_norm=_absolute_norm(lambda q: rigorous_matrix_norm(weight, q), p),
        bias_norm=_bias_norm(module.bias, dtype, positions, p),
        largest=weight.abs().max().item(),
        terms=module.in_features,
        magnitude=magnitude,
    )
    return _after_cast(affine, dtype, p)


def _after_cast(affine: _Affine, dtype: torch.dtype, p: float) -> Analysis:
    def analysis(x: Tensor) -> ForwardError:
        if x.dtype == dtype:
            return affine(x, p)
        rounded = _cast(x, dtype, p)
        return _then(rounded, affine(rounded.outputs, p))

    return analysis


def _absolute_norm(norm: Callable[[float], float], p: float) -> float:
    """Bound of ‖|A|‖, which for p = 1 and ∞ is ‖A‖, by interpolation between the two."""
    return norm(p) if p != 2 else _mean(norm(1), norm(math.inf))


def _bias_norm(bias: Tensor | None, dtype: torch.dtype, positions: int, p: float) -> float:
    if bias is None:
        return 0.0
    return _norms(bias.detach().to(dtype)[None], p).item() * positions ** (1 / p) * _UP


_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(convolutions.OrthogonalConv1d, convolutions.OrthogonalConv2d, convolutions.OrthogonalConv3d),
    convolutions.NonexpansiveConv1d,
    convolutions.NonexpansiveConv2d,
    convolutions.NonexpansiveConv3d,
)
_TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    convolutions.OrthogonalConvTranspose1d,
    convolutions.OrthogonalConvTranspose2d,
    convolutions.OrthogonalConvTranspose3d,
)


@_rule_of(*_CONVOLUTIONS, *_TRANSPOSED)
def _(module: Any, example: Tensor, p: float) -> Analysis:
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
        exponent = dual_exponent(q) if adjoint else q
        return rigorous_convolution_norm(weight, size, p=exponent, **geometry)

    # An output sums over the channels and taps of a group. Folding a circle adds the same products.
    channels = weight.shape[0] // module.groups if module.transposed else weight.shape[1]
    outputs = module(example)
    affine = _Affine(
        layer=module,
        norm=norm(p),
        absolute_norm=_absolute_norm(norm, p),
        bias_norm=_bias_norm(module.bias, dtype, outputs[0, 0].numel(), p),
        largest=weight.abs().max().item(),
        terms=channels * weight[0, 0].numel(),
        sums_in_half=module.transposed,  # torch adds up overlapping windows in the output's dtype
    )
    return _after_cast(affine, dtype, p)


def _check_direct(weight: Tensor) -> None:
    """Refuse Winograd's algorithm, which torch runs unasked by NNPACK, and on ARM by its own."""
    onednn = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    nnpack = torch.backends.nnpack.is_available() and torch._C._get_nnpack_enabled()
    if nnpack and not onednn:
        raise ValueError(
            "NNPACK may convolve by Winograd's algorithm, whose rounding errors are others: "
            "call torch.backends.nnpack.set_flags(False)"
        )
    if weight.shape[1:] == (1, 3, 3):  # one channel a group
        image, pair = torch.empty(1, 1, 8, 8), [1, 1]
        backend = torch._C._select_conv_backend(
            image, image[..., :3, :3], None, pair, pair, pair, False, [0, 0], 1
        )
        if "Winograd" in backend.name:
            raise ValueError(
                "3 x 3 kernels with one channel a group are convolved by Winograd's algorithm on "
                "this processor, whose rounding errors are others: use sound=False"
            )


_MOVING = (  # permutations, sorting, clipping: results are among the inputs, or 0
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(activations.GroupSort, activations.MaxMin, activations.FullSort, activations.AbsoluteValue),
    *(pooling.InvertibleDownsampling, pooling.InvertibleUpsampling),
)


@_rule_of(*_MOVING)
def _(module: nn.Module, example: Tensor, p: float) -> Analysis:
    return _moved(module, _closed_form(module, example, p), p)


def _moved(module: nn.Module, lipschitz: float, p: float) -> Analysis:
    """Nothing is rounded, but numbers may be flushed, and the flushed be compared as equal."""

    def analysis(x: Tensor) -> ForwardError:
        result = _unrounded(x, module(x), lipschitz)
        flushed = 2 * _quantum(x.dtype) * _entries(result.outputs, p)
        return dataclasses.replace(result, error=result.error + flushed)

    return analysis


def _closed_form(module: nn.Module, example: Tensor, p: float) -> float:
    """Lipschitz constant of a layer that is a small number or a root of one, rounded up."""
    value = lipschitz_rule(module, tuple(example.shape[1:]), p).value
    return 1.0 if value == 1 else value * (1 + 2.0**-30)


@_rule_of(nn.Upsample)
def _(module: nn.Upsample, example: Tensor, p: float) -> Analysis:
    if module.mode != "nearest":
        raise ValueError(
            f"mode must be 'nearest' for its rounding to be known, got {module.mode!r}"
        )
    return _moved(module, _closed_form(module, example, p), p)


# Relative roundings: of the constant and of the product; of the slope and of the product; of the
# squares, their sum and the root; of the constant and of the quotient.
@_rule_of(orthogonal.Scale, nn.LeakyReLU, nn.PReLU, pooling.NormPooling, pooling.Upsampling)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    roundings = 3
    if isinstance(module, pooling.NormPooling):
        roundings += example[0].numel() // module(example)[0].numel()

    def analysis(x: Tensor) -> ForwardError:
        size = _norms(x, p)
        result = _relative(module, x, p, lipschitz, roundings)
        if not isinstance(module, pooling.NormPooling):
            return result
        # Squares may underflow or overflow where their root would not.
        info = torch.finfo(torch.promote_types(x.dtype, torch.float32))
        lost = roundings * math.sqrt(info.tiny) * _entries(result.outputs, p)
        limit = result.limit.clamp(max=math.sqrt(info.max) / 4 - size)
        return dataclasses.replace(result, error=result.error + lost, limit=limit)

    return analysis


@_rule_of(pooling.AveragePooling, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    if not isinstance(module, pooling.AveragePooling):
        overlaps = module.stride != module.kernel_size or module.ceil_mode
        override = getattr(module, "divisor_override", None) is not None
        if overlaps or override or any(np.atleast_1d(module.padding)):
            raise ValueError("windows must not overlap or be padded for its rounding to be known")
    norm = _closed_form(module, example, p)
    window = -(-example[0].numel() // module(example)[0].numel())
    affine = _Affine(module, norm, norm * window, 0.0, 1.0, window + 2)  # the sum comes undivided
    return lambda x: affine(x, p)


@_rule_of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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


# Note [a reflection in floating point]
# Cosines and sines are assumed to be off by at most 8u, so that a
# reflected entry is off by 11u (|z1| + |z2|). The comparison can err only if |v'z| is at most
# 10u (|z1| + |z2|), and the branches differ by 2 |v'z| there. Together 32u (|z1| + |z2|) an entry.


@_rule_of(activations.Householder)
def _(module: activations.Householder, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        dtype = max(outputs.dtype, module.angle.dtype, key=lambda d: torch.finfo(d).eps)
        slope = 32 * torch.finfo(dtype).eps
        size = _norms(x, p)
        tiny = 8 * _quantum(outputs.dtype) * _entries(outputs, p)
        limit = torch.finfo(outputs.dtype).max / 4 - 2 * size
        return ForwardError(outputs, lipschitz, (slope * size + tiny) * _UP, slope, limit / 2)

    return analysis


@_rule_of(residual.SLLLinear, residual.CPLLinear, residual.SLLConv2d, residual.CPLConv2d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    weight, dtype = module.weight.detach(), module.weight.dtype
    _check_direct(weight)
    if module.activation not in ("relu", "identity"):
        raise ValueError(f"the rounding of {module.activation} is not known: use 'relu'")
    if _is_half(dtype) or _computing_dtype(example, weight) != dtype:
        raise ValueError("half precision is not supported: use float32 or float64")
    dense = weight.dim() == 2
    scale = (2 / module.scale()).to(dtype).double()
    geometry: dict[str, Any] = {}
    if not dense:
        padding = weight.shape[-1] // 2
        geometry = {"padding": padding, "padding_mode": module.padding_mode}

    def norm(matrix: Tensor, q: float) -> float:
        if dense:
            return rigorous_matrix_norm(matrix, q)
        return rigorous_convolution_norm(matrix, list(example.shape[2:]), p=q, **geometry)

    view = scale.view(-1, *[1] * (weight.dim() - 1))
    absolute = _absolute_norm(functools.partial(norm, weight), p)
    back = _absolute_norm(functools.partial(norm, view * weight.double()), dual_exponent(p)) * _UP
    if p == 2:
        lipschitz = max(1.0, norm(view.sqrt() * weight.double(), 2) ** 2 * _UP - 1)
    else:
        lipschitz = (1 + back * absolute) * _UP
    positions = 1 if dense else example[0, 0].numel()
    bias_norm = _bias_norm(module.bias, dtype, positions, p)
    rows, columns = weight[0].numel() + 3, weight[:, 0].numel() + 3
    gamma = _gamma(rows + columns, dtype)
    largest = max(1.0, weight.abs().max().item(), scale.max().item()) ** 3

    def analysis(x: Tensor) -> ForwardError:
        # Every product on a path from x to the output is rounded at most rows + columns times.
        outputs = module(x)
        size = _norms(x, p)
        inside = size + back * (absolute * size + bias_norm)
        entries = _entries(outputs, p) * len(weight) * rows * columns
        underflow = torch.finfo(dtype).tiny * entries * largest
        slope = gamma * (1 + back * absolute) + underflow
        room = (torch.finfo(dtype).max / 4 - inside) / (1 + back * absolute)
        most = torch.finfo(dtype).max / 4 / max(1.0, scale.max().item())  # for W x + b, then scaled
        hidden = (most - absolute * size - bias_norm) / max(absolute, 1e-300)
        return ForwardError(
            outputs,
            lipschitz,
            (gamma * inside + underflow * (2 + size + bias_norm)) * _UP,
            slope * _UP,
            torch.minimum(room, hidden),
        )

    return analysis


# Note [the norm of a truncated exponential]
# A skew-symmetric A has eigenvalues i λ, |λ| ≤ ‖A‖. For m a multiple of 4, the derivative of
# |T_m(iλ)|² is -2 λ^m / m! times the Taylor polynomial of the sine of degree m - 1, whose terms
# pair to positive numbers for 0 < λ² ≤ 6. So ‖T_m(A)‖ ≤ T_m(0) = 1 if ‖A‖ ≤ 2, which is checked.


@_rule_of(convolutions.SkewOrthogonalConv2d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    weight, dtype = module.weight.detach(), module.weight.dtype
    _check_direct(weight)
    if _is_half(dtype) or _computing_dtype(example, weight) != dtype:
        raise ValueError("half precision is not supported: use float32 or float64")
    size = [n // module.stride for n in example.shape[2:]]

    def norm(q: float) -> float:
        padding = weight.shape[-1] // 2
        return rigorous_convolution_norm(
            weight, size, padding=padding, padding_mode="circular", p=q
        )

    a, absolute = norm(p), _absolute_norm(norm, p)
    skew = torch.equal(weight, -weight.transpose(0, 1).flip(2, 3))
    gamma = _gamma(weight[0].numel() + 4, dtype)
    # Norms of the terms A^j x / j! and of their errors, in units of ‖x‖, and the sums of both.
    term, wrong = 1.0, 0.0
    total, error = 1.0, 0.0
    for j in range(1, module.terms + 1):
        wrong = (a * wrong + gamma * absolute * (term + wrong)) * (1 + gamma) / j
        term = a * term / j
        total, error = total + term + wrong, error + wrong
    rate = (error + _gamma(module.terms + 2, dtype) * total) * _UP
    lipschitz = 1.0 if p == 2 and skew and a <= 2 else total * _UP
    bias_norm = _bias_norm(module.bias, dtype, math.prod(size), p)
    unit = _gamma(2, dtype)

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        largest = _norms(x, p)
        products = module.terms * weight[0].numel() * _entries(outputs, p) * len(weight)
        underflow = torch.finfo(dtype).tiny * products * (1 + absolute + total)
        slope = (rate + unit * (lipschitz + rate) + underflow) * _UP
        room = torch.finfo(dtype).max / 4 - (absolute + 1) * total * largest - bias_norm
        return ForwardError(
            outputs,
            lipschitz,
            (slope * largest + unit * bias_norm + underflow) * _UP,
            slope,
            room / ((absolute + 1) * total),
        )

    return analysis
