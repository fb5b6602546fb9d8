"""The bracket: a feasible dual point and a coupling, evaluated with all rounding."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, distributed

from lipbook._processes import Team
from lipbook.norms.arguments import _real
from lipbook.wasserstein.blocks import axes, coupling
from lipbook.wasserstein.clouds import (
    TINY,
    UNIT,
    Cloud,
    Pair,
    check_count,
    check_memory,
    checked_pair,
    distances,
    down,
    pair_distances,
    up,
)
from lipbook.wasserstein.critics import evaluate_in_chunks
from lipbook.wasserstein.exact import (
    Plan,
    network_simplex,
    northwest,
    plan_value,
    solve_on_the_line,
)
from lipbook.wasserstein.sparse import (
    Graph,
    filter_of,
    fine_enough,
    scale_on_graph,
    seconds_of_a_round,
    transform_with_candidates,
)
from lipbook.wasserstein.transforms import (
    CHUNK,
    dual_value,
    transform_from_below,
    two_transforms,
)

__all__ = [
    "TransportBracket",
    "wasserstein1_bracket",
]

Method = Literal["auto", "exact", "sinkhorn", "sparse", "blocks", "critic"]

_EXACT_SIZE = 2048**2  # entries of the cost matrix up to which "auto" is "exact"
_DENSE_SIZE = 6000**2  # and "sinkhorn"
_FEW_DIMENSIONS = 3  # up to which it is "blocks" beyond that, and "sparse" in more
_SAMPLE = 1500  # points a side whose exact potentials start the lower bound of "blocks"
_SAMPLES = 4  # so many times, and averaged
_FROM_SAMPLES = "exact potentials of samples"
_TRANSFORMED_SIZE = 2**36  # pairs of points up to which "blocks" goes through all of them
_SOFT = 2048  # points a side whose entropic potentials start "sparse"


@dataclasses.dataclass(frozen=True)
class TransportBracket:
    r"""Two proven bounds of W₁, and what proves them.

    Parameters
    ----------
    lower, upper : float
        ``lower`` :math:`\le W_1 \le` ``upper``.
    lower_from, upper_from : str
        How each was obtained.
    x_potential, y_potential : torch.Tensor
        Feasible dual point, shapes (n,) and (m,), float64:
        :math:`f_i + g_j \le \lVert x_i - y_j\rVert_2` for all points of positive weight.
        :math:`\sum a_i f_i + \sum b_j g_j` is the lower bound, up to rounding; ``lower`` is the
        number below.
    plan : torch.Tensor
        The coupling, a sparse (n, m) float64 tensor whose entries sum to 1. Its marginals are
        the weights up to rounding, for which ``upper`` makes up.

    Examples
    --------
    >>> x = torch.zeros(1, 2)
    >>> y = torch.tensor([[3.0, 4.0]])
    >>> bracket = wasserstein1_bracket(x, y)
    >>> bracket.lower <= 5 <= bracket.upper
    True
    >>> print(bracket)
    5 <= W1 <= 5 (gap 0.0 %)
    from below: potentials of POT's exact plan, c-transformed
    from above: POT's exact plan
    """

    lower: float
    upper: float
    lower_from: str
    upper_from: str
    x_potential: Tensor = dataclasses.field(repr=False, compare=False)
    y_potential: Tensor = dataclasses.field(repr=False, compare=False)
    plan: Tensor = dataclasses.field(repr=False, compare=False)

    @property
    def gap(self) -> float:
        """Difference of the bounds."""
        return self.upper - self.lower

    @property
    def relative_gap(self) -> float:
        """Difference of the bounds in units of the upper one; 0 if both are 0."""
        return self.gap / self.upper if self.upper else 0.0

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def __str__(self) -> str:
        return (
            f"{self.lower:.6g} <= W1 <= {self.upper:.6g} (gap {100 * self.relative_gap:.1f} %)\n"
            f"from below: {self.lower_from}\nfrom above: {self.upper_from}"
        )


def wasserstein1_bracket(
    x: Tensor,
    y: Tensor,
    critic: Callable[[Tensor], Tensor] | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    method: Method = "auto",
    tolerance: float = 0.01,
    sweeps: int = 10,
    seed: int = 0,
    seconds: float | None = None,
    progress: Callable[[float, float], object] | None = None,
    group: distributed.ProcessGroup | None = None,
) -> TransportBracket:
    r"""Proven bounds of W₁ between two finite clouds: a feasible dual point and a coupling.

    .. math::
        \sum_i a_i f_i + \sum_j b_j g_j \;\le\; W_1 \;\le\;
        \sum_{ij} P_{ij} \lVert x_i - y_j\rVert_2, \qquad
        f_i + g_j \le \lVert x_i - y_j\rVert_2, \quad P \in \Pi(a, b)

    **Guaranteed**, for every input that is not refused: ``lower`` :math:`\le W_1 \le` ``upper``, in
    real arithmetic for the points as given (the weights divided by their sum). The potentials are
    c-transforms (:func:`c_transform`) rounded towards feasibility; a plan whose marginals are off
    by rounding pays for it; distances, products and sums carry error bounds. The critic need not be
    Lipschitz: only its values on the points matter, and it can make the lower bound better or
    worse, never wrong. **Hoped**: a small gap.

    ========== ====================================== ========================== ==============
    method     from below                             from above                 time, memory
    ========== ====================================== ========================== ==============
    "exact"    the potentials of POT's exact plan     POT's exact plan           ~n³, n²
    "sinkhorn" Sinkhorn's iteration with decreasing   its plan, rounded to the   n² a step, n²
               entropy, started at the critic         marginals
    "sparse"   entropic potentials of a sample or     Sinkhorn's plan on the     n², n
               the critic, then Sinkhorn's on a       graph, rounded to the
               graph of a few pairs for each point    marginals
    "blocks"   the critic or the exact potentials     the exact plan of cells,   n², n
               of samples of the coupling, as the     refined to the points by
               better one on a sample of y            exact plans in blocks
    "critic"   the critic                             as for "blocks"            n², n
    ========== ====================================== ========================== ==============

    All lower bounds end with two c-transforms on all points, but one: beyond 2^36 pairs of points
    in up to 3 dimensions "blocks" takes the mean of the c-transforms of its samples, which is
    1-Lipschitz as it is. Then no step goes through all pairs, and the gap is larger. On the line,
    "exact" is by sorting; "exact" needs no critic and makes no use of one.
    "auto" is "exact" on the line and up to 2048² pairs of points, "sinkhorn" up to 6000², beyond
    "blocks" up to 3 dimensions and "sparse" in more; it does not depend on the machine, and all
    methods are deterministic, unless ``seconds`` is given. "sinkhorn" halves the entropy until the
    gap is below ``tolerance`` or float32, in which it iterates, is exhausted. "sparse" goes through
    all pairs twice a round, in float32 that rules pairs out and float64 for those left, until
    the gap is below ``tolerance``, for 6 rounds at most: two mostly do in many dimensions, and in
    two or three, where more pairs matter, six may be too few for thousands of points.

    **Several processes.** With a ``group``, the processes share the passes of "sparse" over all
    pairs, and of "blocks" and "critic" the blocks and the c-transforms; the rest, and "exact" and
    "sinkhorn", each does for itself. All return the same bracket, bit for bit that of one process
    with as many threads on the same machine, since they share what one does block by block. All
    are called with the same arguments and the same points, which are compared; what one refuses
    all refuse. See :func:`lipbook.robustness.certify` for which group to pass.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    critic : callable, optional
        Maps points (n, d), in the shape of ``x`` and the dtype of its parameters, to values (n,)
        or (n, 1); large on ``x``, small on ``y``. Its values are used as they are, or times a
        power of two or 0 where that gives a better bound on a sample.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    method : str
        As in the table.
    tolerance : float
        Relative gap at which "sinkhorn" and "sparse" stop. "blocks" and "critic" leave a level
        once a sweep has improved the cost by less than a fiftieth of it.
    sweeps : int
        How often "blocks" and "critic" solve all blocks at each level, at most.
    seed : int
        Seed of the directions of the blocks and of samples.
    seconds : float, optional
        "sparse" begins no round that would end later, as measured by the one before.
    progress : callable, optional
        "sparse" calls it with the lower and the upper bound after each round.
    group : torch.distributed.ProcessGroup, optional
        Processes that share the work, this one among them, with the points on the CPU; this one
        alone unless given.

    Returns
    -------
    TransportBracket

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if the critic's values are NaN or infinite or have another
        shape; if ``method`` is unknown or is "critic" without a critic; if ``seconds`` is too
        short for the first round, as estimated by a few rows of it; if ``seconds`` or ``progress``
        is given for another method; if an argument or a value of the critic is not the same on all
        processes of the group.
    RuntimeError
        If another process of the group failed otherwise, or makes other calls.

    Examples
    --------
    The points of a sphere against its centre, with the exact solver and without:

    >>> y = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64))
    >>> x = torch.zeros(50, 3, dtype=torch.float64)
    >>> exact = wasserstein1_bracket(x, y)
    >>> exact.lower <= 1 <= exact.upper, exact.gap < 1e-14
    (True, True)
    >>> 1 in wasserstein1_bracket(x, y, method="sinkhorn")
    True

    References
    ----------
    :cite:t:`peyre2019` for Sinkhorn's iteration and c-transforms; :cite:t:`altschuler2017`,
    algorithm 2, for rounding to the marginals.
    """
    with Team(group) as team:
        pair = checked_pair(x, y, x_weights, y_weights)
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        if method == "critic" and critic is None:
            raise ValueError('critic must be given for method="critic", got None')
        _real("tolerance", tolerance)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
        sweeps = check_count("sweeps", sweeps, 0)
        rng = np.random.default_rng(check_count("seed", seed, 0))
        size = len(pair.x.mass) * len(pair.y.mass)
        if method == "auto":
            line = pair.x.points.shape[1] == 1
            method = "exact" if line or size <= _EXACT_SIZE else "sinkhorn"
            if not line and size > _DENSE_SIZE:
                method = "blocks" if pair.x.points.shape[1] <= _FEW_DIMENSIONS else "sparse"
        _check_rounds(method, seconds, progress)
        values = None if critic is None else evaluate_in_chunks(critic, x)
        if team.size > 1:
            if x.device.type == "cuda":
                raise ValueError("x and y must be on the CPU with a group, got them on CUDA")
            team.agree(
                x=x, y=y, x_weights=x_weights, y_weights=y_weights, critic=values, method=method,
                tolerance=tolerance, sweeps=sweeps, seed=seed, seconds=seconds,
            )  # fmt: skip
        start = None if values is None else _critic_start(pair, values, rng)

        if method == "exact":
            return _exact_bracket(pair)
        if method == "sinkhorn":
            return _sinkhorn_bracket(pair, start, tolerance)
        if method == "sparse":
            return _sparse_bracket(pair, start, tolerance, rng, seconds or math.inf, progress, team)
        only_critic = method == "critic"
        return _blocks_bracket(pair, start, tolerance, sweeps, rng, only_critic, team)


def _check_rounds(method: Method, seconds: float | None, progress: object) -> None:
    """Refuse a budget that is none, a progress that cannot be called, and either without rounds."""
    if seconds is not None:
        _real("seconds", seconds)
        if not seconds > 0:
            raise ValueError(f"seconds must be > 0, got {seconds}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {type(progress).__name__}")
    for name, value in (("seconds", seconds), ("progress", progress)):
        if value is not None and method != "sparse":
            raise ValueError(f'{name} must be None unless method is "sparse", got {value!r}')


def _bracket(
    pair: Pair,
    f: Tensor,
    g: Tensor,
    plan: Plan,
    lower_from: str,
    upper_from: str,
    costs: tuple[Tensor, float] | None = None,
) -> TransportBracket:
    """Evaluate a feasible dual point and a plan; put both in the units of the given points."""
    x, y, scale = pair.x, pair.y, 2.0**pair.exponent
    lower = down(dual_value(x, f) + dual_value(y, g))
    if lower < 0:
        f, g, lower = torch.zeros_like(f), torch.zeros_like(g), 0.0
    lower = min(down(lower * scale), sys.float_info.max) if lower else 0.0
    upper = plan_value(pair, plan, costs)
    upper = up(upper * scale) if upper else 0.0
    f = _spread(x, f, y.points, g)
    g = _spread(y, g, x.points, f[x.support.to(f.device)])
    moves = [x.support[torch.from_numpy(plan.i)], y.support[torch.from_numpy(plan.j)]]
    shares = torch.from_numpy(plan.mass / plan.mass.sum())
    coupling = torch.sparse_coo_tensor(
        torch.stack(moves), shares, (x.size, y.size), check_invariants=True
    )
    f, g = f.cpu() * scale, g.cpu() * scale
    return TransportBracket(lower, upper, lower_from, upper_from, f, g, coupling.coalesce())


def _spread(cloud: Cloud, potential: Tensor, points: Tensor, other: Tensor) -> Tensor:
    """Give the points of weight zero the largest potential that is feasible with ``other``."""
    if not len(cloud.zero):
        return potential
    whole = torch.empty(cloud.size, dtype=torch.float64, device=potential.device)
    rest = torch.ones(cloud.size, dtype=torch.bool)
    rest[cloud.support] = False
    whole[cloud.support] = potential
    whole[rest] = transform_from_below(cloud.zero, points, other)
    return whole


def _exact_bracket(pair: Pair) -> TransportBracket:
    x, y = pair.x.points, pair.y.points
    if x.shape[1] == 1:
        plan, *line = solve_on_the_line(pair)
        f, g = (torch.from_numpy(values).to(x) for values in line)
        return _bracket(
            pair, f, g, plan, "the potential of the sorted points", "the monotone coupling"
        )
    check_memory(len(x), len(y), 50)
    costs = distances(x, y)
    plan, potential, _ = network_simplex(
        costs[0], pair.x.mass, pair.y.mass * (pair.x.total / pair.y.total)
    )
    f, g = two_transforms(x, y, torch.from_numpy(potential).to(x), costs)
    lower_from = "potentials of POT's exact plan, c-transformed"
    return _bracket(pair, f, g, plan, lower_from, "POT's exact plan")


def _sample(mass: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw indices independently; give all indices if there are no more than ``size``."""
    if len(mass) <= size:
        return np.arange(len(mass))
    return rng.choice(len(mass), size, p=mass / mass.sum())


