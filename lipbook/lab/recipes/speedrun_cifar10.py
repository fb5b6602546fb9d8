r"""The certified speedrun on CIFAR-10: at 36/255 within 300 processor seconds, on one thread.

The protocol is that of :mod:`lipbook.lab.recipes.speedrun`. The budget is for one training, from
the first weights to the network that is certified, in processor seconds of one thread on the
machine that the record names. Each of the :data:`CANDIDATES` is trained for :data:`SHORT` epochs on
45,000 of the training images and judged on the other 5,000, drawn at random; the one with the best
:func:`~lipbook.lab.evaluation.certified_score` is taken. It is then trained on all 50,000 for
:data:`EPOCHS`, from five seeds, and each network is certified on all 10,000 test images, soundly in
float64, with the norms that it has. Nothing is chosen with them, nothing is stopped early, and no
epoch is picked.

Networks and training are those of :mod:`lipbook.lab.fast_images`: shift convolutions, with products
in bfloat16. The images are a lossy copy (JPEG) of the data set, as ``data`` says; with
``--set jpeg=false`` the official pixels are read.

Published (:cite:t:`li2019preventing`), on the official pixels, after 200 epochs on a GPU:
BCOP-Small, 64.53 % clean and 50.01 % certified; BCOP-Large, 72.41 % and 58.72 %.

What else was seen. Offset and temperature are those of :mod:`lipbook.lab.recipes.cifar10`, where
the offset was moved once with test results known. A first record of this recipe, ten layers of 32,
64 and 128 channels at 16×16, 8×8 and 4×4 pixels, came to 66.0 % and 51.6 % on the test images. The
candidates come from sixteen trials of four epochs each that followed, one seed, judged on the
validation images alone. Two were among the networks tried; the third, which was taken, joins what
helped. Clean and certified accuracy of the first network, in per cent, add up to 109.0 there. What
changed the sum, with times of a busy machine:

- the mean colour taken off: 110.7; shifts by one pixel and not two: 111.3, and so in what follows;
- two layers of 256 channels at 2×2 pixels: 113.6, in half as much time again;
- a third one, and fewer layers at 16×16 and 8×8 pixels, where they take most of the time: 114.1,
  in less than a fifth more time than the first network;
- behind it a layer of 256 units at 1×1: 115.7; with two at 2×2 and four at 1×1 as much;
- instead of it 192 channels at 4×4 and two layers at 2×2: 114.6;
- patches of 4×4 pixels, with no layer at 16×16: 107.5 instead of 110.7, in a fifth less time.

Half a point or less, which is noise, came from one epoch without shifts at the end, a rate of 0.02,
weights that start near the identity, and a quarter of the channels that move instead of half.
Batches of 512 lost a point and a half in so few epochs. With offset 0.5 and temperature 0.15, clean
accuracy gained 0.7 points and certified accuracy lost 1.8.

Then the candidates were judged, and the one that was taken was trained for 18 epochs. The first
seed took 303 seconds on a busy machine, which is too long, so that epochs were set to 16 and all
five seeds were trained anew; the choice was kept. That network had been certified on the test
images, 68.3 % and 56.2 %, and these numbers were known when epochs were set; the reason was the
time. With the first record and this one, the test images have been opened three times.

The aim was 69 % and 56 %: the second number is reached, the first is missed by half a point. In
trials before, whose setting was not kept, such a network came to 69.7 % and 56.7 % on validation
images. Not tried: other momenta, averages of weights, and whether the choice after three epochs is
the best one after sixteen.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipbook.lab.data import Cifar10, cifar10
from lipbook.lab.evaluation import certificate, summary
from lipbook.lab.fast_images import Stage, fit
from lipbook.lab.recipes import Outcome, Rows
from lipbook.lab.recipes.cifar10 import PUBLISHED
from lipbook.lab.recipes.speedrun import timed
from lipbook.lab.recipes.waterfall import halves, spread
from lipbook.lab.records import Record
from lipbook.losses import OffsetCrossEntropyLoss

__all__ = [
    "BUDGET",
    "CANDIDATES",
    "EPOCHS",
    "EPSILON",
    "SEEDS",
    "SHORT",
    "Entry",
    "Setting",
    "entry",
    "judge",
    "row",
    "run",
]

#: Radius at which accuracies are certified.
EPSILON = 36 / 255
#: Processor seconds of a training.
BUDGET = 300
#: Seeds behind each number.
SEEDS = 5
#: Epochs of the trainings that choose.
SHORT = 3
#: Epochs of the training.
EPOCHS = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a training depends on, but for its epochs and seed.

    Parameters
    ----------
    stages : sequence of (int, int, int)
        Channels, stride and layers of each :class:`~lipbook.lab.fast_images.Stage`.
    offset, temperature : float
        Of :func:`lipbook.losses.offset_cross_entropy`.
    lr, batch_size
        As in :func:`lipbook.lab.fast_images.fit`.

    Examples
    --------
    >>> Setting([[32, 2, 2], [64, 2, 4]]).stages
    ((32, 2, 2), (64, 2, 4))
    """

    stages: Sequence[Sequence[int]]
    offset: float = 0.65
    temperature: float = 0.2
    lr: float = 0.03
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))

    def fit(
        self, images: Tensor, labels: Tensor, epochs: int, precision: str, seed: int
    ) -> nn.Sequential:
        """Train a network.

        Parameters
        ----------
        images, labels : torch.Tensor
            To train on.
        epochs, precision, seed
            As in :func:`lipbook.lab.fast_images.fit`.

        Returns
        -------
        torch.nn.Sequential
            That of :func:`lipbook.lab.fast_images.fit`.
        """
        return fit(
            images, labels, stages=[Stage(*stage) for stage in self.stages],
            loss=OffsetCrossEntropyLoss(self.offset, self.temperature), epochs=epochs, lr=self.lr,
            batch_size=self.batch_size, precision=precision, seed=seed,
        )  # fmt: skip


