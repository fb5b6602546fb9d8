"""The page of symbols agrees with the chapters: where each is used, and where first."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book/notation.md").read_text("utf-8")
ROWS = re.findall(r"^\| (\$.+\$) \| (.+) \| \{ref\}`ch-(\w+)` \|$", PAGE, re.MULTILINE)

MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+)\$", re.DOTALL)
TOKEN = re.compile(r"\\[A-Za-z]+|\S")
LOCAL = re.compile(  # proofs, exercises and solutions may use a letter for something else
    r"^:{3,}\{(?:prf:proof|exercise|solution)\}.*?^:{3,}$"
    r"|^:{3,}\{solution-start\}.*?^:{3,}\{solution-end\}$",
    re.MULTILINE | re.DOTALL,
)
WORDS = re.compile(r"\\(?:operatorname|text|mathrm|mathbf|begin|end)\{[^}]*\}|\\math(?:bb|cal) *\w")


def numbered_chapters() -> list[str]:
    table = (ROOT / "_toc.yml").read_text("utf-8")
    parts = [part for part in table.split("- caption:") if "numbered: true" in part]
    return [name for part in parts for name in re.findall(r"file: book/(\w+)", part)]


def tokens(formula: str) -> list[str]:
    return TOKEN.findall(re.sub(r"\\[,;:! ]", " ", formula))


def formulas(chapter: str, *, local: bool) -> list[str]:
    cells = nbformat.read(ROOT / f"book/{chapter}.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return ["".join(groups) for groups in MATH.findall(text if local else LOCAL.sub("", text))]


def needle(symbol: str) -> list[str]:
    """What to look for: of a norm, the bars that close it with their index."""
    return tokens(symbol[symbol.rfind(r"\rVert") :] if r"\rVert" in symbol else symbol)


def uses(chapter: str, symbol: str, *, local: bool = False) -> bool:
    wanted = needle(symbol)
    for formula in formulas(chapter, local=local):
        plain = formula if "{" in symbol else WORDS.sub(" ", formula)
        found = tokens(plain)
        spans = range(len(found) - len(wanted) + 1)
        if any(found[start : start + len(wanted)] == wanted for start in spans):
            return True
    return False


@pytest.mark.parametrize(("symbols", "meaning", "first"), ROWS, ids=[row[0] for row in ROWS])
def test_symbol_is_used_where_the_page_says(symbols: str, meaning: str, first: str) -> None:
    named = re.findall(r"\{ref\}`ch-(\w+)`", meaning)
    for symbol in re.findall(r"\$(.+?)\$", symbols):
        assert uses(first, symbol), f"{symbol} is not used in {first}"
        chapters = numbered_chapters()
        for earlier in chapters[: chapters.index(first)]:
            assert earlier in named or not uses(earlier, symbol), f"{symbol} is used in {earlier}"
    used = [
        any(uses(name, s, local=True) for s in re.findall(r"\$(.+?)\$", symbols)) for name in named
    ]
    assert all(used), f"{symbols}: of {named} only {used} use it"


def test_every_row_is_read() -> None:
    assert len(ROWS) == PAGE.count("\n| $") > 20


def test_a_symbol_is_found_between_others() -> None:
    """Tokens, not characters: eta is in -eta J, and e is not in eta."""
    assert tokens(r"-\eta J^\top g") == ["-", r"\eta", "J", "^", r"\top", "g"]
    assert needle(r"\lVert A \rVert_F") == [r"\rVert", "_", "F"]
