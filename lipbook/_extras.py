"""Packages that only some calls need, each with the extra that brings it."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["EXTRAS", "imported"]

#: The extra of each package.
EXTRAS = {
    "PIL": "lab",
    "cvxpy": "bounds",
    "matplotlib": "lab",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pooch": "lab",
    "safetensors": "lab",
    "tqdm": "lab",
}


def imported(module: str, instead: str = "") -> Any:
    """Import a module of a package that an extra brings.

    Parameters
    ----------
    module : str
        Its name; its package is a key of ``EXTRAS``.
    instead : str
        What else can be done, for the message.

    Returns
    -------
    module

    Raises
    ------
    ModuleNotFoundError
        The package is not installed; the message names its extra.

    Examples
    --------
    >>> imported("tqdm").tqdm.__name__
    'tqdm'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # installed, but broken: what it misses is the truth
        raise ModuleNotFoundError(f"{missing(package)}{instead}", name=error.name) from error


def missing(package: str) -> str:
    """Say in one line which extra to install."""
    return f"{package} is not installed: pip install 'lipbook[{EXTRAS[package]}]'"
