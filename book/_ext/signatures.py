"""A function that dispatches on its first argument shows its own signature only.

autodoc appends one signature for each registered type; `lipschitz_rule` has one a layer.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect


def setup(app: Sphinx) -> dict[str, Any]:
    inspect.is_singledispatch_function = lambda obj: False
    return {"parallel_read_safe": True}
