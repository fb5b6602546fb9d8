"""freeze on whole networks, files of weights, ONNX: what the table of layers does not reach."""

from __future__ import annotations

import importlib
import json
import pickle
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lipbook
from lipbook import convolutions, export
from lipbook.activations import Householder, MaxMin
from lipbook.attention import L2MultiheadAttention
from lipbook.composition import Box, Residual, Sum, lipschitz_bound, lipschitz_lower_bound
from lipbook.convolutions import (
    BCOP,
    CayleyConv2d,
    OrthogonalConv2d,
)
from lipbook.export import (
    ConvolutionStep,
    DenseStep,
    export_onnx,
    freeze,
    freeze_rule,
    load_weights,
    save_weights,
)
from lipbook.orthogonal import OrthogonalLinear, UnitNormLinear
from lipbook.pooling import NormPooling
from lipbook.residual import CPLConv2d, SLLConv2d, SLLLinear


def classifier() -> nn.Sequential:
    return nn.Sequential(
        OrthogonalConv2d(1, 4, 3),
        MaxMin(),
        Residual(nn.Sequential(OrthogonalConv2d(4, 4, 3), MaxMin())),
        OrthogonalConv2d(4, 8, 2, stride=2),
        SLLConv2d(8, 4),
        nn.BatchNorm2d(8),
        NormPooling(2),
        nn.Dropout(),
        nn.Flatten(),
        Sum(OrthogonalLinear(32, 16, method="polar"), OrthogonalLinear(32, 16, method="cayley")),
        Householder(16),
        UnitNormLinear(16, 3),
    )


SHAPE = (1, 8, 8)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Autoencoder(nn.Module):
    """Names, a list, a shared layer, shared tensors and a weight that is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = OrthogonalLinear(6, 4)
        self.blocks = nn.ModuleList([SLLLinear(4), nn.Linear(4, 4), OrthogonalLinear(4, 4)])
        self.blocks.append(self.blocks[2])
        self.output = nn.Linear(4, 4)
        self.output.weight = self.blocks[1].weight
        self.output.bias = self.encoder.bias
        self.of_encoder = [self.encoder]  # which torch does not search
        self.shift = torch.ones(6)
        self.register_buffer("mean", torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x - self.mean)
        for block in self.blocks:
            x = block(x)
        return self.output(x) @ self.of_encoder[0].weight + self.shift


# ------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("training", [True, False])
def test_a_network_freezes_to_the_same_bits(training: bool) -> None:
    model = classifier()
    model(torch.randn(16, *SHAPE))  # statistics for the batch norm
    model.train(training)
    before, flags = bits(model), [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    frozen = freeze(model)
    assert same(bits(model), before)
    assert [module.training for module in model.modules()] == flags
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    x = torch.randn(4, *SHAPE)
    assert torch.equal(frozen(x), model.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), model(x))
    assert list(frozen.state_dict())[:2] == ["0.weight", "0.bias"]


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Transposed(nn.Linear):
    """Sees a tensor that is not contiguous."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(0, 1))


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(8, 2, batch_first=True),
    "encoder layer": encoder,
    "encoder layer, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(encoder(), 2),
    "trained layers before": lambda: nn.Sequential(nn.Linear(8, 8), encoder()),
    "transposed": lambda: Transposed(8, 8),
    "recurrent": lambda: nn.LSTM(8, 8, 2),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trained", ["all", "none", "norms"])
