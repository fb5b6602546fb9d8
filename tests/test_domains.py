"""Bounds on a domain: ranges against samples, intervals of Jacobians against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import AbsoluteValue, FullSort, GroupSort, MaxMin
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
from lipbook.layers.joins import Multiply
from lipbook.norms import dual_exponent
from lipbook.rules import Range

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
            *(nn.Flatten(), nn.Linear(12, 2)),
        ),
        (1, 6),
    ),
    "branches": (Branches, (6,)),
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
    for _ in range(30):
        z = x + radius * (2 * torch.rand_like(x) - 1)
        for found, value in zip(ranges, graph.values(z), strict=True):
            assert found.holds(value)
            if found.center is None:
                continue  # a product
            assert found.radius is not None
            off = (value - found.center).flatten(1).norm(dim=1)
            assert (off <= found.radius).all()
        jacobian = torch.stack(
            [torch.autograd.functional.jacobian(lambda v: net(v[None])[0], v) for v in z]
        )
        assert ((jacobian - center).abs() <= spread + 1e-13).all()
        for p in NORMS:
            flat = jacobian.flatten(2)
            truth = torch.linalg.vector_norm(flat, dual_exponent(p), dim=2)
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
