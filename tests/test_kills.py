"""A process that is killed in the middle of a write: the file of before is there, or none.

The kernel kills it, at a byte of our choice: a limit on the size of files, whose signal Python
ignores unless it is told otherwise, ends a process inside the call that would pass it, whatever
library makes that call. Nothing can be cleaned up, as after ``kill -9``. What Python opens is
watched too: the file in place is never opened for writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from lipbook.cli import main
from lipbook.lab import records
from lipbook.lab.recipes import group_sizes

pytest.importorskip("resource", reason="limits of a process are those of Unix")
TOP = Path(__file__).parents[1]

# A program defines write(path, version), which makes the file at the path.
PROGRAMS = {
    "record": """
from lipbook.lab import records
made = records.facts("lipbook reproduce example", seed=0, seconds=1.0)
def write(path, version):
    records.write(records.Record(path.stem, made, {"numbers": [version] * 1000}), path.parent)
""",
    "tensors of a record": """
import torch
from lipbook.lab import records
made = records.facts("lipbook reproduce example", seed=0, seconds=1.0)
def write(path, version):
    tensors = {"weight": torch.full((1000,), float(version))}
    records.write(records.Record(path.stem, made, {}, tensors), path.parent)
""",
    "row of a recipe": """
import torch
from lipbook.lab.recipes import _save
def write(path, version):
    _save(path, {"version": version}, {"weight": torch.full((1000,), float(version))}, 1.0)
""",
    "weights": """
import torch
from lipbook.export import save_weights
def write(path, version):
    torch.manual_seed(version)
    save_weights(torch.nn.Linear(40, 40), path)
""",
    "ONNX": """
import torch
from lipbook.export import export_onnx
def write(path, version):
    torch.manual_seed(version)
    export_onnx(torch.nn.Linear(40, 40), path, (40,))
""",
    "certificate": """
import torch
from lipbook.robustness import certify
def write(path, version):
    torch.manual_seed(version)
    net, x = torch.nn.Linear(4, 3).eval(), torch.randn(1000, 4)
    certify(net, [(x, torch.zeros(1000, dtype=torch.int64))], (4,)).save(path)
""",
}
SUFFIXES = {"record": ".json", "tensors of a record": ".safetensors", "row of a recipe": ".row"}

RUN = """
import os, resource, signal, sys, traceback
from pathlib import Path

def watch(path):
    def opened(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            assert str(arguments[0]) != str(path), "a write in place"
    sys.addaudithook(opened)

def forked(path, version, limit=None):
    process = os.fork()
    if process == 0:
        try:
            watch(path)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(path, version)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def check(folder, suffix):
    there = [folder / name / ("example" + suffix) for name in ("whole", "place")]
    for path in there:
        path.parent.mkdir()
    assert forked(there[0], 1) == 0, "not written"
    half = there[0].stat().st_size // 2
    path = there[1]
    assert forked(path, 1, half) == -signal.SIGXFSZ, "not killed"
    assert not path.exists(), "a file that is not whole"
    assert forked(path, 1) == 0
    before = path.read_bytes()
    assert forked(path, 2, half) == -signal.SIGXFSZ, "not killed the second time"
    assert path.read_bytes() == before, "the file of before is lost"
    assert forked(path, 2) == 0
    assert path.read_bytes() != before
"""


def ran(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


ALL = """
import contextlib, json
with contextlib.suppress(ModuleNotFoundError):
    import onnx, onnxruntime, onnxscript, torch
    torch.onnx.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),), dynamo=True, verbose=False)
for name, program, suffix in json.loads(os.environ["PROGRAMS"]):
    (Path(os.environ["FOLDER"]) / name).mkdir()
    exec(program)
    try:
        check(Path(os.environ["FOLDER"]) / name, suffix)
    except AssertionError as error:
        print(json.dumps([name, str(error) or "another failure"]))
    else:
        print(json.dumps([name, "kept"]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """What each program came to, and the complaints of all: the imports are made once for all."""
    programs = [[name, text, SUFFIXES.get(name, ".file")] for name, text in PROGRAMS.items()]
    folder = tmp_path_factory.mktemp("kills")
    done = ran(RUN + ALL, PROGRAMS=json.dumps(programs), FOLDER=str(folder))
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(map(json.loads, lines)), done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_write_that_is_killed_leaves_what_was_there(
    name: str, outcomes: tuple[dict[str, str], str]
) -> None:
    found, complaints = outcomes
    assert found.get(name) == "kept", complaints


def test_a_write_in_place_is_seen(tmp_path: Path) -> None:
    program = "def write(path, version):\n    path.write_bytes(bytes([version]) * 1000)\n"
    call = f"check(Path({str(tmp_path)!r}), '.file')"
    assert "AssertionError: a write in place" in ran(program + RUN + call).stderr
    (tmp_path / "whole").rmdir()
    (tmp_path / "place").rmdir()
    unwatched = RUN.replace("            watch(path)\n", "")  # as by a library that is not Python
    assert "AssertionError: a file that is not whole" in ran(program + unwatched + call).stderr


# ---------------------------------------------------------------------------------- downloads


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_download_that_is_killed_is_made_again(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "images.gz").write_bytes(content)
    handler = partial(Handler, directory=str(tmp_path / "mirror"))
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url, file_hash = f"http://127.0.0.1:{server.server_port}/images.gz", hashlib.sha256(content)
    program = (
        "from lipbook.lab.data import _download\n"
        "def write(path, version):\n"
        f"    _download('images.gz', '{file_hash.hexdigest()}', 'mnist', ['{url}'])\n"
    )
    twice = "print(forked(None, 1, 150_000), Path(sys.argv[1]).exists(), forked(None, 1))"
    variables = {"XDG_CACHE_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    there = tmp_path / "lipbook" / "mnist" / "images.gz"
    try:
        done = ran(program + RUN + twice, str(there), **variables)
        assert done.stdout.split() == [str(-signal.SIGXFSZ), "False", "0"], done.stderr
        assert there.read_bytes() == content
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ------------------------------------------------------------------------------------ recipes

SIZES = {"steps": 2, "seeds": 1, "sizes": [2, 16, 128]}
REPRODUCE = """
import os, signal, sys
from lipbook.cli import main
from lipbook.lab.recipes import group_sizes
fit, calls = group_sizes.fit, []
def killed(*arguments, **sizes):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(*arguments, **sizes)
group_sizes.fit = killed
main(sys.argv[1:])
"""


def test_a_recipe_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [f"{name}={json.dumps(value)}" for name, value in SIZES.items()]
    command = ["reproduce", "group_sizes", "--to", str(tmp_path / "records"), "--quiet"]
    command += [text for size in sizes for text in ("--set", size)]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    done = subprocess.run(
        [sys.executable, "-c", REPRODUCE, *command],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "records").exists()
    calls: list[Any] = []
    fit = group_sizes.fit

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return fit(*arguments, **options)

    monkeypatch.setattr(group_sizes, "fit", counted)
    assert main(command) == 0
    assert len(calls) == 1  # two of the three rows were kept
    expected = records.rounded(group_sizes.run(**SIZES)[0])
    assert records.read("group_sizes", tmp_path / "records").results == expected
