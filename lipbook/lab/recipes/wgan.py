r"""A small Wasserstein GAN of digits: an exactly 1-Lipschitz critic against clipping and a penalty.

Digits are 14 × 14 pixels, means of 2 × 2 pixels of MNIST, in [0, 1]; distances are Euclidean in
these units. The same generator is trained against three critics of the same shape at several
learning rates: orthogonal convolutions and dense layers with MaxMin (``BCOP``); torch's layers with
ReLU and weights clipped to [-0.01, 0.01] (``clipping``); torch's layers with ReLU and a gradient
penalty (``penalty``). On the way, the value of the critic stands beside the exact distance of the
same held-out digits and generated digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.convolutions import OrthogonalConv2d
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import (
    clip_weights_,
    critic_difference,
    gradient_penalty,
    wasserstein1,
)

__all__ = ["METHODS", "run", "row", "critic", "generator", "small_digits"]

LATENT = 16
BATCH = 64
METHODS = ("BCOP", "clipping", "penalty")

_adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.9))
# Each method with the optimiser of its paper, the orthogonal critic with that of the penalty.
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "BCOP": _adam,
    "clipping": torch.optim.RMSprop,
    "penalty": _adam,
}


def critic(method: str) -> nn.Sequential:
    """Build a critic with fresh weights.

    Parameters
    ----------
    method : str
        One of ``METHODS``.

    Returns
    -------
    torch.nn.Sequential
        Maps (batch, 1, 14, 14) to (batch, 1).
    """
    if method == "BCOP":
        return nn.Sequential(
            OrthogonalConv2d(1, 16, 4, 2),
            MaxMin(),
            OrthogonalConv2d(16, 32, 3),
            MaxMin(),
            nn.Flatten(),
            OrthogonalLinear(32 * 7 * 7, 64),
            MaxMin(),
            OrthogonalLinear(64, 1),
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 1, 1, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 1),
    )


def generator() -> nn.Sequential:
    """Build a generator with fresh weights.

    Returns
    -------
    torch.nn.Sequential
        Maps codes (n, 16) to images (n, 1, 14, 14) in [0, 1].
    """
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, 196),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 14, 14)),
    )


def small_digits() -> tuple[Tensor, Tensor]:
    """Load the digits that ship with the package at half their height and width.

    Returns
    -------
    tuple of torch.Tensor
        Training and test images in [0, 1], (n, 1, 14, 14).
    """
    digits = mnist()
    return (
        functional.avg_pool2d(digits.train_images, 2),
        functional.avg_pool2d(digits.test_images, 2),
    )


def row(
    method: str,
    lr: float,
    *,
    steps: int = 400,
    critic_steps: int = 3,
    looks: int = 8,
    count: int = 512,
    shown: int = 40,
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    r"""Train a generator against one critic.

    Parameters
    ----------
    method : str
        One of ``METHODS``.
    lr : float
        Learning rate of the critic and of the generator.
    steps : int
        Steps of the generator.
    critic_steps : int
        Steps of the critic before each of them.
    looks : int
        How often the distance is measured.
    count : int
        Held-out digits, and generated ones, that it is measured on.
    shown : int
        Generated digits that are kept.
    seed : int
        Of the weights, batches and codes.
    device : str
        Where to train.

    Returns
    -------
    tuple of dict
        Results: ``method``, ``lr``, and lists with one entry a look: ``step``; ``exact``, the
        distance by POT; ``value``, the difference of the means of the critic on the same points;
        ``bound``, its Lipschitz bound; ``slope``, the largest norm of its gradient at those
        points. ``failed`` is the step at which a number was not finite, or ``None``.
        Tensors: the last digits, uint8.
    """
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    train, held_out = small_digits()
    held_out = held_out[:count]
    model, judge = generator().to(device), critic(method).to(device)
    codes = torch.randn(max(count, shown), LATENT, generator=draws)
    critic_optimizer = _OPTIMIZERS[method](judge.parameters(), lr=lr)
    optimizer = _OPTIMIZERS[method](model.parameters(), lr=lr)
    results: dict[str, Any] = {"method": method, "lr": lr, "failed": None}
    curves: dict[str, list[Any]] = {k: [] for k in ("step", "exact", "value", "bound", "slope")}

    def fakes() -> Tensor:
        return model(torch.randn(BATCH, LATENT, generator=draws).to(device))

    def look(step: int) -> None:
        with torch.no_grad():
            images = model(codes[:count].to(device)).cpu()
        points = torch.cat((held_out, images)).to(device).requires_grad_()
        (gradient,) = torch.autograd.grad(judge(points).sum(), points)
        curves["step"].append(step)
        curves["exact"].append(wasserstein1(held_out.double(), images.double()).item())
        curves["value"].append(critic_difference(judge, held_out, images).item())
        curves["bound"].append(lipschitz_bound(judge, (1, 14, 14)).value)
        curves["slope"].append(gradient.flatten(1).norm(dim=1).max().item())

    look(0)
    for step in range(1, steps + 1):
        for _ in range(critic_steps):
            real = train[torch.randint(len(train), (BATCH,), generator=draws)].to(device)
            with torch.no_grad():
                fake = fakes()
            outputs = judge(torch.cat((real, fake)))
            loss = outputs[BATCH:].mean() - outputs[:BATCH].mean()
            if method == "penalty":
                loss = loss + gradient_penalty(judge, real, fake, draws)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            if method == "clipping":
                clip_weights_(judge, 0.01)
        value = -judge(fakes()).mean()
        if not (value.isfinite() and loss.isfinite()):
            results["failed"] = step
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step * looks // steps > (step - 1) * looks // steps:
            look(step)
    with torch.no_grad():
        images = model(codes[:shown].to(device)).cpu()
    return results | curves, {f"{method}/{lr:g}": (255 * images).round().byte()}


def run(
    *,
    methods: Sequence[str] = METHODS,
    lrs: Sequence[float] = (1e-4, 1e-3, 1e-2),
    steps: int = 400,
    critic_steps: int = 3,
    count: int = 512,
    seed: int = 0,
    device: str = "cpu",
    rows: Rows | None = None,
) -> Outcome:
    r"""Train a generator against each critic at each learning rate.

    Parameters
    ----------
    methods : sequence of str
        Of ``METHODS``.
    lrs : sequence of float
        Learning rates.
    steps, critic_steps, count, seed, device
        As in :func:`row`.
    rows : Rows, optional
        Keeps finished runs.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``steps``, ``critic_steps``, ``count``; and
        ``real_to_real``, the distance of the held-out digits to as many training digits.
        Tensors: generated digits, uint8, with the names "method/lr".
    """
    rows = rows or Rows()
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    grid = [(method, lr) for method in methods for lr in lrs]
    sizes: dict[str, Any] = {"steps": steps, "critic_steps": critic_steps, "count": count}
    for method, lr in rows.bar(grid, "runs"):
        one = functools.partial(row, method, lr, **sizes, seed=seed, device=device)
        results, images = rows.compute(f"{method} {lr:g}", one)
        table.append(results)
        tensors |= images
    train, held_out = small_digits()
    floor = wasserstein1(held_out[:count].double(), train[:count].double()).item()
    return {"rows": table, **sizes, "real_to_real": floor}, tensors
