"""Networks as people write them, unchanged: the graph, its bound from above and from below.

Oracles: dense float64 singular values of Jacobians by autograd at random points, and the lower
bound by ascent, which two points prove.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
    SmoothAbsoluteValue,
    absolute_value,
    full_sort,
    group_sort,
    householder,
    householder_order_2,
    max_min,
    n_activation,
    smooth_absolute_value,
)
from lipbook.composition import Ball, Box, lipschitz_bound, lipschitz_lower_bound
from lipbook.composition.local import ranges_of
from lipbook.graphs import trace
from lipbook.lab.ordinary import NETWORKS, Coupling, Wrapper, made
from lipbook.lab.recipes.soak import RandomGraph
from lipbook.normalization import LayerCentering, layer_centering
from lipbook.pooling import (
    AveragePooling,
    InvertibleDownsampling,
    InvertibleUpsampling,
    NormPooling,
    Upsampling,
    average_pooling,
    invertible_downsampling,
    invertible_upsampling,
    norm_pooling,
    upsampling,
)
from lipbook.robustness import certify
from lipbook.rounding import forward_error

NORMS = (1, 2, math.inf)


def function(net: nn.Module, options: dict) -> Callable[[Tensor], Tensor]:
    key = options.get("output")
    return (lambda x: net(x)[key]) if key else net


def jacobians(net: nn.Module, shape: tuple[int, ...], options: dict) -> Tensor:
    """Dense Jacobians in float64 at random points, (points, outputs, inputs)."""
    twin = copy.deepcopy(getattr(net, "_orig_mod", net))
    twin = getattr(twin, "module", twin).double()
    for module in twin.modules():
        module.__dict__.pop("_compiled_call_impl", None)
    f = function(twin, options)
    points = torch.rand(4, *shape, dtype=torch.float64)
    if "domain" not in options:
        points = torch.cat([points, 5 * torch.randn(4, *shape, dtype=torch.float64)])
    rows = [torch.autograd.functional.jacobian(lambda x: f(x[None])[0], x) for x in points]
    return torch.stack([row.reshape(-1, math.prod(shape)) for row in rows])


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_bounded_unchanged(name: str) -> None:
    _, shape, options = NETWORKS[name]
    net = made(NETWORKS[name])
    state = copy.deepcopy(net.state_dict())
    attributes = [set(vars(module)) for module in net.modules()]
    found = jacobians(net, shape, options)
    for p in NORMS:
        bound = lipschitz_bound(net, shape, p, **options)
        assert bound.kind == "upper bound"
        steepest = max(torch.linalg.matrix_norm(j, p).item() for j in found)
        assert steepest <= bound.value * (1 + 1e-9)
        start = torch.rand(2, *shape)
        if "domain" not in options:
            key = {"output": options["output"]} if "output" in options else {}
            below = lipschitz_lower_bound(net, start, p, steps=10, **key)
            assert 0 < below.value <= bound.value
    assert not net.training
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert attributes == [set(vars(module)) for module in net.modules()]


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_computes_what_the_network_computes(name: str) -> None:
    _, shape, options = NETWORKS[name]
    net = made(NETWORKS[name])
    graph = trace(net, shape, output=options.get("output"))
    x = torch.randn(5, *shape)
    assert torch.equal(graph.run(x.clone()), function(net, options)(x))
    assert torch.allclose(graph.double().run(x.double()), graph.run(x).double(), atol=1e-4)
    assert "input" in str(graph)


# The errors of an LSTM are bounded on a domain only, and those of the transformer very loosely.
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"LSTM of 6 steps", "transformer"}))
@pytest.mark.parametrize("p", NORMS)
def test_every_network_has_an_error_of_its_program(name: str, p: float) -> None:
    """float64 judges float32; none of the networks is refused."""
    _, shape, options = NETWORKS[name]
    net = made(NETWORKS[name])
    if "output" in options:  # by hand, since forward_error takes no name
        net = nn.Sequential(net.body, nn.ReLU(), net.head)
    x = torch.rand(8, *shape)
    domain = options.get("domain")
    result = forward_error(net, x, p, domain)
    twin = trace(net, shape).double()
    off = (result.outputs.double() - twin.run(x.double())).flatten(1)
    norms = torch.linalg.vector_norm(off, p, dim=1)
    assert (norms <= result.error).all()
    assert ((result.error > 0) & result.error.isfinite()).all()
    if name != "ResNet-18":  # whose eighteen norms multiply
        assert (result.error <= 1e5 * norms.max()).all()  # in sight of what happens


@pytest.mark.parametrize("name", ["squeeze and excitation", "MLP-Mixer", "reused layers"])
def test_sound_certificates_of_networks_that_were_not_built_for_them(name: str) -> None:
    _, shape, options = NETWORKS[name]
    net = made(NETWORKS[name])
    net = nn.Sequential(
        net, nn.Flatten(), nn.Linear(math.prod(net(torch.rand(1, *shape)).shape[1:]), 3)
    )
    x = torch.rand(4, *shape)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    real, sound = (certify(net, [(x, y)], shape, sound=s, **options) for s in (False, True))
    assert (sound.radius > 0.9 * real.radius).all()
    assert (sound.radius <= real.radius).all()


# --------------------------------------------------------------------- joins, on paper


class Forward(nn.Module):
    """A forward that is one function, with a layer of norm 3 at hand."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.function, self.three = function, nn.Linear(2, 2, bias=False)
        self.three.weight.data = 3 * torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.three)


