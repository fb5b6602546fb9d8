r"""Normalisation layers of torch: Lipschitz by their eps, and better where a variance is bounded.

Each splits a sample into groups of n entries and divides a group by its size. With
:math:`C = I - \tfrac1n 11^\top` (layer, group and instance norm) or :math:`C = I` (RMS norm),

.. math:: y = \gamma \odot \frac{c}{s} + \beta, \qquad c = Cx, \qquad
    s = \sqrt{\tfrac1n \lVert c\rVert_2^2 + \varepsilon} .

# Note [Jacobian of a normalisation]
# d(c/s) = (dc - c c^T dc / (n s^2)) / s. With u = c / ||c|| and t = eps / s^2, in (0, 1], we have
# ||c||^2 / (n s^2) = 1 - t, so that
#     J = diag(gamma) M / s,  M = C - (1 - t) u u^T,  1 / s = sqrt(t / eps),  u = C u.
# All t in (0, 1] and all unit vectors u = C u occur, and t = 1 where c = 0, with any u.
#
# p = 2. 0 <= M <= C in the order of symmetric matrices, and M^2 = C - (1 - t^2) u u^T <= C, hence
# ||diag(gamma) M||^2 = ||diag(gamma) M^2 diag(gamma)|| <= ||diag(gamma) C||^2, while 1 / s is at
# most 1 / sqrt(eps). Both are attained at c = 0: Lip = ||diag(gamma) C||_2 / sqrt(eps), exactly.
#
# RMS norm, p = inf and 1. Row i of M has the sum of moduli 1 - (1 - t) b + (1 - t) |u_i| sum |u_j|
# with b = u_i^2, the sum over the others being at most sqrt((n - 1) (1 - b)), with equality if they
# are alike. -b + sqrt(n - 1) sqrt(b (1 - b)) has the maximum (sqrt(n) - 1) / 2. So
#     ||J||_inf = max |gamma| sup_t sqrt(t / eps) (1 + (1 - t) kappa),  kappa = (sqrt(n) - 1) / 2.
# Column j of diag(gamma) M, in the same way (u_i in proportion to |gamma_i|), has at most
# |gamma_j| + (1 - t) (||gamma||_2 - |gamma_j|) / 2, which is largest for the largest |gamma_j|:
# kappa is (||gamma||_2 / max |gamma| - 1) / 2 then. Both are attained. The supremum over t <= T is
# at t = min(T, (1 + kappa) / (3 kappa)), since the function of t rises before and falls behind.
#
# Layer norm, p = inf and 1. Write N = 1 - 1/n and w = (1 - t) u_i^2. Row i of M has the diagonal
# entry N - w >= 0 and the square sum N - (1 - t^2) u_i^2, so the squares of its other n - 1 entries
# add up to N / n + 2 w w0 - w^2 with w0 = (1 - t) / 2 - 1 / n; by Cauchy-Schwarz its moduli to at
# most N - w + sqrt(n - 1) sqrt(R^2 - (w - w0)^2) with R^2 = N / n + w0^2. Over all w this is at
# most N - w0 + R sqrt(n) = (1 + t + sqrt(4 t + n (1 - t)^2)) / 2, at a w >= 0 only if
# t <= 1 - 4 / n; otherwise it is largest at w = 0, and 2 N. So the row sums of s J / sqrt(eps / t)
# are at most that, for such t, or 2 N: and 2 N is attained at c = 0. M is symmetric, so the column
# sums of diag(gamma) M are at most max |gamma| times as much.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.errors import (
    _ELEMENTARY,
    Analysis,
    ForwardError,
    RangeAnalysis,
    _Affine,
    _check_single,
    _closed_form,
    _entrywise,
    _error_rule_of,
    _norms,
    _quantum,
    _relative,
    range_error_rule,
)
from lipbook.layers.joins import NEEDS_DOMAIN, interval_product
from lipbook.norms.rigorous import _gamma
from lipbook.rules import (
    Affine,
    Bound,
    Kind,
    Range,
    Shape,
    _axes,
    _float64,
    _rule_of,
    affine_rule,
    lipschitz_rule,
    local_lipschitz_rule,
    outward,
    pullback_rule,
    range_rule,
)

__all__ = ["UnitNormalize"]

_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_INSTANCE)
_UP = 1 + 2.0**-40


# ---------------------------------------------------------------------------- the groups


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Groups of a sample that are normalised, (groups, n)."""

    weight: Tensor  # gamma, (groups or 1, n)
    bias: Tensor
    shape: Shape  # (groups, n)
    centered: bool
    eps: float  # the least, where it depends on the dtype
    largest_eps: float

    def split(self, values: Tensor) -> Tensor:
        """View a batch as groups."""
        return values.reshape(len(values), *self.shape)


