"""The directive ``touch``: a figure that the reader can change.

    :::{touch} ellipse
    ![What the figure shows at the start](assets/figures/ellipse.svg)

    The caption.
    :::

The image stands on paper, in the notebook and where no script runs; in the page
``book/assets/figures/ellipse.js`` puts planes and controls in its place. A page loads the scripts
of its own figures only. The figure can be referred to as ``fig-touch-ellipse``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.sphinx_ext.directives import FigureMarkdown
from sphinx.application import Sphinx

SCRIPTS = Path(__file__).resolve().parents[1] / "assets" / "figures"


class Touch(FigureMarkdown):
    """A figure of Markdown whose argument names its script."""

    required_arguments = 1
    optional_arguments = 0

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name == "touch" or not (SCRIPTS / f"{name}.js").is_file():
            return [
                self.figure_error(f"no figure {name!r}: book/assets/figures/{name}.js is missing")
            ]
        self.arguments[0] = f"fig-touch-{name}"  # becomes the name to refer to
        self.options["class"] = ["lip-touch", f"touch-{name}"]
        figures = super().run()
        for image in (image for node in figures for image in node.findall(nodes.image)):
            if not image.get("alt", "").strip():
                return [self.figure_error(f"figure {name!r} has no alternative text")]
        return figures


def figures(doctree: nodes.document) -> list[str]:
    """Names of the figures in a page, in its order."""
    return [
        kind.removeprefix("touch-")
        for figure in doctree.findall(nodes.figure)
        for kind in figure["classes"]
        if kind.startswith("touch-")
    ]


def add_scripts(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    names = figures(doctree) if doctree is not None else []
    for name in dict.fromkeys(["touch", *names] if names else []):
        app.add_js_file(f"figures/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("touch", Touch)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
