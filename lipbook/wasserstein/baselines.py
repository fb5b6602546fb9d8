"""Baselines, to compare: critics without a bound, the sliced distance, Sinkhorn's cost."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.wasserstein.clouds import check_clouds, check_count, check_memory
from lipbook.wasserstein.critics import evaluate

__all__ = [
    "gradient_penalty",
    "clip_weights_",
    "sliced_wasserstein",
    "sinkhorn",
]


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
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")
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

    check_count("projections", projections)
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
    steps: int = 1000,
) -> Tensor:
    r"""Cost of the entropic optimal plan, by POT's Sinkhorn iteration in the log domain.

    .. math::
        \langle P_\varepsilon, C\rangle, \qquad P_\varepsilon = \operatorname*{arg\,min}_{P \in
        \Pi(a, b)} \langle P, C\rangle + \varepsilon \sum_{ij} P_{ij} \log P_{ij}, \qquad
        C_{ij} = \lVert x_i - y_j\rVert_2

    An **estimate** of :math:`W_1`: the converged cost is above it by at most
    :math:`\varepsilon \log \min(n, m)`, but after finitely many steps the marginals are off, and
    the cost can be on either side. ``wasserstein1_bracket(method="sinkhorn")`` gives bounds.

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

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in points and weights.

    Raises
    ------
    TypeError, ValueError
        As :func:`wasserstein1`; if ``entropy`` or ``steps`` is not positive.

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
    check_memory(len(x), len(y), 40)
    check_count("steps", steps)
    if not 0 < entropy < math.inf:
        raise ValueError(f"entropy must be finite and > 0, got {entropy}")
    weights = [
        torch.full((len(z),), 1 / len(z)).to(z) if w is None else w
        for z, w in ((x, x_weights), (y, y_weights))
    ]
    ends = x.flatten(1), y.flatten(1)
    cost = torch.cdist(*ends, compute_mode="donot_use_mm_for_euclid_dist")
    import ot  # noqa: PLC0415 - on first use

    return ot.sinkhorn2(*weights, cost, entropy, "sinkhorn_log", numItermax=steps, warn=False)
