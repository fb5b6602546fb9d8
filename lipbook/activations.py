r"""Norm-preserving activations: sorting, reflecting and folding instead of clipping.

ReLU keeps one of two gradients and loses the other. The activations here lose none: wherever
they are differentiable, and at ties as well, their Jacobian is an orthogonal matrix. A sorting
activation permutes its inputs, so that it keeps every :math:`\ell_p` norm; a Householder
activation reflects them, so that it keeps the :math:`\ell_2` norm; the absolute value changes
signs. The smooth absolute value alone keeps no norm: it has a derivative everywhere, and pays for
it near 0. Each comes as a function, then as a module with its Lipschitz rule
(:func:`~lipbook.composition.lipschitz_rule`).

Channels are dimension ``dim`` of the input, 1 by default: (batch, channels, ...).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

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
    _relative,
    moved_error,
    plain_kernels,
)
from lipbook.graphs.operations import traced_as
from lipbook.layers.elementwise import Absolute, register_like, register_rising
from lipbook.norms.arguments import _floating, _integer, _real, _tensor
from lipbook.norms.rigorous import _UP
from lipbook.rules import Range, Shape, _rule_of, outward, pullback_rule, range_rule, slope_rule
from lipbook.units import Kinks, Piece, Units, elementwise_units, sorted_units, units_rule

__all__ = [
    "group_sort",
    "max_min",
    "full_sort",
    "householder",
    "householder_order_2",
    "n_activation",
    "absolute_value",
    "smooth_absolute_value",
    "GroupSort",
    "MaxMin",
    "FullSort",
    "Householder",
    "HouseholderOrder2",
    "NActivation",
    "AbsoluteValue",
    "SmoothAbsoluteValue",
]

Pairing = Literal["neighbours", "halves"]
_PAIRINGS = ("neighbours", "halves")
_SMALL = 2**16  # entries up to which fewer calls matter more than fewer passes

# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("group_sort")
torch.fx.wrap("max_min")
torch.fx.wrap("full_sort")
torch.fx.wrap("householder")
torch.fx.wrap("householder_order_2")
torch.fx.wrap("n_activation")
torch.fx.wrap("absolute_value")
torch.fx.wrap("smooth_absolute_value")

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


@traced_as(lambda angle, *args, **kw: _holding(Householder, 2, "angle", angle, *args, **kw))
def householder(x: Tensor, angle: Tensor, dim: int = 1, pairing: Pairing = "neighbours") -> Tensor:
    r"""Householder activation of order 1: reflects a pair of channels if it is on the wrong side.

    .. math::
        z \mapsto \begin{cases} z & \text{if } v^\top z \ge 0 \\
        (I - 2 v v^\top)\, z & \text{otherwise} \end{cases}
        \qquad z = \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix},\;
        v = \begin{pmatrix} -\sin(\theta_i/2) \\ \cos(\theta_i/2) \end{pmatrix}

    Pairs are neighbouring channels, or channels :math:`i` and :math:`i + c/2` of the two halves,
    which is how released weights pair them. :math:`\theta_i = \pi/2` makes
    :math:`v = (-1, 1)/\sqrt2` and the activation sorts in ascending order: MaxMin (of halves the
    minima come first here, the maxima in :func:`max_min`). **Guaranteed**: continuous, 1-Lipschitz
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
    pairing : str
        ``"neighbours"`` or ``"halves"``.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If the number of channels is odd or not twice the number of angles, ``pairing`` is unknown,
        or ``x`` has no dimension ``dim``.

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
    pairs, axis = _pairs(x, dim, pairing)
    _check_angles(x, angle, dim, ())
    first, second = pairs.unbind(axis)
    theta = _beside(angle, first, dim)
    with torch.no_grad():
        wrong = (theta / 2).cos() * second < (theta / 2).sin() * first
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.numel() < _SMALL:
        cosine, sine = theta.cos(), theta.sin()
        upper = torch.where(wrong, cosine * first + sine * second, first)
        lower = torch.where(wrong, sine * first - cosine * second, second)
        return torch.stack((upper, lower), axis).flatten(dim, dim + 1)
    dtype = torch.promote_types(x.dtype, angle.dtype)
    return _turned(pairs, angle.unsqueeze(0), [wrong], axis, dim, dtype).flatten(dim, dim + 1)


# Note [a zigzag of angles]
# In polar coordinates, measured from the direction theta / 2, the activation of order 2 keeps the
# radius and maps the angle by a function g of the circle with slopes 1, -1, 1, -1 on sectors of
# lengths a, b, pi - a, pi - b:
#     g(t) = t,   2a - t,   t - 2b,   -t   for t up to   a,   a + b,   pi + b,   2 pi .
# The formulas agree where two sectors meet, at 2 pi and 0 too, so that the activation is
# continuous. On each sector it is a rotation or a reflection. Along the segment from z to z' it is
# a piecewise isometric curve, as long as the segment: it is 1-Lipschitz. Any continuous map of the
# plane that keeps the radius and has four linear pieces, the first of them the identity, is one of
# these: its slopes alternate, and the rising ones must sum to what the falling ones do.
#
# Note [which sector]
# With w = cos t / (|cos t| + |sin t|), 1 + w with the sign of -sin t rises from -2 to 2 with t,
# at a rate between 1/2 and 1. Compared with its values at the ends of the sectors it gives the
# sector. A rounding can only exchange sectors that meet, or have none but narrow ones between
# them, near a ray where their maps agree. At z = 0 it is no number, and the identity is taken.


