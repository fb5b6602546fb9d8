"""Graphs: a network as a list of layers, read off its own forward."""

from lipbook.graphs.graph import Graph, Node
from lipbook.graphs.trace import trace

__all__ = ["Graph", "Node", "trace"]
