"""Where the time from a command to its first step went: driver and rank 0 note when a piece of it ends.

On one machine workers start beside the pieces after Ray: theirs is what is left then.
Of the newest attempt alone. Clocks of two machines may differ by a little; no piece takes less than nothing.
"""

from __future__ import annotations

import itertools
import json
import time

from trainkit.runs.files import whole_lines
from trainkit.runs.folder import RunFolder

PLAN, RAY, ROWS, DATA, WORKERS = "plan", "Ray", "rows and weights", "operators and feed", "workers"
ENGINE, WARM_UP, FIRST_STEP = "model and engine", "warm-up", "first step"


def begin(folder: RunFolder, began: float) -> None:
    """A new attempt, at `began` seconds since 1970."""
    (folder.ray / "startup.jsonl").write_text(json.dumps({"piece": None, "at": began}) + "\n", "utf-8")


def ended(folder: RunFolder, piece: str) -> None:
    with (folder.ray / "startup.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"piece": piece, "at": time.time()}) + "\n")


def startup_seconds(folder: RunFolder) -> dict[str, float]:
    """By piece, in order; those that ended. A piece that ended more than once counts as often."""
    marks, seconds = whole_lines(folder.ray / "startup.jsonl"), dict[str, float]()
    for before, mark in itertools.pairwise(marks):
        seconds[mark["piece"]] = seconds.get(mark["piece"], 0.0) + max(0.0, mark["at"] - before["at"])
    return seconds
