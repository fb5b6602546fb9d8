from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from lipbook.lab import data
from lipbook.lab.data import Mnist, characters, cifar10, mnist

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "lipbook" / "lab" / "digits"
NAMES = list(data.OFFICIAL)

needs_full_set = pytest.mark.skipif(
    not os.environ.get("LIPBOOK_DATA"),
    reason="needs the full MNIST set: name its folder in LIPBOOK_DATA",
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stored() -> dict[str, np.ndarray]:
    with np.load(DIGITS / "mnist.npz", allow_pickle=False) as arrays:
        return dict(arrays)


# The subset that ships


def test_subset_has_the_promised_form() -> None:
    digits = mnist()
    for images, labels, per_class in (
        (digits.train_images, digits.train_labels, 1200),
        (digits.test_images, digits.test_labels, 200),
    ):
        assert images.shape == (10 * per_class, 1, 28, 28)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert labels.shape == (10 * per_class,)
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [per_class] * 10


def test_a_grey_level_becomes_the_float_nearest_to_its_255th() -> None:
    digits, arrays = mnist(), stored()
    nearest = np.array([Fraction(g, 255) for g in range(256)]).astype(np.float64)
    for part in ("train", "test"):
        expected = nearest.astype(np.float32)[arrays[f"{part}_images"]]
        assert np.array_equal(getattr(digits, f"{part}_images").squeeze(1).numpy(), expected)
        assert np.array_equal(getattr(digits, f"{part}_labels"), arrays[f"{part}_labels"])


def test_images_look_like_digits_in_ink_on_paper() -> None:
    digits = mnist()
    border = torch.ones(28, 28, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    assert digits.train_images[:, 0, border].mean() < 0.03  # MNIST's digits fill 20×20 pixels
    assert 0.2 < digits.train_images[:, 0, ~border].mean() < 0.3
    one, zero = (digits.train_images[digits.train_labels == k].mean(0)[0] for k in (1, 0))
    assert one[14, 14] > 0.7  # a stroke through the centre
    assert zero[14, 14] < 0.2  # a hole


def test_indices_are_recorded_in_the_order_of_the_originals() -> None:
    arrays = stored()
    for part, size in (("train", 60_000), ("test", 10_000)):
        index = arrays[f"{part}_index"]
        assert len(index) == len(arrays[f"{part}_labels"])
        assert (np.diff(index) > 0).all()
        assert index[0] >= 0
        assert index[-1] < size


def test_each_call_gives_fresh_tensors() -> None:
    mnist().test_images.fill_(7)
    assert mnist().test_images.max() == 1


def test_the_notice_describes_the_file() -> None:
    content = (DIGITS / "mnist.npz").read_bytes()
    notice = (DIGITS / "NOTICE.md").read_text(encoding="utf-8")
    assert len(content) <= 3_000_000
    assert sha256(content) == data.SUBSET_SHA256
    assert f"{len(content):,} bytes" in notice
    assert sha256(content) in notice
    for _, content_hash in data.OFFICIAL.values():
        assert content_hash in notice
    for words in (
        "Yann LeCun",
        "Corinna Cortes",
        "Burges",
        "creativecommons.org/licenses/by-sa/3.0",
    ):
        assert words in notice


def test_a_damaged_subset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((DIGITS / "mnist.npz").read_bytes())
    content[1_000_000] ^= 1
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mnist.npz").write_bytes(content)
    monkeypatch.setattr(data, "resources", SimpleNamespace(files=lambda package: tmp_path))
    with pytest.raises(ValueError, match="install lipbook again") as error:
        mnist()
    for word in ("mnist.npz", data.SUBSET_SHA256, sha256(content)):
        assert word in str(error.value)


def test_the_text_is_that_of_the_notice_in_three_parts() -> None:
    """Beginnings and ends by heart, sizes of the notice, and nothing lost between the parts."""
    folder = ROOT / "lipbook" / "lab" / "texts"
    content = (folder / "luke_john.txt.bz2").read_bytes()
    notice = " ".join((folder / "NOTICE.md").read_text(encoding="utf-8").split())
    assert len(content) <= 60_000
    for words in (f"{len(content):,} bytes", sha256(content), data.TEXT_SHA256, "public domain"):
        assert words in notice
    text = characters()
    parts = ["".join(text.alphabet[k] for k in part) for part in text[:3]]
    assert parts[0].startswith("forasmuch as many have taken in hand to set forth in order")
    assert parts[1].startswith("in the beginning was the word, and the word was with god")
    assert parts[2].endswith("the books that should be written. amen.\n")
    whole = "".join(parts)
    assert whole == bz2.decompress(content).decode("ascii")
    assert f"{len(whole):,} characters, of which {len(set(whole))}" in notice
    assert text.alphabet == "".join(sorted(set(parts[0])))
    assert 0 <= len(parts[2]) - len(parts[1]) <= 1


def test_the_script_of_the_text_keeps_verses_alone(tmp_path: Path) -> None:
    script, made = ROOT / "tools" / "make_text.py", tmp_path / "text.bz2"
    printed = "\nMatthew 1\n\n  1 The book (of all)\n 23 Behold, 3 men.\n\nMark 1\n\n  1 And\n"
    subprocess.run([sys.executable, str(script), str(made)], input=printed, text=True, check=True)
    text = bz2.decompress(made.read_bytes()).decode("ascii")
    assert text == "the book of all\nbehold, 3 men.\nand\n"


def test_a_damaged_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "luke_john.txt.bz2").write_bytes(bz2.compress(b"another text"))
    monkeypatch.setattr(data, "resources", SimpleNamespace(files=lambda package: tmp_path))
    with pytest.raises(ValueError, match=r"luke_john\.txt\.bz2.*install lipbook again"):
        characters()


def test_repr_is_short() -> None:
    empty = torch.zeros(2, 1)
    expected = (
        "train_images: (2, 1), train_labels: (2, 1), test_images: (2, 1), test_labels: (2, 1)"
    )
    assert repr(Mnist(empty, empty, empty, empty)) == f"Mnist({expected})"


# The full set, in a folder: a small stand-in with hashes of its own


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write four idx files of two training digits and one test digit; return their folder."""
    folder = tmp_path / "server" / "mnist"
    folder.mkdir(parents=True)
    hashes = {}
    for name in NAMES:
        n = 2 if name.startswith("train") else 1
        grey = np.arange(n * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        content = (
            np.array([0x803, n, 28, 28], ">u4").tobytes() + grey
            if "images" in name
            else np.array([0x801, n], ">u4").tobytes() + bytes(range(7, 7 + n))
        )
        compressed = gzip.compress(content, mtime=0)
        (folder / name).write_bytes(compressed)
        hashes[name] = (sha256(compressed), sha256(content))
    monkeypatch.setattr(data, "OFFICIAL", hashes)
    monkeypatch.setenv("LIPBOOK_DATA", str(folder.parent))
    return folder


def check_stand_in(digits: Mnist) -> None:
    assert digits.train_images.shape == (2, 1, 28, 28)
    assert digits.test_images.shape == (1, 1, 28, 28)
    assert digits.train_labels.tolist() == [7, 8]
    assert digits.test_labels.tolist() == [7]
    expected = torch.arange(2 * 784).remainder(256).reshape(2, 1, 28, 28) / 255
    assert torch.equal(digits.train_images, expected)


def test_full_set_from_a_folder(official: Path) -> None:
    check_stand_in(mnist(full=True))


def test_only_the_content_counts_in_a_folder(official: Path) -> None:
    for name in NAMES:
        content = gzip.decompress((official / name).read_bytes())
        (official / name).write_bytes(gzip.compress(content, compresslevel=1, mtime=99))
    check_stand_in(mnist(full=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(official: Path, name: str) -> None:
    (official / name).unlink()
    with pytest.raises(FileNotFoundError, match="unset LIPBOOK_DATA") as error:
        mnist(full=True)
    assert str(official / name) in str(error.value)


def test_a_folder_that_is_a_file_is_named(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPBOOK_DATA", str(official / NAMES[0]))
    with pytest.raises(FileNotFoundError, match="unset LIPBOOK_DATA"):
        mnist(full=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "not gzip", "bad block", "empty"])
def test_a_damaged_file_is_refused(official: Path, name: str, damage: str) -> None:
    path = official / name
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-9],
            "not gzip": b"<html>404</html>",
            "bad block": content[:10] + b"\xff" + content[11:],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match="unset LIPBOOK_DATA") as error:
        mnist(full=True)
    assert str(path) in str(error.value)
    assert data.OFFICIAL[name][1] in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_other_content_is_refused_with_both_hashes(official: Path, name: str) -> None:
    content = bytearray(gzip.decompress((official / name).read_bytes()))
    content[-1] ^= 1
    (official / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="unset LIPBOOK_DATA") as error:
        mnist(full=True)
    for word in (str(official / name), data.OFFICIAL[name][1], sha256(content)):
        assert word in str(error.value)


# The full set, downloaded: from a server on this machine


class RecordingHandler(SimpleHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the stand-in as the only mirror, with an empty cache; yield the requested paths."""
    requested: list[str] = []
    handler = type("Handler", (RecordingHandler,), {"requested": requested})
    server = HTTPServer(("127.0.0.1", 0), partial(handler, directory=str(official.parent)))
    monkeypatch.setattr(data, "MIRRORS", (f"http://127.0.0.1:{server.server_port}/mnist/",))
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("LIPBOOK_DATA")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield requested
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "lipbook" / "mnist"


def test_full_set_is_downloaded_once(mirror: list[str], tmp_path: Path) -> None:
    check_stand_in(mnist(full=True))
    assert sorted(mirror) == sorted(f"/mnist/{name}" for name in NAMES)
    check_stand_in(mnist(full=True))
    assert len(mirror) == len(NAMES)
    assert sorted(path.name for path in cached(tmp_path).iterdir()) == sorted(NAMES)


def test_an_empty_variable_is_no_folder(mirror: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPBOOK_DATA", "")
    check_stand_in(mnist(full=True))


def test_a_damaged_cache_is_mended(mirror: list[str], tmp_path: Path) -> None:
    mnist(full=True)
    (cached(tmp_path) / NAMES[0]).write_bytes(b"half a file")
    check_stand_in(mnist(full=True))
    assert mirror.count(f"/mnist/{NAMES[0]}") == 2


def test_the_second_mirror_steps_in(mirror: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (there,) = data.MIRRORS
    monkeypatch.setattr(data, "MIRRORS", (there.replace("/mnist/", "/gone/"), there))
    check_stand_in(mnist(full=True))
    assert mirror.count(f"/gone/{NAMES[0]}") == 1


def test_another_file_on_the_mirror_is_refused(
    mirror: list[str], official: Path, tmp_path: Path
) -> None:
    shutil.copy(official / NAMES[1], official / NAMES[0])
    found = sha256((official / NAMES[0]).read_bytes())
    with pytest.raises(ConnectionError, match="set LIPBOOK_DATA") as error:
        mnist(full=True)
    for word in (NAMES[0], data.OFFICIAL[NAMES[0]][0], found):
        assert word in str(error.value)
    assert not any(cached(tmp_path).iterdir())


def test_offline_and_absent_says_what_to_do(
    mirror: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:1/mnist/",))  # nobody listens there
    with pytest.raises(ConnectionError) as error:
        mnist(full=True)
    for word in (NAMES[0], data.OFFICIAL[NAMES[0]][0], str(cached(tmp_path)), "127.0.0.1:1/mnist"):
        assert word in str(error.value)
    for remedy in ("Connect to the network", "set LIPBOOK_DATA", "mnist()"):
        assert remedy in str(error.value)


def test_without_pooch_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LIPBOOK_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ModuleNotFoundError, match=r"lipbook\[lab\]"):
        mnist(full=True)


# The full set itself, where it is there


@needs_full_set
def test_full_set_has_the_published_class_counts() -> None:
    full = mnist(full=True)
    assert full.train_images.shape == (60_000, 1, 28, 28)
    assert full.test_images.shape == (10_000, 1, 28, 28)
    assert full.train_labels.bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert full.test_labels.bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    assert full.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert full.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


@needs_full_set
def test_subset_is_the_full_set_at_the_recorded_indices() -> None:
    subset, full, arrays = mnist(), mnist(full=True), stored()
    train, test = arrays["train_index"], arrays["test_index"]
    assert torch.equal(subset.train_images, full.train_images[train])
    assert torch.equal(subset.train_labels, full.train_labels[train])
    assert torch.equal(subset.test_images, full.test_images[test])
    assert torch.equal(subset.test_labels, full.test_labels[test])


@needs_full_set
@pytest.mark.skipif(
    "ng" in zlib.ZLIB_RUNTIME_VERSION, reason="zlib-ng compresses to other bytes than zlib"
)
def test_the_script_makes_the_shipped_file_byte_for_byte(tmp_path: Path) -> None:
    script = ROOT / "tools" / "make_digits.py"
    made = tmp_path / "mnist.npz"
    run = subprocess.run(
        [sys.executable, str(script), str(made)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert made.read_bytes() == (DIGITS / "mnist.npz").read_bytes()
    assert data.SUBSET_SHA256 in run.stdout


# ---------------------------------------------------------------------------------- CIFAR-10


def packed(members: dict[str, bytes], mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins for both archives: seven images, the last of which is the test set."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 3, 32, 32), np.uint8), np.arange(7, dtype=np.uint8)
    images[:] = images[:, :, :1, :1]  # of one colour each, which JPEG keeps
    parts = [[0], [1], [2], [3], [4, 5], [6]]
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    binary = {
        f"cifar-10-batches-bin/{name}": b"".join(
            bytes([labels[i]]) + images[i].tobytes() for i in part
        )
        for name, part in zip(names, parts, strict=True)
    }
    jpegs = {}
    for i, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=75)
        part = "test" if i == 6 else "train"
        jpegs[f"{part}/{data.CIFAR10_CLASSES[i]}/0000.jpg"] = file.getvalue()
    folder = tmp_path / "data"
    (folder / "cifar10").mkdir(parents=True)
    url, lossy = data.CIFAR10_BINARY[0], data.CIFAR10_JPEG[0]
    for path, content, constant, name in (
        (folder / "cifar10" / url.rpartition("/")[2], packed(binary, "w:gz"), "BINARY", url),
        (folder / lossy, packed(jpegs, "w:xz"), "JPEG", lossy),
    ):
        path.write_bytes(content)
        monkeypatch.setattr(data, f"CIFAR10_{constant}", (name, sha256(content)))
    monkeypatch.setenv("LIPBOOK_DATA", str(folder))
    return images, labels


def test_the_official_archive_is_read_pixel_for_pixel(
    colours: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = colours
    found = cifar10()
    assert np.array_equal((found.train_images * 255).numpy(), images[:6])
    assert np.array_equal((found.test_images * 255).numpy(), images[6:])
    assert found.train_labels.tolist() == labels[:6].tolist()
    assert found.test_labels.tolist() == [6]
    assert repr(found) == "CIFAR-10: 6 + 1 images"


def test_the_lossy_copy_is_read_and_named(colours: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = colours
    found = cifar10(jpeg=True)
    assert np.abs((found.train_images * 255).numpy() - images[:6].astype(float)).max() <= 4
    assert found.train_images.shape == (6, 3, 32, 32)
    assert [*found.train_labels.tolist(), *found.test_labels.tolist()] == labels.tolist()
    assert found.name == "CIFAR-10 (JPEG q75)"


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_missing_or_another_archive_is_refused(
    jpeg: bool, colours: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ["LIPBOOK_DATA"])
    path = folder / "cifar10-jpeg.tar.xz" if jpeg else folder / "cifar10/cifar-10-binary.tar.gz"
    path.write_bytes(b"another file")
    with pytest.raises(ValueError, match=f"found {sha256(b'another file')}"):
        cifar10(jpeg)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        cifar10(jpeg)
    monkeypatch.delenv("LIPBOOK_DATA")
    if jpeg:
        with pytest.raises(FileNotFoundError, match="set LIPBOOK_DATA"):
            cifar10(jpeg)


def test_the_official_archive_is_downloaded_where_no_folder_is_named(
    colours: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(os.environ["LIPBOOK_DATA"], "cifar10")
    handler = type("Handler", (RecordingHandler,), {"requested": []})
    server = HTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(data, "CIFAR10_BINARY", (url, data.CIFAR10_BINARY[1]))
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("LIPBOOK_DATA")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert len(cifar10().train_images) == 6
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (tmp_path / "cache" / "lipbook" / "cifar10" / "cifar-10-binary.tar.gz").exists()
