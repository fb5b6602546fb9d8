r"""Proven transport of large clouds by sparse graphs: seconds, memory and gaps.

Mixtures of five normal distributions a side, each of another shape, and the digits 0 to 4 against 5
to 9 are compared by the method "sparse" of :func:`~lipbook.wasserstein.wasserstein1_bracket`, with
up to 100,000 points a side. POT's solvers for large clouds get an interval, too: their
potentials by two c-transforms, their plans by rounding to the marginals.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import ot
import torch
from torch import Tensor

from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.wasserstein import c_transform, wasserstein1_bracket

__all__ = ["HARD", "PEERS", "hard_row", "mixtures", "peer_row", "run"]

#: Clouds: dimensions (784 stands for digits), points a side, and the tolerance.
HARD: Sequence[tuple[int, int, float]] = (
    (2, 5000, 0.01),
    (20, 8000, 0.01),
    (784, 7000, 0.005),
    (20, 20_000, 0.01),
    (100, 20_000, 0.01),
    (20, 100_000, 0.01),
)

#: Solvers of POT, and "sparse".
PEERS = ("exact", "lazy Sinkhorn", "low-rank Sinkhorn", "sparse")


def mixtures(dim: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw five normal distributions a side, of other centres and axes each.

    Parameters
    ----------
    dim, n, seed : int
        Dimensions, points a side, and the seed.

    Returns
    -------
    tuple of Tensor
        The two clouds (n, dim), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    sides = []
    for _ in range(2):
        centres = 2 * normal(5, dim)
        chosen = torch.randint(5, (n,), generator=generator)
        points = normal(n, dim)
        widths = 0.2 + 1.3 * torch.rand(5, dim, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(normal(5, dim, dim))[0]
        for k in range(5):
            mine = chosen == k
            points[mine] = centres[k] + (points[mine] * widths[k]) @ axes[k].mT
        sides.append(points)
    return sides[0], sides[1]


def _digits(n: int) -> tuple[Tensor, Tensor]:
    digits = mnist(full=n > 7000)
    images = torch.cat((digits.train_images, digits.test_images)).flatten(1)
    low = torch.cat((digits.train_labels, digits.test_labels)) < 5
    return images[low][:n].double(), images[~low][:n].double()


def hard_row(dim: int, n: int, tolerance: float, *, seed: int = 0) -> Outcome:
    """Prove bounds by sparse graphs and measure processor time and memory.

    Parameters
    ----------
    dim : int
        Dimensions of the mixtures; 784 for digits.
    n : int
        Points a side, or as many as there are.
    tolerance : float
        Of :func:`~lipbook.wasserstein.wasserstein1_bracket`.
    seed : int
        Of the points.

    Returns
    -------
    tuple of dict
        Results: ``d``, ``n``, ``tolerance``; ``seconds`` of processor time; ``gigabytes``, the most
        that the process has held so far; ``lower`` and ``upper``. No tensors.
    """
    x, y = _digits(n) if dim == 784 else mixtures(dim, n, seed)
    start = time.process_time()
    bracket = wasserstein1_bracket(x, y, method="sparse", tolerance=tolerance)
    seconds = time.process_time() - start
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results = {"d": dim, "n": len(x), "tolerance": tolerance, "seconds": seconds}
    return results | {"gigabytes": held, "lower": bracket.lower, "upper": bracket.upper}, {}


def peer_row(method: str, n: int, *, seed: int = 0) -> Outcome:
    """Prove an interval by what a solver of POT returns, and measure the time of the solver.

    Parameters
    ----------
    method : str
        One of :data:`PEERS`.
    n : int
        Points a side, of mixtures in 20 dimensions.
    seed : int
        Of the points.

    Returns
    -------
    tuple of dict
        Results: the arguments; ``seconds`` of processor time of the solver alone; ``lower`` and
        ``upper``; where the solver returns no potentials, ``lower`` is None. No tensors.
    """
    x, y = mixtures(20, n, seed)
    results: dict[str, Any] = {"method": method, "n": n}
    start = time.process_time()
    if method in ("exact", "sparse"):
        bracket = wasserstein1_bracket(x, y, method=cast(Any, method))
        results["seconds"] = time.process_time() - start
        return results | {"lower": bracket.lower, "upper": bracket.upper}, {}
    potential = None
    if method == "lazy Sinkhorn":
        entropy = 0.2
        found = ot.bregman.empirical_sinkhorn(
            x.numpy(),
            y.numpy(),
            entropy,
            metric="euclidean",
            numIterMax=200,
            stopThr=1e-4,
            isLazy=True,
            batchSize=1000,
            log=True,
            warn=False,
        )
        results["seconds"] = time.process_time() - start
        f, g = found[:2]
        cost = torch.cdist(x, y).numpy()
        plan = np.exp(f[:, None] + g - cost / entropy)
        potential = torch.from_numpy(np.asarray(f)) * entropy
    else:
        solved = ot.solve_sample(
            x.numpy(), y.numpy(), method="lowrank", reg=0.1, rank=100, max_iter=200
        )
        results["seconds"] = time.process_time() - start
        cost, plan = torch.cdist(x, y).numpy(), np.asarray(solved.lazy_plan[:])
    plan = plan * np.minimum(1 / n / plan.sum(1, keepdims=True), 1)
    plan = plan * np.minimum(1 / n / plan.sum(0), 1)
    missing = 1 / n - plan.sum(1), 1 / n - plan.sum(0)
    upper = (plan * cost).sum() + missing[0] @ cost @ missing[1] / max(missing[0].sum(), 1e-300)
    lower = None
    if potential is not None:
        g = c_transform(potential, x, y)
        lower = (c_transform(g, y, x).mean() + g.mean()).item()
    return results | {"lower": lower, "upper": float(upper)}, {}


def run(
    *,
    hard: Sequence[tuple[int, int, float]] = HARD,
    peers: Sequence[str] = PEERS,
    peer_size: int = 2000,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Measure all clouds by sparse graphs, and all solvers on one pair of clouds.

    Parameters
    ----------
    hard : sequence of tuple
        Dimensions, points a side and tolerance of each comparison by sparse graphs.
    peers : sequence of str
        Of :data:`PEERS`.
    peer_size : int
        Points a side for these.
    seed : int
        Of the points.
    rows : Rows, optional
        Keeps finished rows.

    Returns
    -------
    tuple of dict
        Results: ``hard`` and ``peers``, those of :func:`hard_row` and :func:`peer_row`. No tensors.
    """
    rows = rows or Rows()
    peer_row("sparse", 64)  # a first call pays for imports
    others = [
        rows.compute(f"{name} {peer_size}", functools.partial(peer_row, name, peer_size, seed=seed))
        for name in rows.bar(peers, "solvers")
    ]
    harder = [
        rows.compute(f"{d} {n}", functools.partial(hard_row, d, n, tolerance, seed=seed))
        for d, n, tolerance in rows.bar(hard, "mixtures and digits")
    ]
    return {"hard": [row for row, _ in harder], "peers": [row for row, _ in others]}, {}
