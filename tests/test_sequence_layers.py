"""Attention and recurrence as people use them: bounds on domains, and for a given length.

Oracles: norms of dense float64 Jacobians by autograd at points of the domain, chords that were
found by ascent, and products of scalar recurrences on paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Ball, Box, lipschitz_bound, lipschitz_lower_bound
from lipbook.composition.local import ranges_of
from lipbook.graphs import trace
from lipbook.layers.attention import MultiheadCall, ScaledDotProduct, column_sums
from lipbook.layers.recurrence import Recurrence
from lipbook.rules import local_lipschitz_rule, range_rule

NORMS = (1, 2, math.inf)
SHAPE = (4, 4)
CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
BIAS = torch.tensor([[0.0, -math.inf, 2.0, -3.0]] * 2 + [[1.0, 0.5, 0.0, 0.0]] * 2)


class Self(nn.Module):
    def __init__(
        self,
        need_weights: bool = False,
        mask: Tensor | None = None,
        padding: list[bool] | None = None,
        causal: bool = False,
        **options: object,
    ) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.attention = nn.MultiheadAttention(4, 2, **options)  # type: ignore[arg-type]
        self.need_weights, self.padding, self.causal = need_weights, padding, causal
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        padding, mask = None, self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(x.dtype)
        if self.padding is not None:
            padding = torch.tensor([self.padding] * len(x))
        return self.attention(
            x,
            x,
            x,
            need_weights=self.need_weights,
            attn_mask=mask,
            key_padding_mask=padding,
            is_causal=self.causal,
        )[0]


class Cross(nn.Module):
    """Queries from one branch, keys and values from another, and learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.queries = nn.Linear(4, 3), nn.Parameter(torch.zeros(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        learned = self.queries.expand(len(x), -1, -1)
        return torch.cat([self.attention(x, y, y)[0], self.attention(learned, y, y)[0]], 1)


class Heads(nn.Module):
    """Attention as it is written without a module."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 4, 6, 2).transpose(1, 2).chunk(3, 1)
        options = dict(self.options)
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"].to(x.dtype)  # type: ignore[attr-defined]
        out = functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
        return out.transpose(1, 2).flatten(2)


class OneHead(nn.Module):
    """Tokens attend to each other, without heads and without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        4,
        2,
        6,
        batch_first=True,
        layer_norm_eps=0.5,
        **options,  # type: ignore[arg-type]
    )
    return layer.eval()


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "self": Self,
    "with weights": lambda: Self(True),
    "without bias": lambda: Self(bias=False),
    "causal": lambda: Self(mask=CAUSAL),
    "causal by a hint": lambda: Self(mask=CAUSAL, causal=True),
    "numbers as a mask": lambda: Self(mask=BIAS.double()),
    "padding": lambda: Self(padding=[False, False, True, True]),
    "all that a query sees is masked": lambda: Self(
        mask=CAUSAL, padding=[True, False, False, False]
    ),
    "cross": Cross,
    "function": Heads,
    "one head": OneHead,
    "causal function": lambda: Heads(is_causal=True),
    "masked function": lambda: Heads(attn_mask=BIAS.double(), scale=0.3),
    "encoder layer": encoder,
    "encoder layer, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(
        encoder(), 2, norm=nn.LayerNorm(4, eps=0.5), enable_nested_tensor=False
    ).eval(),
}


def made(make: Callable[[], nn.Module], spread: float = 0.7) -> nn.Module:
    torch.manual_seed(5)
    net = make().double()
    for weight in net.parameters():
        nn.init.normal_(weight, std=spread)
    return net


def jacobian(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    full = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)
    return full.reshape(-1, x.numel())


