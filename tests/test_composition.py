"""Every rule against an oracle outside the library; bounds one-sided, refusals one by one.

Oracles: the dense matrix of a linear layer with NumPy's norms, mpmath-free grids for slopes,
naive loops for windows, and the enumeration of all linear pieces of a small ReLU network.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lipbook.composition import (
    Bound,
    Residual,
    Sum,
    lipschitz_bound,
    lipschitz_lower_bound,
    lipschitz_rule,
)

NORMS = (1, 2, math.inf)
EPS = torch.finfo(torch.float64).eps


def tolerance(m: int, n: int) -> float:
    """Relative error allowed between two float64 computations of the norm of an m×n matrix."""
    return 64 * EPS * (m + n) * math.sqrt(min(m, n))


def dense(module: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """Matrix (m, n) of an affine module, one column an input."""
    n = math.prod(shape)
    with torch.no_grad():
        columns = module(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
        offset = module(torch.zeros(1, *shape, dtype=torch.float64))
    return (columns - offset).reshape(n, -1).T.numpy()


def operator_norm(matrix: np.ndarray, p: float) -> float:
    return float(np.linalg.norm(matrix, p))


def check_linear(module: nn.Module, shape: tuple[int, ...], kind: str = "exact") -> None:
    """The bound of an affine module is its norm, or above it where it says so."""
    matrix = dense(module, shape)
    for p in NORMS:
        bound = lipschitz_bound(module, shape, p)
        truth = operator_norm(matrix, p)
        slack = 1 + tolerance(*matrix.shape)
        assert bound.kind in (kind, "exact")
        assert bound.p == p
        assert truth <= bound.value * slack
        if bound.kind == "exact":
            assert bound.value <= truth * slack
        with torch.no_grad():
            outputs = module(torch.zeros(1, *shape, dtype=torch.float64))
        assert bound.output_shape == tuple(outputs.shape[1:])


def randomise(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Float64 copy with weights from a NumPy generator."""
    rng = np.random.default_rng(seed)
    module = module.double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.from_numpy(scale * rng.normal(size=tuple(weight.shape))))
    return module


seeds = st.integers(0, 2**32 - 1)


# ------------------------------------------------------------------------- linear layers


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(-6, 6))
def test_linear(seed: int, m: int, n: int, sequence: bool, decade: int) -> None:
    layer = randomise(nn.Linear(n, m), seed, 10.0**decade)
    check_linear(layer, (2, n) if sequence else (n,))


CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@settings(max_examples=100)
@given(seeds, st.data())
def test_convolution(seed: int, data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([1, 2, 2, 3]))
    transposed = data.draw(st.booleans())
    groups = data.draw(st.integers(1, 2))
    c_in, c_out = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    stride = data.draw(st.integers(1, 2))
    dilation = data.draw(st.integers(1, 2))
    sizes = tuple(data.draw(st.integers(3, 5 if dims < 3 else 3)) for _ in range(dims))
    mode, extra = "zeros", {}
    if transposed:
        padding = data.draw(st.integers(0, 1))
        extra["output_padding"] = data.draw(st.integers(0, max(stride, dilation) - 1))
    else:
        mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        padding = data.draw(st.sampled_from([0, 1, "same", "valid"]))
        assume(padding != "same" or stride == 1)
        extra["padding_mode"] = mode
    layer = CONVOLUTIONS[dims, transposed](
        c_in,
        c_out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        **extra,
    )
    shape = (c_in, *sizes)
    try:
        layer(torch.zeros(1, *shape))
    except RuntimeError:  # the kernel is larger than the padded image
        with pytest.raises(ValueError, match="does not run on inputs of shape"):
            lipschitz_bound(layer, shape)
        return
    check_linear(randomise(layer, seed), shape, kind="upper bound")


@pytest.mark.parametrize("padding", [(2, -1, 2, 0), (-1, 1, 0, 0), (0, 0, 1, -2), (1, 1, -1, 2)])
def test_circular_padding_that_reads_unset_memory_is_refused(padding: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="crop one side of an axis and pad the other"):
        lipschitz_bound(nn.CircularPad2d(padding), (2, 4, 5))


@pytest.mark.parametrize("padding", [(1, 2, 0, 0), (-1, -1, 2, 1), (-1, 0, 0, 1), (2, 2, -2, 0)])
def test_circular_padding_writes_all_that_it_returns(padding: tuple[int, ...]) -> None:
    layer, x = nn.CircularPad2d(padding), torch.randn(1, 2, 4, 5)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert not bool(layer(x).isnan().any())
    finally:
        torch.use_deterministic_algorithms(False)
    copies = layer(torch.ones(1, 2, 4, 5)).sum() / 40
    assert lipschitz_bound(layer, (2, 4, 5)).value >= math.sqrt(copies) * (1 - 1e-7)


def test_a_circular_convolution_is_exact() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    assert lipschitz_bound(layer, (2, 5, 4)).kind == "exact"


def test_batch_norm() -> None:
    layer = nn.BatchNorm2d(3, eps=0.5).double().eval()
    layer.running_var.copy_(torch.tensor([3.5, 0.75, 15.5]))
    layer.weight.data = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    bound = lipschitz_bound(layer, (3, 2, 2))
    assert bound.value == pytest.approx(2 / math.sqrt(1.25), rel=1e-15)  # 0.5, 1.79, 1
    check_linear(layer, (3, 2, 2))
    check_linear(randomise(nn.BatchNorm1d(4).eval(), 0), (4,))
    check_linear(randomise(nn.BatchNorm1d(4).eval(), 0), (4, 3))
    check_linear(nn.BatchNorm3d(2, affine=False).double().eval(), (2, 1, 2, 2))
    assert lipschitz_bound(nn.SyncBatchNorm(2, eps=3.0).eval(), (2, 3)).value == 0.5


AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@st.composite
def windows(draw: st.DrawFn) -> dict:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    return {
        "dims": dims,
        "kernel_size": kernel,
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
        "sizes": tuple(draw(st.integers(k, 6 if dims < 3 else k + 1)) for k in kernel),
    }


