"""Certificates: what they say, what they report, what they refuse."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from lipbook import attacks, robustness, rounding
from lipbook.activations import Householder, MaxMin
from lipbook.attacks import attacked_accuracy, fgsm, pgd
from lipbook.composition import Ball, Box, Residual, lipschitz_bound
from lipbook.convolutions import (
    CayleyConv2d,
    OrthogonalConv2d,
    SkewOrthogonalConv2d,
)
from lipbook.orthogonal import InfinityNormLinear, OrthogonalLinear, Scale, UnitNormLinear
from lipbook.residual import SLLLinear
from lipbook.robustness import (
    Accuracy,
    Certificate,
    Certifier,
    Standardize,
    certified_radius,
    certify,
    certify_by_smoothing,
    smoothed_radius,
    wilson_interval,
)
from lipbook.robustness.lipschitz import Reader
from lipbook.rounding import (
    forward_error,
    rigorous_matrix_norm,
)

INF = math.inf
EXPONENTS = (1.0, 2.0, INF)

# ------------------------------------------------------------------------ the margin's radius


def test_radii_on_paper() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([0, 1])
    for p, factor in ((1, 1.0), (2, math.sqrt(2)), (INF, 2.0), (4, 2 ** (3 / 4))):
        radius = certified_radius(logits, labels, 0.5, p)
        torch.testing.assert_close(radius, torch.tensor([1 / (0.5 * factor), 0.0]).double())


def test_radii_with_a_head_on_paper() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])
    head = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    expected = {1: min(2 / 4, 1 / 1), 2: min(2 / 5, 1 / 1), INF: min(2 / 7, 1 / 1)}
    for p, radius in expected.items():
        assert certified_radius(logits, labels, 2.0, p, head=head).item() == pytest.approx(
            radius / 2
        )


def test_a_difference_that_no_input_moves_bounds_nothing() -> None:
    head = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0])
    radius = certified_radius(torch.tensor([[2.0, 1.0, 0.0]]), labels, head=head)
    assert radius.item() == pytest.approx(2 / math.sqrt(2))
    tied = certified_radius(torch.tensor([[2.0, 2.0, 0.0]]), labels, head=head)
    assert tied.item() == 0


def test_the_radius_of_a_sign() -> None:
    outputs, labels = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1, -1, -1])
    assert certified_radius(outputs, labels, 2.0).tolist() == [1.5, 0.5, 0.0]


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 999), st.sampled_from(EXPONENTS))
def test_the_radius_of_a_linear_classifier_is_attained(
    classes: int, features: int, seed: int, p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    head, x = draw(classes, features), draw(1, features)
    logits = x @ head.mT
    label = logits.argmax(1)
    radius = certified_radius(logits, label, p=p, head=head)
    steps = []
    for j in set(range(classes)) - {label.item()}:
        direction = head[j] - head[label[0]]
        if p == 2:
            unit = direction / direction.norm()
        elif p == INF:
            unit = direction.sign()
        else:
            top = direction.abs().argmax()
            unit = functional.one_hot(top, features) * direction[top].sign()
        steps.append(x + radius * unit)
    for factor, kept in ((0.999, True), (1.001, False)):
        points = x + factor * (torch.cat(steps) - x)
        assert bool(((points @ head.mT).argmax(1) == label).all()) == kept


def test_with_an_orthonormal_head_the_two_forms_agree() -> None:
    head = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64)).Q.mT
    logits = torch.randn(9, 4, dtype=torch.float64)
    labels = logits.argmax(1)
    plain = certified_radius(logits, labels, 3.0)
    torch.testing.assert_close(certified_radius(logits, labels, 3.0, head=head), plain)


# --------------------------------------------------------------------------------- certificates


def trained_like(p: float = 2) -> nn.Sequential:
    """A net of the usual shape with large margins, without training."""
    torch.manual_seed(0)
    if p == INF:
        layers = [InfinityNormLinear(6, 8), MaxMin(), InfinityNormLinear(8, 8), MaxMin()]
    else:
        layers = [OrthogonalLinear(6, 8), MaxMin(), OrthogonalLinear(8, 8), MaxMin()]
    return nn.Sequential(*layers, UnitNormLinear(8, 4)).eval()


def points(n: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(n, 6, generator=generator)
    return x, torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("sound", [True, False])
def test_certified_points_withstand_the_attack(p: float, sound: bool) -> None:
    net, (x, y) = trained_like(p), points()
    certificate = certify(net, [(x, y)], (6,), p, sound=sound)
    assert certificate.radius.max() > 0.1
    predicted = certificate.predictions
    moved = pgd(net, x, predicted, certificate.radius, p, steps=20, restarts=2)
    with torch.no_grad():
        assert (net(moved).argmax(1) == predicted).all()


@pytest.mark.parametrize("p", [2.0, INF])
def test_certified_is_at_most_attacked_and_the_gap_is_small(p: float) -> None:
    net, (x, _) = trained_like(p), points()
    loader = [(x, net(x).argmax(1))]
    certificate = certify(net, loader, (6,), p)
    for epsilon in (0.05, 1.0):
        certified = certificate.certified_accuracy(epsilon).value
        for attack, options in ((pgd, {"steps": 15}), (fgsm, {})):
            attacked = attacked_accuracy(net, loader, epsilon, p, attack=attack, **options).value
            assert certified <= attacked
    assert attacked_accuracy(net, loader, 20.0, p, steps=15).value < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", EXPONENTS)
def test_the_radius_of_a_linear_program_is_attained(dtype: torch.dtype, p: float) -> None:
    net = nn.Sequential(nn.Linear(6, 2)).eval().to(dtype)
    x = points(20)[0].to(dtype)
    certificate = certify(net, [(x, torch.zeros(20, dtype=torch.int64))], (6,), p)
    predicted = certificate.predictions
    for factor, kept in ((0.999, True), (1.001, False)):
        moved = fgsm(net, x, predicted, factor * certificate.radius, p)
        flat = (net(moved).argmax(1) == predicted)[certificate.radius > 0.01]
        assert flat.all() if kept else not flat.any()


@pytest.mark.parametrize("dimension", [1, 5])
@pytest.mark.parametrize("sound", [True, False])
def test_the_radius_of_a_maxmin_net_is_attained(dimension: int, sound: bool) -> None:
    """|<u, x>| - t, which MaxMin represents with all norms 1: the distance to |<u, x>| = t."""
    u = functional.normalize(torch.randn(dimension, dtype=torch.float64), dim=0)
    t, root = 0.7, math.sqrt(0.5)
    net = nn.Sequential(nn.Linear(dimension, 2, bias=False), MaxMin(), nn.Linear(2, 2)).double()
    net[0].weight.data = root * torch.stack([u, -u])
    net[2].weight.data = root * torch.tensor([[-1.0, 1.0], [0.0, 0.0]]).double()
    net[2].bias.data = torch.tensor([0.0, t], dtype=torch.float64)
    x = torch.tensor([[2.0], [-1.5], [0.25], [-0.125]]).double() * u
    certificate = certify(net.eval(), [(x, torch.zeros(4).long())], (dimension,), sound=sound)
    distance = ((x @ u).abs() - t).abs()
    torch.testing.assert_close(certificate.radius, distance, rtol=1e-9, atol=0)
    outward = torch.tensor([-1.0, 1.0, 1.0, -1.0]).double()[:, None]
    for factor, kept in ((0.999, True), (1.001, False)):
        moved = x + outward * (factor * certificate.radius)[:, None] * u
        assert ((net(moved).argmax(1) == certificate.predictions) == kept).all()


@pytest.mark.parametrize("p", EXPONENTS)
def test_sound_radii_are_the_real_ones_less_a_little(p: float) -> None:
    net, (x, y) = trained_like(p), points()
    real = certify(net, [(x, y)], (6,), p, sound=False)
    sound = certify(net, [(x, y)], (6,), p)
    assert (sound.radius <= real.radius).all()
    large = real.radius > 0.1
    assert (sound.radius[large] >= 0.999 * real.radius[large]).all()
    assert torch.equal(sound.predictions, net(x).argmax(1))
    lost = 1 - (sound.radius / real.radius)[real.radius > 0].median().item()
    assert sound.facts["lost_to_rounding"] == pytest.approx(lost, rel=0.05)
    assert "sound in floating point (median loss 0.0" in str(sound)
    assert real.facts["lost_to_rounding"] == 0


def test_the_sound_radius_is_what_the_formula_says() -> None:
    """Without a head: (margin - 2 a 2^(1/q)) / ((L + c) 2^(1/q)), of the whole net."""
    net = nn.Sequential(nn.Linear(6, 4), MaxMin()).eval()
    x, y = points(9)
    certificate = certify(net, [(x, y)], (6,))
    with torch.no_grad():
        result = forward_error(net, x)
    top = result.outputs.double().topk(2, 1).values
    factor = math.sqrt(2)
    radius = (top[:, 0] - top[:, 1] - 2 * factor * result.error) / (
        factor * (result.lipschitz + result.slope)
    )
    torch.testing.assert_close(certificate.radius, radius.clamp(min=0), rtol=1e-9, atol=1e-12)


def exact_margin_survives(net: nn.Module, x: Tensor, y: Tensor) -> bool:
    return bool((net(x).argmax(1) == net(y).argmax(1)).all())


def cancelling() -> tuple[nn.Module, Tensor]:
    """A linear classifier whose logits are large and close: rounding decides between them."""
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    net[0].weight.data = torch.tensor([[4096.0, 1.0], [4096.0, 0.0]])
    net[0].bias.data.zero_()
    return net, torch.tensor([[2.0, 2.0**-10]])


@pytest.mark.parametrize("depth", [1, 2])
def test_overflow_nearby_limits_the_radius(depth: int) -> None:
    """A class that no input changes in real numbers, until sums are infinite."""
    half, most = torch.float16, torch.finfo(torch.float16).max
    head = nn.Linear(1, 2).to(half)
    head.weight.data.fill_(1.0)
    head.bias.data = torch.tensor([2000.0, 0.0], dtype=half)
    middle = nn.Linear(1, 1, bias=False).to(half)
    middle.weight.data.fill_(4.0)
    net = nn.Sequential(middle, head)[-depth:].eval()
    batch = [(torch.zeros(1, 1, dtype=half), torch.tensor([0]))]
    radius = certify(net, batch, (1,)).radius.item()
    scale = 4.0 ** (depth - 1)
    assert 0.2 * most < scale * radius < 0.25 * most
    assert certify(net.float(), [(batch[0][0].float(), batch[0][1])], (1,)).radius > most


def test_a_counterexample_to_the_radius_of_real_arithmetic_and_none_to_the_sound_one() -> None:
    net, x = cancelling()  # logits 8192 + 2^-10 and 8192: apart in float32, by one ulp
    batch = [(x, torch.tensor([0]))]
    real, sound = (certify(net, batch, (2,), sound=sound) for sound in (False, True))
    assert real.predictions.item() == 0
    moved = torch.tensor([[2.0, 2.0**-12]])  # where the first logit rounds to the second
    distance = (moved - x).double().norm().item()
    net[0].bias.data[1] = 0.0
    with torch.no_grad():
        logits = net(moved)
    assert distance < real.radius.item()
    assert logits[0, 0] == logits[0, 1]  # though in real numbers the first is larger
    assert sound.radius.item() < distance


def test_constants_that_underflow_do_not_certify_forever() -> None:
    """The slope 1e-245 of the logits is a product with a factor that float64 takes for 0."""
    net = nn.Sequential(Scale(1e-200), Scale(1e-200), nn.Linear(1, 2)).double().eval()
    net[2].weight.data = torch.tensor([[-1e155], [0.0]], dtype=torch.float64)
    net[2].bias.data = torch.tensor([1e60, 0.0], dtype=torch.float64)
    here, there = (torch.full((1, 1), v, dtype=torch.float64) for v in (0.0, 1e306))
    certificate = certify(net, [(here, torch.tensor([0]))], (1,))
    with torch.no_grad():
        assert net(here).argmax() != net(there).argmax()
    assert 0 < certificate.radius.item() < 1e306


def test_the_last_layer_is_found_in_nested_networks() -> None:
    net, (x, y) = trained_like(), points()
    nested = nn.Sequential(nn.Sequential(*net[:2]), nn.Sequential(*net[2:])).eval()
    plain = certify(net, [(x, y)], (6,)).radius
    torch.testing.assert_close(certify(nested, [(x, y)], (6,)).radius, plain)
    closed = nn.Sequential(net, nn.Identity()).eval()
    unknown = certify(closed, [(x, y)], (6,)).radius
    assert (unknown < plain)[plain > 0.01].all()  # ‖W‖ √2 instead of ‖w_y - w_j‖


def test_batches_are_joined_in_order() -> None:
    net, (x, y) = trained_like(), points(50)
    parts = certify(net, list(zip(x.split(7), y.split(7), strict=True)), (6,))
    whole = certify(net, [(x, y)], (6,))
    assert torch.equal(parts.predictions, whole.predictions)
    assert torch.equal(parts.labels, y)
    torch.testing.assert_close(parts.radius, whole.radius, rtol=1e-5, atol=1e-7)


def test_preprocessing_is_part_of_the_radius() -> None:
    net, (x, y) = trained_like(), points(40)
    images = x.view(40, 1, 2, 3)
    flat = nn.Sequential(nn.Flatten(), net).eval()
    for sound in (True, False):
        plain = certify(flat, [(images, y)], (1, 2, 3), sound=sound)
        standard = Standardize([0.0], [0.25])
        with_std = certify(flat, [(images / 4, y)], (1, 2, 3), sound=sound, preprocess=standard)
        torch.testing.assert_close(with_std.radius, plain.radius / 4, rtol=1e-3, atol=1e-6)
        crop = nn.ZeroPad2d((-1, -2, -1, 0))
        large = functional.pad(images, (1, 2, 1, 0), value=9.0)
        cropped = certify(flat, [(large, y)], (1, 3, 6), sound=sound, preprocess=crop)
        torch.testing.assert_close(cropped.radius, plain.radius, rtol=1e-3, atol=1e-6)
    wide = nn.Sequential(nn.Flatten(), OrthogonalLinear(24, 4)).eval()
    enlarged = certify(wide, [(images, y)], (1, 2, 3), preprocess=nn.Upsample(scale_factor=2))
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    at_once = certify(wide, [(doubled, y)], (1, 4, 6))
    torch.testing.assert_close(enlarged.radius, at_once.radius / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_standardisation_counts_by_its_smallest_deviation(p: float) -> None:
    layer = Standardize([0.5, 0.25, 0.0], [0.5, 0.25, 1.0])
    x, step = torch.rand(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    step[0, 1, 0, 1] = 0.5
    assert lipschitz_bound(layer, (3, 2, 2), p).value == 4.0
    moved = (layer(x + step) - layer(x)).abs().sum().item()
    assert math.isclose(moved, 4 * 0.5, rel_tol=1e-5)


def test_half_precision_costs_radius_and_stays_sound() -> None:
    net, (x, y) = trained_like(), points()
    single = certify(net, [(x, y)], (6,))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            half = certify(net, [(x, y)], (6,))
            moved = pgd(net, x, half.predictions, half.radius, steps=10)
            assert (net(moved).argmax(1) == half.predictions).all()
        assert half.facts["autocast"] == str(dtype).removeprefix("torch.")
        assert half.facts["lost_to_rounding"] > 10 * single.facts["lost_to_rounding"]
        assert half.radius.max() > 0.5 * single.radius.max()


def test_a_convolutional_net() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        OrthogonalConv2d(1, 8, 4, stride=2), MaxMin(),
        Residual(nn.Conv2d(8, 8, 3, padding=1)), nn.AvgPool2d(2),
        nn.Flatten(), OrthogonalLinear(32, 16), Householder(16), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    x, y = torch.rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.int64)
    certificate = certify(net, [(x, y)], (1, 8, 8))
    real = certify(net, [(x, y)], (1, 8, 8), sound=False)
    assert (certificate.radius > 0).any()
    assert (certificate.radius <= real.radius).all()
    moved = pgd(net, x, certificate.predictions, certificate.radius, steps=10)
    assert (net(moved).argmax(1) == certificate.predictions).all()


def test_the_model_and_its_inputs_are_left_as_they_were() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), *trained_like()).eval()
    x, y = points(5)
    before = copy.deepcopy(x), {k: v.clone() for k, v in net.state_dict().items()}
    for sound in (True, False):
        certify(net, [(x, y)], (6,), sound=sound)
    assert torch.equal(x, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())


# -------------------------------------------------------------------------- what it reports


@given(st.integers(1, 500), st.data(), st.floats(0.5, 0.999))
def test_wilson_against_scipy(trials: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, trials))
    ours = wilson_interval(successes, trials, confidence)
    test = stats.binomtest(successes, trials)
    theirs = test.proportion_ci(confidence, method="wilson")
    assert ours.value == successes / trials
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def certificate() -> Certificate:
    radius = torch.tensor([0.5, 2.0, 1.0, INF], dtype=torch.float64)
    predictions, labels = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 1, 2])
    return Certificate(radius, predictions, labels, 2.0, True, {"note": "by hand", "n": [1, 2]})


def test_certified_accuracy_by_hand() -> None:
    ours = certificate()
    assert ours.correct.tolist() == [True, True, False, True]
    expected = {0.0: 0.75, 0.5: 0.75, 0.51: 0.5, 2.0: 0.5, 2.1: 0.25, 1e9: 0.25}
    for epsilon, value in expected.items():
        assert ours.certified_accuracy(epsilon).value == value
    interval = ours.certified_accuracy(0.0, confidence=0.9)
    assert interval == wilson_interval(3, 4, 0.9)
    assert isinstance(interval, Accuracy)
    assert "75.00 %" in str(ours)


def test_a_certificate_survives_its_file(tmp_path: Path) -> None:
    ours = certificate()
    path = tmp_path / "certificate.npz"
    ours.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["certificate.npz"]
    again = Certificate.load(path)
    for name in ("radius", "predictions", "labels"):
        assert torch.equal(getattr(again, name), getattr(ours, name))
    assert (again.p, again.sound, again.facts) == (ours.p, ours.sound, ours.facts)
    with np.load(path) as file:
        assert json.loads(str(file["facts"]))["facts"]["note"] == "by hand"
    infinite = Certificate(ours.radius, ours.predictions, ours.labels, INF, False)
    infinite.save(path)
    assert Certificate.load(path).p == INF


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        ({"lost_to_rounding": 0.051, "dtype": "float32"}, True),
        ({"lost_to_rounding": 0.46, "dtype": "bfloat16"}, True),
        ({"lost_to_rounding": 0.049, "dtype": "float32"}, False),
        ({"lost_to_rounding": 0.9, "dtype": "float64"}, False),
        ({}, False),
    ],
)
def test_the_table_says_what_to_do_where_rounding_is_dear(
    facts: dict[str, Any], advised: bool
) -> None:
    last = Certificate(torch.ones(1), Y[:1], Y[:1], 2, True, facts).table([0]).splitlines()[-1]
    advice = "of the median radius: certify model.double() on inputs.double()."
    assert last.endswith(advice) == advised
    assert "Rounding" not in Certificate(torch.ones(1), Y[:1], Y[:1], 2, False, facts).table([0])


def test_the_advice_helps() -> None:
    x, y = points(40)
    dear = certify(trained_like().bfloat16(), [(x.bfloat16(), y)], (6,))
    cheap = certify(trained_like().double(), [(x.bfloat16().double(), y)], (6,))
    assert "Rounding costs" in dear.table([0])
    assert "Rounding costs" not in cheap.table([0])
    assert cheap.radius.median() > dear.radius.median()


def test_radii_without_end_have_a_table() -> None:
    forever = Certificate(torch.full((2,), INF), *(torch.zeros(2, dtype=torch.int64),) * 2, 2, True)
    assert "100.00 %" in str(forever)


def test_nothing_half_written(tmp_path: Path) -> None:
    bad = Certificate(*(torch.ones(1, dtype=torch.int64),) * 3, 2.0, True, {"no JSON": {1, 2}})
    with pytest.raises(TypeError):
        bad.save(tmp_path / "certificate.npz")
    nan = Certificate(bad.radius, bad.predictions, bad.labels, 2.0, True, {"no JSON": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        nan.save(tmp_path / "certificate.npz")
    np.savez(tmp_path / "other.npz", radius=np.zeros(2))
    with pytest.raises(ValueError, match="must name a certificate"):
        Certificate.load(tmp_path / "other.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["other.npz"]


def test_the_curve_is_the_certified_accuracy() -> None:
    mpl.use("agg")
    axes = certificate().plot(label="ours")
    (line,) = axes.get_lines()
    x, y = line.get_xdata(), line.get_ydata()
    assert line.get_drawstyle() == "steps-pre"  # y[i] holds on the way to x[i]
    for epsilon in (0.1, 0.49, 0.6, 1.9):
        index = np.searchsorted(x, epsilon)
        assert y[index] == certificate().certified_accuracy(epsilon).value
    assert axes.get_xlabel() == "radius in the 2-norm"
    again = certificate().plot(axes)
    assert again is axes


def test_nothing_is_imported_for_a_plot_before_it_is_drawn() -> None:
    assert "matplotlib" not in vars(robustness)


# ---------------------------------------------------------------------------------- smoothing


@given(st.integers(1, 400), st.data(), st.floats(1e-4, 0.3))
def test_the_smoothed_radius_against_scipy(trials: int, data: st.DataObject, alpha: float) -> None:
    successes = data.draw(st.integers(0, trials))
    test = stats.binomtest(successes, trials, alternative="greater")
    lower = test.proportion_ci(1 - alpha, method="exact").low
    expected = max(0.0, 0.7 * stats.norm.ppf(lower))
    assert smoothed_radius(successes, trials, 0.7, alpha) == pytest.approx(expected, abs=1e-9)


def test_smoothing_a_linear_classifier_gives_its_distance() -> None:
    """There P(class) = Φ(distance / σ), so that the radius tends to the distance from below."""
    net = nn.Linear(4, 2).eval()
    x = torch.randn(12, 4)
    y = net(x).argmax(1)
    distance = certified_radius(net(x), y, head=net.weight)
    ours = certify_by_smoothing(net, [(x, y)], 0.5, samples=4000, selection=200, alpha=1e-3)
    assert (ours.radius <= distance).all()
    clear = (distance > 0.2) & (distance < 1.0)
    assert clear.any()
    assert (ours.radius[clear] > distance[clear] - 0.15).all()
    assert (ours.predictions[clear] == y[clear]).all()
    assert (ours.p, ours.sound) == (2.0, False)
    small = certify_by_smoothing(net, [(x, y)], 100.0, samples=50)
    assert (small.predictions == -1).any()
    assert (small.radius[small.predictions == -1] == 0).all()


def test_smoothing_is_reproducible_and_independent_of_the_batch() -> None:
    net, (x, y) = trained_like(), points(4)
    options: dict[str, Any] = {"samples": 90, "batch_size": 30}
    ours = certify_by_smoothing(net, [(x, y)], 0.3, **options)
    assert torch.equal(ours.radius, certify_by_smoothing(net, [(x, y)], 0.3, **options).radius)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.001, 1e-9])
def test_the_least_number_of_samples_certifies_and_fewer_are_refused(alpha: float) -> None:
    """All n copies of one class leave α^(1/n) as the bound of its probability."""
    net = nn.Linear(4, 2).eval().requires_grad_(False)
    net.weight.zero_()
    net.bias.copy_(torch.tensor([9.0, 0.0]))
    loader = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))]
    least = next(n for n in range(1, 99) if alpha ** (1 / n) > 0.5)
    ours = certify_by_smoothing(net, loader, 0.5, samples=least, alpha=alpha)
    assert (ours.predictions == 0).all()
    assert (ours.radius > 0).all()
    if least > 1:
        with pytest.raises(ValueError, match=f"at least {least} for .* got {least - 1}"):
            certify_by_smoothing(net, loader, 0.5, samples=least - 1, alpha=alpha)


def test_outputs_without_classes_are_refused_by_all_certificates_alike() -> None:
    net = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)).eval()
    loader = [(X, 0 * Y)]
    for call in (
        lambda: certify(net, loader, (6,)),
        lambda: certify(net, loader, (6,), sound=False),
        lambda: certify_by_smoothing(net, loader, 0.25, samples=20),
        lambda: pgd(net, X, 0 * Y, 0.1),
    ):
        with pytest.raises(ValueError, match=r"must return \(batch, classes\)"):
            call()


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("method", ["product", "local"])
def test_one_output_decides_by_its_sign(p: float, method: Any) -> None:
    """The distance to z = 0 is |z| / ‖w‖, of the dual norm; the class is 1 where z > 0."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 1).double().eval(), torch.randn(40, 6).double()
    with torch.no_grad():
        z = net(x)[:, 0]
    dual = {1.0: INF, 2.0: 2.0, INF: 1.0}[p]
    distance = z.abs() / torch.linalg.vector_norm(net.weight.detach(), dual)
    sign = (z > 0).long()
    assert set(sign.tolist()) == {0, 1}
    for sound in (True, False):
        ours = certify(net, [(x, sign)], (6,), p, sound=sound, method=method)
        assert torch.equal(ours.predictions, sign)
        assert (ours.radius <= distance * (1 + 1e-12)).all()
        torch.testing.assert_close(ours.radius, distance, rtol=1e-6, atol=1e-12)
    for factor, kept in ((0.999, True), (1.001, False)):
        for attack in (fgsm, pgd):
            moved = attack(net, x, sign, factor * distance, p)
            assert (((net(moved)[:, 0] > 0).long() == sign) == kept).all()


