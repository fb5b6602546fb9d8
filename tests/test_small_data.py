"""The record of few digits and shuffled labels is consistent, and a part of it found again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lipbook.composition import lipschitz_bound
from lipbook.lab import records
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Rows, small_data
from lipbook.lab.training import accuracy

RESULTS = records.read("small_data").results
CELLS = {(cell["per_class"], cell["method"]): cell for cell in RESULTS["cells"]}


def labels(method: str, shuffled: bool) -> list[dict[str, Any]]:
    found = [r for r in RESULTS["labels"] if (r["method"], r["shuffled"]) == (method, shuffled)]
    assert [r["seed"] for r in found] == [0, 1, 2]
    return found


# ------------------------------------------------------------------------------- the record


def test_the_record_holds_every_cell() -> None:
    assert list(CELLS) == [(k, method) for k in (30, 100) for method in small_data.METHODS]
    assert len(RESULTS["labels"]) == 12
    assert RESULTS["levels"] == list(small_data.LEVELS)
    for cell in CELLS.values():
        assert len(cell["test"]) >= 5
        assert all(0 < error < 1 for error in cell["test"])


@pytest.mark.parametrize("key", CELLS, ids=str)
def test_settings_are_chosen_on_held_out_digits(key: tuple[int, str]) -> None:
    cell = CELLS[key]
    settings = small_data.METHODS[key[1]].settings
    means = [
        np.mean([run["validation"] for run in cell["tried"] if run["setting"] == setting])
        for setting in settings
    ]
    assert len(cell["tried"]) == 3 * len(settings)
    assert cell["setting"] == settings[int(np.argmin(means))] == small_data.choose(cell["tried"])


@pytest.mark.parametrize("key", CELLS, ids=str)
def test_intervals_are_those_of_student(key: tuple[int, str]) -> None:
    cell = CELLS[key]
    low, high = stats.ttest_1samp(cell["test"], 0).confidence_interval(0.95)
    assert cell["mean"] - cell["half"] == pytest.approx(low, abs=1e-6)
    assert cell["mean"] + cell["half"] == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize("per_class", [30, 100])
def test_the_constraint_helps_with_few_digits(per_class: int) -> None:
    low = CELLS[per_class, "Lipschitz"]
    for method in small_data.METHODS:
        if method != "Lipschitz":
            cell = CELLS[per_class, method]
            assert low["mean"] + low["half"] < cell["mean"] - cell["half"]


def test_margins_of_shuffled_labels_are_smaller_in_their_unit() -> None:
    middle = RESULTS["levels"].index(0.5)
    for method in ("standard", "Lipschitz"):
        true, shuffled = (labels(method, wrong) for wrong in (False, True))
        highest = max(r["normalized"][middle] for r in shuffled)
        assert min(r["normalized"][middle] for r in true) > 1.5 * highest
        assert all(r["train_error"] < 0.02 for r in (*true, *shuffled))
        assert all(r["test_error"] > 0.8 for r in shuffled)
        for r in (*true, *shuffled):  # one number turns one list into the other
            ratios = np.array(r["margins"]) / np.array(r["normalized"])
            assert np.allclose(ratios, ratios[0], rtol=1e-4)
    for r in (*labels("Lipschitz", False), *labels("Lipschitz", True)):
        assert r["product"] == pytest.approx(1, abs=1e-4)
        # rows of norm 1, 128 and 128 and 10 of them
        closed = (2 * 128 ** (2 / 3) + 10 ** (2 / 3)) ** 1.5
        assert r["complexity"] == pytest.approx(closed, rel=1e-4)


# ------------------------------------------------------------------------------ found again


@pytest.mark.parametrize("method", ["standard", "Lipschitz"])
def test_a_recorded_network_is_found_again(method: str) -> None:
    cell, digits = CELLS[30, method], mnist()
    found = small_data.subset(digits, 30, seed=0)
    model = small_data.fit(method, cell["setting"], *found, epochs=RESULTS["epochs"], seed=0)
    error = 1 - accuracy(model, digits.test_images, digits.test_labels)
    assert error == pytest.approx(cell["test"][0], abs=0.01)  # float32, on another machine
    held_out = digits.train_images[-1000:], digits.train_labels[-1000:]
    (validation,) = [
        r["validation"] for r in cell["tried"] if (r["setting"], r["seed"]) == (cell["setting"], 0)
    ]
    assert 1 - accuracy(model, *held_out) == pytest.approx(validation, abs=0.012)
    if method == "Lipschitz":
        assert lipschitz_bound(model, (1, 28, 28)).value == pytest.approx(1, abs=1e-4)


# --------------------------------------------------------------------------------- its parts


def test_subsets_are_balanced_and_apart_from_held_out_digits() -> None:
    digits = mnist()
    images, drawn = small_data.subset(digits, 30, seed=3)
    assert drawn.bincount().tolist() == [30] * 10
    again, _ = small_data.subset(digits, 30, seed=3)
    other, _ = small_data.subset(digits, 30, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    held_out = {image.numpy().tobytes() for image in digits.train_images[-1000:]}
    pool = {image.numpy().tobytes() for image in digits.train_images[:-1000]}
    assert {image.numpy().tobytes() for image in images} <= pool - held_out


def test_a_small_run_is_complete_and_resumes(tmp_path: Any) -> None:
    sizes: dict[str, Any] = {
        "per_class": (3,), "methods": ("dropout", "Lipschitz"), "seeds": 2, "choosing": 1,
        "epochs": 1, "fits": 0,
    }  # fmt: skip
    results, tensors = small_data.run(rows=Rows(tmp_path), **sizes)
    assert tensors == {}
    assert [cell["method"] for cell in results["cells"]] == ["dropout", "Lipschitz"]
    assert all(len(cell["tried"]) == 3 and len(cell["test"]) == 2 for cell in results["cells"])
    rows = Rows(tmp_path)
    assert small_data.run(rows=rows, **sizes)[0] == results
    assert rows.earlier > 0


def test_shuffled_labels_are_a_permutation_and_hurt() -> None:
    digits = mnist()
    found, _ = small_data.learn(digits, "standard", True, epochs=1, seed=0)
    assert found["test_error"] > 0.7
    assert len(found["margins"]) == len(found["normalized"]) == 21
    assert found["margins"] == sorted(found["margins"])


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="values must be two or more, got 1"):
        small_data.interval([0.1])
    assert small_data.interval([0.5, 0.5]) == (0.5, 0.0)
    assert math.isclose(small_data.interval([0.0, 1.0])[1], 12.706 / 2, rel_tol=1e-4)
