from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook import residual
from lipbook.activations import MaxMin
from lipbook.composition import Box, lipschitz_bound
from lipbook.composition.bounds import graph_bound
from lipbook.convolutions import OrthogonalConv2d
from lipbook.freezing import freeze
from lipbook.graphs import trace
from lipbook.orthogonal import OrthogonalLinear, Scale
from lipbook.pooling import InvertibleDownsampling
from lipbook.residual import (
    AverageResidual,
    ConcatenatedResidual,
    CPLConv2d,
    CPLLinear,
    NormResidual,
    OrthogonalResidual,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    _RootMeanSquare,
    cpl_scale,
    sll_scale,
)
from lipbook.rounding import forward_error
from lipbook.rules import Range
from lipbook.units import units_rule

DENSE = {"sll": SLLLinear, "cpl": CPLLinear}
CONVOLUTIONS = {"sll": SLLConv2d, "cpl": CPLConv2d}
ACTIVATIONS = ("relu", "tanh", "softplus", "identity")
MODES = ("circular", "zeros")


def scatter(layer: nn.Module, scale: float) -> None:
    """Random parameters of a given size, far from where a layer starts."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=scale)


def matrix(
    weight: Tensor, size: tuple[int, int], mode: str, stride: int = 1, groups: int = 1
) -> Tensor:
    """The convolution as a matrix, one column a pixel, from torch's own layer."""
    inner, c, k, _ = weight.shape
    c *= groups
    layer = nn.Conv2d(c, inner, k, stride, k // 2, 1, groups, False, mode)
    layer = layer.to(weight.dtype)
    layer.weight.data = weight.detach()
    pixels = torch.eye(c * math.prod(size), dtype=weight.dtype).view(-1, c, *size)
    return layer(pixels).detach().flatten(1).mT


def jacobian_norm(layer: nn.Module, x: Tensor) -> float:
    jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x)
    return torch.linalg.matrix_norm(jacobian.reshape(x.numel(), x.numel()).double(), 2).item()


