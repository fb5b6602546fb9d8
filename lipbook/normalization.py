r"""Normalisation that keeps a constant: what is subtracted, and the one number that is divided by.

Normalising does two things. It *centers*, which costs nothing: to subtract a mean is an orthogonal
projection, or a translation. And it *scales*: with one scale a channel the constant is that of the
channel that varies least, and the layer stretches just where nothing happens. With one scale for
all the layer is a multiple of an isometry, whose constant is known and loses nothing.

===================  =============================  ===================================
layer                a sample, in evaluation mode   constant for p = 1, 2, ∞
===================  =============================  ===================================
``LayerCentering``   :math:`x - \bar x`             :math:`2 - 2/n`, 1, :math:`2 - 2/n`
``BatchCentering``   :math:`x - m + b`              1, 1, 1
``ScalarBatchNorm``  :math:`(x - m) / s + b`        :math:`1/s`, in each
``ScaleAndBias``     :math:`a x + b`                :math:`\lvert a\rvert`, in each
``Unscale``          :math:`s_1 \cdots s_k\, x`      :math:`s_1 \cdots s_k`, in each
===================  =============================  ===================================

Channels are dimension 1: (batch, channels, ...). Layer normalisation needs no layer of its own:
``torch.nn.LayerNorm(n, eps=1, elementwise_affine=False)`` has the constant
:math:`1/\sqrt\varepsilon = 1`, and so has ``torch.nn.RMSNorm``.

# Note [the batch in training]
In training mode the mean is that of the batch, so that an output depends on all samples, and no
constant from one sample to its output says what a change of it does. Of the whole batch X of N
samples the map is known: X -> X - mean is an orthogonal projection, of norm 1. A certificate is of
one sample, and is given in evaluation mode.

# Note [one scale commutes with orthogonal layers]
Let v = tr(Cov) / c be the variance of all channels, pooled. For an orthogonal Q of the channels
tr(Q Cov Q^T) = tr(Cov), so that without a bias
    ScalarBatchNorm(Q x) = Q ScalarBatchNorm(x):
it sees the size of what passes, and not its coordinates. The largest variance of a channel, or one
scale a channel, depend on the basis. And with a homogeneous activation phi and s > 0,
    phi(Q (x / s) + b) = phi(Q x + s b) / s,
so that scales move to the end of a chain, where they multiply all logits: a network with them is a
1-Lipschitz network with other biases, times a number. What they change is how it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn

from lipbook.composition import Bound, lipschitz_rule
from lipbook.errors import (
    Analysis,
    _Affine,
    _bias_norm,
    _check_single,
    _closed_form,
    _error_rule_of,
    _relative,
)
from lipbook.graphs.operations import traced_as
from lipbook.norms.arguments import _floating, _integer, _real
from lipbook.norms.rigorous import _UP
from lipbook.rules import Affine, Shape, _rule_of, affine_rule

__all__ = [
    "BatchCentering",
    "LayerCentering",
    "ScalarBatchNorm",
    "ScaleAndBias",
    "Unscale",
    "batch_mean",
    "layer_centering",
    "pooled_variance",
]

Dims = int | Sequence[int]


# ------------------------------------------------------------------------------- functions


@traced_as(lambda dim=1: LayerCentering(dim))
def layer_centering(x: Tensor, dim: Dims = 1) -> Tensor:
    r"""Subtract the mean of each sample over dimensions: an orthogonal projection.

    .. math:: x \mapsto C x, \qquad C = I - \tfrac1n 1 1^\top

    on each group of n entries that differ in ``dim`` only. **Guaranteed**: all singular values are
    1 but for one 0 a group, that of constant groups. The constant is 1 in the 2-norm and
    :math:`2 - 2/n` in the 1-norm and the maximum norm; it is 0 if n = 1.

    Parameters
    ----------
    x : torch.Tensor
        (batch, \*shape).
    dim : int or sequence of int
        What the mean is taken over.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of floating-point numbers.
    ValueError
        If ``x`` has no such dimension, or a dimension is that of the batch.

    Examples
    --------
    >>> layer_centering(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-2., -1.,  3.]])
    """
    _floating("x", x)
    dims = _dims(dim, x.dim())
    return x - x.mean(dims, keepdim=True)


def batch_mean(x: Tensor) -> Tensor:
    r"""Mean of each channel over the batch and all positions, and over all processes.

    .. math:: m_c = \frac1N \sum_{i, \text{pixels}} x_{i, c}

    If ``torch.distributed`` is initialised, the sums and their counts are added up over the
    processes, whose batches may differ in size, and so are gradients. All of them have to call it.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).

    Returns
    -------
    torch.Tensor
        (c,), in float32 at least.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of floating-point numbers.
    ValueError
        If ``x`` has no channels.

    Examples
    --------
    >>> batch_mean(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    tensor([ 2., 20.])
    """
    values, axes = _values(x)
    return _mean_over_processes(values.sum(axes), values.numel() // values.shape[1])


def pooled_variance(x: Tensor, mean: Tensor) -> Tensor:
    r"""Mean square distance of all entries from the mean of their channel: one number.

    .. math:: v = \frac{1}{N c} \sum_{i, c, \text{pixels}} (x_{i, c} - m_c)^2

    The mean of the variances of the channels. **Guaranteed**: it stays under an orthogonal map of
    the channels. Over all processes, as :func:`batch_mean`.

    Parameters
    ----------
    x : torch.Tensor
        (batch, c, \*size).
    mean : torch.Tensor
        :math:`m`, (c,).

    Returns
    -------
    torch.Tensor
        A number, in float32 at least.

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> pooled_variance(x, batch_mean(x))
    tensor(50.5000)
    """
    values, _ = _values(x)
    off = values - _per_channel("mean", mean, x)
    return _mean_over_processes(off.square().sum()[None], values.numel())[0]


def _dims(dim: Dims, count: int) -> list[int]:
    """Dimensions of a batch with ``count`` of them, from the front."""
    given = _given(dim)
    if any(not -count <= d < count for d in given):
        raise ValueError(f"x must have the dimensions dim={dim}, got {count} dimensions")
    return _given([d % count for d in given])


def _given(dim: Dims) -> list[int]:
    given = list(dim) if isinstance(dim, Sequence) else [dim]
    if not given or isinstance(dim, str) or not all(hasattr(d, "__index__") for d in given):
        raise TypeError(f"dim must be an integer, or some of them, got {dim!r}")
    if 0 in given:
        raise ValueError("dim must not be 0, that of the batch: its mean mixes samples")
    return [int(d) for d in given]


def _values(x: Tensor) -> tuple[Tensor, list[int]]:
    """Numbers to add up, in float32 at least, and the dimensions that are no channels."""
    _floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (batch, channels, ...), got {tuple(x.shape)}")
    return x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.dim())]


def _per_channel(name: str, values: Tensor, x: Tensor) -> Tensor:
    """Numbers of the channels, to broadcast with a batch."""
    _floating(name, values)
    if x.dim() < 2 or values.shape != x.shape[1:2]:
        raise ValueError(
            f"{name} must have one number for each channel of x, got shape {tuple(values.shape)} "
            f"for x of shape {tuple(x.shape)}"
        )
    return values.view(-1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, mean: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * scale + bias, in the dtype of x."""
    _floating("x", x)
    if mean is None and scale is not None and _is_plain(x, scale, bias):
        shift = None if bias is None else _per_channel("bias", bias, x)
        result: Tensor = _Scaled.apply(x, scale, shift)
        return result
    y = x if mean is None else x - _per_channel("mean", mean, x)
    y = y if scale is None else y * scale
    y = y if bias is None else y + _per_channel("bias", bias, x)
    return y.to(x.dtype)


# torch.fx records a call of these as one step, since their course depends on sizes.
torch.fx.wrap("layer_centering")
torch.fx.wrap("_affine")


# Note [one pass of a gradient]
# The derivative of a centring is the centring, and the gradient of its bias the sums that this
# needs: torch takes them twice. It also holds two new batches at once where one is enough, and new
# memory takes longer than the numbers in it. In the forward pass the functions below round as the
# steps do.

_PIECE = 2**16  # entries of a batch of products that is only summed, as many as a cache holds


def _is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the functions of autograd below apply: one dtype, and no program that is traced."""
    if x.dtype not in (torch.float32, torch.float64):
        return False
    same = all(other is None or other.dtype == x.dtype for other in others)
    return same and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _by_steps(steps: Callable[..., Any]) -> Any:
    """Rule of vmap for a function of autograd that adds in place: the steps that it takes."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        outputs = torch.vmap(steps, in_dims)(*arguments)
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0

    return staticmethod(vmap)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    y = x * scale
    return y if shift is None else y + shift


class _Scaled(torch.autograd.Function):
    vmap = _by_steps(_scaled)

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        y = x * scale
        return y if shift is None else y.add_(shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.shape = None if inputs[2] is None else inputs[2].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, scale = ctx.saved_tensors
        pieces = max(1, _PIECE // max(1, x[:1].numel()))
        pairs = zip(gradient.split(pieces), x.split(pieces), strict=True)
        along = torch.stack([(left * right).sum() for left, right in pairs]).sum()
        shift = None if ctx.shape is None else gradient.sum_to_size(ctx.shape)
        return gradient * scale, along, shift

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, turn: Tensor, shift: Tensor | None) -> Tensor:
        x, scale = ctx.saved_tensors
        return _scaled(tangent, scale, shift) + x * turn


def _centred(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    mean = batch_mean(x)
    y = x - _per_channel("mean", mean, x)
    return y if shift is None else y + shift, mean


class _Centred(torch.autograd.Function):
    vmap = _by_steps(_centred)

    @staticmethod
    def forward(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        y, mean = _centred(x, None)
        return y if shift is None else y.add_(shift), mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.shape = None if inputs[1] is None else inputs[1].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, Tensor | None]:
        sums = gradient.sum([0, *range(2, gradient.dim())]).view(-1, *[1] * (gradient.dim() - 2))
        centred = gradient - sums / (gradient.numel() // gradient.shape[1])
        return centred, None if ctx.shape is None else sums.view(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, shift: Tensor | None) -> tuple[Tensor, None]:
        return _centred(tangent, shift)[0], None


# ------------------------------------------------------------------------ several processes


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes, which all get; so are the gradients, since all outputs depend on it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(gradient)
        return total


def _several_processes() -> bool:
    initialised = distributed.is_available() and distributed.is_initialized()
    return initialised and distributed.get_world_size() > 1


def _mean_over_processes(sums: Tensor, count: int) -> Tensor:
    """Quotient of vectors of sums by their count, both added up over the processes."""
    if not _several_processes():
        return sums / count
    both = torch.cat((sums, sums.new_tensor([count])))
    total: Tensor = _SumOverProcesses.apply(both)
    return total[:-1] / total[-1]


# ---------------------------------------------------------------------------------- layers


class LayerCentering(nn.Module):
    r"""Subtraction of the mean of each sample over dimensions, an orthogonal projection.

    The module of :func:`layer_centering`. **Guaranteed**: 1-Lipschitz in the 2-norm.

    Parameters
    ----------
    dim : int or sequence of int
        Dimensions of a batch that the mean is taken over, not the first.

    Raises
    ------
    TypeError
        If ``dim`` is no integer and no sequence of integers.
    ValueError
        If ``dim`` holds 0; when called, as :func:`layer_centering`.

    Notes
    -----
    A bias of the layer before is lost where it is constant along ``dim``: put one behind
    (:class:`ScaleAndBias`).

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> [round(lipschitz_bound(LayerCentering(), (4,), p).value, 3) for p in (1, 2, math.inf)]
    [1.5, 1.0, 1.5]
    """

    def __init__(self, dim: Dims = 1) -> None:
        super().__init__()
        dims = _given(dim)
        self.dim = tuple(dims) if isinstance(dim, Sequence) else dims[0]

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        """Subtract means, the shape stays."""
        return layer_centering(x, self.dim)


class _BatchLayer(nn.Module):
    """Statistics of the batch in training, and their running means in evaluation mode."""

    _scales: ClassVar[bool]
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = int(_integer("num_features", num_features, 1))
        if momentum is not None:
            _real("momentum", momentum)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], or None, got {momentum}")
        self.momentum = momentum
        empty = torch.empty(self.num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(torch.empty_like(empty)) if bias else None)
        self.register_buffer("running_mean", empty)
        if self._scales:
            self.register_buffer("running_var", torch.empty_like(empty[0]))
        count = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set mean, bias and count to 0, and the variance to 1."""
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()
        if self._scales:
            self.running_var.fill_(1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"

    def _scale(self, variance: Tensor | None) -> Tensor | None:
        """Give the factor for a variance."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, (batch, c, *size) to the same."""
        mean, variance = self.running_mean, self.running_var if self._scales else None
        if not self.training:
            return _affine(x, mean, self._scale(variance), self.bias)
        _floating("x", x)
        y, plain = None, not (self._scales or _several_processes())
        if plain and _is_plain(x, self.bias) and x.shape[1:2] == mean.shape:
            shift = None if self.bias is None else _per_channel("bias", self.bias, x)
            y, mean = _Centred.apply(x, shift)
        else:
            mean = batch_mean(x)
        if x.numel() == x.shape[1] and not _several_processes():
            raise ValueError(
                "x must have more than one number a channel in training mode, of which the "
                f"mean is taken, got shape {tuple(x.shape)}"
            )
        if self._scales:
            variance = pooled_variance(x, mean)
        self._track(mean, variance)
        return _affine(x, mean, self._scale(variance), self.bias) if y is None else y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor | None) -> None:
        if mean.shape != self.running_mean.shape:
            raise ValueError(f"x must have {self.num_features} channels, got {len(mean)}")
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        if variance is not None:
            self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class BatchCentering(_BatchLayer):
    r"""Batch normalisation without its scale: subtracts the mean of each channel.

    .. math:: y = x - m + b

    with :math:`m` the mean of the batch in training (:func:`batch_mean`), and its running mean in
    evaluation mode. **Guaranteed**: in evaluation mode a translation, with constant 1 in every
    norm, and nothing is lost. In training mode an output depends on the whole batch, of which the
    map is an orthogonal projection, plus b; a bound from a sample to its output is refused.

    Under ``torch.distributed`` the mean is that of the batches of all processes, and the
    buffers agree. In evaluation mode no buffer is touched.

    Parameters
    ----------
    num_features : int
        Channels c.
    momentum : float, optional
        Weight of the newest batch in the running mean; ``None`` for the mean of all batches.
    bias : bool
        Whether to add a learnt number :math:`b` to each channel.
    device, dtype
        Of bias and buffers.

    Attributes
    ----------
    running_mean : torch.Tensor
        (c,).
    num_batches_tracked : torch.Tensor
        Number of batches seen.

    Raises
    ------
    ValueError
        If ``num_features`` is not positive or ``momentum`` not in [0, 1]; when called, if channels
        do not fit, or in training mode there is one number a channel, which is its own mean.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = BatchCentering(3)
    >>> bool(layer(torch.randn(8, 3) + 5).mean(0).abs().max() < 1e-5)
    True
    >>> lipschitz_bound(layer.eval(), (3,)).value
    1.0

    References
    ----------
    Batch normalisation: :cite:t:`ioffe2015`.
    """

    _scales = False


class ScalarBatchNorm(_BatchLayer):
    r"""Batch normalisation by one number for all channels: a multiple of a translation.

    .. math:: y = \frac{x - m}{s} + b, \qquad s = \sqrt{v + \varepsilon}

    with :math:`v` the variance of all channels, pooled (:func:`pooled_variance`): of the batch in
    training, the running one in evaluation mode. **Guaranteed**: in evaluation mode the constant is
    :math:`1/s` exactly, in every norm, and all singular values are :math:`1/s`. It may exceed 1: a
    network with it is Lipschitz with a constant that is known, and whose product its certificates
    divide by. In training mode a bound is refused, as for :class:`BatchCentering`.

    It commutes with orthogonal maps of the channels, but for b, and with homogeneous activations up
    to biases: it changes how a network trains, and not what it can be. Batch normalisation with a
    scale a channel has the constant of the channel that varies least.

    Parameters
    ----------
    num_features : int
        Channels c.
    eps : float
        :math:`\varepsilon > 0`: the constant is at most :math:`1/\sqrt\varepsilon`.
    momentum, bias, device, dtype
        As in :class:`BatchCentering`.

    Attributes
    ----------
    running_mean : torch.Tensor
        (c,).
    running_var : torch.Tensor
        A number.
    num_batches_tracked : torch.Tensor
        Number of batches seen.

    Raises
    ------
    ValueError
        If ``eps`` is not positive; otherwise as :class:`BatchCentering`.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer, x = ScalarBatchNorm(3, eps=0.01, momentum=None), 2 * torch.randn(1000, 3)
    >>> y = layer(x)
    >>> expected = (x.var(0, unbiased=False).mean() + 0.01).rsqrt().item()
    >>> abs(lipschitz_bound(layer.eval(), (3,)).value - expected) < 1e-5
    True

    References
    ----------
    Batch normalisation: :cite:t:`ioffe2015`.
    """

    _scales = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _real("eps", eps)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {eps}")
        super().__init__(num_features, momentum, bias, device, dtype)
        self.eps = float(eps)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{super().extra_repr()}, eps={self.eps:g}"

    def _scale(self, variance: Tensor | None) -> Tensor | None:
        return None if variance is None else (variance + self.eps).rsqrt()


class ScaleAndBias(nn.Module):
    r"""One learnt number for all entries, and one added to each channel.

    .. math:: y = a x + b

    **Guaranteed**: the constant is :math:`\lvert a\rvert` exactly, in every norm, whatever it has
    been trained to; :class:`~lipbook.orthogonal.Scale` holds it fixed.

    Parameters
    ----------
    num_features : int
        Channels.
    scale : float
        :math:`a` at the beginning.
    bias : bool
        Whether to learn :math:`b`, which begins at 0.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    weight : torch.Tensor
        :math:`a`, a number.
    bias : torch.Tensor or None
        :math:`b`, (channels,).

    Raises
    ------
    ValueError
        If ``num_features`` is not positive or ``scale`` not finite; when called, if channels do not
        fit.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> lipschitz_bound(ScaleAndBias(4, -0.5), (4, 3, 3)).value
    0.5
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        scale: float = 1.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = int(_integer("num_features", num_features, 1))
        _real("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        self._start = float(scale)
        self.weight = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        empty = torch.empty(self.num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both to what they begin with."""
        nn.init.constant_(self.weight, self._start)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift, (batch, c, *size) to the same."""
        return _affine(x, None, self.weight, self.bias)


class Unscale(nn.Module):
    r"""Multiplication by all that the batch normalisations before it divide by.

    .. math:: y = s_1 \cdots s_k\, x, \qquad s_i = \sqrt{v_i + \varepsilon_i}

    with the running variances of the layers :class:`ScalarBatchNorm` that it is given, which it
    shares with the network. At the end of a chain that is 1-Lipschitz without them, it makes it so
    with them: the constant of a network in evaluation mode is
    :math:`\prod 1/s_i \cdot \prod s_i = 1`, in whatever units the layers between work, and a margin
    of its outputs is a distance of its inputs. **Guaranteed**: the constant of the layer is
    :math:`\prod s_i` exactly, in every norm. **Not guaranteed**: a constant of 1 where a
    normalisation stands in one branch of several, whose constants do not multiply.

    In training mode the layers before it divide by the scale of the batch, and this one multiplies
    by the running one, which follows it. No gradient flows through it to the scales.

    Parameters
    ----------
    *norms : ScalarBatchNorm
        One or more layers, which are elsewhere in the network, too.

    Raises
    ------
    TypeError
        If ``norms`` holds anything but such layers.
    ValueError
        If there are none.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> norm = ScalarBatchNorm(8, momentum=None)
    >>> net = nn.Sequential(OrthogonalLinear(4, 8), norm, OrthogonalLinear(8, 2))
    >>> _ = net(0.01 * torch.randn(100, 4))
    >>> lipschitz_bound(net.eval(), (4,)).value > 50
    True
    >>> round(lipschitz_bound(net.append(Unscale(norm)), (4,)).value, 5)
    1.0
    """

    def __init__(self, *norms: ScalarBatchNorm) -> None:
        super().__init__()
        if not norms:
            raise ValueError("norms must hold one layer or more, got none")
        for norm in norms:
            if not isinstance(norm, ScalarBatchNorm):
                raise TypeError(f"norms must be ScalarBatchNorm layers, got {type(norm).__name__}")
        self.norms = nn.ModuleList(norms)

    def scale(self) -> Tensor:
        """Product of the running scales, a number."""
        norms: Any = self.norms
        return torch.stack([norm.running_var + norm.eps for norm in norms]).sqrt().prod()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, the shape stays."""
        return _affine(x, None, self.scale(), None)


# --------------------------------------------------------------------- Lipschitz constants


def _group(module: LayerCentering, input_shape: Shape) -> tuple[list[int], int]:
    """Dimensions of a batch that a mean is taken over, and how many numbers it is of."""
    dims = _dims(module.dim, len(input_shape) + 1)
    return dims, math.prod(input_shape[d - 1] for d in dims)


@lipschitz_rule.register
def _(module: LayerCentering, input_shape: Shape, p: float) -> Bound:
    _, n = _group(module, input_shape)
    return Bound(min(n - 1.0, 1.0) if p == 2 else 2 - 2 / n, "exact", p)


def _multiple(module: Any) -> float:
    """Give the number that differences are multiplied by, in float64."""
    if isinstance(module, _BatchLayer) and module.training:
        raise ValueError(
            "subtracts the mean of the batch in training mode, so that an output depends on all "
            "samples, and has no constant of one: call .eval()"
        )
    if isinstance(module, ScaleAndBias):
        return float(module.weight.detach())
    if isinstance(module, Unscale):
        norms: Any = module.norms
        return math.prod(math.sqrt(norm.running_var.double() + norm.eps) for norm in norms)
    scale = module._scale(module.running_var.double() if module._scales else None)
    return 1.0 if scale is None else float(scale)


@_rule_of(BatchCentering, ScalarBatchNorm, ScaleAndBias, Unscale)
def _(module: Any, input_shape: Shape, p: float) -> Bound:
    return Bound(abs(_multiple(module)), "exact", p)


# -------------------------------------------------------------------------------- matrices


@affine_rule.register
def _(module: LayerCentering, input_shape: Shape) -> Affine:
    dims, n = _group(module, input_shape)

    def total(v: Tensor) -> Tensor:
        return v.sum(dims, keepdim=True)

    return Affine(
        lambda v: v - total(v) / n,
        lambda v: (1 - 2 / n) * v + total(v) / n,
        lambda v: (1 - 2 / n) * v + total(v) / n**2,
        torch.zeros(input_shape, dtype=torch.float64),
        n + 2,
    )


@_rule_of(BatchCentering, ScalarBatchNorm, ScaleAndBias, Unscale, dispatch=affine_rule)
def _(module: Any, input_shape: Shape) -> Affine:
    a = _multiple(module)
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    return Affine(
        lambda v: a * v, lambda v: abs(a) * v, lambda v: a**2 * v, module(zero)[0].detach(), 8
    )


# ------------------------------------------------------------------- errors of programs


@_error_rule_of(LayerCentering)
def _(module: LayerCentering, example: Tensor, p: float) -> Analysis:
    """Each entry is a sum of n products, rounded n + 2 times on a path."""
    _check_single(example)
    _, n = _group(module, tuple(example.shape[1:]))
    norm, absolute = _closed_form(module, example, p), (2 - 2 / n) * _UP  # |C| for each p
    affine = _Affine(module, norm, absolute, 0.0, 1.0, n + 2)
    return lambda x: affine(x, p)


@_error_rule_of(BatchCentering, ScalarBatchNorm, ScaleAndBias)
def _(module: Any, example: Tensor, p: float) -> Analysis:
    """Two sums, a product, and the four roundings of the scale."""
    _check_own_dtype(module, example)
    a = abs(_multiple(module)) * _UP
    shift = torch.zeros(module.num_features, dtype=torch.float64)
    if module.bias is not None:
        shift = module.bias.detach().double().abs()
    if isinstance(module, _BatchLayer):
        shift = shift + a * module.running_mean.double().abs()
    bias_norm = _bias_norm(shift, torch.float64, example[0, 0].numel(), p)
    affine = _Affine(module, a, a, bias_norm, a, 8)
    return lambda x: affine(x, p)


@_error_rule_of(Unscale)
def _(module: Unscale, example: Tensor, p: float) -> Analysis:
    """Count a sum and a root for each scale, the product of all, and that with each entry."""
    _check_own_dtype(module, example)
    lipschitz = _closed_form(module, example, p)
    return lambda x: _relative(module, x, p, lipschitz, 4 * len(module.norms) + 1)


def _check_own_dtype(module: nn.Module, example: Tensor) -> None:
    _check_single(example)
    state = [*module.parameters(), *module.buffers()]
    dtypes = {each.dtype for each in state if each.is_floating_point()}
    if dtypes != {example.dtype}:
        raise ValueError(f"must run in the dtype of its parameters {dtypes}, got {example.dtype}")
