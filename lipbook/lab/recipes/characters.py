r"""Transformers that read characters, with a constant and without one.

A network reads 32 characters of two Gospels (:func:`~lipbook.lab.data.characters`) and tells after
each of them what comes next. A table embeds characters as vectors of 64 entries; all bounds are
from the sequence of vectors, in the 2-norm of all entries, to all logits. Positions are learnt. Two
blocks follow, of causal attention with four heads and two layers for each token with 128 units
between them, and a matrix:

- *usual*: softmax attention of torch, ReLU, LayerNorm, and residual sums;
- *distances*: :class:`~lipbook.attention.L2MultiheadAttention`, orthogonal matrices, MaxMin and
  averages as residual layers. Attention has a constant and is not divided by it;
- *bound 10*: the same, all parts 1-Lipschitz, vectors of characters in the ball of radius 1, and
  the logits 10 times what comes out;
- *usual, convolutions*, *bound 10, convolutions* and *bound 100, convolutions*: in front of each
  attention a causal convolution, of the tokens at t and t - 1 in the first block and at t and t - 2
  in the second one. With a bound it is orthogonal, and the last factor is 10 or 100;
- *bound 100, no attention*: the last of these without attention, which tells what attention adds.

All learn in the same number of steps of Adam, on random places in batches of 32, at a rate that
falls to 0. The first rate is chosen by the bits on the validation text, with the first seed; then
two more networks are trained at it. The test text judges them.

What is certified is a prediction: of the next character, after 32 of the test text, with the margin
between its logit and the others. It stays under every change of the embedded sequence that is
shorter than the radius. A character that is replaced by another one moves the sequence by the
distance of their vectors, so that a radius beyond it says that the replacement changes nothing.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.activations import MaxMin
from lipbook.attention import L2MultiheadAttention, ball_projection
from lipbook.composition import Ball, Residual, lipschitz_bound, lipschitz_lower_bound
from lipbook.lab.data import characters
from lipbook.lab.evaluation import certificate
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.records import Record
from lipbook.orthogonal import OrthogonalLinear, Scale
from lipbook.residual import AverageResidual
from lipbook.sequences import CausalOrthogonalConv1d

__all__ = [
    "CONTEXT",
    "NETWORKS",
    "RATES",
    "Kind",
    "Reader",
    "bits",
    "early",
    "fit",
    "pairs",
    "row",
    "run",
    "summary",
    "windows",
]

#: Characters that a network reads.
CONTEXT = 32


class Kind(NamedTuple):
    """What a network is made of.

    Attributes
    ----------
    attention : str
        ``"softmax"``, ``"distances"``, ``"divided"`` or ``"none"``. The second and third are
        :class:`~lipbook.attention.L2MultiheadAttention`, which the third divides by its bound.
    convolutions : bool
        Whether a causal convolution stands in front of each attention.
    factor : float or None
        Of the logits, where all parts are 1-Lipschitz.
    """

    attention: str
    convolutions: bool
    factor: float | None


#: Networks, as the page shows them.
NETWORKS = {
    "usual": Kind("softmax", False, None),
    "usual, convolutions": Kind("softmax", True, None),
    "distances": Kind("distances", False, None),
    "bound 10": Kind("divided", False, 10.0),
    "bound 10, convolutions": Kind("divided", True, 10.0),
    "bound 100, convolutions": Kind("divided", True, 100.0),
    "bound 100, no attention": Kind("none", True, 100.0),
}
#: First rates to choose from.
RATES = (0.003, 0.01)
WIDTH, HEADS, BLOCKS, BATCH = 64, 4, 2, 32
SEEDS = 3
CERTIFIED = 200  # windows of the test text, evenly spaced
REPLACED = 8  # random replacements in each of them


class _Positions(nn.Module):
    """Addition of a learnt vector to each place."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.3 * torch.randn(CONTEXT, WIDTH) / math.sqrt(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class _Softmax(nn.Module):
    """Causal self-attention of torch."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        self.register_buffer("mask", later, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]


class _Convolution(nn.Module):
    """Causal convolution of two taps, of tokens in rows."""

    def __init__(self, dilation: int, orthogonal: bool) -> None:
        super().__init__()
        self.convolution: nn.Module = CausalOrthogonalConv1d(WIDTH, WIDTH, 2, dilation)
        if not orthogonal:
            pad = nn.ZeroPad1d((dilation, 0))
            self.convolution = nn.Sequential(pad, nn.Conv1d(WIDTH, WIDTH, 2, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


class _Last(nn.Module):
    """Logits after the last character."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def _usual(kind: Kind, outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in range(BLOCKS):
        if kind.convolutions:
            layers.append(_Convolution(2**block, orthogonal=False))
        dense = [nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)]
        for branch in ([_Softmax()], dense):
            layers.append(Residual(nn.Sequential(nn.LayerNorm(WIDTH), *branch)))
    return [*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)]


