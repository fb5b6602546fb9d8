r"""Recurrent layers of torch, unrolled over a sequence of known length.

# Note [unrolled bounds]
# If every output block satisfies ||dh_t||_p <= sum_s m_ts ||dx_s||_p with numbers m_ts >= 0, then
# ||dh||_p = || (||dh_t||_p)_t ||_p <= || M (||dx_s||_p)_s ||_p <= ||M||_p ||dx||_p, since p-norms
# grow with nonnegative entries. Layers on top multiply such matrices, directions stack them. The
# maps are smooth, or have slopes in an interval (relu), and their domain is convex, so that bounds
# of derivatives along segments suffice. Row t follows from row t - 1:
#
# RNN. h_t = phi(z_t), z_t = W x_t + U h_(t-1) + b, with |phi'| <= a on the values of z_t:
#     m_t = a (||W|| e_t + ||U|| m_(t-1)).
# LSTM. c_t = f c_(t-1) + i g, h_t = o tanh(c_t), gates i, f, o = sigma(z), g = tanh(z):
#     dc_t = f dc_(t-1) + c_(t-1) f' dz_f + i g' dz_g + g i' dz_i,
#     dh_t = o tanh'(c_t) dc_t + tanh(c_t) o' dz_o.
# GRU. n = tanh(W_n x_t + b + r q), q = U_n h_(t-1) + b', h_t = (1 - z) n + z h_(t-1):
#     dh_t = (1 - z) n' (W_n dx_t + r U_n dh_(t-1) + q r' dz_r) + (h_(t-1) - n) z' dz_z
#            + z dh_(t-1).
#
# The factors are diagonal, and bounded over the values that gates and states take. Without a
# domain sigma is in [0, 1], sigma' in [0, 1/4], tanh in [-1, 1] and tanh' in [0, 1], so |c_t| grows
# by at most 1 a step from |c_0| and |h_t| <= max(1, |h_0|): LSTM and GRU are Lipschitz on all of
# space. Diagonal matrices D_k with entries in [-d_k, d_k] give
#     ||sum_k D_k W_k||_p <= ||sum_k d_k |W_k| ||_p,  for p = 2 also
#     sum_k d_k ||W_k||_2 and sqrt(sum_k d_k^2) ||(W_k)_k||_2 (Cauchy-Schwarz for each entry).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.errors import (
    _ELEMENTARY,
    RangeAnalysis,
    _check_single,
    _entrywise,
    _quantum,
    range_error_rule,
)
from lipbook.freezing import keep_kernels
from lipbook.norms import operator_norm
from lipbook.norms.rigorous import _gamma
from lipbook.rules import (
    Bound,
    Range,
    Shape,
    affine_rule,
    lipschitz_rule,
    local_lipschitz_rule,
    outward,
    range_rule,
)

__all__ = ["Recurrence", "SequenceOutput", "initial_states"]

_UP = 1 + 2.0**-40
Interval = tuple[Tensor, Tensor]

FrozenRNN = keep_kernels(nn.RNN)
FrozenGRU = keep_kernels(nn.GRU)
FrozenLSTM = keep_kernels(nn.LSTM)


class SequenceOutput(nn.Module):
    """One output of a recurrent layer on sequences (batch, time, features).

    Parameters
    ----------
    module : torch.nn.Module
        A layer with the interface of ``torch.nn.RNN``, with the batch first.
    part : str
        ``"outputs"``; ``"h"`` or ``"c"`` for the last states, (batch, layers · directions, hidden).
    initial : sequence of torch.Tensor
        Initial states, (layers · directions, 1, hidden), the same for each sample; none for zeros.
    """

    def __init__(self, module: nn.Module, part: str, initial: Sequence[Tensor]) -> None:
        super().__init__()
        self.module, self.part, self.count = module, part, len(initial)
        for k, state in enumerate(initial):
            self.register_buffer(f"initial_{k}", state)

    @property
    def batch_behind(self) -> bool:
        """Whether torch returns this output with its batch in dimension 1."""
        return self.part != "outputs"

    def initial(self) -> list[Tensor]:
        """Return the initial states."""
        return [getattr(self, f"initial_{k}") for k in range(self.count)]

    def extra_repr(self) -> str:
        """Name the output."""
        return self.part

    def forward(self, x: Tensor) -> Tensor:
        """Run a batch."""
        states = [state.expand(-1, len(x), -1).contiguous() for state in self.initial()]
        hidden = None if not states else states[0] if len(states) == 1 else tuple(states)
        outputs, last = self.module(x, hidden)
        if self.part == "outputs":
            return outputs
        chosen = last[self.part == "c"] if isinstance(last, tuple) else last
        return chosen.transpose(0, 1)


class Recurrence(SequenceOutput):
    r"""One output of a recurrent layer of torch on sequences.

    **Guaranteed** for sequences of the given length, in the p-norm of all entries: the norm of the
    T × T matrix of Note [unrolled bounds]. On a domain gates and states are bounded step by step,
    and a forget gate that stays below 1 shows.

    Parameters
    ----------
    module : torch.nn.RNN, torch.nn.LSTM or torch.nn.GRU
        The layer, with the batch first.
    part, initial
        As in :class:`SequenceOutput`.

    Examples
    --------
    >>> layer = Recurrence(nn.GRU(2, 3, batch_first=True), "outputs", ())
    >>> layer(torch.zeros(1, 5, 2)).shape
    torch.Size([1, 5, 3])
    """


# ----------------------------------------------------------------------------- the steps


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights of one direction of one layer, cut into gates."""

    inputs: list[Tensor]  # each (hidden, features)
    hidden: list[Tensor]
    bias_ih: Tensor
    bias_hh: Tensor


