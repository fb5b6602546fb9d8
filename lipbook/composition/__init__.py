r"""Lipschitz composition: bounds of networks from bounds of their layers.

A map :math:`f` is :math:`L`-Lipschitz when
:math:`\lVert f(x) - f(y)\rVert_p \le L\,\lVert x - y\rVert_p` for all :math:`x, y`; its Lipschitz
constant :math:`\operatorname{Lip}(f)` is the least such :math:`L`. Constants multiply along
compositions and add along sums. :func:`lipschitz_bound` reads the graph of a network and does that
arithmetic from above, :func:`lipschitz_lower_bound` searches two points that show how far the
result can be from the truth. A layer joins by one function, registered with
:func:`lipschitz_rule`.
"""

from lipbook.composition.bounds import Residual, Sum, bound_method, lipschitz_bound
from lipbook.composition.checks import LayerReport, check_layer
from lipbook.composition.lower import _steepest, lipschitz_lower_bound
from lipbook.composition.spectrum import layer_singular_values, stable_rank
from lipbook.rules import (
    _COMPUTATION,
    Affine,
    Ball,
    Bound,
    Box,
    Range,
    _exponent,
    _located,
    _norm_name,
    _rule_of,
    _shape,
    affine_rule,
    image_rule,
    lipschitz_rule,
    local_lipschitz_rule,
    outward,
    pullback_rule,
    range_rule,
    slope_rule,
)

__all__ = [
    "Ball",
    "Bound",
    "Box",
    "LayerReport",
    "Residual",
    "Sum",
    "check_layer",
    "layer_singular_values",
    "lipschitz_bound",
    "lipschitz_lower_bound",
    "lipschitz_rule",
    "stable_rank",
]
