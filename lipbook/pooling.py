r"""Pooling and resampling that keep norms.

A window of :math:`w = \prod s` pixels is rearranged, collapsed to one number, or filled from one.
Windows do not overlap: an image with sizes that the window does not divide is refused, since
pixels that are dropped lose norm and pixels that are read twice add to it. All maps treat channels
and windows alike, so that each Lipschitz constant is that of a single window.

=============================  =========================================  =====  =======  =====
layer                          what it keeps                              p = 1  p = 2    p = ∞
=============================  =========================================  =====  =======  =====
``InvertibleDownsampling``     all norms, both ways: a permutation        1      1        1
``InvertibleUpsampling``       all norms, both ways: a permutation        1      1        1
``NormPooling``                2-norms, and those of gradients            1      1        √w
``AveragePooling``             norms of gradients (semi-orthogonal)       1/√w   1        √w
``Upsampling``                 2-norms (isometry)                         √w     1        1/√w
=============================  =========================================  =====  =======  =====
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
from lipbook.norms.arguments import _floating, _tensor

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


@traced_as(lambda window: NormPooling(window))  # noqa: PLW0108 - the class stands below
def norm_pooling(x: Tensor, window: Window) -> Tensor:
    r"""Norm pooling: the Euclidean norm of each window.

    .. math:: y_{c, i} = \Big(\sum_{a \in \text{window } i} x_{c, a}^2\Big)^{1/2}

    **Guaranteed**: keeps the 2-norm of its input, is 1-Lipschitz, and keeps the norm of gradients
    wherever no window is zero: the rows of its Jacobian are unit vectors on disjoint windows. On a
    window of zeros there is no gradient, and 0 is returned.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    window : int or sequence of int or str
        Size of a window; ``"global"`` for one window as large as the image, whatever its size.

    Returns
    -------
    torch.Tensor
        (batch, c, \*(size / window)), not negative.

    Raises
    ------
    ValueError
        If the window does not divide the size.

    Examples
    --------
    >>> norm_pooling(torch.tensor([[[3.0, 4.0, 0.0, -2.0]]]), 2)
    tensor([[[5., 2.]]])
    """
    _floating("x", x)
    means, pixels = _means(x.to(torch.promote_types(x.dtype, torch.float32)).square(), window)
    squares = means * pixels
    positive = (squares.detach() > 0).to(squares.dtype)  # the root of 0 has no derivative
    return ((squares + (1 - positive)).sqrt() * positive).to(x.dtype)


@traced_as(lambda window: AveragePooling(window))  # noqa: PLW0108 - the class stands below
def average_pooling(x: Tensor, window: Window) -> Tensor:
    r"""Average pooling, rescaled to norm 1.

    .. math:: y_{c, i} = \frac{1}{\sqrt w} \sum_{a \in \text{window } i} x_{c, a}

    The mean times :math:`\sqrt w`. **Guaranteed**: norm 1, and semi-orthogonal: all singular values
    are 1, so that it keeps the norm of gradients. The mean itself has norm :math:`1/\sqrt w`.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    window : int or sequence of int or str
        Size of a window; ``"global"`` for one window as large as the image, whatever its size.

    Returns
    -------
    torch.Tensor
        (batch, c, \*(size / window)).

    Raises
    ------
    ValueError
        If the window does not divide the size.

    Examples
    --------
    >>> average_pooling(torch.ones(1, 1, 4, 4), 2)
    tensor([[[[2., 2.],
              [2., 2.]]]])
    >>> average_pooling(torch.ones(1, 1, 4, 4), "global")
    tensor([[[[4.]]]])
    """
    means, pixels = _means(x, window)
    return means * math.sqrt(pixels)


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


def _per_axis(x: Tensor, window: Size) -> tuple[int, ...]:
    """One integer for each of the axes after the channels."""
    _tensor("x", x)
    dims = x.dim() - 2
    sizes = tuple(window) if isinstance(window, Sequence) else (window,) * dims
    if dims < 1 or len(sizes) != dims or not all(map(_positive, sizes)):
        raise ValueError(
            "window must be a positive integer, or one for each axis after the channels, "
            f"got {window!r} for an input of shape {tuple(x.shape)}"
        )
    return tuple(operator.index(n) for n in sizes)


def _positive(size: Any) -> bool:
    return hasattr(size, "__index__") and size >= 1


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


def _means(x: Tensor, window: Window) -> tuple[Tensor, int]:
    """Mean of each window, and how many pixels it has."""
    sizes = _divisors(x, window)
    if len(sizes) <= len(_POOLS):
        return _POOLS[len(sizes) - 1](x, sizes), math.prod(sizes)
    windows, dims = _windows(x, window)
    return windows.mean(tuple(range(2, 2 + dims))), math.prod(sizes)


# ---------------------------------------------------------------------------------- layers


class _Windowed(nn.Module):
    window: Window

    def __init__(self, window: Size) -> None:
        super().__init__()
        sizes = tuple(window) if isinstance(window, Sequence) else (window,)
        if not sizes or not all(map(_positive, sizes)):
            raise ValueError(f"window must be one or more positive integers, got {window!r}")
        sizes = tuple(operator.index(n) for n in sizes)
        self.window = sizes if isinstance(window, Sequence) else sizes[0]

    def extra_repr(self) -> str:
        """Show the window."""
        return f"window={self.window!r}"


class _Pooled(_Windowed):
    def __init__(self, window: Window) -> None:
        if isinstance(window, str) and window == "global":
            nn.Module.__init__(self)
            self.window = window
        else:
            super().__init__(window)


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


class NormPooling(_Pooled):
    r"""Norm pooling, 1-Lipschitz and gradient-norm preserving: see :func:`norm_pooling`.

    Parameters
    ----------
    window : int or sequence of int or str
        Size of a window, or ``"global"``.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> [round(lipschitz_bound(NormPooling(2), (3, 8, 8), p).value, 3) for p in (1, 2, math.inf)]
    [1.0, 1.0, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool, (batch, c, *size) to (batch, c, *(size / window))."""
        return norm_pooling(input, self.window)


class AveragePooling(_Pooled):
    r"""Average pooling of norm 1, semi-orthogonal: see :func:`average_pooling`.

    Parameters
    ----------
    window : int or sequence of int or str
        Size of a window, or ``"global"``.

    Examples
    --------
    >>> pixels = torch.eye(16).view(16, 1, 4, 4)
    >>> matrix = AveragePooling(2)(pixels).flatten(1).mT
    >>> torch.equal(matrix @ matrix.mT, torch.eye(4))
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool, (batch, c, *size) to (batch, c, *(size / window))."""
        return average_pooling(input, self.window)


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
    pixels = math.prod(_sizes(torch.empty(1, *input_shape, device="meta"), module.window))
    return Bound(pixels ** exponents[p], "exact", p)


_EXPONENTS: dict[type[nn.Module], dict[float, float]] = {  # of w, for each p
    InvertibleDownsampling: {1: 0, 2: 0, math.inf: 0},
    InvertibleUpsampling: {1: 0, 2: 0, math.inf: 0},
    NormPooling: {1: 0, 2: 0, math.inf: 0.5},
    AveragePooling: {1: -0.5, 2: 0, math.inf: 0.5},
    Upsampling: {1: 0.5, 2: 0, math.inf: -0.5},
}
for _layer, _powers in _EXPONENTS.items():
    lipschitz_rule.register(_layer, functools.partial(_rule, _powers))


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
    roundings = 3 + example[0].numel() // module(example)[0].numel()  # squares, sum, root

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
    window = -(-example[0].numel() // module(example)[0].numel())
    affine = _Affine(module, norm, norm * window, 0.0, 1.0, window + 2)  # the sum comes undivided
    return lambda x: affine(x, p)
