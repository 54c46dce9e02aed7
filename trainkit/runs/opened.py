"""A run folder in Python: what lies in it as recipe, plan and frames, drawn, and its model asked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from trainkit import markup
from trainkit.errors import UsageError
from trainkit.planning.plan import Plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.runs.compare import planned_bytes
from trainkit.runs.files import is_locked
from trainkit.runs.folder import RunFolder
from trainkit.runs.reading import read_steps
from trainkit.units import format_count, format_seconds, gib

if TYPE_CHECKING:
    import pandas

    from trainkit.runs.picture import Picture

_FEWEST = ["step", "loss", "tokens", "seconds"]  # columns of a frame without rows
_FEW_RANKS = 4  # whose memory is told one by one
_MARKS = ("recipe.yaml", "plan.json", "steps.jsonl", "summary.json")  # any of them makes a folder a run's


class Run:
    """A run folder, finished or not. Everything is read anew when it is asked for, so a run that goes on can be looked at."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._steps: tuple[object, pandas.DataFrame] | None = None  # as last read, and of which state of the file

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """running | completed | failed | interrupted | unfinished (its command was killed, or has not begun)"""
        if is_locked(self.folder.ray / "lock-driver"):
            return "running"
        summary = self.summary
        return "unfinished" if summary is None else str(summary["status"])

    @property
    def recipe(self) -> Recipe:
        """Resolved. Raises RecipeError if it is missing, or is read no more."""
        return read_recipe(self.path / "recipe.yaml")

    @property
    def plan(self) -> Plan | None:
        """None where the run ended before it was written. Raises UsageError for a damaged one, or one of another version."""
        path = self.path / "plan.json"
        try:
            return Plan.from_json(self.folder.read_plan()) if path.exists() else None
        except (TypeError, KeyError) as error:
            raise UsageError(f"{path}: of another version of trainkit: {error}") from None

    @property
    def summary(self) -> dict[str, Any] | None:
        """None while the run has not ended, and of one that was killed. Raises UsageError for a damaged one."""
        return self.folder.read_summary()

    @property
    def steps(self) -> pandas.DataFrame:
        """steps.jsonl so far: a row per optimizer step, a column per key: peak_memory_gib/rank_0 of each rank, piece_seconds/forward.

        Warns of a damaged line, which is left out.
        """
        version = _version(self.folder.steps_path)
        if self._steps is None or self._steps[0] != version:
            self._steps = version, _frame(self.folder.steps_path)
        return self._steps[1].copy()

    @property
    def evaluations(self) -> pandas.DataFrame:
        """Loss and metrics of every evaluation, a row per step, out of the TensorBoard curves; without these the last one.

        Warns of a file of curves that cannot be read to its end, unless the run still writes it.
        """
        import pandas

        from trainkit.training.curves import read_curves

        frame = pandas.DataFrame(read_curves(self.path / "tensorboard", "eval/")).sort_index()
        last = (self.summary or {}).get("eval") or {}
        written = [] if self.status == "running" else sorted((self.path / "tensorboard").glob("events.out.tfevents.*"))
        for path in filter(_is_damaged, written):
            warnings.warn(f"{self.name}: {path.name} is damaged or cut off: evaluations behind this place are missing", stacklevel=2)
        if frame.empty and last:
            return pandas.DataFrame([last]).set_index("step")
        return frame.rename_axis("step")

    def plot(self) -> Picture:
        """Loss, tokens/s and memory of every rank, as a matplotlib figure. Raises UsageError before the first step."""
        picture = self.picture(self.evaluations)
        if picture is None:
            raise UsageError(f"{self.path}: no step has been trained yet, so there is nothing to draw")
        return picture

    def picture(self, evaluations: pandas.DataFrame | None = None) -> Picture | None:
        """The same with these evaluations, which take longer to read than steps; None before the first step."""
        from trainkit.runs.plot_run import run_picture

        steps, plan = self.steps, self.plan
        if steps.empty:
            return None
        on_gpu = plan is not None and plan.use_gpu
        planned = planned_bytes(plan.to_json()) if on_gpu and plan is not None else None
        return run_picture(steps, evaluations, planned_gib=None if planned is None else gib(planned), resident=not on_gpu)

    def predict(self, inputs: Any, max_new_tokens: int | None = None) -> Any:
        """What the run's model answers: generated text, or the name of a class.

        inputs: a text, or a row whose columns fill data.source, gives one answer; a list of these a list.
        Raises UsageError where no model/ lies.
        """
        from trainkit.inference.predict import predict

        alone = isinstance(inputs, str | Mapping)
        answers = predict(self.path, [inputs] if alone else list(inputs), max_new_tokens=max_new_tokens)
        return answers[0] if alone else answers

    def watch(self, every: float = 1.0) -> None:
        """Live curves in the cell, looked at `every` seconds, until the run has ended; outside of a notebook plain lines.

        The notebook's stop button ends the watching, not the run.
        """
        from trainkit.runs.watching import watch

        watch(self, every)

    def facts(self) -> dict[str, str]:
        """What there is to say of it, by name, for people. What is damaged is said beside the rest."""
        try:
            status, summary, damaged = self.status, self.summary or {}, {}
        except UsageError as error:
            status, summary, damaged = "unknown", {}, {"damaged": error.message}
        try:
            plan = self.plan
        except UsageError as error:
            plan, damaged = None, damaged | {"damaged plan": error.message}
        if status == "running":  # until a resumed run has begun, the summary is that of its end before
            status, summary = f"running: {self.folder.read_phase() or 'starting'}", {}
        steps = self.steps
        facts = {"status": status} | ({} if steps.empty else _progress(steps, plan))
        for name, value in (summary.get("eval") or {}).items():
            if name != "step":
                facts[f"evaluation {name.replace('_', ' ')}"] = f"{value:.4f}"
        if summary.get("error") is not None:
            facts["error" if status == "failed" else "how it ended"] = str(summary["error"]["message"])
        places = {"folder": shown_path(self.path), "curves": f"tensorboard --logdir {shown_path(self.path.parent)}"}
        return facts | damaged | places

    def __repr__(self) -> str:
        return markup.plain(self._table(), width=140)

    def _repr_html_(self) -> str:
        return markup.html(self._table())

    def _table(self) -> Table:
        table = Table(f"run {self.name}", "", box=None, pad_edge=False, padding=(0, 2))
        for name, value in self.facts().items():
            table.add_row(Text(name, style="dim"), Text(value))
        return table


