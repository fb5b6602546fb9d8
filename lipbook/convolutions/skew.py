"""Skew orthogonal convolutions (SOC): the exponential of a skew-symmetric convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import lipschitz_rule
from lipbook.convolutions.circular import (
    CONV,
    OnUnshuffled,
    channel_counts,
    check_groups,
    circular_pad,
    response_rule,
)
from lipbook.convolutions.frequencies import frequency_matrices, in_frequencies
from lipbook.convolutions.nonexpansive import kernel_norm_bound
from lipbook.errors import (
    Analysis,
    ForwardError,
    _absolute_norm,
    _bias_norm,
    _check_direct,
    _computing_dtype,
    _entries,
    _error_rule_of,
    _is_half,
    _norms,
)
from lipbook.norms.arguments import _floating, _integer
from lipbook.norms.rigorous import _UP, _gamma, rigorous_convolution_norm
from lipbook.orthogonal.orthonormality import add_to_diagonal, without_autocast

__all__ = [
    "skew_kernel",
    "skew_exponential",
    "SOC",
    "SkewOrthogonalConv2d",
    "SkewOrthogonalConvTranspose2d",
]


torch.fx.wrap("_on_channels")  # a step of its own in torch.fx, see circular.py


def skew_kernel(weight: Tensor, groups: int = 1) -> Tensor:
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
        (n, n / groups, \*k) with odd sizes k.
    groups : int
        Of the convolution, a divisor of n. Each group has a bound of its own.

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
    _floating("weight", weight)
    groups = _integer("groups", groups, 1)
    if (
        weight.dim() < 3
        or weight.shape[0] != weight.shape[1] * groups
        or not all(size % 2 for size in weight.shape[2:])
    ):
        expected = "(n, n, *k)" if groups == 1 else f"(n, n / {groups}, *k)"
        raise ValueError(f"weight must be {expected} with odd sizes k, got {tuple(weight.shape)}")
    with without_autocast(weight):
        kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
        kernel = kernel.unflatten(0, (groups, -1))
        kernel = kernel - kernel.transpose(1, 2).flip(list(range(3, kernel.dim())))
        bounds = torch.stack([kernel_norm_bound(part) for part in kernel])
        kernel = kernel / bounds.clamp(min=1).view(-1, *[1] * (kernel.dim() - 1))
        return kernel.flatten(0, 1).to(weight.dtype)


def skew_exponential(x: Tensor, kernel: Tensor, terms: int = 8, groups: int = 1) -> Tensor:
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
        :math:`A`, (n, n / groups, \*k).
    terms : int
        :math:`m`, a positive multiple of 4. Each term costs a convolution.
    groups : int
        Of the convolution, a divisor of n.

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
    _floating("x", x, 3)
    _floating("kernel", kernel, 3)
    check_groups(len(kernel), groups)
    if x.dim() < kernel.dim() - 1:
        raise ValueError(
            f"x must have the {kernel.dim() - 2} axes of kernel, got shape {tuple(x.shape)}"
        )
    pads = [(size // 2, size // 2) for size in kernel.shape[2:]]
    term = x
    for j in range(1, terms + 1):
        term = CONV[len(pads) - 1](circular_pad(term, pads), kernel, groups=groups) / j
        x = x + term
    return x


def _check_terms(terms: int) -> None:
    _integer("terms", terms, 0)
    if terms < 4 or terms % 4:
        raise ValueError(
            f"terms must be a positive multiple of 4, for the norm to be at most 1, got {terms}"
        )


class SOC(nn.Module):
    """Parametrization by :func:`skew_kernel`: a skew-symmetric kernel of norm at most 1.

    Parameters
    ----------
    groups : int
        Of the convolution.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        """Kernel, like ``weight``."""
        return skew_kernel(weight, self.groups)


