r"""Certificates from a Lipschitz bound: the margin, less the errors of the program at both ends."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook import errors, rules
from lipbook.composition import lipschitz_bound
from lipbook.composition.bounds import graph_bound
from lipbook.composition.local import ranges_of, row_constants
from lipbook.errors import ForwardError
from lipbook.graphs import Graph, trace
from lipbook.graphs.trace import unwrapped
from lipbook.norms import dual_exponent
from lipbook.norms.rigorous import _FLOOR, _UP, _gamma
from lipbook.robustness.arguments import Batches
from lipbook.robustness.certificate import (
    Certificate,
    check_logits,
    differences,
    least_quotient,
    pair_norms,
)
from lipbook.rounding import graph_error
from lipbook.rules import Domain, Range, Shape, outward

__all__ = ["certify"]


@torch.no_grad()
def certify(
    model: nn.Module,
    loader: Batches,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    sound: bool = True,
    preprocess: nn.Module | None = None,
    domain: Domain | None = None,
    method: Literal["product", "local"] = "product",
    lipschitz: float | None = None,
    output: str | int | None = None,
) -> Certificate:
    r"""Certify the predictions of a network, by its Lipschitz constant and its margins.

    With ``sound`` (the default) the statement is about the program: for every input :math:`x'` in
    the dtype of the model with :math:`\lVert x' - x\rVert_p \le r`, in real numbers, and
    :math:`r > 0`, the program returns the class that it returns at :math:`x`, in any batch, on any
    number of threads, as long as its sums follow the model of rounding
    (:func:`~lipbook.rounding.forward_error`). With the :math:`L`, :math:`a`, :math:`c` of the
    logits' difference :math:`z_y - z_j`,

    .. math::
        r = \min_{j \ne y} \frac{P_y(x) - P_j(x) - 2 a}{L + c} ,

    since :math:`f_{yj}(x) \ge P_{yj}(x) - a`, :math:`f_{yj}(x') \ge f_{yj}(x) - Lr` and
    :math:`P_{yj}(x') \ge f_{yj}(x') - a - c r`. Without ``sound`` it is :func:`certified_radius` of
    the same network, in real arithmetic.

    **On a domain** :math:`D`, convex, that holds the inputs (images: ``Box(0, 1)``), the
    Lipschitz constant may be one that holds near :math:`D` only. With :math:`L(r)` a bound on
    :math:`D_r = \{x : \operatorname{dist}_p(x, D) \le r\}` every

    .. math:: \min\Big(r,\; \min_{j \ne y} \frac{P_y(x) - P_j(x) - 2a}{L_{yj}(r) + c}\Big)

    is a radius: a neighbour within :math:`r` of :math:`x \in D` lies in :math:`D_r`, with the
    whole segment that joins the two, since :math:`D_r` is convex. The best of some
    :math:`r` is taken. With ``method="local"`` the set is the ball of radius :math:`r` around the
    input itself, for each input, and the bound is the interval of the Jacobians there
    (:mod:`lipbook.composition`); the radius is then never below that of the product.

    If the last layer is a :class:`torch.nn.Linear`, its rows give the bound of each difference
    (the second form of :func:`certified_radius`), and the rest of the network the
    :math:`L`. Weights under a parametrization are computed once, and those are the weights that
    the certificate is about. So are the scales of SLL and CPL layers, as this run computes
    them. Autocast, if on, is part of the program.

    Parameters
    ----------
    model : torch.nn.Module
        A network of modules that have rules, in evaluation mode, with outputs (batch, classes).
    loader : iterable
        Yields ``(inputs, labels)``: (batch, \*input_shape), of a dtype that the dtype of the model
        holds exactly, and int64 classes.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`.
    sound : bool
        Whether to account for rounding.
    preprocess : torch.nn.Module, optional
        What comes before the model: it must be a module with rules too (:class:`Standardize`,
        :class:`torch.nn.Upsample`, ``ZeroPad2d`` with negative sizes to crop), since
        radii are in the units of what the loader yields.

    domain : Box or Ball, optional
        Set that holds the inputs. The certificate names it. What is not Lipschitz on all of space
        (attention, products, squares) needs one.
    method : str
        ``"product"``, or ``"local"``: slower by a hundred times, and better for networks that were
        not trained to be certified.
    lipschitz : float, optional
        A bound of the Lipschitz constant that the caller vouches for, in place of the library's;
        with ``sound=False`` only, and marked in ``facts``.
    output : str or int, optional
        Which tensor holds the logits, if the network returns a dict or a tuple.

    Returns
    -------
    Certificate

    Raises
    ------
    TypeError
        If a module has no rule, or an argument is of another type.
    ValueError
        If the model is in training mode, is on an accelerator (``sound`` only), inputs or labels do
        not fit, or an output is NaN or infinite.

    Notes
    -----
    Of the median radius of a dense net 784-256-256-10 on digits 0.6 % is lost to rounding in
    float32, 7 % in float16 and 46 % in bfloat16; a batch takes twice the time of the net alone
    (``lipbook reproduce counterexamples``). The loss grows with the width of layers, since
    :math:`\gamma_n` does: it is a worst case, a thousand times what happens. ``facts`` of the
    certificate holds the median loss as ``lost_to_rounding``.

    References
    ----------
    :cite:t:`li2019preventing` for the certificate, :cite:t:`murray2026` for the error of programs.

    Examples
    --------
    >>> from lipbook.activations import MaxMin
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> net = nn.Sequential(OrthogonalLinear(8, 8), MaxMin(), nn.Linear(8, 3)).eval()
    >>> batch = torch.randn(100, 8), torch.randint(3, (100,))
    >>> real = certify(net, [batch], (8,), sound=False)
    >>> sound = certify(net, [batch], (8,))
    >>> bool((sound.radius <= real.radius).all()), bool((sound.radius > 0.999 * real.radius).any())
    (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode: call .eval()")
    if method not in ("product", "local"):
        raise ValueError(f"method must be 'product' or 'local', got {method!r}")
    if preprocess is not None:
        if not isinstance(preprocess, nn.Module):
            raise TypeError(
                "preprocess must be a torch.nn.Module with a Lipschitz rule, since it changes what "
                f"a radius means, got {type(preprocess).__name__}"
            )
        model = nn.Sequential(preprocess, unwrapped(model))
    shape = rules._shape(input_shape)
    p = rules._exponent(p)
    if lipschitz is not None and (sound or domain is not None or method != "product"):
        raise ValueError(
            "lipschitz is a number that the caller vouches for: it needs sound=False, and goes "
            "with no domain and no method"
        )
    with torch.inference_mode(False), torch.no_grad():
        reader = Reader(
            model,
            shape,
            p,
            sound=sound,
            domain=domain,
            method=method,
            lipschitz=lipschitz,
            output=output,
        )
        columns: list[list[Tensor]] = [[], [], [], []]
        for inputs, labels in loader:
            x = _check_inputs(inputs, labels, shape, reader.weight)
            logits, radius, real = reader(x)
            check_logits(logits, labels)
            for column, value in zip(
                columns, (radius, logits.argmax(1), labels, real), strict=True
            ):
                column.append(value.detach().cpu().clone())
    if not columns[0]:
        raise ValueError("loader must yield one batch at least, got none")
    radius, predictions, truth, real = (torch.cat(column) for column in columns)
    positive = real > 0
    kept = (radius[positive] / real[positive]).nan_to_num(1.0)  # infinite for both
    facts = {
        "lost_to_rounding": 1 - kept.median().item() if positive.any() else 0.0,
        "layers": reader.layers,
        "method": method if lipschitz is None else "vouched for by the caller",
        "domain": None if domain is None else repr(domain),
        "input_shape": list(shape),
        "dtype": str(reader.weight.dtype).removeprefix("torch."),
        "autocast": _autocast_name(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    return Certificate(radius, predictions, truth, float(p), sound, facts)


def _autocast_name() -> str | None:
    on = torch.is_autocast_enabled("cpu")
    return str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if on else None


def _weight_of(model: nn.Module) -> Tensor:
    """Return a tensor whose dtype and device are the model's."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def _split(graph: Graph) -> tuple[Graph, nn.Linear | None]:
    """Take the last layer off, if it is linear."""
    last = graph.nodes[graph.output]
    if isinstance(last.layer, nn.Linear) and type(last.layer).forward is nn.Linear.forward:
        return graph.until(last.inputs[0]), last.layer
    return graph, None


def _check_inputs(inputs: Tensor, labels: Tensor, shape: Shape, weight: Tensor) -> Tensor:
    """Refuse a batch that does not fit; return a copy of the inputs where the model is."""
    for name, tensor in (("inputs", inputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tuple(inputs.shape[1:]) != shape or not inputs.is_floating_point() or not len(inputs):
        raise ValueError(
            f"inputs must be floating-point of shape (batch, {', '.join(map(str, shape))}), got "
            f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    if not inputs.isfinite().all():
        raise ValueError("inputs must be finite, got NaN or infinite entries")
    x = inputs.detach().to(weight.dtype, copy=True)
    if not torch.equal(x.double(), inputs.double()):
        raise ValueError(
            f"inputs must be numbers of the model's dtype {weight.dtype}, got {inputs.dtype} with "
            "others: round them first, since a radius is measured from what the model sees"
        )
    return x.to(weight.device)


# Of a batch: logits, margins, errors, slopes of errors and Lipschitz constants of the differences
# of logits, each (batch, classes), and the distance up to which nothing overflows, (batch,).
RadiusAnalysis = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
_HALVINGS, _WIDTHS = 7, 12


class Reader:
    """Radii of batches: the network is read once, and what its layers answer is kept."""

    def __init__(
        self,
        model: nn.Module,
        shape: Shape,
        p: float,
        *,
        sound: bool,
        domain: Domain | None = None,
        method: str = "product",
        lipschitz: float | None = None,
        output: str | int | None = None,
    ) -> None:
        self.p, self.sound, self.shape = p, sound, shape
        self.graph = trace(model, shape, output=output)
        self.weight = _weight_of(model)
        self.body, self.head = _split(self.graph)
        self.domain, self.local = domain, method == "local"
        self.reads_values = domain is not None or self.local
        self.double = self.graph.double() if self.reads_values else None
        self.lipschitz, self.layers = self._bound(model, lipschitz, output)
        self.analysis: RadiusAnalysis | None = None
        self.widths: list[tuple[float, Tensor]] | None = None

    def _bound(
        self, model: nn.Module, lipschitz: float | None, output: str | int | None
    ) -> tuple[float, str]:
        """Bound of what comes before the head, and the table of the network."""
        if lipschitz is not None:
            if not 0 <= lipschitz < math.inf:
                raise ValueError(f"lipschitz must be a finite number >= 0, got {lipschitz}")
            self.body, self.head = self.graph, None
            return float(lipschitz), f"{lipschitz:g}, vouched for by the caller"
        if self.domain is not None:
            bound = lipschitz_bound(model, self.shape, self.p, domain=self.domain, output=output)
            return bound.value, bound.table()
        whole = lipschitz_bound(model, self.shape, self.p, output=output)
        return graph_bound(self.body, self.p).value, str(whole)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, radius, and radius in real arithmetic of a batch."""
        if self.analysis is None:
            self.analysis = self._of_program(x) if self.sound else self._in_real_arithmetic()
        logits, margins, off_by, slopes, steepness, room = self.analysis(x)
        labels = logits.argmax(1)
        down = 1 - 2.0**-40
        numerator = margins * down - 2 * off_by * _UP
        radius = least_quotient(numerator, (steepness + slopes) * _UP, labels)
        real = least_quotient(margins, steepness, labels)
        if self.reads_values:
            values = self._on_values(x, numerator, slopes, labels)
            if self.domain is not None:
                self._check_inside(x)
                radius = real = values
            else:
                radius = torch.maximum(radius, values)
                real = torch.maximum(real, values)
        if not self.sound:
            return logits, real, real
        radius = torch.minimum(radius, room).nan_to_num(0.0, posinf=math.inf).clamp(min=0) * down
        return logits, radius, real

    # Note [radius and domain]
    # A bound L(r) holds on the domain enlarged by r (for the local method: on the ball of radius r
    # around the input), a convex set that holds the input and all its neighbours within r. Along
    # the segment to a neighbour the margin falls by at most L(r) r, so that
    # min(r, margin / L(r)) is a radius for every r that one cares to try. The best of them is
    # where r = margin / L(r), which is halved for: L does not fall with r.

    def _on_values(self, x: Tensor, numerator: Tensor, slopes: Tensor, labels: Tensor) -> Tensor:
        """Largest radius found for bounds that hold on a set of inputs."""
        best = torch.zeros(len(x), dtype=torch.float64)
        if self.local:
            low = torch.zeros_like(best)
            constants = self._constants(self._range(x, low), labels)
            high = least_quotient(numerator, (constants + slopes) * _UP, labels).clamp(min=0)
            high = torch.minimum(high, torch.full_like(high, self._reach(x)))
            for _ in range(_HALVINGS):
                radius = (low + high) / 2
                constants = self._constants(self._range(x, radius), labels)
                allowed = least_quotient(numerator, (constants + slopes) * _UP, labels)
                holds = torch.minimum(radius, allowed).clamp(min=0)
                best = torch.maximum(best, holds)
                fits = allowed >= radius
                low, high = torch.where(fits, radius, low), torch.where(fits, high, radius)
            return best
        for width, constants in self._on_domain():
            allowed = least_quotient(numerator, (constants[:, labels][0] + slopes) * _UP, labels)
            best = torch.maximum(best, allowed.clamp(min=0, max=width))
        return best

    def _reach(self, x: Tensor) -> float:
        """Distance beyond which no input is."""
        return 1e3 * (1 + x.abs().max().item()) * x[0].numel() ** (1 / self.p)

    def _range(self, x: Tensor, radius: Tensor) -> Range:
        """Range of the ball around each input."""
        center = x.double().cpu()
        view = radius.view(-1, *[1] * (center.dim() - 1)) * _UP
        low, high = outward(center - view, center + view)
        spread = radius * _UP * (math.sqrt(center[0].numel()) if self.p == math.inf else 1.0)
        return Range(low, high, center, spread)

    def _check_inside(self, x: Tensor) -> None:
        assert self.domain is not None
        span = self.domain.range(self.shape)
        if not span.holds(x.double().cpu()):
            raise ValueError(
                f"inputs must lie in the domain {self.domain}, got values from "
                f"{x.min().item():.6g} to {x.max().item():.6g}"
            )

    def _rows(self, labels: Tensor, outputs: int) -> Tensor:
        """Differences of the logit predicted and each other, (batch, classes, classes)."""
        eye = torch.eye(outputs, dtype=torch.float64)
        return eye[labels][:, None] - eye[None]

    def _constants(self, values: Range, labels: Tensor) -> Tensor:
        """Lipschitz constants of the differences of logits, (batch, classes)."""
        assert self.double is not None
        ranges = ranges_of(self.double, values)
        outputs = self.double.nodes[self.double.output].shape[0]
        return row_constants(self.double, ranges, self._rows(labels, outputs), self.p)

    def _on_domain(self) -> list[tuple[float, Tensor]]:
        """Bounds of all differences on the domain, enlarged by each of some radii."""
        if self.widths is None:
            assert self.domain is not None
            assert self.double is not None
            outputs = self.double.nodes[self.double.output].shape[0]
            labels = torch.arange(outputs)
            span = self.domain.range(self.shape)
            width = float((span.high - span.low).flatten().norm(p=self.p)) or 1.0
            self.widths = []
            for k in range(_WIDTHS):
                radius = width * 2.0 ** ((1 - k) / 2)
                try:
                    enlarged = self.domain.enlarged(radius, self.p).range(self.shape)
                    ranges = ranges_of(self.double, enlarged)
                    rows = self._rows(labels, outputs).flatten(0, 1)[None]
                    constants = row_constants(self.double, ranges, rows, self.p)
                except ValueError:
                    if k == _WIDTHS - 1:
                        raise
                    continue  # the wider set leaves where a layer is Lipschitz
                self.widths.append((radius, constants.view(1, outputs, outputs)))
        return self.widths

    def _in_real_arithmetic(self) -> RadiusAnalysis:
        weight = None if self.head is None else self.head.weight
        tiny = max(self.lipschitz, torch.finfo(torch.float64).tiny)

        def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
            logits = self.graph.run(x.clone())
            if logits.dim() != 2:
                raise ValueError(f"model must return (batch, classes), got {tuple(logits.shape)}")
            labels = logits.argmax(1)
            norms = (
                torch.full(logits.shape, 2 ** (1 / dual_exponent(self.p)), dtype=torch.float64)
                if weight is None
                else pair_norms(weight.double(), self.p)[labels]
            )
            zero = torch.zeros_like(norms)
            margins = differences(logits.double(), labels)
            return logits, margins, zero, zero, norms * tiny, zero[:, 0] + math.inf

        return analysis

    def _of_program(self, example: Tensor) -> RadiusAnalysis:
        inner = graph_error(self.body, example, self.p)
        features = self.body.run(example.clone())
        if features.dim() != 2:
            raise ValueError(f"model must return (batch, classes), got {tuple(features.shape)}")
        outer: _Differences | _HeadDifferences = (
            _Differences(self.p)
            if self.head is None
            else _HeadDifferences(self.head, features, self.p)
        )

        def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
            total = outer.arrive(inner(x))
            step = outer(total.outputs)
            labels = step.logits.argmax(1)
            margins = differences(step.logits.double(), labels)
            gap, stretch = 2 * total.error[:, None], (total.lipschitz + total.slope) * _UP
            steepness = step.norms * total.lipschitz * _UP + _FLOOR
            error = step.norms * total.error[:, None] + step.errors + step.slopes * gap
            slope = step.norms * total.slope + step.slopes * stretch + _FLOOR
            room = torch.minimum(total.limit, (step.limit - gap[:, 0]) / max(stretch, 1e-300))
            return step.logits, margins, error, slope, steepness, room

        return analysis


class _DifferenceErrors(NamedTuple):
    """What a head does to the differences of the logit predicted and each other."""

    logits: Tensor
    norms: Tensor  # Lipschitz constants of the differences, (batch, classes)
    errors: Tensor  # of both logits
    slopes: Tensor
    limit: Tensor


class _Differences:
    """Differences of logits, two entries of a vector whose errors are known together."""

    def __init__(self, p: float) -> None:
        self.norm = 2 ** (1 / dual_exponent(p)) * _UP

    def arrive(self, total: ForwardError) -> ForwardError:
        return total

    def __call__(self, logits: Tensor) -> _DifferenceErrors:
        norms = torch.full(logits.shape, self.norm, dtype=torch.float64)
        zero = torch.zeros_like(norms)
        return _DifferenceErrors(logits, norms, zero, zero, zero[:, 0] + math.inf)


class _HeadDifferences:
    """Differences of the outputs of a linear layer, with a constant and an error for each."""

    def __init__(self, head: nn.Linear, example: Tensor, p: float) -> None:
        self.head, self.p = head, p
        self.dtype = errors._computing_dtype(example, head.weight)
        weight = head.weight.detach().to(self.dtype)
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
        slack = 1 + (weight.shape[1] + 8) * torch.finfo(torch.float64).eps
        self.pairs = pair_norms(weight.double(), p) * slack + 2.0**-500 * weight.shape[1]
        self.rows = self.pairs.new_tensor(
            [errors._norms(row[None], dual_exponent(p)) for row in weight]
        )
        self.absolute = weight.abs().to(torch.promote_types(self.dtype, torch.float32))
        self.bias = bias.to(self.dtype).double().abs()

    def arrive(self, total: ForwardError) -> ForwardError:
        if total.outputs.dtype == self.dtype:
            return total
        return errors._then(total, errors._cast(total.outputs, self.dtype, self.p))

    def __call__(self, features: Tensor) -> _DifferenceErrors:
        logits = self.head(features)
        half, working = errors._is_half(logits.dtype), self.absolute.dtype
        terms = (features.shape[1] + 2) * (2 if half else 1)
        gamma = _gamma(terms, working)
        inside = errors._exactly(functional.linear, features.abs().to(working), self.absolute)
        inside = inside.double() * (1 + 2 * gamma) + self.bias  # |W||x| + |b|
        underflow = 2 * terms * torch.finfo(working).tiny
        largest = self.absolute.max().double() + errors._norms(features, self.p)[:, None]
        off_by = gamma * inside + underflow * (1 + largest)
        slopes = gamma * self.rows + underflow
        if half:  # as in _Affine
            off = torch.finfo(logits.dtype).eps
            off *= 1 + 4 * off
            off_by += off * (logits.double().abs() + 2 * self.bias + 2 * gamma * inside)
            off_by += 2 * errors._quantum(logits.dtype)
            slopes += off * (1 + 2 * gamma) * self.rows
        own = logits.argmax(1)
        room = torch.finfo(logits.dtype).max / 4 - inside.amax(1)
        return _DifferenceErrors(
            logits,
            self.pairs[own],
            (off_by + off_by.gather(1, own[:, None])) * _UP,
            (slopes + slopes[own][:, None]) * _UP,
            room / self.rows.max().clamp(min=1e-300),
        )
