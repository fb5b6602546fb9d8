r"""Critics on problems with known answers: activations against linear layers.

Three problems of :cite:t:`anil2019sorting`, each with :math:`W_1 = 1`: the absolute value (a shell
on a line), three touching cones in the plane, and a cone in 128 dimensions. Dense critics ascend
the dual on fresh samples, and are judged on 10,000 other points. All are 1-Lipschitz by
construction, up to rounding, except those with torch's ``spectral_norm``, which divides by an
estimate from below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lipbook.activations import FullSort, GroupSort, MaxMin
from lipbook.composition import lipschitz_bound
from lipbook.lab import problems, records
from lipbook.lab.recipes import Outcome, Rows
from lipbook.orthogonal import OrthogonalLinear, SpectralNormLinear
from lipbook.wasserstein import critic_difference, fit_critic

__all__ = ["PROBLEMS", "ACTIVATIONS", "LINEARS", "Setting", "run", "row", "critic", "load"]

JUDGES = 10_000


class Setting(NamedTuple):
    """A problem, the hidden widths of its critics, and the steps and rate of their ascent."""

    problem: Callable[[], problems.TransportProblem]
    widths: tuple[int, ...]
    steps: int
    lr: float


#: The problems, reduced from those of the paper (128-128, 312-312-312 and 6 × 256 units; 3,600
#: to 19,200 steps) to what a processor core does in seconds.
PROBLEMS = {
    "absolute value": Setting(functools.partial(problems.dirac_shell, 1), (16, 16), 1000, 0.01),
    "three cones": Setting(problems.three_cones, (64, 64, 64), 2500, 0.01),
    "cone, d = 128": Setting(
        functools.partial(problems.dirac_shell, 128), (128, 128, 128), 600, 0.005
    ),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "MaxMin": MaxMin,
    "GroupSort(4)": functools.partial(GroupSort, 4),
    "FullSort": FullSort,
}


def _spectral_norm(in_features: int, out_features: int) -> nn.Module:
    return spectral_norm(nn.Linear(in_features, out_features))


#: ``orthogonal``: QR. ``clipped``: divided by the exact spectral norm if that exceeds 1, from
#: an orthogonal start. ``spectral norm``: always divided by one power iteration's estimate, from
#: torch's usual start, as in 2019.
LINEARS: dict[str, Callable[[int, int], nn.Module]] = {
    "orthogonal": OrthogonalLinear,
    "clipped": SpectralNormLinear,
    "spectral norm": _spectral_norm,
}


def critic(
    dim: int,
    widths: Sequence[int],
    activation: Callable[[], nn.Module],
    linear: Callable[[int, int], nn.Module],
) -> nn.Sequential:
    """Build a dense critic with fresh weights.

    Parameters
    ----------
    dim : int
        Dimension of its inputs.
    widths : sequence of int
        Widths of the hidden layers.
    activation, linear : callable
        Make an activation, and a linear layer for given numbers of inputs and outputs.

    Returns
    -------
    torch.nn.Sequential
        Maps (batch, dim) to (batch, 1).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip([dim, *widths[:-1]], widths, strict=True):
        layers += [linear(inputs, outputs), activation()]
    return nn.Sequential(*layers, linear(widths[-1], 1))


def row(
    problem: str, activation: str, linear: str, *, seed: int = 0, steps: int | None = None
) -> Outcome:
    r"""Fit one critic and judge it on fresh samples.

    Parameters
    ----------
    problem, activation, linear : str
        Keys of ``PROBLEMS``, ``ACTIVATIONS`` and ``LINEARS``.
    seed : int
        Of the weights and the samples.
    steps : int, optional
        Number of steps, that of the problem if not given.

    Returns
    -------
    tuple of dict
        Results: the arguments; ``value``, the difference of the means of the critic; ``bound``, its
        Lipschitz bound. Tensors: the weights, for seed 0 of the small critics.
    """
    setting = PROBLEMS[problem]
    results, weights = fit(
        setting, ACTIVATIONS[activation], LINEARS[linear], seed=seed, steps=steps or setting.steps
    )
    names = {"problem": problem, "activation": activation, "linear": linear, "seed": seed}
    keep = seed == 0 and setting.widths[0] <= 64
    path = f"{problem}/{activation}/{linear}"
    return names | results, {f"{path}/{k}": v for k, v in weights.items()} if keep else {}