def test_one_output_behind_other_layers_is_bounded_by_itself() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.LeakyReLU(0.5)).eval()
    x = torch.randn(30, 6)
    with torch.no_grad():
        z = net(x)[:, 0].double()
    bound = lipschitz_bound(net, (6,)).value  # not times √2, as for two logits that both move
    for sound in (True, False):
        ours = certify(net, [(x, (z > 0).long())], (6,), sound=sound)
        torch.testing.assert_close(ours.radius, z.abs() / bound, rtol=1e-3, atol=1e-5)
    zero = nn.Linear(6, 1).eval().requires_grad_(False)
    zero.weight.zero_()
    zero.bias.zero_()
    loader = [(X, 0 * Y)]
    for sound in (True, False):
        undecided = certify(zero, loader, (6,), sound=sound)  # z = 0 is of the class 0
        assert (undecided.predictions == 0).all()
        assert (undecided.radius == 0).all()
    with pytest.raises(ValueError, match="labels must be classes from 0 to 1"):
        certify(zero, [(X, Y * 0 + 2)], (6,))


def test_one_output_is_smoothed_and_attacked_as_two_logits() -> None:
    linear, x = nn.Linear(4, 1).eval(), torch.randn(20, 4)
    sign = (linear(x)[:, 0] > 0).long()
    two = nn.Sequential(linear, nn.ZeroPad1d((1, 0))).eval()
    ours, theirs = (
        certify_by_smoothing(net, [(x, sign)], 0.25, samples=100) for net in (linear, two)
    )
    assert torch.equal(ours.predictions, theirs.predictions)
    assert torch.equal(ours.radius, theirs.radius)
    assert {0, 1} <= set(ours.predictions.tolist())
    assert torch.equal(pgd(linear, x, sign, 0.1, steps=5), pgd(two, x, sign, 0.1, steps=5))
    assert attacked_accuracy(linear, [(x, sign)], 0.0, steps=1).value == 1


