"""Tests of lipbook.norms: definition, theorem, tightness, errors.

The oracles are outside the library: loops over the definition in NumPy, dense float64 singular
values of the matrix that torch's own layer applies to the identity, Lanczos on torch's layers, and
numbers on paper.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.autograd import gradcheck

from lipbook import norms
from lipbook.norms import (
    axes,
    circular_convolution_gram_iteration,
    circular_convolution_norm,
    circular_convolution_singular_values,
    convolution_norm_bound,
    convolution_norm_is_exact,
    convolutions,
    dual_exponent,
    geometry,
    gram_iteration,
    operator_norm,
    power_iteration,
    responses,
    rigorous_convolution_norm,
)

INF = math.inf
EPS = torch.finfo(torch.float64).eps
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
exponents = st.one_of(st.sampled_from([1.0, 2.0, INF]), st.floats(1, 10))


def tolerance(m: int, n: int, taps: int = 1) -> float:
    """Relative rounding of the norm of an m × n operator, the margin of the bounds included."""
    return 16 * EPS * (m + n + taps) * max(min(m, n), taps)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor | float, tol: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    assert float((actual - expected).abs().max()) <= tol * float(expected.abs().max())


# ------------------------------------------------------------------------------- matrices


@given(exponents)
def test_dual_exponent_is_the_hoelder_conjugate(p: float) -> None:
    q = dual_exponent(p)
    assert 1 / p + 1 / q == pytest.approx(1, abs=1e-15)
    assert dual_exponent(q) == pytest.approx(p, rel=1e-12) or p > 1e6 or q > 1e6


@given(seeds, st.integers(1, 6), st.integers(1, 6), exponents, scales, dtypes)
def test_operator_norm_from_1_is_attained_at_a_basis_vector(
    seed: int, m: int, n: int, q: float, scale: float, dtype: torch.dtype
) -> None:
    A = normal(seed, m, n, dtype=dtype) * scale
    columns = A.double().numpy() @ np.eye(n)
    by_definition = max(np.linalg.norm(column, q) for column in columns.T)
    assert_close(operator_norm(A, 1, q), by_definition, tolerance(m, n))


@given(seeds, st.integers(1, 6), st.integers(1, 6), exponents, scales, dtypes)
def test_operator_norm_to_infinity_is_attained_at_a_dual_vector(
    seed: int, m: int, n: int, p: float, scale: float, dtype: torch.dtype
) -> None:
    A = normal(seed, m, n, dtype=dtype).double().numpy() * scale
    stretch = []
    for row in A:  # x with x . row = |x|_p |row|_{p*}, the case of equality in Hölder
        if p == 1:
            x = np.eye(n)[np.abs(row).argmax()]
        else:
            x = np.sign(row) * (np.abs(row) / np.abs(row).max()) ** (1 / (p - 1))
        stretch.append(np.abs(A @ x).max() / np.linalg.norm(x, p))
    # A large exponent 1 / (p - 1) amplifies the rounding of its base.
    tol = tolerance(m, n) * (1 if p == 1 else max(1, 1 / (p - 1)))
    if p == 1 or p > 1.01:
        assert_close(operator_norm(torch.from_numpy(A), p, INF), max(stretch), tol)


@given(seeds, st.integers(1, 8), st.integers(1, 8), scales)
def test_operator_norm_agrees_with_numpy(seed: int, m: int, n: int, scale: float) -> None:
    A = normal(seed, m, n) * scale
    for p in (1, 2, INF):
        assert_close(operator_norm(A, p), np.linalg.norm(A.numpy(), p), tolerance(m, n))
    assert_close(operator_norm(A, 1, INF), np.abs(A.numpy()).max(), 0)


@given(seeds, st.integers(1, 6), st.integers(1, 6), exponents, st.booleans())
def test_operator_norm_bounds_every_vector(
    seed: int, m: int, n: int, r: float, from_one: bool
) -> None:
    p, q = (1.0, r) if from_one else (r, INF)
    A, x = normal(seed, m, n), normal(seed + 1, n, 50)
    stretch = torch.linalg.vector_norm(A @ x, q, 0) / torch.linalg.vector_norm(x, p, 0)
    assert bool((stretch <= operator_norm(A, p, q) * (1 + tolerance(m, n))).all())


@given(seeds, exponents)
def test_operator_norm_of_the_transpose_is_the_dual_norm(seed: int, q: float) -> None:
    A = normal(seed, 3, 5)
    dual = operator_norm(A.mT, dual_exponent(q), INF)
    assert_close(operator_norm(A, 1, q), dual, 1e-12 * max(1, min(q, 10)))


def test_operator_norm_on_paper() -> None:
    A = torch.tensor([[3.0, 0.0], [4.0, -5.0]])
    pairs = [(1, 1), (1, 2), (1, INF), (2, INF), (INF, INF), (2, 2)]
    expected = [7.0, 5.0, 5.0, math.sqrt(41), 9.0, math.sqrt(45)]
    for (p, q), value in zip(pairs, expected, strict=True):
        assert operator_norm(A, p, q).item() == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("pq", [(1, 1), (1, 2), (2, 2), (3, INF)])
def test_matrix_norms_are_batched(pq: tuple[float, float]) -> None:
    A = normal(0, 2, 3, 4, 5)
    one_by_one = torch.stack([operator_norm(a, *pq) for a in A.flatten(0, 1)]).unflatten(0, (2, 3))
    assert_close(operator_norm(A, *pq), one_by_one, 1e-15)


@pytest.mark.parametrize(
    ("p", "q", "name"),
    [
        (INF, 1, "∞→1 norm, which is refused: it is NP-hard"),
        (INF, 2, "∞→2 norm, which is refused: it is NP-hard"),
        (2, 1, "2→1 norm, which is refused: it is NP-hard"),
        (3, 3, "3→3 norm, which is refused: it is NP-hard"),
        (1.5, None, "1.5→1.5 norm, which is refused: it is NP-hard"),
        (4, 2, "4→2 norm, which is refused: it is NP-hard"),
        (2, 4, "2→4 norm, which is refused: no polynomial algorithm"),
    ],
)
def test_hard_norms_are_refused_by_name(p: float, q: float | None, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        operator_norm(torch.eye(3), p, q)


@given(
    seeds, st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), scales, dtypes, st.booleans()
)
def test_gram_iteration_is_never_below_and_within_its_factor(
    seed: int, m: int, n: int, steps: int, scale: float, dtype: torch.dtype, low_rank: bool
) -> None:
    A = normal(seed, m, 1) @ normal(seed + 1, 1, n) if low_rank else normal(seed, m, n)
    A = (A * scale).to(dtype)
    truth = np.linalg.norm(A.double().numpy(), 2)
    bound = gram_iteration(A, steps)
    assert bound.shape == ()
    assert bound.dtype == torch.float64
    assert bound.item() >= truth * (1 - EPS)
    assert bound.item() <= truth * min(m, n) ** 2.0 ** -(steps + 1) * (1 + tolerance(m, n))


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_gram_iteration_decreases_from_frobenius_to_the_truth(seed: int, m: int, n: int) -> None:
    A = normal(seed, m, n)
    bounds = torch.stack([gram_iteration(A, steps) for steps in range(16)])
    assert_close(bounds[0], np.linalg.norm(A.numpy()), tolerance(m, n))
    assert bool((bounds[1:] <= bounds[:-1] * (1 + tolerance(m, n))).all())
    assert_close(bounds[-1], np.linalg.norm(A.numpy(), 2), 1e-4)


def test_gram_iteration_on_paper() -> None:
    # The Schatten norms of order 2, 4, 8 of diag(2, 1).
    A = torch.diag(torch.tensor([2.0, 1.0]))
    for steps, order in enumerate((2, 4, 8)):
        expected = (2**order + 1) ** (1 / order)
        assert gram_iteration(A, steps).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_iterations_stay_in_range(scale: float) -> None:
    A = normal(0, 3, 4, 5)
    A = torch.stack([A[0] * scale, A[1], A[2] * 0])  # a batch of very different sizes
    truth = operator_norm(A)
    bound = gram_iteration(A, 10)
    assert bool((bound >= truth).all())
    assert bool((bound <= truth * 1.001).all())
    assert_close(power_iteration(A[:2], 2000), truth[:2], 1e-6)
    assert power_iteration(A)[2].item() == 0


def test_gram_iteration_takes_complex_matrices() -> None:
    A = torch.complex(normal(0, 4, 6), normal(1, 4, 6))
    truth = np.linalg.norm(A.numpy(), 2)
    assert truth <= gram_iteration(A, 12).item() <= truth * 1.001


@given(
    seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), scales, dtypes, st.booleans()
)
def test_power_iteration_is_never_above(
    seed: int, m: int, n: int, steps: int, scale: float, dtype: torch.dtype, complex_: bool
) -> None:
    A = (normal(seed, m, n) * scale).to(dtype)
    A = A.double() * (1 + 2j) if complex_ else A
    estimate = power_iteration(A, steps, torch.Generator().manual_seed(seed))
    truth = torch.linalg.matrix_norm(A.to(torch.complex128), 2)
    assert estimate.shape == ()
    assert estimate.dtype == torch.float64
    assert 0 < estimate.item() <= truth.item() * (1 + tolerance(m, n))


def test_power_iteration_is_the_iteration() -> None:
    A = normal(0, 5, 4)
    v = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for steps in (1, 2, 3):
        v = A.T @ A @ v
        expected = torch.linalg.vector_norm(A @ v) / torch.linalg.vector_norm(v)
        assert_close(power_iteration(A, steps, torch.Generator().manual_seed(7)), expected, 1e-14)
    assert_close(power_iteration(A, 500), torch.linalg.matrix_norm(A, 2), 1e-12)


def test_power_iteration_has_twenty_steps_unless_told_otherwise() -> None:
    A = torch.randn(6, 6, dtype=torch.float64)
    found, known, more = (
        power_iteration(A, *steps, generator=torch.Generator().manual_seed(7))
        for steps in ((), (20,), (21,))
    )
    assert torch.equal(found, known)
    assert not torch.equal(found, more)


@pytest.mark.parametrize(("mode", "most"), [("circular", 5), ("reflect", 4)])
def test_padding_is_refused_from_where_torch_refuses_it(mode: Any, most: int) -> None:
    x, weight = torch.ones(1, 1, 5), torch.ones(1, 1, 3)
    for padding in (most, most + 1):
        layer = torch.nn.Conv1d(1, 1, 3, padding=padding, padding_mode=mode)
        if padding == most:
            layer(x)
            convolution_norm_bound(weight, 5, padding=padding, padding_mode=mode)
        else:
            with pytest.raises(RuntimeError):
                layer(x)
            with pytest.raises(ValueError, match=f"padding must be at most {most}"):
                convolution_norm_bound(weight, 5, padding=padding, padding_mode=mode)


def test_power_iteration_is_a_function_of_the_generator() -> None:
    A = normal(0, 30, 30)
    draws = [power_iteration(A, 1, torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# ------------------------------------------------------------------ circular convolutions


def circular_matrix(
    weight: np.ndarray, size: tuple[int, ...], s: Any, d: Any, g: int
) -> np.ndarray:
    """The definition, entry by entry: y[o, i] = sum of w[o, c, t] x[c, s i + d t mod N]."""
    c_out, c_in, *k = weight.shape
    out = [n // step for n, step in zip(size, s, strict=True)]
    A = np.zeros((c_out, *out, c_in * g, *size))
    for o, c in itertools.product(range(c_out), range(c_in)):
        channel = o // (c_out // g) * c_in + c
        for i in itertools.product(*map(range, out)):
            for t in itertools.product(*map(range, k)):
                pixel = tuple((s[a] * i[a] + d[a] * t[a]) % size[a] for a in range(len(size)))
                A[(o, *i, channel, *pixel)] += weight[(o, c, *t)]
    return A.reshape(c_out * math.prod(out), -1)


@st.composite
def circular_layers(draw: Any) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))
    each = lambda lo, hi: tuple(draw(st.integers(lo, hi)) for _ in range(dims))  # noqa: E731
    stride, dilation = each(1, 3 if dims < 3 else 2), each(1, 2)
    kernel, turns = each(1, (5, 4, 2)[dims - 1]), each(1, (6, 3, 2)[dims - 1])
    groups, outs, ins = (draw(st.integers(1, 2)) for _ in range(3))
    shape = (groups * outs, ins, *kernel)
    return {
        "weight": normal(draw(seeds), *shape) * draw(scales),
        "input_size": tuple(n * s for n, s in zip(turns, stride, strict=True)),
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
    }


@settings(max_examples=100)
@given(circular_layers())
def test_circular_singular_values_are_those_of_the_definition(layer: dict[str, Any]) -> None:
    A = circular_matrix(
        layer["weight"].numpy(),
        layer["input_size"],
        layer["stride"],
        layer["dilation"],
        layer["groups"],
    )
    m, n = A.shape
    truth = torch.from_numpy(np.linalg.svd(A, compute_uv=False))
    tol = tolerance(m, n, layer["weight"][0, 0].numel())
    values = circular_convolution_singular_values(**layer)
    assert_close(values, truth, tol)
    assert_close(circular_convolution_norm(**layer), truth[0], tol)
    for steps in (0, 3):
        bound = circular_convolution_gram_iteration(**layer, steps=steps)
        assert bound.item() >= truth[0] * (1 - m * EPS)
        assert bound.item() <= truth[0] * min(m, n) ** 2.0 ** -(steps + 1) * (1 + tol)

    # The adjoint goes the other way and has the same singular values.
    size = [n // s for n, s in zip(layer["input_size"], layer["stride"], strict=True)]
    adjoint = layer | {"input_size": size, "transposed": True}
    assert_close(circular_convolution_singular_values(**adjoint), values, tol)
    assert_close(circular_convolution_norm(**adjoint), truth[0], tol)


def test_groups_take_the_maximum() -> None:
    # A product of the groups' norms would be 0.02 (orthogonium 0.0.4 reports such products).
    weight = torch.stack([torch.full((1, 3, 3), 5 / 9), torch.full((1, 3, 3), 0.004 / 9)])
    assert circular_convolution_norm(weight, 8, groups=2).item() == pytest.approx(5, rel=1e-6)
    bound = convolution_norm_bound(weight, 8, padding=1, padding_mode="circular", groups=2)
    assert bound.item() == pytest.approx(5, rel=1e-6)


def test_the_grid_is_that_of_the_image_not_of_the_kernel() -> None:
    weight = torch.tensor([[[1.0, 1.0, -1.0]]])  # largest between the three frequencies of its size
    truth = np.linalg.norm(circular_matrix(weight.numpy(), (32,), (1,), (1,), 1), 2)
    assert circular_convolution_norm(weight, 3).item() < 0.95 * truth
    assert_close(circular_convolution_norm(weight, 32), truth, 1e-13)


def test_reshaped_kernels_do_not_have_the_norm_of_the_convolution() -> None:
    weight = torch.ones(1, 1, 3, 3)
    assert circular_convolution_norm(weight, 32).item() == pytest.approx(9, rel=1e-14)
    assert operator_norm(weight.flatten(1)).item() == pytest.approx(3, rel=1e-6)


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_non_negative_kernel_of_one_channel_has_its_sum_as_norm(seed: int, k: int, n: int) -> None:
    weight = normal(seed, 1, 1, k, k).abs()
    assert_close(circular_convolution_norm(weight, n), weight.sum(), tolerance(1, 1, k * k))


def test_pixel_unshuffle_is_an_isometry() -> None:
    weight = torch.eye(4).reshape(4, 1, 2, 2)
    image = torch.randn(1, 1, 6, 6)
    unshuffled = nn.functional.pixel_unshuffle(image, 2)
    assert torch.equal(nn.functional.conv2d(image, weight, stride=2), unshuffled)
    values = circular_convolution_singular_values(weight, 6, stride=2)
    assert_close(values, torch.ones(36), 1e-14)
    bound = convolution_norm_bound(weight, 6, stride=2)
    assert bound.item() == pytest.approx(1, rel=1e-12)
    assert convolution_norm_is_exact(weight, 6, stride=2)


def test_search_by_frobenius_norm_finds_the_largest_block() -> None:
    # Frequencies in the wrong order: the largest Frobenius norm is not the largest spectral norm.
    weight = torch.zeros(40, 40, 2, dtype=torch.float64)
    weight[..., 0] = torch.eye(40)
    weight[..., 1] = torch.eye(40)
    weight[0, 0] = torch.tensor([3.0, -3.0])  # Frobenius norm largest at 0, spectral at pi
    values = circular_convolution_singular_values(weight, 64)
    assert values[0].item() == pytest.approx(6, rel=1e-12)
    assert circular_convolution_norm(weight, 64).item() == pytest.approx(6, rel=1e-12)


@settings(max_examples=60)
@given(circular_layers(), st.integers(2, 6))
def test_the_search_finds_the_largest_of_all_singular_values(
    layer: dict[str, Any], longer: int
) -> None:
    # On images longer than the kernel the Gram matrices come from interpolation.
    layer["input_size"] = (
        tuple(longer * n for n in layer["input_size"][:2]) + layer["input_size"][2:]
    )
    values = circular_convolution_singular_values(**layer)
    tol = tolerance(*layer["weight"].shape[:2], layer["weight"][0, 0].numel())
    assert_close(circular_convolution_norm(**layer), values[0], tol)


@pytest.mark.parametrize("shape", [(20, 30, 3), (30, 20, 3, 2), (24, 24, 3, 3)])
def test_the_search_among_many_channels_finds_the_largest(shape: tuple[int, ...]) -> None:
    for seed in range(8):
        weight = normal(seed, *shape)
        values = circular_convolution_singular_values(weight, 12, stride=1 + seed % 2)
        norm = circular_convolution_norm(weight, 12, stride=1 + seed % 2)
        assert_close(norm, values[0], tolerance(*shape[:2], 9))


def test_gram_matrices_are_interpolated_exactly() -> None:
    dilated = {"dilation": (1, 3), "stride": (2, 1), "padding": (0, 3)}
    kernel, lattice = geometry._geometry(
        normal(0, 6, 2, 3, 4), (17, 21), padding_mode="zeros", groups=2,
        transposed=False, output_padding=0, **dilated,
    )  # fmt: skip
    with no_dense_axes():
        for blocks in convolutions._completions(kernel, lattice)[:6]:
            polynomial = responses._gram_polynomial(kernel, blocks)
            assert polynomial is not None
            assert polynomial.steps == [1, 3]
            direct = responses._gram(responses._symbol(kernel, blocks))
            assert polynomial.at(blocks).shape == direct.shape
            assert float((polynomial.at(blocks) - direct).abs().max()) < 1e-13 * direct.abs().max()


def test_where_all_frequencies_tie_the_search_still_ends() -> None:
    weight = torch.linalg.qr(normal(0, 16, 16)).Q[:, :, None, None]
    padded = nn.functional.pad(weight, (1, 1, 1, 1))  # the same isometry at every frequency
    assert_close(circular_convolution_norm(padded, 12), 1.0, tolerance(16, 16, 9))
    with no_dense_axes():
        bound = convolution_norm_bound(padded, 12, padding=1)
    assert 1 <= bound.item() <= 1 + tolerance(16, 16, 9)


# ----------------------------------------------------- convolutions as torch computes them


def torch_layer(weight: Tensor, **options: Any) -> nn.Module:
    options = {k: v for k, v in options.items() if k != "input_size"}
    groups, kernel = options.get("groups", 1), weight.shape[2:]
    dims = len(kernel)
    channels = (weight.shape[0], weight.shape[1] * groups)
    if options.pop("transposed", False):
        options.pop("padding_mode", None)
        layer = TRANSPOSED[dims](*channels, kernel, bias=False, dtype=torch.float64, **options)
    else:
        options.pop("output_padding", None)
        layer = CONVOLUTIONS[dims](
            *channels[::-1], kernel, bias=False, dtype=torch.float64, **options
        )
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


def torch_matrix(weight: Tensor, input_size: tuple[int, ...], **options: Any) -> np.ndarray:
    layer = torch_layer(weight, **options)
    n = layer.in_channels * math.prod(input_size)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, layer.in_channels, *input_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return layer(basis).flatten(1).T.numpy()


@st.composite
def torch_layers(draw: Any, dims: int, valid: bool = True) -> dict[str, Any]:
    """A layer that torch accepts, or (``valid=False``) one that it may not."""
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    if draw(st.booleans()):
        stride = [1] * dims
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    kernel = [draw(st.integers(1, (5, 5, 3)[dims - 1])) for _ in range(dims)]
    span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    groups = draw(st.integers(1, 2))
    channels = [draw(st.integers(1, (4, 2, 2)[dims - 1])) for _ in range(2)]
    transposed = draw(st.integers(0, 3)) == 0
    mode = (
        "zeros"
        if transposed
        else draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    )
    padding: Any = [draw(st.integers(0, 4)) for _ in range(dims)]
    if not transposed and stride == [1] * dims:
        padding = draw(st.sampled_from([padding, padding, "same", "valid"]))
    ends = {"same": [(s + 1) // 2 for s in span], "valid": [0] * dims}.get(str(padding), padding)
    total = span if padding == "same" else [2 * e for e in ends]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sizes = []
    for a in range(dims):
        least = 1
        if valid and transposed:
            while (least - 1) * stride[a] - total[a] + span[a] + extra[a] < 0:
                least += 1
        elif valid:
            image = {"circular": ends[a], "reflect": ends[a] + 1}.get(mode, 1)
            least = max(1, span[a] + 1 - total[a], image)
        sizes.append(least + draw(st.integers(0, (9, 3, 1)[dims - 1])))
    kind = draw(st.sampled_from(["normal", "normal", "positive", "sparse"]))
    weight = normal(draw(seeds), groups * channels[0], channels[1], *kernel)
    if kind == "positive":
        weight = weight.abs()
    elif kind == "sparse":
        weight = weight * (normal(draw(seeds), *weight.shape) > 0.5)
    weight = (weight * draw(scales)).to(draw(dtypes))
    layer = {
        "weight": weight,
        "input_size": tuple(sizes),
        "stride": tuple(stride),
        "padding": padding if isinstance(padding, str) else tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
        "padding_mode": mode,
        "transposed": transposed,
    }
    if transposed:
        layer["output_padding"] = tuple(extra)
    return layer


@contextlib.contextmanager
def no_dense_axes() -> Iterator[None]:
    """Complete every axis to a circle, as for images too large to keep dense."""
    blocks = axes._Axis.blocks

    def completed(axis: Any) -> Any:
        every = blocks(axis)
        return [block for block in every if block.frequencies is not None] or every

    with mock.patch.object(axes._Axis, "blocks", completed):
        yield


def check_bounds_of(layer: dict[str, Any]) -> None:
    A = torch_matrix(**layer)
    m, n = A.shape
    tol = tolerance(m, n, layer["weight"][0, 0].numel())
    bounds = {}
    for p, completed in ((1, False), (INF, False), (2, False), (2, True)):
        truth = np.linalg.norm(A, p)
        with no_dense_axes() if completed else contextlib.nullcontext():
            bound = convolution_norm_bound(**layer, p=p)
            exact = convolution_norm_is_exact(**layer, p=p)
        assert bound.shape == ()
        assert bound.dtype == torch.float64
        assert bound.item() >= truth * (1 - EPS * max(m, n)), (p, completed)
        if exact:
            assert bound.item() <= truth * (1 + tol), (p, completed)
        bounds[p] = bound.item()
        if p == 2:  # never worse than interpolation between 1 and infinity allows
            assert bounds[2] <= math.sqrt(bounds[1] * bounds[INF]) * (1 + tol)


@settings(max_examples=260, suppress_health_check=[HealthCheck.too_slow])
@given(torch_layers(1))
def test_no_bound_is_below_the_truth_in_one_dimension(layer: dict[str, Any]) -> None:
    check_bounds_of(layer)


@settings(max_examples=210, suppress_health_check=[HealthCheck.too_slow])
@given(torch_layers(2))
def test_no_bound_is_below_the_truth_in_two_dimensions(layer: dict[str, Any]) -> None:
    check_bounds_of(layer)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(torch_layers(3))
def test_no_bound_is_below_the_truth_in_three_dimensions(layer: dict[str, Any]) -> None:
    check_bounds_of(layer)


@settings(max_examples=150)
@given(st.integers(1, 2).flatmap(lambda dims: torch_layers(dims, valid=False)))
def test_what_torch_refuses_is_refused(layer: dict[str, Any]) -> None:
    try:
        torch_matrix(**layer)
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match=r"^(input_size|padding|output_padding) must"):
            convolution_norm_bound(**layer)
    else:
        convolution_norm_bound(**layer)


@pytest.mark.parametrize("n", [2, 7, 32])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_completion_of_a_tridiagonal_matrix_is_exact(n: int, dims: int) -> None:
    """1 on the diagonal and beside it: the largest eigenvalue is 1 + 2 cos(pi / (n + 1))."""
    weight = torch.ones(1, 1, *[3] * dims)
    with no_dense_axes():
        bound = convolution_norm_bound(weight, n, padding=1)
    assert bound.item() == pytest.approx((1 + 2 * math.cos(math.pi / (n + 1))) ** dims, rel=1e-12)


def test_dilation_is_a_bundle_of_undilated_convolutions() -> None:
    weight = normal(0, 2, 3, 3, 3)
    with no_dense_axes():
        wide = convolution_norm_bound(weight, 36, padding=7, dilation=7)
        narrow = convolution_norm_bound(weight, 6, padding=1)
    assert_close(wide, narrow, 1e-12)


def lanczos(weight: Tensor, size: int, **options: Any) -> float:
    """Largest singular value of torch's layer, from below, to eight digits."""
    layer = torch_layer(weight, **options)
    shape = (1, layer.in_channels, *[size] * (weight.dim() - 2))

    def gram(v: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(v)).reshape(shape).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum() / 2, x)
        return gradient.flatten().numpy()

    n = math.prod(shape)
    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=gram, dtype=np.float64)
    return math.sqrt(eigsh(operator, 1, ncv=30, tol=1e-8, v0=start, return_eigenvectors=False)[0])


