"""Check and execute the chapters of the book.

    python tools/notebooks.py check book/*.ipynb
    python tools/notebooks.py execute --inplace book/jacobians.ipynb
    python tools/notebooks.py execute --to _build/source
    python tools/notebooks.py times _build/alone/times.xml

A chapter is stored with its outputs, in one normal form, so that a change of one number is a
change of one line. ``check`` says where a notebook departs from it. ``execute --inplace`` runs
a chapter and writes that form; it is the author's command. ``execute --to`` leaves the chapters
as they are and makes an executed copy of the book's source, which Sphinx then renders. ``times``
reads what nbval wrote of a run, and says which chapters took longer than a reader should wait.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.validator import better_validation_error, iter_validate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 420_000
MAX_SECONDS = 90  # a chapter, on one core
NOTEBOOK_METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
CELL_METADATA = {"mystnb", "tags"}
COLAB_ID = "colab"
MISSING = """\
# The chapters use the library of this book.
import importlib.util

if importlib.util.find_spec("lipbook") is None:
    raise ModuleNotFoundError(
        "lipbook is missing: in a copy of the project, run pip install -e '.[lab]'"
    )"""
INSTALL = """\
# Only for a machine that has no lipbook yet, such as a fresh Google Colab.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lipbook") is None:
    package = "lipbook[lab] @ git+{repository}@v{version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", package]
    subprocess.run(command, check=True)"""

ANSI = re.compile(r"\x1b\[[0-9;]*m")
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=\s]+")
# A slash that opens a path of two or more parts; not one inside a URL, a fraction or a tag.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<)\]}])/[\w.-]+/[\w./-]+|\b[A-Za-z]:\\\w+")
IMAGE_FILE = re.compile(r"\.(svg|png|jpe?g|gif|webp)$", re.IGNORECASE)
CLOSING_SEMICOLON = re.compile(r";\s*(#[^\"']*)?$")


# ----------------------------------------------------------------------------- the normal form


def package_version(root: Path = ROOT) -> str:
    """Version of the library that belongs to these chapters."""
    found = re.search(r'^__version__ = "(.+)"$', (root / "lipbook/__init__.py").read_text(), re.M)
    if found is None:
        raise ValueError("lipbook/__init__.py: no __version__")
    return found.group(1)


def repository(root: Path = ROOT) -> str:
    """Address of the project's repository, if pyproject.toml gives one under ``Repository``."""
    project = root / "pyproject.toml"
    text = project.read_text() if project.exists() else ""
    found = re.search(r'^Repository = "(.+)"$', text, re.M)
    return found.group(1) if found else ""


def colab_cell(address: str | None = None) -> NotebookNode:
    """Cell for a machine that has no lipbook; silent where it is.

    It installs from the project's own repository. No index has the library, and whoever registered
    its name there would be executed: without a repository the cell says what to do.
    """
    address = repository() if address is None else address
    source = INSTALL.format(repository=address, version=package_version()) if address else MISSING
    return nbformat.v4.new_code_cell(source, id=COLAB_ID, metadata={"tags": ["remove-cell"]})


def read(path: Path) -> NotebookNode:
    """Notebook at `path`, raised to format 4.5 if it is older."""
    return nbformat.read(path, as_version=4)


def serialise(notebook: NotebookNode) -> str:
    """Text of a notebook: one source line a line, keys sorted, one final newline."""
    return str(nbformat.v4.writes(notebook)).rstrip("\n") + "\n"