@traced_as(
    lambda angles, *args, **kw: _holding(HouseholderOrder2, 2, "angles", angles, *args, **kw)
)
def householder_order_2(
    x: Tensor, angles: Tensor, dim: int = 1, pairing: Pairing = "neighbours"
) -> Tensor:
    r"""Householder activation of order 2: four sectors of the plane, reflected, turned or kept.

    A pair of channels :math:`z = (x_{2i}, x_{2i+1})` keeps its norm, and its angle :math:`t`,
    measured from the direction :math:`\theta_i/2`, becomes

    .. math::
        g(t) = \begin{cases} t & 0 \le t \le a \\ 2a - t & a \le t \le a + b \\
        t - 2b & a + b \le t \le \pi + b \\ -t & \pi + b \le t \le 2\pi \end{cases}

    with lengths :math:`a, b \in [0, \pi]`; other numbers are folded to that interval, as
    :math:`\lvert a - 2\pi k\rvert`. The activation of order 1 has two sectors, those of
    :math:`b = 0`. :math:`\theta = a = \pi/2` and :math:`b = 0` is MaxMin, :math:`\theta = 0` and
    :math:`a = b = \pi/2` the absolute value of both channels. **Guaranteed**: continuous,
    1-Lipschitz in the :math:`\ell_2` norm, and all singular values of the Jacobian are 1, for all
    angles. In the :math:`\ell_1` and :math:`\ell_\infty` norms the Lipschitz constant is the
    largest :math:`\lvert\cos\gamma\rvert + \lvert\sin\gamma\rvert \le \sqrt2` of
    :math:`\gamma \in \{\theta, \theta + 2a, 2b\}`, without the second where :math:`b = 0`.

    Parameters
    ----------
    x : torch.Tensor
        Any shape with an even number of channels along ``dim``.
    angles : torch.Tensor
        :math:`\theta_i`, :math:`a_i` and :math:`b_i` in radians, shape (3, channels / 2).
    dim : int
        The dimension of the channels.
    pairing : str
        ``"neighbours"`` or ``"halves"``, as in :func:`householder`.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If the number of channels is odd, ``angles`` has another shape, ``pairing`` is unknown, or
        ``x`` has no dimension ``dim``.

    Examples
    --------
    >>> x, angles = torch.tensor([[-3.0, -4.0]]), torch.tensor([[0.0], [1.0], [0.5]]) * torch.pi / 2
    >>> householder_order_2(x, angles).norm().item()
    5.0
    >>> absolute = torch.tensor([[0.0], [1.0], [1.0]]) * torch.pi / 2
    >>> householder_order_2(x, absolute).round(decimals=5)
    tensor([[3., 4.]])

    References
    ----------
    :cite:t:`singla2022improved`, where :math:`\theta_1/2` and :math:`\theta_2/2` are the lengths
    :math:`a` and :math:`b`, and pairs are halves.
    """
    dim = _channel_dim(x, dim)
    pairs, axis = _pairs(x, dim, pairing)
    _check_angles(x, angles, dim, (3,))
    theta, a, b = angles.double()
    a, b = _folded(a), _folded(b)
    with torch.no_grad():
        masks = _sectors(pairs.unbind(axis), theta, a, b, angles.dtype, dim)
    turns = torch.stack((theta + 2 * a, 2 * b, theta))
    dtype = torch.promote_types(x.dtype, angles.dtype)
    return _turned(pairs, turns, masks, axis, dim, dtype).flatten(dim, dim + 1)


