"""How an exercise is registered, and how an answer is compared with the right one."""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHAPTERS", "KINDS", "Exercise", "Verdict", "exercise", "exercises", "judge"]

Kind = Literal["warm-up", "derive", "compute", "change the experiment", "project"]

#: Modules of the chapters, in the order of the book.
CHAPTERS = (
    *("jacobians", "optimisation", "composition", "activations", "orthogonal", "convolutions"),
    *("wasserstein", "robustness", "generalization", "interpretability", "tightness", "networks"),
)
#: Kinds of exercises.
KINDS = ("warm-up", "derive", "compute", "change the experiment", "project")

_registry: dict[str, Exercise] = {}


@dataclasses.dataclass(frozen=True)
class Exercise:
    """An exercise whose answer can be checked.

    Parameters
    ----------
    number : str
        Chapter and place, such as ``"4.1"``.
    level : int
        1, 2 or 3 stars.
    kind : str
        One of ``KINDS``.
    solve : callable
        Computes the right answer.
    mistakes : mapping
        What comes out of typical slips, by what was done.
    rtol, atol : float
        Relative and absolute tolerance of an entry.
    at : callable, optional
        For an answer that is a function: gives the inputs, a sequence of tuples of arguments.
    complaint : callable, optional
        For a question with several right answers: says what is wrong with one, or None.
    """

    number: str
    level: int
    kind: Kind
    solve: Callable[[], Any]
    mistakes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rtol: float = 1e-3
    atol: float = 1e-6
    at: Callable[[], Sequence[tuple[Any, ...]]] | None = None
    complaint: Callable[[Any], str | None] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What :func:`lipbook.lab.exercises.check` says; true if the answer is right.

    Parameters
    ----------
    right : bool
        Whether it is.
    message : str
        Shown as the result of a cell.
    """

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.message


def exercise(
    number: str,
    *,
    level: int,
    kind: Kind,
    mistakes: Mapping[str, Any] | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    at: Callable[[], Sequence[tuple[Any, ...]]] | None = None,
    complaint: Callable[[Any], str | None] | None = None,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the function that computes the right answer of an exercise.

    Parameters
    ----------
    number, level, kind, mistakes, rtol, atol, at, complaint
        As in :class:`Exercise`.

    Returns
    -------
    callable
        A decorator that gives the function back.

    Raises
    ------
    ValueError
        If the number is taken, or ``level`` or ``kind`` is none of those above.
    """
    if number in _registry:
        raise ValueError(f"number {number} is registered already")
    if level not in (1, 2, 3):
        raise ValueError(f"level must be 1, 2 or 3, got {level!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")

    def register(solve: Callable[[], Any]) -> Callable[[], Any]:
        options = (mistakes or {}, rtol, atol, at, complaint)
        _registry[number] = Exercise(number, level, kind, solve, *options)
        return solve

    return register


def exercises(chapter: int) -> dict[str, Exercise]:
    """List the exercises of a chapter by number.

    Parameters
    ----------
    chapter : int
        1 to 12.

    Returns
    -------
    dict of str to Exercise
        In the order of the chapter.

    Raises
    ------
    ValueError
        If there is no such chapter.
    """
    if not 1 <= chapter <= len(CHAPTERS):
        raise ValueError(f"chapter must be 1 to {len(CHAPTERS)}, got {chapter}")
    importlib.import_module(f"lipbook.lab.exercises.{CHAPTERS[chapter - 1]}")
    found = {n: e for n, e in _registry.items() if n.split(".")[0] == str(chapter)}
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


def judge(task: Exercise, answer: Any) -> Verdict:
    """Compare an answer with the right one, which is computed and never shown.

    Parameters
    ----------
    task : Exercise
        The exercise.
    answer : object
        The reader's.

    Returns
    -------
    Verdict
    """
    if answer is ...:
        return Verdict(False, "No answer yet: replace the dots.")
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float64)
        try:
            if task.complaint is not None:
                wrong = task.complaint(answer)
            else:
                wrong = _difference(task, answer, task.solve())
        finally:
            torch.set_default_dtype(dtype)
    return Verdict(wrong is None, "Right." if wrong is None else f"Not right. {wrong}")


def _difference(task: Exercise, answer: Any, right: Any) -> str | None:
    if callable(right) and task.at is not None:
        return _functions(task, answer, right)
    if isinstance(right, str):
        return _words(answer, right)
    if isinstance(right, (set, frozenset)):
        return _sets(answer, right)
    try:
        found = _array(answer)
    except (TypeError, ValueError):
        return f"Expected {_form(_array(right))}, got {type(answer).__name__}."
    return _numbers(task, found, _array(right))


