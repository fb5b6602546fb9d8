"""The interactive figures: their mathematics against the library, and what a reader can do.

Each figure runs alone in Chromium, on a page with the book's style sheet and no book. The pages
of the book, with all their scripts, are the matter of ``test_pages.py``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lipbook import generalization
from lipbook.activations import AbsoluteValue, MaxMin
from lipbook.composition import Ball, lipschitz_bound
from lipbook.convolutions import bcop_kernel, rko_kernel
from lipbook.interpretability import counterfactual
from lipbook.jacobians import jacobian, layer_jacobians
from lipbook.norms import circular_convolution_singular_values, operator_norm
from lipbook.orthogonal import bjorck
from lipbook.robustness import certified_radius
from lipbook.wasserstein import c_transform, wasserstein1

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


@pytest.fixture(scope="module")
def tab(browser: Any) -> tuple[Any, list[str]]:
    """One tab for all, which takes longer to open than a figure, and what goes wrong in it."""
    page = browser.new_page(viewport={"width": 390, "height": 900}, has_touch=True)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: faults.append(request.url))
    return page, faults


@pytest.fixture
def page(tab: tuple[Any, list[str]]) -> Iterator[Any]:
    """A page on which an error, a complaint or a request of a script is a failure."""
    page, faults = tab
    page.goto("about:blank")
    faults.clear()
    yield page
    page.emulate_media(media="screen")
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


def plane_rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return tensor([[c, -s], [s, c]])


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
    start = state(page)
    controls = page.locator(".touch-handle, .touch-live input")
    assert controls.count() > 0
    for control in controls.all():
        before = state(page)
        if control.get_attribute("type") != "radio":
            # A point that is held to a line may answer to two of the keys only.
            for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp"):
                control.press(key)
                if state(page) != before:
                    break
        elif control.is_checked():
            continue
        else:
            control.press("Space")
        assert state(page) != before
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


def test_a_finger_moves_a_point_and_not_the_page(page: Any) -> None:
    stills.mount(page, "ellipse")
    page.add_style_tag(content="body { height: 3000px; }")
    knob = page.locator(".touch-handle .knob").nth(1)

    def middle() -> tuple[float, float]:
        box = knob.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    finger = page.context.new_cdp_session(page)
    x, y = middle()
    for way in (0, 5, 15, 30, 45, 60, None):
        points = [] if way is None else [{"x": x - way / 2, "y": y + way}]
        kind = {0: "touchStart", None: "touchEnd"}.get(way, "touchMove")
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(30)
    assert middle() == pytest.approx((x - 30, y + 60), abs=1)
    assert page.evaluate("window.scrollY") == 0


def test_keys_turn_a_point_on_a_circle(page: Any) -> None:
    """Ten steps of five degrees lead from 40 degrees to the right angle, and back."""
    stills.mount(page, "product")
    stretch = torch.diag(tensor([2.0, 0.5]))
    for key, degrees in (("ArrowUp", 90), ("ArrowRight", 40)):
        for _ in range(10):
            page.locator(".touch-handle").press(key)
        reached = operator_norm(stretch @ plane_rotation(math.radians(degrees)) @ stretch, 2)
        assert numbers(page)["angle of u and v"] == f"{degrees}°"
        assert numbers(page)["‖W₂W₁‖ ="] == f"{reached:.2f}"


def test_a_figure_that_fails_leaves_its_still(page: Any) -> None:
    stills.mount(page, "ellipse")
    page.evaluate(
        """() => {
          document.body.innerHTML = '<figure class="touch-broken"><img alt="still"/></figure>';
          const mount = (frame) => { frame.plane({ x: [0, 1], y: [0, 1] }); throw Error("no"); };
          try { touch.add("broken", { mount }); } catch (error) { window.caught = error.message; }
        }"""
    )
    assert page.evaluate("window.caught") == "no"
    assert page.locator("figure").evaluate("figure => figure.children.length") == 1


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
        said = handle.get_attribute("aria-label")
        assert re.search(r"\w.*: .*\d", said)
        assert handle.text_content() in said
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


def test_ellipse(call: Call) -> None:
    for A in normal(5, 2, 2, seed=1):
        angle = torch.linspace(0, 2 * torch.pi, 73, dtype=torch.float64)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        J = jacobian(lambda x, A=A: x @ A.T, circle[:1])[0]
        assert torch.allclose(tensor(call("ellipse.image", A)), circle @ J.T, atol=1e-14)


@pytest.mark.parametrize("share", [0.3, 1.0, 1.9, 2.05])
def test_descent(call: Call, share: float) -> None:
    eigenvalues, angle = tensor([1.0, 9.0]), 0.5
    alpha = share / 9
    A = plane_rotation(angle) @ torch.diag(eigenvalues) @ plane_rotation(-angle)
    error = normal(2, seed=2).requires_grad_()
    optimizer = torch.optim.SGD([error], lr=alpha)
    found = call("descent.path", eigenvalues, angle, error, alpha, 12)
    for here in found:
        assert torch.allclose(tensor(here), error.detach(), atol=1e-12)
        optimizer.zero_grad()
        (error @ A @ error / 2).backward()
        optimizer.step()
    steps = call("descent.tenth", eigenvalues, alpha)
    worst = torch.linalg.eigvalsh(torch.eye(2) - alpha * A).abs().max().item()
    assert worst**steps == pytest.approx(0.1) if share < 2 else steps == math.inf
    on_level = tensor(call("descent.level", eigenvalues, angle, 0.7))
    assert torch.allclose(((on_level @ A) * on_level).sum(1) / 2, tensor(0.7))


def test_depth_draws(call: Call, page: Any) -> None:
    draws = "() => Array.from({ length: 4000 }, touch.figures.depth.normals(3))"
    sample = tensor(page.evaluate(draws))
    assert abs(sample.mean()) < 5 / 4000**0.5
    assert abs(sample.square().mean() - 1) < 5 * (2 / 4000) ** 0.5
    assert abs((sample.abs() < 0.6745).double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    for W in tensor(call("depth.weights", "orthogonal", 4, 12, 5)):
        assert torch.allclose(W @ W.T, torch.eye(12).double(), atol=1e-14)
    gaussian = tensor(call("depth.weights", "Gaussian", 4, 12, 50))
    assert gaussian.shape == (50, 12, 12)
    assert abs(12 * gaussian.square().mean() - 1) < 5 * (2 / gaussian.numel()) ** 0.5


@pytest.mark.parametrize("name", ["tanh", "ReLU", "|x|"])
def test_depth(call: Call, name: str) -> None:
    activation = {"tanh": nn.Tanh(), "ReLU": nn.ReLU(), "|x|": AbsoluteValue()}[name]
    weights, x = normal(6, 5, 5, seed=3), normal(5, seed=4)
    layers = []
    for W in weights:
        layers.append(nn.Sequential(nn.Linear(5, 5, bias=False).double(), activation))
        layers[-1][0].weight.data = 1.3 * W
    product = torch.eye(5, dtype=torch.float64)
    wanted = [torch.ones(5, dtype=torch.float64)]
    for factor in layer_jacobians(nn.Sequential(*layers), x[None]):
        product = factor[0].detach() @ product
        wanted.append(torch.linalg.svdvals(product))
    found = tensor(call("depth.spectra", weights, 1.3, name, x))
    for values, exact in zip(found, wanted, strict=True):
        assert (values - exact).abs().max() <= 1e-13 * exact[0]


def test_product(call: Call) -> None:
    for small, angle in ((0.5, 0.7), (0.0, 1.2), (1.5, 2.9), (2.0, 1.0), (0.3, 0.0)):
        stretch = torch.diag(tensor([2.0, small]))
        product = stretch @ plane_rotation(-angle) @ stretch
        reached = call("product.norm", small, angle)
        assert reached == pytest.approx(operator_norm(product, 2).item(), rel=1e-13)
        assert reached <= 4 * (1 + 1e-13)
        layers = call("product.layers", small, angle)
        v = tensor([math.cos(angle), math.sin(angle)])  # the direction that can be moved
        assert (tensor(layers["second"]) @ v).norm() == pytest.approx(2)
        if small == 2 or angle == 0:  # orthogonal up to a factor, or aligned
            assert reached == pytest.approx(4)


@pytest.mark.parametrize("name", ["MaxMin", "ReLU", "|x|"])
def test_fold(call: Call, name: str) -> None:
    activation = {"MaxMin": MaxMin(), "ReLU": nn.ReLU(), "|x|": AbsoluteValue()}[name]
    angle, shift, depth = 0.8, 0.2, 3
    linear = nn.Linear(2, 2).double()
    linear.weight.data = plane_rotation(angle)
    linear.bias.data = torch.full((2,), shift, dtype=torch.float64)
    network = nn.Sequential(*[linear, activation] * depth)
    square = [[-1, -1], [1, -1], [1, 1], [-1, 1]]
    pieces = call("fold.fold", square, name, angle, shift, depth)
    assert sum(call("fold.area", piece["points"]) for piece in pieces) == pytest.approx(4)
    centres = torch.stack([tensor(piece["points"]).mean(0) for piece in pieces])
    values, J = network(centres).detach(), jacobian(network, centres).detach()
    for piece, x, value, slope in zip(pieces, centres, values, J, strict=True):
        A, b = tensor(piece["A"]), tensor(piece["b"])
        assert torch.allclose(A @ x + b, value, atol=1e-12)
        assert torch.allclose(A, slope, atol=1e-12)

    shares = tensor(call("fold.kept", pieces))
    points = torch.from_numpy(np.random.default_rng(5).uniform(-1, 1, (2000, 2)))
    rank = torch.linalg.matrix_rank(jacobian(network, points).detach(), atol=1e-9)
    for kept, found in zip((2, 1, 0), shares, strict=True):
        assert abs((rank == kept).double().mean() - found) <= 5 * 0.5 / 2000**0.5
    if name != "ReLU":
        assert shares[0] == pytest.approx(1)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_bjorck(call: Call, p: int) -> None:
    u, v = (torch.linalg.qr(normal(n, 3, seed=6)).Q for n in (4, 3))
    identity = torch.eye(3, dtype=torch.float64)
    for sigma in (0.001, 0.3, 0.9, 1.0, 1.4, 2.0, 2.3):
        # The iteration by its definition, on a matrix that has this singular value.
        A = u @ torch.diag(tensor([sigma, 0.5, 1.2])) @ v.T
        E = identity - A.T @ A
        terms = [math.comb(2 * j, j) / 4**j * E.matrix_power(j) for j in range(p + 1)]
        after = u[:, 0] @ A @ sum(terms) @ v[:, 0]
        assert call("bjorck.step", sigma, p) == pytest.approx(after.item(), abs=1e-11)
        if p % 2 and sigma <= 1:
            library = bjorck(torch.diag(tensor([1.0, sigma])), order=p, steps=1)
            assert call("bjorck.step", sigma, p) == pytest.approx(library[1, 1].item(), abs=1e-14)


def test_bjorck_basins(call: Call) -> None:
    """The end points of the proposition on basins lie where it says."""

    def end(sigma: float, p: int) -> float:
        return float(call("bjorck.limit", call("bjorck.path", sigma, p)))

    for p, square, inside, outside in (
        (1, 3, 1, -1),
        (1, 5, None, math.inf),
        (2, 7 / 3, 1, math.inf),
        (3, 3, None, math.inf),
    ):
        edge = square**0.5
        assert end(edge + 1e-3, p) == outside
        assert end(edge - 1e-3, p) == inside if inside else abs(end(edge - 1e-3, p)) == 1


def test_bcop(call: Call) -> None:
    turn, p, q = 0.4, 1.1, 2.5
    lines = tensor([[[[math.cos(a)], [math.sin(a)]]] for a in (p, q)])  # (factors, 1, 2, 1)
    wanted = bcop_kernel(plane_rotation(turn)[None], lines, (2, 2))[0]
    taps = call("bcop.bcop", turn, p, q)
    K = tensor(taps).permute(2, 3, 0, 1)
    assert torch.allclose(K, wanted, atol=1e-14)
    changed = call("bcop.moved", taps, 0.3)
    loose = call("bcop.rko", changed)
    assert torch.allclose(
        tensor(loose).permute(2, 3, 0, 1),
        rko_kernel(tensor(changed).permute(2, 3, 0, 1)),
        atol=1e-14,
    )
    for kernel in (taps, changed, loose):
        exact = circular_convolution_singular_values(tensor(kernel).permute(2, 3, 0, 1), 16)
        found = tensor(call("bcop.spectrum", kernel))
        assert torch.allclose(found, exact.flatten().sort(descending=True).values, atol=1e-14)
    assert (tensor(call("bcop.spectrum", taps)) - 1).abs().max() < 1e-14
    assert tensor(call("bcop.spectrum", loose)).square().mean() == pytest.approx(1 / 4)


def test_transport(call: Call) -> None:
    for seed in range(5):
        x, y = normal(2, 5, 2, seed=seed)
        exact = wasserstein1(x, y).item()
        plan = call("transport.plan", x, y)
        assert plan["cost"] == pytest.approx(exact, rel=1e-12)
        assert sorted(plan["to"]) == [0, 1, 2, 3, 4]
        v = tensor(call("transport.potential", x, y, plan["to"]))
        points = torch.cat([x, y, normal(20, 2, seed=seed + 10)])
        f = tensor([call("transport.critic", z, y, v) for z in points])
        assert torch.allclose(f, c_transform(v, y, points), atol=1e-14)
        assert (f[:5].mean() - f[5:10].mean()).item() == pytest.approx(exact, rel=1e-12)


def test_disc(call: Call) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), MaxMin(), nn.Linear(2, 3)).double()
    angles = torch.arange(3).double() * 2 * math.pi / 3 + 1.0
    net[0].weight.data = plane_rotation(math.pi / 5)
    net[2].weight.data = torch.stack([angles.cos(), angles.sin()], 1)
    side = torch.linspace(-4, 4, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for bias in ([-0.3, 0.2, 0.4], [-0.3, 0.2, -0.8]):
        net[2].bias.data = tensor(bias)
        decisions = net(grid).argmax(1)
        for x in normal(8, 2, seed=7):
            z = net(x[None]).detach()
            assert torch.allclose(tensor(call("disc.logits", x, bias)), z[0], atol=1e-14)
            label = z.argmax(1)
            exact = certified_radius(z, label, head=net[2].weight.detach()).item()
            radius = call("disc.radius", z[0])
            assert radius == pytest.approx(exact, rel=1e-12)
            nearest = call("disc.nearest", x, bias)
            assert nearest["length"] >= radius - 1e-12
            there = net(tensor([nearest["point"]]))[0]
            assert there.topk(2).values.diff().abs() < 1e-9  # on the border
            by_grid = (grid[decisions != label] - x).norm(dim=1).min().item()
            assert by_grid - 0.02 < nearest["length"] <= by_grid


def test_margins(call: Call) -> None:
    points = call("margins.sample", 600)
    X, s = tensor([p["x"] for p in points]), tensor([p["s"] for p in points])
    assert s.sum() == 0
    noise = X - s[:, None] * tensor([1.0, 0.6])
    assert abs(noise.mean()) < 5 * 0.5 / 1200**0.5
    assert abs(noise.square().mean() - 0.25) < 5 * 0.25 * (2 / 1200) ** 0.5
    for w in normal(3, 2, seed=8):
        logits = torch.stack([torch.zeros(600), X @ w], 1) * 1.0
        exact = generalization.margins(logits, (s > 0).long())
        found = tensor(call("margins.margins", points, w))
        assert torch.allclose(found, exact, atol=1e-12)
        for gamma in (0.1, 1.0):
            loss = generalization.margin_loss(exact, gamma)
            assert call("margins.loss", found, gamma) == pytest.approx(loss)
            size = w.norm().item()
            exact_term = 2 * generalization.data_norm(X) * size / (gamma * 600)
            assert call("margins.complexity", points, size, gamma) == pytest.approx(exact_term)
            # At least as much as the supremum over signs that are drawn, on average.
            signs = torch.from_numpy(np.random.default_rng(9).choice([-1.0, 1.0], (2000, 600)))
            tossed = 2 * size * (signs @ X).norm(dim=1).mean().item() / (gamma * 600)
            assert tossed <= exact_term <= 3**0.5 * tossed * 1.05
    assert call("margins.chance", 600) == pytest.approx(3 * math.sqrt(math.log(40) / 1200))


def test_walk(call: Call) -> None:
    layers: list[nn.Module] = []
    for angle, bias in ((1.0, [-0.6, 0.9]), (2.8, [-0.4, 0.6]), (0.3, [0.7, 0.5])):
        linear = nn.Linear(2, 2).double()
        linear.weight.data, linear.bias.data = plane_rotation(angle), tensor(bias)
        layers += [linear, MaxMin()]
    head = nn.Linear(2, 3, bias=False).double()
    angles = 0.4 + torch.arange(3).double() * 2 * math.pi / 3
    head.weight.data = torch.stack([angles.cos(), angles.sin()], 1)
    net = nn.Sequential(*layers, head)
    x = 1.5 * normal(10, 2, seed=10)
    multiples = (0.0, 0.5, 0.999, 2.0)
    # The rows are a tight frame: their norm is the root of 3/2, which makes √3 of √2.
    exact = counterfactual(net, x, multiples=multiples, lipschitz=1.5**0.5)
    for k, point in enumerate(x):
        run = call("walk.run", point)
        assert torch.allclose(tensor(run["z"]), net(point[None])[0], atol=1e-13)
        assert torch.allclose(tensor(run["J"]), jacobian(net, point[None])[0], atol=1e-13)
        start = call("walk.start", point)
        assert start["radius"] == pytest.approx(exact.radius[k].item(), rel=1e-10)
        for t, path, decision in zip(multiples, exact.path, exact.decisions, strict=True):
            found = tensor(call("walk.after", point, t))
            assert torch.allclose(found, path[k], atol=1e-11)
            if t < 1:
                assert decision[k] == start["y"]


def test_multiplier(call: Call) -> None:
    for angle in (0.0, 0.4, 1.2):
        W = call("multiplier.weights", angle)
        W1, W2 = (tensor(w) for w in W)
        network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
        network[0].weight.data, network[2].weight.data = W1, W2
        top = torch.linalg.matrix_norm(W2, 2).item() ** 2
        corners = lipschitz_bound(network, (2,), method="seqlip").value
        assert call("multiplier.patterns", W) == pytest.approx(corners, rel=1e-9)
        product = lipschitz_bound(network, (2,)).value
        assert call("multiplier.product", W) == pytest.approx(product, rel=1e-9)
        for t in (0.6 * top, top, 2 * top):
            rho = call("multiplier.rho", W, t)
            # The inequality of matrices holds at rho and at nothing smaller.
            one = torch.eye(2, dtype=torch.float64)
            M = torch.zeros(4, 4, dtype=torch.float64)
            M[:2, :2], M[:2, 2:] = -rho * one, t * W1.T
            M[2:, :2], M[2:, 2:] = t * W1, -2 * t * one + W2.T @ W2
            assert abs(torch.linalg.eigvalsh(M)[-1]) < 1e-12
            M[:2, :2] += 1e-3 * one
            assert torch.linalg.eigvalsh(M)[-1] > 1e-6
            assert rho >= corners**2 * (1 - 1e-9)
        assert call("multiplier.rho", W, top) <= product**2 * (1 + 1e-9)
        best = call("multiplier.best", W)
        least = min(call("multiplier.rho", W, t) for t in np.linspace(0.51, 2, 60) * top)
        assert call("multiplier.rho", W, best) <= least * (1 + 1e-9)


def test_domain(call: Call) -> None:
    class SelfAttention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    attention = SelfAttention()
    for tokens in normal(5, 2, 2, seed=11):
        assert torch.allclose(
            tensor(call("domain.outputs", tokens)), attention(tokens[None])[0], atol=1e-13
        )
        exact = jacobian(attention, tokens[None])[0].reshape(4, 4)
        found = call("domain.jacobian", tokens)
        assert torch.allclose(tensor(found), exact, atol=1e-13)
        size = torch.linalg.matrix_norm(exact, 2).item()
        assert call("domain.norm", found) == pytest.approx(size, rel=1e-6)
        radius = tokens.norm(dim=1).max().item()
        assert size <= call("domain.bound", radius)
    for radius in (0.1, 1.0, 4.0):
        ball = Ball(torch.zeros(2, 2).double(), radius)
        exact = lipschitz_bound(attention, (2, 2), domain=ball).value
        assert call("domain.bound", radius) == pytest.approx(exact, rel=1e-6)
