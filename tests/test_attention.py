"""Attention with a constant, against sums over pairs of tokens and Hessians by differentiation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipbook import attention
from lipbook.attention import (
    BallProjection,
    EnergyAttention,
    EnergyStep,
    L2MultiheadAttention,
    attention_energy,
    ball_projection,
    energy_attention,
    energy_curvature,
    l2_attention,
    l2_attention_bound,
)
from lipbook.composition import Ball, Box, lipschitz_bound, lipschitz_lower_bound
from lipbook.errors import range_error_rule
from lipbook.freezing import freeze
from lipbook.robustness import certify
from lipbook.rounding import forward_error
from lipbook.rules import image_rule, range_rule

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


# ------------------------------------------------------------------- projections onto a ball


@given(st.integers(1, 4), st.integers(1, 5), scales, seeds)
def test_the_projection_is_the_nearest_point(
    tokens: int, features: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y = size * torch.randn(2, 3, tokens, features, dtype=double)
    found = ball_projection(x, 0.5)
    expected = x.clone()
    for token in expected.flatten(0, 1):
        length = math.sqrt(sum(entry**2 for entry in token.tolist()))
        token.mul_(min(1.0, 0.5 / max(length, 0.1)))
    torch.testing.assert_close(found, expected)
    assert (found - ball_projection(y, 0.5)).norm() <= (x - y).norm() * (1 + 1e-12)


@pytest.mark.parametrize("features", [1, 2, 5, 9])
def test_the_projection_stretches_the_maximum_norm_as_is_said(features: int) -> None:
    """One row of the Jacobian next to the ball, where one entry is large and the others equal."""
    share = (1 - 1 / math.sqrt(features)) / 2
    rest = math.sqrt((1 - share) / max(1, features - 1))
    x = torch.full((features,), rest, dtype=double)
    x[0] = math.sqrt(share) if features > 1 else 1.0
    layer = BallProjection(2.0)
    jacobian: Any = torch.autograd.functional.jacobian(layer, 2 * (1 - 1e-9) ** -1 * x)
    for p in (1, math.inf):
        bound = lipschitz_bound(layer, (3, features), p)
        assert (bound.kind, bound.value) == ("exact", (1 + math.sqrt(features)) / 2)
        norm = max(torch.linalg.matrix_norm(jacobian, p).item(), 1.0)
        assert abs(norm - bound.value) <= 1e-6


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
def test_gradients_of_the_projection_twice(size: float) -> None:
    x = (size * torch.randn(2, 3, dtype=double)).requires_grad_()
    assert torch.autograd.gradcheck(ball_projection, (x, 1.0))
    assert torch.autograd.gradgradcheck(ball_projection, (x, 1.0))


def test_the_smaller_of_two_balls_is_kept_and_its_centre_rounded() -> None:
    """A small domain far outside: its image is as small, but for the rounding of the centre."""
    layer, radius = BallProjection(1.0), 1e-12
    far = 7 * torch.randn(3, 2, dtype=double)
    found = range_rule(layer, Ball(far, radius).range((3, 2)))
    assert found.center is not None
    assert found.radius is not None
    assert torch.equal(found.center[0], layer(far))
    rounding = 8 * 2.0**-53 * found.center.norm()
    assert rounding <= found.radius.item() - radius <= 1e-9


@pytest.mark.parametrize("n", [2, 3, 16, 5000])
def test_the_factor_of_l2_attention_in_decimal_numbers(n: int) -> None:
    def inverse(target: int) -> Decimal:
        low, high = Decimal(0), Decimal(target)
        for _ in range(150):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * (middle + 1).exp() < target else (low, middle)
        return high

    with localcontext() as context:
        context.prec = 50
        mu, pair = inverse(n - 1), inverse(1)
        totals = [(n - 1) * mu]
        if n <= 16:
            totals.append(sum((inverse(i) for i in range(1, n)), Decimal(0)))
        one = torch.ones(1, 1, 1, dtype=double)
        for is_causal, total in enumerate(totals):
            exact = (Decimal(n + 1) / 2).sqrt() + 2 * mu + 2 * (total * pair).sqrt()
            found = Decimal(l2_attention_bound(one, one, one[0], n, bool(is_causal)).item())
            assert exact < found < exact * (1 + Decimal(2) ** -20)


class SelfAttention(nn.Module):
    """Torch's attention of tokens among each other, behind a ball and a position."""

    def __init__(self, radius: float | None) -> None:
        super().__init__()
        self.ball = nn.Identity() if radius is None else BallProjection(radius)
        self.position = nn.Parameter(torch.zeros(5, 4, dtype=double))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=double)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ball(x)
        return self.attention(x, x, x, need_weights=False)[0]


