"""The README: its example runs and gives the numbers that stand below it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_project import PYPROJECT, TOP, canonicalize_name, requirements

from lipbook import wasserstein

README = (TOP / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_gives_the_numbers_below_it(tmp_path: Path) -> None:
    """On this machine, within the confidence intervals of those in the text."""
    pytest.importorskip("matplotlib", reason="pip install lipbook[lab]")
    (code,) = (block for block in blocks("python") if "certified.svg" in block)
    assert len(code.splitlines()) == 12
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=True,
    )
    (text,) = (block for block in blocks("text") if "certified accuracy" in block)
    row = r"^ *([\d.]+)  ([\d.]+) % \[([\d.]+), ([\d.]+)\]"
    assert re.sub(r"\d+", "0", found.stdout) == re.sub(r"\d+", "0", text)
    printed = re.findall(row, text, re.MULTILINE)
    rows = re.findall(row, found.stdout, re.MULTILINE)
    assert [epsilon for epsilon, *_ in printed] == [epsilon for epsilon, *_ in rows]
    for (_, _, low, high), (_, value, _, _) in zip(printed, rows, strict=True):
        assert float(low) <= float(value) <= float(high)
    assert f"{float(printed[1][1]):.0f} % of the test digits" in README
    assert (tmp_path / "certified.svg").read_text().startswith("<?xml")


def test_the_library_in_one_minute_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in blocks("python") if "certified.svg" not in block)
    exec(code, {"__name__": "__main__"})
    (table,) = (block for block in blocks("text") if "OrthogonalConv2d" in block)
    assert table in capsys.readouterr().out


def test_the_recipes_of_the_page_on_choosing_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (TOP / "book" / "choosing.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(codes) == 9
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in codes:
        assert max(map(len, code.splitlines())) <= 80
        exec(code, names)
    table = capsys.readouterr().out
    assert "certified accuracy" in table
    assert "OrthogonalConv2d" in table
    assert names["net"](torch.rand(3, 4)).shape == (3, 1)
    assert names["logits"].shape == (16, 5)
    value = wasserstein.kantorovich_dual(names["critic"], names["p"], names["q"])
    exact = wasserstein.wasserstein1(names["p"], names["q"])
    assert 0.5 * exact < value <= exact * (1 + 1e-6)


def test_the_table_names_every_extra_and_what_it_brings() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", README, re.MULTILINE))
    assert set(rows) == set(extras)
    for extra, text in rows.items():
        named = {canonicalize_name(name) for name in re.findall(r"[\w-]+", text)}
        wanted = set(requirements(extras[extra]))
        if "…" in text:
            assert named & wanted
        else:
            assert named == wanted


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (TOP / target).exists(), target


WHOSE = ("lipbook", "(?:orthogonium|torchlip)")


def test_the_table_of_other_libraries_names_what_exists_and_what_was_measured() -> None:
    page = (TOP / "book" / "choosing.md").read_text()
    part = page[page.index("## From other libraries") : page.index("(choosing-costs)=")]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    results = (TOP / "benchmarks" / "results.md").read_text().split("\n## ")
    for row in rows:
        for name in re.findall(r"`~?((?:lipbook|torch)\.[\w.]+)`", row[1]):
            room, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(room), attribute), name
        times = re.findall(r"\d+\.\d\d", row[3] if len(row) == 4 else "")
        measured = [  # ours in a row of ours, theirs in one of theirs of the same table
            [
                re.search(rf"^\| {who}.*\| {time} \(", section, re.MULTILINE)
                for who, time in zip(WHOSE, times, strict=False)
            ]
            for section in results
        ]
        assert any(map(all, measured)), row
        assert len(row) == 4 or row[1] == "none", row


def test_what_is_slower_here_is_as_much_slower_as_the_page_on_choosing_says() -> None:
    page = (TOP / "book" / "choosing.md").read_text()
    results = (TOP / "benchmarks" / "results.md").read_text()

    def over(family: str, ours: str, theirs: str) -> float:
        table = results[results.index(f"## {family}") :].split("\n## ")[0]
        times = [
            re.search(rf"^\| {re.escape(name)} \| [\d.]+ \| ([\d.]+) ", table, re.MULTILINE)
            for name in (ours, theirs)
        ]
        first, second = (float(found[1]) for found in times if found)
        return first / second

    step = "Training step of a"
    convolution = f"{step} 3 × 3 convolution, batch 64: 64 channels, stride 1"
    assert "SOC and SLL, by a tenth each" in page
    for ours, theirs in (("SOC", "SOC, adaptive"), ("SLL, residual", "SLL, residual")):
        assert 1.05 < over(convolution, f"lipbook {ours}", f"orthogonium {theirs}") < 1.15
    assert "`UnitNormLinear` takes a sixth longer" in page
    unit = over(f"{step} dense layer", "lipbook UnitNormLinear", "orthogonium UnitNormLinear")
    assert 1.13 < unit < 1.2
    assert "the absolute value twice as long" in page
    absolute = over(f"{step}n activation", "lipbook AbsoluteValue", "orthogonium Abs")
    assert 1.5 < absolute < 2.5
    assert "`ScaleAndBias` up to twice as long" in page
    for ours, theirs in (
        ("BatchCentering", "orthogonium BatchCentering2D"),
        ("ScaleAndBias", "torchlip ScaleBiasLayer"),
    ):
        assert 1.2 < over(f"{step} normalisation", f"lipbook {ours}", theirs) < 2
