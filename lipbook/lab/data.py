"""The handwritten digits of the experiments: a subset that ships, the full set on demand."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Mnist", "mnist"]

SUBSET_SHA256 = "dbc9144f028ac88e4f70e1c05dd19786cf65c1f1d00fa40d7f2c0ac2d303c735"

# The official files: the hash of the file as published, and the hash of its content.
OFFICIAL = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class Mnist(NamedTuple):
    """Training and test digits: 28×28 grey images in [0, 1] and the digit that each one shows.

    ``train_images`` and ``test_images`` are float32 of shape (n, 1, 28, 28), where 0 is paper and
    1 is ink; ``train_labels`` and ``test_labels`` are int64 of shape (n,), from 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __repr__(self) -> str:
        sizes = (f"{name}: {tuple(value.shape)}" for name, value in self._asdict().items())
        return f"Mnist({', '.join(sizes)})"


def mnist(full: bool = False) -> Mnist:
    r"""Real handwritten digits, pixel for pixel those of MNIST.

    Without an argument, the subset that ships with the package: 12,000 training digits
    (1,200 of each class) and 2,000 test digits (200 of each class), drawn once without
    replacement from the training and the test set and kept in the order of the originals.
    It needs no network. A grey level :math:`g \in \{0, \dots, 255\}` becomes :math:`g / 255`;
    nothing is centred or scaled further, so that distances are in units of one pixel's range.

    MNIST (:cite:t:`lecun1998`) is by Y. LeCun, C. Cortes and C. Burges and is made available
    under the licence `CC BY-SA 3.0 <https://creativecommons.org/licenses/by-sa/3.0/>`_; so is
    the subset.

    Parameters
    ----------
    full : bool
        Give all 60,000 training and 10,000 test digits. They are read from
        ``$LIPBOOK_DATA/mnist/*.gz`` where the environment variable ``LIPBOOK_DATA`` names a
        folder, else downloaded once (11 MB, to the user's cache folder). Either way the content
        is compared with the SHA-256 of the official files.

    Returns
    -------
    Mnist
        Fresh tensors: float32 images of shape (n, 1, 28, 28) and int64 labels of shape (n,).

    Raises
    ------
    FileNotFoundError
        A file is missing in the folder that ``LIPBOOK_DATA`` names.
    ValueError
        A file is damaged or is not the official one; the message has both hashes.
    ConnectionError
        The full set is not there and cannot be downloaded.

    Examples
    --------
    >>> from lipbook.lab.data import mnist
    >>> digits = mnist()
    >>> digits
    Mnist(train_images: (12000, 1, 28, 28), train_labels: (12000,),
          test_images: (2000, 1, 28, 28), test_labels: (2000,))
    >>> digits.train_labels.bincount().tolist() == [1200] * 10
    True
    >>> digits.test_labels.bincount().tolist() == [200] * 10
    True
    >>> [bound.item() for bound in digits.train_images.aminmax()]
    [0.0, 1.0]
    """
    arrays = _official() if full else _subset()
    return Mnist(*(_images(a) if a.ndim == 3 else _labels(a) for a in arrays))


def _images(grey: np.ndarray) -> Tensor:  # (n, 28, 28) uint8 -> (n, 1, 28, 28) float32
    return torch.from_numpy(grey.astype(np.float32) / np.float32(255)).unsqueeze(1)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _subset() -> list[np.ndarray]:
    resource = resources.files("lipbook.lab") / "digits" / "mnist.npz"
    content = resource.read_bytes()
    _check_hash(str(resource), content, SUBSET_SHA256, "install lipbook again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return [arrays[name] for name in Mnist._fields]


def _official() -> list[np.ndarray]:
    folder = os.environ.get("LIPBOOK_DATA")
    arrays = []
    for name, (file_hash, content_hash) in OFFICIAL.items():
        path = Path(folder, "mnist", name) if folder else _download(name, file_hash)
        content = _decompress(path, content_hash)
        header, shape = (16, (-1, 28, 28)) if "images" in name else (8, (-1,))
        arrays.append(np.frombuffer(content, np.uint8, offset=header).reshape(shape))
    return arrays


def _decompress(path: Path, content_hash: str) -> bytes:
    remedy = (
        "put the official file there, or unset LIPBOOK_DATA to download it, "
        "or call mnist() for the subset that ships with lipbook"
    )
    try:
        content = gzip.decompress(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is missing (SHA-256 of its content: {content_hash}): {remedy}"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): expected gzip data whose content has the "
            f"SHA-256 {content_hash}: {remedy}"
        ) from error
    _check_hash(f"content of {path}", content, content_hash, remedy)
    return content


def _check_hash(what: str, content: bytes, expected: str, remedy: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{what}: expected SHA-256 {expected}, found {found}: {remedy}")


def _download(name: str, file_hash: str) -> Path:
    try:
        import pooch  # noqa: PLC0415 - only a download needs it
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "mnist(full=True) downloads with pooch: pip install 'lipbook[lab]', "
            "or set LIPBOOK_DATA to a folder with the files mnist/*.gz"
        ) from None
    folder = Path(pooch.os_cache("lipbook"), "mnist")
    failures = []
    for mirror in MIRRORS:
        try:
            path = pooch.retrieve(
                mirror + name, f"sha256:{file_hash}", name, folder, progressbar=True
            )
        except (OSError, ValueError) as error:  # no connection; another file than expected
            failures.append(f"  {mirror}{name}: {error}")
        else:
            return Path(path)
    raise ConnectionError(
        f"{name} (SHA-256 {file_hash}) is not in {folder} and no mirror gave it:\n"
        + "\n".join(failures)
        + "\nConnect to the network and call again, or set LIPBOOK_DATA to a folder that holds "
        f"mnist/{name}, or call mnist() for the subset that ships with lipbook."
    )