class Positioned(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ball(x) + self.position
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("radius", [0.3, 3.0])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_attention_behind_a_ball_has_a_constant(radius: float, p: float) -> None:
    torch.manual_seed(0)
    net = SelfAttention(radius).eval()
    above = lipschitz_bound(net, (5, 4), p)
    below = lipschitz_lower_bound(net, radius * torch.randn(8, 5, 4, dtype=double), p, steps=20)
    assert below.value <= above.value < math.inf
    bare = SelfAttention(None).eval()
    bare.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match=r"give a domain.* or put lipbook.attention.BallProj"):
        lipschitz_bound(bare, (5, 4), p)
    for domain in (Box(-radius, radius), Ball(torch.zeros(5, 4), math.sqrt(5) * radius)):
        alone = lipschitz_bound(bare, (5, 4), p, domain=domain)
        assert above.value <= (alone.parts[-1].value * (1 + math.sqrt(4)) / 2) * (1 + 1e-9)
        if p == 2 and radius == 3:
            assert above.value < 0.5 * alone.parts[-1].value  # lengths of tokens are known


def test_projections_in_a_sequential_and_positions() -> None:
    torch.manual_seed(0)
    net = Positioned(1.0).eval()
    chain = nn.Sequential(BallProjection(1.0), SelfAttention(1.0)).eval()
    chain[1].load_state_dict(net.state_dict())
    alone = lipschitz_bound(chain[1], (5, 4)).value
    assert lipschitz_bound(net, (5, 4)).value == pytest.approx(alone, rel=1e-6)
    assert lipschitz_bound(chain, (5, 4)).value == pytest.approx(alone, rel=1e-6)
    with torch.no_grad():
        net.position += torch.randn(5, 4, dtype=double)
    assert lipschitz_bound(net, (5, 4)).value > alone


@given(seeds, scales)
def test_lengths_of_tokens_in_the_range_hold(seed: int, size: float) -> None:
    torch.manual_seed(seed)
    layer = BallProjection(0.7)
    domain = Ball(size * torch.randn(3, 2, dtype=double), 0.5 * size)
    found = range_rule(layer, domain.range((3, 2)))
    x = domain.center + torch.randn(32, 3, 2, dtype=double) * 0.5 * size / 20
    y = layer(x)
    assert found.holds(y)
    assert found.lengths is not None
    assert bool((torch.linalg.vector_norm(y, dim=-1) <= found.lengths).all())
    assert found.lengths.max() <= 0.7 * (1 + 1e-9)
    assert found.center is not None
    assert found.radius is not None
    assert bool(((y - found.center).flatten(1).norm(dim=1) <= found.radius).all())
    whole = image_rule(layer, (3, 2))
    assert whole is not None
    assert whole.holds(y)


# -------------------------------------------------------------------------- L2 attention


