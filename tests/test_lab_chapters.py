"""Copies of the chapters: what the book calls its places, and text that needs no book."""

from __future__ import annotations

import functools
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lipbook.cli import _chapters, _names
from lipbook.lab.chapters import Names, names, readable

ROOT = Path(__file__).resolve().parent.parent
TOC = """
- caption: One
  numbered: true
  chapters:
    - file: book/first
    - file: book/second
- caption: Rest
  chapters:
    - file: book/more
"""
BIB = """@misc{one2001,
  author = {S{\\"a}lzer, Marco},
  year = {2001},
}

@misc{two2002,
  author = {Prach, Bernd and Lampert, Christoph H.},
  year = {2002},
}

@misc{three2003,
  author = {Anil, Cem and Lucas, James and Grosse, Roger},
  year = {2003},
}
"""


@functools.cache
def everything() -> Names:
    return _names()


def cell(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}


def code(source: str = "1", **metadata: Any) -> dict[str, Any]:
    return {
        "cell_type": "code", "id": "b", "metadata": metadata, "source": source, "outputs": [],
        "execution_count": 1,
    }  # fmt: skip


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def known() -> Names:
    figure = {"figure": {"name": "fig-b", "caption": "x"}}
    statements = (
        "(ch-second)=\n# Norms\n\n:::{prf:definition} Norm\n:label: def-b\n\nx\n:::\n\n"
        ":::{prf:theorem}\n:label: thm-b\n\n$$\na\n$$\n\n$$\nb\n$$ (eq-b)\n:::\n\n"
        ":::{prf:proof}\n:class: dropdown\n\ny\n:::\n\n:::{exercise} Try\n:label: ex-b\n\nz\n:::"
    )
    touched = ":::{touch} disc\n![A disc.](disc.svg)\n\nMove it.\n:::"
    pages = {
        "first.ipynb": notebook(cell("(ch-first)=\n# Maps")),
        "second.ipynb": notebook(cell(statements), cell(touched), code(mystnb=figure)),
    }
    texts = {name: json.dumps(page) for name, page in pages.items()}
    return names(texts | {"more.md": "(ch-more)=\n# More"}, TOC, BIB)


def test_places_are_numbered_as_in_the_book(known: Names) -> None:
    assert known.numbers == {
        "def-b": "Definition 2.1",
        "thm-b": "Theorem 2.2",
        "eq-b": "(2.1)",
        "ex-b": "Exercise 2.1",
        "fig-touch-disc": "Fig. 2.1",
        "fig-b": "Fig. 2.2",
    }
    assert known.titles["ch-first"] == ("Maps", "first.ipynb")
    assert known.works == {
        "one2001": ("Sälzer", "2001"),
        "two2002": ("Prach and Lampert", "2002"),
        "three2003": ("Anil et al.", "2003"),
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{prf:ref}`thm-b`", "Theorem 2.2"),
        ("{prf:ref}`that theorem <thm-b>`", "that theorem"),
        ("{eq}`eq-b`", "(2.1)"),
        ("{numref}`fig-b`", "Fig. 2.2"),
        ("{ref}`ch-first`", "[Maps](first.ipynb)"),
        ("{ref}`here <ch-first>`", "[here](first.ipynb)"),
        ("{ref}`ch-more`", "More"),
        ("{ref}`ex-b`", "Exercise 2.1"),
        ("{cite:t}`three2003`", "Anil et al. (2003)"),
        ("{cite:p}`one2001,two2002`", "[Sälzer, 2001; Prach and Lampert, 2002]"),
        ("{func}`~lipbook.robustness.certify`", "`certify`"),
        ("{class}`torch.nn.Linear`", "`torch.nn.Linear`"),
        ("{term}`GroupSort`", "GroupSort"),
        ("(ch-second)=\n# Norms", "# Norms"),
        (":::{prf:theorem}\n:label: thm-b\n\nx\n:::", ":::{admonition} Theorem 2.2\n\nx\n:::"),
        (
            ":::{exercise} Try\n:label: ex-b\n\nx\n:::",
            ":::{admonition} Exercise 2.1 (Try)\n\nx\n:::",
        ),
        (
            ":::{prf:proof}\n:class: dropdown\n\nx\n:::",
            ":::{admonition} Proof\n:class: dropdown\n\nx\n:::",
        ),
        (
            ":::{solution} ex-b\n:class: dropdown\n\nx\n:::",
            ":::{admonition} Solution of Exercise 2.1\n:class: dropdown\n\nx\n:::",
        ),
        ("$$\nx\n$$", "\\begin{equation*}\nx\n\\end{equation*}"),
        ("$$\nx\n$$ (eq-b)", "\\begin{equation*}\nx\n\\tag{2.1}\n\\end{equation*}"),
        (":::{container} actions\n- x\n:::\n\ny", "y"),
    ],
)
def test_a_text_is_written_without_the_book(written: str, read: str, known: Names) -> None:
    (copied,) = readable(notebook(cell(written)), known)["cells"]
    assert "".join(copied["source"]) == read


