"""One step back through a layer, proved in floating point, and ECLipsE: its closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipbook.composition import Bound, bound_method
from lipbook.norms import operator_norm
from lipbook.tightness.reading import EPS, _dense_layers, _euclidean, _widen
from lipbook.units import Units

__all__ = ["eclipse_bound"]

# Note [certificate]
# Let V(z) = z'Pz bound |f(x) - f(y)|^2 from layer l + 1 on, where z is the difference of its
# inputs to the activations. With M = W'PW, a step back through W(C + R psi) costs, for every
# diagonal T >= 0 that is constant on groups,
#     (Cz + R psi)' M (Cz + R psi) <= (Cz + R psi)' M (Cz + R psi) + z'Tz - psi'T psi,
# since |psi_g| <= |z_g| in each group. The right-hand side is at most z'P'z for all psi if and
# only if
#     [ P' - T - CMC    -CMR    ]
#     [   -RMC         T - RMR  ]  >= 0 .                                               (*)
# The smallest such P' is the Schur complement T + CMC + CMR (T - RMR)^{-1} RMC. So every T
# with T > RMR gives a bound, whatever solver it came from: rho = lambda_max(W_1' P_1 W_1), and
# the constant is at most sqrt(rho). Eliminating psi layer by layer is block elimination on the
# matrix of LipSDP, so that rho is the smallest that the matrix of LipSDP allows with this T.
#
# In floating point, P' is computed, (*) is assembled from it, and its least eigenvalue is found
# by eigvalsh, which errs by less than 8 eps n times the Frobenius norm. If it is -s, then adding
# 2s to P' and s to T makes (*) true: s is added to both diagonal blocks. M is raised by the same
# kind of allowance before. What is returned was proved so, not solved for.


class _Chain(NamedTuple):
    """A network with weights of norm 1; the true constant is ``scale`` times as large."""

    weights: list[Tensor]
    center: list[Tensor]
    radius: list[Tensor]
    group: list[Tensor]
    scale: float

    @property
    def active(self) -> list[Tensor]:
        return [(radius > 0).nonzero()[:, 0] for radius in self.radius]

    def shape(self, layer: int) -> Tensor:
        """Multipliers of a layer up to a factor: r (r + |c|), see Note [eclipse]."""
        center, radius = self.center[layer], self.radius[layer]
        return radius * (radius + center.abs())

    def transpose(self) -> _Chain:
        flip = [weight.mT for weight in self.weights[::-1]]
        return _Chain(flip, self.center[::-1], self.radius[::-1], self.group[::-1], self.scale)


def _chain(weights: list[Tensor], units: list[Units]) -> _Chain:
    norms = [operator_norm(weight).item() for weight in weights]
    scale = math.prod(norms)
    if scale > 0:
        weights = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    center, radius = [u.center for u in units], [u.radius for u in units]
    return _Chain(weights, center, radius, [u.groups for u in units], scale)


def _gram(weight: Tensor, form: Tensor) -> Tensor:
    """W' P W, raised by what rounding may have taken off."""
    size = 8 * EPS * sum(weight.shape) * float(weight.norm() ** 2 * form.norm())
    gram = weight.mT @ form @ weight
    return (gram + gram.mT) / 2 + size * torch.eye(weight.shape[1], dtype=torch.float64)


def _step(gram: Tensor, c: Tensor, r: Tensor, multiplier: Tensor) -> Tensor:
    """P' of Note [certificate] for this multiplier, raised until (*) is proved."""
    on = (r > 0).nonzero()[:, 0]
    outer = c[:, None] * gram * c
    coupling = r[on, None] * gram[on] * c
    inner = r[on, None] * gram[on][:, on] * r[on]
    t = multiplier[on].clamp(min=1e-12 * gram.norm().item())
    if len(on):
        root = t.rsqrt()
        excess = torch.linalg.eigvalsh(root[:, None] * inner * root)[-1].item()
        if not excess < 1 - 1e-9:  # the solver stopped on the wrong side of T > RMR
            t = t * excess * (1 + 2e-9)
    block = torch.diag(t) - inner
    form = outer + torch.zeros_like(gram).index_put((on, on), t)
    if len(on):
        form = form + coupling.mT @ torch.linalg.solve(block, coupling)
    form = (form + form.mT) / 2
    corner = form - outer - torch.zeros_like(gram).index_put((on, on), t)
    lmi = torch.cat((torch.cat((corner, -coupling.mT), 1), torch.cat((-coupling, block), 1)))
    size = form.norm() + outer.norm() + inner.norm() + 2 * coupling.norm() + 2 * t.norm()
    s = max(0.0, -torch.linalg.eigvalsh(lmi)[0].item()) + 8 * EPS * len(lmi) * size.item()
    return form + 2 * s * torch.eye(len(gram), dtype=torch.float64)


