"""Linear layers whose weight is constrained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipbook.composition import Bound, lipschitz_rule
from lipbook.errors import (
    Analysis,
    _closed_form,
    _cuda_rule_of,
    _error_rule_of,
    _relative,
    plain_kernels,
)
from lipbook.freezing import register_plain
from lipbook.norms.arguments import _integer, _real
from lipbook.orthogonal.bounded import (
    InfinityNorm,
    SpectralNorm,
    UnitNorm,
    project_l1_ball,
    unit_rows,
)
from lipbook.orthogonal.constrained import Constrained, raw_parameters
from lipbook.orthogonal.factorisations import QR, CholeskyQR, qr
from lipbook.orthogonal.iterations import Bjorck, Polar
from lipbook.orthogonal.orthonormality import working_dtype
from lipbook.orthogonal.reflections import BlockReflector, HouseholderProduct
from lipbook.orthogonal.rotations import Cayley, MatrixExp

__all__ = [
    "OrthogonalLinear",
    "BlockReflectorLinear",
    "SpectralNormLinear",
    "InfinityNormLinear",
    "UnitNormLinear",
    "Scale",
]

Method = Literal["qr", "cholesky_qr", "polar", "cayley", "exp", "householder", "bjorck"]


METHODS: dict[str, Callable[[], nn.Module]] = {
    "qr": QR,
    "cholesky_qr": CholeskyQR,
    "polar": Polar,
    "cayley": Cayley,
    "exp": MatrixExp,
    "householder": HouseholderProduct,
    "bjorck": Bjorck,
}


def draw_orthonormal(like: Tensor) -> Tensor:
    """Draw a matrix with orthonormal columns or rows, uniformly among all."""
    gaussian = torch.randn_like(like, dtype=working_dtype(like.dtype))
    return qr(gaussian).to(like.dtype)


class _ConstrainedLinear(Constrained, nn.Linear):
    """Linear layer whose weight is the image of a raw parameter."""

    _constraint: Callable[[], nn.Module]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inputs = _integer("in_features", in_features, 1)
        outputs = _integer("out_features", out_features, 1)
        super().__init__(inputs, outputs, bias, device=device, dtype=dtype)
        parametrize.register_parametrization(self, "weight", self._constraint())

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        raw = raw_parameters(self)[0]
        weight = self._draw(torch.empty_like(raw, requires_grad=False))
        if parametrize.is_parametrized(self):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def _draw(self, weight: Tensor) -> Tensor:
        return draw_orthonormal(weight)


class OrthogonalLinear(_ConstrainedLinear):
    r"""Linear layer whose weight has orthonormal rows, or columns if it has fewer of them.

    .. math:: x \mapsto W x + b, \qquad W W^\top = I \ (m \le n)
        \quad\text{or}\quad W^\top W = I \ (m \ge n)

    All singular values of the weight are 1: a square layer keeps the norm of every vector and of
    every gradient, a layer that widens keeps the norm of every vector, and one that narrows keeps
    the norm of every gradient.

    The methods reach the same matrices by different paths. How exact each is, for which raw
    parameters, is said in the docstring of its map; those that are not exact everywhere fall
    short of 1 and do not exceed it.

    ``"qr"`` (the default)
        :func:`qr`: exact for every raw parameter, and fast.
    ``"cholesky_qr"``
        :func:`cholesky_qr`: the same map from matrix products and triangular solves. Exact for
        condition numbers up to 2e3.
    ``"polar"``
        :func:`polar`: the best conditioned gradient, and no row or column is treated before
        another. Exact for condition numbers up to about 1e4. Matrix products and one
        eigendecomposition.
    ``"cayley"``
        :func:`cayley`: exact for every raw parameter, and as fast. Learns slowly far from where
        it starts, and keeps the component of the orthogonal group (the sign of the determinant)
        that it starts in.
    ``"exp"``
        :func:`matrix_exp`: exact for every raw parameter, slow. Keeps the component.
    ``"householder"``
        :func:`householder_product`: exact for every raw parameter, slow backward pass. Keeps the
        component.
    ``"bjorck"``
        :func:`bjorck` of order 1 with 15 steps, the method of the first Lipschitz networks:
        nonexpansive always, orthogonal while the raw parameter is well-conditioned.

    Parameters
    ----------
    in_features, out_features : int
        Numbers n and m of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    method : str
        One of the above.
    device, dtype
        Of the parameters. In float16 and bfloat16 the weight is computed in float32 and rounded.

    Raises
    ------
    ValueError
        If ``method`` is unknown; if a weight is assigned that is not orthonormal.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read, so that what is written into it in place, as
    by ``torch.nn.init.uniform_(layer.weight)``, is lost without an error. Call
    ``reset_parameters()`` to draw anew, assign an orthonormal weight,
    ``layer.weight = polar(weight)``, or write into the raw parameter,
    ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer = OrthogonalLinear(5, 3)
    >>> bool((torch.linalg.svdvals(layer.weight) - 1).abs().max() < 1e-6)
    True

    Any treatment of the raw parameter leaves the weight orthonormal, and an orthonormal weight can
    be assigned:

    >>> with torch.no_grad():
    ...     _ = layer.parametrizations.weight.original.mul_(0.01).add_(1)
    >>> bool((torch.linalg.svdvals(layer.weight) - 1).abs().max() < 1e-6)
    True
    >>> layer.weight = torch.eye(3, 5)
    >>> torch.equal(layer.weight, torch.eye(3, 5))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        method: Method = "qr",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if method not in tuple(METHODS):
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
        self._constraint = METHODS[method]
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)


