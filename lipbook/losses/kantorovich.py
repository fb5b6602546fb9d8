"""Hinge-regularised Kantorovich-Rubinstein losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipbook.losses.arguments import (
    Reduction,
    _check,
    _check_binary,
    _check_class_weight,
    _check_not_negative,
    _check_positive,
    _check_reduction,
    _check_tensors,
    _Loss,
    _reduced,
)

__all__ = [
    "HingeKRLoss",
    "LogSumExpHingeKRLoss",
    "SoftHingeKRLoss",
    "hinge_kr",
    "log_sum_exp_hinge_kr",
    "soft_hinge_kr",
]


def hinge_kr(
    outputs: Tensor,
    labels: Tensor,
    alpha: float = 10.0,
    margin: float = 1.0,
    *,
    class_weight: Tensor | None = None,
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

    The loss of a batch may be below 0, and says nothing of a single sample. Its hinge does: where
    that is 0, each output is at least :math:`m` on its side of 0, which certifies
    :math:`\sqrt2\, m / L` for :math:`L`-Lipschitz logits and :math:`m / L` for one output.
    :func:`soft_hinge_kr` and :func:`log_sum_exp_hinge_kr` have a value for each sample.

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
    class_weight : torch.Tensor, optional
        Positive weights. For one output (2,), of the classes -1 and 1: the mean of the hinges is
        weighted by them, and the first term weighs both classes alike in any case. For several
        (classes,): the mean over the outputs is weighted by them.
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
    _check_numbers(alpha, margin)
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
    weight = _check_class_weight(class_weight, outputs, max(outputs.shape[1], 2))
    samples = columns = None
    if weight is not None and outputs.shape[1] > 1:
        columns = weight / weight.mean()
    elif weight is not None:
        samples = torch.where(signs > 0, weight[1], weight[0])
        samples = samples / samples.mean()
    positive = (signs > 0).to(outputs)
    count = positive.sum(0)
    others = len(outputs) - count
    means = (outputs * positive).sum(0) / count.clamp(min=1)
    gaps = means - (outputs * (1 - positive)).sum(0) / others.clamp(min=1)
    both = (count > 0) & (others > 0)
    hinge = (margin - signs * outputs).clamp(min=0)
    hinge = hinge if samples is None else samples * hinge
    if reduction == "none":
        shares = positive / count.clamp(min=1) - (1 - positive) / others.clamp(min=1)
        parts = alpha * hinge - len(outputs) * shares * outputs * both
        return (parts if columns is None else columns * parts).mean(1)
    parts = alpha * hinge.mean(0) - gaps * both
    loss = (parts if columns is None else columns * parts).mean()
    return loss * len(outputs) if reduction == "sum" else loss


def soft_hinge_kr(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 10.0,
    margin: float = 1.0,
    temperature: float = 1.0,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Hinge-KR of the true class and a softmax over the others.

    .. math::
        \ell(z, y) = -\Big(z_y - \sum_{j \ne y} w_j z_j\Big)
        + \alpha \Big(\max(0,\; m - z_y) + \sum_{j \ne y} w_j \max(0,\; m + z_j)\Big), \qquad
        w_j = \frac{e^{z_j / t}}{\sum_{k \ne y} e^{z_k / t}}

    One against the others (:func:`hinge_kr`) gives :math:`C - 1` of :math:`C` terms of a sample to
    classes that it is not, most of them far. Here they share one. As :math:`t \to 0` the nearest
    class has it,

    .. math:: -\big(z_y - \max_{j \ne y} z_j\big) + \alpha \big(\max(0,\; m - z_y)
        + \max(0,\; m + \max_{j \ne y} z_j)\big)

    and as :math:`t \to \infty` each has :math:`1 / (C - 1)`. The gradient in :math:`z_y` is
    :math:`-1`, and :math:`-\alpha` more within the margin. In :math:`z_j` it is
    :math:`w_j (h'_j + (h_j - \bar h) / t)` with :math:`h_j = z_j + \alpha \max(0, m + z_j)`,
    :math:`h'_j` its slope and :math:`\bar h` the mean: weights shift, too, and for a class far
    behind it is negative. :func:`log_sum_exp_hinge_kr` has no such part.

    The loss goes below 0, without end other than what a Lipschitz network can reach. On a sample it
    bounds the margin, :math:`z_y - \max_{j \ne y} z_j \ge -\ell - t \log(C - 1)`, since a softmax
    mean is within :math:`t \log(C - 1)` of the maximum: a loss of at most
    :math:`-\sqrt2 L r - t \log(C - 1)` certifies the radius :math:`r`. Where the hinge part is 0,
    :math:`z_y \ge m` and every :math:`z_j \le -m`, so that :math:`\sqrt2\, m / L` is certified.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        :math:`m`, positive: a distance to the border, half of a margin of two logits.
    temperature : float
        :math:`t`, positive, in units of the logits.
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
    On the right sides of the margin, and with the border half a unit too near:

    >>> logits, labels = torch.tensor([[1.0, -1.0, -3.0], [0.5, -1.0, -3.0]]), torch.tensor([0, 0])
    >>> soft_hinge_kr(logits, labels, temperature=0.01, reduction="none").tolist()
    [-2.0, 3.5]

    References
    ----------
    :cite:t:`serrurier2021` for the hinge-KR; :cite:t:`serrurier2023` weigh the other classes by a
    softmax. This form is ours: their library, deel-torchlip, multiplies logits by a temperature
    that follows the mean of their moduli; here :math:`t` divides them and stays. Its weight
    :math:`\alpha' < 1` and margin :math:`m'` are :math:`\alpha = \alpha' / (1 - \alpha')` and
    :math:`m = m' / 2` here, up to the factor :math:`1 - \alpha'` of the loss.
    """
    labels = _check(logits, labels)
    _check_numbers(alpha, margin, temperature)

    def loss(classes: Tensor) -> Tensor:
        own = logits.gather(1, classes[:, None])[:, 0]
        weights = (_others(logits, classes) / temperature).softmax(1)
        parts = logits + alpha * (margin + logits).clamp(min=0)
        return alpha * (margin - own).clamp(min=0) - own + (weights * parts).sum(1)

    return _reduced(loss, labels, logits, class_weight, reduction)


