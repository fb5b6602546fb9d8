"""Layers that the operations of a network equal: moving, adding to and multiplying single inputs.

``x.flatten(1)``, ``2 * x``, ``x + self.bias`` and ``x @ self.weight.T`` are calls in a forward and
no modules. In a graph each becomes one of the layers here, with its answers beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.errors import (
    Analysis,
    ForwardError,
    _absolute_norm,
    _Affine,
    _after_cast,
    _cast,
    _closed_form,
    _computing_dtype,
    _cuda_rule_of,
    _entries,
    _error_rule_of,
    _relative,
    _unrounded,
    clipped_error,
    moved_error,
    plain_kernels,
)
from lipbook.norms import operator_norm
from lipbook.norms.rigorous import rigorous_matrix_norm
from lipbook.rules import (
    Affine,
    Bound,
    Range,
    Shape,
    affine_rule,
    image_rule,
    lipschitz_rule,
    range_rule,
)
from lipbook.units import Units, elementwise_units, units_rule

__all__ = [
    "Cast",
    "Clamp",
    "Constant",
    "Diagonal",
    "LinearMap",
    "MatrixProduct",
    "Rearrangement",
    "Shift",
]


def _identity(x: Tensor) -> Tensor:
    return x


def _nothing(shape: Shape) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class Rearrangement(nn.Module):
    r"""Rearrangement of entries: every output is an input, or a constant.

    .. math:: f(x)_i = x_{\pi(i)} \quad\text{or}\quad f(x)_i = c_i

    Reshaping, permuting, slicing, padding, repeating, unfolding. Exact in all norms:
    :math:`\operatorname{Lip}(f) = m^{1/p}` if the entry that is copied most often is copied
    m times.

    Parameters
    ----------
    name : str
        Name of the operation, for tables.
    index : torch.Tensor
        :math:`\pi(i)`, -1 for a constant; int64, of the output's shape.
    constant : torch.Tensor
        :math:`c`, of the output's shape; 0 where there is none.
    """

    index: Tensor
    constant: Tensor

    def __init__(self, name: str, index: Tensor, constant: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("index", index)
        self.register_buffer("constant", constant)
        flat = index.flatten()
        self.moves_nothing = bool((flat == torch.arange(len(flat))).all())
        self.pads = bool((flat < 0).any())

    def extra_repr(self) -> str:
        """Name of the operation."""
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        """Rearrange a batch of samples."""
        shape = (len(x), *self.index.shape)
        if self.moves_nothing and x[0].numel() == self.index.numel():
            return x.reshape(shape)
        moved = x.flatten(1)[:, self.index.flatten().clamp(min=0)].view(shape)
        if not self.pads:
            return moved
        return torch.where(self.index < 0, self.constant.to(x.dtype), moved)

    def sources(self) -> set[int]:
        """Name the inputs that are read."""
        return set(self.index[self.index >= 0].tolist())


@lipschitz_rule.register
def _(module: Rearrangement, input_shape: Shape, p: float) -> Bound:
    read = module.index[module.index >= 0]
    copies = int(torch.bincount(read).max()) if len(read) else 0
    return Bound(copies ** (1 / p), "exact", p)


@affine_rule.register
def _(module: Rearrangement, input_shape: Shape) -> Affine:
    moving = Rearrangement(module.name, module.index, torch.zeros_like(module.constant))
    return Affine(moving, moving, moving, module.constant.double(), 1)


@range_rule.register
def _(module: Rearrangement, values: Range) -> Range:
    low, high = module(values.low), module(values.high)
    if values.center is None or values.radius is None:
        return Range(low, high)
    stretch = lipschitz_rule(module, values.shape, 2.0).value
    return Range(low, high, module(values.center), values.radius * stretch)


class Constant(nn.Module):
    r"""A constant beside the input, :math:`x \mapsto c`, with Lipschitz constant 0.

    Parameters
    ----------
    value : torch.Tensor
        :math:`c`, a sample.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def extra_repr(self) -> str:
        """Shape of the constant."""
        return f"{tuple(self.value.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the constant for each sample of a batch."""
        return self.value.expand(len(x), *self.value.shape)


@lipschitz_rule.register
def _(module: Constant, input_shape: Shape, p: float) -> Bound:
    if not module.value.isfinite().all():
        raise ValueError("is a constant with NaN or infinite entries")
    return Bound(0, "exact", p)


@image_rule.register
def _(module: Constant, input_shape: Shape) -> Range:
    value = module.value.double()[None]
    return Range(value, value)


