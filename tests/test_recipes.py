"""The records are complete and true: a cheap part of each is computed again."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from lipbook.composition import lipschitz_bound
from lipbook.lab import records
from lipbook.lab.data import mnist
from lipbook.lab.recipes import (
    Rows,
    brackets,
    digit_generator,
    group_sizes,
    image_critics,
    known_answers,
    recipes,
    transport_scaling,
    wgan,
)
from lipbook.lab.recipes.__main__ import main

# A critic sums up to 1,568 products a unit in float32, in another order on another machine; its
# values are of size 10 at most, and it keeps the error of a layer or reduces it.
FLOAT32 = 10 * 1568**0.5 * torch.finfo(torch.float32).eps
# Numbers in records have eight digits.
ROUNDED = 1e-7


def emd(x: Tensor, y: Tensor) -> float:
    points = [z.flatten(1).double().numpy() for z in (x, y)]
    return float(ot.emd2([], [], ot.dist(*points, metric="euclidean"), numItermax=10**7))


def close(value: float, recorded: float) -> bool:
    return math.isclose(value, recorded, rel_tol=ROUNDED, abs_tol=FLOAT32)


# -------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_its_record(name: str) -> None:
    record = records.read(name)
    assert record.facts["command"] == f"python -m lipbook.lab.recipes {name}"
    run = importlib.import_module(f"lipbook.lab.recipes.{name}").run
    parameters = inspect.signature(run).parameters
    assert record.facts["seed"] == parameters["seed"].default
    assert {"progress", "rows"} <= set(parameters)
    assert 0 < record.facts["seconds"] <= 600
    assert record.facts["threads"] >= 1
    assert len(record.facts["hardware"]) > 10
    size = sum(t.numel() * t.element_size() for t in record.tensors.values())
    assert size <= 3_000_000


def test_every_record_has_its_recipe() -> None:
    assert records.names() == recipes()


# ----------------------------------------------------------------------------- digit_generator


def test_the_generator_is_as_far_from_digits_as_recorded() -> None:
    results = records.read("digit_generator").results
    count = results["count"]
    generated = digit_generator.generate(digit_generator.load(), count, results["generated_seed"])
    assert generated.shape == (count, 1, 28, 28)
    assert 0 <= generated.min() <= generated.max() <= 1
    images = mnist().train_images
    assert close(emd(images[-count:], generated), results["real_to_generated"])
    assert close(emd(images[-count:], images[:count]), results["real_to_real"])


def test_the_generator_learnt() -> None:
    loss = records.read("digit_generator").results["loss"]
    assert loss[-1] < loss[0] / 2
    images = digit_generator.generate(digit_generator.load(), 100, seed=5)
    # no two digits are alike: they are as far apart as real ones, within a factor of two
    apart, real = (torch.pdist(z[:100].flatten(1)).median() for z in (images, mnist().test_images))
    assert real / 2 < apart < 2 * real


# ------------------------------------------------------------------------------- known_answers


def known_rows(**wanted: object) -> list[dict[str, Any]]:
    rows = records.read("known_answers").results["rows"]
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("activation", known_answers.ACTIVATIONS)
@pytest.mark.parametrize("problem", ["absolute value", "three cones"])
def test_a_recorded_critic_has_its_recorded_value(problem: str, activation: str) -> None:
    model = known_answers.load(problem, activation, "orthogonal")
    (row,) = known_rows(problem=problem, activation=activation, linear="orthogonal", seed=0)
    x, y = known_answers.judges(known_answers.PROBLEMS[problem].problem())
    with torch.no_grad():
        value = model(x.float()).mean() - model(y.float()).mean()
    assert close(value.item(), row["value"])
    weights = [m.weight.detach().double().numpy() for m in model if hasattr(m, "weight")]
    norm = math.prod(np.linalg.norm(w, 2) for w in weights)
    assert math.isclose(norm, row["bound"], rel_tol=1e-5)


def test_no_bounded_critic_exceeds_the_answer() -> None:
    """Up to the error of 10,000 points: critics are at most 2 apart on the shells (diameter)."""
    for row in known_rows():
        assert row["value"] / max(1, row["bound"]) <= 1 + 5 * 2 / math.sqrt(10_000)


def test_a_few_steps_show_the_order_of_the_activations() -> None:
    values = {
        activation: known_answers.row("absolute value", activation, "orthogonal", steps=100)[0]
        for activation in ("ReLU", "MaxMin")
    }
    assert values["ReLU"]["value"] < 0.65
    assert values["MaxMin"]["value"] > 0.9


def test_a_critic_that_is_not_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="no critic 'cone, d = 128/ReLU/orthogonal': expected"):
        known_answers.load("cone, d = 128", "ReLU", "orthogonal")


def test_a_few_steps_show_the_order_of_the_group_sizes() -> None:
    results, _ = group_sizes.run(sizes=(2, 128), seeds=1, steps=120)
    pairs, full = (row["value"] for row in results["rows"])
    assert pairs < full


# ------------------------------------------------------------ brackets and transport_scaling


@pytest.mark.parametrize("name", brackets.CLOUDS)
def test_a_recorded_interval_is_found_again(name: str) -> None:
    """The exact distance is POT's, and Sinkhorn's bounds depend on the machine by rounding."""
    rows = [r for r in records.read("brackets").results["rows"] if r["clouds"] == name]
    assert [r["method"] for r in rows] == 2 * list(brackets.METHODS)
    n = rows[0]["n"]
    x, y = brackets.CLOUDS[name](n, torch.Generator().manual_seed(0))
    assert math.isclose(emd(x, y), rows[0]["exact"], rel_tol=1e-6)
    again, _ = brackets.row(name, n, "sinkhorn")
    recorded = rows[1]
    for bound in ("lower", "upper"):
        assert math.isclose(again[bound], recorded[bound], rel_tol=1e-3)


def test_intervals_hold_the_distance_and_meet_their_targets() -> None:
    """One per cent in ten seconds, by the exact solver and by Sinkhorn."""
    for row in records.read("brackets").results["rows"]:
        rounding = 1e-7 * row["exact"]
        assert row["lower"] - rounding <= row["exact"] <= row["upper"] + rounding
        assert row["n"] in (512, 2048) or row["clouds"].startswith("digits")
        assert row["seconds"] <= 10
        if row["method"] != "critic":
            assert row["upper"] - row["lower"] <= 0.01 * row["exact"]
        else:
            assert row["value"] <= row["lower"] + rounding


def test_a_critic_of_few_steps_proves_an_interval() -> None:
    results, _ = brackets.row("three cones, d = 2", 64, "critic", steps=3)
    assert results["value"] <= results["lower"] + 1e-9
    assert results["lower"] <= results["exact"] + 1e-9
    assert results["exact"] <= results["upper"] + 1e-9


def test_small_rows_of_the_scaling_are_found_again() -> None:
    rows = records.read("transport_scaling").results["rows"]
    assert {(r["method"], r["n"]) for r in rows} == {
        (method, n) for method, sizes in transport_scaling.SIZES.items() for n in sizes
    }
    for recorded in rows:
        assert recorded["lower"] <= recorded["upper"]
        if recorded["n"] == 256:
            again, _ = transport_scaling.row(recorded["method"], 256)
            for bound in ("lower", "upper"):
                assert math.isclose(again[bound], recorded[bound], rel_tol=1e-3)


# ------------------------------------------------------------------------------- image_critics


@pytest.fixture(scope="module")
def clouds() -> image_critics.Clouds:
    return image_critics.clouds(records.read("image_critics").results["count"])


def test_exact_distances_of_the_clouds(clouds: image_critics.Clouds) -> None:
    exact = records.read("image_critics").results["exact"]
    assert close(emd(clouds.held_out_real, clouds.held_out_generated), exact["held_out"])


def test_no_cloud_shares_a_digit(clouds: image_critics.Clouds) -> None:
    trained_on = mnist().train_images[: digit_generator.TRAINED_ON]
    digits = torch.cat((trained_on, clouds.real, clouds.held_out_real)).flatten(1)
    assert len(digits.unique(dim=0)) == len(digits)


@pytest.mark.parametrize("name", ["BCOP", "OSSN"])
def test_a_recorded_image_critic_has_its_recorded_values(
    name: str, clouds: image_critics.Clouds
) -> None:
    row = records.read("image_critics").results["kept"][name]
    model = image_critics.load(name)
    with torch.no_grad():
        for key, x, y in (("train", *clouds[:2]), ("held_out", *clouds[2:])):
            value = (model(x).double().mean() - model(y).double().mean()).item()
            scale = max(1.0, row["bound"])  # errors grow with the bound, too
            assert math.isclose(value, row[key], rel_tol=ROUNDED, abs_tol=scale * FLOAT32)
    assert math.isclose(lipschitz_bound(model, (1, 28, 28)).value, row["bound"], rel_tol=1e-4)


def test_divided_values_are_lower_bounds_of_the_exact_distance() -> None:
    results = records.read("image_critics").results
    whole = [row for row in results["rows"] if "failed" not in row]
    assert len(whole) > len(results["rows"]) / 2
    for row in whole:
        for on in ("train", "held_out"):
            assert image_critics.dual(row, on) < results["exact"][on]
        if row["convolution"] != "OSSN":
            assert row["bound"] < 1 + 1e-5
    assert results["bracket"]["lower"] <= results["exact"]["held_out"]
    assert results["bracket"]["upper"] >= results["exact"]["held_out"]
    few = results["few"]
    assert image_critics.dual(few) < few["exact_train"]


def test_an_undivided_value_can_exceed_the_distance() -> None:
    """The number that is too good: an estimated norm let the critic grow."""
    results = records.read("image_critics").results
    row = results["kept"]["OSSN"]
    assert row["train"] > results["exact"]["train"]
    assert image_critics.dual(row) < results["exact"]["train"]


def test_upsampling_doubles_every_distance() -> None:
    row = records.read("image_critics").results["upsampled"]
    assert math.isclose(row["exact_after"], 2 * row["exact_before"], rel_tol=ROUNDED)
    assert math.isclose(row["bound"], 2, rel_tol=1e-5)
    assert image_critics.dual(row, "held_out") < row["exact_before"]


def dense(layer: image_critics.OSSNConv2d, size: int) -> np.ndarray:
    """The matrix of the convolution in evaluation mode, column by column."""
    basis = torch.eye(layer.in_channels * size**2).reshape(-1, layer.in_channels, size, size)
    with torch.no_grad():
        offset = layer(torch.zeros_like(basis[:1]))
        return (layer(basis) - offset).flatten(1).T.double().numpy()


def test_ossn_divides_by_the_norm_once_it_has_converged() -> None:
    layer = image_critics.OSSNConv2d(2, 3, size=8)
    with torch.no_grad():
        layer.weight.mul_(5)
        for _ in range(50):
            layer(torch.zeros(1, 2, 8, 8))
    layer.eval()
    assert math.isclose(np.linalg.norm(dense(layer, 8), 2), 1, rel_tol=1e-4)
    assert math.isclose(lipschitz_bound(layer, (2, 8, 8)).value, 1, rel_tol=1e-4)


def test_ossn_leaves_small_kernels_alone_and_keeps_no_promise() -> None:
    layer = image_critics.OSSNConv2d(2, 3, size=8)
    with torch.no_grad():
        layer.weight.mul_(0.01)
        layer(torch.zeros(1, 2, 8, 8))
        layer.eval()
        assert torch.equal(layer.normalised(), layer.weight)
        layer.weight.mul_(1e4)  # a step after the last estimate
    norm = np.linalg.norm(dense(layer, 8), 2)
    bound = lipschitz_bound(layer, (2, 8, 8)).value
    assert norm > 10
    assert norm <= bound * (1 + 1e-6)
    assert bound < 1.1 * norm
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        lipschitz_bound(layer.train(), (2, 8, 8))


def test_ossn_passes_the_gradient_of_its_estimate() -> None:
    """By differences: the estimate is a function of the kernel at fixed u and v."""
    layer = image_critics.OSSNConv2d(1, 2, size=8).double()
    with torch.no_grad():
        layer.weight.mul_(5)
        for _ in range(50):
            layer(torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(layer.weight)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    slope = (layer.weight.grad * direction).sum().item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.weight.add_(sign * 1e-5 * direction)
            for _ in range(50):  # u and v are at a maximum: their change does not count
                value = layer(x).sum().item()
            layer.weight.sub_(sign * 1e-5 * direction)
        values.append(value)
    assert math.isclose((values[0] - values[1]) / 2e-5, slope, rel_tol=1e-5, abs_tol=1e-6)


# ---------------------------------------------------------------------------------------- wgan


def test_a_gan_starts_where_it_was_recorded() -> None:
    record = records.read("wgan")
    recorded = record.results["rows"][0]
    results, images = wgan.row(
        recorded["method"], recorded["lr"], steps=1, looks=1, count=record.results["count"]
    )
    assert results["step"] == [0, 1]
    for key in ("exact", "value", "bound", "slope"):
        assert math.isclose(results[key][0], recorded[key][0], rel_tol=1e-4, abs_tol=1e-4)
    assert {k: (v.shape, v.dtype) for k, v in images.items()} == {
        f"{recorded['method']}/{recorded['lr']:g}": ((40, 1, 14, 14), torch.uint8)
    }


@pytest.mark.parametrize("method", wgan.METHODS)
def test_each_gan_takes_steps(method: str) -> None:
    results, images = wgan.row(method, 1e-3, steps=2, critic_steps=1, looks=2, count=20, shown=4)
    assert results["step"] == [0, 1, 2]
    assert results["failed"] is None
    assert len(set(results["value"])) == 3
    assert images[f"{method}/0.001"].shape == (4, 1, 14, 14)


def test_a_generator_comes_nearer_and_clipping_clips() -> None:
    results, _ = wgan.row("BCOP", 1e-3, steps=30, looks=1, count=64, shown=1)
    assert results["exact"][1] < 0.95 * results["exact"][0]
    results, _ = wgan.row("clipping", 1e-3, steps=1, looks=1, count=8, shown=1)
    # a weight is at most 0.01: a layer of m outputs and n inputs a unit has norm <= 0.01 √(mn),
    # and a 3 × 3 or 4 × 4 kernel of stride 1 or 2 meets a pixel 9 or 4 times
    norms = [(16 * 16 * 4) ** 0.5, (32 * 16) ** 0.5 * 9, (64 * 1568) ** 0.5, 64**0.5]
    assert results["bound"][1] <= math.prod(0.01 * norm for norm in norms) * (1 + 1e-6)


def test_gan_critics_divided_are_lower_bounds() -> None:
    record = records.read("wgan")
    assert len(record.tensors) == len(record.results["rows"])
    for row in record.results["rows"]:
        numbers = zip(row["exact"], row["value"], row["bound"], row["slope"], strict=True)
        for exact, value, bound, slope in numbers:
            assert value / max(1.0, bound) <= exact
            assert slope <= bound * (1 + 1e-4)
            if row["method"] == "BCOP":
                assert bound <= 1 + 1e-4


# ------------------------------------------------------------------------------- command line


def shortened(folder: Path) -> list[str]:
    sizes = ["--set", "steps=2", "--set", "seeds=1", "--set", "sizes=[2,128]"]
    return ["group_sizes", "--to", str(folder), "--quiet", *sizes]


def test_the_command_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = main(shortened(tmp_path / "records"))
    record = records.read("group_sizes", tmp_path / "records")
    assert path == tmp_path / "records" / "group_sizes.json"
    assert [row["group_size"] for row in record.results["rows"]] == [2, 128]
    assert record.facts["command"].endswith("--set steps=2 --set seeds=1 --set sizes=[2,128]")
    assert list((tmp_path / ".lipbook" / "recipes").iterdir()) == []


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []
    fit = group_sizes.fit

    def interrupted(*arguments: Any, **sizes: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **sizes)

    monkeypatch.setattr(group_sizes, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(shortened(tmp_path))
    main(shortened(tmp_path))
    assert len(calls) == 3
    again = records.read("group_sizes", tmp_path).results
    expected = records.rounded(group_sizes.run(sizes=(2, 128), seeds=1, steps=2)[0])
    assert again == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["group_sizes", "--set", "steps=2"], "--set needs --to"),
        (["group_sizes", "--to", ".", "--set", "step=2"], "expected one of .*'steps'"),
        (["group_sizes", "--to", ".", "--set", "steps=two"], "--set steps: expected a number"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_commands_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re  # noqa: PLC0415

    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(words, capsys.readouterr().err)


def test_help_lists_every_recipe_with_its_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in recipes():
        minutes = records.read(name).facts["seconds"] / 60
        assert f"{name:16} {minutes:3.0f}  " in text


def test_rows_keep_results_and_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.arange(4).reshape(2, 2).T}
    computed = Rows(tmp_path).compute("one/row, 1", lambda: ({"x": [1.5, None]}, tensors))
    rows = Rows(tmp_path)
    results, again = rows.compute("one/row, 1", pytest.fail)
    assert results == computed[0] == {"x": [1.5, None]}
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert rows.earlier >= 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".row"]
    assert Rows().compute("one/row, 1", lambda: ({}, {})) == ({}, {})


def test_rows_of_records_are_json() -> None:
    for name in recipes():
        json.dumps(records.read(name).results, allow_nan=False)
