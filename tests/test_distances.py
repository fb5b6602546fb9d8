"""Distances in the ∞-norm: definition, constants, draws in training, ranges, certificates."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook.composition import Range, check_layer, lipschitz_bound
from lipbook.distances import InfinityDistance, sorted_distance
from lipbook.errors import cuda_rule
from lipbook.orthogonal import Scale
from lipbook.robustness import certify
from lipbook.rounding import forward_error
from lipbook.rules import range_rule

DECAYS = (0.0, 0.3, 0.9)
every_decay = pytest.mark.parametrize("decay", DECAYS)


def by_definition(x: list[Fraction], w: list[Fraction], decay: Fraction) -> Fraction:
    """The sum without any rounding."""
    deviations = sorted((abs(a - b) for a, b in zip(x, w, strict=True)), reverse=True)
    return sum(((1 - decay) * decay**k * d for k, d in enumerate(deviations)), Fraction(0))


def fractions(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


def layer(n: int, m: int, decay: float, dtype: torch.dtype = torch.float64) -> Any:
    made: Any = InfinityDistance(n, m, decay, dtype=dtype).eval()
    nn.init.normal_(made.bias)
    return made


@every_decay
@pytest.mark.parametrize("n", [1, 7, 60])
def test_units_are_sums_of_sorted_deviations(decay: float, n: int) -> None:
    module = layer(n, 3, decay)
    x = torch.randn(2, 4, n, dtype=torch.float64)
    found = module(x)
    assert found.shape == (2, 4, 3)
    for i, j, k in itertools.product(range(2), range(4), range(3)):
        exact = by_definition(fractions(x[i, j]), fractions(module.weight[k]), Fraction(decay))
        assert found[i, j, k].item() == pytest.approx(float(exact) + module.bias[k].item(), 1e-13)


def test_many_inputs_are_measured_in_blocks() -> None:
    """More differences than a block holds, by NumPy."""
    x, w = torch.randn(2, 1, 40_000), torch.randn(3, 40_000)
    expected = np.abs(x.numpy() - w.numpy()).max(-1)[:, None]
    assert np.array_equal(sorted_distance(x, w).numpy(), expected)


@every_decay
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1.0, 2.0, math.inf]), st.data())
def test_constants_hold_and_are_attained(
    decay: float, n: int, m: int, p: float, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    module = layer(n, m, decay)
    bound = lipschitz_bound(module, (n,), p)
    assert bound.kind == "exact"
    x, step = torch.randn(2, 50, n, dtype=torch.float64)
    rise = torch.linalg.vector_norm(module(x + step) - module(x), p, dim=1)
    assert (rise <= bound.value * torch.linalg.vector_norm(step, p, dim=1) * (1 + 1e-12)).all()
    # Far away, where deviations are 100, 200, ..., a step along the dual vector of the c_k.
    factors = np.array([(1 - decay) * decay**k for k in range(n)])
    direction = {1.0: np.eye(n)[0], 2.0: factors, math.inf: np.ones(n)}[p]
    far = torch.tensor([100.0 * (n - k) for k in range(n)], dtype=torch.float64)[None]
    step = torch.from_numpy(direction)[None]
    rise = torch.linalg.vector_norm(module(far + step) - module(far), p)
    assert rise.item() == pytest.approx(bound.value * np.linalg.norm(direction, p), rel=1e-9)


@pytest.mark.parametrize("decay", [0.3, 0.8])
def test_the_expectation_of_a_draw_is_the_sorted_sum(decay: float) -> None:
    """All 2^5 draws of kept entries, each with its probability."""
    x, w = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    deviations = (x - w).abs().numpy()
    expected = 0.0
    for kept in itertools.product([False, True], repeat=5):
        probability = math.prod(1 - decay if keep else decay for keep in kept)
        expected += probability * max(deviations[list(kept)], default=0.0)
    found = sorted_distance(x[None], w[None], decay=decay).item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_call_in_training_draws_entries_for_the_whole_batch() -> None:
    module = layer(6, 4, 0.5).train()
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(4)
    found = module(x)
    torch.manual_seed(4)
    assert torch.equal(module(x), found)
    distances = (x[:, None] - module.weight).abs()
    subsets = [list(s) for k in range(1, 7) for s in itertools.combinations(range(6), k)]
    assert any(torch.equal(distances[..., s].amax(-1) + module.bias, found) for s in subsets)
    draws = torch.stack([module(x) for _ in range(2000)]).detach()
    deviation = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - module.eval()(x)).abs() <= 5 * deviation).all()


def test_no_entry_kept_leaves_the_bias() -> None:
    module = layer(1, 3, 0.999).train()
    torch.manual_seed(0)
    assert torch.equal(module(torch.randn(2, 1).double()), module.bias.expand(2, 3))


def test_without_decay_training_and_evaluation_agree() -> None:
    module, x = layer(7, 5, 0.0, torch.float32), torch.randn(9, 7)
    ours, torchs = ([module.train(mode), module(x)][1] for mode in (False, True))
    assert torch.equal(ours, torchs)
    gradients = [torch.autograd.grad(y.sum(), module.weight)[0] for y in (ours, torchs)]
    assert torch.equal(*gradients)


def test_a_gradient_at_a_tie_has_the_sum_1() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(sorted_distance(x, torch.tensor([[2.0, -2.0, 1.0]])), x)
    assert gradient.tolist() == [[-0.5, 0.5, 0.0]]


@every_decay
def test_ranges_are_those_of_a_box(decay: float) -> None:
    """Both ends are attained: by the point of the box nearest to w, and by the farthest corner."""
    module = layer(4, 3, decay)
    low = torch.randn(5, 4, dtype=torch.float64)
    high = low + 2 * torch.rand(5, 4, dtype=torch.float64)
    found = range_rule(module, Range(low, high))
    w = module.weight.detach()[:, None]
    nearest = torch.minimum(torch.maximum(w, low), high)
    farthest = torch.where((high - w).abs() > (low - w).abs(), high, low)
    for end, points in ((found.low, nearest), (found.high, farthest)):
        attained = torch.stack([module(point)[:, j] for j, point in enumerate(points)], 1)
        torch.testing.assert_close(end, attained, rtol=1e-10, atol=1e-10)
    samples = low + (high - low) * torch.rand(20, 1, 4, dtype=torch.float64)
    assert all(found.holds(module(x)) for x in samples)


@every_decay
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_every_answer_holds(decay: float, shape: tuple[int, ...]) -> None:
    check_layer(layer(5, 4, decay, torch.float32), shape, samples=4)


@every_decay
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_errors_of_the_program_are_bounded(decay: float, p: float) -> None:
    """Against rational arithmetic, on numbers of very different sizes."""
    module = layer(9, 3, decay, torch.float32)
    x = torch.randn(4, 9) * 10.0 ** torch.arange(-2, 2)[:, None]
    bound = forward_error(module, x, p)
    found = module(x)
    for i in range(4):
        exact = [
            by_definition(fractions(x[i]), fractions(w), Fraction(decay)) + Fraction(b.item())
            for w, b in zip(module.weight, module.bias, strict=True)
        ]
        off = [float(abs(Fraction(y.item()) - e)) for y, e in zip(found[i], exact, strict=True)]
        assert np.linalg.norm(off, p) <= bound.error[i].item()
    assert (bound.error <= 1e-4 * x.abs().sum(1).clamp(min=1)).all()


def test_bounds_of_errors_count_roundings_and_tokens() -> None:
    """A sum of 60 terms rounds 60 times on a path; the weights are met at each token."""
    module = layer(60, 2, 0.9, torch.float32)
    size = module.weight.abs().max().item()
    zero = torch.zeros(1, 3, 60)
    assert forward_error(module, zero, math.inf).error.item() >= 60 * 2.0**-24 * size
    one, three = (forward_error(module, zero[:, :k], 1).error.item() for k in (1, 3))
    assert three == pytest.approx(3 * one)


def test_without_decay_a_layer_in_training_has_its_bound() -> None:
    assert lipschitz_bound(InfinityDistance(3, 2), (3,), math.inf).value == 1


def test_a_layer_in_training_is_differentiated_forward() -> None:
    """Which torch.cdist is not."""
    module, x = layer(5, 4, 0.0), torch.randn(1, 5, dtype=torch.float64)
    expected = torch.func.jacrev(module)(x)
    assert torch.equal(torch.func.jacfwd(module.train())(x), expected)


def test_a_network_is_certified_and_its_radius_attained() -> None:
    """Two classes: the distances to two points, in the ∞-norm."""
    net: Any = nn.Sequential(InfinityDistance(3, 2, bias=False), Scale(-1.0)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
    x = torch.tensor([[0.5, 0.1, -0.2]])
    (radius,) = certify(net, [(x, torch.tensor([0]))], (3,), p=math.inf).radius.tolist()
    assert 1.5 - 1e-5 < radius <= 1.5  # to the plane in the middle
    assert net(x + torch.tensor([[1.51, 0.0, 0.0]])).argmax() == 1


def test_a_call_of_the_function_is_a_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return sorted_distance(x, self.weight, self.bias, 0.5)

    bound = lipschitz_bound(Net(), (4,), math.inf)
    assert bound.value == 1 - 0.5**4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InfinityDistance(3, 2, 1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: InfinityDistance(3, 2)(torch.ones(1, 4)), r"x must have shape \(batch, \*, 3\)"),
        (lambda: sorted_distance(torch.ones(3), torch.ones(1, 3)), "x must have 2 or more"),
        (lambda: sorted_distance(torch.ones(1, 3), torch.ones(3)), r"weight .*\(m, n\), got \(3,"),
        (
            lambda: sorted_distance(torch.ones(1, 3), torch.ones(2, 3), torch.ones(3)),
            r"bias must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: lipschitz_bound(InfinityDistance(3, 2, 0.5), (3,), math.inf),
            r"draws the entries that count in training mode: call .eval\(\)",
        ),
        (
            lambda: forward_error(layer(3, 2, 0.0).float(), torch.ones(1, 3).double()),
            "must run in the dtype of its weight torch.float32, got torch.float64",
        ),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_layer_shows_its_arguments_and_kernels_are_plain() -> None:
    module = InfinityDistance(3, 2, 0.3, bias=False)
    assert repr(module) == "InfinityDistance(3, 2, decay=0.3, bias=False)"
    cuda_rule(module, torch.zeros(1, 3))
