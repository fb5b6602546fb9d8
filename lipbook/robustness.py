r"""Certified robustness, of the program that runs and not only of the function.

A classifier whose logits are :math:`L`-Lipschitz cannot change its mind within a distance that its
margin gives: :func:`certified_radius`. That is a theorem about real numbers. What runs is a program
in floating point, and programs have been made to contradict such theorems (:cite:t:`zombori2021`,
:cite:t:`jia2021`, :cite:t:`jin2022`, :cite:t:`murray2026`). :func:`certify` therefore takes the
operator norms and the error of the program from :mod:`lipbook.rounding`, and the error at both ends
off the margin. :func:`certify_by_smoothing` is a certificate of another kind. From the other side,
:mod:`lipbook.attacks` looks for what a certificate excludes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import functional

from lipbook import errors, rules
from lipbook.composition import Bound, lipschitz_bound, lipschitz_rule
from lipbook.composition.bounds import graph_bound
from lipbook.composition.local import ranges_of, row_constants
from lipbook.errors import Analysis, ForwardError, forward_error_rule
from lipbook.graphs import Graph, trace
from lipbook.graphs.trace import unwrapped
from lipbook.norms import dual_exponent
from lipbook.norms.rigorous import _FLOOR, _UP, _gamma
from lipbook.rounding import graph_error
from lipbook.rules import Domain, Range, outward

__all__ = [
    "Accuracy",
    "Certificate",
    "Standardize",
    "certified_radius",
    "certify",
    "certify_by_smoothing",
    "smoothed_radius",
    "wilson_interval",
]

Shape = tuple[int, ...]
Batches = Iterable[tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------- margin and radius


def certified_radius(
    logits: Tensor,
    labels: Tensor,
    lipschitz: float = 1.0,
    p: float = 2,
    *,
    head: Tensor | None = None,
) -> Tensor:
    r"""Distance within which no input can have another class, from the margin, in real arithmetic.

    .. math::
        r = \min_{j \ne y} \frac{z_y - z_j}{L_{yj}}, \qquad
        L_{yj} = 2^{1 - 1/p} L \quad\text{or}\quad
        L_{yj} = \lVert w_y - w_j\rVert_{p^*} L

    The first holds for logits that are :math:`L`-Lipschitz from :math:`\ell_p` to :math:`\ell_p`:
    :math:`\sqrt2\,L` for p = 2 and :math:`2L` for p = ∞. The second is tighter and holds for logits
    :math:`z = W h(x) + b` with :math:`h` :math:`L`-Lipschitz and rows :math:`w_j` of
    :math:`W`; it needs no bound of :math:`\lVert W\rVert`.

    **Guaranteed** for real arithmetic: :math:`\lVert x' - x\rVert_p < r` leaves the class. For the
    program, see :func:`certify`.

    Parameters
    ----------
    logits : torch.Tensor
        (batch, classes), or (batch,) for a binary classifier that decides by sign.
    labels : torch.Tensor
        (batch,): classes in int64; -1 or 1 for a binary classifier.
    lipschitz : float
        :math:`L`, of the logits, or of what comes before the head.
    p : float
        Exponent of the norm of perturbations, in :math:`[1, \infty]`.
    head : torch.Tensor, optional
        :math:`W`, (classes, features), the weight of the last layer.

    Returns
    -------
    torch.Tensor
        Radii in float64, (batch,), in the units of the input; 0 where the label is not the largest
        logit.

    Raises
    ------
    TypeError
        If ``logits`` are no floating-point tensor or ``labels`` no integers.
    ValueError
        If ``logits`` hold NaN or infinity, ``labels`` a class that does not exist, shapes do not
        fit, ``lipschitz`` is not positive and finite, or ``p`` is out of range.

    Examples
    --------
    On a linear classifier the second form is exact: a step of that length reaches the border.

    >>> W, x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    >>> radius = certified_radius(x @ W.mT, torch.tensor([0]), head=W)
    >>> step = radius * (W[1] - W[0]) / (W[1] - W[0]).norm()
    >>> print(f"{radius.item():.4f}", ((x + step.float()) @ W.mT).numpy().round(4))
    1.3416 [[2.4 2.4]]

    References
    ----------
    :cite:t:`tsuzuku2018`, :cite:t:`li2019preventing`; for the second form
    :cite:t:`singla2022improved`.
    """
    dual = dual_exponent(p)
    if not (0 < lipschitz < math.inf):
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
    logits = _check_logits(logits, labels)
    if logits.dim() == 1:
        if head is not None:
            raise ValueError("head must be None for a binary classifier: put it into lipschitz")
        return (labels * logits).clamp(min=0) / lipschitz
    if head is None:
        slopes = logits.new_full(logits.shape, 2 ** (1 / dual) * lipschitz)
    else:
        if head.dim() != 2 or len(head) != logits.shape[1]:
            raise ValueError(
                f"head must have shape ({logits.shape[1]}, features), got {tuple(head.shape)}"
            )
        slopes = _pair_norms(head.detach().double(), p)[labels] * lipschitz
    return _least_quotient(_margins(logits, labels), slopes, labels)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - z_j, (batch, classes)."""
    return logits.gather(1, labels[:, None]) - logits


