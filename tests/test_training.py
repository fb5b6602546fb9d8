from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lipbook.lab.data import mnist
from lipbook.lab.training import accuracy, train

N, FEATURES, CLASSES = 50, 6, 3  # 50 is no multiple of the batch size below


def problem() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(N, FEATURES)))
    y = torch.from_numpy(rng.integers(0, CLASSES, N))
    return x, y


def linear() -> nn.Linear:
    rng = np.random.default_rng(2)
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(rng.normal(size=(CLASSES, FEATURES))))
        model.bias.copy_(torch.from_numpy(rng.normal(size=CLASSES)))
    return model


def softmax_regression_by_hand(
    model: nn.Linear, x: Tensor, y: Tensor, *, epochs: int, lr: float, batch: int, mu: float
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Train in NumPy with the gradient derived on paper; return weight, bias and mean losses."""
    w, b = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)
    images, labels = x.numpy(), y.numpy()
    rng = np.random.default_rng(0)
    history = []
    for _ in range(epochs):
        order = rng.permutation(len(images))
        losses: list[float] = []
        for start in range(0, len(images), batch):
            chosen = order[start : start + batch]
            logits = images[chosen] @ w.T + b
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            onehot = np.eye(CLASSES)[labels[chosen]]
            losses.extend(-np.log((p * onehot).sum(1)))
            error = (p - onehot) / len(chosen)
            v_w = mu * v_w + error.T @ images[chosen]
            v_b = mu * v_b + error.sum(0)
            w, b = w - lr * v_w, b - lr * v_b
        history.append(sum(losses) / len(losses))
    return w, b, history


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
def test_train_is_the_written_recursion(momentum: float | None) -> None:
    (x, y), model = problem(), linear()
    mu = 0.9 if momentum is None else momentum
    w, b, expected = softmax_regression_by_hand(model, x, y, epochs=3, lr=0.1, batch=16, mu=mu)
    history = train(model, x, y, epochs=3, lr=0.1, batch_size=16, momentum=momentum)
    assert len(history) == 3
    assert all(type(value) is float for value in history)
    # 12 steps of a few hundred operations on numbers of size about 1
    atol = 1e4 * np.finfo(np.float64).eps
    assert np.allclose(history, expected, rtol=0, atol=atol)
    assert np.allclose(model.weight.detach(), w, rtol=0, atol=atol)
    assert np.allclose(model.bias.detach(), b, rtol=0, atol=atol)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    x, y = problem()
    runs = []
    for seed in (5, 5, 6):
        model = linear()
        runs.append((train(model, x, y, epochs=2, lr=0.1, batch_size=16, seed=seed), model))
    (losses, model), (again, same), (_, other) = runs
    assert losses == again
    assert torch.equal(model.weight, same.weight)
    assert torch.equal(model.bias, same.bias)
    assert not torch.equal(model.weight, other.weight)


def test_every_example_is_used_once_an_epoch() -> None:
    seen: list[float] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x[:, 0].tolist())
            return self.layer(x)

    x = torch.arange(10.0).unsqueeze(1)
    train(Recorder(), x, torch.zeros(10, dtype=torch.int64), epochs=2, lr=0.01, batch_size=4)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_decides_the_dtype(dtype: torch.dtype) -> None:
    x, y = problem()
    model = linear().to(dtype)
    expected = copy.deepcopy(model)
    train(model, x.to(torch.float32), y, epochs=1, lr=0.1)
    train(expected, x.to(torch.float32).to(dtype), y, epochs=1, lr=0.1)
    assert model.weight.dtype == dtype
    assert torch.equal(model.weight, expected.weight)
    assert 0 <= accuracy(model, x.to(torch.float16), y) <= 1


def test_training_mode_while_it_trains_evaluation_mode_after() -> None:
    x, y = problem()
    modes: list[bool] = []
    model = linear().eval()
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(model, x, y, epochs=1, lr=0.1)
    assert all(modes)
    assert not model.training
    model.train()
    modes.clear()
    accuracy(model, x, y)
    assert not any(modes)
    assert not model.training


def test_frozen_parameters_stay() -> None:
    (x, y), model = problem(), linear()
    before = copy.deepcopy(model)
    model.bias.requires_grad_(False)
    train(model, x, y, epochs=1, lr=0.1)
    assert torch.equal(model.bias, before.bias)
    assert not torch.equal(model.weight, before.weight)


def test_another_optimizer_gets_the_rate() -> None:
    (x, y), model = problem(), linear()
    before = model.weight.detach().clone()
    train(model, x, y, epochs=1, lr=0.01, batch_size=N, optimizer=torch.optim.Adam)
    # Adam's first step is lr times the sign of the gradient, but for its epsilon of 1e-8
    step = (model.weight.detach() - before).abs()
    assert torch.allclose(step, torch.full_like(step, 0.01), rtol=1e-4, atol=0)


def test_another_loss_gets_outputs_and_labels_as_they_are() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(40, FEATURES)))
    target = x @ torch.from_numpy(rng.normal(size=(FEATURES, CLASSES)))  # (40, 3), no classes
    model = linear()
    history = train(model, x, target, epochs=400, lr=0.05, batch_size=40, loss=mse_loss)
    assert history[-1] < 1e-6 < history[0]


def test_a_bar_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    (x, y), model = problem(), linear()
    train(model, x, y, epochs=2, lr=0.1)
    assert capsys.readouterr() == ("", "")
    train(model, x, y, epochs=2, lr=0.1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epochs" in err
    assert "2/2" in err


def test_a_small_network_learns_the_digits() -> None:
    digits = mnist()
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 32, dtype=torch.float64),
        nn.ReLU(),
        nn.Linear(32, 10, dtype=torch.float64),
    )
    untrained = accuracy(model, digits.test_images, digits.test_labels)
    history = train(model, digits.train_images, digits.train_labels, epochs=3, lr=0.1)
    assert untrained < 0.3
    assert history[0] > history[1] > history[2]
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.9


def test_accuracy_counts() -> None:
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    scores = torch.tensor([[2.0, 1, 0], [0, 3, 3], [5, 6, 7], [1, 0, 0], [0, 0, 1]])
    labels = torch.tensor([0, 1, 1, 0, 2])  # row 1 is a tie, won by class 1; row 2 is wrong
    for batch_size in (1, 2, 3, 5, 1000):
        assert accuracy(model, scores, labels, batch_size) == 0.8


# Refusals


def test_divergence_is_reported_with_its_place() -> None:
    (x, y), model = problem(), linear()
    with pytest.raises(FloatingPointError, match=r"epoch [2-9], step [1-4]: lr=1e\+300"):
        train(model, 1e4 * x, y, epochs=9, lr=1e300, batch_size=N)


def test_nan_images_are_reported_at_their_step() -> None:
    (x, y), model = problem(), linear()
    x[np.random.default_rng(0).permutation(N)[20]] = math.nan  # in the second batch of 16
    with pytest.raises(FloatingPointError, match="nan at epoch 1, step 2"):
        train(model, x, y, epochs=1, lr=0.1, batch_size=16)
    with pytest.raises(FloatingPointError, match="NaN"):
        accuracy(model, x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.sin}, TypeError, "model: expected a torch.nn.Module"),
        ({"model": nn.Flatten()}, ValueError, "model: expected a module with parameters"),
        ({"model": nn.Linear(FEATURES, 2)}, ValueError, "labels: expected classes below 2"),
        (
            {"model": nn.Sequential(nn.Linear(FEATURES, 3), nn.Flatten(0))},
            ValueError,
            r"model: expected outputs of shape \(50, classes\), got \(150,\)",
        ),
        ({"images": [1.0]}, TypeError, "images: expected a tensor"),
        ({"images": torch.zeros(0, FEATURES)}, ValueError, "images: expected at least one row"),
        ({"images": torch.zeros(49, FEATURES)}, ValueError, "labels: .* 49 images, got 50"),
        ({"labels": np.zeros(N)}, TypeError, "labels: expected a tensor"),
        ({"labels": torch.tensor(0)}, ValueError, "labels: expected at least one row"),
        ({"labels": torch.zeros(N)}, TypeError, "labels: expected int64"),
        ({"labels": torch.zeros(N, 1, dtype=torch.int64)}, ValueError, r"labels: .* \(50, 1\)"),
        ({"labels": torch.full((N,), -1)}, ValueError, "labels: expected classes from 0 on"),
        ({"labels": torch.full((N,), 3)}, ValueError, "labels: expected classes below 3, .* got 3"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an int"),
    ],
)
def test_both_refuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = problem()
    arguments = {"model": linear(), "images": x, "labels": y, "batch_size": N} | change
    with pytest.raises(error, match=message):
        accuracy(**arguments)
    with pytest.raises(error, match=message):
        train(**arguments, epochs=1, lr=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"epochs": 2.0}, TypeError, "epochs: expected an int, got float"),
        ({"epochs": True}, TypeError, "epochs: expected an int, got bool"),
        ({"lr": 0}, ValueError, "lr: expected a finite number > 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr: .* got nan"),
        ({"lr": math.inf}, ValueError, "lr: .* got inf"),
        ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum: .* got -0.1"),
        (
            {"momentum": 0.9, "optimizer": torch.optim.Adam},
            ValueError,
            'momentum: only for optimizer="sgd"',
        ),
        (
            {"optimizer": "adam"},
            ValueError,
            "optimizer: expected \"sgd\" or a callable, got 'adam'",
        ),
        (
            {"loss": lambda outputs, _: outputs.sum(1)},
            ValueError,
            r"loss: expected a scalar, got shape \(50,\)",
        ),
    ],
)
def test_train_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    (x, y), model = problem(), linear()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        train(model, x, y, **({"epochs": 1, "lr": 0.1} | change))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
