from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipbook import losses
from lipbook.activations import MaxMin
from lipbook.lab.training import train
from lipbook.losses import (
    CertificateLoss,
    EMMALoss,
    HingeKRLoss,
    LogitAnnealingLoss,
    LogSumExpHingeKRLoss,
    MultiMarginLoss,
    OffsetBinaryCrossEntropyLoss,
    OffsetCrossEntropyLoss,
    SoftHingeKRLoss,
    certificate_loss,
    emma_loss,
    hinge_kr,
    log_sum_exp_hinge_kr,
    logit_annealing_loss,
    margin_for_radius,
    multi_margin,
    offset_binary_cross_entropy,
    offset_cross_entropy,
    soft_hinge_kr,
)
from lipbook.orthogonal import OrthogonalLinear, UnitNormLinear
from lipbook.robustness import certified_radius, certify

CLASSES: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {
    "multi-margin": (
        MultiMarginLoss(1.7, divide_by_classes=False),
        lambda z, y: multi_margin(z, y, 1.7, divide_by_classes=False),
    ),
    "offset": (
        OffsetCrossEntropyLoss(0.8, 0.3),
        lambda z, y: offset_cross_entropy(z, y, 0.8, 0.3),
    ),
    "certificate": (
        CertificateLoss(0.4, 2.0, math.inf),
        lambda z, y: certificate_loss(z, y, 0.4, 2.0, math.inf),
    ),
    "hinge-kr": (HingeKRLoss(3.0, 0.6), lambda z, y: hinge_kr(z, y, 3.0, 0.6)),
    "soft hinge-kr": (
        SoftHingeKRLoss(3.0, 0.6, 0.5),
        lambda z, y: soft_hinge_kr(z, y, 3.0, 0.6, 0.5),
    ),
    "log-sum-exp hinge-kr": (
        LogSumExpHingeKRLoss(3.0, 0.6, 0.5),
        lambda z, y: log_sum_exp_hinge_kr(z, y, 3.0, 0.6, 0.5),
    ),
    "emma": (
        EMMALoss(0.7, 0.4, 2.0, math.inf),
        lambda z, y: emma_loss(z, y, 0.7, 0.4, 2.0, math.inf),
    ),
    "annealing": (
        LogitAnnealingLoss(0.8, 0.3, 2.5),
        lambda z, y: logit_annealing_loss(z, y, 0.8, 0.3, 2.5),
    ),
    "binary": (
        OffsetBinaryCrossEntropyLoss(0.8, 0.3),
        lambda z, y: offset_binary_cross_entropy(z, y, 0.8, 0.3),
    ),
}
batches = st.tuples(st.integers(1, 9), st.integers(2, 6), st.integers(0, 999), st.floats(-3, 3))


def draw(batch: int, classes: int, seed: int, log_scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    return logits * 10**log_scale, labels


# ------------------------------------------------------------------------------ definition


@given(batches, st.floats(0.01, 10), st.booleans())
def test_multi_margin_is_a_loop(batch: Any, margin: float, divide: bool) -> None:
    logits, labels = draw(*batch)
    total = 0.0
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        parts = [max(0.0, margin - row[y] + z) for j, z in enumerate(row) if j != y]
        total += sum(parts) / (len(row) if divide else 1)
    assert multi_margin(logits, labels, margin, divide).item() == pytest.approx(total / len(labels))
    if divide:
        theirs = functional.multi_margin_loss(logits, labels, margin=margin)
        torch.testing.assert_close(multi_margin(logits, labels, margin), theirs)


@given(batches, st.floats(0, 5), st.floats(0.05, 5))
def test_offset_cross_entropy_is_a_loop(batch: Any, offset: float, temperature: float) -> None:
    logits, labels = draw(*batch)
    total = 0.0
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        powers = [(offset - row[y] + z) / temperature for j, z in enumerate(row) if j != y]
        top = max(0.0, *powers)
        log_sum = top + math.log(math.exp(-top) + sum(math.exp(power - top) for power in powers))
        total += temperature * log_sum
    ours = offset_cross_entropy(logits, labels, offset, temperature).item()
    assert ours == pytest.approx(total / len(labels), rel=1e-9, abs=1e-12)


def test_without_offset_and_temperature_it_is_the_cross_entropy() -> None:
    logits, labels = draw(7, 4, 0, 0.0)
    ours = offset_cross_entropy(logits, labels)
    torch.testing.assert_close(ours, functional.cross_entropy(logits, labels))


@given(batches, st.floats(0, 3), st.floats(0.1, 5), st.sampled_from([1, 2, math.inf]))
def test_certificate_loss_is_the_cross_entropy_minus_the_radius(
    batch: Any, weight: float, lipschitz: float, p: float
) -> None:
    logits, labels = draw(*batch)
    radius = certified_radius(logits, labels, lipschitz, p).mean()
    expected = functional.cross_entropy(logits, labels) - weight * radius
    torch.testing.assert_close(certificate_loss(logits, labels, weight, lipschitz, p), expected)


@given(batches, st.floats(0, 20), st.floats(0.01, 5))
def test_hinge_kr_is_a_loop_over_the_outputs(batch: Any, alpha: float, margin: float) -> None:
    logits, labels = draw(*batch)
    total = 0.0
    for c in range(logits.shape[1]):
        positive = [z for z, y in zip(logits[:, c].tolist(), labels, strict=True) if y == c]
        negative = [z for z, y in zip(logits[:, c].tolist(), labels, strict=True) if y != c]
        if positive and negative:
            total -= sum(positive) / len(positive) - sum(negative) / len(negative)
        hinge = sum(max(0.0, margin - z) for z in positive)
        hinge += sum(max(0.0, margin + z) for z in negative)
        total += alpha * hinge / len(labels)
    expected = total / logits.shape[1]
    ours = hinge_kr(logits, labels, alpha, margin).item()
    scale = logits.abs().max().item() + margin
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12 * (1 + alpha) * scale)


