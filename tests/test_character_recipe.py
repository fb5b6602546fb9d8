"""The record of the character transformers is complete and true: a cheap part is computed again."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lipbook.composition import lipschitz_bound
from lipbook.lab import records
from lipbook.lab.data import characters as fresh
from lipbook.lab.recipes import Rows, characters

text = functools.cache(fresh)
SHAPE = (characters.CONTEXT, characters.WIDTH)


@pytest.mark.parametrize("name", characters.NETWORKS)
def test_no_network_knows_what_comes_later(name: str) -> None:
    torch.manual_seed(0)
    model = characters.Reader(name, 35).eval()
    read = torch.randint(35, (2, characters.CONTEXT))
    other = read.clone()
    other[:, 20:] = (read[:, 20:] + 7) % 35
    found, wanted = model(other), model(read)
    assert torch.equal(found[:, :20], wanted[:, :20])
    assert not torch.equal(found[:, 20], wanted[:, 20])
    torch.testing.assert_close(model.last()(model.vectors()[read]), wanted[:, -1])
    factor = characters.NETWORKS[name].factor
    if factor is not None:
        assert lipschitz_bound(model.body, SHAPE).value <= factor * (1 + 1e-5)
        assert model.vectors().norm(dim=1).max() <= 1 + 1e-6


def test_a_bigram_by_hand() -> None:
    """Bits of a table of logits, against a sum over characters."""
    part, table = text().test[:129], torch.randn(35, 35)
    found, right = characters.bits(torch.nn.Embedding.from_pretrained(table), part)
    total, hits = 0.0, 0
    for now, following in zip(part[:-1].tolist(), part[1:].tolist(), strict=True):
        logits = table[now].tolist()
        total -= math.log2(math.exp(logits[following]) / sum(map(math.exp, logits)))
        hits += max(range(35), key=logits.__getitem__) == following
    assert found == pytest.approx(total / 128, rel=1e-5)
    assert right == hits / 128


def test_pairs_are_counted() -> None:
    """In a text of three characters, by hand: a b follow each other, c stands once."""
    logits = characters.pairs(torch.tensor([0, 1, 0, 1, 2]), 3).weight
    expected = [[0.1, 2.1, 0.1], [1.1, 0.1, 1.1], [0.1, 0.1, 0.1]]
    assert logits.exp().tolist() == [pytest.approx(row) for row in expected]


def test_the_first_steps_of_training_come_again() -> None:
    early = records.read("characters").results["early"]
    assert [one["name"] for one in early] == list(characters.NETWORKS)
    for one in early:
        if one["name"] in ("usual", "bound 100, no attention"):
            again, _ = characters.early(one["name"], one["seed"])
            assert again["bits"] == pytest.approx(one["bits"], rel=1e-3)
    with pytest.raises(ValueError, match="name: expected one of"):
        characters.Reader("softmax", 35)


def test_the_record_follows_from_its_trials() -> None:
    record = records.read("characters")
    found = characters.summary(record)
    assert list(found) == list(characters.NETWORKS)
    for name, cell in found.items():
        tried = [r for r in record.results["tried"] if r["name"] == name]
        assert [r["lr"] for r in tried] == list(characters.RATES)
        assert cell["lr"] == min(tried, key=lambda r: r["validation"]["bits"])["lr"]
        rows = [r for r in record.results["rows"] if r["name"] == name]
        assert [(r["seed"], r["lr"]) for r in rows] == [(seed, cell["lr"]) for seed in range(3)]
        kind = characters.NETWORKS[name]
        assert cell["everywhere"] == (kind.attention != "softmax")
        for one in rows:
            assert one["slope"] <= cell["bound"]
            assert one["covered"] <= one["unchanged"]  # what is proved no replacement breaks
            if kind.factor is not None:
                assert one["slope"] <= one["bound"]["everywhere"] <= kind.factor * (1 + 1e-5)


def test_the_chapter_says_what_the_record_has() -> None:
    found = characters.summary(records.read("characters"))
    table = characters.bits(characters.pairs(text().train, 35), text().test)[0]
    bits = {name: cell["bits"][0] for name, cell in found.items()}
    assert all(abs(bits[name] - table) < 0.05 for name in ("distances", "bound 10"))
    usual = bits["usual, convolutions"]
    assert bits["bound 10, convolutions"] - usual == pytest.approx(0.4, abs=0.05)
    assert bits["bound 100, convolutions"] < usual
    assert min(bits, key=bits.__getitem__) == "bound 100, no attention"
    for name, cell in found.items():
        if name.startswith("bound"):
            low, high = (1, 2) if name.startswith("bound 10,") or name == "bound 10" else (1.9, 4)
            assert low < cell["bound"] / cell["slope"] < high
            assert cell["covered"] == 0


def test_a_row_and_a_run_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "CERTIFIED", 16)
    short = text()
    cut = short._replace(train=short.train[:999], validation=short.test[:99], test=short.test[:999])
    monkeypatch.setattr(characters, "characters", lambda: cut)
    one, tensors = characters.row("bound 100, no attention", lr=0.01, steps=1)
    assert not tensors
    assert one["slope"] <= one["bound"]["everywhere"] <= 100 * (1 + 1e-5)
    assert 0 < one["radius"] < one["nearest"] <= one["median"]
    assert one["covered"] == 0
    monkeypatch.setattr(characters, "early", lambda name, seed: ({"name": name, "seed": seed}, {}))
    asked = []

    def measured(name: str, **given: Any) -> Any:
        asked.append(name)
        return {"name": name, "validation": {"bits": given["lr"]}, **given}, {}

    monkeypatch.setattr(characters, "row", measured)
    sizes: dict[str, Any] = {"seeds": 2, "rates": (0.2, 0.1), "rows": Rows(tmp_path)}
    results, _ = characters.run(**sizes)
    assert len(asked) == 3 * len(characters.NETWORKS)
    assert {r["lr"] for r in results["rows"]} == {0.1}
    assert [r["name"] for r in results["early"]] == list(characters.NETWORKS)
    assert characters.run(**sizes)[0] == results
    assert len(asked) == 3 * len(characters.NETWORKS)