@traced_as(lambda kinks, *args, **kw: _holding(NActivation, 1, "kinks", kinks, *args, **kw))
def n_activation(x: Tensor, kinks: Tensor, dim: int = 1) -> Tensor:
    r"""N-activation: a zigzag of three pieces with two learnt kinks for each channel.

    .. math::
        x \mapsto x - 2 \min(\max(x, l), h) = \begin{cases} x - 2 l & x \le l \\
        -x & l \le x \le h \\ x - 2 h & x \ge h \end{cases}

    with :math:`l` the smaller and :math:`h` the larger of the two kinks. With weights of norm 1 and
    an activation of two linear pieces, or MaxMin, some piecewise linear 1-Lipschitz functions on
    the line are no network; with these three pieces, all are. **Guaranteed**: continuous, of slope
    :math:`\pm 1` everywhere, hence 1-Lipschitz in every :math:`\ell_p` norm, and all singular
    values of the Jacobian are 1. At a kink the slope is -1.

    Parameters
    ----------
    x : torch.Tensor
        Any shape with ``channels`` entries along ``dim``.
    kinks : torch.Tensor
        The two kinks of each channel, in any order, shape (2, channels).
    dim : int
        The dimension of the channels.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    ValueError
        If ``kinks`` has another shape, or ``x`` has no dimension ``dim``.

    Examples
    --------
    >>> x = torch.tensor([[-3.0], [-1.0], [0.0], [1.0], [3.0]])
    >>> n_activation(x, torch.tensor([[-1.0], [1.0]])).flatten().tolist()
    [-1.0, 1.0, 0.0, -1.0, 1.0]

    References
    ----------
    :cite:t:`prach2023nact`.
    """
    dim = _channel_dim(x, dim)
    _floating("kinks", kinks)
    if kinks.shape != (2, x.shape[dim]):
        raise ValueError(
            f"kinks must have shape (2, {x.shape[dim]}), two for each of the channels of x, "
            f"got {tuple(kinks.shape)}"
        )
    low, high = _beside(torch.minimum(*kinks), x, dim), _beside(torch.maximum(*kinks), x, dim)
    return _zigzag(x, low, high)


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
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not x.is_floating_point():
        return _signed_by(x, x.detach())
    result: Tensor = _Absolute.apply(x)
    return result


# Note [a smooth absolute value without cancellation]
# sqrt(x^2 + d^2) - d subtracts nearly equal numbers where |x| is far below d, and overflows where
# x^2 does. With u = x / d it is x r(u) for r(u) = u / (sqrt(1 + u^2) + 1), and no step cancels. At
# |u| = 2^60 the modulus of r is within 2^-59 of 1, which is below the rounding of float64: larger
# ones, whose squares might overflow, are clipped, and the derivative of x r is then r, as it should
# be.
_FLAT = 2.0**60


