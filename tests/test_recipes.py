"""The records are complete and true: a cheap part of each is computed again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from lipbook.attacks import attacked_accuracy
from lipbook.composition import lipschitz_bound
from lipbook.lab import frontier, networks, records
from lipbook.lab.data import Cifar10, Mnist
from lipbook.lab.data import mnist as fresh_mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import (
    Rows,
    ablation,
    audit,
    brackets,
    cifar10,
    convolution_gallery,
    counterexamples,
    critic_controls,
    deep_networks,
    digit_generator,
    equal_budget,
    equal_budget_cifar10,
    gradient_controls,
    gradients,
    group_sizes,
    image_critics,
    infinity_norm,
    known_answers,
    local_certificates,
    mnist_best,
    mnist_infinity,
    mnist_small,
    mnist_trade_off,
    ordinary_networks,
    recipes,
    smoothing,
    sparse_transport,
    speedrun,
    speedrun_cifar10,
    tightness,
    transport_scaling,
    waterfall,
    wgan,
)
from lipbook.lab.training import accuracy
from lipbook.robustness import certify

# A critic sums up to 1,568 products a unit in float32, in another order on another machine; its
# values are of size 10 at most, and it keeps the error of a layer or reduces it.
FLOAT32 = 10 * 1568**0.5 * torch.finfo(torch.float32).eps
# Numbers in records have eight digits.
ROUNDED = 1e-7


# The digits that ship are unpacked once, and no test writes into them.
mnist = functools.cache(fresh_mnist)


def emd(x: Tensor, y: Tensor) -> float:
    points = [z.flatten(1).double().numpy() for z in (x, y)]
    return float(ot.emd2([], [], ot.dist(*points, metric="euclidean"), numItermax=10**7))


def close(value: float, recorded: float) -> bool:
    return math.isclose(value, recorded, rel_tol=ROUNDED, abs_tol=FLOAT32)


# -------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_its_record(name: str) -> None:
    record = records.read(name)
    assert record.facts["command"] == f"lipbook reproduce {name}"
    run = importlib.import_module(f"lipbook.lab.recipes.{name}").run
    parameters = inspect.signature(run).parameters
    assert record.facts["seed"] == parameters["seed"].default
    assert "rows" in parameters
    longest = {
        "ablation": 1200, "cifar10": 900, "equal_budget": 1200,
        "equal_budget_cifar10": 1800, "mnist_small": 1800,
        "speedrun": 3600, "speedrun_cifar10": 2400, "waterfall": 1200,
    }  # fmt: skip
    assert 0 < record.facts["seconds"] <= longest.get(name, 600)
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


# ----------------------------------------------------------------------------- critic_controls


@pytest.mark.parametrize("shape", [(64, 2), (32, 32), (1, 16)])
def test_starts_differ_in_singular_values_alone(shape: tuple[int, int]) -> None:
    """The usual matrix is the orthonormal one times a symmetric positive factor."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(shape[1], shape[0])
    found = {}
    for start, constraint in critic_controls.CELLS:
        made = critic_controls.layer(plain, start, constraint)
        weight = np.asarray(made.weight.detach())
        estimated = 0.02 if constraint == "spectral norm" else 1e-5  # by fifteen iterations
        assert np.allclose(weight, found.setdefault(start, weight), rtol=estimated, atol=1e-5)
        assert math.isclose(np.linalg.norm(weight, 2), 1, rel_tol=estimated)
        assert torch.equal(made.bias, plain.bias)
    q, w = found["orthonormal"], found["usual"]
    gram, factor = (q.T @ q, q.T @ w) if shape[0] >= shape[1] else (q @ q.T, q @ w.T)
    assert np.allclose(gram, np.eye(min(shape)), atol=1e-5)
    assert np.allclose(factor, factor.T, atol=1e-5)
    assert np.linalg.eigvalsh(factor).min() > 0
    assert math.isclose(np.ptp(w / plain.weight.detach().numpy()), 0, abs_tol=1e-4)
    with pytest.raises(ValueError, match="start and constraint: expected one of"):
        critic_controls.layer(plain, "usual", "orthonormal")


def test_critics_of_one_start_begin_as_one_function() -> None:
    x = torch.randn(50, 2)
    for start in ("orthonormal", "usual"):
        values = [
            critic_controls.critic("three cones", "MaxMin", start, constraint, 3)(x)
            for begin, constraint in critic_controls.CELLS
            if begin == start
        ]
        assert all((value - values[0]).abs().max() < 0.05 for value in values)  # an estimate
        assert all((value - values[0]).abs().max() < 1e-5 for value in values[:-1])