def _critic_start(pair: Pair, values: Tensor, rng: np.random.Generator) -> Tensor:
    """Values on x, in scaled units, times the factor that is best on a sample."""
    x, y = pair.x, pair.y
    device = x.points.device
    values, size = _unit(values[x.support.to(values.device)].to(device))
    values, spread = _unit(values - values.mean())
    i, j = (torch.from_numpy(_sample(c.mass, 1024, rng)).to(device) for c in (x, y))
    a, b = (
        torch.from_numpy(c.mass / c.total).to(device)
        if len(k) == len(c.mass)
        else torch.full((len(k),), 1 / len(k), dtype=torch.float64, device=device)
        for c, k in ((x, i), (y, j))
    )
    costs = distances(x.points[i], y.points[j])
    given = min(spread * size * 2.0**-pair.exponent, sys.float_info.max)
    digits = math.frexp(math.frexp(spread)[0] * math.frexp(size)[0])[0]
    largest = math.frexp(costs[0].max().item())[1]
    best, factor = -math.inf, 0.0
    for candidate in (given, 0.0, *(math.ldexp(digits, largest + k) for k in range(-6, 7))):
        f, g = two_transforms(x.points[i], y.points[j], candidate * values[i], costs)
        value = (a @ f + b @ g).item()
        if value > best:
            best, factor = value, candidate
    return factor * values


