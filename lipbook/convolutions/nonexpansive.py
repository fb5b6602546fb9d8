"""1-Lipschitz convolutions, in general not orthogonal: RKO, AOL, and a bound of any kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Bound
from lipbook.convolutions.circular import (
    CONV,
    CircularConv,
    CircularConvTranspose,
    Padding,
    Size,
    check_kernel,
    convolution_rule,
    per_axis,
    semi_orthogonal,
    torch_computes,
)
from lipbook.errors import (
    Analysis,
    _cuda_rule_of,
    _error_rule_of,
)
from lipbook.freezing import register_plain
from lipbook.layers.linear import convolution_error, convolution_kernels
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _floating, _integer
from lipbook.norms.rigorous import rigorous_matrix_norm
from lipbook.orthogonal import cholesky_qr
from lipbook.orthogonal.orthonormality import negligible, power_of_two, without_autocast
from lipbook.rules import Shape, _rule_of

__all__ = [
    "rko_kernel",
    "aol_kernel",
    "kernel_norm_bound",
    "RKO",
    "AOL",
    "NonexpansiveConv2d",
    "NonexpansiveConv1d",
    "NonexpansiveConv3d",
    "NonexpansiveConvTranspose2d",
    "NonexpansiveConvTranspose1d",
    "NonexpansiveConvTranspose3d",
]

NonexpansiveMethod = Literal["aol", "rko"]
_MANY = 128  # phases of channels from which one product of matrices a shift takes less


def rko_kernel(weight: Tensor, stride: Size = 1, dilation: Size = 1, groups: int = 1) -> Tensor:
    r"""Reshaped kernel orthogonalisation (RKO): a 1-Lipschitz kernel, in general not orthogonal.

    .. math::
        K = \frac{Q}{\sqrt{\prod\lceil k g / s\rceil}}, \qquad
        \operatorname{mat}(Q) = \text{orthogonal factor of } \operatorname{mat}(W)
        \in \mathbb R^{c_{out} \times c_{in} k^d},
        \qquad g = \gcd(s, \text{dilation})

    A pixel is read by at most :math:`\prod\lceil kg/s\rceil` windows, hence
    :math:`\lVert Kx\rVert^2 = \sum_i\lVert Q\, x_{\text{window }i}\rVert^2 /
    \prod\lceil kg/s\rceil \le \lVert x\rVert^2`.

    **Guaranteed**: norm at most 1. **Not guaranteed**: orthogonality, except if windows do not
    overlap (k = stride), where it is orthogonal.

    Parameters
    ----------
    weight : torch.Tensor
        (c_out, c_in / groups, \*k).
    stride, dilation : int or sequence of int
        Of the convolution.
    groups : int
        Groups of channels, orthogonalised one by one.

    Returns
    -------
    torch.Tensor
        Like ``weight``.

    Raises
    ------
    ValueError
        If ``weight`` is no such kernel or a geometry does not fit it.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_singular_values
    >>> kernel = rko_kernel(torch.randn(4, 4, 3, 3))
    >>> values = circular_convolution_singular_values(kernel, 8)
    >>> bool(values.max() < 1 and values.min() < 0.5)
    True

    References
    ----------
    :cite:t:`li2019preventing`, section 4.1 and appendix.
    """
    dims = check_kernel(weight, groups)
    strides, dilations = per_axis("stride", stride, dims), per_axis("dilation", dilation, dims)
    axes = zip(weight.shape[2:], strides, dilations, strict=True)
    overlap = math.prod([-(-k * math.gcd(s, d) // s) for k, s, d in axes])
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kernel = cholesky_qr(matrix.unflatten(0, (groups, -1)).flatten(2)).reshape(weight.shape)
    return (kernel / math.sqrt(overlap)).to(weight.dtype)


def aol_kernel(
    weight: Tensor, stride: Size = 1, dilation: Size = 1, groups: int = 1, steps: int = 1
) -> Tensor:
    r"""Almost-orthogonal Lipschitz (AOL) kernel: columns rescaled to a norm of at most 1.

    .. math::
        K = W \operatorname{diag}(d), \qquad
        d_j = \Big(\sum_{i,\tau} \big|(W^\top W)_{ij,\tau}\big|\Big)^{-1/2}, \qquad
        (W^\top W)_{ij,\tau} = \sum_{o,t} W_{oi,t}\, W_{oj,t+\tau}

    The row sums of :math:`|DW^\top WD|` weighted by :math:`1/d` are 1, so that its norm is at
    most 1. With a stride, the phases of the input are channels of their own: :math:`d` has one
    entry a channel and phase.

    Several steps take the row sums of a power, where the largest singular values stand out:

    .. math:: d_j = r_j^{-1/2^n}, \qquad
        r_j = \sum_{i,\tau} \big|M_{ij,\tau}\big|, \qquad M = (W^\top W)^{2^{n-1}} .

    **Why.** A symmetric matrix is at most the diagonal of its absolute row sums,
    :math:`0 \preceq M \preceq R`, and roots keep that order (Löwner, Heinz):
    :math:`W^\top W = M^{1/2^{n-1}} \preceq R^{1/2^{n-1}} = D^{-2}`.

    **Guaranteed**: norm at most 1 for any weight and any steps, up to rounding. With more steps it
    comes close to 1: without stride and dilation a row of M has
    :math:`N = c_{in} \prod (2^n (k - 1) + 1)` entries, so that
    :math:`r_j \le \sqrt N \lVert M\rVert`, and on large images the norm is at least
    :math:`N^{-1/2^{n+1}}`. (For a random 3 × 3 kernel of 16 channels it is 0.49, 0.71, 0.86, 0.94
    after one to four steps. To repeat the scaling of one step is no help: 0.49 stays 0.49.)
    **Not guaranteed**: orthogonality. It holds at an orthogonal ``weight``, and training can drift
    from there.

    Parameters
    ----------
    weight : torch.Tensor
        (c_out, c_in / groups, \*k).
    stride, dilation : int or sequence of int
        Of the convolution.
    groups : int
        Groups of channels.
    steps : int
        :math:`n`. The kernel of M has :math:`2^n (k - 1) + 1` taps along an axis without a stride,
        so that each step costs about :math:`2^d` times the one before.

    Returns
    -------
    torch.Tensor
        Like ``weight``.

    Raises
    ------
    TypeError
        If ``steps`` is no integer.
    ValueError
        If ``weight`` is no such kernel, a geometry does not fit it, or ``steps`` is less than 1.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_norm
    >>> weight = torch.randn(4, 4, 3, 3)
    >>> norms = [circular_convolution_norm(aol_kernel(weight, steps=n), 8) for n in (1, 2, 4)]
    >>> bool(norms[0] < norms[1] < norms[2] < 1)
    True

    References
    ----------
    :cite:t:`prach2022aol`, Theorem 2, for one step. Powers: :cite:t:`delattre2023gram`.
    """
    dims, steps = check_kernel(weight, groups), _integer("steps", steps, 1)
    sizes = weight.shape[2:]
    strides, dilations = per_axis("stride", stride, dims), per_axis("dilation", dilation, dims)
    with without_autocast(weight):
        kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
        kernel = kernel / power_of_two(kernel)
        few = math.prod(sizes) <= 9 * math.prod(strides)
        few = few and groups * weight[0].numel() ** 2 <= 2**23  # entries of the product
        if steps == 1:
            whole = max(dilations) == 1
            whole = whole and not any(k % s for k, s in zip(sizes, strides, strict=True))
            if whole and weight.shape[1] * math.prod(strides) >= _MANY:
                row_sums = _row_sums_of_shifts
            else:
                row_sums = _row_sums_of_product if few else _row_sums_of_correlation
            sums = row_sums(kernel.unflatten(0, (groups, -1)), strides, dilations)
            scale = sums.clamp(min=_least(sums, 1)).rsqrt().unsqueeze(1)
        else:
            sums, exponent = _row_sums_of_power(
                kernel.unflatten(0, (groups, -1)), strides, dilations, steps
            )
            root = 0.5**steps
            scale = sums.clamp(min=_least(sums, steps)) ** -root * (-exponent * root).exp2()
            scale = scale.unsqueeze(1)
        for axis, (k, s, d) in enumerate(zip(sizes, strides, dilations, strict=True), 3):
            scale = scale.index_select(axis, torch.arange(0, k * d, d, device=scale.device) % s)
        kernel = (kernel.unflatten(0, (groups, -1)) * scale).flatten(0, 1)
    return kernel.to(weight.dtype)


# Note [three courses of row sums]
# The products of all taps are those of one matrix, and a correlation of the kernel with itself
# adds those of equal shift. At the usual 3 x 3 taps they take as long, with more the correlation
# takes less. With a stride it is one of phases, most of whose taps are zeros: it takes three times
# as long as the matrix. The matrix of a shift is the transpose of that of the opposite one, so that
# a product for each of half of them does. With many phases, none of whose taps are zeros
# (kernel_size a multiple of stride), that takes the least: a third at 4 x 4 taps with stride 2.


def _row_sums_of_product(
    kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]
) -> Tensor:
    """Row sums of the Gram kernel of (groups, rows, c, *k), shape (groups, c, *strides)."""
    groups, _, channels, *sizes = kernel.shape
    dims, taps = len(sizes), math.prod(sizes)
    bins, places = [], torch.zeros((1, 1), dtype=torch.long, device=kernel.device)
    for k, s, d in zip(sizes, strides, dilations, strict=True):
        first = torch.arange(k, device=kernel.device)[:, None]
        phase, shift = first * d % s, first.mT - first + k - 1
        place = phase * (2 * k - 1) + shift
        bins += [s, 2 * k - 1]
        places = places[:, None, :, None] * (s * (2 * k - 1)) + place[:, None]
        places = places.flatten(2).flatten(0, 1)
    matrix = kernel.flatten(3).mT.flatten(2)  # (groups, rows, taps * channels)
    products = (matrix.mT @ matrix).view(groups, taps, channels, taps, channels)
    products = products.permute(1, 3, 0, 2, 4).flatten(0, 1)
    gram = products.new_zeros((math.prod(bins), *products.shape[1:]))
    gram = gram.index_add(0, places.flatten(), products).view(*bins, *products.shape[1:])
    sums = gram.abs().sum((*range(1, 2 * dims, 2), -1))
    return sums.movedim((-2, -1), (0, 1))


def _row_sums_of_correlation(
    kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]
) -> Tensor:
    """Compute the same by a convolution."""
    gram = _correlated(_phases(kernel, strides, dilations))
    sums = gram.abs().sum((2, *range(3, gram.dim())))
    return sums.view(len(kernel), kernel.shape[2], *strides)


def _row_sums_of_power(
    kernel: Tensor, strides: Sequence[int], dilations: Sequence[int], steps: int
) -> tuple[Tensor, Tensor]:
    """Row sums of the power of a Gram kernel, over two to an exponent of each group.

    The correlation of a symmetric kernel with itself is its square.
    """
    power = _phases(kernel, strides, dilations)
    exponent = power.new_zeros(len(kernel))
    for _ in range(steps):
        largest = power.detach().abs().flatten(1).amax(1)
        size = largest.where(largest > 0, 1).log2().round()
        power = _correlated(power / size.exp2().view(-1, *[1] * (power.dim() - 1)))
        exponent = 2 * (exponent + size)
    sums = power.abs().sum((2, *range(3, power.dim())))
    shape = (len(kernel), kernel.shape[2], *strides)
    return sums.view(shape), exponent.view(-1, *[1] * (len(shape) - 1))


def _phases(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Kernel on the phases of the input, (groups, channels, rows, *whole strides)."""
    groups = len(kernel)
    phases = input_phases(kernel.flatten(0, 1), strides, dilations).unflatten(0, (groups, -1))
    return phases.transpose(1, 2)


