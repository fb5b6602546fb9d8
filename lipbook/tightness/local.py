"""Bounds around a point, from the slopes that units can have there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lipbook import composition
from lipbook.composition import Bound, lipschitz_bound
from lipbook.norms import dual_exponent, operator_norm
from lipbook.norms.arguments import _got, _real
from lipbook.rules import Range, range_rule, slope_rule
from lipbook.tightness.eclipse import _chain, _eclipse
from lipbook.tightness.reading import _dense_layers, _diagonal, _euclidean, _Net, _widen
from lipbook.tightness.semidefinite import _lipsdp
from lipbook.units import EPS, Units

__all__ = ["local_lipschitz_bound"]


def local_lipschitz_bound(
    module: nn.Module,
    center: Tensor,
    radius: float,
    p: float = 2,
    method: Literal["interval", "lipsdp"] = "interval",
) -> Bound:
    r"""Upper bound of the Lipschitz constant on a ball, from the slopes that units can have there.

    .. math::
        \lVert f(x) - f(y)\rVert_p \le L\, \lVert x - y\rVert_p \qquad
        \text{for all } x, y \text{ with } \lVert x - x_0\rVert_p,\,
        \lVert y - x_0\rVert_p \le r

    Intervals that hold the inputs of every unit are carried through the network. A ReLU whose
    interval does not meet 0 is on or off throughout the ball, and is no ReLU there; other units
    have the slopes of the pieces that the interval meets, or those that
    :func:`~lipbook.composition.slope_rule` bounds on it. Three bounds then hold for slopes in these
    intervals, and the smallest is returned: the product of norms, the norm of the interval
    :math:`\lvert J - \bar J\rvert \le E` of Jacobians, carried through by
    :math:`\bar J \leftarrow W C \bar J`, :math:`E \leftarrow \lvert W\rvert\,
    ((\lvert C\rvert + R) E + R\, \lvert\bar J\rvert)`, and for p = 2 :func:`eclipse_bound`, or
    :func:`lipsdp_bound` as well with ``method="lipsdp"``.

    **Guaranteed**: an upper bound on the ball; the exact constant if no unit is
    undecided (the kind says so).

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`),
        and act on single units or on pairs.
    center : torch.Tensor
        :math:`x_0`, one sample without the batch dimension.
    radius : float
        :math:`r \ge 0`, in the :math:`\ell_p` norm.
    p : float
        1, 2 or :data:`math.inf`.
    method : str
        ``"interval"``, or ``"lipsdp"`` for p = 2.

    Returns
    -------
    Bound
        Of kind ``"upper bound"`` or ``"exact"``.

    Raises
    ------
    TypeError
        If ``center`` is no floating-point tensor.
    ValueError
        If the network is none such, ``radius`` is negative or not finite, or ``method`` is
        unknown or not for this p.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.tensor([[1.0, 2.0]])  # x for x > 0, -2x for x < 0
    >>> [local_lipschitz_bound(net, torch.tensor([x]), 0.5).value for x in (1.0, -1.0)]
    [1.0, 2.0]
    """
    p = composition._exponent(p)
    if not isinstance(center, Tensor) or not center.is_floating_point():
        raise TypeError(f"center must be a floating-point tensor, got {_got(center)}")
    if not center.dim() or not center.numel():
        raise ValueError(f"center must be one input, got shape {tuple(center.shape)}")
    if not center.isfinite().all():
        raise ValueError("center must be finite, got NaN or infinite entries")
    _real("radius", radius)
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and at least 0, got {radius}")
    if method not in ("interval", "lipsdp"):
        raise ValueError(f"method must be 'interval' or 'lipsdp', got {method!r}")
    if method == "lipsdp":
        _euclidean("lipsdp", p)
    shape = tuple(center.shape)
    whole = lipschitz_bound(module, shape, p)
    net = _dense_layers(module, shape)
    _diagonal("interval", net)
    for layer, node in zip(net.units, net.layers, strict=True):
        if layer.kinks is None and not layer.elementwise:
            raise ValueError(
                f"method 'interval' needs the kinks of units that are no entries, got {node.layer}"
            )
    restricted = _restrict(net, center.detach().double().cpu().flatten(), radius, p)

    masked = operator_norm(net.weights[0], p).item()
    jacobian, error = net.weights[0], torch.zeros_like(net.weights[0])  # |J - jacobian| <= error
    for weight, layer in zip(net.weights[1:], restricted, strict=True):
        masked *= operator_norm(weight * layer.steepest, p).item()
        spread = layer.steepest[:, None] * error + layer.radius[:, None] * jacobian.abs()
        jacobian, error = weight @ (layer.center[:, None] * jacobian), weight.abs() @ spread
    name = type(module).__name__
    title: dict[str, Any] = {"name": name, "input_shape": shape, "output_shape": whole.output_shape}
    if all(bool((layer.radius == 0).all()) for layer in restricted):
        return Bound(operator_norm(jacobian, p).item(), "exact", p, **title)
    values = [masked, operator_norm(jacobian.abs() + error, p).item()]
    if p == 2:
        values.append(operator_norm(jacobian).item() + operator_norm(error).item())
        chain = _chain(net.weights, restricted)
        values.append(_eclipse(chain))
        if method == "lipsdp":
            values.append(_lipsdp(chain, "neuron", "barrier"))
    value = min(whole.value, _widen(min(values), net, p))
    return Bound(value, "upper bound", p, **title)


def _restrict(net: _Net, center: Tensor, radius: float, p: float) -> list[Units]:
    """Bound the slopes that units can have on the ball."""
    found = []
    middle, spread = center, torch.zeros_like(center)
    for k, weight in enumerate(net.weights[:-1]):
        bias = net.biases[k]
        reach = weight.abs() @ spread
        if k == 0:
            reach = radius * torch.linalg.vector_norm(weight, dual_exponent(p), dim=1)
            far = middle.norm().item() + radius * max(1.0, len(middle) ** 0.5 if p > 2 else 1.0)
        else:
            far = (middle.abs() + spread).norm().item()
        size = weight.abs() @ (middle.abs() + spread) + bias.abs() + reach
        reach = reach + 4 * EPS * (weight.shape[1] + 4) * size  # rounding
        reach = reach + (net.errors[k] * far + net.shifts[k]) * (1 + 2.0**-40)  # of the weights
        low, high = weight @ middle + bias - reach, weight @ middle + bias + reach
        restricted, low, high = _between(net, k, low, high)
        found.append(restricted)
        middle, spread = (low + high) / 2, (high - low) / 2
        spread = spread + 4 * EPS * (middle.abs() + spread)
    return found


def _between(net: _Net, k: int, low: Tensor, high: Tensor) -> tuple[Units, Tensor, Tensor]:
    """Slopes and values of the units of a layer whose inputs lie in an interval."""
    units, layer = net.units[k], net.layers[k].layer
    assert layer is not None
    if units.kinks is not None:
        least, most = units.kinks.between(low, high)
        first, last = units.kinks.image(low, high)
        far = torch.maximum(low.abs(), high.abs())
        slack = 8 * EPS * (units.kinks.offsets.abs().amax(0) + units.steepest * far)
        return dataclasses.replace(units, low=least, high=most), first - slack, last + slack
    values = Range(*(end.view(1, *net.shapes[k]) for end in (low, high)))
    image = range_rule(layer, values)
    slopes = slope_rule(layer, values)
    assert slopes is not None
    ends = [torch.as_tensor(s, dtype=torch.float64).expand_as(image.low).flatten() for s in slopes]
    least, most = torch.maximum(units.low, ends[0]), torch.minimum(units.high, ends[1])
    restricted = dataclasses.replace(units, low=least, high=most)
    return restricted, image.low.flatten(), image.high.flatten()
