"""Tracing: a network runs once, and what it calls is written down.

# Note [running and watching]
Torch shows every function, method and operator that is called to a mode
(``torch.overrides.TorchFunctionMode``). So a network is traced by running a copy of it on a batch
of two samples: Python's own control flow on shapes simply happens, layers with a rule are written
down whole, and a decision that depends on values (``if x.sum() > 0``, ``x.item()``) is seen when
it is made and refused. ``torch.fx`` would stop at ``len(x)`` and at every test of a shape. The
graph is then run against the network on other inputs and another size of batch, bit by bit.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from lipbook.freezing import thawed
from lipbook.graphs.graph import Graph, Node
from lipbook.graphs.operations import MOVING, Call, handler_of, moving
from lipbook.layers.calls import CALLS
from lipbook.layers.rearrangements import Constant
from lipbook.rules import (
    CONTAINERS,
    LEAVES,
    Shape,
    _check,
    _located,
    _plain_copy,
    _shape,
)

__all__ = ["opened", "trace", "unwrapped"]

_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

# What asks a tensor for its values, so that the program could depend on them.
_LOOKING = frozenset(
    [
        "bool",
        "item",
        "tolist",
        "numpy",
        "float",
        "int",
        "index",
        "complex",
        "nonzero",
        "unique",
        "argwhere",
        "is_nonzero",
        "equal",
        "allclose",
        "contains",
        "any",
        "all",
    ]
)
# What tells only of shapes, dtypes and devices.
_TELLING = frozenset(
    [
        "shape",
        "size",
        "dim",
        "ndim",
        "len",
        "dtype",
        "device",
        "numel",
        "is_cuda",
        "requires_grad",
        "grad_fn",
        "is_floating_point",
        "layout",
        "stride",
        "storage_offset",
        "is_contiguous",
        "element_size",
        "nelement",
        "ndimension",
        "get_device",
        "is_complex",
        "names",
        "is_leaf",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "is_nested",
        "grad",
        "hash",
        "repr",
        "format",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "has_names",
        "is_same_size",
        "is_inference",
        "is_mps",
        "is_xpu",
        "is_cpu",
        "version",
    ]
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Open what wraps a model: compilation, several devices, averages of weights."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def trace(module: nn.Module, input_shape: Shape, *, output: str | int | None = None) -> Graph:
    r"""Read the graph of a network off its own forward.

    Every call of a layer that has a Lipschitz rule, and every function, method and operator of
    torch on the way from the input to the output, becomes a node. Containers and modules of the
    reader's own are traced through. The module is not changed: a copy runs, with parametrized
    weights at their present values.

    **Guaranteed**: the graph and the module agree bit by bit on random inputs of two sizes of
    batch, or it is refused. Decisions that depend on the values of tensors are refused.

    Parameters
    ----------
    module : torch.nn.Module
        The network. Wrappers (DDP, DataParallel, ``torch.compile``, ``AveragedModel``) are opened.
    input_shape : sequence of int
        Shape of one sample.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Graph

    Raises
    ------
    TypeError
        If an operation is not known.
    ValueError
        If the program depends on the values of the input, mixes samples, or returns no tensor.

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(3, 3)
    ...     def forward(self, x):
    ...         return torch.relu(x + self.linear(x))
    >>> [node.name for node in trace(Block(), (3,)).nodes]
    ['input', 'linear Linear', 'Add', 'ReLU']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    shape = _shape(input_shape)
    with torch.inference_mode(False), torch.no_grad():
        return _Trace(unwrapped(module), shape, output).graph()


def known_layer(module: nn.Module) -> bool:
    """Whether a module has a rule, so that it is written down whole."""
    if isinstance(module, tuple(CONTAINERS)):
        return False
    kinds = set(type(module).__mro__) - {object}
    return any(kinds & registry.registry.keys() for registry in LEAVES)


