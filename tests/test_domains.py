"""Bounds on a domain: ranges against samples, intervals of Jacobians against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    MaxMin,
    SmoothAbsoluteValue,
)
from lipbook.composition import Ball, Box, lipschitz_bound
from lipbook.composition.local import (
    matrix_norms,
    ranges_of,
    row_bounds,
    row_constants,
    row_norms,
    stretches,
)
from lipbook.graphs import trace
from lipbook.layers.joins import MatMul, Multiply
from lipbook.norms import dual_exponent
from lipbook.residual import NormResidual
from lipbook.rules import (
    Range,
    affine_rule,
    ball_range,
    local_lipschitz_rule,
    outward,
    pullback_rule,
    range_rule,
)

NORMS = (1, 2, math.inf)


class Branches(nn.Module):
    """A skip, a slice, a gate and a difference in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 6), nn.Linear(3, 3), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first(x)) - 0.5 * x
        a, b = hidden.chunk(2, 1)
        return self.last(torch.cat([a * torch.sigmoid(self.gate(b)), hidden], 1))


NETWORKS = {
    "sorts": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 8), MaxMin(), nn.Linear(8, 8), GroupSort(4), nn.Linear(8, 8)),
            *(MaxMin(pairing="halves"), nn.Linear(8, 2)),
        ),
        (6,),
    ),
    "images": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), MaxMin(), nn.MaxPool2d(3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), AbsoluteValue()),
            nn.Linear(4, 2),
        ),
        (1, 4, 4),
    ),
    "signals": (
        lambda: nn.Sequential(
            *(nn.Conv1d(1, 4, 3, padding=1), nn.MaxPool1d(2), nn.Tanh(), FullSort(-1)),
            *(nn.Flatten(), SmoothAbsoluteValue(0.2), nn.Linear(12, 2)),
        ),
        (1, 6),
    ),
    "branches": (Branches, (6,)),
    "roots of squares": (
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            NormResidual(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), weight=0.3),
            nn.Linear(5, 2),
        ),
        (4,),
    ),
}


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make().double().eval(), shape


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_ranges_and_jacobians_hold_samples(name: str, radius: float) -> None:
    net, shape = network(name)
    graph = trace(net, shape).double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    reach = torch.full((5,), radius * math.sqrt(math.prod(shape)), dtype=torch.float64)
    ranges = ranges_of(graph, Range(x - radius, x + radius, x, reach))
    rows = torch.eye(2, dtype=torch.float64)[None]
    interval = row_bounds(graph, ranges, rows, 2)
    assert interval is not None
    center, spread = interval
    z = x + radius * (2 * torch.rand(30, 5, *shape, dtype=torch.float64) - 1)
    for found, values in zip(ranges, graph.values(z.flatten(0, 1)), strict=True):
        value = values.unflatten(0, (30, 5))
        assert found.holds(value)
        if found.center is None:
            continue  # a product
        assert found.radius is not None
        off = (value - found.center).flatten(2).norm(dim=2)
        assert (off <= found.radius).all()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: net(v[None])[0]))(z.flatten(0, 1))
    jacobian = jacobian.unflatten(0, (30, 5))
    assert ((jacobian - center).abs() <= spread + 1e-13).all()
    for p in NORMS:
        flat = jacobian.flatten(3)
        truth = torch.linalg.vector_norm(flat, dual_exponent(p), dim=3)
        assert (truth <= row_norms(interval, p)).all()
        assert (truth <= row_constants(graph, ranges, rows, p)).all()
        whole = torch.linalg.matrix_norm(flat, p)
        assert (whole <= matrix_norms(interval, p)).all()
        assert (whole <= stretches(graph, ranges, p)[graph.output]).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_small_balls_give_the_jacobian_at_the_center(name: str) -> None:
    """Tightness: with nothing undecided the interval is one matrix."""
    net, shape = network(name)
    x = torch.randn(shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
    for p in NORMS:
        bound = lipschitz_bound(net, shape, p, domain=Ball(x, 1e-7, p))
        truth = torch.linalg.matrix_norm(jacobian.flatten(1), p).item()
        assert truth * (1 - 1e-12) <= bound.value <= truth * (1 + 1e-5)


def test_a_domain_never_makes_a_bound_worse() -> None:
    net, shape = network("images")
    for p in NORMS:
        everywhere = lipschitz_bound(net, shape, p).value
        previous = 0.0
        for width in (0.01, 0.1, 1.0, 100.0):
            bound = lipschitz_bound(net, shape, p, domain=Box(0, width)).value
            assert previous <= bound <= everywhere * (1 + 1e-9)
            previous = bound


def test_products_on_paper() -> None:
    """x² has slope 2 on [0, 1]; x·σ(x) slope at most σ(1) + 1·σ(1)(1 - σ(1)) there."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    for p in NORMS:
        assert lipschitz_bound(Square(), (3,), p, domain=Box(0, 1)).value == pytest.approx(2)
        assert lipschitz_bound(Square(), (3,), p, domain=Box(-3, 1)).value == pytest.approx(6)
    with pytest.raises(ValueError, match="not Lipschitz on all of space: give a domain"):
        lipschitz_bound(Square(), (3,))


@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        (lambda: Box(1, 0), ValueError, "low must not exceed high"),
        (lambda: Box(0, math.nan), ValueError, "low and high must be finite"),
        (lambda: Box(0, math.inf), ValueError, "low and high must be finite"),
        (lambda: Ball(torch.zeros(3), -1.0), ValueError, "radius must be finite"),
        (lambda: Ball(torch.zeros(3), 1.0, 3), ValueError, "p must be"),
        (lambda: Ball(torch.full((3,), math.nan), 1.0), ValueError, "center must be finite"),
        (lambda: Ball(torch.zeros(4), 1.0), ValueError, r"center of the domain must broadcast"),
        (lambda: Box(torch.zeros(2), 1.0), ValueError, r"low of the domain must broadcast"),
        (lambda: (0, 1), TypeError, "domain must be a Box or a Ball, got tuple"),
    ],
)
def test_domains_that_are_none(domain: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lipschitz_bound(nn.Linear(3, 2), (3,), domain=domain())  # type: ignore[operator]


@pytest.mark.parametrize("p", NORMS)
def test_enlarged_domains_hold_their_neighbours(p: float) -> None:
    torch.manual_seed(0)
    center = torch.randn(4, dtype=torch.float64)
    for domain in (Box(-1, 1), *(Ball(center, 0.7, q) for q in NORMS)):
        wide = domain.enlarged(0.5, p).range((4,))
        inner = domain.range((4,))
        for _ in range(200):
            x = inner.low + torch.rand(4, dtype=torch.float64) * (inner.high - inner.low)
            if isinstance(domain, Ball):
                step = x - center
                x = center + step * 0.7 / max(0.7, torch.linalg.vector_norm(step, domain.p).item())
            step = torch.randn(1, 4, dtype=torch.float64)
            moved = x + 0.5 * step / torch.linalg.vector_norm(step, p)
            assert wide.holds(moved)
            assert wide.center is not None
            assert ((moved - wide.center).norm(dim=1) <= wide.radius).all()


def test_a_product_is_as_steep_in_one_factor_as_the_other_is_large() -> None:
    first, second = Box(-3, 1).range((4,)), Box(0, 0.5).range((4,))
    for p in NORMS:
        in_first, in_second = Multiply().factors([first, second], p)
        assert (in_first.item(), in_second.item()) == (0.5, 3.0)


@pytest.mark.parametrize("p", NORMS)
def test_a_matrix_product_is_as_steep_as_the_largest_block_of_the_other_factor(p: float) -> None:
    """Blocks along the diagonal of one matrix, whose norm is that of the largest, a sample each."""
    a, b = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 5, 2, dtype=torch.float64)
    in_a, in_b = MatMul().factors([Range(a, a), Range(b, b)], p)
    assert in_a.shape == in_b.shape == (2,)
    for k in range(2):
        for found, maps in ((in_a[k], b[k].mT), (in_b[k], a[k])):
            true = torch.linalg.matrix_norm(torch.block_diag(*maps), p).item()
            if p == 2:  # the Frobenius norm of a block is above its norm
                assert true <= found.item() <= true * math.sqrt(min(maps.shape[-2:]))
            else:
                assert just_above(found, true)


# ------------------------------------------------- margins: never too small, and hardly too large


def just_above(found: Tensor | float, true: float) -> bool:
    """Decided in float64, which holds the true number."""
    return true < float(found) <= true * (1 + 1e-11)


def test_sizes_of_ranges_on_paper() -> None:
    """Numbers of which float64 computes the norm without an error: the margin must show."""
    point = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    values = Range(-point, point)
    for p, true in ((1, 7), (2, 5), (math.inf, 4)):
        assert just_above(values.norms(p), true)
    radius = torch.tensor([1.0], dtype=torch.float64)
    held = Range(-2 * point, 2 * point, point, radius)
    for p, true in ((1, 14), (2, 6), (math.inf, 8)):  # the ball is known in the 2-norm
        assert just_above(held.norms(p), true)
    assert just_above(Range(-2 * point, 2 * point, point).norms(2), 10)
    box = Box(-1.0, 3.0).range((2, 2))
    assert box.center is not None
    assert box.center.eq(1).all()
    assert just_above(box.radius, 4)
    for p, true in ((1, 2), (2, 2), (math.inf, 4)):
        ball = Ball(torch.ones(2, 2), 2.0, p).range((2, 2))
        assert just_above(ball.radius, true)
        assert just_above(ball.high.max(), 3)
        assert just_above(-ball.low.min(), 1)


def test_intervals_are_widened_by_the_slack_and_little_more() -> None:
    low, high = outward(torch.tensor(-3.0).double(), torch.tensor(5.0).double(), 0.5)
    assert just_above(-low, 3.5)
    assert just_above(high, 5.5)
    low, high = outward(torch.zeros(1).double(), torch.zeros(1).double())
    assert low < 0 < high < 1e-300


def test_the_range_of_an_affine_layer_is_attained() -> None:
    """Of a box by its corners, of a ball by the rows' norms: 3, 4 and 12, 5."""
    layer = nn.Linear(2, 2).double().requires_grad_(False)
    layer.weight.data = torch.tensor([[3.0, -4.0], [12.0, 5.0]], dtype=torch.float64)
    layer.bias.data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    affine = affine_rule(layer, (2,))
    assert affine is not None
    ones = torch.ones(1, 2, dtype=torch.float64)
    for values, low, high in (
        (Range(-ones, ones), (-6.0, -15.0), (8.0, 19.0)),
        (Range(-ones, ones, 0 * ones, ones[:, 0]), (-4.0, -11.0), (6.0, 15.0)),
    ):
        image = affine.range(values)
        assert all(just_above(-a, -b) for a, b in zip(image.low[0], low, strict=True))
        assert all(just_above(a, b) for a, b in zip(image.high[0], high, strict=True))
        assert (image.center is None) == (values.center is None)
    whole = range_rule(layer, Range(-ones, ones, 0 * ones, ones[:, 0])).radius
    assert just_above(whole, torch.linalg.matrix_norm(layer.weight, 2).item())


@pytest.mark.parametrize("center", [None, 1.0])
def test_the_range_of_a_layer_that_is_known_by_its_bound_alone(center: float | None) -> None:
    """x -> -2x on [0, 2]³ or on the unit ball around 1, whose image has the radius 2."""
    layer = Steep()
    ones = torch.ones(1, 3, dtype=torch.float64)
    ball = (None, None) if center is None else (ones, torch.ones(1, dtype=torch.float64))
    image = ball_range(layer, Range(0 * ones, 2 * ones, *ball))
    assert -4 * (1 + 1e-9) <= image.low.min() < -4
    assert 0 < image.high.max() < 1e-9
    assert (image.radius is None) == (center is None)
    if image.center is not None:
        assert torch.equal(image.center, -2 * ones)
        assert 2 < image.radius <= 2 * (1 + 1e-9)


class Steep(nn.LeakyReLU):
    """Minus twice the identity, which is -2 times a leaky rectifier of slope 1."""

    def forward(self, x: Tensor) -> Tensor:
        return -2 * x


@local_lipschitz_rule.register
def _(module: Steep, values: Range, p: float) -> Tensor:
    return torch.full((len(values.low),), 2.0, dtype=torch.float64)


def test_intervals_of_slopes_on_paper() -> None:
    """Rows in [2.5, 3.5] times slopes in [0.25, 1]: the upper end 3.5 is attained."""
    values = Range(*(torch.tensor([[v]], dtype=torch.float64) for v in (-1.0, 1.0)))
    row = torch.tensor([[[3.0]]], dtype=torch.float64)
    pulled = pullback_rule(nn.LeakyReLU(0.25).double(), (row, 0 * row + 0.5), values)
    assert pulled is not None
    center, radius = pulled
    assert center.item() == 3 * 0.625
    assert just_above(radius, 3 * 0.375 + 0.5)
    assert just_above(center + radius, 3.5)
