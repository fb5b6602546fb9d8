r"""Distances in the ∞-norm as units: networks that are 1-Lipschitz in that norm and can select.

A linear unit whose weights have absolute sum 1 averages, and is 1-Lipschitz in the ∞-norm. A unit
here measures how far its input is from a point: by the largest deviation, or by a sum of the sorted
deviations with falling weights. It is 1-Lipschitz in that norm too, and one entry can decide it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipbook.composition import Bound, lipschitz_rule
from lipbook.errors import (
    Analysis,
    _Affine,
    _bias_norm,
    _check_single,
    _cuda_rule_of,
    _error_rule_of,
    plain_kernels,
)
from lipbook.graphs.operations import traced_as
from lipbook.norms import dual_exponent
from lipbook.norms.arguments import _floating, _integer, _real
from lipbook.norms.rigorous import _UP
from lipbook.rules import Range, Shape, outward, range_rule

__all__ = ["InfinityDistance", "sorted_distance"]

_BLOCK = 2**15  # differences of a sample that are held at once

# torch.fx records a call of these as one step.
torch.fx.wrap("sorted_distance")
torch.fx.wrap("_drawn")


@traced_as(lambda weight, bias=None, decay=0.0: _measuring(weight, bias, decay))
def sorted_distance(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, decay: float = 0.0
) -> Tensor:
    r"""Weighted sums of the sorted deviations from points; with decay 0 their largest one.

    .. math::
        u_j = \sum_{k=1}^{n} (1 - \rho)\, \rho^{k-1}\, \lvert x - w_j \rvert_{(k)} + b_j,
        \qquad \lvert\cdot\rvert_{(1)} \ge \dots \ge \lvert\cdot\rvert_{(n)}

    For :math:`\rho = 0` it is :math:`\lVert x - w_j \rVert_\infty + b_j`.

    **Guaranteed**: with :math:`c_k = (1 - \rho) \rho^{k-1}`, a unit is
    :math:`\lVert c \rVert_{p^*}`-Lipschitz from the :math:`\ell_p` norm, and no better; from the
    ∞-norm that is :math:`1 - \rho^n`. For the :math:`c_k` fall, so that the sum is the largest of
    all that pair them with the deviations in some order, and a gradient has the entries
    :math:`\pm c_k`, in some order. Terms that together are less than the square of the machine
    precision times the largest deviation are left out.

    Parameters
    ----------
    x : torch.Tensor
        (batch, \*, n).
    weight : torch.Tensor
        The points :math:`w_j`, (m, n).
    bias : torch.Tensor, optional
        :math:`b`, (m,).
    decay : float
        :math:`\rho` in [0, 1).

    Returns
    -------
    torch.Tensor
        (batch, \*, m).

    Raises
    ------
    TypeError
        If ``x``, ``weight`` or ``bias`` is no real floating-point tensor, or ``decay`` no number.
    ValueError
        If shapes do not fit or ``decay`` is out of range.

    Examples
    --------
    >>> x, w = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 4.0]])
    >>> sorted_distance(x, w)
    tensor([[4.]])
    >>> sorted_distance(x, w, decay=0.5)  # 4 / 2 + 2 / 4 + 1 / 8
    tensor([[2.6250]])

    References
    ----------
    :cite:t:`zhang2021linfdist`, equation 2; :cite:t:`zhang2022boolean`, section 5, as SortNet.
    """
    _check(x, weight, bias, decay)
    distances = torch.cat([_sums((x.unsqueeze(-2) - w).abs(), decay) for w in _blocks(weight)], -1)
    return distances if bias is None else distances + bias


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, _BLOCK // weight.shape[1]))


def _coefficients(decay: float, n: int, dtype: torch.dtype) -> list[float]:
    """Factors c_k, without those that together are below the square of the precision."""
    count = 1
    if decay > 0:
        count = min(n, 1 + math.ceil(2 * math.log(torch.finfo(dtype).eps) / math.log(decay)))
    return [(1 - decay) * decay**k for k in range(count)]


def _sums(deviations: Tensor, decay: float) -> Tensor:
    """Sum the largest along the last dimension, with their factors."""
    if decay == 0:
        return deviations.amax(-1)
    factors = _coefficients(decay, deviations.shape[-1], deviations.dtype)
    shares = torch.tensor(factors, dtype=deviations.dtype).to(deviations.device)
    return (deviations.topk(len(factors)).values * shares).sum(-1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, decay: float) -> None:
    _floating("x", x, 2)
    _floating("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (m, n), got {tuple(weight.shape)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape (batch, *, {weight.shape[1]}), as many entries as a row of weight, "
            f"got {tuple(x.shape)}"
        )
    if bias is not None:
        _floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    _check_decay(decay)


def _check_decay(decay: float) -> None:
    _real("decay", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")


class InfinityDistance(nn.Module):
    r"""Layer of :math:`\ell_\infty` distances to learnt points, or of sums of sorted deviations.

    .. math::
        u_j = \lVert x - w_j \rVert_\infty + b_j, \qquad\text{or}\qquad
        u_j = \sum_{k} (1 - \rho)\, \rho^{k-1}\, \lvert x - w_j \rvert_{(k)} + b_j

    with a decay :math:`\rho > 0`: see :func:`sorted_distance`. 1-Lipschitz in the
    :math:`\ell_\infty` norm. In the :math:`\ell_p` norm m units have the constant
    :math:`m^{1/p} \lVert c \rVert_{p^*}`, which is attained where all look at the same entries.

    **In training mode** with :math:`\rho > 0` each call draws the entries that count, each with
    probability :math:`1 - \rho`, the same for the batch and all units, and takes the largest
    deviation among them. Its expectation is the sum: the largest :math:`k - 1` deviations are all
    left out and the next is not with probability :math:`\rho^{k-1} (1 - \rho)`. So no step sorts.
    The numbers come from torch's generator, as in :class:`torch.nn.Dropout`. Expectations of
    several layers do not compose: a network changes a little when it goes to evaluation mode.

    Weights are drawn from the standard normal distribution, biases are 0.

    Parameters
    ----------
    in_features, out_features : int
        Numbers n of inputs and m of units.
    decay : float
        :math:`\rho` in [0, 1).
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError
        If a number of features is no integer, or ``decay`` no number.
    ValueError
        If a number of features is not positive, or ``decay`` out of range; when called, as
        :func:`sorted_distance`.

    Notes
    -----
    Where deviations are equal and largest, the gradient in evaluation mode is a mean of theirs; in
    training mode, by ``torch.cdist``, their sum.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = InfinityDistance(5, 4)
    >>> lipschitz_bound(layer, (5,), p=math.inf).value
    1.0
    >>> x = torch.randn(100, 5)
    >>> steps = torch.rand(100, 5) - 0.5
    >>> moved = (layer(x + steps) - layer(x)).abs().amax(1)
    >>> bool((moved <= steps.abs().amax(1) + 1e-6).all())
    True

    References
    ----------
    :cite:t:`zhang2021linfdist` for :math:`\rho = 0`, :cite:t:`zhang2022boolean` for SortNet and its
    training.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        decay: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = _integer("in_features", in_features, 1)
        self.out_features = _integer("out_features", out_features, 1)
        _check_decay(decay)
        self.decay = float(decay)
        weight = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        made = nn.Parameter(torch.empty_like(weight[:, 0])) if bias else None
        self.register_parameter("bias", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw points from the standard normal distribution, and set biases to 0."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the arguments."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, decay={self.decay}, bias={bias}"

    def forward(self, x: Tensor) -> Tensor:
        """Measure distances, (batch, *, n) to (batch, *, m)."""
        if not self.training:
            return sorted_distance(x, self.weight, self.bias, self.decay)
        return _drawn(x, self.weight, self.bias, self.decay)


def _drawn(x: Tensor, weight: Tensor, bias: Tensor | None, decay: float) -> Tensor:
    """Distances by the entries that are drawn, all of them with decay 0."""
    _check(x, weight, bias, decay)
    if decay > 0:
        kept = torch.rand(weight.shape[1], device=x.device) >= decay
        if not kept.any():  # of no entries the largest is 0
            kept[0] = True
            x, weight = x * 0, weight * 0
        x, weight = x[..., kept], weight[:, kept]
    if _transformed():  # by what torch.cdist does not know
        return sorted_distance(x, weight, bias)
    distances = torch.cdist(x, weight, p=math.inf)
    return distances if bias is None else distances + bias


def _transformed() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _measuring(weight: Tensor, bias: Tensor | None, decay: float) -> InfinityDistance:
    m, n = weight.shape
    layer = InfinityDistance(n, m, decay, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), False)
    return layer.eval()


