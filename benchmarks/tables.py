"""What is compared: each table builds its steps, and says how exact each row's weight is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deel import torchlip
from geotorch import orthogonal as geotorch_orthogonal
from orthogonium import layers as orthogonium
from orthogonium.layers.conv.adaptiveSOC import AdaptiveSOCConv2d
from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d, AdaptiveOrthoConvTranspose2d
from orthogonium.layers.conv.AOL import AOLConv2D, AOLConvTranspose2D
from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock
from orthogonium.layers.linear import OrthoLinear
from orthogonium.reparametrizers import (
    CHOLESKY_STABLE_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    QR_ORTHO_PARAMS,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks import processes
from benchmarks.timing import Step, Table
from lipbook.activations import AbsoluteValue, FullSort, GroupSort, Householder, MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.convolutions import (
    CayleyConv2d,
    NonexpansiveConv2d,
    NonexpansiveConvTranspose2d,
    OrthogonalConv2d,
    OrthogonalConvTranspose2d,
    SkewOrthogonalConv2d,
)
from lipbook.export import freeze
from lipbook.lab.ordinary import Ordinary, ResNet18, made
from lipbook.normalization import BatchCentering, LayerCentering, ScalarBatchNorm, ScaleAndBias
from lipbook.norms import (
    circular_convolution_singular_values,
    convolution_norm_bound,
    rigorous_convolution_norm,
)
from lipbook.orthogonal import OrthogonalLinear, SpectralNormLinear, UnitNormLinear
from lipbook.pooling import (
    AveragePooling,
    InvertibleDownsampling,
    InvertibleUpsampling,
    NormPooling,
)
from lipbook.residual import CPLConv2d, SLLConv2d
from lipbook.robustness import Certifier, certify

AOC = "orthogonium AOC, Björck (default)"
PLAIN = "torch Conv2d, circular"


# ------------------------------------------------------------------------- steps and exactness


def weight_step(module: Any) -> Step:
    """Compute the constrained weight, and the gradient of the raw parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    direction = torch.randn_like(module.weight)

    def step() -> object:
        return torch.autograd.grad(module.weight, parameters, direction, allow_unused=True)

    return step


