"""Layers with constrained weights: what they share with torch's plain layers.

A module that torch has parametrized cannot be pickled, takes no :class:`torch.nn.Parameter` as its
weight, and lets a weight of another shape in. The constrained layers mend that here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Constrained", "raw_parameters"]


def raw_parameters(layer: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    """Raw parameters that a weight is computed from, or the weight itself if it is plain."""
    if not parametrize.is_parametrized(layer, name):
        return [cast(nn.Parameter, getattr(layer, name))]
    stack = cast(nn.ModuleDict, layer.parametrizations)[name]
    return list(stack.parameters(recurse=False))


class Constrained(nn.Module):
    """Layer with constrained weights, which copies, files and moves do not tell from a plain one.

    **Guaranteed**: raw parameters are contiguous, whatever they were assigned or loaded from. The
    layer can be pickled: its class is the plain one below the class that torch generates for a
    parametrized module, and that is generated again when the pickle is read.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute; a weight through its constraint, from a parameter too."""
        if isinstance(value, Tensor) and parametrize.is_parametrized(self, name):
            shapes = [tuple(raw.shape) for raw in raw_parameters(self, name)]
            if len(shapes) == 1 and value.shape != shapes[0]:
                raise ValueError(f"{name} must have shape {shapes[0]}, got {tuple(value.shape)}")
            value = value.detach()
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Take apart for a pickle or a shallow copy."""
        if not parametrize.is_parametrized(self):
            return super().__reduce_ex__(protocol)
        names = tuple(cast(nn.ModuleDict, self.parametrizations))
        state = {key: value for key, value in vars(self).items() if key != "_compiled_call_impl"}
        return _blank, (type(self).__mro__[1], names), state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, value in state_dict.items():  # which assign=True puts in the place of parameters
            if key.startswith(f"{prefix}parametrizations.") and isinstance(value, Tensor):
                state_dict[key] = value.contiguous()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A memory format is that of images and kernels, and raw parameters are neither.
        if not parametrize.is_parametrized(self):
            return super()._apply(fn, recurse)

        def apply(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten()).view(tensor.shape) if tensor.dim() > 3 else fn(tensor)

        return super()._apply(apply, recurse)


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Layer without state, of the class that torch generates for these parametrized names."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(layer, name, nn.Identity())
    return layer
