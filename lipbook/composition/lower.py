"""The lower bound: two points that show how steep a network is."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.graphs.trace import opened, unwrapped
from lipbook.norms.arguments import _got, _real
from lipbook.rules import Bound, _exponent, _plain_copy

__all__ = ["lipschitz_lower_bound"]


@torch.inference_mode(False)
@torch.enable_grad()
def lipschitz_lower_bound(
    module: nn.Module,
    inputs: Tensor,
    p: float = 2,
    *,
    radius: float = 1.0,
    steps: int = 100,
    seed: int = 0,
    output: str | int | None = None,
) -> Bound:
    r"""Lower bound of the Lipschitz constant of a network, with the two points that prove it.

    .. math::
        \operatorname{Lip}(f) \ge \frac{\lVert f(x) - f(y)\rVert_p}{\lVert x - y\rVert_p}
        \qquad \text{for every } x \ne y

    The pair is searched from every input, and the best one wins:

    1. *turn*: a short chord through the input is turned towards the steepest direction by the
       power method (Boyd's for p = 1 and p = inf) on :math:`J^\top J`;
    2. *climb*: the chord, now of length ``radius``, follows the gradient of its own quotient in
       both ends. The Jacobian of a ReLU network is piecewise constant and has no
       gradient to follow; the quotient of a chord that crosses kinks has;
    3. *halve*: by the triangle inequality one half of a chord is at least as steep as the
       whole, so the better half is kept, ten times, and turned once more.

    What is returned is a difference quotient and not the norm of a Jacobian: at a kink autograd
    returns what its rules say (it differentiates ``x - relu(x) + relu(-x)``, which is
    0 everywhere, to 1 at 0), while two points cannot err. How near to the constant it comes is only
    hoped: the constant is NP-hard to compute, also for two layers :cite:p:`virmaux2018`.

    The arithmetic is float64 on a copy, with parametrized weights at their present value. The
    quotient is reduced by an allowance for rounding, which is measured: float32 evaluates
    the same points, and float64 is taken to err :math:`2^{29}` times less than the worst of
    them, with a factor of 8 to spare.

    Parameters
    ----------
    module : torch.nn.Module
        Any differentiable module that is deterministic and keeps samples apart; no rules needed.
    inputs : torch.Tensor
        Points to start from, (batch, \*shape), on the device of the module. Data is better than
        noise if the constant on data matters.
    p : float
        1, 2 or :data:`math.inf`.
    radius : float
        Length of the first chords in the :math:`\ell_p` norm, in units of the inputs.
    steps : int
        Steps of Adam in the climb.
    seed : int
        Seed of the first directions.
    output : str or int, optional
        Which tensor is meant, if the network returns a dict or a tuple.

    Returns
    -------
    Bound
        Of kind ``"lower bound"``; ``witness`` is the pair, float64, without batch dimension.

    Raises
    ------
    TypeError
        If ``inputs`` is not a real floating-point tensor.
    ValueError
        If ``inputs`` is empty or not finite, ``radius`` or ``steps`` is out of range, or the module
        is random or lets samples mix (dropout, batch norm in training mode).

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> layer = nn.Linear(4, 3)
    >>> below = lipschitz_lower_bound(layer, torch.zeros(1, 4), steps=5)
    >>> above = lipschitz_bound(layer, (4,))
    >>> bool(0.999999 * above.value < below.value <= above.value)
    True
    """
    p = _exponent(p)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TypeError(f"inputs must be a floating-point tensor, got {_got(inputs)}")
    if inputs.dim() < 2 or inputs.numel() == 0 or not inputs.isfinite().all():
        raise ValueError(
            "inputs must be finite and not empty, of shape (batch, *shape), got shape "
            f"{tuple(inputs.shape)}"
        )
    _real("radius", radius)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    if not (isinstance(steps, int) and steps >= 0):
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    x = inputs.detach().clone().double()
    module = opened(_plain_copy(unwrapped(module))).double().requires_grad_(False)
    if output is not None:
        module = _Chosen(module, output)
    twice = [module(torch.cat([x, other]))[: len(x)] for other in (x, 1 - x)]
    if not torch.allclose(twice[0], twice[1], rtol=1e-6, equal_nan=True):
        raise ValueError("module must be deterministic and keep samples apart: call .eval()")

    generator = torch.Generator(x.device).manual_seed(seed)
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    direction = _turn(module, x, start, p, radius)
    short = _chord(x, direction, 1e-4 * radius)
    steep = _halve(module, _climb(module, _chord(x, direction, radius), p, radius, steps), p)
    middle = steep.mean(0)
    turned = _chord(middle, _turn(module, middle, steep[1] - steep[0], p, radius), 1e-4 * radius)
    chords = torch.cat([short, steep, turned], dim=1)  # (2, 3 batch, *shape)
    values = _slope(module, chords, p) - _rounding(module, chords, p)
    best = torch.where(values.isfinite(), values, 0.0).argmax()
    return Bound(
        max(values[best].item(), 0.0),
        "lower bound",
        p,
        name=type(module).__name__,
        input_shape=tuple(x.shape[1:]),
        output_shape=tuple(module(x[:1]).shape[1:]),
        witness=(chords[0, best], chords[1, best]),
    )


class _Chosen(nn.Module):
    """One tensor of the outputs of a network."""

    def __init__(self, module: nn.Module, output: str | int) -> None:
        super().__init__()
        self.module, self.output = module, output

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[self.output]


# A bundle of chords is one tensor (2, batch, *shape): the two ends of each.


def _chord(middle: Tensor, direction: Tensor, length: float) -> Tensor:
    return torch.stack([middle - length / 2 * direction, middle + length / 2 * direction])


def _norms(difference: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(difference.flatten(1), p, dim=1)


def _rise(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    """Distance of the images of the ends, (batch,)."""
    outputs = module(chords.flatten(0, 1).clone())  # a first layer may work in place
    return _norms(outputs[chords.shape[1] :] - outputs[: chords.shape[1]], p)


def _slope(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    return _rise(module, chords, p) / _norms(chords[1] - chords[0], p).clamp(min=1e-300)


def _rounding(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    """Bound what float64 may have added to the slope, judged by the error of float32."""
    points = chords.flatten(0, 1)
    outputs = module(points.clone())
    in_float32 = copy.deepcopy(module).float()(points.float()).double()
    errors = 2**-26 * _norms(in_float32 - outputs, p) + 2**-50 * _norms(outputs, p)
    error = torch.nan_to_num(errors, nan=math.inf).max()  # of all, lest the luckiest chord win
    run = _norms(chords[1] - chords[0], p).clamp(min=1e-300)
    entries = chords[0, 0].numel() + outputs[0].numel()
    return 2 * error / run + 2**-50 * entries * _slope(module, chords, p)


def _turn(module: nn.Module, middle: Tensor, direction: Tensor, p: float, radius: float) -> Tensor:
    """Power method on a short chord: 20 times the unit vector that increases its rise most."""
    direction = _steepest(direction, direction, p)
    for _ in range(20):
        direction.requires_grad_()
        rise = _rise(module, _chord(middle, direction, 1e-4 * radius), p).sum()
        (gradient,) = torch.autograd.grad(rise, direction)
        direction = _steepest(gradient, direction.detach(), p)
    return direction


def _steepest(gradient: Tensor, otherwise: Tensor, p: float) -> Tensor:
    """Maximise the inner product with ``gradient`` over the unit ball of the p-norm."""
    flat = gradient.flatten(1)
    if p == 2:
        unit = functional.normalize(flat, dim=1, eps=1e-300)
    elif p == math.inf:
        unit = flat.sign()
    else:
        unit = functional.one_hot(flat.abs().argmax(1), flat.shape[1]) * flat.sign()
    stuck = (flat == 0).all(1, keepdim=True)
    return torch.where(stuck, otherwise.flatten(1), unit).view_as(gradient)


def _climb(module: nn.Module, chords: Tensor, p: float, radius: float, steps: int) -> Tensor:
    """Ascend by Adam; torch.optim would import the compiler on first use, for seconds."""
    rate = radius / 20 / chords[0, 0].numel() ** (1 / p)  # a step moves an end by radius / 20
    best, record = chords, torch.zeros(chords.shape[1]).to(chords)
    mean, square = torch.zeros_like(chords), torch.zeros_like(chords)
    for step in range(1, steps + 2):
        chords = chords.detach().requires_grad_()
        slope = _slope(module, chords, p)
        best = torch.where(_columns(slope > record, chords), chords, best).detach()
        record = torch.maximum(record, slope).detach()
        (gradient,) = torch.autograd.grad(slope.sum(), chords)
        mean = mean.lerp(gradient, 0.1)
        square = square.lerp(gradient**2, 0.001)
        chords = chords + rate * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
    return best


def _halve(module: nn.Module, chords: Tensor, p: float) -> Tensor:
    for _ in range(10):
        middle = chords.mean(0)
        left, right = torch.stack([chords[0], middle]), torch.stack([middle, chords[1]])
        wins = _slope(module, right, p) > _slope(module, left, p)
        chords = torch.where(_columns(wins, chords), right, left)
    return chords


def _columns(mask: Tensor, chords: Tensor) -> Tensor:
    return mask.view(1, -1, *[1] * (chords.dim() - 2))
