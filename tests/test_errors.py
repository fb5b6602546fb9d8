"""The catalogue of errors: every public function meets every kind of bad input.

A row names a function of the library, the kind of each argument, and a good value. Each kind has
its bad values: of another type, shape, dtype, sign, not a number, or an unknown name. Called with
one of them, the function raises TypeError or ValueError whose message names the argument; or the
row says that the value is good, and then the call must succeed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lipbook
from lipbook import (
    activations,
    attacks,
    attention,
    composition,
    conversion,
    convolutions,
    distances,
    export,
    generalization,
    graphs,
    interpretability,
    jacobians,
    losses,
    normalization,
    norms,
    orthogonal,
    pooling,
    residual,
    robustness,
    rounding,
    sequences,
    tightness,
    wasserstein,
)
from lipbook.layers.joins import Concatenate

NAN, INF = math.nan, math.inf

# What each kind of argument refuses. A function of the good value, or the bad value itself.
BAD: dict[str, dict[str, Any]] = {
    "group": {"name": "gloo", "number": 0, "list": [0, 1]},
    "tensor": {
        "list": lambda good: good.tolist(),
        "array": lambda good: good.numpy(),
        "none": None,
        "integers": lambda good: torch.ones_like(good, dtype=torch.int64),
        "NaN": lambda good: torch.full_like(good, NAN),
        "infinity": lambda good: torch.full_like(good, INF),
        "number": lambda good: torch.ones(()),
        "empty": lambda good: good[:0],
    },
    "point": {  # whose shape only the network knows
        "list": lambda good: good.tolist(),
        "array": lambda good: good.numpy(),
        "none": None,
        "integers": lambda good: torch.ones_like(good, dtype=torch.int64),
        "NaN": lambda good: torch.full_like(good, NAN),
    },
    "raw": {  # of a layer in training: NaN comes out as NaN
        "list": lambda good: good.tolist(),
        "array": lambda good: good.numpy(),
        "none": None,
        "integers": lambda good: torch.ones_like(good, dtype=torch.int64),
        "number": lambda good: torch.ones(()),
    },
    "labels": {
        "list": lambda good: good.tolist(),
        "array": lambda good: good.numpy(),
        "floats": lambda good: good.double() + 0.5,
        "too many": lambda good: torch.cat([good, good]),
        "no class": lambda good: good + 50,
    },
    "positive": {"string": "1", "none": None, "negative": -1.0, "NaN": NAN, "infinity": INF},
    "not negative": {"string": "1", "none": None, "negative": -1.0, "NaN": NAN},
    "exponent": {"string": "2", "none": None, "below": 0.5, "NaN": NAN, "negative": -2},
    "share": {"string": "0.5", "none": None, "negative": -0.5, "NaN": NAN, "two": 2.0},
    "count": {"string": "3", "none": None, "negative": -1, "zero": 0, "fraction": 1.5},
    "size": {"string": "3", "none": None, "negative": -1, "zero": 0, "fraction": 1.5},
    "choice": {"unknown": "nothing", "number": 3, "none": None, "list": ["nothing"], "case": "QR "},
    "module": {
        "none": None,
        "number": 3,
        "string": "net",
        "class": nn.Linear,
        "tensor": torch.eye(2),
    },
    "function": {"none": None, "number": 3, "string": "net", "tensor": torch.eye(2), "list": [3]},
    "shape": {"number": 4, "string": "4", "negative": (-1,), "fraction": (1.5,), "none": None},
    "loader": {
        "none": None,
        "tensor": torch.zeros(2, 4),
        "empty": [],
        "one pair": (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)),
        "triple": [(torch.zeros(2, 4),) * 3],
        "dictionary": [{"x": torch.zeros(2, 4)}],
        "arrays": [(np.zeros((2, 4), np.float32), np.zeros(2, int))],
        "pixels": [(torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))],
    },
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A function, (kind, good value) of each argument that is checked, and its other arguments."""

    call: Callable[..., Any]
    checked: dict[str, tuple[str, Any]]
    others: dict[str, Any]
    fine: frozenset[tuple[str, str]]  # (argument, bad value) that this function takes
    words: dict[str, str]  # what a message may say in the place of the argument


def row(
    call: Callable[..., Any],
    fine: str = "",
    words: dict[str, str] | None = None,
    others: dict[str, Any] | None = None,
    **checked: tuple[str, Any],
) -> Row:
    pairs = (text.split(": ") for text in fine.split("; ") if text)
    accepted = frozenset((name, bad) for name, bads in pairs for bad in bads.split(", "))
    return Row(call, checked, others or {}, accepted, words or {})


def tensor(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)


