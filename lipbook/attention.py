r"""Self-attention with a constant on all of space.

Softmax attention has no Lipschitz constant: with tokens of norm R its Jacobian grows as R² (chapter
12). Three ways out, each with a proof:

- :class:`EnergyAttention`, a gradient step on a convex energy of the tokens: 1-Lipschitz.
- :class:`BallProjection` in front of torch's attention, which has a constant on balls.

- :class:`L2MultiheadAttention`, whose weights fall with the distances of tied queries and keys: a
  constant of the order :math:`\sqrt{n \log n}` for n tokens, which may be causal.

Tokens are rows: (batch, tokens, features). Norms are of all entries of a sample.

# Note [curvature of the attention energy]
# For one head and one query i, let u_j = A x_i + B x_j / sqrt(c) and rho_j = ||u_j||, and
#     F = log Z,   Z = sum_j C_j,   C_j = cosh rho_j,   S_j = sinh rho_j,   p_j = C_j / Z.
# Let the u_j move by v_j, with a part y_j along u_j and a part t_j across. The second derivative is
#     H(v) = sum_j C_j/Z y_j^2 + sum_j S_j/(rho_j Z) t_j^2 - (sum_j S_j/Z y_j)^2.
#
# (1) 0 <= H. By Cauchy (sum S_j y_j)^2 <= sum_j C_j sum_j S_j^2/C_j y_j^2 <= Z sum_j C_j y_j^2. So
#     sqrt(H) is a seminorm of v, and F is convex.
# (2) H <= sum_j p_j ||v_j||^2, since sinh rho <= rho cosh rho. If all v_j = w: H <= ||w||^2.
# (3) H <= 1/2 sum_j ||v_j||^2 for two tokens or more. Across: S/rho = int_0^1 cosh(rho s) ds <=
#     (C + 1)/2 by convexity, and Z >= C_j + 1. Along: rows of the matrix diag(C)/Z - S S^T/Z^2 have
#     sums of moduli of at most
#         (C_j Z - S_j^2 + S_j T)/Z^2 = (C_j K + 1 + S_j T)/(C_j + K)^2,
#     where K and T are the sums of the C_k and S_k over the n - 1 others. Now K^2 - T^2 =
#     sum_kl cosh(rho_k - rho_l) >= (n - 1)^2 >= 1, so that
#         C_j^2 + K^2 >= 1 + S_j^2 + T^2 + 1 >= 2 + 2 S_j T,
#     which says that the row sum is at most 1/2.
#
# Tokens that move by dx have v_j = A dx_i + B dx_j / sqrt(c). By the triangle inequality of the
# seminorm, (2) and (3), sqrt(H_i) <= ||A dx_i|| + m ||B dX|| / sqrt(c), with m^2 = 1/2, and m = 1
# for one token. Over all i, and heads that are stacked, c = max(1, n/2) = n m^2 leaves
#     sqrt(d2E(dX, dX)) <= ||A dX|| + ||B dX||,
# at every length n. (r + s)^2 <= (1 + tau)(r^2 + s^2/tau) turns that into one norm: with alpha and
# beta positive and tau = beta / alpha,
#     d2E(dX, dX) <= (alpha + beta) ||[A / sqrt(alpha); B / sqrt(beta)]||^2 ||dX||^2 = L ||dX||^2.
# For alpha = ||A|| and beta = ||B|| this is at most (||A|| + ||B||)^2. The curvature reaches that
# for one token or two with A = B, at X = 0, where all move alike; for B = 0; and for A = 0 at every
# n, in the limit of two tokens far apart.
#
# A convex function with curvature of at most L has I - step d2E with eigenvalues in [-1, 1] for
# 0 <= step <= 2/L.
#
# Note [L2 attention]
# For one head let y_i = Q x_i, z_ij = y_j - y_i and s = sqrt(size of a head). The weights are
# P_ij = exp(-r_ij) / sum_l exp(-r_il) with r_ij = ||z_ij||^2 / s, the output V/s sum_j P_ij y_j
# with V = W_V Q^T. Write phi(t) = t e^(t+1), mu_n = phi^(-1)(n - 1), n the number of tokens.
#
# (1) sum_j P_ij r_ij <= mu_n =: mu. It says that sum_(j != i) (r_ij - mu) e^(-r_ij) <= mu, since
#     r_ii = 0. Each term is largest at r = 1 + mu: at most e^(-1-mu), and (n - 1) e^(-1-mu) = mu.
# (2) P_ij <= P_ii, so that P_ij <= 1/2 for j != i and sum_i P_ij <= (n + 1)/2; and P_ij r_ij <=
#     r e^(-r) / (1 + e^(-r)) <= mu_2, by (1) for two tokens.
#
# A small change moves the average by
#     sum_j P_ij dy_j - 2/s sum_j P_ij (z_ij - mean) <z_ij, dy_j - dy_i>.
# The first term has the factor sqrt((n + 1)/2), as ||P||_2^2 <= ||P||_1 ||P||_inf. The part of dy_i
# is 2/s Cov(z, z) dy_i, of factor 2 mu by (1). That of the dy_j is, by Cauchy, at most
#     2/s (sum_j P_ij ||z_ij||^2)^(1/2) (sum_j P_ij ||z_ij||^2 ||dy_j||^2)^(1/2)
#         <= 2 sqrt(mu) (sum_j P_ij r_ij ||dy_j||^2)^(1/2),
# and squares sum over i to 4 mu (n - 1) mu_2 ||dY||^2, as r_jj = 0. Together
#     kappa_n = sqrt((n + 1)/2) + 2 mu_n + 2 sqrt((n - 1) mu_2 mu_n).
# Heads join by ||W_O|| (sum_h ||V_h||^2 ||Q_h dX||^2)^(1/2) kappa_n / s.
#
# Causal attention has j and l <= i in all sums of row i, which are those of i tokens with the last
# one in front. Each token still reads itself. So (1) holds with mu_i <= mu_n, and (2) as it is:
# P_ij <= 1/2 for j < i, and column j of P has the sum <= 1 + (n - j)/2 <= (n + 1)/2. The first term
# keeps its factor and the part of dy_i its 2 mu_n. The squares of the part of the dy_j sum to
#     sum_i 4 mu_i sum_(j < i) P_ij r_ij ||dy_j||^2 <= 4 mu_2 (mu_2 + ... + mu_n) ||dY||^2,
# so that the factor of causal attention, which is no larger, is
#     kappa'_n = sqrt((n + 1)/2) + 2 mu_n + 2 sqrt(mu_2 (mu_2 + ... + mu_n)).
# With padding, n is the number of tokens that are left: they read each other in their order.
#
# Note [rounding of attentions with a constant]
# Everything is bounded on a range of inputs; on all of space balls about the point at hand are
# taken, the largest of the size of its tokens. Let q and k be the queries and keys of one head,
# exact, of norms of at most R and S, and off by d_q and d_k in the program: d = d_q + d_k,
# u_ij = q_i + k_j of norms rho_ij <= R + S =: r. gamma is that of the model of rounding, u its
# unit; f stands for what may be flushed, a few times the least normal number. On all of space the
# function has the step or divisor that the program computes, for which its constant is proved; on a
# domain that of the layer in float64, and the difference is added.
#
# (1) Squares are sums of 3k products (k the size of a head) of a modulus of at most (r + d)^2, and
#     ||u + e||^2 - ||u||^2 <= d (2r + d): off by D = gamma_(k+4) (r + d)^2 + d (2r + d) + f.
#     Clipping at 0 brings them nearer.
# (2) L2 attention, of n tokens or fewer in a row of the causal one, where the weights of later
#     tokens are 0. Logits are squares divided by s: off by Lambda = (D + gamma_3 (r^2 + D)) / s,
#     with r = 2R. A change of logits of at most Lambda moves a softmax by at most Lambda in its
#     1-norm, and softmax_units is what it rounds: pi, together. Values v_j = M^T q_j with
#     M = Q W^T / s are off by d_v = ||M|| d_q + gamma_(d+2k+8) || |Q| |W|^T / s || (R + d_q), where
#     ||v_j|| <= ||M|| R =: V; their averages by pi V + (1 + pi) (d_v + gamma_(n+2) (V + d_v)) + f.
# (3) The energy. With x = rho^2 its parts are log cosh sqrt(x), whose slope is g(x)/2 for
#     g(x) = tanh(rho)/rho = sum_k 2 / (x + ((k - 1/2) pi)^2), which falls, is convex, and has
#     -g' <= 1/3, and -g' <= 1/(2 rho^3) since rho/g dg/drho lies in [-1, 0]. So log cosh is off by
#     D/2 and what it rounds: from a root, off by 2u, on, it is a softplus (64u of an exponential,
#     which it halves, and 64u of log 2 at most) between sums of numbers up to rho + 1: less than
#     gamma_4 rho + gamma_90. Near 0 a polynomial of five terms is off by less than 16u.
# (4) The slope g is off by no more than e_g = D (0.4 + sqrt(D)/3) + 72u if it is multiplied by rho:
#     if the computed x is larger, rho (-g') <= sup min(rho/3, 1/(2 rho^2)) < 0.4, and otherwise rho
#     is larger than the computed one by sqrt(D) at most; tanh and a quotient round by 64u + 8u.
# (5) So the weights w_ij = p_ij g_ij have sum_j |error| rho_ij <= e = (1 + pi)(1 + e_g)(1 + u) - 1
#     with the pi of a softmax whose logits are off by (3), since g rho <= 1. Their sum is at most
#     W = (1 + pi)(1 + gamma_80). What a token reads, sum_j w_ij u_ij, of norm <= 1, is off by
#         t = e + W (d + gamma_(n+4) (r + d)) + f;
#     the answers sum_j w_ji u_ji by t n in the sum of their norms over the tokens, of n at most.
# (6) Over tokens and heads, in the 2-norm: reading is off by T = sqrt(n) (sum_h t_h^2)^(1/2), of
#     size sqrt(n H), the answers by n (sum_h t_h^2)^(1/2), of size n sqrt(H), times 1/sqrt(c). Two
#     products with matrices follow, with gamma_(Hk+4) times the norms of their moduli, and
#     x - step gradient with four roundings.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Bound, lipschitz_rule
from lipbook.convolutions import kernel_norm_bound
from lipbook.errors import (
    Analysis,
    ForwardError,
    RangeAnalysis,
    _check_single,
    _closed_form,
    _error_rule_of,
    _norms,
    _quantum,
    _relative,
    forward_error_rule,
    range_error_rule,
)
from lipbook.freezing import computes_as, freeze_rule
from lipbook.graphs.operations import traced_as
from lipbook.layers.softmax import softmax_units
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _floating, _integer, _real
from lipbook.norms.rigorous import _UP, _gamma, rigorous_matrix_norm
from lipbook.orthogonal.orthonormality import power_of_two, without_autocast
from lipbook.rules import Range, Shape, _rule_of, ball_range, image_rule, outward, range_rule

__all__ = [
    "BallProjection",
    "EnergyAttention",
    "L2MultiheadAttention",
    "attention_energy",
    "ball_projection",
    "energy_attention",
    "energy_curvature",
    "l2_attention",
    "l2_attention_bound",
]

# tanh(sqrt t) / sqrt t near t = 0, and twice the integral of it is log cosh sqrt t.
_SERIES = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)
_NEAR = 2.0**-10  # up to which the rest of the series is below 1e-17


# ------------------------------------------------------------------------------- functions


def attention_energy(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, key_padding_mask: Tensor | None = None
) -> Tensor:
    r"""Convex energy of a set of tokens, whose gradient is an attention.

    .. math:: E(X) = \sum_h \sum_i \log \sum_j \cosh \big\lVert A_h x_i + B_h x_j / \sqrt{c}
        \big\rVert, \qquad c = \max(1, n/2)

    for n tokens. **Guaranteed**: convex and even, and with A and B the heads on top of one another,

    .. math:: 0 \le \mathrm d^2 E(\mathrm dX, \mathrm dX)
        \le \big(\lVert A\,\mathrm dX\rVert + \lVert B\,\mathrm dX\rVert\big)^2 .

    Parameters
    ----------
    x : torch.Tensor
        Tokens, (batch, n, features).
    query_weight, key_weight : torch.Tensor
        :math:`A` and :math:`B`, (heads, size of a head, features).
    key_padding_mask : torch.Tensor, optional
        Boolean, (batch, n): True for tokens that are no part of the set.

    Returns
    -------
    torch.Tensor
        (batch,).

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers, or the mask is not Boolean.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> A, x = torch.ones(1, 1, 1), torch.tensor([[[0.5], [-0.5]]])
    >>> round(attention_energy(x, A, A).item(), 4), round(2 * math.log(math.cosh(1) + 1), 4)
    (1.8668, 1.8668)
    """
    _check_arguments(x, query_weight, key_weight, key_padding_mask)
    *_, squares = _pairs(x, query_weight, key_weight, key_padding_mask)
    rows = _hidden(_log_cosh(squares)[0], key_padding_mask).logsumexp(-1)
    if key_padding_mask is not None:
        rows = rows.masked_fill(key_padding_mask[:, None], 0.0)
    return rows.sum((1, 2))


def energy_curvature(query_weight: Tensor, key_weight: Tensor) -> Tensor:
    r"""Bound of the second derivative of :func:`attention_energy`, at every length.

    .. math:: L = (\alpha + \beta)\, \left\lVert \begin{pmatrix} A / \sqrt\alpha \
        B / \sqrt\beta \end{pmatrix} \right\rVert_2^2 \ge \sup_{\lVert \mathrm dX\rVert = 1}
        \big(\lVert A\,\mathrm dX\rVert + \lVert B\,\mathrm dX\rVert\big)^2

    with :math:`\alpha = \lVert A\rVert_F` and :math:`\beta = \lVert B\rVert_F`, and the norm from
    above (:func:`~lipbook.convolutions.kernel_norm_bound`).

    Parameters
    ----------
    query_weight, key_weight : torch.Tensor
        :math:`A` and :math:`B`, (heads, size of a head, features).

    Returns
    -------
    torch.Tensor
        A number, in float32 at least.

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers.
    ValueError
        If shapes do not fit.

    Examples
    --------
    One head that is the identity on both sides has :math:`(1 + 1)^2`:

    >>> round(energy_curvature(torch.eye(1)[None], torch.eye(1)[None]).item(), 3)
    4.0
    """
    _check_weights(query_weight, key_weight)
    with without_autocast(query_weight):
        a, b = (_at_least_float32(each.flatten(0, 1)) for each in (query_weight, key_weight))
        size = power_of_two(torch.cat((a, b)))
        a, b = a / size, b / size
        info = torch.finfo(a.dtype)
        alpha, beta = (torch.linalg.matrix_norm(each).clamp(min=info.eps) for each in (a, b))
        stacked = torch.cat((a * alpha.rsqrt(), b * beta.rsqrt()))
        norm = kernel_norm_bound(stacked.mT, squarings=6)
        curvature = (alpha + beta) * norm.square() * size * size
        return curvature.clamp(min=math.sqrt(info.tiny)) * _margin(a.dtype)


def energy_attention(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    key_padding_mask: Tensor | None = None,
    step: Tensor | float | None = None,
) -> Tensor:
    r"""Gradient step on :func:`attention_energy`: an attention that is 1-Lipschitz.

    .. math::
        X \mapsto X - \eta\, \nabla E(X), \qquad
        \nabla E(X)_i = \sum_h A_h^\top \sum_j w_{ij} u_{ij}
        + \frac{1}{\sqrt c} \sum_h B_h^\top \sum_j w_{ji} u_{ji},

    with :math:`u_{ij} = A_h x_i + B_h x_j / \sqrt c` of norm :math:`\rho_{ij}`, :math:`w_{ij} =
    p_{ij} \tanh\rho_{ij} / \rho_{ij}`, and :math:`p_i` the softmax over j of
    :math:`\log\cosh\rho_{ij}`. A token reads others by the first sum and answers those who read it
    by the second, which is what makes the Jacobian symmetric.

    **Guaranteed** for :math:`0 \le \eta \le 2 / L` with :math:`L` of :func:`energy_curvature`:
    1-Lipschitz in the 2-norm on all of space, at every number of tokens, and tokens that are padded
    stay as they are and change nothing. Norms do not grow, since 0 stays 0. **Not guaranteed**:
    anything from below.

    Parameters
    ----------
    x, query_weight, key_weight, key_padding_mask
        As in :func:`attention_energy`.
    step : torch.Tensor or float, optional
        :math:`\eta`; 2 / L if not given. It is taken as it is.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention_energy`.

    Notes
    -----
    Memory is that of softmax attention: scores (heads, n, n), and products with matrices. With
    :math:`\sigma A, \sigma B` in place of A and B the map is that of A and B on :math:`\sigma X`,
    divided by :math:`\sigma`: the scale of the weights is the inverse temperature.

    There is no causal form. The Jacobian is symmetric: where a token reads an earlier one, the
    earlier one answers. :func:`l2_attention` has one.

    Examples
    --------
    >>> A, B, x = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    >>> y = energy_attention(x, A, B)
    >>> bool((y[0] - y[1]).norm() <= (x[0] - x[1]).norm())
    True

    References
    ----------
    The step is that of convex potential layers, :cite:t:`meunier2022cpl`; attention as the gradient
    of an energy, which is not convex, with both sums: :cite:t:`hoover2023`.
    """
    _check_arguments(x, query_weight, key_weight, key_padding_mask)
    if step is None:
        step = (2 / energy_curvature(query_weight, key_weight)).to(x.dtype)
    query, key, share, squares = _pairs(x, query_weight, key_weight, key_padding_mask)
    scores, slopes = _log_cosh(squares)
    weights = _hidden(scores, key_padding_mask).softmax(-1) * slopes
    if key_padding_mask is not None:
        pairs = key_padding_mask[:, None, :, None] | key_padding_mask[:, None, None, :]
        weights = weights.masked_fill(pairs, 0.0)
    reading = weights.sum(-1, keepdim=True) * query + weights @ key
    answers = weights.mT @ query + weights.sum(-2).unsqueeze(-1) * key
    gradient = _joined(reading, query_weight) + _joined(answers * share, key_weight)
    return x - step * gradient


def l2_attention(
    x: Tensor,
    query_weight: Tensor,
    value_weight: Tensor,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    r"""Attention by distances, with queries that are keys and values that are tied to them.

    .. math:: o_i = \bigoplus_h \sum_j P^h_{ij}\, W^V_h A_h x_j, \qquad
        P^h_{ij} = \operatorname{softmax}_j\Big({-\frac{\lVert Q_h x_i - Q_h x_j\rVert^2}{\sqrt k}}
        \Big), \qquad A_h = \frac{Q_h^\top Q_h}{\sqrt k}

    with k the size of a head. Lipschitz on all of space, see :func:`l2_attention_bound`. Causal
    attention has :math:`j \le i` in both sums: output i depends on tokens up to i alone.

    Parameters
    ----------
    x : torch.Tensor
        Tokens, (batch, n, features).
    query_weight, value_weight : torch.Tensor
        :math:`Q` and :math:`W^V`, (heads, size of a head, features).
    key_padding_mask : torch.Tensor, optional
        Boolean, (batch, n): True for tokens that nobody reads and whose outputs are 0.
    is_causal : bool
        Whether a token reads itself and earlier ones only.

    Returns
    -------
    torch.Tensor
        Heads side by side, (batch, n, heads · size of a head).

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers, or the mask is not Boolean.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> Q, x = torch.ones(1, 1, 1), torch.tensor([[[0.0], [1.0]]])
    >>> l2_attention(x, Q, Q).flatten(), torch.tensor([-1.0, 1.0]).sigmoid()
    (tensor([0.2689, 0.7311]), tensor([0.2689, 0.7311]))
    >>> l2_attention(x, Q, Q, is_causal=True).flatten()  # the first token reads itself
    tensor([0.0000, 0.7311])

    References
    ----------
    :cite:t:`kim2021`, Section 3.2; they leave masks to later work.
    """
    _check_weights(query_weight, value_weight, ("query_weight", "value_weight"))
    _check_tokens(x, query_weight.shape[2], key_padding_mask)
    root = math.sqrt(query_weight.shape[1])
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
    query = _heads(x, query_weight)
    scores = _hidden(_squares(query, query, -1.0) / -root, key_padding_mask)
    if is_causal:
        scores = scores.masked_fill(_later(scores), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    values = query @ (query_weight @ value_weight.mT / root)
    outputs = (weights @ values).transpose(1, 2).flatten(2)
    if key_padding_mask is None:
        return outputs
    return outputs.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)


def l2_attention_bound(
    query_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    tokens: int,
    is_causal: bool = False,
) -> Tensor:
    r"""Bound of the Lipschitz constant of L2 attention and a matrix behind it, for n tokens.

    .. math::
        \operatorname{Lip}_2 \le \frac{\kappa_n}{\sqrt k}\, \lVert W^O\rVert_2\,
        \big\lVert (\lVert W^V_h Q_h^\top\rVert_2\, Q_h)_h \big\rVert_2, \qquad
        \kappa_n = \sqrt{\tfrac{n + 1}{2}} + 2 \mu_n + 2 \sqrt{(n - 1)\, \mu_2\, \mu_n}

    with :math:`\mu_n = \varphi^{-1}(n - 1)`, :math:`\varphi(t) = t e^{t + 1}`, and for causal
    attention :math:`\mu_2 + \dots + \mu_n` in place of :math:`(n - 1)\, \mu_n`, which is not less.
    The proof is in Note [L2 attention]. It begins as that of :cite:t:`kim2021`, whose factor is
    :math:`\sqrt n\, (4 \mu_n + 1)`, and grows as :math:`\sqrt{n \log n}` instead of
    :math:`\sqrt n \log n`: since a token is nearest to itself, it gives no other more than half of
    its weight. Norms are from above, differentiably.

    Parameters
    ----------
    query_weight, value_weight : torch.Tensor
        :math:`Q` and :math:`W^V`, (heads, size of a head, features).
    out_weight : torch.Tensor
        :math:`W^O`, (outputs, heads · size of a head).
    tokens : int
        :math:`n`.
    is_causal : bool
        Whether a token reads itself and earlier ones only.

    Returns
    -------
    torch.Tensor
        A number, in float32 at least.

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers, or ``tokens`` no integer.
    ValueError
        If shapes do not fit, or ``tokens`` is not positive.

    Examples
    --------
    >>> one = torch.ones(1, 1, 1)
    >>> [round(l2_attention_bound(one, one, one[0], n).item(), 2) for n in (1, 2, 16, 256)]
    [1.0, 2.34, 10.49, 48.79]
    >>> [round(l2_attention_bound(one, one, one[0], n, True).item(), 2) for n in (1, 2, 16, 256)]
    [1.0, 2.34, 9.71, 45.35]

    References
    ----------
    :cite:t:`kim2021`, Theorem 3.2.
    """
    _integer("tokens", tokens, 1)
    _check_weights(query_weight, value_weight, ("query_weight", "value_weight"))
    count = torch.full((), tokens, dtype=torch.float64, device=query_weight.device)
    return _used((query_weight, value_weight, out_weight), count, tokens if is_causal else None)


def _l2_factor(
    query_weight: Tensor, value_weight: Tensor, out_weight: Tensor, norm: Callable[[Tensor], Tensor]
) -> Tensor:
    """Give what multiplies kappa, by upper bounds of norms of matrices."""
    _check_weights(query_weight, value_weight, ("query_weight", "value_weight"))
    _floating("out_weight", out_weight)
    heads, size, _ = query_weight.shape
    if out_weight.dim() != 2 or out_weight.shape[1] != heads * size:
        raise ValueError(
            f"out_weight must have shape (outputs, {heads * size}), got {tuple(out_weight.shape)}"
        )
    with without_autocast(query_weight):
        query, value, out = (
            _at_least_float32(each) for each in (query_weight, value_weight, out_weight)
        )
        inner = torch.stack([norm(each) for each in value @ query.mT])
        stacked = (inner.view(-1, 1, 1) * query).flatten(0, 1)
        return norm(out) * norm(stacked.mT) / math.sqrt(size)


def _kappa(tokens: Tensor, causal: int | None) -> Tensor:
    """Factor of Note [L2 attention] for numbers of tokens in float64, rounded up.

    Of causal attention, if the largest of the numbers is given.
    """

    def inverse(target: Tensor) -> Tensor:
        t = target.log1p()  # above the solution of t e^(t + 1) = target, and Newton stays there
        for _ in range(12):  # enough for 10^15 tokens
            slope = (t + 1).exp()
            t = t - (t * slope - target) / ((t + 1) * slope)
        return t.clamp(min=0.0)

    if causal is None:
        mu, pair = inverse(torch.stack([tokens - 1, torch.ones_like(tokens)]))
        total = (tokens - 1) * mu
    else:
        each = inverse(torch.arange(max(causal, 2), dtype=tokens.dtype, device=tokens.device))
        sums = each.cumsum(0) * (1 + causal * 2.0**-51)  # what it rounds
        at = tokens.long() - 1
        mu, pair, total = each[at], each[1], sums[at]
    own = ((tokens + 1) / 2).sqrt()
    return (own + 2 * mu + 2 * (pair * total).sqrt()) * _UP


@traced_as(lambda radius: BallProjection(radius))  # noqa: PLW0108 - which stands below
def ball_projection(x: Tensor, radius: float) -> Tensor:
    r"""Nearest point of a ball, for each token.

    .. math:: x_i \mapsto x_i \min(1, r / \lVert x_i\rVert_2)

    **Guaranteed**: 1-Lipschitz in the 2-norm, as every projection onto a convex set; norms of
    outputs are at most r, up to rounding. In the 1-norm and the maximum norm the constant is
    :math:`(1 + \sqrt d)/2` for d features.

    Parameters
    ----------
    x : torch.Tensor
        (..., features).
    radius : float
        :math:`r > 0`.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of floating-point numbers, or ``radius`` no number.
    ValueError
        If ``x`` has no features, or ``radius`` is not positive and finite.

    Examples
    --------
    >>> ball_projection(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    _floating("x", x, 1)
    radius = _radius(radius)
    squares = (x / radius).square().sum(-1, keepdim=True)
    return torch.where(squares > 1, x * squares.clamp(min=1.0).rsqrt(), x)


def _radius(radius: float) -> float:
    _real("radius", radius)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    return float(radius)


def _margin(dtype: torch.dtype) -> float:
    """Factor by which bounds are rounded up in layers, and more than their rules are."""
    return 1 + 64 * torch.finfo(dtype).eps + 2.0**-38


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_weights(
    first: Tensor, second: Tensor, names: tuple[str, str] = ("query_weight", "key_weight")
) -> None:
    for name, weight in zip(names, (first, second), strict=True):
        _floating(name, weight)
        if weight.dim() != 3 or 0 in weight.shape:
            raise ValueError(
                f"{name} must have shape (heads, size of a head, features), got "
                f"{tuple(weight.shape)}"
            )
    if first.shape != second.shape:
        raise ValueError(
            f"{names[1]} must have the shape of {names[0]} {tuple(first.shape)}, got "
            f"{tuple(second.shape)}"
        )


def _check_tokens(x: Tensor, features: int, key_padding_mask: Tensor | None) -> None:
    _floating("x", x)
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != features:
        raise ValueError(
            f"x must have shape (batch, tokens, {features}) with a token or more, got "
            f"{tuple(x.shape)}"
        )
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        kind = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(f"key_padding_mask must be a Boolean tensor, True for padding, got {kind}")
    if key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must have shape (batch, tokens) = {tuple(x.shape[:2])}, got "
            f"{tuple(key_padding_mask.shape)}"
        )


def _check_arguments(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, key_padding_mask: Tensor | None
) -> None:
    _check_weights(query_weight, key_weight)
    _check_tokens(x, query_weight.shape[2], key_padding_mask)


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    """Project tokens for each head, (batch, heads, tokens, size of a head)."""
    projected = functional.linear(x, weight.flatten(0, 1))
    return projected.unflatten(-1, weight.shape[:2]).transpose(1, 2)


def _joined(parts: Tensor, weight: Tensor) -> Tensor:
    """Apply the transposes of the projections and add up the heads, (batch, tokens, features)."""
    return functional.linear(parts.transpose(1, 2).flatten(2), weight.flatten(0, 1).mT)


def _pairs(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Give queries, keys, 1 / sqrt(c), and squares of the norms of their sums."""
    share: Tensor | float = max(1.0, x.shape[1] / 2) ** -0.5
    if mask is not None:
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
        count = mask.logical_not().sum(1).to(x.dtype)
        share = (count / 2).clamp(min=1.0).rsqrt().view(-1, 1, 1, 1)
    query, key = _heads(x, query_weight), _heads(x, key_weight) * share
    return query, key, share, _squares(query, key, 1.0)


def _squares(query: Tensor, key: Tensor, sign: float) -> Tensor:
    """Squares of the norms of q_i + sign k_j; what cancels may round below 0."""
    both = query.square().sum(-1)[..., :, None] + key.square().sum(-1)[..., None, :]
    return (both + 2 * sign * (query @ key.mT)).clamp(min=0.0)


def _hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores of which those of padded keys are as low as can be."""
    if mask is None:
        return scores
    return scores.masked_fill(mask[:, None, None, :], torch.finfo(scores.dtype).min)


def _later(scores: Tensor) -> Tensor:
    """Pairs (i, j) of a token and a later one, j > i."""
    every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return every.triu(1)


def _log_cosh(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Give log cosh and tanh(r) / r for squares of r, smooth in them."""
    near = squares < _NEAR
    small = torch.where(near, squares, 0.0)
    slope, value = torch.zeros_like(small), torch.zeros_like(small)
    for k, coefficient in reversed(list(enumerate(_SERIES))):
        slope = slope * small + coefficient
        value = value * small + coefficient / (2 * k + 2)
    r = torch.where(near, 1.0, squares).sqrt()
    far = r + functional.softplus(-2 * r) - math.log(2)
    return torch.where(near, value * small, far), torch.where(near, slope, r.tanh() / r)


# torch.fx records a call of these as one step, since their checks depend on sizes.
torch.fx.wrap("ball_projection")
torch.fx.wrap("energy_attention")
torch.fx.wrap("energy_curvature")
torch.fx.wrap("l2_attention")
torch.fx.wrap("_over_bound")


# ---------------------------------------------------------------------------------- layers


def _sizes(embed_dim: int, num_heads: int, head_dim: int | None) -> tuple[int, int, int]:
    """Check the sizes of a layer: heads, size of a head, features."""
    embed_dim = _integer("embed_dim", embed_dim, 1)
    num_heads = _integer("num_heads", num_heads, 1)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim = {embed_dim}, or give head_dim, got {num_heads}"
            )
        head_dim = embed_dim // num_heads
    return num_heads, _integer("head_dim", head_dim, 1), embed_dim


class _EnergyLayer(nn.Module):
    """X - step * gradient of the energy."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        shape = _sizes(embed_dim, num_heads, head_dim)
        self.num_heads, self.head_dim, self.embed_dim = shape
        self.query_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.key_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both with orthonormal rows or columns."""
        for weight in (self.query_weight, self.key_weight):
            nn.init.orthogonal_(weight.data.flatten(0, 1))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def step(self) -> Tensor:
        r"""Length of the step, :math:`2 / L`."""
        return 2 / energy_curvature(self.query_weight, self.key_weight)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        r"""Take the step.

        Parameters
        ----------
        x : torch.Tensor
            Tokens, (batch, tokens, features).
        key_padding_mask : torch.Tensor, optional
            Boolean, (batch, tokens): True for tokens that are no part of the set.
        is_causal : bool
            Must be False.

        Returns
        -------
        torch.Tensor
            The shape of ``x``.
        """
        if is_causal:
            raise ValueError(
                "is_causal must be False: the gradient with respect to a token holds the answers "
                "to later tokens that read it, so that no mask makes the step causal; "
                "L2MultiheadAttention(..., is_causal=True) is"
            )
        step = self.step().to(x.dtype)
        return energy_attention(x, self.query_weight, self.key_weight, key_padding_mask, step)


class EnergyAttention(_EnergyLayer):
    r"""Self-attention that is 1-Lipschitz on all of space: a gradient step on a convex energy.

    .. math:: X \mapsto X - \tfrac{2}{L} \nabla E(X), \qquad
        E(X) = \sum_h \sum_i \log \sum_j \cosh \big\lVert A_h x_i + B_h x_j / \sqrt{c}\big\rVert,
        \qquad c = \max(1, n/2)

    for n tokens, see :func:`energy_attention`. **Guaranteed**: 1-Lipschitz in the 2-norm of all
    entries, for all parameters and every number of tokens, in training and evaluation; the Jacobian
    is symmetric with eigenvalues in [-1, 1]. It commutes with permutations of the tokens.
    **Not guaranteed**: anything from below; norm may be lost. In the 1-norm and the maximum norm
    the bound is :math:`\sqrt{n d}`, from the equivalence of norms.

    Parameters
    ----------
    embed_dim : int
        Features of a token.
    num_heads : int
        Heads.
    head_dim : int, optional
        Size of a head; ``embed_dim / num_heads`` if not given.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    query_weight, key_weight : torch.Tensor
        :math:`A` and :math:`B`, (heads, size of a head, features). Both also carry back: the same
        weights serve as queries, keys, values and output.

    Raises
    ------
    ValueError
        If a size is not positive, or ``num_heads`` does not divide; when called, if shapes do not
        fit, or for a causal mask.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
    >>> layer = EnergyAttention(8, num_heads=2)
    >>> lipschitz_bound(layer, (5, 8)).value
    1.0
    >>> lipschitz_lower_bound(layer, torch.randn(4, 5, 8), steps=5).value <= 1 + 1e-6
    True

    References
    ----------
    As :func:`energy_attention`.
    """


class L2MultiheadAttention(nn.Module):
    r"""Attention by distances, with tied weights and a Lipschitz constant on all of space.

    .. math:: X \mapsto \mathrm{Att}(X)\, W^{O\top} + b \qquad\text{or}\qquad
        \frac{\mathrm{Att}(X)\, W^{O\top}}{L_n} + b

    with :func:`l2_attention` and the bound :math:`L_n` of :func:`l2_attention_bound`.
    **Guaranteed**: the constant is at most :math:`L_n` for n tokens, and at most 1 with
    ``nonexpansive``, for all parameters, in training and evaluation. The bound grows
    as :math:`\sqrt{n \log n}`. With ``is_causal``, output i is the same whatever later tokens are;
    what ``nonexpansive`` divides by depends on how many tokens there are, without the padded ones.

    Parameters
    ----------
    embed_dim : int
        Features of a token.
    num_heads : int
        Heads.
    bias : bool
        Whether to add :math:`b`.
    nonexpansive : bool
        Whether to divide by the bound.
    head_dim : int, optional
        Size of a head; ``embed_dim / num_heads`` if not given.
    device, dtype
        Of the parameters.
    is_causal : bool
        Whether a token reads itself and earlier ones only. It belongs to the layer and not to a
        call, so that its bounds are those of what it computes.

    Attributes
    ----------
    query_weight, value_weight : torch.Tensor
        :math:`Q` and :math:`W^V`, (heads, size of a head, features). The keys are the queries.
    out_weight : torch.Tensor
        :math:`W^O`, (features, heads · size of a head).
    bias : torch.Tensor or None
        :math:`b`, (features,).

    Raises
    ------
    ValueError
        If a size is not positive, or ``num_heads`` does not divide; when called, if shapes do not
        fit.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = L2MultiheadAttention(8, 2, nonexpansive=True)
    >>> bool(lipschitz_bound(layer, (5, 8)).value <= 1)
    True

    References
    ----------
    :cite:t:`kim2021`, Section 3.2; dividing by the bound: their Section 4.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        bias: bool = True,
        nonexpansive: bool = False,
        head_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        shape = _sizes(embed_dim, num_heads, head_dim)
        self.num_heads, self.head_dim, self.embed_dim = shape
        self.nonexpansive, self.is_causal = bool(nonexpansive), bool(is_causal)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.query_weight, self.value_weight = empty(*shape), empty(*shape)
        self.out_weight = empty(self.embed_dim, self.num_heads * self.head_dim)
        self.register_parameter("bias", empty(self.embed_dim) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights with orthonormal rows or columns; the bias is 0."""
        for weight in (self.query_weight, self.value_weight):
            nn.init.orthogonal_(weight.data.flatten(0, 1))
        nn.init.orthogonal_(self.out_weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"bias={self.bias is not None}, nonexpansive={self.nonexpansive}, "
            f"is_causal={self.is_causal}"
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        r"""Attend.

        Parameters
        ----------
        x : torch.Tensor
            Tokens, (batch, tokens, features).
        key_padding_mask : torch.Tensor, optional
            Boolean, (batch, tokens): True for tokens that nobody reads and whose outputs are 0,
            or the bias.

        Returns
        -------
        torch.Tensor
            The shape of ``x``.
        """
        weights = self.query_weight, self.value_weight, self.out_weight
        heads = l2_attention(x, *weights[:2], key_padding_mask, self.is_causal)
        if self.nonexpansive:
            heads = _over_bound(heads, weights, key_padding_mask, self.is_causal)
        return functional.linear(heads, self.out_weight, self.bias)


def _over_bound(
    heads: Tensor, weights: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Divide by the bound for the number of tokens of each sample."""
    if mask is None:
        tokens = torch.full((1,), heads.shape[1], dtype=torch.float64, device=heads.device)
    else:
        tokens = mask.logical_not().sum(1).double().clamp(min=1.0)
    causal = heads.shape[1] if is_causal else None
    return heads / _used(weights, tokens, causal).to(heads.dtype).view(-1, 1, 1)


def _used(weights: tuple[Tensor, Tensor, Tensor], tokens: Tensor, causal: int | None) -> Tensor:
    """Bounds that the layer divides by, for numbers of tokens as in :func:`_kappa`."""
    factor = _l2_factor(*weights, kernel_norm_bound)
    return (_kappa(tokens, causal) * _margin(factor.dtype)).to(factor.dtype) * factor


class BallProjection(nn.Module):
    r"""Projection of each token onto a ball, behind which attention has a constant.

    The module of :func:`ball_projection`. **Guaranteed**: 1-Lipschitz in the 2-norm, and the norm
    of each token behind it is at most r. A layer that reads it works on a bounded set wherever the
    input is, so that :func:`~lipbook.composition.lipschitz_bound` of torch's attention behind it is
    finite on all of space.

    Parameters
    ----------
    radius : float
        :math:`r > 0`.

    Raises
    ------
    ValueError
        If ``radius`` is not positive and finite.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> class Attend(nn.Module):
    ...     def forward(self, x):
    ...         return functional.scaled_dot_product_attention(x, x, x)
    >>> net = nn.Sequential(BallProjection(1.0), Attend())
    >>> round(lipschitz_bound(net, (5, 4)).value, 2)
    2.63
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = _radius(radius)

    def extra_repr(self) -> str:
        """Show the radius."""
        return f"radius={self.radius:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Project, (..., features) to the same."""
        return ball_projection(x, self.radius)


# --------------------------------------------------------------------- Lipschitz constants


@_rule_of(_EnergyLayer, L2MultiheadAttention)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    """Bound with norms in float64, for the weights as they are and what the layer computes."""
    value = _constant(module, input_shape, lambda matrix: operator_norm(matrix, 2.0))
    if p != 2:
        value *= math.sqrt(math.prod(input_shape)) * _UP
    return Bound(value, "upper bound", p)


def _constant(module: Any, input_shape: Shape, norm: Callable[[Tensor], Tensor]) -> float:
    """Bound in the 2-norm, from upper bounds of norms of matrices."""
    if isinstance(module, _EnergyLayer):
        a, b = (w.detach().double().flatten(0, 1) for w in (module.query_weight, module.key_weight))
        alpha, beta = (torch.linalg.matrix_norm(w).clamp(min=1e-300) for w in (a, b))
        stacked = norm(torch.cat((a / alpha.sqrt(), b / beta.sqrt())))
        curvature = ((alpha + beta) * stacked.square()).item() * _UP
        return max(1.0, module.step().item() * curvature - 1)
    weights = module.query_weight, module.value_weight, module.out_weight
    query, value, out = (weight.detach().double() for weight in weights)
    exact = _l2_factor(query, value, out, norm)
    if not module.nonexpansive:
        count, causal = input_shape[0], input_shape[0] if module.is_causal else None
        return (exact * _kappa(torch.tensor(count).double(), causal)).item() * _UP
    used = _l2_factor(*weights, kernel_norm_bound).detach()
    # of what the layer multiplies it by
    least = 1 + 32 * torch.finfo(used.dtype).eps + 2.0**-39
    return (exact / (used.double() * least)).item() * _UP


@range_rule.register
def _(module: _EnergyLayer, values: Range) -> Range:
    """Bound the way of a token: one that reads goes 1 a head, one that answers, n / sqrt(c)."""
    around = ball_range(module, values)
    n = values.shape[0]
    lengths = [w.square().sum(1).sqrt().sum(0) for w in (module.query_weight, module.key_weight)]
    way = module.step() * (lengths[0] + n / math.sqrt(max(1.0, n / 2)) * lengths[1]) * _UP
    low, high = outward(values.low - way, values.high + way)
    return Range(
        torch.maximum(around.low, low),
        torch.minimum(around.high, high),
        around.center,
        around.radius,
    )


# Note [projections onto a ball]
# Behind the ball the Jacobian is r/|x| (I - n n^T) with n = x/|x|, of 2-norm r/|x| < 1. With t the
# modulus of an entry of n, a row of I - n n^T has the sum of moduli
#     1 - 2 t^2 + t ||n||_1 <= 1 - t^2 + sqrt(d - 1) t sqrt(1 - t^2) <= (1 + sqrt(d)) / 2,
# attained next to the ball. The matrix is symmetric: the same for columns.


@lipschitz_rule.register
def _(module: BallProjection, input_shape: Shape, p: float) -> Bound:
    return Bound(1.0 if p == 2 else (1 + math.sqrt(input_shape[-1])) / 2, "exact", p)


def _in_ball(module: BallProjection, low: Tensor, high: Tensor, lengths: Tensor) -> Range:
    """Tokens of at most these norms in a box; the ball of a sample is about 0."""
    center, radius = torch.zeros_like(low), lengths.flatten(1).norm(dim=1) * _UP
    return Range(low, high, center, radius, lengths)


@image_rule.register
def _(module: BallProjection, input_shape: Shape) -> Range:
    high = torch.full((1, *input_shape), module.radius * _UP, dtype=torch.float64)
    return _in_ball(module, -high, high, high[..., 0].clone())


@range_rule.register
def _(module: BallProjection, values: Range) -> Range:
    """Shrink the box towards 0, and cut it at the radius; of two balls take the smaller."""
    reach = module.radius * _UP
    low, high = values.low.clamp(-reach, 0.0), values.high.clamp(0.0, reach)
    low, high = outward(low, high)
    lengths = torch.linalg.vector_norm(values.abs(), dim=-1) * _UP
    if values.lengths is not None:
        lengths = torch.minimum(lengths, values.lengths)
    found = _in_ball(module, low, high, lengths.clamp(max=reach))
    if values.center is None or values.radius is None:
        return found
    assert found.center is not None
    assert found.radius is not None
    center = module(values.center)
    radius = values.radius * _UP + center.flatten(1).norm(dim=1) * 2.0**-36
    nearer = radius < found.radius
    view = nearer.view(-1, *[1] * (center.dim() - 1))
    return dataclasses.replace(
        found,
        center=torch.where(view, center, found.center),
        radius=torch.where(nearer, radius, found.radius),
    )


# ------------------------------------------------------------------- errors of programs


@forward_error_rule.register
def _(module: BallProjection, example: Tensor, p: float) -> Analysis:
    """Round a quotient, a sum of d squares, a root and a product on the way."""
    _check_single(example)
    features = example.shape[-1]
    lipschitz = _closed_form(module, example, p)
    info = torch.finfo(example.dtype)

    def analysis(x: Tensor) -> ForwardError:
        found = _relative(module, x, p, lipschitz, features + 8)
        room = min(1.0, module.radius) * math.sqrt(info.max) / 4 - _norms(x, 2)  # for the squares
        return dataclasses.replace(found, limit=torch.minimum(found.limit, room))

    return analysis


@_error_rule_of(_EnergyLayer, L2MultiheadAttention)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    """Bound the error on seven balls about each input, the largest as wide as its longest token.

    With e_k on the ball of radius D_k = 2^(-k) D_0: e_6 + c D is at least e_k for D >= D_(k+1).
    """
    errors_of = _energy_errors if isinstance(module, _EnergyLayer) else _l2_errors
    on_range: RangeAnalysis = errors_of(module, example, p, module)
    lipschitz = _rigorous_bound(module, tuple(example.shape[1:]), p)

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        center = x.detach().double()
        longest = center.norm(dim=-1).amax(-1).clamp(min=1.0)
        stretch = math.sqrt(center[0].numel()) if p == math.inf else 1.0
        errors = []
        for k in range(7):
            room = (longest * 2.0**-k / stretch)[:, None, None]
            box = outward(center - room, center + room)
            errors.append(on_range(Range(*box, center, longest * 2.0**-k * _UP)))
        limit = torch.where(errors[0].isfinite(), longest / stretch, 0.0)
        rises = [(e - errors[-1]) * 2.0 ** (k + 1) / limit for k, e in enumerate(errors)]
        slope = torch.where(limit[:, None] > 0, torch.stack(rises, 1), 0.0).amax().item()
        return ForwardError(outputs, lipschitz, errors[-1], slope * _UP, limit)

    return analysis


def _rigorous_bound(module: Any, shape: Shape, p: float) -> float:
    """Bound of the Lipschitz rule, with norms that rounding cannot push below the true ones."""

    def norm(matrix: Tensor) -> Tensor:
        return torch.tensor(rigorous_matrix_norm(matrix), dtype=torch.float64)

    value = _constant(module, shape, norm)
    return value if p == 2 else value * math.sqrt(math.prod(shape)) * _UP


@range_error_rule.register
def _(module: _EnergyLayer, example: Tensor, p: float) -> RangeAnalysis:
    return _energy_errors(module, example, p, copy.deepcopy(module).double())


def _energy_errors(
    module: _EnergyLayer, example: Tensor, p: float, function: _EnergyLayer
) -> RangeAnalysis:
    """Bound of Note [rounding of attentions with a constant], for the step of the function."""
    dtype = _check_weights_of(module, example)
    tokens, heads, size = example.shape[1], module.num_heads, module.head_dim
    queries, keys = module.query_weight.detach().double(), module.key_weight.detach().double()
    share = max(1.0, tokens / 2) ** -0.5
    step = module.step().detach().double().item()
    again = function.step().detach().double().item()
    length = max(step, again) * _UP
    parts = [[(head, _both_norms(head)) for head in weight] for weight in (queries, keys)]
    outer = [_both_norms(w.flatten(0, 1)) for w in (queries, keys)]
    largest = max(1.0, queries.abs().max().item(), keys.abs().max().item())
    quantum = _quantum(dtype)

    def on_range(values: Range) -> Tensor:
        reading = torch.zeros(len(values.low), dtype=torch.float64)
        for (query, of_query), (key, of_key) in zip(*parts, strict=True):
            q, off_q = _projected(query, of_query, values, dtype)
            k, off_k = (share * part * _UP for part in _projected(key, of_key, values, dtype))
            off_k = off_k + _gamma(2, dtype) * (k + off_k)
            r, d = q + k, (off_q + off_k) * _UP
            weight, moved = _weights_error(r, d, tokens, size, dtype)
            total = (1 + moved) * (1 + _gamma(80, dtype))
            flushed = (2 * tokens + 6) * quantum * math.sqrt(size) * (1 + r + d)
            part = weight + total * (d + _gamma(tokens + 4, dtype) * (r + d)) + flushed
            part = torch.where((r + d) ** 2 < torch.finfo(dtype).max / 16, part, math.inf)
            reading = reading + part.square()
        reading = reading.sqrt() * _UP
        gradient, off = torch.zeros_like(reading), torch.zeros_like(reading)
        for ways, (norm, absolute) in zip((tokens**0.5, tokens * share), outer, strict=True):
            inside = ways * (math.sqrt(heads) + reading)
            off = off + norm * ways * reading + _gamma(heads * size + 6, dtype) * absolute * inside
            gradient = gradient + absolute * inside
        entries = math.sqrt(math.prod(values.shape))
        off = off + 4 * (heads * size + 6) * quantum * largest * entries * (1 + gradient)
        error = length * off + abs(step - again) * gradient
        error = error + _gamma(4, dtype) * (values.norms(2) + length * gradient)
        fits = values.norms(2) + (1 + length) * gradient < torch.finfo(dtype).max / 16
        return _of_norm(torch.where(fits, error + 4 * quantum * entries, math.inf), values.shape, p)

    return on_range


@range_error_rule.register
def _(module: L2MultiheadAttention, example: Tensor, p: float) -> RangeAnalysis:
    return _l2_errors(module, example, p, copy.deepcopy(module).double())


def _l2_errors(
    module: L2MultiheadAttention, example: Tensor, p: float, function: L2MultiheadAttention
) -> RangeAnalysis:
    """Bound of Note [rounding of attentions with a constant], for the divisor of the function."""
    dtype = _check_weights_of(module, example)
    tokens, size = example.shape[1], module.head_dim
    weights = module.query_weight, module.value_weight, module.out_weight
    queries, tied, out = (weight.detach().double() for weight in weights)
    root = math.sqrt(size)
    parts = []
    for q, v in zip(queries, tied, strict=True):
        both = _both_norms(q @ v.mT)[0], _both_norms(q.abs() @ v.abs().mT)[0]
        parts.append((q, _both_norms(q), *(each / root * _UP for each in both)))
    norm, absolute = _both_norms(out)
    bias = 0.0 if module.bias is None else module.bias.detach().double().norm().item()
    shift = bias * math.sqrt(tokens) * _UP
    divisor, wrong = 1.0, 0.0
    if module.nonexpansive:
        count, causal = torch.tensor(tokens).double(), tokens if module.is_causal else None
        used = [
            _used((each.query_weight, each.value_weight, each.out_weight), count, causal)
            for each in (module, function)
        ]
        sizes = [each.double().item() for each in used]
        divisor = min(sizes) / _UP
        wrong = (max(sizes) / divisor - 1) * _UP + _gamma(4, dtype)
    largest = max(1.0, *(weight.abs().max().item() for weight in weights)) ** 2
    quantum, columns = _quantum(dtype), out.shape[1]

    def on_range(values: Range) -> Tensor:
        squares = [torch.zeros(len(values.low), dtype=torch.float64) for _ in range(2)]
        for query, norms, factor, rounded in parts:
            q, off_q = _projected(query, norms, values, dtype)
            r, d = 2 * q, 2 * off_q
            square = _square_error(r, d, size, dtype)
            logit = (square + _gamma(3, dtype) * (r * r + square)) / root * _UP
            moved = logit + _gamma(softmax_units(tokens), dtype) + 4 * tokens * quantum
            value = factor * q * _UP
            inside = rounded * (q + off_q)
            off = factor * off_q + _gamma(query.shape[1] + 2 * size + 8, dtype) * inside
            off = off + 4 * (query.shape[1] + size) * size * quantum * largest * (1 + q + off_q)
            part = moved * value + (1 + moved) * (off + _gamma(tokens + 2, dtype) * (value + off))
            part = part + 2 * (tokens + 2) * quantum * root * (1 + value + off)
            part = torch.where((r + d) ** 2 < torch.finfo(dtype).max / 16, part, math.inf)
            squares = [squares[0] + part.square(), squares[1] + value.square()]
        off, whole = ((each * tokens).sqrt() * _UP / divisor for each in squares)
        off = off + wrong * (whole + off)
        entries = math.sqrt(math.prod(values.shape))
        flushed = 4 * (columns + 3) * quantum * largest * entries * (1 + whole + off)
        inside = absolute * (whole + off) + shift
        error = norm * off + _gamma(columns + 3, dtype) * inside + flushed
        fits = (1 + divisor) * (1 + absolute) * (whole + off) + shift
        error = torch.where(fits < torch.finfo(dtype).max / 16, error, math.inf)
        return _of_norm(error, values.shape, p)

    return on_range


def _check_weights_of(module: Any, example: Tensor) -> torch.dtype:
    """Check that all computes in one known dtype, which is given."""
    _check_single(example)
    dtype: torch.dtype = module.query_weight.dtype
    if example.dtype != dtype:
        raise ValueError(f"must run in the dtype of its weights, got {example.dtype}")
    if any(weight.dtype != dtype for weight in module.parameters()):
        raise ValueError("all weights must have one dtype for their rounding errors to be known")
    return dtype


def _both_norms(matrix: Tensor) -> tuple[float, float]:
    """Upper bounds of the 2-norms of a matrix and of its moduli."""
    return rigorous_matrix_norm(matrix) * _UP, rigorous_matrix_norm(matrix.abs()) * _UP


def _projected(
    weight: Tensor, norms: tuple[float, float], values: Range, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Largest norm of a projected token, and of the error of it: (batch,) each."""
    norm, absolute = norms
    longest = values.abs().norm(dim=-1)
    if values.lengths is not None:
        longest = torch.minimum(longest, values.lengths)
    size = norm * longest.amax(-1)
    moduli = torch.minimum(absolute * longest.amax(-1), _longest(values.abs(), weight.abs()))
    box = functional.linear(values.middle, weight).abs()
    box = box + functional.linear(values.half, weight.abs())
    size = torch.minimum(size, box.norm(dim=-1).amax(-1))
    if values.center is not None and values.radius is not None:
        size = torch.minimum(size, _longest(values.center, weight) + norm * values.radius)
        around = _longest(values.center.abs(), weight.abs()) + absolute * values.radius
        moduli = torch.minimum(moduli, around)
    units = weight.shape[1] + 2
    largest = max(1.0, weight.abs().max().item())
    flushed = 2 * units * _quantum(dtype) * math.sqrt(len(weight)) * (largest + longest.amax(-1))
    size = size + 2.0**-40 * moduli  # what float64 rounds here
    return size * _UP, (_gamma(units, dtype) * moduli * _UP + flushed) * _UP


def _longest(tokens: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(tokens, weight).norm(dim=-1).amax(-1)


def _square_error(r: Tensor, d: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Error of squares of norms of at most r, of vectors that are off by d."""
    flushed = 4 * (size + 2) * _quantum(dtype) * (1 + r + d)
    return (_gamma(size + 4, dtype) * (r + d) ** 2 + d * (2 * r + d) + flushed) * _UP


def _log_cosh_errors(r: Tensor, d: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Errors of (3) and (4) of the note, of log cosh and of slopes times the norms."""
    square = _square_error(r, d, size, dtype)
    logit = square / 2 + _gamma(4, dtype) * (r + square.sqrt()) + _gamma(90, dtype)
    return logit, square * (0.4 + square.sqrt() / 3) + _gamma(72, dtype)


def _weights_error(
    r: Tensor, d: Tensor, tokens: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Give e and pi of (5) of the note."""
    logit, slope = _log_cosh_errors(r, d, size, dtype)
    moved = logit + _gamma(softmax_units(tokens), dtype) + 4 * tokens * _quantum(dtype)
    unit = torch.finfo(dtype).eps / 2
    return moved + slope + moved * slope + unit * (1 + moved) * (1 + slope), moved


def _of_norm(error: Tensor, shape: Shape, p: float) -> Tensor:
    """Bound of the p-norm of an error, from that of its 2-norm."""
    error = error * (math.sqrt(math.prod(shape)) if p == 1 else 1.0) * _UP
    return error.nan_to_num(math.inf, posinf=math.inf)


# --------------------------------------------------------------------------- frozen layers


class EnergyStep(_EnergyLayer):
    r"""Frozen step on the energy of attention: what :class:`EnergyAttention` freezes to.

    .. math:: X \mapsto X - \eta \nabla E(X)

    with a constant step. **Guaranteed**: what the layer that it was made of guaranteed at that
    time. The Lipschitz rule computes the bound from the constants and does not trust them.

    Attributes
    ----------
    query_weight, key_weight : torch.Tensor
        (heads, size of a head, features).
    length : torch.Tensor
        :math:`\eta`, a number.

    Examples
    --------
    >>> from lipbook.freezing import freeze
    >>> layer = EnergyAttention(8)
    >>> frozen = freeze(layer)
    >>> type(frozen).__name__, torch.equal(frozen.length, layer.step())
    ('EnergyStep', True)
    """

    length: Tensor

    def step(self) -> Tensor:
        """Length of the step, a number."""
        return self.length


@freeze_rule.register
def _(module: EnergyAttention) -> nn.Module:
    frozen: Any = module
    if computes_as(frozen, EnergyAttention):
        frozen.register_buffer("length", frozen.step().clone())
        frozen.__class__ = EnergyStep
    return frozen
