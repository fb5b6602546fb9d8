from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("lipbook", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("lipbook")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)
