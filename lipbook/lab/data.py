"""Data of the experiments: digits and a text that ship, all of MNIST and CIFAR-10 on demand."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipbook._extras import imported

__all__ = ["Characters", "Cifar10", "Mnist", "characters", "cifar10", "mnist"]

TEXT_SHA256 = "c2f38fba5617cecfb191348bf91652857c177633202b9b7d302a3e3a2133dbf5"
SUBSET_SHA256 = "6f2ad18b0a9a0604b310771dae9ca62fc875f68b78b1ba9cebc5e5504fb39245"

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

CIFAR10_BINARY = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR10_JPEG = (
    "cifar10-jpeg.tar.xz",
    "ee3d6612ae927a78d8ad6e128717f57fc7122eaf5c1fa89de3988d7aacc1b706",
)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


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


class Cifar10(NamedTuple):
    """Training and test images: 32×32 in colour, in [0, 1], and the class of each.

    ``train_images`` and ``test_images`` are float32 of shape (n, 3, 32, 32); ``train_labels`` and
    ``test_labels`` are int64 of shape (n,), from 0 to 9 in the order of ``CIFAR10_CLASSES``.
    ``name`` says which pixels these are; print it beside every number measured on them.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str

    def __repr__(self) -> str:
        return f"{self.name}: {len(self.train_images)} + {len(self.test_images)} images"


def cifar10(jpeg: bool = False) -> Cifar10:
    r"""All of CIFAR-10 (:cite:t:`krizhevsky2009`): the official pixels, or a lossy copy.

    Parameters
    ----------
    jpeg : bool
        Read ``$LIPBOOK_DATA/cifar10-jpeg.tar.xz``, a copy in which every image is a JPEG file of
        quality 75 (18 MB). What is measured on it is not what is published: its ``name`` says so.
        Without it, the official archive: ``$LIPBOOK_DATA/cifar10/cifar-10-binary.tar.gz`` where
        that variable is set, else downloaded once (170 MB, to the user's cache folder). Either
        archive is compared with its SHA-256.

    Returns
    -------
    Cifar10
        50,000 training and 10,000 test images.

    Raises
    ------
    FileNotFoundError
        The archive is missing in the folder that ``LIPBOOK_DATA`` names, or is the copy and there
        is no such folder.
    ValueError
        The archive is damaged or another one; the message has both hashes.
    ConnectionError
        The official archive is not there and cannot be downloaded.
    """
    folder = os.environ.get("LIPBOOK_DATA")
    url, file_hash = CIFAR10_BINARY
    name = url.rpartition("/")[2]
    if jpeg:
        name, file_hash = CIFAR10_JPEG
        if not folder:
            raise FileNotFoundError(
                f"{name}: set LIPBOOK_DATA to the folder that holds it, or call cifar10() for the "
                "official archive"
            )
    if folder:
        path = Path(folder, name) if jpeg else Path(folder, "cifar10", name)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing (its SHA-256: {file_hash})")
    else:
        path = _download(name, file_hash, "cifar10", (url,))
    content = path.read_bytes()
    _check_hash(str(path), content, file_hash, "put the right archive there")
    parts = _decoded_jpegs(content) if jpeg else _decoded_binary(content)
    tensors = []
    for images, labels in parts:
        tensors += [torch.from_numpy(images.astype(np.float32) / np.float32(255)), _labels(labels)]
    name = "CIFAR-10 (JPEG q75)" if jpeg else "CIFAR-10"
    train_images, train_labels, test_images, test_labels = tensors
    return Cifar10(train_images, train_labels, test_images, test_labels, name)