def _pair_norms(head: Tensor, p: float) -> Tensor:
    """‖w_i - w_j‖ in the dual norm, (classes, classes)."""
    dual = dual_exponent(p)  # row by row, since all differences of a large head fill the memory
    return torch.stack([torch.linalg.vector_norm(row - head, dual, dim=1) for row in head])


def _least_quotient(margins: Tensor, slopes: Tensor, labels: Tensor) -> Tensor:
    """Least margin / slope over the classes other than the label, not below 0."""
    quotients = torch.where(margins > 0, margins / slopes, 0.0)  # infinite for equal rows of a head
    return quotients.scatter(1, labels[:, None], math.inf).amin(1)


def _check_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no pair of logits and labels; return the logits in float64."""
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {logits.dtype}")
    if labels.dtype != torch.int64 and logits.dim() != 1:
        raise TypeError(f"labels must have dtype int64, got {labels.dtype}: call .long()")
    if logits.dim() not in (1, 2) or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits and labels must have shapes (batch, classes) or (batch,), and (batch,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, got NaN or infinite entries")
    if logits.dim() == 1:
        if not (labels.abs() == 1).all():
            raise ValueError("labels must be -1 or 1 for logits of shape (batch,)")
    elif logits.shape[1] < 2:
        raise ValueError(f"logits must have two classes at least, got {logits.shape[1]}")
    elif len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return logits.double()


class Standardize(nn.Module):
    r"""Standardisation of the channels of an image, as the first layer of a network.

    .. math:: x_c \mapsto \frac{x_c - \mu_c}{s_c}

    Its Lipschitz constant is :math:`1 / \min_c s_c` in every norm, and counts: a radius of a
    network that sees standardised images is not a radius in the units of the pixels. As a layer it
    is part of the bound.

    Parameters
    ----------
    mean, std : sequence of float
        :math:`\mu` and :math:`s`, one number a channel.

    Raises
    ------
    ValueError
        If the numbers are not finite, not as many, or ``std`` is not positive.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> lipschitz_bound(Standardize([0.5], [0.25]), (1, 28, 28)).value
    4.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        if self.mean.shape != self.std.shape or self.mean.dim() != 1:
            raise ValueError(f"mean and std must be as many numbers, got {mean} and {std}")
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError(f"mean must be finite and std positive, got {mean} and {std}")

    def forward(self, x: Tensor) -> Tensor:
        """Standardise, (batch, c, *size) to the same."""
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"x must have {len(self.mean)} channels, got shape {tuple(x.shape)}")
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


@lipschitz_rule.register
def _(module: Standardize, input_shape: Shape, p: float) -> Bound:
    return Bound(1 / module.std.double().min().item(), "exact", p)


@forward_error_rule.register
def _(module: Standardize, example: Tensor, p: float) -> Analysis:
    lipschitz = lipschitz_rule(module, tuple(example.shape[1:]), p).value * _UP
    shift = module.mean.double().abs().max().item()  # since x - mean may overflow, undivided
    return lambda x: errors._relative(module, x, p, lipschitz, 2, shift)


# ----------------------------------------------------------------------------- the certificate