class BlockReflectorLinear(Constrained, nn.Linear):
    r"""Linear layer whose weight is a block reflector, or rows or columns of one.

    .. math:: x \mapsto W x + b, \qquad W = I - 2 V (V^\top V)^{-1} V^\top

    for n inputs and n outputs; of a larger reflector the first rows or columns are taken if one of
    the numbers is smaller. **Guaranteed**: all singular values of the weight are 1, for all raw
    parameters (:func:`block_reflector`). A square weight is symmetric, and no rotation by a small
    angle: stacks of two reach more.

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    rank : int, optional
        Columns of V; half of the larger number if not given.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If ``rank`` exceeds the larger number.

    Notes
    -----
    ``layer.weight`` is computed whenever it is read, and no weight can be assigned. Call
    ``reset_parameters()`` to draw anew, or write into the raw parameter,
    ``layer.parametrizations.weight.original``.

    Examples
    --------
    >>> layer, x = BlockReflectorLinear(8, 8, bias=False), torch.randn(3, 8)
    >>> torch.allclose(layer(layer(x)), x, atol=1e-5)
    True

    References
    ----------
    :cite:t:`lai2025bro`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inputs = _integer("in_features", in_features, 1)
        outputs = _integer("out_features", out_features, 1)
        larger = max(inputs, outputs)
        rank = (larger + 1) // 2 if rank is None else _integer("rank", rank, 1)
        if rank > larger:
            raise ValueError(f"rank must be at most {larger}, the larger number, got {rank}")
        super().__init__(inputs, outputs, bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(larger, rank, device=device, dtype=dtype))
        constraint = BlockReflector(outputs, inputs)
        parametrize.register_parametrization(self, "weight", constraint, unsafe=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors, and a bias as torch does."""
        nn.init.normal_(raw_parameters(self)[0])
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)


class SpectralNormLinear(_ConstrainedLinear):
    r"""Linear layer whose weight has spectral norm at most 1.

    .. math:: x \mapsto W x + b, \qquad \lVert W\rVert_2 \le 1

    1-Lipschitz in the :math:`\ell_2` norm, by :func:`clip_spectral_norm`. Only the largest singular
    value is controlled: the layer starts orthogonal and need not stay so.

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose spectral norm exceeds 1.

    Notes
    -----
    What is written into ``layer.weight`` in place is lost, as in :class:`OrthogonalLinear`: assign
    ``layer.weight = clip_spectral_norm(weight)``.

    Examples
    --------
    >>> layer = SpectralNormLinear(5, 3)
    >>> with torch.no_grad():
    ...     _ = layer.parametrizations.weight.original.mul_(10)
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-6)
    True
    """

    _constraint = SpectralNorm


