"""Baselines, to compare: critics without a bound, the sliced distance, Sinkhorn's cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lipbook.norms.arguments import _floating, _real
from lipbook.wasserstein.clouds import check_clouds, check_count, check_memory, common_exponent
from lipbook.wasserstein.critics import _callable, evaluate

__all__ = [
    "gradient_penalty",
    "clip_weights_",
    "sliced_wasserstein",
    "sinkhorn",
]


@torch.inference_mode(False)
def gradient_penalty(
    critic: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    *,
    weight: float = 10.0,
) -> Tensor:
    r"""Gradient penalty of WGAN-GP: pulls the slope of a critic towards 1 between two batches.

    .. math::
        \lambda \operatorname{E} \big(\lVert \nabla f(t x + (1 - t) y)\rVert_2 - 1\big)^2,
        \qquad t \sim U[0, 1]

    A penalty for :func:`fit_critic`. **Not guaranteed**: any Lipschitz bound. The critic's
    dual value is an estimate, too large or too small.

    Parameters
    ----------
    critic : torch.nn.Module
        :math:`f`.
    x, y : torch.Tensor
        Batches (n, ...) and (m, ...); the shorter one is repeated.
    generator : torch.Generator, optional
        For :math:`t`; on the CPU.
    weight : float
        :math:`\lambda`.

    Returns
    -------
    torch.Tensor
        The penalty, of shape ().

    Examples
    --------
    >>> critic = nn.Linear(2, 1)
    >>> critic.weight.data = torch.tensor([[0.0, 3.0]])
    >>> gradient_penalty(critic, torch.randn(8, 2), torch.randn(4, 2), weight=1.0).item()
    4.0

    References
    ----------
    :cite:t:`gulrajani2017`, equation 3.
    """
    _callable(critic)
    for name, points in (("x", x), ("y", y)):
        _floating(name, points, 2)
        if not len(points):
            raise ValueError(f"{name} must hold one point or more, got {tuple(points.shape)}")
    _real("weight", weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and not negative, got {weight}")
    number = max(len(x), len(y))
    x, y = (z.detach()[torch.arange(number, device=z.device) % len(z)] for z in (x, y))
    mix = torch.rand(number, generator=generator).to(x).view(-1, *[1] * (x.dim() - 1))
    points = torch.lerp(y, x, mix).requires_grad_()
    (slope,) = torch.autograd.grad(evaluate(critic, points).sum(), points, create_graph=True)
    return weight * (slope.flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def clip_weights_(critic: nn.Module, limit: float = 0.01) -> None:
    r"""Weight clipping of WGAN: clamps all parameters to [-limit, limit], in place.

    A projection for :func:`fit_critic`. It bounds the Lipschitz constant by an unknown number, far
    from 1 as a rule; :func:`~lipbook.composition.lipschitz_bound` tells from above.

    Parameters
    ----------
    critic : torch.nn.Module
        Its parameters are changed.
    limit : float
        The bound, > 0.

    Raises
    ------
    ValueError
        If ``limit`` is not positive.

    Examples
    --------
    >>> critic = nn.Linear(1, 1)
    >>> critic.weight.data.fill_(7.0)
    tensor([[7.]])
    >>> clip_weights_(critic, 0.5)
    >>> critic.weight.item()
    0.5

    References
    ----------
    :cite:t:`arjovsky2017`, algorithm 1.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic must be a torch.nn.Module, got {type(critic).__name__}")
    _real("limit", limit)
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")
    if limit == math.inf:
        raise ValueError(f"limit must be finite, got {limit}")
    for parameter in critic.parameters():
        parameter.clamp_(-limit, limit)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    projections: int = 100,
    seed: int = 0,
) -> Tensor:
    r"""Sliced Wasserstein distance: mean of W₁ between projections to random lines.

    .. math:: \frac1k \sum_{l=1}^k W_1(\theta_l^\top x,\, \theta_l^\top y), \qquad \theta_l
        \text{ uniform on the unit sphere}

    A Monte Carlo **estimate** of another distance. A projection is 1-Lipschitz, so that each
    summand, and their mean, is at most :math:`W_1(x, y)`; for a translation in :math:`d`
    dimensions it is smaller by a factor of about :math:`\sqrt{\pi d / 2}`.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    projections : int
        Their number :math:`k`.
    seed : int
        Seed of the directions.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in the points.

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if ``projections`` is no positive integer.

    Examples
    --------
    >>> from lipbook.wasserstein import wasserstein1
    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> y = x + torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    >>> 0 < sliced_wasserstein(x, y).item() < wasserstein1(x, y).item()
    True

    References
    ----------
    :cite:t:`flamary2021`, whose function this is.
    """
    check_clouds(x, y, x_weights, y_weights)
    import ot  # noqa: PLC0415 - on first use

    projections, seed = check_count("projections", projections), check_count("seed", seed, 0)
    directions = np.random.default_rng(seed).standard_normal((x.shape[1:].numel(), projections))
    directions /= np.linalg.norm(directions, axis=0)
    return ot.sliced_wasserstein_distance(
        x.flatten(1),
        y.flatten(1),
        x_weights,
        y_weights,
        p=1,
        projections=torch.from_numpy(directions).to(x),
    )


