from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipbook import pooling
from lipbook.composition import lipschitz_bound
from lipbook.pooling import (
    AveragePooling,
    NormPooling,
    average_pooling,
    invertible_downsampling,
    invertible_upsampling,
    norm_pooling,
    upsampling,
)
from lipbook.rules import Range, affine_rule, range_rule

LAYERS = [getattr(pooling, name) for name in pooling.__all__ if name[0].isupper()]
FUNCTIONS = [getattr(pooling, name) for name in pooling.__all__ if name[0].islower()]
WINDOWS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jacrev(function)(x).reshape(-1, x.numel())


@settings(max_examples=40)
@given(WINDOWS)
def test_each_map_by_its_definition(axes: list[tuple[int, int]]) -> None:
    window, counts = zip(*axes, strict=True)
    w = math.prod(window)
    x = torch.randn(2, 2, *(s * n for s, n in axes), dtype=torch.float64)
    down, norm, mean = (
        f(x, window) for f in (invertible_downsampling, norm_pooling, average_pooling)
    )
    up = upsampling(mean, window)
    for cell in itertools.product(*map(range, counts)):
        offsets = list(itertools.product(*map(range, window)))
        pixels = [
            (
                slice(None),
                slice(None),
                *(s * i + a for s, i, a in zip(window, cell, o, strict=True)),
            )
            for o in offsets
        ]
        values = torch.stack([x[p] for p in pixels], 2)
        at: tuple[Any, ...] = (slice(None), slice(None), *cell)
        assert torch.equal(down[at], values.flatten(1))
        assert torch.allclose(norm[at], values.square().sum(2).sqrt(), rtol=1e-13)
        assert torch.allclose(mean[at], values.sum(2) / math.sqrt(w), rtol=1e-13, atol=1e-13)
        assert all(torch.allclose(up[p], mean[at] / math.sqrt(w), rtol=1e-13) for p in pixels)
    assert torch.equal(invertible_upsampling(down, window), x)
    assert torch.equal(invertible_downsampling(invertible_upsampling(down, window), window), down)
    assert torch.allclose(average_pooling(up, window), mean, rtol=1e-13, atol=1e-13)


def test_torch_agrees_on_images() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(invertible_downsampling(x, 2), functional.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("window", [(2,), (2, 3), (2, 1, 2)])
def test_jacobian_and_rules(layer: type[nn.Module], window: tuple[int, ...]) -> None:
    shape = (math.prod(window), *(2 * s for s in window))
    module = layer(window)
    x = torch.ones(1, *shape, dtype=torch.float64)  # constant windows attain the factors √w
    matrix = jacobian(module, x)
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(values, torch.ones_like(values), rtol=0, atol=1e-13)
    single = torch.zeros_like(x)
    single[(0, 0, *(0 for _ in window))] = 1  # a single pixel attains the others
    for p in (1, 2, math.inf):
        norm = torch.linalg.matrix_norm(matrix, p).item()
        attained = module(single).norm(p).item() if p == 1 else norm
        bound = lipschitz_bound(module, shape, p)
        assert bound.kind == "exact"
        assert bound.value == pytest.approx(attained, rel=1e-13)


@pytest.mark.parametrize("function", [average_pooling, norm_pooling, invertible_downsampling])
@pytest.mark.parametrize("size", [(5,), (2, 3), (2, 1, 4)])
def test_a_global_window_is_as_large_as_the_image(
    function: Callable[[Tensor, Any], Tensor], size: tuple[int, ...]
) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    found = function(x, "global")
    assert torch.equal(found, function(x, size))
    assert found.shape[2:] == (1,) * len(size)
    layer = getattr(pooling, function.__name__.title().replace("_", ""))("global")
    assert torch.equal(layer(x), found)
    for p in (1, 2, math.inf):
        expected = lipschitz_bound(type(layer)(size), (3, *size), p)
        assert lipschitz_bound(layer, (3, *size), p).value == expected.value
    assert repr(layer) == f"{type(layer).__name__}(window='global')"
    for wrong in ("whole", ""):
        with pytest.raises(ValueError, match=r"window must be .*positive integer"):
            function(x, wrong)


def test_no_window_of_upsampling_is_global() -> None:
    for layer in (pooling.Upsampling, pooling.InvertibleUpsampling):
        with pytest.raises(ValueError, match="window must be one or more positive integers"):
            layer("global")


CROPS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative padding": lambda x: functional.pad(x, (-1, -1, -2, 0)),
    "slices": lambda x: x[:, :, 1:-1, 2:],
    "the largest pixel": lambda x: functional.adaptive_max_pool2d(x, 1),
}


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_crops_of_torch_have_constant_one(name: str, p: float) -> None:
    class Crop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CROPS[name](x)

    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    assert torch.linalg.matrix_norm(jacobian(Crop(), x), p).item() == 1
    bound = lipschitz_bound(Crop(), (2, 4, 5), p)
    assert (bound.value, bound.kind) == (1, "exact")