@settings(max_examples=120)
@given(windows(), st.booleans(), st.sampled_from([None, 1, 3, -2]))
def test_average_pooling(window: dict, count_include_pad: bool, divisor: int | None) -> None:
    dims, sizes = window.pop("dims"), window.pop("sizes")
    window["count_include_pad"] = count_include_pad
    if divisor and dims > 1:
        window["divisor_override"] = divisor
    check_linear(AVERAGES[dims](**window), (2, *sizes))


@pytest.mark.parametrize(
    ("pool", "norms"),
    [
        (nn.AvgPool2d(2), (0.25, 0.5, 1.0)),  # k×k without overlap: 1/k
        (nn.AvgPool2d(3, ceil_mode=True), (1.0, 1.0, 1.0)),  # 4×4: a window of one pixel
        (nn.AvgPool2d(2, divisor_override=1), (1.0, 2.0, 4.0)),
        (nn.AvgPool1d(3, stride=1, padding=1), (1.0, None, 1.0)),
        (nn.AdaptiveAvgPool2d(1), (1 / 16, 0.25, 1.0)),
    ],
)
def test_average_pooling_on_paper(pool: nn.Module, norms: tuple[float | None, ...]) -> None:
    shape = (1, 4) if isinstance(pool, nn.AvgPool1d) else (1, 4, 4)
    for p, norm in zip(NORMS, norms, strict=True):
        if norm is not None:
            assert lipschitz_bound(pool, shape, p).value == pytest.approx(norm, rel=1e-14)


def naive_overlap(axis: tuple[int, ...], dilation: int, ceil: bool) -> int:
    """Most windows that one pixel is in, counted pixel by pixel."""
    size, k, stride, pad = axis
    span = dilation * (k - 1) + 1
    last = (size + 2 * pad - span) / stride
    outputs = (math.ceil if ceil else math.floor)(last) + 1
    if ceil and (outputs - 1) * stride >= size + pad:  # a window must start in the image
        outputs -= 1
    counts = [0] * size
    for output, tap in itertools.product(range(outputs), range(k)):
        pixel = output * stride - pad + tap * dilation
        if 0 <= pixel < size:
            counts[pixel] += 1
    return max(counts)


def attained(module: nn.Module, shape: tuple[int, ...], p: float) -> float:
    """Largest quotient between zero and one spike."""
    return operator_norm(dense(module, shape), 1) ** (1 / p)


@settings(max_examples=120)
@given(windows(), st.integers(1, 2), seeds)
def test_max_pooling(window: dict, dilation: int, seed: int) -> None:
    dims, sizes = window.pop("dims"), window.pop("sizes")
    kernel = window["kernel_size"]
    sizes = tuple(n + (dilation - 1) * (k - 1) for n, k in zip(sizes, kernel, strict=True))
    pool = MAXIMA[dims](**window, dilation=dilation)
    per_axis = zip(sizes, kernel, window["stride"], window["padding"], strict=True)
    overlap = math.prod(naive_overlap(a, dilation, window["ceil_mode"]) for a in per_axis)
    shape = (2, *sizes)
    rng = np.random.default_rng(seed)
    pairs = torch.from_numpy(rng.normal(size=(2, 50, *shape)))
    for p in NORMS:
        bound = lipschitz_bound(pool, shape, p)
        assert bound.kind == "exact"
        assert bound.value == pytest.approx(overlap ** (1 / p), rel=1e-14)
        assert bound.value == pytest.approx(attained(pool, shape, p), rel=1e-14)  # tight
        rise, run = (
            torch.linalg.vector_norm((a[1] - a[0]).flatten(1), p, dim=1)
            for a in (torch.stack([pool(pairs[0]), pool(pairs[1])]), pairs)
        )
        assert (rise <= bound.value * run * (1 + tolerance(1, math.prod(shape)))).all()


def test_overlapping_max_pooling_stretches() -> None:
    """The usual 3×3 pool of stride 2: a pixel is in four windows, so distances can double."""
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    spike = torch.zeros(1, 1, 8, 8)
    spike[..., 3, 3] = 1
    assert pool(spike).norm() == 2
    assert [lipschitz_bound(pool, (1, 8, 8), p).value for p in NORMS] == [4, 2, 1]


