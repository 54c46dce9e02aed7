"""The run folder: where it is made, what lies in it, who may write.

    <runs>/<name>/
      recipe.yaml  plan.json  environment.json     resolved, written before training starts
      steps.jsonl                                  one object per optimizer step
      summary.json                                 written at the end, also of a failed run
      tensorboard/  checkpoints/  model/           written by training
      .ray/                                        what driver and workers tell each other: phase, stop, errors/, locks

It stands on the lowest floor, so it knows bytes and files and nothing of recipes or plans. A file is complete or not there: written
beside its place, flushed to the disk, then moved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from trainkit.errors import UsageError
from trainkit.runs.files import Lock, whole_lines, write_whole
from trainkit.runs.reading import read_steps

PREDECESSOR_SECONDS = 30.0  # to wait for: a rank 0 whose command was killed went on writing for 1.8 s
LEASE_SECONDS = 120.0  # after which a file server gives up the locks of a node that is gone
_SHARED_SECONDS = 30.0  # network drives show a new file late
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> str:
    """A run's name as it is; raises UsageError for one that could leave the runs folder or hide in it."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"run name {name!r}: write up to 128 letters, digits, '.', '_' or '-', and no '.' in front")
    return name


def check_storage(storage_path: str | Path, stem: str, name: str | None = None) -> Path:
    """The runs folder, made if need be; raises UsageError if it cannot be written or the run cannot have its name."""
    storage = Path(storage_path).absolute()
    check_name(stem if name is None else name)
    try:
        storage.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=storage) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise _unwritable(storage, error) from None
    if name is not None and (storage / name).exists():
        raise _taken(storage / name)
    return storage


@dataclass(frozen=True)
class WorkerError:
    """What a rank left behind before it raised."""

    time: float  # seconds since 1970: the earliest is the first cause
    rank: int
    step: int  # the last finished optimizer step
    kind: str  # the class's name
    message: str
    facts: dict[str, Any] = field(default_factory=dict)  # of an error of ours, where they are plain values