class _Trace:
    """One run of a copy of a network, watched."""

    def __init__(self, module: nn.Module, shape: Shape, output: str | int | None) -> None:
        self.original = dict(_paths(module, ""))
        self.module, self.shape, self.output_key = opened(_plain_copy(module)), shape, output
        self.copies = dict(self.module.named_modules(remove_duplicate=True))
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        self.dtype, self.device = like.dtype, like.device
        self.nodes = [Node(None, (), shape)]
        self.found: dict[int, int] = {}
        self.opaque: dict[int, Exception] = {}  # what cannot be followed, and why
        self.behind: set[int] = set()
        self.kept: list[Any] = []
        self.scope: list[str] = []
        self.inside = 0

    # -------------------------------------------------------------------------- running

    def graph(self) -> Graph:
        sample = self._sample(2)
        self.kept.append(sample)
        self.found[id(sample)] = 0
        with self._watched():
            mode = _Mode(self)
            try:
                with mode, _slow_attention():
                    outputs = self.module(sample)
            except TypeError as error:
                if "required positional argument" not in str(error):
                    raise
                raise TypeError(
                    "has several inputs, and so no Lipschitz rule: wrap it in a module with one"
                ) from error
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"does not run on inputs of shape {self.shape}: {error}"
                ) from error
        result = self._chosen(outputs)
        if id(result) in self.opaque:
            raise self.opaque[id(result)]
        if id(result) not in self.found:
            raise ValueError(
                "returns a tensor that does not depend on its input, or not in a way that could "
                "be followed"
            )
        if id(result) in self.behind:
            raise ValueError(_BATCH_BEHIND)
        output = self.found[id(result)]
        graph = Graph(tuple(self.nodes), output).until(output)
        if result.dim() == 0 or len(result) != 2:
            raise ValueError(
                f"must keep samples apart, but made shape {tuple(result.shape)} of a batch of 2"
            )
        self._verify(graph)
        return graph

    def _sample(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        sample = torch.rand(batch, *self.shape, generator=generator, dtype=torch.float64) + 0.5
        return sample.to(self.dtype).to(self.device)

    def _chosen(self, outputs: Any) -> Tensor:
        if self.output_key is not None:
            try:
                outputs = outputs[self.output_key]
            except (KeyError, IndexError, TypeError) as error:
                keys = list(outputs) if isinstance(outputs, dict) else type(outputs).__name__
                raise ValueError(
                    f"output must name a tensor of the outputs, got {self.output_key!r} and {keys}"
                ) from error
        if not isinstance(outputs, Tensor):
            names = f" with {list(outputs)}" if isinstance(outputs, dict) else ""
            raise ValueError(
                f"must return one tensor, got {type(outputs).__name__}{names}: name it by output="
            )
        return outputs

    def _verify(self, graph: Graph) -> None:
        """Run graph and network on other inputs."""
        for batch in (3, 2):
            sample = self._sample(batch)
            with _slow_attention():
                own = graph.run(sample.clone())
                other = self._chosen(self.module(sample.clone()))
            if own.shape != other.shape or not torch.equal(
                own.nan_to_num(0.0), other.nan_to_num(0.0)
            ):
                raise ValueError(
                    "is not what its graph computes: its forward depends on the size of the batch, "
                    "on chance, or writes into a tensor that it reads again; register a rule with "
                    "@lipschitz_rule.register for the module that does"
                )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        for path, module in self.copies.items():
            module.__dict__["forward"] = functools.partial(self._call, path, module, module.forward)
        try:
            yield
        finally:
            for module in self.copies.values():
                module.__dict__.pop("forward", None)
                if getattr(module, "inplace", False):
                    module.inplace = False  # what it overwrote is a node of its own in the graph

    def _call(
        self, path: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.inside:
            return forward(*args, **kwargs)
        original = self.original.get(path, module)
        try:
            _check(original)
        except (TypeError, ValueError) as error:
            raise _located(error, path, original) from error
        special = next((c for c in type(module).__mro__ if c in CALLS), None)
        if special is not None and (
            type(module).forward is not special.forward or "forward" in vars(original)
        ):
            special = None
        if not known_layer(module) and special is None:
            self.scope.append(path)
            try:
                return forward(*args, **kwargs)
            except (TypeError, ValueError) as error:
                raise _inside(error, path, original) from error
            finally:
                self.scope.pop()
        self.inside += 1
        try:
            outputs = forward(*args, **kwargs)
        finally:
            self.inside -= 1
        try:
            self._write_call(path, module, special, args, kwargs, outputs)
        except (TypeError, ValueError) as error:
            raise _inside(error, path, original) from error
        return outputs

    def _write_call(
        self,
        path: str,
        module: nn.Module,
        special: type[nn.Module] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,
    ) -> None:
        """Write down a layer that was called whole."""
        arguments = (*args, *kwargs.values())
        if not self.depends(arguments):
            return
        self._check_followed(arguments)
        if special is not None:
            reason = f"is an output of {special.__name__} that is not followed"
            self.hide(outputs, _located(ValueError(reason), path, module))
            for tensor, layer, inputs in CALLS[special](
                module, args, kwargs, outputs, self.tracked
            ):
                self._write(tensor, layer, inputs, path)
            return
        tracked = [part for part in (*args, *kwargs.values()) if self.tracked(part)]
        if not isinstance(outputs, Tensor):
            raise ValueError(f"must return one tensor, got {type(outputs).__name__}")
        if len(tracked) > 1:
            raise TypeError("has several inputs, and its rule is for one")
        self._write(outputs, module, tuple(tracked), path)

    # ------------------------------------------------------------------------- writing

    def tracked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (id(value) in self.found or id(value) in self.opaque)

    def depends(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(self.depends(part) for part in value)
        return self.tracked(value)

    def _node(self, part: Any, path: str) -> int:
        if isinstance(part, Tensor):
            if id(part) in self.behind:
                raise ValueError(_BATCH_BEHIND)
            if id(part) in self.found:
                return self.found[id(part)]
            if id(part) in self.opaque:
                raise self.opaque[id(part)]
            return self._constant(part, path)
        layer, inputs = part
        return self._append(layer, tuple(self._node(p, path) for p in inputs), path)

    def _constant(self, value: Tensor, path: str) -> int:
        if len(value) > 1 and not bool((value == value[:1]).all()):
            raise ValueError("a constant has other values for each sample of the batch")
        place, code = _place()
        self.nodes.append(
            Node(Constant(value[0].detach()), (0,), tuple(value.shape[1:]), path, place, code)
        )
        return len(self.nodes) - 1

    def _append(self, layer: nn.Module, inputs: tuple[int, ...], path: str) -> int:
        with torch.no_grad():
            parts = [
                torch.zeros(2, *self.nodes[k].shape, dtype=self.dtype, device=self.device) + 0.5
                for k in inputs
            ]
            shape = tuple(layer(*parts).shape[1:])
        place, code = _place()
        self.nodes.append(Node(layer, inputs, shape, path, place, code))
        return len(self.nodes) - 1

    def _write(self, tensor: Tensor, layer: Any, inputs: tuple[Any, ...], path: str) -> None:
        self.inside += 1
        try:
            sources = tuple(self._node(part, path) for part in inputs)
            place, code = _place()
            shape = tuple(tensor.shape[1:])
            if getattr(layer, "batch_behind", False):
                shape = (tensor.shape[0], *tensor.shape[2:])
                self.behind.add(id(tensor))
            if tensor.dim() == 0:
                raise ValueError("must keep samples apart, but made a number of a batch")
            self.nodes.append(Node(layer, sources, shape, path, place, code))
        finally:
            self.inside -= 1
        self.found[id(tensor)] = len(self.nodes) - 1
        self.opaque.pop(id(tensor), None)
        self.kept.append(tensor)

    def _check_followed(self, value: Any) -> None:
        """Raise the reason why one of the arguments of a layer cannot be followed."""
        if isinstance(value, (list, tuple)):
            for part in value:
                self._check_followed(part)
        elif isinstance(value, Tensor) and id(value) in self.opaque:
            raise self.opaque[id(value)]

    def hide(self, value: Any, reason: Exception) -> None:
        """Remember tensors that cannot be followed, and why."""
        if isinstance(value, Tensor):
            self.found.pop(id(value), None)
            self.opaque[id(value)] = reason
            self.kept.append(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                self.hide(part, reason)

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of a torch function, and write down what it is."""
        arguments = (*args, *kwargs.values())
        if self.inside or not self.depends(arguments):
            return function(*args, **kwargs)
        name, handler = handler_of(function)
        if name in _TELLING:
            return function(*args, **kwargs)
        if name in _LOOKING and function is not Tensor.float:  # which is no float(x)
            raise self._error(
                ValueError,
                name,
                "looks at the values of a tensor, so that the program may depend on them: keep "
                "decisions to shapes, or register a rule for this module with "
                "@lipschitz_rule.register",
            )
        if name == "setitem":
            raise self._error(TypeError, name, "writes into a part of a tensor: use torch.cat")
        outputs = function(*args, **kwargs)
        self.inside += 1
        try:
            self._record(name, handler, function, args, kwargs, outputs)
        except (TypeError, ValueError, RuntimeError) as error:
            # What is not used does no harm, and what decides is told apart when it does.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            known = error if hasattr(error, "refused") else self._error(kind, name, str(error))
            self.hide(outputs, known)
        finally:
            self.inside -= 1
        return outputs

    def _record(
        self,
        name: str,
        handler: Any,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,
    ) -> None:
        path = self.scope[-1] if self.scope else ""
        if name in MOVING and handler is None:
            x = args[0] if args else kwargs["input"]
            if self.depends(args[1:]) or not self.tracked(x):
                raise TypeError("moves entries to places that depend on the input")

            def again(place: int | None, v: Tensor) -> Tensor:
                moved = function(v, *args[1:], **_others(kwargs))
                return moved if place is None else moved[place]

            if id(x) in self.behind:
                function, moved_again = _batch_behind(function), x.transpose(0, 1)
                self.found[id(moved_again)] = self.found[id(x)]
                self.kept.append(moved_again)
                x = moved_again
            if isinstance(outputs, (list, tuple)):
                for k, part in enumerate(outputs):
                    self._write(part, moving(name, functools.partial(again, k), x), (x,), path)
            else:
                self._write(outputs, moving(name, functools.partial(again, None), x), (x,), path)
            return
        if handler is None:
            raise TypeError(
                "has no Lipschitz rule: register one for the module around it with "
                "@lipschitz_rule.register, which makes that module a layer of the graph"
            )
        call = Call(function, args, kwargs, self.tracked)
        renamed = dict(kwargs)
        if "input" in renamed and not args:
            args = (renamed.pop("input"),)
        renamed.pop("out", None)
        layer, inputs = handler(call, *args, **renamed)
        if not isinstance(outputs, Tensor):
            raise TypeError("has several outputs, which have no rule")
        self._write(outputs, layer.to(self.device), inputs, path)

    def _error(self, kind: type[Exception], name: str, reason: str) -> Exception:
        place, code = _place()
        where = f" ({place}: {code})" if place else ""
        path = self.scope[-1] if self.scope else ""
        return _located(kind(f"{name}{where}: {reason}"), path, self.original[path])


_BATCH_BEHIND = (
    "has its batch in dimension 1, as torch's recurrent layers return their last states: take "
    "one of them, h[-1], or h.transpose(0, 1)"
)


def _batch_behind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function to last states whose batch was moved to the front."""
    return lambda v, *args, **kwargs: function(v.transpose(0, 1), *args, **kwargs)


def _others(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "input"}


def _inside(error: Exception, path: str, module: nn.Module) -> Exception:
    """Name the innermost module in whose forward an error was found."""
    return error if hasattr(error, "refused") else _located(error, path, module)


class _Mode(TorchFunctionMode):
    """Shows every call of torch to a trace."""

    def __init__(self, owner: _Trace) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.owner.operation(func, args, kwargs or {})


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Run attention as it runs with gradients: its fast path rounds otherwise."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def opened(module: nn.Module) -> nn.Module:
    """Open the wrappers inside a copy, and take layers of torch for what they are."""
    module = thawed(unwrapped(module))
    for child in list(module.modules()):
        for name, inner in list(child._modules.items()):
            if inner is not None and unwrapped(inner) is not inner:
                child._modules[name] = unwrapped(inner)
    return module


def _paths(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Name every module by its path without the wrappers."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _paths(unwrapped(child), f"{path}.{name}".strip("."))


def _place() -> tuple[str, str]:
    """File, line and text of the innermost line that is the reader's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _Trace.graph.__code__:
        name = frame.f_code.co_filename
        if not name.startswith(_FOREIGN) and Path(name).stem not in ("contextlib", "functools"):
            code = linecache.getline(name, frame.f_lineno).strip()
            return f"{Path(name).name}:{frame.f_lineno}", code
        frame = frame.f_back
    return "", ""
