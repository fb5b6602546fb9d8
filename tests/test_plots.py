from __future__ import annotations

import base64
import io
import math
import shutil
from collections.abc import Iterator
from itertools import combinations
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from nbclient import NotebookClient

from lipbook.lab import plots


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Give matplotlib's settings back and close the figures."""
    backend = plt.get_backend()
    plt.switch_backend("agg")
    with mpl.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)


# Two executions of a notebook

CELLS = (
    "import numpy as np\nimport torch\nfrom lipbook.lab import plots\nplots.style()",
    "import matplotlib.pyplot as plt\n"
    "fig, axes = plt.subplots()\n"
    "axes.plot(np.arange(9.0), label='line')\n"
    "axes.fill_between(np.arange(9.0), 1, 2, hatch='/')\n"
    "plots.ball_image(axes, np.eye(2), p=1, label=r'$\\|x\\|_1 \\leq 1$')\n"
    "axes.legend()\n"
    "plt.show()",
    "fig = plots.image_row(torch.eye(5).repeat(3, 1, 1) - 0.5, ['a', 'b', 'c'], signed=True)\n"
    "plt.show()",
)


def execute() -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    return NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


@pytest.mark.filterwarnings("default")  # the kernel's own, from zmq and asyncio
def test_two_executions_give_the_same_svg() -> None:
    first, second = execute(), execute()
    for one, other in zip(first.cells, second.cells, strict=True):
        assert one.outputs == other.outputs
    assert first.cells[0].outputs == []
    for cell in first.cells[1:]:
        (output,) = cell.outputs
        assert set(output.data) == {"image/svg+xml", "text/plain"}
        svg = output.data["image/svg+xml"]
        assert svg.rstrip().endswith("</svg>")
        assert "dc:date" not in svg
        assert "Matplotlib v" not in svg
        assert len(svg) < 60_000


def test_style_makes_svg_repeatable() -> None:
    plots.style()
    drawings = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3])
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        drawings.append(file.getvalue())
    assert drawings[0] == drawings[1]


def test_text_is_legible_on_a_telephone() -> None:
    plots.style()
    figure, axes = plt.subplots()
    axes.set(xlabel="x", title="title")
    axes.plot([0, 1], label="line")
    legend = axes.legend()
    screen, margins = 390, 32
    scale = (screen - margins) / figure.get_size_inches()[0]  # pixels an inch
    note = axes.annotate("note", (0, 0))
    texts = [note, axes.title, axes.xaxis.label, *axes.get_xticklabels(), *legend.get_texts()]
    for text in texts:
        assert text.get_fontsize() / 72 * scale >= 9.5


# Colours. Dark mode draws a figure through the CSS filter invert(0.93) hue-rotate(180deg), whose
# matrix is that of the Filter Effects specification.

DARK_PAGE = np.array(to_rgb("#121212"))
HUE_ROTATE_180 = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
SRGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def dark(rgb: np.ndarray) -> np.ndarray:
    inverted = 0.93 + rgb * (1 - 2 * 0.93)
    return np.clip(HUE_ROTATE_180 @ inverted, 0, 1)


def linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    low, high = sorted(float(SRGB_TO_XYZ[1] @ linear(rgb)) for rgb in (one, other))
    return (high + 0.05) / (low + 0.05)


def cielab(rgb: np.ndarray, vision: np.ndarray) -> np.ndarray:
    seen = np.clip(vision @ linear(rgb), 0, 1)
    xyz = (SRGB_TO_XYZ @ seen) / SRGB_TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


PALETTE = [np.array(to_rgb(colour)) for colour in plots.COLOURS]


@pytest.mark.parametrize("colour", PALETTE, ids=plots.COLOURS)
def test_colours_stand_out_on_both_pages(colour: np.ndarray) -> None:
    # WCAG 2.2, criterion 1.4.11, asks 3:1 of graphics
    assert contrast(colour, np.ones(3)) >= 3
    assert contrast(dark(colour), DARK_PAGE) >= 3


