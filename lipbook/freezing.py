r"""Freezing: plain copies of constrained networks for evaluation.

A constrained layer computes its weight from raw parameters whenever it is called. That is right
while it is trained and a waste afterwards. :func:`freeze` makes a copy in which each weight is
computed once and stored. A layer says by :func:`freeze_rule`, beside its definition, what stands
in its place; this room knows no layer by name. :mod:`lipbook.export` writes files of the copies.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

__all__ = [
    "computes_as",
    "freeze",
    "freeze_rule",
    "keep_kernels",
    "located",
    "plain_class",
    "register_plain",
    "thawed",
]

# ------------------------------------------------------------------------------ frozen copies

# Note [no removal]
# torch's remove_parametrizations() edits the class of a module, and a deep copy shares that class
# with its original: removing from the copy breaks the original. Inside parametrize.cached() a copy
# even returns the original's weight. So the copy is built from the plain class below the generated
# one, and the weight comes from the parametrization itself and not from the attribute.


def freeze(model: nn.Module) -> nn.Module:
    r"""Plain copy of a network for evaluation, with every parametrized weight a constant.

    .. math:: x \mapsto f_{W(\theta)}(x) \quad\text{becomes}\quad x \mapsto f_W(x),
        \qquad W = W(\theta) \text{ computed once}

    **Guaranteed**: the outputs are those of ``model.eval()``, bit by bit, with and without
    :class:`torch.no_grad`, since the same torch functions are called on the same numbers. So is the
    value of :func:`~lipbook.composition.lipschitz_bound`, for every input shape. Torch chooses the
    kernels of attention and recurrence by whether a weight requires gradients; the copy of such a
    layer remembers which did, and takes those. Two exceptions agree to rounding only: images in
    channels-last layout, which torch's circular padding changes, and a
    :class:`torch.nn.Linear` on a tensor (batch, n, m) that is not contiguous, unless the weights of
    the network do not require gradients either.

    The argument is left as it is, in training mode if it was, and shares
    nothing with the copy. Modules and tensors that occur several times in the network remain
    shared in the copy. The copy can be pickled if its classes can be imported.

    =======================================  ===================================================
    layer                                    in the copy
    =======================================  ===================================================
    ``OrthogonalLinear`` and its kin         :class:`torch.nn.Linear`
    convolutions, circular without a stride  :class:`torch.nn.Conv2d` and its kin
    convolutions with zero padding           likewise, but for ``"same"`` with an even kernel
    all other convolutions, SOC, Cayley,     the same class, with a constant kernel
    shift convolutions
    ``SLLLinear``, ``CPLConv2d``, ...        ``DenseStep``, ``ConvolutionStep``
    ``SandwichLinear``                       ``SandwichStep``
    ``EnergyAttention``                      ``EnergyStep``
    other modules with parametrizations      the same class, with constant weights
    attention, transformers and recurrent    a subclass, which keeps to the kernels of the original
    layers of torch
    everything else                          a copy
    =======================================  ===================================================

    Torch's class is taken where it calls the same function on the same padded image and checks
    no less: a layer with a stride on a circle goes on refusing images that the stride does not
    divide.

    The copy is in evaluation mode and its parameters do not require gradients: nothing holds a
    constant inside the constraint if it is trained. Gradients with respect to inputs flow.

    Parameters
    ----------
    model : torch.nn.Module
        Any network, not only one of layers of this library.

    Returns
    -------
    torch.nn.Module
        The copy.

    Raises
    ------
    TypeError
        If ``model`` is no module.
    ValueError
        If a module has hooks (those of the old ``torch.nn.utils.weight_norm``,
        ``torch.nn.utils.spectral_norm`` and of pruning among them), has no values yet, is a
        wrapper for compilation or several devices, keeps the result of a computation with its graph
        or another object that cannot be copied, or has a weight that changes each time it is read.
        The message gives the path of the module.

    Notes
    -----
    Speed: evaluation costs what torch's layers cost. SOC still sums its series, and Cayley still
    transforms its kernel once a call.

    Examples
    --------
    >>> from lipbook.activations import MaxMin
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> from lipbook.residual import SLLLinear
    >>> model = nn.Sequential(OrthogonalLinear(8, 8, method="polar"), MaxMin(), SLLLinear(8))
    >>> frozen, x = freeze(model), torch.randn(5, 8)
    >>> torch.equal(frozen(x), model(x))
    True
    >>> frozen
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
      (1): MaxMin(dim=1, pairing='neighbours')
      (2): DenseStep(weight=(8, 8), activation='relu')
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path, module in _children_first(model):
            with located(path, module):
                _check(module)
                if parametrize.is_parametrized(module) or _has_rule(module):
                    plain = freeze_rule(_plain(module, memo).eval().requires_grad_(False))
                    if not isinstance(plain, nn.Module):
                        kind = type(plain).__name__
                        raise TypeError(f"its freezing rule must return a module, got {kind}")
                    memo[id(module)] = plain
        with located("", model):
            frozen = copy.deepcopy(model, memo)
            _check_complete(memo)
        for module in model.modules():
            if id(module) in memo:  # else it is a part of a constraint
                _keep_kernels(module, memo[id(module)])
    return frozen.eval().requires_grad_(False)


