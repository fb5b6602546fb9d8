r"""1-Lipschitz residual layers: a gradient step on a convex potential, and learnt averages.

A residual block :math:`x + g(x)` is only :math:`(1 + \operatorname{Lip} g)`-Lipschitz in general.
It is 1-Lipschitz if :math:`-g` is the gradient of a convex function that curves little enough:

.. math::
    f(x) = x - 2 W^\top T^{-1} \sigma(W x + b), \qquad 0 \le \sigma' \le 1, \qquad
    T \text{ diagonal}, \quad T \succeq W W^\top .

**Why.** The Jacobian is :math:`I - 2 W^\top T^{-1} D W` with
:math:`D = \operatorname{diag}(\sigma')`, symmetric, and
:math:`0 \preceq W^\top T^{-1} D W \preceq W^\top T^{-1} W \preceq I`, so that its eigenvalues lie
in [-1, 1]. The layers differ in :math:`T`: one number for all (CPL), or one a row
(SLL), which is tighter.

**Guaranteed**: 1-Lipschitz in the 2-norm for all parameters, for matrices and for convolutions with
circular or zero padding, in float32 and float64; in half precision up to its rounding, and in
float16 only while :math:`T` stays above 1e-4, for :math:`2 / T` to be in range. **Not guaranteed**:
anything from below. Eigenvalues may be 0: these layers are nonexpansive, not norm-preserving.

Any branch will do in an average, :math:`(1 - w)\, x + w f(x)` (:class:`AverageResidual`), which may
lose norm, in a rotation of two halves (:class:`OrthogonalResidual`), which loses none, beside
the skip, :math:`(\cos\theta\, x, \sin\theta\, f(x))` (:class:`ConcatenatedResidual`), and in the
root of an average of squares, :math:`\sqrt{(1 - w)\, x^2 + w f(x)^2}` (:class:`NormResidual`).

The sandwich layer (:class:`SandwichLinear`) has the same activations and no skip, and takes any
number of inputs to any number of outputs:

.. math::
    f(x) = \sqrt2 A^\top \Psi\, \sigma(\sqrt2\, \Psi^{-1} B x + b), \qquad
    0 \le \sigma' \le 1, \qquad A A^\top + B B^\top \preceq I, \qquad
    \Psi \succ 0 \text{ diagonal} .

**Why.** With :math:`D = \operatorname{diag}(\sigma')` its Jacobian is :math:`2 A^\top D B`, since
diagonal matrices commute and :math:`\Psi` cancels. For :math:`a = Au` and :math:`c = Bv`,

.. math::
    u^\top (2 A^\top D B)\, v = \sum_i 2 d_i a_i c_i \le \sum_i \tfrac12 (a_i + c_i)^2
    = \tfrac12 \lVert Au + Bv\rVert^2 \le \tfrac12 (\lVert u\rVert^2 + \lVert v\rVert^2),

which is 1 for unit vectors: the first step since :math:`2 d_i a_i c_i` is at most 0 or
:math:`2 a_i c_i`, and both are at most :math:`(a_i + c_i)^2 / 2`; the last since
:math:`(A\; B)` has norm at most 1. With any other matrices the constant is at most
:math:`\lVert(A\; B)\rVert^2`.
"""

from __future__ import annotations

import abc
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lipbook.composition import Bound, lipschitz_rule
from lipbook.composition.bounds import _branch_bound, _check_branch
from lipbook.convolutions import kernel_norm_bound
from lipbook.convolutions.cayley import (
    CayleyKernel,
    _adjoint_in_frequencies,
    _in_frequencies,
    _of_size,
)
from lipbook.convolutions.circular import (
    Size,
    _pad_whole,
    channel_counts,
    check_groups,
    circular_transpose,
    one_size,
)
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
    _quantum,
    forward_error_rule,
)
from lipbook.freezing import computes_as, freeze_rule
from lipbook.graphs.operations import traced_as
from lipbook.layers.joins import Join, interval_product, rounded
from lipbook.layers.linear import convolution_of_moduli, matrix_of_moduli
from lipbook.norms import convolution_norm_bound, dual_exponent, operator_norm
from lipbook.norms.arguments import _floating, _integer, _real
from lipbook.norms.rigorous import (
    _UP,
    _gamma,
    rigorous_convolution_norm,
    rigorous_matrix_norm,
)
from lipbook.orthogonal.constrained import Constrained, raw_parameters
from lipbook.orthogonal.layers import draw_orthonormal
from lipbook.orthogonal.orthonormality import power_of_two, without_autocast
from lipbook.orthogonal.rotations import Cayley
from lipbook.rules import CONTAINERS, Range, Shape, outward
from lipbook.units import Kinks, Units, units_rule

__all__ = [
    "AverageResidual",
    "CPLConv2d",
    "CPLLinear",
    "ConcatenatedResidual",
    "NormResidual",
    "OrthogonalResidual",
    "SLLConv2d",
    "SLLLinear",
    "SandwichConv2d",
    "SandwichLinear",
    "cpl_scale",
    "sll_scale",
]

Activation = Literal["relu", "tanh", "softplus", "identity"]

# Elementwise, with slopes in [0, 1]. Sorting is neither: its Jacobian is not symmetric.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functools.partial(functional.relu, inplace=True),  # hidden units are not read again
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "identity": lambda x: x,
}


# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("sll_scale")
torch.fx.wrap("cpl_scale")
torch.fx.wrap("_pad_whole")
torch.fx.wrap("circular_transpose")
torch.fx.wrap("_of_size")
torch.fx.wrap("_in_frequencies")
torch.fx.wrap("_adjoint_in_frequencies")

# Note [rounding]
# The scales are rounded upwards by a few units in the last place, so that T is at least W Wᵀ for
# the rounded scale as well. The sums that they come from are off by more (some 1e-7 relative in
# float32), which the Lipschitz rule sees: it computes the norm of the layer at hand in float64.


