"""What several processes find together: the bits of one, and refusals that all of them raise.

One pair of processes goes through all scenarios, in the order of this file; the tests compare what
both have written. A refusal must leave the pair fit for the next scenario.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import linear, trained
from torch import Tensor, distributed, nn

from lipbook import wasserstein
from lipbook._processes import Digest, Team
from lipbook.activations import MaxMin
from lipbook.composition import Box
from lipbook.convolutions import OrthogonalConv2d
from lipbook.lab import evaluation
from lipbook.orthogonal import OrthogonalLinear
from lipbook.robustness import Certificate, Certifier, certify, lipschitz
from lipbook.wasserstein import blocks as blocks_module
from lipbook.wasserstein import bracket as bracket_module
from lipbook.wasserstein import sparse, transforms

TOP = Path(__file__).resolve().parents[1]
FEATURES, CLASSES = 6, 3

# ------------------------------------------------------------------------- what is computed


def dense() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(OrthogonalLinear(FEATURES, 8), MaxMin(), nn.Linear(8, CLASSES)).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(2)
    layers = OrthogonalConv2d(1, 4, 3, padding_mode="circular", padding=1), MaxMin(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, CLASSES)).eval()


def batches(sizes: tuple[int, ...], shape: tuple[int, ...] = (FEATURES,)) -> list[Any]:
    torch.manual_seed(3)
    x, y = torch.rand(sum(sizes), *shape), torch.randint(CLASSES, (sum(sizes),))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def clouds(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(4)
    x, y = (torch.from_numpy(rng.normal(size=(k, d))) for k in (n, m))
    return x, 1.2 * y + 0.3


def fields(found: Certificate | wasserstein.TransportBracket) -> dict[str, Any]:
    return {
        field.name: value.to_dense() if isinstance(value, Tensor) else value
        for field in dataclasses.fields(found)
        for value in [getattr(found, field.name)]
    }


# Each is called with a group by both processes, and by one of them without.
FOUND: dict[str, Callable[[Any], Any]] = {
    "sound": lambda group: certify(dense(), batches((5, 5, 3)), (FEATURES,), group=group),
    "real": lambda group: certify(
        dense(), batches((4, 1, 7, 2)), (FEATURES,), math.inf, sound=False, group=group
    ),
    "one batch": lambda group: certify(dense(), batches((4,)), (FEATURES,), group=group),
    "convolution": lambda group: certify(
        convolutional(), batches((3, 2), (1, 4, 4)), (1, 4, 4), group=group
    ),
    "local": lambda group: certify(
        dense(), batches((1, 1)), (FEATURES,), method="local", group=group
    ),
    "domain": lambda group: certify(
        dense(), batches((2, 2, 2)), (FEATURES,), domain=Box(0, 1), group=group
    ),
    "certifier": lambda group: Certifier(dense(), (FEATURES,))(batches((3, 3)), group=group),
    "lab": lambda group: evaluation.certificate(
        dense(), *(torch.cat(part) for part in zip(*batches((1200,)), strict=True)), group=group
    ),
    **{
        method: lambda group, method=method, size=size: wasserstein.wasserstein1_bracket(
            *clouds(*size),
            critic=(lambda z: z[:, 0]) if method == "critic" else None,
            method=method,
            sweeps=2,
            group=group,
        )
        for method, size in {
            "sparse": (200, 150, 5),
            "blocks": (200, 150, 2),
            "critic": (200, 150, 2),
            "exact": (40, 30, 2),
            "sinkhorn": (40, 30, 2),
        }.items()
    },
}


# ------------------------------------------------------------------------------- what is refused


def nan_on(rank: int, batch: int, me: int) -> list[Any]:
    data = batches((3, 3, 3))
    if me == rank:
        data[batch][0][0, 0] = math.nan
    return data


def broken(me: int) -> Iterator[Any]:
    for k, batch in enumerate(batches((2, 2, 2))):
        if k == 2 and me == 1:
            raise KeyError("shard 2")
        yield batch


def other_network(me: int) -> nn.Sequential:
    net = dense()
    with torch.no_grad():
        net[2].bias[0] += 1e-3 * me
    return net


def other_slope(me: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.LeakyReLU(0.1 + 0.1 * me), nn.Linear(4, 3)
    ).eval()


def bracket(group: Any, me: int, **changed: Any) -> Any:
    x, y = clouds(30, 20, 2)
    arguments = {"x": x, "y": y, "method": "blocks", "sweeps": 1} | (changed if me else {})
    return wasserstein.wasserstein1_bracket(**arguments, group=group)


def certified(group: Any, loader: Any, net: nn.Module | None = None, **options: Any) -> Any:
    return certify(net or dense(), loader, (FEATURES,), **options, group=group)


THREE = (3, 3, 3)
# Calls with a group and a rank; the type that both raise, and what the message of each must hold.
REFUSED: dict[str, tuple[Callable[[Any, int], Any], type[Exception], str]] = {
    "NaN in a batch of its own": (
        lambda group, me: certified(group, nan_on(1, 1, me)),
        ValueError,
        "inputs must be finite",
    ),
    "NaN in a batch of the other": (
        lambda group, me: certified(group, nan_on(1, 0, me)),
        ValueError,
        "loader must be the same on all processes",
    ),
    "another order": (
        lambda group, me: certified(group, batches(THREE)[:: 1 - 2 * me]),
        ValueError,
        "loader must be the same on all processes",
    ),
    "other labels": (
        lambda group, me: certified(group, [(x, (y + me) % 3) for x, y in batches(THREE)]),
        ValueError,
        "loader must be the same on all processes",
    ),
    "one batch less": (
        lambda group, me: certified(group, batches(THREE)[me:]),
        ValueError,
        "got 3 values of SHA-256",
    ),
    "no batch": (
        lambda group, me: certified(group, batches(THREE)[3 * me :]),
        ValueError,
        "loader must yield one batch at least",
    ),
    "other weights": (
        lambda group, me: certified(group, batches(THREE), other_network(me)),
        ValueError,
        "model must be the same on all processes",
    ),
    "another slope": (
        lambda group, me: certified(group, batches(THREE), other_slope(me)),
        ValueError,
        "model must be the same on all processes",
    ),
    "another norm": (
        lambda group, me: certified(group, batches(THREE), p=[2, math.inf][me]),
        ValueError,
        "must be the same on all processes",
    ),
    "another domain": (
        lambda group, me: certified(group, batches(THREE), domain=Box(0, 1 + me)),
        ValueError,
        "domain must be the same on all processes",
    ),
    "a model in training": (
        lambda group, me: certified(group, batches(THREE), dense().train(me == 0)),
        ValueError,
        "model must be in evaluation mode",
    ),
    "no model": (
        lambda group, me: certified(group, batches(THREE), dense() if me else "dense"),
        TypeError,
        "model must be a torch.nn.Module",
    ),
    "a loader that fails": (
        lambda group, me: certified(group, broken(me)),
        KeyError,
        "shard 2",
    ),
    "other points": (
        lambda group, me: bracket(group, me, y=clouds(30, 20, 2)[1] + 1),
        ValueError,
        "y must be the same on all processes of the group, got torch.float64 of shape (20, 2)",
    ),
    "fewer points": (
        lambda group, me: bracket(group, me, x=clouds(30, 20, 2)[0][:-1]),
        ValueError,
        "torch.float64 of shape (29, 2)",
    ),
    "NaN in the points": (
        lambda group, me: bracket(group, me, y=clouds(30, 20, 2)[1] * math.nan),
        ValueError,
        "y must be finite",
    ),
    "other weights of points": (
        lambda group, me: bracket(group, me, x_weights=torch.full((30,), 1 / 30)),
        ValueError,
        "x_weights must be the same on all processes of the group, got None on process 0",
    ),
    "another critic": (
        lambda group, me: bracket(group, me, critic=lambda z: z[:, 0]),
        ValueError,
        "critic must be the same on all processes",
    ),
    "another seed": (
        lambda group, me: bracket(group, me, seed=1),
        ValueError,
        "of the group, got 0 on process 0 and 1 on process 1",
    ),
    "other calls": (
        lambda group, me: bracket(group, me) if me else certified(group, batches(THREE)),
        RuntimeError,
        "must make the same calls",
    ),
}


# --------------------------------------------------------------------------------- two processes


def recipe() -> str:
    """What the file on the page on choosing prints, for a few digits."""
    page = (TOP / "book" / "choosing.md").read_text()
    first, *_, last = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = (first + last).replace("[:500]", "[:25]").replace("split(100)", "split(10)")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue()


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)


def counted(group: Any) -> tuple[int, int, int]:
    """How many inputs a process certifies, blocks it solves, and rows it looks at."""
    runs, blocks, rows = [], [], []
    certifier = Certifier(dense(), (FEATURES,))
    solve, members = blocks_module.network_simplex, sparse._members
    read = lipschitz._check_inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lipschitz, "_check_inputs", lambda x, *a: (runs.append(len(x)), read(x, *a))[1]
        )
        patch.setattr(blocks_module, "network_simplex", lambda *a: (blocks.append(1), solve(*a))[1])
        patch.setattr(sparse, "_members", lambda *a: (rows.append(len(a[0])), members(*a))[1])
        certifier(batches((5, 1, 1)), group)
        FOUND["sparse"](group)
    return sum(runs), len(blocks) - 1, sum(rows)  # less the plan of cells, which each has


def uneven(group: Any, me: int) -> Any:
    """Fail between two meetings on one process, in the last part on the other."""

    def part(k: int) -> int:
        if k == 2:
            raise ZeroDivisionError("part 2")
        return k

    with Team(group) as team:
        team.gather("first", me)
        if me:
            raise OSError("disk")
        return team.map(part, [0, 1])


def run(folder: Path) -> None:
    """Both processes of the pair: go through all scenarios and write what was found."""
    torch.set_num_threads(1)
    transforms.CHUNK, transforms._TILE, sparse._ENTRIES = 2**10, 16, 2**11  # many small parts
    bracket_module._SAMPLE = 50
    blocks_module.COARSE = 16
    alone = {name: fields(function(None)) for name, function in FOUND.items()}
    alone["trained"], alone["counts"] = trained(), counted(None)
    alone["recipe"] = recipe()
    me = 0 if os.fork() else 1
    os.environ |= {"RANK": str(me), "LOCAL_RANK": str(me), "WORLD_SIZE": "2"}
    written: dict[str, Any] = {"trained": trained()}  # joins the group, as under torchrun
    group = distributed.group.WORLD
    for name, function in FOUND.items():
        written[name] = fields(function(group))
    for name, (call, _, _) in REFUSED.items():
        written[name] = outcome(call, group, me)
    written["counts"], written["recipe"] = counted(group), recipe()
    written["uneven"] = outcome(uneven, group, me)
    with Team(group) as team:
        written["map"] = [team.map(lambda k: (k, team.rank), range(n)) for n in range(6)]
    written["outside"] = outcome(bracket, distributed.new_group([0]), 0)
    torch.save(written | {"alone": alone}, folder / f"{me}.pt")
    distributed.destroy_process_group()
    if me == 1:
        os._exit(0)
    assert os.wait()[1] == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(TOP), str(TOP / "tests"))),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = "import sys, pathlib, test_processes; test_processes.run(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], env=environment, check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


@pytest.mark.parametrize("name", FOUND)
def test_two_processes_find_the_bits_that_one_finds(name: str, pair: list[dict[str, Any]]) -> None:
    expected = pair[0]["alone"][name]
    for found in pair:
        assert found[name].keys() == expected.keys()
        for field, value in expected.items():
            assert equal(found[name][field], value), field


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_process_refuses_both_refuse(name: str, pair: list[dict[str, Any]]) -> None:
    """The one that finds it, with its own error; the other says where it comes from."""
    _, kind, message = REFUSED[name]
    outcomes = [found[name] for found in pair]
    assert all(message in text for _, text in outcomes), outcomes
    kinds = {found for found, _ in outcomes}
    if kind in (TypeError, ValueError):
        assert kinds == {kind.__name__}
    else:
        assert kinds <= {kind.__name__, "RuntimeError"}
    for rank, (_, text) in enumerate(outcomes):
        assert f"(on process {rank} of the group)" not in text


def test_each_process_does_its_share(pair: list[dict[str, Any]]) -> None:
    (runs, blocks, rows), (others, other_blocks, other_rows) = (found["counts"] for found in pair)
    whole, all_blocks, all_rows = pair[0]["alone"]["counts"]
    assert (runs + others, blocks + other_blocks, rows + other_rows) == (
        whole,
        all_blocks,
        all_rows,
    )
    assert runs == 6 * others
    assert 0.4 < rows / all_rows < 0.6
    assert 0.4 < blocks / all_blocks < 0.6


def test_the_recipe_of_the_page_on_choosing_runs_on_two(pair: list[dict[str, Any]]) -> None:
    assert "25 inputs" in pair[0]["recipe"]
    assert pair[0]["recipe"] == pair[0]["alone"]["recipe"]
    assert not pair[1]["recipe"]


def test_a_failure_between_meetings_is_raised_on_both(pair: list[dict[str, Any]]) -> None:
    assert pair[1]["uneven"] == ("OSError", "disk")
    assert pair[0]["uneven"] == ("RuntimeError", "OSError: disk (on process 1 of the group)")


def test_parts_are_taken_in_turns(pair: list[dict[str, Any]]) -> None:
    expected = [[(k, k % 2) for k in range(n)] for n in range(6)]
    assert pair[0]["map"] == pair[1]["map"] == expected


def test_a_group_without_this_process_is_refused(pair: list[dict[str, Any]]) -> None:
    assert isinstance(pair[0]["outside"], wasserstein.TransportBracket)
    assert pair[1]["outside"] == (
        "ValueError",
        "group must be one that this process is in, got one without it",
    )


def test_two_processes_train_as_one(pair: list[dict[str, Any]]) -> None:
    """49 examples in batches of 7: no share is half, and the best epoch is the first.

    The processes know of each other by the variables that torchrun sets.
    """
    single = pair[0]["alone"]["trained"]
    atol = 1e4 * np.finfo(np.float64).eps  # the sums are in another order
    for found in pair:
        assert found["trained"]["losses"] == pytest.approx(single["losses"], rel=0, abs=atol)
        for name in ("weight", "bias"):
            assert torch.allclose(found["trained"][name], single[name], rtol=0, atol=atol)
    assert not torch.equal(single["weight"], linear().weight)


# ----------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("group", ["gloo", 0, [0, 1]])
def test_what_is_no_group_is_refused(group: Any) -> None:
    expected = rf"group must be a process group of torch.distributed, got {type(group).__name__}"
    with pytest.raises(TypeError, match=expected):
        bracket(group, 0)
    with pytest.raises(TypeError, match=expected):
        certified(group, batches((2,)))


def test_a_group_of_one_finds_what_no_group_finds(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        found = fields(FOUND["sound"](distributed.group.WORLD))
    finally:
        distributed.destroy_process_group()
    expected = fields(FOUND["sound"](distributed.group.WORLD))
    assert all(equal(found[name], value) for name, value in expected.items())


def test_a_digest_tells_values_apart() -> None:
    x = torch.arange(6.0)
    zero = torch.zeros(2)
    values = [
        zero,
        zero.int(),
        x, x.double(), x.view(2, 3), x.flip(0), -x, x[:5], x.bool(), x.bfloat16(), x[:0], x[0],
        (x, x), [(x,), x], 1, 1.0, True, "1", None, ("a", "b"), ("ab",), (), Box(0, 1), Box(0, 2),
        nn.ReLU, nn.ReLU(), nn.Tanh,
    ]  # fmt: skip
    texts = [Digest(value).hex for value in values]
    same = {(i, j) for i in range(len(texts)) for j in range(i) if texts[i] == texts[j]}
    assert same == {(values.index(nn.Tanh) - 1, values.index(nn.Tanh) - 2)}
    assert Digest(x.view(2, 3).mT).hex == Digest(x.view(2, 3).mT.contiguous()).hex
    assert str(Digest(x, x)).startswith("2 values of SHA-256 ")