# ------------------------------------------------------------------------------ definition


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_layer_by_its_formula(name: str, activation: str) -> None:
    layer = DENSE[name](4, 6, activation=activation, dtype=torch.float64)
    scatter(layer, 1.0)
    sigma = {"relu": torch.relu, "tanh": torch.tanh, "softplus": nn.functional.softplus}
    x = torch.randn(5, 4, dtype=torch.float64)
    W, b, T = layer.weight, layer.bias, layer.scale()
    hidden = sigma.get(activation, lambda h: h)(x @ W.mT + b)
    expected = x - 2 * (hidden / T) @ W
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_convolution_is_the_dense_layer_of_its_matrix(
    name: str, mode: str, kernel_size: int
) -> None:
    layer = CONVOLUTIONS[name](2, 3, kernel_size, padding_mode=mode, dtype=torch.float64)
    scatter(layer, 1.0)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    W = matrix(layer.weight, (5, 6), mode)
    pixels = 30
    b, T = (v.repeat_interleave(pixels) for v in (layer.bias, layer.scale()))
    expected = x.flatten(1) - 2 * (torch.relu(x.flatten(1) @ W.mT + b) / T) @ W
    torch.testing.assert_close(layer(x).flatten(1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel_size", "stride", "groups"), [(3, 2, 1), (5, 2, 2), (1, 3, 2)])
def test_strides_and_groups_by_the_dense_layer(
    name: str, mode: str, kernel_size: int, stride: int, groups: int
) -> None:
    """The hidden image is smaller; the step, its scale and its bound are those of the matrix."""
    geometry = {"stride": stride, "groups": groups}
    layer = CONVOLUTIONS[name](
        2, 6, kernel_size, padding_mode=mode, dtype=torch.float64, **geometry
    )
    for scale in (0.3, 3.0):
        scatter(layer, scale)
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        W = matrix(layer.weight, (6, 6), mode, stride, groups)
        pixels = (6 // stride) ** 2
        b, T = (v.repeat_interleave(pixels) for v in (layer.bias, layer.scale()))
        expected = x.flatten(1) - 2 * (torch.relu(x.flatten(1) @ W.mT + b) / T) @ W
        torch.testing.assert_close(layer(x).flatten(1), expected, rtol=1e-11, atol=1e-11)
        assert torch.linalg.matrix_norm(W / T.sqrt()[:, None], 2) <= 1 + 1e-12
        for p in (1, 2, math.inf):
            bound = lipschitz_bound(layer, (2, 6, 6), p=p).value
            jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x[0]).reshape(72, 72)
            assert torch.linalg.matrix_norm(jacobian, p) <= bound * (1 + 1e-12)
            assert p != 2 or bound == pytest.approx(1, abs=1e-11)


def test_scales_with_strides_and_groups_on_paper() -> None:
    """One channel, taps 1, 2, 3 in a row: with stride 2 windows share one pixel, 1 * 3."""
    kernel = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    kernel[0, 0, 1] = torch.tensor([1.0, 2.0, 3.0])
    zero = torch.zeros(1, dtype=torch.float64)
    for stride, expected in ((1, 14 + 2 * (2 + 6) + 2 * 3), (2, 14 + 2 * 3), (3, 14)):
        assert sll_scale(kernel, zero, stride).item() == pytest.approx(expected)
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)[..., None, None]
    log_q = torch.tensor([0.0, 1.0], dtype=torch.float64)
    apart = sll_scale(matrix, log_q, groups=2)  # of which each row is alone
    torch.testing.assert_close(apart, torch.tensor([5.0, 25.0], dtype=torch.float64))
    assert cpl_scale(matrix, groups=2)[0].item() == pytest.approx(25.0)
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    for stride, times in ((1, 9), (2, 4), (3, 1)):
        assert cpl_scale(ones, stride)[0].item() == pytest.approx(9 * times)


def test_a_block_that_changes_the_shape() -> None:
    net = nn.Sequential(SLLConv2d(4, stride=2), OrthogonalConv2d(4, 8, 4, stride=2))
    assert net(torch.randn(2, 4, 8, 8)).shape == (2, 8, 4, 4)
    assert lipschitz_bound(net, (4, 8, 8)).value == pytest.approx(1, abs=1e-6)


def test_scales_on_paper() -> None:
    W = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)  # W Wᵀ = [[1, 3], [3, 25]]
    plain = sll_scale(W, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(plain, torch.tensor([4.0, 28.0], dtype=torch.float64))
    q = torch.tensor([0.0, math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(
        sll_scale(W, q), torch.tensor([1 + 3 * 2.0, 3 / 2 + 25], dtype=torch.float64)
    )


# --------------------------------------------------------------------------------- theorem


@given(st.integers(1, 7), st.integers(1, 7), st.floats(-4, 4), st.integers(0, 999), st.booleans())
def test_scales_dominate_the_gram_matrix(m: int, n: int, log: float, seed: int, q: bool) -> None:
    torch.manual_seed(seed)
    W = torch.randn(m, n, dtype=torch.float64) * 10**log
    log_q = torch.randn(m, dtype=torch.float64) * q
    for T in (sll_scale(W, log_q), cpl_scale(W)):
        left = T.rsqrt()[:, None] * W
        assert torch.linalg.matrix_norm(left, 2) <= 1 + 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@given(kernel_size=st.sampled_from([1, 3, 5]), inner=st.integers(1, 4), seed=st.integers(0, 99))
def test_convolutions_are_nonexpansive(
    name: str, mode: str, kernel_size: int, inner: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = CONVOLUTIONS[name](2, inner, kernel_size, padding_mode=mode, dtype=torch.float64)
    scatter(layer, 2.0)
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    assert jacobian_norm(layer, x) <= 1 + 1e-12
    truth = torch.linalg.matrix_norm(
        matrix(layer.weight / layer.scale().sqrt()[:, None, None, None], (5, 5), mode), 2
    )
    assert truth <= 1 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_dense_layers_are_nonexpansive(name: str, dtype: torch.dtype, scale: float) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    layer = DENSE[name](6, 9, dtype=dtype)
    scatter(layer, 1.0)
    with torch.no_grad():
        layer.weight.mul_(scale)
    for _ in range(5):
        assert jacobian_norm(layer, torch.randn(6, dtype=dtype)) <= 1 + tolerance


@pytest.mark.parametrize("make", [lambda: SLLConv2d(2, 4), lambda: CPLConv2d(2, 4)])
def test_25_steps_of_training_keep_the_bound(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x, target = torch.randn(16, 2, 6, 6), torch.randn(16, 2, 6, 6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert jacobian_norm(layer, x[0]) <= 1 + 1e-5
    assert 1 <= lipschitz_bound(layer, (2, 6, 6)).value <= 1 + 1e-5


# ------------------------------------------------------------------------------- tightness


@pytest.mark.parametrize("name", DENSE)
def test_an_orthogonal_weight_reflects_where_units_are_active(name: str) -> None:
    """W Wᵀ = T: the layer is x - 2 (x + b) for the active units, an isometry for each x."""
    layer = DENSE[name](5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q)
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x)
    values = torch.linalg.svdvals(jacobian)
    slack = 1e-12 if name == "sll" else 5 ** (1 / 32) - 1  # of the Gram iteration, squared
    assert (values - 1).abs().max() <= 4 * slack + 1e-6


def test_q_can_make_the_scale_smaller() -> None:
    """In a peer q cancels: here the trained scale of one row falls below its plain row sum."""
    W = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    log_q = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sll_scale(W, log_q).sum(), log_q)
    assert gradient.abs().min() > 0.1 or gradient.abs().max() == 0
    moved = sll_scale(W, torch.tensor([0.5, -0.5], dtype=torch.float64))
    assert moved[0] < 4


@pytest.mark.parametrize("make", [lambda: SLLLinear(4, 6), lambda: SLLConv2d(2, 3)])
def test_q_is_trained(make: Callable[[], nn.Module]) -> None:
    layer = make()
    shape = (3, 4) if isinstance(layer, SLLLinear) else (3, 2, 5, 5)
    x = torch.randn(shape)
    layer(x).square().sum().backward()
    assert layer.log_q.grad.abs().max() > 1e-4
    before = layer(x).detach()
    with torch.no_grad():
        layer.log_q.copy_(torch.linspace(-1, 1, len(layer.log_q)))
    assert (layer(x) - before).abs().max() > 1e-3


def test_a_huge_ratio_of_q_leaves_the_scale_finite() -> None:
    """Rows that do not overlap: exp(200) overflows in float32, and 0 · ∞ would be no number."""
    T = sll_scale(torch.eye(2), torch.tensor([-100.0, 100.0]))
    torch.testing.assert_close(T, torch.ones(2))


# ------------------------------------------------------------------------------ derivatives


def test_gradcheck_of_the_scales() -> None:
    W = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    q3, q2 = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(sll_scale, (W, q3))
    assert torch.autograd.gradcheck(sll_scale, (kernel, q2))
    assert torch.autograd.gradcheck(cpl_scale, (W,))
    assert torch.autograd.gradcheck(cpl_scale, (kernel,))


@pytest.mark.parametrize("make", [lambda: SLLLinear(3, 5), lambda: CPLConv2d(2, 2)])
def test_gradcheck_of_layers(make: Callable[[], nn.Module]) -> None:
    layer = make().double()
    layer.activation = "tanh"
    shape = (2, 3) if isinstance(layer, SLLLinear) else (2, 2, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: layer(z), (x, *layer.parameters()))


# ------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_bounds_hold(name: str, mode: str, p: float) -> None:
    layer = CONVOLUTIONS[name](2, 3, padding_mode=mode, dtype=torch.float64)
    scatter(layer, 1.0)
    bound = lipschitz_bound(layer, (2, 5, 5), p=p)
    assert bound.kind == "upper bound"
    for _ in range(3):
        x = torch.randn(2, 5, 5, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x).reshape(50, 50)
        assert torch.linalg.matrix_norm(jacobian, p) <= bound.value * (1 + 1e-12)
    if p == 2:
        assert bound.value == 1


def test_the_bound_does_not_trust_the_theorem(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a T four times too small the layer expands, and its bound says so."""
    layer = SLLLinear(4, 4, activation="identity", dtype=torch.float64)
    layer.scale = lambda: sll_scale(layer.weight, layer.log_q) / 4
    W, T = layer.weight.detach(), layer.scale().detach()
    truth = torch.linalg.matrix_norm(torch.eye(4) - 2 * W.mT @ (W / T[:, None]), 2).item()
    bound = lipschitz_bound(layer, (4,)).value
    assert truth > 1.1
    assert truth * (1 - 1e-12) <= bound <= truth * (1 + 1e-12)


def test_bounds_of_a_stack_multiply() -> None:
    net = nn.Sequential(SLLConv2d(2, 4), CPLConv2d(2), nn.Flatten(), SLLLinear(50, 9))
    assert 1 <= lipschitz_bound(net, (2, 5, 5)).value <= 1 + 1e-5


# ---------------------------------------------------------------------------- other dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scales_are_computed_in_float32(dtype: torch.dtype) -> None:
    layer = SLLLinear(6, 8, dtype=dtype)
    assert layer.scale().dtype == torch.float32
    x = torch.randn(3, 6, dtype=dtype)
    assert layer(x).dtype == dtype
    twin = copy.deepcopy(layer).float()
    torch.testing.assert_close(layer(x).float(), twin(x.float()), rtol=0.05, atol=0.05)


def test_autocast_does_not_reach_the_scale() -> None:
    layer = SLLConv2d(2, 3)
    outside = layer.scale()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.scale(), outside)


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SLLLinear(3, 3, activation="maxmin"), "activation must be one of"),
        (lambda: CPLLinear(0), "features must be at least 1"),
        (lambda: SLLConv2d(3, 3, 4), "kernel_size must be odd, got 4"),
        (lambda: SLLConv2d(4, 3, groups=2), "groups must divide channels 4 and inner_channels 3"),
        (lambda: SLLConv2d(2, stride=2)(torch.ones(1, 2, 4, 5)), "a size that stride divides"),
        (lambda: cpl_scale(torch.ones(3, 2, 1, 1), groups=2), "groups must divide the 3 channels"),
        (lambda: CPLConv2d(3, padding_mode="reflect"), "padding_mode must be 'circular' or"),
    ],
)
def test_errors_name_argument_and_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_all_is_complete() -> None:
    public = {
        name
        for name, value in vars(residual).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == residual.__name__
    }
    frozen = {"ConvolutionStep", "DenseStep", "SandwichStep"}  # which lipbook.export passes on
    assert public - frozen == set(residual.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 3, 3)])
def test_scales_at_any_size_of_the_weight(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """T is homogeneous of degree 2; out of range it is infinite, never too small."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    log_q = torch.randn(shape[0], generator=generator, dtype=dtype)
    most = 100 if dtype == torch.float32 else 500
    for power in (-most, -most // 2, -most // 4, most // 4, most // 2, most):
        scaled = weight * 2.0**power
        for found, at_one in (
            (cpl_scale(scaled), cpl_scale(weight)),
            (sll_scale(scaled, log_q), sll_scale(weight, log_q)),
        ):
            exact = at_one.double() * 4.0**power
            assert not found.isnan().any()
            assert (found.double() >= exact * (1 - 1e-5)).all()
            if abs(power) < most // 2:  # where T itself is in range
                torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("power", [-100, -60, -30, 30, 60, 100])
@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
def test_layers_stay_nonexpansive_at_any_size_of_the_weight(kind: Any, power: int) -> None:
    layer = kind(5)
    with torch.no_grad():
        layer.weight.mul_(2.0**power)
        layer.bias.zero_()
    x = torch.randn(5)
    jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x)
    assert np.linalg.svd(jacobian.detach().double().numpy())[1].max() <= 1 + 1e-6


STEPS = {
    "dense": (lambda: SLLLinear(6, 9), (6,)),
    "convolution": (lambda: SLLConv2d(3, 5, 3), (3, 4, 4)),
    "stride and groups": (lambda: SLLConv2d(4, 6, 3, "zeros", stride=2, groups=2), (4, 4, 4)),
    "convex": (lambda: CPLLinear(6, 9, activation="relu"), (6,)),
}


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("name", STEPS)
def test_errors_of_a_program_are_bounded_frozen_or_not(name: str, p: float) -> None:
    make, shape = STEPS[name]
    layer, x = make().eval(), torch.randn(4, *shape)
    live, frozen = forward_error(layer, x, p), forward_error(freeze(layer), x, p)
    assert torch.equal(live.error, frozen.error)
    exact = freeze(layer).double()(x.double())
    off = torch.linalg.vector_norm((layer(x).double() - exact).flatten(1), p, dim=1)
    assert (off <= live.error).all()
    assert live.lipschitz == frozen.lipschitz
    if p == 2:  # the real function does not stretch, and the program hardly
        assert 1 <= live.lipschitz < 1 + 1e-5


@pytest.mark.parametrize("name", STEPS)
def test_a_frozen_step_computes_no_scale(name: str) -> None:
    make, shape = STEPS[name]
    layer = make().eval()
    step, x = freeze(layer), torch.randn(4, *shape)
    assert type(step).__name__ in ("DenseStep", "ConvolutionStep")
    assert torch.equal(step.diagonal, layer.scale())
    assert torch.equal(step(x), layer(x))


# ---------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("alpha", [0.25, -3.0])
def test_a_prescaled_residual_is_an_average(alpha: float) -> None:
    branch, size = nn.Sequential(OrthogonalLinear(4, 4), MaxMin()), abs(alpha)
    scaled = nn.Sequential(Scale(alpha), *branch, Scale(1 / size))
    block = AverageResidual(scaled, weight=size / (1 + size), dtype=torch.float64).double()
    x = torch.randn(5, 4).double()
    assert torch.allclose(block(x), (x + branch(alpha * x)) / (1 + size), rtol=0, atol=1e-12)
    for p in (1.0, 2.0, math.inf):
        matrix = branch[0].weight.detach()
        norm = np.linalg.norm(matrix.numpy(), p)  # of the branch
        bound = lipschitz_bound(block, (4,), p).value
        assert bound == pytest.approx((1 + size * norm) / (1 + size), rel=1e-12)


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.5, 0.99])
def test_an_average_by_its_formula(weight: float) -> None:
    branch = OrthogonalLinear(4, 4, dtype=torch.float64)
    block = AverageResidual(branch, weight=weight).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    w = branch.weight.detach().numpy()
    expected = (1 - weight) * x.numpy() + weight * (x.numpy() @ w.T + branch.bias.detach().numpy())
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=0, atol=1e-7)
    skip, share = block.weights()
    assert (skip + share).item() == pytest.approx(1, abs=1e-15)
    assert share.item() == pytest.approx(weight, rel=1e-6)


@given(st.integers(1, 6), st.floats(-8, 8), st.integers(0, 99))
def test_averages_of_nonexpansive_maps_are_nonexpansive(n: int, logit: float, seed: int) -> None:
    torch.manual_seed(seed)
    branch = nn.Sequential(OrthogonalLinear(2 * n, 2 * n), MaxMin(), OrthogonalLinear(2 * n, 2 * n))
    block = AverageResidual(branch).double()
    with torch.no_grad():
        block.logit.fill_(logit)
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(block, (2 * n,), p).value
        x, y = torch.randn(2, 9, 2 * n, dtype=torch.float64)
        rise = torch.linalg.vector_norm(block(x) - block(y), p, dim=1)
        assert (rise <= bound * torch.linalg.vector_norm(x - y, p, dim=1) * (1 + 1e-12)).all()
        if p == 2:
            assert bound <= 1 + 1e-6


@pytest.mark.parametrize("number", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_bound_of_an_average_is_attained(number: float, p: float) -> None:
    """A branch that multiplies moves as the skip does; a shortcut counts with its own norm."""
    x, y = torch.randn(2, 1, 4, dtype=torch.float64)
    for shortcut, factor in ((None, 1.0), (Scale(1.0), 1.0), (Scale(3.0), 3.0)):
        block = AverageResidual(Scale(number), shortcut, weight=0.3).double()
        attained = ((block(x) - block(y)).norm(p) / (x - y).norm(p)).item()
        assert attained == pytest.approx(0.7 * factor + 0.3 * number, rel=1e-6)
        for domain in (None, Box(0, 1)):
            for net in (block, nn.Sequential(block)):
                bound = lipschitz_bound(net, (4,), p, domain=domain).value
                assert attained * (1 - 1e-12) <= bound <= attained * (1 + 1e-9)


def test_one_weight_a_channel_would_not_do() -> None:
    """What the docstring says of it: x from one channel, the branch from the other."""
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    weights = np.diag([0.0, 1.0])
    matrix = (np.eye(2) - weights) + weights @ swap
    assert np.linalg.norm(matrix, 2) == pytest.approx(math.sqrt(2))


def test_strided_and_widening_averages() -> None:
    skip = nn.Sequential(InvertibleDownsampling(2), OrthogonalConv2d(12, 16, 1))
    block = AverageResidual(OrthogonalConv2d(3, 16, 3, stride=2), skip).double()
    assert lipschitz_bound(block, (3, 4, 4)).value <= 1 + 1e-6
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: block(z[None])[0])(x).reshape(64, 48)
    assert np.linalg.norm(jacobian.detach().numpy(), 2) <= 1 + 1e-6


def test_the_weight_is_trained() -> None:
    torch.manual_seed(0)
    block = AverageResidual(Scale(-1.0))
    x = torch.randn(64, 3)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1)
    for _ in range(200):
        loss = (block(x) - 0.5 * x).square().mean()  # which wants 1 - 2 w = 1 / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert block.weights()[1].item() == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AverageResidual(nn.Tanh(), weight=0.0), r"weight must be in \(0, 1\), got 0"),
        (lambda: AverageResidual(nn.Tanh(), weight=1.0), r"weight must be in \(0, 1\), got 1"),
        (
            lambda: AverageResidual(nn.Linear(3, 1))(torch.zeros(2, 3)),
            r"shape of the skip \(2, 3\), got \(2, 1\): give a shortcut",
        ),
        (lambda: lipschitz_bound(AverageResidual(nn.Linear(3, 1)), (3,)), "must agree on the"),
        (
            lambda: lipschitz_bound(AverageResidual(nn.ReLU(inplace=True)), (3,)),
            "branch overwrites the input",
        ),
    ],
)
def test_averages_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------- roots of mean squares


