r"""Conversion: an ordinary network of torch becomes a 1-Lipschitz one, layer by layer.

The network is read as a graph (:func:`~lipbook.graphs.trace`), so that ``F.relu(x)`` and
``x + self.block(x)`` are found as modules are. Layers with weights give way to constrained ones of
the same shape, activations to those that keep norms, normalisations to centerings, sums to learnt
averages; what is 1-Lipschitz stays, and what has no replacement is refused by its path.

# Note [why the result is 1-Lipschitz]
Every value of the new network is a 1-Lipschitz function of its input. For a layer with one input
that is so if it is 1-Lipschitz. A sum of k such values is k-Lipschitz, and their average
1-Lipschitz. A concatenation of k values that depend on the same entries has the constant
:math:`\sqrt k`, by which it is divided; of slices that do not meet it is 1-Lipschitz, and stays.
The number is that of ``lipbook.composition.reading`` for a graph whose layers have the constants 1,
and in which an average reads the input: that it is 1-Lipschitz holds for all weights, while the
number for those of the beginning would not.
At last the network is bounded as any other, and refused if the bound exceeds what was asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from lipbook.composition import lipschitz_bound
from lipbook.composition.reading import compose
from lipbook.conversion.modules import Average, GraphNetwork, Offset, ScaledJoin
from lipbook.conversion.replacements import (
    ALREADY,
    DROPPED,
    SLACK,
    Activation,
    Choice,
    Chosen,
    recurrent,
    replacement,
    weighted,
)
from lipbook.graphs import Graph, Node, trace
from lipbook.graphs.trace import _paths, known_layer, unwrapped
from lipbook.layers.calls import CALLS
from lipbook.layers.joins import Add, Join, Subtract
from lipbook.layers.rearrangements import Diagonal, LinearMap, MatrixProduct, Rearrangement, Shift
from lipbook.layers.recurrence import SequenceOutput
from lipbook.norms.arguments import _real
from lipbook.orthogonal import Scale
from lipbook.rules import Bound, Shape, _shape, lipschitz_rule

__all__ = ["Conversion", "Replacement", "lipschitz_network"]

Replacements = Mapping[str | type[nn.Module], nn.Module | Callable[[nn.Module], nn.Module]]


@dataclasses.dataclass(frozen=True)
class Replacement:
    r"""What became of one layer or operation.

    Attributes
    ----------
    path : str
        Path of the module, or of the one in whose forward the operation stands.
    old, new : str
        Classes before and after; ``"-"`` where there is nothing.
    why : str
        The reason.
    moved : float or None
        :math:`\lVert W - W'\rVert / \lVert W\rVert` of a weight that was kept, Frobenius norms.
    code : str
        Line of the reader's code, of an operation that is no module.
    """

    path: str
    old: str
    new: str
    why: str
    moved: float | None = None
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted network, and what was done.

    Attributes
    ----------
    network : torch.nn.Module
        The new network.
    replacements : tuple of Replacement
        A row for each layer and operation, in the order in which they run.
    bound : Bound
        Of the new network, as :func:`~lipbook.composition.lipschitz_bound` computes it.
    """

    network: nn.Module
    replacements: tuple[Replacement, ...]
    bound: Bound

    def table(self) -> str:
        """Rows as text: path, old and new class, reason, and how far a weight was moved."""
        moves = any(row.moved is not None for row in self.replacements)
        rows = [("path", "old", "new", "moved" if moves else "", "why")]
        for row in self.replacements:
            moved = "" if row.moved is None else f"{row.moved:.3f}"
            rows.append((row.path, row.old, row.new, moved, row.why))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(
                [*(f"{cell:{w}}" for cell, w in zip(row, widths, strict=False) if w), row[4]]
            ).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        bound = f"{self.bound.value:.6g} for inputs of shape {self.bound.input_shape}"
        return f"{self.table()}\nLipschitz bound in the 2-norm: {bound}"


class _Given(nn.Module):
    """Layer of the user's in the place of one of the model's."""

    def __init__(self, layer: nn.Module, old: str) -> None:
        super().__init__()
        self.layer, self.old = layer, old

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


@lipschitz_rule.register
def _(module: _Given, input_shape: Shape, p: float) -> Bound:
    return lipschitz_bound(module.layer, input_shape, p)


