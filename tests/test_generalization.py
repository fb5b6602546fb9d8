from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as sizes
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lipbook.activations import FullSort, GroupSort, Householder, MaxMin
from lipbook.composition import Residual, lipschitz_bound
from lipbook.convolutions import (
    NonexpansiveConv2d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    SkewOrthogonalConv2d,
)
from lipbook.generalization import (
    MarginBound,
    SpectralComplexity,
    data_norm,
    margin_loss,
    margins,
    normalized_margins,
    pac_bayes_term,
    spectral_complexity,
    spectrally_normalized_margin_bound,
)
from lipbook.jacobians import jacobian
from lipbook.orthogonal import OrthogonalLinear, Scale, SpectralNormLinear


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def plain(*widths: int, seed: int = 0) -> nn.Sequential:
    """A ReLU network in float64 without biases."""
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(n, m, bias=False, dtype=torch.float64)
        linear.weight.data = numbers(m, n, seed=seed + i)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def by_loops(
    matrices: list[np.ndarray], references: list[np.ndarray] | None = None, rho: float = 1
) -> float:
    """Equation (1.2) of Bartlett et al., entry by entry but for the singular values."""
    product, total = rho, 0.0
    for i, a in enumerate(matrices):
        difference = a - (references[i] if references else 0)
        distance = 0.0
        for row in difference:
            distance += math.sqrt(sum(float(entry) ** 2 for entry in row))
        norm = float(np.linalg.svd(a, compute_uv=False)[0])
        product *= norm
        total += (distance / norm) ** (2 / 3)
    return product * total ** (3 / 2)


# ------------------------------------------------------------------------------ definition


def test_margins_on_paper() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 0.0]])
    assert margins(logits, torch.tensor([1, 2, 0])).tolist() == [2, -2, 0]
    assert margins(logits, torch.tensor([1, 2, 0])).dtype == torch.float64


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 99))
def test_margins_are_a_loop(n: int, classes: int, seed: int) -> None:
    logits = numbers(n, classes, seed=seed)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n))
    for margin, row, y in zip(margins(logits, labels), logits.tolist(), labels, strict=True):
        assert margin == row[y] - max(z for j, z in enumerate(row) if j != y)


def test_margin_loss_counts_margins_at_the_threshold() -> None:
    found = torch.tensor([-1.0, 0.0, 0.0, 2.0])
    assert [margin_loss(found, g) for g in (-2, -1, 0, 1.9, 2, math.inf)] == [
        0, 0.25, 0.75, 0.75, 1, 1,
    ]  # fmt: skip


def test_data_norm_is_that_of_all_entries() -> None:
    assert data_norm(torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]]])) == 5


def test_normalized_margins_on_paper() -> None:
    logits, labels = torch.tensor([[3.0, 1.0], [0.0, 6.0]]), torch.tensor([0, 1])
    complexity = SpectralComplexity((2.0,), (4.0,), (3.0,), 1.0, 2)  # R = 4
    found = normalized_margins(logits, labels, complexity, 10.0)
    assert found.tolist() == pytest.approx([2 / (4 * 10 / 2), 6 / (4 * 10 / 2)])


