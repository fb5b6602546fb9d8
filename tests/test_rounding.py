"""Norms and errors of programs, against an oracle in rational numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
    SmoothAbsoluteValue,
)
from lipbook.attention import BallProjection, EnergyAttention, L2MultiheadAttention, _EnergyLayer
from lipbook.composition import Ball, Box, Residual, Sum, lipschitz_bound
from lipbook.convolutions import (
    NonexpansiveConv2d,
    NonexpansiveConvTranspose2d,
    OrthogonalConv2d,
    OrthogonalConvTranspose2d,
    ShiftConv2d,
    SkewOrthogonalConv2d,
    SkewOrthogonalConvTranspose2d,
)
from lipbook.distances import InfinityDistance
from lipbook.errors import (
    _Affine,
    _by_input,
    _cast,
    _norms,
    _relative,
    _stacked,
    _sum,
    _then,
    moved_error,
)
from lipbook.freezing import freeze
from lipbook.layers.elementwise import _BY_INPUT, _RELATIVE, Sine
from lipbook.layers.linear import _products_of_moduli, convolution_of_moduli, matrix_of_moduli
from lipbook.layers.normalization import UnitNormalize
from lipbook.layers.rearrangements import (
    Cast,
    Clamp,
    Constant,
    Diagonal,
    LinearMap,
    MatrixProduct,
    Shift,
)
from lipbook.normalization import (
    BatchCentering,
    LayerCentering,
    ScalarBatchNorm,
    ScaleAndBias,
    Unscale,
)
from lipbook.norms import convolution_norm_bound, operator_norm
from lipbook.norms.rigorous import _largest_spectral_bound
from lipbook.orthogonal import OrthogonalLinear, Scale
from lipbook.pooling import AveragePooling, InvertibleDownsampling, NormPooling, Upsampling
from lipbook.residual import (
    ConvolutionStep,
    CPLConv2d,
    CPLLinear,
    DenseStep,
    SandwichLinear,
    SandwichStep,
    SLLConv2d,
    SLLLinear,
)
from lipbook.robustness import (
    Standardize,
    certify,
)
from lipbook.rounding import (
    ForwardError,
    _widened,
    forward_error,
    forward_error_rule,
    rigorous_convolution_norm,
    rigorous_matrix_norm,
)
from lipbook.sequences import _Lossless

INF = math.inf
EXPONENTS = (1.0, 2.0, INF)

# --------------------------------------------------------------- an oracle in rational numbers
# Floating-point numbers are rational. Networks without roots map rational numbers to rational
# numbers, and those are what the functions below compute, in arrays of Fractions.


def rational(tensor: Tensor) -> np.ndarray:
    values = tensor.detach().double().numpy()
    return np.vectorize(Fraction, otypes=[object])(values)


@functools.singledispatch
def exact(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """The function of a module at one sample."""
    raise NotImplementedError(type(module))


@exact.register(nn.Sequential)
def _(module: nn.Sequential, x: np.ndarray) -> np.ndarray:
    return functools.reduce(lambda v, child: exact(child, v), module, x)


@exact.register(nn.Linear)
def _(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    y = x @ rational(module.weight).T
    return y if module.bias is None else y + rational(module.bias)


@exact.register(nn.Conv2d)
def _(module: nn.Conv2d, x: np.ndarray) -> np.ndarray:
    weight, (h, w) = rational(module.weight), x.shape[1:]
    (s, t), (a, b) = module.stride, module.padding
    if isinstance(module, OrthogonalConv2d | NonexpansiveConv2d):
        (a, _), (b, _) = module._pads
        rows, columns = h // s, w // t
    else:
        rows = (h + 2 * a - weight.shape[2]) // s + 1
        columns = (w + 2 * b - weight.shape[3]) // t + 1
    y = np.full((len(weight), rows, columns), Fraction(0), dtype=object)
    for o, i, j in np.ndindex(*y.shape):
        for c, k, m in np.ndindex(*weight.shape[1:]):
            p, q = i * s + k - a, j * t + m - b
            if module.padding_mode == "circular":
                y[o, i, j] += weight[o, c, k, m] * x[c, p % h, q % w]
            elif 0 <= p < h and 0 <= q < w:
                y[o, i, j] += weight[o, c, k, m] * x[c, p, q]
    return y if module.bias is None else y + rational(module.bias)[:, None, None]


@exact.register(nn.ConvTranspose2d)
def _(module: nn.ConvTranspose2d, x: np.ndarray) -> np.ndarray:
    weight, (h, w) = rational(module.weight), x.shape[1:]
    (s, t), (k, m) = module.stride, weight.shape[2:]
    whole = np.full((weight.shape[1], (h - 1) * s + k, (w - 1) * t + m), Fraction(0), dtype=object)
    for c, i, j in np.ndindex(*x.shape):
        whole[:, i * s : i * s + k, j * t : j * t + m] += weight[c] * x[c, i, j]
    if isinstance(module, OrthogonalConvTranspose2d | NonexpansiveConvTranspose2d):
        (a, _), (b, _) = module._pads
        y = np.full((len(whole), h * s, w * t), Fraction(0), dtype=object)
        for i, j in np.ndindex(*whole.shape[1:]):
            y[:, (i - a) % (h * s), (j - b) % (w * t)] += whole[:, i, j]
    else:
        (a, b), y = module.padding, whole
        y = y[:, a : y.shape[1] - a, b : y.shape[2] - b]
    return y if module.bias is None else y + rational(module.bias)[:, None, None]


@exact.register(nn.ReLU)
def _(module: nn.ReLU, x: np.ndarray) -> np.ndarray:
    return np.maximum(x, Fraction(0))


@exact.register(nn.LeakyReLU)
def _(module: nn.LeakyReLU, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, Fraction(module.negative_slope) * x)


@exact.register(AbsoluteValue)
def _(module: AbsoluteValue, x: np.ndarray) -> np.ndarray:
    return abs(x)


@exact.register(MaxMin)
@exact.register(GroupSort)
@exact.register(FullSort)
def _(module: Any, x: np.ndarray) -> np.ndarray:
    size = {MaxMin: 2, FullSort: len(x)}.get(type(module), getattr(module, "group_size", 0))
    return np.sort(x.reshape(-1, size, *x.shape[1:]), axis=1).reshape(x.shape)


@exact.register(nn.Flatten)
@exact.register(nn.Identity)
@exact.register(nn.Dropout)
@exact.register(InvertibleDownsampling)
def _(module: nn.Module, x: np.ndarray) -> np.ndarray:
    index = torch.arange(x.size).view(1, *x.shape)
    order = module(index)[0]
    return x.reshape(-1)[order.numpy()]


@exact.register(Residual)
def _(module: Residual, x: np.ndarray) -> np.ndarray:
    return x + exact(module.branch, x)


@exact.register(Sum)
def _(module: Sum, x: np.ndarray) -> np.ndarray:
    return sum(exact(branch, x) for branch in module.branches)


@exact.register(Scale)
def _(module: Scale, x: np.ndarray) -> np.ndarray:
    return Fraction(module.constant) * x


@exact.register(Standardize)
def _(module: Standardize, x: np.ndarray) -> np.ndarray:
    mean, std = (rational(v).reshape(-1, *[1] * (x.ndim - 1)) for v in (module.mean, module.std))
    return (x - mean) / std


@exact.register(nn.AvgPool2d)
def _(module: nn.AvgPool2d, x: np.ndarray) -> np.ndarray:
    k = module.kernel_size
    if module.stride == 1:  # overlapping, padded by zeros that count
        pad = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=Fraction(0))
        rows, columns = (n + 3 - k for n in x.shape[1:])
        y = np.empty((len(x), rows, columns), dtype=object)
        for c, i, j in np.ndindex(*y.shape):
            y[c, i, j] = pad[c, i : i + k, j : j + k].sum() / Fraction(k * k)
        return y
    windows = x.reshape(len(x), x.shape[1] // k, k, x.shape[2] // k, k)
    return windows.sum((2, 4)) / Fraction(k * k)


class Functions(nn.Module):
    """Arithmetic that stands in a forward and in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = (0.3 - 1.7 * x.flip(1)) @ self.weight + self.bias / 3
        return (self.weight @ x.view(len(x), 2, 2).repeat(1, 2, 3).mean(-1)[..., None]).sum(2)


@exact.register(Functions)
def _(module: Functions, x: np.ndarray) -> np.ndarray:
    weight = rational(module.weight)
    bias = rational(module.bias / 3)  # a constant, rounded before the program runs
    y = ((Fraction(0.3) - Fraction(1.7) * x[::-1]) @ weight + bias).reshape(2, 2)
    return weight @ np.tile(y, (2, 3)).mean(-1)