def _weights(module: Any, layer: int, direction: int) -> _Weights:
    suffix = f"l{layer}" + "_reverse" * direction
    gates = 4 if isinstance(module, nn.LSTM) else 3 if isinstance(module, nn.GRU) else 1

    def read(name: str) -> Tensor:
        return getattr(module, f"{name}_{suffix}").detach().double().cpu()

    w, u = read("weight_ih"), read("weight_hh")
    zero = torch.zeros(len(w), dtype=torch.float64)
    bias = (read("bias_ih"), read("bias_hh")) if module.bias else (zero, zero)
    return _Weights(list(w.chunk(gates)), list(u.chunk(gates)), *bias)


def _image(weight: Tensor, bias: Tensor, low: Tensor, high: Tensor) -> Interval:
    """Interval of W h + b."""
    middle, half = (low + high) / 2, (high - low) / 2 * _UP
    image, spread = middle @ weight.mT + bias, half @ weight.abs().mT
    size = torch.maximum(low.abs(), high.abs()) @ weight.abs().mT + bias.abs()
    return outward(image - spread, image + spread, size * (weight.shape[1] + 8) * 2.0**-50)


def _gated(gate: Interval, values: Interval) -> Interval:
    """Product of an interval of numbers >= 0 with another."""
    (least, most), (low, high) = gate, values
    return outward(
        torch.where(low < 0, most * low, least * low),
        torch.where(high > 0, most * high, least * high),
    )


def _sigmoid(z: Interval) -> Interval:
    low, high = outward(z[0].sigmoid(), z[1].sigmoid())
    return low.clamp(min=0), high.clamp(max=1)


def _tanh(z: Interval) -> Interval:
    low, high = outward(z[0].tanh(), z[1].tanh())
    return low.clamp(min=-1), high.clamp(max=1)


def _nearest(z: Interval) -> Tensor:
    return torch.maximum(z[0], -z[1]).clamp(min=0)


def _sigmoid_slope(z: Interval) -> Tensor:
    near = _nearest(z)
    return near.sigmoid() * (-near).sigmoid() * _UP


def _tanh_slope(z: Interval) -> Tensor:
    return _nearest(z).cosh().pow(-2) * _UP


def _size(values: Interval) -> Tensor:
    return torch.maximum(values[0].abs(), values[1].abs())


