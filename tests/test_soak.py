"""Random networks keep the promises; broken ones are caught; the record is what a run gives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipbook.freezing import freeze
from lipbook.lab import records
from lipbook.lab.recipes import Rows, soak
from lipbook.layers import linear
from lipbook.orthogonal import factorisations
from lipbook.robustness import certify

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_a_few_cases_keep_every_promise(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    results, tensors = soak.run(cases=24, rows=rows)
    assert tensors == {}
    assert sum(results["families"].values()) == results["cases"] == 24
    assert set(results["checks"]) == set(results["worst"]) == set(soak.LIMITS)
    assert results["checks"]["slope / bound, p = 2"] == 24
    assert 0 < results["worst"]["slope / bound, p = 2"] <= 1 + 1e-9
    assert soak.run(cases=24, rows=Rows(tmp_path))[0] == results  # from the row on disk
    (row,) = tmp_path.iterdir()
    row.unlink()
    assert soak.run(cases=24, rows=Rows(tmp_path))[0] == results  # drawn again


@pytest.mark.parametrize("family", soak.FAMILIES)
def test_every_family_keeps_its_promises(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAMILIES", {family: soak.FAMILIES[family]})
    for number in range(2):
        name, measured = soak.case(number)
        assert name == family
        assert soak.broken(measured) == []
        assert measured["slope / bound, p = inf"] > 0


def of(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAMILIES", {family: soak.FAMILIES[family]})


def caught(words: str, cases: int = 30) -> None:
    with pytest.raises(ValueError, match="promises that are not kept") as error:
        soak.run(cases=cases)
    assert re.search(rf"^case \d+ \([^)]*\): {re.escape(words)}", str(error.value), re.MULTILINE)


def test_a_wrong_rule_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.operator_norm
    monkeypatch.setattr(linear, "operator_norm", lambda weight, p: 0.9 * right(weight, p))
    of("orthogonal dense layers", monkeypatch)
    caught("slope / bound, p = 1: ")
    _, measured = soak.case(0)
    assert measured["slope / bound, p = 2"] == pytest.approx(1 / 0.9)


def test_a_layer_that_is_not_orthogonal_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = factorisations.polish
    monkeypatch.setattr(factorisations, "polish", lambda matrix: right(matrix) * (1 + 2e-6))
    of("orthogonal dense layers", monkeypatch)
    caught("|singular value - 1|, float64: ")


def test_other_bits_of_a_frozen_copy_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def nudged(model: nn.Module) -> nn.Module:
        frozen = freeze(model)
        with torch.no_grad():
            for weight in frozen.parameters():
                weight.copy_(torch.nextafter(weight, torch.tensor(math.inf)))
        return frozen

    monkeypatch.setattr(soak, "freeze", nudged)
    of("perceptrons", monkeypatch)
    caught("entries of a frozen copy with other bits: ")


def test_a_radius_that_is_too_large_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(*arguments: Any, **options: Any) -> Any:
        found = certify(*arguments, **options)
        return dataclasses.replace(found, radius=4 * found.radius)

    monkeypatch.setattr(soak, "certify", generous)
    of("certified classifiers", monkeypatch)
    caught("predictions changed within a certified radius: ", cases=8)


def test_nan_keeps_no_promise() -> None:
    name = "slope / bound, p = 2"
    assert soak.broken({name: math.nan}) == [f"{name}: nan, at most {1 + 1e-9:.17g} is promised"]


@pytest.mark.parametrize(
    ("function", "shape"),
    [(torch.sin, (3,)), (lambda x: x[:, 0] * x[:, 1], (2, 2)), (nn.MaxPool1d(2), (2, 4))],
)
def test_slopes_are_those_of_torch(function: Callable[[Tensor], Tensor], shape: tuple) -> None:
    points = torch.randn(4, *shape, dtype=torch.float64)
    expected = [
        torch.autograd.functional.jacobian(lambda x: function(x[None])[0], x) for x in points
    ]
    found = soak.slopes(function, points)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs.reshape(-1, math.prod(shape)))


def test_points_lie_in_their_domain() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        domain = soak.domain(random, (2, 3))
        drawn = soak.Drawn(nn.Identity(), (2, 3), domain)
        for point in soak.points_of(drawn, random):
            if isinstance(domain, soak.Box):
                assert ((domain.low <= point) & (point <= domain.high)).all()
            else:
                gap = (point - domain.center).flatten()
                assert torch.linalg.vector_norm(gap, domain.p) <= domain.radius * (1 + 1e-12)


# ---------------------------------------------------------------------------------- the record


def test_the_record_holds_ten_thousand_cases_and_no_violation() -> None:
    results = records.read("soak").results
    assert results["cases"] == sum(results["families"].values()) >= 10_000
    assert list(results["families"]) == list(soak.FAMILIES)
    assert list(results["worst"]) == list(soak.LIMITS)
    for name, limit in soak.LIMITS.items():
        assert results["checks"][name] >= 900
        assert results["worst"][name] <= limit
    for p in (1, 2, "inf"):
        assert results["checks"][f"slope / bound, p = {p}"] == results["cases"]
        assert results["worst"][f"slope / bound, p = {p}"] > 1 - 1e-9  # a bound is attained
    attacks = results["attacks"]
    assert attacks["positive"] > 0.9 * attacks["inputs"]
    assert attacks["changed within twice the radius"] > 0.1 * attacks["inputs"]  # they bite


def test_a_hundred_cases_are_found_again() -> None:
    """The families by their numbers; what is measured, up to the rounding of another machine."""
    results = records.read("soak").results
    for number in range(0, results["cases"], 100):
        family, measured = soak.case(number)
        assert results["families"][family] > 0
        assert soak.broken(measured) == []


def test_readme_tells_what_the_record_holds() -> None:
    results = records.read("soak").results
    worst, attacks = results["worst"], results["attacks"]
    double, single = (worst[f"|singular value - 1|, {dtype}"] for dtype in ("float64", "float32"))
    for words in (
        f"{results['cases']:,} random layers",
        f"{sum(results['checks'].values()):,} checks, no promise broken",
        f"{double:.1e} in float64",
        f"{single:.1e} in float32",
        f"{attacks['attempts']:,} attempts",
        f"of {attacks['inputs']:,} certified inputs",
        f"{attacks['changed within twice the radius']:,} predictions",
    ):
        assert words in " ".join(README.split()), words
