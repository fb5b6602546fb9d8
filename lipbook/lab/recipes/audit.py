r"""Whose bound is it? Constrained layers of the field, and the norms that they really have.

Each constraint stands three times between sorting layers in the network of chapter 6: 16 channels
of 6 × 6 pixels, 3 × 3 taps, an orthogonal linear layer at the end. At the start and after 100 steps
of Adam, whose rate falls to 0, the dense matrix of each layer (its Jacobian, 576 × 576) gives the
true norm, by a singular value decomposition in float64. Every digit is then certified twice: with
the constant 1, which is what a reader of the constraint may expect, and with the product of the
true norms. An attack within the first radius counts the certificates that are false.

Rules of published code are written again here, at its defaults; rows of ``lipbook``, ``torch``,
``orthogonium`` and ``torchlip`` are the layers of these packages. Rows of the last two need
``pip install 'lipbook[bench]'``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lipbook.activations import MaxMin
from lipbook.attacks import pgd
from lipbook.convolutions import (
    CayleyConv2d,
    NonexpansiveConv2d,
    OrthogonalConv2d,
    SkewOrthogonalConv2d,
    block_convolution,
)
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.image_critics import OSSNConv2d
from lipbook.lab.recipes.mnist_small import clipped_and_masked
from lipbook.lab.training import train
from lipbook.orthogonal import OrthogonalLinear, polar
from lipbook.pooling import InvertibleDownsampling
from lipbook.residual import CPLConv2d, SLLConv2d
from lipbook.robustness import certify

__all__ = ["CONSTRAINTS", "Constraint", "layer_matrix", "network", "norms", "row", "run"]

CHANNELS, SIZE = 16, 6  # of the images between the layers
LAYERS = 3
#: Packages of the rows that are not ours and not torch's.
PEERS = {"orthogonium": "orthogonium", "torchlip": "deel-torchlip"}


# ------------------------------------------------------------------------ rules of published code


def _power_iteration(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    u: Tensor,
    v: Tensor,
    steps: int,
) -> Tensor:
    """Estimate a norm from below, and keep where the steps ended in the buffers u and v."""
    with torch.no_grad():
        for _ in range(steps):
            v.copy_(functional.normalize(adjoint(u).flatten(), dim=0).view_as(v))
            u.copy_(functional.normalize(apply(v).flatten(), dim=0).view_as(u))
    return (u * apply(v)).sum()


class _SVCM(nn.Conv2d):
    """Circular convolution whose kernel is clipped and masked every 100 steps, and at the end."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, channels, 3, padding=1, padding_mode="circular")
        self.size, self.steps = size, 0

    def stepped(self) -> None:
        self.steps += 1
        if self.steps % 100 == 0:
            self.settled()

    def settled(self) -> None:
        self.weight.data = clipped_and_masked(self.weight.detach(), self.size, stride=1)


