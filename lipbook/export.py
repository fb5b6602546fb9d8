r"""Export: frozen copies of constrained networks, files of weights, ONNX graphs.

A constrained layer computes its weight from raw parameters whenever it is called. That is right
while it is trained and a waste afterwards. :func:`freeze` makes a copy in which each weight is
computed once and stored: torch's own layers wherever they do the same, nothing left to recompute,
and the same outputs to the last bit. A frozen network can be pickled, which torch does not do
for parametrized ones, and written as an ONNX graph by :func:`export_onnx`.
:func:`save_weights` and :func:`load_weights` store the tensors of either kind of network in
a safetensors file, which holds no code.

The functions that write files need the packages of ``pip install "lipbook[export]"``;
:func:`freeze` needs torch only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

import lipbook
from lipbook.composition import _shape, lipschitz_rule
from lipbook.convolutions import (
    CayleyConv2d,
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
)
from lipbook.orthogonal import (
    InfinityNormLinear,
    OrthogonalLinear,
    SpectralNormLinear,
    UnitNormLinear,
)
from lipbook.residual import (
    CPLConv2d,
    CPLLinear,
    SLLConv2d,
    SLLLinear,
    _ConvolutionStep,
    _DenseStep,
)

__all__ = [
    "ConvolutionStep",
    "DenseStep",
    "export_onnx",
    "freeze",
    "freeze_rule",
    "load_weights",
    "save_weights",
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

    **Guaranteed**: the outputs are those of ``model.eval().requires_grad_(False)``, bit by bit,
    since the same torch functions are called on the same numbers. So is the value of
    :func:`~lipbook.composition.lipschitz_bound`, for every input shape. (Images in channels-last
    layout are the exception: torch's circular padding changes the layout, and with it the last
    bits of a convolution.) While the parameters of the network still require gradients, the bits
    are the same on batches of vectors and of images. On sequences torch chooses some kernels by
    whether a weight requires gradients: those of attention (where
    :class:`torch.nn.TransformerEncoder` then also returns 0 in padded places) and those of linear
    layers on tensors that are not contiguous. There the two agree to rounding.

    The argument is left as it is, in training mode if it was, and shares
    nothing with the copy. Modules and tensors that occur several times in the network remain
    shared in the copy. The copy can be pickled if its classes can be imported.

    =======================================  ===================================================
    layer                                    in the copy
    =======================================  ===================================================
    ``OrthogonalLinear`` and its kin         :class:`torch.nn.Linear`
    convolutions, circular without a stride  :class:`torch.nn.Conv2d` and its kin
    convolutions with zero padding           likewise, but for ``"same"`` with an even kernel
    all other convolutions, SOC, Cayley      the same class, with a constant kernel
    ``SLLLinear``, ``CPLConv2d``, ...        :class:`DenseStep`, :class:`ConvolutionStep`
    other modules with parametrizations      the same class, with constant weights
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
            with _located(path, module):
                _check(module)
                if parametrize.is_parametrized(module) or _has_rule(module):
                    plain = freeze_rule(_plain(module, memo).eval().requires_grad_(False))
                    if not isinstance(plain, nn.Module):
                        kind = type(plain).__name__
                        raise TypeError(f"its freezing rule must return a module, got {kind}")
                    memo[id(module)] = plain
        with _located("", model):
            frozen = copy.deepcopy(model, memo)
            _check_complete(memo)
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
    cls: Any = _class(module)
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
def _located(path: str, module: nn.Module) -> Iterator[None]:
    """Put path and class of the module in front of an error."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        name = _class(module).__name__
        where = f"{path!r} ({name})" if path else name
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


def _class(module: nn.Module) -> type[nn.Module]:
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
                f"a {_class(copied).__name__} with parametrizations is in an attribute that torch "
                "does not search for modules: register it as a submodule, in a "
                "torch.nn.ModuleList or ModuleDict"
            )


