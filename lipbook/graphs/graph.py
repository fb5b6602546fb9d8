"""The graph of a network: nodes in order, each with its layer and what it reads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lipbook.layers.rearrangements import Cast
from lipbook.rules import Shape, _located

__all__ = ["Graph", "Node"]


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of a network.

    Attributes
    ----------
    layer : torch.nn.Module or None
        What is computed; None for the input of the network.
    inputs : tuple of int
        Places of the nodes that it reads.
    shape : tuple of int
        Shape of a sample of its outputs.
    path : str
        Path of the module in the network, or of the one in whose forward the operation stands.
    place : str
        File and line of the reader's code.
    code : str
        That line.
    """

    layer: nn.Module | None
    inputs: tuple[int, ...]
    shape: Shape
    path: str = ""
    place: str = ""
    code: str = ""

    @contextmanager
    def located(self) -> Iterator[None]:
        """Put path, class, line and text of the node in front of an error."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if hasattr(error, "refused"):
                raise _located(error, self.path, nn.Identity()) from error.__cause__ or error
            where = f"({self.place}: {self.code}): " if self.place else ""
            kind = TypeError if isinstance(error, TypeError) else ValueError
            found = kind(f"{where}{error}")
            raise _located(found, self.path, self.layer or nn.Identity()) from error

    @property
    def name(self) -> str:
        """Path and class."""
        kind = "input" if self.layer is None else type(self.layer).__name__
        return f"{self.path} {kind}".strip()


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network as nodes in order; node 0 is the input.

    Attributes
    ----------
    nodes : tuple of Node
        In an order in which they can be computed.
    output : int
        Place of the node whose value the network returns.
    """

    nodes: tuple[Node, ...]
    output: int

    def __len__(self) -> int:
        return len(self.nodes)

    def values(self, inputs: Tensor) -> list[Tensor]:
        """Values of all nodes on a batch of inputs."""
        values = [inputs]
        for node in self.nodes[1:]:
            assert node.layer is not None
            values.append(node.layer(*(values[k] for k in node.inputs)))
        return values

    def run(self, inputs: Tensor) -> Tensor:
        """Output of the network on a batch of inputs."""
        return self.values(inputs)[self.output]

    def until(self, output: int) -> Graph:
        """Graph of what one node needs, in the same order."""
        needed = {0, output}
        for k in range(output, 0, -1):
            if k in needed:
                needed.update(self.nodes[k].inputs)
        order = sorted(needed)
        new = {old: k for k, old in enumerate(order)}
        nodes = [
            dataclasses.replace(node, inputs=tuple(new[j] for j in node.inputs))
            for node in (self.nodes[old] for old in order)
        ]
        return Graph(tuple(nodes), new[output])

    def readers(self) -> list[list[int]]:
        """For each node the nodes that read it."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            for source in node.inputs:
                readers[source].append(k)
        return readers

    def double(self) -> Graph:
        """Copy whose layers compute in float64."""
        return self._mapped(
            lambda layer: nn.Identity() if isinstance(layer, Cast) else layer.double()
        )

    def cpu(self) -> Graph:
        """Copy whose layers lie on the CPU."""
        return self._mapped(lambda layer: layer.cpu())

    def _mapped(self, function: Callable[[nn.Module], nn.Module]) -> Graph:
        """Graph of what a function makes of copies of the layers."""
        memo: dict[int, nn.Module] = {}
        for node in self.nodes[1:]:
            layer = node.layer
            assert layer is not None
            if id(layer) not in memo:
                memo[id(layer)] = function(copy.deepcopy(layer))
        nodes = [
            node if node.layer is None else dataclasses.replace(node, layer=memo[id(node.layer)])
            for node in self.nodes
        ]
        return Graph(tuple(nodes), self.output)

    def chain(self) -> Sequence[Node] | None:
        """Nodes from input to output, if each reads only the one before it."""
        nodes = self.nodes[1 : self.output + 1]
        chained = all(node.inputs == (k,) for k, node in enumerate(nodes))
        return nodes if chained and self.output == len(self.nodes) - 1 else None

    def __str__(self) -> str:
        rows = [("node", "reads", "layer", "shape", "code")]
        for k, node in enumerate(self.nodes):
            reads = ", ".join(map(str, node.inputs))
            layer = node.name
            if node.layer is not None and node.layer.extra_repr() and len(node.path) == 0:
                layer += f" {node.layer.extra_repr()}"
            rows.append((str(k), reads, layer, str(node.shape), node.code))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = (
            "  ".join([*(f"{cell:{w}}" for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)
