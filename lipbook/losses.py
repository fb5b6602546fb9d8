r"""Losses that give Lipschitz networks a margin.

The certified radius of a 1-Lipschitz network is its margin :math:`z_y - \max_{j\ne y} z_j` times a
constant (:func:`~lipbook.robustness.certified_radius`). The cross-entropy of a Lipschitz network
never gets small, since its logits cannot grow at will, and its gradient goes to whatever is nearest
to the border. Each loss here says by a parameter how large a margin is worth having, and so trades
accuracy for radius. Methods can only be compared at the same loss (:cite:t:`bethune2022`).

**Which one.** Start with ``MultiMarginLoss(margin_for_radius(r))``, where r is the radius up to
which predictions shall be certified: one number in the units of the input, and a gradient that ends
where it is reached. A larger r buys certified accuracy at large radii with accuracy at small ones.
``OffsetCrossEntropyLoss(margin_for_radius(r), temperature)`` is the same with soft edges, for many
classes, of which the hinge would move few (:cite:t:`prach2022aol` take :math:`u = \sqrt2` and
:math:`t = 1/4` for colour images). ``HingeKRLoss`` is for two classes, and for several that may
apply together. ``CertificateLoss`` rewards radius without naming one.

Functions come first: (batch, classes) logits and labels (batch,) to the mean over the
batch. Then the same as modules, for ``loss=`` of a training loop.

Margins and offsets are in units of the logits; :func:`margin_for_radius` turns a radius into one.
Labels are classes in any integer dtype, or one row of probabilities :math:`q` for each sample (a
one-hot row is its class), whose loss is the expected one,

.. math:: \ell(z, q) = \sum_y q_y\, \ell(z, y).

With ``class_weight`` :math:`w`, sample :math:`i` counts :math:`w_{y_i}` times: the mean is
:math:`\sum_i w_{y_i} \ell(z_i, y_i) / \sum_i w_{y_i}`, as in torch's cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.norms import dual_exponent
from lipbook.norms.arguments import _got, _real

__all__ = [
    "CertificateLoss",
    "HingeKRLoss",
    "MultiMarginLoss",
    "OffsetCrossEntropyLoss",
    "certificate_loss",
    "hinge_kr",
    "margin_for_radius",
    "multi_margin",
    "offset_cross_entropy",
]

Reduction = Literal["mean", "sum", "none"]


def margin_for_radius(radius: float, lipschitz: float = 1.0, p: float = 2) -> float:
    r"""Margin at which a radius is certified.

    .. math:: m = 2^{1 - 1/p}\, L\, r

    That is :math:`\sqrt2 L r` for p = 2 and :math:`2 L r` for p = ∞. To train for a radius, take
    it as the margin of :func:`multi_margin` or the offset of :func:`offset_cross_entropy`.

    Parameters
    ----------
    radius : float
        r, in units of the input.
    lipschitz : float
        L of the logits, from :math:`\ell_p` to :math:`\ell_p`.
    p : float
        Exponent, in :math:`[1, \infty]`.

    Returns
    -------
    float
        m.

    Raises
    ------
    ValueError
        If ``radius`` or ``lipschitz`` is not positive and finite, or ``p`` is out of range.

    Examples
    --------
    >>> f"{margin_for_radius(1.5):.4f}"
    '2.1213'

    References
    ----------
    :cite:t:`li2019preventing`, whose margins for MNIST and CIFAR-10 are those of the radii 1.5 and
    0.5.
    """
    _check_positive("radius", radius)
    _check_positive("lipschitz", lipschitz)
    return 2 ** (1 / dual_exponent(p)) * lipschitz * radius


def multi_margin(
    logits: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    divide_by_classes: bool = True,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multi-class hinge loss of order 1.

    .. math:: \ell(z, y) = \frac1C \sum_{j \ne y} \max(0,\; m - z_y + z_j)

    It is 0 where every margin :math:`z_y - z_j` is at least :math:`m`. :math:`1/C` is there with
    ``divide_by_classes`` only, as in torch's ``multi_margin_loss``; it scales the
    gradient, which plain gradient descent notices and Adam does not. The gradient is
    :math:`\frac1C \sum_{j \in A} (e_j - e_y)` for the classes :math:`A` that are nearer than
    :math:`m`: it does not fade as a sample comes close to its margin, and is 0 beyond.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    margin : float
        :math:`m`, positive; see :func:`margin_for_radius`.
    divide_by_classes : bool
        Whether to divide by :math:`C`.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Returns
    -------
    torch.Tensor
        A scalar, or (batch,) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        If logits and labels do not fit, or ``margin`` is not positive and finite.

    Examples
    --------
    >>> logits, labels = torch.tensor([[3.0, 1.5, 0.0]]), torch.tensor([0])
    >>> [multi_margin(logits, labels, m, divide_by_classes=False).item() for m in (1, 2, 4)]
    [0.0, 0.5, 3.5]

    References
    ----------
    :cite:t:`anil2019sorting`; :cite:t:`li2019preventing`.
    """
    labels = _check(logits, labels)
    _check_positive("margin", margin)

    def loss(classes: Tensor) -> Tensor:
        excess = (margin - logits.gather(1, classes[:, None]) + logits).clamp(min=0)
        return excess.scatter(1, classes[:, None], 0.0).sum(1)

    reduced = _reduced(loss, labels, logits, class_weight, reduction)
    return reduced / (logits.shape[1] if divide_by_classes else 1)