# ------------------------------------------------------------------------------- frozen layers


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

    ``weight`` is its kernel, (inner, c, k, k).

    Examples
    --------
    >>> step, x = freeze(CPLConv2d(4, 8)), torch.randn(2, 4, 8, 8)
    >>> y = step(x)
    >>> bool((y[0] - y[1]).norm() <= (x[0] - x[1]).norm())
    True
    """

    diagonal: Tensor

    def scale(self) -> Tensor:
        """Diagonal of T, (inner,)."""
        return self.diagonal


_STEPS: dict[type[nn.Module], type[nn.Module]] = {
    SLLLinear: DenseStep,
    CPLLinear: DenseStep,
    SLLConv2d: ConvolutionStep,
    CPLConv2d: ConvolutionStep,
}
for _step in (DenseStep, ConvolutionStep):
    lipschitz_rule.register(_step, lipschitz_rule.dispatch(SLLLinear))

_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    OrthogonalLinear: nn.Linear,
    SpectralNormLinear: nn.Linear,
    InfinityNormLinear: nn.Linear,
    UnitNormLinear: nn.Linear,
    OrthogonalConv1d: nn.Conv1d,
    OrthogonalConv2d: nn.Conv2d,
    OrthogonalConv3d: nn.Conv3d,
    NonexpansiveConv1d: nn.Conv1d,
    NonexpansiveConv2d: nn.Conv2d,
    NonexpansiveConv3d: nn.Conv3d,
    OrthogonalConvTranspose1d: nn.ConvTranspose1d,
    OrthogonalConvTranspose2d: nn.ConvTranspose2d,
    OrthogonalConvTranspose3d: nn.ConvTranspose3d,
}


def _freeze_step(module: nn.Module) -> nn.Module:
    if _computes_as(module, _STEPS):
        step: Any = module
        step.register_buffer("diagonal", step.scale().clone())
        step.log_q = None
        step.__class__ = _STEPS[type(module)]
    return module


def _freeze_to_torch(module: nn.Module) -> nn.Module:
    if _computes_as(module, _TORCH) and _torch_computes(module):
        vars(module).pop("_pads", None)
        module.__class__ = _TORCH[type(module)]
    return module


def _computes_as(module: nn.Module, classes: dict[type[nn.Module], Any]) -> bool:
    """Whether the module is of one of the classes: a subclass may compute something else."""
    return type(module) in classes and "forward" not in vars(module)


# Note [strides on a circle]
# torch pads both ends alike and leaves the last pixels unread: the same numbers, but from an image
# of another size, for which the sums may be taken in another order. It also accepts images that
# the stride does not divide, where the norm exceeds 1.


def _torch_computes(module: Any) -> bool:
    """Whether torch's class of a layer makes the same calls on the same padded image."""
    if isinstance(module, nn.Linear):
        return True
    if module.padding_mode == "circular":
        return not module.transposed and max(module.stride) == 1
    return bool(module.padding != "same")


for _layer in _STEPS:
    freeze_rule.register(_layer, _freeze_step)
for _layer in _TORCH:
    freeze_rule.register(_layer, _freeze_to_torch)


