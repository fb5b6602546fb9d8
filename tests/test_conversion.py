"""lipschitz_network: ordinary networks become 1-Lipschitz ones."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as the networks here are written

from lipbook import losses, robustness
from lipbook.activations import AbsoluteValue, Householder, MaxMin
from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
from lipbook.conversion import Average, Conversion, GraphNetwork, Offset, ScaledJoin
from lipbook.conversion import lipschitz_network as converted
from lipbook.convolutions import NonexpansiveConv2d, OrthogonalConv2d, OrthogonalConvTranspose2d
from lipbook.export import freeze
from lipbook.lab import data, ordinary, training
from lipbook.layers.joins import Add, Concatenate
from lipbook.normalization import BatchCentering, LayerCentering, ScalarBatchNorm
from lipbook.orthogonal import OrthogonalLinear, Scale, UnitNormLinear
from lipbook.pooling import AveragePooling, NormPooling, Upsampling, average_pooling
from lipbook.residual import AverageResidual
from lipbook.sequences import LosslessRNN


class LeNet(nn.Module):
    """For images of half the size of digits."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 16, 4)
        self.fc1, self.fc2 = nn.Linear(64, units), nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), (2, 2))
        x = F.dropout(F.relu(self.fc1(x.view(-1, 64))), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.ModuleList([Block(4, 4, 1), Block(4, 6, 2)])
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.gelu(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 7)), nn.Tanh(),
        nn.Dropout(0.3), nn.Linear(7, 3),
    )  # fmt: skip


def vgg() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)),
    )


def series() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.InstanceNorm1d(4), nn.SiLU()),
        *(nn.Conv1d(4, 4, 3, dilation=2), nn.LeakyReLU(), nn.AvgPool1d(2, 1), nn.Flatten()),
        nn.Linear(4, 2),
    )


OTHERS = (
    *("pre-activation ResNet", "U-Net", "DenseNet block", "MLP-Mixer", "coupling", "wrapper"),
    *("ConvNeXt block", "MobileNet block", "reused layers", "functions", "parametrizations"),
    *("lightning", "AveragedModel"),
)


def other(name: str) -> Callable[[], nn.Module]:
    return lambda: ordinary.made(ordinary.NETWORKS[name])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (2, 3)),
    "LeNet": (lambda: LeNet(12), (1, 14, 14)),
    "VGG": (vgg, (3, 4, 4)),
    "ResNet": (ResNet, (3, 8, 8)),
    "series": (series, (2, 12)),
    **{name: (other(name), ordinary.NETWORKS[name].shape) for name in OTHERS},
}


def steepest(network: nn.Module, x: Tensor) -> float:
    """Largest singular value of the dense Jacobians at points, by torch."""
    values = []
    for point in x:
        jacobian: Any = torch.autograd.functional.jacobian(lambda v: network(v[None])[0], point)
        values.append(torch.linalg.svdvals(jacobian.reshape(-1, point.numel())).max().item())
    return max(values)


def rows(conversion: Conversion) -> dict[str, tuple[str, str]]:
    return {row.path: (row.old, row.new) for row in conversion.replacements}


def one(layer: nn.Module, shape: tuple[int, ...], **options: Any) -> nn.Module:
    """Layer in the place of a single one which weights follow."""
    with torch.no_grad():
        after = nn.Linear(layer.eval()(torch.zeros(2, *shape)).shape[-1], 2)
    network = converted(nn.Sequential(layer, after), shape, **options).network
    return network[0]  # type: ignore[index]


# -------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", NETWORKS)
def test_slopes_of_the_network_are_at_most_one(name: str) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    conversion = converted(model, shape)
    network = conversion.network
    assert conversion.bound.value <= 1 + 1e-5
    assert network.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():  # parameters far from where they started
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    network = network.double().eval()
    assert lipschitz_bound(network, shape).value <= 1 + 1e-9
    x = torch.rand(3, *shape, dtype=torch.float64) * 2 - 1
    assert steepest(network, x) <= 1 + 1e-9
    if len(shape) < 3:
        assert lipschitz_lower_bound(network, x, steps=3).value <= 1 + 1e-9
    expected = model.eval()(x[:2].float())
    assert network(x[:2]).shape == expected.shape
    assert network(x[:1]).shape == (1, *expected.shape[1:])


