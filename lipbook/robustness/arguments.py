r"""Models and loaders, as certificates and attacks take them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.norms.arguments import _got

__all__ = ["Batches", "check_mode", "check_tensors", "pairs"]

Batches = Iterable[tuple[Tensor, Tensor]]

# Note [modes]
# An attack on a network in training mode attacks a random function and moves the statistics of its
# batch norms. But a wrapper around a network in evaluation mode is in training mode until somebody
# says otherwise, and does no harm: only modules whose code reads ``training`` are refused.


def check_mode(model: nn.Module) -> None:
    """Refuse a module in training mode if it is one of those to which that matters."""
    for path, module in model.named_modules():
        if not module.training or hasattr(module, "_orig_mod"):  # a compiled one has its module
            continue
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(map(_reads_mode, (module, *hooks))):
            kind = type(module).__name__
            name = f"{path!r} ({kind})" if path else kind
            raise ValueError(f"model must be in evaluation mode, but {name} is not: call .eval()")


def _reads_mode(thing: object) -> bool:
    """Whether the code of a module or a hook names the attribute ``training``."""
    if isinstance(thing, torch.jit.ScriptModule):
        return True  # whose code is not to be seen
    mro = type(thing).__mro__
    own = mro[: mro.index(nn.Module)] if nn.Module in mro else mro[:-1]
    values = [thing, *(value for cls in own for value in vars(cls).values())]
    codes = [getattr(inspect.unwrap(v), "__code__", None) for v in values if callable(v)]
    return any(code is not None and "training" in code.co_names for code in codes)


def pairs(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader; refuse what is none, with what to do."""
    expected = "loader must yield pairs (inputs, labels) of tensors"
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"{expected}, got {type(loader).__name__}: pass [(inputs, labels)]")
    if isinstance(loader, tuple) and any(isinstance(part, Tensor) for part in loader):
        raise TypeError(f"{expected}, got one such pair: pass [(inputs, labels)]")
    empty = True
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = type(batch).__name__
            got = f"a {what} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {what}"
            raise TypeError(f"{expected}, got {got}")
        inputs, labels = batch
        check_tensors(inputs, labels)
        yield inputs, labels
        empty = False
    if empty:
        raise ValueError("loader must yield one batch at least, got none")


def check_tensors(inputs: Any, labels: Any) -> None:
    """Refuse what is no batch of inputs with as many integers."""
    for name, tensor in (("inputs", inputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_got(tensor)}")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs must be a floating-point tensor, got {inputs.dtype}: call .float(), "
            "and divide by 255 if they are pixels"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: call .long()")
    if inputs.dim() < 2 or not len(inputs) or labels.shape != inputs.shape[:1]:
        raise ValueError(
            "inputs and labels must have shapes (batch, *shape) and (batch,), batch ≥ 1, got "
            f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        )