@functools.singledispatch
def freeze_rule(module: nn.Module) -> nn.Module:
    r"""Freezing rule of a module: what :func:`freeze` puts in the place of each class of layers.

    A :func:`functools.singledispatch` on the class of ``module``. A rule gets a copy of the layer
    that is its own to change: in evaluation mode, with constant weights in place of
    parametrized ones, and with frozen children. It returns this copy, made simpler, or another
    module. Layers without a rule stay what that copy is, which is always right: a rule is needed
    only where a layer still computes in ``forward`` what has become a constant. A rule serves
    subclasses too and has to return those whose computation it does not know.

    Parameters
    ----------
    module : torch.nn.Module
        The copy.

    Returns
    -------
    torch.nn.Module
        What takes its place. For :func:`~lipbook.composition.lipschitz_bound` it needs a rule
        there.

    Examples
    --------
    A layer that normalises its weight itself, and not by a parametrization:

    >>> class Normalised(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)
    >>> @freeze_rule.register
    ... def _(module: Normalised):
    ...     plain = nn.Linear(module.in_features, module.out_features)
    ...     plain.weight = nn.Parameter(module.weight / module.weight.norm())
    ...     plain.bias = module.bias
    ...     return plain
    >>> model, x = nn.Sequential(Normalised(3, 2)), torch.randn(1, 3)
    >>> torch.equal(freeze(model)(x), model(x))
    True
    >>> freeze(model)[0]
    Linear(in_features=3, out_features=2, bias=True)
    """
    return module


def _has_rule(module: nn.Module) -> bool:
    return freeze_rule.dispatch(type(module)) is not freeze_rule.dispatch(object)


def _children_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each module once, with its path, after all that it contains."""
    found: dict[int, tuple[str, nn.Module]] = {}
    entered: set[int] = set()

    def enter(path: str, module: nn.Module) -> None:
        if id(module) in entered:
            return
        entered.add(id(module))
        for name, child in module.named_children():
            if not (name == "parametrizations" and parametrize.is_parametrized(module)):
                enter(f"{path}.{name}" if path else name, child)
        found[id(module)] = path, module

    enter("", model)
    return list(found.values())


def _plain(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module, with constants in place of parametrized weights."""
    if not parametrize.is_parametrized(module):
        return copy.deepcopy(module, memo)
    cls: Any = plain_class(module)
    plain = memo[id(module)] = cls.__new__(cls)
    state = {key: value for key, value in vars(module).items() if key != "_compiled_call_impl"}
    children = {key: child for key, child in module._modules.items() if key != "parametrizations"}
    state = copy.deepcopy(state | {"_modules": children}, memo)
    state |= {key: value for key, value in vars(nn.Module()).items() if "hooks" in key}
    for name, stack in cast(nn.ModuleDict, module.parametrizations).items():
        value = _constant(name, stack)
        if stack._parameters:  # else it is a buffer that is parametrized
            state["_parameters"] = {name: nn.Parameter(value, False)} | state["_parameters"]
        else:
            state["_buffers"] = {name: value} | state["_buffers"]
    vars(plain).update(state)
    return cast(nn.Module, plain)


