r"""Losses that give Lipschitz networks a margin.

The certified radius of a 1-Lipschitz network is its margin :math:`z_y - \max_{j\ne y} z_j` times a
constant (:func:`~lipbook.robustness.certified_radius`). The cross-entropy of a Lipschitz network
never gets small, since its logits cannot grow at will, and its gradient goes to whatever is nearest
to the border. Each loss here says by a parameter how large a margin is worth having, and so trades
accuracy for radius. Methods can only be compared at the same loss (:cite:t:`bethune2022`).

Functions come first: (batch, classes) logits and int64 labels (batch,) to the mean over the
batch. Then the same as modules, for ``loss=`` of a training loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.norms import dual_exponent

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
    logits: Tensor, labels: Tensor, margin: float = 1.0, divide_by_classes: bool = True
) -> Tensor:
    r"""Multi-class hinge loss of order 1.

    .. math:: \ell(z, y) = \frac1C \sum_{j \ne y} \max(0,\; m - z_y + z_j)

    It is 0 where every margin is at least :math:`m`. :math:`1/C` is there with
    ``divide_by_classes`` only, as in torch's ``multi_margin_loss``; it scales the
    gradient, which plain gradient descent notices and Adam does not.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) int64.
    margin : float
        :math:`m`, positive; see :func:`margin_for_radius`.
    divide_by_classes : bool
        Whether to divide by :math:`C`.

    Returns
    -------
    torch.Tensor
        The mean over the batch, a scalar.

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
    _check(logits, labels)
    _check_positive("margin", margin)
    excess = (margin - logits.gather(1, labels[:, None]) + logits).clamp(min=0)
    others = excess.scatter(1, labels[:, None], 0.0).sum(1)
    return others.mean() / (logits.shape[1] if divide_by_classes else 1)


def offset_cross_entropy(
    logits: Tensor, labels: Tensor, offset: float = 0.0, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy with an offset of the true logit and a temperature.

    .. math::
        \ell(z, y) = t\, \mathrm{CE}\Big(\frac{z - u\, e_y}{t}, y\Big)
        = t \log\Big(1 + \sum_{j \ne y} e^{(u - z_y + z_j) / t}\Big)

    A soft hinge: it tends to :math:`\max(0, \max_{j\ne y} u - z_y + z_j)` as :math:`t \to 0`, and
    exceeds it by at most :math:`t \log C`. Its gradient is that of a cross-entropy, of norm at most
    :math:`\sqrt2` whatever the temperature. ``offset=0`` is the tempered cross-entropy
    (:math:`t = 1/\tau` for those that multiply logits by :math:`\tau`).

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) int64.
    offset : float
        :math:`u`, a margin worth having, not negative.
    temperature : float
        :math:`t`, positive.

    Returns
    -------
    torch.Tensor
        The mean over the batch, a scalar.

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
    _check(logits, labels)
    _check_positive("temperature", temperature)
    _check_not_negative("offset", offset)
    own = functional.one_hot(labels, logits.shape[1]).to(logits)
    return temperature * functional.cross_entropy((logits - offset * own) / temperature, labels)


def certificate_loss(
    logits: Tensor,
    labels: Tensor,
    weight: float = 0.5,
    lipschitz: float = 1.0,
    p: float = 2,
) -> Tensor:
    r"""Cross-entropy minus the certified radius (certificate regularisation).

    .. math::
        \ell(z, y) = \mathrm{CE}(z, y)
        - \lambda \max\Big(0,\; \frac{z_y - \max_{j\ne y} z_j}{2^{1 - 1/p} L}\Big)

    Rewards radius where the prediction is right, without end, and leaves wrong predictions to the
    cross-entropy. It is not bounded from below, other than by what a Lipschitz network can reach.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) int64.
    weight : float
        :math:`\lambda`, not negative.
    lipschitz, p
        As in :func:`margin_for_radius`.

    Returns
    -------
    torch.Tensor
        The mean over the batch, a scalar.

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
    _check(logits, labels)
    _check_not_negative("weight", weight)
    slope = margin_for_radius(1.0, lipschitz, p)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    radius = (own[:, 0] - others).clamp(min=0) / slope
    return functional.cross_entropy(logits, labels) - weight * radius.mean()


def hinge_kr(outputs: Tensor, labels: Tensor, alpha: float = 10.0, margin: float = 1.0) -> Tensor:
    r"""Hinge-regularised Kantorovich–Rubinstein loss, binary or one against the others.

    .. math::
        \ell = -\Big(\operatorname*{mean}_{y_i = 1} f(x_i) - \operatorname*{mean}_{y_i = -1} f(x_i)
        \Big) + \alpha \operatorname{mean}_i \max(0,\; m - y_i f(x_i))

    The first term separates the classes as far as a 1-Lipschitz function can, the second keeps the
    border between them. With several classes, output :math:`c` has the labels 1 for class c and -1
    for the others, and the loss is the mean over the outputs. An output whose class is missing from
    the batch, or is all of it, has no first term.

    Parameters
    ----------
    outputs : torch.Tensor
        (batch,) or (batch, 1) for two classes, (batch, classes) for several.
    labels : torch.Tensor
        (batch,): -1 or 1 for (batch,) outputs; int64 classes for (batch, classes); either 0 and 1
        or -1 and 1 for (batch, 1).
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        :math:`m`, positive.

    Returns
    -------
    torch.Tensor
        A scalar.

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
    if outputs.dim() == 2 and outputs.shape[1] > 1:
        _check(outputs, labels)
        signs = functional.one_hot(labels, outputs.shape[1]) * 2 - 1
    else:
        if outputs.dim() == 2:
            outputs = outputs[:, 0]
            labels = torch.where(labels == 0, -1, labels)
        _check_binary(outputs, labels)
        outputs, signs = outputs[:, None], labels[:, None]
    positive = (signs > 0).to(outputs)
    count = positive.sum(0)
    others = len(outputs) - count
    means = (outputs * positive).sum(0) / count.clamp(min=1)
    gaps = means - (outputs * (1 - positive)).sum(0) / others.clamp(min=1)
    both = (count > 0) & (others > 0)
    hinge = (margin - signs * outputs).clamp(min=0).mean(0)
    return (alpha * hinge - gaps * both).mean()


