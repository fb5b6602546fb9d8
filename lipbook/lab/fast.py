r"""Dense 1-Lipschitz networks for digits, trained in seconds.

What :func:`lipbook.lab.training.train` does with :class:`~lipbook.lab.descent.StiefelMuon`, without
what a training of seconds cannot afford:

- **Activations.** MaxMin of a pair is a turn by 45°, the absolute value of one of the two, and the
  turn back. Dense weights absorb turns: :class:`AbsoluteNet` has :math:`|x|` on half of its units,
  and the network that it becomes has MaxMin.
- **Images.** The border, two pixels wide, is not looked at: the first layer has columns of zeros
  for it, with which nothing is computed. Sixteen images share a distortion (:func:`windows`).
- **Gradients** of the layers are written out; the loss alone is differentiated by torch.
- **Steps.** The sign of a matrix is rough (:func:`loose_sign`), and orthonormality is restored
  roughly, every fourth step. At the end each matrix is replaced by its polar factor in float64.
- **The last layer** has rows of one length and not orthonormal ones (:cite:t:`singla2022improved`):
  a certificate divides by the distance of two rows, see :func:`lipbook.robustness.certify`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.lab import networks
from lipbook.orthogonal import polar

__all__ = ["AbsoluteNet", "fit", "loose_sign", "windows"]

SIDE, BORDER, SHARED, CLASSES = 28, 2, 16, 10
MOMENTUM, RESTORE = 0.9, 4
# Three maps x -> a x + b x^3 + c x^5, each the best one (nearest to 1 in the maximum norm) on the
# interval that the one before leaves, from [0.01, 1] on.
_QUINTICS = (
    (8.0934, -23.6205, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def loose_sign(matrix: Tensor) -> Tensor:
    r"""Replace the singular values of a matrix by 1, more roughly than ``matrix_sign``.

    .. math:: U \Sigma V^\top \mapsto U s(\Sigma) V^\top, \qquad
        s(\sigma) \le 1.27, \quad
        s(\sigma) \ge 0.73 \text{ for } \sigma \ge 0.0103\, \lVert\Sigma^4\rVert_F^{1/4}

    by three odd polynomials. Their argument is scaled by an upper bound of the largest singular
    value that costs no product: :math:`\lVert\Sigma^4\rVert_F^{1/4} = \lVert (M M^\top)^2
    \rVert_F^{1/4}`, and the first polynomial needs that matrix anyway.

    Parameters
    ----------
    matrix : torch.Tensor
        :math:`M`, (m, n), best with :math:`m \le n`; zero is mapped to zero.

    Returns
    -------
    torch.Tensor
        Of the same shape and dtype. In bfloat16 the bounds of :math:`s` hold up to rounding.

    Examples
    --------
    >>> values = torch.linalg.svdvals(loose_sign(torch.diag(torch.tensor([5.0, 1.0, 0.1]))))
    >>> bool((values - 1).abs().max() < 0.27)
    True
    """
    _, exponent = torch.frexp(matrix.abs().amax().float())
    x = matrix * 2.0 ** -int(exponent)  # exactly; fourth powers neither vanish nor overflow
    gram = x @ x.mT
    square = gram @ gram
    # five per cent, since rounding may make the largest value exceed its bound
    size = 1.05 * torch.linalg.matrix_norm(square.float()).sqrt()
    size = float(size.clamp(min=torch.finfo(torch.float32).tiny ** 0.25))  # for zero
    x, gram, square = x / math.sqrt(size), gram / size, square / size**2
    for step, (a, b, c) in enumerate(_QUINTICS):
        if step:
            gram = x @ x.mT
            square = gram @ gram
        x = torch.addmm(x, torch.add(b * gram, square, alpha=c), x, beta=a)
    return x


def windows(
    images: Tensor, rng: np.random.Generator, shift: float = 0.5, strength: float = 0.05
) -> Tensor:
    r"""Distort images without their border, sixteen alike.

    The maps are those of :func:`lipbook.lab.augmentation.distorted`.

    Parameters
    ----------
    images : torch.Tensor
        (n, 1, 28, 28), n a multiple of 16.
    rng : numpy.random.Generator
        Draws the changes.
    shift, strength : float
        In pixels and in radians.

    Returns
    -------
    torch.Tensor
        (n, 576): the central 24×24 pixels of each changed image.

    Examples
    --------
    >>> images = torch.rand(32, 1, 28, 28)
    >>> middle = windows(images, np.random.default_rng(0), 0.0, 0.0)
    >>> bool((middle - images[:, 0, 2:-2, 2:-2].flatten(1)).abs().max() < 1e-5)
    True
    """
    groups = len(images) // SHARED
    angle, shear = rng.uniform(-strength, strength, (2, groups))
    stretch = 1 + 0.7 * rng.uniform(-strength, strength, (2, groups))
    maps = np.zeros((groups, 2, 3))
    maps[:, 0, 0], maps[:, 0, 1] = stretch[0] * np.cos(angle), shear - np.sin(angle)
    maps[:, 1, 0], maps[:, 1, 1] = np.sin(angle), stretch[1] * np.cos(angle)
    side = SIDE - 2 * BORDER
    maps[:, :, :2] *= side / SIDE
    maps[:, :, 2] = rng.uniform(-shift, shift, (groups, 2)) * 2 / SIDE
    theta = torch.from_numpy(maps).to(images)
    grid = functional.affine_grid(theta, [groups, 1, side, side], align_corners=False)
    grouped = images.reshape(groups, SHARED, SIDE, SIDE)
    return functional.grid_sample(grouped, grid, align_corners=False).view(-1, side**2)


class AbsoluteNet:
    r"""A dense network with :math:`|x|` on the first half of the units of each hidden layer.

    .. math:: h_0 = x, \qquad h_k = a(W_k h_{k-1} + b_k), \qquad z = W_{K+1} h_K + b_{K+1}

    The rows of :math:`W_1, \dots, W_K` are orthonormal. Those of :math:`W_{K+1}` have the length
    :math:`\sqrt{(C - 1) / C}` for C classes: were they the corners of a regular simplex, they would
    be :math:`\sqrt 2` apart, and a margin would certify the radius that it does for orthonormal
    rows.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of inputs, of the units of each hidden layer (even, none larger than the one
        before), and of classes.
    seed : int
        Of the first weights.
    dtype : torch.dtype
        Of products. Weights, momenta and steps are in float32, or in this one if it is longer.

    Examples
    --------
    >>> net = AbsoluteNet((6, 4, 4, 3), seed=0, dtype=torch.float64)
    >>> x = torch.rand(5, 6, dtype=torch.float64)
    >>> layers, signs, logits = net.forward(x.T)
    >>> plain = net.network()
    >>> bool((plain.double()(x) - logits.T).abs().max() < 1e-6)
    True
    """

    def __init__(
        self, sizes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        hidden = sizes[1:-1]
        if not hidden or any(n % 2 for n in hidden) or list(sizes) != sorted(sizes, reverse=True):
            raise ValueError(
                "sizes must not increase, with an even number of units in each hidden layer, "
                f"got {tuple(sizes)}"
            )
        self.sizes, self.dtype, self.steps = tuple(sizes), dtype, 0
        long = torch.promote_types(dtype, torch.float32)
        draw = torch.Generator().manual_seed(seed)
        starts = (torch.randn(n, m, generator=draw) for n, m in itertools.pairwise(sizes))
        self.weights = [polar(start.to(long)).T.contiguous() for start in starts]
        self.length = math.sqrt((sizes[-1] - 1) / sizes[-1])
        self.weights[-1] *= self.length
        self.biases = [torch.zeros(m, dtype=long) for m in sizes[1:]]
        self.momenta = [torch.zeros_like(part) for part in (*self.weights, *self.biases)]
        self.low = [weight.to(dtype) for weight in self.weights]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute the logits, and what their gradients need.

        Parameters
        ----------
        x : torch.Tensor
            (inputs, batch): a column for each input.

        Returns
        -------
        tuple
            Inputs of all layers; signs in the hidden ones; logits (classes, batch).
        """
        inputs, signs = [x], []
        for weight, bias in zip(self.low[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(bias.to(self.dtype)[:, None], weight, x)
            signs.append(self._activate(x))
            inputs.append(x)
        return inputs, signs, torch.addmm(self.biases[-1].to(self.dtype)[:, None], self.low[-1], x)

    def _activate(self, x: Tensor) -> Tensor:
        """Take absolute values in place; return the slopes of the units that are changed."""
        half = x[: len(x) // 2]
        signs = half.sgn()
        torch.abs(half, out=half)
        return signs

    def gradients(
        self, inputs: list[Tensor], signs: list[Tensor], outer: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the weights and biases.

        Parameters
        ----------
        inputs, signs : list of torch.Tensor
            From :meth:`forward`.
        outer : torch.Tensor
            Gradient of the loss with respect to the logits, (classes, batch).

        Returns
        -------
        tuple of list of torch.Tensor
            Of weights and of biases, in the dtype of products.
        """
        weights, biases = [], []
        for layer in reversed(range(len(self.low))):
            weights.append(outer @ inputs[layer].T)
            biases.append(outer.sum(1))
            if layer:
                outer = self.low[layer].T @ outer
                outer[: len(signs[layer - 1])] *= signs[layer - 1]
        return weights[::-1], biases[::-1]

    def step(self, weights: list[Tensor], biases: list[Tensor], lr: float, bias_lr: float) -> None:
        r"""Take the step of :class:`~lipbook.lab.descent.StiefelMuon`, roughly.

        Three things differ. msign is :func:`loose_sign`. Instead of the retraction, weights are
        divided by :math:`\sqrt{1 + \eta^2}`, and every fourth step a step of Newton and Schulz
        follows, :math:`W \leftarrow W - \frac12 (W W^\top - I) W`. The last layer's direction is
        scaled to the Frobenius norm of its weights, and its rows to their length.

        Parameters
        ----------
        weights, biases : list of torch.Tensor
            Gradients.
        lr, bias_lr : float
            :math:`\eta` of the weights, and the rate of the biases.
        """
        self.steps += 1
        directions = []
        for momentum, gradient in zip(self.momenta, (*weights, *biases), strict=True):
            long = gradient.to(momentum.dtype)
            momentum.lerp_(long, 1 - MOMENTUM)
            directions.append(momentum.lerp(long, 1 - MOMENTUM))
        layers = len(self.weights)
        for bias, direction in zip(self.biases, directions[layers:], strict=True):
            bias.sub_(direction, alpha=bias_lr)
        for layer, (weight, direction) in enumerate(zip(self.weights, directions, strict=False)):
            if layer == layers - 1:
                self._step_last(weight, direction, lr)
            else:
                self._step_hidden(weight, self.low[layer], direction.to(self.dtype), lr)
            self.low[layer] = weight.to(self.dtype)

    def _step_hidden(self, weight: Tensor, low: Tensor, direction: Tensor, lr: float) -> None:
        inner = direction @ low.T
        tangent = torch.addmm(direction, inner + inner.T, low, alpha=-0.5)
        weight.sub_(loose_sign(tangent), alpha=lr).div_(math.sqrt(1 + lr**2))
        if self.steps % RESTORE == 0:
            low = weight.to(self.dtype)
            excess = low @ low.T
            excess.diagonal().sub_(1)
            weight.sub_(excess @ low, alpha=0.5)

    def _step_last(self, weight: Tensor, direction: Tensor, lr: float) -> None:
        along = (weight * direction).sum(1, keepdim=True) / self.length**2
        tangent = direction - along * weight
        size = torch.linalg.matrix_norm(tangent).clamp(min=torch.finfo(torch.float32).tiny)
        weight.sub_(tangent / size, alpha=lr * self.length * math.sqrt(len(weight)))
        weight.mul_(self.length / weight.norm(dim=1, keepdim=True))

    def network(self) -> nn.Sequential:
        """Make the network with MaxMin, each hidden weight replaced by its polar factor.

        Returns
        -------
        torch.nn.Sequential
            That of :func:`lipbook.lab.networks.dense`, with plain layers in float32, in evaluation
            mode, parameters frozen.
        """
        weights, biases = self._restored()
        for layer in range(len(weights) - 1):
            weights[layer], biases[layer] = _turned(weights[layer]), _turned(biases[layer])
            weights[layer + 1] = _turned(weights[layer + 1].T).T
        return self._filled(networks.dense(self.sizes, linear=nn.Linear), weights, biases)

    def _restored(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights, those of hidden layers orthonormal, and biases, in float64."""
        weights = [polar(weight.double().T).T for weight in self.weights[:-1]]
        return [*weights, self.weights[-1].double()], [bias.double() for bias in self.biases]

    @staticmethod
    def _filled(model: nn.Sequential, weights: list[Tensor], biases: list[Tensor]) -> nn.Sequential:
        """Put weights and biases into a network."""
        linear = [module for module in model if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for module, weight, bias in zip(linear, weights, biases, strict=True):
                module.weight.copy_(weight)
                module.bias.copy_(bias)
        return model.requires_grad_(False).eval()


def _turned(units: Tensor) -> Tensor:
    """Units a of the first half and b of the second become (b - a) / √2, (b + a) / √2 in turn.

    MaxMin of such a pair is the same with |a| for a.
    """
    a, b = units.chunk(2)
    return torch.stack([b - a, b + a], 1).flatten(0, 1) / math.sqrt(2)


def fit(
    images: Tensor,
    labels: Tensor,
    *,
    width: int,
    depth: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 1024,
    precision: str = "float32",
    seed: int = 0,
    make: Callable[[Sequence[int], int, torch.dtype], AbsoluteNet] = AbsoluteNet,
    view: Callable[[Tensor, np.random.Generator], Tensor] = windows,
) -> nn.Sequential:
    r"""Train a dense network with orthonormal weights on digits.

    Rates fall linearly to 0, for biases from 1 on. Of each shuffled epoch, what does not fill a
    batch is left out. The result is determined by the arguments, bit for bit on one machine.

    Parameters
    ----------
    images, labels : torch.Tensor
        Digits to train on, (n, 1, 28, 28) in [0, 1] and (n,) of int64; nothing is held out.
    width, depth : int
        Units of a hidden layer, an even number from 10 to 576; and number of these layers.
    loss : callable
        ``loss(logits, labels)``, given logits in float32.
    epochs : int
        Passes over the digits.
    lr : float
        First rate of the weights, in (0, 0.5].
    batch_size : int
        A multiple of 16, no larger than the number of digits.
    precision : str
        Of products: ``"float32"``, or ``"bfloat16"`` for processors that have instructions for it
        (others are slow with it).
    seed : int
        Of the first weights, the order and the distortions.
    make : callable
        Makes what is trained, from sizes, seed and dtype.
    view : callable
        What a batch of images, (n, 1, 28, 28), becomes: (n, 576), given a generator to draw from.

    Returns
    -------
    torch.nn.Sequential
        Flatten, linear layers and MaxMin, for inputs of shape (1, 28, 28): plain layers in float32,
        in evaluation mode, parameters frozen. **Guaranteed**: all weights but the last have
        orthonormal rows, up to rounding to float32. **Not guaranteed**: a bound; measure it.

    Raises
    ------
    ValueError
        An argument is unusable; the message names it.
    FloatingPointError
        The loss became NaN or infinite.

    Examples
    --------
    >>> from lipbook.lab.data import mnist
    >>> from lipbook.losses import OffsetCrossEntropyLoss
    >>> images, labels = (part[:512] for part in mnist()[:2])
    >>> loss = OffsetCrossEntropyLoss(1.0, 0.2)
    >>> model = fit(images, labels, width=32, depth=2, loss=loss, epochs=20, batch_size=64)
    >>> bool((model(images).argmax(1) == labels).double().mean() > 0.9)
    True
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {(*_PRECISIONS,)}, got {precision!r}")
    if images.shape[1:] != (1, SIDE, SIDE) or len(images) != len(labels):
        raise ValueError(
            f"images: expected shape ({len(labels)}, 1, {SIDE}, {SIDE}) for as many labels, "
            f"got {tuple(images.shape)}"
        )
    if batch_size % SHARED or not 0 < batch_size <= len(images):
        raise ValueError(
            f"batch_size: expected a multiple of {SHARED} up to {len(images)}, got {batch_size}"
        )
    if not 0 < lr <= 0.5:
        raise ValueError(f"lr: expected a number in (0, 0.5], got {lr}")
    for name, count in (("depth", depth), ("epochs", epochs)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    pixels = (SIDE - 2 * BORDER) ** 2
    net = make((pixels, *[width] * depth, CLASSES), seed, _PRECISIONS[precision])
    rng = np.random.default_rng(seed)
    batches = len(images) // batch_size
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(images)))[: batches * batch_size]
        for index, batch in enumerate(order.split(batch_size)):
            x = view(images.index_select(0, batch), rng).to(net.dtype)
            inputs, signs, logits = net.forward(x.T)
            logits = logits.T.float().requires_grad_()
            value = loss(logits, labels[batch])
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"loss is {value.item()} in epoch {epoch + 1}: lr={lr}?")
            (outer,) = torch.autograd.grad(value, logits)
            weights, biases = net.gradients(inputs, signs, outer.T.to(net.dtype))
            left = 1 - (epoch * batches + index) / (epochs * batches)
            net.step(weights, biases, lr * left, left)
    return _on_whole_images(net.network(), width)


def _on_whole_images(model: nn.Sequential, width: int) -> nn.Sequential:
    """Give the first layer zeros for the pixels of the border."""
    state, side = model.state_dict(), SIDE - 2 * BORDER
    narrow = state["1.weight"].view(width, side, side)
    wide = functional.pad(narrow, (BORDER,) * 4).flatten(1)
    model[1] = nn.Linear(SIDE**2, width).requires_grad_(False)
    model.load_state_dict(state | {"1.weight": wide})
    return model
