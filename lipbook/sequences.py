r"""Layers for sequences that keep norms over any length: lossless recurrence, causal convolutions.

# Note [a lossless recurrence keeps norms]
# Let Q be a matrix with orthonormal columns and phi an activation whose Jacobians are orthogonal.
# One step (h_(t+1), y_t) = phi(Q (h_t, x_t) + b) has the Jacobian D Q with D orthogonal, so that
#     ||dh_(t+1)||^2 + ||dy_t||^2 = ||dh_t||^2 + ||dx_t||^2.
# Summed over t, ||dh_t||^2 cancels but for the first and the last:
#     ||dh_T||^2 + sum_t ||dy_t||^2 = ||dh_0||^2 + sum_t ||dx_t||^2.
# The map from (h_0, x_0, ..., x_(T-1)) to (y_0, ..., y_(T-1), h_T) has a Jacobian with orthonormal
# columns wherever it has one, at every length. What reads a part of its outputs, or fixes h_0, is
# 1-Lipschitz. With orthonormal rows in place of columns (fewer outputs than inputs) the same holds
# of the transposed Jacobian, hence of gradients, and <= of the map.
#
# In the p-norm of all entries, with c = ||Q||_p and an activation that is nonexpansive, a step
# multiplies ||h||^p + ||x||^p by at most c^p. Let m = max(1, c). Induction over t shows
#     ||h_T||^p + sum_t ||y_t||^p <= c^p m^(p (T-1)) (||h_0||^p + sum_t ||x_t||^p),
# which is how the bound is found from the weights as they are: at most 1 + 1e-6 a step in float32.
# Outputs of one layer are the inputs of the next, and the inequality is used again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lipbook.activations import GroupSort, group_sort
from lipbook.convolutions import OrthogonalConv1d
from lipbook.errors import (
    Analysis,
    ForwardError,
    _absolute_norm,
    _bias_norm,
    _check_single,
    _entries,
    _norms,
    forward_error_rule,
)
from lipbook.layers.calls import CALLS
from lipbook.layers.recurrence import SequenceOutput, initial_states
from lipbook.norms import operator_norm
from lipbook.norms.arguments import _floating, _integer
from lipbook.norms.rigorous import _UP, _gamma, rigorous_matrix_norm
from lipbook.orthogonal import OrthogonalLinear
from lipbook.orthogonal.layers import Method
from lipbook.rules import Bound, Range, Shape, affine_rule, lipschitz_rule, range_rule

__all__ = ["CausalOrthogonalConv1d", "LosslessRNN", "lossless_recurrence"]


def lossless_recurrence(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None = None, group_size: int = 2
) -> tuple[Tensor, Tensor]:
    r"""Recurrence whose steps are jointly orthogonal, so that nothing is lost and nothing grows.

    .. math:: (h_{t+1}, y_t) = \operatorname{GroupSort}\big(Q\,(h_t, x_t) + b\big)

    **Guaranteed** if :math:`Q` has orthonormal columns, for any two inputs on one linear piece,
    and to first order everywhere but on a null set, at every length T:

    .. math::
        \lVert\Delta h_T\rVert^2 + \sum_t \lVert\Delta y_t\rVert^2
        = \lVert\Delta h_0\rVert^2 + \sum_t \lVert\Delta x_t\rVert^2,

    and :math:`\le` for all inputs. With orthonormal rows the same equation holds of gradients.

    Parameters
    ----------
    x : torch.Tensor
        Inputs, (time, batch, input size).
    h : torch.Tensor
        First state :math:`h_0`, (batch, hidden size).
    weight : torch.Tensor
        :math:`Q`, (hidden size + output size, hidden size + input size). It is taken as it is.
    bias : torch.Tensor, optional
        :math:`b`, (hidden size + output size,).
    group_size : int
        Of the sort, a divisor of hidden size + output size; 2 is MaxMin.

    Returns
    -------
    tuple of torch.Tensor
        Outputs, (time, batch, output size), and the last state, (batch, hidden size).

    Raises
    ------
    TypeError
        If an argument is no tensor of floating-point numbers.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> from lipbook.orthogonal import qr
    >>> x, h, Q = torch.randn(1000, 1, 2), torch.randn(1, 6), qr(torch.randn(8, 8))
    >>> y, last = lossless_recurrence(x, h, Q)
    >>> after, before = torch.cat([y.flatten(), last[0]]), torch.cat([x.flatten(), h[0]])
    >>> torch.allclose(after.norm(), before.norm())
    True
    """
    for name, value in (("x", x), ("h", h), ("weight", weight)):
        _floating(name, value)
    if x.dim() != 3 or h.dim() != 2 or x.shape[1] != len(h) or not len(x):
        raise ValueError(
            "x must have shape (time, batch, input size) with time >= 1 and h (batch, hidden "
            f"size), got {tuple(x.shape)} and {tuple(h.shape)}"
        )
    hidden = h.shape[1]
    if weight.dim() != 2 or weight.shape[1] != hidden + x.shape[2] or len(weight) <= hidden:
        raise ValueError(
            f"weight must have {hidden} + {x.shape[2]} columns, of state and input, and more than "
            f"{hidden} rows, got {tuple(weight.shape)}"
        )
    steps = _steps(_shares(x, weight, bias, hidden).unbind(), h, weight, group_size)
    return torch.stack([z[:, hidden:] for z in steps]), steps[-1][:, :hidden]


def _shares(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: int) -> Tensor:
    """Share of the inputs in Q (h, x) + b, of all steps at once."""
    return functional.linear(x, weight[:, hidden:], bias)


def _steps(shares: Sequence[Tensor], h: Tensor, weight: Tensor, group_size: int) -> list[Tensor]:
    """All (h_(t+1), y_t). Batches may get smaller: the last samples have ended."""
    hidden = h.shape[1]
    again, steps = weight[:, :hidden].mT, []
    for share in shares:
        z = group_sort(torch.addmm(share, h[: share.shape[0]], again), group_size)
        h = z[:, :hidden]
        steps.append(z)
    return steps


class LosslessRNN(nn.Module):
    r"""Recurrent layer that keeps norms at every length, with the interface of ``torch.nn.RNN``.

    :func:`lossless_recurrence` with an orthonormal :math:`Q`, one for each layer; the outputs of a
    layer are the inputs of the next.

    **Guaranteed**, in training and evaluation: from the whole sequence, and the first state, to
    all outputs and the last state the layer is 1-Lipschitz, at every length, up to rounding of
    the weights (at most 1e-6 a step in float32). If no layer has fewer outputs than inputs, its
    Jacobian has orthonormal columns, so that norms are kept; if none has more, orthonormal rows, so
    that those of gradients are, and gradients neither explode nor vanish. Read the last state, or
    any output, and the network is 1-Lipschitz in the sequence.

    Parameters
    ----------
    input_size, hidden_size : int
        Entries of an input and of a state.
    num_layers : int
        Layers on top of one another.
    bias : bool
        Whether to add a learnt bias in each step.
    batch_first : bool
        Whether sequences are (batch, time, size) and not (time, batch, size). Bounds want it.
    output_size : int, optional
        Entries of an output; ``input_size`` if not given, and then Q is square.
    group_size : int
        Of the sort, a divisor of ``hidden_size + output_size``; 2 is MaxMin.
    method : str
        How Q is made orthonormal, see :class:`~lipbook.orthogonal.OrthogonalLinear`.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    cells : torch.nn.Module
        List of one :class:`~lipbook.orthogonal.OrthogonalLinear` a layer, on (state, input).

    Raises
    ------
    ValueError
        If a size is not positive or ``group_size`` does not divide; when called, if the input or
        the state does not fit, or a sequence is empty.

    Notes
    -----
    The outputs are what leaves the state, and not the state: reading both, as a classifier may
    with ``output`` and ``h_n``, keeps everything. A state that forgets nothing has nothing to
    give to the outputs; training decides how fast it leaves.

    Examples
    --------
    Gradients of a sequence of a thousand inputs have the norm of what is handed back:

    >>> layer = LosslessRNN(2, 6)
    >>> x = torch.randn(1000, 1, 2, requires_grad=True)
    >>> h = torch.randn(1, 1, 6, requires_grad=True)
    >>> output, last = layer(x, h)
    >>> handed = torch.randn_like(output), torch.randn_like(last)
    >>> gradients = torch.autograd.grad((output, last), (x, h), handed)
    >>> norms = [sum(t.square().sum() for t in parts).sqrt() for parts in (gradients, handed)]
    >>> torch.allclose(*norms, rtol=1e-4)
    True

    References
    ----------
    Orthogonal and unitary recurrence keeps norms of the state without inputs:
    :cite:t:`arjovsky2016unitary`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        output_size: int | None = None,
        group_size: int = 2,
        method: Method = "qr",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = _integer("input_size", input_size, 1)
        self.hidden_size = _integer("hidden_size", hidden_size, 1)
        self.num_layers = _integer("num_layers", num_layers, 1)
        size = self.input_size if output_size is None else output_size
        self.output_size = _integer("output_size", size, 1)
        self.batch_first = batch_first
        rows = self.hidden_size + self.output_size
        self.group_size = _integer("group_size", group_size, 1)
        if rows % group_size:
            raise ValueError(
                f"group_size must divide hidden_size + output_size = {rows}, got {group_size}"
            )
        columns = [self.hidden_size + size for size in self._inputs()]
        self.cells = nn.ModuleList(
            OrthogonalLinear(count, rows, bias, method, device=device, dtype=dtype)
            for count in columns
        )

    def _inputs(self) -> list[int]:
        """Entries of an input of each layer."""
        return [self.input_size] + [self.output_size] * (self.num_layers - 1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"{self.input_size}, {self.hidden_size}, output_size={self.output_size}, "
            f"num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"group_size={self.group_size}"
        )

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        r"""Run over a sequence.

        Parameters
        ----------
        input : torch.Tensor or torch.nn.utils.rnn.PackedSequence
            (time, batch, input size), or (batch, time, input size) with ``batch_first``, or one
            sequence (time, input size); or sequences of several lengths, packed.
        hx : torch.Tensor, optional
            First states, (layers, batch, hidden size), without ``batch`` for one sequence; zeros
            if not given.

        Returns
        -------
        tuple
            Outputs, as the input is laid out, and the last states, (layers, batch, hidden size):
            of a packed sequence those at its own end.
        """
        if isinstance(input, PackedSequence):
            batches = input.batch_sizes.tolist()
            states = self._states(input.data, hx, batches[0], input.sorted_indices)
            data, last = self._run(input.data, states, batches)
            if input.unsorted_indices is not None:
                last = last.index_select(1, input.unsorted_indices)
            return input._replace(data=data), last
        single = input.dim() == 2
        time = 1 if self.batch_first and not single else 0
        if input.dim() not in (2, 3) or input.shape[time] == 0:
            raise ValueError(
                "input must be one sequence (time, size) or several in three dimensions, of at "
                f"least one step, got shape {tuple(input.shape)}"
            )
        x = input.unsqueeze(1) if single else input.transpose(0, time)
        given = hx.unsqueeze(1) if single and hx is not None else hx
        y, last = self._run(x, self._states(x, given, x.shape[1], None))
        if single:
            return y.squeeze(1), last.squeeze(1)
        return y.transpose(0, time), last

    def _states(self, x: Tensor, hx: Tensor | None, batch: int, order: Tensor | None) -> Tensor:
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} entries a step, got {x.shape[-1]}")
        shape = (self.num_layers, batch, self.hidden_size)
        if hx is None:
            return x.new_zeros(shape)
        if tuple(hx.shape) != shape:
            raise ValueError(
                f"hx must have shape (layers, batch, hidden size) = {shape}, got {tuple(hx.shape)}"
            )
        return (hx if order is None else hx.index_select(1, order)).contiguous()  # for its bits

    def _run(
        self, x: Tensor, states: Tensor, batches: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs of the last layer, laid out as the inputs, and last states of all."""
        last, outputs = [], x
        for steps, outputs in self._walk(x, states, batches):  # noqa: B007 - the last are used
            if batches is None:
                last.append(steps[-1][:, : self.hidden_size])
                continue
            # sequences that end at a step are the last ones of its batch
            ends = zip(steps, [*batches[1:], 0], strict=True)
            last.append(torch.cat([z[n:, : self.hidden_size] for z, n in ends][::-1]))
        return outputs, torch.stack(last)

    def _walk(
        self, x: Tensor, states: Tensor, batches: Sequence[int] | None = None
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Of each layer all (h_(t+1), y_t), and the y_t laid out as the inputs are."""
        hidden = self.hidden_size
        for cell, h in zip(cast(Iterable[OrthogonalLinear], self.cells), states, strict=True):
            weight = cell.weight
            shares = _shares(x, weight, cell.bias, hidden)
            parts = shares.unbind() if batches is None else shares.split(list(batches))
            steps = _steps(parts, h, weight, self.group_size)
            outputs = [z[:, hidden:] for z in steps]
            x = torch.stack(outputs) if batches is None else torch.cat(outputs)
            yield steps, x


class CausalOrthogonalConv1d(nn.Sequential):
    r"""Causal convolution of a sequence with an orthogonal kernel: zeros before, none after.

    .. math:: y_t = \sum_{j=0}^{k-1} K_j\, x_{t - jd} + b, \qquad x_s = 0 \text{ for } s < 0

    with d the dilation. Output t does not depend on inputs after t.

    **Guaranteed**: 1-Lipschitz in the 2-norm at every length. On sequences without end the
    convolution is orthogonal; cut at length T, what would still come out of it is lost: for
    c_out ≥ c_in and without a bias,

    .. math:: \sum_{t < T} \lVert y_t\rVert^2 + \sum_{t = T}^{T + (k-1)d - 1} \lVert y_t\rVert^2
        = \sum_{t < T} \lVert x_t\rVert^2 ,

    so that norms are kept of all inputs that end with (k-1)d zeros. More is impossible: a block
    triangular Toeplitz matrix with orthonormal columns is block diagonal, so that a causal
    convolution that keeps all norms at a finite length has one tap.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, dilation, groups, bias, device, dtype
        As in :class:`torch.nn.Conv1d`.
    rank : int, optional
        As in :class:`~lipbook.convolutions.OrthogonalConv1d`.

    Raises
    ------
    ValueError
        As :class:`~lipbook.convolutions.OrthogonalConv1d`.

    Examples
    --------
    >>> layer = CausalOrthogonalConv1d(4, 4, 3, dilation=2, bias=False)
    >>> x = torch.randn(2, 4, 50)
    >>> x[:, :, -4:] = 0
    >>> torch.allclose(layer(x).norm(), x.norm())
    True
    >>> torch.equal(layer(x)[:, :, :30], layer(x[:, :, :30]))
    True

    References
    ----------
    :cite:t:`li2019preventing`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
    ) -> None:
        before = (_integer("kernel_size", kernel_size, 1) - 1) * _integer("dilation", dilation, 1)
        convolution = OrthogonalConv1d(
            in_channels, out_channels, kernel_size, 1, 0, dilation, groups, bias, "zeros",
            device, dtype, rank=rank,
        )  # fmt: skip
        super().__init__(nn.ZeroPad1d((before, 0)), convolution)


# ----------------------------------------------------------------------------- the answers


class _Lossless(SequenceOutput):
    """One output of a :class:`LosslessRNN` on sequences (batch, time, size)."""

    module: LosslessRNN


def _power(norms: Sequence[float], time: int) -> float:
    """Bound of Note [a lossless recurrence keeps norms] through all layers."""
    logarithms = [math.log(c) + (time - 1) * math.log(max(1.0, c)) for c in norms]
    total = math.fsum(logarithms)
    return math.exp(total) * _UP if total < 700 else math.inf


def _weights(module: LosslessRNN) -> list[Tensor]:
    return [cast(OrthogonalLinear, cell).weight.detach() for cell in module.cells]


@lipschitz_rule.register
def _(module: _Lossless, input_shape: Shape, p: float) -> Bound:
    norms = [operator_norm(w.double(), p).item() for w in _weights(module.module)]
    return Bound(_power(norms, input_shape[0]), "upper bound", p)


@range_rule.register
def _(module: _Lossless, values: Range) -> Range:
    """Follow intervals through layers and time; of the ball, its radius."""
    net = module.module
    batch, time = len(values.low), values.shape[0]
    low, high = values.low, values.high
    ends = []
    sort = GroupSort(net.group_size)
    for k, cell in enumerate(net.cells):
        h = torch.zeros(batch, net.hidden_size, dtype=torch.float64)
        if module.count:
            h = module.initial()[0][k].double().expand(batch, -1)
        states, outputs = Range(h, h), []
        linear = _doubled(cell)
        affine = affine_rule(linear, (linear.in_features,))
        assert affine is not None
        for t in range(time):
            image = affine.range(
                Range(
                    torch.cat([states.low, low[:, t]], 1), torch.cat([states.high, high[:, t]], 1)
                )
            )
            ordered = Range(sort(image.low), sort(image.high))
            states = Range(ordered.low[:, : net.hidden_size], ordered.high[:, : net.hidden_size])
            outputs.append(ordered)
        low = torch.stack([z.low[:, net.hidden_size :] for z in outputs], 1)
        high = torch.stack([z.high[:, net.hidden_size :] for z in outputs], 1)
        ends.append(states)
    if module.part != "outputs":
        low, high = (torch.stack([getattr(s, side) for s in ends], 1) for side in ("low", "high"))
    if values.center is None or values.radius is None:
        return Range(low, high)
    center = module(values.center.clone())
    radius = values.radius * lipschitz_rule(module, values.shape, 2.0).value * _UP
    return Range(low, high, center, radius + center.flatten(1).norm(dim=1) * 2.0**-36)


def _doubled(cell: Any) -> nn.Linear:
    linear = nn.Linear(cell.in_features, cell.out_features, cell.bias is not None)
    linear.weight = nn.Parameter(cell.weight.detach().double(), False)
    if cell.bias is not None:
        linear.bias = nn.Parameter(cell.bias.detach().double(), False)
    return linear


# Note [rounding of a lossless recurrence]
# A step computes Q s + b for s = (h_t, x_t) as the program has it, n products and a bias in two
# sums: n + 1 roundings on a path, so that it is off by delta_t = gamma_(n+2) (|| |Q| || ||s|| +
# ||b||) and what is flushed; the sort rounds nothing. Replacing the exact steps by those of the
# program one at a time changes all outputs together by at most C delta_t, C the Lipschitz constant
# of what follows. So the program is off by e = C sum_t delta_t, over all layers.
#
# At another input v, D away, the states of the program differ from those at x by at most
# C D + e + e(v). With K = C gamma || |Q| || summed over layers and steps,
#     e(v) <= e + K (C D + e + e(v)),   e(v) <= (e (1 + K) + K C D) / (1 - K).


@forward_error_rule.register
def _(module: _Lossless, example: Tensor, p: float) -> Analysis:
    _check_single(example)
    net, time = module.module, example.shape[1]
    weights = _weights(net)
    dtype = weights[0].dtype
    if example.dtype != dtype:
        raise ValueError(f"must run in the dtype of its weights {dtype}, got {example.dtype}")
    norms = [rigorous_matrix_norm(w, p) for w in weights]
    whole = _power([max(1.0, c) for c in norms], time)
    absolute = [_absolute_norm(functools.partial(rigorous_matrix_norm, w), p) for w in weights]
    biases = [_bias_norm(cell.bias, dtype, 1, p) for cell in net.cells]  # type: ignore[arg-type]
    gammas = [_gamma(w.shape[1] + 2, dtype) for w in weights]
    share = whole * sum(g * a for g, a in zip(gammas, absolute, strict=True)) * time * _UP
    lipschitz = _power(norms, time)

    @torch.no_grad()
    def analysis(x: Tensor) -> ForwardError:
        outputs = module(x)
        error = torch.zeros(len(x), dtype=torch.float64)
        largest = torch.zeros(len(x), dtype=torch.float64)
        if module.count:
            states = module.initial()[0].expand(-1, len(x), -1)
        else:
            states = x.new_zeros(net.num_layers, len(x), net.hidden_size)
        inputs = x.transpose(0, 1)
        for k, (steps, given) in enumerate(net._walk(inputs, states)):
            tiny = 2 * (weights[k].shape[1] + 3) * torch.finfo(dtype).tiny * _entries(steps[0], p)
            top = weights[k].abs().max().item()
            before = [states[k], *(z[:, : net.hidden_size] for z in steps[:-1])]
            for state, entry in zip(before, inputs, strict=True):
                size = _norms(torch.cat([state, entry], 1), p)
                inside = absolute[k] * size + biases[k]
                error = error + gammas[k] * inside + tiny * (1 + top + size)
                largest = torch.maximum(largest, inside)
            inputs = given
        if share >= 0.5:
            raise ValueError(
                f"has no bound of its rounding errors for p = {p:g} in {dtype} at {time} steps: "
                "use p = 2, shorter sequences, or model.double() on inputs.double()"
            )
        error = (whole * error * (1 + share) / (1 - share)) * _UP
        room = torch.finfo(dtype).max / 8 - largest - 2 * max(absolute) * error
        return ForwardError(
            outputs,
            lipschitz,
            error,
            share * whole / (1 - share) * _UP,
            room / (2 * max(absolute) * whole),
        )

    return analysis


def _lossless_call(
    module: LosslessRNN,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,
    tracked: Callable[[Any], bool],
) -> list[tuple[Tensor, nn.Module, tuple[Any, ...]]]:
    """One call as two layers that read the same input."""
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x = given["input"]
    states = initial_states(x, given.get("hx"), module.batch_first, tracked)
    parts = {"outputs": outputs[0], "h": outputs[1]}
    return [(tensor, _Lossless(module, part, states), (x,)) for part, tensor in parts.items()]


CALLS[LosslessRNN] = _lossless_call
