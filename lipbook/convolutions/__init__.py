r"""Orthogonal and 1-Lipschitz convolutions.

A convolution with kernel :math:`K` on a circular image is block-diagonalised by the Fourier
transform: it is orthogonal exactly if its frequency response
:math:`\hat K(\theta) = \sum_t K_t e^{\mathrm i\langle\theta, t\rangle}` is unitary at each angle.
The constructions here hold for all angles, hence for images of all sizes (those of Cayley and of
block reflectors excepted). First the maps from free tensors to kernels, then a torch
parametrization of each, so that ``layer.weight`` *is* the constrained kernel, then the layers.

=============================  ==================================  ======================
layer                          singular values (circular padding)  kernel
=============================  ==================================  ======================
``OrthogonalConv``: BCOP       all 1                               any size, k ≥ stride
``NonexpansiveConv``: RKO      at most 1; all 1 if k = stride      any size
``NonexpansiveConv``: AOL      at most 1                           any size
``SkewOrthogonalConv``: SOC    between 1 - 3e-6 and 1              odd size; not explicit
``ShiftConv2d``                all 1                               a matrix, then shifts
``CayleyConv2d``               all 1                               as large as the image
``BlockReflectorConv2d``: BRO  all 1                               as large as the image
=============================  ==================================  ======================

"All 1" means that the convolution keeps the norm of its input if there are no more inputs than
outputs, and the norm of gradients if there are no more outputs than inputs (semi-orthogonal).
Zero padding instead of circular padding keeps the guarantee "at most 1" and gives up the other.
Padding by reflection or replication copies pixels, which takes the norm above 1: it is refused.
Symmetric padding reads each pixel as often as circular padding does, which is enough for RKO.
"""

from lipbook.convolutions.bcop import (
    BCOP,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
)
from lipbook.convolutions.block_convolution import bcop_kernel, block_convolution
from lipbook.convolutions.cayley import CayleyConv2d, CayleyKernel, cayley_kernel
from lipbook.convolutions.circular import circular_fold, circular_pad
from lipbook.convolutions.nonexpansive import (
    AOL,
    RKO,
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
    NonexpansiveConvTranspose1d,
    NonexpansiveConvTranspose2d,
    NonexpansiveConvTranspose3d,
    aol_kernel,
    kernel_norm_bound,
    rko_kernel,
)
from lipbook.convolutions.reflector import (
    BlockReflectorConv2d,
    BlockReflectorKernel,
    block_reflector_kernel,
)
from lipbook.convolutions.shift import ShiftConv2d, channel_shift
from lipbook.convolutions.skew import (
    SOC,
    SkewOrthogonalConv2d,
    SkewOrthogonalConvTranspose2d,
    skew_exponential,
    skew_kernel,
)
from lipbook.convolutions.starts import identity_, orthogonal_

__all__ = [
    "block_convolution",
    "bcop_kernel",
    "rko_kernel",
    "aol_kernel",
    "kernel_norm_bound",
    "skew_kernel",
    "skew_exponential",
    "cayley_kernel",
    "block_reflector_kernel",
    "channel_shift",
    "circular_pad",
    "circular_fold",
    "orthogonal_",
    "identity_",
    "BCOP",
    "RKO",
    "AOL",
    "SOC",
    "CayleyKernel",
    "BlockReflectorKernel",
    "OrthogonalConv1d",
    "OrthogonalConv2d",
    "OrthogonalConv3d",
    "OrthogonalConvTranspose1d",
    "OrthogonalConvTranspose2d",
    "OrthogonalConvTranspose3d",
    "NonexpansiveConv1d",
    "NonexpansiveConv2d",
    "NonexpansiveConv3d",
    "NonexpansiveConvTranspose1d",
    "NonexpansiveConvTranspose2d",
    "NonexpansiveConvTranspose3d",
    "SkewOrthogonalConv2d",
    "SkewOrthogonalConvTranspose2d",
    "CayleyConv2d",
    "BlockReflectorConv2d",
    "ShiftConv2d",
]
