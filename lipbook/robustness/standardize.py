r"""Standardisation of inputs, as a layer that is part of a bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipbook import errors
from lipbook.errors import Analysis, cuda_rule, forward_error_rule, plain_kernels
from lipbook.norms.arguments import _real
from lipbook.norms.rigorous import _UP
from lipbook.rules import Bound, Shape, lipschitz_rule

__all__ = ["Standardize"]


class Standardize(nn.Module):
    r"""Standardisation of the channels of an image, as the first layer of a network.

    .. math:: x_c \mapsto \frac{x_c - \mu_c}{s_c}

    Its Lipschitz constant is :math:`1 / \min_c s_c` in every norm, and counts: a radius of a
    network that sees standardised images is not a radius in the units of the pixels. As a layer it
    is part of the bound.

    Parameters
    ----------
    mean, std : sequence of float
        :math:`\mu` and :math:`s`, one number a channel.

    Raises
    ------
    ValueError
        If the numbers are not finite, not as many, or ``std`` is not positive.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> lipschitz_bound(Standardize([0.5], [0.25]), (1, 28, 28)).value
    4.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, numbers in (("mean", mean), ("std", std)):
            for number in numbers:
                _real(name, number)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        if self.mean.shape != self.std.shape or self.mean.dim() != 1:
            raise ValueError(f"mean and std must be as many numbers, got {mean} and {std}")
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError(f"mean must be finite and std positive, got {mean} and {std}")

    def forward(self, x: Tensor) -> Tensor:
        """Standardise, (batch, c, *size) to the same."""
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"x must have {len(self.mean)} channels, got shape {tuple(x.shape)}")
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


@lipschitz_rule.register
def _(module: Standardize, input_shape: Shape, p: float) -> Bound:
    return Bound(1 / module.std.double().min().item(), "exact", p)


@forward_error_rule.register
def _(module: Standardize, example: Tensor, p: float) -> Analysis:
    lipschitz = lipschitz_rule(module, tuple(example.shape[1:]), p).value * _UP
    shift = module.mean.double().abs().max().item()  # since x - mean may overflow, undivided
    return lambda x: errors._relative(module, x, p, lipschitz, 2, shift)


cuda_rule.register(Standardize, plain_kernels)