#: Settings that are judged on validation images.
CANDIDATES: tuple[Setting, ...] = (
    Setting(((32, 2, 1), (64, 2, 2), (128, 2, 4), (256, 2, 3), (256, 2, 1))),
    Setting(((32, 2, 1), (64, 2, 2), (128, 2, 4), (256, 2, 2), (256, 2, 4))),
    Setting(((32, 2, 1), (64, 2, 2), (160, 2, 4), (256, 2, 2), (256, 2, 2))),
)


def judge(
    fitted: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    setting: Setting,
    *,
    epochs: int = SHORT,
    precision: str = "bfloat16",
    seed: int = 0,
) -> Outcome:
    """Train on a part of the training images and certify on the rest.

    Parameters
    ----------
    fitted, held_out : pair of torch.Tensor
        Images and labels, to train on and to judge on.
    setting : Setting
        What to judge.
    epochs, precision, seed
        As in :func:`lipbook.lab.fast_images.fit`.

    Returns
    -------
    tuple of dict
        Results: ``setting``, ``epochs``, ``seed``, ``seconds``, ``count`` of the images that
        judged, ``clean`` and ``certified`` accuracy on them, in real arithmetic. No tensors.
    """
    model, seconds = timed(functools.partial(setting.fit, *fitted, epochs, precision, seed))
    found = certificate(model, *held_out, sound=False)
    return _facts(setting, epochs, seed, seconds) | {
        "count": len(held_out[0]),
        "clean": found.certified_accuracy(0).value,
        "certified": found.certified_accuracy(EPSILON).value,
    }, {}


def row(
    data: Cifar10,
    setting: Setting,
    *,
    epochs: int = EPOCHS,
    precision: str = "bfloat16",
    attack: int = 100,
    seed: int = 0,
) -> Outcome:
    """Train on all training images and certify on all test images.

    Parameters
    ----------
    data : Cifar10
        To train and to test on.
    setting : Setting
        That was chosen.
    epochs, precision, seed
        As in :func:`lipbook.lab.fast_images.fit`.
    attack : int
        Test images that are attacked, drawn at random.

    Returns
    -------
    tuple of dict
        Results: ``setting``, ``epochs``, ``seed``, ``seconds``, and ``test``, see
        :func:`~lipbook.lab.evaluation.summary`, in float64. No tensors.
    """
    train = functools.partial(
        setting.fit, data.train_images, data.train_labels, epochs, precision, seed
    )
    model, seconds = timed(train)
    count = len(data.test_images)
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(count))  # classes are in order
    images, labels = data.test_images[mixed].double(), data.test_labels[mixed]
    test = summary(model.double(), images, labels, [EPSILON], attack=attack)
    return _facts(setting, epochs, seed, seconds) | {"test": test}, {}


def _facts(setting: Setting, epochs: int, seed: int, seconds: float) -> dict[str, Any]:
    described = dataclasses.asdict(setting) | {"stages": [list(stage) for stage in setting.stages]}
    return {"setting": described, "epochs": epochs, "seed": seed, "seconds": round(seconds, 2)}


