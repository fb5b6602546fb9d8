r"""The Wasserstein distance W₁: exactly, between two bounds, and as the ascent of a critic.

For two distributions :math:`P, Q` on :math:`\mathbb R^d` with finite first moments,

.. math::
    W_1(P, Q) = \min_{\pi \in \Pi(P, Q)} \operatorname{E}_{(X, Y) \sim \pi} \lVert X - Y\rVert_2
    = \max_{\operatorname{Lip}(f) \le 1} \operatorname{E}_P f - \operatorname{E}_Q f .

The minimum, the primal, runs over the couplings of :math:`P` and :math:`Q`; the maximum, the
Kantorovich–Rubinstein dual, over the 1-Lipschitz functions. So **every coupling gives an upper
bound and every 1-Lipschitz critic a lower bound**, and a pair of both with equal values is a proof.
:func:`wasserstein1` solves the problem between two finite sets, :func:`wasserstein1_bracket` proves
bounds at any size, :func:`fit_critic` ascends the dual and :func:`kantorovich_dual` reads off the
lower bound. :func:`critic_difference`, :func:`sliced_wasserstein` and :func:`sinkhorn` are
estimates, for comparison.

Clouds are tensors of shape (n, d) and (m, d), float32 or float64; (n, ...) counts as flattened.
All distances are Euclidean and all values are :math:`W_1` itself, in the units of the points.

The files are the sections of the chapter, and each imports only those before it: ``clouds``,
``transforms``, ``exact``, ``blocks``, ``sparse``, ``critics``, ``fitting``, ``bracket``,
``baselines``.
"""

from __future__ import annotations

from lipbook.wasserstein.baselines import (
    clip_weights_,
    gradient_penalty,
    sinkhorn,
    sliced_wasserstein,
)
from lipbook.wasserstein.bracket import TransportBracket, wasserstein1_bracket
from lipbook.wasserstein.critics import critic_difference, kantorovich_dual
from lipbook.wasserstein.exact import wasserstein1
from lipbook.wasserstein.fitting import CriticHistory, HeldOut, fit_critic
from lipbook.wasserstein.transforms import c_transform

__all__ = [
    "wasserstein1",
    "c_transform",
    "TransportBracket",
    "wasserstein1_bracket",
    "critic_difference",
    "kantorovich_dual",
    "gradient_penalty",
    "clip_weights_",
    "HeldOut",
    "CriticHistory",
    "fit_critic",
    "sliced_wasserstein",
    "sinkhorn",
]