def test_two_logits_of_one_output_are_smoothed_as_its_sign() -> None:
    linear, x = nn.Linear(4, 1), torch.randn(20, 4)

    class Signed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = linear(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    sign = (linear(x)[:, 0] > 0).long()
    ours = certify_by_smoothing(Signed().eval(), [(x, sign)], 0.25, samples=100)
    distance = linear(x)[:, 0].abs() / linear.weight.norm()
    known = distance > 0.25
    assert (ours.predictions[known] == sign[known]).all()
    assert (ours.radius <= distance + 1e-6).all()
    assert set(sign.tolist()) == {0, 1}


# ----------------------------------------------------------------------- what is refused


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    net = trained_like()
    net.register_forward_hook(lambda *_: None)
    return net


def nan_weights() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 4)).eval()
    net[0].weight.data[0, 0] = math.nan
    return net


NET, (X, Y) = trained_like(), points(4)
LOGITS = torch.zeros(2, 3)
LABELS = torch.tensor([0, 2])
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "training mode": (
        lambda: certify(trained_like().train(), [(X, Y)], (6,)),
        ValueError,
        "model must be in evaluation mode",
    ),
    "no module": (lambda: certify(abs, [(X, Y)], (6,)), TypeError, "model must be a torch.nn"),  # type: ignore[arg-type]
    "no rule": (
        lambda: certify(nn.Sequential(NET, nn.Hardshrink(0.0)).eval(), [(X, Y)], (6,)),
        TypeError,
        r"'1' \(Hardshrink\): .*Hardshrink has no bound of its rounding errors: register",
    ),
    "no Lipschitz rule": (
        lambda: certify(nn.Sequential(NET, Unknown()).eval(), [(X, Y)], (6,)),
        TypeError,
        "no Lipschitz rule",
    ),
    "redefined": (
        lambda: forward_error(nn.Sequential(Doubled(6, 4)), X),
        TypeError,
        r"'0' \(Doubled\): forward is redefined",
    ),
    "hook": (lambda: certify(hooked(), [(X, Y)], (6,)), ValueError, "hooks"),
    "NaN weight": (lambda: certify(nan_weights(), [(X, Y)], (6,)), ValueError, "must be finite"),
    "p": (lambda: certify(NET, [(X, Y)], (6,), 3), ValueError, "p must be 1, 2 or"),
    "shape": (lambda: certify(NET, [(X, Y)], (7,)), ValueError, "does not run on inputs"),
    "inputs": (lambda: certify(NET, [(X[:, :5], Y)], (6,)), ValueError, "inputs must have shape"),
    "integers": (lambda: certify(NET, [(X.long(), Y)], (6,)), TypeError, "inputs must be a float"),
    "NaN input": (lambda: certify(NET, [(X / 0 * 0, Y)], (6,)), ValueError, "inputs must be fini"),
    "labels": (lambda: certify(NET, [(X, Y + 4)], (6,)), ValueError, "labels must be classes"),
    "label dtype": (
        lambda: certify(NET, [(X, Y.float())], (6,)),
        TypeError,
        "labels must be integers",
    ),
    "label count": (lambda: certify(NET, [(X, Y[:2])], (6,)), ValueError, "must have shapes"),
    "no tensors": (lambda: certify(NET, [([1], Y)], (6,)), TypeError, "inputs must be a torch"),  # type: ignore[list-item]
    "no batch": (lambda: certify(NET, [], (6,)), ValueError, "one batch at least"),
    "inexact dtype": (
        lambda: certify(NET, [(X.double() / 3, Y)], (6,)),
        ValueError,
        "must be numbers of the model's dtype",
    ),
    "preprocess": (
        lambda: certify(NET, [(X, Y)], (6,), preprocess=abs),  # type: ignore[arg-type]
        TypeError,
        "preprocess must be a torch.nn.Module",
    ),
    "preprocess without rule": (
        lambda: certify(NET, [(X, Y)], (6,), preprocess=nn.LPPool1d(2, 1).eval()),
        TypeError,
        "LPPool1d has no Lipschitz rule|lp_pool1d",
    ),
    "rows of classes": (
        lambda: certify(nn.Sequential(nn.Linear(3, 4)).eval(), [(X.view(4, 2, 3), Y)], (2, 3)),
        ValueError,
        r"model must return \(batch, classes\), got \(4, 2, 3\)",
    ),
    "device": (
        lambda: forward_error(nn.Identity(), torch.empty(2, 3, device="meta")),
        ValueError,
        "device must be the CPU or CUDA for a sound certificate, got meta",
    ),
    "softplus": (
        lambda: forward_error(SLLLinear(6, activation="softplus"), X),
        ValueError,
        "rounding of softplus is not known",
    ),
    "half SLL": (
        lambda: forward_error(SLLLinear(6).half(), X.half()),
        ValueError,
        "half precision is not supported",
    ),
    "half SOC": (
        lambda: forward_error(SkewOrthogonalConv2d(1, 1, 3).half(), torch.ones(1, 1, 4, 4).half()),
        ValueError,
        "half precision is not supported",
    ),
    "Cayley": (
        lambda: forward_error(CayleyConv2d(1, 1, 3, 4), torch.ones(1, 1, 4, 4)),
        TypeError,
        "CayleyConv2d has no bound of its rounding errors",
    ),
    "bicubic": (
        lambda: forward_error(nn.Upsample(scale_factor=2, mode="bicubic"), torch.ones(1, 1, 2, 2)),
        ValueError,
        "mode must be 'nearest' or linear",
    ),
    "product": (
        lambda: forward_error(nn.GLU(), torch.ones(1, 4)),
        ValueError,
        "rounding errors of GLU are not bounded on all of space: give a domain",
    ),
    "radius NaN": (lambda: certified_radius(LOGITS / 0, LABELS), ValueError, "must be finite"),
    "radius labels": (lambda: certified_radius(LOGITS, LABELS + 1), ValueError, "0 to 2, got 1 to"),
    "radius dtype": (lambda: certified_radius(LOGITS.long(), LABELS), TypeError, "floating-point"),
    "radius tensors": (lambda: certified_radius(LOGITS, [0, 2]), TypeError, "labels must be a"),  # type: ignore[arg-type]
    "Lipschitz 0": (lambda: certified_radius(LOGITS, LABELS, 0.0), ValueError, "lipschitz must"),
    "Lipschitz < 0": (lambda: certified_radius(LOGITS, LABELS, -1), ValueError, "lipschitz must"),
    "Lipschitz NaN": (lambda: certified_radius(LOGITS, LABELS, math.nan), ValueError, "lipschitz"),
    "radius p": (lambda: certified_radius(LOGITS, LABELS, p=0.5), ValueError, "p must be in"),
    "head": (
        lambda: certified_radius(LOGITS, LABELS, head=torch.ones(4, 2)),
        ValueError,
        r"head must have shape \(3, features\)",
    ),
    "head of a sign": (
        lambda: certified_radius(LOGITS[:, 0], LABELS * 0 + 1, head=torch.ones(1, 2)),
        ValueError,
        "head must be None",
    ),
    "signs": (lambda: certified_radius(LOGITS[:, 0], LABELS), ValueError, "labels must be -1 or"),
    "matrix p": (lambda: rigorous_matrix_norm(torch.eye(2), 3), ValueError, "p must be 1, 2 or"),
    "epsilon": (lambda: certificate().certified_accuracy(-1.0), ValueError, "epsilon must be"),
    "radius < 0": (
        lambda: Certificate(-torch.ones(1), Y[:1], Y[:1], 2, True),
        ValueError,
        "radius must hold numbers >= 0",
    ),
    "lengths": (
        lambda: Certificate(torch.ones(2), Y[:1], Y[:1], 2, True),
        ValueError,
        "must have one shape",
    ),
    "Wilson": (lambda: wilson_interval(3, 2), ValueError, "successes must be between"),
    "confidence": (lambda: wilson_interval(1, 2, 1.0), ValueError, "confidence must be"),
    "std 0": (lambda: Standardize([0.0], [0.0]), ValueError, "std positive"),
    "mean and std": (lambda: Standardize([0.0, 1.0], [1.0]), ValueError, "as many numbers"),
    "channels": (lambda: Standardize([0.0], [1.0])(X), ValueError, "must have 1 channels"),
    "attack radius": (lambda: pgd(NET, X, Y, -1.0), ValueError, "radius must be one number"),
    "attack radii": (lambda: pgd(NET, X, Y, torch.ones(3)), ValueError, "radius must be one"),
    "attack inf": (lambda: fgsm(NET, X, Y, INF), ValueError, "radius must be finite"),
    "attack labels": (lambda: fgsm(NET, X, Y + 4, 1.0), ValueError, "labels must be classes"),
    "attack steps": (lambda: pgd(NET, X, Y, 1.0, steps=0), ValueError, "steps and restarts"),
    "attack model": (lambda: pgd(abs, X, Y, 1.0), TypeError, "model must be"),  # type: ignore[arg-type]
    "attack inputs": (lambda: pgd(NET, X.long(), Y, 1.0), TypeError, "inputs must be a floating"),
    "attack output": (
        lambda: pgd(nn.Flatten(0), X, Y, 1.0),
        ValueError,
        r"model must return \(batch, classes\)",
    ),
    "smoothing mode": (
        lambda: certify_by_smoothing(trained_like().train(), [(X, Y)], 1.0),
        ValueError,
        "evaluation mode",
    ),
    "smoothing sigma": (lambda: smoothed_radius(1, 2, 0.0), ValueError, "sigma must be positive"),
    "smoothing alpha": (lambda: smoothed_radius(1, 2, 1.0, 1.0), ValueError, "alpha in"),
    "smoothing count": (lambda: smoothed_radius(3, 2, 1.0), ValueError, "successes must be"),
    "smoothing model": (
        lambda: certify_by_smoothing(abs, [(X, Y)], 1.0),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module",
    ),
    "smoothing labels": (
        lambda: certify_by_smoothing(NET, [(X, Y + 4)], 1.0, samples=20),
        ValueError,
        "labels must be classes from 0 to 3, got",
    ),
    "smoothing deviation": (
        lambda: certify_by_smoothing(NET, [(X, Y)], -1.0),
        ValueError,
        "sigma must be positive",
    ),
    "smoothing samples": (
        lambda: certify_by_smoothing(NET, [(X, Y)], 1.0, samples=0),
        ValueError,
        "at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_public_names() -> None:
    for module in (attacks, robustness, rounding):
        assert sorted(module.__all__) == module.__all__


# ------------------------------------------------- networks as they are, domains, local bounds


class Skip(nn.Module):
    """Functions, a skip and a head in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.second(torch.relu(self.first(x))))


class Named(Skip):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * torch.sigmoid(self.gate(x)))


def predicted(net: nn.Module, n: int = 30, output: str | None = None) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 6)
    with torch.no_grad():
        y = net(x) if output is None else net(x)[output]
    return x, y.argmax(1)


class Concatenated(nn.Module):
    """A small U-Net: what was seen before pooling is concatenated behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv1d(1, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.down(x[:, None]))
        narrow = torch.relu(self.middle(functional.avg_pool1d(wide, 2)))
        up = functional.interpolate(narrow, scale_factor=2)
        return self.head(torch.cat((wide, up), 1).flatten(1))


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.head = nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.head(torch.cat((a, b + torch.relu(self.shift(a))), 1))


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.convolution(x.unsqueeze(1))).mean(2))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Skip()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "skip": (Skip, {}),
    "concatenation": (Concatenated, {}),
    "coupling": (Coupled, {}),
    "mean": (Averaged, {}),
    "wrapper": (Wrapped, {}),
    "dictionary": (Named, {"output": "logits"}),
    "parallel": (lambda: nn.DataParallel(Skip()), {}),
    "compiled": (lambda: torch.compile(Skip(), backend="eager"), {}),
}


