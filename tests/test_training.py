from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lipbook.lab.data import mnist
from lipbook.lab.training import History, accuracy, train

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
    history = train(model, x, y, epochs=3, lr=0.1, batch_size=16, momentum=momentum).losses
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
    assert history.losses[-1] < 1e-6 < history.losses[0]


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
    assert history.losses == sorted(history.losses, reverse=True)
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
        ({"labels": np.zeros(N)}, TypeError, "got ndarray: call torch.from_numpy"),
        ({"images": [problem()]}, TypeError, "got list: join the batches of a loader"),
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
            {"schedule": "step"},
            ValueError,
            "schedule: expected one of .* or a callable, got 'step'",
        ),
        ({"validation": N}, ValueError, "validation: expected a number of the 50 examples, got 50"),
        ({"validation": 0.2}, ValueError, "validation: .* got 0.2"),
        (
            {"validation": mnist()[2:]},
            TypeError,
            "validation: expected a number of the 50 examples, got tuple: .* test images, cannot",
        ),
        ({"precision": "tf32"}, ValueError, "precision: expected one of .*, got 'tf32'"),
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


# ------------------------------------------------------------- schedule, augmentation, validation


class Probe(torch.optim.SGD):
    """Gradient descent that remembers its rates."""

    rates: list[float]

    def step(self, closure: Any = None) -> Any:
        vars(self).setdefault("rates", []).append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (lambda t: 10 ** (-4 * t), [1, 0.1, 0.01, 0.001]),
    ],
)
def test_schedules_on_paper(schedule: Any, factors: list[float]) -> None:
    (x, y), made = problem(), []

    def optimizer(parameters: Any, lr: float) -> Probe:
        made.append(Probe(parameters, lr=lr))
        return made[0]

    train(linear(), x, y, epochs=2, lr=0.5, batch_size=25, optimizer=optimizer, schedule=schedule)
    assert made[0].rates == pytest.approx([0.5 * factor for factor in factors], rel=1e-14)


def test_augmentation_sees_every_batch_and_repeats_with_the_seed() -> None:
    x, y = problem()

    def noisy(images: Tensor, rng: np.random.Generator) -> Tensor:
        return images + torch.from_numpy(rng.normal(size=images.shape))

    plain, first, again, other = (linear() for _ in range(4))
    train(plain, x, y, epochs=2, lr=0.1)
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        train(model, x, y, epochs=2, lr=0.1, augment=noisy, seed=seed)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.weight, plain.weight)


