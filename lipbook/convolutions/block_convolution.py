"""Block convolutions of projectors (BCOP): orthogonal kernels of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lipbook.convolutions.circular import CONV, Size, check_groups, per_axis
from lipbook.norms.arguments import _floating
from lipbook.orthogonal.orthonormality import apply, save, two_modes, without_autocast

__all__ = [
    "block_convolution",
    "bcop_kernel",
]


def block_convolution(outer: Tensor, inner: Tensor, groups: int = 1) -> Tensor:
    r"""Block convolution of two kernels: the kernel of the composed convolutions.

    .. math:: (A \mathbin{\square} B)_u = \sum_t A_t\, B_{u - t}

    A convolution with kernel ``inner`` and then one with kernel ``outer`` (stride 1, no padding or
    circular padding) is one convolution with the returned kernel. Block convolutions of
    orthogonal kernels are orthogonal.

    Parameters
    ----------
    outer : torch.Tensor
        :math:`A`, (c_out, c_mid / groups, \*k) with one to three sizes k.
    inner : torch.Tensor
        :math:`B`, (c_mid, c_in / groups, \*l) with as many.
    groups : int
        Groups of channels, the same of both convolutions.

    Returns
    -------
    torch.Tensor
        (c_out, c_in / groups, \*(k + l - 1)).

    Raises
    ------
    ValueError
        If the kernels differ in their number of axes or in ``c_mid``, or ``groups`` does not
        divide their channels.

    Examples
    --------
    >>> from torch.nn import functional
    >>> A, B, image = torch.randn(2, 3, 2), torch.randn(3, 4, 3), torch.randn(1, 4, 9)
    >>> composed = functional.conv1d(functional.conv1d(image, B), A)
    >>> torch.allclose(functional.conv1d(image, block_convolution(A, B)), composed, atol=1e-5)
    True

    References
    ----------
    :cite:t:`li2019preventing`, section 4.2; :cite:t:`xiao2018`.
    """
    _floating("outer", outer)
    _floating("inner", inner)
    dims = outer.dim() - 2
    if outer.dim() != inner.dim() or dims not in (1, 2, 3):
        raise ValueError(
            "outer and inner must be kernels (c_out, c_mid, *k) and (c_mid, c_in, *l), "
            f"got {tuple(outer.shape)} and {tuple(inner.shape)}"
        )
    check_groups(len(outer), groups)
    if groups * outer.shape[1] != inner.shape[0]:
        raise ValueError(
            "outer and inner must be kernels (c_out, c_mid / groups, *k) and "
            f"(c_mid, c_in / groups, *l), got {tuple(outer.shape)} and {tuple(inner.shape)} "
            f"with groups {groups}"
        )
    flipped = inner.transpose(0, 1).flip(list(range(2, inner.dim())))  # conv sums A_t B_{u + t}
    padding = [size - 1 for size in outer.shape[2:]]
    convolve: Any = CONV[dims - 1]
    kernel = convolve(flipped, outer, padding=padding, groups=groups)
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


def _right_solve(tangent: Tensor, factor: Tensor) -> Tensor:
    """Tangent of A times L⁻ᵀ, for A = Q Lᵀ."""
    return torch.linalg.solve_triangular(factor.mT, tangent, upper=True, left=False)


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


@two_modes
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
        kernel = kernel.view(groups, *sizes, rows, n).movedim((-2, -1), (1, 2))
        kernel = kernel.to(seed.dtype, memory_format=torch.contiguous_format, copy=True)
        half = torch.promote_types(seed.dtype, torch.float32)
        return kernel, table.to(half), *(tensor.to(half) for tensor in rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stride, ctx.axes = inputs[2:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, *inputs[:2], *output[1:])

    @staticmethod
    def tangent(
        ctx: Any, seed_tangent: Tensor | None, projectors_tangent: Tensor | None, *_: None
    ) -> Any:
        seed, projectors, table, *rest = ctx.saved_tensors
        frame, frame_factor, bases, bases_factor, S, *stages = rest
        groups, rows, columns = seed.shape
        n = projectors.shape[-2]
        with without_autocast(seed):
            of_seed = torch.zeros_like(seed) if seed_tangent is None else seed_tangent
            of_seed = of_seed.mT if rows < columns else of_seed
            quotient = _right_solve(of_seed.to(table.dtype), frame_factor)
            inner = torch.bmm(frame.mT, quotient)
            tangent = quotient - torch.bmm(frame, inner.triu() + inner.tril(-1).mT)
            tangent = tangent.mT if rows < columns else tangent
            tangent = tangent.reshape(groups, rows, *ctx.stride, n).movedim(1, -2)
            if max(ctx.stride) > 1:
                powers = _basis(ctx.stride, tangent)
                taps = torch.matmul(powers.mT, tangent.reshape(groups, len(powers), -1))
                tangent = taps.view(tangent.shape)
            turns = torch.zeros_like(S)
            if projectors_tangent is not None:
                quotient = _right_solve(projectors_tangent.flatten(0, 1).to(S.dtype), bases_factor)
                moved = quotient - torch.bmm(bases, torch.bmm(bases.mT, quotient))
                turns = torch.bmm(moved, 2 * bases.mT)
                turns = (turns + turns.mT).view(S.shape)
            for kernel, reflection, turn, axis in zip(stages, S, turns, ctx.axes, strict=True):
                turned = torch.bmm(tangent.flatten(1, -2), reflection)
                turned = (turned + torch.bmm(kernel.flatten(1, -2), turn)).view(tangent.shape)
                first, others = tangent.tensor_split([1], axis)
                before, last = turned.tensor_split([-1], axis)
                tangent = torch.cat((first, others + before, last), axis)
            sizes = tangent.shape[1:-2]
            tangent = torch.matmul(table.mT, tangent.reshape(groups, len(table), -1))
            tangent = tangent.view(groups, *sizes, rows, n).movedim((-2, -1), (1, 2))
            tangent = tangent.to(seed.dtype, memory_format=torch.contiguous_format, copy=True)
            return tangent, *(None for _ in (table, *rest))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        seed, projectors, table, *rest = ctx.saved_tensors
        with without_autocast(seed):
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
    and second derivatives, by reverse and by forward mode.

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
    _floating("seed", seed)
    _floating("projectors", projectors)
    if isinstance(kernel_size, str) or not isinstance(kernel_size, Sequence):
        raise TypeError(
            f"kernel_size must be a sequence of integers, got {type(kernel_size).__name__}"
        )
    sizes = per_axis("kernel_size", kernel_size, len(kernel_size))
    strides = per_axis("stride", stride, len(sizes))
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
    with without_autocast(seed):
        return cast(Tensor, apply(_BlockConvolution, seed, projectors, strides, axes)[0])


def _turns(extra: Sequence[int]) -> tuple[int, ...]:
    """Axes, from 1, of the factors: in turn, until each has had its number."""
    rounds = range(max(extra))
    return tuple(axis for i in rounds for axis, count in enumerate(extra, 1) if i < count)
