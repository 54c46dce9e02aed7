"""How long commands have worked on a run, killed ones included: what the time of its steps is compared with (goodput)."""

from __future__ import annotations

import time
from typing import Any

from trainkit.runs.folder import RunFolder


class WorkedTime:
    """Begins with a command and ends with it; a command that was killed ended with its last sign of life in the run folder."""

    def __init__(self, folder: RunFolder, began: float):
        """began: in seconds since 1970. Raises UsageError if the folder cannot be written, or what it says of this cannot be read."""
        self.folder, self.began = folder, began
        said = folder.read_worked()
        self.before = _before(said, folder) if said is not None else None if folder.read_steps() else 0.0
        folder.write_worked({"seconds": self.before, "began": self.began})

    def seconds(self) -> float:
        """0 where it is not known: steps are there of which nobody noted the time around them."""
        return 0.0 if self.before is None else self.before + time.time() - self.began

    def close(self) -> None:
        self.folder.write_worked({"seconds": None if self.before is None else self.seconds(), "began": None})


def _before(said: dict[str, Any], folder: RunFolder) -> float | None:
    if said["began"] is None or said["seconds"] is None:
        return said["seconds"]
    stepped = folder.steps_path.stat().st_mtime if folder.steps_path.exists() else 0.0
    return said["seconds"] + max(0.0, max(stepped, folder.last_sign_seconds()) - said["began"])
