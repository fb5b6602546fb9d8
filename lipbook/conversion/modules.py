"""What a converted network is made of beside layers: its wiring, averages, offsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lipbook.norms.arguments import _real

__all__ = ["Average", "GraphNetwork", "Offset", "ScaledJoin"]


class Average(nn.Module):
    r"""Learnt average of several tensors of one shape: what a sum becomes.

    .. math:: (x_1, \dots, x_k) \mapsto \sum_j s_j w_j x_j, \qquad
        w = \operatorname{softmax}(\theta), \qquad s_j = \pm 1

    **Guaranteed**: 1-Lipschitz in every norm as a function of what all parts are 1-Lipschitz
    functions of, for each :math:`\theta`, up to the rounding of the weights.
    :class:`~lipbook.residual.AverageResidual` is the average of a skip and a branch.

    Parameters
    ----------
    weights : sequence of float
        :math:`s_j w_j` at the beginning, none of them 0. They are divided by the sum of their
        moduli.
    device, dtype
        Of :math:`\theta`.

    Attributes
    ----------
    logits : torch.Tensor
        :math:`\theta`, (k,).

    Raises
    ------
    ValueError
        If there are no weights or one of them is 0; when called, if the parts differ in shape.

    Examples
    --------
    >>> average = Average([0.75, -0.25])
    >>> average(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[0.5000, 0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, weights: Sequence[float], device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise TypeError(f"weights must be numbers, got {weights!r}")
        for weight in weights:
            _real("weights", weight)
        if not weights or not all(weight != 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, none of them 0, got {weights!r}")
        total = sum(map(abs, weights))
        self.signs = tuple(math.copysign(1.0, weight) for weight in weights)
        self._start = [math.log(abs(weight) / total) for weight in weights]
        self.logits = nn.Parameter(torch.empty(len(self._start), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to those of the beginning."""
        with torch.no_grad():
            self.logits.copy_(torch.tensor(self._start, dtype=torch.float64))

    def extra_repr(self) -> str:
        """Show the weights."""
        return ", ".join(f"{weight:.3g}" for weight in self.weights())

    def weights(self) -> list[Tensor]:
        r"""Weights :math:`s_j w_j`, whose moduli add up to 1."""
        parts = self.logits.softmax(0).unbind()
        return [sign * part for sign, part in zip(self.signs, parts, strict=True)]

    def forward(self, *parts: Tensor) -> Tensor:
        """Average the parts."""
        if any(part.shape != parts[0].shape for part in parts):
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"parts must agree on the shape, got {shapes}")
        first, *others = [w * part for w, part in zip(self.weights(), parts, strict=True)]
        for other in others:
            first = first + other
        return first


class Offset(nn.Module):
    r"""A learnt constant that is added, :math:`x \mapsto x + b`: a translation.

    Parameters
    ----------
    value : torch.Tensor
        :math:`b` at the beginning, of a shape that broadcasts to a sample.

    Raises
    ------
    TypeError
        If ``value`` is no tensor of floating-point numbers.

    Examples
    --------
    >>> Offset(torch.tensor([1.0, 2.0]))(torch.zeros(1, 2))
    tensor([[1., 2.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"value must be a floating-point tensor, got {type(value).__name__}")
        self.value = nn.Parameter(value.detach().clone())

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.value.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        """Add the constant to a batch."""
        return x + self.value


class ScaledJoin(nn.Module):
    r"""A join of several tensors, times a fixed number that makes its constant 1.

    .. math:: (x_1, \dots, x_k) \mapsto c \cdot \operatorname{join}(x_1, \dots, x_k)

    Parameters
    ----------
    join : torch.nn.Module
        Concatenation, or an entrywise maximum.
    factor : float
        :math:`c`, such as :math:`1/\sqrt k` for k branches that share their input.

    Raises
    ------
    TypeError
        If ``join`` is no module.
    ValueError
        If ``factor`` is not finite.

    Examples
    --------
    >>> from lipbook.layers.joins import Concatenate
    >>> ScaledJoin(Concatenate(1), 0.5)(torch.ones(1, 1), torch.ones(1, 2))
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, join: nn.Module, factor: float) -> None:
        super().__init__()
        if not isinstance(join, nn.Module):
            raise TypeError(f"join must be a torch.nn.Module, got {type(join).__name__}")
        _real("factor", factor)
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite, got {factor}")
        self.join, self.factor = join, float(factor)

    def extra_repr(self) -> str:
        """Show the factor."""
        return f"factor={self.factor:.6g}"

    def forward(self, *parts: Tensor) -> Tensor:
        """Join the parts, and multiply."""
        return self.factor * cast(Tensor, self.join(*parts))


# Note [wiring]
# A step names a layer by its path in the network and says which earlier values it reads. Paths are
# those of the network that was converted, so that ``network.get_submodule("features.0")`` and the
# keys of a state dict are where its author looks for them. The containers on the way hold layers
# and are not called.

Step = tuple[str, tuple[int, ...]]


class GraphNetwork(nn.Module):
    r"""Network of layers with an explicit wiring.

    .. math:: v_0 = x, \qquad v_k = f_k(v_{i}, \dots), \quad i < k

    The value of the last step is the output. A step is a line of ``print(network.wiring())``.

    Parameters
    ----------
    layers : mapping of str to torch.nn.Module
        Layers by their paths.
    steps : sequence of (str, tuple of int)
        The layer of each step, and the places of the values that it reads; 0 is the input.
    container : callable, optional
        Makes the container for a path on the way to a layer; :class:`torch.nn.Module` if not given.

    Raises
    ------
    ValueError
        If a step names no layer, or reads a value that is not there yet.

    Examples
    --------
    >>> layers = {"first": nn.Tanh(), "sum": Average([0.5, 0.5])}
    >>> network = GraphNetwork(layers, [("first", (0,)), ("sum", (0, 1))])
    >>> print(network.wiring())
    v1 = first(x)
    v2 = sum(x, v1)
    return v2
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        steps: Sequence[Step],
        container: Callable[[str], nn.Module] = lambda path: nn.Module(),
    ) -> None:
        super().__init__()
        if not isinstance(layers, dict):
            raise TypeError(f"layers must be a dict of modules, got {type(layers).__name__}")
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise TypeError(f"steps must be a sequence, got {type(steps).__name__}")
        for path, layer in layers.items():
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layers must be modules, got {type(layer).__name__} at {path!r}")
            *way, name = path.split(".")
            parent: nn.Module = self
            for depth, part in enumerate(way, 1):
                if part not in parent._modules:
                    parent.add_module(part, container(".".join(way[:depth])))
                parent = cast(nn.Module, parent._modules[part])
            parent.add_module(name, layer)
        for k, (name, inputs) in enumerate(steps):
            if name not in layers or not all(0 <= j <= k for j in inputs):
                raise ValueError(
                    f"steps must name layers, and read values that are there, got {(name, inputs)}"
                )
        self._steps = tuple((name, tuple(inputs)) for name, inputs in steps)

    def wiring(self) -> str:
        """Write the steps as lines."""
        names = ["x", *(f"v{k}" for k in range(1, len(self._steps) + 1))]
        lines = [
            f"{names[k]} = {layer}({', '.join(names[j] for j in inputs)})"
            for k, (layer, inputs) in enumerate(self._steps, 1)
        ]
        return "\n".join([*lines, f"return {names[-1]}"])

    def forward(self, x: Tensor) -> Tensor:
        """Take the steps, (batch, *shape) to the shape of the outputs."""
        last = {j: k for k, (_, inputs) in enumerate(self._steps, 1) for j in inputs}
        values = {0: x}
        for k, (name, inputs) in enumerate(self._steps, 1):
            values[k] = self.get_submodule(name)(*(values[j] for j in inputs))
            for j in set(inputs):
                if last[j] == k:
                    del values[j]  # as a local name that is not read again
        return values[len(self._steps)]