def test_a_deep_network_keeps_its_gradients() -> None:
    """Of 1-Lipschitz networks the interesting ones are not nearly constant."""
    torch.manual_seed(0)
    layers = [part for _ in range(20) for part in (nn.Linear(8, 8), nn.ReLU())]
    network = converted(nn.Sequential(*layers, nn.Linear(8, 8)), (8,)).network.double()
    x = torch.rand(1, 8, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(network, x)
    values = torch.linalg.svdvals(jacobian.reshape(8, 8))
    assert (values - 1).abs().max() < 1e-6


def test_the_forward_is_that_of_the_model_with_other_layers() -> None:
    torch.manual_seed(0)
    network: Any = converted(LeNet(12).eval(), (1, 14, 14)).network
    assert not network.training
    x = torch.rand(3, 1, 14, 14)
    y = F.max_pool2d(MaxMin()(network.conv1(x)), 2)
    y = F.max_pool2d(MaxMin()(network.conv2(y)), 2).flatten(1)
    assert torch.equal(network(x), network.fc2(MaxMin()(network.fc1(y))))
    lines = network.wiring().splitlines()
    assert lines[:3] == ["v1 = conv1(x)", "v2 = relu(v1)", "v3 = max_pool2d(v2)"]
    assert lines[-2:] == ["v10 = fc2(v9)", "return v10"]  # neither dropout nor softmax


def test_a_sequential_comes_back_as_one() -> None:
    network = converted(mlp(), (2, 3)).network
    assert isinstance(network, nn.Sequential)
    assert isinstance(network[2], nn.Sequential)
    kinds = [type(part) for part in network.modules() if not list(part.children())]
    assert kinds.count(MaxMin) == 1
    assert kinds.count(AbsoluteValue) == 1  # 7 channels have no pairs
    assert isinstance(network[4], nn.Identity)
    assert isinstance(network[2][1], OrthogonalLinear)
    assert isinstance(converted(nn.Linear(3, 2), (3,)).network, OrthogonalLinear)
    assert len(converted(nn.Sequential(), (3,)).network) == 0  # type: ignore[arg-type]


def test_the_table_of_a_network() -> None:
    conversion = converted(ResNet(), (3, 8, 8))
    found = rows(conversion)
    assert found["stem"] == ("Conv2d", "OrthogonalConv2d")
    assert found["gelu"] == ("GELU", "MaxMin")
    assert found["blocks.1.shortcut.0"] == ("Conv2d", "OrthogonalConv2d")
    assert found["blocks.1.bn2"] == ("BatchNorm2d", "BatchCentering")
    assert found["blocks.1.add"] == ("Add", "Average")
    assert found["mean"] == ("mean (2, 3)", "mean (2, 3) Scale")
    text = str(conversion)
    assert text.splitlines()[0].split() == ["path", "old", "new", "why"]
    assert text.splitlines()[-1].startswith("Lipschitz bound in the 2-norm: 1")
    assert "x = self.pool(F.gelu(self.stem(x)))" in {row.code for row in conversion.replacements}
    assert str(dataclasses.replace(conversion, replacements=())).splitlines()[1:] == [
        text.splitlines()[-1]
    ]


def test_another_constant() -> None:
    for model, shape in ((mlp(), (2, 3)), (ResNet(), (3, 8, 8)), (nn.Linear(3, 2), (3,))):
        conversion = converted(model, shape, lipschitz=2.5)
        assert conversion.bound.value == pytest.approx(2.5, rel=1e-5)
        assert conversion.replacements[-1].new == "Scale"
        scales = [part for part in conversion.network.modules() if type(part) is Scale]
        assert scales[-1].constant == 2.5


# --------------------------------------------------------------------------- single layers


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.ReLU(), (4,), MaxMin),
        (nn.PReLU(4), (4,), MaxMin),
        (nn.Tanh(), (3, 2), AbsoluteValue),
        (nn.BatchNorm1d(4), (4,), BatchCentering),
        (nn.LayerNorm(4), (4,), LayerCentering),
        (nn.LayerNorm((3, 4)), (2, 3, 4), LayerCentering),
        (nn.GroupNorm(1, 4), (4, 2, 2), LayerCentering),
        (nn.GroupNorm(4, 4), (4, 2, 2), LayerCentering),
        (nn.InstanceNorm2d(4), (4, 2, 2), LayerCentering),
        (nn.InstanceNorm2d(4, track_running_stats=True), (4, 2, 2), BatchCentering),
        (nn.LayerNorm(1), (4, 1), nn.Identity),
        (nn.RMSNorm(4), (4,), nn.RMSNorm),
        (nn.AvgPool2d(2), (3, 4, 4), AveragePooling),
        (nn.AdaptiveAvgPool2d((2, 1)), (3, 4, 4), AveragePooling),
        (nn.MaxPool2d(2), (3, 4, 4), nn.MaxPool2d),
        (nn.MaxPool2d(3, 2, 1), (3, 4, 4), nn.MaxPool2d),
        (nn.Upsample(scale_factor=2), (3, 2, 2), Upsampling),
        (nn.Dropout2d(0.3), (3, 2, 2), nn.Identity),
        (nn.ZeroPad2d(1), (3, 2, 2), nn.ZeroPad2d),
        (nn.PixelShuffle(2), (4, 2, 2), nn.PixelShuffle),
        (nn.Softmax(1), (4,), nn.Softmax),
        (NormPooling(2), (3, 4, 4), NormPooling),
        (OrthogonalLinear(3, 4), (3,), OrthogonalLinear),
        (nn.Conv2d(2, 4, 3, padding=1), (2, 4, 4), OrthogonalConv2d),
        (nn.Conv2d(2, 4, 3), (2, 4, 4), OrthogonalConv2d),
        (nn.Conv2d(2, 4, 3, padding=2), (2, 4, 4), OrthogonalConv2d),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 5, 5), OrthogonalConv2d),
        (nn.Conv2d(2, 4, 1, stride=2), (2, 4, 4), OrthogonalConv2d),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 4), NonexpansiveConv2d),
        (nn.ConvTranspose2d(4, 2, 2, stride=2), (4, 3, 3), OrthogonalConvTranspose2d),
        (nn.ConvTranspose2d(4, 2, 3, stride=2), (4, 3, 3), OrthogonalConvTranspose2d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_stands_in_the_place_of_a_layer(
    layer: nn.Module, shape: tuple[int, ...], kind: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    new = one(copy.deepcopy(layer), shape).eval()
    assert isinstance(new, kind)
    x = torch.randn(2, *shape)
    assert new(x).shape == layer.eval()(x).shape
    assert steepest(new.double(), torch.randn(2, *shape, dtype=torch.float64)) <= 1 + 1e-6
    if not isinstance(new, (OrthogonalLinear, nn.modules.conv._ConvNd, BatchCentering)):
        assert not list(new.parameters())  # which training could make steeper


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool2d(2), (1, 4, 4)),
        (nn.AvgPool2d(3, 2, 1), (1, 4, 4)),
        (nn.AdaptiveAvgPool2d(3), (1, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 2)),
    ],
)
def test_linear_pooling_has_the_norm_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Attained: the largest singular value is 1, up to what the rule of the layer loses."""
    new = one(layer, shape).eval().double()
    value = steepest(new, torch.rand(1, *shape, dtype=torch.float64))
    bound = lipschitz_bound(layer.double(), shape).value
    loss = bound / steepest(layer, torch.rand(1, *shape, dtype=torch.float64))
    assert value == pytest.approx(1 / loss, rel=1e-12)
    if (
        not isinstance(layer, nn.Upsample) and layer.kernel_size != 3
        if hasattr(layer, "kernel_size")
        else False
    ):
        assert value == pytest.approx(1, rel=1e-12)


def test_recurrent_layers_become_lossless_ones() -> None:
    torch.manual_seed(0)
    model = Sequence(nn.GRU(3, 5, 2, batch_first=True, dropout=0.1)).double()
    network: Any = converted(model, (7, 3)).network
    rnn = network.rnn.module
    assert isinstance(rnn, LosslessRNN)
    assert (rnn.input_size, rnn.hidden_size, len(rnn.cells)) == (3, 5, 2)
    assert network.rnn_1.module is rnn
    x = torch.rand(2, 7, 3, dtype=torch.float64)
    outputs, last = rnn(x)
    joined = torch.cat([outputs[:, -1].abs(), last[-1]], 1) / 2**0.5
    assert torch.allclose(network(x), network.head(joined))
    assert steepest(network, x) <= 1 + 1e-9
    own = LosslessRNN(3, 5, batch_first=True, output_size=5)
    kept: Any = converted(Sequence(own, 0), (7, 3)).network
    assert torch.equal(kept(x.float()), own(x.float())[0])


def test_groups_are_centered_one_by_one() -> None:
    new = one(nn.GroupNorm(2, 6), (6, 2))
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    grouped = x.view(3, 2, 6)
    expected = (grouped - grouped.mean(2, keepdim=True)).view(3, 6, 2)
    assert torch.allclose(new(x), expected, atol=1e-15)


def test_activations_by_choice() -> None:
    assert isinstance(one(nn.ReLU(), (4,), activation="absolute_value"), AbsoluteValue)
    new = one(nn.ReLU().double(), (4,), activation="householder")
    assert isinstance(new, Householder)
    assert isinstance(one(nn.ReLU(), (4,), activation="keep"), nn.ReLU)
    assert isinstance(one(nn.PReLU(), (4,), activation="keep"), nn.PReLU)
    with pytest.raises(ValueError, match=r"'0' PReLU: has the constant 3, and no 1-Lipschitz"):
        one(nn.PReLU(init=3.0), (4,), activation="keep")
    gelu: Any = one(nn.GELU(), (4,), activation="keep")
    steep = lipschitz_bound(nn.GELU(), (4,)).value
    x = torch.randn(5, 4)
    assert torch.allclose(gelu(x), F.gelu(x) / steep)
    seen = []

    def chosen(channels: int, dim: int) -> nn.Module:
        seen.append((channels, dim))
        return MaxMin(dim)

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    converted(model, (5, 3), activation=chosen)
    assert seen == [(4, 2), (6, 2)]  # features are the last dimension
    seen.clear()
    converted(nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), (2, 9),
              activation=chosen)  # fmt: skip
    assert seen == [(4, 1)]
    with pytest.raises(ValueError, match="activation must return a module, got int"):
        converted(model, (3,), activation=lambda channels, dim: 3)  # type: ignore[arg-type,return-value]


def test_what_shapes_the_output_stays() -> None:
    found = converted(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), (3,))
    assert rows(found)["1"] == ("Sigmoid", "Sigmoid")
    found = converted(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Flatten()), (3,))
    assert rows(found)["1"] == ("GELU", "GELU Scale")
    for softmax in (nn.Softmax(1), nn.LogSoftmax(1)):
        found = converted(nn.Sequential(nn.Linear(3, 4), softmax), (3,))
        assert rows(found)["1"][1] == "Identity"
    found = converted(LeNet(12), (1, 14, 14))
    assert rows(found)["log_softmax"] == ("LogSoftmax", "Identity")


def test_what_has_a_constant_is_divided_by_it() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("std", torch.tensor([[0.5], [0.25]]))
            self.linear = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(((x - 0.5) / self.std).flatten(1))

    network: Any = converted(Doubled(), (2, 3)).network
    x = torch.rand(4, 2, 3)
    expected = network.linear(((x - 0.5) / torch.tensor([[2.0], [1.0]])).flatten(1))
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert isinstance(one(ScalarBatchNorm(4), (4,)), ScalarBatchNorm)


# ----------------------------------------------------------------------------------- joins


class Join(nn.Module):
    """Two branches, joined by a function."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Linear(4, 4), nn.Linear(4, 4), join
        self.gate = nn.Parameter(torch.zeros(()))
        self.gates = nn.Parameter(torch.full((1,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


@pytest.mark.parametrize(
    ("join", "weights"),
    [
        (lambda m, x: x + m.a(x), [0.5, 0.5]),
        (lambda m, x: x + m.gate * m.a(x), [0.5, 0.5]),
        (lambda m, x: x + m.gates * m.a(x), [0.5, 0.5]),
        (lambda m, x: x - m.a(x), [0.5, -0.5]),
        (lambda m, x: m.a(x) - (x + m.b(x)), [1 / 3, -1 / 3, -1 / 3]),
        (lambda m, x: torch.add(x, m.a(x), alpha=0.5), [2 / 3, 1 / 3]),
        (lambda m, x: 3 * m.b(x) + m.a(x), [0.75, 0.25]),
    ],
)
def test_sums_become_averages(join: Callable[..., Tensor], weights: list[float]) -> None:
    conversion = converted(Join(join), (4,))
    (average,) = (part for part in conversion.network.modules() if isinstance(part, Average))
    found = torch.stack(average.weights()).tolist()
    assert found == pytest.approx(weights, rel=1e-6)
    assert sum(map(abs, found)) <= 1 + 1e-6
    assert conversion.bound.value == pytest.approx(1, rel=1e-5)


def test_an_average_that_is_written_down_stays() -> None:
    conversion = converted(Join(lambda m, x: 0.7 * x + 0.3 * m.a(x)), (4,))
    (join,) = (part for part in conversion.network.modules() if isinstance(part, Add))
    assert join.weights == pytest.approx((0.7, 0.3))
    assert conversion.bound.value == pytest.approx(1, rel=1e-6)


def test_skips_of_a_deep_network_begin_near_one() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x) + x
            return x

    network: Any = converted(Deep(), (4,)).network
    assert isinstance(network.parts, nn.ModuleList)
    x = torch.randn(3, 4)
    y = x
    for part in network.parts:
        y = 0.2 * part(y) + 0.8 * y
    assert torch.allclose(network(x), y, atol=1e-6)


@pytest.mark.parametrize(
    ("join", "factor"),
    [
        (lambda m, x: torch.cat([x, m.a(x)], 1), 2**-0.5),
        (lambda m, x: torch.cat([x, m.a(x), m.b(x)], 1), 3**-0.5),
        (lambda m, x: torch.stack([m.a(x), m.b(x)], 1), 2**-0.5),
        (lambda m, x: torch.maximum(m.a(x), m.b(x)), 2**-0.5),
        (lambda m, x: torch.cat([F.relu(x[:, :2]), x[:, 2:]], 1), 1.0),
    ],
)
def test_concatenations_are_divided_by_their_constant(
    join: Callable[..., Tensor], factor: float
) -> None:
    network: Any = converted(Join(join), (4,)).network
    x = torch.randn(3, 4)
    assert torch.allclose(network(x), factor * join(network, x), atol=1e-6)
    if len(network(x)[0]) > 4:  # orthogonal branches attain it
        assert steepest(network, x) == pytest.approx(1, rel=1e-5)


def test_an_average_is_joined_as_one_branch_whatever_its_weights() -> None:
    network: Any = converted(Join(lambda m, x: torch.cat([x, x + m.a(x)], 1)), (4,)).network
    assert network.concatenate.factor == pytest.approx(2**-0.5)
    with torch.no_grad():
        network.add.logits.copy_(torch.tensor([9.0, -9.0]))
    assert 0.999 < lipschitz_bound(network, (4,)).value <= 1 + 1e-6


# ------------------------------------------------------------------------ weights and names


def test_kept_matrices_are_the_nearest_orthonormal_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[2].weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    conversion = converted(model, (5,), keep_weights=True)
    network: Any = conversion.network
    factor, _ = scipy.linalg.polar(model[0].weight.detach().double().numpy())
    assert torch.allclose(network[0].weight.double(), torch.from_numpy(factor), atol=1e-6)
    assert torch.equal(network[0].bias, model[0].bias)
    assert torch.allclose(network[2].weight, torch.eye(3), atol=1e-6)
    assert conversion.replacements[2].moved == pytest.approx(1 / math.sqrt(6), abs=1e-6)
    assert conversion.replacements[1].moved is None
    assert "moved" in str(conversion)
    assert "0.408" in str(conversion).splitlines()[3]


def test_kept_kernels_are_rescaled_by_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))
    conversion = converted(model, (3, 4, 4), keep_weights=True)
    network: Any = conversion.network
    ratio = network[0].weight / model[0].weight
    assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-4)
    assert torch.equal(network[0].bias, model[0].bias)
    moved = (network[0].weight - model[0].weight).norm() / model[0].weight.norm()
    assert conversion.replacements[0].moved == pytest.approx(moved.item(), rel=1e-5)
    assert conversion.replacements[2].why.endswith("drawn anew")
    assert steepest(network[:1].double(), torch.rand(1, 3, 4, 4, dtype=torch.float64)) <= 1 + 1e-9
    circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    kept: Any = converted(circular, (3, 4, 4), keep_weights=True).network
    assert kept.padding_mode == "circular"