def distances_by_pairs(x: Tensor, query: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Of one sample, each weight an exponential of a distance."""
    rows = []
    for i, one in enumerate(x):
        seen = x[: i + 1] if is_causal else x
        heads = []
        for q, v in zip(query, value, strict=True):
            root = math.sqrt(len(q))
            weights = torch.stack(
                [(-(q @ (one - other)).square().sum() / root).exp() for other in seen]
            )
            tied = v @ (q.mT @ q / root)
            heads.append(tied @ (weights[:, None] * seen).sum(0) / weights.sum())
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@settings(max_examples=20)
@given(shapes, seeds, st.booleans())
def test_l2_attention_is_that_of_all_pairs(
    shape: tuple[int, int, int, int], seed: int, is_causal: bool
) -> None:
    torch.manual_seed(seed)
    x, query, value = draw(shape, 1.0, 1.0, 1.0)
    expected = torch.stack([distances_by_pairs(each, query, value, is_causal) for each in x])
    torch.testing.assert_close(l2_attention(x, query, value, is_causal=is_causal), expected)


@pytest.mark.parametrize("nonexpansive", [False, True])
def test_causal_outputs_are_the_same_whatever_comes_later(nonexpansive: bool) -> None:
    torch.manual_seed(0)
    layer = L2MultiheadAttention(4, 2, nonexpansive=nonexpansive, is_causal=True)
    x = torch.randn(3, 6, 4)
    whole = layer(x)
    for i in range(1, 6):
        other = x.clone()
        other[:, i:] = 30 * torch.randn(3, 6 - i, 4)
        assert torch.equal(layer(other)[:, :i], whole[:, :i])
        assert not torch.equal(layer(other)[:, i], whole[:, i])
        shorter = layer(x[:, :i])
        if nonexpansive:  # divided by less, by one number for all
            bounds = [l2_attention_bound(*weights_of(layer), n, True).item() for n in (i, 6)]
            shorter = shorter * bounds[0] / bounds[1]
        torch.testing.assert_close(shorter, whole[:, :i])


@settings(max_examples=30)
@given(shapes, scales, scales, seeds, st.booleans())
def test_the_bound_of_l2_attention_holds(
    shape: tuple[int, int, int, int], weight: float, size: float, seed: int, is_causal: bool
) -> None:
    torch.manual_seed(seed)
    tokens, heads, k, features = shape
    layer = L2MultiheadAttention(features, heads, head_dim=k, dtype=double, is_causal=is_causal)
    with torch.no_grad():
        for each in layer.parameters():
            each.copy_(torch.randn_like(each))
        layer.query_weight *= weight
    x = size * torch.randn(tokens, features, dtype=double)
    jacobian: Any = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0], x)
    matrix = jacobian.reshape(x.numel(), x.numel())
    for p in (1, 2, math.inf):
        norm = torch.linalg.matrix_norm(matrix, p)
        assert norm <= lipschitz_bound(layer, (tokens, features), p).value * (1 + 1e-9)
    weights = layer.query_weight, layer.value_weight, layer.out_weight
    assert torch.linalg.matrix_norm(matrix, 2) <= l2_attention_bound(*weights, tokens, is_causal)


def attained(tokens: int, is_causal: bool, spread: float) -> float:
    """Largest norm of a Jacobian, of one head that is the identity, that ascent finds."""
    torch.manual_seed(0)
    one = torch.eye(2, dtype=double)[None]
    layer = L2MultiheadAttention(2, dtype=double, is_causal=is_causal)
    with torch.no_grad():
        for weight in weights_of(layer):
            weight.copy_(one.reshape(weight.shape))
    x = spread * torch.randn(16, tokens, 2, dtype=double)
    return lipschitz_lower_bound(layer, x, steps=40).value


@pytest.mark.parametrize("tokens", [2, 3, 6])
def test_ascent_stays_below_the_factor_of_causal_attention(tokens: int) -> None:
    """More than a third of it for a few tokens; size 2 divides the factor by sqrt 2."""
    one = torch.eye(2, dtype=double)[None]
    factor = l2_attention_bound(one, one, one[0], tokens, True).item()
    found = max(attained(tokens, True, spread) for spread in (0.3, 1.0, 3.0))
    assert 0.35 * factor < found <= factor


def published_factor(tokens: int) -> float:
    """sqrt(n) (4 t + 1) with t e^(t + 1) = n - 1, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(middle + 1) < tokens - 1 else (low, middle)
    return math.sqrt(tokens) * (4 * high + 1)


def test_the_factor_of_the_tokens() -> None:
    """Exact for one token, below that of the paper for more, and the better the more they are."""
    one = torch.ones(1, 1, 1, dtype=double)
    found = [l2_attention_bound(one, one, one[0], n).item() for n in (1, 2, 5, 50, 5000)]
    assert found[0] == pytest.approx(1, rel=1e-9)
    assert found == sorted(found)
    for n, kappa, share in zip((2, 5, 50, 5000), found[1:], (0.79, 0.6, 0.31, 0.15), strict=True):
        assert kappa < share * published_factor(n)
    pair = 0.2784645427610738  # Lambert's W at 1/e
    assert found[1] == pytest.approx(math.sqrt(1.5) + 4 * pair, rel=1e-9)
    causal = [l2_attention_bound(one, one, one[0], n, True).item() for n in (1, 2, 5, 50, 5000)]
    assert causal[:2] == pytest.approx(found[:2], rel=1e-9)
    assert all(0.9 * a < c < 0.99 * a for a, c in zip(found[2:], causal[2:], strict=True))


def test_ascent_comes_near_the_bound_of_l2_attention() -> None:
    """Two tokens, one feature; the layer that is divided by its bound is 1-Lipschitz."""
    torch.manual_seed(0)
    layer = L2MultiheadAttention(1, dtype=double)
    with torch.no_grad():
        layer.value_weight.copy_(layer.query_weight)
        layer.out_weight.fill_(1.0)
    x = torch.randn(16, 2, 1, dtype=double)
    below, above = lipschitz_lower_bound(layer, x, steps=40), lipschitz_bound(layer, (2, 1))
    assert 0.6 * above.value < below.value <= above.value
    layer.nonexpansive = True
    over = lipschitz_bound(layer, (2, 1)).value
    assert 0.95 < over <= 1
    assert lipschitz_lower_bound(layer, x, steps=40).value == pytest.approx(
        below.value / above.value * over, rel=1e-6
    )


@pytest.mark.parametrize("nonexpansive", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_of_l2_attention(nonexpansive: bool, is_causal: bool) -> None:
    """After the tokens, before them and between them; a sample may be all padding."""
    torch.manual_seed(0)
    layer = L2MultiheadAttention(4, 2, nonexpansive=nonexpansive, is_causal=is_causal).double()
    kept = [slice(6), slice(3), slice(4, 6), slice(1, 6, 3), slice(0)]
    x = torch.randn(5, 6, 4, dtype=double, requires_grad=True)
    mask = torch.ones(5, 6, dtype=torch.bool)
    for row, mine in zip(mask, kept, strict=True):
        row[mine] = False
    y = layer(x.masked_fill(mask[..., None], math.nan), mask)
    assert bool((y[mask] == 0).all())
    for k, mine in enumerate(kept[:-1]):
        torch.testing.assert_close(y[k, mine], layer(x[k : k + 1, mine])[0])
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()


# ------------------------------------------------------------------- errors of the programs


def weights_of(layer: L2MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    return layer.query_weight, layer.value_weight, layer.out_weight


def decimals(rows: Any) -> Any:
    return [decimals(row) for row in rows] if isinstance(rows, list) else Decimal(rows)


def dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
    return sum((s * t for s, t in zip(a, b, strict=True)), Decimal(0))


def columns(rows: list[list[Decimal]]) -> list[list[Decimal]]:
    return [list(column) for column in zip(*rows, strict=True)]


def decimal_energy_step(x: Tensor, layer: EnergyAttention) -> list[list[Decimal]]:
    """Of one sample, from sums over pairs."""
    rows, step = decimals(x.tolist()), Decimal(layer.step().item())
    share, out = 1 / max(Decimal(1), Decimal(len(rows)) / 2).sqrt(), [list(row) for row in rows]
    weights = decimals(layer.query_weight.tolist()), decimals(layer.key_weight.tolist())
    for a, b in zip(*weights, strict=True):
        keys = [[share * dot(row, w) for w in b] for row in rows]
        for i, row in enumerate(rows):
            pairs = [[dot(row, w) + k for w, k in zip(a, key, strict=True)] for key in keys]
            sizes = [dot(u, u).sqrt() for u in pairs]
            total = sum(r.exp() + (-r).exp() for r in sizes)
            for j, (u, r) in enumerate(zip(pairs, sizes, strict=True)):
                weight = step * (((r.exp() - (-r).exp()) / r if r else 2) / total)
                for c, (own, other) in enumerate(zip(columns(a), columns(b), strict=True)):
                    out[i][c] -= weight * dot(u, own)
                    out[j][c] -= weight * share * dot(u, other)
    return out


def causal(*sizes: int, **options: Any) -> L2MultiheadAttention:
    return L2MultiheadAttention(*sizes, is_causal=True, **options)


def decimal_l2(x: Tensor, layer: L2MultiheadAttention) -> list[list[Decimal]]:
    """Of one sample, from sums over pairs."""
    rows, root = decimals(x.tolist()), Decimal(layer.head_dim).sqrt()
    heads: list[list[Decimal]] = [[] for _ in rows]
    weights = decimals(layer.query_weight.tolist()), decimals(layer.value_weight.tolist())
    for query, value in zip(*weights, strict=True):
        tokens = [[dot(row, w) for w in query] for row in rows]
        back = [[dot(q, column) / root for column in columns(query)] for q in tokens]
        values = columns([[dot(b, w) for w in value] for b in back])
        for i, q in enumerate(tokens):
            seen = tokens[: i + 1] if layer.is_causal else tokens
            apart = [[s - t for s, t in zip(q, k, strict=True)] for k in seen]
            powers = [(-dot(z, z) / root).exp() for z in apart]
            heads[i] += [dot(powers, column[: len(seen)]) / sum(powers) for column in values]
    bias = [Decimal(0)] * layer.embed_dim if layer.bias is None else decimals(layer.bias.tolist())
    out = decimals(layer.out_weight.tolist())
    return [[dot(h, w) + b for w, b in zip(out, bias, strict=True)] for h in heads]


HOSTILE: dict[str, Callable[[int, int], Tensor]] = {
    "ordinary": torch.randn,
    "small": lambda n, d: 1e-4 * torch.randn(n, d),
    "between the branches of log cosh": lambda n, d: 0.03 * torch.randn(n, d).sign(),
    "large": lambda n, d: 20 * torch.randn(n, d),
    "far from 0": lambda n, d: 100 + torch.randn(n, d),
    "two clouds": lambda n, d: torch.randn(n, d) + 50 * (torch.arange(n) % 2)[:, None],
    "opposite": lambda n, d: (-1.0) ** torch.arange(n)[:, None] * torch.randn(1, d),
    "equal": lambda n, d: torch.randn(1, d).expand(n, d),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [EnergyAttention, L2MultiheadAttention, causal])
@pytest.mark.parametrize("dtype", [torch.float32, double])
def test_errors_of_the_programs_in_decimal_numbers(name: str, kind: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    for n, heads, size, scale, p in (
        (3, 2, 2, 1.0, 2.0),
        (1, 1, 2, 0.3, math.inf),
        (3, 1, 3, 3.0, 1.0),
    ):
        layer = kind(4, heads, head_dim=size)
        for weight in layer.parameters():
            weight.data.normal_().mul_(scale / 2)
        x = HOSTILE[name](n, 4).to(dtype)[None].contiguous()
        layer.to(dtype).requires_grad_(False)
        with localcontext() as context:
            context.prec = 40
            right = (decimal_energy_step if kind is EnergyAttention else decimal_l2)(x[0], layer)
            wrong = decimals(layer(x)[0].tolist())
            rows = [a + [-b for b in row] for a, row in zip(wrong, right, strict=True)]
            off = [abs(row[c] + row[c + 4]) for row in rows for c in range(4)]
            norms = {1.0: sum(off), 2.0: dot(off, off).sqrt(), math.inf: max(off)}
        found = forward_error(layer, x, p)
        assert norms[p] <= found.error.item()
        assert found.error.item() < 0.02 * max(1.0, x.abs().max().item() * max(1.0, scale)) ** 4


@settings(max_examples=8)
@given(shapes, st.integers(0, 9), st.sampled_from(["energy", "l2", "nonexpansive", "causal"]))
def test_errors_of_the_programs_near_a_point(
    shape: tuple[int, int, int, int], seed: int, kind: str
) -> None:
    """Within the limit, against float64 with the same step or divisor."""
    torch.manual_seed(seed)
    tokens, heads, size, features = shape
    layer: Any = EnergyAttention(features, heads, size)
    if kind != "energy":
        layer = L2MultiheadAttention(
            features, heads, head_dim=size, nonexpansive=kind != "l2", is_causal=kind == "causal"
        )
    twin = copy.deepcopy(freeze(layer)).double()
    rescaled = 1.0
    if kind in ("nonexpansive", "causal"):
        count, causal = torch.tensor(tokens).double(), tokens if kind == "causal" else None
        ratio = [attention._used(weights_of(each), count, causal) for each in (twin, layer)]
        rescaled = (ratio[0] / ratio[1]).item()
    for p in (1.0, 2.0, math.inf):
        x = 3 * torch.randn(4, tokens, features)
        found = forward_error(layer, x, p)
        way = torch.randn(4, tokens, features)
        way /= torch.linalg.vector_norm(way.flatten(1), p, dim=1)[:, None, None]
        share = torch.tensor([0.01, 0.1, 0.5, 0.99])
        moved = x + way * (found.limit * share).float()[:, None, None]
        off = (layer(moved) - rescaled * twin(moved.double())).flatten(1)
        reach = torch.linalg.vector_norm((moved - x).double().flatten(1), p, dim=1)
        allowed = found.error + found.slope * reach
        assert (torch.linalg.vector_norm(off, p, dim=1) <= allowed).all()
        assert found.lipschitz >= lipschitz_bound(layer, (tokens, features), p=p).value * (1 - 1e-9)


@pytest.mark.parametrize("size", [1e-3, 0.03, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, double])
def test_errors_of_the_weights_of_the_energy(size: float, dtype: Any) -> None:
    """Queries and keys that are off by d, in decimal numbers."""
    torch.manual_seed(0)
    for features, d in ((1, 0.0), (3, 0.0), (3, 1e-4 * size)):
        query, key = size * torch.randn(2, 1, 1, 3, features).to(dtype)
        query[..., 1:, :] = -key[..., 1:, :] * (1 - 2.0**-12)  # sums of which much cancels
        near = [
            part + d * functional.normalize(torch.randn(part.shape), dim=-1)
            for part in (query, key)
        ]
        scores, slopes = attention._log_cosh(attention._squares(query, key, 1.0))
        softmax = scores.softmax(-1)
        computed = [each[0, 0].tolist() for each in (scores, slopes, softmax * slopes)]
        exact = [decimals(part.double()[0, 0].tolist()) for part in near]
        worst = [Decimal(0)] * 3
        with localcontext() as context:
            context.prec = 40
            for score, slope, weight, one in zip(*map(decimals, computed), exact[0], strict=True):
                sums = [[a + b for a, b in zip(one, other, strict=True)] for other in exact[1]]
                sizes = [dot(u, u).sqrt() for u in sums]
                cosh, sinh = ([(r.exp() + s * (-r).exp()) / 2 for r in sizes] for s in (1, -1))
                for k, (r, c, s) in enumerate(zip(sizes, cosh, sinh, strict=True)):
                    worst[0] = max(worst[0], abs(score[k] - c.ln()))
                    worst[1] = max(worst[1], abs(slope[k] * r - s / c))
                off = [
                    abs(w * r - s / sum(cosh)) for w, r, s in zip(weight, sizes, sinh, strict=True)
                ]
                worst[2] = max(worst[2], sum(off, Decimal(0)))
        r = sum(part.double().norm(dim=-1).amax() for part in near)
        away = torch.tensor(2.0 * d).double()
        logit, slope = attention._log_cosh_errors(r, away, features, dtype)
        e, _ = attention._weights_error(r, away, 3, features, dtype)
        for found, bound in zip(worst, (logit, slope, e), strict=True):
            assert found <= bound.item()
            assert d == 0 or size != 1 or found > 0.02 * bound.item()


def test_errors_hold_steps_and_divisors_of_both_precisions() -> None:
    """On a domain the function is that of float64, and the difference is part of the error."""
    torch.manual_seed(0)
    x, ball = 0.1 * torch.randn(1, 3, 4), Ball(torch.zeros(3, 4), 0.5)
    energy = EnergyAttention(4)
    errors = [forward_error(layer, x, 2, ball).error for layer in (energy, freeze(energy))]
    steps = [layer.step().item() for layer in (energy, copy.deepcopy(energy).double())]
    moved = (energy(x) - x).double().norm() / steps[0] * abs(steps[1] - steps[0])
    assert errors[0] >= errors[1] + moved
    assert moved > 0.002 * errors[1]
    plain, over = L2MultiheadAttention(4), L2MultiheadAttention(4, nonexpansive=True)
    over.load_state_dict(plain.state_dict())
    apart = (over(x).double() - copy.deepcopy(over).double()(x.double())).norm()
    divisor = plain(x).norm() / over(x).norm()
    errors = [
        forward_error(plain, x, 2, ball).error / divisor,
        forward_error(over, x, 2, ball).error,
    ]
    assert errors[1] >= errors[0] + apart
    assert apart > 0.002 * errors[0]


@pytest.mark.parametrize("kind", [EnergyAttention, L2MultiheadAttention, causal])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_errors_on_all_of_space_are_those_of_balls(kind: Any, p: float) -> None:
    torch.manual_seed(0)
    layer, x = freeze(kind(4, 2)), torch.randn(1, 3, 4)
    found = forward_error(layer, x, p)
    for share in (1.0, 0.51, 0.13, 1 / 64):
        radius = share * found.limit.item()
        on_ball = forward_error(layer, x, p, Ball(x[0], radius, p)).error.item()
        assert found.error.item() + found.slope * radius >= on_ball * (1 - 1e-6)


def test_errors_are_infinite_where_squares_overflow() -> None:
    small = L2MultiheadAttention(2)
    small.value_weight.data *= 1e-30
    for layer in (L2MultiheadAttention(2), EnergyAttention(2), small):
        found = forward_error(layer, torch.tensor([1.0, 1e20])[:, None, None].expand(2, 3, 2))
        assert found.error.isfinite().tolist() == [True, False]
        assert found.limit[0] > 0
        assert found.limit[1] == 0


@pytest.mark.parametrize("kind", [EnergyAttention, L2MultiheadAttention, causal])
def test_sound_certificates_of_attention(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(4, 2), nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.randn(6, 3, 4)
    batches = [(x, net(x).argmax(1))]
    sound, plain = (certify(net, batches, (3, 4), sound=each) for each in (True, False))
    assert (sound.radius <= plain.radius).all()
    assert sound.radius.mean() > 0.99 * plain.radius.mean()


def test_errors_of_mixed_weights_are_refused() -> None:
    layer = L2MultiheadAttention(2)
    layer.out_weight.data = layer.out_weight.data.double()
    with pytest.raises(ValueError, match="all weights must have one dtype"):
        range_error_rule(layer, torch.zeros(1, 3, 2), 2)
    with pytest.raises(
        ValueError, match=r"must run in the dtype of its weights, got torch\.float64"
    ):
        range_error_rule(EnergyAttention(2), torch.zeros(1, 3, 2, dtype=double), 2)
    with pytest.raises(ValueError, match=r"known in float32 and float64, got torch\.bfloat16"):
        range_error_rule(EnergyAttention(2), torch.zeros(1, 3, 2, dtype=torch.bfloat16), 2)


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
    (lambda: BallProjection(0), ValueError, "radius must be positive and finite, got 0"),
    (lambda: ball_projection(X[0, 0, 0], 1.0), ValueError, "x must have 1 or more dimensions"),
    (lambda: EnergyAttention(4, 3), ValueError, "num_heads must divide embed_dim = 4"),
    (
        lambda: EnergyAttention(4)(X, is_causal=True),
        ValueError,
        r"is_causal must be False: .* L2MultiheadAttention\(\.\.\., is_causal=True\) is",
    ),
    (lambda: EnergyAttention(3)(X), ValueError, r"x must have shape \(batch, tokens, 3\)"),
    (lambda: energy_attention(X[0], W, W), ValueError, "x must have shape"),
    (lambda: energy_attention(X[:, :0], W, W), ValueError, "a token or more"),
    (lambda: l2_attention(X, W, W[:1]), ValueError, "value_weight must have the shape of query"),
    (
        lambda: l2_attention_bound(W, W, W[0, :, :3], 3),
        ValueError,
        r"out_weight must .* \(outputs, 4\)",
    ),
    (lambda: energy_attention(X, W[0], W), ValueError, "query_weight must have shape"),
    (lambda: energy_attention(X, W, W[:1]), ValueError, "key_weight must have the shape"),
    (lambda: energy_attention(X, W, W, X[..., 0]), TypeError, "key_padding_mask must be a Boolean"),
    (lambda: energy_attention(X, W, W, X[..., :2] > 0), ValueError, "key_padding_mask must have"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