def lipschitz_network(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    lipschitz: float = 1.0,
    activation: Activation | Callable[[int, int], nn.Module] = "max_min",
    keep_weights: bool = False,
    replace: Replacements | None = None,
    output: str | int | None = None,
) -> Conversion:
    r"""Make a 1-Lipschitz network of an ordinary one, to be trained from the start.

    .. math:: \lVert f(x) - f(y)\rVert_2 \le K\, \lVert x - y\rVert_2 \quad\text{for all } x, y

    for the new network f, at all parameters that training may reach; the table names layers of
    yours of which that holds for their present weights only. The model is not changed and shares
    nothing with the network.

    ==============================  ============================================================
    in the model                    in the network
    ==============================  ============================================================
    ``Linear``, ``F.linear``        ``OrthogonalLinear``
    ``Conv``, ``ConvTranspose``     ``OrthogonalConv`` on a circle where that keeps the shape, else
                                    with the old padding; where there is none (depthwise),
                                    ``NonexpansiveConv`` (AOL)
    ReLU, GELU, Tanh, ...           ``activation``; behind the last weights the old one stays
    RNN, GRU, LSTM                  ``LosslessRNN``
    ``BatchNorm``                   ``BatchCentering``
    Layer, group, instance norm     ``LayerCentering``
    ``Dropout``                     nothing
    Averages over windows, means    the same times the square root of the window
    ``MaxPool``                     stays if its windows do not overlap, else made so
    ``x + f(x)``, sums              learnt averages; a skip begins at 1 - 1/n for n sums
    ``cat``, ``maximum``            divided by their constant, :math:`\sqrt k` for k branches
    ``Softmax`` of the output       nothing: logits have the margins
    what is 1-Lipschitz             stays
    without weights, and a bound    divided by its constant
    ==============================  ============================================================

    **Guaranteed**: :func:`~lipbook.composition.lipschitz_bound` of the network is at most K, up to
    the rounding of the weights; otherwise it is refused. **Not guaranteed**: that it computes what
    the model does. It has the same architecture, not the same function, and has to be trained, with
    a loss that asks for a margin (:class:`~lipbook.losses.MultiMarginLoss`).

    Parameters
    ----------
    model : torch.nn.Module
        The network, as :func:`~lipbook.composition.lipschitz_bound` takes it.
    input_shape : sequence of int
        Shape of one sample, without the batch dimension.
    lipschitz : float
        K. Other than 1, the network ends in a multiplication by it
        (:class:`~lipbook.orthogonal.Scale`).
    activation : str or callable
        ``"max_min"``, ``"householder"``, ``"absolute_value"``, ``"keep"`` (the old one, divided by
        its constant where that exceeds 1), or a function from the number of channels and their
        dimension to a module. Pairs need an even number: of an odd one the absolute value is taken.
    keep_weights : bool
        Start from the weights of the model: matrices at the nearest orthonormal ones, which the
        polar factor is; convolutions with rescaled columns (``NonexpansiveConv``, AOL), since no
        projection on orthogonal kernels is known. The table says how far each was moved. Biases
        stay. Running means start anew.
    replace : mapping, optional
        Layers of yours, by path (``{"blocks.3.attn": layer}``) or by class
        (``{nn.GELU: lambda old: MaxMin()}``): modules, of which copies are taken, or functions of
        the old module.
    output : str or int, optional
        Which tensor is meant, if the model returns a dict or a tuple; the network returns it alone.

    Returns
    -------
    Conversion
        ``.network``, and the table of what was done, which ``print`` shows.

    Raises
    ------
    TypeError
        If an argument is of another type.
    ValueError
        If a layer has no 1-Lipschitz replacement, naming the paths of all of them; if the model
        cannot be read; if ``replace`` names a path that is not there, or gives a layer whose
        constant exceeds 1.

    Notes
    -----
    Weights of a layer that is used again stay shared; those of two layers that are tied do not.

    A model made of ``nn.Sequential`` comes back as one. Another forward becomes a
    ``GraphNetwork``, whose ``wiring()`` shows it, with the layers at their old paths. Its
    reshapings are those of ``input_shape``: images of another size need a conversion of their own.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    ...                       nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    >>> conversion = lipschitz_network(model, (1, 8, 8))
    >>> print(conversion)
    path  old          new               why
    0     Conv2d       OrthogonalConv2d  orthogonal, on a circle
    1     BatchNorm2d  BatchCentering    subtracts means, and divides by nothing
    2     ReLU         MaxMin            keeps the norm of gradients
    3     AvgPool2d    AveragePooling    the mean times the square root of the window
    4     Flatten      Flatten           1-Lipschitz already
    5     Linear       OrthogonalLinear  orthonormal rows or columns
    Lipschitz bound in the 2-norm: 1 for inputs of shape (1, 8, 8)

    A bound of 1 holds for the steepest Jacobian, too:

    >>> x = torch.rand(4, 1, 8, 8)
    >>> network = conversion.network.eval()
    >>> jacobian = torch.func.vmap(torch.func.jacrev(lambda v: network(v[None])[0]))(x)
    >>> bool(torch.linalg.svdvals(jacobian.flatten(2)).max() < 1 + 1e-5)
    True

    References
    ----------
    The layers: :cite:t:`anil2019sorting`, :cite:t:`li2019preventing`. Averages for sums:
    :class:`~lipbook.residual.AverageResidual`.
    """
    shape = _checked(model, input_shape, lipschitz, activation, keep_weights)
    model = unwrapped(model)
    training = model.training
    with torch.inference_mode(False):
        read = _with_given(copy.deepcopy(model), replace or {}).eval()
        graph = _graph(read, shape, output)
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        like = tensors[0] if tensors else torch.zeros(())
        choice = Choice(activation, keep_weights, like.device, like.dtype)
        plan = _Plan(read, graph, choice)
        plan.make()
        network = plan.network(lipschitz)
        bound = lipschitz_bound(network.eval(), shape)
    rounding = 64 * max(torch.finfo(like.dtype).eps, 2.0**-40) * (1 + len(plan.rows))
    if not bound.value <= lipschitz * (1 + rounding):
        raise ValueError(
            f"the network has the bound {bound.value:.6g}, above {lipschitz:g}:\n{bound}"
        )
    return Conversion(network.train(training), tuple(plan.rows), bound)


