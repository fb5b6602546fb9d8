"""The built book in a browser: every page, light and dark, on a telephone and on a desk."""

from __future__ import annotations

import functools
import html
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
HTML = Path(os.environ.get("LIPBOOK_HTML", ROOT / "_build" / "html")).resolve()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

if not (HTML / "index.html").exists():
    pytest.skip(
        "no built book: run `make html`, or name one in LIPBOOK_HTML", allow_module_level=True
    )


def pages() -> list[Path]:
    """Every page with words of ours; `_static` holds fragments of the theme."""
    found = sorted(path for path in HTML.rglob("*.html") if "_static" not in path.parts)
    return [path for path in found if 'http-equiv="Refresh"' not in path.read_text("utf-8")]


def names(path: Path) -> str:
    return path.relative_to(HTML).as_posix()


def listed(faults: list[str]) -> str:
    return "\n  ".join(["", *faults])


class Source(NamedTuple):
    """What a page refers to and what can be referred to in it."""

    text: str
    links: list[str]
    ids: set[str]


@functools.cache
def source(path: Path) -> Source:
    text = path.read_text("utf-8")
    links = [
        html.unescape(url)
        for url in re.findall(r'<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"]*)"', text)
    ]
    return Source(
        text, links, {html.unescape(name) for name in re.findall(r'\sid="([^"]+)"', text)}
    )


# ------------------------------------------------------------------------ what needs no browser


def test_links_and_anchors_resolve() -> None:
    broken = []
    for page in pages():
        if page.name == "404.html":
            continue  # its links start at the host, and are tried below
        for link in source(page).links:
            address, anchor = urldefrag(urljoin(page.as_uri(), link))
            if urlsplit(address).scheme != "file":
                continue
            target = Path(unquote(urlsplit(address).path))
            if not target.is_file() or not target.is_relative_to(HTML):
                broken.append(f"{names(page)}: {link}")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in source(target).ids:
                broken.append(f"{names(page)}: {link} (no such place in the page)")
    assert not broken, listed(broken)


def test_an_id_occurs_once_in_a_page() -> None:
    repeated = []
    for page in pages():
        ids = re.findall(r'\sid="([^"]+)"', source(page).text)
        repeated += [f"{names(page)}: {name}" for name in sorted(set(ids)) if ids.count(name) > 1]
    assert not repeated, listed(repeated)


def test_no_page_names_a_resource_elsewhere() -> None:
    """The browser below sees what is asked for; this sees what a click might still ask for."""
    tag = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*>")
    script = re.compile(r"<script(?: [^>]*)?>(.*?)</script>", re.DOTALL)
    found = []
    for page in pages():
        text = source(page).text
        tags = [item for item in tag.findall(text) if 'rel="canonical"' not in item]
        found += [f"{names(page)}: {item}" for item in tags if re.search(r'="(?:https?:)?//', item)]
        found += [f"{names(page)}: {body}" for body in script.findall(text) if "://" in body]
    assert not found, listed(found)


def test_pages_have_their_own_titles() -> None:
    titles: dict[str, str] = {}
    for page in pages():
        match = re.search(r"<title>(.*?)</title>", source(page).text, re.DOTALL)
        title = " ".join(match.group(1).split()) if match else ""
        assert title, f"{names(page)} has no title"
        assert title not in titles, f"{names(page)} and {titles[title]} are both called {title!r}"
        titles[title] = names(page)


def test_chapters_can_be_downloaded() -> None:
    for notebook in sorted((HTML / "_sources").rglob("*.ipynb")):
        relative = notebook.relative_to(HTML / "_sources")
        text = source((HTML / relative).with_suffix(".html")).text
        assert f"_sources/{relative.as_posix()}" in text


def test_only_pages_with_figures_to_touch_load_their_scripts() -> None:
    for path in pages():
        text = source(path).text
        shown = set(re.findall(r'class="lip-touch touch-(\w+)', text))
        loaded = set(re.findall(r'src="[^"]*/figures/(\w+)\.js', text))
        assert loaded == (shown | {"touch"} if shown else set()), names(path)