def test_sequences_freeze_to_the_same_bits(
    name: str, mode: Callable[[], Any], trained: str
) -> None:
    """Torch chooses kernels by whether a weight requires gradients: the copy takes the same."""
    model, x = SEQUENCES[name]().eval(), torch.randn(5, 7, 8)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or (trained == "norms" and "norm" in key))
    frozen = freeze(model)
    loaded = pickle.loads(pickle.dumps(frozen))
    with mode():
        before = output(model, x)
        for copied in (frozen, loaded, freeze(frozen)):
            found = output(copied, x)
            assert not found.requires_grad
            torch.testing.assert_close(found, before)
            assert torch.equal(found, before) or (name, trained) == ("transposed", "all")
    x.requires_grad_()
    gradients = [torch.autograd.grad(output(each, x).sum(), x)[0] for each in (frozen, model)]
    torch.testing.assert_close(*gradients)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_freeze_to_the_same_bits(kind: type[nn.RNNBase], dtype: Any) -> None:
    """Torch chooses the products by the flags of the weights, at some sizes with other bits."""
    for seed in range(20):
        torch.manual_seed(seed)
        inputs, hidden, length, batch = (int(n) for n in torch.randint(1, 9, (4,)))
        layer = kind(
            inputs, hidden, 2, batch_first=True, bidirectional=seed % 2 > 0, bias=seed % 3 > 0
        )
        model, x = layer.eval().to(dtype), torch.randn(batch, length, inputs, dtype=dtype)
        frozen = pickle.loads(pickle.dumps(freeze(model)))
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert torch.equal(output(frozen, x), output(model, x))
    assert repr(frozen) == repr(model)
    bounds = [lipschitz_bound(each, x.shape[1:], output=0).value for each in (frozen, model)]
    assert bounds[0] == bounds[1]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # by torch
def test_frozen_transformers_are_those_of_torch() -> None:
    """In print, for compilers, transformations and bounds; and their weights can be trained."""
    model, x = encoder().eval(), torch.rand(2, 3, 8)
    frozen = freeze(model)
    assert repr(frozen) == repr(model)
    assert isinstance(frozen, nn.TransformerEncoderLayer)
    bounds = [lipschitz_bound(each, (3, 8), domain=Box(0, 1)).value for each in (frozen, model)]
    assert bounds[0] == bounds[1]
    rows = [torch.func.jacrev(lambda z, m=m: m(z[None]))(x[0]) for m in (frozen, model)]
    torch.testing.assert_close(*rows)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have none
        tangents = [torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (frozen, model)]
    torch.testing.assert_close(*tangents)
    mapped = torch.func.vmap(lambda z: frozen(z[None])[0])(x)
    torch.testing.assert_close(mapped, model(x))
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    frozen.linear1.weight.requires_grad_()
    frozen(x).sum().backward()
    assert frozen.linear1.weight.grad is not None


def test_weights_under_a_constraint_keep_their_kernels() -> None:
    model, x = encoder().eval(), torch.randn(2, 3, 8)
    parametrizations.orthogonal(model.linear1)
    assert torch.equal(freeze(model)(x), model(x))


def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_encoder_treats_padded_places_as_the_original(trained: bool) -> None:
    """Without gradients, torch returns 0 there."""
    model, x = nn.TransformerEncoder(encoder(), 2).eval(), torch.randn(2, 4, 8)
    model.requires_grad_(trained)
    padded = torch.tensor([[False, False, True, True], [False, False, False, False]])
    frozen = freeze(model)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            expected = model(x, src_key_padding_mask=padded)
            assert torch.equal(frozen(x, src_key_padding_mask=padded), expected)
            assert bool((expected[0, 2:] == 0).all()) == (mode is torch.no_grad or not trained)


def test_the_bound_of_a_frozen_network_is_that_of_the_network() -> None:
    model = classifier().eval()
    bound, of_frozen = lipschitz_bound(model, SHAPE), lipschitz_bound(freeze(model), SHAPE)
    assert of_frozen.value == bound.value
    assert [part.value for part in of_frozen.parts] == [part.value for part in bound.parts]
    assert of_frozen.kind == bound.kind
    below = lipschitz_lower_bound(freeze(model), torch.randn(2, *SHAPE), steps=3)
    assert 0 < below.value <= bound.value


def test_network_and_copy_share_nothing() -> None:
    model = classifier().eval()
    frozen, x = freeze(model), torch.randn(2, *SHAPE)
    expected, before = model(x).detach(), bits(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    own = {tensor.untyped_storage().data_ptr() for tensor in frozen.state_dict().values()}
    assert not storages & own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7).add_(0.1)
    assert torch.equal(frozen(x), expected)
    assert not torch.equal(model(x), expected)
    model.load_state_dict(before)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert not {id(m) for m in model.modules()} & {id(m) for m in frozen.modules()}


