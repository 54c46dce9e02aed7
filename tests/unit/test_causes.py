"""Of all the errors that a failing group leaves, the first cause is the one that is told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from trainkit.cluster.causes import first_cause, rank_error
from trainkit.errors import CapacityError, DataError, NonFiniteError, OutOfMemory, TrainingError
from trainkit.runs.folder import RunFolder

PEER_LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:37608: Connection reset by peer")
GROUP = WorkerGroupError("rank 0 and 1 failed", {0: PEER_LOST})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "small")
    folder.begin_attempt()
    return folder


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


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (ActorDiedError(), "the process of rank 1 ended without an error of its own"),
        (
            OutOfMemoryError("Task was killed due to the node running low on memory."),
            "the process of rank 1 was ended for want of host memory",
        ),
    ],
)
def test_a_death_that_ray_saw_in_a_health_check_is_one(folder: RunFolder, death: Exception, words: str) -> None:
    """So Ray Train reports every process that is gone, without raising one from the other."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    gone = WorkerGroupError("", {1: WorkerHealthCheckFailedError("A worker health check failed.", death)})
    cause = first_cause(gone, folder, 4)
    assert words in cause.message and "Ray says: " in cause.message and cause.facts["rank"] == 1


def test_a_group_that_died_before_it_could_write_is_still_told(folder: RunFolder) -> None:
    cause = first_cause(WorkerGroupError("could not start", {0: DataError("no such column")}), folder, 2)
    assert type(cause) is DataError
    cause = first_cause(WorkerGroupError("could not start", {0: ImportError("no module")}), folder, 2)
    assert type(cause) is TrainingError and "could not start" in cause.message


def test_an_error_of_the_driver_is_its_own_cause(folder: RunFolder) -> None:
    error = CapacityError("too few")
    assert first_cause(error, folder, 2) is error


def test_a_bug_of_the_driver_is_told_in_one_line_with_its_traceback_behind_it(folder: RunFolder) -> None:
    bug = ZeroDivisionError("division by zero")
    cause = first_cause(bug, folder, 2)
    assert (type(cause), cause.message, cause.exit_code) == (TrainingError, "ZeroDivisionError: division by zero", 4)
    assert cause.__cause__ is bug and not cause.facts["from_outside"]
    assert first_cause(KeyError(), folder, 2).message == "KeyError"


def test_a_full_disk_names_the_place_and_the_way_out(folder: RunFolder) -> None:
    named = first_cause(OSError(errno.ENOSPC, "No space left on device", "/runs/.cache/tokens"), folder, 2)
    assert named.message == "/runs/.cache/tokens: No space left on device. Make room there or choose another folder with --runs"
    nameless = first_cause(OSError(errno.ENOSPC, "No space left on device"), folder, 2)
    assert nameless.message.startswith(f"{folder.path}: No space left on device")
    assert first_cause(TimeoutError(errno.ETIMEDOUT, "timed out"), folder, 2).message == "TimeoutError: [Errno 110] timed out"


NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:2772, remote process exited or there was a network error, NCCL version 2.21.5",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "socketProgress: Connection closed by remote peer node-2<41424>",
    "NCCL communicator was aborted on rank 0.",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 1800000 milliseconds",
)


@pytest.mark.parametrize("words", NCCL)
def test_what_nccl_says_of_a_lost_peer_points_to_the_rank_that_said_nothing(folder: RunFolder, words: str) -> None:
    folder.write_error(0, 4, RuntimeError(words), "Traceback")
    assert "the process of rank 1 ended after step 4" in first_cause(GROUP, folder, 2).message


def test_a_dead_process_comes_before_whatever_nccl_says_of_it(folder: RunFolder) -> None:
    class DistBackendError(RuntimeError):
        """As torch calls it."""

    folder.write_error(0, 4, DistBackendError("NCCL error: in words of a later version"), "Traceback")
    assert "rank 0 failed after step 4: DistBackendError" in first_cause(GROUP, folder, 2).message
    assert "the process of rank 1 ended" in first_cause(WorkerGroupError("", {1: ActorDiedError()}), folder, 2).message


