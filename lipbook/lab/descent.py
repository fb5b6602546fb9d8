r"""Steepest descent among orthonormal matrices.

Gradient descent measures a step of a matrix by its Frobenius norm. What a layer does to its inputs
is measured by the spectral norm, and a matrix with orthonormal columns has all singular values
equal, so that a good step should turn all directions alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["StiefelMuon", "matrix_sign"]

# Five quintic maps x -> a x + b x^3 + c x^5 whose composition takes [0.002, 1] to near 1.
_QUINTICS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def matrix_sign(matrix: Tensor) -> Tensor:
    r"""Replace the singular values of a matrix by 1, roughly.

    .. math:: U \Sigma V^\top \mapsto U s(\Sigma) V^\top, \qquad
        s(\sigma) \le 1.15, \quad
        s(\sigma) \ge 0.85 \text{ for } \sigma \ge 0.002\, \lVert\Sigma\rVert_F

    by five odd polynomials, in matrix products alone. A step of descent needs no more; for
    orthonormal matrices to rounding see :func:`lipbook.orthogonal.polar`.

    Parameters
    ----------
    matrix : torch.Tensor
        (..., m, n); zero is mapped to zero.

    Returns
    -------
    torch.Tensor
        Of the same shape and dtype.

    References
    ----------
    :cite:t:`jordan2024muon`.

    Examples
    --------
    >>> values = torch.linalg.svdvals(matrix_sign(torch.diag(torch.tensor([5.0, 1.0, 0.1]))))
    >>> bool((values - 1).abs().max() < 0.15)
    True
    """
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise ValueError(
            f"matrix must be floating-point of shape (..., m, n), got {matrix.dtype} "
            f"of shape {tuple(matrix.shape)}"
        )
    wide = matrix.shape[-2] < matrix.shape[-1]
    x = matrix.mT if wide else matrix
    size = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in _QUINTICS:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x.mT if wide else x


class StiefelMuon(torch.optim.Optimizer):
    r"""Muon on the Stiefel manifold: steps of one length in all directions, and back to it.

    For a matrix :math:`W` with orthonormal columns (or rows: then for :math:`W^\top`), its gradient
    :math:`G` and momentum :math:`\mu`,

    .. math::

        M &\leftarrow \mu M + (1 - \mu) G, \qquad N = \mu M + (1 - \mu) G, \\
        T &= N - W \tfrac12 (W^\top N + N^\top W), \\
        W &\leftarrow \Pi\bigl(W - \eta \operatorname{msign}(T)\bigr).

    :math:`T` is the part of :math:`N` that is tangent to the manifold, msign replaces singular
    values by 1 (:func:`matrix_sign`), and :math:`\Pi` is the orthonormal factor of the QR
    decomposition with a positive diagonal. The step has the length :math:`\eta` in the spectral
    norm, whatever the length of the gradient. For square :math:`W` the result of msign is tangent,
    too, for other shapes it is not quite.
    Vectors (biases) take :math:`b \leftarrow b - \eta_b N`.

    It trains plain weights, which then need no parametrization; or the raw parameters of layers
    whose map leaves orthonormal matrices as they are (``"qr"``, ``"polar"``, ``"cholesky_qr"`` of
    :class:`~lipbook.orthogonal.OrthogonalLinear`, and BCOP of
    :class:`~lipbook.convolutions.OrthogonalConv2d`). Parameters with more than two dimensions are
    batches of matrices, so the weight of a plain convolution has no place here.

    **Guaranteed**: after the first step all matrices have orthonormal columns or rows up to
    rounding, :math:`\max_i|\sigma_i - 1| \le 10^{-5}` in float32. **Not guaranteed**: a bound for a
    certificate; measure it (:func:`lipbook.composition.lipschitz_bound`).

    Parameters
    ----------
    params : iterable of torch.Tensor
        Matrices (..., m, n) and vectors (n,).
    lr : float
        :math:`\eta` in (0, 0.5].
    momentum : float
        :math:`\mu` in [0, 1).
    vector_lr : float
        :math:`\eta_b / \eta`.
    dtype : torch.dtype, optional
        In which a step is computed, that of the parameters if not given; :math:`\Pi` is always
        computed in that of the parameters. ``torch.bfloat16`` is enough, and fast where the
        processor has instructions for it.

    Raises
    ------
    ValueError
        If a number is out of range, or a parameter has a single number.

    References
    ----------
    :cite:t:`jordan2024muon` for Muon, :cite:t:`bernstein2025manifolds` for manifolds; the
    projection onto the tangent space and :math:`\Pi` are those of :cite:t:`absil2008`, Examples
    3.6.2 and 4.1.3.

    Examples
    --------
    The nearest orthonormal matrix to a given one, which the polar factor gives at once:

    >>> from lipbook.orthogonal import polar
    >>> target, W = torch.randn(6, 3), torch.nn.Parameter(torch.eye(6, 3))
    >>> descent = StiefelMuon([W], lr=0.1)
    >>> for step in range(200):
    ...     descent.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
    ...     descent.zero_grad()
    ...     (W - target).square().sum().backward()
    ...     _ = descent.step()
    >>> bool((W - polar(target)).abs().max() < 0.05)
    True
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.05,
        momentum: float = 0.9,
        vector_lr: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < lr <= 0.5:
            raise ValueError(f"lr must be in (0, 0.5], got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not vector_lr >= 0:
            raise ValueError(f"vector_lr must not be negative, got {vector_lr}")
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "vector_lr": vector_lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() == 0:
                    raise ValueError("params must be vectors and matrices, got a single number")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients.

        Returns
        -------
        float or None
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        mu, state = group["momentum"], self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(gradient, 1 - mu)
        direction = average.lerp(gradient, 1 - mu)
        if weight.dim() == 1:
            weight.sub_(direction, alpha=group["lr"] * group["vector_lr"])
            return
        wide = weight.shape[-2] < weight.shape[-1]
        w, n = (weight.mT, direction.mT) if wide else (weight, direction)
        if len(state) == 1:  # the first step: the parameter may be any matrix
            w = _nearest(w)
            state["started"] = torch.ones(())
        low, n = w.to(self.dtype or w.dtype), n.to(self.dtype or w.dtype)
        inner = low.mT @ n
        tangent = n - low @ ((inner + inner.mT) / 2)
        w = _retracted(w - group["lr"] * matrix_sign(tangent).to(w.dtype))
        weight.copy_(w.mT if wide else w)


def _nearest(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _retracted(matrix: Tensor) -> Tensor:
    """Orthonormal factor of a well-conditioned matrix, by Cholesky's factor of its Gram matrix."""
    factor = torch.linalg.cholesky(matrix.mT @ matrix)
    return torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
