"""Attacks: they stay in their ball, and find what there is."""

from __future__ import annotations

import math

import pytest
import torch
from test_robustness import points, trained_like
from test_rounding import EXPONENTS, at_most, rational
from torch import nn

from lipbook import attacks
from lipbook.attacks import decision_attack, fgsm, pgd
from lipbook.robustness import certified_radius, certify


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