class _BCOP(nn.Module):
    """BCOP as in 2019: matrices by 20 steps of Björck's iteration, scaled by an estimate."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(5, channels, channels))
        for matrix in self.matrices.data:
            nn.init.orthogonal_(matrix, 1 / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def kernel(self) -> Tensor:
        orthogonal = []
        for free in self.matrices:
            u, v = torch.randn(2, len(free))
            fixed = free.detach()
            near = free / _power_iteration(fixed.mv, fixed.t().mv, u, v, steps=10)
            for _ in range(20):
                near = 1.5 * near - 0.5 * near @ near.t() @ near
            orthogonal.append(near)
        kernel, identity = orthogonal[0][..., None, None], torch.eye(len(u))
        for i, matrix in enumerate(orthogonal[1:]):
            half = matrix[:, : len(u) // 2]
            taps = torch.stack([half @ half.t(), identity - half @ half.t()], -1)
            kernel = block_convolution(kernel, taps.unsqueeze(2 + i % 2))
        return kernel

    def forward(self, input: Tensor) -> Tensor:
        padded = functional.pad(input, (1, 1, 1, 1), mode="circular")
        return functional.conv2d(padded, self.kernel(), self.bias)


class _SOC(nn.Module):
    """SOC as in 2021: four estimates of a bound, their least times 0.7, then a truncated series."""

    def __init__(self, channels: int, size: int, terms: tuple[int, int] = (5, 12)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.terms, self.steps = terms, 0
        for i, matrix in enumerate(self._unfolded(self.weight.detach())):
            for name, length in zip("uv", matrix.shape, strict=True):
                vector = functional.normalize(torch.randn(length), dim=0)
                self.register_buffer(f"{name}{i}", vector)

    @staticmethod
    def _unfolded(kernel: Tensor) -> list[Tensor]:
        m, n, height, width = kernel.shape
        return [
            kernel.permute(0, 2, 1, 3).reshape(m * height, n * width),
            kernel.permute(0, 3, 1, 2).reshape(m * width, n * height),
            kernel.reshape(m, n * height * width),
            kernel.permute(0, 2, 3, 1).reshape(m * height * width, n),
        ]

    def skew(self) -> Tensor:
        kernel = (self.weight - self.weight.transpose(0, 1).flip(2, 3)) / 2
        steps = 0
        if self.training:
            steps = 1 if self.steps % 200 else 50
            self.steps += 1
        estimates = []
        for i, matrix in enumerate(self._unfolded(kernel)):
            u, v = getattr(self, f"u{i}"), getattr(self, f"v{i}")
            estimates.append(_power_iteration(matrix.mv, matrix.t().mv, u, v, steps))
        return 0.7 * kernel / torch.stack(estimates).min()

    def forward(self, input: Tensor) -> Tensor:
        kernel, term = self.skew(), input
        output = input
        for i in range(1, self.terms[not self.training] + 1):
            term = functional.conv2d(term, kernel, padding=1) / i
            output = output + term
        return output + self.bias[:, None, None]


class _CPL(nn.Module):
    """CPL as in 2022: the norm by a power iteration of 1 step in training, of 100 at the end."""

    u: Tensor
    v: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(channels))
        for name in "uv":
            vector = torch.randn(1, channels, size, size)
            self.register_buffer(name, vector / vector.norm())

    def _norm(self, steps: int) -> Tensor:
        return _power_iteration(
            lambda x: functional.conv2d(x, self.weight, padding=1),
            lambda x: functional.conv_transpose2d(x, self.weight, padding=1),
            *(self.u, self.v, steps),
        )

    def settled(self) -> None:
        self._norm(100)

    def forward(self, input: Tensor) -> Tensor:
        hidden = functional.conv2d(input, self.weight, self.bias, padding=1).relu()
        back = functional.conv_transpose2d(hidden, self.weight, padding=1)
        return input - 2 / (self._norm(int(self.training)) ** 2 + 1e-4) * back


class _BRO(nn.Module):
    """BRO as in 2025: I - 2 V (V* V + shift)^(-1) V* at each frequency of the padded image."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels - 1, 3, 3))
        self.weight.data[range(channels - 1), range(channels - 1), 1, 1] = 1
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        padded = functional.pad(input, (1, 1, 1, 1))
        size = padded.shape[-2:]
        response = torch.fft.rfft2(self.weight, size).permute(2, 3, 0, 1)
        gram = response.mH @ response
        shift = 1e-5 * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
        gram = gram + shift[..., None, None] * torch.eye(gram.shape[-1])
        x = torch.fft.rfft2(padded).permute(2, 3, 1, 0)
        x = x - 2 * response @ torch.linalg.solve(gram, response.mH @ x)
        y = torch.fft.irfft2(x.permute(3, 2, 0, 1), size)[..., 1:-1, 1:-1]
        return y + self.bias[:, None, None]


