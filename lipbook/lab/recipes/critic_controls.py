r"""Critics on known answers, one change at a time: the start or the constraint.

In :mod:`lipbook.lab.recipes.known_answers` a critic with orthogonal weights and one with torch's
``spectral_norm`` differ in two things: what is kept during the ascent, and where it starts. Here
every constraint that can is started from both places.

- *Start*. A matrix is drawn as torch draws it. The ``usual`` start is that matrix over its norm,
  the ``orthonormal`` one its polar factor: the same singular vectors, and all singular values 1.
- *Constraint*. ``orthonormal``: all singular values stay 1, so that only one start is possible.
  ``clipped``: divided by the exact norm if that exceeds 1. ``spectral norm``: torch's, always
  divided by the estimate of a power iteration.

Critics of one seed have the same draws of weights and biases, and see the same batches. The rate of
Adam is chosen for each of them out of :data:`RATES`, on other points, with the first seed. A value
is divided by the bound of its critic if that exceeds 1. All are judged on 4,000 points a side, and
beside them stands the exact distance of these points by POT.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any, cast

import ot
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lipbook.composition import lipschitz_bound
from lipbook.interpretability import margin_gradient
from lipbook.lab import problems
from lipbook.lab.recipes import Outcome, Rows, known_answers
from lipbook.lab.records import Record
from lipbook.orthogonal import OrthogonalLinear, SpectralNormLinear, polar
from lipbook.wasserstein import critic_difference, fit_critic

__all__ = ["ACTIVATIONS", "CELLS", "PROBLEMS", "RATES", "layer", "critic", "row", "run", "summary"]

#: Names of problems and activations of :mod:`~lipbook.lab.recipes.known_answers`.
PROBLEMS = ("three cones", "cone, d = 128")
ACTIVATIONS = ("ReLU", "MaxMin", "FullSort")
#: Pairs of a start and a constraint.
CELLS = (
    ("orthonormal", "orthonormal"),
    ("orthonormal", "clipped"),
    ("usual", "clipped"),
    ("orthonormal", "spectral norm"),
    ("usual", "spectral norm"),
)
#: Rates to choose from.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
STEPS = {"three cones": 800, "cone, d = 128": 500}
JUDGES = 4000
VALIDATION, TEST = 1_000_001, 1_000_002  # seeds of points; below 2**32, which torch reads
MEASURES = ("value", "kept", "slope")


def layer(plain: nn.Linear, start: str, constraint: str) -> nn.Module:
    """Put a plain layer where it starts, under a constraint.

    Parameters
    ----------
    plain : torch.nn.Linear
        Its bias is kept. It is not changed.
    start, constraint : str
        One of :data:`CELLS`.

    Returns
    -------
    torch.nn.Module
        A new layer.

    Raises
    ------
    ValueError
        There is no such start and constraint.

    Examples
    --------
    >>> plain = nn.Linear(4, 4)
    >>> for start in ("orthonormal", "usual"):
    ...     singular = torch.linalg.svdvals(layer(plain, start, "clipped").weight)
    ...     print(f"{singular[0].item():.3f}", singular[-1].item() > 0.999)
    1.000 True
    1.000 False
    """
    if (start, constraint) not in CELLS:
        raise ValueError(f"start and constraint: expected one of {CELLS}, got {start, constraint}")
    weight = plain.weight.detach().double()
    norm = torch.linalg.matrix_norm(weight, 2)
    weight = (polar(weight) if start == "orthonormal" else weight / norm).to(plain.weight)
    shape = plain.in_features, plain.out_features
    if constraint == "spectral norm":
        made: nn.Module = nn.Linear(*shape)
        made.weight = nn.Parameter(weight)
    else:
        made = (OrthogonalLinear if constraint == "orthonormal" else SpectralNormLinear)(*shape)
        made.weight = weight
    made.bias = nn.Parameter(plain.bias.detach().clone())
    return spectral_norm(made) if constraint == "spectral norm" else made


def critic(problem: str, activation: str, start: str, constraint: str, seed: int) -> nn.Sequential:
    """Build a critic.

    Parameters
    ----------
    problem : str
        One of :data:`PROBLEMS`.
    activation : str
        One of :data:`ACTIVATIONS`.
    start, constraint : str
        As in :func:`layer`.
    seed : int
        Of the draws, which depend on nothing else but the shapes.

    Returns
    -------
    torch.nn.Sequential
        Maps (batch, dim) to (batch, 1).
    """
    setting = known_answers.PROBLEMS[problem]
    sizes = (setting.problem().dim, *setting.widths, 1)
    torch.manual_seed(seed)
    plain = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    layers: list[nn.Module] = []
    for each in plain:
        layers += [layer(each, start, constraint), known_answers.ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def row(
    problem: str,
    activation: str,
    start: str,
    constraint: str,
    *,
    lr: float,
    steps: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Fit a critic and judge it.

    Parameters
    ----------
    problem, activation, start, constraint
        As in :func:`critic`.
    lr : float
        First rate of Adam; it falls to 0 as half a cosine.
    steps : int, optional
        Of 32 points a side; 800 for the three cones and 500 for the cone unless given.
    seed : int
        Of the weights and the batches.

    Returns
    -------
    tuple of dict
        Results: the arguments; ``bound``; ``validation``, the value on the points that choose;
        ``value``, that on the points that judge, both divided by the bound if it exceeds 1;
        ``kept``, the mean square of the singular values of a weight, averaged over all layers but
        the last, and ``slope``, the mean norm of the gradient at the points of the first
        distribution, both divided likewise. No tensors.
    """
    setting = known_answers.PROBLEMS[problem]
    clouds = setting.problem()
    model = critic(problem, activation, start, constraint, seed)
    steps = steps or STEPS[problem]
    fit_critic(
        model, clouds.sample_x, clouds.sample_y,
        steps=steps, lr=lr, batch_size=32, schedule="cosine", seed=seed,
    )  # fmt: skip
    bound = lipschitz_bound(model, (clouds.dim,)).value
    x, y = _points(clouds, TEST)
    weights = [cast(Tensor, each.weight).detach() for each in model if hasattr(each, "weight")][:-1]
    kept = [(w.square().sum() / min(w.shape)).item() for w in weights]
    slopes = margin_gradient(model, x.float(), torch.ones(len(x), dtype=torch.int64)).norm(dim=1)
    over = max(1.0, bound)
    return {
        "problem": problem, "activation": activation, "start": start, "constraint": constraint,
        "lr": lr, "steps": steps, "seed": seed, "bound": bound,
        "validation": critic_difference(model, *_points(clouds, VALIDATION)).item() / over,
        "value": critic_difference(model, x, y).item() / over,
        "kept": statistics.mean(kept),
        "slope": slopes.mean().item() / over,
    }, {}  # fmt: skip


