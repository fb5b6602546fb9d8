"""Starts of layers: kernels of one tap, by their definition and by what the layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from lipbook.activations import MaxMin
from lipbook.convolutions import (
    NonexpansiveConv2d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose2d,
    identity_,
    orthogonal_,
)
from lipbook.orthogonal import OrthogonalLinear, SpectralNormLinear
from lipbook.orthogonal.layers import Method

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    **{
        method: lambda method=method: OrthogonalLinear(6, 4, method=method)
        for method in get_args(Method)
    },
    "convolution": lambda: nn.Conv2d(4, 6, (3, 5)),
    "convolution, groups": lambda: nn.Conv1d(4, 8, 3, groups=2),
    "bcop": lambda: OrthogonalConv2d(6, 4, 3),
    "bcop, wide": lambda: OrthogonalConv2d(4, 6, (5, 3)),
    "bcop, groups": lambda: OrthogonalConv2d(8, 4, 3, groups=2),
    "bcop, 1-D": lambda: OrthogonalConv1d(4, 4, 5),
    "bcop, 3-D": lambda: OrthogonalConv3d(4, 4, 3),
    "bcop, one pixel": lambda: OrthogonalConv2d(3, 5, 1),
}


def middle(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Matrices (groups, m, n) of the middle tap, and all other taps."""
    weight = layer.weight.detach().clone().unflatten(0, (getattr(layer, "groups", 1), -1))
    weight = weight.flatten(3) if weight.dim() > 3 else weight[..., None]
    center = weight.shape[-1] // 2
    others = torch.cat((weight[..., :center], weight[..., center + 1 :]), -1)
    return weight[..., center], others


@pytest.mark.parametrize("name", LAYERS)
def test_one_tap_is_a_matrix_and_the_others_are_zero(name: str) -> None:
    layer = LAYERS[name]()
    bias = layer.bias.detach().clone()
    assert identity_(layer) is layer
    matrix, others = middle(layer)
    assert torch.allclose(matrix, torch.eye(*matrix.shape[1:]).expand_as(matrix), atol=2e-6)
    orthogonal_(layer, torch.Generator().manual_seed(5))
    drawn, rest = middle(layer)
    assert (torch.linalg.svdvals(drawn.double()) - 1).abs().max() < 2e-6
    assert not torch.allclose(drawn, matrix, atol=0.1)
    assert torch.cat((others.flatten(), rest.flatten())).norm() < 5e-6
    assert torch.equal(layer.bias, bias)
    twin = orthogonal_(LAYERS[name](), torch.Generator().manual_seed(5))
    assert torch.equal(middle(twin)[0], drawn)


@pytest.mark.parametrize("start", [identity_, orthogonal_])
def test_a_started_convolution_learns(start: Callable[[nn.Module], nn.Module]) -> None:
    layer = OrthogonalConv2d(4, 4, 3)
    start(layer)
    net = nn.Sequential(layer, MaxMin())
    x = torch.randn(8, 4, 5, 5)
    target = x.roll(1, -1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    response = torch.fft.fft2(layer.weight.detach().double(), s=(8, 8)).permute(2, 3, 0, 1)
    assert (torch.linalg.svdvals(response) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (OrthogonalConv2d(3, 2, 3), ValueError, "projectors of half its channels.*rank 1 of 3"),
        (OrthogonalConv2d(4, 4, 2), ValueError, r"odd kernel and no stride.*\(2, 2\)"),
        (nn.Conv2d(4, 4, 3, 2), ValueError, r"odd kernel and no stride.*stride \(2, 2\)"),
        (OrthogonalConvTranspose2d(4, 4, 3), TypeError, "layer must be Linear, .* got Param"),
        (NonexpansiveConv2d(4, 4, 3), TypeError, "layer must be Linear, .* got Parametrized"),
        (SpectralNormLinear(4, 4), TypeError, "layer must be Linear, .* got Parametrized"),
    ],
)
def test_other_layers_are_refused(layer: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        identity_(layer)
