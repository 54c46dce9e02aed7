"""Files that other processes read while they are written, lock, or lose: whole or not there, and free when their owner has ended."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from trainkit.errors import UsageError


class Lock:
    """An exclusive flock, held from its making to `release` or the end of the process."""

    def __init__(self, path: Path, wait_seconds: float = 0.0):
        path.parent.mkdir(exist_ok=True)  # a copy of a run may lack what is hidden
        self.file = path.open("a")
        deadline = time.monotonic() + wait_seconds
        while not self._taken():
            if time.monotonic() >= deadline:
                self.file.close()
                raise UsageError(
                    f"{path.parents[1]}: another process works on this run ({path.name}). Wait for it, or give this one another --name"
                )
            time.sleep(0.1)

    def release(self) -> None:
        self.file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def is_locked(path: Path) -> bool:
    """Whether some process holds this Lock. Asking takes it for an instant, shared, so two that ask do not see each other."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_whole(path: Path, text: str, durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part; `durable` waits for the disk."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}")  # several nodes and threads may write the same file
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """None where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines that nothing is counted from, up to the first that is cut off."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # a machine that lost its power leaves anything behind
            break
    return lines


def linked(source: str | Path, target: str | Path) -> None:
    """A hard link where the disk knows them, else a copy: as shutil.copytree's copy_function."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
