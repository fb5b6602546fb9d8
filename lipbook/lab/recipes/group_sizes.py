r"""The group size of GroupSort in high dimension, on the cone in 128 dimensions.

A critic of three hidden layers of 128 units with orthogonal weights must learn
:math:`f(x) = \lVert x\rVert`, whose dual value is 1. The group size goes from pairs (MaxMin) to all
channels (FullSort); nothing else changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lipbook.activations import GroupSort
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.known_answers import LINEARS, PROBLEMS, fit

__all__ = ["run"]


def run(
    *,
    sizes: Sequence[int] = (2, 4, 8, 16, 32, 64, 128),
    seeds: int = 3,
    steps: int = 600,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    r"""Fit a critic for each group size.

    Parameters
    ----------
    sizes : sequence of int
        Group sizes, divisors of 128.
    seeds : int
        Critics of each size, with seeds ``seed``, ``seed`` + 1, ...
    steps : int
        Steps of each critic.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished critics.

    Returns
    -------
    tuple of dict
        Results: ``rows`` with ``group_size``, ``seed``, ``value`` and ``bound``; ``steps``. No
        tensors.
    """
    rows = rows or Rows()
    grid = [(size, seed + k) for size in sizes for k in range(seeds)]
    table = []
    for size, k in rows.bar(grid, "critics"):
        results, _ = rows.compute(
            f"group size {size} seed {k}", functools.partial(_row, size, seed=k, steps=steps)
        )
        table.append({"group_size": size, "seed": k} | results)
    return {"rows": table, "steps": steps}, {}


def _row(size: int, *, seed: int, steps: int) -> Outcome:
    activation, linear = functools.partial(GroupSort, size), LINEARS["orthogonal"]
    results, _ = fit(PROBLEMS["cone, d = 128"], activation, linear, seed=seed, steps=steps)
    return results, {}
