r"""Rounding: norms and errors with bounds that floating point cannot break.

A theorem about a network speaks of real numbers. What runs is a program in floating point, which
differs from the function at an input *and* at its neighbours. This room bounds both ends:
:func:`rigorous_matrix_norm` and :func:`rigorous_convolution_norm` are operator norms from above by
float64 with its own rounding accounted for, and :func:`forward_error` bounds node by node how far
a program can be from its function near an input. A layer joins by :func:`forward_error_rule`.
:func:`lipbook.robustness.certify` puts them together.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lipbook.composition.reading import compose
from lipbook.errors import (
    Analysis,
    ForwardError,
    _analysis,
    _check_arithmetic,
    _then,
    _unrounded,
    forward_error_rule,
)
from lipbook.graphs import Graph, trace
from lipbook.layers.joins import Join
from lipbook.norms.arguments import _floating
from lipbook.norms.rigorous import rigorous_convolution_norm, rigorous_matrix_norm
from lipbook.rules import _exponent

__all__ = [
    "ForwardError",
    "forward_error",
    "forward_error_rule",
    "rigorous_convolution_norm",
    "rigorous_matrix_norm",
]


@torch.no_grad()
def forward_error(module: nn.Module, inputs: Tensor, p: float = 2) -> ForwardError:
    r"""Bound how far the program of a module is from its function, at inputs and around them.

    Layer by layer, each with its rule (:func:`forward_error_rule`). If the first of two layers has
    :math:`(L_1, a_1, c_1)` and the second :math:`(L_2, a_2, c_2)`, the second one starts within
    :math:`\rho = (L_1 + c_1)\lVert v - x\rVert + 2 a_1` of the value that it saw, so that both have

    .. math::
        L = L_1 L_2, \qquad a = L_2 a_1 + a_2 + 2 c_2 a_1, \qquad
        c = L_2 c_1 + c_2 (L_1 + c_1) .

    The program is the module as it runs now: with autocast if that is on, on any CPU. Assumed
    is the model of rounding :math:`|\mathrm{fl}(w^\top x) - w^\top x| \le \gamma_n |w|^\top|x|`
    with :math:`\gamma_n = nu / (1 - nu)`, sums in float32 for bfloat16 and float16 (and one
    rounding of the sum and one of the bias). torch computes so on CPUs: its convolutions are direct
    or matrix products, never by Winograd's algorithm, which NNPACK would use. What is known to
    break the model is refused.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    inputs : torch.Tensor
        (batch, \*shape).
    p : float
        1, 2 or :data:`math.inf`.

    Returns
    -------
    ForwardError

    Raises
    ------
    TypeError
        If a module has no rule.
    ValueError
        If reduced precision is allowed, or the device is not the CPU.

    References
    ----------
    The composition is that of :cite:t:`murray2026`, with constants that depend on the input.

    Examples
    --------
    >>> layer = nn.Linear(100, 50)
    >>> x = torch.randn(8, 100)
    >>> bound = forward_error(layer, x)
    >>> exact = x.double() @ layer.weight.double().mT + layer.bias.double()
    >>> error = (bound.outputs - exact).norm(dim=1)
    >>> bool((error <= bound.error).all())
    True
    """
    p = _exponent(p)
    _floating("inputs", inputs, 2)
    _check_arithmetic(inputs)
    if not len(inputs) or not inputs.isfinite().all():
        raise ValueError(
            "inputs must be finite, one sample or more, got NaN, infinity or shape "
            f"{tuple(inputs.shape)}"
        )
    with torch.inference_mode(False):
        graph = trace(module, tuple(inputs.shape[1:]))
        return graph_error(graph, inputs, p)(inputs)


def graph_error(graph: Graph, example: Tensor, p: float) -> Analysis:
    """Analysis of a graph: the answers of its layers are asked once, for many batches."""
    examples = graph.values(example.clone())
    steps: list[Analysis | Join | None] = [None]
    for node in graph.nodes[1:]:
        layer = node.layer
        assert layer is not None
        if isinstance(layer, Join):
            steps.append(layer)
        else:
            with node.located():
                steps.append(_analysis(layer, examples[node.inputs[0]], p, ""))

    def analysis(x: Tensor) -> ForwardError:
        found = [_unrounded(x, x)]
        stretch: list[list[Tensor]] = [[]]
        for node, step in zip(graph.nodes[1:], steps[1:], strict=True):
            parts = [found[j] for j in node.inputs]
            if isinstance(step, Join):
                outputs = step(*(part.outputs for part in parts))
                with node.located():
                    found.append(step.errors(parts, outputs, p))
                    stretch.append(step.factors(None, p))
            else:
                assert step is not None
                own = step(parts[0].outputs)
                found.append(own if node.inputs == (0,) else _then(parts[0], own))
                stretch.append([torch.tensor(own.lipschitz, dtype=torch.float64)])
        total = found[graph.output]
        # Branches that read disjoint slices stretch less than their sum; see Note [blocks]. The
        # sums and products of positive numbers on the way are off by less than 2^-30.
        blocks = compose(graph, stretch, p)[graph.output].item() * (1 + 2.0**-30)
        return dataclasses.replace(total, lipschitz=min(total.lipschitz, blocks))

    return analysis
