r"""Transport problems with known answers: what a critic is measured against.

Each problem is a pair of distributions that can be sampled, their distance
:math:`W_1(P, Q)` in closed form, with the Euclidean norm as the ground cost, and a potential
that attains it in the Kantorovich–Rubinstein dual

.. math:: W_1(P, Q) = \max_{\operatorname{Lip}(f) \le 1} \
    \mathbb E_{x \sim P} f(x) - \mathbb E_{y \sim Q} f(y).

An answer is proved by a coupling and a potential of the same value: the coupling shows that the
distance is no larger, the potential that it is no smaller. Both stand in the docstrings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "TransportProblem",
    "dirac_shell",
    "cones",
    "three_cones",
    "translation",
    "gaussians_on_a_line",
    "concentric_gaussians",
]

Sampler = Callable[[int, torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class TransportProblem:
    r"""Two distributions, their distance, and a potential that attains it.

    Parameters
    ----------
    name : str
        Says which problem, with its constants.
    dim : int
        Dimension :math:`d` of the space.
    sample_x, sample_y : callable
        ``sample(n, generator)`` draws n independent points of :math:`P` or :math:`Q`, a float64
        tensor (n, d). The :class:`torch.Generator` seeds one of NumPy, whose normal numbers are
        the same on every machine; those of torch need not be. From two generators in the same
        state the samplers draw the ends of an optimal coupling, point by point.
    distance : float
        :math:`W_1(P, Q)` of the distributions. Samples of them are farther apart on average.
    potential : callable
        A 1-Lipschitz function, (n, d) to (n,), with
        :math:`\mathbb E_P f - \mathbb E_Q f = W_1(P, Q)`.

    Examples
    --------
    The dual value of the potential is the cost of the coupling, on these samples, and near the
    distance of the distributions:

    >>> problem = gaussians_on_a_line(3.0, 1.0)
    >>> x, y = (
    ...     sample(1000, torch.Generator().manual_seed(0))
    ...     for sample in (problem.sample_x, problem.sample_y)
    ... )
    >>> gap = problem.potential(x).mean() - problem.potential(y).mean()
    >>> torch.allclose(gap, (x - y).norm(dim=1).mean())
    True
    >>> bool((gap - problem.distance).abs() < 0.1)
    True
    """

    name: str
    dim: int
    sample_x: Sampler
    sample_y: Sampler
    distance: float
    potential: Callable[[Tensor], Tensor]


def dirac_shell(dim: int, radius: float = 1.0) -> TransportProblem:
    r"""Build the problem of a sphere and its centre, whose potential is a cone.

    .. math:: P = \text{uniform on } \{\lVert x\rVert = r\}, \quad Q = \delta_0, \qquad
        W_1(P, Q) = r, \quad f(x) = \lVert x\rVert

    There is one coupling, and it moves every point by :math:`r`. On a line the potential is the
    absolute value; in many dimensions this is the high-dimensional cone.

    Parameters
    ----------
    dim : int
        Dimension :math:`d`.
    radius : float
        :math:`r`.

    Returns
    -------
    TransportProblem
        With :math:`P` on the sphere and :math:`Q` at the origin.

    Raises
    ------
    ValueError
        If ``dim`` is less than 1, or ``radius`` is not positive and finite.

    Examples
    --------
    >>> dirac_shell(128).distance
    1.0

    References
    ----------
    :cite:t:`anil2019sorting`, whose centre is a sphere of radius 1e-7.
    """
    _check_dim(dim)
    problem = cones([[0.0] * dim], radius)
    return dataclasses.replace(problem, name=f"shell of radius {radius:g} in dimension {dim}")


def cones(centres: Sequence[Sequence[float]], radius: float = 1.0) -> TransportProblem:
    r"""Build the problem of several spheres and their centres: one cone above each centre.

    .. math:: P = \frac1m \sum_i \text{uniform on } \{\lVert x - c_i\rVert = r\}, \quad
        Q = \frac1m \sum_i \delta_{c_i}, \qquad
        W_1(P, Q) = r, \quad f(x) = \min_i\, \lVert x - c_i\rVert

    The coupling takes each sphere to its own centre and costs :math:`r`. The potential, a least
    of 1-Lipschitz functions, is 0 at the centres. If they are at least :math:`2r` apart, it is
    :math:`r` on the spheres, since a point of one is at least :math:`2r - r` from any other
    centre: it attains :math:`r`. If two are closer, it does not.

    Parameters
    ----------
    centres : sequence of sequence of float
        The points :math:`c_i`, (m, d).
    radius : float
        :math:`r`.

    Returns
    -------
    TransportProblem
        With :math:`P` on the spheres and :math:`Q` at the centres.

    Raises
    ------
    ValueError
        If ``centres`` is no finite matrix, two of them are closer than ``2 * radius``, or
        ``radius`` is not positive and finite.

    Examples
    --------
    >>> problem = cones([[0.0, 0.0], [0.0, 3.0]])
    >>> problem.potential(torch.tensor([[0.0, 0.0], [0.0, 1.5]])).tolist()
    [0.0, 1.5]
    """
    try:
        points = torch.tensor(centres, dtype=torch.float64)
    except (TypeError, ValueError):
        points = torch.empty(0)
    if points.dim() != 2 or 0 in points.shape or not points.isfinite().all():
        raise ValueError(f"centres must be a finite matrix (m, d), m and d > 0, got {centres!r}")
    _check_positive("radius", radius)
    count, dim = points.shape
    nearest = torch.pdist(points).min().item() if count > 1 else math.inf
    if nearest < 2 * radius:
        raise ValueError(
            f"centres must be at least 2 * radius = {2 * radius:g} apart, for the answer to be "
            f"known, got two at distance {nearest:g}"
        )

    def sample_centres(n: int, generator: torch.Generator) -> Tensor:
        return points[torch.randint(count, (n,), generator=generator)]

    def sample_shells(n: int, generator: torch.Generator) -> Tensor:
        middle = sample_centres(n, generator)
        normal = _normal(generator, n, dim)
        return middle + radius * normal / normal.norm(dim=1, keepdim=True)

    def potential(x: Tensor) -> Tensor:
        return (x[:, None, :] - points.to(x)).norm(dim=2).amin(1)

    name = f"{count} cones of radius {radius:g} in dimension {dim}"
    return TransportProblem(name, dim, sample_shells, sample_centres, float(radius), potential)


def three_cones() -> TransportProblem:
    r"""Build three touching circles in the plane and their centres.

    :func:`cones` with centres (-2, 0), (0, 0), (2, 0) and radius 1. The circles touch, so that the
    potential falls from a ridge straight into the next cone; the distance is 1.

    Returns
    -------
    TransportProblem
        With :math:`P` on the circles and :math:`Q` at the centres.

    Examples
    --------
    >>> three_cones().potential(torch.tensor([[-1.0, 0.0], [0.0, 0.0], [2.0, 1.0]])).tolist()
    [1.0, 0.0, 1.0]

    References
    ----------
    :cite:t:`anil2019sorting`.
    """
    problem = cones([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    return dataclasses.replace(problem, name="three cones")


def translation(dim: int, shift: float = 1.0) -> TransportProblem:
    r"""Build the problem of a normal distribution and its translate, whose potential is linear.

    .. math:: P = \text{law of } Z + t, \quad Q = \text{law of } Z \sim \mathcal N(0, I), \qquad
        W_1(P, Q) = \lVert t\rVert, \quad f(x) = \Big\langle \frac{t}{\lVert t\rVert}, x\Big\rangle

    The coupling moves every point by :math:`t`, along the diagonal of the space.

    Parameters
    ----------
    dim : int
        Dimension :math:`d`.
    shift : float
        Length of :math:`t = \text{shift} \cdot (1, \dots, 1) / \sqrt d`.

    Returns
    -------
    TransportProblem
        With :math:`P` the translate.

    Raises
    ------
    ValueError
        If ``dim`` is less than 1, or ``shift`` is not positive and finite.

    Examples
    --------
    >>> translation(4, shift=3).potential(torch.ones(1, 4)).item()
    2.0
    """
    _check_dim(dim)
    _check_positive("shift", shift)

    def sample_y(n: int, generator: torch.Generator) -> Tensor:
        return _normal(generator, n, dim)

    def sample_x(n: int, generator: torch.Generator) -> Tensor:
        return sample_y(n, generator) + shift / math.sqrt(dim)

    def potential(x: Tensor) -> Tensor:
        return x.sum(1) / math.sqrt(dim)

    name = f"translation by {shift:g} in dimension {dim}"
    return TransportProblem(name, dim, sample_x, sample_y, float(shift), potential)


def gaussians_on_a_line(s1: float, s2: float, shift: float = 0.0) -> TransportProblem:
    r"""Build the problem of two normal distributions on the line.

    .. math:: P = \mathcal N(\mu, s_1^2), \quad Q = \mathcal N(0, s_2^2), \qquad
        W_1(P, Q) = \mathbb E\, \lvert \mu + s Z\rvert
        = \lvert s\rvert \sqrt{\tfrac2\pi}\, e^{-\mu^2 / 2s^2}
        + \mu \operatorname{erf}\frac{\mu}{\lvert s\rvert \sqrt2}, \quad s = s_1 - s_2

    On a line the increasing coupling is optimal: it takes :math:`\mu + s_1 z` to :math:`s_2 z` and
    moves it by :math:`\mu + s z`. A potential is
    :math:`f(x) = \operatorname{sign}(s)\, \lvert x - p\rvert`, where :math:`p = -\mu s_2 / s` is
    the point that does not move: a kink, unless :math:`s_1 = s_2`, when the problem is a
    translation. With :math:`\mu = 0` the distance is :math:`\lvert s\rvert \sqrt{2 / \pi}`.

    Parameters
    ----------
    s1, s2 : float
        Standard deviations.
    shift : float
        Mean :math:`\mu` of :math:`P`.

    Returns
    -------
    TransportProblem
        In dimension 1.

    Raises
    ------
    ValueError
        If a standard deviation is not positive and finite, ``shift`` is not finite, or the
        distributions are the same.

    Examples
    --------
    >>> round(gaussians_on_a_line(3.0, 1.0).distance, 4)  # 2 √(2 / π)
    1.5958
    """
    _check_positive("s1", s1)
    _check_positive("s2", s2)
    if not math.isfinite(shift) or (s1 == s2 and shift == 0):
        raise ValueError(f"shift must be finite, and not 0 if s1 == s2, got {shift} and {s1, s2}")
    spread = s1 - s2
    if spread == 0:
        distance = abs(shift)
    else:
        ratio = shift / abs(spread)
        distance = abs(spread) * math.sqrt(2 / math.pi) * math.exp(-ratio * ratio / 2)
        distance += shift * math.erf(ratio / math.sqrt(2))

    def sample_x(n: int, generator: torch.Generator) -> Tensor:
        return shift + s1 * _normal(generator, n, 1)

    def sample_y(n: int, generator: torch.Generator) -> Tensor:
        return s2 * _normal(generator, n, 1)

    def potential(x: Tensor) -> Tensor:
        if spread == 0:
            return math.copysign(1.0, shift) * x[:, 0]
        return math.copysign(1.0, spread) * (x[:, 0] + shift * s2 / spread).abs()

    name = f"N({shift:g}, {s1:g}²) and N(0, {s2:g}²) on a line"
    return TransportProblem(name, 1, sample_x, sample_y, distance, potential)


def concentric_gaussians(dim: int, s1: float, s2: float) -> TransportProblem:
    r"""Build the problem of two round normal distributions about one centre.

    .. math:: P = \mathcal N(0, s_1^2 I), \quad Q = \mathcal N(0, s_2^2 I), \qquad
        W_1(P, Q) = \lvert s_1 - s_2\rvert\, \mathbb E \lVert Z\rVert
        = \lvert s_1 - s_2\rvert\, \sqrt2\, \frac{\Gamma((d + 1) / 2)}{\Gamma(d / 2)}

    The coupling takes :math:`s_1 z` to :math:`s_2 z`; the potential is
    :math:`\operatorname{sign}(s_1 - s_2)\, \lVert x\rVert`, as steep as can be along every move.

    Parameters
    ----------
    dim : int
        Dimension :math:`d`.
    s1, s2 : float
        Standard deviations of a coordinate.

    Returns
    -------
    TransportProblem
        With densities that overlap, unlike those of :func:`cones`.

    Raises
    ------
    ValueError
        If ``dim`` is less than 1, a standard deviation is not positive and finite, or both are the
        same.

    Examples
    --------
    In the plane :math:`\mathbb E \lVert Z\rVert = \sqrt{\pi / 2}`:

    >>> round(concentric_gaussians(2, 3.0, 1.0).distance, 4)
    2.5066
    """
    _check_dim(dim)
    _check_positive("s1", s1)
    _check_positive("s2", s2)
    if s1 == s2:
        raise ValueError(f"s1 and s2 must differ, got {s1} twice")
    mean_norm = math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))

    def sample_x(n: int, generator: torch.Generator) -> Tensor:
        return s1 * _normal(generator, n, dim)

    def sample_y(n: int, generator: torch.Generator) -> Tensor:
        return s2 * _normal(generator, n, dim)

    def potential(x: Tensor) -> Tensor:
        return math.copysign(1.0, s1 - s2) * x.norm(dim=1)

    name = f"N(0, {s1:g}² I) and N(0, {s2:g}² I) in dimension {dim}"
    return TransportProblem(name, dim, sample_x, sample_y, abs(s1 - s2) * mean_norm, potential)


def _normal(generator: torch.Generator, n: int, dim: int) -> Tensor:
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    return torch.from_numpy(np.random.default_rng(int(seed)).standard_normal((n, dim)))


def _check_dim(dim: int) -> None:
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be an integer >= 1, got {dim!r}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
