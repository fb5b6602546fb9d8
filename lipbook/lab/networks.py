"""Networks of the experiments: their architectures, and those that ship with their weights.

``networks.load("mnist_best")`` is a trained network. Weights travel in half precision, and the
network that is loaded computes in float32 with the rounded ones: it is that network whose
certificates are recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lipbook.activations import GroupSort, MaxMin
from lipbook.attention import EnergyAttention, L2MultiheadAttention
from lipbook.convolutions import OrthogonalConv2d, ShiftConv2d
from lipbook.export import freeze
from lipbook.lab import records
from lipbook.lab.data import mnist
from lipbook.norms.arguments import _integer
from lipbook.orthogonal import OrthogonalLinear
from lipbook.pooling import AveragePooling
from lipbook.residual import AverageResidual, OrthogonalResidual, SLLLinear
from lipbook.sequences import CausalOrthogonalConv1d

__all__ = [
    "MOVES",
    "critic",
    "data",
    "dense",
    "large",
    "lipnext",
    "load",
    "names",
    "norm",
    "packed",
    "rebuilt",
    "resnet",
    "small",
    "temporal",
    "transformer",
]

WIDE = 128  # channels of the wide network, the Large one times four
#: Of shift convolutions: half of the channels stay, an eighth goes to each neighbour.
MOVES = (*[(0, 0)] * 4, (0, 1), (0, -1), (1, 0), (-1, 0))
SHIFT = (128, 256, 512)  # channels of the shift network's stages
DATA = "data/"  # how the names of tensors begin that are no weights
Convolution = Callable[[int, int, int, int], nn.Module]  # c_in, c_out, kernel size, stride
Linear = Callable[[int, int], nn.Module]


def dense(
    sizes: Sequence[int], group_size: int = 2, linear: Linear = OrthogonalLinear
) -> nn.Sequential:
    """Build a dense network: flatten, then linear layers with GroupSort between them.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of inputs, of the units of each layer, and of outputs.
    group_size : int
        Of GroupSort; 2 makes MaxMin.
    linear : callable
        Makes a layer from its numbers of inputs and outputs.

    Returns
    -------
    torch.nn.Sequential

    Examples
    --------
    >>> [type(layer).__name__ for layer in dense([784, 16, 10])]
    ['Flatten', 'ParametrizedOrthogonalLinear', 'MaxMin', 'ParametrizedOrthogonalLinear']
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in itertools.pairwise(sizes):
        layers += [linear(n, m), MaxMin() if group_size == 2 else GroupSort(group_size)]
    return nn.Sequential(*layers[:-1])


