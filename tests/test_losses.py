from __future__ import annotations

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
    HingeKRLoss,
    MultiMarginLoss,
    OffsetCrossEntropyLoss,
    certificate_loss,
    hinge_kr,
    margin_for_radius,
    multi_margin,
    offset_cross_entropy,
)
from lipbook.orthogonal import OrthogonalLinear
from lipbook.robustness import certified_radius

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
        else:
            entropy = math.log(1 + sum(math.exp(z - row[y]) for z in others))
            values.append(entropy - 0.4 * max(0.0, (row[y] - max(others)) / (2 * 2.0)))
    return torch.tensor(values, dtype=torch.float64)


WITH_OPTIONS: dict[str, Callable[..., Tensor]] = {
    "multi-margin": lambda z, y, **o: multi_margin(z, y, 1.7, divide_by_classes=False, **o),
    "offset": lambda z, y, **o: offset_cross_entropy(z, y, 0.8, 0.3, **o),
    "certificate": lambda z, y, **o: certificate_loss(z, y, 0.4, 2.0, math.inf, **o),
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    "multi-margin": lambda **o: MultiMarginLoss(1.7, divide_by_classes=False, **o),
    "offset": lambda **o: OffsetCrossEntropyLoss(0.8, 0.3, **o),
    "certificate": lambda **o: CertificateLoss(0.4, 2.0, math.inf, **o),
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
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, q, **options), (logits,))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLASSES)
def test_one_hot_rows_are_their_classes(name: str, dtype: torch.dtype, reduction: str) -> None:
    logits, labels = draw(8, 3, 3, 0.0)
    one_hot = functional.one_hot(labels, 3).to(dtype)
    loss = WITH_OPTIONS.get(name, lambda z, y, **o: hinge_kr(z, y, 3.0, 0.6, **o))
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


def test_the_offset_must_be_given() -> None:
    with pytest.raises(TypeError, match="'offset'"):
        OffsetCrossEntropyLoss()


# --------------------------------------------------------------------------------- theorem


@pytest.mark.parametrize("name", CLASSES)
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