def test_validation_examples_are_not_trained_on_and_the_best_epoch_is_kept() -> None:
    (x, y), seen, judged, kept = problem(), [], [], []
    scores = iter([0.25, 0.75, 0.75, 0.5])

    def spy(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return nn.functional.cross_entropy(outputs, labels)

    def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
        judged.append(images)
        kept.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    model = linear()
    history = train(model, x, y, epochs=4, lr=0.1, loss=spy, validation=10, score=score)
    assert sum(map(len, seen)) == 4 * 40
    assert all(torch.equal(images, judged[0]) for images in judged)
    rows = {tuple(row) for row in judged[0].tolist()}
    assert len(rows) == 10
    assert rows < {tuple(row) for row in x.tolist()}
    used = [y[i] for i, row in enumerate(x.tolist()) if tuple(row) not in rows]
    epoch = torch.cat(seen[: len(seen) // 4])
    assert torch.equal(epoch.sort().values, torch.stack(used).sort().values)
    assert history.scores == [0.25, 0.75, 0.75, 0.5]
    assert history.best_epoch == 2  # the first of the two best
    assert torch.equal(model.weight, kept[1]["weight"])
    assert not torch.equal(model.weight, kept[3]["weight"])


def test_without_scores_the_last_epoch_is_the_best() -> None:
    assert History([0.5, 0.4]).best_epoch == 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_parameters(precision: Any) -> None:
    (x, y), models = problem(), [linear().float(), linear().float()]
    dtypes = []
    models[0].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    losses = train(models[0], x, y, epochs=20, lr=0.1, precision=precision).losses
    exact = train(models[1], x, y, epochs=20, lr=0.1).losses
    assert set(dtypes) == {getattr(torch, precision)}
    assert models[0].weight.dtype == torch.float32
    assert losses == pytest.approx(exact, rel=20 * 2**-8)  # 20 epochs of rounding to 8 bits


# ------------------------------------------------------------------------------- checkpoints

LONG_RUN = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from torch import nn
from lipbook.lab.data import mnist
from lipbook.lab.training import train

digits, folder = mnist(), Path(sys.argv[1])
images, labels = digits.train_images[:400], digits.train_labels[:400]
save, saved = torch.save, []
torch.optim.Adam(nn.Linear(1, 1).parameters())  # imports what optimisers need, for all forks


def run(result, checkpoint=None, waits=False, halves=False):
    def score(model, images, labels):
        if waits and checkpoint.exists():
            time.sleep(600)  # until it is killed
        return time.time()  # the last epoch is the best

    def half(state, file):
        save(state, file)
        saved.append(file)
        if len(saved) == 3:
            os.truncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    if halves:
        torch.save = half
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)
    )
    train(
        net, images, labels, epochs=4, lr=0.01, optimizer=torch.optim.Adam, schedule="cosine",
        validation=50, score=score, checkpoint=checkpoint,
    )
    torch.save(net.state_dict(), folder / result)


def forked(*arguments, **options):
    process = os.fork()
    if process == 0:
        try:
            run(*arguments, **options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""
KILLED = """
whole = forked("whole")
waiting, halving = folder / "waiting.pt", folder / "halving.pt"
process = forked("waited", waiting, waits=True)
deadline = time.monotonic() + 60
while not waiting.exists() and time.monotonic() < deadline:
    time.sleep(0.005)
os.kill(process, signal.SIGKILL)
codes = {"whole": ended(whole), "waiting": ended(process)}
codes["halving"] = ended(forked("halved", halving, halves=True))
print(json.dumps(codes))
"""
RESUMED = """
run("waited", folder / "waiting.pt")
run("halved", folder / "halving.pt")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs that were killed, what was there then, and what they came to in another process."""
    folder = tmp_path_factory.mktemp("runs")

    def ran(program: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", LONG_RUN + program, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    codes = json.loads(ran(KILLED))
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    epochs = {
        name: len(torch.load(folder / f"{name}.pt", weights_only=True)["losses"])
        for name in ("waiting", "halving")
    }
    ran(RESUMED)
    ends = {
        name: torch.load(folder / name, weights_only=True) for name in ("whole", "waited", "halved")
    }
    return {"codes": codes, "names": names, "epochs": epochs, "ends": ends}


def test_a_run_that_is_killed_and_started_again_ends_with_the_same_bits(
    killed: dict[str, Any],
) -> None:
    assert killed["codes"]["whole"] == 0
    assert killed["codes"]["waiting"] == -signal.SIGKILL
    assert "waited" not in killed["names"]
    assert 1 <= killed["epochs"]["waiting"] < 4
    expected, got = killed["ends"]["whole"], killed["ends"]["waited"]
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    killed: dict[str, Any],
) -> None:
    assert killed["codes"]["halving"] == -signal.SIGKILL
    assert "halved" not in killed["names"]
    assert killed["epochs"]["halving"] == 2
    expected, got = killed["ends"]["whole"], killed["ends"]["halved"]
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    x, y = problem()
    path = tmp_path / "run.pt"
    train(linear(), x, y, epochs=1, lr=0.1, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    with pytest.raises(ValueError, match=r"checkpoint: .*run.pt is of a run with {'lr': 0.1}"):
        train(linear(), x, y, epochs=1, lr=0.2, checkpoint=path)


# ------------------------------------------------------------------------- several processes


def trained() -> dict[str, Any]:
    (x, y), model = problem(), linear()
    history = train(model, x, y, epochs=3, lr=0.1, batch_size=7, validation=1, score=lambda *_: 0.0)
    return {"losses": history.losses, **model.state_dict()}


STARTED = """
import os, sys
import torch
from tests.test_training import trained

result = trained()
if os.environ["RANK"] == "0":
    torch.save(result, sys.argv[1])
"""


def test_torchrun_starts_a_training_of_two(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "result"
    script.write_text(STARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    top = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": top, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, script, out], env=environment, check=True, timeout=120)
    single, double = trained(), torch.load(out, weights_only=True)
    assert torch.allclose(double["weight"], single["weight"], rtol=0, atol=1e-9)
