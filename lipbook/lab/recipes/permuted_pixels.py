r"""Digits as sequences of single pixels: 196 steps, in reading order or in a fixed random one.

Digits of 14 × 14 pixels, each half the sum of four of 28 × 28: a certificate of the sequence is one
of the digit. Networks, loss, attack and choice of the rate are those of
:mod:`~lipbook.lab.recipes.pixel_digits`, for states of 63 entries. Training is short: 4 epochs over
3,000 digits, 96 steps of Adam. Of every twentieth test digit an attack is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from lipbook.lab.recipes import Outcome, Rows, pixel_digits

__all__ = ["NETWORKS", "VIEWS", "run"]

#: Networks, as the page shows them.
NETWORKS = ("lossless, all", "orthogonal", "LSTM")
#: Orders of the pixels.
VIEWS = ("pixels", "permuted")


def run(
    *,
    views: Sequence[str] = VIEWS,
    names: Sequence[str] = NETWORKS,
    rates: Sequence[float] = pixel_digits.RATES,
    seeds: int = pixel_digits.SEEDS,
    train_count: int = 3000,
    validation: int = 1000,
    attacked: int = 20,
    seed: int = 0,
    rows: Rows | None = None,
) -> Outcome:
    """Choose a rate for each network and order, then train it from all seeds.

    Parameters
    ----------
    views, names, rates, seeds, train_count, validation, attacked, seed, rows
        As in :func:`lipbook.lab.recipes.pixel_digits.run`.

    Returns
    -------
    tuple of dict
        Results as there. No tensors.
    """
    return pixel_digits.run(
        views=views, names=names, rates=rates, seeds=seeds, train_count=train_count,
        validation=validation, attacked=attacked, seed=seed, rows=rows,
    )  # fmt: skip