def _constant(name: str, stack: nn.Module) -> Tensor:
    """Value of a parametrized weight in evaluation mode."""
    twin = copy.deepcopy(stack).eval()  # since reading may change the state behind a weight
    tensors = [*twin.parameters(), *twin.buffers()]
    versions = [tensor._version for tensor in tensors]
    with torch.autocast(tensors[0].device.type, enabled=False):
        value, again = twin(), twin()
    unsteady = not torch.allclose(value, again, rtol=0, atol=0, equal_nan=True)
    if unsteady or versions != [tensor._version for tensor in tensors]:
        raise ValueError(
            f"{name} changes each time it is read, in evaluation mode too: "
            "use a parametrization that is a function of its parameters"
        )
    return cast(Tensor, value).detach().clone()  # of its own size, where it is a view of more


@contextlib.contextmanager
def located(path: str, module: nn.Module) -> Iterator[None]:
    """Put path and class of the module in front of an error."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        name = plain_class(module).__name__
        where = f"{path!r} ({name})" if path else name
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Class of a module, not the one that torch generates for a parametrized one."""
    return type(module).__mro__[parametrize.is_parametrized(module)]


def _check(module: nn.Module) -> None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError("distributes a model: freeze the model inside it, its .module")
    if hasattr(module, "_orig_mod"):
        raise ValueError("is compiled: freeze the model behind it, its ._orig_mod")
    hooks: list[Any] = []
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        hooks += getattr(module, f"_{kind}_hooks").values()
    if hooks:
        names = [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks]
        raise ValueError(
            "hooks are no part of a plain copy: remove them, and use "
            f"torch.nn.utils.parametrizations for norms of weights, got {names}"
        )
    tensors: dict[str, Any] = {**vars(module), **module._parameters, **module._buffers}
    if parametrize.is_parametrized(module):
        raw = cast(nn.ModuleDict, module.parametrizations)
        tensors |= {**dict(raw.named_parameters()), **dict(raw.named_buffers())}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (is_lazy(tensor) or tensor.is_meta):
            raise ValueError(f"{name} has no values yet: initialise it first")
        if isinstance(tensor, Tensor) and not tensor.is_leaf:
            raise ValueError(f"{name} is the result of a computation with its graph: detach it")


