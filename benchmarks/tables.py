"""What is compared: each table builds its steps, and says how exact each row's weight is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from deel import torchlip
from geotorch import orthogonal as geotorch_orthogonal
from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
from orthogonium.layers.linear import OrthoLinear
from orthogonium.reparametrizers import (
    CHOLESKY_STABLE_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    QR_ORTHO_PARAMS,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lipbook.convolutions import NonexpansiveConv2d, OrthogonalConv2d
from lipbook.norms import circular_convolution_singular_values
from lipbook.orthogonal import OrthogonalLinear


class Table(NamedTuple):
    """Modules under comparison; ratios are to the time of ``reference``."""

    title: str
    reference: str
    step: Callable[[Any], Callable[[], object]]
    modules: dict[str, Any]
    exactness: Callable[[Any], float] | None


def weight_step(module: Any) -> Callable[[], object]:
    """Compute the constrained weight, and the gradient of the raw parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    direction = torch.randn_like(module.weight)

    def step() -> object:
        return torch.autograd.grad(module.weight, parameters, direction, allow_unused=True)

    return step


def training_step(module: Any, shape: tuple[int, ...]) -> Callable[[], object]:
    """Forward, and backward to the parameters and to the input, as inside a network."""
    x = torch.randn(shape, requires_grad=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    direction = torch.randn_like(module(x))

    def step() -> object:
        return torch.autograd.grad(module(x), [x, *parameters], direction, allow_unused=True)

    return step


def matrix_defect(module: Any) -> float:
    """Find the largest distance of a singular value from 1."""
    values = torch.linalg.svdvals(module.weight.detach().double())
    return (values - 1).abs().max().item()


def kernel_defect(module: Any) -> float:
    """Find the same for the circular convolution on images of 8 × 8 pixels."""
    kernel: Tensor = module.weight.detach().double()
    values = circular_convolution_singular_values(kernel, 8, stride=module.stride)
    return (values - 1).abs().max().item()


def kernels(c: int, stride: int) -> Table:
    """Kernels of orthogonal convolutions."""
    aoc: dict[str, Any] = {"padding": 1, "bias": False, "stride": stride}
    return Table(
        f"Kernel of a 3 × 3 convolution and its gradient, {c} to {c} channels, stride {stride}",
        "orthogonium AOC, Björck (default)",
        weight_step,
        {
            "lipbook BCOP": OrthogonalConv2d(c, c, 3, stride=stride, bias=False),
            "orthogonium AOC, Björck (default)": AdaptiveOrthoConv2d(c, c, 3, **aoc),
            "orthogonium AOC, QR": AdaptiveOrthoConv2d(
                c, c, 3, ortho_params=QR_ORTHO_PARAMS, **aoc
            ),
            "orthogonium AOC, Cholesky": AdaptiveOrthoConv2d(
                c, c, 3, ortho_params=CHOLESKY_STABLE_ORTHO_PARAMS, **aoc
            ),
        },
        kernel_defect,
    )


def training(c: int, size: int, stride: int, batch: int = 64) -> Table:
    """Training steps of convolutions on images."""
    around: dict[str, Any] = {"padding": 1, "padding_mode": "circular", "stride": stride}
    return Table(
        f"Training step, {c} to {c} channels, 3 × 3, stride {stride}, {size} × {size}, "
        f"batch {batch}",
        "torch Conv2d, circular",
        lambda module: training_step(module, (batch, c, size, size)),
        {
            "torch Conv2d, circular": nn.Conv2d(c, c, 3, **around),
            "torch Conv2d, zeros": nn.Conv2d(c, c, 3, padding=1, stride=stride),
            "torch spectral_norm, circular": parametrizations.spectral_norm(
                nn.Conv2d(c, c, 3, **around)
            ),
            "lipbook BCOP": OrthogonalConv2d(c, c, 3, stride=stride),
            "lipbook AOL": NonexpansiveConv2d(c, c, 3, stride=stride),
            "lipbook RKO": NonexpansiveConv2d(c, c, 3, stride=stride, method="rko"),
            "orthogonium AOC, Björck (default)": AdaptiveOrthoConv2d(c, c, 3, **around),
            "torchlip SpectralConv2d": torchlip.SpectralConv2d(c, c, 3, **around),
        },
        None,
    )


def dense(n: int) -> Table:
    """Weights of orthogonal linear layers."""
    ours: tuple[Any, ...] = ("qr", "cholesky_qr", "polar", "cayley", "bjorck")
    plain = {name: nn.Linear(n, n) for name in ("matrix_exp", "cayley", "householder")}
    modules: dict[str, Any] = {f"lipbook {m}": OrthogonalLinear(n, n, method=m) for m in ours}
    modules |= {
        f"torch {name}": parametrizations.orthogonal(layer, orthogonal_map=name)
        for name, layer in plain.items()
    }
    modules |= {
        "geotorch orthogonal": nn.Linear(n, n),
        "orthogonium, Björck (default)": OrthoLinear(n, n),
        "orthogonium, QR": OrthoLinear(n, n, ortho_params=QR_ORTHO_PARAMS),
        "orthogonium, exponential": OrthoLinear(n, n, ortho_params=EXP_ORTHO_PARAMS),
        "torchlip SpectralLinear": torchlip.SpectralLinear(n, n),
    }
    geotorch_orthogonal(modules["geotorch orthogonal"], "weight")
    return Table(
        f"Orthogonal {n} × {n} weight and its gradient",
        "torch cayley",
        weight_step,
        modules,
        matrix_defect,
    )


def tables() -> Iterator[Table]:
    """Build all tables, one after the other."""
    for c, stride in ((64, 1), (128, 1), (256, 1), (64, 2), (128, 2)):
        yield kernels(c, stride)
    yield training(64, 16, 1)
    yield training(64, 16, 2)
    yield dense(128)
    yield dense(512)