def test_gradients_flow_to_the_inputs() -> None:
    model, x = classifier().eval(), torch.randn(2, *SHAPE, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (found,) = torch.autograd.grad(freeze(model)(x).square().sum(), x)
    assert torch.equal(found, expected)
    assert found.norm() > 0


def test_structure_and_sharing_are_kept() -> None:
    model, x = Autoencoder(), torch.randn(3, 6)
    frozen: Any = freeze(model)
    assert type(frozen) is Autoencoder
    assert torch.equal(frozen(x), model(x))
    assert [type(block) for block in frozen.blocks] == [DenseStep, *[nn.Linear] * 3]
    assert frozen.blocks[2] is frozen.blocks[3]
    assert frozen.output.weight is frozen.blocks[1].weight
    assert frozen.output.bias is frozen.encoder.bias
    assert frozen.of_encoder[0] is frozen.encoder
    assert type(frozen.encoder) is nn.Linear
    assert frozen.shift is not model.shift
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), model(x))


def test_freezing_twice_is_freezing_once() -> None:
    frozen, x = freeze(classifier()), torch.randn(2, *SHAPE)
    again = freeze(frozen)
    assert str(again) == str(frozen)
    assert torch.equal(again(x), frozen(x))


class Product(nn.Module):
    """A parametrization that autocast reaches, and whose value is a part of a larger tensor."""

    def forward(self, weight: Tensor) -> Tensor:
        eye = torch.eye(weight.shape[1])
        return torch.cat([weight @ eye, weight])[: len(weight)]


def test_freeze_in_odd_surroundings() -> None:
    """Under autocast, in inference mode, inside the cache, without touching the generator."""
    model, x = Autoencoder(), torch.randn(3, 6)
    parametrize.register_parametrization(model.output, "weight", Product())
    expected = model(x)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), parametrize.cached():
        frozen = freeze(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(frozen(x), expected)
    for tensor in frozen.state_dict().values():
        assert not tensor.is_inference()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that torch's compiler gives of itself
def test_a_layer_compiled_in_place_is_frozen_as_it_was() -> None:
    model, x = nn.Sequential(OrthogonalLinear(4, 4), nn.ReLU()), torch.randn(3, 4)
    expected = model(x)
    for module in (model[0], model):
        module.compile(backend="eager")
    frozen = freeze(model)
    assert all(module._compiled_call_impl is None for module in frozen.modules())
    assert torch.equal(frozen(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), expected)


def test_an_average_is_frozen_as_it_is() -> None:
    average = torch.optim.swa_utils.AveragedModel(Autoencoder())
    x = torch.randn(3, 6)
    assert torch.equal(freeze(average.module)(x), average(x))
    assert torch.equal(freeze(average)(x), average(x))


# ------------------------------------------------------------------------ geometry, by theorem


@settings(max_examples=60)
@example(2, 2, 1, 1, 1, "same", "zeros", False, "Orthogonal", 0)  # padded by one more on one side
@given(
    dims=st.integers(1, 3),
    k=st.integers(1, 4),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    padding=st.sampled_from(["same", "valid", 0, 1]),
    mode=st.sampled_from(["circular", "zeros"]),
    double=st.booleans(),
    kind=st.sampled_from(["Orthogonal", "Nonexpansive", "Transpose"]),
    seed=st.integers(0, 99),
)
def test_convolutions_of_every_geometry_freeze_to_the_same_bits(
    dims: int,
    k: int,
    stride: int,
    dilation: int,
    groups: int,
    padding: Any,
    mode: str,
    double: bool,
    kind: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    name = "OrthogonalConvTranspose" if kind == "Transpose" else f"{kind}Conv"
    try:
        layer: nn.Module = getattr(convolutions, f"{name}{dims}d")(
            4,
            6,
            k,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            padding_mode=mode,
            dtype=torch.float64 if double else torch.float32,
        )
    except ValueError:
        assume(False)
    shape = (4, *(8, 6, 4)[:dims])
    x = torch.randn(2, *shape, dtype=layer.bias.dtype)
    frozen = freeze(layer)
    assert torch.equal(frozen(x), layer(x))
    assert lipschitz_bound(frozen, shape).value == lipschitz_bound(layer, shape).value
    plain = type(frozen).__module__.startswith("torch.nn")
    assert plain == (
        (mode == "zeros" and layer.padding != "same")
        or (mode == "circular" and stride == 1 and kind != "Transpose")
    )
    assert plain or type(frozen) is type(layer).__mro__[1]
    assert not hasattr(frozen, "_pads") or not plain


def test_channels_last_agrees_to_rounding() -> None:
    """Torch's circular padding returns the default layout, ours keeps that of the image."""
    layer = OrthogonalConv2d(8, 8, 3)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(freeze(layer)(x), layer(x), rtol=0, atol=1e-5)


def test_a_frozen_strided_layer_still_refuses_what_the_stride_does_not_divide() -> None:
    with pytest.raises(ValueError, match="input must have a size that stride divides"):
        freeze(OrthogonalConv2d(2, 4, 3, stride=2))(torch.randn(1, 2, 5, 6))


# ------------------------------------------------------------------- parametrizations of others


def test_parametrizations_of_torch() -> None:
    """Torch's spectral norm runs a power iteration when it is read in training mode."""
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        parametrizations.orthogonal(nn.Linear(5, 4)),
        nn.Unflatten(1, (1, 4)),
        parametrize.register_parametrization(
            nn.Conv1d(1, 3, 2, padding=1), "weight", BCOP((3, 1, 2))
        ),
    )
    before, x = bits(model), torch.randn(3, 4)
    frozen = freeze(model)
    assert same(bits(model), before)
    assert [type(m) for m in frozen] == [nn.Linear] * 3 + [nn.Unflatten, nn.Conv1d]
    assert torch.equal(frozen(x), model.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), model(x))
    frozen.load_state_dict(bits(frozen))  # no hook of weight_norm is left