def test_critic_controls_choose_on_other_points_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(*names: str, **given: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked.append(names)
        score = -abs(math.log(given["lr"] / (0.001 if "ReLU" in names else 0.03)))
        marks = {"validation": score, "value": -score, "kept": given["steps"], "slope": 0}
        cell = dict(zip(("problem", "activation", "start", "constraint"), names, strict=True))
        return cell | given | marks, {}

    monkeypatch.setattr(critic_controls, "PROBLEMS", ("three cones",))
    monkeypatch.setattr(critic_controls, "row", measured)
    monkeypatch.setattr(critic_controls, "_exact", lambda problem: ({"exact": 1.0}, {}))
    results, _ = critic_controls.run(shorten=0.1, rows=Rows(tmp_path))
    assert critic_controls.run(shorten=0.1, rows=Rows(tmp_path))[0] == results
    assert len(asked) == 15 * (5 + 2)
    assert {(r["activation"] == "ReLU", r["lr"]) for r in results["rows"]} == {
        (1, 0.001),
        (0, 0.03),
    }
    made = records.facts("lipbook reproduce critic_controls", 0, 1.0)
    found = critic_controls.summary(records.Record("critic_controls", made, results))
    assert found["three cones", "MaxMin", "usual", "clipped"]["kept"] == [80] * 3


def test_the_record_of_the_critic_controls_follows_from_its_trials() -> None:
    """No value exceeds the exact distance of its points: that is the theorem of duality."""
    record = records.read("critic_controls")
    best: dict[Any, Any] = {}
    for one in record.results["tried"]:
        cell = one["problem"], one["activation"], one["start"], one["constraint"]
        best[cell] = max(best.get(cell, (-1.0, 0.0)), (one["validation"], one["lr"]))
    seeds = set()
    for one in record.results["rows"]:
        cell = one["problem"], one["activation"], one["start"], one["constraint"]
        assert one["lr"] == best[cell][1]
        assert one["value"] <= record.results["exact"][one["problem"]] + FLOAT32
        assert one["slope"] <= 1 + 1e-5
        assert one["kept"] <= 1 + 1e-2
        if one["constraint"] == "orthonormal":
            assert one["kept"] == pytest.approx(1, abs=1e-5)
        seeds.add((*cell, one["seed"]))
    assert len(seeds) == len(record.results["rows"]) == 3 * len(best) == 90


def test_the_points_of_the_critic_controls_are_as_far_apart_as_recorded() -> None:
    exact = records.read("critic_controls").results["exact"]
    cone = known_answers.PROBLEMS["cone, d = 128"].problem()
    x, y = critic_controls._points(cone, critic_controls.TEST)
    assert y.unique(dim=0).shape[0] == 1  # so every plan is the same
    assert exact["cone, d = 128"] == pytest.approx((x - y).norm(dim=1).mean().item())
    cones = known_answers.PROBLEMS["three cones"].problem()
    other, _ = critic_controls._points(cones, critic_controls.VALIDATION)
    assert not torch.isin(critic_controls._points(cones, critic_controls.TEST)[0], other).any()


def test_a_row_of_the_critic_controls_comes_again() -> None:
    cell = {
        "problem": "cone, d = 128", "activation": "ReLU", "start": "usual",
        "constraint": "spectral norm", "seed": 0,
    }  # fmt: skip
    rows = records.read("critic_controls").results["rows"]
    (one,) = (r for r in rows if {name: r[name] for name in cell} == cell)
    again = critic_controls.row(**cell, lr=one["lr"])[0]
    assert again["value"] == pytest.approx(one["value"], abs=0.02)


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


# ----------------------------------------------------------------------------- sparse_transport


def test_sparse_graphs_meet_their_targets_and_small_rows_are_found_again() -> None:
    results = records.read("sparse_transport").results
    for row, (d, n, tolerance) in zip(results["hard"], sparse_transport.HARD, strict=True):
        assert (row["d"], row["n"], row["tolerance"]) == (d, n, tolerance)
        assert row["lower"] <= row["upper"] <= row["lower"] / (1 - tolerance)
        assert row["seconds"] <= (300 if n == 100_000 else 60)
    peers = {row["method"]: row for row in results["peers"]}
    assert tuple(peers) == sparse_transport.PEERS
    for row in peers.values():
        assert row["upper"] >= peers["exact"]["lower"]
        assert row["lower"] is None or row["lower"] <= peers["exact"]["upper"]
    n = peers["sparse"]["n"]
    again, _ = sparse_transport.peer_row("sparse", n)
    for bound in ("lower", "upper"):
        assert math.isclose(again[bound], peers["sparse"][bound], rel_tol=1e-3)


@pytest.mark.parametrize("method", sparse_transport.PEERS)
def test_intervals_of_all_solvers_hold_the_distance(method: str) -> None:
    exact = emd(*sparse_transport.mixtures(20, 80, 0))
    row, _ = sparse_transport.peer_row(method, 80)
    assert row["upper"] >= exact * (1 - 1e-6)
    assert row["lower"] is None or row["lower"] <= exact * (1 + 1e-6)


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


# ------------------------------------------------------------------------------ robust networks


@pytest.mark.parametrize("name", networks.names())
def test_each_network_that_ships_is_certified_again(name: str) -> None:
    """On digits that ship, or on the images in the record; norms are those of NumPy's SVD.

    Records keep what was certified when they were made; sharper bounds of rounding certify more.
    """
    record, _, key = name.partition("/")
    recorded = records.read(record, tensors=False).results["networks"][key]["shipped"]
    model, p = networks.load(name), networks.norm(name)
    images, labels = networks.data(name)
    found = certificate(model, images, labels, p)
    assert found.sound
    # Colour images are large and their margins small: the error of a program weighs more.
    assert found.facts["lost_to_rounding"] < (0.08 if record == "cifar10" else 0.02)
    real = certificate(model, images, labels, p, sound=False)
    assert recorded["count"] == len(images)
    for epsilon, share in zip(
        [0, *recorded["epsilons"]], [recorded["clean"], *recorded["certified"]], strict=True
    ):  # on another machine an input may fall on the other side
        certified, most = (each.certified_accuracy(epsilon).value for each in (found, real))
        assert share - 1 / len(images) <= certified <= most
        assert epsilon or certified == pytest.approx(share, abs=1 / len(images))
    # where the rows of the last layer have one length, their differences count and not its norm
    layers = model[:-1] if record == "speedrun" else model
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.double().numpy()
            if p == 2:
                assert np.linalg.norm(weight, 2) <= 1 + 1e-3
            else:
                assert np.abs(weight).sum(1).max() <= 1 + 1e-3


@pytest.mark.parametrize(
    "name", ["mnist_best", "mnist_small", "mnist_infinity", "cifar10", "speedrun"]
)
def test_no_certificate_exceeds_the_attack_and_epsilon_only_lowers(name: str) -> None:
    results = records.read(name).results
    tests = [results["test"]] if "test" in results else []
    tests += [row["test"] for row in results.get("rows", [])]
    tests += [facts["shipped"] for facts in results["networks"].values()]
    assert tests
    for test in tests:
        curve = [test["clean"], *test["certified"]]
        assert curve == sorted(curve, reverse=True)
        for low, high in zip(test["certified_of_attacked"], test["attacked"], strict=True):
            assert low <= high


def test_the_best_network_is_better_than_the_published_one_at_both_ends() -> None:
    results = records.read("mnist_best").results
    clean, certified = results["published"]
    assert results["test"]["epsilons"][-1] == 1.58
    assert results["test"]["clean"] >= 0.988 > clean
    assert results["test"]["certified"][-1] >= 0.57 > certified


def test_the_order_of_the_small_networks() -> None:
    record = records.read("mnist_small")
    found = mnist_small.entries(record)
    assert list(found) == list(mnist_small.METHODS)
    far = {name: entry.certified for name, entry in found.items()}
    for better, worse in (
        ("BCOP, StiefelMuon", "BCOP"), ("BCOP", "OSSN"), ("RKO", "OSSN"), ("OSSN", "SVCM"),
    ):  # fmt: skip
        (mean, deviation), (other, others) = far[better], far[worse]
        assert mean - other > 2 * (deviation + others), (better, worse)
    clean = [row["test"]["clean"] for row in record.results["rows"] if row["method"] == "BCOP"]
    assert found["BCOP"].clean == pytest.approx((np.mean(clean), np.std(clean, ddof=1)))


def test_a_number_of_a_small_network_has_three_seeds() -> None:
    record = records.read("mnist_small")
    rows = record.results["rows"]
    assert all(len(entry.seeds) >= 3 for entry in mnist_small.entries(record).values())
    for wrong in (rows[:-1], [*rows, rows[-1]]):
        fewer = dataclasses.replace(record, results={**record.results, "rows": wrong})
        with pytest.raises(ValueError, match="expected 3 seeds or more for 'BCOP, StiefelMuon'"):
            mnist_small.entries(fewer)


def test_a_few_steps_train_each_small_network() -> None:
    digits = mnist()
    few = Mnist(*(t[:600] for t in digits))
    for method in mnist_small.METHODS:
        results, tensors = mnist_small.row(few, method, epochs=6, validation=100, attack=4)
        assert len(results["scores"]) == 6
        assert results["test"]["clean"] > 0.3, method
        assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_clipping_and_masking_comes_near_the_norm_it_cannot_promise() -> None:
    kernel = 3 * torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    clipped = mnist_small.clipped_and_masked(kernel, 8)
    columns = torch.eye(2 * 8 * 8).view(-1, 2, 8, 8)
    padded = torch.nn.functional.pad(columns, (1, 1, 1, 1), mode="circular")
    matrices = [
        torch.nn.functional.conv2d(padded, k, stride=2).flatten(1).double().numpy()
        for k in (kernel, clipped)
    ]
    before, after = (np.linalg.norm(matrix, 2) for matrix in matrices)
    assert before > 5
    assert 0.9 < after < 1.1


def test_margins_and_temperatures_trade_accuracy_for_radius() -> None:
    results = records.read("mnist_trade_off").results
    assert results["epsilons"] == list(mnist_trade_off.EPSILONS)
    for family, (_, numbers) in mnist_trade_off.LOSSES.items():
        rows = [row for row in results["rows"] if row["family"] == family]
        assert [row["number"] for row in rows] == list(numbers)
        clean, far = ([row["certified"][at] for row in rows] for at in (0, -1))
        assert max(clean) > clean[-1] + 0.03
        assert max(far) > far[0] + 0.4


@pytest.mark.parametrize("family", mnist_trade_off.LOSSES)
def test_both_ends_of_the_trade_off_are_in_the_grid(family: str) -> None:
    rows = [r for r in records.read("mnist_trade_off").results["rows"] if r["family"] == family]
    clean, far = ([row["certified"][at] for row in rows] for at in (0, -1))
    best = far.index(max(far))
    assert far[: best + 1] == sorted(far[: best + 1])
    assert best <= len(far) - 3  # two marks farther certify less, and ever less
    assert far[best] - 0.015 > far[best + 1] > far[best + 2]
    assert clean.index(max(clean)) > 0
    if family != "offset cross-entropy":  # at the offset 0 that is a tempered one
        assert max(clean) > clean[0] + 0.004


def test_a_short_training_shows_the_trade_off() -> None:
    digits = mnist()
    few = Mnist(*(t[:4000] for t in digits[:2]), *(t[::4] for t in digits[2:]))
    short = {"width": 64, "epochs": 4, "precision": "float32", "validation": 500}
    small, large = (
        mnist_trade_off.row(few, "offset cross-entropy", radius, **short)[0]["certified"]
        for radius in (0.3, 2.5)
    )
    assert small[0] > large[0]
    assert small[-1] < large[-1]


def test_the_gallery_has_both_budgets_from_three_seeds() -> None:
    results = records.read("convolution_gallery").results
    rows = {(r["layer"], r["steps"], r["seed"]): r["certified"] for r in results["rows"]}
    assert len(rows) == len(results["rows"])
    digits = mnist()
    for layer, (_, cost) in convolution_gallery.LAYERS.items():
        for steps in {results["budget"], int(results["budget"] / cost)}:
            assert {(layer, steps, seed) for seed in range(3)} <= set(rows)
    again = convolution_gallery.row(digits, "SOC", 12, seed=1)[0]
    assert again["certified"] == pytest.approx(rows["SOC", 12, 1], abs=2e-3)
    assert torch.get_default_dtype() == torch.float32


def test_larger_groups_help_in_the_infinity_norm() -> None:
    rows = records.read("mnist_infinity").results["rows"]
    assert {(r["radius"], r["group_size"]) for r in rows} == {
        (radius, size) for radius in mnist_infinity.RADII for size in mnist_infinity.GROUP_SIZES
    }
    for radius in mnist_infinity.RADII:
        pairs, groups = (r["test"]["certified"][-1] for r in rows if r["radius"] == radius)
        assert pairs < groups
    digits = mnist()
    few = Mnist(*(t[:1000] for t in digits[:2]), *(t[::10] for t in digits[2:]))
    short = {"width": 32, "epochs": 5, "validation": 100, "attack": 50}
    results, tensors = mnist_infinity.row(few, 0.1, 2, **short)
    assert results["test"]["clean"] > 0.3
    assert tensors["1.weight"].float().abs().sum(1).max() <= 1 + 1e-3


# ----------------------------------------------------------------------------- infinity_norm


@pytest.mark.parametrize("method", infinity_norm.METHODS)
def test_networks_for_the_infinity_norm_learn_and_are_certified(method: str) -> None:
    digits = few_digits()
    parts = digits[:2], digits[2:], digits[2:]
    sizes = {"lr": 0.01, "budget": 40, "attack": 20, "steps": 3, "clock": ticking()}
    results, _ = infinity_norm.row(method, *parts, **sizes)
    clean, *far = results["certified"]
    assert clean > 0.25
    assert clean >= far[0] >= far[1]
    assert results["count"] == 50
    pairs = zip(results["certified_of_attacked"], results["attacked"], strict=True)
    assert all(low <= high for low, high in pairs)


def test_intervals_certify_what_enumeration_does() -> None:
    """Three pixels, one hidden layer: the corners of the box attain the interval of a unit."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    model.double().requires_grad_(False)
    images = torch.rand(40, 3, dtype=torch.float64)
    labels = model(images).argmax(1)
    for epsilon in (0.05, 0.2, 0.6):
        found = infinity_norm.certified_by_intervals(model, images, labels, epsilon)
        low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
        corners = torch.tensor([*itertools.product([False, True], repeat=3)])
        points = torch.where(corners[:, None], high, low)
        hidden = model[:2](points)  # monotone in each pixel, so that corners have the extremes
        least, largest = hidden.amin(0), hidden.amax(0)
        rows = model[2].weight[labels][:, None] - model[2].weight
        ends = torch.where(rows > 0, least[:, None], largest[:, None])
        margins = (rows * ends).sum(-1) + model[2].bias[labels][:, None] - model[2].bias
        expected = (margins.scatter(1, labels[:, None], math.inf) > 0).all(1)
        assert torch.equal(found, expected)
        assert (model(points[:, found]).argmax(-1) == labels[found]).all()
    assert found.sum() < 40


def test_a_training_for_the_infinity_norm_ends_with_its_time() -> None:
    images, labels = (part[:300] for part in few_digits()[:2])
    images = images[..., 2:26, 2:26]
    model = infinity_norm.network("∞-distances", images)
    spent = []

    def loss(layers: torch.nn.Module, x: Tensor, labels: Tensor, share: float) -> Tensor:
        spent.append(share)
        return layers(x).sum()

    sizes: dict[str, Any] = {"lr": 0.1, "batch": 100, "loss": loss}
    epochs = infinity_norm.train(model, images, labels, seconds=5, clock=ticking(), **sizes)
    assert spent == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert epochs == pytest.approx(4 / 3)
    assert not model.training
    with pytest.raises(ValueError, match="images: expected 100 or more, got 99"):
        infinity_norm.train(model, images[:99], labels[:99], seconds=5, **sizes)
    with pytest.raises(ValueError, match="seconds: expected a positive number, got 0"):
        infinity_norm.train(model, images, labels, seconds=0, **sizes)
    with pytest.raises(ValueError, match=r"method: expected one of .* got 'SVM'"):
        infinity_norm.network("SVM", images)


def test_the_record_of_the_infinity_norm_keeps_budgets_and_choices() -> None:
    record = records.read("infinity_norm")
    tried, rows = record.results["tried"], record.results["rows"]
    assert record.results["epsilons"] == list(infinity_norm.EPSILONS)
    budget = record.results["budget"]
    assert budget == infinity_norm.BUDGET
    # Pooling the digits once is not in the budget.
    assert all(budget <= row["seconds"] <= 1.15 * budget for row in [*tried, *rows])
    assert {row["seed"] for row in rows} == set(range(infinity_norm.SEEDS))
    found = infinity_norm.entries(record)
    for method, entry in found.items():
        mine = {row["lr"]: row["validation"] for row in tried if row["method"] == method}
        assert [*mine] == [*infinity_norm.RATES]
        assert entry["lr"] == max(mine, key=lambda lr: mine[lr][0] + mine[lr][-1])
    for row in rows:
        assert row["count"] == 10_000
        assert row["attack_count"] == 500
        assert row["certified"] == sorted(row["certified"], reverse=True)
        pairs = zip(row["certified_of_attacked"], row["attacked"], strict=True)
        assert all(low <= high for low, high in pairs)
    with pytest.raises(ValueError, match="expected each of the seeds"):
        infinity_norm.entries(
            dataclasses.replace(record, results={**record.results, "rows": rows[1:]})
        )


# ----------------------------------------------------------------------------- deep_networks


@pytest.mark.parametrize("activation", deep_networks.ACTIVATIONS)
@pytest.mark.parametrize("way", deep_networks.WAYS)
def test_deep_networks_are_1_lipschitz_and_learn(way: str, activation: str) -> None:
    digits = mnist()
    few = tuple(t[:640] for t in digits[:2])
    model = deep_networks.fit(way, activation, 3, *few, lr=0.01, epochs=4)
    assert 0.9 < lipschitz_bound(model, (1, 28, 28)).value <= 1 + 1e-5
    assert accuracy(model, *(t[::10] for t in digits[2:])) > 0.5


def test_deep_networks_begin_as_they_say() -> None:
    """The norm of a hidden state: kept by a chain, and by averages that begin at 1 / depth."""
    x = torch.randn(64, 1, 28, 28)
    loss = {}
    for way in deep_networks.WAYS:
        torch.manual_seed(0)
        model = deep_networks.network(way, "MaxMin", 50).eval()
        with torch.no_grad():
            first = model[1](model[0](x))
            loss[way] = (model[2:-1](first).norm() / first.norm()).item()
    assert loss["chain"] == pytest.approx(1, abs=0.5)  # biases add to it
    assert loss["chain from I"] == pytest.approx(1, abs=0.5)
    assert 0.2 < loss["average"] < 0.8
    with pytest.raises(ValueError, match="way: expected one of"):
        deep_networks.network("ladder", "ReLU", 3)
    with pytest.raises(ValueError, match="activation: expected one of"):
        deep_networks.network("chain", "GELU", 3)


def test_deep_networks_choose_on_held_out_digits_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(
        way: str, activation: str, depth: int, fitted: Any, judges: Any, **given: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked.append((fitted, judges))
        score = 1 - abs(math.log(given["lr"] / (0.01 if way == "average" else 0.1)))
        marks = {"clean": score, "certified": score, "slope": given["seed"]}
        cell = {"way": way, "activation": activation, "depth": depth}
        return cell | given | {"validation": marks, "test": marks}, {}

    few = few_digits()
    monkeypatch.setattr(deep_networks, "mnist", lambda: few)
    monkeypatch.setattr(deep_networks, "row", measured)
    sizes: dict[str, Any] = {
        "depths": (2,), "rates": (0.01, 0.1), "train_count": 1000, "validation": 300,
        "rows": Rows(tmp_path),
    }  # fmt: skip
    results, _ = deep_networks.run(**sizes)
    assert deep_networks.run(**sizes)[0] == results
    assert len(asked) == 8 * 4
    for (images, _), ((held_out, _), (test, _)) in asked:
        assert (len(images), len(held_out)) == (1000, 300)
        both = torch.cat([images, held_out]).flatten(1)
        assert len(both.unique(dim=0)) == 1300  # of 1,500 different digits
        assert test is few.test_images
    assert {(r["way"] == "average", r["lr"]) for r in results["rows"]} == {(1, 0.01), (0, 0.1)}
    made = records.facts("lipbook reproduce deep_networks", 0, 1.0)
    found = deep_networks.summary(records.Record("deep_networks", made, results))
    assert found["average", "ReLU", 2]["slope"] == (1, 1)
    assert len(found) == 8


def test_the_record_of_the_deep_networks_follows_from_its_trials() -> None:
    record = records.read("deep_networks")
    best: dict[Any, Any] = {}
    for one in record.results["tried"]:
        score = one["validation"]["clean"] + one["validation"]["certified"]
        cell = one["way"], one["activation"], one["depth"]
        best[cell] = max(best.get(cell, (-1.0, 0.0)), (score, -one["lr"]))
    found = deep_networks.summary(record)
    assert set(found) == set(best)
    assert len(found) == len(deep_networks.WAYS) * 2 * len(deep_networks.DEPTHS)
    assert all(found[cell]["lr"] == -best[cell][1] for cell in found)
    seeds = [(r["way"], r["activation"], r["depth"], r["seed"]) for r in record.results["rows"]]
    assert len(set(seeds)) == len(seeds) == 3 * len(found)
    # The chain keeps norms of gradients at any depth; ReLU does not, and averages do in part.
    assert found["chain", "MaxMin", 50]["slope"][0] > 1 - 1e-4
    assert found["chain", "ReLU", 50]["slope"][0] < 1e-3


def test_a_row_of_the_deep_networks_comes_again() -> None:
    record = records.read("deep_networks")
    one = next(r for r in record.results["rows"] if (r["way"], r["depth"]) == ("average", 10))
    digits = mnist()
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(12_000))[:2560]
    fitted = digits.train_images[order], digits.train_labels[order]
    model = deep_networks.fit("average", one["activation"], 10, *fitted, lr=one["lr"], seed=0)
    assert abs(accuracy(model, *digits[2:]) - one["test"]["clean"]) < 0.02


def colours(n: int) -> Cifar10:
    rng = np.random.default_rng(0)
    labels = torch.arange(n) % 10
    images = torch.from_numpy(rng.random((n, 3, 32, 32), np.float32))
    images[:, 0] = (images[:, 0] + labels.view(-1, 1, 1)) / 10
    return Cifar10(images, labels, images[:20], labels[:20], "made up")


@pytest.mark.parametrize("architecture", ["small", "wide", "shift"])
def test_all_networks_for_colours_train_and_resume(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the Large network's two widths one; the true sizes are test_networks' matter."""
    narrow = functools.partial(networks._ARCHITECTURES["large"], width=6)
    monkeypatch.setitem(networks._ARCHITECTURES, "wide", narrow)
    monkeypatch.setattr(networks, "WIDE", 6)
    monkeypatch.setattr(networks, "SHIFT", (16, 16))
    data = colours(90)
    monkeypatch.setattr(cifar10, "cifar10", lambda jpeg: data)
    monkeypatch.setattr(cifar10, "KEPT", 10)
    fit = functools.partial(cifar10.fit, data, validation=20, batch_size=35)
    monkeypatch.setattr(cifar10, "fit", lambda _, architecture, **sizes: fit(architecture, **sizes))
    sizes = {"architecture": architecture, "precision": "float32", "attack": 5}
    results, tensors = cifar10.run(epochs=2, rows=Rows(tmp_path), **sizes)
    assert (tmp_path / "training.checkpoint").exists()
    assert results["data"] == "made up"
    assert ("networks" in results) == (architecture == "small")
    assert tensors["data/images"].shape == (10, 3, 32, 32)
    again, _ = cifar10.run(epochs=2, rows=Rows(tmp_path), **sizes)  # from the checkpoint
    assert again == results
    with pytest.raises(ValueError, match="architecture must be one of"):
        cifar10.run(epochs=2, **(sizes | {"architecture": "huge"}))


def test_the_best_network_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = mnist()
    few = Mnist(*(t[:1500] for t in digits[:2]), *(t[::40] for t in digits[2:]))
    monkeypatch.setattr(mnist_best, "mnist", lambda full=False: few)
    fit = functools.partial(mnist_best.fit, validation=200)
    monkeypatch.setattr(mnist_best, "fit", fit)
    sizes = {"width": 32, "depth": 2, "epochs": 4, "precision": "float32", "attack": 3}
    results, _ = mnist_best.run(rows=Rows(tmp_path), **sizes)
    assert results["test"]["clean"] > 0.6
    assert mnist_best.run(rows=Rows(tmp_path), **sizes)[0] == results


def few_digits() -> Mnist:
    digits = mnist()
    return Mnist(*(t[:1500] for t in digits[:2]), *(t[::40] for t in digits[2:]))


SPRINTS = {
    1: tuple(speedrun.Setting(*sizes, 1.0, batch_size=64) for sizes in ((32, 2, 8), (16, 2, 1))),
    2: (speedrun.Setting(32, 3, 8, 1.0, batch_size=64),),
}


def test_the_speedrun_runs_on_a_few_digits_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = few_digits()
    monkeypatch.setattr(speedrun, "mnist", lambda full=False: few)
    sizes: dict[str, Any] = {
        "budgets": (1, 2), "candidates": SPRINTS, "validation": 300, "attack": 10,
        "precision": "float32", "rows": Rows(tmp_path),
    }  # fmt: skip
    results, tensors = speedrun.run(**sizes)
    assert speedrun.run(**sizes)[0] == results
    # the setting that is better on the validation digits was trained, from five seeds
    assert [one["count"] for one in results["judged"]] == [300, 300, 300]
    better, worse = (one["clean"] + one["certified"] for one in results["judged"][:2])
    assert better > worse
    made = records.facts("lipbook reproduce speedrun", 0, 1.0)
    record = records.Record("speedrun", made, results, tensors)
    first, second = speedrun.entries(record)
    assert (first.budget, first.setting, first.seeds) == (1, SPRINTS[1][0], (0, 1, 2, 3, 4))
    assert (second.budget, second.setting, second.within) == (2, SPRINTS[2][0], True)
    values = [row["test"]["certified"][0] for row in results["rows"] if row["budget"] == 1]
    assert first.certified == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert first.certified_of_attacked <= first.attacked <= 1
    assert first.clean[0] > 0.8
    assert networks.rebuilt("dense", ([784, 32, 32, 10],), tensors)


def test_a_budget_that_nothing_meets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = few_digits()
    monkeypatch.setattr(speedrun, "mnist", lambda full=False: few)
    slow = {0: (speedrun.Setting(16, 1, 1, 1.0, batch_size=64),)}
    with pytest.raises(ValueError, match="candidates: no training took at most 0 seconds here"):
        speedrun.run(budgets=(0,), candidates=slow, validation=300, precision="float32")


def test_a_setting_is_judged_on_training_digits_that_it_has_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}
    images, labels = few_digits()[:2]

    def fit(given: Tensor, given_labels: Tensor, **sizes: Any) -> torch.nn.Sequential:
        seen["fitted"] = given
        return networks.dense((784, 10)).eval()

    def certificate(model: object, given: Tensor, *_: object, sound: bool) -> Any:
        seen["held out"] = given
        return real(model, given, *_, sound=sound)

    real = speedrun.certificate
    monkeypatch.setattr(speedrun, "fit", fit)
    monkeypatch.setattr(speedrun, "certificate", certificate)
    speedrun.judge(images, labels, SPRINTS[2][0], validation=300, seed=3)
    assert len(seen["held out"]) == 300
    together, whole = (
        sorted(map(bytes, part.flatten(1).numpy()))
        for part in (torch.cat([seen["fitted"], seen["held out"]]), images)
    )
    assert together == whole  # each digit once
    drawn = set(map(bytes, seen["held out"].flatten(1).numpy()))
    for edge in (images[:300], images[-300:]):  # a random draw has a fifth of each
        assert 30 < len(drawn & set(map(bytes, edge.flatten(1).numpy()))) < 90


