"""How long commands have worked on a run, killed ones included: what the time of its steps is compared with (goodput)."""

from __future__ import annotations

import time
from typing import Any

from trainkit.runs.folder import RunFolder


class WorkedTime:
    """Begins with a command and ends with it; a command that was killed ended with its last sign of life in the run folder."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.before = _before(folder.read_worked() or {"seconds": 0.0, "began": None}, folder)
        self.began = time.time()
        folder.write_worked({"seconds": self.before, "began": self.began})

    def seconds(self) -> float:
        return self.before + time.time() - self.began

    def close(self) -> None:
        self.folder.write_worked({"seconds": self.seconds(), "began": None})


def _before(said: dict[str, Any], folder: RunFolder) -> float:
    if said["began"] is None:
        return said["seconds"]
    signs = [folder.steps_path, folder.ray / "phase", *folder.ray.glob("sign-*.json")]
    return said["seconds"] + max(0.0, max((path.stat().st_mtime for path in signs if path.exists()), default=0.0) - said["began"])
