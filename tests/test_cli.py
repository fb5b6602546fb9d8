"""The command line: what it writes, prints and refuses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipbook
from lipbook import cli
from lipbook.cli import main
from lipbook.export import save_weights
from lipbook.lab import networks, records
from lipbook.lab.data import mnist
from lipbook.lab.recipes import group_sizes, recipes
from lipbook.robustness import Certificate, certify


def shortened(folder: Path) -> list[str]:
    sizes = ["--set", "steps=2", "--set", "seeds=1", "--set", "sizes=[2,128]"]
    return ["reproduce", "group_sizes", "--to", str(folder), "--quiet", *sizes]


def test_reproduce_writes_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shortened(tmp_path / "records")) == 0
    record = records.read("group_sizes", tmp_path / "records")
    assert capsys.readouterr().out == f"{tmp_path / 'records' / 'group_sizes.json'}\n"
    assert [row["group_size"] for row in record.results["rows"]] == [2, 128]
    assert record.facts["command"].endswith("--set steps=2 --set seeds=1 --set sizes=[2,128]")
    assert list((tmp_path / ".lipbook" / "recipes").iterdir()) == []


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []
    fit = group_sizes.fit

    def interrupted(*arguments: Any, **sizes: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **sizes)

    monkeypatch.setattr(group_sizes, "fit", interrupted)
    with monkeypatch.context() as patched:
        patched.setattr(records, "_hardware", lambda: "another machine")
        with pytest.raises(KeyboardInterrupt):
            main(shortened(tmp_path))
    main(shortened(tmp_path))
    assert len(calls) == 3
    record = records.read("group_sizes", tmp_path)
    (elsewhere,) = record.facts["elsewhere"]
    assert elsewhere["hardware"] == "another machine" != record.facts["hardware"]
    assert len(elsewhere["rows"]) == 1
    again = record.results
    expected = records.rounded(group_sizes.run(sizes=(2, 128), seeds=1, steps=2)[0])
    assert again == expected


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A module that builds a linear classifier, weights and images."""
    (tmp_path / "classifiers.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))\n"
        "def wide():\n    return nn.Sequential(nn.Flatten(), nn.Linear(5, 2, bias=False))\n"
        "def number():\n    return 1\n"
        "def broken():\n    return nn.Linear(2, 'three')\n"
        "constant = 3\n"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]]))
    save_weights(model, tmp_path / "net.safetensors")
    images = np.zeros((3, 1, 2, 2), np.float32)
    images[:, 0, 0, 0] = [0.5, 1.0, -0.25]
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([0, 0, 0]))
    return tmp_path