class Bare(nn.Module):
    """The logits of a network, however it is wrapped."""

    def __init__(self, net: Any, output: str | None = None) -> None:
        super().__init__()
        self.net = getattr(net, "_orig_mod", getattr(net, "module", net))
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.net(x)
        return found if self.output is None else found[self.output]

    @property
    def head(self) -> Any:
        return next(m for name, m in self.net.named_modules() if name.endswith("head"))


def body_bound(net: nn.Module, p: float) -> float:
    """Lipschitz bound of what is before the head, by other words: the head is taken out."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "head") and "head" in module._modules:
            module.head = nn.Identity()
    return lipschitz_bound(net, (6,), p).value


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_networks_are_certified_as_they_are(name: str, p: float) -> None:
    torch.manual_seed(0)
    make, options = NETS[name]
    net = make().eval()
    bare = Bare(net, options.get("output")).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x, y = predicted(bare)
    real = certify(net, [(x, y)], (6,), p, sound=False, **options)
    sound = certify(net, [(x, y)], (6,), p, **options)
    assert (sound.radius <= real.radius).all()
    assert (sound.radius > 0).all()
    assert (sound.radius > 0.98 * real.radius).all()
    if not options:  # the rows of the head are found, and what is before it has its own bound
        with torch.no_grad():
            expected = certified_radius(
                bare(x), y, body_bound(bare.net, p), p, head=bare.head.weight
            )
        torch.testing.assert_close(real.radius, expected, rtol=1e-5, atol=0)
    for certificate in (real, sound):
        moved = pgd(bare, x, y, certificate.radius * (1 - 1e-6), p, steps=10)
        with torch.no_grad():
            assert torch.equal(bare(moved).argmax(1), y)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.training


@pytest.mark.parametrize("name", ["skip", "wrapper", "dictionary", "parallel", "compiled"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_skip_in_every_wrapping_has_the_radii_of_its_layers(name: str, p: float) -> None:
    torch.manual_seed(0)
    make, options = NETS[name]
    net = make().eval()
    plain = Skip().eval()
    plain.load_state_dict(getattr(Bare(net).net, "net", Bare(net).net).state_dict())
    x, y = predicted(plain)
    real = certify(net, [(x, y)], (6,), p, sound=False, **options)
    sound = certify(net, [(x, y)], (6,), p, **options)
    assert (sound.radius <= real.radius).all()
    assert (sound.radius > 0.99 * real.radius).all()
    # The rows of the head are found in a forward, too: the bound of what is before it, times each.
    body = nn.Sequential(Residual(nn.Sequential(plain.first, nn.ReLU(), plain.second)))
    constant = lipschitz_bound(body, (6,), p).value
    with torch.no_grad():
        expected = certified_radius(plain(x), y, constant, p, head=plain.head.weight)
    assert torch.allclose(real.radius, expected, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_local_radii_lie_between_the_products_and_the_nearest_lies(p: float) -> None:
    torch.manual_seed(1)
    net = Skip().eval()
    x, y = predicted(net)
    product = certify(net, [(x, y)], (6,), p)
    local = certify(net, [(x, y)], (6,), p, method="local")
    assert (local.radius >= product.radius).all()
    assert (local.radius > 1.02 * product.radius).any()
    for scale in (0.3, 0.7, 0.999):  # no neighbour within the radius has another class
        for _ in range(50):
            step = torch.randn(x.shape, dtype=torch.float64)
            step = step / torch.linalg.vector_norm(step, p, dim=1, keepdim=True)
            with torch.no_grad():
                moved = net((x + scale * local.radius[:, None] * step).float())
            assert torch.equal(moved.argmax(1), y)
    again = certify(net, list(zip(x.split(7), y.split(7), strict=True)), (6,), p, method="local")
    assert torch.allclose(again.radius, local.radius, rtol=1e-5)  # logits of float32


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_local_radii_of_a_linear_classifier_are_exact(p: float) -> None:
    torch.manual_seed(2)
    net = nn.Linear(6, 3).double().eval()
    x = torch.randn(20, 6).double()
    y = net(x).argmax(1)
    local = certify(net, [(x, y)], (6,), p, method="local", sound=False)
    exact = certified_radius(net(x).detach(), y, 1.0, p, head=net.weight)
    assert torch.allclose(local.radius, exact, rtol=1e-6)


def test_a_domain_certifies_what_is_not_lipschitz_everywhere() -> None:
    torch.manual_seed(3)
    net = Gated().eval()
    x, y = predicted(net)
    with pytest.raises(ValueError, match="not Lipschitz on all of space: give a domain"):
        certify(net, [(x, y)], (6,), sound=False)
    box = certify(net, [(x, y)], (6,), sound=False, domain=Box(0, 1))
    assert (box.radius > 0).all()
    assert box.facts["domain"] == "Box(low=0, high=1)"
    for scale in (0.5, 0.99):  # neighbours outside the box count
        for _ in range(100):
            step = nn.functional.normalize(torch.randn(x.shape, dtype=torch.float64))
            with torch.no_grad():
                moved = net((x + scale * box.radius[:, None] * step).float())
            assert torch.equal(moved.argmax(1), y)
    with pytest.raises(ValueError, match=r"inputs must lie in the domain Box\(low=0, high=1\)"):
        certify(net, [(x + 1, y)], (6,), sound=False, domain=Box(0, 1))
    local = certify(net, [(x, y)], (6,), sound=False, domain=Box(0, 1), method="local")
    assert (local.radius > 0).all()


def test_a_bound_can_be_vouched_for() -> None:
    torch.manual_seed(4)
    net = Gated().eval()
    x, y = predicted(net)
    vouched = certify(net, [(x, y)], (6,), sound=False, lipschitz=2.0)
    with torch.no_grad():
        assert torch.allclose(vouched.radius, certified_radius(net(x), y, 2.0))
    assert vouched.facts["method"] == "vouched for by the caller"
    first = str(vouched).splitlines()[0]
    assert (
        first == "2-norm, in real arithmetic, with a constant vouched for by the caller, 30 inputs"
    )
    with pytest.raises(ValueError, match="needs sound=False"):
        certify(net, [(x, y)], (6,), lipschitz=2.0)
    with pytest.raises(ValueError, match="lipschitz must be a finite number"):
        certify(net, [(x, y)], (6,), sound=False, lipschitz=-1.0)
    with pytest.raises(ValueError, match="method must be 'product' or 'local'"):
        certify(net, [(x, y)], (6,), method="global")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_certify_in_every_gradient_mode(mode: Any) -> None:
    torch.manual_seed(5)
    net = Skip().eval()
    x, y = predicted(net)
    for method in ("product", "local"):
        expected = certify(net, [(x, y)], (6,), method=method)  # type: ignore[arg-type]
        with mode():
            inside = certify(net, [(x.clone(), y)], (6,), method=method)  # type: ignore[arg-type]
        assert torch.equal(inside.radius, expected.radius)


# ------------------------------------------------------------------ domains and balls, attacked


class Squeezed(nn.Module):
    """Squeeze and excitation: channels times a gate that depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.gate = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.convolution(x[:, None]))
        return self.head((h * torch.sigmoid(self.gate(h.mean(2)))[:, :, None]).mean(2))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        h = functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(h.flatten(1))