class _Mixed:
    """Bounds of ||sum_k D_k W_k||_p for diagonal matrices with entries of at most d_k."""

    def __init__(self, weights: Sequence[Tensor], p: float) -> None:
        self.weights, self.p = [w.abs() for w in weights], p
        self.each = torch.stack([operator_norm(w, p) for w in weights])
        self.all = operator_norm(torch.cat(list(weights)), 2)

    def __call__(self, *diagonals: Tensor) -> Tensor:
        """Bound for each sample, from the diagonals (batch, hidden)."""
        d = torch.stack([diagonal.amax(-1) for diagonal in diagonals], -1)  # (batch, k)
        if self.p == 2:
            apart = (d * self.each).sum(-1)
            return torch.minimum(apart, torch.linalg.vector_norm(d, dim=-1) * self.all) * _UP
        total: Any = sum(
            size[..., None, None] * w for size, w in zip(d.unbind(-1), self.weights, strict=True)
        )
        return torch.linalg.matrix_norm(total, self.p) * _UP


@dataclasses.dataclass
class _State:
    """Interval and row of the matrix of a hidden state, and of the cell of an LSTM."""

    h: Interval
    row: Tensor  # (batch, time)
    c: Interval
    cell_row: Tensor


# From the state, the interval of the input's share of z, or None for all numbers, and the rows of
# the blocks of the input, to the next state.
Step = Callable[[_State, Interval | None, list[Tensor]], _State]


def _plain_step(module: Any, w: _Weights, blocks: list[list[Tensor]], p: float) -> Step:
    entering = [operator_norm(block[0], p) for block in blocks]
    again = operator_norm(w.hidden[0], p)
    tanh = module.nonlinearity == "tanh"

    def step(state: _State, shares: Interval | None, rows: list[Tensor]) -> _State:
        z = _sum(shares, _image(w.hidden[0], w.bias_hh, *state.h)) if shares else None
        if z is None:
            everything = torch.full_like(state.h[0], math.inf)
            z = -everything, everything
        if tanh:
            h, slope = _tanh(z), _tanh_slope(z).amax(-1)
        else:
            h = z[0].clamp(min=0), z[1].clamp(min=0)
            slope = (z[1] > 0).double().amax(-1)
        row: Any = sum(n * r for n, r in zip(entering, rows, strict=True))
        row = slope[:, None] * (row + again * state.row) * _UP
        return _State(h, row, h, row)

    return step


def _sum(first: Interval, second: Interval) -> Interval:
    return outward(first[0] + second[0], first[1] + second[1])


def _gates(
    w: _Weights, shares: Interval | None, hidden: Interval, count: int
) -> list[tuple[Interval, Interval]]:
    """Intervals of the shares of input and hidden state in each gate."""
    pairs = []
    for k, (low, high) in enumerate(
        zip(hidden[0].chunk(count, -1), hidden[1].chunk(count, -1), strict=True)
    ):
        infinite = torch.full_like(low, math.inf)
        share = (-infinite, infinite)
        if shares is not None:
            share = shares[0].chunk(count, -1)[k], shares[1].chunk(count, -1)[k]
        pairs.append((share, (low, high)))
    return pairs