@pytest.mark.parametrize("weight", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 2.0])
def test_a_root_mean_square_by_its_formula(weight: float, eps: float) -> None:
    branch = OrthogonalLinear(4, 4, dtype=torch.float64)
    block = NormResidual(branch, weight=weight, eps=eps, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    g = x.numpy() @ branch.weight.detach().numpy().T + branch.bias.detach().numpy()
    expected = np.sqrt((1 - weight) * x.numpy() ** 2 + weight * g**2 + eps)
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-14)
    assert block.weights()[1].item() == pytest.approx(weight, rel=1e-14)
    assert "eps=" in repr(block)


def test_a_root_mean_square_keeps_the_norm_that_its_parts_keep() -> None:
    skip = InvertibleDownsampling(2)
    block = NormResidual(OrthogonalConv2d(2, 8, 4, stride=2, bias=False), skip, 0.3).double()
    x = torch.randn(5, 2, 4, 6, dtype=torch.float64)
    norms = [v.flatten(1).norm(dim=1).detach().numpy() for v in (block(x), x)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
    assert lipschitz_bound(block, (2, 4, 6)).value <= 1 + 1e-6


@settings(max_examples=25)
@given(st.integers(1, 6), st.floats(-8, 8), st.sampled_from([0.0, 0.1]), st.integers(0, 99))
def test_root_mean_squares_of_nonexpansive_maps_are_nonexpansive(
    n: int, logit: float, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    branch = nn.Sequential(OrthogonalLinear(2 * n, 2 * n), MaxMin(), OrthogonalLinear(2 * n, 2 * n))
    block = NormResidual(branch, eps=eps).double()
    nn.init.constant_(block.logit, logit)
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(block, (2 * n,), p).value
        x, y = torch.randn(2, 9, 2 * n, dtype=torch.float64)
        rise = torch.linalg.vector_norm(block(x) - block(y), p, dim=1)
        assert (rise <= bound * torch.linalg.vector_norm(x - y, p, dim=1) * (1 + 1e-12)).all()
        if p == 2:
            assert bound <= 1 + 1e-6


@pytest.mark.parametrize("numbers", [(1.0, 1.0), (1.0, 3.0), (2.0, 0.5)])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_bound_of_a_root_mean_square_is_attained(
    numbers: tuple[float, float], p: float
) -> None:
    """By multiples of x, and in the 1-norm by parts that move other entries, of which 0 has none.

    A graph joins by the larger part in the maximum norm, as good where both are alike.
    """
    skip, number = numbers
    branch = nn.Linear(2, 2, bias=False)
    turn = torch.tensor([[0.0, 1.0], [1.0, 0.0]]) if p == 1 else torch.eye(2)
    branch.weight = nn.Parameter(number * turn)
    block = NormResidual(branch, Scale(skip), weight=0.3, dtype=torch.float64).double()
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    attained = block(x).norm(p).item()  # over a distance of 1 from 0, where it is 0
    roots = np.sqrt([0.7, 0.3]) * numbers
    assert attained == pytest.approx(roots.sum() if p == 1 else np.linalg.norm(roots), rel=1e-12)
    bound = lipschitz_bound(block, (2,), p)
    assert attained * (1 - 1e-12) <= bound.value <= attained * (1 + 1e-9)
    assert [part.name for part in bound.parts] == ["shortcut Scale", "branch Linear"]
    graph = graph_bound(trace(block, (2,)), p).value
    loose = max(numbers) if p == math.inf else attained
    assert attained * (1 - 1e-12) <= graph <= loose * (1 + 1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_slopes_of_a_root_mean_square_on_a_domain(eps: float) -> None:
    """Each bound of the slopes by an interval of both parts is approached somewhere in it."""
    join = _RootMeanSquare(torch.tensor(0.6).double(), torch.tensor(0.4).double(), eps)
    ends = [(-2.0, -1.0), (-1.0, 2.0), (0.0, 1.0), (0.5, 3.0), (0.0, 0.0)]
    for first, second in itertools.product(ends, ends):
        sides = [torch.linspace(*side, 61, dtype=torch.float64) for side in (first, second)]
        u, v = (grid.flatten().requires_grad_() for grid in torch.meshgrid(*sides, indexing="ij"))
        slopes = torch.autograd.grad(join(u, v).sum(), (u, v))
        ranges = [
            Range(*torch.tensor([[[low]], [[high]]], dtype=torch.float64))
            for low, high in (first, second)
        ]
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        found = join.pullback((one, torch.zeros_like(one)), ranges)
        for (middle, half), slope, side in zip(found, slopes, (first, second), strict=True):
            least, most = (middle - half).item(), (middle + half).item()
            assert least <= slope.min().item() + 1e-15
            assert slope.max().item() <= most + 1e-15
            if eps or all(abs(end) > 0 for pair in (first, second) for end in pair):
                crosses = not eps and first[0] * first[1] < 0 and second[0] * second[1] < 0
                near = 0.1 if crosses else 0.03
                assert slope.min().item() - least < near, (first, second, side)
                assert most - slope.max().item() < near
        image = join.range(ranges)
        assert image.holds(join(u, v)[:, None])
        assert image.high.item() == pytest.approx(join(u, v).max().item(), rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_of_a_root_mean_square_are_bounded(p: float, dtype: torch.dtype) -> None:
    """Float64 judges, with the weights of the program; on a domain too."""
    for scale, eps, weight in ((1.0, 0.0, 0.3), (1e-3, 1e-6, 0.5), (30.0, 0.1, 0.9)):
        block = NormResidual(nn.Linear(6, 6), weight=weight, eps=eps).to(dtype).eval()
        join = _RootMeanSquare(*(part.detach() for part in block.weights()), eps).double()
        x = (scale * torch.randn(4, 6)).to(dtype)
        y = x + (0.01 * scale * torch.randn(4, 6)).to(dtype)
        with torch.no_grad():
            result = forward_error(block, x, p)
            twin = copy.deepcopy(block.branch).double()
            exact, there = (join(z.double(), twin(z.double())) for z in (x, y))
            off = torch.linalg.vector_norm(result.outputs.double() - exact, p, dim=1)
            assert (off <= result.error).all()
            far = torch.linalg.vector_norm(y.double() - x.double(), p, dim=1)
            off = torch.linalg.vector_norm(block(y).double() - there, p, dim=1)
            assert (off <= result.error + result.slope * far).all()
            assert (
                torch.linalg.vector_norm(there - exact, p, dim=1) <= result.lipschitz * far
            ).all()
            assert (result.error <= 100 * torch.finfo(dtype).eps * (scale + 1)).all()
            alone = NormResidual(nn.Identity(), weight=weight, eps=eps).to(dtype)
            both = join(x.double(), x.double())
            off = torch.linalg.vector_norm(alone(x).double() - both, p, dim=1)
            assert (off <= forward_error(alone, x, p).error).all()
            if dtype == torch.float32:
                box = Box(x.min().item() - 1, x.max().item() + 1)
                found = forward_error(block, x, p, domain=box)
                off = torch.linalg.vector_norm(found.outputs.double() - exact, p, dim=1)
                assert (off <= found.error).all()
                assert (found.error < 1e-3 * (scale + 1)).all()


def test_a_root_mean_square_whose_squares_may_overflow_is_told() -> None:
    block = NormResidual(nn.Identity()).eval()
    for size, holds in ((1e18, True), (1e19, False)):
        x = torch.full((1, 2), size)
        assert bool(forward_error(block, x).limit > 0) is holds
        found = forward_error(block, x, domain=Box(0.0, size)).error
        assert bool(found.isfinite()) is holds


def test_a_root_mean_square_has_finite_gradients_at_zero() -> None:
    block = NormResidual(Scale(-1.0))
    x = torch.zeros(1, 3, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(NormResidual(nn.Tanh(), eps=0.1).double(), x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert NormResidual(nn.Identity())(torch.full((1, 2), 300, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("method", ["product", "lipsdp"])
def test_the_methods_of_tightness_read_a_root_mean_square(method: Any) -> None:
    """Of pairs of scaled entries; skip and branch of one linear map are joined by their norm."""
    torch.manual_seed(0)
    block = NormResidual(nn.Linear(3, 3), weight=0.4)
    net = nn.Sequential(nn.Linear(3, 3), block, nn.Linear(3, 2)).double()
    bound = lipschitz_bound(net, (3,), method=method).value
    x = 100 * torch.randn(200, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: net(z[None])[0]))(x)
    steepest = torch.linalg.matrix_norm(jacobian, 2).max().item()
    first, middle, last = (
        layer.weight.detach().numpy() for layer in (net[0], block.branch, net[2])
    )
    pair = np.concatenate([np.sqrt(0.6) * np.eye(3), np.sqrt(0.4) * middle]) @ first
    product = np.linalg.norm(pair, 2) * np.linalg.norm(last, 2)
    assert steepest <= bound
    if method == "lipsdp":
        assert bound <= product * (1 + 1e-6)
        with pytest.raises(ValueError, match="method 'absolute' does not know"):
            lipschitz_bound(net, (3,), method="absolute")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormResidual(nn.Tanh(), weight=1.0), r"weight must be in \(0, 1\), got 1"),
        (lambda: NormResidual(nn.Tanh(), eps=-1.0), "eps must be at least 0 and finite, got -1"),
        (lambda: NormResidual(nn.Tanh(), eps=math.nan), "eps must be at least 0 and finite"),
        (
            lambda: NormResidual(nn.Linear(3, 1))(torch.zeros(2, 3)),
            r"shape of the skip \(2, 3\), got \(2, 1\): give a shortcut",
        ),
        (lambda: lipschitz_bound(NormResidual(nn.Linear(3, 1)), (3,)), "must agree on the"),
        (
            lambda: lipschitz_bound(NormResidual(nn.ReLU(inplace=True)), (3,)),
            "branch overwrites the input",
        ),
    ],
)
def test_root_mean_squares_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------- rotations of halves


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.0, math.pi / 2])
def test_a_rotation_of_halves_by_its_formula(angle: float) -> None:
    branch = OrthogonalConv2d(2, 2, 3, dtype=torch.float64)
    block = OrthogonalResidual(branch, angle=angle, dtype=torch.float64)
    x = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    u, g = x[:, :2].numpy(), branch(x[:, 2:]).detach().numpy()
    c, s = math.cos(angle), math.sin(angle)
    expected = np.concatenate([c * u - s * g, s * u + c * g], 1)
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=0, atol=1e-14)


@given(st.integers(1, 4), st.floats(-4, 4), st.floats(0, 3), st.integers(0, 99))
def test_singular_values_of_a_rotation_of_halves(
    n: int, angle: float, number: float, seed: int
) -> None:
    """Those of the branch, an orthogonal one times a number, and 1."""
    torch.manual_seed(seed)
    branch = nn.Sequential(OrthogonalLinear(2 * n, 2 * n), MaxMin(), Scale(number))
    block = OrthogonalResidual(branch, angle=angle).double()
    jacobian = torch.func.jacrev(lambda z: block(z[None])[0])(torch.randn(4 * n).double())
    values = np.linalg.svd(jacobian.detach().numpy(), compute_uv=False)
    expected = sorted([1.0] * 2 * n + [number] * 2 * n, reverse=True)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    for net in (block, nn.Sequential(block)):  # by its rule, and by its graph
        assert lipschitz_bound(net, (4 * n,)).value == pytest.approx(max(1, number), abs=1e-6)


@pytest.mark.parametrize("p", [1, math.inf])
def test_what_a_rotation_costs_in_other_norms_is_attained(p: float) -> None:
    block = OrthogonalResidual(nn.Identity(), angle=0.5).double()
    matrix = block(torch.eye(4, dtype=torch.float64)).detach().numpy().T
    bound = lipschitz_bound(block, (4,), p).value
    assert bound == pytest.approx(math.cos(0.5) + math.sin(0.5), rel=1e-6)
    assert bound == pytest.approx(np.linalg.norm(matrix, {math.inf: np.inf}.get(p, p)), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrthogonalResidual(nn.Tanh())(torch.zeros(2, 3)), "even number of channels"),
        (
            lambda: OrthogonalResidual(nn.Linear(2, 1))(torch.zeros(2, 4)),
            r"keep the shape \(2, 2\) of half of the channels, got \(2, 1\)",
        ),
        (lambda: lipschitz_bound(OrthogonalResidual(nn.Linear(2, 1)), (4,)), "keep the shape"),
        (lambda: OrthogonalResidual(nn.Tanh(), angle=math.inf), "angle must be finite"),
    ],
)
def test_rotations_of_halves_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- skip and branch beside


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.0, math.pi / 2])
def test_skip_and_branch_beside_each_other_by_the_formula(angle: float) -> None:
    skip = InvertibleDownsampling(2)
    branch = OrthogonalConv2d(2, 3, 4, stride=2, dtype=torch.float64)
    block = ConcatenatedResidual(branch, skip, angle, dtype=torch.float64)
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    parts = [math.cos(angle) * skip(x).numpy(), math.sin(angle) * branch(x).detach().numpy()]
    found = block(x).detach().numpy()
    np.testing.assert_allclose(found, np.concatenate(parts, 1), rtol=0, atol=1e-14)


