"""lab.descent: the step is the formula, and the manifold is kept."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipbook.convolutions import OrthogonalConv2d
from lipbook.lab.descent import StiefelMuon, matrix_sign
from lipbook.orthogonal import OrthogonalLinear

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_matrix_sign_keeps_singular_vectors_and_levels_values(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    matrix = draw(*shape, seed=seed)
    sign = matrix_sign(matrix * scale)
    u, values, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    inner = u.T @ sign.numpy() @ vh.T
    assert np.all(np.diag(inner) <= 1.15)
    large = values >= 2e-3 * np.linalg.norm(values)
    assert np.all(np.diag(inner)[large] >= 0.85)
    assert np.allclose(inner, np.diag(np.diag(inner)), atol=1e-8)


def test_matrix_sign_of_zero_and_of_batches() -> None:
    assert matrix_sign(torch.zeros(3, 2)).equal(torch.zeros(3, 2))
    batch = draw(4, 3, 5)
    assert torch.allclose(matrix_sign(batch)[2], matrix_sign(batch[2]))
    low = matrix_sign(batch.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (torch.linalg.svdvals(low.float()) - 1).abs().max() < 0.2


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_a_step_is_the_formula(shape: tuple[int, int]) -> None:
    """Against LAPACK's QR; the signs are those of matrix_sign."""
    start = scipy.linalg.polar(draw(*shape).numpy())[0]
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    descent = StiefelMuon([weight], lr=0.1, momentum=0.6)
    w = start if shape[0] >= shape[1] else start.T
    average = np.zeros_like(w)
    for step in range(3):
        gradient = draw(*shape, seed=step + 1)
        weight.grad = gradient
        descent.step()
        g = gradient.numpy() if shape[0] >= shape[1] else gradient.numpy().T
        average = 0.6 * average + 0.4 * g
        direction = 0.6 * average + 0.4 * g
        tangent = direction - w @ (w.T @ direction + direction.T @ w) / 2
        moved = w - 0.1 * matrix_sign(torch.from_numpy(tangent)).numpy()
        q, r = np.linalg.qr(moved)
        w = q * np.sign(np.diag(r))
        found = weight.detach().numpy()
        assert np.allclose(found if shape[0] >= shape[1] else found.T, w, atol=1e-10)


def test_a_vector_takes_the_plain_step() -> None:
    bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    descent = StiefelMuon([bias], lr=0.1, momentum=0.0, vector_lr=3.0)
    bias.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    descent.step()
    assert torch.allclose(bias, torch.tensor([-0.3, 0.6], dtype=torch.float64))


@settings(deadline=None, max_examples=50)
@given(
    shape=SHAPES,
    seed=st.integers(0, 1000),
    lr=st.floats(1e-4, 0.5),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_matrices_stay_orthonormal(
    shape: tuple[int, int], seed: int, lr: float, dtype: torch.dtype | None
) -> None:
    weight = nn.Parameter(draw(2, *shape, seed=seed).float() * 100)
    descent = StiefelMuon([weight], lr=lr, dtype=dtype)
    for step in range(5):
        weight.grad = draw(2, *shape, seed=seed + step).float() * 10.0 ** (step - 3)
        descent.step()
        values = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
        assert np.abs(values - 1).max() <= 1e-5


@pytest.mark.parametrize("method", ["qr", "polar", "cholesky_qr"])
def test_training_a_layer_by_its_raw_parameter_is_training_the_weight(method: Any) -> None:
    """The map of the layer leaves orthonormal matrices as they are."""
    x, y = draw(50, 6), draw(50, 3, seed=1)
    torch.manual_seed(0)
    layer = OrthogonalLinear(6, 3, method=method, dtype=torch.float64)
    plain = nn.Linear(6, 3, dtype=torch.float64)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    for model in (layer, plain):
        descent = StiefelMuon(model.parameters(), lr=0.05, momentum=0.0)
        for _ in range(10):
            descent.zero_grad()
            (model(x) - y).square().mean().backward()
            descent.step()
    assert torch.allclose(layer.weight, plain.weight, atol=1e-8)


def test_a_block_convolution_stays_orthogonal_and_its_raw_parameters_orthonormal() -> None:
    torch.manual_seed(0)
    layer = OrthogonalConv2d(3, 4, 3)
    descent = StiefelMuon(layer.parameters(), lr=0.05)
    x = draw(8, 3, 6, 6).float()
    losses = []
    for _ in range(20):
        descent.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for raw in layer.parametrizations.weight.parameters():
        values = np.linalg.svd(raw.detach().double().numpy(), compute_uv=False)
        assert np.abs(values - 1).max() <= 1e-5
    columns = torch.eye(3 * 36).view(-1, 3, 6, 6)
    matrix = (layer(columns) - layer(torch.zeros(1, 3, 6, 6))).flatten(1).detach().double()
    assert np.abs(np.linalg.svd(matrix.numpy(), compute_uv=False) - 1).max() <= 1e-5


def test_the_state_resumes() -> None:
    first, second = (nn.Parameter(draw(4, 3)) for _ in range(2))
    descent = StiefelMuon([first], lr=0.1)
    for step in range(2):
        first.grad = draw(4, 3, seed=step)
        descent.step()
    state = copy.deepcopy(descent.state_dict())
    second.data.copy_(first.data)
    resumed = StiefelMuon([second], lr=0.05)
    resumed.load_state_dict(state)
    for parameter, one in ((first, descent), (second, resumed)):
        parameter.grad = draw(4, 3, seed=9)
        one.step()
    assert first.equal(second)


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.eye(2))

    def closure() -> float:
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss.item()

    assert StiefelMuon([weight], lr=0.1).step(closure) == 2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0}, "lr must be in"),
        ({"lr": 0.6}, "lr must be in"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"vector_lr": -1.0}, "vector_lr must not be negative"),
    ],
)
def test_bad_numbers_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StiefelMuon([nn.Parameter(torch.eye(2))], **arguments)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="got a single number"):
        StiefelMuon([nn.Parameter(torch.tensor(1.0))])
    with pytest.raises(ValueError, match=r"matrix must be floating-point of shape \(..., m, n\)"):
        matrix_sign(torch.ones(3))
