"""Of all the errors that a failing group leaves, the first cause is the one that is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from trainkit.cluster.causes import first_cause
from trainkit.errors import CapacityError, DataError, NonFiniteError, TrainingError
from trainkit.runs.folder import RunFolder

PEER_LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:37608: Connection reset by peer")
GROUP = WorkerGroupError("rank 0 and 1 failed", {0: PEER_LOST})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "small")


def test_an_error_of_ours_keeps_its_class_message_and_exit_code(folder: RunFolder) -> None:
    folder.write_error(1, 4, NonFiniteError("step 5: the loss of rank 1 is not finite", step=5, rank=1), "Traceback")
    folder.write_error(0, 4, PEER_LOST, "Traceback")
    cause = first_cause(GROUP, folder, 2)
    assert type(cause) is NonFiniteError and cause.message == "step 5: the loss of rank 1 is not finite"
    assert (cause.exit_code, cause.facts) == (4, {"rank": 1, "step": 5})


def test_the_first_cause_wins_whatever_its_rank(folder: RunFolder) -> None:
    folder.write_error(3, 9, ValueError("first"), "Traceback")
    folder.write_error(0, 9, ValueError("second"), "Traceback")
    cause = first_cause(GROUP, folder, 4)
    assert type(cause) is TrainingError and "rank 3 failed after step 9: ValueError: first" in cause.message
    assert str(folder.traceback_path(3)) in cause.message


def test_a_lost_connection_points_to_the_rank_that_said_nothing(folder: RunFolder) -> None:
    folder.write_error(0, 4, PEER_LOST, "Traceback")
    cause = first_cause(GROUP, folder, 2)
    assert "the process of rank 1 ended after step 4 without an error of its own: killed by a signal" in cause.message
    assert cause.exit_code == 4


def test_a_process_that_ray_saw_die_is_named(folder: RunFolder) -> None:
    folder.write_error(0, 4, PEER_LOST, "Traceback")
    died = WorkerGroupError("", {0: PEER_LOST, 2: ActorDiedError()})
    cause = first_cause(died, folder, 4)
    assert "the process of rank 2 ended" in cause.message and "Ray says: The actor died" in cause.message


def test_a_group_that_died_before_it_could_write_is_still_told(folder: RunFolder) -> None:
    cause = first_cause(WorkerGroupError("could not start", {0: DataError("no such column")}), folder, 2)
    assert type(cause) is DataError
    cause = first_cause(WorkerGroupError("could not start", {0: ImportError("no module")}), folder, 2)
    assert type(cause) is TrainingError and "could not start" in cause.message


def test_an_error_of_the_driver_is_its_own_cause(folder: RunFolder) -> None:
    error = CapacityError("too few")
    assert first_cause(error, folder, 2) is error


def test_a_bug_of_the_driver_is_not_dressed_up(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        first_cause(ZeroDivisionError(), folder, 2)