def test_several_tensors_and_buffers_can_be_parametrized() -> None:
    layer = nn.BatchNorm1d(3)
    for name in ("weight", "bias", "running_var"):
        parametrize.register_parametrization(layer, name, nn.Softplus())
    x = torch.randn(4, 3)
    frozen: Any = freeze(layer)
    assert torch.equal(frozen(x), layer.eval()(x))
    assert set(dict(frozen.named_parameters())) == {"weight", "bias"}
    assert set(dict(frozen.named_buffers())) == set(dict(nn.BatchNorm1d(3).named_buffers()))


class Doubled(OrthogonalLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Halved(SLLLinear):
    def scale(self) -> Tensor:
        return 2 * super().scale()


def test_subclasses_keep_what_they_compute() -> None:
    x = torch.randn(3, 4)
    for layer, cls in ((Doubled(4, 3), Doubled), (Halved(4), Halved)):
        frozen = freeze(layer)
        assert type(frozen) is cls
        assert torch.equal(frozen(x), layer(x))
        assert not parametrize.is_parametrized(frozen)
    patched: Any = OrthogonalConv2d(2, 2, 3)
    patched.forward = types.MethodType(
        lambda self, x: 3 * OrthogonalConv2d.forward(self, x), patched
    )
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(freeze(patched)(x), patched(x))
    assert freeze(patched).forward.__self__ is not patched


def test_steps_store_their_scale() -> None:
    for layer, cls in ((SLLLinear(4, 6), DenseStep), (CPLConv2d(2, 3), ConvolutionStep)):
        layer.half()  # whose scale is computed in float32
        frozen: Any = freeze(layer)
        assert type(frozen) is cls
        assert set(frozen.state_dict()) == {"weight", "bias", "diagonal"}
        assert frozen.diagonal.dtype == torch.float32
        assert torch.equal(frozen.scale(), layer.scale())
        with torch.no_grad():
            frozen.weight.mul_(3)
        assert torch.equal(frozen.scale(), layer.scale())
        assert lipschitz_bound(frozen.float(), (4,) if cls is DenseStep else (2, 4, 4)).value > 1


# --------------------------------------------------------------------------------- rules of users


class Quotient(nn.Module):
    """Divides its branch by a bound that it computes in each call."""

    def __init__(self, branch: nn.Linear) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) / self.branch.weight.norm()


class Fixed(nn.Module):
    def __init__(self, branch: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.branch = branch
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) / self.factor


def test_a_rule_gets_a_copy_with_frozen_children() -> None:
    seen = []

    @freeze_rule.register
    def _(module: Quotient) -> nn.Module:
        seen.append(module)
        return Fixed(module.branch, module.branch.weight.norm())

    model = nn.Sequential(Quotient(OrthogonalLinear(3, 3)))
    model.append(model[0])
    x = torch.randn(2, 3)
    frozen = freeze(model)
    assert len(seen) == 1
    assert seen[0] is not model[0]
    assert not seen[0].training
    assert type(seen[0].branch) is nn.Linear
    assert [type(module) for module in frozen] == [Fixed, Fixed]
    assert frozen[0] is frozen[1]
    assert torch.equal(frozen(x), model(x))
    assert model.training