# ----------------------------------------------------------------------- answers of the layer


def _at_rest(module: InfinityDistance) -> None:
    if module.training and module.decay > 0:
        raise ValueError("draws the entries that count in training mode: call .eval()")


def _norm(module: InfinityDistance, p: float) -> float:
    """Lipschitz constant from the p-norm of n inputs to that of m units."""
    if p == math.inf:
        return 1 - module.decay**module.in_features
    terms = range(module.in_features)
    factors = [(1 - module.decay) * module.decay**k for k in terms]
    unit = torch.tensor(factors, dtype=torch.float64).norm(dual_exponent(p)).item()
    return unit * module.out_features ** (1 / p)


@lipschitz_rule.register
def _(module: InfinityDistance, input_shape: Shape, p: float) -> Bound:
    _at_rest(module)
    return Bound(_norm(module, p), "exact", p)


@range_rule.register
def _(module: InfinityDistance, values: Range) -> Range:
    _at_rest(module)
    # A sum of sorted deviations rises with each of them, and a box has all at their ends at once.
    low, high = values.low[..., None, :], values.high[..., None, :]
    blocks = _blocks(module.weight.detach())
    near = [torch.maximum(low - w, w - high).clamp(min=0) for w in blocks]
    far = [torch.maximum(high - w, w - low) for w in blocks]
    bias = 0.0 if module.bias is None else module.bias.detach()
    least, largest = (
        torch.cat([_sums(block, module.decay) for block in part], -1) + bias for part in (near, far)
    )
    size = torch.maximum(least.abs(), largest.abs()) + 2 * torch.as_tensor(bias).abs()
    return Range(*outward(least, largest, _roundings(module, torch.float64) * 2.0**-50 * size))