def test_norm_pooling_keeps_norms_and_has_finite_gradients_at_zero() -> None:
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    assert norm_pooling(x, 2).norm().item() == pytest.approx(x.norm().item(), rel=1e-13)
    x[..., :2, :2] = 0
    x.requires_grad_()
    norm_pooling(x, 2).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[..., :2, :2].any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_and_dtypes(function: Callable[[Tensor, int], Tensor]) -> None:
    x = torch.randn(1, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, 2), x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert function(x.detach().to(dtype), 2).dtype == dtype


@pytest.mark.parametrize("function", [invertible_downsampling, norm_pooling, average_pooling])
def test_sizes_that_do_not_divide(function: Callable[[Tensor, int], Tensor]) -> None:
    with pytest.raises(ValueError, match=re.escape("size (4, 5), got (2, 2)")):
        function(torch.zeros(1, 1, 4, 5), 2)


# ------------------------------------------------------------------------ overlapping windows

STRIDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    # window, stride, padding, size
    "a stride that divides": ((4,), (2,), (0,), (8,)),
    "a stride that does not": ((3,), (2,), (0,), (7,)),
    "single steps": ((3,), (1,), (0,), (5,)),
    "padded": ((3,), (2,), (1,), (6,)),
    "padded without overlap": ((2,), (2,), (1,), (4,)),
    "one window": ((3,), (1,), (0,), (3,)),
    "few windows": ((5,), (1,), (0,), (6,)),
    "images": ((3, 2), (2, 1), (1, 0), (5, 4)),
    "volumes": ((2, 1, 3), (1, 1, 2), (1, 0, 0), (2, 2, 3)),
    "four axes": ((2, 1, 3, 2), (1, 1, 2, 2), (1, 0, 0, 1), (2, 1, 3, 2)),
}
strided = pytest.mark.parametrize("name", STRIDED)