class Characters(NamedTuple):
    """Text as numbers of characters: three parts, and the characters in the order of the numbers.

    ``train``, ``validation`` and ``test`` are int64 of shape (n,), places in ``alphabet``.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    alphabet: str

    def __repr__(self) -> str:
        sizes = (f"{name}: {len(part)}" for name, part in zip(self._fields, self[:3], strict=False))
        return f"Characters({', '.join(sizes)}, alphabet: {len(self.alphabet)})"


def characters() -> Characters:
    r"""Two Gospels in the King James Version, character by character.

    The text ships with the package: lower case, a line a verse, without numbers of verses. Luke is
    there to train on, the first half of John to choose by and the second half to judge by.

    The translation is of 1611, and in the public domain outside the United Kingdom, where the
    Crown has the right to print it. The text is that of Debian's package ``bible-kjv-text``;
    ``lab/texts/NOTICE.md`` says more.

    Returns
    -------
    Characters
        Fresh tensors.

    Raises
    ------
    ValueError
        The file is damaged; the message has both hashes.

    Examples
    --------
    >>> from lipbook.lab.data import characters
    >>> text = characters()
    >>> text
    Characters(train: 134650, validation: 49002, test: 49003, alphabet: 35)
    >>> "".join(text.alphabet[k] for k in text.validation[:29])
    'in the beginning was the word'
    """
    resource = resources.files("lipbook.lab") / "texts" / "luke_john.txt.bz2"
    content = resource.read_bytes()
    _check_hash(str(resource), content, TEXT_SHA256, "install lipbook again")
    text = bz2.decompress(content).decode("ascii")
    alphabet = "".join(sorted(set(text)))
    place = {character: k for k, character in enumerate(alphabet)}
    numbers = torch.tensor([place[character] for character in text])
    john = text.index("in the beginning was the word")
    middle = (john + len(text)) // 2
    train, validation, test = numbers.tensor_split((john, middle))
    return Characters(train.clone(), validation.clone(), test.clone(), alphabet)


Pixels = tuple[np.ndarray, np.ndarray]  # images (n, 3, 32, 32) and labels (n,), uint8


def _decoded_binary(content: bytes) -> list[Pixels]:
    """Each record is one byte of class and 3,072 of pixels, channel by channel."""
    names = [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {Path(member.name).name: member for member in archive}
        data = [
            b"".join(archive.extractfile(members[name]).read() for name in part)  # type: ignore[union-attr]
            for part in names
        ]
    rows = [np.frombuffer(part, np.uint8).reshape(-1, 3073) for part in data]
    return [(part[:, 1:].reshape(-1, 3, 32, 32), part[:, 0]) for part in rows]


def _decoded_jpegs(content: bytes) -> list[Pixels]:
    """Files are named ``train|test/<class>/<number>.jpg``; matplotlib brings the decoder."""
    image_module = imported("PIL.Image")

    found: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if not member.name.endswith(".jpg"):
                continue
            part, kind, _ = Path(member.name).parts
            with image_module.open(io.BytesIO(archive.extractfile(member).read())) as image:  # type: ignore[union-attr]
                found[part][0].append(np.asarray(image).transpose(2, 0, 1))
            found[part][1].append(CIFAR10_CLASSES.index(kind))
    return [(np.stack(images), np.array(labels)) for images, labels in found.values()]


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
        urls = [mirror + name for mirror in MIRRORS]
        path = Path(folder, "mnist", name) if folder else _download(name, file_hash, "mnist", urls)
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


def _download(name: str, file_hash: str, place: str, urls: Sequence[str]) -> Path:
    pooch = imported("pooch", f", or set LIPBOOK_DATA to a folder with {name}")
    folder = Path(pooch.os_cache("lipbook"), place)
    failures = []
    for url in urls:
        try:
            path = pooch.retrieve(url, f"sha256:{file_hash}", name, folder, progressbar=True)
        except (OSError, ValueError) as error:  # no connection; another file than expected
            failures.append(f"  {url}: {error}")
        else:
            return Path(path)
    raise ConnectionError(
        f"{name} (SHA-256 {file_hash}) is not in {folder} and no mirror gave it:\n"
        + "\n".join(failures)
        + "\nConnect to the network and call again, or set LIPBOOK_DATA to a folder that holds "
        f"{place}/{name}, or call mnist() for the digits that ship with lipbook."
    )