def norm(matrix: list[list[float]], p: float) -> float:
    return torch.linalg.matrix_norm(torch.tensor(matrix, dtype=torch.float64), p).item()


PAPER: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], Callable[[float], float]]] = {
    "skip": (lambda x, f: x[:, :2] + f(x[:, :2]), lambda p: 4),
    "difference": (lambda x, f: f(x[:, :2]) - 2 * x[:, :2], lambda p: 5),
    "concatenation": (
        lambda x, f: torch.cat([x[:, :2], f(x[:, :2])], 1),
        lambda p: norm([[1.0], [3.0]], p),
    ),
    "disjoint slices": (lambda x, f: torch.cat([x[:, :2], f(x[:, 2:])], 1), lambda p: 3),
    "overlapping slices": (
        lambda x, f: torch.cat([f(x[:, :2]), f(x[:, 1:3])], 1),
        lambda p: norm([[3.0], [3.0]], p),
    ),
    "sum of disjoint slices": (
        lambda x, f: x[:, :2] + f(x[:, 2:]),
        lambda p: norm([[1.0, 3.0]], p),
    ),
    "coupling": (
        lambda x, f: torch.cat([x[:, :2], x[:, 2:] + f(x[:, :2])], 1),
        lambda p: norm([[1.0, 0.0], [3.0, 1.0]], p),
    ),
    "slices of slices": (
        lambda x, f: torch.cat([f(x[:, :2])[:, :1], x[:, :2][:, 1:]], 1),
        lambda p: norm([[3.0], [1.0]], p),
    ),
    "maximum": (
        lambda x, f: torch.maximum(x[:, :2], f(x[:, :2])),
        lambda p: norm([[1.0], [3.0]], p),
    ),
    "copies": (lambda x, f: x.repeat(1, 3), lambda p: 3 ** (1 / p)),
    "one entry, many times": (lambda x, f: x[:, :1].expand(-1, 4), lambda p: 4 ** (1 / p)),
    "a constant beside": (
        lambda x, f: torch.cat([torch.ones(len(x), 3), x], 1),
        lambda p: 1,
    ),
    "a constant branch": (lambda x, f: x + torch.ones(4).cumsum(0), lambda p: 1),
    "mean": (lambda x, f: x.mean(1, keepdim=True), lambda p: norm([[0.25] * 4], p)),
    "sum": (lambda x, f: x.sum(-1, keepdim=True), lambda p: norm([[1.0] * 4], p)),
    "stack": (lambda x, f: torch.stack([x, -x], 2), lambda p: 2 ** (1 / p)),
    "from the left": (
        lambda x, f: torch.ones(1, 2) @ x.view(-1, 2, 2),
        lambda p: norm([[1.0, 1.0]], p),
    ),
    "padding": (lambda x, f: functional.pad(x, (1, 1), value=7.0), lambda p: 1),
    "repeated in place": (lambda x, f: x.clone().mul_(2).add_(1).neg_(), lambda p: 2),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", PAPER)
def test_joins_on_paper(name: str, p: float) -> None:
    function_, truth = PAPER[name]
    bound = lipschitz_bound(Forward(function_), (4,), p)
    assert bound.value == pytest.approx(truth(p), rel=1e-12)


OURS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "group_sort": (lambda x: group_sort(x, 4), lambda: GroupSort(4)),
    "max_min": (lambda x: max_min(x, dim=1, pairing="halves"), lambda: MaxMin(pairing="halves")),
    "full_sort": (full_sort, FullSort),
    "householder": (
        lambda x: householder(x, torch.full((2,), 0.5)),
        lambda: filled(Householder(4), 0.5),
    ),
    "householder_order_2": (
        lambda x: householder_order_2(x, torch.full((3, 2), 0.5), pairing="halves"),
        lambda: filled(HouseholderOrder2(4, pairing="halves"), 0.5),
    ),
    "n_activation": (
        lambda x: n_activation(x, kinks=torch.full((2, 4), 0.5)),
        lambda: filled(NActivation(4), 0.5),
    ),
    "absolute_value": (absolute_value, AbsoluteValue),
    "smooth_absolute_value": (
        lambda x: smooth_absolute_value(x, delta=0.3),
        lambda: SmoothAbsoluteValue(0.3),
    ),
    "invertible_downsampling": (
        lambda x: invertible_downsampling(x, 2),
        lambda: InvertibleDownsampling(2),
    ),
    "invertible_upsampling": (
        lambda x: invertible_upsampling(x, window=2),
        lambda: InvertibleUpsampling(2),
    ),
    "norm_pooling": (lambda x: norm_pooling(x, (2, 1)), lambda: NormPooling((2, 1))),
    "average_pooling": (lambda x: average_pooling(x, 2), lambda: AveragePooling(2)),
    "norm_pooling, overlapping": (
        lambda x: norm_pooling(x, 2, stride=1),
        lambda: NormPooling(2, 1),
    ),
    "average_pooling, padded": (
        lambda x: average_pooling(x, 3, 2, 1),
        lambda: AveragePooling(3, 2, 1),
    ),
    "upsampling": (lambda x: upsampling(x, 2), lambda: Upsampling(2)),
    "layer_centering": (lambda x: layer_centering(x, (2, 3)), lambda: LayerCentering((2, 3))),
}


