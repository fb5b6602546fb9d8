from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook import orthogonal
from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.orthogonal import (
    QR,
    BlockReflectorLinear,
    Cayley,
    InfinityNorm,
    InfinityNormLinear,
    OrthogonalLinear,
    Polar,
    Scale,
    SpectralNorm,
    SpectralNormLinear,
    UnitNorm,
    UnitNormLinear,
    bjorck,
    block_reflector,
    cayley,
    cholesky_qr,
    clip_spectral_norm,
    householder_product,
    matrix_exp,
    polar,
    project_l1_ball,
    qr,
    unit_rows,
)

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "qr": qr,
    "cholesky_qr": cholesky_qr,
    "polar": polar,
    "cayley": cayley,
    "exp": matrix_exp,
    "householder": householder_product,
    "bjorck": bjorck,
}
METHODS = list(MAPS)
EXACT = ["qr", "cayley", "exp", "householder"]  # orthonormal for every raw matrix
SHAPES = [(4, 4), (6, 3), (3, 6), (5, 1), (1, 5), (1, 1)]


def tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Deviation of singular values that the library promises, for all sizes up to 1024.

    Half precision adds what rounding the entries can do: half an eps of the Frobenius norm.
    """
    promised = {torch.float64: 1e-13}.get(dtype, 1e-6)
    if dtype in (torch.float16, torch.bfloat16):
        promised += torch.finfo(dtype).eps / 2 * math.sqrt(min(m, n))
    return promised


def singular_values(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)


def assert_orthonormal(matrix: Tensor) -> None:
    deviation = np.abs(singular_values(matrix) - 1).max()
    assert deviation <= tolerance(*matrix.shape, matrix.dtype)


def assert_nonexpansive(matrix: Tensor) -> None:
    assert matrix.isfinite().all()
    assert singular_values(matrix).max() <= 1 + tolerance(*matrix.shape, matrix.dtype)


def haar(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal columns or rows, drawn without the library."""
    q, r = np.linalg.qr(np.random.default_rng(m * n).standard_normal((max(m, n), min(m, n))))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q if m >= n else q.T.copy()).to(dtype)


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


# ---------------------------------------------------------------------------------- definition


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("function", [qr, cholesky_qr])
def test_qr_is_gram_schmidt_from_left_to_right(
    function: Callable[[Tensor], Tensor], m: int, n: int
) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64)
    expected = np.empty((max(m, n), min(m, n)))
    for j, column in enumerate((matrix if m >= n else matrix.T).numpy().T):
        done = expected[:, :j]
        for _ in range(2):  # twice is enough
            column = column - done @ (done.T @ column)  # noqa: PLW2901
        expected[:, j] = column / np.linalg.norm(column)
    result = function(matrix)
    assert result.shape == (m, n)
    assert np.abs((result if m >= n else result.T).numpy() - expected).max() < 1e-13


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_polar_is_the_polar_factor(m: int, n: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64)
    expected = scipy.linalg.polar(matrix.numpy())[0]
    assert polar(matrix).shape == (m, n)
    assert np.abs(polar(matrix).numpy() - expected).max() < 1e-13
    assert np.abs(bjorck(matrix, steps=60).numpy() - expected).max() < 1e-13


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_cayley_by_blocks(m: int, n: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64)
    tall = (matrix if m >= n else matrix.T).numpy()
    k = min(m, n)
    u, v, eye = tall[:k], tall[k:], np.eye(k)
    a = u - u.T + v.T @ v
    expected = np.vstack(((eye - a) @ np.linalg.inv(eye + a), -2 * v @ np.linalg.inv(eye + a)))
    result = cayley(matrix)
    assert result.shape == (m, n)
    assert np.abs((result if m >= n else result.T).numpy() - expected).max() < 1e-13