class Nothing(nn.Module):
    pass


@freeze_rule.register
def _(module: Nothing) -> Any:
    return None


# ------------------------------------------------------------------------------------ refusals


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reads", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.reads += 1
        return weight


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = {"first": OrthogonalLinear(2, 2)}


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.last = self.layer(torch.ones(1, 2))


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.file = sys.stdout


def hooked(kind: str) -> nn.Module:
    layer = nn.Linear(2, 2)
    getattr(layer, f"register_{kind}")(lambda *_: None)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that torch's compiler gives of itself
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hooked("forward_hook"), r"'0' \(Linear\): hooks are no part .*hooked.*lambda"),
        (lambda: hooked("forward_pre_hook"), "hooks are no part of a plain copy"),
        (lambda: hooked("full_backward_hook"), "hooks are no part of a plain copy"),
        (lambda: hooked("full_backward_pre_hook"), "hooks are no part of a plain copy"),
        (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), r"parametrizations.*got \['WeightNorm'\]"),
        (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), r"got \['SpectralNorm'\]"),
        (lambda: nn.LazyLinear(2), r"'0' \(LazyLinear\): "),
        (lambda: nn.Linear(2, 2, device="meta"), "weight has no values yet"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(2, 2, bias=False, device="meta")),
            "weight.original0 has no values yet",
        ),
        (
            lambda: parametrize.register_parametrization(nn.Linear(2, 2), "weight", Noise()),
            r"'0' \(Linear\): weight changes each time it is read",
        ),
        (
            lambda: parametrize.register_parametrization(nn.Linear(2, 2), "bias", Counting()),
            r"'0' \(Linear\): bias changes each time it is read",
        ),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), r"'0' \(DataParallel\): .*its .module"),
        (lambda: torch.compile(nn.Linear(2, 2)), r"'0' \(OptimizedModule\): is compiled"),
        (Hidden, "a OrthogonalLinear with parametrizations is in an attribute"),
        (Remembering, r"'0' \(Remembering\): last is the result of a computation"),
        (Holding, "Sequential: cannot pickle"),
    ],
)
def test_what_cannot_be_frozen_is_refused_by_name(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        freeze(nn.Sequential(make()))


def test_refusals_name_the_path() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), Residual(hooked("forward_hook"))))
    with pytest.raises(ValueError, match=r"^'0\.1\.branch' \(Linear\): hooks"):
        freeze(model)
    with pytest.raises(ValueError, match=r"^Linear: hooks"):
        freeze(hooked("forward_hook"))
    with pytest.raises(TypeError, match=r"^'0' \(Nothing\): its freezing rule must return"):
        freeze(nn.Sequential(Nothing()))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        freeze(lambda x: x)  # type: ignore[arg-type]


def test_a_refused_model_is_left_alone() -> None:
    model = nn.Sequential(OrthogonalLinear(2, 2), hooked("forward_hook")).train()
    before = bits(model)
    with pytest.raises(ValueError, match="hooks"):
        freeze(model)
    assert same(bits(model), before)
    assert model.training
    assert parametrize.is_parametrized(model[0])


# ---------------------------------------------------------------------------------------- weights


