r"""Errors: how far a program may be from its function, and the algebra of such bounds.

What runs is a program in floating point. Each layer answers how far its program may be off
(:func:`forward_error_rule`), beside its definition; this room holds the question, the model of
rounding that the answers rest on, and how the errors of two layers become that of both.
:func:`lipbook.rounding.forward_error` reads a network with it.
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

from lipbook.norms.rigorous import _FLOOR, _UP, _gamma, _mean
from lipbook.rules import _COMPUTATION, LEAVES, Range, _located, _rule_of, lipschitz_rule

__all__ = [
    "Analysis",
    "ForwardError",
    "RangeAnalysis",
    "cuda_rule",
    "forward_error_rule",
    "range_error_rule",
]


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
        :math:`a`, float64, (batch,), on the CPU wherever the program runs.
    slope : float
        :math:`c`.
    limit : torch.Tensor
        :math:`d`, up to which nothing overflows, float64, (batch,), on the CPU.
    """

    outputs: Tensor
    lipschitz: float
    error: Tensor
    slope: float
    limit: Tensor


Analysis = Callable[[Tensor], ForwardError]
RangeAnalysis = Callable[[Range], Tensor]


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

    >>> from lipbook.rounding import forward_error
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
    if range_error_rule.dispatch(kind) is not range_error_rule.dispatch(object):
        raise ValueError(
            f"the rounding errors of {kind.__qualname__} are not bounded on all of space: give a "
            "domain, or use sound=False"
        )
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} has no bound of its rounding errors: register one "
        f"with @forward_error_rule.register for {kind.__qualname__}, or use sound=False"
    )


LEAVES.append(forward_error_rule)


@functools.singledispatch
def range_error_rule(module: nn.Module, example: Tensor, p: float) -> RangeAnalysis:
    r"""Rule of a class of layers: how far its program may be off on a range.

    .. math:: \lVert P(v) - f(v)\rVert_p \le e \quad\text{for all } v \text{ in the range.}

    A layer without a rule has :math:`a + c\, d` of its :func:`forward_error_rule` at the middle of
    the range, with the largest distance :math:`d` from it. Layers whose errors are bounded on
    bounded sets only register here.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, in the dtype of the program.
    example : torch.Tensor
        A batch as it arrives at the layer.
    p : float
        Exponent of the norms.

    Returns
    -------
    callable
        ``analysis(values)``, with a :class:`~lipbook.composition.Range` of what the layer sees in
        the program, errors of earlier layers included: :math:`e`, (batch,), infinite where numbers
        may overflow.
    """
    analysis = _analysis(module, example, p, "")

    def on_range(values: Range) -> Tensor:
        middle = values.middle.to(example.dtype)
        result = analysis(middle.clone())
        apart = torch.maximum(values.high - middle.double(), middle.double() - values.low)
        distance = torch.linalg.vector_norm(apart.flatten(1), p, dim=1) * _UP
        error = (result.error + result.slope * distance) * _UP
        return torch.where(distance <= result.limit, error, math.inf)

    return on_range


@functools.singledispatch
def cuda_rule(module: nn.Module, example: Tensor) -> None:
    r"""Rule of a class of layers: whether its bound holds for torch's kernels on an NVIDIA GPU.

    A :func:`functools.singledispatch` on the class of ``module``, which does nothing where the
    kernels of the class only move numbers, or add, multiply and divide them as the definition of
    the layer says, in any order: Note [arithmetic of CUDA]. It refuses otherwise. Nothing is known
    of a class without a rule, which is refused. That holds for every function that IEEE 754 does
    not define: of exp, tanh, rsqrt and their kin NVIDIA gives the largest errors that its tests
    have met and says that they are not guaranteed.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, on the GPU.
    example : torch.Tensor
        A batch as it arrives at the layer.

    Raises
    ------
    ValueError
        If the kernels are others.

    References
    ----------
    :cite:t:`nvidia2025cuda`, section *Mathematical Functions*, which gives x + y, x y, x / y and
    the square root the error of IEEE 754.

    Examples
    --------
    >>> class Reverse(nn.Module):
    ...     def forward(self, x):
    ...         return x.flip(1)
    >>> cuda_rule(Reverse(), torch.zeros(1, 2))
    Traceback (most recent call last):
    ...
    ValueError: nobody promises how far the kernels of Reverse on a GPU are off: certify on the CPU,
        by .cpu(), or use sound=False
    >>> _ = cuda_rule.register(Reverse, lambda module, example: None)
    >>> cuda_rule(Reverse(), torch.zeros(1, 2))
    """
    raise ValueError(
        f"nobody promises how far the kernels of {type(module).__qualname__} on a GPU are off: "
        "certify on the CPU, by .cpu(), or use sound=False"
    )


