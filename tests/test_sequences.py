"""Lossless recurrence and causal convolutions: oracles in NumPy, and dense Jacobians."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lipbook.composition import Box, check_layer, lipschitz_bound, lipschitz_lower_bound
from lipbook.export import export_onnx
from lipbook.freezing import freeze
from lipbook.orthogonal import qr
from lipbook.robustness import certify
from lipbook.rounding import forward_error
from lipbook.sequences import (
    CausalOrthogonalConv1d,
    LosslessRNN,
    _Lossless,
    lossless_recurrence,
)

SIZES = [(3, 5, 3), (2, 5, 3), (4, 3, 3)]  # inputs, state, outputs: square, taller, wider


class Reader(nn.Module):
    """A network that reads one output of a recurrent layer."""

    def __init__(self, layer: nn.Module, part: str) -> None:
        super().__init__()
        self.layer, self.part = layer, part

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.layer(x)
        if self.part == "all":
            return torch.cat([outputs.flatten(1), last.transpose(0, 1).flatten(1)], 1)
        return outputs if self.part == "outputs" else last[-1]


def first(layer: nn.Module) -> nn.Linear:
    cell = layer.get_submodule("cells.0")
    assert isinstance(cell, nn.Linear)
    return cell


def by_hand(
    x: np.ndarray, h: np.ndarray, weight: np.ndarray, bias: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence (time, inputs), step by step."""
    outputs = []
    for row in x:
        z = weight @ np.concatenate([h, row]) + bias
        z = np.sort(z.reshape(-1, size), axis=1).reshape(-1)
        h = z[: len(h)]
        outputs.append(z[len(h) :])
    return np.stack(outputs), h


