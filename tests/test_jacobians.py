"""Tests of lipbook.jacobians: definition, theorem, tightness, errors.

The oracles are outside the library: reverse mode of torch.autograd (without torch.func), loops
over the definition in NumPy, dense singular values, numbers on paper.
"""

from __future__ import annotations

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lipbook import jacobians
from lipbook.jacobians import (
    batch_norm_jacobian,
    convolution_matrix,
    elementwise_jacobian,
    jacobian,
    jacobian_operator,
    jvp,
    layer_jacobians,
    linear_jacobian,
    residual_jacobian,
    singular_values,
    softmax_jacobian,
    vjp,
)

DTYPES = [torch.float32, torch.float64]
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])


def tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Rounding allowed in sums of max(m, n) terms, relative to the largest value."""
    return 16 * max(m, n) * torch.finfo(dtype).eps


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    m, n = (*expected.shape, 1, 1)[:2] if expected.dim() < 2 else expected.shape[-2:]
    scale = max(float(expected.detach().abs().max()), torch.finfo(expected.dtype).tiny)
    assert (
        float((actual - expected).detach().abs().max()) <= tolerance(m, n, expected.dtype) * scale
    )


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def rows_by_autograd(module: nn.Module, inputs: Tensor) -> Tensor:
    """The Jacobian one sample and one output at a time, (batch, m, n)."""
    samples = []
    for x in inputs:
        leaf = x[None].clone().requires_grad_()
        outputs = module(leaf).flatten()
        rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0].flatten() for y in outputs]
        samples.append(torch.stack(rows))
    return torch.stack(samples).detach()


def convnet(dtype: torch.dtype = torch.float64, width: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(width),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(width * 6, 4),
        nn.Tanh(),
    ).to(dtype)


def trained_statistics(net: nn.Sequential) -> nn.Sequential:
    """In evaluation, with running statistics that are not zero and one."""
    net.train()(normal(7, 32, 2, 4, 6).to(next(net.parameters()).dtype))
    return net.eval()


# jacobian


def test_jacobian_of_a_map_on_paper() -> None:
    def polar(points: Tensor) -> Tensor:
        r, angle = points.unbind(-1)
        return torch.stack([r * angle.cos(), r * angle.sin()], -1)

    r, angle = 2.0, math.pi / 6
    J = jacobian(polar, torch.tensor([[r, angle]], dtype=torch.float64))
    expected = [[math.sqrt(3) / 2, -1.0], [0.5, math.sqrt(3)]]
    assert_close(J, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [2, 9], ids=["reverse", "forward"])
def test_jacobian_is_the_loop_over_outputs(dtype: torch.dtype, outputs: int) -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, outputs)).to(dtype)
    x = normal(0, 3, 5, dtype=dtype)
    assert_close(jacobian(net, x), rows_by_autograd(net, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_jacobian_of_a_convnet_keeps_or_flattens_the_shapes(dtype: torch.dtype) -> None:
    net, x = trained_statistics(convnet(dtype)), normal(1, 3, 2, 4, 6, dtype=dtype)
    full, flat = jacobian(net, x), jacobian(net, x, flatten=True)
    assert full.shape == (3, 4, 2, 4, 6)
    assert flat.shape == (3, 4, 48)
    assert torch.equal(full.flatten(2), flat)
    assert_close(flat, rows_by_autograd(net, x))
    images = net[:4]  # images to images
    assert jacobian(images, x).shape == (3, 3, 2, 3, 2, 4, 6)
    assert_close(jacobian(images, x, flatten=True), rows_by_autograd(images, x))


def test_jacobian_of_scalars_has_the_shape_of_its_factors() -> None:
    x = normal(2, 6)
    assert_close(jacobian(torch.sin, x), x.cos())
    assert jacobian(torch.sin, x, flatten=True).shape == (6, 1, 1)
    assert jacobian(lambda b: b.sum(-1), normal(2, 6, 3)).shape == (6, 3)


@pytest.mark.parametrize("outputs", [2, 9])
def test_chunks_change_memory_only(outputs: int) -> None:
    net, x = nn.Linear(5, outputs).double(), normal(3, 7, 5)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    expected, whole = jacobian(net, x), len(calls)
    assert_close(jacobian(net, x, chunk_size=3), expected)
    assert len(calls) - whole == whole + 2  # three chunks instead of one


@pytest.mark.parametrize("shape", [(200, 3), (3, 200)], ids=["reverse", "forward"])
def test_jacobian_takes_the_smaller_number_of_products(shape: tuple[int, int]) -> None:
    net, x = nn.Linear(*shape).double(), normal(0, 1, shape[0])
    with FlopCounterMode(display=False) as once:
        net(x)
    with FlopCounterMode(display=False) as counter:
        jacobian(net, x)
    assert counter.get_total_flops() <= 12 * once.get_total_flops()


def test_jacobian_is_differentiable_in_the_parameters() -> None:
    layer = nn.Linear(5, 3).double()
    jacobian(layer, normal(4, 1, 5)).square().sum().backward()
    assert_close(layer.weight.grad, 2 * layer.weight.detach())  # of the squared Frobenius norm


@pytest.mark.parametrize("outputs", [2, 9])
def test_everything_runs_inside_vmap(outputs: int) -> None:
    net, x = nn.Sequential(nn.Linear(5, outputs), nn.Tanh()).double(), normal(5, 4, 5)
    v, u = normal(6, 4, 5), normal(7, 4, outputs)
    over = torch.func.vmap
    assert_close(over(lambda s: jacobian(net, s[None])[0])(x), jacobian(net, x))
    assert_close(over(lambda s, t: jvp(net, s[None], t[None])[0])(x, v), jvp(net, x, v))
    assert_close(over(lambda s, t: vjp(net, s[None], t[None])[0])(x, u), vjp(net, x, u))
    assert_close(over(softmax_jacobian)(x), softmax_jacobian(x))
    weights = normal(8, 3, 4, 2, 3)
    matrices = over(lambda w: convolution_matrix(w, 6, padding=1, groups=2))(weights)
    assert_close(matrices[2], convolution_matrix(weights[2], 6, padding=1, groups=2))


# Products


@settings(max_examples=40)
@given(
    seed=seeds, scale=scales, n=st.integers(1, 12), m=st.integers(1, 12), batch=st.integers(1, 4)
)
def test_products_are_those_of_the_dense_jacobian(
    seed: int, scale: float, n: int, m: int, batch: int
) -> None:
    weights = normal(seed, m + 1, n), normal(seed + 1, m, m + 1)

    def net(x: Tensor) -> Tensor:
        return scale * torch.tanh(x @ weights[0].T) @ weights[1].T

    x, v, u = normal(seed + 2, batch, n), normal(seed + 3, batch, n), normal(seed + 4, batch, m)
    J = rows_by_autograd(net, x)
    forward, backward = jvp(net, x, v), vjp(net, x, u)
    assert forward.shape == (batch, m)
    assert backward.shape == (batch, n)
    # A product may be small by cancellation: compare with the sum of its terms' sizes.
    sizes = scale * weights[1].abs() @ weights[0].abs()  # (m, n), tanh' is at most 1
    rounding = tolerance(m + 1, n, x.dtype)
    error = (forward - (J @ v.unsqueeze(-1)).squeeze(-1)).abs()
    assert bool((error <= rounding * v.abs() @ sizes.T).all())
    error = (backward - (J.mT @ u.unsqueeze(-1)).squeeze(-1)).abs()
    assert bool((error <= rounding * u.abs() @ sizes).all())


def test_products_of_a_convnet_have_the_shapes_of_images() -> None:
    net, x = trained_statistics(convnet())[:4], normal(1, 3, 2, 4, 6)
    v, u = normal(2, *x.shape), normal(3, 3, 3, 2, 3)
    J = rows_by_autograd(net, x)
    assert_close(jvp(net, x, v), (J @ v.reshape(3, -1, 1)).reshape(u.shape))
    assert_close(vjp(net, x, u), (J.mT @ u.reshape(3, -1, 1)).reshape(x.shape))


def test_operator_is_the_dense_jacobian_and_its_transpose() -> None:
    net, x = trained_statistics(convnet()), normal(1, 1, 2, 4, 6)
    J = rows_by_autograd(net, x)[0]
    operator = jacobian_operator(net, x[0])
    assert operator.shape == (4, 48)
    assert operator.dtype == np.float64
    assert_close(torch.from_numpy(operator @ np.eye(48)), J)
    assert_close(torch.from_numpy(operator.T @ np.eye(4)), J.T)
    top = svds(operator, k=2, return_singular_vectors=False, rng=np.random.default_rng(0))
    expected = torch.linalg.svdvals(J)[:2]
    assert_close(torch.from_numpy(top.copy()).sort(descending=True).values, expected)


def test_operator_and_products_follow_the_dtype() -> None:
    net, x = nn.Linear(4, 3), normal(0, 4, dtype=torch.float32)
    operator = jacobian_operator(net, x)
    assert operator.dtype == np.float32
    assert (operator @ np.ones(4, dtype=np.float32)).dtype == np.float32
    assert singular_values(net, x).dtype == torch.float32


# Singular values


def linear_map(matrix: Tensor) -> nn.Module:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    return layer


def with_spectrum(seed: int, m: int, n: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(normal(seed, m, len(values)))
    right, _ = torch.linalg.qr(normal(seed + 1, n, len(values)))
    return left * values @ right.T


@settings(max_examples=40)
@given(
    seed=seeds,
    scale=scales,
    m=st.integers(1, 25),
    n=st.integers(1, 25),
    data=st.data(),
    which=st.sampled_from(["top", "bottom"]),
)
def test_singular_values_are_on_the_promised_side_and_tight(
    seed: int, scale: float, m: int, n: int, data: st.DataObject, which: str
) -> None:
    matrix = scale * normal(seed, m, n)
    k = data.draw(st.integers(1, min(m, n)))
    values = singular_values(linear_map(matrix), normal(seed, n), k, which)
    dense = torch.linalg.svdvals(matrix)
    expected = dense[:k] if which == "top" else dense[-k:]
    rounding = tolerance(m, n, matrix.dtype)
    assert values.shape == (k,)
    assert bool((values.diff() <= 0).all())
    if which == "top":
        assert bool((values <= expected + rounding * dense[0]).all())
        assert bool((values >= expected - rounding * dense[0]).all())
    else:
        assert bool((values >= expected - rounding * dense[0]).all())
        assert bool((values <= expected + math.sqrt(rounding) * dense[0]).all())


SPECTRA = {
    "zero": torch.zeros(30),
    "orthogonal": torch.ones(30),
    "rank one": torch.cat([torch.ones(1), torch.zeros(29)]),
    "projection": torch.cat([torch.ones(10), torch.zeros(20)]),
    "clustered at the bottom": torch.linspace(0, 1, 30) ** 3,
    "fourteen decades": torch.logspace(0, -14, 30),
}


@pytest.mark.parametrize("shape", [(30, 30), (40, 30), (30, 50)])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_of_hard_spectra(name: str, shape: tuple[int, int]) -> None:
    values = SPECTRA[name].double().sort(descending=True).values
    layer = linear_map(with_spectrum(0, *shape, values))
    x = torch.zeros(shape[1], dtype=torch.float64)
    rounding = tolerance(*shape, torch.float64)
    top, bottom = singular_values(layer, x, 3), singular_values(layer, x, 3, "bottom")
    assert bool(((top - values[:3]).abs() <= rounding).all())
    assert bool((bottom >= values[-3:] - rounding).all())
    assert bool((bottom <= values[-3:] + math.sqrt(rounding)).all())


def test_the_bottom_needs_no_more_than_its_basis() -> None:
    """Three decades over 120 values: restarted Lanczos with SciPy's default basis stalls here."""
    values = torch.logspace(0, -3, 120, dtype=torch.float64)
    matrix = with_spectrum(0, 120, 120, values)
    calls = itertools.count()

    def counted(x: Tensor) -> Tensor:
        next(calls)
        return x @ matrix.T

    bottom = singular_values(counted, torch.zeros(120, dtype=torch.float64), 2, "bottom")
    assert bool(
        ((bottom - values[-2:]).abs() <= math.sqrt(tolerance(120, 120, matrix.dtype))).all()
    )
    assert next(calls) < 2 * 120