def _points(clouds: problems.TransportProblem, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return clouds.sample_x(JUDGES, generator), clouds.sample_y(JUDGES, generator)


def _exact(problem: str) -> Outcome:
    """Exact distance of the points that judge, by POT."""
    points = _points(known_answers.PROBLEMS[problem].problem(), TEST)
    cost = ot.dist(*(each.numpy() for each in points), metric="euclidean")
    return {"exact": float(ot.emd2([], [], cost, numItermax=10**7))}, {}


def run(
    *,
    seeds: int = 3,
    shorten: float = 1.0,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each critic, then fit it from all seeds.

    Parameters
    ----------
    seeds : int
        Critics of each kind.
    shorten : float
        Factor of all numbers of steps.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``exact``, for each problem the distance of the points that judge; ``tried``, rows
        of :func:`row` of all rates; ``rows``, those of the chosen rate. No tensors.
    """
    rows = rows or Rows()
    exact = {
        problem: rows.compute(f"exact {problem}", functools.partial(_exact, problem))[0]["exact"]
        for problem in PROBLEMS
    }
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    kinds = list(itertools.product(PROBLEMS, ACTIVATIONS, CELLS))
    for problem, activation, cell in rows.bar(kinds, "critics"):
        names = problem, activation, *cell
        steps = max(1, round(shorten * STEPS[problem]))
        one = functools.partial(row, *names, steps=steps)
        trials, best = rows.chosen(
            " ".join(names), one, RATES, range(seed, seed + seeds), lambda each: each["validation"]
        )
        tried += trials
        chosen += best
    return {"exact": exact, "tried": tried, "rows": chosen}, {}


def summary(record: Record) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("critic_controls")``.

    Returns
    -------
    dict
        For each problem, activation, start and constraint, the numbers of all seeds: lists of
        ``value``, ``kept`` and ``slope``.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> found = summary(records.read("critic_controls"))
    >>> len(found["three cones", "MaxMin", "usual", "clipped"]["value"])
    3
    """
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for one in record.results["rows"]:
        key = one["problem"], one["activation"], one["start"], one["constraint"]
        mine = found.setdefault(key, {measure: [] for measure in MEASURES})
        for measure in MEASURES:
            mine[measure].append(one[measure])
    return found
