"""The network that runs in the page of chapter 8: the library's, number for number.

Its figure as a reader uses it, with pen and keys, and read from files as the book is.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lipbook.attacks import pgd
from lipbook.lab import networks
from lipbook.robustness import certify

pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
if not (shutil.which("chromium") or shutil.which("chromium-browser")):
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "book" / "assets"


def tool(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


stills, digit_network = tool("stills"), tool("digit_network")
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with stills.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Any) -> tuple[Any, list[str]]:
    """One tab for all, which takes longer to open than a figure, and what goes wrong in it."""
    page = browser.new_page(viewport={"width": 390, "height": 900}, has_touch=True)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    return page, faults


@pytest.fixture
def page(tab: tuple[Any, list[str]]) -> Iterator[Any]:
    """A page on which an error or a complaint of a script is a failure."""
    page, faults = tab
    page.goto("about:blank")
    faults.clear()
    yield page
    assert not faults


@pytest.fixture
def call(page: Any) -> Call:
    """Call of a function of the figure for each of some images or other arguments."""
    page.set_content("<!doctype html><title>no figure</title>")
    for script in ("figures/touch.js", "figures/digit.js", "networks/digit.js"):
        page.add_script_tag(path=ASSETS / script)

    def function(name: str, *arguments: Any) -> Any:
        plain = [a.tolist() if hasattr(a, "tolist") else a for a in arguments]
        code = f"(a) => a[0].map((_, i) => touch.figures.digit.{name}(...a.map((v) => v[i])))"
        return page.evaluate(code, plain)

    return function


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return networks.load(digit_network.NETWORK)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Sixty test digits, and images that are none."""
    every, _ = networks.data(digit_network.NETWORK)
    rng = np.random.default_rng(0)
    digits = every[rng.choice(len(every), 60, replace=False)]
    noise = torch.from_numpy(rng.uniform(size=(4, 1, 28, 28))).float()
    flat = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)])
    return torch.cat([digits, noise, flat])


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).double()


def test_the_script_holds_the_network_that_ships() -> None:
    assert digit_network.SCRIPT.read_text("utf-8") == digit_network.script()
    assert digit_network.SCRIPT.stat().st_size < 1_500_000


def test_half_precision_is_read_exactly(page: Any) -> None:
    page.set_content("<!doctype html><title>no figure</title>")
    for name in ("touch", "digit"):
        page.add_script_tag(path=ASSETS / "figures" / f"{name}.js")
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    code = "(bytes) => Array.from(touch.figures.digit.halves(Uint8Array.from(bytes)))"
    found = page.evaluate(code, list(numbers.tobytes()))
    assert np.array_equal(np.array(found), numbers.astype(np.float64))


def test_logits_and_gradients_are_those_of_torch(
    call: Call, model: torch.nn.Module, images: torch.Tensor
) -> None:
    found = torch.tensor(call("logits", flat(images)), dtype=torch.float64)
    assert torch.allclose(found, model(images).double(), rtol=0, atol=1e-5)
    double = networks.load(digit_network.NETWORK).double()
    x = images.double().requires_grad_()
    exact = double(x)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((len(images), 10)))
    (gradient,) = torch.autograd.grad((rows * exact).sum(), x)
    back = torch.tensor(call("gradient", flat(images), rows), dtype=torch.float64)
    # At the image 0 and the image 1 units of a pair are equal, and torch halves the gradient.
    assert torch.allclose(back[:-2], gradient.flatten(1)[:-2], rtol=0, atol=1e-12)


def test_the_radius_is_never_above_the_certified_one(
    call: Call, model: torch.nn.Module, images: torch.Tensor
) -> None:
    every, _ = networks.data(digit_network.NETWORK)
    for x in (images, every[::8]):
        labels = model(x).argmax(1)
        sound = certify(model, [(x, labels)], (1, 28, 28)).radius
        found = torch.tensor(call("radius", call("logits", flat(x)), flat(x)), dtype=torch.float64)
        assert (found <= sound).all()
        assert (found >= 0.95 * sound - 0.02).all()  # and not much below it
    assert (found > 0.5).double().mean() > 0.8