def sinkhorn(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    entropy: float,
    steps: int = 10_000,
    tolerance: float = 1e-9,
) -> Tensor:
    r"""Cost of the entropic optimal plan, by POT's Sinkhorn iteration in the log domain.

    .. math::
        \langle P_\varepsilon, C\rangle, \qquad P_\varepsilon = \operatorname*{arg\,min}_{P \in
        \Pi(a, b)} \langle P, C\rangle + \varepsilon \sum_{ij} P_{ij} \log P_{ij}, \qquad
        C_{ij} = \lVert x_i - y_j\rVert_2

    An **estimate** of :math:`W_1`: the converged cost is above it by at most
    :math:`\varepsilon \log \min(n, m)`, but after finitely many steps the marginals are off, by
    ``tolerance``, and the cost can be on either side. It iterates in float64, and without
    convergence there is no number. ``wasserstein1_bracket(method="sinkhorn")`` gives bounds.

    **Gradients** are those of the converged cost, by the implicit function theorem; first
    derivatives only. Those of weights are chosen to sum to 0 (weights must sum to 1). At a weight
    of 0 it is the slope of moving mass there; a point of weight 0 has gradient 0.

    Parameters
    ----------
    x, y : torch.Tensor
        Points (n, d) and (m, d), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    entropy : float
        :math:`\varepsilon > 0`, in the units of the points.
    steps : int
        Most iterations.
    tolerance : float
        Euclidean norm of the errors of the marginals at which the iteration ends.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in points and weights.

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if ``entropy`` or ``steps`` is not positive, or ``tolerance`` not
        between 0 and 1.
    RuntimeError
        If the iteration has not converged after ``steps``.

    Examples
    --------
    >>> x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    >>> sinkhorn(x, y, entropy=0.1)
    tensor(5.)

    References
    ----------
    :cite:t:`peyre2019`, section 4; :cite:t:`flamary2021`, whose function this is.
    """
    check_clouds(x, y, x_weights, y_weights)
    given = [z for z in (x, y, x_weights, y_weights) if z is not None]
    backward = torch.is_grad_enabled() and any(z.requires_grad for z in given)
    check_memory(len(x), len(y), 80 if backward else 40)
    steps = check_count("steps", steps)
    _real("entropy", entropy)
    if not 0 < entropy < math.inf:
        raise ValueError(f"entropy must be finite and > 0, got {entropy}")
    _real("tolerance", tolerance)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    ends = [z.flatten(1).to(device, torch.float64) for z in (x, y)]
    scale = 2.0 ** -common_exponent(*(z.detach() for z in ends))
    mode = "donot_use_mm_for_euclid_dist"
    cost = torch.cdist(ends[0] * scale, ends[1] * scale, compute_mode=mode)
    masses = [
        torch.full((len(z),), 1 / len(z)).to(cost) if w is None else w.to(cost)
        for z, w in ((x, x_weights), (y, y_weights))
    ]
    value = _EntropicCost.apply(cost, *masses, entropy * scale, steps, tolerance)[0]
    return (value / scale).to(x)


