r"""Lipschitz composition: bounds of networks from bounds of their layers.

A map :math:`f` is :math:`L`-Lipschitz when
:math:`\lVert f(x) - f(y)\rVert_p \le L\,\lVert x - y\rVert_p` for all :math:`x, y`; its Lipschitz
constant :math:`\operatorname{Lip}(f)` is the least such :math:`L`. Constants multiply along
compositions and add along sums. :func:`lipschitz_bound` walks a network and does that
arithmetic from above, :func:`lipschitz_lower_bound` searches two points that show how far the
result can be from the truth. A layer joins by one function, registered with
:func:`lipschitz_rule`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lipbook.layers  # which registers the answers of torch's layers
from lipbook.composition.local import (
    images_of,
    matrix_norms,
    ranges_of,
    row_bounds,
    stretches,
)
from lipbook.composition.reading import compose, times
from lipbook.graphs import Graph, Node, trace
from lipbook.graphs.trace import unwrapped
from lipbook.layers.joins import Join
from lipbook.layers.rearrangements import Cast, Rearrangement, Shift
from lipbook.rules import (
    CONTAINERS,
    Bound,
    Domain,
    Kind,
    Range,
    Shape,
    _check,
    _exponent,
    _located,
    _plain_copy,
    _registered,
    _shape,
    image_rule,
    lipschitz_rule,
)

__all__ = ["Residual", "Sum", "bound_method", "graph_bound", "lipschitz_bound"]

MethodName = Literal[
    "product", "absolute", "averaged", "seqlip", "exact", "lipsdp", "lipsdp-layer", "eclipse"
]  # those that lipschitz_bound knows


class Residual(nn.Module):
    r"""Residual block :math:`x \mapsto x + g(x)`, with a Lipschitz rule.

    .. math:: \operatorname{Lip}(\mathrm{id} + g) \le 1 + \operatorname{Lip}(g)

    Parameters
    ----------
    branch : torch.nn.Module
        :math:`g`, whose outputs have the shape of its inputs.

    Raises
    ------
    ValueError
        When called, if the branch changes the shape: broadcasting has a norm of its own.

    Examples
    --------
    >>> block = Residual(nn.Tanh())
    >>> lipschitz_bound(block, (3,)).value
    2.0
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        _check_branch("branch", branch)
        self.branch = branch

    def forward(self, inputs: Tensor) -> Tensor:
        """Add the branch to a batch of inputs; the shape stays."""
        return _add_branch(inputs, self.branch(inputs))