def kernels() -> Iterator[Any]:
    for k in (1, 3, 5):
        for c_out, c_in in ((1, 1), (2, 3), (4, 4), (16, 8)):
            yield pytest.param(normal(k, c_out, c_in, k, k), id=f"normal-{c_out}x{c_in}x{k}")
    for k in (3, 5, 7):
        yield pytest.param(torch.ones(1, 1, k, k) / k**2, id=f"average-{k}")
        line = torch.exp(-((torch.arange(k) - k // 2) ** 2) / (k / 3) ** 2)
        wave = torch.cos(0.8 * torch.arange(k)[:, None] + 0.5 * torch.arange(k))
        pair = torch.stack([line[:, None] * line, line[:, None] * line * wave])[:, None]
        yield pytest.param(pair, id=f"gauss-gabor-{k}")
        smooth = normal(k, 3, 3, k, k).cumsum(-1).cumsum(-2)
        yield pytest.param(smooth, id=f"cumulated-{k}")
    edges = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    cross = torch.tensor([[0, 1.0, 0], [1, -4, 1], [0, 1, 0]])
    yield pytest.param(torch.stack([edges, edges.T, cross])[:, None], id="edges")


@pytest.mark.parametrize("weight", list(kernels()))
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_padding_is_tight_to_one_per_cent_at_32(weight: Tensor, stride: int) -> None:
    pad = weight.shape[-1] // 2
    truth = lanczos(weight, 32, stride=stride, padding=pad)
    bound = convolution_norm_bound(weight, 32, stride=stride, padding=pad)
    assert truth * (1 - 1e-8) <= bound.item() <= 1.01 * truth


def test_completion_without_dense_axes_is_tight_to_one_per_cent_at_32() -> None:
    for seed, k in itertools.product(range(3), (3, 5)):
        weight = normal(seed, 2, 2, k, k)
        truth = lanczos(weight, 32, padding=k // 2)
        with no_dense_axes():
            bound = convolution_norm_bound(weight, 32, padding=k // 2)
        assert truth * (1 - 1e-8) <= bound.item() <= 1.01 * truth


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_by_copies_is_bounded_above_the_circular_norm(mode: str) -> None:
    # Twice an isometry, whatever the frequency, with circular padding; more with copies.
    weight = torch.linalg.qr(normal(0, 4, 4)).Q.reshape(4, 1, 2, 2)
    options = {"stride": 1, "padding": 1, "padding_mode": mode}
    truth = np.linalg.norm(torch_matrix(weight, (6, 6), **options), 2)
    assert truth > 1.05 * circular_convolution_norm(weight, 6)
    bound = convolution_norm_bound(weight, 6, **options)
    assert truth <= bound.item() <= truth * (1 + 1e-10)
    with no_dense_axes():
        bound = convolution_norm_bound(weight, 6, **options)
    assert truth <= bound.item() <= 2 * circular_convolution_norm(weight, 8).item() * (1 + 1e-12)


def test_reflected_average_is_four_thirds() -> None:
    # deel-torchlip 1.0.5 divides by k and takes such a layer for 1-Lipschitz.
    weight = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    bound = convolution_norm_bound(weight, 64, padding=1, padding_mode="reflect")
    assert 4 / 3 * 0.97 <= bound.item() <= 4 / 3 * (1 + 1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_that_do_not_overlap_are_a_matrix(dims: int) -> None:
    weight = normal(dims, 3, 2, *[3] * dims)
    layer = {"weight": weight, "input_size": 10, "stride": 3}
    assert convolution_norm_is_exact(**layer)
    assert_close(convolution_norm_bound(**layer), operator_norm(weight.flatten(1)), 1e-10)


def test_kernel_as_large_as_the_image_is_a_matrix() -> None:
    weight = normal(0, 7, 3, 5, 5)
    assert convolution_norm_is_exact(weight, 5)
    assert_close(convolution_norm_bound(weight, 5), operator_norm(weight.flatten(1)), 1e-10)


def test_pixel_by_pixel_convolution_is_a_matrix_however_large_the_image() -> None:
    weight = normal(0, 5, 4, 1, 1)
    assert convolution_norm_is_exact(weight, 500)
    assert_close(convolution_norm_bound(weight, 500), operator_norm(weight.flatten(1)), 1e-12)


def test_circular_padding_is_exact_only_where_it_closes() -> None:
    weight = normal(0, 64, 64, 3, 3).float()
    exact = [
        convolution_norm_is_exact(weight, 32, stride=s, padding=p, padding_mode="circular")
        for s, p in ((1, 1), (2, 1), (1, 0), (3, 1), (1, 2))
    ]
    assert exact == [True, True, False, False, False]
    bound = convolution_norm_bound(weight, 16, padding=1, padding_mode="circular")
    assert_close(bound, circular_convolution_norm(weight, 16), 1e-10)


def test_is_exact_for_p_1_and_infinity_where_taps_are_apart() -> None:
    weight = torch.ones(2, 2, 3, 3)
    for mode, size, p, expected in (
        ("zeros", 1, 1, True),
        ("zeros", 1, INF, True),
        ("circular", 3, 1, True),
        ("circular", 2, INF, False),
        ("reflect", 8, INF, True),
        ("reflect", 8, 1, False),
        ("replicate", 1, INF, False),
    ):
        exact = convolution_norm_is_exact(weight, size, padding=1, padding_mode=mode, p=p)
        assert exact is expected, (mode, size, p)


def test_transposed_layers_swap_p_1_and_infinity() -> None:
    weight = normal(0, 2, 3, 4, 4)  # from 3 to 2 channels, or transposed from 2 to 3
    options = {"stride": 2, "padding": 1}
    for p, q in ((1, INF), (2, 2), (INF, 1)):
        forth = convolution_norm_bound(weight, 8, p=p, **options)
        back = convolution_norm_bound(weight, 4, p=q, transposed=True, **options)
        assert_close(back, forth, 1e-14)


def test_large_symbols_are_taken_in_parts() -> None:
    weight = normal(0, 4, 3, 3, 3)
    whole = circular_convolution_singular_values(weight, 8, stride=2)
    with mock.patch.object(responses, "_ENTRIES", 7):
        assert_close(circular_convolution_singular_values(weight, 8, stride=2), whole, 1e-13)
        assert_close(circular_convolution_norm(weight, 8, stride=2), whole[0], 1e-13)
        bound = circular_convolution_gram_iteration(weight, 8, stride=2, steps=12)
        assert whole[0] <= bound <= 1.001 * whole[0]


def test_work_is_counted_not_timed() -> None:
    # One channel stays dense at 32 x 32, sixty-four do not, a long signal makes no N x N matrix.
    assert convolution_norm_is_exact(torch.ones(1, 1, 3, 3), 32, padding=1)
    assert not convolution_norm_is_exact(torch.ones(64, 64, 3, 3), 32, padding=1)
    assert convolution_norm_bound(torch.ones(1, 1, 3), 10**5, padding=1).item() <= 3 + 1e-9


# ------------------------------------------------------- properties of all convolutions


FUNCTIONS = {
    "singular values": lambda w: circular_convolution_singular_values(w, 4),
    "circular": lambda w: circular_convolution_norm(w, 4),
    "gram": lambda w: circular_convolution_gram_iteration(w, 4),
    "p=1": lambda w: convolution_norm_bound(w, 4, padding=1, p=1),
    "p=2": lambda w: convolution_norm_bound(w, 4, padding=1),
    "p=inf": lambda w: convolution_norm_bound(w, 4, padding=1, p=INF),
    "reflect": lambda w: convolution_norm_bound(w, 4, padding=1, padding_mode="reflect"),
    "stride": lambda w: convolution_norm_bound(w, 5, padding=1, stride=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_kernel_has_norm_zero(name: str) -> None:
    weight = torch.zeros(2, 2, 3, 3, requires_grad=True)
    value = FUNCTIONS[name](weight)
    assert bool((value == 0).all())
    if name != "singular values":  # whose gradient at 0 does not exist
        value.sum().backward()
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_norms_are_homogeneous_over_the_whole_range(name: str, scale: float) -> None:
    weight = normal(0, 2, 3, 3, 3)
    assert_close(FUNCTIONS[name](weight * scale), FUNCTIONS[name](weight) * scale, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_computed_in_float64(name: str, dtype: torch.dtype) -> None:
    weight = normal(0, 2, 3, 3, 3).to(dtype).requires_grad_()
    value = FUNCTIONS[name](weight)
    assert value.dtype == torch.float64
    assert torch.equal(value, FUNCTIONS[name](weight.double()))
    value.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert bool((weight.grad != 0).any())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_convolution_functions_are_differentiable(name: str) -> None:
    # The singular values at conjugate frequencies are equal: their sum has a gradient, they do not.
    weight = normal(3, 1, 2, 3, 2).requires_grad_()
    function = FUNCTIONS[name] if name != "singular values" else lambda w: FUNCTIONS[name](w).sum()
    assert gradcheck(function, weight, fast_mode=True)
    if name in {"p=2", "reflect", "stride"}:
        with no_dense_axes():
            assert gradcheck(function, weight, fast_mode=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda A: operator_norm(A, 1),
        lambda A: operator_norm(A, 1, 3),
        lambda A: operator_norm(A, 2),
        lambda A: operator_norm(A, 2, INF),
        gram_iteration,
        lambda A: gram_iteration(A, 0),
    ],
)
def test_matrix_functions_are_differentiable(function: Any) -> None:
    assert gradcheck(function, normal(0, 2, 3, 4).requires_grad_())


def test_gram_iteration_has_a_gradient_where_singular_values_coincide_and_at_zero() -> None:
    assert gradcheck(gram_iteration, torch.eye(3, dtype=torch.float64).requires_grad_())
    zero = torch.zeros(2, 3, requires_grad=True)
    gram_iteration(zero).backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros(2, 3))


def test_gradient_of_power_iteration_is_the_outer_product() -> None:
    A = normal(0, 4, 3).requires_grad_()
    power_iteration(A, 1000).backward()
    U, _, Vh = torch.linalg.svd(A.detach())
    assert A.grad is not None
    assert torch.allclose(A.grad, U[:, :1] @ Vh[:1], atol=1e-10)


def test_integers_mean_the_same_on_every_axis() -> None:
    weight = normal(0, 2, 2, 3, 3)
    short = convolution_norm_bound(weight, 9, stride=2, padding=1, dilation=2)
    long = convolution_norm_bound(weight, (9, 9), (2, 2), [1, 1], (2, 2))
    assert torch.equal(short, long)
    numpy_integers = convolution_norm_bound(weight, np.int64(9), np.int64(2), 1, torch.Size((2, 2)))
    assert torch.equal(short, numpy_integers)
    two = np.array([2, 2])
    arrays = convolution_norm_bound(weight, np.array([9, 9]), two, two - 1, two, groups=np.int32(1))
    assert torch.equal(short, arrays)
    rigorous = [
        rigorous_convolution_norm(weight, size) for size in (9, np.int64(9), (9, np.int32(9)))
    ]
    assert len(set(rigorous)) == 1
    assert torch.equal(gram_iteration(weight[0], np.int64(3)), gram_iteration(weight[0], 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_the_same_without_a_graph(name: str, mode: Any) -> None:
    weight = normal(0, 2, 3, 3, 3)
    expected = FUNCTIONS[name](weight)
    with mode():
        inside = weight.clone()
        assert torch.equal(FUNCTIONS[name](inside), expected)
        assert torch.equal(
            power_iteration(inside, 30, torch.Generator().manual_seed(0)),
            power_iteration(weight, 30, torch.Generator().manual_seed(0)),
        )
        assert rigorous_convolution_norm(inside, 4) == rigorous_convolution_norm(weight, 4)
    assert torch.equal(FUNCTIONS[name](inside), expected)  # an inference tensor, used outside


# --------------------------------------------------------------------------------- errors

W = torch.ones(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dual_exponent(0.5), ValueError, "p must be in .* got 0.5"),
        (lambda: dual_exponent(math.nan), ValueError, "p must be in .* got nan"),
        (lambda: dual_exponent("inf"), TypeError, "p must be a number .* got str"),
        (lambda: dual_exponent(True), TypeError, "p must be a number .* got bool"),
        (lambda: operator_norm(torch.eye(2), 0), ValueError, "p must be in"),
        (lambda: operator_norm(torch.eye(2), 1, 0.5), ValueError, "q must be in"),
        (lambda: operator_norm(np.eye(2)), TypeError, "matrix must be a torch.Tensor, got ndarray"),
        (lambda: operator_norm(torch.ones(2)), ValueError, r"matrix must have shape .* got \(2,\)"),
        (lambda: operator_norm(torch.ones(0, 3)), ValueError, "matrix must have shape"),
        (lambda: operator_norm(torch.ones(2, 2).int()), TypeError, "matrix must have a floating"),
        (lambda: operator_norm(torch.eye(2) * math.nan), ValueError, "matrix must be finite"),
        (lambda: gram_iteration(torch.eye(2) / 0), ValueError, "matrix must be finite"),
        (lambda: gram_iteration(torch.ones(3)), ValueError, "matrix must have shape"),
        (lambda: gram_iteration(torch.eye(2), -1), ValueError, "steps must be at least 0, got -1"),
        (lambda: gram_iteration(torch.eye(2), 1.5), TypeError, "steps must be an integer"),
        (lambda: power_iteration(torch.eye(2), 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: power_iteration(torch.eye(2) * math.inf), ValueError, "matrix must be finite"),
        (lambda: power_iteration(torch.ones(3)), ValueError, "matrix must have shape"),
        (lambda: circular_convolution_norm(W, 9, 2), ValueError, "input_size must be a multiple"),
        (lambda: circular_convolution_norm(W / 0, 9), ValueError, "weight must be finite"),
        (lambda: circular_convolution_norm(W * 1j, 9), TypeError, "weight must be real"),
        (lambda: circular_convolution_norm(W.int(), 9), TypeError, "weight must have a floating"),
        (lambda: circular_convolution_norm(W[0, 0], 9), ValueError, "weight must have shape"),
        (lambda: circular_convolution_norm(W[:0], 9), ValueError, "weight must have shape"),
        (lambda: circular_convolution_norm(W, 9, groups=3), ValueError, "groups must divide"),
        (lambda: circular_convolution_norm(W, 9, groups=0), ValueError, "groups must be at least"),
        (lambda: circular_convolution_norm(W, (9,)), ValueError, "input_size must be one integer"),
        (lambda: circular_convolution_norm(W, 0), ValueError, "input_size must be at least 1"),
        (lambda: circular_convolution_norm(W, 9.0), TypeError, "input_size must be an integer"),
        (lambda: circular_convolution_norm(W, None), TypeError, "input_size must be an integer"),
        (lambda: circular_convolution_norm(W, 9, dilation=0), ValueError, "dilation must be at"),
        (lambda: circular_convolution_singular_values(W, 9, 2), ValueError, "multiple of stride"),
        (lambda: circular_convolution_gram_iteration(W, 9, steps=-1), ValueError, "steps must be"),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", [convolution_norm_bound, convolution_norm_is_exact])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 3}, ValueError, "p must be 1, 2 or inf for a convolution, got 3"),
        ({"p": "2"}, TypeError, "p must be a number"),
        (
            {"padding": "full"},
            ValueError,
            "padding must be integers, 'same' or 'valid', got 'full'",
        ),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "same", "stride": 2}, ValueError, "padding must be integers with a stride"),
        ({"padding": "same", "transposed": True}, ValueError, "padding must be integers, got"),
        ({"padding_mode": "symmetric"}, ValueError, "padding_mode must be .* got 'symmetric'"),
        ({"padding_mode": "reflect", "transposed": True}, ValueError, "padding_mode must be 'zero"),
        ({"padding_mode": "reflect", "padding": 8}, ValueError, "padding must be at most 7"),
        ({"padding_mode": "circular", "padding": 9}, ValueError, "padding must be at most 8"),
        ({"output_padding": 1}, ValueError, "output_padding must be 0 unless transposed"),
        ({"output_padding": 2, "stride": 2, "transposed": True}, ValueError, "output_padding must"),
        ({"dilation": 4}, ValueError, "input_size must leave an output, got 8"),
        ({"padding": 9, "transposed": True}, ValueError, "input_size must leave an output"),
        ({"weight": W * math.nan}, ValueError, "weight must be finite"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"weight": torch.ones(1, 1, 1, 1, 1, 1)}, ValueError, "weight must have shape"),
        ({"groups": 3}, ValueError, "groups must divide the first axis of weight, 2, got 3"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be one integer or 2"),
        ({"stride": (1, 1.0)}, TypeError, "stride must be an integer, got float"),
    ],
)
def test_errors_of_the_bound_name_the_argument(
    function: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**({"weight": W, "input_size": 8} | options))


def test_every_public_name_is_there_and_documented() -> None:
    for name in norms.__all__:
        assert getattr(norms, name).__doc__