def filled(layer: nn.Module, value: float) -> nn.Module:
    for weight in layer.parameters():
        nn.init.constant_(weight, value)
    return layer


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", OURS)
def test_a_function_of_the_library_is_its_layer(name: str, p: float) -> None:
    function_, layer = OURS[name]
    found = lipschitz_bound(Forward(lambda x, f: function_(x)), (4, 4, 4), p)
    assert found.value == lipschitz_bound(layer(), (4, 4, 4), p).value


def test_an_angle_that_depends_on_the_input_is_refused() -> None:
    net = Forward(lambda x, f: householder(x, x[0, :2]))
    with pytest.raises(TypeError, match=r"householder .*weights that depend on the input"):
        lipschitz_bound(net, (4,))


def test_products_are_bounded_by_both_factors() -> None:
    """(x1, x2) -> x1 x2 on [0, 3] × [0, 1]: slopes up to 1 in x1 and 3 in x2."""
    net = Forward(lambda x, f: x[:, :1] * x[:, 1:])
    domain = Box(torch.zeros(2), torch.tensor([3.0, 1.0]))
    for p in NORMS:
        truth = norm([[1.0, 3.0]], p)
        bound = lipschitz_bound(net, (2,), p, domain=domain).value
        assert truth <= bound <= truth * (1 + 1e-9)


def test_zero_ends_what_has_overflowed_and_nothing_vanishes() -> None:
    def powers(*constants: float) -> nn.Module:
        layers = []
        for constant in constants:
            layers.append(nn.Linear(1, 1, bias=False).double())
            layers[-1].weight.data.fill_(constant)
        return Wrapper(nn.Sequential(*layers))

    assert lipschitz_bound(powers(*[1e100] * 4, 0.0), (1,)).value == 0
    assert lipschitz_bound(powers(*[1e100] * 4), (1,)).value == math.inf
    bound = lipschitz_bound(powers(1e-200, 1e-200, 1e200, 1e200), (1,)).value
    assert bound >= 1


def test_graph_and_bound_print_what_the_code_says() -> None:
    net = Forward(lambda x, f: x[:, :2] + f(x[:, 2:]))
    graph = str(trace(net, (4,)))
    assert "three Linear" in graph
    assert graph.splitlines()[0].split() == ["node", "reads", "layer", "shape", "code"]
    table = lipschitz_bound(net, (4,)).table().splitlines()
    assert table[0].split() == ["node", "shape", "constant", "so", "far", "code"]
    assert [line.split()[0] for line in table[1:]] == [
        "Rearrangement",
        "Rearrangement",
        "three",
        "Add",
    ]
    assert "x[:, :2] + f(x[:, 2:])" in table[-1]


# --------------------------------------------------------------------------- random graphs


steps_of_graphs = st.lists(
    st.tuples(st.integers(0, 13), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6
)


def jacobians_at(net: nn.Module, points: Tensor) -> Tensor:
    """A sample's output depends on its input alone: one pass back for each output, for all."""
    rows = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), points)
    assert isinstance(rows, Tensor)
    return rows.transpose(0, 1)


