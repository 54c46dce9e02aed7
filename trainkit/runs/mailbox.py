"""What the driver and the workers of one attempt tell each other, as files in `<run>/.ray/`.

    .ray/ranks.json      what the ranks measured last, kept through an attempt that trains no step
    .ray/evaluation.json what the last evaluation found, kept likewise
    .ray/workers-<n>/    all else, of attempt n alone
      job.pickle         for workers of the driver's machine
      probe-<rank>  sign-<rank>.json  phase  note-<hash>  error-<rank>.json  traceback-<rank>.txt      by the workers
      stop  save         by the driver

A worker that outlives its attempt goes on writing to that attempt's folder, where nobody looks any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainkit.errors import UsageError
from trainkit.runs.files import read_json, write_whole

_SHARED_SECONDS = 30.0  # network drives show a new file late


@dataclass(frozen=True)
class WorkerError:
    """What a rank left behind before it raised."""

    time: float  # seconds since 1970: the earliest is the first cause
    rank: int
    step: int  # the last finished optimizer step
    kind: str  # the class's name
    message: str
    facts: dict[str, Any] = field(default_factory=dict)  # of an error of ours, where they are plain values


class Mailbox:
    """Of one attempt, or of the newest one. Making the object touches nothing."""

    def __init__(self, path: str | Path, attempt: int | None = None):
        """attempt: from 1; None: the newest one at the time of each call."""
        self.path, self.attempt = Path(path), attempt
        self.ray = self.path / ".ray"
        self.notes_taken: set[str] = set()

    @property
    def attempt_path(self) -> Path:
        """The attempt's folder, made when it begins; before the first one a path where nothing lies."""
        begun = (int(path.name.rpartition("-")[2]) for path in self.ray.glob("workers-*"))
        return self.ray / f"workers-{self.attempt or max(begun, default=0)}"

    @property
    def job_path(self) -> Path:
        """Where workers of this machine wait for what they are to do (cluster/job.py)."""
        return self.attempt_path / "job.pickle"

    def sign_path(self, rank: int) -> Path:
        """A rank's sign of life (cluster/hangs.py)."""
        return self.attempt_path / f"sign-{rank}.json"

    def last_sign_seconds(self) -> float:
        """When a worker of any attempt last gave a sign of life, in seconds since 1970; 0 if none did."""
        signs = [path for name in ("phase", "sign-*.json") for path in self.ray.glob(f"workers-*/{name}")]
        return max((path.stat().st_mtime for path in signs), default=0.0)

    def write_phase(self, text: str) -> None:
        """What rank 0 is doing, one short line for the person who waits."""
        write_whole(self.attempt_path / "phase", text, durable=False)

    def read_phase(self) -> str:
        try:
            return (self.attempt_path / "phase").read_text("utf-8")
        except FileNotFoundError:
            return ""

    def clear_phase(self) -> None:
        (self.attempt_path / "phase").unlink(missing_ok=True)

    def write_ranks(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """What each rank measured, about once a second and in the last step of an attempt, however it ends."""
        write_whole(self.ray / "ranks.json", json.dumps(ranks), durable=False)

    def read_ranks(self) -> list[dict[str, Any]]:
        """Empty before the first step, and where a power cut left half a file: it is for those who watch."""
        with contextlib.suppress(ValueError):
            return read_json(self.ray / "ranks.json") or []
        return []

    def write_evaluation(self, values: Mapping[str, float]) -> None:
        """What an evaluation found, with its step: an attempt that fails afterwards leaves no outcome."""
        write_whole(self.ray / "evaluation.json", json.dumps(values), durable=False)

    def read_evaluation(self, last_step: int) -> dict[str, float] | None:
        """The last one; None if there was none up to this step, or a power cut left half a file."""
        with contextlib.suppress(ValueError):
            found: dict[str, float] | None = read_json(self.ray / "evaluation.json")
            return found if found is not None and found["step"] <= last_step else None
        return None

    def write_note(self, text: str) -> None:
        """Something that the person who waits shall read, and that ends nothing. Ranks that say the same write the same file."""
        write_whole(self.attempt_path / f"note-{hashlib.sha256(text.encode()).hexdigest()}", text, durable=False)

    def take_notes(self) -> list[str]:
        """Those that this object has not returned before, the oldest first."""
        new = [path for path in self.attempt_path.glob("note-*") if path.name not in self.notes_taken]
        self.notes_taken.update(path.name for path in new)
        return [path.read_text("utf-8") for path in sorted(new, key=lambda path: path.stat().st_mtime_ns)]

    def request_stop(self) -> None:
        """Ask all ranks to end at the same optimizer step."""
        (self.attempt_path / "stop").touch()

    def stop_requested(self) -> bool:
        return (self.attempt_path / "stop").exists()

    def request_save(self) -> None:
        """Ask for a checkpoint soon, beside those that are due."""
        (self.attempt_path / "save").touch()

    def save_requested(self) -> bool:
        return (self.attempt_path / "save").exists()

    def begin_save(self) -> None:
        """What was asked for before now is done by this one."""
        (self.attempt_path / "save").unlink(missing_ok=True)

    def write_error(self, rank: int, step: int, error: BaseException, traceback: str) -> None:
        """Leave a rank's error where the driver finds it, whatever becomes of the process."""
        write_whole(self.traceback_path(rank), traceback)
        facts = {name: value for name, value in getattr(error, "facts", {}).items() if isinstance(value, str | int | float | None)}
        left = WorkerError(time.time(), rank, step, type(error).__name__, getattr(error, "message", None) or str(error), facts)
        write_whole(self.attempt_path / f"error-{rank}.json", json.dumps(asdict(left)))

    def traceback_path(self, rank: int) -> Path:
        return self.attempt_path / f"traceback-{rank}.txt"

    def errors(self) -> list[WorkerError]:
        """What the ranks left behind, the earliest first."""
        found = [WorkerError(**json.loads(path.read_text("utf-8"))) for path in self.attempt_path.glob("error-*.json")]
        return sorted(found, key=lambda error: error.time)

    def check_shared(self, rank: int, world_size: int, together: Callable[[], object]) -> None:
        """Every rank leaves a file and looks for those of the others; `together` is a barrier.

        Raises UsageError where the folder, or another rank's file, is not seen.
        """
        probes = [self.attempt_path / f"probe-{other}" for other in range(world_size)]
        fault = f"this node does not see the run folder {self.path} as the driver does" if not (self.path / "plan.json").is_file() else None
        if fault is None:
            try:
                probes[rank].touch()
            except OSError as error:
                fault = f"this node cannot write the run folder {self.path}: {error.strerror}"
        together()
        deadline = time.monotonic() + _SHARED_SECONDS
        while fault is None and (unseen := [other for other, probe in enumerate(probes) if not probe.exists()]):
            if time.monotonic() > deadline:
                fault = f"it does not see in {self.path} what rank {unseen[0]} wrote there"
            time.sleep(0.1)
        if fault is not None:
            raise UsageError(f"rank {rank} on {socket.gethostname()}: {fault}. run.storage_path must be a folder that all nodes see")