def test_complexity_on_paper() -> None:
    """diag(2, 1) has norm 2 and rows of sum 3; (3, 4) has norm 5 and one row of 5."""
    network = plain(2, 2, 1)
    network[0].weight.data = torch.diag(torch.tensor([2.0, 1.0]).double())
    network[2].weight.data = torch.tensor([[3.0, 4.0]]).double()
    found = spectral_complexity(network, (2,))
    assert found.spectral_norms == pytest.approx((2, 5))
    assert found.distances == pytest.approx((3, 5))
    assert found.frobenius_norms == pytest.approx((math.sqrt(5), 5))
    assert found.value == pytest.approx(10 * (1.5 ** (2 / 3) + 1) ** 1.5)
    assert found.product == pytest.approx(10)
    assert (found.width, found.kind, found.lipschitz) == (2, "exact", 1)
    assert found.names == ("0 Linear", "2 Linear")


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(0, 99), st.booleans())
def test_complexity_is_a_loop(widths: list[int], seed: int, moved: bool) -> None:
    network, start = plain(*widths, seed=seed), plain(*widths, seed=seed + 50)
    weights = [p.detach().numpy() for p in network.parameters()]
    others = [p.detach().numpy() for p in start.parameters()]
    found = spectral_complexity(network, (widths[0],), start if moved else None)
    assert found.value == pytest.approx(by_loops(weights, others if moved else None))
    again = spectral_complexity(network, (widths[0],), list(start.parameters()) if moved else None)
    assert found == again


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "circular": (nn.Conv2d(2, 3, 3, 1, 1, padding_mode="circular", bias=False), (2, 4, 5)),
    "circular, strided": (
        nn.Conv2d(2, 3, 2, 2, 0, padding_mode="circular", bias=False),
        (2, 4, 6),
    ),
    "zeros": (nn.Conv2d(2, 3, 3, 1, 1, bias=False), (2, 4, 5)),
    "zeros, strided, dilated": (nn.Conv2d(2, 3, (3, 2), 2, (2, 1), 2, bias=False), (2, 7, 6)),
    "same": (nn.Conv2d(1, 2, 3, padding="same", bias=False), (1, 4, 4)),
    "valid": (nn.Conv2d(1, 2, 3, padding="valid", bias=False), (1, 4, 4)),
    "groups": (nn.Conv1d(4, 6, 3, 1, 1, groups=2, bias=False), (4, 5)),
    "three dimensions": (nn.Conv3d(1, 2, 2, 1, 1, bias=False), (1, 3, 2, 3)),
    "orthogonal": (OrthogonalConv2d(2, 4, 3, bias=False), (2, 4, 4)),
    "orthogonal, strided": (OrthogonalConv2d(2, 8, 2, 2, bias=False), (2, 4, 4)),
    "orthogonal, one dimension": (OrthogonalConv1d(2, 2, 3, bias=False), (2, 5)),
    "nonexpansive, even, zeros": (
        NonexpansiveConv2d(2, 3, 4, padding_mode="zeros", bias=False),
        (2, 5, 6),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_matrix_of_a_convolution_is_its_jacobian(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    layer = copy.deepcopy(layer)
    dense = jacobian(layer, torch.zeros(1, *shape))[0].detach().double()
    dense = dense.reshape(-1, math.prod(shape)).numpy()
    found = spectral_complexity(layer, shape)
    assert found.distances[0] == pytest.approx(np.linalg.norm(dense, axis=1).sum(), rel=1e-5)
    assert found.frobenius_norms[0] == pytest.approx(np.linalg.norm(dense), rel=1e-5)
    largest = np.linalg.norm(dense, 2)
    assert found.spectral_norms[0] >= largest * (1 - 1e-5)
    if found.kind == "exact":
        assert found.spectral_norms[0] == pytest.approx(largest, rel=1e-5)
    assert found.width == max(dense.shape)
    assert found.value >= by_loops([dense]) * (1 - 1e-5)


def test_maps_between_the_matrices_count_by_their_constants() -> None:
    network = nn.Sequential(Scale(2.0), *plain(4, 4, 4), Scale(-3.0), MaxMin(), nn.Softsign())
    inner = spectral_complexity(plain(4, 4, 4), (4,))
    found = spectral_complexity(network, (4,))
    assert found.lipschitz == pytest.approx(6)
    assert found.value == pytest.approx(6 * inner.value)
    assert found.product == pytest.approx(lipschitz_bound(network, (4,)).value)


def test_the_bound_is_the_sum_of_its_terms() -> None:
    """Two matrices, so that norms are powers of 3/2; the numbers of the docstring by hand."""
    complexity = SpectralComplexity((1.0, 1.4), (2.25, 0.9), (1.0, 1.0), 1.0, 10)
    found = torch.tensor([-1.0, 0.5, 1.0, 1.6, 3.0])
    bound = spectrally_normalized_margin_bound(found, complexity, 7.0, gamma=1.0, delta=0.1)
    n, q = 5, 1.5
    rounded = 1 * q * ((q**2 / 1) ** (2 / 3) + (1 / q) ** (2 / 3)) ** 1.5  # 0.9 up to 1
    assert bound.gamma == 1
    assert bound.margin_loss == pytest.approx(3 / 5)
    assert bound.complexity_term == pytest.approx(
        8 / n**1.5 + 72 * math.log(n) * math.sqrt(math.log(200)) / n * 7 * rounded
    )
    c = math.pi**2 / 3 - 1
    choices = sum(math.log(c * (1 + k) ** 2) for k in (0, 1, 2, 0, 0))
    confidence = 3 * math.sqrt((math.log(2 / 0.1) + choices) / (2 * n))
    assert bound.confidence_term == pytest.approx(confidence)
    assert bound.value == pytest.approx(
        bound.margin_loss + bound.complexity_term + bound.confidence_term
    )
    assert bound.vacuous
    down = spectrally_normalized_margin_bound(found, complexity, 7.0, gamma=2.2, delta=0.1)
    assert down.gamma == pytest.approx(1.5)


def test_the_weights_of_the_choices_sum_to_one() -> None:
    k = np.arange(-1_000_000, 1_000_001.0)
    total = (1 / ((math.pi**2 / 3 - 1) * (1 + np.abs(k)) ** 2)).sum()
    assert 1 - 1e-5 < total <= 1


def test_pac_bayes_on_paper() -> None:
    complexity = SpectralComplexity((2.0, 3.0), (9.0, 9.0), (4.0, 6.0), 1.0, 5)
    squares = 4 * 9 * (16 / 4 + 36 / 9)
    expected = math.sqrt(1.5**2 * 2**2 * 5 * math.log(10) * squares / (0.5**2 * 40))
    assert pac_bayes_term(complexity, 1.5, 0.5, 40) == pytest.approx(expected)


# --------------------------------------------------------------------------------- theorem


@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=5),
    st.integers(0, 99),
    st.floats(-4, 4),
)
def test_rescaled_relu_networks_keep_their_normalized_margins(
    widths: list[int], seed: int, log_c: float
) -> None:
    widths[-1] = max(2, widths[-1])
    network, c = plain(*widths, seed=seed), 10**log_c
    x = numbers(7, widths[0], seed=seed)
    y = torch.from_numpy(np.random.default_rng(seed).integers(widths[-1], size=7))
    before = normalized_margins(network(x), y, spectral_complexity(network, x.shape[1:]), 2.0)
    network[0].weight.data *= c
    network[2].weight.data /= c
    after = normalized_margins(network(x), y, spectral_complexity(network, x.shape[1:]), 2.0)
    torch.testing.assert_close(after, before)
    network[-1].weight.data *= c  # changes the margins, not the normalised ones
    after = normalized_margins(network(x), y, spectral_complexity(network, x.shape[1:]), 2.0)
    torch.testing.assert_close(after, before)


