"""Critics and what their values say: the difference of means, and the dual value, a bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound
from lipbook.norms.arguments import _real
from lipbook.wasserstein.clouds import check_clouds, check_tensor

__all__ = [
    "kantorovich_dual",
    "critic_difference",
    "evaluate",
    "evaluate_in_chunks",
    "first_parameter",
]


def kantorovich_dual(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    *,
    lipschitz: float | None = None,
) -> Tensor:
    r"""Kantorovich–Rubinstein dual value of a critic: a lower bound of W₁.

    .. math::
        \frac{1}{\max(1, L)} \Big(\sum_i a_i f(x_i) - \sum_j b_j f(y_j)\Big) \;\le\; W_1,
        \qquad \operatorname{Lip}(f) \le L

    Sign: mean over ``x`` **minus** mean over ``y``. A critic of larger bound than 1 is divided by
    it, one of smaller bound is not scaled up.

    **Guaranteed**: a lower bound of :math:`W_1` *between the two weighted clouds given*, whatever
    the critic, up to the rounding of its forward pass (:func:`wasserstein1_bracket` accounts for
    rounding too). **Not guaranteed**: that it bounds the distance of the distributions that the
    clouds were sampled from. On the points that the critic was fitted to, it overestimates that on
    average; on fresh points its mean is the critic's population value, which is at most
    the population's :math:`W_1` (see the held-out interval of :func:`fit_critic`).

    Parameters
    ----------
    critic : torch.nn.Module or callable
        :math:`f`, from (batch, ...) to (batch,) or (batch, 1).
    x, y : torch.Tensor
        Points (n, ...) and (m, ...), float32 or float64, cast to the dtype of the critic.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.
    lipschitz : float, optional
        An upper bound :math:`L` that you vouch for. Unless given, it is
        :func:`~lipbook.composition.lipschitz_bound` of the critic.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable but for :math:`L`, which counts as a constant.

    Raises
    ------
    TypeError, ValueError
        As :func:`critic_difference`, and if the critic has no Lipschitz bound.

    Examples
    --------
    A critic of norm 10 is worth no more than one of norm 1:

    >>> critic = nn.Linear(2, 1, bias=False)
    >>> critic.weight.data = torch.tensor([[6.0, 8.0]])
    >>> kantorovich_dual(critic, torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(5., grad_fn=<DivBackward0>)

    References
    ----------
    :cite:t:`kantorovich1958`; :cite:t:`villani2009`, remark 6.5.
    """
    check_clouds(x, y, x_weights, y_weights)
    if lipschitz is None:
        if not isinstance(critic, nn.Module):
            raise TypeError(
                f"critic must be a torch.nn.Module, got {type(critic).__name__}: "
                "pass lipschitz= for a function whose Lipschitz bound you know"
            )
        lipschitz = _bound(critic, x.shape[1:])
    _real("lipschitz", lipschitz)
    if not 0 <= lipschitz < math.inf:
        raise ValueError(f"lipschitz must be finite and >= 0, got {lipschitz}")
    return _difference(critic, x, y, x_weights, y_weights) / max(1.0, lipschitz)


def _bound(critic: nn.Module, shape: torch.Size) -> float:
    """Bound of a critic, under torch.inference_mode and of tensors made under it as well."""
    with torch.inference_mode(False):
        if any(tensor.is_inference() for tensor in (*critic.parameters(), *critic.buffers())):
            critic = copy.deepcopy(critic)  # of which bounds can be computed
        return lipschitz_bound(critic, shape).value


def critic_difference(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    r"""Mean of a critic over x minus its mean over y: an **estimate**, on no side of W₁.

    .. math:: \sum_i a_i f(x_i) - \sum_j b_j f(y_j)

    It is a lower bound of :math:`W_1` for a 1-Lipschitz critic only, and of no meaning for one
    whose Lipschitz constant is unknown, as after weight clipping or with a gradient penalty:
    see :func:`kantorovich_dual` for a bound. Both clouds go through the critic in one batch,
    so that constrained weights are computed once.

    Parameters
    ----------
    critic : callable
        :math:`f`, from (batch, ...) to (batch,) or (batch, 1). Points are cast to the dtype and
        moved to the device of its parameters, if it has any.
    x, y : torch.Tensor
        Points (n, ...) and (m, ...), float32 or float64.
    x_weights, y_weights : torch.Tensor, optional
        Masses (n,) and (m,), >= 0 with sum 1; 1/n and 1/m unless given.

    Returns
    -------
    torch.Tensor
        A number, of shape (), differentiable in everything.

    Raises
    ------
    TypeError, ValueError
        If an argument is unusable, as for :func:`wasserstein1`, or the critic returns anything
        but one finite number a point.

    Examples
    --------
    Ten times the critic, ten times the number; W₁ is 5 all the same:

    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> critic_difference(lambda z: 10 * z.norm(dim=1), x, y)
    tensor(50.)
    """
    check_clouds(x, y, x_weights, y_weights)
    return _difference(critic, x, y, x_weights, y_weights)


def _difference(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
) -> Tensor:
    like = first_parameter(critic)
    points = torch.cat((x, y))
    values = evaluate(critic, points if like is None else points.to(like))
    if not values.isfinite().all():
        raise ValueError("critic must give finite values, got NaN or infinite ones")
    on_x, on_y = values.split([len(x), len(y)])
    means = [
        v.mean() if w is None else v @ (w / w.sum()).to(v)
        for v, w in ((on_x, x_weights), (on_y, y_weights))
    ]
    return means[0] - means[1]


def evaluate(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Values (n,) of the critic; refuse any other shape."""
    values = critic(points)
    check_tensor("critic must return", values)
    if values.shape not in ((len(points),), (len(points), 1)):
        raise ValueError(
            f"critic must return one value for each of {len(points)} points, "
            f"got shape {tuple(values.shape)}"
        )
    return values.flatten()


def evaluate_in_chunks(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Values (n,) of the critic in float64, evaluated in chunks in the critic's dtype."""
    like = first_parameter(critic)
    with torch.no_grad():
        parts = [
            evaluate(critic, chunk.detach() if like is None else chunk.detach().to(like))
            for chunk in points.split(4096)
        ]
    values = torch.cat(parts).double()
    if not values.isfinite().all():
        raise ValueError("critic must give finite values, got NaN or infinite ones")
    return values


def _callable(critic: object) -> None:
    if not callable(critic):
        raise TypeError(f"critic must be callable, got {type(critic).__name__}")


def first_parameter(critic: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Give the parameter whose dtype and device are the critic's, if it has any."""
    if not isinstance(critic, nn.Module):
        _callable(critic)
        return None
    return next(critic.parameters(), None)
