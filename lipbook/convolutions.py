r"""Orthogonal and 1-Lipschitz convolutions.

A convolution with kernel :math:`K` on a circular image is block-diagonalised by the Fourier
transform: it is orthogonal exactly if its frequency response
:math:`\hat K(\theta) = \sum_t K_t e^{\mathrm i\langle\theta, t\rangle}` is unitary at each angle.
The constructions here hold for all angles, hence for images of all sizes (that of Cayley
excepted). First the maps from free tensors to kernels, then a torch parametrization of each, so
that ``layer.weight`` *is* the constrained kernel, then the layers.

=============================  ==================================  ======================
layer                          singular values (circular padding)  kernel
=============================  ==================================  ======================
``OrthogonalConv``: BCOP       all 1                               any size, k ≥ stride
``NonexpansiveConv``: RKO      at most 1; all 1 if k = stride      any size
``NonexpansiveConv``: AOL      at most 1                           any size
``SkewOrthogonalConv2d``: SOC  between 1 - 3e-6 and 1              odd size; not explicit
``CayleyConv2d``               all 1                               as large as the image
=============================  ==================================  ======================

"All 1" means that the convolution keeps the norm of its input if there are no more inputs than
outputs, and the norm of gradients if there are no more outputs than inputs (semi-orthogonal).
Zero padding instead of circular padding keeps the guarantee "at most 1" and gives up the other.
Padding by reflection or replication copies pixels, which takes the norm above 1: it is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lipbook.composition import Bound, lipschitz_rule
from lipbook.norms import (
    convolution_norm_bound,
    convolution_norm_is_exact,
    dual_exponent,
)
from lipbook.orthogonal import cholesky_qr

__all__ = [
    "AOL",
    "BCOP",
    "RKO",
    "SOC",
    "CayleyConv2d",
    "CayleyKernel",
    "NonexpansiveConv1d",
    "NonexpansiveConv2d",
    "NonexpansiveConv3d",
    "OrthogonalConv1d",
    "OrthogonalConv2d",
    "OrthogonalConv3d",
    "OrthogonalConvTranspose1d",
    "OrthogonalConvTranspose2d",
    "OrthogonalConvTranspose3d",
    "SkewOrthogonalConv2d",
    "aol_kernel",
    "bcop_kernel",
    "block_convolution",
    "cayley_kernel",
    "circular_fold",
    "circular_pad",
    "kernel_norm_bound",
    "rko_kernel",
    "skew_exponential",
    "skew_kernel",
]

Size = int | Sequence[int]
OrthogonalMethod = Literal["bcop", "bcop_unshuffle"]
NonexpansiveMethod = Literal["aol", "rko"]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONV_TRANSPOSE = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)

# -------------------------------------------------------------- block convolution, projectors


def block_convolution(outer: Tensor, inner: Tensor) -> Tensor:
    r"""Block convolution of two kernels: the kernel of the composed convolutions.

    .. math:: (A \mathbin{\square} B)_u = \sum_t A_t\, B_{u - t}

    A convolution with kernel ``inner`` and then one with kernel ``outer`` (stride 1, no padding or
    circular padding) is one convolution with the returned kernel. Block convolutions of
    orthogonal kernels are orthogonal.

    Parameters
    ----------
    outer : torch.Tensor
        :math:`A`, (c_out, c_mid, \*k) with one to three sizes k.
    inner : torch.Tensor
        :math:`B`, (c_mid, c_in, \*l) with as many.

    Returns
    -------
    torch.Tensor
        (c_out, c_in, \*(k + l - 1)).

    Raises
    ------
    ValueError
        If the kernels differ in their number of axes or in ``c_mid``.

    Examples
    --------
    >>> A, B, image = torch.randn(2, 3, 2), torch.randn(3, 4, 3), torch.randn(1, 4, 9)
    >>> composed = functional.conv1d(functional.conv1d(image, B), A)
    >>> torch.allclose(functional.conv1d(image, block_convolution(A, B)), composed, atol=1e-5)
    True

    References
    ----------
    :cite:t:`li2019preventing`, section 4.2; :cite:t:`xiao2018`.
    """
    dims = outer.dim() - 2
    if outer.dim() != inner.dim() or dims not in (1, 2, 3) or outer.shape[1] != inner.shape[0]:
        raise ValueError(
            "outer and inner must be kernels (c_out, c_mid, *k) and (c_mid, c_in, *l), "
            f"got {tuple(outer.shape)} and {tuple(inner.shape)}"
        )
    flipped = inner.transpose(0, 1).flip(list(range(2, inner.dim())))  # conv sums A_t B_{u + t}
    padding = [size - 1 for size in outer.shape[2:]]
    convolve: Any = _CONV[dims - 1]
    kernel = convolve(flipped, outer, padding=padding)
    return kernel.transpose(0, 1).flip(list(range(2, inner.dim())))


# Note [reflections]
# With the reflection S = 2P - I, α = (1 + z) / 2 and β = (1 - z) / 2, a factor P + z (I - P) is
# αI + βS. The kernel is kept by its coefficients of α^(m - i) β^i on each axis: a factor multiplies
# each by S and adds the product to the next. Since |α|² + |β|² = 1, the change of basis does not
# amplify rounding errors. It is undone at the end, by a table of integers over a power of two.
#
# Note [precision]
# The kernel is a product of many matrices, each a little off, and must be orthogonal to rounding.
# What must be orthogonal itself, H and S, is computed in float64 whatever the dtype of the
# parameters, and rounded. Products of these in float32 take the singular values off 1 by 6e-7 for
# kernels of 3 × 3 at any width, and by more in proportion to the root of the number of factors
# (twice as much if all projectors are equal). So they stay in float64 for more than _FEW factors,
# and on accelerators, whose float32 products can have the accuracy of bfloat16 by a setting.
# Gradients need no such care and are computed in the dtype of the parameters (at least float32).
#
# Note [gradient by hand]
# Backpropagation through the Cholesky factorisation and the overlapping sums costs several times
# the construction. The adjoint below takes two matrix products a stage, on saved float32 copies.

_FEW = 6


def _orthonormal_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and lower L with matrix = Q Lᵀ, (batch, m, n) with m ≥ n, by CholeskyQR in float64.

    The shift exceeds the rounding errors of the Gram matrix, which grow like m / 9 if they are all
    of one sign (constant columns): the factorisation cannot break down, whatever the rank. Singular
    values of Q are σ / √(σ² + shift) ≤ 1, off by n m κ² 2⁻⁵⁶ at a condition number κ. For a float64
    matrix one Björck step squares that.
    """
    working = torch.float32 if matrix.device.type == "mps" else torch.float64  # mps has no float64
    polish = matrix.dtype == working
    least = torch.finfo(torch.promote_types(matrix.dtype, torch.float32)).tiny
    matrix = matrix.to(working)
    gram = torch.bmm(matrix.mT, matrix)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    epsilon = torch.finfo(working).eps * (1 + matrix.shape[-2] / 8)
    diagonal.add_(diagonal.sum(-1, keepdim=True), alpha=epsilon).add_(least)
    factor = torch.linalg.cholesky_ex(gram)[0]
    columns = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
    if polish:
        gram = torch.bmm(columns.mT, columns)
        columns = torch.baddbmm(columns, columns, gram, beta=1.5, alpha=-0.5)
    return columns, factor


