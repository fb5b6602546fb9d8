"""The package's links: its addresses are written into it by the build that knows them.

A wheel names its repository, its issues and the published book, and its README's links lead
there, under the same rule as the book's own buttons (``book/_ext/address.py``): the repository
from the environment of a CI job or git's remote ``origin``, the book from ``LIPBOOK_URL``.
A build that knows neither writes no link, and nothing is guessed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](path), where the path is neither an address nor a place on the page.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?=[^)\s]+\))")


def address() -> ModuleType:
    """Load the extension of the book that finds the addresses; it does without Sphinx here."""
    path = Path(__file__).parent / "book" / "_ext" / "address.py"
    specification = importlib.util.spec_from_file_location("address", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def links(environment: dict[str, str], folder: str) -> tuple[dict[str, str], str]:
    """Name the package's links, and the folder where its README's paths start, "" if unknown."""
    where = address()
    urls = {}
    if book := where.published(environment):
        urls["Documentation"] = book
    base = ""
    if (known := where.repository(environment, folder)) is not None:
        middle = "" if known.provider == "github" else "/-"
        base = f"{known.url}{middle}/blob/{known.branch}/"
        urls["Source"] = known.url
        urls["Issues"] = f"{known.url}{middle}/issues"
        urls["Changelog"] = f"{base}CHANGELOG.md"
    return urls, base


class Links(MetadataHookInterface):
    """Fills in ``urls`` and ``readme``, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the links and the text into the package's metadata."""
        urls, base = links(dict(os.environ), self.root)
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": LINK.sub(base, text)}
        if urls:
            metadata["urls"] = urls
