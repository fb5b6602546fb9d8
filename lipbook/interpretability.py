r"""Interpretable gradients: what the gradient of a classifier shows, in numbers.

The input gradient of a margin is the direction in which a decision is lost fastest. For a
1-Lipschitz network with a certified radius it is more than a picture: where its norm is the
Lipschitz constant, a step of that radius against it ends on the border, and for a best critic of
two classes it is the direction in which optimal transport moves the point. :func:`alignment`,
:func:`sparsity` and :func:`stability` put numbers on the picture, :func:`counterfactual` takes the
step. None of the three numbers is a certificate; :mod:`lipbook.robustness` has those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipbook import jacobians
from lipbook.norms.arguments import _got, _integer, _real
from lipbook.robustness import certified_radius
from lipbook.robustness.arguments import check_mode
from lipbook.robustness.certificate import check_logits

__all__ = [
    "Counterfactual",
    "alignment",
    "counterfactual",
    "margin_gradient",
    "sparsity",
    "stability",
]

# ------------------------------------------------------------------------------- the gradient


def margin_gradient(model: nn.Module, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Input gradient of the margin.

    .. math::
        g(x) = \nabla f(x), \qquad f(x) = z_y - \max_{j \ne y} z_j
        \quad\text{or}\quad f(x) = y\, z \text{ for one output}

    :math:`f` is positive where the decision is :math:`y`, so :math:`-g` is the direction in which
    it is lost fastest. Unlike the gradient of the cross-entropy, :math:`g` does not vanish where
    the network is sure. **Guaranteed**: if the logits are :math:`L`-Lipschitz from
    :math:`\ell_2` to :math:`\ell_2`, :math:`\lVert g\rVert \le \sqrt2 L`, and :math:`L` for one
    output. Where the maximum is attained twice, or an activation has a kink, it is what torch's
    automatic differentiation returns.

    Parameters
    ----------
    model : torch.nn.Module
        Differentiable, to (batch, classes) logits, or to (batch,) or (batch, 1) for a binary
        classifier that decides by sign. It must treat the inputs of a batch one by one and be
        deterministic (batch normalisation and dropout in evaluation mode).
    inputs : torch.Tensor
        (batch, \*shape), floating-point.
    labels : torch.Tensor, optional
        (batch,): classes in int64; -1 or 1 for one output. The model's decisions unless given.

    Returns
    -------
    torch.Tensor
        :math:`g`, like ``inputs``, without a graph; 0 where the margin does not depend on them.

    Raises
    ------
    TypeError
        If ``model`` is no module, ``inputs`` no floating-point tensor or ``labels`` no integers.
    ValueError
        If ``inputs`` are empty, outputs and labels do not fit or are not finite, the gradient is
        not finite, or the model mixes inputs, is random or changes at each call: those that train
        are refused before they are called.

    References
    ----------
    :cite:t:`simonyan2014`, for the logit of the class instead of the margin.

    Examples
    --------
    Orthonormal rows have differences of norm √2:

    >>> model = nn.Linear(5, 3)
    >>> _ = nn.init.orthogonal_(model.weight)
    >>> g = margin_gradient(model, torch.randn(4, 5))
    >>> bool((g.norm(dim=1) - 2**0.5).abs().max() < 1e-6)
    True
    """
    _check_inputs(model, inputs)
    return _gradient(model, inputs, _labels(model, inputs, labels))


# --------------------------------------------------------------------------------- the numbers


