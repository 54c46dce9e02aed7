"""What runs came to, one row each, from nothing but the files of their folders: also of runs that failed, were killed, or are still going.

What ran out of memory is a result and not a gap. What a folder lacks stays unknown, and what is damaged is told: nothing is filled in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainkit.errors import DoesNotFit, OutOfMemory, TrainkitError, UsageError
from trainkit.recipe.reader import read_values
from trainkit.runs.finding import find_runs
from trainkit.runs.reading import PLAN, SUMMARY, WAY_OUT, read_object, read_steps, world_sizes
from trainkit.runs.totals import highest, totals
from trainkit.units import gib

UNFINISHED = "unfinished"
_OUT_OF_MEMORY = (OutOfMemory.__name__, DoesNotFit.__name__)


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


def read_rows(named: Sequence[str | Path]) -> tuple[list[Row], list[str]]:
    """The runs in these folders, folders of runs and globs, each once, and what a reader must know about them together.

    A damaged run that a folder or a glob brought along is left out and told. Raises UsageError for what is no run, and what read_row
    raises for a run that was named itself, or where no run is left.
    """
    found, notes = find_runs(named)
    rows: list[Row] = []
    left_out: list[TrainkitError] = []
    for run in found:
        try:
            rows.append(read_row(run.folder))
        except TrainkitError as error:
            if run.is_named:
                raise
            left_out.append(error)
            notes.append(f"left out: {error.message.removesuffix(WAY_OUT)}")
    if left_out and not rows:
        raise left_out[0]
    rows = _told_apart(rows)
    return rows, [*notes, *notes_of(rows)]


def read_row(folder: Path) -> Row:
    """What a run came to. Without summary.json it is unfinished, and its steps are added up as far as they go.

    Raises UsageError for a file that is damaged or not of this kind, RecipeError for recipe.yaml.
    """
    name, recipe = folder.resolve().name, read_values(folder / "recipe.yaml")
    plan = read_object(folder / "plan.json", PLAN, [key for key in PLAN if key != "expected_peak_bytes"])  # earlier versions lack that one
    steps, notes = read_steps(folder / "steps.jsonl")
    ended = (folder / "summary.json").is_file()
    summary = read_object(folder / "summary.json", SUMMARY, SUMMARY) if ended else _so_far(plan, steps)
    if not notes and len(steps) != summary["steps"]:
        notes.append(f"steps.jsonl holds {len(steps)} steps of the {summary['steps']} that were taken")
    notes += [*_other_workers(steps), *_how_it_ended(summary)]
    error, peaks, planned = summary["error"] or {}, summary["peak_memory_gib"], planned_bytes(plan)
    try:
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
            peak_gib=highest(peaks) if peaks else None,
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
            environment=read_object(folder / "environment.json", {}, ()) if (folder / "environment.json").is_file() else {},
            curve=_curve(steps),
            notes=tuple(f"{name}: {note}" for note in notes),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UsageError(f"{folder / 'recipe.yaml'}: not as trainkit writes it ({type(fault).__name__}: {fault}){WAY_OUT}") from fault


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


def _so_far(plan: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json would say of these steps; what only an end brings is unknown."""
    return totals(steps, plan["rows"]) | {"status": UNFINISHED} | dict.fromkeys(("wall_seconds", "eval", "error"))


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
    """Runs of one name in several folders get as many of the folders' names in front as it takes."""
    for parts in range(2, max((len(row.folder.parts) for row in rows), default=0) + 1):
        times = Counter(row.run for row in rows)
        rows = [replace(row, run="/".join(row.folder.parts[-parts:])) if times[row.run] > 1 else row for row in rows]
    return list(rows)


def _other_workers(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """steps.jsonl tells how many workers took a step, and not their ZeRO stage."""
    parts = world_sizes(steps)
    if len(parts) < 2:
        return []
    told = ", ".join(f"steps {first} to {end} with {_workers(workers)}" for first, end, workers in parts[:-1])
    return [f"trained {told}, since then with {_workers(parts[-1][2])}: rates and loss are of all, peak, technique and workers of the last"]


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


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
