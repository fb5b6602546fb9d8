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
    NormPooling,
    average_pooling,
    invertible_downsampling,
    invertible_upsampling,
    norm_pooling,
    upsampling,
)

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
