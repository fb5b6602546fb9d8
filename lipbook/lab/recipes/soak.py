r"""Promises of the library on ten thousand random layers, graphs and classifiers.

Each case is drawn from its number alone, so that one can be computed again by itself
(``lipbook reproduce soak --set first=4711 --set cases=1 --to DIR``, or :func:`case`). What is
measured there and the most that it may be stands in ``LIMITS``: slopes, by dense singular values of
the Jacobian at random points in float64, against the bound; singular values of orthogonal layers
against 1; the bits of a frozen copy; the predictions of attacked inputs within certified radii. A
case that breaks a promise ends the run, and names itself.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook import activations, convolutions, orthogonal, pooling, residual
from lipbook.attacks import pgd
from lipbook.composition import Ball, Box, Residual, Sum, lipschitz_bound
from lipbook.export import freeze
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.counterexamples import candidates, within
from lipbook.robustness import certify

__all__ = ["FAMILIES", "LIMITS", "Drawn", "RandomGraph", "case", "run", "slopes"]

#: Exponents of the norms.
NORMS = (1, 2, math.inf)

#: What is measured, and the most that it may be. Ratios and singular values have their rounding.
LIMITS = {
    **{f"slope / bound, p = {p:g}": 1 + 1e-9 for p in NORMS},
    "|singular value - 1|, float64": 1e-13,
    "|singular value - 1|, float32": 1e-6,
    "entries of a frozen copy with other bits": 0.0,
    "predictions changed within a certified radius": 0.0,
}
#: Cases of a row, which is what an interruption can lose.
BLOCK = 100

Domain = Box | Ball
Random = np.random.Generator


class Drawn(NamedTuple):
    """A random network, and what shall be seen to hold of it.

    Parameters
    ----------
    net : torch.nn.Module
        In float32 and in evaluation mode.
    shape : tuple of int
        Of a sample.
    domain : Box or Ball, optional
        Where it is bounded.
    orthogonal : bool
        Whether all singular values of its Jacobian are 1.
    """

    net: nn.Module
    shape: tuple[int, ...]
    domain: Domain | None = None
    orthogonal: bool = False


# --------------------------------------------------------------------------------- networks


class RandomGraph(nn.Module):
    """A random directed graph of layers, joins and slices on vectors of six entries.

    Parameters
    ----------
    choices : list of tuple of int
        For each node its kind and the two nodes that it reads, modulo how many there are.
    products : bool
        Whether products of nodes are among the kinds: then the graph is Lipschitz on bounded
        domains only.
    """

    def __init__(self, choices: list[tuple[int, int, int]], products: bool) -> None:
        super().__init__()
        self.choices, self.products = choices, products
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def step(self, kind: int, a: Tensor, b: Tensor) -> Tensor:
        """Compute one node from two others."""
        first, second = a.chunk(2, 1)
        steps: list[Callable[[], Tensor]] = [
            lambda: self.layers[0](a),
            lambda: functional.relu(self.layers[1](a)),
            lambda: torch.tanh(a) + b,
            lambda: a - 0.5 * b,
            lambda: torch.maximum(a, b),
            lambda: torch.cat([self.narrow[0](first), second], 1),
            lambda: torch.cat([first, second + self.narrow[1](first).abs()], 1),
            lambda: torch.cat([a[:, 1:4], b[:, 2:5]], 1),
            lambda: functional.gelu(self.layers[2](a)) - a,
            lambda: torch.cat([a[:, :2], b[:, 3:5], a[:, 4:]], 1),
            lambda: 1.5 - a.flip(1).view(-1, 2, 3).transpose(1, 2).flatten(1),
            lambda: functional.softplus(a) + b.mean(1, keepdim=True),
            lambda: a * torch.sigmoid(b) if self.products else a + b,
            lambda: a * b if self.products else b,
        ]
        return steps[kind % len(steps)]()

    def forward(self, x: Tensor) -> Tensor:
        """Compute all nodes, and join the last with one in the middle."""
        values = [x]
        for kind, i, j in self.choices:
            values.append(self.step(kind, values[i % len(values)], values[j % len(values)]))
        return values[-1] + values[len(values) // 2][:, :1]


def chosen(random: Random, *items: Any) -> Any:
    return items[random.integers(len(items))]


def size(random: Random, low: int, high: int) -> int:
    return int(random.integers(low, high + 1))


def domain(random: Random, shape: tuple[int, ...]) -> Domain:
    """Draw a box or a ball of any size between a hundredth and two."""
    center, width = torch.randn(shape, dtype=torch.float64), float(10 ** random.uniform(-2, 0.3))
    if random.random() < 0.5:
        return Box(center - width, center + width)
    return Ball(center, width, chosen(random, *NORMS))


def graph(random: Random, products: bool) -> Drawn:
    choices = random.integers(0, 14, (size(random, 1, 6), 3))
    net = RandomGraph([(int(a), int(b), int(c)) for a, b, c in choices], products)
    return Drawn(net, (6,), domain(random, (6,)) if products else None)


def rescaled(random: Random, net: nn.Module) -> nn.Module:
    """Draw raw parameters of another size: what is promised is promised for all of them."""
    if random.random() < 0.5:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(float(10 ** random.uniform(-1, 1)))
    return net


def dense(random: Random) -> Drawn:
    n, m = size(random, 1, 12), size(random, 1, 12)
    method = chosen(random, "qr", "cholesky_qr", "polar", "cayley", "exp", "householder", "bjorck")
    net = orthogonal.OrthogonalLinear(n, m, method=method)
    return Drawn(net, (n,), orthogonal=True)


def bounded(random: Random) -> Drawn:
    n, m = size(random, 1, 12), size(random, 1, 12)
    kinds = ("SpectralNormLinear", "InfinityNormLinear", "UnitNormLinear")
    net = getattr(orthogonal, chosen(random, *kinds))(n, m)
    return Drawn(rescaled(random, net), (n,))


def image(random: Random, channels: int, dim: int, stride: int) -> tuple[int, ...]:
    """Draw the shape of a small image that strides divide and kernels fit."""
    low, high = {1: (4, 8), 2: (4, 6), 3: (4, 4)}[dim]
    return (channels, *(stride * -(-size(random, low, high) // stride) for _ in range(dim)))


def orthogonal_convolution(random: Random) -> Drawn:
    dim, groups, stride = size(random, 1, 3), size(random, 1, 2), size(random, 1, 2)
    c_in, c_out = groups * size(random, 1, 3), groups * size(random, 2, 3)
    mode = chosen(random, "circular", "circular", "zeros")
    kernel, transposed = size(random, stride, 3), random.random() < 0.3
    name = f"OrthogonalConv{'Transpose' * transposed}{dim}d"
    if transposed and (dim == 3 or kernel % 2 == 0):  # of these the layer takes fewer
        stride, mode = 1, "circular"
    net = getattr(convolutions, name)(c_in, c_out, kernel, stride, groups=groups, padding_mode=mode)
    shape = image(random, c_in, dim, stride)
    return Drawn(net, shape, orthogonal=mode == "circular")


def other_convolution(random: Random) -> Drawn:
    kind = chosen(random, "aol", "rko", "soc", "cayley")
    stride, c_in, c_out = size(random, 1, 2), size(random, 1, 3), size(random, 1, 4)
    if kind == "soc":
        net: nn.Module = convolutions.SkewOrthogonalConv2d(c_in, c_out, 3, stride)
        return Drawn(net, image(random, c_in, 2, stride))
    if kind == "cayley":
        shape = image(random, c_in, 2, stride)
        kernel = size(random, 1, min(shape[1:]) // stride)
        net = convolutions.CayleyConv2d(c_in, c_out, min(kernel, 3), shape[1:], stride)
        return Drawn(net, shape, orthogonal=True)
    dim = size(random, 1, 3)
    mode = chosen(random, "circular", "zeros")
    net = getattr(convolutions, f"NonexpansiveConv{dim}d")(
        c_in, c_out, size(random, stride, 3), stride, padding_mode=mode, method=kind
    )
    return Drawn(rescaled(random, net), image(random, c_in, dim, stride))


def potential_step(random: Random) -> Drawn:
    activation = chosen(random, "relu", "tanh", "softplus")
    n, inner, kind = size(random, 1, 6), size(random, 1, 8), chosen(random, "SLL", "CPL")
    if random.random() < 0.5:
        net = getattr(residual, f"{kind}Linear")(n, inner, activation)
        return Drawn(rescaled(random, net), (n,))
    n, mode = min(n, 3), chosen(random, "circular", "zeros")
    net = getattr(residual, f"{kind}Conv2d")(n, min(inner, 4), 3, mode, activation)
    return Drawn(rescaled(random, net), image(random, n, 2, 1))


def norm_keeping(random: Random) -> Drawn:
    """Draw an activation or a resampling of the library, with orthogonal Jacobians."""
    shape = (2 * size(random, 1, 2), 4, 2 * size(random, 1, 3))
    net = chosen(
        random,
        activations.MaxMin(),
        activations.MaxMin(pairing="halves"),
        activations.GroupSort(2),
        activations.FullSort(),
        activations.AbsoluteValue(),
        activations.Householder(shape[0]),
        pooling.InvertibleDownsampling(2),
        pooling.InvertibleUpsampling((1, 2)),
        pooling.NormPooling(2),
        pooling.AveragePooling((2, 2)),
        pooling.Upsampling(2),
    )
    return Drawn(net, shape, orthogonal=True)


def convolution(random: Random) -> Drawn:
    """Draw one of torch's convolutions, transposed or not."""
    dim, groups, stride = size(random, 1, 3), size(random, 1, 2), size(random, 1, 3)
    c_in, c_out = (groups * size(random, 1, 2) for _ in range(2))
    kernel, padding = size(random, 1, 3), size(random, 0, 2)
    shape = image(random, c_in, dim, 1)
    if random.random() < 0.3:
        net = getattr(nn, f"ConvTranspose{dim}d")(
            c_in, c_out, kernel, stride, min(padding, kernel - 1),
            size(random, 0, stride - 1), groups,
        )  # fmt: skip
        return Drawn(net, shape)
    mode = chosen(random, "zeros", "circular", "reflect", "replicate")
    if dim == 3 and mode == "reflect":
        mode = "zeros"
    dilation = size(random, 1, 2) if kernel < 3 else 1
    net = getattr(nn, f"Conv{dim}d")(
        c_in, c_out, kernel, stride, padding, dilation, groups, padding_mode=mode
    )
    return Drawn(net, shape)


