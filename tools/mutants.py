"""Change the library at random places, one at a time, and count the changes that the tests see.

Planted faults (`planted_faults.py`) are slips that we thought of; mutants are those of nobody. Each
changes one operator, comparison, condition or number of `lipbook/` (not of the lab) in a copy of
the tree, and runs the tests of its own room until one fails.

    python tools/mutants.py                     # a sample of every room
    python tools/mutants.py rounding --count 20
    python tools/mutants.py --again             # the survivors once more, after work on the tests
    python tools/mutants.py --count 0           # only count what the record holds

Tests are collected once a room; a fork of that process gets the mutant's code in its functions, and
runs them, the quickest first. What is not in a function, or survives, is imported anew. At last the
tests that failed run without a mutant, and must pass. Results are appended to `mutants.jsonl`, a
line each, so that a run that was cut goes on with the next room. Tests that take longer than
`LIMIT` have failed. In the record a survivor is given its reason by hand, `"why"`; one that
computes the same, or proves the same, has the verdict `"equivalent"` and does not count. Margins
like 2^-40 are not made 2^-39: both are far above the handful of roundings of float64 that they
stand for.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import gc
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from planted_faults import OUTPUT, ROOT, copied_tree, rewritten, run_tests
from tqdm import tqdm

# Rooms whose tests are not, or not only, in the file of their name, or for which some of them are
# left out: those that take long, and see little that the others do not.
_QUICK = "-k 'not (LSTM or GRU or heads or encoder)'"
TESTS = {
    "composition": "tests/test_checks.py tests/test_composition.py tests/test_domains.py",
    "convolutions": "tests/test_convolutions.py tests/test_rounding.py "
    "-k 'test_convolutions or nonexpansive'",
    "errors": f"tests/test_rounding.py {_QUICK}",
    "freezing": "tests/test_export.py tests/test_life_cycle.py -k 'froz or freez or compiled'",
    "layers": "tests/test_domains.py tests/test_normalization_layers.py "
    f"tests/test_sequence_layers.py tests/test_composition.py tests/test_rounding.py {_QUICK}",
    "normalization": "tests/test_normalization.py -k 'not processes'",  # which start others
    "norms": "tests/test_norms.py tests/test_rounding.py "
    "-k 'test_norms or the_norm_of or the_bound_of or many_blocks'",
    "rounding": f"tests/test_rounding.py {_QUICK}",
    "rules": "tests/test_checks.py tests/test_composition.py tests/test_domains.py",
    "units": "tests/test_activations.py tests/test_checks.py tests/test_tightness.py "
    "-k 'units or test_checks or read or pieces or clipped'",
}
LIMIT = 300  # seconds of a CPU, several times what the tests of a room take
RECORD = Path(__file__).with_suffix(".jsonl")

SWAPS: dict[type, tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


class Mutant(NamedTuple):
    """A place in a module, its text, and what stands there instead."""

    module: str
    source: str  # the line on which it begins
    line: int
    column: int  # in bytes
    right: str
    wrong: str

    @property
    def room(self) -> str:
        """Its top-level module or package."""
        return self.module.split("/", maxsplit=1)[0]

    @property
    def path(self) -> str:
        """Its file in the tree."""
        return f"lipbook/{self.module}.py"


def _numbers(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 1:
            yield value - 1
    elif isinstance(value, float):
        yield 2 * value if value else 1.0
        yield value / 2 if value else -1.0


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the mutants of one node, not of those below it."""
    if isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _numbers(node.value))  # type: ignore[arg-type]
    for operator in SWAPS.get(type(getattr(node, "op", None)), ()):
        changed = copy.copy(node)
        changed.op = operator()  # type: ignore[attr-defined]
        yield changed
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield node.operand
    if isinstance(node, ast.Compare):
        for k, compared in enumerate(node.ops):
            for other in SWAPS[type(compared)]:
                changed = copy.copy(node)
                changed.ops = [*node.ops[:k], other(), *node.ops[k + 1 :]]  # type: ignore[list-item]
                yield changed
    if isinstance(node, (ast.IfExp, ast.If, ast.While)):
        for value in (True, False):
            changed = copy.copy(node)
            changed.test = ast.Constant(value)
            yield changed


_SILENT = ("__repr__", "extra_repr", "__str__")


def _is_text(node: ast.AST) -> bool:
    """Whether it is a message, a list of names, an assertion or a matter of types."""
    if isinstance(node, ast.FunctionDef):
        return node.name in _SILENT
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__"
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("isinstance", "issubclass", "cast")
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr))


