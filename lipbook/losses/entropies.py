"""Cross-entropies that ask for a margin: by an offset, a radius or an annealed weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lipbook.losses.arguments import (
    Reduction,
    _check,
    _check_class_weight,
    _check_head,
    _check_not_negative,
    _check_positive,
    _check_reduction,
    _check_targets,
    _Loss,
    _reduced,
)
from lipbook.losses.margins import _pair_norms, margin_for_radius

__all__ = [
    "EMMALoss",
    "LogitAnnealingLoss",
    "OffsetBinaryCrossEntropyLoss",
    "OffsetCrossEntropyLoss",
    "emma_loss",
    "logit_annealing_loss",
    "offset_binary_cross_entropy",
    "offset_cross_entropy",
]


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
    the temperature, and of norm at least :math:`\tfrac12` until the margin is :math:`u`. No loss is
    0; a sample whose loss is less than :math:`t \log 2` has every margin above :math:`u`, since
    another would add a term of at least 1, and so the radius of :math:`u`.
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


def offset_binary_cross_entropy(
    outputs: Tensor,
    labels: Tensor,
    offset: float = 0.0,
    temperature: float = 1.0,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Binary cross-entropy with an offset and a temperature, for one output or several labels.

    .. math:: \ell(f, s) = t \log\big(1 + e^{(u - s f) / t}\big), \qquad s = \pm 1

    A soft hinge: it tends to :math:`\max(0, u - s f)` as :math:`t \to 0`, and exceeds it by at most
    :math:`t \log 2`. Its gradient is :math:`-s\, \sigma((u - s f) / t)`, of modulus at least
    :math:`\tfrac12` until :math:`s f` is :math:`u`, and less than 1 everywhere. It is
    :func:`offset_cross_entropy` of the logits 0 and :math:`f`.

    A classifier that decides by the sign of an :math:`L`-Lipschitz output has the radius
    :math:`|f| / L`: to train for the radius :math:`r` take :math:`u = L r`. A sample whose loss is
    less than :math:`t \log 2` has :math:`s f > u`, and that radius. No loss is 0.

    With several outputs every one is a binary problem of its own, and the loss of a sample the mean
    of theirs. One below :math:`t \log(2) / C` gives all :math:`C` answers the radius
    :math:`u / L`, with :math:`L` the constant of each output.

    Parameters
    ----------
    outputs : torch.Tensor
        (batch,) or (batch, 1) for two classes, (batch, classes) for several, of which any number
        may apply.
    labels : torch.Tensor
        For one output (batch,), or of the shape of the outputs: either 0 and 1 or -1 and 1, or
        probabilities :math:`q` of class 1, whose loss is :math:`q\, \ell(f, 1) + (1 - q)\,
        \ell(f, -1)`. For several (batch, classes), from 0 to 1, or integer classes (batch,), one
        against the others.
    offset : float
        :math:`u`, a distance to the border worth having, not negative.
    temperature : float
        :math:`t`, positive.
    class_weight : torch.Tensor, optional
        Positive weights: (2,), of the classes -1 and 1, for one output; (classes,), of the binary
        problems, for several.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

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
    The first output is beyond the offset, the second half of the way:

    >>> outputs, labels = torch.tensor([2.0, 0.5]), torch.tensor([1, 1])
    >>> loss = offset_binary_cross_entropy(outputs, labels, 1.0, 0.01, reduction="none")
    >>> [f"{value:.4f}" for value in loss.tolist()]
    ['0.0000', '0.5000']

    References
    ----------
    The two-class form of :cite:t:`prach2022aol`; :cite:t:`bethune2022` for the temperature.
    """
    _check_positive("temperature", temperature)
    _check_not_negative("offset", offset)
    _check_reduction(reduction)
    outputs, share = _check_targets(outputs, labels)
    columns = outputs.shape[1]
    weight = _check_class_weight(class_weight, outputs, max(columns, 2))
    high = -temperature * functional.logsigmoid((outputs - offset) / temperature)
    low = -temperature * functional.logsigmoid((-outputs - offset) / temperature)
    if weight is None:
        values = (share * high + (1 - share) * low).mean(1)
    elif columns == 1:
        values = (share * weight[1] * high + (1 - share) * weight[0] * low)[:, 0]
    else:
        values = ((share * high + (1 - share) * low) * weight).sum(1) / weight.sum()
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if weight is None or columns > 1:
        return values.mean()
    return values.sum() / (share * weight[1] + (1 - share) * weight[0]).sum()