def _checked(
    model: Any, input_shape: Any, lipschitz: Any, activation: Any, keep_weights: Any
) -> Shape:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _real("lipschitz", lipschitz)
    if not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
    if isinstance(activation, nn.Module) or not (
        callable(activation) or activation in get_args(Activation)
    ):
        raise ValueError(
            f"activation must be one of {get_args(Activation)}, or a function of the number of "
            f"channels and their dimension, got {activation!r}"
        )
    if not isinstance(keep_weights, bool):
        raise TypeError(f"keep_weights must be True or False, got {keep_weights!r}")
    return _shape(input_shape)


def _with_given(model: nn.Module, replace: Replacements) -> nn.Module:
    """Put the user's layers into a copy of the model."""
    if not isinstance(replace, Mapping):
        raise TypeError(f"replace must be a mapping, got {type(replace).__name__}")
    found = dict(_paths(model, ""))
    for key in replace:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"replace must have paths or classes of modules as keys, got {key!r}")
        if isinstance(key, str) and key not in found:
            raise ValueError(f"replace must name paths of the model, got {key!r} and {[*found]}")
        if not callable(replace[key]) or isinstance(replace[key], type):
            raise TypeError(f"replace must give modules or functions, got {replace[key]!r}")
    taken: list[str] = []
    for path, old in found.items():
        kinds = [kind for kind in replace if isinstance(kind, type) and isinstance(old, kind)]
        keys = [path] * (path in replace) + kinds
        if not keys or any(path.startswith(f"{above}.") or not above for above in taken):
            continue
        given = replace[keys[0]]
        new = copy.deepcopy(given) if isinstance(given, nn.Module) else given(old)
        if not isinstance(new, nn.Module):
            raise TypeError(f"replace must give a module at {path!r}, got {type(new).__name__}")
        taken.append(path)
        if not path:
            return _Given(new, _kind(old))
        parent, _, name = path.rpartition(".")
        found[parent]._modules[name] = _Given(new, _kind(old))
    return model


