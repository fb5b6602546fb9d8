r"""Certified robustness, of the program that runs and not only of the function.

A classifier whose logits are :math:`L`-Lipschitz cannot change its mind within a distance that its
margin gives: :func:`certified_radius`. That is a theorem about real numbers. What runs is a program
in floating point, and programs have been made to contradict such theorems (:cite:t:`zombori2021`,
:cite:t:`jia2021`, :cite:t:`jin2022`, :cite:t:`murray2026`). :func:`certify` therefore takes the
operator norms and the error of the program from :mod:`lipbook.rounding`, and the error at both ends
off the margin. :func:`certify_by_smoothing` is a certificate of another kind. From the other side,
:mod:`lipbook.attacks` looks for what a certificate excludes.
"""

from lipbook.robustness.arguments import Batches
from lipbook.robustness.certificate import (
    Accuracy,
    Certificate,
    certified_radius,
    wilson_interval,
)
from lipbook.robustness.lipschitz import Certifier, certify
from lipbook.robustness.smoothing import certify_by_smoothing, smoothed_radius
from lipbook.robustness.standardize import Standardize

__all__ = [
    "Accuracy",
    "Certificate",
    "Certifier",
    "Standardize",
    "certified_radius",
    "certify",
    "certify_by_smoothing",
    "smoothed_radius",
    "wilson_interval",
]