def test_a_shared_layer_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.linear = nn.ReLU(), nn.Linear(4, 4)
            self.odd, self.back = nn.Linear(4, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.relu(self.linear(x))
            return self.back(self.relu(self.odd(x)))

    conversion = converted(Shared(), (4,))
    network: Any = conversion.network
    paths = [row.path for row in conversion.replacements]
    assert paths == ["linear", "relu"] * 3 + ["odd", "relu", "back"]
    assert sum(isinstance(part, OrthogonalLinear) for part in network.modules()) == 3
    assert network.wiring().count("linear(") == 3
    assert isinstance(network.relu, MaxMin)
    assert isinstance(network.relu_3, AbsoluteValue)
    twice = nn.Linear(4, 4)
    chain: Any = converted(nn.Sequential(twice, nn.ReLU(), twice), (4,)).network
    assert chain[0] is chain[2]


def test_parameters_of_a_forward_live_on() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 5, 4))
            self.weight, self.other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(2))
            self.bias, self.outer = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear((x + self.position) @ self.weight - self.bias, self.outer)

    model = Own()
    conversion = converted(model, (5, 4))
    shapes = [tuple(p.shape) for p in conversion.network.parameters()]
    assert shapes == [(5, 4), (3, 4), (3,), (6, 3)]
    assert rows(conversion)["shift"] == ("Shift", "Offset")
    lost = conversion.replacements[-1]
    assert (lost.path, lost.old, lost.new) == ("other", "Parameter", "-")
    network: Any = conversion.network
    assert torch.equal(network.shift.value, model.position[0])
    assert torch.equal(network.shift_1.value, -model.bias)