# Note [gradient of Sinkhorn's cost]
# Differentiating through the iteration gives NaN at a weight of 0, whose logarithm it takes, and
# keeps every step. At the optimum P = a b exp((f + g - C) / eps) the marginals fix how f and g
# follow (a, b, C), by a linear system that is its own adjoint: the equations of the weighted
# least squares min sum P (C - s - t)^2 over s on x and t on y. Then s and t are the slopes in a
# and b, and P (1 - (C - s - t) / eps) is that in C. Since C = f + g - eps log(P / (a b)), only
# the last term has to be fitted, which keeps the digits that C / eps would lose. A point of
# weight 0 takes no part; moving mass to x_i fills the row P_ij / a_i, whose limit exists, and
# costs the mean of C_ij - t_j over it.


class _EntropicCost(torch.autograd.Function):
    """Cost of the entropic plan, and the logarithms of Sinkhorn's factors on the supports."""

    @staticmethod
    def forward(
        cost: Tensor, a: Tensor, b: Tensor, entropy: float, steps: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        import ot  # noqa: PLC0415 - on first use

        cost, a, b = _on_supports(cost, a, b)
        plan, log = ot.bregman.sinkhorn_log(
            a, b, cost, entropy, numItermax=steps, stopThr=tolerance, log=True, warn=False
        )
        error = max((plan.sum(1) - a).norm().item(), (plan.sum(0) - b).norm().item())
        if not error <= tolerance:
            raise RuntimeError(
                f"sinkhorn has not converged in steps={steps}: its marginals are off by "
                f"{error:.2g}, more than tolerance={tolerance:g}; raise steps, entropy or tolerance"
            )
        return (plan * cost).sum(), log["log_u"], log["log_v"]

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor, float, int, float],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.entropy = inputs[3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        cost, a, b, log_u, log_v = ctx.saved_tensors
        slopes = _slopes(cost, a, b, log_u, log_v, ctx.entropy)
        return (*(grad * slope for slope in slopes), None, None, None)


def _on_supports(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the points of weight 0 and divide the weights by their sums."""
    a_positive, b_positive = a > 0, b > 0
    cost = cost[a_positive][:, b_positive]
    return cost, a[a_positive] / a.sum(), b[b_positive] / b.sum()


def _slopes(
    cost: Tensor, a: Tensor, b: Tensor, log_u: Tensor, log_v: Tensor, entropy: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the entropic cost, in the costs and in the weights of x and y."""
    x_slope, y_slope, cost_slope = torch.empty_like(a), torch.empty_like(b), torch.zeros_like(cost)
    x_on, y_on = a > 0, b > 0
    inner, a, b = _on_supports(cost, a, b)
    log_plan = log_u[:, None] + log_v - inner / entropy
    plan, log_density = log_plan.exp(), log_plan - a.log()[:, None] - b.log()
    s, t = _additive_fit(plan, log_density)
    cost_slope[x_on[:, None] & y_on] = (plan * (1 + log_density - s[:, None] - t)).flatten()
    x_slope[x_on] = entropy * (log_u - a.log() - s)
    y_slope[y_on] = entropy * (log_v - b.log() - t)
    for slope, other, on, other_on, costs, factor in (
        (x_slope, y_slope, x_on, y_on, cost, log_v),
        (y_slope, x_slope, y_on, x_on, cost.mT, log_u),
    ):
        rows = costs[~on][:, other_on]
        shares = (factor - rows / entropy).softmax(1)
        slope[~on] = (shares * (rows - other[other_on])).sum(1)
    return cost_slope, x_slope - x_slope.mean(), y_slope - y_slope.mean()


def _additive_fit(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the sum of weights_ij (values_ij - s_i - t_j)^2 over s and t.

    The symmetric positive semidefinite system for s has the kernel of adding a constant, which is
    filled; a ridge at the size of rounding keeps it solvable where the weights fall into blocks.
    """
    if len(weights) > weights.shape[1]:
        t, s = _additive_fit(weights.mT, values.mT)
        return s, t
    rows, columns = weights.sum(1), weights.sum(0)
    root = rows.sqrt()
    scaled = weights / root[:, None] / columns.sqrt()
    system = torch.outer(root, root) - scaled @ scaled.mT
    system.diagonal().add_(1 + len(rows) * torch.finfo(rows.dtype).eps)
    of_rows, of_columns = (weights * values).sum(1), (weights * values).sum(0)
    right = (of_rows - weights @ (of_columns / columns)) / root
    s = torch.linalg.solve(system, right) / root
    return s, (of_columns - weights.mT @ s) / columns
