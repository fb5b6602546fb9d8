"""Shift convolutions: channels mixed by an orthogonal matrix, and moved around the circle."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipbook.composition import Bound, lipschitz_rule
from lipbook.convolutions.circular import OnUnshuffled, channel_counts, semi_orthogonal
from lipbook.errors import (
    Analysis,
    _Affine,
    _after_cast,
    _bias_norm,
    _check_direct,
    _computing_dtype,
    _error_rule_of,
)
from lipbook.layers.linear import matrix_of_moduli, weighted_affine
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _integer, _tensor
from lipbook.norms.rigorous import rigorous_matrix_norm
from lipbook.orthogonal.constrained import raw_parameters
from lipbook.orthogonal.layers import METHODS, Method
from lipbook.rules import affine_rule

__all__ = [
    "channel_shift",
    "ShiftConv2d",
]

torch.fx.wrap("channel_shift")  # a step of its own in torch.fx, see circular.py

#: A fifth of the channels stays, the others go to the four neighbours.
NEIGHBOURS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


def channel_shift(x: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    r"""Move groups of channels around the circle, each by an offset of its own.

    .. math:: y_{c, i} = x_{c,\, i - o_{g(c)}} \qquad (i - o \text{ modulo the size of the image})

    Channel c is in the group g(c) of G, which follow each other and are as equal as possible, as
    ``torch.tensor_split`` makes them.

    **Guaranteed**: a permutation of the entries, hence norms are kept for every p, those of
    gradients too.

    It is a circular convolution of each channel with a kernel of its own, and among those almost
    nothing else keeps norms. A convolution with a real kernel :math:`k` keeps the 2-norm if and
    only if :math:`|\hat k(\theta)| = 1` at all frequencies of the image. If no two of its taps
    are more than d pixels apart along an axis, and the image has more than 2d pixels along each,
    only shifts with a sign do: :math:`|\hat k|^2` is the transform of the products of taps, summed
    over pairs of equal difference, and only one pair has the largest difference. On smaller images
    there are others, as (2/3, 2/3, -1/3) on a circle of three pixels.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    offsets : sequence of sequence of int
        For each of the G ≤ c groups, by how many pixels it moves along each axis of the size.

    Returns
    -------
    torch.Tensor
        Like ``x``.

    Raises
    ------
    ValueError
        If there are no offsets, more than channels, or not one integer for each axis.

    Examples
    --------
    >>> x = torch.arange(8).view(1, 2, 1, 4)
    >>> channel_shift(x, [(0, 0), (0, 1)])
    tensor([[[[0, 1, 2, 3]],
    <BLANKLINE>
             [[7, 4, 5, 6]]]])

    References
    ----------
    :cite:t:`wu2018shift`; for networks that keep norms :cite:t:`hu2026lipnext`.
    """
    _tensor("x", x)
    moves = _offsets(offsets, x.dim() - 2)
    if x.dim() < 3 or x.shape[1] < len(moves):
        raise ValueError(
            f"x must be (batch, c, *size) with c at least the number of offsets, {len(moves)}, "
            f"got shape {tuple(x.shape)}"
        )
    axes = list(range(2, x.dim()))
    parts = zip(x.tensor_split(len(moves), 1), moves, strict=True)
    return torch.cat([part.roll(move, axes) if any(move) else part for part, move in parts], 1)


def _offsets(offsets: Any, dims: int) -> tuple[tuple[int, ...], ...]:
    try:
        moves = tuple(tuple(operator.index(o) for o in offset) for offset in offsets)
    except TypeError:
        moves = ()
    if not moves or any(len(move) != dims for move in moves):
        raise ValueError(
            f"offsets must be one or more sequences of {dims} integers, one for each axis of the "
            f"image, got {offsets!r}"
        )
    return moves


class ShiftConv2d(OnUnshuffled):
    r"""Shift convolution: an orthogonal matrix mixes the channels of a pixel, then they move.

    .. math:: x \mapsto S\,(W \cdot x) + b

    W acts on the channels of each pixel, S is :func:`channel_shift`; a stride is invertible
    downsampling before them. **Guaranteed**: all :math:`\min(m, n)` singular values of the layer
    are 1, at every image size that the stride divides, as exactly as those of W are
    (:class:`~lipbook.orthogonal.OrthogonalLinear` says how exactly for each method). It costs a
    product of matrices and a copy, and sees one pixel further than the layer before.

    **Not guaranteed**: reaching every orthogonal convolution. A product of k layers of equal width
    is one whose kernel is a product of k matrices and shifts.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    stride : int
        A divisor of the image size.
    offsets : sequence of (int, int)
        For each group of the c_out channels, by how many pixels it moves down and right.
    bias : bool
        Whether to add one number a channel.
    method : str
        Of :class:`~lipbook.orthogonal.OrthogonalLinear`.
    device, dtype
        As in :class:`torch.nn.Conv2d`.

    Raises
    ------
    ValueError
        If ``method`` is unknown, or there are more offsets than c_out.

    Notes
    -----
    ``layer.weight`` is the matrix W, (c_out, c_in s²), and is computed whenever it is read: what is
    written into it in place is lost. Assign an orthonormal matrix, ``layer.weight =
    polar(weight)``, or call ``reset_parameters()`` to draw anew.

    Examples
    --------
    >>> layer, x = ShiftConv2d(3, 12, stride=2, bias=False), torch.randn(2, 3, 8, 8)
    >>> torch.allclose(layer(x).norm(), x.norm())
    True

    References
    ----------
    :cite:t:`hu2026lipnext`; the order of its parts there is another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        offsets: Sequence[Sequence[int]] = NEIGHBOURS,
        bias: bool = True,
        method: Method = "qr",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        in_channels, out_channels = channel_counts(in_channels, out_channels)
        stride = _integer("stride", stride, 1)
        if method not in tuple(METHODS):
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
        moves = _offsets(offsets, 2)
        if len(moves) > out_channels:
            raise ValueError(
                f"offsets must be at most out_channels {out_channels}, got {len(moves)} of them"
            )
        weight = torch.empty(out_channels, in_channels * stride**2, device=device, dtype=dtype)
        super().__init__(out_channels, stride, bias, weight, METHODS[method]())
        self.in_channels = in_channels
        self.offsets = moves

    def reset_parameters(self) -> None:
        """Draw W uniformly among the matrices with orthonormal columns or rows; b is zero."""
        weight = semi_orthogonal(raw_parameters(self)[0].detach())
        if raw_parameters(self)[0] is self._parameters.get("weight"):
            self.weight = torch.nn.Parameter(weight)
        else:
            self.weight = weight
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mix and move, from the phases (batch, c_in s², h / s, w / s)."""
        return channel_shift(functional.conv2d(x, weight[:, :, None, None]), self.offsets)


@lipschitz_rule.register
def _(module: ShiftConv2d, input_shape: tuple[int, ...], p: float) -> Bound:
    # Pixels are apart, and permutations keep norms.
    return Bound(operator_norm(module.weight.detach().double(), p).item(), "exact", p)


affine_rule.register(ShiftConv2d, weighted_affine)


# ------------------------------------------------------------------- errors of programs


@_error_rule_of(ShiftConv2d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    dtype = _computing_dtype(example, module.weight)
    weight = module.weight.detach().to(dtype)
    _check_direct(weight[:, :, None, None])

    def norm(q: float) -> float:
        return rigorous_matrix_norm(weight, q)

    affine = _Affine(
        layer=module,
        norm=norm(p),
        absolute_norm=matrix_of_moduli(weight, p),
        bias_norm=_bias_norm(module.bias, dtype, module(example)[0, 0].numel(), p),
        largest=weight.abs().max().item(),
        terms=weight.shape[1],
        plain_sums=True,
    )
    return _after_cast(affine, dtype, p)
