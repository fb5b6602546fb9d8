"""Measure all tables and write them with what made them: ``make bench``."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.plot import figure
from benchmarks.tables import tables
from benchmarks.timing import Rounds, Table, peak_bytes, ratios, side_by_side

PACKAGES = ("lipbook", "torch", "numpy", "orthogonium", "deel-torchlip", "geotorch")


def processor() -> str:
    """Name of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def facts(arguments: list[str], rounds: int, seed: int) -> Iterator[str]:
    """Lines that say when, where and with what the tables were made."""
    yield f"- date: {datetime.now(timezone.utc):%Y-%m-%d}"
    yield f"- command: `{' '.join(['python -m benchmarks', *arguments])}`"
    yield f"- seed: {seed}; rounds: {rounds}; threads: {torch.get_num_threads()}"
    yield f"- hardware: {processor()}"
    yield f"- Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in PACKAGES
    )


def measured(table: Table, rounds: int) -> Rounds:
    """Seconds of each step in each round, or bytes, of which one round says all."""
    if table.unit == "MB":
        return [{name: peak_bytes(step) for name, step in table.steps.items()}]
    return list(side_by_side(table.steps, rounds))


def written(table: Table, rounds: Rounds) -> Iterator[str]:
    """Lines of a Markdown table: milliseconds or megabytes, ratios over the rounds, exactness."""
    scale, what = (1e3, "time") if table.unit == "ms" else (1e-6, "bytes")
    spread = ": median (least – largest)" if len(rounds) > 1 else ""
    last = " max abs(σ - 1) |" if table.exactness else ""
    yield f"## {table.family}: {table.label}"
    yield ""
    yield f"| | {table.unit} | {what} / {table.reference}{spread} |{last}"
    yield "|---|---|---|" + ("---|" if table.exactness else "")
    for name, (least, median, largest) in ratios(rounds, table.reference).items():
        value = scale * statistics.median(round_[name] for round_ in rounds)
        ratio = f"{median:.2f} ({least:.2f} – {largest:.2f})" if spread else f"{median:.2f}"
        exact = f" {table.exactness[name]:.0e} |" if name in table.exactness else " |" * bool(last)
        yield f"| {name} | {value:.2f} | {ratio} |{exact}"
    yield ""


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure the layers beside their peers.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("results.md"))
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error(
            f"rounds and threads must be positive, got {options.rounds}, {options.threads}"
        )
    warnings.simplefilter("ignore")  # of the peers
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    drawing = options.to.with_suffix(".svg")
    lines = ["# Speed, side by side", "", *facts(arguments, options.rounds, 0), ""]
    lines += [f"![The tables below as a figure]({drawing.name})", ""]
    results = []
    for table in tqdm(tables(), unit="table", disable=None):
        rounds = measured(table, options.rounds)
        lines += written(table, rounds)
        results.append((table, rounds))
    unfinished = options.to.with_suffix(".partial")
    figure(results, unfinished)
    unfinished.replace(drawing)
    unfinished.write_text("\n".join(lines))
    unfinished.replace(options.to)


if __name__ == "__main__":
    main(sys.argv[1:])