def sll_scale(weight: Tensor, log_q: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    r"""Scale of the SDP-based Lipschitz layer (SLL): row sums of the weighted Gram kernel.

    .. math::
        T_i = \sum_{j, \tau} \big|(W W^\top)_{ij,\tau}\big| \frac{q_j}{q_i}, \qquad q > 0

    :math:`T - WW^\top` is diagonally dominant in the basis scaled by q, hence positive
    semidefinite. For a convolution :math:`\tau` runs over the shifts of the kernel against itself,
    with a stride over its multiples; i and j share a group.

    Parameters
    ----------
    weight : torch.Tensor
        (inner, c) or (inner, c / groups, k, k).
    log_q : torch.Tensor
        :math:`\log q`, (inner,). Free parameters; zeros for plain row sums.
    stride, groups : int
        Of the convolution.

    Returns
    -------
    torch.Tensor
        :math:`T`, (inner,); infinite where it exceeds the range of the dtype.

    Examples
    --------
    >>> W, log_q = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    >>> T = sll_scale(W, log_q)
    >>> bool(torch.linalg.eigvalsh(T.diag() - W @ W.mT)[0] > -1e-12)
    True

    References
    ----------
    :cite:t:`araujo2023sll`, Theorem 3. Both q and 1/q have to meet the same pair (i, j).
    """
    _floating("weight", weight, 2)
    _floating("log_q", log_q, 1)
    stride, groups = _integer("stride", stride, 1), _integer("groups", groups, 1)
    check_groups(len(weight), groups)
    with without_autocast(weight):
        weight, log_q = _at_least_float32(weight), _at_least_float32(log_q)
        size = power_of_two(weight)
        weight = weight / size
        if weight.dim() == 2:
            gram = (weight @ weight.mT).abs()
        else:
            reach = weight.shape[-1] - 1
            images = weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
            shifts = functional.conv2d(images, weight, padding=reach, groups=groups)
            first = reach % stride  # shifts by multiples of the stride are what windows differ by
            gram = shifts[..., first::stride, first::stride].abs().sum((2, 3)).mT
        others = log_q.view(groups, 1, -1).expand(-1, len(log_q) // groups, -1).flatten(0, 1)
        ratio = (others - log_q[:, None]).exp().clamp(max=torch.finfo(log_q.dtype).max)
        scale = _rounded_up((gram * ratio).sum(1)) * size * size
        return scale.clamp(min=math.sqrt(torch.finfo(scale.dtype).tiny))


def cpl_scale(weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    r"""Scale of the convex potential layer (CPL): one bound of the squared norm for all rows.

    .. math:: T = \beta^2 I, \qquad \beta \ge \lVert W\rVert_2

    with the bound of :func:`~lipbook.convolutions.kernel_norm_bound`, which is from above, where
    the authors take a power iteration, which is from below. With a stride s a pixel is read
    :math:`\lceil k / s\rceil^2` times at most, and not :math:`k^2` times; of groups the largest
    bound counts.

    Parameters
    ----------
    weight : torch.Tensor
        (inner, c) or (inner, c / groups, k, k).
    stride, groups : int
        Of the convolution.

    Returns
    -------
    torch.Tensor
        The diagonal of :math:`T`, (inner,); infinite where it exceeds the range of the dtype.

    Examples
    --------
    >>> W = torch.randn(5, 3, dtype=torch.float64)
    >>> bool(torch.linalg.matrix_norm(W, 2) ** 2 <= cpl_scale(W)[0])
    True

    References
    ----------
    :cite:t:`meunier2022cpl`.
    """
    _floating("weight", weight, 2)
    stride, groups = _integer("stride", stride, 1), _integer("groups", groups, 1)
    check_groups(len(weight), groups)
    with without_autocast(weight):
        weight = _at_least_float32(weight)
        parts = [kernel_norm_bound(part) for part in weight.unflatten(0, (groups, -1))]
        read = 1.0
        for k in weight.shape[2:]:
            read *= -(-k // stride) / k
        squares = torch.stack(parts).amax().square() * read
        return _rounded_up(squares).expand(weight.shape[0])


def _check_activation(activation: str) -> None:
    if activation not in tuple(_ACTIVATIONS):
        raise ValueError(
            f"activation must be one of {sorted(_ACTIVATIONS)}, elementwise with slopes in "
            f"[0, 1], got {activation!r}"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rounded_up(scale: Tensor) -> Tensor:
    info = torch.finfo(scale.dtype)
    return scale.clamp(min=math.sqrt(info.tiny)) * (1 + 4 * info.eps)


class _PotentialStep(nn.Module):
    """x - 2 Wᵀ T⁻¹ σ(W x + b), with a matrix W or a convolution."""

    _weighted: ClassVar[bool]
    stride = groups = 1

    def __init__(self, shape: tuple[int, ...], activation: str, device: Any, dtype: Any) -> None:
        super().__init__()
        _check_activation(activation)
        inner, outer, *sizes = shape
        name = "channels" if sizes else "features"
        _integer(name, outer, 1)
        _integer(f"inner_{name}", inner, 1)
        shape = tuple(operator.index(n) for n in shape)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        self.log_q = nn.Parameter(torch.empty_like(self.bias)) if self._weighted else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and b as a linear layer of torch does; q = 1."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if self.log_q is not None:
            nn.init.zeros_(self.log_q)

    def extra_repr(self) -> str:
        """Shape of W, and the activation."""
        return f"weight={tuple(self.weight.shape)}, activation={self.activation!r}"

    def scale(self) -> Tensor:
        """Diagonal of T, (inner,)."""
        geometry = self.stride, self.groups
        if self.log_q is None:
            return cpl_scale(self.weight, *geometry)
        return sll_scale(self.weight, self.log_q, *geometry)

    def _scaled(self, dtype: torch.dtype, axes: int) -> Tensor:
        """-2 T⁻¹ W: a product with the weight has fewer entries than one with the hidden units."""
        return self.weight * (-2 / self.scale()).to(dtype).view(-1, *[1] * axes)


class _DenseStep(_PotentialStep):
    def __init__(
        self,
        features: int,
        inner_features: int | None = None,
        activation: Activation = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        inner = features if inner_features is None else inner_features
        super().__init__((inner, features), activation, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Take the step, (batch, features) to the same."""
        outer = _ACTIVATIONS[self.activation](functional.linear(input, self.weight, self.bias))
        return input + functional.linear(outer, self._scaled(outer.dtype, 1).mT)


class _ConvolutionStep(_PotentialStep):
    def __init__(
        self,
        channels: int,
        inner_channels: int | None = None,
        kernel_size: int = 3,
        padding_mode: Literal["circular", "zeros"] = "circular",
        activation: Activation = "relu",
        device: Any = None,
        dtype: Any = None,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        if _integer("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        stride, groups = _integer("stride", stride, 1), _integer("groups", groups, 1)
        if padding_mode not in ("circular", "zeros"):
            raise ValueError(f"padding_mode must be 'circular' or 'zeros', got {padding_mode!r}")
        channels = _integer("channels", channels, 1)
        inner = channels if inner_channels is None else inner_channels
        if channels % groups or _integer("inner_channels", inner, 1) % groups:
            raise ValueError(
                f"groups must divide channels {channels} and inner_channels {inner}, got {groups}"
            )
        shape = (inner, channels // groups, kernel_size, kernel_size)
        self.stride, self.groups = stride, groups
        super().__init__(shape, activation, device, dtype)
        self.padding_mode = padding_mode

    def extra_repr(self) -> str:
        """Shape of W, the activation, and stride and groups if there are any."""
        more = (f", {name}={getattr(self, name)}" for name in ("stride", "groups"))
        return super().extra_repr() + "".join(each for each in more if not each.endswith("=1"))

    def forward(self, input: Tensor) -> Tensor:
        """Take the step, (batch, c, h, w) to the same."""
        reach, strides = self.weight.shape[-1] // 2, (self.stride,) * 2
        pads = [(reach, reach)] * 2 if self.padding_mode == "circular" else [(0, 0)] * 2
        zeros = 0 if self.padding_mode == "circular" else reach
        geometry: dict[str, Any] = {"stride": strides, "padding": zeros, "groups": self.groups}
        padded = _pad_whole(input, pads, strides)
        hidden = functional.conv2d(padded, self.weight, self.bias, **geometry)
        outer = _ACTIVATIONS[self.activation](hidden)
        scaled = self._scaled(outer.dtype, 3)
        if self.padding_mode == "circular":
            back = circular_transpose(
                outer, scaled, None, (reach,) * 2, strides, (1, 1), self.groups
            )
        else:
            geometry["output_padding"] = self.stride - 1
            back = functional.conv_transpose2d(outer, scaled, **geometry)
        return input + back


class SLLLinear(_DenseStep):
    r"""SDP-based Lipschitz layer (SLL), dense: a 1-Lipschitz residual layer.

    .. math:: f(x) = x - 2 W^\top T^{-1} \sigma(W x + b)

    with :math:`T` from :func:`sll_scale`. **Guaranteed**: 1-Lipschitz in the 2-norm.

    Parameters
    ----------
    features : int
        Length of inputs and outputs.
    inner_features : int, optional
        Rows of W; ``features`` if not given.
    activation : str
        ``"relu"``, ``"tanh"``, ``"softplus"`` or ``"identity"``.
    device, dtype
        As in :class:`torch.nn.Linear`.

    Raises
    ------
    ValueError
        If ``activation`` is none of the above: its slopes must lie in [0, 1].

    Examples
    --------
    >>> from lipbook.composition import lipschitz_lower_bound
    >>> layer = SLLLinear(8, 16)
    >>> lipschitz_lower_bound(layer, torch.randn(4, 8), steps=5).value <= 1
    True

    References
    ----------
    :cite:t:`araujo2023sll`, Theorem 3.
    """

    _weighted = True


class CPLLinear(_DenseStep):
    r"""Convex potential layer (CPL), dense: a 1-Lipschitz residual layer.

    .. math:: f(x) = x - \frac{2}{\beta^2} W^\top \sigma(W x + b), \qquad \beta \ge \lVert W\rVert_2

    with :math:`\beta` from :func:`cpl_scale`. **Guaranteed**: 1-Lipschitz in the 2-norm.

    Parameters
    ----------
    features, inner_features, activation, device, dtype
        As in :class:`SLLLinear`.

    Raises
    ------
    ValueError
        As in :class:`SLLLinear`.

    Examples
    --------
    >>> layer, x = CPLLinear(8), torch.randn(2, 8)
    >>> y = layer(x)
    >>> bool((y[0] - y[1]).norm() <= (x[0] - x[1]).norm())
    True

    References
    ----------
    :cite:t:`meunier2022cpl`.
    """

    _weighted = False


class SLLConv2d(_ConvolutionStep):
    r"""SDP-based Lipschitz layer (SLL), convolutional: a 1-Lipschitz residual layer.

    :class:`SLLLinear` with a convolution in the place of :math:`W` and its transposed convolution
    in the place of :math:`W^\top`. **Guaranteed**: 1-Lipschitz in the 2-norm at every image size.

    Parameters
    ----------
    channels : int
        Of inputs and outputs.
    inner_channels : int, optional
        Outputs of W; ``channels`` if not given.
    kernel_size : int
        Odd.
    padding_mode : str
        ``"circular"`` or ``"zeros"``; the guarantee is the same.
    activation, device, dtype
        As in :class:`SLLLinear`.
    stride : int
        Of W: the hidden images are smaller by it, and the output is not. A divisor of the size of
        the image.
    groups : int
        Of W, a divisor of both numbers of channels.

    Raises
    ------
    ValueError
        If ``kernel_size`` is even, an option is unknown, or ``groups`` does not divide; when
        called, if the stride does not divide the size of the image.

    Notes
    -----
    A block that changes the shape is this one before a 1-Lipschitz map Q that does: with
    :class:`~lipbook.convolutions.OrthogonalConv2d` and a stride, or its transpose,
    :math:`Q f(x) = Qx - 2 Q W^\top T^{-1} \sigma(Wx + b)` is a residual block whose skip and
    branch end in Q, and 1-Lipschitz as a composition.

    Examples
    --------
    >>> layer, x = SLLConv2d(4, 8), torch.randn(2, 4, 8, 8)
    >>> y = layer(x)
    >>> bool((y[0] - y[1]).norm() <= (x[0] - x[1]).norm())
    True

    References
    ----------
    :cite:t:`araujo2023sll`.
    """

    _weighted = True


class CPLConv2d(_ConvolutionStep):
    r"""Convex potential layer (CPL), convolutional: a 1-Lipschitz residual layer.

    :class:`CPLLinear` with a convolution in the place of :math:`W`. **Guaranteed**: 1-Lipschitz
    in the 2-norm at every image size.

    Parameters
    ----------
    channels, inner_channels, kernel_size, padding_mode, activation, device, dtype, stride, groups
        As in :class:`SLLConv2d`.

    Raises
    ------
    ValueError
        As in :class:`SLLConv2d`.

    Examples
    --------
    >>> CPLConv2d(4, 8)(torch.randn(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    References
    ----------
    :cite:t:`meunier2022cpl`.
    """

    _weighted = False


class _Sandwich(Constrained):
    """Two matrices and an activation between them."""

    activation: str
    bias: Tensor

    @abc.abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        r"""Matrices behind and before the activation.

        .. math:: \sqrt2 A^\top \Psi, \qquad \sqrt2\, \Psi^{-1} B

        Returns
        -------
        tuple of torch.Tensor
            (out, inner) and (inner, in).
        """

    @abc.abstractmethod
    def scale(self) -> Tensor:
        r"""Diagonal of :math:`\Psi`, (inner,)."""

    def extra_repr(self) -> str:
        """Sizes, and the activation."""
        outer, inner = self.matrices()
        return (
            f"in_features={inner.shape[1]}, out_features={len(outer)}, "
            f"inner_features={len(inner)}, activation={self.activation!r}"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, ..., in) to (batch, ..., out)."""
        outer, inner = self.matrices()
        hidden = functional.linear(input, inner, self.bias)
        return functional.linear(_ACTIVATIONS[self.activation](hidden), outer)


class SandwichLinear(_Sandwich):
    r"""Sandwich layer: a 1-Lipschitz layer with its activation inside, for any numbers of features.

    .. math:: f(x) = \sqrt2 A^\top \Psi\, \sigma(\sqrt2\, \Psi^{-1} B x + b), \qquad
        \begin{pmatrix} A^\top \\ B^\top \end{pmatrix} = \operatorname{cayley}(\cdot), \qquad
        \Psi = \operatorname{diag}(e^{\psi})

    ``layer.weight`` is :math:`A^\top` above :math:`B^\top`, with orthonormal columns, or rows if it
    has fewer of them. **Guaranteed**: 1-Lipschitz in the 2-norm for every elementwise activation
    with slopes in [0, 1], of which the four below are offered, as long as :math:`e^\psi` and its
    inverse are in range of the dtype; the proof is at the head of :mod:`lipbook.residual`. The
    Lipschitz rule trusts neither :func:`~lipbook.orthogonal.cayley` nor its rounding: it is
    :math:`\lVert(A\; B)\rVert^2`, computed from the two matrices that multiply. The methods of
    :mod:`lipbook.tightness` read both matrices and the units between them.
    **Not guaranteed**: anything from below; a deep stack loses norm.

    The two matrices may have norm :math:`\sqrt2` each, of which a product would say 2. Sorting is
    no activation of this kind: its Jacobian is a permutation P, and :math:`2 A^\top P B` has norms
    up to 2.

    Parameters
    ----------
    in_features, out_features : int
        Lengths of inputs and outputs.
    inner_features : int, optional
        Units of the activation; ``out_features`` if not given.
    activation : str
        ``"relu"``, ``"tanh"``, ``"softplus"`` or ``"identity"``.
    device, dtype
        As in :class:`torch.nn.Linear`. In half precision the guarantee holds up to its rounding.

    Attributes
    ----------
    weight : torch.Tensor
        :math:`(A\; B)^\top`, (out + in, inner).
    log_scale : torch.Tensor
        :math:`\psi`, (inner,).
    bias : torch.Tensor
        :math:`b`, (inner,).

    Raises
    ------
    ValueError
        If ``activation`` is none of the above; if a weight is assigned that is not orthonormal.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read: what is written into it in place is lost. Call
    ``reset_parameters()`` to draw anew, assign an orthonormal weight, or write into the raw
    parameter, ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = SandwichLinear(8, 3, 16)
    >>> round(lipschitz_bound(layer, (8,)).value, 5)
    1.0

    Both matrices stretch, and the layer does not:

    >>> outer, inner = layer.matrices()
    >>> bool(torch.linalg.matrix_norm(outer, 2) * torch.linalg.matrix_norm(inner, 2) > 1.2)
    True

    References
    ----------
    :cite:t:`wang2023lbdn`, the sandwich layer. The constant of other matrices is ours.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        inner_features: int | None = None,
        activation: Activation = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_activation(activation)
        inputs = _integer("in_features", in_features, 1)
        outputs = _integer("out_features", out_features, 1)
        inner = outputs if inner_features is None else _integer("inner_features", inner_features, 1)
        self.out_features, self.activation = outputs, activation
        self.weight = nn.Parameter(torch.empty(outputs + inputs, inner, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty_like(self.bias))
        self.reset_parameters()
        parametrize.register_parametrization(self, "weight", Cayley())

    def reset_parameters(self) -> None:
        """Draw the weight uniformly among all, and b as a linear layer of torch does; Ψ = 1."""
        raw = raw_parameters(self)[0]
        weight = draw_orthonormal(torch.empty_like(raw, requires_grad=False))
        if parametrize.is_parametrized(self):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight)
        bound = 1 / math.sqrt(len(raw) - self.out_features)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.log_scale)

    def scale(self) -> Tensor:
        r"""Diagonal of :math:`\Psi`, (inner,)."""
        return _at_least_float32(self.log_scale).exp()

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Matrices behind and before the activation, (out, inner) and (inner, in)."""
        weight, scale = math.sqrt(2) * self.weight, self.scale()
        outer, inner = weight[: self.out_features] * scale, weight[self.out_features :] / scale
        return outer.to(weight.dtype), inner.mT.to(weight.dtype).contiguous()


class SandwichConv2d(Constrained):
    r"""Sandwich layer with convolutions, for one image size.

    :class:`SandwichLinear` with :math:`A` and :math:`B` circular convolutions:
    :math:`(\hat A(\theta)\; \hat B(\theta))^*` is a Cayley transform at each frequency
    (:func:`~lipbook.convolutions.cayley_kernel`), and :math:`\Psi` has a number a channel. Both are
    applied by fast Fourier transforms. **Guaranteed**: 1-Lipschitz in the 2-norm for the
    activations of :class:`SandwichLinear`, on images of the size in the constructor; others are
    refused. **Not guaranteed**: anything from below. How far its program is off is not known.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    kernel_size : int
        Of the raw parameter.
    image_size : int or sequence of int
        Size of the input, a multiple of the stride.
    inner_channels : int, optional
        Channels of the activation; ``out_channels`` if not given.
    stride : int
        By invertible downsampling before the layer.
    activation, device, dtype
        As in :class:`SandwichLinear`.

    Attributes
    ----------
    weight : torch.Tensor
        Kernel of :math:`(A\; B)^\top`, (c_out + c_in s², inner, h / s, w / s).
    log_scale, bias : torch.Tensor
        As in :class:`SandwichLinear`, (inner,).

    Raises
    ------
    ValueError
        If ``activation`` is unknown, or ``image_size`` is no multiple of ``stride`` or too small
        for the kernel; when called, if the image has another size.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read, and no weight can be assigned. Call
    ``reset_parameters()`` to draw anew, or write into the raw parameter,
    ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = SandwichConv2d(3, 4, 3, image_size=8, stride=2)
    >>> layer(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 4, 4, 4])
    >>> round(lipschitz_bound(layer, (3, 8, 8)).value, 5)
    1.0

    References
    ----------
    :cite:t:`wang2023lbdn`; :cite:t:`trockman2021`.
    """

    weight: Tensor
    not_in_onnx = "multiplies complex numbers, which torch cannot write as ONNX"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        image_size: Size,
        inner_channels: int | None = None,
        stride: int = 1,
        activation: Activation = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_activation(activation)
        inputs, outputs = channel_counts(in_channels, out_channels)
        inner = outputs if inner_channels is None else inner_channels
        inner = _integer("inner_channels", inner, 1)
        k = _integer("kernel_size", kernel_size, 1)
        self.stride = _integer("stride", stride, 1)
        self.image_size = one_size(image_size, k, self.stride)
        self.out_channels, self.activation = outputs, activation
        rows = outputs + inputs * self.stride**2
        self.weight = nn.Parameter(torch.empty(rows, inner, k, k, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty_like(self.bias))
        self.reset_parameters()
        kernel = CayleyKernel([n // self.stride for n in self.image_size])
        parametrize.register_parametrization(self, "weight", kernel, unsafe=True)

    def reset_parameters(self) -> None:
        """Draw the raw parameter and b as a convolution of torch does; Ψ = 1."""
        raw = raw_parameters(self)[0]
        nn.init.kaiming_uniform_(raw, a=math.sqrt(5))
        bound = 1 / math.sqrt(raw[self.out_channels :, 0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.log_scale)

    def extra_repr(self) -> str:
        """Shape of the kernel, size of the images, and the activation."""
        return (
            f"weight={tuple(self.weight.shape)}, image_size={self.image_size}, "
            f"stride={self.stride}, activation={self.activation!r}"
        )

    def scale(self) -> Tensor:
        r"""Diagonal of :math:`\Psi`, a number a channel, (inner,)."""
        return _at_least_float32(self.log_scale).exp()

    def kernels(self) -> tuple[Tensor, Tensor]:
        r"""Kernels behind the activation, and of the adjoint of what is before it.

        .. math:: \sqrt2 A^\top \Psi, \qquad \sqrt2 B^\top \Psi^{-1}

        Returns
        -------
        tuple of torch.Tensor
            (c_out, inner, h / s, w / s) and (c_in s², inner, h / s, w / s).
        """
        weight, scale = math.sqrt(2) * self.weight, self.scale()[:, None, None]
        outer, inner = weight[: self.out_channels] * scale, weight[self.out_channels :] / scale
        return outer.to(weight.dtype), inner.to(weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, c_in, h, w) to (batch, c_out, h / s, w / s)."""
        outer, inner = self.kernels()
        images = functional.pixel_unshuffle(_of_size(input, self.image_size), self.stride)
        hidden = _adjoint_in_frequencies(images, inner) + self.bias.view(-1, 1, 1)
        return _in_frequencies(_ACTIVATIONS[self.activation](hidden), outer)


class _Averaging(nn.Module):
    """Skip and branch with learnt weights that add up to 1."""

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        weight: float = 0.5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_branch("branch", branch)
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        _check_branch("shortcut", self.shortcut)
        self._start = _logit_of(weight)
        self.logit = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to that of the beginning; branch and shortcut stay."""
        nn.init.constant_(self.logit, self._start)

    def weights(self) -> tuple[Tensor, Tensor]:
        r"""Weights of skip and branch, or of their squares, :math:`1 - w` and :math:`w`."""
        weight = self.logit.sigmoid()
        return 1 - weight, weight


class AverageResidual(_Averaging):
    r"""Residual block whose skip and branch are averaged by a learnt weight.

    .. math:: f(x) = (1 - w)\, s(x) + w\, g(x), \qquad w = \frac{1}{1 + e^{-\theta}} \in (0, 1),
        \qquad \operatorname{Lip}(f) \le (1 - w) \operatorname{Lip}(s) + w \operatorname{Lip}(g)

    with the identity for :math:`s` if none is given. **Guaranteed**: 1-Lipschitz in every norm in
    which branch and shortcut are, for each :math:`\theta`, up to the rounding of the weights (6e-8
    in float32). The bound is attained where both move alike. **Not guaranteed**: anything from
    below; where the branch turns against the skip they cancel, and norm is lost.

    How much is lost depends on how the two lie: for an orthogonal branch,

    .. math:: \lVert f(x)\rVert^2 = \big((1 - w)^2 + w^2\big) \lVert x\rVert^2
        + 2 w (1 - w) \langle x, g(x)\rangle ,

    and a random one is about perpendicular to x. Fifty blocks then leave :math:`2^{-25}` of the
    norm if they begin at :math:`w = \tfrac12`, and 0.37 of it at :math:`w = \tfrac1{50}`: in a
    deep network begin at one over the depth.

    The weights are positive and add up to 1. Signs would add nothing, since a branch may end in its
    own, and a smaller sum would only lose norm. One weight a channel would not do: with
    :math:`W` diagonal, :math:`(I - W) x + W g(x)` can take one channel from x and the other from
    :math:`g(x)`, and has constants up to :math:`\sqrt2`.

    A branch that changes the shape, by a stride or other channels, needs a shortcut that changes it
    alike; an orthogonal one, such as :class:`~lipbook.pooling.InvertibleDownsampling` or
    :class:`~lipbook.convolutions.OrthogonalConv2d`, keeps the skip lossless.

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`.
    shortcut : torch.nn.Module, optional
        :math:`s`, whose outputs have the shape of those of the branch.
    weight : float
        :math:`w` at the beginning, in (0, 1).
    device, dtype
        Of :math:`\theta`.

    Attributes
    ----------
    logit : torch.Tensor
        :math:`\theta`, a number.

    Raises
    ------
    TypeError
        If ``branch`` or ``shortcut`` is no module.
    ValueError
        If ``weight`` is not in (0, 1); when called, if skip and branch differ in shape:
        broadcasting has a norm of its own.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> block = AverageResidual(OrthogonalLinear(4, 4), weight=0.3)
    >>> round(lipschitz_bound(block, (4,)).value, 5)
    1.0

    Against 2 for the sum, and at twenty blocks a million:

    >>> from lipbook.composition import Residual
    >>> blocks = [Residual(OrthogonalLinear(4, 4)) for _ in range(20)]
    >>> round(lipschitz_bound(nn.Sequential(*blocks), (4,)).value / 2**20, 4)
    1.0

    References
    ----------
    Residual blocks: :cite:t:`he2016`.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Average skip and branch of a batch."""
        skip, branch = self.weights()
        return _averaged(self.shortcut(inputs), self.branch(inputs), skip, branch)


class OrthogonalResidual(nn.Module):
    r"""Residual block that loses nothing: half skip, half branch, and a rotation of the two.

    .. math:: (u, v) \mapsto \big(\cos\theta\, u - \sin\theta\, g(v),\;
        \sin\theta\, u + \cos\theta\, g(v)\big), \qquad \operatorname{Lip}_2 =
        \max(1, \operatorname{Lip}_2(g))

    for the halves u, v of the channels. **Guaranteed**: the Jacobian is a rotation times
    :math:`\operatorname{diag}(I, J_g)`, so that its singular values are those of :math:`J_g`, and
    1: with an orthogonal branch the block keeps the norm of every input and gradient, for each
    :math:`\theta`. In the 1-norm and the maximum norm the rotation stretches by
    :math:`\lvert\cos\theta\rvert + \lvert\sin\theta\rvert`.

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`, on half of the channels, whose shape it keeps.
    angle : float
        :math:`\theta` at the beginning, in radians.
    device, dtype
        Of :math:`\theta`.

    Attributes
    ----------
    angle : torch.Tensor
        :math:`\theta`, a number.

    Raises
    ------
    TypeError
        If ``branch`` is no module.
    ValueError
        If ``angle`` is not finite; when called, if the number of channels is odd, or the branch
        changes the shape.

    Examples
    --------
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> block, x = OrthogonalResidual(OrthogonalLinear(4, 4, bias=False)), torch.randn(3, 8)
    >>> torch.allclose(block(x).norm(dim=1), x.norm(dim=1))
    True
    """

    def __init__(
        self, branch: nn.Module, angle: float = math.pi / 4, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check_branch("branch", branch)
        self.branch = branch
        self._start = _finite_angle(angle)
        self.angle = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the angle to that of the beginning; the branch stays."""
        nn.init.constant_(self.angle, self._start)

    def rotation(self) -> Tensor:
        """Matrix of the rotation, (2, 2)."""
        cosine, sine = self.angle.cos(), self.angle.sin()
        return torch.stack((cosine, -sine, sine, cosine)).view(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Rotate skip and branch, (batch, channels, ...) to the same."""
        first, second = _halves(inputs)
        return _rotated(first, self.branch(second), self.rotation())


class ConcatenatedResidual(nn.Module):
    r"""Residual block that puts the branch beside the skip: more channels, and nothing lost.

    .. math:: f(x) = \big(\cos\theta\; s(x),\; \sin\theta\; g(x)\big), \qquad
        \operatorname{Lip}_2(f) \le \sqrt{\cos^2\theta \operatorname{Lip}_2(s)^2
        + \sin^2\theta \operatorname{Lip}_2(g)^2}

    along the channels, with the identity for :math:`s` if none is given. The square of
    :math:`\lVert f(x) - f(y)\rVert` is the sum of those of the parts. **Guaranteed**: 1-Lipschitz
    in the 2-norm if branch and shortcut are, for each :math:`\theta`, up to the rounding of cosine
    and sine (6e-8 in float32); and since :math:`J_f^\top J_f = \cos^2\theta\, J_s^\top J_s +
    \sin^2\theta\, J_g^\top J_g`, the block keeps the norm of every input if both parts do. In the
    maximum norm the constant is the larger of :math:`\lvert\cos\theta\rvert \operatorname{Lip}(s)`
    and :math:`\lvert\sin\theta\rvert \operatorname{Lip}(g)`, in the 1-norm at most their sum, up to
    :math:`\sqrt2`. **Not guaranteed**: that gradients keep their norms: the outputs are more
    than the inputs.

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`, with any number of channels.
    shortcut : torch.nn.Module, optional
        :math:`s`, whose outputs have the sizes of those of the branch. With a stride
        :class:`~lipbook.pooling.InvertibleDownsampling`, which keeps norms.
    angle : float
        :math:`\theta` at the beginning, in radians.
    device, dtype
        Of :math:`\theta`.

    Attributes
    ----------
    angle : torch.Tensor
        :math:`\theta`, a number.

    Raises
    ------
    TypeError
        If ``branch`` or ``shortcut`` is no module.
    ValueError
        If ``angle`` is not finite; when called, if skip and branch differ in more than the number
        of channels.

    Examples
    --------
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> block, x = ConcatenatedResidual(OrthogonalLinear(4, 6, bias=False)), torch.randn(3, 4)
    >>> block(x).shape, torch.allclose(block(x).norm(dim=1), x.norm(dim=1))
    (torch.Size([3, 10]), True)
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        angle: float = math.pi / 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_branch("branch", branch)
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        _check_branch("shortcut", self.shortcut)
        self._start = _finite_angle(angle)
        self.angle = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the angle to that of the beginning; branch and shortcut stay."""
        nn.init.constant_(self.angle, self._start)

    def weights(self) -> tuple[Tensor, Tensor]:
        r"""Weights of skip and branch, :math:`\cos\theta` and :math:`\sin\theta`."""
        return self.angle.cos(), self.angle.sin()

    def forward(self, inputs: Tensor) -> Tensor:
        """Put skip and branch side by side, (batch, channels, ...)."""
        skip, branch = self.weights()
        return _beside(self.shortcut(inputs), self.branch(inputs), skip, branch)


class NormResidual(_Averaging):
    r"""Residual block that returns the root mean square of skip and branch, entry by entry.

    .. math:: f(x)_i = \sqrt{(1 - w)\, s(x)_i^2 + w\, g(x)_i^2 + \varepsilon},
        \qquad w = \frac{1}{1 + e^{-\theta}} \in (0, 1)

    with the identity for :math:`s` if none is given. **Why.** An entry is the Euclidean norm of
    :math:`(\sqrt{1 - w}\, s_i, \sqrt w\, g_i, \sqrt\varepsilon)`, which differs at two points by no
    more than its argument: :math:`\lvert\Delta f_i\rvert^2 \le (1 - w) \lvert\Delta s_i\rvert^2 +
    w \lvert\Delta g_i\rvert^2`. Sums and maxima of that give

    .. math:: \operatorname{Lip}_p(f) \le \begin{cases}
        \sqrt{(1 - w) \operatorname{Lip}_p(s)^2 + w \operatorname{Lip}_p(g)^2} & p = 2, \infty \\
        \sqrt{1 - w} \operatorname{Lip}_p(s) + \sqrt w \operatorname{Lip}_p(g) & p = 1 \end{cases}

    **Guaranteed**: 1-Lipschitz in the 2-norm and in the maximum norm if branch and shortcut are,
    for each :math:`\theta` and :math:`\varepsilon`, up to the rounding of the weights (6e-8 in
    float32); and with :math:`\varepsilon = 0` the block keeps the norm of every input that both
    keep, as :math:`\lVert f(x)\rVert^2 = (1 - w) \lVert s(x)\rVert^2 + w \lVert g(x)\rVert^2`. The
    bounds are attained, in the 1-norm by parts that move other entries. **Not guaranteed**: that
    gradients keep their norms. Signs are lost: no output is negative.

    Where skip and branch are both 0, and :math:`\varepsilon` too, there is no derivative, and 0 is
    taken; with :math:`\varepsilon > 0` all derivatives exist, and those at 0 vanish.

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`.
    shortcut : torch.nn.Module, optional
        :math:`s`, whose outputs have the shape of those of the branch.
    weight : float
        :math:`w` at the beginning, in (0, 1).
    eps : float
        :math:`\varepsilon \ge 0`.
    device, dtype
        Of :math:`\theta`.

    Attributes
    ----------
    logit : torch.Tensor
        :math:`\theta`, a number.

    Raises
    ------
    TypeError
        If ``branch`` or ``shortcut`` is no module.
    ValueError
        If ``weight`` is not in (0, 1), or ``eps`` negative or not finite; when called, if skip and
        branch differ in shape.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> block, x = NormResidual(OrthogonalLinear(4, 4, bias=False)), torch.randn(3, 4)
    >>> torch.allclose(block(x).norm(dim=1), x.norm(dim=1))
    True
    >>> round(lipschitz_bound(block, (4,)).value, 5)
    1.0
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        weight: float = 0.5,
        eps: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(branch, shortcut, weight, device, dtype)
        _real("eps", eps)
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {eps}")
        self.eps = float(eps)

    def extra_repr(self) -> str:
        """Show the argument that is no module."""
        return f"eps={self.eps:g}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Average the squares of skip and branch of a batch, and take roots."""
        skip, branch = self.weights()
        return _root_mean_square(self.shortcut(inputs), self.branch(inputs), skip, branch, self.eps)


def _logit_of(weight: float) -> float:
    _real("weight", weight)
    if not 0 < weight < 1:
        raise ValueError(f"weight must be in (0, 1), got {weight}")
    return math.log(weight) - math.log1p(-weight)


def _finite_angle(angle: float) -> float:
    _real("angle", angle)
    if not math.isfinite(angle):
        raise ValueError(f"angle must be finite, got {angle}")
    return float(angle)


def _halves(inputs: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.dim() < 2 or inputs.shape[1] % 2:
        raise ValueError(f"inputs must have an even number of channels, got {tuple(inputs.shape)}")
    first, second = inputs.chunk(2, 1)
    return first, second


def _rotated(first: Tensor, second: Tensor, rotation: Tensor) -> Tensor:
    if first.shape != second.shape:
        raise ValueError(
            f"branch must keep the shape {tuple(first.shape)} of half of the channels, got "
            f"{tuple(second.shape)}"
        )
    pairs = functional.linear(torch.stack((first, second), -1), rotation)
    return torch.cat(pairs.unbind(-1), 1)


torch.fx.wrap("_halves")
torch.fx.wrap("_rotated")


def _check_alike(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"branch must have outputs of the shape of the skip {tuple(first.shape)}, got "
            f"{tuple(second.shape)}: give a shortcut that changes the shape alike"
        )


def _averaged(first: Tensor, second: Tensor, skip: Tensor, branch: Tensor) -> Tensor:
    _check_alike(first, second)
    return skip * first + branch * second


@traced_as(
    lambda skip, branch, eps: _RootMeanSquare(skip, branch, eps),  # noqa: PLW0108 - it stands below
    inputs=2,
)
def _root_mean_square(
    first: Tensor, second: Tensor, skip: Tensor, branch: Tensor, eps: float
) -> Tensor:
    _check_alike(first, second)
    dtype = torch.promote_types(first.dtype, second.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    squares = skip * first.to(wide).square() + branch * second.to(wide).square() + eps
    positive = (squares.detach() > 0).to(wide)  # the root of 0 has no derivative
    return ((squares + (1 - positive)).sqrt() * positive).to(dtype)


def _beside(first: Tensor, second: Tensor, skip: Tensor, branch: Tensor) -> Tensor:
    if first.dim() < 2 or first.shape[:1] + first.shape[2:] != second.shape[:1] + second.shape[2:]:
        raise ValueError(
            "branch must have outputs that differ from those of the skip in their channels only, "
            f"{tuple(first.shape)}, got {tuple(second.shape)}: give a shortcut that changes the "
            "sizes alike"
        )
    return torch.cat((skip * first, branch * second), 1)


torch.fx.wrap("_averaged")
torch.fx.wrap("_root_mean_square")
torch.fx.wrap("_beside")


class _RootMeanSquare(Join):
    r"""Join :math:`\sqrt{a u^2 + b v^2 + \varepsilon}`, entry by entry, of two tensors u and v.

    Its factors are :math:`\sqrt a` and :math:`\sqrt b`: see :class:`NormResidual`. In the maximum
    norm, in which the parts of a stacked join count by the larger, they are both
    :math:`\sqrt{a + b}`.
    """

    stacked = True
    skip: Tensor
    branch: Tensor

    def __init__(self, skip: Tensor, branch: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("skip", skip.detach())
        self.register_buffer("branch", branch.detach())
        self.eps = eps

    def forward(self, *parts: Tensor) -> Tensor:
        """Average squares, and take roots."""
        return _root_mean_square(*parts, self.skip, self.branch, self.eps)

    def roots(self) -> tuple[Tensor, Tensor]:
        """Roots of the weights, in float64."""
        return self.skip.double().cpu().sqrt(), self.branch.double().cpu().sqrt()

    def factors(self, ranges: Sequence[Range] | None, p: float) -> list[Tensor]:
        """Roots of the weights, or of their sum."""
        first, second = self.roots()
        both = torch.hypot(first, second)
        return [root * _UP for root in ((both, both) if p == math.inf else (first, second))]

    def _length(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute the function in float64, whose squares neither vanish nor overflow."""
        u, v = (root * part for root, part in zip(self.roots(), (first, second), strict=True))
        return torch.hypot(torch.hypot(u, v), torch.tensor(self.eps, dtype=u.dtype).sqrt())

    def range(self, ranges: Sequence[Range]) -> Range:
        """Take lengths of the least and of the largest moduli; radii join as differences do."""
        first, second = ranges
        low, high = outward(
            self._length(_least_modulus(first), _least_modulus(second)),
            self._length(first.abs(), second.abs()),
        )
        low = low.clamp(min=0)
        if first.center is None or second.center is None:
            return Range(low, high)
        assert first.radius is not None
        assert second.radius is not None
        center = self._length(first.center, second.center)
        a, b = self.roots()
        radius = torch.hypot(a * first.radius, b * second.radius) * (1 + 2.0**-40)
        off = center.flatten(1).norm(dim=1) * 2.0**-45 + 2.0**-1000
        return Range(low, high, center, radius + off)

    def pullback(
        self, cotangent: tuple[Tensor, Tensor], ranges: Sequence[Range]
    ) -> list[tuple[Tensor, Tensor]]:
        """Multiply by the intervals of the slopes: Note [slopes of a root mean square]."""
        roots, eps = self.roots(), torch.tensor(self.eps, dtype=torch.float64).sqrt()
        found = []
        for own, other in ((0, 1), (1, 0)):
            low, high = roots[own] * ranges[own].low, roots[own] * ranges[own].high
            near, far = (
                torch.hypot(roots[other] * size, eps)
                for size in (_least_modulus(ranges[other]), ranges[other].abs())
            )
            least = _cosine(low, torch.where(low > 0, far, near), -1.0)
            most = _cosine(high, torch.where(high < 0, far, near), 1.0)
            least, most = outward(roots[own] * least, roots[own] * most)
            middle, half = (least + most) / 2, (most - least) / 2 * (1 + 2.0**-45)
            found.append(interval_product(cotangent, middle[:, None], half[:, None]))
        return found

    def errors(self, parts: Sequence[ForwardError], outputs: Tensor, p: float) -> ForwardError:
        """Join the errors of the parts, and round: Note [errors of a root mean square]."""
        factors = self.factors(None, p)

        def joined(values: Sequence[Any]) -> Tensor:
            each = [factor * value for factor, value in zip(factors, values, strict=True)]
            return torch.linalg.vector_norm(torch.stack(each), p, dim=0) * _UP

        info, wide = torch.finfo(outputs.dtype), _wide_info(outputs.dtype)
        gamma = _gamma(7, outputs.dtype)
        before = joined([part.error for part in parts])
        lipschitz = joined([part.lipschitz for part in parts]).item()
        stretch = joined([part.lipschitz + part.slope for part in parts]).item()
        size = _norms(outputs, p)
        lost = 7 * math.sqrt(wide.tiny) + 2 * _quantum(outputs.dtype)
        limits = [part.limit for part in parts]
        for part in parts:
            room = math.sqrt(wide.max) / 4 - _norms(part.outputs, p) - 2 * part.error
            limits.append(room / max(part.lipschitz + part.slope, 1e-300))
        limits.append((info.max / 4 - size - 2 * before) / max(stretch, 1e-300))
        rounding = gamma * ((1 + 4 * gamma) * size + 2 * before) + lost * _entries(outputs, p)
        return ForwardError(
            outputs,
            lipschitz,
            (before + rounding) * _UP,
            (joined([part.slope for part in parts]).item() + gamma * stretch) * _UP,
            functools.reduce(torch.minimum, limits),
        )

    def rounding(self, ranges: Sequence[Range], dtype: torch.dtype, p: float) -> Tensor:
        """Bound seven roundings, and squares that vanish or overflow."""
        info = torch.finfo(dtype)
        size = self.range(ranges).high
        for part in ranges:
            size = torch.where(part.abs() <= math.sqrt(info.max) / 4, size, math.inf)
        return rounded(size, 7, dtype, p, 1 / math.sqrt(info.tiny))


# Note [slopes of a root mean square]
# With t one of the two parts times the root of its weight, and r the length of all the rest, the
# slope by that part is the root of its weight times the cosine t / sqrt(t^2 + r^2). It grows with
# t, falls with r where t > 0 and grows with r where t < 0. So its least value is at the lower end
# of t, with the largest r if that is positive and with the least otherwise; its largest is the
# mirror image. Where both are 0 there is no derivative, and all cosines are limits.
#
# Note [errors of a root mean square]
# The weights are those that the program computed. A square, the cast of a weight, a product and two
# sums are rounded, five times, of which the root keeps half; it is rounded itself, and so may be
# its cast to half precision: gamma_7 of the output has one to spare. What underflows in the squares
# is a few least normal numbers, of which the root keeps the root. The parts are off by their errors
# e at x, and their computed values at v differ from those at x by 2 e + (L + c) D at most, by which
# the output may be larger.


def _least_modulus(values: Range) -> Tensor:
    return torch.maximum(values.low, -values.high).clamp(min=0)


def _cosine(t: Tensor, rest: Tensor, at_zero: float) -> Tensor:
    length = torch.hypot(t, rest)
    return torch.where(length > 0, t / length.clamp(min=2.0**-1000), at_zero)


def _wide_info(dtype: torch.dtype) -> torch.finfo:
    return torch.finfo(torch.promote_types(dtype, torch.float32))


@units_rule.register
def _(module: _RootMeanSquare, input_shape: Shape) -> Units:
    """Give pairs of units: (u, v) -> (sqrt(a u^2 + b v^2 + eps), 0) of scaled inputs."""
    n = math.prod(input_shape[1:])
    roots = torch.stack(module.roots()) * _UP
    before = roots.repeat_interleave(n).diag()
    behind = torch.eye(n, 2 * n, dtype=torch.float64)
    one = torch.ones(2 * n, dtype=torch.float64)
    return Units(-one, one, group=torch.arange(n).repeat(2), before=before, behind=behind)


# ------------------------------------------------------------------------- Lipschitz rules


@lipschitz_rule.register
def _(module: AverageResidual, input_shape: Shape, p: float) -> Bound:
    names = ("shortcut", "branch")
    parts = tuple(_branch_bound(getattr(module, n), input_shape, p, n) for n in names)
    shapes = {part.output_shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"branch and shortcut must agree on the shape, got {sorted(shapes)}")
    weights = [float(weight.detach()) for weight in module.weights()]
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True)) * _UP
    return Bound(value, "upper bound", p, parts=parts, output_shape=shapes.pop())


@lipschitz_rule.register
def _(module: OrthogonalResidual, input_shape: Shape, p: float) -> Bound:
    half = (input_shape[0] // 2, *input_shape[1:])
    part = _branch_bound(module.branch, half, p, "branch")
    if part.output_shape != half:
        raise ValueError(f"branch must keep the shape {half}, got {part.output_shape}")
    rotation = operator_norm(module.rotation().detach().double(), p).item()
    value = max(1.0, part.value) * rotation * _UP
    return Bound(value, "upper bound", p, parts=(part,), output_shape=input_shape)


@lipschitz_rule.register
def _(module: ConcatenatedResidual, input_shape: Shape, p: float) -> Bound:
    names = ("shortcut", "branch")
    parts = tuple(_branch_bound(getattr(module, n), input_shape, p, n) for n in names)
    first, second = (part.output_shape for part in parts)
    if first[1:] != second[1:]:
        raise ValueError(f"branch and shortcut must agree on the sizes, got {first} and {second}")
    weights = (abs(float(weight.detach())) for weight in module.weights())
    sizes = [w * part.value for w, part in zip(weights, parts, strict=True)]
    value = torch.linalg.vector_norm(torch.tensor(sizes, dtype=torch.float64), p).item() * _UP
    shape = (first[0] + second[0], *first[1:])
    return Bound(value, "upper bound", p, parts=parts, output_shape=shape)


@lipschitz_rule.register
def _(module: NormResidual, input_shape: Shape, p: float) -> Bound:
    names = ("shortcut", "branch")
    parts = tuple(_branch_bound(getattr(module, n), input_shape, p, n) for n in names)
    shapes = {part.output_shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"branch and shortcut must agree on the shape, got {sorted(shapes)}")
    roots = (math.sqrt(float(weight.detach())) for weight in module.weights())
    sizes = [root * part.value for root, part in zip(roots, parts, strict=True)]
    value = (sum(sizes) if p == 1 else math.hypot(*sizes)) * _UP
    return Bound(value, "upper bound", p, parts=parts, output_shape=shapes.pop())


CONTAINERS.update((AverageResidual, ConcatenatedResidual, NormResidual, OrthogonalResidual))


# Note [the bound of a potential step]
# p = 2: with r = ‖T^(-1/2) W‖², computed in float64 for the weights and scales at hand, the
# eigenvalues of the Jacobian lie in [1 - 2r, 1], so that max(1, 2r - 1) is a bound for any T: the
# proof above is checked and not trusted. Other p: 1 + ‖2 Wᵀ T⁻¹‖ ‖W‖, from the chain rule.


def _step_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    weight, scale = module.weight.detach().double(), module.scale().detach().double()
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    if p == 2:
        excess = _norm(module, weight / scale.sqrt(), input_shape, 2.0) ** 2
        return Bound(max(1.0, 2 * excess - 1), "upper bound", p)
    dual = math.inf if p == 1 else 1.0  # ‖Wᵀ‖ in the p-norm is ‖W‖ in the dual norm
    outer = _norm(module, 2 * weight / scale, input_shape, dual)
    return Bound(1 + outer * _norm(module, weight, input_shape, p), "upper bound", p)


def _norm(module: Any, weight: Tensor, input_shape: tuple[int, ...], p: float) -> float:
    if weight.dim() == 2:
        return operator_norm(weight, p).item()
    reach, mode = weight.shape[-1] // 2, module.padding_mode
    geometry: dict[str, Any] = {"stride": module.stride, "groups": module.groups}
    geometry |= {"padding": reach, "padding_mode": mode, "p": p}
    return convolution_norm_bound(weight, input_shape[1:], **geometry).item()


for _layer in (SLLLinear, CPLLinear, SLLConv2d, CPLConv2d):
    lipschitz_rule.register(_layer, _step_rule)


# Note [the bound of a sandwich]
# Whatever matrices M and N stand behind and before the activation, and for any positive s, the
# proof above with A = s^-1 Mᵀ / √2 and B = s N / √2 says that M D N has norm at most
# ‖(s^-1 Mᵀ, s N)‖² / 2. With s the diagonal of Ψ that is 1 up to rounding. In other norms,
# |M D N| <= |M| |N|, entry by entry.


def _sandwich_parts(module: Any) -> tuple[Tensor, Tensor]:
    """Compute (s^-1 Mᵀ, s N), whose squared norm is twice a bound, and |M| |N|, in float64."""
    outer, inner = (matrix.detach().double() for matrix in module.matrices())
    scale = module.scale().detach().double()[:, None]
    return torch.cat((outer.mT / scale, inner * scale), 1), outer.abs() @ inner.abs()


def _sandwich_rule(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
    whole, product = _sandwich_parts(module)
    if p == 2:
        return Bound(operator_norm(whole, p).item() ** 2 / 2 * _UP, "upper bound", p)
    slack = 1 + _gamma(len(whole) + 4, torch.float64)
    return Bound(operator_norm(product, p).item() * slack * _UP, "upper bound", p)


lipschitz_rule.register(SandwichLinear, _sandwich_rule)


@lipschitz_rule.register
def _(module: SandwichConv2d, input_shape: Shape, p: float) -> Bound:
    outer, inner = (kernel.detach().double() for kernel in module.kernels())
    scale = module.scale().detach().double()[:, None, None]
    size = list(outer.shape[2:])

    def norm(kernel: Tensor, q: float) -> float:
        geometry: dict[str, Any] = {"padding": "same", "padding_mode": "circular", "p": q}
        return convolution_norm_bound(kernel, size, **geometry).item()

    if p == 2:
        whole = torch.cat((outer / scale, inner * scale))
        return Bound(norm(whole, 2.0) ** 2 / 2 * _UP, "upper bound", p)
    return Bound(norm(outer, p) * norm(inner, dual_exponent(p)) * _UP, "upper bound", p)


# -------------------------------------------------------------------------- units

_SLOPES: dict[str, list[float]] = {"relu": [0.0, 1.0], "identity": [1.0, 1.0]}  # around a kink at 0


def _inside_sandwich(module: Any, before: Tensor, behind: Tensor, bias: Tensor) -> Units:
    """Give units that map z to the activation of z + b, between two matrices."""
    slopes = _SLOPES.get(module.activation)
    low, high = (torch.full_like(bias, end) for end in (slopes or [0.0, 1.0]))
    kinks = None
    if slopes is not None:
        kinks = Kinks(-bias[None], torch.stack((low, high)), torch.zeros_like(bias))
    return Units(low, high, before=before, behind=behind, kinks=kinks)


def _sandwich_units(module: Any, input_shape: Shape) -> Units:
    outer, inner = (matrix.detach().double().cpu() for matrix in module.matrices())
    rows = torch.eye(math.prod(input_shape[:-1]), dtype=torch.float64)  # one for each token
    bias = module.bias.detach().double().cpu().repeat(len(rows))
    return _inside_sandwich(module, torch.kron(rows, inner), torch.kron(rows, outer), bias)


units_rule.register(SandwichLinear, _sandwich_units)


@units_rule.register
def _(module: SandwichConv2d, input_shape: Shape) -> Units:
    outer, inner = (kernel.detach().double().cpu() for kernel in module.kernels())
    pixels = torch.eye(math.prod(input_shape), dtype=torch.float64).view(-1, *input_shape)
    hidden = _adjoint_in_frequencies(functional.pixel_unshuffle(pixels, module.stride), inner)
    units = torch.eye(hidden[0].numel(), dtype=torch.float64).view(-1, *hidden.shape[1:])
    behind = _in_frequencies(units, outer).flatten(1).mT
    bias = module.bias.detach().double().cpu()[:, None, None].expand(hidden.shape[1:])
    return _inside_sandwich(module, hidden.flatten(1).mT, behind, bias.flatten())


# ------------------------------------------------------------------- errors of programs


def _check_program(module: Any, example: Tensor, weight: Tensor) -> None:
    """Refuse programs whose rounding is not known."""
    if module.activation not in ("relu", "identity"):
        raise ValueError(f"the rounding of {module.activation} is not known: use 'relu'")
    if _is_half(weight.dtype) or _computing_dtype(example, weight) != weight.dtype:
        raise ValueError("half precision is not supported: use float32 or float64")


# Note [rounding of a potential step]
# With G = (2 / T)^(1/2) W and c = (2 / T)^(1/2) b the step is x - Gᵀ h, h = σ(G x + c), since ReLU
# and the identity commute with positive factors; and so do the relative errors of sums. By Note
# [partial sums] a hidden number is off by e <= gamma_{n+2} / 2 (|G||v| + |c| + |G v + c|), which σ
# does not increase. The factors 2 W / T of the second sum take three roundings and its products
# one, so that it is off by gamma_{m+8} / 2 (|Gᵀ||h| + |Gᵀ h|) for the h that it is given, which is
# within e of the exact one. The last sum is rounded once. With norms throughout,
#
#     e <= r ‖v‖ + gamma ‖c‖,  r = gamma_{n+2} / 2 (‖|G|‖ + ‖G‖),
#     ‖P(v) - f(v)‖ <= ‖Gᵀ‖ e + s (‖G‖‖v‖ + ‖c‖ + e) + u ‖v‖,
#     s = (1 + u) gamma_{m+8} / 2 (‖|Gᵀ|‖ + ‖Gᵀ‖) + u ‖Gᵀ‖.


def _moduli_norm(
    module: Any, root: Tensor, example: Tensor, norm: Callable[[float], float], p: float
) -> float:
    """Bound of ‖|G|‖, G dense or a convolution with the geometry of a step."""
    sums = _absolute_norm(norm, p) * _UP
    if p != 2:
        return sums
    if root.dim() == 2:
        return min(sums, matrix_of_moduli(root, p))
    inner, outer, reach = len(root), root.shape[1] * module.groups, root.shape[-1] // 2
    if reach > min(example.shape[2:]):  # which torch does not pad
        return sums
    layer = nn.Conv2d(
        outer, inner, root.shape[-1], module.stride, reach, groups=module.groups, bias=False,
        padding_mode=module.padding_mode,
    )  # fmt: skip
    return min(sums, convolution_of_moduli(layer, root, tuple(example.shape[1:])))


@_error_rule_of(SLLLinear, CPLLinear, SLLConv2d, CPLConv2d)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    weight, dtype = module.weight.detach(), module.weight.dtype
    _check_direct(weight)
    _check_program(module, example, weight)
    dense = weight.dim() == 2
    scale = 2 / module.scale().double()  # whose own rounding is one of those below
    geometry: dict[str, Any] = {}
    if not dense:
        padding = weight.shape[-1] // 2
        geometry = {"padding": padding, "padding_mode": module.padding_mode}
        geometry |= {"stride": module.stride, "groups": module.groups}

    def norm(matrix: Tensor, q: float) -> float:
        if dense:
            return rigorous_matrix_norm(matrix, q)
        return rigorous_convolution_norm(matrix, list(example.shape[2:]), p=q, **geometry)

    view = scale.view(-1, *[1] * (weight.dim() - 1))
    absolute = _absolute_norm(functools.partial(norm, weight), p)
    back = _absolute_norm(functools.partial(norm, view * weight.double()), dual_exponent(p)) * _UP
    root = view.sqrt() * weight.double()  # G
    there, here = norm(root, p) * _UP, norm(root, dual_exponent(p)) * _UP
    moduli = [
        _moduli_norm(module, root, example, functools.partial(norm, root), q)
        for q in (p, dual_exponent(p))
    ]
    lipschitz = max(1.0, there**2 * _UP - 1) if p == 2 else (1 + back * absolute) * _UP
    positions = example[0, ..., 0].numel() if dense else example[0, 0].numel() // module.stride**2
    bias_norm = _bias_norm(module.bias, dtype, positions, p)
    bias_root = _bias_norm(
        module.bias.detach().double() * scale.sqrt(), torch.float64, positions, p
    )
    rows, columns = weight[0].numel(), weight[:, 0].numel() // module.groups
    before, after = _gamma(rows + 2, dtype), _gamma(columns + 8, dtype)
    unit = _gamma(1, dtype)
    hidden_rate = before / 2 * (moduli[0] + there)
    last = after / 2 * (moduli[1] + here) * (1 + unit) + unit * here
    rate = (here * hidden_rate + last * (there + hidden_rate) + unit) * _UP
    constant = (here * before + last * (1 + before)) * bias_root * _UP
    largest = max(1.0, weight.abs().max().item(), scale.max().item()) ** 3

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        size = _norms(x, p)
        inside = size + back * (absolute * size + bias_norm)
        entries = _entries(outputs, p) * len(weight) * (rows + 3) * (columns + 3)
        underflow = 2 * torch.finfo(dtype).tiny * entries * largest
        slope = rate + underflow
        room = (torch.finfo(dtype).max / 4 - inside.clamp(min=back)) / (1 + back * absolute)
        hidden = torch.finfo(dtype).max / 4 - absolute * size - bias_norm  # W x + b
        return ForwardError(
            outputs,
            lipschitz,
            (rate * size + constant + underflow * (2 + size + bias_norm)) * _UP,
            slope * _UP,
            torch.minimum(room, hidden / max(absolute, 1e-300)),
        )

    return analysis


# Note [rounding of a sandwich]
# M and N are what the program multiplies by, as it computes them. With n inputs and m units a
# hidden number is off by gamma_{n+1} (|N||v| + |b|), which ReLU does not increase, and an output by
# gamma_{m+n+1} |M| (|N||v| + |b|). With L the largest of 1 and all entries, what is flushed (Note
# [constants of an analysis]) is 2 (n + 2) q (1 + L + |v|) in a hidden number, of which an output
# takes m times L, and 2 (m + 2) q (1 + L + |h|) there, with |h| <= 2 (n L |v| + |b|). In all it is
# at most 8 (m + 2) (n + 2) q L² (1 + |v| + |b|).


@_error_rule_of(SandwichLinear)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    outer, inner = (matrix.detach() for matrix in module.matrices())
    _check_program(module, example, outer)
    dtype, (units, inputs) = outer.dtype, inner.shape
    whole, product = _sandwich_parts(module)
    product = product * (1 + _gamma(units + 4, torch.float64))
    absolute = _absolute_norm(functools.partial(rigorous_matrix_norm, product), p)
    before = _absolute_norm(functools.partial(rigorous_matrix_norm, inner), p)
    lipschitz = rigorous_matrix_norm(whole, 2) ** 2 / 2 * _UP if p == 2 else absolute
    positions = example[0, ..., 0].numel()
    bias = module.bias.detach()
    behind = outer.double().abs() @ bias.double().abs() * (1 + _gamma(units + 4, torch.float64))
    bias_norm = _bias_norm(bias, dtype, positions, p)
    bias_behind = _bias_norm(behind, torch.float64, positions, p)  # of |M||b|
    gamma = _gamma(units + inputs + 2, dtype)
    largest = max(1.0, outer.abs().max().item(), inner.abs().max().item()) ** 2
    quantum = 8 * (units + 2) * (inputs + 2) * torch.finfo(dtype).tiny * largest

    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        size = _norms(x, p)
        inside = absolute * size + bias_behind  # ‖|M| (|N||x| + |b|)‖
        underflow = quantum * _entries(outputs, p)
        room = torch.finfo(dtype).max / 4 - inside
        hidden = torch.finfo(dtype).max / 4 - before * size - bias_norm
        return ForwardError(
            outputs,
            lipschitz,
            (gamma * inside + underflow * (1 + size + bias_norm)) * _UP,
            (gamma * absolute + underflow) * _UP,
            torch.minimum(room / max(absolute, 1e-300), hidden / max(before, 1e-300)),
        )

    return analysis


# ------------------------------------------------------------------------- frozen layers


class DenseStep(_DenseStep):
    r"""Frozen potential step, dense: what :class:`~lipbook.residual.SLLLinear` freezes to, or CPL.

    .. math:: f(x) = x - 2 W^\top T^{-1} \sigma(W x + b)

    with constants :math:`W, b, T`. **Guaranteed**: what the layer that it was made of guaranteed at
    that time. The Lipschitz rule computes the bound from the constants and does not trust them.

    Attributes
    ----------
    weight : torch.Tensor
        :math:`W`, (inner, features).
    bias : torch.Tensor
        :math:`b`, (inner,).
    diagonal : torch.Tensor
        That of :math:`T`, (inner,).

    Examples
    --------
    >>> from lipbook.freezing import freeze
    >>> layer = SLLLinear(8, 16)
    >>> step = freeze(layer)
    >>> type(step).__name__, torch.equal(step.diagonal, layer.scale())
    ('DenseStep', True)
    """

    diagonal: Tensor

    def scale(self) -> Tensor:
        """Diagonal of T, (inner,)."""
        return self.diagonal


class ConvolutionStep(_ConvolutionStep):
    r"""Frozen potential step, convolutional: :class:`DenseStep` with a convolution for W.

    ``weight`` is its kernel, (inner, c / groups, k, k).

    Examples
    --------
    >>> from lipbook.freezing import freeze
    >>> step, x = freeze(CPLConv2d(4, 8)), torch.randn(2, 4, 8, 8)
    >>> y = step(x)
    >>> bool((y[0] - y[1]).norm() <= (x[0] - x[1]).norm())
    True
    """

    diagonal: Tensor

    def scale(self) -> Tensor:
        """Diagonal of T, (inner,)."""
        return self.diagonal


_STEPS: dict[type[nn.Module], type[Any]] = {
    SLLLinear: DenseStep,
    CPLLinear: DenseStep,
    SLLConv2d: ConvolutionStep,
    CPLConv2d: ConvolutionStep,
}
for _plain in (DenseStep, ConvolutionStep):
    lipschitz_rule.register(_plain, lipschitz_rule.dispatch(SLLLinear))
    forward_error_rule.register(_plain, forward_error_rule.dispatch(SLLLinear))


def _freeze_step(module: Any) -> nn.Module:
    if any(computes_as(module, cls) for cls in _STEPS):
        module.register_buffer("diagonal", module.scale().clone())
        module.log_q = None
        module.__class__ = _STEPS[type(module)]
    return module


for _frozen in _STEPS:
    freeze_rule.register(_frozen, _freeze_step)


class SandwichStep(_Sandwich):
    r"""Frozen sandwich layer: what :class:`~lipbook.residual.SandwichLinear` freezes to.

    .. math:: f(x) = M \sigma(N x + b), \qquad M = \sqrt2 A^\top \Psi, \quad
        N = \sqrt2\, \Psi^{-1} B

    with constants :math:`M, N, b, \Psi`. **Guaranteed**: what the layer that it was made of
    guaranteed at that time. The Lipschitz rule computes the bound from the constants and does not
    trust them.

    Attributes
    ----------
    outer, inner : torch.Tensor
        :math:`M`, (out, inner), and :math:`N`, (inner, in).
    bias : torch.Tensor
        :math:`b`, (inner,).
    diagonal : torch.Tensor
        That of :math:`\Psi`, (inner,).

    Examples
    --------
    >>> from lipbook.freezing import freeze
    >>> step = freeze(SandwichLinear(8, 3, 16))
    >>> step
    SandwichStep(in_features=8, out_features=3, inner_features=16, activation='relu')
    >>> step.outer.shape, step.inner.shape
    (torch.Size([3, 16]), torch.Size([16, 8]))
    """

    outer: Tensor
    inner: Tensor
    diagonal: Tensor

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Matrices behind and before the activation, (out, inner) and (inner, in)."""
        return self.outer, self.inner

    def scale(self) -> Tensor:
        r"""Diagonal of :math:`\Psi`, (inner,)."""
        return self.diagonal


lipschitz_rule.register(SandwichStep, _sandwich_rule)
units_rule.register(SandwichStep, _sandwich_units)
forward_error_rule.register(SandwichStep, forward_error_rule.dispatch(SandwichLinear))


@freeze_rule.register
def _(module: SandwichLinear) -> nn.Module:
    if not computes_as(module, SandwichLinear):
        return module
    step: Any = module
    outer, inner = step.matrices()
    step.register_buffer("diagonal", step.scale().clone())
    del step.weight, step.log_scale, step.out_features
    step.outer, step.inner = (nn.Parameter(matrix, False) for matrix in (outer, inner))
    step.__class__ = SandwichStep
    return step
