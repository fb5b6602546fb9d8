"""The project's own promises: floors, versions, dependencies, the two commands, the wheel."""

from __future__ import annotations

import ast
import email
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lipbook

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
CONDA_TO_PYPI = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}

# A module may import those on lower floors only (CONTRIBUTING.md, "Rooms and floors").
FLOORS = {
    "_extras": 0,
    "_processes": 0,
    "jacobians": 0,
    "norms": 0,
    "rules": 1,
    "errors": 2,
    "units": 2,
    "freezing": 1,
    "layers": 3,
    "graphs": 4,
    "composition": 5,
    "rounding": 6,
    "activations": 6,
    "orthogonal": 6,
    "pooling": 6,
    "distances": 6,
    "normalization": 6,
    "convolutions": 7,
    "attention": 8,
    "residual": 8,
    "conversion": 9,
    "sequences": 8,
    "wasserstein": 9,
    "losses": 9,
    "tightness": 9,
    "generalization": 9,
    "export": 10,
    "robustness": 10,
    "attacks": 11,
    "interpretability": 11,
    "lab": 12,
    "cli": 13,
    "__main__": 14,
    "__init__": 14,  # imports every module, when it is asked for
}
PUBLIC = {room for room in FLOORS if not room.startswith("_")}


def floor(dotted: str) -> int:
    """The floor of ``lipbook.<room>...``."""
    parts = dotted.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else FLOORS["__init__"]


def texts(node: ast.expr) -> list[str]:
    """Strings in an expression, of an f-string what stands before its first hole."""
    return [
        str(part.value) for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]  # fmt: skip