def test_a_lie_is_one_and_lies_outside_the_radius(
    call: Call, model: torch.nn.Module, images: torch.Tensor
) -> None:
    x = images[:20]
    z = model(x)
    radius = torch.tensor(call("radius", z.double(), flat(x)), dtype=torch.float64)
    found = call("lie", flat(x))
    other = torch.tensor([lie["image"] for lie in found], dtype=torch.float64)
    assert other.min() >= 0
    assert other.max() <= 1
    distance = (other - flat(x)).norm(dim=1)
    assert torch.allclose(distance, torch.tensor([lie["distance"] for lie in found]).double())
    assert (distance >= radius).all()
    double = networks.load(digit_network.NETWORK).double()
    said = double(other.view(-1, 1, 28, 28)).argmax(1)
    assert said.tolist() == [lie["label"] for lie in found]
    assert (said != z.argmax(1)).all()
    # Projected gradient descent, with more steps and random starts, does not come much nearer.
    room = 0.95 * distance.float()
    attacked = pgd(model, x, z.argmax(1), room, steps=100, bounds=(0, 1))
    assert torch.equal(model(attacked).argmax(1), z.argmax(1))


def test_a_drawing_is_brought_to_the_size_and_the_middle_of_the_data(call: Call) -> None:
    rng = np.random.default_rng(2)
    place = torch.arange(28, dtype=torch.float64) + 0.5
    for _ in range(5):
        start, way = rng.uniform(3, 25, 2), 3 * rng.standard_normal((12, 2)).cumsum(0)
        stroke = np.clip(start + way, 0, 28)
        moved = np.clip(0.5 * stroke + 1, 0, 28)  # smaller, and elsewhere
        strokes = [[part.tolist()] for part in (stroke, moved)]
        found = torch.tensor(call("seen", strokes, [None, None]), dtype=torch.float64)
        image, again = found.view(2, 28, 28)
        assert torch.allclose(again, image, atol=1e-9)
        mass = image.sum()
        assert (image.sum(0) @ place / mass).item() == pytest.approx(14, abs=0.1)
        assert (image.sum(1) @ place / mass).item() == pytest.approx(14, abs=0.1)
        rows, columns = ((image.sum(axis) > 0.5).nonzero() for axis in (1, 0))
        longest = max((part.max() - part.min() + 1).item() for part in (rows, columns))
        assert 18 <= longest <= 22


def told(page: Any) -> str:
    return str(page.locator(".touch-readout").inner_text())


def paper(page: Any) -> dict[str, float]:
    """Where the paper lies in the window."""
    page.locator("svg.paper").scroll_into_view_if_needed()
    return dict(page.locator("svg.paper").bounding_box())


def test_a_reader_draws_with_a_pointer_and_with_keys(page: Any) -> None:
    stills.mount(page, "digit")
    assert "says 3" in told(page)
    page.get_by_role("button", name="Clear").click()
    assert "Draw a digit" in told(page)
    pen = page.locator(".touch-handle")

    pen.focus()  # a one: up, lower the pen, down, lift it
    for _ in range(8):
        page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    for _ in range(16):
        page.keyboard.press("ArrowDown")
    assert "lift the pen" in told(page)
    page.keyboard.press(" ")
    assert "says 1" in told(page)
    assert "at" in told(page)

    page.get_by_role("button", name="Clear").click()
    box = paper(page)
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(middle, box["y"] + 230, steps=10)
    assert "lift the pen" in told(page)
    page.mouse.up()
    assert "says 1" in told(page)


def test_too_much_ink_is_told(page: Any) -> None:
    stills.mount(page, "digit")
    page.get_by_role("button", name="Clear").click()
    box = paper(page)
    page.mouse.move(box["x"] + 30, box["y"] + 50)
    page.mouse.down()
    for y in range(50, 260, 10):
        page.mouse.move(box["x"] + (250 if y % 20 else 30), box["y"] + y)
    page.mouse.up()
    assert "More ink" in told(page)


def test_the_network_comes_from_a_file_when_the_figure_is_seen(page: Any, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    scripts = "".join(
        f'<script defer src="{(ASSETS / "figures" / name).as_uri()}"></script>'
        for name in ("touch.js", "digit.js")
    )
    source = tmp_path / "page.html"
    source.write_text(
        f"<!doctype html><meta charset=utf-8><title>page</title>{scripts}"
        '<div style="height: 4000px"></div><figure class="lip-touch touch-digit">'
        '<img alt="A still."/></figure>',
        encoding="utf-8",
    )
    page.goto(source.as_uri())
    assert "Waiting for the network" in told(page)
    data = digit_network.SCRIPT.as_uri()
    assert data not in asked
    page.locator("figure").scroll_into_view_if_needed()
    page.locator(".touch-readout", has_text="certified radius").wait_for()
    assert asked.count(data) == 1
    assert all(url.startswith("file:") for url in asked)