@settings(max_examples=60)
@given(st.data())
def test_adaptive_pooling(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    sizes = tuple(data.draw(st.integers(1, 6 if dims < 3 else 4)) for _ in range(dims))
    target = tuple(data.draw(st.one_of(st.none(), st.integers(1, 7))) for _ in range(dims))
    if dims == 1 and target == (None,):
        target = (3,)
    average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    check_linear(average(target), (2, *sizes))
    maximum = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[dims - 1]
    for p in NORMS:
        bound = lipschitz_bound(maximum(target), (2, *sizes), p)
        assert bound.value == pytest.approx(attained(maximum(target), (2, *sizes), p), rel=1e-14)


PADDINGS = {
    (dims, mode): getattr(nn, f"{mode}Pad{dims}d")
    for dims, mode in itertools.product(
        (1, 2, 3), ("Zero", "Circular", "Reflection", "Replication")
    )
}


@settings(max_examples=80)
@given(st.data())
def test_padding(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    mode = data.draw(st.sampled_from(["Zero", "Constant", "Circular", "Reflection", "Replication"]))
    sizes = tuple(data.draw(st.integers(3, 4)) for _ in range(dims))
    low = -1 if mode in ("Zero", "Constant") else 0  # negative padding crops
    pads = tuple(data.draw(st.integers(low, 2)) for _ in range(2 * dims))
    if mode == "Constant":
        layer = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[dims - 1](pads, 0.7)
    else:
        layer = PADDINGS[dims, mode](pads)
    check_linear(layer, (1, *sizes))


@settings(max_examples=80)
@given(st.data())
def test_upsample(data: st.DataObject) -> None:
    mode = data.draw(
        st.sampled_from(["nearest", "nearest-exact", "area", "linear", "bilinear", "bicubic"])
    )
    dims = {"linear": 1, "bilinear": 2, "bicubic": 2}.get(mode) or data.draw(st.integers(1, 3))
    sizes = tuple(data.draw(st.integers(1, 4)) for _ in range(dims))
    align = data.draw(st.booleans()) if "linear" in mode or mode == "bicubic" else None
    if data.draw(st.booleans()):
        size = tuple(data.draw(st.integers(1, 6)) for _ in range(dims))
        layer = nn.Upsample(size=size, mode=mode, align_corners=align)
    else:
        factors = st.sampled_from([1.0, 1.5, 2.0, 2.6, 3.0])
        layer = nn.Upsample(
            scale_factor=tuple(data.draw(factors) for _ in range(dims)),
            mode=mode,
            align_corners=align,
            recompute_scale_factor=data.draw(st.sampled_from([None, True])),
        )
    check_linear(layer, (2, *sizes))


def test_upsample_on_paper() -> None:
    nearest = nn.Upsample(scale_factor=2)
    for p, norm in zip(NORMS, (4, 2, 1), strict=True):
        assert lipschitz_bound(nearest, (1, 5, 5), p).value == pytest.approx(norm, rel=1e-15)
    assert lipschitz_bound(nearest, (3, 5)).value == pytest.approx(math.sqrt(2), rel=1e-15)
    nearest = nn.UpsamplingNearest2d(scale_factor=2)
    assert lipschitz_bound(nearest, (1, 5, 5)).value == pytest.approx(2, rel=1e-15)
    check_linear(nn.UpsamplingBilinear2d(scale_factor=2), (1, 3, 4))
    for recompute in (None, True):  # 3 · 1.5 = 4.5 gives 4 pixels: a scale of 1.5, or of 4/3
        layer = nn.Upsample(scale_factor=1.5, mode="bicubic", recompute_scale_factor=recompute)
        check_linear(layer, (1, 3, 3))
    check_linear(nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 2))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Identity(), (3,)),
        (nn.Flatten(), (2, 3, 2)),
        (nn.Flatten(2), (2, 3, 2)),
        (nn.Unflatten(1, (2, 3)), (6, 2)),
        (nn.PixelShuffle(2), (8, 2, 3)),
        (nn.PixelUnshuffle(2), (2, 4, 6)),
        (nn.ChannelShuffle(2), (4, 2, 3)),
        (nn.Dropout(0.5).eval(), (3,)),
        (nn.Dropout(0.0), (3,)),
        (nn.Dropout2d().eval(), (3, 2, 2)),
        (nn.AlphaDropout().eval(), (3,)),
    ],
)
def test_rearrangements_are_isometries(module: nn.Module, shape: tuple[int, ...]) -> None:
    check_linear(module, shape)
    assert [lipschitz_bound(module, shape, p).value for p in NORMS] == [1, 1, 1]


# --------------------------------------------------------------------------- activations

ACTIVATIONS: list[tuple[nn.Module, float]] = [
    (nn.ReLU(), 1),
    (nn.ReLU(inplace=True), 1),
    (nn.ReLU6(), 1),
    (nn.LeakyReLU(0.2), 1),
    (nn.LeakyReLU(3.0), 3),
    (nn.LeakyReLU(-1.5), 1.5),
    (nn.PReLU(init=0.1), 1),
    (nn.PReLU(init=-2.0), 2),
    (nn.RReLU(0.5, 4.5).eval(), 2.5),
    (nn.ELU(), 1),
    (nn.ELU(2.5), 2.5),
    (nn.ELU(-2.5), 2.5),
    (nn.CELU(2.5), 1),
    (nn.SELU(), 1.7580993408473766),
    (nn.GELU(), 1.1289041451851548),
    (nn.GELU("tanh"), 1.1289930686587718),
    (nn.SiLU(), 1.0998393201288670),
    (nn.Mish(), 1.0884981612517279),
    (nn.Softplus(), 1),
    (nn.Softplus(beta=3.0), 1),
    (nn.Softsign(), 1),
    (nn.Softshrink(), 1),
    (nn.Tanh(), 1),
    (nn.Tanhshrink(), 1),
    (nn.Sigmoid(), 0.25),
    (nn.LogSigmoid(), 1),
    (nn.Hardtanh(-2, 0.5), 1),
    (nn.Hardsigmoid(), 1 / 6),
    (nn.Hardswish(), 1.5),
    (nn.Hardshrink(0.0), 1),
    (nn.Threshold(0.3, 0.3), 1),
]


def steepest_chord(function: Callable[[Tensor], Tensor], width: float = 1e-3) -> float:
    """Largest quotient over chords of this width, which no smooth or kinked slope can exceed."""
    grid = torch.arange(-25, 25, width, dtype=torch.float64)
    steps = (function(grid + width) - function(grid)).abs() / width
    start = grid[steps.argmax()].item()

    def quotient(x: float) -> float:
        ends = torch.tensor([[x], [x + width]], dtype=torch.float64)
        low, high = function(ends)[:, 0].tolist()
        return -abs(high - low) / width

    best = minimize_scalar(
        quotient, bounds=(start - width, start + width), method="bounded", options={"xatol": 1e-9}
    )
    return max(-best.fun, steps.max().item())


@pytest.mark.parametrize(("module", "slope"), ACTIVATIONS, ids=str)
def test_activation(module: nn.Module, slope: float) -> None:
    for p in NORMS:
        bound = lipschitz_bound(module, (1, 3), p)
        assert bound.kind == "exact"
        assert bound.value == pytest.approx(slope, rel=1e-14)
    out_of_place = copy.deepcopy(module).double()
    if hasattr(out_of_place, "inplace"):
        out_of_place.inplace = False
    with torch.no_grad():
        found = steepest_chord(lambda x: out_of_place(x.reshape(-1, 1, 1)).reshape(x.shape))
    # A chord of width w misses the largest slope by w² f'''/24, or not at all where it is constant;
    # on a side of a kink where the slope is exponential (ELU) by w/2.
    assert found <= slope * (1 + 1e-11)
    assert found >= slope * (1 - 6e-4)


