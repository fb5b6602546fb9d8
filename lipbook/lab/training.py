"""One readable training loop, the same for every chapter and every recipe."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lipbook._extras import imported

__all__ = ["History", "train", "accuracy"]

Schedule = Literal["constant", "cosine", "linear"] | Callable[[float], float]
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
}
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class History:
    """What a training run did, epoch by epoch.

    Attributes
    ----------
    losses : list of float
        The mean of the loss over the examples of each epoch, measured on the way: each example
        sees the parameters of the step that used it.
    scores : list of float
        The score on the validation examples after each epoch; empty without validation.

    Examples
    --------
    >>> History([0.9, 0.5, 0.4], scores=[0.6, 0.8, 0.7]).best_epoch
    2
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The epoch with the highest score, the first of equal ones; the last without scores."""
        if not self.scores:
            return len(self.losses)
        return 1 + max(range(len(self.scores)), key=self.scores.__getitem__)


def train(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    optimizer: Literal["sgd"] | Callable[..., torch.optim.Optimizer] = "sgd",
    momentum: float | None = None,
    schedule: Schedule = "constant",
    augment: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
    validation: int = 0,
    score: Callable[[torch.nn.Module, Tensor, Tensor], float] | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> History:
    r"""Train a model by minibatch gradient descent and return the history of the epochs.

    One step on a batch :math:`B` of a shuffled epoch, with momentum :math:`\mu` and the rate
    :math:`\eta_t = \eta\, s(t)` after the part :math:`t \in [0, 1)` of all steps, is

    .. math::

        v \leftarrow \mu v + \nabla_\theta \frac1{|B|} \sum_{i \in B} \ell(f_\theta(x_i), y_i),
        \qquad \theta \leftarrow \theta - \eta_t v .

    The order of the examples comes from ``numpy.random.default_rng(seed)``. Hence a model that
    starts from the same parameters and draws nothing at random itself (no dropout) ends with
    the same parameters, bit for bit, on the same machine with the same number of threads.
    The model is trained in place, in its own dtype and on its own device, and is left in
    evaluation mode.

    **Several processes.** A script that calls this function is started with ``torchrun`` as it
    is. Each process takes its share of every batch, torch's ``DistributedDataParallel`` averages
    the gradients, and the result is that of one process up to the rounding of the sums. Put the
    model on the device of its process first.

    Parameters
    ----------
    model : torch.nn.Module
        Maps a batch of images to outputs; (batch, classes) for the default loss.
    images : Tensor
        (n, ...) inputs. They are cast to the dtype of the model batch by batch.
    labels : Tensor
        (n,) classes, int64, for the default loss; (n, ...) for another one.
    epochs : int
        Passes over the data.
    lr : float
        The rate :math:`\eta` of a step.
    batch_size : int
        Examples in a step, of all processes together. The last batch of an epoch may be smaller;
        none is dropped.
    loss : callable
        ``loss(outputs, labels)``, the mean of :math:`\ell` over the batch.
    optimizer : "sgd" or callable
        ``optimizer(parameters, lr=lr)`` makes a :class:`torch.optim.Optimizer`, for example
        :class:`torch.optim.Adam`. ``"sgd"`` is the step above.
    momentum : float, optional
        :math:`\mu` in [0, 1) for ``"sgd"``, where it is 0.9 unless given.
    schedule : "constant", "cosine", "linear" or callable
        The factor :math:`s(t)` of the rate: 1, :math:`(1 + \cos \pi t) / 2`, :math:`1 - t`, or
        yours.
    augment : callable, optional
        ``augment(images, rng)`` changes a batch of images, with a NumPy generator that depends on
        the seed and the epoch alone.
    validation : int
        How many of the examples, chosen by the seed, are not trained on. With some, the model ends
        with the parameters of the epoch whose score on them was highest. (Choosing on the
        *test* examples would make their score a training result.)
    score : callable, optional
        ``score(model, images, labels)`` for the validation; :func:`accuracy` unless given.
    precision : str
        ``"bfloat16"`` and ``"float16"`` run the model under autocast, float16 with a gradient
        scaler. Parameters keep their dtype.
    checkpoint : path, optional
        A file that is written after each epoch, and continued from if it exists. A run that was
        stopped at any moment and started again ends with the bits of one that was not. The
        file is replaced as a whole, and read without unpickling code.
    seed : int
        Seed of the order of the examples, of their split, and of ``augment``.
    progress : bool
        Show a progress bar over the epochs.

    Returns
    -------
    History
        Losses, and scores on the validation examples.

    Raises
    ------
    TypeError, ValueError
        An argument is unusable, or the checkpoint is of a run with other arguments; the message
        names it.
    FloatingPointError
        The loss became NaN or infinite; the message has the epoch and the step.

    Examples
    --------
    >>> import torch
    >>> from lipbook.lab.training import accuracy, train
    >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
    >>> y = (x[:, 0] > 0).long()
    >>> def trained():
    ...     model = torch.nn.Linear(1, 2, dtype=torch.float64)
    ...     _ = torch.nn.init.zeros_(model.weight)
    ...     _ = torch.nn.init.ones_(model.bias)
    ...     return model, train(model, x, y, epochs=20, lr=0.5).losses
    >>> (model, losses), (again, _) = trained(), trained()
    >>> losses[-1] < losses[0], accuracy(model, x, y)
    (True, 1.0)
    >>> torch.equal(model.weight, again.weight)
    True
    """
    parameter = _checked(model, images, labels)
    _check_count("epochs", epochs)
    _check_count("batch_size", batch_size)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a finite number > 0, got {lr}")
    if loss is cross_entropy:
        _check_classes(labels)
    rate = _rate(schedule, lr)
    descent = _optimizer(optimizer, momentum)(model.parameters(), lr=lr)
    fitted, held_out = _split(len(images), validation, seed)
    batches = math.ceil(len(fitted) / batch_size)
    rank, ranks = _processes()
    network = DistributedDataParallel(model) if ranks > 1 else model
    autocast, scaler = _precision(precision, parameter.device.type)
    run = _Run(model, descent, scaler, checkpoint)
    run.resume(
        epochs=epochs, lr=lr, batch_size=batch_size, momentum=momentum, validation=validation,
        precision=precision, seed=seed, examples=len(images), optimizer=type(descent).__name__,
    )  # fmt: skip

    rng = np.random.default_rng(seed)
    for epoch in _epochs(epochs, progress and rank == 0):
        order = fitted[torch.from_numpy(rng.permutation(len(fitted)))]
        if epoch <= len(run.history.losses):
            continue  # done before the run was stopped
        noise = np.random.default_rng([seed, epoch])
        model.train()
        total = 0.0
        for step, batch in enumerate(order.split(batch_size), start=1):
            inputs = images[batch] if augment is None else augment(images[batch], noise)
            share, weight = _share(len(batch), rank, ranks)
            targets = labels[batch][share].to(parameter.device)
            with autocast:
                outputs = network(inputs[share].to(parameter))
                if loss is cross_entropy:
                    _check_outputs(outputs, targets)
                value = loss(outputs, targets)
            if value.ndim != 0:
                raise ValueError(f"loss: expected a scalar, got shape {tuple(value.shape)}")
            value = value * weight  # so that the mean over the processes is that over the batch
            mean = _mean_over_processes(value.detach(), ranks)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"loss is {mean} at epoch {epoch}, step {step}: "
                    f"lr={lr} may be too large, or images may hold NaN"
                )
            run.descend(value, rate(((epoch - 1) * batches + step - 1) / (epochs * batches)))
            total += mean * len(batch)
        run.history.losses.append(total / len(fitted))
        if validation:
            run.judge((score or accuracy)(model, images[held_out], labels[held_out]))
        if rank == 0:
            run.save()
    run.finish()
    return run.history


def accuracy(
    model: torch.nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000
) -> float:
    r"""Fraction of the images whose largest output is that of their label.

    .. math::

        \frac1n \, \bigl|\{ i : \operatorname{arg\,max}_k f(x_i)_k = y_i \}\bigr|

    Parameters
    ----------
    model : torch.nn.Module
        Maps (batch, ...) to (batch, classes). It is put, and left, in evaluation mode.
    images : Tensor
        (n, ...) inputs, cast to the dtype of the model batch by batch.
    labels : Tensor
        (n,) classes, int64.
    batch_size : int
        Images evaluated at a time. It bounds the memory, not the result.

    Returns
    -------
    float
        A number in [0, 1]. Of tied outputs, the one of smallest index counts.

    Raises
    ------
    TypeError, ValueError
        An argument is unusable; the message names it.
    FloatingPointError
        An output is NaN, so that there is no largest one.

    Examples
    --------
    >>> import torch
    >>> from lipbook.lab.training import accuracy
    >>> scores = torch.tensor([[2.0, 1], [0, 3], [5, 4], [1, 2]])
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.eye_(model.weight)
    >>> accuracy(model, scores, torch.tensor([0, 1, 1, 1]))
    0.75
    """
    parameter = _checked(model, images, labels)
    _check_count("batch_size", batch_size)
    _check_classes(labels)
    model.eval()
    correct = 0
    with torch.no_grad():
        for inputs, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            outputs = model(inputs.to(parameter))
            _check_outputs(outputs, targets)
            if outputs.isnan().any():
                raise FloatingPointError("an output of the model is NaN")
            correct += int((outputs.argmax(1) == targets.to(outputs.device)).sum())
    return correct / len(images)


def _checked(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Check what both functions take; return a parameter, whose dtype and device decide."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model: expected a module with parameters, got one without")
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            advice = ""
            if isinstance(value, np.ndarray):
                advice = ": call torch.from_numpy"
            elif isinstance(value, Iterable):
                advice = ": join the batches of a loader, images, labels = map(torch.cat, zip(*it))"
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}{advice}")
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(f"{name}: expected at least one row, got {tuple(value.shape)}")
    if len(images) != len(labels):
        raise ValueError(
            f"labels: expected one for each of {len(images)} images, got {len(labels)}"
        )
    return parameter


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_classes(labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64 classes, got {labels.dtype}: call .long()")
    if labels.ndim != 1:
        raise ValueError(f"labels: expected shape (n,), got {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels: expected classes from 0 on, got {labels.min().item()}")


def _check_outputs(outputs: Tensor, labels: Tensor) -> None:
    if outputs.ndim != 2 or len(outputs) != len(labels):
        raise ValueError(
            f"model: expected outputs of shape ({len(labels)}, classes), got {tuple(outputs.shape)}"
        )
    if labels.max() >= outputs.shape[1]:
        raise ValueError(
            f"labels: expected classes below {outputs.shape[1]}, the model's number of outputs, "
            f"got {labels.max().item()}"
        )


def _optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer], momentum: float | None
) -> Callable[..., torch.optim.Optimizer]:
    if optimizer == "sgd":
        mu = 0.9 if momentum is None else momentum
        if not 0 <= mu < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        return lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=mu)
    if not callable(optimizer):
        raise ValueError(f'optimizer: expected "sgd" or a callable, got {optimizer!r}')
    if momentum is not None:
        raise ValueError(f'momentum: only for optimizer="sgd", got {momentum} with a callable')
    return optimizer


def _rate(schedule: Schedule, lr: float) -> Callable[[float], float]:
    if isinstance(schedule, str) and schedule in _SCHEDULES:
        schedule = _SCHEDULES[schedule]
    if not callable(schedule):
        raise ValueError(
            f"schedule: expected one of {(*_SCHEDULES,)} or a callable, got {schedule!r}"
        )
    return lambda t: lr * schedule(t)


def _precision(precision: str, device: str) -> tuple[Any, torch.amp.GradScaler]:
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {(*_PRECISIONS,)}, got {precision!r}")
    dtype = _PRECISIONS[precision]
    autocast = nullcontext() if dtype is None else torch.autocast(device, dtype)
    return autocast, torch.amp.GradScaler(device, enabled=dtype == torch.float16)


def _split(examples: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose the indices to train on and those to validate on, each in order."""
    if isinstance(validation, Iterable):
        raise TypeError(
            f"validation: expected a number of the {examples} examples, got "
            f"{type(validation).__name__}: other examples, such as test images, cannot choose"
        )
    if not isinstance(validation, int) or not 0 <= validation < examples:
        raise ValueError(
            f"validation: expected a number of the {examples} examples, got {validation!r}"
        )
    if validation == 0:
        return torch.arange(examples), torch.arange(0)
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(examples))
    return order[validation:].sort().values, order[:validation].sort().values