@settings(max_examples=150)
@given(steps_of_graphs, st.integers(0, 2**31), st.sampled_from(NORMS))
def test_random_graphs_are_bounded(
    choices: list[tuple[int, int, int]], seed: int, p: float
) -> None:
    torch.manual_seed(seed)
    net = RandomGraph(choices, products=False).double().eval()
    points = torch.cat([0.1 * torch.randn(3, 6), 3 * torch.randn(3, 6)]).double()
    truth = torch.linalg.matrix_norm(jacobians_at(net, points), p).max().item()
    assert truth <= lipschitz_bound(net, (6,), p).value * (1 + 1e-12) + 1e-300


@settings(max_examples=100)
@given(
    steps_of_graphs,
    st.integers(0, 2**31),
    st.floats(1e-3, 2.0),
    st.booleans(),
    st.sampled_from(NORMS),
)
def test_random_graphs_are_bounded_on_domains(
    choices: list[tuple[int, int, int]], seed: int, width: float, ball: bool, p: float
) -> None:
    torch.manual_seed(seed)
    net = RandomGraph(choices, products=True).double().eval()
    center = torch.randn(6, dtype=torch.float64)
    domain = Ball(center, width) if ball else Box(center - width, center + width)
    step = 2 * torch.rand(6, 6, dtype=torch.float64) - 1
    if ball:
        step = functional.normalize(step) * torch.rand(6, 1, dtype=torch.float64)
    points = center + width * step
    graph = trace(net, (6,)).double()
    ranges = ranges_of(graph, domain.range((6,)))
    for values, found in zip(graph.values(points), ranges, strict=True):
        assert found.holds(values)
    truth = torch.linalg.matrix_norm(jacobians_at(net, points), p).max().item()
    assert truth <= lipschitz_bound(net, (6,), p, domain=domain).value * (1 + 1e-12)


# ------------------------------------------------------------------------------ bad input


