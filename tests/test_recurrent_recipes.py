"""Records of recurrent layers are complete and true: a cheap part of each is computed again."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lipbook.composition import lipschitz_bound
from lipbook.lab import records
from lipbook.lab.data import Mnist
from lipbook.lab.data import mnist as fresh_mnist
from lipbook.lab.recipes import Rows, adding, memory, permuted_pixels, pixel_digits
from lipbook.lab.training import accuracy
from lipbook.sequences import LosslessRNN

mnist = functools.cache(fresh_mnist)


# ----------------------------------------------------------------------------------- memory


def test_the_copying_problem_by_hand() -> None:
    x, letters = memory.copying(9, 7, torch.Generator().manual_seed(1))
    for one, said in zip(x, letters.tolist(), strict=True):
        for t, step in enumerate(one):
            wanted = [0.0] * 5
            if t < 5:
                wanted[said[t]] = 1.0
            wanted[4] = float(t == 4)
            assert step.tolist() == wanted
        assert len(one) == 17
    assert letters.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", memory.NETWORKS)
def test_the_gradient_at_the_first_input_is_a_block_of_the_jacobian(name: str) -> None:
    """Random directions have the mean square of the entries, by rows."""
    torch.manual_seed(0)
    model = memory.Recall(name).double()
    x = memory.copying(1, 6, torch.Generator().manual_seed(0))[0].double()
    jacobian = torch.autograd.functional.jacobian(lambda z: model.layer(z)[0][0, -5], x)
    block = jacobian[:, 0, 0]  # of the output at the first recall by the first input
    exact = block.square().sum().item() / len(block)
    model.float()
    found = [memory.first_gradient(model, 6, seed) ** 2 for seed in range(8)]
    assert np.mean(found) == pytest.approx(exact, rel=0.35)
    later = torch.autograd.functional.jacobian(lambda z: model.layer(z)[0][0, 4], x.float())
    assert later[:, 0, 5:].abs().max() == 0  # no output knows what comes after it
    with pytest.raises(ValueError, match="name: expected one of"):
        memory.Recall("GRU")


def test_random_rotations_share_a_square_as_expected() -> None:
    """Of ten independent uniform rotations, the part that is read at the end."""
    whole, inputs = memory.HIDDEN + memory.INPUTS, memory.INPUTS
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(2000, whole, dtype=torch.float64)
    state[:, -inputs:] = torch.randn(2000, inputs, generator=generator, dtype=torch.float64)
    state /= state.norm(dim=1, keepdim=True)
    steps = 10 + memory.SYMBOLS
    for _ in range(steps + 1):  # a uniform rotation sends a vector to a uniform direction
        drawn = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        kept = drawn / drawn.norm(dim=1, keepdim=True) * state.norm(dim=1, keepdim=True)
        read, state = kept[:, -inputs:], kept.clone()
        state[:, -inputs:] = 0
    assert read.square().sum(1).mean().sqrt() == pytest.approx(memory.expected(10), rel=0.03)


def test_gradients_before_training_come_again() -> None:
    recorded = [one for one in records.read("memory").results["start"] if one["seed"] == 0]
    assert [one["name"] for one in recorded] == list(memory.NETWORKS)
    for one in recorded:
        torch.manual_seed(0)
        model = memory.Recall(one["name"])
        for delay, value in zip(memory.LENGTHS[:3], one["gradients"], strict=False):
            assert memory.first_gradient(model, delay) == pytest.approx(value, rel=1e-2, abs=1e-12)


def test_layers_learn_a_short_delay() -> None:
    for name in ("lossless", "orthogonal start"):
        model = memory.fit(name, 3, lr=0.02, steps=40)
        assert memory.recalled(model, 3, 2000) > 0.9


def test_the_record_of_memory_follows_from_its_trials() -> None:
    record = records.read("memory")
    found = memory.summary(record)
    assert set(found) == {(name, delay) for name in memory.NETWORKS for delay in memory.DELAYS}
    for (name, delay), (lr, *_) in found.items():
        tried = [r for r in record.results["tried"] if (r["name"], r["delay"]) == (name, delay)]
        assert [r["lr"] for r in tried] == list(memory.RATES)
        assert lr == max(tried, key=lambda r: r["validation"])["lr"]
        rows = [r for r in record.results["rows"] if (r["name"], r["delay"]) == (name, delay)]
        assert [(r["seed"], r["lr"]) for r in rows] == [(seed, lr) for seed in range(3)]


# ----------------------------------------------------------------------------------- adding


def test_the_adding_problem_by_hand() -> None:
    x, answer = adding.adding(400, 7, torch.Generator().manual_seed(1))
    places = set()
    for one, said in zip(x.tolist(), answer.tolist(), strict=True):
        marked = [t for t, (_, mark) in enumerate(one) if mark == 1]
        assert len(marked) == 2
        assert sum(mark for _, mark in one) == 2
        assert marked[0] < 3 <= marked[1]
        assert said == pytest.approx(sum(one[t][0] for t in marked))
        places |= {(0, marked[0]), (1, marked[1])}
    assert len(places) == 7
    assert x[..., 0].min() >= 0
    assert x[..., 0].max() < 1
    squares = (answer - 1).square()
    assert squares.mean() == pytest.approx(adding.BASELINE, abs=4 * squares.std().item() / 20)
    with pytest.raises(ValueError, match="name: expected one of"):
        adding.network("GRU")


def test_the_sum_is_lipschitz_with_the_root_of_two() -> None:
    """Over marks that agree in none, one or both places, and numbers that are far apart."""
    generator = torch.Generator().manual_seed(0)
    x, answer = adding.adding(500, 4, generator)
    x = torch.cat([x, torch.stack([x[..., 0].round(), x[..., 1]], 2)]).flatten(1).double()
    answer = (x[:, ::2] * x[:, 1::2]).sum(1)
    slopes = (answer[:, None] - answer).abs() / torch.cdist(x, x).clamp_min(1e-3)
    assert slopes.max() == pytest.approx(2**0.5)


@pytest.mark.parametrize("name", adding.NETWORKS)
def test_errors_of_the_first_steps_come_again(name: str) -> None:
    rows = records.read("adding").results["rows"]
    one = next(row for row in rows if row["name"] == name and row["seed"] == 0)
    model, errors = adding.fit(name, lr=one["lr"], until=1500 // adding.PARTS)
    assert errors == pytest.approx(one["errors"][:1], rel=0.02)
    bound = lipschitz_bound(model, (12, 2)).value
    assert math.isfinite(bound) or name == "LSTM"
    x = adding.adding(1, 12, torch.Generator().manual_seed(0))[0].double()
    J = torch.autograd.functional.jacobian(lambda z: model.double()(z)[0], x).flatten(1)
    assert J.norm() <= bound


def test_the_record_of_addition_follows_from_its_trials() -> None:
    record = records.read("adding")
    found = adding.summary(record)
    for name, cell in found.items():
        tried = [r for r in record.results["tried"] if r["name"] == name]
        assert [r["lr"] for r in tried] == list(adding.RATES)
        assert cell["lr"] == min(tried, key=lambda r: r["validation"])["lr"]
        rows = [r for r in record.results["rows"] if r["name"] == name]
        assert [(r["seed"], r["lr"]) for r in rows] == [(seed, cell["lr"]) for seed in range(3)]
        assert all(len(r["errors"]) == adding.PARTS for r in rows)
        assert cell["test"][0][0] == pytest.approx(np.mean([r["test"][0] for r in rows]))


# ------------------------------------------------------------------------------ pixel_digits


def test_views_are_orders_of_the_pixels() -> None:
    digit = torch.arange(784.0).view(1, 1, 28, 28)
    rows = pixel_digits.View("rows")(digit)
    assert torch.equal(rows[0], digit[0, 0])
    patches = pixel_digits.View("patches")(digit)
    assert patches.shape == (1, 49, 16)
    corners = set()
    for patch in patches[0].long():
        row, column = divmod(patch[0].item(), 28)
        assert torch.equal(patch, digit[0, 0, row : row + 4, column : column + 4].flatten().long())
        corners.add((row, column))
    assert corners == {(4 * i, 4 * j) for i in range(7) for j in range(7)}


def test_pixels_are_half_sums_in_one_order_for_all_digits() -> None:
    digits = torch.rand(3, 1, 28, 28)
    quarters = digits.view(3, 14, 2, 14, 2).sum((2, 4)).flatten(1) / 2
    pixels, permuted = (pixel_digits.View(view)(digits)[..., 0] for view in permuted_pixels.VIEWS)
    assert torch.allclose(pixels, quarters)
    order = (permuted[0, :, None] == pixels[0]).int().argmax(1)
    assert sorted(order.tolist()) == list(range(196)) != order.tolist()
    assert torch.equal(permuted, pixels[:, order])
    assert lipschitz_bound(pixel_digits.View("permuted"), (1, 28, 28)).value == pytest.approx(1)


def test_everything_keeps_every_norm() -> None:
    torch.manual_seed(0)
    layer = pixel_digits.Everything(LosslessRNN(2, 6, 2, batch_first=True)).double()
    J = torch.autograd.functional.jacobian(lambda x: layer(x)[0], torch.randn(1, 12, 2).double())
    J = J.flatten(1)
    assert torch.allclose(J.mT @ J, torch.eye(24).double(), atol=1e-9)
    for p in (1, 2, math.inf):
        assert torch.linalg.matrix_norm(J, p) <= lipschitz_bound(layer, (12, 2), p).value * 1.000001


@pytest.mark.parametrize("name", pixel_digits.NETWORKS)
def test_networks_on_sequences_learn_and_are_bounded(name: str) -> None:
    digits = mnist()
    model = pixel_digits.fit(name, "rows", *(t[:512] for t in digits[:2]), lr=0.02, epochs=3)
    assert accuracy(model, *(t[::10] for t in digits[2:])) > 0.3
    bound = lipschitz_bound(model, (1, 28, 28)).value
    if "lossless" in name:
        assert 0.9 < bound < 1 + 1e-4
    x = digits.test_images[:1].double()
    J = torch.autograd.functional.jacobian(lambda z: model.double()(z)[0], x).flatten(1)
    assert torch.linalg.matrix_norm(J, 2) <= bound
    for arguments, message in (((name, "columns"), "view: "), (("GRU", "rows"), "name: ")):
        with pytest.raises(ValueError, match=f"{message}expected one of"):
            pixel_digits.network(*arguments)


@pytest.mark.parametrize(
    ("recipe", "view", "count"),
    [("pixel_digits", "rows", 5000), ("permuted_pixels", "permuted", 3000)],
)
def test_a_row_of_the_sequences_comes_again(recipe: str, view: str, count: int) -> None:
    name = "orthogonal"
    rows = records.read(recipe).results["rows"]
    one = next(row for row in rows if (row["name"], row["view"]) == (name, view))
    digits = mnist()
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(12_000))[:count]
    fitted = digits.train_images[order], digits.train_labels[order]
    model = pixel_digits.fit(name, view, *fitted, lr=one["lr"], seed=0)
    assert abs(accuracy(model, *digits[2:]) - one["test"]["clean"]) < 0.03


@pytest.mark.parametrize(
    ("recipe", "views", "names"),
    [
        ("pixel_digits", ("rows", "patches"), pixel_digits.NETWORKS),
        ("permuted_pixels", permuted_pixels.VIEWS, permuted_pixels.NETWORKS),
    ],
)
def test_the_record_of_the_sequences_follows_from_its_trials(
    recipe: str, views: tuple[str, ...], names: tuple[str, ...]
) -> None:
    record = records.read(recipe)
    found = pixel_digits.summary(record)
    assert set(found) == set(itertools.product(views, names))
    for (view, name), cell in found.items():
        tried = [r for r in record.results["tried"] if (r["view"], r["name"]) == (view, name)]
        scores = [r["validation"]["clean"] + r["validation"]["certified"] for r in tried]
        assert [r["lr"] for r in tried] == list(pixel_digits.RATES)
        assert cell["lr"] == tried[int(np.argmax(scores))]["lr"]
        rows = [r for r in record.results["rows"] if (r["view"], r["name"]) == (view, name)]
        assert [(r["seed"], r["lr"]) for r in rows] == [(seed, cell["lr"]) for seed in range(3)]
        for one in rows:  # what is certified no attack breaks
            assert one["test"]["certified"] <= one["test"]["clean"]
            assert one["few"]["certified"] <= one["few"]["attacked"]


# --------------------------------------------------------------------------------- both runs


def test_rates_are_chosen_on_what_was_held_out_and_rows_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(name: str, other: Any = None, *data: Any, **given: Any) -> Any:
        asked.append(data)
        good = 1.0 if given["lr"] == (0.1 if name == "LSTM" else 0.2) else 0.5
        marks = {"clean": good, "certified": 0.0}
        one = {"name": name, "view": other, "delay": other, "bound": None, "gradients": [], **given}
        if data:
            return one | {"validation": marks, "test": marks}, {}
        return one | {"validation": good, "test": 0.5}, {}

    digits = mnist()
    few = Mnist(*(t[:1500] for t in digits))
    monkeypatch.setattr(pixel_digits, "mnist", lambda: few)
    monkeypatch.setattr(memory, "start", lambda name, seed: ({"name": name, "seed": seed}, {}))
    runs: list[tuple[Any, dict[str, Any]]] = [
        (pixel_digits, {"views": ("rows",), "train_count": 900, "validation": 300}),
        (permuted_pixels, {"views": ("pixels",), "train_count": 900, "validation": 300}),
        (memory, {"delays": (3,), "seeds": 2}),
        (adding, {"seeds": 2}),
    ]
    for module, sizes in runs:
        asked.clear()
        trained = pixel_digits if module is permuted_pixels else module
        monkeypatch.setattr(trained, "row", measured)
        sizes |= {"rates": (0.1, 0.2), "rows": Rows(tmp_path / module.__name__)}
        results, _ = module.run(**sizes)
        count = len(asked)
        assert count == len(module.NETWORKS) * (2 + sizes.get("seeds", 3) - 1)
        assert module.run(**sizes)[0] == results
        assert len(asked) == count
        assert {(r["name"] == "LSTM", r["lr"]) for r in results["rows"]} == (
            {(1, 0.2), (0, 0.1)} if module is adding else {(1, 0.1), (0, 0.2)}  # least errors
        )
        if trained is pixel_digits:
            (images, _), ((held_out, _), (test, _)) = asked[-1]
            assert (len(images), len(held_out)) == (900, 300)
            assert len(torch.cat([images, held_out]).flatten(1).unique(dim=0)) == 1200
            assert test is few.test_images
    assert memory.run(**runs[2][1])[0]["start"][0]["name"] == "lossless"
