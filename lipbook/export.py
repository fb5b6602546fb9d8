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
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lipbook
from lipbook._extras import imported
from lipbook.attention import EnergyStep
from lipbook.composition import _shape
from lipbook.freezing import freeze, freeze_rule, located, plain_class
from lipbook.residual import ConvolutionStep, DenseStep, SandwichStep

__all__ = [
    "ConvolutionStep",
    "DenseStep",
    "EnergyStep",
    "SandwichStep",
    "export_onnx",
    "freeze",
    "freeze_rule",
    "load_weights",
    "save_weights",
]

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
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> model, twin = OrthogonalLinear(4, 4), OrthogonalLinear(4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(model, f"{folder}/model.safetensors")
    ...     load_weights(twin, f"{folder}/model.safetensors")
    >>> torch.equal(twin.weight, model.weight)
    True
    """
    safetensors = imported("safetensors.torch")
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
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(OrthogonalLinear(4, 4, method="qr"), f"{folder}/model.safetensors")
    ...     load_weights(OrthogonalLinear(4, 4, method="polar"), f"{folder}/model.safetensors")
    Traceback (most recent call last):
    ...
    ValueError: path must hold the weights of this model, got 1 difference:
      'parametrizations.weight.0': QR in the file, Polar in the model
    """
    safetensors = imported("safetensors")
    expected = {name: _described(tensor) for name, tensor in _state(model).items()}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    described = {name: _described(tensor) for name, tensor in tensors.items()}
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
        path: plain_class(module).__name__
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
        :class:`~lipbook.convolutions.CayleyConv2d` and
        :class:`~lipbook.convolutions.BlockReflectorConv2d` are refused: they multiply complex
        numbers, for which torch's exporter has no translation. All other layers of this library can
        be exported.

    Notes
    -----
    The graph comes from ``torch.export`` (``dynamo=True`` in ``torch.onnx.export``), in some
    seconds. The older exporter, which traces, is faster; but torch has deprecated it, and it has no
    translation of some functions used here. Graphs above 2 GB are refused by ONNX itself.

    Examples
    --------
    >>> import onnxruntime
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> model, x = OrthogonalLinear(4, 3), torch.randn(5, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, f"{folder}/model.onnx", (4,))
    ...     session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    >>> outputs = session.run(["output"], {"input": x.numpy()})[0]
    >>> bool((torch.from_numpy(outputs) - model(x)).abs().max() < 1e-5)
    True
    """
    onnx, _, runtime = map(imported, ("onnx", "onnxscript", "onnxruntime"))
    frozen = freeze(model).cpu().float()
    for name, module in frozen.named_modules():
        if reason := getattr(module, "not_in_onnx", None):  # what a layer says of itself
            with located(name, module):
                raise ValueError(reason)
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


@contextlib.contextmanager
def _complete_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the name of a temporary file that takes the place of ``path`` at the end."""
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield str(temporary)
        os.replace(temporary, target)
