"""Hinges on margins, and the certified radius as a reward."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipbook.losses.arguments import (
    Reduction,
    _check,
    _check_not_negative,
    _check_positive,
    _Loss,
    _reduced,
)
from lipbook.norms import dual_exponent

__all__ = [
    "CertificateLoss",
    "MultiMarginLoss",
    "certificate_loss",
    "margin_for_radius",
    "multi_margin",
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


def _pair_norms(head: Tensor, p: float) -> Tensor:
    """‖w_i - w_j‖ in the dual norm, (classes, classes)."""
    dual = dual_exponent(p)
    return torch.stack([torch.linalg.vector_norm(row - head, dual, dim=1) for row in head])


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
    for the second class :math:`j` where the prediction is right: no margin is ever enough. Since a
    cross-entropy is not negative, a sample whose loss is :math:`\ell < 0` has a radius of at least
    :math:`-\ell / \lambda`.

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


# ----------------------------------------------------------------------------------- modules


class MultiMarginLoss(_Loss):
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

    _shown = ("margin", "divide_by_classes")

    def __init__(
        self,
        margin: float = 1.0,
        divide_by_classes: bool = True,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_positive("margin", margin)
        self.margin, self.divide_by_classes = margin, divide_by_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return multi_margin(
            logits,
            labels,
            self.margin,
            self.divide_by_classes,
            **self._options(),
        )


class CertificateLoss(_Loss):
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

    _shown = ("weight", "lipschitz", "p")

    def __init__(
        self,
        weight: float = 0.5,
        lipschitz: float = 1.0,
        p: float = 2,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_not_negative("weight", weight)
        margin_for_radius(1.0, lipschitz, p)
        self.weight, self.lipschitz, self.p = weight, lipschitz, p

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return certificate_loss(
            logits,
            labels,
            self.weight,
            self.lipschitz,
            self.p,
            **self._options(),
        )