def _columns_adjoint(gradient: Tensor, inner: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the matrix, from that of Q and its inner products with Q, made symmetric."""
    gradient = torch.baddbmm(gradient, columns, inner, alpha=-1)
    return torch.linalg.solve_triangular(factor, gradient, upper=False, left=False)


def _basis(sizes: Sequence[int], like: Tensor, scale: float = 1) -> Tensor:
    """Row i: coefficients of z^j in scale (1 + z)^(k - 1 - i) (1 - z)^i; products over the axes."""
    table = like.new_full((1, 1), scale)
    for size in sizes:
        rows = []
        for i in range(size):  # the recurrence of Krawtchouk's polynomials
            row = [1, size - 1 - 2 * i]
            for j in range(2, size):
                row.append((row[1] * row[-1] - (size + 1 - j) * row[-2]) // j)
            rows.append(row[:size])
        table = torch.kron(table, like.new_tensor(rows))
    return table


class _BlockConvolution(torch.autograd.Function):
    """H □ [P₁, I - P₁] □ [P₂, I - P₂] □ ... and what its adjoint needs."""

    generate_vmap_rule = True

    @staticmethod
    def build(
        seed: Tensor, projectors: Tensor, stride: tuple[int, ...], axes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        groups, rows, columns = seed.shape
        n = projectors.shape[-2]
        wide = rows < columns
        frame, frame_factor = _orthonormal_columns(seed.mT if wide else seed)
        bases, bases_factor = _orthonormal_columns(projectors.flatten(0, 1))
        S = torch.bmm(bases, 2 * bases.mT)
        S.diagonal(dim1=-2, dim2=-1).sub_(1)
        few = len(axes) <= _FEW and seed.device.type == "cpu"
        dtype = torch.promote_types(seed.dtype, torch.float32) if few else bases.dtype
        S = S.to(dtype).unflatten(0, (len(axes), groups))
        kernel = (frame.mT if wide else frame).to(dtype, copy=True)
        kernel = kernel.reshape(groups, rows, *stride, n).movedim(1, -2).contiguous()
        if max(stride) > 1:
            table = _basis(stride, kernel)
            kernel = torch.matmul(table.mT, kernel.view(groups, len(table), -1)).view(kernel.shape)
        stages = []
        for reflection, axis in zip(S.unbind(), axes, strict=True):
            stages.append(kernel)
            turned = torch.bmm(kernel.flatten(1, -2), reflection).view(kernel.shape)
            first, rest = kernel.tensor_split([1], axis)
            others, last = turned.tensor_split([-1], axis)
            kernel = torch.cat((first, rest + others, last), axis)
        return kernel, frame, frame_factor, bases, bases_factor, S, *stages

    @staticmethod
    def forward(
        seed: Tensor, projectors: Tensor, stride: tuple[int, ...], axes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        kernel, *rest = _BlockConvolution.build(seed, projectors, stride, axes)
        groups, *sizes, rows, n = kernel.shape
        table = _basis(sizes, kernel, 0.5 ** (sum(sizes) - len(sizes)))
        kernel = torch.matmul(table.mT, kernel.view(groups, len(table), -1))
        kernel = kernel.view(groups, -1, rows, n).movedim(1, -1)
        kernel = kernel.to(seed.dtype, memory_format=torch.contiguous_format, copy=True)
        half = torch.promote_types(seed.dtype, torch.float32)
        kernel = kernel.view(groups, rows, n, *sizes)
        return kernel, table.to(half), *(tensor.to(half) for tensor in rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stride, ctx.axes = inputs[2:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        seed, projectors, table, *rest = ctx.saved_tensors
        with torch.autocast(seed.device.type, enabled=False):
            if torch.is_grad_enabled():  # for second derivatives
                rest = _BlockConvolution.build(seed, projectors, ctx.stride, ctx.axes)[1:]
                rest = [tensor.to(table.dtype) for tensor in rest]
            frame, frame_factor, bases, bases_factor, S, *stages = rest
            groups, rows, n, *sizes = gradient.shape
            gradient = gradient.to(table.dtype).reshape(groups, rows * n, -1)
            gradient = torch.matmul(table, gradient.mT).view(groups, *sizes, rows, n)
            gradients = []
            for kernel, reflection, axis in reversed(
                list(zip(stages, S.unbind(), ctx.axes, strict=True))
            ):
                taps, before = kernel.shape[axis], math.prod(kernel.shape[1:axis])
                gradient = gradient.view(groups * before, taps + 1, -1)
                low, high = (gradient.narrow(1, i, taps).view(len(gradient), -1, n) for i in (0, 1))
                product = torch.bmm(kernel.view(low.shape).mT, high)
                if before > 1:
                    product = product.view(groups, before, n, n).sum(1)
                    reflection = reflection.repeat_interleave(before, 0)  # noqa: PLW2901
                gradients.append(product)
                gradient = torch.baddbmm(low, high, reflection).view(kernel.shape)
            of_bases = torch.zeros_like(bases)
            if gradients:
                of_reflections = torch.cat(gradients[::-1])
                of_bases = torch.bmm(of_reflections + of_reflections.mT, 2 * bases)
                inner = torch.bmm(bases.mT, of_bases)  # symmetric already
                of_bases = _columns_adjoint(of_bases, inner, bases, bases_factor)
            if max(ctx.stride) > 1:
                powers = _basis(ctx.stride, gradient)
                taps = torch.matmul(powers, gradient.view(groups, len(powers), -1))
                gradient = taps.view(gradient.shape)
            of_seed = gradient.movedim(-2, 1).reshape(seed.shape)
            wide = seed.shape[-2] < seed.shape[-1]
            of_seed = of_seed.mT if wide else of_seed
            inner = torch.bmm(frame.mT, of_seed)
            inner = inner.triu() + inner.triu(1).mT
            of_seed = _columns_adjoint(of_seed, inner, frame, frame_factor)
            of_seed = of_seed.mT if wide else of_seed
        of_bases = of_bases.view(projectors.shape).to(projectors.dtype)
        return of_seed.to(seed.dtype), of_bases, None, None


def bcop_kernel(
    seed: Tensor, projectors: Tensor, kernel_size: Sequence[int], stride: Size = 1
) -> Tensor:
    r"""Block convolution orthogonal parametrisation (BCOP): a kernel from symmetric projectors.

    .. math::
        K = H \mathbin{\square} [P_1,\ I - P_1] \mathbin{\square} [P_2,\ I - P_2]
        \mathbin{\square} \cdots, \qquad P_i = R_i R_i^\top, \quad R_i^\top R_i = I

    Each factor is a kernel with two taps along one axis: it leaves the range of :math:`P_i` where
    it is and moves the rest by one pixel, so that :math:`P + e^{\mathrm i\theta}(I - P)`
    is unitary at every angle. The axes take turns. A kernel of size k takes :math:`k - 1` factors
    along that axis, and :math:`k - s` with a stride s, where the seed :math:`H` has the s × s taps
    of a convolution whose windows do not overlap: that is orthogonal if its matrix
    (rows, n · s²) is.

    **Guaranteed** for any ``seed`` and ``projectors``: all singular values of the circular
    convolution are at most 1, at every image size that the stride divides. They are equal to 1
    (1e-6 in float32, at any width and for all kernel sizes) if the matrices have full rank. A
    matrix m × n with condition number κ takes :math:`2^{-56} m n κ^2` away from them, which stays
    below 1e-7 up to κ = 300 for m = n = 256 (Adam at a learning rate of 0.1 led to κ = 150);
    float64 is exact much further. **Not guaranteed**: that every orthogonal convolution is of this
    form. In one dimension it is, with projectors of all ranks; in two it is not.

    Parameters
    ----------
    seed : torch.Tensor
        Free parameters of :math:`H`, (groups, rows, n · prod(stride)).
    projectors : torch.Tensor
        Free parameters of the :math:`R_i`, (factors, groups, n, rank): only their column spaces
        matter. There are sum(kernel_size - stride) factors.
    kernel_size : sequence of int
        One to three sizes.
    stride : int or sequence of int
        At most the kernel size.

    Returns
    -------
    torch.Tensor
        Kernel of each group, (groups, rows, n, \*kernel_size).

    Raises
    ------
    ValueError
        If shapes do not fit together.

    Notes
    -----
    Cost of a k × k kernel with n channels: 1 + 2 + 4 + 6 + ... products of n × n matrices (13
    for k = 3), twice as many for the gradient, and one Cholesky factorisation for each projector.
    Products are in float32 on a processor if the factors are few (up to 3 × 3, or 3 × 3 × 3),
    which leaves singular values off 1 by 6e-7, and in float64 otherwise, which leaves 1e-7. First
    and second derivatives by reverse mode; none by forward mode.

    Examples
    --------
    The frequency response at any angle is orthogonal:

    >>> seed, projectors = torch.randn(1, 8, 8), torch.randn(4, 1, 8, 4)
    >>> kernel = bcop_kernel(seed, projectors, kernel_size=(3, 3))[0]
    >>> response = torch.fft.fft2(kernel.double(), s=(16, 16)).permute(2, 3, 0, 1)
    >>> bool((torch.linalg.svdvals(response) - 1).abs().max() < 1e-6)
    True

    References
    ----------
    :cite:t:`li2019preventing`, Algorithm 1, after :cite:t:`xiao2018` and :cite:t:`kautsky1994`.
    Composition with a strided factor: :cite:t:`boissin2025aoc`.
    """
    sizes = tuple(kernel_size)
    strides = _per_axis("stride", stride, len(sizes))
    extra = [k - s for k, s in zip(sizes, strides, strict=True)]
    axes = _turns(extra)
    n = projectors.shape[-2] if projectors.dim() == 4 else 0
    wanted = (len(axes), *seed.shape[:1], n, *projectors.shape[3:])
    if (
        min(extra) < 0
        or seed.dim() != 3
        or seed.shape[2] != n * math.prod(strides)
        or projectors.shape != wanted
    ):
        raise ValueError(
            "seed and projectors must have shapes (groups, rows, n * prod(stride)) and "
            "(sum(kernel_size - stride), groups, n, rank), got "
            f"{tuple(seed.shape)} and {tuple(projectors.shape)} with kernel_size {sizes} and "
            f"stride {strides}"
        )
    with torch.autocast(seed.device.type, enabled=False):
        return cast(Tensor, _BlockConvolution.apply(seed, projectors, strides, axes)[0])


def _turns(extra: Sequence[int]) -> tuple[int, ...]:
    """Axes, from 1, of the factors: in turn, until each has had its number."""
    rounds = range(max(extra))
    return tuple(axis for i in rounds for axis, count in enumerate(extra, 1) if i < count)


# ------------------------------------------------------------------- other kernels and maps


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
    dims = _check_kernel(weight, groups)
    strides, dilations = _per_axis("stride", stride, dims), _per_axis("dilation", dilation, dims)
    axes = zip(weight.shape[2:], strides, dilations, strict=True)
    overlap = math.prod([-(-k * math.gcd(s, d) // s) for k, s, d in axes])
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kernel = cholesky_qr(matrix.unflatten(0, (groups, -1)).flatten(2)).reshape(weight.shape)
    return (kernel / math.sqrt(overlap)).to(weight.dtype)


def aol_kernel(weight: Tensor, stride: Size = 1, dilation: Size = 1, groups: int = 1) -> Tensor:
    r"""Almost-orthogonal Lipschitz (AOL) kernel: columns rescaled to a norm of at most 1.

    .. math::
        K = W \operatorname{diag}(d), \qquad
        d_j = \Big(\sum_{i,\tau} \big|(W^\top W)_{ij,\tau}\big|\Big)^{-1/2}, \qquad
        (W^\top W)_{ij,\tau} = \sum_{o,t} W_{oi,t}\, W_{oj,t+\tau}

    The row sums of :math:`|DW^\top WD|` weighted by :math:`1/d` are 1, so that its norm is at
    most 1. With a stride, the phases of the input are channels of their own: :math:`d` has one
    entry a channel and phase.

    **Guaranteed**: norm at most 1 for any weight. **Not guaranteed**: orthogonality. It holds
    at an orthogonal ``weight``, and training can drift from there.

    Parameters
    ----------
    weight : torch.Tensor
        (c_out, c_in / groups, \*k).
    stride, dilation : int or sequence of int
        Of the convolution.
    groups : int
        Groups of channels.

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
    >>> from lipbook.norms import circular_convolution_norm
    >>> bool(circular_convolution_norm(aol_kernel(torch.randn(4, 4, 3, 3)), 8) < 1)
    True

    References
    ----------
    :cite:t:`prach2022aol`, Theorem 2.
    """
    sizes, dims = weight.shape[2:], _check_kernel(weight, groups)
    strides, dilations = _per_axis("stride", stride, dims), _per_axis("dilation", dilation, dims)
    with torch.autocast(weight.device.type, enabled=False):
        kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
        phases = _phases(kernel, strides, dilations).unflatten(0, (groups, -1))
        phases = phases.transpose(1, 2)  # (groups, channels, rows, *whole strides)
        gram = _CONV[dims - 1](
            phases.transpose(0, 1).flatten(1, 2),
            phases.flatten(0, 1),
            padding=[size - 1 for size in phases.shape[3:]],
            groups=groups,
        )  # (channels, groups * channels, *shifts)
        sums = gram.abs().sum((0, *range(2, gram.dim())))
        scale = sums.clamp(min=torch.finfo(sums.dtype).tiny).rsqrt()
        scale = scale.view(groups, 1, weight.shape[1], *strides)
        for axis, (k, s, d) in enumerate(zip(sizes, strides, dilations, strict=True), 3):
            scale = scale.index_select(axis, torch.arange(0, k * d, d, device=scale.device) % s)
        kernel = (kernel.unflatten(0, (groups, -1)) * scale).flatten(0, 1)
    return kernel.to(weight.dtype)


def _phases(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
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
    with torch.autocast(kernel.device.type, enabled=False):
        matrix = kernel.flatten(1)
        gram = matrix @ matrix.mT
        bound = gram.new_ones(())
        for step in range(squarings + 1):
            norm = torch.linalg.matrix_norm(gram).clamp(min=torch.finfo(gram.dtype).tiny)
            bound = bound * norm ** (0.5**step)
            if step < squarings:
                gram = (gram / norm) @ (gram / norm)
        return (bound * math.prod(kernel.shape[2:])).sqrt()


def skew_kernel(weight: Tensor) -> Tensor:
    r"""Skew-symmetric kernel of norm at most 1, the logarithm of a skew orthogonal convolution.

    .. math::
        A = \frac{V}{\max(1, \beta)}, \qquad V_t = W_t - W_{-t}^\top, \qquad
        \beta \ge \sqrt{k^2}\, \lVert\operatorname{mat}(V)\rVert_2 \ge \lVert V * \rVert

    The second inequality counts how often a pixel is read (see :func:`rko_kernel`); the first is
    Gram iteration :cite:p:`delattre2023gram`: both bounds are from above.

    **Guaranteed**: a convolution with :math:`A` and circular padding is skew-symmetric,
    :math:`\langle x, A x\rangle = 0`, with norm at most 1.

    Parameters
    ----------
    weight : torch.Tensor
        (n, n, \*k) with odd sizes k.

    Returns
    -------
    torch.Tensor
        Like ``weight``.

    Raises
    ------
    ValueError
        If the kernel is not square, or a size is even: its middle would lie between two pixels.

    Examples
    --------
    >>> A = skew_kernel(torch.randn(4, 4, 3, 3))
    >>> torch.equal(A, -A.transpose(0, 1).flip(2, 3))
    True

    References
    ----------
    :cite:t:`singla2021soc`, Theorem 1.
    """
    if (
        weight.dim() < 3
        or weight.shape[0] != weight.shape[1]
        or not all(size % 2 for size in weight.shape[2:])
    ):
        raise ValueError(f"weight must be (n, n, *k) with odd sizes k, got {tuple(weight.shape)}")
    with torch.autocast(weight.device.type, enabled=False):
        kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
        kernel = kernel - kernel.transpose(0, 1).flip(list(range(2, kernel.dim())))
        bound = kernel_norm_bound(kernel)
        return (kernel / bound.clamp(min=1)).to(weight.dtype)


def skew_exponential(x: Tensor, kernel: Tensor, terms: int = 8) -> Tensor:
    r"""Exponential of a circular convolution, applied to images: skew orthogonal convolution (SOC).

    .. math:: y = \sum_{j=0}^{m} \frac{1}{j!}\, A^j x \;\approx\; e^{A} x

    **Guaranteed** for a kernel from :func:`skew_kernel`: norm at most 1, for the truncated series
    and not only for the limit. The eigenvalues :math:`\mathrm i\lambda` of :math:`A` lie in
    :math:`\mathrm i[-1, 1]`, and

    .. math:: |T_m(\mathrm i\lambda)|^2 = 1 - \frac{2\lambda^{m+2}}{m!\,(m+2)} + \dots \le 1

    for :math:`m` a multiple of 4, which is why ``terms`` must be one (the stability of a
    Runge–Kutta method on the imaginary axis; other orders exceed 1). All singular values are
    above 1 - 7e-3, 1 - 3e-6 and 1 - 2e-10 for 4, 8 and 12 terms.

    Parameters
    ----------
    x : torch.Tensor
        (batch, n, \*size).
    kernel : torch.Tensor
        :math:`A`, (n, n, \*k).
    terms : int
        :math:`m`, a positive multiple of 4. Each term costs a convolution.

    Returns
    -------
    torch.Tensor
        Like ``x``.

    Raises
    ------
    ValueError
        If ``terms`` is no positive multiple of 4.

    Examples
    --------
    >>> x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    >>> y = skew_exponential(x, skew_kernel(torch.randn(4, 4, 3, 3, dtype=torch.float64)))
    >>> 1 - 3e-6 < (y.norm() / x.norm()).item() <= 1
    True

    References
    ----------
    :cite:t:`singla2021soc`.
    """
    _check_terms(terms)
    pads = [(size // 2, size // 2) for size in kernel.shape[2:]]
    term = x
    for j in range(1, terms + 1):
        term = _CONV[len(pads) - 1](circular_pad(term, pads), kernel) / j
        x = x + term
    return x


def cayley_kernel(weight: Tensor, image_size: Size) -> Tensor:
    r"""Orthogonal kernel by a Cayley transform at each frequency.

    .. math::
        \hat W(\theta) = \begin{pmatrix} U \\ V \end{pmatrix}, \quad
        M = U - U^* + V^* V, \qquad
        \hat K(\theta) = \begin{pmatrix} 2 (I + M)^{-1} - I \\ -2 V (I + M)^{-1} \end{pmatrix}

    for no more inputs than outputs, and the adjoint otherwise. :math:`I + M` is invertible for
    every weight, since its Hermitian part is at least :math:`I`.

    **Guaranteed**: all singular values of the circular convolution are 1 on images of this size,
    and of no other: the kernel is as large as the image, though it mostly decays.

    Parameters
    ----------
    weight : torch.Tensor
        (c_out, c_in, \*k), its middle at the pixel itself.
    image_size : int or sequence of int
        At least k.

    Returns
    -------
    torch.Tensor
        (c_out, c_in, \*image_size), with tap t reading the pixel t ahead, around the circle.

    Raises
    ------
    ValueError
        If a kernel size exceeds the image size.

    Examples
    --------
    >>> from lipbook.norms import circular_convolution_singular_values
    >>> kernel = cayley_kernel(torch.randn(4, 3, 3, 3), image_size=6)
    >>> values = circular_convolution_singular_values(kernel, 6)
    >>> bool((values - 1).abs().max() < 1e-6)
    True

    References
    ----------
    :cite:t:`trockman2021`, section 4.
    """
    dims = weight.dim() - 2
    size = _per_axis("image_size", image_size, dims)
    if any(k > n for k, n in zip(weight.shape[2:], size, strict=True)):
        raise ValueError(
            f"image_size must be at least the kernel size {tuple(weight.shape[2:])}, got {size}"
        )
    axes = tuple(range(2, weight.dim()))
    working = torch.float32 if weight.device.type == "mps" else torch.float64
    with torch.autocast(weight.device.type, enabled=False):
        ends = [pad for k, n in zip(weight.shape[2:], size, strict=True) for pad in (n - k, 0)]
        kernel = functional.pad(weight.to(working), ends[::-1])
        kernel = kernel.roll([-(k // 2) for k in weight.shape[2:]], axes)
        response = torch.fft.rfftn(kernel, dim=axes).movedim((0, 1), (-2, -1))
        wide = weight.shape[0] < weight.shape[1]
        response = response.mH if wide else response
        n = response.shape[-1]
        U, V = response[..., :n, :], response[..., n:, :]
        eye = torch.eye(n, dtype=response.dtype, device=response.device)
        inverse = torch.linalg.inv(eye + U - U.mH + V.mH @ V)
        response = torch.cat([2 * inverse - eye, -2 * V @ inverse], -2)
        response = (response.mH if wide else response).movedim((-2, -1), (0, 1))
        return torch.fft.irfftn(response, s=size, dim=axes).to(weight.dtype)


# ------------------------------------------------------------------------- circular padding


def circular_pad(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    r"""Circular padding: continues the last axes periodically.

    The values of :func:`torch.nn.functional.pad` in mode ``"circular"``, which is called where no
    gradient is asked for. Otherwise they are made by copies that have copies as their adjoint:
    three times as fast with the backward pass on a CPU.

    Parameters
    ----------
    x : torch.Tensor
        (\*any, \*size).
    pads : sequence of tuple of int
        Pixels before and after, for each of the last axes in their order. At most the size.

    Returns
    -------
    torch.Tensor
        (\*any, \*(size + before + after)).

    Raises
    ------
    ValueError
        If a pad exceeds the size of its axis.

    Examples
    --------
    >>> circular_pad(torch.arange(5), [(2, 1)])
    tensor([3, 4, 0, 1, 2, 3, 4, 0])
    """
    for size, pair in zip(x.shape[x.dim() - len(pads) :], pads, strict=True):
        if max(pair) > size:
            raise ValueError(f"pads must be at most the size {size}, got {pair}")
    if len(pads) + 2 == x.dim() <= 5 and not (x.requires_grad and torch.is_grad_enabled()):
        return functional.pad(x, [pad for pair in reversed(pads) for pad in pair], "circular")
    for axis, (before, after) in zip(range(-1, -len(pads) - 1, -1), reversed(pads), strict=True):
        size = x.shape[axis]
        if before + after > size:
            x = torch.cat(
                [x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)], axis
            )
        elif before or after:
            start, middle, end = x.split([after, size - before - after, before], axis)
            x = torch.cat([end, start, middle, end, start], axis)
    return x


def circular_fold(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    r"""Adjoint of circular padding: adds what lies outside to where it came from.

    Parameters
    ----------
    x : torch.Tensor
        (\*any, \*(size + before + after)).
    pads : sequence of tuple of int
        As for :func:`circular_pad`.

    Returns
    -------
    torch.Tensor
        (\*any, \*size).

    Raises
    ------
    ValueError
        If a pad exceeds the size of its axis.

    Examples
    --------
    >>> circular_fold(torch.tensor([10, 20, 0, 1, 2, 3, 4, 30]), [(2, 1)])
    tensor([30,  1,  2, 13, 24])
    """
    for axis, (before, after) in zip(range(-1, -len(pads) - 1, -1), reversed(pads), strict=True):
        size = x.shape[axis] - before - after
        if max(before, after) > size:
            raise ValueError(f"pads must be at most the size {size}, got {(before, after)}")
        if before + after > size:
            positions = torch.arange(-before, size + after, device=x.device) % size
            shape = torch.Size([*x.shape[:axis], size, *x.shape[x.dim() + axis + 1 :]])
            x = x.new_zeros(shape).index_add(axis, positions, x)
        elif before or after:
            parts = x.split([before, after, size - before - after, before, after], axis)
            x = torch.cat([parts[1] + parts[4], parts[2], parts[3] + parts[0]], axis)
    return x


# -------------------------------------------------------------------------- parametrizations


class BCOP(nn.Module):
    r"""Parametrization by :func:`bcop_kernel`, for the weight of any torch convolution.

    Its raw parameters are the seed and the projectors, orthonormal at the start. They take the
    place of the weight, which cannot be assigned: factoring a given kernel is not implemented.

    Parameters
    ----------
    weight_shape : sequence of int
        Shape of the weight: (c_out, c_in / groups, \*k), or (c_in, c_out / groups, \*k) for a
        transposed convolution.
    stride : int or sequence of int
        Stride of the convolution; at most the kernel size.
    groups : int
        Groups of channels, each with a kernel of its own.
    rank : int, optional
        Rank of the projectors, half the channels n that they act on if not given.
    unshuffle : bool
        How to stride. False: a seed with s × s taps, then projectors on n = c_in / groups
        channels (transposed, n = c_out / groups > c_in / groups, without a stride). True: BCOP
        of size k / s on the n ≥ c_in s² / groups channels that invertible downsampling makes,
        with its pixels put back in their place. That is a richer family with
        :math:`s^{4}` times the parameters of a projector and :math:`s^{6}` times the cost.

    Raises
    ------
    ValueError
        If no orthogonal kernel exists or none that could be trained; the message says which.

    Notes
    -----
    *Rank.* The projectors of rank r are connected, those of different ranks are not: training
    never changes the rank. Half the channels is the largest component, and twice the channels with
    half the rank hold all others (:cite:t:`li2019preventing`, Theorem 2).

    *One channel per group.* A kernel from one channel to one channel is orthogonal only if it is a
    shift with a sign, :math:`|\hat K(\theta)| = 1` for a polynomial: nothing is left to train,
    and such groups (depthwise convolutions without a stride) are refused. With a stride, or with
    several outputs a channel, there is something to train and they are not.

    Examples
    --------
    >>> layer = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
    >>> layer = parametrize.register_parametrization(layer, "weight", BCOP(layer.weight.shape))
    >>> x = torch.randn(1, 4, 10, 10)
    >>> torch.allclose((layer(x) - layer(0 * x)).norm(), x.norm())
    True
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        stride: Size = 1,
        groups: int = 1,
        rank: int | None = None,
        unshuffle: bool = False,
    ) -> None:
        super().__init__()
        first, columns, *sizes = weight_shape
        strides = _per_axis("stride", stride, len(sizes))
        if any(k < s for k, s in zip(sizes, strides, strict=True)):
            raise ValueError(
                f"kernel_size must be at least stride, or some pixels are never read, "
                f"got kernel_size {tuple(sizes)} and stride {strides}"
            )
        self.unshuffled = strides if unshuffle else (1,) * len(sizes)
        if any(k % s for k, s in zip(sizes, self.unshuffled, strict=True)):
            raise ValueError(
                "kernel_size must be a multiple of stride with method 'bcop_unshuffle', "
                f"got kernel_size {tuple(sizes)} and stride {strides}"
            )
        _check_groups(first, groups)
        self.groups, rows = groups, first // groups
        if rows * columns * math.prod(strides) == 1:
            raise ValueError(
                "groups must leave more than one channel: from one channel to one channel only a "
                "shift with a sign is orthogonal, and nothing of it can be trained; use fewer "
                f"groups or a nonexpansive convolution, got groups {groups}"
            )
        columns *= math.prod(self.unshuffled)
        self.kernel_size = tuple(k // s for k, s in zip(sizes, self.unshuffled, strict=True))
        self.stride = (1,) * len(sizes) if unshuffle else strides
        self.transposed = max(self.stride) == 1 and rows > columns
        rows, n = (columns, rows) if self.transposed else (rows, columns)
        rank = n // 2 if rank is None else rank
        if not 0 <= rank <= n:
            raise ValueError(f"rank must be between 0 and the {n} channels, got {rank}")
        factors = sum(self.kernel_size) - sum(self.stride)
        self.seed_shape = (groups, rows, n * math.prod(self.stride))
        self.projectors_shape = (factors, groups, n, rank)
        self.registered = False

    def extra_repr(self) -> str:
        """Sizes of the raw parameters."""
        return f"seed={self.seed_shape}, projectors={self.projectors_shape}"

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raw parameters to start from: random, with orthonormal rows or columns."""
        shapes = (self.seed_shape, self.projectors_shape)
        return tuple(_semi_orthogonal(weight.new_empty(shape)) for shape in shapes)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Start from orthonormal raw parameters, once, when the parametrization is registered."""
        if self.registered:
            raise NotImplementedError(
                "weight cannot be assigned: no inverse of BCOP is implemented"
            )
        self.registered = True
        return self.initial(weight)

    def forward(self, seed: Tensor, projectors: Tensor) -> Tensor:
        """Kernel, in the layout of the weight."""
        kernel = bcop_kernel(seed, projectors, self.kernel_size, self.stride)
        if self.transposed:
            kernel = kernel.transpose(1, 2).flip(list(range(3, kernel.dim())))
        kernel = kernel.flatten(0, 1)
        if max(self.unshuffled) > 1:  # (c_out, c_in * s * s, k, k) -> (c_out, c_in, k * s, k * s)
            dims = len(self.unshuffled)
            kernel = kernel.unflatten(1, (-1, *self.unshuffled))
            order = itertools.chain.from_iterable((2 + dims + i, 2 + i) for i in range(dims))
            kernel = kernel.permute(0, 1, *order)
            for axis in range(2, 2 + dims):
                kernel = kernel.flatten(axis, axis + 1)
        return kernel


class RKO(nn.Module):
    r"""Parametrization by :func:`rko_kernel`: norm at most 1, in general not orthogonal.

    Parameters
    ----------
    stride, dilation, groups
        Of the convolution.

    Examples
    --------
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
        return (_semi_orthogonal(weight.flatten(1)).view(weight.shape),)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return rko_kernel(weight, self.stride, self.dilation, self.groups)


class AOL(RKO):
    r"""Parametrization by :func:`aol_kernel`: norm at most 1, almost orthogonal at best.

    Parameters
    ----------
    stride, dilation, groups
        Of the convolution.

    Examples
    --------
    >>> layer = parametrize.register_parametrization(nn.Conv1d(2, 2, 3), "weight", AOL())
    >>> layer.weight.shape
    torch.Size([2, 2, 3])
    """

    def initial(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raw weight to start from: an orthogonal middle tap, which is orthogonal at stride 1."""
        raw = torch.zeros_like(weight)
        middle = raw
        for size in reversed(weight.shape[2:]):
            middle = middle.select(-1, size // 2)
        middle.copy_(_semi_orthogonal(middle.unflatten(0, (self.groups, -1))).flatten(0, 1))
        return (raw,)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return aol_kernel(weight, self.stride, self.dilation, self.groups)


class SOC(nn.Module):
    """Parametrization by :func:`skew_kernel`: a skew-symmetric kernel of norm at most 1."""

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return skew_kernel(weight)


class CayleyKernel(nn.Module):
    """Parametrization by :func:`cayley_kernel`: an orthogonal kernel as large as the image.

    Parameters
    ----------
    image_size : sequence of int
        Size of the images that it will meet.
    """

    def __init__(self, image_size: Sequence[int]) -> None:
        super().__init__()
        self.image_size = tuple(image_size)

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel (c_out, c_in, *image_size) of a weight (c_out, c_in, *k)."""
        return cayley_kernel(weight, self.image_size)


# ---------------------------------------------------------------------------------- layers


# Note [circular]
# On a circle of N pixels with a stride s that divides N, the layer has at most N / s outputs
# an axis: with more it would repeat some of them, and its norm would exceed 1. With exactly
# N / s outputs ("same") nothing is lost. Zero padding embeds the image in a longer circle and cuts
# the output, neither of which can increase a norm.


class _Constrained(_ConvNd):
    """What the constrained layers share: geometry, initial values, the check of the circle."""

    _dims: int

    def _geometry(
        self, kernel_size: Size, stride: Size, dilation: Size, padding_mode: str
    ) -> tuple[tuple[int, ...], ...]:
        if padding_mode not in ("circular", "zeros"):
            raise ValueError(
                "padding_mode must be 'circular' or 'zeros' (reflect and replicate padding copy "
                f"pixels, which takes the norm above 1), got {padding_mode!r}"
            )
        arguments = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        return tuple(_per_axis(name, value, self._dims) for name, value in arguments.items())

    def _constrain(self, constraint: BCOP | RKO) -> None:
        parametrize.register_parametrization(self, "weight", constraint)
        if not isinstance(constraint, BCOP):  # which has done so when it was registered
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new raw parameters for the weight, and a bias as torch does."""
        if not parametrize.is_parametrized(self, "weight"):
            return super().reset_parameters()
        parametrization = cast(nn.ModuleDict, self.parametrizations)["weight"]
        with torch.no_grad():
            raw = list(parametrization.parameters())
            constraint: Any = next(parametrization.children())
            for tensor, value in zip(raw, constraint.initial(self.weight), strict=True):
                tensor.copy_(value)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.weight[0].numel())
                self.bias.uniform_(-bound, bound)

    def _check_circle(self, size: Sequence[int]) -> None:
        if any(n % s for n, s in zip(size, self.stride, strict=True)):
            raise ValueError(
                "input must have a size that stride divides, with circular padding, "
                f"got size {tuple(size)} and stride {self.stride}"
            )


class _Convolution(_Constrained):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        sizes, strides, dilations = self._geometry(kernel_size, stride, dilation, padding_mode)
        spans = [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)]
        pads, self._pads = _padding(padding, spans, strides, padding_mode)
        geometry: Any = (sizes, strides, pads, dilations, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)  # type: ignore[call-arg]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, *size) to (batch, c_out, *size / stride)."""
        padding: Any = self.padding
        if self.padding_mode == "circular":
            self._check_circle(input.shape[-self._dims :])
            input, padding = circular_pad(input, self._pads), 0
        elif padding == "same":  # by an even kernel; torch would do so with a warning
            ends = itertools.chain.from_iterable(reversed(self._pads))
            input, padding = functional.pad(input, list(ends)), 0
        convolve: Any = _CONV[self._dims - 1]
        geometry = (self.stride, padding, self.dilation, self.groups)
        return cast(Tensor, convolve(input, self.weight, self.bias, *geometry))


