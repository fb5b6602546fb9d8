"""What the maps share: scaling from above, polishing, and the check of what is assigned."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = [
    "map_tall",
    "working_dtype",
    "eye_like",
    "gram_defect",
    "add_to_diagonal",
    "polish",
    "negligible",
    "scaled_from_above",
    "Orthonormal",
    "Signed",
    "check_orthonormal",
    "check_small",
]

# Note [polishing]
# LAPACK's orthogonal factors are off by 1e-6 in float32 at n = 1024, those of a Cayley transform
# or an exponential by 1e-7 times the norm of the argument. One Björck step squares such an error:
# singular values 1 + e become 1 - 3e²/2. It also takes every singular value in [0, 2] into [0, 1],
# so that what it cannot mend is at least nonexpansive. On an orthonormal matrix the step is the
# identity to first order along all directions that stay orthonormal, so the hand-written
# gradients below leave it out.


def map_tall(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Apply a map of tall matrices to a tall or wide one, in float32 at least."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"matrix must be a real floating-point tensor, got {kind}")
    if matrix.dim() < 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    wide = matrix.shape[-2] < matrix.shape[-1]
    with torch.autocast(matrix.device.type, enabled=False):
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
    return matrix @ add_to_diagonal(-0.5 * (matrix.mT @ matrix), 1.5)


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
# ``layer.weight = Q`` calls right_inverse, which finds a raw parameter whose image is Q. A Q that
# is no image is refused: to take the nearest one instead would change a network in silence.


class Orthonormal(nn.Module):
    """Parametrization by a map that leaves orthonormal matrices as they are."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an orthonormal ``weight`` itself as the raw parameter."""
        check_orthonormal(weight)
        return weight


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
        raw, signs = self._invert(tall)
        self.signs = signs.to(weight.dtype)
        return (raw if weight.shape[0] >= weight.shape[1] else raw.mT).to(weight.dtype)

    def _invert(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def check_orthonormal(weight: Tensor) -> Tensor:
    """Refuse a weight that is not orthonormal; return it tall and in float64."""
    tall = (weight if weight.shape[0] >= weight.shape[1] else weight.mT).detach().double()
    which = "columns" if tall.shape == weight.shape else "rows"
    defect = gram_defect(tall).abs().max()
    check_small(f"weight must have orthonormal {which}", defect, defect, weight)
    return tall


def check_small(expected: str, value: Tensor, excess: Tensor, weight: Tensor) -> None:
    """Refuse a weight whose excess is more than rounding."""
    tolerance = math.sqrt(torch.finfo(weight.dtype).eps)
    if not excess <= tolerance:
        raise ValueError(f"{expected} (to {tolerance:.1e}), got {value.item():.6g}")
