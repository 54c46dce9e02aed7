"""Which failure was first, and how it is told.

When one rank fails, the others fail after it: their connections break. What the user reads is the first cause. A rank that could still
speak left its error in the run folder; one that was killed left nothing, and Ray alone knows of it.

An error with the fact `from_outside` tells of a process that was ended, not of what it did: after a signal, the signal was the cause.
"""

from __future__ import annotations

import errno
from typing import Any

from ray import exceptions
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, WorkerGroupError

from trainkit import errors
from trainkit.errors import CapacityError, TrainingError, TrainkitError
from trainkit.runs.folder import RunFolder
from trainkit.runs.mailbox import WorkerError

# What gloo, NCCL and torch's watchdog say on a rank whose peer is gone, in lower case.
_PEER_LOST = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket closed"),
    *("closed by remote peer", "ncclremoteerror", "nccl remote", "remote process exited", "communicator was aborted", "watchdog"),
)
_DEATHS = (RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError, exceptions.WorkerCrashedError)
_NO_PLACE = "WorkerGroupStartupTimeoutError"  # Ray keeps the class to itself
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def first_cause(failure: BaseException, folder: RunFolder, world_size: int, oom_kills: int = 0) -> TrainkitError:
    """The error to show for what ended a run. Its kind, message and exit code are those of the rank that failed first.

    oom_kills: processes that the kernel ended meanwhile for want of memory.

    A process that Ray saw die comes before any DistBackendError: NCCL words what happens to the survivors in too many ways to know all.
    """
    if isinstance(failure, TrainkitError):
        return failure
    left = folder.errors()
    dead = {rank: error for rank, error in _worker_failures(failure).items() if _process_died(error)}
    of_its_own = [error for error in left if not _lost_a_peer(error) and not (dead and error.kind == "DistBackendError")]
    silent = sorted(dead) or sorted(set(range(world_size)) - {error.rank for error in left})
    if of_its_own:
        return _told(of_its_own[0], folder)
    if dead or (left and silent):
        return _killed(silent, left, dead, oom_kills)
    if left:
        return _told(left[0], folder)
    return _unknown(failure, folder, world_size)


def rank_error(folder: RunFolder) -> TrainkitError | None:
    """The first error that a rank left of its own; None if there is none: the others' only say that a peer is gone."""
    own = [error for error in folder.errors() if not _lost_a_peer(error)]
    return _told(own[0], folder) if own else None


def _worker_failures(failure: BaseException) -> dict[int, BaseException]:
    return dict(failure.worker_failures) if isinstance(failure, WorkerGroupError) else {}


def _process_died(error: BaseException) -> bool:
    return any(isinstance(link, _DEATHS) for link in _chain(error))


def _lost_a_peer(error: WorkerError) -> bool:
    return any(words in error.message.lower() for words in _PEER_LOST)


def _told(error: WorkerError, folder: RunFolder) -> TrainkitError:
    kind = getattr(errors, error.kind, None)
    if isinstance(kind, type) and issubclass(kind, TrainkitError):
        return kind(error.message, **{"rank": error.rank, "step": error.step} | error.facts)
    where = f"rank {error.rank} failed after step {error.step}" if error.step else f"rank {error.rank} failed before the first step"
    return TrainingError(
        f"{where}: {error.kind}: {error.message.strip()}\nThe whole traceback: {folder.traceback_path(error.rank)}",
        rank=error.rank,
        step=error.step,
        from_outside=_lost_a_peer(error) or _is_rays(error),
    )


def _is_rays(error: WorkerError) -> bool:
    """Whether Ray raised it on the rank: an actor, a node or an object was lost."""
    kind = getattr(exceptions, error.kind, None)
    return isinstance(kind, type) and issubclass(kind, RayError) and kind is not exceptions.OutOfMemoryError  # torch has one of that name


def _killed(silent: list[int], left: list[WorkerError], dead: dict[int, BaseException], oom_kills: int) -> TrainingError:
    """A process that ended without a word: killed by somebody, by the system for want of memory, or crashed in native code."""
    who = f"rank {silent[0]}" if len(silent) == 1 else f"one of the ranks {', '.join(map(str, silent))}" if silent else "a rank"
    step = max((error.step for error in left), default=None)
    when = "" if step is None else f" after step {step}"
    reason = f"\nRay says: {_ray_reason(next(iter(dead.values())))}" if dead else ""
    if oom_kills or any(isinstance(link, exceptions.OutOfMemoryError) for error in dead.values() for link in _chain(error)):
        return errors.OutOfMemory(
            f"the process of {who} was ended{when} for want of host memory.{reason}\n"
            "Write a ZeRO configuration without offload, fewer workers on this node, or a smaller batch.tokens_per_device",
            rank=silent[0] if len(silent) == 1 else None, step=step, device="host",
        )  # fmt: skip
    return TrainingError(
        f"the process of {who} ended{when} without an error of its own: killed by a signal, by the system for want of memory, "
        f"or crashed in native code.{reason}",
        rank=silent[0] if len(silent) == 1 else None,
        step=step,
        from_outside=True,
    )


def _ray_reason(error: BaseException) -> str:
    """The line of Ray's report that tells how the process ended."""
    text = " ".join(str(link) for link in _chain(error))
    for line in text.splitlines():
        if "exit detail" in line.lower() or "exit type" in line.lower() or "memory" in line.lower():
            return line.split(" Some common causes")[0].strip()
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _unknown(failure: BaseException, folder: RunFolder, world_size: int) -> TrainkitError:
    """Ray's own failures, errors of a worker before it had a run folder to write to, and what the driver itself raised."""
    for error in [*_worker_failures(failure).values(), failure]:
        for link in _chain(error):
            if isinstance(link, TrainkitError):
                return link
    if isinstance(failure, ControllerError) and type(failure.controller_failure).__name__ == _NO_PLACE:
        return CapacityError(
            f"scaling: {world_size} workers found no place in time: the nodes are large enough for them, and other jobs hold what they "
            "need (`ray status` shows it). Try again later, ask for less, or set RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S to wait longer",
            no_place=True,
        )
    of_ray = isinstance(failure, WorkerGroupError | ControllerError | RayError)
    error = TrainingError(_words(failure, folder), from_outside=of_ray)
    error.__cause__ = failure
    return error


def _words(failure: BaseException, folder: RunFolder) -> str:
    if isinstance(failure, RayActorError) and not failure.actor_init_failed:  # no rank's: Ray Train's controller, or the node it ran on
        return f"a process of Ray was ended from outside, and the run with it.\nRay says: {_ray_reason(failure)}"
    return _full_disk(failure, folder) or ": ".join(filter(None, [type(failure).__name__, str(failure).strip()]))


def _full_disk(failure: BaseException, folder: RunFolder) -> str | None:
    if not isinstance(failure, OSError) or failure.errno not in _DISK_FULL:
        return None
    place = failure.filename or folder.path
    return f"{place}: {failure.strerror}. Make room there or choose another folder with --runs"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    links: list[BaseException] = []
    following: Any = error
    while isinstance(following, BaseException) and following not in links:
        links.append(following)
        inner = (getattr(following, name, None) for name in ("cause", "__cause__", "_base_exc", "health_check_failure"))
        following = next((link for link in inner if link is not None), None)
    return links