def open_folder(path: str | Path) -> RunFolder:
    """Raises UsageError for what is no run folder, naming the runs in it or beside it."""
    if not isinstance(path, str | Path) or path == "":
        raise UsageError(f"open_run({path!r}): name one run folder, as text or as a Path")
    folder = Path(path)
    if any((folder / name).is_file() for name in _MARKS):
        return RunFolder(folder.absolute())
    within = folder if folder.is_dir() else folder.parent
    runs = sorted(entry.name for entry in within.iterdir() if (entry / "recipe.yaml").is_file()) if within.is_dir() else []
    raise UsageError(f"{path}: no run folder" + (f". In {within} lie the runs {', '.join(runs)}" if runs else ""))


def shown_path(path: Path) -> str:
    """Relative where it lies in the working directory."""
    absolute = path.absolute()
    return os.path.relpath(absolute) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _is_damaged(events: Path) -> bool:
    """TensorBoard ends reading a file of curves where a record of it is damaged, and says nothing. About 0.1 s for a megabyte."""
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    records = PyRecordReader_New(str(events))
    try:
        while True:
            records.GetNext()
    except OutOfRangeError:
        return False
    except DataLossError:
        return True


def _version(path: Path) -> object:
    """Differs when the file has changed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _frame(path: Path) -> pandas.DataFrame:
    import pandas

    lines, faults = read_steps(path)
    for fault in faults:
        warnings.warn(f"{path.parent.name}: {fault}", stacklevel=3)
    return pandas.DataFrame([_flat(line) for line in lines], columns=None if lines else _FEWEST).set_index("step")


def _flat(step: Mapping[str, Any]) -> dict[str, Any]:
    """A list has an item per rank. Each of these, and each item of a mapping, gets a key of its own."""
    out: dict[str, Any] = {}
    for key, value in step.items():
        if isinstance(value, list):
            out |= {f"{key}/rank_{rank}": item for rank, item in enumerate(value)}
        else:
            out |= {f"{key}/{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return out


def _progress(steps: pandas.DataFrame, plan: Plan | None) -> dict[str, str]:
    last, seconds, peaks = steps.iloc[-1], max(steps["seconds"].sum(), 1e-9), _peaks(steps)
    each = " and ".join(f"{peak:.2f}" for peak in peaks)
    memory = f"{each} GiB, rank by rank" if len(peaks) <= _FEW_RANKS else f"{peaks.max():.2f} GiB on the fullest rank"
    return {
        "trained": f"{steps.index[-1]:,} steps" + (f" of {plan.total_steps:,}" if plan is not None else ""),
        "loss": f"{last['loss']:.4f} at the last step",
        "speed": f"{format_count(steps['tokens'].sum() / seconds)} tokens/s over {format_seconds(seconds)} of steps",
    } | ({} if peaks.empty else {"peak memory": memory})


def _peaks(steps: pandas.DataFrame) -> pandas.Series[float]:
    """GiB of each rank over all steps with as many workers as the last one had: a resumed run measures anew."""
    of_ranks = steps[[name for name in steps.columns if name.startswith("peak_memory_gib/")]]
    is_there = of_ranks.notna()
    return of_ranks[(is_there == is_there.iloc[-1]).all(axis=1)].max().dropna()