def test_a_branch_beside_the_skip_loses_no_norm() -> None:
    """Both keep norms, the branch by having more outputs than inputs: all singular values are 1."""
    for angle in (-3.0, math.pi / 4):
        branch = OrthogonalConv2d(2, 9, 3, stride=2)
        block = ConcatenatedResidual(branch, InvertibleDownsampling(2), angle).double()
        x = torch.randn(2, 4, 4, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda z, block=block: block(z[None])[0])(x)
        values = np.linalg.svd(jacobian.detach().reshape(-1, 32).numpy(), compute_uv=False)
        np.testing.assert_allclose(values, 1, rtol=0, atol=1e-6)
        for net in (block, nn.Sequential(block)):  # by its rule, and by its graph
            bound = lipschitz_bound(net, (2, 4, 4))
            assert bound.value == pytest.approx(1, abs=1e-6)
            assert bound.output_shape == (17, 2, 2)


@pytest.mark.parametrize("numbers", [(1.0, 1.0), (1.0, 3.0), (2.0, 0.5)])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_bound_of_parts_beside_each_other_is_attained(
    numbers: tuple[float, float], p: float
) -> None:
    skip, number = numbers
    block = ConcatenatedResidual(Scale(number), Scale(skip), -0.6).double()
    x, y = torch.randn(2, 1, 4, dtype=torch.float64)
    attained = ((block(x) - block(y)).norm(p) / (x - y).norm(p)).item()
    expected = np.linalg.norm([math.cos(0.6) * skip, math.sin(0.6) * number], p)
    assert attained == pytest.approx(expected, rel=1e-6)
    for net in (block, nn.Sequential(block)):
        bound = lipschitz_bound(net, (4,), p).value
        assert attained * (1 - 1e-12) <= bound <= attained * (1 + 1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ConcatenatedResidual(nn.AvgPool2d(2))(torch.zeros(2, 3, 4, 4)),
            r"channels only, \(2, 3, 4, 4\), got \(2, 3, 2, 2\): give a shortcut",
        ),
        (
            lambda: lipschitz_bound(ConcatenatedResidual(nn.AvgPool2d(2)), (3, 4, 4)),
            "must agree on the sizes",
        ),
        (lambda: ConcatenatedResidual(nn.Tanh(), angle=math.nan), "angle must be finite"),
        (
            lambda: lipschitz_bound(ConcatenatedResidual(nn.ReLU(inplace=True)), (3,)),
            "branch overwrites the input",
        ),
    ],
)
def test_parts_beside_each_other_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [SLLLinear, CPLLinear])
def test_the_bias_is_rounded_at_each_token(make: type[nn.Module]) -> None:
    """Equal tokens are off alike: the norm of their errors grows as the root of their number."""
    layer, x = make(4), torch.randn(1, 1, 4)  # type: ignore[call-arg]
    with torch.no_grad():
        layer.bias += 100  # type: ignore[operator]
    one, many = (forward_error(layer, x.expand(1, n, 4)).error.item() for n in (1, 64))
    assert 8 * one * (1 - 1e-6) <= many <= 8 * one * (1 + 1e-6)


