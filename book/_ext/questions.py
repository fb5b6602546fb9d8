"""The directives ``predict`` and ``recap``: questions whose choices answer when they are opened.

A task list ends a question. Of its items one is ticked, and each has a paragraph that says why::

    :::{predict} How steep?
    Is the graph of $x^2$ steeper at 1 or at 2?

    - [ ] At 1.

      The slope is $2x$.
    - [x] At 2.

      The slope there is 4.
    :::

``predict`` asks one question before an experiment, ``recap`` some after a section, one below the
other. Each choice becomes a ``details`` element, which browsers fold and unfold by mouse and
keyboard without a script. In plain Jupyter a question reads as a task list with its reasons.
"""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

VERDICTS = {True: "Right.", False: "Not so."}
LINKS = (addnodes.pending_xref, nodes.reference)


class choice(nodes.General, nodes.Element):  # noqa: N801 - docutils names nodes like this
    """A choice that unfolds."""


class choice_text(nodes.General, nodes.TextElement):  # noqa: N801
    """What is seen of it while it is folded."""


class Questions(SphinxDirective):
    """Questions with choices, in a box."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True
    default: str

    def run(self) -> list[nodes.Node]:
        title = self.arguments[0] if self.arguments else self.default
        inline, _ = self.state.inline_text(title, self.lineno)
        box = nodes.admonition("", nodes.title(title, "", *inline), classes=[self.name])
        self.set_source_info(box)
        self.state.nested_parse(self.content, self.content_offset, box)
        if not isinstance(box[-1], nodes.bullet_list):
            raise self.error(f"{self.name}: a task list of choices has to come last")
        for listed in [child for child in box if isinstance(child, nodes.bullet_list)]:
            box.replace(listed, self.choices(listed))
        return [box]

    def choices(self, listed: nodes.bullet_list) -> list[nodes.Node]:
        """The items of a task list, each folded to its first line."""
        right = [ticked(item) for item in listed]
        if right.count(True) != 1 or None in right:
            raise self.error(f"{self.name}: one choice has to be ticked [x], the others not [ ]")
        found: list[nodes.Node] = []
        for item, is_right in zip(listed, right, strict=True):
            text, *reason = item.children
            if not reason:
                raise self.error(
                    f"{self.name}: each choice needs a reason, in a paragraph below it"
                )
            reason[0].insert(0, [nodes.strong("", VERDICTS[bool(is_right)]), nodes.Text(" ")])
            if any(text.findall(lambda node: isinstance(node, LINKS))):
                raise self.error(f"{self.name}: a choice is a button and can hold no link")
            if isinstance(text[1], nodes.Text):
                text[1] = nodes.Text(text[1].lstrip())
            seen = choice_text("", "", *text.children[1:])
            verdict = "right" if is_right else "wrong"
            found.append(choice("", seen, *reason, classes=["choice", verdict]))
        return found


class Predict(Questions):
    """One question before an experiment."""

    default = "Predict before you run"


class Recap(Questions):
    """Questions after a section."""

    default = "Recap"


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
    app.add_directive("recap", Recap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
