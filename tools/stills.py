"""Draw the still of each interactive figure: what it shows before anybody touches it.

    python tools/stills.py              # all
    python tools/stills.py ellipse      # one
    python tools/stills.py card         # what is shown where a link to the book is posted

The figure is mounted in Chromium and its planes are written, with the colours of the light page,
to ``book/assets/figures/NAME.svg``. So the still cannot show anything else than the figure;
``tests/test_figures.py`` compares them. The card, ``book/assets/card.png``, has the title of the
book and the first figure of its first page, as the notebook has stored it.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import sync_playwright

BOOK = Path(__file__).resolve().parents[1] / "book"
ASSETS = BOOK / "assets"
FIGURES = ASSETS / "figures"
CARD = {"width": 1200, "height": 630}

# Nested drawings side by side, two in a row; computed styles become attributes. The cells of a map
# do not overlap, so that all of one colour can be one path.
DRAW = r"""() => {
  const GAP = 16;
  const properties = {
    "fill": "rgb(0, 0, 0)", "fill-opacity": "1", "stroke": "none", "stroke-width": "1px",
    "stroke-dasharray": "none", "stroke-linejoin": "miter", "font-size": "16px",
    "font-style": "normal", "text-anchor": "start", "paint-order": "normal",
    "shape-rendering": "auto",
  };
  const hex = (all, ...parts) =>
    "#" + parts.slice(0, 3).map((part) => Number(part).toString(16).padStart(2, "0")).join("");
  const short = (value) =>
    value.replace(/^rgb\((\d+), (\d+), (\d+)\)$/, hex)
      .replace(/^0\.\d{3,}$/, (part) => String(Number(Number(part).toFixed(2))));
  const outline = (cell) => {
    const points = cell.getAttribute("points").split(" ").map(
      (point) => point.split(",").map((number) => Math.round(100 * number)));
    let [x, y] = points[0];
    let told = `M${x / 100} ${y / 100}`;
    for (const [a, b] of points.slice(1)) {
      const [right, down] = [(a - x) / 100, (b - y) / 100];
      told += down === 0 ? `h${right}` : right === 0 ? `v${down}` : `l${right} ${down}`;
      [x, y] = [a, b];
    }
    return told + "z";
  };
  const written = (node) => {
    const copy = node.cloneNode(false);
    for (const name of ["class", "style", "tabindex", "role", "aria-label", "aria-roledescription"])
      copy.removeAttribute(name);
    if (["circle", "line", "polygon", "polyline", "rect", "text", "tspan"].includes(node.localName)
        && !node.closest("clipPath")) {
      const style = getComputedStyle(node);
      for (const [name, usual] of Object.entries(properties)) {
        const text = /^(text|tspan)$/.test(node.localName);
        if (/^(font|text)/.test(name) && !text) continue;
        if (style[name] !== usual) copy.setAttribute(name, short(style[name]));
      }
      if (node.localName === "tspan") copy.setAttribute("font-family", "serif");
    }
    const cells = new Map();
    for (const child of node.childNodes) {
      if (child.nodeType === Node.TEXT_NODE) {
        if (child.textContent) copy.append(child.textContent);
        continue;
      }
      if (child.classList.contains("reach") || child.classList.contains("ring")) continue;
      const part = written(child);
      if (!part.matches("polygon[shape-rendering]")) {
        cells.clear();
        copy.append(part);
        continue;
      }
      const told = outline(part);
      part.removeAttribute("points");
      const kind = part.outerHTML;
      if (!cells.has(kind)) {
        cells.set(kind, document.createElementNS("http://www.w3.org/2000/svg", "path"));
        copy.append(cells.get(kind));
        for (const {name, value} of part.attributes) cells.get(kind).setAttribute(name, value);
      }
      cells.get(kind).setAttribute("d", (cells.get(kind).getAttribute("d") ?? "") + told);
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
  return new XMLSerializer().serializeToString(sheet).replaceAll("><", ">\n<") + "\n";
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


def card(page: Any) -> bytes:
    """PNG of the title of the book above the first figure of its first page."""
    cells = nbformat.read(BOOK / "index.ipynb", as_version=4).cells
    (title,) = re.findall(r"^# (.+): (.+)$", cells[0].source, re.MULTILINE)
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    figure = next(o.data["image/svg+xml"] for o in outputs if "image/svg+xml" in o.get("data", {}))
    page.set_viewport_size(CARD)
    page.set_content(
        "<style>body { margin: 36px 60px; font: 30px sans-serif; color: #222; text-align: center }"
        "h1 { margin: 0 0 28px; font-size: 58px } h1 > small { font-weight: normal; color: #555 }"
        "svg { height: 450px; width: auto }</style>"
        f"<h1>{title[0]}<small>: {title[1]}</small></h1>" + figure[figure.index("<svg") :]
    )
    return bytes(page.screenshot())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = [*names(), "card"]
    parser.add_argument("names", nargs="*", default=known)
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(known):
        parser.error(f"no figure {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    with chromium() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: parser.error(str(error)))
        if "card" in chosen.names:
            (ASSETS / "card.png").write_bytes(card(page))
        for name in sorted(set(chosen.names) - {"card"}):
            (FIGURES / f"{name}.svg").write_text(still(page, name), encoding="utf-8")


if __name__ == "__main__":
    main()