def _lstm_step(module: Any, w: _Weights, blocks: list[list[Tensor]], p: float) -> Step:
    parts = [[block[0], block[1], block[2]] for block in blocks]
    entering = [_Mixed(part, p) for part in parts]
    opening = [_Mixed([block[3]], p) for block in blocks]
    again, reopening = _Mixed(w.hidden[:3], p), _Mixed([w.hidden[3]], p)
    hidden_weight = torch.cat(w.hidden)

    def step(state: _State, shares: Interval | None, rows: list[Tensor]) -> _State:
        pairs = _gates(w, shares, _image(hidden_weight, w.bias_hh, *state.h), 4)
        zi, zf, zg, zo = (_sum(*pair) for pair in pairs)
        i, f, g, o = _sigmoid(zi), _sigmoid(zf), _tanh(zg), _sigmoid(zo)
        c = _sum(_gated(f, state.c), _gated(i, g))
        squashed = _tanh(c)
        h = _gated(o, squashed)
        h = h[0].clamp(min=-1), h[1].clamp(max=1)
        moved = (
            _size(g) * _sigmoid_slope(zi),
            _size(state.c) * _sigmoid_slope(zf),
            i[1] * _tanh_slope(zg),
        )
        new: Any = sum(m(*moved)[:, None] * r for m, r in zip(entering, rows, strict=True))
        new = new + again(*moved)[:, None] * state.row
        cell = (f[1].amax(-1)[:, None] * state.cell_row + new) * _UP
        opened = _size(squashed) * _sigmoid_slope(zo)
        row: Any = sum(m(opened)[:, None] * r for m, r in zip(opening, rows, strict=True))
        row = row + reopening(opened)[:, None] * state.row
        row = (row + (o[1] * _tanh_slope(c)).amax(-1)[:, None] * cell) * _UP
        return _State(h, row, c, cell)

    return step


def _gru_step(module: Any, w: _Weights, blocks: list[list[Tensor]], p: float) -> Step:
    entering = [_Mixed([block[0], block[1], block[2]], p) for block in blocks]
    again = _Mixed([w.hidden[0], w.hidden[1], w.hidden[2]], p)
    hidden_weight = torch.cat(w.hidden)

    def step(state: _State, shares: Interval | None, rows: list[Tensor]) -> _State:
        pairs = _gates(w, shares, _image(hidden_weight, w.bias_hh, *state.h), 3)
        zr, zz = _sum(*pairs[0]), _sum(*pairs[1])
        share, q = pairs[2]
        r, z = _sigmoid(zr), _sigmoid(zz)
        zn = _sum(share, _gated(r, q))
        n = _tanh(zn)
        kept = outward(1 - z[1], 1 - z[0])
        kept = kept[0].clamp(min=0), kept[1].clamp(max=1)
        h = _sum(_gated(kept, n), _gated(z, state.h))
        h = (  # an average of n and the state before
            torch.maximum(h[0], torch.minimum(n[0], state.h[0])),
            torch.minimum(h[1], torch.maximum(n[1], state.h[1])),
        )
        fresh = kept[1] * _tanh_slope(zn)
        apart = torch.maximum(state.h[1] - n[0], n[1] - state.h[0]) * _UP
        reset, update = fresh * _size(q) * _sigmoid_slope(zr), apart * _sigmoid_slope(zz)
        row: Any = sum(
            m(reset, update, fresh)[:, None] * v for m, v in zip(entering, rows, strict=True)
        )
        carried = again(reset, update, fresh * r[1]) + z[1].amax(-1)
        row = (row + carried[:, None] * state.row) * _UP
        return _State(h, row, h, row)

    return step


_STEPS: dict[type[nn.Module], Callable[..., Step]] = {
    nn.RNN: _plain_step,
    nn.LSTM: _lstm_step,
    nn.GRU: _gru_step,
}


