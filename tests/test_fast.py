"""lab.fast: every shortcut does what the long way does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipbook.lab import fast
from lipbook.lab.augmentation import distorted
from lipbook.lab.data import mnist
from lipbook.lab.descent import StiefelMuon
from lipbook.lab.evaluation import certificate
from lipbook.lab.training import accuracy
from lipbook.losses import OffsetCrossEntropyLoss

SIZES = (12, 8, 8, 6, 5)
LOSS = OffsetCrossEntropyLoss(1.0, 0.2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def net(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> fast.AbsoluteNet:
    found = fast.AbsoluteNet(sizes, seed, torch.float64)
    for layer, bias in enumerate(found.biases):
        bias.copy_(0.3 * draw(len(bias), seed=layer))
    return found


def by_autograd(
    sizes: tuple[int, ...], weights: list[Tensor], biases: list[Tensor], x: Tensor
) -> Tensor:
    """The formula of the class, rows for examples, differentiable."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight.T + bias
        if layer < len(sizes) - 2:
            half = sizes[layer + 1] // 2
            x = torch.cat([x[:, :half].abs(), x[:, half:]], 1)
    return x


# ----------------------------------------------------------------------------------- the network


def test_gradients_by_hand_are_those_of_autograd() -> None:
    found, x, labels = net(), draw(30, SIZES[0]), torch.arange(30) % SIZES[-1]
    inputs, signs, logits = found.forward(x.T)
    leaf = logits.T.clone().requires_grad_()
    (outer,) = torch.autograd.grad(LOSS(leaf, labels), leaf)
    by_hand = found.gradients(inputs, signs, outer.T)
    weights, biases = (
        [part.clone().requires_grad_() for part in parts] for parts in (found.weights, found.biases)
    )
    outputs = by_autograd(SIZES, weights, biases, x)
    assert torch.allclose(outputs, logits.T, atol=1e-12)
    LOSS(outputs, labels).backward()
    for mine, theirs in zip(by_hand, (weights, biases), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert other.grad is not None
            assert torch.allclose(one, other.grad, atol=1e-12)
            assert one.abs().max() > 1e-4


def test_max_min_and_absolute_values_are_the_same_up_to_turns() -> None:
    found, x = net(), draw(50, SIZES[0])
    model = found.network()
    assert [type(layer).__name__ for layer in model] == ["Flatten", *["Linear", "MaxMin"] * 3,
                                                         "Linear"]  # fmt: skip
    wanted = found.forward(x.T)[2].T
    # the weights of the network are rounded to float32
    assert torch.allclose(model.double()(x), wanted, atol=1e-5)


def test_a_network_has_orthonormal_rows_and_a_last_layer_of_one_length() -> None:
    found = net()
    found.weights[1] += 0.05 * draw(8, 8)  # as after rough steps
    *hidden, last = (m.weight for m in found.network() if isinstance(m, nn.Linear))
    for weight in hidden:
        values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        assert np.abs(values - 1).max() < 1e-6
    assert np.allclose(np.linalg.norm(last.double().numpy(), axis=1), np.sqrt(4 / 5))


@pytest.mark.parametrize("sizes", [(6, 8, 3), (8, 5, 3), (8, 3)])
def test_sizes_without_orthonormal_rows_or_halves_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes must not increase, with an even number of units"):
        fast.AbsoluteNet(sizes)


# -------------------------------------------------------------------------------------- the step


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_the_loose_sign_keeps_singular_vectors_and_levels_values(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    matrix = draw(*shape, seed=seed)
    u, values, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    inner = u.T @ fast.loose_sign(matrix * scale).numpy() @ vh.T
    assert np.all(np.diag(inner) <= 1.27)
    large = values >= 0.0103 * np.sum(values**4) ** 0.25
    assert np.all(np.diag(inner)[large] >= 0.73)
    assert np.allclose(inner, np.diag(np.diag(inner)), atol=1e-6)


def test_the_loose_sign_of_zero_and_in_bfloat16() -> None:
    assert fast.loose_sign(torch.zeros(2, 3)).equal(torch.zeros(2, 3))
    low = fast.loose_sign(draw(16, 40).bfloat16())
    assert low.dtype == torch.bfloat16
    assert (torch.linalg.svdvals(low.float()) - 1).abs().max() < 0.4


def test_a_step_is_that_of_the_optimiser_up_to_the_roughness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a sharp sign and square weights nothing differs: W - ηS is orthogonal, times √(1+η²)."""
    monkeypatch.setattr(fast, "loose_sign", _polar)
    monkeypatch.setattr("lipbook.lab.descent.matrix_sign", _polar)
    sizes, lr = (8, 8, 8, 5), 0.1
    found = net(sizes)
    plain = [nn.Parameter(part.clone()) for part in (*found.weights[:-1], *found.biases)]
    optimizer = StiefelMuon(plain, lr=lr, momentum=0.9, vector_lr=3.0)
    for step in range(4):
        gradients = [draw(*part.shape, seed=step + 5) for part in found.weights]
        slopes = [draw(*part.shape, seed=step + 9) for part in found.biases]
        for one, gradient in zip(plain, [*gradients[:-1], *slopes], strict=True):
            one.grad = gradient.clone()
        optimizer.step()
        found.step(gradients, slopes, lr, 3.0 * lr)
    for mine, theirs in zip((*found.weights[:-1], *found.biases), plain, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_a_step_of_the_last_layer_goes_along_the_spheres_of_its_rows() -> None:
    found = net()
    start, gradient = found.weights[-1].numpy().copy(), draw(5, 6, seed=7).numpy()
    gradients = [torch.zeros_like(part) for part in found.weights]
    gradients[-1] = torch.from_numpy(gradient.copy())
    found.step(gradients, [torch.zeros_like(part) for part in found.biases], 0.2, 0.2)
    rows = start / np.linalg.norm(start, axis=1, keepdims=True)
    tangent = gradient - rows * (rows * gradient).sum(1, keepdims=True)
    moved = start - 0.2 * np.linalg.norm(start) * tangent / np.linalg.norm(tangent)
    wanted = moved * np.sqrt(4 / 5) / np.linalg.norm(moved, axis=1, keepdims=True)
    assert np.allclose(found.weights[-1].numpy(), wanted, atol=1e-12)


def _polar(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def test_rough_steps_stay_near_the_orthonormal_matrices() -> None:
    found = net((40, 16, 16, 10))
    for step in range(40):
        gradients = [draw(*part.shape, seed=step + 5) for part in found.weights]
        slopes = [torch.zeros_like(part) for part in found.biases]
        found.step(gradients, slopes, 0.1, 0.1)
        for weight in found.weights[:-1]:
            values = np.linalg.svd(weight.numpy(), compute_uv=False)
            assert np.abs(values - 1).max() < 0.15
        lengths = found.weights[-1].norm(dim=1)
        assert torch.allclose(lengths, torch.full_like(lengths, 0.9**0.5))


# ----------------------------------------------------------------------------------- distortions


def test_windows_are_distorted_digits_without_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a group: then both draw the same numbers and differ in the window alone."""
    monkeypatch.setattr(fast, "SHARED", 1)
    images = mnist().test_images[:20]
    mine = fast.windows(images, np.random.default_rng(3), 1.5, 0.2)
    theirs = distorted(images, np.random.default_rng(3), 1.5, 0.2)[:, 0, 2:-2, 2:-2].flatten(1)
    assert torch.allclose(mine, theirs, atol=1e-4)
    assert (mine - images[:, 0, 2:-2, 2:-2].flatten(1)).abs().max() > 0.5


def test_sixteen_images_share_a_distortion() -> None:
    image = mnist().test_images[:1].expand(32, 1, 28, 28)
    found = fast.windows(image, np.random.default_rng(0))
    assert (found[:16] == found[0]).all()
    assert (found[16:] == found[16]).all()
    assert not found[0].equal(found[16])


# -------------------------------------------------------------------------------------- training


def fitted(**changes: Any) -> nn.Sequential:
    images, labels = (part[:600] for part in mnist()[:2])
    sizes = {"width": 32, "depth": 3, "loss": LOSS, "epochs": 8, "batch_size": 64}
    return fast.fit(images, labels, **(sizes | changes))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trained_network_is_an_ordinary_one_that_is_certified_soundly(precision: str) -> None:
    model = fitted(precision=precision).double()
    images, labels = mnist().test_images[::10].double(), mnist().test_labels[::10]
    found = certificate(model, images, labels)
    assert found.sound
    assert accuracy(model, images, labels) > 0.8
    assert found.certified_accuracy(0.5).value > 0.5
    *hidden, last = (m.weight.double() for m in model if isinstance(m, nn.Linear))
    for weight in hidden:
        values = np.linalg.svd(weight.numpy(), compute_uv=False)
        assert np.abs(values - 1).max() < 1e-6
    # the certificate by hand, in real arithmetic: margins over distances of rows
    with torch.no_grad():
        logits = model(images)
    top = logits.argmax(1)
    gaps = logits.gather(1, top[:, None]) - logits
    distances = torch.cdist(last, last)[top]
    ratios = (gaps / distances).masked_fill(distances == 0, torch.inf).amin(1)
    assert torch.allclose(found.radius, ratios, rtol=1e-5, atol=1e-9)


def test_the_border_is_not_looked_at() -> None:
    model = fitted(epochs=1)
    images = mnist().test_images[:5]
    changed = images.clone()
    changed[:, :, :2] = 1
    changed[..., -2:] = 1
    assert torch.equal(model(images), model(changed))


def test_a_seed_determines_the_bits() -> None:
    first, again, other = (fitted(epochs=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_other_nets_and_views_are_trained() -> None:
    """Zeros instead of digits leave the weights of the first layer where they started."""
    made = []

    def make(*given: Any) -> fast.AbsoluteNet:
        made.append(fast.AbsoluteNet(*given))
        made.append(made[0].network()[1].weight.clone())
        return made[0]

    model = fitted(make=make, view=lambda images, rng: torch.zeros(len(images), 576), epochs=1)
    assert made[0].sizes == (576, 32, 32, 32, 10)
    assert torch.allclose(model[1].weight.view(32, 28, 28)[:, 2:-2, 2:-2].flatten(1), made[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "float16"}, r"precision: expected one of \('float32', 'bfloat16'\)"),
        ({"batch_size": 40}, "batch_size: expected a multiple of 16 up to 600, got 40"),
        ({"batch_size": 608}, "batch_size: expected a multiple of 16 up to 600, got 608"),
        ({"lr": 0.6}, r"lr: expected a number in \(0, 0.5\], got 0.6"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"width": 31}, "sizes must not increase, with an even number"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fitted(**changes)


def test_other_images_and_an_exploding_loss_are_refused() -> None:
    images, labels = (part[:64] for part in mnist()[:2])
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "epochs": 1, "batch_size": 64}
    with pytest.raises(ValueError, match=r"images: expected shape \(64, 1, 28, 28\)"):
        fast.fit(images[..., 2:-2, 2:-2], labels, loss=LOSS, **sizes)
    with pytest.raises(ValueError, match=r"images: expected shape \(63, 1, 28, 28\)"):
        fast.fit(images, labels[1:], loss=LOSS, **sizes)
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1"):
        fast.fit(images, labels, loss=lambda z, y: LOSS(z, y) * torch.nan, **sizes)
