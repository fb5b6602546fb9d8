"""One table of all layers, and what happens to a layer from its first step to its last file.

A row names a layer, the shape of a sample, what is guaranteed of its Jacobian and what it freezes
to. Every test below runs for every row. The judge of a guarantee is NumPy in float64: singular
values, row sums or row norms of the Jacobian at a random point.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import default_partition, nop
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lipbook import (
    activations,
    attention,
    convolutions,
    distances,
    normalization,
    orthogonal,
    pooling,
    residual,
    sequences,
)
from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
    SmoothAbsoluteValue,
)
from lipbook.attention import BallProjection, EnergyAttention, EnergyStep, L2MultiheadAttention
from lipbook.composition import Residual, Sum, check_layer, lipschitz_bound
from lipbook.convolutions import (
    BlockReflectorConv2d,
    CayleyConv2d,
    NonexpansiveConv1d,
    NonexpansiveConv2d,
    NonexpansiveConv3d,
    NonexpansiveConvTranspose1d,
    NonexpansiveConvTranspose2d,
    NonexpansiveConvTranspose3d,
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    OrthogonalConvTranspose1d,
    OrthogonalConvTranspose2d,
    OrthogonalConvTranspose3d,
    ShiftConv2d,
    SkewOrthogonalConv2d,
    SkewOrthogonalConvTranspose2d,
)
from lipbook.distances import InfinityDistance
from lipbook.export import (
    ConvolutionStep,
    DenseStep,
    SandwichStep,
    export_onnx,
    freeze,
    load_weights,
    save_weights,
)
from lipbook.normalization import (
    BatchCentering,
    LayerCentering,
    ScalarBatchNorm,
    ScaleAndBias,
    Unscale,
)
from lipbook.orthogonal import (
    BlockReflectorLinear,
    InfinityNormLinear,
    OrthogonalLinear,
    Scale,
    SpectralNormLinear,
    UnitNormLinear,
)
from lipbook.pooling import (
    AveragePooling,
    InvertibleDownsampling,
    InvertibleUpsampling,
    NormPooling,
    Upsampling,
)
from lipbook.residual import (
    AverageResidual,
    ConcatenatedResidual,
    CPLConv2d,
    CPLLinear,
    NormResidual,
    OrthogonalResidual,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
)
from lipbook.rounding import forward_error
from lipbook.sequences import CausalOrthogonalConv1d, LosslessRNN

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, the shape of a sample, its guarantee, and the class of its frozen copy."""

    make: Callable[[], nn.Module]
    shape: Shape
    guarantee: str
    frozen: type[nn.Module] | None = None  # None: its own class


def row(make: Callable[[], nn.Module], shape: Shape, guarantee: str, frozen: Any = None) -> Row:
    return Row(make, shape, guarantee, frozen)


def linear(m: int, n: int, method: Any) -> Row:
    return row(lambda: OrthogonalLinear(n, m, method=method), (n,), "orthogonal", nn.Linear)