@traced_as(lambda delta=0.05: SmoothAbsoluteValue(delta))
def smooth_absolute_value(x: Tensor, delta: float = 0.05) -> Tensor:
    r"""Smooth absolute value (pseudo-Huber function), entry by entry.

    .. math:: x \mapsto \sqrt{x^2 + \delta^2} - \delta, \qquad
        \lvert x\rvert - \delta \le \sqrt{x^2 + \delta^2} - \delta \le \lvert x\rvert

    A parabola :math:`x^2 / 2\delta` near 0, and :math:`\lvert x\rvert - \delta` far from it. The
    slope :math:`x / \sqrt{x^2 + \delta^2}` grows with x, from -1 to 1, which it comes close to and
    does not attain. **Guaranteed**: 1-Lipschitz in every :math:`\ell_p` norm, and no smaller
    constant will do; all derivatives exist. **Not guaranteed**: anything from below. Where
    :math:`\lvert x\rvert` is far below :math:`\delta` gradients are lost, and at 0 they vanish;
    beyond :math:`7\delta` at least 0.98 of them is kept.

    Parameters
    ----------
    x : torch.Tensor
        Any shape.
    delta : float
        :math:`\delta`, between 1e-30 and 1e30.

    Returns
    -------
    torch.Tensor
        The shape of ``x``, not negative.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of floating-point numbers, or ``delta`` no number.
    ValueError
        If ``delta`` is out of its range.

    Examples
    --------
    >>> smooth_absolute_value(torch.tensor([-4.0, 0.0, 4.0]), delta=3.0)
    tensor([2., 0., 2.])
    >>> x = torch.tensor(4.0)
    >>> torch.func.grad(smooth_absolute_value)(x, 3.0)  # 4 / 5
    tensor(0.8000)
    """
    _floating("x", x)
    delta = _delta(delta)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u = (wide / delta).clamp(-_FLAT, _FLAT)
    return (wide * (u / ((u.square() + 1).sqrt() + 1))).to(x.dtype)


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
    pairing : str
        ``"neighbours"``, or ``"halves"`` for weights that were trained with channel :math:`i`
        paired with :math:`i + c/2`.
    device, dtype
        Of the angles.

    Attributes
    ----------
    angle : torch.Tensor
        Angles in radians, shape (channels / 2,).

    Raises
    ------
    ValueError
        If ``channels`` is odd or less than 2, or ``pairing`` is unknown; when called, as
        :func:`householder`.

    Examples
    --------
    >>> Householder(4)(torch.tensor([[3.0, 1.0, 2.0, 5.0]])).round(decimals=5)
    tensor([[1., 3., 2., 5.]], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        pairing: Pairing = "neighbours",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_even(channels)
        _check_pairing(pairing)
        self.dim = dim
        self.pairing = pairing
        self.angle = nn.Parameter(torch.empty(channels // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all angles to that of MaxMin."""
        nn.init.constant_(self.angle, math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Reflect the pairs of ``x``."""
        return householder(x, self.angle, self.dim, self.pairing)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{2 * len(self.angle)}, dim={self.dim}, pairing={self.pairing!r}"


class HouseholderOrder2(nn.Module):
    r"""Householder activation of order 2 with three learnt angles for each pair of channels.

    The module of :func:`householder_order_2`, with Lipschitz constant 1 in the :math:`\ell_2` norm
    and at most :math:`\sqrt2` in the :math:`\ell_1` and :math:`\ell_\infty` norms. It starts as
    MaxMin, :math:`\theta = a = \pi/2` and :math:`b = 0`, from where :math:`b` opens two sectors
    more.

    Parameters
    ----------
    channels : int
        Number of channels, even.
    dim : int
        The dimension of the channels.
    pairing : str
        ``"neighbours"`` or ``"halves"``.
    device, dtype
        Of the angles.

    Attributes
    ----------
    angles : torch.Tensor
        :math:`\theta`, :math:`a` and :math:`b` in radians, shape (3, channels / 2).

    Raises
    ------
    ValueError
        If ``channels`` is odd or less than 2, or ``pairing`` is unknown; when called, as
        :func:`householder_order_2`.

    Examples
    --------
    >>> HouseholderOrder2(4)(torch.tensor([[3.0, 1.0, 2.0, 5.0]])).round(decimals=5)
    tensor([[1., 3., 2., 5.]], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        pairing: Pairing = "neighbours",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_even(channels)
        _check_pairing(pairing)
        self.dim = dim
        self.pairing = pairing
        self.angles = nn.Parameter(torch.empty(3, channels // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all angles to those of MaxMin."""
        with torch.no_grad():
            self.angles[:2] = math.pi / 2
            self.angles[2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Keep, turn or reflect the pairs of ``x``."""
        return householder_order_2(x, self.angles, self.dim, self.pairing)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{2 * self.angles.shape[1]}, dim={self.dim}, pairing={self.pairing!r}"


class NActivation(nn.Module):
    r"""N-activation with two learnt kinks for each channel.

    The module of :func:`n_activation`, with Lipschitz constant 1 in every norm. It starts with the
    kinks -1 and 0: above -1 it is the absolute value, and below it rises again.

    Parameters
    ----------
    channels : int
        Number of channels.
    dim : int
        The dimension of the channels.
    device, dtype
        Of the kinks.

    Attributes
    ----------
    kinks : torch.Tensor
        The two kinks of each channel, in any order, shape (2, channels).

    Raises
    ------
    ValueError
        If ``channels`` is less than 1; when called, as :func:`n_activation`.

    Examples
    --------
    >>> NActivation(4)(torch.tensor([[-2.0, -1.0, 0.5, 3.0]])).tolist()
    [[0.0, 1.0, 0.5, 3.0]]
    """

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _integer("channels", channels, 1)
        self.dim = dim
        self.kinks = nn.Parameter(torch.empty(2, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the kinks of all channels to -1 and 0."""
        with torch.no_grad():
            self.kinks[0] = -1.0
            self.kinks[1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Fold ``x`` at the kinks."""
        return n_activation(x, self.kinks, self.dim)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.kinks.shape[1]}, dim={self.dim}"


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


class SmoothAbsoluteValue(nn.Module):
    r"""Smooth absolute value :math:`\sqrt{x^2 + \delta^2} - \delta`, entry by entry.

    The module of :func:`smooth_absolute_value`, with Lipschitz constant 1 in every norm. On a
    domain its slopes are those at the ends of each interval.

    Parameters
    ----------
    delta : float
        :math:`\delta`, between 1e-30 and 1e30.

    Raises
    ------
    TypeError
        If ``delta`` is no number; when called, as :func:`smooth_absolute_value`.
    ValueError
        If ``delta`` is out of its range.

    Examples
    --------
    Of constant 1 on all of space, and of less near 0:

    >>> from lipbook.composition import Box, lipschitz_bound
    >>> layer = SmoothAbsoluteValue(3.0)
    >>> for domain in (None, Box(-4, 4)):
    ...     print(round(lipschitz_bound(layer, (2,), domain=domain).value, 6))
    1.0
    0.8
    """

    def __init__(self, delta: float = 0.05) -> None:
        super().__init__()
        self.delta = _delta(delta)

    def forward(self, x: Tensor) -> Tensor:
        """Take the smooth absolute value of ``x``."""
        return smooth_absolute_value(x, self.delta)

    def extra_repr(self) -> str:
        """Show the argument."""
        return f"delta={self.delta:g}"


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
    return Bound(_turned_norm(module.angle.detach().double()), "exact", p)


@lipschitz_rule.register
def _(module: HouseholderOrder2, input_shape: tuple[int, ...], p: float) -> Bound:
    if p == 2:
        return Bound(1.0, "exact", p)
    theta, a, b = module.angles.detach().double()
    # The other sectors are not empty: no floating-point number is an odd multiple of pi.
    second = torch.where(b == 0, 0.0, theta + 2 * _folded(a))
    return Bound(_turned_norm(torch.stack((theta, second, 2 * b))), "exact", p)


def _turned_norm(angle: Tensor) -> float:
    """Largest 1-norm, and ∞-norm, of the rotations and reflections by some angles."""
    return (angle.cos().abs() + angle.sin().abs()).max().item()


@lipschitz_rule.register
def _(module: NActivation, input_shape: tuple[int, ...], p: float) -> Bound:
    return Bound(1.0, "exact", p)


# -------------------------------------------------------------------------------------- checks


def _holding(
    make: type[nn.Module], size: int, name: str, weight: Tensor, *args: Any, **kwargs: Any
) -> nn.Module:
    """Layer that holds the weight of a function, with a column for so many channels."""
    layer = make(size * weight.shape[-1], *args, **kwargs, device="meta")
    setattr(layer, name, nn.Parameter(weight.detach(), False))
    return layer


def _pairs(x: Tensor, dim: int, pairing: Pairing) -> tuple[Tensor, int]:
    """Take pairs of channels apart, and name the dimension along which a pair lies."""
    _check_pairing(pairing)
    _check_divides("pairs of channels, that is 2,", 2, x, dim)
    halves = pairing == "halves"
    return x.unflatten(dim, (2, -1) if halves else (-1, 2)), dim if halves else dim + 1


def _beside(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Numbers of the channels, in a shape that broadcasts to ``x``."""
    return values.reshape(-1, *[1] * (x.dim() - dim - 1))


def _folded(angle: Tensor) -> Tensor:
    """Distance to the nearest multiple of 2 pi, in [0, pi], with derivative 1 at zero."""
    rest = angle - 2 * math.pi * (angle / (2 * math.pi)).round().detach()
    return torch.where(rest < 0, -rest, rest)


def _sectors(
    pair: tuple[Tensor, ...],
    theta: Tensor,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    dim: int,
) -> list[Tensor]:
    """Whether each pair lies behind the first, second and third ray: Note [which sector]."""
    first, second = pair
    half = theta / 2
    cosine, sine = (_beside(part.to(dtype), first, dim) for part in (half.cos(), half.sin()))
    across = sine * first - cosine * second
    place = _signed(_place(cosine * first + sine * second, across), across > 0)
    middle = _place((a + b).cos(), (a + b).sin())
    ends = [-_place(a.cos(), a.sin()), _signed(middle, a + b > math.pi), _place(-b.cos(), b.sin())]
    ends[1] = torch.maximum(ends[0], ends[1])
    ends[2] = torch.maximum(ends[1], ends[2])
    return [place >= _beside(end.to(dtype), first, dim) for end in ends]


def _place(cosine: Tensor, sine: Tensor) -> Tensor:
    return 1 + cosine / (cosine.abs() + sine.abs())


def _signed(values: Tensor, positive: Tensor) -> Tensor:
    return values * (2 * positive.to(values.dtype) - 1)


# Note [turns]
# A linear piece is a rotation or a reflection of the plane, and pieces alternate: the identity, a
# reflection, a rotation, a reflection, with cosines C and sines S of one angle each,
#     (y1, y2) = (C x1 + S x2, d (S x1 - C x2)),   d = 1 for reflections, -1 for rotations.
# Its transpose is the same with d S, and its derivative by the angle is d (-y2, y1). So a gradient
# goes back by the same function, and those of the angles are sums of d (g2 y1 - g1 y2) over the
# pairs in a sector: nothing but outputs and sectors is kept. Numbers are chosen by sums of products
# with 0 and 1, which are exact: torch.where takes five times as long on a CPU.


def _turned(
    pairs: Tensor,
    angles: Tensor,
    masks: Sequence[Tensor],
    axis: int,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which fuse or export the steps
        return _turn(pairs, angles, masks, axis, dim, dtype)
    return _Turn.apply(pairs, angles, axis, dim, dtype, *masks)


def _turn(
    pairs: Tensor,
    angles: Tensor,
    masks: Sequence[Tensor],
    axis: int,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Turn pairs along ``axis`` by the angle of their sector; those behind no ray are kept."""
    first, second = pairs.unbind(axis)
    shares = _shares(masks, dtype)
    kept = 1 - functools.reduce(torch.add, shares)
    cosine = _chosen(angles.cos().to(dtype), shares, dim, kept)
    sine = _chosen(angles.sin().to(dtype), shares, dim)
    lower = sine * first - cosine * second
    return torch.stack((cosine * first + sine * second, lower * _orientation(shares)), axis)


def _shares(masks: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """1 for the pairs in each sector but the first, 0 elsewhere."""
    behind = [mask.to(dtype) for mask in masks]
    return [a - b for a, b in itertools.pairwise(behind)] + behind[-1:]


def _chosen(
    values: Tensor, shares: Sequence[Tensor], dim: int, found: Tensor | None = None
) -> Tensor:
    """Values of the sectors, a row each; in the first what is given, or 0."""
    for row, share in zip(values, shares, strict=True):
        value = _beside(row, share, dim)
        found = share * value if found is None else torch.addcmul(found, share, value)
    return cast(Tensor, found)


def _orientation(shares: Sequence[Tensor]) -> Tensor:
    """1 for reflections, -1 for rotations."""
    return 2 * functools.reduce(torch.add, shares[::2]) - 1


class _Turn(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        pairs: Tensor,
        angles: Tensor,
        axis: int,
        dim: int,
        dtype: torch.dtype,
        *masks: Tensor,
    ) -> Tensor:
        return _turn(pairs, angles, masks, axis, dim, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, angles, ctx.axis, ctx.dim, ctx.dtype, *masks = inputs
        ctx.save_for_backward(angles, output, *masks)
        ctx.save_for_forward(angles, output, *masks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        angles, output, *masks = ctx.saved_tensors
        signs = angles.new_tensor([(-1.0) ** k for k in range(len(angles))])[:, None]
        pulled = _Turn.apply(gradient, signs * angles, ctx.axis, ctx.dim, ctx.dtype, *masks)
        of_angles = None
        if ctx.needs_input_grad[1]:
            (y1, y2), (g1, g2) = output.unbind(ctx.axis), gradient.unbind(ctx.axis)
            change = g2 * y1 - g1 * y2
            others = [k for k in range(change.dim()) if k != ctx.dim]
            sums = [(change * share).sum(others) for share in _shares(masks, change.dtype)]
            of_angles = (signs * torch.stack(sums)).to(angles.dtype)
        return pulled, of_angles, None, None, None, *(None for _ in masks)

    @staticmethod
    def jvp(ctx: Any, of_pairs: Tensor, of_angles: Tensor, *_: None) -> Tensor:
        angles, output, *masks = ctx.saved_tensors
        turned = _Turn.apply(of_pairs, angles, ctx.axis, ctx.dim, ctx.dtype, *masks)
        shares = _shares(masks, output.dtype)
        speed = _chosen(of_angles.to(ctx.dtype), shares, ctx.dim) * _orientation(shares)
        y1, y2 = output.unbind(ctx.axis)
        return turned + torch.stack((-speed * y2, speed * y1), ctx.axis)


def _zigzag(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.sub(torch.minimum(torch.maximum(x, low), high), alpha=2)
    return _Zigzag.apply(x, low, high)


class _Zigzag(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return x.sub(x.clamp(low, high), alpha=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high = ctx.saved_tensors
        below, above = (side.to(gradient.dtype) for side in (x < low, x > high))
        outside = gradient * (below + above)
        of_kinks: list[Tensor | None] = [None, None]
        for k, (kink, side) in enumerate(((low, below), (high, above))):
            if ctx.needs_input_grad[k + 1]:
                of_kinks[k] = (-2 * gradient * side).sum_to_size(kink.shape)
        return 2 * outside - gradient, *of_kinks

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor, of_low: Tensor, of_high: Tensor) -> Tensor:
        x, low, high = ctx.saved_tensors
        below, above = (side.to(of_x.dtype) for side in (x < low, x > high))
        return of_x * (2 * (below + above) - 1) - 2 * (below * of_low + above * of_high)


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


def _delta(delta: float) -> float:
    _real("delta", delta)
    if not 1e-30 <= delta <= 1e30:
        raise ValueError(f"delta must be between 1e-30 and 1e30, got {delta}")
    return float(delta)


def _signed_by(values: Tensor, x: Tensor) -> Tensor:
    """Values times the signs of x, 1 at zero, see Note [ties]."""
    return values * (x < 0).to(x.dtype).mul_(-2).add_(1)


# Note [signs]
# The sign of zero as a number is 0 or -0 whose bit is not set, whatever the zero: so the bit of the
# sign of x, exchanged with xor, changes the sign of a gradient where x < 0, in two passes in place.
# A product with signs that are 1 at zero takes five passes.


class _Absolute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = _Signed.apply(gradient, *ctx.saved_tensors)
        return result

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        result: Tensor = _Signed.apply(tangent, *ctx.saved_tensors)
        return result


class _Signed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, x: Tensor) -> Tensor:
        try:
            integers = _BITS[x.element_size()]
            bits = x.sgn().view(integers).bitwise_and_(torch.iinfo(integers).min)
            return bits.bitwise_xor_(values.view(integers)).view(x.dtype)
        except RuntimeError:
            return _signed_by(values, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Signed.apply(gradient, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        result: Tensor = _Signed.apply(tangent, *ctx.saved_tensors)
        return result


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


def _check_even(channels: int) -> None:
    if _integer("channels", channels, 0) < 2 or channels % 2:
        raise ValueError(f"channels must be even and at least 2, got {channels}")


def _check_angles(x: Tensor, angles: Tensor, dim: int, rows: tuple[int, ...]) -> None:
    name = "angles" if rows else "angle"
    _floating(name, angles)
    expected = (*rows, x.shape[dim] // 2)
    if angles.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, one for each pair of the "
            f"{x.shape[dim]} channels of x, got {tuple(angles.shape)}"
        )


def _check_pairing(pairing: str) -> None:
    if pairing not in _PAIRINGS:
        raise ValueError(f"pairing must be one of {_PAIRINGS}, got {pairing!r}")


# ------------------------------------------------------------------ answers on a domain

register_like(AbsoluteValue, Absolute)


def _smooth_slope(module: SmoothAbsoluteValue, x: Tensor) -> Tensor:
    u = (x / module.delta).clamp(-_FLAT, _FLAT)
    return u / (u.square() + 1).sqrt()


register_rising(SmoothAbsoluteValue, _smooth_slope, -1.0, 1.0)


@_rule_of(GroupSort, MaxMin, FullSort, dispatch=range_rule)
def _(module: nn.Module, values: Range) -> Range:
    """Sort both ends: every order statistic grows with each of its entries."""
    low, high = module(values.low), module(values.high)
    if values.center is None or values.radius is None:
        return Range(low, high)
    return Range(low, high, module(values.center), values.radius)


@slope_rule.register
def _(module: NActivation, values: Range | None) -> tuple[Tensor, Tensor]:
    """-1 where an interval meets the falling piece, 1 where it meets another."""
    if values is None:
        one = torch.ones((), dtype=torch.float64)
        return -one, one
    low, high = _kinks(module, values.low)
    falls = (values.high >= low) & (values.low <= high)
    rises = (values.low <= low) | (values.high >= high)
    return 1.0 - 2 * falls.double(), 2 * rises.double() - 1.0


@range_rule.register
def _(module: NActivation, values: Range) -> Range:
    """Images of both ends, and of the kinks between them."""
    low, high = _kinks(module, values.low)
    inside = [torch.minimum(torch.maximum(k, values.low), values.high) for k in (low, high)]
    images = torch.stack([module(part.clone()) for part in (values.low, *inside, values.high)])
    least, most = outward(images.amin(0), images.amax(0), 2.0**-45 * (low.abs() + high.abs()))
    if values.center is None or values.radius is None:
        return Range(least, most)
    center = module(values.center.clone())
    off = (center.abs() + low.abs() + high.abs()).flatten(1).norm(dim=1) * 2.0**-45
    return Range(least, most, center, values.radius * (1 + 2.0**-40) + off)


def _kinks(module: NActivation, like: Tensor) -> tuple[Tensor, Tensor]:
    """Smaller and larger kink of each channel, in a shape that broadcasts to a batch."""
    kinks, dim = module.kinks.detach().double(), _channel_dim(like, module.dim)
    low, high = torch.minimum(*kinks), torch.maximum(*kinks)
    return _beside(low, like, dim), _beside(high, like, dim)


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


def _pairs_of(module: Householder | HouseholderOrder2, input_shape: Shape) -> Tensor:
    """Places of the pairs of a flat sample, (..., pairs, 2)."""
    places = _channels_last(module.dim, input_shape)
    if module.pairing == "halves":
        return places.unflatten(-1, (2, -1)).mT
    return places.unflatten(-1, (-1, 2))


def _rotations(angle: Tensor) -> Tensor:
    """Matrices that turn by minus an angle, (..., 2, 2)."""
    cosine, sine = angle.cos(), angle.sin()
    rows = (torch.stack((cosine, sine), -1), torch.stack((-sine, cosine), -1))
    return torch.stack(rows, -2)


@units_rule.register
def _(module: Householder, input_shape: Shape) -> Units:
    """Keep a coordinate of each pair, and take the modulus of the other: Note [sorting]."""
    pairs = _pairs_of(module, input_shape)
    blocks = _rotations(module.angle.detach().double().cpu() / 2).expand(*pairs.shape, 2)
    rotation = torch.zeros(pairs.numel(), pairs.numel(), dtype=torch.float64)
    rotation[pairs[..., None], pairs[..., None, :]] = blocks
    low, high = torch.ones(2, pairs.numel(), dtype=torch.float64)
    low[pairs[..., 1]] = -1.0
    zero = torch.zeros_like(low)
    kinks = Kinks(zero[None], torch.stack((low, high)), zero)
    return Units(low, high, before=rotation, behind=rotation.mT, kinks=kinks)


@units_rule.register
def _(module: HouseholderOrder2, input_shape: Shape) -> Units:
    """Give a nonexpansive group of two units for each pair, with a piece for each sector."""
    pairs = _pairs_of(module, input_shape)
    theta, a, b = module.angles.detach().double().cpu()
    pieces = [_wedges(*angles) for angles in zip(theta, _folded(a), _folded(b), strict=True)]
    places = pairs.reshape(-1, len(pieces), 2)
    cells = [cell for position in places for cell in zip(position, pieces, strict=True)]
    group = torch.zeros(pairs.numel(), dtype=torch.long)
    group[pairs.flatten()] = torch.arange(pairs.numel()) // 2
    low, high = torch.ones(2, pairs.numel(), dtype=torch.float64)
    eye = torch.eye(pairs.numel(), dtype=torch.float64)
    return Units(-low, high, group=group, before=eye, behind=eye, cells=cells)


def _wedges(theta: Tensor, a: Tensor, b: Tensor) -> list[Piece]:
    """Sectors of the plane and their matrices: Note [a zigzag of angles]."""
    ends = theta / 2 + torch.stack((a * 0, a, a + b, b + math.pi, b * 0 + 2 * math.pi))
    turns = torch.stack((theta * 0, theta + 2 * a, 2 * b, theta))
    matrices = _rotations(turns)
    matrices[1::2, 1] = -matrices[1::2, 1]  # of reflections
    normals = _rotations(ends)[:, 1]
    zero = torch.zeros(2, dtype=torch.float64)
    return [
        Piece(torch.stack((normals[k], -normals[k + 1])), zero, matrices[k], zero)
        for k in range(4)
        if bool(ends[k] < ends[k + 1])
    ]


@units_rule.register
def _(module: NActivation, input_shape: Shape) -> Units:
    low, high = _kinks(module, torch.empty(1, *input_shape, dtype=torch.float64))
    return elementwise_units(module, input_shape, [low, high], [1.0, -1.0, 1.0])


# ------------------------------------------------------------------- errors of programs

_error_rule_of(GroupSort, MaxMin, FullSort, AbsoluteValue)(moved_error)
_cuda_rule_of(GroupSort, MaxMin, FullSort, AbsoluteValue, NActivation)(plain_kernels)


# Note [errors of a smooth absolute value]
# u = x / d is off by four roundings, if d is rounded to the dtype and 1 / d is multiplied by. As r
# is odd, concave for u > 0 and 0 at 0, (1 + t) u moves r(u) by no more than a relative t. The
# denominator sqrt(1 + u^2) + 1 is a sum of numbers of one sign and off by three, and a quotient and
# a product follow: nine, of which none is relative to anything but the output.


@_error_rule_of(SmoothAbsoluteValue)
def _(module: SmoothAbsoluteValue, example: Tensor, p: float) -> Analysis:
    return lambda x: _relative(module, x, p, 1.0, 10)


# Note [a reflection in floating point]
# Cosines and sines are assumed to be off by at most 8u, so that a
# reflected entry is off by 11u (|z1| + |z2|). The comparison can err only if |v'z| is at most
# 10u (|z1| + |z2|), and the branches differ by 2 |v'z| there. Together 32u (|z1| + |z2|) an entry.


@_error_rule_of(Householder)
def _(module: Householder, example: Tensor, p: float) -> Analysis:
    return _turning(module, module.angle, _closed_form(module, example, p), p, 32, 0.0)


# Note [four sectors in floating point]
# The cosines and sines of the angles are computed in float64, where an angle is off by no more than
# 8 units of the sum A of their moduli and of pi, and each is off by w = 16 (1 + A) 2^-53 before it
# is rounded to the dtype. With r = |z|_2, an entry of the turned pair is off by (6u + 2w) r.
# The coordinates c, s along and across the mirror are off by (3u + w)(|z1| + |z2|) each, so that
# c / (|c| + |s|), whose denominator is at least r, is off by 15u + 5w, and the place by 17u + 5w.
# The ends of the sectors are off by 3u + 4w. As places change at a rate of at least 1/2, a sector
# can be mistaken within an angle of 40u + 18w of its end: Note [which sector]. The maps of two
# sectors that meet differ there by twice that angle times r. At most three rays lie so close
# together, as two of the lengths are at least pi/2: 240u + 108w, and 250u + 120w in all.
# In a 1-norm or maximum norm of the pair it is sqrt 2 times as much.


@_error_rule_of(HouseholderOrder2)
def _(module: HouseholderOrder2, example: Tensor, p: float) -> Analysis:
    theta, a, b = module.angles.detach().double().abs()
    reach = 1 + (theta + 2 * a + 2 * b).amax().item()
    more = 170 * 16 * reach * 2.0**-53
    return _turning(module, module.angles, _closed_form(module, example, p), p, 180, more)


def _turning(
    module: nn.Module, angles: Tensor, lipschitz: float, p: float, units: float, more: float
) -> Analysis:
    """Errors of so many eps times the input, and some more."""

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        dtype = max(outputs.dtype, angles.dtype, key=lambda d: torch.finfo(d).eps)
        slope = units * torch.finfo(dtype).eps + more
        size = _norms(x, p)
        tiny = units * _quantum(outputs.dtype) * _entries(outputs, p)
        limit = torch.finfo(outputs.dtype).max / 4 - 2 * size
        return ForwardError(outputs, lipschitz, (slope * size + tiny) * _UP, slope, limit / 2)

    return analysis


@_error_rule_of(NActivation)
def _(module: NActivation, example: Tensor, p: float) -> Analysis:
    """One rounding of a difference; clipping rounds nothing, and doubling neither."""
    kinks = module.kinks.detach().double().abs()
    return lambda x: _folded_error(module, x, p, kinks.amax().item())


def _folded_error(module: NActivation, x: Tensor, p: float, largest: float) -> ForwardError:
    outputs = module(x)
    dtype = max(outputs.dtype, module.kinks.dtype, key=lambda d: torch.finfo(d).eps)
    eps, size = torch.finfo(dtype).eps, _norms(x, p)
    entries = _entries(outputs, p)
    # |x| + 2 max |kink| is never exceeded; in half precision the double is rounded once more.
    error = 2 * eps * (size + 2 * largest * entries) + 4 * _quantum(outputs.dtype) * entries
    limit = torch.finfo(outputs.dtype).max / 4 - size - 2 * largest
    return ForwardError(outputs, 1.0, error * _UP, 2 * eps * _UP, limit)
