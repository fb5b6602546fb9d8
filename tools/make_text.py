"""Make lipbook/lab/texts/luke_john.txt.bz2 from what Debian's program `bible` prints.

Usage: bible -l100000 luke1:1-john21:25 | python tools/make_text.py luke_john.txt.bz2
(packages bible-kjv and bible-kjv-text). A line a verse, in lower case, without headings, numbers
of verses and parentheses.
"""

from __future__ import annotations

import bz2
import re
import sys
from pathlib import Path


def verses(printed: str) -> str:
    """Give the verses of what is printed, a line each."""
    found = re.findall(r"^ *\d+ (.*)$", printed, flags=re.MULTILINE)
    return "".join(re.sub(r"[()]", "", verse).strip().lower() + "\n" for verse in found)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(bz2.compress(verses(sys.stdin.read()).encode("ascii")))