def test_hinge_kr_of_two_classes_on_paper() -> None:
    outputs, signs = torch.tensor([2.0, 0.5, -1.0, 0.25]), torch.tensor([1, 1, -1, -1])
    kr = (2 + 0.5) / 2 - (-1 + 0.25) / 2
    hinge = (0 + 0.5 + 0 + 1.25) / 4
    expected = torch.tensor(3 * hinge - kr)
    torch.testing.assert_close(hinge_kr(outputs, signs, 3.0), expected)
    for labels in (signs, (signs + 1) // 2):  # of a network with one output
        torch.testing.assert_close(hinge_kr(outputs[:, None], labels, 3.0), expected)


@pytest.mark.parametrize(("p", "factor"), [(1, 1.0), (2, math.sqrt(2)), (math.inf, 2.0)])
def test_the_margin_for_a_radius_certifies_it(p: float, factor: float) -> None:
    margin = margin_for_radius(0.3, 2.5, p)
    assert margin == pytest.approx(factor * 2.5 * 0.3)
    logits = torch.tensor([[margin, 0.0, -1.0]], dtype=torch.float64)
    assert certified_radius(logits, torch.tensor([0]), 2.5, p).item() == pytest.approx(0.3)


@pytest.mark.parametrize("name", CLASSES)
def test_a_module_is_its_function(name: str) -> None:
    module, function = CLASSES[name]
    logits, labels = draw(12, 3, 1, 0.0)
    assert torch.equal(module(logits, labels), function(logits, labels))
    assert not list(module.parameters())
    assert "=" in module.extra_repr()


# ------------------------------------------------------------- reductions, weights, targets


def sample_losses(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The losses of CLASSES one sample at a time, in Python's floats."""
    values = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = [z for j, z in enumerate(row) if j != y]
        if name == "multi-margin":
            values.append(sum(max(0.0, 1.7 - row[y] + z) for z in others))
        elif name == "offset":
            powers = sum(math.exp((0.8 - row[y] + z) / 0.3) for z in others)
            values.append(0.3 * math.log(1 + powers))
        elif name == "emma":
            margins = [row[y] - z for z in others]
            raised = [min(0.7 * 4.0, max(0.0, m)) - m for m in margins]
            values.append(0.4 * math.log(1 + sum(math.exp(power / 0.4) for power in raised)))
        elif name == "annealing":
            q = 1 / (1 + sum(math.exp((0.8 - row[y] + z) / 0.3) for z in others))
            values.append(-0.3 * (1 - q) ** 2.5 * math.log(q))
        elif name.endswith("hinge-kr"):
            weights = [math.exp(z / 0.5) for z in others]
            own = -row[y] + 3.0 * max(0.0, 0.6 - row[y])
            if name == "soft hinge-kr":
                parts = [z + 3.0 * max(0.0, 0.6 + z) for z in others]
                pairs = zip(weights, parts, strict=True)
                values.append(own + sum(w * part for w, part in pairs) / sum(weights))
            else:
                nearest = 0.5 * math.log(sum(weights))
                values.append(own + nearest + 3.0 * max(0.0, 0.6 + nearest))
        else:
            entropy = math.log(1 + sum(math.exp(z - row[y]) for z in others))
            values.append(entropy - 0.4 * max(0.0, (row[y] - max(others)) / (2 * 2.0)))
    return torch.tensor(values, dtype=torch.float64)


WITH_OPTIONS: dict[str, Callable[..., Tensor]] = {
    "multi-margin": lambda z, y, **o: multi_margin(z, y, 1.7, divide_by_classes=False, **o),
    "offset": lambda z, y, **o: offset_cross_entropy(z, y, 0.8, 0.3, **o),
    "certificate": lambda z, y, **o: certificate_loss(z, y, 0.4, 2.0, math.inf, **o),
    "soft hinge-kr": lambda z, y, **o: soft_hinge_kr(z, y, 3.0, 0.6, 0.5, **o),
    "log-sum-exp hinge-kr": lambda z, y, **o: log_sum_exp_hinge_kr(z, y, 3.0, 0.6, 0.5, **o),
    "emma": lambda z, y, **o: emma_loss(z, y, 0.7, 0.4, 2.0, math.inf, **o),
    "annealing": lambda z, y, **o: logit_annealing_loss(z, y, 0.8, 0.3, 2.5, **o),
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    "multi-margin": lambda **o: MultiMarginLoss(1.7, divide_by_classes=False, **o),
    "offset": lambda **o: OffsetCrossEntropyLoss(0.8, 0.3, **o),
    "certificate": lambda **o: CertificateLoss(0.4, 2.0, math.inf, **o),
    "soft hinge-kr": lambda **o: SoftHingeKRLoss(3.0, 0.6, 0.5, **o),
    "log-sum-exp hinge-kr": lambda **o: LogSumExpHingeKRLoss(3.0, 0.6, 0.5, **o),
    "emma": lambda **o: EMMALoss(0.7, 0.4, 2.0, math.inf, **o),
    "annealing": lambda **o: LogitAnnealingLoss(0.8, 0.3, 2.5, **o),
}


@given(batches.map(lambda batch: (*batch[:3], 0.0)), st.booleans())
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_reductions_and_weights_are_loops(name: str, batch: Any, weighted: bool) -> None:
    logits, labels = draw(*batch)
    loss, values = WITH_OPTIONS[name], sample_losses(name, logits, labels)
    options, counts = {}, torch.ones(len(labels), dtype=torch.float64)
    if weighted:
        weight = torch.rand(logits.shape[1], dtype=torch.float64) + 0.1
        options = {"class_weight": weight}
        counts = torch.tensor([weight[y] for y in labels], dtype=torch.float64)
    expected = {
        "none": counts * values,
        "sum": (counts * values).sum(),
        "mean": (counts * values).sum() / counts.sum(),
    }
    for reduction, value in expected.items():
        ours = loss(logits, labels, reduction=reduction, **options)
        torch.testing.assert_close(ours, value)
        module = MODULES[name](reduction=reduction, **options)
        assert torch.equal(module(logits, labels), ours)
    assert torch.equal(
        loss(logits, labels, **options), loss(logits, labels, reduction="mean", **options)
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_and_probabilities_are_those_of_torch(reduction: str) -> None:
    logits, labels = draw(9, 4, 0, 0.0)
    weight, q = torch.tensor([0.5, 2.0, 1.0, 3.0]).double(), logits.flip(0).softmax(1)
    ours = offset_cross_entropy(logits, labels, class_weight=weight, reduction=reduction)
    theirs = functional.cross_entropy(logits, labels, weight=weight, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    ours = offset_cross_entropy(logits, q, reduction=reduction)
    torch.testing.assert_close(ours, functional.cross_entropy(logits, q, reduction=reduction))
    ours = multi_margin(logits, labels, class_weight=weight, reduction="none")
    theirs = functional.multi_margin_loss(logits, labels, weight=weight, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_probabilities_give_the_expected_loss(name: str, weighted: bool) -> None:
    logits, _ = draw(7, 4, 1, 0.0)
    q = 3 * torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = q.softmax(1)
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0]).double() if weighted else torch.ones(4).double()
    options = {"class_weight": weight} if weighted else {}
    each = [sample_losses(name, logits, torch.full((7,), y)) for y in range(4)]
    expected = sum(q[:, y] * weight[y] * each[y] for y in range(4))
    loss = WITH_OPTIONS[name]
    torch.testing.assert_close(loss(logits, q, reduction="none", **options), expected)
    torch.testing.assert_close(loss(logits, q, **options), expected.sum() / (q * weight).sum())
    if name == "emma":  # whose gradient is not that of its value
        return
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, q, **options), (logits,))


ONE_AGAINST_OTHERS: dict[str, Callable[..., Tensor]] = {
    "hinge-kr": lambda z, y, **o: hinge_kr(z, y, 3.0, 0.6, **o),
    "binary": lambda z, y, **o: offset_binary_cross_entropy(z, y, 0.8, 0.3, **o),
}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLASSES)
def test_one_hot_rows_are_their_classes(name: str, dtype: torch.dtype, reduction: str) -> None:
    logits, labels = draw(8, 3, 3, 0.0)
    one_hot = functional.one_hot(labels, 3).to(dtype)
    loss = {**WITH_OPTIONS, **ONE_AGAINST_OTHERS}[name]
    expected = loss(logits, labels, reduction=reduction)
    torch.testing.assert_close(loss(logits, one_hot, reduction=reduction), expected)