def training_step(module: Any, shape: tuple[int, ...]) -> Step:
    """Forward, and backward to the parameters and to the input, as inside a network."""
    x = torch.randn(shape, requires_grad=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    direction = torch.randn_like(module(x))

    def step() -> object:
        return torch.autograd.grad(module(x), [x, *parameters], direction, allow_unused=True)

    return step


def evaluation_step(module: Any, shape: tuple[int, ...]) -> Step:
    """Forward in evaluation mode, without gradients."""
    x = torch.randn(shape)
    module.eval()

    def step() -> object:
        with torch.no_grad():
            return module(x)

    return step


def moved(module: Any) -> Any:
    """Take the raw parameters three steps along gradients: a start is a special point.

    Each step is a tenth as long as the parameters of an orthogonal matrix of that shape. The raw
    parameters of some peers are orthogonal at the start, where their iterations stop at once.
    """
    for _ in range(3):
        parameters = [p for p in module.parameters() if p.requires_grad]
        loss = (module.weight * torch.randn_like(module.weight)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and parameter.dim() > 1:
                    length = 0.1 * math.sqrt(parameter.numel() / max(parameter.shape[-2:]))
                    parameter.sub_(length * gradient / gradient.norm().clamp(min=1e-12))
    return module


def matrix_defect(module: Any) -> float:
    """Find the largest distance of a singular value from 1."""
    values = torch.linalg.svdvals(module.weight.detach().double())
    return (values - 1).abs().max().item()


def kernel_defect(module: Any) -> float:
    """Find the same for the circular convolution on images of 8 × 8 pixels."""
    kernel: Tensor = module.weight.detach().double()
    values = circular_convolution_singular_values(kernel, 8, stride=module.stride)
    return (values - 1).abs().max().item()


# ----------------------------------------------------------------------------------- floors


def kernel_floor(c: int, stride: int) -> Step:
    """BCOP's matrix products, Cholesky factorisations and triangular solves, and nothing else."""
    extra = 3 - stride
    seed, projectors = torch.randn(1, c, c * stride**2), torch.randn(2 * extra, c, c // 2)
    seeds, bases = (tensor.double() for tensor in (seed.mT.contiguous(), projectors))
    spd = [tall.mT @ tall for tall in (seeds, bases)]
    triangles = [torch.linalg.cholesky(gram).mT for gram in spd]
    lower = [triangle.mT.float() for triangle in triangles]
    square = torch.randn(c, c)
    taps = []
    counts = [stride, stride]
    for turn in range(2 * extra):
        taps.append(torch.randn(math.prod(counts) * c, c))
        counts[turn % 2] += 1
    frame, small = seeds.float(), torch.randn(2 * extra, c // 2, c // 2)

    def step() -> object:
        for tall, gram, triangle in zip((seeds, bases), spd, triangles, strict=True):
            _ = tall.mT @ tall
            torch.linalg.cholesky_ex(gram)
            torch.linalg.solve_triangular(triangle, tall, upper=True, left=False)
        _ = bases @ bases.mT
        for tap in taps:
            _ = tap @ square  # the kernel, and twice its adjoint
            _ = tap @ square
            _ = tap.mT @ tap
        _ = square @ projectors
        _ = projectors.mT @ projectors
        _ = projectors @ small
        torch.linalg.solve_triangular(lower[1], projectors, upper=False, left=False)
        _ = frame.mT @ frame
        _ = frame @ square
        return torch.linalg.solve_triangular(lower[0], frame, upper=False, left=False)

    return step


def cayley_floor(n: int) -> dict[str, Step]:
    """Invert, and take the two products of the adjoint: what any Cayley transform has to do.

    LAPACK's inverse in float32 leaves errors of 1e-6 at best, those of products in float64 round
    to 1e-7.
    """
    matrix = torch.randn(n, n)
    system = torch.eye(n) + (matrix - matrix.mT) / math.sqrt(n)
    double = system.double()
    halves = []  # what elimination by halves multiplies, down to 64 rows
    size = n // 2
    while size >= 64:
        halves.append((6 * n // (2 * size), torch.randn(size, size, dtype=torch.float64)))
        size //= 2
    blocks = double[: 2 * size, : 2 * size].expand(n // (2 * size), -1, -1)

    def lapack() -> object:
        torch.linalg.inv_ex(system)
        return (matrix @ system) @ system

    def products() -> object:
        for count, half in halves:
            for _ in range(count):
                _ = half @ half
        torch.linalg.inv_ex(blocks)
        return (matrix @ system) @ system

    return {
        "floor: LAPACK's inverse, 2 products": lapack,
        "floor: products in float64, 2 products": products,
    }


def qr_floor(n: int) -> Step:
    """Decompose by LAPACK in float32, then two products and a triangular solve of the adjoint."""
    matrix = torch.randn(n, n)
    triangle = torch.linalg.qr(matrix).R

    def step() -> object:
        torch.linalg.qr(matrix)
        product = (matrix.mT @ matrix) @ matrix
        return torch.linalg.solve_triangular(triangle, product, upper=True, left=False)

    return step


# ----------------------------------------------------------------------------------- tables


def kernels(c: int, stride: int) -> Table:
    """Kernels of orthogonal convolutions."""
    aoc: dict[str, Any] = {"padding": 1, "bias": False, "stride": stride}
    modules = {
        "lipbook BCOP": OrthogonalConv2d(c, c, 3, stride=stride, bias=False),
        AOC: AdaptiveOrthoConv2d(c, c, 3, **aoc),
        "orthogonium AOC, QR": AdaptiveOrthoConv2d(c, c, 3, ortho_params=QR_ORTHO_PARAMS, **aoc),
        "orthogonium AOC, Cholesky": AdaptiveOrthoConv2d(
            c, c, 3, ortho_params=CHOLESKY_STABLE_ORTHO_PARAMS, **aoc
        ),
    }
    steps = {name: weight_step(moved(module)) for name, module in modules.items()}
    return Table(
        "Kernel of a 3 × 3 convolution and its gradient",
        f"{c} channels, stride {stride}",
        AOC,
        steps | {"floor: products, Cholesky, solves": kernel_floor(c, stride)},
        {name: kernel_defect(module) for name, module in modules.items()},
    )


def convolutions(c: int, size: int, stride: int) -> dict[str, Any]:
    """Build the layers of the tables of training, from c to c channels."""
    around: dict[str, Any] = {"padding": 1, "padding_mode": "circular", "stride": stride}
    layers = {
        PLAIN: nn.Conv2d(c, c, 3, **around),
        "torch Conv2d, zeros": nn.Conv2d(c, c, 3, padding=1, stride=stride),
        "torch spectral_norm, circular": parametrizations.spectral_norm(
            nn.Conv2d(c, c, 3, **around)
        ),
        "lipbook BCOP": OrthogonalConv2d(c, c, 3, stride=stride),
        "lipbook AOL": NonexpansiveConv2d(c, c, 3, stride=stride),
        "lipbook RKO": NonexpansiveConv2d(c, c, 3, stride=stride, method="rko"),
        "lipbook SOC": SkewOrthogonalConv2d(c, c, 3, stride=stride),
        "lipbook Cayley": CayleyConv2d(c, c, 3, image_size=size, stride=stride),
        AOC: AdaptiveOrthoConv2d(c, c, 3, **around),
        "orthogonium AOL": AOLConv2D(c, c, 3, **around),
        "torchlip SpectralConv2d": torchlip.SpectralConv2d(c, c, 3, **around),
    }
    if stride > 1:
        first = OrthogonalConv2d(c, c, stride, stride=stride, bias=False)
        layers["lipbook BCOP, then SOC"] = nn.Sequential(first, SkewOrthogonalConv2d(c, c, 3))
    if stride == 1:  # which residual blocks and some others need
        layers["torchlip FrobeniusConv2d"] = torchlip.FrobeniusConv2d(c, c, 3, **around)
        layers["lipbook SLL, residual"] = SLLConv2d(c)
        layers["lipbook CPL, residual"] = CPLConv2d(c)
        layers["orthogonium SLL, residual"] = SDPBasedLipschitzResBlock(c, 1)
        # Its kernel has 7 × 7 taps: with a padding of 1 its images would shrink to 12 × 12.
        layers["orthogonium SOC, adaptive"] = AdaptiveSOCConv2d(c, c, 3, padding=3)
    return layers


def training(c: int, size: int, stride: int, batch: int = 64) -> Table:
    """Training steps of convolutions on images."""
    shape = (batch, c, size, size)
    layers = convolutions(c, size, stride)
    return Table(
        f"Training step of a 3 × 3 convolution, batch {batch}",
        f"{c} channels, stride {stride}, {size} × {size}",
        PLAIN,
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def evaluation(c: int, size: int, stride: int, batch: int) -> Table:
    """Forward passes of layers that are not trained any more."""
    around: dict[str, Any] = {"padding": 1, "padding_mode": "circular", "stride": stride}
    ours = OrthogonalConv2d(c, c, 3, stride=stride)
    torchlips = torchlip.SpectralConv2d(c, c, 3, **around)
    layers: dict[str, Any] = {
        PLAIN: nn.Conv2d(c, c, 3, **around),
        "lipbook BCOP": ours,
        "lipbook BCOP, frozen": freeze(ours),
        AOC: AdaptiveOrthoConv2d(c, c, 3, **around),
        "torchlip SpectralConv2d": torchlips,
        "torchlip SpectralConv2d, exported": torchlips.vanilla_export(),
    }
    shape = (batch, c, size, size)
    return Table(
        f"Evaluation of a 3 × 3 convolution, {c} channels, {size} × {size}",
        f"stride {stride}, batch {batch}",
        PLAIN,
        {name: evaluation_step(layer, shape) for name, layer in layers.items()},
        {},
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
    steps = {name: weight_step(moved(module)) for name, module in modules.items()}
    floors = cayley_floor(n) | {"floor: LAPACK's QR, 2 products, solve": qr_floor(n)}
    return Table(
        "Orthogonal square weight and its gradient",
        f"{n} × {n}",
        "torch cayley",
        steps | floors,
        {name: matrix_defect(module) for name, module in modules.items()},
    )


def elongated(rows: int = 256, columns: int = 4096) -> Table:
    """Orthonormal rows of a long matrix, as of the first dense layer after convolutions."""
    methods: tuple[Any, ...] = ("qr", "cholesky_qr", "cayley", "polar")
    modules = {f"lipbook {m}": moved(OrthogonalLinear(columns, rows, method=m)) for m in methods}
    weight, gradient = torch.randn(2, rows, columns)
    square = torch.randn(rows, rows)
    floor = "floor: 5 products"

    def products() -> object:
        _ = weight @ weight.mT  # the weight from its Gram matrix, and three for the gradient
        _ = square @ weight
        _ = gradient @ weight.mT
        _ = square @ weight
        return square @ gradient

    return Table(
        "Orthonormal long weight and its gradient",
        f"{rows} × {columns}",
        floor,
        {name: weight_step(module) for name, module in modules.items()} | {floor: products},
        {name: matrix_defect(module) for name, module in modules.items()},
    )


def transposed(c: int = 64, size: int = 8, batch: int = 64) -> Table:
    """Training steps of transposed convolutions, to images of twice the size."""
    options: dict[str, Any] = {"stride": 2}
    cut: dict[str, Any] = {"stride": 2, "padding": 1}
    reference = "torch ConvTranspose2d, zeros"
    layers = {
        reference: nn.ConvTranspose2d(c, c, 4, **cut),
        "lipbook BCOP": OrthogonalConvTranspose2d(c, c, 4, **options),
        "lipbook AOL": NonexpansiveConvTranspose2d(c, c, 4, **options),
        "orthogonium AOC": AdaptiveOrthoConvTranspose2d(c, c, 4, **cut),
        "orthogonium AOL": AOLConvTranspose2D(c, c, 4, **cut),
        "torchlip SpectralConvTranspose2d": torchlip.SpectralConvTranspose2d(c, c, 4, **cut),
    }
    shape = (batch, c, size, size)
    return Table(
        f"Training step of a transposed convolution, batch {batch}",
        f"4 × 4, {c} channels, stride 2, {size} × {size}",
        reference,
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def last_layers(n: int = 512, batch: int = 64) -> Table:
    """Training steps of dense layers that are not orthogonal."""
    layers = {
        "torch Linear": nn.Linear(n, n),
        "lipbook UnitNormLinear": UnitNormLinear(n, n),
        "lipbook SpectralNormLinear": SpectralNormLinear(n, n),
        "orthogonium UnitNormLinear": orthogonium.UnitNormLinear(n, n),
        "torchlip FrobeniusLinear": torchlip.FrobeniusLinear(n, n, disjoint_neurons=False),
    }
    return Table(
        f"Training step of a dense layer, batch {batch}",
        f"{n} × {n}",
        "torch Linear",
        {name: training_step(layer, (batch, n)) for name, layer in layers.items()},
        {},
    )


def activations(shape: tuple[int, ...] = (64, 16, 32, 32)) -> Table:
    """Activations, forward and backward."""
    layers = {
        "torch ReLU": nn.ReLU(),
        "lipbook MaxMin": MaxMin(),
        "lipbook GroupSort(4)": GroupSort(4),
        "lipbook FullSort": FullSort(),
        "lipbook Householder": Householder(shape[1]),
        "lipbook AbsoluteValue": AbsoluteValue(),
        "orthogonium MaxMin": orthogonium.MaxMin(),
        "orthogonium Abs": orthogonium.Abs(),
        "orthogonium HouseHolder": orthogonium.HouseHolder(shape[1]),
        "torchlip GroupSort2": torchlip.GroupSort2(),
        "torchlip GroupSort(4)": torchlip.GroupSort(4),
        "torchlip FullSort": torchlip.FullSort(),
        "torchlip HouseHolder": torchlip.HouseHolder(shape[1]),
        "torchlip LPReLU": torchlip.LPReLU(),
    }
    return Table(
        "Training step of an activation",
        " × ".join(map(str, shape)),
        "torch ReLU",
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def normalizations(shape: tuple[int, ...] = (64, 16, 32, 32)) -> Table:
    """Centrings and norms by one number, forward and backward."""
    c = shape[1]
    layers = {
        "torch BatchNorm2d": nn.BatchNorm2d(c),
        "lipbook BatchCentering": BatchCentering(c),
        "lipbook LayerCentering": LayerCentering((1, 2, 3)),
        "lipbook ScaleAndBias": ScaleAndBias(c),
        "lipbook ScalarBatchNorm": ScalarBatchNorm(c),
        "orthogonium BatchCentering2D": orthogonium.BatchCentering2D(c),
        "orthogonium LayerCentering2D": orthogonium.LayerCentering2D(c),
        "torchlip BatchCentering": torchlip.BatchCentering(c),
        "torchlip LayerCentering": torchlip.LayerCentering(c),
        "torchlip ScaleBiasLayer": torchlip.ScaleBiasLayer(num_features=c),
        "torchlip BatchLipNorm": torchlip.BatchLipNorm(c),
    }
    return Table(
        "Training step of a normalisation",
        " × ".join(map(str, shape)),
        "torch BatchNorm2d",
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def poolings(shape: tuple[int, ...] = (64, 16, 32, 32)) -> Table:
    """Poolings of 2 × 2 pixels or all, and rearrangements of them, forward and backward."""
    layers = {
        "torch AvgPool2d": nn.AvgPool2d(2),
        "lipbook AveragePooling": AveragePooling(2),
        "lipbook AveragePooling, of all": AveragePooling(shape[-1]),
        "lipbook NormPooling": NormPooling(2),
        "lipbook InvertibleDownsampling": InvertibleDownsampling(2),
        "lipbook InvertibleUpsampling": InvertibleUpsampling(2),
        "torchlip ScaledAvgPool2d": torchlip.ScaledAvgPool2d(2),
        "torchlip ScaledAdaptiveAvgPool2d": torchlip.ScaledAdaptiveAvgPool2d((1, 1)),
        "torchlip ScaledL2NormPool2d": torchlip.ScaledL2NormPool2d(2),
        "torchlip InvertibleDownSampling": torchlip.InvertibleDownSampling(2),
        "torchlip InvertibleUpSampling": torchlip.InvertibleUpSampling(2),
    }
    return Table(
        "Training step of a pooling",
        " × ".join(map(str, shape)),
        "torch AvgPool2d",
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def classifiers(c: int, batch: int) -> Table:
    """Training steps of whole networks: five convolutions, two with a stride, and two matrices."""

    def network(convolution: Any, linear: Any, activation: Callable[[], nn.Module]) -> Any:
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, c, 1), (c, c, 1), (c, 2 * c, 2), (2 * c, 2 * c, 1)):
            layers += [circular(convolution, inputs, outputs, stride), activation()]
        layers += [circular(convolution, 2 * c, 64, 2), activation(), nn.Flatten()]
        return nn.Sequential(*layers, linear(4096, 256), activation(), linear(256, 10))

    def circular(convolution: Any, inputs: int, outputs: int, stride: int) -> nn.Module:
        layer: nn.Module = convolution(
            inputs, outputs, 3, stride=stride, padding=1, padding_mode="circular"
        )
        return layer

    layers = {
        PLAIN: network(nn.Conv2d, nn.Linear, nn.ReLU),
        "lipbook BCOP": network(OrthogonalConv2d, OrthogonalLinear, MaxMin),
        AOC: network(AdaptiveOrthoConv2d, OrthoLinear, MaxMin),
    }
    shape = (batch, 3, 32, 32)
    return Table(
        "Training step of a network of five convolutions and two matrices",
        f"{c} channels, batch {batch}",
        PLAIN,
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
    )


def memory(c: int, size: int, stride: int, batch: int = 64) -> Table:
    """Tensors that a training step of a convolution holds at once."""
    shape = (batch, c, size, size)
    layers = convolutions(c, size, stride)
    return Table(
        "Peak memory of a training step",
        f"3 × 3, {c} channels, stride {stride}, {size} × {size}, batch {batch}",
        PLAIN,
        {name: training_step(layer, shape) for name, layer in layers.items()},
        {},
        "MB",
    )


def networks(batch: int = 64) -> Table:
    """Four layers, as they follow each other in a classifier of images of 32 × 32 pixels."""

    def network(convolution: Callable[..., nn.Module], linear: Callable[..., nn.Module]) -> Any:
        circular: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
        return nn.Sequential(
            convolution(3, 32, 3, **circular),
            nn.ReLU(),
            convolution(32, 32, 3, **circular),
            nn.ReLU(),
            convolution(32, 64, 3, stride=2, **circular),
            nn.ReLU(),
            nn.Flatten(),
            linear(64 * 16 * 16, 10),
        )

    layers = {
        PLAIN: network(nn.Conv2d, nn.Linear),
        "lipbook BCOP": network(OrthogonalConv2d, OrthogonalLinear),
        "lipbook AOL": network(NonexpansiveConv2d, OrthogonalLinear),
        AOC: network(AdaptiveOrthoConv2d, OrthoLinear),
        "torchlip SpectralConv2d": network(torchlip.SpectralConv2d, torchlip.SpectralLinear),
    }
    shape = (batch, 3, 32, 32)
    return Table(
        "Peak memory of a training step",
        f"a network of three convolutions and a matrix, batch {batch}",
        PLAIN,
        {name: training_step(copy.deepcopy(layer), shape) for name, layer in layers.items()},
        {},
        "MB",
    )


def resnet18(size: int = 32) -> list[tuple[nn.Conv2d, int]]:
    """Build the convolutions of ResNet-18, each with the size of its images, none pooled away."""
    layers = [(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), size)]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        strided = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        plain = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3)]
        layers += [(strided, size), *[(layer, size // stride) for layer in plain]]
        if stride == 2:
            layers.append((nn.Conv2d(channels, width, 1, stride=2, bias=False), size))
        channels, size = width, size // stride
    return layers


def bounds_of_resnet18(batch: int = 64) -> Table:
    """Bounds of all convolutions of a network, beside one pass of a batch through them."""
    layers = resnet18()
    inputs = [torch.randn(batch, layer.in_channels, size, size) for layer, size in layers]

    def forward() -> object:
        with torch.no_grad():
            return [layer(x) for (layer, _), x in zip(layers, inputs, strict=True)]

    def bound(norm: Callable[..., object]) -> Step:
        def step() -> object:
            return [
                norm(layer.weight.detach(), size, stride=layer.stride, padding=layer.padding)
                for layer, size in layers
            ]

        return step

    return Table(
        "Bounds of the convolutions of ResNet-18",
        "32 × 32, zero padding, 2-norm",
        f"forward pass, batch {batch}",
        {
            f"forward pass, batch {batch}": forward,
            "lipbook convolution_norm_bound": bound(convolution_norm_bound),
            "lipbook rigorous_convolution_norm": bound(rigorous_convolution_norm),
        },
        {},
    )


def bound_of_a_resnet(batch: int = 64) -> Table:
    """Bound of a whole ResNet-18, skips and all, beside one pass of a batch."""
    shape = (3, 32, 32)
    network = made(Ordinary(lambda: ResNet18(64), shape, {}))
    x = torch.randn(batch, *shape)

    def forward() -> object:
        with torch.no_grad():
            return network(x)

    reference = f"forward pass, batch {batch}"
    return Table(
        "Bound of a residual network",
        "ResNet-18, 3 × 32 × 32, 2-norm",
        reference,
        {reference: forward, "lipbook lipschitz_bound": lambda: lipschitz_bound(network, shape)},
        {},
    )


def bound_of_a_chain(depth: int = 50, n: int = 512) -> Table:
    """Bound of a deep dense network, beside the singular values of its weights."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(n, n), nn.ReLU())]
    network = nn.Sequential(*layers)
    weights = [layer.weight.detach() for layer in layers if isinstance(layer, nn.Linear)]
    reference = "torch.linalg.matrix_norm(W, 2) of each"

    def norms() -> object:
        return [torch.linalg.matrix_norm(weight, 2) for weight in weights]

    return Table(
        "Bound of a deep network",
        f"{depth} dense layers of {n}, 2-norm",
        reference,
        {reference: norms, "lipbook lipschitz_bound": lambda: lipschitz_bound(network, (n,))},
        {},
    )


def certificates(inputs: int) -> Table:
    """Certificates of a dense network, prepared or not, beside its plain copy on the inputs."""
    sizes = OrthogonalLinear(784, 256), OrthogonalLinear(256, 256), nn.Linear(256, 10)
    network = nn.Sequential(sizes[0], MaxMin(), sizes[1], MaxMin(), sizes[2]).eval()
    plain, shape = freeze(network), (784,)
    batch = [(x, torch.zeros(len(x), dtype=torch.long)) for x in torch.rand(inputs, 784).split(500)]
    certifiers = {sound: Certifier(network, shape, sound=sound) for sound in (False, True)}

    def alone() -> object:
        with torch.no_grad():
            return [plain(x) for x, _ in batch]

    return Table(
        "Certificates",
        f"784-256-256-10, MaxMin, {inputs:,} inputs in batches of 500, 2-norm",
        "the plain network alone",
        {
            "the plain network alone": alone,
            "lipbook Certifier, real arithmetic": lambda: certifiers[False](batch),
            "lipbook Certifier, sound": lambda: certifiers[True](batch),
            "lipbook certify, real arithmetic": lambda: certify(network, batch, shape, sound=False),
            "lipbook certify, sound": lambda: certify(network, batch, shape),
        },
        {},
    )


def tables() -> Iterator[Table]:
    """Build all tables, one after the other."""
    for c, stride in ((64, 1), (128, 1), (256, 1), (64, 2), (128, 2)):
        yield kernels(c, stride)
    for stride in (1, 2):
        yield training(64, 16, stride)
    for n in (128, 512):
        yield dense(n)
    yield elongated()
    for c, batch in ((16, 64), (32, 128)):
        yield classifiers(c, batch)
    for build in (transposed, last_layers, activations, normalizations, poolings):
        yield build()
    for stride, batch in ((1, 64), (2, 64), (1, 1)):
        yield evaluation(64, 16, stride, batch)
    yield bounds_of_resnet18()
    yield bound_of_a_resnet()
    yield bound_of_a_chain()
    for inputs in (2_000, 10_000):
        yield certificates(inputs)
    for stride in (1, 2):
        yield memory(64, 16, stride)
    yield networks()
    yield from processes.tables()
