"""steps.jsonl as it is written and followed: a line per optimizer step, by rank 0 of one attempt after another."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trainkit.runs.files import write_whole
from trainkit.runs.folder import RunFolder
from trainkit.runs.reading import read_steps, step_of


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
        """Steps in complete new lines. A line that is still being written waits for the next look; damaged ones are left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        yield from filter(None, map(step_of, whole.decode("utf-8", errors="replace").split("\n")))


def keep_steps(folder: RunFolder, done: int) -> list[str]:
    """Take out the steps after `done`, which an earlier attempt took and no checkpoint has kept.

    What follows is a new attempt's. Damaged lines go too: the file with them is kept beside it, which the sentences returned say.
    """
    write_whole(folder.ray / "kept", str(done), durable=False)
    if not folder.steps_path.exists():
        return []
    steps, faults = read_steps(folder.steps_path)
    if faults:
        kept = _free(folder.path / "steps.jsonl.damaged")
        shutil.copyfile(folder.steps_path, kept)
        faults.append(f"the file as it was is kept as {kept}")
    write_whole(folder.steps_path, "".join(json.dumps(step) + "\n" for step in steps if step["step"] <= done))
    return faults


def kept_steps(folder: RunFolder) -> int:
    """How many steps the newest attempt began with."""
    try:
        return int((folder.ray / "kept").read_text("utf-8") or 0)
    except FileNotFoundError:  # not begun, or by an earlier version
        return 0


def _free(path: Path) -> Path:
    """This one, or with the first number behind it that no file has: what was kept before stays."""
    return next(free for number in itertools.count(1) if not (free := Path(f"{path}-{number}" if number > 1 else path)).exists())
