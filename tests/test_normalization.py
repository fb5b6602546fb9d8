"""Centering and scaling: by definition, by theorem, tightly; the judges are NumPy and torch's own.

That each answer of a layer holds is measured in test_life_cycle.py.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook import normalization
from lipbook.activations import MaxMin
from lipbook.composition import Box, check_layer, lipschitz_bound
from lipbook.freezing import freeze
from lipbook.normalization import (
    BatchCentering,
    LayerCentering,
    ScalarBatchNorm,
    ScaleAndBias,
    Unscale,
    batch_mean,
    layer_centering,
    pooled_variance,
)
from lipbook.orthogonal import OrthogonalLinear, qr
from lipbook.robustness import certify
from lipbook.rounding import forward_error
from lipbook.rules import affine_rule

BATCH_LAYERS: dict[str, Callable[..., Any]] = {
    "centering": BatchCentering,
    "scalar": ScalarBatchNorm,
}
batch_layers = pytest.mark.parametrize("name", BATCH_LAYERS)


def scattered(layer: nn.Module, seed: int = 0) -> Any:
    """The layer in float64, with statistics and parameters as training may leave them."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator).double() + 0.1)
    return layer


# ------------------------------------------------------------------------------ definition


@pytest.mark.parametrize("dim", [1, -1, 2, (1, 3), [2, 3], (1, 2, 3)])
def test_layer_centering_by_numpy(dim: Any) -> None:
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    axes = tuple(dim) if isinstance(dim, (tuple, list)) else dim
    expected = x.numpy() - x.numpy().mean(axes, keepdims=True)
    np.testing.assert_allclose(layer_centering(x, dim).numpy(), expected, rtol=0, atol=1e-14)
    assert torch.equal(LayerCentering(dim)(x), layer_centering(x, dim))


@pytest.mark.parametrize("shape", [(7, 3), (6, 3, 2), (4, 3, 2, 5), (2, 3, 2, 1, 3)])
def test_statistics_by_numpy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) + 10
    rows = np.moveaxis(x.numpy(), 1, -1).reshape(-1, 3)
    mean = batch_mean(x)
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(pooled_variance(x, mean).item(), rows.var(0).mean(), rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", [(7, 3), (6, 3, 2), (4, 3, 2, 5)])
def test_batch_centering_has_the_running_mean_of_torch(
    momentum: float | None, shape: tuple[int, ...]
) -> None:
    kinds: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    other = kinds[len(shape)](3, momentum=momentum).double()
    layer = BatchCentering(3, momentum=momentum).double()
    for step in range(4):
        x = torch.randn(shape, dtype=torch.float64) * 2 + step
        y = layer(x)
        other(x)
        np.testing.assert_allclose(y.detach().numpy(), x - batch_mean(x).view(other_view(shape)))
        np.testing.assert_allclose(layer.running_mean, other.running_mean, rtol=1e-13)
    assert int(layer.num_batches_tracked) == int(other.num_batches_tracked) == 4
    layer.eval()
    expected = x - layer.running_mean.view(other_view(shape))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def other_view(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (-1, *[1] * (len(shape) - 2))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_scalar_batch_norm_is_torchs_for_one_channel(momentum: float | None) -> None:
    """With one channel the pooled variance is its own. Torch keeps N / (N - 1) of it in mind."""
    layer = ScalarBatchNorm(1, eps=1e-3, momentum=momentum).double()
    other = nn.BatchNorm1d(1, eps=1e-3, momentum=momentum).double()
    with torch.no_grad():
        layer.bias.fill_(0.3)
        other.bias.fill_(0.3)
    for step in range(3):
        x = torch.randn(9, 1, 4, dtype=torch.float64) * (1 + step) - step
        torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    count = 36 / 35
    started = 0.0 if momentum is None else (1 - momentum) ** 3
    expected = (other.running_var - started) / count + started
    torch.testing.assert_close(layer.running_var, expected[0], rtol=1e-12, atol=0)
    other.running_var.copy_(layer.running_var[None])
    x = torch.randn(5, 1, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=1e-12, atol=1e-12)


def test_the_pooled_variance_is_the_mean_of_torchs() -> None:
    x = torch.randn(8, 4, 3, dtype=torch.float64) * torch.arange(1.0, 5.0).view(4, 1)
    other = nn.BatchNorm1d(4, momentum=1.0).double()
    other(x)
    found = pooled_variance(x, batch_mean(x))
    torch.testing.assert_close(found, other.running_var.mean() * 23 / 24, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 2)])