def test_the_speedrun_refuses_other_digits_and_names() -> None:
    digits = few_digits()
    with pytest.raises(TypeError, match=r"validation: expected a number .* cannot choose"):
        speedrun.judge(*digits[:2], SPRINTS[2][0], validation=digits[2:])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="validation: expected a number of the 1500 training dig"):
        speedrun.judge(*digits[:2], SPRINTS[2][0], validation=1500)
    with pytest.raises(ValueError, match=r"loss: expected one of .*'multi-margin'.* got 'hinge'"):
        speedrun.Setting(32, 2, 8, 1.0, loss="hinge")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts, rows: facts.update(hardware=" "), "no hardware"),
        (lambda facts, rows: rows[0].pop("seed"), r"a row has no \['seed'\]"),
        (lambda facts, rows: rows[0].pop("budget"), r"a row has no \['budget'\]"),
        (lambda facts, rows: rows[0].pop("seconds"), r"a row has no \['seconds'\]"),
        (lambda facts, rows: rows.pop(0), "expected 5 seeds or more for 15 seconds, each once"),
        (lambda facts, rows: rows[0].update(seed=1), "expected 5 seeds or more for 15 seconds"),
        (lambda facts, rows: rows.append(rows[0]), r"each once, got \[0, 1, 2, 3, 4, 0\]"),
        (lambda facts, rows: rows[0]["setting"].update(epochs=99), "expected one setting for 15"),
    ],
)
def test_numbers_without_budget_seeds_or_hardware_do_not_load(
    change: Callable[[dict[str, Any], list[dict[str, Any]]], object], words: str
) -> None:
    record = copy.deepcopy(records.read("speedrun"))
    assert speedrun.entries(record)
    change(record.facts, record.results["rows"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        speedrun.entries(record)


@pytest.mark.parametrize("fact", ["hardware", "seed", "versions"])
def test_a_record_of_the_speedrun_without_its_facts_does_not_load(
    fact: str, tmp_path: Path
) -> None:
    record = records.read("speedrun", tensors=False)
    content = {"results": record.results, "tensors": None}
    facts = {key: value for key, value in record.facts.items() if key != fact}
    (tmp_path / "speedrun.json").write_text(json.dumps(content | {"facts": facts}))
    with pytest.raises(ValueError, match=f"no .*{fact}"):
        records.read("speedrun", tmp_path)


def test_the_settings_of_the_speedrun_are_the_best_on_validation_digits() -> None:
    record = records.read("speedrun")
    for entry in speedrun.entries(record):
        judged = [one for one in record.results["judged"] if one["budget"] == entry.budget]
        assert [speedrun.Setting(**one["setting"]) for one in judged] == list(
            speedrun.CANDIDATES[entry.budget]
        )
        held_out = judged[0]["count"] / 60_000
        fit = [one for one in judged if one["seconds"] <= entry.budget * (1 - held_out)]
        best = max(fit, key=lambda one: one["clean"] + one["certified"])
        assert entry.setting == speedrun.Setting(**best["setting"])
        assert entry.within
        assert all(one["test"]["count"] == 10_000 for one in record.results["rows"])


# ---------------------------------------------------------------------------- speedrun_cifar10


def few_images() -> Cifar10:
    rng = np.random.default_rng(0)
    labels = torch.arange(480) % 10
    images = torch.from_numpy(0.2 * rng.random((480, 3, 8, 8))).float()
    images += torch.from_numpy(rng.random((10, 3, 1, 1)) * 0.8).float()[labels]
    return Cifar10(images[:400], labels[:400], images[400:], labels[400:], "patches")


LIVELY = speedrun_cifar10.Setting([[16, 2, 1], [16, 2, 1]], batch_size=32)
SPRINTING = (dataclasses.replace(LIVELY, lr=1e-4), LIVELY)


def test_the_speedrun_on_colours_chooses_on_held_out_images_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, seen = few_images(), []

    def fit(images: Tensor, *rest: Any, **sizes: Any) -> Any:
        seen.append((images, sizes["epochs"], sizes["seed"]))
        return real(images, *rest, **sizes)

    real = speedrun_cifar10.fit
    monkeypatch.setattr(speedrun_cifar10, "cifar10", lambda jpeg: few)
    monkeypatch.setattr(speedrun_cifar10, "fit", fit)
    sizes: dict[str, Any] = {
        "candidates": SPRINTING, "epochs": 4, "short": 2, "validation": 80, "attack": 4,
        "precision": "float32", "rows": Rows(tmp_path),
    }  # fmt: skip
    results, tensors = speedrun_cifar10.run(**sizes)
    assert speedrun_cifar10.run(**sizes) == (results, tensors)
    worse, better = (one["clean"] + one["certified"] for one in results["judged"])
    assert worse < better
    assert [one[1:] for one in seen] == [(2, 0), (2, 0), *((4, seed) for seed in range(5))]
    whole = {*map(bytes, few.train_images.flatten(1).numpy())}
    held_out, fitted = waterfall.halves(*few[:2], 80, 0)
    for images, *_ in seen[:2]:
        assert torch.equal(images, fitted[0])
        assert {*map(bytes, held_out[0].flatten(1).numpy())} == whole - {
            *map(bytes, images.flatten(1).numpy())
        }
    assert all(images is few.train_images for images, *_ in seen[2:])
    made = records.facts("lipbook reproduce speedrun_cifar10", 0, 1.0)
    found = speedrun_cifar10.entry(records.Record("speedrun_cifar10", made, results, tensors))
    assert (found.setting, found.epochs, found.seeds) == (LIVELY, 4, (0, 1, 2, 3, 4))
    assert found.within
    values = [one["test"]["certified"][0] for one in results["rows"]]
    assert found.certified == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert 0.4 < found.certified[0] <= found.clean[0]
    assert found.certified_of_attacked <= found.attacked


def test_the_record_of_the_speedrun_on_colours_keeps_its_budget_and_its_choice() -> None:
    record = records.read("speedrun_cifar10")
    results, found = record.results, speedrun_cifar10.entry(record)
    judged = {
        speedrun_cifar10.Setting(**one["setting"]): one["clean"] + one["certified"]
        for one in results["judged"]
    }
    assert (*judged,) == speedrun_cifar10.CANDIDATES
    assert found.setting == max(judged, key=lambda setting: judged[setting])
    assert all(
        (one["count"], one["epochs"]) == (5000, speedrun_cifar10.SHORT) for one in results["judged"]
    )
    assert found.epochs == speedrun_cifar10.EPOCHS
    assert found.within
    assert results["budget"] == speedrun_cifar10.BUDGET
    for one in results["rows"]:
        test = one["test"]
        assert test["count"] == 10_000
        assert test["epsilons"] == pytest.approx([speedrun_cifar10.EPSILON])
        assert test["certified_of_attacked"][0] <= test["attacked"][0]
        for share in (test["clean"], *test["certified"]):  # a number of images
            assert share * 10_000 == pytest.approx(round(share * 10_000))
    assert found.seconds * len(found.seeds) < record.facts["seconds"]
    reached = (found.clean[0], found.certified[0])  # above the Small network, below the Large one
    assert all(low < mean for low, mean in zip(results["published"]["small"], reached, strict=True))
    large = results["published"]["large"]
    assert all(high > mean + 0.02 for high, mean in zip(large, reached, strict=True))


def test_a_few_steps_of_the_speedrun_on_colours_learn_images_that_ship() -> None:
    """With the setting of the record; what is certified is less, and the norms are 1."""
    found = speedrun_cifar10.entry(records.read("speedrun_cifar10"))
    images, labels = networks.data("cifar10")
    setting = dataclasses.replace(found.setting, batch_size=96)
    model = setting.fit(images[:192], labels[:192], 8, "float32", 0)
    bound = lipschitz_bound(torch.nn.Sequential(*model[:-1]), (3, 32, 32))
    assert bound.value == pytest.approx(1, abs=1e-5)  # eleven layers, a millionth each
    learnt = certificate(model, images[:192], labels[:192])
    clean, certified = (
        learnt.certified_accuracy(epsilon).value for epsilon in (0, speedrun_cifar10.EPSILON)
    )
    assert 0.05 < certified < clean
    assert clean > 0.2


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows[0].update(seed=1),
        lambda rows: rows[0].update(epochs=99),
        lambda rows: rows[0]["setting"].update(lr=0.01),
    ],
)
def test_a_speedrun_on_colours_without_all_its_rows_is_refused(
    change: Callable[[list[dict[str, Any]]], object],
) -> None:
    record = copy.deepcopy(records.read("speedrun_cifar10"))
    change(record.results["rows"])
    with pytest.raises(ValueError, match="expected 5 seeds or more, each once, at one setting"):
        speedrun_cifar10.entry(record)