def write(notebook: NotebookNode, path: Path) -> None:
    """Write `notebook` in one step, so that `path` is never half a notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(serialise(notebook), encoding="utf-8")
    temporary.replace(path)


def chapter(path: Path) -> NotebookNode:
    """Notebook at `path` with today's Colab cell before its first code cell."""
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") != COLAB_ID]
    kinds = [cell.cell_type for cell in notebook.cells]
    notebook.cells.insert(kinds.index("code") if "code" in kinds else len(kinds), colab_cell())
    return normalise(notebook)


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Bring the metadata of a notebook, its cells and its outputs to the normal form."""
    from lipbook.lab.plots import compact_svg  # noqa: PLC0415 - slow, and for this alone

    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in CELL_METADATA}
        )
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = NotebookNode()
            if "image/svg+xml" in output.get("data", {}):
                output.data["image/svg+xml"] = compact_svg(output.data["image/svg+xml"])
    return notebook


def invalid(text: str) -> str:
    """Why `text` is no notebook of format 4.5, or nothing."""
    try:
        plain = json.loads(text)
        version = plain["nbformat"], plain["nbformat_minor"]
        ids = [cell.get("id") for cell in plain["cells"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"not a notebook: {error!r}"
    if version != (4, 5):
        return f"nbformat is {version[0]}.{version[1]}, expected 4.5"
    if not all(isinstance(i, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", i) for i in ids):
        return "a cell has no id (letters, digits, - and _)"
    fault = next(iter_validate(plain, version=4, version_minor=5), None)
    if fault is not None:
        return f"not a valid notebook: {better_validation_error(fault, 4, 5).message}"
    return ""


def problems(path: Path) -> Iterator[tuple[str, str]]:
    """Where the notebook at `path` departs from the normal form: (cell, what is wrong)."""
    text = path.read_bytes().decode("utf-8")
    if reason := invalid(text):
        yield "-", reason
        return
    notebook = nbformat.v4.reads(text)
    if len(text.encode()) > MAX_BYTES:
        size = -(-len(text.encode()) // 1000)
        yield "-", f"{size} kB are more than the {MAX_BYTES // 1000} kB allowed"
    if notebook.metadata != NOTEBOOK_METADATA:
        yield "-", "notebook metadata other than the kernelspec and language_info of the book"
    ids = [cell.id for cell in notebook.cells]
    for repeated in sorted({i for i in ids if ids.count(i) > 1}):
        yield repeated, "this id belongs to more than one cell"

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code or dict(code[0], execution_count=None) != dict(colab_cell(), execution_count=None):
        yield "-", "the first code cell is not the Colab cell of this version of the library"
    for cell in notebook.cells:
        for message in _cell_problems(cell):
            yield cell.id, message
    for count, cell in enumerate(code, start=1):
        if cell.execution_count != count:
            yield cell.id, f"execution count {cell.execution_count}, expected {count}"
    if text != serialise(notebook):
        yield "-", "not written as `execute --inplace` writes it (order of keys, spaces, newline)"


def _cell_problems(cell: NotebookNode) -> Iterator[str]:
    extra = sorted(set(cell.metadata) - CELL_METADATA)
    if extra:
        yield f"metadata {', '.join(extra)}: only {' and '.join(sorted(CELL_METADATA))} may stay"
    if cell.cell_type == "raw":
        yield "a raw cell is shown by no reader"
    if cell.cell_type != "code":
        return
    if not cell.source.strip():
        yield "an empty code cell"
    elif CLOSING_SEMICOLON.search(cell.source.rstrip().splitlines()[-1]):
        yield "the last line ends in `;`, which nbval does not see: end the cell with a statement"
    for output in cell.outputs:
        yield from _output_problems(output)
    if any(key.startswith("image/") for output in cell.outputs for key in output.get("data", {})):
        yield from _figure_problems(cell.metadata.get("mystnb", {}))


def _output_problems(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "error":
        yield f"stores the error {output.ename}: catch it and print its message"
    if output.get("name") == "stderr":
        yield f"stores text on stderr: {output.text.strip().splitlines()[-1:]}"
    if output.get("metadata"):
        yield f"output metadata {', '.join(sorted(output.metadata))}"
    texts = [output.get("text", ""), output.get("evalue", ""), *output.get("traceback", [])]
    texts += [value for key, value in output.get("data", {}).items() if key.startswith("text/")]
    for text in texts:
        found = ABSOLUTE_PATH.search(BASE64.sub("", ANSI.sub("", text)))
        if found:
            yield f"an output holds the absolute path {found.group()}"
            return


def _figure_problems(options: NotebookNode) -> Iterator[str]:
    alt = str(options.get("image", {}).get("alt") or "").strip()
    if not alt or IMAGE_FILE.search(alt):
        yield "a figure without alt text: metadata mystnb.image.alt"
    for key in ("caption", "name"):
        if not str(options.get("figure", {}).get(key) or "").strip():
            yield f"a figure without {key}: metadata mystnb.figure.{key}"


# ---------------------------------------------------------------------------------- execution


class Job(NamedTuple):
    """One notebook to execute: where it is, where the result goes, when to give up."""

    source: Path
    target: Path
    timeout: int


def execute(job: Job) -> str:
    """Run a notebook in a fresh kernel and write it; return what went wrong, or nothing."""
    notebook = chapter(job.source)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook,
        timeout=job.timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(job.target.parent)}},
        record_timing=False,
        coalesce_streams=True,
        # ipykernel warns at each start that it talks over TCP; that is not the reader's concern.
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return ANSI.sub("", str(error))
    write(normalise(notebook), job.target)
    return ""


def execute_all(jobs: list[Job], workers: int) -> Iterator[tuple[Job, str]]:
    """Run the jobs, `workers` at a time, each in a kernel of its own, under a progress bar."""
    bar = tqdm(total=len(jobs), desc="chapters", unit="chapter", disable=not jobs)
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(execute, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job, error = futures[future], future.result()
                if error:
                    tqdm.write(f"\n{job.source}: FAILED\n{error}", file=sys.stderr)
                bar.set_postfix_str(job.source.stem)
                bar.update()
                yield job, error
        finally:  # interrupted: what has not begun does not begin
            pool.shutdown(cancel_futures=True)


def private_folders(folder: Path) -> None:
    """Keep what Jupyter, IPython, Matplotlib and Python write beside the work in `folder`.

    Also gives each kernel one thread: two chapters run side by side, and one thread makes
    sums independent of the number of cores.
    """
    for variable, name in {
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "MPLCONFIGDIR": "matplotlib",
        "TMPDIR": "temporary",
        "XDG_CACHE_HOME": "cache",
    }.items():
        os.environ[variable] = str(folder / name)
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"


# ----------------------------------------------------------------- an executed copy of the book


def book_files(root: Path) -> Iterator[Path]:
    """Files that Sphinx reads, relative to `root`: pages show library files and the benchmark."""
    yield from (Path(name) for name in ("_config.yml", "_toc.yml"))
    yield from (path.relative_to(root) for path in (root / "benchmarks").glob("results.*"))
    for path in [*(root / "book").rglob("*"), *(root / "lipbook").rglob("*.py")]:
        relative = path.relative_to(root)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_file() and not hidden:
            yield relative


def mirror(root: Path, target: Path) -> list[Path]:
    """Make `target` the book's source without its notebooks; return those, relative."""
    wanted = set(book_files(root))
    for old in [*(target / "book").rglob("*"), *(target / "lipbook").rglob("*")]:
        if old.is_file() and old.relative_to(target) not in wanted:
            old.unlink()
    for relative in sorted(wanted):
        source, copy = root / relative, target / relative
        if relative.suffix == ".ipynb":
            continue
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return [relative for relative in sorted(wanted) if relative.suffix == ".ipynb"]


