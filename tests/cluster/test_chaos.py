"""`scripts/chaos`, short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos_changes_nothing() -> None:
    command = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--faults", "3", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 faults, 3 survived" in ended.stdout and "0 samples missing or repeated" in ended.stdout
    assert "0 complete checkpoints lost" in ended.stdout and "FAILS" not in ended.stdout