def _unit(values: Tensor) -> tuple[Tensor, float]:
    """Divide by the largest absolute value, unless that is 0."""
    size = values.abs().max().item()
    return (values / size if size else values), size


# Note [decreasing entropy]
# Sinkhorn's iteration with entropy eps needs many steps if started far away, few if started at
# the potentials for 2 eps. At each level the kernel exp((f + g - c) / eps) is formed once, in
# float32, and the iterations are matrix-vector products, over-relaxed by 1.5. c-transforms
# before each level give every row and column of the kernel an entry 1, so that none underflows.


def _sinkhorn_bracket(pair: Pair, start: Tensor | None, tolerance: float) -> TransportBracket:
    x, y = pair.x.points, pair.y.points
    check_memory(len(x), len(y), 40)
    costs = distances(x, y)
    cost, mean = costs[0], costs[0].mean().item()
    a, b = (torch.from_numpy(c.mass / c.total).to(x) for c in (pair.x, pair.y))
    f, g = two_transforms(x, y, torch.zeros_like(a) if start is None else start, costs)
    best = (a @ f + b @ g).item(), f, g
    scale = mean or 1.0
    entropy, steps = scale / 16, 0
    while True:
        kernel = _kernel(f, g, cost, entropy)
        enough = max(0.25 * tolerance * best[0] / scale, 1e-6)  # of float32 no more
        u, v, astray, taken = _scale(kernel, a.float(), b.float(), enough)
        steps += taken
        f, g = two_transforms(x, y, f + entropy * u.double().log(), costs)
        value = (a @ f + b @ g).item()
        if value > best[0]:
            best = value, f, g
        elif not math.isfinite(value):
            f, g = best[1:]
        upper = _plan_cost(kernel, u * a.float(), v * b.float(), cost) + astray * mean
        if upper - best[0] <= 0.8 * tolerance * upper or entropy < 1e-5 * scale:
            break
        entropy /= 2
    dense = kernel.double().mul_((u.double() * a)[:, None]).mul_(v.double() * b)
    lower_from = f"the potentials of {steps} Sinkhorn steps, c-transformed"
    if start is not None:
        lower_from = f"the critic, improved by {steps} Sinkhorn steps and c-transforms"
    entropy *= 2.0**pair.exponent
    upper_from = f"Sinkhorn's plan with entropy {entropy:.2g}, rounded to the marginals"
    return _bracket(pair, *best[1:], _rounded(pair, dense), lower_from, upper_from, costs)


