r"""Randomized smoothing beside a Lipschitz bound: equal digits, epochs and shape.

Both kinds of network are 784-128-128-10 and learn the 12,000 digits that ship for as many epochs,
slightly distorted. The networks of ReLUs see noise of standard deviation :math:`\sigma` too, and
are smoothed with it (:cite:t:`cohen2019`); the others have orthonormal weights and MaxMin, and are
certified by their margins (:func:`lipbook.robustness.certify`), and once more by smoothing. All
certificates are of the same test digits. A smoothed radius takes 100,000 noisy copies of a digit.
Since the first layer is linear, it sees each copy of the noise once for all digits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.lab.augmentation import distorted
from lipbook.lab.data import Mnist, mnist
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows, mnist_best
from lipbook.lab.training import train
from lipbook.losses import OffsetCrossEntropyLoss, margin_for_radius
from lipbook.robustness import Certificate, smoothed_radius

__all__ = ["EPSILONS", "SIGMAS", "SIZES", "SMALL", "certify", "counts", "fit", "row", "run"]

#: Numbers of units, the same for all networks.
SIZES = (784, 128, 128, 10)
#: Standard deviations of the noise.
SIGMAS = (0.25, 0.5, 1.0)
#: Those of them with which the Lipschitz networks are smoothed.
SMALL = SIGMAS[:2]
#: Radii at which accuracies are certified.
EPSILONS = (*(round(0.1 * k, 1) for k in range(31)), 1.58)
COPIES = 20_000  # that are evaluated at a time


def fit(digits: Mnist, sigma: float | None, *, epochs: int = 15, seed: int = 0) -> nn.Sequential:
    r"""Train one network.

    Parameters
    ----------
    digits : Mnist
        To train on.
    sigma : float, optional
        Of the noise that a network of ReLUs is trained with, by cross-entropy. Without it, train
        orthonormal weights and MaxMin with the offset of radius 1.5.
    epochs : int
        Passes over the digits. The last parameters are taken.
    seed : int
        Of weights, batches, distortions and noise.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode.
    """
    if sigma is None:
        loss = OffsetCrossEntropyLoss(margin_for_radius(1.5), 0.2)
        model, _ = mnist_best.fit(
            SIZES, digits.train_images, digits.train_labels,
            loss=loss, epsilon=1.58, epochs=epochs, lr=0.08, batch_size=128, validation=0,
            precision="float32", seed=seed,
        )  # fmt: skip
        return model

    def noisy(images: Tensor, rng: np.random.Generator) -> Tensor:
        noise = rng.standard_normal(images.shape, np.float32)
        return distorted(images, rng) + sigma * torch.from_numpy(noise)

    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in itertools.pairwise(SIZES):
        layers += [nn.Linear(n, m), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    train(
        model, digits.train_images, digits.train_labels,
        epochs=epochs, lr=1e-3, optimizer=torch.optim.Adam, schedule="linear", augment=noisy,
        seed=seed,
    )  # fmt: skip
    return model


@torch.no_grad()
def counts(model: nn.Sequential, x: Tensor, sigma: float, noise: Tensor) -> Tensor:
    r"""Count the decisions at noisy copies :math:`x + \sigma \eta` of one image.

    .. math:: W (x + \sigma\eta) + b = (W x + b) + \sigma\, W \eta

    Parameters
    ----------
    model : torch.nn.Sequential
        A flattening, a linear layer, and the rest.
    x : torch.Tensor
        (1, \*size).
    sigma : float
        Standard deviation of the noise.
    noise : torch.Tensor
        :math:`W \eta`, (copies, units), what the linear layer makes of standard normal noise.

    Returns
    -------
    torch.Tensor
        How often each class is decided for, (classes,).

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> x, noise = torch.rand(1, 2, 2), torch.randn(50, 4)
    >>> plain = model(x.flatten() + 0.5 * noise).argmax(1).bincount(minlength=3)
    >>> torch.equal(plain, counts(model, x, 0.5, noise @ model[1].weight.T))
    True
    """
    first, rest = model[:2](x[None]), model[2:]
    found = torch.zeros((), dtype=torch.int64)
    for part in noise.split(COPIES):
        logits = rest(first + sigma * part)
        found = found + logits.argmax(1).bincount(minlength=logits.shape[1])
    return found


def certify(
    model: nn.Sequential,
    images: Tensor,
    labels: Tensor,
    sigma: float,
    *,
    samples: int = 100_000,
    selection: int = 1000,
    seed: int = 0,
) -> Certificate:
    r"""Certify a smoothed network, as :func:`lipbook.robustness.certify_by_smoothing` does.

    One draw of noise selects the class of each image, and another one counts it. The noise is the
    same for all images: the certificate of each one alone holds with probability 0.999.

    Parameters
    ----------
    model, sigma
        As in :func:`counts`.
    images, labels : torch.Tensor
        To certify.
    samples, selection : int
        Copies to count, and to select the class.
    seed : int
        Of the noise.

    Returns
    -------
    lipbook.robustness.Certificate
    """
    generator = torch.Generator().manual_seed(seed)
    weight = cast(nn.Linear, model[1]).weight.detach()

    def drawn(n: int) -> Tensor:
        sizes = [min(COPIES, n - start) for start in range(0, n, COPIES)]
        eta = (torch.randn(size, weight.shape[1], generator=generator) for size in sizes)
        return torch.cat([part @ weight.mT for part in eta])

    selecting, counting = drawn(selection), drawn(samples)
    radius, predictions = [], []
    for x in images:
        top = int(counts(model, x, sigma, selecting).argmax())
        seen = int(counts(model, x, sigma, counting)[top])
        radius.append(smoothed_radius(seen, samples, sigma))
        predictions.append(top if radius[-1] > 0 else -1)
    found = torch.tensor(radius, dtype=torch.float64), torch.tensor(predictions), labels
    return Certificate(*found, 2.0, False)


def row(
    digits: Mnist,
    images: Tensor,
    labels: Tensor,
    sigma: float | None,
    *,
    samples: int = 100_000,
    epochs: int = 15,
    seed: int = 0,
) -> Outcome:
    """Train a network and certify it: by smoothing or, with orthonormal weights, in every way.

    Parameters
    ----------
    digits, sigma, epochs
        As in :func:`fit`.
    images, labels : torch.Tensor
        To certify.
    samples : int
        As in :func:`certify`.
    seed : int
        Of the network and of the noise.

    Returns
    -------
    tuple of dict
        Results: ``curves``, a list with ``kind``, ``sigma`` (null for the margin), ``seed`` and
        ``certified``, the accuracy at each of ``EPSILONS``. No tensors.
    """
    model = fit(digits, sigma, epochs=epochs, seed=seed)
    found: list[tuple[str, float | None, Certificate]] = []
    smoothed = functools.partial(certify, model, images, labels, samples=samples, seed=seed)
    if sigma is None:
        found.append(("Lipschitz", None, certificate(model, images, labels)))
        found += [("smoothed Lipschitz", s, smoothed(s)) for s in SMALL]
    else:
        found.append(("smoothed", sigma, smoothed(sigma)))
    curves = [
        {"kind": kind, "sigma": s, "seed": seed}
        | {"certified": [result.certified_accuracy(e).value for e in EPSILONS]}
        for kind, s, result in found
    ]
    return {"curves": curves}, {}


def run(
    *,
    count: int = 100,
    samples: int = 100_000,
    epochs: int = 15,
    seeds: int = 3,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Train and certify all networks.

    Parameters
    ----------
    count : int
        Test digits, as many of each class.
    samples, epochs
        As in :func:`row`.
    seeds : int
        Networks of each kind.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``epsilons``, ``count``, ``samples``, ``largest`` (for each of ``SIGMAS`` the
        largest radius that the samples can give), and ``curves``, those of :func:`row`. No tensors.
    """
    rows = rows or Rows()
    digits = mnist()
    some = slice(0, len(digits.test_labels), len(digits.test_labels) // count)
    images, labels = digits.test_images[some], digits.test_labels[some]
    kinds: Sequence[float | None] = (None, *SIGMAS)
    grid = list(itertools.product(kinds, range(seed, seed + seeds)))
    curves: list[dict[str, Any]] = []
    for sigma, i in rows.bar(grid, "networks"):
        one = functools.partial(
            row, digits, images, labels, sigma, samples=samples, epochs=epochs, seed=i
        )
        curves += rows.compute(f"sigma {sigma} seed {i}", one)[0]["curves"]
    return {
        "epsilons": list(EPSILONS),
        "count": len(labels),
        "samples": samples,
        "largest": [smoothed_radius(samples, samples, s) for s in SIGMAS],
        "curves": curves,
    }, {}