class _SkewOrthogonal(OnUnshuffled):
    """Exponential of a skew-symmetric convolution between two numbers of channels."""

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
        *,
        groups: int = 1,
    ) -> None:
        _check_terms(terms)
        in_channels, out_channels = channel_counts(in_channels, out_channels)
        kernel_size = _integer("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(
                "kernel_size must be odd, since a skew-symmetric kernel turns about a middle "
                f"pixel, got {kernel_size}"
            )
        stride, groups = _integer("stride", stride, 1), _integer("groups", groups, 1)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels {in_channels} and out_channels {out_channels}, "
                f"got {groups}"
            )
        phases = (1, stride**2) if self.transposed else (stride**2, 1)
        n = max(in_channels * phases[0], out_channels * phases[1])
        weight = torch.empty(n, n // groups, kernel_size, kernel_size, device=device, dtype=dtype)
        super().__init__(out_channels, stride, bias, weight, SOC(groups))
        self.in_channels, self.kernel_size = in_channels, kernel_size
        self.terms, self.groups = int(terms), groups


class SkewOrthogonalConv2d(_SkewOrthogonal):
    r"""Skew orthogonal convolution (SOC): the exponential of a skew-symmetric convolution.

    ``layer.weight`` is the skew kernel :math:`A`, the layer is :func:`skew_exponential`. Channels
    are padded with zeros if there are more outputs, and cut if there are more inputs, in each
    group; a stride is invertible downsampling.

    **Guaranteed**: norm at most 1, and all singular values above 1 - 3e-6 with 8 terms.
    **Not guaranteed**: reaching every orthogonal convolution; the eigenvalues of the
    exponential lie within an angle of 1 from 1.

    In training mode, a pass through a large batch with a gradient takes the same terms in
    frequencies: the same up to rounding, and faster on a CPU. Bounds of rounding are for the pass
    in evaluation mode, or without a gradient. With a stride the exponential has c_in s² channels;
    ``OrthogonalConv2d(c_in, c_out, s, stride=s)`` before a layer without a stride costs much less.

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
    groups : int
        A divisor of both numbers of channels: groups of inputs that do not mix, each with a kernel
        of its own.

    Raises
    ------
    ValueError
        If ``kernel_size`` is even, ``terms`` no multiple of 4, or ``groups`` no divisor.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place, as by
    ``torch.nn.init.uniform_(layer.weight)``, is lost without an error, and no weight can be
    assigned. Call ``reset_parameters()`` to draw anew, or write into the
    raw parameter, ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer, x = SkewOrthogonalConv2d(3, 6, 3, bias=False), torch.randn(2, 3, 8, 8)
    >>> 1 - 3e-6 < (layer(x).norm() / x.norm()).item() < 1 + 1e-6
    True

    References
    ----------
    :cite:t:`singla2021soc`.
    """

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Exponential, from the phases (batch, c_in s², h / s, w / s)."""
        return _on_channels(x, weight, self.terms, self.out_channels, self.groups, self.training)


class SkewOrthogonalConvTranspose2d(_SkewOrthogonal):
    r"""Transposed skew orthogonal convolution: the adjoint of :class:`SkewOrthogonalConv2d`.

    .. math:: \langle y, S\, T_m(A)\, P x\rangle = \langle P^\top T_m(-A)\, S^\top y, x\rangle

    with :math:`P` for downsampling and channels of zeros, and :math:`S` for cut channels: the
    exponential of :math:`-A`, then upsampling. The layer with the same raw parameter as one from
    ``out_channels`` to ``in_channels`` is its adjoint. **Guaranteed**: norm at most 1, and all
    singular values above 1 - 3e-6 with 8 terms. **Not guaranteed**: reaching every orthogonal
    convolution.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    kernel_size : int
        Odd.
    stride : int
        The outputs are larger by it.
    bias, device, dtype, groups
        As in :class:`SkewOrthogonalConv2d`.
    terms : int
        Of the series, a multiple of 4; each is a convolution with max(c_in, c_out s²) channels.

    Raises
    ------
    ValueError
        As in :class:`SkewOrthogonalConv2d`.

    Examples
    --------
    >>> layer = SkewOrthogonalConvTranspose2d(8, 2, 3, stride=2, bias=False)
    >>> x = torch.randn(5, 8, 4, 4)
    >>> layer(x).shape, 1 - 3e-6 < (layer(x).norm() / x.norm()).item() < 1 + 1e-6
    (torch.Size([5, 2, 8, 8]), True)

    References
    ----------
    :cite:t:`singla2021soc`.
    """

    transposed = True

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Exponential of the adjoint, to the phases (batch, c_out s², h, w)."""
        channels = self.out_channels * self.stride**2
        return _on_channels(x, -weight, self.terms, channels, self.groups, self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h * stride, w * stride)."""
        output = functional.pixel_shuffle(self.linear(input, self.weight), self.stride)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


# Note [two courses of a series]
# At a frequency of a circle the series is a polynomial of a matrix, which is the same for all
# images: T_m takes m / 4 + 2 products of matrices, or m with as many rows as there are outputs,
# and then an image costs one product instead of m convolutions. So a large batch is trained on
# in frequencies, four times as fast. The pass without a gradient, whose rounding is bounded below,
# is always the series.


def _on_channels(
    x: Tensor, kernel: Tensor, terms: int, channels: int, groups: int, training: bool
) -> Tensor:
    """Exponential on images with channels of zeros added and outputs cut, in each group."""
    if training and groups == 1 and _is_faster_in_frequencies(x, kernel, terms, channels):
        return _in_frequencies(x, kernel, terms, channels)
    x = x.unflatten(-3, (groups, -1))
    x = functional.pad(x, (0, 0, 0, 0, 0, kernel.shape[1] - x.shape[-3])).flatten(-4, -3)
    y = skew_exponential(x, kernel, terms, groups).unflatten(-3, (groups, -1))
    return y.narrow(-3, 0, channels // groups).flatten(-4, -3)


def _is_faster_in_frequencies(x: Tensor, kernel: Tensor, terms: int, channels: int) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    followed = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    ordinary = x.dtype == kernel.dtype and x.dtype in (torch.float32, torch.float64)
    if traced or not followed or not ordinary or x.dim() != 4 or x.device.type != "cpu":
        return False
    wound = any(k // 2 > size for k, size in zip(kernel.shape[2:], x.shape[2:], strict=True))
    if torch.is_autocast_enabled("cpu") or wound:  # the series refuses such a kernel
        return False
    n, batch = len(kernel), len(x)
    rows = min(terms * min(channels, x.shape[1]), (terms // 4 + 2) * n)
    once, each = 4 * rows, 4 * (1 + 64 / n)  # a transform counts as products with 32 channels
    return once + each * batch < terms * kernel[0, 0].numel() * batch


def _in_frequencies(x: Tensor, kernel: Tensor, terms: int, channels: int) -> Tensor:
    """Exponential with the same terms, see Note [two courses of a series]."""
    matrices = frequency_matrices(kernel, x.shape[-2:])
    return in_frequencies(x, _truncated_exponential(matrices, terms, channels, x.shape[1]))


def _truncated_exponential(matrices: Tensor, terms: int, rows: int, columns: int) -> Tensor:
    """First rows and columns of T_m of complex matrices; those of one of them are all."""
    n, factors = matrices.shape[-1], [1 / math.factorial(j) for j in range(terms + 1)]
    if columns < rows:
        return _truncated_exponential(matrices.mT, terms, columns, rows).mT
    if terms * rows < (terms // 4 + 2) * n:
        power = matrices[..., :rows, :]
        total = power.clone()
        for factor in factors[2:]:
            power = power @ matrices
            total = total.add(power, alpha=factor)
        return add_to_diagonal(total, 1)
    second = matrices @ matrices
    powers = (matrices, second, matrices @ second)
    fourth = second @ second
    total = factors[terms] * fourth
    for start in range(terms - 4, -1, -4):
        if start < terms - 4:
            total = fourth @ total
        for factor, power in zip(factors[start + 1 :], powers, strict=False):
            total = total.add(power, alpha=factor)
        total = add_to_diagonal(total, factors[start])
    return total[..., :rows, :]


lipschitz_rule.register(SkewOrthogonalConv2d, response_rule)
lipschitz_rule.register(SkewOrthogonalConvTranspose2d, response_rule)


# ------------------------------------------------------------------- errors of programs

# Note [the norm of a truncated exponential]
# A skew-symmetric A has eigenvalues i λ, |λ| ≤ ‖A‖. For m a multiple of 4, the derivative of
# |T_m(iλ)|² is -2 λ^m / m! times the Taylor polynomial of the sine of degree m - 1, whose terms
# pair to positive numbers for 0 < λ² ≤ 6. So ‖T_m(A)‖ ≤ T_m(0) = 1 if ‖A‖ ≤ 2, which is checked.


@_error_rule_of(SkewOrthogonalConv2d, SkewOrthogonalConvTranspose2d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    weight, dtype = module.weight.detach(), module.weight.dtype
    _check_direct(weight)
    if _is_half(dtype) or _computing_dtype(example, weight) != dtype:
        raise ValueError("half precision is not supported: use float32 or float64")
    size = list(example.shape[2:])
    if not module.transposed:
        size = [n // module.stride for n in size]
    pixels = math.prod(size) * (module.stride**2 if module.transposed else 1)

    def norm(q: float) -> float:
        padding = weight.shape[-1] // 2
        return rigorous_convolution_norm(
            weight, size, padding=padding, padding_mode="circular", p=q, groups=module.groups
        )

    a, absolute = norm(p), _absolute_norm(norm, p)
    parts = weight.unflatten(0, (module.groups, -1))
    skew = torch.equal(parts, -parts.transpose(1, 2).flip(3, 4))
    gamma = _gamma(weight[0].numel() + 4, dtype)
    # Norms of the terms A^j x / j! and of their errors, in units of ‖x‖, and the sums of both.
    term, wrong = 1.0, 0.0
    total, error = 1.0, 0.0
    for j in range(1, module.terms + 1):
        wrong = (a * wrong + gamma * absolute * (term + wrong)) * (1 + gamma) / j
        term = a * term / j
        total, error = total + term + wrong, error + wrong
    rate = (error + _gamma(module.terms + 2, dtype) * total) * _UP
    lipschitz = 1.0 if p == 2 and skew and a <= 2 else total * _UP
    bias_norm = _bias_norm(module.bias, dtype, pixels, p)
    unit = _gamma(2, dtype)

    def analysis(x: Tensor) -> ForwardError:
        with torch.no_grad():  # see Note [two courses of a series]
            outputs = module(x)
        largest = _norms(x, p)
        products = module.terms * weight[0].numel() * _entries(outputs, p) * len(weight)
        underflow = torch.finfo(dtype).tiny * products * (1 + absolute + total)
        slope = (rate + unit * (lipschitz + rate) + underflow) * _UP
        room = torch.finfo(dtype).max / 4 - (absolute + 1) * total * largest - bias_norm
        return ForwardError(
            outputs,
            lipschitz,
            (slope * largest + unit * bias_norm + underflow) * _UP,
            slope,
            room / ((absolute + 1) * total),
        )

    return analysis