def _groups(module: Any, input_shape: Shape) -> _Groups:
    eps = module.eps
    # RMSNorm without eps takes that of the dtype of its inputs: the least is that of float64.
    least = torch.finfo(torch.float64).eps if eps is None else eps
    most = torch.finfo(torch.bfloat16).eps if eps is None else eps
    if not least >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    bias = getattr(module, "bias", None)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) > len(input_shape):
            raise ValueError(
                f"normalises over {tuple(module.normalized_shape)}, which reaches into the batch "
                f"of samples of shape {input_shape}"
            )
        n = math.prod(module.normalized_shape)
        shape = (math.prod(input_shape) // n, n)
        repeats = (1, n)
    else:
        if isinstance(module, _INSTANCE):
            _axes(module, input_shape)  # channels and sizes
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else input_shape[0]
        shape = (groups, math.prod(input_shape) // groups)
        repeats = shape

    def spread(weight: Tensor | None, default: float) -> Tensor:
        if weight is None:
            return torch.full((1, shape[1]), default, dtype=torch.float64)
        flat = _float64(weight).flatten().cpu()
        return flat.repeat_interleave(math.prod(repeats) // len(flat)).view(repeats)

    return _Groups(
        spread(module.weight, 1.0),
        spread(bias, 0.0),
        shape,
        not isinstance(module, nn.RMSNorm),
        float(least),
        float(most),
    )


def _by_running_statistics(module: Any) -> bool:
    """Whether an instance norm divides by numbers that do not depend on its input."""
    return isinstance(module, _INSTANCE) and module.track_running_stats and not module.training


def _running_scale(module: Any) -> Tensor:
    scale = (_float64(module.running_var) + module.eps).rsqrt()
    return scale if module.weight is None else scale * _float64(module.weight)


# ---------------------------------------------------------------------------- the stretch


def centered_norm(weight: Tensor) -> Tensor:
    r"""Spectral norm of :math:`\operatorname{diag}(\gamma) C`, (groups,).

    Its square is the largest eigenvalue of :math:`D - \tfrac1n \gamma\gamma^\top` with
    :math:`D = \operatorname{diag}(\gamma^2)`: the largest :math:`d_i` if it occurs twice (an
    eigenvector with two entries is orthogonal to :math:`\gamma`), else the root of
    :math:`\sum_i 1 / (d_i - \lambda)` between the two largest, the secular equation after
    :math:`1 = \tfrac1n \sum_i d_i / (d_i - \lambda)` is divided by :math:`\lambda`. The root is
    bisected, and its upper end returned.

    Parameters
    ----------
    weight : torch.Tensor
        :math:`\gamma`, (groups, n).

    Returns
    -------
    torch.Tensor

    Examples
    --------
    >>> centered_norm(torch.tensor([[2.0, 2.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64))
    tensor([2.0000, 0.8165], dtype=torch.float64)
    """
    size = weight.abs().amax(1)
    if weight.shape[1] == 1:
        return torch.zeros_like(size)
    d = (weight / size.clamp(min=1e-300)[:, None]) ** 2
    top = d.topk(2, dim=1).values
    low, high = top[:, 1], top[:, 0]
    for _ in range(60):
        middle = (low + high) / 2
        rises = (1 / (d - middle[:, None])).sum(1) > 0  # beyond the root
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return size * high.sqrt()


def _row_sums(n: int, t: Tensor) -> Tensor:
    r"""Bound sums of moduli in a row of M times the root of its t, divided by that of ``t``.

    The supremum over (0, t], cell by cell of a grid in the root of t: see Note [Jacobian of a
    normalisation]. At least what it is at c = 0.
    """
    roots = torch.linspace(0, 1, 4097, dtype=torch.float64)
    t = t[..., None]
    near, far = roots[:-1] ** 2 * t, roots[1:] ** 2 * t
    sums = (1 + far + (4 * far + n * (1 - near) ** 2).sqrt()) / 2
    inside = near <= 1 - 4 / n
    longest = torch.where(inside, roots[1:] * sums, 0.0).amax(-1) * _UP
    return longest.clamp(min=2 * (1 - 1 / n))


def _scaled_maximum(kappa: Tensor, t: Tensor) -> Tensor:
    """Supremum of sqrt(t') (1 + (1 - t') kappa) over (0, t], divided by sqrt(t)."""
    best = torch.minimum((1 + kappa) / (3 * kappa).clamp(min=1e-300), t)
    share = torch.where(t > 0, best / t.clamp(min=1e-300), 1.0)
    return share.sqrt() * (1 + (1 - best) * kappa)


def _stretch(groups: _Groups, t: Tensor, p: float) -> tuple[Tensor, bool]:
    """Bound of s ||J||_p over all t' up to ``t``, (batch, groups); whether attained for t = 1."""
    n = groups.shape[1]
    weight = groups.weight.abs()
    largest = weight.amax(1)
    if not groups.centered:
        if p == 2:
            return largest.expand_as(t), True
        spread = torch.full_like(largest, math.sqrt(n))
        if p == 1:
            spread = torch.linalg.vector_norm(weight, dim=1) / largest.clamp(min=1e-300)
        kappa = ((spread - 1) / 2).clamp(min=0)
        return largest * _scaled_maximum(kappa.expand_as(t), t), True
    if p == 2:
        return centered_norm(groups.weight).expand_as(t), True
    sums = _row_sums(n, t)
    at_constants = bool((sums == 2 * (1 - 1 / n)).all())
    alike = bool((weight == weight[:, :1]).all())
    return largest * sums, at_constants and (p == math.inf or alike)


@_rule_of(*_NORMALISATIONS)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    if _by_running_statistics(module):
        _axes(module, input_shape)
        return Bound(_running_scale(module).abs().max().item(), "exact", p)
    groups = _groups(module, input_shape)
    if groups.eps == 0:
        raise ValueError(f"with eps = 0 {NEEDS_DOMAIN}")
    one = torch.ones(1, len(groups.weight), dtype=torch.float64)
    value, attained = _stretch(groups, one, p)
    kind: Kind = "exact" if attained and groups.eps == groups.largest_eps else "upper bound"
    return Bound(value.max().item() / math.sqrt(groups.eps), kind, p)


@_rule_of(*_INSTANCE, dispatch=affine_rule)
def _(module: Any, input_shape: Shape) -> Affine | None:
    if not _by_running_statistics(module):
        return None
    scale = _running_scale(module).view(-1, *[1] * (len(input_shape) - 1))
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    return Affine(
        lambda x: scale * x,
        lambda x: scale.abs() * x,
        lambda x: scale**2 * x,
        module(zero)[0].detach(),
        8,
    )


# -------------------------------------------------------------------------------- ranges

# Note [variance on a box]
# The least variance of points with l <= x <= h is min_m sum_i dist(m, [l_i, h_i])^2 / n, since a
# variance is a minimum over m, too, and minima may change places. The sum is convex in m: its
# derivative is bisected, and the tangent at one end of the last bracket is below the minimum. The
# largest variance is at most the mean square distance from any m. On a ball the root of the
# variance is off by at most radius / sqrt(n), as x -> ||C x|| is nonexpansive.


def _least_spread(low: Tensor, high: Tensor) -> Tensor:
    """Least sum of squared distances of the intervals of a group from one number."""
    left, right = low.amin(-1), high.amax(-1)

    def slope(m: Tensor) -> Tensor:
        m = m[..., None]
        return ((m - high).clamp(min=0) - (low - m).clamp(min=0)).sum(-1)

    for _ in range(60):
        m = (left + right) / 2
        rises = slope(m) > 0
        left, right = torch.where(rises, left, m), torch.where(rises, m, right)
    at = left[..., None]
    total = ((at - high).clamp(min=0) ** 2 + (low - at).clamp(min=0) ** 2).sum(-1)
    return (total + 2 * slope(left) * (right - left) - total * 2.0**-40).clamp(min=0)


def _centers(groups: _Groups, values: Tensor) -> Tensor:
    x = groups.split(values)
    return x - x.mean(-1, keepdim=True) if groups.centered else x


def _moments(groups: _Groups, values: Range) -> tuple[Tensor, Tensor]:
    """Least and largest mean square of c, (batch, groups)."""
    n = groups.shape[1]
    low, high = groups.split(values.low), groups.split(values.high)
    if groups.centered:
        least = _least_spread(low, high)
        m = ((low + high) / 2).mean(-1, keepdim=True)
    else:
        m = torch.zeros(1, 1, 1, dtype=torch.float64)
        least = torch.maximum(low, -high).clamp(min=0).square().sum(-1) / _UP
    most = torch.maximum((low - m).abs(), (high - m).abs()).square().sum(-1) * _UP
    if values.center is not None and values.radius is not None:
        size = torch.linalg.vector_norm(_centers(groups, values.center), dim=-1)
        scale = groups.split(values.center).abs().amax(-1)
        reach = values.radius[:, None] + (n + 8) * 2.0**-50 * math.sqrt(n) * scale
        near = ((size - reach) / _UP).clamp(min=0).square() / _UP
        least = torch.maximum(least, near)
        most = torch.minimum(most, (size + reach).square() * _UP)
    return least / n / _UP, most / n * _UP


def _denominators(module: Any, groups: _Groups, values: Range) -> tuple[Tensor, Tensor, Tensor]:
    """Least s, largest s, and a bound of the root of 1 - t, each (batch, groups)."""
    least, most = _moments(groups, values)
    if groups.eps == 0 and not bool((least > 0).all()):
        raise ValueError(
            "divides by 0 where a group vanishes or is constant, which the domain does not "
            "exclude, and eps = 0: give a smaller domain, or a positive eps"
        )
    share = (most / (most + groups.eps).clamp(min=1e-300)).sqrt() * _UP
    return (
        (least + groups.eps).sqrt() / _UP,
        (most + groups.largest_eps).sqrt() * _UP,
        share.clamp(max=1.0),
    )


def _normalised(module: Any, groups: _Groups, values: Range) -> tuple[Tensor, Tensor]:
    r"""Interval of c / s: by division, and :math:`|c_i| \le s \sqrt{(n - 1)(1 - t)}`.

    (A centered vector has :math:`c_i^2 \le (1 - 1/n) \lVert c\rVert^2`; any has
    :math:`c_i^2 \le \lVert c\rVert^2`.)
    """
    n = groups.shape[1]
    least, most, share = (part[..., None] for part in _denominators(module, groups, values))
    middle, half = groups.split(values.middle), groups.split(values.half)
    size = groups.split(values.abs()).amax(-1, keepdim=True)
    if groups.centered:
        others = (half.sum(-1, keepdim=True) - half).clamp(min=0)
        half = (half * (n - 1) + others) / n
        middle = middle - middle.mean(-1, keepdim=True)
    slack = (n + 8) * 2.0**-50 * size * (2 if groups.centered else 0)
    low, high = outward(middle - half, middle + half, slack)
    low, high = outward(
        torch.where(low < 0, low / least, low / most),
        torch.where(high > 0, high / least, high / most),
    )
    cap = math.sqrt(n - 1 if groups.centered else n) * share * _UP
    return torch.maximum(low, -cap), torch.minimum(high, cap)


def _with_ball(module: Any, values: Range, low: Tensor, high: Tensor) -> Range:
    if values.center is None or values.radius is None:
        return Range(low, high)
    center = module(values.center.clone())
    radius = values.radius * local_lipschitz_rule(module, values, 2.0) * _UP
    return Range(low, high, center, radius + center.flatten(1).norm(dim=1) * 2.0**-36)


@_rule_of(*_NORMALISATIONS, dispatch=range_rule)
def _(module: Any, values: Range) -> Range:
    if _by_running_statistics(module):
        default: Any = range_rule.dispatch(object)
        return default(module, values)
    groups = _groups(module, values.shape)
    low, high = _normalised(module, groups, values)
    ends = torch.stack([low * groups.weight, high * groups.weight])
    low, high = outward(ends.amin(0), ends.amax(0))
    low, high = outward(low + groups.bias, high + groups.bias, groups.bias.abs() * 2.0**-50)
    low, high = low.view_as(values.low), high.view_as(values.high)
    if groups.eps != groups.largest_eps:  # its value at a center depends on the dtype
        return Range(low, high)
    found = _with_ball(module, values, low, high)
    # All of c / s lies in the ball of radius sqrt(n) for each group.
    radius = (groups.weight.abs().amax(1) ** 2 * torch.ones(groups.shape[0])).sum()
    whole = (radius * groups.shape[1]).sqrt() * _UP
    if found.center is None or found.radius is None or bool((found.radius <= whole).all()):
        return found
    far = (found.radius > whole).view(-1, *[1] * len(values.shape))
    middle = groups.bias.expand(groups.shape).reshape(1, *values.shape)
    return Range(
        low, high, torch.where(far, middle, found.center), found.radius.clamp(max=whole.item())
    )


@_rule_of(*_NORMALISATIONS, dispatch=local_lipschitz_rule)
def _(module: Any, values: Range, p: float) -> Tensor:
    if _by_running_statistics(module):
        bound = lipschitz_rule(module, values.shape, p).value
        return torch.full_like(values.low.flatten(1)[:, 0], bound)
    groups = _groups(module, values.shape)
    least, _, _ = _denominators(module, groups, values)
    t = (groups.eps / least.square() * _UP).clamp(max=1.0)
    return (_stretch(groups, t, p)[0] / least).amax(1) * _UP


@_rule_of(*_NORMALISATIONS, dispatch=pullback_rule)
def _(module: Any, cotangent: tuple[Tensor, Tensor], values: Range) -> tuple[Tensor, Tensor] | None:
    r"""Multiply by :math:`(C - z z^\top / n)\operatorname{diag}(\gamma) / s`, for z = c / s."""
    if _by_running_statistics(module):
        default: Any = pullback_rule.dispatch(object)
        return default(module, cotangent, values)
    groups = _groups(module, values.shape)
    n = groups.shape[1]
    least, most, _ = (part[:, None, :, None] for part in _denominators(module, groups, values))
    low, high = _normalised(module, groups, values)
    z = ((low + high) / 2)[:, None], ((high - low) / 2 * _UP)[:, None]
    inverse = (1 / least + 1 / most) / 2, (1 / least - 1 / most).clamp(min=0) / 2 * _UP
    center, radius = (part.flatten(2).unflatten(2, groups.shape) for part in cotangent)
    h = center * groups.weight, radius * groups.weight.abs() * _UP
    inner = interval_product(h, *z)
    inner = (inner[0].sum(-1, keepdim=True) / n, inner[1].sum(-1, keepdim=True) / n)
    back = interval_product((inner[0].expand_as(h[0]), inner[1].expand_as(h[0])), *z)
    spread = h[1]
    middle = h[0]
    size = (h[0].abs() + h[1]).sum(-1, keepdim=True) + inner[0].abs() * z[0].abs().sum(
        -1, keepdim=True
    )
    if groups.centered:
        middle = middle - middle.mean(-1, keepdim=True)
        spread = (spread * (n - 2) + spread.sum(-1, keepdim=True)) / n
    rounding = (n + 8) * 2.0**-50 * size
    total = middle - back[0], spread.clamp(min=0) + back[1] + rounding
    center, radius = interval_product(total, *inverse)
    return center.reshape(*center.shape[:2], *values.shape), radius.reshape(
        *center.shape[:2], *values.shape
    )


# ------------------------------------------------------------------------ to unit length


class UnitNormalize(nn.Module):
    r"""Division by the Euclidean norm along dimensions: :func:`torch.nn.functional.normalize`.

    .. math:: f(x) = x / \max(\lVert x\rVert_2, \varepsilon)

    **Guaranteed**: :math:`\operatorname{Lip}_2(f) = 1/\varepsilon`, and
    :math:`\operatorname{Lip}_1(f) = \operatorname{Lip}_\infty(f) = (1 + \sqrt n) / (2 \varepsilon)`
    for vectors of n > 1 entries. Inside the ball of radius ε the map is :math:`x / \varepsilon`;
    outside, :math:`J = (I - uu^\top) / \lVert x\rVert` with :math:`u = x / \lVert x\rVert`, of
    2-norm at most :math:`1/\varepsilon`, whose row sums :math:`1 - u_i^2 + |u_i| \sum_{j \ne i}
    |u_j|` have the maximum :math:`(1 + \sqrt n)/2` (Note [Jacobian of a normalisation], t = 0). On
    a domain with :math:`\lVert x\rVert \ge m` put :math:`\max(m, \varepsilon)` for ε.

    Parameters
    ----------
    dim : int or tuple of int
        Dimensions of a batch that are normalised together, not the first.
    eps : float
        :math:`\varepsilon`.

    Examples
    --------
    >>> UnitNormalize()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def __init__(self, dim: int | tuple[int, ...] = 1, eps: float = 1e-12) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dim={self.dim}, eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch."""
        return functional.normalize(x, 2.0, self.dim, self.eps)  # type: ignore[arg-type]

    def dims(self, input_shape: Shape) -> list[int]:
        """Name the dimensions from the front."""
        given = (self.dim,) if isinstance(self.dim, int) else self.dim
        dims = [d % (len(input_shape) + 1) for d in given]
        if 0 in dims:
            raise ValueError("normalises over the batch, which mixes samples: name a dimension")
        return dims

    def slopes(self, input_shape: Shape, p: float) -> float:
        """Largest norm of the Jacobian times the divisor."""
        n = math.prod(input_shape[d - 1] for d in self.dims(input_shape))
        return 1.0 if p == 2 or n == 1 else (1 + math.sqrt(n)) / 2

    def divisor(self, values: Range) -> Tensor:
        """Least divisor on a domain, of a shape that broadcasts to a batch."""
        dims = self.dims(values.shape)
        near = torch.maximum(values.low, -values.high).clamp(min=0)
        least = torch.linalg.vector_norm(near, dim=dims, keepdim=True)
        if values.center is not None and values.radius is not None:
            size = torch.linalg.vector_norm(values.center, dim=dims, keepdim=True)
            reach = values.radius.view(-1, *[1] * len(values.shape))
            least = torch.maximum(least, (size / _UP - reach * _UP))
        least = (least / _UP).clamp(min=self.eps)
        if not bool((least > 0).all()):
            raise ValueError("divides by 0, which the domain does not exclude, and eps = 0")
        return least


@lipschitz_rule.register
def _(module: UnitNormalize, input_shape: Shape, p: float) -> Bound:
    slope = module.slopes(input_shape, p)
    if not module.eps > 0:
        raise ValueError(f"with eps = {module.eps:g} {NEEDS_DOMAIN}")
    return Bound(slope / module.eps, "exact", p)


@local_lipschitz_rule.register
def _(module: UnitNormalize, values: Range, p: float) -> Tensor:
    slope = module.slopes(values.shape, p)
    return (slope / module.divisor(values)).flatten(1).amax(1) * _UP


@range_rule.register
def _(module: UnitNormalize, values: Range) -> Range:
    least = module.divisor(values)
    most = torch.linalg.vector_norm(values.abs(), dim=module.dims(values.shape), keepdim=True)
    most = (most * _UP).clamp(min=module.eps)
    low = torch.where(values.low < 0, values.low / least, values.low / most)
    high = torch.where(values.high > 0, values.high / least, values.high / most)
    low, high = outward(low, high)
    return _with_ball(module, values, low.clamp(min=-1.0), high.clamp(max=1.0))


# -------------------------------------------------------------- local response normalisation


@lipschitz_rule.register
def _(module: nn.LocalResponseNorm, input_shape: Shape, p: float) -> Bound:
    r"""Bound :math:`y_i = x_i D_i^{-\beta}` by the entries of its Jacobian.

    With :math:`D_i = k + \frac\alpha m \sum_{j \in W_i} x_j^2` the entries of the Jacobian are
    :math:`D_i^{-\beta}(\delta_{ij} - 2\beta\, e_{ij})` with
    :math:`e_{ij} = \frac\alpha m x_i x_j / D_i` for j in the window of i, which has at most m
    entries. Since :math:`D_i \ge \frac\alpha m \lVert x_{W_i}\rVert^2`, :math:`|e_{ij}| \le 1/2`
    for :math:`j \ne i`, :math:`0 \le e_{ii} \le 1`, and :math:`\sum_j |e_{ij}| \le (1 + \sqrt m)/2`
    as for a unit vector. With :math:`D_i \ge k` this bounds rows and columns, and
    :math:`\lVert J\rVert_2^2 \le \lVert J\rVert_1 \lVert J\rVert_\infty`.
    """
    k, alpha, beta = module.k, module.alpha, module.beta
    if not (k > 0 and alpha >= 0 and beta >= 0):
        raise ValueError(
            "is Lipschitz on all of space for k > 0, alpha >= 0 and beta >= 0, got "
            f"k = {k:g}, alpha = {alpha:g}, beta = {beta:g}"
        )
    m = min(module.size, input_shape[0])
    rows = 1 + beta * (1 + math.sqrt(m))
    columns = 1 + beta * (1 + m)
    norm = {1.0: columns, 2.0: math.sqrt(rows * columns), math.inf: rows}[p]
    return Bound(norm * float(k) ** -beta * _UP, "upper bound", p)


# ------------------------------------------------------------------- errors of programs

# Note [rounding of a normalisation]
# torch computes the mean and the variance of a group by Welford's updates in chunks of 16 numbers,
# merged in pairs and then lane by lane, or (instance norm) by two passes. GroupNorm of inputs with
# channels last takes the square of the mean off the mean of squares: it is refused. With M the
# largest modulus in the group, n its size, and sigma^2 the variance:
#
# Mean. A sum of n numbers and a quotient are off by gamma_(n+2) M. An update m + (x - m) c adds
# at most u (M + 6 c M) and averages the errors before; with c = 1 (m = 0) it is exact. Over a
# chunk of 16 this adds up to (1/16) sum_(i<=16) i (1 + 6/i) <= 15, over the rest of 15 numbers to
# 14, over the lanes to 22; a merge in pairs adds 7, and there are at most 2 D + 1 of them with
# D = max(1, log2(n / 32)) for lanes of two or more. So every mean and partial mean is off by
#     e = gamma_K M (1 + 2 gamma_K),  K = 60 + 14 D,  for instance norm K = max(n + 8, 60 + 14 D).
#
# Variance. Two passes sum (x_i - m)^2, which is n sigma^2 + n (m - mean)^2 exactly. Welford's sum
# has a term d d' for a number, d' = w d with w >= 1/2 (the first is 0), and w d^2 for a merge,
# w = ab / (a + b); exactly they are not negative and add up to S = n sigma^2. As d and d' in a step
# are off by e, in a merge by 2 e, the sum is off by
#     2 sqrt2 e sum sqrt(w) |d| + n e^2 + sum_merges (4 e w |d| + 4 e^2 w) <= 2 B sqrt(S) + B^2,
#     B = e sqrt(n) (sqrt2 + 2 sqrt(W)),  W = log2(n) / 4,
# by Cauchy-Schwarz; the weights w of the merges of a tree of n leaves add up to n log2(n) / 4 at
# most, since ab / n <= (n / 4) H2(a / n) for the binary entropy H2 >= 4 (a/n)(b/n). A path has
# K + 70 relative roundings, g = gamma_(K+70) <= 1/100. Hence
#     |sqrt(computed) - sigma| <= A = 2.5 (1 + g) B / sqrt(n) + g sigma.
# (From below: (sqrt(S) - 2.5 B' - g sqrt(S))^2 <= S - 2 B' sqrt(S) - B'^2 - g S where that root is
# positive.) Otherwise sigma < A, and what is computed may be negative. A <= s / 4 is asked for:
# then eps >= (15/16) s^2 >= 15 A^2 there, next to which what is off, at most 2 b A + b^2 + g A^2
# with b = (1 + g) B / sqrt(n) <= A / 2.5, keeps the root within A of s, too.
#
# Result. s = sqrt(sigma^2 + eps) is 1-Lipschitz in sigma, so 1 / s is off by a relative
# h = r / (1 - r), r = A / s + 8u. With z = (x - mean) / s, in either order, (x - m) r or x r - m r,
# with gamma and beta inside or behind,
#     |error| <= |gamma| (|z| (h + 12u) + (e + 24 u M) (1 + h) / s) + 8u |beta|.


@dataclasses.dataclass(frozen=True)
class _Moments:
    """What is known of the groups of a set of inputs, each (batch, groups)."""

    largest: Tensor  # M
    sigma: Tensor  # the largest
    s: Tensor  # the least


def _moment_errors(
    module: nn.Module,
    groups: _Groups,
    known: _Moments,
    size: Tensor,
    dtype: torch.dtype,
    p: float,
) -> Tensor:
    """Bound of the note for entries with |z| <= size, (batch,)."""
    n, u = groups.shape[1], torch.finfo(dtype).eps / 2
    k = 60 + 14 * max(1, math.ceil(math.log2(max(n, 2) / 32)))
    if isinstance(module, _INSTANCE):
        k = max(n + 8, k)
    gamma, g = _gamma(k, dtype), _gamma(k + 70, dtype)
    off = gamma * (1 + 2 * gamma) * known.largest + 4 * n * _quantum(dtype)
    b = off * (math.sqrt(2) + math.sqrt(math.log2(max(n, 2))))
    spread = 2.5 * (1 + g) * b + g * known.sigma + math.sqrt(n * torch.finfo(dtype).tiny)
    share = spread / known.s
    r = share + 8 * u
    h = r / (1 - r).clamp(min=0.5)
    info = torch.finfo(dtype)
    fits = (share <= 0.25) & (known.largest**2 * n < info.max / 64) & torch.tensor(g <= 0.01)
    weight, bias = groups.weight.abs(), groups.bias.abs()
    inner = (off + 24 * u * known.largest) * (1 + h) / known.s
    error = weight * (size * (h + 12 * u)[..., None] + inner[..., None]) + 8 * u * bias
    error = error + 8 * _quantum(dtype) * (1 + weight + bias)
    return _entrywise(torch.where(fits[..., None], error, math.inf), p)


def _checked_groups(module: Any, example: Tensor) -> _Groups:
    _check_single(example)
    if module.eps is None:
        raise ValueError(
            "eps=None takes the eps of the dtype, so that the program has another function in "
            "each: give eps, or use sound=False"
        )
    groups = _groups(module, tuple(example.shape[1:]))
    least = torch.finfo(example.dtype).tiny * 2.0**20 * groups.shape[1]
    if not groups.eps > least:
        raise ValueError(
            f"eps must be larger than {least:.3g}, below which squares vanish, got "
            f"{groups.eps:g}: use sound=False"
        )
    _check_layout(module, example)
    return groups


def _check_layout(module: nn.Module, x: Tensor) -> None:
    """Refuse inputs whose variance torch computes with cancellation."""
    if isinstance(module, nn.GroupNorm) and not x.is_contiguous():
        raise ValueError(
            "of inputs that are not contiguous (channels last) the square of the mean is taken off "
            "the mean of squares, whose rounding has no useful bound: call .contiguous(), or use "
            "sound=False"
        )


@_error_rule_of(nn.LayerNorm, nn.GroupNorm, *_INSTANCE)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    r"""Bound of Note [rounding of a normalisation] within :math:`d = s / 8` of the input.

    As :math:`x \mapsto Cx` is nonexpansive, s falls by at most :math:`\lVert v - x\rVert_2 /
    \sqrt n \le \lVert v - x\rVert_p \le d`, to 7/8, while an entry of :math:`Cx` moves by
    :math:`2 d` at most.
    """
    if _by_running_statistics(module):
        return _running_error(module, example, p)
    groups = _checked_groups(module, example)
    lipschitz = _closed_form(module, example, p)
    n = groups.shape[1]

    def analysis(x: Tensor) -> ForwardError:
        _check_layout(module, x)
        values = x.double()
        outputs = module(x)
        c = _centers(groups, values)
        m = groups.split(values).abs().amax(-1)
        sigma = torch.linalg.vector_norm(c, dim=-1) / math.sqrt(n) + (n + 8) * 2.0**-50 * m
        s = ((sigma - (n + 8) * 2.0**-48 * m).clamp(min=0).square() + groups.eps).sqrt() / _UP
        limit = s.amin(1) / 8
        reach = limit[:, None]
        known = _Moments((m + reach) * _UP, (sigma + reach) * _UP, s * 7 / 8 / _UP)
        near = c.abs() + 2 * reach[..., None] + (n + 8) * 2.0**-50 * m[..., None]
        size = (near / known.s[..., None] * _UP).clamp(max=math.sqrt(n))
        error = _moment_errors(module, groups, known, size, x.dtype, p)
        limit = torch.where(error.isfinite(), limit, -math.inf)
        return ForwardError(outputs, lipschitz, error, 0.0, limit / _UP)

    return analysis


def _running_error(module: Any, example: Tensor, p: float) -> Analysis:
    """Error of an instance norm by running statistics: a scale and a shift."""
    _check_single(example)
    lipschitz = _closed_form(module, example, p) * _UP
    scale = _running_scale(module).abs()
    shift = module.running_mean.double().abs() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double().abs()
    positions = example[0, 0].numel()
    bias_norm = torch.linalg.vector_norm(shift, p).item() * positions ** (1 / p) * _UP
    affine = _Affine(module, lipschitz, lipschitz, bias_norm, scale.max().item() * _UP, 10)
    return lambda x: affine(x, p)


@_rule_of(nn.LayerNorm, nn.GroupNorm, *_INSTANCE, dispatch=range_error_rule)
def _(module: Any, example: Tensor, p: float) -> RangeAnalysis:
    """Bound of Note [rounding of a normalisation] with the moments of a range."""
    if _by_running_statistics(module):
        default: Any = range_error_rule.dispatch(object)
        return default(module, example, p)
    groups = _checked_groups(module, example)
    dtype = example.dtype

    def analysis(values: Range) -> Tensor:
        least, most, _ = _denominators(module, groups, values)
        largest = groups.split(values.abs()).amax(-1)
        low, high = _normalised(module, groups, values)
        known = _Moments(largest * _UP, most, least)
        size = torch.maximum(low.abs(), high.abs())
        return _moment_errors(module, groups, known, size, dtype, p)

    return analysis


@_error_rule_of(nn.RMSNorm)
def _(module: nn.RMSNorm, example: Tensor, p: float) -> Analysis:
    """Nothing cancels: n squares, their sum, quotient, sum with eps, root, and two products."""
    return _quotients(module, example, p, _quotient_roundings(module, example))


@_error_rule_of(UnitNormalize)
def _(module: UnitNormalize, example: Tensor, p: float) -> Analysis:
    """N squares, their sum, a root, a quotient; squares that underflow matter next to eps."""
    return _quotients(module, example, p, _quotient_roundings(module, example))


def _unit_roundings(module: UnitNormalize, example: Tensor) -> int:
    _check_single(example)
    shape, dtype = tuple(example.shape[1:]), example.dtype
    n = math.prod(shape[d - 1] for d in module.dims(shape))
    lost = math.sqrt(n * torch.finfo(dtype).tiny) / module.eps if module.eps > 0 else math.inf
    if not lost < 2.0**-10:
        raise ValueError(
            f"eps must be larger than the squares that vanish in {dtype}, got {module.eps:g}: use "
            "sound=False"
        )
    return n + 12 + math.ceil(4 * lost / torch.finfo(dtype).eps)


@_error_rule_of(nn.LocalResponseNorm)
def _(module: nn.LocalResponseNorm, example: Tensor, p: float) -> Analysis:
    r"""Relative errors of :math:`x D^{-\beta}`: those of D, times β, of the power, and two more.

    D has m + 8 roundings, the exponent one, which :math:`|\log D| \le 89` (710) multiplies.
    """
    return _quotients(module, example, p, _quotient_roundings(module, example))


def _response_roundings(module: nn.LocalResponseNorm, example: Tensor) -> int:
    _check_single(example)
    m = min(module.size, example.shape[1])
    logarithm = math.log(torch.finfo(example.dtype).max)
    units = _ELEMENTARY + 8 + module.beta * (m + 8 + logarithm)
    return math.ceil(units * 1.1)


def _quotient_roundings(module: Any, example: Tensor) -> int:
    """Relative roundings of an output."""
    if isinstance(module, UnitNormalize):
        return _unit_roundings(module, example)
    if isinstance(module, nn.LocalResponseNorm):
        return _response_roundings(module, example)
    return _checked_groups(module, example).shape[1] + 16


@_rule_of(nn.RMSNorm, UnitNormalize, nn.LocalResponseNorm, dispatch=range_error_rule)
def _(module: Any, example: Tensor, p: float) -> RangeAnalysis:
    """So many roundings of the largest output of each entry."""
    gamma = _gamma(_quotient_roundings(module, example) + 1, example.dtype)
    info, twin = torch.finfo(example.dtype), copy.deepcopy(module).double()
    quantum = 8 * _quantum(example.dtype)

    def analysis(values: Range) -> Tensor:
        size = range_rule(twin, values).abs()
        fits = values.norms(2).square() < info.max / 64
        fits = fits.view(-1, *[1] * (size.dim() - 1)) & (size < info.max / 8)
        return _entrywise(torch.where(fits, gamma * (1 + gamma) * size + quantum, math.inf), p)

    return analysis


def _quotients(module: nn.Module, example: Tensor, p: float, roundings: int) -> Analysis:
    """Relative errors of quotients by roots of sums of squares, which must not overflow."""
    lipschitz = _closed_form(module, example, p)
    most = math.sqrt(torch.finfo(example.dtype).max / 8 / example[0].numel())

    def analysis(x: Tensor) -> ForwardError:
        size = _norms(x, p)
        result = _relative(module, x, p, lipschitz, roundings)
        return dataclasses.replace(result, limit=torch.minimum(result.limit, most - size))

    return analysis
