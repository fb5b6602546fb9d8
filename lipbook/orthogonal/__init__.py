r"""Orthogonal and norm-bounded linear layers.

First the maps: each takes any real matrix to one with orthonormal columns (orthonormal rows if
it is wide) or with a bounded norm. Then one torch parametrization for each map, so that
``layer.weight`` *is* the constrained matrix. Then the layers, which are :class:`torch.nn.Linear`
with the constraint registered.

All maps are functions of the matrix alone: no state, no random start, no norm estimated from
below. They are computed in the dtype of the matrix, in float32 if that is float16 or bfloat16,
whatever autocast says. So weight decay, gradient clipping, averaging or anything else that
happens to the raw parameter leaves the constraint intact.

The layers have no Lipschitz rule of their own. :func:`~lipbook.composition.lipschitz_bound`
reads the constrained weight and takes its exact operator norm, as for any
:class:`torch.nn.Linear`, so that a bound never rests on what a method promises.
"""

from lipbook.orthogonal.bounded import (
    InfinityNorm,
    SpectralNorm,
    UnitNorm,
    clip_spectral_norm,
    project_l1_ball,
    unit_rows,
)
from lipbook.orthogonal.factorisations import QR, CholeskyQR, cholesky_qr, qr
from lipbook.orthogonal.iterations import Bjorck, Polar, bjorck, polar
from lipbook.orthogonal.layers import (
    BlockReflectorLinear,
    InfinityNormLinear,
    OrthogonalLinear,
    Scale,
    SpectralNormLinear,
    UnitNormLinear,
)
from lipbook.orthogonal.reflections import (
    BlockReflector,
    HouseholderProduct,
    block_reflector,
    householder_product,
)
from lipbook.orthogonal.rotations import Cayley, MatrixExp, cayley, matrix_exp

__all__ = [
    "bjorck",
    "polar",
    "qr",
    "cholesky_qr",
    "cayley",
    "matrix_exp",
    "householder_product",
    "block_reflector",
    "clip_spectral_norm",
    "project_l1_ball",
    "unit_rows",
    "Bjorck",
    "Polar",
    "QR",
    "CholeskyQR",
    "Cayley",
    "MatrixExp",
    "HouseholderProduct",
    "BlockReflector",
    "SpectralNorm",
    "InfinityNorm",
    "UnitNorm",
    "OrthogonalLinear",
    "BlockReflectorLinear",
    "SpectralNormLinear",
    "InfinityNormLinear",
    "UnitNormLinear",
    "Scale",
]