def everything(
    layer: LosslessRNN, x: Tensor, h: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The map from all that a layer reads to all that it gives, for one sequence."""

    def both(v: Tensor) -> Tensor:
        output, last = layer(v[: x.numel()].view_as(x), v[x.numel() :].view_as(h))
        return torch.cat([output.flatten(), last.flatten()])

    return both, torch.cat([x.flatten(), h.flatten()])


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_the_recurrence_is_its_definition(group_size: int) -> None:
    x, h = torch.randn(6, 3, 2, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    weight, bias = torch.randn(8, 7, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    y, last = lossless_recurrence(x, h, weight, bias, group_size)
    for k in range(3):
        found, end = by_hand(
            x[:, k].numpy(), h[k].numpy(), weight.numpy(), bias.numpy(), group_size
        )
        np.testing.assert_allclose(y[:, k].numpy(), found, atol=1e-12)
        np.testing.assert_allclose(last[k].numpy(), end, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("inputs", "hidden", "outputs"), SIZES)
def test_the_jacobian_of_a_whole_sequence_is_orthogonal(
    inputs: int, hidden: int, outputs: int, layers: int
) -> None:
    layer = LosslessRNN(inputs, hidden, layers, output_size=outputs).double()
    x = torch.randn(7, inputs, dtype=torch.float64)
    h = torch.randn(layers, hidden, dtype=torch.float64)
    both, v = everything(layer, x, h)
    jacobian = torch.autograd.functional.jacobian(both, v)
    assert isinstance(jacobian, Tensor)
    assert jacobian.shape == (7 * outputs + layers * hidden, 7 * inputs + layers * hidden)
    values = torch.linalg.svdvals(jacobian)
    assert len(values) == min(jacobian.shape)  # columns, or rows where they are fewer
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-12, rtol=0)


def test_a_thousand_steps_keep_norms_and_gradients_in_float32() -> None:
    layer = LosslessRNN(3, 13, 2, bias=False)
    x, h = torch.randn(1000, 2, 3, requires_grad=True), torch.zeros(2, 2, 13, requires_grad=True)
    output, last = layer(x, h)
    # GroupSort(0) = 0 and the activation is positively homogeneous, so norms are kept from 0
    after = (output.square().sum((0, 2)) + last.square().sum((0, 2))).sqrt()
    before = x.detach().square().sum((0, 2)).sqrt()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)
    handed = torch.randn_like(output), torch.randn_like(last)
    gradients = torch.autograd.grad((output, last), (x, h), handed)
    norms = [torch.cat([t.flatten() for t in part]).norm() for part in (gradients, handed)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)


def test_what_is_read_at_the_end_is_all_that_reaches_the_inputs() -> None:
    """Rows of the last state: the squares of its gradients by input and by h_0 sum to one."""
    layer = LosslessRNN(4, 4).double()
    x = torch.randn(50, 1, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.autograd.grad(layer(x, h)[1][0, 0, 1], (x, h))
    assert float(sum(t.square().sum() for t in shares)) == pytest.approx(1, abs=1e-12)


# ----------------------------------------------------------------- the interface of torch


@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_torchs_layer(batch_first: bool) -> None:
    ours = LosslessRNN(3, 5, 2, batch_first=batch_first, output_size=5)
    theirs = nn.RNN(3, 5, 2, batch_first=batch_first)
    for shape, state in (((4, 6, 3), (2, 4 if batch_first else 6, 5)), ((6, 3), (2, 5))):
        x, h = torch.randn(shape), torch.randn(state)
        for given in ((), (h,)):
            assert [t.shape for t in ours(x, *given)] == [t.shape for t in theirs(x, *given)]


def test_packed_sequences_are_each_their_own() -> None:
    layer = LosslessRNN(3, 5, 2).double()
    lengths = [2, 6, 1, 6, 4]
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    h = torch.randn(2, 5, 5, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, last = layer(packed, h)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for k, length in enumerate(lengths):
        alone, end = layer(x[:length, k], h[:, k])
        torch.testing.assert_close(padded[:length, k], alone, atol=1e-13, rtol=0)
        torch.testing.assert_close(last[:, k], end, atol=1e-13, rtol=0)


def test_a_sequence_in_two_pieces_is_the_whole() -> None:
    layer, x = LosslessRNN(2, 4, 2).double(), torch.randn(9, 3, 2, dtype=torch.float64)
    whole, last = layer(x)
    first, state = layer(x[:5])
    second, end = layer(x[5:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-13, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", ["qr", "cayley", "exp", "householder", "polar"])
def test_any_orthogonal_map_will_do_and_trains(method: str) -> None:
    layer = LosslessRNN(2, 4, method=method)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x, target = torch.randn(5, 8, 2), torch.randn(5, 8, 2)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x)[0] - target).square().mean().backward()
        optimizer.step()
    weight = first(layer).weight.detach().double()
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("part", ["outputs", "last", "all"])
@pytest.mark.parametrize(("p", "top"), [(1, None), (2, 1.0), (math.inf, None)])
def test_the_bound_is_above_jacobians_and_one_at_any_length(
    part: str, p: float, top: float | None
) -> None:
    net = Reader(LosslessRNN(3, 5, 2, batch_first=True).double(), part).eval()
    if part != "all":
        bound = lipschitz_bound(net, (6, 3), p).value
        for x in torch.randn(3, 6, 3, dtype=torch.float64):
            jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
            assert isinstance(jacobian, Tensor)
            matrix = jacobian.reshape(-1, 18)
            norms = {
                1: matrix.abs().sum(0).max(),
                2: torch.linalg.svdvals(matrix)[0],
                math.inf: matrix.abs().sum(1).max(),
            }
            assert norms[p] <= bound * (1 + 1e-12)
        if top is not None:
            assert bound == pytest.approx(top, abs=1e-9)
            long = lipschitz_bound(net, (500, 3)).value
            assert long == pytest.approx(1, abs=1e-9)
            single = lipschitz_bound(net.float(), (500, 3)).value
            assert single < (1 + 1e-6) ** (500 * 2)  # steps of two layers
    else:  # both outputs beside one another, as the graph reads them: two paths from one input
        bound = lipschitz_bound(net, (6, 3), p).value
        assert lipschitz_lower_bound(net, torch.randn(4, 6, 3).double(), p=p).value <= bound


def test_the_bound_is_found_from_the_weights_that_are_there() -> None:
    layer = freeze(LosslessRNN(2, 4, batch_first=True).double().eval())
    with torch.no_grad():
        first(layer).weight.mul_(1.1)
    net = Reader(layer, "last").eval()
    assert lipschitz_bound(net, (5, 2)).value == pytest.approx(1.1**5)
    with torch.no_grad():
        first(layer).weight.mul_(0.5)
    assert lipschitz_bound(net, (5, 2)).value == pytest.approx(0.55)


@pytest.mark.parametrize("part", ["outputs", "h"])
def test_every_answer_is_measured(part: str) -> None:
    layer = LosslessRNN(3, 5, 2, batch_first=True)
    report = str(check_layer(_Lossless(layer, part, [torch.randn(2, 1, 5)]).eval(), (6, 3)))
    assert "frozen copy" in report
    assert "error of the program" in report
    assert "range" in report


@pytest.mark.parametrize(("time", "p"), [(1, 1), (1, 2), (1, math.inf), (5, 1), (40, 2), (400, 2)])
def test_errors_of_the_program_are_below_their_bounds(time: int, p: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        net = Reader(LosslessRNN(3, 5, 2, batch_first=True), "outputs").eval()
        x = torch.randn(2, time, 3)
        with torch.no_grad():
            found, twin = forward_error(net, x, p), freeze(net).double()
            for distance in (0.0, 0.1):
                step = torch.randn(x.shape)
                step *= (
                    distance / torch.linalg.vector_norm(step.flatten(1), p, dim=1)[:, None, None]
                )
                v = x + step
                moved = torch.linalg.vector_norm((v - x).double().flatten(1), p, dim=1)
                wrong = (net(v).double() - twin(v.double())).flatten(1)
                size = torch.linalg.vector_norm(wrong, p, dim=1)
                assert (size <= found.error + found.slope * moved).all()
    assert p != 2 or (found.error < 1e-5 * (1 + time)).all()


def test_errors_of_the_program_see_the_first_state() -> None:
    """Inputs are small and the state is large, so that what is lost is the state's."""
    layer = _Lossless(
        LosslessRNN(3, 5, 2, batch_first=True), "outputs", [1e4 * torch.randn(2, 1, 5)]
    )
    x = 1e-3 * torch.randn(4, 6, 3)
    with torch.no_grad():
        found, twin = forward_error(layer.eval(), x), freeze(layer).double()
        wrong = (layer(x).double() - twin(x.double())).flatten(1).norm(dim=1)
    assert (wrong <= found.error).all()
    assert (wrong > 1e-4).all()  # far above what is lost of the inputs


def test_a_classifier_of_sequences_is_certified() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = LosslessRNN(4, 12, batch_first=True)
            self.last = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[1][-1])

    net = Classifier().eval()
    x = torch.randn(8, 20, 4)
    labels = net(x).argmax(1).detach()
    certificate = certify(net, [(x, labels)], (20, 4))
    assert certificate.sound
    assert (certificate.radius > 0).all()
    top = net(x).topk(2, 1).values
    apart = torch.cdist(net.last.weight, net.last.weight).max()
    assert (certificate.radius > 0.99 * (top[:, 0] - top[:, 1]) / apart).all()  # no step is lost
    for k in range(8):  # nothing within the radius changes the prediction
        step = torch.randn(64, 20, 4)
        step *= (0.999 * certificate.radius[k] / step.flatten(1).norm(dim=1))[:, None, None]
        assert (net((x[k] + step).float()).argmax(1) == labels[k]).all()