class Outputs(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _AtRest(nn.Module):
    """A layer that follows its batches, kept from it: test_normalization.py trains them."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class CenteringAtRest(_AtRest, BatchCentering):
    pass


class ScalarAtRest(_AtRest, ScalarBatchNorm):
    pass


class DistanceAtRest(_AtRest, InfinityDistance):
    pass


IMAGE = (3, 6, 6)
TABLE = {
    "qr": linear(4, 4, "qr"),
    "qr, wide": linear(3, 5, "qr"),
    "qr, tall": linear(5, 3, "qr"),
    "cholesky_qr": linear(5, 4, "cholesky_qr"),
    "polar": linear(4, 5, "polar"),
    "cayley": linear(4, 4, "cayley"),
    "cayley, wide": linear(4, 6, "cayley"),
    "exp": linear(5, 4, "exp"),
    "householder": linear(4, 6, "householder"),
    "bjorck": linear(4, 5, "bjorck"),
    "spectral norm": row(lambda: SpectralNormLinear(5, 4), (5,), "nonexpansive", nn.Linear),
    "infinity norm": row(lambda: InfinityNormLinear(5, 4), (5,), "rows of sum 1", nn.Linear),
    "unit norm": row(lambda: UnitNormLinear(5, 4), (5,), "rows of norm 1", nn.Linear),
    "scale": row(lambda: Scale(-2.5), (5,), "norm 2.5"),
    "distance": row(lambda: InfinityDistance(5, 4), (5,), "rows of sum 1"),
    "sorted distance": row(lambda: DistanceAtRest(5, 4, 0.3).eval(), (5,), "rows of sum 1"),
    # convolutions
    "bcop": row(lambda: OrthogonalConv2d(3, 4, 3), IMAGE, "orthogonal", nn.Conv2d),
    "bcop, narrow": row(lambda: OrthogonalConv2d(3, 2, (1, 3)), IMAGE, "orthogonal", nn.Conv2d),
    "bcop, even": row(lambda: OrthogonalConv2d(3, 4, 2), IMAGE, "orthogonal", nn.Conv2d),
    "bcop, dilated": row(
        lambda: OrthogonalConv2d(3, 4, 3, dilation=2), IMAGE, "orthogonal", nn.Conv2d
    ),
    "bcop, groups": row(
        lambda: OrthogonalConv2d(4, 8, 3, groups=2), (4, 5, 4), "orthogonal", nn.Conv2d
    ),
    "bcop, valid": row(
        lambda: OrthogonalConv2d(3, 3, 3, padding="valid"), IMAGE, "orthogonal", nn.Conv2d
    ),
    "bcop, zeros": row(
        lambda: OrthogonalConv2d(3, 4, 3, padding_mode="zeros"), IMAGE, "nonexpansive", nn.Conv2d
    ),
    "bcop, even, zeros": row(
        lambda: OrthogonalConv2d(3, 4, 2, padding_mode="zeros"), IMAGE, "nonexpansive"
    ),
    "bcop, stride": row(lambda: OrthogonalConv2d(3, 5, 3, stride=2), IMAGE, "orthogonal"),
    "bcop, stride, even": row(lambda: OrthogonalConv2d(3, 12, 4, stride=2), IMAGE, "orthogonal"),
    "bcop, stride, zeros": row(
        lambda: OrthogonalConv2d(3, 5, 3, stride=2, padding_mode="zeros"),
        IMAGE,
        "nonexpansive",
        nn.Conv2d,
    ),
    "bcop, stride, groups": row(
        lambda: OrthogonalConv2d(4, 6, (3, 2), stride=2, groups=2), (4, 4, 6), "orthogonal"
    ),
    "bcop, unshuffle": row(
        lambda: OrthogonalConv2d(2, 8, 4, stride=2, method="bcop_unshuffle"),
        (2, 4, 6),
        "orthogonal",
    ),
    "bcop, 1-D": row(lambda: OrthogonalConv1d(4, 3, 4), (4, 7), "orthogonal", nn.Conv1d),
    "bcop, 1-D, stride": row(lambda: OrthogonalConv1d(2, 5, 3, stride=2), (2, 8), "orthogonal"),
    "bcop, 3-D": row(
        lambda: OrthogonalConv3d(2, 3, (2, 1, 3)), (2, 3, 2, 4), "orthogonal", nn.Conv3d
    ),
    "transposed bcop": row(
        lambda: OrthogonalConvTranspose2d(8, 3, 3, stride=2), (8, 3, 2), "orthogonal"
    ),
    "transposed bcop, zeros": row(
        lambda: OrthogonalConvTranspose2d(8, 3, 4, stride=2, padding_mode="zeros"),
        (8, 3, 2),
        "nonexpansive",
        nn.ConvTranspose2d,
    ),
    "transposed bcop, groups": row(
        lambda: OrthogonalConvTranspose2d(4, 4, 3, groups=2), (4, 3, 4), "orthogonal"
    ),
    "transposed bcop, 1-D": row(
        lambda: OrthogonalConvTranspose1d(5, 3, 4, stride=2), (5, 4), "orthogonal"
    ),
    "transposed bcop, 3-D": row(
        lambda: OrthogonalConvTranspose3d(4, 2, 2, padding=0, padding_mode="zeros"),
        (4, 2, 3, 2),
        "nonexpansive",
        nn.ConvTranspose3d,
    ),
    "aol": row(lambda: NonexpansiveConv2d(3, 4, 3), IMAGE, "nonexpansive", nn.Conv2d),
    "aol, stride": row(lambda: NonexpansiveConv2d(3, 6, 3, stride=2), IMAGE, "nonexpansive"),
    "aol, steps": row(
        lambda: NonexpansiveConv2d(3, 4, 2, steps=3), IMAGE, "nonexpansive", nn.Conv2d
    ),
    "aol, depthwise": row(
        lambda: NonexpansiveConv2d(3, 3, 3, groups=3), IMAGE, "nonexpansive", nn.Conv2d
    ),
    "aol, 1-D": row(lambda: NonexpansiveConv1d(3, 4, 3), (3, 6), "nonexpansive", nn.Conv1d),
    "aol, transposed": row(
        lambda: NonexpansiveConvTranspose2d(4, 6, 4, stride=2, groups=2), (4, 3, 2), "nonexpansive"
    ),
    "aol, transposed, 1-D": row(
        lambda: NonexpansiveConvTranspose1d(4, 2, 4, stride=2), (4, 3), "nonexpansive"
    ),
    "aol, transposed, 3-D": row(
        lambda: NonexpansiveConvTranspose3d(4, 2, 2), (4, 2, 3, 2), "nonexpansive"
    ),
    "rko, transposed": row(
        lambda: NonexpansiveConvTranspose2d(4, 2, 3, padding_mode="zeros", method="rko"),
        (4, 3, 2),
        "nonexpansive",
        nn.ConvTranspose2d,
    ),
    "rko": row(lambda: NonexpansiveConv2d(3, 4, 3, method="rko"), IMAGE, "nonexpansive", nn.Conv2d),
    "rko, groups": row(
        lambda: NonexpansiveConv2d(4, 4, 3, groups=2, method="rko"),
        (4, 5, 4),
        "nonexpansive",
        nn.Conv2d,
    ),
    "rko, symmetric": row(
        lambda: NonexpansiveConv2d(4, 4, 3, groups=2, padding_mode="symmetric", method="rko"),
        (4, 3, 4),
        "nonexpansive",
    ),
    "rko, 3-D": row(
        lambda: NonexpansiveConv3d(2, 3, (1, 3, 2), method="rko"),
        (2, 2, 3, 2),
        "nonexpansive",
        nn.Conv3d,
    ),
    "soc": row(lambda: SkewOrthogonalConv2d(3, 4, 3), IMAGE, "nearly orthogonal"),
    "soc, stride": row(
        lambda: SkewOrthogonalConv2d(2, 6, 3, stride=2, terms=4, groups=2),
        (2, 4, 4),
        "roughly orthogonal",
    ),
    "transposed soc": row(
        lambda: SkewOrthogonalConvTranspose2d(6, 2, 3, stride=2, terms=4, groups=2),
        (6, 2, 2),
        "roughly orthogonal",
    ),
    "block reflector": row(lambda: BlockReflectorLinear(4, 6), (4,), "orthogonal", nn.Linear),
    "block reflector convolution": row(
        lambda: BlockReflectorConv2d(3, 4, 3, (4, 6)), (3, 4, 6), "orthogonal"
    ),
    "block reflector convolution, stride": row(
        lambda: BlockReflectorConv2d(2, 5, 2, 6, stride=2), (2, 6, 6), "orthogonal"
    ),
    "cayley convolution": row(lambda: CayleyConv2d(3, 4, 3, (4, 6)), (3, 4, 6), "orthogonal"),
    "cayley convolution, stride": row(
        lambda: CayleyConv2d(2, 5, 2, 6, stride=2), (2, 6, 6), "orthogonal"
    ),
    "shift convolution": row(lambda: ShiftConv2d(3, 5), IMAGE, "orthogonal"),
    "shift convolution, stride": row(
        lambda: ShiftConv2d(2, 5, 2, [(0, 1), (-1, 2)], method="polar"), (2, 4, 6), "orthogonal"
    ),
    # residual layers
    "sll": row(lambda: SLLLinear(5, 7), (5,), "nonexpansive", DenseStep),
    "cpl": row(lambda: CPLLinear(5, activation="tanh"), (5,), "nonexpansive", DenseStep),
    "sll convolution, stride and groups": row(
        lambda: SLLConv2d(4, 6, stride=2, groups=2), (4, 6, 4), "nonexpansive", ConvolutionStep
    ),
    "sll convolution": row(lambda: SLLConv2d(3, 4), IMAGE, "nonexpansive", ConvolutionStep),
    "cpl convolution": row(
        lambda: CPLConv2d(3, 2, 5, "zeros", "softplus"), IMAGE, "nonexpansive", ConvolutionStep
    ),
    "sandwich": row(lambda: SandwichLinear(5, 4, 7), (5,), "nonexpansive", SandwichStep),
    "sandwich, many units": row(
        lambda: SandwichLinear(2, 3, 7, "tanh"), (2,), "nonexpansive", SandwichStep
    ),
    "sandwich convolution": row(
        lambda: SandwichConv2d(2, 3, 2, 4, 2, stride=2), (2, 4, 4), "nonexpansive"
    ),
    "average residual": row(
        lambda: AverageResidual(OrthogonalLinear(5, 5), weight=0.3), (5,), "nonexpansive"
    ),
    "average residual, stride": row(
        lambda: AverageResidual(NonexpansiveConv2d(3, 12, 2, stride=2), InvertibleDownsampling(2)),
        IMAGE,
        "nonexpansive",
    ),
    "norm residual": row(
        lambda: NormResidual(OrthogonalLinear(5, 5), weight=0.3, eps=1e-3), (5,), "nonexpansive"
    ),
    "orthogonal residual": row(
        lambda: OrthogonalResidual(OrthogonalLinear(3, 3), angle=0.4), (6,), "orthogonal"
    ),
    "concatenated residual": row(
        lambda: ConcatenatedResidual(OrthogonalLinear(4, 5), angle=0.4), (4,), "orthogonal"
    ),
    # sequences
    "lossless recurrence": row(
        lambda: Outputs(LosslessRNN(3, 5, batch_first=True)), (4, 3), "nonexpansive"
    ),
    "causal convolution": row(lambda: CausalOrthogonalConv1d(3, 4, 3), (3, 6), "nonexpansive"),
    # attention
    "energy attention": row(lambda: EnergyAttention(4, 2), (5, 4), "nonexpansive", EnergyStep),
    "energy attention, one token": row(
        lambda: EnergyAttention(3, 2, 5), (1, 3), "nonexpansive", EnergyStep
    ),
    "l2 attention": row(
        lambda: L2MultiheadAttention(4, 2, nonexpansive=True), (5, 4), "nonexpansive"
    ),
    "causal l2 attention": row(
        lambda: L2MultiheadAttention(4, 2, nonexpansive=True, is_causal=True),
        (5, 4),
        "nonexpansive",
    ),
    "ball projection": row(lambda: BallProjection(1.5), (5, 4), "nonexpansive"),
    # normalisation
    "layer centering": row(LayerCentering, IMAGE, "nonexpansive"),
    "layer centering, pixels": row(lambda: LayerCentering((2, 3)), IMAGE, "nonexpansive"),
    "batch centering": row(lambda: CenteringAtRest(3).eval(), IMAGE, "one number"),
    "scalar batch norm": row(lambda: ScalarAtRest(5, eps=1e-2).eval(), (5,), "one number"),
    "unscale": row(
        lambda: Unscale(ScalarAtRest(5, eps=1e-2, bias=False).eval()), (5,), "one number"
    ),
    "scale and bias": row(lambda: ScaleAndBias(3, -0.7), IMAGE, "one number"),
    # pooling
    "downsampling": row(lambda: InvertibleDownsampling(2), IMAGE, "orthogonal"),
    "invertible upsampling": row(lambda: InvertibleUpsampling((1, 3)), IMAGE, "orthogonal"),
    "norm pooling": row(lambda: NormPooling(2), IMAGE, "orthogonal"),
    "average pooling": row(lambda: AveragePooling((2, 3)), IMAGE, "orthogonal"),
    "average pooling, global": row(lambda: AveragePooling("global"), IMAGE, "orthogonal"),
    "norm pooling, overlapping": row(lambda: NormPooling(3, 2, 1), IMAGE, "nonexpansive"),
    "average pooling, overlapping": row(lambda: AveragePooling(4, 2), IMAGE, "nonexpansive"),
    "norm pooling, global": row(lambda: NormPooling("global"), IMAGE, "orthogonal"),
    "upsampling": row(lambda: Upsampling(2), (3, 3, 2), "orthogonal"),
    # activations
    "groupsort": row(lambda: GroupSort(3), (6,), "orthogonal"),
    "maxmin": row(MaxMin, (4, 3, 2), "orthogonal"),
    "maxmin, halves": row(lambda: MaxMin(pairing="halves"), (6,), "orthogonal"),
    "fullsort": row(FullSort, (5,), "orthogonal"),
    "householder activation": row(lambda: Householder(6), (6, 2, 2), "orthogonal"),
    "householder activation, halves": row(
        lambda: Householder(6, pairing="halves"), (6, 2), "orthogonal"
    ),
    "householder activation of order 2": row(lambda: HouseholderOrder2(6), (6, 2), "orthogonal"),
    "n-activation": row(lambda: NActivation(6), (6, 2), "orthogonal"),
    "absolute value": row(AbsoluteValue, (5,), "orthogonal"),
    "smooth absolute value": row(SmoothAbsoluteValue, (5,), "nonexpansive"),
}
every_row = pytest.mark.parametrize("name", TABLE)
# A recurrent layer gives two tensors: what is one layer to others is one of them, and is measured
# in test_sequences.py.
leaf_rows = pytest.mark.parametrize("name", [name for name in TABLE if "recurrence" not in name])
trainable_rows = pytest.mark.parametrize(
    "name", [name for name, each in TABLE.items() if any(True for _ in each.make().parameters())]
)
# Tests that take long go through one row a layer and method: a comma names a variant.
SELECTED = [name for name in TABLE if "," not in name or name == "bcop, stride, groups"]

# Deviation that the library promises for matrices of up to 1024 rows, and so for tiny ones.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
LEAST = {"orthogonal": 1.0, "nearly orthogonal": 1 - 3e-6, "roughly orthogonal": 1 - 7e-3}


def jacobian(layer: nn.Module, x: Tensor) -> np.ndarray[Any, Any]:
    """Matrix of the derivative at a sample, in the dtype of the layer."""
    matrix = torch.func.jacrev(lambda z: layer(z[None])[0])(x)
    return matrix.detach().reshape(-1, x.numel()).double().numpy()


def assert_guarantee(name: str, layer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    guarantee, tolerance = TABLE[name].guarantee, TOLERANCE[dtype]
    matrix = jacobian(layer, torch.randn(TABLE[name].shape, dtype=dtype))
    if guarantee == "rows of sum 1":
        assert np.abs(matrix).sum(1).max() <= 1 + tolerance
    elif guarantee == "rows of norm 1":
        assert np.abs(np.linalg.norm(matrix, axis=1) - 1).max() <= tolerance
    elif guarantee == "one number":
        assert np.abs(matrix - matrix[0, 0] * np.eye(len(matrix))).max() <= tolerance
    elif guarantee == "norm 2.5":
        assert np.abs(np.linalg.svd(matrix, compute_uv=False) - 2.5).max() <= tolerance
    else:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values[0] <= 1 + tolerance
        assert values[-1] >= LEAST.get(guarantee, 0) - tolerance


def train(
    layer: nn.Module, shape: Shape, steps: int, after: Callable[[], object] | None = None
) -> None:
    """Regress noise by AdamW, at a large rate and with weight decay."""
    x = torch.randn(4, *shape)
    target = torch.randn_like(layer(x))
    parameters = list(layer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1) if parameters else None
    for _ in range(steps):
        if optimizer is not None:
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        if after is not None:
            after()


@functools.cache
def trained_state(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of a layer before and after 25 steps."""
    torch.manual_seed(1)
    layer = TABLE[name].make()
    before = copy.deepcopy(layer.state_dict())
    train(layer, TABLE[name].shape, 25)
    return before, layer.state_dict()


def trained(name: str) -> tuple[nn.Module, Shape]:
    """A layer of its own for each caller, after 25 steps."""
    layer = TABLE[name].make()
    layer.load_state_dict(trained_state(name)[1])
    return layer, TABLE[name].shape


def constraints(layer: nn.Module) -> dict[str, Tensor]:
    """What is computed from raw parameters: constrained weights, and scales of potential steps."""
    found = {}
    if parametrize.is_parametrized(layer):
        names: Any = layer.parametrizations
        found = {name: getattr(layer, name).detach() for name in names}
    if hasattr(layer, "scale"):
        found["scale"] = layer.scale().detach()
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -------------------------------------------------------------------------------- the rows


def test_the_table_has_every_layer_of_the_library() -> None:
    in_table: set[type[nn.Module]] = set()
    for each in TABLE.values():
        layer = each.make()
        in_table |= set(type(layer).__mro__[:3])
        in_table |= {type(part) for part in layer.modules()}
    for module in (
        *(activations, attention, convolutions, distances, normalization),
        *(orthogonal, pooling, residual, sequences),
    ):
        public = {getattr(module, name) for name in module.__all__}
        layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
        assert layers <= in_table, {each.__name__ for each in layers - in_table}


@every_row
def test_the_guarantee_holds_after_25_steps(name: str) -> None:
    layer, _ = trained(name)
    before, after = trained_state(name)
    moved = [not torch.equal(before[key], after[key]) for key in dict(layer.named_parameters())]
    assert all(moved)
    assert_guarantee(name, layer)
    assert_guarantee(name, layer.eval())


@leaf_rows
def test_every_answer_of_the_layer_holds(name: str) -> None:
    row = TABLE[name]
    report = check_layer(row.make().eval(), row.shape, samples=6)
    assert {"range", "frozen copy", "gradient"} <= {question for question, _, _ in report.rows}


@every_row
def test_reading_changes_nothing(name: str) -> None:
    layer, shape = trained(name)
    x = torch.randn(2, *shape)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), first)
    assert same(layer.state_dict(), trained_state(name)[1])