def _certify(chain: _Chain, multipliers: list[Tensor] | None) -> tuple[float, list[Tensor]]:
    """Bound for given multipliers, or for those of eclipse, with the forms P_1, ..., P_L."""
    form = torch.eye(len(chain.weights[-1]), dtype=torch.float64)
    forms = [form]
    for k in range(len(chain.center) - 1, -1, -1):
        gram = _gram(chain.weights[k + 1], form)
        if multipliers is None:
            top = torch.linalg.eigvalsh(gram)[-1]
            # 1e-8: room for units with c = 0, where T > RMR would be an equality.
            t = (1 + 1e-8 * (chain.center[k] == 0)) * chain.shape(k) * top
        else:
            t = multipliers[k].clamp(min=0.0)
        form = _step(gram, chain.center[k], chain.radius[k], t)
        forms.append(form)
    gram = _gram(chain.weights[0], form)
    rho = torch.linalg.eigvalsh(gram)[-1].item() + 8 * EPS * len(gram) * gram.norm().item()
    return chain.scale * math.sqrt(max(rho, 0.0)) * (1 + 8 * EPS), forms[::-1]


# Note [eclipse]
# With M <= m I, the right-hand side of Note [certificate] can only grow if M is replaced by m I,
# and is then diagonal: P' <= t + c^2 m + c^2 r^2 m^2 / (t - r^2 m) for each unit, least at
# t = r (r + |c|) m, where it is (|c| + r)^2 m = max(|alpha|, |beta|)^2 m. So this choice never
# loses against the product bound; the true M, of which only one eigenvalue is m, makes it better.
# ECLipsE-Fast walks from the input to the output with slopes in [0, 1], which is this walk on the
# transposed network. That is sound as well: psi_g is the image of z_g under a matrix of norm at
# most 1 (psi_g z_g' / |z_g|^2), and so is its transpose. The smaller bound is returned.


def _eclipse(chain: _Chain) -> float:
    if chain.scale == 0:
        return 0.0
    return min(_certify(chain, None)[0], _certify(chain.transpose(), None)[0])


@bound_method("eclipse")
def eclipse_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound in closed form, layer by layer: ECLipsE-Fast, in both directions.

    From :math:`P_L = I`, with :math:`M_l = W_{l+1}^\top P_{l+1} W_{l+1}`,

    .. math::
        T_l &= \lambda_{\max}(M_l)\, R_l (R_l + \lvert C_l\rvert), \\
        P_l &= T_l + C_l M_l C_l + C_l M_l R_l (T_l - R_l M_l R_l)^{-1} R_l M_l C_l, \\
        \operatorname{Lip}(f)^2 &\le \lambda_{\max}(W_1^\top P_1 W_1) .

    For ReLU, :math:`T = \lambda_{\max}(M)/2` and
    :math:`P = \tfrac12 \lambda_{\max} (I + M (2\lambda_{\max} - M)^{-1})`. This is a feasible point
    of LipSDP with one multiplier a layer. **Guaranteed**: an upper bound, in floating point as
    well; never above the product bound, up to 1e-8 relative a layer; never below
    :func:`lipsdp_layer_bound` where the units of a layer have the same slopes. The cost is that
    of some eigenvalue decompositions a layer.

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`):
        slope-restricted units, sorts, maxima or Householder activations.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.
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
    >>> net = nn.Sequential(nn.Linear(9, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
    >>> bool(eclipse_bound(net, (9,)).value < 0.9 * lipschitz_bound(net, (9,)).value)
    True

    References
    ----------
    :cite:t:`xu2024eclipse`. The derivation is in the source, Note [certificate] and
    Note [eclipse].
    """
    _euclidean("eclipse", p)
    net = _dense_layers(module, input_shape, output)
    value = _widen(_eclipse(_chain(net.weights, net.units)), net)
    return Bound(value, "upper bound", p, output_shape=net.output_shape)
