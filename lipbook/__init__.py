"""Lipschitz networks: the mathematics of the book, as tested PyTorch.

The modules are laid out like the chapters and import each other downwards only:

``jacobians`` and ``norms`` know nothing of the others, ``composition`` stands on both,
and ``lab`` holds what the chapters need besides mathematics: data, training, plots.
"""

__version__ = "0.1.0"