# ------------------------------------------------------------------------------------- weights


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    r"""Write all parameters and buffers of a network to a safetensors file.

    Of a constrained network these are the raw parameters, so that training can go on from the
    file; of a frozen one they are the weights. The file holds tensors under the names of
    ``model.state_dict()`` and, as metadata, the versions of lipbook and torch and the class of each
    module that has tensors or parametrizes one. It holds no code: reading it runs none.

    The file appears under ``path`` when it is complete, or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        The network, on any device.
    path : str or path
        The file, by custom ``*.safetensors``. An existing one is replaced.

    Raises
    ------
    ImportError
        If safetensors is not installed.
    TypeError
        If the state of the model holds something that is no tensor.
    ValueError
        If a tensor has no values yet.

    Examples
    --------
    >>> model, twin = OrthogonalLinear(4, 4), OrthogonalLinear(4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(model, f"{folder}/model.safetensors")
    ...     load_weights(twin, f"{folder}/model.safetensors")
    >>> torch.equal(twin.weight, model.weight)
    True
    """
    safetensors = _require("safetensors.torch")
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _state(model).items()
    }
    metadata = {
        "format": "pt",
        "lipbook": lipbook.__version__,
        "torch": torch.__version__,
        "classes": json.dumps(_classes(model)),
    }
    with _complete_file(path) as temporary:
        safetensors.save_file(tensors, temporary, metadata)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    r"""Read a file of :func:`save_weights` into a network of the same layers.

    **Guaranteed**: the network then has the tensors of the one that was saved, bit by bit; or it is
    left as it was and the error names each difference: tensors that one of the two lacks, shapes,
    dtypes, and classes of the modules that they belong to. (The raw parameters of two
    orthogonalisation methods can agree in name and shape and mean different weights.) Arguments of
    a layer that are neither tensors nor classes are not in the file, the pairing of a
    MaxMin for instance: the network has to be built as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Constrained, if a constrained network was saved; frozen, if a frozen one was.
    path : str or path
        The file. One that safetensors itself has written will do, and names no classes.

    Raises
    ------
    ImportError
        If safetensors is not installed.
    ValueError
        If the file is no safetensors file or does not fit the model.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(OrthogonalLinear(4, 4, method="qr"), f"{folder}/model.safetensors")
    ...     load_weights(OrthogonalLinear(4, 4, method="polar"), f"{folder}/model.safetensors")
    Traceback (most recent call last):
    ...
    ValueError: path must hold the weights of this model, got 1 difference:
      'parametrizations.weight.0': QR in the file, Polar in the model
    """
    safetensors = _require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    described = {name: _described(tensor) for name, tensor in tensors.items()}
    expected = {name: _described(tensor) for name, tensor in _state(model).items()}
    classes = json.loads(metadata.get("classes", "{}"))
    absent = "nothing"
    pairs = [(classes, _classes(model) if classes else {}), (described, expected)]
    differences = [
        f"{name!r}: {saved.get(name, absent)} in the file, {own.get(name, absent)} in the model"
        for saved, own in pairs
        for name in [*own, *(key for key in saved if key not in own)]
        if saved.get(name) != own.get(name)
    ]
    if differences:
        count = f"{len(differences)} difference" + "s" * (len(differences) > 1)
        raise ValueError(
            f"path must hold the weights of this model, got {count}:\n  " + "\n  ".join(differences)
        )
    model.load_state_dict(tensors)


def _state(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} must be a tensor to be stored, got {type(value).__name__}")
        if is_lazy(value) or value.is_meta:
            raise ValueError(f"{name!r} has no values yet: initialise it first")
    return state


def _classes(model: nn.Module) -> dict[str, str]:
    """Class of each module that has tensors or parametrizes one, by its path."""
    return {
        path: _class(module).__name__
        for path, module in model.named_modules()
        if module._parameters or module._buffers or "parametrizations" in path.split(".")[:-1]
    }


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


