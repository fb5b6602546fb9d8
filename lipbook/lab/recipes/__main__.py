"""Command line of the recipes: ``python -m lipbook.lab.recipes --help``."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lipbook
from lipbook.lab import records
from lipbook.lab.recipes import Rows, recipes

__all__ = ["main"]

COMMAND = "python -m lipbook.lab.recipes"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run a recipe and write its record.

    Parameters
    ----------
    arguments : sequence of str, optional
        Of the command line; those of the process if not given.

    Returns
    -------
    pathlib.Path
        The JSON file of the record.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Run an experiment and write its record. An interrupted run goes on where it "
        "was if it is started again in the same folder.",
        epilog=_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=recipes(), metavar="NAME", help="one of those below")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="of the record (default: that of the package)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SIZE=VALUE",
        dest="sizes",
        help="change a size, such as steps=100; needs --to, since the record of the package has "
        "the sizes of the recipe",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    chosen = parser.parse_args(arguments)
    module = importlib.import_module(f"lipbook.lab.recipes.{chosen.name}")
    run = module.run
    sizes = _sizes(parser, chosen.sizes, run)
    if sizes and chosen.to is None:
        parser.error("--set needs --to")

    command = " ".join([COMMAND, chosen.name, *(f"--set {text}" for text in chosen.sizes)])
    folder = _rows_folder(module, sizes)
    rows = Rows(folder)
    start = time.process_time()
    results, tensors = run(progress=not chosen.quiet, rows=rows, **sizes)
    seconds = time.process_time() - start + rows.earlier
    seed = sizes.get("seed", inspect.signature(run).parameters["seed"].default)
    facts = records.facts(command, seed, seconds)
    record = records.Record(chosen.name, facts, records.rounded(results), tensors)
    path = records.write(record, chosen.to)
    shutil.rmtree(folder, ignore_errors=True)
    return path


def _sizes(parser: argparse.ArgumentParser, texts: Sequence[str], run: Any) -> dict[str, Any]:
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(run).parameters.items()
        if name not in ("progress", "rows")
    }
    sizes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            parser.error(f"--set: expected one of {known}, got {text!r}")
        if isinstance(known[name], str):
            sizes[name] = value
            continue
        try:
            sizes[name] = json.loads(value)
        except ValueError:
            parser.error(f"--set {name}: expected a number or a list as in JSON, got {value!r}")
    return sizes


def _rows_folder(module: Any, sizes: dict[str, Any]) -> Path:
    """Name the folder of the finished rows: another one for other sizes and another recipe."""
    text = json.dumps([lipbook.__version__, inspect.getsource(module), sizes], sort_keys=True)
    name = module.__name__.rpartition(".")[2]
    return Path(".lipbook", "recipes", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _table() -> str:
    lines = ["recipes, with the minutes of processor time of their records:"]
    for name in recipes():
        module = importlib.import_module(f"lipbook.lab.recipes.{name}")
        minutes = "  ?"
        if name in records.names():
            minutes = f"{records.read(name).facts['seconds'] / 60:3.0f}"
        lines.append(f"  {name:16} {minutes}  {(module.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
