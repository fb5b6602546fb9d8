"""One readable training loop, the same for every chapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["train", "accuracy"]


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
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    r"""Train a model by minibatch gradient descent and return the mean loss of each epoch.

    One step on a batch :math:`B` of a shuffled epoch, with momentum :math:`\mu` and rate
    :math:`\eta`, is

    .. math::

        v \leftarrow \mu v + \nabla_\theta \frac1{|B|} \sum_{i \in B} \ell(f_\theta(x_i), y_i),
        \qquad \theta \leftarrow \theta - \eta v .

    The order of the examples comes from ``numpy.random.default_rng(seed)``. Hence a model that
    starts from the same parameters and draws nothing at random itself (no dropout) ends with
    the same parameters, bit for bit, on the same machine with the same number of threads.
    The model is trained in place, in its own dtype and on its own device, and is left in
    evaluation mode.

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
        Examples in a step. The last batch of an epoch may be smaller; none is dropped.
    loss : callable
        ``loss(outputs, labels)``, the mean of :math:`\ell` over the batch.
    optimizer : "sgd" or callable
        ``optimizer(parameters, lr=lr)`` makes a :class:`torch.optim.Optimizer`, for example
        :class:`torch.optim.Adam`. ``"sgd"`` is the step above.
    momentum : float, optional
        :math:`\mu` in [0, 1) for ``"sgd"``, where it is 0.9 unless given.
    seed : int
        Seed of the order of the examples.
    progress : bool
        Show a progress bar over the epochs.

    Returns
    -------
    list of float
        The mean of the loss over the examples of each epoch, measured on the way: each example
        sees the parameters of the step that used it.

    Raises
    ------
    TypeError, ValueError
        An argument is unusable; the message names it.
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
    ...     return model, train(model, x, y, epochs=20, lr=0.5)
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
    make = _optimizer(optimizer, momentum)
    if loss is cross_entropy:
        _check_classes(labels)

    rng = np.random.default_rng(seed)
    descent = make(model.parameters(), lr=lr)
    history = []
    model.train()
    for epoch in _epochs(epochs, progress):
        total = 0.0
        order = torch.from_numpy(rng.permutation(len(images)))
        for step, batch in enumerate(order.split(batch_size), start=1):
            targets = labels[batch].to(parameter.device)
            outputs = model(images[batch].to(parameter))
            if loss is cross_entropy:
                _check_outputs(outputs, targets)
            value = loss(outputs, targets)
            if value.ndim != 0:
                raise ValueError(f"loss: expected a scalar, got shape {tuple(value.shape)}")
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"loss is {value.item()} at epoch {epoch}, step {step}: "
                    f"lr={lr} may be too large, or images may hold NaN"
                )
            descent.zero_grad()
            value.backward()
            descent.step()
            total += value.item() * len(batch)
        history.append(total / len(images))
    model.eval()
    return history


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
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
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
        raise TypeError(f"labels: expected int64 classes, got {labels.dtype}")
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


def _epochs(epochs: int, progress: bool) -> Iterable[int]:
    numbers = range(1, epochs + 1)
    if not progress:
        return numbers
    from tqdm import tqdm  # noqa: PLC0415 - not needed without a bar

    return tqdm(numbers, desc="epochs")