# ------------------------------------------------------------------------- over a sequence


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One direction of one layer: what it reads, and its states, the first and one a step."""

    weights: _Weights
    inputs: Range | None
    states: list[_State]
    steps: list[int]


@dataclasses.dataclass(frozen=True)
class _Unrolled:
    """Matrix (batch, blocks, time) and interval of one output, and how it was found."""

    matrix: Tensor
    low: Tensor
    high: Tensor
    passes: list[_Pass]


def _unroll(layer: Recurrence, values: Range | None, input_shape: Shape, p: float) -> _Unrolled:
    """Follow intervals and rows of matrices through layers, directions and time."""
    module: Any = layer.module
    time = input_shape[0]
    batch = 1 if values is None else len(values.low)
    directions = 2 if module.bidirectional else 1
    inputs = values
    matrices = [torch.eye(time, dtype=torch.float64).expand(batch, time, time)]
    last: list[_State] = []
    passes: list[_Pass] = []
    sequences: list[list[_State]] = []
    for level in range(module.num_layers):
        sequences = []
        for direction in range(directions):
            w = _weights(module, level, direction)
            place = level * directions + direction
            states = [state[place].double().expand(batch, -1) for state in layer.initial()]
            zero = torch.zeros(batch, module.hidden_size, dtype=torch.float64)
            h0 = states[0] if states else zero
            c0 = states[1] if len(states) > 1 else zero
            none = torch.zeros(batch, time, dtype=torch.float64)
            state = _State((h0, h0), none, (c0, c0), none)
            per_gate = [gate.chunk(len(matrices), 1) for gate in w.inputs]
            blocks = [[gate[b] for gate in per_gate] for b in range(len(matrices))]
            kind = next(cls for cls in type(module).__mro__ if cls in _STEPS)
            step = _STEPS[kind](module, w, blocks, p)
            shares = None if inputs is None else _shares(w, inputs)
            steps = list(range(time) if direction == 0 else range(time - 1, -1, -1))
            seen: dict[int, _State] = {}
            passes.append(_Pass(w, inputs, [state], steps))
            for t in steps:
                share = None if shares is None else (shares[0][:, t], shares[1][:, t])
                state = step(state, share, [m[:, t] for m in matrices])
                seen[t] = state
                passes[-1].states.append(state)
            last.append(state)
            sequences.append([seen[t] for t in range(time)])
        matrices = [torch.stack([s.row for s in seq], 1) for seq in sequences]
        low, high = (
            torch.cat([torch.stack([s.h[end] for s in seq], 1) for seq in sequences], -1)
            for end in (0, 1)
        )
        bounded = bool((low.isfinite() & high.isfinite()).all())
        inputs = Range(low, high) if bounded else None
    if layer.part == "outputs":
        return _Unrolled(torch.cat(matrices, 1), low, high, passes)
    rows = [s.cell_row if layer.part == "c" else s.row for s in last]
    ends = [s.c if layer.part == "c" else s.h for s in last]
    low, high = (torch.stack([e[k] for e in ends], 1) for k in (0, 1))
    return _Unrolled(torch.stack(rows, 1), low, high, passes)


def _shares(w: _Weights, inputs: Range) -> Interval:
    """Interval of the input's share of all gates, (batch, time, gates · hidden)."""
    weight = torch.cat(w.inputs)
    linear = nn.Linear(weight.shape[1], len(weight), dtype=torch.float64)
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(w.bias_ih, False)
    affine = affine_rule(linear, inputs.shape)
    assert affine is not None
    image = affine.range(inputs)
    return image.low, image.high


def _norm(matrix: Tensor, p: float) -> Tensor:
    """Norm from above of matrices of numbers >= 0, however large; nan stands for 0 times inf."""
    matrix = matrix.nan_to_num(nan=math.inf, posinf=math.inf)
    largest = matrix.amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 2.0**400, largest, 1.0)  # so that squares do not overflow
    norm = torch.linalg.matrix_norm((matrix / scale).nan_to_num(nan=1.0), p)
    return norm * scale[..., 0, 0] * _UP


@lipschitz_rule.register
def _(module: Recurrence, input_shape: Shape, p: float) -> Bound:
    found = _unroll(module, None, input_shape, p)
    return Bound(_norm(found.matrix, p).max().item(), "upper bound", p)


@local_lipschitz_rule.register
def _(module: Recurrence, values: Range, p: float) -> Tensor:
    return _norm(_unroll(module, values, values.shape, p).matrix, p)


@range_rule.register
def _(module: Recurrence, values: Range) -> Range:
    found = _unroll(module, values, values.shape, 2.0)
    if values.center is None or values.radius is None:
        return Range(found.low, found.high)
    center = module(values.center.clone())
    radius = values.radius * _norm(found.matrix, 2.0) * _UP
    radius = radius + center.flatten(1).norm(dim=1) * 2.0**-36
    return Range(found.low, found.high, center, radius)