@given(st.integers(0, 2), st.floats(-6, 6), st.integers(0, 99))
def test_complexity_is_homogeneous_in_each_layer(i: int, log_c: float, seed: int) -> None:
    network, c = plain(3, 4, 5, 2, seed=seed), 10**log_c
    before = spectral_complexity(network, (3,)).value
    network[2 * i].weight.data *= c
    assert spectral_complexity(network, (3,)).value == pytest.approx(c * before)


@pytest.mark.parametrize("activation", [MaxMin, FullSort, nn.Identity])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_orthogonal_networks_have_the_closed_form(activation: Any, depth: int) -> None:
    layers = [(OrthogonalLinear(12, 12, bias=False), activation()) for _ in range(depth)]
    network = nn.Sequential(*itertools.chain.from_iterable(layers))
    found = spectral_complexity(network.double(), (12,))
    assert found.product == pytest.approx(1)
    assert found.value == pytest.approx(depth**1.5 * 12)
    wide = spectral_complexity(OrthogonalLinear(12, 5, bias=False).double(), (12,))
    assert wide.value == pytest.approx(5)
    tall = spectral_complexity(OrthogonalLinear(5, 12, bias=False).double(), (5,))
    assert tall.value <= math.sqrt(5 * 12) * (1 + 1e-9)


def test_orthogonal_convolutions_have_the_closed_form() -> None:
    layer = OrthogonalConv2d(4, 4, 3, bias=False).double()
    assert spectral_complexity(layer, (4, 5, 6)).value == pytest.approx(4 * 5 * 6)