@pytest.mark.parametrize("page", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_for_every_reader(page: str, vision: str) -> None:
    shown = PALETTE if page == "light" else [dark(colour) for colour in PALETTE]
    seen = [cielab(colour, VISION[vision]) for colour in shown]
    # a difference of 2.3 is just noticeable side by side; thin lines need several times that
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) >= 15


def test_lines_cycle_through_the_colours() -> None:
    plots.style()
    _, axes = plt.subplots()
    drawn = [axes.plot([0, 1])[0].get_color() for _ in plots.COLOURS]
    assert drawn == list(plots.COLOURS)


# Drawings

entries = st.floats(-3, 3, allow_subnormal=False)


@settings(max_examples=30)  # each opens a figure
@given(a=entries, b=entries, c=entries, d=entries, p=st.sampled_from([1, 1.5, 2, 3, math.inf]))
def test_ball_image_has_the_image_of_the_sphere_as_boundary(
    a: float, b: float, c: float, d: float, p: float
) -> None:
    matrix = np.array([[a, b], [c, d]])
    _, axes = plt.subplots()
    drawn = plots.ball_image(axes, matrix, p).get_xy()
    sphere = plots.ball_image(axes, np.eye(2), p).get_xy()
    plt.close("all")
    assert np.allclose(np.linalg.norm(sphere, p, axis=1), 1, rtol=0, atol=1e-14)
    # a polygon repeats its first point at the end, unless they coincide already
    assert np.allclose(drawn[:200], (sphere @ matrix.T)[:200], rtol=0, atol=1e-14)
    angles = np.unwrap(np.arctan2(sphere[:, 1], sphere[:, 0]))
    assert np.isclose(angles[-1] - angles[0], 2 * math.pi)  # once around, closed
    assert (np.diff(angles) > 0).all()


@pytest.mark.parametrize(
    ("p", "corners"), [(1, [[1, 0], [0, 1], [-1, 0], [0, -1]]), (math.inf, [[1, 1], [-1, 1]])]
)
def test_ball_image_draws_the_corners(p: float, corners: list[list[float]]) -> None:
    _, axes = plt.subplots()
    drawn = plots.ball_image(axes, torch.eye(2, requires_grad=True), p).get_xy()
    for corner in corners:
        assert np.abs(drawn - corner).max(1).min() < 1e-14


def test_ball_image_reaches_the_spectral_norm() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = rng.normal(size=(2, 2))
        _, axes = plt.subplots()
        reach = np.linalg.norm(plots.ball_image(axes, matrix).get_xy(), axis=1)
        plt.close("all")
        top = np.linalg.norm(matrix, 2)
        assert reach.max() <= top * (1 + 1e-14)
        # the nearest of 200 directions is at most π/200 from the singular vector
        assert reach.max() >= top * math.cos(math.pi / 200)


def test_ball_image_keeps_proportions_and_passes_properties_on() -> None:
    _, axes = plt.subplots()
    patch = plots.ball_image(axes, [[2, 0], [0, 1]], edgecolor="red", label="image")
    assert axes.get_aspect() == 1
    assert patch in axes.patches
    assert patch.get_edgecolor() == (1, 0, 0, 1)
    assert patch.get_label() == "image"
    low, high = axes.get_xlim()
    assert low < -2
    assert high > 2


@pytest.mark.parametrize(
    ("matrix", "p", "message"),
    [
        (np.eye(3), 2, "matrix: expected a finite 2×2 matrix"),
        ([1, 2], 2, "matrix: expected"),
        ([[1, math.nan], [0, 1]], 2, "matrix: expected"),
        (np.eye(2), 0.5, "p: expected a number from 1 to inf, got 0.5"),
        (np.eye(2), math.nan, "p: expected"),
    ],
)
def test_ball_image_refuses(matrix: object, p: float, message: str) -> None:
    _, axes = plt.subplots()
    with pytest.raises(ValueError, match=message):
        plots.ball_image(axes, matrix, p)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 1, 5, 6)])
