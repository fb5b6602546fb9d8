"""The pieces of Sphinx configuration that are code: what they decide, without a build."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="no Sphinx: pip install -e .[book]")
from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def checkout(folder: Path, remote: str | None) -> str:
    subprocess.run(["git", "init", "-q", "-b", "trunk", str(folder)], check=True)
    if remote is not None:
        subprocess.run(["git", "-C", str(folder), "remote", "add", "origin", remote], check=True)
    return str(folder)


@pytest.mark.parametrize(
    "remote",
    [
        "git@github.com:someone/lipbook.git",
        "ssh://git@github.com/someone/lipbook.git",
        "https://github.com/someone/lipbook",
        "https://github.com/someone/lipbook.git/",
        "https://user:secret@github.com/someone/lipbook.git",
    ],
)
def test_repository_is_read_from_the_remote(remote: str, tmp_path: Path, extension: Any) -> None:
    found = extension("address").repository({}, checkout(tmp_path, remote))
    assert found == ("https://github.com/someone/lipbook", "github", "trunk")


@pytest.mark.parametrize(
    "remote",
    [
        None,
        "/srv/git/lipbook.git",
        "file:///srv/git/lipbook.git",
        "https://git.example.org/someone/lipbook.git",
        "https://github.com.example.org/someone/lipbook.git",
        "http://localhost:3000/someone/lipbook",
        "https://github.com/lipbook",
    ],
)
def test_an_address_is_not_guessed(remote: str | None, tmp_path: Path, extension: Any) -> None:
    assert extension("address").repository({}, checkout(tmp_path, remote)) is None


def test_no_repository_without_git(tmp_path: Path, extension: Any) -> None:
    assert extension("address").repository({"GITHUB_SERVER_URL": "x"}, str(tmp_path)) is None


@pytest.mark.parametrize(
    ("reference", "branch"),
    [
        ("refs/heads/feature/x", "feature/x"),
        ("refs/tags/v0.1.0", "v0.1.0"),
        ("refs/pull/3/merge", "main"),
    ],
)
def test_repository_of_a_job(reference: str, branch: str, tmp_path: Path, extension: Any) -> None:
    environment = {
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "someone/lipbook",
        "GITHUB_REF": reference,
    }
    found = extension("address").repository(environment, str(tmp_path))
    assert found == ("https://github.com/someone/lipbook", "github", branch)


@pytest.mark.parametrize("library", ["numpy", "python", "scipy", "torch"])
def test_inventories_are_sorted_and_name_what_exists(library: str) -> None:
    text = (ROOT / "book/inventories" / f"{library}.txt").read_text("utf-8")
    header, entries = text.splitlines()[:3], text.splitlines()[3:]
    assert header[0] == "# Sphinx inventory version 1"
    assert entries == sorted(entries)
    assert len({entry.split()[0] for entry in entries}) == len(entries)
    for entry in entries:
        name, kind, _ = entry.split()
        module, _, attribute = name.rpartition(".")
        target = getattr(importlib.import_module(module or "builtins"), attribute)
        assert isinstance(target, type) == (kind in ("class", "exception")), name


def test_figures_to_touch(tmp_path: Path, extension: Any) -> None:
    """The directive wraps the still; its page, and no other, loads the script; faults are told."""
    extension("figures")
    source, still = tmp_path / "source", "assets/figures/ellipse.svg"
    (source / still).parent.mkdir(parents=True)
    (source / still).write_bytes((ROOT / "book" / still).read_bytes())
    (source / "plain.md").write_text("---\norphan: true\n---\n\n# No figure\n")
    settings = {"extensions": ["myst_parser", "figures"], "myst_enable_extensions": ["colon_fence"]}

    def build(name: str, alt: str) -> str:
        figure = f":::{{touch}} {name}\n![{alt}]({still})\n\nThe *caption*.\n:::\n"
        (source / "index.md").write_text(f"# Title\n\n{figure}")
        log, folders = tmp_path / "log", (source, None, tmp_path / "html", tmp_path / "trees")
        with log.open("w") as warnings:
            Sphinx(*folders, "html", settings, None, warnings, freshenv=True).build()
        return log.read_text()

    assert build("ellipse", "A disc") == ""
    text = (tmp_path / "html/index.html").read_text("utf-8")
    assert text.count('<figure class="lip-touch touch-ellipse') == 1
    assert text.count(' id="fig-touch-ellipse">') == 1
    assert text.count('<img alt="A disc" src="_images/ellipse.svg"') == 1
    assert 0 < text.index('src="_static/figures/touch.js') < text.index("figures/ellipse.js")
    assert "figures/" not in (tmp_path / "html/plain.html").read_text("utf-8")
    assert "no figure 'elipse'" in build("elipse", "A disc")
    assert "no figure 'touch'" in build("touch", "A disc")
    assert "figure 'ellipse' has no alternative text" in build("ellipse", "")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("in ", ", so", "in |<x,>| so"),
        ("in (", ") we", "in |<(x)>| we"),
        ("", "-Lipschitz. And", "<x-Lipschitz.>| And"),
        ("in ", " we", "in |x| we"),
    ],
)
def test_punctuation_stays_with_its_formula(
    before: str, after: str, expected: str, extension: Any
) -> None:
    paragraph = nodes.paragraph("", "", nodes.Text(before), nodes.math("", "x"), nodes.Text(after))
    document = nodes.document(None, None)
    document.append(paragraph)
    extension("boxes").tie_punctuation(None, document, "page")
    tied = {id(part) for part in paragraph.findall(nodes.inline) if "nowrap" in part["classes"]}
    words = [part.astext() for part in paragraph.children]
    parts = [
        f"<{word}>" if id(part) in tied else word
        for part, word in zip(paragraph.children, words, strict=True)
    ]
    assert "|".join(part for part in parts if part) == expected