class RunFolder:
    """One run's folder. Making the object touches nothing; `create` makes the folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.ray = self.path / ".ray"

    @classmethod
    def create(cls, storage_path: str | Path, stem: str, name: str | None = None, elsewhere: Iterable[str] = ()) -> RunFolder:
        """Make `<storage_path>/<stem>-<n>` with the next free n, also among the runs `elsewhere`, or exactly `<storage_path>/<name>`.

        Raises UsageError if that name exists, is no name, or the runs folder cannot be written.
        """
        storage = check_storage(storage_path, stem, name)
        try:
            folder = cls(_make_numbered(storage, stem, elsewhere) if name is None else _make_named(storage, name))
            (folder.ray / "errors").mkdir(parents=True)
        except OSError as error:
            raise _unwritable(storage, error) from None
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    # -- the resolved wish, decision and surroundings ------------------------------------------------------------------------------

    def write_recipe(self, text: str) -> None:
        self._write("recipe.yaml", text)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        self._write("plan.json", _pretty(plan))

    def read_plan(self) -> dict[str, Any]:
        return json.loads((self.path / "plan.json").read_text("utf-8"))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write("environment.json", _pretty(environment))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", _pretty(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None while the run has not ended."""
        return _read_json(self.path / "summary.json")

    def write_worked(self, worked: Mapping[str, Any]) -> None:
        """How long commands have worked on this run (runs/worked.py)."""
        self._write(".ray/worked.json", json.dumps(worked))

    def read_worked(self) -> dict[str, Any] | None:
        """None for a run that nobody noted it of. Raises UsageError for a damaged file."""
        try:
            return _read_json(self.ray / "worked.json")
        except ValueError:
            raise UsageError(f"{self.ray / 'worked.json'}: damaged, not JSON. Remove it; goodput is unknown then") from None

    # -- steps -----------------------------------------------------------------------------------------------------------------------

    @property
    def steps_path(self) -> Path:
        return self.path / "steps.jsonl"

    def read_steps(self) -> list[dict[str, Any]]:
        """All steps of steps.jsonl; a line cut off by a killed process, or damaged, is left out."""
        return read_steps(self.steps_path)[0]

    def keep_steps(self, done: int) -> list[str]:
        """Take out the steps after `done`, which an earlier attempt took and no checkpoint has kept.

        What follows is a new attempt's. Damaged lines go too: the file with them is kept beside it, which the sentences returned say.
        """
        write_whole(self.ray / "kept", str(done), durable=False)
        if not self.steps_path.exists():
            return []
        steps, faults = read_steps(self.steps_path)
        if faults:
            kept = _free(self.path / "steps.jsonl.damaged")
            shutil.copyfile(self.steps_path, kept)
            faults.append(f"the file as it was is kept as {kept}")
        write_whole(self.steps_path, "".join(json.dumps(step) + "\n" for step in steps if step["step"] <= done))
        return faults

    def kept_steps(self) -> int:
        """How many steps the newest attempt began with."""
        try:
            return int((self.ray / "kept").read_text("utf-8") or 0)
        except FileNotFoundError:  # not begun, or by an earlier version
            return 0

    # -- what driver and workers tell each other -------------------------------------------------------------------------------------

    def write_phase(self, text: str) -> None:
        """What rank 0 is doing, one short line for the person who waits."""
        write_whole(self.ray / "phase", text, durable=False)

    def read_phase(self) -> str:
        try:
            return (self.ray / "phase").read_text("utf-8")
        except FileNotFoundError:
            return ""

    def write_ranks(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """What each rank measured, about once a second and in the last step of an attempt, however it ends."""
        write_whole(self.ray / "ranks.json", json.dumps(ranks), durable=False)

    def read_ranks(self) -> list[dict[str, Any]]:
        """Empty before the first step, and where a power cut left half a file: it is for those who watch."""
        with contextlib.suppress(ValueError):
            return _read_json(self.ray / "ranks.json") or []
        return []

    def write_note(self, text: str) -> None:
        """Something that the person who waits shall read, and that ends nothing."""
        write_whole(self.ray / "note", text, durable=False)

    def take_note(self) -> str:
        """The newest one that nobody took yet."""
        try:
            text = (self.ray / "note").read_text("utf-8")
        except FileNotFoundError:
            return ""
        (self.ray / "note").unlink()
        return text

    def begin_attempt(self, steps_left: bool = True) -> int:
        """Forget what an earlier attempt left behind for the driver; returns the new attempt's number, from 1.

        An attempt without steps left measures nothing of them: what the ranks measured before stays.
        """
        shutil.rmtree(self.ray / "errors", ignore_errors=True)
        (self.ray / "errors").mkdir(parents=True)
        names = ["stop", "save", "phase", "sign-*.json", "job-*", *(["ranks.json"] if steps_left else [])]
        for old in itertools.chain.from_iterable(self.ray.glob(name) for name in names):
            old.unlink(missing_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        return 1 + sum(1 for _ in self.ray.glob("attempt-*"))

    def job(self, attempt: int) -> Path:
        """Where workers of this machine wait for what they are to do (cluster/job.py)."""
        return self.ray / f"job-{attempt}.pickle"

    def append_failure(self, failure: Mapping[str, Any]) -> None:
        """How an attempt ended, of any command that worked on this run."""
        with (self.ray / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(failure) + "\n")

    def failures(self) -> list[dict[str, Any]]:
        return whole_lines(self.ray / "failures.jsonl")

    def request_stop(self) -> None:
        """Ask all ranks to end at the same optimizer step."""
        (self.ray / "stop").touch()

    def stop_requested(self) -> bool:
        return (self.ray / "stop").exists()

    def request_save(self) -> None:
        """Ask for a checkpoint soon, beside those that are due."""
        (self.ray / "save").touch()

    def save_requested(self) -> bool:
        return (self.ray / "save").exists()

    def begin_save(self) -> None:
        """What was asked for before now is done by this one."""
        (self.ray / "save").unlink(missing_ok=True)

    def write_error(self, rank: int, step: int, error: BaseException, traceback: str) -> None:
        """Leave a rank's error where the driver finds it, whatever becomes of the process."""
        write_whole(self.traceback_path(rank), traceback)
        facts = {name: value for name, value in getattr(error, "facts", {}).items() if isinstance(value, str | int | float | None)}
        left = WorkerError(time.time(), rank, step, type(error).__name__, getattr(error, "message", None) or str(error), facts)
        write_whole(self.ray / "errors" / f"rank-{rank}.json", _pretty(asdict(left)))

    def check_shared(self, attempt: int, rank: int, world_size: int, together: Callable[[], object]) -> None:
        """Every rank leaves a file and looks for those of the others; `together` is a barrier.

        Raises UsageError where the folder, or another rank's file, is not seen.
        """
        probes = [self.ray / f"probe-{attempt}-{other}" for other in range(world_size)]
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

    def traceback_path(self, rank: int) -> Path:
        return self.ray / "errors" / f"rank-{rank}.txt"

    def errors(self) -> list[WorkerError]:
        """What the ranks left behind, the earliest first."""
        found = [WorkerError(**json.loads(path.read_text("utf-8"))) for path in (self.ray / "errors").glob("rank-*.json")]
        return sorted(found, key=lambda error: error.time)

    def lock(self, owner: str, wait_seconds: float = 0.0) -> Lock:
        """Hold this folder as `owner` ("driver", "rank-0"), who are two locks: both are free when a run has really ended.

        The lock goes with the process, however it ends. Raises UsageError if somebody else holds it after `wait_seconds`.
        """
        return Lock(self.ray / f"lock-{owner}", wait_seconds)

    def _write(self, name: str, text: str) -> None:
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise _unwritable(self.path, error) from None


class StepLog:
    """steps.jsonl, written by rank 0 alone: one object per optimizer step, handed to the system line by line."""

    def __init__(self, folder: RunFolder):
        self.file: IO[str] = folder.steps_path.open("a", encoding="utf-8", buffering=1)

    def append(self, step: Mapping[str, Any]) -> None:
        """NaN and infinities are written as Python's json writes them."""
        self.file.write(json.dumps(step) + "\n")

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if not self.file.closed:
            os.fsync(self.file.fileno())
            self.file.close()


class StepTail:
    """Reads what was appended to steps.jsonl since the last look."""

    def __init__(self, folder: RunFolder):
        self.path, self.position = folder.steps_path, 0

    def new_steps(self) -> Iterator[dict[str, Any]]:
        """Complete new lines. One that is still being written waits for the next look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)


def _make_numbered(storage: Path, stem: str, elsewhere: Iterable[str]) -> Path:
    names = [*(path.name for path in storage.iterdir()), *elsewhere]
    taken = [int(match[1]) for name in names if (match := re.fullmatch(re.escape(stem) + r"-(\d+)", name))]
    number = max(taken, default=0) + 1
    while True:
        path = storage / f"{stem}-{number}"
        try:
            path.mkdir()
        except FileExistsError:  # another command was faster
            number += 1
        else:
            return path


def _make_named(storage: Path, name: str) -> Path:
    path = storage / name
    try:
        path.mkdir()
    except FileExistsError:
        raise _taken(path) from None
    return path


def _free(path: Path) -> Path:
    """This one, or with the first number behind it that no file has: what was kept before stays."""
    return next(free for number in itertools.count(1) if not (free := Path(f"{path}-{number}" if number > 1 else path)).exists())


def _taken(path: Path) -> UsageError:
    return UsageError(f"{path}: this run exists. Go on with --resume, choose another --name, or leave it away for the next free number")


def _read_json(path: Path) -> Any:
    """None where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


def _pretty(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"


def _unwritable(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or str(error)
    return UsageError(f"{path}: the run folder cannot be written: {reason}. Make room or choose another folder with --runs")
