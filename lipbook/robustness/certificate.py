r"""The certificate: from margins to radii, and what the radii of a sample say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipbook import rules
from lipbook._extras import imported
from lipbook.norms import dual_exponent
from lipbook.norms.arguments import _got, _integer, _real, _tensor

__all__ = ["Accuracy", "Certificate", "certified_radius", "wilson_interval"]

VOUCHED = "vouched for by the caller"

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
        (batch,): classes in any integer dtype; -1 or 1 for a binary classifier.
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
    _real("lipschitz", lipschitz)
    if not (0 < lipschitz < math.inf):
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
    logits = check_logits(logits, labels)
    if logits.dim() == 1:
        if head is not None:
            raise ValueError("head must be None for a binary classifier: put it into lipschitz")
        return (labels * logits).clamp(min=0) / lipschitz
    labels = labels.long()
    if head is None:
        slopes = logits.new_full(logits.shape, 2 ** (1 / dual) * lipschitz)
    else:
        if head.dim() != 2 or len(head) != logits.shape[1]:
            raise ValueError(
                f"head must have shape ({logits.shape[1]}, features), got {tuple(head.shape)}"
            )
        slopes = pair_norms(head.detach().double(), p)[labels] * lipschitz
    return least_quotient(differences(logits, labels), slopes, labels)


def differences(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - z_j, (batch, classes)."""
    return logits.gather(1, labels[:, None]) - logits


def pair_norms(head: Tensor, p: float) -> Tensor:
    """‖w_i - w_j‖ in the dual norm, (classes, classes)."""
    dual = dual_exponent(p)  # row by row, since all differences of a large head fill the memory
    return torch.stack([torch.linalg.vector_norm(row - head, dual, dim=1) for row in head])


def least_quotient(margins: Tensor, slopes: Tensor, labels: Tensor) -> Tensor:
    """Least margin / slope over the classes other than the label, not below 0."""
    quotients = torch.where(margins > 0, margins / slopes, 0.0)  # infinite for equal rows of a head
    return quotients.scatter(1, labels[:, None], math.inf).amin(1)


def class_rows(outputs: int) -> Tensor:
    """Logits of the classes as functions of the outputs, (classes, outputs); see class_logits."""
    return torch.eye(max(outputs, 2), dtype=torch.float64)[:, -outputs:]


def class_logits(outputs: Any) -> Tensor:
    """Logits of the classes, (batch, classes): of one output z those are 0 and z."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model must return (batch, classes), got {got}")
    return functional.pad(outputs, (1, 0)) if outputs.shape[1] == 1 else outputs


def check_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no pair of logits and labels; return the logits in float64."""
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_got(tensor)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {logits.dtype}")
    real = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if real and logits.dim() != 1:
        raise TypeError(f"labels must be integers, got {labels.dtype}: call .long()")
    if logits.dim() not in (1, 2) or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits and labels must have shapes (batch, classes) or (batch,), and (batch,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, got NaN or infinite entries")
    if logits.dim() == 1:
        if not ((labels == 1) | (labels == -1)).all():
            raise ValueError("labels must be -1 or 1 for logits of shape (batch,)")
    elif logits.shape[1] < 2:
        raise ValueError(f"logits must have two classes at least, got {logits.shape[1]}")
    elif len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return logits.double()


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
    _integer("successes", successes, 0)
    if successes > _integer("trials", trials, 1):
        raise ValueError(f"successes must be between 0 and trials, got {successes} of {trials}")
    _real("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    from scipy import special  # noqa: PLC0415 - takes a tenth of what torch takes

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
        _tensor("radius", self.radius)
        if self.radius.dim() != 1:
            raise ValueError(f"radius must have shape (n,), got {tuple(self.radius.shape)}")
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
        """Certified accuracies as text, one line an epsilon; the first names norm and domain.

        Where rounding costs more than 5 % of the median radius, a last line says what to do.
        """
        arithmetic = "sound in floating point" if self.sound else "in real arithmetic"
        if self.facts.get("method") == VOUCHED:
            arithmetic += f", with a constant {VOUCHED}"
        if self.sound and "lost_to_rounding" in self.facts:
            arithmetic += f" (median loss {100 * self.facts['lost_to_rounding']:.2g} %)"
        domain = self.facts.get("domain")
        inputs = f"{len(self.radius)} inputs" + (f" in {domain}" if domain else "")
        lines = [
            f"{rules._norm_name(self.p)}-norm, {arithmetic}, {inputs}",
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

        Raises
        ------
        ModuleNotFoundError
            matplotlib is not installed; the message names the extra that brings it.
        """
        if axes is None:
            axes = imported("matplotlib.pyplot").subplots()[1]
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
