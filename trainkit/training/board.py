"""TensorBoard: the contract's tags, written by rank 0. The other ranks have a silent board."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trainkit.training.meters import StepRecord
from trainkit.units import gib


class Board(Protocol):
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, stall_seconds: float) -> None: ...
    def close(self) -> None: ...


class SilentBoard:
    """Of ranks other than 0."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, stall_seconds: float) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars over optimizer steps, in <run>/tensorboard. `done`: steps that stay when a run is resumed; later points are hidden."""

    def __init__(self, folder: Path, use_gpu: bool, done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), flush_secs=10, purge_step=done + 1 if folder.exists() else None)
        self.use_gpu = use_gpu

    def step(self, record: StepRecord) -> None:
        for tag, value in self._scalars(record).items():
            self.writer.add_scalar(tag, value, record.step)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"eval/{name}", value, step)

    def checkpoint(self, step: int, stall_seconds: float) -> None:
        self.writer.add_scalar("time/checkpoint_stall_seconds", stall_seconds, step)

    def close(self) -> None:
        self.writer.close()

    def _scalars(self, record: StepRecord) -> dict[str, float]:
        scalars = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.lr,
            "throughput/samples_per_second": record.samples / record.seconds,
            "throughput/tokens_per_second": record.tokens / record.seconds,
            "time/step_seconds": record.seconds,
            "time/data_wait_fraction": record.data_wait_seconds / record.seconds,
        }
        for rank, (peak, reserved) in enumerate(zip(record.peak_bytes, record.reserved_bytes, strict=True)):
            if self.use_gpu:
                scalars[f"memory/peak_allocated_gib/rank_{rank}"] = gib(peak)
                scalars[f"memory/peak_reserved_gib/rank_{rank}"] = gib(reserved)
            else:
                scalars[f"memory/peak_rss_gib/rank_{rank}"] = gib(peak)
        return scalars
