r"""Convolutional 1-Lipschitz networks for small colour images, trained in minutes.

What :mod:`lipbook.lab.fast` is for digits, with shift convolutions in the place of dense layers:

- **Layers.** A layer mixes the channels of each pixel by an orthogonal matrix and moves a part of
  them by a pixel (:class:`~lipbook.convolutions.ShiftConv2d`). Both keep norms; what they cost is
  a product of matrices and a copy.
- **Activations.** :math:`|x|` on half of the channels, and MaxMin in the network that it becomes.
  The two channels of a pair move alike, so that the turn of a pair can be absorbed.
- **Layout.** Channels first, images last: one product mixes the channels of all pixels of a batch,
  and a shift copies whole rows of memory. Signs are bits, and are changed as such.
- **Images.** Sixteen share a shift and a reflection (:func:`views`). The mean colour is taken off
  first, so that what a shift lays bare has it; biases take it over.

Gradients, steps and the last layer are those of :mod:`lipbook.lab.fast`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.convolutions import ShiftConv2d
from lipbook.export import freeze
from lipbook.lab.fast import SHARED, AbsoluteNet, _turned
from lipbook.lab.networks import MOVES
from lipbook.orthogonal import polar

__all__ = ["ShiftNet", "Stage", "fit", "views"]

CLASSES = 10
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Stage(NamedTuple):
    """Layers of one width.

    Attributes
    ----------
    channels : int
        Of each layer, a multiple of 16.
    stride : int
        Of the first layer; that of the others is 1.
    layers : int
        How many they are.
    """

    channels: int
    stride: int
    layers: int


def views(images: Tensor, rng: np.random.Generator, shift: int = 2) -> Tensor:
    r"""Shift images by whole pixels and mirror every second one on average, sixteen alike.

    Parameters
    ----------
    images : torch.Tensor
        (n, c, h, w), n a multiple of 16.
    rng : numpy.random.Generator
        Draws the changes.
    shift : int
        Largest shift in pixels, up, down, left and right. What comes from outside is 0.

    Returns
    -------
    torch.Tensor
        (c, h, w, n).

    Examples
    --------
    >>> images = torch.rand(32, 3, 8, 8)
    >>> changed = views(images, np.random.default_rng(0), shift=0).permute(3, 0, 1, 2)
    >>> same, mirrored = (changed == x for x in (images, images.flip(3)))
    >>> bool((same.flatten(1).all(1) | mirrored.flatten(1).all(1)).all())
    True
    """
    n, _, h, w = images.shape
    padded = functional.pad(images, (shift,) * 4)
    changed = images.new_empty(*images.shape[1:], n)
    for start in range(0, n, SHARED):
        down, right = rng.integers(0, 2 * shift + 1, 2)
        group = padded[start : start + SHARED, :, down : down + h, right : right + w]
        group = group.flip(3) if rng.random() < 0.5 else group
        changed[..., start : start + SHARED] = group.permute(1, 2, 3, 0)
    return changed


class ShiftNet(AbsoluteNet):
    r"""Shift convolutions with :math:`|x|` on the first half of the channels, and a dense layer.

    .. math:: h_0 = x, \qquad h_k = S\,a(W_k D_k h_{k-1} + b_k), \qquad z = W_{K+1} h_K + b_{K+1}

    :math:`D_k` is invertible downsampling by the stride of the layer, :math:`W_k` has orthonormal
    rows or columns and acts on the channels of each pixel, and S moves each half of the channels
    by the same offsets. :math:`W_{K+1}` is that of :class:`~lipbook.lab.fast.AbsoluteNet`.

    Parameters
    ----------
    stages : sequence of Stage
        From the image to the dense layer.
    seed : int
        Of the first weights.
    dtype : torch.dtype
        Of products.
    image : tuple of int
        Channels and side of an image.
    moves : sequence of (int, int)
        Offsets of the groups of channels.

    Raises
    ------
    ValueError
        Channels of a stage do not divide into two halves of equal groups.

    Examples
    --------
    >>> net = ShiftNet([Stage(16, 2, 2)], dtype=torch.float64, image=(3, 4))
    >>> x = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    >>> inputs, signs, logits = net.forward(x.permute(1, 2, 3, 0))
    >>> plain = net.network().double()
    >>> bool((plain(x) - logits.T).abs().max() < 1e-6)
    True
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        image: tuple[int, int] = (3, 32),
        moves: Sequence[tuple[int, int]] = MOVES,
    ) -> None:
        if any(stage.channels % (2 * len(moves)) for stage in stages):
            raise ValueError(
                f"stages: expected multiples of {2 * len(moves)} channels, got {(*stages,)}"
            )
        self.dtype, self.steps, self.moves = dtype, 0, tuple(moves)
        channels, side = image
        shapes: list[tuple[int, int]] = []
        self.strides: list[int] = []
        for stage in stages:
            for stride in (stage.stride, *[1] * (stage.layers - 1)):
                shapes.append((stage.channels, channels * stride**2))
                self.strides.append(stride)
                channels, side = stage.channels, side // stride
        shapes.append((CLASSES, channels * side**2))
        long = torch.promote_types(dtype, torch.float32)
        draw = torch.Generator().manual_seed(seed)
        self.weights = [
            _orthonormal(torch.randn(shape, generator=draw).to(long)) for shape in shapes
        ]
        self.length = math.sqrt((CLASSES - 1) / CLASSES)
        self.weights[-1] *= self.length
        self.biases = [torch.zeros(m, dtype=long) for m, _ in shapes]
        self.momenta = [torch.zeros_like(part) for part in (*self.weights, *self.biases)]
        self.low = [weight.to(dtype) for weight in self.weights]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute the logits, and what their gradients need.

        Parameters
        ----------
        x : torch.Tensor
            (c, h, w, batch).

        Returns
        -------
        tuple
            Inputs of all layers; bits of signs in the hidden ones; logits (classes, batch).
        """
        inputs, signs = [], []
        for weight, bias, stride in zip(self.low, self.biases, self.strides, strict=False):
            x = _downsampled(x, stride)
            inputs.append(x)
            x = torch.mm(weight, x.flatten(1)).view(-1, *x.shape[1:])
            x += bias.to(self.dtype).view(-1, 1, 1, 1)
            signs.append(self._activate(x))
            x = _moved(x, self.moves)
        inputs.append(x)
        x = x.flatten(0, 2)
        return inputs, signs, torch.addmm(self.biases[-1].to(x)[:, None], self.low[-1], x)

    def _activate(self, x: Tensor) -> Tensor:
        bits = x[: len(x) // 2].view(_BITS[x.dtype])
        limits = torch.iinfo(bits.dtype)
        signs = bits & limits.min
        bits &= limits.max
        return signs

    def gradients(
        self, inputs: list[Tensor], signs: list[Tensor], outer: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the weights, and of the biases by the number of pixels that they serve.

        Parameters
        ----------
        inputs, signs : list of torch.Tensor
            From :meth:`forward`.
        outer : torch.Tensor
            Gradient of the loss with respect to the logits, (classes, batch).

        Returns
        -------
        tuple of list of torch.Tensor
            Of weights and of biases.
        """
        weights, biases = [outer @ inputs[-1].flatten(0, 2).T], [outer.sum(1)]
        outer = (self.low[-1].T @ outer).view(inputs[-1].shape)
        back = [(-down, -right) for down, right in self.moves]
        for layer in reversed(range(len(signs))):
            outer = _moved(outer, back)
            half = outer[: len(outer) // 2].view(signs[layer].dtype)
            half ^= signs[layer]
            outer = outer.flatten(1)
            weights.append(outer @ inputs[layer].flatten(1).T)
            pixels = inputs[layer][0, ..., 0].numel()
            sums = outer @ outer.new_ones(outer.shape[1], 1)  # faster than outer.sum(1)
            biases.append(sums[:, 0].to(self.biases[layer].dtype) / pixels)
            if layer:
                outer = (self.low[layer].T @ outer).view(inputs[layer].shape)
                outer = _upsampled(outer, self.strides[layer])
        return weights[::-1], biases[::-1]

    def _step_hidden(self, weight: Tensor, low: Tensor, direction: Tensor, lr: float) -> None:
        if len(weight) > weight.shape[1]:  # of orthonormal columns
            weight, low, direction = weight.T, low.T, direction.T
        super()._step_hidden(weight, low, direction, lr)

    def network(self, mean: Tensor | None = None) -> nn.Sequential:
        """Make the network with MaxMin, each hidden weight replaced by its polar factor.

        Parameters
        ----------
        mean : torch.Tensor, optional
            (c,): what the colours of an image are less before they come to :meth:`forward`. Biases
            of the first layer take it over. Default 0.

        Returns
        -------
        torch.nn.Sequential
            Shift convolutions, MaxMin and a dense layer, with constant weights in float32, in
            evaluation mode.
        """
        weights = [_orthonormal(weight.double()) for weight in self.weights[:-1]]
        weights.append(self.weights[-1].double())
        biases = [bias.double() for bias in self.biases]
        if mean is not None:
            colours = mean.double().repeat_interleave(self.strides[0] ** 2)
            biases[0] = biases[0] - weights[0] @ colours
        for layer in range(len(self.strides)):
            weights[layer], biases[layer] = _turned(weights[layer]), _turned(biases[layer])
            blocks = weights[layer + 1].unflatten(1, (len(weights[layer]), -1))
            weights[layer + 1] = _turned(blocks.transpose(0, 1)).transpose(0, 1).flatten(1)
        layers: list[nn.Module] = []
        for weight, stride in zip(weights, self.strides, strict=False):
            c_in = weight.shape[1] // stride**2
            layers += [
                ShiftConv2d(c_in, len(weight), stride, self.moves, method="polar"),
                MaxMin(),
            ]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(*weights[-1].T.shape))
        parts: Any = zip((*layers[::2], model[-1]), weights, biases, strict=True)
        with torch.no_grad():
            for module, weight, bias in parts:
                if isinstance(module, ShiftConv2d):
                    module.weight = weight.float()
                else:
                    module.weight.copy_(weight)
                module.bias.copy_(bias)
        return cast(nn.Sequential, freeze(model))


