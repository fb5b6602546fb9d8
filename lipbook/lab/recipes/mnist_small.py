r"""The Small networks of 2019 on MNIST at ε = 1.58, one for each convolution.

The experiment of :cite:t:`li2019preventing`: two strided convolutions and two orthogonal dense
layers, the multi-class hinge at the margin of radius 1.5, Adam. Four ways to bound the convolutions
are compared at equal loss and equal epochs: block convolutions (BCOP), the reshaped kernel
orthogonalised (RKO), one-sided spectral normalisation by power iteration (OSSN), and singular value
clipping and masking (SVCM). A fifth row trains BCOP with
:class:`~lipbook.lab.descent.StiefelMuon` instead.

Other than in 2019: 8 epochs and not 200, with a larger rate that falls to 0; three seeds and not
five; the epoch is chosen on 5,000 training digits and not on the test digits; the stored network,
in half precision, is certified soundly, with the norms that it has and not with 1. The networks of
the first seed ship.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.convolutions import NonexpansiveConv2d, OrthogonalConv2d
from lipbook.lab import networks
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.descent import StiefelMuon
from lipbook.lab.evaluation import certified_score, summary
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.image_critics import OSSNConv2d
from lipbook.lab.records import Record
from lipbook.lab.training import train
from lipbook.losses import MultiMarginLoss, margin_for_radius

__all__ = [
    "EPSILONS", "METHODS", "PUBLISHED", "SEEDS", "Entry", "clipped_and_masked", "entries", "run",
    "row",
]  # fmt: skip

#: Radii at which accuracies are certified.
EPSILONS = (0.5, 1.0, 1.58)
#: Seeds behind each number.
SEEDS = 3
#: Clean and certified accuracy at 1.58 after 200 epochs, means of five seeds.
PUBLISHED = {
    "BCOP": (0.9754, 0.4584),
    "RKO": (0.9728, 0.4358),
    "OSSN": (0.9686, 0.4295),
    "SVCM": (0.9724, 0.2894),
}


def clipped_and_masked(kernel: Tensor, size: int, rounds: int = 50, stride: int = 2) -> Tensor:
    r"""Alternate between convolutions of norm at most 1 and kernels of bounded size.

    Singular values of the circular convolution are clipped at 1 in the Fourier domain, then the
    kernel is cut to its size, which changes them again; and so on. **Not guaranteed**: a norm of
    at most 1 after finitely many rounds.

    Parameters
    ----------
    kernel : torch.Tensor
        (c_out, c_in, k, k), where the stride divides k.
    size : int
        Height and width of the image, a multiple of the stride.
    rounds : int
        Of both projections.
    stride : int
        Of the convolution.

    Returns
    -------
    torch.Tensor
        Like ``kernel``.

    References
    ----------
    :cite:t:`sedghi2019`; the baseline SVCM of :cite:t:`li2019preventing`.
    """
    k, cells = kernel.shape[-1] // stride, size // stride
    taps = functional.pixel_unshuffle(kernel, stride)  # stride 1 on stride² times the channels
    for _ in range(rounds):
        spectrum = torch.fft.rfft2(taps, s=(cells, cells)).permute(2, 3, 0, 1)
        u, values, vh = torch.linalg.svd(spectrum, full_matrices=False)
        clipped = (u * values.clamp(max=1)[..., None, :]) @ vh
        taps = torch.fft.irfft2(clipped.permute(2, 3, 0, 1), s=(cells, cells))[..., :k, :k]
    return functional.pixel_shuffle(taps, stride)


class _ClippingAdam(torch.optim.Adam):
    """Adam that projects the kernels of convolutions every 100 steps."""

    def __init__(self, params: Any, lr: float, model: nn.Sequential) -> None:
        super().__init__(params, lr=lr)
        self.model, self.steps = model, 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps % 100 == 0:
            _clip(self.model)
        return loss


@torch.no_grad()
def _clip(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            size = 28 if layer.in_channels == 1 else 14
            layer.weight.copy_(clipped_and_masked(layer.weight, size))


def _sized(make: Callable[[int, int, int], nn.Module]) -> networks.Convolution:
    """Let a convolution know the size of its image, which the number of its inputs tells here."""
    return lambda c_in, c_out, size, stride: make(c_in, c_out, 28 if c_in == 1 else 14)


def _rko(c_in: int, c_out: int, size: int, stride: int) -> nn.Module:
    return NonexpansiveConv2d(c_in, c_out, size, stride, method="rko")


def _plain(c_in: int, c_out: int, size: int) -> nn.Module:
    return nn.Conv2d(c_in, c_out, 4, 2, 1, padding_mode="circular")


#: A way to bound convolutions for each row, and BCOP with another optimiser.
METHODS: dict[str, networks.Convolution] = {
    "BCOP": OrthogonalConv2d,
    "RKO": _rko,
    "OSSN": _sized(OSSNConv2d),
    "SVCM": _sized(_plain),
    "BCOP, StiefelMuon": OrthogonalConv2d,
}


def row(
    digits: Mnist,
    method: str,
    *,
    epochs: int = 8,
    lr: float = 1e-2,
    muon_lr: float = 0.05,
    batch_size: int = 256,
    validation: int = 5000,
    attack: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> Outcome:
    """Train and certify one network.

    Parameters
    ----------
    digits : Mnist
        To train and to test on.
    method : str
        Key of ``METHODS``.
    epochs, batch_size, validation, seed, progress
        As in :func:`lipbook.lab.training.train`.
    lr, muon_lr : float
        First rate of Adam and of StiefelMuon; both fall to 0 linearly.
    attack : int
        Test digits that are attacked.

    Returns
    -------
    tuple of dict
        Results: ``method``, ``seed``, ``scores`` of the epochs, and ``test``, see
        :func:`~lipbook.lab.evaluation.summary`. Tensors: the network.
    """
    torch.manual_seed(seed)
    model = networks.small(convolution=METHODS[method])
    muon = method.endswith("StiefelMuon")
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    if muon:
        optimizer = functools.partial(StiefelMuon, vector_lr=1 / muon_lr)
    elif method == "SVCM":
        optimizer = functools.partial(_ClippingAdam, model=model)
    history = train(
        model,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        lr=muon_lr if muon else lr,
        batch_size=batch_size,
        loss=MultiMarginLoss(margin_for_radius(1.5)),
        optimizer=optimizer,
        schedule="linear",
        validation=validation,
        score=certified_score(1.5),
        seed=seed,
        progress=progress,
    )
    if method == "SVCM":
        _clip(model)
    tensors = networks.packed(_settled(model))
    stored = networks.rebuilt("small", (), tensors)
    test = summary(stored, digits.test_images, digits.test_labels, EPSILONS, attack=attack)
    results = {"method": method, "seed": seed, "scores": history.scores, "test": test}
    return results, tensors


def _settled(model: nn.Sequential) -> nn.Sequential:
    """Put plain convolutions where the kernel is divided by an estimate."""
    for index, layer in enumerate(model):
        if isinstance(layer, OSSNConv2d):
            plain = _plain(layer.in_channels, layer.out_channels, 0)
            plain.load_state_dict({"weight": layer.normalised(), "bias": layer.bias})
            model[index] = plain
    return model


def run(
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = SEEDS,
    epochs: int = 8,
    attack: int = 500,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train and certify all networks.

    Parameters
    ----------
    methods : sequence of str
        Keys of ``METHODS``.
    seeds : int
        Trainings of each, with weights and batches of their own.
    epochs, attack
        As in :func:`row`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``epochs``; ``published``; ``networks``, with
        ``shipped``, the summaries on the digits that ship. Tensors: the networks of the first seed,
        for :func:`lipbook.lab.networks.load`.
    """
    rows = rows or Rows()
    digits, few = mnist(full=True), mnist()
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    shipped = {}
    kinds = [(each, method) for each in range(seed, seed + seeds) for method in methods]
    for each, method in rows.bar(kinds, "networks"):
        one = functools.partial(row, digits, method, epochs=epochs, attack=attack, seed=each)
        results, state = rows.compute(f"{method} seed {each}", one)
        table.append(results)
        if each == seed:
            key = method.replace(", ", "-")
            tensors |= {f"{key}/{name}": value for name, value in state.items()}
            stored = networks.rebuilt("small", (), state)
            again = summary(stored, few.test_images, few.test_labels, EPSILONS, attack=100)
            shipped[key] = {"architecture": "small", "arguments": [], "p": 2, "shipped": again}
    return {
        "networks": shipped,
        "rows": table,
        "epochs": epochs,
        "published": {name: list(value) for name, value in PUBLISHED.items()},
    }, tensors


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a table says of one method.

    Attributes
    ----------
    seeds : tuple of int
        Of the networks behind the numbers.
    clean, certified : tuple of float
        Mean and standard deviation over the seeds, on all test digits; certified at the largest
        radius.
    """

    seeds: tuple[int, ...]
    clean: tuple[float, float]
    certified: tuple[float, float]


def entries(record: Record) -> dict[str, Entry]:
    """Read the numbers of a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("mnist_small")``.

    Returns
    -------
    dict of str to Entry
        For each method, in order.

    Raises
    ------
    ValueError
        A method has fewer seeds than three, or one of them twice.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> list(entries(records.read("mnist_small")))
    ['BCOP', 'RKO', 'OSSN', 'SVCM', 'BCOP, StiefelMuon']
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in record.results["rows"]:
        found.setdefault(one["method"], []).append(one)
    return {method: _entry(record.name, method, table) for method, table in found.items()}


def _entry(name: str, method: str, table: Sequence[Mapping[str, Any]]) -> Entry:
    seeds = tuple(sorted({one["seed"] for one in table}))
    if len(seeds) < SEEDS or len(seeds) < len(table):
        raise ValueError(
            f"record {name!r}: expected {SEEDS} seeds or more for {method!r}, each once, "
            f"got {[one['seed'] for one in table]}"
        )

    def spread(values: list[float]) -> tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values)

    return Entry(
        seeds,
        clean=spread([one["test"]["clean"] for one in table]),
        certified=spread([one["test"]["certified"][-1] for one in table]),
    )