@every_row
def test_float64(name: str) -> None:
    layer, shape = trained(name)
    layer.double()
    assert_guarantee(name, layer, torch.float64)
    frozen, x = freeze(layer), torch.randn(3, *shape, dtype=torch.float64)
    assert torch.equal(frozen(x), layer(x))


NUMPY: dict[str, tuple[Callable[[Any], nn.Module], Shape]] = {
    "linear": (lambda i: OrthogonalLinear(i(4), i(3)), (4,)),
    "unit norm": (lambda i: UnitNormLinear(i(4), i(3)), (4,)),
    "bcop": (lambda i: OrthogonalConv2d(i(4), i(8), i(3), i(1), groups=i(2)), (4, 4, 4)),
    "bcop, stride": (lambda i: OrthogonalConv2d(i(2), i(8), (i(2), i(4)), stride=i(2)), (2, 4, 4)),
    "transposed": (lambda i: OrthogonalConvTranspose1d(i(4), i(2), i(4), i(2)), (4, 4)),
    "aol": (lambda i: NonexpansiveConv2d(i(2), i(3), i(3), stride=i(2)), (2, 4, 4)),
    "soc": (lambda i: SkewOrthogonalConv2d(i(2), i(3), i(3), i(1), terms=i(4)), (2, 4, 4)),
    "cayley": (lambda i: CayleyConv2d(i(2), i(3), i(3), i(4)), (2, 4, 4)),
    "shift": (lambda i: ShiftConv2d(i(2), i(3), i(2), [(i(0), i(1))]), (2, 4, 4)),
    "sll": (lambda i: SLLLinear(i(4), i(5)), (4,)),
    "cpl": (lambda i: CPLConv2d(i(2), i(3), i(3)), (2, 4, 4)),
    "sandwich": (lambda i: SandwichLinear(i(4), i(3), i(5)), (4,)),
    "groupsort": (lambda i: GroupSort(i(2)), (4,)),
    "householder": (lambda i: Householder(i(4)), (4,)),
    "n-activation": (lambda i: NActivation(i(4)), (4,)),
    "pooling": (lambda i: AveragePooling(i(2)), (2, 4, 4)),
    "pooling, each axis": (lambda i: NormPooling((i(2), i(4))), (2, 4, 4)),
}


