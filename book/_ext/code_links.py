"""Link the chapters' code to the API pages, and the API entries back to the chapters.

sphinx-codeautolink does both. Five things are changed: its analyser takes a section to have a
title and a title to be a section's, which theorems and admonitions break; it looks a class up
under the module that defines it, where other libraries document it under a public name; it
links every variable to the class of its value, which hides the calls in a thicket of links;
its back-references count the examples in the docstrings themselves, which say nothing new on
the same page; and they come as a table, where one line is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sphinx_codeautolink.extension
import sphinx_codeautolink.extension.block
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import import_object
from sphinx_codeautolink.extension.backref import CodeRefsVisitor
from sphinx_codeautolink.extension.block import CodeBlockAnalyser
from sphinx_codeautolink.extension.directive import DeferredExamples
from sphinx_codeautolink.parse import Name, NameBreak, parse_names


def has_title(node: nodes.Node) -> bool:
    return isinstance(node, nodes.section) and any(
        isinstance(child, nodes.title) for child in node.children
    )


def repair(analyser: type[CodeBlockAnalyser]) -> None:
    """Let only sections with a title count as sections, and only their titles as titles."""
    enter, heading, leave = analyser.visit_section, analyser.visit_title, analyser.depart_section

    def visit_section(self: CodeBlockAnalyser, node: nodes.section) -> None:
        if has_title(node):
            enter(self, node)

    def visit_title(self: CodeBlockAnalyser, node: nodes.title) -> None:
        if isinstance(node.parent, nodes.section):
            heading(self, node)

    def depart_section(self: CodeBlockAnalyser, node: nodes.section) -> None:
        if has_title(node):
            leave(self, node)

    analyser.visit_section = visit_section
    analyser.visit_title = visit_title
    analyser.depart_section = depart_section


def direct_names(source: str, node: nodes.Node) -> list[Name]:
    """Names in `source` that are imported; not what was computed with them."""
    computed = {NameBreak.call, NameBreak.for_iter}
    return [
        name
        for name in parse_names(source, node)
        if not computed.intersection(name.import_components)
    ]


def public_names(app: Sphinx, config: Config) -> None:
    """Map each class of the inventories from where it is defined to its documented name.

    A name that the installed version does not have raises an error here.
    """
    for inventory in (Path(app.srcdir) / "book" / "inventories").glob("*.txt"):
        for line in inventory.read_text(encoding="utf-8").splitlines():
            name, kind, _ = line.split(maxsplit=2)
            if "." not in name:  # the header, and Python's built-in names
                continue
            target = import_object(name, source=inventory.name)
            if kind == "class":
                defined = f"{target.__module__}.{target.__qualname__}"
                config.codeautolink_inventory_map[defined] = name


class ChapterReferences(CodeRefsVisitor):
    """Replace the placeholder in an API entry by links to the chapters that use the object."""

    def unknown_visit(self, node: nodes.Node) -> None:
        if not isinstance(node, DeferredExamples):
            return
        uses = {
            (example.document, example.ref_id or "", tuple(example.headings))
            for example in self.code_refs.get(node.ref, [])
            if not example.document.startswith("book/api/")
        }
        placeholder = node.parent
        if not uses:
            placeholder.parent.remove(placeholder)
            return
        line = nodes.paragraph(classes=["used-in"])
        line += nodes.strong(text="In the book: ")
        for i, (document, section, headings) in enumerate(sorted(uses)):
            address = self.builder.get_relative_uri(self.docname, document)
            address += f"#{section}" if section else ""
            line += nodes.Text(", " if i else "")
            line += nodes.reference(internal=True, refuri=address, text=" › ".join(headings))
        placeholder.replace_self(line)


def ask_for_references(app: Sphinx, what: str, name: str, *rest: Any) -> None:
    lines = rest[-1]
    if what != "module":
        lines += ["", f".. autolink-examples:: {name}", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    repair(CodeBlockAnalyser)
    sphinx_codeautolink.extension.block.parse_names = direct_names
    sphinx_codeautolink.extension.CodeRefsVisitor = ChapterReferences
    app.setup_extension("sphinx_codeautolink")
    app.connect("config-inited", public_names)
    app.connect("autodoc-process-docstring", ask_for_references, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