def plain_kernels(module: nn.Module, example: Tensor) -> None:
    """Answer to :func:`cuda_rule`: numbers are moved, added, multiplied and divided only."""


def _check_kernels(module: nn.Module, example: Tensor) -> None:
    """Refuse layers whose kernels on a GPU are not in the model of rounding."""
    if example.device.type != "cuda":
        return
    registered = next(c for c in type(module).__mro__ if c in cuda_rule.registry)
    for method in _COMPUTATION if registered is not object else ():
        own, known = (getattr(c, method, None) for c in (type(module), registered))
        if own is not known or method in vars(module):
            raise TypeError(
                f"{method} is redefined, so that what is known of the kernels of "
                f"{registered.__name__} on a GPU does not apply: register @cuda_rule for it"
            )
    cuda_rule(module, example)


def _range_analysis(module: nn.Module, example: Tensor, p: float) -> RangeAnalysis:
    """Analysis on ranges, after the checks of :func:`_analysis`."""
    default = range_error_rule.dispatch(object)
    if range_error_rule.dispatch(type(module)) is not default:
        registered = next(c for c in type(module).__mro__ if c in range_error_rule.registry)
        for method in _COMPUTATION:
            own, known = (getattr(c, method, None) for c in (type(module), registered))
            if own is not known or method in vars(module):
                raise TypeError(
                    f"{method} is redefined, so the rounding errors of {registered.__name__} do "
                    "not apply: use sound=False"
                )
        _check_arithmetic(example)
    return range_error_rule(module, example, p)


def _analysis(module: nn.Module, example: Tensor, p: float, name: str) -> Analysis:
    try:
        registered = next(c for c in type(module).__mro__ if c in forward_error_rule.registry)
        for method in _COMPUTATION if registered is not object else ():
            own, known = (getattr(c, method, None) for c in (type(module), registered))
            if own is not known or method in vars(module):
                raise TypeError(
                    f"{method} is redefined, so the rounding errors of {registered.__name__} do "
                    "not apply: register @forward_error_rule for it"
                )
        _check_arithmetic(example)
        _check_kernels(module, example)
        return forward_error_rule(module, example, p)
    except (TypeError, ValueError) as error:
        raise _located(error, name, module) from (error.__cause__ or error)


# Note [arithmetic of CUDA]
# On an NVIDIA GPU the sums, products, fused products and quotients of float32 and float64, and the
# square root, are those of IEEE 754, rounded to nearest (CUDA C++ Programming Guide, Floating-Point
# Standard and Mathematical Functions), as long as a program is not compiled with fast math. With
# these, Note [the model of rounding] holds for every algorithm that forms the sums of the products
# of the definition and no others: its gamma_n counts the roundings on a path from a product to the
# result, which no order of n terms exceeds: n, with the product (a fused one saves a rounding, and
# a sum that is split among blocks, threads or lanes is a tree, whose paths are shorter). So a GPU
# has the constants of the CPU where those count operations. Those that rest on how a CPU's kernel
# goes about it (normalisation, softmax, interpolation) have no answer to cuda_rule, nor have
# functions that IEEE 754 does not define. What may form other sums is switched off, and checked:
#
# - TF32, which reads ten bits of a factor: torch.backends.cuda.matmul.fp32_precision = "ieee", and
#   NVIDIA_TF32_OVERRIDE unset or 0;
# - cuDNN, whose convolutions may go by Winograd's or Fourier's algorithm, and which allows TF32:
#   torch.backends.cudnn.enabled = False. Then torch copies windows into a matrix and multiplies
#   (aten/src/ATen/native/cuda/ConvolutionMM2d.cu and its kin), or sums the window of a channel
#   (DepthwiseConv2d.cu); which it takes is asked of torch itself;
# - products emulated by bfloat16 or integers on newer GPUs: the variables of _EMULATION;
# - float16 and bfloat16, whose products need not be summed in float32.
#
# Numbers below the least normal one are kept by default, and may be flushed by what is compiled
# with -ftz=true: they count as lost, as on a CPU. Two things nobody promises, and a certificate
# names both: that cuBLAS forms no other sums (its manual promises the number of bits and is silent
# on the algorithm; Strassen's would break it), and that torch was compiled without fast math.

