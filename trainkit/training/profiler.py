"""A trace of some optimizer steps, on request (`train.profile`): a file per rank that ui.perfetto.dev or chrome://tracing opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainkit.recipe.schema import Profile


class NoProfiler:
    """Nothing was asked for."""

    def begins(self, step: int, piece: str) -> None: ...
    def is_last(self, step: int) -> bool:
        """Whether the trace is written when this step is over, which takes a while."""
        return False

    def ends(self, step: int) -> None: ...
    def close(self) -> None: ...


class Profiler(NoProfiler):
    """Traces the CPU and the GPU of one rank; each piece of work of a step is a range of the trace, called as it is."""

    def __init__(self, window: Profile, path: Path, device: torch.device):
        """path: of the trace, which ends in .json.gz"""
        self.window, self.path = window, path
        kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profile = torch.profiler.profile(activities=kinds)
        self.running = False
        self.range: Any = None

    def begins(self, step: int, piece: str) -> None:
        """Called at the beginning of every piece of work of a step."""
        if self.window.start <= step < self.window.start + self.window.steps:
            self._start()
            self._end_range()
            self.range = torch.profiler.record_function(f"step {step}: {piece}")
            self.range.__enter__()

    def is_last(self, step: int) -> bool:
        return self.running and step == self.window.start + self.window.steps - 1

    def ends(self, step: int) -> None:
        """Called after a step, before an evaluation or a checkpoint, which is no part of it; between steps of the window it is traced."""
        self._end_range()
        if self.is_last(step):
            self._write()

    def close(self) -> None:
        """A window that the run's end cuts off is written as well."""
        self._end_range()
        if self.running:
            self._write()

    def _start(self) -> None:
        if not self.running:
            self.profile.start()
            self.running = True

    def _end_range(self) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None

    def _write(self) -> None:
        self.running = False
        self.profile.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.path))
