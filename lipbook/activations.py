r"""Norm-preserving activations: sorting, reflecting and folding instead of clipping.

ReLU keeps one of two gradients and loses the other. The activations here lose none: wherever
they are differentiable, and at ties as well, their Jacobian is an orthogonal matrix. A sorting
activation permutes its inputs, so that it keeps every :math:`\ell_p` norm; a Householder
activation reflects them, so that it keeps the :math:`\ell_2` norm; the absolute value changes
signs. Each comes as a function, then as a module with its Lipschitz rule
(:func:`~lipbook.composition.lipschitz_rule`).

Channels are dimension ``dim`` of the input, 1 by default: (batch, channels, ...).
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lipbook.composition import Bound, lipschitz_rule
from lipbook.errors import (
    Analysis,
    ForwardError,
    _closed_form,
    _cuda_rule_of,
    _entries,
    _error_rule_of,
    _norms,
    _quantum,
    moved_error,
    plain_kernels,
)
from lipbook.graphs.operations import traced_as
from lipbook.layers.elementwise import Absolute, register_like
from lipbook.norms.arguments import _floating, _integer, _tensor
from lipbook.norms.rigorous import _UP
from lipbook.rules import Range, Shape, _rule_of, pullback_rule, range_rule
from lipbook.units import Kinks, Units, sorted_units, units_rule

__all__ = [
    "group_sort",
    "max_min",
    "full_sort",
    "householder",
    "absolute_value",
    "GroupSort",
    "MaxMin",
    "FullSort",
    "Householder",
    "AbsoluteValue",
]

Pairing = Literal["neighbours", "halves"]
_PAIRINGS = ("neighbours", "halves")

# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("group_sort")
torch.fx.wrap("max_min")
torch.fx.wrap("full_sort")
torch.fx.wrap("householder")
torch.fx.wrap("absolute_value")

# Note [ties]
# Where two sorted entries are equal, or an absolute value is taken of zero, any choice of a
# subgradient is legal, and most choices lose norm: the gradient of torch.maximum is (1/2, 1/2) at
# a tie, that of torch.abs is 0 at 0, and those of torch.max and torch.min name the same entry
# twice. The functions below select by a mask or torch.sort, whose gradients are those of the
# branch taken: a permutation, a reflection, a sign. Ties are no rare event: images have flat
# regions, and a layer of zeros meets every tie at once.


@traced_as(lambda group_size, dim=1: GroupSort(group_size, dim))
def group_sort(x: Tensor, group_size: int, dim: int = 1) -> Tensor:
    r"""GroupSort: sorts each group of neighbouring channels in ascending order.

    .. math::
        \operatorname{GroupSort}_k(x) = \big(\operatorname{sort}(x_1, \dots, x_k),
        \operatorname{sort}(x_{k+1}, \dots, x_{2k}), \dots\big)

    The Jacobian is a permutation matrix, also at ties. **Guaranteed**: 1-Lipschitz in every
    :math:`\ell_p` norm, and all singular values of the Jacobian are 1.

    Parameters
    ----------
    x : torch.Tensor
        Any shape with ``channels`` entries along ``dim``.
    group_size : int
        Length :math:`k` of a group; a divisor of ``channels``.
    dim : int
        The dimension of the channels.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    TypeError
        If ``group_size`` is no integer.
    ValueError
        If ``group_size`` is less than 1 or does not divide the channels, or ``x`` has no
        dimension ``dim``.

    Examples
    --------
    >>> x = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 6.0]])
    >>> group_sort(x, 3)
    tensor([[1., 2., 3., 4., 5., 6.]])
    >>> group_sort(x, 2)
    tensor([[1., 3., 2., 5., 4., 6.]])

    References
    ----------
    :cite:t:`anil2019sorting`.
    """
    dim = _channel_dim(x, dim)
    group_size = _group_size(group_size)
    _check_divides("group_size", group_size, x, dim)
    groups = x.unflatten(dim, (-1, group_size))
    if group_size == 2:
        return _sorted_pairs(groups, dim + 1).flatten(dim, dim + 1)
    return groups.sort(dim + 1).values.flatten(dim, dim + 1)


@traced_as(lambda dim=1, pairing="neighbours": MaxMin(dim, pairing))
def max_min(x: Tensor, dim: int = 1, pairing: Pairing = "neighbours") -> Tensor:
    r"""MaxMin on neighbouring channels (2i, 2i+1), minimum first: equal to ``group_sort(x, 2)``.

    .. math::
        (x_{2i},\, x_{2i+1}) \mapsto
        \big(\min(x_{2i}, x_{2i+1}),\, \max(x_{2i}, x_{2i+1})\big)

    Networks of other libraries pair differently. ``pairing="halves"`` is the layout that most
    released weights were trained with: channel :math:`i` meets channel :math:`i + c/2`, and
    **all maxima come first**, then all minima. The layouts differ by a permutation of the
    channels on both sides, so that a network loses nothing by either; only weights trained
    with one are meaningless with the other.

    **Guaranteed**: 1-Lipschitz in every :math:`\ell_p` norm, all singular values of the Jacobian
    are 1, also at ties.

    Parameters
    ----------
    x : torch.Tensor
        Any shape with an even number of channels along ``dim``.
    dim : int
        The dimension of the channels.
    pairing : str
        ``"neighbours"`` (outputs min, max, min, max, ...) or ``"halves"`` (outputs max, max, ...,
        min, min, ...).

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If the number of channels is odd, ``pairing`` is unknown, or ``x`` has no dimension ``dim``.

    Examples
    --------
    >>> x = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    >>> max_min(x)
    tensor([[1., 3., 2., 5.]])
    >>> max_min(x, pairing="halves")
    tensor([[3., 5., 2., 1.]])

    At a tie the Jacobian is still a permutation:

    >>> torch.func.jacrev(max_min)(torch.zeros(1, 2)).reshape(2, 2)
    tensor([[1., 0.],
            [0., 1.]])

    References
    ----------
    :cite:t:`chernodub2016oplu`, as OPLU; :cite:t:`anil2019sorting`.
    """
    _check_pairing(pairing)
    if pairing == "neighbours":
        return group_sort(x, 2, dim)
    dim = _channel_dim(x, dim)
    _check_divides("pairs of channels, that is 2,", 2, x, dim)
    return _sorted_pairs(x.unflatten(dim, (2, -1)), dim, descending=True).flatten(dim, dim + 1)


@traced_as(lambda dim=1: FullSort(dim))
def full_sort(x: Tensor, dim: int = 1) -> Tensor:
    r"""FullSort: sorts all channels in ascending order, GroupSort with a single group.

    .. math:: x \mapsto (x_{(1)} \le x_{(2)} \le \dots \le x_{(c)})

    **Guaranteed**: 1-Lipschitz in every :math:`\ell_p` norm, all singular values of the Jacobian
    are 1, also at ties.

    Parameters
    ----------
    x : torch.Tensor
        Any shape.
    dim : int
        The dimension of the channels.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If ``x`` has no dimension ``dim``.

    Examples
    --------
    >>> full_sort(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[1., 2., 3.]])

    References
    ----------
    :cite:t:`anil2019sorting`.
    """
    dim = _channel_dim(x, dim)
    return x.sort(dim).values


@traced_as(lambda angle, dim=1: _reflecting(angle, dim))
def householder(x: Tensor, angle: Tensor, dim: int = 1) -> Tensor:
    r"""Householder activation of order 1: reflects a pair of channels if it is on the wrong side.

    .. math::
        z \mapsto \begin{cases} z & \text{if } v^\top z \ge 0 \\
        (I - 2 v v^\top)\, z & \text{otherwise} \end{cases}
        \qquad z = \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix},\;
        v = \begin{pmatrix} -\sin(\theta_i/2) \\ \cos(\theta_i/2) \end{pmatrix}

    Pairs are neighbouring channels. :math:`\theta_i = \pi/2` makes :math:`v = (-1, 1)/\sqrt2`
    and the activation sorts in ascending order: MaxMin. **Guaranteed**: continuous, 1-Lipschitz
    in the :math:`\ell_2` norm, and all singular values of the Jacobian are 1 (nothing is divided by
    :math:`\sqrt2`). In the :math:`\ell_1` and :math:`\ell_\infty` norms its Lipschitz constant is
    :math:`\max_i\, \lvert\cos\theta_i\rvert + \lvert\sin\theta_i\rvert \le \sqrt2`.

    Parameters
    ----------
    x : torch.Tensor
        Any shape with an even number of channels along ``dim``: vectors and images alike.
    angle : torch.Tensor
        The angles :math:`\theta_i` in radians, shape (channels / 2,).
    dim : int
        The dimension of the channels.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If the number of channels is odd or not twice the number of angles, or ``x`` has no
        dimension ``dim``.

    Examples
    --------
    The norm is kept at every angle:

    >>> x, angle = torch.randn(5, 8, dtype=torch.float64), torch.linspace(-3, 3, 4)
    >>> torch.allclose(householder(x, angle.double()).norm(dim=1), x.norm(dim=1))
    True

    References
    ----------
    :cite:t:`singla2022improved`, whose pairs are halves.
    """
    dim = _channel_dim(x, dim)
    _check_divides("pairs of channels, that is 2,", 2, x, dim)
    _floating("angle", angle)
    if angle.shape != (x.shape[dim] // 2,):
        raise ValueError(
            f"angle must have shape ({x.shape[dim] // 2},), one for each pair of the "
            f"{x.shape[dim]} channels of x, got {tuple(angle.shape)}"
        )
    angle = angle.reshape(-1, *[1] * (x.dim() - dim - 1))
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    cosine, sine = angle.cos(), angle.sin()
    keep = (angle / 2).cos() * second >= (angle / 2).sin() * first
    reflected = cosine * first + sine * second, sine * first - cosine * second
    pair = torch.where(keep, first, reflected[0]), torch.where(keep, second, reflected[1])
    return torch.stack(pair, dim + 1).flatten(dim, dim + 1)


@traced_as(lambda: AbsoluteValue())  # noqa: PLW0108 - the class stands below
def absolute_value(x: Tensor) -> Tensor:
    r"""Absolute value :math:`\lvert x\rvert`, entry by entry, with derivative 1 at zero.

    The Jacobian is diagonal with entries :math:`\pm1`. **Guaranteed**: 1-Lipschitz in every
    :math:`\ell_p` norm, and all singular values of the Jacobian are 1.

    Parameters
    ----------
    x : torch.Tensor
        Any shape.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Examples
    --------
    >>> torch.func.vmap(torch.func.grad(absolute_value))(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    _tensor("x", x)
    sign = (x.detach() < 0).to(x.dtype).mul_(-2).add_(1)  # 1 at zero, see Note [ties]
    return x * sign


# ----------------------------------------------------------------------------------- modules


class GroupSort(nn.Module):
    r"""GroupSort: sorts each group of neighbouring channels in ascending order.

    The module of :func:`group_sort`, with Lipschitz constant 1 in every norm.

    Parameters
    ----------
    group_size : int
        Length of a group; a divisor of the number of channels.
    dim : int
        The dimension of the channels.

    Raises
    ------
    TypeError
        If ``group_size`` is no integer.
    ValueError
        If ``group_size`` is less than 1; when called, as :func:`group_sort`.

    Examples
    --------
    >>> GroupSort(3)(torch.tensor([[3.0, 1.0, 2.0, 6.0, 5.0, 4.0]]))
    tensor([[1., 2., 3., 4., 5., 6.]])
    """

    def __init__(self, group_size: int, dim: int = 1) -> None:
        super().__init__()
        self.group_size = _group_size(group_size)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort the groups of ``x``."""
        return group_sort(x, self.group_size, self.dim)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"group_size={self.group_size}, dim={self.dim}"


class MaxMin(nn.Module):
    r"""MaxMin on neighbouring channels (2i, 2i+1), minimum first: equal to ``GroupSort(2)``.

    The module of :func:`max_min`, with Lipschitz constant 1 in every norm.

    Parameters
    ----------
    dim : int
        The dimension of the channels.
    pairing : str
        ``"neighbours"``, or ``"halves"`` for weights that were trained with channel :math:`i`
        paired with :math:`i + c/2` (maxima first).

    Raises
    ------
    ValueError
        If ``pairing`` is unknown; when called, as :func:`max_min`.

    Examples
    --------
    >>> MaxMin()(torch.tensor([[3.0, 1.0, 2.0, 5.0]]))
    tensor([[1., 3., 2., 5.]])
    """

    def __init__(self, dim: int = 1, pairing: Pairing = "neighbours") -> None:
        super().__init__()
        _check_pairing(pairing)
        self.dim = dim
        self.pairing = pairing

    def forward(self, x: Tensor) -> Tensor:
        """Sort the pairs of ``x``."""
        return max_min(x, self.dim, self.pairing)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"dim={self.dim}, pairing={self.pairing!r}"


class FullSort(nn.Module):
    r"""FullSort: sorts all channels in ascending order.

    The module of :func:`full_sort`, with Lipschitz constant 1 in every norm.

    Parameters
    ----------
    dim : int
        The dimension of the channels.

    Examples
    --------
    >>> FullSort()(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[1., 2., 3.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort the channels of ``x``."""
        return full_sort(x, self.dim)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"dim={self.dim}"


class Householder(nn.Module):
    r"""Householder activation of order 1 with one learnt angle for each pair of channels.

    The module of :func:`householder`. It starts as MaxMin, with all angles :math:`\pi/2`. Its
    Lipschitz constant is 1 in the :math:`\ell_2` norm, and
    :math:`\max_i \lvert\cos\theta_i\rvert + \lvert\sin\theta_i\rvert` in the :math:`\ell_1`
    and :math:`\ell_\infty` norms, which training can raise from 1 to :math:`\sqrt2`.

    Parameters
    ----------
    channels : int
        Number of channels, even.
    dim : int
        The dimension of the channels.
    device, dtype
        Of the angles.

    Attributes
    ----------
    angle : torch.Tensor
        Angles in radians, shape (channels / 2,).

    Raises
    ------
    ValueError
        If ``channels`` is odd or less than 2; when called, as :func:`householder`.

    Examples
    --------
    >>> Householder(4)(torch.tensor([[3.0, 1.0, 2.0, 5.0]])).round(decimals=5)
    tensor([[1., 3., 2., 5.]], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if _integer("channels", channels, 0) < 2 or channels % 2:
            raise ValueError(f"channels must be even and at least 2, got {channels}")
        self.dim = dim
        self.angle = nn.Parameter(torch.empty(channels // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all angles to that of MaxMin."""
        nn.init.constant_(self.angle, math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Reflect the pairs of ``x``."""
        return householder(x, self.angle, self.dim)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{2 * len(self.angle)}, dim={self.dim}"


class AbsoluteValue(nn.Module):
    r"""Absolute value, entry by entry.

    The module of :func:`absolute_value`, with Lipschitz constant 1 in every norm.

    Examples
    --------
    >>> AbsoluteValue()(torch.tensor([-2.0, 3.0]))
    tensor([2., 3.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Take the absolute value of ``x``."""
        return absolute_value(x)


# ------------------------------------------------------------------------------ Lipschitz rules


@lipschitz_rule.register(GroupSort)
@lipschitz_rule.register(MaxMin)
@lipschitz_rule.register(FullSort)
def _(module: nn.Module, input_shape: tuple[int, ...], p: float) -> Bound:
    return Bound(1.0, "exact", p)


@lipschitz_rule.register
def _(module: Householder, input_shape: tuple[int, ...], p: float) -> Bound:
    if p == 2:
        return Bound(1.0, "exact", p)
    angle = module.angle.detach().double()
    return Bound((angle.cos().abs() + angle.sin().abs()).max().item(), "exact", p)


# -------------------------------------------------------------------------------------- checks


def _reflecting(angle: Tensor, dim: int = 1) -> Householder:
    layer = Householder(2 * len(angle), dim, device="meta")
    layer.angle = nn.Parameter(angle.detach(), False)
    return layer


def _sorted_pairs(pairs: Tensor, dim: int, *, descending: bool = False) -> Tensor:
    first, second = pairs.detach().unbind(dim)
    swap = first < second if descending else first > second  # not at ties, see Note [ties]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which fuse or export the steps
        return _selected(pairs, swap, dim)
    return _Exchange.apply(pairs, swap, dim)


def _selected(pairs: Tensor, swap: Tensor, dim: int) -> Tensor:
    first, second = pairs.unbind(dim)
    return torch.stack((torch.where(swap, second, first), torch.where(swap, first, second)), dim)


# Note [exchange]
# Where a pair is exchanged, its gradient is, and its tangent: one linear map that is its own
# transpose. For the bits of two numbers a and b, a ^ (a ^ b) = b. So xor exchanges the pairs for
# which a ^ b is kept and leaves those for which it is zero, whatever the numbers are. It is taken
# in place in a copy, whatever the order of the channels in memory. Two selections by torch.where
# and a stack of their results take five times as long; they are kept for what torch has no rule
# for: a batch of gradients (is_grads_batched) seen as integers, or of only one of two operands.
_BITS = {size: getattr(torch, f"int{8 * size}") for size in (1, 2, 4, 8)}


class _Exchange(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pairs: Tensor, swap: Tensor, dim: int) -> Tensor:
        try:
            bits = pairs.view(_BITS[pairs.element_size()]).clone()
            first, second = bits.unbind(dim)
            change = (first ^ second).mul_(swap)
            first.bitwise_xor_(change)
            second.bitwise_xor_(change)
        except RuntimeError:
            return _selected(pairs, swap, dim)
        return bits.view(pairs.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, swap, ctx.dim = inputs
        ctx.save_for_backward(swap)
        ctx.save_for_forward(swap)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(gradient, *ctx.saved_tensors, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Exchange.apply(tangent, *ctx.saved_tensors, ctx.dim)


def _channel_dim(x: Tensor, dim: int) -> int:
    _tensor("x", x)
    if not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"x must have a dimension dim={dim}, got shape {tuple(x.shape)}")
    return dim % x.dim()


def _group_size(group_size: int) -> int:
    if not hasattr(group_size, "__index__"):
        raise TypeError(f"group_size must be an integer, got {type(group_size).__name__}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    return operator.index(group_size)


def _check_divides(name: str, size: int, x: Tensor, dim: int) -> None:
    if x.shape[dim] % size:
        raise ValueError(
            f"{name} must divide the channels of x: got size {size} and {x.shape[dim]} channels "
            f"(dimension {dim} of shape {tuple(x.shape)})"
        )


def _check_pairing(pairing: str) -> None:
    if pairing not in _PAIRINGS:
        raise ValueError(f"pairing must be one of {_PAIRINGS}, got {pairing!r}")


# ------------------------------------------------------------------ answers on a domain

register_like(AbsoluteValue, Absolute)


@_rule_of(GroupSort, MaxMin, FullSort, dispatch=range_rule)
def _(module: nn.Module, values: Range) -> Range:
    """Sort both ends: every order statistic grows with each of its entries."""
    low, high = module(values.low), module(values.high)
    if values.center is None or values.radius is None:
        return Range(low, high)
    return Range(low, high, module(values.center), values.radius)


def _members(module: GroupSort | MaxMin | FullSort, n: int) -> tuple[Tensor, Tensor]:
    """Name the inputs of each group, (groups, size), and its outputs in ascending order."""
    if isinstance(module, MaxMin):
        pairs = torch.arange(n)
        halves = module.pairing == "halves"
        inputs = pairs.view(2, -1).mT if halves else pairs.view(-1, 2)
        plain = MaxMin(dim=1, pairing=module.pairing)
        places = plain(torch.arange(n, dtype=torch.float64)[None])[0].long().argsort()
        return inputs, places[inputs]
    size = n if isinstance(module, FullSort) else module.group_size
    inputs = torch.arange(n).view(-1, size)
    return inputs, inputs


# Note [undecided groups]
# Where the intervals of a group do not overlap, its order is known and the Jacobian is one
# permutation. Else each input goes to some output of its group, and its row entry lies between the
# least and the largest of theirs.


@_rule_of(GroupSort, MaxMin, FullSort, dispatch=pullback_rule)
def _(
    module: GroupSort | MaxMin | FullSort, cotangent: tuple[Tensor, Tensor], values: Range
) -> tuple[Tensor, Tensor]:
    dim = module.dim % values.low.dim()
    inputs, outputs = _members(module, values.low.shape[dim])
    center, radius = (part.movedim(dim + 1, -1)[..., outputs] for part in cotangent)
    low, high = (end.movedim(dim, -1)[..., inputs][:, None] for end in (values.low, values.high))
    order = (low + high).argsort(-1)
    sorted_low, sorted_high = low.gather(-1, order), high.gather(-1, order)
    decided = (sorted_high[..., :-1] <= sorted_low[..., 1:]).all(-1, keepdim=True)
    rank = order.argsort(-1).expand_as(center)
    least = (center - radius).amin(-1, keepdim=True)
    most = (center + radius).amax(-1, keepdim=True)
    middle = torch.where(decided, center.gather(-1, rank), (least + most) / 2)
    spread = (most - least) / 2 * (1 + 2.0**-45) + (least.abs() + most.abs()) * 2.0**-50
    half = torch.where(decided, radius.gather(-1, rank), spread)
    result = []
    for part, whole in zip((middle, half), cotangent, strict=True):
        flat = torch.zeros_like(whole.movedim(dim + 1, -1))
        flat[..., inputs.flatten()] = part.flatten(-2)
        result.append(flat.movedim(-1, dim + 1))
    return result[0], result[1]


# ------------------------------------------------------------------- units


def _channels_last(dim: int, input_shape: Shape) -> Tensor:
    """Places of the entries of a flat sample, with the channels in the last dimension."""
    places = torch.arange(math.prod(input_shape)).view(input_shape)
    return places.movedim(dim % (len(input_shape) + 1) - 1, -1)


@_rule_of(GroupSort, MaxMin, FullSort, dispatch=units_rule)
def _(module: GroupSort | MaxMin | FullSort, input_shape: Shape) -> Units:
    places = _channels_last(module.dim, input_shape)
    inputs, outputs = (
        list(places[..., members].flatten(0, -2)) for members in _members(module, places.shape[-1])
    )
    return sorted_units(inputs, outputs, (places.numel(), places.numel()))


@units_rule.register
def _(module: Householder, input_shape: Shape) -> Units:
    """Keep a coordinate of each pair, and take the modulus of the other: Note [sorting]."""
    pairs = _channels_last(module.dim, input_shape).unflatten(-1, (-1, 2))
    half = module.angle.detach().double().cpu() / 2
    cosine, sine = half.cos(), half.sin()
    rows = (torch.stack((cosine, sine), -1), torch.stack((-sine, cosine), -1))
    blocks = torch.stack(rows, -2).expand(*pairs.shape, 2)
    rotation = torch.zeros(pairs.numel(), pairs.numel(), dtype=torch.float64)
    rotation[pairs[..., None], pairs[..., None, :]] = blocks
    low, high = torch.ones(2, pairs.numel(), dtype=torch.float64)
    low[pairs[..., 1]] = -1.0
    zero = torch.zeros_like(low)
    kinks = Kinks(zero[None], torch.stack((low, high)), zero)
    return Units(low, high, before=rotation, behind=rotation.mT, kinks=kinks)


# ------------------------------------------------------------------- errors of programs

_error_rule_of(GroupSort, MaxMin, FullSort, AbsoluteValue)(moved_error)
_cuda_rule_of(GroupSort, MaxMin, FullSort, AbsoluteValue)(plain_kernels)


# Note [a reflection in floating point]
# Cosines and sines are assumed to be off by at most 8u, so that a
# reflected entry is off by 11u (|z1| + |z2|). The comparison can err only if |v'z| is at most
# 10u (|z1| + |z2|), and the branches differ by 2 |v'z| there. Together 32u (|z1| + |z2|) an entry.


@_error_rule_of(Householder)
def _(module: Householder, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        dtype = max(outputs.dtype, module.angle.dtype, key=lambda d: torch.finfo(d).eps)
        slope = 32 * torch.finfo(dtype).eps
        size = _norms(x, p)
        tiny = 8 * _quantum(outputs.dtype) * _entries(outputs, p)
        limit = torch.finfo(outputs.dtype).max / 4 - 2 * size
        return ForwardError(outputs, lipschitz, (slope * size + tiny) * _UP, slope, limit / 2)

    return analysis