class Joins(nn.Module):
    """A skip, a difference, a slice, a maximum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(x).relu()
        a, b = y.chunk(2, 1)
        a = a - self.second(b)
        return torch.cat([a, torch.maximum(b, a), x[:, 1:].clamp(-0.5, 1.0)], 1)


@exact.register(Joins)
def _(module: Joins, x: np.ndarray) -> np.ndarray:
    y = x + np.maximum(exact(module.first, x), Fraction(0))
    a, b = y[:2], y[2:]
    a = a - exact(module.second, b)
    clipped = np.minimum(np.maximum(x[1:], Fraction(-1, 2)), Fraction(1))
    return np.concatenate([a, np.maximum(b, a), clipped])


@exact.register(nn.Hardtanh)
def _(module: nn.Hardtanh, x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, Fraction(module.min_val)), Fraction(module.max_val))


@exact.register(nn.ReLU6)
def _(module: nn.ReLU6, x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, Fraction(0)), Fraction(6))


@exact.register(nn.AdaptiveAvgPool2d)
def _(module: nn.AdaptiveAvgPool2d, x: np.ndarray) -> np.ndarray:  # of a square to two by two
    n = x.shape[1]
    ends = [(i * n // 2, -(-(i + 1) * n // 2)) for i in range(2)]
    y = np.empty((len(x), 2, 2), dtype=object)
    for c, i, j in np.ndindex(*y.shape):
        y[c, i, j] = x[c, slice(*ends[i]), slice(*ends[j])].mean()
    return y


@exact.register(AveragePooling)
def _(module: AveragePooling, x: np.ndarray) -> np.ndarray:  # of 2 × 2 pixels, so that √4 = 2
    if module.stride == 1:  # each pixel in four windows, which is the square of that
        moved = [x[:, i : x.shape[1] - 1 + i, j : x.shape[2] - 1 + j] for i, j in np.ndindex(2, 2)]
        return sum(moved[1:], moved[0]) / Fraction(4)
    return exact(nn.AvgPool2d(2), x) * 2


@exact.register(Upsampling)
def _(module: Upsampling, x: np.ndarray) -> np.ndarray:
    return x.repeat(2, 1).repeat(2, 2) / Fraction(2)


@exact.register(nn.Upsample)
def _(module: nn.Upsample, x: np.ndarray) -> np.ndarray:
    return x.repeat(2, 1).repeat(2, 2)


@exact.register(nn.MaxPool2d)
def _(module: nn.MaxPool2d, x: np.ndarray) -> np.ndarray:
    k, s = module.kernel_size, module.stride
    rows, columns = ((n - k) // s + 1 for n in x.shape[1:])
    y = np.empty((len(x), rows, columns), dtype=object)
    for c, i, j in np.ndindex(*y.shape):
        y[c, i, j] = x[c, i * s : i * s + k, j * s : j * s + k].max()
    return y


@exact.register(nn.ZeroPad2d)
def _(module: nn.ZeroPad2d, x: np.ndarray) -> np.ndarray:
    left, right, top, bottom = module.padding
    if min(module.padding) < 0:
        return x[:, -top : x.shape[1] + bottom, -left : x.shape[2] + right]
    return np.pad(x, ((0, 0), (top, bottom), (left, right)), constant_values=Fraction(0))


def step_scale(module: Any) -> np.ndarray:
    """2 T^(-1): exactly, of a frozen layer; a live one states its own T as it computes it."""
    if isinstance(module, DenseStep | ConvolutionStep):
        return Fraction(2) / rational(module.diagonal)
    return rational(2 / module.scale())


@exact.register(SLLLinear)
@exact.register(DenseStep)
def _(module: Any, x: np.ndarray) -> np.ndarray:
    weight, scale = rational(module.weight), step_scale(module)
    hidden = np.maximum(x @ weight.T + rational(module.bias), Fraction(0))
    return x - (hidden * scale) @ weight


@exact.register(SLLConv2d)
@exact.register(CPLConv2d)
@exact.register(ConvolutionStep)
def _(module: Any, x: np.ndarray) -> np.ndarray:
    parts = module.weight.detach().double().chunk(module.groups)
    convolution = nn.Conv2d(len(x), len(module.weight), 3, module.stride, 1, bias=False)
    convolution.padding_mode = module.padding_mode
    convolution.weight.data.zero_()
    convolution = convolution.double()
    for group, part in enumerate(parts):
        rows, columns = (slice(group * n, (group + 1) * n) for n in part.shape[:2])
        convolution.weight.data[rows, columns] = part
    bias, scale = (v[:, None, None] for v in (rational(module.bias), step_scale(module)))
    hidden = np.maximum(exact(convolution, x) + bias, Fraction(0)) * scale
    pixels = np.vectorize(Fraction, otypes=[object])(np.eye(x.size)).reshape(-1, *x.shape)
    matrix = np.stack([exact(convolution, pixel).reshape(-1) for pixel in pixels])
    return x - (matrix @ hidden.reshape(-1)).reshape(x.shape)


@exact.register(SandwichLinear)
@exact.register(SandwichStep)
def _(module: Any, x: np.ndarray) -> np.ndarray:
    outer, inner = (rational(matrix) for matrix in module.matrices())
    return np.maximum(x @ inner.T + rational(module.bias), Fraction(0)) @ outer.T


@exact.register(ShiftConv2d)
def _(module: ShiftConv2d, x: np.ndarray) -> np.ndarray:  # without a stride
    y = np.einsum("ij,jkl->ikl", rational(module.weight), x) + rational(module.bias)[:, None, None]
    parts = zip(np.array_split(y, len(module.offsets)), module.offsets, strict=True)
    return np.concatenate([np.roll(part, offset, (1, 2)) for part, offset in parts])


def exact_exponential(module: Any, kernel: Tensor, x: np.ndarray) -> np.ndarray:
    """Series of a circular convolution in groups, on channels that are as many as the kernel's."""
    n, own = kernel.shape[:2]
    convolution = nn.Conv2d(n, n, 3, padding=1, bias=False)
    convolution.padding_mode = "circular"
    convolution = convolution.double()
    convolution.weight.data.zero_()
    for start in range(0, n, own):
        block = slice(start, start + own)
        convolution.weight.data[block, block] = kernel[block].detach().double()
    y = term = x
    for j in range(1, module.terms + 1):
        term = exact(convolution, term) / Fraction(j)
        y = y + term
    return y


@exact.register(SkewOrthogonalConv2d)
def _(module: SkewOrthogonalConv2d, x: np.ndarray) -> np.ndarray:  # twice the channels, no stride
    x = x.reshape(module.groups, -1, *x.shape[1:])
    padded = np.concatenate([x, np.full_like(x, Fraction(0))], 1).reshape(-1, *x.shape[2:])
    return exact_exponential(module, module.weight, padded) + rational(module.bias)[:, None, None]


@exact.register(SkewOrthogonalConvTranspose2d)
def _(module: SkewOrthogonalConvTranspose2d, x: np.ndarray) -> np.ndarray:  # to a quarter as many
    y = exact_exponential(module, -module.weight, x).reshape(-1, 2, 2, *x.shape[1:])
    y = y.transpose(0, 3, 1, 4, 2).reshape(len(y), 2 * x.shape[1], 2 * x.shape[2])
    return y + rational(module.bias)[:, None, None]


def power(values: np.ndarray, p: float) -> Fraction:
    """The p-norm, squared for p = 2."""
    values = abs(values.reshape(-1))
    if p == INF:
        return max(values)
    return sum(values) if p == 1 else sum(v * v for v in values)


def at_most(values: np.ndarray, bound: float | Fraction, p: float) -> bool:
    """Whether a p-norm is at most a bound, with no rounding at all."""
    if bound == INF:
        return True
    return power(values, p) <= (Fraction(bound) ** 2 if p == 2 else Fraction(bound))


def positive_definite(matrix: np.ndarray) -> bool:
    """Whether elimination in rational numbers meets positive pivots only."""
    matrix = matrix.copy()
    for i in range(len(matrix)):
        if matrix[i, i] <= 0:
            return False
        for j in range(i + 1, len(matrix)):
            matrix[j] = matrix[j] - matrix[j, i] / matrix[i, i] * matrix[i]
    return True


def exceeds_norm(bound: float, matrix: np.ndarray, p: float) -> bool:
    """Whether a bound exceeds an operator norm, decided in rational numbers."""
    if p == 2:
        gram = matrix.T @ matrix
        return positive_definite(Fraction(bound) ** 2 * np.eye(len(gram), dtype=int) - gram)
    return Fraction(bound) >= abs(matrix).sum(0 if p == 1 else 1).max()


def dense(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """Matrix of a linear layer without bias, in rational numbers."""
    identity = np.vectorize(Fraction, otypes=[object])(np.eye(math.prod(shape)))
    return np.stack([exact(layer, row.reshape(shape)).reshape(-1) for row in identity], 1)


# ------------------------------------------------------------------------ norms from above

entry = st.floats(-8, 8, width=32)


@given(st.integers(1, 4), st.integers(1, 4), st.data(), st.sampled_from(EXPONENTS))
@settings(max_examples=60)
def test_the_norm_of_a_matrix_is_below_the_bound_in_rational_numbers(
    m: int, n: int, data: st.DataObject, p: float
) -> None:
    matrix = torch.tensor(data.draw(st.lists(entry, min_size=m * n, max_size=m * n))).view(m, n)
    bound = rigorous_matrix_norm(matrix, p)
    values = rational(matrix)
    assert bound == 0 if not values.any() else exceeds_norm(bound, values, p)
    assert bound <= operator_norm(matrix, p).item() * (1 + 1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("kind", ["orthogonal", "rank one", "gaussian", "equal"])
def test_the_bound_of_a_matrix_at_every_scale(scale: float, kind: str) -> None:
    draw = torch.randn(6, 5, dtype=torch.float64)
    matrix = (
        scale
        * {
            "orthogonal": torch.linalg.qr(draw).Q,
            "rank one": draw[:, :1] * draw[:1],
            "gaussian": draw,
            "equal": torch.full((6, 5), 1 / 3, dtype=torch.float64),
        }[kind]
    )
    for p in EXPONENTS:
        bound = rigorous_matrix_norm(matrix, p)
        assert exceeds_norm(bound, rational(matrix), p)
        assert bound <= operator_norm(matrix, p).item() * (1 + 1e-10)


def test_the_bound_does_not_believe_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any basis gives a bound, and one that is far from orthogonal gives the Frobenius norm."""
    matrix = torch.randn(5, 4, dtype=torch.float64)
    true = operator_norm(matrix).item()
    good = torch.linalg.eigh(matrix.mT @ matrix)
    for shrink, noise in ((0.8, 0.0), (0.9, 0.01), (1.0, 1e-3), (1.0, 0.1), (1.0, 10.0)):
        vectors = shrink * good.eigenvectors + noise * torch.randn(4, 4, dtype=torch.float64)
        wrong = type(good)((good.eigenvalues, vectors))
        monkeypatch.setattr(torch.linalg, "eigh", lambda _, wrong=wrong: wrong)
        assert rigorous_matrix_norm(matrix) >= true
    assert rigorous_matrix_norm(matrix) == pytest.approx(matrix.norm().item(), rel=1e-9)


def test_a_large_matrix_costs_few_digits() -> None:
    matrix = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64)).Q
    assert 1 <= rigorous_matrix_norm(matrix) <= 1 + 1e-9
    complex_matrix = torch.randn(7, 9, dtype=torch.complex128)
    true = torch.linalg.svdvals(complex_matrix)[0].item()
    assert true <= rigorous_matrix_norm(complex_matrix) <= true * (1 + 1e-11)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "circular": {"padding": 1, "padding_mode": "circular"},
    "zeros": {"padding": 1},
    "valid": {},
    "stride": {"stride": 2, "padding": 1},
    "circular stride": {"stride": 2, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("channels", [(1, 1), (2, 1)])
def test_the_norm_of_a_convolution_is_below_the_bound_in_rational_numbers(
    name: str, p: float, channels: tuple[int, int]
) -> None:
    layer = nn.Conv2d(*channels, 3, bias=False, **GEOMETRIES[name])
    layer.weight.data = torch.randint(-9, 10, layer.weight.shape) / 8  # keeps the fractions short
    bound = rigorous_convolution_norm(layer.weight, 4, p=p, **GEOMETRIES[name])
    assert exceeds_norm(bound, dense(layer, (channels[0], 4, 4)), p)
    assert bound <= convolution_norm_bound(layer.weight, 4, p=p, **GEOMETRIES[name]).item() * 1.2


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 4, 1, 1)])
def test_the_bound_of_a_column_and_of_a_row_of_ones(shape: tuple[int, ...]) -> None:
    """The norm 2, between 1 and 4 for p = 1 and infinity, whose mean it is."""
    bound = rigorous_convolution_norm(torch.ones(shape), 3)
    assert 2 < bound <= 2 * (1 + 1e-10)


@pytest.mark.parametrize("exponent", [-1060, -600, 0, 600, 1000])
@pytest.mark.parametrize("p", EXPONENTS)
def test_the_bound_of_a_convolution_at_every_scale(exponent: int, p: float) -> None:
    """Powers of two that float64 holds, and whose squares it does not."""
    layer = nn.Conv2d(1, 1, 3, bias=False, dtype=torch.float64, **GEOMETRIES["circular"])
    small = torch.randint(-9, 10, layer.weight.shape).double() / 8
    layer.weight.data = small * 2.0**exponent
    bound = rigorous_convolution_norm(layer.weight, 4, p=p, **GEOMETRIES["circular"])
    assert exceeds_norm(bound, dense(layer, (1, 4, 4)), p)
    of_small = rigorous_convolution_norm(small, 4, p=p, **GEOMETRIES["circular"])
    assert bound <= of_small * 1.001 * 2.0**exponent


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_bound_of_a_matrix_of_the_least_numbers(p: float) -> None:
    for m, n in ((1, 2), (2, 1), (3, 3)):
        matrix = torch.full((m, n), 2.0**-1074, dtype=torch.float64)
        assert exceeds_norm(rigorous_matrix_norm(matrix, p), rational(matrix), p)


@given(
    st.sampled_from([*GEOMETRIES, "reflect", "replicate", "dilation", "groups"]),
    st.integers(4, 12),
    st.integers(0, 999),
    st.floats(-6, 6),
)
@settings(max_examples=40)
def test_the_bound_of_a_convolution_against_its_singular_values(
    name: str, size: int, seed: int, log_scale: float
) -> None:
    size += size % 2
    extra: dict[str, dict[str, Any]] = {
        "reflect": {"padding": 2, "padding_mode": "reflect"},
        "replicate": {"padding": 1, "padding_mode": "replicate"},
        "dilation": {"padding": 2, "dilation": 2},
        "groups": {"padding": 1, "groups": 2, "padding_mode": "circular"},
    }
    geometry = (GEOMETRIES | extra)[name]
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 2, 3, bias=False, dtype=torch.float64, **geometry)
    layer.weight.data *= 10**log_scale
    pixels = torch.eye(4 * size * size, dtype=torch.float64).view(-1, 4, size, size)
    true = torch.linalg.matrix_norm(layer(pixels).detach().flatten(1), 2).item()
    bound = rigorous_convolution_norm(layer.weight, size, **geometry)
    assert true * (1 - 1e-13) <= bound
    if geometry.get("padding_mode") == "circular" and name != "circular stride":
        assert bound <= true * (1 + 1e-6)


def test_the_bound_of_many_blocks_is_that_of_the_largest() -> None:
    blocks = torch.randn(200, 6, 5, dtype=torch.complex128)
    true = torch.linalg.matrix_norm(blocks, 2).max().item()
    assert true <= _largest_spectral_bound(blocks) <= true * (1 + 1e-6)


def test_the_bound_of_many_blocks_believes_neither_eigenvalues_nor_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = torch.randn(30, 6, 5, dtype=torch.complex128)
    true = torch.linalg.matrix_norm(blocks, 2).max().item()
    eigvalsh, cholesky = torch.linalg.eigvalsh, torch.linalg.cholesky_ex

    def factors(scale: float) -> Callable[..., Any]:
        def wrong(A: Tensor, upper: bool = False) -> Any:
            return namedtuple("Factor", "L info")(A * scale, torch.zeros(len(A)))

        return wrong

    for shrink, factor in (
        (0.5, cholesky),
        (2.0, cholesky),
        (0.0, cholesky),
        (math.nan, cholesky),
        (1.0, factors(0.0)),
        (0.5, factors(0.5)),
        (0.0, factors(0.5)),
        (1.0, factors(math.nan)),
    ):
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda A, s=shrink: eigvalsh(A) * s)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
        assert true <= _largest_spectral_bound(blocks) <= 3 * true


# ------------------------------------------------------------------- programs and functions


CIRCULAR: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def deep() -> nn.Module:
    dense = [nn.Linear(16, 6), MaxMin(), Scale(3.0), nn.Linear(6, 3)]
    return nn.Sequential(OrthogonalConv2d(1, 4, 2, stride=2), MaxMin(), nn.Flatten(), *dense)


# Every layer with a rule that maps rational numbers to rational numbers, tiny.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 3), (5,)),
    "Linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "Linear on rows": (lambda: nn.Linear(3, 2), (2, 3)),
    "OrthogonalLinear": (lambda: OrthogonalLinear(4, 4), (4,)),
    "Conv2d": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 3, 4)),
    "Conv2d stride": (lambda: nn.Conv2d(1, 2, 2, stride=2), (1, 4, 4)),
    "Conv2d circular": (lambda: nn.Conv2d(1, 2, 3, **CIRCULAR), (1, 4, 4)),
    "OrthogonalConv2d": (lambda: OrthogonalConv2d(1, 4, 2, stride=2), (1, 4, 4)),
    "NonexpansiveConv2d": (lambda: NonexpansiveConv2d(2, 1, 3), (2, 3, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1), (2, 2, 3)),
    "NonexpansiveConvTranspose2d": (
        lambda: NonexpansiveConvTranspose2d(3, 1, 2, 2),
        (3, 2, 2),
    ),
    "OrthogonalConvTranspose2d": (lambda: OrthogonalConvTranspose2d(4, 1, 2, 2), (4, 2, 2)),
    "ReLU in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), (3,)),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.3), (5,)),
    "AbsoluteValue": (AbsoluteValue, (4,)),
    "sorts": (lambda: nn.Sequential(MaxMin(), GroupSort(3), FullSort(), nn.Dropout()), (6,)),
    "Residual": (lambda: Residual(block()), (4,)),
    "Sum": (lambda: Sum(block(), nn.Linear(4, 4), nn.Identity()), (4,)),
    "Scale": (lambda: Scale(1.7), (3,)),
    "Standardize": (lambda: Standardize([0.1, -3.0], [0.3, 7.0]), (2, 2, 2)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 4, 2)),
    "AvgPool2d overlapping": (lambda: nn.AvgPool2d(3, 1, 1), (1, 3, 4)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (1, 3, 3)),
    "ReLU6": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU6()), (3,)),
    "Hardtanh": (lambda: nn.Hardtanh(-0.3, 0.7), (5,)),
    "Functions": (Functions, (3,)),
    "Joins": (Joins, (4,)),
    "AveragePooling": (lambda: AveragePooling(2), (2, 4, 2)),
    "AveragePooling overlapping": (lambda: AveragePooling(2, 1), (1, 3, 3)),
    "Upsampling": (lambda: Upsampling(2), (1, 2, 3)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), (1, 2, 3)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, 1), (1, 3, 3)),
    "ZeroPad2d": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d(-1)), (1, 2, 2)),
    "InvertibleDownsampling": (lambda: InvertibleDownsampling(2), (1, 2, 2)),
    "SLLLinear": (lambda: SLLLinear(3, 4), (3,)),
    "SLLConv2d": (lambda: SLLConv2d(1, 1), (1, 3, 3)),
    "SLLConv2d strided": (lambda: SLLConv2d(2, 2, stride=2, groups=2), (2, 2, 2)),
    "CPLConv2d": (lambda: CPLConv2d(1, 1, padding_mode="zeros"), (1, 3, 3)),
    "SLLLinear frozen": (lambda: freeze(SLLLinear(3, 4)), (3,)),
    "CPLConv2d frozen": (lambda: freeze(CPLConv2d(1, 1)), (1, 3, 3)),
    "SandwichLinear": (lambda: SandwichLinear(3, 2, 4), (3,)),
    "SandwichLinear frozen": (lambda: freeze(SandwichLinear(3, 2, 4)), (3,)),
    "ShiftConv2d": (lambda: ShiftConv2d(2, 3, offsets=[(0, 1), (1, -1)]), (2, 2, 3)),
    "SkewOrthogonalConv2d": (
        lambda: SkewOrthogonalConv2d(2, 4, 3, terms=4, groups=2),
        (2, 2, 2),
    ),
    "SkewOrthogonalConvTranspose2d": (
        lambda: SkewOrthogonalConvTranspose2d(4, 1, 3, stride=2, terms=4),
        (4, 2, 2),
    ),
    "deep": (deep, (1, 4, 4)),
}


def small(name: str, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    build, shape = SMALL[name]
    return build().eval(), shape


def check_program(module: nn.Module, x: Tensor, y: Tensor, p: float) -> None:
    """All that a ForwardError says of a batch x and of others y, decided in rational numbers."""
    result = forward_error(module, x.clone(), p)
    outputs = module(y.clone())
    for i in range(len(x)):
        a, c = Fraction(result.error[i].item()), Fraction(result.slope)
        here, there = exact(module, rational(x[i])), exact(module, rational(y[i]))
        assert at_most(rational(result.outputs[i]) - here, a, p)
        difference = rational(y[i]) - rational(x[i])
        distance = float(power(difference, p)) ** (0.5 if p == 2 else 1) * (1 + 1e-12)
        if distance <= result.limit[i]:
            assert at_most(rational(outputs[i]) - there, a + c * Fraction(distance), p)
        assert at_most(there - here, Fraction(result.lipschitz) * Fraction(distance), p)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_programs_are_below_their_bounds(name: str, dtype: torch.dtype) -> None:
    for seed, p, scale in zip(range(4), (1.0, 2.0, 2.0, INF), (1.0, 1e-3, 1e3, 1e-3), strict=True):
        module, shape = small(name, seed)
        module = module.to(dtype)
        x = (scale * torch.randn(2, *shape)).to(dtype)
        y = x + (0.1 * scale * torch.randn(2, *shape)).to(dtype)
        with torch.no_grad():
            check_program(module, x, y, p)


@pytest.mark.parametrize(
    "name", [name for name in SMALL if name[:3] not in ("SLL", "CPL", "Ske", "San")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_half_precision_are_below_their_bounds(name: str, dtype: torch.dtype) -> None:
    for seed, p in zip(range(3), EXPONENTS, strict=True):
        module, shape = small(name, seed)
        module = module.to(dtype)
        x = torch.randn(2, *shape).to(dtype)
        y = x + (0.1 * torch.randn(2, *shape)).to(dtype)
        with torch.no_grad():
            check_program(module, x, y, p)


def rounded_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose products have the weights that autocast makes."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for tensor in (layer.weight, layer.bias):
                tensor.data = tensor.data.to(dtype).to(tensor.dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", EXPONENTS)
def test_errors_under_autocast_are_below_their_bounds(dtype: torch.dtype, p: float) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), MaxMin(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(),
            Residual(nn.Linear(4, 4)), Scale(1.3), nn.Linear(4, 3),
        )  # fmt: skip
        x = torch.randn(2, 1, 4, 4)
        y = x + 0.1 * torch.randn(2, 1, 4, 4)
        function = rounded_weights(net, dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            result, outputs = forward_error(net, x, p), net(y)
        for i in range(2):
            a, c = Fraction(result.error[i].item()), Fraction(result.slope)
            here, there = (exact(function, rational(v[i])) for v in (x, y))
            assert at_most(rational(result.outputs[i]) - here, a, p)
            difference = rational(y[i]) - rational(x[i])
            distance = Fraction(float(power(difference, p)) ** (0.5 if p == 2 else 1) * (1 + 1e-12))
            assert at_most(rational(outputs[i]) - there, a + c * distance, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_inputs_and_weights(dtype: torch.dtype) -> None:
    """Where the rounded inputs cancel, nothing of the output tells of them."""
    layer = nn.Linear(2, 2, bias=False)
    u = torch.finfo(dtype).eps
    layer.weight.data = torch.tensor([[1.0, -1.0], [1.0, -1.0 - 0.4 * u]])
    x = torch.tensor([[1 + 0.4 * u, 1.0]])
    with torch.autocast("cpu", dtype):
        for net in (layer, nn.Sequential(nn.Identity(), layer)):
            result = forward_error(net, x)
            assert result.outputs.tolist() == [[0.0, 0.0]]
            assert result.error.item() >= 0.4 * u * math.sqrt(2)
        certificate = certify(layer.eval(), [(x, torch.tensor([0]))], (2,))
    assert certificate.radius.item() == 0
    rounded = rigorous_matrix_norm(layer.weight.detach().to(dtype))
    assert result.lipschitz == pytest.approx(rounded, rel=1e-9)
    assert abs(result.lipschitz / rigorous_matrix_norm(layer.weight) - 1) > 0.01 * u


awkward = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-4096, 4096, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),
    st.sampled_from([1.0, -1.0, 1 + 2.0**-23, 1 - 2.0**-24, 2.0**12, -(2.0**12), 2.0**-24]),
)


@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.sampled_from(EXPONENTS))
@settings(max_examples=100)
def test_awkward_numbers_in_a_small_net(data: st.DataObject, n: int, m: int, p: float) -> None:
    """Cancellation, denormal numbers, ties: two layers with a sort between them."""
    net = nn.Sequential(nn.Linear(n, 2 * m), MaxMin(), nn.Linear(2 * m, m))
    with torch.no_grad():
        for tensor in net.parameters():
            values = data.draw(st.lists(awkward, min_size=tensor.numel(), max_size=tensor.numel()))
            tensor.copy_(torch.tensor(values).view_as(tensor))
        x, y = (
            torch.tensor([data.draw(st.lists(awkward, min_size=n, max_size=n))]) for _ in range(2)
        )
        check_program(net, x, y, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("features", [7, 64, 500])
def test_the_sums_of_this_machine_follow_the_model(
    dtype: torch.dtype, batch: int, features: int
) -> None:
    """Large terms that cancel show in which precision, and how, a product is added up."""
    x = torch.rand(batch, features).to(dtype)
    x[:, 0], x[:, -1] = 2048.0, -2048.0
    for layer in (nn.Linear(features, 8), nn.Conv1d(features, 8, 1), nn.Conv1d(1, 8, features)):
        shape = {1: (batch, 1, -1), features: (batch, -1, 1)}.get(
            layer.weight.shape[1], (batch, -1)
        )
        inputs = x.view(shape) if layer.weight.dim() == 3 else x
        layer.weight.data.uniform_(0.5, 1).view(8, -1)[:, [0, -1]] = 1.0
        module = layer.to(dtype)
        with torch.no_grad():
            result = forward_error(module, inputs)
            true = copy.deepcopy(module).double()(inputs.double())
        errors = (result.outputs.double() - true).flatten(1).norm(dim=1)
        assert (errors <= result.error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 8])
def test_transposed_sums_follow_the_model_too(dtype: torch.dtype, channels: int) -> None:
    """torch adds up overlapping windows in half precision, where 4096 + 1 is 4096."""
    layer = nn.ConvTranspose2d(channels, 1, 3, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight.data[0, 0, 0, 0], layer.weight.data[-1, 0, -1, -1] = 4096.0, -4096.0
    layer, x = layer.to(dtype), torch.ones(2, channels, 9, 9, dtype=dtype)
    result = forward_error(layer, x)
    with torch.no_grad():
        true = copy.deepcopy(layer).double()(x.double())
    errors = (result.outputs.double() - true).flatten(1).norm(dim=1)
    assert (errors <= result.error).all()


def test_the_bound_is_in_sight_of_what_happens() -> None:
    """1 + u + u + ... rounds down every time: the error is a good part of the bound."""
    n = 65
    layer = nn.Linear(n, 1, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.full((1, n), 2.0**-24)
    x[0, ::8] = 1.0  # a large number in each lane of a vector register
    with torch.no_grad():
        result = forward_error(layer, x)
        error = abs(result.outputs.double() - x.double().sum()).item()
    assert 0.01 * result.error.item() < error <= result.error.item()


@given(st.integers(0, 999), st.floats(-3, 3), st.sampled_from(EXPONENTS))
@settings(max_examples=40)
def test_rules_with_roots_against_float64(seed: int, log_scale: float, p: float) -> None:
    """Householder, norm pooling, batch norm, roots of entries: float64 judges float32."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.data.normal_()
    norm.running_var.uniform_(0.01, 2)
    bent = Householder(4)
    bent.angle.data.uniform_(-4, 4)
    twice, zigzag = HouseholderOrder2(4, pairing="halves"), NActivation(4)
    twice.angles.data.uniform_(-9, 9)
    zigzag.kinks.data.normal_()
    rest = [
        NormPooling(2),
        NormPooling(3, 1, 1),
        norm.eval(),
        nn.AvgPool2d(2),
        nn.PReLU(4),
        SmoothAbsoluteValue(0.3),
    ]
    for module in (bent, twice, zigzag, *rest):
        x = 10**log_scale * torch.randn(3, 4, 4, 4)
        y = x + 0.1 * 10**log_scale * torch.randn(3, 4, 4, 4)
        with torch.no_grad():
            result, outputs = forward_error(module, x, p), module(y)
            judge = copy.deepcopy(module).double()
            here, there = judge(x.double()), judge(y.double())

        def size(t: Tensor) -> Tensor:
            return torch.linalg.vector_norm(t.double().flatten(1), p, dim=1)

        slack = 1e-13 * size(here)
        distance = size(y.double() - x.double())
        assert (size(result.outputs - here) <= result.error + slack).all()
        assert (size(outputs - there) <= result.error + result.slope * distance + slack).all()
        assert (size(there - here) <= result.lipschitz * distance * (1 + 1e-12) + slack).all()


def test_reflections_near_their_border() -> None:
    """Where a comparison errs by rounding, the branches are as close as the bound says."""
    bent = Householder(2)
    bent.angle.data.fill_(1.234)
    t = torch.linspace(-1, 1, 4001)[:, None]
    along = torch.tensor([math.cos(0.617), math.sin(0.617)])
    x = 3 * along + 1e-7 * t * torch.tensor([-along[1], along[0]])
    with torch.no_grad():
        result = forward_error(bent, x)
        true = copy.deepcopy(bent).double()(x.double())
    assert ((result.outputs.double() - true).norm(dim=1) <= result.error).all()


@pytest.mark.parametrize("b", [0.0, 1.0, math.pi])
def test_sectors_near_their_ends(b: float) -> None:
    """Also where a sector has no width, or one of the size of rounding."""
    twice = HouseholderOrder2(2)
    twice.angles.data = torch.tensor([[1.234], [0.4], [b]])
    ends = torch.tensor([0.0, 0.4, 0.4 + b, math.pi + b]) + 0.617
    around = (ends[:, None] + 1e-7 * torch.linspace(-1, 1, 1001)).flatten().double()
    x = (3 * torch.stack((around.cos(), around.sin()), 1)).float()
    with torch.no_grad():
        result = forward_error(twice, x)
        true = copy.deepcopy(twice).double()(x.double())
    error = (result.outputs.double() - true).norm(dim=1)
    assert (error <= result.error).all()
    assert error.max() > 0


def large_weights() -> nn.Module:
    layer = CPLLinear(1, 1)
    layer.weight.data.fill_(1e15)
    return layer


@pytest.mark.parametrize(
    ("module", "x", "y", "autocast"),
    [
        (Standardize([-6e4], [100.0]).half(), 0.0, 6e4, False),
        (nn.PReLU(1, 0.1), -6e4, -6.7e4, True),
        (large_weights(), 0.0, 1e30, False),
    ],
    ids=["a difference", "a cast", "a hidden unit"],
)
def test_what_overflows_inside_a_layer_is_out_of_limits(
    module: nn.Module, x: float, y: float, autocast: bool
) -> None:
    """Outputs that real numbers keep small, on a way that the dtype cannot hold."""
    dtype = next(iter(module.state_dict().values())).dtype
    here, there = (torch.tensor([[v]], dtype=dtype) for v in (x, y))
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        assert not module(there).isfinite().all()
        assert forward_error(module, here).limit.item() < abs(y - x)


def test_constants_that_underflow_are_still_bounds() -> None:
    net = nn.Sequential(Scale(1e-200), Scale(1e-200)).double()
    result = forward_error(net, torch.ones(1, 1).double())
    assert Fraction(result.lipschitz) >= Fraction(1e-200) ** 2
    assert result.slope > 0


@pytest.mark.parametrize("module", [nn.ReLU(), MaxMin(), nn.MaxPool1d(2), nn.AvgPool1d(2)])
def test_numbers_that_are_flushed_to_zero(module: nn.Module) -> None:
    x = torch.linspace(-1, 1, 16).view(1, 2, 8) * 2.0**-126  # all denormal but the ends
    true = copy.deepcopy(module).double()(x.double())
    bound = forward_error(module, x).error
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        outputs = module(x)
    finally:
        torch.set_flush_denormal(False)
    assert ((outputs.double() - true).flatten(1).norm(dim=1) <= bound).all()


def test_what_overflows_is_not_certified() -> None:
    layer = nn.Linear(2, 2, bias=False)
    x = torch.tensor([[1e38, 0.0]])
    assert forward_error(layer, x).limit.item() <= 0.25 * torch.finfo(torch.float32).max
    assert forward_error(Scale(1e3), x / 1e2).limit.item() <= 0


def test_a_batch_does_not_change_the_bound() -> None:
    module, shape = small("deep", 0)
    x = torch.randn(5, *shape)
    with torch.no_grad():
        whole, one = forward_error(module, x), forward_error(module, x[2:3])
    assert abs(whole.error[2] / one.error[0] - 1) < 1e-4
    assert whole.slope == one.slope


def test_layers_compose_as_the_formula_says() -> None:
    first, second = nn.Linear(6, 5), nn.Linear(5, 4)
    x = torch.randn(3, 6)
    with torch.no_grad():
        a = forward_error(first, x)
        b = forward_error(second, a.outputs)
        both = forward_error(nn.Sequential(first, second), x)
    assert both.lipschitz == pytest.approx(a.lipschitz * b.lipschitz)
    expected = b.lipschitz * a.error + b.error + 2 * b.slope * a.error
    torch.testing.assert_close(both.error, expected)
    assert both.slope == pytest.approx(b.lipschitz * a.slope + b.slope * (a.lipschitz + a.slope))


# ------------------------------------------------------- the constants of the bounds, on paper
# With thousands of roundings the terms of second order are as visible as those of the first. The
# norms are those of Pythagorean triangles.


def gamma(roundings: int, unit: float) -> float:
    return roundings * unit / (1 - roundings * unit)


UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def answer(
    dtype: torch.dtype, outputs: Sequence[float], lipschitz: float, error: float, slope: float
) -> ForwardError:
    limit = torch.full((1,), 1e3, dtype=torch.float64)
    values = torch.tensor([outputs], dtype=dtype)
    return ForwardError(values, lipschitz, torch.full_like(limit, error), slope, limit)


def agrees(result: ForwardError, error: float, slope: float, limit: float) -> None:
    """Sound, and no more than the margins for norms that are computed in float32."""
    for ours, paper in ((result.error.item(), error), (result.slope, slope)):
        assert paper <= ours <= paper * (1 + 1e-5)
    assert limit * (1 - 1e-5) <= result.limit.item() <= limit


X, Y = (3.0, 4.0), (5.0, 12.0)
AFFINE = {"norm": 2.0, "absolute_norm": 3.0, "bias_norm": 5.0, "largest": 7.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_half", [False, True])
def test_the_constants_of_a_sum_of_products(dtype: torch.dtype, in_half: bool) -> None:
    """|A||x| + |b| is 3 · 5 + 5, and the outputs have the norm 13."""
    half = dtype != torch.float32
    working = dtype if in_half else torch.float32
    n = 18 if half and in_half else 2**17
    u, tiny = UNITS[working], torch.finfo(working).tiny
    g = gamma(2 * n + 4 if half else n + 2, u)
    flush = 2 * (n + 2) * tiny * math.sqrt(2)
    error, slope = 20 * g + flush * (1 + 7 + 5), 3 * g + flush
    if half and not in_half:  # the sum is rounded, and the sum with the bias
        h = 2 * UNITS[dtype] * (1 + 8 * UNITS[dtype])
        error += h * (13 + 2 * 5 + 2 * g * 20) + 2 * LEAST[dtype] * math.sqrt(2)
        slope += h * (2 + 2 * g * 3)
    affine = _Affine(
        lambda x: torch.tensor([Y], dtype=dtype), terms=n, sums_in_half=in_half, **AFFINE
    )
    x = torch.tensor([X], dtype=dtype)
    agrees(affine(x, 2), error, slope, (torch.finfo(dtype).max / 4 - 20) / 3)
    known = affine._replace(magnitude=lambda x, size: torch.tensor([35.0], dtype=torch.float64))
    assert known(x, 2).error.item() - affine(x, 2).error.item() == pytest.approx(
        g * 20 * (1 + (2 * h if half and not in_half else 0)), rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_underflows_in_a_sum_of_products(dtype: torch.dtype) -> None:
    """Of a matrix and an input of zeros, nothing but the flushed numbers is left."""
    none = AFFINE | {"norm": 0.0, "absolute_norm": 0.0, "bias_norm": 0.0}
    x = torch.zeros(1, 2, dtype=dtype)
    result = _Affine(lambda x: x, terms=2**17, **none)(x, 2)
    flush = 2 * (2**17 + 2) * 2.0**-126 * math.sqrt(2)
    assert result.slope == pytest.approx(flush)
    last = 0.0 if dtype == torch.float32 else 2 * LEAST[dtype] * math.sqrt(2)
    lost = 0.0 if dtype == torch.float32 else 4 * UNITS[dtype] * (1 + 8 * UNITS[dtype]) * 2.0**-63
    assert result.error.item() == pytest.approx(8 * flush + last + lost, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_constants_of_partial_sums(dtype: torch.dtype) -> None:
    """Half of |A||x| + |b|, which is 20, and of the outputs, which are 13 long."""
    n, u = 2**17, torch.finfo(dtype).eps / 2
    g, flush = gamma(n + 2, u), 2 * (n + 2) * torch.finfo(dtype).tiny * math.sqrt(2)
    affine = _Affine(lambda x: torch.tensor([Y], dtype=dtype), terms=n, plain_sums=True, **AFFINE)
    error = g / 2 * ((1 + g) * 20 + 13) + flush * (1 + g) * (1 + 7 + 5)
    slope = g / 2 * (3 + 2) + flush * (1 + g)
    agrees(
        affine(torch.tensor([X], dtype=dtype), 2),
        error,
        slope,
        (torch.finfo(dtype).max / 4 - 20) / 3,
    )


def test_a_program_whose_terms_cancel_attains_the_constant() -> None:
    """1 + u rounds to 1, sixty-two times, and - 1 leaves nothing: half of |w||x| = 2 counts."""
    x = np.full(64, 0.99 * 2.0**-24, dtype=np.float32)
    x[0], x[-1] = 1, -1
    total = functools.reduce(lambda a, b: np.float32(a + b), x)
    layer = nn.Linear(64, 1, bias=False)
    layer.weight.data.fill_(1.0)
    single = forward_error(layer, torch.from_numpy(x)[None]).error.item()
    off = abs(Fraction(float(total)) - sum(map(Fraction, x.tolist())))
    assert 0.9 * single < off <= single


@pytest.mark.parametrize("seed", range(4))
def test_sums_in_any_order_keep_the_bound_of_partial_sums(seed: int) -> None:
    """Random trees of additions, and the two that gather the positive terms first or last."""
    rng = np.random.default_rng(seed)
    w, x = (rng.standard_normal(48).astype(np.float16) * np.float16(8) for _ in range(2))
    w[:2], x[:2] = 90, (90, -90)
    terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(w, x, strict=True)]
    exact_sum, moduli = sum(terms), sum(map(abs, terms))
    bound = Fraction(gamma(50, 2.0**-11)) / 2 * (moduli + abs(exact_sum))
    products = [a * b for a, b in zip(w, x, strict=True)]
    for order in (rng.permutation(48), np.argsort(products), np.argsort(products)[::-1]):
        ahead = functools.reduce(lambda a, b: np.float16(a + b), [products[k] for k in order])
        nodes = [products[k] for k in order]
        while len(nodes) > 1:
            one, other = (nodes.pop(rng.integers(len(nodes))) for _ in range(2))
            nodes.append(np.float16(one + other))
        for total in (ahead, nodes[0]):
            assert abs(Fraction(float(total)) - exact_sum) <= bound


# -------------------------------------------------------------- norms of matrices of moduli


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv2d stride", "Conv2d circular"])
@pytest.mark.parametrize("seed", range(3))
def test_the_norm_of_moduli_is_above_the_singular_value_and_near(name: str, seed: int) -> None:
    module, shape = small(name, seed)
    moduli = copy.deepcopy(module).double()
    moduli.weight.data.abs_()
    moduli.bias = None
    largest = np.linalg.norm(np.abs(dense(moduli, shape).astype(float)), 2)
    weight = module.weight.detach()
    ours = (
        matrix_of_moduli(weight, 2)
        if name == "Linear"
        else convolution_of_moduli(module, weight, shape)
    )
    assert largest <= ours * (1 + 1e-14)
    assert ours <= largest * 1.01


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("kind", ["gaussian", "rank one", "diagonal"])
def test_products_of_moduli_are_below_their_bounds(kind: str, p: float) -> None:
    """For a matrix of rank one the bound is the product, for others the norm at most."""
    torch.manual_seed(0)
    matrices = {"gaussian": torch.randn(9, 12), "diagonal": torch.eye(9, 12)}
    weight = matrices.get(kind, -torch.rand(9, 1) @ torch.rand(1, 12))
    x = torch.randn(40, 3, 12) * torch.rand(40, 1, 12).round()
    x[0], x[1, :, 1:] = 0, 0
    norm, magnitude = _products_of_moduli(weight, p)
    size = _norms(x, p)
    ours = magnitude(x, size)
    paper = torch.linalg.vector_norm(
        (x.double().abs() @ weight.double().abs().mT).flatten(1), p, dim=1
    )
    assert (paper <= ours).all()
    assert (ours <= norm * size * (1 + 1e-4) + 1e-12).all()
    if p != 2 or kind == "rank one":
        assert (ours <= paper * (1 + 1e-4) + 1e-12).all()


def test_the_norm_of_moduli_where_nothing_is_connected() -> None:
    """A block of zeros, blocks of their own, and numbers whose squares underflow."""
    weight = torch.block_diag(torch.zeros(2, 2), torch.full((2, 2), 3.0), torch.full((3, 1), -1.0))
    for scale in (1e-300, 1.0, 1e300):
        ours = matrix_of_moduli(weight.double() * scale, 2) / scale
        assert 6 * (1 - 1e-14) <= ours <= 6 * (1 + 1e-9)
    assert matrix_of_moduli(torch.zeros(2, 3), 2) < 1e-100


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_constants_of_a_potential_step(p: float) -> None:
    """The note, in NumPy, for a step whose matrices have norms on paper."""
    step = SLLLinear(2, 1)
    step.weight.data[:] = torch.tensor([[3.0, -4.0]])
    step.bias.data[:] = 2.0
    root = math.sqrt(2 / step.scale().item())
    norms = {1.0: (4 * root, 7 * root), 2.0: (5 * root, 5 * root), INF: (7 * root, 4 * root)}
    there, here = norms[p]  # of G, |G| and of their transposes
    u = 2.0**-24
    before, after, unit, c = gamma(4, u), gamma(9, u), gamma(1, u), 2 * root
    rate = before * there
    last = after * here * (1 + unit) + unit * here
    slope = here * rate + last * (there + rate) + unit
    constant = (here * before + last * (1 + before)) * c
    with torch.no_grad():
        result = forward_error(step, torch.tensor([X]), p)
    size = np.linalg.norm(X, p)
    assert slope <= result.slope <= slope * (1 + 1e-5)
    error = slope * size + constant
    assert error <= result.error.item() <= error * (1 + 1e-5)


@pytest.mark.parametrize("dtype", UNITS)
def test_the_constants_of_a_count_of_roundings(dtype: torch.dtype) -> None:
    n = round(0.2 / UNITS[dtype])
    g, largest = gamma(n + 1, UNITS[dtype]), torch.finfo(dtype).max / 4
    x = torch.tensor([X], dtype=dtype)
    error = g * (1 + 4 * g) * 13 + n * LEAST[dtype] * math.sqrt(2)
    for stretch, limit in ((2.0, (largest - 13) / 2), (0.5, largest - 5 - 100)):
        result = _relative(lambda x: torch.tensor([Y], dtype=dtype), x, 2, stretch, n, 100.0)
        agrees(result, error, g * stretch, limit)
    small = _relative(lambda x: x, 0 * x, 2, 1.0, n).error.item()
    lost = g * (1 + 4 * g) * 2 * 2.0**-63  # squares that underflow in float32
    assert small == pytest.approx(n * LEAST[dtype] * math.sqrt(2) + lost, rel=1e-4)
    u = UNITS[dtype]
    for stretch in (0.5, 2.0):
        result = _by_input(lambda x: x, x, 2, stretch, n, 3.0)
        error = gamma(n, u) * 5 + (3 + n * LEAST[dtype]) * math.sqrt(2)
        agrees(result, error, gamma(n, u), largest / 2 / max(stretch, 1) - 5)


@pytest.mark.parametrize("dtype", UNITS)
def test_the_constants_of_sums(dtype: torch.dtype) -> None:
    first, second = answer(dtype, X, 2.0, 0.5, 0.25), answer(dtype, X, 3.0, 1.5, 0.75)
    out, u = torch.tensor([Y], dtype=dtype), UNITS[dtype]
    for parts in ([first, second], [first, second, first]):
        total = sum(part.error.item() for part in parts)
        stretch = sum(part.lipschitz for part in parts)
        slope = sum(part.slope for part in parts)
        count = len(parts)
        g = gamma(1 if count == 2 else 3, u)
        size = 13 * (1 + g) + 4 * total if count == 2 else 5 * count + 2 * total
        flush = count * LEAST[dtype] * math.sqrt(2)
        result = _sum(parts, out, 2)
        agrees(result, total + g * size + flush, slope + g * (stretch + 2 * slope), 1e3)
        assert stretch <= result.lipschitz <= stretch * (1 + 1e-9)
    g = gamma(3, u)
    result = _sum([first, second], out, 2, [2.0, -3.0])
    error = 2 * 0.5 + 3 * 1.5 + g * (2 * 6 + 3 * 8) + 3 * LEAST[dtype] * math.sqrt(2)
    agrees(
        result, error, 2.75 + g * (13 + 5.5), min(1e3, (torch.finfo(dtype).max / 4 - 36) / 15.75)
    )
    assert _sum([first, second], out, 2, [1.0, -1.0]).error == _sum([first, second], out, 2).error


def test_the_constants_of_parts_side_by_side() -> None:
    first, second = (
        answer(torch.float16, X, 3.0, 5.0, 0.3),
        answer(torch.float16, X, 4.0, 12.0, 0.4),
    )
    out = torch.tensor([Y], dtype=torch.float16)
    result = _stacked([first, second], out, 2)
    agrees(result, 13 + 2 * 2.0**-24 * math.sqrt(2), 0.5, 1e3)
    assert result.lipschitz == pytest.approx(5, rel=1e-9)


@pytest.mark.parametrize(
    ("dtype", "to", "is_exact"),
    [
        (torch.float32, torch.float64, True),
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float64, torch.float32, False),
    ],
)
def test_which_casts_round(dtype: torch.dtype, to: torch.dtype, is_exact: bool) -> None:
    result = _cast(torch.tensor([X], dtype=dtype), to, 2)
    assert result.outputs.dtype == to
    expected = 0.0 if is_exact else gamma(2, UNITS[to])
    assert result.slope == pytest.approx(expected)
    assert (result.error.item() > 0) != is_exact


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("n", [1, 7, 2**18])
def test_norms_are_rounded_up_and_little(n: int, p: float) -> None:
    """From 2^18 entries on the sum is one of float64."""
    x = torch.full((2, n), 1 / 3)
    exact_norm = power(rational(x[0, :1]), p) * (1 if p == INF else n)
    found = _norms(x, p)[0].item()
    assert found**2 >= exact_norm if p == 2 else Fraction(found) >= exact_norm
    most = 1e-9 if n == 2**18 else 4 * (n + 8) * 2.0**-24
    assert found <= float(exact_norm) ** (0.5 if p == 2 else 1) * (1 + most)
    zero = _norms(torch.zeros(1, n), p).item()
    assert zero == pytest.approx(n * (2.0**-511 if n == 2**18 else 2.0**-63))
    huge = _norms(torch.full((1, 4), 2.0**127), 2).item()  # whose square float32 cannot hold
    assert 2.0**128 <= huge <= 2.0**128 * (1 + 1e-9)


def test_a_program_that_adds_from_left_to_right_attains_the_constant() -> None:
    """1 + u rounds to 1, sixty-three times: 63 u of the 66 u that any order may lose."""
    x = np.full(64, 2.0**-24, dtype=np.float32)
    x[0] = 1
    total = functools.reduce(lambda a, b: np.float32(a + b), x)
    layer = nn.Linear(64, 1, bias=False)
    layer.weight.data.fill_(1.0)
    bound = forward_error(layer, torch.from_numpy(x)[None]).error.item()
    off = abs(Fraction(float(total)) - sum(map(Fraction, x.tolist())))
    assert 0.9 * bound < off <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_two_attains_its_constant(dtype: torch.dtype) -> None:
    u = torch.finfo(dtype).eps / 2
    parts = [answer(dtype, [v], 1.0, 0.0, 0.0) for v in (1.0, 0.99 * u)]
    result = _sum(parts, parts[0].outputs + parts[1].outputs, 1)
    assert 0.9 * result.error.item() < 0.99 * u <= result.error.item()


def test_a_quotient_of_standardize_is_within_a_factor_of_its_constant() -> None:
    layer = Standardize([1 / 3], [0.7])
    x = torch.linspace(1, 2, 5001)[:, None]
    result = forward_error(layer, x, 1)
    off = (result.outputs.double() - copy.deepcopy(layer).double()(x.double())).abs()[:, 0]
    assert (off <= result.error).all()
    units = result.error / result.outputs.double().abs()[:, 0] * 2.0**24
    assert units.max() <= 3 * (1 + 1e-4)
    assert (off / result.error).max() > 0.3


def test_the_constants_of_a_composition() -> None:
    """Products of small numbers, of which the margins are all that float64 adds."""
    first = answer(torch.float64, X, 3.0, 0.5, 0.25)
    second = answer(torch.float64, Y, 5.0, 2.0, 0.125)
    both = _then(first, second)
    expected = (15.0, 5 * 0.5 + 2 + 2 * 0.125 * 0.5, 5 * 0.25 + 0.125 * 3.25)
    for ours, paper in zip((both.lipschitz, both.error.item(), both.slope), expected, strict=True):
        assert paper < ours <= paper * (1 + 1e-11)
    assert both.limit.item() == pytest.approx((1e3 - 1) / 3.25)
    assert _then(first, dataclasses.replace(second, limit=second.limit * 1e9)).limit.item() == 1e3


def test_branches_of_disjoint_slices_stretch_as_the_larger_one() -> None:
    """Twice one half and three times the other: 3, and not the root of 4 + 9."""
    result = forward_error(Slices(), torch.ones(1, 2, dtype=torch.float64))
    assert 3 < result.lipschitz <= 3 * (1 + 1e-8)


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([2.0 * x[:, :1], 3.0 * x[:, 1:]], 1)


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_error_of_one_layer_on_a_set_is_that_of_its_rule(p: float) -> None:
    """From the middle 0 to a corner: a + c d."""
    layer, x = nn.Linear(4, 3), torch.zeros(1, 4)
    near = forward_error(layer, x, p)
    paper = near.error.item() + near.slope * 4 ** (1 / p)
    ours = forward_error(layer, x, p, Box(-1, 1)).error.item()
    assert paper < ours <= paper * (1 + 1e-11)


class Alone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x], 1)


def test_a_join_of_one_is_joined_with_nothing() -> None:
    """Nothing is rounded, and its arithmetic is checked like that of others."""
    x, box = torch.zeros(1, 3), Box(-1, 1)
    assert forward_error(Alone(), x, 2, box).error.item() < 1e-30
    torch.set_float32_matmul_precision("medium")
    try:
        for module in (Alone(), Square()):
            with pytest.raises(ValueError, match="precision must be 'highest', got 'medium'"):
                forward_error(module, x, 2, box)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_values_that_a_dtype_may_not_hold_are_lost_for_good() -> None:
    """Clipping brings them back, and yet nothing is known of what was clipped."""
    for width, lost in ((4e37, False), (5e37, True)):
        for module in (nn.Hardtanh(), WidenedAndClipped()):  # inputs are held in their own dtype
            result = forward_error(module, torch.zeros(1, 3), 2, Box(-width, width))
            assert result.error.isinf().all() == lost


class WidenedAndClipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().clamp(-1, 1)


def test_the_constant_on_a_set_is_above_the_true_one() -> None:
    """Nine times, exactly, where rounding to float64 must not lose the last bits."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 3.0)
    for p in EXPONENTS:
        result = forward_error(
            nn.Sequential(layer, nn.ReLU(), layer), torch.ones(1, 1), p, Box(-9, 9)
        )
        assert 9 < result.lipschitz <= 9 * (1 + 1e-8)


@pytest.mark.parametrize("p", EXPONENTS)
def test_a_ball_is_widened_to_hold_what_is_near_it(p: float) -> None:
    ball = Ball(torch.ones(4), 1.0, 2).range((4,))
    wide = _widened(ball, torch.tensor([0.5], dtype=torch.float64), p)
    longest = 0.5 * (2 if p == INF else 1)  # of an error of p-norm 1/2 in four entries
    assert 1 + longest <= wide.radius.item() <= (1 + longest) * (1 + 1e-9)
    assert wide.high.max().item() == pytest.approx(2.5)
    assert wide.low.min().item() == pytest.approx(-0.5)


# ----------------------------------------------------------------------- rules and refusals


def test_reduced_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv1d(1, 1, 1), torch.ones(1, 1, 3)
    with torch.no_grad():
        forward_error(layer, x)
        torch.set_float32_matmul_precision("medium")
        try:
            with pytest.raises(ValueError, match="precision must be 'highest', got 'medium'"):
                forward_error(layer, x)
        finally:
            torch.set_float32_matmul_precision("highest")
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        with pytest.raises(ValueError, match="must be STRICT, got BF16"):
            forward_error(layer, x)
        monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE")
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: True)
        monkeypatch.setattr(torch._C, "_get_nnpack_enabled", lambda: True)
        with pytest.raises(ValueError, match="NNPACK may convolve by Winograd"):
            forward_error(layer, x)


def test_algorithms_of_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    depthwise, x = nn.Conv2d(2, 2, 3, groups=2), torch.ones(1, 2, 4, 4)
    winograd = SimpleNamespace(name="Winograd3x3Depthwise")
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *_: winograd)
    with pytest.raises(ValueError, match="convolved by Winograd's algorithm on this processor"):
        forward_error(depthwise, x)
    forward_error(nn.Conv2d(2, 2, 3), x)  # which torch has no such algorithm for
    name = "_get_cpu_allow_fp16_reduced_precision_reduction"
    monkeypatch.setattr(torch._C, name, lambda: True, raising=False)
    with pytest.raises(ValueError, match="sums of float16 must not be of reduced precision"):
        forward_error(nn.Linear(2, 2), torch.ones(1, 2))


def test_a_layer_joins_by_one_function() -> None:
    class Negate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    @forward_error_rule.register(Negate)
    def _(module: Negate, example: Tensor, p: float) -> Callable[[Tensor], ForwardError]:
        def analysis(x: Tensor) -> ForwardError:
            zero = torch.zeros(len(x), dtype=torch.float64)
            return ForwardError(module(x), 1.0, zero, 0.0, zero + INF)

        return analysis

    with torch.no_grad():
        x = torch.randn(2, 3)
        plain = forward_error(nn.Linear(3, 3), x)
        net = nn.Sequential(Negate(), Negate())
    assert forward_error(net, x).error.max() < 1e-300
    assert plain.error.min() > 0


def test_every_rule_meets_the_oracle_or_float64() -> None:
    """No rule is left without a test that knows better."""
    tested = {type(module) for name in SMALL for module in small(name, 0)[0].modules()}
    tested = {c for kind in tested for c in kind.__mro__}
    by_float64 = {
        Householder,
        HouseholderOrder2,
        NActivation,
        NormPooling,
        SmoothAbsoluteValue,
        nn.BatchNorm2d,
        nn.PReLU,
        Sine,
        UnitNormalize,
    }
    by_float64 |= {nn.Softmax2d, nn.LocalResponseNorm, BallProjection}
    by_float64 |= {_EnergyLayer, L2MultiheadAttention}
    by_float64 |= {*_RELATIVE, *_BY_INPUT, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.LogSigmoid}
    by_float64 |= {nn.Softshrink, nn.Threshold, nn.RReLU, _Lossless}
    by_float64 |= {BatchCentering, LayerCentering, ScalarBatchNorm, ScaleAndBias, Unscale}
    by_fractions = {InfinityDistance}  # tests/test_distances.py
    by_decimals = {nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.RMSNorm}
    by_decimals |= {nn.Softmax, nn.Softmin, nn.LogSoftmax}
    by_functions = {Clamp, Constant, Diagonal, Shift, MatrixProduct, LinearMap, Cast}
    kin = {"1d", "3d"}  # of layers whose two-dimensional version is tested
    moved = {cls for cls, rule in forward_error_rule.registry.items() if rule is moved_error}
    for cls in forward_error_rule.registry.keys() - {object}:
        if cls.__module__.startswith(("torch", "lipbook")) and cls not in moved:
            alike = {c.__name__ for c in tested | by_float64 | by_functions | by_decimals}
            alike |= {c.__name__ for c in by_fractions}
            named = cls.__name__[:-2] + "2d" if cls.__name__[-2:] in kin else cls.__name__
            assert named in alike or cls.__name__ in ("CPLLinear", "SLLConv2d"), cls


@pytest.mark.parametrize("norm", [0.5, 1.0, 1.9, 3.0])
@pytest.mark.parametrize("terms", [4, 8])
@pytest.mark.parametrize("p", EXPONENTS)
def test_a_truncated_exponential_is_nonexpansive_up_to_norm_two(
    norm: float, terms: int, p: float
) -> None:
    layer = SkewOrthogonalConv2d(1, 1, 3, terms=terms, bias=False).double()
    kernel = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double() * norm / 2
    parametrize.remove_parametrizations(layer, "weight")  # of norm |2 sin θ| norm / 2
    layer.weight.data = kernel[None, None]
    x = torch.randn(1, 1, 4, 4).double()
    ours = forward_error(layer, x, p).lipschitz
    pixels = torch.eye(16).double().view(-1, 1, 4, 4)
    true = torch.linalg.matrix_norm(layer(pixels).detach().flatten(1).mT, p).item()
    assert true <= ours * (1 + 1e-14)
    assert (ours == 1) == (p == 2 and norm < 2)


def test_the_bound_of_the_net_agrees_with_the_composition() -> None:
    for name in SMALL:
        module, shape = small(name, 3)
        x = torch.randn(1, *shape)
        with torch.no_grad():
            ours = forward_error(module, x).lipschitz
        theirs = lipschitz_bound(module, shape).value
        assert theirs * (1 - 1e-9) <= ours <= theirs * (1 + 1e-5), name


# ------------------------------------------------- smooth functions, normalisation, and sets
# Roots and exponentials leave the rational numbers: decimal numbers of 60 digits judge, or float64
# where its own error is a millionth of the bound.


class Products(nn.Module):
    """Products and squares whose sums cancel."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a * a - b * b - (a - b) * (a + b), a * b * (a - b)], 1)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.gate(x))
        return self.head(functional.glu(torch.cat([x, x.flip(1)], 1)).exp().sqrt().reciprocal())


class Scores(nn.Module):
    """Softmax of products of matrices, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        return (9 * x @ x.mT).softmax(-1) @ x


class Attends(nn.Module):
    def __init__(self, steepness: float, **options: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(2, 2) for _ in range(3))
        self.query.weight.data *= steepness
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        parts = self.query(x), self.key(x), self.value(x)
        return functional.scaled_dot_product_attention(*parts, **self.options)


class Alike(nn.Module):
    """Attention of the tokens as they are, so that nothing but itself is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        return functional.scaled_dot_product_attention(x, x, x)


class Heads(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        return self.attention(x, x, x, **self.options)[0]


class Last(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.layer(x.view(len(x), -1, 2))
        cell = last[1] if isinstance(last, tuple) else last
        return torch.cat([outputs.flatten(1), cell.transpose(0, 1).flatten(1)], 1)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :2], x[:, 2:])


def of_tokens(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 4)), layer)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, layer_norm_eps=1.0)
    return nn.Sequential(nn.Unflatten(1, (3, 4)), layer)


