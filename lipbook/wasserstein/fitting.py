"""Ascent of a critic on the dual, with held-out intervals and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from lipbook._extras import imported
from lipbook.norms.arguments import _real
from lipbook.wasserstein.clouds import (
    check_count,
    check_finite,
    check_points,
    check_tensor,
    check_weights,
)
from lipbook.wasserstein.critics import evaluate, evaluate_in_chunks, first_parameter

__all__ = [
    "HeldOut",
    "CriticHistory",
    "fit_critic",
]

Sampler = Callable[[int, torch.Generator], Tensor]
Penalty = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


class HeldOut(NamedTuple):
    """Difference of a critic's means on points that it was not fitted to.

    ``low`` and ``high`` are the ends of a confidence interval for its value on the distributions
    that the points were drawn from: asymptotic, by the central limit theorem.
    """

    step: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class CriticHistory:
    """What :func:`fit_critic` saw on its way.

    All numbers are differences of means, without any division by a Lipschitz bound.

    Parameters
    ----------
    steps : list of int
        1, 2, ...
    values : list of float
        The difference on the batch of each step, before its update and without penalty.
    held_out : list of HeldOut
        The differences on held-out points; empty without any.

    Examples
    --------
    >>> critic = nn.Linear(1, 1, bias=False)
    >>> history = fit_critic(critic, torch.ones(1, 1), torch.zeros(1, 1), steps=3, lr=0.1)
    >>> history.steps, history.values[0] < history.values[-1]
    ([1, 2, 3], True)
    """

    steps: list[int]
    values: list[float]
    held_out: list[HeldOut]


@torch.inference_mode(False)
def fit_critic(
    critic: nn.Module,
    x: Tensor | Sampler,
    y: Tensor | Sampler,
    *,
    steps: int,
    lr: float,
    batch_size: int | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    schedule: Literal["constant", "cosine"] = "constant",
    penalty: Penalty | None = None,
    project: Callable[[nn.Module], object] | None = None,
    held_out: int | tuple[Tensor, Tensor] | None = None,
    held_out_every: int | None = None,
    confidence: float = 0.95,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> CriticHistory:
    r"""Fit a critic by gradient ascent on the Kantorovich–Rubinstein dual.

    .. math:: \max_\theta\; \operatorname{E}_P f_\theta - \operatorname{E}_Q f_\theta

    The constraint :math:`\operatorname{Lip}(f_\theta) \le 1` is the critic's own business: one
    built of the layers of :mod:`lipbook.orthogonal` and :mod:`lipbook.activations` has it for
    every :math:`\theta`, and ends as a lower bound (:func:`kantorovich_dual`). One that is kept in
    check by ``project=clip_weights_``, by ``penalty=gradient_penalty`` or by torch's
    ``spectral_norm``, whose norm is estimated from below, ends as an estimate.

    :math:`P` and :math:`Q` are finite clouds, given as tensors, or distributions, given as
    samplers. In the first case the value that is maximised is at most :math:`W_1` between the
    clouds, which overestimates that between the distributions they came from; in the second, no
    point is seen twice and the ascent is on the population. Either way, held-out points
    give an honest interval.

    Gradients are computed whatever the caller's mode, ``torch.no_grad`` and
    ``torch.inference_mode`` included; but parameters that were made under the latter cannot be
    fitted.

    With the same seed, the same critic ends with the same parameters bit for bit (same machine,
    same number of threads). With ``checkpoint``, so does a run that was killed at any time and is
    started again: the file holds the parameters, the optimiser, the random states, torch's
    global one included, and the history. It is replaced in one move, never half-written.

    Parameters
    ----------
    critic : torch.nn.Module
        Maps (batch, ...) to (batch,) or (batch, 1). It is fitted in place, in its dtype and on
        its device, and left in evaluation mode.
    x, y : torch.Tensor or callable
        Points (n, ...) of float32 or float64, or ``sampler(n, generator)``, which
        returns n points and draws from the CPU generator only.
    steps : int
        Number of updates.
    lr : float
        Learning rate.
    batch_size : int, optional
        Points a side in a step: fresh draws from a sampler, draws with replacement from a tensor.
        All points unless given; samplers need it. Both batches go through the critic as one.
    x_weights, y_weights : torch.Tensor, optional
        Masses of the points of a tensor, >= 0 with sum 1.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` makes a :class:`torch.optim.Optimizer`.
    schedule : str
        ``"constant"``, or ``"cosine"``: from ``lr`` to 0 as half a cosine.
    penalty : callable, optional
        ``penalty(critic, x_batch, y_batch, generator)`` is subtracted from the value.
    project : callable, optional
        ``project(critic)`` runs after each update.
    held_out : int or pair of torch.Tensor, optional
        Points to judge by: how many to draw from each sampler, once, or two tensors.
    held_out_every : int, optional
        Steps between two looks at them; only after the last step unless given.
    confidence : float
        Of the held-out interval.
    checkpoint : path, optional
        File to save to, and to continue from if it exists. Settings and shapes are compared
        with those of the run that wrote it; points, samplers and functions cannot be.
    checkpoint_every : int
        Steps between two saves; the last step saves too.
    seed : int
        Seed of batches; that of held-out points is derived from it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    CriticHistory

    Raises
    ------
    TypeError, ValueError
        An argument is unusable, or the checkpoint is of another run; the message says which.
    FloatingPointError
        The value became NaN or infinite.

    Examples
    --------
    Two points at distance 5; the critic learns the direction, and its constraint the slope:

    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> from lipbook.wasserstein import kantorovich_dual
    >>> critic = OrthogonalLinear(2, 1)
    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> history = fit_critic(critic, x, y, steps=200, lr=0.05, schedule="cosine")
    >>> bool(4.99 < kantorovich_dual(critic, x, y) < 5.001)
    True

    References
    ----------
    :cite:t:`arjovsky2017`; :cite:t:`anil2019sorting` for constrained critics.
    """
    like = first_parameter(critic)
    if not isinstance(critic, nn.Module) or like is None:
        raise TypeError(f"critic must be a torch.nn.Module with parameters, got {critic!r}")
    if not callable(optimizer):
        raise TypeError(f"optimizer must be callable, got {optimizer!r}")
    _check_parameters(critic)
    _check_fit(steps, lr, batch_size, schedule, confidence, checkpoint_every, held_out_every, seed)
    steps, lr, seed = int(steps), float(lr), int(seed)
    batch_size = None if batch_size is None else int(batch_size)
    sides = [_Side("x", x, x_weights, batch_size), _Side("y", y, y_weights, batch_size)]
    judge = _held_out(held_out, sides, seed)
    if held_out_every is not None and judge is None:
        raise ValueError("held_out must be given with held_out_every, got None")
    run = _Run(critic, optimizer(critic.parameters(), lr=lr), torch.Generator().manual_seed(seed))
    setting = {
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "schedule": schedule,
        "seed": seed,
        "optimizer": type(run.optimizer).__name__,
        "penalty": penalty is not None,
        "project": project is not None,
        "x": sides[0].describe(),
        "y": sides[1].describe(),
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path, setting)

    critic.train()
    for step in _counted(range(len(run.values) + 1, steps + 1), progress):
        if schedule == "cosine":
            for group in run.optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        _ascend(run, [side.batch(run.generator).to(like) for side in sides], sides, penalty)
        if project is not None:
            project(critic)
        last = step == steps
        if judge is not None and (last or (held_out_every and step % held_out_every == 0)):
            run.held_out.append(_judged(critic, judge, step, confidence))
        if path is not None and (last or step % checkpoint_every == 0):
            run.save(path, setting)
    critic.eval()
    return CriticHistory(list(range(1, len(run.values) + 1)), run.values, run.held_out)


def _check_fit(
    steps: int,
    lr: float,
    batch_size: int | None,
    schedule: str,
    confidence: float,
    checkpoint_every: int,
    held_out_every: int | None,
    seed: int,
) -> None:
    check_count("steps", steps)
    check_count("checkpoint_every", checkpoint_every)
    check_count("seed", seed, 0)
    for name, value in (("batch_size", batch_size), ("held_out_every", held_out_every)):
        if value is not None:
            check_count(name, value)
    _real("lr", lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be finite and > 0, got {lr}")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f'schedule must be "constant" or "cosine", got {schedule!r}')
    _real("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def _check_parameters(critic: nn.Module) -> None:
    parameters = list(critic.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "critic must have parameters that can be trained, got some that were made under "
            "torch.inference_mode: make the critic outside of it"
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("critic must have a parameter that requires a gradient, got none")


def _plain(values: Tensor) -> Tensor:
    """Copy a tensor that was made under torch.inference_mode, of which gradients are refused."""
    return values.clone() if values.is_inference() else values


def _ascend(run: _Run, batches: list[Tensor], sides: list[_Side], penalty: Penalty | None) -> None:
    """Take one step on a pair of batches, in one forward pass."""
    if batches[0].shape[1:] != batches[1].shape[1:]:
        raise ValueError(
            f"y must have points of the shape of those of x, {tuple(batches[0].shape[1:])}, "
            f"got {tuple(batches[1].shape[1:])}"
        )
    values = evaluate(run.critic, torch.cat(batches))
    on_x, on_y = (
        v.mean() if side.weights is None or side.batch_size else v @ side.weights.to(v)
        for v, side in zip(values.split([len(b) for b in batches]), sides, strict=True)
    )
    loss = on_y - on_x
    if penalty is not None:
        loss = loss + penalty(run.critic, batches[0], batches[1], run.generator)
    if not loss.isfinite():
        raise FloatingPointError(
            f"the value is {(on_x - on_y).item():g}, the loss {loss.item():g} "
            f"at step {len(run.values) + 1}: the learning rate may be too large for this critic"
        )
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.values.append((on_x - on_y).item())


@dataclasses.dataclass
class _Side:
    """One of the two distributions of a fit."""

    name: str
    source: Tensor | Sampler
    weights: Tensor | None
    batch_size: int | None

    def __post_init__(self) -> None:
        if isinstance(self.source, (Tensor, np.ndarray)):
            check_points(self.name, self.source)
            check_weights(f"{self.name}_weights", self.weights, self.source)
            self.source = _plain(self.source)
            self.weights = None if self.weights is None else _plain(self.weights)
        elif not callable(self.source):
            raise TypeError(
                f"{self.name} must be a tensor or a sampler(n, generator), "
                f"got {type(self.source).__name__}"
            )
        elif self.batch_size is None:
            raise ValueError(f"batch_size must be given, since {self.name} is a sampler, got None")
        elif self.weights is not None:
            raise ValueError(f"{self.name}_weights must be None, since {self.name} is a sampler")

    def describe(self) -> str:
        if isinstance(self.source, Tensor):
            return f"tensor of shape {tuple(self.source.shape)}"
        return "sampler"

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Ask the sampler for points."""
        points = cast(Sampler, self.source)(number, generator)
        check_tensor(f"{self.name} must return", points)
        if points.dim() < 2 or len(points) != number:
            raise ValueError(
                f"{self.name} must return {number} points, of shape ({number}, ...), "
                f"got {tuple(points.shape)}"
            )
        check_finite(f"points of the sampler {self.name}", points)
        return _plain(points)

    def batch(self, generator: torch.Generator) -> Tensor:
        if not isinstance(self.source, Tensor):
            return self.draw(cast(int, self.batch_size), generator)
        if self.batch_size is None:
            return self.source
        if self.weights is None:
            chosen = torch.randint(len(self.source), (self.batch_size,), generator=generator)
        else:
            weights = self.weights.cpu()
            chosen = torch.multinomial(weights, self.batch_size, True, generator=generator)
        return self.source[chosen.to(self.source.device)]


def _held_out(
    held_out: int | tuple[Tensor, Tensor] | None, sides: list[_Side], seed: int
) -> list[Tensor] | None:
    if held_out is None:
        return None
    if isinstance(held_out, Integral):
        held_out = check_count("held_out", cast(int, held_out), 2)
        if any(isinstance(side.source, Tensor) for side in sides):
            raise ValueError(
                f"held_out must be a pair of tensors unless x and y are samplers, got {held_out}"
            )
        other = np.random.SeedSequence([seed, 1]).generate_state(1)
        generator = torch.Generator().manual_seed(int(other[0]))
        return [side.draw(held_out, generator) for side in sides]
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be an int or a pair of tensors, got {held_out!r}")
    for points in held_out:
        check_points("held_out", points)
        if len(points) < 2:
            raise ValueError(f"held_out must have 2 points a side, got {len(points)}")
    return list(held_out)


def _judged(critic: nn.Module, judge: list[Tensor], step: int, confidence: float) -> HeldOut:
    critic.eval()
    try:
        x, y = (evaluate_in_chunks(critic, points) for points in judge)
    finally:
        critic.train()
    value = (x.mean() - y.mean()).item()
    spread = math.sqrt(x.var().item() / len(x) + y.var().item() / len(y))
    width = NormalDist().inv_cdf((1 + confidence) / 2) * spread
    return HeldOut(step, value, value - width, value + width)


def _counted(steps: range, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    return imported("tqdm").tqdm(steps, desc="critic")


@dataclasses.dataclass
class _Run:
    """State of a fit: all that a checkpoint holds."""

    critic: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    values: list[float] = dataclasses.field(default_factory=list)
    held_out: list[HeldOut] = dataclasses.field(default_factory=list)

    def save(self, path: Path, setting: dict[str, Any]) -> None:
        """Write to a temporary file and move it, so that ``path`` is always whole."""
        state = {
            "setting": setting,
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "values": self.values,
            "held_out": [tuple(look) for look in self.held_out],
        }
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path, setting: dict[str, Any]) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["setting"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {path} is no checkpoint of fit_critic: {error}"
            ) from error
        wrong = [f"{k} {found.get(k)} not {v}" for k, v in setting.items() if found.get(k) != v]
        if wrong:
            raise ValueError(f"checkpoint {path} is of another run: {', '.join(wrong)}")
        try:
            self.critic.load_state_dict(state["critic"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {path} is of another critic: {error}") from error
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.values = state["values"]
        self.held_out = [HeldOut(*look) for look in state["held_out"]]