# ------------------------------------------------------------------------------- sandwiches


def sandwich(n: int, m: int, inner: int, activation: Any = "relu", spread: float = 1.0) -> Any:
    layer = SandwichLinear(n, m, inner, activation, dtype=torch.float64)
    nn.init.normal_(layer.log_scale, std=spread)
    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_sandwich_by_its_formula(activation: str) -> None:
    layer = sandwich(4, 3, 5, activation)
    sigma = {
        "relu": lambda h: np.maximum(h, 0),
        "tanh": np.tanh,
        "softplus": lambda h: np.log1p(np.exp(h)),
        "identity": lambda h: h,
    }[activation]
    whole = layer.weight.detach().numpy()  # (A B)ᵀ
    A, B, psi = whole[:3].T, whole[3:].T, np.exp(layer.log_scale.detach().numpy())
    np.testing.assert_allclose(A @ A.T + B @ B.T, np.eye(5), rtol=0, atol=1e-13)
    x = np.random.default_rng(0).normal(size=(2, 6, 4))
    hidden = sigma(math.sqrt(2) * x @ B.T / psi + layer.bias.detach().numpy())
    expected = math.sqrt(2) * (psi * hidden) @ A
    found = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.floats(0, 3), st.integers(0, 99)
)
@settings(max_examples=8)
def test_no_choice_of_slopes_makes_a_sandwich_stretch(
    n: int, m: int, inner: int, spread: float, seed: int
) -> None:
    """The theorem, for any slopes in [0, 1], and for more units than inputs and outputs."""
    torch.manual_seed(seed)
    layer = sandwich(n, m, inner, spread=spread)
    outer, before = (matrix.detach().numpy() for matrix in layer.matrices())
    generator = np.random.default_rng(seed)
    for slopes in (generator.uniform(size=inner), generator.integers(0, 2, inner), np.ones(inner)):
        norm = np.linalg.norm(outer @ (slopes[:, None] * before), 2)
        assert norm <= 1 + 1e-10
    assert lipschitz_bound(layer, (n,)).value == pytest.approx(1, abs=1e-10)
    for p in (1, math.inf):
        jacobian = outer @ (generator.integers(0, 2, (inner, 1)) * before)
        bound = lipschitz_bound(layer, (n,), p).value
        assert np.linalg.norm(jacobian, p) <= bound * (1 + 1e-12)