def emma_loss(
    logits: Tensor,
    labels: Tensor,
    radius: float,
    temperature: float = 1.0,
    lipschitz: float = 1.0,
    p: float = 2,
    *,
    head: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Efficient margin maximisation: cross-entropy of the logits that an attack could reach.

    .. math::
        \ell(z, y) = t \log\Big(1 + \sum_{j \ne y} e^{(z_j + r_j K_{yj} - z_y) / t}\Big), \qquad
        r_j = \min\Big(r,\; \max\Big(0, \frac{z_y - z_j}{K_{yj}}\Big)\Big)

    :math:`K_{yj}` bounds the slope of :math:`z_y - z_j`: :math:`2^{1 - 1/p} L`, or with a ``head``
    :math:`\lVert w_y - w_j\rVert_{p^*} L`. Each wrong logit is raised by what an attack of size
    :math:`r` may gain on the true one, up to a tie.

    The :math:`r_j` are held constant in the gradient, which is
    :math:`\operatorname{softmax}(\tilde z / t) - e_y` for the raised logits :math:`\tilde z`: all
    classes that are right but not certified push with one force. So it is **not the gradient of the
    value**, which is constant in :math:`z_j` there. An optimiser that compares values, a line
    search, is not for this loss.

    A sample whose loss is less than :math:`t \log 2` is certified at :math:`r`: a class with
    :math:`z_y - z_j \le r K_{yj}` adds a term of at least 1. No loss is 0. As :math:`t \to 0` the
    value tends to :math:`\max(0, \max_{j \ne y} z_j - z_y)`, and forgets :math:`r`.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    radius : float
        :math:`r`, positive, in units of the input.
    temperature : float
        :math:`t`, positive. At 1, the value of the paper, whose Lipschitz constants are learnt, the
        small logits of a 1-Lipschitz network count nearly alike.
    lipschitz : float
        :math:`L`, of the logits, or of what comes before the head.
    p : float
        Exponent of the norm of perturbations, in :math:`[1, \infty]`.
    head : torch.Tensor, optional
        (classes, features), the weight of the last layer. It gets a gradient by
        :math:`K_{yj}`, too.
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
        If logits, labels and head do not fit, or a number is out of range.

    Examples
    --------
    The margins 1.5 and 3 are certified at the radius 1, which costs √2, and not at 2:

    >>> logits, labels = torch.tensor([[3.0, 1.5, 0.0]]), torch.tensor([0])
    >>> [f"{emma_loss(logits, labels, r, 0.01).item() / 0.01:.4f}" for r in (1.0, 1.5, 3.0)]
    ['0.0002', '0.6931', '1.0986']

    Less than log 2, log 2 and log 3: no class, one and two are within reach.

    References
    ----------
    :cite:t:`hu2023liresnet`, with the temperature 1; the temperature is ours.
    :cite:t:`singla2022improved` for the rows of a head.
    """
    labels = _check(logits, labels)
    _check_positive("radius", radius)
    _check_positive("temperature", temperature)
    slope = margin_for_radius(1.0, lipschitz, p)
    slopes = None if head is None else lipschitz * _pair_norms(_check_head(head, logits), p)

    def loss(classes: Tensor) -> Tensor:
        margins = logits.gather(1, classes[:, None]) - logits
        reach = torch.full_like(margins, slope) if slopes is None else slopes[classes]
        gained = margins.detach().clamp(min=0).minimum(radius * reach.detach())
        if slopes is not None:  # the value as it is, with the gradient of r_j times the slope
            radii = torch.where(reach > 0, gained / reach, radius).detach()
            gained = gained + radii * (reach - reach.detach())
        raised = (gained - margins) / temperature  # a tie is 0, and so is the class itself
        return functional.cross_entropy(raised, classes, reduction="none")

    return temperature * _reduced(loss, labels, logits, class_weight, reduction)


def logit_annealing_loss(
    logits: Tensor,
    labels: Tensor,
    offset: float = 2.0,
    temperature: float = 0.75,
    beta: float = 5.0,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Logit annealing: an offset cross-entropy that lets go of samples with a margin.

    .. math::
        \ell(z, y) = -t\, (1 - q)^\beta \log q, \qquad
        q = \operatorname{softmax}\Big(\frac{z - u\, e_y}{t}\Big)_y

    The factor takes the weight of a sample away as its margin passes :math:`u`, so that what a
    Lipschitz network can give goes to the others. ``beta=0`` is :func:`offset_cross_entropy`. The
    gradient is that of the cross-entropy, :math:`\operatorname{softmax}((z - u e_y)/t) - e_y`,
    times :math:`(1 - q)^\beta - \beta\, q\, (1 - q)^{\beta - 1} \log q`, which goes to 1 for a lost
    sample and falls like :math:`(1 + \beta)(1 - q)^\beta` for a good one.

    The loss falls as :math:`q` grows, and :math:`q \le \tfrac12` as long as one margin is at most
    :math:`u`: a sample whose loss is less than :math:`2^{-\beta}\, t \log 2` has every margin above
    :math:`u`, and the radius of :math:`u`. No loss is 0.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities, whose loss is the expected one.
    offset : float
        :math:`u`, a margin worth having, not negative; see :func:`margin_for_radius`. The defaults
        are those of the paper for colour images.
    temperature : float
        :math:`t`, positive.
    beta : float
        :math:`\beta`, not negative: how soon a sample is let go.
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
    At the margin :math:`u` of two classes :math:`q` is one half:

    >>> import math
    >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> values = [logit_annealing_loss(logits, labels, beta=b).item() for b in (0, 1, 5)]
    >>> [f"{value / (0.75 * math.log(2)):.5f}" for value in values]
    ['1.00000', '0.50000', '0.03125']

    References
    ----------
    :cite:t:`lai2025bro`.
    """
    labels = _check(logits, labels)
    _check_not_negative("offset", offset)
    _check_positive("temperature", temperature)
    _check_not_negative("beta", beta)

    def loss(classes: Tensor) -> Tensor:
        own = functional.one_hot(classes, logits.shape[1]).to(logits)
        scaled = (logits - offset * own) / temperature
        entropy = functional.cross_entropy(scaled, classes, reduction="none")
        some = entropy > 0  # a power has no slope at 0, where the loss has slope 0
        safe = torch.where(some, entropy, 1.0)
        return torch.where(some, (-torch.expm1(-safe)) ** beta * safe, 0.0)

    return temperature * _reduced(loss, labels, logits, class_weight, reduction)


# ----------------------------------------------------------------------------------- modules


class OffsetCrossEntropyLoss(_Loss):
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

    _shown = ("offset", "temperature")

    def __init__(
        self,
        offset: float,
        temperature: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_not_negative("offset", offset)
        _check_positive("temperature", temperature)
        self.offset, self.temperature = offset, temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return offset_cross_entropy(
            logits,
            labels,
            self.offset,
            self.temperature,
            **self._options(),
        )


class OffsetBinaryCrossEntropyLoss(_Loss):
    r"""Binary cross-entropy that asks for a distance u: t · log(1 + exp((u - s f) / t)), s = ±1.

    The function is :func:`offset_binary_cross_entropy`.

    Parameters
    ----------
    offset : float
        u. It must be given: 0 asks for no distance; L r is that of a radius r.
    temperature : float
        t, positive. The smaller, the closer to a hinge.
    class_weight : torch.Tensor, optional
        Positive weights: (2,) for one output, (classes,) for several.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> loss = OffsetBinaryCrossEntropyLoss(offset=1.0, temperature=0.001)
    >>> f"{loss(torch.tensor([[0.5]]), torch.tensor([1])).item():.4f}"
    '0.5000'
    """

    _shown = ("offset", "temperature")

    def __init__(
        self,
        offset: float,
        temperature: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_not_negative("offset", offset)
        _check_positive("temperature", temperature)
        self.offset, self.temperature = offset, temperature

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return offset_binary_cross_entropy(
            outputs, labels, self.offset, self.temperature, **self._options()
        )


class EMMALoss(_Loss):
    r"""Cross-entropy of logits raised by what an attack may gain, t · CE((z + r_j K_yj) / t, y).

    The function is :func:`emma_loss`, which says what the radii r_j are.

    Parameters
    ----------
    radius : float
        r, positive, in units of the input.
    temperature : float
        t, positive.
    lipschitz : float
        Lipschitz constant of the logits, or of what comes before the head.
    p : float
        Exponent of the norm of perturbations.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> import math
    >>> logits, labels = torch.tensor([[3.0, 1.5]]), torch.tensor([0])
    >>> [bool(EMMALoss(r, 0.1)(logits, labels) < 0.1 * math.log(2)) for r in (1.0, 2.0)]
    [True, False]

    For a network whose last layer has unit rows, the weight is the third argument:

    >>> from lipbook.orthogonal import UnitNormLinear
    >>> head, loss = UnitNormLinear(4, 3), EMMALoss(0.5, 0.1)
    >>> bool(loss(head(torch.ones(2, 4)), torch.tensor([0, 1]), head.weight) > 0)
    True
    """

    _shown = ("radius", "temperature", "lipschitz", "p")

    def __init__(
        self,
        radius: float,
        temperature: float = 1.0,
        lipschitz: float = 1.0,
        p: float = 2,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_positive("radius", radius)
        _check_positive("temperature", temperature)
        margin_for_radius(1.0, lipschitz, p)
        self.radius, self.temperature = radius, temperature
        self.lipschitz, self.p = lipschitz, p

    def forward(self, logits: Tensor, labels: Tensor, head: Tensor | None = None) -> Tensor:
        """Loss of a batch, with the weight of the last layer if its rows shall give the slopes."""
        return emma_loss(
            logits,
            labels,
            self.radius,
            self.temperature,
            self.lipschitz,
            self.p,
            head=head,
            **self._options(),
        )


class LogitAnnealingLoss(_Loss):
    r"""Offset cross-entropy that lets go of samples with a margin, -t (1 - q)^β log q.

    The function is :func:`logit_annealing_loss`.

    Parameters
    ----------
    offset : float
        u, the margin worth having, not negative.
    temperature : float
        t, positive.
    beta : float
        β, not negative: how soon a sample is let go.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> import math
    >>> loss = LogitAnnealingLoss(offset=2.0, temperature=1.0, beta=1.0)
    >>> f"{loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item() / math.log(2):.4f}"
    '0.5000'
    """

    _shown = ("offset", "temperature", "beta")

    def __init__(
        self,
        offset: float = 2.0,
        temperature: float = 0.75,
        beta: float = 5.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_not_negative("offset", offset)
        _check_positive("temperature", temperature)
        _check_not_negative("beta", beta)
        self.offset, self.temperature, self.beta = offset, temperature, beta

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return logit_annealing_loss(
            logits, labels, self.offset, self.temperature, self.beta, **self._options()
        )