def lipbook_imports(source: str) -> set[str]:
    """Every ``lipbook...`` module that a source text imports, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Call):  # importlib.import_module("lipbook.norms")
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__", "find_spec", "resolve_name"):
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                found |= {name for part in arguments for name in texts(part)}
    rooms = {".".join(name.split(".")[:2]) for name in found if name.split(".")[0] == "lipbook"}
    return {name for name in rooms if name == "lipbook" or name.split(".")[1] in FLOORS}


SOURCES = sorted((TOP / "lipbook").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(TOP)))
def test_imports_go_down_the_floors(path: Path) -> None:
    room = path.relative_to(TOP / "lipbook").parts[0].removesuffix(".py")
    assert room in FLOORS, f"{room} stands on no floor"
    upward = {
        name
        for name in lipbook_imports(path.read_text())
        if name not in ("lipbook", f"lipbook.{room}") and floor(name) >= FLOORS[room]
    }
    assert not upward, f"{room} (floor {FLOORS[room]}) imports {sorted(upward)}"


def test_the_floor_check_sees_an_arrow_that_goes_up() -> None:
    found = lipbook_imports("def f():\n    from lipbook import composition\n")
    assert found == {"lipbook", "lipbook.composition"}
    assert floor("lipbook.composition") > FLOORS["norms"]
    for hidden in (
        "import importlib\nimportlib.import_module('lipbook.tightness')",
        "import_module(name='x', package=f'lipbook.tightness.{y}')",
        "__import__('lipbook.tightness.exact')",
        "room = importlib.import_module(f'lipbook.tightness.{name}')",
    ):
        assert lipbook_imports(hidden) - {"lipbook"} == {"lipbook.tightness"}, hidden


def test_every_floor_has_its_module() -> None:
    rooms = {p.relative_to(TOP / "lipbook").parts[0].removesuffix(".py") for p in SOURCES}
    assert rooms == set(FLOORS)


@functools.cache
def words_of_the_chapters() -> frozenset[str]:
    """Every word of the notebooks: they are long, and each room asks for some."""
    chapters = sorted((TOP / "book").glob("*.ipynb"))
    return frozenset(word for path in chapters for word in re.findall(r"\w+", path.read_text()))


def ran(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *map(str, paths)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = ("torch", "numpy", "ot", "scipy", "matplotlib")
    code = f"import sys, lipbook; print([m for m in {heavy} if m in sys.modules])"
    assert ran(code).stdout == "[]\n"


def test_importing_the_library_imports_torch_and_numpy_only() -> None:
    """Their dependencies aside, which they import themselves, and the standard library."""
    rooms = sorted(f"lipbook.{room}" for room, at in FLOORS.items() if at < FLOORS["lab"])
    code = (
        "import sys, torch, numpy; before = set(sys.modules)\n"
        f"import {', '.join(rooms)}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names - {'torch', 'numpy'}))"
    )
    assert ran(code).stdout == "['lipbook']\n"


def test_modules_are_imported_when_they_are_asked_for() -> None:
    code = "import lipbook; print(lipbook.convolutions.OrthogonalConv2d.__module__)"
    assert ran(code).stdout.startswith("lipbook.convolutions")
    for room in PUBLIC:
        assert getattr(lipbook, room) is sys.modules[f"lipbook.{room}"]
        assert room in dir(lipbook)
    assert "__version__" in dir(lipbook)
    with pytest.raises(AttributeError, match="module 'lipbook' has no attribute 'convolution'"):
        lipbook.convolution  # noqa: B018
    assert not hasattr(lipbook, "__wrapped__")


def test_an_error_inside_a_module_is_not_hidden() -> None:
    code = (
        "import sys, lipbook; sys.modules['numpy'] = None\n"
        "try: lipbook.robustness\nexcept ImportError as error: print(error.name)"
    )
    assert ran(code).stdout == "numpy\n"


def test_type_checkers_see_every_module() -> None:
    assert lipbook_imports((TOP / "lipbook" / "__init__.py").read_text()) - {"lipbook"} == {
        f"lipbook.{room}" for room in PUBLIC
    }


def test_every_module_says_what_is_public() -> None:
    for path in SOURCES:
        if path.name == "__init__.py":
            continue
        names = [
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text()).body
            if (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__")
            or (isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "__all__")
        ]
        assert names, f"{path.name} has no __all__"
        module = ".".join(path.relative_to(TOP).with_suffix("").parts)
        importlib.import_module(module)
        missing = [n for n in names[0] if not hasattr(sys.modules[module], n)]
        assert not missing, f"{module}.__all__ names what does not exist: {missing}"


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in parsed}


def all_requirements() -> dict[str, Requirement]:
    extras = PYPROJECT["project"]["optional-dependencies"]
    lines = [line for part in extras.values() for line in part]
    return requirements(PYPROJECT["project"]["dependencies"] + lines)


def test_the_library_needs_torch_numpy_and_pot_only() -> None:
    assert set(requirements(PYPROJECT["project"]["dependencies"])) == {"torch", "numpy", "pot"}


def constraint_lines() -> list[Requirement]:
    lines = (TOP / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins = [r for r in constraint_lines() if r.marker is None or r.marker.evaluate()]
    pinned = {canonicalize_name(r.name): r for r in pins}
    assert len(pinned) == len(pins), "one pin for each name and Python version"
    assert all(re.fullmatch(r"==[^,]+", str(r.specifier)) for r in pins)
    assert str(pinned["torch"].specifier) == "==2.13.0"
    for name, requirement in all_requirements().items():
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = str(pinned[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), name


def test_environment_yml_agrees_with_pyproject() -> None:
    environment = yaml.safe_load((TOP / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    extras = PYPROJECT["project"]["optional-dependencies"]
    ranges = {}
    for name, version in map(split, conda):
        ranges[canonicalize_name(CONDA_TO_PYPI.get(name, name))] = version
    wanted = requirements(PYPROJECT["project"]["dependencies"] + extras["lab"])
    for name, requirement in wanted.items():
        assert name in ranges, f"{name} is not in environment.yml"
        assert ranges[name] == str(requirement.specifier), name
    (python,) = [c.removeprefix("python=") for c in conda if c.startswith("python=")]
    assert Requirement("x" + PYPROJECT["project"]["requires-python"]).specifier.contains(python)
    (editable,) = [line for line in pip if line.startswith("-e ")]
    named = editable.partition("[")[2].rstrip("]").split(",")
    assert set(named) <= set(extras)


def split(line: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+?)((?:[<>=!~]=?).*)?", line)
    assert match, line
    return match[1], match[2] or ""


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    changelog = re.findall(r"^## \[?(\d[\w.]*)\]?", (TOP / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == lipbook.__version__ == changelog[0]


def test_every_dependency_has_its_reason() -> None:
    text = (TOP / "CONTRIBUTING.md").read_text()
    missing = [r.name for r in all_requirements().values() if f"| {r.name} |" not in text]
    assert not missing, f"no line of reason in CONTRIBUTING.md for {missing}"


def test_readme_names_the_two_commands_and_ci_runs_the_second() -> None:
    readme, ci = (TOP / "README.md").read_text(), (TOP / ".ci" / "run").read_text()
    assert "make book" in readme
    assert "make test" in readme
    assert re.search(r"^make test$", ci, re.M)


def test_readme_and_makefile_execute_the_whole_book_alike() -> None:
    """``--to DIR`` takes no chapters: it mirrors and executes all of them."""
    for name in ("README.md", "Makefile"):
        lines = re.findall(r"notebooks\.py execute --to (.*)$", (TOP / name).read_text(), re.M)
        assert lines == ["_build/source"], name


def test_help_lists_every_target() -> None:
    makefile = (TOP / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony
    targets = set(phony[1].split())
    described = set(re.findall(r"^([a-z]+):.*##", makefile, re.M))
    assert described == targets


def test_the_wheel_holds_the_library_and_its_data(tmp_path: Path) -> None:
    """What is installed from a wheel, not from the tree, can be imported and loads the digits."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(TOP)], check=True)
    (wheel,) = tmp_path.glob("lipbook-*.whl")
    assert wheel.stat().st_size <= 12_000_000
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import lipbook; "
        "assert '.whl' in lipbook.__file__; from lipbook.lab.data import mnist; "
        "print(tuple(mnist().train_images.shape)); "
        "from lipbook.cli import _chapters; print(*(c.name for c in _chapters()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    shape, chapters = ran.stdout.splitlines()
    assert shape == "(12000, 1, 28, 28)"
    assert chapters.split() == sorted(path.name for path in (TOP / "book").glob("*.ipynb"))