@pytest.mark.parametrize("name", NUMPY)
def test_integers_of_numpy_are_integers(name: str) -> None:
    make, shape = NUMPY[name]
    plain, other = make(int), make(np.int64)
    assert repr(other) == repr(plain)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, *shape)
    assert torch.equal(other(x), plain(x))
    assert not any(isinstance(value, np.integer) for value in vars(other).values())


# ------------------------------------------------------------------------------------ copies


@every_row
def test_state_dict_and_file_round_trip(name: str, tmp_path: Path) -> None:
    layer, shape = trained(name)
    x = torch.randn(3, *shape)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twins = [TABLE[name].make() for _ in range(2)]
    twins[0].load_state_dict(torch.load(buffer, weights_only=True))
    save_weights(layer, tmp_path / "layer.safetensors")
    load_weights(twins[1], tmp_path / "layer.safetensors")
    for twin in twins:
        assert same(twin.state_dict(), layer.state_dict())
        assert torch.equal(twin(x), layer(x))
    frozen, frozen_twin = freeze(layer), freeze(TABLE[name].make())
    save_weights(frozen, tmp_path / "frozen.safetensors")
    load_weights(frozen_twin, tmp_path / "frozen.safetensors")
    assert torch.equal(frozen_twin(x), layer(x))


@every_row
def test_deepcopy_is_independent(name: str) -> None:
    layer, shape = trained(name)
    x = torch.randn(3, *shape)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    train(twin, shape, 2)
    assert torch.equal(layer(x), expected)
    assert same(layer.state_dict(), trained_state(name)[1])
    assert not list(layer.parameters()) or not torch.equal(twin(x), expected)


