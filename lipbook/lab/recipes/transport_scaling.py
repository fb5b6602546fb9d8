r"""Exact and proven transport at growing sizes: seconds and gaps, up to 100,000 points a side.

Samples of two round normal distributions in the plane, with standard deviations 3 and 1, are
compared by each method of :func:`~lipbook.wasserstein.wasserstein1_bracket`: POT's exact solver,
which needs memory for all pairs of points, Sinkhorn's iteration, which needs it too, and blocks,
which need it for the points only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from lipbook.lab import problems
from lipbook.lab.recipes import Outcome, Rows
from lipbook.wasserstein import wasserstein1_bracket

__all__ = ["SIZES", "run", "row"]

#: Points a side for each method, as far as it takes a few minutes.
SIZES: dict[str, Sequence[int]] = {
    "exact": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "sinkhorn": (256, 512, 1024, 2048, 4096),
    "blocks": (256, 1024, 4096, 16384, 100_000),
}


def row(method: str, n: int, *, seed: int = 0) -> Outcome:
    """Prove bounds of one distance and measure the processor time.

    Parameters
    ----------
    method : str
        Of :func:`~lipbook.wasserstein.wasserstein1_bracket`.
    n : int
        Points a side.
    seed : int
        Of the points.

    Returns
    -------
    tuple of dict
        Results: the arguments; ``seconds`` of processor time; ``lower`` and ``upper``. No tensors.
    """
    problem = problems.concentric_gaussians(2, 3.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    x, y = problem.sample_x(n, generator), problem.sample_y(n, generator)
    start = time.process_time()
    bracket = wasserstein1_bracket(x, y, method=cast(Any, method))
    seconds = time.process_time() - start
    results = {"method": method, "n": n, "seconds": seconds}
    return results | {"lower": bracket.lower, "upper": bracket.upper}, {}


def run(
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Measure all methods at all sizes.

    Parameters
    ----------
    sizes : mapping, optional
        Points a side for each method, :data:`SIZES` if not given.
    seed : int
        Of the points.
    rows : Rows, optional
        Keeps finished rows.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``distance``, that of the distributions. No
        tensors.
    """
    rows = rows or Rows()
    grid = [(method, n) for method, counts in (sizes or SIZES).items() for n in counts]
    row("exact", 64)  # a first call pays for imports
    table = []
    for method, n in rows.bar(grid, "sizes"):
        one = functools.partial(row, method, n, seed=seed)
        table.append(rows.compute(f"{method} {n}", one)[0])
    return {"rows": table, "distance": problems.concentric_gaussians(2, 3.0, 1.0).distance}, {}
