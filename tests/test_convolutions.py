"""Kernels against loops on paper, layers against the singular values of their dense matrices."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lipbook import convolutions
from lipbook.composition import lipschitz_bound
from lipbook.convolutions import (
    AOL,
    BCOP,
    RKO,
    BlockReflectorConv2d,
    CayleyConv2d,
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
    NonexpansiveConvTranspose1d,
    NonexpansiveConvTranspose2d,
    NonexpansiveConvTranspose3d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
    ShiftConv2d,
    SkewOrthogonalConv2d,
    SkewOrthogonalConvTranspose2d,
    aol_kernel,
    bcop_kernel,
    block_convolution,
    block_reflector_kernel,
    cayley_kernel,
    channel_shift,
    circular_fold,
    circular_pad,
    kernel_norm_bound,
    nonexpansive,
    rko_kernel,
    skew,
    skew_exponential,
    skew_kernel,
)
from lipbook.convolutions.circular import circular_transpose
from lipbook.convolutions.frequencies import images_of, spectrum
from lipbook.norms import circular_convolution_norm, circular_convolution_singular_values

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a singular value that should be 1
CONV = {1: OrthogonalConv1d, 2: OrthogonalConv2d, 3: OrthogonalConv3d}
TRANSPOSE = {
    1: OrthogonalConvTranspose1d,
    2: OrthogonalConvTranspose2d,
    3: OrthogonalConvTranspose3d,
}
NONEXPANSIVE_TRANSPOSE = {
    1: NonexpansiveConvTranspose1d,
    2: NonexpansiveConvTranspose2d,
    3: NonexpansiveConvTranspose3d,
}
NONEXPANSIVE = {1: NonexpansiveConv1d, 2: NonexpansiveConv2d, 3: NonexpansiveConv3d}


def dense(layer: Callable[[Tensor], Tensor], shape: Sequence[int], dtype: Any = None) -> Tensor:
    """Matrix of a linear layer, column by column: images of single pixels, which do not round."""
    pixels = torch.eye(math.prod(shape), dtype=dtype).view(-1, *shape)
    with torch.no_grad():
        return layer(pixels).flatten(1).mT.double()


def singular_values(layer: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    return torch.linalg.svdvals(dense(layer, shape))


def assert_orthogonal(layer: nn.Module, shape: Sequence[int], dtype: Any = torch.float32) -> None:
    values = torch.linalg.svdvals(dense(layer, shape, dtype))
    assert (values - 1).abs().max() <= TOLERANCE[dtype]


def raw(layer: nn.Module) -> list[Tensor]:
    return [p for name, p in layer.named_parameters() if "parametrizations" in name]


# ------------------------------------------------------------------ definitions, by loops


def naive_block_convolution(outer: Tensor, inner: Tensor) -> Tensor:
    k, m = outer.shape[2:], inner.shape[2:]
    result = outer.new_zeros(
        len(outer), inner.shape[1], *(a + b - 1 for a, b in zip(k, m, strict=True))
    )
    for t in itertools.product(*map(range, k)):
        for u in itertools.product(*map(range, m)):
            place = tuple(a + b for a, b in zip(t, u, strict=True))
            result[(..., *place)] += outer[(..., *t)] @ inner[(..., *u)]
    return result


@pytest.mark.parametrize("cls", [SkewOrthogonalConv2d, SkewOrthogonalConvTranspose2d])
def test_a_skew_convolution_names_its_sizes_as_torch_does(cls: Any) -> None:
    layer = cls(4, 6, 3, stride=2, groups=2)
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.groups)
    assert sizes == (4, 6, 3, 2, 2)


def test_convolutions_of_other_forms_name_their_channels_as_torch_does() -> None:
    layers = CayleyConv2d(4, 6, 3, 8), BlockReflectorConv2d(4, 6, 3, 8), ShiftConv2d(4, 6)
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [(4, 6)] * 3
    assert [layer.kernel_size for layer in layers[:2]] == [3, 3]


@pytest.mark.parametrize(("k", "m"), [((3,), (2,)), ((2, 3), (3, 1)), ((2, 1, 2), (1, 3, 2))])
def test_block_convolution_is_the_kernel_of_the_composition(k: Any, m: Any) -> None:
    outer, inner = torch.randn(2, 3, *k).double(), torch.randn(3, 4, *m).double()
    kernel = block_convolution(outer, inner)
    assert kernel.shape == (2, 4, *(a + b - 1 for a, b in zip(k, m, strict=True)))
    torch.testing.assert_close(kernel, naive_block_convolution(outer, inner))
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[len(k) - 1]
    x = torch.randn(2, 4, *[6] * len(k)).double()
    torch.testing.assert_close(conv(x, kernel), conv(conv(x, inner), outer))


@pytest.mark.parametrize(("k", "m"), [((3,), (2,)), ((2, 3), (3, 1)), ((2, 1, 2), (1, 3, 2))])
def test_block_convolution_of_grouped_kernels_is_that_of_each_group(k: Any, m: Any) -> None:
    outer, inner = torch.randn(4, 3, *k).double(), torch.randn(6, 5, *m).double()
    kernel = block_convolution(outer, inner, groups=2)
    pairs = zip(outer.chunk(2), inner.chunk(2), strict=True)
    each = [naive_block_convolution(*pair) for pair in pairs]
    torch.testing.assert_close(kernel, torch.cat(each))
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[len(k) - 1]
    x = torch.randn(2, 10, *[6] * len(k)).double()
    composed = conv(conv(x, inner, groups=2), outer, groups=2)
    torch.testing.assert_close(conv(x, kernel, groups=2), composed)


def naive_bcop(seed: Tensor, projectors: Tensor, kernel_size: Any, stride: Any) -> Tensor:
    """Seed by a QR factorisation with positive diagonal, projectors by pseudo-inverses."""
    wide = seed.shape[0] < seed.shape[1]
    tall = seed.mT if wide else seed
    Q, R = np.linalg.qr(tall.numpy())
    Q = Q * np.sign(np.diag(R))
    matrix = torch.from_numpy(Q.T.copy() if wide else Q)
    n, dims = projectors.shape[-2], len(kernel_size)
    # columns of the seed are (*taps, channels)
    kernel = matrix.view(len(seed), *stride, n).movedim(-1, 1)
    extra = [k - s for k, s in zip(kernel_size, stride, strict=True)]
    axes = [a for i in range(max(extra)) for a in range(dims) if i < extra[a]]
    for axis, A in zip(axes, projectors, strict=True):
        P = torch.from_numpy(A.numpy() @ np.linalg.pinv(A.numpy()))
        factor = torch.stack([P, torch.eye(n).double() - P], -1)
        factor = factor.view(n, n, *(2 if a == axis else 1 for a in range(dims)))
        kernel = naive_block_convolution(kernel, factor)
    return kernel


@pytest.mark.parametrize(
    ("rows", "n", "kernel_size", "stride"),
    [
        (4, 4, (3,), (1,)),
        (3, 4, (4,), (2,)),
        (4, 4, (3, 3), (1, 1)),
        (3, 5, (2, 4), (1, 1)),
        (9, 4, (3, 2), (2, 2)),
        (20, 4, (3, 2), (2, 2)),
        (3, 3, (2, 1, 3), (1, 1, 1)),
    ],
)
def test_bcop_is_the_block_convolution_of_seed_and_projectors(
    rows: int, n: int, kernel_size: Any, stride: Any
) -> None:
    seed = torch.randn(2, rows, n * math.prod(stride), dtype=torch.float64)
    factors = sum(kernel_size) - sum(stride)
    projectors = torch.randn(factors, 2, n, n // 2, dtype=torch.float64)
    kernel = bcop_kernel(seed, projectors, kernel_size, stride)
    assert kernel.shape == (2, rows, n, *kernel_size)
    for group in range(2):
        expected = naive_bcop(seed[group], projectors[:, group], kernel_size, stride)
        torch.testing.assert_close(kernel[group], expected, rtol=0, atol=1e-12)


def test_bcop_kernel_of_two_taps_on_paper() -> None:
    """P projects on (3, 4) / 5, and the seed is a signed identity."""
    seed = torch.tensor([[[2.0, 0.0], [0.0, -3.0]]]).double()
    kernel = bcop_kernel(seed, torch.tensor([[[[6.0], [8.0]]]]).double(), (2,))[0]
    expected = torch.tensor([[[9, 16], [12, -12]], [[-12, 12], [-16, -9]]]).double() / 25
    torch.testing.assert_close(kernel, expected)


def test_more_outputs_than_inputs_is_the_adjoint_of_fewer() -> None:
    layer = OrthogonalConv2d(3, 7, (3, 2), bias=False)
    assert layer.parametrizations.weight[0].seed_shape == (1, 3, 7)
    kernel = bcop_kernel(*raw(layer), (3, 2))[0]
    assert torch.equal(layer.weight, kernel.transpose(0, 1).flip(2, 3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unshuffled_bcop_is_a_convolution_of_phases(dims: int) -> None:
    """Strides by invertible downsampling and then a kernel of k / s taps."""
    stride = (2, 3, 1)[:dims]
    size = [2 * s for s in stride]
    layer = CONV[dims](2, 4, size, stride, padding=0, bias=False, method="bcop_unshuffle")
    layer = layer.double()
    inner = bcop_kernel(*raw(layer), [2] * dims)[0]
    assert inner.shape[1] == 2 * math.prod(stride)
    x = torch.randn(1, 2, *(3 * s for s in stride), dtype=torch.float64)
    phases = x.new_zeros(1, 2, *stride, *[3] * dims)
    for phase in itertools.product(*map(range, stride)):
        phases[(slice(None), slice(None), *phase)] = x[
            (..., *(slice(p, None, s) for p, s in zip(phase, stride, strict=True)))
        ]
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    torch.testing.assert_close(layer(x), conv(phases.flatten(1, 1 + dims), inner))


@pytest.mark.parametrize("method", ["bcop", "bcop_unshuffle"])
def test_same_output_as_a_plain_layer_of_torch(method: Any) -> None:
    for arguments in (
        {"kernel_size": 3},
        {"kernel_size": (3, 5), "dilation": (2, 1), "groups": 2},
        {"kernel_size": 2},
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": (4, 2), "stride": (2, 2), "padding": (1, 0)},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 1, "padding_mode": "zeros"},
        {"kernel_size": 4, "stride": 2, "padding_mode": "zeros"},
        {"kernel_size": 2, "padding_mode": "zeros"},
    ):
        layer = OrthogonalConv2d(4, 6, **arguments, method=method)
        options = {"padding": layer.padding, "padding_mode": layer.padding_mode}
        plain = nn.Conv2d(4, 6, **{**arguments, **options})
        plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias})
        x = torch.randn(3, 4, 8, 6)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
            expected = plain(x)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x[0]), expected[0])  # without a batch


@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_layer_is_the_adjoint(dims: int, mode: str) -> None:
    for k, s, d in ((3, 1, 1), (4, 2, 1), (3, 2, 1), (3, 1, 2), (2, 1, 1), (5, 3, 2)):
        options = {"groups": 2, "dilation": d, "padding_mode": mode, "bias": False}
        padding = "same" if (k, mode) != (2, "zeros") else 0
        transpose = TRANSPOSE[dims](4, 6, k, s, padding=padding, **options).double()
        layer = CONV[dims](6, 4, k, s, padding=padding, **options).double()
        x = torch.randn(1, 6, *[6 * s] * dims).double()
        parametrize.remove_parametrizations(layer, "weight")
        layer.weight = nn.Parameter(transpose.weight.detach())
        y = layer(x)
        z = torch.randn_like(y)
        back = transpose(z)
        assert back.shape == x.shape
        torch.testing.assert_close((y * z).sum(), (x * back).sum())


def test_transposed_bias_and_output_padding() -> None:
    layer = OrthogonalConvTranspose2d(4, 2, 3, 2)
    x = torch.randn(2, 4, 5, 5)
    without = layer(x) - layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    with torch.no_grad():
        layer.bias.zero_()
    torch.testing.assert_close(layer(x), without)
    layer = OrthogonalConvTranspose2d(4, 2, 3, 2, 1, (0, 1), padding_mode="zeros")
    plain = nn.ConvTranspose2d(4, 2, 3, 2, 1, (0, 1))
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias})
    torch.testing.assert_close(layer(x), plain(x))


def test_rko_reshaped_kernel_is_semi_orthogonal() -> None:
    for shape, stride, dilation, groups, overlap in (
        ((6, 4, 3), 1, 1, 1, 3),
        ((6, 4, 3, 5), (1, 2), 1, 2, 3 * 3),
        ((40, 2, 4, 3), (2, 3), (1, 2), 1, 2 * 1),
        ((4, 3, 4), 6, 4, 1, 2),  # two taps of four meet: 4 * gcd(6, 4) / 6
    ):
        kernel = rko_kernel(torch.randn(shape, dtype=torch.float64), stride, dilation, groups)
        assert kernel.shape == shape
        for block in kernel.unflatten(0, (groups, -1)).flatten(2):
            values = torch.linalg.svdvals(block)
            torch.testing.assert_close(values, torch.full_like(values, overlap**-0.5))


@pytest.mark.parametrize("phases", [128, 1])
def test_aol_scales_by_the_row_sums_of_the_dense_gram_matrix(
    phases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of three courses; the last one where there are many phases, or 1."""
    monkeypatch.setattr(nonexpansive, "_MANY", phases)
    few = [(1, 1, 1), ((2, 3), 1, 2), (2, 3, 1), (3, 2, 2), (2, 2, 1)]
    many = [(1, 1, 2, (4, 3)), ((2, 1), 1, 1, (5, 4))]  # whose sums are those of a correlation
    cases = [*[(*case, (3, 2)) for case in few], *many]
    if phases == 1:
        cases = [(1, 1, 1, (3, 2)), ((3, 1), 1, 2, (3, 2)), ((2, 1), 1, 1, (4, 3))]
    for stride, dilation, groups, sizes in cases:
        weight = torch.randn(4, 4 // groups, *sizes, dtype=torch.float64)
        options = {"stride": stride, "dilation": dilation, "groups": groups}
        plain = functools.partial(functional.conv2d, **options)
        matrix = dense(functools.partial(plain, weight=weight), (4, 18, 18), torch.float64)
        sums = (matrix.mT @ matrix).abs().sum(1).view(4, 18, 18)
        kernel = aol_kernel(weight, **options)
        scaled = dense(functools.partial(plain, weight=kernel), (4, 18, 18), torch.float64)
        inside = torch.zeros(4, 18, 18, dtype=torch.bool)
        inside[:, 6:12, 6:12] = True  # where the border is out of sight
        columns = (inside & (sums > 0)).flatten()
        expected = matrix / sums.flatten().clamp(min=1e-300).sqrt()
        torch.testing.assert_close(scaled[:, columns], expected[:, columns])


@pytest.mark.parametrize("steps", [2, 3])
def test_steps_of_aol_scale_by_roots_of_the_row_sums_of_a_power(steps: int) -> None:
    for stride, dilation, groups, k in ((1, 1, 1, 3), (2, 1, 2, 3), (1, 2, 1, 2), (3, 2, 2, 4)):
        weight = torch.randn(4, 4 // groups, k, dtype=torch.float64)
        weight[: 4 // groups] *= 1e-3  # of the first group, if there are two
        options = {"stride": stride, "dilation": dilation, "groups": groups}
        plain = functools.partial(functional.conv1d, **options)
        matrix = dense(functools.partial(plain, weight=weight), (4, 150), torch.float64)
        power = torch.linalg.matrix_power(matrix.mT @ matrix, 2 ** (steps - 1))
        sums = power.abs().sum(1).view(4, 150)
        kernel = aol_kernel(weight, **options, steps=steps)
        scaled = dense(functools.partial(plain, weight=kernel), (4, 150), torch.float64)
        inside = torch.zeros(4, 150, dtype=torch.bool)
        inside[:, 70:80] = True  # where the border is out of sight
        columns = (inside & (sums > 0)).flatten()
        assert columns.sum() >= 20
        expected = matrix / sums.flatten().clamp(min=1e-300) ** 0.5**steps
        torch.testing.assert_close(scaled[:, columns], expected[:, columns])


# --------------------------------------------------------------------- theorem: orthogonal


@st.composite
def layers(draw: st.DrawFn) -> tuple[type, dict[str, Any], tuple[int, ...]]:
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 2))
    channels = [groups * draw(st.integers(1, 3 if dims > 1 else 5)) for _ in range(2)]
    axis = st.tuples(st.integers(1, 4 - dims // 3), st.integers(1, 3), st.integers(1, 3))
    axes = [draw(axis) for _ in range(dims)]
    axes = [(max(k, s), s, d if math.gcd(s, d) == 1 else 1) for k, s, d in axes]
    kernel_size, stride, dilation = (tuple(values) for values in zip(*axes, strict=True))
    method = "bcop"
    if all(k % s == 0 for k, s, _ in axes):
        method = draw(st.sampled_from(["bcop", "bcop_unshuffle"]))
    odd = [(d * (k - 1)) % 2 for k, _, d in axes]
    assume(max(stride) == 1 or not any(o and s == 1 for o, s in zip(odd, stride, strict=True)))
    rows, columns = (c // groups for c in channels)
    assume(rows * columns * math.prod(stride) > 1)
    # the image, in strides: at least what a pad needs
    least = [-(-d * (k - 1) // (2 * s)) + 1 for k, s, d in axes]
    counts = [n + draw(st.integers(0, 1)) for n in least]
    size = tuple(n if transposed else n * s for n, s in zip(counts, stride, strict=True))
    assume(channels[0] * math.prod(size) <= 400)
    options = {"groups": groups, "dilation": dilation, "bias": False, "method": method}
    kind = (TRANSPOSE if transposed else CONV)[dims]
    arguments = {"in_channels": channels[0], "out_channels": channels[1]}
    arguments |= {"kernel_size": kernel_size, "stride": stride} | options
    return kind, arguments, (channels[0], *size)


@settings(max_examples=40)
@given(drawn=layers(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_all_singular_values_are_one(drawn: Any, dtype: torch.dtype) -> None:
    kind, arguments, shape = drawn
    layer = kind(**arguments, dtype=dtype)
    assert_orthogonal(layer, shape, dtype)
    strides = [s if "Transpose" in kind.__name__ else 1 / s for s in layer.stride]
    output = layer(torch.zeros(1, *shape, dtype=dtype)).shape[1:]
    assert output == (
        layer.out_channels,
        *(round(n * s) for n, s in zip(shape[1:], strides, strict=True)),
    )
    values = circular_convolution_singular_values(
        layer.weight.detach(),
        shape[1:],
        layer.stride,
        layer.dilation,
        layer.groups,
        transposed=layer.transposed,
    )
    assert len(values) == min(math.prod(shape), math.prod(output))
    assert (values - 1).abs().max() <= TOLERANCE[dtype]
    bound = lipschitz_bound(layer, shape)
    assert bound.kind == "exact"
    assert abs(bound.value - 1) <= TOLERANCE[dtype] + 1e-11  # the margin that bounds carry


@pytest.mark.parametrize("c", [64, 96])
def test_wide_layers_are_orthogonal_in_float32(c: int) -> None:
    for stride, kernel_size in ((1, 3), (1, 5), (2, 3), (2, 4)):
        layer = OrthogonalConv2d(c, c, kernel_size, stride)
        values = circular_convolution_singular_values(layer.weight.detach(), 6, stride)
        factors = 2 * (kernel_size - stride)
        assert (values - 1).abs().max() <= (1e-6 if factors <= 6 else 2e-7)


def test_equal_projectors_are_the_worst_case_of_rounding() -> None:
    layer = OrthogonalConv2d(128, 128, 3)
    with torch.no_grad():
        raw(layer)[1].copy_(raw(layer)[1][:1].expand(4, -1, -1, -1))
    values = circular_convolution_singular_values(layer.weight.detach(), 6)
    assert (values - 1).abs().max() <= 1e-6


def test_a_kernel_without_a_gradient_passes_none_on() -> None:
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kernel: Tensor) -> Tensor:
            return torch.ones_like(kernel)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    layer = OrthogonalConv1d(4, 4, 2)
    Constant.apply(layer.weight).sum().backward()
    assert all(tensor.grad is None for tensor in raw(layer))


def test_frequency_response_of_one_dimension_has_the_winding_of_its_ranks() -> None:
    """det K̂ = ± exp(i θ Σ (n - rank)): the connected component, which training cannot leave."""
    for n, rank, k in ((4, None, 3), (5, 1, 4), (3, 0, 3), (3, 3, 3)):
        layer = OrthogonalConv1d(n, n, k, rank=rank, dtype=torch.float64)
        angles = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
        phases = torch.exp(1j * angles[:, None] * torch.arange(k))
        determinant = torch.linalg.det(torch.einsum("oit,wt->woi", layer.weight + 0j, phases))
        turns = (determinant.roll(-1) / determinant).angle().sum() / (2 * math.pi)
        assert round(turns.item()) == (k - 1) * (n - (n // 2 if rank is None else rank))


def test_rank_none_and_all_are_shifts() -> None:
    for rank, tap in ((0, 2), (3, 0)):
        weight = OrthogonalConv1d(3, 3, 3, rank=rank).weight
        others = [t for t in range(3) if t != tap]
        assert (
            (weight[..., others] == 0).all()
            if rank == 0
            else weight[..., others].abs().max() < 1e-6
        )
        torch.testing.assert_close(weight[..., tap] @ weight[..., tap].mT, torch.eye(3))


# ------------------------------------------------------------------ theorem: nonexpansive


@settings(max_examples=40)
@given(
    dims=st.integers(1, 2),
    kernel=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    stride=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    dilation=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    groups=st.integers(1, 2),
    c=st.integers(1, 3),
    method=st.sampled_from(["aol", "rko"]),
    padding=st.sampled_from([0, "same"]),
    mode=st.sampled_from(["circular", "zeros"]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_nonexpansive_layers(
    dims: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    c: int,
    method: Any,
    padding: Any,
    mode: str,
    scale: float,
) -> None:
    axes = list(zip(kernel, stride, dilation, strict=True))[:dims]
    if any(s == 1 and d * (k - 1) % 2 for k, s, d in axes) and max(stride[:dims]) > 1:
        padding = 0  # an even kernel on an axis without stride, beside one with
    layer = NONEXPANSIVE[dims](
        groups * c,
        groups * 2,
        kernel[:dims],
        stride[:dims],
        padding=padding,
        dilation=dilation[:dims],
        groups=groups,
        bias=False,
        padding_mode=mode,
        method=method,
    )
    with torch.no_grad():
        raw(layer)[0].copy_(scale * torch.randn_like(raw(layer)[0]))
    strides_per_image = [-(-(d * (k - 1) + 1) // s) + 1 for k, s, d in axes]
    size = [s * n for n, s in zip(strides_per_image, stride, strict=False)]
    shape = (groups * c, *size)
    if padding == "same":
        assert list(layer(torch.zeros(1, *shape)).shape[2:]) == strides_per_image
    top = singular_values(layer, shape)[0]
    assert top <= 1 + 1e-6
    circle = circular_convolution_norm(
        layer.weight.detach(), shape[1:], layer.stride, layer.dilation, groups
    )
    assert circle <= 1 + 1e-6
    bound = lipschitz_bound(layer, shape)
    assert top <= bound.value * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize("method", ["aol", "rko"])
def test_kernels_shorter_than_the_stride_need_no_padding(method: Any, mode: str) -> None:
    for k, s in ((1, 3), (2, 4), (2, 5)):
        layer = NonexpansiveConv1d(3, 4, k, s, padding_mode=mode, method=method, bias=False)
        assert layer.padding == (0,)
        assert layer(torch.zeros(1, 3, 2 * s)).shape == (1, 4, 2)
        assert singular_values(layer, (3, 2 * s))[0] <= 1 + 1e-6


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (3, 1, 2)]),
    st.integers(1, 5),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.integers(0, 99),
)
def test_steps_of_aol_are_nonexpansive(
    steps: int, geometry: tuple[int, int, int], k: int, scale: float, seed: int
) -> None:
    stride, dilation, groups = geometry
    torch.manual_seed(seed)
    weight = scale * torch.randn(2 * groups, 3, k) * torch.randn(2 * groups, 3, 1).exp()
    kernel = aol_kernel(weight, stride, dilation, groups, steps)
    with torch.no_grad():
        plain = functools.partial(
            functional.conv1d, stride=stride, dilation=dilation, groups=groups, weight=kernel
        )
        matrix = dense(plain, (3 * groups, 36)).double().numpy()
    assert np.linalg.norm(matrix, 2) <= 1 + 1e-6


def test_steps_of_aol_come_close_to_norm_one() -> None:
    """From below by the number of entries of a row, and closer with each step here."""
    for shape in ((16, 16, 3, 3), (8, 2, 5)):
        weight = torch.randn(shape, dtype=torch.float64)
        before = 0.0
        for steps in range(1, 5):
            top = circular_convolution_norm(aol_kernel(weight, steps=steps), 24).item()
            entries = shape[1] * math.prod(2**steps * (k - 1) + 1 for k in shape[2:])
            assert before < top <= 1 + 1e-12
            assert top >= entries ** (-(0.5 ** (steps + 1)))
            before = top
        assert before > 0.9


def test_steps_of_aol_keep_an_orthogonal_start() -> None:
    layer = NonexpansiveConv2d(4, 6, 3, groups=2, bias=False, steps=3)
    assert_orthogonal(layer, (4, 4, 4))
    transposed = NonexpansiveConvTranspose2d(4, 4, 2, stride=2, bias=False, steps=2)
    (raw_weight,) = raw(transposed)
    nn.init.normal_(raw_weight)
    assert singular_values(transposed, (4, 3, 3))[0] <= 1 + 1e-6
    assert torch.equal(transposed.weight, aol_kernel(raw_weight, 2, steps=2))


def test_rko_and_aol_attain_one() -> None:
    """Constant kernels: RKO's overlap factor is no larger than needed, AOL's sums neither."""
    for stride in (1, 2, 4):
        for kernel in (rko_kernel, aol_kernel):
            top = circular_convolution_norm(kernel(torch.ones(1, 1, 4), stride), 8, stride)
            torch.testing.assert_close(top, torch.ones_like(top))


def test_rko_is_orthogonal_if_windows_do_not_overlap() -> None:
    assert_orthogonal(NonexpansiveConv2d(2, 5, 2, 2, bias=False, method="rko"), (2, 4, 4))


def test_aol_starts_orthogonal() -> None:
    assert_orthogonal(NonexpansiveConv2d(4, 6, 3, groups=2, bias=False), (4, 4, 4))


def test_other_padding_is_nonexpansive() -> None:
    """Rows that are left out do no harm to the others; rows that are cut short lose norm."""
    for kind, padding_mode, padding, kept in (
        (OrthogonalConv2d, "circular", 0, True),
        (OrthogonalConv2d, "circular", 1, True),
        (OrthogonalConv2d, "zeros", 0, True),
        (OrthogonalConv2d, "zeros", 1, False),
        (OrthogonalConv2d, "zeros", "same", False),
        (OrthogonalConv2d, "zeros", 4, True),  # no column is cut
        (OrthogonalConvTranspose2d, "zeros", 0, True),
        (OrthogonalConvTranspose2d, "zeros", "same", False),
        (OrthogonalConvTranspose2d, "zeros", 1, False),
    ):
        layer = kind(3, 3, 5, padding=padding, padding_mode=padding_mode, bias=False)
        values = singular_values(layer, (3, 6, 6))
        assert values[0] <= 1 + 1e-6
        assert (values[-1] > 1 - 1e-6) == kept
        assert values[0] <= lipschitz_bound(layer, (3, 6, 6)).value


def test_bound_of_a_stack_is_the_product() -> None:
    net = nn.Sequential(
        OrthogonalConv2d(1, 4, 3),
        NonexpansiveConv2d(4, 4, 3, method="rko"),
        OrthogonalConv2d(4, 8, 4, 2),
        SkewOrthogonalConv2d(8, 8, 3),
        CayleyConv2d(8, 4, 3, 4),
        OrthogonalConvTranspose2d(4, 4, 3, 2),
    )
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(net, (1, 8, 8), p)
        assert bound.value == pytest.approx(math.prod(part.value for part in bound.parts))
        for layer, part in zip(net, bound.parts, strict=True):
            layer.bias = None
            matrix = dense(layer, part.input_shape)
            norm = torch.linalg.matrix_norm(matrix, p)
            assert norm <= part.value * (1 + 1e-6)
            if part.kind == "exact":
                assert norm >= part.value * (1 - 1e-6)
        assert [part.kind for part in bound.parts].count("exact") >= (6 if p == 2 else 5)


# ---------------------------------------------------------------- far from a good start


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("change", ["1e4", "1e-4", "rank one", "equal", "nearly equal", "zero"])
def test_any_raw_parameters_give_a_finite_nonexpansive_kernel(change: str, stride: int) -> None:
    layer = OrthogonalConv2d(6, 6, 3, stride, bias=False)
    with torch.no_grad():
        for tensor in raw(layer):
            if change.startswith("1"):
                tensor.mul_(float(change))
            elif change == "rank one":
                tensor.copy_(
                    torch.randn_like(tensor[..., :1]) * torch.randn_like(tensor[..., :1, :])
                )
            elif change == "equal":
                tensor[..., -1] = tensor[..., 0]
                tensor[..., -1, :] = tensor[..., 0, :]
            elif change == "nearly equal":
                tensor[..., -1] = tensor[..., 0] * (1 + 1e-6 * torch.randn_like(tensor[..., 0]))
            else:
                tensor.zero_()
    weight = layer.weight
    assert weight.isfinite().all()
    values = singular_values(layer, (6, 6, 6))
    assert values[0] <= 1 + 1e-6
    if change.startswith("1"):
        assert values[-1] >= 1 - 1e-6
    weight.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in raw(layer))


@pytest.mark.parametrize(("condition", "dtype"), [(300, torch.float32), (1e4, torch.float64)])
def test_ill_conditioned_raw_parameters_stay_orthogonal(condition: float, dtype: Any) -> None:
    """Of many factors, since products of few in float32 round by more than this."""
    layer = OrthogonalConv1d(64, 64, 8, bias=False, dtype=dtype)
    with torch.no_grad():
        for tensor in raw(layer):  # with one small singular value, the worst case
            U, values, V = torch.linalg.svd(tensor, full_matrices=False)
            values[..., -1] /= condition
            tensor.copy_(U * values[..., None, :] @ V)
    values = circular_convolution_singular_values(layer.weight.detach(), 8)
    off = 64 * 64 * condition**2 * 2.0**-56  # of each of eight matrices
    rounding = TOLERANCE[dtype] / 10
    assert (values - 1).abs().max() <= 8 * (
        off if dtype == torch.float32 else 2 * off**2
    ) + rounding


def test_constant_columns_do_not_break_the_factorisation() -> None:
    """Equal summands round in one direction: the Gram matrix is off by a tenth of m ε trace."""
    for m in (240, 500, 1000, 1990):
        for n in (3, 7, 23):
            columns = torch.randn(n).expand(1, m, n).contiguous()
            kernel = bcop_kernel(columns, torch.randn(1, 1, n, n // 2), (2,))[0].double()
            assert torch.linalg.matrix_norm(kernel.sum(-1), 2) <= 1 + 1e-6
            assert torch.linalg.matrix_norm(kernel.diff().squeeze(-1), 2) <= 1 + 1e-6


FACTORIES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "bcop": (lambda **k: OrthogonalConv2d(4, 4, 3, **k), (4, 6, 6)),
    "bcop, isometry": (lambda **k: OrthogonalConv2d(2, 6, 3, groups=2, **k), (2, 6, 6)),
    "bcop, stride": (lambda **k: OrthogonalConv2d(3, 4, 3, 2, **k), (3, 6, 6)),
    "bcop, unshuffle": (
        lambda **k: OrthogonalConv2d(2, 4, 4, 2, method="bcop_unshuffle", **k),
        (2, 4, 4),
    ),
    "bcop, transposed": (lambda **k: OrthogonalConvTranspose2d(4, 2, 4, 2, **k), (4, 3, 3)),
    "bcop, 1-D": (lambda **k: OrthogonalConv1d(5, 3, 4, dilation=2, **k), (5, 8)),
    "bcop, 3-D": (lambda **k: OrthogonalConv3d(2, 3, (2, 1, 3), **k), (2, 3, 2, 4)),
    "bcop, depthwise": (lambda **k: OrthogonalConv2d(2, 4, 3, groups=2, **k), (2, 4, 4)),
    "rko": (lambda **k: NonexpansiveConv2d(3, 4, 3, method="rko", **k), (3, 6, 6)),
    "aol": (lambda **k: NonexpansiveConv2d(3, 4, 3, method="aol", **k), (3, 6, 6)),
    "soc": (lambda **k: SkewOrthogonalConv2d(3, 4, 3, **k), (3, 6, 6)),
    "cayley": (lambda **k: CayleyConv2d(3, 4, 3, (4, 6), **k), (3, 4, 6)),
    "shift": (lambda **k: ShiftConv2d(3, 6, 2, **k), (3, 4, 6)),
}
every_layer = pytest.mark.parametrize("name", FACTORIES)


def build(name: str, **options: Any) -> tuple[Any, tuple[int, ...]]:
    factory, shape = FACTORIES[name]
    return factory(**options), shape


@every_layer
@pytest.mark.parametrize("optimiser", ["Adam", "SGD"])
def test_constraint_holds_after_25_steps(name: str, optimiser: str) -> None:
    layer, shape = build(name)
    rate = {"Adam": 0.1, "SGD": 1.0}[optimiser]
    optim = getattr(torch.optim, optimiser)(layer.parameters(), lr=rate, weight_decay=1e-3)
    x = torch.randn(4, *shape)
    target = torch.randn_like(layer(x))
    losses = []
    for _ in range(25):
        optim.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer.bias = None
    matrix = dense(layer, shape)
    assert torch.equal(dense(layer.eval(), shape), matrix)
    values = torch.linalg.svdvals(matrix)
    assert values[0] <= 1 + 1e-6
    least = {"rko": 0, "aol": 0, "soc": 1 - 4e-6}.get(name, 1 - 1e-6)
    assert values[-1] >= least
    assert values[0] <= lipschitz_bound(layer, shape).value * (1 + 1e-6)


# ------------------------------------------------------------------------------ gradients


def test_gradients_of_the_kernels() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    check = functools.partial(torch.autograd.gradcheck, check_forward_ad=True)
    twice = torch.autograd.gradgradcheck
    for rows, n, sizes, stride in ((3, 4, (3, 2), 1), (2, 4, (3,), 2), (9, 2, (2, 2), 2)):
        strides = (stride,) * len(sizes)
        seed = leaf(2, rows, n * math.prod(strides))
        projectors = leaf(sum(sizes) - sum(strides), 2, n, n // 2)
        kernel = functools.partial(bcop_kernel, kernel_size=sizes, stride=stride)
        assert check(kernel, (seed, projectors))
    assert twice(lambda s, p: bcop_kernel(s, p, (2, 2)), (leaf(1, 2, 3), leaf(2, 1, 3, 1)))
    assert check(lambda w: rko_kernel(w, 2), leaf(3, 2, 3))
    assert check(lambda w: aol_kernel(w, (2, 1), groups=2), leaf(4, 2, 3, 2))
    assert check(lambda w: aol_kernel(w, 2, groups=2, steps=2), leaf(4, 2, 3))
    assert check(skew_kernel, leaf(2, 2, 3, 3))
    assert check(lambda w: cayley_kernel(w, (4, 3)), leaf(2, 3, 3, 1))


def test_gradient_of_a_projector_is_blind_to_its_basis() -> None:
    """Only the column space counts: Aᵀ ∇ = 0, which keeps AᵀA in place under gradient flow."""
    layer = OrthogonalConv2d(6, 6, 3, bias=False)
    (layer.weight * torch.randn_like(layer.weight)).sum().backward()
    projectors = raw(layer)[1]
    assert projectors.grad.norm() > 1
    assert (projectors.mT @ projectors.grad).abs().max() < 1e-5


def test_float32_gradient_agrees_with_float64() -> None:
    layer = OrthogonalConv2d(8, 8, 3, 2, bias=False)
    twin = copy.deepcopy(layer).double()
    cotangent = torch.randn_like(layer.weight)
    layer.weight.backward(cotangent)
    twin.weight.backward(cotangent.double())
    for single, double in zip(raw(layer), raw(twin), strict=True):
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ life cycle


@every_layer
def test_state_dict_and_deepcopy(name: str) -> None:
    layer, shape = build(name)
    x = torch.randn(2, *shape)
    other, _ = build(name)
    assert not torch.equal(other(x), layer(x)) or name == "aol"
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


@every_layer
def test_functional_call_vmap_and_jacrev(name: str) -> None:
    layer, shape = build(name)
    x = torch.randn(2, *shape)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    torch.testing.assert_close(run(parameters, x), layer(x))
    stacked = {key: torch.stack([value, 2 * value]) for key, value in parameters.items()}
    outputs = torch.func.vmap(run, (0, None))(stacked, x)
    torch.testing.assert_close(outputs[0], layer(x))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return run(parameters, x).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    layer(x).square().sum().backward()
    for key, value in layer.named_parameters():
        torch.testing.assert_close(gradients[key].sum(0), value.grad, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(lambda x: layer(x[None])[0])(x[0])
    forward = torch.func.jacfwd(lambda x: layer(x[None])[0])(x[0])
    torch.testing.assert_close(jacobian, forward, rtol=1e-4, atol=1e-6)


class Each(nn.ModuleList):
    """Layers side by side, an input for each."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self, inputs, strict=True)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
def test_other_geometries_compile_in_one_graph() -> None:
    """Those that test_life_cycle.py does not compile."""
    names = ("isometry", "unshuffle", "1-D", "3-D", "depthwise")
    layers, shapes = zip(*(build(f"bcop, {name}") for name in names), strict=True)
    net, inputs = Each(layers), [torch.randn(2, *shape) for shape in shapes]
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*inputs), net(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = (
        torch.autograd.grad(sum(y.square().sum() for y in outputs), list(net.parameters()))
        for outputs in (found, expected)
    )
    torch.testing.assert_close(*gradients)


@every_layer
def test_autocast_leaves_the_constraint_alone(name: str) -> None:
    layer, shape = build(name)
    weight = layer.weight
    x = torch.randn(2, *shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, weight)
        output = layer(x)
        output.float().square().sum().backward()
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_adjoint_of_bcop_is_on_its_guard_against_autocast() -> None:
    for name in ("bcop", "bcop, isometry", "bcop, stride"):
        layer, _ = build(name)
        cotangent = torch.randn_like(layer.weight)
        expected = torch.autograd.grad(layer.weight, raw(layer), cotangent)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(layer.weight, raw(layer), cotangent)
        assert all(map(torch.equal, found, expected))


@every_layer
def test_other_dtypes(name: str) -> None:
    layer, shape = build(name, dtype=torch.float64, bias=False)
    tolerance = {"rko": 2, "aol": 2, "soc": 4e-6}.get(name, 1e-12)
    values = torch.linalg.svdvals(dense(layer, shape, torch.float64))
    assert (values - 1).abs().max() <= tolerance
    half, _ = build(name, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    twin = copy.deepcopy(half).float()  # the same raw parameters: computed alike, then rounded
    torch.testing.assert_close(half.weight.float(), twin.weight, rtol=2**-8, atol=1e-7)
    half.weight.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.bfloat16 for tensor in raw(half))


def test_reset_parameters_draws_anew() -> None:
    for name in ("bcop", "rko", "aol"):
        layer, _ = build(name)
        before = layer.weight.detach().clone(), layer.bias.detach().clone()
        layer.reset_parameters()
        assert not torch.equal(layer.weight, before[0])
        assert not torch.equal(layer.bias, before[1])
    assert_orthogonal(build("bcop", bias=False)[0], (4, 6, 6))


def test_raw_parameters_start_orthonormal_and_can_all_be_trained() -> None:
    layer = OrthogonalConv2d(6, 6, 3, groups=2, bias=False)
    for tensor in raw(layer):
        gram = tensor.mT @ tensor
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram))
    (layer.weight * torch.randn_like(layer.weight)).sum().backward()
    assert all((tensor.grad != 0).any() for tensor in raw(layer))


def test_depthwise_layers_have_parameters_to_train() -> None:
    """With a stride or with several outputs a channel; otherwise only a shift is orthogonal."""
    for kind, c_out, k, options in (
        (OrthogonalConv2d, 4, 3, {"stride": 2}),
        (OrthogonalConv2d, 4, 4, {"stride": 2, "method": "bcop_unshuffle"}),
        (OrthogonalConv2d, 8, 3, {}),
        (OrthogonalConvTranspose2d, 4, 3, {"stride": 2}),
        (OrthogonalConv1d, 12, 4, {}),
        (NonexpansiveConv2d, 4, 3, {"method": "aol"}),
        (NonexpansiveConv2d, 4, 3, {"method": "rko"}),
    ):
        layer = kind(4, c_out, k, groups=4, bias=False, **options)
        shape = (4, *[4] * layer._dims)
        optim = torch.optim.Adam(layer.parameters(), lr=0.1)
        before = layer.weight.detach()
        for _ in range(5):
            optim.zero_grad()
            (layer.weight * torch.randn_like(layer.weight)).sum().backward()
            assert all((tensor.grad != 0).any() for tensor in raw(layer) if tensor.numel())
            optim.step()
        assert all((layer.weight - before).flatten(1).norm(dim=1) > 0.01)
        if kind is NonexpansiveConv2d:
            assert singular_values(layer, shape)[0] <= 1 + 1e-6
        else:
            assert_orthogonal(layer, shape)


def test_parametrizations_constrain_plain_layers() -> None:
    for constraint in (BCOP((4, 3, 3), 1), RKO(), AOL()):
        layer = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular", bias=False)
        parametrize.register_parametrization(layer, "weight", constraint)
        assert singular_values(layer, (3, 8))[0] <= 1 + 1e-6
        assert lipschitz_bound(layer, (3, 8)).value <= 1 + 1e-6


# ------------------------------------------------------------------------ circular padding


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_circular_pad_and_its_adjoint(dims: int) -> None:
    x = torch.randn(2, 3, *range(4, 4 + dims))
    for pads in (
        [(1, 1)] * dims,
        [(0, 2)] * dims,
        [(3, 0)] * dims,
        [(4, 3)] * dims,
        [(1, 2), (0, 0), (2, 4)][:dims],
    ):
        expected = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode="wrap"))
        padded = circular_pad(x, pads)
        assert torch.equal(padded, expected)
        assert torch.equal(circular_pad(x.clone().requires_grad_(), pads), expected)
        assert torch.equal(circular_pad(x[0], pads), expected[0])
        y = torch.randn_like(padded)
        back = circular_fold(y, pads)
        assert back.shape == x.shape
        torch.testing.assert_close((padded * y).sum(), (x * back).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "k", "stride", "dilation", "before"),
    [
        *[(3, 4, 2, 1, 1), (2, 5, 2, 1, 2), (1, 3, 2, 1, 1), (4, 3, 1, 2, 2)],
        *[(5, 2, 1, 1, 1), (2, 3, 3, 1, 1), (2, 4, 3, 2, 2), (1, 2, 2, 1, 0)],
    ],
)
def test_transposed_on_a_circle_by_its_sum(
    n: int, k: int, stride: int, dilation: int, before: int
) -> None:
    x, weight, bias = torch.randn(2, 4, n, 2), torch.randn(4, 3, k, 3), torch.randn(6)
    expected = bias.view(6, 1, 1).repeat(2, 1, n * stride, 2)
    for i, j, s, t in itertools.product(range(n), range(2), range(k), range(3)):
        row, column = (i * stride + s * dilation - before) % (n * stride), (j + t - 1) % 2
        for group in range(2):
            ins, outs = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
            term = x[:, ins, i, j] @ weight[ins, :, s, t]
            expected[:, outs, row, column] += term
    geometry = ((before, 1), (stride, 1), (dilation, 1), 2)
    torch.testing.assert_close(circular_transpose(x, weight, bias, *geometry), expected)

    def function(*inputs: Tensor) -> Tensor:
        return circular_transpose(*inputs, *geometry)

    inputs = [each.double().requires_grad_() for each in (x[:1], weight, bias)]
    checks: dict[str, Any] = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, **checks)
    assert torch.autograd.gradgradcheck(function, inputs, **checks)


def test_kernel_norm_bound_is_from_above_and_tight_for_constants() -> None:
    for shape in ((4, 3, 3), (3, 8, 3, 2), (2, 2, 2, 2, 2), (5, 4, 1)):
        kernel = torch.randn(shape, dtype=torch.float64)
        assert circular_convolution_norm(kernel, 6) <= kernel_norm_bound(kernel)
        assert kernel_norm_bound(kernel, 0) >= kernel_norm_bound(kernel)
        with torch.autocast("cpu", torch.bfloat16):
            kernel = kernel.float()
            assert circular_convolution_norm(kernel, 6) <= kernel_norm_bound(kernel)
            assert kernel_norm_bound(kernel).dtype == torch.float32
    torch.testing.assert_close(kernel_norm_bound(torch.ones(1, 1, 3, 3)).item(), 9.0)
    assert kernel_norm_bound(torch.zeros(2, 2, 3)) < 1e-6


@pytest.mark.parametrize("method", ["aol", "rko"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"), [(3, 1, 1, 1), (4, 2, 1, 2), (3, 2, 2, 1)]
)
def test_nonexpansive_transposed_convolutions_are_adjoint(
    method: Any, dims: int, kernel: int, stride: int, dilation: int, groups: int
) -> None:
    """On a circle they are the transposes of the layers with the same raw parameter."""
    torch.manual_seed(0)
    options: Any = {"dilation": dilation, "groups": groups, "bias": False, "method": method}
    back = NONEXPANSIVE_TRANSPOSE[dims](4, 2, kernel, stride, dtype=torch.float64, **options)
    layer = NONEXPANSIVE[dims](2, 4, kernel, stride, dtype=torch.float64, **options)
    for size in (1.0, 0.01):
        raw = back.parametrizations.weight.original
        raw.data.normal_().mul_(size)
        layer.parametrizations.weight.original.data.copy_(raw)
        small = 6 if dims == 1 else 3
        shapes = [(4, *[small] * dims), (2, *[small * stride] * dims)]
        matrix = dense(back, shapes[0], torch.float64)
        torch.testing.assert_close(matrix, dense(layer, shapes[1], torch.float64).mT)
        norm = torch.linalg.matrix_norm(matrix, 2).item()
        assert norm <= 1 + 1e-12
        bound = lipschitz_bound(back, shapes[0])
        assert norm * (1 - 1e-12) <= bound.value <= 1 + 1e-12


def test_cut_nonexpansive_transposed_convolutions() -> None:
    """Zero padding cuts the output of torch's own operation."""
    torch.manual_seed(0)
    layer = NonexpansiveConvTranspose2d(4, 2, 3, 2, 1, 1, padding_mode="zeros")
    plain = nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)
    plain.weight.data, plain.bias.data = layer.weight.detach(), layer.bias.detach()
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(layer(x), plain(x))
    layer.bias = None
    assert torch.linalg.matrix_norm(dense(layer, (4, 3, 5), torch.float32), 2) <= 1 + 1e-6
    with pytest.raises(ValueError, match="method must be one of"):
        NonexpansiveConvTranspose2d(4, 2, 3, method="bcop")


# ------------------------------------------------------------------------- SOC and Cayley


def test_truncated_exponential_is_at_most_one_by_rational_arithmetic() -> None:
    """|T_m(iλ)|² - 1 in powers of λ² <= 1: the first term is negative, the others less."""
    for m in (4, 8, 12, 16):
        coefficients = [Fraction(0)] * (m + 1)
        for a, b in itertools.product(range(m + 1), repeat=2):
            if (a + b) % 2 == 0:
                power = (a - b) // 2
                sign = 1 if power % 2 == 0 else -1
                coefficients[(a + b) // 2] += Fraction(sign, math.factorial(a) * math.factorial(b))
        assert coefficients[0] == 1
        assert coefficients[1 : m // 2 + 1] == [0] * (m // 2)
        first, *rest = coefficients[m // 2 + 1 :]
        assert first == Fraction(-2, math.factorial(m) * (m + 2))
        assert sum(max(c, 0) for c in rest) < -first
        loss = 1 - math.sqrt(1 + float(first + sum(min(c, 0) for c in rest)))
        assert loss < {4: 7e-3, 8: 3e-6, 12: 2e-10, 16: 1e-14}[m]


@pytest.mark.parametrize(
    ("c_in", "c_out", "stride", "rank"), [(4, 4, 1, None), (2, 5, 1, 2), (3, 2, 1, 3), (1, 3, 2, 4)]
)
def test_block_reflectors_are_orthogonal_by_their_formula(
    c_in: int, c_out: int, stride: int, rank: int | None
) -> None:
    """The matrix of the layer against I - 2 V (VᵀV)⁻¹ Vᵀ with the matrix of the convolution V."""
    torch.manual_seed(0)
    size = (4 * stride, 5 * stride)
    options: Any = {"stride": stride, "rank": rank, "bias": False, "dtype": torch.float64}
    layer = BlockReflectorConv2d(c_in, c_out, 3, size, **options)
    raw = layer.parametrizations.weight.original.detach()
    columns = nn.Conv2d(raw.shape[1], len(raw), 3, padding=1, padding_mode="circular", bias=False)
    columns.weight.data = raw
    V = dense(columns.double(), (raw.shape[1], 4, 5), torch.float64)
    expected = torch.eye(len(V), dtype=torch.float64) - 2 * V @ torch.linalg.inv(V.mT @ V) @ V.mT
    expected = expected[: c_out * 20, : c_in * stride**2 * 20]
    unshuffle = dense(nn.PixelUnshuffle(stride), (c_in, *size), torch.float64)
    matrix = dense(layer, (c_in, *size), torch.float64)
    torch.testing.assert_close(matrix, expected @ unshuffle, rtol=1e-9, atol=1e-11)
    assert (torch.linalg.svdvals(matrix) - 1).abs().max() < 1e-12
    assert lipschitz_bound(layer, (c_in, *size)).value == pytest.approx(1, abs=1e-12)


def test_block_reflectors_near_a_loss_of_rank() -> None:
    """Two columns that differ by 1e-7: the Gram matrix has the condition number 1e14."""
    torch.manual_seed(0)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64).expand(-1, 2, -1, -1).clone()
    weight[:, 1] += 1e-7 * torch.randn(4, 3, 3, dtype=torch.float64)
    kernel = block_reflector_kernel(weight, 6)
    values = circular_convolution_singular_values(kernel, 6)
    assert (values - 1).abs().max() < 1e-8
    with pytest.raises(ValueError, match="rank must be at most 4, got 5"):
        BlockReflectorConv2d(4, 3, 3, 6, rank=5)
    with pytest.raises(ValueError, match="weight must have no more columns than rows"):
        block_reflector_kernel(torch.ones(2, 3, 1, 1), 4)


@pytest.mark.parametrize("terms", [4, 8, 12])
def test_skew_exponential(terms: int) -> None:
    kernel = skew_kernel(10 * torch.randn(3, 3, 3, 5, dtype=torch.float64))
    pads = [(1, 1), (2, 2)]
    A = dense(lambda x: functional.conv2d(circular_pad(x.double(), pads), kernel), (3, 5, 6))
    assert torch.allclose(A, -A.mT)
    norm = torch.linalg.matrix_norm(A, 2).item()
    assert 0.3 < norm <= 1
    series = dense(lambda x: skew_exponential(x.double(), kernel, terms), (3, 5, 6))
    exact = torch.from_numpy(scipy.linalg.expm(A.numpy()))
    remainder = norm ** (terms + 1) / math.factorial(terms + 1)
    assert torch.linalg.matrix_norm(series - exact, 2) <= remainder * 1.0001 + 1e-14
    assert torch.linalg.matrix_norm(series, 2) <= 1 + 1e-14
    small = torch.randn(3, 3, 3, 3, dtype=torch.float64) * 1e-3
    torch.testing.assert_close(skew_kernel(small), small - small.transpose(0, 1).flip(2, 3))


def test_skew_layer_changes_channels() -> None:
    for c_in, c_out, stride, size in ((3, 7, 1, 5), (7, 3, 1, 5), (2, 8, 2, 6), (2, 5, 2, 6)):
        layer = SkewOrthogonalConv2d(c_in, c_out, 3, stride, bias=False, dtype=torch.float64)
        matrix = dense(layer, (c_in, size, size), torch.float64)
        values = torch.linalg.svdvals(matrix)
        assert len(matrix) == c_out * (size // stride) ** 2
        assert values[0] <= 1 + 1e-14
        assert values[-1] >= 1 - 3e-6


SKEW = ((4, 8, 1, 2, 4), (8, 4, 1, 4, 3), (2, 8, 2, 2, 4), (4, 6, 2, 2, 4), (3, 2, 2, 1, 6))


@pytest.mark.parametrize(("c_in", "c_out", "stride", "groups", "size"), SKEW)
def test_groups_of_a_skew_layer_are_layers(
    c_in: int, c_out: int, stride: int, groups: int, size: int
) -> None:
    """Each group of channels goes through a layer of its own, which has its part of the kernel."""
    geometry: dict[str, Any] = {"stride": stride, "dtype": torch.float64}
    layer = SkewOrthogonalConv2d(c_in, c_out, 3, groups=groups, **geometry)
    parts = [
        SkewOrthogonalConv2d(c_in // groups, c_out // groups, 3, **geometry) for _ in range(groups)
    ]
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw[: len(raw) // groups] *= 9  # groups of different norms
        layer.bias.normal_()
        for part, own, bias in zip(parts, raw.chunk(groups), layer.bias.chunk(groups), strict=True):
            part.parametrizations.weight.original.copy_(own)
            part.bias.copy_(bias)
    x = torch.randn(2, c_in, size, size + stride, dtype=torch.float64)
    expected = [part(own) for part, own in zip(parts, x.chunk(groups, 1), strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(expected, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("c_in", "c_out", "stride", "groups", "size"), SKEW)
def test_a_transposed_skew_layer_is_the_transposed_matrix(
    c_in: int, c_out: int, stride: int, groups: int, size: int
) -> None:
    geometry: dict[str, Any] = {"stride": stride, "groups": groups, "dtype": torch.float64}
    layer = SkewOrthogonalConv2d(c_in, c_out, 3, bias=False, **geometry)
    adjoint = SkewOrthogonalConvTranspose2d(c_out, c_in, 3, **geometry)
    adjoint.parametrizations.weight.original.data = layer.parametrizations.weight.original.data
    shape = (c_out, size // stride, size // stride)
    with torch.no_grad():
        adjoint.bias.normal_()
    at_zero = adjoint(torch.zeros(1, *shape, dtype=torch.float64)).detach()
    torch.testing.assert_close(at_zero, adjoint.bias.detach().view(1, -1, 1, 1).expand_as(at_zero))
    adjoint.bias = None
    matrix = dense(adjoint, shape, torch.float64)
    torch.testing.assert_close(
        matrix, dense(layer, (c_in, size, size), torch.float64).mT, rtol=0, atol=1e-14
    )
    values = torch.linalg.svdvals(matrix)
    assert values[0] <= 1 + 1e-14
    assert values[-1] >= 1 - 3e-6
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(adjoint, shape, p)
        assert bound.value == pytest.approx(torch.linalg.matrix_norm(matrix, p).item(), abs=1e-9)


@pytest.mark.parametrize(
    ("n", "c_in", "c_out", "size", "k", "terms"),
    [
        (5, 5, 5, (4, 5), 3, 8),
        (6, 6, 1, (5, 4), 3, 8),
        (6, 1, 6, (2, 3), 5, 4),
        (4, 3, 4, (1, 6), 1, 12),
        (4, 4, 4, (3, 1), 3, 4),
    ],
)
def test_series_in_frequencies_is_the_series_with_its_derivatives(
    n: int, c_in: int, c_out: int, size: tuple[int, int], k: int, terms: int
) -> None:
    torch.manual_seed(0)
    raw = torch.randn(n, n, k, k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, c_in, *size, dtype=torch.float64, requires_grad=True)

    def by_powers(x: Tensor, raw: Tensor) -> Tensor:
        """Sum of powers of the matrix of the convolution, one column after the other."""
        kernel = skew_kernel(raw)
        pixels = torch.eye(n * math.prod(size), dtype=torch.float64).view(-1, n, *size)
        for axis, length in enumerate(size):  # around the circle more than once
            taps = torch.arange(length + 2 * (k // 2)) - k // 2
            pixels = pixels.index_select(axis + 2, taps % length)
        A = functional.conv2d(pixels, kernel).flatten(1).mT
        start = functional.pad(x, (0, 0, 0, 0, 0, n - c_in)).flatten(1)
        result = sum(
            start @ torch.linalg.matrix_power(A.mT, j) / math.factorial(j) for j in range(terms + 1)
        )
        return torch.as_tensor(result).view(-1, n, *size)[:, :c_out]

    def in_frequencies(x: Tensor, raw: Tensor) -> Tensor:
        return skew._in_frequencies(x, skew_kernel(raw), terms, c_out)

    expected, found = by_powers(x, raw), in_frequencies(x, raw)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, raw), direction)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, raw), direction), gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    if size == (4, 5):
        assert torch.autograd.gradgradcheck(in_frequencies, (x, raw), fast_mode=True)
        tangent = torch.func.jvp(in_frequencies, (x, raw), (x, raw))[1]
        torch.testing.assert_close(tangent, torch.func.jvp(by_powers, (x, raw), (x, raw))[1])


def test_spectrum_is_an_isometry_and_its_transpose_the_way_back() -> None:
    torch.manual_seed(0)
    for size in ((4, 6), (5, 3), (1, 2), (2, 1)):
        x = torch.randn(3, 2, *size, dtype=torch.float64)
        values = spectrum(x)
        torch.testing.assert_close(values.norm(), x.norm())
        torch.testing.assert_close(images_of(values, size), x)
        z = torch.randn_like(values)
        left = torch.view_as_real(spectrum(x)).flatten() @ torch.view_as_real(z).flatten()
        torch.testing.assert_close(left, x.flatten() @ images_of(z, size).flatten())
    each = torch.func.vmap(lambda y: images_of(spectrum(y), (2, 1)))(x.expand(4, -1, -1, -1, -1))
    torch.testing.assert_close(each, x.expand(4, -1, -1, -1, -1))


def test_only_training_on_a_large_batch_takes_frequencies() -> None:
    torch.manual_seed(0)
    layer, x = SkewOrthogonalConv2d(8, 8, 3).double(), torch.randn(16, 8, 6, 6).double()
    taken = []
    in_frequencies = skew._in_frequencies

    def recorded(*arguments: Any) -> Tensor:
        taken.append(True)
        return in_frequencies(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skew, "_in_frequencies", recorded)
        y = layer(x)
        assert taken == [True]
        with torch.no_grad():
            again = layer(x)
        small = layer(x[:1])
        with pytest.raises(ValueError, match="at most the size"):
            SkewOrthogonalConv2d(8, 8, 5).double()(x[..., :1])
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        evaluated = layer.eval()(x)
        assert taken == [True]
    torch.testing.assert_close(y, again, rtol=0, atol=1e-14)
    torch.testing.assert_close(y[:1], small, rtol=0, atol=1e-14)
    parameters = tuple(layer.parameters())
    direction = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, parameters, direction),
        torch.autograd.grad(evaluated, parameters, direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_cayley_of_a_single_tap_is_the_cayley_transform() -> None:
    weight = torch.randn(4, 4, 1, 1, dtype=torch.float64)
    A = (weight - weight.transpose(0, 1))[..., 0, 0]
    kernel = cayley_kernel(weight, (3, 2))
    expected = torch.linalg.solve(torch.eye(4) + A, torch.eye(4) - A)
    torch.testing.assert_close(kernel[..., 0, 0], expected)
    assert kernel.flatten(2)[..., 1:].abs().max() < 1e-14


def test_cayley_is_orthogonal_and_local() -> None:
    for c_in, c_out, stride, size in ((3, 5, 1, (5, 4)), (5, 3, 1, (4, 7)), (2, 6, 2, (6, 4))):
        layer = CayleyConv2d(c_in, c_out, 2, size, stride, bias=False, dtype=torch.float64)
        values = torch.linalg.svdvals(dense(layer, (c_in, *size), torch.float64))
        assert (values - 1).abs().max() <= 1e-13
    weight = CayleyConv2d(4, 4, 3, 16).weight.detach()
    energy = weight.square().sum((0, 1))
    assert energy[0, 0] > 10 * energy[8, 8]  # around the pixel itself


def test_cayley_is_the_formula_at_each_frequency() -> None:
    weight, size = torch.randn(3, 2, 3, dtype=torch.float64), 5
    kernel = cayley_kernel(weight, size)
    taps = torch.tensor([-1, 0, 1])
    for j in range(size):
        angle = torch.tensor(-2j * math.pi * j / size, dtype=torch.complex128)
        response = (weight * torch.exp(angle * taps)).sum(2)
        U, V = response[:2], response[2:]
        M = U - U.mH + V.mH @ V
        inverse = torch.linalg.inv(torch.eye(2) + M)
        expected = torch.cat([(torch.eye(2) - M) @ inverse, -2 * V @ inverse])
        found = (kernel * torch.exp(angle * torch.arange(size))).sum(2)
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------- shifts


def naive_shift(x: np.ndarray, offsets: Sequence[Sequence[int]]) -> np.ndarray:
    y, groups = np.full_like(x, np.nan), np.array_split(np.arange(x.shape[1]), len(offsets))
    for channels, offset in zip(groups, offsets, strict=True):
        for place in itertools.product(*map(range, x.shape[2:])):
            source = tuple((i - o) % n for i, o, n in zip(place, offset, x.shape[2:], strict=True))
            y[(slice(None), channels, *place)] = x[(slice(None), channels, *source)]
    return y


@given(st.data())
def test_channels_move_and_keep_all_norms(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    offset = st.tuples(*(st.integers(-5, 5) for _ in size))
    offsets = data.draw(st.lists(offset, min_size=1, max_size=4))
    x = torch.randn(2, data.draw(st.integers(len(offsets), 7)), *size)
    y = channel_shift(x, offsets)
    np.testing.assert_array_equal(y, naive_shift(x.numpy(), offsets))
    for p in (1, 2, math.inf):
        assert y.double().flatten().norm(p).item() == pytest.approx(x.double().flatten().norm(p))
    back = channel_shift(y, [[-o for o in offset] for offset in offsets])
    assert torch.equal(back, x)


@pytest.mark.parametrize(
    ("c_in", "c_out", "stride", "size"), [(5, 6, 1, (3, 4)), (6, 5, 1, (1, 3)), (2, 7, 2, (4, 6))]
)
def test_a_shift_convolution_mixes_then_moves(
    c_in: int, c_out: int, stride: int, size: tuple[int, int]
) -> None:
    layer = ShiftConv2d(c_in, c_out, stride, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, c_in, *size, dtype=torch.float64)
    with torch.no_grad():
        found, weight, bias = layer(x), layer.weight.numpy(), layer.bias.numpy()
    h, w = (n // stride for n in size)
    mixed = np.zeros((2, c_out, h, w))
    for i, j in itertools.product(range(h), range(w)):
        window = x[:, :, stride * i : stride * (i + 1), stride * j : stride * (j + 1)]
        mixed[:, :, i, j] = window.reshape(2, -1).numpy() @ weight.T
    moved = naive_shift(mixed, [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)])
    np.testing.assert_allclose(found, moved + bias[:, None, None], atol=1e-12)
    layer.bias = None
    matrix = dense(layer, x.shape[1:], torch.float64)
    assert (torch.linalg.svdvals(matrix) - 1).abs().max() <= 1e-13
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(layer, x.shape[1:], p)
        assert bound.kind == "exact"
        assert bound.value == pytest.approx(np.linalg.norm(matrix, p))


def keeps_norms(taps: Sequence[Any], size: int) -> bool:
    """Whether a circulant matrix with these numbers in a row is orthogonal, with no rounding."""
    circle = [*taps, *[0] * (size - len(taps))]
    rows = [circle[-t:] + circle[:-t] for t in range(size)]
    gram = [[sum(map(operator.mul, a, b)) for b in rows] for a in rows]
    return gram == np.eye(size).tolist()


def test_only_shifts_keep_norms_on_large_circles() -> None:
    numbers = {Fraction(a, 3) for a in range(-3, 4)}
    found = {
        size: {taps for taps in itertools.product(numbers, repeat=3) if keeps_norms(taps, size)}
        for size in (3, 5, 6)
    }
    assert len(found[5]) == 6
    assert all(sorted(map(abs, taps)) == [0, 0, 1] for taps in found[5])
    assert found[6] == found[5]
    assert (Fraction(2, 3), Fraction(2, 3), Fraction(-1, 3)) in found[3] - found[5]
    kernel = torch.tensor([[[2.0, 2.0, -1.0]]]) / 3
    values = circular_convolution_singular_values(kernel, 3)
    assert (values - 1).abs().max() < 1e-6
    assert (circular_convolution_singular_values(kernel, 5) - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "offsets must be one or more sequences of 2 integers"),
        ([(0, 1), (1,)], "offsets must be one or more sequences of 2 integers"),
        ([(0, 0.5)], "offsets must be one or more sequences of 2 integers"),
        ([(0, 0)] * 4, "offsets"),
    ],
)
def test_shifts_refuse_other_offsets(offsets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_shift(torch.zeros(1, 3, 2, 2), offsets)
    with pytest.raises(ValueError, match=message):
        ShiftConv2d(3, 3, offsets=offsets)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrthogonalConv2d(3, 3, 2, 3), "kernel_size must be at least stride"),
        (lambda: OrthogonalConv2d(3, 3, 3, 2, method="bcop_unshuffle"), "multiple of stride"),
        (lambda: OrthogonalConv2d(8, 8, 3, groups=8), "groups must leave more than one channel"),
        (lambda: OrthogonalConv1d(1, 1, 3), "groups must leave more than one channel"),
        (lambda: BCOP((4, 3, 3), groups=3), "groups must divide the 4 channels"),
        (lambda: rko_kernel(torch.zeros(4, 3, 3), groups=3), "groups must divide the 4 channels"),
        (lambda: aol_kernel(torch.zeros(4, 3, 3), groups=0), "groups must divide the 4 channels"),
        (lambda: rko_kernel(torch.zeros(4, 3)), "weight must be a real floating-point kernel"),
        (lambda: aol_kernel(torch.zeros(4, 3)), "weight must be a real floating-point kernel"),
        (lambda: OrthogonalConv1d(4, 5, 5, 2, dilation=2), "stride and dilation"),
        (lambda: OrthogonalConv1d(4, 4, 3, rank=5), "rank must be between 0 and the 4"),
        (lambda: OrthogonalConv1d(4, 4, 3, rank=-1), "rank must be"),
        (lambda: OrthogonalConv2d(3, 3, 3, method="rko"), "method must be one of"),
        (lambda: NonexpansiveConv2d(3, 3, 3, method="bcop"), "method must be one of"),
        (lambda: NonexpansiveConv2d(3, 3, 3, steps=0), "steps must be at least 1, got 0"),
        (
            lambda: NonexpansiveConvTranspose2d(3, 3, 3, method="rko", steps=2),
            "steps must be 1 with method 'rko', got 2",
        ),
        (lambda: OrthogonalConv2d(3, 3, 3, padding_mode="reflect"), "padding_mode must be"),
        (lambda: NonexpansiveConv1d(3, 3, 3, padding_mode="replicate"), "padding_mode must be"),
        (
            lambda: OrthogonalConvTranspose2d(3, 3, 3, padding_mode="reflect"),
            "padding_mode must be",
        ),
        (lambda: OrthogonalConv2d(3, 3, 3, padding=2), "padding must be at most half"),
        (lambda: OrthogonalConv2d(3, 3, 3, padding="full"), "padding must be 'same', 'valid'"),
        (lambda: OrthogonalConv2d(3, 3, (2, 2), (1, 2)), "padding='same' needs an odd kernel"),
        (lambda: OrthogonalConv2d(3, 3, (3, 3, 3)), "kernel_size must be one or 2 integers"),
        (lambda: OrthogonalConv2d(3, 3, 3, (1, 0)), "stride must be one or 2 integers"),
        (lambda: OrthogonalConv2d(3, 3, 3, dilation=1.5), "dilation must be"),
        (lambda: OrthogonalConv2d(3, 3, 3, padding=-1), "padding must be one or 2 integers >= 0"),
        (lambda: OrthogonalConvTranspose2d(3, 3, 3, padding=0), "padding must be 'same' and"),
        (lambda: OrthogonalConvTranspose2d(3, 3, 3, 2, output_padding=1), "output_padding 0"),
        (
            lambda: OrthogonalConvTranspose2d(3, 3, 2, padding_mode="zeros"),
            "padding must be integers",
        ),
        (lambda: SkewOrthogonalConv2d(3, 3, 2), "kernel_size must be odd, .*, got 2"),
        (lambda: SkewOrthogonalConvTranspose2d(3, 3, 4), "kernel_size must be odd, .*, got 4"),
        (lambda: SkewOrthogonalConv2d(4, 3, 3, groups=2), "groups must divide in_channels 4 and"),
        (
            lambda: SkewOrthogonalConvTranspose2d(3, 4, 3, groups=2),
            "groups must divide in_channels",
        ),
        (lambda: skew_kernel(torch.ones(4, 4, 3, 3), 2), r"must be \(n, n / 2, \*k\) with odd"),
        (lambda: SkewOrthogonalConv2d(3, 3, 3, terms=6), "terms must be a positive multiple of 4"),
        (lambda: skew_exponential(torch.zeros(1, 2, 4), torch.zeros(2, 2, 3), 0), "terms must be"),
        (lambda: skew_kernel(torch.zeros(2, 3, 3)), "weight must be"),
        (lambda: ShiftConv2d(5, 5, method="gram"), "method must be one of"),  # type: ignore[arg-type]
        (lambda: CayleyConv2d(3, 3, 3, 8, stride=3), "image_size must be a multiple"),
        (lambda: CayleyConv2d(3, 3, 3, 4, stride=2), "image_size must be a multiple"),
        (lambda: CayleyConv2d(3, 3, 3, 8)(torch.zeros(1, 3, 8, 9)), "image size"),
        (lambda: cayley_kernel(torch.zeros(2, 2, 3), 2), "image_size must be at least"),
        (lambda: block_convolution(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)), "outer and inner"),
        (lambda: block_convolution(torch.zeros(2, 3), torch.zeros(3, 3)), "outer and inner"),
        (
            lambda: block_convolution(torch.zeros(3, 2, 1), torch.zeros(4, 2, 1), groups=2),
            "groups must divide the 3 channels",
        ),
        (
            lambda: bcop_kernel(torch.zeros(1, 4, 4), torch.zeros(3, 1, 4, 2), (3,)),
            "seed and projectors must have shapes",
        ),
        (
            lambda: bcop_kernel(torch.zeros(1, 4, 5), torch.zeros(2, 1, 4, 2), (3,)),
            "seed and projectors must have shapes",
        ),
        (
            lambda: bcop_kernel(torch.zeros(1, 4, 8), torch.zeros(0, 1, 4, 2), (1,), 2),
            "seed and projectors must have shapes",
        ),
        (lambda: circular_pad(torch.zeros(3), [(4, 0)]), "pads must be at most the size 3"),
        (lambda: circular_fold(torch.zeros(5), [(4, 0)]), "pads must be at most the size 1"),
        (
            lambda: OrthogonalConv2d(3, 3, 3, 2)(torch.zeros(1, 3, 5, 6)),
            "input must have a size that stride divides",
        ),
        (
            lambda: OrthogonalConv1d(2, 2, 3, dilation=5)(torch.zeros(1, 2, 4)),
            "pads must be at most the size 4",
        ),
    ],
)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weight_cannot_be_assigned() -> None:
    layer = OrthogonalConv2d(3, 3, 3)
    with pytest.raises(NotImplementedError, match="weight cannot be assigned"):
        layer.weight = torch.zeros(3, 3, 3, 3)


def test_a_redefined_forward_needs_a_rule_of_its_own() -> None:
    class Twice(OrthogonalConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(TypeError, match="forward is redefined"):
        lipschitz_bound(Twice(3, 3, 3), (3, 4, 4))


def test_names() -> None:
    assert all(hasattr(convolutions, name) for name in convolutions.__all__)


@pytest.mark.parametrize(
    "shape", [(8, 4, 3, 3), (16, 4, 4, 4), (3, 4, 3, 3), (8, 4, 2, 2), (4, 4, 5)]
)
@pytest.mark.parametrize(
    ("stride", "dilation", "groups"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1), (2, 1, 4), (4, 2, 1)],
)
def test_aol_starts_where_it_can_learn(
    shape: tuple[int, ...], stride: int, dilation: int, groups: int
) -> None:
    """No column of zeros, whose scale has no derivative."""
    channels, inputs, *sizes = shape
    if channels % groups:
        return
    kind = NonexpansiveConv2d if len(sizes) == 2 else NonexpansiveConv1d
    padding = dilation * (sizes[0] - 1) // 2
    layer = kind(inputs, channels, sizes[0], stride, padding, dilation, groups, bias=False)
    x = torch.randn(16, inputs, *[12] * len(sizes))
    layer(x).square().mean().backward()
    (original,) = raw(layer)
    assert original.grad is not None
    assert original.grad.norm() < 100
    assert singular_values(layer, (inputs, *[12] * len(sizes)))[0] <= 1 + 1e-6


def test_aol_with_a_stride_starts_orthogonal() -> None:
    layer = NonexpansiveConv2d(3, 12, 3, stride=2, bias=False)
    assert_orthogonal(layer, (3, 6, 6))


def test_aol_at_zero_has_a_finite_gradient() -> None:
    weight = torch.zeros(4, 3, 3, 3, requires_grad=True)
    for steps in (1, 3):
        aol_kernel(weight, steps=steps).sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().max() < 1e8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_at_any_scale(dtype: torch.dtype) -> None:
    """Judged by the same map at scale 1, which other tests judge."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, 3, 3, generator=generator, dtype=dtype)
    most = 100 if dtype == torch.float32 else 500
    for power in (-most, -most // 2, most // 2, most):
        factor = 2.0**power
        scaled = (weight * factor).requires_grad_()
        torch.testing.assert_close(rko_kernel(scaled), rko_kernel(weight))
        torch.testing.assert_close(aol_kernel(scaled), aol_kernel(weight))
        torch.testing.assert_close(aol_kernel(scaled, steps=4), aol_kernel(weight, steps=4))
        torch.testing.assert_close(kernel_norm_bound(scaled) / factor, kernel_norm_bound(weight))
        if power > 0:
            torch.testing.assert_close(skew_kernel(scaled), skew_kernel(32 * weight))
        else:
            bare = weight - weight.transpose(0, 1).flip(2, 3)
            torch.testing.assert_close(skew_kernel(scaled) / factor, bare)
        kernels = (rko_kernel(scaled), aol_kernel(scaled), skew_kernel(scaled))
        sum(kernel.square().sum() for kernel in kernels).backward()
        assert scaled.grad is not None
        assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize(
    ("channels", "size", "stride", "dilation"),
    [((4, 4), 3, 2, 2), ((5, 2), 3, 2, 2), ((3, 6), 3, 4, 2), ((4, 2), 1, 3, 3), ((2, 4), 5, 4, 2)],
)
def test_stride_and_dilation_with_a_common_divisor(
    channels: tuple[int, int], size: int, stride: int, dilation: int, padding_mode: str
) -> None:
    inputs, outputs = channels
    layer = OrthogonalConv1d(
        inputs, outputs, size, stride, dilation=dilation, padding_mode=padding_mode, bias=False
    )
    for length in (4 * stride, 6 * stride):
        values = singular_values(layer, (inputs, length))
        assert values[0] <= 1 + 1e-6
        if padding_mode == "circular":
            assert len(values) == outputs * length // stride
            assert values[-1] >= 1 - 1e-6
        assert lipschitz_bound(layer, (inputs, length)).value >= values[0] - 1e-6


def test_a_common_divisor_keeps_gradients_of_transposed_convolutions() -> None:
    layer = OrthogonalConvTranspose1d(4, 5, 3, stride=2, dilation=2, bias=False)
    values = singular_values(layer, (4, 6))
    assert abs(values - 1).max() <= 1e-6
    plane = OrthogonalConv2d(4, 4, 3, stride=2, dilation=2, bias=False)
    assert_orthogonal(plane, (4, 8, 8))


def test_pixels_that_are_lost_are_named() -> None:
    with pytest.raises(ValueError, match=r"no common divisor.*8 a group, .*got 9"):
        OrthogonalConv2d(8, 9, 3, stride=2, dilation=2)
    for kind, size in ((OrthogonalConvTranspose2d, 2), (OrthogonalConvTranspose1d, (2,))):
        with pytest.raises(ValueError, match=r"kernel_size must be at least stride.*never written"):
            kind(8, 16, size, stride=3)
    with pytest.raises(ValueError, match="kernel_size must be at least stride"):
        OrthogonalConv2d(8, 16, 2, stride=3)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (7, {"kernel_size": 3}),
        (4, {"kernel_size": 7}),
        (9, {"kernel_size": 3, "dilation": 3}),
        (6, {"kernel_size": 4, "padding": 1}),
        (12, {"kernel_size": 4, "padding": 4, "dilation": 3}),
        (6, {"kernel_size": 5, "padding": "valid"}),
    ],
)
def test_symmetric_padding_keeps_rko_nonexpansive(size: int, options: dict[str, Any]) -> None:
    """Against NumPy's padding and singular values; in one axis with a kernel that meets it."""
    layer = NonexpansiveConv1d(
        2, 5, **options, padding_mode="symmetric", bias=False, method="rko"
    ).double()
    plain = NonexpansiveConv1d(2, 5, **options, padding_mode="zeros", bias=False, method="rko")
    plain = plain.double()
    plain.load_state_dict(layer.state_dict())
    pads = layer._pads[0]
    (x,) = np.random.default_rng(0).normal(size=(1, 3, 2, size))
    padded = np.pad(x, ((0, 0), (0, 0), pads), mode="symmetric")
    reached = nn.functional.conv1d(torch.from_numpy(padded), plain.weight, dilation=plain.dilation)
    torch.testing.assert_close(layer(torch.from_numpy(x)), reached)
    eye = torch.eye(2 * size, dtype=torch.float64).view(-1, 2, size)
    matrix = layer(eye).detach().flatten(1).T.numpy()
    for p, norm in ((1, 1), (2, 2), (math.inf, np.inf)):
        assert np.linalg.norm(matrix, norm) <= lipschitz_bound(layer, (2, size), p).value
    assert np.linalg.norm(matrix, 2) <= 1 + 1e-12
    assert lipschitz_bound(layer, (2, size)).value <= 1 + 1e-9


def test_symmetric_padding_reads_each_pixel_as_often_as_the_kernel_is_long() -> None:
    """All taps 1 / 3: each output is a mean of three, and constants keep their norm: it is 1."""
    layer = NonexpansiveConv1d(1, 1, 3, padding_mode="symmetric", bias=False, method="rko")
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(1.0)
    torch.testing.assert_close(layer.weight.flatten(), torch.full((3,), 1 / 3))
    torch.testing.assert_close(layer(torch.ones(1, 1, 8)), torch.ones(1, 1, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "aol"}, "but for method 'rko'"),
        ({"method": "rko", "stride": 2}, "without a stride"),
        ({"method": "rko", "kernel_size": 4}, "for an even kernel with symmetric padding"),
        ({"method": "rko", "padding": 2}, "must be at most half"),
    ],
)
def test_symmetric_padding_is_refused_where_it_expands(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NonexpansiveConv1d(2, 2, **{"kernel_size": 3, "padding_mode": "symmetric"} | options)
    with pytest.raises(ValueError, match="padding_mode must be"):
        OrthogonalConv2d(2, 2, 3, padding_mode="symmetric")
    layer = NonexpansiveConv1d(2, 2, 7, padding_mode="symmetric", method="rko")
    with pytest.raises(ValueError, match="at least as large as its padding"):
        layer(torch.zeros(1, 2, 2))
