"""The files of a run folder, read and checked before anybody reckons with them: what is damaged is told with the file's name.

A line of steps.jsonl that is no step is left out and named; all who read steps read them here, so that all count the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainkit.errors import UsageError

WAY_OUT = ". Leave this run out"


class Kind(Protocol):
    """What a value may be; as text, in the words of a message."""

    def holds(self, value: object) -> bool: ...


@dataclass(frozen=True)
class _One:
    types: type | tuple[type, ...]
    words: str

    def holds(self, value: object) -> bool:
        """True and false are whole numbers in Python alone."""
        return isinstance(value, self.types) and (self.types is bool or not isinstance(value, bool))

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class _OrNull:
    kind: Kind

    def holds(self, value: object) -> bool:
        return value is None or self.kind.holds(value)

    def __str__(self) -> str:
        return f"{self.kind} or null"


@dataclass(frozen=True)
class _Choice:
    words: tuple[str, ...]

    def holds(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return " or ".join(self.words)


@dataclass(frozen=True)
class _Each:
    """A list, or an object, whose items are all of one kind."""

    container: type
    kind: Kind

    def holds(self, value: object) -> bool:
        if not isinstance(value, list | dict) or not isinstance(value, self.container):
            return False
        return all(self.kind.holds(item) for item in (value.values() if isinstance(value, dict) else value))

    def __str__(self) -> str:
        return f"{'a list' if self.container is list else 'an object'} with {self.kind} in each place"


@dataclass(frozen=True)
class _Object:
    kinds: Mapping[str, Kind]
    needed: Collection[str]

    def holds(self, value: object) -> bool:
        return isinstance(value, dict) and fault_of(value, self.kinds, self.needed) is None

    def __str__(self) -> str:
        return f"an object with {', '.join(f'{name}: {kind}' for name, kind in self.kinds.items())}"


FLAG, WHOLE, NUMBER, TEXT = _One(bool, "true or false"), _One(int, "a whole number"), _One((int, float), "a number"), _One(str, "text")
NUMBERS, PEAKS = _Each(dict, NUMBER), _Each(list, NUMBER)
SUMMARY: Mapping[str, Kind] = {
    "status": _Choice(("completed", "failed", "interrupted")),
    "steps": WHOLE,
    **dict.fromkeys(("epochs", "train_loss", "samples_per_second", "tokens_per_second", "mfu"), _OrNull(NUMBER)),
    **dict.fromkeys(("seconds", "wall_seconds"), NUMBER),
    "peak_memory_gib": _OrNull(PEAKS),
    "eval": _OrNull(NUMBERS),
    "error": _OrNull(_Object({"kind": TEXT, "message": TEXT}, ["message"])),
}
PLAN: Mapping[str, Kind] = {
    **dict.fromkeys(("recipe_name", "device_name", "precision"), TEXT),
    **dict.fromkeys(("world_size", "samples_per_step", "total_steps", "zero_stage"), WHOLE),
    **dict.fromkeys(("use_gpu", "offload_optimizer", "offload_param"), FLAG),
    **dict.fromkeys(("rows", "expected_peak_bytes"), _OrNull(NUMBER)),
    "memory": _OrNull(_Object({"device": NUMBERS, "device_at_step": NUMBER}, ["device", "device_at_step"])),
}
ENVIRONMENT: Mapping[str, Kind] = {
    **dict.fromkeys(("python", "platform"), TEXT),
    "packages": _Each(dict, TEXT),
    "cpu_count": WHOLE,
    "gpus": _Each(list, TEXT),
    "git_commit": _OrNull(TEXT),
}
_STEP: Mapping[str, Kind] = {
    "step": WHOLE,
    **dict.fromkeys(("loss", "samples", "tokens", "seconds"), NUMBER),
    "data_wait_seconds": NUMBER,
    "mfu": _OrNull(NUMBER),
    "peak_memory_gib": PEAKS,
    "piece_seconds": NUMBERS,
}
_OF_EVERY_STEP = ("step", "loss", "samples", "tokens", "seconds")


def fault_of(values: Mapping[str, Any], kinds: Mapping[str, Kind], needed: Collection[str]) -> str | None:
    """The first key that is missing though needed, or is of another kind, in words."""
    for key in needed:
        if key not in values:
            return f"it has no {key}"
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            return f"{key} is {json.dumps(values[key])}, and not {kind}"
    return None


def read_object(path: Path, kinds: Mapping[str, Kind], needed: Collection[str]) -> dict[str, Any]:
    """A JSON file. Raises UsageError where it cannot be read, is damaged, lacks a needed key, or holds a value of another kind."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: damaged: not JSON: {error}{WAY_OUT}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged: no object in braces{WAY_OUT}")
    fault = fault_of(value, kinds, needed)
    if fault is not None:
        raise UsageError(f"{path}: damaged, or of another version of trainkit: {fault}{WAY_OUT}")
    return value


def read_steps(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps in a steps.jsonl, and a sentence for each line that is none and was left out.

    A last line without its end is being written, or its process was killed: that is no damage. A run without the file took no step.
    """
    if not path.is_file():
        return [], []
    steps: list[dict[str, Any]] = []
    faults = []
    for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        step = _step(line)
        if step is None:
            faults.append(f"{path.name}:{number} is damaged and left out")
        elif steps and step["step"] <= steps[-1]["step"]:
            faults.append(f"{path.name}:{number} holds step {step['step']} after step {steps[-1]['step']} and is left out")
        else:
            steps.append(step)
    return steps, faults


def world_sizes(steps: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """(first step, last step, number of workers) of each part of a run; several where it was resumed with others. Empty if not told."""
    parts: list[tuple[int, int, int]] = []
    for step in steps:
        workers = len(step.get("peak_memory_gib", ()))
        if workers and parts and parts[-1][2] == workers:
            parts[-1] = parts[-1][0], step["step"], workers
        elif workers:
            parts.append((step["step"], step["step"], workers))
    return parts


def _step(line: str) -> dict[str, Any] | None:
    """None for a line that is no step. Lines of earlier versions lack some keys."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and fault_of(value, _STEP, _OF_EVERY_STEP) is None else None