class Accuracy(NamedTuple):
    """A fraction of a sample, with a confidence interval for the fraction of the population."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Accuracy:
    r"""Fraction of successes with Wilson's score interval.

    .. math::
        \frac{1}{1 + z^2 / n} \Big(\hat\pi + \frac{z^2}{2n}
        \pm z \sqrt{\frac{\hat\pi(1 - \hat\pi)}{n} + \frac{z^2}{4n^2}}\Big), \qquad
        \hat\pi = \frac kn, \quad z = \Phi^{-1}\big(\tfrac{1 + \text{confidence}}{2}\big)

    The :math:`\pi` that a score test at that level does not reject. It keeps within [0, 1] and is
    not empty for :math:`k = 0`. It speaks of the choice of test images, not of the training.

    Parameters
    ----------
    successes, trials : int
        k and n.
    confidence : float
        Between 0 and 1.

    Returns
    -------
    Accuracy

    Raises
    ------
    ValueError
        If the numbers are out of range.

    References
    ----------
    :cite:t:`wilson1927`.

    Examples
    --------
    >>> print(wilson_interval(950, 1000))
    95.00 % [93.47, 96.19]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must be between 0 and trials, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z = float(special.ndtri((1 + confidence) / 2))
    mean, squares = successes / trials, z**2 / trials
    centre = (mean + squares / 2) / (1 + squares)
    half = z / (1 + squares) * math.sqrt(mean * (1 - mean) / trials + squares / (4 * trials))
    return Accuracy(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


@dataclasses.dataclass(frozen=True)
class Certificate:
    r"""Certified radii of a set of inputs, and what they say.

    Parameters
    ----------
    radius : torch.Tensor
        (n,) float64, in units of the input: no input within this distance has another prediction.
    predictions : torch.Tensor
        (n,) int64; -1 where the classifier abstains.
    labels : torch.Tensor
        (n,) int64, the true classes.
    p : float
        Exponent of the norm.
    sound : bool
        Whether the radii hold for the program (else for real arithmetic).
    facts : dict
        What else there is to know: JSON's types only.

    Examples
    --------
    >>> radius, y = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0, 1, 1])
    >>> certificate = Certificate(radius, torch.tensor([0, 1, 0]), y, 2, True)
    >>> print(certificate.table([0, 1, 3]))
    2-norm, sound in floating point, 3 inputs
    epsilon  certified accuracy
          0  66.67 % [20.77, 93.85]
          1  33.33 % [6.15, 79.23]
          3  0.00 % [0.00, 56.15]
    """

    radius: Tensor
    predictions: Tensor
    labels: Tensor
    p: float
    sound: bool
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.radius, self.predictions, self.labels)}
        if shapes != {(len(self.radius),)} or not len(self.radius):
            raise ValueError(
                f"radius, predictions and labels must have one shape (n,), n ≥ 1, got {shapes}"
            )
        if not (self.radius >= 0).all():
            raise ValueError("radius must hold numbers >= 0, got a negative or NaN")

    @property
    def correct(self) -> Tensor:
        """Which predictions are the labels, (n,) bool."""
        return self.predictions == self.labels

    def certified_accuracy(self, epsilon: float, confidence: float = 0.95) -> Accuracy:
        """Fraction of inputs whose prediction is right and certified up to a distance.

        Parameters
        ----------
        epsilon : float
            The distance; 0 gives the clean accuracy.
        confidence : float
            Of the interval, see :func:`wilson_interval`.

        Returns
        -------
        Accuracy

        Raises
        ------
        ValueError
            If ``epsilon`` is negative or NaN.
        """
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {epsilon}")
        certified = self.correct & (self.radius >= epsilon)
        return wilson_interval(int(certified.sum()), len(certified), confidence)

    def table(self, epsilons: Sequence[float]) -> str:
        """Certified accuracies as text, one line an epsilon.

        Where rounding costs more than 5 % of the median radius, a last line says what to do.
        """
        arithmetic = "sound in floating point" if self.sound else "in real arithmetic"
        if self.sound and "lost_to_rounding" in self.facts:
            arithmetic += f" (median loss {100 * self.facts['lost_to_rounding']:.2g} %)"
        lines = [
            f"{rules._norm_name(self.p)}-norm, {arithmetic}, {len(self.radius)} inputs",
            "epsilon  certified accuracy",
        ]
        lines += [f"{epsilon:7.4g}  {self.certified_accuracy(epsilon)}" for epsilon in epsilons]
        lost = self.facts.get("lost_to_rounding", 0.0) if self.sound else 0.0
        if lost > 0.05 and self.facts.get("dtype") != "float64":
            lines.append(
                f"Rounding costs {100 * lost:.2g} % of the median radius: "
                "certify model.double() on inputs.double()."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        finite = self.radius[self.radius.isfinite()]
        largest = finite.max().item() if len(finite) else 0.0
        return self.table([largest * i / 4 for i in range(5)])

    def plot(self, axes: Any = None, **style: Any) -> Any:
        """Draw certified accuracy against epsilon; needs matplotlib.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; new axes if not given.
        **style
            Keywords of matplotlib's ``Axes.step``.

        Returns
        -------
        matplotlib.axes.Axes
        """
        if axes is None:
            from matplotlib import pyplot  # noqa: PLC0415 - the library needs no matplotlib

            axes = pyplot.subplots()[1]
        radii = self.radius[self.correct & self.radius.isfinite()].sort().values
        always = int((self.correct & ~self.radius.isfinite()).sum())
        left = np.array([len(radii), *range(len(radii), -1, -1)]) + always
        epsilons = np.concatenate(([0.0], radii.numpy(), radii[-1:].numpy()))[: len(left)]
        axes.step(epsilons, left[: len(epsilons)] / len(self.radius), where="pre", **style)
        axes.set_xlabel(f"radius in the {rules._norm_name(self.p)}-norm")
        axes.set_ylabel("certified accuracy")
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        return axes

    def save(self, path: str | Path) -> None:
        """Write the certificate as one file, NumPy's npz with the facts as JSON.

        Parameters
        ----------
        path : str or Path
            Name of the file. It appears when it is complete.
        """
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        about = {"p": str(self.p), "sound": self.sound, "facts": self.facts}
        facts = np.array(json.dumps(about, allow_nan=False))
        arrays = {name: getattr(self, name).cpu().numpy() for name in _ARRAYS}
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, facts=facts, **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate that :meth:`save` has written.

        Parameters
        ----------
        path : str or Path
            Name of the file.

        Returns
        -------
        Certificate

        Raises
        ------
        ValueError
            If the file is no certificate.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = {"facts", *_ARRAYS} - set(file.files)
            if missing:
                raise ValueError(
                    f"path must name a certificate, but {path} lacks {sorted(missing)}"
                )
            about = json.loads(str(file["facts"]))
            radius, predictions, labels = (torch.from_numpy(file[name]) for name in _ARRAYS)
        return cls(radius, predictions, labels, float(about["p"]), about["sound"], about["facts"])


_ARRAYS = ("radius", "predictions", "labels")


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
        reader = _Reader(
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
            _check_logits(logits, labels)
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


class _Reader:
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
        radius = _least_quotient(numerator, (steepness + slopes) * _UP, labels)
        real = _least_quotient(margins, steepness, labels)
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
            high = _least_quotient(numerator, (constants + slopes) * _UP, labels).clamp(min=0)
            high = torch.minimum(high, torch.full_like(high, self._reach(x)))
            for _ in range(_HALVINGS):
                radius = (low + high) / 2
                constants = self._constants(self._range(x, radius), labels)
                allowed = _least_quotient(numerator, (constants + slopes) * _UP, labels)
                holds = torch.minimum(radius, allowed).clamp(min=0)
                best = torch.maximum(best, holds)
                fits = allowed >= radius
                low, high = torch.where(fits, radius, low), torch.where(fits, high, radius)
            return best
        for width, constants in self._on_domain():
            allowed = _least_quotient(numerator, (constants[:, labels][0] + slopes) * _UP, labels)
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
                else _pair_norms(weight.double(), self.p)[labels]
            )
            zero = torch.zeros_like(norms)
            margins = _margins(logits.double(), labels)
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
            margins = _margins(step.logits.double(), labels)
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
        self.pairs = _pair_norms(weight.double(), p) * slack + 2.0**-500 * weight.shape[1]
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


# -------------------------------------------------------------------- randomized smoothing


def smoothed_radius(successes: int, trials: int, sigma: float, alpha: float = 0.001) -> float:
    r"""Radius of a smoothed classifier, from how often it saw its class among noisy copies.

    .. math::
        r = \sigma\, \Phi^{-1}(\underline p), \qquad
        \underline p = \sup\{\pi : \Pr[\mathrm{Bin}(n, \pi) \ge k] \le \alpha\}

    with the exact (Clopper–Pearson) lower bound of the probability of the class under Gaussian
    noise, one-sided. The radius holds for the smoothed classifier with probability at least
    :math:`1 - \alpha` over the noise, in the 2-norm, in real arithmetic.

    Parameters
    ----------
    successes, trials : int
        k and n.
    sigma : float
        Standard deviation of the noise, in the units of the input.
    alpha : float
        Probability of being wrong.

    Returns
    -------
    float
        The radius, 0 if :math:`\underline p \le 1/2`.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    :cite:t:`cohen2019`, Theorem 1 and section 3.2.

    Examples
    --------
    All of 1000 copies agree, so that :math:`\underline p = \alpha^{1/n}`:

    >>> print(f"{smoothed_radius(1000, 1000, sigma=0.5):.4f}")
    1.2316
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must be between 0 and trials, got {successes} of {trials}")
    if not 0 < sigma < math.inf or not 0 < alpha < 1:
        raise ValueError(f"sigma must be positive and alpha in (0, 1), got {sigma} and {alpha}")
    if successes == 0:
        return 0.0
    lower = special.betaincinv(successes, trials - successes + 1, alpha)
    return max(0.0, sigma * float(special.ndtri(lower)))


@torch.no_grad()
def certify_by_smoothing(
    model: nn.Module,
    loader: Batches,
    sigma: float,
    *,
    samples: int = 1000,
    selection: int = 100,
    alpha: float = 0.001,
    batch_size: int = 500,
    seed: int = 0,
) -> Certificate:
    r"""Certify the smoothed version of any classifier, by randomized smoothing.

    .. math::
        g(x) = \operatorname*{arg\,max}_c\;
        \Pr_{\eta \sim \mathcal N(0, \sigma^2 I)}[\, \mathrm{model}(x + \eta) = c \,]

    A first draw of noise selects the class, a second one counts it (:func:`smoothed_radius`).
    **Guaranteed**, in real arithmetic and for each input with probability :math:`1 - \alpha`:
    :math:`g` is constant within the radius. It is a statement about :math:`g`, which costs
    ``selection + samples`` evaluations an input, and not about the model. The radius is at most
    :math:`\sigma\Phi^{-1}(\alpha^{1/n})`, which is positive for :math:`n > \log_2(1/\alpha)` only.

    Parameters
    ----------
    model : torch.nn.Module
        Any classifier in evaluation mode, to (batch, classes) with two classes at least. (One that
        decides by the sign of one output z has the two logits 0 and z.)
    loader : iterable
        Yields ``(inputs, labels)``; labels of any integer dtype.
    sigma : float
        Standard deviation of the noise.
    samples, selection : int
        Copies to count, and to select the class.
    alpha : float
        Probability of error for each input.
    batch_size : int
        Copies that are evaluated at a time.
    seed : int
        Of the noise.

    Returns
    -------
    Certificate
        Predictions are -1 where the class is not certain (abstention).

    Raises
    ------
    TypeError
        If an argument, or what ``loader`` yields, is of another type.
    ValueError
        If the model is in training mode or returns NaN or fewer than two logits, a label is no
        class, ``loader`` is empty, or a number is out of range: among them ``samples`` with which
        every input would be abstained from.

    References
    ----------
    :cite:t:`cohen2019`, section 3.2.

    Examples
    --------
    >>> model, x = nn.Linear(2, 2).eval(), torch.randn(3, 2)
    >>> certificate = certify_by_smoothing(model, [(x, model(x).argmax(1))], 0.1, samples=200)
    >>> bool((certificate.radius < 0.1 * 1.9).all())
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode: call .eval()")
    _check_mode(model)
    if min(samples, selection, batch_size) < 1:
        raise ValueError(
            "samples, selection and batch_size must be at least 1, "
            f"got {samples}, {selection} and {batch_size}"
        )
    if not smoothed_radius(samples, samples, sigma, alpha):
        raise ValueError(
            f"samples must be at least {math.floor(math.log2(1 / alpha)) + 1} for alpha={alpha}, "
            f"since fewer certify nothing even if all agree, got {samples}"
        )
    radius: list[float] = []
    predictions: list[int] = []
    truth: list[int] = []
    for inputs, labels in _pairs(loader):
        generator = torch.Generator(inputs.device).manual_seed(seed + len(truth))
        for x, label in zip(inputs, labels.tolist(), strict=True):
            counts = _noisy_counts(model, x, sigma, selection, batch_size, generator)
            if not 0 <= label < len(counts):
                raise ValueError(f"labels must be classes from 0 to {len(counts) - 1}, got {label}")
            top = int(counts.argmax())
            counts = _noisy_counts(model, x, sigma, samples, batch_size, generator)
            radius.append(smoothed_radius(int(counts[top]), samples, sigma, alpha))
            predictions.append(top if radius[-1] > 0 else -1)
            truth.append(label)
    facts = {"sigma": sigma, "samples": samples, "selection": selection, "alpha": alpha}
    return Certificate(
        torch.tensor(radius, dtype=torch.float64),
        torch.tensor(predictions),
        torch.tensor(truth),
        2.0,
        False,
        facts | {"seed": seed},
    )


def _noisy_counts(
    model: nn.Module, x: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """How often each class is seen among n noisy copies."""
    counts = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, n, batch_size):
        shape = (min(batch_size, n - start), *x.shape)
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        logits = model(x + sigma * noise)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != shape[0]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return (batch, classes), got {got}")
        if logits.shape[1] < 2:
            raise ValueError(
                f"model must return logits of two classes at least, got {logits.shape[1]}: "
                "of one output z, return torch.cat([torch.zeros_like(z), z], 1)"
            )
        if logits.isnan().any():
            raise ValueError("model must return numbers, got NaN")
        counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return counts


# ------------------------------------------------------------------------ models and loaders

# Note [modes]
# An attack on a network in training mode attacks a random function and moves the statistics of its
# batch norms. But a wrapper around a network in evaluation mode is in training mode until somebody
# says otherwise, and does no harm: only modules whose code reads ``training`` are refused.


def _check_mode(model: nn.Module) -> None:
    """Refuse a module in training mode if it is one of those to which that matters."""
    for path, module in model.named_modules():
        if not module.training or hasattr(module, "_orig_mod"):  # a compiled one has its module
            continue
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(map(_reads_mode, (module, *hooks))):
            kind = type(module).__name__
            name = f"{path!r} ({kind})" if path else kind
            raise ValueError(f"model must be in evaluation mode, but {name} is not: call .eval()")


def _reads_mode(thing: object) -> bool:
    """Whether the code of a module or a hook names the attribute ``training``."""
    if isinstance(thing, torch.jit.ScriptModule):
        return True  # whose code is not to be seen
    mro = type(thing).__mro__
    own = mro[: mro.index(nn.Module)] if nn.Module in mro else mro[:-1]
    values = [thing, *(value for cls in own for value in vars(cls).values())]
    codes = [getattr(inspect.unwrap(v), "__code__", None) for v in values if callable(v)]
    return any(code is not None and "training" in code.co_names for code in codes)


def _pairs(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader; refuse what is none, with what to do."""
    expected = "loader must yield pairs (inputs, labels) of tensors"
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"{expected}, got {type(loader).__name__}: pass [(inputs, labels)]")
    if isinstance(loader, tuple) and any(isinstance(part, Tensor) for part in loader):
        raise TypeError(f"{expected}, got one such pair: pass [(inputs, labels)]")
    empty = True
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = type(batch).__name__
            got = f"a {what} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {what}"
            raise TypeError(f"{expected}, got {got}")
        inputs, labels = batch
        _check_tensors(inputs, labels)
        yield inputs, labels
        empty = False
    if empty:
        raise ValueError("loader must yield one batch at least, got none")


def _check_tensors(inputs: Any, labels: Any) -> None:
    """Refuse what is no batch of inputs with as many integers."""
    for name, tensor in (("inputs", inputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            advice = ": call torch.from_numpy" if isinstance(tensor, np.ndarray) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{advice}")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs must be a floating-point tensor, got {inputs.dtype}: call .float(), "
            "and divide by 255 if they are pixels"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: call .long()")
    if inputs.dim() < 2 or not len(inputs) or labels.shape != inputs.shape[:1]:
        raise ValueError(
            "inputs and labels must have shapes (batch, *shape) and (batch,), batch ≥ 1, got "
            f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        )