@trainable_rows
@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_averages_keep_the_guarantee(name: str, use_buffers: bool) -> None:
    layer = TABLE[name].make()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    train(layer, TABLE[name].shape, 8, after=lambda: average.update_parameters(layer))
    assert_guarantee(name, average.module)
    for mean, latest in zip(average.module.parameters(), layer.parameters(), strict=True):
        assert not torch.equal(mean, latest)


@pytest.mark.parametrize("method", ["cayley", "householder", "exp"])
def test_averaged_buffers_of_two_bases_lose_orthogonality(method: Any) -> None:
    """A weight assigned between two averages changes signs or base: keep buffers out of it."""
    values = {}
    for use_buffers in (False, True):
        layer = OrthogonalLinear(6, 6, method=method)
        layer.weight = torch.eye(6)
        average = AveragedModel(layer, use_buffers=use_buffers)
        average.update_parameters(layer)
        layer.weight = -torch.eye(6)
        average.update_parameters(layer)
        values[use_buffers] = np.linalg.svd(average.module.weight.detach().double().numpy())[1]
    assert np.abs(values[False] - 1).max() <= 1e-6
    assert values[True].max() <= 1 + 1e-6  # nonexpansive in any case
    assert values[True].min() < 0.5


# ------------------------------------------------------------------------------------ freeze


