r"""Attacks: what looks for the inputs that a certificate excludes.

:func:`fgsm` and :func:`pgd` follow the gradient, :func:`decision_attack` the border of the
decision. None of them proves anything; a point that they move out of its class within a certified
radius disproves the certificate.

They attack the program that classifies: the model has to be in evaluation mode, and nothing of it
changes, neither buffers nor gradients. ``bounds`` restricts them to a box, such as [0, 1] for
images, which is what published attacks do; a certificate speaks of the points outside it, too.
A model with one output z, (batch, 1), is a binary classifier with the logits 0 and z, as it is for
:func:`~lipbook.robustness.certify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook import composition, errors, orthogonal
from lipbook.norms.arguments import _integer, _real
from lipbook.robustness import Accuracy, Batches, wilson_interval
from lipbook.robustness.arguments import check_mode, check_tensors, pairs
from lipbook.robustness.certificate import check_logits, class_logits, differences

__all__ = ["attacked_accuracy", "decision_attack", "fgsm", "pgd"]

Bounds = Sequence[float | Tensor]  # (low, high)

# ------------------------------------------------------------------------------- the attacks


@torch.inference_mode(False)
@torch.no_grad()
def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    p: float = 2,
    *,
    bounds: Bounds | None = None,
) -> Tensor:
    r"""Fast gradient method: one step of full length along the steepest ascent of the margin loss.

    .. math::
        x' = x + r \operatorname*{arg\,max}_{\lVert d\rVert_p \le 1}
        \langle d, \nabla\ell(x)\rangle, \qquad \ell(x) = \max_{j \ne y} z_j - z_y

    Exact on a linear classifier with two classes, at every p. With ``bounds``, the direction has
    no part that leaves the box at once, and :math:`x'` is clipped to the box.

    Parameters
    ----------
    model, inputs, labels, radius, p, bounds
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
    inputs, labels, box = _check_attack(model, inputs, labels, bounds)
    p, bound = _check_ball(inputs, radius, p)
    gradient = _gradient(model, inputs, labels)
    step = _steepest(box.inward(gradient, torch.zeros_like(inputs), inputs), p)
    return box.clip(_within(inputs, step * _column(bound, inputs), bound, p))