def log_sum_exp_hinge_kr(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 10.0,
    margin: float = 1.0,
    temperature: float = 1.0,
    *,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Hinge-KR of the true class and the log-sum-exp of the others.

    .. math::
        \ell(z, y) = -(z_y - a) + \alpha \big(\max(0,\; m - z_y) + \max(0,\; m + a)\big), \qquad
        a = t \log \sum_{j \ne y} e^{z_j / t}

    The limit as :math:`t \to 0` is that of :func:`soft_hinge_kr`. Since
    :math:`\max_{j \ne y} z_j \le a \le \max_{j \ne y} z_j + t \log(C - 1)`, the loss is never below
    its limit. It is convex. The gradient is :math:`-1` in :math:`z_y`, :math:`-\alpha` more where
    :math:`z_y < m`; and :math:`w_j`, the softmax of the others, in :math:`z_j`, :math:`\alpha w_j`
    more where :math:`a > -m`.

    The loss goes below 0, without end other than what a Lipschitz network can reach. On a sample it
    bounds the margin, :math:`z_y - \max_{j \ne y} z_j \ge -\ell`: a loss of at most
    :math:`-\sqrt2 L r` certifies the radius :math:`r`, one of at most :math:`-2m` the radius
    :math:`\sqrt2\, m / L`.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes).
    labels : torch.Tensor
        (batch,) integers, or (batch, classes) probabilities.
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        :math:`m`, positive: a distance to the border, half of a margin of two logits.
    temperature : float
        :math:`t`, positive, in units of the logits. Where :math:`t \log(C - 1)` is large beside
        :math:`m`, the other logits must be far below :math:`-m` for the hinge to end.
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
    Two classes at -1 and t = 1 count as one at log 2 - 1:

    >>> logits, labels = torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([0])
    >>> f"{log_sum_exp_hinge_kr(logits, labels, alpha=0.0).item() + 3:.4f}"
    '0.6931'

    References
    ----------
    :cite:t:`serrurier2021` for the hinge-KR; the log-sum-exp of the others is an option of their
    library, and this form of it ours.
    """
    labels = _check(logits, labels)
    _check_numbers(alpha, margin, temperature)

    def loss(classes: Tensor) -> Tensor:
        own = logits.gather(1, classes[:, None])[:, 0]
        others = temperature * (_others(logits, classes) / temperature).logsumexp(1)
        hinges = (margin - own).clamp(min=0) + (margin + others).clamp(min=0)
        return alpha * hinges - own + others

    return _reduced(loss, labels, logits, class_weight, reduction)


def _others(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits with -infinity in the place of the class."""
    return logits.scatter(1, classes[:, None], -math.inf)