@every_row
def test_a_frozen_layer_has_the_same_bits(name: str) -> None:
    layer, shape = trained(name)
    frozen = freeze(layer)
    own = type(layer).__mro__[parametrize.is_parametrized(layer)]
    assert type(frozen) is (TABLE[name].frozen or own)
    assert not any(parametrize.is_parametrized(module) for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    loaded = pickle.loads(pickle.dumps(frozen))
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        for mode in (True, False):
            expected = layer.train(mode)(x)
            assert torch.equal(frozen(x), expected)
            assert torch.equal(loaded(x), expected)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(frozen(x), layer(x))
    assert same(layer.state_dict(), trained_state(name)[1])


@every_row
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_frozen_layer_has_the_same_bound(name: str, p: float) -> None:
    layer, shape = trained(name)
    bound, of_frozen = lipschitz_bound(layer, shape, p), lipschitz_bound(freeze(layer), shape, p)
    assert (of_frozen.value, of_frozen.kind) == (bound.value, bound.kind)
    assert of_frozen.output_shape == bound.output_shape


def test_frozen_layers_load_in_a_fresh_process(tmp_path: Path) -> None:
    frozen, inputs, outputs = {}, {}, {}
    names = [
        name
        for name in TABLE
        if all(m.__module__ != __name__ for m in TABLE[name].make().modules())
    ]
    for name in names:
        layer, shape = trained(name)
        frozen[name], inputs[name] = freeze(layer), torch.randn(2, *shape)
        outputs[name] = layer(inputs[name]).detach()
    torch.save(frozen, tmp_path / "frozen.pt")
    torch.save((inputs, outputs), tmp_path / "data.pt")
    code = """if True:
        import torch
        frozen = torch.load("frozen.pt", weights_only=False)
        inputs, outputs = torch.load("data.pt")
        same = [name for name in frozen if torch.equal(frozen[name](inputs[name]), outputs[name])]
        print(*same, sep=";")
    """
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip().split(";") == names


# ------------------------------------------------------------------------ half precision


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_constraint_alone(name: str, dtype: torch.dtype) -> None:
    layer, shape = trained(name)
    x = torch.randn(2, *shape)
    outside = constraints(layer)
    expected = layer(x).detach()
    with torch.autocast("cpu", dtype):
        assert same(constraints(layer), outside)
        outputs = layer(x)
        outputs.float().square().mean().backward() if outputs.requires_grad else None
    # Roundoff of inputs, weights and outputs, eps / 2 each, in at most ten steps one by one.
    tolerance = 15 * torch.finfo(dtype).eps * max(1, x.abs().max().item())
    torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=tolerance)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


# ------------------------------------------------------------------------ transformations


@every_row
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning"
)  # householder, torch's
def test_functional_call_vmap_and_jacrev(name: str) -> None:
    layer, shape = trained(name)
    layer.double()
    layers = [layer, TABLE[name].make().double()]
    x = torch.randn(2, *shape, dtype=torch.float64)
    states = [each.state_dict() for each in layers]

    def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, state, (x,))

    for state, each in zip(states, layers, strict=True):
        assert torch.equal(run(state, x), each(x))
    if states[0]:
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        outputs = torch.func.vmap(run, (0, None))(stacked, x)
        torch.testing.assert_close(outputs, torch.stack([each(x) for each in layers]))

    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    if parameters:  # and not buffers alone
        loss = lambda parameters, x: run(states[0] | parameters, x[None]).square().sum()  # noqa: E731
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        layer(x).square().sum().backward()
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[key].sum(0), parameter.grad)

    matrix = jacobian(layer, x[0])
    direction = torch.randn(shape, dtype=torch.float64)
    ends = [layer((x[0] + sign * 1e-5 * direction)[None]).detach() for sign in (1, -1)]
    chord = (ends[0] - ends[1]).flatten().numpy() / 2e-5
    np.testing.assert_allclose(matrix @ direction.flatten().numpy(), chord, rtol=0, atol=1e-8)


