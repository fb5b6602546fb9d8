"""Attacks: they stay in their ball, and find what there is."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_robustness import points, trained_like
from test_rounding import EXPONENTS, at_most, rational
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lipbook import attacks
from lipbook.attacks import attacked_accuracy, decision_attack, fgsm, pgd
from lipbook.interpretability import margin_gradient
from lipbook.lab.evaluation import summary
from lipbook.robustness import certified_radius, certify, certify_by_smoothing


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacks_stay_in_the_ball_in_rational_numbers(p: float, dtype: torch.dtype) -> None:
    net = nn.Linear(5, 3).to(dtype)
    x = (10 * torch.randn(6, 5)).to(dtype)
    y = net(x).argmax(1)
    radius = torch.tensor([0.0, 1e-12, 1e-6, 0.1, 1.0, 50.0], dtype=torch.float64)
    for moved in (fgsm(net, x, y, radius, p), pgd(net, x, y, radius, p, steps=5, restarts=2)):
        assert moved.dtype == dtype
        for a, b, r in zip(moved, x, radius.tolist(), strict=True):
            assert at_most(rational(a) - rational(b), r, p)
        largest = (moved - x).double().abs().amax(1)
        assert (largest[3:] > 0.1 * radius[3:]).all()


@pytest.mark.parametrize("p", EXPONENTS)
def test_pgd_finds_the_worst_point_of_a_linear_classifier(p: float) -> None:
    net, x = nn.Linear(6, 2).double(), torch.randn(8, 6, dtype=torch.float64)
    y = net(x).argmax(1)
    moved = pgd(net, x, y, 0.3, p, steps=30)
    direction = net.weight[1 - y] - net.weight[y]
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    gain = 0.3 * torch.linalg.vector_norm(direction, dual, dim=1)
    before, after = (attacks._margin_loss(net, v, y) for v in (x, moved))
    torch.testing.assert_close(after - before, gain.detach(), rtol=1e-3, atol=0)


def test_pgd_is_at_least_as_strong_as_what_it_starts_from() -> None:
    net, (x, _) = trained_like(), points(50)
    y = net(x).argmax(1)
    losses = [
        attacks._margin_loss(net, pgd(net, x, y, 0.5, steps=5, restarts=n), y) for n in (1, 3)
    ]
    assert (losses[0] >= attacks._margin_loss(net, x, y)).all()
    assert (losses[1] >= losses[0]).all()
    again = pgd(net, x, y, 0.5, steps=5, restarts=3)
    assert torch.equal(pgd(net, x, y, 0.5, steps=5, restarts=3), again)


def test_the_decision_attack_on_a_linear_classifier() -> None:
    net, x = nn.Linear(8, 3), torch.randn(10, 8)
    y = net(x).argmax(1)
    distance = certified_radius(net(x), y, head=net.weight)
    moved = decision_attack(net, x, y, steps=15, queries=60)
    reached = (moved - x).double().norm(dim=1)
    assert (net(moved).argmax(1) != y).all()
    assert (reached >= distance * (1 - 1e-5)).all()
    assert (reached <= 1.25 * distance + 1e-3).all()
    assert reached.median() <= 1.05 * distance.median() + 1e-3


def test_the_decision_attack_meets_no_certified_point() -> None:
    net, (x, y) = trained_like(), points(30)
    certificate = certify(net, [(x, y)], (6,))
    moved = decision_attack(net, x, certificate.predictions, steps=4, queries=20)
    flipped = net(moved).argmax(1) != certificate.predictions
    assert flipped.any()
    reached = (moved - x).double().norm(dim=1)
    assert (reached[flipped] > certificate.radius[flipped]).all()


def test_a_constant_classifier_cannot_be_attacked() -> None:
    net = nn.Linear(3, 2)
    net.weight.data.zero_()
    net.bias.data = torch.tensor([1.0, 0.0])
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(decision_attack(net, x, y, steps=2, queries=5), x)
    assert torch.equal(fgsm(net, x, y, 1.0), x)
    wrong = torch.ones(4, dtype=torch.int64)  # is misclassified already
    assert torch.equal(decision_attack(net, x, wrong, steps=2, queries=5), x)


class Shell(nn.Module):
    """Class 1 between two distances from the origin, class 0 elsewhere."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        inside = ((size > self.low) & (size < self.high)).to(x.dtype)
        return torch.cat([1 - inside, inside], 1)


