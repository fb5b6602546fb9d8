"""Attention with a constant, against sums over pairs of tokens and Hessians by differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipbook.attention import (
    EnergyAttention,
    EnergyStep,
    attention_energy,
    energy_attention,
    energy_curvature,
)
from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
from lipbook.freezing import freeze

double = torch.float64
shapes = st.tuples(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)
)  # tokens, heads, size of a head, features
scales = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e3])
seeds = st.integers(0, 1000)


def draw(shape: tuple[int, int, int, int], a: float, b: float, x: float) -> list[Tensor]:
    tokens, heads, size, features = shape
    return [
        x * torch.randn(2, tokens, features, dtype=double),
        a * torch.randn(heads, size, features, dtype=double),
        b * torch.randn(heads, size, features, dtype=double),
    ]


# -------------------------------------------------------------------------- the definition


def energy_by_pairs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum over heads and tokens of one sample, a norm at a time."""
    total = x.new_zeros(())
    root = math.sqrt(max(1.0, len(x) / 2))
    for query, key in zip(a, b, strict=True):
        for one in x:
            norms = [torch.linalg.vector_norm(query @ one + key @ other / root) for other in x]
            parts = [torch.logaddexp(r, -r) - math.log(2) for r in norms]
            total = total + torch.stack(parts).logsumexp(0)
    return total


