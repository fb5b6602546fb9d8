"""Calls of torch modules with several inputs or outputs, as layers with one output each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lipbook.layers.attention import multihead_call
from lipbook.layers.bilinear import bilinear_call
from lipbook.layers.recurrence import recurrent_call

__all__ = ["CALLS"]

# For each class: from the module, its arguments, its outputs and whether a tensor depends on the
# input of the network, to (output, layer, inputs). Outputs that are not named are not followed.
CALLS: dict[
    type[nn.Module],
    Callable[
        [Any, tuple[Any, ...], dict[str, Any], Any, Callable[[Any], bool]],
        list[tuple[Tensor, nn.Module, tuple[Any, ...]]],
    ],
] = {
    nn.MultiheadAttention: multihead_call,
    nn.Bilinear: bilinear_call,
    nn.RNN: recurrent_call,
    nn.LSTM: recurrent_call,
    nn.GRU: recurrent_call,
}
