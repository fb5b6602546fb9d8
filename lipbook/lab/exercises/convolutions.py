"""Exercises of chapter 6, Orthogonal convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipbook.convolutions import bcop_kernel
from lipbook.jacobians import convolution_matrix
from lipbook.lab.exercises.registry import exercise
from lipbook.norms import circular_convolution_singular_values

__all__: list[str] = []  # answers are asked for by their numbers


@exercise(
    "6.1",
    level=1,
    kind="warm-up",
    mistakes={
        "the first tap": [[0.0, 0.0], [1.0, 0.0]],
        "I − P without H": [[0.0, 0.0], [0.0, 1.0]],
        "a turn to the other side": [[0.0, 1.0], [0.0, 0.0]],
    },
)
def second_tap() -> Tensor:
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    raw = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return bcop_kernel(turn[None], raw[None, None], (2,))[0, :, :, 1]


@exercise(
    "6.2",
    level=1,
    kind="warm-up",
    mistakes={
        "the taps": [0.5, 0.25],
        "the squares": [1.0, 0.25, 0.0],
        "also the value that is there twice": [1.0, 0.5, 0.5, 0.0],
    },
)
def blur() -> list[float]:
    taps = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64)
    values = circular_convolution_singular_values(taps, 4).flatten()
    return sorted({round(value, 9) + 0.0 for value in values.tolist()}, reverse=True)


@exercise(
    "6.3",
    level=1,
    kind="derive",
    mistakes={"without the signs": 9, "the signs alone": 2, "all kernels of signs": 2**9},
)
def one_channel() -> int:
    kernels = np.array(list(itertools.product((0, 1, -1), repeat=9))).reshape(-1, 3, 3)
    gains = abs(np.fft.fft2(kernels, (6, 6)))
    return int((abs(gains - 1) < 1e-9).all((1, 2)).sum())


@exercise(
    "6.4",
    level=2,
    kind="change the experiment",
    mistakes={
        "each pair of ranks": [50, 25],
        "three channels": [14, 7],
        "without the degree 0": [16, 8],
    },
)
def components() -> list[int]:
    n, found = 4, set()
    pairs = itertools.product(range(n + 1), repeat=2)
    for sign, ranks in itertools.product((1, -1), list(pairs)):
        found.add((sign, sum(n - rank for rank in ranks)))
    return [len(found), sum(sign == 1 for sign, _ in found)]


@exercise(
    "6.5",
    level=2,
    kind="compute",
    atol=1e-9,
    mistakes={
        "the mean square": 5.0**-8,
        "3 × 3 taps": 3.0**-4,
        "one layer": 0.2,
        "ten layers": 5.0**-10,
    },
)
def four_reshaped() -> float:
    return math.prod([1 / 5] * 4)


@exercise(
    "6.6",
    level=2,
    kind="derive",
    mistakes={
        "of G": [1 / 6, 1.0],
        "without the 2": [0.0, 5 / 6],
        "one unit is active": [-2 / 3 + 1 / 3, 1.0],
    },
)
def residual_eigenvalues() -> Tensor:
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    scale = torch.diag(1 / torch.tensor([2.0, 3.0], dtype=torch.float64))
    return torch.linalg.eigvalsh(torch.eye(2) - 2 * weight.T @ scale @ weight)


@exercise(
    "6.7",
    level=2,
    kind="compute",
    mistakes={
        "without the roots": [8.0, 7.0792],
        "the sum of the moduli of the taps": [math.sqrt(8), 4.0],
        "at the angle 0": [math.sqrt(8), 2.0],
        "only one of the shifts ±τ": [math.sqrt(6), 2.66068],
    },
)
def almost_orthogonal() -> list[float]:
    taps = np.array([1.0, 1.0, 1.0, -1.0])
    responses = abs(np.fft.fft(taps, 4096))
    return [float(np.sqrt(abs(np.correlate(taps, taps, "full")).sum())), float(responses.max())]


@exercise(
    "6.8",
    level=2,
    kind="derive",
    mistakes={
        "the channel that stays": [1, 39, 0],
        "all four channels": [4, 36, 0],
        "a circle": [0, 40, 0],
        "blurred": [0, 36, 4],
    },
)
def off_the_edge() -> list[int]:
    projector = torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    taps = torch.stack([projector, torch.eye(4) - projector], -1)
    padded = convolution_matrix(taps, 10, padding=1)  # eleven outputs: one more on the left
    rows = padded.reshape(4, 11, 40)[:, 1:].reshape(40, 40)
    values = torch.linalg.svdvals(rows)
    counts = [int(((values - value).abs() < 1e-9).sum()) for value in (0, 1)]
    return [*counts, 40 - sum(counts)]


def _no_double(answer: Any) -> str | None:
    if not callable(answer):
        return f"Expected a function, got {type(answer).__name__}."
    for n, rank in ((4, 0), (4, 1), (3, 3), (5, 2)):
        basis = torch.linalg.qr(torch.randn(n, n)).Q[:, :rank]
        projector = basis @ basis.T
        try:
            found = torch.as_tensor(answer(projector))
        except Exception as error:
            return f"Your function raises {type(error).__name__}: {error}"
        if found.shape != (2 * n, 2 * n):
            return (
                f"Expected the shape {(2 * n, 2 * n)} for {n} channels, got {tuple(found.shape)}."
            )
        off = {
            "It is not symmetric.": found - found.T,
            "Its square is not itself.": found @ found - found,
            "It does not send (x, 0) to (Px, 0).": found[:, :n]
            - torch.cat([projector, 0 * projector]),
            "Its rank is not half of the channels.": found.trace() - n,
        }
        for wrong, difference in off.items():
            if difference.abs().max() > 1e-6:
                return wrong
    return None


@exercise("6.9", level=3, kind="compute", complaint=_no_double)
def doubled() -> Callable[[Tensor], Tensor]:
    return lambda P: torch.block_diag(P, torch.eye(len(P)) - P)