SHORT = dict.fromkeys(itertools.product(*[*ablation.FACTORS.values()][::2]), 3)


def test_an_ablation_chooses_on_held_out_digits_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a training that tells what it is given, and scores that are known."""
    few = few_digits()
    asked = []

    def measured(
        cell: ablation.Cell, fitted: Any, judges: Any, sound: bool, *setting: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked.append((cell, fitted, judges, sound, setting))
        lr, radius, epochs, _, seed = setting
        score = 0.4 - abs(math.log10(lr / best[cell.optimiser])) / 10 - abs(radius - 1.2) / 10
        sizes = {"lr": lr, "radius": radius, "epochs": epochs, "seed": seed, "seconds": 1.0}
        return dataclasses.asdict(cell) | sizes | {"clean": score, "certified": score}, {}

    best = {"Adam": 0.01, "StiefelMuon": 0.32}
    monkeypatch.setattr(ablation, "mnist", lambda full=False: few)
    monkeypatch.setattr(ablation, "_measured", measured)
    sizes: dict[str, Any] = {"epochs": SHORT, "validation": 300, "rows": Rows(tmp_path)}
    results, tensors = ablation.run(**sizes)
    count = len(asked)
    assert ablation.run(**sizes) == (results, tensors)
    assert len(asked) == count == 8 * 5 + 16 * 3
    for row in results["rows"]:
        assert (row["lr"], row["radius"], row["epochs"]) == (best[row["optimiser"]], 1.2, 3)
    whole = sorted(map(bytes, few.train_images.flatten(1).numpy()))
    for cell, (fitted, _), (judging, _), sound, setting in asked:
        assert len(fitted) == 1200
        if sound:  # the test digits judge what was chosen
            assert judging is few.test_images
            assert setting[:2] == (best[cell.optimiser], 1.2)
        else:
            together = torch.cat([fitted, judging]).flatten(1)
            assert sorted(map(bytes, together.numpy())) == whole
            assert setting[2:] == (3, "bfloat16", 0)
            assert cell.augmentation == "none"
    made = records.facts("lipbook reproduce ablation", 0, 1.0)
    entries = ablation.entries(records.Record("ablation", made, results))
    assert {(entry.cell, entry.seconds) for entry in entries} == {(c, 1.0) for c, *_ in asked[40:]}


@pytest.mark.parametrize("optimiser", ablation.FACTORS["optimiser"])
@pytest.mark.parametrize("architecture", ablation.FACTORS["architecture"])
def test_a_cell_of_the_ablation_learns_and_keeps_its_norms(
    architecture: str, optimiser: str
) -> None:
    digits = few_digits()
    given: dict[str, Any] = {
        "lr": {"Adam": 0.03, "StiefelMuon": 0.16}[optimiser], "radius": 1.5,
        "epochs": 5, "precision": "float32",
    }  # fmt: skip
    cell = ablation.Cell(architecture, "offset cross-entropy", optimiser, "small distortions")
    results, _ = ablation.row(cell, digits[:2], digits[2:], **given)
    assert results["clean"] > 0.75
    assert 0 < results["certified"] < results["clean"]
    model = ablation.fit(cell, *digits[:2], **given | {"epochs": 1})
    assert not any(is_parametrized(layer) for layer in model)
    assert math.isclose(lipschitz_bound(model.double(), (1, 28, 28)).value, 1, rel_tol=1e-5)


def test_effects_of_the_ablation_are_those_of_least_squares() -> None:
    """The coefficients of a regression on -1 and 1, by NumPy, for each seed."""
    record = records.read("ablation")
    rows = record.results["rows"]
    for factors in (("loss",), ("optimiser", "augmentation"), (*ablation.FACTORS,)):
        for measure, found in zip(
            ("clean", "certified"), ablation.contrast(record, *factors), strict=True
        ):
            estimates = []
            for seed in range(ablation.SEEDS):
                mine = [row for row in rows if row["seed"] == seed]
                levels = np.array([
                    [2 * both.index(row[factor]) - 1 for factor, both in ablation.FACTORS.items()]
                    for row in mine
                ])  # fmt: skip
                subsets = [
                    s for k in range(5) for s in itertools.combinations(range(len(levels[0])), k)
                ]
                design = np.stack([levels[:, list(s)].prod(1) for s in subsets], 1)
                fit = np.linalg.lstsq(design, [row[measure] for row in mine], rcond=None)[0]
                which = tuple(sorted([*ablation.FACTORS].index(factor) for factor in factors))
                estimates.append(2 ** len(factors) * fit[subsets.index(which)])
            assert found == pytest.approx((np.mean(estimates), np.std(estimates, ddof=1)))


def test_the_record_of_the_ablation_has_the_choices_of_its_validation_digits() -> None:
    record = records.read("ablation")
    assert {row["count"] for row in record.results["judged"]} == {5000}
    assert {row["count"] for row in record.results["rows"]} == {10_000}
    assert {row["seed"] for row in record.results["rows"]} == set(range(ablation.SEEDS))
    for entry in ablation.entries(record):
        cell = dataclasses.replace(entry.cell, augmentation="none")
        mine = [
            row
            for row in record.results["judged"]
            if dataclasses.asdict(cell).items() <= row.items()
        ]
        score = {(row["lr"], row["radius"]): row["clean"] + row["certified"] for row in mine}
        assert {lr for lr, _ in score} == set(ablation.RATES[cell.optimiser])
        assert {radius for _, radius in score} == set(ablation.RADII)
        assert len(score) == 5
        assert score[entry.lr, entry.radius] == max(
            value for (lr, _), value in score.items() if lr == entry.lr
        )
        assert score[entry.lr, 1.8] == max(
            value for (_, radius), value in score.items() if radius == 1.8
        )
        assert entry.epochs == ablation.EPOCHS[cell.architecture, cell.optimiser]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: rows.pop(),
            r"expected each of the seeds \[0, 1, 2\] once for Cell.*\[0, 1\]",
        ),
        (lambda rows: rows.append(rows[0]), r"each of the seeds .* once .* got \[0, 0, 1, 2\]"),
        (lambda rows: rows[0].update(lr=9.0), "expected one setting for Cell"),
        (lambda rows: rows[0].update(loss="hinge"), "loss: expected one of .* got 'hinge'"),
    ],
)
def test_an_ablation_without_all_its_rows_is_refused(
    change: Callable[[list[dict[str, Any]]], object], words: str
) -> None:
    record = copy.deepcopy(records.read("ablation"))
    change(record.results["rows"])
    with pytest.raises(ValueError, match=words):
        ablation.entries(record)


@pytest.mark.parametrize("factors", [(), ("rate",), ("loss", "loss")])
def test_contrasts_of_no_factors_are_refused(factors: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"factors: expected some of .*each once, got"):
        ablation.contrast(records.read("ablation"), *factors)


def test_an_ablation_needs_validation_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "mnist", lambda full=False: few_digits())
    for validation in (0, 1500):
        with pytest.raises(ValueError, match="validation: expected a number of the 1500 training"):
            ablation.run(validation=validation)


PARTS = [
    dict(zip(("relu", "adam", "orthonormal"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=3)
]


def by_hand(raw: list[Tensor], biases: list[Tensor], x: Tensor, parts: dict[str, bool]) -> Tensor:
    """The network of the waterfall from the parameters of Adam, by torch's QR, differentiable."""
    length = 1.0 if parts["orthonormal"] else math.sqrt((len(raw[-1]) - 1) / len(raw[-1]))
    for layer, (parameter, bias) in enumerate(zip(raw, biases, strict=True)):
        last = layer == len(raw) - 1
        if last and not parts["orthonormal"]:
            weight = length * parameter / parameter.norm(dim=1, keepdim=True)
        else:
            wide = parameter.shape[0] < parameter.shape[1]
            q, r = torch.linalg.qr(parameter.T if wide else parameter)
            weight = q * r.diagonal().sign()
            weight = weight.T if wide else weight
        x = x @ weight.T + bias
        half = weight.shape[0] // 2
        if not last and parts["relu"]:
            x = x.relu()
        elif not last:
            x = torch.cat([x[:, :half].abs(), x[:, half:]], 1)
    return x


