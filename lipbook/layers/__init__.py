"""Layers: torch's own layers and the operations of a network, each with all its answers.

One file a kind. Importing the package registers the answers with :mod:`lipbook.rules`.
"""

from lipbook.layers import (
    attention,
    bilinear,
    elementwise,
    joins,
    linear,
    normalization,
    rearrangements,
    recurrence,
    resampling,
    softmax,
    unfolding,
)

__all__ = [
    "attention",
    "bilinear",
    "elementwise",
    "joins",
    "linear",
    "normalization",
    "rearrangements",
    "recurrence",
    "resampling",
    "softmax",
    "unfolding",
]
