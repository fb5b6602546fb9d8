from __future__ import annotations

import copy
import decimal
import math
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook import activations
from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
    Pairing,
    SmoothAbsoluteValue,
    absolute_value,
    full_sort,
    group_sort,
    householder,
    householder_order_2,
    max_min,
    n_activation,
    smooth_absolute_value,
)
from lipbook.composition import Box, lipschitz_bound
from lipbook.rules import Range, pullback_rule, range_rule, slope_rule
from lipbook.units import units_rule

# Every module, for 12 channels. The angles of the Householder activation are no special ones.


def bent_householder() -> Householder:
    module = Householder(12, dtype=torch.float64)
    with torch.no_grad():
        module.angle.copy_(torch.linspace(-4, 5, 6))
    return module


def bent_halves() -> Householder:
    module = Householder(12, pairing="halves", dtype=torch.float64)
    module.load_state_dict(bent_householder().state_dict())
    return module


def bent_twice() -> HouseholderOrder2:
    """Among the lengths are 0, some that are folded, and neither sector of pair 2 is wide."""
    module = HouseholderOrder2(12, dtype=torch.float64)
    rows = [
        [0.3, -2.0, 4.0, 1.0, 0.0, -1.0],
        [1.0, 2.5, 0.01, -0.7, 9.0, math.pi],
        [0.5, 0.0, 0.02, 3.0, -1.2, 1.0],
    ]
    with torch.no_grad():
        module.angles.copy_(torch.tensor(rows, dtype=torch.float64))
    return module


