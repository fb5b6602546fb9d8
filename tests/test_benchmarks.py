"""The arithmetic of the benchmark, with a clock that the tests wind by hand."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text

from benchmarks.plot import drawn, figure
from benchmarks.timing import Table, peak_bytes, ratios, seconds_of, side_by_side

TOP = Path(__file__).resolve().parents[1]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[float] = []

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float) -> None:
        self.order.append(seconds)
        self.now += seconds


def test_seconds_of_a_step_is_the_mean_over_repeats() -> None:
    clock = Clock()
    assert seconds_of(lambda: clock.step(0.5), 4, clock) == pytest.approx(0.5)
    assert clock.order == [0.5] * 4


def test_steps_take_turns_and_run_for_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # the heap of all tests is no matter here
    clock = Clock()
    steps = {"slow": lambda: clock.step(1.0), "fast": lambda: clock.step(0.25)}
    times = list(side_by_side(steps, rounds=2, least=0.9, clock=clock))
    assert times == [{"slow": 1.0, "fast": 0.25}] * 2
    warming = [1.0] * 3 + [0.25] * 3
    one_round = [1.0] + [0.25] * 4
    assert clock.order == warming + one_round * 2


def test_ratios_are_taken_round_by_round() -> None:
    times = [{"a": 2.0, "b": 1.0}, {"a": 8.0, "b": 2.0}, {"a": 9.0, "b": 3.0}]
    assert ratios(times, "b") == {"a": (2.0, 3.0, 4.0), "b": (1.0, 1.0, 1.0)}


def test_peak_is_what_a_step_holds_at_once() -> None:
    kept = torch.ones(1000)

    def step() -> object:
        first = kept + 1  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        return second + 1  # 8000

    assert 8000 <= peak_bytes(step) < 9000
    assert 12000 <= peak_bytes(lambda: (step(), step())) < 13000


def test_figure_has_a_panel_for_each_family_and_the_same_bytes_again(tmp_path: Path) -> None:
    steps = {name: lambda: None for name in ("mine", "theirs")}
    families = ("Speed", "Speed", "Memory")
    units = ("ms", "ms", "MB")
    results = [
        (Table(family, f"size {i}", "theirs", steps, {}, unit), [{"mine": 1.0 + i, "theirs": 2.0}])
        for i, (family, unit) in enumerate(zip(families, units, strict=True))
    ]
    figure(results, tmp_path / "first.svg")
    figure(results, tmp_path / "second.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    drawing = drawn(results)
    assert len(drawing.axes) == 2
    said = {text.get_text() for text in drawing.findobj(Text)}
    assert {"Speed", "Memory", "mine", "theirs", "size 0", "size 2", "bytes / theirs"} <= said
    plt.close(drawing)


def test_the_stored_table_says_how_it_was_made() -> None:
    text = (TOP / "benchmarks" / "results.md").read_text()
    for fact in ("date: ", "command: ", "seed: ", "hardware: ", "torch ", "orthogonium "):
        assert fact in text
    rows = re.findall(r"^\| (lipbook[^|]*) \| [\d.]+ \| [\d.]+ \(", text, re.M)
    assert {"lipbook BCOP", "lipbook qr"} <= {row.strip() for row in rows}