class Sum(nn.Module):
    r"""Sum of branches :math:`x \mapsto \sum_i g_i(x)`, with a Lipschitz rule.

    .. math:: \operatorname{Lip}\Big(\sum_i g_i\Big) \le \sum_i \operatorname{Lip}(g_i)

    Parameters
    ----------
    *branches : torch.nn.Module
        One or more modules :math:`g_i` with outputs of one shape.

    Raises
    ------
    ValueError
        If there is no branch; when called, if the shapes of two branches differ.

    Examples
    --------
    >>> lipschitz_bound(Sum(nn.Tanh(), nn.Sigmoid()), (3,)).value
    1.25
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches must hold at least one module, got none")
        for branch in branches:
            _check_branch("branches", branch)
        self.branches = nn.ModuleList(branches)

    def forward(self, inputs: Tensor) -> Tensor:
        """Sum the outputs of the branches on a batch of inputs."""
        return _add_branches([branch(inputs) for branch in self.branches])


def _check_branch(name: str, branch: object) -> None:
    if not isinstance(branch, nn.Module):
        raise TypeError(f"{name} must be torch.nn.Module, got {type(branch).__name__}")


# torch.fx records a call of these as one step, since their checks depend on sizes.
torch.fx.wrap("_add_branch")
torch.fx.wrap("_add_branches")


def _add_branch(inputs: Tensor, outputs: Tensor) -> Tensor:
    if outputs.shape != inputs.shape:
        raise ValueError(
            f"branch must keep the shape {tuple(inputs.shape)}, got {tuple(outputs.shape)}"
        )
    return inputs + outputs


def _add_branches(outputs: list[Tensor]) -> Tensor:
    if any(output.shape != outputs[0].shape for output in outputs[1:]):
        shapes = sorted({tuple(output.shape) for output in outputs})
        raise ValueError(f"branches must agree on the output shape, got {shapes}")
    return functools.reduce(torch.add, outputs)


# ------------------------------------------------------------------------------- the walk


def lipschitz_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    method: MethodName = "product",
    *,
    domain: Domain | None = None,
    output: str | int | None = None,
    name: str = "",
    **options: Any,
) -> Bound:
    r"""Upper bound of the Lipschitz constant of a network, composed from its layers.

    .. math::
        \operatorname{Lip}(f_L \circ \dots \circ f_1) \le \prod_l \operatorname{Lip}(f_l), \qquad
        \operatorname{Lip}(f + g) \le \operatorname{Lip}(f) + \operatorname{Lip}(g)

    The result holds for all real inputs of the given shape, in the :math:`\ell_p` norm of all
    entries of a sample on both sides, for the module with its present weights in real arithmetic.
    Weights are read in their own dtype (a parametrized weight as the layer uses it) and all
    that follows is float64: a value is off by rounding, some units of 1e-15 relative a layer.
    A single layer is mostly ``"exact"``; a product of exact constants is an upper bound, since
    nothing makes the directions that two layers stretch most meet.

    Layers are looked up with :func:`lipschitz_rule`. A module without a rule is read as a graph
    (:func:`~lipbook.graphs.trace`): its constants multiply along edges, add in sums, and join by
    the p-norm in concatenations; branches that read disjoint slices of one node join by the norm of
    a small matrix (Note [blocks] in ``lipbook.composition.reading``). A network whose bound
    cannot be vouched for is refused.

    With a ``domain`` the result is a constant on that set only,

    .. math:: \lVert f(x) - f(y)\rVert_p \le L\, \lVert x - y\rVert_p \quad\text{for } x, y \in D,

    the smaller of two: the product of what each layer may stretch on the values that it sees, and,
    for up to 64 outputs, the norm of the interval that holds all Jacobians on D. Ranges are
    float64, rounded outwards.

    Parameters
    ----------
    module : torch.nn.Module
        The network. It is not changed: trial runs use a copy.
    input_shape : sequence of int
        Shape of one sample, without the batch dimension: ``(1, 28, 28)``, not ``(28, 28)``.
    p : float
        1, 2 or :data:`math.inf`.
    method : str
        ``"product"``, or a bound that looks at several layers at once: ``"absolute"``,
        ``"averaged"``, ``"eclipse"``, ``"seqlip"``, ``"lipsdp-layer"``, ``"lipsdp"`` or
        ``"exact"``. They cost more, are for networks whose activations lie on
        one chain, and live in :mod:`lipbook.tightness`. Their bounds have no parts.
    domain : Box or Ball, optional
        Convex set on which the bound has to hold; all of space if not given.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.
    name : str
        Name of the module in its parent, for the table and for errors. Rules of containers
        pass it when they bound a child by this function.
    **options
        Of the method; the product bound has none.

    Returns
    -------
    Bound
        With kind ``"exact"`` or ``"upper bound"`` and one part for each child, or for each node of
        a graph; :meth:`Bound.table` then shows the product so far and the line of code.

    Raises
    ------
    TypeError
        If an operation is not known (the message says where it stands and what to register), a
        module redefines the computation of the class that its rule is for, or has complex weights;
        if the method has no such option.
    ValueError
        If ``method`` is none of the above, or refuses the network.
        If a module has forward hooks, NaN or infinite weights, a weight that changes when it is
        read (:func:`torch.nn.utils.parametrizations.spectral_norm` in training mode), is in
        training mode where that changes its function, is not Lipschitz, or does not fit
        the shape. All messages give the path of the module.

    Examples
    --------
    Two layers of norm 1 whose product is 0: the bound holds and is as loose as can be.

    >>> first, second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    >>> first.weight.data, second.weight.data = torch.eye(2)[:, :1], torch.eye(2)[1:]
    >>> print(lipschitz_bound(nn.Sequential(first, second), (1,)))
    2-norm      output shape  value  kind
    Sequential  (1,)              1  upper bound
      0 Linear  (2,)              1  exact
      1 Linear  (1,)              1  exact
    >>> (second.weight @ first.weight).item()
    0.0

    References
    ----------
    The product bound is as old as :cite:t:`szegedy2014` in this field;
    :cite:t:`virmaux2018` (AutoLip) extend it to any computation graph.
    """
    p = _exponent(p)
    shape = _shape(input_shape)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    module = unwrapped(module)
    title = f"{name} {type(module).__name__}".strip()
    if method != "product":
        if domain is not None:
            raise TypeError(f"method {method!r} takes no domain: use method='product'")
        if output is not None:
            options["output"] = output
        bound = _method(method)(module, shape, p, **options)
        return dataclasses.replace(bound, name=title, input_shape=shape)
    if options:
        raise TypeError(f"method 'product' takes no options, got {sorted(options)}")
    try:
        with torch.inference_mode(False), torch.no_grad():
            if domain is not None:
                bound = _bound_on(module, shape, p, domain, output)
            elif output is not None or not _has_rule(module):
                _check(module)
                graph = trace(module, shape, output=output)
                bound = graph_bound(graph, p)
            else:
                bound = _bound_by_rule(module, shape, p)
    except (TypeError, ValueError) as error:
        raise _located(error, name, module) from (error.__cause__ or error)
    return dataclasses.replace(bound, name=title, input_shape=shape)


def _has_rule(module: nn.Module) -> bool:
    """Whether a module is bounded by the rule of its class, and not by its graph."""
    registered = _registered(module)
    if registered is object:
        return False
    if registered not in CONTAINERS:
        return True
    redefined = type(module).forward is not registered.forward
    return not (redefined or any(_bounds_values(child) for child in module.modules()))


def _bounds_values(module: nn.Module) -> bool:
    """Whether the outputs of a layer are bounded, which what stands behind it may need."""
    return image_rule.dispatch(type(module)) is not image_rule.dispatch(object)


def _bound_by_rule(module: nn.Module, shape: Shape, p: float) -> Bound:
    _check(module)
    children = [child for child, _ in module.named_children() if child != "parametrizations"]
    output_shape = () if children else _run(module, shape)[0]
    bound = _answered(module, shape, p)
    output_shape = output_shape or bound.output_shape or _run(module, shape)[0]
    return dataclasses.replace(bound, output_shape=output_shape)


def _answered(module: nn.Module, shape: Shape, p: float) -> Bound:
    """Ask a module for its bound, and check that it is one."""
    bound = lipschitz_rule(module, shape, p)
    if not isinstance(bound, Bound):
        raise TypeError(f"its Lipschitz rule must return a Bound, got {type(bound).__name__}")
    if bound.kind not in ("exact", "upper bound") or bound.p != p:
        raise ValueError(
            f"its Lipschitz rule must return an exact value or an upper bound for p={p:g}, "
            f"got: {bound.kind} for p={bound.p:g}"
        )
    return bound


# ------------------------------------------------------------------------------- the graph


def _answers(graph: Graph, p: float) -> list[list[Bound]]:
    """Ask each layer of a graph, once for each shape that it is used on."""
    known: dict[tuple[int, Shape], Bound] = {}
    answers: list[list[Bound]] = [[]]
    images: list[Range | None] = []
    for node in graph.nodes[1:]:
        layer = node.layer
        assert layer is not None
        with node.located():
            if isinstance(layer, Join):
                images = images or images_of(graph)
                parts = [image for j in node.inputs if (image := images[j]) is not None]
                whole = len(parts) == len(node.inputs)
                factors = [f.max().item() for f in layer.factors(parts if whole else None, p)]
                answers.append([Bound(f, "upper bound", p) for f in factors])
                continue
            shape = graph.nodes[node.inputs[0]].shape
            key = id(layer), shape
            if key not in known:
                known[key] = _answered(layer, shape, p)
            answers.append([known[key]])
    return answers


_ISOMETRIES = (nn.Identity, nn.Flatten, nn.Unflatten, Cast, Shift)


def _isometry(layer: nn.Module | None) -> bool:
    moves_all = isinstance(layer, Rearrangement) and layer.moves_nothing
    return moves_all or isinstance(layer, _ISOMETRIES)


def graph_bound(graph: Graph, p: float) -> Bound:
    """Product bound of a graph that has been traced."""
    return _bound_of(graph, _answers(graph, p), p)


def _bound_of(graph: Graph, answers: list[list[Bound]], p: float) -> Bound:
    """Compose the answers of a graph, each part with the product so far."""
    numbers = [[torch.tensor(b.value, dtype=torch.float64) for b in each] for each in answers]
    total = [t.max().item() for t in compose(graph, numbers, p)]
    parts = tuple(
        _part(graph, node, answers[k], p, total[k]) for k, node in enumerate(graph.nodes) if k
    )
    chain = graph.chain()
    acting = [
        part for node, part in zip(graph.nodes[1:], parts, strict=True) if not _isometry(node.layer)
    ]
    exact = chain is not None and len(acting) <= 1 and all(b.kind == "exact" for b in acting)
    kind: Kind = "exact" if exact else "upper bound"
    output = graph.nodes[graph.output]
    return Bound(total[graph.output], kind, p, parts=parts, output_shape=output.shape)


def _part(graph: Graph, node: Node, answer: list[Bound], p: float, so_far: float) -> Bound:
    first = answer[0] if len(answer) == 1 else Bound(max(b.value for b in answer), "upper bound", p)
    return dataclasses.replace(
        first,
        name=node.name,
        input_shape=graph.nodes[node.inputs[0]].shape,
        output_shape=node.shape,
        code=node.code,
        so_far=so_far,
    )


# --------------------------------------------------------------------------- on a domain


_ROWS = 64  # up to so many outputs the interval of the Jacobian is computed, too


def _bound_on(
    module: nn.Module, shape: Shape, p: float, domain: Domain, output: str | int | None
) -> Bound:
    if not isinstance(domain, Domain):
        raise TypeError(f"domain must be a Box or a Ball, got {type(domain).__name__}")
    graph = trace(module, shape, output=output).double()
    ranges = ranges_of(graph, domain.range(shape))
    total = stretches(graph, ranges, p)
    parts = tuple(
        Bound(
            total[k].max().item(),
            "upper bound",
            p,
            name=node.name,
            input_shape=graph.nodes[node.inputs[0]].shape,
            output_shape=node.shape,
            code=node.code,
            so_far=total[k].max().item(),
        )
        for k, node in enumerate(graph.nodes)
        if k
    )
    value = total[graph.output].max()
    outputs = math.prod(graph.nodes[graph.output].shape)
    if outputs <= _ROWS:
        rows = torch.eye(outputs, dtype=torch.float64)
        rows = rows.view(1, outputs, *graph.nodes[graph.output].shape)
        interval = row_bounds(graph, ranges, rows, p)
        if interval is not None:
            value = torch.minimum(value, matrix_norms(interval, p).max())
    return Bound(
        value.item(), "upper bound", p, parts=parts, output_shape=graph.nodes[graph.output].shape
    )


# Note [methods]
# The bounds of whole networks stand on this module, so it cannot import theirs: imports go down
# only. They register themselves here. The package itself, which stands above all rooms, says which
# rooms have such bounds (``lipbook.METHOD_ROOMS``) and imports one when it is asked for it. A user
# meets one function and not an order of imports.

Method = Callable[..., Bound]
_METHODS: dict[str, Method] = {}


def bound_method(name: str) -> Callable[[Method], Method]:
    """Register a bound of whole networks under the name that ``lipschitz_bound`` takes."""

    def register(method: Method) -> Method:
        _METHODS[name] = method
        return method

    return register


def _method(name: str) -> Method:
    if name not in tuple(_METHODS):
        for room in lipbook.METHOD_ROOMS:  # see Note [methods]
            getattr(lipbook, room)
    if name not in tuple(_METHODS):
        known = ", ".join(map(repr, ("product", *sorted(_METHODS))))
        raise ValueError(f"method must be one of {known}, got {name!r}")
    return _METHODS[name]


def _run(module: nn.Module, input_shape: Shape) -> tuple[Shape, bool]:
    """Run a copy on zeros: shape of an output sample, and whether the input was written to."""
    weights = itertools.chain(module.parameters(), module.buffers())
    device = next((weight.device for weight in weights), torch.device("cpu"))
    sample = torch.zeros(2, *input_shape, dtype=torch.float64, device=device)
    version = sample._version
    try:
        with torch.no_grad():
            outputs = _plain_copy(module).double()(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"does not run on inputs of shape {input_shape}: {error}") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"must return one tensor, got {type(outputs).__name__}")
    if outputs.dim() == 0 or len(outputs) != 2:
        raise ValueError(
            f"must keep samples apart, but made shape {tuple(outputs.shape)} of a batch of 2"
        )
    return tuple(outputs.shape[1:]), sample._version != version


# ------------------------------------------------------------------- rules of the containers


@lipschitz_rule.register
def _(module: nn.Sequential, input_shape: Shape, p: float) -> Bound:
    parts: list[Bound] = []
    shape = input_shape
    for name, child in module._modules.items():  # named_children() skips a child used twice
        parts.append(lipschitz_bound(child, shape, p, name=name))
        shape = parts[-1].output_shape
    kind: Kind = parts[0].kind if len(parts) == 1 else "upper bound" if parts else "exact"
    factors = [torch.tensor(part.value, dtype=torch.float64) for part in parts]
    value = functools.reduce(times, factors, torch.ones((), dtype=torch.float64)).item()
    return Bound(value, kind, p, parts=tuple(parts), output_shape=shape)


@lipschitz_rule.register
def _(module: Residual, input_shape: Shape, p: float) -> Bound:
    branch = _branch_bound(module.branch, input_shape, p, "branch")
    if branch.output_shape != input_shape:
        raise ValueError(f"branch must keep the shape {input_shape}, got {branch.output_shape}")
    return Bound(1 + branch.value, "upper bound", p, parts=(branch,), output_shape=input_shape)


@lipschitz_rule.register
def _(module: Sum, input_shape: Shape, p: float) -> Bound:
    parts = tuple(
        _branch_bound(branch, input_shape, p, f"branches.{i}")
        for i, branch in enumerate(module.branches)
    )
    shapes = {part.output_shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"branches must agree on the output shape, got {sorted(shapes)}")
    kind: Kind = parts[0].kind if len(parts) == 1 else "upper bound"
    return Bound(sum(b.value for b in parts), kind, p, parts=parts, output_shape=shapes.pop())


def _branch_bound(branch: nn.Module, input_shape: Shape, p: float, name: str) -> Bound:
    bound = lipschitz_bound(branch, input_shape, p, name=name)
    if _run(branch, input_shape)[1]:
        raise ValueError(f"{name} overwrites the input it shares with others: use inplace=False")
    return bound


CONTAINERS.update((Residual, Sum))