class _OrthogonalConv(_Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: OrthogonalMethod = "bcop",
        rank: int | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        self._constrain(_bcop(self, method, rank))


def _bcop(layer: _ConvNd, method: str, rank: int | None) -> BCOP:
    if method not in get_args(OrthogonalMethod):
        raise ValueError(
            f"method must be one of {get_args(OrthogonalMethod)}, got {method!r}; "
            "'rko' and 'aol' are not orthogonal: see NonexpansiveConv2d"
        )
    if any(math.gcd(s, d) > 1 for s, d in zip(layer.stride, layer.dilation, strict=True)):
        raise ValueError(
            "stride and dilation must have no common divisor, or some pixels are never read, "
            f"got stride {layer.stride} and dilation {layer.dilation}"
        )
    return BCOP(layer.weight.shape, layer.stride, layer.groups, rank, method == "bcop_unshuffle")


class OrthogonalConv2d(_OrthogonalConv, nn.Conv2d):
    r"""Orthogonal convolution in two dimensions (BCOP).

    :class:`torch.nn.Conv2d` whose weight is a kernel from :func:`bcop_kernel`.

    **Guaranteed** with circular padding, in training and evaluation, after any number of
    optimiser steps: all :math:`\min(m, n)` singular values of the layer are 1 (1e-6 in float32), at
    every image size that the stride divides, as long as the raw parameters are not close to losing
    rank (:func:`bcop_kernel` says how close); and at most 1 in any case. With c_out = s² c_in the
    layer is orthogonal; with more outputs it keeps the norm of its inputs (isometry), with fewer
    that of gradients (semi-orthogonal). **With zero padding** it is 1-Lipschitz only.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype
        As in :class:`torch.nn.Conv2d`. The kernel must be at least as large as the stride; stride
        and dilation must have no common divisor. A group must not be one channel in, one channel
        out, without a stride: see :class:`BCOP`.
    padding : str or int or sequence of int
        ``"same"``: as many outputs as the image has strides, of which nothing is lost. Less padding
        leaves rows of the matrix out: norms of gradients are still kept if c_out ≤ s² c_in, those
        of inputs are not. More is refused with circular padding.
    padding_mode : str
        ``"circular"`` or ``"zeros"``.
    method : str
        ``"bcop"``: a stride by composition with a strided factor. ``"bcop_unshuffle"``: a stride by
        invertible downsampling, for kernels whose size is a multiple of the stride. Without a
        stride they are the same. See :class:`BCOP` for what they cost.
    rank : int, optional
        Rank of the projectors; half of their channels if not given.

    Raises
    ------
    ValueError
        If no such kernel exists, or padding would raise the norm; when called, if the stride
        does not divide the size of the image (with circular padding).

    Examples
    --------
    >>> layer, x = OrthogonalConv2d(3, 12, 4, stride=2, bias=False), torch.randn(5, 3, 8, 8)
    >>> torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    True

    References
    ----------
    :cite:t:`li2019preventing`; :cite:t:`boissin2025aoc`; with zero padding a "same" convolution
    cannot be orthogonal beyond trivial cases: :cite:t:`achour2022`.
    """

    _dims = 2


class OrthogonalConv1d(_OrthogonalConv, nn.Conv1d):
    """Orthogonal convolution in one dimension: see :class:`OrthogonalConv2d`."""

    _dims = 1


class OrthogonalConv3d(_OrthogonalConv, nn.Conv3d):
    """Orthogonal convolution in three dimensions: see :class:`OrthogonalConv2d`."""

    _dims = 3


class _OrthogonalConvTranspose(_Constrained):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = "same",
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: OrthogonalMethod = "bcop",
        rank: int | None = None,
    ) -> None:
        sizes, strides, dilations = self._geometry(kernel_size, stride, dilation, padding_mode)
        extra = _per_axis("output_padding", output_padding, self._dims, least=0)
        spans = [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)]
        pads, self._pads = _padding(padding, spans, strides, padding_mode)
        totals = [span + 1 - s for span, s in zip(spans, strides, strict=True)]
        if padding_mode == "circular":
            around = [sum(pair) for pair in self._pads]
            if around != totals or any(extra):
                raise ValueError(
                    "padding must be 'same' and output_padding 0 for a transposed convolution on a "
                    f"circle, got {padding!r} and {output_padding!r}"
                )
        elif padding == "same":
            pads = tuple((total + 1) // 2 for total in totals)
            extra = tuple(total % 2 for total in totals)
            if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
                raise ValueError(
                    "padding must be integers for an even kernel without stride and dilation "
                    f"and with zero padding, got 'same' and kernel_size {sizes}"
                )
        geometry: Any = (sizes, strides, 0, extra, groups, bias, dilations, "zeros")
        super().__init__(in_channels, out_channels, *geometry, device, dtype)  # type: ignore[call-arg]
        self.padding, self.padding_mode = pads, cast(Any, padding_mode)
        self._constrain(_bcop(self, method, rank))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, *size) to (batch, c_out, *size * stride)."""
        transpose: Any = _CONV_TRANSPOSE[self._dims - 1]
        geometry = (self.groups, self.dilation)
        if self.padding_mode == "zeros":
            ends = (self.padding, self.output_padding)
            return cast(
                Tensor, transpose(input, self.weight, self.bias, self.stride, *ends, *geometry)
            )
        whole = transpose(input, self.weight, None, self.stride, 0, 0, *geometry)
        output = circular_fold(whole, self._pads)
        if self.bias is not None:
            output = output + self.bias.view(-1, *[1] * self._dims)
        return output


class OrthogonalConvTranspose2d(_OrthogonalConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    r"""Orthogonal transposed convolution in two dimensions (BCOP).

    The adjoint of :class:`OrthogonalConv2d` from ``out_channels`` to ``in_channels``:
    :class:`torch.nn.ConvTranspose2d` with such a weight, and with circular padding, which torch
    does not offer. **Guaranteed** as there: all singular values are 1 with circular padding and at
    most 1 with zero padding. Without any padding (``padding=0, padding_mode="zeros"``) nothing
    is cut, and they are 1 as well, provided that c_in ≤ s² c_out.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, groups, bias, dilation, device, dtype
        As in :class:`torch.nn.ConvTranspose2d`.
    padding : str or int or sequence of int
        ``"same"``: an output of size · stride.
    output_padding : int or sequence of int
        As in torch; for zero padding with integers only.
    padding_mode : str
        ``"circular"`` or ``"zeros"``.
    method, rank
        As in :class:`OrthogonalConv2d`.

    Raises
    ------
    ValueError
        As in :class:`OrthogonalConv2d`, and if the output would not be the whole circle.

    Examples
    --------
    >>> layer = OrthogonalConvTranspose2d(12, 3, 4, stride=2, bias=False)
    >>> x = torch.randn(5, 12, 4, 4)
    >>> torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    True
    """

    _dims = 2


class OrthogonalConvTranspose1d(_OrthogonalConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """Orthogonal transposed convolution, one dimension: see :class:`OrthogonalConvTranspose2d`."""

    _dims = 1


class OrthogonalConvTranspose3d(_OrthogonalConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """Orthogonal transposed convolution in 3-D: see :class:`OrthogonalConvTranspose2d`."""

    _dims = 3


class _NonexpansiveConv(_Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        device: Any = None,
        dtype: Any = None,
        *,
        method: NonexpansiveMethod = "aol",
    ) -> None:
        if method not in get_args(NonexpansiveMethod):
            raise ValueError(
                f"method must be one of {get_args(NonexpansiveMethod)}, got {method!r}"
            )
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        constraint = AOL if method == "aol" else RKO
        self._constrain(constraint(self.stride, self.dilation, groups))


class NonexpansiveConv2d(_NonexpansiveConv, nn.Conv2d):
    r"""1-Lipschitz convolution in two dimensions, not orthogonal (AOL or RKO).

    **Guaranteed**: norm at most 1, with circular and with zero padding. **Not guaranteed**:
    anything from below; trained layers of either kind attenuate most directions.

    Parameters
    ----------
    in_channels, ..., padding_mode, device, dtype
        As in :class:`OrthogonalConv2d`, with any kernel size and any groups.
    method : str
        ``"aol"``: :func:`aol_kernel`, from an orthogonal start. ``"rko"``: :func:`rko_kernel`.

    Raises
    ------
    ValueError
        As in :class:`OrthogonalConv2d`.

    Examples
    --------
    >>> layer, x = NonexpansiveConv2d(8, 8, 3, groups=8, bias=False), torch.randn(5, 8, 8, 8)
    >>> bool((layer(x).norm() <= x.norm() * (1 + 1e-6)))
    True
    """

    _dims = 2


class NonexpansiveConv1d(_NonexpansiveConv, nn.Conv1d):
    """1-Lipschitz convolution in one dimension: see :class:`NonexpansiveConv2d`."""

    _dims = 1


class NonexpansiveConv3d(_NonexpansiveConv, nn.Conv3d):
    """1-Lipschitz convolution in three dimensions: see :class:`NonexpansiveConv2d`."""

    _dims = 3


class _OnUnshuffled(nn.Module):
    """Strides by invertible downsampling, then a circular map of channels with a weight."""

    weight: Tensor

    def __init__(
        self, out_channels: int, stride: int, bias: bool, weight: Tensor, constraint: nn.Module
    ) -> None:
        super().__init__()
        self.out_channels, self.stride = out_channels, stride
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
        self.bias = nn.Parameter(weight.new_zeros(out_channels)) if bias else None
        new_shape = isinstance(constraint, CayleyKernel)
        parametrize.register_parametrization(self, "weight", constraint, unsafe=new_shape)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h / stride, w / stride)."""
        output = self.linear(functional.pixel_unshuffle(input, self.stride), self.weight)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class SkewOrthogonalConv2d(_OnUnshuffled):
    r"""Skew orthogonal convolution (SOC): the exponential of a skew-symmetric convolution.

    ``layer.weight`` is the skew kernel :math:`A`, the layer is :func:`skew_exponential`. Channels
    are padded with zeros if there are more outputs, and cut if there are more inputs; a stride
    is invertible downsampling.

    **Guaranteed**: norm at most 1, and all singular values above 1 - 3e-6 with 8 terms.
    **Not guaranteed**: reaching every orthogonal convolution; the eigenvalues of the
    exponential lie within an angle of 1 from 1.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    kernel_size : int
        Odd. The layer sees ``terms`` times further.
    stride : int
        A divisor of the image size.
    bias : bool
        Whether to add one number a channel.
    terms : int
        Of the series, a multiple of 4; each is a convolution with max(c_out, c_in s²) channels.
    device, dtype
        As in :class:`torch.nn.Conv2d`.

    Raises
    ------
    ValueError
        If ``kernel_size`` is even or ``terms`` no multiple of 4.

    Examples
    --------
    >>> layer, x = SkewOrthogonalConv2d(3, 6, 3, bias=False), torch.randn(2, 3, 8, 8)
    >>> 1 - 3e-6 < (layer(x).norm() / x.norm()).item() < 1 + 1e-6
    True

    References
    ----------
    :cite:t:`singla2021soc`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
        terms: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_terms(terms)
        n = max(in_channels * stride**2, out_channels)
        weight = torch.empty(n, n, kernel_size, kernel_size, device=device, dtype=dtype)
        super().__init__(out_channels, stride, bias, weight, SOC())
        self.terms = terms

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Exponential, from the phases (batch, c_in s², h / s, w / s)."""
        x = functional.pad(x, (0, 0, 0, 0, 0, weight.shape[0] - x.shape[-3]))
        return skew_exponential(x, weight, self.terms).narrow(-3, 0, self.out_channels)