def test_scale_and_bias_by_its_formula(shape: tuple[int, ...]) -> None:
    layer = scattered(ScaleAndBias(3))
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer.weight * x + layer.bias.view(other_view(shape))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-15)
    assert ScaleAndBias(3, -2.0, bias=False)(torch.ones(1, 3)).tolist() == [[-2.0, -2.0, -2.0]]


# --------------------------------------------------------------------------------- theorem


@given(st.integers(1, 6), st.integers(1, 4), st.floats(-6, 6), st.integers(0, 99))
def test_layer_centering_is_an_orthogonal_projection(n: int, m: int, log: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(m, n, dtype=torch.float64) * 10**log
    c = LayerCentering((1, 2))(torch.eye(n * m, dtype=torch.float64).view(-1, m, n)).flatten(1)
    assert torch.allclose(c, c.mT, rtol=0, atol=1e-15)
    values = np.linalg.svd(c.numpy(), compute_uv=False)
    np.testing.assert_allclose(values, [*[1.0] * (n * m - 1), 0.0], rtol=0, atol=1e-14)
    y = layer_centering(x)
    torch.testing.assert_close(layer_centering(y), y, rtol=0, atol=1e-14 * 10**log)
    assert y.norm() <= x.norm() * (1 + 1e-14)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_constant_of_layer_centering_is_that_of_its_matrix(n: int, p: float) -> None:
    c = np.eye(n) - np.ones((n, n)) / n
    bound = lipschitz_bound(LayerCentering(), (n, 3), p)
    assert bound.kind == "exact"
    assert bound.value == pytest.approx(np.linalg.norm(c, {math.inf: np.inf}.get(p, p)), rel=1e-12)


@batch_layers
def test_in_training_the_batch_is_projected(name: str) -> None:
    """The Jacobian of the whole batch of the centering: values 1, and a 0 for each channel."""
    layer = BATCH_LAYERS[name](2, bias=False).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x).view(24, 24)
    values = np.linalg.svd(jacobian.numpy(), compute_uv=False)
    if name == "centering":
        np.testing.assert_allclose(values, [*[1.0] * 22, 0.0, 0.0], rtol=0, atol=1e-13)
    else:  # divided by a size of the batch, which has a gradient: one direction more is lost
        s = (pooled_variance(x, batch_mean(x)) + 1e-5).sqrt().item()
        np.testing.assert_allclose(values[:21] * s, 1.0, rtol=1e-12)
        assert values[21] * s < 1e-4


