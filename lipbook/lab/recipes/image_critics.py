r"""Convolutional critics between real digits and a fixed generator: OSSN, RKO and BCOP.

The image experiment of :cite:t:`li2019preventing`, against an oracle. Real digits and those of
:mod:`~lipbook.lab.recipes.digit_generator` are images in [0, 1] of 28 × 28 pixels, and distances
are Euclidean in these units. All critics have the same architecture (two convolutions with kernel 4
and stride 2, then two orthogonal dense layers), the same training points and the same held-out
points; on both POT gives the exact distance. Every value is kept as the critic gives it, beside the
sound Lipschitz bound of the critic, by which it must be divided where that exceeds 1.

Two rows more show what else the published numbers left out: an upsampling in front of the critic,
whose norm is 2, and the points that a critic was fitted to as its test.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.composition import Bound, lipschitz_bound, lipschitz_rule
from lipbook.convolutions import (
    NonexpansiveConv2d,
    OrthogonalConv2d,
    circular_fold,
    circular_pad,
)
from lipbook.lab import records
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Outcome, Rows, digit_generator
from lipbook.norms import convolution_norm_bound
from lipbook.orthogonal import OrthogonalLinear
from lipbook.wasserstein import (
    critic_difference,
    fit_critic,
    wasserstein1,
    wasserstein1_bracket,
)

__all__ = [
    "CONVOLUTIONS",
    "ACTIVATIONS",
    "PUBLISHED",
    "TRIALS",
    "OSSNConv2d",
    "Clouds",
    "run",
    "row",
    "dual",
    "clouds",
    "critic",
    "load",
]


class OSSNConv2d(nn.Conv2d):
    r"""Circular convolution divided by an *estimate* of its norm, as in 2019.

    .. math:: K \mapsto K / \max(1, \hat\sigma), \qquad
        \hat\sigma = \langle u, A_K v\rangle \le \sigma_1(A_K)

    Ten power iterations on the whole operator, from where the last ones ended, in each forward
    pass in training mode; the last estimate in evaluation mode. **Not guaranteed**: any bound. The
    estimate is from below, and lags behind a kernel that grows fast. It is here to be measured.

    Parameters
    ----------
    in_channels, out_channels : int
        c_in and c_out.
    size : int
        Height and width of the image, a multiple of the stride.
    kernel_size, stride : int
        4 and 2, or 3 and 1: a pixel is padded on each side.

    References
    ----------
    :cite:t:`farnia2019`; the baseline of :cite:t:`li2019preventing`.
    """

    sigma: Tensor
    u: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, size: int, kernel_size: int = 4, stride: int = 2
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 1, padding_mode="circular")
        u = torch.randn(1, out_channels, size // stride, size // stride)
        self.register_buffer("u", u / u.norm())
        self.register_buffer("sigma", torch.ones(()))

    def _estimate(self) -> Tensor:
        u, pads, stride = self.u, [(1, 1), (1, 1)], self.stride
        with torch.no_grad():
            for _ in range(10):
                v = circular_fold(functional.conv_transpose2d(u, self.weight, stride=stride), pads)
                v = v / v.norm()
                u = functional.conv2d(circular_pad(v, pads), self.weight, stride=stride)
                u = u / u.norm()
        self.u = u
        return (u * functional.conv2d(circular_pad(v, pads), self.weight, stride=stride)).sum()

    def normalised(self) -> Tensor:
        """Divide the kernel by the estimate that is stored."""
        return self.weight / self.sigma.clamp(min=1)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, (batch, c_in, h, w) to (batch, c_out, h / stride, w / stride)."""
        if not self.training:
            return self._conv_forward(input, self.normalised(), self.bias)
        sigma = self._estimate()
        self.sigma = sigma.detach()
        return self._conv_forward(input, self.weight / sigma.clamp(min=1), self.bias)