@pytest.mark.parametrize("parts", PARTS)
def test_a_varied_net_computes_what_its_network_does(parts: dict[str, bool]) -> None:
    net = waterfall.VariedNet((12, 8, 8, 5), 0, torch.float64, **parts)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 12)))
    for _ in range(5):
        inputs, signs, logits = net.forward(x.T)
        weights, biases = net.gradients(inputs, signs, logits.sin())
        net.step(weights, biases, 0.05, 1.0)
    model = net.network()
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in model) == 2 * parts["relu"]
    linear = [layer.weight.double() for layer in model if isinstance(layer, torch.nn.Linear)]
    kept = linear if parts["orthonormal"] else linear[:-1]
    assert all((w @ w.T - torch.eye(len(w))).abs().max() < 1e-6 for w in kept)
    if not parts["orthonormal"]:
        assert torch.allclose(linear[-1].square().sum(1), torch.tensor(0.8).double())
    given = net.forward(x.T)[2].T
    close = 1e-6 if parts["adam"] else 0.02  # the weights of rough steps are not orthonormal yet
    assert (model.double()(x) - given).abs().max() < close * given.abs().max()


@pytest.mark.parametrize("parts", [parts for parts in PARTS if parts["adam"]])
def test_steps_with_adam_are_those_of_torch(parts: dict[str, bool]) -> None:
    net = waterfall.VariedNet((12, 8, 8, 5), 0, torch.float64, **parts)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 12)))
    labels = torch.arange(20) % 5
    loss = speedrun.LOSSES["offset cross-entropy"][0](1.0)
    raw, biases = (
        [part.detach().clone().requires_grad_() for part in parts]
        for parts in (net.raw, net.biases)
    )
    descent = torch.optim.Adam([*raw, *biases], lr=0.05)
    for _ in range(4):
        inputs, signs, logits = net.forward(x.T)
        leaf = logits.T.clone().requires_grad_()
        (outer,) = torch.autograd.grad(loss(leaf, labels), leaf)
        net.step(*net.gradients(inputs, signs, outer.T), 0.05, 1.0)
        descent.zero_grad()
        loss(by_hand(raw, biases, x, parts), labels).backward()
        descent.step()
    with torch.no_grad():
        assert torch.allclose(net.forward(x.T)[2].T, by_hand(raw, biases, x, parts))