def with_first(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Pass the only argument by its place, to functions that take no keyword."""

    def call(**arguments: Any) -> Any:
        (value,) = arguments.values()
        return function(value)

    return call


def registered(constraint: nn.Module) -> nn.Module:
    """A parametrization in its place, where it learns what it starts from."""
    parametrize.register_parametrization(nn.Linear(4, 3), "weight", constraint)
    return constraint


NET = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.5), nn.Linear(3, 2)).eval()
CRITIC = nn.Linear(2, 1)
X, Y = tensor(5, 4), torch.tensor([0, 1, 0, 1, 0])
LOADER = ("loader", [(X, Y)])
MODULE, SHAPE = ("module", NET), ("shape", (4,))
TWO = ("exponent", 2)
MATRIX, IMAGE = ("tensor", tensor(3, 4)), ("raw", tensor(2, 4, 4, 4))
RAW = ("raw", tensor(3, 4))
KERNEL = ("tensor", tensor(4, 4, 3, 3))
MOVED = {"stride": ("size", 1), "padding": ("not negative", 0)}
CLOUD = ("tensor", tensor(5, 2))

SIZES = {"in_channels": ("size", 4), "out_channels": ("size", 4), "kernel_size": ("size", 3)}
WEIGHT = {
    "weight": KERNEL,
    "input_size": ("size", 6),
    "stride": ("size", 1),
    "dilation": ("size", 1),
}
PLAIN = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).eval()
COMPLEXITY = generalization.spectral_complexity(PLAIN, (4,))

TABLE: dict[str, Row] = {
    # activations
    "activations.group_sort": row(
        activations.group_sort, x=RAW, group_size=("count", 2), fine="x: integers"
    ),
    "activations.max_min": row(
        activations.max_min,
        x=RAW,
        pairing=("choice", "halves"),
        dim=("choice", 1),
        fine="x: integers",
    ),
    "activations.full_sort": row(activations.full_sort, x=RAW, fine="x: integers"),
    "activations.householder": row(
        activations.householder,
        x=RAW,
        angle=("raw", tensor(2)),
        pairing=("choice", "halves"),
        fine="x: integers",
    ),
    "activations.householder_order_2": row(
        activations.householder_order_2,
        x=RAW,
        angles=("raw", tensor(3, 2)),
        pairing=("choice", "halves"),
        fine="x: integers",
    ),
    "activations.n_activation": row(
        activations.n_activation, x=RAW, kinks=("raw", tensor(2, 4)), fine="x: integers"
    ),
    "activations.absolute_value": row(
        activations.absolute_value, x=RAW, fine="x: integers, number"
    ),
    "activations.GroupSort": row(activations.GroupSort, group_size=("count", 2)),
    "activations.MaxMin": row(activations.MaxMin, pairing=("choice", "halves")),
    "activations.FullSort": row(activations.FullSort(), x=RAW, fine="x: integers"),
    "activations.Householder": row(activations.Householder, channels=("count", 4)),
    "activations.HouseholderOrder2": row(
        activations.HouseholderOrder2, channels=("count", 4), pairing=("choice", "halves")
    ),
    "activations.NActivation": row(activations.NActivation, channels=("count", 4)),
    "activations.AbsoluteValue": row(
        activations.AbsoluteValue(), x=RAW, fine="x: integers, number"
    ),
    "activations.smooth_absolute_value": row(
        activations.smooth_absolute_value, x=RAW, delta=("positive", 0.1), fine="x: number"
    ),
    "activations.SmoothAbsoluteValue": row(
        activations.SmoothAbsoluteValue, delta=("positive", 0.1)
    ),
    # attacks
    "attacks.fgsm": row(
        attacks.fgsm,
        model=MODULE,
        inputs=("tensor", X),
        labels=("labels", Y),
        radius=("not negative", 1.0),
        p=TWO,
    ),
    "attacks.pgd": row(
        attacks.pgd,
        model=MODULE,
        inputs=("tensor", X),
        labels=("labels", Y),
        radius=("not negative", 1.0),
        p=TWO,
        steps=("count", 2),
        restarts=("count", 1),
    ),
    "attacks.decision_attack": row(
        attacks.decision_attack,
        model=MODULE,
        inputs=("tensor", X),
        labels=("labels", Y),
        steps=("count", 1),
        queries=("count", 2),
        fine="steps: zero",
    ),
    "attacks.attacked_accuracy": row(
        attacks.attacked_accuracy,
        model=MODULE,
        words={"loader": "loader or inputs"},
        loader=LOADER,
        radius=("not negative", 1.0),
        confidence=("share", 0.9),
    ),
    # composition
    "composition.Ball": row(
        composition.Ball,
        center=("tensor", tensor(4)),
        radius=("not negative", 1.0),
        p=TWO,
        fine="center: list, array, integers, number, empty",
    ),
    "composition.Box": row(
        composition.Box, low=("positive", 1.0), high=("positive", 2.0), fine="low: negative"
    ),
    "composition.Residual": row(composition.Residual, branch=MODULE),
    "composition.Sum": row(with_first(composition.Sum), branches=MODULE),
    "composition.check_layer": row(
        composition.check_layer, layer=MODULE, input_shape=SHAPE, samples=("count", 2)
    ),
    **{
        f"composition.{name}": row(
            getattr(composition, name), layer=("module", nn.Linear(4, 3)), input_shape=SHAPE
        )
        for name in ("layer_singular_values", "stable_rank")
    },
    "composition.lipschitz_bound": row(
        composition.lipschitz_bound,
        module=MODULE,
        input_shape=SHAPE,
        p=TWO,
        method=("choice", "product"),
    ),
    "composition.lipschitz_lower_bound": row(
        composition.lipschitz_lower_bound,
        module=MODULE,
        inputs=("tensor", X),
        p=TWO,
        radius=("positive", 1.0),
        steps=("count", 1),
        fine="steps: zero",
    ),
    # convolutions
    "convolutions.block_convolution": row(
        convolutions.block_convolution,
        outer=("raw", tensor(4, 4, 2)),
        inner=("raw", tensor(4, 4, 2)),
        groups=("count", 1),
    ),
    "convolutions.bcop_kernel": row(
        convolutions.bcop_kernel,
        seed=("raw", tensor(1, 4, 4)),
        projectors=("raw", tensor(4, 1, 4, 2)),
        kernel_size=("choice", (3, 3)),
    ),
    "convolutions.rko_kernel": row(
        convolutions.rko_kernel, weight=("raw", KERNEL[1]), stride=("size", 1), groups=("count", 1)
    ),
    "convolutions.aol_kernel": row(
        convolutions.aol_kernel,
        weight=("raw", KERNEL[1]),
        stride=("size", 1),
        groups=("count", 1),
        steps=("count", 1),
    ),
    "convolutions.kernel_norm_bound": row(
        convolutions.kernel_norm_bound,
        kernel=("raw", KERNEL[1]),
        squarings=("count", 4),
        fine="squarings: zero",
    ),
    "convolutions.skew_kernel": row(
        convolutions.skew_kernel, weight=("raw", KERNEL[1]), groups=("count", 1)
    ),
    "convolutions.skew_exponential": row(
        convolutions.skew_exponential,
        x=IMAGE,
        kernel=("raw", KERNEL[1]),
        terms=("count", 4),
        groups=("count", 1),
    ),
    "convolutions.cayley_kernel": row(
        convolutions.cayley_kernel, weight=("raw", KERNEL[1]), image_size=("size", 4)
    ),
    "convolutions.circular_pad": row(
        convolutions.circular_pad, x=IMAGE, others={"pads": [(1, 1), (1, 1)]}, fine="x: integers"
    ),
    "convolutions.circular_fold": row(
        convolutions.circular_fold, x=IMAGE, others={"pads": [(1, 1), (1, 1)]}, fine="x: integers"
    ),
    "convolutions.orthogonal_": row(convolutions.orthogonal_, layer=("module", nn.Conv2d(4, 4, 3))),
    "convolutions.identity_": row(convolutions.identity_, layer=("module", nn.Conv2d(4, 4, 3))),
    "convolutions.BCOP": row(
        lambda groups, rank: convolutions.BCOP((4, 4, 3, 3), groups=groups, rank=rank),
        groups=("count", 1),
        rank=("count", 2),
        fine="rank: none, zero",
    ),
    "convolutions.RKO": row(convolutions.RKO(), weight=("raw", KERNEL[1])),
    "convolutions.AOL": row(convolutions.AOL(), weight=("raw", KERNEL[1])),
    "convolutions.SOC": row(convolutions.SOC(), weight=("raw", KERNEL[1])),
    "convolutions.CayleyKernel": row(convolutions.CayleyKernel((4, 4)), weight=("raw", KERNEL[1])),
    **{
        f"convolutions.{name}": row(
            getattr(convolutions, name),
            **SIZES,
            stride=("size", 1),
            groups=("size", 1),
            padding_mode=("choice", "circular"),
            method=("choice", method),
            padding=("choice", "same"),
        )
        for start, method in (
            ("OrthogonalConv", "bcop"),
            ("OrthogonalConvTranspose", "bcop"),
            ("NonexpansiveConv", "aol"),
            ("NonexpansiveConvTranspose", "aol"),
        )
        for name in (f"{start}{dims}d" for dims in (1, 2, 3))
    },
    **{
        f"convolutions.{name}": row(
            getattr(convolutions, name),
            **SIZES,
            stride=("size", 1),
            terms=("count", 4),
            groups=("size", 1),
        )
        for name in ("SkewOrthogonalConv2d", "SkewOrthogonalConvTranspose2d")
    },
    "convolutions.block_reflector_kernel": row(
        convolutions.block_reflector_kernel, weight=("raw", KERNEL[1]), image_size=("size", 4)
    ),
    "convolutions.BlockReflectorKernel": row(
        convolutions.BlockReflectorKernel((4, 4), 3, 2), weight=("raw", KERNEL[1])
    ),
    "convolutions.BlockReflectorConv2d": row(
        convolutions.BlockReflectorConv2d,
        **SIZES,
        stride=("size", 1),
        image_size=("size", 4),
        rank=("count", 1),
        fine="rank: none",
    ),
    "convolutions.CayleyConv2d": row(
        convolutions.CayleyConv2d, **SIZES, stride=("size", 1), image_size=("size", 4)
    ),
    "convolutions.channel_shift": row(
        convolutions.channel_shift,
        x=IMAGE,
        others={"offsets": [(0, 1), (1, 0)]},
        fine="x: integers",
    ),
    "convolutions.ShiftConv2d": row(
        lambda in_channels, out_channels, stride, method: convolutions.ShiftConv2d(
            in_channels, out_channels, stride, [(0, 1)], method=method
        ),
        in_channels=("size", 4),
        out_channels=("size", 4),
        stride=("size", 1),
        method=("choice", "qr"),
    ),
    # export
    "export.freeze": row(export.freeze, model=MODULE),
    "export.save_weights": row(export.save_weights, model=MODULE, others={"path": "never"}),
    "export.load_weights": row(export.load_weights, model=MODULE, others={"path": "never"}),
    "export.export_onnx": row(
        export.export_onnx, model=MODULE, input_shape=SHAPE, others={"path": "never"}
    ),
    # generalization
    "generalization.data_norm": row(generalization.data_norm, inputs=("tensor", X)),
    "generalization.margin_loss": row(
        generalization.margin_loss,
        margins=("tensor", tensor(5)),
        gamma=("positive", 1.0),
        fine="gamma: negative, infinity",
    ),
    "generalization.margins": row(
        generalization.margins, logits=("tensor", tensor(5, 2)), labels=("labels", Y)
    ),
    "generalization.normalized_margins": row(
        generalization.normalized_margins,
        logits=("tensor", tensor(5, 2)),
        labels=("labels", Y),
        data_norm=("positive", 1.0),
        complexity=("choice", COMPLEXITY),
    ),
    "generalization.pac_bayes_term": row(
        generalization.pac_bayes_term,
        complexity=("choice", COMPLEXITY),
        radius=("positive", 1.0),
        gamma=("positive", 1.0),
        n=("count", 10),
    ),
    "generalization.spectral_complexity": row(
        generalization.spectral_complexity, module=("module", PLAIN), input_shape=SHAPE
    ),
    "generalization.spectrally_normalized_margin_bound": row(
        generalization.spectrally_normalized_margin_bound,
        margins=("tensor", tensor(5)),
        complexity=("choice", COMPLEXITY),
        data_norm=("positive", 1.0),
        gamma=("positive", 1.0),
        delta=("share", 0.05),
        fine="gamma: none",
    ),
    "graphs.trace": row(graphs.trace, module=MODULE, input_shape=SHAPE),
    # interpretability
    "interpretability.alignment": row(
        interpretability.alignment, inputs=("tensor", X), gradient=("tensor", X.clone())
    ),
    "interpretability.counterfactual": row(
        interpretability.counterfactual,
        model=MODULE,
        inputs=("tensor", X),
        labels=("labels", Y),
        lipschitz=("positive", 1.0),
    ),
    "interpretability.margin_gradient": row(
        interpretability.margin_gradient, model=MODULE, inputs=("tensor", X), labels=("labels", Y)
    ),
    "interpretability.sparsity": row(interpretability.sparsity, gradient=("tensor", X)),
    "interpretability.stability": row(
        interpretability.stability,
        model=MODULE,
        inputs=("tensor", X),
        radius=("positive", 1.0),
        samples=("count", 2),
    ),
    # jacobians
    "jacobians.jacobian": row(
        jacobians.jacobian,
        module=("function", NET),
        inputs=("tensor", X),
        chunk_size=("count", 2),
        fine="chunk_size: none",
    ),
    "jacobians.jvp": row(
        jacobians.jvp,
        module=("function", NET),
        inputs=("tensor", X),
        tangents=("tensor", X.clone()),
    ),
    "jacobians.vjp": row(
        jacobians.vjp,
        module=("function", NET),
        inputs=("tensor", X),
        cotangents=("tensor", tensor(5, 2)),
    ),
    "jacobians.jacobian_operator": row(
        jacobians.jacobian_operator, module=("function", NET), x=("point", X[0])
    ),
    "jacobians.singular_values": row(
        jacobians.singular_values,
        module=("function", NET),
        x=("point", X[0]),
        k=("count", 1),
        which=("choice", "top"),
    ),
    "jacobians.layer_jacobians": row(
        jacobians.layer_jacobians, sequential=MODULE, inputs=("tensor", X)
    ),
    "jacobians.linear_jacobian": row(jacobians.linear_jacobian, weight=MATRIX),
    "jacobians.elementwise_jacobian": row(jacobians.elementwise_jacobian, derivative=("tensor", X)),
    "jacobians.softmax_jacobian": row(jacobians.softmax_jacobian, logits=("tensor", X)),
    "jacobians.residual_jacobian": row(
        jacobians.residual_jacobian, branch_jacobian=("tensor", tensor(5, 4, 4))
    ),
    "jacobians.batch_norm_jacobian": row(
        jacobians.batch_norm_jacobian, inputs=("tensor", X), eps=("positive", 1e-5)
    ),
    "jacobians.convolution_matrix": row(
        jacobians.convolution_matrix, **WEIGHT, padding_mode=("choice", "zeros")
    ),
    # losses
    **{
        f"losses.{name}": row(
            getattr(losses, name),
            **{
                "logits": ("raw", tensor(5, 2)),
                "labels": ("labels", Y),
                "reduction": ("choice", "mean"),
                **numbers,
            },
        )
        for name, numbers in (
            ("multi_margin", {"margin": ("positive", 1.0)}),
            (
                "offset_cross_entropy",
                {"offset": ("not negative", 1.0), "temperature": ("positive", 1.0)},
            ),
            ("certificate_loss", {"weight": ("not negative", 1.0), "p": TWO}),
            (
                "logit_annealing_loss",
                {
                    "offset": ("not negative", 1.0),
                    "temperature": ("positive", 1.0),
                    "beta": ("not negative", 1.0),
                },
            ),
            *(
                (
                    f"{name}_hinge_kr",
                    {
                        "alpha": ("not negative", 1.0),
                        "margin": ("positive", 1.0),
                        "temperature": ("positive", 1.0),
                    },
                )
                for name in ("soft", "log_sum_exp")
            ),
            (
                "emma_loss",
                {
                    "radius": ("positive", 1.0),
                    "temperature": ("positive", 1.0),
                    "lipschitz": ("positive", 1.0),
                    "p": TWO,
                },
            ),
        )
    },
    **{
        f"losses.{name}": row(
            getattr(losses, name),
            words={"outputs": "logits"},
            outputs=("raw", tensor(5, 2)),
            labels=("labels", Y),
            reduction=("choice", "mean"),
            **numbers,
        )
        for name, numbers in (
            ("hinge_kr", {"alpha": ("not negative", 1.0), "margin": ("positive", 1.0)}),
            (
                "offset_binary_cross_entropy",
                {"offset": ("not negative", 1.0), "temperature": ("positive", 1.0)},
            ),
        )
    },
    "losses.margin_for_radius": row(
        losses.margin_for_radius,
        radius=("positive", 1.0),
        lipschitz=("positive", 1.0),
        p=TWO,
    ),
    "losses.MultiMarginLoss": row(
        losses.MultiMarginLoss, margin=("positive", 1.0), reduction=("choice", "mean")
    ),
    "losses.OffsetCrossEntropyLoss": row(
        losses.OffsetCrossEntropyLoss,
        offset=("not negative", 1.0),
        temperature=("positive", 1.0),
        reduction=("choice", "mean"),
    ),
    **{
        f"losses.{name}": row(
            getattr(losses, name),
            alpha=("not negative", 1.0),
            margin=("positive", 1.0),
            temperature=("positive", 1.0),
            reduction=("choice", "mean"),
        )
        for name in ("SoftHingeKRLoss", "LogSumExpHingeKRLoss")
    },
    "losses.EMMALoss": row(
        losses.EMMALoss,
        radius=("positive", 1.0),
        temperature=("positive", 1.0),
        lipschitz=("positive", 1.0),
        p=TWO,
        reduction=("choice", "mean"),
    ),
    "losses.LogitAnnealingLoss": row(
        losses.LogitAnnealingLoss,
        offset=("not negative", 1.0),
        temperature=("positive", 1.0),
        beta=("not negative", 1.0),
        reduction=("choice", "mean"),
    ),
    "losses.OffsetBinaryCrossEntropyLoss": row(
        losses.OffsetBinaryCrossEntropyLoss,
        offset=("not negative", 1.0),
        temperature=("positive", 1.0),
        reduction=("choice", "mean"),
    ),
    "losses.CertificateLoss": row(
        losses.CertificateLoss, weight=("not negative", 1.0), p=TWO, reduction=("choice", "mean")
    ),
    "losses.HingeKRLoss": row(
        losses.HingeKRLoss,
        alpha=("not negative", 1.0),
        margin=("positive", 1.0),
        reduction=("choice", "mean"),
    ),
    # norms
    "norms.dual_exponent": row(norms.dual_exponent, p=TWO),
    "norms.operator_norm": row(norms.operator_norm, matrix=MATRIX, p=TWO),
    "norms.gram_iteration": row(
        norms.gram_iteration, matrix=MATRIX, steps=("count", 2), fine="steps: zero"
    ),
    "norms.power_iteration": row(norms.power_iteration, matrix=MATRIX, steps=("count", 2)),
    "norms.rigorous_matrix_norm": row(norms.rigorous_matrix_norm, matrix=MATRIX, p=TWO),
    **{
        f"norms.{name}": row(getattr(norms, name), **WEIGHT, groups=("count", 1))
        for name in (
            "circular_convolution_singular_values",
            "circular_convolution_norm",
            "circular_convolution_gram_iteration",
        )
    },
    **{
        f"norms.{name}": row(
            getattr(norms, name),
            **WEIGHT,
            groups=("count", 1),
            padding_mode=("choice", "zeros"),
            p=TWO,
            padding=("choice", "same"),
            fine="padding: number",
        )
        for name in (
            "convolution_norm_bound",
            "convolution_norm_is_exact",
            "rigorous_convolution_norm",
        )
    },
    # orthogonal
    **{
        f"orthogonal.{name}": row(getattr(orthogonal, name), matrix=RAW)
        for name in (
            *("bjorck", "polar", "qr", "cholesky_qr", "cayley", "matrix_exp"),
            *("householder_product", "clip_spectral_norm"),
        )
    },
    **{
        f"orthogonal.{name}": row(getattr(orthogonal, name), rows=RAW)
        for name in ("project_l1_ball", "unit_rows")
    },
    **{
        f"orthogonal.{name}": row(
            registered(getattr(orthogonal, name)()),
            words={"matrix": "matrix or rows"},
            **{argument: RAW},
        )
        for name, argument in (
            *((name, "matrix") for name in ("Bjorck", "Polar", "QR", "CholeskyQR")),
            *((name, "matrix") for name in ("Cayley", "MatrixExp", "HouseholderProduct")),
            *((name, "matrix") for name in ("SpectralNorm", "InfinityNorm", "UnitNorm")),
        )
    },
    "orthogonal.block_reflector": row(orthogonal.block_reflector, vectors=("raw", tensor(3, 2))),
    "orthogonal.BlockReflector": row(
        orthogonal.BlockReflector(3, 3), vectors=("raw", tensor(3, 2))
    ),
    "orthogonal.BlockReflectorLinear": row(
        orthogonal.BlockReflectorLinear,
        in_features=("count", 4),
        out_features=("count", 3),
        rank=("count", 1),
        fine="rank: none",
    ),
    "orthogonal.OrthogonalLinear": row(
        orthogonal.OrthogonalLinear,
        in_features=("count", 4),
        out_features=("count", 3),
        method=("choice", "qr"),
    ),
    **{
        f"orthogonal.{name}": row(
            getattr(orthogonal, name), in_features=("count", 4), out_features=("count", 3)
        )
        for name in ("SpectralNormLinear", "InfinityNormLinear", "UnitNormLinear")
    },
    "orthogonal.Scale": row(
        orthogonal.Scale, fine="constant: negative", constant=("positive", 2.0)
    ),
    # distances
    "distances.sorted_distance": row(
        distances.sorted_distance,
        x=RAW,
        weight=("raw", tensor(2, 4)),
        bias=("raw", tensor(2)),
        decay=("share", 0.5),
        fine="bias: none",
    ),
    "distances.InfinityDistance": row(
        distances.InfinityDistance,
        in_features=("count", 3),
        out_features=("count", 2),
        decay=("share", 0.5),
    ),
    # normalization
    "normalization.layer_centering": row(
        normalization.layer_centering,
        x=("raw", tensor(2, 4)),
        dim=("count", 1),
        fine="dim: negative",
    ),
    "normalization.batch_mean": row(normalization.batch_mean, x=("raw", tensor(3, 4))),
    "normalization.pooled_variance": row(
        normalization.pooled_variance, x=("raw", tensor(3, 4)), mean=("raw", tensor(4))
    ),
    "normalization.LayerCentering": row(
        normalization.LayerCentering, dim=("count", 1), fine="dim: negative"
    ),
    "normalization.BatchCentering": row(
        normalization.BatchCentering,
        num_features=("count", 3),
        momentum=("share", 0.1),
        fine="momentum: none",
    ),
    "normalization.ScalarBatchNorm": row(
        normalization.ScalarBatchNorm,
        num_features=("count", 3),
        eps=("positive", 1e-5),
        momentum=("share", 0.1),
        fine="momentum: none",
    ),
    "normalization.Unscale": row(
        with_first(normalization.Unscale),
        norms=("module", normalization.ScalarBatchNorm(3)),
    ),
    "normalization.ScaleAndBias": row(
        normalization.ScaleAndBias,
        num_features=("count", 3),
        scale=("positive", 2.0),
        fine="scale: negative",
    ),
    # pooling
    **{
        f"pooling.{name}": row(
            getattr(pooling, name),
            x=IMAGE,
            window=("size", 2),
            **(MOVED if name in ("average_pooling", "norm_pooling") else {}),
            fine="; ".join(
                (["x: integers"] if name != "norm_pooling" else [])
                + (["stride: none"] if name in ("average_pooling", "norm_pooling") else [])
            ),
        )
        for name in (
            *("average_pooling", "invertible_downsampling", "invertible_upsampling"),
            *("norm_pooling", "upsampling"),
        )
    },
    **{
        f"pooling.{name}": row(
            getattr(pooling, name),
            window=("size", 2),
            **(MOVED if name in ("AveragePooling", "NormPooling") else {}),
            fine="stride: none" if name in ("AveragePooling", "NormPooling") else "",
        )
        for name in (
            *("AveragePooling", "InvertibleDownsampling", "InvertibleUpsampling"),
            *("NormPooling", "Upsampling"),
        )
    },
    # residual
    **{
        f"residual.{name}": row(
            getattr(residual, name), features=("count", 4), activation=("choice", "relu")
        )
        for name in ("SLLLinear", "CPLLinear")
    },
    **{
        f"residual.{name}": row(
            getattr(residual, name),
            channels=("count", 4),
            kernel_size=("count", 3),
            activation=("choice", "relu"),
            padding_mode=("choice", "circular"),
            stride=("count", 1),
            groups=("count", 1),
        )
        for name in ("SLLConv2d", "CPLConv2d")
    },
    "residual.SandwichLinear": row(
        residual.SandwichLinear,
        in_features=("count", 4),
        out_features=("count", 4),
        activation=("choice", "relu"),
    ),
    "residual.SandwichConv2d": row(
        residual.SandwichConv2d,
        **SIZES,
        stride=("size", 1),
        image_size=("size", 4),
        activation=("choice", "relu"),
    ),
    "residual.AverageResidual": row(
        residual.AverageResidual,
        others={"branch": nn.Identity()},
        shortcut=("module", nn.Identity()),
        weight=("positive", 0.5),
        fine="shortcut: none",
    ),
    "residual.NormResidual": row(
        residual.NormResidual,
        others={"branch": nn.Identity()},
        shortcut=("module", nn.Identity()),
        weight=("positive", 0.5),
        eps=("not negative", 0.1),
        fine="shortcut: none",
    ),
    "residual.ConcatenatedResidual": row(
        residual.ConcatenatedResidual,
        others={"branch": nn.Identity()},
        shortcut=("module", nn.Identity()),
        angle=("positive", 0.5),
        fine="shortcut: none; angle: negative",
    ),
    "residual.OrthogonalResidual": row(
        residual.OrthogonalResidual,
        branch=("module", nn.Identity()),
        angle=("positive", 0.5),
        fine="angle: negative",
    ),
    "residual.cpl_scale": row(
        residual.cpl_scale, weight=RAW, stride=("count", 1), groups=("count", 1)
    ),
    "residual.sll_scale": row(
        residual.sll_scale,
        weight=RAW,
        log_q=("raw", tensor(3)),
        stride=("count", 1),
        groups=("count", 1),
    ),
    # conversion
    "conversion.lipschitz_network": row(
        conversion.lipschitz_network,
        model=MODULE,
        input_shape=SHAPE,
        lipschitz=("positive", 2.0),
        activation=("choice", "max_min"),
        fine="",
    ),
    "conversion.Average": row(
        lambda weight: conversion.Average([weight, 0.5]),
        words={"weight": "weights"},
        weight=("positive", 0.5),
        fine="weight: negative",
    ),
    "conversion.Offset": row(conversion.Offset, value=("raw", tensor(3)), fine="value: number"),
    "conversion.ScaledJoin": row(
        conversion.ScaledJoin,
        join=("module", Concatenate(1)),
        factor=("positive", 0.5),
        fine="factor: negative",
    ),
    "conversion.GraphNetwork": row(
        lambda layer: conversion.GraphNetwork({"a": layer}, [("a", (0,))]),
        words={"layer": "layers"},
        layer=("module", nn.Identity()),
    ),
    # attention
    "attention.BallProjection": row(attention.BallProjection, radius=("positive", 2.0)),
    "attention.EnergyAttention": row(
        attention.EnergyAttention,
        embed_dim=("count", 4),
        num_heads=("count", 2),
        head_dim=("count", 3),
        fine="head_dim: none",
    ),
    "attention.L2MultiheadAttention": row(
        attention.L2MultiheadAttention,
        embed_dim=("count", 4),
        num_heads=("count", 2),
        head_dim=("count", 3),
        fine="head_dim: none",
    ),
    "attention.attention_energy": row(
        attention.attention_energy,
        x=("raw", tensor(2, 3, 4)),
        query_weight=("raw", tensor(2, 3, 4)),
        key_weight=("raw", tensor(2, 3, 4)),
    ),
    "attention.ball_projection": row(
        attention.ball_projection,
        x=("raw", tensor(2, 3, 4)),
        radius=("positive", 2.0),
    ),
    "attention.energy_attention": row(
        attention.energy_attention,
        x=("raw", tensor(2, 3, 4)),
        query_weight=("raw", tensor(2, 3, 4)),
        key_weight=("raw", tensor(2, 3, 4)),
    ),
    "attention.l2_attention": row(
        attention.l2_attention,
        x=("raw", tensor(2, 3, 4)),
        query_weight=("raw", tensor(2, 3, 4)),
        value_weight=("raw", tensor(2, 3, 4)),
    ),
    "attention.l2_attention_bound": row(
        attention.l2_attention_bound,
        query_weight=("raw", tensor(2, 3, 4)),
        value_weight=("raw", tensor(2, 3, 4)),
        out_weight=("raw", tensor(4, 6)),
        tokens=("count", 5),
    ),
    "attention.energy_curvature": row(
        attention.energy_curvature,
        query_weight=("raw", tensor(2, 3, 4)),
        key_weight=("raw", tensor(2, 3, 4)),
    ),
    # sequences
    "sequences.LosslessRNN": row(
        sequences.LosslessRNN,
        input_size=("count", 3),
        hidden_size=("count", 5),
        num_layers=("count", 2),
        group_size=("count", 2),
        method=("choice", "qr"),
    ),
    "sequences.CausalOrthogonalConv1d": row(
        sequences.CausalOrthogonalConv1d,
        in_channels=("count", 3),
        out_channels=("count", 4),
        kernel_size=("count", 3),
        dilation=("count", 1),
    ),
    "sequences.lossless_recurrence": row(
        sequences.lossless_recurrence,
        x=("raw", tensor(4, 2, 3)),
        h=("raw", tensor(2, 5)),
        weight=("raw", tensor(8, 8)),
        group_size=("count", 2),
    ),
    # robustness
    "robustness.Certificate": row(
        lambda radius: robustness.Certificate(radius, Y, Y, 2.0, True),
        radius=("tensor", tensor(5).abs()),
        fine="radius: integers, infinity",
    ),
    "robustness.Standardize": row(
        lambda mean, std: robustness.Standardize([mean], [std]),
        fine="mean: negative",
        mean=("positive", 0.5),
        std=("positive", 0.5),
    ),
    "robustness.certified_radius": row(
        robustness.certified_radius,
        logits=("tensor", tensor(5, 2)),
        labels=("labels", Y),
        lipschitz=("positive", 1.0),
        p=TWO,
    ),
    "robustness.certify": row(
        robustness.certify,
        model=MODULE,
        words={"loader": "loader or inputs"},
        loader=LOADER,
        input_shape=SHAPE,
        p=TWO,
        method=("choice", "product"),
        preprocess=("module", robustness.Standardize([0.5] * 4, [0.5] * 4)),
        group=("group", None),
        fine="preprocess: none",
    ),
    "robustness.Certifier": row(
        lambda loader, group, **options: robustness.Certifier(**options)(loader, group),
        model=MODULE,
        words={"loader": "loader or inputs"},
        loader=LOADER,
        input_shape=SHAPE,
        p=TWO,
        method=("choice", "product"),
        preprocess=("module", robustness.Standardize([0.5] * 4, [0.5] * 4)),
        group=("group", None),
        fine="preprocess: none",
    ),
    "robustness.certify_by_smoothing": row(
        robustness.certify_by_smoothing,
        model=MODULE,
        words={"loader": "loader or inputs"},
        loader=LOADER,
        sigma=("positive", 0.5),
        samples=("count", 20),
        selection=("count", 2),
        alpha=("share", 0.01),
        batch_size=("count", 50),
    ),
    "robustness.smoothed_radius": row(
        robustness.smoothed_radius,
        successes=("count", 9),
        trials=("count", 10),
        sigma=("positive", 0.5),
        alpha=("share", 0.01),
        fine="successes: zero",
    ),
    "robustness.wilson_interval": row(
        robustness.wilson_interval,
        successes=("count", 9),
        trials=("count", 10),
        confidence=("share", 0.9),
        fine="successes: zero",
    ),
    # rounding
    "rounding.forward_error": row(
        rounding.forward_error, module=MODULE, inputs=("tensor", X), p=TWO
    ),
    # tightness
    **{
        f"tightness.{name}": row(getattr(tightness, name), module=MODULE, input_shape=SHAPE, p=TWO)
        for name in (
            *("absolute_bound", "averaged_bound", "seqlip_bound", "lipsdp_bound"),
            *("lipsdp_layer_bound", "eclipse_bound", "exact_constant"),
        )
    },
    "tightness.local_lipschitz_bound": row(
        tightness.local_lipschitz_bound,
        module=MODULE,
        center=("tensor", X[0]),
        radius=("positive", 1.0),
        p=TWO,
        method=("choice", "interval"),
    ),
    # wasserstein
    "wasserstein.wasserstein1": row(wasserstein.wasserstein1, x=CLOUD, y=CLOUD),
    "wasserstein.c_transform": row(
        wasserstein.c_transform,
        potential=("tensor", tensor(5)),
        points=CLOUD,
        at=CLOUD,
        fine="potential: integers",
    ),
    "wasserstein.wasserstein1_bracket": row(
        wasserstein.wasserstein1_bracket,
        x=CLOUD,
        y=CLOUD,
        method=("choice", "auto"),
        tolerance=("positive", 0.1),
        sweeps=("count", 2),
        group=("group", None),
        fine="sweeps: zero",
    ),
    "wasserstein.critic_difference": row(
        wasserstein.critic_difference, critic=("function", CRITIC), x=CLOUD, y=CLOUD
    ),
    "wasserstein.kantorovich_dual": row(
        wasserstein.kantorovich_dual,
        critic=("function", CRITIC),
        x=CLOUD,
        y=CLOUD,
        lipschitz=("positive", 1.0),
        fine="lipschitz: none",
    ),
    "wasserstein.gradient_penalty": row(
        wasserstein.gradient_penalty,
        critic=("function", CRITIC),
        x=CLOUD,
        y=CLOUD,
        weight=("not negative", 10.0),
        fine="x: NaN, infinity; y: NaN, infinity",
    ),
    "wasserstein.clip_weights_": row(
        wasserstein.clip_weights_, critic=("module", nn.Linear(2, 1)), limit=("positive", 1.0)
    ),
    "wasserstein.fit_critic": row(
        wasserstein.fit_critic,
        critic=("module", nn.Linear(2, 1)),
        x=CLOUD,
        y=CLOUD,
        steps=("count", 1),
        lr=("positive", 0.1),
        schedule=("choice", "constant"),
        confidence=("share", 0.9),
    ),
    "wasserstein.sliced_wasserstein": row(
        wasserstein.sliced_wasserstein, x=CLOUD, y=CLOUD, projections=("count", 3)
    ),
    "wasserstein.sinkhorn": row(
        wasserstein.sinkhorn,
        x=CLOUD,
        y=CLOUD,
        entropy=("positive", 1.0),
        steps=("count", 100),
        tolerance=("positive", 1e-3),
    ),
}

# What functions return, and the questions of layers, which the library asks with what it checked.
RETURNED = {
    *("composition.Bound", "composition.LayerReport", "robustness.Accuracy"),
    *("conversion.Conversion", "conversion.Replacement"),
    *("generalization.MarginBound", "generalization.SpectralComplexity"),
    *("interpretability.Counterfactual", "graphs.Graph", "graphs.Node", "rounding.ForwardError"),
    *("wasserstein.TransportBracket", "wasserstein.HeldOut", "wasserstein.CriticHistory"),
    *("export.ConvolutionStep", "export.DenseStep", "export.EnergyStep", "export.SandwichStep"),
    *("composition.lipschitz_rule", "export.freeze_rule"),
    "rounding.ieee_cuda",  # has no argument
}
INNER = {"rules", "errors", "units", "freezing", "layers"}  # rooms for those who add layers
SAME = {  # names that stand in two rooms
    "rounding.forward_error_rule": "errors",
    "rounding.range_error_rule": "errors",
    "rounding.cuda_rule": "errors",
    "rounding.rigorous_matrix_norm": "norms.rigorous_matrix_norm",
    "rounding.rigorous_convolution_norm": "norms.rigorous_convolution_norm",
}


def bad_inputs() -> Iterator[tuple[str, str, str]]:
    for name, each in TABLE.items():
        for argument, (kind, _) in each.checked.items():
            for bad in BAD[kind]:
                yield name, argument, bad


def arguments(name: str, **changed: Any) -> dict[str, Any]:
    good = {key: value for key, (_, value) in TABLE[name].checked.items()}
    return {**TABLE[name].others, **good, **changed}


def test_every_public_function_is_in_the_table() -> None:
    rooms = {room.name for room in pkgutil.iter_modules(lipbook.__path__)}
    for room in sorted(rooms - INNER - {"lab", "cli", "__main__", "_extras", "_processes"}):
        module = importlib.import_module(f"lipbook.{room}")
        public = {f"{room}.{name}" for name in module.__all__}
        known = TABLE.keys() | RETURNED | SAME.keys()
        assert public <= known, sorted(public - known)
        assert {name for name in known if name.startswith(f"{room}.")} <= public


@pytest.mark.parametrize("name", TABLE)
def test_good_arguments_are_good(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an error below could have another reason."""
    monkeypatch.chdir(tmp_path)
    if name == "export.load_weights":
        export.save_weights(NET, "never")
    TABLE[name].call(**arguments(name))


@pytest.mark.parametrize("name", TABLE)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    wrong = []
    for argument, (kind, good) in TABLE[name].checked.items():
        for bad, made in BAD[kind].items():
            value = made(good) if inspect.isfunction(made) else made
            fine = (argument, bad) in TABLE[name].fine
            try:
                TABLE[name].call(**arguments(name, **{argument: value}))
            except (TypeError, ValueError) as error:
                words = TABLE[name].words.get(argument, argument).split(" or ")
                demand = str(error).split(" got ")[0]
                if fine or not any(word in demand for word in words):
                    wrong.append(f"{argument}, {bad}: {type(error).__name__}: {error}")
            except Exception as error:
                wrong.append(f"{argument}, {bad}: {type(error).__name__}: {error}")
            else:
                if not fine:
                    wrong.append(f"{argument}, {bad}: accepted")
    assert not wrong, "\n".join(wrong)


def test_the_table_is_wide() -> None:
    kinds = dict.fromkeys(TABLE, 0)
    for name, _, _ in bad_inputs():
        kinds[name] += 1
    assert min(kinds.values()) >= 5, min(kinds, key=kinds.__getitem__)
    assert sum(kinds.values()) > 1500