def test_probabilities_may_be_rounded_to_their_dtype() -> None:
    logits = torch.randn(50, 30, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = torch.rand(50, 30).softmax(1).to(dtype)
        assert multi_margin(logits, q).isfinite()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
)
@pytest.mark.parametrize("name", CLASSES)
def test_labels_of_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    logits, labels = draw(12, 3, 4, 0.0)
    assert torch.equal(CLASSES[name][1](logits, labels.to(dtype)), CLASSES[name][1](logits, labels))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_binary_labels_of_any_dtype(dtype: torch.dtype) -> None:
    outputs, labels = torch.tensor([[2.0], [0.5], [-1.0], [0.25]]), torch.tensor([1, 1, 0, 0])
    assert torch.equal(hinge_kr(outputs, labels.to(dtype)), hinge_kr(outputs, labels))


@given(batches)
def test_the_shares_of_hinge_kr_sum_to_it(batch: Any) -> None:
    logits, labels = draw(*batch)
    shares = hinge_kr(logits, labels, 3.0, 0.6, reduction="none")
    total = hinge_kr(logits, labels, 3.0, 0.6, reduction="sum")
    mean = hinge_kr(logits, labels, 3.0, 0.6)
    assert shares.shape == labels.shape
    slack = 1e-13 * (1 + logits.abs().max().item()) * len(labels)
    assert abs(shares.mean() - mean) <= slack
    assert abs(total - mean * len(labels)) <= slack


def test_the_shares_of_hinge_kr_on_paper() -> None:
    outputs, signs = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1, 1, -1])
    # -3 y f / n_y, with n = 3 samples, and the hinge of each.
    expected = torch.tensor([-3 * 2.0 / 2, -3 * 0.5 / 2 + 10 * 0.5, -3 * 1.0])
    torch.testing.assert_close(hinge_kr(outputs, signs, reduction="none"), expected)


def test_gradients_on_paper() -> None:
    """What the docstrings say of each, at logits whose margins are 1.5 and 3."""
    y = torch.tensor([0])

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        logits = torch.tensor([[3.0, 1.5, 0.0]], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(logits, y), logits)[0][0].tolist()

    assert gradient(lambda z, y: multi_margin(z, y, 1.0)) == [0, 0, 0]
    near = gradient(lambda z, y: multi_margin(z, y, 2.0))
    assert near == pytest.approx([-1 / 3, 1 / 3, 0], abs=1e-15)
    both = gradient(lambda z, y: multi_margin(z, y, 4.0, divide_by_classes=False))
    assert both == pytest.approx([-2, 1, 1], abs=1e-15)
    p = torch.tensor([(3 - 2) / 0.5, 1.5 / 0.5, 0.0]).double().softmax(0)
    p[0] -= 1
    soft = gradient(lambda z, y: offset_cross_entropy(z, y, 2.0, 0.5))
    assert soft == pytest.approx(p.tolist(), abs=1e-15)
    plain = gradient(lambda z, y: certificate_loss(z, y, 0.0))
    rewarded = gradient(lambda z, y: certificate_loss(z, y, 0.7, 2.0, math.inf))
    difference = [a - b for a, b in zip(rewarded, plain, strict=True)]
    assert difference == pytest.approx([-0.7 / 4, 0.7 / 4, 0], abs=1e-15)


@given(batches, st.floats(0.1, 3), st.floats(0.01, 2))
def test_the_offset_is_a_margin_worth_having(batch: Any, offset: float, t: float) -> None:
    """Below it the gradient of a sample has norm 1/2 at least."""
    logits, labels = draw(*batch)
    logits.requires_grad_()
    total = offset_cross_entropy(logits, labels, offset, t, reduction="sum")
    (gradient,) = torch.autograd.grad(total, logits)
    own = logits.gather(1, labels[:, None])[:, 0]
    margins = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
    assert bool((gradient.norm(dim=1)[margins <= offset] >= 0.5 * (1 - 1e-9)).all())


def test_options_travel_with_the_module() -> None:
    weight = torch.tensor([1.0, 2.0])
    for make in MODULES.values():
        module = make(class_weight=weight, reduction="sum").double()
        assert module.class_weight.dtype == torch.float64
        assert "class_weight=[1.0, 2.0], reduction='sum'" in repr(module)
        assert "reduction" not in repr(make())
    assert "reduction='none'" in repr(HingeKRLoss(reduction="none"))


