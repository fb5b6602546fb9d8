r"""A fixed generator of digits: the decoder of a variational autoencoder.

The encoder gives a normal distribution :math:`\mathcal N(\mu(x), \operatorname{diag} s(x)^2)` of
codes for each digit :math:`x`; the decoder gives the ink for a code. Both minimise

.. math:: \operatorname{E}_z\, \operatorname{BCE}(x, g(z))
    + \operatorname{KL}\big(\mathcal N(\mu(x), s(x)^2)\, \|\, \mathcal N(0, I)\big).

Fed with :math:`\mathcal N(0, I)` the decoder is the generator, a distribution of images in [0, 1]
that stays the same for every critic and that anyone can sample. It is trained in float32 on the
first 8,000 of the 12,000 training digits that ship with the package. The other 4,000 are left to
the critics; test digits are not quite like those, they have more ink.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.lab import records
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.wasserstein import wasserstein1

__all__ = ["run", "decoder", "generate", "load"]

LATENT = 16
TRAINED_ON = 8_000  # the first training digits; critics see the others


def decoder() -> nn.Sequential:
    """Build the decoder with fresh weights: codes (n, 16) to images (n, 1, 28, 28) in [0, 1].

    Returns
    -------
    torch.nn.Sequential
        Three dense layers.
    """
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, 784),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 28, 28)),
    )


def load() -> nn.Sequential:
    """Build the decoder with the recorded weights.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode, its parameters frozen.

    Raises
    ------
    FileNotFoundError
        If there is no record yet.
    """
    model = decoder()
    model.load_state_dict(dict(records.read("digit_generator").tensors))
    return model.requires_grad_(False).eval()


def generate(model: nn.Module, n: int, seed: int) -> Tensor:
    """Draw images from a generator.

    Parameters
    ----------
    model : torch.nn.Module
        Maps codes (n, 16) to images.
    n : int
        Number of images.
    seed : int
        Of :func:`numpy.random.default_rng`, which draws the codes.

    Returns
    -------
    torch.Tensor
        Images in [0, 1], (n, 1, 28, 28) float32.
    """
    codes = np.random.default_rng(seed).standard_normal((n, LATENT))
    with torch.no_grad():
        return model(torch.from_numpy(codes).float())


def run(
    *,
    epochs: int = 60,
    batch_size: int = 128,
    lr: float = 2e-3,
    count: int = 1000,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    r"""Train the autoencoder and measure the generator on held-out digits.

    Parameters
    ----------
    epochs : int
        Passes over the 8,000 digits.
    batch_size : int
        Digits in a step.
    lr : float
        Largest rate of Adam, on a one-cycle schedule.
    count : int
        Images on each side when distances are measured.
    seed : int
        Of the weights, the batches and the noise.
    rows : Rows, optional
        Keeps the trained generator.

    Returns
    -------
    tuple of dict
        Results: ``loss`` of each epoch (nats a digit); ``count``; ``generated_seed``; the exact
        :math:`W_1` of as many of the last digits to generated ones (``real_to_generated``), to
        the first digits (``real_to_real``), and of two sets of generated ones
        (``generated_to_generated``). Tensors: the weights of the decoder.
    """
    rows = rows or Rows()
    results, weights = rows.compute("training", lambda: _train(epochs, batch_size, lr, seed, rows))
    model = decoder()
    model.load_state_dict(weights)
    images = mnist().train_images.double()
    real, more = images[-count:], images[:count]
    generated, others = (generate(model, count, seed + k).double() for k in (1, 2))
    results |= {
        "count": count,
        "generated_seed": seed + 1,
        "real_to_generated": wasserstein1(real, generated).item(),
        "real_to_real": wasserstein1(real, more).item(),
        "generated_to_generated": wasserstein1(generated, others).item(),
    }
    return results, weights


def _train(epochs: int, batch_size: int, lr: float, seed: int, rows: Rows) -> Outcome:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = mnist().train_images[:TRAINED_ON]
    encoder: Any = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 2 * LATENT),
    )
    model = decoder()
    parameters = [*encoder.parameters(), *model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in rows.bar(range(epochs), "epochs"):
        total = 0.0
        for batch in torch.from_numpy(rng.permutation(len(images))).split(batch_size):
            inputs = images[batch]
            mean, log_variance = encoder(inputs).chunk(2, dim=1)
            noise = torch.from_numpy(rng.standard_normal(mean.shape)).float()
            outputs = model(mean + (log_variance / 2).exp() * noise)
            error = functional.binary_cross_entropy(outputs, inputs, reduction="sum")
            divergence = (mean**2 + log_variance.exp() - log_variance - 1).sum() / 2
            loss = (error + divergence) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(images))
    return {"loss": losses}, {name: value.detach() for name, value in model.state_dict().items()}
