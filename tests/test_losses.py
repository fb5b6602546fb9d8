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
    "signs in a matrix": (lambda: hinge_kr(Z[:, 0], Y[:1]), ValueError, "one shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_public_names() -> None:
    assert sorted(losses.__all__) == losses.__all__