def _orthonormal(matrix: Tensor) -> Tensor:
    """Polar factor, with orthonormal columns or rows."""
    wide = len(matrix) < matrix.shape[1]
    return (polar(matrix.T).T if wide else polar(matrix)).contiguous()


def _moved(x: Tensor, moves: Sequence[tuple[int, int]]) -> Tensor:
    """Move the groups of each half of the channels of (c, h, w, batch) around the circle."""
    halves = x.unflatten(0, (2, len(moves), -1))
    moved = torch.empty_like(halves)
    for group, (down, right) in enumerate(moves):
        source, target = halves[:, group], moved[:, group]
        if down and right:
            target.copy_(source.roll((down, right), (2, 3)))
        elif down or right:
            axis = 2 if down else 3
            first = (down + right) % source.shape[axis]
            rest = source.shape[axis] - first
            target.narrow(axis, first, rest).copy_(source.narrow(axis, 0, rest))
            target.narrow(axis, 0, first).copy_(source.narrow(axis, rest, first))
        else:
            target.copy_(source)
    return moved.view(x.shape)


def _downsampled(x: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return x
    c, h, w, n = x.shape
    windows = x.view(c, h // stride, stride, w // stride, stride, n).permute(0, 2, 4, 1, 3, 5)
    return windows.reshape(c * stride**2, h // stride, w // stride, n)


def _upsampled(x: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return x
    c, h, w, n = x.shape
    windows = x.view(c // stride**2, stride, stride, h, w, n).permute(0, 3, 1, 4, 2, 5)
    return windows.reshape(c // stride**2, h * stride, w * stride, n)


def fit(
    images: Tensor,
    labels: Tensor,
    *,
    stages: Sequence[Stage],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float = 0.03,
    batch_size: int = 256,
    shift: int = 2,
    precision: str = "float32",
    seed: int = 0,
) -> nn.Sequential:
    r"""Train a network of shift convolutions.

    The mean colour of the images is taken off, which the biases of the first layer take over. Rates
    fall linearly to 0, for biases from 1 on. Of each shuffled epoch, what does not fill a batch is
    left out. The result is determined by the arguments, bit for bit on one machine.

    Parameters
    ----------
    images, labels : torch.Tensor
        To train on, (n, c, h, h) in [0, 1] and (n,) of int64; nothing is held out.
    stages : sequence of Stage
        Of the network.
    loss : callable
        ``loss(logits, labels)``, given logits in float32.
    epochs : int
        Passes over the images.
    lr : float
        First rate of the weights, in (0, 0.5].
    batch_size : int
        A multiple of 16, no larger than the number of images.
    shift : int
        Of :func:`views`.
    precision : str
        Of products: ``"float32"``, or ``"bfloat16"`` for processors that have instructions for it.
    seed : int
        Of the first weights, the order and the changes of images.

    Returns
    -------
    torch.nn.Sequential
        That of :meth:`ShiftNet.network`. **Guaranteed**: all weights but the last have orthonormal
        rows or columns, up to rounding to float32. **Not guaranteed**: a bound; measure it.

    Raises
    ------
    ValueError
        An argument is unusable; the message names it.
    FloatingPointError
        The loss became NaN or infinite.

    Examples
    --------
    >>> images, labels = torch.rand(64, 3, 4, 4), torch.arange(64) % 2
    >>> images[labels == 1, 0] /= 2
    >>> stages, loss = [Stage(16, 2, 2)], nn.CrossEntropyLoss()
    >>> model = fit(images, labels, stages=stages, loss=loss, epochs=20, batch_size=32)
    >>> bool((model(images).argmax(1) == labels).double().mean() > 0.9)
    True
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {(*_PRECISIONS,)}, got {precision!r}")
    if images.dim() != 4 or len(images) != len(labels) or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"images: expected shape ({len(labels)}, c, h, h) for as many labels, "
            f"got {tuple(images.shape)}"
        )
    if batch_size % SHARED or not 0 < batch_size <= len(images):
        raise ValueError(
            f"batch_size: expected a multiple of {SHARED} up to {len(images)}, got {batch_size}"
        )
    if not 0 < lr <= 0.5:
        raise ValueError(f"lr: expected a number in (0, 0.5], got {lr}")
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    net = ShiftNet(stages, seed, _PRECISIONS[precision], (images.shape[1], images.shape[2]))
    mean = images.mean((0, 2, 3))
    rng = np.random.default_rng(seed)
    steps = len(images) // batch_size
    for epoch, step in itertools.product(range(epochs), range(steps)):
        if step == 0:
            order = torch.from_numpy(rng.permutation(len(images)))
        batch = order[step * batch_size :][:batch_size]
        centred = images.index_select(0, batch) - mean.view(-1, 1, 1)
        x = views(centred.to(net.dtype), rng, shift)
        inputs, signs, logits = net.forward(x)
        logits = logits.T.float().requires_grad_()
        value = loss(logits, labels[batch])
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"loss is {value.item()} in epoch {epoch + 1}: lr={lr}?")
        (outer,) = torch.autograd.grad(value, logits)
        weights, biases = net.gradients(inputs, signs, outer.T.to(net.dtype))
        left = 1 - (epoch * steps + step) / (epochs * steps)
        net.step(weights, biases, lr * left, left)
    return net.network(mean)