def small(
    channels: int = 1,
    size: int = 28,
    convolution: Convolution = OrthogonalConv2d,
    linear: Linear = OrthogonalLinear,
) -> nn.Sequential:
    """Build the Small network of 2019: two strided convolutions and two dense layers.

    Parameters
    ----------
    channels : int
        Of the image.
    size : int
        Height and width of the image, a multiple of 4.
    convolution : callable
        Makes a layer from numbers of inputs and outputs, kernel size and stride.
    linear : callable
        As in :func:`dense`.

    Returns
    -------
    torch.nn.Sequential

    References
    ----------
    :cite:t:`li2019preventing`, appendix.

    Examples
    --------
    >>> import torch
    >>> small()(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    return nn.Sequential(
        convolution(channels, 16, 4, 2),
        MaxMin(),
        convolution(16, 32, 4, 2),
        MaxMin(),
        nn.Flatten(),
        linear(32 * (size // 4) ** 2, 100),
        MaxMin(),
        linear(100, 10),
    )


def large(
    channels: int = 3,
    size: int = 32,
    convolution: Convolution = OrthogonalConv2d,
    linear: Linear = OrthogonalLinear,
    width: int = 32,
) -> nn.Sequential:
    """Build the Large network of 2019: four convolutions, two of them strided, three dense layers.

    Parameters
    ----------
    channels, size, convolution, linear
        As in :func:`small`.
    width : int
        Channels of the first two convolutions; the other two have twice as many.

    Returns
    -------
    torch.nn.Sequential

    References
    ----------
    :cite:t:`li2019preventing`, appendix.

    Examples
    --------
    >>> import torch
    >>> large()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return nn.Sequential(
        convolution(channels, width, 3, 1),
        MaxMin(),
        convolution(width, width, 4, 2),
        MaxMin(),
        convolution(width, 2 * width, 3, 1),
        MaxMin(),
        convolution(2 * width, 2 * width, 4, 2),
        MaxMin(),
        nn.Flatten(),
        linear(2 * width * (size // 4) ** 2, 512),
        MaxMin(),
        linear(512, 512),
        MaxMin(),
        linear(512, 10),
    )


def transformer(
    features: int,
    tokens: int,
    outputs: int,
    width: int = 16,
    blocks: int = 2,
    heads: int = 2,
    causal: bool = False,
) -> nn.Sequential:
    r"""Build a 1-Lipschitz transformer: an encoder of sequences with one answer for each.

    Tokens are embedded by an orthogonal layer, and positions are learnt. A block is attention
    (:class:`~lipbook.attention.EnergyAttention`) and a residual layer for each token
    (:class:`~lipbook.residual.SLLLinear`). The sum of the tokens over :math:`\sqrt n` is read by an
    orthogonal layer. Each part is 1-Lipschitz, and so is the network.

    A causal one answers at each token, by that token and earlier ones. Its attention is half of an
    average with a skip: :class:`~lipbook.attention.L2MultiheadAttention`, divided by its bound.

    Parameters
    ----------
    features : int
        Of a token.
    tokens : int
        Length of a sequence, n.
    outputs : int
        Of the network.
    width : int
        Features of a token inside, a multiple of ``heads``.
    blocks : int
        Pairs of attention and residual layer.
    heads : int
        Of the attention.
    causal : bool
        Whether to answer at each token.

    Returns
    -------
    torch.nn.Sequential
        To (batch, outputs), or (batch, tokens, outputs) of a causal one.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> round(lipschitz_bound(transformer(4, 6, 2).eval(), (6, 4)).value, 5)
    1.0
    >>> net = transformer(4, 6, 2, causal=True).eval()
    >>> net(torch.zeros(1, 6, 4)).shape, lipschitz_bound(net, (6, 4)).value <= 1 + 1e-5
    (torch.Size([1, 6, 2]), True)
    """
    layers: list[nn.Module] = [OrthogonalLinear(features, width), _Positions(tokens, width)]
    for _ in range(blocks):
        attention: nn.Module = EnergyAttention(width, heads)
        if causal:
            divided = L2MultiheadAttention(width, heads, nonexpansive=True, is_causal=True)
            attention = AverageResidual(divided)
        layers += [attention, SLLLinear(width, 2 * width)]
    if not causal:
        layers.append(_Total())
    return nn.Sequential(*layers, OrthogonalLinear(width, outputs))


class _Positions(nn.Module):
    """Addition of a learnt vector to each place of a sequence."""

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, features) / math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class _Total(nn.Module):
    """Sum of the tokens over the root of their number, with constant 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) / math.sqrt(x.shape[1])


def temporal(
    features: int, outputs: int, width: int = 32, depth: int = 4, kernel_size: int = 2
) -> nn.Sequential:
    r"""Build a 1-Lipschitz temporal network: causal convolutions whose dilation doubles.

    Layer i of the stack is a :class:`~lipbook.sequences.CausalOrthogonalConv1d` with dilation
    :math:`2^i`, with MaxMin behind it; the last layer has kernel size 1. An output depends on its
    own step and on those before it, of which it sees in all

    .. math:: r = 1 + (k - 1)(2^d - 1)

    with k the kernel size and d the depth. **Guaranteed**: sequences of any length are mapped to
    sequences of that length with constant 1, and so to any one step of them.

    Parameters
    ----------
    features : int
        Channels of a sequence (batch, channels, time).
    outputs : int
        Channels of the outputs, (batch, outputs, time).
    width : int
        Channels inside, an even number.
    depth : int
        Dilated layers.
    kernel_size : int
        Taps of a dilated layer.

    Returns
    -------
    torch.nn.Sequential

    Raises
    ------
    ValueError
        If a size is no positive number, or ``width`` is odd.

    Examples
    --------
    What comes after a step, or more than r = 16 steps before its end, does not change it:

    >>> net, x = temporal(3, 2), torch.randn(1, 3, 40)
    >>> torch.equal(net(x)[:, :, 29], net(x[:, :, 14:30])[:, :, -1])
    True

    References
    ----------
    Without a constraint: :cite:t:`bai2018temporal`.
    """
    if _integer("width", width, 1) % 2:
        raise ValueError(f"width must be even, which MaxMin asks for, got {width}")
    layers: list[nn.Module] = []
    channels = features
    for layer in range(_integer("depth", depth, 1)):
        layers += [CausalOrthogonalConv1d(channels, width, kernel_size, 2**layer), MaxMin()]
        channels = width
    return nn.Sequential(*layers, CausalOrthogonalConv1d(width, outputs, 1))


def _circular(c_in: int, c_out: int, size: int, stride: int) -> nn.Conv2d:
    padding = (size - stride) // 2
    return nn.Conv2d(c_in, c_out, size, stride, padding, padding_mode="circular")


def resnet(
    channels: int = 3,
    size: int = 32,
    outputs: int = 10,
    width: int = 32,
    depth: int = 2,
    stages: int = 3,
    block: Literal["average", "orthogonal"] = "average",
    convolution: Convolution = OrthogonalConv2d,
    linear: Linear = OrthogonalLinear,
) -> nn.Sequential:
    r"""Build a 1-Lipschitz residual network: strided stages of residual blocks, a mean, logits.

    A stage doubles the channels and halves the image; its blocks are two convolutions with MaxMin
    between them beside a skip. The skips of ``"average"`` blocks begin at one minus one over the
    number of blocks, so that depth costs little (:class:`~lipbook.residual.AverageResidual`); those
    of ``"orthogonal"`` blocks lose nothing, and their branches see half the channels
    (:class:`~lipbook.residual.OrthogonalResidual`).

    Parameters
    ----------
    channels : int
        Of the image.
    size : int
        Height and width of the image, a multiple of :math:`2^{\mathrm{stages} - 1}`.
    outputs : int
        Logits.
    width : int
        Channels of the first stage; even, and a multiple of 4 with ``"orthogonal"`` blocks.
    depth : int
        Blocks of a stage.
    stages : int
        Sizes of the image on the way.
    block : str
        ``"average"`` or ``"orthogonal"``.
    convolution, linear : callable
        As in :func:`small`.

    Returns
    -------
    torch.nn.Sequential

    Raises
    ------
    ValueError
        If there is no such block.

    Examples
    --------
    >>> import torch
    >>> from lipbook.composition import lipschitz_bound
    >>> net = resnet(size=16, width=8, depth=1)
    >>> net(torch.rand(2, 3, 16, 16)).shape, round(lipschitz_bound(net, (3, 16, 16)).value, 5)
    (torch.Size([2, 10]), 1.0)
    """
    if block not in ("average", "orthogonal"):
        raise ValueError(f"block: expected 'average' or 'orthogonal', got {block!r}")

    def residual(c: int) -> nn.Module:
        if block == "orthogonal":
            half = c // 2
            first, second = convolution(half, half, 3, 1), convolution(half, half, 3, 1)
            return OrthogonalResidual(nn.Sequential(first, MaxMin(), second))
        branch = nn.Sequential(convolution(c, c, 3, 1), MaxMin(), convolution(c, c, 3, 1))
        return AverageResidual(branch, weight=1 / (depth * stages + 1))

    layers: list[nn.Module] = [convolution(channels, width, 3, 1), MaxMin()]
    for stage in range(stages):
        if stage:
            layers += [convolution(width, 2 * width, 2, 2), MaxMin()]
            width *= 2
        for _ in range(depth):
            layers += [residual(width), MaxMin()]
    pooled = [AveragePooling(size // 2 ** (stages - 1)), nn.Flatten()]
    return nn.Sequential(*layers, *pooled, linear(width, outputs))


def lipnext(
    channels: int = 3,
    size: int = 32,
    outputs: int = 10,
    widths: Sequence[int] = (32, 64, 128),
    depth: int = 4,
    linear: Linear = OrthogonalLinear,
) -> nn.Sequential:
    r"""Build a small LipNeXt: stages of shift convolutions with MaxMin, and a dense layer.

    The first layer of a stage halves the image, and all its layers have the channels of the stage
    (:class:`~lipbook.convolutions.ShiftConv2d`): half of them stay in place, an eighth moves to
    each neighbour. All singular values of each layer are 1, at the price of a product of matrices.
    The blocks of the paper put their parts in another order, and end in a pooling by norms.

    Parameters
    ----------
    channels : int
        Of the image.
    size : int
        Height and width of the image, a multiple of :math:`2^k` for k stages.
    outputs : int
        Logits.
    widths : sequence of int
        Channels of each stage, even numbers from 8 on.
    depth : int
        Layers of a stage.
    linear : callable
        As in :func:`dense`.

    Returns
    -------
    torch.nn.Sequential

    Raises
    ------
    ValueError
        If the stages do not halve the image.

    Examples
    --------
    >>> import torch
    >>> from lipbook.composition import lipschitz_bound
    >>> net = lipnext(size=16, widths=(16, 32), depth=2)
    >>> net(torch.rand(2, 3, 16, 16)).shape, round(lipschitz_bound(net, (3, 16, 16)).value, 5)
    (torch.Size([2, 10]), 1.0)

    References
    ----------
    :cite:t:`hu2026lipnext`.
    """
    if size % 2 ** len(widths):
        raise ValueError(
            f"size: expected a multiple of {2 ** len(widths)} for {len(widths)} stages, got {size}"
        )
    layers: list[nn.Module] = []
    for width in widths:
        for stride in (2, *[1] * (depth - 1)):
            layers += [ShiftConv2d(channels, width, stride, MOVES), MaxMin()]
            channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), linear(channels * (size // 2 ** len(widths)) ** 2, outputs)
    )


def critic(
    features: int, width: int = 128, depth: int = 3, linear: Linear = OrthogonalLinear
) -> nn.Sequential:
    """Build a critic: a dense 1-Lipschitz network with one output, each layer sorted as a whole.

    Sorting whole layers (FullSort) serves distances in high dimension better than pairs do; the
    value of a critic is :func:`~lipbook.wasserstein.kantorovich_dual`.

    Parameters
    ----------
    features : int
        Numbers of a sample, of any shape.
    width : int
        Units of a hidden layer.
    depth : int
        Hidden layers.
    linear : callable
        As in :func:`dense`.

    Returns
    -------
    torch.nn.Sequential

    Examples
    --------
    >>> import torch
    >>> critic(6, width=8)(torch.rand(5, 2, 3)).shape
    torch.Size([5, 1])

    References
    ----------
    :cite:t:`anil2019sorting`.
    """
    return dense([features, *[width] * depth, 1], width, linear)


def _shift(channels: int, size: int) -> nn.Sequential:
    net = lipnext(channels, size, widths=SHIFT, linear=nn.Linear)
    return cast(nn.Sequential, freeze(net.eval()))


_ARCHITECTURES: dict[str, Callable[..., nn.Sequential]] = {
    "dense": functools.partial(dense, linear=nn.Linear),
    "small": functools.partial(small, convolution=_circular, linear=nn.Linear),
    "large": functools.partial(large, convolution=_circular, linear=nn.Linear),
    "wide": functools.partial(large, convolution=_circular, linear=nn.Linear, width=WIDE),
    "shift": _shift,
}


def names() -> list[str]:
    """List the networks that ship.

    Returns
    -------
    list of str
        Names for :func:`load`, in alphabetical order.

    Examples
    --------
    >>> "mnist_best" in names()
    True
    """
    return sorted(_shipped())


def load(name: str) -> nn.Sequential:
    """Load a network that ships, with its weights.

    Parameters
    ----------
    name : str
        One of :func:`names`.

    Returns
    -------
    torch.nn.Sequential
        Plain layers of torch and MaxMin, in float32 and evaluation mode, parameters frozen.

    Raises
    ------
    ValueError
        If there is no such network, naming those that exist.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> print(f"{lipschitz_bound(load('mnist_best'), (1, 28, 28)).value:.2f}")
    1.00
    """
    facts = _facts(name)
    record, _, key = name.partition("/")
    prefix = f"{key}/" if key else ""
    tensors = {
        entry.removeprefix(prefix): value
        for entry, value in records.read(record).tensors.items()
        if entry.startswith(prefix) and not entry.startswith(DATA)
    }
    return rebuilt(facts["architecture"], facts["arguments"], tensors)


def norm(name: str) -> float:
    """Exponent p of the norm in which a network that ships was trained to be robust.

    Parameters
    ----------
    name : str
        One of :func:`names`.

    Returns
    -------
    float
        2 or :data:`math.inf`.

    Examples
    --------
    >>> norm("mnist_best")
    2.0
    """
    return float(_facts(name)["p"])


def data(name: str) -> tuple[Tensor, Tensor]:
    """Test images that ship for a network, which it was not trained on.

    Parameters
    ----------
    name : str
        One of :func:`names`.

    Returns
    -------
    tuple of torch.Tensor
        Images in [0, 1], float32, and labels: the 2,000 test digits, or those of the record.

    Examples
    --------
    >>> data("mnist_best")[0].shape, data("cifar10")[0].shape
    (torch.Size([2000, 1, 28, 28]), torch.Size([200, 3, 32, 32]))
    """
    _facts(name)
    tensors = records.read(name.partition("/")[0]).tensors
    if DATA + "images" in tensors:
        return tensors[DATA + "images"].float() / 255, tensors[DATA + "labels"]
    digits = mnist()
    return digits.test_images, digits.test_labels


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Freeze a network and round its weights to half precision, as they are stored.

    Parameters
    ----------
    model : torch.nn.Module
        One of the architectures of this module, of any layers that can be frozen.

    Returns
    -------
    dict of str to torch.Tensor
        Weights and biases in float16, for :func:`rebuilt`.
    """
    state = freeze(model.eval()).state_dict()
    return {key: value.detach().half() for key, value in state.items()}


def rebuilt(
    architecture: str, arguments: Sequence[Any], tensors: Mapping[str, Tensor]
) -> nn.Sequential:
    """Build a network of plain layers from weights that :func:`packed` has made.

    Parameters
    ----------
    architecture : str
        ``"dense"``, ``"small"``, ``"large"``, ``"wide"`` (large with 128 channels) or ``"shift"``
        (:func:`lipnext` with 128, 256 and 512 channels).
    arguments : sequence
        First arguments of the function of that name.
    tensors : mapping of str to torch.Tensor
        Weights and biases.

    Returns
    -------
    torch.nn.Sequential
        In float32 and evaluation mode, parameters frozen.

    Raises
    ------
    ValueError
        If there is no such architecture, naming those that exist.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"architecture: expected one of {(*_ARCHITECTURES,)}, got {architecture!r}"
        )
    model = _ARCHITECTURES[architecture](*arguments)
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.requires_grad_(False).eval()


def _facts(name: str) -> dict[str, Any]:
    shipped = _shipped()
    if name not in shipped:
        raise ValueError(f"no network {name!r}: expected one of {sorted(shipped)}")
    return shipped[name]


def _shipped() -> dict[str, dict[str, Any]]:
    """Each record that has networks lists them: "" stands for the record itself."""
    found = {}
    for record in records.names():
        results = records.read(record, tensors=False).results
        for key, facts in results.get("networks", {}).items():
            found[f"{record}/{key}" if key else record] = facts
    return found
