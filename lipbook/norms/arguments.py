"""Arguments: what is accepted, and what is said of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = []

Size = int | Sequence[int]
Padding = Size | Literal["same", "valid"]
PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]


def _got(value: object) -> str:
    """Say what came: a dtype, an array that can be a tensor, or another type."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    hint = ": call torch.from_numpy" if isinstance(value, np.ndarray) else ""
    return f"{type(value).__name__}{hint}"


def _matrix(matrix: Tensor) -> Tensor:
    matrix = _finite("matrix", matrix)
    if matrix.dim() < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    return matrix


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_got(tensor)}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _exponent(name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name} must be a number in [1, inf], got {type(p).__name__}")
    if not p >= 1:
        raise ValueError(f"{name} must be in [1, inf], got {p}")
    return float(p)


def _convolution_exponent(p: float) -> float:
    p = _exponent("p", p)
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf for a convolution, got {p:g}")
    return p


def _tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, of any dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_got(value)}")


def _floating(name: str, value: object, dims: int = 0) -> None:
    """Refuse what is no real floating-point tensor with as many dimensions or more."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {_got(value)}")
    if value.dim() < dims:
        raise ValueError(
            f"{name} must have {dims} or more dimensions, got shape {tuple(value.shape)}"
        )


def _real(name: str, value: float) -> None:
    """Refuse what is no real number; its range is the caller's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _integer(name: str, value: int, least: float) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _tuple(name: str, value: Size, dims: int, least: int) -> list[int]:
    values = list(value) if isinstance(value, Iterable) else [value] * dims
    if len(values) != dims:
        raise ValueError(f"{name} must be one integer or {dims}, got {value!r}")
    return [_integer(name, entry, least) for entry in values]