@given(st.integers(2, 6), st.integers(0, 99))
def test_one_scale_commutes_with_orthogonal_maps(c: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = qr(torch.randn(c, c, dtype=torch.float64))
    x = torch.randn(9, c, dtype=torch.float64) * torch.arange(1.0, c + 1.0) + 3
    first, second = (ScalarBatchNorm(c, bias=False).double() for _ in range(2))
    torch.testing.assert_close(first(x @ q.mT), second(x) @ q.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.running_var, second.running_var, rtol=1e-12, atol=0)
    plain = nn.BatchNorm1d(c, affine=False).double()  # which does not
    assert (plain(x @ q.mT) - plain(x) @ q.mT).abs().max() > 1e-3


def test_a_network_with_scales_is_a_multiple_of_one_without() -> None:
    """Scales move to the end, where they multiply the logits, and biases take them on the way."""
    linear = [OrthogonalLinear(6, 6).double() for _ in range(2)]
    norms = [scattered(ScalarBatchNorm(6), seed).eval() for seed in range(2)]
    chain = nn.Sequential(linear[0], norms[0], nn.ReLU(), linear[1], norms[1])
    scales = [(norm.running_var + norm.eps).sqrt().item() for norm in norms]
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        h, before = x, 1.0
        for layer, norm, s in zip(linear, norms, scales, strict=True):
            shift = before * layer.bias - before * norm.running_mean + before * s * norm.bias
            h = h @ layer.weight.mT + shift
            before *= s
            h = h if norm is norms[-1] else h.relu()
        torch.testing.assert_close(chain(x), h / before, rtol=1e-12, atol=1e-12)
    bound = lipschitz_bound(chain, (6,)).value
    assert bound == pytest.approx(1 / math.prod(scales), rel=1e-9)


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("eps", [1.0, 0.25])
def test_torchs_normalisation_of_a_layer_has_a_known_constant(make: Any, eps: float) -> None:
    bound = lipschitz_bound(make(5, eps=eps, elementwise_affine=False), (5,))
    assert (bound.kind, bound.value) == ("exact", pytest.approx(1 / math.sqrt(eps), rel=1e-12))


# ------------------------------------------------------------------------------- tightness


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda: scattered(BatchCentering(3)).eval(),
        lambda: scattered(ScalarBatchNorm(3)).eval(),
        lambda: scattered(ScaleAndBias(3)),
    ],
)
def test_any_two_points_attain_the_constant(make: Callable[[], nn.Module], p: float) -> None:
    layer = make()
    bound = lipschitz_bound(layer, (3, 4), p)
    assert bound.kind == "exact"
    x, y = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    run, rise = ((part).flatten().norm(p).item() for part in (x - y, layer(x) - layer(y)))
    assert rise / run == pytest.approx(bound.value, rel=1e-12)


# ---------------------------------------------------------------- training and evaluation