def read_by(name: str) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Each window, and its pixels, by going through them."""
    window, stride, padding, size = STRIDED[name]
    counts = [
        (n + 2 * pad - k) // s + 1
        for n, k, s, pad in zip(size, window, stride, padding, strict=True)
    ]
    found = []
    for cell in itertools.product(*map(range, counts)):
        pixels = [
            tuple(
                i * s - pad + a for i, s, pad, a in zip(cell, stride, padding, offset, strict=True)
            )
            for offset in itertools.product(*map(range, window))
        ]
        inside = [
            pixel for pixel in pixels if all(0 <= q < n for q, n in zip(pixel, size, strict=True))
        ]
        found.append((cell, inside))
    return found


def most_windows(name: str) -> int:
    """What squares are divided by: in so many windows a pixel is on large images."""
    window, stride, _, _ = STRIDED[name]
    return math.prod(math.ceil(k / s) for k, s in zip(window, stride, strict=True))


@strided
def test_overlapping_windows_by_their_definition(name: str) -> None:
    *geometry, size = STRIDED[name]
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    norm, mean = norm_pooling(x, *geometry), average_pooling(x, *geometry)
    m, w = most_windows(name), math.prod(geometry[0])
    for cell, pixels in read_by(name):
        values = torch.stack([x[(slice(None), slice(None), *pixel)] for pixel in pixels], -1)
        at: Any = (slice(None), slice(None), *cell)
        expected = values.square().sum(-1).sqrt() / math.sqrt(m)
        assert torch.allclose(norm[at], expected, rtol=1e-13)
        expected = values.sum(-1) / math.sqrt(w * m)
        assert torch.allclose(mean[at], expected, rtol=1e-13, atol=1e-14)
    assert norm.shape == mean.shape
    assert norm[0, 0].numel() == len(read_by(name))
    for layer, found in ((NormPooling, norm), (AveragePooling, mean)):
        assert torch.equal(layer(*geometry)(x), found)


@strided
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_constants_of_overlapping_windows_are_attained(name: str, p: float) -> None:
    *geometry, size = STRIDED[name]
    norm, mean = NormPooling(*geometry), AveragePooling(*geometry)
    x = torch.zeros(1, 1, *size, dtype=torch.float64)
    bound = lipschitz_bound(mean, (1, *size), p)
    exact = torch.linalg.matrix_norm(jacobian(mean, x), p).item()
    assert (bound.kind, bound.value) == ("exact", pytest.approx(exact, rel=1e-12))
    bound = lipschitz_bound(norm, (1, *size), p)
    pixels = torch.eye(math.prod(size), dtype=torch.float64).view(-1, 1, *size)
    steps = torch.cat((pixels, torch.ones_like(x)))  # from 0, whose image is 0
    rises = norm(steps).flatten(1).norm(p, dim=1) / steps.flatten(1).norm(p, dim=1)
    assert (bound.kind, bound.value) == ("exact", pytest.approx(rises.max().item(), rel=1e-12))
    if p == 2:
        assert max(lipschitz_bound(each, (1, *size)).value for each in (norm, mean)) <= 1 + 1e-12
    x, y = torch.randn(2, 50, 1, *size, dtype=torch.float64)
    for layer in (norm, mean):
        off, far = ((a - b).flatten(1).norm(p, dim=1) for a, b in ((layer(x), layer(y)), (x, y)))
        limit = lipschitz_bound(layer, (1, *size), p).value
        assert (off <= limit * far * (1 + 1e-12)).all()


def test_overlapping_windows_come_close_to_norm_one() -> None:
    for layer, shape in (
        (AveragePooling(4, 2), (1, 200)),
        (AveragePooling(2, 1), (1, 60, 60)),
        (NormPooling(3, 2, 1), (1, 6, 8)),
    ):
        assert 0.998 < lipschitz_bound(layer, shape).value <= 1 + 1e-12


@strided
def test_ranges_of_overlapping_windows_hold_samples(name: str) -> None:
    *geometry, size = STRIDED[name]
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    reach = torch.full((3,), 0.3 * math.sqrt(x[0].numel()), dtype=torch.float64)
    values = Range(x - 0.3, x + 0.3, x, reach)
    z = x + 0.3 * (2 * torch.rand(20, *x.shape, dtype=torch.float64) - 1)
    for layer in (NormPooling(*geometry), AveragePooling(*geometry)):
        image, found = layer(z.flatten(0, 1)).unflatten(0, (20, 3)), range_rule(layer, values)
        assert found.holds(image)
        assert found.center is not None
        assert found.radius is not None
        assert ((image - found.center).flatten(2).norm(dim=2) <= found.radius).all()
        widths = (found.high - found.low).amax().item()
        assert widths <= 2 * 0.3 * lipschitz_bound(layer, (2, *size), math.inf).value + 1e-10


@pytest.mark.parametrize("layer", [*LAYERS, AveragePooling])
def test_linear_layers_are_matrices(layer: Any) -> None:
    window = {"stride": 1} if layer is AveragePooling else {}
    module, shape = layer(2, **window), (4, 4, 2)
    affine = affine_rule(module, shape)
    if layer is NormPooling:
        assert affine is None
        return
    assert affine is not None
    matrix = jacobian(module, torch.zeros(1, *shape, dtype=torch.float64))
    assert torch.equal(affine.matrix(shape), matrix)
    v = torch.rand(3, *shape, dtype=torch.float64)
    assert torch.allclose(affine.absolute(v).flatten(1), v.flatten(1) @ matrix.abs().mT)
    assert affine.squares is not None
    assert torch.allclose(affine.squares(v).flatten(1), v.flatten(1) @ matrix.square().mT)
    assert affine.terms >= matrix.count_nonzero(1).max()


@pytest.mark.parametrize("layer", [NormPooling(2), NormPooling(3, 1), NormPooling(3, 2, 1)])
def test_units_of_norm_pooling_bound_networks(layer: NormPooling) -> None:
    """No method that reads the units says less than the steepest point, or more than norms do."""
    torch.manual_seed(0)
    size = 4 if layer.stride is None else 5
    net = nn.Sequential(nn.Linear(3, size), nn.Unflatten(1, (1, size)), layer, nn.Flatten())
    net.append(nn.Linear(net(torch.zeros(1, 3)).shape[1], 2)).double()
    x = 100 * torch.randn(100, 3, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: net(z[None])[0]))(x)
    steepest = torch.linalg.matrix_norm(jacobians, 2).max().item()
    bound = lipschitz_bound(net, (3,), method="lipsdp").value
    assert steepest <= bound <= lipschitz_bound(net, (3,)).value * (1 + 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norm_pooling(x, 2, 3), r"stride must be at most the window \(2, 2\)"),
        (lambda x: norm_pooling(x, 3, 2, 2), "padding at most half of it, got"),
        (lambda x: norm_pooling(x, 3, 2), r"leave no pixel of the size \(4, 4\) out"),
        (lambda x: norm_pooling(x, 5, 1), "leave no pixel"),
        (lambda x: average_pooling(x, 2, (1, 1, 1)), "stride must be a positive integer, or one"),
        (lambda x: average_pooling(x, 2, 1, -1), "padding must be a nonnegative integer, or one"),
        (lambda x: average_pooling(x, "global", 1), "left out with a global window, got 1 and 0"),
        (lambda x: NormPooling("global", padding=1), "left out with a global window"),
        (lambda x: NormPooling(2, 0), "stride must be one or more positive integers, got 0"),
        (lambda x: AveragePooling(2, 1, -1), "padding must be one or more nonnegative integers"),
    ],
)
def test_windows_that_do_not_fit_are_refused(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4, 4))


def test_repr_shows_how_windows_move() -> None:
    assert repr(NormPooling(3, 2, 1)) == "NormPooling(window=3, stride=2, padding=1)"
    assert repr(AveragePooling((3, 2), (1, 2))) == "AveragePooling(window=(3, 2), stride=(1, 2))"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="got 6 channels"):
        invertible_upsampling(torch.zeros(1, 6, 2, 2), 2)
    for layer in LAYERS:
        for window in (0, (), (2, -1)):
            with pytest.raises(ValueError, match="window must be one or more positive"):
                layer(window)
    with pytest.raises(ValueError, match="one for each axis"):
        upsampling(torch.zeros(1, 1, 4), (2, 2))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_norm_pooling_at_random_inputs(p: float) -> None:
    """Its Jacobian varies: rows are unit vectors, and no p-norm of it exceeds the rule's."""
    layer = NormPooling(2)
    bound = lipschitz_bound(layer, (2, 4, 4), p=p).value
    for _ in range(5):
        x = torch.randn(2, 4, 4, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda z: layer(z[None])[0])(x).reshape(8, 32)
        assert (torch.linalg.svdvals(jacobian) - 1).abs().max() < 1e-14
        assert torch.linalg.matrix_norm(jacobian, p) <= bound * (1 + 1e-13)