def test_every_prelu_slope_counts() -> None:
    layer = nn.PReLU(3)
    layer.weight.data = torch.tensor([0.5, -4.0, 2.0])
    assert lipschitz_bound(layer, (3, 2)).value == 4


@pytest.mark.parametrize(
    "module",
    [
        nn.Hardshrink(),
        nn.Threshold(0.1, 20.0),
        nn.CELU(-1.0),
        nn.Softplus(threshold=1.0),
        nn.GLU(),
    ],
)
def test_activation_that_is_not_lipschitz(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="is not Lipschitz"):
        lipschitz_bound(module, (4,))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("cls", [nn.Softmax, nn.Softmin, nn.LogSoftmax])
def test_softmax(cls: type[nn.Module], n: int) -> None:
    """The supremum of the Jacobian's norm, approached where logits are far apart."""
    module = cls(1)
    rng = np.random.default_rng(n)
    logits = [rng.normal(size=n) * scale for scale in (0.1, 1, 10) for _ in range(50)]
    corners = 40 * np.eye(n)
    pairs = [corners[0] + corners[j] for j in range(1, n)]
    points = torch.from_numpy(
        np.stack([*logits, *corners, *-corners, *pairs, *np.negative(pairs)])
        if pairs
        else np.stack(logits)
    )
    jacobian = torch.autograd.functional.jacobian(lambda z: module(z).sum(0), points)
    jacobians = jacobian.transpose(0, 1).numpy()  # (points, n, n)
    for p in NORMS:
        bound = lipschitz_bound(module, (n,), p)
        found = max(operator_norm(j, p) for j in jacobians)
        assert found <= bound.value * (1 + tolerance(n, n)) + 1e-15
        assert found >= bound.value * (1 - 1e-12)
        assert lipschitz_bound(cls(-1), (5, n), p).value == bound.value
        assert lipschitz_bound(cls(1), (n, 5), p).value == bound.value
        assert lipschitz_bound(nn.Softmax2d(), (n, 2, 2), p).value == (0.5 if n > 1 else 0)


# ------------------------------------------------------------------------------ networks


def two_layers_that_cancel() -> nn.Sequential:
    first, second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    first.weight.data = torch.tensor([[0.0], [1.0]])
    second.weight.data = torch.tensor([[1.0, 0.0]])
    return nn.Sequential(first, second).double()


def test_product_bound_on_paper() -> None:
    net = two_layers_that_cancel()
    bound = lipschitz_bound(net, (1,))
    assert (bound.value, bound.kind) == (1, "upper bound")
    assert [part.kind for part in bound.parts] == ["exact", "exact"]
    assert operator_norm(dense(net, (1,)), 2) == 0
    assert lipschitz_lower_bound(net, torch.ones(1, 1)).value == 0


def test_sequential_of_one_keeps_its_kind_and_of_none_is_the_identity() -> None:
    assert lipschitz_bound(nn.Sequential(nn.Linear(2, 2)), (2,)).kind == "exact"
    empty = lipschitz_bound(nn.Sequential(), (2, 3))
    assert (empty.value, empty.kind, empty.output_shape) == (1, "exact", (2, 3))


def test_a_layer_used_twice_counts_twice() -> None:
    double = nn.Linear(2, 2, bias=False).double()
    double.weight.data = 2 * torch.eye(2, dtype=torch.float64)
    net = nn.Sequential(double, double)
    assert lipschitz_bound(net, (2,)).value == pytest.approx(4, rel=1e-14)
    assert lipschitz_bound(Sum(double, double), (2,)).value == pytest.approx(4, rel=1e-14)


def test_shapes_travel() -> None:
    """The same layer has another norm on another image; only the true size is right."""
    net = nn.Sequential(nn.Upsample(size=5), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten())
    bound = lipschitz_bound(net, (1, 2, 2))
    assert [part.input_shape for part in bound.parts] == [(1, 2, 2), (1, 5, 5), (1, 3, 3)]
    assert bound.output_shape == (9,)
    for part, layer in zip(bound.parts, net, strict=True):
        assert part.value == pytest.approx(
            operator_norm(dense(layer, part.input_shape), 2), rel=1e-14
        )


def test_residual_and_sum() -> None:
    halve = nn.Linear(3, 3, bias=False).double()
    halve.weight.data = torch.eye(3, dtype=torch.float64) / 2
    residual = Residual(halve)
    inputs = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    assert torch.equal(residual(inputs), 1.5 * inputs)
    assert torch.equal(Sum(halve, residual, nn.Identity())(inputs), 3 * inputs)
    for p in NORMS:
        assert lipschitz_bound(residual, (3,), p).value == 1.5  # attained here
        assert lipschitz_bound(Sum(halve, residual), (3,), p).value == 2
    bound = lipschitz_bound(Sum(halve, residual), (3,))
    assert bound.kind == "upper bound"
    assert [part.name for part in bound.parts] == ["branches.0 Linear", "branches.1 Residual"]
    assert lipschitz_bound(Sum(halve), (3,)).kind == "exact"