@torch.inference_mode(False)
@torch.no_grad()
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
    bounds: Bounds | None = None,
) -> Tensor:
    r"""Projected gradient ascent of the margin loss in a ball.

    .. math::
        x \leftarrow \Pi_{\lVert x' - x_0\rVert_p \le r}\Big(x + \tfrac{2.5\, r}{\text{steps}}
        \operatorname*{arg\,max}_{\lVert d\rVert_p \le 1} \langle d, \nabla\ell(x)\rangle\Big),
        \qquad \ell(x) = \max_{j \ne y} z_j - z_y

    from the input itself, and again from random points of the ball. The best point seen wins.
    With ``bounds`` each point is clipped to the box. **Guaranteed**: it is a number of the inputs'
    dtype within the radius, measured in float64 without rounding in its favour, and within the
    box. **Only hoped**: that it is misclassified whenever some point is.

    Parameters
    ----------
    model : torch.nn.Module
        Differentiable, in evaluation mode, to (batch, classes), or (batch, 1) for two classes.
    inputs : torch.Tensor
        (batch, \*shape).
    labels : torch.Tensor
        (batch,), of any integer dtype.
    radius : float or torch.Tensor
        One for all, or (batch,).
    p : float
        1, 2 or :data:`math.inf`.
    steps, restarts : int
        Steps of an ascent, and number of ascents.
    seed : int
        Of the random starts.
    bounds : (low, high), optional
        The box: two numbers or tensors, rounded to the dtype of ``inputs``. A tensor has the shape
        (channels,), or that of a sample, or one that broadcasts to it. Without it, the box is the
        whole space.

    Returns
    -------
    torch.Tensor
        Like ``inputs``, without a graph.

    Raises
    ------
    TypeError
        If an argument is no tensor or module, or ``labels`` are no integers.
    ValueError
        If a shape, the radius, p or the box does not fit, ``inputs`` lie outside the box, the model
        is in training mode or its weights were made under :class:`torch.inference_mode`, or it
        returns NaN or infinity.

    References
    ----------
    :cite:t:`madry2018`, with the loss of :cite:t:`carlini2017`.

    Examples
    --------
    >>> model, x, y = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    >>> bool(((pgd(model, x, y, 0.1) - x).double().norm(dim=1) <= 0.1).all())
    True
    >>> images = torch.rand(4, 5)
    >>> moved = pgd(model, images, y, 0.3, math.inf, bounds=(0, 1))
    >>> bool((moved.min() >= 0) & (moved.max() <= 1))
    True
    """
    inputs, labels, box = _check_attack(model, inputs, labels, bounds)
    p, bound = _check_ball(inputs, radius, p)
    if _integer("steps", steps, 0) < 1 or _integer("restarts", restarts, 0) < 1:
        raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    generator = torch.Generator(inputs.device).manual_seed(seed)
    rate = 2.5 * _column(bound, inputs) / steps
    best, record = inputs, _margin_loss(model, inputs, labels)
    for restart in range(restarts):
        offset = torch.zeros(inputs.shape, dtype=torch.float64, device=inputs.device)
        if restart:
            noise = torch.randn(inputs.shape, generator=generator, device=inputs.device)
            offset = _project(noise.double() * _column(bound, inputs), bound, p)
            offset = box.clip_offset(offset, inputs)
        for _ in range(steps):
            x = box.clip(_within(inputs, offset, bound, p))
            gradient = box.inward(_gradient(model, x, labels), offset, inputs)
            offset = offset + rate * _steepest(gradient, p)
            offset = box.clip_offset(_project(offset, bound, p), inputs)
            x = box.clip(_within(inputs, offset, bound, p))
            loss = _margin_loss(model, x, labels)
            best = torch.where(_column(loss > record, x), x, best)
            record = torch.maximum(record, loss)
    return best


