r"""Pooling and resampling that keep norms.

A window of :math:`w = \prod k` pixels is rearranged, collapsed to one number, or filled from one.
Windows do not overlap unless they are told to, by a stride: pixels that are read several times add
norm, and have to share it. Pixels that no window reads lose norm, and an image that would have any
is refused. All maps treat channels and windows alike.

=============================  =========================================  =====  =======  =====
layer                          what it keeps                              p = 1  p = 2    p = ∞
=============================  =========================================  =====  =======  =====
``InvertibleDownsampling``     all norms, both ways: a permutation        1      1        1
``InvertibleUpsampling``       all norms, both ways: a permutation        1      1        1
``NormPooling``                2-norms, and those of gradients            1      1        √w
``AveragePooling``             norms of gradients (semi-orthogonal)       1/√w   1        √w
``Upsampling``                 2-norms (isometry)                         √w     1        1/√w
=============================  =========================================  =====  =======  =====

With a stride s below k a pixel is in :math:`m = \prod \lceil k / s\rceil` windows at most, and what
is returned is divided by :math:`\sqrt m`: with :math:`x_i` the pixels of window i,

.. math:: \tfrac1m \sum_i \big\lvert \lVert x_i\rVert - \lVert x_i'\rVert \big\rvert^2
    \le \tfrac1m \sum_i \lVert x_i - x_i'\rVert^2 \le \lVert x - x'\rVert^2 ,

and the same for :math:`\tfrac{1}{\sqrt w} \sum_a x_{i,a}`, which is no longer than :math:`x_i`. In
the 2-norm the constant of norm pooling is 1 wherever a pixel is in m windows; in the 1-norm it is
:math:`\sqrt m`, in the maximum norm :math:`\sqrt{w / m}`. Nothing is kept: sums that share pixels
are no orthonormal rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Bound, lipschitz_rule
from lipbook.errors import (
    Analysis,
    ForwardError,
    _Affine,
    _closed_form,
    _cuda_rule_of,
    _entries,
    _error_rule_of,
    _norms,
    _relative,
    moved_error,
    plain_kernels,
)
from lipbook.graphs.operations import traced_as
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _floating, _tensor
from lipbook.rules import Affine, Range, Shape, _rule_of, affine_rule, outward, range_rule
from lipbook.units import Units, units_rule

__all__ = [
    "AveragePooling",
    "InvertibleDownsampling",
    "InvertibleUpsampling",
    "NormPooling",
    "Upsampling",
    "average_pooling",
    "invertible_downsampling",
    "invertible_upsampling",
    "norm_pooling",
    "upsampling",
]

Size = int | Sequence[int]
Window = Size | Literal["global"]
_POOLS = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)  # by dimensions

# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("invertible_downsampling")
torch.fx.wrap("invertible_upsampling")
torch.fx.wrap("norm_pooling")
torch.fx.wrap("average_pooling")
torch.fx.wrap("upsampling")


@traced_as(lambda window: InvertibleDownsampling(window))  # noqa: PLW0108 - the class stands below
def invertible_downsampling(x: Tensor, window: Window) -> Tensor:
    r"""Invertible downsampling: each pixel of a window becomes a channel.

    .. math:: y_{(c, a, b),\, i,\, j} = x_{c,\, s i + a,\, s j + b}

    A permutation of the entries, so that it keeps every norm. In two dimensions with one
    ``window`` it is :func:`torch.nn.functional.pixel_unshuffle`.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size), with one or more axes after the channels.
    window : int or sequence of int or str
        Size of a window, for all axes or for each; ``"global"`` for one window as large as the
        image, whatever its size.

    Returns
    -------
    torch.Tensor
        (batch, c · w, \*(size / window)), where w = prod(window).

    Raises
    ------
    ValueError
        If the window does not divide the size.

    Examples
    --------
    >>> invertible_downsampling(torch.arange(6).view(1, 1, 6), 2)
    tensor([[[0, 2, 4],
             [1, 3, 5]]])

    References
    ----------
    :cite:t:`jacobsen2018irevnet`.
    """
    windows, counts = _windows(x, window)
    return windows.flatten(1, counts + 1)


@traced_as(lambda window: InvertibleUpsampling(window))  # noqa: PLW0108 - the class stands below
def invertible_upsampling(x: Tensor, window: Size) -> Tensor:
    r"""Invertible upsampling, the inverse of :func:`invertible_downsampling`.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c · w, \*size).
    window : int or sequence of int
        Size of a window.

    Returns
    -------
    torch.Tensor
        (batch, c, \*(size · window)).

    Raises
    ------
    ValueError
        If w does not divide the channels.

    Examples
    --------
    >>> x = torch.randn(2, 3, 4, 6)
    >>> torch.equal(invertible_upsampling(invertible_downsampling(x, (2, 3)), (2, 3)), x)
    True
    """
    window = _per_axis(x, window)
    if x.shape[1] % math.prod(window):
        raise ValueError(f"window must divide the channels, got {x.shape[1]} channels for {window}")
    x = x.unflatten(1, (-1, *window))
    dims = len(window)  # (batch, c, *window, *size) from here on
    pairs = ((2 + dims + axis, 2 + axis) for axis in range(dims))
    x = x.permute(0, 1, *itertools.chain.from_iterable(pairs))
    for axis in range(2, 2 + dims):
        x = x.flatten(axis, axis + 1)
    return x


@traced_as(lambda *args, **kwargs: NormPooling(*args, **kwargs))  # noqa: PLW0108 - stands below
def norm_pooling(
    x: Tensor, window: Window, stride: Size | None = None, padding: Size = 0
) -> Tensor:
    r"""Norm pooling: the Euclidean norm of each window.

    .. math:: y_{c, i} = \Big(\frac1m \sum_{a \in \text{window } i} x_{c, a}^2\Big)^{1/2},
        \qquad m = \prod \lceil k / s\rceil

    **Guaranteed**: 1-Lipschitz in the 2-norm, for every stride. Where windows do not overlap, and
    so m = 1, it keeps the 2-norm of its input, and the norm of gradients wherever no window is
    zero: the rows of its Jacobian are unit vectors on disjoint windows. On a window of zeros there
    is no gradient, and 0 is returned.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    window : int or sequence of int or str
        Size k of a window; ``"global"`` for one window as large as the image, whatever its size.
    stride : int or sequence of int, optional
        s, from one window to the next, at most the window; the window if not given.
    padding : int or sequence of int
        Zeros at both ends of each axis, at most half of the window.

    Returns
    -------
    torch.Tensor
        (batch, c, \*size'), not negative, with :math:`\lfloor (n + 2 \cdot\text{padding} - k) / s
        \rfloor + 1` for each size n.

    Raises
    ------
    ValueError
        If the geometry does not fit, or leaves a pixel in no window: without stride and padding, if
        the window does not divide the size.

    Examples
    --------
    >>> norm_pooling(torch.tensor([[[3.0, 4.0, 0.0, -2.0]]]), 2)
    tensor([[[5., 2.]]])

    A pixel that two windows share counts half in each:

    >>> x = torch.zeros(1, 1, 5).index_fill(2, torch.tensor(2), 1.0)
    >>> norm_pooling(x, 3, stride=2).square()
    tensor([[[0.5000, 0.5000]]])
    """
    _floating("x", x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    means, pixels, overlap = _means(wide.square(), window, stride, padding)
    squares = means * (pixels / overlap)
    positive = (squares.detach() > 0).to(squares.dtype)  # the root of 0 has no derivative
    return ((squares + (1 - positive)).sqrt() * positive).to(x.dtype)


@traced_as(lambda *args, **kwargs: AveragePooling(*args, **kwargs))  # noqa: PLW0108 - stands below
def average_pooling(
    x: Tensor, window: Window, stride: Size | None = None, padding: Size = 0
) -> Tensor:
    r"""Average pooling, rescaled to norm 1.

    .. math:: y_{c, i} = \frac{1}{\sqrt{w m}} \sum_{a \in \text{window } i} x_{c, a},
        \qquad m = \prod \lceil k / s\rceil

    The mean times :math:`\sqrt{w / m}`. **Guaranteed**: norm at most 1, for every stride. Where
    windows do not overlap, and so m = 1, it is semi-orthogonal: all singular values are 1, so that
    it keeps the norm of gradients. The mean itself has norm :math:`1/\sqrt w` there. Where they do,
    and the stride divides the window, the norm comes close to 1 on large images, by constant ones.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    window, stride, padding
        As in :func:`norm_pooling`.

    Returns
    -------
    torch.Tensor
        (batch, c, \*size'), as :func:`norm_pooling`.

    Raises
    ------
    ValueError
        As :func:`norm_pooling`.

    Examples
    --------
    >>> average_pooling(torch.ones(1, 1, 4, 4), 2)
    tensor([[[[2., 2.],
              [2., 2.]]]])
    >>> average_pooling(torch.ones(1, 1, 4, 4), "global")
    tensor([[[[4.]]]])
    """
    means, pixels, overlap = _means(x, window, stride, padding)
    return means * math.sqrt(pixels / overlap)


@traced_as(lambda window: Upsampling(window))  # noqa: PLW0108 - the class stands below
def upsampling(x: Tensor, window: Size) -> Tensor:
    r"""Nearest-neighbour upsampling, rescaled to keep the 2-norm: the adjoint of average pooling.

    .. math:: y_{c, a} = \frac{1}{\sqrt w}\, x_{c, i} \quad\text{for } a \in \text{window } i

    **Guaranteed**: an isometry. Plain nearest-neighbour upsampling has norm :math:`\sqrt w`: 2 for
    twice the height and width.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    window : int or sequence of int
        Size of a window.

    Returns
    -------
    torch.Tensor
        (batch, c, \*(size · window)).

    Examples
    --------
    >>> x = torch.randn(1, 3, 4, 4)
    >>> torch.allclose(upsampling(x, 2).norm(), x.norm())
    True
    """
    window = _per_axis(x, window)
    for axis, count in enumerate(window, 2):
        x = x.repeat_interleave(count, axis)
    return x / math.sqrt(math.prod(window))


def _per_axis(
    x: Tensor, window: Size, name: str = "window", least: Literal[0, 1] = 1
) -> tuple[int, ...]:
    """One integer for each of the axes after the channels."""
    _tensor("x", x)
    dims = x.dim() - 2
    sizes = tuple(window) if isinstance(window, Sequence) else (window,) * dims
    if dims < 1 or len(sizes) != dims or not all(_at_least(least, size) for size in sizes):
        raise ValueError(
            f"{name} must be a {_SIGN[least]} integer, or one for each axis after the channels, "
            f"got {window!r} for an input of shape {tuple(x.shape)}"
        )
    return tuple(operator.index(n) for n in sizes)


_SIGN = {0: "nonnegative", 1: "positive"}


def _at_least(least: int, size: Any) -> bool:
    return hasattr(size, "__index__") and size >= least


def _sizes(x: Tensor, window: Window) -> tuple[int, ...]:
    """One integer for each of the axes after the channels, those of the image if global."""
    whole = isinstance(window, str) and window == "global" and isinstance(x, Tensor) and x.dim() > 2
    return tuple(x.shape[2:]) if whole else _per_axis(x, cast(Size, window))


def _divisors(x: Tensor, window: Window) -> tuple[int, ...]:
    sizes = _sizes(x, window)
    if any(n % s for n, s in zip(x.shape[2:], sizes, strict=True)):
        raise ValueError(f"window must divide the size {tuple(x.shape[2:])}, got {sizes}")
    return sizes


def _windows(x: Tensor, window: Window) -> tuple[Tensor, int]:
    """Take windows apart, (batch, c, *window, *(size / window)), and count their axes."""
    sizes = _divisors(x, window)
    for axis, size in enumerate(sizes):
        x = x.unflatten(2 + 2 * axis, (-1, size))
    dims = len(sizes)
    return x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)), dims


def _means(
    x: Tensor, window: Window, stride: Size | None, padding: Size
) -> tuple[Tensor, int, int]:
    """Mean of each window, how many pixels it has, and in how many windows a pixel may be."""
    axes = _geometry(x, window, stride, padding)
    sizes, strides, pads = zip(*axes, strict=True)
    if len(axes) <= len(_POOLS):
        means = _POOLS[len(axes) - 1](x, sizes, strides, pads)
    else:
        means = _taps(x, axes).mean(-1)
    return means, math.prod(sizes), math.prod([-(-k // s) for k, s, _ in axes])


def _geometry(
    x: Tensor, window: Window, stride: Size | None, padding: Size
) -> list[tuple[int, int, int]]:
    """Size, stride and padding of the windows along each axis, of which no pixel is left out."""
    sizes = _sizes(x, window)
    if stride is None and padding == 0:
        return [(k, k, 0) for k in _divisors(x, window)]
    _check_moved(window, stride, padding)
    strides = sizes if stride is None else _per_axis(x, stride, "stride")
    pads = _per_axis(x, padding, "padding", 0)
    axes = list(zip(sizes, strides, pads, strict=True))
    for n, (k, s, pad) in zip(x.shape[2:], axes, strict=True):
        if s > k or 2 * pad > k:
            raise ValueError(
                f"stride must be at most the window {sizes} and padding at most half of it, got "
                f"{strides} and {pads}"
            )
        count = (n + 2 * pad - k) // s + 1
        if count < 1 or (count - 1) * s + k - pad < n:
            raise ValueError(
                f"window must leave no pixel of the size {tuple(x.shape[2:])} out, got {sizes} "
                f"with stride {strides} and padding {pads}"
            )
    return axes


def _check_moved(window: Window, stride: Size | None, padding: Size) -> None:
    if window == "global" and (stride is not None or padding != 0):
        raise ValueError(
            f"stride and padding must be left out with a global window, got {stride!r} and "
            f"{padding!r}"
        )


def _taps(x: Tensor, axes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Pixels of each window, (batch, c, *counts, w), with zeros for the padding."""
    pads = [pad for _, _, pad in reversed(axes) for _ in range(2)]
    x = functional.pad(x, pads)
    for axis, (k, s, _) in enumerate(axes, 2):
        count = (x.shape[axis] - k) // s + 1
        first = torch.arange(count, device=x.device)[:, None] * s
        places = first + torch.arange(k, device=x.device)
        x = x.index_select(axis, places.flatten()).unflatten(axis, (count, k)).movedim(axis + 1, -1)
    return x.flatten(2 + len(axes))


# ---------------------------------------------------------------------------------- layers


class _Windowed(nn.Module):
    window: Window

    def __init__(self, window: Size) -> None:
        super().__init__()
        self.window = _given(window, "window", 1)

    def extra_repr(self) -> str:
        """Show the window."""
        return f"window={self.window!r}"


def _given(window: Size, name: str, least: Literal[0, 1]) -> Size:
    sizes = tuple(window) if isinstance(window, Sequence) else (window,)
    if not sizes or not all(_at_least(least, size) for size in sizes):
        raise ValueError(f"{name} must be one or more {_SIGN[least]} integers, got {window!r}")
    sizes = tuple(operator.index(n) for n in sizes)
    return sizes if isinstance(window, Sequence) else sizes[0]


class _Pooled(_Windowed):
    def __init__(self, window: Window) -> None:
        if isinstance(window, str) and window == "global":
            nn.Module.__init__(self)
            self.window = window
        else:
            super().__init__(window)


class _Moved(_Pooled):
    """Windows that a stride moves by less than their size."""

    def __init__(self, window: Window, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__(window)
        self.stride = None if stride is None else _given(stride, "stride", 1)
        self.padding = _given(padding, "padding", 0)
        _check_moved(self.window, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Show the window, and how it moves if it overlaps others or the border."""
        parts = [super().extra_repr()]
        parts += [f"stride={self.stride!r}"] if self.stride is not None else []
        parts += [f"padding={self.padding!r}"] if self.padding != 0 else []
        return ", ".join(parts)

    def axes(self, x: Tensor) -> list[tuple[int, int, int]]:
        """Size, stride and padding of the windows along each axis of a batch."""
        return _geometry(x, self.window, self.stride, self.padding)


class InvertibleDownsampling(_Pooled):
    r"""Invertible downsampling, a permutation: see :func:`invertible_downsampling`.

    Parameters
    ----------
    window : int or sequence of int or str
        Size of a window, or ``"global"``; one number holds for all axes, of which there may be any
        number.

    Examples
    --------
    >>> InvertibleDownsampling(2)(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rearrange, (batch, c, *size) to (batch, c · w, *(size / window))."""
        return invertible_downsampling(input, self.window)


class InvertibleUpsampling(_Windowed):
    r"""Invertible upsampling, a permutation: see :func:`invertible_upsampling`.

    Parameters
    ----------
    window : int or sequence of int
        Size of a window.

    Examples
    --------
    >>> InvertibleUpsampling(2)(torch.randn(1, 12, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rearrange, (batch, c · w, *size) to (batch, c, *(size · window))."""
        return invertible_upsampling(input, cast(Size, self.window))


class NormPooling(_Moved):
    r"""Norm pooling, 1-Lipschitz; without overlap it keeps norms: see :func:`norm_pooling`.

    Parameters
    ----------
    window : int or sequence of int or str
        Size of a window, or ``"global"``.
    stride : int or sequence of int, optional
        From one window to the next, at most the window; the window if not given.
    padding : int or sequence of int
        Zeros at both ends of each axis, at most half of the window.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> for layer in (NormPooling(2), NormPooling(3, stride=2, padding=1)):
    ...     print([round(lipschitz_bound(layer, (3, 8, 8), p).value, 3) for p in (1, 2, math.inf)])
    [1.0, 1.0, 2.0]
    [2.0, 1.0, 1.5]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool, (batch, c, *size) to (batch, c, *smaller)."""
        return norm_pooling(input, self.window, self.stride, self.padding)


class AveragePooling(_Moved):
    r"""Average pooling of norm 1, without overlap semi-orthogonal: see :func:`average_pooling`.

    Parameters
    ----------
    window, stride, padding
        As in :class:`NormPooling`.

    Examples
    --------
    >>> pixels = torch.eye(16).view(16, 1, 4, 4)
    >>> matrix = AveragePooling(2)(pixels).flatten(1).mT
    >>> torch.equal(matrix @ matrix.mT, torch.eye(4))
    True

    With overlap the norm is that of the matrix of all windows:

    >>> from lipbook.composition import lipschitz_bound
    >>> for size in (4, 6, 20):
    ...     print(round(lipschitz_bound(AveragePooling(4, stride=2), (1, size)).value, 3))
    0.707
    0.866
    0.988
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool, (batch, c, *size) to (batch, c, *smaller)."""
        return average_pooling(input, self.window, self.stride, self.padding)


class Upsampling(_Windowed):
    r"""Nearest-neighbour upsampling that keeps the 2-norm: see :func:`upsampling`.

    Parameters
    ----------
    window : int or sequence of int
        Size of a window.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> for layer in (Upsampling(2), nn.Upsample(scale_factor=2)):
    ...     print(f"{lipschitz_bound(layer, (3, 4, 4)).value:.4f}")
    1.0000
    2.0000
    """

    def forward(self, input: Tensor) -> Tensor:
        """Fill windows, (batch, c, *size) to (batch, c, *(size · window))."""
        return upsampling(input, cast(Size, self.window))


# ------------------------------------------------------------------------- Lipschitz rules
# On paper: see the table at the top. A constant window attains the factors √w, a single pixel the
# others, so that all of them are exact.


def _rule(exponents: dict[float, float], module: Any, input_shape: Any, p: float) -> Bound:
    pixels = math.prod(_sizes(_batch_of(input_shape), module.window))
    return Bound(pixels ** exponents[p], "exact", p)


_EXPONENTS: dict[type[nn.Module], dict[float, float]] = {  # of w, for each p
    InvertibleDownsampling: {1: 0, 2: 0, math.inf: 0},
    InvertibleUpsampling: {1: 0, 2: 0, math.inf: 0},
    Upsampling: {1: 0.5, 2: 0, math.inf: -0.5},
}
for _layer, _powers in _EXPONENTS.items():
    lipschitz_rule.register(_layer, functools.partial(_rule, _powers))


# Note [overlapping windows]
# Let m be what squares are divided by, c the most windows that a pixel is in on this image, and v
# the most pixels of a window that are no padding. Norm pooling: the proof at the top with c in the
# place of m gives sqrt(c / m) for p = 2. For p = 1, a window changes by no more than the sum of the
# changes of its pixels, each of which is in c windows: c / sqrt m. For p = ∞, by sqrt v times the
# largest of them: sqrt(v / m). One pixel that grows from 0 attains the first two, a constant image
# the third. Average pooling: Note [one axis at a time], each factor being a matrix of windows.


def _batch_of(input_shape: Shape) -> Tensor:
    return torch.empty(1, *input_shape, device="meta")


def _in_windows(n: int, k: int, s: int, pad: int) -> Tensor:
    """Which pixels of an axis each window reads, (windows, n)."""
    first = torch.arange((n + 2 * pad - k) // s + 1)[:, None] * s - pad
    places = torch.arange(n)
    return ((first <= places) & (places < first + k)).double()


def _windows_of(module: _Moved, input_shape: Shape) -> tuple[list[Tensor], int, int]:
    """Windows of each axis, how many pixels one has, and m of Note [overlapping windows]."""
    axes = module.axes(_batch_of(input_shape))
    found = [_in_windows(n, *axis) for n, axis in zip(input_shape[1:], axes, strict=True)]
    return found, math.prod(k for k, _, _ in axes), math.prod(-(-k // s) for k, s, _ in axes)


@lipschitz_rule.register
def _(module: NormPooling, input_shape: Shape, p: float) -> Bound:
    windows, _, overlap = _windows_of(module, input_shape)
    read, pixels = (math.prod(w.sum(d).max().item() for w in windows) for d in (0, 1))
    value = {1: read, 2: math.sqrt(read), math.inf: math.sqrt(pixels)}[p]
    return Bound(value / math.sqrt(overlap), "exact", p)


@lipschitz_rule.register
def _(module: AveragePooling, input_shape: Shape, p: float) -> Bound:
    windows, pixels, overlap = _windows_of(module, input_shape)
    if overlap == 1 and module.padding == 0:  # on paper
        return Bound(pixels ** {1: -0.5, 2: 0, math.inf: 0.5}[p], "exact", p)
    value = math.prod(operator_norm(w, p).item() for w in windows)
    return Bound(value / math.sqrt(pixels * overlap), "exact", p)


# ------------------------------------------------------------------- matrices and ranges


@_rule_of(
    *(InvertibleDownsampling, InvertibleUpsampling, Upsampling, AveragePooling),
    dispatch=affine_rule,
)
def _(module: Any, input_shape: Shape) -> Affine:
    """Give a matrix whose entries are 0 and one positive number."""
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    entry, terms = 1.0, 1
    if isinstance(module, Upsampling):
        entry = 1 / math.sqrt(math.prod(_per_axis(zero, cast(Size, module.window))))
    elif isinstance(module, AveragePooling):
        _, terms, overlap = _windows_of(module, input_shape)
        entry = 1 / math.sqrt(terms * overlap)
    return Affine(module, module, lambda v: module(v) * entry, module(zero)[0], terms + 4)


@range_rule.register
def _(module: NormPooling, values: Range) -> Range:
    """Pool the least and the largest moduli: a norm grows with each of them."""
    least = torch.maximum(values.low, -values.high).clamp(min=0)
    low, high = outward(module(least), module(values.abs()))
    _, pixels, _ = _windows_of(module, values.shape)
    slack = 2.0**-50 * pixels
    low, high = (low * (1 - slack) - _LEAST).clamp(min=0), high * (1 + slack) + _LEAST
    if values.center is None or values.radius is None:
        return Range(low, high)
    stretch = lipschitz_rule(module, values.shape, 2.0).value * (1 + 2.0**-40)
    center = module(values.center)
    off = (center.flatten(1).norm(dim=1) * slack) + _LEAST * math.sqrt(center[0].numel())
    return Range(low, high, center, values.radius * stretch + off)


_LEAST = 2.0**-500  # below which squares vanish


@units_rule.register
def _(module: NormPooling, input_shape: Shape) -> Units:
    """Take each window as a group of units, (x_1, ..., x_w) to (its norm, 0, ..., 0)."""
    n = math.prod(input_shape)
    places = torch.arange(1, n + 1, dtype=torch.float64).view(1, *input_shape)
    axes = module.axes(places)
    overlap = math.prod(-(-k // s) for k, s, _ in axes)
    taps = _taps(places, axes).flatten(0, -2).long()  # (windows, w), 0 for the padding
    count, pixels = taps.shape
    before = torch.eye(n + 1, dtype=torch.float64)[taps.flatten(), 1:]
    before = before / math.sqrt(overlap) * (1 + 2.0**-50)
    behind = torch.zeros(count, pixels, count, dtype=torch.float64)
    behind[:, 0] = torch.eye(count, dtype=torch.float64)
    one = torch.ones(len(before), dtype=torch.float64)
    group = torch.arange(count).repeat_interleave(pixels)
    return Units(-one, one, group=group, before=before, behind=behind.flatten(0, 1).mT)


# ------------------------------------------------------------------- errors of programs

_error_rule_of(InvertibleDownsampling, InvertibleUpsampling)(moved_error)
_cuda_rule_of(InvertibleDownsampling, InvertibleUpsampling, AveragePooling)(plain_kernels)


@_error_rule_of(Upsampling)
def _(module: Upsampling, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    return lambda x: _relative(module, x, p, lipschitz, 3)  # the constant and the quotient


@_error_rule_of(NormPooling)
def _(module: NormPooling, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    roundings = 4 + math.prod(k for k, _, _ in module.axes(example))  # squares, sum, share, root

    def analysis(x: Tensor) -> ForwardError:
        size = _norms(x, p)
        result = _relative(module, x, p, lipschitz, roundings)
        # Squares may underflow or overflow where their root would not.
        info = torch.finfo(torch.promote_types(x.dtype, torch.float32))
        lost = roundings * math.sqrt(info.tiny) * _entries(result.outputs, p)
        limit = result.limit.clamp(max=math.sqrt(info.max) / 4 - size)
        return dataclasses.replace(result, error=result.error + lost, limit=limit)

    return analysis


@_error_rule_of(AveragePooling)
def _(module: AveragePooling, example: Tensor, p: float) -> Analysis:
    norm = _closed_form(module, example, p)
    window = math.prod(k for k, _, _ in module.axes(example))
    affine = _Affine(module, norm, norm * window, 0.0, 1.0, window + 2)  # the sum comes undivided
    return lambda x: affine(x, p)
