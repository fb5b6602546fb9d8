r"""Bounds of networks as people write them, from both sides, with the seconds that they take.

The networks of :mod:`lipbook.lab.ordinary` with the weights that torch starts them with, and
ResNet-18 as wide as it is used, on images of 32 × 32 pixels. Batch normalisation has the statistics
of one random batch. Each network is handed over unchanged. For one that is not Lipschitz on all of
space both sides speak of its domain: the lower one is the largest singular value of its Jacobian at
random points of it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
from lipbook.jacobians import singular_values
from lipbook.lab.ordinary import NETWORKS, Ordinary, ResNet18
from lipbook.lab.recipes import Outcome, Rows

__all__ = ["TABLE", "row", "run", "started"]

#: Networks of the table by name.
TABLE = {
    "ResNet-18, 64 wide": Ordinary(functools.partial(ResNet18, 64, 10), (3, 32, 32), {}),
    **NETWORKS,
}


def started(network: Ordinary, seed: int = 0) -> nn.Module:
    """Make a network whose batch normalisations have seen one batch of random images.

    Parameters
    ----------
    network : Ordinary
        Of ``TABLE``.
    seed : int
        Of weights and images.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.
    """
    torch.manual_seed(seed)
    net = network.build()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.rand(64, *network.shape))
    return net.eval()


def row(name: str, *, points: int = 8, seed: int = 0) -> Outcome:
    """Bound one network from both sides, in the 2-norm.

    Parameters
    ----------
    name : str
        Of ``TABLE``.
    points : int
        Random images, uniform in [0, 1], from which the lower bound starts.
    seed : int
        Of weights and points.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``shape`` of an input, number of ``parameters``, ``bound`` and its
        ``seconds`` of processor time, ``lower``, and the ``domain`` or None. No tensors.
    """
    network = TABLE[name]
    net = started(network, seed)
    start = time.process_time()
    bound = lipschitz_bound(net, network.shape, **network.options)
    seconds = time.process_time() - start
    x = torch.rand(points, *network.shape)
    output = network.options.get("output")
    domain = network.options.get("domain")
    if domain is None:
        lower = lipschitz_lower_bound(net, x, output=output).value
    else:
        lower = max(_slope(net.double(), point.double()) for point in x)
    return {
        "name": name,
        "shape": list(network.shape),
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "bound": bound.value,
        "seconds": seconds,
        "lower": lower,
        "domain": None if domain is None else repr(domain),
    }, {}


def _slope(net: nn.Module, point: torch.Tensor) -> float:
    return singular_values(net, point).item()


def run(
    *,
    names: Sequence[str] = tuple(TABLE),
    points: int = 8,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Bound all networks.

    Parameters
    ----------
    names : sequence of str
        Of ``TABLE``.
    points, seed
        As in :func:`row`.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`. No tensors.
    """
    rows = rows or Rows()
    table: list[dict[str, Any]] = []
    for name in rows.bar(names, "networks"):
        one = functools.partial(row, name, points=points, seed=seed)
        table.append(rows.compute(name, one)[0])
    return {"rows": table}, {}