def _with_constant(kind: Kind, outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in range(BLOCKS):
        if kind.convolutions:
            layers.append(_Convolution(2**block, orthogonal=True))
        if kind.attention != "none":
            divided = kind.attention == "divided"
            attention = L2MultiheadAttention(WIDTH, HEADS, nonexpansive=divided, is_causal=True)
            layers.append(AverageResidual(attention))
        dense = nn.Sequential(
            OrthogonalLinear(WIDTH, 2 * WIDTH), MaxMin(dim=-1), OrthogonalLinear(2 * WIDTH, WIDTH)
        )
        layers.append(AverageResidual(dense))
    if kind.factor is None:
        return [*layers, nn.Linear(WIDTH, outputs)]
    return [*layers, OrthogonalLinear(WIDTH, outputs), Scale(kind.factor)]


class Reader(nn.Module):
    """Transformer that tells which character comes next.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    alphabet : int
        Number of different characters.

    Attributes
    ----------
    table : torch.Tensor
        Vectors of the characters, (alphabet, 64), before those with a factor are projected onto the
        ball of radius 1.
    body : torch.nn.Sequential
        From embedded sequences (batch, 32, 64) to logits (batch, 32, alphabet).

    Raises
    ------
    ValueError
        There is no such network.

    Examples
    --------
    >>> from lipbook.composition import lipschitz_bound
    >>> model = Reader("bound 10", 35).eval()
    >>> lipschitz_bound(model.body, (32, 64)).value <= 10 * (1 + 1e-5)
    True
    """

    def __init__(self, name: str, alphabet: int) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"name: expected one of {tuple(NETWORKS)}, got {name!r}")
        kind = NETWORKS[name]
        self.in_ball = kind.factor is not None
        self.table = nn.Parameter(torch.randn(alphabet, WIDTH) / math.sqrt(WIDTH))
        build = _usual if kind.attention == "softmax" else _with_constant
        self.body = nn.Sequential(_Positions(), *build(kind, alphabet))

    def vectors(self) -> Tensor:
        """Give the vectors of the characters as the network reads them."""
        return ball_projection(self.table, 1.0) if self.in_ball else self.table

    def last(self) -> nn.Sequential:
        """Give the network from embedded sequences to the logits after the last character."""
        return nn.Sequential(*self.body, _Last()).train(self.training)

    def forward(self, text: Tensor) -> Tensor:
        """Give logits (batch, 32, alphabet) of characters (batch, 32)."""
        return self.body(self.vectors()[text])


