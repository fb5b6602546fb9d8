r"""Proven intervals for moderate clouds, by the exact solver, by Sinkhorn and by a critic.

Pairs of clouds in 2 to 784 dimensions have 512 and 2,048 points a side (digits: as many as ship).
:func:`~lipbook.wasserstein.wasserstein1_bracket` proves an interval by three of its methods. For
``critic`` a GroupSort critic of orthogonal layers is fitted first, and its own value is kept beside
the bound that two c-transforms make of it.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.activations import GroupSort
from lipbook.lab import problems
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.known_answers import critic
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import fit_critic, kantorovich_dual, wasserstein1, wasserstein1_bracket

__all__ = ["CLOUDS", "METHODS", "run", "row"]

METHODS = ("exact", "sinkhorn", "critic")


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _shells(dim: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = _normal((2, n, dim), generator)
    return nn.functional.normalize(x), 2 * nn.functional.normalize(y)


def _cones(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    problem = problems.three_cones()
    return problem.sample_x(n, generator), problem.sample_y(n, generator)


def _mixtures(dim: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    sides = []
    for _ in range(2):
        centres = 2 * _normal((5, dim), generator)
        chosen = torch.randint(5, (n,), generator=generator)
        sides.append(centres[chosen] + 0.5 * _normal((n, dim), generator))
    return sides[0], sides[1]


def _digits(first: int, second: int, n: int, _: torch.Generator) -> tuple[Tensor, Tensor]:
    digits = mnist()
    images = digits.train_images.flatten(1).double()
    sides = [images[digits.train_labels == label] for label in (first, second)]
    count = min(n, *map(len, sides))
    return sides[0][:count], sides[1][:count]


#: What makes the two clouds of each pair, for a number of points and a generator.
CLOUDS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "shells, d = 2": functools.partial(_shells, 2),
    "shells, d = 128": functools.partial(_shells, 128),
    "three cones, d = 2": _cones,
    "mixtures, d = 2": functools.partial(_mixtures, 2),
    "mixtures, d = 10": functools.partial(_mixtures, 10),
    "digits 3 and 8, d = 784": functools.partial(_digits, 3, 8),
    "digits 0 and 1, d = 784": functools.partial(_digits, 0, 1),
}


def row(name: str, n: int, method: str, *, steps: int = 200, seed: int = 0) -> Outcome:
    """Prove an interval for one pair of clouds by one method.

    Parameters
    ----------
    name : str
        A key of ``CLOUDS``.
    n : int
        Points a side, or as many as there are.
    method : str
        One of ``METHODS``.
    steps : int
        Steps of the critic, of 256 points a side.
    seed : int
        Of the clouds and of the critic.

    Returns
    -------
    tuple of dict
        Results: ``clouds``, the name; ``n``, the points a side; ``method``; ``exact``, the distance
        by POT; ``lower`` and ``upper``; ``seconds`` of processor time, those of the critic
        included; and ``value``, the dual value of the critic, for its method. No tensors.
    """
    x, y = CLOUDS[name](n, torch.Generator().manual_seed(seed))
    results: dict[str, Any] = {"clouds": name, "n": len(x), "method": method}
    start = time.process_time()
    model = None
    if method == "critic":
        torch.manual_seed(seed)
        model = critic(
            x.shape[1], (128, 128), functools.partial(GroupSort, 8), OrthogonalLinear
        ).double()
        settings: dict[str, Any] = {"lr": 0.02, "schedule": "cosine", "seed": seed}
        fit_critic(model, x, y, steps=steps, batch_size=min(256, len(x)), **settings)
        results["value"] = kantorovich_dual(model, x, y).item()
    bracket = wasserstein1_bracket(x, y, model, method=method)  # type: ignore[arg-type]
    results["seconds"] = time.process_time() - start
    results |= {"lower": bracket.lower, "upper": bracket.upper}
    return results | {"exact": wasserstein1(x, y).item()}, {}


def run(
    *,
    names: Sequence[str] = tuple(CLOUDS),
    sizes: Sequence[int] = (512, 2048),
    steps: int = 200,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Prove intervals for all pairs of clouds, at all sizes, by all methods.

    Parameters
    ----------
    names : sequence of str
        Keys of ``CLOUDS``.
    sizes : sequence of int
        Points a side.
    steps : int
        Steps of each critic.
    seed : int
        Of the clouds and the critics.
    rows : Rows, optional
        Keeps finished rows.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`. No tensors.
    """
    rows = rows or Rows()
    row("shells, d = 2", 32, "exact")  # a first call pays for imports
    table = []
    grid = list(itertools.product(names, sizes, METHODS))
    for name, n, method in rows.bar(grid, "intervals"):
        one = functools.partial(row, name, n, method, steps=steps, seed=seed)
        table.append(rows.compute(f"{name} {n} {method}", one)[0])
    return {"rows": table}, {}