# --------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


# One question to the page for all that is measured in it.
EXAMINE = """async (scheme) => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
  await document.fonts.ready;
  const root = document.documentElement;
  for (let i = 0; i < 100 && root.dataset.theme !== scheme; i++)
    await new Promise((resolve) => setTimeout(resolve, 10));
  const outside = [...document.querySelectorAll("article *")].filter((element) => {
    if (element.getBoundingClientRect().right <= root.clientWidth + 1) return false;
    for (let e = element; e !== root; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.overflowX !== "visible" || style.position === "fixed") return false;
      if (style.visibility === "hidden" || style.display === "none") return false;
      if (e.localName.startsWith("mjx-assistive")) return false;
    }
    return true;
  });
  return {
    theme: root.dataset.theme,
    width: root.scrollWidth - root.clientWidth,
    outside: outside.slice(0, 3).map((e) => e.outerHTML.slice(0, 120)),
    images: [...document.querySelectorAll("article img")].map(
      (e) => ({alt: e.alt, drawn: e.complete && e.naturalWidth > 0, src: e.getAttribute("src")})),
    formulas: document.querySelectorAll(".math").length,
    unset: [...document.querySelectorAll(".math")].filter((e) => !e.querySelector("mjx-container"))
      .map((e) => e.textContent.slice(0, 80)),
    cut: [...document.querySelectorAll("article .math, article mjx-container")]
      .filter((e) => getComputedStyle(e).overflowX === "hidden" && e.scrollWidth > e.clientWidth)
      .map((e) => e.textContent.slice(0, 80)),
    // An unknown command is set in red instead of being an error.
    errors: [...document.querySelectorAll("mjx-merror, mjx-mtext[style*='red']")]
      .map((e) => e.title || e.textContent),
    font: document.fonts.check("16px 'Source Serif 4'"),
  };
}"""


# On a desk nothing has to be moved sideways, in opened proofs and solutions, too; folded code may.
WIDER = """() => {
  document.querySelectorAll(".toggle-hidden").forEach((e) => e.classList.remove("toggle-hidden"));
  document.querySelectorAll("details.choice").forEach((e) => { e.open = true; });
  const boxes = ["mjx-container[display=true]", ".cell_output > .output", "pre",
    ".pst-scrollable-table-container"].map((box) => "article " + box).join(", ");
  return [...document.querySelectorAll(boxes)]
    .filter((e) => e.clientWidth > 0 && !e.closest("details.hide"))
    .filter((e) => e.scrollWidth > e.clientWidth + 1)
    .map((e) => `${e.scrollWidth} px in ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`);
}"""


class Visit:
    """A page in the browser, with what it asked for and what it complained about."""

    def __init__(self, page: Any, at_home: str) -> None:
        self.page = page
        self.at_home = at_home
        self.complaints: list[str] = []
        page.on("request", self.note_request)
        page.on("console", self.note_console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("requestfailed", self.note_failure)

    def note_request(self, request: Any) -> None:
        if not request.url.startswith((self.at_home, "data:", "blob:")):
            self.complaints.append(f"asks {request.url}")

    def note_failure(self, request: Any) -> None:
        # The browser drops what it no longer needs, as an icon when the scheme changes.
        dropped = request.failure == "net::ERR_ABORTED"
        if not (dropped and Path(unquote(urlsplit(request.url).path)).is_file()):
            self.complaints.append(f"missing: {request.url}: {request.failure}")

    def note_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"console: {message.text}")

    def faults(self, scheme: str) -> Iterator[str]:
        seen = self.page.evaluate(EXAMINE, scheme)
        yield from self.complaints
        self.complaints.clear()
        if seen["theme"] != scheme:
            yield f"is {seen['theme']}, not {scheme}"
        if seen["width"] > 0:
            yield f"is {seen['width']} px wider than the screen"
        yield from (f"sticks out: {element}" for element in seen["outside"])
        for image in seen["images"]:
            if not image["drawn"]:
                yield f"image not drawn: {image['src']}"
            if not image["alt"].strip() or re.search(r"\.(svg|png|jpe?g|gif)$", image["alt"]):
                yield f"image without alternative text: {image['src']} ({image['alt']!r})"
        yield from (f"formula left as text: {text}" for text in seen["unset"])
        yield from (f"formula cut off: {text}" for text in seen["cut"])
        yield from (f"formula refused: {text}" for text in seen["errors"])
        if not seen["font"]:
            yield "the text font was not loaded"