@settings(max_examples=60)
@given(seeds, st.lists(st.sampled_from(range(9)), min_size=1, max_size=5))
def test_linear_stacks_against_their_matrix(seed: int, choices: list[int]) -> None:
    shape: tuple[int, ...] = (2, 4, 4)
    layers: list[nn.Module] = []
    for choice in choices:
        c = shape[0]
        layer = (
            nn.Conv2d(c, 2, 3, padding=1),
            nn.Conv2d(c, 3, 2, padding=1, padding_mode="circular"),
            nn.AvgPool2d(2, 1, ceil_mode=True),
            nn.Upsample(size=(3, 5), mode="bicubic"),
            nn.ReplicationPad2d(1),
            nn.BatchNorm2d(c).eval(),
            Residual(nn.Conv2d(c, c, 3, padding=1)),
            Sum(nn.Conv2d(c, 2, 1), nn.Conv2d(c, 2, 3, padding="same")),
            nn.Sequential(nn.Dropout().eval(), nn.ConvTranspose2d(c, 2, 2)),
        )[choice]
        layers.append(randomise(layer, seed + len(layers)))
        with torch.no_grad():
            shape = tuple(layers[-1](torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    net = nn.Sequential(*layers)
    matrix = dense(net, (2, 4, 4))
    for p in NORMS:
        truth = operator_norm(matrix, p)
        upper = lipschitz_bound(net, (2, 4, 4), p)
        assert upper.output_shape == shape
        assert truth <= upper.value * (1 + tolerance(*matrix.shape))
    lower = lipschitz_lower_bound(net, torch.zeros(1, 2, 4, 4), steps=0)
    truth = operator_norm(matrix, 2)
    assert 0.9 * truth <= lower.value <= truth * (1 + tolerance(*matrix.shape))


def relu_network(A: np.ndarray, b: np.ndarray, C: np.ndarray) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(*A.T.shape), nn.ReLU(), nn.Linear(*C.T.shape)).double()
    parameters = (layers[0].weight, layers[0].bias, layers[2].weight)
    for weight, value in zip(parameters, (A, b, C), strict=True):
        weight.data = torch.from_numpy(value)
    return layers


def linear_pieces(A: np.ndarray, b: np.ndarray, C: np.ndarray) -> list[np.ndarray]:
    """Jacobians of all pieces of x ↦ C relu(Ax + b) in the plane.

    In general position every region of an arrangement of lines, two of them not parallel, has a
    vertex, so the regions are those around the crossings.
    """
    patterns = set()
    for i, j in itertools.combinations(range(len(b)), 2):
        crossing = np.linalg.solve(A[[i, j]], -b[[i, j]])
        pattern = (A @ crossing + b > 0).astype(int)
        for sides in itertools.product((0, 1), repeat=2):
            pattern[[i, j]] = sides
            patterns.add(tuple(pattern))
    return [C @ (np.array(pattern)[:, None] * A) for pattern in patterns]


@settings(max_examples=25)
@given(seeds, st.integers(2, 7), st.sampled_from(NORMS))
def test_bracket_of_a_relu_network(seed: int, hidden: int, p: float) -> None:
    """Lower bound ≤ exact constant ≤ product bound, the exact one by enumeration."""
    rng = np.random.default_rng(seed)
    A, b, C = rng.normal(size=(hidden, 2)), rng.normal(size=hidden), rng.normal(size=(2, hidden))
    net = relu_network(A, b, C)
    pieces = linear_pieces(A, b, C)
    assert len(pieces) == 1 + hidden + hidden * (hidden - 1) // 2  # Zaslavsky's count
    exact = max(operator_norm(piece, p) for piece in pieces)
    assert exact <= lipschitz_bound(net, (2,), p).value * (1 + tolerance(2, hidden))
    inputs = torch.from_numpy(rng.normal(size=(8, 2)))
    lower = lipschitz_lower_bound(net, inputs, p, steps=20)
    assert 0 <= lower.value <= exact
    x, y = lower.witness
    rise, run = (torch.linalg.vector_norm(d, p) for d in (net(x) - net(y), x - y))
    assert lower.value == pytest.approx((rise / run).item(), rel=1e-6)


@settings(max_examples=30)
@given(seeds, st.lists(st.sampled_from(range(10)), min_size=1, max_size=4), st.sampled_from(NORMS))
def test_bracket_of_random_stacks(seed: int, choices: list[int], p: float) -> None:
    layers: list[nn.Module] = []
    for choice in choices:
        layers += [
            [nn.Conv2d(2, 2, 3, padding=1), nn.GELU()],
            [nn.LeakyReLU(1.5)],
            [nn.MaxPool2d(3, 1, 1)],
            [nn.Hardswish()],
            [nn.Upsample(size=4, mode="bilinear")],
            [Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.SELU(inplace=True)))],
            [nn.Softmax2d()],
            [Sum(nn.Tanh(), nn.MaxPool2d(1), nn.ELU(2.0))],
            [nn.AvgPool2d(2, 1), nn.ZeroPad2d((0, 1, 1, 0))],
            [nn.SiLU(inplace=True), nn.BatchNorm2d(2).eval()],
        ][choice]
    net = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)), seed)
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.normal(size=(3, 2, 4, 4)))
    upper = lipschitz_bound(net, (2, 4, 4), p)
    lower = lipschitz_lower_bound(net, inputs, p, steps=3)
    assert upper.kind == "upper bound"
    assert upper.output_shape == (3,)
    assert 0 < lower.value <= upper.value
    for x in inputs:
        jacobian = torch.autograd.functional.jacobian(lambda z: net(z[None].clone())[0], x)
        norm = operator_norm(jacobian.reshape(3, -1).numpy(), p)
        assert norm <= upper.value * (1 + tolerance(3, 32))


# --------------------------------------------------------------------------- lower bound


def test_lower_bound_is_near_the_exact_constant_of_small_networks() -> None:
    ratios = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        A, b, C = rng.normal(size=(8, 2)), rng.normal(size=8), rng.normal(size=(1, 8))
        net = relu_network(A, b, C)
        exact = max(operator_norm(piece, 2) for piece in linear_pieces(A, b, C))
        inputs = torch.from_numpy(2 * rng.normal(size=(64, 2)))
        ratios.append(lipschitz_lower_bound(net, inputs, steps=40).value / exact)
    assert max(ratios) <= 1
    assert sorted(ratios)[5] > 0.999  # it finds the steepest piece in most of them
    assert min(ratios) > 0.8


@pytest.mark.parametrize("p", NORMS)
def test_lower_bound_finds_the_norm_of_a_linear_layer(p: float) -> None:
    layer = randomise(nn.Linear(6, 5), 3)
    truth = operator_norm(layer.weight.detach().numpy(), p)
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 6)))
    lower = lipschitz_lower_bound(layer, inputs, p)
    assert lower.kind == "lower bound"
    assert lower.p == p
    assert (1 - 1e-5) * truth <= lower.value <= truth
    assert (lower.input_shape, lower.output_shape) == ((6,), (5,))
    assert all(point.shape == (6,) and point.dtype == torch.float64 for point in lower.witness)


