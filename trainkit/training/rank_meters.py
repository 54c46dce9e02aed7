"""What one rank measures of itself: seconds and bytes of a step's pieces, and what its GPU says.

Nothing here waits for the GPU. Marks are events on its stream, read when the step is over; bytes are the allocator's own counts; the
GPU's sensors are asked by a thread.
"""

from __future__ import annotations

import contextlib
import math
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from trainkit.planning.flops import Work
from trainkit.training.states import Held

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
_SENSOR_SECONDS = 1.0


@dataclass(frozen=True)
class RankNumbers:
    """One rank's numbers of one step, as all ranks gather them. On a CPU the bytes are the process's resident set, without categories."""

    tokens: int  # real ones
    padded_tokens: int
    flops: float  # of the model on the real tokens
    data_wait_seconds: float
    # Peaks count from the process's start to the end of this step: the building of the engine, the steps, and evaluations and checkpoints
    # between them; not an evaluation after the last step, nor the export and what is measured on it.
    peak_bytes: int  # allocated
    peak_reserved_bytes: int  # by torch's allocator
    allocated_bytes: int  # now, after the step
    reserved_bytes: int
    host_bytes: int  # resident set of the process
    parameter_bytes: int  # of the device, like the following ones
    optimizer_bytes: int
    gradient_bytes: int  # after a step's last backward, at most so far
    activation_bytes: int  # what a forward left for its backward, at most so far
    other_bytes: int  # what else stays between two steps
    gpu_utilization: float  # share of the last second in which a kernel ran; like the following ones NaN where no GPU says it
    gpu_watts: float
    gpu_celsius: float


class Stopwatch:
    """The pieces of one step on one rank, from now on: their seconds, and the bytes that they leave on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]
        self.base_bytes = self.last_bytes = self._allocated()
        self.activation_bytes = self.gradient_bytes = 0

    def lap(self, piece: str) -> None:
        """A piece ends here; the same name may come several times."""
        self.marks.append((piece, self._now()))
        allocated = self._allocated()
        if piece == FORWARD:
            self.activation_bytes = max(self.activation_bytes, allocated - self.last_bytes)
        elif piece == BACKWARD:
            self.gradient_bytes = allocated - self.base_bytes
        self.last_bytes = allocated

    def runs_on(self) -> bool:
        """Whether the GPU has not come to the end of the last piece yet."""
        return self.device.type == "cuda" and not self.marks[-1][1].query()

    def seconds(self) -> dict[str, float]:
        """By piece. On a GPU: of its stream, and only once the step is over there."""
        total: dict[str, float] = {}
        for (_, before), (piece, after) in zip(self.marks, self.marks[1:], strict=False):
            total[piece] = total.get(piece, 0.0) + self._between(before, after)
        return total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


class RankMeters:
    """Puts together a rank's numbers. Close it at the end."""

    def __init__(self, device: torch.device, held: Callable[[], Held], flops: Callable[[Work], float]):
        """held: asked after each step until one was applied: then the optimizer has its states."""
        self.device, self.flops, self._ask_held = device, flops, held
        self.held, self.whole = Held(), False
        self.gradient_bytes = self.activation_bytes = 0
        self.process = psutil.Process()
        self.sensors = Sensors(device) if device.type == "cuda" else NoSensors()

    def numbers(self, work: Work, padded_tokens: int, data_wait_seconds: float, stopwatch: Stopwatch, applied: bool) -> RankNumbers:
        """Of the step that has just ended. applied: the optimizer changed the weights (fp16 skips steps)."""
        stays = self.held.total  # of what was there before this step
        if not self.whole:
            self.held, self.whole = self._ask_held(), applied
        self.gradient_bytes = max(self.gradient_bytes, self.held.gradients + stopwatch.gradient_bytes)
        self.activation_bytes = max(self.activation_bytes, self.held.activations, stopwatch.activation_bytes)
        resident = self.process.memory_info().rss
        peak, peak_reserved, allocated, reserved = device_bytes(self.device, self.process)
        utilization, watts, celsius = self.sensors.last
        return RankNumbers(
            tokens=work.tokens,
            padded_tokens=padded_tokens,
            flops=self.flops(work),
            data_wait_seconds=data_wait_seconds,
            peak_bytes=peak,
            peak_reserved_bytes=peak_reserved,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            host_bytes=resident,
            parameter_bytes=self.held.parameters,
            optimizer_bytes=self.held.optimizer,
            gradient_bytes=self.gradient_bytes,
            activation_bytes=self.activation_bytes,
            other_bytes=stopwatch.base_bytes - stays if stays else 0,
            gpu_utilization=utilization,
            gpu_watts=watts,
            gpu_celsius=celsius,
        )

    def close(self) -> None:
        self.sensors.close()


def device_bytes(device: torch.device, process: psutil.Process) -> tuple[int, int, int, int]:
    """(peak allocated, peak reserved, allocated, reserved) of the GPU; of a CPU the peak and the current resident set, each twice."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        names = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "allocated_bytes.all.current", "reserved_bytes.all.current")
        peak, peak_reserved, allocated, reserved = (int(stats.get(name, 0)) for name in names)
        return peak, peak_reserved, allocated, reserved
    resident, peak = process.memory_info().rss, peak_resident_bytes()
    return peak, peak, resident, resident


def peak_resident_bytes() -> int:
    """Of this process since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class NoSensors:
    """Of a CPU, or where NVML gives nothing."""

    last = (math.nan, math.nan, math.nan)

    def close(self) -> None: ...


class Sensors(NoSensors):
    """Utilization (0 to 1), power in W and temperature in °C of one GPU, asked once a second by a thread; NaN what it does not say."""

    def __init__(self, device: torch.device):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(str(torch.cuda.get_device_properties(device).uuid),), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join(_SENSOR_SECONDS)

    def _watch(self, uuid: str) -> None:
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):  # no driver library here, or a part of a GPU
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            asked: tuple[Callable[[], float], ...] = (
                lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
                lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                lambda: float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
            )
            while not self.ended.wait(_SENSOR_SECONDS):
                utilization, watts, celsius = (_or_nan(one, pynvml.NVMLError) for one in asked)
                self.last = utilization, watts, celsius


def _or_nan(ask: Callable[[], float], refused: type[Exception]) -> float:
    try:
        return ask()
    except refused:
        return math.nan
