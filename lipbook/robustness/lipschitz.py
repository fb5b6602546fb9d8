r"""Certificates from a Lipschitz bound: the margin, less the errors of the program at both ends."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from lipbook import errors, rules
from lipbook._processes import Digest, Team
from lipbook.composition import lipschitz_bound
from lipbook.composition.bounds import graph_bound
from lipbook.composition.local import answered, ranges_of, row_constants
from lipbook.errors import ForwardError
from lipbook.freezing import freeze, freeze_rule
from lipbook.graphs import Graph, trace
from lipbook.graphs.trace import unwrapped
from lipbook.norms import dual_exponent
from lipbook.norms.rigorous import _FLOOR, _UP, _gamma
from lipbook.robustness.arguments import Batches, pairs
from lipbook.robustness.certificate import (
    VOUCHED,
    Certificate,
    check_logits,
    class_logits,
    class_rows,
    differences,
    least_quotient,
    pair_norms,
)
from lipbook.rounding import graph_error, range_error_rule, range_errors
from lipbook.rules import Ball, Box, Domain, Range, Shape, outward

__all__ = ["Certifier", "certify"]


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
    group: distributed.ProcessGroup | None = None,
) -> Certificate:
    r"""Certify the predictions of a network, by its Lipschitz constant and its margins.

    With ``sound`` (the default) the statement is about the program: for every input :math:`x'` in
    the dtype of the model with :math:`\lVert x' - x\rVert_p \le r`, in real numbers, and
    :math:`r > 0`, the program returns the class that it returns at :math:`x`, in any batch, on any
    number of threads, as long as its sums and elementary functions follow the model of rounding
    (:func:`~lipbook.rounding.forward_error`). With the :math:`L`, :math:`a`, :math:`c` of the
    logits' difference :math:`z_y - z_j`,

    .. math::
        r = \min_{j \ne y} \frac{P_y(x) - P_j(x) - 2 a}{L + c} ,

    since :math:`f_{yj}(x) \ge P_{yj}(x) - a`, :math:`f_{yj}(x') \ge f_{yj}(x) - Lr` and
    :math:`P_{yj}(x') \ge f_{yj}(x') - a - c r`. Without ``sound`` it is :func:`certified_radius` of
    the same network, in real arithmetic.

    **On a domain** :math:`D`, convex, that holds the inputs (images: ``Box(0, 1)``), the
    Lipschitz constant may be one that holds near :math:`D` only. With :math:`L_{yj}(r)` a bound on
    :math:`D_r = \{x : \operatorname{dist}_p(x, D) \le r\}` every

    .. math:: \min\Big(r,\; \min_{j \ne y} \frac{P_y(x) - P_j(x) - 2a}{L_{yj}(r) + c}\Big)

    is a radius: a neighbour within :math:`r` of :math:`x \in D` lies in :math:`D_r`, with the
    whole segment that joins the two, since :math:`D_r` is convex. Neighbours outside :math:`D`
    count. The best of some :math:`r` is taken, and the radius of all of space, if that is more.

    With ``method="local"`` the set is the ball of radius :math:`r` around the input itself, for
    each input, and the bound is the interval of the Jacobians there (:mod:`lipbook.composition`).
    The radius is never below that of the product, and is the distance to the border itself where
    no unit changes its slope up to there. It costs: each :math:`r` that is tried (some five for
    an input, sixteen at most) takes the ranges of all layers and a row backwards for each
    difference of logits that could decide. Twenty digits on a small convolutional network take
    1.6 s, against 0.8 s for the product, most of it for the norms of the weights.

    Products, attention and recurrence have errors on sets only, and normalisation has smaller ones
    there. Then :math:`a` is that of :math:`D_r`, or of the ball, and c is 0
    (:func:`~lipbook.rounding.forward_error`).

    **One output** :math:`z`, (batch, 1), is a binary classifier: class 0 where :math:`z \le 0`,
    class 1 where :math:`z > 0`. Its logits are :math:`(0, z)` and its margin is :math:`|z|`, so
    that :math:`r = (|z| - 2a) / (L + c)` with the :math:`L` of :math:`z` itself.

    If the last layer is a :class:`torch.nn.Linear`, its rows give the bound of each difference
    (the second form of :func:`certified_radius`), and the rest of the network the
    :math:`L`. Weights under a parametrization are computed once, and those are the weights that
    the certificate is about. So are the scales of SLL and CPL layers, and the matrices of
    sandwich layers, as this run computes them. Autocast, if on, is part of the program.

    **Several processes.** With a ``group``, process r of R certifies the batches r, r + R, ... of
    the loader, and all return the whole certificate: bit for bit that of one process with as many
    threads on the same machine, since each batch is certified as one. The network is read by each.
    All processes are called with the same arguments and the same data, which is compared, the
    network before the work and the batches (by SHA-256) after it; what one refuses all refuse. A
    script that ``torchrun`` starts passes ``torch.distributed.group.WORLD``, which is None in a
    script that is started alone.

    Parameters
    ----------
    model : torch.nn.Module
        Any network whose layers and operations have rules, in evaluation mode, with outputs
        (batch, classes), or (batch, 1) for a binary classifier.
    loader : iterable
        Yields ``(inputs, labels)``: (batch, \*input_shape), of a dtype that the dtype of the model
        holds exactly, and classes in any integer dtype.
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
        ``"product"``, or ``"local"``: slower, and better for networks that were not trained to be
        certified.
    lipschitz : float, optional
        A bound of the Lipschitz constant that the caller vouches for, in place of the library's;
        with ``sound=False`` only, and marked in ``facts``.
    output : str or int, optional
        Which tensor holds the logits, if the network returns a dict or a tuple.
    group : torch.distributed.ProcessGroup, optional
        Processes that share the batches, this one among them; this one alone unless given.

    Returns
    -------
    Certificate

    Raises
    ------
    TypeError
        If a module has no rule, or an argument is of another type.
    ValueError
        If the model is in training mode, inputs or labels do not fit, inputs lie outside the
        domain, an output is NaN or infinite, the device or its settings are not those of the model
        of rounding (``sound`` only; on a GPU of NVIDIA enter
        :func:`~lipbook.rounding.ieee_cuda`), or autocast is on for a sound certificate with a
        domain or ``method="local"``: it rounds the weights. If the network, an argument or a
        batch is not the same on all processes of the group.
    RuntimeError
        If another process of the group failed otherwise, or makes other calls.

    Notes
    -----
    Of the median radius of a dense net 784-256-256-10 on digits 0.4 % is lost to rounding in
    float32, 7 % in float16 and 46 % in bfloat16 (``lipbook reproduce counterexamples``). The bound
    is computed once, and for many calls by :class:`Certifier`; a batch of 500 takes 1.3 times as
    long as the net alone in real arithmetic, and 1.6 times sound, there.
    The loss grows with the width of layers, since :math:`\gamma_n` does: it is a
    worst case, a thousand times what happens. ``facts`` of the certificate holds the median loss
    as ``lost_to_rounding``, and what is assumed of a GPU of NVIDIA as ``assumed``.

    References
    ----------
    :cite:t:`li2019preventing` for the certificate, :cite:t:`murray2026` for the error of programs.

    Examples
    --------
    >>> from lipbook.activations import MaxMin
    >>> from lipbook.composition import Box
    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> net = nn.Sequential(OrthogonalLinear(8, 8), MaxMin(), nn.Linear(8, 3)).eval()
    >>> batch = torch.randn(100, 8), torch.randint(3, (100,))
    >>> real = certify(net, [batch], (8,), sound=False)
    >>> sound = certify(net, [batch], (8,))
    >>> bool((sound.radius <= real.radius).all()), bool((sound.radius > 0.999 * real.radius).any())
    (True, True)

    An ordinary network has larger radii near its inputs than everywhere:

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    >>> local = certify(net, [batch], (8,), method="local")
    >>> product = certify(net, [batch], (8,))
    >>> bool((local.radius >= product.radius).all())
    True
    >>> bool(local.radius.median() > 1.1 * product.radius.median())
    True

    A gate makes a product, which is Lipschitz on bounded sets only:

    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
    ...     def forward(self, x):
    ...         return self.head(x * torch.sigmoid(self.gate(x)))
    >>> images = torch.rand(100, 8), batch[1]
    >>> boxed = certify(Gated().eval(), [images], (8,), domain=Box(0, 1))
    >>> bool((boxed.radius > 0).all()), boxed.facts["domain"]
    (True, 'Box(low=0, high=1)')
    """
    with Team(group) as team:
        certifier = Certifier(
            model,
            input_shape,
            p,
            sound=sound,
            preprocess=preprocess,
            domain=domain,
            method=method,
            lipschitz=lipschitz,
            output=output,
        )
        return certifier._certified(loader, team)


class Certifier:
    r"""A network that is read once and certified many times, batch by batch.

    ``Certifier(model, input_shape, ...)(loader)`` is ``certify(model, loader, input_shape, ...)``.
    Norms, factors of rounding and the graph are computed at the beginning and kept, with a copy of
    the network. Each call compares the network with what it was, all parameters, buffers, numbers
    and texts by value and objects of other classes by identity, and refuses if anything has
    changed, in whatever way (``weight.data.mul_(2)`` leaves no trace in the counters of torch).
    The comparison reads each weight once, which is less than what one input costs the network.

    Parameters
    ----------
    model, input_shape, p, sound, preprocess, domain, method, lipschitz, output
        As in :func:`certify`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`certify`; in a call, also if the network, autocast or the algorithms that
        torch may choose are no longer those of the beginning.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    >>> certifier = Certifier(net, (8,))
    >>> x, y = torch.randn(100, 8), torch.randint(3, (100,))
    >>> one = certifier([(x[:50], y[:50])]), certifier([(x[50:], y[50:])])
    >>> whole = certify(net, [(x[:50], y[:50]), (x[50:], y[50:])], (8,))
    >>> bool((torch.cat([part.radius for part in one]) == whole.radius).all())
    True
    >>> _ = net[0].weight.data.mul_(2)
    >>> certifier([(x, y)])
    Traceback (most recent call last):
    ...
    ValueError: model must be as it was when it was read, but 0.weight has changed: make another
        Certifier
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        p: float = 2,
        *,
        sound: bool = True,
        preprocess: nn.Module | None = None,
        domain: Domain | None = None,
        method: Literal["product", "local"] = "product",
        lipschitz: float | None = None,
        output: str | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if model.training:
            raise ValueError("model must be in evaluation mode: call .eval()")
        if method not in ("product", "local"):
            raise ValueError(f"method must be 'product' or 'local', got {method!r}")
        self._read = {"": model}
        if preprocess is not None:
            if not isinstance(preprocess, nn.Module):
                raise TypeError(
                    "preprocess must be a torch.nn.Module with a Lipschitz rule, since it changes "
                    f"what a radius means, got {type(preprocess).__name__}"
                )
            self._read["preprocess"] = preprocess
            model = nn.Sequential(preprocess, unwrapped(model))
        self._shape = rules._shape(input_shape)
        self._p = rules._exponent(p)
        if lipschitz is not None and (sound or domain is not None or method != "product"):
            raise ValueError(
                "lipschitz is a number that the caller vouches for: it needs sound=False, and goes "
                "with no domain and no method"
            )
        self._sound, self._domain, self._output = sound, domain, output
        self._method = method if lipschitz is None else VOUCHED
        self._before = _snapshot(self._read)
        with torch.inference_mode(False), torch.no_grad():
            self._reader = Reader(
                model,
                self._shape,
                self._p,
                sound=sound,
                domain=domain,
                method=method,
                lipschitz=lipschitz,
                output=output,
            )
        self._settings = _settings(self._reader.weight)

    def __call__(
        self, loader: Batches, group: distributed.ProcessGroup | None = None
    ) -> Certificate:
        """Certify the predictions on the batches of a loader, see :func:`certify`."""
        with Team(group) as team:
            return self._certified(loader, team)

    @torch.no_grad()
    def _certified(self, loader: Batches, team: Team) -> Certificate:
        """Certify every so many batches, and gather what the others have found of the rest."""
        reader = self._reader
        self._check_unchanged()
        several = team.size > 1
        if several:
            team.agree(**self._arguments())
        rows: list[tuple[Tensor, ...]] = []
        seen, count = Digest(), 0
        with torch.inference_mode(False), torch.no_grad():
            for inputs, labels in pairs(loader):
                if several:
                    seen.update((inputs, labels))
                count += 1
                if (count - 1) % team.size != team.rank:
                    continue
                x = _check_inputs(inputs, self._shape, reader.weight)
                logits, radius, real = reader(x)
                check_logits(logits, labels)
                found = radius, logits.argmax(1), labels.long(), real
                rows.append(tuple(value.detach().cpu().clone() for value in found))
        team.agree(loader=seen)
        shares = team.gather("the radii", rows)
        rows = [shares[k % team.size][k // team.size] for k in range(count)]
        radius, predictions, truth, real = map(torch.cat, zip(*rows, strict=True))
        positive = real > 0
        kept = (radius[positive] / real[positive]).nan_to_num(1.0)  # infinite for both
        domain = self._domain
        facts = {
            "lost_to_rounding": 1 - kept.median().item() if positive.any() else 0.0,
            "layers": reader.layers,
            "method": self._method,
            "domain": None if domain is None else " ".join(repr(domain).split()),
            "input_shape": list(self._shape),
            "dtype": str(reader.weight.dtype).removeprefix("torch."),
            "autocast": _autocast_name(reader.weight.device.type),
            "torch": torch.__version__,
            "machine": platform.machine(),
            **(_of_gpu(reader.weight.device) if reader.weight.device.type == "cuda" else {}),
        }
        return Certificate(radius, predictions, truth, float(self._p), self._sound, facts)

    def _arguments(self) -> dict[str, Any]:
        """Name what the processes of a group must have in common."""
        fresh = vars(nn.Module())
        opened = {name: unwrapped(module) for name, module in self._read.items()}
        state = [
            (name, value)
            for name, value in _snapshot(opened, copied=False).items()
            if name.rpartition(".")[2] not in fresh
        ]
        return {
            "model": Digest(state, self._settings),
            "lipschitz": self._reader.lipschitz,
            "input_shape": self._shape,
            "p": float(self._p),
            "sound": self._sound,
            "domain": self._domain,
            "method": self._method,
            "output": self._output,
        }

    def _check_unchanged(self) -> None:
        """Refuse a network or settings other than those that were read."""
        now = _snapshot(self._read, copied=False)
        for name in (*self._before, *now):
            both = name in self._before and name in now
            if not (both and _same(self._before[name], now[name])):
                raise ValueError(
                    f"model must be as it was when it was read, but {name} has changed: make "
                    "another Certifier"
                )
        if self._sound:
            errors._check_arithmetic(self._reader.weight)
        if self._settings != _settings(self._reader.weight):
            raise ValueError(
                "autocast, oneDNN, NNPACK and cuDNN must be switched on or off as they were when "
                "the model was read: make another Certifier"
            )


def _snapshot(modules: dict[str, nn.Module], copied: bool = True) -> dict[str, Any]:
    """Everything that a network computes with: classes, tensors, attributes, hooks."""
    found: dict[str, Any] = {}
    for prefix, whole in modules.items():
        for path, module in whole.named_modules(prefix=prefix, remove_duplicate=False):
            place = f"{path}." if path else ""
            found[f"{place}class"] = type(module)
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers"):
                    found |= {f"{place}{own}": _kept(part, copied) for own, part in value.items()}
                elif name != "_modules":
                    found[f"{place}{name}"] = _kept(value, copied)
    return found


def _kept(value: Any, copied: bool) -> Any:
    """Value of an attribute, which later changes in place leave alone if it is copied."""
    if isinstance(value, Tensor):
        return value.detach().clone() if copied else value.detach()
    if isinstance(value, (tuple, list)):
        return tuple(_kept(part, copied) for part in value)
    if isinstance(value, dict):
        return tuple((key, _kept(part, copied)) for key, part in value.items())
    return value


def _same(before: Any, now: Any) -> bool:
    """Whether an attribute has the value that it had; of unknown classes, is the same object."""
    if type(before) is not type(now):
        return False
    if isinstance(before, Tensor):
        alike = (before.dtype, before.device) == (now.dtype, now.device)
        return alike and torch.equal(before, now)
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, (int, float, complex, str)):
        return before is now or before == now
    return before is now


def _settings(weight: Tensor) -> tuple[Any, ...]:
    """Name what else decides on the program: autocast, and the libraries that may convolve."""
    return (
        _autocast_name(weight.device.type),
        torch._C._get_mkldnn_enabled(),
        torch._C._get_nnpack_enabled(),
        torch.backends.cudnn.enabled,
    )


def _autocast_name(device: str) -> str | None:
    on = torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if on else None


def _of_gpu(device: torch.device) -> dict[str, Any]:
    """Facts of a certificate about a program on a GPU."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "assumed": list(errors.CUDA_HYPOTHESES),
    }


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


def _check_inputs(inputs: Tensor, shape: Shape, weight: Tensor) -> Tensor:
    """Refuse a batch that does not fit; return a copy of the inputs where the model is."""
    if tuple(inputs.shape[1:]) != shape:
        raise ValueError(
            f"inputs must have shape (batch, {', '.join(map(str, shape))}), got "
            f"{tuple(inputs.shape)}"
        )
    if not torch.stack(inputs.aminmax()).isfinite().all():  # NaN is the least and the largest
        raise ValueError("inputs must be finite, got NaN or infinite entries")
    x = inputs.detach().to(weight.dtype, copy=True)
    if x.dtype != inputs.dtype and not torch.equal(x.double(), inputs.double()):
        raise ValueError(
            f"inputs must be numbers of the model's dtype {weight.dtype}, got {inputs.dtype} with "
            "others: round them first, since a radius is measured from what the model sees"
        )
    return x.to(weight.device)


# Of a batch: logits, margins, errors, slopes of errors and Lipschitz constants of the differences
# of logits, each (batch, classes), and the distance up to which nothing overflows, (batch,).
RadiusAnalysis = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
_TRIES, _WIDTHS = 16, 24
_DOWN = 1 - 2.0**-40


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
        self.double: Graph | None = None
        if domain is not None or self.local:
            if self.weight.device.type == "cuda":
                raise ValueError(
                    "domain and method='local' are for networks on the CPU, got one on CUDA: call "
                    ".cpu()"
                )
            if sound and _autocast_name("cpu") is not None:
                raise ValueError(
                    "autocast rounds the weights, so that bounds on a domain or near an input "
                    "would be those of another function: certify the model in that dtype, or "
                    "with sound=False"
                )
            double = _as_run(self.graph).double() if sound else self.graph.double()
            self.double = answered(double, p)
        self.lipschitz, self.layers = self._bound(model, lipschitz, output)
        self.analysis: RadiusAnalysis | None = None
        self.on_ranges: Callable[[Sequence[Range]], Tensor] | None = None
        self.widths: list[tuple[float, Tensor, float]] | None = None

    def _bound(
        self, model: nn.Module, lipschitz: float | None, output: str | int | None
    ) -> tuple[float, str]:
        """Bound of what comes before the head, and the table of the network."""
        if lipschitz is not None:
            if not 0 <= lipschitz < math.inf:
                raise ValueError(f"lipschitz must be a finite number >= 0, got {lipschitz}")
            self.body, self.head = self.graph, None
            return float(lipschitz), f"{lipschitz:g}, {VOUCHED}"
        if self.domain is not None:
            bound = lipschitz_bound(model, self.shape, self.p, domain=self.domain, output=output)
            try:
                return graph_bound(self.body, self.p).value, bound.table()
            except (TypeError, ValueError):  # not Lipschitz on all of space
                return math.inf, bound.table()
        body, model = self.body, rules._plain_copy(unwrapped(model))  # weights computed once
        if self.weight.device.type != "cpu":  # where factorisations are faster and more accurate
            model, body = model.cpu(), body.cpu()
        whole = lipschitz_bound(model, self.shape, self.p, output=output)
        return graph_bound(body, self.p).value, str(whole)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, radius, and radius in real arithmetic of a batch."""
        if self.domain is not None:
            _check_inside(self.domain, x)
        if self.analysis is None:
            self.analysis = self._of_program(x) if self.sound else self._in_real_arithmetic()
        logits, margins, off_by, slopes, steepness, room = self.analysis(x)
        labels = logits.argmax(1)
        numerator = margins * _DOWN - 2 * off_by * _UP if self.sound else margins
        room = room.nan_to_num(0.0, posinf=math.inf).clamp(min=0)
        unknown = torch.full_like(numerator, -math.inf)
        quotients = _Quotients(numerator, margins, slopes, labels, room, unknown)
        found = quotients(steepness)
        if self.domain is not None:
            for width, constants, error in self._on_domain():
                part = self._less(quotients, torch.full_like(margins[:, 0], error))
                found = found.or_within(width, part(constants[labels]))
        if self.local:
            found = self._on_balls(x, quotients, found)
        radius, real = found
        if not self.sound:
            return logits, real, real
        radius = radius.nan_to_num(0.0, posinf=math.inf).clamp(min=0) * _DOWN
        return logits, radius, real

    def _less(self, quotients: _Quotients, error: Tensor) -> _Quotients:
        """Take errors of the outputs on a set off the margins, if those are known."""
        if self.on_ranges is None:
            return quotients
        outputs = self.graph.nodes[self.graph.output].shape[0]
        norms = pair_norms(class_rows(outputs), self.p)[quotients.labels] * _UP
        lost = torch.where(norms > 0, 2 * norms * error[:, None] * _UP, 0.0)
        return quotients._replace(on_set=quotients.margins * _DOWN - lost)

    # Note [radius and domain]
    # L(r) bounds the difference of two logits on a convex set that holds the input and all its
    # neighbours within r: the domain enlarged by r, or the ball of radius r around the input. On
    # the segment to a neighbour within min(r, margin / L(r)), which lies in that set, the margin
    # falls by no more than itself. So each r that is tried proves a radius, on its own, whatever
    # the others proved; the largest of these is kept. That L does not fall with r is needed for
    # none of them, but it tells where to look: with A(r) = margin / L(r), the best radius lies
    # between r and A(r), for every r. And a bound on a ball holds on all smaller balls, so that
    # only those differences are asked again that could decide there.
    #
    # An error that is known for all of such a set (products, attention, normalisation) holds at the
    # input and at the neighbour, both of which are in it, and is taken off twice. Each difference
    # of logits takes the better of the two errors.

    def _on_balls(self, x: Tensor, quotients: _Quotients, found: _Found) -> _Found:
        """Largest radii found from balls around the inputs."""
        labels = quotients.labels
        everything = torch.ones_like(quotients.margins, dtype=torch.bool)
        everything.scatter_(1, labels[:, None], False)
        slope = self._constants(x, labels.new_zeros(len(x)).double(), labels, everything)
        high = torch.minimum(least_quotient(quotients.margins, slope, labels), self._reach(x))
        low = torch.zeros_like(high)
        known = torch.full_like(slope, math.inf)  # on balls no smaller than those to come
        some = (high > 0).nonzero()[:, 0]
        for k in range(_TRIES):
            if not len(some):
                break
            part, own = quotients.of(some), labels[some]
            top, bottom, bound = high[some], low[some], known[some]
            least = torch.maximum(bottom, top * 2.0**-10)  # a step goes down by 32 at most
            radius = top if k == 0 else least.sqrt() * top.sqrt()
            part = self._less(part, self._ball_errors(x[some], radius))
            asked = part.each(bound) < radius[:, None]
            asked.scatter_(1, own[:, None], False)
            fresh = torch.minimum(self._constants(x[some], radius, own, asked), bound)
            bound = torch.where(asked, fresh, bound)
            allowed = part(bound)
            found = found.with_some(some, radius, allowed)
            fits = allowed.sound >= radius
            above = part(torch.where(asked, bound, 0.0)).sound
            low[some] = torch.maximum(bottom, torch.minimum(radius, allowed.sound))
            high[some] = torch.where(fits, torch.minimum(top, above), radius)
            known[some] = torch.where(fits[:, None], known[some], bound)
            some = some[(high > low * (1 + 2.0**-8))[some]]
        return found

    def _reach(self, x: Tensor) -> Tensor:
        """Distance of each input beyond which nothing is tried, (batch,)."""
        largest = x.flatten(1).abs().amax(1).double().cpu()
        return 1e3 * (1 + largest) * x[0].numel() ** (1 / self.p)

    def _constants(self, x: Tensor, radius: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """Lipschitz constants of differences of logits on balls, where asked, else infinity."""
        count = int(asked.sum(1).max())
        found = torch.full(asked.shape, math.inf, dtype=torch.float64)
        if not count:
            return found
        which = asked.long().topk(count, 1).indices
        assert self.double is not None
        unit = class_rows(self.double.nodes[self.double.output].shape[0])
        rows = unit[labels][:, None] - unit[which]
        try:
            ranges = ranges_of(self.double, self._ball(x, radius))
            constants = row_constants(self.double, ranges, rows, self.p)
        except ValueError:
            if not (radius > 0).all():
                raise
            if len(x) == 1:  # the ball leaves where a layer is Lipschitz
                return found
            each = zip(x.split(1), radius.split(1), labels.split(1), asked.split(1), strict=True)
            return torch.cat([self._constants(*one) for one in each])
        constants = constants.expand(which.shape).nan_to_num(math.inf, posinf=math.inf)
        return torch.where(asked, found.scatter(1, which, constants), math.inf)

    def _ball_errors(self, x: Tensor, radius: Tensor) -> Tensor:
        """Errors of the outputs on balls, if those are known, (batch,)."""
        if self.on_ranges is None:
            return radius
        assert self.double is not None
        try:
            found = self.on_ranges(ranges_of(self.double, self._ball(x, radius)))
            return found.expand(len(x))
        except ValueError:
            if len(x) == 1:  # the ball leaves where a layer is Lipschitz
                return torch.full_like(radius, math.inf)
            each = zip(x.split(1), radius.split(1), strict=True)
            return torch.cat([self._ball_errors(*one) for one in each])

    def _ball(self, x: Tensor, radius: Tensor) -> Range:
        """Range of the ball around each input."""
        center = x.double().cpu()
        view = radius.view(-1, *[1] * (center.dim() - 1)) * _UP
        low, high = outward(center - view, center + view)
        spread = radius * _UP * (math.sqrt(center[0].numel()) if self.p == math.inf else 1.0)
        return Range(low, high, center, spread * _UP)

    def _on_domain(self) -> list[tuple[float, Tensor, float]]:
        """Bounds of all differences on the domain, enlarged by each of some radii, and errors."""
        if self.widths is None:
            assert self.domain is not None
            assert self.double is not None
            unit = class_rows(self.double.nodes[self.double.output].shape[0])
            first, second = torch.triu_indices(len(unit), len(unit), 1)
            span = self.domain.range(self.shape)
            width = float((span.high - span.low).flatten().norm(p=self.p)) or 1.0
            self.widths = []
            for k in range(_WIDTHS):
                radius = width * 2.0 ** ((2 - k) / 4)
                try:
                    ranges = ranges_of(
                        self.double, _enlarged(self.domain, radius, self.shape, self.p)
                    )
                    rows = (unit[first] - unit[second])[None]
                    found = row_constants(self.double, ranges, rows, self.p)[0]
                    error = 0.0 if self.on_ranges is None else self.on_ranges(ranges).max().item()
                except ValueError:
                    if k == _WIDTHS - 1 and not self.widths:
                        raise
                    continue  # the wider set leaves where a layer is Lipschitz
                constants = torch.zeros(len(unit), len(unit), dtype=torch.float64)
                constants[first, second] = constants[second, first] = found.nan_to_num(
                    math.inf, posinf=math.inf
                )
                self.widths.append((radius, constants, error))
        return self.widths

    def _on_sets(self) -> RadiusAnalysis:
        """Margins of a program whose errors are known on sets only, see :meth:`_less`."""
        real = self._in_real_arithmetic()

        def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
            logits, margins, _, _, steepness, room = real(x)
            unknown = torch.full_like(margins, math.inf)
            return logits, margins, unknown, torch.zeros_like(margins), steepness, room

        return analysis

    def _in_real_arithmetic(self) -> RadiusAnalysis:
        outputs = self.graph.nodes[self.graph.output].shape
        if len(outputs) != 1:
            raise ValueError(f"model must return (batch, classes), got {('batch', *outputs)}")
        rows = class_rows(outputs[0])
        if self.head is not None:
            rows = rows @ self.head.weight.double().cpu()
        steepness = pair_norms(rows, self.p) * max(self.lipschitz, torch.finfo(torch.float64).tiny)
        steepness = steepness.nan_to_num(0.0, posinf=math.inf)  # equal rows of a head

        def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
            logits = class_logits(self.graph.run(x.clone())).cpu()
            labels = logits.argmax(1)
            margins = differences(logits.double(), labels)
            zero = torch.zeros_like(margins)
            return logits, margins, zero, zero, steepness[labels], zero[:, 0] + math.inf

        return analysis

    def _of_program(self, example: Tensor) -> RadiusAnalysis:
        try:
            inner = graph_error(self.body, example, self.p)
        except (TypeError, ValueError):
            if self.double is None:
                raise
            self.on_ranges = range_errors(self.graph, self.double, example, self.p)
            return self._on_sets()
        layers = [type(node.layer) for node in self.graph.nodes[1:]]
        default = range_error_rule.dispatch(object)
        if self.double is not None and any(
            range_error_rule.dispatch(c) is not default for c in layers
        ):
            self.on_ranges = range_errors(self.graph, self.double, example, self.p)
        features = self.body.run(example.clone())
        if features.dim() != 2:
            raise ValueError(f"model must return (batch, classes), got {tuple(features.shape)}")
        outer: _Differences | _HeadDifferences = (
            _Differences(features.shape[1], self.p)
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


class _Found(NamedTuple):
    """Radii, of the program and in real arithmetic, (batch,) each."""

    sound: Tensor
    real: Tensor

    def or_within(self, width: float | Tensor, allowed: _Found) -> _Found:
        """Take what a bound within a width allows, where it is more."""
        width = torch.as_tensor(width, dtype=torch.float64)
        return _Found(
            *(
                torch.maximum(old, torch.minimum(new, width).clamp(min=0))
                for old, new in zip(self, allowed, strict=True)
            )
        )

    def with_some(self, some: Tensor, width: Tensor, allowed: _Found) -> _Found:
        """Do so for some of the inputs."""
        new = _Found(self.sound[some], self.real[some]).or_within(width, allowed)
        return _Found(*(old.index_copy(0, some, part) for old, part in zip(self, new, strict=True)))


class _Quotients(NamedTuple):
    """Margins less errors, and margins, to be divided by Lipschitz constants."""

    numerator: Tensor
    margins: Tensor
    slopes: Tensor
    labels: Tensor
    room: Tensor  # up to which the numerator holds, (batch,)
    on_set: Tensor  # a numerator for the set of the constants, which needs no slopes

    def of(self, some: Tensor) -> _Quotients:
        """Those of some inputs."""
        return _Quotients(*(part[some] for part in self))

    def each(self, constants: Tensor) -> Tensor:
        """Distance that each difference allows the program, (batch, classes)."""
        slopes = (constants + self.slopes) * _UP
        near = torch.where(self.numerator > 0, self.numerator / slopes, 0.0)
        near = torch.minimum(near, self.room[:, None])
        within = torch.where(self.on_set > 0, self.on_set / (constants * _UP), 0.0)
        return torch.maximum(near, within)

    def __call__(self, constants: Tensor) -> _Found:
        """Distances that all of them allow."""
        sound = self.each(constants).scatter(1, self.labels[:, None], math.inf).amin(1)
        return _Found(sound, least_quotient(self.margins, constants, self.labels))


def _as_run(graph: Graph) -> Graph:
    """Graph whose layers hold the constants that this run computes, such as scales in float32."""
    known: dict[int, nn.Module] = {}
    nodes = []
    for node in graph.nodes:
        layer = node.layer
        if layer is not None and freeze_rule.dispatch(type(layer)) is not freeze_rule.dispatch(
            object
        ):
            layer = known.setdefault(id(layer), freeze(layer))
        nodes.append(dataclasses.replace(node, layer=layer))
    return Graph(tuple(nodes), graph.output)


def _check_inside(domain: Domain, x: Tensor) -> None:
    """Refuse inputs outside a domain."""
    values, shape = x.double().cpu(), tuple(x.shape[1:])
    inside = domain.range(shape).holds(values)
    if inside and isinstance(domain, Ball):
        offset = (values - domain.center.cpu().expand(shape)).flatten(1)
        distance = torch.linalg.vector_norm(offset, domain.p, dim=1)
        inside = bool((distance <= domain.radius * (1 + 2.0**-42)).all())
    if not inside:
        raise ValueError(
            f"inputs must lie in the domain {domain}, got values from "
            f"{x.min().item():.6g} to {x.max().item():.6g}"
        )


def _enlarged(domain: Domain, radius: float, shape: Shape, p: float) -> Range:
    """Range of all points within a distance of a domain, rounded outward."""
    if isinstance(domain, Box):
        low, high = (torch.as_tensor(side).double() for side in (domain.low, domain.high))
        domain = Box(*outward(low - radius * _UP, high + radius * _UP))
        return domain.range(shape)
    return domain.enlarged(radius * _UP, p).range(shape)


class _DifferenceErrors(NamedTuple):
    """What a head does to the differences of the logit predicted and each other."""

    logits: Tensor
    norms: Tensor  # Lipschitz constants of the differences, (batch, classes)
    errors: Tensor  # of both logits
    slopes: Tensor
    limit: Tensor


class _Differences:
    """Differences of logits, two entries of a vector whose errors are known together."""

    def __init__(self, outputs: int, p: float) -> None:
        self.pairs = pair_norms(class_rows(outputs), p) * _UP

    def arrive(self, total: ForwardError) -> ForwardError:
        return total

    def __call__(self, outputs: Tensor) -> _DifferenceErrors:
        logits = class_logits(outputs).cpu()
        norms = self.pairs[logits.argmax(1)]
        zero = torch.zeros_like(norms)
        return _DifferenceErrors(logits, norms, zero, zero, zero[:, 0] + math.inf)


class _HeadDifferences:
    """Differences of the outputs of a linear layer, with a constant and an error for each."""

    def __init__(self, head: nn.Linear, example: Tensor, p: float) -> None:
        self.head, self.p = head, p
        self.dtype = errors._computing_dtype(example, head.weight)
        weight = head.weight.detach().to(self.dtype)
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
        if len(weight) == 1:  # the logits 0 and z
            weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
        slack = 1 + (weight.shape[1] + 8) * torch.finfo(torch.float64).eps
        self.pairs = pair_norms(weight.double().cpu(), p) * slack + 2.0**-500 * weight.shape[1]
        self.rows = self.pairs.new_tensor(
            [errors._norms(row[None], dual_exponent(p)) for row in weight]
        )
        self.absolute = weight.abs().to(torch.promote_types(self.dtype, torch.float32))
        self.bias = bias.to(self.dtype).double().abs().cpu()

    def arrive(self, total: ForwardError) -> ForwardError:
        if total.outputs.dtype == self.dtype:
            return total
        return errors._then(total, errors._cast(total.outputs, self.dtype, self.p))

    def __call__(self, features: Tensor) -> _DifferenceErrors:
        logits = class_logits(self.head(features)).cpu()
        half, working = errors._is_half(logits.dtype), self.absolute.dtype
        terms = (features.shape[1] + 2) * (2 if half else 1)
        gamma = _gamma(terms, working)
        inside = errors._exactly(functional.linear, features.abs().to(working), self.absolute)
        inside = inside.double().cpu() * (1 + 2 * gamma) + self.bias  # |W||x| + |b|
        underflow = 2 * terms * torch.finfo(working).tiny
        largest = self.absolute.max().item() + errors._norms(features, self.p)[:, None]
        if half:
            off_by, slopes = gamma * inside, gamma * self.rows + underflow
        else:  # the sum of a row is at most ‖w‖ ‖x‖, as is that of the moduli: Note [partial sums]
            underflow *= 1 + gamma
            off_by = gamma / 2 * ((1 + gamma) * inside + logits.double().abs())
            slopes = gamma * self.rows + underflow
        off_by = off_by + underflow * (1 + largest)
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
