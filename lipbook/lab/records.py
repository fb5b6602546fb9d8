"""Recorded results: what took minutes to compute, with all that says how it was computed.

A record is a JSON file of facts and results and, where tensors belong to it (weights, images), a
safetensors file of the same name. Neither format can run code when it is read. The JSON holds the
hash of the tensors, so that two files that do not belong together are refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lipbook
from lipbook._extras import imported

__all__ = ["Record", "facts", "made", "names", "read", "write", "rounded"]

LIMIT = 3_000_000  # bytes of a safetensors file: records travel with the package
FACTS = ("command", "seed", "seconds", "threads", "hardware", "date", "versions")
# A list or dictionary without another inside stands on one line. In JSON no string has a newline,
# so that only the layout can change.
_INNERMOST = re.compile(r"[\[{][^\[\]{}]*[\]}]")
VERSIONS = ("python", "lipbook", "torch", "numpy", "POT")


@dataclasses.dataclass(frozen=True)
class Record:
    r"""Results of one recipe, with the facts that let anyone compute them again.

    Parameters
    ----------
    name : str
        Name of the recipe and of the files: letters, digits and underscores.
    facts : mapping
        ``command`` that makes the record; ``seed`` that it started from; ``seconds`` of processor
        time it took (where a training went on from its checkpoint, since then); ``threads`` of
        torch; ``hardware``; ``date`` (UTC); ``versions`` of Python, lipbook, torch, NumPy and POT.
        See :func:`facts`. If the run was interrupted and went on somewhere else, ``elsewhere`` has
        hardware, date and versions of its first rows.
    results : mapping
        What JSON can hold, finite numbers only. The recipe says what is in it.
    tensors : mapping of str to torch.Tensor
        Weights and images, 3 MB at most.

    Raises
    ------
    ValueError
        If the name is no identifier, a fact is missing, or the results are no JSON.

    Examples
    --------
    >>> import tempfile
    >>> made = facts("lipbook reproduce example", seed=0, seconds=0.1)
    >>> record = Record("example", made, {"answer": 42}, {"ones": torch.ones(2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write(record, folder)
    ...     again = read("example", folder)
    >>> again.results, again.tensors["ones"], again.facts["seed"]
    ({'answer': 42}, tensor([1., 1.]), 0)
    """

    name: str
    facts: Mapping[str, Any]
    results: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and underscores, got {self.name!r}")
        missing = [fact for fact in FACTS if fact not in self.facts]
        missing += [f"version of {v}" for v in VERSIONS if v not in self.facts.get("versions", {})]
        if missing:
            raise ValueError(
                f"facts of record {self.name!r} must hold all of {FACTS}: no {missing}"
            )
        try:
            json.dumps([self.facts, self.results], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"facts and results of record {self.name!r} must be JSON with finite numbers: "
                f"{error}"
            ) from None

    def __repr__(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return f"Record({self.name!r}, results: {list(self.results)}, tensors: {shapes})"


def facts(command: str, seed: int, seconds: float) -> dict[str, Any]:
    r"""Collect the facts of a record on this machine, now.

    Parameters
    ----------
    command : str
        The command that makes the record again.
    seed : int
        Its seed.
    seconds : float
        Processor time that it took.

    Returns
    -------
    dict
        All that :class:`Record` asks for.

    Examples
    --------
    >>> sorted(facts("python example.py", seed=0, seconds=1.5))
    ['command', 'date', 'hardware', 'seconds', 'seed', 'threads', 'versions']
    """
    return {
        "command": command,
        "seed": seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "hardware": _hardware(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "lipbook": lipbook.__version__,
            "torch": torch.__version__,
            "numpy": metadata.version("numpy"),
            "POT": metadata.version("POT"),
        },
    }


def made(record: Record) -> str:
    r"""Say in one line how a record was made: the command, and each day and machine.

    Parameters
    ----------
    record : Record

    Returns
    -------
    str
        What a chapter prints above the numbers of the record.

    Examples
    --------
    >>> made(read("tightness")).startswith("lipbook reproduce tightness | 20")
    True
    """
    places = [*record.facts.get("elsewhere", []), record.facts]
    days = (f"{place['date']} | {place['hardware']}" for place in places)
    return " | ".join([record.facts["command"], *dict.fromkeys(days)])


def names(folder: str | os.PathLike[str] | None = None) -> list[str]:
    r"""List the records of a folder.

    Parameters
    ----------
    folder : path, optional
        The folder; that of the package if not given.

    Returns
    -------
    list of str
        Names for :func:`read`, in alphabetical order; none if there is no such folder.

    Examples
    --------
    >>> "digit_generator" in names()
    True
    """
    place = _folder(folder)
    return sorted(path.stem for path in place.glob("*.json")) if place.is_dir() else []


def read(
    name: str, folder: str | os.PathLike[str] | None = None, *, tensors: bool = True
) -> Record:
    r"""Read a record.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    folder : path, optional
        The folder; that of the package if not given.
    tensors : bool
        Whether to read the tensors too.

    Returns
    -------
    Record
        With fresh tensors on the CPU, or none.

    Raises
    ------
    FileNotFoundError
        If there is no such record, naming those that exist, or its tensors are missing.
    ValueError
        If the file is no record, or the tensors are not those that the JSON was written with.
    ModuleNotFoundError
        If the record has tensors and safetensors is not installed.

    Examples
    --------
    >>> read("digit_generator").facts["command"]
    'lipbook reproduce digit_generator'
    """
    place = _folder(folder)
    path = place / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no record {name!r} in {place}: expected one of {names(folder)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from None
    if not isinstance(content, dict) or set(content) != {"facts", "results", "tensors"}:
        raise ValueError(f"{path} must hold facts, results and tensors, and nothing else")
    found = _load(path, content["tensors"]) if tensors else {}
    return Record(name, content["facts"], content["results"], found)


def write(record: Record, folder: str | os.PathLike[str] | None = None) -> Path:
    r"""Write a record, over an older one of its name.

    Each file is written under a temporary name and then renamed, tensors first: whoever reads
    meanwhile sees the old record, the new one, or an error that says that the two files differ.

    Parameters
    ----------
    record : Record
        The record.
    folder : path, optional
        Where to; the folder of the package if not given. It is made if it does not exist.

    Returns
    -------
    pathlib.Path
        The JSON file.

    Raises
    ------
    ValueError
        If the tensors take more than 3 MB.
    ModuleNotFoundError
        If the record has tensors and safetensors is not installed.
    """
    place = _folder(folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{record.name}.json"
    tensor_hash, tensor_path = None, path.with_suffix(".safetensors")
    if record.tensors:
        data = imported("safetensors.torch").save(
            {k: t.detach().contiguous() for k, t in record.tensors.items()}
        )
        if len(data) > LIMIT:
            raise ValueError(
                f"tensors of record {record.name!r} must take at most {LIMIT} bytes, "
                f"got {len(data)}"
            )
        tensor_hash = hashlib.sha256(data).hexdigest()
        _replace(tensor_path, data)
    content = {"facts": record.facts, "results": record.results, "tensors": tensor_hash}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    text = _INNERMOST.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    _replace(path, text.encode())
    if not record.tensors:
        tensor_path.unlink(missing_ok=True)
    return path


def rounded(value: Any, digits: int = 8) -> Any:
    r"""Round all floats in nested lists and dictionaries, and write ``None`` for NaN and infinity.

    Parameters
    ----------
    value : object
        What JSON can hold, and NaN and infinity.
    digits : int
        Significant digits that stay.

    Returns
    -------
    object
        The same with rounded floats.

    Examples
    --------
    >>> rounded({"a": [1 / 3, float("inf")], "b": 12345678.9}, 4)
    {'a': [0.3333, None], 'b': 12350000.0}
    """
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        return Path(folder)
    return Path(str(resources.files("lipbook.lab") / "records"))


def _load(path: Path, tensor_hash: str | None) -> dict[str, Tensor]:
    if tensor_hash is None:
        return {}
    tensor_path = path.with_suffix(".safetensors")
    try:
        data = tensor_path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{tensor_path} is missing, which {path.name} needs") from None
    found = hashlib.sha256(data).hexdigest()
    if found != tensor_hash:
        raise ValueError(
            f"{tensor_path} must have the SHA-256 {tensor_hash} that {path.name} was written "
            f"with, got {found}"
        )
    return imported("safetensors.torch").load(data)


def _replace(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp lets the owner alone read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _hardware() -> str:
    """Name the processor, as the system does."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{model or 'unknown processor'}, {os.cpu_count()} cores, {platform.machine()}"
