"""Solvers of the semidefinite program of LipSDP: their points are used, never their values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []


class _Program(NamedTuple):
    """Minimise theta_0 subject to F = theta_0 E_x - Y + sum_i t_i (e_i e_i' - g_i g_i') >= 0."""

    maps: Tensor  # (a, N): g_i, the input to unit i as a function of (x, psi)
    offset: Tensor  # (N, N): Y
    inputs: int
    share: Tensor  # (a, k): t = share @ theta[1:]
    start: Tensor  # (1 + k,)

    def matrix(self, theta: Tensor) -> Tensor:
        t = self.share @ theta[1:]
        form = -self.offset - self.maps.mT @ (t[:, None] * self.maps)
        diagonal = torch.cat((theta[0].expand(self.inputs), t))
        return form + torch.diag(diagonal)


def _barrier(program: _Program) -> Tensor:
    """Path-following Newton method; only its point is used, never its value.

    Every term e e' - g g' has rank two, so that the Hessian of log det F is made of the squares of
    the entries of U F^{-1} U' with U the rows e and g: no tensor of order three is formed.
    """
    maps, inputs, share = program.maps, program.inputs, program.share
    a, size = maps.shape
    rows = torch.cat((torch.eye(size, dtype=torch.float64)[inputs:], maps))
    sign = torch.cat((torch.ones(a), -torch.ones(a))).double()
    unit = program.start  # the scale of each variable
    y = torch.ones_like(unit)
    # A whiff of all variables in the objective, lest one that does not matter runs away.
    cost = torch.full_like(unit, 1e-10 / len(unit))
    cost[0] = 1.0
    tau, last = float(size), 1e8 * size
    for _ in range(300):
        lower, failed = torch.linalg.cholesky_ex(program.matrix(unit * y))
        if failed:
            break
        inverse = torch.cholesky_inverse(lower)
        products = rows @ inverse @ rows.mT
        mixed = rows @ inverse[:, :inputs]
        both = sign * products.diagonal()
        slope = torch.cat((inverse[:inputs, :inputs].trace()[None], share.mT @ _fold(both)))
        hessian = torch.empty(len(unit), len(unit), dtype=torch.float64)
        hessian[0, 0] = (inverse[:inputs, :inputs] ** 2).sum()
        hessian[0, 1:] = hessian[1:, 0] = share.mT @ _fold(sign * (mixed**2).sum(1))
        squares = sign[:, None] * products**2 * sign
        hessian[1:, 1:] = share.mT @ _fold(_fold(squares).mT).mT @ share
        gradient = tau * cost - unit * slope
        hessian = unit[:, None] * hessian * unit
        root = hessian.diagonal().rsqrt()
        scaled = root[:, None] * hessian * root + 1e-13 * torch.eye(len(unit)).double()
        move = -root * torch.linalg.solve(scaled, root * gradient)
        decrement = math.sqrt(max(-(gradient @ move).item(), 0.0))
        step = 1.0 if decrement < 0.25 else 1 / (1 + decrement)
        while torch.linalg.cholesky_ex(program.matrix(unit * (y + step * move)))[1] != 0:
            step /= 2
            if step < 1e-12:
                return unit * y
        y = y + step * move
        if decrement < 0.5:
            if tau * max(y[0].item(), 1e-6) >= last:
                return unit * y
            tau *= 10
    raise ValueError(
        f"solver 'barrier' did not converge on {a} units in 300 steps: use method='eclipse'"
    )


def _fold(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return first + second


def _cvxpy(program: _Program, solver: str) -> Tensor:
    try:
        import cvxpy  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"solver={solver!r} needs cvxpy: pip install 'lipbook[bounds]', or use solver='barrier'"
        ) from error
    if solver not in cvxpy.installed_solvers():
        raise ValueError(
            f"solver must be 'barrier' or one of {cvxpy.installed_solvers()}, got {solver!r}"
        )
    size = program.maps.shape[1]
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