@pytest.mark.parametrize("method", ["product", "local"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("make", [Gated, Squeezed, Attending])
def test_radii_on_a_domain_hold_for_neighbours_outside_it(make: Any, p: float, method: Any) -> None:
    torch.manual_seed(6)
    net = make().eval()
    x, y = predicted(net, 6)
    x[0], x[1] = 0, 1  # corners of the box, most of whose neighbours lie outside
    with torch.no_grad():
        y = net(x).argmax(1)
    with pytest.raises(ValueError, match="give a domain"):
        certify(net, [(x, y)], (6,), p, sound=False)
    real = certify(net, [(x, y)], (6,), p, sound=False, domain=Box(0, 1), method=method)
    assert not real.sound
    ours = certify(net, [(x, y)], (6,), p, domain=Box(0, 1), method=method)
    assert ours.sound
    assert (ours.radius > 0.9 * real.radius).all()
    assert (ours.radius <= real.radius * 1.01).all()  # the tries differ near an input
    assert (real.radius > 0).all()
    assert str(ours).splitlines()[0].endswith("6 inputs in Box(low=0, high=1)")
    moved = pgd(net, x, y, torch.maximum(ours.radius, real.radius * (1 - 1e-6)), p, steps=20)
    with torch.no_grad():
        assert torch.equal(net(moved).argmax(1), y)
    assert (moved.min() < 0) | (moved.max() > 1)


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def transformer() -> nn.Module:
    options: Any = {"batch_first": True, "norm_first": True, "layer_norm_eps": 0.1}
    layer = nn.TransformerEncoderLayer(8, 2, 8, **options)
    tokens = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), layer, nn.Flatten())
    return nn.Sequential(tokens, nn.Linear(24, 3))


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.view(-1, 3, 2))[0][:, -1])

    return Last()


