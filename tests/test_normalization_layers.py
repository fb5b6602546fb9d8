"""Normalisation, patches and products: constants that are attained, and bounds on domains.

Oracles: singular values and sums of dense float64 Jacobians by autograd, minimisation by scipy,
and samples.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Ball, Bound, Box, lipschitz_bound, lipschitz_lower_bound
from lipbook.graphs import trace
from lipbook.layers.normalization import UnitNormalize, _least_spread, _row_sums, centered_norm
from lipbook.rules import Range, local_lipschitz_rule, pullback_rule, range_rule

NORMS = (1, 2, math.inf)

LAYERS = {
    "layer": (lambda: nn.LayerNorm(6), (6,)),
    "layer of tokens": (lambda: nn.LayerNorm(2, eps=0.1), (3, 2)),
    "layer of images": (lambda: nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    "layer without weights": (lambda: nn.LayerNorm(5, elementwise_affine=False), (5,)),
    "wide layer": (lambda: nn.LayerNorm(150, eps=1e-3), (150,)),
    "layer of one": (lambda: nn.LayerNorm(1), (3, 1)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group of each channel": (lambda: nn.GroupNorm(4, 4), (4, 2, 3)),
    "group of vectors": (lambda: nn.GroupNorm(2, 6, affine=False), (6,)),
    "rms": (lambda: nn.RMSNorm(6, eps=1e-2), (2, 6)),
    "wide rms": (lambda: nn.RMSNorm(40, eps=1e-2), (40,)),
    "rms without eps": (lambda: nn.RMSNorm(5), (5,)),
    "instance 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance 2d": (lambda: nn.InstanceNorm2d(2), (2, 3, 2)),
    "instance 3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 1, 2)),
    "tracked instance": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        (3, 4),
    ),
    "unit": (lambda: UnitNormalize(eps=0.1), (4, 2)),
    "unit of images": (lambda: UnitNormalize((1, 2), eps=0.1), (2, 3)),
    "local response": (lambda: nn.LocalResponseNorm(3, alpha=2.0), (5, 2)),
}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    layer = make()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    if getattr(layer, "running_var", None) is not None:
        layer.running_var.copy_(torch.rand(3) + 0.1)
    return layer.double(), shape


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    full = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0], x)
    return full.reshape(-1, x.numel())


def jacobians(layer: nn.Module, points: Tensor) -> Tensor:
    """One for each point, a row for all points at a time: samples do not mix."""
    points = points.clone().requires_grad_()
    outputs = layer(points).flatten(1)
    rows = [torch.autograd.grad(out, points, torch.ones_like(out), True) for out in outputs.T]
    return torch.stack([row.flatten(1) for (row,) in rows], 1)


def draws(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
        for scale in scales
        for shift in (0.0, 1.0)
        for _ in range(3)
    ]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_jacobian_exceeds_the_bound(name: str, p: float) -> None:
    layer, shape = made(name)
    bound = lipschitz_bound(layer, shape, p)
    steepest = max(torch.linalg.matrix_norm(jacobian(layer, x), p).item() for x in draws(shape))
    assert steepest <= bound.value * (1 + 1e-9)
    assert bound.output_shape == shape


@pytest.mark.parametrize("name", ["layer", "layer of tokens", "layer of images", "wide layer"])
def test_layer_norm_attains_its_constant_where_nothing_varies(name: str) -> None:
    layer, shape = made(name)
    bound = lipschitz_bound(layer, shape)
    steepest = torch.linalg.matrix_norm(jacobian(layer, torch.full(shape, 0.3).double()), 2)
    assert bound.kind == "exact"
    assert steepest.item() == pytest.approx(bound.value, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "p"),
    [
        ("layer", math.inf),
        ("layer without weights", 1),
        ("group", 2),
        ("group", math.inf),
        ("group of each channel", 1),
        ("group of vectors", 1),
        ("instance 1d", 1),
        ("instance 2d", 2),
        ("tracked instance", 2),
        ("rms", 2),
    ],
)
def test_what_is_called_exact_is_attained_at_constants(name: str, p: float) -> None:
    layer, shape = made(name)
    bound = lipschitz_bound(layer, shape, p)
    at = torch.zeros(shape, dtype=torch.float64)
    assert bound.kind == "exact"
    assert torch.linalg.matrix_norm(jacobian(layer, at), p).item() == pytest.approx(
        bound.value, rel=1e-9
    )


@pytest.mark.parametrize("name", ["rms", "wide rms"])
def test_rms_norm_attains_its_row_and_column_sums(name: str) -> None:
    layer, shape = made(name)
    n = shape[-1]
    gamma = layer.weight.detach().abs()
    top = int(gamma.argmax())
    for p, spread in ((math.inf, torch.ones(n)), (1, gamma)):
        bound = lipschitz_bound(layer, shape, p)
        assert bound.kind == "exact"
        best = 0.0
        for b in torch.linspace(0.01, 0.99, 99).double():  # the share of the largest entry
            u = spread.double().clone()
            u[top] = 0
            u = u / u.norm() * (1 - b).sqrt()
            u[top] = b.sqrt()
            sizes = torch.logspace(-2.5, 1, 60).double().view(-1, *[1] * len(shape))
            J = jacobians(layer, (sizes * u).expand(-1, *shape))
            best = max(best, torch.linalg.matrix_norm(J, p).max().item())
            if best > bound.value * (1 - 1e-2):
                break
        assert bound.value * (1 - 1e-2) < best <= bound.value * (1 + 1e-9)


def test_rows_of_a_wide_layer_norm_nearly_attain_the_bound() -> None:
    n = 401  # so that 400 others split into equal moduli
    layer = nn.LayerNorm(n, eps=1e-2).double()
    bound = lipschitz_bound(layer, (n,), math.inf)
    assert bound.kind == "upper bound"
    assert bound.value > 2 / math.sqrt(1e-2)
    best = 0.0
    for a in torch.linspace(0.3, 0.9, 13).double():
        for half in (180, 190, 195, 200, 205):
            u = torch.full((n,), -1.0, dtype=torch.float64)
            u[:half] = 1.0
            u[-1] = 0
            u = u - u[:-1].mean() * (u != 0)
            u = u / u.norm() * (1 - a**2).sqrt()
            u[:-1] -= a / (n - 1)
            u[-1] = a
            for size in torch.logspace(-2, 2, 30).double():
                J = torch.autograd.functional.vjp(
                    lambda v: layer(v[None])[0], size * u, torch.eye(n).double()[-1]
                )[1]
                best = max(best, J.abs().sum().item())
    assert bound.value * 0.97 < best <= bound.value


@pytest.mark.parametrize("n", [3, 8, 30, 70, 300])
@pytest.mark.parametrize("t", [1.0, 0.5, 0.1, 1e-3])
def test_row_sums_are_those_of_the_extreme_rows(n: int, t: float) -> None:
    """Cauchy-Schwarz for the entries beside the diagonal, over all t and u_i."""
    share = torch.linspace(1e-4, 1, 1001, dtype=torch.float64)[:, None] * t
    b = torch.linspace(0, 1 - 1 / n, 1001, dtype=torch.float64)
    diagonal = 1 - 1 / n - (1 - share) * b
    squares = 1 - 1 / n - (1 - share**2) * b - diagonal**2
    sums = diagonal + ((n - 1) * squares.clamp(min=0)).sqrt()
    best = ((share / t).sqrt() * sums).max().item()
    found = _row_sums(n, torch.tensor([t]).double()).item()
    assert best <= found * (1 + 1e-9)
    if n > 70:
        assert found <= best * 1.002


@given(st.integers(2, 12), st.integers(0, 10**6), st.booleans())
def test_norm_of_weights_times_centering(n: int, seed: int, twice: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, n, generator=generator, dtype=torch.float64)
    weight = weight * 10.0 ** torch.randint(-3, 4, (3, 1), generator=generator)
    if twice:
        weight[:, -1] = weight[:, 0]
    C = torch.eye(n, dtype=torch.float64) - 1 / n
    true = torch.linalg.matrix_norm(torch.diag_embed(weight) @ C, 2)
    found = centered_norm(weight)
    assert torch.allclose(found, true, rtol=1e-9)
    assert (found >= true * (1 - 1e-13)).all()


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_least_variance_on_a_box(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(n, generator=generator, dtype=torch.float64)
    high = low + torch.rand(n, generator=generator, dtype=torch.float64)
    found = _least_spread(low[None], high[None]).item()
    best = minimize(
        lambda x: ((x - x.mean()) ** 2).sum(),
        ((low + high) / 2).numpy(),
        jac=lambda x: 2 * (x - x.mean()),
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    assert found <= best.fun + 1e-12
    assert found == pytest.approx(best.fun, rel=1e-4, abs=1e-6)


# -------------------------------------------------------------------------------- domains


def domains(shape: tuple[int, ...]) -> list[Box | Ball]:
    ramp = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    return [Box(-1, 2), Box(ramp, ramp + 0.3), Ball(ramp / 4, 0.1), Ball(ramp, 0.2, math.inf)]


def inside(domain: Box | Ball, shape: tuple[int, ...], count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    r = domain.range(shape)
    u = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    u[::2] = u[::2].round()
    points = r.low + u * (r.high - r.low)
    if isinstance(domain, Ball) and domain.p == 2:
        apart = points - domain.center
        norms = apart.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
        points = domain.center + apart * (domain.radius / norms).clamp(max=1)
    return points


@pytest.mark.parametrize("name", LAYERS)
def test_domains(name: str) -> None:
    layer, shape = made(name)
    for domain in domains(shape):
        points = inside(domain, shape)
        values = domain.range(shape)
        found = range_rule(layer, values)
        outputs = layer(points).detach()
        assert found.holds(outputs)
        if found.center is not None and found.radius is not None:
            assert ((outputs - found.center).flatten(1).norm(dim=1) <= found.radius).all()
        all_of_them = jacobians(layer, points)
        for p in NORMS:
            everywhere = lipschitz_bound(layer, shape, p).value
            local = local_lipschitz_rule(layer, values, p).max().item()
            assert local <= everywhere * (1 + 1e-9)
            bound = lipschitz_bound(layer, shape, p, domain=domain)
            steepest = torch.linalg.matrix_norm(all_of_them, p).max().item()
            assert steepest <= min(bound.value, local)


@pytest.mark.parametrize("name", ["layer", "group", "rms", "instance 1d", "rms without eps"])
def test_intervals_of_jacobians_hold_all_of_them(name: str) -> None:
    layer, shape = made(name)
    n = math.prod(shape)
    rows = torch.eye(n, dtype=torch.float64).view(1, n, *shape)
    for domain in domains(shape):
        values = domain.range(shape)
        back = pullback_rule(layer, (rows, torch.zeros_like(rows)), values)
        assert back is not None
        center, radius = (part.flatten(2)[0] for part in back)
        for x in inside(domain, shape):
            assert ((jacobian(layer, x) - center).abs() <= radius + 1e-13).all()


def test_a_variance_that_is_known_makes_a_better_bound() -> None:
    layer, x = nn.LayerNorm(4).double(), torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    steep = torch.linalg.matrix_norm(jacobian(layer, x), 2).item()
    bound = lipschitz_bound(layer, (4,), domain=Ball(x, 1e-6)).value
    assert bound == pytest.approx(steep, rel=1e-4)
    assert lipschitz_bound(layer, (4,)).value > 300


def test_eps_zero() -> None:
    for layer in (nn.LayerNorm(4, eps=0.0), nn.RMSNorm(4, eps=0.0), UnitNormalize(eps=0.0)):
        with pytest.raises(ValueError, match=r"eps = 0 is not Lipschitz on all of space: give a"):
            lipschitz_bound(layer, (4,))
        with pytest.raises(ValueError, match="divides by 0"):
            lipschitz_bound(layer, (4,), domain=Box(-1, 1))
        near = Ball(torch.tensor([0.0, 1.0, 2.0, 3.0]), 0.1)
        assert lipschitz_bound(layer, (4,), domain=near).value < 3


def test_rms_norm_without_eps_is_bounded_for_each_dtype() -> None:
    layer = nn.RMSNorm(3)
    bound = lipschitz_bound(layer, (3,))
    assert bound.kind == "upper bound"
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(layer).to(dtype)
        step = torch.full((1, 3), 1e-12, dtype=dtype)
        slope = ((twin(step) - twin(-step)).double().norm() / (2 * step).double().norm()).item()
        assert 1e3 < slope <= bound.value


REFUSED = {
    "batch in the group": (nn.LayerNorm((2, 4)), (4,), "reaches into the batch"),
    "negative eps": (nn.LayerNorm(4, eps=-1.0), (4,), "eps must be at least 0"),
    "instance without channels": (nn.InstanceNorm1d(2), (4,), "channels and 1 sizes"),
    "response of k = 0": (nn.LocalResponseNorm(2, k=0.0), (3, 2), "for k > 0"),
    "batch to unit length": (UnitNormalize(0), (4,), "mixes samples"),
    "unfold": (nn.Unfold(2), (4, 4), "must keep samples apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    layer, shape, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(layer, shape)


# ------------------------------------------------------------- functions, patches, products


class Functions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x, (4,)) + functional.rms_norm(x, (4,), eps=0.5)
        x = functional.group_norm(x.unsqueeze(2), 2).squeeze(2)
        return functional.normalize(x, eps=0.5)


def test_functions_are_the_layers() -> None:
    kinds = {type(node.layer) for node in trace(Functions(), (4,)).nodes[1:]}
    assert {nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, UnitNormalize} <= kinds
    net, domain = Functions(), Ball(torch.tensor([0.0, 1.0, 3.0, 5.0]), 0.05)
    below = max(torch.linalg.matrix_norm(jacobian(net, x), 2).item() for x in inside(domain, (4,)))
    assert below <= lipschitz_bound(net, (4,), domain=domain).value < 5
    below = lipschitz_lower_bound(net, torch.randn(3, 4), radius=0.01, steps=20)
    assert below.value <= lipschitz_bound(net, (4,)).value


PATCHES = {
    "apart": (nn.Unfold(2, stride=2), (1, 4, 4)),
    "overlapping": (nn.Unfold(3, padding=1), (2, 4, 5)),
    "dilated": (nn.Unfold((2, 1), dilation=2, stride=(1, 2)), (1, 5, 4)),
    "fold": (nn.Fold((4, 4), 2, stride=2), (4, 4)),
    "overlapping fold": (nn.Fold((4, 5), 3, padding=1), (18, 20)),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", PATCHES)
def test_patches_are_exact(name: str, p: float) -> None:
    layer, shape = PATCHES[name]
    x = torch.randn(shape, dtype=torch.float64)
    bound: Bound = lipschitz_bound(layer, shape, p)
    true = torch.linalg.matrix_norm(jacobian(layer, x), p).item()
    assert bound.kind == "exact"
    assert bound.value == pytest.approx(true, rel=1e-12)
    assert range_rule(layer, Box(-1, 2).range(shape)).holds(layer(inside(Box(-1, 2), shape)))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 2)
        self.bilinear = nn.Bilinear(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.first(x), self.second(x))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("p", NORMS)
def test_bilinear(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = Product().double()
    with pytest.raises(ValueError, match="give a domain"):
        lipschitz_bound(net, shape, p)
    for domain in (Box(-1, 1), Ball(torch.ones(shape), 0.01)):
        bound = lipschitz_bound(net, shape, p, domain=domain).value
        points = inside(domain, shape)
        steepest = max(torch.linalg.matrix_norm(jacobian(net, x), p).item() for x in points)
        assert steepest <= bound
        layer = trace(net, shape).double().nodes[-1].layer
        parts = [range_rule(part, domain.range(shape)) for part in (net.first, net.second)]
        assert layer.range(parts).holds(net(points).detach())  # type: ignore[union-attr,operator]


def test_embeddings_are_refused() -> None:
    with pytest.raises(TypeError, match="takes indices, which are no points of a normed space"):
        lipschitz_bound(nn.Embedding(5, 3), (4,))


def test_ranges_of_a_batch_of_domains() -> None:
    layer = nn.LayerNorm(3).double()
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]).double()
    values = Range(x - 0.1, x + 0.1)
    local = local_lipschitz_rule(layer, values, 2.0)
    assert local[0] < 2
    assert local[1] > 300
    assert range_rule(layer, values).holds(layer(x))
