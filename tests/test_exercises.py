"""Exercises: every answer that is right is taken, every usual mistake is told, none is shown."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lipbook.lab.exercises import check
from lipbook.lab.exercises.registry import (
    CHAPTERS,
    KINDS,
    Exercise,
    Verdict,
    exercise,
    exercises,
    judge,
)

BOOK = Path(__file__).parents[1] / "book"


# ------------------------------------------------------------------------------- comparisons


def answered(right: object, answer: object, **options: object) -> Verdict:
    return judge(Exercise("0.1", 1, "compute", lambda: right, **options), answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "answer", "message"),
    [
        (3.0, ..., "No answer yet"),
        (3.0, "three", "Expected a number, got str"),
        (3.0, None, "Expected a number"),
        (3.0, math.nan, "not finite"),
        (3.0, [3.0], "Expected a number, got 1 numbers: the entries are right"),
        (3.0, -3.0, "sign"),
        (3.0, 6.0, "factor 2"),
        (3.0, 3 * math.sqrt(2), "factor √2"),
        (3.0, -1.5, "factor −1/2"),
        (3.0, 9.0, "root"),
        (4.0, 1 / 4, "reciprocal"),
        (3.0, math.sqrt(3), "square"),
        (3.0, 4.0, "One less"),
        (3.0, 3.05, "near"),
        (3.0, 17.0, "hint"),
        ([1.0, 2.0, 4.0], [4.0, 1.0, 2.0], "another order"),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 5.0], "2 of 3 entries"),
        ([1.0, 2.0, 4.0], [1.0, 2.0], "Expected 3 numbers, got 2 numbers"),
        ([1.0, 2.0, 4.0], [1.3, 2.6, 5.2], "factor 1.3"),
        ([[1.0, 2.0], [3.0, 4.0]], np.array([[1.0, 3.0], [2.0, 4.0]]), "Transpose"),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], torch.arange(1.0, 7).view(2, 3).T, "transpose it"),
        ("b", "c", "Another choice"),
        ("b", 2, "word in quotes"),
        ({1, 2}, {2, 3}, "that do not belong: 1; elements that are missing: 1"),
        ({1, 2}, 1, "Expected a set"),
    ],
)
def test_what_is_wrong_is_said_and_the_answer_is_not(
    right: object, answer: object, message: str
) -> None:
    verdict = answered(right, answer)
    assert not verdict
    assert message in repr(verdict)
    if isinstance(right, float):
        assert f"{right:g}" not in repr(verdict)


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        (3.0, 3),
        (3.0, np.float32(3)),
        (3.0, torch.tensor(3.0, requires_grad=True)),
        ([1.0, 2.0], (1, torch.tensor(2.0))),
        ("both", " Both"),
        ({1, 2}, [2, 1, 1]),
        (1j, 1j),
    ],
)
def test_right_answers_are_taken_in_any_form(right: object, answer: object) -> None:
    assert answered(right, answer)
    assert repr(answered(right, answer)) == "Right."


def test_functions_are_compared_where_they_are_tried() -> None:
    at = {"at": lambda: [(2.0,), (3.0,)]}
    assert answered(lambda x: x**2, lambda x: x * x, **at)
    assert "factor 2" in repr(answered(lambda x: x**2, lambda x: 2 * x * x, **at))
    assert "raises ZeroDivisionError" in repr(answered(lambda x: x, lambda x: x / 0, **at))
    assert "Expected a function" in repr(answered(lambda x: x, 3, **at))


def test_a_question_with_many_answers_has_a_judge_of_its_own() -> None:
    even = {"complaint": lambda answer: None if answer % 2 == 0 else "It is odd."}
    assert answered(2, 4, **even)
    assert "It is odd." in repr(answered(2, 3, **even))


def test_slips_are_named() -> None:
    verdict = answered(3.0, 5.0, mistakes={"the sum in place of the norm": 5.0})
    assert "the sum in place of the norm" in repr(verdict)


def test_checking_leaves_the_reader_alone() -> None:
    def solve() -> float:
        return torch.rand(1).item() + torch.get_default_dtype().itemsize

    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    judge(Exercise("0.1", 1, "compute", solve), 3.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize("number", ["", "4", "four.1", "4.1.1", None])
def test_a_number_has_a_chapter_and_a_place(number: object) -> None:
    with pytest.raises(ValueError, match=r"number must be like \"4\.1\""):
        check(number, 1)  # type: ignore[arg-type]


def test_unknown_numbers_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"number must be one of 1\.1, .*got '1\.99'"):
        check("1.99", 1)
    with pytest.raises(ValueError, match="chapter must be 1 to 12, got 13"):
        check("13.1", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": "1.1", "level": 1, "kind": "compute"}, "registered already"),
        ({"number": "0.1", "level": 4, "kind": "compute"}, "level must be"),
        ({"number": "0.1", "level": 1, "kind": "guess"}, "kind must be"),
    ],
)
def test_registration_is_checked(options: dict, message: str) -> None:
    exercises(1)
    with pytest.raises(ValueError, match=message):
        exercise(options.pop("number"), **options)


# --------------------------------------------------------------------------- all of the book


@functools.cache
def cells(chapter: int) -> list[dict]:
    return json.loads((BOOK / f"{CHAPTERS[chapter - 1]}.ipynb").read_text())["cells"]


@functools.cache
def of_the_page(chapter: int) -> dict[str, str]:
    """Statements of the exercises of a chapter, numbered as the page numbers them."""
    text = "\n".join("".join(c["source"]) for c in cells(chapter) if c["cell_type"] == "markdown")
    found = re.findall(r"^(:{3,})\{exercise\}(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    return {f"{chapter}.{i + 1}": body for i, (_, body) in enumerate(found)}


@pytest.mark.parametrize("chapter", range(1, len(CHAPTERS) + 1))
def test_exercises_of_a_chapter_are_those_of_its_page(chapter: int) -> None:
    known, page = exercises(chapter), of_the_page(chapter)
    code = "\n".join("".join(c["source"]) for c in cells(chapter) if c["cell_type"] == "code")
    asked = re.findall(r"^check\(\"(\d+\.\d+)\", answer\)$", code, re.MULTILINE)
    assert asked == list(known)  # an answer cell for each, in the order of the page
    assert set(known) <= set(page)
    assert len(page) >= 8
    levels = [body.partition("\n")[0].count("★") for body in page.values()]
    assert levels == sorted(levels)
    assert set(levels) == {1, 2, 3}
    for number, task in known.items():
        assert page[number].partition("\n")[0].count("★") == task.level
        assert f"*{task.kind.capitalize()}.*" in page[number]
    for body in page.values():
        assert re.search(r"\*(Warm-up|Derive|Compute|Change the experiment|Project)\.\*", body)


def test_the_book_has_exercises_of_all_kinds() -> None:
    kinds = Counter(
        re.search(r"\*([A-Z][\w -]+)\.\*", body)[1].lower()  # type: ignore[index]
        for chapter in range(1, len(CHAPTERS) + 1)
        for body in of_the_page(chapter).values()
    )
    assert set(kinds) == set(KINDS)
    assert sum(kinds.values()) >= 110


@pytest.mark.parametrize("chapter", range(1, len(CHAPTERS) + 1))
def test_solutions_are_right_and_slips_are_told(chapter: int) -> None:
    for number, task in exercises(chapter).items():
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            right = task.solve()
        finally:
            torch.set_default_dtype(dtype)
        assert check(number, right), number
        known = dataclasses.replace(task, solve=lambda right=right: right)  # computed twice above
        for slip, wrong in task.mistakes.items():
            verdict = judge(known, wrong)
            assert not verdict, (number, slip)
            assert slip in repr(verdict) or "not finite" in repr(verdict), (number, slip)