def offset_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    offset: float = 0.0,
    temperature: float = 1.0,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with an offset of the true logit and a temperature.

    .. math::
        \ell(z, y) = t\, \mathrm{CE}\Big(\frac{z - u\, e_y}{t}, y\Big)
        = t \log\Big(1 + \sum_{j \ne y} e^{(u - z_y + z_j) / t}\Big)

    A soft hinge: it tends to :math:`\max(0, \max_{j\ne y} u - z_y + z_j)` as :math:`t \to 0`, and
    exceeds it by at most :math:`t \log C`. Its gradient is that of a cross-entropy,
    :math:`\operatorname{softmax}((z - u\, e_y)/t) - e_y`, of norm at most :math:`\sqrt2` whatever
    the temperature, and of norm at least :math:`\tfrac12` until the margin is :math:`u`.
    ``offset=0``, the default, asks for no margin: it is the tempered cross-entropy
    (:math:`t = 1/\tau` for those that multiply logits by :math:`\tau`).

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    offset : float
        :math:`u`, a margin worth having, not negative.
    temperature : float
        :math:`t`, positive.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Returns
    -------
    torch.Tensor
        A scalar, or (batch,) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        If logits and labels do not fit, or a number is out of range.

    Examples
    --------
    >>> logits, labels = torch.tensor([[3.0, 1.5, 0.0]]), torch.tensor([0])
    >>> f"{offset_cross_entropy(logits, labels, offset=2.0, temperature=0.01).item():.4f}"
    '0.5000'

    References
    ----------
    :cite:t:`prach2022aol`, with :math:`u = \sqrt2` and :math:`t = 1/4` on CIFAR-10;
    :cite:t:`bethune2022` for the temperature.
    """
    labels = _check(logits, labels)
    _check_positive("temperature", temperature)
    _check_not_negative("offset", offset)

    def loss(classes: Tensor) -> Tensor:
        own = functional.one_hot(classes, logits.shape[1]).to(logits)
        scaled = (logits - offset * own) / temperature
        return functional.cross_entropy(scaled, classes, reduction="none")

    return temperature * _reduced(loss, labels, logits, class_weight, reduction)


def certificate_loss(
    logits: Tensor,
    labels: Tensor,
    weight: float = 0.5,
    lipschitz: float = 1.0,
    p: float = 2,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy minus the certified radius (certificate regularisation).

    .. math::
        \ell(z, y) = \mathrm{CE}(z, y)
        - \lambda \max\Big(0,\; \frac{z_y - \max_{j\ne y} z_j}{2^{1 - 1/p} L}\Big)

    Rewards radius where the prediction is right, without end, and leaves wrong predictions to the
    cross-entropy. It is not bounded from below, other than by what a Lipschitz network can reach.
    The gradient is that of the cross-entropy, plus :math:`\lambda (e_j - e_y) / (2^{1 - 1/p} L)`
    for the second class :math:`j` where the prediction is right: no margin is ever enough.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    weight : float
        :math:`\lambda`, not negative.
    lipschitz, p
        As in :func:`margin_for_radius`.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Returns
    -------
    torch.Tensor
        A scalar, or (batch,) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        If logits and labels do not fit, or a number is out of range.

    Examples
    --------
    >>> logits, labels = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
    >>> rewarded = certificate_loss(logits, labels, weight=1.0)
    >>> plain = functional.cross_entropy(logits, labels)
    >>> f"{(plain - rewarded).item():.4f}"  # half of the radius 2 / √2 of the first
    '0.7071'

    References
    ----------
    :cite:t:`singla2022improved`.
    """
    labels = _check(logits, labels)
    _check_not_negative("weight", weight)
    slope = margin_for_radius(1.0, lipschitz, p)

    def loss(classes: Tensor) -> Tensor:
        own = logits.gather(1, classes[:, None])
        others = logits.scatter(1, classes[:, None], -math.inf).amax(1)
        radius = (own[:, 0] - others).clamp(min=0) / slope
        return functional.cross_entropy(logits, classes, reduction="none") - weight * radius

    return _reduced(loss, labels, logits, class_weight, reduction)