def test_the_top_of_a_wide_jacobian_takes_few_products() -> None:
    matrix = normal(0, 8, 3000)
    calls = itertools.count()

    def counted(x: Tensor) -> Tensor:
        next(calls)
        return x @ matrix.T

    top = singular_values(counted, torch.zeros(3000, dtype=torch.float64))
    assert_close(top, torch.linalg.svdvals(matrix)[:1])
    assert next(calls) < 40


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_jacobian_does_not_matter(scale: float) -> None:
    """ARPACK's own tolerance is absolute for small eigenvalues."""
    values = scale * torch.linspace(1, 0.1, 120, dtype=torch.float64)
    layer = linear_map(with_spectrum(0, 120, 120, values))
    x = torch.zeros(120, dtype=torch.float64)
    assert_close(singular_values(layer, x, 2), values[:2])
    bottom = singular_values(layer, x, 2, "bottom")
    assert bool(((bottom - values[-2:]).abs() <= scale * tolerance(120, 120, x.dtype)).all())


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_singular_values_in_single_precision(which: str) -> None:
    matrix = normal(0, 30, 40, dtype=torch.float32)
    dense = torch.linalg.svdvals(matrix)
    expected = dense[:3] if which == "top" else dense[-3:]
    values = singular_values(linear_map(matrix), torch.zeros(40), 3, which)
    rounding = tolerance(30, 40, torch.float32)
    assert bool(((values - expected).abs() <= rounding * dense[0]).all())