def _check_complete(memo: dict[int, Any]) -> None:
    for copied in memo.values():
        if isinstance(copied, nn.Module) and parametrize.is_parametrized(copied):
            raise ValueError(
                f"a {plain_class(copied).__name__} with parametrizations is in an attribute that "
                "torch does not search for modules: register it as a submodule, in a "
                "torch.nn.ModuleList or ModuleDict"
            )


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of this very class: a subclass may compute something else."""
    return type(module) is cls and "forward" not in vars(module)


def register_plain(
    cls: type[nn.Module],
    plain: type[nn.Module],
    when: Callable[[Any], bool] = lambda module: True,
) -> None:
    """Let layers of a class freeze to a class of torch that makes the same calls."""

    def rule(module: nn.Module) -> nn.Module:
        if computes_as(module, cls) and when(module):
            vars(module).pop("_pads", None)
            module.__class__ = plain
        return module

    freeze_rule.register(cls, rule)


# ------------------------------------------------------------------------- the choice of kernels

# Note [kernels by requires_grad]
# Some layers of torch take a fused kernel if gradients are off or no weight requires them; and a
# product of a tensor (n, m, k) that is not contiguous is one product of matrices if the weight
# requires gradients, a batch of them if not, as in GRU and RNN with the batch first. What a
# network computes in evaluation mode so depends on a flag of its weights that its frozen copy no
# longer has, and so do the bits. The copy remembers the flags, and calls torch's forward on a twin
# of itself whose weights are the same memory under those flags. The twin lives for one call.


class _AsTrained(nn.Module):
    """A layer of torch that takes the kernels that it took before it was frozen."""

    trained: frozenset[str]  # the weights that required gradients

    def _get_name(self) -> str:
        return _torch_class(self).__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call torch's forward."""
        forward = _torch_class(self).forward
        if torch.compiler.is_compiling():  # which chooses its own kernels
            return forward(self, *args, **kwargs)
        outputs = forward(_twin(self, self.trained), *args, **kwargs)
        given = (*args, *kwargs.values(), *self.parameters())
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            return outputs
        return _detached(outputs)


_KEEPING: dict[type[nn.Module], type[nn.Module]] = {}


def keep_kernels(cls: type[nn.Module]) -> type[nn.Module]:
    """Let frozen layers of a class of torch keep the kernels of the network in training.

    Returns the class of the copies, to be given a name in the module that calls this.
    """
    name = f"Frozen{cls.__name__}"
    told = f"Frozen copy of ``torch.nn.{cls.__name__}``, with the kernels that it has in training."
    module = {"__module__": sys._getframe(1).f_globals["__name__"], "__doc__": told}
    _KEEPING[cls] = type(name, (_AsTrained, cls), module)
    return _KEEPING[cls]


def thawed(module: nn.Module) -> nn.Module:
    """Give frozen layers of torch their own classes again, in place."""
    for part in module.modules():
        if isinstance(part, _AsTrained):
            part.__class__ = _torch_class(part)
    return module


def _keep_kernels(module: nn.Module, frozen: nn.Module) -> None:
    """Remember which weights of a module require gradients, if torch asks."""
    if type(frozen) not in _KEEPING:
        return
    trained = [name for name, _ in frozen.named_parameters() if _is_trained(module, name)]
    if trained:
        frozen.__class__ = _KEEPING[type(frozen)]
        cast(_AsTrained, frozen).trained = frozenset(trained)


def _is_trained(module: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    if parametrize.is_parametrized(owner, own):
        stack = cast(nn.ModuleDict, owner.parametrizations)[own]
        return any(raw.requires_grad for raw in stack.parameters())
    weight = owner._parameters.get(own)
    return weight is not None and weight.requires_grad


def _torch_class(module: nn.Module) -> Any:
    return type(module).__mro__[2]


def _twin(module: nn.Module, trained: frozenset[str], path: str = "") -> nn.Module:
    """Shallow copy of torch's class, with weights that require gradients where they did."""
    cls: Any = _torch_class(module) if isinstance(module, _AsTrained) else type(module)
    twin = cls.__new__(cls)
    weights = {
        name: weight
        if weight is None or weight.requires_grad
        else nn.Parameter(weight.detach(), path + name in trained)
        for name, weight in module._parameters.items()
    }
    children = {
        name: child if child is None else _twin(child, trained, f"{path}{name}.")
        for name, child in module._modules.items()
    }
    vars(twin).update(vars(module) | {"_parameters": weights, "_modules": children})
    if isinstance(twin, nn.RNNBase):  # which calls torch with a list of its own
        vars(twin)["_flat_weights"] = [weights[name] for name in twin._flat_weights_names]
    return cast(nn.Module, twin)


def _detached(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_detached(output) for output in outputs)
    if not isinstance(outputs, Tensor) or forward_ad.unpack_dual(outputs).tangent is not None:
        return outputs  # detaching takes a tangent away
    return outputs.detach()