def _functions(task: Exercise, answer: Any, right: Callable[..., Any]) -> str | None:
    assert task.at is not None
    if not callable(answer):
        return f"Expected a function, got {type(answer).__name__}."
    for arguments in task.at():
        try:
            found = answer(*arguments)
        except Exception as error:
            return f"Your function raises {type(error).__name__}: {error}"
        wrong = _difference(
            dataclasses.replace(task, at=None, mistakes={}), found, right(*arguments)
        )
        if wrong is not None:
            return f"At one of the inputs that were tried: {wrong}"
    return None


def _words(answer: Any, right: str) -> str | None:
    if not isinstance(answer, str):
        return f"Expected a word in quotes, got {type(answer).__name__}."
    same = answer.strip().casefold() == right.casefold()
    return None if same else "Another choice is right."


def _sets(answer: Any, right: set[Any] | frozenset[Any]) -> str | None:
    if isinstance(answer, (str, numbers.Number)) or not hasattr(answer, "__iter__"):
        return f"Expected a set, got {type(answer).__name__}."
    found = set(answer)
    if found == right:
        return None
    more, missing = len(found - right), len(right - found)
    return f"Elements that do not belong: {more}; elements that are missing: {missing}."


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    elif isinstance(value, (list, tuple)):
        value = [_array(entry) for entry in value]
    found = np.asarray(value)
    if found.dtype.kind not in "biufc":
        raise TypeError(f"expected numbers, got {type(value).__name__}")
    return found if found.dtype.kind == "c" else found.astype(np.float64)


def _form(array: np.ndarray) -> str:
    if array.ndim == 0:
        return "a number"
    return f"{array.size} numbers" if array.ndim == 1 else f"an array of shape {array.shape}"


def _numbers(task: Exercise, found: np.ndarray, right: np.ndarray) -> str | None:
    if _same(found, right, task):
        return None
    return next(_diagnoses(task, found, right))


def _same(found: np.ndarray, right: np.ndarray, task: Exercise) -> bool:
    return found.shape == right.shape and np.allclose(found, right, task.rtol, task.atol)


def _diagnoses(task: Exercise, found: np.ndarray, right: np.ndarray) -> Iterator[str]:
    """Say what may be wrong, the most telling first; the last holds always."""
    if not np.isfinite(found).all() and np.isfinite(right).all():
        yield "It is not finite."
    for slip, wrong in task.mistakes.items():
        if _same(found, _array(wrong), task):
            yield f"A usual slip leads there: {slip}."
    if found.shape != right.shape:
        yield _shapes(task, found, right)
    for what, turned in _turns(found):
        if _same(turned, right, task):
            yield f"{what}."
    if found.ndim and _same(np.sort(found, None), np.sort(right, None), task):
        yield "These are the right numbers in another order."
    if (factor := _factor(found, right, task)) is not None:
        yield f"It is right up to the factor {factor}."
    good = np.isclose(found, right, task.rtol, task.atol)
    if good.any():
        yield f"{good.sum()} of {good.size} entries are right."
    if np.allclose(found, right, 0.05, task.atol):
        yield "It is near, but not near enough."
    yield "The exercise has a hint."


def _shapes(task: Exercise, found: np.ndarray, right: np.ndarray) -> str:
    expected = f"Expected {_form(right)}, got {_form(found)}"
    if _same(found.T, right, task):
        return f"{expected}: transpose it."
    if found.size == right.size and _same(found.reshape(right.shape), right, task):
        return f"{expected}: the entries are right."
    return f"{expected}."


def _turns(found: np.ndarray) -> list[tuple[str, np.ndarray]]:
    turns = [
        ("The sign is wrong", -found),
        ("Its root is right", np.sqrt(np.abs(found)) * np.sign(found)),
        ("Its square is right", found**2),
        ("One less is right", found - 1),
        ("One more is right", found + 1),
    ]
    if (found != 0).all():
        turns.append(("Its reciprocal is right", 1 / found))
    if found.ndim == 2 and found.shape[0] == found.shape[1]:
        turns.append(("Transpose it", found.T))
    return turns


#: Factors that are forgotten, and how they are written.
_FACTORS = {
    2.0: "2", 0.5: "1/2", 4.0: "4", 0.25: "1/4", math.sqrt(2): "√2", math.sqrt(0.5): "1/√2",
    math.pi: "π", 2 * math.pi: "2π", 1 / math.pi: "1/π", 10.0: "10", 100.0: "100", 0.01: "1/100",
}  # fmt: skip


def _factor(found: np.ndarray, right: np.ndarray, task: Exercise) -> str | None:
    nonzero = right != 0
    if not nonzero.any() or (found == 0).all():
        return None
    factor = float(np.real(found[nonzero] / right[nonzero]).flat[0])
    if not np.allclose(found, factor * right, task.rtol, task.atol):
        return None
    for known, name in _FACTORS.items():
        if math.isclose(abs(factor), known, rel_tol=task.rtol):
            return f"−{name}" if factor < 0 else name
    return f"{factor:.4g}" if nonzero.sum() >= 3 else None
