r"""Attention: Lipschitz on bounded sets, and not on all of space :cite:p:`kim2021`.

.. math:: o_i = \sum_j P_{ij} v_j, \qquad P_i = \operatorname{softmax}(s\, K q_i + m_i)

# Note [three factors of attention]
# A small change of all three inputs moves o_i by
#     sum_j P_ij dv_j + s Cov_i(v, k) dq_i + s Cov_i(v, q_i . dk),
# with the covariance of rows of v and k that are drawn with the probabilities P_i. Write
# c = max_j sum_i P_ij. A random vector with values in a ball of radius R about any center has
# Var(u . v) <= R^2 for every unit u, one with values in an interval of half-width h has a standard
# deviation of at most h, and a covariance is at most the product of the deviations.
#
# p = 2. ||P||_2^2 <= ||P||_1 ||P||_inf <= c, which bounds the first term. The operator norm of
# Cov_i(v, k) is at most R_v R_k, with radii about any two centers. |Cov_i(v, q_i . dk)| <=
# R_v (sum_j P_ij (q_i . dk_j)^2)^(1/2) <= R_v R_q (sum_j P_ij |dk_j|^2)^(1/2), where R_q is
# max |q_i|, about 0; squares sum over i to R_v^2 R_q^2 c ||dk||^2. Together
#     ||do||_2 <= s R_k R_v ||dq||_2 + s sqrt(c) R_q R_v ||dk||_2 + sqrt(c) ||dv||_2.
#
# p = inf. Let h_v be the largest half-width of an entry of the values over the tokens, and h_k the
# sum over the entries of those of the keys. The rows of P sum to at most 1: the first term has the
# factor 1. k . dq_i lies in an interval of half-width h_k ||dq_i||_inf, q_i . dk_j in one of
# max_i ||q_i||_1 ||dk||_inf: factors s h_v h_k and s h_v max_i ||q_i||_1.
#
# p = 1. Take columns. dv_j enters with sum_i P_ij <= c. Now let h_v be the sum over the entries,
# h_k the maximum: dq_i enters with s h_v h_k. A change of k_jb by 1 moves entry a of o_i by
# s P_ij q_ib (v_ja - o_ia), and o_i is an average in which v_j has the weight P_ij, so that
# |v_ja - o_ia| <= 2 h_a (1 - P_ij): summed, 2 s h_v max |q| min(c, tokens / 4).
#
# The sum c is at most the number of queries. Since two logits of a row differ by their masks and by
# at most d = 2 s R_q R_k, P_ij <= e^(m_ij) / (e^(m_ij) + e^(-d) sum_(l != j) e^(m_il)), which is
# summed over i.

# Note [rounding of attention]
# Logits s q.k are sums of d products, with the scale multiplied in before or behind: they are off
# by gamma_(d+10) s R_q R_k, and by 2u (s R_q R_k + |m|) for a mask. Call Lambda the sum, with
# s (D_q R_k + R_q D_k) for queries and keys that are off by D_q and D_k. A change of the logits by
# at most Lambda changes P_i by at most Lambda in the 1-norm: dP = P (dl - mean dl), and a variable
# in [-Lambda, Lambda] has a mean deviation of at most Lambda. The softmax is off by Note [rounding
# of a softmax], with E twice for each block of keys (torch takes 512 at a time, 32 are assumed),
# the sum over keys by gamma_(keys+8). All of this multiplies the largest |v_j| of an entry; errors
# of the values are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.errors import _ELEMENTARY, _entrywise, _quantum
from lipbook.freezing import keep_kernels
from lipbook.layers.joins import NEEDS_DOMAIN, Join
from lipbook.layers.softmax import softmax_units, sum_of_others
from lipbook.norms import operator_norm
from lipbook.norms.rigorous import _gamma
from lipbook.rules import Affine, Range, _check_weight, affine_rule, outward

__all__ = ["MultiheadCall", "ScaledDotProduct"]

_UP = 1 + 2.0**-40

FrozenMultiheadAttention = keep_kernels(nn.MultiheadAttention)
FrozenTransformerEncoderLayer = keep_kernels(nn.TransformerEncoderLayer)
FrozenTransformerEncoder = keep_kernels(nn.TransformerEncoder)
FrozenTransformerDecoderLayer = keep_kernels(nn.TransformerDecoderLayer)
FrozenTransformerDecoder = keep_kernels(nn.TransformerDecoder)
FrozenTransformer = keep_kernels(nn.Transformer)


class ScaledDotProduct(Join):
    r"""Scaled dot-product attention of queries, keys and values, (..., tokens, features).

    With tokens in balls of radii :math:`R_q` (about 0), :math:`R_k, R_v` (about any center) and
    column sums of P of at most c,

    .. math::
        \lVert\Delta o\rVert_2 \le s R_k R_v \lVert\Delta q\rVert_2
        + s \sqrt{c}\, R_q R_v \lVert\Delta k\rVert_2 + \sqrt{c}\, \lVert\Delta v\rVert_2 .

    **Guaranteed** on the convex set of the ranges, for any constant mask; a row that may attend to
    nothing is 0. The proofs for p = 1, 2 and ∞ are in Note [three factors of attention]. That there
    is no constant on all of space, and the order of growth with the radius, is shown by
    :cite:t:`kim2021` and :cite:t:`castin2024`.

    Parameters
    ----------
    **options
        ``attn_mask``, ``is_causal`` and ``scale`` of
        :func:`torch.nn.functional.scaled_dot_product_attention`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *parts: Tensor) -> Tensor:
        """Attend."""
        query, key, value = parts
        options = dict(self.options)
        mask = options.pop("attn_mask", None)
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, mask, **options)

    def mask(self, queries: int, keys: int) -> Tensor | None:
        """Return what is added to the logits, (..., queries, keys); None for nothing."""
        mask = self.options.get("attn_mask")
        if self.options.get("is_causal"):
            mask = torch.ones(queries, keys, dtype=torch.bool).tril()
        return None if mask is None else added(mask, queries, keys)

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factors of the note."""
        if ranges is None:
            raise ValueError(
                f"attention {NEEDS_DOMAIN}, or put lipbook.attention.BallProjection before it"
            )
        scale = self.options.get("scale")
        s = 1 / math.sqrt(ranges[0].shape[-1]) if scale is None else abs(scale)
        mask = self.mask(ranges[0].shape[-2], ranges[1].shape[-2])
        factors = block_factors(ranges, s, mask, p)  # (batch, ...) with heads or without
        return [factor.unsqueeze(-1).flatten(1).amax(1) for factor in factors]

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound of Note [rounding of attention]."""
        query, key, value = ranges
        scale = self.options.get("scale")
        s = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
        mask = self.mask(query.shape[-2], key.shape[-2])
        share = averaging_error(query, key, s, mask, dtype)[..., None, None]
        return _entrywise(off_averages(share, value.abs(), query.shape[-2], dtype), p)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Averages of the values."""
        query, key, value = ranges
        return averages(value, query.shape[-2], self.mask(query.shape[-2], key.shape[-2]))


def added(mask: Tensor, queries: int, keys: int, blocked: bool = False) -> Tensor:
    """Mask of any kind as numbers that are added; a Boolean one says what is blocked, or not."""
    if mask.dtype == torch.bool:
        allowed = ~mask if blocked else mask
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    mask = mask.detach().double().cpu()
    if bool(mask.isnan().any() | (mask == math.inf).any()):
        raise ValueError("attn_mask must hold numbers and -inf, got NaN or inf")
    return mask.expand(*mask.shape[:-2], queries, keys)


def block_factors(ranges: Sequence[Range], s: float, mask: Tensor | None, p: float) -> list[Tensor]:
    """Factors of queries, keys and values for each block of attention, (batch, ...)."""
    query, key, value = ranges
    q, k, v = token_norms(query), token_radii(key), token_radii(value)
    c = column_sums(2 * s * q * k, query.shape[-2], key.shape[-2], mask)
    ones = torch.ones_like(s * q * k * v * c)
    if p == 2:
        factors = [s * k * v * ones, s * c.sqrt() * q * v * ones, c.sqrt() * ones]
        return [factor * _UP for factor in factors]
    widths_k, widths_v = half_widths(key), half_widths(value)
    if p == math.inf:
        h = widths_v.amax(-1)
        longest = query.abs().sum(-1).amax(-1)
        factors = [s * h * widths_k.sum(-1) * ones, s * h * longest * ones, ones]
        return [factor * _UP for factor in factors]
    h = widths_v.sum(-1)
    largest = query.abs().amax((-2, -1))
    moved = 2 * c.clamp(max=query.shape[-2] / 4)
    factors = [s * h * widths_k.amax(-1) * ones, s * h * largest * moved * ones, c * ones]
    return [factor * _UP for factor in factors]


def column_sums(differences: Tensor, queries: int, keys: int, mask: Tensor | None) -> Tensor:
    """Largest sum of the probabilities of a key, for logits that differ by so much at most."""
    if mask is None:
        most = queries / (1 + (keys - 1) * (-differences).exp())
        return (most * _UP).clamp(max=queries)
    top = mask.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    others = sum_of_others((mask - top).exp(), -1).log() + top  # underflow makes it less
    odds = mask + differences[..., None, None] - others
    chance = torch.where(mask == -math.inf, 0.0, odds.sigmoid())
    return (chance.sum(-2).amax(-1) * _UP).clamp(max=queries)


def token_norms(values: Range) -> Tensor:
    """Largest Euclidean norm of a token of each block, (batch, ...)."""
    return _distances(values, torch.zeros(1, dtype=torch.float64))


def token_radii(values: Range) -> Tensor:
    """Radius of a ball about 0 or about a mean that holds the tokens of each block."""
    return torch.minimum(token_norms(values), _distances(values, mean_token(values)))


def mean_token(values: Range) -> Tensor:
    """Mean of the middles of the tokens of each block, (batch, ..., 1, features)."""
    return values.middle.mean(-2, keepdim=True)


def _distances(values: Range, origin: Tensor) -> Tensor:
    apart = torch.maximum((values.low - origin).abs(), (values.high - origin).abs())
    norms = torch.linalg.vector_norm(apart, dim=-1)
    if values.lengths is not None:
        norms = torch.minimum(norms, values.lengths + torch.linalg.vector_norm(origin, dim=-1))
    if values.center is not None and values.radius is not None:
        reach = torch.linalg.vector_norm(values.center - origin, dim=-1)
        reach = reach + values.radius.view(-1, *[1] * (reach.dim() - 1))
        norms = torch.minimum(norms, reach)
    return norms.amax(-1) * _UP


def half_widths(values: Range) -> Tensor:
    """Half the width of the hull over the tokens of each entry, (batch, ..., features)."""
    return (values.high.amax(-2) - values.low.amin(-2)) / 2 * _UP


def averages(value: Range, queries: int, mask: Tensor | None) -> Range:
    """Range of averages of tokens, one for each query; 0 for a query without any."""
    low, high = value.low.amin(-2, keepdim=True), value.high.amax(-2, keepdim=True)
    lonely = mask is not None and bool((mask == -math.inf).all(-1).any())
    if lonely:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    shape = (*low.shape[:-2], queries, low.shape[-1])
    low, high = outward(low, high, value.abs().amax() * 2.0**-45)
    if lonely:
        return Range(low.expand(shape), high.expand(shape))
    radii = _distances(value, mean_token(value)).square() * queries
    radius = radii.view(len(radii), -1).sum(1).sqrt() * _UP
    return Range(low.expand(shape), high.expand(shape), mean_token(value).expand(shape), radius)


def averaging_error(
    query: Range, key: Range, s: float, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Error of an average, relative to the largest value, for each block, (batch, ...)."""
    features, keys = query.shape[-1], key.shape[-2]
    info = torch.finfo(dtype)
    size = s * token_norms(query) * token_norms(key) * _UP
    logits = _gamma(features + 10, dtype) * size + 4 * features * _quantum(dtype) * (1 + size)
    if mask is not None:
        finite = mask[mask.isfinite()].abs()
        added_up = size + (finite.amax() if finite.numel() else 0.0)
        logits = logits + info.eps * added_up
    units = softmax_units(keys) + 2 * _ELEMENTARY * (1 + keys // 32)
    relative = _gamma(units, dtype) + _gamma(keys + 8, dtype) + 8 * keys * _quantum(dtype)
    fits = (size < info.max / 64) & torch.tensor(relative < 0.01)
    return torch.where(fits, logits + 1.02 * relative, math.inf)


def off_averages(share: Tensor, size: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Errors of averages of values of so large a modulus, (batch, ..., queries, features)."""
    largest = size.amax(-2, keepdim=True)
    error = share * largest * _UP + 8 * size.shape[-2] * _quantum(dtype) * (1 + largest)
    return error.expand(*error.shape[:-2], queries, error.shape[-1])


# ------------------------------------------------------------------------- several heads


class MultiheadCall(Join):
    r"""One call of :class:`torch.nn.MultiheadAttention`, whose forward is that call.

    .. math:: f(x_q, x_k, x_v) = b + \sum_h W^O_h\, \mathrm{Att}(W^Q_h x_q, W^K_h x_k, W^V_h x_v)

    **Guaranteed** on the ranges of the inputs, with :math:`f_h` the factor of head h in
    :class:`ScaledDotProduct` on the ranges of its queries, keys and values: the factor of
    :math:`x_q` is

    .. math:: \lVert W^O\rVert_p\, \lVert (f_h W^Q_h)_h\rVert_p,

    likewise for keys and values, and an input that serves as several has the sum. For head h
    contributes at most :math:`f_h \lVert W^Q_h \Delta x_q\rVert_p`, and the p-norms of the heads
    join to :math:`\lVert (f_h W^Q_h)_h \Delta x_q\rVert_p`, token by token.

    Parameters
    ----------
    module : torch.nn.MultiheadAttention
        The layer, with the batch first.
    places : tuple of int
        Which of the inputs, with the constants behind them, is the query, the key and the value.
    constants : sequence of torch.Tensor
        Tokens that do not depend on the input, (tokens, features).
    masks : dict
        ``attn_mask``, and ``key_padding_mask`` (1, keys), or None.
    options : dict
        The other options of the call.
    """

    def __init__(
        self,
        module: nn.MultiheadAttention,
        places: tuple[int, int, int],
        constants: Sequence[Tensor],
        masks: dict[str, Tensor | None],
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.module, self.places, self.options = module, places, options
        self.constants = len(constants)
        for k, tokens in enumerate(constants):
            self.register_buffer(f"constant_{k}", tokens)
        for name in ("attn_mask", "key_padding_mask"):
            self.register_buffer(name, masks[name])

    def tokens(self) -> list[Tensor]:
        """Constant tokens."""
        return [getattr(self, f"constant_{k}") for k in range(self.constants)]

    def forward(self, *parts: Tensor) -> Tensor:
        """Call the module."""
        batch = len(parts[0])
        parts = (*parts, *(part.expand(batch, *part.shape) for part in self.tokens()))
        query, key, value = (parts[place] for place in self.places)
        padding: Any = self.key_padding_mask
        if padding is not None:
            padding = padding.expand(batch, -1)
        return self.module(
            query,
            key,
            value,
            attn_mask=self.attn_mask,
            key_padding_mask=padding,
            **self.options,
        )[0]

    def mask(self, queries: int, keys: int) -> Tensor | None:
        """Return what is added to the logits, see :meth:`ScaledDotProduct.mask`."""
        mask: Any = self.attn_mask
        padding: Any = self.key_padding_mask
        weights = self.options.get("need_weights", True)
        if self.options.get("is_causal", False) and padding is None and not weights:
            # then torch takes the hint for the mask
            return added(torch.ones(queries, keys, dtype=torch.bool).tril(), queries, keys)
        total = None if mask is None else added(mask, queries, keys, blocked=True)
        if padding is not None:
            other = added(padding, queries, keys, blocked=True)
            total = other if total is None else total + other
        if total is not None and weights and bool((total == -math.inf).all(-1).any()):
            raise ValueError(
                "a query may attend to no key, so that its output is NaN: need_weights=False "
                "makes it the bias"
            )
        return total

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of queries, keys and values."""
        module = self.module
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.detach().double().chunk(3)
        else:
            weights = tuple(
                getattr(module, f"{name}_proj_weight").detach().double() for name in "qkv"
            )
        if module.in_proj_bias is None:
            biases = tuple(torch.zeros(len(w), dtype=torch.float64) for w in weights)
        else:
            biases = module.in_proj_bias.detach().double().chunk(3)
        return list(zip(weights, biases, strict=True))

    def heads(self, ranges: Sequence[Range]) -> list[Range]:
        """Ranges of queries, keys and values, (batch, heads, tokens, features)."""
        count = self.module.num_heads
        points = [Range(t[None], t[None]) for t in (t.double() for t in self.tokens())]
        known = [*ranges, *points]
        found = []
        for place, (weight, bias) in zip(self.places, self.projections(), strict=True):
            values = known[place]
            projected = _linear(weight, bias, values.shape).range(values)
            low, high, center = (
                part.unflatten(-1, (count, -1)).transpose(1, 2)
                for part in (projected.low, projected.high, values.middle @ weight.mT + bias)
            )
            # A ball about each token: the image of that of its box, or of the ball of them all.
            norms = torch.linalg.matrix_norm(weight.unflatten(0, (count, -1)), 2) * _UP
            size = (values.abs().amax() + 1) * (weight.abs().sum(1).amax() + bias.abs().amax())
            slack = size * len(weight) * 2.0**-44
            radius = values.half.norm(dim=-1).flatten(1).amax(1) * norms.amax() * _UP + slack
            if values.center is not None and values.radius is not None:
                other = (values.center @ weight.mT + bias).unflatten(-1, (count, -1))
                reach = values.radius * norms.amax() + slack
                nearer = (reach < radius).view(-1, 1, 1, 1)
                center = torch.where(nearer, other.transpose(1, 2), center)
                radius = torch.minimum(radius, reach)
            if values.lengths is not None:  # a ball about the bias
                reach = values.lengths.flatten(1).amax(1) * norms.amax() * _UP + slack
                nearer = (reach < radius).view(-1, 1, 1, 1)
                about = bias.view(count, 1, -1).expand_as(center)
                center = torch.where(nearer, about, center)
                radius = torch.minimum(radius, reach)
            found.append(Range(low, high, center, radius))
        return found

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Factor of each input."""
        if ranges is None:
            raise ValueError(
                f"attention {NEEDS_DOMAIN}, or put lipbook.attention.BallProjection before it"
            )
        parts = self.heads(ranges)
        s = 1 / math.sqrt(self.module.head_dim)
        mask = self.mask(parts[0].shape[-2], parts[1].shape[-2])
        blocks = block_factors(parts, s, mask, p)
        outer = operator_norm(self.module.out_proj.weight.detach().double(), p)
        zero = torch.zeros((), dtype=torch.float64)
        totals = [zero] * (len(ranges) + self.constants)
        for place, factor, (weight, _) in zip(self.places, blocks, self.projections(), strict=True):
            rows = factor.repeat_interleave(len(weight) // factor.shape[1], dim=1)
            inner = torch.linalg.matrix_norm(rows[..., None] * weight, p)
            totals[place] = totals[place] + outer * inner * _UP
        return totals[: len(ranges)]

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound of Note [rounding of attention], between the errors of two projections."""
        module = self.module
        if dtype != module.out_proj.weight.dtype:
            raise ValueError(f"must run in the dtype of its weights, got {dtype}: use sound=False")
        points = [Range(t[None], t[None]) for t in (t.double() for t in self.tokens())]
        known = [*ranges, *points]
        parts, errors = [], []
        for exact, place, (weight, bias) in zip(
            self.heads(ranges), self.places, self.projections(), strict=True
        ):
            inside = known[place].abs() @ weight.abs().mT + bias.abs()
            off = _projection_error(inside, weight.shape[1], dtype)
            off = off.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            parts.append(Range(*outward(exact.low - off, exact.high + off)))
            errors.append(off)
        query, key, value = parts
        s = 1 / math.sqrt(module.head_dim)
        mask = self.mask(query.shape[-2], key.shape[-2])
        wrong = [torch.linalg.vector_norm(off, dim=-1).amax(-1) for off in errors[:2]]
        moved = s * (wrong[0] * token_norms(key) + token_norms(query) * wrong[1]) * _UP
        share = (averaging_error(query, key, s, mask, dtype) + moved)[..., None, None]
        off = off_averages(share, value.abs(), query.shape[-2], dtype)
        off = off + errors[2].amax(-2, keepdim=True) * _UP
        size = value.abs().amax(-2, keepdim=True) + off
        off, size = (part.transpose(1, 2).flatten(2) for part in (off, size))
        outer = module.out_proj.weight.detach().double().abs()
        bias = module.out_proj.bias
        inside = size @ outer.mT + (0.0 if bias is None else bias.detach().double().abs())
        error = off @ outer.mT * _UP + _projection_error(inside, outer.shape[1], dtype)
        return _entrywise(error, p)

    def range(self, ranges: Sequence[Range]) -> Range:
        """Project averages of the values."""
        query, key, value = self.heads(ranges)
        mean = averages(value, query.shape[-2], self.mask(query.shape[-2], key.shape[-2]))
        low, high = (side.transpose(1, 2).flatten(2) for side in (mean.low, mean.high))
        weight = self.module.out_proj.weight.detach().double()
        bias = self.module.out_proj.bias
        offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach()
        linear = _linear(weight, offset.double(), tuple(low.shape[1:]))
        if mean.center is None or mean.radius is None:
            return linear.range(Range(low, high))
        center = mean.center.transpose(1, 2).flatten(2)
        image = linear.range(Range(low, high, center, mean.radius))
        assert image.center is not None
        assert image.radius is not None
        radius = mean.radius * operator_norm(weight, 2) * _UP + image.radius
        return Range(image.low, image.high, image.center, radius)


def _projection_error(inside: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    r"""Error of :math:`W x + b` for values of :math:`|W| |x| + |b|`."""
    error = _gamma(features + 4, dtype) * inside * _UP
    error = error + 4 * features * _quantum(dtype) * (1 + inside.amax())
    return torch.where(inside < torch.finfo(dtype).max / 8, error, math.inf)


def _linear(weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Affine:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    found = affine_rule(layer, shape)
    assert found is not None
    return found


def multihead_call(
    module: nn.MultiheadAttention,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,
    tracked: Callable[[Any], bool],
) -> list[tuple[Tensor, nn.Module, tuple[Any, ...]]]:
    """One call as a layer; its second output is not followed.

    Raises
    ------
    TypeError, ValueError
        If the batch is not dimension 0, attention is dropped at random, or a mask or constant
        tokens differ between samples.
    """
    names = "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal"
    given = dict(zip(names.split(), args, strict=False)) | kwargs
    query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
    if query.dim() != 3 or not module.batch_first:
        raise ValueError(
            "must have the batch in dimension 0, or samples attend to each other: use "
            f"batch_first=True and inputs (batch, tokens, features), got {query.dim()} dimensions "
            f"and batch_first={module.batch_first}"
        )
    for name, weight in module.out_proj._parameters.items():
        _check_weight(f"out_proj.{name}", weight)
    if module.training and module.dropout > 0:
        raise ValueError("drops attention at random in training mode: call .eval()")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise TypeError(
            "attends to tokens of its own (add_bias_kv, add_zero_attn), for which no bound is known"
        )
    masks = {name: given.pop(name, None) for name in ("attn_mask", "key_padding_mask")}
    if masks["attn_mask"] is not None and masks["attn_mask"].dim() != 2:
        raise ValueError(
            "attn_mask must be (queries, keys), the same for each sample, got shape "
            f"{tuple(masks['attn_mask'].shape)}"
        )
    padding = masks["key_padding_mask"]
    if padding is not None:
        if not bool((padding == padding[:1]).all()):
            raise ValueError("key_padding_mask must be the same for each sample of the batch")
        masks["key_padding_mask"] = padding[:1].clone()
    inputs: list[Tensor] = []
    constants: list[Tensor] = []
    for part in (query, key, value):
        kind = inputs if tracked(part) else constants
        if not any(part is other for other in kind):
            kind.append(part)
    everything = [*inputs, *constants]
    places = [
        next(k for k, other in enumerate(everything) if other is part)
        for part in (query, key, value)
    ]
    for part in constants:
        if not bool((part == part[:1]).all()):
            raise ValueError("constant tokens must be the same for each sample of the batch")
    fixed = [part[0].detach().clone() for part in constants]
    layer = MultiheadCall(module, (places[0], places[1], places[2]), fixed, masks, given)
    return [(outputs[0], layer, tuple(inputs))]