class _Cholesky(nn.Module):
    """A matrix at each pixel, W = L^(-1) X with L Lᵀ = X Xᵀ + shift, as in 2023."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels) / channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        identity = torch.eye(len(self.weight))
        free = identity + self.weight
        gram = free @ free.t()
        gram = gram + 1e-3 * gram.diagonal().mean().detach() * identity
        factor = torch.linalg.cholesky(gram)
        matrix = torch.linalg.solve_triangular(factor, free, upper=False)
        return functional.conv2d(input, matrix[..., None, None], self.bias)


class _Steps(nn.Module):
    """Orthogonal matrices that move by truncated exponentials, M Rᵀ (shift of pixels) R.

    Adam's step is taken among skew-symmetric matrices A, and each matrix Q becomes Q T(A) with
    T(A) = I + A + A²/2 + ... up to an order. Without an order it is 2, 3 or 4 as the step is
    longer, and the end of an epoch takes matrices back to the nearest orthogonal ones, as in 2026.
    """

    matrices: Tensor

    def __init__(self, channels: int, size: int, order: int | None = None) -> None:
        super().__init__()
        start = torch.empty(2, channels, channels)
        for matrix in start:
            nn.init.orthogonal_(matrix)
        self.register_buffer("matrices", start)
        self.free = nn.Parameter(torch.zeros(2, channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.order = order

    @torch.no_grad()
    def stepped(self) -> None:
        skew = (self.free - self.free.mT).double()
        length = torch.linalg.matrix_norm(skew).max().item()
        order = self.order or (2 if length < 0.05 else 3 if length < 0.25 else 4)
        term = self.matrices.double()
        moved = term
        for i in range(1, order + 1):
            term = term @ skew / i
            moved = moved + term
        self.matrices.copy_(moved)
        self.free.zero_()

    def settled(self) -> None:
        self.stepped()
        if self.order is None:
            self.matrices.copy_(polar(self.matrices))

    def forward(self, input: Tensor) -> Tensor:
        skew = self.free - self.free.mT  # zero, but for its gradient
        around, mixing = self.matrices + self.matrices @ skew
        x = functional.conv2d(input, around[..., None, None])
        groups = list(x.split(len(self.bias) // 4, 1))
        for i, (shift, axis) in enumerate(((1, 2), (-1, 2), (1, 3), (-1, 3))):
            groups[i] = groups[i].roll(shift, axis)
        matrix = mixing @ around.t()
        return functional.conv2d(torch.cat(groups, 1), matrix[..., None, None], self.bias)


# ------------------------------------------------------------------------------ the constraints


class Constraint(NamedTuple):
    r"""A way to bound a layer, and what is said of it.

    Parameters
    ----------
    make : callable
        Makes the layer from its number of channels and the size of its image.
    code : str
        Whose program runs: a package, or ``"rule"`` for the rule of published code, written again.
    source : str
        Key of the paper in ``book/references.bib``; none for the documentation of a package.
    claim : str
        What the paper, its code or the documentation says about the norm of a convolution, at the
        defaults.
    """

    make: Callable[[int, int], nn.Module]
    code: str
    source: str
    claim: str


def _circular(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular")


def _ours(layer: Callable[..., nn.Module], **options: Any) -> Callable[[int, int], nn.Module]:
    return lambda channels, size: layer(channels, channels, 3, **options)


def _orthogonium(name: str) -> Callable[[int, int], nn.Module]:
    def make(channels: int, size: int) -> nn.Module:
        from orthogonium import layers  # noqa: PLC0415 - rows of peers only
        from orthogonium.layers.conv.adaptiveSOC import (  # noqa: PLC0415
            AdaptiveSOCConv2d,
        )
        from orthogonium.layers.conv.AOL.aol import AOLConv2D  # noqa: PLC0415
        from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock  # noqa: PLC0415

        if name == "SLL":
            return SDPBasedLipschitzResBlock(channels, 1)
        kind = {"AOC": layers.AdaptiveOrthoConv2d, "SOC": AdaptiveSOCConv2d, "AOL": AOLConv2D}
        # SOC has a kernel of 7 taps, for which its documentation asks to adjust the padding.
        padding = {"AOC": "same", "SOC": 3, "AOL": 1}[name]
        options: dict[str, Any] = {"padding": padding, "padding_mode": "circular"}
        return kind[name](channels, channels, 3, **options)

    return make


def _torchlip(channels: int, size: int) -> nn.Module:
    from deel import torchlip  # noqa: PLC0415 - the row of a peer only

    return torchlip.SpectralConv2d(channels, channels, 3, padding=1, padding_mode="circular")


def _steps(order: int) -> Callable[[int, int], nn.Module]:
    return functools.partial(_Steps, order=order)


#: Each constraint under the name of its row.
CONSTRAINTS: dict[str, Constraint] = {
    "OSSN": Constraint(
        lambda c, size: OSSNConv2d(c, c, size, kernel_size=3, stride=1),
        "rule", "farnia2019", "at most 1, estimated",
    ),
    "SVCM": Constraint(_SVCM, "rule", "sedghi2019", "at most 1, in the limit"),
    "BCOP of 2019": Constraint(_BCOP, "rule", "li2019preventing", "1"),
    "SOC of 2021": Constraint(_SOC, "rule", "singla2021soc", "1, up to a rest"),
    "SOC of 2021, as it trains": Constraint(
        functools.partial(_SOC, terms=(5, 5)), "rule", "singla2021soc", "1, up to a rest"
    ),
    "CPL of 2022": Constraint(_CPL, "rule", "meunier2022cpl", "at most 1, estimated"),
    "BRO of 2025": Constraint(_BRO, "rule", "lai2025bro", "1"),
    "Cholesky, shifted": Constraint(_Cholesky, "rule", "hu2024recipe", "1"),
    "exponential, order 2": Constraint(_steps(2), "rule", "", "1, up to a rest"),
    "exponential, order 3": Constraint(_steps(3), "rule", "", "1, up to a rest"),
    "exponential, order 4": Constraint(_steps(4), "rule", "", "1, up to a rest"),
    "steps of LipNeXt, 2026": Constraint(_Steps, "rule", "hu2026lipnext", "1"),
    "spectral_norm": Constraint(
        lambda c, size: parametrizations.spectral_norm(_circular(c)), "torch", "", "nothing"
    ),
    "orthogonal": Constraint(
        lambda c, size: parametrizations.orthogonal(_circular(c)), "torch", "", "nothing"
    ),
    "orthogonium AOC": Constraint(_orthogonium("AOC"), "orthogonium", "boissin2025aoc", "1"),
    "orthogonium SOC": Constraint(
        _orthogonium("SOC"), "orthogonium", "boissin2025aoc", "at most 1.08"
    ),
    "orthogonium AOL": Constraint(_orthogonium("AOL"), "orthogonium", "prach2022aol", "at most 1"),
    "orthogonium SLL": Constraint(_orthogonium("SLL"), "orthogonium", "araujo2023sll", "at most 1"),
    "torchlip SpectralConv2d": Constraint(_torchlip, "torchlip", "serrurier2021", "at most 1"),
    "BCOP": Constraint(_ours(OrthogonalConv2d), "lipbook", "li2019preventing", "1"),
    "SOC": Constraint(_ours(SkewOrthogonalConv2d), "lipbook", "singla2021soc", "at most 1"),
    "Cayley": Constraint(
        lambda c, size: CayleyConv2d(c, c, 3, image_size=size), "lipbook", "trockman2021", "1"
    ),
    "AOL": Constraint(_ours(NonexpansiveConv2d), "lipbook", "prach2022aol", "at most 1"),
    "RKO": Constraint(
        _ours(NonexpansiveConv2d, method="rko"), "lipbook", "li2019preventing", "at most 1"
    ),
    "SLL": Constraint(lambda c, size: SLLConv2d(c), "lipbook", "araujo2023sll", "at most 1"),
    "CPL": Constraint(lambda c, size: CPLConv2d(c), "lipbook", "meunier2022cpl", "at most 1"),
}  # fmt: skip


# ------------------------------------------------------------------------------ the measurements


def network(name: str) -> nn.Sequential:
    r"""Build the network of one constraint.

    Parameters
    ----------
    name : str
        Key of ``CONSTRAINTS``.

    Returns
    -------
    torch.nn.Sequential
        From digits of 24 × 24 pixels to 10 outputs. Each parameter is moved by about 0.001, since
        an orthogonal kernel is a kink of AOL, where rounding would choose the first gradient.

    Examples
    --------
    >>> network("BCOP")(torch.rand(2, 1, 24, 24)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = [InvertibleDownsampling(4)]
    for _ in range(LAYERS):
        layers += [CONSTRAINTS[name].make(CHANNELS, SIZE), MaxMin()]
    layers += [nn.Flatten(), OrthogonalLinear(CHANNELS * SIZE**2, 10)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


class _Adam(torch.optim.Adam):
    """Adam that tells the layers of a model of each step."""

    def __init__(self, params: Any, lr: float, model: nn.Module) -> None:
        super().__init__([p for p in params if p.requires_grad], lr=lr)
        self.model = model

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        _tell(self.model, "stepped")
        return loss


def _tell(model: nn.Module, event: str) -> None:
    """Let layers do what their code does after a step, or before the first use."""
    for layer in model.modules():
        if hasattr(layer, event):
            getattr(layer, event)()


def layer_matrix(layer: nn.Module, point: Tensor) -> Tensor:
    r"""Compute the dense matrix of a layer at a point: its Jacobian.

    One backward pass from as many copies of the point as there are outputs, each with another unit
    vector. The entries of a convolution with a kernel come out as they are, without a sum.

    Parameters
    ----------
    layer : torch.nn.Module
        In evaluation mode.
    point : torch.Tensor
        (1, channels, height, width).

    Returns
    -------
    torch.Tensor
        (outputs, inputs), float64.

    Examples
    --------
    >>> layer_matrix(nn.MaxPool2d(2), torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]]))
    tensor([[0., 0., 1., 0.]], dtype=torch.float64)
    """
    count = layer(point).numel()
    copies = point.detach().repeat(count, 1, 1, 1).requires_grad_()
    outputs = layer(copies)
    units = torch.eye(count, dtype=outputs.dtype).view_as(outputs)
    (gradient,) = torch.autograd.grad(outputs, copies, units)
    return gradient.flatten(1).double()


def norms(model: nn.Sequential, images: Tensor) -> list[list[float]]:
    r"""Find the least and the largest singular value of each constrained layer.

    Parameters
    ----------
    model : torch.nn.Sequential
        Of :func:`network`, in evaluation mode.
    images : torch.Tensor
        Digits at which residual layers, which are not linear, are linearised. For the others one
        is enough.

    Returns
    -------
    list
        Least and largest over the images, for each layer.
    """
    found, hidden, layers = [], images, list(model)
    for mixing, layer in zip(layers[0:-3:2], layers[1:-2:2], strict=True):
        with torch.no_grad():
            hidden = mixing(hidden)
        spectra = [torch.linalg.svdvals(layer_matrix(layer, point[None])) for point in hidden]
        found.append([min(s[-1].item() for s in spectra), max(s[0].item() for s in spectra)])
        with torch.no_grad():
            hidden = layer(hidden)
    return found


def _middle(images: Tensor) -> Tensor:
    return images[:, :, 2:26, 2:26]


def _hinge(outputs: Tensor, labels: Tensor) -> Tensor:
    return 10 * functional.multi_margin_loss(outputs, labels, margin=math.sqrt(2))


def _broken(model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor, steps: int) -> int:
    """Count the certificates of right predictions that an attack within the radius contradicts."""
    held = radii > 0
    moved = pgd(model, images[held], labels[held], radii[held], steps=steps)
    with torch.no_grad():
        return int((model(moved).argmax(1) != labels[held]).sum())


def row(
    name: str,
    *,
    seed: int = 0,
    steps: int = 100,
    lr: float = 0.01,
    certified: int = 150,
    attack: int = 25,
) -> Outcome:
    r"""Train and measure the network of one constraint, on the digits that ship.

    Parameters
    ----------
    name : str
        Key of ``CONSTRAINTS``.
    seed : int
        Of weights and batches.
    steps : int
        With 50 digits each, all different.
    lr : float
        First rate of Adam, which falls to 0 linearly.
    certified : int
        Test digits that are certified and attacked.
    attack : int
        Steps of the attack.

    Returns
    -------
    tuple of dict
        Results: ``name``; ``seed``; ``start`` and ``end``, the least and largest singular value
        of each layer (see :func:`norms`); ``constant``, the product of the largest
        at the end, each 1 at least; ``clean``, the share of digits that are classified rightly;
        ``claimed`` and ``proven``, the shares that are certified at distance 1 with the constant 1
        and with ``constant``; ``certificates``, the number of digits with a positive margin;
        ``broken``, how many of them :func:`~lipbook.attacks.pgd` moves to another class within the
        radius of the constant 1; ``broken_within``, the same within 0.999 of it, where rounding
        is the reason for the smallest margins only; ``broken_sound``, the same within the radii of
        :func:`lipbook.robustness.certify`, for layers of the library whose rounding it bounds. No
        tensors.
    """
    digits = mnist()
    torch.manual_seed(seed)
    model = network(name)
    images, labels = _middle(digits.test_images[:certified]), digits.test_labels[:certified]
    with torch.no_grad():
        model(images)  # estimates start here
    _tell(model.eval(), "settled")
    start = norms(model, images[:1])
    train(
        model.train(),
        _middle(digits.train_images[: 50 * steps]),
        digits.train_labels[: 50 * steps],
        epochs=1,
        lr=lr,
        batch_size=50,
        loss=_hinge,
        optimizer=functools.partial(_Adam, model=model),
        schedule="linear",
        seed=seed,
    )
    _tell(model, "settled")
    end = norms(model, images[:1])
    constant = math.prod(max(1.0, largest) for _, largest in end)
    with torch.no_grad():
        outputs = model(images).double()
    mine = outputs.gather(1, labels[:, None])[:, 0]
    radii = (mine - outputs.scatter(1, labels[:, None], -math.inf).amax(1)) / math.sqrt(2)
    sound = None
    if CONSTRAINTS[name].code == "lipbook" and name != "Cayley":
        certificate = certify(model, [(images, labels)], images.shape[1:])
        right = certificate.predictions == labels
        sound = _broken(model, images, labels, certificate.radius * right, attack)
    return {
        "name": name,
        "seed": seed,
        "start": start,
        "end": end,
        "constant": constant,
        "clean": (radii > 0).double().mean().item(),
        "claimed": (radii >= 1).double().mean().item(),
        "proven": (radii >= constant).double().mean().item(),
        "certificates": int((radii > 0).sum()),
        "broken": _broken(model, images, labels, radii, attack),
        "broken_within": _broken(model, images, labels, 0.999 * radii, attack),
        "broken_sound": sound,
    }, {}


def run(
    *,
    names: Sequence[str] = tuple(CONSTRAINTS),
    seeds: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Audit all constraints.

    Parameters
    ----------
    names : sequence of str
        Keys of ``CONSTRAINTS``.
    seeds : int
        Networks for each, from ``seed`` on.
    seed : int
        The first.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``packages``, the versions of the peers. No
        tensors.

    Raises
    ------
    ModuleNotFoundError
        If rows of a peer are asked for that is not installed.
    """
    asked = {CONSTRAINTS[name].code for name in names}
    packages = {}
    for code, package in PEERS.items():
        if code in asked:
            try:
                packages[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                raise ModuleNotFoundError(
                    f"rows of {code} need {package}: pip install 'lipbook[bench]', "
                    "or give names without them"
                ) from None
    rows = rows or Rows()
    table, grid = [], [(name, seed + i) for i in range(seeds) for name in names]
    for name, each in rows.bar(grid, "networks"):
        one = functools.partial(row, name, seed=each)
        table.append(rows.compute(f"{name} {each}", one)[0])
    return {"rows": table, "packages": packages}, {}