def _places(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of the code that computes or decides."""
    if _is_text(node):
        return
    yield node
    for name, field in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST):
                    yield from _places(child)


def mutants_of(module: str, text: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    found = []
    code, lines = text.encode(), text.splitlines()
    starts = [0, *itertools.accumulate(map(len, code.splitlines(keepends=True)))]
    for place in _places(ast.parse(text)):
        for changed in _changes(place):
            old, new = place, changed
            if isinstance(place, (ast.If, ast.While)):  # only the condition changes
                old, new = place.test, changed.test  # type: ignore[attr-defined]
            wrong = ast.unparse(ast.fix_missing_locations(new))
            assert isinstance(old, (ast.expr, ast.stmt))
            assert old.end_lineno is not None
            assert old.end_col_offset is not None
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            found.append(
                Mutant(
                    module,
                    lines[old.lineno - 1].strip(),
                    old.lineno,
                    old.col_offset,
                    code[start:end].decode(),
                    f"({wrong})" if isinstance(old, ast.expr) else wrong,
                )
            )
    return list(dict.fromkeys(found))


def planted(mutant: Mutant, text: str) -> str:
    """Write the mutant into the text of its module."""
    code, right = text.encode(), mutant.right.encode()
    start = sum(map(len, code.splitlines(keepends=True)[: mutant.line - 1])) + mutant.column
    if not code[start:].startswith(right):
        raise ValueError(f"{mutant.path} has changed, {mutant.right!r} is not at {mutant.line}")
    return (code[:start] + mutant.wrong.encode() + code[start + len(right) :]).decode()


def is_margin(mutant: Mutant) -> bool:
    """Whether it halves or doubles a margin for the rounding of float64, which proves the same."""
    return mutant.right.isdigit() and f"**-{mutant.right}" in mutant.source


def rooms() -> dict[str, list[str]]:
    """List the modules of each room that is sampled."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted((ROOT / "lipbook").rglob("*.py")):
        module = path.relative_to(ROOT / "lipbook").with_suffix("").as_posix()
        room = module.split("/", maxsplit=1)[0]
        if room != "lab" and not path.name.startswith("_"):
            found[room].append(module)
    return dict(found)


def sample(room: str, modules: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants of a room, all equally likely; the first ones of a larger sample."""
    mutants: list[Mutant] = []
    for module in modules:
        mutants += mutants_of(module, (ROOT / "lipbook" / f"{module}.py").read_text())
    random.Random(f"{seed} {room}").shuffle(mutants)
    return [mutant for mutant in mutants if not is_margin(mutant)][:count]


VERDICTS = {0: "survived", -signal.SIGXCPU: "timeout"}  # all other codes: killed
ANEW = 77  # code of a run for which the library must be imported anew


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def own(code: types.CodeType) -> tuple[Any, ...]:
    """Tell what a code object does itself, without those inside it."""
    inside = types.CodeType
    return code.co_code, [None if isinstance(c, inside) else repr(c) for c in code.co_consts]


def replaced(mutant: Mutant, tree: Path) -> bool:
    """Give live functions the mutant's code, if it is all inside functions."""
    path = tree / mutant.path
    text = path.read_text()
    before, after = (
        {(part.co_name, part.co_firstlineno): part for part in codes(compile(t, path, "exec"))}
        for t in (text, planted(mutant, text))
    )
    if before.keys() != after.keys():  # lines have moved
        return False
    changed = {key for key, part in before.items() if own(part) != own(after[key])}
    if not all(before[key].co_flags & inspect.CO_NEWLOCALS for key in changed):
        return False
    inner = {
        key
        for key, part in before.items()
        if any((c.co_name, c.co_firstlineno) in changed for c in codes(part))
    }
    functions = [
        thing
        for thing in gc.get_objects()
        if type(thing) is types.FunctionType  # isinstance asks objects, and some of them warn
        and thing.__code__.co_filename == str(path)
        and (thing.__code__.co_name, thing.__code__.co_firstlineno) in inner
    ]
    try:
        for function in functions:
            code = function.__code__
            function.__code__ = after[code.co_name, code.co_firstlineno]
    except ValueError:  # another number of variables from outside
        return False
    return bool(functions)


class Planter:
    """Plugin of pytest: collects once, and then runs the tests in a fork for each mutant.

    A last fork has no mutant, and runs the tests that have failed (all, if some are not known).
    """

    def __init__(self, mutants: list[Mutant], tree: Path, limit: int) -> None:
        self.mutants, self.tree, self.limit = mutants, tree, limit
        self.codes = multiprocessing.get_context("fork").SimpleQueue()
        self.failed = tree / "failed.txt"
        self.failed.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which test failed."""
        if report.failed:
            with self.failed.open("a") as file:
                file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Fork: the child goes on to the tests, the parent to the next mutant."""
        codes: list[int] = []
        for mutant in [*self.mutants, None]:
            child = os.fork()
            if not child:
                resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit + 9))
                if mutant is None:
                    failed = self.failed.read_text().splitlines()
                    if not {ANEW, -signal.SIGXCPU} & {*codes}:
                        session.items[:] = [t for t in session.items if t.nodeid in failed]
                elif not replaced(mutant, self.tree):
                    os._exit(ANEW)
                return None
            _, status, usage = os.wait4(child, 0)
            codes.append(os.waitstatus_to_exitcode(status))
            self.codes.put((codes[-1], round(usage.ru_utime + usage.ru_stime, 1)))
        return True