def test_lower_bound_climbs() -> None:
    """The slope of softplus is 0.05 at -3 and nears 1 far from there, on the right."""
    start = torch.full((1, 1), -3.0)
    still, climbed = (lipschitz_lower_bound(nn.Softplus(), start, steps=k).value for k in (0, 100))
    assert still < 0.08
    assert 0.8 < climbed <= 1


@pytest.mark.parametrize("side", [-1, 1])
def test_lower_bound_halves(side: int) -> None:
    """Where the network is flat its Jacobian is 0; a chord that reaches the kink is not flat."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    net[0].weight.data.fill_(3 * side)
    net[0].bias.data.fill_(-3)
    start = torch.full((1, 1), 0.8 * side)  # the kink is at 1, the chord reaches to 1.3
    bound = lipschitz_lower_bound(net, start, steps=0)
    assert bound.value == pytest.approx(3, rel=1e-6)
    assert bound.witness is not None
    x, y = bound.witness
    assert (x - y).norm().item() == pytest.approx(2.0**-10)  # a chord of length 1, ten times
    assert lipschitz_lower_bound(net, start, radius=0.1).value == 0  # too short to see it


def test_autograd_errs_at_a_kink_and_two_points_do_not() -> None:
    class Zero(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs - inputs.relu() + (-inputs).relu()

    origin = torch.zeros(1, 1, dtype=torch.float64)
    assert torch.autograd.functional.jacobian(Zero(), origin).item() == 1
    assert lipschitz_lower_bound(Zero(), origin).value == 0


def test_lower_bound_allows_for_rounding() -> None:
    """Large biases that cancel: float64 differences are off by 1e-8, of a map of norm 1."""
    shift, back = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    for layer, sign in ((shift, 1), (back, -1)):
        layer.weight.data = torch.eye(2, dtype=torch.float64)
        layer.bias.data = sign * torch.tensor([1e7 / 3, 2e7 / 3], dtype=torch.float64)
    net = nn.Sequential(shift, back)
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 2)))
    lower = lipschitz_lower_bound(net, inputs)
    x, y = lower.witness
    assert 0.9 < lower.value <= 1
    assert lower.value < ((net(x) - net(y)).norm() / (x - y).norm()).item()


def test_lower_bound_respects_parametrized_weights_in_float32() -> None:
    """The float64 copy of a layer has the float32 weight that the layer uses, not a better one."""
    torch.manual_seed(1)
    layer = parametrizations.orthogonal(nn.Linear(16, 16))
    state = copy.deepcopy(layer.state_dict())
    truth = operator_norm(layer.weight.detach().double().numpy(), 2)
    assert abs(truth - 1) > 1e-9  # float32 is not orthogonal in float64
    assert lipschitz_bound(layer, (16,)).value == pytest.approx(truth, rel=1e-14)
    lower = lipschitz_lower_bound(layer, torch.zeros(4, 16), steps=0)
    assert lower.value <= truth
    assert parametrize.is_parametrized(layer)  # nothing happened to the original
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    assert layer.weight.dtype == torch.float32


class Shrink(nn.Module):
    """Parametrization that depends on the dtype, as rounding does, but by a visible amount."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 - 1e6 * torch.finfo(weight.dtype).eps)


@pytest.mark.parametrize("nested", [False, True])
def test_plain_copies_keep_the_value_of_a_parametrized_weight(nested: bool) -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.eye(3)
    parametrize.register_parametrization(layer, "weight", Shrink())
    module = nn.Sequential(nn.Sequential(layer)) if nested else layer
    truth = 1 - 1e6 * torch.finfo(torch.float32).eps  # 0.88; computed in float64 it would be 1
    assert lipschitz_bound(module, (3,)).value == pytest.approx(truth, rel=1e-6)
    lower = lipschitz_lower_bound(module, torch.zeros(1, 3), steps=0)
    assert lower.value == pytest.approx(truth, rel=1e-6)
    assert type(layer).__name__ == "ParametrizedLinear"
    assert torch.equal(layer.weight, truth * torch.eye(3))  # and it still constrains


def test_lower_bound_needs_no_gradients_from_outside() -> None:
    with torch.no_grad():
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3)))
        lower = lipschitz_lower_bound(nn.Sequential(nn.ReLU(inplace=True)), inputs, steps=3)
    assert lower.value == pytest.approx(1, rel=1e-6)
    assert not lower.witness[0].requires_grad


def test_lower_bound_of_a_constant_is_zero_and_seed_repeats() -> None:
    constant = nn.Linear(2, 2)
    constant.weight.data.zero_()
    assert lipschitz_lower_bound(constant, torch.zeros(3, 2)).value == 0
    net = randomise(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), 0)
    first, again = (lipschitz_lower_bound(net, torch.zeros(2, 3), steps=5) for _ in range(2))
    assert first == again
    assert torch.equal(first.witness[0], again.witness[0])


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "p must be", {"p": 3}),
        (TypeError, "inputs must be", {"inputs": torch.zeros(2, 3, dtype=torch.int64)}),
        (TypeError, "inputs must be", {"inputs": [[0.0]]}),
        (ValueError, "inputs must be finite", {"inputs": torch.full((1, 3), math.nan)}),
        (ValueError, "inputs must be finite and not empty", {"inputs": torch.zeros(0, 3)}),
        (ValueError, "radius must be", {"radius": 0.0}),
        (ValueError, "radius must be", {"radius": math.nan}),
        (ValueError, "steps must be", {"steps": -1}),
        (TypeError, "module must be", {"module": torch.relu}),
        (ValueError, "keep samples apart", {"module": nn.BatchNorm1d(3)}),
        (ValueError, "deterministic", {"module": nn.Dropout()}),
    ],
)
def test_lower_bound_arguments(error: type[Exception], message: str, kwargs: dict) -> None:
    kwargs = {"module": nn.Linear(3, 2), "inputs": torch.randn(2, 3)} | kwargs
    with pytest.raises(error, match=message):
        lipschitz_lower_bound(**kwargs)


# ------------------------------------------------------------------------------ refusals


