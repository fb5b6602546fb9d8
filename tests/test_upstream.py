"""Bugs of torch that shaped the library. The day one is mended, its test here says so.

Each test states what torch should do and is expected to fail; ``strict`` turns an unexpected pass
into an error. Then the line of the library that works around it can go.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from lipbook.export import freeze
from lipbook.orthogonal import OrthogonalLinear


def weight_after_one_step(layer: nn.Linear) -> torch.Tensor:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=1e-2)
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return layer.weight.detach()


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="torch cuts the diagonal to integers")
def test_torchs_householder_map_survives_weight_decay() -> None:
    """Its diagonal holds signs: decay makes 0.99999 of a 1, which is cut to 0, and W with it."""
    weight = weight_after_one_step(orthogonal(nn.Linear(4, 4), orthogonal_map="householder"))
    assert (torch.linalg.svdvals(weight) - 1).abs().max() < 1e-5


def test_the_householder_map_of_this_library_does() -> None:
    weight = weight_after_one_step(OrthogonalLinear(4, 4, method="householder"))
    assert (torch.linalg.svdvals(weight) - 1).abs().max() < 1e-6


def twins() -> tuple[nn.Linear, nn.Linear]:
    """A parametrized layer and its deep copy, which has another weight since."""
    layer = orthogonal(nn.Linear(4, 4))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.parametrizations.weight.original.normal_()
    return layer, twin


SHARED = "a deep copy shares the class that torch generates for a parametrized module"


@pytest.mark.xfail(strict=True, raises=AttributeError, reason=SHARED)
def test_removing_a_parametrization_from_a_copy_leaves_the_original() -> None:
    layer, twin = twins()
    weight = layer.weight
    parametrize.remove_parametrizations(twin, "weight")
    assert torch.equal(layer.weight, weight)


@pytest.mark.xfail(strict=True, raises=KeyError, reason=SHARED)
def test_registering_a_parametrization_on_a_copy_leaves_the_original() -> None:
    layer, twin = twins()
    bias = layer.bias
    parametrize.register_parametrization(twin, "bias", nn.Identity())
    assert torch.equal(layer.bias, bias)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason=SHARED)
def test_a_copy_has_its_own_weight_inside_cached() -> None:
    """The property of the class caches under the identity of the module it was made for."""
    layer, twin = twins()
    expected = twin.weight
    with parametrize.cached():
        assert not torch.equal(layer.weight, expected)
        assert torch.equal(twin.weight, expected)


def test_freezing_a_copy_leaves_the_original_and_ignores_the_cache() -> None:
    """The three above, with :func:`lipbook.export.freeze` in the place of removal."""
    layer, twin = twins()
    weights = layer.weight.detach(), twin.weight.detach()
    with parametrize.cached():
        assert torch.equal(layer.weight, weights[0])  # which is what the cache holds
        assert torch.equal(freeze(twin).weight, weights[1])
    assert torch.equal(layer.weight, weights[0])
    assert torch.equal(twin.weight, weights[1])