def header(path: Path) -> dict[str, Any]:
    """Of a safetensors file, by its definition: eight bytes of length, then JSON."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.mark.parametrize("prepare", [lambda model: model, freeze])
def test_weights_round_trip(prepare: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    saved, loaded, path = prepare(classifier()), prepare(classifier()), tmp_path / "a.safetensors"
    before, x = bits(saved), torch.randn(2, *SHAPE)
    assert not same(before, bits(loaded))
    save_weights(saved, path)
    load_weights(loaded, path)
    assert same(before, bits(saved))
    assert same(before, bits(loaded))
    assert torch.equal(loaded.eval()(x), saved.eval()(x))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(OrthogonalLinear(2, 3, method="cayley"), MaxMin(), nn.BatchNorm1d(3))
    save_weights(model, str(tmp_path / "a.safetensors"))
    found = header(tmp_path / "a.safetensors")
    metadata = found.pop("__metadata__")
    assert found.keys() == model.state_dict().keys()
    assert metadata["lipbook"] == lipbook.__version__
    assert metadata["torch"] == torch.__version__
    assert json.loads(metadata["classes"]) == {
        "0": "OrthogonalLinear",
        "0.parametrizations.weight": "ParametrizationList",
        "0.parametrizations.weight.0": "Cayley",
        "2": "BatchNorm1d",
    }


def test_shared_and_strided_tensors_can_be_stored(tmp_path: Path) -> None:
    saved, loaded, x = Autoencoder(), Autoencoder(), torch.randn(3, 6)
    saved.encoder.bias = saved.output.bias = nn.Parameter(torch.randn(8)[::2])
    save_weights(saved, tmp_path / "a.safetensors")
    load_weights(loaded, tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), saved(x))
    assert loaded.output.weight is loaded.blocks[1].weight


def test_a_file_of_safetensors_itself_can_be_loaded(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    frozen, model = freeze(OrthogonalLinear(3, 2)), nn.Linear(3, 2)
    contiguous = {name: tensor.contiguous() for name, tensor in bits(frozen).items()}
    save_file(contiguous, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors")
    assert same(bits(model), bits(frozen))


@pytest.mark.parametrize(
    ("make", "differences"),
    [
        (
            lambda: OrthogonalLinear(4, 4, method="polar"),
            ["'parametrizations.weight.0': QR in the file, Polar in the model"],
        ),
        (
            lambda: OrthogonalLinear(4, 5),
            [
                "'bias': float32 of shape (4,) in the file, float32 of shape (5,) in the model",
                "'parametrizations.weight.original': float32 of shape (4, 4) in the file, "
                "float32 of shape (5, 4) in the model",
            ],
        ),
        (
            lambda: OrthogonalLinear(4, 4, dtype=torch.float64),
            [
                "'bias': float32 of shape (4,) in the file, float64 of shape (4,) in the model",
                "'parametrizations.weight.original': float32 of shape (4, 4) in the file, "
                "float64 of shape (4, 4) in the model",
            ],
        ),
        (
            lambda: OrthogonalLinear(4, 4, bias=False),
            ["'bias': float32 of shape (4,) in the file, nothing in the model"],
        ),
        (
            lambda: freeze(OrthogonalLinear(4, 4)),
            [
                "'': OrthogonalLinear in the file, Linear in the model",
                "'parametrizations.weight': ParametrizationList in the file, nothing in the model",
                "'parametrizations.weight.0': QR in the file, nothing in the model",
                "'weight': nothing in the file, float32 of shape (4, 4) in the model",
                "'parametrizations.weight.original': float32 of shape (4, 4) in the file, "
                "nothing in the model",
            ],
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    make: Callable[[], nn.Module], differences: list[str], tmp_path: Path
) -> None:
    save_weights(OrthogonalLinear(4, 4), tmp_path / "a.safetensors")
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match="path must hold the weights of this model") as caught:
        load_weights(model, tmp_path / "a.safetensors")
    first, *rest = str(caught.value).split("\n  ")
    assert rest == differences
    assert first.endswith(f"got {len(differences)} difference{'s' * (differences[1:] != [])}:")
    assert same(bits(model), before)


def test_other_files_and_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"path must be a safetensors file, got .*a\.safetensors"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.safetensors")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="path must be a safetensors file"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        load_weights(nn.Linear(2, 2), tmp_path / "b.safetensors")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        save_weights({}, tmp_path / "b.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'weight' has no values yet"):
        save_weights(nn.Linear(2, 2, device="meta"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'weight' has no values yet"):
        save_weights(nn.LazyLinear(2), tmp_path / "b.safetensors")

    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return "more"

    with pytest.raises(TypeError, match=r"'0\._extra_state' must be a tensor .* got str"):
        save_weights(nn.Sequential(Extra()), tmp_path / "b.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def half(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    module = pytest.importorskip("safetensors.torch")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half)
        with pytest.raises(OSError, match="disk full"):
            save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    save_weights(nn.Linear(3, 2), path)  # an existing file is replaced
    load_weights(nn.Linear(3, 2), path)


# ------------------------------------------------------------------------------------------- ONNX


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Stuck(nn.Module):
    """Makes two outputs of any batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