ON_SETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "products": (Products, 4),
    "gates": (Gates, 4),
    "bilinear": (Bilinear, 4),
    "scores": (Scores, 6),
    "attention": (lambda: Attends(1.0), 6),
    "saturated attention": (lambda: Attends(40.0), 6),
    "causal attention": (lambda: Attends(1.0, is_causal=True, scale=2.0), 6),
    "attention of tokens": (Alike, 6),
    "heads": (Heads, 12),
    "heads without weights": (lambda: Heads(need_weights=False), 12),
    "encoder": (encoder, 12),
    "energy attention": (lambda: of_tokens(EnergyAttention(4, 2)), 12),
    "l2 attention": (lambda: of_tokens(L2MultiheadAttention(4, 2)), 12),
    "causal l2 attention": (lambda: of_tokens(L2MultiheadAttention(4, 2, is_causal=True)), 12),
    "RNN": (lambda: Last(nn.RNN(2, 3, batch_first=True)), 8),
    "RNN, relu": (lambda: Last(nn.RNN(2, 3, batch_first=True, nonlinearity="relu")), 8),
    "GRU": (lambda: Last(nn.GRU(2, 3, batch_first=True, bidirectional=True)), 8),
    "LSTM": (lambda: Last(nn.LSTM(2, 3, 2, batch_first=True)), 8),
    "LayerNorm": (lambda: nn.LayerNorm(6), 6),
    "RMSNorm": (lambda: nn.RMSNorm(6, eps=1e-5), 6),
    "UnitNormalize": (UnitNormalize, 6),
    "linear interpolation": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Upsample((5, 4), mode="bilinear")),
        6,
    ),
    "LocalResponseNorm": (
        lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.LocalResponseNorm(3)),
        6,
    ),
}


