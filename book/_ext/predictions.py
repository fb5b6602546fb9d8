"""The directive ``predict``: a question whose choices answer when they are opened.

A task list ends the question. Of its items one is ticked, and each has a paragraph that says why::

    :::{predict} How steep?
    Is the graph of $x^2$ steeper at 1 or at 2?

    - [ ] At 1.

      The slope is $2x$.
    - [x] At 2.

      The slope there is 4.
    :::

Each choice becomes a ``details`` element, which browsers fold and unfold by mouse and keyboard
without a script. In plain Jupyter the question reads as a task list with its reasons.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

TITLE = "Predict before you run"
VERDICTS = {True: "Right.", False: "Not so."}


class choice(nodes.General, nodes.Element):  # noqa: N801 - docutils names nodes like this
    """A choice that unfolds."""


class choice_text(nodes.General, nodes.TextElement):  # noqa: N801
    """What is seen of it while it is folded."""


class Predict(SphinxDirective):
    """A question with choices."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        title = self.arguments[0] if self.arguments else TITLE
        inline, _ = self.state.inline_text(title, self.lineno)
        box = nodes.admonition("", nodes.title(title, "", *inline), classes=["predict"])
        self.set_source_info(box)
        self.state.nested_parse(self.content, self.content_offset, box)
        listed = box[-1]
        if not isinstance(listed, nodes.bullet_list):
            raise self.error("predict: a task list of choices has to come last")
        right = [ticked(item) for item in listed]
        if right.count(True) != 1 or None in right:
            raise self.error("predict: one choice has to be ticked [x], the others not [ ]")
        box.remove(listed)
        for item, is_right in zip(listed, right, strict=True):
            text, *reason = item.children
            if not reason:
                raise self.error("predict: each choice needs a reason, in a paragraph below it")
            reason[0].insert(0, [nodes.strong("", VERDICTS[bool(is_right)]), nodes.Text(" ")])
            if isinstance(text[1], nodes.Text):
                text[1] = nodes.Text(text[1].lstrip())
            seen = choice_text("", "", *text.children[1:])
            box += choice("", seen, *reason, classes=["choice", "right" if is_right else "wrong"])
        return [box]


def ticked(item: nodes.Element) -> bool | None:
    """Whether an item of a task list is ticked; None if it has no box."""
    box = item[0][0] if item.children and item[0].children else None
    if not isinstance(box, nodes.raw) or "checkbox" not in box.astext():
        return None
    return "checked=" in box.astext()


def open_choice(self: HTML5Translator, node: choice) -> None:
    self.body.append(self.starttag(node, "details"))


def close_choice(self: HTML5Translator, node: choice) -> None:
    self.body.append("</details>\n")


def open_text(self: HTML5Translator, node: choice_text) -> None:
    self.body.append(self.starttag(node, "summary", ""))


def close_text(self: HTML5Translator, node: choice_text) -> None:
    self.body.append("</summary>\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(choice, html=(open_choice, close_choice))
    app.add_node(choice_text, html=(open_text, close_text))
    app.add_directive("predict", Predict)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
