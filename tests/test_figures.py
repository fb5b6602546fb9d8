"""The interactive figures: their mathematics against the library, and what a reader can do.

Each figure runs alone in Chromium, on a page with the book's style sheet and no book. The pages
of the book, with all their scripts, are the matter of ``test_pages.py``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
if not (shutil.which("chromium") or shutil.which("chromium-browser")):
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

BOOK = Path(__file__).resolve().parent.parent / "book"
FIGURES = BOOK / "assets" / "figures"

specification = importlib.util.spec_from_file_location("stills", BOOK.parent / "tools/stills.py")
assert specification is not None
assert specification.loader is not None
stills = importlib.util.module_from_spec(specification)
sys.modules["stills"] = stills
specification.loader.exec_module(stills)

NAMES = stills.names()
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with stills.chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which an error, a complaint or a request of a script is a failure."""
    page = browser.new_page(viewport={"width": 390, "height": 900}, has_touch=True)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: faults.append(request.url))
    yield page
    page.close()
    assert not faults


@pytest.fixture
def call(page: Any) -> Call:
    """Call of a function of a figure: ``call("ellipse.image", matrix)``."""
    page.set_content("<!doctype html><title>no figure</title>")
    for name in ("touch", *NAMES):
        page.add_script_tag(path=FIGURES / f"{name}.js")

    def function(path: str, *arguments: Any) -> Any:
        plain = [a.tolist() if hasattr(a, "tolist") else a for a in arguments]
        owner = "touch" if path.startswith("touch.") else "touch.figures"
        path = path.removeprefix("touch.")
        return page.evaluate(f"(arguments) => {owner}.{path}(...arguments)", plain)

    return function


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def state(page: Any) -> str:
    """All that a figure shows, as text."""
    return str(page.locator(".touch-live").evaluate("live => live.innerHTML"))


def numbers(page: Any) -> dict[str, str]:
    """The readout of a figure: label and number."""
    items = page.locator(".touch-readout > span").evaluate_all(
        "items => items.map((item) => [...item.children].map((part) => part.textContent.trim()))"
    )
    return dict(items)


# -------------------------------------------------------------------------------- every figure


@pytest.mark.parametrize("name", NAMES)
def test_the_still_is_what_the_figure_shows_at_the_start(page: Any, name: str) -> None:
    drawn = (FIGURES / f"{name}.svg").read_text("utf-8")
    assert stills.still(page, name) == drawn, f"run python tools/stills.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_control_answers_to_keys_and_the_start_comes_back(page: Any, name: str) -> None:
    stills.mount(page, name)
    page.keyboard.press("Tab")
    start = state(page)
    controls = page.locator(".touch-handle, .touch-live input")
    assert controls.count() > 0
    for index in range(controls.count()):
        control = controls.nth(index)
        before = state(page)
        if control.get_attribute("type") == "radio":
            control.check()
        else:
            # A point may be held to a line, so that one of the two keys does nothing.
            for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp"):
                control.press(key)
                if state(page) != before:
                    break
        if not (control.get_attribute("type") == "radio" and index > 0 and before == start):
            assert state(page) != before or control.is_checked()
    page.get_by_role("button", name="Start again").press("Enter")
    assert state(page) == start


@pytest.mark.parametrize("name", NAMES)
def test_points_follow_the_pointer(page: Any, name: str) -> None:
    stills.mount(page, name)
    handles = page.locator(".touch-handle")
    for index in range(handles.count()):
        handle = handles.nth(index)
        before = state(page)
        box = handle.locator(".knob").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 15, y + 25, steps=3)
        page.mouse.up()
        moved = state(page)
        assert moved != before
        page.mouse.move(x, y)  # let go: it follows no longer
        assert state(page) == moved


@pytest.mark.parametrize("name", NAMES)
def test_arrow_keys_on_a_point_do_not_turn_the_page(page: Any, name: str) -> None:
    stills.mount(page, name)
    page.evaluate("document.addEventListener('keydown', () => { window.heard = true; })")
    for handle in page.locator(".touch-handle").all():
        handle.press("ArrowRight")
    assert page.evaluate("window.heard") is None


@pytest.mark.parametrize("name", NAMES)
def test_controls_have_names_and_colours_follow_the_theme(page: Any, name: str) -> None:
    stills.mount(page, name)
    for handle in page.locator(".touch-handle").all():
        assert re.search(r"\w.*: .*\d", handle.get_attribute("aria-label"))
    for control in page.locator(".touch-live input").all():
        label = control.evaluate("input => input.labels[0].innerText")
        assert re.search(r"\w", label)
    look = "() => getComputedStyle(document.querySelector('.touch-plane .title')).fill"
    light = page.evaluate(look)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(look) != light


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_fits_a_telephone_and_paper_shows_the_still(page: Any, name: str) -> None:
    stills.mount(page, name)
    width = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(width) == 0
    assert page.locator(".touch-live").is_visible()
    assert not page.locator("figure > img").is_visible()
    page.emulate_media(media="print")
    assert not page.locator(".touch-live").is_visible()
    assert page.locator("figure > img").evaluate("e => getComputedStyle(e).display") == "inline"


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_uses_the_figure_with_its_still(name: str) -> None:
    """In the notebook the still is seen as an image of Markdown, and it has a description."""
    uses = []
    for path in BOOK.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            uses += re.findall(
                rf"^:::\{{touch\}} {name}\n!\[(.+)\]\((\S+)\)$", source, re.MULTILINE
            )
    assert [source for _, source in uses] == [f"assets/figures/{name}.svg"]
    assert len(uses[0][0]) > 60


def test_scripts_of_a_page_are_small() -> None:
    size = {path.stem: path.stat().st_size for path in FIGURES.glob("*.js")}
    for path in BOOK.glob("*.ipynb"):
        names = set(re.findall(r":::\{touch\} (\w+)", path.read_text("utf-8")))
        assert sum(size[name] for name in {"touch", *names}) <= 40_000, path.name


# ------------------------------------------------------------------------------ shared numbers


def test_svd_of_the_plane(call: Call) -> None:
    matrices = [*normal(20, 2, 2), torch.eye(2), torch.tensor([[0.0, 2.0], [1.0, 0.0]])]
    for A in matrices:
        found = call("touch.svd", A)
        S, u, v = (tensor(found[key]) for key in "Suv")
        assert torch.allclose(S, torch.linalg.svdvals(A.double()), atol=1e-14)
        assert torch.allclose((u.T * S) @ v, A.double(), atol=1e-14)
        for directions in (u, v):
            assert torch.allclose(directions @ directions.T, torch.eye(2).double(), atol=1e-14)


def test_numbers_are_printed_as_in_print(call: Call) -> None:
    printed = {
        0.0: "0.00",
        -0.001: "−1.0 · 10⁻³",
        -1.5: "−1.50",
        123456.0: "1.2 · 10⁵",
        1e-16: "0.00",
    }
    for value, text in printed.items():
        assert call("touch.number", value) == text


# -------------------------------------------------------------------------------- the chapters


def test_ellipse(call: Call, page: Any) -> None:
    from lipbook.jacobians import jacobian  # noqa: PLC0415

    for A in normal(5, 2, 2, seed=1):
        angle = torch.linspace(0, 2 * torch.pi, 73, dtype=torch.float64)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        J = jacobian(lambda x, A=A: x @ A.T, circle[:1])[0]
        assert torch.allclose(tensor(call("ellipse.image", A)), circle @ J.T, atol=1e-14)
