"""The chapters are in their normal form, and the tool that says so misses nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import lipbook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))

specification = importlib.util.spec_from_file_location("notebooks", ROOT / "tools/notebooks.py")
assert specification is not None
assert specification.loader is not None
notebooks = importlib.util.module_from_spec(specification)
sys.modules["notebooks"] = notebooks
specification.loader.exec_module(notebooks)

ANSI = re.compile(r"\x1b\[[0-9;]*m")
SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><path d="M 1.25 2 L 3 4"/></svg>
"""


def run(
    *arguments: str | Path, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ----------------------------------------------------------------------------- the book's chapters


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_in_normal_form(path: Path) -> None:
    found = [f"{path.name}:{cell}: {message}" for cell, message in notebooks.problems(path)]
    assert not found, "\n  ".join(["", *found])


def numbered_chapters() -> list[Path]:
    table = (ROOT / "_toc.yml").read_text("utf-8")
    parts = [part for part in table.split("- caption:") if "numbered: true" in part]
    return [ROOT / f"{name}.ipynb" for part in parts for name in re.findall(r"file: (\S+)", part)]


def markdown(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", numbered_chapters(), ids=lambda path: path.stem)
def test_chapter_has_the_shape_of_all_chapters(path: Path) -> None:
    text = markdown(path)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    fixed = [
        "From scratch",
        "With the library",
        "An experiment",
        "What goes wrong",
        "Exercises",
        "Summary",
        "Further reading",
    ]
    assert headings[-len(fixed) :] == fixed
    assert len(headings) > len(fixed), "no section of theory"
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    assert re.match(rf"\(ch-{path.stem}\)=\n# ", text), "the first line is not the chapter's label"
    assert "You will learn" in text
    assert "You need" in text


@pytest.mark.parametrize("path", numbered_chapters(), ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path: Path) -> None:
    text = markdown(path)
    exercises = re.findall(r"^:{3,}\{exercise\}.*\n:label: (\S+)", text, re.MULTILINE)
    solutions = re.findall(r"^:{3,}\{solution(?:-start)?\} (\S+)", text, re.MULTILINE)
    assert 8 <= len(exercises) <= 14
    assert solutions == exercises
    last = text.partition("## Summary")[2].partition("## Further reading")
    assert all(
        "{prf:ref}" in point for point in re.findall(r"^- .+(?:\n  .+)*", last[0], re.MULTILINE)
    )
    assert "{cite:t}" in last[2]


def test_no_chapter_installs_a_name_that_is_not_ours(tmp_path: Path) -> None:
    """Who registers a free name at an index is executed by those who install it."""
    for path in CHAPTERS:
        (first,) = [c for c in nbformat.read(path, as_version=4).cells if c.get("id") == "colab"]
        assert "lipbook[lab]==" not in first.source
    assert "subprocess" not in notebooks.colab_cell("").source
    installs = notebooks.colab_cell("https://example.org/someone/lipbook").source
    version = lipbook.__version__
    assert f"lipbook[lab] @ git+https://example.org/someone/lipbook@v{version}" in installs

    missing = notebooks.colab_cell("").source.replace('"lipbook"', '"lipbook_is_not_here"')
    (tmp_path / "cell.py").write_text(missing)
    done = run(tmp_path / "cell.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ModuleNotFoundError: lipbook is missing" in done.stderr


# --------------------------------------------------------------------------------- the normal form


def good() -> NotebookNode:
    """A small notebook with nothing wrong."""
    figure = {
        "figure": {"name": "fig-disc", "caption": "A disc."},
        "image": {"alt": "A circle around the origin."},
    }
    cells = [
        new_markdown_cell("# Title", id="title"),
        notebooks.colab_cell(),
        new_code_cell(
            "print(1.25)",
            id="number",
            execution_count=2,
            outputs=[new_output("stream", name="stdout", text="1.25\n")],
        ),
        new_code_cell(
            "draw()",
            id="figure",
            execution_count=3,
            metadata={"mystnb": figure},
            outputs=[new_output("display_data", {"image/svg+xml": SVG, "text/plain": "<Figure>"})],
        ),
    ]
    cells[1].execution_count = 1
    metadata = nbformat.from_dict(notebooks.NOTEBOOK_METADATA)
    return new_notebook(cells=cells, metadata=metadata)


def complaints(notebook: NotebookNode, folder: Path) -> list[tuple[str, str]]:
    path = folder / "chapter.ipynb"
    path.write_text(notebooks.serialise(notebook), encoding="utf-8")
    return list(notebooks.problems(path))


def test_a_good_notebook_passes(tmp_path: Path) -> None:
    assert complaints(good(), tmp_path) == []


def change(cell: int, **values: Any) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[cell].update(nbformat.from_dict(values))


def outputs(*values: NotebookNode) -> Callable[[NotebookNode], None]:
    return change(2, outputs=list(values))


def stdout(text: str) -> NotebookNode:
    return new_output("stream", name="stdout", text=text)


def option(key: str, name: str, value: str | None) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[3].metadata.mystnb[key].update({name: value})


FAULTS: dict[str, tuple[Callable[[NotebookNode], Any], str, str]] = {
    "notebook metadata": (
        lambda notebook: notebook.metadata.update(widgets={}),
        "-",
        "notebook metadata",
    ),
    "another kernel": (
        lambda notebook: notebook.metadata.kernelspec.update(name="conda-env"),
        "-",
        "notebook metadata",
    ),
    "cell metadata": (change(2, metadata={"collapsed": True}), "number", "metadata collapsed"),
    "output metadata": (
        lambda notebook: notebook.cells[3].outputs[0].metadata.update(isolated=True),
        "figure",
        "output metadata isolated",
    ),
    "id twice": (change(3, id="number"), "number", "more than one cell"),
    "count missing": (
        change(2, execution_count=None),
        "number",
        "execution count None, expected 2",
    ),
    "count skipped": (change(3, execution_count=4), "figure", "execution count 4, expected 3"),
    "error": (outputs(new_output("error", ename="ValueError", evalue="x")), "number", "ValueError"),
    "stderr": (outputs(new_output("stream", name="stderr", text="Warning")), "number", "stderr"),
    "semicolon": (change(2, source="x = 1\nx;\n"), "number", "ends in `;`"),
    "semicolon, comment": (change(2, source="x;  # hidden"), "number", "ends in `;`"),
    "empty code": (change(2, source=" \n"), "number", "empty code cell"),
    "raw cell": (change(0, cell_type="raw"), "title", "raw cell"),
    "no alt text": (option("image", "alt", None), "figure", "mystnb.image.alt"),
    "a file as alt text": (option("image", "alt", "figure.svg"), "figure", "mystnb.image.alt"),
    "no caption": (option("figure", "caption", " "), "figure", "mystnb.figure.caption"),
    "no figure name": (option("figure", "name", ""), "figure", "mystnb.figure.name"),
    "no Colab cell": (lambda notebook: notebook.cells.pop(1), "-", "not the Colab cell"),
    "old Colab cell": (change(1, source="pip install lipbook==0.0.0"), "-", "not the Colab cell"),
    "Colab cell shown": (change(1, metadata={}), "-", "not the Colab cell"),
    "Colab cell that speaks": (change(1, outputs=[stdout("ok")]), "-", "not the Colab cell"),
    "too large": (outputs(stdout("1" * 420_000)), "-", "more than the 420 kB"),
    "path": (outputs(stdout("saved to /srv/data/x.npz\n")), "number", "path /srv/data/x.npz"),
    "Windows path": (outputs(stdout(r"C:\Users\x")), "number", "absolute path"),
    "path in HTML": (
        outputs(new_output("display_data", {"text/html": '<img src="/srv/data/a.png">'})),
        "number",
        "path /srv/data/a.png",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str, tmp_path: Path) -> None:
    plant, cell, message = FAULTS[fault]
    notebook = good()
    plant(notebook)
    found = complaints(notebook, tmp_path)
    assert any(where == cell and message in what for where, what in found), found


def raw_fault(change_text: Callable[[str], str], tmp_path: Path) -> list[tuple[str, str]]:
    path = tmp_path / "chapter.ipynb"
    path.write_bytes(change_text(notebooks.serialise(good())).encode())
    return list(notebooks.problems(path))


@pytest.mark.parametrize(
    ("change_text", "message"),
    [
        (lambda text: text.rstrip("\n"), "not written as"),
        (lambda text: text + "\n", "not written as"),
        (lambda text: json.dumps(json.loads(text)), "not written as"),
        (lambda text: text.replace('"id": "number",', ""), "no id"),
        (lambda text: text.replace('"id": "number"', '"id": ""'), "no id"),
        (lambda text: text.replace('"id": "number"', '"id": "a b"'), "no id"),
        (lambda text: text.replace('"nbformat_minor": 5', '"nbformat_minor": 4'), "4.4"),
        (lambda text: text.replace('"source": [', '"sauce": ['), "not a valid notebook"),
        (lambda text: text[:-20], "not a notebook"),
        (lambda text: "[]", "not a notebook"),
    ],
)
def test_each_fault_of_the_text_is_found(
    change_text: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    assert any(message in what for _, what in raw_fault(change_text, tmp_path))


@pytest.mark.parametrize(
    "harmless",
    [
        "1/2, 3/4 and a/b/c\n",
        "see http://www.w3.org/2000/svg\n",
        "rate /s, m/s\n",
        "50 %/epoch\n",
        "[1, 2]/3/4\n",
    ],
)
def test_a_slash_is_not_a_path(harmless: str, tmp_path: Path) -> None:
    notebook = good()
    outputs(stdout(harmless))(notebook)
    assert complaints(notebook, tmp_path) == []


def test_pictures_are_not_searched_for_paths(tmp_path: Path) -> None:
    notebook = good()
    page = '<img alt="x" src="data:image/png;base64,iVBORw0KGgo=/abc/def+/ghi/jkl">'
    notebook.cells[2].outputs = [new_output("display_data", {"text/html": page})]
    assert complaints(notebook, tmp_path) == []


def test_colab_cell_does_nothing_where_the_library_is(tmp_path: Path) -> None:
    result = run("-c", "import subprocess; subprocess.run = None\n" + notebooks.colab_cell().source)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_normal_form_is_reached_and_kept(tmp_path: Path) -> None:
    notebook = good()
    notebook.metadata.update(toc={})
    notebook.cells[2].metadata.update(execution={"start": 0}, tags=["hide-input"])
    notebook.cells[3].outputs[0].metadata.update(needs_background="light")
    once = notebooks.serialise(notebooks.normalise(notebook))
    assert complaints(nbformat.reads(once, as_version=4), tmp_path) == []
    assert notebooks.serialise(notebooks.normalise(nbformat.reads(once, as_version=4))) == once
    assert nbformat.reads(once, as_version=4).cells[2].metadata == {"tags": ["hide-input"]}


def test_colab_cell_goes_before_the_first_code(tmp_path: Path) -> None:
    notebook = good()
    notebook.cells.pop(1)
    path = tmp_path / "chapter.ipynb"
    notebooks.write(notebook, path)
    once = notebooks.chapter(path)
    assert [cell.id for cell in once.cells] == ["title", "colab", "number", "figure"]
    notebooks.write(once, path)
    assert [cell.id for cell in notebooks.chapter(path).cells] == [cell.id for cell in once.cells]


# --------------------------------------------------------------------------------- the command line


def test_check_names_file_cell_and_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chapter.ipynb"
    notebooks.write(good(), path)
    assert notebooks.main(["check", str(path)]) == 0
    notebook = good()
    FAULTS["semicolon"][0](notebook)
    notebooks.write(notebook, path)
    assert notebooks.main(["check", str(path)]) == 1
    assert f"{path}:number: the last line ends in `;`" in capsys.readouterr().out


def test_a_missing_notebook_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        notebooks.main(["check", str(tmp_path / "none.ipynb")])
    assert "none.ipynb" in capsys.readouterr().err


def write_chapter(path: Path, *sources: str) -> None:
    cells = [new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    notebooks.write(new_notebook(cells=[new_markdown_cell("# T", id="t"), *cells]), path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A book of two chapters and a library of one module, with the tool inside it."""
    for folder in ("book", "lipbook", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tools/notebooks.py").write_text((ROOT / "tools/notebooks.py").read_text("utf-8"))
    (tmp_path / "lipbook/__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "_config.yml").write_text("title: T\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    (tmp_path / "book/index.md").write_text("# T\n")
    write_chapter(tmp_path / "book/one.ipynb", "x = 1.25", "print(x)")
    write_chapter(tmp_path / "book/two.ipynb", "import os\nprint(os.environ['OMP_NUM_THREADS'])")
    return tmp_path


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_execute_to_runs_only_what_changed(tree: Path) -> None:
    target = tree / "_build" / "source"
    tool = ("tools/notebooks.py", "execute", "--to", "_build/source")
    before = files(tree)

    first = run(*tool, cwd=tree)
    assert first.returncode == 0, first.stderr
    assert "2 executed, 0 unchanged, 0 failed" in first.stdout
    assert "chapters" in first.stderr  # the progress bar
    one = nbformat.read(target / "book/one.ipynb", as_version=4)
    assert one.cells[-1].outputs[0].text == "1.25\n"
    assert list(notebooks.problems(target / "book/one.ipynb")) == []
    assert nbformat.read(target / "book/two.ipynb", as_version=4).cells[-1].outputs[0].text == "1\n"
    assert (target / "_toc.yml").exists()
    assert (target / "lipbook/__init__.py").exists()
    outside = {k: v for k, v in files(tree).items() if not k.startswith(str(tree / "_build"))}
    assert outside == before

    # New prose is carried over, new code is run, what is gone is removed.
    prose = notebooks.read(tree / "book/one.ipynb")
    prose.cells[0].source = "# A better title"
    notebooks.write(prose, tree / "book/one.ipynb")
    write_chapter(tree / "book/two.ipynb", "raise ValueError('planted')")
    (tree / "book/index.md").rename(tree / "book/start.md")
    second = run(*tool, cwd=tree)
    assert second.returncode == 1
    assert "0 executed, 1 unchanged, 1 failed" in second.stdout
    assert "two.ipynb: FAILED" in second.stderr
    assert "ValueError: planted" in second.stderr
    assert "Traceback" in second.stderr
    one = nbformat.read(target / "book/one.ipynb", as_version=4)
    assert one.cells[0].source == "# A better title"
    assert one.cells[-1].outputs[0].text == "1.25\n"
    assert not (target / "book/two.ipynb").exists()
    assert not (target / "book/index.md").exists()
    assert (target / "book/start.md").exists()

    assert list(json.loads((target / ".executed.json").read_text("utf-8"))) == ["book/one.ipynb"]


def test_what_a_chapter_depends_on(tree: Path) -> None:
    def digest() -> str:
        notebook = notebooks.chapter(tree / "book/one.ipynb")
        return str(notebooks.fingerprint(notebook, notebooks.library_digest(tree)))

    seen = [digest()]
    (tree / "README.md").write_text("# Another file\n")
    assert digest() == seen[0]
    for path in ("lipbook/__init__.py", "constraints.txt"):
        (tree / path).write_text('__version__ = "0.2.0"\n')
        seen.append(digest())
    (tree / "lipbook/data.npz").write_bytes(b"0")
    seen.append(digest())
    write_chapter(tree / "book/one.ipynb", "x = 1.5", "print(x)")
    seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_a_chapter_that_fails_is_left_as_it_was(tree: Path) -> None:
    one = tree / "book/one.ipynb"
    write_chapter(one, "print(1)", "1 / 0")
    before = one.read_text("utf-8")
    error = notebooks.execute(notebooks.Job(one, one, timeout=60))
    assert "ZeroDivisionError" in error
    assert one.read_text("utf-8") == before
    names = sorted(path.name for path in one.parent.iterdir())
    assert names == ["index.md", "one.ipynb", "two.ipynb"]


# -------------------------------------------------------------------------------------------- nbval


def test_stored_numbers_are_compared_and_drawings_overlooked(tree: Path) -> None:
    figure = {"image/svg+xml": SVG, "text/plain": "<Figure>"}
    source = f"from IPython.display import display\n\ndisplay({figure!r}, raw=True)"
    path = tree / "book/one.ipynb"
    write_chapter(path, "x = 1.25", "print(x)", source)
    done = run("tools/notebooks.py", "execute", "--inplace", "book/one.ipynb", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert {message.rpartition(": ")[2] for _, message in notebooks.problems(path)} == {
        "metadata mystnb.image.alt",
        "metadata mystnb.figure.caption",
        "metadata mystnb.figure.name",
    }

    stored = path.read_text("utf-8")
    assert '"1.25\\n"' in stored
    head, drawing, tail = stored.partition("M1.25 2l1.75 2")
    assert drawing
    edited = f"{head}M1.26 2l1.75 2{tail}".replace('"1.25\\n"', '"1.26\\n"')
    (tree / "edited.ipynb").write_text(edited, "utf-8")
    (tree / "sanitize.cfg").write_text((ROOT / "book/nbval_sanitize.cfg").read_text("utf-8"))
    strict = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "sanitize.cfg"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    result = run("-m", "pytest", *plugins, *strict, "edited.ipynb", cwd=tree)
    assert result.returncode == 1, result.stdout
    failures = re.findall(r"^FAILED (.*)", ANSI.sub("", result.stdout), re.MULTILINE)
    assert len(failures) == 1, result.stdout
    assert failures[0].startswith("edited.ipynb::Cell 2")
    assert "3 passed" in result.stdout  # the cell of the drawing among them


def test_chapters_that_keep_a_reader_waiting_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*cells: tuple[str, float]) -> Path:
        cases = "".join(
            f'<testcase classname="_build.alone.{name}.ipynb" name="Cell" time="{seconds}" />'
            for name, seconds in cells
        )
        path = tmp_path / "times.xml"
        path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return path

    assert notebooks.main(["times", str(report(("one", 40.0), ("one", 41.0), ("two", 3.0)))]) == 0
    assert capsys.readouterr().out == "  81.0 s  one\n   3.0 s  two\n"
    assert notebooks.main(["times", str(report(("one", 50.0), ("one", 41.0)))]) == 1
    assert "91.0 s  one  more than 90" in capsys.readouterr().out
    assert notebooks.main(["times", str(report())]) == 1, "a report of nothing"