@pytest.mark.parametrize(("m", "n"), [(300, 300), (350, 261), (129, 300)])
def test_cayley_by_halves_in_float32(m: int, n: int) -> None:
    """From 128 columns on the inverse is put together from blocks, here of odd sizes too."""
    matrix = (torch.randn(2, m, n) / math.sqrt(min(m, n))).requires_grad_()
    exact = matrix.detach().double().requires_grad_()
    result, expected = cayley(matrix), cayley(exact)
    # U - Uᵀ, the inverse and the result are rounded to float32
    assert (result - expected).abs().max() <= 3 * torch.finfo(torch.float32).eps
    direction = torch.randn_like(result)
    result.backward(direction)
    expected.backward(direction.double())
    assert matrix.grad is not None
    assert exact.grad is not None
    assert (matrix.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_matrix_exp_is_scipys(m: int, n: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64)
    tall = (matrix if m >= n else matrix.T).numpy()
    square = np.zeros((max(m, n), max(m, n)))
    square[:, : min(m, n)] = tall
    expected = scipy.linalg.expm(square - square.T)[:, : min(m, n)]
    result = matrix_exp(matrix)
    assert result.shape == (m, n)
    assert np.abs((result if m >= n else result.T).numpy() - expected).max() < 1e-13


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_householder_product_multiplies_reflections(m: int, n: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64)
    tall = (matrix if m >= n else matrix.T).numpy()
    expected = np.eye(max(m, n))
    for j in range(min(m, n)):
        v = np.concatenate((np.zeros(j), [1.0], tall[j + 1 :, j]))
        expected = expected @ (np.eye(max(m, n)) - 2 * np.outer(v, v) / (v @ v))
    result = householder_product(matrix)
    assert result.shape == (m, n)
    assert np.abs((result if m >= n else result.T).numpy() - expected[:, : min(m, n)]).max() < 1e-13


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_bjorck_acts_on_singular_values_by_its_polynomial(order: int, steps: int) -> None:
    """f is the integral of (1 - t²)^p, f(1) = 1; a diagonal of largest entry 1 is not scaled."""
    integral = (np.polynomial.Polynomial([1, 0, -1]) ** order).integ()
    expected = sigma = np.array([1.0, 0.9, 0.5, 0.1, 0.0])
    for _ in range(steps):
        expected = integral(expected) / integral(1)
    result = bjorck(torch.from_numpy(np.diag(sigma)), order, steps)
    assert np.abs(result.numpy() - np.diag(expected)).max() < 1e-15


def test_bjorck_on_paper() -> None:
    assert bjorck(torch.diag(torch.tensor([1.0, 0.5])), 1, 1).tolist() == [[1, 0], [0, 0.6875]]


def test_clip_spectral_norm_divides_by_the_largest_singular_value() -> None:
    for m, n in SHAPES:
        matrix = 3 * torch.randn(m, n, dtype=torch.float64)
        expected = matrix.numpy() / max(1, singular_values(matrix)[0])
        assert np.abs(clip_spectral_norm(matrix).numpy() - expected).max() < 1e-14
    small = haar(5, 3) * 0.99
    assert torch.equal(clip_spectral_norm(small), small)


@given(st.integers(1, 30), st.floats(-6, 6), st.integers(0, 2**31), st.booleans())
def test_project_l1_ball_is_the_nearest_point(n: int, scale: float, seed: int, grid: bool) -> None:
    """u is nearest to w in the ball iff no vertex ±e lies further along w - u than u does."""
    w = np.random.default_rng(seed).standard_normal((4, n))
    w = 10**scale * (w.round() if grid else w)  # a grid has ties and zeros
    u = project_l1_ball(torch.from_numpy(w)).numpy()
    assert np.abs(u).sum(1).max() <= 1 + 1e-14
    outside = np.abs(w).sum(1) > 1
    assert np.array_equal(u[~outside], w[~outside])
    slack = np.abs(w - u).max(1) - ((w - u) * u).sum(1)
    assert np.all(slack <= 1e-14 * n * np.abs(w).max(1))
    assert np.all(np.abs(np.abs(u).sum(1)[outside] - 1) < 1e-13)


def test_project_l1_ball_on_paper() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.5, 0.5], [2.0, 0.0], [1.0, 1.0], [-3.0, 2.5], [0.9, -0.3]])
    expected = [[0, 0], [0.5, 0.5], [1, 0], [0.5, 0.5], [-0.75, 0.25], [0.8, -0.2]]
    assert torch.allclose(project_l1_ball(rows), torch.tensor(expected), atol=1e-7, rtol=0)
    assert torch.equal(project_l1_ball(torch.tensor([1e9, 1.0])), torch.tensor([1.0, 0.0]))


