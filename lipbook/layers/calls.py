"""Calls of torch modules with several inputs or outputs, as layers with one output each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["CALLS"]

# For each class: from the module, its arguments and its outputs to (output, layer, inputs).
CALLS: dict[
    type[nn.Module],
    Callable[
        [Any, tuple[Any, ...], dict[str, Any], Any], list[tuple[Tensor, nn.Module, tuple[Any, ...]]]
    ],
] = {}
