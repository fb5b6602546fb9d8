"""LipSDP: the best multipliers, and what they prove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lipbook.composition import Bound, bound_method
from lipbook.tightness.eclipse import _certify, _Chain, _chain, _step
from lipbook.tightness.reading import _dense_layers, _euclidean, _widen
from lipbook.tightness.solvers import _barrier, _cvxpy, _Program

__all__ = ["lipsdp_bound", "lipsdp_layer_bound"]


@bound_method("lipsdp")
def lipsdp_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    solver: str = "barrier",
    max_units: int = 1000,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound of LipSDP-Neuron: the best diagonal multiplier, one entry a unit.

    For one hidden layer with slopes in :math:`[\alpha, \beta]`,

    .. math::
        \operatorname{Lip}(f)^2 \le \min_{\rho,\, T \ge 0} \rho \quad\text{subject to}\quad
        \begin{bmatrix} -2\alpha\beta\, W_0^\top T W_0 - \rho I & (\alpha+\beta) W_0^\top T \\
        (\alpha+\beta)\, T W_0 & -2 T + W_1^\top W_1 \end{bmatrix} \preceq 0,
        \quad T \text{ diagonal}

    For any depth write the change of a layer's outputs as
    :math:`\Delta h_l = C_l\,\Delta z_l + R_l\,\psi_l` with the middle :math:`C_l` and half the
    width :math:`R_l` of its slopes, so that :math:`\lvert\psi_l\rvert \le \lvert\Delta z_l\rvert`
    entry by entry. Then :math:`\Delta z_1 = W_1 \Delta x`,
    :math:`\Delta z_{l+1} = W_{l+1}\Delta h_l` and :math:`\Delta f` are linear in :math:`\Delta x`
    and all :math:`\psi_l`, and the matrix inequality says that this quadratic form is nowhere
    negative:

    .. math::
        \rho \lVert\Delta x\rVert^2 - \lVert\Delta f\rVert^2
        + \sum_{l=1}^{L-1} \sum_i t_{l,i} \bigl(\psi_{l,i}^2 - (\Delta z_{l,i})^2\bigr) \ge 0
        \qquad \text{for all } \Delta x, \psi_1, \dots, \psi_{L-1}.

    For a true pair of points no term of the sum is positive, hence
    :math:`\lVert\Delta f\rVert^2 \le \rho \lVert\Delta x\rVert^2`. **Guaranteed**: an upper
    bound. The value of a solver would not be one, so only its multipliers :math:`t` are taken: the
    smallest :math:`\rho` that they prove is computed by block elimination, the last layer first,
    with an allowance for rounding (Note [certificate] in the source). Sorting and Householder
    activations get the quadratic constraints of :cite:t:`pauli2024`.

    *LipSDP-Network*, which couples pairs of units by further multipliers, is not offered: it
    is not a bound for activations that are merely slope-restricted on each unit
    (:cite:t:`pauli2022`).

    Parameters
    ----------
    module : torch.nn.Module
        Network whose activations lie on one chain (:mod:`lipbook.tightness`):
        slope-restricted units, sorts, maxima or Householder activations.
    input_shape : sequence of int
        Shape of one sample.
    p : float
        2.
    solver : str
        ``"barrier"``, an interior-point method for this program alone, or the name of a solver of
        cvxpy, such as ``"CLARABEL"`` (some dozens of units) or ``"SCS"``.
    max_units : int
        Most hidden units. The cost grows with their third power (the sixth for CLARABEL): a
        thousand take about a minute.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ModuleNotFoundError
        If ``solver`` asks for cvxpy, which is not installed.
    ValueError
        If the network is none such or has too many units, p is not 2, ``solver`` is
        unknown, or it fails.

    Examples
    --------
    One hidden layer of two units that computes the absolute value:

    >>> from lipbook.composition import lipschitz_bound
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> net[2].weight.data = torch.ones(1, 2)
    >>> round(lipsdp_bound(net, (1,)).value, 6), round(lipschitz_bound(net, (1,)).value, 6)
    (1.0, 2.0)

    References
    ----------
    :cite:t:`fazlyab2019`, Theorem 2.
    """
    return _lipsdp_bound("neuron", module, input_shape, p, solver, max_units, output)


@bound_method("lipsdp-layer")
def lipsdp_layer_bound(
    module: nn.Module,
    input_shape: Sequence[int],
    p: float = 2,
    *,
    solver: str = "barrier",
    max_units: int = 1000,
    output: str | int | None = None,
) -> Bound:
    r"""Upper bound of LipSDP-Layer: the best multipliers, one scalar a layer.

    The program of :func:`lipsdp_bound` with :math:`T_l = t_l I` (in general
    :math:`t_l\, R_l(R_l + \lvert C_l\rvert)`, which is the same where all units of a layer have the
    same slopes). **Guaranteed**: an upper bound, between those of :func:`lipsdp_bound` and
    :func:`eclipse_bound` up to the accuracy of the solver, if slopes are the same within a layer.

    Parameters
    ----------
    module, input_shape, p, solver, max_units
        As for :func:`lipsdp_bound`.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"upper bound"``.

    Raises
    ------
    ModuleNotFoundError, ValueError
        As :func:`lipsdp_bound`.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU())
    >>> methods = ("lipsdp", "lipsdp-layer", "eclipse", "product")
    >>> values = [lipschitz_bound(net, (5,), method=method).value for method in methods]
    >>> values == sorted(values)
    True

    References
    ----------
    :cite:t:`fazlyab2019`, Section 3.
    """
    return _lipsdp_bound("layer", module, input_shape, p, solver, max_units, output)