def hinge_kr(
    outputs: Tensor,
    labels: Tensor,
    alpha: float = 10.0,
    margin: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Hinge-regularised Kantorovich–Rubinstein loss, binary or one against the others.

    .. math::
        \ell = -\Big(\operatorname*{mean}_{y_i = 1} f(x_i) - \operatorname*{mean}_{y_i = -1} f(x_i)
        \Big) + \alpha \operatorname{mean}_i \max(0,\; m - y_i f(x_i))

    The first term separates the classes as far as a 1-Lipschitz function can, the second keeps the
    border between them. With several classes, output :math:`c` has the labels 1 for class c and -1
    for the others, and the loss is the mean over the outputs. An output whose class is missing from
    the batch, or is all of it, has no first term. The first term weighs both classes alike,
    whatever their sizes :math:`n_\pm`: its gradient is :math:`-y_i / n_{y_i}` at every sample, and
    :math:`-\alpha y_i / n` is added within the margin, :math:`y_i f(x_i) < m`. So :math:`m` is a
    distance to the border, half of a margin :math:`z_y - z_j` of two logits.

    Parameters
    ----------
    outputs : torch.Tensor
        (batch,) or (batch, 1) for two classes, (batch, classes) for several.
    labels : torch.Tensor
        (batch,): -1 or 1 for (batch,) outputs; integer classes for (batch, classes), or rows of
        0 and 1, (batch, classes), of which several may be 1 (multi-label); either 0 and 1 or -1 and
        1 for (batch, 1).
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        :math:`m`, positive.
    reduction : {"mean", "sum", "none"}
        The loss, as it is written; times the batch size; or what each sample adds, (batch,), of
        which it is the mean. The first term depends on the whole batch in any case.

    Returns
    -------
    torch.Tensor
        A scalar, or (batch,) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        If outputs and labels do not fit, or a number is out of range.

    Examples
    --------
    Both samples of one batch at distance 2, on the right sides of the margin:

    >>> hinge_kr(torch.tensor([1.0, -1.0]), torch.tensor([1, -1])).item()
    -2.0

    References
    ----------
    :cite:t:`serrurier2021`.
    """
    _check_positive("margin", margin)
    _check_not_negative("alpha", alpha)
    _check_reduction(reduction)
    _check_tensors(outputs, labels)
    if outputs.dim() == 2 and outputs.shape[1] > 1:
        if labels.shape == outputs.shape:  # which classes apply: none, one or several
            if not ((labels == 0) | (labels == 1)).all():
                raise ValueError("labels must be classes, or rows of 0 and 1, got other numbers")
            signs = labels.long() * 2 - 1
        else:
            signs = functional.one_hot(_check(outputs, labels), outputs.shape[1]) * 2 - 1
    else:
        if outputs.dim() == 2:
            outputs = outputs[:, 0]
            labels = labels if labels.is_floating_point() else labels.long()
            labels = torch.where(labels == 0, -1, labels)
        labels = _check_binary(outputs, labels)
        outputs, signs = outputs[:, None], labels[:, None]
    positive = (signs > 0).to(outputs)
    count = positive.sum(0)
    others = len(outputs) - count
    means = (outputs * positive).sum(0) / count.clamp(min=1)
    gaps = means - (outputs * (1 - positive)).sum(0) / others.clamp(min=1)
    both = (count > 0) & (others > 0)
    hinge = (margin - signs * outputs).clamp(min=0)
    if reduction == "none":
        shares = positive / count.clamp(min=1) - (1 - positive) / others.clamp(min=1)
        return (alpha * hinge - len(outputs) * shares * outputs * both).mean(1)
    loss = (alpha * hinge.mean(0) - gaps * both).mean()
    return loss * len(outputs) if reduction == "sum" else loss


# ----------------------------------------------------------------------------------- modules


class MultiMarginLoss(nn.Module):
    r"""Multi-class hinge loss of order 1, mean of sum over j ≠ y of max(0, m - z_y + z_j).

    The function is :func:`multi_margin`.

    Parameters
    ----------
    margin : float
        m, positive: the margin below which a pair of logits costs something.
    divide_by_classes : bool
        Whether to divide by the number of classes, as torch's loss does.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> MultiMarginLoss(2.0)(torch.tensor([[3.0, 1.5]]), torch.tensor([0])).item()
    0.25
    """

    class_weight: Tensor | None

    def __init__(
        self,
        margin: float = 1.0,
        divide_by_classes: bool = True,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_positive("margin", margin)
        _check_reduction(reduction)
        self.margin, self.divide_by_classes = margin, divide_by_classes
        self.reduction: Reduction = reduction
        self.register_buffer("class_weight", _check_class_weight(class_weight))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return multi_margin(
            logits,
            labels,
            self.margin,
            self.divide_by_classes,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the arguments."""
        shown = f"margin={self.margin:g}, divide_by_classes={self.divide_by_classes}"
        return shown + _options(self)


class OffsetCrossEntropyLoss(nn.Module):
    r"""Cross-entropy that asks for a margin u: t · CE((z - u e_y) / t, y).

    The function is :func:`offset_cross_entropy`.

    Parameters
    ----------
    offset : float
        u, the margin worth having. It must be given: 0 is a plain cross-entropy, which asks for
        none; ``margin_for_radius(r)`` is that of a radius.
    temperature : float
        t, positive. The smaller, the closer to a hinge.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> loss = OffsetCrossEntropyLoss(offset=2.0, temperature=0.001)
    >>> f"{loss(torch.tensor([[3.0, 1.5]]), torch.tensor([0])).item():.4f}"
    '0.5000'
    """

    class_weight: Tensor | None

    def __init__(
        self,
        offset: float,
        temperature: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_not_negative("offset", offset)
        _check_positive("temperature", temperature)
        _check_reduction(reduction)
        self.offset, self.temperature = offset, temperature
        self.reduction: Reduction = reduction
        self.register_buffer("class_weight", _check_class_weight(class_weight))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return offset_cross_entropy(
            logits,
            labels,
            self.offset,
            self.temperature,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"offset={self.offset:g}, temperature={self.temperature:g}" + _options(self)


class CertificateLoss(nn.Module):
    r"""Cross-entropy minus λ times the certified radius, where the prediction is right.

    The function is :func:`certificate_loss`.

    Parameters
    ----------
    weight : float
        λ, not negative: what a unit of certified radius is worth.
    lipschitz : float
        Lipschitz constant of the logits.
    p : float
        Exponent of the norm of perturbations.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> logits, labels = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    >>> bool(CertificateLoss(1.0)(logits, labels) < CertificateLoss(0.0)(logits, labels))
    True
    """

    class_weight: Tensor | None

    def __init__(
        self,
        weight: float = 0.5,
        lipschitz: float = 1.0,
        p: float = 2,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_not_negative("weight", weight)
        margin_for_radius(1.0, lipschitz, p)
        _check_reduction(reduction)
        self.weight, self.lipschitz, self.p = weight, lipschitz, p
        self.reduction: Reduction = reduction
        self.register_buffer("class_weight", _check_class_weight(class_weight))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return certificate_loss(
            logits,
            labels,
            self.weight,
            self.lipschitz,
            self.p,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the arguments."""
        shown = f"weight={self.weight:g}, lipschitz={self.lipschitz:g}, p={self.p:g}"
        return shown + _options(self)


class HingeKRLoss(nn.Module):
    r"""Hinge-regularised Kantorovich–Rubinstein loss, binary or one class against the others.

    Minus the difference of the means of both classes, plus α · mean max(0, m - y f(x)). The
    function is :func:`hinge_kr`.

    Parameters
    ----------
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        m, positive: a distance to the border, half of a margin of two logits.
    reduction : {"mean", "sum", "none"}
        The loss, its multiple by the batch size, or what each sample adds.

    Examples
    --------
    >>> HingeKRLoss()(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])).item()
    -2.0
    """

    def __init__(
        self, alpha: float = 10.0, margin: float = 1.0, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_not_negative("alpha", alpha)
        _check_positive("margin", margin)
        _check_reduction(reduction)
        self.alpha, self.margin = alpha, margin
        self.reduction: Reduction = reduction

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return hinge_kr(outputs, labels, self.alpha, self.margin, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"alpha={self.alpha:g}, margin={self.margin:g}" + _options(self)


def _options(module: nn.Module) -> str:
    weight = getattr(module, "class_weight", None)
    shown = "" if weight is None else f", class_weight={weight.tolist()}"
    return shown if module.reduction == "mean" else f"{shown}, reduction={module.reduction!r}"


# --------------------------------------------------------------------------------- reduction


def _reduced(
    loss: Callable[[Tensor], Tensor],
    labels: Tensor,
    logits: Tensor,
    class_weight: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """Weigh and reduce a loss of classes (batch,), at checked labels."""
    _check_reduction(reduction)
    weight = _check_class_weight(class_weight, logits)
    if labels.dim() == 1:
        values = loss(labels)
        share = None if weight is None else weight[labels]
        values = values if share is None else share * values
    else:
        classes = torch.arange(logits.shape[1], device=logits.device)
        every = torch.stack([loss(c.expand(len(logits))) for c in classes], 1)
        share = labels if weight is None else labels * weight
        values = (share * every).sum(1)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.mean() if weight is None or share is None else values.sum() / share.sum()


# --------------------------------------------------------------------------------- arguments


def _check_positive(name: str, value: float) -> None:
    _real(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_not_negative(name: str, value: float) -> None:
    _real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_class_weight(weight: Tensor | None, logits: Tensor | None = None) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"class_weight must be a floating-point tensor, got {_got(weight)}")
    if weight.dim() != 1 or (logits is not None and len(weight) != logits.shape[1]):
        expected = "(classes,)" if logits is None else f"({logits.shape[1]},)"
        raise ValueError(f"class_weight must have shape {expected}, got {tuple(weight.shape)}")
    if not ((weight > 0) & weight.isfinite()).all():
        raise ValueError(f"class_weight must be positive and finite, got {weight.tolist()}")
    return weight if logits is None else weight.to(logits)


def _check(logits: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no batch of logits with a class for each, and return int64 or probabilities.

    Probabilities come in the dtype of the logits.
    """
    _check_tensors(logits, labels)
    shapes = (tuple(logits.shape), tuple(labels.shape))
    if logits.dim() != 2 or logits.shape[1] < 2 or shapes[1] not in (shapes[0][:1], shapes[0]):
        raise ValueError(
            "logits and labels must have shapes (batch, classes) and (batch,), or (batch, classes) "
            "for probabilities, with two classes or more, "
            f"got {shapes[0]} and {shapes[1]}"
        )
    if labels.dim() == 2:
        return _check_probabilities(labels).to(logits)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels must be classes in int64 or another integer dtype, got {labels.dtype}: call "
            ".long()"
        )
    labels = labels.long()
    if not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return labels


def _check_probabilities(labels: Tensor) -> Tensor:
    if labels.is_complex():
        raise TypeError(f"labels must be real, got {labels.dtype}")
    exact = labels.detach().double()
    rounding = 0.0
    if labels.is_floating_point():
        rounding = labels.shape[1] * torch.finfo(labels.dtype).eps
    # Sums may be off by the rounding of their terms and of the division that made them.
    if not ((exact >= 0).all() and ((exact.sum(1) - 1).abs() <= 2 * rounding).all()):
        raise ValueError(
            "labels of shape (batch, classes) must be rows of probabilities (divide multi-label "
            "rows by their sums, or use hinge_kr, which takes them as they are), got entries from "
            f"{exact.min().item():g} to {exact.max().item():g} and sums from "
            f"{exact.sum(1).min().item():g} to {exact.sum(1).max().item():g}"
        )
    return labels


def _check_binary(outputs: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no batch of numbers with a sign for each, and return the signs."""
    if outputs.dim() != 1 or labels.shape != outputs.shape:
        raise ValueError(
            "outputs (logits) and labels must have one shape (batch,), "
            f"got {tuple(outputs.shape)} and {tuple(labels.shape)}"
        )
    labels = labels if labels.is_floating_point() else labels.long()
    if not (labels.abs() == 1).all():
        raise ValueError(f"labels must be -1 or 1, got {labels.unique().tolist()}")
    return labels


def _check_tensors(outputs: Tensor, labels: Tensor) -> None:
    for name, tensor in (("logits", outputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_got(tensor)}")
    if not outputs.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {outputs.dtype}")
    if outputs.numel() == 0:
        raise ValueError(f"logits must not be empty, got shape {tuple(outputs.shape)}")