@pytest.mark.parametrize(
    ("make", "p"),
    [*((make, p) for make in (normalised, recurrent) for p in (1, 2, math.inf)), (transformer, 2)],
)
def test_errors_on_balls_keep_most_of_a_radius(make: Any, p: float) -> None:
    """Networks whose errors on all of space are large, or unknown, in float32.

    In float64 for the transformer, whose Lipschitz bound leaves radii of 1e-4.
    """
    torch.manual_seed(3)
    net = make().eval()
    x, y = predicted(net, 5)
    if make is transformer:
        net, x = net.double(), x.double()
        with torch.no_grad():
            y = net(x).argmax(1)
    options: Any = {"domain": Box(0, 1), "method": "local"}
    real = certify(net, [(x, y)], (6,), p, sound=False, **options)
    sound = certify(net, [(x, y)], (6,), p, **options)
    assert (sound.radius <= real.radius * 1.01).all()
    large = real.radius > real.radius.median() / 2
    assert (sound.radius[large] > 0.8 * real.radius[large]).all()
    moved = pgd(net, x, y, sound.radius, p, steps=10)
    with torch.no_grad():
        assert torch.equal(net(moved).argmax(1), y)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x * x, 1.5 + 0 * x), 1)


@pytest.mark.parametrize("method", ["product", "local"])
def test_the_domain_is_enlarged_by_the_radius(method: Any) -> None:
    """x² < 1.5 at 1 until √1.5: with the slope 2 of [0, 1] the radius would be 0.25 > 0.2247."""
    net, x = Square().double().eval(), torch.tensor([[1.0], [0.5]]).double()
    ours = certify(
        net, [(x, torch.ones(2).long())], (1,), sound=False, domain=Box(0, 1), method=method
    )
    distance = math.sqrt(1.5) - x[:, 0]
    assert (ours.radius <= distance).all()
    margin = 1.5 - x[:, 0] ** 2
    best = ((1 + 2 * margin).sqrt() - 1) / 2  # solves r = margin / (2 (1 + r))
    assert (ours.radius > best / 2**0.25).all()  # the widths that are tried