@pytest.mark.parametrize("scale", [2.0**i for i in range(-4, 5)])
def test_the_decision_attack_looks_for_a_start_at_all_distances(scale: float) -> None:
    """From a sixteenth to sixteen times the size 1 + |x| of the inputs, in each of 100 entries."""
    x, y = torch.zeros(1, 100), torch.zeros(1, dtype=torch.int64)
    x[0, 0] = 5.2
    net = Shell(7 * 6.2 * scale, 13 * 6.2 * scale)  # |x| lies between two of the shells
    assert net(x).argmax(1).item() == 0
    moved = decision_attack(net, x, y, steps=0)
    assert net(moved).argmax(1).item() == 1
    border = net.high if scale == 1 / 16 else net.low
    assert moved.norm().item() == pytest.approx(border, rel=1e-5)  # by bisection


def test_the_defaults_of_the_attacks() -> None:
    net, (x, _) = trained_like(), points(6)
    y = net(x).argmax(1)
    known = pgd(net, x, y, 0.5)
    assert torch.equal(known, pgd(net, x, y, 0.5, 2, steps=50, restarts=1, seed=0))
    assert not torch.equal(known, pgd(net, x, y, 0.5, 2, steps=49, restarts=1, seed=0))
    options = inspect.signature(decision_attack).parameters.values()
    defaults = {option.name: option.default for option in options if option.default != option.empty}
    assert defaults | {"steps": 20, "queries": 100, "seed": 0} == defaults


def test_the_confidence_of_an_attacked_accuracy_is_95_percent() -> None:
    net, x = nn.Linear(3, 2), torch.randn(30, 3)
    loader = [(x, net(x).argmax(1))]
    found = attacked_accuracy(net, loader, 0.3, attack=fgsm)
    assert found == attacked_accuracy(net, loader, 0.3, attack=fgsm, confidence=0.95)
    assert found != attacked_accuracy(net, loader, 0.3, attack=fgsm, confidence=0.9)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_ball_is_that_of_the_2_norm_unless_told_otherwise(attack: Callable[..., Tensor]) -> None:
    net, x = nn.Linear(9, 2), torch.randn(200, 9)
    y = net(x).argmax(1)
    assert torch.equal(attack(net, x, y, 0.5), attack(net, x, y, 0.5, 2))
    found, *others = (
        attacked_accuracy(net, [(x, y)], 0.5, *p, attack=attack)
        for p in ((), (1,), (2,), (math.inf,))
    )
    assert others[2].value < found.value == others[1].value < others[0].value


# --------------------------------------------------------------------------- the box of images

BOXES: dict[str, tuple[float | Tensor, float | Tensor]] = {
    "numbers": (0, 1),
    "one a channel": (torch.tensor([0.1, 0.0, -1.0]), torch.tensor([0.9, 1.0, 2.0])),
    "broadcast": (torch.zeros(3, 1, 1), 1.0),
    "one a pixel": (torch.zeros(3, 2, 2), torch.ones(3, 2, 2)),
    "half open": (0.0, math.inf),
}


def column(side: Tensor) -> Tensor:
    """One number a channel as an image."""
    return (side[:, None, None] if side.dim() == 1 else side).expand(3, 2, 2)