@pytest.mark.parametrize("width", [390, 1400])
def test_every_page(browser: Any, width: int) -> None:
    found = []
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()  # one for all: a tab of its own takes longer than most pages
    visit = Visit(page, HTML.as_uri())
    for path in pages():
        if path.name == "404.html":
            continue
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            if scheme == "dark":
                page.goto(path.as_uri())  # the page itself follows when the scheme changes
            found += [f"{names(path)} ({scheme}): {fault}" for fault in visit.faults(scheme)]
        if width >= 1400 and path.parent == HTML / "book":
            found += [f"{names(path)}: {box}" for box in page.evaluate(WIDER)]
    context.close()
    assert not found, listed(found)


# ------------------------------------------------------------------------------- how it weighs


def test_code_has_no_marks_without_a_colour() -> None:
    """Else most of a page would say of each bracket that it looks like the rest."""
    style = (HTML / "_static" / "pygments.css").read_text("utf-8")
    for scheme in ("light", "dark"):
        rule = rf'^html\[data-theme="{scheme}"\] \.highlight( \.\w+)? \{{.*?(?<!-)color: (#\w+)'
        colours = {mark.strip(" ."): said for mark, said in re.findall(rule, style, re.MULTILINE)}
        for mark in ("n", "nn", "p", "w"):
            assert colours[mark] == colours[""], f"{mark} ({scheme})"
    code = re.findall(
        r'<div class="highlight"><pre>.*?</pre>',
        source(HTML / "book/robustness.html").text,
        re.DOTALL,
    )
    assert len(code) > 30
    assert not re.findall(r'<span class="(?:n|nn|p|w)">', "".join(code))


HEAVY = 1_500_000


def test_a_page_is_light(browser: Any) -> None:
    """All that a page asks for, uncompressed, without fonts and MathJax."""
    heavy, sizes = [], {}
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    context.route("**/mathjax/**", lambda route: route.abort())
    asked: set[Path] = set()
    page = context.new_page()
    page.on("request", lambda request: asked.add(Path(unquote(urlsplit(request.url).path))))
    for path in pages():
        if path.name == "404.html":
            continue
        asked.clear()
        page.goto(path.as_uri(), wait_until="load")
        files = [file for file in asked if file.suffix != ".woff2" and "mathjax" not in file.parts]
        sizes[path] = sum(file.stat().st_size for file in files if file.is_file())
        if sizes[path] > HEAVY:
            heavy.append(f"{names(path)}: {sizes[path] / 1e6:.2f} MB")
    context.close()
    assert min(sizes.values()) > 100_000, "not everything was counted"
    assert not heavy, listed(heavy)


# ---------------------------------------------------------------------------------- who can use it