def test_inputs_of_a_ball_are_in_the_ball_and_not_only_in_its_box() -> None:
    net, corner = nn.Linear(6, 3).eval(), torch.full((1, 6), 0.9)
    loader = [(corner, torch.tensor([0]))]
    for p, radius in ((1, 5.4), (2, 0.9 * math.sqrt(6)), (math.inf, 0.9)):
        inside, outside = (Ball(torch.zeros(6), radius * share, p) for share in (1.001, 0.999))
        certify(net, loader, (6,), domain=inside)
        with pytest.raises(ValueError, match=r"inputs must lie in the domain Ball\("):
            certify(net, loader, (6,), domain=outside)


def test_a_domain_takes_nothing_from_what_holds_everywhere() -> None:
    torch.manual_seed(7)
    net = nn.Linear(6, 3).eval()
    net.bias.data[0] = 50.0  # so that the radius is far beyond the box
    x, y = predicted(net)
    plain, boxed = (certify(net, [(x, y)], (6,), domain=domain) for domain in (None, Box(0, 1)))
    assert torch.equal(plain.radius, boxed.radius)
    assert plain.facts["lost_to_rounding"] == boxed.facts["lost_to_rounding"] > 0


@pytest.mark.parametrize("p", EXPONENTS)
def test_local_radii_of_one_hidden_layer_are_exact_where_units_are_decided(p: float) -> None:
    """No unit changes its sign up to the border of the class, and the net is affine there."""
    torch.manual_seed(8)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    net[0].bias.data = torch.tensor([9.0, 9.0, 9.0, -9.0, -9.0, 9.0]).double()
    x = 0.1 * torch.randn(10, 4).double()
    on = (net[0].bias.data > 0).double()
    matrix = net[2].weight.data @ (on[:, None] * net[0].weight.data)
    net[2].bias.data -= net(x).detach().mean(0)
    logits = net(x).detach()
    exact = certified_radius(logits, logits.argmax(1), p=p, head=matrix)
    assert (exact < 5).all()
    local = certify(net, [(x, logits.argmax(1))], (4,), p, sound=False, method="local")
    torch.testing.assert_close(local.radius, exact, rtol=1e-6, atol=1e-9)
    product = certify(net, [(x, logits.argmax(1))], (4,), p, sound=False)
    assert (product.radius < 0.99 * local.radius).all()


def small_networks() -> dict[str, nn.Module]:
    torch.manual_seed(9)
    return {
        "convolutions": nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(),
            nn.Conv1d(4, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4),
        ),
        "residual": nn.Sequential(
            Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 4)
        ),
        "maxmin": nn.Sequential(
            nn.Linear(6, 8), MaxMin(), nn.Linear(8, 8), MaxMin(), nn.Linear(8, 4)
        ),
        "potential step": nn.Sequential(SLLLinear(6, 8), nn.Linear(6, 4)),
        "one output": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("name", small_networks())