class CayleyConv2d(_OnUnshuffled):
    r"""Orthogonal convolution by the Cayley transform at each frequency, for one image size.

    ``layer.weight`` is the kernel of :func:`cayley_kernel`, as large as the image; the layer
    applies it by fast Fourier transforms. **Guaranteed**: all singular values are 1, on images
    of the size in the constructor. Images of another size are refused.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    kernel_size : int
        Of the raw parameter.
    image_size : int or sequence of int
        Size of the input, a multiple of the stride.
    stride : int
        By invertible downsampling.
    bias : bool
        Whether to add one number a channel.
    device, dtype
        As in :class:`torch.nn.Conv2d`.

    Raises
    ------
    ValueError
        If ``image_size`` is no multiple of ``stride`` or too small for the kernel; when called, if
        the image has another size.

    Examples
    --------
    >>> layer, x = CayleyConv2d(3, 6, 3, image_size=8, bias=False), torch.randn(2, 3, 8, 8)
    >>> torch.allclose(layer(x).norm(), x.norm())
    True

    References
    ----------
    :cite:t:`trockman2021`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        image_size: Size,
        stride: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = _per_axis("image_size", image_size, 2)
        if any(n % stride or n < kernel_size * stride for n in sizes):
            raise ValueError(
                f"image_size must be a multiple of stride {stride} and hold {kernel_size} of them, "
                f"got {sizes}"
            )
        shape = (out_channels, in_channels * stride**2, kernel_size, kernel_size)
        weight = torch.empty(shape, device=device, dtype=dtype)
        constraint = CayleyKernel([n // stride for n in sizes])
        super().__init__(out_channels, stride, bias, weight, constraint)
        self.image_size = sizes

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h / stride, w / stride)."""
        if tuple(input.shape[-2:]) != self.image_size:
            raise ValueError(
                f"input must have the image size {self.image_size}, got {tuple(input.shape[-2:])}"
            )
        return super().forward(input)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply by the frequency response, from the phases (batch, c_in s², h / s, w / s)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.to(torch.promote_types(x.dtype, torch.float32))
            response = torch.fft.rfft2(weight).conj()  # of a cross-correlation
            images = torch.fft.rfft2(x.to(weight.dtype))
            outputs = torch.einsum("oihw,...ihw->...ohw", response, images)
            return torch.fft.irfft2(outputs, s=x.shape[-2:]).to(x.dtype)