def run(
    *,
    candidates: Sequence[Setting] = CANDIDATES,
    epochs: int = EPOCHS,
    short: int = SHORT,
    seeds: int = SEEDS,
    validation: int = 5000,
    attack: int = 100,
    precision: str = "bfloat16",
    jpeg: bool = True,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a setting and train it from all seeds.

    Parameters
    ----------
    candidates : sequence of Setting
        To choose from.
    epochs, short : int
        Of a training, and of one that chooses.
    seeds : int
        Trainings of the chosen setting.
    validation : int
        How many of the training images, drawn by the seed, choose. Nothing is trained on them.
    attack, precision
        As in :func:`row`.
    jpeg : bool
        As in :func:`lipbook.lab.data.cifar10`.
    seed : int
        The first one.
    rows : Rows, optional
        Keeps finished ones.

    Returns
    -------
    tuple of dict
        Results: ``data``, which pixels; ``budget``; ``epsilon``; ``published``; ``judged``, rows of
        :func:`judge`; ``rows``, those of :func:`row`. No tensors.
    """
    rows, data = rows or Rows(), cifar10(jpeg)
    held_out, fitted = halves(data.train_images, data.train_labels, validation, seed)
    judged = []
    for index, setting in rows.bar([*enumerate(candidates)], "choices"):
        one = functools.partial(
            judge, fitted, held_out, setting, epochs=short, precision=precision, seed=seed
        )
        judged.append(rows.compute(f"judged {index}", one)[0])
    scores = [results["clean"] + results["certified"] for results in judged]
    chosen = candidates[scores.index(max(scores))]
    table = []
    for each in rows.bar(range(seed, seed + seeds), "networks"):
        one = functools.partial(
            row, data, chosen, epochs=epochs, precision=precision, attack=attack, seed=each
        )
        table.append(rows.compute(f"seed {each}", one)[0])
    return {
        "data": data.name,
        "budget": BUDGET,
        "epsilon": EPSILON,
        "published": {name: list(PUBLISHED[name]) for name in ("small", "large")},
        "judged": judged,
        "rows": table,
    }, {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a table says of the recipe.

    Attributes
    ----------
    setting : Setting
    epochs : int
    seeds : tuple of int
        Of the networks behind the numbers.
    seconds : float
        The longest training.
    within : bool
        Whether all trainings took at most the budget.
    clean, certified : tuple of float
        Mean and standard deviation over the seeds, on all test images.
    attacked, certified_of_attacked : float
        Means on the images that were attacked: what withstands, and what is certified.
    """

    setting: Setting
    epochs: int
    seeds: tuple[int, ...]
    seconds: float
    within: bool
    clean: tuple[float, float]
    certified: tuple[float, float]
    attacked: float
    certified_of_attacked: float


def entry(record: Record) -> Entry:
    """Read the numbers of a record of this recipe.

    Parameters
    ----------
    record : lipbook.lab.records.Record
        ``records.read("speedrun_cifar10")``.

    Returns
    -------
    Entry

    Raises
    ------
    ValueError
        There are fewer seeds than five, or one twice, or more than one setting.

    Examples
    --------
    >>> from lipbook.lab import records
    >>> entry(records.read("speedrun_cifar10")).seeds
    (0, 1, 2, 3, 4)
    """
    table: Sequence[Mapping[str, Any]] = record.results["rows"]
    seeds = tuple(sorted({one["seed"] for one in table}))
    settings = {(Setting(**one["setting"]), one["epochs"]) for one in table}
    if len(seeds) < SEEDS or len(seeds) < len(table) or len(settings) > 1:
        raise ValueError(
            f"record {record.name!r}: expected {SEEDS} seeds or more, each once, at one setting, "
            f"got {[one['seed'] for one in table]} at {settings}"
        )
    ((setting, epochs),) = settings
    tests = [one["test"] for one in table]
    seconds = max(one["seconds"] for one in table)
    return Entry(
        setting=setting,
        epochs=epochs,
        seeds=seeds,
        seconds=seconds,
        within=seconds <= record.results["budget"],
        clean=spread([test["clean"] for test in tests]),
        certified=spread([test["certified"][0] for test in tests]),
        attacked=statistics.mean(test["attacked"][0] for test in tests),
        certified_of_attacked=statistics.mean(test["certified_of_attacked"][0] for test in tests),
    )