# ------------------------------------------------------------------------- several processes


def _processes() -> tuple[int, int]:
    """Rank of this process, and their number: joined if torchrun has started several."""
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(distributed.destroy_process_group)
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _share(examples: int, rank: int, ranks: int) -> tuple[slice, float]:
    """Which examples of a batch a process takes, and the weight of its mean loss."""
    start, end = rank * examples // ranks, (rank + 1) * examples // ranks
    if start == end:  # with fewer examples than processes: one must do something, and it counts 0
        return slice(0, 1), 0.0
    return slice(start, end), (end - start) * ranks / examples


def _mean_over_processes(value: Tensor, ranks: int) -> float:
    if ranks > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value = value / ranks
    return float(value.item())


# ------------------------------------------------------------------------------- checkpoints


class _Run:
    """The state of a run between two epochs."""

    def __init__(
        self,
        model: torch.nn.Module,
        descent: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.descent, self.scaler = model, descent, scaler
        self.path = None if checkpoint is None else Path(checkpoint)
        self.history = History()
        self.best: dict[str, Tensor] | None = None
        self.arguments = ""

    def descend(self, loss: Tensor, rate: float) -> None:
        for group in self.descent.param_groups:
            group["lr"] = rate
        self.descent.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.descent)
        self.scaler.update()

    def judge(self, score: float) -> None:
        """Keep the parameters if no epoch before had this score."""
        self.history.scores.append(float(score))
        if self.history.best_epoch == len(self.history.scores):
            self.best = copy.deepcopy(self.model.state_dict())

    def finish(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best)
        self.model.eval()

    def save(self) -> None:
        if self.path is None:
            return
        state = {
            "arguments": self.arguments,
            "model": self.model.state_dict(),
            "optimizer": self.descent.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "losses": self.history.losses,
            "scores": self.history.scores,
            "random": torch.get_rng_state(),
        }
        unfinished = self.path.with_name(self.path.name + ".partial")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def resume(self, **arguments: Any) -> None:
        self.arguments = json.dumps(arguments)
        if self.path is None or not self.path.exists():
            return
        device = next(self.model.parameters()).device
        state = torch.load(self.path, map_location=device, weights_only=True)
        before = state["arguments"]
        if before != self.arguments:
            old = json.loads(before)
            other = {k: v for k, v in old.items() if v != arguments.get(k)}
            raise ValueError(
                f"checkpoint: {self.path} is of a run with {other}; remove it or use its arguments"
            )
        self.model.load_state_dict(state["model"])
        self.descent.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.history = History(state["losses"], state["scores"])
        torch.set_rng_state(state["random"].cpu())


# --------------------------------------------------------------------------------- arguments


def _epochs(epochs: int, progress: bool) -> Iterable[int]:
    numbers = range(1, epochs + 1)
    if not progress:
        return numbers
    return imported("tqdm").tqdm(numbers, desc="epochs")
