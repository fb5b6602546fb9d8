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

from benchmarks.tables import Table, tables
from benchmarks.timing import ratios, side_by_side

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


def measured(table: Table, rounds: int) -> Iterator[str]:
    """Lines of a Markdown table: milliseconds, ratios over the rounds, exactness."""
    steps = {name: table.step(module) for name, module in table.modules.items()}
    times = list(side_by_side(steps, rounds))
    yield f"## {table.title}"
    yield ""
    yield f"| | ms | time / {table.reference}: median (least – largest) | max abs(σ - 1) |"
    yield "|---|---|---|---|"
    for name, (least, median, largest) in ratios(times, table.reference).items():
        milliseconds = 1e3 * statistics.median(round_[name] for round_ in times)
        exact = f"{table.exactness(table.modules[name]):.0e}" if table.exactness else ""
        ratio = f"{median:.2f} ({least:.2f} – {largest:.2f})"
        yield f"| {name} | {milliseconds:.2f} | {ratio} | {exact} |"
    yield ""


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure the layers beside their peers.")
    parser.add_argument("--rounds", type=int, default=10)
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
    lines = ["# Speed, side by side", ""]
    lines += [*facts(arguments, options.rounds, 0), ""]
    for table in tqdm(tables(), unit="table", disable=None):
        lines += measured(table, options.rounds)
    unfinished = options.to.with_suffix(".partial")
    unfinished.write_text("\n".join(lines))
    unfinished.replace(options.to)


if __name__ == "__main__":
    main(sys.argv[1:])