def alignment(inputs: Tensor, gradient: Tensor, *, cosine: bool = False) -> Tensor:
    r"""Alignment of inputs with gradients: the length of the input along the gradient.

    .. math::
        \alpha(x) = \frac{\lvert\langle x, g\rangle\rvert}{\lVert g\rVert}
        \in [0, \lVert x\rVert], \qquad
        \frac{\alpha(x)}{\lVert x\rVert} \in [0, 1] \text{ for } \texttt{cosine}

    Let :math:`g = \nabla f(x)` and :math:`\beta = f(x) - \langle x, g\rangle`, the intercept of the
    tangent plane. Then

    .. math:: \frac{\lvert f(x)\rvert}{\lVert g\rVert} \le \alpha(x)
        + \frac{\lvert\beta\rvert}{\lVert g\rVert} .

    The left side is the distance to the border if :math:`f` is affine. **Equality**,
    :math:`\alpha = |f| / \lVert g\rVert`, if :math:`\beta = 0`: for linear classifiers and
    for networks of linear layers without biases and activations with
    :math:`\phi(\lambda x) = \lambda\phi(x)` for :math:`\lambda > 0`
    (ReLU, GroupSort). If besides :math:`f` is :math:`L`-Lipschitz, :math:`\alpha` is at least the
    certified radius :math:`f / L`. The origin matters: a shift of the inputs changes
    :math:`\alpha`.

    Parameters
    ----------
    inputs, gradient : torch.Tensor
        (batch, \*shape), floating-point.
    cosine : bool
        Divide by the norm of the input.

    Returns
    -------
    torch.Tensor
        (batch,) float64, in the units of the input or, with ``cosine``, without.

    Raises
    ------
    TypeError
        If an argument is no floating-point tensor.
    ValueError
        If the shapes differ, an entry is not finite, a gradient is 0, or an input is 0 and its
        cosine asked for.

    References
    ----------
    :cite:t:`etmann2019`.

    Examples
    --------
    >>> x, w = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    >>> alignment(x, w).item(), alignment(x, w, cosine=True).item()
    (4.0, 0.8)
    """
    x, g = _flat("inputs", inputs), _flat("gradient", gradient)
    if inputs.shape != gradient.shape:
        raise ValueError(
            "inputs and gradient must have one shape, got "
            f"{tuple(inputs.shape)} and {tuple(gradient.shape)}"
        )
    if cosine:
        x = _unit("inputs", x)
    return (x * _unit("gradient", g)).sum(1).abs()


def sparsity(gradient: Tensor) -> Tensor:
    r"""Hoyer's sparsity: how few entries hold the gradient.

    .. math::
        s(g) = \frac{\sqrt n - \lVert g\rVert_1 / \lVert g\rVert_2}{\sqrt n - 1} \in [0, 1]

    for :math:`n \ge 2` entries. It is 0 if and only if all :math:`|g_i|` are equal, 1 if and only
    if one entry is not 0, since :math:`\lVert g\rVert_2 \le \lVert g\rVert_1 \le
    \sqrt n\,\lVert g\rVert_2` with those cases of equality. Scale, signs and order do not matter.
    Independent normal entries have :math:`s \to 1 - \sqrt{2/\pi} \approx 0.20` as :math:`n` grows:
    that is the value of noise.

    Parameters
    ----------
    gradient : torch.Tensor
        (batch, \*shape), floating-point.

    Returns
    -------
    torch.Tensor
        (batch,) float64.

    Raises
    ------
    TypeError
        If ``gradient`` is no floating-point tensor.
    ValueError
        If it has fewer than two entries for each input, one is not finite, or all are 0.

    References
    ----------
    :cite:t:`hoyer2004`; :cite:t:`hurley2009` compare it with others.

    Examples
    --------
    >>> g = torch.tensor([[0.0, 5.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0], [3.0, 4.0, 0.0, 0.0]])
    >>> [f"{value:.2f}" for value in sparsity(g)]
    ['1.00', '0.00', '0.60']
    """
    g = _flat("gradient", gradient)
    n = g.shape[1]
    if n < 2:
        raise ValueError(f"gradient must have two entries at least for each input, got {n}")
    return ((math.sqrt(n) - _unit("gradient", g).abs().sum(1)) / (math.sqrt(n) - 1)).clamp(0, 1)


