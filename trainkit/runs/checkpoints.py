"""Checkpoints as files: which are complete, which may go, how one is written so that no kill leaves half of it looking whole.

    <run>/checkpoints/step-000100/
      <files of every rank>              what they hold is training/checkpoint.py's business
      .part-<attempt>-<rank>.json        a rank's list of its files, once they are on the disk; gone when the manifest is there
      manifest.json                      last: every file with its size and sha256, and the facts of the checkpoint

A checkpoint is complete exactly when its manifest is there and holds. Ranks need no talk to commit: rank 0 waits for the lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainkit.errors import TrainingError, UsageError
from trainkit.runs.files import write_whole

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a name in a manifest cannot leave the checkpoint's folder
_LOOK_SECONDS = 0.05
_HASHED_AT_ONCE = 1 << 22
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that may be a complete checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        step = step_of(self.path.name)
        assert step is not None
        return step

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the checkpoint beside its files. Raises UsageError if it cannot be read."""
        return self._manifest()["facts"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name to {"bytes": size, "sha256": digest}. Raises UsageError if the manifest cannot be read."""
        return self._manifest()["files"]

    def is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def check(self) -> None:
        """Compare every file with the manifest. Raises UsageError naming the first that is missing, torn or another one."""
        files, step = self.files, self.facts.get("step")
        if step != self.step:
            raise self._broken(f"it is that of step {step}: its folder was renamed")
        for name, said in files.items():
            if _FILE.fullmatch(name) is None:
                raise self._broken(f"its manifest names {name!r}, which is no file of a checkpoint")
            size = self._read(name, _size)
            if size is None:
                raise self._broken(f"{name} is missing")
            if size != said["bytes"]:
                raise self._broken(f"{name} has {size:,} bytes, the manifest says {said['bytes']:,}")
        with ThreadPoolExecutor() as threads:
            for name, digest in zip(files, threads.map(lambda name: self._read(name, sha256), files), strict=True):
                if digest != files[name]["sha256"]:
                    raise self._broken(f"{name} is not what was written: its sha256 differs from the manifest's")

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text("utf-8"))
            files, facts = manifest["files"], manifest["facts"]
            if not isinstance(facts, dict) or not isinstance(files, dict) or not files:
                raise ValueError
            if not all(isinstance(said["bytes"], int) and said["sha256"] for said in files.values()):
                raise ValueError
        except FileNotFoundError:
            raise self._broken("it has no manifest") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise self._broken("its manifest cannot be read") from None
        return manifest

    def _read(self, name: str, look: Callable[[Path], T]) -> T:
        try:
            return look(self.path / name)
        except OSError as error:  # a disk that gives a file back no more, another's file, a name too long
            raise self._broken(f"{name} cannot be read: {error.strerror or error}") from None

    def _broken(self, why: str) -> UsageError:
        return UsageError(f"{self.path}: this checkpoint cannot be used: {why}")


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Of a folder called so; None for one that is no checkpoint's."""
    match = _STEP.fullmatch(name)
    return None if match is None else int(match[1])


def complete(run: Path) -> list[Checkpoint]:
    """Checkpoints with a manifest, the newest first. Their files are not looked at."""
    found = [Checkpoint(path) for path in _folders(run)]
    return sorted((it for it in found if it.is_complete()), key=lambda it: -it.step)


def newest_sound(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files hold; those that do not are told of, and left as they are. None if there is none."""
    for found in complete(run):
        try:
            found.check()
        except UsageError as error:
            tell(error.message)
        else:
            return found
    return None


def clear_incomplete(run: Path) -> None:
    """Remove what a killed save left. Only who holds the run's lock may."""
    for path in _folders(run):
        if not Checkpoint(path).is_complete():
            shutil.rmtree(path, ignore_errors=True)


def set_aside(run: Path, after: int) -> list[Path]:
    """Rename the complete checkpoints after a step, which do not hold: what is saved anew gets their places. Returns the new names."""
    aside = []
    for it in complete(run):
        if it.step > after:
            aside.append(it.path.with_name(f"broken-{it.path.name}"))
            shutil.rmtree(aside[-1], ignore_errors=True)
            it.path.rename(aside[-1])
    return aside


def prune(run: Path, keep: int, best: int | None = None, newest: int | None = None) -> None:
    """Remove all complete checkpoints but the newest `keep` and that of step `best`; never the only one.

    newest: the step just saved. What lies after it did not hold when the run went on from before it: it takes no sound one's place.
    """
    for old in [it for it in complete(run) if newest is None or it.step <= newest][max(1, keep) :]:
        if old.step != best:
            remove(old)


def remove(checkpoint: Checkpoint) -> None:
    """It loses its manifest first: what is removed by halves is not complete."""
    (checkpoint.path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint.path, ignore_errors=True)


def write_part(folder: Path, attempt: str, rank: int, names: Iterable[str]) -> None:
    """Say that these files of a rank are whole: each is flushed to the disk and hashed, then the list is put there."""
    files = {}
    for name in names:
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_whole(_part(folder, attempt, rank), json.dumps(files))


def commit(
    folder: Path, attempt: str, world_size: int, facts: Mapping[str, Any], seconds: float, given_up: Callable[[], bool] = lambda: False
) -> bool:
    """Wait for the lists of all ranks, then put the manifest there; False if the wait was given up.

    Raises TrainingError if a list does not come in time.
    """
    deadline = time.monotonic() + seconds
    parts = [_part(folder, attempt, rank) for rank in range(world_size)]
    while missing := [rank for rank, part in enumerate(parts) if not part.exists()]:
        if given_up():
            return False
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{folder}: rank {missing[0]} has not written its part of the checkpoint within {seconds:.0f} s. Is "
                "run.storage_path a folder that all nodes see?",
                rank=missing[0],
            )
        time.sleep(_LOOK_SECONDS)
    files: dict[str, Any] = {}
    for part in parts:
        files |= json.loads(part.read_text("utf-8"))
    _flush_folder(folder)
    write_whole(folder / MANIFEST, json.dumps({"files": files, "facts": facts}, indent=2) + "\n")
    _flush_folder(folder)
    _flush_folder(folder.parent)
    for part in parts:
        part.unlink(missing_ok=True)
    return True


def sha256(path: Path) -> str:
    """Hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    return None if path.is_symlink() or not path.is_file() else path.stat().st_size


def _part(folder: Path, attempt: str, rank: int) -> Path:
    return folder / f".part-{attempt}-{rank}.json"


def _folders(run: Path) -> Sequence[Path]:
    root = run / "checkpoints"
    return (
        [path for path in root.iterdir() if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()] if root.is_dir() else []
    )


def _flush_folder(folder: Path) -> None:
    """Names in a folder reach the disk apart from the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