def test_certify_prints_the_radii_of_a_network_of_yours(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The distance to the border x₁ = 0 is |x₁|."""
    monkeypatch.chdir(linear)
    files = ["--weights", "net.safetensors", "--data", "images.npz", "--to", "radii.npz"]
    arguments = ["certify", "classifiers:build", *files, "--plot", "curve.png", "--quiet"]
    assert main([*arguments, "--epsilon", "0", "0.4", "0.9", "1.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2-norm, sound in floating point")
    assert [line.split()[1] for line in lines[2:6]] == ["66.67", "66.67", "33.33", "0.00"]
    assert lines[6:] == ["radii.npz", "curve.png"]
    found = Certificate.load(linear / "radii.npz")
    assert found.sound
    expected = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    assert ((found.radius <= expected) & (found.radius >= 0.999 * expected)).all()
    assert (linear / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in linear.iterdir() if "part" in p.name) == []
    sys.modules.pop("classifiers")


def test_certify_in_real_arithmetic_and_another_norm(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(linear)
    files = ["--weights", "net.safetensors", "--data", "images.npz", "--count", "2", "--quiet"]
    assert main(["certify", "classifiers:build", *files, "--p", "inf", "--real"]) == 0
    assert capsys.readouterr().out.startswith("∞-norm, in real arithmetic, 2 inputs")
    sys.modules.pop("classifiers")


def test_certify_a_network_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "mnist_best", "--count", "100", "--epsilon", "0", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    certificate = certify(
        networks.load("mnist_best"), [tuple(t[:100] for t in mnist()[2:])], (1, 28, 28)
    )
    assert lines[2].split()[1] == f"{100 * certificate.certified_accuracy(0).value:.2f}"


def test_a_network_for_the_infinity_norm_is_certified_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (name, *_) = (n for n in networks.names() if n.startswith("mnist_infinity"))
    assert main(["certify", name, "--count", "20", "--epsilon", "0", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("∞-norm")
    assert main(["certify", name, "--count", "20", "--p", "2", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("2-norm")


def test_a_network_for_colours_is_certified_on_its_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["certify", "cifar10", "--count", "20", "--epsilon", "0", "--quiet"]) == 0
    assert "20 inputs" in capsys.readouterr().out


def test_notebooks_are_copied_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    assert main(["notebooks", str(folder)]) == 0
    book = Path(__file__).parents[1] / "book"
    names = sorted(p.name for p in book.glob("*.ipynb"))
    assert sorted(p.name for p in folder.glob("*.ipynb")) == names
    for name in names:  # an image of a chapter is found from its copy, too
        for image in re.findall(r"\]\((assets/[^)]+)\)", (book / name).read_text("utf-8")):
            assert (folder / image).read_bytes() == (book / image).read_bytes()
    (folder / names[0]).write_text("mine")
    capsys.readouterr()
    assert main(["notebooks", str(folder)]) == 0
    assert f"{folder / names[0]} is there already" in capsys.readouterr().out
    assert (folder / names[0]).read_text() == "mine"


def test_the_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lipbook")
    assert script.load() is main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "group_sizes", "--set", "steps=2"], "--set needs --to"),
        (["reproduce", "group_sizes", "--to", ".", "--set", "step=2"], "one of .*'steps'"),
        (["reproduce", "group_sizes", "--to", ".", "--set", "steps=two"], "expected a number"),
        (["reproduce", "nothing"], "invalid choice: 'nothing'"),
        (["certify", "nothing"], "NETWORK: expected MODULE:FUNCTION or one of .*mnist_best"),
        (["certify", "no_such:build"], "NETWORK: cannot use 'no_such:build': No module"),
        (["certify", "classifiers:no"], "NETWORK: cannot use 'classifiers:no': .*attribute"),
        (
            ["certify", "classifiers:broken"],
            "NETWORK: cannot use 'classifiers:broken': TypeError: ",
        ),
        (["certify", "classifiers:constant"], "constant must be a function, got int"),
        (["certify", "classifiers:number"], "must return a torch.nn.Module, got int"),
        (["certify", "mnist_best", "--weights", "x"], "--weights: only for MODULE:FUNCTION"),
        (["certify", "mnist_best", "--data", "nothing.npz"], "--data: expected 'shipped'"),
        (["certify", "mnist_best", "--data", "classifiers.py"], "--data: expected 'shipped'"),
        (["certify", "mnist_best", "--count", "0"], "--count: expected a number from 1 to 2000"),
        (["certify", "mnist_best", "--count", "1", "--epsilon", "-1"], "--epsilon: epsilon must"),
        (["certify", "classifiers:build", "--weights", "none"], "none"),
        (["certify", "classifiers:wide", "--weights", "net.safetensors"], r"\(2, 5\) in the model"),
        (["certify", "classifiers:build"], "cannot certify classifiers:build on shipped: "),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_commands_are_refused_in_one_line(
    arguments: list[str],
    words: str,
    linear: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(linear)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--quiet"] if arguments else arguments)
    assert ended.value.code == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])
    sys.modules.pop("classifiers", None)


def test_help_lists_every_recipe_with_its_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    text = capsys.readouterr().out
    for name in recipes():
        minutes = records.read(name).facts["seconds"] / 60
        assert f"{name:16} {minutes:3.0f}  " in text


# Each command in a process without a package, from one that has imported torch and no lipbook.
WITHOUT = """
import json, os, sys
import numpy, torch

for package, arguments in json.loads(sys.argv[1]):
    process = os.fork()
    if process == 0:
        sys.stdout.flush()
        with open(package + arguments[0], "w") as told:
            os.dup2(told.fileno(), 2)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None
        code = 0
        try:
            assert "lipbook" not in sys.modules
            from lipbook.cli import main
            main(arguments)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
MISSING = {
    "tqdm": ["certify", "mnist_best", "--count", "1"],
    "safetensors": ["certify", "mnist_best", "--count", "1"],
    "matplotlib": ["certify", "mnist_best", "--count", "1", "--quiet", "--plot", "no/a.png"],
}
HELP = "tqdm", ["reproduce", "--help"]


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and complaints of each of those commands."""
    folder, commands = tmp_path_factory.mktemp("blocked"), [*MISSING.items(), HELP]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(lipbook.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    codes = map(int, re.findall(r"^ended (-?\d+)$", done.stdout, re.MULTILINE))
    names = [package + arguments[0] for package, arguments in commands]
    return {
        name: (code, (folder / name).read_text()) for name, code in zip(names, codes, strict=True)
    }


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_package_is_one_line_with_its_extra(
    package: str, blocked: dict[str, tuple[int, str]]
) -> None:
    code, complaints = blocked[package + "certify"]
    last = complaints.splitlines()[-1]
    assert code == 2
    assert package in last
    assert "pip install 'lipbook[lab]'" in last
    assert "Traceback" not in complaints


def test_a_missing_package_does_not_stop_what_does_not_need_it(
    blocked: dict[str, tuple[int, str]],
) -> None:
    assert blocked["tqdmreproduce"][0] == 0


def test_weights_that_are_not_from_a_file_are_announced(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(linear)
    arguments = ["certify", "classifiers:build", "--data", "images.npz", "--quiet"]
    assert main(arguments) == 0
    assert "without --weights, the network has those that classifiers:build" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--weights", "net.safetensors"]) == 0
    assert capsys.readouterr().err == ""
    sys.modules.pop("classifiers")


def test_records_go_to_the_checkout_or_to_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli._records_folder() == Path("lipbook-records")
    package = tmp_path / "lipbook" / "lab" / "records"
    package.mkdir(parents=True)
    assert cli._records_folder() == Path("lipbook-records")  # as beside an installed package
    (tmp_path / "pyproject.toml").touch()
    assert cli._records_folder().resolve() == package


def test_reproduce_leaves_the_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(group_sizes, "run", lambda *, rows, seed=0: ({"done": True}, {}))
    before = records.read("group_sizes").results
    assert main(["reproduce", "group_sizes", "--quiet"]) == 0
    assert capsys.readouterr().out == "lipbook-records/group_sizes.json\n"
    assert records.read("group_sizes", "lipbook-records").results == {"done": True}
    assert records.read("group_sizes").results == before


def test_the_help_of_certify_shows_a_checkpoint_and_data_of_yours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["certify", "--help"])
    text = capsys.readouterr().out
    assert "load_state_dict(torch.load('checkpoint.pt', weights_only=True))" in text
    assert "numpy.savez('images.npz'" in text


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "lipbook", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"lipbook {lipbook.__version__}\n"
