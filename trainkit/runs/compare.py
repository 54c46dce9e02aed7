"""What runs came to, one row each, from nothing but the files of their folders: also of runs that failed, were killed, or are still going.

What ran out of memory is a result and not a gap. What a folder lacks stays unknown, and what is damaged is told: nothing is filled in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainkit.errors import DoesNotFit, OutOfMemory, UsageError
from trainkit.recipe.reader import read_values
from trainkit.runs.finding import find_runs
from trainkit.units import gib

UNFINISHED = "unfinished"
_OUT_OF_MEMORY = (OutOfMemory.__name__, DoesNotFit.__name__)
_STEP_NUMBERS = ("step", "loss", "samples", "tokens", "seconds")


@dataclass(frozen=True)
class Row:
    """One run. None: not known, not measured, or not applicable."""

    run: str
    model: str  # the last two parts of model.path: a hub id, or a folder and the one around it
    technique: str
    workers: int
    device: str
    precision: str
    samples_per_step: int
    steps: int  # that were taken
    planned_steps: int
    epochs: float | None
    seconds: float | None  # of the optimizer steps
    wall_seconds: float | None  # of the whole command; of a resumed run, of its last one
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_gib: float | None  # measured, on the worker with most
    planned_gib: float | None  # per worker
    train_loss: float | None  # mean over the steps
    eval_loss: float | None
    status: str  # completed | failed | interrupted | unfinished
    error: str | None = None  # the class of what ended it
    recipe: str = ""  # its name
    data: str | None = None  # that training losses are measured on
    eval_data: str | None = None  # that evaluation losses are measured on
    on_gpu: bool = False
    folder: Path = Path()
    environment: Mapping[str, Any] = field(default_factory=dict)  # environment.json, empty where there is none
    curve: tuple[tuple[float, float], ...] = ()  # (samples trained so far, training loss) of each step
    notes: tuple[str, ...] = ()  # what a reader of the figures must know

    @property
    def out_of_memory(self) -> bool:
        return self.error in _OUT_OF_MEMORY


def read_rows(named: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The runs in these folders, folders of runs and globs, each once, and what a reader must know about them together.

    Raises UsageError for what is no run, RecipeError for a recipe.yaml that cannot be read.
    """
    folders, notes = find_runs(named)
    rows = _told_apart([read_row(folder) for folder in folders])
    return rows, [*notes, *notes_of(rows)]


def read_row(folder: Path) -> Row:
    """What a run came to. Without summary.json it is unfinished, and its steps are added up as far as they go.

    Raises UsageError for a file that is damaged or not of this kind, RecipeError for recipe.yaml.
    """
    name, plan, recipe = folder.resolve().name, _read_json(folder / "plan.json"), read_values(folder / "recipe.yaml")
    steps, notes = read_steps(folder / "steps.jsonl")
    ended = (folder / "summary.json").is_file()
    try:
        summary = _read_json(folder / "summary.json") if ended else _so_far(plan, steps)
        if ended and not notes and len(steps) != summary["steps"]:
            notes.append(f"steps.jsonl holds {len(steps)} steps, and summary.json counts {summary['steps']}")
        notes += _how_it_ended(summary)
        error = summary["error"] or {}
        peaks, planned = summary["peak_memory_gib"], planned_bytes(plan)
        return Row(
            run=name,
            model=last_parts(recipe["model"]["path"]),
            technique=technique(plan, bool(recipe["model"]["lora"])),
            workers=plan["world_size"],
            device=plan["device_name"],
            precision=plan["precision"],
            samples_per_step=plan["samples_per_step"],
            steps=summary["steps"],
            planned_steps=plan["total_steps"],
            epochs=summary["epochs"],
            seconds=summary["seconds"],
            wall_seconds=summary["wall_seconds"],
            samples_per_second=summary["samples_per_second"],
            tokens_per_second=summary["tokens_per_second"],
            mfu=summary["mfu"],
            peak_gib=max(peaks) if peaks else None,
            planned_gib=None if planned is None else gib(planned),
            train_loss=summary["train_loss"],
            eval_loss=(summary["eval"] or {}).get("loss"),
            status=summary["status"],
            error=error.get("kind"),
            recipe=plan["recipe_name"],
            data=_data(recipe["data"], "train"),
            eval_data=_data(recipe["data"], "eval"),
            on_gpu=plan["use_gpu"],
            folder=folder,
            environment=_read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {},
            curve=_curve(steps),
            notes=tuple(f"{name}: {note}" for note in notes),
        )
    except (KeyError, TypeError) as fault:
        raise UsageError(
            f"{folder}: plan.json, recipe.yaml or summary.json is not as trainkit writes it ({type(fault).__name__}: {fault}). "
            "Leave this run out"
        ) from fault