def verdicts(mutants: list[Mutant], tree: Path) -> Iterator[tuple[Mutant, str, float]]:
    """Whether the tests of a room see each mutant, and what that took of a CPU."""
    tests = tests_of(mutants[0].room)
    planter = Planter(mutants, tree, LIMIT)
    run_tests(tree, tests, plugins=[planter])
    for mutant in mutants:
        code, seconds = planter.codes.get()
        if code in (0, ANEW):  # 0: what runs at the import only is not seen by a fork
            path, start = tree / mutant.path, spent()
            with rewritten(path, planted(mutant, path.read_text())):
                code = run_tests(tree, tests, LIMIT)
            seconds = round(spent() - start, 1)
        if code > 2:  # neither passed nor failed nor broken at the import
            raise RuntimeError(
                f"pytest gave no verdict on {mutant}:\n{(tree / OUTPUT).read_text()}"
            )
        yield mutant, VERDICTS.get(code, "killed"), seconds
    if planter.codes.get()[0] != 0:  # were they killed, or do these always fail?
        output = (tree / OUTPUT).read_text()
        raise RuntimeError(f"tests fail without a mutant:\n{output}")


def tests_of(room: str) -> list[str]:
    """Name the tests of a room as pytest does."""
    return shlex.split(TESTS.get(room, f"tests/test_{room}.py"))


def spent() -> float:
    """Seconds that the tests have used of a CPU."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def circumstances() -> dict[str, Any]:
    """Tell what makes the numbers: command, versions, hardware, date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "command": shlex.join(["python", "tools/mutants.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "pytest", "hypothesis")},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def read(record: Path) -> list[dict[str, Any]]:
    """Read the lines of a record."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def write(record: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    record.write_text(text)


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """Name a mutant so that it stays the same when the lines above it move."""
    return tuple(line.get(name) for name in ("module", "source", "column", "right", "wrong"))


def counts(lines: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Killed mutants and all that are not equivalent, of each room."""
    found: dict[str, tuple[int, int]] = {}
    for line in lines:
        if "module" in line and line["verdict"] != "equivalent":
            room = line["module"].split("/", maxsplit=1)[0]
            killed, total = found.get(room, (0, 0))
            found[room] = killed + (line["verdict"] != "survived"), total + 1
    return dict(sorted(found.items()))


def main(arguments: list[str] | None = None) -> int:
    """Try the mutants that the record lacks, and print the counts of all."""
    parser = argparse.ArgumentParser(description="See how many random changes the tests catch.")
    parser.add_argument("rooms", nargs="*", help="only these rooms")
    parser.add_argument("--count", type=int, default=8, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=RECORD, help="file to which results go")
    parser.add_argument("--again", action="store_true", help="try survivors of the file once more")
    options = parser.parse_args(arguments)
    known = rooms()
    if not set(options.rooms) <= set(known):
        parser.error(f"rooms must be among {', '.join(known)}, got {options.rooms}")
    lines = read(options.to)
    chosen = options.rooms or list(known)
    tried = {
        identity(line)
        for line in lines
        if "module" in line and not (options.again and line["verdict"] == "survived")
    }
    waiting = {
        room: [
            mutant
            for mutant in sample(room, known[room], options.count, options.seed)
            if identity(mutant._asdict()) not in tried
        ]
        for room in chosen
    }
    bar = tqdm(total=sum(map(len, waiting.values())), unit="mutant", disable=None)
    with bar, copied_tree() as tree:
        if bar.total:
            lines.append(circumstances() | {"seed": options.seed})
        for mutants in filter(None, waiting.values()):
            for mutant, verdict, seconds in verdicts(mutants, tree):
                result = mutant._asdict() | {"verdict": verdict, "seconds": seconds}
                lines = [line for line in lines if identity(line) != identity(result)] + [result]
                write(options.to, lines)
                bar.update()
                if verdict == "survived":
                    bar.write(f"{mutant.path}:{mutant.line}  {mutant.right}  ->  {mutant.wrong}")
    found = counts(lines)
    for room, (killed, total) in found.items():
        print(f"{room:20}{killed:4} of {total}")
    killed, total = (sum(column) for column in zip(*found.values(), strict=True))
    print(f"{'all':20}{killed:4} of {total}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
