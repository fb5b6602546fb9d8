"""Print the built book as one PDF: outline, page numbers, links that lead to its own pages.

    python tools/pdf.py _build/html

The pages of the table of contents are put into one document, each address in it made one of
this document, and Chromium prints it in light colours. What is folded on the pages is open,
except the code of figures, which is left out. The result is `lipbook.pdf` beside the pages, and
the first page gets a button that leads to it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pikepdf
import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parent.parent
NAME = "lipbook.pdf"
LEFT_OUT = (
    "script, style, noscript, button, a.headerlink, a.viewcode-link, nav.routes, details.hide, "
    "div.actions, figure.lip-slider img[hidden], .sd-stretched-link"
)
# Print rules of this document alone; the rest is in lipbook.css.
STYLE = """
html { background: white; font-size: 12.8px; }
article.bd-article { padding: 0; }
article.bd-article + article.bd-article { break-before: page; }
.part { break-before: page; break-after: avoid; }
nav.pdf-contents ol { list-style: none; margin: 0; padding-left: 1.4em; }
nav.pdf-contents > ol { padding-left: 0; }
nav.pdf-contents > ol > li { font-weight: 600; margin-top: 1.2em; }
nav.pdf-contents ol ol { font-weight: 400; }
nav.pdf-contents a { text-decoration: none; }
"""
FOOTER = (
    '<div style="font: 9px serif; width: 100%; text-align: center; color: #444">'
    '<span class="pageNumber"></span></div>'
)


def contents(path: Path) -> list[tuple[str, list[str]]]:
    """Parts of the table of contents: (caption, names of pages), the first without a caption."""
    table = yaml.safe_load(path.read_text("utf-8"))

    def below(entries: list[dict]) -> Iterator[str]:
        for entry in entries:
            yield entry["file"]
            yield from below(entry.get("sections", []))

    parts = [(part["caption"], list(below(part["chapters"]))) for part in table["parts"]]
    return [("", [table["root"]]), *parts]


def place(page: str, anchor: str) -> str:
    """Address inside the document of a place of a page."""
    return f"{page}--{anchor}" if anchor else page


class Document:
    """The pages of a built book as one."""

    def __init__(self, built: Path, parts: list[tuple[str, list[str]]]) -> None:
        self.built = built
        self.parts = parts
        self.pages = {page for _, pages in parts for page in pages}

    def target(self, page: str, link: str) -> str | None:
        """Where a link of a page leads: into the document, outside, or nowhere."""
        address, anchor = urldefrag(urljoin((self.built / f"{page}.html").as_uri(), link))
        parts = urlsplit(address)
        if parts.scheme != "file":
            return link
        path = Path(unquote(parts.path))
        name = path.relative_to(self.built).with_suffix("").as_posix()
        return f"#{place(name, unquote(anchor))}" if name in self.pages else None

    def article(self, page: str) -> str:
        """Text of a page, its addresses made those of the document."""
        soup = BeautifulSoup((self.built / f"{page}.html").read_text("utf-8"), "html.parser")
        article = soup.select_one("article.bd-article")
        if not isinstance(article, Tag):
            raise ValueError(f"{page}: no article")
        for part in article.select(LEFT_OUT):
            part.decompose()
        for details in article.select("details"):
            details["open"] = ""
        for node in article.select("[id]"):
            node["id"] = place(page, str(node["id"]))
        for label in article.select("[for], [aria-labelledby], [aria-describedby]"):
            for name in ("for", "aria-labelledby", "aria-describedby"):
                if name in label.attrs:
                    label[name] = place(page, str(label[name]))
        for link in article.select("a[href]"):
            target = self.target(page, str(link["href"]))
            if target is None:
                link.unwrap()
            else:
                link["href"] = target
        for image in article.select("img[src]"):
            source = str(image["src"])
            if not source.startswith("data:"):
                image["src"] = urljoin((self.built / f"{page}.html").as_uri(), source)
        article["id"] = page
        return str(article)

    def title(self, page: str) -> str:
        """Heading of a page with its number."""
        html = (self.built / f"{page}.html").read_text("utf-8")
        heading = BeautifulSoup(html, "html.parser").select_one("article h1")
        assert heading is not None, page
        for link in heading.select("a.headerlink"):
            link.decompose()
        return heading.get_text().strip()

    def contents(self) -> str:
        """List of the parts and their pages, with links."""
        lines = []
        for caption, pages in self.parts:
            if not caption:
                continue
            items = "".join(f'<li><a href="#{p}">{self.title(p)}</a></li>' for p in pages)
            lines.append(f"<li>{caption}<ol>{items}</ol></li>")
        return f'<nav class="pdf-contents"><h2>Contents</h2><ol>{"".join(lines)}</ol></nav>'

    def html(self) -> str:
        """Write the whole document."""
        first = self.parts[0][1][0]
        soup = BeautifulSoup((self.built / f"{first}.html").read_text("utf-8"), "html.parser")
        here = (self.built / f"{first}.html").as_uri()
        sheets = [
            f'<link rel="stylesheet" href="{urljoin(here, str(link["href"]))}">'
            for link in soup.select("link[rel=stylesheet]")
        ]
        math = [s for s in soup.select("script") if "MathJax" in s.text or "mathjax" in str(s)]
        for script in math:
            if script.get("src"):
                script["src"] = urljoin(here, str(script["src"]))
        pages = [self.article(page) for _, names in self.parts for page in names]
        body = "\n".join(
            [pages[0].replace("</article>", f"{self.contents()}</article>"), *pages[1:]]
        )
        return (
            '<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light"><head>'
            f'<meta charset="utf-8"><title>{self.title(first)}</title>{"".join(sheets)}'
            f"<style>{STYLE}</style>{''.join(map(str, math))}</head>"
            f'<body><div class="bd-content"><main>{body}</main></div></body></html>'
        )


def chromium() -> str:
    """Path of the browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    return found