@affine_rule.register
def _(module: Constant, input_shape: Shape) -> Affine:
    def nothing(x: Tensor) -> Tensor:
        return 0 * x.flatten(1).sum(1).view(-1, *[1] * module.value.dim()) + torch.zeros_like(
            module.value
        )

    return Affine(nothing, nothing, nothing, module.value.double(), 1)


class Cast(nn.Module):
    """Change of the dtype, which is the identity on numbers.

    Parameters
    ----------
    dtype : torch.dtype
        The dtype of the outputs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def extra_repr(self) -> str:
        """Name of the dtype."""
        return str(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Cast a batch."""
        return x.to(self.dtype)


@lipschitz_rule.register
def _(module: Cast, input_shape: Shape, p: float) -> Bound:
    return Bound(1, "exact", p)


@affine_rule.register
def _(module: Cast, input_shape: Shape) -> Affine:
    return Affine(_identity, _identity, _identity, _nothing(input_shape), 1)


class Diagonal(nn.Module):
    r"""Multiplication by constants, :math:`x \mapsto d \odot x` or :math:`x \oslash d`.

    .. math:: \operatorname{Lip} = \max_i |d_i| \quad\text{or}\quad 1 / \min_i |d_i|

    Parameters
    ----------
    factor : torch.Tensor
        :math:`d`, of a shape that broadcasts to a sample.
    divides : bool
        Whether the constants divide.
    """

    factor: Tensor

    def __init__(self, factor: Tensor, divides: bool = False) -> None:
        super().__init__()
        self.register_buffer("factor", factor)
        self.divides = divides

    def extra_repr(self) -> str:
        """Say what is done."""
        sign = "/" if self.divides else "*"
        single = self.factor.numel() == 1
        return (
            f"{sign} {self.factor.item():.6g}" if single else f"{sign} {tuple(self.factor.shape)}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply a batch."""
        factor = self.factor if self.factor.dim() else self.factor.item()
        return x / factor if self.divides else x * factor

    def values(self) -> Tensor:
        """Diagonal in float64."""
        factor = self.factor.double()
        return 1 / factor if self.divides else factor


@lipschitz_rule.register
def _(module: Diagonal, input_shape: Shape, p: float) -> Bound:
    factor = module.values()
    if not factor.isfinite().all():
        raise ValueError("divides by 0, or multiplies by NaN or an infinite number")
    used = factor.expand(input_shape) if factor.dim() <= len(input_shape) else factor
    return Bound(used.abs().max().item(), "exact", p)


@affine_rule.register
def _(module: Diagonal, input_shape: Shape) -> Affine:
    d = module.values()
    return Affine(
        lambda x: d * x, lambda x: d.abs() * x, lambda x: d**2 * x, _nothing(input_shape), 2
    )


class Shift(nn.Module):
    r"""Addition of constants, :math:`x \mapsto x + c` or :math:`c - x`.

    Parameters
    ----------
    constant : torch.Tensor
        :math:`c`, of a shape that broadcasts to a sample.
    sign : int
        1 for :math:`x + c`, -1 for :math:`c - x`.
    """

    constant: Tensor

    def __init__(self, constant: Tensor, sign: int = 1) -> None:
        super().__init__()
        self.register_buffer("constant", constant)
        self.sign = sign

    def extra_repr(self) -> str:
        """Say what is added."""
        single = self.constant.numel() == 1
        value = f"{self.constant.item():.6g}" if single else f"{tuple(self.constant.shape)}"
        return f"+ {value}" if self.sign == 1 else f"{value} -"

    def forward(self, x: Tensor) -> Tensor:
        """Add to a batch."""
        constant = self.constant if self.constant.dim() else self.constant.item()
        return x + constant if self.sign == 1 else constant - x


@lipschitz_rule.register
def _(module: Shift, input_shape: Shape, p: float) -> Bound:
    if not module.constant.isfinite().all():
        raise ValueError("adds NaN or an infinite number")
    return Bound(1, "exact", p)


@affine_rule.register
def _(module: Shift, input_shape: Shape) -> Affine:
    sign = float(module.sign)
    bias = module.constant.double().expand(input_shape).clone()
    return Affine(lambda x: sign * x, _identity, _identity, bias, 2)


@range_rule.register
def _(module: Shift, values: Range) -> Range:
    affine = affine_rule(module, values.shape)
    assert affine is not None
    image = affine.range(values)
    radius, lengths = image.radius, values.lengths
    if radius is not None and values.radius is not None:
        radius = values.radius * (1 + 2.0**-40) + radius
    if lengths is not None:
        lengths = (lengths + torch.linalg.vector_norm(affine.bias, dim=-1)) * (1 + 2.0**-40)
    return dataclasses.replace(image, radius=radius, lengths=lengths)


class Clamp(nn.Module):
    r"""Clipping :math:`x \mapsto \min(\max(x, l), h)` to constants, either of which may be absent.

    Parameters
    ----------
    low, high : torch.Tensor, optional
        :math:`l` and :math:`h`, of shapes that broadcast to a sample.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(self, low: Tensor | None, high: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        """Clip a batch."""
        return torch.clamp(x, self.low, self.high)


@lipschitz_rule.register
def _(module: Clamp, input_shape: Shape, p: float) -> Bound:
    return Bound(1, "upper bound", p)


@range_rule.register
def _(module: Clamp, values: Range) -> Range:
    low, high = module(values.low), module(values.high)
    if values.center is None or values.radius is None:
        return Range(low, high)
    return Range(low, high, module(values.center), values.radius)


@units_rule.register
def _(module: Clamp, input_shape: Shape) -> Units:
    low, high = module.low, module.high
    if low is not None and high is not None:
        low = torch.minimum(low, high)  # torch returns h where l > h
    ends = [(end, rises) for end, rises in ((low, 1.0), (high, 0.0)) if end is not None]
    points = [end.double() for end, _ in ends]
    if not all(point.isfinite().all() for point in points):
        zero = torch.zeros(math.prod(input_shape), dtype=torch.float64)
        return Units(zero, zero + 1)
    return elementwise_units(
        module, input_shape, points, [float(low is None), *(rises for _, rises in ends)]
    )


class MatrixProduct(nn.Module):
    r"""Product with a constant matrix: :math:`x \mapsto x A` or, from the left, :math:`A x`.

    .. math:: \operatorname{Lip}_p(x \mapsto x A) = \lVert A^\top\rVert_p, \qquad
        \operatorname{Lip}_p(x \mapsto A x) = \lVert A\rVert_p

    in the p-norm of all entries, since the map is a direct sum of copies of one matrix.

    Parameters
    ----------
    matrix : torch.Tensor
        :math:`A`, (m, n).
    left : bool
        Whether the matrix stands on the left, which needs samples (..., n, columns).
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, left: bool = False) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.left = left

    def extra_repr(self) -> str:
        """Shape and side."""
        return f"{tuple(self.matrix.shape)}, {'left' if self.left else 'right'}"

    def forward(self, x: Tensor) -> Tensor:
        """Multiply a batch."""
        return self.matrix @ x if self.left else x @ self.matrix