def test_the_waterfall_chooses_on_held_out_digits_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a training that tells what it is given, and scores that are known."""
    few = few_digits()
    asked = []

    def told(
        change: str, fitted: Any, judges: Any, *, sound: bool = True, seed: int, **numbers: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked.append((change, fitted, judges, sound, numbers))
        assert numbers.pop("precision") == "float32"
        radius, lr = numbers.get("radius", 0.9), numbers.get("lr", 0.03)
        clean = 0.9 + 0.01 * radius
        certified = 0.5 - abs(math.log10(lr / 0.03)) + radius * (4 - radius)
        return {
            "change": change, "numbers": numbers, "epochs": 4, "seed": seed, "seconds": 1.0,
            "clean": clean, "certified": certified,
        }, {}  # fmt: skip

    monkeypatch.setattr(waterfall, "mnist", lambda full=False: few)
    monkeypatch.setattr(waterfall, "row", told)
    sizes: dict[str, Any] = {"validation": 300, "precision": "float32", "rows": Rows(tmp_path)}
    results, tensors = waterfall.run(**sizes)
    count = len(asked)
    assert waterfall.run(**sizes) == (results, tensors)
    assert len(asked) == count == 1 + 3 + 4 + 5 + waterfall.SEEDS * len(waterfall.CHANGES)
    whole = sorted(map(bytes, few.train_images.flatten(1).numpy()))
    best = {"Adam": {"lr": 0.03}, "hinge": {"radius": 0.85}}
    best["all of these"] = {"lr": 0.03, "radius": 1.9}
    for change, (fitted, _), (judging, _), sound, numbers in asked:
        if sound:  # the test digits judge what was chosen
            assert judging is few.test_images
            assert fitted is few.train_images
            assert numbers == best.get(change, {})
        else:
            together = torch.cat([fitted, judging]).flatten(1)
            assert sorted(map(bytes, together.numpy())) == whole
            assert len(judging) == 300
    made = records.facts("lipbook reproduce waterfall", 0, 1.0)
    record = records.Record("waterfall", made, results)
    assert [*waterfall.entries(record)] == [*waterfall.CHANGES]
    clean, certified = waterfall.difference(record, "hinge")
    assert clean == pytest.approx((-0.0005, 0))
    assert certified == pytest.approx((-0.1125, 0))


def test_a_short_training_shows_what_the_waterfall_says() -> None:
    """Of its largest effects, on the digits that ship."""
    digits = mnist()
    few = [part[:6000] for part in digits[:2]]
    short: dict[str, Any] = {"epochs": 4, "batch_size": 256, "width": 64, "precision": "float32"}
    certified = {
        change: waterfall.row(change, few, digits[2:], **short | numbers)[0]["certified"]
        for change, numbers in (
            ("nothing", {}), ("ReLU", {}), ("all of these", {"lr": 0.01, "radius": 1.0})
        )
    }  # fmt: skip
    assert certified["nothing"] > certified["ReLU"] + 0.03
    assert certified["ReLU"] > certified["all of these"] + 0.03


def test_the_record_of_the_waterfall_has_the_choices_of_its_validation_digits() -> None:
    record = records.read("waterfall")
    assert {row["count"] for row in record.results["judged"]} == {5000}
    assert {row["count"] for row in record.results["rows"]} == {10_000}
    assert {row["seed"] for row in record.results["rows"]} == set(range(waterfall.SEEDS))
    found = waterfall.entries(record)
    finished, *judged = record.results["judged"]
    assert (finished["change"], finished["numbers"]) == ("nothing", {})
    for change, (name, values) in waterfall.CHOICES.items():
        mine = {row["numbers"][name]: row for row in judged if row["change"] == change}
        assert [*mine] == [*values]
        scores = {
            value: -abs(row["clean"] - finished["clean"])
            if change == "hinge"
            else row["clean"] + row["certified"]
            for value, row in mine.items()
        }
        assert found[change].numbers[name] == max(scores, key=lambda value: scores[value])
    assert found["all of these"].numbers["lr"] == found["Adam"].numbers["lr"]
    for change, entry in found.items():
        assert entry.epochs == waterfall.CHANGES[change].get("epochs", waterfall.FINISHED.epochs)
        pairs = zip(waterfall.difference(record, change), ("clean", "certified"), strict=True)
        for (mean, _), measure in pairs:
            less = getattr(found["nothing"], measure)[0]
            assert math.isclose(mean, getattr(entry, measure)[0] - less, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: rows.pop(),
            r"each of the seeds \[0, 1, 2, 3, 4\] once .* got \[0, 1, 2, 3\]",
        ),
        (lambda rows: rows.append(rows[0]), r"once for 'nothing', two at least, got \[0, 0, 1"),
        (lambda rows: rows[0].update(epochs=99), "expected one setting for 'nothing'"),
        (lambda rows: rows[0].update(change="GELU"), "unknown change 'GELU'"),
    ],
)
def test_a_waterfall_without_all_its_rows_is_refused(
    change: Callable[[list[dict[str, Any]]], object], words: str
) -> None:
    record = copy.deepcopy(records.read("waterfall"))
    change(record.results["rows"])
    with pytest.raises(ValueError, match=words):
        waterfall.entries(record)


def test_a_waterfall_of_other_things_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"change: expected one of .* got 'GELU'"):
        waterfall.difference(records.read("waterfall"), "GELU")
    with pytest.raises(ValueError, match=r"activation: expected one of .*'ReLU'.* got 'GELU'"):
        dataclasses.replace(waterfall.FINISHED, activation="GELU")
    monkeypatch.setattr(waterfall, "mnist", lambda full=False: few_digits())
    for validation in (0, 1500):
        with pytest.raises(ValueError, match="validation: expected a number of the 1500 training"):
            waterfall.run(validation=validation)


# -------------------------------------------------------------------------------- equal_budget


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_a_training_ends_with_its_time_at_the_rate_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = (part[:300] for part in mnist()[:2])
    rates, seen = [], []

    class Told(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    model.register_forward_pre_hook(lambda _, given: seen.extend(map(bytes, given[0].numpy())))
    monkeypatch.setattr(torch.optim, "Adam", Told)
    loss = torch.nn.CrossEntropyLoss()
    epochs, seconds = equal_budget.train_for(
        model, images, labels, seconds=5, lr=0.1, loss=loss, clock=ticking()
    )
    assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])
    assert (epochs, seconds) == (2, 5)  # of two batches each
    assert not model.training
    first, second = seen[:256], seen[256:]
    assert len(set(first)) == len(set(second)) == 256  # no digit twice in a pass
    assert first != second
    with pytest.raises(ValueError, match="images: expected 128 or more, got 127"):
        equal_budget.train_for(model, images[:127], labels[:127], seconds=1, lr=0.1, loss=loss)
    with pytest.raises(ValueError, match="seconds: expected a positive number, got 0"):
        equal_budget.train_for(model, images, labels, seconds=0, lr=0.1, loss=loss)


@pytest.mark.parametrize("layer", equal_budget.LAYERS)
def test_a_layer_learns_and_is_certified_by_its_bound(layer: str) -> None:
    digits = few_digits()
    results, _ = equal_budget.row(
        layer, digits[:2], digits[2:], lr=0.01, budget=40, clock=ticking()
    )
    clean, *far = results["certified"]
    assert clean > 0.4
    assert clean >= far[0] >= far[1]
    assert results["epochs"] == pytest.approx(39 / 11)


def test_equal_budgets_choose_on_held_out_digits_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = few_digits()
    asked = []

    def told(
        layer: str, fitted: Any, judges: Any, *, lr: float, budget: float, seed: int, epsilons: Any
    ) -> Any:
        asked.append((layer, fitted, judges, lr))
        score = 0.4 - abs(math.log10(lr / best[layer]))
        return {
            "layer": layer, "lr": lr, "seed": seed, "epochs": 1.0, "seconds": budget,
            "certified": [score, score, score],
        }, {}  # fmt: skip

    best = {layer: 0.003 if layer == "AOL" else 0.01 for layer in equal_budget.LAYERS}
    monkeypatch.setattr(equal_budget, "mnist", lambda full=False: few)
    monkeypatch.setattr(equal_budget, "row", told)
    sizes: dict[str, Any] = {"validation": 300, "rows": Rows(tmp_path)}
    results, tensors = equal_budget.run(**sizes)
    count = len(asked)
    assert equal_budget.run(**sizes) == (results, tensors)
    choices, layers = 4 * len(equal_budget.LAYERS), len(equal_budget.LAYERS)
    assert len(asked) == count == choices + layers * equal_budget.SEEDS
    whole = sorted(map(bytes, few.train_images.flatten(1).numpy()))
    for _, (fitted, _), (judging, _), _ in asked[:choices]:
        together = torch.cat([fitted, judging]).flatten(1)
        assert sorted(map(bytes, together.numpy())) == whole
        assert len(judging) == 300
    for layer, (fitted, _), (judging, _), lr in asked[choices:]:
        assert judging is few.test_images
        assert fitted is few.train_images
        assert lr == best[layer]
    made = records.facts("lipbook reproduce equal_budget", 0, 1.0)
    found = equal_budget.entries(records.Record("equal_budget", made, results))
    assert {layer: entry.lr for layer, entry in found.items()} == best


def test_the_record_of_equal_budgets_keeps_them_and_its_choices() -> None:
    record = records.read("equal_budget")
    judged, rows = record.results["judged"], record.results["rows"]
    assert {row["count"] for row in judged} == {5000}
    assert {row["count"] for row in rows} == {10_000}
    assert {row["seed"] for row in rows} == set(range(equal_budget.SEEDS))
    assert record.results["epsilons"] == list(equal_budget.EPSILONS)
    budget = record.results["budget"]
    assert budget == equal_budget.BUDGET
    assert all(budget <= row["seconds"] <= 1.1 * budget for row in [*judged, *rows])
    for layer, entry in equal_budget.entries(record).items():
        mine = {row["lr"]: row["certified"] for row in judged if row["layer"] == layer}
        assert [*mine] == [*equal_budget.RATES]
        assert entry.lr == max(mine, key=lambda lr: mine[lr][0] + mine[lr][2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), r"seeds \[0, 1, 2\] once for dense, two at least.* got \[0, 1\]"),
        (lambda rows: rows[0].update(lr=9.0), "once for BCOP, two at least, at one rate, got"),
        (lambda rows: rows.append(rows[0] | {"layer": "ECO"}), "unknown layers {'ECO'}"),
    ],
)
def test_a_budget_without_all_its_rows_is_refused(
    change: Callable[[list[dict[str, Any]]], object], words: str
) -> None:
    record = copy.deepcopy(records.read("equal_budget"))
    change(record.results["rows"])
    with pytest.raises(ValueError, match=words):
        equal_budget.entries(record)


def test_layers_are_compared_on_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = colours(300)
    monkeypatch.setattr(equal_budget_cifar10, "cifar10", lambda jpeg: few)
    timeless = functools.partial(equal_budget.row, clock=ticking())
    monkeypatch.setattr(equal_budget, "row", timeless)
    results, tensors = equal_budget_cifar10.run(
        layers=["shift"], rates=(0.03,), budget=25, seeds=2, validation=20,
        rows=Rows(tmp_path),
    )  # fmt: skip
    assert results["data"] == "made up"
    assert not tensors
    assert [row["layer"] for row in results["rows"]] == 2 * ["shift"]
    assert all(row["count"] == 20 for row in [*results["judged"], *results["rows"]])
    assert all(row["certified"][0] > 0.25 for row in results["rows"])  # a tenth by chance


def test_the_record_of_equal_budgets_on_colours_keeps_its_choices() -> None:
    record = records.read("equal_budget_cifar10")
    judged, budget = record.results["judged"], record.results["budget"]
    assert record.results["data"] == "CIFAR-10 (JPEG q75)"
    assert budget == equal_budget_cifar10.BUDGET
    assert record.results["epsilons"] == pytest.approx(equal_budget_cifar10.EPSILONS)
    assert {row["count"] for row in judged} == {5000}
    assert {row["count"] for row in record.results["rows"]} == {10_000}
    for layer, entry in equal_budget.entries(record).items():
        mine = {row["lr"]: sum(row["certified"]) for row in judged if row["layer"] == layer}
        assert entry.lr == max(mine, key=lambda lr: mine[lr])
        assert budget <= entry.seconds <= 1.1 * budget


def test_a_budget_of_other_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = few_digits()
    with pytest.raises(ValueError, match=r"layer: expected one of .*'dense'.* got 'ECO'"):
        equal_budget.row("ECO", digits[:2], digits[2:], lr=0.01)
    monkeypatch.setattr(equal_budget, "mnist", lambda full=False: digits)
    with pytest.raises(ValueError, match="validation: expected a number of the 1500 training"):
        equal_budget.run(validation=0)


def test_the_search_finds_counterexamples_of_real_arithmetic_only() -> None:
    record = records.read("counterexamples").results
    assert [row["family"] for row in record["rows"]] == [f.name for f in counterexamples.FAMILIES]
    assert sum(row["attempts"] for row in record["rows"]) >= 1_000_000
    for row in record["rows"]:
        assert row["sound"] == 0
        assert row["positive"] > 0.2 * row["networks"]
    total = {"real": 0, "sound": 0}
    for family in counterexamples.FAMILIES:
        for seed in range(2):
            found = counterexamples.contradictions(family, seed)
            for name in total:
                total[name] += found[name]
    assert total["real"] > 0
    assert total["sound"] == 0


def test_the_cost_of_soundness_is_what_the_docstring_says() -> None:
    dense, convolutional = records.read("counterexamples").results["cost"]
    text = certify.__doc__ or ""
    for share, name in (
        (dense["lost"]["float16"], "float16"),
        (dense["lost"]["bfloat16"], "bfloat16"),
    ):
        assert re.search(rf"\b{100 * share:.0f} % in {name}", text)
    assert f"{100 * dense['lost']['float32']:.1f} % is lost" in text
    assert dense["sound"] < dense["real"]
    assert convolutional["lost"]["float32"] < 0.015


# ----------------------------------------------------------------------------------- tightness


def test_every_bound_is_above_the_lower_bound_and_depth_loosens_the_product() -> None:
    rows = records.read("tightness").results["rows"]
    assert [(r["kind"], r["width"], r["depth"]) for r in rows] == [
        tuple(s) for s in tightness.SIZES
    ]
    for row in rows:
        assert list(row["bounds"]) == list(tightness.METHODS)
        values = {name: b["value"] for name, b in row["bounds"].items() if "value" in b}
        assert all(value >= row["lower"] * (1 - 1e-9) for value in values.values())
        assert values["eclipse"] <= values["product"] * (1 + 1e-6)
        if "lipsdp" in values:
            assert values["lipsdp"] <= values["eclipse"] * (1 + 1e-6)
    loose = {
        (r["width"], r["depth"]): r["bounds"]["product"]["value"] / r["lower"]
        for r in rows
        if r["kind"] == "ReLU"
    }
    for width in (16, 64, 256):
        assert loose[width, 2] < loose[width, 4] < loose[width, 8]


def test_a_small_row_of_the_tightness_is_found_again() -> None:
    """Adam's float64 training differs between machines by the rounding of its sums."""
    (recorded,) = (
        r
        for r in records.read("tightness").results["rows"]
        if (r["kind"], r["width"], r["depth"]) == ("ReLU", 16, 2)
    )
    methods = ("product", "eclipse", "lipsdp")
    again, _ = tightness.row("ReLU", 16, 2, methods=methods)
    assert again["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.01)
    for method in methods:
        value = recorded["bounds"][method]["value"]
        assert again["bounds"][method]["value"] == pytest.approx(value, rel=0.01)


# --------------------------------------------------------------------------- ordinary networks


def test_ordinary_networks_lie_between_their_bounds_and_readme_says_so() -> None:
    rows = records.read("ordinary_networks").results["rows"]
    assert [row["name"] for row in rows] == list(ordinary_networks.TABLE)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for row in rows:
        assert 0 < row["lower"] <= row["bound"]
        shape = " × ".join(map(str, row["shape"]))
        said = f"| {row['name']} | {shape} | {row['parameters']:,} | {row['bound']:.3g} | "
        assert said + f"{row['lower']:.3g} | {row['seconds']:.2g} |" in readme


@pytest.mark.parametrize("name", ["U-Net", "transformer", "LSTM of 6 steps", "coupling"])
def test_ordinary_network_is_bounded_again(name: str) -> None:
    """By float32 weights that torch draws, in float64; the lower bound stops at a rounding."""
    rows = records.read("ordinary_networks").results["rows"]
    (recorded,) = (row for row in rows if row["name"] == name)
    again, _ = ordinary_networks.row(name)
    assert again["bound"] == pytest.approx(recorded["bound"], rel=1e-5)
    assert again["lower"] == pytest.approx(recorded["lower"], rel=0.01)


# -------------------------------------------------------------------------- local certificates


def test_no_certificate_passes_an_attack_and_local_ones_are_the_largest() -> None:
    results = records.read("local_certificates").results
    assert [(row["p"], row["seed"]) for row in results["rows"]] == [
        (p, seed) for p in (2, "inf") for seed in range(3)
    ]
    for row in results["rows"]:
        radii = {name: np.array(found) for name, found in row["radii"].items()}
        for name in ("product", "intervals", "local"):
            assert (radii[name] <= radii["attack"]).all()
        assert (radii["local"] >= radii["product"]).all()
    two, largest = results["medians"]["2"], results["medians"]["inf"]
    assert round(two["local"] / two["product"]) == 11  # what chapter 12 says
    assert round(two["local"] / two["intervals"]) == 13
    assert round(two["attack"] / two["local"]) == 7
    assert round(largest["intervals"] / largest["product"]) == 124
    assert round(largest["local"] / largest["intervals"], 2) == 1.25
    assert round(largest["attack"] / largest["local"]) == 4
    for p, medians in results["medians"].items():
        for name, median in medians.items():
            radii = [row["radii"][name] for row in results["rows"] if str(row["p"]) == p]
            assert median == pytest.approx(float(np.median(radii)), rel=1e-6)


def test_local_certificates_of_a_few_digits_are_found_again() -> None:
    """Training in float64 differs between machines by the rounding of its sums."""
    recorded = records.read("local_certificates").results["rows"][0]
    again, _ = local_certificates.row(2, count=3)
    assert again["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.002)
    for name, radii in again["radii"].items():
        tolerance = 2 * 8 * 2.0**-12 if name == "attack" else 0
        assert radii == pytest.approx(recorded["radii"][name][:3], rel=1e-3, abs=tolerance)


def test_interval_radius_is_that_of_a_walk_by_hand() -> None:
    net = local_certificates.fit(1)
    digits = mnist()
    x, y = digits.test_images[:4].double(), digits.test_labels[:4]
    radius = local_certificates.interval_radius(net, x, y)

    def box(layer: torch.nn.Conv2d, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        def linear(weight: Tensor, z: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(z, weight, None, layer.stride, layer.padding)

        up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        bias = layer.bias[:, None, None]
        lower = linear(up, low) + linear(down, high) + bias
        return lower.relu(), (linear(up, high) + linear(down, low) + bias).relu()

    def margin(r: Tensor) -> Tensor:
        half = r[:, None, None, None]
        low, high = box(net.conv2, *box(net.conv1, x - half, x + half))
        below, above = box(net.conv3, low, high)
        low, high = (low + below).flatten(1), (high + above).flatten(1)
        weight = net.fc.weight[y][:, None] - net.fc.weight
        least = weight.clamp(min=0) @ low[..., None] + weight.clamp(max=0) @ high[..., None]
        found = least[..., 0] + net.fc.bias[y][:, None] - net.fc.bias
        return found.scatter(1, y[:, None], math.inf).amin(1)

    with torch.no_grad():
        positive = radius > 0
        assert positive.any()
        assert (margin(0.999 * radius)[positive] > 0).all()
        assert (margin(1.001 * radius + 1e-5)[positive] < 0).all()


# ----------------------------------------------------------------------------------- smoothing


def test_margins_certify_more_than_smoothing_at_equal_terms() -> None:
    results = records.read("smoothing").results
    assert results["epsilons"] == list(smoothing.EPSILONS)
    assert results["samples"] >= 100_000
    kinds = [("Lipschitz", None)]
    kinds += [("smoothed Lipschitz", sigma) for sigma in smoothing.SMALL]
    kinds += [("smoothed", sigma) for sigma in smoothing.SIGMAS]
    curves = {
        key: [r for r in results["curves"] if (r["kind"], r["sigma"]) == key] for key in kinds
    }
    assert sum(map(len, curves.values())) == len(results["curves"])
    order = np.argsort(results["epsilons"])
    largest = dict(zip(smoothing.SIGMAS, results["largest"], strict=True))
    for (_, sigma), rows in curves.items():
        assert [row["seed"] for row in rows] == [0, 1, 2]
        for row in rows:
            curve = np.array(row["certified"])
            assert (np.diff(curve[order]) <= 0).all()
            if sigma is not None:
                assert (curve[np.array(results["epsilons"]) > largest[sigma]] == 0).all()
    for sigma, radius in largest.items():
        # n copies that agree: alpha^(1/n) is the lower bound of the probability
        p = 0.001 ** (1 / results["samples"])
        assert radius == pytest.approx(sigma * statistics.NormalDist().inv_cdf(p), rel=1e-6)


def test_one_draw_of_noise_counts_like_a_naive_loop() -> None:
    digits = mnist()
    x, labels = digits.test_images[:4], digits.test_labels[:4]
    torch.manual_seed(0)
    linear = torch.nn.Linear(784, 8)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), linear, torch.nn.ReLU(), torch.nn.Linear(8, 10)
    ).double()
    noise = torch.randn(300, 784, dtype=torch.float64)
    for image in x.double():
        naive = [int(model((image + 0.7 * e.view(1, 28, 28))[None]).argmax()) for e in noise]
        found = smoothing.counts(model, image, 0.7, noise @ linear.weight.mT)
        assert found.tolist() == np.bincount(naive, minlength=len(found)).tolist()
    with (
        torch.no_grad()
    ):  # no doubt: one class has a much larger bias, and the radius is the largest
        model[-1].bias[3] = 1000
    certificate = smoothing.certify(model.float(), x, labels, 0.5, samples=700, selection=10)
    assert certificate.predictions.tolist() == [3] * 4
    top = 0.5 * statistics.NormalDist().inv_cdf(0.001 ** (1 / 700))
    assert certificate.radius.tolist() == pytest.approx([top] * 4)


def test_a_short_training_makes_both_kinds_of_certificate() -> None:
    digits = mnist()
    few = Mnist(*(t[:3000] for t in digits[:2]), *digits[2:])
    some = digits.test_images[::100], digits.test_labels[::100]
    for sigma, kinds in ((None, 1 + len(smoothing.SMALL)), (0.5, 1)):
        results, _ = smoothing.row(few, *some, sigma, samples=200, epochs=4)
        assert len(results["curves"]) == kinds
        for curve in results["curves"]:
            assert curve["certified"][0] > 0.5
            assert curve["certified"][0] >= curve["certified"][5] >= curve["certified"][-1]


# ----------------------------------------------------------------------------------- gradients


def test_recorded_gradients_are_found_again() -> None:
    rows = records.read("gradients").results["rows"]
    assert [(r["seed"], r["kind"]) for r in rows] == [
        (seed, kind) for seed in range(3) for kind in gradients.KINDS
    ]
    images, labels = mnist().test_images.double(), mnist().test_labels
    models = {kind: gradients.load(kind).double() for kind in gradients.KINDS}
    right = torch.stack([model(images).argmax(1) == labels for model in models.values()]).all(0)
    x, y = images[right][:200], labels[right][:200]
    for row in rows[:3]:
        model = models[row["kind"]]
        weights = [m.weight.numpy() for m in model if isinstance(m, torch.nn.Linear)]
        product = math.prod(np.linalg.norm(w, 2) for w in weights)
        assert row["bound"] == pytest.approx(product, rel=1e-6)
        assert row["accuracy"] > 0.95
        again = gradients.measure(model, x[:50], y[:50])
        assert again["certified"] < again["walked"]
        assert 0.7 < again["alignment"] / row["alignment"] < 1.4
        moved = x[:50].clone().requires_grad_()
        top = model(moved).topk(2, dim=1).values
        (g,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), moved)
        slope = (g * x[:50]).flatten(1).sum(1).abs() / g.flatten(1).norm(dim=1)
        assert again["alignment"] == pytest.approx(slope.median().item())
    with pytest.raises(ValueError, match="kind must be one of"):
        gradients.load("friendly")


def test_training_against_attacks_helps_against_attacks() -> None:
    digits = mnist()
    few = Mnist(*(t[:3000] for t in digits[:2]), *digits[2:])
    x, y = digits.test_images[::20], digits.test_labels[::20]
    withstood = {}
    for kind in gradients.KINDS:
        model = gradients.fit(kind, few, epochs=3)
        assert not model.training
        withstood[kind] = attacked_accuracy(model, [(x, y)], gradients.RADIUS, steps=10).value
        bound = lipschitz_bound(model, (1, 28, 28)).value
        assert (bound < 1 + 1e-4) == (kind == "1-Lipschitz")
    assert min(withstood["adversarial"], withstood["1-Lipschitz"]) > withstood["standard"] + 0.1
    with pytest.raises(ValueError, match="kind must be one of"):
        gradients.fit("friendly", few)


# --------------------------------------------------------------------------- gradient_controls


def test_gradient_controls_begin_as_one_network() -> None:
    x = torch.rand(20, 784)
    free, bound = (gradient_controls.network((784, 8, 8, 3), c, 5) for c in ("none", "orthonormal"))
    assert (free(x) - bound(x)).abs().max() < 1e-6
    assert not any(is_parametrized(each) for each in free)
    singular = np.linalg.svd(np.asarray(free[1].weight.detach()), compute_uv=False)
    assert np.allclose(singular, 1, atol=1e-6)
    with pytest.raises(ValueError, match="constraint: expected one of"):
        gradient_controls.network((784, 8, 3), "tight", 0)


def test_gradient_controls_keep_the_constraint_and_learn() -> None:
    (zeros, eights), held_out = gradient_controls.digits_of(mnist())
    few = torch.cat([zeros[:300], eights[:300]]), torch.tensor([1, -1]).repeat_interleave(300)
    test = torch.cat(held_out)
    signs = torch.tensor([1, -1]).repeat_interleave(200)
    for constraint in gradient_controls.CONSTRAINTS:
        model = gradient_controls.fit("two digits", constraint, "hinge-KR", *few, lr=0.01, epochs=4)
        assert ((model(test)[:, 0] * signs) > 0).double().mean() > 0.9
        bound = lipschitz_bound(model, (1, 28, 28)).value
        assert (abs(bound - 1) < 2e-3) == (constraint == "orthonormal")  # rounded to half
    with pytest.raises(ValueError, match="loss: expected one of"):
        gradient_controls.fit("ten digits", "none", "KR", *few, lr=0.01)


def test_random_layers_are_those_of_another_network() -> None:
    model, fresh = (gradient_controls.network((784, 8, 8, 3), "none", seed) for seed in (0, 1))
    for k in range(4):
        mixed = gradient_controls.randomised(model, k, 1)
        for i, old, new, found in zip(
            (0, 1, 2), model[1::2], fresh[1::2], mixed[1::2], strict=True
        ):
            assert torch.equal(found.weight, (new if i >= 3 - k else old).weight)
            assert torch.equal(found.bias, (new if i >= 3 - k else old).bias)
    g, h = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    ranks = gradient_controls.rank_correlation(g, h)
    for i in range(5):
        exact = scipy.stats.spearmanr(*(abs(z[i].numpy().ravel()) for z in (g, h))).statistic
        assert ranks[i].item() == pytest.approx(exact)


def test_partners_are_those_of_the_exact_plan() -> None:
    zeros, eights = (d[:40].double() for d in gradient_controls.digits_of(mnist())[0])
    (way,) = gradient_controls.ways(zeros, eights).directions
    points = [z.flatten(1).numpy() for z in (zeros, eights)]
    plan = ot.emd([], [], ot.dist(*points, metric="euclidean"))
    assert np.allclose(points[0] - way.numpy(), points[1][plan.argmax(1)])
    assert way.norm(dim=1).mean().item() == pytest.approx(emd(zeros, eights))


def test_gradient_controls_choose_on_held_out_digits_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def trained(
        task: str, constraint: str, loss: str, fitted: Any, judges: Any, **given: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked.append((task, fitted[0], judges[0]))
        score = 1 - abs(math.log(given["lr"] / (0.01 if loss == "hinge-KR" else 0.003)))
        model = gradient_controls.network(small[task].sizes, "none", 0)
        return {"validation": score}, networks.packed(model)

    few = few_digits()
    small = {
        name: task._replace(sizes=(784, 4, 4, task.sizes[-1]))
        for name, task in gradient_controls.TASKS.items()
    }
    for name, value in {
        "mnist": lambda: few, "PLANNED": 20, "TASKS": small, "_trained": trained,
        "measure_ten": lambda *_: {"cosine": 0.5}, "measure_two": lambda *_: {"transport": 0.5},
    }.items():  # fmt: skip
        monkeypatch.setattr(gradient_controls, name, value)
    results, _ = gradient_controls.run(validation=300, rows=Rows(tmp_path))
    assert gradient_controls.run(validation=300, rows=Rows(tmp_path))[0] == results
    assert len(asked) == 12 * (4 + 2)
    for task, _, judges in asked:
        assert len(judges) == {"ten digits": 300, "two digits": 60}[task]
    for _, fitted, judges in (asked[0], asked[-1]):
        every = torch.cat([fitted, judges, few.test_images]).flatten(1)
        assert len(every.unique(dim=0)) == len(every)
    for task in ("ten", "two"):
        assert len(results[task]) == 6 * 3
        assert all(r["lr"] == (0.01 if r["loss"] == "hinge-KR" else 0.003) for r in results[task])


def test_the_record_of_the_gradient_controls_follows_from_its_trials() -> None:
    record = records.read("gradient_controls")
    best: dict[Any, Any] = {}
    for one in record.results["tried"]:
        cell = one["task"], one["constraint"], one["loss"]
        best[cell] = max(best.get(cell, (-1.0, 0.0)), (one["validation"], -one["lr"]))
    assert len(best) == 12
    assert len(record.results["tried"]) == 48
    for task in ("ten", "two"):
        rows = record.results[task]
        assert len({(r["constraint"], r["loss"], r["seed"]) for r in rows}) == len(rows) == 18
        for one in rows:
            assert one["lr"] == -best[f"{task} digits", one["constraint"], one["loss"]][1]
            if one["constraint"] == "orthonormal":
                assert one["bound"] == pytest.approx(1, abs=2e-3)  # rounded to half
            if task == "two":  # by duality
                assert one["seen"] <= 1
                assert one["held_out"] < record.results["constant"]["ceiling"]


def test_a_row_of_the_gradient_controls_comes_again() -> None:
    record = records.read("gradient_controls")
    one = gradient_controls.summary(record, "two")["none", "cross-entropy"]
    zeros, eights = gradient_controls.digits_of(mnist())[0]
    parts = [torch.cat([digit[:600], digit[800:]]) for digit in (zeros, eights)]
    signs = torch.tensor([1, -1]).repeat_interleave(len(parts[0]))
    model = gradient_controls.fit(
        "two digits", "none", "cross-entropy", torch.cat(parts), signs, lr=one["lr"][0]
    )
    known = gradient_controls.ways(zeros[:600].double(), eights[:600].double())
    found = gradient_controls._agreement(model.double(), known)
    assert found == pytest.approx(one["transport"][0], abs=0.02)
    (way,) = known.directions
    mean = (zeros.double().mean(0) - eights.double().mean(0)).flatten()
    cosine = torch.nn.functional.cosine_similarity(way, mean).mean().item()
    assert cosine == pytest.approx(record.results["constant"]["transport"])


# --------------------------------------------------------------------------------------- rows


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
    assert rows.elsewhere == []


def test_rows_with_one_file_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        rows = Rows(folder)
        rows.compute("rate × 3", lambda: ({}, {}))
        rows.compute("rate × 3", lambda: ({}, {}))
        with pytest.raises(
            ValueError, match=r"name: 'rate ÷ 3' has the file rate-3.row of 'rate ×"
        ):
            rows.compute("rate ÷ 3", lambda: ({}, {}))


def test_rows_remember_where_they_were_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = records.facts("", seed=0, seconds=0)
    there = here | {"hardware": "another machine", "date": "2026-01-02"}
    with monkeypatch.context() as patched:
        patched.setattr(records, "facts", lambda *a, **k: there)
        for name in "ab":
            Rows(tmp_path).compute(name, lambda: ({}, {}))
    rows = Rows(tmp_path)
    for name in "cba":
        rows.compute(name, lambda: ({}, {}))
    (found,) = rows.elsewhere
    assert found.pop("rows") == ["b", "a"]
    assert found == {key: there[key] for key in ("hardware", "date", "versions")}


def test_rows_of_records_are_json() -> None:
    for name in recipes():
        json.dumps(records.read(name).results, allow_nan=False)


# ----------------------------------------------------------------------------------------- audit

OURS = [name for name, constraint in audit.CONSTRAINTS.items() if constraint.code == "lipbook"]
KEYS = (Path(__file__).resolve().parent.parent / "book/references.bib").read_text("utf-8")


def audited(name: str) -> list[dict[str, Any]]:
    rows = records.read("audit").results["rows"]
    found = [row for row in rows if row["name"] == name]
    assert [row["seed"] for row in found] == [0, 1, 2]
    return found


def columns(layer: torch.nn.Module, channels: int, size: int) -> np.ndarray:
    """The matrix of a linear layer, from what it makes of each unit vector."""
    basis = torch.eye(channels * size**2).view(-1, channels, size, size)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis[:1]))).flatten(1).T.double().numpy()


