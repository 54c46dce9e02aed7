"""Shared by all tests: where the optional real data sets and model shapes lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("trainkit", deadline=None, derandomize=True)  # shared machines are noisy; the same cases each time
settings.load_profile("trainkit")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with WikiSQL, MRPC, dialogue data and published model shapes beside the checkout; tests of them are skipped without it."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared with real data and model shapes beside this checkout")
    return folder
