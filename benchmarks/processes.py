"""The same work by one process and by two: steps are built on both sides, and start together."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import Step, Table
from lipbook.activations import MaxMin
from lipbook.convolutions import OrthogonalConv2d
from lipbook.robustness import Certifier
from lipbook.wasserstein import wasserstein1_bracket

ALONE, BOTH = "one process", "lipbook, two processes (gloo)"


def network(c: int) -> nn.Sequential:
    """Build two orthogonal convolutions and a matrix, for digits."""
    circular: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    convolutions = OrthogonalConv2d(1, c, 3, **circular), OrthogonalConv2d(c, c, 3, **circular)
    last = nn.Linear(c * 28 * 28, 10)
    return nn.Sequential(convolutions[0], MaxMin(), convolutions[1], MaxMin(), nn.Flatten(), last)


def certificate(group: Any, inputs: int = 1000) -> Step:
    """Certify all inputs, or the share of this process."""
    certifier = Certifier(network(16).eval(), (1, 28, 28))
    x, y = torch.rand(inputs, 1, 28, 28), torch.zeros(inputs, dtype=torch.long)
    batches = list(zip(x.split(100), y.split(100), strict=True))
    return lambda: certifier(batches, group)


def bracket(group: Any, method: Literal["sparse", "blocks"], points: int, dimensions: int) -> Step:
    """Bound the distance of two clouds."""
    x, y = torch.randn(points, dimensions), 1.2 * torch.randn(points, dimensions) + 0.3
    return lambda: wasserstein1_bracket(x, y, method=method, group=group)


def training(group: Any, batch: int = 128) -> Step:
    """Forward, backward and a step of gradient descent, on all of a batch or on half of it."""
    model: nn.Module = network(16)
    x, y = torch.rand(batch, 1, 28, 28), torch.arange(batch) % 10
    if group is not None:
        model = nn.parallel.DistributedDataParallel(model)
        x, y = (part.chunk(2)[distributed.get_rank(group)] for part in (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> object:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        return optimizer.step()

    return step


WORK: dict[str, Callable[[Any], Step]] = {
    "certificates of a convolutional network, 1,000 digits, sound": certificate,
    "transport bracket, 'sparse', 10,000 points a side, 100 dimensions": functools.partial(
        bracket, method="sparse", points=10_000, dimensions=100
    ),
    "transport bracket, 'blocks', 5,000 points a side, 2 dimensions": functools.partial(
        bracket, method="blocks", points=5000, dimensions=2
    ),
    "training step of that network, batch 128, DistributedDataParallel": training,
}


def built(group: Any) -> dict[str, Step]:
    """All steps, with the same data in every process."""
    steps = {}
    for name, build in WORK.items():
        torch.manual_seed(0)
        steps[name] = build(group)
    return steps


def joined(folder: str, rank: int) -> dict[str, Step]:
    """Join the pair and build the steps of this process."""
    if sys.platform == "linux":  # no need to look up what the machine is called
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    return built(distributed.group.WORLD)


def second(folder: str, threads: int) -> None:
    """Do, as the second process, what the first one says, until it says nothing more."""
    torch.set_num_threads(threads)
    steps = joined(folder, 1)
    while True:
        said: list[str | None] = [None]
        distributed.broadcast_object_list(said)
        if said[0] is None:
            break
        steps[said[0]]()
    distributed.destroy_process_group()


@contextlib.contextmanager
def pair() -> Iterator[Callable[[str | None], object]]:
    """Start a second process; give what starts a step on both."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        other = context.Process(target=second, args=(folder, torch.get_num_threads()), daemon=True)
        other.start()
        steps = joined(folder, 0)

        def start(name: str | None) -> object:
            distributed.broadcast_object_list([name])
            return None if name is None else steps[name]()

        try:
            yield start
        finally:
            start(None)
            other.join()
            distributed.destroy_process_group()


def tables() -> Iterator[Table]:
    """Build a table for each kind of work."""
    alone = built(None)
    with pair() as start:
        for name, step in alone.items():
            steps: dict[str, Step] = {ALONE: step, BOTH: functools.partial(start, name)}
            yield Table("Work of one process, shared by two", name, ALONE, steps, {})
