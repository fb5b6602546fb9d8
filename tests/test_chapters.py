"""How the text of a chapter is set: cells as wide as the column, one box for a prediction."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
CHAPTERS = [
    "index",
    "jacobians",
    "optimisation",
    "composition",
    "activations",
    "orthogonal",
    "convolutions",
]
FOLDED = {"hide-input", "hide-cell", "remove-cell"}
COLUMN = 80


def cells(chapter: str, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_code_that_is_shown_fits_the_column(chapter: str) -> None:
    shown = [
        cell for cell in cells(chapter, "code") if not FOLDED & set(cell.metadata.get("tags", []))
    ]
    wide = [
        f"{cell.id}: {line}"
        for cell in shown
        for line in cell.source.split("\n")
        if len(line) > COLUMN
    ]
    assert not wide, "\n  ".join(["", *wide])


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_prediction_is_asked_for_in_its_own_box(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    boxes = re.findall(r"^:::\{admonition\} Predict.*\n:class: (\S+)$", text, re.MULTILINE)
    assert boxes == ["predict"] * text.count("{admonition} Predict")
    assert "**Predict" not in text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_words_in_formulas_are_upright(chapter: str) -> None:
    """An index or exponent of two letters or more is a word, or it is a product of indices."""
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    for formula in re.findall(r"\$([^$]+)\$", text):
        assert not re.search(r"[_^]\{(?:in|out|inputs|outputs|min|max)\}", formula), formula
