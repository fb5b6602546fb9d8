"""Repair what the extensions write: boxes of proofs, ids, numbers, and formulas beside punctuation.

- A proof with ``:class: dropdown`` has no title, so there is nothing to click. It gets one.
  And every proof gets the class ``argument``, to tell it from the theorem in the style sheet.
- Every theorem's body has the id ``proof-content``, and every block of reStructuredText in a
  page counts its ids from one again. An id may occur once in a page: only the first stays.
- Figures are numbered by chapter. Outside the chapters they would be "Fig. 1" and "Fig. 2" of the
  whole book, so there they go without.
- In the notebook an exercise's empty cell says "No answer yet". A page cannot be answered, and
  does not say so.
- A browser may break the line between a formula and the comma behind it. The two are tied.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx_proof.nodes import proof_node

LEAD = "Proof. "
UNANSWERED = "No answer yet: replace the dots."  # of lipbook.lab.exercises
OPENING = re.compile(r"[(\[“‘]+$")
CLOSING = re.compile(r"[.,;:!?)\]”’]+|-\w+[.,;:!?)]*")


def dress_proofs(app: Sphinx, doctree: nodes.document) -> None:
    for proof in doctree.findall(proof_node):
        box = proof.children[0]
        box["classes"].append("argument")
        box["ids"] = []  # every proof is called "proof"
        if "dropdown" not in box["classes"]:
            continue
        first = next(iter(box.findall(nodes.Text)), None)
        if first is not None and first.startswith(LEAD):
            first.parent.replace(first, nodes.Text(first.removeprefix(LEAD)))
        box.insert(0, nodes.title(text="Proof"))


def drop_unanswered(app: Sphinx, doctree: nodes.document) -> None:
    for box in list(doctree.findall(nodes.container)):
        if box.get("nb_element") == "cell_code_output" and box.astext() == UNANSWERED:
            box.parent.remove(box)


def drop_repeated_ids(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    seen: set[str] = set()
    for node in doctree.findall(nodes.Element):
        node["ids"] = [name for name in node.get("ids", []) if name not in seen]
        seen.update(node["ids"])


def drop_stray_numbers(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """After Sphinx has numbered the figures; no page has to be read again for it."""
    for docname, figures in env.toc_fignumbers.items():
        if not env.toc_secnumbers.get(docname):
            figures.pop("figure", None)
    return []


def tie_punctuation(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for formula in list(doctree.findall(nodes.math)):
        parent = formula.parent
        place = parent.index(formula)
        tied: list[nodes.Node] = [formula]
        if place > 0 and isinstance(parent[place - 1], nodes.Text):
            before = parent[place - 1]
            if opening := OPENING.search(before):
                parent[place - 1] = nodes.Text(before[: opening.start()])
                tied.insert(0, nodes.Text(opening.group()))
        if place + 1 < len(parent) and isinstance(parent[place + 1], nodes.Text):
            after = parent[place + 1]
            if closing := CLOSING.match(after):
                parent[place + 1] = nodes.Text(after[closing.end() :])
                tied.append(nodes.Text(closing.group()))
        if len(tied) > 1:
            parent[place] = nodes.inline("", "", *tied, classes=["nowrap"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", dress_proofs)
    app.connect("doctree-read", drop_unanswered)
    app.connect("env-get-updated", drop_stray_numbers, priority=900)
    app.connect("doctree-resolved", drop_repeated_ids)
    app.connect("doctree-resolved", tie_punctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
