"""The files of a run folder, read and checked before anybody reckons with them: what is damaged is told with the file's name.

A line of steps.jsonl that is no step is left out and named; all who read steps read them here, so that all count the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from trainkit.errors import UsageError

WAY_OUT = ". Leave this run out"
Numbers: TypeAlias = dict[str, float]
Peaks: TypeAlias = list[float]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Error(_File):
    kind: str = ""
    message: str


class _Memory(_File):
    device: Numbers
    device_at_step: float


SUMMARY: Mapping[str, Any] = {
    "status": Literal["completed", "failed", "interrupted"],
    "steps": int,
    **dict.fromkeys(("epochs", "train_loss", "samples_per_second", "tokens_per_second", "mfu"), float | None),
    **dict.fromkeys(("seconds", "wall_seconds"), float),
    "peak_memory_gib": Peaks | None,
    "eval": Numbers | None,
    "error": _Error | None,
}
PLAN: Mapping[str, Any] = {
    **dict.fromkeys(("recipe_name", "device_name", "precision"), str),
    **dict.fromkeys(("world_size", "samples_per_step", "total_steps", "zero_stage"), int),
    **dict.fromkeys(("use_gpu", "offload_optimizer", "offload_param"), bool),
    **dict.fromkeys(("rows", "expected_peak_bytes"), float | None),
    "memory": _Memory | None,
}
ENVIRONMENT: Mapping[str, Any] = {
    **dict.fromkeys(("python", "platform"), str),
    "packages": dict[str, str],
    "cpu_count": int,
    "gpus": list[str],
    "git_commit": str | None,
}
_STEP: Mapping[str, Any] = {
    "step": int,
    **dict.fromkeys(("loss", "samples", "tokens", "seconds", "data_wait_seconds"), float),
    "mfu": float | None,
    "peak_memory_gib": Peaks,
    "piece_seconds": Numbers,
}
_OF_EVERY_STEP = ("step", "loss", "samples", "tokens", "seconds")


def fault_of(values: Mapping[str, Any], kinds: Mapping[str, Any], needed: Collection[str]) -> str | None:
    """The first key that is missing though needed, or is of another kind, in words."""
    try:
        _checked(tuple(kinds.items()), frozenset(needed)).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"it has no {where}"
        return f"{where} is {json.dumps(first['input'])}, and should be {first['msg'].removeprefix('Input should be ')}"
    return None


@functools.cache
def _checked(kinds: tuple[tuple[str, Any], ...], needed: frozenset[str]) -> type[BaseModel]:
    fields: dict[str, Any] = {key: (kind, ... if key in needed else None) for key, kind in kinds}
    return create_model("File", __base__=_File, **fields)


def read_object(path: Path, kinds: Mapping[str, Any], needed: Collection[str]) -> dict[str, Any]:
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
        step = step_of(line)
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


def step_of(line: str) -> dict[str, Any] | None:
    """None for a line that is no step. Lines of earlier versions lack some keys."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and fault_of(value, _STEP, _OF_EVERY_STEP) is None else None