def _correlated(kernel: Tensor) -> Tensor:
    """Correlations of the channels of (groups, channels, rows, *k), a column for each channel."""
    groups, channels = kernel.shape[:2]
    gram = CONV[kernel.dim() - 4](
        kernel.transpose(0, 1).flatten(1, 2),
        kernel.flatten(0, 1),
        padding=[size - 1 for size in kernel.shape[3:]],
        groups=groups,
    )  # (channels, groups * channels, *shifts)
    return gram.unflatten(1, (groups, channels)).transpose(0, 1).transpose(1, 2)


def _least(sums: Tensor, steps: int) -> Tensor:
    """Row sum that a column of zeros is given, to have a gradient."""
    largest = sums.detach().amax()
    share = max(negligible(sums.dtype) ** 2 ** (steps - 1), torch.finfo(sums.dtype).tiny ** 0.75)
    return largest.where(largest > 0, 1) * share


def _row_sums_of_shifts(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Compute the same by a product of matrices for each of half of the shifts."""
    groups, dims = len(kernel), len(strides)
    phases = input_phases(kernel.flatten(0, 1), strides, dilations).unflatten(0, (groups, -1))
    taps = phases.movedim((1, 2), (-2, -1)).contiguous()  # (groups, *whole strides, rows, channels)
    sizes = taps.shape[1 : 1 + dims]
    sums = []
    for shift in itertools.product(*(range(1 - size, size) for size in sizes)):
        first = second = taps
        for axis, (d, size) in enumerate(zip(shift, sizes, strict=True), 1):
            first = first.narrow(axis, max(-d, 0), size - abs(d))
            second = second.narrow(axis, max(d, 0), size - abs(d))
        if shift >= (0,) * dims:
            gram = (first.flatten(1, -2).mT @ second.flatten(1, -2)).abs()
            sums += [gram.sum(-1), gram.sum(-2)] if any(shift) else [gram.sum(-1)]
    return torch.stack(sums).sum(0).view(groups, kernel.shape[2], *strides)


def input_phases(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Kernel on the phases of the input, (c_out, c_in * prod(stride), *whole strides)."""
    dims = len(strides)
    for axis, (s, d) in enumerate(zip(strides, dilations, strict=True), 2):
        spread = functional.pad(kernel.movedim(axis, -1).unsqueeze(-1), (0, d - 1)).flatten(-2)
        spread = functional.pad(spread, (0, -spread.shape[-1] % s)).unflatten(-1, (-1, s))
        kernel = spread.movedim(-2, axis)  # the phases of all axes gather at the end
    phases = range(2 + dims, 2 + 2 * dims)
    return kernel.permute(0, 1, *phases, *range(2, 2 + dims)).flatten(1, 1 + dims)


def kernel_norm_bound(kernel: Tensor, squarings: int = 4) -> Tensor:
    r"""Upper bound of the norm of a convolution on all images, from its reshaped kernel.

    .. math::
        \lVert K * \rVert \le \sqrt{\textstyle\prod k}\; \lVert\operatorname{mat}(K)\rVert_2
        \le \sqrt{\textstyle\prod k}\; \lVert (M M^\top)^{2^j} \rVert_F^{1 / 2^{j+1}},
        \qquad M = \operatorname{mat}(K) \in \mathbb R^{c_{out} \times c_{in} k^d}

    The first inequality counts how often a pixel is read (as :func:`rko_kernel` does), the second
    is Gram iteration :cite:p:`delattre2023gram`. Cheap, differentiable, and without a look at the
    values: for use in layers. :func:`~lipbook.norms.convolution_norm_bound` is much tighter.

    Parameters
    ----------
    kernel : torch.Tensor
        (c_out, c_in, \*k). A matrix is a kernel without axes.
    squarings : int
        :math:`j`. With 4 the second inequality is off by at most :math:`c_{out}^{1/64}`.

    Returns
    -------
    torch.Tensor
        The bound, a scalar in the dtype of ``kernel``.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_norm
    >>> kernel = torch.randn(8, 8, 3, 3)
    >>> bool(circular_convolution_norm(kernel, 16) <= kernel_norm_bound(kernel))
    True
    """
    _floating("kernel", kernel, 2)
    _integer("squarings", squarings, 0)
    with without_autocast(kernel):
        scale = power_of_two(kernel)
        matrix = (kernel / scale).flatten(1)
        gram = matrix @ matrix.mT
        bound = gram.new_ones(())
        for step in range(squarings + 1):
            norm = torch.linalg.matrix_norm(gram).clamp(min=torch.finfo(gram.dtype).tiny)
            bound = bound * norm ** (0.5**step)
            if step < squarings:
                gram = (gram / norm) @ (gram / norm)
        return scale * (bound * math.prod(kernel.shape[2:])).sqrt()


class RKO(nn.Module):
    r"""Parametrization by :func:`rko_kernel`: norm at most 1, in general not orthogonal.

    Parameters
    ----------
    stride, dilation, groups
        Of the convolution.

    Examples
    --------
    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Conv1d(2, 2, 3, padding=1)
    >>> layer = parametrize.register_parametrization(layer, "weight", RKO())
    >>> layer.weight.flatten(1).square().sum(1)
    tensor([0.3333, 0.3333], grad_fn=<SumBackward1>)
    """

    def __init__(self, stride: Size = 1, dilation: Size = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = stride, dilation, groups

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raw weight to start from: its matrix (c_out, c_in k²) is semi-orthogonal."""
        return (semi_orthogonal(weight.flatten(1)).view(weight.shape),)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return rko_kernel(weight, self.stride, self.dilation, self.groups)


class AOL(RKO):
    r"""Parametrization by :func:`aol_kernel`: norm at most 1, almost orthogonal at best.

    Parameters
    ----------
    stride, dilation, groups
        Of the convolution.
    steps : int
        As in :func:`aol_kernel`.

    Examples
    --------
    >>> from torch.nn.utils import parametrize
    >>> layer = parametrize.register_parametrization(nn.Conv1d(2, 2, 3), "weight", AOL())
    >>> layer.weight.shape
    torch.Size([2, 2, 3])
    """

    def __init__(
        self, stride: Size = 1, dilation: Size = 1, groups: int = 1, steps: int = 1
    ) -> None:
        super().__init__(stride, dilation, groups)
        self.steps = _integer("steps", steps, 1)

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raw weight to start from: one tap for each phase of the input, together semi-orthogonal.

        At stride 1 that is the middle tap. With a stride a column of zeros would be left for each
        phase that has no tap, and the scale of such a column has no derivative.
        """
        raw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        dims = weight.dim() - 2
        strides, dilations = (per_axis("", each, dims) for each in (self.stride, self.dilation))
        middle = raw
        for axis, (s, d) in enumerate(zip(strides, dilations, strict=True), 2):
            size = weight.shape[axis]
            taps = min(size, s // math.gcd(s, d))  # in a row they read as many phases
            middle = middle.narrow(axis, (size - taps + 1) // 2, taps)
        shape = middle.shape
        matrices = semi_orthogonal(middle.unflatten(0, (self.groups, -1)).flatten(2))
        middle.copy_(matrices.reshape(shape))
        return (raw,)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return aol_kernel(weight, self.stride, self.dilation, self.groups, self.steps)


# Note [symmetric padding]
# With a span of d (k - 1) pixels and a border of at most half of it, tap t of a window reads pixel
# j from inside, or tap k - 1 - t reads it in one of the two mirrors, never both: direct reading
# takes -P <= j - d t < n + P - span, the left mirror j - d t < P - span <= -P, the right one
# j - d t >= n - P >= n + P - span. So each pixel is read at most k times an axis, as without a
# border, which is all that RKO needs: ||Kx|| <= sqrt(prod k) ||mat(K)|| ||x||. Reflection without
# the outermost pixel reads a pixel beside the border k + 1 times, replication more.


def _constraint(method: str, steps: int) -> Callable[[Size, Size, int], RKO]:
    if method not in get_args(NonexpansiveMethod):
        raise ValueError(f"method must be one of {get_args(NonexpansiveMethod)}, got {method!r}")
    if _integer("steps", steps, 1) > 1 and method != "aol":
        raise ValueError(f"steps must be 1 with method {method!r}, got {steps}: they are AOL's")
    return functools.partial(AOL, steps=steps) if method == "aol" else RKO


class _NonexpansiveConv(CircularConv):
    _padding_modes = ("circular", "zeros", "symmetric")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["circular", "zeros", "symmetric"] = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: NonexpansiveMethod = "aol",
        steps: int = 1,
    ) -> None:
        constraint = _constraint(method, steps)
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        if padding_mode == "symmetric" and (method != "rko" or max(self.stride) > 1):
            raise ValueError(
                "padding_mode must be 'circular' or 'zeros' but for method 'rko' without a stride, "
                f"got 'symmetric' with method {method!r} and stride {self.stride}"
            )
        if padding_mode == "symmetric" and any(
            2 * max(pair) > d * (k - 1)
            for pair, d, k in zip(self._pads, self.dilation, self.kernel_size, strict=True)
        ):
            raise ValueError(
                "padding must be integers for an even kernel with symmetric padding, got 'same' "
                f"and kernel_size {self.kernel_size}"
            )
        self._constrain(constraint(self.stride, self.dilation, groups))


class NonexpansiveConv2d(_NonexpansiveConv, nn.Conv2d):
    r"""1-Lipschitz convolution in two dimensions, not orthogonal (AOL or RKO).

    **Guaranteed**: norm at most 1, with circular and with zero padding. **Not guaranteed**:
    anything from below; trained layers of either kind attenuate most directions.

    Parameters
    ----------
    in_channels, ..., groups, bias, device, dtype
        As in :class:`OrthogonalConv2d`, with any kernel size and any groups.
    padding_mode : str
        ``"circular"`` or ``"zeros"``; with ``method="rko"`` and without a stride also
        ``"symmetric"``, the mirror image whose first pixel is the outermost one.
    method : str
        ``"aol"``: :func:`aol_kernel`, from a semi-orthogonal start. ``"rko"``: :func:`rko_kernel`.
    steps : int
        Of :func:`aol_kernel`: with more of them less norm is lost, at a higher cost.

    Raises
    ------
    ValueError
        As in :class:`OrthogonalConv2d`; if ``steps`` is less than 1, or more with ``"rko"``.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place, as by
    ``torch.nn.init.uniform_(layer.weight)``, is lost without an error, and no weight can be
    assigned. Call ``reset_parameters()`` to draw anew, or write into the
    raw parameter, ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer, x = NonexpansiveConv2d(8, 8, 3, groups=8, bias=False), torch.randn(5, 8, 8, 8)
    >>> bool((layer(x).norm() <= x.norm() * (1 + 1e-6)))
    True
    """

    _dims = 2


class NonexpansiveConv1d(_NonexpansiveConv, nn.Conv1d):
    """1-Lipschitz convolution in one dimension, not orthogonal (AOL or RKO).

    The norm is at most 1. The arguments are those of :class:`NonexpansiveConv2d`.
    """

    _dims = 1


class NonexpansiveConv3d(_NonexpansiveConv, nn.Conv3d):
    """1-Lipschitz convolution in three dimensions, not orthogonal (AOL or RKO).

    The norm is at most 1. The arguments are those of :class:`NonexpansiveConv2d`.
    """

    _dims = 3


class _NonexpansiveConvTranspose(CircularConvTranspose):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = "same",
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["circular", "zeros"] = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: NonexpansiveMethod = "aol",
        steps: int = 1,
    ) -> None:
        constraint = _constraint(method, steps)
        geometry = (stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, device, dtype)
        self._constrain(constraint(self.stride, self.dilation, self.groups))


class NonexpansiveConvTranspose2d(_NonexpansiveConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    r"""1-Lipschitz transposed convolution in two dimensions, not orthogonal (AOL or RKO).

    The adjoint of :class:`NonexpansiveConv2d` from ``out_channels`` to ``in_channels``, which has
    its singular values: :class:`torch.nn.ConvTranspose2d` with such a weight, and with circular
    padding, which torch does not offer. **Guaranteed**: norm at most 1, with circular and with
    zero padding, and with an ``output_padding``. **Not guaranteed**: anything from below.

    Parameters
    ----------
    in_channels, ..., dtype
        As in :class:`OrthogonalConvTranspose2d`, with any groups and a kernel no smaller than the
        stride.
    method, steps
        As in :class:`NonexpansiveConv2d`.

    Raises
    ------
    ValueError
        As in :class:`OrthogonalConvTranspose2d`.

    Examples
    --------
    >>> layer = NonexpansiveConvTranspose2d(8, 4, 4, stride=2, groups=2, bias=False)
    >>> x = torch.randn(5, 8, 6, 6)
    >>> layer(x).shape, bool(layer(x).norm() <= x.norm() * (1 + 1e-6))
    (torch.Size([5, 4, 12, 12]), True)

    References
    ----------
    :cite:t:`prach2022aol`; :cite:t:`li2019preventing`.
    """

    _dims = 2


class NonexpansiveConvTranspose1d(_NonexpansiveConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """1-Lipschitz transposed convolution in one dimension, not orthogonal (AOL or RKO).

    The norm is at most 1. The arguments are those of :class:`NonexpansiveConvTranspose2d`.
    """

    _dims = 1


class NonexpansiveConvTranspose3d(_NonexpansiveConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """1-Lipschitz transposed convolution in three dimensions, not orthogonal (AOL or RKO).

    The norm is at most 1. The arguments are those of :class:`NonexpansiveConvTranspose2d`.
    """

    _dims = 3


_TRANSPOSED = (
    NonexpansiveConvTranspose1d,
    NonexpansiveConvTranspose2d,
    NonexpansiveConvTranspose3d,
)
_rule_of(*_TRANSPOSED)(convolution_rule)
_error_rule_of(*_TRANSPOSED)(convolution_error)


@_rule_of(NonexpansiveConv1d, NonexpansiveConv2d, NonexpansiveConv3d)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    if module.padding_mode != "symmetric":
        return convolution_rule(module, input_shape, p)
    weight = module.weight.detach().double()
    return Bound(_symmetric_norm(weight, module.groups, p, operator_norm), "upper bound", p)


def _symmetric_norm(weight: Tensor, groups: int, p: float, norm: Callable[..., Any]) -> float:
    """Bound of the norm with symmetric padding, from a norm of matrices; see the note."""
    taps = tuple(range(2, weight.dim()))
    kernels = weight.unflatten(0, (groups, -1))
    if p == 1:  # the columns of a pixel hold each tap or its mirror
        columns = kernels.double().abs().sum(1)
        for axis in taps:
            columns = torch.maximum(columns, columns.flip(axis))
        return columns.sum(taps).amax().item() * (1 + 2.0**-40)
    largest = max(float(norm(kernel.flatten(1), p)) for kernel in kernels)
    return largest * math.prod(weight.shape[2:]) ** (1 / p) * (1 + 2.0**-40)


@_error_rule_of(NonexpansiveConv1d, NonexpansiveConv2d, NonexpansiveConv3d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    if module.padding_mode != "symmetric":
        return convolution_error(module, example, p)

    def norm(weight: Tensor, q: float) -> float:
        return _symmetric_norm(weight, module.groups, q, rigorous_matrix_norm)

    return convolution_error(module, example, p, norm)


_cuda_rule_of(NonexpansiveConv1d, NonexpansiveConv2d, NonexpansiveConv3d)(convolution_kernels)

register_plain(NonexpansiveConv1d, nn.Conv1d, torch_computes)
register_plain(NonexpansiveConv2d, nn.Conv2d, torch_computes)
register_plain(NonexpansiveConv3d, nn.Conv3d, torch_computes)
register_plain(NonexpansiveConvTranspose1d, nn.ConvTranspose1d, torch_computes)
register_plain(NonexpansiveConvTranspose2d, nn.ConvTranspose2d, torch_computes)
register_plain(NonexpansiveConvTranspose3d, nn.ConvTranspose3d, torch_computes)