def _graph(model: nn.Module, shape: Shape, output: str | int | None) -> Graph:
    try:
        return trace(model, shape, output=output)
    except (TypeError, ValueError) as error:
        path = getattr(error, "refused", ("",))[0]
        hint = f"; give a layer in its place by replace={{{path!r}: layer}}" if path else ""
        raise type(error)(f"model cannot be read: {error}{hint}") from error


# Note [sums]
# A chain of sums whose partial results nobody else reads is one sum, and a factor in front of a
# term is its weight; if it is learnt, the average has one of its own. If the moduli of the weights
# add up to 1 or less the sum stays.


class _Plan:
    """The new network while it is made: nodes of the old graph one by one."""

    def __init__(self, model: nn.Module, graph: Graph, choice: Choice) -> None:
        self.model, self.graph, self.choice = model, graph, choice
        self.originals = dict(_paths(model, ""))
        self.rows: list[Replacement] = []
        self.layers: dict[str, nn.Module] = {}
        self.problems: list[str] = []
        self.recurrent: dict[int, nn.Module] = {}
        self.by_old: dict[int, str] = {}  # names of layers with weights, which may be used again
        self.held: set[int] = set()  # parameters of the model that live on
        self.step_names: list[str | None] = [None]
        # The new graph, the same for bounds, its constants, and where the old nodes are in it.
        self.nodes, self.nominal = [graph.nodes[0]], [graph.nodes[0]]
        self.constants: list[list[Tensor]] = [[]]
        self.place = {0: 0}
        self.axis = [1] * len(graph)
        self.depth = [0] * len(graph)
        readers = graph.readers()
        self.weights_follow = [False] * len(graph)
        for k in range(len(graph) - 1, -1, -1):
            self.weights_follow[k] = any(
                weighted(graph.nodes[r].layer) or self.weights_follow[r] for r in readers[k]
            )
        self.swallowed: set[int] = set()
        self.terms: dict[int, list[tuple[int, float]]] = {}
        for k in range(len(graph) - 1, 0, -1):
            if type(graph.nodes[k].layer) in (Add, Subtract) and k not in self.swallowed:
                self.terms[k] = list(self._expanded(k, 1.0, readers))

    def make(self) -> None:
        """Choose all layers, or refuse all that have none."""
        for k in range(1, len(self.graph)):
            if k not in self.swallowed:
                node = self.graph.nodes[k]
                try:
                    self._node(k, node)
                except (TypeError, ValueError) as error:
                    self._refuse(node, error)
                    self._keep(k, node, nn.Identity(), node.inputs[:1], "")
        if self.problems:
            lines = "\n  ".join(dict.fromkeys(self.problems))
            raise ValueError(f"model has layers without a 1-Lipschitz replacement:\n  {lines}")
        for path, owner in self.originals.items():
            for name, parameter in owner._parameters.items():
                trained = parameter is not None and parameter.requires_grad
                if trained and id(parameter) not in self.held:
                    where = ".".join(filter(None, (path, name)))
                    why = "not used, or used as a constant: it is not trained"
                    self.rows.append(Replacement(where, "Parameter", "-", why))

    def _refuse(self, node: Node, error: Exception) -> None:
        owner = self.originals.get(node.path, self.model)
        special = type(owner) in CALLS
        kind = type(owner if special else node.layer).__name__.removeprefix("Parametrized")
        where = f" ({node.place}: {node.code})" if node.place and not self._is_module(node) else ""
        reason = str(error).partition(": give a domain")[0]
        path = node.path.rpartition(".")[0] if special else node.path  # of one input and output
        hint = "write what is around it as a module, which replace can name"
        if path:
            hint = f"give a layer in its place by replace={{{path!r}: layer}}"
        name = f"{node.path!r} {kind}" if node.path else kind
        self.problems.append(f"{name}{where}: {reason}; {hint}")

    def _is_module(self, node: Node) -> bool:
        owner = self.originals[node.path]
        return known_layer(owner) or type(owner) in CALLS

    # ----------------------------------------------------------------------- one node

    def _node(self, k: int, node: Node) -> None:
        layer = node.layer
        assert layer is not None
        self.axis[k] = self._channel_axis(k, node)
        self.depth[k] = max(self.depth[j] for j in node.inputs) + weighted(layer)
        if k in self.terms:
            self._sum(k, node)
        elif isinstance(layer, Join):
            self._join(k, node, layer)
        elif len(node.inputs) > 1:
            raise ValueError("has several inputs, and no 1-Lipschitz replacement")
        else:
            self._single(k, node, layer)

    def _channel_axis(self, k: int, node: Node) -> int:
        layer, shape = node.layer, node.shape
        before = self.graph.nodes[node.inputs[0]].shape
        last = (nn.Linear, nn.LayerNorm, nn.RMSNorm, MatrixProduct, SequenceOutput)
        if isinstance(layer, last):
            return max(len(shape), 1)
        return self.axis[node.inputs[0]] if before == shape and not weighted(layer) else 1

    def _single(self, k: int, node: Node, layer: nn.Module) -> None:
        shape = self.graph.nodes[node.inputs[0]].shape
        old = self.originals[node.path] if self._is_module(node) else layer
        if isinstance(layer, SequenceOutput):
            self._recurrent(k, node, layer)
            return
        if type(old) in CALLS:
            raise ValueError("has no 1-Lipschitz replacement")
        has_weights = any(True for _ in old.parameters())
        self.held.update(id(p) for p in old.parameters())
        if has_weights and id(old) in self.by_old and old is not layer:
            name = self.by_old[id(old)]
            chosen = Chosen(self.layers[name], "the same layer again")
        else:
            at_end, axis = not self.weights_follow[k], self.axis[k]
            known = self._given(old, shape) or self._functional(node, layer)
            chosen = known or replacement(old, shape, node.shape, axis, at_end, self.choice)
            name = ""
        self._check_shape(chosen.layer.eval(), shape, node.shape)
        if isinstance(layer, nn.Identity) and not self._is_module(node):
            self.place[k] = self.place[node.inputs[0]]
            if "dropout" in node.code:
                self.rows.append(Replacement(node.path, "dropout", "-", DROPPED, None, node.code))
            return
        self._keep(k, node, chosen.layer, node.inputs, chosen.why, chosen.moved, name)
        if has_weights and old is not layer and not name:
            self.by_old[id(old)] = cast(str, self.step_names[-1])

    def _recurrent(self, k: int, node: Node, layer: SequenceOutput) -> None:
        """Two outputs of one call are two steps that share a layer."""
        old = self.originals[node.path]
        if id(old) not in self.recurrent:
            self.recurrent[id(old)] = recurrent(old, layer.part, layer.count, self.choice)
            self.held.update(id(p) for p in old.parameters())
        new = SequenceOutput(self.recurrent[id(old)], layer.part, layer.initial())
        self._keep(k, node, new, node.inputs, "keeps norms at every length")

    def _given(self, old: nn.Module, shape: Shape) -> Chosen | None:
        if not isinstance(old, _Given):
            return None
        value = lipschitz_bound(old.layer.eval(), shape).value
        if value > 1 + SLACK:
            raise ValueError(f"replace gives a layer with the constant {value:.4g}, above 1")
        return Chosen(old.layer, "given by replace")

    def _functional(self, node: Node, layer: nn.Module) -> Chosen | None:
        """Answer for an operation with constants, which may be parameters of the module around."""
        if self._is_module(node):
            return None
        before = self.graph.nodes[node.inputs[0]].shape
        flat = node.shape == (math.prod(before),)
        if isinstance(layer, Rearrangement) and layer.moves_nothing and flat:
            return Chosen(nn.Flatten(), ALREADY)
        owner = self.originals[node.path]
        for part in (getattr(layer, name, None) for name in ("weight", "bias")):
            self._hold(owner, part)
        if isinstance(layer, Shift) and self._hold(owner, layer.constant):
            offset = Offset(layer.constant.to(self.choice.dtype))
            return Chosen(
                offset if layer.sign == 1 else nn.Sequential(Scale(-1.0), offset),
                "a learnt constant is added",
            )
        if isinstance(layer, Diagonal) and self._hold(owner, layer.factor):
            return Chosen(nn.Identity(), "a learnt factor has no constant")
        if isinstance(layer, MatrixProduct) and self._hold(owner, layer.matrix) and not layer.left:
            n, m = layer.matrix.shape
            dense = nn.Linear(n, m, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.matrix.mT)
            shape = (*node.shape[:-1], len(layer.matrix))
            return replacement(dense, shape, node.shape, 1, False, self.choice)
        return None

    def _hold(self, owner: nn.Module, constant: Tensor | None) -> bool:
        """Whether a constant is a parameter of a module, which lives on then."""
        for parameter in owner._parameters.values():
            if parameter is None or constant is None or not parameter.requires_grad:
                continue
            if constant.numel() != parameter.numel():
                continue
            value = parameter.detach()
            same = [value, value.mT] if value.dim() > 1 else [value]
            if any(
                torch.equal(v.flatten().to(constant), sign * constant.flatten())
                for v in same
                for sign in (1, -1)
            ):
                self.held.add(id(parameter))
                return True
        return False

    def _check_shape(self, layer: nn.Module, shape: Shape, expected: Shape) -> None:
        sample = torch.zeros(2, *shape, device=self.choice.device, dtype=self.choice.dtype)
        with torch.no_grad():
            found = tuple(layer(sample).shape[1:])
        if found != expected:
            raise ValueError(f"{type(layer).__name__} makes {found}, where {expected} is needed")

    # -------------------------------------------------------------------------- joins

    def _expanded(
        self, k: int, weight: float, readers: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, float]]:
        """Terms of a sum and their weights, see the note."""
        node = self.graph.nodes[k]
        for part, w in zip(node.inputs, cast(Add, node.layer).weights, strict=True):
            factor, term = weight * w, self.graph.nodes[part]
            if len(readers[part]) == 1 and _number(term.layer):
                self.swallowed.add(part)
                diagonal = cast(Diagonal, term.layer)
                if not self._hold(self.originals[term.path], diagonal.factor):
                    factor = factor * diagonal.values().item()
                (part,) = term.inputs  # noqa: PLW2901 - what is multiplied
                term = self.graph.nodes[part]
            if len(readers[part]) == 1 and type(term.layer) in (Add, Subtract):
                self.swallowed.add(part)
                yield from self._expanded(part, factor, readers)
            elif factor:
                yield part, factor

    def _sum(self, k: int, node: Node) -> None:
        sources, weights = (list(part) for part in zip(*self.terms[k], strict=True))
        self.depth[k] = max(self.depth[j] for j in sources)
        total = sum(map(abs, weights))
        if total <= 1 + 1e-12:
            self._keep(k, node, Add(*weights), sources, "weights that add up to at most 1")
            return
        shares = [w / total for w in weights]
        if len(set(map(abs, weights))) == 1:
            count = max(len(sources), len(self.terms))
            skip = min(range(len(sources)), key=lambda j: self.depth[sources[j]])
            if len({self.depth[j] for j in sources}) > 1:
                signs = [math.copysign(1.0, w) for w in weights]
                shares = [sign / count for sign in signs]
                shares[skip] = signs[skip] * (1 - (len(sources) - 1) / count)
        average = Average(shares, self.choice.device, self.choice.dtype)
        text = ", ".join(f"{share:.3g}" for share in shares)
        self._keep(k, node, average, sources, f"a learnt average, at first {text}")

    def _join(self, k: int, node: Node, layer: Join) -> None:
        factors = layer.factors(None, 2.0)  # or the reason why there are none
        inputs = tuple(self.place[j] for j in node.inputs)
        nodes = [*self.nominal, dataclasses.replace(node, inputs=inputs)]
        value = compose(Graph(tuple(nodes), len(nodes) - 1), [*self.constants, factors], 2.0)[-1]
        if value <= 1 + 1e-12:
            self._keep(k, node, layer, node.inputs, "branches that do not meet")
            return
        scaled = ScaledJoin(layer, 1 / value.item())
        why = f"divided by its constant {value.item():.4g}"
        self._keep(k, node, scaled, node.inputs, why, factors=[f / value for f in factors])

    # -------------------------------------------------------------------- writing down

    def _keep(
        self,
        k: int,
        node: Node,
        layer: nn.Module,
        inputs: Sequence[int],
        why: str,
        moved: float | None = None,
        name: str = "",
        factors: list[Tensor] | None = None,
    ) -> None:
        """Add a node, its layer and its row."""
        if not name:
            name = self._name(node)
            self.layers[name] = layer
        if factors is None:
            one = torch.ones((), dtype=torch.float64)
            factors = layer.factors(None, 2.0) if isinstance(layer, Join) else [one]
        shown = layer.join if isinstance(layer, ScaledJoin) else layer
        place = tuple(self.place[j] for j in inputs)
        self.nodes.append(dataclasses.replace(node, layer=layer, inputs=place))
        seen = (0,) if isinstance(layer, Average) else place  # whatever its weights, see the note
        self.nominal.append(dataclasses.replace(node, layer=shown, inputs=seen))
        self.constants.append(factors)
        self.place[k] = len(self.nodes) - 1
        self.step_names.append(name)
        old, is_module = node.layer, self._is_module(node)
        if is_module:
            old = self.originals[node.path]
        kind = old.old if isinstance(old, _Given) else _kind(old)
        code = "" if is_module else node.code
        self.rows.append(
            Replacement(node.path if is_module else name, kind, _kind(layer), why, moved, code)
        )

    def _name(self, node: Node) -> str:
        """Free name: the path of a module, or that of the one around and the operation."""
        path = node.path or "layer"
        if not self._is_module(node):
            kind = _kind(node.layer).partition(" ")[0]
            word = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", kind).lower()
            path = ".".join(filter(None, (node.path, word)))
        parts = [part + "_" if hasattr(GraphNetwork, part) else part for part in path.split(".")]
        path = ".".join(parts)
        taken = self.layers.keys() | (set() if self._is_module(node) else self.originals.keys())
        names = (path, *(f"{path}_{j}" for j in range(1, len(self.graph) + 1)))
        return next(name for name in names if name not in taken)

    def network(self, lipschitz: float) -> nn.Module:
        """Wire the layers, as a Sequential where the model is one."""
        scale = None if lipschitz == 1 else Scale(lipschitz)
        if scale is not None:
            self.rows.append(Replacement("", "-", "Scale", f"makes the constant {lipschitz:g}"))
        if all(map(known_layer, _leaves(self.model))):
            chain = iter([self.layers[cast(str, name)] for name in self.step_names[1:]])
            network = _rebuilt(self.model, chain)
            if scale is None:
                return network
            if not isinstance(self.model, nn.Sequential):
                return nn.Sequential(network, scale)
            network.add_module("scale", scale)
            return network
        # Layers that only pass their input on have no step.
        steps: list[tuple[str, tuple[int, ...]]] = []
        value = {0: 0}
        for k, node in enumerate(self.nodes[1:], 1):
            name = cast(str, self.step_names[k])
            inputs = tuple(value[j] for j in node.inputs)
            if isinstance(self.layers[name], nn.Identity):
                value[k] = inputs[0]
                continue
            steps.append((name, inputs))
            value[k] = len(steps)
        output = value[self.place[self.graph.output]]
        layers = {name: self.layers[name] for name, _ in steps}
        if scale is not None:
            layers["scale"] = scale
            steps.append(("scale", (output,)))
        return GraphNetwork(layers, steps, self._container)

    def _container(self, path: str) -> nn.Module:
        kind = type(self.originals.get(path))
        return kind() if kind in (nn.Sequential, nn.ModuleList) else nn.Module()


def _kind(layer: nn.Module | None) -> str:
    """Class of a layer, without torch's prefix for parametrized ones."""
    if isinstance(layer, nn.Sequential):
        return " ".join(_kind(part) for part in layer) or "Sequential"
    if isinstance(layer, ScaledJoin):
        return f"{_kind(layer.join)} Scale"
    if isinstance(layer, SequenceOutput):
        return _kind(layer.module)
    if isinstance(layer, (Rearrangement, LinearMap)):
        return layer.name
    name = type(layer).__name__
    return name.removeprefix("Parametrized")


def _number(layer: nn.Module | None) -> bool:
    return isinstance(layer, Diagonal) and layer.factor.dim() == 0


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of nested Sequentials in the order in which they are called."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for child in module._modules.values():
        yield from _leaves(child)


def _rebuilt(module: nn.Module, layers: Iterator[nn.Module]) -> nn.Module:
    if type(module) is not nn.Sequential:
        return next(layers)
    new = nn.Sequential()
    for name, child in module._modules.items():
        new.add_module(name, _rebuilt(child, layers))
    return new