def jacobians(net: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """One for each point, a row for all points at a time: samples do not mix."""
    points = points.clone().requires_grad_()
    outputs = net(points).flatten(1)
    rows = [torch.autograd.grad(out, points, torch.ones_like(out), True) for out in outputs.T]
    return torch.stack([row.flatten(1) for (row,) in rows], 1)


def inside(domain: Box | Ball, shape: tuple[int, ...], count: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    r = domain.range(shape)
    u = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    u[::2] = u[::2].round()
    points = r.low + u * (r.high - r.low)
    if isinstance(domain, Ball):
        apart = points - domain.center
        norms = apart.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
        points = domain.center + apart * (domain.radius / norms).clamp(max=1)
    return points


DOMAINS = (
    Box(-1, 1),
    Box(0.5, 3.0),
    Ball(torch.arange(16.0).view(4, 4) / 8, 0.1),
)


@pytest.mark.parametrize("name", ATTENTION)
def test_no_jacobian_on_the_domain_exceeds_the_bound(name: str) -> None:
    net = made(ATTENTION[name])
    for domain in DOMAINS:
        steep = jacobians(net, inside(domain, SHAPE))
        for p in NORMS:
            bound = lipschitz_bound(net, SHAPE, p, domain=domain).value
            assert torch.linalg.matrix_norm(steep, p).max().item() <= bound < math.inf


@pytest.mark.parametrize("name", ATTENTION)
def test_chords_found_by_ascent_stay_below_the_bound(name: str) -> None:
    net = made(ATTENTION[name])
    domain = Ball(torch.zeros(4, 4), 4.0)
    starts = inside(Ball(torch.zeros(4, 4), 1.0), SHAPE, 4)
    bound = lipschitz_bound(net, SHAPE, domain=domain).value
    below = lipschitz_lower_bound(net, starts, radius=0.3, steps=20)
    assert below.witness is not None
    assert max(end.norm() for end in below.witness) <= 4
    assert 0 < below.value <= bound


@pytest.mark.parametrize("name", ATTENTION)
def test_ranges_hold_the_outputs(name: str) -> None:
    net = made(ATTENTION[name])
    graph = trace(net, SHAPE).double()
    for domain in DOMAINS:
        points = inside(domain, SHAPE, 60)
        values = [value.detach() for value in graph.values(points)]
        ranges = ranges_of(graph, domain.range(SHAPE))
        for found, value in list(zip(ranges, values, strict=True))[1:]:
            assert found.holds(value)
            if found.center is not None and found.radius is not None:
                apart = (value - found.center).flatten(1).norm(dim=1)
                assert (apart <= found.radius * (1 + 1e-12)).all()


@pytest.mark.parametrize("heads", [(), (2,)])
def test_the_three_factors_of_attention_one_at_a_time(heads: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(30, *heads, n, 3, dtype=torch.float64) for n in (4, 5, 5)]
    mask = torch.rand(4, 5) < 0.6
    mask[0] = False
    for options in ({}, {"attn_mask": mask}, {"scale": 2.0}):
        layer = ScaledDotProduct(**options)
        domains = [Box(part.amin(0), part.amax(0)).range(part.shape[1:]) for part in parts]
        for p in NORMS:
            factors = layer.factors(domains, p)
            for k, factor in enumerate(factors):
                for sample in zip(*parts, strict=True):
                    J = jacobian(
                        lambda v, k=k, sample=sample, layer=layer: layer(
                            *(v if j == k else part[None] for j, part in enumerate(sample))
                        ),
                        sample[k],
                    )
                    assert torch.linalg.matrix_norm(J, p).item() <= factor.item()


def test_values_alone_attain_their_factor() -> None:
    """Uniform attention of n queries to one direction: a norm of sqrt(n / keys)."""
    zero = Box(0, 0).range((1, 4, 3))
    layer = ScaledDotProduct()
    q, k, v = layer.factors([zero, zero, Box(-1, 1).range((1, 4, 3))], 2)
    assert q.item() == k.item() == 0
    assert v.item() == pytest.approx(1.0)


def test_keys_alone_attain_their_factor() -> None:
    """Equal queries between two opposite values: half of each, c = queries / 2."""
    query = torch.tensor([[3.0, 4.0]]).expand(6, 2).double()
    key = torch.zeros(2, 2, dtype=torch.float64)
    value = torch.tensor([[2.0], [-2.0]]).double()
    layer = ScaledDotProduct(scale=0.7)
    points = [Box(part, part).range(part.shape) for part in (query, key, value)]
    factor = layer.factors(points, 2)[1].item()
    J = jacobian(lambda k: layer(query[None], k, value[None]), key)
    assert factor == pytest.approx(0.7 * math.sqrt(3) * 5 * 2)
    assert torch.linalg.matrix_norm(J, 2).item() == pytest.approx(factor)


def test_sums_of_columns() -> None:
    torch.manual_seed(0)
    for mask in (None, BIAS.double(), torch.zeros(4, 4).masked_fill(CAUSAL, -math.inf).double()):
        for size in (0.0, 0.3, 3.0, 2000.0):
            logits = size * (torch.rand(500, 4, 4, dtype=torch.float64).round() - 0.5)
            total = logits if mask is None else logits + mask
            found = column_sums(torch.tensor([size]).double(), 4, 4, mask)
            assert total.softmax(-1).sum(-2).max() <= found.item() * (1 + 1e-12)
    extreme = torch.tensor([[0.0, -900.0]]).double()
    assert column_sums(torch.tensor([1000.0]).double(), 1, 2, extreme).item() == pytest.approx(1)


def test_a_call_is_one_layer_that_agrees_bit_for_bit() -> None:
    graph = trace(Self(mask=CAUSAL), SHAPE)
    (layer,) = (node.layer for node in graph.nodes[1:])
    assert isinstance(layer, MultiheadCall)
    net = Self(True).eval()
    x = torch.randn(3, 4, 4)
    assert torch.equal(trace(net, SHAPE).run(x), net(x))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[1]


class Own(nn.MultiheadAttention):
    def forward(self, *parts: Tensor, **options: object) -> tuple[Tensor, None]:  # type: ignore[override]
        return 3 * super().forward(*parts, **options)[0], None  # type: ignore[arg-type]


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Own(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "batch behind": (lambda: Self(batch_first=False), ValueError, "batch_first=True"),
    "dropout": (lambda: Self(dropout=0.1), ValueError, "at random in training mode"),
    "tokens of its own": (lambda: Self(add_zero_attn=True), TypeError, "no bound is known"),
    "bias tokens": (lambda: Self(add_bias_kv=True), TypeError, "no bound is known"),
    "NaN rows": (lambda: Self(True, padding=[True] * 4), ValueError, "its output is NaN"),
    "weights": (Weighted, ValueError, "MultiheadAttention that is not followed"),
    "forward of its own": (Subclassed, ValueError, "must keep samples apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_refused(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lipschitz_bound(make(), SHAPE, domain=Box(0, 1))


@pytest.mark.parametrize("make", [Self, Heads, encoder])
def test_attention_has_no_constant_on_all_of_space(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="is not Lipschitz on all of space: give a domain"):
        lipschitz_bound(make(), SHAPE)


# ------------------------------------------------------------------------------ recurrence


class Part(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, part: str, start: float | None = None) -> None:
        super().__init__()
        self.recurrent, self.part, self.start = recurrent, part, start

    def forward(self, x: Tensor) -> Tensor:
        initial: object = None
        if self.start is not None:
            rows = self.recurrent.num_layers * (2 if self.recurrent.bidirectional else 1)
            state = torch.full((rows, len(x), 3), self.start).to(x.dtype)
            initial = (state, 2 * state) if isinstance(self.recurrent, nn.LSTM) else state
        outputs, last = self.recurrent(x, initial)
        if self.part == "outputs":
            return outputs
        if self.part == "c":
            return last[1].transpose(0, 1)
        h = last[0] if isinstance(last, tuple) else last
        return torch.cat([h[-1], h[0]], 1) if self.part == "both" else h[-1]


RECURRENT = {
    "tanh": lambda **o: nn.RNN(2, 3, batch_first=True, **o),
    "relu": lambda **o: nn.RNN(2, 3, batch_first=True, nonlinearity="relu", **o),
    "lstm": lambda **o: nn.LSTM(2, 3, batch_first=True, **o),
    "gru": lambda **o: nn.GRU(2, 3, batch_first=True, **o),
}
DEEP = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize(
    ("part", "start"),
    [("outputs", None), ("h", None), ("both", None), ("both", 1.5), ("c", None), ("c", 1.5)],
)
@pytest.mark.parametrize("options", [{}, {"bias": False}, DEEP], ids=["one", "no bias", "deep"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrence(name: str, options: dict[str, bool], part: str, start: float | None) -> None:
    if part == "c" and name != "lstm":
        return
    net = made(lambda: Part(RECURRENT[name](**options), part, start))
    generator = torch.Generator().manual_seed(2)
    wide = [
        torch.randn(5, 2, generator=generator, dtype=torch.float64) * scale
        for scale in (1e-3, 0.1, 1, 10, 1e3)
        for _ in range(2)
    ]
    domain = Box(torch.tensor([-0.5, 1.0]), torch.tensor([0.7, 1.2]))
    near = inside(domain, (5, 2), 8)
    everywhere = jacobians(net, torch.stack(wide))
    here = jacobians(net, near)
    for p in NORMS:
        bound = lipschitz_bound(net, (5, 2), p).value
        local = lipschitz_bound(net, (5, 2), p, domain=domain).value
        assert torch.linalg.matrix_norm(everywhere, p).max().item() <= bound < math.inf
        assert torch.linalg.matrix_norm(here, p).max().item() <= local
        assert local <= bound * (1 + 1e-9)
    layer = next(n.layer for n in trace(net, (5, 2)).double().nodes if n.layer)
    found = range_rule(layer, domain.range((5, 2)))
    outputs = layer(near).detach()
    assert found.holds(outputs)
    assert ((outputs - found.center).flatten(1).norm(dim=1) <= found.radius).all()  # type: ignore[operator]
    if part == "outputs" and start is None and name != "relu":
        assert (found.low >= -1).all()
        assert (found.high <= 1).all()


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_each_gate_alone(name: str, gates: int) -> None:
    """Only one gate reads the sequence, and no gate the state but that of the reset."""
    for gate in range(gates):
        net = made(lambda: Part(RECURRENT[name](), "outputs"))
        recurrent = net.recurrent
        with torch.no_grad():
            nn.init.zeros_(recurrent.weight_hh_l0)
            for k, rows in enumerate(recurrent.weight_ih_l0.chunk(gates)):
                rows.mul_(k == gate)
        domain = Ball(torch.zeros(3, 2), 1e-3)
        J = jacobian(net, torch.zeros(3, 2).double())
        for p in NORMS:
            steep = torch.linalg.matrix_norm(J, p).item()
            bound = lipschitz_bound(net, (3, 2), p, domain=domain).value
            assert 1e-3 < steep <= bound < 8 * steep


@pytest.mark.parametrize("name", RECURRENT)
def test_chords_of_recurrent_layers_stay_below_the_bound(name: str) -> None:
    net = made(lambda: Part(RECURRENT[name](), "outputs"))
    below = lipschitz_lower_bound(net, torch.randn(3, 5, 2), steps=20)
    assert below.value <= lipschitz_bound(net, (5, 2)).value


def test_a_scalar_recurrence_attains_its_bound() -> None:
    """h_t = relu(w x_t + u h_(t-1)) on positive numbers is a triangular Toeplitz matrix."""
    w, u, time = 0.7, 1.3, 6
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True)
    nn.init.constant_(layer.weight_ih_l0, w)
    nn.init.constant_(layer.weight_hh_l0, u)
    exponents = torch.arange(time)[:, None] - torch.arange(time)
    toeplitz = torch.where(exponents >= 0, w * float(u) ** exponents.double(), 0.0)
    for p in NORMS:
        bound = lipschitz_bound(layer, (time, 1), p, output=0).value
        assert bound == pytest.approx(torch.linalg.matrix_norm(toeplitz, p).item(), rel=1e-6)
        J = jacobian(lambda x: layer.double()(x)[0], torch.ones(time, 1).double())
        assert bound == pytest.approx(torch.linalg.matrix_norm(J, p).item(), rel=1e-6)


def test_bounds_of_long_sequences_do_not_overflow_on_the_way() -> None:
    """Entries 10^(t - s) make a matrix of rank 1 up to 10^(-2 time): its norm is known."""
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True)
    for weight, value in ((layer.weight_ih_l0, 1.0), (layer.weight_hh_l0, 10.0)):
        nn.init.constant_(weight, value)
    for p, factor in ((1, 10 / 9), (2, 1 / 0.99), (math.inf, 10 / 9)):
        bound = lipschitz_bound(layer, (200, 1), p, output=0).value
        assert bound / 1e199 == pytest.approx(factor, rel=1e-9)
        assert lipschitz_bound(layer, (400, 1), p, output=0).value == math.inf
    deep = nn.LSTM(1, 8, 2, batch_first=True)
    for weight in deep.parameters():
        nn.init.constant_(weight, 9.0)
    assert lipschitz_bound(deep, (400, 1), output=0).value == math.inf


def test_a_forget_gate_below_one_shows_on_a_domain() -> None:
    layer = nn.LSTM(1, 2, batch_first=True)
    for weight in layer.parameters():
        nn.init.constant_(weight, 0.1)
    nn.init.constant_(layer.bias_ih_l0[2:4], -3.0)
    everywhere = lipschitz_bound(layer, (30, 1), output=0).value
    here = lipschitz_bound(layer, (30, 1), output=0, domain=Box(-1, 1)).value
    assert here < everywhere / 100
    J = jacobian(lambda x: copy.deepcopy(layer).double()(x)[0], torch.zeros(30, 1).double())
    assert torch.linalg.matrix_norm(J, 2).item() <= here < 1


def test_bounds_of_a_batch_of_domains() -> None:
    layer = Recurrence(nn.GRU(2, 3, batch_first=True).double(), "outputs", ())
    parts = [Box(-0.1, 0.1).range((4, 2)), Box(-3, 3).range((4, 2))]
    both = copy.copy(parts[0])
    both = type(both)(*(torch.cat([getattr(r, side) for r in parts]) for side in ("low", "high")))
    for p in NORMS:
        single = torch.cat([local_lipschitz_rule(layer, part, p) for part in parts])
        assert torch.allclose(local_lipschitz_rule(layer, both, p), single, rtol=1e-9)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [4] * len(x), batch_first=True)
        return self.gru(packed)[1][-1]


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x, x[:, :1].transpose(0, 1))[0]


class States(nn.Module):
    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[1]


class Loop(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_cell_names_the_layer_whose_bound_is_known(kind: str) -> None:
    cell = getattr(nn, f"{kind}Cell")(2, 3)
    with pytest.raises(TypeError, match=rf"'cell' \({kind}Cell\).*call torch.nn.{kind} with batch"):
        lipschitz_bound(Loop(cell), (4, 2))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_states_are_refused() -> None:
    net = Part(nn.LSTM(2, 3, batch_first=True, proj_size=2), "outputs")
    with pytest.raises(TypeError, match="proj_size=2"):
        lipschitz_bound(net, (4, 2))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (Packed, TypeError, "pack_padded_sequence"),
        (Stateful, ValueError, "must keep samples apart"),
        (lambda: States(nn.GRU(2, 3, batch_first=True)), ValueError, "its batch in dimension 1"),
        (lambda: Part(nn.GRU(2, 3), "outputs"), ValueError, "batch_first=True"),
        (
            lambda: Part(nn.GRU(2, 3, 2, batch_first=True, dropout=0.1), "outputs"),
            ValueError,
            "at random in training mode",
        ),
    ],
)
def test_recurrence_that_is_refused(
    make: Callable[[], nn.Module], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        lipschitz_bound(make(), (4, 2))