def read_steps(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps in a steps.jsonl, and a sentence for each line that is none and was left out.

    A last line without its end is being written, or its process was killed: that is no damage. A run without the file took no step.
    """
    if not path.is_file():
        return [], []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
    steps: list[dict[str, Any]] = []
    faults = []
    for number, line in enumerate(lines, start=1):
        step = _step(line)
        if step is None:
            faults.append(f"{path.name}:{number} is damaged and left out")
        elif steps and step["step"] <= steps[-1]["step"]:
            faults.append(f"{path.name}:{number} holds step {step['step']} after step {steps[-1]['step']} and is left out")
        else:
            steps.append(step)
    return steps, faults


def technique(plan: Mapping[str, Any], lora: bool) -> str:
    """How a model is spread over the workers: no ZeRO, data parallel, ZeRO-1, ZeRO-3 + offload; with LoRA said behind."""
    stage, optimizer, parameters = plan["zero_stage"], plan["offload_optimizer"], plan["offload_param"]
    name = f"ZeRO-{stage}" if stage else "data parallel" if plan["world_size"] > 1 else "no ZeRO"
    if optimizer and (parameters or stage < 3):  # all that the stage lets one offload
        name += " + offload"
    elif optimizer or parameters:
        name += " + optimizer offload" if optimizer else " + parameter offload"
    return f"{name}, LoRA" if lora else name


def planned_bytes(plan: Mapping[str, Any]) -> int | None:
    """The most that the plan expects on one worker's device: with activations where it tells them, else the model states alone."""
    expected, memory = plan.get("expected_peak_bytes"), plan["memory"]
    if expected is not None or memory is None:
        return expected
    return max(sum(memory["device"].values()), memory["device_at_step"])


def last_parts(path: str) -> str:
    """google-t5/t5-large of /models/google-t5/t5-large: what a reader elsewhere can make use of."""
    return "/".join(path.rstrip("/").split("/")[-2:])


# What the files say


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: damaged, not JSON: {error}. Leave this run out") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged, no JSON object. Leave this run out")
    return value


def _step(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in _STEP_NUMBERS)
    return value if whole else None


def _so_far(plan: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As summary.json would count these steps (cluster/summary.py); what only an end brings is unknown."""
    samples, tokens, seconds = (sum(step[key] for step in steps) for key in ("samples", "tokens", "seconds"))
    return {
        "status": UNFINISHED,
        "steps": len(steps),
        "epochs": round(samples / plan["rows"], 4) if plan["rows"] else None,
        "train_loss": sum(step["loss"] for step in steps) / len(steps) if steps else None,
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_gib": steps[-1].get("peak_memory_gib") if steps else None,
        "mfu": _mean_mfu(steps),
        **dict.fromkeys(("wall_seconds", "eval", "error")),
    }


def _mean_mfu(steps: Sequence[Mapping[str, Any]]) -> float | None:
    told = [step for step in steps if step.get("mfu") is not None]
    return sum(step["mfu"] * step["seconds"] for step in told) / sum(step["seconds"] for step in told) if told else None


def _curve(steps: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    """A step whose line is lost counts as many samples as the one behind it, so that the curve goes on at its place."""
    points, samples, before = [], 0, 0
    for step in steps:
        samples += step["samples"] * (step["step"] - before)
        before = step["step"]
        points.append((float(samples), float(step["loss"])))
    return tuple(points)


def _data(data: Mapping[str, Any], use: str) -> str | None:
    paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
    return None if data[use] is None else f"{', '.join(last_parts(path) for path in paths)}: {data[use]}"


# What a reader must know


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Runs of one name in several folders get the folder's name in front."""
    times = Counter(row.run for row in rows)
    return [replace(row, run=f"{row.folder.parent.name}/{row.run}") if times[row.run] > 1 else row for row in rows]


def _how_it_ended(summary: Mapping[str, Any]) -> list[str]:
    if summary["status"] == UNFINISHED:
        return ["no summary.json: it is still running, or its process was killed. Its figures go as far as steps.jsonl"]
    if summary["error"] is None:
        return []
    message = str(summary["error"]["message"]).strip().partition("\n")[0]
    return [message.partition(";")[0] if summary["status"] == "interrupted" else f"failed: {message}"]


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Of each run, and of all as a table: which of their figures do not compare."""
    notes = [note for row in rows for note in row.notes]
    for what, of_row, losses in (
        ("of different models", lambda row: row.model, "losses"),
        ("on different data", lambda row: row.data, "training losses"),
        ("evaluated on different data", lambda row: row.eval_data, "evaluation losses"),
    ):
        found = {of_row(row) for row in rows} - {None}
        if len(found) > 1:
            notes.append(f"runs {what} ({', '.join(sorted(found))}): their {losses} do not compare")
    if not all(row.on_gpu for row in rows):
        notes.append("peak on a CPU: resident memory of the process, libraries included; planned: the tensors of training alone")
    return notes