def windows(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut evenly spaced windows out of a text.

    Parameters
    ----------
    text : torch.Tensor
        Numbers of characters, (n,).
    count : int
        Windows.

    Returns
    -------
    tuple of torch.Tensor
        What is read, (count, 32), and what comes next after each character, (count, 32).

    Examples
    --------
    >>> read, following = windows(torch.arange(100), 2)
    >>> read[:, 0].tolist(), following[:, 0].tolist()
    ([0, 67], [1, 68])
    """
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count).long()
    places = starts[:, None] + torch.arange(CONTEXT)
    return text[places], text[places + 1]


def bits(model: nn.Module, text: Tensor) -> tuple[float, float]:
    """Measure a network on all of a text, cut into windows that do not overlap.

    Parameters
    ----------
    model : torch.nn.Module
        A :class:`Reader`.
    text : torch.Tensor
        Numbers of characters, (n,).

    Returns
    -------
    tuple of float
        Bits per character, and the part of characters that are predicted. The first ones of a
        window have little to go by, for all networks alike.
    """
    whole = (len(text) - 1) // CONTEXT * CONTEXT
    read, following = (text[k : k + whole].view(-1, CONTEXT) for k in (0, 1))
    with torch.no_grad():
        logits = torch.cat([model(part) for part in read.split(256)]).flatten(0, 1)
    loss = functional.cross_entropy(logits, following.flatten()).item()
    right = (logits.argmax(1) == following.flatten()).float().mean().item()
    return loss / math.log(2), right


def pairs(text: Tensor, characters: int) -> nn.Embedding:
    """Count pairs of neighbours: what is known of a character by the one before.

    Parameters
    ----------
    text : torch.Tensor
        Numbers of characters, (n,).
    characters : int
        How many there are.

    Returns
    -------
    torch.nn.Embedding
        Logits for each character, the logarithms of counts that begin at 0.1.
    """
    counts = torch.full((characters, characters), 0.1)
    counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
    return nn.Embedding.from_pretrained(counts.log())


def fit(name: str, *, lr: float, steps: int = 400, seed: int = 0) -> Reader:
    """Train a network on random places of the training text.

    Parameters
    ----------
    name : str
        One of :data:`NETWORKS`.
    lr : float
        First rate of Adam; it falls to 0 linearly.
    steps : int
        Batches of 32 sequences.
    seed : int
        Of weights and places.

    Returns
    -------
    Reader
        In evaluation mode.
    """
    torch.manual_seed(seed)
    text = characters()
    model = Reader(name, len(text.alphabet))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1), generator=generator)
        places = starts + torch.arange(CONTEXT)
        logits, following = model(text.train[places]), text.train[places + 1]
        loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.requires_grad_(False).eval()


def _bound(model: Reader) -> dict[str, float | None]:
    """Bound on all of space, or else on the ball of all embedded sequences."""
    shape = (CONTEXT, WIDTH)
    longest = model.vectors().norm(dim=1).max().item() * math.sqrt(CONTEXT)
    try:
        return {"everywhere": lipschitz_bound(model.body, shape).value, "near": None}
    except ValueError:  # softmax attention
        near = lipschitz_bound(model.body, shape, domain=Ball(torch.zeros(shape), longest)).value
        return {"everywhere": None, "near": near if math.isfinite(near) else None}


def _certificates(model: Reader, text: Tensor, seed: int, everywhere: bool) -> dict[str, Any]:
    """Radii of predictions, if there is a bound everywhere, beside replacements of a character."""
    vectors, net = model.vectors(), model.last()
    read = windows(text, CERTIFIED)[0]
    embedded = vectors[read]
    predicted = net(embedded).argmax(1)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(CONTEXT, (CERTIFIED, REPLACED), generator=generator)
    by = torch.randint(1, len(vectors), (CERTIFIED, REPLACED), generator=generator)
    old = read.gather(1, places)
    new = (old + by) % len(vectors)
    other = read[:, None].expand(-1, REPLACED, -1).scatter(2, places[..., None], new[..., None])
    same = net(vectors[other.flatten(0, 1)]).argmax(1).view(CERTIFIED, REPLACED)
    moved = (vectors[old] - vectors[new]).norm(dim=-1)
    between = torch.cdist(vectors, vectors) + torch.eye(len(vectors)) * 1e9
    found: dict[str, Any] = {
        "nearest": between.min().item(),
        "median": moved.median().item(),
        "unchanged": (same == predicted[:, None]).float().mean().item(),
        "slope": lipschitz_lower_bound(net, embedded[:16], steps=10).value,
        "radius": None,
        "covered": 0.0,
    }
    if everywhere:
        radius = certificate(net, embedded, predicted, sound=False).radius
        found["radius"] = radius.median().item()
        found["covered"] = (moved < radius[:, None]).float().mean().item()
    return found


def row(name: str, *, lr: float, steps: int = 400, seed: int = 0) -> Outcome:
    """Train a network and measure it.

    Parameters
    ----------
    name, lr, steps, seed
        As in :func:`fit`.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``lr``, ``seed``, ``parameters``; of the ``validation`` and the ``test``
        text ``bits`` and the part that is ``right``; ``bound``, from the embedded sequence to all
        logits, ``everywhere``, and where the library knows none (``None``) ``near``, on the ball
        about 0 that holds all embedded sequences (``None`` beyond float64). Of 200 windows of the
        test text: the largest ``slope`` that ascent finds, a lower bound of the constant; the
        median ``radius`` within which the next character stays (``None`` without a bound on all of
        space); of 8 random replacements of a character in each, the part ``covered`` by the radius,
        the part that leaves the prediction ``unchanged``, and the ``median`` of how far they move
        the sequence; and the ``nearest`` two vectors of characters. No tensors.
    """
    model = fit(name, lr=lr, steps=steps, seed=seed)
    text = characters()
    results: dict[str, Any] = {
        "name": name, "lr": lr, "seed": seed,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip
    for part in ("validation", "test"):
        loss, right = bits(model, getattr(text, part))
        results[part] = {"bits": loss, "right": right}
    results["bound"] = _bound(model)
    everywhere = results["bound"]["everywhere"] is not None
    return results | _certificates(model, text.test, seed, everywhere), {}


def early(name: str, seed: int = 0) -> Outcome:
    """Train a network for eight steps: what can be computed again in a second.

    Parameters
    ----------
    name, seed
        As in :func:`fit`.

    Returns
    -------
    tuple of dict
        Results: ``name``, ``seed``, and ``bits`` of the first 64 windows of the validation text. No
        tensors.
    """
    model = fit(name, lr=RATES[0], steps=8, seed=seed)
    loss, _ = bits(model, characters().validation[: 64 * CONTEXT + 1])
    return {"name": name, "seed": seed, "bits": loss}, {}


def run(
    *,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    steps: int = 400,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each network, then train it from all seeds.

    Parameters
    ----------
    rates : sequence of float
        To choose from.
    seeds : int
        Trainings of each network.
    steps : int
        As in :func:`fit`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``steps``; ``early``, those of :func:`early`; ``tried``, rows of :func:`row` of all
        rates; ``rows``, those of the chosen rate. No tensors.
    """
    rows = rows or Rows()
    first = [
        rows.compute(f"early {name}", functools.partial(early, name, seed))[0] for name in NETWORKS
    ]
    tried: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for name in rows.bar(list(NETWORKS), "networks"):
        one = functools.partial(row, name, steps=steps)
        each = range(seed, seed + seeds)
        trials, best = rows.chosen(name, one, rates, each, lambda made: -made["validation"]["bits"])
        tried += trials
        chosen += best
    return {"steps": steps, "early": first, "tried": tried, "rows": chosen}, {}


def summary(record: Record) -> dict[str, dict[str, Any]]:
    """Read a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("characters")``.

    Returns
    -------
    dict
        For each network the rate ``lr``, mean and standard deviation over the seeds of the ``bits``
        per character of the test text, the means of ``right``, ``slope``, ``radius``, ``covered``,
        ``unchanged`` and ``median`` (``None`` where there are none), the largest ``bound``,
        infinite beyond float64, and whether it holds ``everywhere`` or on a ball.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> sorted(summary(records.read("characters")))[0]
    'bound 10'
    """
    found: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        mine = [one for one in record.results["rows"] if one["name"] == name]
        losses = [one["test"]["bits"] for one in mine]
        found[name] = {
            "lr": mine[0]["lr"],
            "bits": (statistics.mean(losses), statistics.stdev(losses)),
            "right": statistics.mean(one["test"]["right"] for one in mine),
        }
        for measure in ("slope", "radius", "covered", "unchanged", "median"):
            values = [one[measure] for one in mine]
            found[name][measure] = None if None in values else statistics.mean(values)
        everywhere = mine[0]["bound"]["everywhere"] is not None
        bounds = [one["bound"]["everywhere" if everywhere else "near"] for one in mine]
        found[name]["everywhere"] = everywhere
        found[name]["bound"] = math.inf if None in bounds else max(bounds)
    return found