def test_unit_rows_divides_by_the_norm() -> None:
    rows = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = rows.numpy() / np.linalg.norm(rows.numpy(), axis=-1, keepdims=True)
    for scale in (1, 1e-12, 1e12):
        assert np.abs(unit_rows(scale * rows).numpy() - expected).max() < 1e-15
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("function", [*MAPS.values(), clip_spectral_norm, project_l1_ball])
def test_batches_are_mapped_one_by_one(function: Callable[[Tensor], Tensor]) -> None:
    for shape in ((2, 3, 6, 4), (2, 3, 4, 6)):
        matrices = torch.randn(shape, dtype=torch.float64)
        result = function(matrices)
        for i, j in itertools.product(range(2), range(3)):
            assert torch.allclose(result[i, j], function(matrices[i, j]), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------- theorem


def draw(kind: str, m: int, n: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    gaussian = rng.standard_normal((m, n))
    if kind == "rank one":
        gaussian = np.outer(gaussian[:, 0], gaussian[0])
    elif kind == "equal columns":
        gaussian[:, n // 2 :] = gaussian[:, : n - n // 2]
    elif kind == "equal rows":
        gaussian[m // 2 :] = gaussian[: m - m // 2]
    elif kind == "zero column":
        gaussian[:, n // 2] = 0
    elif kind == "zero":
        gaussian[:] = 0
    elif kind == "graded":
        gaussian *= 10.0 ** -np.arange(n)
    return torch.from_numpy(gaussian)


KINDS = ["generic", "rank one", "equal columns", "equal rows", "zero column", "zero", "graded"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=70)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    scale=st.integers(-6, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_singular_values_are_one_or_at_most_one(
    method: str, kind: str, m: int, n: int, scale: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = (draw(kind, m, n, seed) * 10.0**scale).to(dtype)
    matrix = matrix.clamp(-6e4, 6e4).requires_grad_()  # within float16
    result = MAPS[method](matrix)
    assert result.shape == (m, n)
    assert result.dtype == dtype
    values = singular_values(matrix)
    condition = values[0] / values[-1] if values[-1] > 0 else math.inf
    # half of what the docstrings promise, since a bound of the norm stands in for the norm
    promised = {"cholesky_qr": 1e3, "polar": 1e3, "bjorck": 3}.get(method, math.inf)
    if method in EXACT or condition <= promised:
        assert_orthonormal(result)
    else:
        assert_nonexpansive(result)
    result.backward(torch.randn_like(result))
    assert matrix.grad is not None
    if dtype in (torch.float32, torch.float64):  # the huge gradients overflow half precision
        assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_float32_at_1024(method: str) -> None:
    """The largest size of the promise: at the start, and far from it."""
    matrix = torch.randn(1024, 1024 if method not in ("exp", "householder") else 256)
    start = haar(*matrix.shape, torch.float32)
    for argument in (start, 1e4 * matrix) if method in ("qr", "cayley") else (start,):
        with torch.no_grad():
            result = MAPS[method](argument).double()
        deviation = torch.linalg.eigvalsh(result.T @ result).sqrt() - 1
        assert deviation.abs().max() <= tolerance(*matrix.shape, torch.float32)


def test_equal_entries_are_the_worst_case_of_rounding() -> None:
    """The exception that the docstrings name: LAPACK's reflections, by processor, err by 3.5e-6."""
    for method in METHODS:
        with torch.no_grad():
            values = singular_values(MAPS[method](torch.ones(512, 128)))
        assert values.max() <= 1 + 5e-6
        assert method not in EXACT or values.min() >= 1 - 5e-6


@pytest.mark.parametrize("order", [1, 3, 5, 7])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_truncated_bjorck_is_nonexpansive(order: int, steps: int) -> None:
    for scale in (1e-3, 1, 1e3):
        assert_nonexpansive(bjorck(scale * torch.randn(20, 12), order, steps))


def test_polar_reaches_as_far_as_its_condition() -> None:
    u, v = haar(12, 12), haar(12, 12).T
    for condition in (1.0, 1e2, 1e6, 1e9):
        spectrum = torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64)
        assert_orthonormal(polar((u * spectrum) @ v, condition=10 * condition))
    spectrum = torch.logspace(0, -8, 12, dtype=torch.float64)
    assert singular_values(polar((u * spectrum) @ v, condition=1e2))[-1] < 0.5


def test_polar_commutes_with_rotations() -> None:
    matrix, u, v = torch.randn(6, 4, dtype=torch.float64), haar(6, 6), haar(4, 4)
    assert torch.allclose(polar(u @ matrix @ v), u @ polar(matrix) @ v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 4, 10, 32])
def test_qr_of_long_rows_whose_rounding_errors_do_not_cancel(rows: int) -> None:
    """Sums of up to 65536 terms of one sign: in one float32 they are off by 1e-5."""
    torch.manual_seed(0)
    for columns in (1024, 4096, 16384) if rows > 4 else (1024, 16384, 65536):
        for noise in (0, 1e-4, 1e-2, 1):
            weight = qr(1 + noise * torch.rand(rows, columns))
            values = torch.linalg.svdvals(weight.double())
            assert (values - 1).abs().max() < 5e-7


@pytest.mark.parametrize("method", ["cayley", "exp"])
def test_large_skew_matrices_are_scaled_back(method: str) -> None:
    matrix = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    far, further = MAPS[method](1e12 * matrix), MAPS[method](1e15 * matrix)
    assert torch.allclose(far, further, rtol=0, atol=1e-6)
    # so the gradient has no component along the matrix
    (gradient,) = torch.autograd.grad(far, matrix, torch.randn_like(far))
    assert (gradient * matrix).sum().abs() < 1e-6 * gradient.norm() * matrix.norm()


def test_project_l1_ball_at_1024() -> None:
    for rows in (torch.ones(3, 1024), torch.randn(3, 1024), 1e4 * torch.rand(3, 1024)):
        sums = project_l1_ball(rows).abs().double().sum(1)
        assert (sums - 1).abs().max() <= 1e-6


def test_clip_spectral_norm_at_1024() -> None:
    for scale in (1e-2, 1, 1e4):
        result = clip_spectral_norm(scale * torch.randn(1024, 200))
        norm = singular_values(result)[0]
        assert norm <= 1 + 1e-6
        assert scale < 1 or norm >= 1 - 1e-6


# ----------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradcheck(method: str, m: int, n: int) -> None:
    matrix = torch.randn(2, m, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MAPS[method], (matrix,), check_forward_ad=True)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradcheck_of_bounded_norms(m: int, n: int) -> None:
    matrix = (2 * torch.randn(m, n, dtype=torch.float64)).requires_grad_()
    for function in (clip_spectral_norm, project_l1_ball, unit_rows):
        assert torch.autograd.gradcheck(function, (matrix,), check_forward_ad=True)
    assert torch.autograd.gradcheck(unit_rows, (matrix,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(unit_rows, (matrix,), check_fwd_over_rev=True)
    small = (matrix.detach() / 1000).requires_grad_()
    for function in (clip_spectral_norm, project_l1_ball):
        (gradient,) = torch.autograd.grad(function(small).sum(), small)
        assert torch.equal(gradient, torch.ones_like(small))


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method: str) -> None:
    matrix = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    function = (lambda matrix: bjorck(matrix, steps=3)) if method == "bjorck" else MAPS[method]
    assert torch.autograd.gradgradcheck(function, (matrix,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [40, 60])
def test_float32_gradients_agree_with_float64(method: str, m: int) -> None:
    matrix = torch.randn(m, 40, dtype=torch.float64) + 5 * haar(m, 40)
    cotangent = torch.randn(m, 40, dtype=torch.float64)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        argument = matrix.to(dtype).requires_grad_()
        result = MAPS[method](argument)
        gradients.append(torch.autograd.grad(result, argument, cotangent.to(dtype))[0].double())
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_gradient_of_a_sparse_row_inside_the_ball_is_whole() -> None:
    rows = torch.tensor([[0.5, 0.0, -0.2, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(project_l1_ball(rows).sum(), rows)
    assert gradient.tolist() == [[1, 1, 1, 1]]


# -------------------------------------------------------------------------------------- layers

LAYERS: dict[str, Callable[..., nn.Linear]] = {
    **{
        method: lambda *args, method=method, **kwargs: OrthogonalLinear(
            *args, method=method, **kwargs
        )
        for method in METHODS
    },
    "spectral": SpectralNormLinear,
    "infinity": InfinityNormLinear,
    "unit": UnitNormLinear,
}


def assert_constraint(name: str, weight: Tensor) -> None:
    """What the layer of this name promises of any raw parameter."""
    limit = 1 + tolerance(*weight.shape, weight.dtype)
    exact = weight.detach().double()
    assert exact.isfinite().all()
    if name in EXACT:
        assert_orthonormal(weight)
    elif name in (*METHODS, "spectral"):
        assert_nonexpansive(weight)
    elif name == "infinity":
        assert exact.abs().sum(1).max() <= limit
    else:
        assert (exact.norm(dim=1) - 1).abs().max() <= limit - 1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_start_in_their_constraint(name: str, m: int, n: int, dtype: torch.dtype) -> None:
    layer = LAYERS[name](n, m, dtype=dtype)
    assert layer.weight.shape == (m, n)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_constraint(name, layer.weight)
    if name in METHODS:
        assert_orthonormal(layer.weight)
    x = torch.randn(7, n, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_linear_layers_with_one_raw_parameter(name: str) -> None:
    layer = LAYERS[name](5, 3)
    assert isinstance(layer, nn.Linear)
    assert [key for key, _ in layer.named_parameters()] == [
        "bias",
        "parametrizations.weight.original",
    ]
    assert raw(layer).shape == (3, 5)
    assert LAYERS[name](5, 3, False).bias is None
    assert not torch.equal(LAYERS[name](5, 3).weight, LAYERS[name](5, 3).weight)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("m", "n"), [(6, 6), (8, 4), (4, 8)])
def test_no_treatment_of_the_raw_parameter_breaks_the_constraint(name: str, m: int, n: int) -> None:
    layer = LAYERS[name](n, m)
    start = raw(layer).detach().clone()
    treatments = {
        "up": lambda w: 1e4 * w,
        "down": lambda w: 1e-4 * w,
        "average": lambda w: 0.5 * w + 0.5 * torch.randn_like(w),
        "decay": lambda w: 0.9 * w,
        "rank one": lambda w: w[:, :1] @ w[:1],
        "noise": lambda w: 1e4 * torch.randn_like(w),
    }
    for treat in treatments.values():
        with torch.no_grad():
            raw(layer).copy_(treat(start))
        assert_constraint(name, layer.weight)


def train(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Regress the absolute values of a rotation, with gradient clipping."""
    generator = torch.Generator().manual_seed(1)
    dtype = raw(layer).dtype
    target = haar(layer.out_features, layer.in_features, dtype)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, layer.in_features, dtype=dtype, generator=generator)
        loss = (layer(x).abs() - (x @ target.T).abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_500_adam_steps_at_a_large_rate(method: str) -> None:
    layer = LAYERS[method](16, 16)
    train(layer, torch.optim.Adam(layer.parameters(), lr=0.1), 500)
    assert_orthonormal(layer.weight)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("m", "n"), [(12, 12), (16, 8), (8, 16)])
def test_25_steps_train_with_weight_decay(name: str, m: int, n: int) -> None:
    """AdamW with weight decay zeroes torch's own Householder map in one step."""
    layer = LAYERS[name](n, m, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.1)
    before = layer.weight.detach().clone()
    losses = train(layer, optimizer, 25)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert (layer.weight - before).norm() > 0.1
    assert_constraint(name, layer.weight)
    if name in METHODS:
        assert_orthonormal(layer.weight)


# ------------------------------------------------------------------------- assigning a weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_orthonormal_weight_can_be_assigned(
    method: str, m: int, n: int, dtype: torch.dtype
) -> None:
    """Also those that a Cayley transform alone or a product of reflections alone misses."""
    layer = OrthogonalLinear(n, m, method=method, dtype=dtype)  # type: ignore[arg-type]
    eye = torch.eye(m, n, dtype=dtype)
    drawn = haar(m, n, dtype)
    for weight in (drawn, -drawn, drawn.flip(0), eye, -eye, eye.flip(0)):
        layer.weight = weight
        assert raw(layer).shape == (m, n)
        assert (layer.weight - weight).abs().max() < 10 * tolerance(m, n, dtype)
        assert_orthonormal(layer.weight)


@pytest.mark.parametrize("method", METHODS)
def test_an_assigned_weight_can_be_trained(method: str) -> None:
    layer = OrthogonalLinear(6, 6, method=method, dtype=torch.float64)  # type: ignore[arg-type]
    layer.weight = torch.eye(6, dtype=torch.float64).flip(0)
    losses = train(layer, torch.optim.Adam(layer.parameters(), lr=0.02), 25)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_weights_inside_the_constraint_can_be_assigned() -> None:
    weight = 0.1 * torch.randn(3, 5)
    for layer in (SpectralNormLinear(5, 3), InfinityNormLinear(5, 3)):
        layer.weight = weight / weight.abs().sum()
        assert torch.equal(layer.weight, weight / weight.abs().sum())
    unit = UnitNormLinear(5, 3)
    unit.weight = torch.eye(3, 5)
    assert torch.equal(unit.weight, torch.eye(3, 5))


def test_drawn_weights_are_uniform_on_the_orthogonal_group() -> None:
    """Corners have mean 0 and variance 1/n, and both determinants come up."""
    layer = OrthogonalLinear(3, 3)
    weights = []
    for _ in range(600):
        layer.reset_parameters()
        weights.append(layer.weight.detach())
    weights = torch.stack(weights)
    corner = weights[:, 0, 0]
    assert corner.mean().abs() < 4 / math.sqrt(3 * 600)
    assert (corner.square().mean() - 1 / 3).abs() < 4 * math.sqrt(4 / 45 / 600)
    assert (torch.linalg.det(weights) > 0).double().mean().sub(0.5).abs() < 4 * 0.5 / math.sqrt(600)


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_draws_anew(name: str) -> None:
    layer = LAYERS[name](4, 6)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert not torch.equal(layer.bias, bias)
    assert layer.bias.abs().max() <= 0.5
    assert_constraint(name, layer.weight)


# ---------------------------------------------------------------------------------- life cycle


@pytest.fixture(params=LAYERS)
def trained(request: pytest.FixtureRequest) -> tuple[str, nn.Linear]:
    layer = LAYERS[request.param](6, 4)
    train(layer, torch.optim.Adam(layer.parameters(), lr=0.05), 5)
    return request.param, layer


def test_reading_a_weight_changes_nothing(trained: tuple[str, nn.Linear]) -> None:
    _, layer = trained
    before = copy.deepcopy(layer.state_dict())
    first = layer.weight
    assert torch.equal(first, layer.weight)
    assert torch.equal(first, layer.eval().weight)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_state_dict_round_trip(trained: tuple[str, nn.Linear]) -> None:
    name, layer = trained
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = LAYERS[name](6, 4)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), layer(x))


def test_deepcopy_is_independent(trained: tuple[str, nn.Linear]) -> None:
    _, layer = trained
    twin = copy.deepcopy(layer)
    weight = layer.weight.detach().clone()
    assert torch.equal(twin.weight, weight)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2)
    assert torch.equal(layer.weight, weight)
    assert not torch.equal(twin.weight, weight)


def test_functional_call_and_vmap_over_parameters(trained: tuple[str, nn.Linear]) -> None:
    name, layer = trained
    layers = [layer, LAYERS[name](6, 4)]
    x = torch.randn(3, 6)
    state = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in layers]
    for each, values in zip(layers, state, strict=True):
        assert torch.equal(torch.func.functional_call(layer, values, (x,)), each(x))
    stacked = {key: torch.stack([each[key] for each in state]).detach() for key in state[0]}
    outputs = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, (x,)))(
        stacked
    )
    expected = torch.stack([each(x) for each in layers])
    assert torch.allclose(outputs, expected, atol=1e-5)


def test_jacobian_is_the_weight(trained: tuple[str, nn.Linear]) -> None:
    _, layer = trained
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(torch.randn(3, 6))
    assert torch.allclose(jacobian, layer.weight.expand(3, 4, 6), rtol=0, atol=1e-7)


# torch's own tracer trips over its own deprecation here
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_constraint(
    trained: tuple[str, nn.Linear], dtype: torch.dtype
) -> None:
    _, layer = trained
    expected = layer.weight
    cotangent = torch.randn(4, 6)
    (gradient,) = torch.autograd.grad(layer.weight, raw(layer), cotangent)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.weight, expected)
        assert layer(torch.randn(3, 6)).dtype == dtype
    weight = layer.weight
    with torch.autocast("cpu", dtype):
        (inside,) = torch.autograd.grad(weight, raw(layer), cotangent)
    assert torch.allclose(inside, gradient, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "polar", "cayley"])
def test_written_gradients_ignore_autocast(method: str) -> None:
    matrix = torch.randn(12, 8, requires_grad=True)
    result, cotangent = MAPS[method](matrix), torch.randn(12, 8)
    (outside,) = torch.autograd.grad(result, matrix, cotangent, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(result, matrix, cotangent)
    assert torch.equal(inside, outside)


def test_casting_a_layer_recomputes_its_weight(trained: tuple[str, nn.Linear]) -> None:
    name, layer = trained
    weight = layer.weight.detach().clone()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.weight.dtype == dtype
        assert_constraint(name, cast.weight)
        assert (cast.weight.double() - weight.double()).abs().max() < 0.2


# ------------------------------------------------------------------------------ Lipschitz rules


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_bounds_are_the_exact_norms_of_the_weight(name: str, p: float) -> None:
    layer = LAYERS[name](6, 4)
    bound = lipschitz_bound(layer, (6,), p)
    norm = np.linalg.norm(layer.weight.detach().double().numpy(), p)
    assert bound.kind == "exact"
    assert bound.value == pytest.approx(norm, rel=1e-14)


def test_bounds_of_networks() -> None:
    layers = [OrthogonalLinear(6, 8), OrthogonalLinear(8, 5), Scale(-3.0)]
    assert lipschitz_bound(nn.Sequential(*layers), (6,)).value == pytest.approx(3, rel=1e-5)
    infinity = nn.Sequential(InfinityNormLinear(6, 8), InfinityNormLinear(8, 5))
    assert lipschitz_bound(infinity, (6,), math.inf).value <= 1 + 1e-6
    assert 1 <= lipschitz_bound(UnitNormLinear(6, 4), (6,)).value <= 2


def test_a_constant_may_stand_at_the_end_or_in_equal_parts_at_each_layer() -> None:
    layers = [OrthogonalLinear(6, 8, bias=False), MaxMin(), OrthogonalLinear(8, 5, bias=False)]
    at_the_end = nn.Sequential(*layers, Scale(9.0))
    at_each = nn.Sequential(layers[0], Scale(3.0), layers[1], layers[2], Scale(3.0))
    x = torch.randn(7, 6)
    assert torch.allclose(at_each(x), at_the_end(x), rtol=1e-5)
    for net in (at_each, at_the_end):
        assert lipschitz_bound(net, (6,)).value == pytest.approx(9, rel=1e-5)


def test_scale() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(Scale(-2.5)(x), -2.5 * x)
    assert repr(Scale(-2.5)) == "Scale(-2.5)"
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(Scale(-2.5), (4,), p)
        assert (bound.value, bound.kind) == (2.5, "exact")


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("function", [*MAPS.values(), clip_spectral_norm])
def test_maps_refuse_what_is_no_matrix(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"matrix must be a real floating-point tensor.*int64"):
        function(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"matrix must be a real floating-point tensor.*complex64"):
        function(torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"matrix must be a real floating-point tensor.*list"):
        function([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix must have shape \(\.\.\., m, n\), got \(3,\)"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match=r"matrix must have shape .* got \(0, 3\)"):
        function(torch.ones(0, 3))


@pytest.mark.parametrize("function", [project_l1_ball, unit_rows])
def test_row_maps_refuse_what_is_no_row(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"rows must be a real floating-point tensor.*int64"):
        function(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"rows must be a real floating-point tensor.*list"):
        function([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows must have shape \(\.\.\., n\), got \(\)"):
        function(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"rows must have shape .* got \(3, 0\)"):
        function(torch.ones(3, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bjorck(torch.eye(2), order=2), "order must be odd and positive, got 2.*even"),
        (lambda: bjorck(torch.eye(2), order=-1), "order must be odd and positive, got -1"),
        (lambda: bjorck(torch.eye(2), steps=-1), "steps must be at least 0, got -1"),
        (lambda: polar(torch.eye(2), condition=0.5), "condition must be .* >= 1, got 0.5"),
        (lambda: polar(torch.eye(2), condition=math.inf), "condition must be a finite .* got inf"),
        (lambda: polar(torch.eye(2), condition=math.nan), "condition must be a finite .* got nan"),
        (lambda: OrthogonalLinear(2, 2, method="svd"), "method must be one of .*'qr'.* got 'svd'"),  # type: ignore[arg-type]
        (lambda: Scale(math.inf), "constant must be finite, got inf"),
        (lambda: Scale(math.nan), "constant must be finite, got nan"),
    ],
)
def test_errors_name_argument_and_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_outside_the_constraint_is_refused(name: str) -> None:
    layer = LAYERS[name](5, 3)
    before = layer.weight.detach().clone()
    message = {
        "spectral": "weight must have spectral norm at most 1.*got 2",
        "infinity": "weight must have absolute row sums of at most 1.*got 2",
        "unit": "weight must have rows of norm 1.*got 2",
    }.get(name, "weight must have orthonormal rows.*got 3")
    for weight in (2 * torch.eye(3, 5), torch.full((3, 5), math.nan)):
        with pytest.raises(ValueError, match=message if weight.isfinite().all() else "got nan"):
            layer.weight = weight
        assert torch.equal(layer.weight, before)


def constraint_of(method: str) -> nn.Module:
    layer: Any = OrthogonalLinear(3, 5, method=method)  # type: ignore[arg-type]
    return type(layer.parametrizations.weight[0])()


@pytest.mark.parametrize("method", METHODS)
def test_a_tall_weight_needs_orthonormal_columns(method: str) -> None:
    layer = nn.Linear(3, 5)
    parametrize.register_parametrization(layer, "weight", constraint_of(method))
    with pytest.raises(ValueError, match=r"orthonormal columns .*assign polar\(weight\) instead"):
        layer.weight = torch.ones(5, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
def test_a_layer_starts_from_the_nearest_orthonormal_weight(
    method: str, shape: tuple[int, int]
) -> None:
    """Registered on any torch layer; judged by NumPy's singular vectors."""
    layer = nn.Linear(shape[1], shape[0])
    left, _, right = np.linalg.svd(layer.weight.detach().double().numpy(), full_matrices=False)
    parametrize.register_parametrization(layer, "weight", constraint_of(method))
    np.testing.assert_allclose(layer.weight.detach().numpy(), left @ right, rtol=0, atol=1e-5)
    assert all(raw.is_contiguous() for raw in layer.parameters())
    layer.weight = polar(torch.randn(shape))
    with pytest.raises(ValueError, match="weight must have orthonormal"):
        layer.weight = 2 * polar(torch.randn(shape))
    for rank_deficient in (torch.zeros(shape), torch.ones(shape)):
        layer = nn.Linear(shape[1], shape[0])
        layer.weight.data = rank_deficient
        parametrize.register_parametrization(layer, "weight", constraint_of(method))
        values = np.linalg.svd(layer.weight.detach().double().numpy())[1]
        assert np.abs(values - 1).max() <= 1e-6


@pytest.mark.parametrize(
    ("constraint", "nearest", "way"),
    [
        (SpectralNorm, clip_spectral_norm, "clip_spectral_norm"),
        (InfinityNorm, project_l1_ball, "project_l1_ball"),
        (UnitNorm, unit_rows, "unit_rows"),
    ],
)
def test_a_layer_starts_from_the_nearest_bounded_weight(
    constraint: Any, nearest: Any, way: str
) -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.mul_(30)
    expected = nearest(layer.weight.detach())
    parametrize.register_parametrization(layer, "weight", constraint())
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(layer.parametrizations.weight.original, expected)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=rf"assign {way}\(weight\) instead"):
        layer.weight = 30 * expected
    with pytest.raises(ValueError, match="weight must"):
        layer.weight = torch.full((3, 4), math.nan)


@pytest.mark.parametrize("constraint", [QR, Polar, Cayley, SpectralNorm, InfinityNorm, UnitNorm])
def test_kernels_of_convolutions_are_no_matrices(constraint: Any) -> None:
    with pytest.raises(ValueError, match=r"weight must be a matrix .*lipbook\.convolutions"):
        parametrize.register_parametrization(nn.Conv2d(3, 3, 3), "weight", constraint())


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_can_be_assigned(method: str) -> None:
    """The layer takes its values, and shares nothing with it."""
    other = nn.Linear(4, 4)
    nn.init.orthogonal_(other.weight)
    layer = OrthogonalLinear(4, 4, method=method)  # type: ignore[arg-type]
    layer.weight = other.weight
    expected = other.weight.detach().clone()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for raw in layer.parameters():
            raw.add_(1)
    assert torch.equal(other.weight, expected)
    assert [name for name, _ in layer.named_parameters()][-1].startswith("parametrizations")
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 4\), got \(5, 4\)"):
        layer.weight = torch.eye(5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(6, 4), (4, 6), (5, 5)])
def test_cholesky_qr_at_any_scale(dtype: torch.dtype, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, generator=generator, dtype=dtype)
    expected = cholesky_qr(matrix)
    most = 100 if dtype == torch.float32 else 500
    for power in (-most, -most // 2, most // 2, most):
        scaled = (matrix * 2.0**power).requires_grad_()
        weight = cholesky_qr(scaled)
        torch.testing.assert_close(weight, expected)
        weight.square().sum().backward()
        assert scaled.grad is not None
        assert scaled.grad.isfinite().all()
    batch = torch.stack([matrix * 2.0**most, matrix, matrix * 2.0**-most])
    torch.testing.assert_close(cholesky_qr(batch), expected.expand(3, *size))


def test_all_is_complete() -> None:
    own = {
        name
        for name, value in vars(orthogonal).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(orthogonal.__name__)
    }
    assert own == set(orthogonal.__all__)


@pytest.mark.parametrize(("m", "n", "rank"), [(4, 4, None), (5, 3, 1), (2, 6, 6)])
def test_block_reflectors(m: int, n: int, rank: int | None) -> None:
    torch.manual_seed(0)
    layer = BlockReflectorLinear(n, m, rank, dtype=torch.float64)
    V = layer.parametrizations.weight.original.detach()
    expected = torch.eye(len(V), dtype=V.dtype) - 2 * V @ torch.linalg.inv(V.mT @ V) @ V.mT
    torch.testing.assert_close(layer.weight, expected[:m, :n], rtol=1e-11, atol=1e-12)
    values = torch.linalg.eigvalsh(block_reflector(V)).round(decimals=10)
    assert values.tolist() == [-1.0] * V.shape[1] + [1.0] * (len(V) - V.shape[1])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_block_reflectors_of_any_vectors_are_orthogonal(scale: float) -> None:
    torch.manual_seed(0)
    alike = torch.randn(9, 1).expand(-1, 3)
    for vectors in (torch.randn(9, 4), alike, torch.cat((alike, torch.randn(9, 2)), 1)):
        weight = block_reflector(scale * vectors)
        assert (torch.linalg.svdvals(weight.double()) - 1).abs().max() < 1e-6
        torch.testing.assert_close(weight, weight.mT)


def test_block_reflectors_refuse_more_columns_than_rows() -> None:
    with pytest.raises(ValueError, match=r"vectors must have no more columns than rows, got"):
        block_reflector(torch.ones(2, 3))
    with pytest.raises(ValueError, match="rank must be at most 4, the larger number, got 5"):
        BlockReflectorLinear(3, 4, 5)


# ------------------------------------------------------------- long matrices, another course

LONG = (1100, 64)  # just large enough that values decide on the course


def of_condition(condition: float, m: int, n: int) -> Tensor:
    """Matrix of a condition number, its singular values in a geometric row."""
    left, right = haar(m, n), haar(n, n)
    return left * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ right


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("condition", [1, 2, 10, 300, 1e5, 1e30])
def test_long_matrices_of_any_condition_become_orthonormal(condition: float, wide: bool) -> None:
    exact = of_condition(condition, *LONG)
    matrix = exact.float()
    for name in EXACT[:2] + ["cholesky_qr", "polar"] * (condition <= 300):
        result = MAPS[name](matrix.mT.contiguous()).mT if wide else MAPS[name](matrix)
        assert_orthonormal(result)
    assert_nonexpansive(polar(matrix))
    q, r = np.linalg.qr(matrix.double().numpy())
    error = qr(matrix).double() - torch.from_numpy(q * np.sign(np.diag(r)))
    assert condition > 1e4 or error.norm() <= 1e-6 * condition


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e19, 1e36])
def test_long_matrices_of_any_scale_become_orthonormal(scale: float) -> None:
    matrix = scale * torch.randn(LONG)
    assert_orthonormal(qr(matrix))
    assert_orthonormal(qr(matrix * torch.logspace(0, -9, LONG[1])))
    assert_orthonormal(cayley(matrix))


@pytest.mark.parametrize("square", [8, 1000])
def test_cayley_transform_of_a_long_matrix_of_rank_one(square: float) -> None:
    m, n = LONG
    below = math.sqrt(square) * haar(m - n, 1) @ haar(1, n)
    assert_orthonormal(cayley(torch.cat((torch.zeros(n, n), below)).float()))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["qr", "cholesky_qr", "cayley", "polar"])
def test_derivatives_of_long_matrices_are_those_of_float64(name: str, wide: bool) -> None:
    def function(matrix: Tensor) -> Tensor:
        return MAPS[name](matrix.mT if wide else matrix).mT if wide else MAPS[name](matrix)

    exact = of_condition(3, *LONG).mT.contiguous() if wide else of_condition(3, *LONG)
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(exact.shape))

    def loss(matrix: Tensor) -> Tensor:
        return (function(matrix).square() * direction.to(matrix.dtype)).sum()

    def found(matrix: Tensor) -> list[Tensor]:
        along = direction.to(matrix.dtype)
        gradient, second = torch.func.jvp(torch.func.grad(loss), (matrix,), (along,))
        raw = matrix.clone().requires_grad_()
        (reverse,) = torch.autograd.grad(loss(raw), raw)
        forward = torch.func.jvp(function, (matrix,), (along,))[1]
        stack = torch.stack((matrix, 2 * matrix))
        batch = torch.func.vmap(function)(stack), torch.func.vmap(torch.func.grad(loss))(stack)
        return [gradient, second, reverse, forward, *batch]

    for single, double in zip(found(exact.float()), found(exact), strict=True):
        assert (single - double).norm() <= 1e-5 * double.norm()