class Prefixed(nn.Module):
    """A token before each sequence, for as many sequences as torch is told that there are."""

    def __init__(self, count: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.token, self.count = nn.Parameter(torch.zeros(1, 1, 4)), count
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.token.expand(self.count(x), -1, -1)
        return self.linear(torch.cat([tokens, x], 1)).mean(1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.shape[0] == 2 else x


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, "three entries"
        return x


class Spectrum(nn.Module):
    """Of which torch has no translation to ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.unflatten(1, (2, 2)))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (lambda x: x, (2,), "model must be a torch.nn.Module"),
        (hooked("forward_hook"), (2,), "Linear: hooks are no part"),
        (
            nn.Sequential(nn.ReLU(), CayleyConv2d(1, 1, 3, 4)),
            (1, 4, 4),
            r"'1' \(CayleyConv2d\): multiplies complex numbers",
        ),
        (nn.Linear(3, 2), (4,), r"input_shape must be one that model runs on, got \(4,\)"),
        (Pair(), (2,), "model must return one tensor, got tuple"),
        (Stuck(), (2,), r"model must keep samples apart, .* shape \(2, 1\) of a batch of 1"),
        (Prefixed(len), (3, 4), r"graph for 2 only: in forward, read the size as x.shape\[0\]"),
        (Branching(), (3,), "model must take batches of any size"),
        (Deciding(), (3,), "must return finite floating-point numbers .* torch.int64"),
        (Undefined(), (3,), "must return finite floating-point numbers"),
        (Asserting(), (4,), r"one that model runs on, got \(4,\): three entries"),
        (nn.ReLU(), (-1,), "input_shape must hold one or more positive integers"),
        (nn.ReLU(), 3, "input_shape must be a sequence of integers, got 3"),
    ],
)
def test_onnx_refusals(model: Any, shape: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises((TypeError, ValueError), match=message):
        export_onnx(model, tmp_path / "a.onnx", shape)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_disagrees_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another net of the same shape, one with another output, and an operator without ONNX."""
    pytest.importorskip("onnxruntime")
    graph = export._onnx_graph
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    for other, message in (
        (nn.Linear(2, 3), "onnxruntime must agree with torch to 1e-5, got"),
        (nn.Linear(2, 4), r"onnxruntime must agree with torch on the shape \(2, 3\) .* \(2, 4\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(export, "_onnx_graph", lambda _, *rest, other=other: graph(other, *rest))
            with pytest.raises(ValueError, match=message):
                export_onnx(OrthogonalLinear(2, 3), path, (2,))
    with pytest.raises(ValueError, match=r"model cannot be written as ONNX: .*linalg_eigh"):
        export_onnx(Spectrum(), path, (4,))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(("gap", "agrees"), [(0.9e-5, True), (1.1e-5, False)])
@pytest.mark.parametrize("size", [0.1, 100.0])
def test_a_graph_may_differ_by_a_hundred_thousandth(
    size: float, gap: float, agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the largest output, or of 1: here outputs are constant."""
    pytest.importorskip("onnxruntime")
    graph, net, other = export._onnx_graph, nn.Linear(1, 1), nn.Linear(1, 1)
    for model, value in ((net, size), (other, size + gap * max(size, 1))):
        model.weight.data.zero_()
        model.bias.data.fill_(value)
    monkeypatch.setattr(export, "_onnx_graph", lambda _, *rest: graph(other, *rest))
    if agrees:
        export_onnx(net, tmp_path / "a.onnx", (1,))
    else:
        with pytest.raises(ValueError, match="must agree with torch to 1e-5"):
            export_onnx(net, tmp_path / "a.onnx", (1,))


def test_the_advice_for_a_graph_of_one_size_helps(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Prefixed(lambda x: x.shape[0]), torch.randn(7, 3, 4)
    export_onnx(model, tmp_path / "a.onnx", (3, 4))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    assert (found - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize(("nonexpansive", "is_causal"), [(False, False), (True, True)])
def test_l2_attention_in_onnx(nonexpansive: bool, is_causal: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = L2MultiheadAttention(4, 2, nonexpansive=nonexpansive, is_causal=is_causal)
    x = 3 * torch.randn(7, 5, 4)
    export_onnx(layer, tmp_path / "a.onnx", (5, 4))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(found, layer(x))
    divided = L2MultiheadAttention(4, 2, is_causal=is_causal)
    divided.load_state_dict(layer.state_dict())
    assert (found.norm() < 0.7 * divided(x).norm()) == nonexpansive


class FailingError(Exception):
    """What a package raises that knows nothing of ValueError."""


@pytest.mark.parametrize(
    ("package", "attribute", "message"),
    [
        ("onnx.checker", "check_model", "model cannot be written as ONNX: no luck"),
        ("torch.onnx", "export", "model cannot be written as ONNX: no luck"),
        ("onnxruntime", "InferenceSession", "onnxruntime cannot load the graph of model: no luck"),
    ],
)
def test_whatever_another_package_raises_is_a_value_error_and_writes_nothing(
    package: str, attribute: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*_: Any, **__: Any) -> None:
        raise FailingError("no luck")

    monkeypatch.setattr(importlib.import_module(package), attribute, fail)
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(nn.Linear(2, 2), path, (2,))
    assert isinstance(caught.value.__cause__, FailingError)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_an_error_while_the_graph_runs_is_named_with_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")

    class Session(runtime.InferenceSession):  # type: ignore[misc]
        def run(self, names: Any, inputs: Any) -> Any:
            if len(inputs["input"]) == 5:
                raise FailingError("no luck")
            return super().run(names, inputs)

    monkeypatch.setattr(runtime, "InferenceSession", Session)
    with pytest.raises(ValueError, match="cannot run the graph of model on a batch of 5: no luck"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", (2,))
    assert not list(tmp_path.iterdir())


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="opset_version must be one that torch can write"):
        export_onnx(nn.ReLU(), tmp_path / "a.onnx", (2,), opset_version=3)
    assert not list(tmp_path.iterdir())


def test_a_float64_model_in_training_becomes_a_float32_graph(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(OrthogonalConv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Dropout())
    model.double()
    before, x = bits(model), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    export_onnx(model, tmp_path / "a.onnx", [1, 4, 4], opset_version=18)
    assert same(bits(model), before)
    assert model.training
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = session.run(None, {"input": x.float().numpy()})[0]
    assert (torch.from_numpy(found) - model.eval()(x)).abs().max() < 1e-5
    onnx = pytest.importorskip("onnx")
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 18


# --------------------------------------------------------------------------------- optional parts


JOINS: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Sum(OrthogonalLinear(6, 6), nn.Tanh(), nn.Identity()),
    "residual": lambda: Residual(nn.Sequential(OrthogonalLinear(6, 6), MaxMin())),
    "sum of sums": lambda: Sum(Residual(OrthogonalLinear(6, 6)), Sum(MaxMin(), nn.ReLU())),
    "sum to one output": lambda: Sum(UnitNormLinear(6, 1), UnitNormLinear(6, 1)),
}


@pytest.mark.parametrize("name", JOINS)
def test_sums_in_onnx_take_batches_of_any_size(name: str, tmp_path: Path) -> None:
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    model = JOINS[name]()
    export_onnx(model, tmp_path / "a.onnx", (6,))
    graph = onnx.load(tmp_path / "a.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param  # a name, not a number
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for batch in (1, 2, 3, 7, 64):
        x = torch.randn(batch, 6)
        (found,) = session.run(["output"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=0)


def test_freeze_needs_torch_only() -> None:
    code = """if True:
        import sys
        extra = ("onnx", "onnxscript", "onnxruntime", "safetensors")
        sys.modules |= dict.fromkeys(extra)
        import torch
        from lipbook.export import freeze
        from lipbook.orthogonal import OrthogonalLinear
        print(freeze(OrthogonalLinear(3, 2)))
    """
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "Linear(in_features=3, out_features=2, bias=True)\n"


def test_all_is_complete() -> None:
    public = {
        name
        for name, value in vars(export).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == export.__name__
    }
    passed_on = {"freeze", "freeze_rule", "DenseStep", "ConvolutionStep", "EnergyStep"}
    passed_on |= {"SandwichStep"}
    assert public | passed_on == set(export.__all__)


def test_only_modules_are_frozen() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        freeze("model")  # type: ignore[arg-type]


def test_a_frozen_layer_of_torch_has_its_class_where_pickle_finds_it() -> None:
    cls = type(freeze(nn.GRU(2, 3, batch_first=True)))
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls
