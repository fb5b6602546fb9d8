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
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lipbook.composition.local import ranges_of, stretches
from lipbook.composition.reading import compose, times
from lipbook.errors import (
    Analysis,
    ForwardError,
    RangeAnalysis,
    _analysis,
    _check_arithmetic,
    _check_kernels,
    _range_analysis,
    _then,
    _unrounded,
    cuda_rule,
    forward_error_rule,
    matmul_setting,
    range_error_rule,
)
from lipbook.graphs import Graph, trace
from lipbook.layers.joins import Join
from lipbook.norms.arguments import _floating
from lipbook.norms.rigorous import rigorous_convolution_norm, rigorous_matrix_norm
from lipbook.rules import (
    Domain,
    Range,
    _exponent,
    local_lipschitz_rule,
    outward,
)

__all__ = [
    "ForwardError",
    "cuda_rule",
    "forward_error",
    "forward_error_rule",
    "ieee_cuda",
    "range_error_rule",
    "rigorous_convolution_norm",
    "rigorous_matrix_norm",
]


@contextmanager
def ieee_cuda() -> Iterator[None]:
    r"""Have a GPU of NVIDIA compute as IEEE 754 says, by the sums of the definition.

    .. math::
        |\mathrm{fl}(w^\top x) - w^\top x| \le \gamma_n |w|^\top |x|, \qquad
        \gamma_n = \frac{n u}{1 - n u}

    for n products in any order of summation, fused or not, split among blocks and threads in any
    way: a product meets at most n roundings on its way to the result, each of which multiplies by
    :math:`1 + t` with :math:`|t| \le u`, and :math:`\prod_{k \le n} (1 + t_k)` is within
    :math:`\gamma_n` of 1. That needs that each operation is a rounded sum, product or fused
    product of the definition. So this switches off

    - TF32, whose factors have ten bits (``torch.backends.cuda.matmul.fp32_precision = "ieee"``,
      before torch 2.9 ``allow_tf32 = False``);
    - cuDNN (``torch.backends.cudnn.enabled = False``), whose convolutions may go by the algorithms
      of Winograd or Fourier. Torch's own copy windows into a matrix and multiply, image by image,
      which is slower.

    Outside, or where an environment variable has cuBLAS emulate products
    (``CUBLAS_EMULATE_SINGLE_PRECISION``, ``NVIDIA_TF32_OVERRIDE``, ...), certificates of networks
    on a GPU are refused. The settings are torch's, of the whole process; they come back at the end.
    A certificate speaks of a program that runs with them.

    **Not promised by anybody**, and named as ``assumed`` in the facts of a certificate: that cuBLAS
    forms no other sums (its manual says nothing of algorithms; Strassen's would break the bound)
    and emulates no products unasked, and that torch's kernels are compiled without fast math.
    Numbers below the least normal one count as lost. Functions such as exp and tanh are refused:
    NVIDIA gives errors of these from tests, with no guarantee. A network that ``torch.compile``
    has wrapped is read as its original: the certificate is about that program.

    References
    ----------
    :cite:t:`higham2002`, section 3.1, for :math:`\gamma_n`. :cite:t:`nvidia2025cuda`,
    *Mathematical Functions*: x + y, x y, x / y and the square root have the errors of IEEE 754; all
    other bounds "are not guaranteed". :cite:t:`nvidia2025cublas`, *Floating Point Emulation*.

    Examples
    --------
    >>> with ieee_cuda():
    ...     print(torch.backends.cudnn.enabled)
    False
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    name, value = matmul_setting()
    before, enabled = getattr(matmul, name), cudnn.enabled
    try:
        setattr(matmul, name, value)
        cudnn.enabled = False
        yield
    finally:
        setattr(matmul, name, before)
        cudnn.enabled = enabled


@torch.no_grad()
def forward_error(
    module: nn.Module, inputs: Tensor, p: float = 2, domain: Domain | None = None
) -> ForwardError:
    r"""Bound how far the program of a module is from its function, at inputs and around them.

    Layer by layer, each with its rule (:func:`forward_error_rule`). If the first of two layers has
    :math:`(L_1, a_1, c_1)` and the second :math:`(L_2, a_2, c_2)`, the second one starts within
    :math:`\rho = (L_1 + c_1)\lVert v - x\rVert + 2 a_1` of the value that it saw, so that both have

    .. math::
        L = L_1 L_2, \qquad a = L_2 a_1 + a_2 + 2 c_2 a_1, \qquad
        c = L_2 c_1 + c_2 (L_1 + c_1) .

    On a domain, with :math:`R_k` the range of the exact values of node k and
    :math:`\lVert\tilde v_k - v_k\rVert_p \le e_k` for the computed ones: both lie in
    :math:`R_k` widened by :math:`e_k`, a convex set, on which the next layer stretches by
    :math:`c_k` at most and rounds by :math:`\eta`. So :math:`e = \sum_k c_k e_k + \eta`, the sum
    over its inputs.

    The program is the module as it runs now: with autocast if that is on, on any CPU. Assumed
    is the model of rounding :math:`|\mathrm{fl}(w^\top x) - w^\top x| \le \gamma_n |w|^\top|x|`
    with :math:`\gamma_n = nu / (1 - nu)`, sums in float32 for bfloat16 and float16 (and one
    rounding of the sum and one of the bias), and that elementary functions (exp, tanh, ...) are
    accurate to 32 units in the last place. torch computes so on CPUs: its convolutions are direct
    or matrix products, never by Winograd's algorithm, which NNPACK would use. What is known to
    break the model is refused. On a GPU of NVIDIA it holds within :func:`ieee_cuda`, for layers
    that add, multiply, divide and move numbers (:func:`cuda_rule`).

    In float32 and float64 a sum of n products and a bias, in any order, is off by half as much
    where its terms cancel,

    .. math::
        |\mathrm{fl}(y) - y| \le \tfrac12 \gamma_{n+2} \big(|w|^\top|x| + |b| + |y|\big), \qquad
        y = w^\top x + b,

    since an addition loses u of the partial sum that it returns, which is at most the sum of the
    terms of one sign.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    inputs : torch.Tensor
        (batch, \*shape).
    p : float
        1, 2 or :data:`math.inf`.
    domain : Box or Ball, optional
        Set that holds the inputs. Then the error is one for the whole set, the slope is 0 and the
        Lipschitz bound is that of the domain: products, attention and recurrence need one. A layer
        joins by :func:`range_error_rule`.

    Returns
    -------
    ForwardError

    Raises
    ------
    TypeError
        If a module has no rule.
    ValueError
        If reduced precision is allowed, the device is another than the CPU or CUDA, or on CUDA a
        setting of :func:`ieee_cuda` is missing, a layer has other kernels or a domain is given.

    References
    ----------
    The composition is that of :cite:t:`murray2026`, with constants that depend on the input;
    :cite:t:`higham2002`, (4.3), for partial sums.

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
    if domain is not None and inputs.device.type == "cuda":
        raise ValueError(
            "errors on a domain are bounded on the CPU only, got inputs on CUDA: call .cpu() of "
            "both, or give no domain"
        )
    if not len(inputs) or not inputs.isfinite().all():
        raise ValueError(
            "inputs must be finite, one sample or more, got NaN, infinity or shape "
            f"{tuple(inputs.shape)}"
        )
    with torch.inference_mode(False):
        graph = trace(module, tuple(inputs.shape[1:]))
        if domain is None:
            return graph_error(graph, inputs, p)(inputs)
        shape, double = tuple(inputs.shape[1:]), graph.double()
        ranges = ranges_of(double, domain.range(shape))
        if not domain.range(shape).holds(inputs.double()):
            raise ValueError(
                f"inputs must lie in the domain {domain}, got values from "
                f"{inputs.min().item():.6g} to {inputs.max().item():.6g}"
            )
        error = range_errors(graph, double, inputs, p)(ranges)
        lipschitz = stretches(double, ranges, p)[double.output].max().item() * (1 + 2.0**-30)
        outputs = graph.run(inputs.clone())
        whole = error.expand(len(inputs)).clone()
        room = torch.where(whole.isfinite(), math.inf, 0.0)
        return ForwardError(outputs, lipschitz, whole, 0.0, room)