# ------------------------------------------------------------------- errors of programs

# Note [rounding of a step]
# Let x, h, c be off by dx, dh, dc, entry by entry; E = 64u (Note [elementary functions]). A share
# W x + U h + b + b' of n + m products is off by
#     dz = |W| dx + |U| dh + gamma_(n+m+8) (|W| |x| + |U| |h| + |b| + |b'|),
# with moduli of computed values. Slopes of tanh and relu are at most 1, of sigma 1/4, so gates are
# off by dz + 2u + E and dz / 4 + 6u + E. With gates in [0, 1] and |g|, |tanh| <= 1:
# LSTM. c' = f c + i g is off by dc (1 + df) + |c| df + di + dg + di dg + 8u (|c| + dc + 1), and
#       h' = o tanh(c') by do + dt + do dt + 8u with dt = dc' + E + 2u.
# GRU. The argument of n is off by that of W_n x + b, by dq (1 + dr) + |q| dr, and a sum; and
#       z~ h~ + (1 - z~) n~ - (z h + (1 - z) n) = (z~ - z)(h~ - n~) + z dh + (1 - z) dn, so that h'
#       is off by max(dh, dn) + dz (|h| + dh + 1 + dn) + 8u (|h| + dh + 1 + dn), in either form.


@dataclasses.dataclass(frozen=True)
class _Off:
    """Errors of a hidden state and of a cell, (batch, hidden)."""

    h: Tensor
    c: Tensor


