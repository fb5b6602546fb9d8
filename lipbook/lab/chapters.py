"""The chapters as notebooks to run anywhere: references by name, figures that show, proofs folded.

A chapter is written for the book, where ``{prf:ref}`` becomes "Theorem 4.4" and a figure gets its
caption. A copy to run has no book around it. Here the names are written into the text, theorems
become boxes that JupyterLab shows with jupyterlab-myst and any other reader as text, and figures
become images that show before a notebook is trusted.
"""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Names", "names", "readable"]

KINDS = {
    f"prf:{kind}": kind.capitalize()
    for kind in ("theorem", "definition", "lemma", "proposition", "corollary", "example", "remark")
}
DIRECTIVE = re.compile(r"^(?P<fence>:{3,})\{(?P<name>[\w:-]+)\}[ \t]*(?P<title>.*)$", re.MULTILINE)
TOUCH = re.compile(r"^:{3,}\{touch\}[ \t]*(\w+)", re.MULTILINE)
LABEL = re.compile(r"^:label:\s*(\S+)\n", re.MULTILINE)
PLACE = re.compile(r"^\(([\w-]+)\)=\n+#+ (.+)$", re.MULTILINE)
DISPLAY = re.compile(
    r"^(?P<indent>[ \t]*)\$\$[ \t]*\n(?P<body>.*?)\n[ \t]*\$\$"
    r"(?:[ \t]*\((?P<label>[\w-]+)\))?[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
ROLE = re.compile(r"\{(?P<name>[\w:]+)\}`(?P<content>[^`]+)`")
EXPLICIT = re.compile(r"(?P<text>.+?)\s*<(?P<target>[^<>]+)>", re.DOTALL)
ENTRY = re.compile(r"^@\w+\{([^,\s]+),(.*?)^\}", re.MULTILINE | re.DOTALL)
SITE_ONLY = re.compile(
    r"^(:{3,})\{(?:container|routes)\}.*?^\1[ \t]*$\n*", re.MULTILINE | re.DOTALL
)
SOLUTION = re.compile(
    r"^:{3,}\{solution-start\}[ \t]*(\S+)\n(?::.*\n)*:{3,}[ \t]*$\n*", re.MULTILINE
)
SOLUTION_END = re.compile(r"^:{3,}\{solution-end\}[ \t]*\n:{3,}[ \t]*$\n*", re.MULTILINE)
QUESTIONS = re.compile(
    r"^(?P<fence>:{3,})\{(?P<name>predict|recap)\}(?P<title>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
CHOICE = re.compile(r"^- \[([ x])\] (.*)\n((?:[ \t]*\n|  .*\n)*)", re.MULTILINE)
CHOICES = re.compile(r"(?:^- \[[ x]\] .*\n(?:[ \t]*\n|  .*\n)*)+", re.MULTILINE)
LINK = re.compile(r"^:link: (\S+)\n:link-type: ref\n", re.MULTILINE)
ENVIRONMENT = re.compile(r"\s*\\begin\{(align|gather|equation|multline)\*?\}")
ACCENTS = {'"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303"}
ACCENTS |= {"c": "\u0327", "v": "\u030c", "u": "\u0306", "=": "\u0304", "H": "\u030b"}
LETTERS = {r"\o": "ø", r"\O": "Ø", r"\l": "ł", r"\L": "Ł", r"\ss": "ß", r"\ae": "æ", r"\i": "ı"}
ACCENT = re.compile(r"\\([\"'`^~=]|[cvuH](?=[\s{]))\s*\{?(\\i|\w)\}?")


class Names(NamedTuple):
    """What the book calls the places that the chapters refer to, by their labels."""

    numbers: Mapping[str, str]  #: of theorems, exercises, figures and equations
    titles: Mapping[str, tuple[str, str]]  #: of sections, with the file that holds each
    works: Mapping[str, tuple[str, str]]  #: authors and year


def names(pages: Mapping[str, str], contents: str, bibliography: str) -> Names:
    r"""Find the names and numbers that the book gives to what the chapters refer to.

    Parameters
    ----------
    pages : mapping
        Text of each notebook or Markdown file, by the name of the file.
    contents : str
        The book's ``_toc.yml``: chapters are numbered in its order.
    bibliography : str
        The book's ``references.bib``.

    Returns
    -------
    Names

    Examples
    --------
    >>> from lipbook.lab.chapters import names
    >>> text = "(ch-a)=\n# Radii\n\n:::{prf:theorem} Margin\n:label: thm-a\n\nIt is.\n:::"
    >>> cell = {"cell_type": "markdown", "metadata": {}, "source": text}
    >>> toc = "- caption: One\n  numbered: true\n  chapters:\n    - file: book/a"
    >>> known = names({"a.ipynb": json.dumps({"cells": [cell]})}, toc, "")
    >>> known.numbers["thm-a"], known.titles["ch-a"]
    ('Theorem 1.1', ('Radii', 'a.ipynb'))
    """
    numbers: dict[str, str] = {}
    titles: dict[str, tuple[str, str]] = {}
    parts = [part for part in contents.split("- caption:") if "numbered: true" in part]
    order = [name for part in parts for name in re.findall(r"file: \S*?(\w+)\s*$", part, re.M)]
    for file, text in pages.items():
        cells = json.loads(text)["cells"] if file.endswith(".ipynb") else [_markdown(text)]
        for cell in cells:
            if cell["cell_type"] == "markdown":
                found = PLACE.findall(_source(cell))
                titles |= {label: (title.strip(), file) for label, title in found}
        stem = file.rpartition(".")[0]
        if stem in order:
            numbers |= _numbered(cells, order.index(stem) + 1)
    works = {key: _work(fields) for key, fields in ENTRY.findall(bibliography)}
    return Names(numbers, titles, works)


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def _source(cell: Mapping[str, Any]) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def _numbered(cells: Sequence[Mapping[str, Any]], chapter: int) -> dict[str, str]:
    """Numbers of one chapter: one counter for statements, one each for the rest."""
    found: dict[str, str] = {}
    statements = exercises = figures = equations = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            if "name" in figure:
                figures += 1
                found[figure["name"]] = f"Fig. {chapter}.{figures}"
            continue
        text = _source(cell)
        for name in TOUCH.findall(text):
            figures += 1
            found[f"fig-touch-{name}"] = f"Fig. {chapter}.{figures}"
        for directive in DIRECTIVE.finditer(text):
            label = _label(text, directive)
            if directive["name"] in KINDS:
                statements += 1
                found[label] = f"{KINDS[directive['name']]} {chapter}.{statements}"
            elif directive["name"] == "exercise":
                exercises += 1
                found[label] = f"Exercise {chapter}.{exercises}"
        for display in DISPLAY.finditer(text):
            if display["label"]:
                equations += 1
                found[display["label"]] = f"({chapter}.{equations})"
    found.pop("", None)
    return found


def _label(text: str, directive: re.Match[str]) -> str:
    """Label among the options of a directive, or nothing."""
    options = re.match(r"\n((?::[\w-]+:.*\n)*)", text[directive.end() :])
    label = LABEL.search(options[1]) if options else None
    return label[1] if label else ""


def _unicode(tex: str) -> str:
    """Names as TeX writes them, in letters."""
    text = ACCENT.sub(lambda m: m[2].replace(r"\i", "i") + ACCENTS[m[1]], tex)
    for command, letter in LETTERS.items():
        text = re.sub(rf"{re.escape(command)}(?![a-zA-Z])\s*", letter, text)
    return unicodedata.normalize("NFC", re.sub(r"[{}]", "", text))


def _work(fields: str) -> tuple[str, str]:
    found = re.search(r"^\s*author\s*=\s*\{(.*)\},?\s*$", fields, re.MULTILINE)
    year = re.search(r"^\s*year\s*=\s*\{?(\d{4})", fields, re.MULTILINE)
    people = _unicode(found[1] if found else "").split(" and ")
    last = [person.partition(",")[0].strip() for person in people]
    shown = f"{last[0]} et al." if len(last) > 2 else " and ".join(last)
    return shown, year[1] if year else ""


# --------------------------------------------------------------------------------------- the text


def _role(match: re.Match[str], known: Names) -> str:
    """Write what the book would print for a role."""
    explicit = EXPLICIT.fullmatch(match["content"])
    text, target = (explicit["text"], explicit["target"]) if explicit else ("", match["content"])
    kind = match["name"]
    if kind in ("prf:ref", "eq", "numref") or (kind == "ref" and target in known.numbers):
        number = known.numbers.get(target, target)
        return text.replace("%s", number.partition(" ")[2]) if text else number
    if kind == "ref":
        title, file = known.titles.get(target, (target, ""))
        shown = text or title
        return f"[{shown}]({file})" if file.endswith(".ipynb") else shown
    if kind in ("cite:t", "cite:p"):
        works = [known.works.get(key.strip(), (key.strip(), "")) for key in target.split(",")]
        if kind == "cite:t":
            return ", ".join(f"{who} ({year})" for who, year in works)
        return f"[{'; '.join(f'{who}, {year}' for who, year in works)}]"
    if kind.removeprefix("py:") in ("func", "class", "meth", "data", "mod", "attr", "exc"):
        name = target.rpartition(".")[2] if target.startswith("~") else target
        return f"`{text or name}`"
    return text or target if kind in ("term", "doc") else match[0]


def _display(match: re.Match[str], known: Names) -> str:
    """Display a formula that no reader numbers by itself, with the number of the book."""
    lines = [line for line in match["body"].split("\n") if line.strip()]
    if ENVIRONMENT.match(match["body"]):
        return match[0]
    number = known.numbers.get(match["label"] or "", "")
    if number:
        lines.append(f"{match['indent']}\\tag{{{number.strip('()')}}}")
    indent = match["indent"]
    return "\n".join([f"{indent}\\begin{{equation*}}", *lines, f"{indent}\\end{{equation*}}"])


def _box(match: re.Match[str], text: str, known: Names) -> str:
    """Open a box with its name."""
    kind, title = match["name"], match["title"].strip()
    number = known.numbers.get(_label(text, match), "")
    if kind in KINDS or kind == "exercise":
        shown = f"{number} ({title})" if title else number
    elif kind == "prf:proof":
        shown = title or "Proof"
    elif kind == "solution":
        shown = f"Solution of {known.numbers.get(title, title)}"
    else:
        return match[0]
    return f"{match['fence']}{{admonition}} {shown}".rstrip()


def _prose(text: str, known: Names) -> str:
    """Text of a cell with every name written out."""
    text = SITE_ONLY.sub("", text)
    text = TOUCH.sub(lambda match: _touch(match, known), text)
    text = QUESTIONS.sub(_questions, text)
    text = DISPLAY.sub(lambda match: _display(match, known), text)
    text = DIRECTIVE.sub(lambda match: _box(match, match.string, known), text)
    text = LABEL.sub("", text)
    text = LINK.sub(lambda m: f":link: {known.titles.get(m[1], ('', m[1]))[1]}\n", text)
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)
    return ROLE.sub(lambda match: _role(match, known), text).strip("\n")


def _touch(match: re.Match[str], known: Names) -> str:
    number = known.numbers.get(f"fig-touch-{match[1]}", "Figure")
    return re.sub(r"\{touch\}.*", lambda _: f"{{admonition}} {number}", match[0])


def _questions(match: re.Match[str]) -> str:
    """Fold the answers to the choices of a box below them."""

    def folded(run: re.Match[str]) -> str:
        choices = CHOICE.findall(run[0])
        asked = "\n".join(f"- {words}" for _, words, _ in choices)
        told = "\n".join(
            f"- {words}\n\n  **{'Right' if tick == 'x' else 'Not so'}.** {answer.strip()}"
            for tick, words, answer in choices
        )
        return f"{asked}\n\n:::{{admonition}} Answers\n:class: dropdown\n\n{told}\n:::\n\n"

    title = f"Predict: {match['title'].strip()}" if match["name"] == "predict" else "Recap"
    body = CHOICES.sub(folded, match["body"]).rstrip()
    return f":{match['fence']}{{admonition}} {title}\n{body}\n:{match['fence']}"


def _solution(text: str, known: Names) -> str:
    """Fold the words of a solution whose code follows."""
    before, label, words = SOLUTION.split(text, maxsplit=1)
    name = f"Solution of {known.numbers.get(label, label)}"
    if words.strip():
        box = f"::::{{admonition}} {name}\n:class: dropdown\n\n{words.strip()}\n::::"
    else:
        box = f"**{name}**: the next cells, folded."
    return f"{before}{box}"


# ----------------------------------------------------------------------------------- the notebook


def _figure(output: dict[str, Any], cell: Mapping[str, Any], known: Names) -> None:
    """Turn a drawing into an image with its caption, which shows before a notebook is trusted."""
    drawing = output["data"].pop("image/svg+xml")
    svg = drawing if isinstance(drawing, str) else "".join(drawing)
    options = cell["metadata"].get("mystnb", {})
    figure = options.get("figure", {})
    alt = html.escape(options.get("image", {}).get("alt", ""))
    data = base64.b64encode(svg.encode()).decode()
    number = known.numbers.get(figure.get("name", ""), "")
    words = ROLE.sub(lambda match: _role(match, known), figure.get("caption", ""))
    words = re.sub(r"\[([^]]+)\]\([\w./-]+\)", r"\1", words)
    caption = " ".join(part for part in (f"<b>{number}</b>" if number else "", words) if part)
    image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    output["data"]["text/html"] = [f"{image}\n", f"<p>{caption}</p>"] if caption else [image]


def readable(notebook: Mapping[str, Any], known: Names) -> dict[str, Any]:
    """Copy a chapter to a notebook that reads well without the book.

    Parameters
    ----------
    notebook : mapping
        The chapter, as its JSON is read.
    known : Names
        From :func:`names`.

    Returns
    -------
    dict
        The same code cells in the same order. Code that the book hides, and the code of solutions,
        is folded.

    Examples
    --------
    >>> from lipbook.lab.chapters import Names, readable
    >>> text = "By {prf:ref}`thm-a` of {cite:t}`anil2019sorting`."
    >>> cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}
    >>> known = Names({"thm-a": "Theorem 4.4"}, {}, {"anil2019sorting": ("Anil et al.", "2019")})
    >>> readable({"cells": [cell]}, known)["cells"][0]["source"]
    ['By Theorem 4.4 of Anil et al. (2019).']
    """
    copy: dict[str, Any] = json.loads(json.dumps(notebook))
    cells, inside = [], False
    for cell in copy["cells"]:
        if cell["cell_type"] == "markdown":
            text = _source(cell)
            if SOLUTION_END.search(text):
                inside, text = False, SOLUTION_END.sub("", text)
            if SOLUTION.search(text):
                inside, text = True, _solution(text, known)
            text = _prose(text, known)
            if not text:
                continue
            cell["source"] = text.splitlines(keepends=True)
        else:
            hidden = set(cell["metadata"].get("tags", [])) & {"hide-input", "remove-cell"}
            if hidden or inside:
                cell["metadata"]["jupyter"] = {"source_hidden": True} | (
                    {"outputs_hidden": True} if inside and cell["outputs"] else {}
                )
            for output in cell["outputs"]:
                if "image/svg+xml" in output.get("data", {}):
                    _figure(output, cell, known)
        cells.append(cell)
    copy["cells"] = cells
    return copy
