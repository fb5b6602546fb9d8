"""Known answers: by definition, by POT on samples, and by the two halves of their proofs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import chi, norm
from torch import Tensor

from lipbook.lab.problems import (
    TransportProblem,
    concentric_gaussians,
    cones,
    dirac_shell,
    gaussians_on_a_line,
    three_cones,
    translation,
)

PROBLEMS: dict[str, Callable[[], TransportProblem]] = {
    "shell on a line": lambda: dirac_shell(1),
    "shell": lambda: dirac_shell(5, radius=0.5),
    "shell, d = 128": lambda: dirac_shell(128),
    "two cones": lambda: cones([[0.0, 0.0, 0.0], [0.0, 5.0, 0.0]], radius=2),
    "three cones": three_cones,
    "translation": lambda: translation(3, 2.5),
    "line, wide to narrow": lambda: gaussians_on_a_line(3.0, 1.0),
    "line, narrow to wide, moved": lambda: gaussians_on_a_line(0.5, 2.0, shift=1.0),
    "line, moved back": lambda: gaussians_on_a_line(2.0, 0.5, shift=-0.7),
    "line, translation": lambda: gaussians_on_a_line(1.0, 1.0, shift=-2.0),
    "round, wide to narrow": lambda: concentric_gaussians(2, 3.0, 1.0),
    "round, d = 20": lambda: concentric_gaussians(20, 1.0, 1.5),
}


def samples(problem: TransportProblem, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return problem.sample_x(n, generator), problem.sample_y(n, generator)


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> TransportProblem:
    return request.param()


def test_samples_have_shape_and_dtype_and_repeat(problem: TransportProblem) -> None:
    (x, y), (again, _), (other, _) = (samples(problem, 7, seed) for seed in (0, 0, 1))
    assert x.shape == y.shape == (7, problem.dim)
    assert x.dtype == y.dtype == problem.potential(x).dtype == torch.float64
    assert problem.potential(x).shape == (7,)
    assert torch.equal(x, again)
    assert not torch.equal(x, other) or problem.dim == 1


def test_the_two_samples_are_independent() -> None:
    x, y = samples(translation(1), 10_000)
    # the correlation of n independent pairs has standard deviation 1/√n; five of them
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 5 / math.sqrt(10_000)


def test_potential_attains_the_distance(problem: TransportProblem) -> None:
    """Half of the proof: the dual value, within five standard errors (0 for the cones)."""
    n = 20_000
    x, y = (problem.potential(z) for z in samples(problem, n))
    error = math.sqrt((x.var() + y.var()).item() / n)
    rounding = 4 * math.sqrt(problem.dim) * problem.distance * torch.finfo(torch.float64).eps
    assert abs((x.mean() - y.mean()).item() - problem.distance) <= 5 * error + 10 * rounding


def test_potential_is_1_lipschitz(problem: TransportProblem) -> None:
    """On random pairs at all scales, and by its gradient, whose norm is 1 almost everywhere."""
    x, y = samples(problem, 2_000)
    scale = 10 ** torch.linspace(-6, 1, 2_000, dtype=torch.float64)[:, None]
    points = torch.cat((x, y, x * scale))
    moved = points + torch.cat((y - x, scale * x, scale * y))
    rise = (problem.potential(points) - problem.potential(moved)).abs()
    size = points.norm(dim=1) + moved.norm(dim=1) + 10
    rounding = 4 * problem.dim * size * torch.finfo(torch.float64).eps
    assert (rise <= (points - moved).norm(dim=1) + rounding).all()
    points = moved.requires_grad_()
    value = problem.potential(points)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    slope = gradient.norm(dim=1)[value.abs() > 1e-9]  # off the tips of the cones
    assert torch.allclose(slope, torch.ones_like(slope))


def test_equal_generators_draw_an_optimal_coupling(problem: TransportProblem) -> None:
    """The other half: point by point the samples cost what the potential gives, and POT agrees."""
    x, y = (
        sample(200, torch.Generator().manual_seed(3))
        for sample in (problem.sample_x, problem.sample_y)
    )
    cost = (x - y).norm(dim=1).mean().item()
    gap = (problem.potential(x).mean() - problem.potential(y).mean()).item()
    exact = ot.emd2([], [], ot.dist(x.numpy(), y.numpy(), metric="euclidean"))
    # sums of 200 rounded terms, of points of norm up to 30
    tolerance = 200 * 30 * torch.finfo(torch.float64).eps
    assert abs(cost - gap) < tolerance
    assert abs(exact - gap) < tolerance


@given(
    s1=st.floats(0.1, 10), s2=st.floats(0.1, 10), shift=st.floats(-10, 10).filter(lambda v: v != 0)
)
def test_line_is_the_integral_of_quantile_differences(s1: float, s2: float, shift: float) -> None:
    """W₁ on a line is ∫₀¹ |F⁻¹(u) - G⁻¹(u)| du, in another variable ∫ |μ + s z| φ(z) dz."""
    spread = s1 - s2
    kinks = [-shift / spread] if spread and abs(shift / spread) < 12 else []
    value, _ = quad(
        lambda z: abs(shift + spread * z) * norm.pdf(z), -12, 12, points=kinks, limit=200
    )
    assert math.isclose(
        gaussians_on_a_line(s1, s2, shift).distance, value, rel_tol=1e-7, abs_tol=1e-12
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 10, 500])
def test_round_gaussians_are_at_the_mean_of_chi(dim: int) -> None:
    expected = 1.5 * chi(dim).mean()
    assert math.isclose(concentric_gaussians(dim, 2.0, 0.5).distance, expected, rel_tol=1e-10)


def test_numbers_on_paper() -> None:
    assert three_cones().distance == 1
    assert dirac_shell(128, radius=2.5).distance == 2.5
    assert translation(7, 3).distance == 3
    assert math.isclose(gaussians_on_a_line(3, 1).distance, 2 * math.sqrt(2 / math.pi))
    assert gaussians_on_a_line(1, 1, -2).distance == 2
    points = torch.tensor([[-3.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [1.0, 0.0], [5.0, 4.0]])
    assert three_cones().potential(points).tolist() == [1, 1, 0.5, 1, 5]
    line = torch.tensor([[-3.0], [0.0], [2.0]])
    assert dirac_shell(1).potential(line).tolist() == [3, 0, 2]
    assert gaussians_on_a_line(1, 2).potential(line).tolist() == [-3, 0, -2]


def test_cones_lie_on_their_spheres_and_use_every_centre() -> None:
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    problem = cones(centres.tolist(), radius=1.5)
    x, y = samples(problem, 3_000)
    for points, distance in ((x, 1.5), (y, 0.0)):
        nearest, which = torch.cdist(points, centres).min(1)
        assert torch.allclose(nearest, torch.full_like(nearest, distance), atol=1e-12)
        # a binomial count of mean 1,000 has standard deviation 26; five of them
        assert (which.bincount(minlength=3) - 1_000).abs().max() < 130


def test_spheres_are_uniform() -> None:
    x, _ = samples(dirac_shell(3), 20_000)
    # each coordinate of a uniform point of the sphere in space is uniform on [-1, 1]: its mean is
    # 0 and its square 1/3, with variances 1/3 and 4/45; five standard errors
    assert (x.mean(0).abs() < 5 * math.sqrt(1 / 3 / 20_000)).all()
    assert ((x.square().mean(0) - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / 20_000)).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dirac_shell(0), "dim must be an integer >= 1, got 0"),
        (lambda: dirac_shell(2, radius=-1.0), "radius must be a finite number > 0, got -1.0"),
        (lambda: dirac_shell(2, radius=math.nan), "radius must be a finite number > 0, got nan"),
        (lambda: cones([[0.0], [1.0]]), "at least 2 .* = 2 apart.*got two at distance 1"),
        (lambda: cones([0.0, 1.0]), "centres must be a finite matrix"),  # type: ignore[list-item]
        (lambda: cones([[0.0], [1.0, 2.0]]), "centres must be a finite matrix"),
        (lambda: cones([[math.inf]]), "centres must be a finite matrix"),
        (lambda: cones([]), "centres must be a finite matrix"),
        (lambda: translation(2, 0.0), "shift must be a finite number > 0, got 0.0"),
        (lambda: translation(2.0), "dim must be an integer >= 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: gaussians_on_a_line(0.0, 1.0), "s1 must be a finite number > 0, got 0.0"),
        (lambda: gaussians_on_a_line(1.0, math.inf), "s2 must be a finite number > 0, got inf"),
        (lambda: gaussians_on_a_line(1.0, 1.0), "not 0 if s1 == s2"),
        (lambda: concentric_gaussians(2, 1.0, 1.0), "s1 and s2 must differ, got 1.0 twice"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