def _step_error(
    module: nn.Module,
    w: _Weights,
    size: Tensor,
    off: Tensor,
    state: _State,
    lost: _Off,
    dtype: torch.dtype,
) -> _Off:
    """Errors after a step that reads inputs of moduli ``size``, off by ``off``."""
    u = torch.finfo(dtype).eps / 2
    count = len(w.inputs)
    terms = w.inputs[0].shape[1] + w.hidden[0].shape[1]
    gamma, tiny = _gamma(terms + 8, dtype), 4 * terms * _quantum(dtype)
    h = _size(state.h) + lost.h
    of_x, of_h = (torch.cat(part).abs() for part in (w.inputs, w.hidden))

    def share(weight: Tensor, bias: Tensor, values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        inside = values @ weight.mT + bias.abs()
        wrong = (error @ weight.mT + gamma * inside) * _UP + tiny * (1 + values.amax())
        return inside, torch.where(inside < torch.finfo(dtype).max / 8, wrong, math.inf)

    near, entering = share(of_x, w.bias_ih, size, off)
    far, again = share(of_h, w.bias_hh, h, lost.h)
    dz = [a + b for a, b in zip(entering.chunk(count, -1), again.chunk(count, -1), strict=True)]
    curved, gate = (_ELEMENTARY + 2) * u, (_ELEMENTARY + 6) * u
    if isinstance(module, nn.LSTM):
        di, df, do = (dz[k] / 4 + gate for k in (0, 1, 3))
        dg = dz[2] + curved
        c = _size(state.c)
        dc = lost.c * (1 + df) + c * df + di + dg + di * dg + 8 * u * (c + lost.c + 1)
        dt = dc + curved
        return _Off((do + dt + do * dt + 8 * u) * _UP, dc * _UP)
    if isinstance(module, nn.GRU):
        dr, du = dz[0] / 4 + gate, dz[1] / 4 + gate
        q, dq = far.chunk(count, -1)[2], again.chunk(count, -1)[2]
        dn = entering.chunk(count, -1)[2] + dq * (1 + dr) + q * dr + curved
        dn = dn + 8 * u * (near.chunk(count, -1)[2] + q + dq)
        whole = _size(state.h) + lost.h + 1 + dn
        dh = torch.maximum(lost.h, dn) + du * whole + 8 * u * whole
        return _Off(dh * _UP, dh * _UP)
    dh = (dz[0] + (curved if module.nonlinearity == "tanh" else 0.0)) * _UP
    return _Off(dh, dh)


@range_error_rule.register
def _(module: Recurrence, example: Tensor, p: float) -> RangeAnalysis:
    """Bound of Note [rounding of a step], through layers, directions and time."""
    _check_single(example)
    net: Any = module.module
    dtype = net.weight_ih_l0.dtype
    if example.dtype != dtype:
        raise ValueError(f"must run in the dtype of its weights {dtype}, got {example.dtype}")
    directions = 2 if net.bidirectional else 1
    twin = Recurrence(net, module.part, [state.double() for state in module.initial()])

    def analysis(values: Range) -> Tensor:
        found = _unroll(twin, values, values.shape, p)
        wrong = torch.zeros_like(values.low)
        last: list[_Off] = []
        for level in range(net.num_layers):
            sequences = []
            for one in found.passes[level * directions : (level + 1) * directions]:
                if one.inputs is None:
                    return torch.full_like(values.low.flatten(1)[:, 0], math.inf)
                size = one.inputs.abs() + wrong
                zero = torch.zeros_like(one.states[0].h[0])
                off, seen = _Off(zero, zero), {}
                for state, t in zip(one.states, one.steps, strict=False):
                    off = _step_error(net, one.weights, size[:, t], wrong[:, t], state, off, dtype)
                    seen[t] = off
                last.append(off)
                sequences.append(torch.stack([seen[t].h for t in sorted(seen)], 1))
            wrong = torch.cat(sequences, -1)
        if module.part == "outputs":
            return _entrywise(wrong, p)
        return _entrywise(torch.stack([s.c if module.part == "c" else s.h for s in last], 1), p)

    return analysis


# -------------------------------------------------------------------------------- calls


def initial_states(
    x: Any, initial: Any, batch_first: bool, tracked: Callable[[Any], bool]
) -> list[Tensor]:
    """Check the arguments of a call and return its initial states, (layers, 1, hidden).

    Raises
    ------
    TypeError, ValueError
        For packed sequences, a batch that is not dimension 0, and initial states that depend on
        the input or the sample.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"takes a tensor whose length is known, got {type(x).__name__}")
    if x.dim() != 3 or not batch_first:
        raise ValueError(
            "must have the batch in dimension 0, or samples follow each other in time: use "
            f"batch_first=True and inputs (batch, time, features), got {x.dim()} dimensions and "
            f"batch_first={batch_first}"
        )
    states: list[Tensor] = []
    if initial is not None:
        states = list(initial) if isinstance(initial, (tuple, list)) else [initial]
    if any(tracked(state) for state in states) or not tracked(x):
        raise TypeError("has an initial state that depends on the input of the network")
    if not all(bool((state == state[:, :1]).all()) for state in states):
        raise ValueError("the initial state must be the same for each sample of the batch")
    return [state[:, :1].detach().clone() for state in states]


def recurrent_call(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,
    tracked: Callable[[Any], bool],
) -> list[tuple[Tensor, nn.Module, tuple[Any, ...]]]:
    """One call as layers that read the same input: the outputs and the last states.

    Raises
    ------
    TypeError, ValueError
        For packed sequences, a batch that is not dimension 0, projections, dropout in training
        mode, and initial states that depend on the input or the sample.
    """
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x = given["input"]
    states = initial_states(x, given.get("hx"), module.batch_first, tracked)
    if module.proj_size > 0:
        raise TypeError(f"projects its states (proj_size={module.proj_size}): no bound is known")
    if module.training and module.dropout > 0 and module.num_layers > 1:
        raise ValueError("drops states at random in training mode: call .eval()")
    used = zip(module._flat_weights, module._flat_weights_names, strict=True)
    if not all(torch.equal(weight, getattr(module, name)) for weight, name in used):
        raise ValueError("runs with other weights than it holds: call .flatten_parameters()")
    sequence, last = outputs
    parts = {"outputs": sequence}
    parts |= {"h": last[0], "c": last[1]} if isinstance(last, tuple) else {"h": last}
    return [(tensor, Recurrence(module, part, states), (x,)) for part, tensor in parts.items()]
