from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lipbook
from lipbook.lab import records
from lipbook.lab.records import Record, facts, made, names, read, rounded, write

RESULTS = {"rows": [{"name": "a", "value": 0.5, "ok": True}, {"name": "β", "value": None}], "n": 3}


def record(tensors: dict[str, Tensor] | None = None, name: str = "example") -> Record:
    made = facts("lipbook reproduce example", seed=7, seconds=1.26)
    return Record(name, made, RESULTS, tensors or {})


def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.randn(3, 4, dtype=torch.float64),
        "image": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "turned": torch.randn(4, 2).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("given", [{}, tensors()], ids=["json only", "tensors"])
def test_what_is_written_is_read(tmp_path: Path, given: dict[str, Tensor]) -> None:
    path = write(record(given), tmp_path)
    again = read("example", tmp_path)
    assert path == tmp_path / "example.json"
    assert again.name == "example"
    assert again.facts == record().facts
    assert again.results == RESULTS
    assert set(again.tensors) == set(given)
    for name, tensor in given.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    assert names(tmp_path) == ["example"]


def test_one_line_says_command_day_and_machine() -> None:
    found = {"command": "lipbook reproduce x", "date": "2026-01-02", "hardware": "a machine"}
    line = made(dataclasses.replace(record(), facts={**record().facts, **found}))
    assert line == "lipbook reproduce x | 2026-01-02 | a machine"
    found["elsewhere"] = [{"date": "2026-01-01", "hardware": "another"}]
    line = made(dataclasses.replace(record(), facts={**record().facts, **found}))
    assert line == "lipbook reproduce x | 2026-01-01 | another | 2026-01-02 | a machine"


def test_facts_are_those_of_this_run() -> None:
    made = record().facts
    assert made["seconds"] == 1.3
    assert made["seed"] == 7
    assert made["threads"] == torch.get_num_threads()
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["lipbook"] == lipbook.__version__
    assert made["date"].count("-") == 2
    assert str(os.cpu_count()) in made["hardware"]


@pytest.mark.parametrize("fact", [*records.FACTS, *records.VERSIONS])
def test_an_incomplete_record_is_refused(fact: str) -> None:
    made: dict[str, Any] = json.loads(json.dumps(record().facts))
    del (made["versions"] if fact in made["versions"] else made)[fact]
    with pytest.raises(ValueError, match=f"must hold all of .*{fact}"):
        dataclasses.replace(record(), facts=made)


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.ones(1), {1, 2}])
def test_results_that_json_cannot_hold_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be JSON with finite numbers"):
        dataclasses.replace(record(), results={"value": value})


@pytest.mark.parametrize("name", ["../other", "a b", "", "x.json"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be letters, digits and underscores"):
        record(name=name)


def test_a_missing_record_names_those_that_exist(tmp_path: Path) -> None:
    write(record(name="first"), tmp_path)
    write(record(name="second"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no record 'third' .*\['first', 'second'\]"):
        read("third", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected one of \[\]"):
        read("third", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "must be JSON"), ("[]", "must hold facts"), ('{"facts": {}}', "must hold facts")],
)
def test_another_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "example.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read("example", tmp_path)


def test_tensors_of_another_run_are_refused(tmp_path: Path) -> None:
    write(record({"a": torch.ones(2)}), tmp_path)
    other = tmp_path / "other"
    write(record({"a": torch.zeros(2)}), other)
    os.replace(other / "example.safetensors", tmp_path / "example.safetensors")
    with pytest.raises(ValueError, match="must have the SHA-256"):
        read("example", tmp_path)
    (tmp_path / "example.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"example\.safetensors is missing"):
        read("example", tmp_path)


def test_too_large_a_record_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must take at most 3000000 bytes, got 40"):
        write(record({"a": torch.zeros(1_000_000)}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(record(), tmp_path)
    before = (tmp_path / "example.json").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(dataclasses.replace(record(), results={}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["example.json"]
    assert (tmp_path / "example.json").read_bytes() == before


def test_a_record_without_tensors_takes_the_place_of_one_with(tmp_path: Path) -> None:
    write(record(tensors()), tmp_path)
    write(record(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["example.json"]
    assert read("example", tmp_path).tensors == {}


def test_rounded() -> None:
    value = {"a": (1 / 3, 2, True, "x", None), "b": [[1e300 * 10, math.nan, -math.inf, 1e-9 / 3]]}
    expected = {"a": [0.333, 2, True, "x", None], "b": [[1e301, None, None, 3.33e-10]]}
    assert rounded(value, 3) == expected
    assert rounded(value, 3)["a"][2] is True