# MathJax speaks for itself, and its formulas are most of a page: they are left as text here.
FORMULAS = [[".math"]]
COLOURS = ["color-contrast", "link-in-text-block"]  # all that depends on the scheme
RULES = {
    "label-content-name-mismatch": {"enabled": True},  # off in axe, as it is on trial there
    **{name: {"enabled": False} for name in COLOURS},
}
# A contrast is a matter of two colours and the size and weight of the letters. Of all texts (and
# links in texts) that agree in these the first is kept, in an element of its own: axe looks at
# what is kept in seconds, and at all the thousands in minutes.
PROBE = """() => {
  const style = (e) => {
    const s = getComputedStyle(e);
    let ground = e;
    while (ground && /^rgba\\(.*, 0\\)$/.test(getComputedStyle(ground).backgroundColor))
      ground = ground.parentElement;
    const under = ground ? getComputedStyle(ground) : null;
    return [s.color, s.fontSize, s.fontWeight, s.opacity, s.textDecorationLine,
      under?.backgroundColor, under?.backgroundImage, under?.opacity].join("|");
  };
  document.querySelectorAll("[data-probe]").forEach((e) => e.removeAttribute("data-probe"));
  const seen = new Set();
  const isNew = (key) => !seen.has(key) && seen.add(key);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const kept = [];
  while (texts.nextNode()) {
    const text = texts.currentNode, e = text.parentElement;
    if (!text.data.trim() || e.closest(".math, script, style") || !e.getClientRects().length)
      continue;
    if (isNew(style(e))) kept.push(text);
    const link = e.closest("a[href]");
    if (link && isNew("a|" + style(link) + style(link.parentElement)))
      link.setAttribute("data-probe", "");
  }
  for (const text of kept) {
    const box = document.createElement("span");
    box.setAttribute("data-probe", "");
    text.replaceWith(box);
    box.append(text);
  }
  return kept.length;
}"""