@lipschitz_rule.register
def _(module: MatrixProduct, input_shape: Shape, p: float) -> Bound:
    matrix = module.matrix.double()
    if not matrix.isfinite().all():
        raise ValueError("multiplies by a matrix with NaN or infinite entries")
    return Bound(operator_norm(matrix if module.left else matrix.mT, p).item(), "exact", p)


@affine_rule.register
def _(module: MatrixProduct, input_shape: Shape) -> Affine:
    matrix = module.matrix.double()
    terms = matrix.shape[1 if module.left else 0]

    def multiply(factor: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: factor @ x if module.left else x @ factor

    shape = multiply(matrix)(torch.zeros(1, *input_shape, dtype=torch.float64)).shape[1:]
    return Affine(
        multiply(matrix), multiply(matrix.abs()), multiply(matrix**2), _nothing(tuple(shape)), terms
    )


class LinearMap(nn.Module):
    r"""Linear function of torch, known by its matrix: sums, means, products with constants.

    .. math:: f(x) = A x, \qquad \operatorname{Lip}_p(f) = \lVert A\rVert_p

    Parameters
    ----------
    name : str
        Name of the operation.
    function : callable
        :math:`f` on a batch.
    positive : bool
        Whether the entries of A are known not to be negative.
    norms : callable, optional
        Norm of A for each p where there is a formula; else the dense matrix is made.
    terms : int
        Most entries that are summed.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        terms: int,
        norms: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.function = name, function
        self.norms, self.terms = norms, terms

    def extra_repr(self) -> str:
        """Name of the operation."""
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to a batch."""
        return self.function(x)

    def matrix(self, input_shape: Shape) -> Tensor:
        """Dense matrix in float64, (outputs, inputs)."""
        n = math.prod(input_shape)
        if n > 4096:
            raise ValueError(
                f"is a linear map of {n} inputs without a formula for its norm: write it as a "
                "torch.nn.Linear or a convolution, or register a rule for the module around it"
            )
        columns = self.function(torch.eye(n, dtype=torch.float64).reshape(n, *input_shape))
        return columns.reshape(n, -1).mT


@lipschitz_rule.register
def _(module: LinearMap, input_shape: Shape, p: float) -> Bound:
    if module.norms is not None:
        return Bound(module.norms(p), "exact", p)
    return Bound(operator_norm(module.matrix(input_shape), p).item(), "exact", p)


@affine_rule.register
def _(module: LinearMap, input_shape: Shape) -> Affine:
    shape = tuple(module(torch.zeros(1, *input_shape, dtype=torch.float64)).shape[1:])
    if module.norms is not None:  # sums and means: entries 0 or 1 / k
        weight = module(torch.ones(1, *input_shape, dtype=torch.float64)).max().item()
        entry = weight / max(1, module.terms)
        return Affine(
            module.function,
            module.function,
            lambda x: entry * module.function(x),
            _nothing(shape),
            module.terms,
        )
    matrix = module.matrix(input_shape)

    def multiply(factor: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (x.flatten(1) @ factor.mT).view(len(x), *shape)

    return Affine(
        multiply(matrix),
        multiply(matrix.abs()),
        multiply(matrix**2),
        _nothing(shape),
        module.terms,
    )


def sum_norms(terms: int, factor: float) -> Callable[[float], float]:
    """Norms of a direct sum of rows of ``terms`` equal entries."""
    return functools.partial(_sum_norm, terms, factor)


def _sum_norm(terms: int, factor: float, p: float) -> float:
    dual: Any = {1.0: 1.0, 2.0: math.sqrt(terms), math.inf: float(terms)}
    return abs(factor) * float(dual[p])


# ------------------------------------------------------------------- errors of programs

_error_rule_of(Rearrangement)(moved_error)
_cuda_rule_of(Rearrangement, Constant, Clamp, Shift, MatrixProduct)(plain_kernels)


@_cuda_rule_of(Diagonal)
def _(module: Diagonal, example: Tensor) -> None:
    """Refuse a divisor whose reciprocal, by which a GPU multiplies, might underflow."""
    if module.divides and not module.factor.dim() and module.factor.abs().item() > 2.0**100:
        raise ValueError(
            f"a GPU divides by multiplying with a reciprocal, and that of {module.factor.item():g} "
            "may be flushed to zero: certify on the CPU, by .cpu()"
        )


@_error_rule_of(Constant)
def _(module: Constant, example: Tensor, p: float) -> Analysis:
    return lambda x: _unrounded(x, module(x), 0.0)


@_error_rule_of(Clamp)
def _(module: Clamp, example: Tensor, p: float) -> Analysis:
    ends = [end for end in (module.low, module.high) if end is not None]
    limits = [value for end in ends for value in end.double().flatten().tolist()]
    return clipped_error(module, example, p, limits)


@_error_rule_of(Cast)
def _(module: Cast, example: Tensor, p: float) -> Analysis:
    return lambda x: _cast(x, module.dtype, p)


@_error_rule_of(Diagonal)
def _(module: Diagonal, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    return lambda x: _relative(module, x, p, lipschitz, 2)


@_error_rule_of(Shift)
def _(module: Shift, example: Tensor, p: float) -> Analysis:
    shift = module.constant.double().abs().max().item()

    def analysis(x: Tensor) -> ForwardError:
        result = _relative(module, x, p, 1.0, 1, shift)
        if module.constant.dtype == result.outputs.dtype:
            return result
        unit = torch.finfo(result.outputs.dtype).eps  # a number is rounded before it is added
        lost = unit * shift * _entries(result.outputs, p)
        return dataclasses.replace(result, error=result.error + lost)

    return analysis


@_error_rule_of(MatrixProduct)
def _(module: MatrixProduct, example: Tensor, p: float) -> Analysis:
    dtype = _computing_dtype(example, module.matrix)
    matrix = module.matrix.to(dtype)
    blocks = matrix if module.left else matrix.mT
    affine = _Affine(
        layer=module,
        norm=rigorous_matrix_norm(blocks, p),
        absolute_norm=_absolute_norm(lambda q: rigorous_matrix_norm(blocks, q), p),
        bias_norm=0.0,
        largest=matrix.abs().max().item(),
        terms=blocks.shape[1],
        plain_sums=True,
    )
    return _after_cast(affine, dtype, p)


@_error_rule_of(LinearMap)
def _(module: LinearMap, example: Tensor, p: float) -> Analysis:
    if module.norms is None:
        raise ValueError(f"the rounding errors of {module.name} are not known: use sound=False")
    norm = module.norms(p) * (1 + 2.0**-30)
    affine = _Affine(module, norm, norm * module.terms, 0.0, 1.0, module.terms + 2)
    return lambda x: affine(x, p)