# ---------------------------------------------------------------------------------------- ONNX


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    *,
    opset_version: int | None = None,
) -> None:
    r"""Freeze a network and write it as an ONNX graph, in float32, for batches of any size.

    The graph has one input ``input`` and one output ``output``, both with a first dimension
    ``batch``. **Guaranteed**: onnxruntime has run the file on random batches of several sizes,
    and agreed with torch to 1e-5 (relative to the largest output, if that exceeds 1). The file
    appears under ``path`` after that, or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        A network that maps one tensor to one tensor. It is not changed: a frozen copy
        (:func:`freeze`) is exported, on the CPU and in float32.
    path : str or path
        The file, by custom ``*.onnx``. An existing one is replaced.
    input_shape : sequence of int
        Shape of one sample, without the batch dimension.
    opset_version : int, optional
        Version of the ONNX operators; torch's default if not given.

    Raises
    ------
    ImportError
        If onnx, onnxscript or onnxruntime is not installed.
    TypeError
        If ``model`` is no module or ``input_shape`` no sequence.
    ValueError
        If :func:`freeze` refuses the model, if it does not run on inputs of this shape, if torch
        cannot express it in ONNX, or only for one size of batches, or if onnxruntime cannot run the
        graph or disagrees. The message says why in the words of the package that failed.
        :class:`~lipbook.convolutions.CayleyConv2d` is refused: it multiplies complex numbers,
        for which torch's exporter has no translation. All other layers of this library
        can be exported.

    Notes
    -----
    The graph comes from ``torch.export`` (``dynamo=True`` in ``torch.onnx.export``), in some
    seconds. The older exporter, which traces, is faster; but torch has deprecated it, and it has no
    translation of some functions used here. Graphs above 2 GB are refused by ONNX itself.

    Examples
    --------
    >>> import onnxruntime
    >>> model, x = OrthogonalLinear(4, 3), torch.randn(5, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, f"{folder}/model.onnx", (4,))
    ...     session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    >>> outputs = session.run(["output"], {"input": x.numpy()})[0]
    >>> bool((torch.from_numpy(outputs) - model(x)).abs().max() < 1e-5)
    True
    """
    onnx, _, runtime = map(_require, ("onnx", "onnxscript", "onnxruntime"))
    frozen = freeze(model).cpu().float()
    for name, module in frozen.named_modules():
        if isinstance(module, CayleyConv2d):
            with _located(name, module):
                raise ValueError("multiplies complex numbers, which torch cannot write as ONNX")
    shape = _shape(input_shape)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *shape, generator=generator) for size in (2, 1, 5)]
    with torch.inference_mode(False), torch.no_grad():
        try:
            outputs = [frozen(batch) for batch in batches]
        except Exception as error:
            raise ValueError(
                f"input_shape must be one that model runs on, got {shape}: {error}"
            ) from error
        for batch, output in zip(batches, outputs, strict=True):
            if not isinstance(output, Tensor):
                raise ValueError(f"model must return one tensor, got {type(output).__name__}")
            if output.shape[:1] != batch.shape[:1]:
                raise ValueError(
                    "model must keep samples apart, but made shape "
                    f"{tuple(output.shape)} of a batch of {len(batch)}"
                )
            if not output.is_floating_point() or not output.numel() or not output.isfinite().all():
                raise ValueError(
                    "model must return finite floating-point numbers on normally distributed ones, "
                    f"got {output.dtype} of shape {tuple(output.shape)}"
                )
        graph = _onnx_graph(frozen, batches[0], opset_version)
    with _complete_file(path) as temporary:
        with _refused("model cannot be written as ONNX"):
            graph.save(temporary, external_data=False)
            onnx.checker.check_model(temporary, full_check=True)
            versions = {opset.domain: opset.version for opset in onnx.load(temporary).opset_import}
        if opset_version not in (None, versions.get("")):
            raise ValueError(
                f"opset_version must be one that torch can write this model in, got {opset_version}"
                f": it wrote {versions.get('')}"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it logs is in the errors
        with _refused("onnxruntime cannot load the graph of model"):
            session = runtime.InferenceSession(
                temporary, options, providers=["CPUExecutionProvider"]
            )
        fixed = session.get_inputs()[0].shape[0]
        if isinstance(fixed, int):
            raise ValueError(
                f"model must take batches of any size, but torch wrote a graph for {fixed} only: "
                "in forward, read the size as x.shape[0], not as len(x) or a number, and do not "
                "branch on it"
            )
        for batch, output in zip(batches, outputs, strict=True):
            with _refused(f"onnxruntime cannot run the graph of model on a batch of {len(batch)}"):
                (array,) = session.run(["output"], {"input": batch.numpy()})
            found = torch.from_numpy(array)
            if found.shape != output.shape:
                raise ValueError(
                    f"onnxruntime must agree with torch on the shape {tuple(output.shape)} "
                    f"of an output, got {tuple(found.shape)}"
                )
            gap = (found - output).abs().max() / output.abs().max().clamp(min=1)
            if not gap <= 1e-5:
                raise ValueError(f"onnxruntime must agree with torch to 1e-5, got {gap:.1e}")


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Make any error of another package the ValueError of this one, with the first reason."""
    try:
        yield
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ValueError(f"{what}: {reason}") from error


def _onnx_graph(frozen: nn.Module, batch: Tensor, opset_version: int | None) -> Any:
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own use of its own functions
        log.setLevel(logging.ERROR)  # and logs that torchvision is not there
        try:
            with _refused("model cannot be written as ONNX"):
                return torch.onnx.export(
                    frozen,
                    (batch,),
                    dynamo=True,
                    verbose=False,
                    input_names=["input"],
                    output_names=["output"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    opset_version=opset_version,
                )
        finally:
            log.setLevel(level)


# --------------------------------------------------------------------------------------- files


def _require(name: str) -> Any:
    """Import a package of the extra ``export``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{package} must be installed for this: pip install 'lipbook[export]'"
        ) from error


@contextlib.contextmanager
def _complete_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the name of a temporary file that takes the place of ``path`` at the end."""
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield str(temporary)
        os.replace(temporary, target)
