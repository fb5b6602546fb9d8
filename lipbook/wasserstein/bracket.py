"""The bracket: a feasible dual point and a coupling, evaluated with all rounding."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lipbook.norms.arguments import _real
from lipbook.wasserstein.clouds import (
    Cloud,
    Pair,
    check_count,
    check_memory,
    checked_pair,
    distances,
    down,
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
from lipbook.wasserstein.transforms import (
    CHUNK,
    cut_into_cells,
    dual_value,
    transform_from_below,
    two_transforms,
)

__all__ = [
    "TransportBracket",
    "wasserstein1_bracket",
]

Method = Literal["auto", "exact", "sinkhorn", "blocks", "critic"]

_EXACT_SIZE = 2048**2  # entries of the cost matrix up to which "auto" is "exact"
_DENSE_SIZE = 6000**2  # and "sinkhorn"
_SAMPLE = 1500  # points a side whose exact potentials start the lower bound of "blocks"
_SAMPLES = 4  # so many times, and averaged


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
    "blocks"   the critic or the exact potentials     the monotone coupling      n², n
               of samples of the coupling, as the     along an axis, improved
               better one on a sample of y            by exact plans in blocks
    "critic"   the critic                             as for "blocks"            n², n
    ========== ====================================== ========================== ==============

    All lower bounds end with two c-transforms on all points. On the line, "exact" is by sorting;
    "exact" needs no critic and makes no use of one.
    "auto" is "exact" on the line and up to 2048² pairs of points, "sinkhorn" up to 6000², "blocks"
    beyond; it does not depend on the machine, and all methods are deterministic. "sinkhorn" halves
    the entropy until the gap is below ``tolerance`` or float32, in which it iterates, is
    exhausted.

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
        Relative gap at which "sinkhorn" stops.
    sweeps : int
        How often "blocks" and "critic" solve all blocks.
    seed : int
        Seed of the directions of the blocks and of samples.

    Returns
    -------
    TransportBracket

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if the critic's values are NaN or infinite or have another
        shape; if ``method`` is unknown or is "critic" without a critic.

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
        method = method if line or size <= _DENSE_SIZE else "blocks"
    start = None if critic is None else _critic_start(pair, evaluate_in_chunks(critic, x), rng)

    if method == "exact":
        return _exact_bracket(pair)
    if method == "sinkhorn":
        return _sinkhorn_bracket(pair, start, tolerance)
    return _blocks_bracket(pair, start, sweeps, rng, method == "critic")


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
    missing = [
        np.maximum(m.cpu().numpy() - np.bincount(k, mass, len(m)), 0) for m, k in ((a, i), (b, j))
    ]
    plan = Plan(i, j, mass)
    if min(m.sum() for m in missing) > 0:
        axis = _axes(pair, 1, np.random.default_rng(0))
        order = [np.argsort((c.points @ axis)[:, 0].cpu().numpy()) for c in (pair.x, pair.y)]
        rest = northwest(missing[0][order[0]], missing[1][order[1]])
        plan = Plan(
            np.concatenate((i, order[0][rest.i])),
            np.concatenate((j, order[1][rest.j])),
            np.concatenate((mass, rest.mass)),
        )
    return Plan(plan.i, plan.j, plan.mass * pair.x.total)


def _axes(pair: Pair, number: int, rng: np.random.Generator) -> Tensor:
    """Orthonormal directions (d, number) along which both clouds together spread most."""
    points = torch.cat((pair.x.points, pair.y.points))
    points = points - points.mean(0)
    directions = torch.from_numpy(rng.standard_normal((points.shape[1], number))).to(points)
    for _ in range(3):
        directions = torch.linalg.qr(points.mT @ (points @ directions))[0]
    return directions


# Note [blocks]
# A coupling is a list of moves, a few times n + m of them. A sweep cuts the list into blocks of
# moves whose middles are close to each other, along other directions each time, and replaces every
# block by the exact plan between its own marginals. Marginals stay, the cost cannot grow.


def _blocks_bracket(
    pair: Pair, start: Tensor | None, sweeps: int, rng: np.random.Generator, only_critic: bool
) -> TransportBracket:
    x, y = pair.x, pair.y
    axes = _axes(pair, min(8, x.points.shape[1]), rng)
    ends = [(c.points @ axes).cpu().numpy() for c in (x, y)]
    order = [np.argsort(z[:, 0], kind="stable") for z in ends]
    plan = northwest(x.mass[order[0]], (y.mass * (x.total / y.total))[order[1]])
    plan = Plan(order[0][plan.i], order[1][plan.j], plan.mass)
    for _ in range(sweeps):
        plan = _sweep(pair, plan, ends[0][plan.i] + ends[1][plan.j], rng)
    upper_from = f"the monotone coupling along an axis, {sweeps} sweeps of exact plans in blocks"

    candidates = {} if start is None else {"the critic": start}
    if not only_critic:
        number = _SAMPLES if len(plan.mass) > _SAMPLE else 1
        samples = [_sample_start(pair, plan, rng) for _ in range(number)]
        candidates["exact potentials of samples"] = torch.stack(samples).mean(0)
    best = _better(pair, candidates, rng)
    f, g = two_transforms(x.points, y.points, candidates[best])
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


def _sweep(pair: Pair, plan: Plan, place: np.ndarray, rng: np.random.Generator) -> Plan:
    """Replace the moves of each block of neighbours by an exact plan."""
    parts = []
    for block in cut_into_cells(place, rng):
        i, at_i = np.unique(plan.i[block], return_inverse=True)
        j, at_j = np.unique(plan.j[block], return_inverse=True)
        if len(i) == 1 or len(j) == 1:
            parts.append(Plan(plan.i[block], plan.j[block], plan.mass[block]))
            continue
        a, b = np.bincount(at_i, plan.mass[block]), np.bincount(at_j, plan.mass[block])
        device = pair.x.points.device
        cost = distances(
            pair.x.points[torch.from_numpy(i).to(device)],
            pair.y.points[torch.from_numpy(j).to(device)],
        )[0]
        part = network_simplex(cost, a, b)[0]
        parts.append(Plan(i[part.i], j[part.j], part.mass))
    return Plan(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sample_start(pair: Pair, plan: Plan, rng: np.random.Generator) -> Tensor:
    r"""Extend the exact potentials of a sample of the coupling to all of x.

    If the coupling is optimal, so are its restriction to any set of moves and the optimal
    potentials restricted to their ends.
    """
    k = _sample(plan.mass, _SAMPLE, rng)
    i, at_i = np.unique(plan.i[k], return_inverse=True)
    j, at_j = np.unique(plan.j[k], return_inverse=True)
    weights = plan.mass[k] if len(k) == len(plan.mass) else np.ones(len(k))
    device = pair.x.points.device
    x = pair.x.points[torch.from_numpy(i).to(device)]
    y = pair.y.points[torch.from_numpy(j).to(device)]
    _, _, g = network_simplex(
        distances(x, y)[0], np.bincount(at_i, weights), np.bincount(at_j, weights)
    )
    return transform_from_below(pair.x.points, y, torch.from_numpy(g).to(x))
