"""Solvers of the semidefinite program of LipSDP: their points are used, never their values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipbook._extras import imported

__all__: list[str] = []


class _Program(NamedTuple):
    """Minimise theta_0 subject to F = theta_0 E_x - Y + sum_i t_i (e_i e_i' - g_i g_i') >= 0."""

    # Of each layer, (a_k, c_k): g_i, the input to unit i, in x and the psi of the layers before.
    maps: list[Tensor]
    offset: Tensor  # (N, N): Y
    inputs: int
    shape: Tensor  # (a,) and
    column: Tensor  # (a,): t_i = shape_i theta_{1 + column_i}
    start: Tensor  # (1 + k,)

    def multipliers(self, theta: Tensor) -> Tensor:
        return self.shape * theta[1:][self.column]

    def gathered(self, values: Tensor) -> Tensor:
        """Transpose of the map from theta[1:] to t, along dimension 0."""
        weighted = self.shape.view(-1, *[1] * (values.dim() - 1)) * values
        zeros = torch.zeros(len(self.start) - 1, *values.shape[1:], dtype=values.dtype)
        return zeros.index_add(0, self.column, weighted)

    def matrix(self, theta: Tensor) -> Tensor:
        t, form = self.multipliers(theta), -self.offset
        form.diagonal().add_(torch.cat((theta[0].expand(self.inputs), t)))
        for part, own in zip(self.maps, t.split([len(part) for part in self.maps]), strict=True):
            width = part.shape[1]
            form[:width, :width] -= part.mT @ (own[:, None] * part)
        return form


_PARTS = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03)  # of the way along a tangent, to 1 / tau = 0
_CORRECTIONS = 6  # Newton steps back to the path before a tangent is given up


def _derivatives(program: _Program, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian (up to its sign) of log det F."""
    maps, inputs = program.maps, program.inputs
    of_maps = torch.cat([part @ inverse[: part.shape[1]] for part in maps])
    both = torch.cat([of_maps[:, : part.shape[1]] @ part.mT for part in maps], 1)
    below = inverse[inputs:, inputs:], of_maps[:, inputs:], both
    slope, hessian = torch.empty_like(program.start), torch.empty(2 * program.start.shape).double()
    slope[0] = inverse.diagonal()[:inputs].sum()
    slope[1:] = program.gathered(below[0].diagonal() - below[2].diagonal())
    hessian[0, 0] = (inverse[:inputs, :inputs] ** 2).sum()
    mixed = (inverse[inputs:, :inputs] ** 2).sum(1) - (of_maps[:, :inputs] ** 2).sum(1)
    hessian[0, 1:] = hessian[1:, 0] = program.gathered(mixed)
    squares, crossed = below[0] ** 2 + below[2] ** 2, below[1] ** 2
    squares = squares - crossed - crossed.mT
    hessian[1:, 1:] = program.gathered(program.gathered(squares).mT)
    return slope, hessian


def _barrier(program: _Program) -> Tensor:
    """Path-following Newton method; only its point is used, never its value.

    Every term e e' - g g' has rank two, so that the Hessian of log det F is made of the squares of
    the entries of U F^{-1} U' with U the rows e and g: no tensor of order three is formed.
    """
    a, size = len(program.shape), len(program.offset)
    unit = program.start  # the scale of each variable
    y = torch.ones_like(unit)
    # A whiff of all variables in the objective, lest one that does not matter runs away.
    cost = torch.full_like(unit, 1e-10 / len(unit))
    cost[0] = 1.0
    tau, last = float(size), 1e7 * size
    kept, longest, part, corrections = (y, tau), 1.0, 1.0, 0
    lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * y))
    for _ in range(0 if failed else 300):
        inverse = torch.cholesky_inverse(lower)
        slope, hessian = _derivatives(program, inverse)
        gradient = tau * cost - unit * slope
        hessian = unit[:, None] * hessian * unit
        root = hessian.diagonal().rsqrt()
        scaled = root[:, None] * hessian * root + 1e-13 * torch.eye(len(unit)).double()
        sides = torch.stack((root * gradient, root * cost), 1)
        move, ahead = (-root[:, None] * torch.linalg.solve(scaled, sides)).unbind(1)
        decrement = math.sqrt(max(-(gradient @ move).item(), 0.0))
        if decrement < 1:  # near the path, y(1 / tau): a step along its tangent
            if tau * max(y[0].item(), 1e-6) >= last:
                return unit * y
            kept, corrections = (y, tau), 0
            for part in (p for p in _PARTS if p < longest):
                moved = y + part * tau * ahead
                lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * moved))
                if not failed:
                    y, tau, longest = moved, tau / (1 - part), 1.0
                    break
            else:
                return unit * y
            continue
        corrections += 1
        if corrections > _CORRECTIONS and part < 1:  # the tangent led far away: a shorter step
            (y, tau), longest, corrections = kept, part, 0
            lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * y))
            continue
        value = tau * cost @ y - 2 * lower.diagonal().log().sum()
        step = 1.0
        while True:
            moved = y + step * move
            lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * moved))
            now = tau * cost @ moved - 2 * lower.diagonal().log().sum()
            # Values are known to some digits only, and close to the path they decide nothing.
            if not failed and now <= value - 0.1 * step * decrement**2 + 1e-9 * abs(value):
                break
            step /= 2
            if step < 1e-12:
                return unit * y
        y = moved
    raise ValueError(
        f"solver 'barrier' did not converge on {a} units in 300 steps: use method='eclipse'"
    )


def _cvxpy(program: _Program, solver: str) -> Tensor:
    cvxpy = imported("cvxpy", ", or use solver='barrier'")
    if solver not in cvxpy.installed_solvers():
        raise ValueError(
            f"solver must be 'barrier' or one of {cvxpy.installed_solvers()}, got {solver!r}"
        )
    size = len(program.offset)
    zero = torch.zeros_like(program.start)
    unit = program.start
    base = program.matrix(zero)
    columns = []
    for k in range(len(zero)):
        one = zero.clone()
        one[k] = unit[k]
        columns.append((program.matrix(one) - base).flatten())
    y = cvxpy.Variable(len(zero), nonneg=True)
    lmi = torch.stack(columns, 1).numpy() @ y + base.flatten().numpy()
    problem = cvxpy.Problem(
        cvxpy.Minimize(y[0]), [cvxpy.reshape(lmi, (size, size), order="C") >> 0]
    )
    try:
        problem.solve(solver=solver)
    except cvxpy.error.SolverError as error:
        raise ValueError(f"solver {solver!r} failed: {error}; use method='eclipse'") from error
    if y.value is None:
        raise ValueError(
            f"solver {solver!r} ended with status {problem.status!r} on {len(program.maps)} "
            "units: use solver='barrier' or method='eclipse'"
        )
    return unit * torch.from_numpy(np.asarray(y.value)).clamp(min=0.0)
