"""Bounds from products and sums of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipbook import composition
from lipbook.composition import Bound, bound_method
from lipbook.norms import operator_norm
from lipbook.tightness.reading import _dense_layers, _Net, _widen
from lipbook.units import Units

__all__ = ["absolute_bound", "averaged_bound"]


@bound_method("absolute")
def absolute_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound by absolute values, entry by entry.

    .. math::
        \operatorname{Lip}(f) \le \big\lVert\, \lvert W_L\rvert\, \hat D_{L-1} \cdots \hat D_1\,
        \lvert W_1\rvert\, \big\rVert_p, \qquad
        \hat D_l = \max(\lvert\alpha\rvert, \lvert\beta\rvert)

    since :math:`\lvert J\rvert` is entrywise at most this product, and the three norms are
    monotone in absolute values. **Guaranteed**: an upper bound; for :math:`p = 1` and
    :math:`p = \infty` never above the product bound. For :math:`p = 2` it may be above it, and
    is good where the weights have few signs. It is attained by networks with nonnegative weights
    and activations that reach slope :math:`\hat D`.

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`), and act on
        single units. Sorts and maxima are allowed for :math:`p = 1` and :math:`p = \infty`: a
        Jacobian places entries of a group, so that each gets the largest bound of its group.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is none such, or p = 2 meets an activation that mixes units.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data, net[2].weight.data = torch.ones(2, 2), torch.ones(1, 2)
    >>> round(absolute_bound(net, (2,), float("inf")).value, 6)  # f(x) = 2 relu(x1 + x2)
    4.0
    """
    p = composition._exponent(p)
    net = _dense_layers(module, input_shape, output)
    if all(layer.elementwise for layer in net.units):
        chain = net.weights[0].abs()
        for weight, layer in zip(net.weights[1:], net.units, strict=True):
            chain = weight.abs() @ (layer.steepest[:, None] * chain)
        value = operator_norm(chain, p).item()
    else:
        value = _absolute_through_sorts(net, p)
    return Bound(_widen(value, net, p), "upper bound", p, output_shape=net.output_shape)


def _absolute_through_sorts(net: _Net, p: float) -> float:
    """Bound the row sums (p = inf) or column sums (p = 1) of the Jacobian, layer by layer."""
    for layer, node in zip(net.units, net.layers, strict=True):
        if layer.elementwise:
            continue
        if layer.sorts is None:
            raise ValueError(f"method 'absolute' does not know {node.layer}: use 'product'")
        if p == 2:
            raise ValueError(
                "p must be 1 or math.inf for method 'absolute' with activations that mix units, "
                f"got 2 and {node.layer}: use 'lipsdp' or 'eclipse'"
            )
    weights, units = [weight.abs() for weight in net.segments], net.units
    if p == 1:  # column sums are row sums of the transposed network
        weights, units = [weight.mT for weight in weights[::-1]], units[::-1]
    sums = weights[0].sum(1)
    for weight, layer in zip(weights[1:], units, strict=True):
        sums = weight @ _through(layer, sums, weight.shape[1], p)
    return sums.max().item()


def _through(layer: Units, sums: Tensor, size: int, p: float) -> Tensor:
    """Bounds of the sums behind an activation, or before it for p = 1."""
    if layer.sorts is None:
        return layer.steepest * sums
    result = torch.zeros(size, dtype=torch.float64)
    for inputs, outputs in layer.sorts:
        if p == 1:  # an entry may go to an output of each of its groups
            result[inputs] += sums[outputs].max()
        else:
            result[outputs] = sums[inputs].max()
    return result


@bound_method("averaged")
def averaged_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound by averages over products, of Combettes and Pesquet.

    Writing every :math:`D_l = C_l + R_l\Psi_l` and multiplying out leaves one term for each set
    of layers at which the product is cut,

    .. math::
        \operatorname{Lip}(f) \le \sum_{S \subseteq \{1, \dots, L-1\}}
        \prod_{\text{cuts } i < j} \big\lVert R_j^{1/2}\, W_j\, C_{j-1} W_{j-1} \cdots
        C_{i+1} W_{i+1}\, R_i^{1/2} \big\rVert_p .

    For activations that are firmly nonexpansive (slopes in [0, 1], hence
    :math:`C = R = \tfrac12`) it is their average over the :math:`2^{L-1}` sets. The sum is computed
    in :math:`O(L^2)` norms: a set is a path, and the first cut splits it from the rest.

    **Guaranteed**: an upper bound, and not above the product bound where all units of a layer
    have the same slopes.

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`).
    input_shape : sequence of int
        Shape of one sample.
    p : float
        1, 2 or :data:`math.inf`; 2 for sorts and maxima.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ValueError
        If the network is none such, or another p meets an activation that mixes units.

    Examples
    --------
    The layers of norm 1 with product 0: half of the terms see it.

    >>> from lipbook.composition import lipschitz_bound
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data, net[2].weight.data = torch.eye(2)[:, :1], torch.eye(2)[1:]
    >>> round(averaged_bound(net, (1,)).value, 6), lipschitz_bound(net, (1,)).value
    (0.5, 1.0)

    References
    ----------
    :cite:t:`combettes2020`.
    """
    p = composition._exponent(p)
    net = _dense_layers(module, input_shape, output)
    if p != 2 and not all(layer.elementwise for layer in net.units):
        raise ValueError(f"p must be 2 for activations that mix units, got {p:g}")
    ones = [torch.ones(len(weight), dtype=torch.float64) for weight in net.weights]
    roots = [layer.radius.sqrt() for layer in net.units] + [ones[-1]]
    totals = [1.0]  # the sum over the sets whose last cut is behind layer j
    for j in range(len(net.weights)):
        segment = roots[j][:, None] * net.weights[j]
        total = 0.0
        for i in range(j, -1, -1):  # the segment of layers i..j, cut before layer i
            start = segment if i == 0 else segment * roots[i - 1]
            total += totals[i] * operator_norm(start, p).item()
            if i > 0:
                segment = (segment * net.units[i - 1].center) @ net.weights[i - 1]
        totals.append(total)
    value = _widen(totals[-1], net, p)
    return Bound(value, "upper bound", p, output_shape=net.output_shape)
