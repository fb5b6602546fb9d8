"""SeqLip: the worst activation pattern between each two layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbook.composition import Bound, bound_method
from lipbook.norms import operator_norm
from lipbook.tightness.eclipse import _chain, _eclipse
from lipbook.tightness.reading import _dense_layers, _diagonal, _euclidean, _widen
from lipbook.tightness.semidefinite import _lipsdp
from lipbook.units import Units

__all__ = ["seqlip_bound"]


@bound_method("seqlip")
def seqlip_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    max_width: int = 12,
    max_units: int = 300,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound of SeqLip: the worst activation pattern between each two layers.

    With :math:`W_l = U_l \Sigma_l V_l^\top`, the singular values of inner layers shared between
    their neighbours,

    .. math::
        \operatorname{Lip}(f) \le \prod_{l=1}^{L-1} \max_{D \in [\alpha, \beta]^{n_l}}
        \big\lVert \tilde\Sigma_{l+1} V_{l+1}^\top D\, U_l \tilde\Sigma_l \big\rVert_2,
        \qquad \tilde\Sigma_l = \Sigma_l^{1/2} \text{ or } \Sigma_l \text{ at both ends}.

    A norm is convex in :math:`D`, so that the maximum is at a vertex: an activation pattern. Up to
    ``max_width`` units all :math:`2^{n_l}` of them are visited; the maximum is NP-hard, and
    wider layers get its semidefinite relaxation (LipSDP of the pair). **Guaranteed**: an upper
    bound, never above the product bound. A search that only finds good patterns, as in the
    paper's experiments, would err on the wrong side.

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`),
        and act on single units or on pairs.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.
    max_width : int
        Most units of a layer, not counting linear ones, whose patterns are enumerated.
    max_units : int
        Most units of a layer for the relaxation; beyond, the closed form of
        :func:`eclipse_bound` takes its place.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is none such, or p is not 2.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.ones(1, 2)  # |x|
    >>> round(seqlip_bound(net, (1,)).value, 6), round(lipschitz_bound(net, (1,)).value, 6)
    (1.0, 2.0)

    References
    ----------
    :cite:t:`virmaux2018`, Section 5.
    """
    _euclidean("seqlip", p)
    net = _dense_layers(module, input_shape, output)
    _diagonal("seqlip", net)
    factors = [torch.linalg.svd(weight, full_matrices=False) for weight in net.weights]
    last = len(net.weights) - 1
    value = 1.0 if net.units else operator_norm(net.weights[0]).item()
    for k, layer in enumerate(net.units):
        u, s, _ = factors[k]
        _, t, vh = factors[k + 1]
        below = u * (s if k == 0 else s.sqrt())
        above = (t if k + 1 == last else t.sqrt())[:, None] * vh
        if (layer.radius > 0).sum() <= max_width:
            value *= _worst_pattern(above, layer, below)
        else:
            pair = _chain([below, above], [layer])
            small = pair.active[0].numel() <= max_units
            value *= min(_lipsdp(pair, "neuron", "barrier") if small else math.inf, _eclipse(pair))
    return Bound(_widen(value, net), "upper bound", p, output_shape=net.output_shape)


def _worst_pattern(above: Tensor, layer: Units, below: Tensor) -> float:
    """Largest norm of above @ D @ below over the vertices D."""
    free = (layer.radius > 0).nonzero()[:, 0]
    best = 0.0
    for chunk in _batched(itertools.product((-1.0, 1.0), repeat=len(free)), 1024):
        signs = torch.tensor(chunk, dtype=torch.float64).reshape(len(chunk), len(free))
        slopes = layer.center.repeat(len(chunk), 1)
        slopes[:, free] += layer.radius[free] * signs
        best = max(best, operator_norm(above * slopes[:, None] @ below).max().item())
    return best


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