def library_digest(root: Path) -> str:
    """Hash of what a chapter's results depend on besides its own code."""
    digest = hashlib.sha256(platform.python_version().encode())
    files = [root / "constraints.txt", *sorted((root / "lipbook").rglob("*"))]
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def fingerprint(notebook: NotebookNode, library: str) -> str:
    """Hash of the code cells and of the library: equal hashes, equal outputs."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps([library, *code]).encode()).hexdigest()


def refresh(source: Path, executed: Path) -> None:
    """Bring the text of `source` to its executed copy and keep the copy's outputs."""
    fresh, old = chapter(source), read(executed)
    outputs = iter([cell for cell in old.cells if cell.cell_type == "code"])
    for cell in fresh.cells:
        if cell.cell_type == "code":
            ran = next(outputs)
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    if serialise(fresh) != executed.read_text(encoding="utf-8"):
        write(fresh, executed)


def execute_copy(root: Path, target: Path, timeout: int, workers: int) -> int:
    """Mirror the book into `target` with every chapter executed; number of failures."""
    target.mkdir(parents=True, exist_ok=True)
    record = target / ".executed.json"
    done: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    library = library_digest(root)
    jobs, hashes = [], {}
    for relative in mirror(root, target):
        name, copy = relative.as_posix(), target / relative
        hashes[name] = fingerprint(chapter(root / relative), library)
        if done.get(name) == hashes[name] and copy.exists():
            refresh(root / relative, copy)
        else:
            copy.unlink(missing_ok=True)
            done.pop(name, None)
            jobs.append(Job(root / relative, copy, timeout))
    record.write_text(json.dumps(done))
    failures = 0
    for job, error in execute_all(jobs, workers):
        name = job.source.relative_to(root).as_posix()
        if error:
            failures += 1
        else:
            done[name] = hashes[name]
            record.write_text(json.dumps(done))
    unchanged = len(hashes) - len(jobs)
    print(f"{len(jobs) - failures} executed, {unchanged} unchanged, {failures} failed")
    return failures


