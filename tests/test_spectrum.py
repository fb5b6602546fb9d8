"""Singular values and stable rank of layers, against dense Jacobians of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lipbook.composition import layer_singular_values, stable_rank
from lipbook.convolutions import OrthogonalConv2d, OrthogonalConvTranspose2d
from lipbook.orthogonal import OrthogonalLinear

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(5, 3), (5,)),
    "dense, on rows": (lambda: nn.Linear(3, 2, bias=False), (4, 3)),
    "orthogonal": (lambda: OrthogonalLinear(4, 6), (4,)),
    "zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
    "circle": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 5)),
    "circle, stride": (
        lambda: nn.Conv2d(4, 4, 2, 2, groups=2, padding_mode="circular"),
        (4, 4, 6),
    ),
    "circle, cut": (lambda: nn.Conv1d(2, 2, 3, padding=0, padding_mode="circular"), (2, 6)),
    "circle, dilated": (
        lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"),
        (2, 7),
    ),
    "reflections": (lambda: nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 1, 3, 2), (2, 3, 3)),
    "bcop": (lambda: OrthogonalConv2d(2, 8, 4, stride=2), (2, 4, 4)),
    "bcop, transposed": (lambda: OrthogonalConvTranspose2d(8, 3, 3, stride=2), (8, 3, 2)),
    "batch norm": (lambda: nn.BatchNorm2d(2).eval(), (2, 3, 3)),
}


def dense(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    point = torch.randn(shape, dtype=torch.float64)
    matrix = torch.func.jacrev(lambda x: layer(x[None])[0])(point)
    return matrix.detach().reshape(-1, point.numel()).numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_stable_rank_of_the_dense_jacobian(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    matrix = dense(layer, shape)
    expected = np.linalg.svd(matrix, compute_uv=False)
    found = layer_singular_values(layer, shape)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13 * expected[0])
    rank = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    assert stable_rank(layer, shape) == pytest.approx(rank, rel=1e-12)


def test_ranks_on_paper() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.zero_()
        assert stable_rank(layer, (4,)) == 0
        layer.weight[1] = 5.0
        assert stable_rank(layer, (4,)) == pytest.approx(1)
    mean = nn.Conv2d(1, 1, 2, 2, bias=False, padding_mode="circular")
    assert stable_rank(mean, (1, 6, 8)) == pytest.approx(12)
    assert stable_rank(OrthogonalConv2d(3, 5, 3), (3, 8, 8)) == pytest.approx(192)


def test_large_images_need_a_circle() -> None:
    kernel = {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1}
    with pytest.raises(ValueError, match=r"input_shape must be smaller.*more than 67108864"):
        layer_singular_values(nn.Conv2d(**kernel), (1, 96, 96))
    values = layer_singular_values(nn.Conv2d(**kernel, padding_mode="circular"), (1, 96, 96))
    assert len(values) == 96**2


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.MaxPool2d(2)])
def test_only_affine_layers_have_singular_values(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"layer must be affine, which .* is not known to be"):
        layer_singular_values(layer, (2, 4, 4))