@pytest.mark.parametrize("name", audit.CONSTRAINTS)
def test_an_audited_row_is_consistent(name: str) -> None:
    for row in audited(name):
        assert len(row["start"]) == len(row["end"]) == 3
        assert all(0 <= low <= high for when in ("start", "end") for low, high in row[when])
        product = math.prod(max(1.0, high) for _, high in row["end"])
        assert math.isclose(row["constant"], product, rel_tol=3 * ROUNDED)  # three factors
        assert row["proven"] <= row["claimed"] <= row["clean"]
        assert row["broken_within"] <= row["broken"] <= row["certificates"]
        sound = row["broken_sound"]
        assert sound == 0 if name in OURS and name != "Cayley" else sound is None
    source = audit.CONSTRAINTS[name].source
    assert not source or f"{{{source}," in KEYS


def test_what_the_audit_finds() -> None:
    """The statements of chapter 6, each about all seeds."""
    norms = {
        when: {n: [max(b for _, b in row[when]) for row in audited(n)] for n in audit.CONSTRAINTS}
        for when in ("start", "end")
    }
    end = norms["end"]
    loose = {"OSSN", "SOC of 2021, as it trains", "exponential, order 2", "exponential, order 4"}
    loose |= {"spectral_norm", "orthogonal", "orthogonium SOC"}
    tight = [row for name in audit.CONSTRAINTS if name not in loose for row in audited(name)]
    assert max(high for row in tight for _, high in row["end"]) < 1 + 2e-6
    assert [row["name"] for row in tight if row["broken_within"]] == ["SOC"]  # a margin of 0.001
    assert sum(row["broken_within"] for row in tight) == 1
    for name in ("spectral_norm", "orthogonal"):
        assert min(end[name]) > {"spectral_norm": 2, "orthogonal": 13}[name]
        assert all(row["broken_within"] == row["certificates"] for row in audited(name))
    assert max(end["orthogonium SOC"]) < 1.08
    assert all(1.06 < row["constant"] < 1.09 for row in audited("orthogonium SOC"))
    rows = audited("orthogonium SOC")
    broken, given = (sum(row[key] for row in rows) for key in ("broken", "certificates"))
    assert round(broken / given, 2) == 0.26
    assert 0.05 < max(norms["start"]["OSSN"] + end["OSSN"]) - 1 < 0.085
    assert sorted(round(row["constant"] - 1, 2) for row in audited("OSSN")) == [0, 0.02, 0.14]
    assert all(row["broken"] == 0 for row in audited("OSSN"))
    assert all(1.001 < norm < 1.003 for norm in end["SOC of 2021, as it trains"])
    assert min(end["exponential, order 2"]) > 1 + 1e-4 > 1 > max(end["exponential, order 3"])
    assert sum(row["broken"] for name in OURS for row in audited(name)) > 0