class Seen(nn.Module):
    """Remembers the points that it was asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach().clone())
        return self.model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOXES)
def test_attacks_never_leave_the_box(name: str, dtype: torch.dtype) -> None:
    low, high = (column(torch.as_tensor(side)).to(dtype) for side in BOXES[name])
    model = Seen(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(dtype))
    x = low + torch.rand(6, 3, 2, 2, dtype=dtype) * (high.clamp(max=2) - low)
    x[:2] = torch.where(torch.rand(2, 3, 2, 2) < 0.5, low, high.clamp(max=2))  # at the border
    x = x.clamp(low, high)
    y = model.model(x).argmax(1)
    for p in EXPONENTS:
        for radius in (0.01, 0.4, 30.0):
            fgsm(model, x, y, radius, p, bounds=BOXES[name])
            moved = pgd(model, x, y, radius, p, steps=4, restarts=2, bounds=BOXES[name])
            for a, b in zip(moved, x, strict=True):
                assert at_most((rational(a.flatten()) - rational(b.flatten())), radius, p)
    moved = decision_attack(model, x, y, steps=3, queries=10, bounds=BOXES[name])
    assert (model.model(moved).argmax(1) != y).any()
    points = torch.cat([*model.points, moved])
    assert len(points) > 1000
    assert ((points >= low) & (points <= high)).all()


def test_without_a_box_attacks_leave_the_images() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(4, 3, 2, 2)
    y = model(x).argmax(1)
    assert pgd(model, x, y, 0.3, math.inf).min() < 0
    assert fgsm(model, x, y, 0.3, math.inf).min() < 0


@pytest.mark.parametrize("p", EXPONENTS)
def test_pgd_finds_the_worst_point_of_ball_and_box_on_a_linear_classifier(p: float) -> None:
    """Against a linear program, or against the closed form where the ball is a box."""
    model = nn.Linear(6, 2).double().requires_grad_(False)
    x = torch.rand(20, 6, dtype=torch.float64)
    x[:5] = x[:5].round()
    y = model(x).argmax(1)
    slopes = (model.weight[1 - y] - model.weight[y]).numpy()
    moved = pgd(model, x, y, 0.3, p, steps=200, bounds=(0, 1))
    gain = (attacks._margin_loss(model, moved, y) - attacks._margin_loss(model, x, y)).numpy()
    for slope, start, found in zip(slopes, x.numpy(), gain, strict=True):
        best = worst_gain(slope, start, 0.3, p)
        assert found <= best + 1e-12
        assert found >= 0.99 * best
    if p == math.inf:
        once = attacks._margin_loss(model, fgsm(model, x, y, 0.3, p, bounds=(0, 1)), y)
        assert (once - attacks._margin_loss(model, moved, y)).abs().max() < 1e-12


def worst_gain(slope: np.ndarray, start: np.ndarray, radius: float, p: float) -> float:
    """Maximise a linear function over the ball within [0, 1]: the multiplier by bisection."""
    room = np.where(slope > 0, 1 - start, start)
    sizes = np.abs(slope)
    if p == math.inf:
        return float(sizes @ np.minimum(room, radius))
    if p == 1:  # greedy: the steepest entries first
        left, total = radius, 0.0
        for i in np.argsort(-sizes):
            step = min(room[i], left)
            total, left = total + sizes[i] * step, left - step
        return float(total)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        inside = np.linalg.norm(np.minimum(middle * sizes, room)) <= radius
        low, high = (middle, high) if inside else (low, middle)
    return float(sizes @ np.minimum(low * sizes, room))


def test_a_box_only_helps_the_classifier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(60, 3, 2, 2).round()
    loader = [(x, model(x).argmax(1))]
    free = attacked_accuracy(model, loader, 0.05, math.inf, attack=fgsm).value
    boxed = attacked_accuracy(model, loader, 0.05, math.inf, attack=fgsm, bounds=(0, 1)).value
    assert 0 < free < boxed < 1


def test_a_summary_records_the_box() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.rand(60, 3, 2, 2).round()
    y = model(x).argmax(1)
    boxed = summary(model, x, y, [0.05], math.inf, bounds=(0, 1))
    free = summary(model, x, y, [0.05], math.inf)
    assert boxed["bounds"] == [0.0, 1.0]
    assert "bounds" not in free
    assert free["attacked"][0] < boxed["attacked"][0]


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ((0.5, 1), ValueError, r"inputs must lie within bounds, got 0 to 1, 3 of 4 inputs outside"),
        ((0, 0.5), ValueError, "inputs must lie within bounds"),
        ((1, 0), ValueError, "low <= high"),
        ((0, math.nan), ValueError, "low <= high"),
        ((torch.zeros(2), 1), ValueError, r"shape \(3,\), one a channel, .* got shape \(2,\)"),
        ((torch.zeros(4, 3, 2, 2), 1), ValueError, r"broadcast to .* sample \(3, 2, 2\)"),
        (0.5, TypeError, r"bounds must be a pair \(low, high\), got 0.5"),
        ((0, 1, 2), TypeError, "bounds must be a pair"),
    ],
)
def test_a_box_that_does_not_fit_is_refused(
    bounds: Any, error: type[Exception], message: str
) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(4, 3, 2, 2)
    x[0] = 1.0
    y = torch.zeros(4, dtype=torch.int64)
    calls: list[Callable[[], Any]] = [
        lambda: fgsm(model, x, y, 0.1, bounds=bounds),
        lambda: pgd(model, x, y, 0.1, bounds=bounds),
        lambda: decision_attack(model, x, y, bounds=bounds),
        lambda: attacked_accuracy(model, [(x, y)], 0.1, bounds=bounds),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


# ------------------------------------------------------------------------- what a model may be


def all_attacks(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [
        fgsm(model, x, y, 0.3),
        pgd(model, x, y, 0.3, steps=3, restarts=2),
        decision_attack(model, x, y, steps=2, queries=5),
    ]


def normalised() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    model(torch.randn(50, 4))
    return model


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, self.training)


MODES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "dropout": nn.Dropout,
    "feature dropout": nn.AlphaDropout,
    "random slope": nn.RReLU,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "mine": Noisy,
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("name", MODES)
def test_a_model_in_training_mode_is_refused_and_left_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), MODES[name](), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model(x)
    model[0].train(False)
    before = copy.deepcopy(model.state_dict())
    loader = [(x, y)]
    calls: list[Callable[[], Any]] = [
        lambda: fgsm(model, x, y, 0.1),
        lambda: pgd(model, x, y, 0.1),
        lambda: decision_attack(model, x, y),
        lambda: attacked_accuracy(model, loader, 0.1),
        lambda: margin_gradient(model, x, y),
        lambda: certify_by_smoothing(model.train(False) and inside(model), loader, 0.1),
    ]
    for call in calls:
        model.train()
        with pytest.raises(
            ValueError, match=r"evaluation mode, but '.*' \(.*\) is not: .*eval\(\)"
        ):
            call()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    all_attacks(model, x, y)
    attacked_accuracy(model, loader, 0.1, steps=2)


def inside(model: nn.Module) -> nn.Module:
    """A model in evaluation mode with a part that is not."""
    model[1].train()  # type: ignore[index]
    return model


def test_a_wrapper_in_training_mode_does_no_harm() -> None:
    """A layer that looks the same in both modes may be in either."""
    wrapped = nn.Sequential(normalised().eval(), nn.Softsign())
    assert wrapped.training
    all_attacks(wrapped, torch.randn(3, 4), torch.tensor([0, 1, 2]))


def test_nothing_of_the_model_changes() -> None:
    model = normalised().eval()
    model[0].requires_grad_(False)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    x.requires_grad_()
    for moved in all_attacks(model, x, y):
        assert not moved.requires_grad
    assert x.grad is None
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)


def test_attacks_do_not_depend_on_the_mode_of_autograd() -> None:
    model, x, y = normalised().eval(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = all_attacks(model, x, y)
    with torch.no_grad():
        assert all(map(torch.equal, all_attacks(model, x, y), expected))
    with torch.inference_mode():
        found = all_attacks(model, x.clone(), y.clone())
        gradient = margin_gradient(model, x.clone(), y.clone())
    assert all(map(torch.equal, found, expected))
    assert torch.equal(gradient, margin_gradient(model, x, y))
    with torch.inference_mode():
        made = normalised().eval()
    with pytest.raises(ValueError, match=r"made under torch.inference_mode, since"):
        pgd(made, x, y, 0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that torch's compiler gives of itself
def test_compiled_and_parallel_models() -> None:
    model, x, y = normalised().eval(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = all_attacks(model, x, y)
    for other in (torch.compile(model, backend="aot_eager"), nn.DataParallel(model)):
        for found, known in zip(all_attacks(other, x, y), expected, strict=True):
            torch.testing.assert_close(found, known)
    with pytest.raises(ValueError, match="evaluation mode"):
        pgd(torch.compile(normalised(), backend="aot_eager"), x, y, 0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integers(dtype: torch.dtype) -> None:
    model, x, y = normalised().eval(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert all(map(torch.equal, all_attacks(model, x, y.to(dtype)), all_attacks(model, x, y)))
    expected = attacked_accuracy(model, [(x, y)], 0.1, steps=2)
    assert attacked_accuracy(model, [(x, y.to(dtype))], 0.1, steps=2) == expected
    expected_labels = certify_by_smoothing(model, [(x, y.to(dtype))], 0.1, samples=20).labels
    assert torch.equal(expected_labels, y)


class Broken(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        bad = torch.where(torch.arange(len(x)) == 1, self.value, 0.0)
        return x[:, :3] + bad[:, None]


X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NaN logits": (
        lambda: pgd(Broken(math.nan), X, Y, 0.1),
        ValueError,
        "finite logits, got NaN for 1 of 4 inputs, the first of them input 1",
    ),
    "infinite logits": (lambda: fgsm(Broken(math.inf), X, Y, 0.1), ValueError, "got infinity for"),
    "a function": (
        lambda: pgd(torch.relu, X, Y, 0.1),  # type: ignore[arg-type]
        TypeError,
        r"model must be a torch\.nn\.Module, got builtin_function_or_method",
    ),
    "NaN logits, decisions": (
        lambda: decision_attack(Broken(math.nan), X, Y),
        ValueError,
        "got NaN for 1 of 4",
    ),
    "NaN inputs": (lambda: pgd(Broken(0), X / 0 * 0, Y, 0.1), ValueError, "inputs must be finite"),
    "NumPy inputs": (
        lambda: pgd(Broken(0), X.numpy(), Y, 0.1),  # type: ignore[arg-type]
        TypeError,
        "inputs must be a torch.Tensor, got ndarray: call torch.from_numpy",
    ),
    "NumPy labels": (
        lambda: decision_attack(Broken(0), X, Y.numpy()),  # type: ignore[arg-type]
        TypeError,
        "labels must be a torch.Tensor, got ndarray: call torch.from_numpy",
    ),
    "pixels": (
        lambda: pgd(Broken(0), (255 * X).byte(), Y, 0.1),
        TypeError,
        r"inputs must be a floating-point tensor, got torch.uint8: call .float\(\)",
    ),
    "floating labels": (
        lambda: pgd(Broken(0), X, Y.float(), 0.1),
        TypeError,
        r"labels must be integers, got torch.float32: call .long\(\)",
    ),
    "no batch dimension": (lambda: fgsm(Broken(0), X[0], Y[0], 0.1), ValueError, r"\(batch, "),
    "no classes": (
        lambda: pgd(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), X, 0 * Y, 0.1),
        ValueError,
        r"must return \(batch, classes\)",
    ),
    "queries": (
        lambda: decision_attack(Broken(0), X, Y, queries=0),
        ValueError,
        "queries at least 1, got 20 and 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_advice(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


LOADERS: dict[str, tuple[Any, type[Exception], str]] = {
    "a tensor": (X, TypeError, r"got Tensor: pass \[\(inputs, labels\)\]"),
    "a pair": ((X, Y), TypeError, r"got one such pair: pass \[\(inputs, labels\)\]"),
    "nothing to iterate": (3, TypeError, r"got int: pass \[\(inputs, labels\)\]"),
    "tensors": ([X], TypeError, r"must yield pairs \(inputs, labels\) of tensors, got a Tensor"),
    "triples": ([(X, Y, Y)], TypeError, "got a tuple of 3"),
    "dictionaries": ([{"x": X, "y": Y}], TypeError, "got a dict"),
    "arrays": ([(X.numpy(), Y)], TypeError, "call torch.from_numpy"),
    "another number of labels": ([(X, Y[:2])], ValueError, r"got \(4, 4\) and \(2,\)"),
    "no batch": ([], ValueError, "one batch at least, got none"),
}


@pytest.mark.parametrize("case", LOADERS)
def test_loaders_of_the_wrong_form_are_refused_with_advice(case: str) -> None:
    loader, error, message = LOADERS[case]
    with pytest.raises(error, match=message):
        attacked_accuracy(Broken(0), loader, 0.1, attack=fgsm)
    with pytest.raises(error, match=message):
        certify_by_smoothing(Broken(0).eval(), loader, 0.1, samples=20)
