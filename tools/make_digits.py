"""Draw the digits that ship with lipbook from the full MNIST set.

    LIPBOOK_DATA=FOLDER python tools/make_digits.py [OUTPUT]

FOLDER holds ``mnist/*.gz``; without LIPBOOK_DATA the official files are downloaded. The same
full set gives the same digits, and with the same zlib the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

from lipbook.lab.data import mnist

TRAIN_PER_CLASS = 1200
TEST_PER_CLASS = 200
SEED = 0
DESTINATION = Path(__file__).parents[1] / "lipbook" / "lab" / "digits" / "mnist.npz"


def balanced_indices(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `per_class` positions of each class without replacement, in the order of the file."""
    drawn = [
        rng.choice(np.flatnonzero(labels == digit), per_class, replace=False) for digit in range(10)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int32)


def grey_levels(images: Tensor) -> np.ndarray:
    """Return the bytes 0 to 255 that the images in [0, 1] were made of."""
    return np.rint(images.squeeze(1).numpy() * 255).astype(np.uint8)


def subset() -> dict[str, np.ndarray]:
    """Draw the subset: uint8 images and labels, and the indices they have in the full set."""
    full = mnist(full=True)
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for part, images, labels, per_class in (
        ("train", full.train_images, full.train_labels, TRAIN_PER_CLASS),
        ("test", full.test_images, full.test_labels, TEST_PER_CLASS),
    ):
        index = balanced_indices(labels.numpy(), per_class, rng)
        arrays[f"{part}_images"] = grey_levels(images[index])
        arrays[f"{part}_labels"] = labels[index].numpy().astype(np.uint8)
        arrays[f"{part}_index"] = index
    return arrays


# Note [npz by hand]
# numpy.savez_compressed deflates, and leaves the archive's header to the platform. LZMA is a sixth
# smaller, and numpy reads it as well. A fixed date and a fixed system make the file repeatable.
def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz archive whose bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # Unix, wherever this runs
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(member, content.getvalue(), zipfile.ZIP_LZMA)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the digits that ship with lipbook.")
    parser.add_argument("output", nargs="?", type=Path, default=DESTINATION)
    output: Path = parser.parse_args(arguments).output
    write_npz(output, subset())
    content = output.read_bytes()
    print(f"{output}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