@lipschitz_rule.register
def _(module: OSSNConv2d, input_shape: tuple[int, ...], p: float) -> Bound:
    if module.training:
        raise ValueError("its kernel changes when it is called: call .eval()")
    kernel = module.normalised().detach().double()
    geometry: dict[str, Any] = {"stride": module.stride, "padding": 1, "p": p}
    return Bound(
        convolution_norm_bound(kernel, input_shape[1:], padding_mode="circular", **geometry).item(),
        "upper bound",
        p,
    )


def _rko(in_channels: int, out_channels: int, size: int) -> nn.Module:
    return NonexpansiveConv2d(in_channels, out_channels, 4, 2, method="rko")


def _bcop(in_channels: int, out_channels: int, size: int) -> nn.Module:
    return OrthogonalConv2d(in_channels, out_channels, 4, 2)


#: One-sided spectral normalisation by power iteration, the reshaped kernel orthogonalised, and
#: block convolution orthogonal parametrization.
CONVOLUTIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "OSSN": OSSNConv2d,
    "RKO": _rko,
    "BCOP": _bcop,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "MaxMin": MaxMin}
#: Values of critics with MaxMin for CIFAR-10 in Table 4 of the paper, on images enlarged twofold.
PUBLISHED = {"OSSN": 3.29, "RKO": 4.95, "BCOP": 5.34}
#: From the result files in the authors' public repository (ColinQiyangLi/LConvNet, under
#: runs/wde_stl10/lr-0.0001/conv/OSSN/n_iters-10/maxmin), for STL-10. For each of the trials A, B, D
#: and E the value of the critic and the product of its layers' norms; trial C was not to be had.
TRIALS = {
    "A": (7.933720910549164, 1.1625284729037266),
    "B": (7.055799275040626, 1.0012750500491414),
    "D": (7.261411683559418, 1.0736759134131704),
    "E": (7.497135261297226, 1.0054787850504063),
}


def critic(convolution: str, activation: str) -> nn.Sequential:
    """Build a critic with fresh weights.

    Parameters
    ----------
    convolution, activation : str
        Keys of ``CONVOLUTIONS`` and ``ACTIVATIONS``.

    Returns
    -------
    torch.nn.Sequential
        Maps (batch, 1, 28, 28) to (batch, 1).
    """
    conv, act = CONVOLUTIONS[convolution], ACTIVATIONS[activation]
    return nn.Sequential(
        conv(1, 16, 28),
        act(),
        conv(16, 32, 14),
        act(),
        nn.Flatten(),
        OrthogonalLinear(32 * 7 * 7, 64),
        act(),
        OrthogonalLinear(64, 1),
    )


class Clouds(NamedTuple):
    """Real and generated digits: to train on, and held out."""

    real: Tensor
    generated: Tensor
    held_out_real: Tensor
    held_out_generated: Tensor


def clouds(count: int = 2000) -> Clouds:
    """Gather the points of the experiment.

    Parameters
    ----------
    count : int
        Images in each cloud, 2,000 at most.

    Returns
    -------
    Clouds
        Images in [0, 1], (count, 1, 28, 28). No real digit is among those that the generator was
        trained on.
    """
    images, model = mnist().train_images[digit_generator.TRAINED_ON :], digit_generator.load()
    return Clouds(
        images[:count],
        digit_generator.generate(model, count, 100),
        images[2000 : 2000 + count],
        digit_generator.generate(model, count, 101),
    )