def print_pdf(source: Path, target: Path) -> None:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - slow

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(300_000)
        page.goto(source.as_uri(), wait_until="load")
        page.evaluate("() => window.MathJax.startup.promise")
        page.evaluate("() => document.fonts.ready.then(() => true)")
        page.pdf(
            path=str(target),
            format="A4",
            margin={"top": "18mm", "bottom": "20mm", "left": "20mm", "right": "20mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            outline=True,
            tagged=True,
        )
        browser.close()
    with pikepdf.open(target, allow_overwriting_input=True) as document:
        document.save(target, object_stream_mode=pikepdf.ObjectStreamMode.generate)


def add_button(path: Path, link: str) -> None:
    """Give the first page a button that leads to the PDF, once."""
    text = path.read_text("utf-8")
    if link in text:
        return
    changed = re.sub(
        r'(<div class="actions[^>]*>.*?)(</ul>)',
        rf'\1<li><p><a class="reference internal" href="{link}">PDF</a></p></li>\n\2',
        text,
        count=1,
        flags=re.DOTALL,
    )
    if changed == text:
        raise ValueError(f"{path}: no place for the button")
    path.write_text(changed, "utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdf.py", description=__doc__.splitlines()[0])
    parser.add_argument("built", type=Path, metavar="HTML", help="folder of the built book")
    built = parser.parse_args(arguments).built.resolve()
    parts = contents(ROOT / "_toc.yml")
    home = built / f"{parts[0][1][0]}.html"
    if not home.exists():
        parser.error(f"no built book in {built}: run `make html`")
    source, target = built / "lipbook-print.html", built / NAME
    source.write_text(Document(built, parts).html(), "utf-8")
    try:
        print_pdf(source, target)
    finally:
        source.unlink()
    add_button(home, f"../{NAME}")
    print(f"{target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
