"""lab.networks, lab.evaluation and lab.augmentation: what the robust recipes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from lipbook.activations import GroupSort, MaxMin
from lipbook.composition import lipschitz_bound, lipschitz_lower_bound
from lipbook.lab import networks
from lipbook.lab.augmentation import distorted, shifted_and_flipped
from lipbook.lab.data import mnist
from lipbook.lab.evaluation import certificate, certified_score, summary
from lipbook.losses import multi_margin
from lipbook.residual import AverageResidual

# ------------------------------------------------------------------------------ architectures


def test_a_transformer_learns_which_tokens_are_equal_and_stays_1_lipschitz() -> None:
    """Nine pairs of three symbols: no sum of functions of single tokens tells all of them apart."""
    torch.manual_seed(0)
    net = networks.transformer(3, 2, 2, width=8, heads=1)
    symbols = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    x, equal = nn.functional.one_hot(symbols, 3).float(), (symbols[:, 0] == symbols[:, 1]).long()
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(10 * net(x), equal).backward()
        optimizer.step()
    assert torch.equal(net(x).argmax(1), equal)
    above = lipschitz_bound(net.eval(), (2, 3)).value
    assert above <= 1 + 1e-5
    below = lipschitz_lower_bound(net, x, steps=10).value
    assert 0.2 < below <= above
    assert lipschitz_bound(networks.transformer(3, 50, 2).eval(), (50, 3)).value <= 1 + 1e-5


@pytest.mark.parametrize(("depth", "kernel_size"), [(4, 2), (2, 3), (1, 1)])
def test_a_temporal_network_is_causal_sees_its_field_and_is_1_lipschitz(
    depth: int, kernel_size: int
) -> None:
    torch.manual_seed(0)
    net = networks.temporal(3, 2, width=6, depth=depth, kernel_size=kernel_size).double().eval()
    field, time = 1 + (kernel_size - 1) * (2**depth - 1), 24
    x = torch.randn(3, time, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
    seen = jacobian.abs().amax((0, 2)) > 0  # of an output at a step, by an input at a step
    later, earlier = torch.arange(time)[:, None], torch.arange(time)
    assert torch.equal(seen, (earlier <= later) & (later < earlier + field))
    bound = lipschitz_bound(net, (3, time)).value
    assert torch.linalg.matrix_norm(jacobian.reshape(2 * time, -1), 2) <= bound <= 1 + 1e-9
    assert lipschitz_bound(net, (3, 1000)).value <= 1 + 1e-9
    for arguments, message in ({"width": 5}, "width must be even"), ({"depth": 0}, "depth must be"):
        with pytest.raises(ValueError, match=message):
            networks.temporal(3, 2, **arguments)


def test_a_causal_transformer_answers_by_the_past() -> None:
    torch.manual_seed(0)
    net = networks.transformer(3, 6, 2, causal=True).eval()
    x = torch.randn(2, 6, 3)
    other = x.clone()
    other[:, 4:] = torch.randn(2, 2, 3)
    answers, found = net(x), net(other)
    assert answers.shape == (2, 6, 2)
    assert torch.equal(found[:, :4], answers[:, :4])
    assert not torch.equal(found[:, 4], answers[:, 4])
    below = lipschitz_lower_bound(net, x, steps=5).value
    assert 0.05 < below <= lipschitz_bound(net, (6, 3)).value <= 1 + 1e-5


@pytest.mark.parametrize(
    ("build", "shape", "architecture", "arguments"),
    [
        (lambda: networks.dense([784, 12, 10]), (1, 28, 28), "dense", ([784, 12, 10],)),
        (networks.small, (1, 28, 28), "small", ()),
        (lambda: networks.small(3, 32), (3, 32, 32), "small", (3, 32)),
        (networks.large, (3, 32, 32), "large", ()),
    ],
)
def test_a_stored_network_is_the_trained_one_rounded(
    build: object, shape: tuple[int, ...], architecture: str, arguments: tuple[object, ...]
) -> None:
    torch.manual_seed(0)
    model = build().eval()  # type: ignore[operator]
    assert lipschitz_bound(model, shape).value <= 1 + 1e-5
    tensors = networks.packed(model)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    stored = networks.rebuilt(architecture, arguments, tensors)
    x = torch.rand(5, *shape)
    with torch.no_grad():
        assert torch.allclose(stored(x), model(x), atol=0.02)
    assert not any(p.requires_grad for p in stored.parameters())
    assert {type(m) for m in stored} <= {nn.Conv2d, nn.Linear, nn.Flatten, MaxMin}


def test_the_sizes_are_those_of_the_paper() -> None:
    small = [m.weight.shape for m in networks.small() if hasattr(m, "weight")]
    assert [tuple(s) for s in small] == [(16, 1, 4, 4), (32, 16, 4, 4), (100, 1568), (10, 100)]
    large = [tuple(m.weight.shape) for m in networks.large() if hasattr(m, "weight")]
    assert large[:4] == [(32, 3, 3, 3), (32, 32, 4, 4), (64, 32, 3, 3), (64, 64, 4, 4)]
    assert large[4:] == [(512, 4096), (512, 512), (10, 512)]


@pytest.mark.parametrize("block", ["average", "orthogonal"])
def test_a_residual_network_is_1_lipschitz_at_any_depth(block: Any) -> None:
    torch.manual_seed(0)
    model = networks.resnet(1, 8, 3, width=4, depth=3, stages=2, block=block).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert lipschitz_bound(model, (1, 8, 8)).value <= 1 + 1e-9
    x = torch.rand(1, 8, 8, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    values = torch.linalg.svdvals(jacobian.flatten(1))
    assert values.max() <= 1 + 1e-9
    if block == "orthogonal":  # before the strides nothing is lost
        gradient: Any = torch.autograd.functional.jacobian(lambda v: model[:8](v[None])[0], x)
        assert (torch.linalg.svdvals(gradient.reshape(-1, 64)) - 1).abs().max() < 1e-6
    assert sum(type(part).__name__.endswith("Residual") for part in model) == 6
    assert model[-3].window == 4
    with pytest.raises(ValueError, match="block: expected 'average' or 'orthogonal', got 'sum'"):
        networks.resnet(block="sum")  # type: ignore[arg-type]


def test_a_small_lipnext_whose_stages_keep_all_numbers_is_orthogonal() -> None:
    torch.manual_seed(0)
    model = networks.lipnext(2, 8, 3, widths=(8, 32), depth=2).double()
    x = torch.rand(2, 8, 8, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    assert (torch.linalg.svdvals(jacobian.flatten(1)) - 1).abs().max() < 1e-9
    kept: Any = torch.autograd.functional.jacobian(lambda v: model[:-1](v[None])[0], x)
    assert (torch.linalg.svdvals(kept.flatten(1)) - 1).abs().max() < 1e-9
    with pytest.raises(ValueError, match="size: expected a multiple of 8 for 3 stages, got 28"):
        networks.lipnext(1, 28)


def test_skips_begin_at_one_over_the_number_of_blocks() -> None:
    model = networks.resnet(1, 4, width=4, depth=4, stages=1)
    weights = [part.weights()[1].item() for part in model if isinstance(part, AverageResidual)]
    assert weights == pytest.approx([0.2] * 4)


def test_a_critic_sorts_whole_layers() -> None:
    torch.manual_seed(0)
    critic = networks.critic(12, width=10, depth=2).double()
    assert [part.group_size for part in critic if isinstance(part, GroupSort)] == [10, 10]
    x = torch.rand(3, 3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x)
    assert torch.allclose(gradient.flatten(1).norm(dim=1), torch.ones(3).double())


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="no network 'best': expected one of"):
        networks.load("best")
    with pytest.raises(ValueError, match="no network 'best'"):
        networks.norm("best")
    with pytest.raises(ValueError, match=r"architecture: expected one of \('dense', .*got 'huge'"):
        networks.rebuilt("huge", (), {})


# --------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = networks.dense([784, 32, 10])
    digits = mnist()
    descent = torch.optim.Adam(model.parameters(), 1e-2)
    for k in range(60):
        x, y = (t[k * 100 : k * 100 + 100] for t in digits[:2])
        descent.zero_grad()
        multi_margin(model(x), y, 1.0).backward()
        descent.step()
    return model.eval()


def test_a_summary_is_consistent(trained: nn.Sequential) -> None:
    images, labels = (t[:300] for t in mnist()[2:])
    found = summary(trained, images, labels, (0.2, 0.8), attack=100)
    with torch.no_grad():
        right = (trained(images).argmax(1) == labels).double().mean().item()
    assert found["clean"] == pytest.approx(right)
    assert found["clean"] > found["certified"][0] > found["certified"][1]
    assert found["p"] == "2"
    for low, high in zip(found["certified_of_attacked"], found["attacked"], strict=True):
        assert low <= high
    assert found["attacked"][0] < right
    few = summary(trained, images[:20], labels[:20], (0.2,), attack=100)
    assert few["attack_count"] == few["count"] == 20


def test_the_score_is_the_mean_of_two_accuracies(trained: nn.Sequential) -> None:
    images, labels = (t[:300] for t in mnist()[2:])
    found = certificate(trained, images, labels, sound=False)
    expected = sum(found.certified_accuracy(e).value for e in (0, 0.5)) / 2
    assert certified_score(0.5)(trained, images, labels) == pytest.approx(expected)


# ------------------------------------------------------------------------------- augmentation


def test_distortion_is_the_affine_map_of_scipy() -> None:
    """SciPy's coordinates are (row, column) from the corner; ours are (x, y) from the centre."""
    images = torch.from_numpy(np.random.default_rng(1).random((1, 1, 9, 9)))
    rng = np.random.default_rng(3)
    angle, shear = rng.uniform(-0.2, 0.2, (2, 1))[:, 0]
    a, c = 0.7 * rng.uniform(-0.2, 0.2, (2, 1))[:, 0]
    shift = rng.uniform(-1.5, 1.5, (1, 2))[0]
    matrix = np.array(
        [
            [(1 + a) * np.cos(angle), shear - np.sin(angle)],
            [np.sin(angle), (1 + c) * np.cos(angle)],
        ]
    )[::-1, ::-1]
    centre = np.array([4.0, 4.0])
    expected = scipy.ndimage.affine_transform(
        images[0, 0].numpy(), matrix, centre - matrix @ centre + shift[::-1], order=1,
        mode="grid-constant",
    )  # fmt: skip
    found = distorted(images, np.random.default_rng(3), 1.5, 0.2)
    assert np.allclose(found[0, 0].numpy(), expected, atol=1e-6)


def test_a_shift_moves_whole_pixels() -> None:
    images = torch.rand(200, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    changed = shifted_and_flipped(images, np.random.default_rng(0), shift=1)
    assert changed.shape == images.shape
    seen = set()
    for before, after in zip(images, changed, strict=True):
        wide = nn.functional.pad(before, (1, 1, 1, 1))
        found = {
            (i, j, flip)
            for i in range(3)
            for j in range(3)
            for flip, source in ((False, wide), (True, wide.flip(2)))
            if source[:, i : i + 5, j : j + 5].equal(after)
        }
        assert len(found) == 1
        seen |= found
    assert len(seen) == 18