def test_local_radii_withstand_the_attack_and_exceed_the_products(name: str, p: float) -> None:
    net = small_networks()[name].eval()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    for sound in (True, False):
        if not sound:  # in real arithmetic, as far as float64 is that
            net, x = net.double(), x.double()
        loader = [(x, torch.zeros(16, dtype=torch.int64))]
        product, local = (
            certify(net, loader, (6,), p, sound=sound, method=method)  # type: ignore[arg-type]
            for method in ("product", "local")
        )
        assert (local.radius >= product.radius).all()
        y = local.predictions
        moved = pgd(net, x, y, local.radius * (1 - 1e-6), p, steps=15, restarts=2)
        assert torch.equal(certify(net, [(moved, y)], (6,), p, sound=False).predictions, y)
        parts = list(zip(x.split([1, 5, 10]), y.split([1, 5, 10]), strict=True))
        each = certify(net, parts, (6,), p, sound=sound, method="local")
        torch.testing.assert_close(each.radius, local.radius, rtol=2e-5, atol=1e-7)


def test_local_radii_where_nothing_moves_the_output() -> None:
    """Dead units: the slope at the input is 0, and what counts is how far it stays so."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval()
    for value, parameter in zip(([[1.0]], [-3.0], [[2.0], [0.0]], [0.0, 1.0]), net.parameters(),
                                strict=True):  # fmt: skip
        parameter.data = torch.tensor(value).double()
    x = torch.tensor([[0.0], [-1e6]]).double()
    loader = [(x, torch.tensor([1, 1]))]
    local = certify(net, loader, (1,), sound=False, method="local").radius
    distance = 3.5 - x[:, 0]  # where 2 (x - 3) = 1
    assert (local <= distance).all()
    assert (local > 0.84 * distance).all()
    alone = certify(net, [(x[:1], torch.tensor([1]))], (1,), sound=False, method="local").radius
    assert torch.equal(alone, local[:1])


class Divided(nn.Module):
    """Lipschitz near 1, and not on an interval that holds 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.exp(), 3 + 0 * x), 1)


def test_balls_on_which_nothing_is_known_are_passed_over() -> None:
    net, x = Divided().double().eval(), torch.tensor([[-800.0], [0.0]]).double()
    ours = certify(
        net, [(x, torch.tensor([1, 1]))], (1,), sound=False, domain=Box(-800, 1), method="local"
    )
    distance = math.log(3) - x[:, 0]
    assert (ours.radius <= distance).all()
    assert (ours.radius > 0.4 * distance).all()


def test_bounds_near_an_input_are_those_of_the_program_that_runs() -> None:
    """Autocast rounds the weights: the net in float64 is another function."""
    net, (x, y) = trained_like(), points(3)
    for options in ({"method": "local"}, {"domain": Box(-99, 99)}):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ValueError, match="autocast rounds the weights"):
                certify(net, [(x, y)], (6,), **options)  # type: ignore[arg-type]
            certify(net, [(x, y)], (6,), sound=False, **options)  # type: ignore[arg-type]


def test_bounds_near_an_input_have_the_scales_that_this_run_computes() -> None:
    """In float64 the scale of a potential step is another number, and its bound another bound."""
    torch.manual_seed(0)
    step = SLLLinear(6, 8)
    net = nn.Sequential(step, nn.Linear(6, 4)).eval()
    reader = Reader(net, (6,), 2.0, sound=True, method="local")
    assert reader.double is not None
    layers = [node.layer for node in reader.double.nodes[1:] if node.layer is not None]
    (found,) = {m for layer in layers for m in layer.modules() if hasattr(m, "scale")}
    scale: Any = found.scale
    with torch.no_grad():
        assert torch.equal(scale(), step.scale().double())
        assert not torch.equal(scale(), copy.deepcopy(step).double().scale())


# ----------------------------------------------------------------------- prepared networks


class Scaled(nn.Module):
    """A layer whose number, tensor and list stand in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.shifts, self.table = 0.5, [0.1, 0.2], torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * self.table + self.shifts[0]


def prepared() -> tuple[nn.Sequential, Certifier, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layers = Scaled(), OrthogonalLinear(6, 6), nn.LeakyReLU(0.5), nn.Linear(6, 3)
    net = nn.Sequential(*layers).eval()
    return net, Certifier(net, (6,)), (torch.randn(4, 6), torch.zeros(4, dtype=torch.long))


def test_a_prepared_network_gives_the_certificates_of_certify() -> None:
    net, certifier, (x, y) = prepared()
    for batch in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])], [(x, y)]):
        found, whole = certifier(batch), certify(net, batch, (6,))
        assert torch.equal(found.radius, whole.radius)
        assert torch.equal(found.predictions, whole.predictions)
        assert found.facts == whole.facts


def test_the_network_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, certifier, batch = prepared()
    certifier([batch])
    refuse = pytest.fail
    monkeypatch.setattr("lipbook.robustness.lipschitz.trace", refuse)
    monkeypatch.setattr("lipbook.robustness.lipschitz.graph_error", refuse)
    monkeypatch.setattr("lipbook.robustness.lipschitz.lipschitz_bound", refuse)
    certifier([batch])


def set_element(net: Any) -> None:
    net[0].shifts[0] = 3.0


def set_attribute(net: Any) -> None:
    net[0].factor = 2.0


def replace_weight(net: Any) -> None:
    net[3].weight = nn.Parameter(2 * net[3].weight.detach())


def optimise(net: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "step": (optimise, "1.bias"),
    "in place, unseen by torch": (lambda net: net[3].bias.data.add_(1e-6), "3.bias"),
    "another tensor": (replace_weight, "3.weight"),
    "raw parameter": (
        lambda net: net[1].parametrizations.weight.original.data.neg_(),
        "1.parametrizations.weight.original",
    ),
    "attribute": (set_attribute, "0.factor"),
    "element of a list": (set_element, "0.shifts"),
    "tensor that is no buffer": (lambda net: net[0].table.mul_(2), "0.table"),
    "slope": (lambda net: setattr(net[2], "negative_slope", 3.0), "2.negative_slope"),
    "layer": (lambda net: net.__setitem__(2, nn.ReLU()), "2."),
    "one more": (lambda net: net.append(nn.Linear(3, 3)), "4."),
    "mode": (lambda net: net.train(), "training"),
    "forward": (lambda net: setattr(net[2], "forward", torch.tanh), "2.forward"),
    "hook": (lambda net: net[2].register_forward_hook(lambda *_: None), "2._forward_hooks"),
    "dtype": (lambda net: net.double(), "has changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_certificate_of_weights_of_the_past(name: str) -> None:
    net, certifier, batch = prepared()
    change, place = CHANGES[name]
    change(net)
    message = f"model must be as it was when it was read, but .*({place}).*make another Certifier"
    with pytest.raises(ValueError, match=message):
        certifier([batch])


def test_what_comes_before_may_not_change_either() -> None:
    net, before = nn.Linear(2, 2).eval(), Standardize([0.5, 0.5], [1.0, 1.0])
    certifier = Certifier(net, (2,), preprocess=before)
    batch = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    certifier([batch])
    before.std.mul_(0.1)
    with pytest.raises(ValueError, match=r"preprocess\.std has changed"):
        certifier([batch])


def test_a_prepared_network_keeps_to_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    _, certifier, batch = prepared()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast, oneDNN"):
        certifier([batch])
    certifier([batch])
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="must be 'highest', got 'medium'"):
            certifier([batch])
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    with pytest.raises(ValueError, match="autocast, oneDNN, NNPACK"):
        certifier([batch])
