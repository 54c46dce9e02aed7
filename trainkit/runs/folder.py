"""The run folder: where it is made, what lies in it, who may write.

    <runs>/<name>/
      recipe.yaml  plan.json  environment.json     resolved, written before training starts
      steps.jsonl                                  one object per optimizer step
      summary.json                                 written at the end, also of a failed run
      tensorboard/  checkpoints/  model/           written by training
      .ray/                                        locks, failures, Ray's own files, what driver and workers tell each other (mailbox.py)

It stands on the lowest floor, so it knows bytes and files and nothing of recipes or plans. A file is complete or not there: written
beside its place, flushed to the disk, then moved.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainkit.errors import UsageError
from trainkit.runs.files import Lock, read_json, whole_lines, write_whole
from trainkit.runs.mailbox import Mailbox
from trainkit.runs.reading import PLAN, SUMMARY, read_object, read_steps

PREDECESSOR_SECONDS = 30.0  # to wait for: a rank 0 whose command was killed went on writing for 1.8 s
LEASE_SECONDS = 120.0  # after which a file server gives up the locks of a node that is gone
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
NAMES = "write up to 128 letters, digits, '.', '_' or '-', and no '.' in front"


def check_name(name: str) -> str:
    """A run's name as it is; raises UsageError for one that could leave the runs folder or hide in it."""
    if NAME.fullmatch(name) is None:
        raise UsageError(f"run name {name!r}: {NAMES}")
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


class RunFolder(Mailbox):
    """One run's folder. Making the object touches nothing; `create` makes the folder."""

    @classmethod
    def create(cls, storage_path: str | Path, stem: str, name: str | None = None, elsewhere: Iterable[str] = ()) -> RunFolder:
        """Make `<storage_path>/<stem>-<n>` with the next free n, also among the runs `elsewhere`, or exactly `<storage_path>/<name>`.

        Raises UsageError if that name exists, is no name, or the runs folder cannot be written.
        """
        storage = check_storage(storage_path, stem, name)
        try:
            folder = cls(_make_numbered(storage, stem, elsewhere) if name is None else _make_named(storage, name))
            folder.ray.mkdir()
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
        """Raises UsageError where it is missing or damaged."""
        return read_object(self.path / "plan.json", PLAN, ())

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write("environment.json", _pretty(environment))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", _pretty(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None while the run has not ended, and of one that was killed. Raises UsageError for a damaged one."""
        path = self.path / "summary.json"
        return read_object(path, SUMMARY, ["status"]) if path.exists() else None

    def write_worked(self, worked: Mapping[str, Any]) -> None:
        """How long commands have worked on this run (runs/worked.py)."""
        self._write(".ray/worked.json", json.dumps(worked))

    def read_worked(self) -> dict[str, Any] | None:
        """None for a run that nobody noted it of. Raises UsageError for a damaged file."""
        try:
            return read_json(self.ray / "worked.json")
        except ValueError:
            raise UsageError(f"{self.ray / 'worked.json'}: damaged, not JSON. Remove it; goodput is unknown then") from None

    # -- steps -----------------------------------------------------------------------------------------------------------------------

    @property
    def steps_path(self) -> Path:
        return self.path / "steps.jsonl"

    def read_steps(self) -> list[dict[str, Any]]:
        """All steps of steps.jsonl; a line cut off by a killed process, or damaged, is left out."""
        return read_steps(self.steps_path)[0]

    # -- attempts --------------------------------------------------------------------------------------------------------------------

    def begin_attempt(self, steps_left: bool = True) -> int:
        """Make the folder of a new attempt, after which nobody reads what earlier ones left there; returns its number, from 1.

        An attempt without steps left measures nothing of them: what the ranks measured before stays.
        """
        (self.path / "summary.json").unlink(missing_ok=True)
        if steps_left:
            (self.ray / "ranks.json").unlink(missing_ok=True)
        self.ray.mkdir(parents=True, exist_ok=True)
        of_ray = (path.name.replace("attempt", "workers") for path in self.ray.glob("attempt-*"))  # an earlier version made these alone
        return int(_make_numbered(self.ray, "workers", of_ray).name.rpartition("-")[2])

    def append_failure(self, failure: Mapping[str, Any]) -> None:
        """How an attempt ended, of any command that worked on this run."""
        with (self.ray / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(failure) + "\n")

    def failures(self) -> list[dict[str, Any]]:
        return whole_lines(self.ray / "failures.jsonl")

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


def _taken(path: Path) -> UsageError:
    return UsageError(f"{path}: this run exists. Go on with --resume, choose another --name, or leave it out for the next free number")


def _pretty(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"


def _unwritable(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or str(error)
    return UsageError(f"{path}: the run folder cannot be written: {reason}. Make room or choose another folder with --runs")
