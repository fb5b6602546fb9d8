"""Random changes of images that keep their class, for :func:`lipbook.lab.training.train`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["distorted", "shifted_and_flipped"]


def distorted(
    images: Tensor, rng: np.random.Generator, shift: float = 0.5, strength: float = 0.05
) -> Tensor:
    r"""Shift, rotate, shear and stretch each image a little, by bilinear interpolation.

    Pixel :math:`u` of the result is the image at :math:`A u + t`, where :math:`t` is uniform in
    :math:`[-\text{shift}, \text{shift}]^2` pixels and

    .. math::
        A = \begin{pmatrix} (1 + a)\cos\varphi & b - \sin\varphi \\
        \sin\varphi & (1 + c)\cos\varphi\end{pmatrix}

    with :math:`\varphi, b` uniform in :math:`\pm` strength and :math:`a, c` in :math:`\pm 0.7`
    strength. What comes from outside the image is 0.

    Parameters
    ----------
    images : torch.Tensor
        (batch, c, h, w) with h = w.
    rng : numpy.random.Generator
        Draws the changes.
    shift : float
        In pixels.
    strength : float
        In radians.

    Returns
    -------
    torch.Tensor
        Like ``images``.

    Examples
    --------
    >>> images = torch.rand(2, 1, 8, 8)
    >>> rng = np.random.default_rng(0)
    >>> bool((distorted(images, rng, 0.0, 0.0) - images).abs().max() < 1e-5)
    True
    """
    n = len(images)
    angle, shear = rng.uniform(-strength, strength, (2, n))
    stretch = 1 + 0.7 * rng.uniform(-strength, strength, (2, n))
    maps = np.zeros((n, 2, 3))
    maps[:, 0, 0], maps[:, 0, 1] = stretch[0] * np.cos(angle), shear - np.sin(angle)
    maps[:, 1, 0], maps[:, 1, 1] = np.sin(angle), stretch[1] * np.cos(angle)
    maps[:, :, 2] = rng.uniform(-shift, shift, (n, 2)) * 2 / images.shape[-1]
    theta = torch.from_numpy(maps).to(images)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def shifted_and_flipped(images: Tensor, rng: np.random.Generator, shift: int = 2) -> Tensor:
    r"""Shift each image by whole pixels, and mirror every second one on average.

    Parameters
    ----------
    images : torch.Tensor
        (batch, c, h, w).
    rng : numpy.random.Generator
        Draws the changes.
    shift : int
        Largest shift in pixels, up, down, left and right. What comes from outside is 0.

    Returns
    -------
    torch.Tensor
        Like ``images``.

    Examples
    --------
    >>> images = torch.rand(100, 3, 4, 4)
    >>> changed = shifted_and_flipped(images, np.random.default_rng(0), shift=0)
    >>> same, mirrored = (changed == x for x in (images, images.flip(3)))
    >>> bool((same.flatten(1).all(1) | mirrored.flatten(1).all(1)).all())
    True
    """
    n, _, height, width = images.shape
    flip = torch.from_numpy(rng.random(n) < 0.5).to(images.device)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (shift,) * 4)
    down, right = torch.from_numpy(rng.integers(0, 2 * shift + 1, (2, n))).to(images.device)
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    batch = torch.arange(n, device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
