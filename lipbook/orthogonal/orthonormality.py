"""What the maps share: scaling from above, polishing, and the check of what is assigned."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.norms.arguments import _got

__all__ = [
    "without_autocast",
    "power_of_two",
    "two_modes",
    "batched",
    "apply",
    "save",
    "map_tall",
    "working_dtype",
    "eye_like",
    "gram_defect",
    "gram_of",
    "add_to_diagonal",
    "polish",
    "times",
    "divided",
    "stacked",
    "is_elongated",
    "negligible",
    "scaled_from_above",
    "Orthonormal",
    "Signed",
    "check_matrix",
    "check_orthonormal",
    "admitted",
    "raw_of",
]

# Note [polishing]
# LAPACK's orthogonal factors are off by 1e-6 in float32 at n = 1024, those of a Cayley transform
# or an exponential by 1e-7 times the norm of the argument. One Björck step squares such an error:
# singular values 1 + e become 1 - 3e²/2. It also takes every singular value in [0, 2] into [0, 1],
# so that what it cannot mend is at least nonexpansive. On an orthonormal matrix the step is the
# identity to first order along all directions that stay orthonormal, so the hand-written
# gradients below leave it out.


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which constraints are computed, in the dtype of their parameters."""
    if tensor.is_meta:  # a device that autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def power_of_two(matrix: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Power of two to divide by so that no product over- or underflows; 1 if none would.

    Of the largest entry over all axes or some, which are kept. Division by it rounds nothing, and
    no gradient flows through it.
    """
    size = matrix.detach().abs()
    size = size.max() if dim is None else size.amax(dim, keepdim=True)
    info = torch.finfo(size.dtype)
    exponent = size.clamp(min=info.tiny).where(size > 0, 1).log2().round()
    near = math.log2(info.max) / 8  # of which eighth powers are in range
    return (exponent - exponent.clamp(-near, near).round()).exp2()


# Note [two modes]
# Forward-mode differentiation demands a jvp of an autograd.Function, and torch.compile refuses to
# trace one that has it. So the jvp is in a subclass, which is taken where nothing is compiled.


def two_modes(function: Any) -> Any:
    """Decorate an autograd.Function whose ``tangent`` is its jvp, see Note [two modes]."""
    jvp = {"jvp": staticmethod(function.tangent)}
    function.both = type(function.__name__, (function,), jvp)
    return function


def batched(function: Any) -> Any:
    """Decorate further a function of matrices (..., m, n): vmap adds one axis to the others.

    So forward meets plain tensors and may look at their values.
    """

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        moved = [
            argument if dim is None else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        outputs = function.both.apply(*moved)
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0

    function.both.generate_vmap_rule = False
    function.both.vmap = staticmethod(vmap)
    return function


def apply(function: Any, *arguments: Any) -> Any:
    """Apply such a function."""
    return (function if torch.compiler.is_compiling() else function.both).apply(*arguments)


def save(ctx: Any, *tensors: Tensor) -> None:
    """Save tensors for derivatives in both modes."""
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)


def map_tall(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Apply a map of tall matrices to a tall or wide one, in float32 at least."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"matrix must be a real floating-point tensor, got {_got(matrix)}")
    if matrix.dim() < 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    wide = matrix.shape[-2] < matrix.shape[-1]
    with without_autocast(matrix):
        tall = (matrix.mT if wide else matrix).to(working_dtype(matrix.dtype))
        result = function(tall)
    return (result.mT if wide else result).to(matrix.dtype)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type to compute in: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def eye_like(gram: Tensor) -> Tensor:
    """Identity matrix of the size of a square one."""
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def gram_defect(matrix: Tensor) -> Tensor:
    """I - AᵀA, zero if the columns are orthonormal."""
    gram = matrix.mT @ matrix
    return eye_like(gram) - gram


def add_to_diagonal(matrix: Tensor, value: float | Tensor) -> Tensor:
    """Add to the diagonal of a matrix in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix


def polish(matrix: Tensor) -> Tensor:
    """Take one Björck step, see Note [polishing]."""
    return matrix @ add_to_diagonal(-0.5 * gram_of(matrix), 1.5)


# Note [long sums]
# The entries of a Gram matrix of long columns are long sums. Where their terms have one sign and
# nearly one size, rounding errors do not cancel: in float32 some 1e-5 for 65536 terms. Sums of 256
# terms, added in float64, are off by 1e-7, and by up to 3e-6 only where all terms are equal, as may
# those of the diagonal, which are squares: these are added in float64. The products take as long.


def gram_of(matrix: Tensor) -> Tensor:
    """AᵀA, in parts where the columns are long, see Note [long sums]."""
    m, n = matrix.shape[-2:]
    if m < 1024 or m < 4 * n or matrix.dtype != torch.float32 or matrix.device.type == "mps":
        return matrix.mT @ matrix
    parts = [part.mT @ part for part in matrix.split(256, -2)]
    gram = torch.stack(parts).sum(0, dtype=torch.float64).to(matrix.dtype)
    squares = matrix.square().sum(-2, dtype=torch.float64).to(matrix.dtype)
    return gram.diagonal_scatter(squares, dim1=-2, dim2=-1)


def times(matrix: Tensor, square: Tensor) -> Tensor:
    """Product AB of a tall and a square matrix, in the layout of A: its transpose may be stored."""
    if matrix.stride(-2) < matrix.stride(-1):
        return (square.mT @ matrix.mT).mT
    return matrix @ square