def test_names_that_modules_have_are_changed() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wiring, self.relu = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(F.relu(self.wiring(x)))

    network: Any = converted(Named(), (4,)).network
    lines = ["v1 = wiring_(x)", "v2 = relu_1(v1)", "v3 = relu(v2)", "return v3"]
    assert network.wiring().splitlines() == lines


# --------------------------------------------------------------------------------- refusals


class Parts(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Sequence(nn.Module):
    """A recurrent layer of which one or all outputs are read."""

    def __init__(self, rnn: nn.Module, read: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.rnn, self.read, self.head = rnn, read, nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.rnn(x)
        if self.read == 0:
            return outputs
        if self.read is not None:
            return last[1].transpose(0, 1)
        return self.head(torch.cat([outputs[:, -1].relu(), last[-1]], 1))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).real


def test_all_that_cannot_be_replaced_is_named() -> None:
    model = Parts(Attention(), nn.Linear(4, 4), Gate(), UnitNormLinear(4, 4))
    with pytest.raises(ValueError, match="without a 1-Lipschitz replacement") as found:
        converted(model, (3, 4))
    text = str(found.value)
    first, second, third = text.splitlines()[1:]
    assert "'parts.0.attn' MultiheadAttention: attention is not Lipschitz on all of space;" in first
    assert "give a layer in its place by replace={'parts.0': layer}" in first
    assert "'parts.2' Multiply (test_conversion.py:" in second
    assert "return x * x.sigmoid()): a product of two tensors is not Lipschitz" in second
    assert "'parts.3' UnitNormLinear: has the constant" in third
    with pytest.raises(ValueError, match="write what is around it as a module, which replace can"):
        converted(Gate(), (4,))
    with pytest.raises(
        TypeError, match=r"cannot be read: 'parts.0' .*replace=\{'parts.0': layer\}"
    ):
        converted(Parts(Fourier()), (4,))
    for layer, read in ((nn.GRU(4, 3, bidirectional=True, batch_first=True), 0),
                        (nn.LSTM(4, 3, batch_first=True), (1, 1))):  # fmt: skip
        with pytest.raises(ValueError, match=r"'rnn' .*: has no 1-Lipschitz replacement if it is"):
            converted(Sequence(layer, read), (6, 4))
    with pytest.raises(ValueError, match="by which nothing is divided in earnest"):
        converted(Join(lambda m, x: 1e6 * m.a(x)), (4,))
    with pytest.raises(ValueError, match="no 1-Lipschitz convolution has its geometry"):
        converted(nn.ConvTranspose2d(2, 2, 1, stride=2), (2, 3, 3))


def test_replacements_of_the_user() -> None:
    model = Parts(Attention(), nn.Linear(4, 4), Gate(), nn.GELU())
    mine = OrthogonalLinear(4, 4)
    replace: dict[Any, Any] = {
        "parts.0": mine, Gate: nn.Tanh(), nn.GELU: lambda old: AverageResidual(nn.Tanh()),
    }  # fmt: skip
    conversion = converted(model, (3, 4), replace=replace)
    network: Any = conversion.network
    assert rows(conversion)["parts.0"] == ("Attention", "OrthogonalLinear")
    assert rows(conversion)["parts.2"] == ("Gate", "Tanh")
    assert type(network.parts[3]) is AverageResidual
    assert torch.equal(network.parts[0].weight, mine.weight)
    assert network.parts[0] is not mine
    assert isinstance(converted(Gate(), (4,), replace={"": nn.Tanh()}).network, nn.Tanh)
    outer = converted(model, (3, 4), replace={"parts": nn.Tanh(), Gate: nn.Sigmoid()})
    assert [row.new for row in outer.replacements] == ["Tanh"]
    with pytest.raises(ValueError, match=r"'parts.2' _Given: replace gives .* constant 2, above 1"):
        converted(model, (3, 4), replace={**replace, "parts.2": Scale(2.0)})
    with pytest.raises(ValueError, match=r"replace must name paths of the model, got 'part' and"):
        converted(model, (3, 4), replace={"part": mine})
    with pytest.raises(TypeError, match="replace must have paths or classes of modules as keys"):
        converted(model, (3, 4), replace={3: mine})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="replace must give modules or functions"):
        converted(model, (3, 4), replace={"parts.0": nn.Tanh})
    with pytest.raises(TypeError, match=r"replace must give a module at 'parts.0', got int"):
        converted(model, (3, 4), replace={"parts.0": lambda old: 3})  # type: ignore[dict-item,return-value]


