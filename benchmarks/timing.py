"""Times of several steps side by side: they take turns, so that all meet the same machine."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
Rounds = list[dict[str, float]]


class Table(NamedTuple):
    """Steps under comparison; ratios are to ``reference``. Tables of a family share their rows."""

    family: str
    label: str
    reference: str
    steps: dict[str, Step]
    exactness: dict[str, float]
    unit: str = "ms"


def seconds_of(step: Step, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean time of a step over some repeats, in seconds, without Python's garbage collection."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeats):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (clock() - start) / repeats
    finally:
        gc.enable()


def side_by_side(
    steps: Mapping[str, Step],
    rounds: int,
    least: float = 0.03,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Yield, for each round, the seconds that each step took in it.

    A step is warmed up first, and repeated in a round until it has run for ``least`` seconds.
    """
    repeats = {}
    for name, step in steps.items():
        seconds_of(step, 1, clock)
        repeats[name] = 1 + int(least / max(seconds_of(step, 2, clock), 1e-9))
    for _ in range(rounds):
        yield {name: seconds_of(step, repeats[name], clock) for name, step in steps.items()}


def ratios(times: Rounds, to: str) -> dict[str, tuple[float, float, float]]:
    """Least, median and largest over the rounds of each step's time divided by that of ``to``."""
    per_step = {name: [round_[name] / round_[to] for round_ in times] for name in times[0]}
    return {
        name: (min(values), statistics.median(values), max(values))
        for name, values in per_step.items()
    }


def peak_bytes(step: Step) -> float:
    """Memory that the tensors of a step take at most, above what there was before it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak
