r"""Attacks: what looks for the inputs that a certificate excludes.

:func:`fgsm` and :func:`pgd` follow the gradient, :func:`decision_attack` the border of the
decision. None of them proves anything; a point that they move out of its class within a certified
radius disproves the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook import composition, errors, orthogonal, robustness
from lipbook.robustness import Accuracy, Batches, wilson_interval

__all__ = ["attacked_accuracy", "decision_attack", "fgsm", "pgd"]

# ------------------------------------------------------------------------------- the attacks


def fgsm(
    model: nn.Module, inputs: Tensor, labels: Tensor, radius: float | Tensor, p: float = 2
) -> Tensor:
    r"""Fast gradient method: one step of full length along the steepest ascent of the margin loss.

    .. math::
        x' = x + r \operatorname*{arg\,max}_{\lVert d\rVert_p \le 1}
        \langle d, \nabla\ell(x)\rangle, \qquad \ell(x) = \max_{j \ne y} z_j - z_y

    Exact on a linear classifier with two classes, at every p.

    Parameters
    ----------
    model, inputs, labels, radius, p
        As in :func:`pgd`.

    Returns
    -------
    torch.Tensor
        :math:`x'`, like ``inputs``, no further from them than the radius.

    Raises
    ------
    TypeError, ValueError
        As in :func:`pgd`.

    References
    ----------
    :cite:t:`goodfellow2015`, for p = ∞ and the cross-entropy.

    Examples
    --------
    >>> from lipbook.robustness import certified_radius
    >>> model, x = nn.Linear(3, 2), torch.zeros(1, 3)
    >>> label = model(x).argmax(1)
    >>> radius = certified_radius(model(x), label, head=model.weight)
    >>> for factor in (0.999, 1.001):
    ...     print((model(fgsm(model, x, label, factor * radius)).argmax(1) == label).item())
    True
    False
    """
    p, bound = _check_attack(model, inputs, labels, radius, p)
    step = composition._steepest(_gradient(model, inputs, labels), torch.zeros_like(inputs), p)
    return _within(inputs, step.double() * _column(bound, inputs), bound, p)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    p: float = 2,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    r"""Projected gradient ascent of the margin loss in a ball.

    .. math::
        x \leftarrow \Pi_{\lVert x' - x_0\rVert_p \le r}\Big(x + \tfrac{2.5\, r}{\text{steps}}
        \operatorname*{arg\,max}_{\lVert d\rVert_p \le 1} \langle d, \nabla\ell(x)\rangle\Big),
        \qquad \ell(x) = \max_{j \ne y} z_j - z_y

    from the input itself, and again from random points of the ball. The best point seen wins.
    **Guaranteed**: it is a number of the inputs' dtype within the radius, measured in float64
    without rounding in its favour. **Only hoped**: that it is misclassified whenever some point is.

    Parameters
    ----------
    model : torch.nn.Module
        Differentiable, to (batch, classes).
    inputs : torch.Tensor
        (batch, \*shape).
    labels : torch.Tensor
        (batch,) int64.
    radius : float or torch.Tensor
        One for all, or (batch,).
    p : float
        1, 2 or :data:`math.inf`.
    steps, restarts : int
        Steps of an ascent, and number of ascents.
    seed : int
        Of the random starts.

    Returns
    -------
    torch.Tensor
        Like ``inputs``.

    Raises
    ------
    TypeError
        If an argument is no tensor or module.
    ValueError
        If a shape, the radius or p does not fit, or the model returns NaN.

    References
    ----------
    :cite:t:`madry2018`, with the loss of :cite:t:`carlini2017`.

    Examples
    --------
    >>> model, x, y = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    >>> bool(((pgd(model, x, y, 0.1) - x).double().norm(dim=1) <= 0.1).all())
    True
    """
    p, bound = _check_attack(model, inputs, labels, radius, p)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    generator = torch.Generator(inputs.device).manual_seed(seed)
    rate = 2.5 * _column(bound, inputs) / steps
    still = torch.zeros_like(inputs)
    best, record = inputs, _margin_loss(model, inputs, labels)
    for restart in range(restarts):
        offset = torch.zeros(inputs.shape, dtype=torch.float64, device=inputs.device)
        if restart:
            noise = torch.randn(inputs.shape, generator=generator, device=inputs.device)
            offset = _project(noise.double() * _column(bound, inputs), bound, p)
        for _ in range(steps):
            x = _within(inputs, offset, bound, p)
            step = composition._steepest(_gradient(model, x, labels), still, p)
            offset = _project(offset + rate * step.double(), bound, p)
            x = _within(inputs, offset, bound, p)
            loss = _margin_loss(model, x, labels)
            best = torch.where(_column(loss > record, x), x, best)
            record = torch.maximum(record, loss)
    return best


def decision_attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int = 20,
    queries: int = 100,
    seed: int = 0,
) -> Tensor:
    r"""Attack that sees decisions only: walk along the border of the class towards the input.

    From a point with another class, a step of the walk estimates the normal of the border at
    :math:`b` from the decisions at random points near it,

    .. math:: g = \frac1q \sum_i (\phi_i - \bar\phi)\, u_i, \qquad
        \phi_i = \pm1 \text{ as } b + \delta u_i \text{ has another class than } y \text{ or not},

    goes along it, and returns to the border by bisection on the way to the input. It needs no
    gradient, so that masked gradients do not mislead it. **Guaranteed**: what is returned has
    another class, or is the input itself if none was met. **Only hoped**: that it is near.

    Parameters
    ----------
    model : torch.nn.Module
        To (batch, classes).
    inputs : torch.Tensor
        (batch, \*shape). They also serve each other as points to start from.
    labels : torch.Tensor
        (batch,) int64: the classes to get away from.
    steps : int
        Steps of the walk.
    queries : int
        Decisions :math:`q` for each estimate.
    seed : int
        Of the random directions.

    Returns
    -------
    torch.Tensor
        Like ``inputs``: points near them in the 2-norm.

    Raises
    ------
    TypeError, ValueError
        As in :func:`pgd`.

    References
    ----------
    :cite:t:`chen2020hopskipjump`.

    Examples
    --------
    On a linear classifier the border is a plane, and its distance is known:

    >>> from lipbook.robustness import certified_radius
    >>> model, x = nn.Linear(4, 2), torch.randn(6, 4)
    >>> y = model(x).argmax(1)
    >>> distance = certified_radius(model(x), y, head=model.weight)
    >>> reached = (decision_attack(model, x, y) - x).double().norm(dim=1)
    >>> bool((reached >= 0.999 * distance).all()), bool((reached < 1.1 * distance).all())
    (True, True)
    """
    _check_attack(model, inputs, labels, 0.0, 2)
    generator = torch.Generator(inputs.device).manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(inputs.shape, generator=generator, device=inputs.device).to(inputs)

    @torch.no_grad()
    def adversarial(x: Tensor) -> Tensor:
        return _check_outputs(model(x), labels).argmax(1) != labels

    def bisect(outside: Tensor, steps: int = 30) -> Tensor:
        low = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
        high, point = torch.ones_like(low), outside
        for _ in range(steps):
            middle = (low + high) / 2
            candidate = inputs + _column(middle, inputs) * (outside - inputs)
            hit = adversarial(candidate)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
            point = torch.where(_column(hit, point), candidate, point)
        return point

    point, found = inputs.clone(), adversarial(inputs)
    already = found
    size = errors._norms(inputs, 2).mean().to(inputs) + 1
    starts = [inputs.roll(i, 0) for i in range(1, len(inputs))]
    starts += [noise() * size * 2.0**i for i in range(-4, 5)]
    for start in starts:
        if found.all():
            break
        hit = adversarial(start)
        point = torch.where(_column(hit & ~found, point), start, point)
        found = found | hit
    point = torch.where(_column(found & ~already, point), bisect(point), point)
    dimension = inputs[0].numel()
    for t in range(1, steps + 1):
        distance = torch.linalg.vector_norm((point - inputs).flatten(1), dim=1)
        total, mean = torch.zeros_like(inputs), torch.zeros_like(inputs)
        share = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
        for _ in range(queries):
            u = functional.normalize(noise().flatten(1), dim=1).view_as(inputs)
            sign = (
                adversarial(point + _column(distance / math.sqrt(dimension), u) * u).to(u) * 2 - 1
            )
            total, mean, share = total + _column(sign, u) * u, mean + u, share + sign
        normal = total - _column(share / queries, mean) * mean
        normal = functional.normalize(normal.flatten(1), dim=1).view_as(inputs)
        length, moved, done = distance / math.sqrt(t), point, torch.zeros_like(found)
        for _ in range(12):
            candidate = point + _column(length, point) * normal
            hit = adversarial(candidate) & ~done
            moved = torch.where(_column(hit, moved), candidate, moved)
            done, length = done | hit, length / 2
        moved = bisect(moved)
        nearer = torch.linalg.vector_norm((moved - inputs).flatten(1), dim=1) < distance
        point = torch.where(_column(nearer & done & ~already & found, point), moved, point)
    return torch.where(_column(found, point), point, inputs)


def attacked_accuracy(
    model: nn.Module,
    loader: Batches,
    radius: float,
    p: float = 2,
    *,
    attack: Callable[..., Tensor] = pgd,
    confidence: float = 0.95,
    **options: Any,
) -> Accuracy:
    """Fraction of inputs whose class is right and stays so under an attack.

    Above the certified accuracy at the same radius, and above the true robust accuracy: the gap to
    the certificate is what neither side has settled.

    Parameters
    ----------
    model : torch.nn.Module
        To (batch, classes).
    loader : iterable
        Yields ``(inputs, labels)``.
    radius : float
        Of the ball.
    p : float
        1, 2 or :data:`math.inf`.
    attack : callable
        ``attack(model, inputs, labels, radius, p, **options)``: :func:`pgd` or :func:`fgsm`.
    confidence : float
        Of the interval, see :func:`~lipbook.robustness.wilson_interval`.
    **options
        Of the attack.

    Returns
    -------
    Accuracy
    """
    kept = trials = 0
    for inputs, labels in loader:
        moved = attack(model, inputs, labels, radius, p, **options)
        with torch.no_grad():
            right = model(inputs).argmax(1) == labels
            kept += int((right & (model(moved).argmax(1) == labels)).sum())
        trials += len(labels)
    return wilson_interval(kept, trials, confidence)


def _check_attack(
    model: nn.Module, inputs: Tensor, labels: Tensor, radius: float | Tensor, p: float
) -> tuple[float, Tensor]:
    p = composition._exponent(p)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {got}")
    bound = torch.as_tensor(radius, dtype=torch.float64, device=inputs.device)
    if bound.dim() > 1 or (bound.dim() and len(bound) != len(inputs)) or not (bound >= 0).all():
        raise ValueError(f"radius must be one number >= 0, or one for each input, got {radius}")
    if not bound.isfinite().all():
        raise ValueError(f"radius must be finite, got {radius}")
    with torch.no_grad():
        _check_outputs(model(inputs), labels)
    return p, bound.expand(len(inputs))


def _check_outputs(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(f"model must return (batch, classes), got {tuple(logits.shape)}")
    return robustness._check_logits(logits, labels)


def _margin_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus that of the label, (batch,) float64."""
    with torch.set_grad_enabled(x.requires_grad):
        logits = _check_outputs(model(x), labels)
        margins = robustness._margins(logits, labels).scatter(1, labels[:, None], math.inf)
        return -margins.amin(1)


@torch.enable_grad()
def _gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_margin_loss(model, x, labels).sum(), x)
    return gradient


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _project(offset: Tensor, bound: Tensor, p: float) -> Tensor:
    """Project onto the ball, in float64."""
    r = _column(bound, offset)
    if p == math.inf:
        return offset.clamp(-r, r)
    if p == 2:
        size = _column(torch.linalg.vector_norm(offset.flatten(1), dim=1), offset)
        return offset * (r / size.clamp(min=1e-300)).clamp(max=1)
    unit = orthogonal.project_l1_ball((offset / r.clamp(min=1e-300)).flatten(1))
    return unit.view_as(offset) * r


def _within(inputs: Tensor, offset: Tensor, bound: Tensor, p: float) -> Tensor:
    """Add an offset in the dtype of the inputs, no further than the bound in real numbers.

    Entries that rounding has moved too far are moved back by one number of the dtype.
    """
    slack = 1 + (inputs[0].numel() + 8) * torch.finfo(torch.float64).eps
    size = torch.linalg.vector_norm(offset.flatten(1), p, dim=1)
    offset = offset * _column((bound / size.clamp(min=1e-300)).clamp(max=1) / slack**2, offset)
    moved = (inputs.double() + offset).to(inputs.dtype)
    over = (moved.double() - inputs.double()).abs() > offset.abs()
    return torch.where(over, torch.nextafter(moved, inputs), moved)