@every_row
def test_a_layer_can_be_pickled_as_a_whole(name: str) -> None:
    layer, shape = trained(name)
    x = torch.randn(3, *shape)
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)[0]
    for twin in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(layer))):
        assert type(twin).__mro__[1:] == type(layer).__mro__[1:]
        assert same(twin.state_dict(), layer.state_dict())
        assert torch.equal(twin(x), layer(x))
    train(loaded, shape, 3)
    assert same(layer.state_dict(), trained_state(name)[1])
    assert not list(layer.parameters()) or not same(loaded.state_dict(), layer.state_dict())
    assert_guarantee(name, loaded)


def contiguous(layer: nn.Module) -> bool:
    return all(tensor.is_contiguous() for tensor in layer.state_dict().values())


@every_row
def test_raw_parameters_are_contiguous(name: str) -> None:
    layer = TABLE[name].make()
    assert contiguous(layer)
    state = {
        key: value.mT.contiguous().mT if value.dim() > 1 else value
        for key, value in trained_state(name)[1].items()
    }
    layer.load_state_dict(state)
    assert contiguous(layer)
    if parametrize.is_parametrized(layer):  # a plain layer keeps the layout of what it is given
        layer.load_state_dict(state, assign=True)
        assert contiguous(layer)
        assert same(layer.state_dict(), state)
    if isinstance(layer, nn.Linear) and not isinstance(layer, BlockReflectorLinear):
        layer.weight = layer.weight.detach().mT.contiguous().mT
        assert contiguous(layer)


@every_row
@pytest.mark.parametrize("context", [False, True])
def test_layers_can_be_made_without_memory(name: str, context: bool) -> None:
    """On the meta device, by an argument or by a context, then filled."""
    with torch.device("meta"):
        layer = TABLE[name].make()
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    if context:
        assert layer(torch.empty(2, *TABLE[name].shape, device="meta")).is_meta
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():  # what memory may hold
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer.state_dict().keys() == trained_state(name)[0].keys()
    assert_guarantee(name, layer)
    train(layer, TABLE[name].shape, 2)
    assert_guarantee(name, layer)


@every_row
def test_a_memory_format_can_be_asked_for(name: str) -> None:
    layer, shape = trained(name)
    x = torch.randn(2, *shape)
    expected = layer(x)
    formats = {3: torch.channels_last, 4: torch.channels_last_3d}
    memory_format = formats.get(len(shape), torch.channels_last)
    layer.to(memory_format=memory_format)
    assert not parametrize.is_parametrized(layer) or contiguous(layer)
    if len(shape) in formats:
        x = x.contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer(x), expected)
    layer.to(torch.float64, memory_format=memory_format)
    assert_guarantee(name, layer, torch.float64)


@trainable_rows
def test_forward_mode_and_hessians_in_the_parameters(name: str) -> None:
    """Against differences of values, and of gradients by reverse mode, in float64."""
    layer, shape = trained(name)
    layer.double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    start = {key: value.detach() for key, value in layer.named_parameters()}
    tangents = {key: torch.randn_like(value) for key, value in start.items()}
    weights = torch.randn_like(layer(x))

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    def gradient(parameters: dict[str, Tensor]) -> Tensor:
        found = torch.func.grad(lambda each: (run(each) * weights).sum())(parameters)
        return torch.cat([found[key].flatten() for key in start])

    def chord(function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        ends = [{key: start[key] + h * tangents[key] for key in start} for h in (1e-6, -1e-6)]
        return (function(ends[0]) - function(ends[1])) / 2e-6

    for function in (run, gradient):
        expected = chord(function).detach()
        found = torch.func.jvp(function, (start,), (tangents,))[1].detach()
        assert (found - expected).norm() <= 1e-6 * max(1, expected.norm().item())
    with torch.autograd.forward_ad.dual_level():
        make_dual = torch.autograd.forward_ad.make_dual
        dual = run({key: make_dual(start[key], tangents[key]) for key in start})
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, torch.func.jvp(run, (start,), (tangents,))[1])


@leaf_rows  # torch.fx keeps torch's own recurrent layers whole, and no other loop over time
def test_fx_traces(name: str) -> None:
    layer, shape = trained(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        assert torch.equal(traced(x), layer(x))


# ---------------------------------------------------------------------------- rows in one net


class Side(nn.Module):
    """Rows side by side: each reads its part of a vector and writes its part of the output."""

    def __init__(self, names: list[str], others: Sequence[tuple[nn.Module, Shape]] = ()) -> None:
        super().__init__()
        pairs = [*((TABLE[name].make(), TABLE[name].shape) for name in names), *others]
        self.layers = nn.ModuleList(layer for layer, _ in pairs)
        self.shapes = [shape for _, shape in pairs]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def parts(self, x: Tensor) -> list[Tensor]:
        pieces = zip(self.layers, self.shapes, x.split(self.sizes, 1), strict=True)
        return [layer(piece.unflatten(1, shape)).flatten(1) for layer, shape, piece in pieces]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 1)


