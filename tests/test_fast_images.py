"""lab.fast_images: every shortcut does what the long way does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import lipschitz_bound
from lipbook.convolutions import channel_shift
from lipbook.lab import fast_images
from lipbook.lab.fast_images import ShiftNet, Stage
from lipbook.lab.networks import MOVES
from lipbook.losses import OffsetCrossEntropyLoss

STAGES = (Stage(16, 2, 2), Stage(32, 1, 1), Stage(16, 2, 1))
LOSS = OffsetCrossEntropyLoss(0.7, 0.2)
DIAGONAL = ((0, 0), (1, -1), (-2, 0), (0, 3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def net(moves: Any = MOVES) -> ShiftNet:
    found = ShiftNet(STAGES, 0, torch.float64, (3, 8), moves)
    for layer, bias in enumerate(found.biases):
        bias.copy_(0.3 * draw(len(bias), seed=layer))
    return found


def by_autograd(found: ShiftNet, weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """The formula of the class, of images first, differentiable."""
    for weight, bias, stride in zip(weights, biases, found.strides, strict=False):
        x = functional.conv2d(functional.pixel_unshuffle(x, stride), weight[:, :, None, None], bias)
        a, b = x.chunk(2, 1)
        halves = (channel_shift(half, found.moves) for half in (a.abs(), b))
        x = torch.cat([*halves], 1)
    return x.flatten(1) @ weights[-1].T + biases[-1]


@pytest.mark.parametrize("moves", [MOVES, DIAGONAL])
def test_gradients_by_hand_are_those_of_autograd(moves: Any) -> None:
    found, x, labels = net(moves), draw(12, 3, 8, 8), torch.arange(12) % 10
    inputs, signs, logits = found.forward(x.permute(1, 2, 3, 0).contiguous())
    leaf = logits.T.clone().requires_grad_()
    (outer,) = torch.autograd.grad(LOSS(leaf, labels), leaf)
    by_hand = found.gradients(inputs, signs, outer.T)
    weights, biases = (
        [part.clone().requires_grad_() for part in parts] for parts in (found.weights, found.biases)
    )
    outputs = by_autograd(found, weights, biases, x)
    assert torch.allclose(outputs, logits.T, atol=1e-12)
    LOSS(outputs, labels).backward()
    pixels = [16, 16, 16, 4, 1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        assert weight.grad is not None
        assert bias.grad is not None
        assert torch.allclose(by_hand[0][layer], weight.grad, atol=1e-12)
        assert torch.allclose(by_hand[1][layer], bias.grad / pixels[layer], atol=1e-12)
        assert by_hand[0][layer].abs().max() > 1e-4


@pytest.mark.parametrize("moves", [MOVES, DIAGONAL])
def test_max_min_and_absolute_values_are_the_same_up_to_turns(moves: Any) -> None:
    found, x = net(moves), draw(6, 3, 8, 8)
    model = found.network()
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == [*["ShiftConv2d", "MaxMin"] * 4, "Flatten", "Linear"]
    wanted = found.forward(x.permute(1, 2, 3, 0).contiguous())[2].T
    assert torch.allclose(model.double()(x), wanted, atol=1e-5)  # weights are in float32


def test_biases_of_the_first_layer_take_over_a_mean_colour() -> None:
    found, x, mean = net(), draw(6, 3, 8, 8), torch.tensor([0.5, -1.0, 2.0]).double()
    centred = x - mean.view(3, 1, 1)
    wanted = found.forward(centred.permute(1, 2, 3, 0).contiguous())[2].T
    assert torch.allclose(found.network(mean).double()(x), wanted, atol=1e-5)
    assert not torch.allclose(found.network().double()(x), wanted, atol=0.1)


def test_what_all_images_share_in_colour_changes_no_training() -> None:
    images, labels = torch.rand(64, 3, 4, 4), torch.arange(64) % 2
    images[labels == 1, 0] /= 2
    options: dict[str, Any] = {
        "stages": [Stage(16, 2, 1)], "loss": LOSS, "epochs": 4, "batch_size": 32,
    }  # fmt: skip
    model = fast_images.fit(images, labels, **options)
    colour = torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)
    moved = fast_images.fit(images + colour, labels, **options)
    assert torch.allclose(model(images), moved(images + colour), atol=1e-3)


def test_a_network_is_nonexpansive_but_for_its_last_layer() -> None:
    found = net()
    for weight in found.weights:
        weight.add_(0.05 * draw(*weight.shape))  # as after rough steps
    *hidden, _, last = found.network()
    assert lipschitz_bound(nn.Sequential(*hidden), (3, 8, 8)).value == pytest.approx(1, abs=1e-6)
    for layer in hidden[::2]:
        values = np.linalg.svd(layer.weight.double().numpy(), compute_uv=False)
        assert np.abs(values - 1).max() < 1e-6
    assert np.allclose(last.weight.numpy(), found.weights[-1].numpy() @ turned(16, 4), atol=1e-6)


def turned(channels: int, pixels: int) -> np.ndarray:
    """Matrix from pairs of MaxMin to the two halves, on images with these channels."""
    turn = np.zeros((channels, channels))
    for k in range(channels // 2):
        half = channels // 2 + k
        turn[k, 2 * k], turn[k, 2 * k + 1] = -(0.5**0.5), 0.5**0.5
        turn[half, 2 * k], turn[half, 2 * k + 1] = 0.5**0.5, 0.5**0.5
    return np.kron(turn, np.eye(pixels))


def test_a_step_keeps_tall_and_wide_weights_orthonormal() -> None:
    found = ShiftNet((Stage(32, 2, 2),), 0, torch.float64, (3, 4))
    start = [weight.clone() for weight in found.weights]
    for step in range(8):
        gradients = [draw(*weight.shape, seed=step) for weight in found.weights]
        found.step(gradients, [torch.zeros_like(bias) for bias in found.biases], 0.1, 0.1)
    assert [tuple(weight.shape) for weight in found.weights] == [(32, 12), (32, 32), (10, 128)]
    for weight, before in zip(found.weights[:-1], start, strict=False):
        values = torch.linalg.svdvals(weight)
        assert (values - 1).abs().max() < 0.02
        assert (weight - before).abs().max() > 0.05


def test_views_are_shifted_and_mirrored_sixteen_alike() -> None:
    images = torch.rand(96, 2, 5, 5)
    changed = fast_images.views(images, np.random.default_rng(3), 1).permute(3, 0, 1, 2)
    padded = functional.pad(images, (1,) * 4)
    chosen = set()
    for start in range(0, 96, 16):
        part = slice(start, start + 16)
        found = [
            (down, right, mirrored)
            for down in range(3)
            for right in range(3)
            for mirrored in (False, True)
            if torch.equal(
                changed[part],
                padded[part, :, down : down + 5, right : right + 5].flip([3] * mirrored),
            )
        ]
        assert len(found) == 1
        chosen |= {*found}
    assert all(len({one[part] for one in chosen}) > 1 for part in range(3))


def test_a_short_training_learns_and_repeats() -> None:
    images, labels = torch.rand(96, 3, 4, 4), torch.arange(96) % 2
    images[labels == 1, 0] /= 2
    options: dict[str, Any] = {
        "stages": [Stage(16, 2, 2)], "loss": LOSS, "epochs": 12, "batch_size": 32, "seed": 1,
    }  # fmt: skip
    model = fast_images.fit(images, labels, **options)
    assert (model(images).argmax(1) == labels).double().mean() > 0.9
    again = fast_images.fit(images, labels, **options)
    low = fast_images.fit(images, labels, **options, precision="bfloat16")
    assert torch.equal(model(images), again(images))
    assert (low(images).argmax(1) == labels).double().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "float16"}, "precision: expected one of"),
        ({"images": torch.rand(32, 3, 4, 6)}, "images: expected shape"),
        ({"batch_size": 24}, "batch_size: expected a multiple of 16"),
        ({"lr": 0.6}, "lr: expected a number in"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"stages": [Stage(24, 1, 1)]}, "stages: expected multiples of 16 channels"),
    ],
)
def test_unusable_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {
        "images": torch.rand(32, 3, 4, 4), "labels": torch.arange(32) % 2, "epochs": 1,
        "stages": [Stage(16, 2, 1)], "loss": LOSS, "batch_size": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        fast_images.fit(**given | change)


def test_a_loss_that_is_no_number_stops_a_training() -> None:
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1"):
        fast_images.fit(
            torch.rand(16, 3, 4, 4), torch.arange(16) % 2, stages=[Stage(16, 2, 1)], epochs=1,
            loss=lambda logits, labels: logits.sum() * torch.nan, batch_size=16,
        )  # fmt: skip