class InfinityNormLinear(_ConstrainedLinear):
    r"""Linear layer whose absolute row sums are at most 1.

    .. math:: x \mapsto W x + b, \qquad
        \lVert W\rVert_\infty = \max_i \sum_j \lvert W_{ij}\rvert \le 1

    1-Lipschitz in the :math:`\ell_\infty` norm, by :func:`project_l1_ball`. With such layers and
    GroupSort every function that is 1-Lipschitz in that norm can be approximated
    (:cite:t:`anil2019sorting`, theorem 3).

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose absolute row sums exceed 1.

    Notes
    -----
    What is written into ``layer.weight`` in place is lost, as in :class:`OrthogonalLinear`: assign
    ``layer.weight = project_l1_ball(weight)``.

    Examples
    --------
    >>> layer = InfinityNormLinear(5, 3)
    >>> bool(layer.weight.abs().sum(1).max() <= 1 + 1e-6)
    True
    """

    _constraint = InfinityNorm

    def _draw(self, weight: Tensor) -> Tensor:
        return project_l1_ball(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))


class UnitNormLinear(_ConstrainedLinear):
    r"""Linear layer whose rows have Euclidean norm 1, for the last layer of a classifier.

    .. math:: x \mapsto W x + b, \qquad \lVert w_i\rVert_2 = 1 \text{ for each row}

    **Each output** is 1-Lipschitz in the :math:`\ell_2` norm, and the difference of outputs i and j
    is :math:`\lVert w_i - w_j\rVert_2`-Lipschitz, 2 at most, which is all that a certificate needs.
    The layer is not 1-Lipschitz: its norm is between 1 and the square root of the number of rows.

    Where it is the last layer, :func:`~lipbook.robustness.certify` takes these pairs and not the
    norm; :func:`~lipbook.robustness.certified_radius` and :func:`~lipbook.losses.emma_loss` do with
    ``head=layer.weight``. After 1-Lipschitz layers a margin :math:`m` of classes i and j is then
    worth :math:`m / \lVert w_i - w_j\rVert_2`: :math:`m / 2` at least, and more than
    :math:`m / \sqrt2` where the rows are at an acute angle.

    Parameters
    ----------
    in_features, out_features : int
        Numbers of inputs and outputs.
    bias : bool
        Whether to add a learnt bias.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a weight is assigned whose rows do not have norm 1.

    Notes
    -----
    What is written into ``layer.weight`` in place is lost, as in :class:`OrthogonalLinear`: assign
    ``layer.weight = unit_rows(weight)``.

    Examples
    --------
    >>> layer = UnitNormLinear(5, 3)
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
    True

    References
    ----------
    :cite:t:`singla2022improved`.
    """

    _constraint = UnitNorm

    def _draw(self, weight: Tensor) -> Tensor:
        return unit_rows(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))


class Scale(nn.Module):
    r"""Multiplication by a constant, which turns a 1-Lipschitz network into a K-Lipschitz one.

    .. math:: x \mapsto K x

    Its Lipschitz constant is :math:`\lvert K\rvert` in every norm.

    Parameters
    ----------
    constant : float
        The factor :math:`K`, fixed.

    Raises
    ------
    ValueError
        If ``constant`` is not finite.

    Examples
    --------
    >>> Scale(3.0)(torch.tensor([1.0, -2.0]))
    tensor([ 3., -6.])
    """

    def __init__(self, constant: float) -> None:
        super().__init__()
        _real("constant", constant)
        if not math.isfinite(constant):
            raise ValueError(f"constant must be finite, got {constant}")
        self.constant = float(constant)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` by the constant."""
        return self.constant * x

    def extra_repr(self) -> str:
        """Show the constant."""
        return f"{self.constant:g}"


@lipschitz_rule.register
def _(module: Scale, input_shape: tuple[int, ...], p: float) -> Bound:
    return Bound(abs(module.constant), "exact", p)


@_error_rule_of(Scale)
def _(module: Scale, example: Tensor, p: float) -> Analysis:
    lipschitz = _closed_form(module, example, p)
    return lambda x: _relative(module, x, p, lipschitz, 3)  # the constant and the product


_cuda_rule_of(Scale)(plain_kernels)


for _layer in (
    OrthogonalLinear,
    BlockReflectorLinear,
    SpectralNormLinear,
    InfinityNormLinear,
    UnitNormLinear,
):
    register_plain(_layer, nn.Linear)