def row(
    points: Clouds,
    convolution: str,
    activation: str,
    lr: float,
    *,
    steps: int = 250,
    seed: int = 0,
    upsample: bool = False,
) -> Outcome:
    r"""Fit one critic, with RMSprop as in the paper, and judge it.

    Parameters
    ----------
    points : Clouds
        What to fit to and to judge on.
    convolution, activation : str
        Keys of ``CONVOLUTIONS`` and ``ACTIVATIONS``.
    lr : float
        Rate of the first step; it falls to 0 as half a cosine.
    steps : int
        Number of steps, of 64 points a side.
    seed : int
        Of the weights and batches.
    upsample : bool
        Put torch's nearest-neighbour upsampling by 2 in front of the critic.

    Returns
    -------
    tuple of dict
        Results: the arguments; ``train`` and ``held_out``, the differences of the means of the
        critic; ``bound``, its Lipschitz bound; ``largest_batch``, the largest difference of a
        batch on the way; or ``failed``, what went wrong. Tensors: the weights.
    """
    torch.manual_seed(seed)
    model = critic(convolution, activation)
    if upsample:
        model = nn.Sequential(nn.Upsample(scale_factor=2), *model)
    results: dict[str, Any] = {
        "convolution": convolution,
        "activation": activation,
        "lr": lr,
        "seed": seed,
    }
    try:
        history = fit_critic(
            model,
            points.real,
            points.generated,
            steps=steps,
            lr=lr,
            batch_size=64,
            optimizer=torch.optim.RMSprop,
            schedule="cosine",
            seed=seed,
        )
        with torch.no_grad():
            train = critic_difference(model, points.real, points.generated).item()
            held_out = critic_difference(
                model, points.held_out_real, points.held_out_generated
            ).item()
        bound = lipschitz_bound(model, points.real.shape[1:]).value
    except (FloatingPointError, ValueError) as error:  # it is not finite: the words say what
        return results | {"failed": str(error)}, {}
    results |= {
        "train": train,
        "held_out": held_out,
        "bound": bound,
        "largest_batch": max(history.values),
    }
    return results, {name: value.detach() for name, value in model.state_dict().items()}


