r"""Networks as people write them: what :func:`lipbook.composition.lipschitz_bound` takes unchanged.

Each class is written as its users write it: skips, concatenations, functional layers, in-place
units, strided shortcuts, dictionaries of outputs, wrappers. Nothing here knows of ``lipbook``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lipbook.composition import Box

__all__ = ["NETWORKS", "Ordinary", "ResNet18", "SmallConvNet", "made"]


class Ordinary(NamedTuple):
    """A network, how it is made, and what is needed to bound it.

    Parameters
    ----------
    build : callable
        Makes the network, with random weights.
    shape : tuple of int
        Of one input.
    options : dict
        Arguments of ``lipschitz_bound`` without which it refuses: a domain, the name of an output.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any]


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1))


class ResNet18(nn.Module):
    """The network of torchvision, line by line, at any width.

    Parameters
    ----------
    width : int
        Channels of the first stage; 64 as it is used.
    classes : int
        Logits.
    """

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, (batch, classes)."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1)
        self.shortcut = nn.Conv2d(3, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv2(functional.relu(self.bn2(self.conv1(out))))
        return (out + shortcut).mean((2, 3))


class Up(nn.Module):
    """Two inputs, so that no rule could be registered for it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return functional.relu(self.conv(torch.cat([skip, x], dim=1)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up = Up(7, 2)
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = functional.leaky_relu(self.down1(x), 0.1)
        second = self.down2(functional.max_pool2d(first, 2)).relu()
        return self.head(self.up(second, first))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 2, 3, padding=1))
            for c in (2, 4, 6)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.channels = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
        self.patch = nn.Conv2d(1, 3, 2, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        return self.head(x.mean(1))


class ConvNeXt(nn.Module):
    """Without its normalisation, which has a class of its own below."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.depthwise(x).permute(0, 2, 3, 1)
        x = self.gamma * self.narrow(functional.gelu(self.wide(x)))
        return residual + x.permute(0, 3, 1, 2)


class Inverted(nn.Module):
    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6())
        self.reduce, self.restore = nn.Linear(4, 2), nn.Linear(2, 4)
        self.project = nn.Conv2d(4, 2, 1)
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        if self.squeeze:
            gate = self.restore(functional.relu(self.reduce(out.mean((2, 3)))))
            out = out * torch.sigmoid(gate)[:, :, None, None]
        return x + self.project(out)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x - self.layer(x)


class Coupling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b = b + torch.tanh(self.first(a))
        a = a + torch.tanh(self.second(b))
        return torch.cat([a, b], dim=-1)


class Functional(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.tensor([0.5, -2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), -1)
        x = x @ self.weight.T + self.bias
        return functional.softplus(1 - 2 * x) / 3 + self.scale * x


class SmallConvNet(nn.Module):
    """Three convolutions, one of them around a skip, and a linear head, for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 7 * 7, 10)

    def features(self, x: Tensor) -> Tensor:
        """Give what the head reads, (batch, 392)."""
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        x = x + torch.relu(self.conv3(x))
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, (batch, 10)."""
        return self.fc(self.features(x))


class Wrapper(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).relu()
        return {"logits": self.head(features), "value": self.value(features)}


class LightningLike(nn.Module):
    """A module with a trainer, a property and hooks of its own, as frameworks add them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.hparams = {"rate": 0.1}
        self.loss = nn.CrossEntropyLoss()

    @property
    def trainer(self) -> object:
        raise RuntimeError("not attached to a trainer")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


class Transformer(nn.Module):
    """Patches of an image as tokens, one encoder layer, their mean to a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, 2)
        self.place = nn.Parameter(torch.zeros(4, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, layer_norm_eps=0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """The rows of an image as a sequence; the last state to a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.head(states[:, -1])


def parametrized() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)),
        Wrapper(parametrizations.orthogonal(nn.Linear(4, 4))),
        nn.ReLU(),
        Wrapper(parametrizations.spectral_norm(nn.Linear(4, 2))),
    )


def compiled_parts() -> nn.Module:
    first = nn.Linear(4, 4)
    first.compile(backend="eager")
    net = Wrapper(nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2)))
    net.compile(backend="eager")
    return net


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: wrap(Coupling())


def squeezed() -> nn.Module:
    return Inverted(squeeze=True)


IMAGE, VECTOR = (2, 4, 4), (4,)
#: Networks by name.
NETWORKS: dict[str, Ordinary] = {
    "ResNet-18": Ordinary(ResNet18, (3, 16, 16), {}),
    "pre-activation ResNet": Ordinary(PreActivation, (3, 6, 6), {}),
    "U-Net": Ordinary(UNet, (1, 6, 6), {}),
    "DenseNet block": Ordinary(Dense, IMAGE, {}),
    "MLP-Mixer": Ordinary(Mixer, (1, 4, 4), {}),
    "ConvNeXt block": Ordinary(ConvNeXt, (4, 3, 3), {}),
    "MobileNet block": Ordinary(lambda: Inverted(squeeze=False), IMAGE, {}),
    "squeeze and excitation": Ordinary(squeezed, IMAGE, {"domain": Box(0, 1)}),
    "transformer": Ordinary(Transformer, (1, 4, 4), {"domain": Box(0, 1)}),
    "LSTM of 6 steps": Ordinary(Recurrent, (6, 4), {}),
    "reused layers": Ordinary(Reused, VECTOR, {}),
    "coupling": Ordinary(Coupling, (6,), {}),
    "functions": Ordinary(Functional, (5,), {}),
    "parametrizations": Ordinary(parametrized, VECTOR, {}),
    "wrapper": Ordinary(lambda: Wrapper(Coupling()), (6,), {}),
    "dictionary": Ordinary(Named, VECTOR, {"output": "logits"}),
    "lightning": Ordinary(LightningLike, VECTOR, {}),
    "DataParallel": Ordinary(wrapped(nn.DataParallel), (6,), {}),
    "torch.compile": Ordinary(wrapped(compiled), (6,), {}),
    "module.compile": Ordinary(compiled_parts, VECTOR, {}),
    "AveragedModel": Ordinary(wrapped(AveragedModel), (6,), {}),
}


def made(network: Ordinary, seed: int = 0) -> nn.Module:
    """Make a network with random weights and random statistics of its batch normalisations.

    Parameters
    ----------
    network : Ordinary
        One of ``NETWORKS``, or another.
    seed : int
        Of all that is random.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.
    """
    torch.manual_seed(seed)
    net = network.build()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.get_buffer("running_mean"))
            nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 2)
            nn.init.uniform_(layer.weight, -1.5, 1.5)
    return net.eval()