@settings(max_examples=15)
@given(shapes, scales, scales, seeds)
def test_the_step_is_along_the_gradient_of_the_energy(
    shape: tuple[int, int, int, int], weight: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, a, b = draw(shape, weight, weight, size)
    energies = []
    for tokens, found in zip(x, energy_attention(x, a, b, step=0.3), strict=True):
        leaf = tokens.clone().requires_grad_()
        energies.append(energy_by_pairs(leaf, a, b))
        (gradient,) = torch.autograd.grad(energies[-1], leaf)
        torch.testing.assert_close(found, tokens - 0.3 * gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(attention_energy(x, a, b), torch.stack(energies).detach())


def test_two_tokens_on_paper() -> None:
    """Norms 1, 0, 0, 1: a token moves by (sinh 1 + sinh 1) / (cosh 1 + 1) of one and the other."""
    one = torch.ones(1, 1, 1, dtype=double)
    x = torch.tensor([[[0.5], [-0.5]]], dtype=double)
    moved = 2 * math.sinh(1) / (math.cosh(1) + 1)
    expected = x - 0.25 * moved * torch.tensor([[[1.0], [-1.0]]], dtype=double)
    torch.testing.assert_close(energy_attention(x, one, one, step=0.25), expected)


@pytest.mark.parametrize("dtype", [torch.float32, double])
def test_the_series_near_zero_meets_the_functions(dtype: torch.dtype) -> None:
    """One token with A = 1, B = 0: log cosh and its derivative, on both sides of the seam."""
    x = torch.logspace(-9, 1, 4001, dtype=double)
    a, b = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    tokens = x.to(dtype).view(-1, 1, 1)
    tolerance = 8 * torch.finfo(dtype).eps
    small = x.to(dtype).double()
    expected = torch.log1p(2 * (small / 2).sinh().square())  # log cosh without a difference
    energy = attention_energy(tokens, a, b).double()
    allowed = torch.where(small.square() < 2.0**-10, small.square(), 1 + small)
    assert bool(((energy - expected).abs() <= tolerance * allowed).all())
    slopes = (tokens - energy_attention(tokens, a, b, step=1.0)).flatten().double()
    assert bool(((slopes - small.tanh()).abs() <= tolerance * small).all())


# ----------------------------------------------------------------------------- the theorem


def curvatures(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    hessian: Any = torch.autograd.functional.hessian(
        lambda tokens: attention_energy(tokens[None], a, b)[0], x
    )
    return torch.linalg.eigvalsh(hessian.reshape(x.numel(), x.numel()))


@settings(max_examples=40)
@given(shapes, scales, scales, scales, seeds)
def test_the_curvature_lies_between_0_and_the_bound(
    shape: tuple[int, int, int, int], a_size: float, b_size: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, a, b = draw(shape, a_size, b_size, size)
    values = curvatures(x[0], a, b)
    norms = [torch.linalg.matrix_norm(w.flatten(0, 1), 2) for w in (a, b)]
    sharp, bound = (norms[0] + norms[1]) ** 2, energy_curvature(a, b)
    assert values[0] >= -1e-9 * sharp
    assert values[-1] <= sharp * (1 + 1e-9)
    assert values[-1] <= bound * (1 + 1e-9)
    assert bound <= 2 * sharp


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_bound_is_attained(tokens: int) -> None:
    """A = B and tokens at 0 that move alike: the curvature is (1 + 1)^2."""
    eye = torch.eye(1, dtype=double)[None]
    values = curvatures(torch.zeros(tokens, 1, dtype=double), eye, eye)
    assert abs(values[-1].item() - 4) <= 1e-9
    assert abs(energy_curvature(eye, eye).item() - 4) <= 1e-9


@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_half_of_the_tokens_is_attained(tokens: int) -> None:
    """Two far tokens that all read in halves: n/2 is the curvature of the keys' part."""
    a, b = torch.zeros(1, 1, 1, dtype=double), torch.ones(1, 1, 1, dtype=double)
    x = torch.zeros(tokens, 1, dtype=double)
    x[0], x[1] = 200.0, -200.0
    assert abs(curvatures(x, a, b)[-1].item() - 1) <= 1e-9


@given(shapes, scales, seeds)
def test_no_two_inputs_are_further_apart_behind_it(
    shape: tuple[int, int, int, int], size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, a, b = draw(shape, 1.0, 1.0, size)
    y = energy_attention(x, a, b)
    assert (y[0] - y[1]).norm() <= (x[0] - x[1]).norm() * (1 + 1e-9)
    assert y[0].norm() <= x[0].norm() * (1 + 1e-9)


def test_the_longest_step_turns_tokens_round() -> None:
    """At the bound of the curvature the eigenvalue is -1; ascent finds no more."""
    torch.manual_seed(0)
    layer = EnergyAttention(1).double()
    with torch.no_grad():
        layer.query_weight.fill_(0.7)
        layer.key_weight.fill_(0.7)
    x = 1e-4 * torch.ones(1, 2, 1, dtype=double)
    torch.testing.assert_close(layer(x), -x)
    below = lipschitz_lower_bound(layer, x.clone(), steps=5)
    assert 0.99 < below.value <= 1 + 1e-9
    assert lipschitz_bound(layer, (2, 1)).value == 1


@settings(max_examples=15)
@given(shapes, st.sampled_from([1, math.inf]), seeds)
def test_other_norms(shape: tuple[int, int, int, int], p: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = EnergyAttention(shape[3], shape[1], shape[2]).double()
    x, y = torch.randn(2, 8, shape[0], shape[3], dtype=double)
    rise, run = (
        torch.linalg.vector_norm(d.flatten(1), p, dim=1) for d in (layer(x) - layer(y), x - y)
    )
    assert bool((rise <= lipschitz_bound(layer, x.shape[1:], p).value * run * (1 + 1e-9)).all())


def test_the_rule_measures_the_step_of_a_frozen_layer() -> None:
    torch.manual_seed(0)
    frozen: Any = freeze(EnergyAttention(1).double())
    assert isinstance(frozen, EnergyStep)
    with torch.no_grad():
        frozen.length *= 2
    below = lipschitz_lower_bound(frozen, 0.01 * torch.randn(4, 1, 1, dtype=double), steps=20)
    above = lipschitz_bound(frozen, (1, 1)).value
    assert below.value <= above <= 3 * (1 + 1e-9)
    expected = 2 * (1 + 1) ** 2 * frozen.length.item() / 2 - 1  # one token, |A| = |B| = 1
    assert abs(above - expected) <= 1e-9


# --------------------------------------------------------------------------------- padding


def test_padding_is_no_part_of_the_set() -> None:
    torch.manual_seed(0)
    layer = EnergyAttention(4, 2).double()
    x = torch.randn(4, 6, 4, dtype=double)
    counts = (6, 3, 1, 0)
    mask = torch.arange(6) >= torch.tensor(counts)[:, None]
    y = layer(x, mask)
    garbage = x.masked_fill(mask[..., None], math.nan)
    for k, count in enumerate(counts):
        assert torch.equal(y[k, count:], x[k, count:])
        assert torch.equal(layer(garbage, mask)[k, :count], y[k, :count])
        if count:
            torch.testing.assert_close(y[k, :count], layer(x[k : k + 1, :count])[0])
    energies = attention_energy(x, layer.query_weight, layer.key_weight, mask)
    alone = attention_energy(x[1:2, :3], layer.query_weight, layer.key_weight)
    torch.testing.assert_close(energies[1:2], alone)
    assert energies[3] == 0


def test_order_of_tokens_does_not_matter() -> None:
    layer, x = EnergyAttention(4).double(), torch.randn(2, 6, 4, dtype=double)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


# ------------------------------------------------------------------------------ the program


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_gradients_twice(size: float) -> None:
    """At 0 and where tokens cancel, too: x and -x have the norm 0 between them."""
    torch.manual_seed(0)
    x = size * torch.randn(1, 1, 2, dtype=double)
    x = torch.cat((x, -x), 1).requires_grad_()
    a = torch.randn(1, 2, 2, dtype=double, requires_grad=True)
    assert torch.autograd.gradcheck(energy_attention, (x, a, a))
    assert torch.autograd.gradgradcheck(lambda x, a: energy_attention(x, a, a, step=0.3), (x, a))


@pytest.mark.parametrize("size", [1e-18, 1e9])
def test_sizes_far_from_1(size: float) -> None:
    x = size * torch.randn(2, 5, 4)
    layer = EnergyAttention(4)
    y = layer(x)
    assert y.isfinite().all()
    assert (y[0] - y[1]).norm() <= (x[0] - x[1]).norm() * (1 + 1e-5)
    with torch.no_grad():
        layer.query_weight.mul_(1e-20)
        layer.key_weight.mul_(1e15)
    assert layer(torch.randn(2, 5, 4)).isfinite().all()


# ------------------------------------------------------------------------------- bad input

X, W = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: EnergyAttention(4, 3), ValueError, "num_heads must divide embed_dim = 4"),
    (lambda: EnergyAttention(4)(X, is_causal=True), ValueError, "is_causal must be False"),
    (lambda: EnergyAttention(3)(X), ValueError, r"x must have shape \(batch, tokens, 3\)"),
    (lambda: energy_attention(X[0], W, W), ValueError, "x must have shape"),
    (lambda: energy_attention(X[:, :0], W, W), ValueError, "a token or more"),
    (lambda: energy_attention(X, W[0], W), ValueError, "query_weight must have shape"),
    (lambda: energy_attention(X, W, W[:1]), ValueError, "key_weight must have the shape"),
    (lambda: energy_attention(X, W, W, X[..., 0]), TypeError, "key_padding_mask must be a Boolean"),
    (lambda: energy_attention(X, W, W, X[..., :2] > 0), ValueError, "key_padding_mask must have"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
