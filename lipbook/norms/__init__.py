r"""Operator norms of matrices and of convolutions.

The operator norm of a linear map is the most it can stretch a vector,

.. math:: \lVert A\rVert_{p\to q} = \max_{\lVert x\rVert_p \le 1} \lVert A x\rVert_q ,

and its Lipschitz constant from :math:`\ell_p` to :math:`\ell_q`. Each function of this package says
in its name or first line what it returns: the norm itself, an upper bound, or a lower estimate.
Norms and bounds are computed and returned in float64 whatever the dtype of the weights, and keep
the graph, so that they can be differentiated. Only the rigorous norms, which are Python floats,
account for every rounding on their own way.
"""

from __future__ import annotations

from lipbook.norms.circulants import (
    circular_convolution_gram_iteration,
    circular_convolution_norm,
    circular_convolution_singular_values,
)
from lipbook.norms.convolutions import convolution_norm_bound, convolution_norm_is_exact
from lipbook.norms.matrices import dual_exponent, gram_iteration, operator_norm, power_iteration
from lipbook.norms.rigorous import rigorous_convolution_norm, rigorous_matrix_norm

__all__ = [
    "dual_exponent",
    "operator_norm",
    "gram_iteration",
    "power_iteration",
    "circular_convolution_singular_values",
    "circular_convolution_norm",
    "circular_convolution_gram_iteration",
    "convolution_norm_bound",
    "convolution_norm_is_exact",
    "rigorous_matrix_norm",
    "rigorous_convolution_norm",
]