def load(name: str) -> nn.Sequential:
    """Build a recorded critic.

    Parameters
    ----------
    name : str
        ``"BCOP"``, the critic with MaxMin at its best rate, or ``"OSSN"``, the one with MaxMin
        whose bound is the largest.

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
    record = records.read("image_critics")
    kept = record.results["kept"]
    if name not in kept:
        raise ValueError(f"name must be one of {list(kept)}, got {name!r}")
    model = critic(name, kept[name]["activation"])
    model.load_state_dict(
        {k.removeprefix(f"{name}/"): v for k, v in record.tensors.items() if k.startswith(name)}
    )
    return model.eval()


def run(
    *,
    lrs: Sequence[float] = (1e-3, 1e-2, 1e-1),
    steps: int = 250,
    seeds: int = 3,
    count: int = 2000,
    few: int = 100,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    r"""Fit all critics at all rates and measure the exact distances.

    Parameters
    ----------
    lrs : sequence of float
        Learning rates.
    steps : int
        Steps of each critic.
    seeds : int
        Critics of each kind at its best rate, with seeds ``seed``, ``seed`` + 1, ...
    count : int
        Images in each cloud.
    few : int
        Images in the training clouds of the critic that shall overfit.
    seed : int
        Of the weights and batches at all rates.
    rows : Rows, optional
        Keeps finished critics.

    Returns
    -------
    tuple of dict
        Results: ``rows``, those of :func:`row`; ``exact``, the distances by POT of the ``train``
        and ``held_out`` clouds, and of two clouds of real (``real_to_real``) and of generated
        digits; ``best``, for each convolution and activation the rows of all seeds at the rate
        of the largest training value after division by the bound; ``kept``, the rows of the
        critics that the tensors hold (:func:`load`); ``bracket`` on the held-out clouds from the
        kept BCOP critic;
        ``upsampled`` and ``few``, a row each with exact distances; ``steps`` and ``count``.
        Tensors: weights of two critics.
    """
    rows = rows or Rows()
    points = clouds(count)
    fit = functools.partial(row, points, steps=steps)
    kinds = list(itertools.product(CONVOLUTIONS, ACTIVATIONS))
    table: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []
    for kind, lr in rows.bar(list(itertools.product(kinds, lrs)), "rates"):
        one = functools.partial(fit, *kind, lr, seed=seed)
        results, state = rows.compute(f"{' '.join(kind)} rate {lr:g}", one)
        table.append(results)
        weights.append(state)

    best: dict[str, list[dict[str, Any]]] = {}
    for kind in rows.bar(kinds, "seeds"):
        first = table[_largest(table, kind, dual)]
        best[" ".join(kind)] = [first]
        for k in range(seed + 1, seed + seeds):
            one = functools.partial(fit, *kind, first["lr"], seed=k)
            results, _ = rows.compute(f"{' '.join(kind)} seed {k}", one)
            best[" ".join(kind)].append(results)
    indices = {
        "BCOP": _largest(table, ("BCOP", "MaxMin"), dual),
        "OSSN": _largest(table, ("OSSN", "MaxMin"), lambda results: results["bound"]),
    }
    kept = {name: table[index] for name, index in indices.items()}
    tensors = {
        f"{name}/{key}": value
        for name, index in indices.items()
        for key, value in weights[index].items()
    }

    held_out = points.held_out_real.double(), points.held_out_generated.double()
    exact = {
        "train": wasserstein1(points.real.double(), points.generated.double()).item(),
        "held_out": wasserstein1(*held_out).item(),
        "real_to_real": wasserstein1(points.real.double(), held_out[0]).item(),
        "generated_to_generated": wasserstein1(points.generated.double(), held_out[1]).item(),
    }
    model = critic("BCOP", "MaxMin")
    model.load_state_dict(weights[indices["BCOP"]])
    bracket = wasserstein1_bracket(*held_out, critic=model.eval(), method="critic")
    lr = kept["BCOP"]["lr"]
    return {
        "rows": table,
        "exact": exact,
        "best": best,
        "kept": kept,
        "bracket": {"lower": bracket.lower, "upper": bracket.upper},
        "upsampled": _upsampled(points, lr, steps, seed, rows),
        "few": _few(points, lr, steps, seed, few, rows),
        "steps": steps,
        "count": count,
    }, tensors


def dual(results: Mapping[str, Any], on: str = "train") -> float:
    """Divide the value of a row by its Lipschitz bound, if that exceeds 1.

    Parameters
    ----------
    results : mapping
        Of :func:`row`.
    on : str
        ``"train"`` or ``"held_out"``.

    Returns
    -------
    float
        A lower bound of the distance of these points.

    Examples
    --------
    >>> dual({"train": 3.0, "bound": 1.5}), dual({"held_out": 0.5, "bound": 0.9}, "held_out")
    (2.0, 0.5)
    """
    return results[on] / max(1.0, results["bound"])


def _largest(
    table: Sequence[Mapping[str, Any]],
    kind: tuple[str, str],
    measure: Callable[[Mapping[str, Any]], float],
) -> int:
    """Index of the row of a kind that has the largest measure; of the first if all failed."""
    same = [k for k, r in enumerate(table) if (r["convolution"], r["activation"]) == kind]
    return max(same, key=lambda k: -math.inf if "failed" in table[k] else measure(table[k]))


def _upsampled(points: Clouds, lr: float, steps: int, seed: int, rows: Rows) -> dict[str, Any]:
    """Digits of 14 × 14 pixels, upsampled to 28 × 28 by the first layer of the critic."""
    small = Clouds(*(functional.avg_pool2d(cloud, 2) for cloud in points))
    fit = functools.partial(row, small, "BCOP", "MaxMin", lr, steps=steps, seed=seed, upsample=True)
    results, _ = rows.compute("upsampled", fit)
    held_out = small.held_out_real.double(), small.held_out_generated.double()
    large = [functional.interpolate(cloud, scale_factor=2) for cloud in held_out]
    return results | {
        "exact_before": wasserstein1(*held_out).item(),
        "exact_after": wasserstein1(*large).item(),
    }


def _few(points: Clouds, lr: float, steps: int, seed: int, few: int, rows: Rows) -> dict[str, Any]:
    """Fit a critic to few digits, which it can learn by heart."""
    start = Clouds(points.real[:few], points.generated[:few], *points[2:])
    fit = functools.partial(row, start, "BCOP", "MaxMin", lr, steps=steps, seed=seed)
    results, _ = rows.compute("few", fit)
    distance = wasserstein1(start.real.double(), start.generated.double()).item()
    return results | {"count": few, "exact_train": distance}