def _lipsdp_bound(
    multipliers: Literal["neuron", "layer"],
    module: nn.Module,
    input_shape: Sequence[int],
    p: float,
    solver: str,
    max_units: int,
    output: str | int | None,
) -> Bound:
    method = "lipsdp" if multipliers == "neuron" else "lipsdp-layer"
    _euclidean(method, p)
    net = _dense_layers(module, input_shape, output)
    if net.hidden() > max_units:
        raise ValueError(
            f"method {method!r} is for at most max_units={max_units} hidden units, got "
            f"{net.hidden()}: use method='eclipse', or raise max_units"
        )
    value = _lipsdp(_chain(net.weights, net.units), multipliers, solver)
    return Bound(_widen(value, net), "upper bound", p, output_shape=net.output_shape)


def _lipsdp(chain: _Chain, multipliers: str, solver: str) -> float:
    sizes = [len(on) for on in chain.active]
    start, _, rho = _feasible(chain)
    if chain.scale == 0 or rho == 0:
        return 0.0
    if not sum(sizes):
        return _certify(chain, start)[0]
    program = _program(chain, multipliers, start, rho)
    theta = _barrier(program) if solver == "barrier" else _cvxpy(program, solver)
    parts = program.multipliers(theta).split(sizes)
    best = math.inf
    # At an optimum T - RMR is often singular, where the allowance is large: a step inside is tried.
    for room in (0.0, 1e-8, 1e-7, 1e-6):
        solved = []
        for k, (part, on) in enumerate(zip(parts, chain.active, strict=True)):
            solved.append(torch.zeros_like(chain.radius[k]))
            solved[-1][on] = part * (1 + room) ** (len(sizes) - k)
        best = min(best, _certify(chain, solved)[0])
    return best


def _feasible(chain: _Chain) -> tuple[list[Tensor], Tensor, float]:
    """Multipliers well inside the feasible set: those of eclipse, half as large again."""
    form = torch.eye(len(chain.weights[-1]), dtype=torch.float64)
    found = []
    for k in range(len(chain.center) - 1, -1, -1):
        gram = chain.weights[k + 1].mT @ form @ chain.weights[k + 1]
        top = torch.linalg.eigvalsh((gram + gram.mT) / 2)[-1].clamp(min=0.0)
        t = 1.5 * chain.shape(k) * top
        if top == 0:
            return [torch.zeros_like(r) for r in chain.radius], form, 0.0
        form = _step(gram, chain.center[k], chain.radius[k], t)
        found.append(t)
    gram = chain.weights[0].mT @ form @ chain.weights[0]
    return found[::-1], form, torch.linalg.eigvalsh((gram + gram.mT) / 2)[-1].item()


def _program(chain: _Chain, multipliers: str, start: list[Tensor], rho: float) -> _Program:
    active = chain.active
    first = chain.weights[0]
    if first.shape[1] > first.shape[0]:  # only W W' matters: fewer inputs do
        first = torch.linalg.qr(first.mT)[1].mT
    inputs, total = first.shape[1], sum(len(on) for on in active)
    signal = torch.zeros(inputs, inputs + total, dtype=torch.float64)
    signal[:, :inputs] = torch.eye(inputs, dtype=torch.float64)
    maps, shapes, columns, column = [], [], [], inputs
    for k, weight in enumerate([first, *chain.weights[1:-1]]) if active else ():
        signal = weight @ signal
        on = active[k]
        maps.append(signal[on, :column])
        signal = chain.center[k][:, None] * signal
        signal[on, column + torch.arange(len(on))] += chain.radius[k][on]
        column += len(on)
        if multipliers == "layer":
            shapes.append(chain.shape(k)[on])
            columns.append(torch.zeros(len(on), dtype=torch.int64))
        else:
            shapes.append(torch.ones(len(on), dtype=torch.float64))
            columns.append(chain.group[k][on].unique(return_inverse=True)[1])
    signal = chain.weights[-1] @ signal
    counts = [int(part.max()) + 1 if len(part) else 0 for part in columns]
    before = [sum(counts[:k]) for k in range(len(counts))]  # variables of a layer follow the last's
    columns = [part + k for part, k in zip(columns, before, strict=True)]
    shape, place = torch.cat(shapes), torch.cat(columns)
    t = torch.cat([t[on] for t, on in zip(start, active, strict=True)])
    theta = torch.zeros(1 + sum(counts), dtype=torch.float64)
    theta[0] = 1.2 * rho
    # Least squares: exact, since t is of this form.
    theta[1:].index_add_(0, place, shape * t)
    theta[1:] /= torch.zeros(sum(counts), dtype=torch.float64).index_add(0, place, shape**2)
    return _Program(maps, signal.mT @ signal, inputs, shape, place, theta)