@given(st.integers(0, 99), st.integers(0, 5), st.floats(1, 3))
def test_complexity_increases_in_every_norm(seed: int, which: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    s, b = rng.uniform(0, 2, (2, 3)).tolist()
    before = SpectralComplexity(tuple(s), tuple(b), tuple(b), 1.0, 9).value
    (s if which < 3 else b)[which % 3] *= factor
    after = SpectralComplexity(tuple(s), tuple(b), tuple(b), 1.0, 9).value
    assert after >= before * (1 - 1e-12)


def test_a_layer_of_zeros_is_no_exception() -> None:
    found = SpectralComplexity((0.0, 2.0), (0.5, 3.0), (0.0, 2.0), 1.0, 4)
    assert found.value == pytest.approx(1.0)  # only 0.5 · 2 is left
    assert spectrally_normalized_margin_bound(torch.ones(9), found, 1.0).value > 0


def test_a_network_at_its_reference_has_no_complexity() -> None:
    network = plain(3, 4, 2)
    found = spectral_complexity(network, (3,), copy.deepcopy(network))
    assert found.value == 0
    assert found.product > 0


@given(st.integers(0, 99), st.floats(0.01, 1))
@sizes(max_examples=30)
def test_the_best_margin_is_no_worse_than_others(seed: int, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    found = torch.from_numpy(rng.uniform(-0.1, 1, 2000))
    complexity = SpectralComplexity((1.0,), (1e-3,), (1.0,), 1.0, 4)
    best = spectrally_normalized_margin_bound(found, complexity, math.sqrt(2000))
    other = spectrally_normalized_margin_bound(found, complexity, math.sqrt(2000), gamma=gamma)
    if other.gamma >= found[found > 0].min() / 2:
        assert best.value <= other.value + 1e-12
    assert other.gamma <= gamma * (1 + 1e-12) < 2.001 * other.gamma


def test_the_bound_falls_with_samples_like_their_root() -> None:
    complexity = SpectralComplexity((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, 1.0, 4)
    terms = [
        spectrally_normalized_margin_bound(torch.ones(n), complexity, math.sqrt(n), gamma=1.0)
        for n in (10_000, 1_000_000)
    ]
    ratio = terms[0].complexity_term / terms[1].complexity_term
    assert ratio == pytest.approx(10 * math.log(1e4) / math.log(1e6), rel=1e-2)
    assert terms[0].confidence_term / terms[1].confidence_term == pytest.approx(10)


def test_the_rademacher_complexity_of_the_class_is_below_the_bound() -> None:
    """One row of norm 1, for which the supremum is known: the norm of a signed sum of inputs."""
    rng = np.random.default_rng(0)
    n, d = 400, 5
    x = rng.standard_normal((n, d))
    signs = rng.choice([-1.0, 1.0], (500, n))
    exact = np.mean(np.linalg.norm(signs @ x, axis=1)) / n
    complexity = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, d)
    x_norm = data_norm(torch.from_numpy(x))
    bound = spectrally_normalized_margin_bound(torch.ones(n), complexity, x_norm, gamma=1.0)
    assert exact <= x_norm / n <= bound.complexity_term / 2


def test_parametrized_weights_are_read_as_they_are_used() -> None:
    layer = SpectralNormLinear(6, 4, bias=False)
    with torch.no_grad():
        layer.parametrizations["weight"].original.mul_(50)  # type: ignore[index,operator]
    found = spectral_complexity(layer, (6,))
    assert found.spectral_norms[0] <= 1 + 1e-5
    assert found.distances[0] == pytest.approx(layer.weight.norm(dim=1).sum().item(), rel=1e-6)


def test_nothing_is_changed_and_no_graph_is_kept() -> None:
    network = nn.Sequential(nn.Flatten(), *plain(4, 4, 3)).train()
    state = copy.deepcopy(network.state_dict())
    x = numbers(5, 1, 2, 2).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1])
    found = spectral_complexity(network, (1, 2, 2))
    assert not normalized_margins(network(x), y, found, data_norm(x)).requires_grad
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_table_shows_all_norms() -> None:
    text = str(spectral_complexity(plain(2, 2, 2), (2,)))
    assert re.match(r" +spectral norm +distance +Frobenius norm\n0 Linear ", text)
    assert text.endswith("(exact)")
    assert "matrix 1" in str(SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 2))


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "classes from 0 to 2, got 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), ValueError, "got -1 to 0"),
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, r"\(2, 3\) and \(1,\)"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), ValueError, "two classes or more"),
        (torch.zeros(2, 0), torch.tensor([0, 0]), ValueError, "two classes or more"),
        (torch.zeros(0, 3), torch.zeros(0).long(), ValueError, "one sample or more"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), ValueError, "NaN or infinity"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), ValueError, "NaN or infinity"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), TypeError, "floating-point"),
        (
            torch.zeros(2, 3),
            torch.tensor([0.0, 1.0]),
            TypeError,
            "an integer tensor, got torch.float32",
        ),
        ([[0.0, 1.0]], torch.tensor([0]), TypeError, "logits must be .* got list"),
        (torch.zeros(1, 3), [0], TypeError, "labels must be .* got list"),
    ],
)
def test_unusable_logits_and_labels_are_refused(
    logits: Any, labels: Any, error: type[Exception], message: str
) -> None:
    complexity = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 3)
    with pytest.raises(error, match=message):
        margins(logits, labels)
    with pytest.raises(error, match=message):
        normalized_margins(logits, labels, complexity, 1.0)