def test_a_sandwich_attains_its_bound_where_its_matrices_agree() -> None:
    """A = B = I / √2: where units are active the layer is the identity."""
    layer = sandwich(3, 3, 3)
    with torch.no_grad():
        layer.weight = torch.cat((torch.eye(3), torch.eye(3))).double() / math.sqrt(2)
        layer.bias.fill_(100.0)
        layer.log_scale.zero_()
    x, y = torch.randn(2, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer(y), x - y, rtol=1e-12, atol=1e-12)


def test_the_bound_of_a_sandwich_trusts_no_constraint() -> None:
    """Other matrices, (A B) of norm √2: with A = B = I all units active stretch by 2."""
    layer = sandwich(3, 3, 3, "identity")
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight.data = torch.cat((torch.eye(3), torch.eye(3))).double()
    outer, before = layer.matrices()
    stretch = torch.linalg.matrix_norm(outer @ before, 2).item()
    assert stretch == pytest.approx(2)
    for net in (layer, freeze(layer)):
        assert lipschitz_bound(net, (3,)).value == pytest.approx(2, rel=1e-12)
        assert forward_error(net, torch.randn(1, 3).double()).lipschitz >= 2


def test_sorting_in_a_sandwich_would_stretch_by_two() -> None:
    """Why MaxMin is refused: A takes the first unit, B gives the second, and a swap joins them."""
    A, B, swap = np.diag([1.0, 0.0]), np.diag([0.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(A @ A.T + B @ B.T, np.eye(2))
    assert np.linalg.norm(2 * A.T @ swap @ B, 2) == 2
    with pytest.raises(ValueError, match="activation must be one of"):
        SandwichLinear(2, 2, activation="maxmin")  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_errors_of_a_sandwich_are_bounded_frozen_or_not(p: float) -> None:
    torch.manual_seed(0)
    layer = sandwich(6, 4, 9, spread=2.0).float().eval()
    x = torch.randn(4, 5, 6)
    live, frozen = forward_error(layer, x, p), forward_error(freeze(layer), x, p)
    assert torch.equal(live.error, frozen.error)
    exact = freeze(layer).double()(x.double())
    off = torch.linalg.vector_norm((layer(x).double() - exact).flatten(1), p, dim=1)
    assert (off <= live.error).all()
    assert (off > live.error / 1e4).all()
    with pytest.raises(ValueError, match="the rounding of tanh is not known"):
        forward_error(sandwich(2, 2, 2, "tanh"), torch.ones(1, 2).double())


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_convolutional_sandwich_is_the_dense_one_of_its_matrices(activation: str) -> None:
    """The matrices of its kernels, from torch's convolution; and A Aᵀ + B Bᵀ = I for them."""
    layer = SandwichConv2d(2, 3, 2, (6, 4), 5, stride=2, activation=activation).double()
    nn.init.normal_(layer.log_scale)
    outer, inner = layer.kernels()

    def as_matrix(kernel: Tensor) -> np.ndarray:  # tap t reads the pixel t ahead, on a circle
        pixels = torch.eye(5 * 6, dtype=torch.float64).view(-1, 5, 3, 2)
        around = nn.functional.pad(pixels, (0, 1, 0, 2), "circular")
        return nn.functional.conv2d(around, kernel).detach().flatten(1).mT.numpy()

    behind, before = as_matrix(outer), as_matrix(inner).T
    scale = np.repeat(layer.scale().detach().numpy(), 6)[:, None]
    whole = np.concatenate((behind.T / scale, before * scale), 1) / math.sqrt(2)
    np.testing.assert_allclose(whole @ whole.T, np.eye(30), rtol=0, atol=1e-12)
    x = torch.randn(4, 2, 6, 4, dtype=torch.float64)
    images = nn.functional.pixel_unshuffle(x, 2).flatten(1).numpy()
    hidden = images @ before.T + np.repeat(layer.bias.detach().numpy(), 6)
    sigma = {"relu": lambda h: np.maximum(h, 0), "tanh": np.tanh}[activation]
    found = layer(x).detach().flatten(1).numpy()
    np.testing.assert_allclose(found, sigma(hidden) @ behind.T, rtol=0, atol=1e-12)
    slopes = np.random.default_rng(0).uniform(size=(30, 1))
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(layer, (2, 6, 4), p).value
        assert np.linalg.norm(behind @ (slopes * before), p) <= bound * (1 + 1e-12)
        assert p != 2 or bound == pytest.approx(1, abs=1e-10)


def test_the_bound_of_a_convolutional_sandwich_trusts_no_constraint() -> None:
    layer = SandwichConv2d(1, 1, 1, 2, activation="identity").double()
    parametrize.remove_parametrizations(layer, "weight")
    pixel = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    pixel[:, :, 0, 0] = 1  # A = B = I
    layer.weight.data = pixel
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer(0 * x), 2 * x)
    assert lipschitz_bound(layer, (1, 2, 2)).value == pytest.approx(2, rel=1e-10)
    with pytest.raises(ValueError, match="input must have the image size"):
        layer(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("p", "expected"), [(1, 6.0), (math.inf, 8.0)])
def test_bounds_of_a_sandwich_in_other_norms_are_attained(
    convolution: bool, p: float, expected: float
) -> None:
    """2 Aᵀ B = 2 (3, 1): the largest column, and the row."""
    layer: Any = SandwichLinear(2, 1, activation="identity")
    if convolution:
        layer = SandwichConv2d(2, 1, 1, 1, activation="identity")
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight.data = torch.tensor([1.0, 3.0, 1.0]).view(3, 1, *[1, 1] * convolution)
    for net in (layer, freeze(layer)):
        shape = (2, 1, 1) if convolution else (2,)
        assert lipschitz_bound(net, shape, p).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["dense", "tokens", "frozen", "convolution"])
