"""Make the book whole without a network, and light.

- MathJax is copied into ``_static/mathjax`` from the package sphinx-mathjax-offline, which is
  used as data only: as an extension it would copy 24 MB, of which a page can use 2.
- sphinx-thebe, which Jupyter Book always loads, puts the address of a CDN into every page and
  declares it twice, an error in every console. Its scripts are dropped.
- sphinx-tippy names its data files at random and never removes the old ones below a folder.
- The theme draws its icons by a script of 1.5 MB, though its style sheet draws the same ones with
  a font, with a rule for each of 1,900 icons, of which the pages use a dozen, and with all of
  Bootstrap and sphinx-design; and it loads an index by page on every page, where `search.py` makes
  one by section.
- Pygments marks each name, bracket and space in code, and colours none of them. These marks, a
  quarter of a chapter, go once sphinx-codeautolink has found its names by them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# The loader with TeX and MathML input and HTML output, its fonts, and the rare TeX commands
# that it fetches when a page uses them.
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")
UNUSED = ("fontawesome.js", "searchtools.js", "language_data.js", "searchindex.js")


def mathjax_source() -> Path:
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError("MathJax is missing: pip install sphinx-mathjax-offline")
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_source(), Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, target / name)


def forget_old_tips(app: Sphinx) -> None:
    shutil.rmtree(Path(app.outdir) / "_static" / "tippy", ignore_errors=True)


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    def is_thebe(script: Any) -> bool:
        name = str(getattr(script, "filename", script) or "")
        body = getattr(script, "attributes", {}).get("body") or ""
        return "thebe" in name or "THEBE_JS_URL" in body

    for key in ("script_files", "css_files"):
        context[key] = [item for item in context.get(key, []) if not is_thebe(item)]


# A rule that gives icons of Font Awesome their letter.
ICON = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"[^"]*"\}')


def with_icons(style: str, used: set[str]) -> str:
    """Style sheet with the rules of the icons that are used, of all that it has."""

    def kept(rule: re.Match[str]) -> str:
        return rule[0] if used & set(re.findall(r"fa-[\w-]+", rule[1])) else ""

    return ICON.sub(kept, style)


def drop_icons(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    used: set[str] = set()
    for page in Path(app.outdir).rglob("*.html"):
        used |= set(re.findall(r"\bfa-[\w-]+", page.read_text("utf-8")))
    sheet = Path(app.outdir) / "_static" / "styles" / "pydata-sphinx-theme.css"
    sheet.write_text(with_icons(sheet.read_text("utf-8"), used), "utf-8")


# A rule without rules in it; and in its selector the classes of sphinx-design, and those of parts
# of Bootstrap that a page may do without.
RULE = re.compile(r"([^{}]+)\{[^{}]*\}")
DESIGN = re.compile(r"\.(sd-[\w-]+)")
PARTS = re.compile(
    r"\.((?:accordion|alert|border|carousel|col|form|list-group|modal|offcanvas|offset|pagination|"
    r"placeholder|progress|rounded|row|spinner|toast)(?:-[\w-]+)?)(?![\w-])"
)
SHEETS = {"sphinx-design.min.css": DESIGN, "styles/pydata-sphinx-theme.css": PARTS}


def with_used(style: str, used: set[str], classes: re.Pattern[str]) -> str:
    """Style sheet without the rules of classes of this form that are not used."""

    def kept(rule: re.Match[str]) -> str:
        if ":not(" in rule[1]:
            return rule[0]
        selectors = (set(classes.findall(selector)) for selector in rule[1].split(","))
        return rule[0] if any(named <= used for named in selectors) else ""

    return RULE.sub(kept, style)


def drop_unused_rules(app: Sphinx, exception: Exception | None) -> None:
    """Keep the rules of classes that a page has or a script may give; Bootstrap's names all."""
    if exception is not None or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    used: set[str] = set()
    for page in Path(app.outdir).rglob("*.html"):
        for names in re.findall(r'\bclass="([^"]*)"', page.read_text("utf-8")):
            used |= set(names.split())
    for script in (*static.glob("*.js"), static / "scripts" / "pydata-sphinx-theme.js"):
        used |= set(re.findall(r"[\w-]+", script.read_text("utf-8")))
    for name, classes in SHEETS.items():
        sheet = static / name
        sheet.write_text(with_used(sheet.read_text("utf-8"), used, classes), "utf-8")


# Names, modules, punctuation and spaces: in both styles they have the colour of all code.
CODE = re.compile(r'(?<=<div class="highlight">)<pre>.*?</pre>', re.DOTALL)
PLAIN = re.compile(r'<span class="(?:n|nn|p|w)">([^<]*)</span>')


def without_plain_marks(page: str) -> str:
    """HTML of a page whose code marks only what has a colour of its own."""
    return CODE.sub(lambda code: PLAIN.sub(r"\1", code[0]), page)


def drop_plain_marks(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text("utf-8")
        if (lighter := without_plain_marks(text)) != text:
            page.write_text(lighter, "utf-8")


def without_unused(head: str) -> str:
    """HTML of a page's head without the scripts of the theme that no page needs."""
    names = "|".join(map(re.escape, UNUSED))
    return Markup(re.sub(rf'<script[^>]*src="(?:[^"]*/)?(?:{names})[^>]*></script>\s*', "", head))


def offer_lighter(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    context["without_unused"] = without_unused


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", forget_old_tips)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", offer_lighter)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", drop_icons)
    app.connect("build-finished", drop_unused_rules)
    app.connect("build-finished", drop_plain_marks, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