def graph_error(graph: Graph, example: Tensor, p: float) -> Analysis:
    """Analysis of a graph: the answers of its layers are asked once, for many batches."""
    examples = graph.values(example.clone())
    steps: list[Analysis | Join | None] = [None]
    for node in graph.nodes[1:]:
        layer = node.layer
        assert layer is not None
        with node.located():
            if isinstance(layer, Join):
                if type(layer).errors is Join.errors:
                    layer.errors((), examples[0], p)  # which refuses
                _check_kernels(layer, examples[node.inputs[0]])
                steps.append(layer)
            else:
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


def range_errors(
    graph: Graph, double: Graph, example: Tensor, p: float
) -> Callable[[Sequence[Range]], Tensor]:
    r"""Analysis of a graph on sets of inputs: bounds that hold for every input of a set.

    Node by node, with :math:`R_k` the range of the exact values and
    :math:`\lVert\tilde v_k - v_k\rVert_p \le e_k`: the computed values lie in :math:`R_k` widened
    by :math:`e_k`, which is a convex set that holds the exact ones too. There a layer with inputs
    :math:`j` stretches by :math:`c_j` at most and rounds by :math:`\eta`, so that

    .. math:: e_k = \sum_j c_j e_j + \eta .

    (For a join that is stacked the p-norm of the :math:`c_j e_j`.) The factors are those of
    :func:`~lipbook.composition.local_lipschitz_rule` and of joins, :math:`\eta` that of
    :func:`~range_error_rule`.

    Parameters
    ----------
    graph : Graph
        The program.
    double : Graph
        The same graph in float64, whose layers give ranges and factors.
    example : torch.Tensor
        A batch of inputs.
    p : float
        Exponent of the norms.

    Returns
    -------
    callable
        From the ranges of the nodes of ``double`` to the error of the output, (batch,); infinite
        where numbers may overflow.

    Raises
    ------
    TypeError, ValueError
        If a layer has no such bound, or the dtype is not float32 or float64.
    """
    examples = graph.values(example.clone())
    steps: list[RangeAnalysis | Join | None] = [None]
    for node in graph.nodes[1:]:
        layer = node.layer
        assert layer is not None
        with node.located():
            seen = [examples[j] for j in node.inputs]
            if any(part.dtype not in (torch.float32, torch.float64) for part in seen):
                raise ValueError(
                    "errors on a domain are bounded in float32 and float64, got "
                    f"{', '.join(str(part.dtype) for part in seen)}: call .float(), or use "
                    "sound=False"
                )
            if isinstance(layer, Join):
                _check_arithmetic(seen[0])
                steps.append(layer)
            else:
                steps.append(_range_analysis(layer, seen[0], p))

    def analysis(ranges: Sequence[Range]) -> Tensor:
        found = [torch.zeros(len(ranges[0].low), dtype=torch.float64)]
        seen = [ranges[0]]
        lost = ~_holds(ranges[0], examples[0].dtype)
        for k, step in enumerate(steps[1:], 1):
            node, twin = graph.nodes[k], double.nodes[k].layer
            assert twin is not None
            parts, before = [seen[j] for j in node.inputs], [found[j] for j in node.inputs]
            with node.located():
                if isinstance(step, Join):
                    assert isinstance(twin, Join)
                    factors = twin.factors(parts, p)
                    own = step.rounding(parts, examples[k].dtype, p)
                else:
                    assert step is not None
                    factors = [local_lipschitz_rule(twin, parts[0], p)]
                    own = step(parts[0])
            if len(factors) < len(before):
                factors = factors * len(before)
            carried = torch.stack(
                torch.broadcast_tensors(
                    *(times(c, e) for c, e in zip(factors, before, strict=True))
                )
            )
            stacked = isinstance(step, Join) and step.stacked
            joined = torch.linalg.vector_norm(carried, p, dim=0) if stacked else carried.sum(0)
            error = ((joined + own) * (1 + 2.0**-40)).nan_to_num(math.inf, posinf=math.inf)
            lost = lost | ~error.isfinite()
            found.append(error)
            seen.append(_widened(ranges[k], torch.where(error.isfinite(), error, 0.0), p))
            lost = lost | ~_holds(seen[k], examples[k].dtype)
        return torch.where(lost, math.inf, found[graph.output])

    return analysis


def _holds(values: Range, dtype: torch.dtype) -> Tensor:
    """Whether a dtype holds all values, with room to spare."""
    return values.abs().flatten(1).amax(1) <= torch.finfo(dtype).max / 8


def _widened(values: Range, error: Tensor, p: float) -> Range:
    """Range of all points within a distance of a range, for each sample."""
    entry = error.view(-1, *[1] * (values.low.dim() - 1))
    low, high = outward(values.low - entry, values.high + entry)
    if values.center is None or values.radius is None:
        return Range(low, high)
    longest = math.sqrt(values.low[0].numel()) if p == math.inf else 1.0
    return Range(low, high, values.center, (values.radius + error * longest) * (1 + 2.0**-40))