def test_answers_to_questions_are_folded(known: Names) -> None:
    asked = (
        ":::{recap}\nOne?\n\n- [ ] a\n\n  No, $a$.\n- [x] b\n\n  By {eq}`eq-b`.\n\nTwo?\n\n"
        "- [x] c\n\n  Yes.\n:::\n\n:::{predict} Which?\nThree?\n\n- [x] d\n\n  So.\n:::"
    )
    (copied,) = readable(notebook(cell(asked)), known)["cells"]
    fold = ":::{admonition} Answers\n:class: dropdown\n\n"
    assert "".join(copied["source"]) == (
        f"::::{{admonition}} Recap\nOne?\n\n- a\n- b\n\n{fold}- a\n\n  **Not so.** No, $a$.\n"
        f"- b\n\n  **Right.** By (2.1).\n:::\n\nTwo?\n\n- c\n\n{fold}- c\n\n  **Right.** Yes.\n:::"
        f"\n::::\n\n::::{{admonition}} Predict: Which?\nThree?\n\n- d\n\n{fold}- d\n\n"
        "  **Right.** So.\n:::\n::::"
    )


def test_solutions_with_code_are_folded(known: Names) -> None:
    start = ":::{solution-start} ex-b\n:class: dropdown\n:::\n\nBecause."
    end = ":::{solution-end}\n:::"
    copied = readable(notebook(cell(start), code("2"), cell(end), code("3")), known)["cells"]
    words, inside, outside = copied
    assert "".join(words["source"]) == (
        "::::{admonition} Solution of Exercise 2.1\n:class: dropdown\n\nBecause.\n::::"
    )
    assert inside["metadata"]["jupyter"]["source_hidden"]
    assert "jupyter" not in outside["metadata"]


def test_a_drawing_shows_before_a_notebook_is_trusted(known: Names) -> None:
    """JupyterLab hides SVG of strangers and shows images."""
    figure = {"figure": {"name": "fig-b", "caption": "By {prf:ref}`thm-b`."}}
    drawn = code(mystnb=figure | {"image": {"alt": 'a "disc"'}})
    drawn["outputs"] = [
        {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": ["<svg/>"]}}
    ]
    (copied,) = readable(notebook(drawn), known)["cells"]
    shown = "".join(copied["outputs"][0]["data"].pop("text/html"))
    assert copied["outputs"][0]["data"] == {}
    assert 'alt="a &quot;disc&quot;"' in shown
    assert "data:image/svg+xml;base64,PHN2Zy8+" in shown
    assert "<b>Fig. 2.2</b> By Theorem 2.2." in shown
    assert drawn["outputs"][0]["data"] == {"image/svg+xml": ["<svg/>"]}, "the chapter was changed"


@pytest.mark.parametrize("path", _chapters(), ids=lambda path: path.stem)
def test_no_key_is_left_in_a_chapter(path: Path) -> None:
    chapter = json.loads(path.read_text("utf-8"))
    known = everything()
    copied = readable(chapter, known)
    text = "\n\n".join("".join(c["source"]) for c in copied["cells"] if c["cell_type"] != "code")
    assert not re.findall(r"\{[\w:]+\}`[^`]*`", text), "a role"
    assert not re.findall(r"^:{3,}\{(?!admonition|grid)[\w:-]+\}.*", text, re.MULTILINE), "a box"
    assert not re.findall(r"^\([\w-]+\)=|\$\$", text, re.MULTILINE), "a label"
    keys = [*known.numbers, *known.titles, *known.works]
    plain = re.sub(r"\]\([\w.]+\)|`[^`]*`", "", text)
    either = "|".join(re.escape(key) for key in keys if re.search(r"[-\d]", key))
    assert not re.findall(rf"(?<![\w-])(?:{either})(?![\w-])", plain)
    before, after = (
        [c["source"] for c in n["cells"] if c["cell_type"] == "code"] for n in (chapter, copied)
    )
    assert before == after


BUILT = sorted((ROOT / "_build" / "html" / "book").glob("*.html"))


@pytest.mark.skipif(not BUILT, reason="no built book: run `make html`")
def test_numbers_are_those_of_the_built_book() -> None:
    """Sphinx numbers the pages; the copies are numbered without it."""
    built: dict[str, str] = {}
    for path in BUILT:
        text = html.unescape(path.read_text("utf-8"))
        for box in re.findall(r'<div class="(?:proof|exercise)[^>]*>.{0,300}', text, re.DOTALL):
            label = re.search(r'id="([^"]+)"', box)
            number = re.search(r'caption-number">\s*([^<]+?)\s*<', box)
            if label and number:
                built[label[1]] = number[1]
        for label, number in re.findall(
            r'id="equation-([\w-]+)">\s*<span class="eqno">(\([\d.]+)', text
        ):
            built[label] = f"{number})"
        figure = r'<figure[^>]* id="([\w-]+)"[^>]*>.*?caption-number">(Fig\. [\d.]+)'
        built |= dict(re.findall(figure, text, re.DOTALL))
    ours = {label: number for label, number in everything().numbers.items() if label in built}
    assert len(ours) > 200
    assert ours == {label: built[label] for label in ours}
    assert {n.split()[0].strip("(") for n in ours.values() if not n.startswith("(")} == {
        "Theorem", "Definition", "Lemma", "Proposition", "Corollary", "Remark", "Exercise", "Fig.",
    }  # fmt: skip