def divided(matrix: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two blocks of rows, whose gradients are stacked in the layout of the matrix."""
    if matrix.stride(-2) < matrix.stride(-1):
        top, bottom = matrix.mT.split(rows, -1)
        return top.mT, bottom.mT
    top, bottom = matrix.split(rows, -2)
    return top, bottom


def stacked(top: Tensor, bottom: Tensor) -> Tensor:
    """Two blocks of rows in one matrix, in the layout of the lower one."""
    if bottom.stride(-2) < bottom.stride(-1):
        return torch.cat((top.mT, bottom.mT), -1).mT
    return torch.cat((top, bottom), -2)


def is_elongated(matrix: Tensor) -> bool:
    """Whether products with a tall matrix take long enough to look at values for a faster course.

    That is, if it is in float32, has four times as many rows as columns, and is not small. Nothing
    is looked at on accelerators, where that would wait, nor in a traced program, which has one
    course.
    """
    m, n = matrix.shape[-2:]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    large = m >= 4 * n and m * n**2 >= 2**22
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu" and large and not traced


def negligible(dtype: torch.dtype) -> float:
    """Scale below which a matrix counts as zero, to keep its gradient finite."""
    return torch.finfo(dtype).eps ** 2


# Note [why from above]
# A spectral norm estimated by power iteration is too small, and a matrix divided by it too large.
# Both divisors here are upper bounds, √(‖A‖₁‖A‖∞) and then the norm of the Gram matrix that
# is at hand anyway. The second is 1 if the columns are orthonormal already: no step is wasted on
# bringing such a matrix back up.


def scaled_from_above(matrix: Tensor) -> Tensor:
    """Divide by an upper bound of the spectral norm."""
    least = negligible(matrix.dtype)
    row_sum = matrix.abs().sum(-1).amax(-1).clamp(min=least)
    column_sum = matrix.abs().sum(-2).amax(-1).clamp(min=least)
    matrix = matrix / (row_sum.sqrt() * column_sum.sqrt())[..., None, None]
    gram = matrix.mT @ matrix
    norm = torch.minimum(gram.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(gram))
    return matrix / norm.clamp(min=torch.finfo(gram.dtype).eps).sqrt()[..., None, None]


# Note [what assigning a weight does]
# torch calls right_inverse with the nn.Parameter of the layer when a parametrization is registered,
# and with a plain tensor when a weight is assigned, ``layer.weight = Q``. What is registered starts
# from the nearest weight that meets the constraint, once: here a layer becomes another, by demand.
# Of what is assigned right_inverse finds a raw parameter whose image it is. A weight that is no
# image is refused: to take the nearest one instead would change a network in silence.


class Orthonormal(nn.Module):
    """Parametrization by a map that leaves orthonormal matrices as they are."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an orthonormal ``weight`` itself as the raw parameter."""
        return raw_of(check_orthonormal(weight), weight)


class Signed(nn.Module):
    """Parametrization by a map that reaches orthonormal matrices up to signs of their columns.

    The signs (of the rows, if these are fewer) are a buffer, chosen when a weight is assigned.
    """

    signs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("signs", None)

    def _signed(self, matrix: Tensor) -> Tensor:
        wide = matrix.shape[-2] < matrix.shape[-1]
        return matrix * (self.signs[:, None] if wide else self.signs)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Find signs and a raw parameter for an orthonormal ``weight``."""
        tall = check_orthonormal(weight)
        raw, signs = (tall, tall[0]) if tall.is_meta else self._invert(tall)
        self.signs = signs.to(weight.dtype)
        return raw_of(raw, weight)

    @abc.abstractmethod
    def _invert(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        """Find a raw parameter and signs for an orthonormal matrix, tall or square."""


def check_matrix(weight: Tensor) -> Tensor:
    """Refuse what is no matrix, such as the kernel of a convolution; return it in float64."""
    if weight.dim() != 2:
        raise ValueError(
            "weight must be a matrix (for kernels of convolutions see lipbook.convolutions), "
            f"got shape {tuple(weight.shape)}"
        )
    return weight.detach().double()


def check_orthonormal(weight: Tensor) -> Tensor:
    """Return an orthonormal weight tall and in float64, see Note [what assigning a weight does]."""
    tall = check_matrix(weight)
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.mT
    which = "columns" if tall.shape == weight.shape else "rows"
    defect = gram_defect(tall).abs().max()
    expected = f"weight must have orthonormal {which}"
    return admitted(weight, tall, defect, defect, expected, "polar", _nearest)


def _nearest(tall: Tensor) -> Tensor:
    """Orthonormal matrix nearest to one of any rank."""
    left, _, right = torch.linalg.svd(tall, full_matrices=False)
    return left @ right


def admitted(
    weight: Tensor,
    exact: Tensor,
    value: Tensor,
    excess: Tensor,
    expected: str,
    way: str,
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Admit a weight in float64, refuse or replace it, see Note [what assigning a weight does]."""
    tolerance = math.sqrt(torch.finfo(weight.dtype).eps)
    if exact.is_meta or excess <= tolerance:
        return exact
    if isinstance(weight, nn.Parameter) and excess < math.inf:
        return nearest(exact)
    raise ValueError(
        f"{expected} (to {tolerance:.1e}), got {value.item():.6g}: assign {way}(weight) instead"
    )


def raw_of(matrix: Tensor, weight: Tensor) -> Tensor:
    """Raw parameter for a weight, from a matrix that may be tall where the weight is wide."""
    matrix = matrix if matrix.shape == weight.shape else matrix.mT
    return matrix.to(weight.dtype, copy=True).contiguous()
