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
:math:`t = 1/4` for colour images); ``LogitAnnealingLoss`` is the same, and lets go of samples that
have their margin. ``EMMALoss(r)`` takes the radius itself, and the slope of each pair of classes
where the last layer has unit rows. ``OffsetBinaryCrossEntropyLoss`` is for one output, and for
several labels that may apply together. ``HingeKRLoss`` is for the same, and separates batches;
``SoftHingeKRLoss`` and ``LogSumExpHingeKRLoss`` are its forms for many classes, sample by sample.
``CertificateLoss`` rewards radius without naming one.

What a value of each proves of a sample is said in its docstring, and side by side in the table of
:ref:`api-losses`.

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

from lipbook.losses.entropies import (
    EMMALoss,
    LogitAnnealingLoss,
    OffsetBinaryCrossEntropyLoss,
    OffsetCrossEntropyLoss,
    emma_loss,
    logit_annealing_loss,
    offset_binary_cross_entropy,
    offset_cross_entropy,
)
from lipbook.losses.kantorovich import (
    HingeKRLoss,
    LogSumExpHingeKRLoss,
    SoftHingeKRLoss,
    hinge_kr,
    log_sum_exp_hinge_kr,
    soft_hinge_kr,
)
from lipbook.losses.margins import (
    CertificateLoss,
    MultiMarginLoss,
    certificate_loss,
    margin_for_radius,
    multi_margin,
)

__all__ = [
    "CertificateLoss",
    "EMMALoss",
    "HingeKRLoss",
    "LogSumExpHingeKRLoss",
    "LogitAnnealingLoss",
    "MultiMarginLoss",
    "OffsetBinaryCrossEntropyLoss",
    "OffsetCrossEntropyLoss",
    "SoftHingeKRLoss",
    "certificate_loss",
    "emma_loss",
    "hinge_kr",
    "log_sum_exp_hinge_kr",
    "logit_annealing_loss",
    "margin_for_radius",
    "multi_margin",
    "offset_binary_cross_entropy",
    "offset_cross_entropy",
    "soft_hinge_kr",
]
