"""Search by section: the index, and a page that works from a folder as from a host.

The built pages are read section by section: chapters' sections, theorems, exercises, glossary
terms, API entries and works of the bibliography each become one entry with an address of its
own. Prose counts; code, outputs, long formulas and questions with their wrong answers do not, and
of an API entry what comes first. The entries are written as a script, which a page opened from a
folder may load too, and `search.js` looks through them with MiniSearch. Sphinx's own index is by
page: it is removed, except for its word stems.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

INDEX = "search-sections.js"
LONGEST = 250  # characters of an API entry
UNUSED = ("searchindex.js", "_static/searchtools.js")
SKIPPED = (
    "div.cell_input, div.cell_output, details.hide, div.highlight, nav, a.headerlink, script, "
    "style, p.used-in, a.viewcode-link, span.eqno, div.routes, figure img, .sd-stretched-link, "
    "div.recap, details.choice"
)
PLAIN = re.compile(r"[\w\s.,+\-=<>|/()']{1,24}")
HEADING = re.compile(r"h[1-6]$")
# What an entry is worth beside a section of a chapter with the same words.
WORTH = {"section": 1.0, "theorem": 0.8, "term": 0.6, "api": 0.35, "exercise": 0.4, "work": 0.4}
CHAPTER = re.compile(r"\d")
AUXILIARY = {"Exercises", "Summary", "Further reading", "What goes wrong", "From scratch"}


class Entry(NamedTuple):
    """One place that a search can lead to."""

    url: str
    page: str
    title: str
    text: str
    kind: str
    above: str = ""  # address of the section that holds it
    terms: str = ""  # what it introduces: words in bold, names of theorems


def formula(text: str) -> str:
    """Plain form of inline mathematics, an ellipsis where there is none."""
    body = text.removeprefix("\\(").removesuffix("\\)").strip()
    body = re.sub(r"\\(?:ell|infty|sigma|le|ge)\b", lambda m: SIGNS[m.group()], body)
    return body if PLAIN.fullmatch(body) else "…"


SIGNS = {r"\ell": "ℓ", r"\infty": "∞", r"\sigma": "σ", r"\le": "≤", r"\ge": "≥"}


def words(node: Tag) -> str:
    return " ".join(node.get_text(" ", strip=False).split())


def prose(node: Tag, inner: str = "") -> str:
    """Text of `node` without the parts that the selector `inner` finds in it."""
    copy = BeautifulSoup(str(node), "html.parser")
    for part in copy.select(inner) if inner else []:
        if part.parent is not None and part.parent.name != "[document]":
            part.decompose()
    text = words(copy)
    return re.sub(r"\s+([,.;:!?)])", r"\1", re.sub(r"\(\s+", "(", text))


def clean(html: str) -> Tag | None:
    """Article of a page without what is not prose."""
    article = BeautifulSoup(html, "html.parser").select_one("article.bd-article")
    if article is None:
        return None
    for part in article.select(SKIPPED):
        part.decompose()
    for block in article.select("div.math"):
        block.replace_with(" … ")
    for inline in article.select("span.math"):
        inline.replace_with(formula(inline.get_text()))
    return article


def author_and_year(reference: str) -> str:
    """First author and year of a work, as the text quotes them."""
    authors = re.split(r"(?<=[^\W\d_]{2})\. ", reference)[0]
    names = [name for name in re.split(r",? and |, ", authors) if name]
    others = {1: "", 2: f" and {names[-1].split()[-1]}"}.get(len(names), " et al.")
    year = re.findall(r"\b(?:19|20)\d\d\b", reference)
    return f"{names[0].split()[-1]}{others}" + (f", {year[-1]}" if year else "")


def heading_of(section: Tag) -> str:
    heading = section.find(HEADING, recursive=False)
    return words(heading) if isinstance(heading, Tag) else ""


def read(html: str, address: str) -> Iterator[Entry]:
    """Entries of one page, in reading order."""
    article = clean(html)
    top = article.find("h1") if article else None
    if article is None or not isinstance(top, Tag):
        return
    page = words(top)

    def above(node: Tag) -> str:
        section = node.find_parent("section", id=True)
        return f"{address}#{section['id']}" if section else address

    for section in article.find_all("section", id=True):
        title = heading_of(section)
        if not title:
            continue
        text = prose(section, "section, dl.py, dl.glossary, div.citation, h1, h2, h3, h4")
        own = section.find_all("section", recursive=False)
        if not text and own:
            continue
        url = address if section.find("h1", recursive=False) else f"{address}#{section['id']}"
        named = section.select(":scope > p strong, :scope > div.proof > p.admonition-title")
        terms = "; ".join(word for word in map(words, named) if word != "Proof")
        yield Entry(url, page, title, text, "section", terms=terms)
    for box in article.select("div.proof[id], div.exercise[id]"):
        heading = box.select_one("p.admonition-title")
        title = words(heading) if heading else ""
        kind = "exercise" if "exercise" in box["class"] else "theorem"
        body = prose(box, "p.admonition-title")
        yield Entry(f"{address}#{box['id']}", page, title, body, kind, above(box))
    for term in article.select("dl.glossary > dt[id]"):
        meaning = term.find_next_sibling("dd")
        text = prose(meaning) if isinstance(meaning, Tag) else ""
        yield Entry(f"{address}#{term['id']}", page, words(term), text, "term")
    for name in article.select("dl.py > dt[id]"):
        if len(name.find_parents("dl", class_="py")) > 1:
            continue  # a method belongs to its class
        told = name.find_next_sibling("dd")
        text = prose(told, "dl.py > dt") if isinstance(told, Tag) else ""
        text = textwrap.shorten(text, LONGEST, placeholder=" …")
        bare = str(name["id"]).rpartition(".")[2]
        yield Entry(f"{address}#{name['id']}", page, bare, text, "api")
    for work in article.select("div.citation[id]"):
        text = prose(work, "span.label")
        yield Entry(f"{address}#{work['id']}", page, author_and_year(text), text, "work")


def worth(entry: Entry) -> float:
    if re.search("/api/(lab|recipes).html", entry.url):
        return WORTH["api"] / 2  # what the chapters use, and few import
    if "/api/" in entry.url:
        return WORTH["api"]
    bare = re.sub(r"^[\d.]+\s*", "", entry.title)
    in_chapter = 1.0 if CHAPTER.match(entry.page) else 0.7
    return WORTH[entry.kind] * in_chapter * (0.5 if bare in AUXILIARY else 1.0)


def write(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    entries = []
    for docname in sorted(app.env.found_docs):
        address = app.builder.get_target_uri(docname)
        path = out / address
        if path.exists():
            entries += list(read(path.read_text("utf-8"), address))
    rows = [[*entry, worth(entry)] for entry in entries]
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    (out / "_static" / INDEX).write_text(f"window.lipbookSections = {data};\n", "utf-8")
    for name in UNUSED:
        (out / name).unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", write, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