@torch.inference_mode(False)
@torch.no_grad()
def decision_attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int = 20,
    queries: int = 100,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> Tensor:
    r"""Attack that sees decisions only: walk along the border of the class towards the input.

    From a point with another class, a step of the walk estimates the normal of the border at
    :math:`b` from the decisions at random points near it,

    .. math:: g = \frac1q \sum_i (\phi_i - \bar\phi)\, u_i, \qquad
        \phi_i = \pm1 \text{ as } b + \delta u_i \text{ has another class than } y \text{ or not},

    goes along it, and returns to the border by bisection on the way to the input. It needs no
    gradient, so that masked gradients do not mislead it. **Guaranteed**: what is returned has
    another class, or is the input itself if none was met; with ``bounds`` the model sees, and the
    attack returns, points of the box only. **Only hoped**: that it is near.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, to (batch, classes), or (batch, 1) for two classes.
    inputs : torch.Tensor
        (batch, \*shape). They also serve each other as points to start from.
    labels : torch.Tensor
        (batch,), of any integer dtype: the classes to get away from.
    steps : int
        Steps of the walk.
    queries : int
        Decisions :math:`q` for each estimate.
    seed : int
        Of the random directions.
    bounds : (low, high), optional
        The box, as in :func:`pgd`.

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
    inputs, labels, box = _check_attack(model, inputs, labels, bounds)
    if _integer("steps", steps, 0) < 0 or _integer("queries", queries, 0) < 1:
        raise ValueError(
            f"steps must be at least 0 and queries at least 1, got {steps} and {queries}"
        )
    generator = torch.Generator(inputs.device).manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(inputs.shape, generator=generator, device=inputs.device).to(inputs)

    def adversarial(x: Tensor) -> Tensor:
        return _check_outputs(model(x), labels).argmax(1) != labels

    def bisect(outside: Tensor, steps: int = 30) -> Tensor:
        low = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
        high, point = torch.ones_like(low), outside
        for _ in range(steps):
            middle = (low + high) / 2
            candidate = box.clip(inputs + _column(middle, inputs) * (outside - inputs))
            hit = adversarial(candidate)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
            point = torch.where(_column(hit, point), candidate, point)
        return point

    point, found = inputs.clone(), adversarial(inputs)
    already = found
    size = errors._norms(inputs, 2).mean().to(inputs) + 1
    starts = [inputs.roll(i, 0) for i in range(1, len(inputs))]
    starts += [box.clip(noise() * size * 2.0**i) for i in range(-4, 5)]
    starts += [box.draw(inputs, generator) for _ in range(9) if box.finite]
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
            delta = _column(distance / math.sqrt(dimension), u)
            near = box.clip(point + delta * u)
            sign = adversarial(near).to(u) * 2 - 1
            if bounds is not None:  # the direction to the point that was asked
                u = (near - point) / delta.clamp(min=torch.finfo(u.dtype).tiny)
            total, mean, share = total + _column(sign, u) * u, mean + u, share + sign
        normal = total - _column(share / queries, mean) * mean
        normal = functional.normalize(normal.flatten(1), dim=1).view_as(inputs)
        length, moved, done = distance / math.sqrt(t), point, torch.zeros_like(found)
        for _ in range(12):
            candidate = box.clip(point + _column(length, point) * normal)
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
    bounds: Bounds | None = None,
    **options: Any,
) -> Accuracy:
    """Fraction of inputs whose class is right and stays so under an attack.

    Above the certified accuracy at the same radius, and above the true robust accuracy: the gap to
    the certificate is what neither side has settled. With ``bounds`` it is above the accuracy
    without, since fewer points are allowed: say which with the number.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, to (batch, classes), or (batch, 1) for two classes.
    loader : iterable
        Yields ``(inputs, labels)``; labels of any integer dtype.
    radius : float
        Of the ball.
    p : float
        1, 2 or :data:`math.inf`.
    attack : callable
        ``attack(model, inputs, labels, radius, p, **options)``: :func:`pgd` or :func:`fgsm`.
    confidence : float
        Of the interval, see :func:`~lipbook.robustness.wilson_interval`.
    bounds : (low, high), optional
        The box, as in :func:`pgd`. Given to the attack if it is given here.
    **options
        Of the attack.

    Returns
    -------
    Accuracy

    Raises
    ------
    TypeError, ValueError
        As in :func:`pgd`, or if ``loader`` yields no such pairs.
    """
    if bounds is not None:
        options["bounds"] = bounds
    kept = trials = 0
    for inputs, labels in pairs(loader):
        moved = attack(model, inputs, labels, radius, p, **options)
        with torch.no_grad():
            truth = labels.long()
            right = _check_outputs(model(inputs), truth).argmax(1) == truth
            kept += int((right & (_check_outputs(model(moved), truth).argmax(1) == truth)).sum())
        trials += len(labels)
    return wilson_interval(kept, trials, confidence)


# --------------------------------------------------------------------------------- arguments


def _check_attack(
    model: nn.Module, inputs: Tensor, labels: Tensor, bounds: Bounds | None
) -> tuple[Tensor, Tensor, _Box]:
    """Refuse what cannot be attacked; return inputs and labels of their own, and the box."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_tensors(inputs, labels)
    check_mode(model)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "model must not have been made under torch.inference_mode, since its gradients are "
            "needed: build it outside, and load its state_dict"
        )
    inputs, labels = inputs.detach().clone(), labels.to(torch.int64, copy=True)
    if not inputs.isfinite().all():
        raise ValueError("inputs must be finite, got NaN or infinite entries")
    box = _Box(inputs, bounds)
    _check_outputs(model(inputs), labels)
    return inputs, labels, box


def _check_ball(inputs: Tensor, radius: float | Tensor, p: float) -> tuple[float, Tensor]:
    p = composition._exponent(p)
    if not isinstance(radius, Tensor):
        _real("radius", radius)
    bound = torch.as_tensor(radius, dtype=torch.float64, device=inputs.device)
    if bound.dim() > 1 or (bound.dim() and len(bound) != len(inputs)) or not (bound >= 0).all():
        raise ValueError(f"radius must be one number >= 0, or one for each input, got {radius}")
    if not bound.isfinite().all():
        raise ValueError(f"radius must be finite, got {radius}")
    return p, bound.expand(len(inputs))


class _Box:
    """Box of the points that an attack may visit, in the dtype of the inputs."""

    def __init__(self, inputs: Tensor, bounds: Bounds | None) -> None:
        bounds = (-math.inf, math.inf) if bounds is None else bounds
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (low, high), got {bounds!r}")
        self.low, self.high = (self._side(side, inputs) for side in bounds)
        if not (self.low <= self.high).all():
            raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
        outside = ((inputs < self.low) | (inputs > self.high)).flatten(1).any(1)
        if outside.any():
            raise ValueError(
                f"inputs must lie within bounds, got {inputs.min():.6g} to {inputs.max():.6g}, "
                f"{int(outside.sum())} of {len(inputs)} inputs outside"
            )
        self.finite = bool(self.low.isfinite().all() and self.high.isfinite().all())

    @staticmethod
    def _side(side: float | Tensor, inputs: Tensor) -> Tensor:
        tensor = torch.as_tensor(side).detach().to(inputs)
        one_a_channel = tensor.dim() == 1
        shape = (-1, *[1] * (inputs.dim() - 2)) if one_a_channel else tensor.shape
        try:
            return tensor.view(shape).expand(inputs.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"bounds must be numbers, or tensors of shape ({inputs.shape[1]},), one a channel, "
                f"or broadcast to the shape of a sample {tuple(inputs.shape[1:])}, "
                f"got shape {tuple(tensor.shape)}"
            ) from None

    def clip(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def clip_offset(self, offset: Tensor, inputs: Tensor) -> Tensor:
        """Shorten an offset in float64 to one that ends in the box."""
        x = inputs.double()
        return offset.clamp(self.low.double() - x, self.high.double() - x)

    def inward(self, direction: Tensor, offset: Tensor, inputs: Tensor) -> Tensor:
        """Zero the entries of a direction that leave the box at once."""
        x = inputs.double()  # the border as clip_offset computes it
        down, up = offset <= self.low.double() - x, offset >= self.high.double() - x
        return torch.where((down & (direction < 0)) | (up & (direction > 0)), 0.0, direction)

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw points from the uniform distribution on the box."""
        share = torch.rand(like.shape, generator=generator, device=like.device).to(like)
        return self.clip(self.low + share * (self.high - self.low))


def _check_outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    logits = class_logits(outputs)
    bad = ~logits.isfinite().all(1)
    if bad.any():
        what = "NaN" if logits.isnan().any() else "infinity"
        raise ValueError(
            f"model must return finite logits, got {what} for {int(bad.sum())} of {len(logits)} "
            f"inputs, the first of them input {int(bad.nonzero()[0])}"
        )
    return check_logits(logits, labels)


def _margin_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus that of the label, (batch,) float64."""
    with torch.set_grad_enabled(x.requires_grad):
        logits = _check_outputs(model(x), labels)
        margins = differences(logits, labels).scatter(1, labels[:, None], math.inf)
        return -margins.amin(1)


@torch.enable_grad()
def _gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_margin_loss(model, x, labels).sum(), x)
    return gradient


def _steepest(gradient: Tensor, p: float) -> Tensor:
    """Direction of steepest ascent of norm 1, in float64; 0 where there is none."""
    return composition._steepest(gradient, torch.zeros_like(gradient), p).double()


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