@pytest.mark.parametrize("name", ON_SETS)
def test_errors_on_a_set_hold_at_all_of_its_points(name: str) -> None:
    """float32 against float64, on boxes with their corners and on balls; float64 must be less."""
    torch.manual_seed(0)
    build, n = ON_SETS[name]
    module = build().eval().requires_grad_(False)
    twin = copy.deepcopy(module).double()
    for p, width in itertools.product(EXPONENTS, (1e-3, 1.0)):
        center = 1.0 + torch.rand(n)
        for domain in (Box(center - width, center + width), Ball(center, width, p)):
            x = center + width * (2 * torch.rand(64, n) - 1)
            x[:16] = center + width * torch.randn(16, n).sign()
            if isinstance(domain, Ball):
                step = (x - center).double()
                size = torch.linalg.vector_norm(step, p, dim=1, keepdim=True)
                x = (center + step * (0.999 * width / size).clamp(max=1.0)).float()
            else:
                x = torch.minimum(torch.maximum(x, domain.low), domain.high)
            single = forward_error(module, x, p, domain)
            double = forward_error(twin, x.double(), p, domain)
            ratio = (double.error / single.error).max()
            assert 2.0**-30 < ratio < 2.0**-26  # u is 2^-29 times as large
            assert single.error.isfinite().all()
            off = (single.outputs.double() - double.outputs).flatten(1)
            norms = torch.linalg.vector_norm(off, p, dim=1)
            assert (norms <= single.error).all()
            assert single.slope == 0