def test_unusable_numbers_are_refused() -> None:
    one = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 3)
    zero = dataclasses.replace(one, distances=(0.0,))
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    for norm in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="data_norm must be positive"):
            normalized_margins(logits, labels, one, norm)
        with pytest.raises(ValueError, match="data_norm must be positive"):
            spectrally_normalized_margin_bound(torch.ones(3), one, norm)
    with pytest.raises(ValueError, match="complexity must be positive"):
        normalized_margins(logits, labels, zero, 1.0)
    with pytest.raises(TypeError, match="complexity must be a SpectralComplexity, got float"):
        normalized_margins(logits, labels, 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma must be a number"):
        margin_loss(torch.ones(3), math.nan)
    for bad in (torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(ValueError, match=r"margins must have shape \(n,\)"):
            margin_loss(bad, 1.0)
    with pytest.raises(ValueError, match="margins must be finite"):
        spectrally_normalized_margin_bound(torch.tensor([math.nan]), one, 1.0)
    for delta in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="delta must be in"):
            spectrally_normalized_margin_bound(torch.ones(3), one, 1.0, delta=delta)
    with pytest.raises(ValueError, match="gamma must be positive"):
        spectrally_normalized_margin_bound(torch.ones(3), one, 1.0, gamma=0)
    with pytest.raises(ValueError, match="margins must hold a positive one"):
        spectrally_normalized_margin_bound(-torch.ones(3), one, 1.0)
    for name in ("radius", "gamma", "n"):
        arguments: dict[str, Any] = {"radius": 1.0, "gamma": 1.0, "n": 5} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            pac_bayes_term(one, **arguments)
    with pytest.raises(ValueError, match="1-Lipschitz maps"):
        pac_bayes_term(dataclasses.replace(one, lipschitz=2.0), 1.0, 1.0, 5)
    with pytest.raises(ValueError, match="inputs must hold one sample"):
        data_norm(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="inputs must be finite"):
        data_norm(torch.tensor([math.inf]))
    with pytest.raises(TypeError, match="inputs must be a floating-point"):
        data_norm(torch.tensor([1]))


def test_numbers_of_numpy_are_numbers() -> None:
    one = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, np.int64(3))  # type: ignore[arg-type]
    plain_one = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 3)
    assert one == plain_one
    number = np.float64(1.0)
    ours = pac_bayes_term(one, number, number, np.int64(5))  # type: ignore[arg-type]
    assert ours == pac_bayes_term(plain_one, 1.0, 1.0, 5)
    found = torch.linspace(0.1, 2, 50)
    bound = spectrally_normalized_margin_bound(found, one, number, gamma=number)
    assert bound == spectrally_normalized_margin_bound(found, plain_one, 1.0, gamma=1.0)
    network, shape = plain(3, 4, 2), np.array([3])
    assert spectral_complexity(network, shape) == spectral_complexity(network, (3,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 0, 1, 2])
    assert torch.equal(margins(logits, labels.to(dtype)), margins(logits, labels))


