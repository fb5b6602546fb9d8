"""Lipschitz networks: the mathematics of the book, as tested PyTorch.

The modules are laid out like the chapters and import each other downwards only:

``jacobians`` and ``norms`` know nothing of the others, ``composition`` stands on both,
and ``lab`` holds what the chapters need besides mathematics: data, training, plots.

A module is imported when it is first asked for:

>>> import lipbook
>>> lipbook.convolutions.OrthogonalConv2d(3, 8, 3).weight.shape
torch.Size([8, 3, 3, 3])
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipbook import activations as activations
    from lipbook import attacks as attacks
    from lipbook import attention as attention
    from lipbook import cli as cli
    from lipbook import composition as composition
    from lipbook import conversion as conversion
    from lipbook import convolutions as convolutions
    from lipbook import distances as distances
    from lipbook import errors as errors
    from lipbook import export as export
    from lipbook import freezing as freezing
    from lipbook import generalization as generalization
    from lipbook import graphs as graphs
    from lipbook import interpretability as interpretability
    from lipbook import jacobians as jacobians
    from lipbook import lab as lab
    from lipbook import layers as layers
    from lipbook import losses as losses
    from lipbook import normalization as normalization
    from lipbook import norms as norms
    from lipbook import orthogonal as orthogonal
    from lipbook import pooling as pooling
    from lipbook import residual as residual
    from lipbook import robustness as robustness
    from lipbook import rounding as rounding
    from lipbook import rules as rules
    from lipbook import sequences as sequences
    from lipbook import tightness as tightness
    from lipbook import units as units
    from lipbook import wasserstein as wasserstein

__version__ = "1.0.0"

METHOD_ROOMS = ("tightness",)  # whose bounds lipschitz_bound(..., method=...) names


def __getattr__(name: str) -> Any:
    """Import a module of the package when it is first asked for."""
    path = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the modules too."""
    rooms = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted({*globals(), *(room for room in rooms if not room.startswith("_"))})
