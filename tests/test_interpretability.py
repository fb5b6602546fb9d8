"""Gradients of margins, numbers on paper for their measures, and steps that reach the border."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook.activations import MaxMin
from lipbook.interpretability import (
    alignment,
    counterfactual,
    margin_gradient,
    sparsity,
    stability,
)
from lipbook.orthogonal import OrthogonalLinear
from lipbook.robustness import certified_radius


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def network(outputs: int = 3, bias: bool = True) -> nn.Sequential:
    """Square before the last layer: a wider one would lose part of the gradient."""
    layers = [OrthogonalLinear(6, 6, bias=bias), MaxMin(), OrthogonalLinear(6, outputs, bias=bias)]
    return nn.Sequential(*layers).double()


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    rows = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(rows.shape[1], rows.shape[0]).double()
    layer.weight.data = rows
    layer.bias.data = torch.tensor(bias or [0.0] * len(rows), dtype=torch.float64)
    return layer


# -------------------------------------------------------------------------------- definition


def test_the_gradient_of_a_linear_classifier_on_paper() -> None:
    model = linear([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    x = torch.tensor([[2.0, 0.5], [0.5, 3.0], [-2.0, 1.0]], dtype=torch.float64)
    # logits: (2, 1, -5.5), (0.5, 6, 1.5), (-2, 2, 7)
    expected = torch.tensor([[1.0, -2.0], [3.0, 1.0], [-3.0, -1.0]], dtype=torch.float64)
    assert torch.equal(margin_gradient(model, x), expected)
    wrong = torch.tensor([2, 2, 2])  # of which the third is right
    expected = torch.tensor([[-4.0, 1.0], [-3.0, -1.0], [-3.0, -1.0]], dtype=torch.float64)
    assert torch.equal(margin_gradient(model, x, wrong), expected)


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_the_gradient_is_that_of_finite_differences(outputs: int) -> None:
    model, x, step = network(outputs), normal(7, 6), 1e-6
    signs = torch.where(model(x)[:, 0] < 0, -1, 1)
    labels = signs if outputs == 1 else model(x).argmax(1)

    def margin(z: Tensor) -> Tensor:
        logits = model(z).detach()
        if outputs == 1:
            return labels * logits[:, 0]
        own = torch.stack([row[y] for row, y in zip(logits, labels, strict=True)])
        others = [
            max(v for j, v in enumerate(row.tolist()) if j != y)
            for row, y in zip(logits, labels, strict=True)
        ]
        return own - torch.tensor(others, dtype=torch.float64)

    shifts = step * torch.eye(6, dtype=torch.float64)
    oracle = torch.stack([margin(x + e) - margin(x - e) for e in shifts], 1) / (2 * step)
    gradient = margin_gradient(model, x)
    torch.testing.assert_close(gradient, oracle, rtol=0, atol=1e-7)
    assert torch.equal(margin_gradient(model, x, labels), gradient)
    assert not gradient.requires_grad


def test_binary_labels_turn_the_gradient() -> None:
    model, x = linear([[3.0, 4.0]]), normal(2, 2)
    plus, minus = torch.ones(2, dtype=torch.int64), -torch.ones(2, dtype=torch.int64)
    assert torch.equal(margin_gradient(model, x, plus)[0], model.weight[0])
    assert torch.equal(margin_gradient(model, x, minus)[0], -model.weight[0])
    flat = nn.Sequential(model, nn.Flatten(0))  # (batch,) instead of (batch, 1)
    assert torch.equal(margin_gradient(flat, x), margin_gradient(model, x))


def test_a_margin_that_ignores_the_input_has_the_gradient_zero() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().new_tensor([[1.0, 0.0]]).expand(len(x), 2)

    x = normal(3, 2)
    assert torch.equal(margin_gradient(Constant(), x), torch.zeros_like(x))
    with pytest.raises(
        ValueError, match=r"gradient must not be 0, got 0 for the inputs \[0, 1, 2\]"
    ):
        stability(Constant(), x, 0.1)
    with pytest.raises(ValueError, match="gradient must not be 0"):
        counterfactual(Constant(), x)


def test_alignment_on_paper() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [-4.0, 3.0]])
    g = torch.tensor([[0.0, 2.0], [-6.0, -8.0], [5.0, 0.0], [6.0, 8.0]])
    assert alignment(x, g).tolist() == pytest.approx([4, 5, 3, 0], abs=1e-12)
    assert alignment(x, g, cosine=True).tolist() == pytest.approx([0.8, 1, 0.6, 0], abs=1e-12)


def test_sparsity_on_paper() -> None:
    rows = [[0, -7, 0, 0], [1, -1, 1, -1], [3, 4, 0, 0], [1, 1, 0, 0]]
    expected = [1, 0, 2 - 7 / 5, 2 - math.sqrt(2)]
    assert sparsity(torch.tensor(rows).double()).tolist() == pytest.approx(expected, abs=1e-12)
    noise = sparsity(normal(4, 100_000))
    assert (noise - (1 - math.sqrt(2 / math.pi))).abs().max() < 0.01


# ---------------------------------------------------------------------------------- theorems


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40),
    scale=st.sampled_from([1e-300, 1e-30, 1e-6, 1.0, 1e6, 1e150]),
    seed=st.integers(0, 10**6),
)
def test_measures_keep_their_ranges_at_every_scale(n: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 3, n, dtype=torch.float64, generator=generator)
    g[0, 1:] = 0  # sparse
    g[1] = g[1].sign()  # flat
    for measure in (sparsity(scale * g), alignment(x, scale * g, cosine=True)):
        assert ((measure >= 0) & (measure <= 1 + 1e-12)).all()
    torch.testing.assert_close(sparsity(scale * g), sparsity(g), rtol=0, atol=1e-9)
    torch.testing.assert_close(alignment(x, scale * g), alignment(x, g), rtol=1e-9, atol=1e-12)
    assert sparsity(g)[0] == 1
    assert sparsity(g)[1] < 1e-12
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(sparsity(-g[:, order]), sparsity(g), rtol=0, atol=1e-12)
    assert (alignment(x, g) <= x.norm(dim=1) * (1 + 1e-12)).all()
    torch.testing.assert_close(alignment(x, x), x.norm(dim=1))
    torch.testing.assert_close(alignment(x, -x, cosine=True), torch.ones(3).double())


def test_alignment_is_the_distance_to_the_border_of_a_linear_classifier() -> None:
    x, weight = normal(20, 5), normal(2, 5)
    normals = weight[0] - weight[1]
    model = linear(weight.tolist())
    gradient = margin_gradient(model, x)
    distance = certified_radius(model(x), model(x).argmax(1), head=model.weight)
    torch.testing.assert_close(alignment(x, gradient), distance)
    nearest = x - (x @ normals / normals.square().sum())[:, None] * normals  # by projection
    torch.testing.assert_close(alignment(x, gradient), (x - nearest).norm(dim=1))

    model = linear(weight.tolist(), [0.3, -0.4])  # Etmann's inequality, with the bias
    distance = certified_radius(model(x), model(x).argmax(1), head=model.weight)
    gap = (distance - alignment(x, gradient)).abs()
    assert (gap <= 0.7 / normals.norm() + 1e-12).all()
    assert gap.max() >= 0.7 / normals.norm() * (1 - 1e-9)  # attained


@pytest.mark.parametrize("activation", [nn.ReLU, MaxMin])
def test_alignment_of_a_homogeneous_network_is_margin_over_slope(activation: type) -> None:
    layers = [nn.Linear(6, 8, bias=False), activation(), nn.Linear(8, 3, bias=False)]
    model, x = nn.Sequential(*layers).double(), normal(30, 6)
    gradient = margin_gradient(model, x)
    top = model(x).detach().topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    torch.testing.assert_close(alignment(x, gradient), margin / gradient.norm(dim=1))


def test_alignment_is_at_least_the_certified_radius_without_biases() -> None:
    model, x = network(3, bias=False), normal(200, 6)
    radius = certified_radius(model(x), model(x).argmax(1))
    aligned = alignment(x, margin_gradient(model, x))
    assert (aligned >= radius * (1 - 1e-9)).all()
    model = network(1, bias=False)
    aligned = alignment(x, margin_gradient(model, x))
    torch.testing.assert_close(aligned, model(x)[:, 0].detach().abs())  # norms of gradients are 1


def test_the_gradient_of_a_norm_preserving_network_has_the_largest_norm() -> None:
    x = normal(50, 6)
    torch.testing.assert_close(margin_gradient(network(1), x).norm(dim=1), torch.ones(50).double())
    assert (margin_gradient(network(3), x).norm(dim=1) <= math.sqrt(2) + 1e-9).all()


@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decision_flips_at_the_radius_of_a_linear_network(
    outputs: int, dtype: torch.dtype
) -> None:
    model, x = OrthogonalLinear(6, outputs).to(dtype), normal(40, 6).to(dtype)
    walk = counterfactual(model, x, multiples=(0, 0.999, 1.001, 2))
    start = walk.decisions[0]
    assert torch.equal(walk.path[0], x)
    assert (walk.decisions[1] == start).all()
    assert (walk.decisions[2] != start).all()
    assert walk.path.shape == (4, 40, 6)
    assert walk.path.dtype == dtype
    length = (walk.path[3] - x).double().norm(dim=1)
    torch.testing.assert_close(length, 2 * walk.radius, rtol=1e-5, atol=1e-6)
    ratio = walk.margins[1] / walk.margins[0]
    assert ratio.median().item() == pytest.approx(0.001, abs=1e-3)


def test_the_decision_is_kept_below_the_radius_of_any_lipschitz_network() -> None:
    x = 3 * normal(300, 6)
    for outputs in (1, 3):
        model = network(outputs)
        walk = counterfactual(model, x, multiples=(0, 0.5, 0.999))
        assert (walk.decisions == walk.decisions[0]).all()
        assert (walk.margins > 0).all()
        doubled = nn.Sequential(model, linear((2 * torch.eye(outputs)).tolist()))
        again = counterfactual(doubled, x, multiples=(0, 0.5, 0.999), lipschitz=2)
        torch.testing.assert_close(again.path, walk.path)
        torch.testing.assert_close(again.margins, 2 * walk.margins)


def test_the_path_of_one_output_is_the_line_of_transport() -> None:
    model, x = network(1), normal(10, 6).requires_grad_()
    values = model(x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    walk = counterfactual(model, x, multiples=(1.5,))
    torch.testing.assert_close(walk.path[0], (x - 1.5 * values * gradient).detach())
    assert not walk.path.requires_grad


def test_an_input_with_another_label_stays() -> None:
    model, x = linear([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    walk = counterfactual(model, x, torch.tensor([0, 0]), multiples=(3,))
    assert torch.equal(walk.path[0, 1], x[1])
    assert walk.radius.tolist() == pytest.approx([1 / math.sqrt(2), 0])
    assert walk.margins[0].tolist() == pytest.approx([-2, -1])
    assert walk.decisions[0].tolist() == [1, 1]


def test_stability_is_one_where_the_margin_is_affine() -> None:
    x = normal(5, 6)
    ones = torch.ones(5).double()
    torch.testing.assert_close(stability(linear(normal(2, 6).tolist()), x, 100.0), ones)
    model = network()
    torch.testing.assert_close(stability(model, x, 0.0), ones)
    torch.testing.assert_close(stability(model, x, 1e-9), ones)


def test_stability_of_a_fold_on_paper() -> None:
    class Fold(nn.Module):  # |x|: on the line, far steps keep or turn the gradient, half and half
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    x = torch.tensor([[1.0]]).double().expand(400, 1)
    values = stability(Fold(), x, 2.0, samples=4)
    assert set(values.tolist()) <= {float(Fraction(i, 2)) for i in range(-2, 3)}
    assert values.mean().abs() < 0.1
    assert values.unique().numel() > 3  # directions differ from input to input
    assert torch.equal(stability(Fold(), x, 0.5), torch.ones(400).double())
    assert torch.equal(stability(Fold(), x, 2.0, samples=4), values)
    assert not torch.equal(stability(Fold(), x, 2.0, samples=4, seed=1), values)


def test_a_gradient_that_vanishes_nearby_counts_as_zero() -> None:
    class Ramp(nn.Module):  # flat beyond 2
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=2)

    x = torch.tensor([[1.0]]).double().expand(400, 1)
    values = stability(Ramp(), x, 1.5, samples=2)
    assert set(values.tolist()) == {0.0, 0.5, 1.0}


# ------------------------------------------------------------------------------------ errors


def test_bad_input_is_refused() -> None:
    model, x, y = network(), normal(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        margin_gradient(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs must be a floating-point tensor, got torch.int64"):
        margin_gradient(model, x.long())
    with pytest.raises(ValueError, match=r"inputs must have shape \(batch, \*shape\)"):
        margin_gradient(model, x[0])
    with pytest.raises(ValueError, match="inputs must be finite"):
        margin_gradient(model, x / 0)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float64"):
        margin_gradient(model, x, y.double())
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float64"):
        margin_gradient(network(1), x, torch.ones(4).double())
    with pytest.raises(ValueError, match="labels must be classes from 0 to 2, got 0 to 3"):
        margin_gradient(model, x, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(3,\)"):
        margin_gradient(model, x, y[:3])
    with pytest.raises(ValueError, match="labels must be -1 or 1"):
        margin_gradient(network(1), x, y)
    with pytest.raises(ValueError, match=r"model must return .* got \(4, 3, 1\)"):
        margin_gradient(nn.Sequential(model, nn.Unflatten(1, (3, 1))), x)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "margin_gradient": margin_gradient,
    "stability": lambda model, x: stability(model, x, 0.1),
    "counterfactual": counterfactual,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.BatchNorm1d(6), r"'0' \(BatchNorm1d\)"),
        (lambda: nn.Dropout(0.5), r"'0' \(Dropout\)"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
            r"'0.parametrizations.weight.0' \(_Spec",
        ),
    ],
)
def test_a_model_that_trains_is_refused_and_stays_as_it_is(
    call: str, layer: Callable[[], nn.Module], message: str
) -> None:
    model, x = nn.Sequential(layer(), nn.Linear(6, 3)).double(), normal(4, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"model must be in evaluation mode, but {message}.*call .eval\(\)"
    ):
        CALLS[call](model, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    CALLS[call](model.eval(), x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("outputs", [1, 3])
def test_layers_in_place_and_any_grad_mode(outputs: int, mode: type) -> None:
    last = nn.Linear(6, outputs)
    model = nn.Sequential(nn.LeakyReLU(0.1, inplace=True), last).double()
    plain, x = nn.Sequential(nn.LeakyReLU(0.1), last), normal(4, 6)
    before = x.clone()
    expected = margin_gradient(plain, x), stability(plain, x, 0.1), counterfactual(plain, x)
    with mode():
        found = margin_gradient(model, x), stability(model, x, 0.1), counterfactual(model, x)
        labels = torch.ones(4, dtype=torch.int64)
        turned = margin_gradient(model, x, labels)
    assert torch.equal(x, before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))
    assert torch.equal(turned, margin_gradient(plain, x, torch.ones(4, dtype=torch.int64)))


@pytest.mark.parametrize("call", CALLS)
def test_numbers_that_are_none_are_named(call: str) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0].sqrt(), x[:, 1]], 1)

    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"outputs of model must be finite.* inputs \[1\]"):
        CALLS[call](Root(), x)
    with pytest.raises(ValueError, match=r"gradient of model must be finite.* inputs \[1\]"):
        CALLS[call](Root(), x[[0, 2]])


def test_wrong_dtypes_are_told_what_to_call() -> None:
    with pytest.raises(TypeError, match=r"inputs must be .*ndarray: call torch.from_numpy"):
        margin_gradient(network(), normal(4, 6).numpy())  # type: ignore[arg-type]
    model, x, y = network(), normal(4, 6), torch.tensor([0, 1, 0, 1])
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(margin_gradient(model, x, y.to(dtype)), margin_gradient(model, x, y))


def test_bad_measures_and_steps_are_refused() -> None:
    model, x = network(), normal(4, 6)
    zero = torch.cat([x[:2], torch.zeros(1, 6)])
    with pytest.raises(ValueError, match=r"one shape, got \(4, 6\) and \(3, 6\)"):
        alignment(x, zero)
    with pytest.raises(ValueError, match=r"gradient must not be 0, got 0 for the inputs \[2\]"):
        alignment(x[:3], zero)
    with pytest.raises(ValueError, match=r"inputs must not be 0, got 0 for the inputs \[2\]"):
        alignment(zero, x[:3], cosine=True)
    assert alignment(zero, x[:3])[2] == 0
    with pytest.raises(ValueError, match="gradient must not be 0"):
        sparsity(zero)
    with pytest.raises(ValueError, match="two entries at least for each input, got 1"):
        sparsity(x[:, :1])
    with pytest.raises(ValueError, match=r"gradient must .* not be empty, got \(0, 6\)"):
        sparsity(x[:0])
    with pytest.raises(ValueError, match="gradient must be finite"):
        sparsity(x / 0)
    for radius in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="radius must be a finite number >= 0"):
            stability(model, x, radius)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        stability(model, x, 1.0, samples=0)
    for multiples in ((), (math.nan,)):
        with pytest.raises(ValueError, match="multiples must be finite numbers"):
            counterfactual(model, x, multiples=multiples)
    with pytest.raises(ValueError, match="lipschitz must be positive and finite, got 0"):
        counterfactual(model, x, lipschitz=0)
