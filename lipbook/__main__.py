"""``python -m lipbook``: the command ``lipbook``, where scripts are not on the path."""

import sys

from lipbook.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