def test_one_tensor_of_several_outputs() -> None:
    model = ordinary.made(ordinary.NETWORKS["dictionary"])
    shape = ordinary.NETWORKS["dictionary"].shape
    with pytest.raises(ValueError, match="name it by output="):
        converted(model, shape)
    network = converted(model, shape, output="logits").network
    assert isinstance(network(torch.rand(2, *shape)), Tensor)


# ----------------------------------------------------------------------- life of a network


def test_the_life_of_a_network() -> None:
    torch.manual_seed(0)
    model = ResNet()
    network = converted(model, (3, 8, 8)).network
    torch.manual_seed(0)
    again = converted(ResNet(), (3, 8, 8)).network
    x = torch.rand(5, 3, 8, 8)
    network(x).sum().backward()  # in training mode, which moves the running means
    for name, parameter in network.named_parameters():
        assert parameter.numel() == 0 or bool(parameter.grad.any()), name
    network.eval()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), freeze(network)):
        assert torch.equal(copied(x), network(x))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x), network(x))
    assert set(dict(network.named_children())) >= {"stem", "blocks", "fc"}
    frozen = freeze(network)
    assert not any("parametrizations" in key for key in frozen.state_dict())
    bounds = [lipschitz_bound(each, (3, 8, 8)).value for each in (network, frozen)]
    assert bounds[0] == bounds[1]


