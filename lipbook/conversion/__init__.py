"""Conversion: an ordinary network of torch becomes a 1-Lipschitz one, layer by layer."""

from lipbook.conversion.conversion import Conversion, Replacement, lipschitz_network
from lipbook.conversion.modules import Average, GraphNetwork, Offset, ScaledJoin

__all__ = [
    "Average",
    "Conversion",
    "GraphNetwork",
    "Offset",
    "Replacement",
    "ScaledJoin",
    "lipschitz_network",
]