def test_what_is_no_tensor_is_told_how_to_become_one() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 0, 1, 2])
    loader = DataLoader(TensorDataset(logits, labels), 2)
    for wrong in (loader, [logits, logits]):
        with pytest.raises(TypeError, match=r"inputs must be .*: join its batches with torch.cat"):
            data_norm(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"logits must be .*: join its batches with torch.cat"):
            margins(wrong, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs must be .*ndarray: call torch.from_numpy"):
        data_norm(logits.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labels must be .*got torch.bool"):
        margins(logits, labels.bool())
    one = SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 3)
    with pytest.raises(TypeError, match="data_norm must be a number, got Tensor"):
        spectrally_normalized_margin_bound(torch.ones(3), one, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data_norm must be positive and finite, got nan"):
        spectrally_normalized_margin_bound(torch.ones(3), one, math.nan)
    with pytest.raises(ValueError, match="logits must be finite, got NaN"):
        margins(logits * math.nan, labels)


def test_impossible_complexities_are_refused() -> None:
    with pytest.raises(ValueError, match="one number a matrix"):
        SpectralComplexity((1.0,), (1.0, 2.0), (1.0,), 1.0, 3)
    with pytest.raises(ValueError, match="one number a matrix"):
        SpectralComplexity((), (), (), 1.0, 3)
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        SpectralComplexity((-1.0,), (1.0,), (1.0,), 1.0, 3)
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        SpectralComplexity((1.0,), (math.nan,), (1.0,), 1.0, 3)
    with pytest.raises(ValueError, match="width"):
        SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 0)
    with pytest.raises(ValueError, match="kind"):
        SpectralComplexity((1.0,), (1.0,), (1.0,), 1.0, 3, "estimate")  # type: ignore[arg-type]


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Linear(4, 4), ValueError, "1 Linear has a bias, which the theorem does not cover"),
        (Residual(nn.Linear(4, 4, bias=False)), TypeError, "1 Residual has parameters"),
        (nn.BatchNorm1d(4).eval(), TypeError, "1 BatchNorm1d has parameters or buffers"),
        (nn.PReLU(), TypeError, "1 PReLU has parameters"),
        (Householder(4), TypeError, "1 .*Householder has parameters"),
        (nn.Sigmoid(), ValueError, "1 Sigmoid must map 0 to 0"),
        (nn.Softmax(-1), ValueError, "1 Softmax must map 0 to 0"),
        (Unknown(), TypeError, "has no Lipschitz rule"),
        (nn.Dropout(), ValueError, "call .eval"),
        (Residual(nn.ReLU()), TypeError, "1 Residual has children"),
    ],
)
def test_what_the_theorem_is_not_about_is_refused(
    layer: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spectral_complexity(nn.Sequential(nn.Linear(4, 4, bias=False), layer), (4,))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(1, 1, 3, 1, 1, padding_mode="reflect", bias=False), ValueError, "'reflect'"),
        (nn.Conv2d(1, 1, 3, 1, 1, padding_mode="replicate", bias=False), ValueError, "replicate"),
        (
            nn.Conv2d(1, 1, 3, 1, 2, 2, padding_mode="circular", bias=False),
            ValueError,
            "fits on the circle",
        ),
        (nn.ConvTranspose2d(1, 1, 3, bias=False), TypeError, "ConvTranspose2d has parameters"),
        (SkewOrthogonalConv2d(1, 1, 3, bias=False), TypeError, "SkewOrthogonalConv2d has"),
        (nn.Linear(4, 4, bias=False), ValueError, "must follow a Flatten"),
    ],
)
def test_convolutions_whose_rows_are_no_kernels_are_refused(
    layer: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spectral_complexity(layer, (1, 4, 4))


def test_other_refusals_of_networks() -> None:
    with pytest.raises(ValueError, match="one linear layer or more"):
        spectral_complexity(nn.Sequential(nn.ReLU(), GroupSort(2)), (4,))
    network = plain(3, 4, 2)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 3\), \(2, 4\)\], got \[\(4, 3\)\]"):
        spectral_complexity(network, (3,), [torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="reference must have weights"):
        spectral_complexity(network, (3,), plain(3, 5, 2))
    with pytest.raises(ValueError, match="reference must be finite"):
        spectral_complexity(network, (3,), [torch.zeros(4, 3), torch.full((2, 4), math.nan)])
    zeros = nn.Linear(3, 3)
    nn.init.zeros_(zeros.bias)
    assert spectral_complexity(zeros, (3,)).kind == "exact"
    handle = network.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has forward hooks"):
        spectral_complexity(network, (3,))
    handle.remove()


def test_a_bound_below_one_says_something() -> None:
    assert not MarginBound(0.1, 0.2, 0.3, 1.0, 0.05).vacuous
    assert MarginBound(0.5, 0.2, 0.3, 1.0, 0.05).vacuous