CUDA_HYPOTHESES = (
    "cuBLAS sums the products of the definition, in any order, and no others, and emulates none",
    "torch's CUDA kernels are compiled without fast math",
)
_EMULATION = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATE_DOUBLE_PRECISION",
    "CUBLAS_EMULATION_STRATEGY",
)


def matmul_setting() -> tuple[str, Any]:
    """Name of the setting of torch.backends.cuda.matmul by which TF32 is off, and that value."""
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since torch 2.9
    return ("fp32_precision", "ieee") if new else ("allow_tf32", False)


def _check_cuda(example: Tensor) -> None:
    """Refuse settings under which a GPU computes otherwise than Note [arithmetic of CUDA] says."""
    if torch.version.hip is not None:
        raise ValueError(
            "device must be a CPU or a GPU of NVIDIA for a sound certificate, got one of AMD: "
            "certify on the CPU, by .cpu()"
        )
    if example.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype must be float32 or float64 on a GPU, got {example.dtype}, whose sums nobody "
            "promises: call .float(), or use sound=False"
        )
    if torch.is_autocast_enabled("cuda"):
        raise ValueError(
            "autocast computes in half precision, whose sums on a GPU nobody promises: switch it "
            "off, or use sound=False"
        )
    name, value = matmul_setting()
    enter = "enter lipbook.rounding.ieee_cuda()"
    found = getattr(torch.backends.cuda.matmul, name)
    if found != value:
        raise ValueError(
            f"torch.backends.cuda.matmul.{name} must be {value!r}, got {found!r}: {enter}"
        )
    if torch.backends.cudnn.enabled:
        raise ValueError(
            "torch.backends.cudnn.enabled must be False, since cuDNN may convolve by Winograd's or "
            f"Fourier's algorithm, got True: {enter}"
        )
    for variable in _EMULATION:
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ValueError(
                f"{variable} must be unset or 0, since products may be those of another precision, "
                f"got {os.environ[variable]!r}: start Python without it"
            )


def _check_arithmetic(example: Tensor) -> None:
    """Refuse settings under which products are not what the model of rounding says."""
    device = example.device.type
    if device == "cuda":
        return _check_cuda(example)
    if device != "cpu":
        raise ValueError(
            f"device must be the CPU or CUDA for a sound certificate, got {device}: certify on the "
            "CPU, by .cpu(), or use sound=False"
        )
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
#
# Note [constants of an analysis]
# Let u be the unit of Note [the model of rounding] and q the least normal number, below which an
# operation may lose as much as that. A path of k roundings multiplies by 1 + t with |t| <= gamma_k.
#
# A value y that took k roundings is P(v) = y (1 + t), so that |P(v) - y| <= gamma_k |y|. What is
# known is |P(x)| and not |y|: |y| <= |P(x)| / (1 - gamma) <= (1 + 4 gamma) |P(x)| for gamma <= 3/4,
# and |y(v)| <= |y(x)| + L D. One rounding more pays for a cast of the input.
#
# A sum of two numbers is rounded once: it is off by gamma_1 of itself, which at x is at most
# (1 + gamma_1) |P(x)| and its inputs' errors. Of m numbers the first meets m - 1 roundings, and one
# more where they are scaled: gamma_m of the sum of their moduli, each of them a computed number,
# which is within 2a + c D of what x shows: a to the exact value and a back.
#
# A sum of n products and a bias has n + 1 roundings on a path; gamma_{n+2} has one to spare. Each
# operation may flush, and so may an input or a weight, which the other one multiplies:
# 2 (n + 2) q (1 + max |A| + |v|). In half precision u is doubled, hence gamma_{2n+4}.
#
# Note [partial sums]
# A sum of n products and a bias is a tree of at most n additions, in any order. What an addition
# loses is u times the partial sum that it returns, and is added to the result as it is (Higham
# 2002, (4.3)). The terms of a partial sum are some of all terms t, each with at most n + 1
# roundings, so that it is at most (1 + gamma) max(P, N), with P the sum of the positive t, N that
# of the moduli of the others and gamma = gamma_{n+2}. With y the exact sum and M that of all
# moduli, max(P, N) = (M + |y|) / 2: where terms cancel, it is half of M. The products lose u M. So
# the result is off by at most
#
#     u M + n u (1 + gamma) (M + |y|) / 2  <=  gamma (M + |y|) / 2,
#
# since (n + 2) u (1 + gamma) = gamma and |y| >= 0. At x, |y| <= |P(x)| + gamma M; around x, M grows
# by |A| |v - x| and y by A (v - x). Flushed numbers meet the same roundings, hence their factor
# 1 + gamma. This is no bound for maps that compute a factor of several terms, as a folded
# normalisation does, whose errors are those of terms and not of partial sums.
#
# tests/test_rounding.py recomputes the constants and attains some of them.


