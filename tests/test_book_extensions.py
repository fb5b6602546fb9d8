"""The pieces of Sphinx configuration that are code: what they decide, without a build."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="no Sphinx: pip install -e .[book]")
from docutils import nodes

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


PREDICTION = """\
# Page

:::{predict} How steep?
Where is $x^2$ steepest?

- [ ] At *one*.

  The slope is 2.
- [x] At two.

  The slope is 4.
:::
"""


def built(source: str, folder: Path) -> tuple[str, str]:
    from sphinx.application import Sphinx  # noqa: PLC0415

    (folder / "index.md").write_text(source)
    settings = {
        "extensions": ["myst_parser", "predictions"],
        "myst_enable_extensions": ["colon_fence", "dollarmath", "tasklist"],
    }
    warnings = io.StringIO()
    app = Sphinx(folder, None, folder / "out", folder / "tree", "html", settings, None, warnings)
    app.build()
    return (folder / "out" / "index.html").read_text(), warnings.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_a_prediction_answers_without_a_script(tmp_path: Path, extension: Any) -> None:
    extension("predictions")
    page, warnings = built(PREDICTION, tmp_path)
    assert not warnings
    box = page[page.index("predict admonition") : page.index("</details>\n</div>")]
    assert "How steep?" in box
    assert box.count("<details") == 2
    wrong, right = (part.split("</details>")[0] for part in box.split("<details")[1:])
    assert 'class="choice wrong"' in wrong
    assert "<summary>At <em>one</em>.</summary>" in wrong
    assert "<strong>Not so.</strong> The slope is 2." in wrong
    assert 'class="choice right"' in right
    assert "<strong>Right.</strong> The slope is 4." in right
    assert "checkbox" not in box


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[x]", "[ ]", "one choice has to be ticked"),
        ("[ ]", "[x]", "one choice has to be ticked"),
        ("- [ ] At", "- At", "one choice has to be ticked"),
        ("\n  The slope is 4.\n", "", "each choice needs a reason"),
        (":::\n", "\nWhere?\n:::\n", "has to come last"),
    ],
)  # fmt: skip
def test_a_prediction_without_choices_is_refused(
    old: str, new: str, message: str, tmp_path: Path, extension: Any
) -> None:
    extension("predictions")
    assert old in PREDICTION
    _, warnings = built(new.join(PREDICTION.rsplit(old, 1)), tmp_path)
    assert message in warnings