def _check_numbers(alpha: float, margin: float, temperature: float = 1.0) -> None:
    _check_not_negative("alpha", alpha)
    _check_positive("margin", margin)
    _check_positive("temperature", temperature)


# ----------------------------------------------------------------------------------- modules


class HingeKRLoss(_Loss):
    r"""Hinge-regularised Kantorovich–Rubinstein loss, binary or one class against the others.

    Minus the difference of the means of both classes, plus α · mean max(0, m - y f(x)). The
    function is :func:`hinge_kr`.

    Parameters
    ----------
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        m, positive: a distance to the border, half of a margin of two logits.
    class_weight : torch.Tensor, optional
        Positive weights: (2,) for one output, (classes,) for several.
    reduction : {"mean", "sum", "none"}
        The loss, its multiple by the batch size, or what each sample adds.

    Examples
    --------
    >>> HingeKRLoss()(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])).item()
    -2.0
    """

    _shown = ("alpha", "margin")

    def __init__(
        self,
        alpha: float = 10.0,
        margin: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_numbers(alpha, margin)
        self.alpha, self.margin = alpha, margin

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return hinge_kr(outputs, labels, self.alpha, self.margin, **self._options())


class SoftHingeKRLoss(_Loss):
    r"""Hinge-KR of the true class and a softmax over the others.

    -(z_y - Σ w_j z_j) + α (max(0, m - z_y) + Σ w_j max(0, m + z_j)), w = softmax(z_j / t). The
    function is :func:`soft_hinge_kr`.

    Parameters
    ----------
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        m, positive: a distance to the border, half of a margin of two logits.
    temperature : float
        t, positive, in units of the logits.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> SoftHingeKRLoss()(torch.tensor([[1.0, -1.0]]), torch.tensor([0])).item()
    -2.0
    """

    _shown = ("alpha", "margin", "temperature")

    def __init__(
        self,
        alpha: float = 10.0,
        margin: float = 1.0,
        temperature: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_numbers(alpha, margin, temperature)
        self.alpha, self.margin, self.temperature = alpha, margin, temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return soft_hinge_kr(
            logits, labels, self.alpha, self.margin, self.temperature, **self._options()
        )


class LogSumExpHingeKRLoss(_Loss):
    r"""Hinge-KR of the true class and a = t log Σ exp(z_j / t) of the others.

    -(z_y - a) + α (max(0, m - z_y) + max(0, m + a)). The function is :func:`log_sum_exp_hinge_kr`.

    Parameters
    ----------
    alpha : float
        Weight of the hinge, not negative.
    margin : float
        m, positive: a distance to the border, half of a margin of two logits.
    temperature : float
        t, positive, in units of the logits.
    class_weight : torch.Tensor, optional
        (classes,) positive weights.
    reduction : {"mean", "sum", "none"}
        The mean over the batch, the sum, or each sample's loss.

    Examples
    --------
    >>> LogSumExpHingeKRLoss()(torch.tensor([[1.0, -1.0]]), torch.tensor([0])).item()
    -2.0
    """

    _shown = ("alpha", "margin", "temperature")

    def __init__(
        self,
        alpha: float = 10.0,
        margin: float = 1.0,
        temperature: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, reduction)
        _check_numbers(alpha, margin, temperature)
        self.alpha, self.margin, self.temperature = alpha, margin, temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch."""
        return log_sum_exp_hinge_kr(
            logits, labels, self.alpha, self.margin, self.temperature, **self._options()
        )
