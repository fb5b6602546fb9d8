"""The routes through the book: a list on the landing page, a strip at the head of each chapter.

Both are made from ``book/routes.yml``. A page says which of its routes lead where next.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

FOLDER = "book/"


class Step(NamedTuple):
    """One sitting: pages below the book's folder, how far to read in them, how long it takes."""

    pages: list[str]
    minutes: int
    part: str = ""


class Route(NamedTuple):
    """A way through the book for a reader with a given time."""

    name: str
    about: str
    steps: list[Step]

    @property
    def minutes(self) -> int:
        """What the whole route takes."""
        return sum(step.minutes for step in self.steps)


def read(path: Path) -> list[Route]:
    """Routes of the data file, checked for what a page could not show."""
    routes = []
    for entry in yaml.safe_load(path.read_text("utf-8")):
        try:
            steps = [Step(**step) for step in entry["steps"]]
            routes.append(Route(entry["name"], entry["about"], steps))
        except (KeyError, TypeError) as error:
            raise ExtensionError(f"{path.name}: {entry!r}: {error}") from error
    return routes


def of(app: Sphinx) -> list[Route]:
    return read(Path(app.srcdir) / FOLDER / "routes.yml")


def duration(minutes: int) -> str:
    """Minutes below two hours, else hours to the half."""
    if minutes < 120:
        return f"{minutes} minutes"
    hours, half = divmod(round(minutes / 30), 2)
    return f"{hours}{'½' if half else ''} hours"


class Routes(SphinxDirective):
    """A card for each route, with its steps as links."""

    def run(self) -> list[nodes.Node]:
        """Write the cards as the text of an author, and let the page's parser read it."""
        lines = ["::::{grid} 1 1 3 3", ":gutter: 3", ""]
        for route in of(self.env.app):
            lines += [f":::{{grid-item-card}} {route.name}", ""]
            lines += [f"{route.about} {duration(route.minutes)}.", ""]
            for step in route.steps:
                links = " and ".join(f"{{doc}}`/{FOLDER}{page}`" for page in step.pages)
                part = f", {step.part}" if step.part else ""
                lines.append(f"1. {links}{part} ({step.minutes} min)")
            lines += [":::", ""]
        lines += ["::::"]
        self.env.note_dependency(str(Path(self.env.srcdir) / FOLDER / "routes.yml"))
        found = nodes.container(classes=["all-routes"])
        self.state.nested_parse(StringList(lines, source="routes.yml"), self.content_offset, found)
        return found.children


def places(routes: list[Route], page: str) -> list[tuple[Route, int]]:
    """Routes that lead through a page, each with the first of its steps that does."""
    found = []
    for route in routes:
        on = [k for k, step in enumerate(route.steps) if page in step.pages]
        if on:
            found.append((route, on[0]))
    return found


def following(route: Route, step: int, page: str) -> str | None:
    """The page after `page` on a route, in the same step or the next one."""
    here = route.steps[step].pages
    rest = here[here.index(page) + 1 :]
    if not rest and step + 1 < len(route.steps):
        rest = route.steps[step + 1].pages
    return rest[0] if rest else None


def strip(app: Sphinx, docname: str) -> str:
    """HTML of the strip of a page, or nothing where no route leads through it."""
    page = docname.removeprefix(FOLDER)
    if not docname.startswith(FOLDER):
        return ""

    def link(target: str) -> str:
        title = app.env.titles[f"{FOLDER}{target}"].astext()
        number = app.env.toc_secnumbers.get(f"{FOLDER}{target}", {}).get("")
        shown = f"{number[0]} {title}" if number else title
        address = app.builder.get_relative_uri(docname, f"{FOLDER}{target}")
        return f'<a href="{address}">{html.escape(shown)}</a>'

    items = []
    home = app.builder.get_relative_uri(docname, f"{FOLDER}index")
    for route, k in places(of(app), page):
        step = route.steps[k]
        words = [f'<a href="{home}#sec-routes">{html.escape(route.name)}</a> {k + 1}']
        words[0] += f" of {len(route.steps)}"
        if step.part:
            words.append(f"read {html.escape(step.part)}")
        after = following(route, k, page)
        words.append(f"next {link(after)}" if after else "the last step")
        items.append(f"<li>{', '.join(words)}</li>")
    if not items:
        return ""
    return f'<nav class="routes" aria-label="Routes"><ul>{"".join(items)}</ul></nav>'


def add_strip(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    if app.builder.format == "html" and "body" in context and page in app.env.titles:
        head, end, rest = context["body"].partition("</h1>")
        context["body"] = head + end + strip(app, page) + rest if end else head


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("routes", Routes)
    app.connect("html-page-context", add_strip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