def _kernel(f: Tensor, g: Tensor, cost: Tensor, entropy: float) -> Tensor:
    step = max(1, CHUNK // len(g))
    parts = [
        (f[k : k + step, None] + g - cost[k : k + step]).div_(entropy).float().exp_()
        for k in range(0, len(f), step)
    ]
    return torch.cat(parts)


def _scale(
    kernel: Tensor, a: Tensor, b: Tensor, enough: float
) -> tuple[Tensor, Tensor, float, int]:
    """Sinkhorn's iteration on a kernel: factors, the mass astray, and the steps taken."""
    u, v, relax, astray = torch.ones_like(a), torch.ones_like(b), 1.5, math.inf
    for step in range(1, 501):
        rows = (kernel @ (v * b)).clamp(min=1e-30)
        if step % 10 == 0:
            columns = (kernel.mT @ (u * a)).clamp(min=1e-30)
            errors = a @ (rows * u - 1).abs() + b @ (columns * v - 1).abs()
            astray = errors.item() / 2
            if astray <= enough:
                break
            if not math.isfinite(astray) and relax > 1:  # start again, without relaxing
                u, v, relax = torch.ones_like(a), torch.ones_like(b), 1.0
                continue
        u = u ** (1 - relax) * rows**-relax
        columns = (kernel.mT @ (u * a)).clamp(min=1e-30)
        v = v ** (1 - relax) * columns**-relax
    return u.clamp(1e-30, 1e30), v.clamp(1e-30, 1e30), astray, step


def _plan_cost(kernel: Tensor, u: Tensor, v: Tensor, cost: Tensor) -> float:
    step = max(1, CHUNK // len(v))
    rows = [(kernel[k : k + step] * cost[k : k + step].float()) @ v for k in range(0, len(u), step)]
    return (torch.cat(rows) @ u).item()


def _rounded(pair: Pair, dense: Tensor) -> Plan:
    """Round a matrix to the marginals; couple what is missing monotonely along an axis."""
    a, b = (torch.from_numpy(c.mass / c.total).to(dense) for c in (pair.x, pair.y))
    dense[~(dense >= 1e-5 / len(b) * a[:, None])] = 0  # NaN as well
    dense *= (a / dense.sum(1).clamp(min=1e-300)).clamp(max=1)[:, None]
    dense *= (b / dense.sum(0).clamp(min=1e-300)).clamp(max=1)
    i, j = (k.cpu().numpy() for k in dense.nonzero(as_tuple=True))
    mass = dense[dense > 0].cpu().numpy()
    return _completed(pair, Plan(i, j, mass * pair.x.total))


def _completed(pair: Pair, plan: Plan) -> Plan:
    """Couple what a plan leaves, monotonely along an axis."""
    masses = pair.x.mass, pair.y.mass * (pair.x.total / pair.y.total)
    missing = [
        np.maximum(m - np.bincount(k, plan.mass, len(m)), 0)
        for m, k in zip(masses, (plan.i, plan.j), strict=True)
    ]
    if min(m.sum() for m in missing) == 0:
        return plan
    axis = axes(pair, 1, np.random.default_rng(0))
    order = [np.argsort((c.points @ axis)[:, 0].cpu().numpy()) for c in (pair.x, pair.y)]
    rest = northwest(missing[0][order[0]], missing[1][order[1]])
    return Plan(
        np.concatenate((plan.i, order[0][rest.i])),
        np.concatenate((plan.j, order[1][rest.j])),
        np.concatenate((plan.mass, rest.mass)),
    )


# Note [rounds]
# A round takes two c-transforms of all points, which is a lower bound, and keeps the pairs that
# came near the minima. On the graph of all pairs kept so far a step of Sinkhorn's iteration costs
# a small part of that, the less the more points there are. Its potentials start the next round,
# its plan is rounded to the marginals. A pair that the graph lacks shows in the next round: there
# the potentials break its constraint.

_ROUNDS = 6


def _sparse_bracket(
    pair: Pair,
    start: Tensor | None,
    tolerance: float,
    rng: np.random.Generator,
    seconds: float,
    progress: Callable[[float, float], object] | None,
    team: Team,
) -> TransportBracket:
    begin = time.perf_counter()
    x, y = pair.x, pair.y
    n, m = len(x.mass), len(y.mass)
    centre = (x.points.mean(0) + y.points.mean(0)) / 2
    sides = [filter_of(c.points, centre, rng) for c in (x, y)]
    if seconds < math.inf:
        needed = seconds_of_a_round(*sides)
        if needed > seconds:
            raise ValueError(f"seconds must be >= {needed:.2g} for one round, got {seconds:g}")
    directions = axes(pair, min(8, x.points.shape[1]), rng)
    plan = coupling(pair, directions, 2, 0, rng, team)
    upper = plan_value(pair, plan)
    sides = [fine_enough(side, centre, 0.05 * tolerance * upper, upper) for side in sides]
    keys = np.unique(plan.i * m + plan.j)
    f = _soft_start(pair, rng, tolerance) if start is None else start
    best = -math.inf, torch.zeros(0), torch.zeros(0)
    for number in range(1, _ROUNDS + 1):
        begin_round = time.perf_counter()
        g, columns = transform_with_candidates(sides[1], sides[0], f - f.mean(), team)
        f, rows = transform_with_candidates(sides[0], sides[1], g, team)
        lower = down(dual_value(x, f) + dual_value(y, g))
        if lower > best[0] or number == 1:
            best = lower, f, g
        unit = max(best[0], 1e-3 * upper, TINY)
        if upper - best[0] > tolerance * upper:
            found = (
                (np.arange(n)[:, None] * m + rows.cpu().numpy()).ravel(),
                (columns.cpu().numpy() * m + np.arange(m)[:, None]).ravel(),
            )
            graph = _graph(pair, np.unique(np.concatenate((keys, *found))))
            potentials, new = _solve_on_graph(pair, graph, (f, g), tolerance * unit)
            value = plan_value(pair, new)
            if value < upper:
                plan, upper = new, value
        if progress is not None:
            progress(best[0] * 2.0**pair.exponent, upper * 2.0**pair.exponent)
        now = time.perf_counter()
        late = any(team.gather("the clock", 2 * now - begin_round - begin > seconds))
        if late or upper - best[0] <= tolerance * upper or not np.isfinite(potentials[0]).all():
            break
        f = torch.from_numpy(potentials[0]).to(x.points)
        slack = graph.cost - potentials[0][graph.i] - potentials[1][graph.j]
        near = slack < 3 * tolerance * unit
        keys = np.union1d(graph.i[near] * m + graph.j[near], plan.i * m + plan.j)
    lower_from = f"potentials of Sinkhorn's steps on a sparse graph, c-transformed, {number} rounds"
    return _bracket(pair, *best[1:], plan, lower_from, "a plan on the sparse graph, rounded")


def _solve_on_graph(
    pair: Pair, graph: Graph, start: tuple[Tensor, Tensor], unit: float
) -> tuple[tuple[np.ndarray, np.ndarray], Plan]:
    """Sinkhorn's iteration with decreasing entropy, and its plan, rounded to the marginals."""
    masses = pair.x.mass / pair.x.total, pair.y.mass / pair.y.total
    potentials = start[0].cpu().numpy(), start[1].cpu().numpy()
    enough = 0.05 * unit / (float(graph.cost.mean()) or 1.0)
    for level in (1.6, 0.8, 0.4, 0.2, 0.1):
        potentials, mass, _ = scale_on_graph(graph, masses, potentials, level * unit, enough)
    return potentials, _rounded_moves(pair, graph, mass)


def _graph(pair: Pair, keys: np.ndarray) -> Graph:
    m = len(pair.y.mass)
    i, j = keys // m, keys % m
    cost = pair_distances(pair.x.points, pair.y.points, i, j)
    return Graph(i, j, cost, (len(pair.x.mass), m))


def _rounded_moves(pair: Pair, graph: Graph, mass: np.ndarray) -> Plan:
    a, b = pair.x.mass / pair.x.total, pair.y.mass / pair.y.total
    mass = np.where(mass >= 1e-3 * np.minimum(a[graph.i], b[graph.j]), mass, 0)
    for k, marginal in ((graph.i, a), (graph.j, b)):
        sums = np.bincount(k, mass, len(marginal))
        mass = mass * np.minimum(marginal / np.maximum(sums, 1e-300), 1)[k]
    keep = mass > 0
    return _completed(pair, Plan(graph.i[keep], graph.j[keep], mass[keep] * pair.x.total))


def _soft_start(pair: Pair, rng: np.random.Generator, tolerance: float) -> Tensor:
    """Entropic potentials of a sample, extended to all of x by the entropic c-transform."""
    points, masses = [], []
    for cloud in (pair.x, pair.y):
        chosen = _sample(cloud.mass, _SOFT, rng)
        mass = cloud.mass if len(chosen) == len(cloud.mass) else np.ones(len(chosen))
        points.append(cloud.points[torch.from_numpy(chosen).to(cloud.points.device)])
        masses.append(torch.from_numpy(mass / mass.sum()).to(cloud.points))
    (x, y), (a, b) = points, masses
    costs = distances(x, y)
    mean = costs[0].mean().item() or 1.0
    entropy = mean / 16
    f, g = two_transforms(x, y, torch.zeros_like(a), costs)
    while True:
        value = (a @ f + b @ g).item()
        kernel = _kernel(f, g, costs[0], entropy)
        u, v, _, _ = _scale(kernel, a.float(), b.float(), max(tolerance * value / mean, 1e-3))
        g = g + entropy * v.double().log()
        if entropy <= max(tolerance * value, 1e-3 * mean):
            break
        f, g = two_transforms(x, y, f + entropy * u.double().log(), costs)
        entropy /= 2
    level = g / entropy + b.log()
    parts = pair.x.points.split(max(1, CHUNK // len(y)))
    return torch.cat(
        [-entropy * torch.logsumexp(level - distances(z, y)[0] / entropy, 1) for z in parts]
    )


def _blocks_bracket(
    pair: Pair,
    start: Tensor | None,
    tolerance: float,
    sweeps: int,
    rng: np.random.Generator,
    only_critic: bool,
    team: Team,
) -> TransportBracket:
    x, y = pair.x, pair.y
    directions = axes(pair, min(8, x.points.shape[1]), rng)
    plan = coupling(pair, directions, sweeps, 0.02 * tolerance, rng, team)
    upper_from = "the exact plan of cells, refined by exact plans in blocks"

    candidates = {} if start is None else {"the critic": start}
    samples: list[tuple[Tensor, Tensor]] = []
    if not only_critic:
        number = _SAMPLES if len(plan.mass) > _SAMPLE else 1
        drawn = [_sample(plan.mass, _SAMPLE, rng) for _ in range(number)]
        samples = team.map(lambda k: _sample_potential(pair, plan, k), drawn)
        candidates[_FROM_SAMPLES] = _extended(x.points, samples, team)
    best = _better(pair, candidates, rng)
    f = candidates[best]
    size, d = len(x.mass) * len(y.mass), x.points.shape[1]
    if best == _FROM_SAMPLES and d <= _FEW_DIMENSIONS and size > _TRANSFORMED_SIZE:
        g = -_extended(y.points, samples, team)
        g = g - _margin(d, [g, *(potential for _, potential in samples)])
        return _bracket(pair, f, g, plan, f"the mean of {best}", upper_from)
    f, g = two_transforms(x.points, y.points, f, team=team)
    return _bracket(pair, f, g, plan, f"{best}, c-transformed", upper_from)


def _better(pair: Pair, candidates: dict[str, Tensor], rng: np.random.Generator) -> str:
    """Name the potential on x whose lower bound is best, judged by a sample of y."""
    if len(candidates) == 1:
        return next(iter(candidates))
    x, y = pair.x, pair.y
    j = _sample(y.mass, _SAMPLE, rng)
    b = y.mass / y.total if len(j) == len(y.mass) else np.full(len(j), 1 / len(j))
    points = y.points[torch.from_numpy(j).to(y.points.device)]
    values = {
        name: x.mass @ f.cpu().numpy() / x.total
        + b @ transform_from_below(points, x.points, f).cpu().numpy()
        for name, f in candidates.items()
    }
    return max(values, key=lambda name: values[name])


def _sample_potential(pair: Pair, plan: Plan, k: np.ndarray) -> tuple[Tensor, Tensor]:
    r"""Find points of y and their exact potential, for a sample of the coupling.

    Its c-transform extends it to all of x. If the coupling is optimal, so are its restriction to
    any set of moves and the optimal potentials restricted to their ends.
    """
    i, at_i = np.unique(plan.i[k], return_inverse=True)
    j, at_j = np.unique(plan.j[k], return_inverse=True)
    weights = plan.mass[k] if len(k) == len(plan.mass) else np.ones(len(k))
    device = pair.x.points.device
    x = pair.x.points[torch.from_numpy(i).to(device)]
    y = pair.y.points[torch.from_numpy(j).to(device)]
    _, _, g = network_simplex(
        distances(x, y)[0], np.bincount(at_i, weights), np.bincount(at_j, weights)
    )
    return y, torch.from_numpy(g).to(x)


def _extended(at: Tensor, samples: list[tuple[Tensor, Tensor]], team: Team) -> Tensor:
    """Bound the mean of the c-transforms of potentials from below."""
    return torch.stack([transform_from_below(at, y, g, team=team) for y, g in samples]).mean(0)


def _margin(d: int, values: list[Tensor]) -> float:
    """Bound what rounding takes from a c-transform of these values and from a mean of some.

    Coordinates are at most 1, so that no distance is above 2 sqrt(d).
    """
    size = 2 * math.sqrt(d) + max(z.abs().max().item() for z in values)
    return (256 * (d + 8) + 64) * UNIT * size + 8 * math.sqrt(d) * TINY