# ------------------------------------------------------------------------- Lipschitz rules


def _convolution_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    """Norm of the convolution with its present kernel: computed, not taken for 1."""
    size = list(input_shape[1:])
    geometry: dict[str, Any] = {
        "weight": module.weight.detach().double(),
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "p": p,
    }
    if module.transposed and module.padding_mode == "circular":  # the adjoint, which norms knows
        size = [n * s for n, s in zip(size, module.stride, strict=True)]
        geometry |= {"p": dual_exponent(p)}
    elif module.transposed:
        geometry |= {"transposed": True, "output_padding": module.output_padding}
    kind = "exact" if convolution_norm_is_exact(input_size=size, **geometry) else "upper bound"
    return Bound(convolution_norm_bound(input_size=size, **geometry).item(), cast(Any, kind), p)


def _response_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    """Norm of the circular convolution whose kernel is the response to one bright pixel."""
    channels = input_shape[0] * module.stride**2
    size = [n // module.stride for n in input_shape[1:]]
    pixel = torch.zeros(size, dtype=torch.float64)
    pixel[0, 0] = 1
    pixels = torch.eye(channels, dtype=torch.float64)[:, :, None, None] * pixel
    with torch.no_grad():
        kernel = module.linear(pixels, module.weight.double()).transpose(0, 1)
    geometry: dict[str, Any] = {"padding": "same", "padding_mode": "circular", "p": p}
    kind = "exact" if convolution_norm_is_exact(kernel, size, **geometry) else "upper bound"
    return Bound(convolution_norm_bound(kernel, size, **geometry).item(), cast(Any, kind), p)


for _layer in (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
):
    lipschitz_rule.register(_layer, _convolution_rule)
lipschitz_rule.register(SkewOrthogonalConv2d, _response_rule)
lipschitz_rule.register(CayleyConv2d, _response_rule)


# ------------------------------------------------------------------------------- arguments


def _per_axis(name: str, value: Size, dims: int, least: int = 1) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} must be one or {dims} integers >= {least}, got {value!r}")
    return values


