"""Packages that only some calls need: who lacks one is told its extra, and nothing is written."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lipbook._extras import EXTRAS, imported
from lipbook.export import export_onnx, load_weights, save_weights
from lipbook.lab import records
from lipbook.lab.training import train
from lipbook.robustness import Certificate
from lipbook.tightness import lipsdp_bound
from lipbook.wasserstein import fit_critic

NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
CRITIC = nn.Linear(3, 1)
CLOUDS = torch.rand(2, 8, 3)
DIGITS = torch.rand(8, 3), torch.arange(8) % 2
CERTIFICATE = Certificate(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, 1]), 2, False)

# What needs each package, called with a path that may be written.
CALLS: dict[str, list[Callable[[Path], object]]] = {
    "cvxpy": [lambda path: lipsdp_bound(NET, (3,), solver="SCS")],
    "matplotlib": [lambda path: CERTIFICATE.plot()],
    "onnx": [lambda path: export_onnx(NET, path, (3,))],
    "onnxruntime": [lambda path: export_onnx(NET, path, (3,))],
    "onnxscript": [lambda path: export_onnx(NET, path, (3,))],
    "safetensors": [
        lambda path: save_weights(NET, path),
        lambda path: load_weights(NET, path),
        lambda path: records.read("mnist_best").tensors,
    ],
    "tqdm": [
        lambda path: train(NET, *DIGITS, epochs=1, lr=0.1, progress=True),
        lambda path: fit_critic(CRITIC, *CLOUDS, steps=1, lr=0.1, progress=True),
    ],
}
CASES = [(package, k) for package, calls in CALLS.items() for k in range(len(calls))]


@pytest.mark.parametrize(("package", "k"), CASES)
def test_who_lacks_a_package_is_told_its_extra(
    package: str, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = f"{package} is not installed: pip install 'lipbook[{EXTRAS[package]}]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        CALLS[package][k](tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_broken_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxscript.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxscript", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_dependency'"):
        imported("onnxscript")


def test_the_figures_of_the_chapters_name_the_extra() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import lipbook.lab.plots"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "matplotlib is not installed: pip install 'lipbook[lab]'" in found.stderr


def test_every_optional_package_has_its_extra() -> None:
    lines = importlib.metadata.requires("lipbook") or []
    for package, extra in EXTRAS.items():
        distribution = {"PIL": "matplotlib"}.get(package, package)  # which brings Pillow
        (*_,) = found = [line for line in lines if re.match(rf"{distribution}\b", line)]
        assert any(f"extra == '{extra}'" in line.replace('"', "'") for line in found), package