def _norms(x: Tensor, p: float) -> Tensor:
    """Upper bounds of the p-norms of the samples, summed in float32 where that will do."""
    flat = x.flatten(1)
    n, working = flat.shape[1], torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(flat, p, dim=1, dtype=working).double()
    if n >= 2**18 or not norm.isfinite().all():
        working = torch.float64
        norm = torch.linalg.vector_norm(flat, p, dim=1, dtype=working)
    lost = n * math.sqrt(torch.finfo(working).tiny)  # squares that underflow
    return ((norm * (1 + 2 * _gamma(n + 8, working)) + lost) * _UP).cpu()


def _entries(x: Tensor, p: float) -> float:
    """p-norm of a sample of ones."""
    return x[0].numel() ** (1 / p)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _quantum(dtype: torch.dtype) -> float:
    """Absolute error of one rounding, below which the relative one may not hold."""
    info = torch.finfo(dtype)
    return info.tiny * (info.eps if dtype == torch.float16 else 1)  # others may flush to zero


# Note [elementary functions]
# exp, expm1, log, log1p, tanh and powers are assumed to be off by at most 32 units in the last
# place, a relative 64u: torch's vectorised ones state 1 (Sleef, MKL) and 20 for the exponential of
# its attention. erf is assumed to be off by at most 32u, absolutely: in float32 it is a rational
# approximation with an error of 1.5e-7, which is 2.5u. A composition such as 1 / (1 + exp(-x)) adds
# its own roundings. tests/test_rounding.py measures them on a fine grid.

_ELEMENTARY = 64


def _check_single(example: Tensor) -> None:
    """Refuse dtypes in which functions are not known to be so accurate."""
    if example.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the rounding errors are known in float32 and float64, got {example.dtype}: "
            "call .float(), or use sound=False"
        )
    if torch.is_autocast_enabled(example.device.type):
        raise ValueError(
            "autocast chooses the dtype, and the rounding errors are known in float32 and "
            "float64: switch it off, or use sound=False"
        )


def _by_input(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    p: float,
    lipschitz: float,
    units: float,
    constant: float = 0.0,
) -> ForwardError:
    """Errors of at most so many u times the modulus of the input, plus a constant, an entry."""
    size = _norms(x, p)
    outputs = layer(x)
    gamma, info = _gamma(units, outputs.dtype), torch.finfo(outputs.dtype)
    entries = _entries(outputs, p)
    error = gamma * size + (constant + units * _quantum(outputs.dtype)) * entries
    limit = info.max / 8 / max(lipschitz, 1.0) - size
    return ForwardError(outputs, lipschitz, error * _UP, gamma * _UP, limit)


def _entrywise(error: Tensor, p: float) -> Tensor:
    """p-norms of bounds of the errors of entries, (batch,), infinite where one is not known."""
    norms = torch.linalg.vector_norm(error.flatten(1), p, dim=1) * _UP
    return norms.nan_to_num(math.inf, posinf=math.inf)


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
    zero = torch.zeros(len(x), dtype=torch.float64)
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