def test_ranks_that_all_lost_a_peer_and_all_spoke_are_not_called_silent(folder: RunFolder) -> None:
    for rank in (1, 0):
        folder.write_error(rank, 4, RuntimeError(NCCL[-1]), "Traceback")
    assert "rank 1 failed after step 4: RuntimeError: [Rank 0] Watchdog" in first_cause(GROUP, folder, 2).message


@pytest.mark.parametrize(
    ("left", "outside"),
    [(PEER_LOST, True), (ActorDiedError(), True), (ValueError("a bug"), False), (NonFiniteError("NaN"), False)],
)
def test_what_was_ended_from_outside_is_told_apart_from_what_failed(folder: RunFolder, left: Exception, outside: bool) -> None:
    for rank in (0, 1):
        folder.write_error(rank, 4, left, "Traceback")
    assert first_cause(GROUP, folder, 2).facts.get("from_outside", False) is outside


def test_out_of_memory_is_a_failure_of_its_own_though_ray_has_an_error_of_that_name(folder: RunFolder) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch calls it."""

    folder.write_error(0, 4, OutOfMemoryError("CUDA out of memory"), "Traceback")
    assert first_cause(GROUP, folder, 2).facts["from_outside"] is False


def test_a_controller_that_failed_is_ended_from_outside(folder: RunFolder) -> None:
    assert first_cause(ControllerError(RuntimeError("lost")), folder, 2).facts["from_outside"]


def test_a_controller_that_was_ended_is_told_in_a_sentence(folder: RunFolder) -> None:
    died = ActorDiedError()
    died.error_msg = "The actor died unexpectedly.\n\tpid: 4548\nThe actor is dead because its owner has died. Worker exit detail: crash"
    cause = first_cause(died, folder, 2)
    assert cause.message.startswith("a process of Ray was ended from outside") and cause.facts["from_outside"] and cause.__cause__ is died
    assert cause.message.endswith("Worker exit detail: crash") and "pid" not in cause.message


def test_an_actor_that_could_not_be_made_is_told_with_its_reason(folder: RunFolder) -> None:
    broken = RayTaskError("__init__", "FileNotFoundError: manifest.json", FileNotFoundError("manifest.json"))
    cause = first_cause(ActorDiedError(broken), folder, 2)
    assert "manifest.json" in cause.message and "ended from outside" not in cause.message


@pytest.mark.parametrize("by_ray", [True, False])
def test_a_process_that_was_ended_for_want_of_host_memory_is_named_so(folder: RunFolder, by_ray: bool) -> None:
    """By Ray's monitor, which says so, or by the kernel, which counts."""
    folder.write_error(0, 3, PEER_LOST, "Traceback")
    group = WorkerGroupError("rank 1 failed", {1: OutOfMemoryError("memory monitor: 0.95") if by_ray else ActorDiedError()})
    cause = first_cause(group, folder, 2, oom_kills=0 if by_ray else 1)
    assert type(cause) is OutOfMemory and "the process of rank 1 was ended after step 3 for want of host memory" in cause.message
    assert (cause.exit_code, cause.facts) == (3, {"rank": 1, "step": 3, "device": "host"})


def test_what_a_rank_told_comes_before_what_looks_like_a_hang(folder: RunFolder) -> None:
    assert rank_error(folder) is None
    folder.write_error(0, 3, PEER_LOST, "Traceback")
    assert rank_error(folder) is None, "it only says that another one is gone"
    folder.write_error(1, 3, NonFiniteError("step 4: the loss is not finite", step=4), "Traceback")
    assert type(rank_error(folder)) is NonFiniteError


def test_workers_that_found_no_place_in_time_are_a_matter_of_capacity(folder: RunFolder) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    cause = first_cause(ControllerError(WorkerGroupStartupTimeoutError(2)), folder, 2)
    assert type(cause) is CapacityError and "2 workers found no place in time" in cause.message