@pytest.mark.parametrize("name", ["BCOP of 2019", "SOC of 2021", "orthogonal", "BCOP", "RKO"])
def test_an_audited_start_is_found_again(name: str) -> None:
    """By columns and NumPy, where the recipe goes backwards through the layer."""
    torch.manual_seed(0)
    model, image = audit.network(name), mnist().test_images[:1, :, 2:26, 2:26]
    model(image)
    recorded = audited(name)[0]["start"]
    again = audit.norms(model.eval(), image)
    for layer, *pairs in zip(model[1:-2:2], recorded, again, strict=True):
        values = np.linalg.svd(columns(layer, 16, 6), compute_uv=False)
        for low, high in pairs:
            assert math.isclose(values[0], high, rel_tol=1e-4)
            assert abs(values[-1] - low) < 1e-3


def test_a_small_audit() -> None:
    results, tensors = audit.run(names=["spectral_norm", "exponential, order 2"], seeds=1)
    assert not tensors
    assert [row["name"] for row in results["rows"]] == ["spectral_norm", "exponential, order 2"]
    assert results["packages"] == {}


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit.PEERS, "torchlip", "no-such-package")
    with pytest.raises(
        ModuleNotFoundError, match=r"no-such-package: pip install 'lipbook\[bench\]'"
    ):
        audit.run(names=["torchlip SpectralConv2d"])


@pytest.mark.parametrize(("order", "square"), [(2, 1), (3, -1), (4, -1)])
def test_a_truncated_exponential_leaves_the_circle_as_its_series_says(
    order: int, square: int
) -> None:
    """A rotation by a: the partial sum of exp(ia), whose modulus is on one side of 1."""
    layer, a = audit.CONSTRAINTS[f"exponential, order {order}"].make(4, 4), 0.3
    start = layer.matrices.double()
    with torch.no_grad():
        layer.free[:, 0, 1] = a
    layer.stepped()
    series = sum((1j * a) ** i / math.factorial(i) for i in range(order + 1))
    for before, after in zip(start, layer.matrices.double(), strict=True):
        ratio = np.linalg.svd(torch.linalg.solve(before, after).numpy(), compute_uv=False)
        expected = sorted([1, 1, abs(series), abs(series)], reverse=True)
        assert np.allclose(ratio, expected, atol=1e-6)
    assert square * (abs(series) - 1) > 0
    assert not layer.free.any()


def test_steps_with_a_reset_end_orthogonal() -> None:
    layer = audit.CONSTRAINTS["steps of LipNeXt, 2026"].make(4, 4)
    with torch.no_grad():
        layer.free.copy_(0.2 * torch.randn(2, 4, 4))
    layer.settled()
    gram = layer.matrices @ layer.matrices.mT
    assert torch.allclose(gram, torch.eye(4).expand(2, 4, 4), atol=1e-6)
    assert np.allclose(np.linalg.svd(columns(layer, 4, 4), compute_uv=False), 1, atol=1e-5)


def test_skew_convolutions_of_2021_are_exponentials() -> None:
    """With enough terms: of a skew-symmetric matrix, with zeros around the image."""
    layer = audit.CONSTRAINTS["SOC of 2021"].make(3, 4)
    layer(torch.zeros(1, 3, 4, 4))
    layer.eval()
    plain = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        plain.weight.copy_(layer.skew())
    skew = columns(plain, 3, 4)
    assert np.allclose(skew, -skew.T)
    exponential = torch.linalg.matrix_exp(torch.from_numpy(skew)).numpy()
    assert np.allclose(columns(layer, 3, 4), exponential, atol=1e-4)


def test_block_reflectors_of_2025_reflect() -> None:
    """One tap: the matrix I - 2 V (VᵀV + shift)^(-1) Vᵀ at each pixel."""
    layer = audit.CONSTRAINTS["BRO of 2025"].make(4, 4)
    V = torch.randn(4, 3)
    with torch.no_grad():
        layer.weight.zero_()[:, :, 1, 1] = V
    gram = (V.T @ V).double()
    gram += 1e-5 * gram.diagonal().mean() * torch.eye(3)
    expected = torch.eye(4) - 2 * V.double() @ torch.linalg.solve(gram, V.T.double())
    matrix = columns(layer, 4, 4).reshape(4, 16, 4, 16)
    for pixel in range(16):
        assert np.allclose(matrix[:, pixel, :, pixel], expected.numpy(), atol=1e-4)


def test_a_shift_before_cholesky_takes_norm_away() -> None:
    layer = audit.CONSTRAINTS["Cholesky, shifted"].make(4, 2)
    free = (torch.eye(4) + layer.weight).detach().double()
    values = torch.linalg.svdvals(free)
    shift = 1e-3 * values.square().mean()
    expected = (values / (values.square() + shift).sqrt()).numpy()
    found = np.linalg.svd(columns(layer, 4, 2), compute_uv=False)
    assert np.allclose(sorted(found), sorted(np.repeat(expected, 4)), atol=1e-5)


def test_a_potential_layer_of_2022_divides_by_its_norm_in_the_end() -> None:
    layer = audit.CONSTRAINTS["CPL of 2022"].make(3, 4)
    layer.settled()
    layer.eval()
    plain = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        layer.bias.fill_(100)  # all units are on
    W = columns(plain, 3, 4)
    expected = np.eye(48) - 2 * W.T @ W / (np.linalg.norm(W, 2) ** 2 + 1e-4)
    assert np.allclose(columns(layer, 3, 4), expected, atol=2e-3)


def test_clipping_and_masking_knows_stride_one() -> None:
    layer = audit.CONSTRAINTS["SVCM"].make(3, 6)
    with torch.no_grad():
        layer.weight.mul_(5)
    before = np.linalg.norm(columns(layer, 3, 6), 2)
    layer.settled()
    assert before > 2
    assert 0.9 < np.linalg.norm(columns(layer, 3, 6), 2) < 1.01


def test_the_matrix_of_a_layer_is_that_of_its_columns() -> None:
    layer = torch.nn.Conv2d(2, 3, 3, padding=1)
    matrix = audit.layer_matrix(layer, torch.randn(1, 2, 4, 4))
    assert matrix.dtype == torch.float64
    assert np.allclose(matrix.numpy(), columns(layer, 2, 4), atol=1e-6)


# -------------------------------------------------------------------------------------- frontier


def test_published_numbers_are_possible_and_cited() -> None:
    radii = [float(Fraction(radius)) for radius in frontier.RADII]
    assert radii == sorted(radii)
    for entry in frontier.PUBLISHED:
        numbers = [entry.clean, *(c for c in entry.certified if c is not None)]
        assert 0 < numbers[-1] < 100
        assert numbers == sorted(numbers, reverse=True), entry
        assert f"{{{entry.source}," in KEYS
        assert entry.seen in ("paper", "repository", "secondary")
        assert len(entry.cells) == 1 + len(frontier.RADII)
        marks = {cell.endswith("†") for cell in entry.cells if cell}
        assert marks == {entry.seen == "secondary"}


def test_eight_points_at_radius_one_are_a_difference_of_two_rows() -> None:
    """As the abstract of LipNeXt says, which is all that we read of it."""
    at_one = {e.network: e.certified[-1] for e in frontier.entries("ImageNet")}
    assert round(at_one["LipNeXt, 2 billion"] - at_one["LiResNet"]) == 8
    with pytest.raises(ValueError, match="dataset must be one of"):
        frontier.entries("MNIST")
