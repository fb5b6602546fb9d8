from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("lipbook", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("lipbook")


@pytest.hookimpl(tryfirst=True)  # before they are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the fixture of a browser is run by ``make pages``."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)