DEFAULTS: dict[tuple[Any, Any], dict[str, float]] = {
    (soft_hinge_kr, SoftHingeKRLoss): {"alpha": 10.0, "margin": 1.0, "temperature": 1.0},
    (log_sum_exp_hinge_kr, LogSumExpHingeKRLoss): {
        "alpha": 10.0,
        "margin": 1.0,
        "temperature": 1.0,
    },
    (hinge_kr, HingeKRLoss): {"alpha": 10.0, "margin": 1.0},
    (emma_loss, EMMALoss): {"temperature": 1.0, "lipschitz": 1.0, "p": 2},
    (logit_annealing_loss, LogitAnnealingLoss): {"offset": 2.0, "temperature": 0.75, "beta": 5.0},
}


@pytest.mark.parametrize("pair", DEFAULTS, ids=lambda pair: pair[0].__name__)
def test_a_module_has_the_defaults_of_its_function(pair: tuple[Any, Any]) -> None:
    """Those of the papers: EMMA at temperature 1, annealing at offset 2, ¾ and exponent 5."""
    for call in pair:
        found = {
            name: parameter.default
            for name, parameter in inspect.signature(call).parameters.items()
            if isinstance(parameter.default, float | int)
        }
        assert found == DEFAULTS[pair]


@pytest.mark.parametrize("loss", [OffsetCrossEntropyLoss, OffsetBinaryCrossEntropyLoss])
def test_an_offset_comes_at_temperature_one(loss: Callable[..., nn.Module]) -> None:
    assert loss(0.5).temperature == 1.0
    assert (loss(0.5).offset, loss(0.5, 0.2).temperature) == (0.5, 0.2)


def test_the_offset_must_be_given() -> None:
    with pytest.raises(TypeError, match="'offset'"):
        OffsetCrossEntropyLoss()


# --------------------------------------------------------------------------------- theorem


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "emma"])
def test_gradients(name: str) -> None:
    logits, labels = draw(5, 4, 2, 0.0)
    function = CLASSES[name][1]
    assert torch.autograd.gradcheck(lambda z: function(z, labels), (logits.requires_grad_(),))


@given(batches, st.floats(0, 3), st.floats(0.01, 2))
def test_the_offset_cross_entropy_is_a_soft_hinge(
    batch: Any, offset: float, temperature: float
) -> None:
    """Between the hinge and the hinge plus t log C, and 1-Lipschitz per logit."""
    logits, labels = draw(*batch)
    logits.requires_grad_()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    hinge = (offset - own[:, 0] + others).clamp(min=0).mean()
    soft = offset_cross_entropy(logits, labels, offset, temperature)
    slack = 1e-12 * (1 + logits.detach().abs().max().item())
    assert hinge - slack <= soft <= hinge + temperature * math.log(logits.shape[1]) + slack
    (gradient,) = torch.autograd.grad(soft, logits)
    assert (gradient.norm(dim=1) * len(labels)).max() <= math.sqrt(2) * (1 + 1e-12)


@given(batches, st.floats(0.1, 3))
def test_no_multi_margin_means_the_radius(batch: Any, radius: float) -> None:
    """It is 0 exactly if every prediction is right and has the radius."""
    logits, labels = draw(*batch)
    loss = multi_margin(logits, labels, margin_for_radius(radius))
    radii = certified_radius(logits, labels)
    assert (loss.item() == 0) == bool((radii >= radius * (1 - 1e-12)).all())