def test_on_a_domain_ranges_hold() -> None:
    net = Reader(LosslessRNN(2, 4, batch_first=True), "outputs").eval()
    bound = lipschitz_bound(net, (5, 2), domain=Box(0, 1))
    assert bound.value == pytest.approx(1, abs=1e-5)


def test_it_exports_with_a_batch_of_any_size(tmp_path: Path) -> None:
    net = Reader(LosslessRNN(3, 5, 2, batch_first=True), "last").eval()
    export_onnx(net, tmp_path / "net.onnx", (3, 3))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for batch in (1, 4):
        x = torch.randn(batch, 3, 3)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x), atol=1e-5, rtol=0)


LAYER = LosslessRNN(3, 5, 2, batch_first=True)
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: LosslessRNN(0, 5), ValueError, "input_size"),
    (lambda: LosslessRNN(3, 0), ValueError, "hidden_size"),
    (lambda: LosslessRNN(3, 5, 0), ValueError, "num_layers"),
    (lambda: LosslessRNN(3, 5.0), TypeError, "hidden_size"),  # type: ignore[arg-type]
    (lambda: LosslessRNN(3, 4), ValueError, r"group_size must divide .* = 7, got 2"),
    (lambda: LosslessRNN(3, 5, method="lu"), ValueError, "method"),  # type: ignore[arg-type]
    (lambda: LAYER(torch.zeros(2, 6, 4)), ValueError, "input must have 3 entries a step, got 4"),
    (lambda: LAYER(torch.zeros(2, 0, 3)), ValueError, "at least one step"),
    (lambda: LAYER(torch.zeros(3)), ValueError, "input must be one sequence"),
    (lambda: LAYER(torch.zeros(2, 6, 3), torch.zeros(2, 1, 5)), ValueError, r"hx .* \(2, 2, 5\)"),
    (lambda: lossless_recurrence(torch.zeros(4, 2, 3), torch.zeros(3, 5), qr(torch.eye(8))),
     ValueError, "x must have shape"),
    (lambda: lossless_recurrence(torch.zeros(4, 2, 3), torch.zeros(2, 5), torch.eye(7)),
     ValueError, r"weight must have 5 \+ 3 columns"),
    (lambda: lipschitz_bound(Reader(LosslessRNN(3, 5), "last").eval(), (6, 3)),
     ValueError, "batch_first=True"),
    (lambda: forward_error(Reader(LAYER, "last").eval(), torch.zeros(1, 90, 3), 1),
     ValueError, "rounding errors for p = 1 in torch.float32 at 90 steps: use p = 2"),
    (lambda: CausalOrthogonalConv1d(4, 4, 0), ValueError, "kernel_size"),
    (lambda: CausalOrthogonalConv1d(4, 4, 3, dilation=0), ValueError, "dilation"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_bad_input_is_named(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------- causal convolutions

KERNELS = [(3, 3, 3, 1), (2, 4, 4, 2), (4, 2, 2, 3)]  # channels in and out, taps, dilation


@pytest.mark.parametrize(
    ("c_in", "c_out", "k", "dilation"), [(3, 3, 3, 1), (2, 4, 4, 2), (4, 2, 2, 3)]
)
def test_a_causal_convolution_is_its_sum(c_in: int, c_out: int, k: int, dilation: int) -> None:
    layer = CausalOrthogonalConv1d(c_in, c_out, k, dilation).double()
    x = torch.randn(2, c_in, 12, dtype=torch.float64)
    convolution = layer.get_submodule("1")
    assert isinstance(convolution, nn.Conv1d)
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
    found = np.zeros((2, c_out, 12)) + bias[None, :, None]
    for t, j in itertools.product(range(12), range(k)):
        if t - j * dilation >= 0:
            found[:, :, t] += x[:, :, t - j * dilation].numpy() @ weight[:, :, k - 1 - j].T
    np.testing.assert_allclose(layer(x).detach().numpy(), found, atol=1e-12)


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 3), (2, 4)])
def test_what_a_causal_convolution_has_not_given_yet_is_all_that_is_lost(
    c_in: int, c_out: int
) -> None:
    layer = CausalOrthogonalConv1d(c_in, c_out, 4, 2, bias=False).double()
    x = torch.randn(1, c_in, 20, dtype=torch.float64)
    longer = layer(nn.functional.pad(x, (0, 6)))
    torch.testing.assert_close(longer.norm(), x.norm(), atol=1e-12, rtol=0)
    torch.testing.assert_close(longer[:, :, :20], layer(x), atol=1e-14, rtol=0)
    assert layer(x).norm() < x.norm() * (1 - 1e-6)


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 3), (2, 4), (4, 2)])
def test_stacks_of_causal_convolutions_are_nonexpansive_and_causal(c_in: int, c_out: int) -> None:
    net = nn.Sequential(
        CausalOrthogonalConv1d(c_in, c_out, 2), CausalOrthogonalConv1d(c_out, c_out, 2, 2)
    ).double()
    assert lipschitz_bound(net, (c_in, 16)).value <= 1 + 1e-9
    x = torch.randn(c_in, 9, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
    assert isinstance(jacobian, Tensor)
    assert torch.linalg.svdvals(jacobian.reshape(c_out * 9, -1))[0] <= 1 + 1e-12
    later = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1)
    assert not jacobian.permute(1, 3, 0, 2)[later].any()