def _check_kernel(weight: Tensor, groups: int) -> int:
    dims = weight.dim() - 2
    if dims not in (1, 2, 3) or not weight.is_floating_point():
        raise ValueError(
            "weight must be a real floating-point kernel (c_out, c_in / groups, *k) with one to "
            f"three sizes k, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    _check_groups(len(weight), groups)
    return dims


def _check_groups(channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of the weight, got {groups}")


def _padding(
    padding: Size | str, spans: Sequence[int], strides: Sequence[int], mode: str
) -> tuple[tuple[int, ...] | str, list[tuple[int, int]]]:
    """Resolve padding as torch takes it, and to pixels before and after on each axis."""
    totals = [max(span + 1 - s, 0) for span, s in zip(spans, strides, strict=True)]
    if padding == "same" and max(strides) == 1 and any(total % 2 for total in totals):
        return "same", [(total // 2, total - total // 2) for total in totals]
    if padding == "same":  # one more before than after, as torch's integers have it with a stride
        before = tuple((total + 1) // 2 for total in totals)
        if any(2 * pad > span for pad, span in zip(before, spans, strict=True)):
            raise ValueError(
                "padding='same' needs an odd kernel on the axes without stride if there are axes "
                f"with one, got dilation * (kernel_size - 1) {tuple(spans)}, stride {strides}"
            )
    elif padding == "valid":
        before = (0,) * len(spans)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    else:
        before = _per_axis("padding", padding, len(spans), least=0)
    if mode == "circular" and any(2 * pad > span for pad, span in zip(before, spans, strict=True)):
        raise ValueError(
            "padding must be at most half of dilation * (kernel_size - 1) on a circle, or pixels "
            f"are repeated and the norm exceeds 1, got {before} and {tuple(spans)}"
        )
    pairs = zip(before, totals, strict=True)
    return before, [(pad, max(total - pad, 0) if 2 * pad >= total else pad) for pad, total in pairs]


def _semi_orthogonal(like: Tensor) -> Tensor:
    """Random matrices with orthonormal columns, or rows if they are fewer, (..., m, n)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    wide = like.shape[-2] < like.shape[-1]
    normal = torch.randn(like.mT.shape if wide else like.shape, dtype=dtype, device=like.device)
    factor, triangle = torch.linalg.qr(normal)
    factor = factor * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return (factor.mT if wide else factor).contiguous().to(like.dtype)


def _check_terms(terms: int) -> None:
    if terms < 4 or terms % 4:
        raise ValueError(
            f"terms must be a positive multiple of 4, for the norm to be at most 1, got {terms}"
        )