def _roundings(module: InfinityDistance, dtype: torch.dtype) -> int:
    """On a path: a difference, a factor in float64, a product, a sum; and what is left out."""
    count = len(_coefficients(module.decay, module.in_features, dtype))
    return count + 8 if module.decay > 0 else 1


@_error_rule_of(InfinityDistance)
def _(module: InfinityDistance, example: Tensor, p: float) -> Analysis:
    # An entry is off by gamma times the largest deviation and the bias: sorted sums of deviations
    # that are off by a number are off by no more.
    _check_single(example)
    _at_rest(module)
    if module.weight.dtype != example.dtype:
        raise ValueError(
            f"must run in the dtype of its weight {module.weight.dtype}, got {example.dtype}"
        )
    entries = module.out_features ** (1 / p) * _UP
    offset = module.weight.detach().double().abs().amax().cpu()
    if module.bias is not None:
        offset = offset + module.bias.detach().double().abs().amax().cpu()
    units = math.prod(example.shape[1:-1]) * module.out_features
    shift = _bias_norm(offset[None], torch.float64, units, p)
    lipschitz = _norm(module, p) * (1 + 2.0**-40)
    terms = _roundings(module, example.dtype)
    affine = _Affine(module, lipschitz, entries, shift, 1.0, terms)
    return lambda x: affine(x, p)


_cuda_rule_of(InfinityDistance)(plain_kernels)