def bent_zigzag() -> NActivation:
    module = NActivation(12, dtype=torch.float64)
    with torch.no_grad():
        module.kinks.copy_(torch.linspace(-1.5, 2, 24).view(2, 12).double())
        module.kinks[:, ::3] = module.kinks[:, ::3].flip(0)
        module.kinks[:, 1] = 0.25
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "GroupSort(2)": lambda: GroupSort(2),
    "GroupSort(3)": lambda: GroupSort(3),
    "GroupSort(1)": lambda: GroupSort(1),
    "MaxMin": MaxMin,
    "MaxMin halves": lambda: MaxMin(pairing="halves"),
    "FullSort": FullSort,
    "Householder": bent_householder,
    "Householder halves": bent_halves,
    "HouseholderOrder2": bent_twice,
    "NActivation": bent_zigzag,
    "AbsoluteValue": AbsoluteValue,
}
PERMUTING = [name for name in MODULES if name.startswith(("GroupSort", "MaxMin", "FullSort"))]
LINEAR = [name for name in MODULES if name != "NActivation"]  # on each piece, without a constant


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobian of a batch of one, as a matrix."""
    return torch.func.jacrev(function)(x).reshape(x.numel(), x.numel())


# ---------------------------------------------------------------------------------- definition


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_group_sort_sorts_each_run_of_neighbours(
    groups: int, group_size: int, seed: int, scale: float
) -> None:
    x = scale * np.random.default_rng(seed).standard_normal((3, groups * group_size, 2))
    expected = np.empty_like(x)
    for start in range(0, x.shape[1], group_size):
        expected[:, start : start + group_size] = np.sort(x[:, start : start + group_size], axis=1)
    result = group_sort(torch.from_numpy(x), group_size)
    assert result.shape == x.shape
    assert np.array_equal(result.numpy(), expected)


def test_values_on_paper() -> None:
    x = torch.tensor([[4.0, 1.0, -3.0, 2.0, 0.0, 7.0]])
    assert group_sort(x, 1).tolist() == x.tolist()
    assert group_sort(x, 2).tolist() == [[1, 4, -3, 2, 0, 7]]
    assert group_sort(x, 3).tolist() == [[-3, 1, 4, 0, 2, 7]]
    assert full_sort(x).tolist() == [[-3, 0, 1, 2, 4, 7]]
    assert max_min(x).tolist() == [[1, 4, -3, 2, 0, 7]]
    assert max_min(x, pairing="halves").tolist() == [[4, 1, 7, 2, 0, -3]]
    assert absolute_value(x).tolist() == [[4, 1, 3, 2, 0, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_max_min_equals_group_sort_of_two(dtype: torch.dtype) -> None:
    x = torch.randn(50, 8, 3, dtype=torch.float64).round(decimals=1).to(dtype)  # with many ties
    assert torch.equal(max_min(x), group_sort(x, 2))
    assert torch.equal(MaxMin()(x), GroupSort(2)(x))
    assert torch.equal(group_sort(x, 2), x.unflatten(1, (4, 2)).sort(2).values.flatten(1, 2))


def test_halves_are_neighbours_up_to_a_permutation() -> None:
    x = torch.randn(5, 8)
    interleaved = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)  # 0 4 1 5 2 6 3 7
    smaller, larger = max_min(interleaved).unflatten(1, (4, 2)).unbind(2)
    assert torch.equal(max_min(x, pairing="halves"), torch.cat((larger, smaller), 1))


def test_householder_reflects_a_pair_by_its_definition() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    angle = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64)
    expected = x.clone()
    for row in range(len(x)):
        for pair, theta in enumerate(angle.tolist()):
            v = torch.tensor([-math.sin(theta / 2), math.cos(theta / 2)], dtype=torch.float64)
            z = x[row, 2 * pair : 2 * pair + 2]
            if v @ z < 0:
                expected[row, 2 * pair : 2 * pair + 2] = z - 2 * v * (v @ z)
    assert torch.allclose(householder(x, angle), expected, rtol=0, atol=1e-14)


def test_householder_starts_as_max_min() -> None:
    x = torch.randn(20, 12, 3, dtype=torch.float64)
    module = Householder(12, dtype=torch.float64)
    assert torch.allclose(module(x), max_min(x), rtol=0, atol=1e-15)


def test_halves_of_householder_are_neighbours_up_to_a_permutation() -> None:
    x = torch.randn(5, 8)
    interleaved = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)  # 0 4 1 5 2 6 3 7
    for function, weight in (
        (householder, torch.linspace(-3, 3, 4)),
        (householder_order_2, torch.linspace(-3, 3, 12).view(3, 4)),
    ):
        expected = function(interleaved, weight).unflatten(1, (4, 2)).transpose(1, 2).flatten(1)
        assert torch.equal(function(x, weight, pairing="halves"), expected)


def test_large_batches_are_reflected_as_small_ones_are() -> None:
    """Two ways to compute it: values to the bit, and gradients of pairs and angles."""
    x = torch.randn(2**14, 8, dtype=torch.float64, requires_grad=True)
    angle = torch.linspace(-3, 3, 4).double().requires_grad_()
    whole, parts = householder(x, angle), [householder(part, angle) for part in x.split(2**12)]
    assert torch.equal(whole, torch.cat(parts))
    cotangent = torch.randn_like(whole)
    found = torch.autograd.grad(whole, (x, angle), cotangent)
    expected = torch.autograd.grad(torch.cat(parts), (x, angle), cotangent)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def angle_by_definition(t: float, a: float, b: float) -> float:
    if t <= a:
        return t
    if t <= a + b:
        return 2 * a - t
    return t - 2 * b if t <= math.pi + b else -t


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, math.pi / 2, 3.0, math.pi]))
def test_order_two_maps_angles_by_its_definition(seed: int, b: float) -> None:
    random = np.random.default_rng(seed)
    theta, a = random.uniform(-4, 4), random.choice([0.0, math.pi, random.uniform(0, math.pi)])
    angles = torch.tensor([[theta], [a], [b]], dtype=torch.float64)
    t, r = random.uniform(0, 2 * math.pi, 40), random.uniform(0.1, 10, 40)
    x = np.stack((r * np.cos(t + theta / 2), r * np.sin(t + theta / 2)), 1)
    image = np.array([angle_by_definition(each, a, b) for each in t]) + theta / 2
    expected = np.stack((r * np.cos(image), r * np.sin(image)), 1)
    found = householder_order_2(torch.from_numpy(x), angles).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_order_two_holds_the_others() -> None:
    x = torch.randn(50, 6, 3, dtype=torch.float64)
    theta, zero = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64), torch.zeros(3).double()
    for a, b in ((0.3, 0.0), (2.0, 0.0), (math.pi, 1.0)):
        angles = torch.stack((theta, zero + a, zero + b))
        assert torch.allclose(householder_order_2(x, angles), householder(x, theta), atol=1e-14)
    right = zero + math.pi / 2
    found = householder_order_2(x, torch.stack((zero, right, right)))
    assert torch.allclose(found, x.abs(), atol=1e-14)
    module = HouseholderOrder2(6, dtype=torch.float64)
    assert torch.allclose(module(x), max_min(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_order_two_is_continuous_where_sectors_are_narrow(dtype: torch.dtype) -> None:
    """Neighbours on a fine circle stay neighbours, whatever the rounding of the sectors' ends."""
    lengths = [0.0, 1e-9, 1e-3, 1.3, math.pi - 1e-3, math.pi, math.pi + 1e-3]
    a, b = torch.meshgrid(*2 * [torch.tensor(lengths)], indexing="ij")
    angles = torch.stack((torch.full((49,), 0.7), a.flatten(), b.flatten())).to(dtype)
    around = torch.linspace(0, 2 * math.pi, 2001).double() + 0.35
    x = torch.stack((around.cos(), around.sin()), 1).to(dtype)
    image = householder_order_2(x.repeat(1, 49), angles).double().unflatten(1, (49, 2))
    steps, away = image.diff(dim=0).norm(dim=-1), x.double().diff(dim=0).norm(dim=-1)
    assert (steps - away[:, None]).max() <= 100 * torch.finfo(dtype).eps