def test_seeds_dtypes_and_modes() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = mlp().double().eval()
        network = converted(model, (2, 3)).network
        assert not network.training
        assert {p.dtype for p in network.parameters()} == {torch.float64}
        outputs.append(network(torch.ones(1, 2, 3, dtype=torch.float64)))
    assert torch.equal(*outputs)
    model = Join(lambda m, x: x + m.a(x)).double()
    network = converted(model, (4,), activation="householder").network
    assert {p.dtype for p in network.parameters()} == {torch.float64}


def test_a_converted_lenet_learns_and_is_certified() -> None:
    torch.manual_seed(0)
    x, y, x_test, y_test = data.mnist()
    x, x_test = (average_pooling(part[:1200], 2) for part in (x, x_test))
    network = converted(LeNet(32), (1, 14, 14)).network
    loss = losses.MultiMarginLoss(margin=losses.margin_for_radius(0.5))
    training.train(network, x, y[:1200], epochs=2, lr=0.01, loss=loss,
                   optimizer=torch.optim.Adam)  # fmt: skip
    inputs = [(x_test[:200], y_test[:200])]
    certificate = robustness.certify(network, inputs, input_shape=(1, 14, 14))
    assert certificate.certified_accuracy(0).value > 0.5
    assert certificate.certified_accuracy(0.1).value > 0.25