# ---------------------------------------------------------- binary problems, one by one


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_offset_binary_cross_entropy_is_a_loop(shape: tuple[int, ...]) -> None:
    outputs = torch.tensor([2.0, 0.5, -1.0, 0.25, 0.0, -3.0]).double()
    labels = torch.tensor([1, 0, 0, 1, 1, 1])
    values = [
        0.25 * math.log(1 + math.exp((1 - (2 * y - 1) * f) / 0.25))
        for f, y in zip(outputs.tolist(), labels.tolist(), strict=True)
    ]
    loss = OffsetBinaryCrossEntropyLoss(1.0, 0.25, reduction="none")
    expected = torch.tensor(values).double()
    for same in (labels, 2 * labels - 1, labels.bool(), labels.double(), labels.to(torch.uint8)):
        torch.testing.assert_close(loss(outputs.reshape(shape), same), expected)
        torch.testing.assert_close(loss(outputs.reshape(shape), same.reshape(shape)), expected)
    logits = torch.stack([torch.zeros(6).double(), outputs], 1)
    two = offset_cross_entropy(logits, labels, 1.0, 0.25, reduction="none")
    torch.testing.assert_close(two, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_of_binary_losses_are_loops(reduction: str) -> None:
    outputs, labels = torch.tensor([[2.0], [0.5], [-1.0]]).double(), torch.tensor([1, 0, 0])
    weight, counts = torch.tensor([0.5, 3.0]), torch.tensor([3.0, 0.5, 0.5]).double()
    plain = offset_binary_cross_entropy(outputs, labels, 0.8, 0.3, reduction="none")
    each = {"none": counts * plain, "sum": (counts * plain).sum()}
    each["mean"] = each["sum"] / counts.sum()
    module = OffsetBinaryCrossEntropyLoss(0.8, 0.3, class_weight=weight, reduction=reduction)
    torch.testing.assert_close(module(outputs, labels), each[reduction])
    # Hinge-KR: the hinges 0, 1.1 and 0 count 3, ½ and ½ times; the means of the classes do not.
    value = 10 * (0.5 * 1.1) / 4 - (2.0 - (0.5 - 1.0) / 2)
    module = HingeKRLoss(10.0, 0.6, class_weight=weight, reduction=reduction)
    found = module(outputs, labels)
    found = found.mean() if reduction == "none" else found / (3 if reduction == "sum" else 1)
    assert found.item() == pytest.approx(value)


@pytest.mark.parametrize("name", ONE_AGAINST_OTHERS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_several_labels_are_as_many_binary_problems(name: str, reduction: str) -> None:
    outputs, _ = draw(6, 3, 5, 0.0)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    weight, loss = torch.tensor([0.5, 3.0, 1.0]), ONE_AGAINST_OTHERS[name]
    columns = [
        loss(outputs[:, c : c + 1], labels[:, c : c + 1].squeeze(1), reduction=reduction)
        for c in range(3)
    ]
    for dtype in (torch.int64, torch.bool, torch.float64):
        found = loss(outputs, labels.to(dtype), reduction=reduction)
        torch.testing.assert_close(found, sum(columns) / 3)
        found = loss(outputs, labels.to(dtype), class_weight=weight, reduction=reduction)
        expected = (0.5 * columns[0] + 3.0 * columns[1] + columns[2]) / 4.5
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_share_of_both_labels_is_the_expected_loss(columns: int) -> None:
    outputs, _ = draw(5, columns, 6, 0.0)
    q = torch.rand(5, columns, dtype=torch.float64)
    ones, no = torch.ones_like(q), {"reduction": "none"}
    both = [offset_binary_cross_entropy(outputs, y, 0.8, 0.3, **no) for y in (ones, 0 * ones)]
    found = offset_binary_cross_entropy(outputs, q, 0.8, 0.3, **no)
    if columns == 1:
        torch.testing.assert_close(found, q[:, 0] * both[0] + (1 - q[:, 0]) * both[1])
    theirs = functional.binary_cross_entropy_with_logits(outputs, q, **no).mean(1)
    torch.testing.assert_close(offset_binary_cross_entropy(outputs, q, **no), theirs)
    call = lambda z: offset_binary_cross_entropy(z, q, 0.8, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (outputs.requires_grad_(),))


# ----------------------------------------------------------- on paper, limits, extremes


def test_the_newer_losses_on_paper() -> None:
    z, y = torch.tensor([[2.0, 1.0, 0.0]]).double(), torch.tensor([0])
    t = 1 / math.log(3)  # the others weigh ¾ and ¼
    soft = -(2 - 0.75) + 2 * (0.75 * 1.5 + 0.25 * 0.5)
    assert soft_hinge_kr(z, y, 2.0, 0.5, t).item() == pytest.approx(soft)
    nearest = math.log(4) / math.log(3)
    log_sum_exp = -(2 - nearest) + 2 * (0.5 + nearest)
    assert log_sum_exp_hinge_kr(z, y, 2.0, 0.5, t).item() == pytest.approx(log_sum_exp)
    # Of the margins 1 and 2 an attack of size 1 gains 1 and √2.
    reached = 0.5 * math.log(1 + 1 + math.exp((math.sqrt(2) - 2) / 0.5))
    assert emma_loss(z, y, 1.0, 0.5).item() == pytest.approx(reached)
    # With these rows of a head it gains 1 of 1 and 2 of 2; the twice smaller one 1 and 1.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double()
    tied = 0.5 * math.log(1 + 1 + math.exp((math.sqrt(2) - 2) / 0.5))
    assert emma_loss(z, y, 1.0, 0.5, head=rows).item() == pytest.approx(tied)
    half = 0.5 * math.log(1 + 1 + math.exp((math.sqrt(2) / 2 - 2) / 0.5))
    assert emma_loss(z, y, 0.5, 0.5, head=rows).item() == pytest.approx(half)
    q = 1 / (1 + math.exp(0.5 / 0.5) + math.exp(-0.5 / 0.5))
    annealed = -0.5 * (1 - q) ** 3 * math.log(q)
    assert logit_annealing_loss(z, y, 1.5, 0.5, 3.0).item() == pytest.approx(annealed)


@given(batches.map(lambda batch: (*batch[:3], 0.0)), st.floats(0.1, 3), st.floats(0.1, 2))
def test_limits_of_the_temperature(batch: Any, margin: float, radius: float) -> None:
    logits, labels = draw(*batch)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    nearest = others.amax(1)
    hard = (
        nearest
        - own[:, 0]
        + 4 * ((margin - own[:, 0]).clamp(min=0) + (margin + nearest).clamp(min=0))
    )
    for loss in (soft_hinge_kr, log_sum_exp_hinge_kr):
        found = loss(logits, labels, 4.0, margin, 1e-7, reduction="none")
        torch.testing.assert_close(found, hard, rtol=0, atol=1e-4)
    parts = (logits + 4 * (margin + logits).clamp(min=0)).scatter(1, labels[:, None], 0.0)
    even = parts.sum(1) / (logits.shape[1] - 1)
    even += 4 * (margin - own[:, 0]).clamp(min=0) - own[:, 0]
    found = soft_hinge_kr(logits, labels, 4.0, margin, 1e9, reduction="none")
    torch.testing.assert_close(found, even, rtol=0, atol=1e-6)
    found = emma_loss(logits, labels, radius, 1e-7, reduction="none")
    wrong = (nearest - own[:, 0]).clamp(min=0)
    torch.testing.assert_close(found, wrong, rtol=0, atol=1e-5)
    plain = offset_cross_entropy(logits, labels, margin, 0.3)
    assert torch.equal(logit_annealing_loss(logits, labels, margin, 0.3, 0.0), plain)
    found = offset_binary_cross_entropy(logits, labels, margin, 1e-7)
    signs = 2 * functional.one_hot(labels, logits.shape[1]) - 1
    expected = (margin - signs * logits).clamp(min=0).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLASSES)
def test_extreme_logits_do_not_overflow(name: str, dtype: torch.dtype) -> None:
    size = 1e30
    logits = size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    logits = logits.to(dtype).requires_grad_()
    loss = {**WITH_OPTIONS, **ONE_AGAINST_OTHERS}[name]
    values = loss(logits, torch.zeros(3, dtype=torch.int64), reduction="none")
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert (values[1] > 0.3 * size).item()


@pytest.mark.parametrize("beta", [0.25, 1.0, 1.5, 5.0])
def test_annealing_ends_with_slope_zero(beta: float) -> None:
    logits = torch.tensor([[50.0, 0.0], [900.0, 0.0], [1e8, 0.0]]).double().requires_grad_()
    loss = logit_annealing_loss(logits, torch.tensor([0, 0, 0]), 0.5, 0.3, beta, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e-60
    assert loss.abs().max() < 1e-60


# ------------------------------------------------------------------------ what a value says


def promised(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The radii that the docstrings read off the values of CLASSES, for L = 1 and p = 2."""
    classes = logits.shape[1]
    values = {
        "multi-margin": lambda: multi_margin(logits, labels, 1.0, reduction="none"),
        "offset": lambda: offset_cross_entropy(logits, labels, 1.0, 0.3, reduction="none"),
        "annealing": lambda: logit_annealing_loss(logits, labels, 1.0, 0.3, 2.5, reduction="none"),
        "emma": lambda: emma_loss(logits, labels, 0.7, 0.3, reduction="none"),
        "soft hinge-kr": lambda: soft_hinge_kr(logits, labels, 3.0, 0.6, 0.1, reduction="none"),
        "log-sum-exp hinge-kr": lambda: log_sum_exp_hinge_kr(
            logits, labels, 3.0, 0.6, 0.1, reduction="none"
        ),
    }[name]()
    if name.endswith("hinge-kr"):
        lost = 0.1 * math.log(classes - 1) if name.startswith("soft") else 0.0
        return (-values - lost) / math.sqrt(2)
    below = {
        "multi-margin": values == 0,
        "offset": values < 0.3 * math.log(2),
        "annealing": values < 2**-2.5 * 0.3 * math.log(2),
        "emma": values < 0.3 * math.log(2),
    }[name]
    return below * (0.7 if name == "emma" else 1 / math.sqrt(2))


PROMISES = [
    "multi-margin",
    "offset",
    "annealing",
    "emma",
    "soft hinge-kr",
    "log-sum-exp hinge-kr",
]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("name", PROMISES)
def test_a_low_loss_is_a_radius(name: str, classes: int) -> None:
    logits, labels = draw(4000, classes, classes, 0.3)
    labels = torch.where(torch.rand(4000) < 0.8, logits.argmax(1), labels)
    radii, least = certified_radius(logits, labels), promised(name, logits, labels)
    assert (radii >= least - 1e-12).all()
    assert 100 < (least > 0).sum() < 3900
    if name in ("multi-margin", "offset", "annealing", "emma"):  # as much as can be said
        goal = 0.7 if name == "emma" else 1 / math.sqrt(2)
        assert radii[least > 0].min() < goal + 0.2
        if classes == 2:
            assert ((least > 0) == (radii > goal)).all()
    elif classes == 2:  # both sides of the margin are reached: the value is the margin
        inner = (logits.amax(1) > 0.6) & (logits.amin(1) < -0.6) & (radii > 0)
        assert inner.any()
        assert (radii - least)[inner].abs().max() < 1e-12


@pytest.mark.parametrize("name", PROMISES)
def test_a_low_loss_of_a_network_is_a_certificate(name: str) -> None:
    net = nn.Sequential(OrthogonalLinear(3, 8), MaxMin(), OrthogonalLinear(8, 3)).double().eval()
    points = 3 * torch.randn(200, 3, dtype=torch.float64)
    logits = net(points).detach()
    labels = logits.argmax(1)
    least = promised(name, logits, labels)
    certificate = certify(net, [(points, labels)], (3,), sound=False)
    assert (certificate.radius >= least - 1e-9).all()
    assert (least > 0).any()


def test_a_low_loss_of_one_output_is_a_certificate() -> None:
    net = nn.Sequential(OrthogonalLinear(3, 8), MaxMin(), OrthogonalLinear(8, 1)).double().eval()
    points = 3 * torch.randn(200, 3, dtype=torch.float64)
    outputs = net(points).detach()
    labels = (outputs[:, 0] > 0).long()
    loss = offset_binary_cross_entropy(outputs, labels, 0.6, 0.2, reduction="none")
    good = loss < 0.2 * math.log(2)
    certificate = certify(net, [(points, labels)], (3,), sound=False)
    assert 0 < good.sum() < 200
    assert (certificate.radius[good] >= 0.6 * (1 - 1e-6)).all()
    assert (certificate.radius[~good] <= 0.6 * (1 + 1e-3)).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_unit_rows_are_certified_pair_by_pair(p: float) -> None:
    """Each logit of a head of unit rows is 1-Lipschitz, the head is not, and pairs have ‖wᵢ-wⱼ‖."""
    trunk = nn.Sequential(OrthogonalLinear(3, 8), MaxMin())
    net = nn.Sequential(*trunk, UnitNormLinear(8, 4)).double().eval()
    points = 3 * torch.randn(300, 3, dtype=torch.float64)
    logits, head = net(points).detach(), net[-1].weight.detach()
    labels = logits.argmax(1)
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    pairs = torch.tensor([[row_norm(a - b, dual) for b in head] for a in head]).double()
    if p == 2:
        assert torch.linalg.matrix_norm(head, 2) > 1.1
        assert pairs.max() <= 2
        certificate = certify(net, [(points, labels)], (3,), sound=False).radius
    else:
        certificate = certified_radius(logits, labels, 1.0, p, head=head)
    naive = [
        min((row[y] - row[j]) / pairs[y, j] for j in range(4) if j != y)
        for row, y in zip(logits, labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(certificate, torch.stack(naive), rtol=1e-5, atol=1e-9)
    radius, t = certificate.median().item(), 0.3
    values = emma_loss(logits, labels, radius, t, 1.0, p, head=head, reduction="none")
    good = values < t * math.log(2)
    assert 0 < good.sum() < 300
    assert (certificate[good] >= radius * (1 - 1e-6)).all()
    module = EMMALoss(radius, t, 1.0, p, reduction="none")
    assert torch.equal(module(logits, labels, head), values)


def row_norm(row: Tensor, order: float) -> float:
    values = [abs(value) for value in row.tolist()]
    return max(values) if order == math.inf else sum(v**order for v in values) ** (1 / order)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_gradient_of_emma_holds_the_radii(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    found = torch.autograd.grad(
        emma_loss(logits, labels, 0.3, 0.5, 1.5, p, head=head, reduction="sum"), (logits, head)
    )
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    own = functional.one_hot(labels, 4).bool()
    steps = torch.where(own[..., None], 1.0, head[labels][:, None] - head)
    slopes = 1.5 * torch.linalg.vector_norm(steps, dual, dim=2)
    margins = logits.gather(1, labels[:, None]) - logits
    radii = (margins / slopes).clamp(0, 0.3).detach()
    raised = torch.where(own, logits, logits + radii * slopes) / 0.5
    expected = torch.autograd.grad(
        0.5 * functional.cross_entropy(raised, labels, reduction="sum"), (logits, head)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found[0], raised.softmax(1) - own.double())


def test_classes_within_reach_push_alike() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.5, -9.0]], dtype=torch.float64, requires_grad=True)
    loss = emma_loss(logits, torch.tensor([0]), 0.5, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([[-2 / 3, 1 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_gradients_of_the_newer_losses_on_paper() -> None:
    """What the docstrings say of them, at logits inside and outside of the margin."""
    y = torch.tensor([0])
    z = torch.tensor([[0.3, -0.2, -2.0]]).double().requires_grad_()

    def gradient(value: Tensor) -> list[float]:
        return torch.autograd.grad(value, z)[0][0].tolist()

    w = 1 / (1 + math.exp(-1.8 / 0.5))
    weights, parts, slopes = [w, 1 - w], [-0.2 + 3 * 0.4, -2.0], [4.0, 1.0]
    mean = w * parts[0] + (1 - w) * parts[1]
    expected = [-4.0] + [
        weight * (slope + (part - mean) / 0.5)
        for weight, slope, part in zip(weights, slopes, parts, strict=True)
    ]
    assert gradient(soft_hinge_kr(z, y, 3.0, 0.6, 0.5)) == pytest.approx(expected)
    assert expected[2] < 0  # the class far behind is pushed up
    found = gradient(log_sum_exp_hinge_kr(z, y, 3.0, 0.6, 0.5))
    assert found == pytest.approx([-4.0, 4 * w, 4 * (1 - w)])
    own = torch.tensor([1.0, 0.0, 0.0]).double()
    p = ((z[0].detach() - 0.8 * own) / 0.3).softmax(0)
    q = p[0].item()
    factor = (1 - q) ** 2.5 - 2.5 * q * (1 - q) ** 1.5 * math.log(q)
    found = gradient(logit_annealing_loss(z, y, 0.8, 0.3, 2.5))
    assert found == pytest.approx((factor * (p - own)).tolist())
    f = torch.tensor([0.4, -2.0], dtype=torch.float64, requires_grad=True)
    total = offset_binary_cross_entropy(f, torch.tensor([-1, -1]), 1.0, 0.5, reduction="sum")
    slopes = [1 / (1 + math.exp(-(1 + value) / 0.5)) for value in (0.4, -2.0)]
    assert torch.autograd.grad(total, f)[0].tolist() == pytest.approx(slopes)


@given(batches.map(lambda batch: (*batch[:3], 0.0)))
def test_log_sum_exp_hinge_kr_is_convex_and_above_its_limit(batch: Any) -> None:
    logits, labels = draw(*batch)
    other = logits.flip(0)

    def loss(z: Tensor, t: float = 0.5) -> Tensor:
        return log_sum_exp_hinge_kr(z, labels, 3.0, 0.6, t, reduction="none")

    assert (2 * loss((logits + other) / 2) <= loss(logits) + loss(other) + 1e-12).all()
    assert (loss(logits) >= loss(logits, 0.01) - 1e-12).all()


@pytest.mark.parametrize("name", CLASSES)
def test_training_with_a_loss_separates_two_blobs(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    centres = torch.tensor([[3.0, 0.0], [-3.0, 3.0], [-3.0, -3.0]])
    points = centres[labels] + 0.3 * torch.randn(120, 2, generator=generator)
    net = nn.Sequential(OrthogonalLinear(2, 8), MaxMin(), OrthogonalLinear(8, 3))
    module = CLASSES[name][0]
    train(net, points, labels, epochs=20, lr=0.01, loss=module, optimizer=torch.optim.Adam)
    with torch.no_grad():
        assert (net(points).argmax(1) == labels).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CLASSES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    logits, labels = draw(6, 4, 3, 0.0)
    function = CLASSES[name][1]
    expected = function(logits.to(dtype).double(), labels)
    ours = function(logits.to(dtype), labels)
    assert ours.dtype in (dtype, torch.float32)
    assert abs(ours.item() - expected.item()) < 64 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------ bad input

Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (lambda: multi_margin([[1.0]], Y), TypeError, "logits must be a torch.Tensor"),  # type: ignore[arg-type]
    "integer logits": (lambda: multi_margin(Z.long(), Y), TypeError, "floating-point"),
    "float labels": (lambda: offset_cross_entropy(Z, Y.float()), TypeError, "int64"),
    "one class": (lambda: multi_margin(Z[:, :1], Y), ValueError, "two classes"),
    "too few labels": (lambda: certificate_loss(Z, Y[:1]), ValueError, "shapes"),
    "label too large": (lambda: multi_margin(Z, Y + 1), ValueError, r"from 0 to 2, got 1 to 3"),
    "label negative": (lambda: hinge_kr(Z, Y - 1), ValueError, "got -1 to 1"),
    "no rows": (lambda: multi_margin(Z[:0], Y[:0]), ValueError, "must not be empty"),
    "margin 0": (lambda: multi_margin(Z, Y, 0.0), ValueError, "margin must be positive"),
    "margin NaN": (lambda: MultiMarginLoss(math.nan), ValueError, "margin must be positive"),
    "temperature 0": (lambda: offset_cross_entropy(Z, Y, 1.0, 0.0), ValueError, "temperature"),
    "offset < 0": (lambda: OffsetCrossEntropyLoss(-1.0), ValueError, "offset must be"),
    "weight < 0": (lambda: CertificateLoss(-1.0), ValueError, "weight must be"),
    "lipschitz 0": (lambda: CertificateLoss(1.0, 0.0), ValueError, "lipschitz must be positive"),
    "radius < 0": (lambda: margin_for_radius(-1.0), ValueError, "radius must be positive"),
    "p < 1": (lambda: margin_for_radius(1.0, p=0.5), ValueError, "p must be"),
    "alpha < 0": (lambda: hinge_kr(Z, Y, -1.0), ValueError, "alpha must be"),
    "signs of 2": (lambda: hinge_kr(Z[:, 0], Y), ValueError, r"-1 or 1, got \[0, 2\]"),
    "no margin": (lambda: OffsetCrossEntropyLoss(temperature=1.0), TypeError, "'offset'"),  # type: ignore[call-arg]
    "labels as truth values": (lambda: multi_margin(Z, Y.bool()), TypeError, "got torch.bool"),
    "complex labels": (lambda: multi_margin(Z, Z + 1j), TypeError, "got torch.complex64"),
    "no probabilities": (lambda: multi_margin(Z, Z), ValueError, "sums from 0 to 0"),
    "negative probabilities": (
        lambda: certificate_loss(Z, torch.tensor([[2.0, -1.0, 0.0]] * 2)),
        ValueError,
        "entries from -1 to 2",
    ),
    "probabilities NaN": (
        lambda: multi_margin(Z, torch.full((2, 3), math.nan)),
        ValueError,
        "must be rows of probabilities",
    ),
    "soft labels of hinge-KR": (
        lambda: hinge_kr(Z, torch.full((2, 3), 1 / 3)),
        ValueError,
        "labels must be classes, or rows of 0 and 1",
    ),
    "labels of other classes": (
        lambda: multi_margin(Z, torch.full((2, 4), 0.25)),
        ValueError,
        r"got \(2, 3\) and \(2, 4\)",
    ),
    "reduction": (lambda: hinge_kr(Z, Y, reduction="max"), ValueError, "reduction must be .*'max'"),  # type: ignore[arg-type]
    "reduction of a module": (
        lambda: MultiMarginLoss(reduction="max"),  # type: ignore[arg-type]
        ValueError,
        "reduction must be",
    ),
    "weight of a class": (
        lambda: multi_margin(Z, Y, class_weight=torch.ones(2)),
        ValueError,
        r"class_weight must have shape \(3,\), got \(2,\)",
    ),
    "weight zero": (
        lambda: CertificateLoss(class_weight=torch.zeros(3)),
        ValueError,
        "class_weight must be positive",
    ),
    "weights in a list": (
        lambda: OffsetCrossEntropyLoss(1.0, class_weight=[1.0]),  # type: ignore[arg-type]
        TypeError,
        "class_weight must be a floating-point tensor, got list",
    ),
    "alpha of a soft hinge-KR": (lambda: SoftHingeKRLoss(-1.0), ValueError, "alpha must be"),
    "margin of a log-sum-exp": (lambda: log_sum_exp_hinge_kr(Z, Y, 1.0, 0.0), ValueError, "margin"),
    "temperature of a soft one": (
        lambda: soft_hinge_kr(Z, Y, temperature=0.0),
        ValueError,
        "temperature must be positive",
    ),
    "several labels of a soft one": (
        lambda: soft_hinge_kr(Z, torch.ones(2, 3)),
        ValueError,
        "or use hinge_kr or offset_binary_cross_entropy",
    ),
    "radius 0": (lambda: emma_loss(Z, Y, 0.0), ValueError, "radius must be positive"),
    "head of other classes": (
        lambda: emma_loss(Z, Y, 1.0, head=torch.eye(2)),
        ValueError,
        r"head must have shape \(3, features\), got \(2, 2\)",
    ),
    "head in a list": (
        lambda: EMMALoss(1.0)(Z, Y, [[1.0]]),
        TypeError,
        "head must be a floating-point tensor, got list",
    ),
    "beta < 0": (lambda: LogitAnnealingLoss(beta=-1.0), ValueError, "beta must be"),
    "no distance": (OffsetBinaryCrossEntropyLoss, TypeError, "'offset'"),  # type: ignore[call-arg]
    "binary labels of 2": (
        lambda: offset_binary_cross_entropy(Z[:, 0], Y),
        ValueError,
        "labels must be -1 and 1, or probabilities from 0 to 1, got entries from 0 to 2",
    ),
    "mixed signs": (
        lambda: offset_binary_cross_entropy(Z[:, 0], torch.tensor([-1, 0])),
        ValueError,
        "got entries from -1 to 0",
    ),
    "signs of several labels": (
        lambda: offset_binary_cross_entropy(Z, Z - 1),
        ValueError,
        "labels must be probabilities from 0 to 1",
    ),
    "binary labels NaN": (
        lambda: offset_binary_cross_entropy(Z, Z * math.nan),
        ValueError,
        "labels must be probabilities",
    ),
    "labels of other shape": (
        lambda: offset_binary_cross_entropy(Z, Z[:, :2]),
        ValueError,
        r"got \(2, 3\) and \(2, 2\)",
    ),
    "labels of other samples": (
        lambda: offset_binary_cross_entropy(Z[:, :1], torch.zeros(3, 1)),
        ValueError,
        r"got \(2, 1\) and \(3, 1\)",
    ),
    "margin infinite": (lambda: MultiMarginLoss(math.inf), ValueError, "positive and finite"),
    "complex binary labels": (
        lambda: offset_binary_cross_entropy(Z, Z + 1j),
        TypeError,
        "labels must be real",
    ),
    "weights of one output": (
        lambda: hinge_kr(Z[:, :1], torch.tensor([0, 1]), class_weight=torch.ones(1)),
        ValueError,
        r"class_weight must have shape \(2,\), got \(1,\)",
    ),
    "weights of several outputs": (
        lambda: offset_binary_cross_entropy(Z, Z, class_weight=torch.ones(2)),
        ValueError,
        r"class_weight must have shape \(3,\), got \(2,\)",
    ),
    "hinge-KR of a list": (lambda: hinge_kr([1.0], Y), TypeError, "must be a torch.Tensor"),  # type: ignore[arg-type]
    "signs in a matrix": (lambda: hinge_kr(Z[:, 0], Y[:1]), ValueError, "one shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_public_names() -> None:
    assert sorted(losses.__all__) == losses.__all__


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_hinge_kr_takes_several_classes_a_sample(dtype: torch.dtype) -> None:
    """The mean over the classes of the binary loss, which is one against the others."""
    outputs = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 1.0, 0.25]])
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]]).to(dtype)
    signs = labels.long() * 2 - 1
    expected = torch.stack([hinge_kr(outputs[:, c], signs[:, c]) for c in range(3)]).mean()
    torch.testing.assert_close(hinge_kr(outputs, labels), expected)
    with pytest.raises(ValueError, match=r"divide multi-label rows by their sums"):
        multi_margin(outputs, labels.float())


@pytest.mark.parametrize("loss", [MultiMarginLoss(1.0), OffsetCrossEntropyLoss(1.0)])
def test_class_weights_take_the_dtype_of_the_logits(loss: nn.Module) -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss.class_weight = weight
    found = loss(logits, labels)
    assert found.dtype == torch.float32
    loss.class_weight = weight.float()
    assert found == loss(logits, labels)
