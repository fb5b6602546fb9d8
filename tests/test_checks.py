"""check_layer: right answers pass, and for each question a wrong one is shown by points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipbook.activations import GroupSort, Householder, HouseholderOrder2, MaxMin, NActivation
from lipbook.composition import Ball, Bound, Box, check_layer, lipschitz_rule
from lipbook.errors import ForwardError, forward_error_rule
from lipbook.freezing import freeze_rule
from lipbook.layers.elementwise import Exp, Log, Power, Reciprocal, Sine
from lipbook.rules import Affine, Range, affine_rule, pullback_rule, range_rule, slope_rule
from lipbook.units import Units, elementwise_units, units_rule

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Linear": (nn.Linear(4, 3), (4,)),
    "Linear on rows": (nn.Linear(4, 3), (2, 4)),
    "Conv2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "Conv2d, reflecting": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 1, 3, 2), (2, 3, 3)),
    "BatchNorm2d": (nn.BatchNorm2d(2), (2, 3, 3)),
    "MaxMin": (MaxMin(), (4, 2)),
    "GroupSort": (GroupSort(3, dim=-1), (2, 6)),
    "Householder": (Householder(4), (4,)),
    "HouseholderOrder2": (HouseholderOrder2(4), (4,)),
    "NActivation": (NActivation(4, -1), (2, 4)),
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), (2, 5, 5)),
    "MaxPool1d": (nn.MaxPool1d(2), (2, 6)),
    "AvgPool2d": (nn.AvgPool2d(3, 1, 1), (1, 4, 4)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(2), (1, 5, 5)),
    "Upsample": (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3)),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), (1, 3, 3)),
    "Flatten": (nn.Flatten(), (2, 3)),
    "PixelShuffle": (nn.PixelShuffle(2), (4, 2, 2)),
    "Softmax": (nn.Softmax(1), (4,)),
    "LogSoftmax": (nn.LogSoftmax(-1), (4,)),
    **{
        str(layer): (layer, (3, 2))
        for layer in (
            *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(-0.5), nn.PReLU(3)),
            *(nn.ELU(), nn.ELU(2.0), nn.ELU(-1.0), nn.CELU(0.5), nn.SELU(), nn.GELU()),
            *(nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softsign(), nn.Tanh()),
            *(nn.Sigmoid(), nn.Hardtanh(-0.3, 2), nn.Hardsigmoid(), nn.Hardswish()),
            *(nn.LogSigmoid(), nn.Softshrink(), nn.Tanhshrink(), nn.Threshold(0.3, 0.3)),
            *(Sine(0.0), nn.RReLU(), nn.Dropout()),
        )
    },
}
ON_DOMAINS: dict[str, tuple[nn.Module, tuple[int, ...], Box | Ball]] = {
    "square": (Power(2.0), (3,), Box(-1, 2)),
    "cube": (Power(3.0), (3,), Box(-2, 1)),
    "root": (Power(0.5), (3,), Box(0.1, 2)),
    "inverse root": (Power(-0.5), (3,), Box(0.1, 2)),
    "exp": (Exp(), (3,), Ball(torch.zeros(3), 2.0)),
    "log": (Log(), (3,), Box(0.5, 4)),
    "reciprocal": (Reciprocal(), (3,), Box(0.5, 4)),
    "GLU": (nn.GLU(), (6,), Box(-2, 3)),
    "GELU": (nn.GELU(), (3,), Box(-1, -0.5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_right_answers_pass(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    report = check_layer(layer.eval(), shape)
    assert str(report).startswith("question")
    questions = [row[0] for row in report.rows]
    assert {"range", "frozen copy", "Lipschitz, p = 2"} <= set(questions)


@pytest.mark.parametrize("name", ON_DOMAINS)
def test_right_answers_on_domains_pass(name: str) -> None:
    layer, shape, domain = ON_DOMAINS[name]
    check_layer(layer, shape, domain)


def layer_class(factor: float = 2.0) -> type[nn.Module]:
    """A fresh class, x -> 2 x, so that wrong rules stay with it."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return factor * x

    @lipschitz_rule.register(Twice)
    def _(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
        return Bound(factor, "exact", p)

    return Twice


def two(x: Tensor) -> Tensor:
    return 2 * x


def wrong_stretch(cls: type[nn.Module]) -> None:
    lipschitz_rule.register(cls, lambda module, input_shape, p: Bound(1, "exact", p))


def wrong_at_infinity(cls: type[nn.Module]) -> None:
    lipschitz_rule.register(
        cls, lambda module, input_shape, p: Bound(1 if p == math.inf else 2, "exact", p)
    )


def wrong_range(cls: type[nn.Module]) -> None:
    range_rule.register(cls, lambda module, values: Range(values.low, values.high))


def wrong_ball(cls: type[nn.Module]) -> None:
    def rule(module: nn.Module, values: Range) -> Range:
        return Range(2 * values.low, 2 * values.high, 2 * values.middle, values.radius)

    range_rule.register(cls, rule)


def wrong_slopes(cls: type[nn.Module]) -> None:
    slope_rule.register(cls, lambda module, values: (0.0, 1.0))


def wrong_units(cls: type[nn.Module]) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    units_rule.register(cls, lambda module, shape: Units(0 * ones, ones))


def wrong_pieces(cls: type[nn.Module]) -> None:
    units_rule.register(
        cls, lambda module, shape: elementwise_units(module, shape, [1.0], [2.0, 1.0])
    )


def wrong_matrix(cls: type[nn.Module]) -> None:
    affine_rule.register(
        cls, lambda module, shape: Affine(lambda x: 3 * x, two, two, torch.zeros(shape), 1)
    )


def wrong_magnitude(cls: type[nn.Module]) -> None:
    affine_rule.register(
        cls, lambda module, shape: Affine(two, lambda x: x, lambda x: 4 * x, torch.zeros(shape), 1)
    )


def wrong_squares(cls: type[nn.Module]) -> None:
    affine_rule.register(
        cls, lambda module, shape: Affine(two, two, two, torch.zeros(shape).double(), 1)
    )


def wrong_rows(cls: type[nn.Module]) -> None:
    pullback_rule.register(cls, lambda module, cotangent, values: cotangent)


def wrong_error(cls: type[nn.Module]) -> None:
    def rule(module: nn.Module, example: Tensor, p: float) -> Any:
        def analysis(x: Tensor) -> ForwardError:
            zero = torch.zeros(len(x), dtype=torch.float64)
            return ForwardError(module(x) * (1 + 2.0**-20), 2.0, zero, 0.0, zero + math.inf)

        return analysis

    forward_error_rule.register(cls, rule)


def wrong_copy(cls: type[nn.Module]) -> None:
    freeze_rule.register(cls, lambda module: nn.Identity())


WRONG = {
    "lipschitz_rule of Twice says 1 for p=1": wrong_stretch,
    "lipschitz_rule of Twice says 1 for p=inf": wrong_at_infinity,
    r"range_rule of Twice says \[": wrong_range,
    "range_rule of Twice says a ball": wrong_ball,
    "slope_rule of Twice says": wrong_slopes,
    r"units_rule of Twice says slopes in \[0, 1\]": wrong_units,
    r"units_rule of Twice says \[.*the values are": wrong_pieces,
    r"affine_rule of Twice says A x": wrong_matrix,
    r"affine_rule of Twice says \|A\|": wrong_magnitude,
    "affine_rule of Twice says the squares": wrong_squares,
    "pullback_rule of Twice says": wrong_rows,
    "forward_error_rule of Twice says": wrong_error,
    "freeze_rule of Twice says": wrong_copy,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_answers_are_shown(message: str) -> None:
    cls = layer_class()
    check_layer(cls(), (3,))
    WRONG[message](cls)
    with pytest.raises(ValueError, match=message):
        check_layer(cls(), (3,))


def test_a_wrong_gradient_is_shown() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(x)

    @lipschitz_rule.register(Twice)
    def _(module: Any, input_shape: tuple[int, ...], p: float) -> Bound:
        return Bound(2, "exact", p)

    with pytest.raises(ValueError, match="gradient of Twice"):
        check_layer(Twice(), (3,))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Module, got function"):
        check_layer(two, (3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input_shape must hold"):
        check_layer(nn.ReLU(), ())
    with pytest.raises(ValueError, match="is bounded on a domain, give one"):
        check_layer(Exp(), (3,))