def test_units_of_a_sandwich(kind: str, activation: Any) -> None:
    """The matrices around them give the layer, and LipSDP finds the scale that proves 1."""
    shape: tuple[int, ...] = {"tokens": (2, 3), "convolution": (2, 4, 4)}.get(kind, (3,))
    layer: nn.Module = sandwich(3, 4, 3, activation, 0.3)
    if kind == "convolution":
        layer = SandwichConv2d(2, 3, 2, (4, 4), 1, 2, activation, dtype=torch.float64)
        nn.init.normal_(layer.log_scale, std=0.3)  # type: ignore[arg-type]
    layer = freeze(layer) if kind == "frozen" else layer
    units = units_rule(layer.double(), shape)
    assert units is not None
    sigma: Any = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "softplus": nn.functional.softplus,
        "identity": nn.Identity(),
    }[activation]
    x = torch.randn(20, *shape, dtype=torch.float64)
    bias = layer.bias.detach()
    bias = bias.expand(4) if kind == "convolution" else bias.repeat(math.prod(shape) // 3)
    assert units.before is not None
    assert units.behind is not None
    y = sigma(x.flatten(1) @ units.before.mT + bias) @ units.behind.mT
    with torch.no_grad():
        torch.testing.assert_close(layer(x).flatten(1), y, rtol=1e-12, atol=1e-13)
    assert units.piecewise_linear == (activation in ("relu", "identity"))
    if units.piecewise_linear:
        torch.testing.assert_close(units(x.flatten(1)), y, rtol=1e-12, atol=1e-13)
    bound = lipschitz_bound(nn.Sequential(layer, nn.Flatten()), shape, method="lipsdp").value
    assert bound <= 1 + 1e-4
    if kind == "dense" and activation == "relu":
        exact = lipschitz_bound(nn.Sequential(layer), shape, method="exact")
        assert exact.kind == "exact"
        assert exact.value <= bound * (1 + 1e-9)


def test_gradcheck_of_a_sandwich() -> None:
    layer = sandwich(3, 2, 4, "tanh")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: layer(z), (x, *layer.parameters()))


def test_a_sandwich_freezes_to_two_matrices() -> None:
    layer = sandwich(4, 3, 5).float()
    step = freeze(layer)
    assert {name for name, _ in step.named_parameters()} == {"outer", "inner", "bias"}
    for found, expected in zip((step.outer, step.inner), layer.matrices(), strict=True):
        assert torch.equal(found, expected)

    class Halved(SandwichLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    own, x = Halved(4, 3), torch.randn(2, 4)
    assert torch.equal(freeze(own)(x), own(x))
