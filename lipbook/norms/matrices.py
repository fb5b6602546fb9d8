"""Operator norms of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbook.norms.arguments import _exponent, _integer, _matrix
from lipbook.norms.precision import _margin, _scale

__all__ = ["dual_exponent", "operator_norm", "gram_iteration", "power_iteration"]


def dual_exponent(p: float) -> float:
    r"""Dual (Hölder conjugate) exponent.

    .. math:: \frac1p + \frac1{p^*} = 1

    The :math:`\ell_{p^*}` norm is the dual of the :math:`\ell_p` norm,
    :math:`\lVert y\rVert_{p^*} = \max_{\lVert x\rVert_p\le1} y^\top x`.

    Parameters
    ----------
    p : float
        Exponent in :math:`[1, \infty]`.

    Returns
    -------
    float
        The exponent :math:`p^*`, with :math:`1^* = \infty` and :math:`\infty^* = 1`.

    Raises
    ------
    TypeError
        ``p`` is not a number.
    ValueError
        ``p`` is NaN or below 1.

    Examples
    --------
    >>> [dual_exponent(p) for p in (1, 1.5, 2, 4, float("inf"))]
    [inf, 3.0, 2.0, 1.3333333333333333, 1.0]
    """
    p = _exponent("p", p)
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1)


def operator_norm(matrix: Tensor, p: float = 2, q: float | None = None) -> Tensor:
    r"""Operator norm of a matrix from :math:`\ell_p` to :math:`\ell_q`.

    .. math::
        \lVert A\rVert_{1\to q} = \max_j \lVert A_{:,j}\rVert_q, \qquad
        \lVert A\rVert_{p\to\infty} = \max_i \lVert A_{i,:}\rVert_{p^*}, \qquad
        \lVert A\rVert_{2\to2} = \sigma_1(A)

    These are the norms for which a polynomial algorithm is known, and the value is exact up to
    rounding. They hold the largest absolute column sum (:math:`1\to1`), the largest absolute row
    sum (:math:`\infty\to\infty`), the largest entry (:math:`1\to\infty`), the longest column
    (:math:`1\to2`) and the longest row (:math:`2\to\infty`). Every other pair is refused.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n): m outputs, n inputs.
    p : float
        Exponent of the norm of the inputs, in :math:`[1, \infty]`.
    q : float, optional
        Exponent of the norm of the outputs; ``p`` if not given.

    Returns
    -------
    torch.Tensor
        The norms in float64, shape (...). Differentiable wherever the maximum is attained once.

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or an exponent is no number.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; an exponent is
        outside :math:`[1, \infty]`; or the norm from ``p`` to ``q`` is out of reach.

    Notes
    -----
    Why the two families are easy: a convex function on the :math:`\ell_1` ball is largest at a
    vertex :math:`\pm e_j`, which gives the first; :math:`\lVert A\rVert_{p\to q} =
    \lVert A^\top\rVert_{q^*\to p^*}` turns it into the second. Why the others are refused: for
    :math:`q < p` the norm is NP-hard (Steinberg, 2005; :math:`\infty\to1` already by Rohn, 2000),
    for rational :math:`p = q` other than 1, 2, :math:`\infty` as well (Hendrickx and Olshevsky,
    2010), and for :math:`1 < p < q < \infty` no polynomial algorithm is known.

    Examples
    --------
    >>> A = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    >>> inf = float("inf")
    >>> [operator_norm(A, p, q).item() for p, q in ((1, 1), (inf, inf), (2, inf))]
    [6.0, 7.0, 5.0]

    The spectral norm is attained at the first right singular vector, and nowhere exceeded:

    >>> v = torch.linalg.svd(A).Vh[0]
    >>> bool((torch.linalg.vector_norm(A @ v) - operator_norm(A)).abs() < 1e-6)
    True
    """
    p = _exponent("p", p)
    q = p if q is None else _exponent("q", q)
    matrix = _matrix(matrix)
    scale = _scale(matrix)
    matrix = matrix / scale[..., None, None]
    if p == 1:
        return scale * torch.linalg.vector_norm(matrix, q, dim=-2).amax(-1)
    if q == math.inf:
        return scale * torch.linalg.vector_norm(matrix, dual_exponent(p), dim=-1).amax(-1)
    if p == q == 2:
        return scale * torch.linalg.svdvals(matrix)[..., 0]
    pair = f"{p:g}→{q:g}".replace("inf", "∞")
    hard = "no polynomial algorithm is known for it" if p < q else "it is NP-hard"
    raise ValueError(
        f"p and q must be such that p = 1, q = inf or p = q = 2; "
        f"got the {pair} norm, which is refused: {hard}"
    )


def gram_iteration(matrix: Tensor, steps: int = 6) -> Tensor:
    r"""Upper bound of the spectral norm by Gram iteration.

    .. math::
        A^{(0)} = A, \qquad A^{(t+1)} = A^{(t)*} A^{(t)}, \qquad
        \sigma_1(A) \le \lVert A^{(t)}\rVert_F^{2^{-t}} \le r^{2^{-(t+1)}}\,\sigma_1(A)

    with :math:`r` the rank. **Guaranteed**, at every step count: the bound is never below
    :math:`\sigma_1`, also in floating point (it carries a margin for rounding); it decreases with
    each step (up to that margin) and is within the factor above: six steps at rank 512 leave at
    most 5 %. Only matrix products are used, so that it batches well and is differentiable wherever
    the matrix is not zero, also where singular values coincide.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n).
    steps : int
        Number of Gram products :math:`t`; 0 gives the Frobenius norm.

    Returns
    -------
    torch.Tensor
        The bounds in float64, shape (...).

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or ``steps`` no integer.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; or ``steps`` is
        negative.

    Notes
    -----
    :math:`\lVert A^{(t)}\rVert_F^{2^{-t}} = (\sum_i \sigma_i^{2^{t+1}})^{2^{-(t+1)}}` is the
    Schatten norm of order :math:`2^{t+1}`, from which both inequalities follow. Each iterate is
    divided by a power of two to stay in range, and the logarithms of the divisors are added up.

    References
    ----------
    :cite:t:`delattre2023gram`, who also apply it to the blocks of a circular convolution
    (:func:`circular_convolution_gram_iteration`).

    Examples
    --------
    >>> A = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> [f"{gram_iteration(A, steps).item():.4f}" for steps in range(5)]
    ['3.6056', '3.1383', '3.0144', '3.0003', '3.0000']
    """
    matrix = _matrix(matrix)
    steps = _integer("steps", steps, 0)
    m, n = matrix.shape[-2:]
    size = _scale(matrix)
    gram = (matrix if n <= m else matrix.mH) / size[..., None, None]
    log_scale = torch.zeros_like(size)
    for step in range(1, steps + 1):
        gram = gram.mH @ gram
        scale = _scale(gram)
        gram = gram / scale[..., None, None]
        log_scale = log_scale + scale.log() / 2**step
    norm = torch.linalg.matrix_norm(gram)
    positive = torch.where(norm > 0, norm, 1.0)  # keeps log and its gradient finite at zero
    bound = torch.where(norm > 0, torch.exp(positive.log() / 2**steps + log_scale), norm)
    return bound * size * _margin(max(m, n), math.sqrt(min(m, n)))


def power_iteration(
    matrix: Tensor, steps: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    r"""Lower estimate of the spectral norm by power iteration.

    .. math::
        v \leftarrow \frac{A^* A v}{\lVert A^* A v\rVert_2}, \qquad
        \lVert A v\rVert_2 \le \sigma_1(A)

    from a Gaussian start. **Guaranteed**: the value never exceeds :math:`\sigma_1`, up to
    rounding. **Only hoped**: that it is close. The error falls like
    :math:`(\sigma_2/\sigma_1)^{4 t}`, which is slow when the two are close, and a start that is
    nearly orthogonal to the first singular vector delays it. It is therefore never a certificate:
    a Lipschitz constant needs :func:`operator_norm` or :func:`gram_iteration`.

    Parameters
    ----------
    matrix : torch.Tensor
        Real or complex, shape (..., m, n).
    steps : int
        Number of iterations :math:`t`, at least 1.
    generator : torch.Generator, optional
        Source of the start; torch's global generator if not given.

    Returns
    -------
    torch.Tensor
        The estimates in float64, shape (...). The gradient treats :math:`v` as a constant, as in
        :cite:t:`miyato2018`.

    Raises
    ------
    TypeError
        ``matrix`` is no floating-point tensor, or ``steps`` no integer.
    ValueError
        ``matrix`` has an axis too few, no entries, or entries that are not finite; or ``steps`` is
        below 1.

    Examples
    --------
    Two singular values that differ by 1 %: twenty steps are not enough.

    >>> A = torch.diag(torch.tensor([1.0] + 63 * [0.99], dtype=torch.float64))
    >>> seed = torch.Generator().manual_seed
    >>> [f"{power_iteration(A, t, seed(0)).item():.2f}" for t in (1, 20, 1000)]
    ['0.99', '0.99', '1.00']
    """
    matrix = _matrix(matrix)
    steps = _integer("steps", steps, 1)
    start = torch.randn(
        (*matrix.shape[:-2], matrix.shape[-1], 1),
        dtype=matrix.dtype,
        device=matrix.device,
        generator=generator,
    )
    scale = _scale(matrix)
    matrix = matrix / scale[..., None, None]
    with torch.no_grad():
        v = torch.nn.functional.normalize(start, dim=-2)
        for _ in range(steps):
            v = torch.nn.functional.normalize(matrix.mH @ (matrix @ v), dim=-2, eps=1e-300)
    return scale * torch.linalg.vector_norm(matrix @ v, dim=(-2, -1))
