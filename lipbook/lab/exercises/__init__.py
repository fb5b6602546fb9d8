"""Exercises of the book that check an answer: they say what is wrong, never what is right.

A module for each chapter registers the functions that compute the right answers.
"""

from __future__ import annotations

from typing import Any

from lipbook.lab.exercises.registry import Verdict, exercises, judge

__all__ = ["check"]


def check(number: str, answer: Any) -> Verdict:
    """Check an answer to an exercise.

    Numbers may be given as numbers, lists, arrays or tensors, functions as functions, choices as
    words. The right answer is computed, which takes seconds for some.

    Parameters
    ----------
    number : str
        Chapter and place of the exercise, such as ``"4.1"``.
    answer : object
        The answer. With dots, ``...``, nothing is checked.

    Returns
    -------
    Verdict
        True if the answer is right. It shows itself as "Right.", or as what is wrong: the sign, a
        factor, the shape, a usual slip.

    Raises
    ------
    ValueError
        If there is no such exercise; the message lists those of the chapter.

    Examples
    --------
    >>> check("1.1", ...)
    No answer yet: replace the dots.
    """
    chapter, _, place = str(number).partition(".")
    if not (chapter.isdigit() and place.isdigit()):
        raise ValueError(f'number must be like "4.1", chapter and exercise, got {number!r}')
    known = exercises(int(chapter))
    if str(number) not in known:
        raise ValueError(f"number must be one of {', '.join(known)}, got {number!r}")
    return judge(known[str(number)], answer)
