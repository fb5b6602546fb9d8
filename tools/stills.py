"""Draw the still of each interactive figure: what it shows before anybody touches it.

    python tools/stills.py              # all
    python tools/stills.py ellipse      # one

The figure is mounted in Chromium and its planes are written, with the colours of the light page,
to ``book/assets/figures/NAME.svg``. So the still cannot show anything else than the figure;
``tests/test_figures.py`` compares them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ASSETS = Path(__file__).resolve().parents[1] / "book" / "assets"
FIGURES = ASSETS / "figures"

# Nested drawings side by side, two in a row; computed styles become attributes.
DRAW = """() => {
  const GAP = 16;
  const properties = {
    "fill": "rgb(0, 0, 0)", "fill-opacity": "1", "stroke": "none", "stroke-width": "1px",
    "stroke-dasharray": "none", "stroke-linejoin": "miter", "font-size": "16px",
    "font-style": "normal", "text-anchor": "start", "paint-order": "normal",
    "shape-rendering": "auto",
  };
  const written = (node) => {
    const copy = node.cloneNode(false);
    for (const name of ["class", "tabindex", "role", "aria-label", "aria-roledescription"])
      copy.removeAttribute(name);
    if (["circle", "line", "polygon", "polyline", "rect", "text", "tspan"].includes(node.localName)
        && !node.closest("clipPath")) {
      const style = getComputedStyle(node);
      for (const [name, usual] of Object.entries(properties)) {
        const text = /^(text|tspan)$/.test(node.localName);
        if (/^(font|text)/.test(name) && !text) continue;
        if (style[name] !== usual) copy.setAttribute(name, style[name]);
      }
      if (node.localName === "tspan") copy.setAttribute("font-family", "serif");
    }
    for (const child of node.childNodes) {
      if (child.nodeType === Node.TEXT_NODE) copy.append(child.textContent);
      else if (!child.classList.contains("reach") && !child.classList.contains("ring"))
        copy.append(written(child));
    }
    return copy;
  };
  const planes = [...document.querySelectorAll("svg.touch-plane")];
  const size = (plane, name) => Number(plane.getAttribute(name));
  const sheet = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  let [x, y, width, height] = [0, 0, 0, 0];
  planes.forEach((plane, index) => {
    if (index % 2 === 0) [x, y] = [0, height && height + GAP];
    const copy = written(plane);
    copy.setAttribute("x", x);
    copy.setAttribute("y", y);
    sheet.append(copy);
    x += size(plane, "width") + GAP;
    width = Math.max(width, x - GAP);
    height = Math.max(height, y + size(plane, "height"));
  });
  for (const [name, value] of Object.entries({width, height, viewBox: `0 0 ${width} ${height}`,
      "font-family": "sans-serif"})) sheet.setAttribute(name, value);
  return new XMLSerializer().serializeToString(sheet).replaceAll("><", ">\\n<") + "\\n";
}"""


def names() -> list[str]:
    """Names of the figures that there are."""
    return sorted(path.stem for path in FIGURES.glob("*.js") if path.stem != "touch")


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
            args=["--headless", "--no-sandbox", "--disable-gpu"],
        )
        yield browser
        browser.close()


def mount(page: Any, name: str, theme: str = "light") -> None:
    """Put figure `name` alone on a page that has the book's style sheet and no book."""
    page.goto("about:blank")  # forgets the figure before
    page.set_content(
        f'<!doctype html><html lang="en" data-theme="{theme}"><body><article class="bd-article">'
        f'<figure class="lip-touch touch-{name}"><img alt="still"/><figcaption>Caption</figcaption>'
        "</figure></article></body></html>"
    )
    page.add_style_tag(path=ASSETS / "lipbook.css")
    page.add_script_tag(path=FIGURES / "touch.js")
    page.add_script_tag(path=FIGURES / f"{name}.js")
    data = ASSETS / "networks" / f"{name}.js"
    if data.is_file():
        page.add_script_tag(path=data)


def still(page: Any, name: str) -> str:
    """SVG text of figure `name` as it is before anybody touches it."""
    mount(page, name)
    return str(page.evaluate(DRAW))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=names())
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(names()):
        parser.error(f"no figure {', '.join(sorted(unknown))}: there are {', '.join(names())}")
    with chromium() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: parser.error(str(error)))
        for name in chosen.names:
            (FIGURES / f"{name}.svg").write_text(still(page, name), encoding="utf-8")


if __name__ == "__main__":
    main()