def test_cancelling_products_in_rational_numbers() -> None:
    """a² - b² - (a - b)(a + b) is 0; what the program returns is its error."""
    x = torch.rand(2000, 4)
    worst = 0.0
    for p in EXPONENTS:
        result = forward_error(Products(), x, p, Box(0, 1))
        here = result.outputs[:, :2].double()
        assert (torch.linalg.vector_norm(here, p, dim=1) <= result.error).all()
        worst = max(worst, (here.norm(dim=1) / result.error).max().item())
    assert worst > 0.01


def test_a_square_attains_its_bound_up_to_a_factor() -> None:
    x = 1 + torch.arange(4096)[:, None] * 2.0**-23
    result = forward_error(Square(), x, 2, Box(1, 1 + 2.0**-11))
    off = (result.outputs.double() - x.double().square()).abs()
    assert (off[:, 0] <= result.error).all()
    assert off.max() > 0.2 * result.error[0]


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def length(values: Sequence[Decimal], p: float) -> Decimal:
    moduli = [abs(v) for v in values]
    if p == INF:
        return max(moduli)
    return sum(moduli, Decimal(0)) if p == 1 else sum((v * v for v in moduli), Decimal(0)).sqrt()


def decimals(values: Tensor) -> list[Decimal]:
    return [Decimal(v) for v in values.detach().double().flatten().tolist()]