# ----------------------------------------------------------------------------------- modules


class MultiMarginLoss(nn.Module):
    r"""Multi-class hinge loss of order 1: see :func:`multi_margin`.

    Parameters
    ----------
    margin, divide_by_classes
        As there.

    Examples
    --------
    >>> MultiMarginLoss(2.0)(torch.tensor([[3.0, 1.5]]), torch.tensor([0])).item()
    0.25
    """

    def __init__(self, margin: float = 1.0, divide_by_classes: bool = True) -> None:
        super().__init__()
        _check_positive("margin", margin)
        self.margin, self.divide_by_classes = margin, divide_by_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return multi_margin(logits, labels, self.margin, self.divide_by_classes)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"margin={self.margin:g}, divide_by_classes={self.divide_by_classes}"


class OffsetCrossEntropyLoss(nn.Module):
    r"""Cross-entropy with an offset and a temperature: see :func:`offset_cross_entropy`.

    Parameters
    ----------
    offset, temperature
        As there.

    Examples
    --------
    >>> loss = OffsetCrossEntropyLoss(offset=2.0, temperature=0.001)
    >>> f"{loss(torch.tensor([[3.0, 1.5]]), torch.tensor([0])).item():.4f}"
    '0.5000'
    """

    def __init__(self, offset: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        _check_not_negative("offset", offset)
        _check_positive("temperature", temperature)
        self.offset, self.temperature = offset, temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return offset_cross_entropy(logits, labels, self.offset, self.temperature)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"offset={self.offset:g}, temperature={self.temperature:g}"


class CertificateLoss(nn.Module):
    r"""Cross-entropy minus the certified radius: see :func:`certificate_loss`.

    Parameters
    ----------
    weight, lipschitz, p
        As there.

    Examples
    --------
    >>> logits, labels = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    >>> bool(CertificateLoss(1.0)(logits, labels) < CertificateLoss(0.0)(logits, labels))
    True
    """

    def __init__(self, weight: float = 0.5, lipschitz: float = 1.0, p: float = 2) -> None:
        super().__init__()
        _check_not_negative("weight", weight)
        margin_for_radius(1.0, lipschitz, p)
        self.weight, self.lipschitz, self.p = weight, lipschitz, p

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return certificate_loss(logits, labels, self.weight, self.lipschitz, self.p)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"weight={self.weight:g}, lipschitz={self.lipschitz:g}, p={self.p:g}"


class HingeKRLoss(nn.Module):
    r"""Hinge-regularised Kantorovich–Rubinstein loss: see :func:`hinge_kr`.

    Parameters
    ----------
    alpha, margin
        As there.

    Examples
    --------
    >>> HingeKRLoss()(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])).item()
    -2.0
    """

    def __init__(self, alpha: float = 10.0, margin: float = 1.0) -> None:
        super().__init__()
        _check_not_negative("alpha", alpha)
        _check_positive("margin", margin)
        self.alpha, self.margin = alpha, margin

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return hinge_kr(outputs, labels, self.alpha, self.margin)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"alpha={self.alpha:g}, margin={self.margin:g}"


# --------------------------------------------------------------------------------- arguments


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def _check(logits: Tensor, labels: Tensor) -> None:
    """Refuse what is no batch of logits with a class for each."""
    _check_tensors(logits, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must have dtype int64, got {labels.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits and labels must have shapes (batch, classes) and (batch,), with two classes or "
            f"more, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )


def _check_binary(outputs: Tensor, labels: Tensor) -> None:
    """Refuse what is no batch of numbers with a sign for each."""
    _check_tensors(outputs, labels)
    if outputs.dim() != 1 or labels.shape != outputs.shape:
        raise ValueError(
            "outputs and labels must have one shape (batch,), "
            f"got {tuple(outputs.shape)} and {tuple(labels.shape)}"
        )
    if not (labels.abs() == 1).all():
        raise ValueError(f"labels must be -1 or 1, got {labels.unique().tolist()}")


def _check_tensors(outputs: Tensor, labels: Tensor) -> None:
    for name, tensor in (("logits", outputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not outputs.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {outputs.dtype}")
    if outputs.numel() == 0:
        raise ValueError(f"logits must not be empty, got shape {tuple(outputs.shape)}")