def test_a_circular_convolution_does_not_trap_the_start() -> None:
    """Its constant vector is singular, here with the smallest of all values."""
    net = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[[-1.0, 2.0, -1.0]]]))
    top = singular_values(net, torch.zeros(1, 16, dtype=torch.float64))
    assert_close(top, torch.tensor([4.0], dtype=torch.float64))


def test_singular_values_at_a_nonlinear_point() -> None:
    net, x = trained_statistics(convnet()), normal(1, 1, 2, 4, 6)
    dense = torch.linalg.svdvals(rows_by_autograd(net, x)[0])
    assert_close(singular_values(net, x[0], 4), dense)
    assert_close(singular_values(net, x[0], 2), dense[:2])
    assert_close(singular_values(net, x[0], 2), singular_values(net, x[0], 2))


# Factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factors_multiply_to_the_jacobian(dtype: torch.dtype) -> None:
    net, x = trained_statistics(convnet(dtype)), normal(1, 3, 2, 4, 6, dtype=dtype)
    factors = layer_jacobians(net, x)
    assert [tuple(f.shape[1:]) for f in factors] == [
        (72, 48), (72, 72), (18, 72), (18, 18), (18, 18), (18, 18), (4, 18), (4, 4),
    ]  # fmt: skip
    assert_close(reduce(lambda product, f: f @ product, factors), rows_by_autograd(net, x))
    assert torch.equal(factors[4], torch.eye(18, dtype=dtype).expand(3, 18, 18))  # dropout, eval


def test_factors_are_taken_where_the_activations_are() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Softplus()).double()
    x = normal(0, 2, 3)
    s = net[0](x)
    first, second, third = layer_jacobians(net, x)
    assert_close(first, linear_jacobian(net[0].weight).expand(2, 3, 3))
    assert_close(second, elementwise_jacobian(1 - s.tanh() ** 2))
    assert_close(third, elementwise_jacobian(s.tanh().sigmoid()))


# Layers that work in place, attention, recurrence, wrappers


def doubled_in_place(x: Tensor) -> Tensor:
    x.mul_(2).sin_()
    return x


class First(nn.Module):
    """The sequence that a recurrent layer or an attention returns first."""

    def __init__(self, layer: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.copies)[0]


