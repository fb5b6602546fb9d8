r"""Self-attention with a constant on all of space.

Softmax attention has no Lipschitz constant: with tokens of norm R its Jacobian grows as R² (chapter
12). Three ways out, each with a proof:

- :class:`EnergyAttention`, a gradient step on a convex energy of the tokens: 1-Lipschitz.

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
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Bound, lipschitz_rule
from lipbook.convolutions import kernel_norm_bound
from lipbook.freezing import computes_as, freeze_rule
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _floating, _integer
from lipbook.norms.rigorous import _UP
from lipbook.orthogonal.orthonormality import power_of_two, without_autocast
from lipbook.rules import Range, Shape, ball_range, outward, range_rule

__all__ = [
    "EnergyAttention",
    "attention_energy",
    "energy_attention",
    "energy_curvature",
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
        return curvature.clamp(min=math.sqrt(info.tiny)) * (1 + 64 * info.eps)


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

    There is no causal form. The gradient with respect to a token holds the answers to all later
    tokens that read it.

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


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_weights(query_weight: Tensor, key_weight: Tensor) -> None:
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        _floating(name, weight)
        if weight.dim() != 3 or 0 in weight.shape:
            raise ValueError(
                f"{name} must have shape (heads, size of a head, features), got "
                f"{tuple(weight.shape)}"
            )
    if query_weight.shape != key_weight.shape:
        raise ValueError(
            f"key_weight must have the shape of query_weight {tuple(query_weight.shape)}, got "
            f"{tuple(key_weight.shape)}"
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
torch.fx.wrap("energy_attention")
torch.fx.wrap("energy_curvature")


# ---------------------------------------------------------------------------------- layers


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
        self.embed_dim = _integer("embed_dim", embed_dim, 1)
        self.num_heads = _integer("num_heads", num_heads, 1)
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"num_heads must divide embed_dim = {embed_dim}, or give head_dim, got "
                    f"{num_heads}"
                )
            head_dim = embed_dim // num_heads
        self.head_dim = _integer("head_dim", head_dim, 1)
        shape = (self.num_heads, self.head_dim, self.embed_dim)
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
        r"""Length of the step, a number."""
        raise NotImplementedError

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
                "to later tokens that read it, so that no mask makes the step causal"
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

    def step(self) -> Tensor:
        r"""Length of the step, :math:`2 / L`."""
        return 2 / energy_curvature(self.query_weight, self.key_weight)


# --------------------------------------------------------------------- Lipschitz constants


@lipschitz_rule.register
def _(module: _EnergyLayer, input_shape: Shape, p: float) -> Bound:
    """Check the step in float64, for the weights as they are."""
    a, b = (w.detach().double().flatten(0, 1) for w in (module.query_weight, module.key_weight))
    alpha, beta = (torch.linalg.matrix_norm(w).clamp(min=1e-300) for w in (a, b))
    norm = operator_norm(torch.cat((a / alpha.sqrt(), b / beta.sqrt())), 2.0)
    curvature = ((alpha + beta) * norm.square()).item() * _UP
    value = max(1.0, module.step().item() * curvature - 1)
    if p != 2:
        value *= math.sqrt(math.prod(input_shape)) * _UP
    return Bound(value, "upper bound", p)


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
