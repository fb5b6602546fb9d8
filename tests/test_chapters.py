"""How the text of a chapter is set: cells as wide as the column, one box for a prediction."""

from __future__ import annotations

import ast
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
    "wasserstein",
    "robustness",
    "generalization",
    "interpretability",
    "tightness",
    "networks",
]
FOLDED = {"hide-input", "hide-cell", "remove-cell"}
COLUMN = 80


def height(cell: nbformat.NotebookNode) -> int:
    return len(cell.source.split("\n"))


def cells(chapter: str, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def shown(chapter: str) -> list[tuple[str, nbformat.NotebookNode]]:
    """Cells of code that are not folded, each with the title of its section."""
    title, found = "", []
    for cell in nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            title = [title, *re.findall(r"^## (.+)$", cell.source, re.MULTILINE)][-1]
        elif not FOLDED & set(cell.metadata.get("tags", [])):
            found.append((title, cell))
    return found


@pytest.mark.parametrize("chapter", [*CHAPTERS, "scoreboard"])
def test_code_that_is_shown_fits_the_column(chapter: str) -> None:
    wide = [
        f"{cell.id}: {line}"
        for _, cell in shown(chapter)
        for line in cell.source.split("\n")
        if len(line) > COLUMN
    ]
    assert not wide, "\n  ".join(["", *wide])


@pytest.mark.parametrize("chapter", [*CHAPTERS, "scoreboard"])
def test_code_that_is_shown_is_short(chapter: str) -> None:
    long = [f"{cell.id}: {lines}" for _, cell in shown(chapter) if (lines := height(cell)) > 40]
    assert not long, "\n  ".join(["", *long])


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_is_built_from_scratch_is_short(chapter: str) -> None:
    """Definitions of a cell together, without empty lines; what tries them is not counted."""
    for title, cell in shown(chapter):
        if title == "From scratch":
            lines = cell.source.split("\n")
            definitions = [
                line
                for node in ast.parse(cell.source).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                for line in lines[node.lineno - 1 : node.end_lineno]
                if line.strip()
            ]
            assert len(definitions) <= 20, f"{cell.id}: {len(definitions)} lines"


def test_guards_are_rarely_in_the_way() -> None:
    """What must hold is printed, folded or tested; an assert that is shown is a statement."""
    counts = {
        chapter: sum(
            len(re.findall(r"^ *assert\b", cell.source, re.MULTILINE))
            for title, cell in shown(chapter)
            if title not in ("From scratch", "Exercises")
        )
        for chapter in [*CHAPTERS, "scoreboard"]
    }
    assert sum(counts.values()) <= 50, counts


@pytest.mark.parametrize("chapter", [*CHAPTERS, "scoreboard"])
def test_a_fold_of_guards_says_so(chapter: str) -> None:
    notebook = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "hide-cell" in cell.metadata.get("tags", []) and "assert" in cell.source:
            assert cell.metadata.mystnb.code_prompt_show == "Show the checks", cell.id


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_proofs_are_folded(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    assert text.count("{prf:proof}") == len(
        re.findall(r"^:::+\{prf:proof\}.*\n:class: dropdown\n", text, re.MULTILINE)
    )


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_prediction_is_asked_for_in_its_own_box(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    boxes = re.findall(r"^:::\{admonition\} Predict.*\n:class: (\S+)$", text, re.MULTILINE)
    assert boxes == ["predict"] * text.count("{admonition} Predict")
    assert "**Predict" not in text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_one_choice_of_a_prediction_is_right_and_each_has_its_reason(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    asked = re.findall(r"^:::\{predict\}.*?^:::$", text, re.MULTILINE | re.DOTALL)
    assert len(asked) == text.count("{predict}")
    for question in asked:
        choices = re.findall(r"^- \[([ x])\] \S.*\n\n  \S", question, re.MULTILINE)
        assert len(choices) == len(re.findall(r"^- ", question, re.MULTILINE)) >= 3
        assert choices.count("x") == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_three_questions_recall_a_section(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    theory = text.partition("\n## From scratch\n")[0] if chapter != "index" else ""
    for section in re.split(r"^## ", theory, flags=re.MULTILINE)[1:]:
        assert "{recap}" in section, section.split("\n", 1)[0]
    for box in re.findall(r"^:::\{recap\}.*?^:::$", text, re.MULTILINE | re.DOTALL):
        lists = re.split(r"\n\n(?=\S[^\n]*(?:\n\S[^\n]*)*\n\n- \[)", box)
        assert len(lists) == 3
        for question in lists:
            choices = re.findall(r"^- \[([ x])\] \S.*\n\n  \S", question, re.MULTILINE)
            assert len(choices) == len(re.findall(r"^- ", question, re.MULTILINE)) >= 2
            assert choices.count("x") == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_second_reading_is_announced_with_the_minutes_that_it_takes(chapter: str) -> None:
    r"""Headings end in \*; words share the minutes, without questions and exercises."""
    text = "\n\n".join(cell.source for cell in cells(chapter, "markdown"))
    said = re.search(r"(\d+) minutes to read, (\d+) without the sections marked \\\*", text)
    text = re.sub(r"^:::\{recap\}.*?^:::$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^## Exercises$.*?^## Summary$", "", text, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
    starred = [part for part in parts if part.split("\n", 1)[0].endswith(r"\*")]
    assert bool(said) == bool(starred)
    if said:
        assert "an asterisk (\\*) are for a second reading" in text
        whole, main = map(int, said.groups())
        later, words = (sum(len(part.split()) for part in each) for each in (starred, parts))
        assert abs(whole * (1 - later / words) - main) < 2


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_words_in_formulas_are_upright(chapter: str) -> None:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    assert not re.findall(r".*[_^]\{(?:in|out|inputs|outputs|min|max)\}.*", text)


def test_times_in_the_text_are_those_of_the_benchmark() -> None:
    """Chapter 5: polar takes four to five times as long as QR, Björck seven to ten."""
    (said,) = [cell.source for cell in cells("orthogonal", "markdown") if cell.id == "cost-after"]
    assert "at 128 and 512 units the polar factor takes four to five times as long as QR" in said
    assert "fifteen steps of Björck seven to ten times" in said
    record = (BOOK.parent / "benchmarks/results.md").read_text("utf-8")
    ratios: dict[str, list[int]] = {"polar": [], "bjorck": []}
    for size in (128, 512):
        table = record.split(f"## Orthogonal square weight and its gradient: {size} × {size}")[1]
        rows = re.findall(
            r"^\| lipbook (\w+) \| ([\d.]+) \|", table.split("\n## ")[0], re.MULTILINE
        )
        times = {name: float(time) for name, time in rows}
        assert {"qr", "cayley"} == set(sorted(times, key=lambda name: times[name])[:2])
        for name, found in ratios.items():
            found.append(round(times[name] / times["qr"]))
    assert ratios == {"polar": [4, 5], "bjorck": [7, 10]}