def joined() -> Side:
    """All that is compiled, trained: tracing them in one graph takes half as long as one by one."""
    net = Side(
        SELECTED,
        [
            (Sum(OrthogonalLinear(4, 4), nn.Tanh()), (4,)),
            (Residual(OrthogonalLinear(4, 4)), (4,)),
        ],
    )
    for name, layer in zip(SELECTED, net.layers, strict=False):
        layer.load_state_dict(trained_state(name)[1])
    return net


def compiled(net: nn.Module) -> tuple[nn.Module, list[torch.fx.GraphModule]]:
    """A net as torch compiles it, and the graphs that it has been compiled to so far.

    No backend makes kernels here. The first graph has its gradient traced, too.
    """
    graphs: list[torch.fx.GraphModule] = []
    trace_gradient = aot_autograd(fw_compiler=nop, partition_fn=default_partition)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return trace_gradient(graph, inputs) if len(graphs) == 1 else graph

    torch.compiler.reset()
    return torch.compile(net, backend=backend, fullgraph=True), graphs


# Equal sizes are taken for the same, and no axis has these; from 16 on torch's own convolution is
# another.
BATCHES = (11, 13, 14, 9, 8, 7, 10)


def assert_rows_agree(net: Side, found: Tensor, x: Tensor) -> None:
    expected = net.parts(x)
    parts = found.split([part.shape[1] for part in expected], 1)
    for layer, part, other in zip(net.layers, expected, parts, strict=True):
        torch.testing.assert_close(other, part, msg=lambda text, at=layer: f"{at}: {text}")


# torch's own tracer trips over its own deprecation here
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks_and_for_a_second_batch_for_all() -> None:
    """Outputs and gradients; the first batch is compiled for alone, and then all others at once."""
    net = joined()
    program, graphs = compiled(net)
    x = torch.randn(BATCHES[0], sum(net.sizes), requires_grad=True)
    outputs, expected = program(x), net(x)
    assert_rows_agree(net, outputs, x)
    leaves = {"x": x, **dict(net.named_parameters())}
    cotangent = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, [*leaves.values()], cotangent) for y in (outputs, expected))
    for name, *pair in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: at + text)
    for batch in BATCHES[1:]:
        x = torch.randn(batch, sum(net.sizes))
        assert_rows_agree(net, program(x), x)
    assert len(graphs) == 2


def test_onnxruntime_agrees(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    names = [name for name in SELECTED if not hasattr(TABLE[name].make(), "not_in_onnx")]
    assert len(names) == len(SELECTED) - 3  # those that multiply in frequencies
    net = Side(names)
    state = torch.get_rng_state()
    export_onnx(net, tmp_path / "rows.onnx", (sum(net.sizes),))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "rows.onnx")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("input", ["batch", sum(net.sizes)])
    assert (made.name, made.shape[0]) == ("output", "batch")
    for batch in (1, 2, 7):
        x = torch.randn(batch, sum(net.sizes))
        outputs = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        expected = net.parts(x)
        found = outputs.split([part.shape[1] for part in expected], 1)
        for name, part, other in zip(names, expected, found, strict=True):
            assert (part - other).abs().max() <= 1e-5, name


def descend(rank: int, ranks: int, folder: str) -> None:
    """Five steps on a share of the batch; rank 0 writes what the net has become."""
    net: nn.Module = Side(SELECTED).double()
    net.load_state_dict(torch.load(f"{folder}/start.pt"))
    x, target = torch.load(f"{folder}/data.pt")
    x, target = x.chunk(ranks)[rank], target.chunk(ranks)[rank]
    if ranks > 1:
        torch.set_num_threads(1)
        if sys.platform == "linux":  # no need to look up what the machine is called
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
        )
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    if ranks > 1:
        torch.save(net.module.state_dict(), f"{folder}/rank{rank}.pt")
        torch.distributed.destroy_process_group()
    else:
        torch.save(net.state_dict(), f"{folder}/alone.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch built without it")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel averages gradients over two halves of a batch: the same steps."""
    net = Side(SELECTED).double()
    x = torch.randn(4, sum(net.sizes), dtype=torch.float64)
    torch.save(net.state_dict(), tmp_path / "start.pt")
    torch.save((x, torch.randn_like(net(x))), tmp_path / "data.pt")
    descend(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(descend, (2, str(tmp_path)), nprocs=2)
    start, alone, *ranks = (
        torch.load(tmp_path / f"{name}.pt") for name in ("start", "alone", "rank0", "rank1")
    )
    assert same(ranks[0], ranks[1])
    parameters = dict(net.named_parameters())
    for key, value in ranks[0].items():
        torch.testing.assert_close(value, alone[key], rtol=1e-9, atol=1e-11, msg=key)
        assert key not in parameters or not torch.equal(value, start[key])
    net.load_state_dict(ranks[0])
    for name, layer in zip(SELECTED, net.layers, strict=True):
        assert_guarantee(name, layer, torch.float64)


@pytest.mark.parametrize("name", TABLE)
def test_a_frozen_layer_has_the_error_of_its_layer(name: str) -> None:
    """Or is refused as the layer is: what can be certified can be frozen and certified."""
    row = TABLE[name]
    layer, x = row.make().eval(), torch.randn(2, *row.shape)
    found = []
    for module in (layer, freeze(layer)):
        try:
            error = forward_error(module, x, 2)
        except (TypeError, ValueError):
            found.append(None)
        else:
            found.append((error.lipschitz, error.slope, error.error.tolist()))
    assert found[0] == found[1]