@given(st.integers(0, 2**31))
def test_the_zigzag_by_its_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, kinks = random.standard_normal((20, 3)), random.standard_normal((2, 3))
    expected = np.empty_like(x)
    for i, j in np.ndindex(*x.shape):
        low, high = sorted(kinks[:, j])
        value = x[i, j]
        piece = value - 2 * low if value <= low else value - 2 * high if value >= high else -value
        expected[i, j] = piece
    found = n_activation(torch.from_numpy(x), torch.from_numpy(kinks))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-15)
    ends = torch.from_numpy(np.sort(kinks, 0))
    assert torch.equal(n_activation(ends, ends), -ends)


def test_householder_is_continuous_where_it_starts_to_reflect() -> None:
    angle = torch.tensor([0.7], dtype=torch.float64)
    on_the_mirror = torch.tensor([[math.cos(0.35), math.sin(0.35)]], dtype=torch.float64)
    normal = torch.tensor([[-math.sin(0.35), math.cos(0.35)]], dtype=torch.float64)
    above = householder(on_the_mirror + 1e-9 * normal, angle)
    below = householder(on_the_mirror - 1e-9 * normal, angle)
    assert (above - below).abs().max() < 1e-8


# ------------------------------------------------------------------------------------- theorem


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["generic", "zeros", "ties"])
@pytest.mark.parametrize("shape", [(1, 12), (1, 12, 2, 3)])
def test_all_singular_values_of_the_jacobian_are_one(
    name: str, kind: str, shape: tuple[int, ...]
) -> None:
    """At generic points and where entries are equal or zero, for vectors and images."""
    x = {
        "generic": torch.randn(shape, dtype=torch.float64),
        "zeros": torch.zeros(shape, dtype=torch.float64),
        "ties": torch.randint(-1, 2, shape).double(),
    }[kind]
    matrix = jacobian(MODULES[name](), x)
    assert (torch.linalg.svdvals(matrix) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("name", PERMUTING)
def test_the_jacobian_is_a_permutation_also_at_ties(name: str) -> None:
    for x in (torch.randn(1, 12), torch.zeros(1, 12), torch.randint(-1, 2, (1, 12)).float()):
        matrix = jacobian(MODULES[name](), x)
        assert set(matrix.unique().tolist()) == {0.0, 1.0}
        assert matrix.sum(0).tolist() == matrix.sum(1).tolist() == [1.0] * 12
        assert torch.equal(matrix @ x[0], MODULES[name]()(x)[0])


@pytest.mark.parametrize("name", MODULES)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]), st.sampled_from([1, 2, math.inf]))
def test_differences_grow_at_most_by_the_lipschitz_constant(
    name: str, seed: int, scale: float, p: float
) -> None:
    module = MODULES[name]()
    x, y = torch.randn(
        2, 30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x, y = scale * x, scale * y
    before = torch.linalg.vector_norm(x - y, p, dim=1)
    after = torch.linalg.vector_norm(module(x) - module(y), p, dim=1)
    bound = lipschitz_bound(module, (12,), p)
    assert bound.kind == "exact"
    # rounding of sums of 12 terms, relative to the points whose difference is taken, and to kinks
    size = scale if name in LINEAR else scale + 2
    assert bool((after <= bound.value * before + 1e-14 * size * 12).all())


@pytest.mark.parametrize("name", LINEAR)
def test_norm_of_vectors_is_kept(name: str) -> None:
    x = torch.randn(30, 12, 4, dtype=torch.float64)
    assert torch.allclose(MODULES[name]()(x).norm(dim=1), x.norm(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_lipschitz_constant_is_attained(name: str, p: float) -> None:
    module = MODULES[name]()
    norms = [
        torch.linalg.matrix_norm(jacobian(module, torch.randn(1, 12).double()), p).item()
        for _ in range(30)
    ]
    assert max(norms) == pytest.approx(lipschitz_bound(module, (12,), p).value, rel=1e-14)


def test_householder_constants_on_paper() -> None:
    module = Householder(4, dtype=torch.float64)
    with torch.no_grad():
        module.angle.copy_(torch.tensor([math.pi / 4, math.pi]))
    assert lipschitz_bound(module, (4,), 2).value == 1
    assert lipschitz_bound(module, (4,), 1).value == pytest.approx(math.sqrt(2), rel=1e-15)
    assert lipschitz_bound(module, (4,), math.inf).value == pytest.approx(math.sqrt(2), rel=1e-15)


@pytest.mark.parametrize("p", [1, math.inf])
def test_constants_of_order_two_are_those_of_its_sectors(p: float) -> None:
    """Each sector alone turns by 45 degrees, and one without width counts for nothing."""
    module, eighth = HouseholderOrder2(2, dtype=torch.float64), math.pi / 8
    for angles, value in (
        ((0.0, 0.0, eighth), math.sqrt(2)),
        ((0.0, eighth, math.pi / 2), math.sqrt(2)),
        ((0.0, -eighth, 1e-3), math.sqrt(2)),
        ((0.0, eighth, 0.0), 1.0),
        ((2 * eighth, -eighth, 0.0), math.sqrt(2)),
        ((4 * eighth, 4 * eighth, 0.0), 1.0),
    ):
        module.angles.data = torch.tensor(angles, dtype=torch.float64)[:, None]
        assert lipschitz_bound(module, (2,), p).value == pytest.approx(value, rel=1e-14), angles
    module.angles.data = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    seen = max(
        torch.linalg.matrix_norm(jacobian(module, torch.randn(1, 2).double()), p).item()
        for _ in range(60)
    )
    assert lipschitz_bound(module, (2,), p).value == pytest.approx(seen, rel=1e-14)


def test_max_min_makes_the_absolute_value_of_two_units() -> None:
    """The network of Anil et al. that no norm-constrained ReLU network can match."""
    r = math.sqrt(0.5)
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    hidden = max_min(x @ torch.tensor([[r, -r]], dtype=torch.float64))
    assert torch.allclose(hidden @ torch.tensor([[-r], [r]], dtype=torch.float64), x.abs())


# ---------------------------------------------------------------------------------- dimensions


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, dim: group_sort(x, 3, dim),
        lambda x, dim: group_sort(x, 2, dim),
        lambda x, dim: max_min(x, dim, "halves"),
        full_sort,
        lambda x, dim: householder(x, torch.tensor([0.3, 2.0, -1.0]), dim),
        lambda x, dim: householder(x, torch.tensor([0.3, 2.0, -1.0]), dim, "halves"),
        lambda x, dim: householder_order_2(x, torch.linspace(0, 2, 9).view(3, 3), dim),
        lambda x, dim: n_activation(x, torch.linspace(-1, 1, 12).view(2, 6), dim),
    ],
)
def test_any_dimension_holds_the_channels(
    function: Callable[[Tensor, int], Tensor], dim: int
) -> None:
    x = torch.randn(6, 6, 6, 6)
    moved = function(x.movedim(dim, 1).contiguous(), 1).movedim(1, dim)
    assert torch.equal(function(x, dim), moved)


def test_modules_pass_their_dimension_on() -> None:
    x = torch.randn(2, 3, 6)
    angle = torch.full((3,), math.pi / 2)
    assert torch.equal(GroupSort(3, dim=-1)(x), group_sort(x, 3, 2))
    assert torch.equal(MaxMin(2, "halves")(x), max_min(x, 2, "halves"))
    assert torch.equal(FullSort(2)(x), full_sort(x, 2))
    assert torch.equal(Householder(6, dim=2)(x), householder(x, angle, 2))
    assert torch.equal(Householder(6, 2, "halves")(x), householder(x, angle, 2, "halves"))
    angles = torch.stack((angle, angle, 0 * angle))
    twice = HouseholderOrder2(6, 2, "halves")(x)
    assert torch.equal(twice, householder_order_2(x, angles, 2, "halves"))
    kinks = torch.tensor([[-1.0], [0.0]]).expand(2, 6)
    assert torch.equal(NActivation(6, -1)(x), n_activation(x, kinks, 2))


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: group_sort(torch.zeros(2, 7), 2),
            ValueError,
            "group_size.* size 2 and 7 channels",
        ),
        (
            lambda: group_sort(torch.zeros(2, 8), 3),
            ValueError,
            "group_size.* size 3 and 8 channels",
        ),
        (lambda: GroupSort(4)(torch.zeros(1, 6)), ValueError, "group_size.* size 4 and 6 channels"),
        (lambda: group_sort(torch.zeros(2, 8), 0), ValueError, "group_size must be at least 1.* 0"),
        (lambda: GroupSort(-2), ValueError, "group_size must be at least 1, got -2"),
        (lambda: GroupSort(2.0), TypeError, "group_size must be an integer, got float"),  # type: ignore[arg-type]
        (lambda: max_min(torch.zeros(2, 5)), ValueError, "size 2 and 5 channels"),
        (lambda: max_min(torch.zeros(2, 5), 1, "halves"), ValueError, "size 2 and 5 channels"),
        (
            lambda: max_min(torch.zeros(2, 4), 1, "thirds"),
            ValueError,
            "pairing.*neighbours.*thirds",
        ),  # type: ignore[arg-type]
        (lambda: MaxMin(pairing="thirds"), ValueError, "pairing.*neighbours.*halves.*thirds"),  # type: ignore[arg-type]
        (lambda: full_sort(torch.zeros(4)), ValueError, r"dimension dim=1, got shape \(4,\)"),
        (lambda: group_sort(torch.zeros(4, 4), 2, -3), ValueError, "dimension dim=-3"),
        (
            lambda: householder(torch.zeros(2, 5), torch.zeros(2)),
            ValueError,
            "size 2 and 5 channels",
        ),
        (
            lambda: householder(torch.zeros(2, 6), torch.zeros(2)),
            ValueError,
            r"angle must have shape \(3,\).*6 channels.*got \(2,\)",
        ),
        (
            lambda: householder_order_2(torch.zeros(2, 6), torch.zeros(3)),
            ValueError,
            r"angles must have shape \(3, 3\).*6 channels.*got \(3,\)",
        ),
        (
            lambda: n_activation(torch.zeros(2, 6), torch.zeros(2, 3)),
            ValueError,
            r"kinks must have shape \(2, 6\).*got \(2, 3\)",
        ),
        (lambda: HouseholderOrder2(5), ValueError, "channels must be even and at least 2, got 5"),
        (lambda: Householder(4, 1, "thirds"), ValueError, "pairing.*neighbours.*thirds"),  # type: ignore[arg-type]
        (lambda: NActivation(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: Householder(5), ValueError, "channels must be even and at least 2, got 5"),
        (lambda: Householder(0), ValueError, "channels must be even and at least 2, got 0"),
        (lambda: lipschitz_bound(GroupSort(2), (5,)), ValueError, "size 2 and 5 channels"),
    ],
)
def test_errors_name_the_argument_and_both_numbers(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------- life cycle


@pytest.mark.parametrize("name", MODULES)
def test_life_cycle(name: str) -> None:
    module = MODULES[name]()
    x = torch.randn(4, 12, 3, dtype=torch.float64)
    expected = module(x)
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), expected)
    per_sample = torch.func.vmap(lambda sample: module(sample[None])[0])(x)
    assert torch.equal(per_sample, expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_repr_shows_the_arguments() -> None:
    assert repr(GroupSort(3)) == "GroupSort(group_size=3, dim=1)"
    assert repr(MaxMin(pairing="halves")) == "MaxMin(dim=1, pairing='halves')"
    assert repr(FullSort(-1)) == "FullSort(dim=-1)"
    assert repr(Householder(6)) == "Householder(6, dim=1, pairing='neighbours')"
    assert repr(HouseholderOrder2(6, 2)) == "HouseholderOrder2(6, dim=2, pairing='neighbours')"
    assert repr(NActivation(5)) == "NActivation(5, dim=1)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_slope_of_the_absolute_value_is_a_sign(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    values = [-2.0, -0.0, 0.0, 3.0, least, -least, math.inf, -math.inf]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    gradient = torch.arange(16.0).to(dtype)[::2]  # not contiguous
    (found,) = torch.autograd.grad(absolute_value(x), x, gradient)
    assert torch.equal(found, gradient * torch.tensor([-1, 1, 1, 1, 1, -1, 1, -1], dtype=dtype))
    assert torch.equal(absolute_value(x), torch.tensor([abs(v) for v in values], dtype=dtype))
    assert absolute_value(torch.tensor([-3, 4])).tolist() == [3, 4]


@pytest.mark.parametrize("name", MODULES)
def test_gradcheck(name: str) -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    module = MODULES[name]().requires_grad_(False)
    assert torch.autograd.gradcheck(
        module, (x,), check_forward_ad=True, check_batched_grad=True
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda x: module(x) ** 3, (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
def test_a_pair_and_its_gradient_are_exchanged_to_the_bit(
    pairing: Pairing, dtype: torch.dtype
) -> None:
    """Zeros keep their signs, and what is no number stays where it is."""
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    first, second = (grid.reshape(-1) for grid in torch.meshgrid(special, special, indexing="ij"))
    x = torch.stack([first, second], 1).requires_grad_()
    gradient = torch.stack([second, first], 1)
    out = max_min(x, pairing=pairing)
    out.backward(gradient)
    assert x.grad is not None
    flipped = first > second if pairing == "neighbours" else first < second
    bits = getattr(torch, f"int{8 * dtype.itemsize}")
    for found, given_ in ((out.detach(), x.detach()), (x.grad, gradient)):
        for row, pair, flip in zip(found, given_, flipped, strict=True):
            assert torch.equal(row.view(bits), (pair.flip(0) if flip else pair).view(bits))


def test_strides_do_not_matter_to_an_exchange() -> None:
    x = torch.randn(3, 8, 5, 4)
    expected = max_min(x)
    assert torch.equal(max_min(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(max_min(x.transpose(0, 2)).transpose(0, 2), expected)
    x.requires_grad_()
    max_min(x).sum().backward()  # a gradient of one entry, seen as many
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


WEIGHTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "householder": (householder, (3,)),
    "householder, halves": (lambda x, w: householder(x, w, pairing="halves"), (3,)),
    "householder_order_2": (householder_order_2, (3, 3)),
    "n_activation": (n_activation, (2, 6)),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradcheck_of_the_weight(name: str) -> None:
    function, shape = WEIGHTED[name]
    x = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_kinks_that_coincide_have_a_gradient() -> None:
    """The mean of those of the two orders."""
    x = torch.tensor([[-2.0], [0.5], [3.0], [4.0]])
    kinks = torch.full((2, 1), 0.5, requires_grad=True)
    n_activation(x, kinks).sum().backward()
    assert kinks.grad is not None
    assert kinks.grad.flatten().tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("make", [Householder, HouseholderOrder2, NActivation])
def test_the_weight_is_trained(make: type[nn.Module]) -> None:
    module = make(6)
    (weight,) = module.parameters()
    start = weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(64, 6, 4)
    for _ in range(25):
        optimizer.zero_grad()
        module(x)[:, ::2].sum().backward()
        optimizer.step()
    assert (weight - start).abs().flatten(1 - weight.dim()).amax() > 0.1
    matrix = jacobian(module, torch.randn(1, 6))
    assert (torch.linalg.svdvals(matrix) - 1).abs().max() < 1e-6


# ------------------------------------------------------------------ a smooth absolute value


@given(st.floats(-8, 8), st.floats(-6, 6))
def test_a_smooth_absolute_value_by_its_formula(log_x: float, log_delta: float) -> None:
    """In 60 digits, where the difference of the definition loses none that count."""
    with decimal.localcontext(prec=60):
        x, delta = Decimal(10) ** Decimal(log_x), Decimal(10**log_delta)
        expected = float((x * x + delta * delta).sqrt() - delta)
    for dtype, eps in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        signed = torch.tensor([float(x), -float(x)], dtype=dtype)
        found = smooth_absolute_value(signed, 10**log_delta)
        assert found[0] == found[1]
        assert found[0].item() == pytest.approx(expected, rel=eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_smooth_absolute_value_is_finite_wherever_its_input_is(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ends = torch.tensor([0.0, info.tiny, 1.0, 300.0, info.max], dtype=dtype)
    for delta in (1e-30, 0.05, 1e30):
        x = torch.cat((-ends, ends)).requires_grad_()
        y = smooth_absolute_value(x, delta)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() <= 1 + info.eps
        assert y.dtype == dtype
        assert ((y <= x.abs()) & (y >= 0)).all()
        if delta < 1:
            assert (y >= x.abs() * (1 - info.eps) - delta).all()
    assert smooth_absolute_value(torch.tensor([-math.inf, math.inf])).tolist() == [math.inf] * 2
    assert smooth_absolute_value(torch.tensor([math.nan])).isnan().all()


@given(st.floats(0.01, 3), st.floats(-3, 3), st.floats(0, 3), st.sampled_from([1, 2, math.inf]))
def test_slopes_of_a_smooth_absolute_value_on_an_interval(
    delta: float, low: float, width: float, p: float
) -> None:
    """The slope at an end is attained there, and rises in between; so are the least values."""
    layer, high = SmoothAbsoluteValue(delta), low + width
    steep = max(abs(end) / math.hypot(end, delta) for end in (low, high))
    box = Box(*torch.tensor([low, high], dtype=torch.float64))  # of a number it would be float32
    bound = lipschitz_bound(layer, (3,), p, domain=box).value
    assert steep * (1 - 1e-15) <= bound <= min(1.0, steep * (1 + 1e-12) + 1e-200)
    values = box.range((3,))
    inside = torch.linspace(low, high, 101, dtype=torch.float64)[:, None].expand(-1, 3)
    image = range_rule(layer, values)
    assert image.holds(layer(inside))
    least = 0.0 if low <= 0 <= high else min(layer(inside)[[0, -1], 0].tolist())
    assert image.low.min().item() == pytest.approx(least, rel=1e-12, abs=1e-200)
    least_slope, most_slope = slope_rule(layer, values)  # type: ignore[misc]
    slopes = inside / torch.hypot(inside, torch.full_like(inside, delta))
    assert ((slopes >= least_slope - 1e-15) & (slopes <= most_slope + 1e-15)).all()


def test_a_smooth_absolute_value_comes_close_to_its_constant() -> None:
    """1 is the limit of its slopes, of both signs, and two points come as close as one likes."""
    layer = SmoothAbsoluteValue(0.5)
    bound = lipschitz_bound(layer, (2, 3))
    assert (bound.value, bound.kind) == (1, "exact")
    x = torch.tensor([1e6, 2e6], dtype=torch.float64)
    for points in (x, -x):
        rise = (layer(points)[1] - layer(points)[0]).abs().item()
        assert 1 - 1e-12 <= rise / 1e6 <= 1
    units = units_rule(layer, (2,))
    assert units is not None
    assert (units.low.min().item(), units.high.max().item()) == pytest.approx((-1, 1), abs=1e-14)
    assert repr(layer) == "SmoothAbsoluteValue(delta=0.5)"


def test_derivatives_of_a_smooth_absolute_value() -> None:
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    for delta in (0.05, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, delta=delta: smooth_absolute_value(x, delta),
            (x,),
            check_forward_ad=True,
            check_batched_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            lambda x, delta=delta: smooth_absolute_value(x, delta), (x,)
        )


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan, math.inf, 1e-31])
def test_deltas_are_refused(delta: float) -> None:
    for call in (SmoothAbsoluteValue, lambda delta: smooth_absolute_value(torch.ones(2), delta)):
        with pytest.raises(ValueError, match="delta must be between 1e-30 and 1e30, got"):
            call(delta)


def test_all_is_complete() -> None:
    own = {
        name
        for name, value in vars(activations).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == activations.__name__
    }
    assert own == set(activations.__all__)


def test_rows_are_pulled_back_through_a_sort_group_by_group() -> None:
    """A group whose order is known is a permutation, another one an interval; samples differ."""
    low = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    values = Range(low, low + 1)
    rows = torch.randn(2, 3, 4, dtype=torch.float64)
    middle, radius = pullback_rule(MaxMin(), (rows, torch.zeros_like(rows)), values)
    first, second = rows[..., :2], rows[..., 2:]
    swapped, undecided = first[0].flip(-1), second[0].mean(-1, keepdim=True).expand(3, 2)
    assert torch.equal(middle[0, :, :2], swapped)
    assert torch.allclose(middle[0, :, 2:], undecided)
    assert torch.allclose(middle[1, :, :2], first[1].mean(-1, keepdim=True).expand(3, 2))
    assert torch.equal(middle[1, :, 2:], second[1])
    half = (rows[..., 0::2] - rows[..., 1::2]).abs() / 2
    assert (radius[0, :, :2] == 0).all()
    assert (radius[1, :, 2:] == 0).all()
    for sample, group in ((0, 1), (1, 0)):
        found = radius[sample, :, 2 * group : 2 * group + 2]
        assert torch.allclose(found, half[sample, :, [group]].expand(3, 2))
        assert (found >= half[sample, :, [group]]).all()


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2])
@pytest.mark.parametrize("kind", ["sort", "order 1", "order 2", "zigzag"])
def test_units_compute_what_the_layer_does_along_any_dimension(kind: str, dim: int) -> None:
    x = torch.randn(5, 4, 6, 2, dtype=torch.float64)
    size = x.shape[dim]
    layer: nn.Module = {
        "sort": lambda: GroupSort(2, dim),
        "order 1": lambda: Householder(size, dim, "halves"),
        "order 2": lambda: HouseholderOrder2(size, dim, "halves" if dim > 1 else "neighbours"),
        "zigzag": lambda: NActivation(size, dim),
    }[kind]().double()
    for weight in layer.parameters():
        nn.init.uniform_(weight, -2, 2)
    units = units_rule(layer, (4, 6, 2))
    assert units is not None
    with torch.no_grad():
        assert torch.allclose(units(x.flatten(1)), layer(x).flatten(1), atol=1e-14)
