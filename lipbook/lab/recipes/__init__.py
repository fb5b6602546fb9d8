"""Recipes: one module for each experiment that takes minutes.

``lipbook reproduce NAME`` runs one and writes its record. The module of a recipe has a function
``run(*, rows, ...)`` that returns results (plain JSON) and tensors; its other
arguments are the sizes and have the recorded ones as defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lipbook.lab import records

__all__ = ["Rows", "recipes"]

Item = TypeVar("Item")
Outcome = tuple[dict[str, Any], dict[str, Tensor]]
PLACE = ("hardware", "date", "versions")  # facts that may change while a run is interrupted


def recipes() -> list[str]:
    """List the names of all recipes.

    Returns
    -------
    list of str
        In alphabetical order.

    Examples
    --------
    >>> "known_answers" in recipes()
    True
    """
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


@dataclasses.dataclass
class Rows:
    r"""Rows of a table, each computed once: what is finished survives an interruption.

    Parameters
    ----------
    folder : path, optional
        Where finished rows are kept, one file each. Without it nothing is kept.
    progress : bool
        Show a bar while rows are computed.

    Attributes
    ----------
    earlier : float
        Seconds of processor time that the rows found so far took when they were computed.
    elsewhere : list of dict
        Where rows were found that another machine, another day or other versions computed: their
        ``hardware``, ``date`` and ``versions``, and the names of the ``rows``.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = Rows(folder).compute("a row", lambda: ({"answer": 42}, {}))
    ...     again = Rows(folder).compute("a row", lambda: ({"answer": "not asked for"}, {}))
    >>> first == again == ({"answer": 42}, {})
    True
    """

    folder: str | os.PathLike[str] | None = None
    progress: bool = False
    earlier: float = dataclasses.field(default=0.0, init=False)
    elsewhere: list[dict[str, Any]] = dataclasses.field(default_factory=list, init=False)
    _names: dict[str, str] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def compute(self, name: str, function: Callable[[], Outcome]) -> Outcome:
        """Compute a row, or find the one of this name.

        Parameters
        ----------
        name : str
            Name of the row; another one for each row, in its letters and digits.
        function : callable
            Computes results and tensors.

        Returns
        -------
        tuple of dict
            Results and tensors of the row.

        Raises
        ------
        ValueError
            Another row had the same letters and digits in its name.
        """
        file = re.sub(r"\W+", "-", name) + ".row"
        if self._names.setdefault(file, name) != name:
            raise ValueError(f"name: {name!r} has the file {file} of {self._names[file]!r}")
        path = Path(self.folder, file) if self.folder else None
        if path and path.exists():
            content, tensors = _load(path)
            self.earlier += content["seconds"]
            self._note(name, content["place"])
            return content["results"], tensors
        start = time.process_time()
        results, tensors = function()
        if path:
            _save(path, results, tensors, time.process_time() - start)
        return results, tensors

    def chosen(
        self,
        name: str,
        function: Callable[..., Outcome],
        rates: Sequence[float],
        seeds: Sequence[int],
        score: Callable[[dict[str, Any]], float],
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Choose a rate by the first seed, then compute the rows of all seeds at that rate.

        Parameters
        ----------
        name : str
            What the rows have in common; rate and seed are added to it.
        function : callable
            Computes a row for ``lr=`` and ``seed=``, whose results have ``"lr"``.
        rates : sequence of float
            To choose from.
        seeds : sequence of int
            The first one chooses.
        score : callable
            Of the results of a row; the largest is chosen.

        Returns
        -------
        tuple of list
            Results of all rates with the first seed, and of all seeds with the chosen rate.
        """

        def row(lr: float, seed: int) -> dict[str, Any]:
            made = functools.partial(function, lr=lr, seed=seed)
            results: dict[str, Any] = self.compute(f"{name} rate {lr} seed {seed}", made)[0]
            return results

        tried = [row(lr, seeds[0]) for lr in rates]
        best = max(tried, key=score)
        return tried, [best, *(row(best["lr"], seed) for seed in seeds[1:])]

    def _note(self, name: str, place: dict[str, Any]) -> None:
        if place == _place():
            return
        for known in self.elsewhere:
            if known | place == known:
                known["rows"].append(name)
                return
        self.elsewhere.append({**place, "rows": [name]})

    def bar(self, items: Sequence[Item], what: str) -> Iterable[Item]:
        """Go through the items, with a bar if one is to be shown.

        Parameters
        ----------
        items : sequence
            One for each row.
        what : str
            What they are, in the plural, before the bar.

        Returns
        -------
        iterable
            The same items.
        """
        from tqdm import tqdm  # noqa: PLC0415 - not needed to import a recipe

        return tqdm(items, desc=what, disable=not self.progress)

    def checkpoint(self) -> Path | None:
        """Name a file for the checkpoint of a single long training.

        Returns
        -------
        pathlib.Path or None
            In the folder, which is made; none without a folder.
        """
        if self.folder is None:
            return None
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        return Path(self.folder, "training.checkpoint")


def _place() -> dict[str, Any]:
    """Facts of this machine, today."""
    facts = records.facts("", seed=0, seconds=0)
    return {name: facts[name] for name in PLACE}


def _load(path: Path) -> Outcome:
    from safetensors import safe_open  # noqa: PLC0415 - not needed to import a recipe

    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["row"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return content, tensors


def _save(path: Path, results: Any, tensors: dict[str, Tensor], seconds: float) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - not needed to import a recipe

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    row = json.dumps({"results": results, "seconds": seconds, "place": _place()})
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"row": row})
    os.replace(temporary, path)