def fit(
    setting: Setting,
    activation: Callable[[], nn.Module],
    linear: Callable[[int, int], nn.Module],
    *,
    seed: int,
    steps: int,
) -> Outcome:
    """Fit one critic: results ``value`` and ``bound``, and its weights.

    Parameters
    ----------
    setting : Setting
        The problem; its own number of steps is not used.
    activation, linear : callable
        As in :func:`critic`.
    seed : int
        Of the weights and the samples.
    steps : int
        Number of steps, of 32 points a side.

    Returns
    -------
    tuple of dict
        Results and weights.
    """
    problem = setting.problem()
    torch.manual_seed(seed)
    model = critic(problem.dim, setting.widths, activation, linear)
    fit_critic(
        model,
        problem.sample_x,
        problem.sample_y,
        steps=steps,
        lr=setting.lr,
        batch_size=32,
        schedule="cosine",
        seed=seed,
    )
    results: dict[str, Any] = {
        "value": critic_difference(model, *judges(problem)).item(),
        "bound": lipschitz_bound(model, (problem.dim,)).value,
    }
    return results, {name: value.detach() for name, value in model.state_dict().items()}


def judges(problem: problems.TransportProblem) -> tuple[Tensor, Tensor]:
    """Draw the points that all critics of a problem are judged on.

    Parameters
    ----------
    problem : TransportProblem
        The problem.

    Returns
    -------
    tuple of torch.Tensor
        10,000 points of each distribution.
    """
    generator = torch.Generator().manual_seed(2**40)
    return problem.sample_x(JUDGES, generator), problem.sample_y(JUDGES, generator)


def load(problem: str, activation: str, linear: str) -> nn.Sequential:
    """Build a recorded critic, of seed 0.

    Parameters
    ----------
    problem, activation, linear : str
        As in :func:`row`. The critics in 128 dimensions are not kept.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is no record.
    ValueError
        If the record does not hold this critic.
    """
    path = f"{problem}/{activation}/{linear}/"
    tensors = records.read("known_answers").tensors
    weights = {k.removeprefix(path): v for k, v in tensors.items() if k.startswith(path)}
    if not weights:
        kept = sorted({k.rpartition("/")[0] for k in tensors})
        raise ValueError(f"the record holds no critic {path[:-1]!r}: expected one of {kept}")
    setting = PROBLEMS[problem]
    dim = setting.problem().dim
    model = critic(dim, setting.widths, ACTIVATIONS[activation], LINEARS[linear])
    model.load_state_dict(weights)
    return model.eval()


def run(
    *,
    seeds: int = 2,
    shorten: float = 1.0,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    r"""Fit a critic of each activation and linear layer to each problem.

    Parameters
    ----------
    seeds : int
        Critics of each kind, with seeds ``seed``, ``seed`` + 1, ...
    shorten : float
        Factor of all numbers of steps.
    seed : int
        The first seed.
    rows : Rows, optional
        Keeps finished critics.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`, ``problems``, the sizes, and ``judges``, the
        number of points. Tensors: the weights of the small critics of seed 0.
    """
    rows = rows or Rows()
    steps = {name: max(1, round(shorten * setting.steps)) for name, setting in PROBLEMS.items()}
    grid = [
        (problem, activation, linear, seed + k)
        for problem in PROBLEMS
        for activation in ACTIVATIONS
        for linear in LINEARS
        for k in range(seeds)
        if activation != "GroupSort(4)" or linear == "orthogonal"
    ]
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for problem, activation, linear, k in rows.bar(grid, "critics"):
        names = (problem, activation, linear)
        one = functools.partial(row, *names, seed=k, steps=steps[problem])
        results, weights = rows.compute(" ".join(names) + f" seed {k}", one)
        table.append(results)
        tensors |= weights
    sizes = {
        name: {
            "distance": setting.problem().distance,
            "dim": setting.problem().dim,
            "widths": list(setting.widths),
            "steps": steps[name],
            "lr": setting.lr,
            "batch_size": 32,
        }
        for name, setting in PROBLEMS.items()
    }
    return {"rows": table, "problems": sizes, "judges": JUDGES}, tensors