# ----------------------------------------------------------------------------- how long it takes


def times(report: Path) -> dict[str, float]:
    """Seconds of each notebook in a JUnit report of nbval, which times each cell."""
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = re.search(r"(\w+)\.ipynb$", case.get("classname", ""))
        if found:
            seconds[found[1]] = seconds.get(found[1], 0.0) + float(case.get("time", "0"))
    return seconds


# -------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="notebooks.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say where notebooks depart from the normal form")
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    run = commands.add_parser("execute", help="run notebooks from the first cell to the last")
    where = run.add_mutually_exclusive_group(required=True)
    where.add_argument("--inplace", nargs="+", type=Path, metavar="PATH", help="rewrite these")
    where.add_argument("--to", type=Path, metavar="DIR", help="executed copy of the book's source")
    run.add_argument("--timeout", type=int, default=600, help="seconds a cell (600)")
    run.add_argument("--workers", type=int, default=2, help="chapters at a time (2)")
    timed = commands.add_parser("times", help="say how long each notebook of a report took")
    timed.add_argument("report", type=Path, metavar="XML", help="written by pytest --junitxml")
    options = parser.parse_args(arguments)
    if options.command == "times":
        seconds = times(options.report)
        for name in sorted(seconds, key=lambda name: -seconds[name]):
            late = f"  more than {MAX_SECONDS}" if seconds[name] > MAX_SECONDS else ""
            print(f"{seconds[name]:6.1f} s  {name}{late}")
        return int(not seconds or max(seconds.values()) > MAX_SECONDS)
    for path in options.paths if options.command == "check" else options.inplace or []:
        if not path.is_file():
            parser.error(f"no such notebook: {path}")

    if options.command == "check":
        found = [(path, *problem) for path in options.paths for problem in problems(path)]
        for path, cell, message in found:
            print(f"{path}:{cell}: {message}")
        return int(bool(found))

    if options.inplace:
        private_folders(ROOT / "_build/jupyter")
        jobs = [Job(path, path, options.timeout) for path in map(Path.resolve, options.inplace)]
        failures = sum(bool(error) for _, error in execute_all(jobs, options.workers))
    else:
        target = options.to.resolve()
        private_folders(target / ".jupyter")
        failures = execute_copy(ROOT, target, options.timeout, options.workers)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