@pytest.mark.parametrize("host", [None, "github", "gitlab"])
def test_the_package_links_to_what_its_build_knows(host: str | None, tmp_path: Path) -> None:
    """Without an address it has no link; with one, its README's links work away from the tree."""
    jobs = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_REF", "CI_PROJECT_URL", "LIPBOOK_URL")
    known = {name: value for name, value in os.environ.items() if name not in jobs}
    known["GIT_DIR"] = str(tmp_path / "none")  # the remote of this very checkout says nothing here
    if host == "github":
        known |= {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/lipbook"}
        known |= {"GITHUB_REF": "refs/tags/v1", "LIPBOOK_URL": "https://example.org/book/"}
    elif host == "gitlab":
        known["CI_PROJECT_URL"] = "https://gitlab.com/a/lipbook"
    code = (
        f"import hatchling.build as b; print(b.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, env=known, check=True, capture_output=True, text=True
    )
    described = email.message_from_string((tmp_path / ran.stdout.strip() / "METADATA").read_text())
    urls = dict(line.split(", ") for line in described.get_all("Project-URL", []))
    text = described.get_payload()
    links = set(re.findall(r"\]\((?!#)([^)\s]+)\)", text))
    assert text.startswith("# ")
    assert len(links) >= 4
    if host is None:
        assert not urls
        assert all((TOP / link).exists() for link in links)
        return
    assert all(link.startswith("https://") for link in links)
    if host == "github":
        assert urls.pop("Documentation") == "https://example.org/book/"
        base = "https://github.com/a/lipbook"
        assert f"{base}/blob/v1/CONTRIBUTING.md" in links
    else:
        base = "https://gitlab.com/a/lipbook"
        assert f"{base}/-/blob/main/CONTRIBUTING.md" in links
    assert set(urls) == {"Source", "Issues", "Changelog"}
    assert urls["Source"] == base


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """All that a test, a command or a page reads: the tests pass from it alone."""
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True, capture_output=True)
    (archive,) = tmp_path.glob("lipbook-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("lipbook", "book", "tests", "tools", "benchmarks", ".ci", ".github")
    files = [path for folder in folders for path in (TOP / folder).rglob("*")]
    files += [path for path in TOP.iterdir() if not path.name.startswith(".git")]
    suffixes = {".py", ".ipynb", ".md", ".yml", ".cff", ".txt", ".toml", ".bib", ".json", ".png"}
    kept = [path for path in files if path.is_file() and path.suffix in suffixes]
    assert len(kept) > 200
    missing = {str(path.relative_to(TOP)) for path in kept} - names
    assert not {name for name in missing if ".ipynb_checkpoints" not in name}, missing


ROOMS_WITH_A_CHAPTER = (
    "jacobians",
    "norms",
    "composition",
    "activations",
    "orthogonal",
    "pooling",
    "distances",
    "convolutions",
    "residual",
    "wasserstein",
    "losses",
    "rounding",
    "robustness",
    "attacks",
    "tightness",
    "interpretability",
    "generalization",
    "rules",
    "graphs",
)


@pytest.mark.parametrize("room", ROOMS_WITH_A_CHAPTER)
def test_every_public_name_has_its_entry_and_its_place_in_a_chapter(room: str) -> None:
    entries = (TOP / "book" / "api" / f"{room}.md").read_text()
    names = importlib.import_module(f"lipbook.{room}").__all__
    assert [name for name in names if not re.search(rf"\b{name}\b", entries)] == []
    assert [name for name in names if name not in words_of_the_chapters()] == []


def tool(name: str) -> Any:
    """A module of the folder of tools."""
    sys.path.insert(0, str(TOP / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOP / "tools"))


def test_every_planted_fault_has_its_place() -> None:
    """A fault whose line is gone would be reported as an error of the tool, or never tried."""
    for fault in tool("planted_faults").FAULTS:
        text = (TOP / "lipbook" / f"{fault.module}.py").read_text()
        assert text.count(fault.right) == 1, (fault.module, fault.consequence)


def test_mutants_change_one_place_of_the_code_and_no_text() -> None:
    tools = tool("mutants")
    text = '''"""A docstring with 3 < 4."""
__all__ = ["f"] * 1


@decorated(True)
def f(é: Literal[2], b: int = 5) -> int:
    if not b < 6:
        raise ValueError("é" * 7)
    assert b > 8
    return zip(é + b, strict=True)
'''
    mutants = tools.mutants_of("room", text)
    changed = {(mutant.right, mutant.wrong) for mutant in mutants}
    assert changed == {
        ("5", "(6)"),
        ("5", "(4)"),
        ("not b < 6", "(True)"),
        ("not b < 6", "(False)"),
        ("not b < 6", "(b < 6)"),
        ("b < 6", "(b <= 6)"),
        ("b < 6", "(b >= 6)"),
        ("6", "(7)"),
        ("6", "(5)"),
        ("é + b", "(é - b)"),
    }
    for mutant in mutants:
        wrong = tools.planted(mutant, text)
        lines = zip(text.splitlines(), wrong.splitlines(), strict=True)
        assert [line for line in lines if len(set(line)) > 1] == [
            (
                text.splitlines()[mutant.line - 1],
                wrong.splitlines()[mutant.line - 1],
            )
        ]
        assert mutant.wrong in wrong
    with pytest.raises(ValueError, match="has changed"):
        tools.planted(mutants[0], "\n" + text)


def test_mutants_that_survived_have_a_reason() -> None:
    """What `make mutants` recorded: 92 of 100 are killed, and 85 of 100 in every room."""
    tools = tool("mutants")
    lines = tools.read(tools.RECORD)
    verdicts = {line["verdict"] for line in lines if "module" in line}
    assert verdicts <= {"killed", "timeout", "survived", "equivalent"}
    for line in lines:
        assert line.get("verdict") not in ("survived", "equivalent") or line.get("why"), line
    counts = tools.counts(lines)
    assert counts.keys() == tools.rooms().keys()
    killed, total = (sum(column) for column in zip(*counts.values(), strict=True))
    assert killed >= 0.92 * total
    assert [room for room, (killed, total) in counts.items() if killed < 0.85 * total] == []


def test_an_editor_shows_what_a_class_is() -> None:
    """The docstring of the class, its formula in it, and the constructor's arguments."""
    for room in ("activations", "convolutions", "losses", "orthogonal", "pooling", "residual"):
        module = getattr(lipbook, room)
        for name in module.__all__:
            thing = getattr(module, name)
            text = inspect.getdoc(thing) or ""
            assert len(text.splitlines()) > 2 or text.startswith("Parametrization"), name
            assert not re.search(r"^ *As there|\bas there\b", text, re.MULTILINE), name
            if isinstance(thing, type) and thing.__module__.startswith("lipbook"):
                own = [cls for cls in thing.__mro__ if cls.__module__.startswith("lipbook")]
                assert not any(
                    vars(cls).get("__init__").__doc__ for cls in own if "__init__" in vars(cls)
                )