class Bad(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def overwritten_view(x: Tensor) -> Tensor:
    y = x.clone()
    part = y[:, :2]
    part.mul_(3)
    return y


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def decided(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


REFUSED: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "decision": (decided, ValueError, r"bool \(test_graphs.py:\d+: return x if x.sum\(\) > 0"),
    "item": (lambda x: x * x.max().item(), ValueError, "item .*looks at the values"),
    "mask": (lambda x: x[x > 0], TypeError, "getitem .*moves entries to places that depend"),
    "nonzero": (lambda x: x[:, x[0].nonzero()[:, 0]], ValueError, "nonzero .*looks at the values"),
    "unknown": (torch.special.bessel_j0, TypeError, "bessel_j0 .*has no Lipschitz"),
    "integers": (lambda x: x.long(), TypeError, "long .*|casts to"),
    "complex": (torch.fft.fft, TypeError, "fft .*has no Lipschitz rule"),
    "tuple": (
        lambda x: (x, x),
        ValueError,
        "must return one tensor, got tuple: name it by output=",
    ),
    "dict": (lambda x: {"a": x}, ValueError, r"got dict with \['a'\]: name it by output="),
    "number": (lambda x: 3.0, ValueError, "must return one tensor, got float"),
    "constant": (lambda x: torch.ones(2, 3), ValueError, "does not depend on its input"),
    "written": (written, TypeError, "setitem .*writes into a part"),
    "view": (overwritten_view, ValueError, "not what its graph computes"),
    "mixed rows": (lambda x: x.view(-1, 2), ValueError, "view .*must keep samples apart"),
    "mixed sums": (lambda x: x - x.mean(0), ValueError, "mean .*mixes samples"),
    "all summed": (lambda x: x.sum(), ValueError, "sum .*mixes samples"),
    "rolled batch": (lambda x: x.roll(1, 0), ValueError, "roll .*one sample to another"),
    "batch in cat": (lambda x: torch.cat([x, x]), ValueError, "cat .*along the batch"),
    "dropout": (functional.dropout, ValueError, r"dropout .*call \.eval\(\)"),
    "chance": (lambda x: x + torch.rand(4), ValueError, "not what its graph computes"),
    "size of the batch": (lambda x: x * len(x), ValueError, "not what its graph computes"),
    "rounding": (lambda x: x.round(), TypeError, "round .*has no Lipschitz rule"),
    "product": (lambda x: x * x, ValueError, "not Lipschitz on all of space: give a domain"),
    "power": (lambda x: x**3, ValueError, "not Lipschitz on all of space"),
    "division": (lambda x: 1 / x, ValueError, "not Lipschitz on all of space"),
    "by zero": (lambda x: x / 0.0, ValueError, "divides by 0"),
    "NaN": (lambda x: x * math.nan, ValueError, "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    function_, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        lipschitz_bound(Bad(function_), (4,))
    nested = Wrapper(nn.Sequential(nn.Linear(4, 4), Bad(function_)))
    with pytest.raises(error, match=message) as caught:
        lipschitz_bound(nested, (4,))
    whole = ("tuple", "dict", "number", "constant", "view", "chance", "size of the batch")
    if name not in whole:
        assert str(caught.value).startswith("'body.1'")


@pytest.mark.parametrize(
    ("function_", "domain", "message"),
    [
        (torch.log, Box(-1, 1), "needs values above 0, but on the domain they reach -1"),
        (torch.sqrt, Box(0, 1), "needs values above 0"),
        (lambda x: 1 / (x - 0.5), Box(0, 1), "needs values above 0"),
    ],
)
def test_domains_on_which_a_function_is_steep(
    function_: Callable[[Tensor], Tensor], domain: Box, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(Bad(function_), (4,), domain=domain)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode(mode: Any) -> None:
    net = made(NETWORKS["coupling"])
    expected = lipschitz_bound(net, (6,)).value
    with mode():
        assert lipschitz_bound(net, (6,)).value == expected
        assert lipschitz_bound(net, (6,), domain=Box(0, 1)).value <= expected * (1 + 1e-9)
        assert lipschitz_lower_bound(net, torch.zeros(2, 6), steps=3).value <= expected
        inside = Coupling()  # its parameters are made here
        assert lipschitz_bound(inside, (6,)).value > 0


def test_training_mode_where_it_changes_nothing() -> None:
    net = Coupling()
    assert net.training
    assert lipschitz_bound(net, (6,)).value == lipschitz_bound(net.eval(), (6,)).value


# Arguments in the order in which torch's functions take them; its layers have another.
POOLINGS: dict[str, dict[str, Any]] = {
    "avg_pool": {
        "kernel_size": 2,
        "stride": 1,
        "padding": 1,
        "ceil_mode": True,
        "count_include_pad": False,
    },
    "max_pool": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True},
    "adaptive_avg_pool": {"output_size": 3},
    "adaptive_max_pool": {"output_size": 3},
}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", POOLINGS)
def test_a_function_that_pools_is_the_layer_that_pools(name: str, dims: int) -> None:
    call = getattr(functional, f"{name}{dims}d")
    words = "".join(word.capitalize() for word in name.split("_"))
    layer = getattr(nn, f"{words}{dims}d")(**POOLINGS[name])
    shape = (2, *[7] * dims)
    x = torch.randn(3, *shape)
    net = Called(lambda v: call(v, *POOLINGS[name].values()))
    assert torch.equal(trace(net, shape).run(x), layer(x))
    for p in NORMS:
        bound = lipschitz_bound(net, shape, p)
        assert bound.value == lipschitz_bound(layer, shape, p).value
        assert lipschitz_lower_bound(net, x, p, steps=5).value <= bound.value


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_function_that_convolves_is_the_layer_that_convolves(transposed: bool, dims: int) -> None:
    name, cls = ("conv_transpose", "ConvTranspose") if transposed else ("conv", "Conv")
    call, shape = getattr(functional, f"{name}{dims}d"), (4, *[6] * dims)
    layer = getattr(nn, f"{cls}{dims}d")(4, 6, 2, stride=2, padding=1, groups=2)
    places = (2, 1, 0, 2) if transposed else (2, 1, 1, 2)  # one has padding of the output
    weight, bias = layer.weight.detach(), layer.bias.detach()
    net, x = Called(lambda v: call(v, weight, bias, *places)), torch.randn(3, *shape)
    assert torch.equal(trace(net, shape).run(x), layer(x))
    for p in NORMS:
        assert lipschitz_bound(net, shape, p).value == lipschitz_bound(layer, shape, p).value


class Called(nn.Module):
    """A module whose forward is one call."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_graph_in_double_precision_does_not_round_where_the_network_casts() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.bfloat16).float() * 3

    x = torch.rand(5, 4, dtype=torch.float64)
    assert torch.equal(trace(Casts(), (4,)).double().run(x), 3 * x)


def test_two_processes_of_one(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net = nn.parallel.DistributedDataParallel(Coupling())
        expected = lipschitz_bound(net.module, (6,)).value
        assert lipschitz_bound(net, (6,)).value == expected
        assert lipschitz_bound(Wrapper(net), (6,)).value == expected
    finally:
        torch.distributed.destroy_process_group()