def apart(program: Tensor, exact: Sequence[Decimal], p: float) -> Decimal:
    return length([a - b for a, b in zip(decimals(program), exact, strict=True)], p)


def normalised(module: Any, x: Tensor) -> list[Decimal]:
    """A normalisation of one sample in decimal numbers."""
    shape = {nn.GroupNorm: (2, -1), nn.InstanceNorm2d: (4, -1)}.get(type(module), (1, -1))
    count = x.numel()
    weight = module.weight.detach().double()
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().double()
    repeat = count // weight.numel()
    weight, bias = (t.flatten().repeat_interleave(repeat) for t in (weight, bias))
    found: list[Decimal] = []
    for row in x.reshape(shape):
        values = decimals(row)
        mean = sum(values, Decimal(0)) / len(values)
        c = [v - (0 if isinstance(module, nn.RMSNorm) else mean) for v in values]
        s = (sum((v * v for v in c), Decimal(0)) / len(c) + Decimal(module.eps)).sqrt()
        found += [v / s for v in c]
    scales = zip(found, decimals(weight), decimals(bias), strict=True)
    return [w * v + b for v, w, b in scales]


NORMALISATIONS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm((4, 2, 3), eps=1e-5),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "RMSNorm": lambda: nn.RMSNorm((4, 2, 3), eps=1e-6),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (0, 1e-3), (1, 1e-2), (30, 1), (-1000, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisations_in_decimal_numbers(
    name: str, mean: float, spread: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = NORMALISATIONS[name]()
    for weight in module.parameters():
        nn.init.normal_(weight)
    module = module.to(dtype)
    x = (mean + spread * torch.randn(6, 4, 2, 3)).to(dtype)
    x[0] = mean  # constant
    x[1, 0, 0, 0] += 8 * spread
    with torch.no_grad(), localcontext(prec=60):
        results = {p: forward_error(module, x.clone(), p) for p in EXPONENTS}
        span = Box(x.double().min(), x.double().max())
        on_set = {p: forward_error(module, x.clone(), p, span) for p in EXPONENTS}
        moved = x + spread * 1e-3 * torch.randn_like(x)
        outputs = module(moved)
        for i, (here, there) in enumerate(zip(x, moved, strict=True)):
            exact_here, exact_there = normalised(module, here), normalised(module, there)
            for p, result in results.items():
                off = apart(result.outputs[i], exact_here, p)
                assert off <= result.error[i].item()
                assert off <= on_set[p].error[i].item()
                step = (there.double() - here.double()).flatten()
                distance = torch.linalg.vector_norm(step, p).item() * (1 + 1e-9)
                if distance <= result.limit[i].item():
                    off = apart(outputs[i], exact_there, p)
                    assert off <= result.error[i].item() + result.slope * distance
    if dtype == torch.float32 and abs(mean) <= 30:
        assert results[2.0].error[1:].isfinite().all()


def test_the_bound_of_a_normalisation_is_within_a_factor() -> None:
    """The mean of numbers like 1000 is off by some u M, which the deviation 1 does not hide."""
    torch.manual_seed(0)
    layer, x = nn.LayerNorm(5, eps=1e-2), 100 + torch.randn(500, 5)
    with torch.no_grad():
        result = forward_error(layer, x, INF)
        true = copy.deepcopy(layer).double()(x.double())
    ratio = ((result.outputs.double() - true).abs().amax(1) / result.error).max()
    assert 1e-3 < ratio <= 1


@pytest.mark.parametrize("layer", [nn.LayerNorm(4096), nn.GroupNorm(1, 4096)])
def test_this_torch_takes_no_difference_of_squares(layer: nn.Module) -> None:
    """The algorithm that the note names: the other one loses all digits here."""
    x = (4096.0 + torch.tensor([1.0, -1.0]).repeat(2048))[None]
    with torch.no_grad():
        assert (layer(x) - (x - 4096)).abs().max() < 1e-3


def test_functions_on_a_fine_grid() -> None:
    """Every elementwise function at numbers of all sizes: float64 judges float32."""
    magnitudes = torch.logspace(-8, 2.5, 40_000, dtype=torch.float64).float()
    x = torch.cat([magnitudes, -magnitudes])[:, None]
    modules = [
        *(nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ELU()),
        *(nn.CELU(0.5), nn.SELU(), nn.Softplus(), nn.Softplus(2.0), nn.LogSigmoid()),
        *(nn.Softsign(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softshrink(0.3), nn.Tanhshrink()),
        *(nn.RReLU().eval(), nn.Threshold(0.3, 0.3), Sine(0.0), Sine(math.pi / 2)),
    ]
    for module in modules:
        result = forward_error(module, x.clone(), 1)
        off = (result.outputs.double() - copy.deepcopy(module).double()(x.double())).abs()[:, 0]
        assert (off <= result.error).all(), module
        assert (off / result.error.clamp(min=1e-300)).max() > 1e-3, module


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("layer", [nn.Softmax(1), nn.Softmin(1), nn.LogSoftmax(1)])
def test_softmax_in_decimal_numbers(scale: float, layer: nn.Module) -> None:
    """Small, equal and saturated logits."""
    torch.manual_seed(0)
    x = scale * torch.randn(20, 7)
    x[0], x[1, 1:] = scale, -scale
    result = {p: forward_error(layer, x, p) for p in EXPONENTS}
    with localcontext(prec=60):
        for i, row in enumerate(x):
            values = [-v if isinstance(layer, nn.Softmin) else v for v in decimals(row)]
            terms = [(v - max(values)).exp() for v in values]
            total = sum(terms, Decimal(0))
            true = [t / total for t in terms]
            if isinstance(layer, nn.LogSoftmax):
                true = [v - max(values) - total.ln() for v in values]
            for p, found in result.items():
                assert apart(found.outputs[i], true, p) <= found.error[i].item()


def test_what_is_refused_of_normalisations_and_halves() -> None:
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"channels last.*call \.contiguous"):
        forward_error(nn.GroupNorm(2, 4), x.to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="eps=None takes the eps of the dtype"):
        forward_error(nn.RMSNorm(3), x)
    with pytest.raises(ValueError, match=r"known in float32 and float64, got torch.bfloat16"):
        forward_error(nn.LayerNorm(3).bfloat16(), x.bfloat16())
    with pytest.raises(ValueError, match="overflows below the threshold of 200"):
        forward_error(nn.Softplus(1.0, 200.0), x)
    with pytest.raises(ValueError, match="not bounded on all of space: give a domain"):
        forward_error(Square(), x)
    with pytest.raises(ValueError, match="inputs must lie in the domain"):
        forward_error(Square(), x, 2, Box(0, 0.1))
    assert forward_error(Square(), 1e30 * x.abs(), 2, Box(0, 1e31)).error.isinf().all()
