"""What the chapters need besides mathematics: data sets, a training loop, a plotting style.

The library never imports this package.
"""
