"""`scripts/chaos`, short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chaos import KINDS, Restart, draw, samples_of


def test_the_seed_decides_the_faults_and_every_round_holds_each_kind() -> None:
    faults = draw(2 * len(KINDS), seed=0)
    assert faults == draw(2 * len(KINDS), seed=0) != draw(2 * len(KINDS), seed=1)
    for part in (faults[: len(KINDS)], faults[len(KINDS) :]):
        assert {fault.kind for fault in part} == set(KINDS)


def test_going_on_from_before_a_complete_checkpoint_is_a_loss() -> None:
    assert Restart(step=8, newest_seen=16).lost
    assert not Restart(step=16, newest_seen=16).lost and not Restart(step=0, newest_seen=0).lost


def test_the_last_step_of_an_epoch_is_smaller() -> None:
    assert [samples_of(steps) for steps in (1, 187, 188, 189)] == [32, 5984, 6000, 6032]


@pytest.mark.slow
def test_chaos_changes_nothing() -> None:
    command = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--faults", "3", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 faults, 3 survived" in ended.stdout and "0 samples missing or repeated" in ended.stdout
    assert "0 complete checkpoints lost" in ended.stdout and "FAILS" not in ended.stdout
