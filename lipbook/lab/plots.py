"""The look of the figures, two drawings that several chapters share, tables, and a slider."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lipbook._extras import missing

try:
    import matplotlib as mpl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(missing("matplotlib"), name=error.name) from error
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.rcsetup import cycler

__all__ = [
    "COLOURS",
    "WIDTH",
    "style",
    "ball_image",
    "image_row",
    "compact_svg",
    "Slider",
    "Table",
]

#: The colours of lines in their order, blue, orange, green, purple and black. Each has a contrast
#: above 3.5:1 on white and, inverted, on a dark page, and on both pages any two differ for
#: colour-blind readers too.
COLOURS = ("#1F4FB0", "#DD6000", "#159A62", "#803A6B", "#000000")

#: The width of a figure in inches. Text of 12 points is then 16 pixels high on a wide page and
#: still 11 where the page, 390 pixels wide, leaves 358 to the figure.
WIDTH = 5.5


def style() -> None:
    """Set the look of every figure of the book; call it once, in the first cell.

    Black on white (the page inverts figures in dark mode), lines in ``COLOURS``, text that is
    legible on a telephone. Figures become SVG whose bytes depend on the drawing alone: without
    a date, without the version of matplotlib, with a fixed salt for the identifiers. Where
    IPython runs, notebooks show figures in that form.

    Examples
    --------
    >>> import io
    >>> import matplotlib.pyplot as plt
    >>> from lipbook.lab import plots
    >>> plots.style()
    >>> def drawing():
    ...     figure, axes = plt.subplots()
    ...     _ = axes.plot([0, 1], [1, 0])
    ...     svg = io.BytesIO()
    ...     no_date = {"Date": None, "Creator": None}
    ...     figure.savefig(svg, format="svg", metadata=no_date)
    ...     plt.close(figure)
    ...     return svg.getvalue()
    >>> drawing() == drawing()
    True
    """
    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.4),
            "figure.constrained_layout.use": True,
            "font.size": 12,
            "axes.labelsize": 12,
            "axes.titlesize": 12,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "legend.fontsize": 11,
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.8,
            "image.cmap": "gray_r",
            "image.interpolation": "none",
            "svg.fonttype": "path",
            "svg.hashsalt": "lipbook",
        }
    )
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats  # noqa: PLC0415

        set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})


def ball_image(axes: Axes, matrix: ArrayLike | Tensor, p: float = 2, **patch: Any) -> Polygon:
    r"""Draw the image of the unit ball of :math:`\ell_p` in the plane under a 2×2 matrix.

    .. math::

        \{ M x : x \in \mathbb R^2, \ \|x\|_p \le 1 \}

    For :math:`p = 2` this is a disc turned into an ellipse whose half-axes are the singular
    values of :math:`M`; the identity draws the ball itself.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where to draw. Both axes get the same scale.
    matrix : array_like
        :math:`M`, (2, 2).
    p : float
        Exponent of the norm, from 1 to ``math.inf``.
    **patch
        Properties of matplotlib's ``Polygon``, such as ``edgecolor`` and ``label``.

    Returns
    -------
    matplotlib.patches.Polygon
        The patch, already on the axes.

    Raises
    ------
    ValueError
        `matrix` is not a finite 2×2 matrix, or `p` is below 1.

    Examples
    --------
    The farthest point of the ellipse is at the spectral norm.

    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> from lipbook.lab.plots import ball_image
    >>> figure, axes = plt.subplots()
    >>> ellipse = ball_image(axes, [[3.0, 0.0], [4.0, 5.0]])
    >>> reach = np.linalg.norm(ellipse.get_xy(), axis=1).max()
    >>> round(float(reach), 3), round(45**0.5, 3)
    (6.708, 6.708)
    >>> plt.close(figure)
    """
    m = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, float)
    if m.shape != (2, 2) or not np.isfinite(m).all():
        raise ValueError(f"matrix: expected a finite 2×2 matrix, got {m}")
    if not p >= 1:
        raise ValueError(f"p: expected a number from 1 to inf, got {p}")
    angle = np.arange(200) * (2 * math.pi / 200)  # a multiple of 8: the corners are drawn
    circle = np.stack([np.cos(angle), np.sin(angle)])  # (2, 200)
    boundary = m @ (circle / np.linalg.norm(circle, p, axis=0))
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[0], "linewidth": 1.8}
    (polygon,) = axes.fill(*boundary, **(outline | patch))
    axes.set_aspect("equal")
    return polygon


def image_row(
    images: Tensor, titles: Sequence[str] | None = None, *, signed: bool = False
) -> Figure:
    r"""Draw images side by side: digits in ink on paper, or signed maps in two colours.

    Parameters
    ----------
    images : Tensor
        (n, h, w) or (n, 1, h, w). Digits are shown from 0 (white) to 1 (black), whatever they
        contain.
    titles : sequence of str, optional
        One for each image.
    signed : bool
        Show negative values in blue and positive ones in red, zero nearly white, on one scale for
        the whole row, so that the images can be compared.

    Returns
    -------
    matplotlib.figure.Figure
        A figure of n axes.

    Raises
    ------
    ValueError
        `images` has another shape, or `titles` another length.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from lipbook.lab.data import mnist
    >>> from lipbook.lab.plots import image_row
    >>> digits = mnist()
    >>> titles = [f"{label}" for label in digits.test_labels[:3]]
    >>> figure = image_row(digits.test_images[:3], titles)
    >>> len(figure.axes)
    3
    >>> plt.close(figure)
    """
    shown = images.detach().cpu()
    if shown.ndim == 4 and shown.shape[1] == 1:
        shown = shown.squeeze(1)
    if shown.ndim != 3 or len(shown) == 0:
        raise ValueError(
            f"images: expected shape (n, h, w) or (n, 1, h, w), got {tuple(images.shape)}"
        )
    if titles is not None and len(titles) != len(shown):
        raise ValueError(f"titles: expected {len(shown)}, got {len(titles)}")
    limit = shown.abs().max().item() or 1.0
    low, high, colours = (-limit, limit, "RdBu_r") if signed else (0.0, 1.0, "gray_r")
    height = WIDTH / len(shown) + (0.35 if titles else 0.0)
    figure, row = plt.subplots(1, len(shown), figsize=(WIDTH, height), squeeze=False)
    for index, axes in enumerate(row[0]):
        axes.imshow(shown[index].numpy(), cmap=colours, vmin=low, vmax=high, interpolation="none")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        if titles:
            axes.set_title(titles[index])
    return figure


_SVG = "http://www.w3.org/2000/svg"
_GROUP, _USE, _METADATA = (f"{{{_SVG}}}{name}" for name in ("g", "use", "metadata"))
_HREF = "{http://www.w3.org/1999/xlink}href"
_SEGMENT = re.compile(r"([A-Za-z])([^A-Za-z]*)")
_POINTS = {"M": 1, "L": 1, "Q": 2, "C": 3, "z": 0}
_DECIMAL = re.compile(r"-?\d+\.\d+")
_TRANSLATION = re.compile(r"(?<=translate\()[^)]*(?=\))")


def _rounded(number: float) -> str:
    text = f"{number:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else re.sub(r"^(-?)0\.", r"\1.", text)


def _outline(path: str) -> str:
    """Tell each point of a path from the one before, in hundredths, so that no error adds up.

    A path with other commands than matplotlib's comes back as it is.
    """
    x = y = start_x = start_y = 0
    told = implied = ""
    for letter, rest in _SEGMENT.findall(path):
        numbers = rest.split()
        if len(numbers) != 2 * _POINTS.get(letter, -1):
            return path
        if letter == "z":
            x, y, implied = start_x, start_y, ""
            told += "z"
            continue
        points = [round(100 * float(number)) for number in numbers]
        steps = [value - (y if index % 2 else x) for index, value in enumerate(points)]
        x, y = points[-2:]
        name = after = letter.lower()
        if letter == "M":
            start_x, start_y = x, y
            name, after = ("m", "l") if told else ("M", "")
        elif letter == "L" and 0 in steps:
            name, steps = ("h", steps[:1]) if steps[1] == 0 else ("v", steps[1:])
            after = name
        told += " " if name == implied else name
        told += " ".join(_rounded(step / 100) for step in steps)
        implied = after
    return told.replace(" -", "-")


def compact_svg(svg: str) -> str:
    r"""Write a drawing of matplotlib in half the bytes.

    Positions are rounded to hundredths of a point, and a path tells each point from the one
    before. What draws nothing is left out: metadata, names that nothing refers to, groups without
    a property, properties given twice. A text is one line.

    Parameters
    ----------
    svg : str
        As matplotlib writes it.

    Returns
    -------
    str
        The same drawing; one that is compact already comes back as it is.

    Raises
    ------
    ValueError
        `svg` is not one element of XML.

    Examples
    --------
    >>> from lipbook.lab.plots import compact_svg
    >>> compact_svg('<path d="M 1.234567 20 \nL 0.5 -3.999 \nz" transform="scale(0.015625)"/>')
    '<path d="M1.23 20l-.73-24z" transform="scale(0.015625)"/>'
    """
    builder = ElementTree.TreeBuilder(insert_comments=True)
    try:
        root = ElementTree.fromstring(svg, ElementTree.XMLParser(target=builder))
    except ElementTree.ParseError as error:
        raise ValueError(f"svg: expected one element of XML, {error}: {svg[:80]!r}") from None
    parts = [part for part in root.iter() if isinstance(part.tag, str)]
    named = {part.attrib["id"]: part for part in parts if "id" in part.attrib}
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    for part in parts:
        _shorten(part, used)
    for part in parts:
        target, style = named.get(part.get("href", "#")[1:]), _properties(part)
        if target is not None and style and style <= _properties(target):
            del part.attrib["style"]
    _flatten(root)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _properties(part: ElementTree.Element) -> set[str]:
    return {pair.split(":")[0] for pair in part.get("style", "").split(";") if pair}


def _shorten(part: ElementTree.Element, used: set[str]) -> None:
    """Shorten what is said of one element."""

    def rounded(match: re.Match[str]) -> str:
        return _DECIMAL.sub(lambda number: _rounded(float(number[0])), match[0])

    said = part.attrib
    if said.get("id") not in used:
        said.pop("id", None)
    if _HREF in said:
        said["href"] = said.pop(_HREF)
    if "style" in said:
        said["style"] = re.sub(r"\s*([:;])\s*", r"\1", said["style"]).strip(";")
    if "d" in said:
        said["d"] = _outline(said["d"])
    if "transform" in said:
        said["transform"] = _TRANSLATION.sub(rounded, said["transform"])
    for name in {"x", "y", "points"} & said.keys():
        said[name] = re.sub(".+", rounded, said[name])
    along = re.fullmatch(r"translate\((\S+) 0\)", said.get("transform", ""))
    if along and part.tag == _USE:
        del said["transform"]
        said["x"] = along[1]


def _flatten(part: ElementTree.Element) -> None:
    """Take out of `part` what draws nothing; what is left begins a line each, except in a text."""
    children: list[ElementTree.Element] = []
    for child in part:
        _flatten(child)
        if child.tag == _GROUP and not child.attrib:
            children += child
        elif child.tag != _METADATA:
            children.append(child)
    part[:] = children
    markers = [child for child in part if child.tag == _USE and "style" in child.attrib]
    if part.tag == _GROUP and "style" not in part.attrib and len(markers) == len(part) > 1:
        style, *others = {marker.attrib["style"] for marker in markers}
        if not others:
            part.attrib["style"] = style
            for marker in markers:
                del marker.attrib["style"]
    if len(part) > 0:
        end = "" if "scale(" in part.get("transform", "") else "\n"  # letters come scaled
        part.text = end
        for child in part:
            child.tail = end


class Slider:
    r"""Figures that a reader goes through with a slider, in a notebook and on a static page.

    The frames are drawn beforehand and kept in the page, so that no kernel and no network are
    needed. The figures are closed.

    Parameters
    ----------
    frames : sequence of matplotlib.figure.Figure
        At least two, of the same size. Each becomes an SVG image of a few kilobytes if it has
        little text: text is drawn as outlines.
    label : str
        Says what the slider changes.
    values : sequence of str
        One for each frame, shown beside the label.
    alt : str
        Describes the frames to those who do not see them.

    Raises
    ------
    ValueError
        Fewer than two frames, another number of values, or no description.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from lipbook.lab.plots import Slider
    >>> frames = []
    >>> for slope in (0, 1, 2):
    ...     figure, axes = plt.subplots()
    ...     _ = axes.plot([0, 1], [0, slope])
    ...     frames.append(figure)
    >>> slider = Slider(frames, "slope", ["0", "1", "2"], "A line through the origin.")
    >>> slider
    Slider: slope 0, 1, 2
    >>> page = slider._repr_html_()
    >>> page.count("<img"), page.count("<img hidden")
    (3, 2)
    """

    def __init__(
        self, frames: Sequence[Figure], label: str, values: Sequence[str], alt: str
    ) -> None:
        if len(frames) < 2:
            raise ValueError(f"frames: expected at least 2 figures, got {len(frames)}")
        if len(values) != len(frames):
            raise ValueError(
                f"values: expected {len(frames)}, one for each frame, got {len(values)}"
            )
        if not alt.strip():
            raise ValueError("alt: expected a description of the frames, got nothing")
        self._label, self._values, self._alt = label, list(values), alt
        self._images = []
        for figure in frames:
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            drawing = compact_svg(svg.getvalue().decode())
            self._images.append(base64.b64encode(drawing.encode()).decode())

    def __repr__(self) -> str:
        return f"Slider: {self._label} {', '.join(self._values)}"

    def _repr_html_(self) -> str:
        alt, label = html.escape(self._alt), html.escape(self._label)
        images = "\n".join(
            f'<img{" hidden" * (index > 0)} alt="{alt} {label} {html.escape(value)}" '
            f'data-value="{html.escape(value)}" src="data:image/svg+xml;base64,{image}"/>'
            for index, (value, image) in enumerate(zip(self._values, self._images, strict=True))
        )
        show = (
            "const figure = this.closest('figure'), frames = figure.querySelectorAll('img');"
            "frames.forEach((frame, index) => { frame.hidden = index != this.value; });"
            "const value = frames[this.value].dataset.value;"
            "figure.querySelector('output').value = value;"
            "this.setAttribute('aria-valuetext', value)"
        )
        first = html.escape(self._values[0])
        return (
            f'<figure class="lip-slider">\n{images}\n<label>{label} '
            f'<input type="range" min="0" max="{len(self._images) - 1}" value="0" '
            f'autocomplete="off" aria-valuetext="{first}" oninput="{show}"/> '
            f"<output>{first}</output></label>\n</figure>"
        )


class Table:
    r"""Rows of numbers and words, as a table of the page in a notebook and as lines in a terminal.

    Parameters
    ----------
    header : sequence
        What stands above the columns.
    rows : iterable of sequence
        Cells of any kind, as ``str`` writes them: format numbers before.

    Raises
    ------
    ValueError
        A row has another length than the header.

    Examples
    --------
    >>> from lipbook.lab.plots import Table
    >>> table = Table(["width", "norm"], [[16, f"{2.345:.2f}"], [128, "–"]])
    >>> table
    width  norm
    16     2.35
    128    –
    >>> table._repr_html_().count("<td>")
    4
    """

    def __init__(self, header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
        self._header = [f"{cell}" for cell in header]
        self._rows = [[f"{cell}" for cell in row] for row in rows]
        for row in self._rows:
            if len(row) != len(self._header):
                raise ValueError(
                    f"rows: expected {len(self._header)} cells each, one under each of "
                    f"{self._header}, got {row}"
                )

    def __repr__(self) -> str:
        lines = [self._header, *self._rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        head, *body = [
            f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)}</tr>"
            for tag, lines in (("th", [self._header]), ("td", self._rows))
            for line in lines
        ]
        inside = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody>"
        return f'<table class="dataframe">{inside}</table>'