@pytest.mark.parametrize("half", [0, 1])
def test_no_page_shuts_anybody_out(browser: Any, half: int) -> None:
    """axe finds no violation that it calls serious or critical, light and dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe").Axe()
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    context.route("**/mathjax/**", lambda route: route.abort())
    found: list[str] = []

    def ask(page: Any, where: dict[str, Any], **options: Any) -> Iterator[str]:
        options["resultTypes"] = ["violations"]
        told = axe.run(page, context={"exclude": FORMULAS, **where}, options=options).response
        for fault in told["violations"]:
            if fault["impact"] in ("serious", "critical"):
                node = fault["nodes"][0]
                yield (
                    f"{fault['id']} × {len(fault['nodes'])}: {node['html'][:160]} "
                    f"{node['any'][:1] and node['any'][0]['message']}"
                )

    page = context.new_page()
    for path in pages()[half::2]:
        if path.name == "404.html":
            continue
        page.goto(path.as_uri(), wait_until="load")
        page.add_style_tag(content="* { transition: none !important }")  # colours on their way
        found += [f"{names(path)}: {fault}" for fault in ask(page, {}, rules=RULES)]
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(
                "scheme => document.documentElement.dataset.theme === scheme", arg=scheme
            )
            assert page.evaluate(PROBE) > 5
            probes = {"include": [["[data-probe]"]]}
            found += [
                f"{names(path)} ({scheme}): {fault}" for fault in ask(page, probes, runOnly=COLOURS)
            ]
    context.close()
    assert not found, listed(found)


def test_formulas_are_no_stops_and_focus_is_seen(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto((HTML / "book" / "wasserstein.html").as_uri(), wait_until="load")
    page.evaluate("() => MathJax.startup.promise")
    assert page.locator("mjx-container").count() > 100
    stops = page.evaluate(
        """() => [...document.querySelectorAll("mjx-container")]
          .filter((e) => e.tabIndex >= 0 && e.scrollWidth <= e.clientWidth).length"""
    )
    assert stops == 0, "formulas that need no moving"
    unseen = []
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(
            """() => {
              const e = document.activeElement, s = getComputedStyle(e);
              const ring = s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 1;
              return [e.outerHTML.slice(0, 120), ring || s.boxShadow !== "none"];
            }"""
        )
        seen.add(name)
        if not shown:
            unseen.append(name)
    page.close()
    assert len(seen) > 40
    assert not unseen, listed(unseen)


# -------------------------------------------------------------------------------------- the search

ANSWERS = {
    "how to certify": ["book/robustness.html", "book/api/robustness.html"],
    "spectral norm of a convolution": ["the-spectrum-of-a-convolution"],
    "vanishing gradient": ["book/optimisation.html", "book/activations.html"],
    "Bjorck": ["#the-nearest-orthonormal-matrix", "#orthogonal-bjorck"],
    "Björck": ["#the-nearest-orthonormal-matrix", "#orthogonal-bjorck"],
    "certified radius": ["margin-and-radius", "lipbook.robustness.certified_radius"],
    "margin": ["margin-and-radius", "generalization.html#margins"],
    "randomised smoothing": ["#smoothing", "#term-randomized-smoothing"],
    "floating point": ["#floating-point", "from-real-numbers-to-programs"],
    "dual norm": ["#dual-norms"],
    "GroupSort": ["book/activations.html", "#term-GroupSort"],
    "OrthogonalConv2d": ["lipbook.convolutions.OrthogonalConv2d"],
    "lipschitz_bound": ["lipbook.composition.lipschitz_bound"],
    "stride": ["convolutions.html#strides"],
    "batch normalization": ["jacobians.html#batch-normalisation"],
    "attention": ["networks.html#attention"],
    "residual": ["jacobians.html#residual-blocks"],
    "Kantorovich Rubinstein": ["#the-dual-a-function-instead-of-a-plan", "#wasserstein-duality"],
    "optimal transport": ["book/wasserstein.html", "reading.html#transport"],
    "GAN": ["#a-wasserstein-gan"],
    "rademacher": ["#what-a-class-can-do-with-coin-tosses", "#gen-rademacher"],
    "spectral complexity": ["#the-spectral-complexity-of-a-network"],
    "orthogonal initialisation": ["#dynamical-isometry-the-whole-spectrum"],
    "LipSDP": ["#one-inequality-for-the-whole-network", "lipbook.tightness.lipsdp"],
    "export to ONNX": ["book/api/export.html"],
    "Sorting out Lipschitz function approximation": ["bibliography.html#", "reading.html"],
}


def searched(page: Any, query: str) -> list[str]:
    """Addresses of what the search page finds, best first, below the root of the book."""
    page.fill("#lip-search-page input", query)
    page.wait_for_function(
        """query => {
          const box = document.querySelector("#lip-search-page .lip-search");
          const said = box.querySelector("[role=status]").textContent;
          return box.dataset.query === query && /^(\\d+ section|No section)/.test(said);
        }""",
        arg=query,
    )
    links = page.locator("#lip-search-page .lip-search li > a")
    return [
        link.removeprefix("./")
        for link in links.evaluate_all("links => links.map(link => link.getAttribute('href'))")
    ]


def test_the_search_finds_sections(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    visit = Visit(page, HTML.as_uri())
    page.goto((HTML / "search.html").as_uri(), wait_until="load")
    missed = []
    for query, wanted in ANSWERS.items():
        first = searched(page, query)[:3]
        if not any(place in link for place in wanted for link in first):
            missed.append(f"{query!r}: {first}, not {wanted}")
    assert not visit.complaints, listed(visit.complaints)
    page.close()
    assert not missed, listed(missed)


def test_the_search_lands_where_it_says_and_shows_prose(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto((HTML / "search.html").as_uri() + "?q=certified+radius", wait_until="load")
    page.wait_for_selector(".lip-search li")
    excerpts = page.locator(".lip-search li > p").all_inner_texts()
    assert all("import " not in text and "\\" not in text for text in excerpts)
    assert page.locator(".lip-search mark").count() > 5
    page.locator(".lip-search li > a").first.click()
    page.wait_for_load_state("load")
    assert "#" in page.url
    anchor = unquote(urldefrag(page.url).fragment)
    page.wait_for_timeout(300)
    top = page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", anchor)
    assert -5 < top < 300
    page.close()


def test_the_search_says_what_to_do_when_it_finds_nothing(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto((HTML / "search.html").as_uri(), wait_until="load")
    assert searched(page, "xylophone") == []
    assert "Try fewer words" in page.inner_text(".lip-search-help")
    assert page.locator(".lip-search-help a").count() >= 4
    page.close()


def test_the_search_field_is_dark_in_the_dark(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900}, color_scheme="dark")
    page.goto((HTML / "search.html").as_uri(), wait_until="load")
    paint = page.locator("#lip-search-page input").evaluate(
        "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    )
    field, letters = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in paint)
    assert field < 200, paint
    assert letters > 500, paint
    page.close()


def test_the_search_dialog_answers_as_one_types(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto((HTML / "book" / "jacobians.html").as_uri(), wait_until="load")
    page.keyboard.press("Control+k")
    page.keyboard.type("dual norm")
    hit = page.locator("#pst-search-dialog .lip-search li > a").first
    hit.wait_for(state="visible")
    hit.click()
    page.wait_for_url("**/composition.html#*")
    page.close()


def test_previews_appear_on_hover(browser: Any) -> None:
    chapters = [
        path for path in pages() if '<a class="reference internal" href="#thm-' in source(path).text
    ]
    if not chapters:
        pytest.skip("no page refers to a theorem of its own")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(chapters[0].as_uri(), wait_until="load")
    page.evaluate("() => MathJax.startup.promise")
    link = page.locator("article a[href^='#thm-']:visible").last
    assert link.evaluate("element => Boolean(element._tippy)")
    link.hover()
    preview = page.locator(".tippy-content .proof")
    preview.wait_for(state="visible")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.tippy-content .math')]"
        ".every((formula) => formula.querySelector('mjx-container'))"
    )
    page.close()


def test_folded_boxes_open(browser: Any) -> None:
    for path in pages():
        if "solution dropdown" in source(path).text:
            break
    else:
        pytest.skip("no page has a folded solution")
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(path.as_uri(), wait_until="load")
    box = page.locator("div.solution.dropdown").first
    body = box.locator("section").first
    assert not body.is_visible()
    box.locator(".toggle-button").click()
    body.wait_for(state="visible")
    page.close()


def test_a_slider_shows_one_frame_at_a_time(browser: Any) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto((HTML / "book" / "wasserstein.html").as_uri(), wait_until="load")
    figure = page.locator("figure.lip-slider").first
    frames = figure.locator("img")
    assert frames.count() > 2
    slider = figure.locator("input")
    for key, shown in (("End", frames.count() - 1), ("ArrowLeft", frames.count() - 2), ("Home", 0)):
        slider.press(key)
        visible = [k for k in range(frames.count()) if frames.nth(k).is_visible()]
        assert visible == [shown]
        value = frames.nth(shown).get_attribute("data-value")
        assert figure.locator("output").inner_text() == value
    page.close()


def test_figures_to_touch_come_alive_and_stand_without_scripts(browser: Any) -> None:
    chapters = [path for path in pages() if 'class="lip-touch' in source(path).text]
    assert chapters
    for scripts in (True, False):
        context = browser.new_context(java_script_enabled=scripts)
        for path in chapters:
            page = context.new_page()
            page.goto(path.as_uri(), wait_until="load")
            for figure in page.locator("figure.lip-touch").all():
                assert figure.locator(".touch-live svg").count() > 0 or not scripts, names(path)
                assert figure.locator("> img, > a > img").is_visible() != scripts, names(path)
            page.close()
        context.close()


def test_the_page_for_missing_pages_works_at_any_depth(browser: Any) -> None:
    text = (HTML / "404.html").read_text("utf-8")
    prefix = re.search(r'href="(/[^"]*?)_static/', text)
    assert prefix, "404.html: links must start at the host"

    class Site(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return super().translate_path("/" + path.removeprefix(prefix.group(1)))

        def send_error(self, code: int, *rest: Any) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *rest: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        home = f"http://127.0.0.1:{server.server_port}"
        page = browser.new_page(color_scheme="light")
        visit = Visit(page, home)
        page.goto(f"{home}{prefix.group(1)}no/such/page.html")
        # The browser complains, rightly, that the address it was given does not exist.
        found = [fault for fault in visit.faults("light") if "status of 404" not in fault]
        assert not found, listed(found)
        page.locator(".bd-sidebar-primary nav a", has_text="Bibliography").click()
        page.wait_for_url("**/bibliography.html")
        assert "Bibliography" in page.title()
        page.close()
    finally:
        server.shutdown()
        server.server_close()