class Cell(nn.Module):
    """A recurrent cell over a sequence, written by hand."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


def recurrent(kind: type[nn.RNNBase], **options: object) -> nn.Module:
    return First(kind(4, 3, batch_first=True, **options)).double()


def encoder(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options).double()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def compiled_in_place() -> nn.Module:
    net = perceptron()
    net.compile(backend="eager")
    return net


NETS = {
    "in place after a layer": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)),
    "in place at first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6)),
    "in place and wide": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 9)),
    "in place, twice": lambda: nn.Sequential(
        nn.ELU(inplace=True), nn.Linear(4, 6), nn.Hardtanh(inplace=True), nn.Linear(6, 2)
    ),
    "functional in place": lambda: lambda x: functional.relu(x, inplace=True),
    "tensor methods in place": lambda: doubled_in_place,
    "encoder": lambda: encoder().eval(),
    "encoder without dropout, training": lambda: encoder(dropout=0.0),
    "encoder, pre-norm, frozen": lambda: encoder(norm_first=True).eval().requires_grad_(False),
    "encoder, wide": lambda: nn.Sequential(encoder().eval(), nn.Linear(4, 9)),
    "stack of encoders": lambda: nn.TransformerEncoder(encoder(), 2).eval(),
    "attention with weights": lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 3),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Tanh()),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.InstanceNorm1d(3, affine=True), nn.Tanh()
    ),
    "instance norm, tracked": lambda: nn.InstanceNorm1d(3, track_running_stats=True).eval(),
    "group norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(1, 3), nn.Tanh()),
    "product attention": lambda: lambda x: functional.scaled_dot_product_attention(x, x, x),
    "causal attention": lambda: (
        lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    ),
    "LSTM": lambda: recurrent(nn.LSTM),
    "LSTM, all options": lambda: recurrent(
        nn.LSTM, num_layers=2, bidirectional=True, proj_size=2, dropout=0.5
    ).eval(),
    "LSTM without biases": lambda: recurrent(nn.LSTM, bias=False, proj_size=2),
    "LSTM, wide": lambda: First(nn.LSTM(4, 9, batch_first=True)),
    "GRU": lambda: recurrent(nn.GRU),
    "GRU, two layers and ways": lambda: recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "RNN": lambda: recurrent(nn.RNN),
    "RNN of ReLU, no biases": lambda: recurrent(nn.RNN, nonlinearity="relu", bias=False),
    "last state": lambda: lambda x: GRU(x)[1].transpose(0, 1),
    "one sequence": lambda: lambda x: torch.stack([GRU(sequence)[0] for sequence in x]),
    "LSTM cell": lambda: Cell(nn.LSTMCell(4, 3)),
    "GRU cell": lambda: Cell(nn.GRUCell(4, 3)),
    "RNN cell": lambda: Cell(nn.RNNCell(4, 3, nonlinearity="relu")),
    "compiled": lambda: compiled(perceptron()),
    "compiled encoder": lambda: compiled(encoder().eval()),
    "compiled inside": lambda: nn.Sequential(compiled(perceptron()), nn.Tanh()),
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(perceptron()),
}
GRU = nn.GRU(4, 3, batch_first=True, dtype=torch.float64)
GRAD_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def net_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]()
    return net.double() if isinstance(net, nn.Module) else net


def rows_of_copies(module: nn.Module, inputs: Tensor) -> Tensor:
    """The Jacobian by reverse mode on copies, so that a layer may work in place."""
    return rows_by_autograd(lambda x: module(x.clone()), inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile
@pytest.mark.parametrize("mode", GRAD_MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", NETS)
def test_every_product_of_every_net_and_nothing_overwritten(name: str, mode: type) -> None:
    net, x, v = net_of(name), normal(1, 2, 3, 4), normal(2, 2, 3, 4)
    J, before = rows_of_copies(net, x), x.clone()
    outputs = net(x.clone()).shape
    u, flat = normal(3, *outputs), v.flatten(1).unsqueeze(-1)
    with mode():
        assert_close(jacobian(net, x, flatten=True).detach(), J)
        chunks = jacobian(net, x, flatten=True, chunk_size=1, product_chunk_size=2)
        assert_close(chunks.detach(), J)
        assert_close(jvp(net, x, v).detach(), (J @ flat).reshape(outputs))
        transposed = J.mT @ u.flatten(1).unsqueeze(-1)
        assert_close(vjp(net, x, u).detach(), transposed.reshape(x.shape))
        operator = jacobian_operator(net, x[0])
        assert_close(torch.from_numpy(operator @ flat[0, :, 0].numpy()), (J[0] @ flat[0])[:, 0])
        top = singular_values(net, x[0], 2)
    assert_close(top, torch.linalg.svdvals(J[0])[:2])
    assert torch.equal(x, before)


@pytest.mark.parametrize("wide", [4, 40], ids=["reverse", "forward"])
@pytest.mark.parametrize("layer", ["LSTM", "encoder", "layer norm", "instance norm", "group norm"])
def test_jacobians_of_sequences_are_differentiable_in_the_parameters(layer: str, wide: int) -> None:
    net = nn.Sequential(net_of(layer), nn.Flatten())
    x = normal(1, 1, 3, 4)
    net.append(nn.Linear(net(x).shape[1], wide, dtype=torch.float64))
    weight = next(net.parameters())
    (gradient,) = torch.autograd.grad(jacobian(net, x).square().sum(), weight)
    step, direction = 1e-5, normal(2, *weight.shape)

    def energy(t: float) -> float:
        weight.data.add_(t * direction)
        value = rows_of_copies(net, x).square().sum().item()
        weight.data.sub_(t * direction)
        return value

    slope = (energy(step) - energy(-step)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("mode", GRAD_MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("wrap", [lambda net: net, compiled, nn.DataParallel])
def test_factors_of_layers_in_place_multiply_to_the_jacobian(mode: type, wrap: object) -> None:
    net = nn.Sequential(
        nn.ELU(inplace=True),
        nn.Linear(4, 6),
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        First(nn.GRU(6, 3)),
        nn.Linear(3, 3),
        nn.Dropout(0.0, inplace=True),
    ).double()
    plain = nn.Sequential(nn.ELU(), net[1], nn.ReLU(), nn.ReLU6(), *net[4:6])
    x = normal(1, 2, 4)
    J, before = rows_by_autograd(plain, x), x.clone()
    with mode():
        factors = [factor.detach() for factor in layer_jacobians(wrap(net), x)]
    assert_close(reduce(lambda product, f: f @ product, factors), J)
    assert torch.equal(x, before)


def test_the_operator_does_not_follow_the_tensor_it_was_made_from() -> None:
    x = normal(0, 4)
    operator, expected = jacobian_operator(torch.sin, x), x.cos().numpy()
    x.zero_()
    assert np.allclose(operator @ np.ones(4), expected, rtol=1e-15)
    assert np.allclose(operator.T @ np.ones(4), expected, rtol=1e-15)


@pytest.mark.parametrize("outputs", [25, 90], ids=["reverse", "forward"])
def test_chunks_of_products_bound_the_memory(outputs: int) -> None:
    """The largest hidden tensor is that of one chunk, for both samples."""
    sizes: set[int] = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and 500 in result.shape:
                sizes.add(result.numel())
            return result

    net = nn.Sequential(nn.Linear(60, 500), nn.Tanh(), nn.Linear(500, outputs)).double()
    x, products = normal(1, 2, 60), min(outputs, 60)
    for chunk, most in ((None, products), (3, 3)):
        sizes.clear()
        with Sizes():
            J = jacobian(net, x, flatten=True, product_chunk_size=chunk)
        assert_close(J, rows_by_autograd(net, x))
        weights = {parameter.numel() for parameter in net.parameters()}
        assert max(sizes - weights) == 2 * most * 500


# Closed forms, against torch.autograd


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_form_of_a_linear_layer(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(4, 3).to(dtype), normal(0, 2, 4, dtype=dtype)
    assert_close(linear_jacobian(layer.weight).expand(2, 3, 4), rows_by_autograd(layer, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_form_of_an_activation(dtype: torch.dtype) -> None:
    x = normal(0, 3, 5, dtype=dtype)
    assert_close(elementwise_jacobian(x.cos()), rows_by_autograd(torch.sin, x))
    assert_close(elementwise_jacobian((x > 0).to(dtype)), rows_by_autograd(torch.relu, x))


@settings(max_examples=40)
@given(seed=seeds, n=st.integers(1, 20), scale=st.sampled_from([1e-6, 1.0, 30.0, 1e6]))
def test_closed_form_of_softmax(seed: int, n: int, scale: float) -> None:
    logits = scale * normal(seed, 2, n)
    J = softmax_jacobian(logits)
    expected = rows_by_autograd(nn.Softmax(-1), logits)
    rounding = tolerance(n, n, J.dtype)
    assert J.shape == (2, n, n)
    assert bool(((J - expected).abs() <= rounding).all())
    assert bool((J.sum(-1).abs() <= rounding).all())
    eigenvalues = torch.linalg.eigvalsh(J)
    assert bool((eigenvalues >= -rounding).all())
    assert bool((eigenvalues <= 0.5 + rounding).all())


def test_the_norm_of_softmax_is_attained_by_two_equal_classes() -> None:
    norm = torch.linalg.matrix_norm(softmax_jacobian(torch.zeros(2, dtype=torch.float64)), 2)
    assert_close(norm, torch.tensor(0.5, dtype=torch.float64))


@settings(max_examples=40)
@given(
    seed=seeds,
    n=st.integers(2, 12),
    channels=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-5, 0.1]),
    affine=st.booleans(),
)
def test_closed_form_of_batch_norm_in_training(
    seed: int, n: int, channels: int, scale: float, eps: float, affine: bool
) -> None:
    x = scale * normal(seed, n, channels)
    gamma = normal(seed + 1, channels) if affine else None
    J = batch_norm_jacobian(x, gamma, eps)
    full = torch.autograd.functional.jacobian(
        lambda batch: functional.batch_norm(batch, None, None, gamma, training=True, eps=eps), x
    )  # (i, c, j, d)
    expected = torch.einsum("icjc->cij", full)
    sigma = (x.var(0, correction=0) + eps).sqrt()
    size = (1 if gamma is None else gamma.abs()) / sigma  # (c,)
    rounding = tolerance(n, n, x.dtype) * size[:, None]
    assert J.shape == (channels, n, n)
    assert bool(((J - expected).abs() <= rounding[:, None]).all())
    rest = full - torch.einsum("cij,cd->icjd", expected, torch.eye(channels).double())
    assert not rest.any()  # channels do not interact
    # The damped directions: the constant one, and the data themselves.
    assert bool((J.sum(-1).abs() <= n * rounding).all())
    centred = (x - x.mean(0)).T  # (c, n)
    signed = (1 if gamma is None else gamma) * eps / sigma**3
    error = (J @ centred.unsqueeze(-1)).squeeze(-1) - signed[:, None] * centred
    assert bool((error.abs() <= n * rounding * centred.abs().amax(-1, keepdim=True)).all())


def test_batch_norm_of_images_counts_positions_as_samples() -> None:
    layer = nn.BatchNorm2d(2).double()
    nn.init.uniform_(layer.weight)
    x = normal(0, 3, 2, 2, 2)
    full = torch.autograd.functional.jacobian(layer, x)  # (b, c, h, w, b, c, h, w)
    rows = x.transpose(0, 1).flatten(1).T  # (n, c)
    J = batch_norm_jacobian(rows, layer.weight.detach(), layer.eps)
    expected = torch.einsum("bchwdcij->cbhwdij", full).reshape(2, 12, 12)
    assert_close(J, expected)


def test_batch_norm_in_evaluation_is_elementwise() -> None:
    layer = nn.BatchNorm1d(4).double()
    nn.init.uniform_(layer.weight)
    layer(normal(0, 16, 4))
    layer.eval()
    x = normal(1, 2, 4)
    derivative = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach()
    assert_close(elementwise_jacobian(derivative).expand(2, 4, 4), rows_by_autograd(layer, x))


def test_closed_form_of_a_residual_block() -> None:
    branch, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), normal(0, 3, 4)
    J = residual_jacobian(rows_by_autograd(branch, x))
    assert_close(J, rows_by_autograd(lambda b: b + branch(b), x))


# Convolution as a matrix

NUMPY_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def convolve_by_loops(
    x: np.ndarray, weight: np.ndarray, stride: list[int], padding: list[tuple[int, int]],
    dilation: list[int], groups: int, padding_mode: str,
) -> np.ndarray:  # fmt: skip
    """The definition, one output entry at a time, on an input padded by NumPy."""
    padded = np.pad(x, [(0, 0), *padding], mode=NUMPY_MODES[padding_mode])
    c_out, c_group, *kernel = weight.shape
    outputs = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[1:], kernel, stride, dilation, strict=True)
    ]
    y = np.zeros((c_out, *outputs))
    for a, *o in np.ndindex(*y.shape):
        first = (a // (c_out // groups)) * c_group
        for b, *tap in np.ndindex(*weight.shape[1:]):
            at = [o[i] * stride[i] + tap[i] * dilation[i] for i in range(len(kernel))]
            y[(a, *o)] += weight[(a, b, *tap)] * padded[(first + b, *at)]
    return y


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    kernel, size, stride, dilation, padding = [], [], [], [], []
    mode = draw(st.sampled_from(list(NUMPY_MODES)))
    for _ in range(dims):
        kernel.append(draw(st.integers(1, 4 - dims // 2)))
        dilation.append(draw(st.integers(1, 2)))
        stride.append(draw(st.integers(1, 3)))
        size.append(draw(st.integers(1, 6 - dims)))
        most = {"circular": size[-1], "reflect": size[-1] - 1}.get(mode, 3)
        least = -((size[-1] - dilation[-1] * (kernel[-1] - 1) - 1) // 2)  # the kernel must fit
        if least > most:
            kernel[-1], least = 1, 0
        padding.append(draw(st.integers(max(least, 0), min(most, 3))))
    return {
        "weight": normal(draw(seeds), 2 * groups, draw(st.integers(1, 2)), *kernel),
        "input_size": tuple(size),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
        "padding_mode": mode,
    }


def layer_of(options: dict) -> nn.Module:
    weight, groups = options["weight"], options["groups"]
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][weight.dim() - 3]
    kwargs = {k: v for k, v in options.items() if k not in ("weight", "input_size")}
    layer = kind(
        weight.shape[1] * groups, len(weight), weight.shape[2:], bias=False, dtype=weight.dtype,
        **kwargs,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@settings(max_examples=200)
@given(options=convolutions(), seed=seeds)
def test_convolution_matrix_is_the_definition_and_the_layer(options: dict, seed: int) -> None:
    matrix = convolution_matrix(**options)
    layer = layer_of(options)
    x = normal(seed, layer.in_channels, *options["input_size"])
    y = layer(x[None])[0].detach()
    assert matrix.shape == (y.numel(), x.numel())
    definition = convolve_by_loops(
        x.numpy(),
        options["weight"].numpy(),
        options["stride"],
        [(p, p) for p in options["padding"]],
        options["dilation"],
        options["groups"],
        options["padding_mode"],
    )
    scale = float(matrix.abs().sum(1).max() * x.abs().max())
    rounding = tolerance(*matrix.shape, matrix.dtype) * scale
    product = (matrix @ x.flatten()).reshape(y.shape)
    assert float((product - torch.from_numpy(definition)).abs().max()) <= rounding
    assert float((product - y).abs().max()) <= rounding
    full = torch.autograd.functional.jacobian(layer, x[None], vectorize=True)
    assert_close(matrix, full.reshape(matrix.shape))


@pytest.mark.parametrize("mode", NUMPY_MODES)
@pytest.mark.parametrize("kernel", [(3, 2), (4, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_same_puts_the_odd_entry_last(mode: str, kernel: tuple[int, int]) -> None:
    weight = normal(0, 3, 2, *kernel)
    layer = nn.Conv2d(2, 3, kernel, padding="same", dilation=(1, 2), padding_mode=mode, bias=False)
    layer.double().weight.data.copy_(weight)
    matrix = convolution_matrix(weight, (5, 6), padding="same", dilation=(1, 2), padding_mode=mode)
    assert_close(matrix, rows_by_autograd(layer, normal(1, 1, 2, 5, 6))[0])
    assert torch.equal(
        convolution_matrix(weight, (5, 6), padding="valid"), convolution_matrix(weight, (5, 6))
    )


def test_convolution_matrix_on_paper() -> None:
    kernel = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert convolution_matrix(kernel, 4, padding=1).tolist() == [
        [2, 3, 0, 0], [1, 2, 3, 0], [0, 1, 2, 3], [0, 0, 1, 2],
    ]  # fmt: skip
    assert convolution_matrix(kernel, 4, padding=1, padding_mode="circular").tolist() == [
        [2, 3, 0, 1], [1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2],
    ]  # fmt: skip
    assert convolution_matrix(kernel, 4, padding=1, padding_mode="reflect").tolist() == [
        [2, 4, 0, 0], [1, 2, 3, 0], [0, 1, 2, 3], [0, 0, 4, 2],
    ]  # fmt: skip
    assert convolution_matrix(kernel, 4, padding=1, padding_mode="replicate").tolist() == [
        [3, 3, 0, 0], [1, 2, 3, 0], [0, 1, 2, 3], [0, 0, 1, 5],
    ]  # fmt: skip


def test_a_circular_convolution_commutes_with_shifts() -> None:
    weight = normal(0, 1, 1, 3, 3)
    matrix = convolution_matrix(weight, (4, 5), padding=1, padding_mode="circular")
    for axis in (0, 1):
        shift = torch.eye(20, dtype=torch.float64).reshape(4, 5, 20).roll(1, axis).reshape(20, 20)
        assert torch.equal(matrix @ shift, shift @ matrix)


def test_the_transposed_convolution_is_the_transpose() -> None:
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, bias=False).double()
    x = normal(0, 1, 3, 3, 4)
    y = layer(x)  # (1, 2, 5, 7)
    matrix = convolution_matrix(layer.weight.detach(), y.shape[2:], stride=2, padding=1)
    assert_close((matrix.T @ x.flatten()).reshape(y.shape), y.detach())


def test_convolution_matrix_is_differentiable_and_linear_in_the_weight() -> None:
    weight = normal(0, 2, 1, 3).requires_grad_()
    matrix = convolution_matrix(weight, 5, padding=1)
    matrix.sum().backward()
    counts = torch.tensor([4.0, 5.0, 4.0], dtype=torch.float64)  # how often each tap reads inside
    assert_close(weight.grad, counts.expand(2, 1, 3))
    assert_close(convolution_matrix(2 * weight, 5, padding=1), 2 * matrix)


# Errors

x4 = torch.ones(2, 4)
BAD_INPUTS = {
    "a list": ([[1.0]], TypeError, "floating-point tensor, got list"),
    "integers": (torch.ones(2, 4, dtype=torch.int64), TypeError, "got torch.int64"),
    "no batch": (torch.tensor(1.0), ValueError, r"got shape \(\)"),
    "empty batch": (torch.ones(0, 4), ValueError, r"got shape \(0, 4\)"),
    "NaN": (torch.full((2, 4), math.nan), ValueError, "finite"),
    "infinite": (torch.full((2, 4), math.inf), ValueError, "finite"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_inputs_are_refused_by_name(bad: str) -> None:
    inputs, error, message = BAD_INPUTS[bad]
    net = nn.Linear(4, 3)
    with pytest.raises(error, match=f"inputs must be .*{message}"):
        jacobian(net, inputs)
    with pytest.raises(error, match=f"inputs must be .*{message}"):
        jvp(net, inputs, x4)
    with pytest.raises(error, match=f"inputs must be .*{message}"):
        vjp(net, inputs, x4)
    with pytest.raises(error, match=f"inputs must be .*{message}"):
        layer_jacobians(nn.Sequential(net), inputs)


MIXING = {
    "batch norm": (nn.BatchNorm1d(4), "keep samples apart, but its BatchNorm1d"),
    "batch norm inside": (nn.Sequential(nn.BatchNorm1d(4)), "BatchNorm1d '0' normalises"),
    "batch norm without running statistics": (
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
        "keep samples apart",
    ),
    "dropout": (nn.Sequential(nn.Dropout(0.1)), "deterministic, but its Dropout '0'"),
    "alpha dropout": (nn.AlphaDropout(0.1), "deterministic"),
}
CALLS = {
    "jacobian": lambda f: jacobian(f, x4),
    "jvp": lambda f: jvp(f, x4, x4),
    "vjp": lambda f: vjp(f, x4, x4),
    "jacobian_operator": lambda f: jacobian_operator(f, x4[0]),
    "singular_values": lambda f: singular_values(f, x4[0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mixing", MIXING)
def test_modules_that_mix_samples_or_draw_are_refused(call: str, mixing: str) -> None:
    module, message = MIXING[mixing]
    with pytest.raises(ValueError, match=f"module must .*{message}"):
        CALLS[call](module)


@pytest.mark.parametrize("call", CALLS)
def test_random_functions_are_refused(call: str) -> None:
    with pytest.raises(RuntimeError, match="random"):
        CALLS[call](lambda x: functional.dropout(x, 0.5))


@pytest.mark.parametrize("call", CALLS)
def test_modules_that_do_not_map_a_batch_to_a_batch_are_refused(call: str) -> None:
    with pytest.raises(TypeError, match="module must be callable, got int"):
        CALLS[call](3)
    with pytest.raises(TypeError, match="module must return a tensor, got tuple"):
        CALLS[call](lambda x: (x, x))
    with pytest.raises(ValueError, match=r"one output for each sample, .* shape \(\)"):
        CALLS[call](torch.sum)
    with pytest.raises(ValueError, match=r"one output for each sample, .* shape \(4,\)"):
        CALLS[call](lambda x: x[0])


WRONG_OUTPUTS = {
    "tuple": (lambda x: (x, x), r"got tuple: pick .*lambda x: module\(x\)\[0\]"),
    "dictionary": (lambda x: {"logits": x}, r"got dict: pick .*module\(x\)\['logits'\]"),
    "LSTM": (nn.LSTM(4, 3), r"got tuple: pick .*module\(x\)\[0\]"),
    "classes": (lambda x: x.argmax(-1), "real floating-point numbers, got torch.int64"),
    "complex": (torch.fft.fft, "real floating-point numbers, got torch.complex64"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", WRONG_OUTPUTS)
def test_outputs_that_are_no_tensor_of_numbers_are_refused(call: str, wrong: str) -> None:
    module, message = WRONG_OUTPUTS[wrong]
    with pytest.raises(TypeError, match=f"module must return .*{message}"):
        CALLS[call](module)


def test_arrays_are_told_how_to_become_tensors() -> None:
    net, array = nn.Linear(4, 3).double(), np.ones((2, 4))
    with pytest.raises(TypeError, match=r"inputs must be .*got ndarray: call torch.from_numpy"):
        jacobian(net, array)
    with pytest.raises(TypeError, match=r"tangents must be .*torch.from_numpy"):
        jvp(net, torch.from_numpy(array), array)
    with pytest.raises(TypeError, match=r"x must be .*torch.from_numpy"):
        singular_values(net, array[0])


def test_chunks_and_k_are_positive_integers() -> None:
    net, x = nn.Linear(4, 3), torch.ones(2, 4)
    for name in ("chunk_size", "product_chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            jacobian(net, x, **{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an integer, got 1.5"):
            jacobian(net, x, **{name: 1.5})
        assert_close(jacobian(net, x, **{name: np.int64(1)}), jacobian(net, x))
    assert singular_values(net, x[0], np.int64(2)).shape == (2,)
    with pytest.raises(TypeError, match=r"k must be an integer, got 1.5"):
        singular_values(net, x[0], 1.5)


CHANGING = {
    "LSTM with dropout": nn.LSTM(4, 3, 2, dropout=0.5),
    "attention with dropout": nn.MultiheadAttention(4, 2, dropout=0.1),
    "encoder": nn.TransformerEncoderLayer(4, 2),
    "RReLU": nn.RReLU(),
    "spectral normalisation": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "instance norm, tracked": nn.InstanceNorm1d(4, track_running_stats=True),
    "compiled": compiled(nn.BatchNorm1d(4)),
    "data parallel": nn.DataParallel(nn.Dropout(0.5)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("changing", CHANGING)
def test_modules_that_change_in_training_are_refused_untouched(call: str, changing: str) -> None:
    module = CHANGING[changing]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"module must .*call module.eval\(\)"):
        CALLS[call](module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_dropout_of_a_hidden_recurrent_layer_is_random() -> None:
    lstm = nn.LSTM(4, 3, 2, dropout=0.5)
    with pytest.raises(RuntimeError, match="random"):
        jacobian(lambda x: lstm(x)[0], torch.ones(1, 2, 4))


def test_packed_sequences_are_refused() -> None:
    lstm = nn.LSTM(4, 3, batch_first=True)

    def packed(x: Tensor) -> Tensor:
        return lstm(nn.utils.rnn.pack_padded_sequence(x, [2], batch_first=True))[0].data

    with pytest.raises(TypeError, match="module must not pack sequences"):
        jacobian(packed, torch.ones(1, 2, 4))


def test_harmless_modes_are_allowed() -> None:
    net = nn.Sequential(nn.Dropout(0.0), nn.InstanceNorm1d(4), nn.LayerNorm(4))
    assert jacobian(net, torch.ones(2, 4, 4)).shape == (2, 4, 4, 4, 4)
    assert jacobian(nn.Dropout(0.5).eval(), x4).shape == (2, 4, 4)


def test_vectors_of_the_wrong_shape_or_dtype_are_refused() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"tangents must have shape \(2, 4\).*got \(2, 3\)"):
        jvp(net, x4, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"cotangents must have shape \(2, 3\).*got \(2, 4\)"):
        vjp(net, x4, x4)
    with pytest.raises(ValueError, match=r"tangents must have .*float32, got .*float64"):
        jvp(net, x4, x4.double())
    with pytest.raises(ValueError, match=r"cotangents must have .*float32, got .*float64"):
        vjp(net, x4, torch.ones(2, 3).double())
    with pytest.raises(ValueError, match="tangents must be finite"):
        jvp(net, x4, x4 * math.nan)
    with pytest.raises(TypeError, match="cotangents must be a floating-point tensor"):
        vjp(net, x4, None)


def test_singular_values_refuse_what_does_not_exist() -> None:
    net, x = nn.Linear(4, 3), torch.ones(4)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must be between 1 and .* = 3, got {k}"):
            singular_values(net, x, k)
    with pytest.raises(ValueError, match=r"which must be .*got 'middle'"):
        singular_values(net, x, 1, "middle")
    with pytest.raises(ValueError, match="x must be finite"):
        singular_values(net, x * math.nan)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        jacobian_operator(net, [1.0])


def test_factors_refuse_what_is_not_a_plain_sequential() -> None:
    class Skipping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    hooked, early = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    early.register_forward_pre_hook(lambda module, args: 2 * args[0])
    for bad in (nn.Linear(4, 4), Skipping(nn.Linear(4, 4)), hooked, early):
        with pytest.raises(TypeError, match=f"sequential must .*got {type(bad).__name__}"):
            layer_jacobians(bad, x4)


def test_closed_forms_refuse_by_name() -> None:
    with pytest.raises(ValueError, match=r"weight must be a matrix .*got shape \(4,\)"):
        linear_jacobian(torch.ones(4))
    with pytest.raises(TypeError, match="weight must be a floating-point tensor, got list"):
        linear_jacobian([[1.0]])
    with pytest.raises(ValueError, match=r"derivative must be .*at least 1 dim"):
        elementwise_jacobian(torch.tensor(1.0))
    with pytest.raises(ValueError, match="logits must be finite"):
        softmax_jacobian(torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="branch_jacobian must be square, got 2 outputs and 3"):
        residual_jacobian(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"branch_jacobian must be .*at least 2 dim"):
        residual_jacobian(torch.ones(3))
    with pytest.raises(ValueError, match=r"inputs must be \(n, c\) with n >= 2.*\(1, 3\)"):
        batch_norm_jacobian(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\).*got \(2,\)"):
        batch_norm_jacobian(torch.ones(4, 3), torch.ones(2))
    with pytest.raises(ValueError, match="eps must be non-negative, got -1"):
        batch_norm_jacobian(torch.ones(4, 3), eps=-1.0)


BAD_CONVOLUTIONS = {
    "a matrix": ({"weight": torch.ones(2, 2)}, r"weight must be .*got shape \(2, 2\)"),
    "a vector": ({"weight": torch.ones(2)}, r"weight must be .*got shape \(2,\)"),
    "four dimensions": ({"weight": torch.ones(1, 1, 1, 1, 1, 1)}, "weight must be .*one to three"),
    "NaN": ({"weight": torch.full((2, 2, 3, 3), math.nan)}, "weight must be finite"),
    "size": ({"input_size": (5, 5, 5)}, r"input_size must be one or 2 integers >= 1, got \(5, 5"),
    "no size": ({"input_size": 0}, "input_size must be .*got 0"),
    "stride": ({"stride": 0}, "stride must be .*>= 1, got 0"),
    "dilation": ({"dilation": (1, 0)}, r"dilation must be .*got \(1, 0\)"),
    "padding": ({"padding": -1}, "padding must be .*>= 0, got -1"),
    "padding by name": ({"padding": "full"}, "padding must be .*got 'full'"),
    "same, strided": ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, got 2"),
    "groups": ({"groups": 3}, "groups must divide the 2 output channels, got 3"),
    "mode": ({"padding_mode": "mirror"}, "padding_mode must be .*got 'mirror'"),
    "kernel too large": ({"input_size": 2}, "input_size must hold the kernel in dimension 0"),
    "reflect": (
        {"padding": 5, "padding_mode": "reflect"},
        "padding must be at most 4 with reflect padding of 5 inputs, got 5",
    ),
    "circular": ({"padding": 6, "padding_mode": "circular"}, "at most 5 with circular padding"),
    "circular on the longer side": (
        {
            "weight": torch.ones(2, 2, 6),
            "input_size": 2,
            "padding": "same",
            "padding_mode": "circular",
        },
        "at most 2 with circular padding of 2 inputs, got 3",
    ),
}


@pytest.mark.parametrize("bad", BAD_CONVOLUTIONS)
def test_bad_convolutions_are_refused_by_name(bad: str) -> None:
    options, message = BAD_CONVOLUTIONS[bad]
    with pytest.raises(ValueError, match=message):
        convolution_matrix(**{"weight": torch.ones(2, 2, 3, 3), "input_size": 5, **options})


def test_all_names_exist_once() -> None:
    assert len(set(jacobians.__all__)) == len(jacobians.__all__)
    assert all(callable(getattr(jacobians, name)) for name in jacobians.__all__)
