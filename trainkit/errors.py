"""What can go wrong, as one tree. The command's exit code stands in the class.

    TrainkitError
    ├── RecipeError        2   the recipe or the ZeRO file is wrong: every fault at once
    ├── UsageError         2   an option, a run name or a folder is wrong
    ├── DataError          2   the data, the tokenizer or the model folder is wrong
    ├── CapacityError      3   it does not fit, or the cluster has too few GPUs or CPUs
    │   └── DoesNotFit         the plan's model states exceed the device's memory
    ├── TrainingError      4   training started and failed
    │   ├── NonFiniteError     a loss or gradient is NaN or infinite, or DeepSpeed skipped the step
    │   ├── OutOfMemory        3   a GPU or a host has no memory left: it does not fit
    │   ├── PlanMismatch       the engine applies something else than the plan says
    │   ├── ExportMismatch     the exported model is not the trained one
    │   └── CaptureError       CUDA could not make a graph of forward and backward
    └── Interrupted      130   Ctrl-C, SIGTERM

Each error carries its facts as keyword arguments and as attributes, and survives pickling (Ray sends errors between processes;
an exception with several positional arguments would come out as another one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def first_line(error: BaseException) -> str:
    """Of an error of a library, for a message that tells the rest itself; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainkitError(Exception):
    """Base of all errors a user can meet: `message` says what happened, where, and what to do."""

    exit_code = 4

    def __init__(self, message: str, **facts: Any):
        super().__init__(message)
        self.message = message
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(kind: type[TrainkitError], message: str, facts: dict[str, Any]) -> TrainkitError:
    return kind(message, **facts)


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a file: where it stands and what to write instead.

    `line` counts from 1; None where the fault has no line (a missing key of the top level, an option).
    """

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class RecipeError(TrainkitError):
    """All faults of a recipe and of its ZeRO configuration, in the order of their lines."""

    exit_code = 2

    def __init__(self, message: str = "", *, faults: tuple[Fault, ...] = (), **facts: Any):
        super().__init__(message or "\n".join(str(fault) for fault in faults), faults=tuple(faults), **facts)
        self.faults: tuple[Fault, ...] = tuple(faults)


class UsageError(TrainkitError):
    exit_code = 2


class DataError(TrainkitError):
    exit_code = 2


class CapacityError(TrainkitError):
    exit_code = 3


class DoesNotFit(CapacityError):
    """Facts: device, memory_bytes, fitting."""


class TrainingError(TrainkitError):
    exit_code = 4


class NonFiniteError(TrainingError):
    """Facts: step, rank, what."""


class OutOfMemory(TrainingError):
    """Facts: rank, step, device ("GPU" or "host")."""

    exit_code = 3


class PlanMismatch(TrainingError):
    """Facts: what, planned, applied."""


class ExportMismatch(TrainingError):
    """Facts: what."""


class CaptureError(TrainingError):
    """Of one rank, whose CUDA is in disorder afterwards."""


class Interrupted(TrainkitError):
    exit_code = 130