def test_image_row_shows_the_images_in_order(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    figure = plots.image_row(images, ["a", "b", "c", "d"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", "d"]
    for image, axes in zip(images.reshape(4, 5, 6), figure.axes, strict=True):
        (shown,) = axes.images
        assert np.array_equal(shown.get_array(), image.detach())
        assert shown.get_clim() == (0, 1)
        assert shown.to_rgba(0.0) == (1, 1, 1, 1)  # paper
        assert shown.to_rgba(1.0) == (0, 0, 0, 1)  # ink
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0


def test_signed_images_share_one_symmetric_scale() -> None:
    images = torch.zeros(2, 3, 3)
    images[0, 0, 0], images[1, 1, 1] = 1, -4
    for axes in plots.image_row(images, signed=True).axes:
        (shown,) = axes.images
        assert shown.get_clim() == (-4, 4)
        red, _, blue, _ = shown.to_rgba(4.0)
        assert red > 2 * blue
        red, _, blue, _ = shown.to_rgba(-4.0)
        assert blue > 2 * red
        assert min(shown.to_rgba(0.0)) > 0.95


def test_a_zero_map_is_white() -> None:
    figure = plots.image_row(torch.zeros(1, 3, 3), signed=True)
    figure.canvas.draw()
    assert min(figure.axes[0].images[0].to_rgba(0.0)) > 0.95


@pytest.mark.parametrize(
    ("shape", "titles", "message"),
    [
        ((28, 28), None, r"images: expected shape .* got \(28, 28\)"),
        ((2, 3, 28, 28), None, r"images: expected shape .* got \(2, 3, 28, 28\)"),
        ((0, 28, 28), None, r"images: expected shape .* got \(0, 28, 28\)"),
        ((2, 28, 28), ["one"], "titles: expected 2, got 1"),
    ],
)
def test_image_row_refuses(shape: tuple[int, ...], titles: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.image_row(torch.zeros(shape), titles)


# The slider


def drawing() -> str:
    """Lines, markers, curves, a hatch, an image and formulas, as matplotlib writes them."""
    plots.style()
    figure, (left, right) = plt.subplots(1, 2)
    left.plot(np.arange(9.0), np.sqrt(np.arange(9.0)), "o-", label=r"$\sqrt{x_1^2 + \frac{1}{3}}$")
    left.scatter(np.arange(5.0), np.ones(5), c=["C0", "C1", "C2", "C3", "C0"], alpha=0.5)
    left.fill_between(np.arange(9.0), -1, -2, hatch="/")
    left.set(ylabel="up and down")
    left.legend()
    right.imshow(np.eye(3))
    plots.ball_image(right, np.eye(2), facecolor="white")
    right.errorbar([0, 1, 2], [0, 1, 0], yerr=0.5, linestyle="--", capsize=3)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file.getvalue().decode()


PIXELS = """async (svg) => {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], {type: "image/svg+xml"}));
  await image.decode();
  const canvas = new OffscreenCanvas(2 * image.naturalWidth, 2 * image.naturalHeight);
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return [canvas.width, canvas.height,
    [...pen.getImageData(0, 0, canvas.width, canvas.height).data].join(" ")];
}"""


@pytest.mark.browser
def test_a_compact_drawing_looks_the_same() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    before = drawing()
    after = plots.compact_svg(before)
    assert len(after) < 0.65 * len(before)
    with api.sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        one, other = page.evaluate(PIXELS, before), page.evaluate(PIXELS, after)
        browser.close()
    assert one[:2] == other[:2]
    difference = np.abs(np.array(one[2].split(), int) - np.array(other[2].split(), int))
    # An edge that moves a hundredth of a point may cross a row of samples, of which a pixel has 4,
    # and two edges may do so in one pixel.
    assert difference.max() < 0.5 * 255
    assert (difference > 16).mean() < 0.002


def test_a_compact_drawing_stays_as_it_is() -> None:
    once = plots.compact_svg(drawing())
    assert plots.compact_svg(once) == once


@pytest.mark.parametrize(
    ("path", "told"),
    {
        "a point after a closed part": ("M 1 1 L 2 1 L 2 3 z M 5 5 L 6 7", "M1 1h1v2zm4 4 1 2"),
        "curves": ("M 0 0 Q 1 2 3 4 C 3 5 4 5 4 4", "M0 0q1 2 3 4c0 1 1 1 1 0"),
        "rounding": ("M 0 0" + " L 0.004 1" * 3 + " L 0.006 2", "M0 0v1h0 0l.01 1"),
        "commands of others": ("M 0 0 a 1 1 0 0 1 2 2", "M 0 0 a 1 1 0 0 1 2 2"),
    }.values(),
)
def test_a_path_tells_each_point_from_the_one_before(path: str, told: str) -> None:
    assert plots.compact_svg(f'<path d="{path}"/>') == f'<path d="{told}"/>'


def test_what_is_no_drawing_is_refused() -> None:
    with pytest.raises(ValueError, match="svg: expected one element of XML"):
        plots.compact_svg("<svg>")


def frames(number: int) -> list[Figure]:
    drawn = []
    for slope in range(number):
        figure, axes = plt.subplots(figsize=(2, 2))
        axes.plot([0, 1], [0, slope])
        drawn.append(figure)
    return drawn


def test_a_slider_holds_every_frame_and_shows_the_first() -> None:
    plots.style()
    slider = plots.Slider(frames(3), "slope <m>", ["0", "1", '"2"'], "A line & a slope.")
    assert plt.get_fignums() == []
    figure = ElementTree.fromstring(slider._repr_html_().replace(" hidden", ' hidden=""'))
    images = figure.findall("img")
    assert [image.get("hidden") for image in images] == [None, "", ""]
    assert [image.get("data-value") for image in images] == ["0", "1", '"2"']
    assert images[1].get("alt") == "A line & a slope. slope <m> 1"
    drawings = [base64.b64decode(image.get("src", "").partition(",")[2]) for image in images]
    assert len(set(drawings)) == 3
    for drawing in drawings:
        assert ElementTree.fromstring(drawing.decode()).tag.endswith("svg")
    again = plots.Slider(frames(3), "slope <m>", ["0", "1", '"2"'], "A line & a slope.")
    assert again._repr_html_() == slider._repr_html_()
    assert repr(slider) == 'Slider: slope <m> 0, 1, "2"'


@pytest.mark.parametrize(
    ("number", "values", "alt", "words"),
    [
        (1, ["0"], "A line.", "frames: expected at least 2 figures, got 1"),
        (2, ["0"], "A line.", "values: expected 2, one for each frame, got 1"),
        (2, ["0", "1"], " ", "alt: expected a description"),
    ],
)
def test_a_slider_refuses(number: int, values: list[str], alt: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plots.Slider(frames(number), "slope", values, alt)


# Tables


def test_a_table_is_one_for_the_page_and_lines_for_a_terminal() -> None:
    table = plots.Table(["a < b", 1.58], [["x & y", 0.5], ("–", "")])
    page = ElementTree.fromstring(table._repr_html_())
    assert [[cell.text or "" for cell in row] for row in page.iter("tr")] == [
        ["a < b", "1.58"],
        ["x & y", "0.5"],
        ["–", ""],
    ]
    assert [row.tag for row in page.find("thead/tr") or []] == ["th", "th"]
    assert repr(table) == "a < b  1.58\nx & y  0.5\n–"


def test_a_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"rows: expected 2 cells each.*got \['1'\]"):
        plots.Table(["a", "b"], [[1, 2], [1]])