# ------------------------------------------------------------------------------- the parts


def test_an_average_is_the_weighted_sum() -> None:
    average = Average([1.0, -2.0, 1.0], dtype=torch.float64)
    a, b, c = torch.randn(3, 2, 5, dtype=torch.float64)
    assert torch.allclose(average(a, b, c), 0.25 * a - 0.5 * b + 0.25 * c, atol=1e-15)
    assert average.extra_repr() == "0.25, -0.5, 0.25"
    with pytest.raises(ValueError, match=r"parts must agree on the shape, got \[\(2, 5\), \(5,\)"):
        average(a, b[0], c)
    with torch.no_grad():
        average.logits.add_(3)
    average.reset_parameters()
    assert torch.allclose(torch.stack(average.weights()), torch.tensor([0.25, -0.5, 0.25]).double())


def test_a_wiring_is_followed() -> None:
    layers: dict[str, nn.Module] = {
        "a.first": Offset(torch.ones(2)),
        "join": ScaledJoin(Concatenate(1), 0.5),
    }
    network = GraphNetwork(
        layers, [("a.first", (0,)), ("join", (1, 0)), ("a.first", (0,)), ("join", (2, 3))]
    )
    x = torch.randn(3, 2)
    expected = 0.5 * torch.cat([0.5 * torch.cat([x + 1, x], 1), x + 1], 1)
    assert torch.equal(network(x), expected)
    assert set(network.state_dict()) == {"a.first.value"}
    assert [name for name, _ in itertools.islice(network.named_modules(), 1, 3)] == ["a", "a.first"]
    with pytest.raises(ValueError, match="steps must name layers"):
        GraphNetwork(layers, [("a.second", (0,))])
    with pytest.raises(ValueError, match="steps must name layers, and read values that are there"):
        GraphNetwork(layers, [("a.first", (1,))])
    with pytest.raises(TypeError, match=r"layers must be modules, got int at 'b'"):
        GraphNetwork({"b": 3}, [])  # type: ignore[dict-item]