@batch_layers
def test_a_bound_in_training_is_refused(name: str) -> None:
    """And with reason: there one sample changes the outputs of another."""
    net = nn.Sequential(OrthogonalLinear(4, 4), BATCH_LAYERS[name](4), OrthogonalLinear(4, 3))
    loader = [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    why = r"the mean of the batch in training mode.*\.eval\(\)"
    mode = r"evaluation mode: call \.eval\(\)"
    refused: list[tuple[str, Callable[[], object]]] = [
        (why, lambda: lipschitz_bound(net, (4,))),
        (why, lambda: lipschitz_bound(net, (4,), domain=Box(0, 1))),
        (why, lambda: forward_error(net, torch.randn(2, 4))),
        (mode, lambda: certify(net, loader, (4,), sound=False)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    x = torch.randn(3, 4)
    y = net(x)
    x[0] += 1
    assert (net(x)[1:] - y[1:]).abs().max() > 0.01
    net.eval()
    y = net(x)
    x[0] += 1
    assert torch.equal(net(x)[1:], y[1:])
    assert certify(net, loader, (4,), sound=False).radius.isfinite().all()


@batch_layers
def test_evaluation_touches_no_buffer_and_training_all(name: str) -> None:
    layer = BATCH_LAYERS[name](3)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(torch.randn(5, 3) + 2)
    freeze(layer.train())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    layer(torch.randn(5, 3) + 2)
    after = layer.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved == set(before) - {"bias"}


@batch_layers
def test_a_trained_state_loads_into_a_new_layer(name: str) -> None:
    layer = BATCH_LAYERS[name](3, momentum=0.5)
    layer(torch.randn(5, 3, 2, 2) + 2)
    twin = BATCH_LAYERS[name](3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@batch_layers
def test_gradients_flow_through_the_statistics(name: str) -> None:
    layer = BATCH_LAYERS[name](2, momentum=0.0).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (3, 3, 2, 2)])
@pytest.mark.parametrize("make", [BatchCentering, ScaleAndBias])
def test_gradients_of_every_kind(
    make: Any, shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both modes, twice, in batches, and for batches of parameters."""
    monkeypatch.setattr(normalization, "_PIECE", 24)  # two samples of the larger shape at once
    layer = scattered(make(3, bias=bias))
    state = {name: value.clone() for name, value in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in state.items()}
        given = dict(zip(names, parameters, strict=True)) | buffers
        return torch.func.functional_call(layer, given, (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    checks: dict[str, Any] = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(function, inputs, **checks)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)
    if make is ScaleAndBias:  # of which no buffer is changed
        *others, last = inputs
        both = torch.vmap(lambda each: function(*others, each))(torch.stack((last, -2 * last)))
        torch.testing.assert_close(both[1], function(*others, -2 * last))


def test_float32_steps_are_rounded_as_if_one_by_one() -> None:
    x = torch.randn(5, 3, 4, 4) + 100
    layer = scattered(BatchCentering(3)).float()
    steps = (x - batch_mean(x).view(3, 1, 1)) + layer.bias.view(3, 1, 1)
    assert torch.equal(layer(x), steps)
    scale = scattered(ScaleAndBias(3)).float()
    assert torch.equal(scale(x), x * scale.weight + scale.bias.view(3, 1, 1))


@batch_layers
def test_one_sample_is_its_own_mean(name: str) -> None:
    layer = BATCH_LAYERS[name](3)
    with pytest.raises(ValueError, match=r"more than one number a channel.*\(1, 3\)"):
        layer(torch.randn(1, 3))
    layer(torch.randn(1, 3, 2))
    layer.eval()(torch.randn(1, 3))


@batch_layers
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
def test_training_compiles(name: str) -> None:
    torch.compiler.reset()
    layer, twin = (BATCH_LAYERS[name](3, momentum=None) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 2)
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@batch_layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    layer = BATCH_LAYERS[name](1, momentum=1.0)
    x = (torch.randn(70_000, 1) + 3).to(dtype)  # float16 ends at 65,504
    assert layer(x).dtype == dtype
    assert abs(layer.running_mean.item() - x.double().mean().item()) < 1e-4


# ------------------------------------------------------------------------ several processes


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(3, 4), BatchCentering(4), nn.Tanh(), nn.Linear(4, 4), ScalarBatchNorm(4)
        )


def descend(rank: int, ranks: int, folder: str) -> None:
    """Three steps on a share of the batch; the shares differ in size."""
    net: nn.Module = Deep().double()
    net.load_state_dict(torch.load(f"{folder}/start.pt"))
    x, target = torch.load(f"{folder}/data.pt")
    total = len(x)
    if ranks > 1:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
        )
        x, target = x.split([5, 2])[rank], target.split([5, 2])[rank]
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        ((net(x) - target).square().sum() * ranks / total).backward()  # gradients are averaged
        optimizer.step()
    if ranks > 1:
        torch.save(net.module.state_dict(), f"{folder}/rank{rank}.pt")
        torch.distributed.destroy_process_group()
    else:
        torch.save(net.state_dict(), f"{folder}/alone.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch built without it")
def test_two_processes_share_their_statistics(tmp_path: Path) -> None:
    """Parameters and buffers are those of one process on the whole batch, without a broadcast."""
    net = Deep().double()
    x = torch.randn(7, 3, dtype=torch.float64) * 2 + 1
    torch.save(net.state_dict(), tmp_path / "start.pt")
    torch.save((x, torch.randn(7, 4, dtype=torch.float64)), tmp_path / "data.pt")
    descend(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(descend, (2, str(tmp_path)), nprocs=2)
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "rank0", "rank1"))
    for key, value in alone.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-10, atol=1e-12, msg=key)
        assert not torch.equal(value, net.state_dict()[key]), key


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_centering(torch.ones(2, 3), 0), "dim must not be 0, that of the batch"),
        (lambda: layer_centering(torch.ones(2, 3), -2), "dim must not be 0, that of the batch"),
        (lambda: LayerCentering((1, 0)), "dim must not be 0, that of the batch"),
        (lambda: layer_centering(torch.ones(2, 3), 2), "x must have the dimensions dim=2"),
        (lambda: lipschitz_bound(LayerCentering(3), (2,)), "dimensions dim=3"),
        (lambda: batch_mean(torch.ones(3)), r"x must have shape \(batch, channels"),
        (
            lambda: pooled_variance(torch.ones(2, 3), torch.ones(2)),
            r"mean must have one number for each channel of x, got shape \(2,\)",
        ),
        (lambda: BatchCentering(3).eval()(torch.ones(2, 4)), "one number for each channel"),
        (lambda: BatchCentering(3)(torch.ones(2, 4)), "x must have 3 channels, got 4"),
        (lambda: ScaleAndBias(3)(torch.ones(2, 4)), "bias must have one number for each channel"),
        (lambda: BatchCentering(3, momentum=1.5), r"momentum must be in \[0, 1\]"),
        (lambda: ScalarBatchNorm(3, eps=0.0), "eps must be positive"),
    ],
)
def test_errors_name_argument_and_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def unscale(c: int) -> Unscale:
    """Of two layers with statistics."""
    norms = scattered(ScalarBatchNorm(c, eps=0.3)), scattered(ScalarBatchNorm(4))
    norms[0].running_var.fill_(5.0)
    return Unscale(*norms).float()


def test_a_product_of_scales_by_numpy() -> None:
    layer = unscale(3).double()
    variances = [norm.running_var.item() + norm.eps for norm in layer.norms]
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    np.testing.assert_allclose(layer(x), x.numpy() * np.sqrt(np.prod(variances)), rtol=1e-14)
    for p in (1, 2, math.inf):
        bound = lipschitz_bound(layer, (3, 4), p)
        assert bound.kind == "exact"
        assert bound.value == pytest.approx(np.sqrt(np.prod(variances)), rel=1e-14)


def test_a_network_whose_scales_are_undone_has_constant_one() -> None:
    """Whatever it was trained on; any two points attain it, as in a chain of orthogonal layers."""
    torch.manual_seed(0)
    norms = [ScalarBatchNorm(6, momentum=None) for _ in range(3)]
    layers = [layer for norm in norms for layer in (OrthogonalLinear(6, 6), norm, MaxMin())]
    net = nn.Sequential(*layers, Unscale(*norms))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for size in (1e-3, 1e-2, 1e-1):
        optimizer.zero_grad()
        net(size * torch.randn(32, 6)).square().mean().backward()
        optimizer.step()
    net = net.double().eval()
    scales = [norm.running_var.item() + norm.eps for norm in norms]
    assert min(scales) < 0.5
    assert lipschitz_bound(net, (6,)).value == pytest.approx(1, abs=1e-6)
    assert lipschitz_bound(net[:-1], (6,)).value > 3
    x = torch.randn(6, dtype=torch.float64)
    matrix = torch.func.jacrev(lambda z: net(z[None])[0])(x).detach()
    np.testing.assert_allclose(np.linalg.svd(matrix.numpy())[1], 1, rtol=0, atol=1e-6)
    names = [name for name in net.state_dict() if name.startswith("9.norms.2")]
    assert "9.norms.2.running_var" in names
    twin = copy.deepcopy(net)
    twin[7].running_var.fill_(9.0)
    assert twin[9].norms[2].running_var.item() == 9  # it is shared
    assert net[7].running_var.item() != 9
    assert torch.equal(freeze(net)(x[None]), net(x[None]))


def test_a_product_of_scales_is_of_such_layers() -> None:
    with pytest.raises(ValueError, match="norms must hold one layer or more, got none"):
        Unscale()
    with pytest.raises(TypeError, match="norms must be ScalarBatchNorm layers, got BatchNorm2d"):
        Unscale(ScalarBatchNorm(3), nn.BatchNorm2d(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [BatchCentering, ScalarBatchNorm, ScaleAndBias, unscale])
def test_programs_in_another_dtype_are_not_certified(make: Any) -> None:
    layer = make(3).eval()
    with pytest.raises(ValueError, match="must run in the dtype of its parameters"):
        forward_error(layer, torch.randn(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerCentering(1),
        lambda: scattered(BatchCentering(5)).float().eval(),
        lambda: scattered(ScalarBatchNorm(5)).float().eval(),
        lambda: scattered(ScaleAndBias(5)).float(),
    ],
)
def test_errors_of_programs_are_bounded(make: Callable[[], Any], p: float) -> None:
    """Of large numbers whose differences are small: what is subtracted was rounded."""
    layer = make()
    x = torch.randn(64, 5) + 1e4
    result = forward_error(layer, x, p)
    exact = copy.deepcopy(layer).double()(x.double())
    off = torch.linalg.vector_norm((layer(x).double() - exact).flatten(1), p, dim=1)
    assert (off <= result.error).all()
    assert off.max() > result.error.max() / 60  # and not by far more than it is


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_errors_of_a_product_of_scales_are_bounded(p: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        layer, x = unscale(5).float(), torch.randn(8, 5)
        for norm in layer.norms:
            norm.running_var.uniform_(0.1, 4)
        result = forward_error(layer, x, p)
        off = (layer(x).double() - copy.deepcopy(layer).double()(x.double())).norm(p, dim=1)
        assert (off <= result.error).all()
        assert (result.error <= 20 * 2.0**-24 * result.outputs.norm(p, dim=1)).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_errors_count_their_roundings(p: float) -> None:
    """Of n numbers, a quotient and a difference; or the seven of a scale; with some to spare."""
    x = torch.randn(1, 6) + 100
    size = np.linalg.norm(x.numpy().ravel().astype(float), {math.inf: np.inf}.get(p, p))
    centered = forward_error(LayerCentering(), x, p).error.item()
    assert centered == pytest.approx((6 + 2 + 2) * 2.0**-24 * (2 - 2 / 6) * size, rel=1e-4)
    layer = scattered(ScalarBatchNorm(6, eps=0.01)).float().eval()
    a = 1 / math.sqrt(layer.running_var.item() + 0.01)
    shift = a * layer.running_mean.double().abs() + layer.bias.detach().double().abs()
    moved = np.linalg.norm(shift.numpy(), {math.inf: np.inf}.get(p, p))
    found = forward_error(layer, x, p).error.item()
    assert found == pytest.approx((7 + 3) * 2.0**-24 * (a * size + moved), rel=1e-4)


ANSWERED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "layer": (LayerCentering, (4, 2)),
    "pixels": (lambda: LayerCentering((2, 3)), (2, 3, 2)),
    "batch": (lambda: scattered(BatchCentering(3)).float().eval(), (3, 2)),
    "scalar": (lambda: scattered(ScalarBatchNorm(3)).float().eval(), (3, 2)),
    "scale": (lambda: scattered(ScaleAndBias(3)).float(), (3, 2)),
    "unscale": (lambda: unscale(3).float(), (3, 2)),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_every_answer_holds_and_the_matrix_is_the_smallest(name: str) -> None:
    make, shape = ANSWERED[name]
    layer = make()
    check_layer(layer, shape, samples=6)
    affine = affine_rule(layer.double(), shape)
    matrix = affine.matrix(shape).numpy()
    ones = torch.ones(1, *shape, dtype=torch.float64)
    for function, expected in ((affine.absolute, np.abs(matrix)), (affine.squares, matrix**2)):
        np.testing.assert_allclose(function(ones).flatten(), expected.sum(1), rtol=1e-12)


def test_every_answer_of_a_constant_group() -> None:
    """A group of one number is nothing but its mean."""
    report = check_layer(LayerCentering(-1), (3, 1), samples=4)
    assert "0" in {answer for _, answer, _ in report.rows}
    assert not layer_centering(torch.randn(4, 3, 1), -1).any()


def test_a_tensor_of_statistics_is_the_right_size() -> None:
    x: Tensor = torch.randn(4, 3, 5)
    assert batch_mean(x).shape == (3,)
    assert pooled_variance(x, batch_mean(x)).shape == ()