def _sum(
    parts: Sequence[ForwardError], outputs: Tensor, p: float, weights: Sequence[float] = ()
) -> ForwardError:
    """Sum of the outputs of the parts, each times a number, from left to right.

    Two parts take one rounding, of the result; more take one for each partial sum.
    """
    weights = weights or [1.0] * len(parts)
    dtype = max((part.outputs.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)
    scaled = any(abs(weight) != 1 for weight in weights)
    single = len(parts) == 2 and not scaled
    gamma = _gamma(1 if single else len(parts) + scaled, dtype)
    flushed = (len(parts) + scaled) * _quantum(dtype) * _entries(outputs, p)
    sizes = [
        abs(w) * (_norms(part.outputs, p) + 2 * part.error)
        for w, part in zip(weights, parts, strict=True)
    ]
    size = functools.reduce(torch.add, sizes)
    error = functools.reduce(
        torch.add, [abs(w) * part.error for w, part in zip(weights, parts, strict=True)]
    )
    lipschitz = sum(abs(w) * part.lipschitz for w, part in zip(weights, parts, strict=True)) * _UP
    slope = sum(abs(w) * part.slope for w, part in zip(weights, parts, strict=True))
    limits = [part.limit for part in parts]
    limits.append((torch.finfo(dtype).max / 4 - size) / max(lipschitz + slope, 1e-300))
    rounded = (1 + gamma) * _norms(outputs, p) + 4 * error if single else size
    return ForwardError(
        outputs,
        lipschitz,
        (error + gamma * rounded + flushed) * _UP,
        (slope + gamma * (lipschitz + 2 * slope)) * _UP,
        functools.reduce(torch.minimum, limits),
    )


def _stacked(parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
    """Side by side, or the larger of each pair of entries: nothing is rounded."""

    def norm(values: Sequence[float]) -> float:
        return float(np.linalg.norm(np.array(values), p)) * _UP

    flushed = 2 * _quantum(outputs.dtype) * _entries(outputs, p)
    errors = torch.stack([part.error for part in parts])
    return ForwardError(
        outputs,
        norm([part.lipschitz for part in parts]),
        (torch.linalg.vector_norm(errors, p, dim=0) + flushed) * _UP,
        norm([part.slope for part in parts]),
        functools.reduce(torch.minimum, [part.limit for part in parts]),
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
    magnitude: Callable[[Tensor, Tensor], Tensor] | None = None  # of x and ‖x‖: ‖|A||x|‖
    sums_in_half: bool = False
    plain_sums: bool = False  # of products and a bias, see Note [partial sums]

    def __call__(self, x: Tensor, p: float) -> ForwardError:
        outputs = self.layer(x)
        half = _is_half(outputs.dtype)
        working = torch.float32 if half and not self.sums_in_half else outputs.dtype
        gamma = _gamma(self.terms + 2, working) if not half else _gamma(2 * self.terms + 4, working)
        size = _norms(x, p)
        inside = self.absolute_norm * size if self.magnitude is None else self.magnitude(x, size)
        inside = inside + self.bias_norm  # ‖|A||x| + |b|‖
        entries = _entries(outputs, p)
        underflow = 2 * (self.terms + 2) * torch.finfo(working).tiny * entries
        if self.plain_sums and not half:
            underflow *= 1 + gamma
            error = gamma / 2 * ((1 + gamma) * inside + _norms(outputs, p))
            slope = gamma / 2 * (self.absolute_norm + self.norm) + underflow
        else:
            error, slope = gamma * inside, gamma * self.absolute_norm + underflow
        error = error + underflow * (1 + self.largest + size)
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
    with torch.autocast("cpu", enabled=False):  # on a GPU it is off: see _check_cuda
        return function(*arguments)


# ------------------------------------------------------------------ parts of many answers

_error_rule_of = functools.partial(_rule_of, dispatch=forward_error_rule)
_cuda_rule_of = functools.partial(_rule_of, dispatch=cuda_rule)


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


def _moved(module: nn.Module, lipschitz: float, p: float) -> Analysis:
    """Nothing is rounded, but numbers may be flushed, and the flushed be compared as equal."""

    def analysis(x: Tensor) -> ForwardError:
        result = _unrounded(x, module(x), lipschitz)
        flushed = 2 * _quantum(x.dtype) * _entries(result.outputs, p)
        return dataclasses.replace(result, error=result.error + flushed)

    return analysis


def moved_error(module: nn.Module, example: Tensor, p: float) -> Analysis:
    """Rule of layers that select, permute, sort or clip: results are among the inputs, or 0."""
    return _moved(module, _closed_form(module, example, p), p)


def clipped_error(
    module: nn.Module, example: Tensor, p: float, limits: Sequence[float]
) -> Analysis:
    """Rule of layers that clip to numbers, which torch rounds to the dtype of the inputs."""
    moved = moved_error(module, example, p)

    def analysis(x: Tensor) -> ForwardError:
        result = moved(x)
        rounded = [torch.tensor(limit, dtype=result.outputs.dtype).item() for limit in limits]
        off = max((abs(a - b) for a, b in zip(limits, rounded, strict=True)), default=0.0)
        lost = off * _entries(result.outputs, p) * _UP
        return dataclasses.replace(result, error=result.error + lost)

    return analysis


def _closed_form(module: nn.Module, example: Tensor, p: float) -> float:
    """Lipschitz constant of a layer that is a small number or a root of one, rounded up."""
    value = lipschitz_rule(module, tuple(example.shape[1:]), p).value
    return 1.0 if value == 1 else value * (1 + 2.0**-30)