def elementwise(random: Random) -> Drawn:
    """Draw an activation of torch; Hardsigmoid has its slope 1/6 in float32 in all dtypes."""
    names = "ReLU ReLU6 LeakyReLU ELU CELU SELU GELU SiLU Mish Tanh Sigmoid Softplus Softsign"
    names += " Hardtanh Hardswish LogSigmoid Softshrink Tanhshrink PReLU"
    net = getattr(nn, chosen(random, *names.split()))()
    return Drawn(net, (size(random, 1, 5),))


def normalisation(random: Random) -> Drawn:
    shape, eps = (4, size(random, 2, 4), size(random, 2, 4)), float(10 ** random.uniform(-3, 0))
    net = chosen(
        random,
        nn.LayerNorm(shape, eps),
        nn.GroupNorm(2, 4, eps),
        nn.InstanceNorm2d(4, eps, affine=True),
        nn.BatchNorm2d(4, eps),
        nn.RMSNorm(shape[-1:], eps),
        nn.LocalResponseNorm(3),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
        for name, buffer in net.named_buffers():
            if name in ("running_mean", "running_var"):
                buffer.uniform_(0.1, 2)
    where = domain(random, shape) if isinstance(net, nn.LocalResponseNorm) else None
    return Drawn(net, shape, where)


def torch_resampling(random: Random) -> Drawn:
    shape = (4, size(random, 4, 6), size(random, 4, 6))
    k, s, pad = size(random, 2, 3), size(random, 1, 3), size(random, 0, 1)
    net = chosen(
        random,
        nn.AvgPool2d(k, s, pad, count_include_pad=bool(size(random, 0, 1))),
        nn.MaxPool2d(k, s, pad),
        nn.AdaptiveAvgPool2d((s, k)),
        nn.AdaptiveMaxPool2d((s, k)),
        nn.Upsample(scale_factor=s + 1, mode="nearest"),
        nn.Upsample(size=(k + s, s + 3), mode="bilinear", align_corners=bool(pad)),
        nn.PixelShuffle(2),
        nn.ZeroPad2d((pad, 1, 0, k)),
        nn.ReflectionPad2d((pad, 1, 0, k)),
        nn.ReplicationPad2d((pad, 1, 0, k)),
        nn.CircularPad2d((pad, 1, 0, k)),
        nn.Unfold(k, padding=pad, stride=s),
        nn.Softmax(1),
        nn.LogSoftmax(1),
    )
    return Drawn(net, shape)


class States(nn.Module):
    """All states of a recurrent layer, read from a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def sequence(random: Random) -> Drawn:
    """Draw a recurrent layer, or attention on a domain."""
    n, shape = size(random, 1, 3), (size(random, 1, 3), 4)
    two = bool(size(random, 0, 1))
    kind = chosen(random, nn.LSTM, nn.GRU, nn.RNN, None)
    if kind is not None:
        net: nn.Module = States(kind(4, n, 1 + two, batch_first=True, bidirectional=two))
        return Drawn(net, shape, domain(random, shape))
    net = nn.TransformerEncoderLayer(
        4, 1 + two, 6, batch_first=True, norm_first=two, layer_norm_eps=0.1
    )
    return Drawn(net, shape, domain(random, shape))


def dense_layer(random: Random, n: int, m: int) -> nn.Module:
    kinds = ("OrthogonalLinear", "SpectralNormLinear", "InfinityNormLinear", "UnitNormLinear")
    kind = chosen(random, nn.Linear, *(getattr(orthogonal, name) for name in kinds))
    return rescaled(random, kind(n, m))


def perceptron(random: Random, classes: int | None = None) -> Drawn:
    """Draw layers of the library and of torch one after the other, with skips."""
    shape, n = (size(random, 1, 6),), 2 * size(random, 1, 4)
    layers = [dense_layer(random, *shape, n)]
    for _ in range(size(random, 1, 3)):
        activation = chosen(random, activations.MaxMin, nn.ReLU, activations.FullSort, nn.Tanh)
        block = nn.Sequential(activation(), dense_layer(random, n, n))
        layers.append(chosen(random, block, Residual(block), Sum(block, dense_layer(random, n, n))))
    return Drawn(
        nn.Sequential(*layers, dense_layer(random, n, classes or size(random, 1, 4))), shape
    )


def convolutional(random: Random, classes: int | None = None) -> Drawn:
    c, side = 2 * size(random, 1, 2), 2 * size(random, 2, 3)
    kinds = (convolutions.OrthogonalConv2d, convolutions.NonexpansiveConv2d)
    inner = nn.Sequential(activations.MaxMin(), nn.Conv2d(c, c, 3, padding=1))
    layers = [
        chosen(random, *kinds)(1, c, 3),
        chosen(random, Residual(inner), inner, activations.MaxMin(), residual.SLLConv2d(c, 2)),
        chosen(random, *kinds)(c, c, 2, stride=2),
        chosen(random, nn.ReLU(), nn.BatchNorm2d(c), pooling.NormPooling(1)),
        nn.Flatten(),
        dense_layer(random, c * (side // 2) ** 2, classes or size(random, 1, 4)),
    ]
    return Drawn(nn.Sequential(*layers), (1, side, side))


def classifier(random: Random) -> Drawn:
    kind = perceptron if random.random() < 0.7 else convolutional
    net, shape, *_ = kind(random, size(random, 2, 4))
    return Drawn(net, shape, Box(0, 1) if random.random() < 0.3 else None)


#: Families of networks, each with its share of the cases.
FAMILIES: dict[str, tuple[Callable[[Random], Drawn], int]] = {
    "graphs": (functools.partial(graph, products=False), 20),
    "graphs with products, on domains": (functools.partial(graph, products=True), 15),
    "orthogonal dense layers": (dense, 8),
    "bounded dense layers": (bounded, 3),
    "orthogonal convolutions": (orthogonal_convolution, 8),
    "AOL, RKO, skew and Cayley convolutions": (other_convolution, 4),
    "SLL and CPL": (potential_step, 3),
    "activations and resampling that keep norms": (norm_keeping, 3),
    "torch's convolutions": (convolution, 5),
    "torch's activations": (elementwise, 3),
    "torch's normalisation": (normalisation, 3),
    "torch's pooling, padding and softmax": (torch_resampling, 4),
    "recurrence and attention, on domains": (sequence, 3),
    "perceptrons": (perceptron, 5),
    "convolutional networks": (convolutional, 3),
    "certified classifiers": (classifier, 10),
}


# ------------------------------------------------------------------------------ measurements


def slopes(net: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    r"""Compute dense Jacobians, one backward pass for all rows at all points.

    Parameters
    ----------
    net : callable
        Treats samples apart.
    points : torch.Tensor
        (points, \*shape).

    Returns
    -------
    torch.Tensor
        (points, outputs, inputs).
    """
    with torch.no_grad():
        rows = net(points[:1]).numel()
    copies = points.repeat_interleave(rows, 0).requires_grad_()
    with torch.enable_grad():
        values = net(copies).reshape(len(points), rows, rows)
        (found,) = torch.autograd.grad(values.diagonal(dim1=1, dim2=2).sum(), copies)
    return found.reshape(len(points), rows, -1)


def points_of(drawn: Drawn, random: Random, count: int = 4) -> Tensor:
    """Draw points of the domain in float64, or of all of space at three scales."""
    noise = torch.randn(count, *drawn.shape, dtype=torch.float64)
    if drawn.domain is None:
        scales = torch.tensor(random.choice([0.1, 1.0, 5.0], count))
        return noise * scales.view(-1, *[1] * len(drawn.shape))
    if isinstance(drawn.domain, Box):
        low, high = (
            torch.as_tensor(side).double() for side in (drawn.domain.low, drawn.domain.high)
        )
        return low + (high - low) * torch.rand_like(noise)
    size_ = torch.linalg.vector_norm(noise.flatten(1), drawn.domain.p, dim=1)
    share = torch.rand(count, dtype=torch.float64) ** 0.25 / size_ * drawn.domain.radius
    return drawn.domain.center + noise * share.view(-1, *[1] * len(drawn.shape))


def deviation(jacobians: Tensor) -> float:
    return (torch.linalg.svdvals(jacobians.double()) - 1).abs().max().item()


def attacked(net: nn.Module, frozen: nn.Module, drawn: Drawn, random: Random) -> dict[str, float]:
    """Certify two inputs, and attack them within their radii and within twice those."""
    p = chosen(random, *NORMS)
    method = chosen(random, "product", "local")
    x = torch.rand(2, *drawn.shape) if drawn.domain else 2 * torch.randn(2, *drawn.shape)
    bounds = (0.0, 1.0) if drawn.domain else None
    with torch.no_grad():
        labels = net(x).argmax(1)
    found = certify(net, [(x, labels)], drawn.shape, p, domain=drawn.domain, method=method)
    radius = found.radius.clamp(max=1e30)
    seed = size(random, 0, 2**31)
    tried = pgd(frozen, x, labels, radius, p, steps=10, seed=seed, bounds=bounds)
    moved = [(k, tried[k : k + 1]) for k in range(len(x))]
    if drawn.domain is None:
        moved += [
            (k, candidates(frozen, x[k : k + 1], r, p, seed)) for k, r in enumerate(radius.tolist())
        ]
    beyond = pgd(frozen, x, labels, 2 * radius, p, steps=10, seed=seed, bounds=bounds)
    outcome = Counter[str](inputs=len(x), attempts=0, positive=int((radius > 0).sum()))
    with torch.no_grad():
        for k, inputs in moved:
            outcome["attempts"] += len(inputs)
            changed = inputs[net(inputs).argmax(1) != labels[k]]
            if radius[k] > 0:
                held = [within(x[k], other, radius[k].item(), p) for other in changed]
                outcome["predictions changed within a certified radius"] += sum(held)
        changed = (net(beyond).argmax(1) != labels) & (radius > 0)
    outcome["changed within twice the radius"] = int(changed.sum())
    return dict(outcome)


def case(number: int, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Draw a network by its number, and measure it.

    Parameters
    ----------
    number : int
        Of the case.
    seed : int
        Of all cases.

    Returns
    -------
    family : str
        One of ``FAMILIES``.
    measured : dict of str to float
        What of ``LIMITS`` applies to it, and for classifiers how many ``inputs`` were certified,
        their radii ``positive``, the ``attempts`` within those, and how many predictions an attack
        ``changed within twice the radius``.
    """
    random = np.random.default_rng([seed, number])
    shares = np.array([share for _, share in FAMILIES.values()])
    family = str(random.choice(list(FAMILIES), p=shares / shares.sum()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        drawn = FAMILIES[family][0](random)
        drawn.net.eval()
        return family, _measured(family, drawn, random)


def _measured(family: str, drawn: Drawn, random: Random) -> dict[str, float]:
    net, frozen = drawn.net, freeze(drawn.net)
    points = points_of(drawn, random)
    x = points.float()
    with torch.no_grad():
        differ = net(x).view(torch.int32) != frozen(x).view(torch.int32)
    measured: dict[str, float] = {"entries of a frozen copy with other bits": int(differ.sum())}
    if family == "certified classifiers":
        measured |= attacked(net, frozen, drawn, random)
    if drawn.orthogonal:
        measured["|singular value - 1|, float32"] = deviation(slopes(net, x[:1]))
    net = net.double()
    jacobians = slopes(net, points)
    if drawn.orthogonal:
        measured["|singular value - 1|, float64"] = deviation(jacobians)
    for p in NORMS:
        slope = torch.linalg.matrix_norm(jacobians, p).max().item()
        bound = lipschitz_bound(net, drawn.shape, p, domain=drawn.domain).value
        # A slope of 0 is below any bound; NaN is below none.
        measured[f"slope / bound, p = {p:g}"] = (
            0.0 if slope == 0 else slope / bound if bound else math.inf
        )
    return measured


def broken(measured: dict[str, float]) -> list[str]:
    """List the promises that are not kept, with what was measured."""
    return [
        f"{name}: {measured[name]:.17g}, at most {limit:.17g} is promised"
        for name, limit in LIMITS.items()
        if name in measured and not measured[name] <= limit
    ]


def _block(numbers: range, seed: int) -> Outcome:
    families, worst = Counter[str](), dict.fromkeys(LIMITS, 0.0)
    checks, totals = Counter[str](), Counter[str]()
    wrong = []
    for number in numbers:
        family, measured = case(number, seed)
        families[family] += 1
        wrong += [f"case {number} ({family}): {text}" for text in broken(measured)]
        for name, value in measured.items():
            if name in LIMITS:
                checks[name] += 1
                worst[name] = max(worst[name], value)
            else:
                totals[name] += int(value)
    if wrong:
        raise ValueError("promises that are not kept:\n" + "\n".join(wrong))
    return {"families": families, "checks": checks, "worst": worst, "attacks": totals}, {}


def run(
    *,
    cases: int = 10_000,
    first: int = 0,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Measure all cases.

    Parameters
    ----------
    cases : int
        How many.
    first : int
        Number of the first.
    seed : int
        Of all cases.
    rows : Rows, optional
        Keeps finished blocks of 100 cases.

    Returns
    -------
    tuple of dict
        Results: how many ``cases``, and how many of each of the ``families``; for each of
        ``LIMITS`` how many ``checks`` there were and the ``worst`` that was measured; of
        ``attacks`` the sums of what :func:`case` counts. No tensors.

    Raises
    ------
    ValueError
        If a promise is not kept, naming the cases of the block and what was measured.
    """
    rows = rows or Rows()
    blocks = [
        range(start, min(start + BLOCK, first + cases))
        for start in range(first, first + cases, BLOCK)
    ]
    families, checks, attacks = Counter[str](), Counter[str](), Counter[str]()
    worst = dict.fromkeys(LIMITS, 0.0)
    for block in rows.bar(blocks, "hundreds of cases"):
        one = functools.partial(_block, block, seed)
        found, _ = rows.compute(f"cases {block.start} to {block.stop}", one)
        families.update(found["families"])
        checks.update(found["checks"])
        attacks.update(found["attacks"])
        worst = {name: max(worst[name], found["worst"][name]) for name in LIMITS}
    return {
        "cases": cases,
        "families": {name: families[name] for name in FAMILIES},
        "checks": {name: checks[name] for name in LIMITS},
        "worst": worst,
        "attacks": dict(attacks),
    }, {}
