"""The command ``lipbook``: make a record again, certify a network, copy the chapters."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lipbook
from lipbook import export
from lipbook._extras import imported
from lipbook.lab import networks, records
from lipbook.lab.chapters import Names, names, readable
from lipbook.lab.data import mnist
from lipbook.lab.recipes import Rows, recipes
from lipbook.robustness import Certificate, certify

__all__ = ["main"]

COMMAND = "lipbook"
BATCH = 500  # inputs that are certified at a time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Of the command line; those of the process if not given.

    Returns
    -------
    int
        The exit status: 0. What is wrong with the arguments ends the process with status 2 and one
        line that names the argument.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__.partition(": ")[2].capitalize() if __doc__ else None,
        epilog="lipbook COMMAND --help has examples.",
    )
    parser.add_argument("--version", action="version", version=f"lipbook {lipbook.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_reproduce, _add_certify, _add_notebooks):
        add(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (
        _RefusedError, ConnectionError, FileNotFoundError, FileExistsError, ImportError
    ) as error:  # fmt: skip
        chosen.parser.error(str(error))
    return 0


class _RefusedError(Exception):
    """An argument that cannot be used; the message names it."""


def _add(
    commands: Any, name: str, run: Callable[[Any], None], description: str, epilog: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=description.partition(".")[0],
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


# ---------------------------------------------------------------------------------- reproduce


def _add_reproduce(commands: Any) -> None:
    parser = _add(
        commands,
        "reproduce",
        _reproduce,
        "Run an experiment and write its record. An interrupted run goes on where it was if it is\n"
        "started again in the same folder. The records of an installed package stay as they are.",
        "examples:\n"
        "  lipbook reproduce group_sizes\n"
        "  lipbook reproduce group_sizes --set steps=100 --to records\n\n" + _recipes_table(),
    )
    parser.add_argument("name", choices=recipes(), metavar="NAME", help="one of those below")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="of the record (default: lipbook/lab/records in a checkout of lipbook, if started "
        "there, else lipbook-records)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SIZE=VALUE",
        dest="sizes",
        help="change a size, such as steps=100; needs --to, since the record of a checkout has "
        "the sizes of the recipe",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def _reproduce(chosen: Any) -> None:
    module = importlib.import_module(f"lipbook.lab.recipes.{chosen.name}")
    sizes = _sizes(chosen.sizes, module.run)
    if sizes and chosen.to is None:
        raise _RefusedError("--set needs --to")
    texts = (f"--set {text}" for text in chosen.sizes)
    command = " ".join([COMMAND, "reproduce", chosen.name, *texts])
    folder = _rows_folder(module, sizes)
    rows = Rows(folder, progress=not chosen.quiet)
    start = time.process_time()
    results, tensors = module.run(rows=rows, **sizes)
    seconds = time.process_time() - start + rows.earlier
    seed = sizes.get("seed", inspect.signature(module.run).parameters["seed"].default)
    facts = records.facts(command, seed, seconds)
    if rows.elsewhere:
        facts["elsewhere"] = rows.elsewhere
    record = records.Record(chosen.name, facts, records.rounded(results), tensors)
    path = records.write(record, chosen.to or _records_folder())
    shutil.rmtree(folder, ignore_errors=True)
    _say(path)


def _records_folder() -> Path:
    """Folder of the records of a checkout, if the command is started there; never another one."""
    here = Path("lipbook", "lab", "records")
    checkout = Path("pyproject.toml").is_file() and here.is_dir()
    return here if checkout else Path("lipbook-records")


def _sizes(texts: Sequence[str], run: Any) -> dict[str, Any]:
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(run).parameters.items()
        if name != "rows"
    }
    sizes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise _RefusedError(f"--set: expected one of {known}, got {text!r}")
        if isinstance(known[name], str):
            sizes[name] = value
            continue
        try:
            sizes[name] = json.loads(value)
        except ValueError:
            raise _RefusedError(
                f"--set {name}: expected a number or a list as in JSON, got {value!r}"
            ) from None
    return sizes


def _rows_folder(module: Any, sizes: dict[str, Any]) -> Path:
    """Name the folder of the finished rows: another one for other sizes and another recipe."""
    text = json.dumps([lipbook.__version__, inspect.getsource(module), sizes], sort_keys=True)
    name = module.__name__.rpartition(".")[2]
    return Path(".lipbook", "recipes", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _recipes_table() -> str:
    lines = ["recipes, with the minutes of processor time of their records:"]
    for name in recipes():
        module = importlib.import_module(f"lipbook.lab.recipes.{name}")
        minutes = "  ?"
        if name in records.names():
            minutes = f"{records.read(name, tensors=False).facts['seconds'] / 60:3.0f}"
        lines.append(f"  {name:16} {minutes}  {(module.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ certify


def _add_certify(commands: Any) -> None:
    parser = _add(
        commands,
        "certify",
        _certify,
        "Certify the predictions of a network, sound in floating point, and print certified\n"
        "accuracies with their confidence intervals.",
        "examples:\n"
        "  lipbook certify mnist_best\n"
        "  lipbook certify mnist_best --data full --epsilon 0.5 1 1.58\n"
        "  lipbook certify my_nets:build --data images.npz --epsilon 0.1 0.5\n"
        "  lipbook certify my_package.nets:build --weights net.safetensors --data images.npz\n\n"
        "A network and data of yours, as in the third example, with a file my_nets.py:\n"
        "  import torch\n"
        "  def build():\n"
        "      model = torch.nn.Sequential(...)  # of layers with rules, as it was trained\n"
        "      model.load_state_dict(torch.load('checkpoint.pt', weights_only=True))\n"
        "      return model\n"
        "and images, in the units that radii shall have, beside their classes:\n"
        "  numpy.savez('images.npz', images=images.astype('float32'), labels=labels)\n"
        "(--weights reads a file of lipbook.export.save_weights instead.)\n\n"
        "networks that ship:\n" + "\n".join(f"  {name}" for name in networks.names()),
    )
    parser.add_argument(
        "network",
        metavar="NETWORK",
        help="one of those below, or MODULE:FUNCTION, which is called without arguments and "
        "returns a torch.nn.Module",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors file for MODULE:FUNCTION"
    )
    parser.add_argument(
        "--data",
        default="shipped",
        metavar="DATA",
        help="'shipped' (2,000 test digits, or the images that ship for the network), 'full' "
        "(10,000 digits), or an npz file with arrays 'images' (n, ...) in floating point and "
        "'labels' (n,) (default: %(default)s)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="certify the first N inputs only")
    parser.add_argument(
        "--p", type=float, choices=(1, 2, math.inf), help="exponent of the norm, 1, 2 or inf "
        "(default: that of the network, or 2)",
    )  # fmt: skip
    parser.add_argument("--epsilon", type=float, nargs="+", metavar="E", help="radii of the table")
    parser.add_argument(
        "--real", action="store_true", help="in real arithmetic, which does not bind the program"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write all radii to an npz file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve (.svg, .png)")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def _certify(chosen: Any) -> None:
    model, p = _network(chosen.network, chosen.weights)
    images, labels = _images(chosen.data, chosen.network, chosen.count)
    batches = _batches(images, labels, quiet=chosen.quiet)
    try:
        certificate = certify(
            model, batches, images.shape[1:], chosen.p or p, sound=not chosen.real
        )
    except (TypeError, ValueError) as error:
        raise _RefusedError(f"cannot certify {chosen.network} on {chosen.data}: {error}") from None
    _say(_table(certificate, chosen.epsilon))
    if chosen.to:
        certificate.save(chosen.to)
        _say(chosen.to)
    if chosen.plot:
        _plot(certificate, chosen.plot)
        _say(chosen.plot)


def _network(name: str, weights: Path | None) -> tuple[nn.Module, float]:
    if name in networks.names():
        if weights is not None:
            raise _RefusedError(f"--weights: only for MODULE:FUNCTION, since {name} has its own")
        return networks.load(name), networks.norm(name)
    module, _, function = name.partition(":")
    if not function:
        raise _RefusedError(
            f"NETWORK: expected MODULE:FUNCTION or one of {networks.names()}, got {name!r}"
        )
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
        if not callable(build):
            raise TypeError(f"{function} must be a function, got {type(build).__name__}")
        model = build()
    except (ImportError, AttributeError) as error:
        raise _RefusedError(f"NETWORK: cannot use {name!r}: {error}") from None
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise _RefusedError(f"NETWORK: cannot use {name!r}: {told}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise _RefusedError(
            f"NETWORK: {name} must return a torch.nn.Module, got {type(model).__name__}"
        )
    if weights is not None:
        try:
            export.load_weights(model, weights)
        except ValueError as error:
            raise _RefusedError(f"--weights: {error}") from None
    elif next(model.parameters(), None) is not None:
        sys.stderr.write(
            f"{COMMAND}: without --weights, the network has those that {name} gives it: "
            "random ones, unless it reads a file\n"
        )
    return model.eval(), 2


def _images(data: str, network: str, count: int | None) -> tuple[Tensor, Tensor]:
    if data == "shipped" and network in networks.names():
        images, labels = networks.data(network)
    elif data in ("shipped", "full"):
        digits = mnist(full=data == "full")
        images, labels = digits.test_images, digits.test_labels
    else:
        try:
            with np.load(data, allow_pickle=False) as arrays:
                images, labels = (torch.from_numpy(arrays[k]) for k in ("images", "labels"))
        except (OSError, ValueError, KeyError) as error:
            raise _RefusedError(
                "--data: expected 'shipped', 'full' or an npz file with arrays 'images' and "
                f"'labels', got {data!r}: {error}"
            ) from None
        labels = labels.long()
    if count is not None and not 1 <= count <= len(images):
        raise _RefusedError(f"--count: expected a number from 1 to {len(images)}, got {count}")
    return images[:count], labels[:count]


def _batches(images: Tensor, labels: Tensor, *, quiet: bool) -> Iterator[tuple[Tensor, Tensor]]:
    batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    if quiet:
        yield from batches
        return
    with imported("tqdm").tqdm(total=len(images), desc="inputs") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def _table(certificate: Certificate, epsilons: Sequence[float] | None) -> str:
    if epsilons is None:
        return str(certificate)
    try:
        return certificate.table(epsilons)
    except ValueError as error:
        raise _RefusedError(f"--epsilon: {error}") from None


def _plot(certificate: Certificate, path: Path) -> None:
    imported("matplotlib").use("agg")
    figure = certificate.plot().figure
    part = path.with_name(f"part-{path.name}")
    try:
        figure.savefig(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- notebooks


def _add_notebooks(commands: Any) -> None:
    parser = _add(
        commands,
        "notebooks",
        _notebooks,
        "Copy the chapters of the book as notebooks, with the names of theorems and works written\n"
        "out and figures that show at once. Files that are there already stay.",
        "examples:\n  lipbook notebooks\n  lipbook notebooks my-copy && jupyter lab my-copy\n",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("lipbook-chapters"), metavar="FOLDER",
        help="where to (default: %(default)s)",
    )  # fmt: skip


def _notebooks(chosen: Any) -> None:
    figures = chosen.folder / "assets" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for still in _files(_book() / "assets" / "figures", ".svg"):
        (figures / still.name).write_bytes(still.read_bytes())
    known = _names()
    for source in _chapters():
        target = chosen.folder / source.name
        if target.exists():
            _say(f"{target} is there already")
            continue
        part = target.with_suffix(".part")
        copy = readable(json.loads(source.read_text("utf-8")), known)
        part.write_text(json.dumps(copy, indent=1, ensure_ascii=False) + "\n", "utf-8")
        part.replace(target)
        _say(target)


def _names() -> Names:
    """Read what the chapters refer to: each other, the pages beside them, and the literature."""
    book = _book()
    beside = [book / "api" / "index.md", book.parent / "_toc.yml"] if isinstance(book, Path) else []
    files = [*_files(book, ""), *(file for file in beside if file.is_file())]
    pages, contents, bibliography = {}, "", ""
    for file in files:
        if file.name.endswith((".ipynb", ".md")):
            pages[file.name] = file.read_text("utf-8")
        elif file.name == "_toc.yml":
            contents = file.read_text("utf-8")
        elif file.name == "references.bib":
            bibliography = file.read_text("utf-8")
    return names(pages, contents, bibliography)


def _chapters() -> list[Any]:
    return _files(_book(), ".ipynb")


def _files(folder: Any, ending: str) -> list[Any]:
    found = [file for file in folder.iterdir() if file.name.endswith(ending)]
    return sorted(found, key=lambda file: file.name)


def _book() -> Any:
    """Find the chapters: in the package that was installed, or beside its source."""
    package = resources.files("lipbook")
    for folder in (package / "chapters", Path(str(package)).parent / "book"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("no chapters in the package: install lipbook again")


if __name__ == "__main__":
    sys.exit(main())