class Squeeze(nn.Module):
    """An operation of which nothing is known."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.special.bessel_j0(inputs)


def with_hook(register: str) -> nn.Module:
    layer = nn.Linear(2, 2)
    getattr(layer, register)(lambda *args: None)
    return layer


def with_attribute(layer: nn.Module, name: str, value: object) -> nn.Module:
    setattr(layer, name, value)
    return layer


class DoubledForward(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class DoubledConvolution(nn.Conv2d):
    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(inputs, 2 * weight, bias)


class DoubledCall(nn.Linear):
    def __call__(self, inputs: Tensor) -> Tensor:
        return 2 * super().__call__(inputs)


class Backwards(nn.Sequential):
    def __iter__(self) -> object:
        return reversed(list(self._modules.values()))


def filled(value: float | complex) -> nn.Module:
    layer = nn.Linear(2, 2, dtype=torch.complex64 if isinstance(value, complex) else None)
    layer.weight.data[0, 1] = value
    return layer


REFUSALS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "unknown": (
        Squeeze,
        TypeError,
        r"bessel_j0 \(test_composition.py:\d+: return torch.special.bessel_j0\(inputs\)\): "
        "has no Lipschitz rule: register one",
    ),
    "forward hook": (lambda: with_hook("register_forward_hook"), ValueError, "forward hooks"),
    "pre hook": (lambda: with_hook("register_forward_pre_hook"), ValueError, "forward hooks"),
    "old spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
        ValueError,
        "forward hooks",
    ),
    "subclass forward": (lambda: DoubledForward(2, 2), TypeError, "forward is redefined"),
    "subclass call": (lambda: DoubledCall(2, 2), TypeError, "__call__ is redefined"),
    "subclass iter": (lambda: Backwards(nn.ReLU()), TypeError, "__iter__ is redefined"),
    "instance forward": (
        lambda: with_attribute(nn.Linear(2, 2), "forward", torch.exp),
        TypeError,
        "forward is redefined",
    ),
    "nan": (lambda: filled(math.nan), ValueError, "weight must be finite"),
    "inf": (lambda: filled(-math.inf), ValueError, "weight must be finite"),
    "complex": (lambda: filled(1j), TypeError, "weight must be real"),
    "lazy": (lambda: nn.LazyLinear(2), ValueError, "weight has no values"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), ValueError, "weight has no values"),
    "dropout": (nn.Dropout, ValueError, r"call \.eval\(\)"),
    "rrelu": (nn.RReLU, ValueError, r"call \.eval\(\)"),
    "batch norm": (lambda: nn.BatchNorm1d(2), ValueError, "statistics of the batch"),
    "untracked": (
        lambda: nn.BatchNorm1d(2, track_running_stats=False).eval(),
        ValueError,
        "statistics of the batch",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
        ValueError,
        "weight is updated each time it is read",
    ),
    "misfit": (lambda: nn.Linear(3, 2), ValueError, r"does not run on inputs of shape \(2,\)"),
    "batch softmax": (lambda: nn.Softmax(0), ValueError, "dim must be"),
    "batch flatten": (lambda: nn.Flatten(0), ValueError, "keep samples apart"),
    "not Lipschitz": (nn.Hardshrink, ValueError, "is not Lipschitz"),
    "residual shape": (
        lambda: Residual(nn.Linear(2, 1)),
        ValueError,
        r"branch must keep the shape \(2,\), got \(1,\)",
    ),
    "sum shapes": (
        lambda: Sum(nn.Identity(), nn.Linear(2, 1)),
        ValueError,
        "branches must agree on the output shape",
    ),
    "residual in place": (
        lambda: Residual(nn.ELU(3.0, inplace=True)),
        ValueError,
        "branch overwrites the input",
    ),
    "sum in place": (
        lambda: Sum(nn.Identity(), nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))),
        ValueError,
        "branches.1 overwrites the input",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_refusal(name: str) -> None:
    make, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        lipschitz_bound(make(), (2,))
    net = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Identity(), Residual(nn.Identity()))))
    net.body[1].branch = make()
    cls = type(make()).__name__
    path = "body.1" if name.startswith("residual shape") else "body.1.branch"
    with pytest.raises(error, match=rf"^'{path}[\w.]*' \({cls if path[-1] != '1' else 'Residual'}"):
        lipschitz_bound(net, (2,))


def test_refusals_of_images() -> None:
    with pytest.raises(TypeError, match="_conv_forward is redefined"):
        lipschitz_bound(DoubledConvolution(1, 1, 3), (1, 5, 5))
    with pytest.raises(ValueError, match="must return one tensor, got tuple"):
        lipschitz_bound(nn.MaxPool2d(2, return_indices=True), (1, 4, 4))
    # Without channels torch takes the batch for the channels, which mixes samples.
    for layer in (nn.Conv2d(2, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.ZeroPad2d(1)):
        with pytest.raises(ValueError, match="input_shape must be channels and 2 sizes"):
            lipschitz_bound(layer, (4, 4))


def test_hooks_of_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(ValueError, match="forward hooks"):
            lipschitz_bound(nn.ReLU(), (2,))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "p must be 1, 2 or math.inf, got 3", (nn.ReLU(), (2,), 3)),
        (ValueError, "p must be", (nn.ReLU(), (2,), "fro")),
        (TypeError, "input_shape must be a sequence", (nn.ReLU(), 2)),
        (ValueError, "input_shape must hold one or more positive", (nn.ReLU(), (0, 2))),
        (ValueError, "input_shape must hold one or more positive", (nn.ReLU(), (2.0,))),
        (ValueError, "input_shape must hold one or more positive", (nn.Linear(2, 2), ())),
        (TypeError, "module must be a torch.nn.Module, got function", (torch.relu_, (2,))),
    ],
)
def test_arguments(error: type[Exception], message: str, arguments: tuple) -> None:
    message = message.replace("got function", "got builtin")
    with pytest.raises(error, match=message):
        lipschitz_bound(*arguments)


def test_sum_and_residual_arguments() -> None:
    with pytest.raises(ValueError, match="at least one module"):
        Sum()
    with pytest.raises(ValueError, match=r"branch must keep the shape \(4, 2\), got \(4, 1\)"):
        Residual(nn.Linear(2, 1))(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="branches must agree"):
        Sum(nn.Linear(2, 1), nn.Identity())(torch.zeros(4, 2))


def test_rules_that_break_their_promise_are_refused() -> None:
    class Liar(nn.Identity):
        result: object

    @lipschitz_rule.register(Liar)
    def _(module: Liar, input_shape: tuple[int, ...], p: float) -> Bound:
        return module.result  # type: ignore[return-value]

    module = Liar()
    for result, error, message in (
        (1.0, TypeError, "must return a Bound, got float"),
        (Bound(1, "estimate", 2), ValueError, "must return an exact value or an upper bound"),
        (Bound(1, "lower bound", 2), ValueError, "must return an exact value or an upper bound"),
        (Bound(1, "exact", 1), ValueError, "for p=2, got: exact for p=1"),
    ):
        module.result = result
        with pytest.raises(error, match=message):
            lipschitz_bound(module, (2,))


def test_spectral_norm_is_fine_in_eval_and_untouched_in_training() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(5, 4))
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="updated each time"):
        lipschitz_bound(layer, (5,))
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    layer.eval()
    truth = operator_norm(layer.weight.detach().double().numpy(), 2)
    assert lipschitz_bound(layer, (5,)).value == pytest.approx(truth, rel=1e-14)
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())


def test_a_refused_batch_norm_keeps_its_statistics() -> None:
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="statistics"):
        lipschitz_bound(nn.Sequential(nn.Linear(2, 2), layer), (2,))
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrizations() -> None:
    for wrap in (parametrizations.orthogonal, parametrizations.weight_norm):
        layer = wrap(nn.Linear(4, 3))
        bound = lipschitz_bound(nn.Sequential(layer), (4,))
        truth = operator_norm(layer.weight.detach().double().numpy(), 2)
        assert bound.value == pytest.approx(truth, rel=1e-14)
        assert bound.parts[0].name == "0 ParametrizedLinear"


def test_subclasses_that_compute_the_same_are_welcome() -> None:
    class Named(nn.Linear):
        """Only another name and another initialisation."""

        def reset_parameters(self) -> None:
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)

    assert lipschitz_bound(Named(3, 3), (3,)).value == 1


def test_a_rule_can_be_registered_for_a_container() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(self.inner(inputs))

    @lipschitz_rule.register(Twice)
    def _(module: Twice, input_shape: tuple[int, ...], p: float) -> Bound:
        inner = lipschitz_bound(module.inner, input_shape, p, name="inner")
        return Bound(inner.value**2, "upper bound", p, parts=(inner,))

    bound = lipschitz_bound(nn.Sequential(Twice(nn.SELU()), nn.Flatten()), (2, 3))
    assert bound.value == pytest.approx(1.7580993408473766**2, rel=1e-14)
    assert bound.output_shape == (6,)
    with pytest.raises(TypeError, match=r"^'0.inner' \(Squeeze\): .*has no Lipschitz rule"):
        lipschitz_bound(nn.Sequential(Twice(Squeeze())), (2, 3))


# ---------------------------------------------------------------------- dtypes and Bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bounds_are_float64_whatever_the_dtype(dtype: torch.dtype) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.PReLU(),
        nn.BatchNorm2d(2).eval(),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).to(dtype)
    net[2].weight.data += 0.1
    bound = lipschitz_bound(net, (1, 4, 4))
    exact = lipschitz_bound(copy.deepcopy(net).double(), (1, 4, 4))
    assert bound == exact  # to the bit: the same numbers, in the same arithmetic
    assert next(net.parameters()).dtype == dtype
    lower = lipschitz_lower_bound(net, torch.zeros(1, 1, 4, 4, dtype=dtype), steps=2)
    assert lower.value <= bound.value
    assert lower.witness[0].dtype == torch.float64


def test_bound_prints_as_a_table() -> None:
    wide = nn.Linear(4, 16, bias=False)
    wide.weight.data = torch.cat([torch.eye(4)] * 4)
    net = nn.Sequential(OrderedDict(wide=wide, act=nn.Tanh(), tail=Residual(nn.Sigmoid())))
    assert str(lipschitz_bound(net, (4,))) == "\n".join(
        [
            "2-norm              output shape  value  kind",
            "Sequential          (16,)           2.5  upper bound",
            "  wide Linear       (16,)             2  exact",
            "  act Tanh          (16,)             1  exact",
            "  tail Residual     (16,)          1.25  upper bound",
            "    branch Sigmoid  (16,)          0.25  exact",
        ]
    )
    assert str(lipschitz_bound(nn.ReLU(), (1,), math.inf)).startswith("∞-norm")
    lower = lipschitz_lower_bound(wide, torch.zeros(1, 4), steps=0)
    assert str(lower).endswith("lower bound")
    assert "witness" not in repr(lower)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("value must be", (-1.0, "exact", 2)),
        ("value must be", (math.nan, "exact", 2)),
        ("kind must be", (1.0, "guess", 2)),
        ("p must be", (1.0, "exact", 3)),
    ],
)
def test_bound_arguments(message: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        Bound(*arguments)


def test_bound_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Bound(1, "exact", 2).value = 2.0  # type: ignore[misc]


def test_sums_are_traced_and_compiled_once() -> None:
    """Shapes are compared and not hashed, so that a batch may stay a symbol."""
    net = Sum(Residual(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Identity())
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend, dynamic=True, fullgraph=True)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net, (torch.randn(2, 4),), dynamic_shapes=((batch),))
    traced = torch.fx.symbolic_trace(net)
    for size in (2, 3, 7):
        x = torch.randn(size, 4)
        assert torch.equal(compiled(x), net(x))
        assert torch.equal(program.module()(x), net(x))
        assert torch.equal(traced(x), net(x))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match=r"agree on the output shape, got \[\(2, 3\), \(2, 4\)\]"):
        torch.fx.symbolic_trace(Sum(nn.Identity(), nn.Linear(4, 3)))(torch.randn(2, 4))
