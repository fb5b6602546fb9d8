r"""Randomized smoothing: certificates of another classifier, by counting."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipbook.norms.arguments import _integer, _real
from lipbook.robustness.arguments import Batches, check_mode, pairs
from lipbook.robustness.certificate import Certificate, class_logits

__all__ = ["certify_by_smoothing", "smoothed_radius"]


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
    _integer("successes", successes, 0)
    if successes > _integer("trials", trials, 1):
        raise ValueError(f"successes must be between 0 and trials, got {successes} of {trials}")
    _real("sigma", sigma)
    _real("alpha", alpha)
    if not 0 < sigma < math.inf or not 0 < alpha < 1:
        raise ValueError(f"sigma must be positive and alpha in (0, 1), got {sigma} and {alpha}")
    if successes == 0:
        return 0.0
    from scipy import special  # noqa: PLC0415 - takes a tenth of what torch takes

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
        Any classifier in evaluation mode, to (batch, classes). One output z, (batch, 1), decides
        by its sign: class 0 if :math:`z \le 0`, else 1.
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
        If the model is in training mode or returns NaN or no logits, a label is no class,
        ``loader`` is empty, or a number is out of range: among them ``samples`` with which
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
    check_mode(model)
    sizes = {"samples": samples, "selection": selection, "batch_size": batch_size}
    for name, size in sizes.items():
        _integer(name, size, 1)
    if not smoothed_radius(samples, samples, sigma, alpha):
        raise ValueError(
            f"samples must be at least {math.floor(math.log2(1 / alpha)) + 1} for alpha={alpha}, "
            f"since fewer certify nothing even if all agree, got {samples}"
        )
    radius: list[float] = []
    predictions: list[int] = []
    truth: list[int] = []
    for inputs, labels in pairs(loader):
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
        logits = class_logits(model(x + sigma * noise))
        if len(logits) != shape[0] or logits.shape[1] < 2:
            raise ValueError(f"model must return (batch, classes), got {tuple(logits.shape)}")
        if logits.isnan().any():
            raise ValueError("model must return numbers, got NaN")
        counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return counts
