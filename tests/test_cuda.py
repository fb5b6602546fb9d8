"""Programs on a GPU: what is refused, and bounds against arithmetic that is as bad as allowed.

Where there is no GPU, tensors pretend to lie on one. They refuse to meet tensors of the CPU as
CUDA's do, and multiply matrices by the worst that the model of rounding allows: sums of products in
a random order, split at random, fused or not, with small numbers flushed to zero.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from lipbook.activations import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    HouseholderOrder2,
    MaxMin,
    NActivation,
    SmoothAbsoluteValue,
)
from lipbook.composition import Bound, Box, lipschitz_rule
from lipbook.convolutions import (
    NonexpansiveConv2d,
    OrthogonalConv2d,
    OrthogonalConvTranspose2d,
    SkewOrthogonalConv2d,
)
from lipbook.distances import InfinityDistance
from lipbook.errors import CUDA_HYPOTHESES, matmul_setting, moved_error
from lipbook.freezing import freeze
from lipbook.graphs.graph import Graph, Node
from lipbook.layers.joins import Add, Concatenate, Join, Maximum, Subtract
from lipbook.layers.rearrangements import Clamp, Constant, Diagonal, MatrixProduct, Shift
from lipbook.orthogonal import OrthogonalLinear, Scale
from lipbook.pooling import AveragePooling, NormPooling
from lipbook.robustness import Certifier, Standardize, certify
from lipbook.rounding import cuda_rule, forward_error, forward_error_rule, graph_error, ieee_cuda

aten: Any = torch.ops.aten
INF = float("inf")
TINY = torch.finfo(torch.float32).tiny


class Pretended(Tensor):
    """A tensor of the CPU that says that it lies on a GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: Any, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cuda:0",
        )

    def __init__(self, values: Tensor) -> None:
        self.held = values

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        copied = Pretended(self.held.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS or (func is Tensor.__getitem__ and not isinstance(args[1], Tensor)):
            args, kwargs = held((args, kwargs))  # for which torch wants CUDA's library
            with _disable_current_modes():
                found = FUNCTIONS.get(func, func)(*args, **kwargs)
            return Pretended(found) if isinstance(found, Tensor) else found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Machine(TorchDispatchMode):
    """A machine with a GPU of pretended tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretended) else leaf, tree)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = any(isinstance(leaf, Pretended) for leaf in tensors)
    if there and func not in (aten._to_copy.default, aten.copy_.default):
        for leaf in tensors:
            if leaf.dim() and not isinstance(leaf, Pretended):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = held((args, kwargs))
    found = func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return found
    if not there:
        return found
    return tree_map(lambda leaf: Pretended(leaf) if isinstance(leaf, Tensor) else leaf, found)


# ----------------------------------------------------------- sums as bad as the model allows


class Sums:
    """How the pretended GPU sums: at random, or the largest products first, one by one."""

    def __init__(self, seed: int = 0, largest_first: bool = False) -> None:
        self.seed, self.largest_first = seed, largest_first

    def __call__(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Sum products in float64, (..., k), and a bias, rounding each result to float32."""
        k, shape = products.shape[-1], products.shape[:-1]
        chance = random.Random(f"{self.seed} {tuple(shape)}")  # a program repeats itself
        order = list(range(k))
        chance.shuffle(order)
        starts = [0, *sorted(chance.sample(range(k), k // 5)), k]
        if self.largest_first:
            order = products.abs().flatten(0, -2).amax(0).argsort(descending=True).tolist()
            starts = [0, k]
        terms = np.moveaxis(products.numpy(), -1, 0)
        partial = [] if bias is None else [np.broadcast_to(bias.double().numpy(), shape)]
        for start, end in itertools.pairwise(starts):
            total = np.zeros(shape)
            for j in order[start:end]:
                fused = chance.random() < 0.5
                total = rounded(total + (terms[j] if fused else rounded(terms[j])))
            partial.append(total)
        while len(partial) > 1:
            one = partial.pop(chance.randrange(len(partial)))
            other = chance.randrange(len(partial))
            partial[other] = rounded(partial[other] + one)
        return torch.from_numpy(partial[0].astype(np.float32))


def rounded(x: np.ndarray) -> np.ndarray:
    """To float32, with small numbers flushed to zero."""
    x = x.astype(np.float32).astype(np.float64)
    return np.where(np.abs(x) >= TINY, x, 0.0)


def read(x: Tensor) -> Tensor:
    """Numbers in float64, as the GPU reads them."""
    return torch.from_numpy(rounded(x.numpy()))


SUMS = Sums()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.dtype != torch.float32:
        return a @ b
    return SUMS(read(a)[..., :, None, :] * read(b).mT[..., None, :, :], bias)


def summed(function: Any, transposed: bool) -> Callable[..., Tensor]:
    """A convolution whose products are told apart, one for each tap and channel that is read."""

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any
    ) -> Tensor:
        groups = geometry[3] if len(geometry) > 3 else named.get("groups", 1)
        reads = len(weight) // groups if transposed else weight.shape[1]
        taps = itertools.product(*map(range, weight.shape[2:]))
        terms = []
        for tap, channel in itertools.product(taps, range(reads)):
            channels = (slice(channel, None, reads), slice(None), *tap)
            at = channels if transposed else (slice(None), channel, *tap)
            kernel = torch.zeros_like(weight, dtype=torch.float64)
            kernel[at] = read(weight)[at]
            terms.append(function(read(x), kernel, None, *geometry, **named))
        if bias is not None:
            bias = bias.view(-1, *[1] * (weight.dim() - 2))
        return SUMS(torch.stack(terms, -1), bias)

    return convolution


FUNCTIONS: dict[Any, Any] = {
    torch.prelu: torch.prelu,
    **{function: function for function in (Tensor.tolist, Tensor.__float__, Tensor.__bool__)},
    torch.matmul: product,
    Tensor.matmul: product,
    functional.linear: lambda x, weight, bias=None: product(x, weight.mT, bias),
}
for function in (torch.conv1d, torch.conv2d, torch.conv3d):
    FUNCTIONS[function] = summed(function, False)
for function in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
    FUNCTIONS[function] = summed(function, True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
    monkeypatch.setattr(SUMS, "seed", 0)
    monkeypatch.setattr(SUMS, "largest_first", False)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with torch.no_grad(), Machine() as mode:
        yield mode
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def there(net: nn.Module) -> nn.Module:
    """Copy of a network on the GPU, pretended or not."""
    return freeze(net)._apply(lambda t: Pretended(t.detach()))


# --------------------------------------------------------------------------- bounds hold


class Joined(nn.Module):
    """Sums, differences, stacks and maxima of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        return torch.cat([a + b, a - 2 * b, torch.maximum(a, b)], 1)


class Moved(nn.Module):
    """Constants beside, products with numbers and matrices, clipping and moving."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 0.3) / 3 @ self.matrix * 1.7).flip(1).reshape(-1, 2, 3)


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (
        lambda: nn.Sequential(nn.Linear(24, 16), MaxMin(), OrthogonalLinear(16, 8), GroupSort(4)),
        (24,),
    ),
    "slopes": (
        lambda: nn.Sequential(
            nn.LeakyReLU(), nn.PReLU(), AbsoluteValue(), NActivation(9), Scale(0.3), FullSort()
        ),
        (9,),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2, 2, groups=2), nn.Flatten()
        ),
        (2, 4, 4),
    ),
    "line": (lambda: nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular"), (2, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, groups=2), (2, 2, 3)),
    "orthogonal": (
        lambda: nn.Sequential(
            OrthogonalConv2d(1, 2, 3, stride=2), OrthogonalConvTranspose2d(2, 1, 2, 2)
        ),
        (1, 4, 4),
    ),
    "distances": (
        lambda: nn.Sequential(InfinityDistance(9, 5), InfinityDistance(5, 3, decay=0.3)),
        (9,),
    ),
    "symmetric": (lambda: NonexpansiveConv2d(2, 2, 3), (2, 3, 3)),
    "means": (
        lambda: nn.Sequential(
            Standardize([0.5, 0.2], [0.3, 0.4]),
            AveragePooling(2),
            AveragePooling(2, 1, 1),
            nn.AvgPool2d(2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        (2, 6, 6),
    ),
    "joined": (Joined, (6,)),
    "moved": (Moved, (6,)),
}


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    return freeze(make().eval()), torch.randn(4, *shape)  # whose weights no device computes anew


@pytest.mark.parametrize(("name", "p"), [*zip(SMALL, itertools.cycle([1, 2, INF]))])
def test_any_sums_stay_within_the_bound(machine: Machine, name: str, p: float) -> None:
    net, x = small(name)
    on_gpu, double = there(net), copy.deepcopy(net).double()
    with ieee_cuda():
        bound = forward_error(on_gpu, Pretended(x), p)
        off = (bound.outputs.cpu().double() - double(x.double())).flatten(1)
        assert (off.norm(p, dim=1) <= bound.error).all()
        for size in (1e-3, 1.0):
            v = (x + size * torch.randn_like(x)).float()
            far = (v.double() - x.double()).flatten(1).norm(p, dim=1)
            off = (on_gpu(Pretended(v)).cpu().double() - double(v.double())).flatten(1)
            assert (off.norm(p, dim=1) <= bound.error + bound.slope * far).all()
    at_home = forward_error(net, x, p)  # the same constants, of outputs that differ by rounding
    assert bound.slope == at_home.slope
    assert bound.lipschitz == at_home.lipschitz
    assert torch.allclose(bound.error, at_home.error, rtol=1e-4)


@pytest.mark.parametrize("layer", ["linear", "convolution", "transposed"])
def test_n_roundings_are_attained(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    monkeypatch.setattr(SUMS, "largest_first", True)
    n, u = 60, 2.0**-24
    weight = torch.full((n,), 0.99 * u)
    weight[0] = 1.0  # beside which each of the others is rounded away
    net: nn.Module
    if layer == "linear":
        net, x = nn.Linear(n, 1, bias=False), torch.ones(1, n)
        net.weight.data = weight[None]
    elif layer == "convolution":
        net, x = nn.Conv1d(3, 1, n // 3, bias=False), torch.ones(1, 3, n // 3)
        net.weight.data = weight.view(1, 3, -1)
    else:
        net, x = nn.ConvTranspose1d(n, 1, 1, bias=False), torch.ones(1, n, 1)
        net.weight.data = weight.view(n, 1, 1)
    with ieee_cuda():
        bound = forward_error(there(net), Pretended(x), INF)
    off = abs(bound.outputs.item() - weight.double().sum().item())
    assert off > 0.96 * n * u
    assert off <= bound.error.item() <= 1.1 * off


def test_small_numbers_may_be_flushed(machine: Machine) -> None:
    net = nn.Linear(5, 2, bias=False)
    net.weight.data.fill_(1e30)
    x = torch.full((1, 5), TINY / 2)  # which is flushed before the product
    with ieee_cuda():
        bound = forward_error(there(net), Pretended(x), INF)
    off = (bound.outputs.cpu().double() - x.double() @ net.weight.double().mT).abs().max()
    assert 0 < off <= bound.error.item()


def test_a_certificate_of_a_program_on_a_gpu(machine: Machine) -> None:
    net, x = small("convolution")
    net = nn.Sequential(net, nn.Linear(8, 3)).eval()
    batch = x, torch.zeros(4, dtype=torch.long)
    with ieee_cuda():
        found = certify(there(net), [batch], (2, 4, 4))
    at_home = certify(net, [batch], (2, 4, 4))
    assert torch.allclose(found.radius, at_home.radius, rtol=1e-4)
    assert torch.equal(found.predictions, at_home.predictions)
    assert found.facts["assumed"] == list(CUDA_HYPOTHESES)
    assert found.facts["gpu"] == "a pretended GPU"
    assert "assumed" not in at_home.facts
    real = certify(there(net), [batch], (2, 4, 4), sound=False)
    assert torch.allclose(real.radius, certify(net, [batch], (2, 4, 4), sound=False).radius, 1e-4)


def test_a_prepared_network_keeps_to_ieee_cuda(machine: Machine) -> None:
    net = nn.Linear(2, 2).eval()
    batch = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    with ieee_cuda():
        certifier = Certifier(there(net), (2,))
        assert torch.allclose(certifier([batch]).radius, certify(net, [batch], (2,)).radius)
    with pytest.raises(ValueError, match=r"enter lipbook\.rounding\.ieee_cuda"):
        certifier([batch])


def test_logits_without_a_head(machine: Machine) -> None:
    net, x = small("slopes")
    with ieee_cuda():
        found = certify(there(net), [(x, torch.zeros(4, dtype=torch.long))], (9,))
    assert (found.radius > 0).all()


# ------------------------------------------------------------------------------- refusals


@pytest.mark.skipif(
    matmul_setting()[0] != "fp32_precision", reason="torch before 2.9 has the setting tested below"
)
def test_settings_are_chosen_and_come_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.enabled

    @ieee_cuda()
    def fail() -> None:
        assert (matmul.fp32_precision, cudnn.enabled) == ("ieee", False)
        with ieee_cuda():
            pass
        assert (matmul.fp32_precision, cudnn.enabled) == ("ieee", False)
        raise KeyError

    try:
        matmul.fp32_precision, cudnn.enabled = "tf32", True
        with pytest.raises(KeyError):
            fail()
        assert (matmul.fp32_precision, cudnn.enabled) == ("tf32", True)
    finally:
        matmul.fp32_precision, cudnn.enabled = before


def test_an_older_torch_has_another_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with ieee_cuda():
        assert matmul.allow_tf32 is False
    assert matmul.allow_tf32 is True


def test_other_settings_are_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = there(nn.Linear(2, 2)), Pretended(torch.ones(1, 2))
    way = r"enter lipbook\.rounding\.ieee_cuda\(\)"
    name, value = matmul_setting()
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    setattr(matmul, name, {"fp32_precision": "tf32", "allow_tf32": True}[name])
    try:
        with pytest.raises(ValueError, match=rf"cuda\.matmul\.{name} must be {value!r}.*{way}"):
            forward_error(net, x)
    finally:
        setattr(matmul, name, before)
    with ieee_cuda():
        forward_error(net, x)
        torch.backends.cudnn.enabled = True
        with pytest.raises(ValueError, match=r"cudnn\.enabled must be False.*got True: " + way):
            forward_error(net, x)
        torch.backends.cudnn.enabled = False
        for name in ("NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION"):
            monkeypatch.setenv(name, "0")
            forward_error(net, x)
            monkeypatch.setenv(name, "1")
            with pytest.raises(ValueError, match=f"{name} must be unset.*got '1': start"):
                forward_error(net, x)
            monkeypatch.delenv(name)
        monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
        with pytest.raises(ValueError, match="CUBLAS_EMULATE_DOUBLE_PRECISION must be unset"):
            forward_error(net, x)
        monkeypatch.delenv("CUBLAS_EMULATE_DOUBLE_PRECISION")
        monkeypatch.setenv("CUBLAS_EMULATION_STRATEGY", "eager")
        with pytest.raises(ValueError, match="CUBLAS_EMULATION_STRATEGY must be unset"):
            forward_error(net, x)
        monkeypatch.delenv("CUBLAS_EMULATION_STRATEGY")
        with pytest.raises(ValueError, match=r"dtype must be float32 or float64 on a GPU.*bfl"):
            forward_error(net, Pretended(torch.ones(1, 2).bfloat16()))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        with pytest.raises(ValueError, match="autocast computes in half precision"):
            forward_error(net, x)
        monkeypatch.setattr(torch.version, "hip", "6.0")
        with pytest.raises(ValueError, match="got one of AMD: certify on the CPU"):
            forward_error(net, x)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "statistics": lambda: nn.BatchNorm2d(2),
    "variance": lambda: nn.GroupNorm(1, 2),
    "softmax": lambda: nn.Softmax(1),
    "cosines": lambda: Householder(2),
    "cosines of three angles": lambda: HouseholderOrder2(2),
    "root": lambda: NormPooling(2),
    "root of each entry": SmoothAbsoluteValue,
    "skew": lambda: SkewOrthogonalConv2d(2, 2, 3),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_kernels_that_nobody_vouches_for_are_refused(machine: Machine, name: str) -> None:
    net = nn.Sequential(UNKNOWN[name]()).eval()
    x = torch.ones(1, 2, 4, 4)
    forward_error(net, x)
    with ieee_cuda(), pytest.raises(ValueError, match="nobody promises how far the kernels of"):
        forward_error(there(net), Pretended(x))


def test_products_and_sets_are_for_the_cpu(machine: Machine) -> None:
    net, x = nn.Linear(2, 2).eval(), torch.rand(1, 2)
    batch = Pretended(x), torch.zeros(1, dtype=torch.long)
    with ieee_cuda():
        with pytest.raises(ValueError, match="are for networks on the CPU, got one on CUDA"):
            certify(there(net), [batch], (2,), domain=Box(0, 1))
        with pytest.raises(ValueError, match="are for networks on the CPU, got one on CUDA"):
            certify(there(net), [batch], (2,), method="local")
        with pytest.raises(ValueError, match=r"on a domain.* are bounded on the CPU only"):
            forward_error(there(net), Pretended(x), domain=Box(0, 1))


def test_another_forward_is_not_vouched_for(machine: Machine) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    @lipschitz_rule.register(Twice)
    def _(module: Twice, input_shape: tuple[int, ...], p: float) -> Bound:
        return lipschitz_rule.dispatch(nn.Linear)(module, input_shape, p)

    @forward_error_rule.register(Twice)
    def _(module: Twice, example: Tensor, p: float) -> Any:
        return forward_error_rule.dispatch(nn.Linear)(module, example, p)

    with (
        ieee_cuda(),
        pytest.raises(TypeError, match=r"forward is redefined.*GPU does not apply"),
    ):
        forward_error(there(Twice(2, 2)), Pretended(torch.ones(1, 2)))


def test_a_join_needs_an_answer_too(machine: Machine) -> None:
    class Halves(Add):
        def forward(self, *parts: Tensor) -> Tensor:
            return super().forward(*parts) / 2

    nodes = Node(None, (), (2,)), Node(Add(1.0, 1.0), (0, 0), (2,))
    with ieee_cuda():
        graph_error(Graph(nodes, 1), Pretended(torch.ones(1, 2)), 2)
        nodes = nodes[0], Node(Halves(1.0, 1.0), (0, 0), (2,))
        with pytest.raises(TypeError, match="of Add on a GPU does not apply"):
            graph_error(Graph(nodes, 1), Pretended(torch.ones(1, 2)), 2)


def test_torch_is_asked_how_it_convolves(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def select(*arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(name="Cudnn")

    monkeypatch.setattr(torch._C, "_select_conv_backend", select)
    with ieee_cuda(), pytest.raises(ValueError, match="torch convolves by Cudnn on this GPU"):
        forward_error(there(nn.Conv2d(2, 4, 3, 2, 1, groups=2)), Pretended(torch.ones(1, 2, 4, 4)))
    (x, weight, bias, *geometry) = asked[0]
    assert (tuple(x.shape), tuple(weight.shape), len(bias)) == ((1, 2, 4, 4), (4, 1, 3, 3), 4)
    assert geometry == [[2, 2], [1, 1], [1, 1], False, [0, 0], 2]


def test_a_divisor_whose_reciprocal_vanishes(machine: Machine) -> None:
    large = Diagonal(torch.tensor(2.0**127), divides=True)
    with pytest.raises(ValueError, match="a GPU divides by multiplying with a reciprocal"):
        cuda_rule(large, Pretended(torch.ones(1, 2)))
    cuda_rule(Diagonal(torch.tensor(3.0), divides=True), Pretended(torch.ones(1, 2)))
    cuda_rule(Diagonal(torch.tensor(2.0**127)), Pretended(torch.ones(1, 2)))


def test_every_answer_is_tested() -> None:
    """No class is vouched for that neither only moves numbers nor meets the sums above."""
    tested = {type(m) for make, _ in SMALL.values() for m in make().modules()}
    tested |= {Add, Subtract, Concatenate, Maximum}  # of Joined
    tested |= {Clamp, Constant, Shift, Diagonal, MatrixProduct}  # of Moved
    names = {c.__name__ for kind in tested for c in kind.__mro__}
    for cls in cuda_rule.registry.keys() - {object}:
        if cls.__module__.startswith(("torch", "lipbook")):
            moved = forward_error_rule.dispatch(cls) is moved_error and not issubclass(cls, Join)
            kin = cls.__name__.replace("1d", "2d").replace("3d", "2d")
            assert moved or kin in names or cls is nn.Hardtanh, cls


# ------------------------------------------------------------------------------ on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_sums_of_a_gpu_stay_within_the_bound(name: str, dtype: torch.dtype) -> None:
    net, x = small(name)
    net, x = net.to(dtype), x.to(dtype)
    exact = copy.deepcopy(net).double()(x.double())
    with torch.no_grad(), ieee_cuda():
        bound = forward_error(copy.deepcopy(net).cuda(), x.cuda())
    off = (bound.outputs.cpu().double() - exact).flatten(1).norm(dim=1)
    assert (off <= bound.error + 1e-13 * exact.flatten(1).norm(dim=1)).all()


@pytest.mark.cuda
@needs_gpu
def test_a_certificate_of_a_large_network_on_a_gpu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 1024), MaxMin(), nn.Linear(1024, 1024), GroupSort(4))
    net = nn.Sequential(net, nn.Linear(1024, 10)).eval().cuda()
    batch = torch.rand(512, 784), torch.zeros(512, dtype=torch.long)
    with pytest.raises(ValueError, match="ieee_cuda"):
        certify(net, [batch], (784,))
    with ieee_cuda():
        found = certify(net, [batch], (784,))
        direction = functional.normalize(torch.randn(512, 784), dim=1)
        near = batch[0] + 0.999 * found.radius[:, None].float() * direction
        assert torch.equal(net(near.cuda()).argmax(1).cpu(), found.predictions)
    assert found.facts["gpu"] == torch.cuda.get_device_name()