def stability(
    model: nn.Module,
    inputs: Tensor,
    radius: float,
    labels: Tensor | None = None,
    *,
    samples: int = 8,
    seed: int = 0,
) -> Tensor:
    r"""Stability of gradients: their mean cosine with gradients at a distance.

    .. math::
        \frac1k \sum_{i=1}^k
        \frac{\langle g(x), g(x + r u_i)\rangle}{\lVert g(x)\rVert\,\lVert g(x + r u_i)\rVert}
        \in [-1, 1], \qquad u_i \text{ uniform on the sphere}

    for the margin of the same label at all points. It is 1 if the margin is affine on the ball of
    radius :math:`r`, and says how far an explanation at :math:`x` is one of its
    neighbourhood. An **estimate** of a mean, from :math:`k` points; a random direction in high
    dimension is nearly orthogonal to any gradient, so it sees another neighbourhood than an attack
    does. A gradient of 0 at a moved point counts as 0.

    Parameters
    ----------
    model, inputs, labels
        As in :func:`margin_gradient`.
    radius : float
        :math:`r`, not negative, in units of the input.
    samples : int
        :math:`k`.
    seed : int
        Of the directions, which differ from input to input.

    Returns
    -------
    torch.Tensor
        (batch,) float64.

    Raises
    ------
    TypeError, ValueError
        As in :func:`margin_gradient`; if ``radius`` or ``samples`` is out of range, or a gradient
        at an input is 0.

    Examples
    --------
    A linear classifier with two classes has one gradient:

    >>> x = torch.randn(4, 6)
    >>> bool((stability(nn.Linear(6, 2), x, radius=3.0) > 1 - 1e-6).all())
    True
    """
    _check_inputs(model, inputs)
    _real("radius", radius)
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be a finite number >= 0, got {radius}")
    if _integer("samples", samples, 0) < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    labels = _labels(model, inputs, labels)
    here = _unit("gradient", _flat("gradient", _gradient(model, inputs, labels)))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    for _ in range(samples):
        noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
        step = radius * _unit("noise", noise.flatten(1)).view_as(inputs)
        moved = (inputs.detach().double() + step.to(inputs.device)).to(inputs.dtype)
        there = _flat("gradient", _gradient(model, moved, labels))
        still = there.abs().amax(1) == 0
        there = torch.where(still[:, None], torch.ones_like(there), there)
        cosines = (here * _unit("gradient", there)).sum(1)
        total += torch.where(still, 0.0, cosines)
    return (total / samples).clamp(-1, 1)


# ------------------------------------------------------------------------------------ the step


class Counterfactual(NamedTuple):
    r"""A straight path from each input against the gradient of its margin.

    Attributes
    ----------
    path : torch.Tensor
        (steps, batch, \*shape), like the inputs.
    margins : torch.Tensor
        (steps, batch) float64, of the label that each path starts from.
    decisions : torch.Tensor
        (steps, batch) int64.
    radius : torch.Tensor
        (batch,) float64, the unit of length of each path.
    """

    path: Tensor
    margins: Tensor
    decisions: Tensor
    radius: Tensor


def counterfactual(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    multiples: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    lipschitz: float = 1.0,
) -> Counterfactual:
    r"""Walk against the gradient of the margin, by multiples of the certified radius.

    .. math::
        x_t = x - t\, r\, \frac{\nabla f(x)}{\lVert\nabla f(x)\rVert}, \qquad
        r = \frac{\max(0, f(x))}{\operatorname{Lip}(f)}, \qquad
        f(x) = z_y - \max_{j\ne y} z_j

    with :math:`\operatorname{Lip}(f) \le \sqrt2 L` for logits that are :math:`L`-Lipschitz, and
    :math:`L` for one output. For one output with :math:`L = 1` and
    :math:`\lVert\nabla f(x)\rVert = 1`
    it is :math:`x - t f(x) \nabla f(x)`, the line on which optimal transport moves a point.

    **Guaranteed**, in real arithmetic, if ``lipschitz`` is right: the decision is kept for
    :math:`t < 1`. If :math:`f` is affine on the segment with
    :math:`\lVert\nabla f\rVert = \operatorname{Lip}(f)`, the margin is :math:`(1 - t) f(x)`, and
    the decision changes right after :math:`t = 1`. **Only hoped**: that it changes near
    :math:`t = 1`
    elsewhere, and that what comes out looks like the other class. The points are not clamped to the
    range of an image. An input whose label is not the decision stays where it is (:math:`r = 0`).

    Parameters
    ----------
    model, inputs, labels
        As in :func:`margin_gradient`.
    multiples : sequence of float
        Values of :math:`t`, finite.
    lipschitz : float
        :math:`L` of the logits, from :math:`\ell_2` to :math:`\ell_2`; see
        :func:`~lipbook.composition.lipschitz_bound`.

    Returns
    -------
    Counterfactual

    Raises
    ------
    TypeError, ValueError
        As in :func:`margin_gradient` and :func:`~lipbook.robustness.certified_radius`; if
        ``multiples`` are empty or not finite, or a gradient is 0.

    References
    ----------
    :cite:t:`serrurier2023`.

    Examples
    --------
    >>> model = nn.Linear(5, 3)
    >>> _ = nn.init.orthogonal_(model.weight)
    >>> walk = counterfactual(model, torch.randn(4, 5), multiples=(0, 0.999, 1.001))
    >>> (walk.decisions == walk.decisions[0]).all(1).tolist()
    [True, True, False]
    >>> bool((walk.decisions[2] == walk.decisions[0]).any())
    False
    """
    _check_inputs(model, inputs)
    if not len(multiples) or not all(math.isfinite(t) for t in multiples):
        raise ValueError(f"multiples must be finite numbers, one at least, got {multiples}")
    labels = _labels(model, inputs, labels)
    gradient = _gradient(model, inputs, labels)
    radius = certified_radius(_outputs(model, inputs.detach()), labels, lipschitz)
    direction = _unit("gradient", _flat("gradient", gradient)).view_as(inputs)
    step = direction * radius.view(-1, *[1] * (inputs.dim() - 1))
    path, margins, decisions = [], [], []
    for t in multiples:
        x = (inputs.detach().double() - t * step).to(inputs.dtype)
        outputs = _outputs(model, x)
        path.append(x)
        margins.append(_margin(outputs, labels))
        decisions.append(_decision(outputs))
    return Counterfactual(torch.stack(path), torch.stack(margins), torch.stack(decisions), radius)


# ----------------------------------------------------------------------------------- arguments


def _check_inputs(model: nn.Module, inputs: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_mode(model)
    jacobians._check_module("model", model)
    _flat("inputs", inputs)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """(batch, classes) or (batch,)."""
    with torch.set_grad_enabled(x.requires_grad):
        outputs = model(x.clone())  # since its first layer may work in place
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2) or len(outputs) != len(x):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model must return (batch, classes) or (batch,), got {got}")
    _check_finite("outputs of model", outputs)
    return outputs[:, 0] if outputs.dim() == 2 and outputs.shape[1] == 1 else outputs


def _decision(outputs: Tensor) -> Tensor:
    if outputs.dim() == 1:
        return torch.where(outputs < 0, -1, 1)
    return outputs.argmax(1)


def _labels(model: nn.Module, inputs: Tensor, labels: Tensor | None) -> Tensor:
    outputs = _outputs(model, inputs.detach())
    if labels is None:
        labels = _decision(outputs)
    check_logits(outputs, labels)
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}: call .long()")
    return labels.long()


def _margin(outputs: Tensor, labels: Tensor) -> Tensor:
    logits = check_logits(outputs, labels)
    if logits.dim() == 1:
        return labels * logits
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    x = inputs.detach().clone().requires_grad_()
    margin = _margin(_outputs(model, x), labels.clone())  # the caller's may be of inference mode
    if not margin.requires_grad:
        return torch.zeros_like(x).detach()
    (gradient,) = torch.autograd.grad(margin.sum(), x, allow_unused=True)
    if gradient is None:
        return torch.zeros_like(x).detach()
    _check_finite("gradient of model", gradient)
    return gradient


def _check_finite(name: str, values: Tensor) -> None:
    wrong = ~values.detach().isfinite().flatten(1 if values.dim() > 1 else 0)
    rows = wrong.any(1) if wrong.dim() > 1 else wrong
    if rows.any():
        where = rows.nonzero()[:, 0].tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity for the inputs {where}")


def _flat(name: str, tensor: Tensor) -> Tensor:
    """(batch, n) in float64, or a refusal."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_got(tensor)}")
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} must have shape (batch, *shape) and not be empty, got {tuple(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return tensor.detach().flatten(1).double()


def _unit(name: str, flat: Tensor) -> Tensor:
    """Rows divided by their norms, in two steps so that tiny and huge ones have one."""
    largest = flat.abs().amax(1, keepdim=True)
    if (largest == 0).any():
        where = (largest[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"{name} must not be 0, got 0 for the inputs {where}")
    scaled = flat / largest
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
