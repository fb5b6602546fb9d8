"""What a screen reader and a keyboard need, where the theme or a writer leaves it out.

- An entry of the menu that folds is named after its page.
- The list of references has anchors between its entries, which a list may not have, and a role
  for each that the standard has withdrawn. They are left as plain text.
- The list of modules has lists between its entries. It is written as one list.
- Parameters of a long signature are written as a list of descriptions without terms, inside a
  term. They are written as lines.
- A fold of code says "Show the code". Its label, "Toggle hidden content", would keep this from
  those who hear the page, and is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from sphinx.application import Sphinx

FOLD = re.compile(r"(<a [^>]*>)([^<]+)(</a>\s*<details[^>]*>\s*)<summary>")
PARAMETERS = re.compile(
    r'(<span class="sig-paren">[(\[]</span>)\s*<dl>\s*(.*?)\s*</dl>\s*'
    r'(?=<span class="sig-paren">)',
    re.DOTALL,
)


def name_folds(html: str) -> str:
    """HTML of the menu, each of its folds with a name."""
    return FOLD.sub(r'\1\2\3<summary aria-label="Pages of: \2">', html)


def plain_references(html: str) -> str:
    """HTML of a page, its references without the roles that do not fit."""
    html = html.replace(' role="list" class="citation-list"', ' class="citation-list"')
    return html.replace(' role="doc-biblioentry"', "")


def lines_of_parameters(html: str) -> str:
    """HTML of a page, the parameters of its long signatures as lines."""

    def lines(found: re.Match[str]) -> str:
        inner = found[2].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
        return f"{found[1]}{inner}"

    return PARAMETERS.sub(lines, html)


def speaking_folds(html: str) -> str:
    """HTML of a page, its folds of code named by what they say."""
    return html.replace('<summary aria-label="Toggle hidden content">', "<summary>")


def one_list(html: str) -> str:
    """HTML of the list of modules, without the lists inside it."""
    start, end = html.index("<ul>") + len("<ul>"), html.rindex("</ul>")
    return html[:start] + re.sub("</?ul>", "", html[start:end]) + html[end:]


def mend(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    if "body" in context:
        context["body"] = speaking_folds(lines_of_parameters(plain_references(context["body"])))
    if page == "_modules/index":
        context["body"] = one_list(context["body"])
    menu: Callable[..., Any] | None = context.get("generate_toctree_html")
    if menu is not None:
        context["generate_toctree_html"] = lambda *kind, **options: Markup(
            name_folds(str(menu(*kind, **options)))
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
