"""The face for notebooks: plan a recipe, start a run beside the notebook, open run folders, and compare them.

`plan` and `train` take a recipe as it is at hand: a file, a Recipe, or a mapping of sections.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.cluster.decision import decide
from trainkit.cluster.opening import opened
from trainkit.cluster.session import cluster_address
from trainkit.data.at_hand import save_rows
from trainkit.errors import TrainkitError, UsageError
from trainkit.planning.plan import Plan
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.schema import Recipe
from trainkit.runs.child import Child
from trainkit.runs.compare import read_rows
from trainkit.runs.compared import Comparison
from trainkit.runs.files import write_whole
from trainkit.runs.folder import RunFolder
from trainkit.runs.opened import Run, open_folder, shown_path
from trainkit.units import parse_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a kernel, datasets and transformers load tqdm's bars, which miss ipywidgets; none is drawn here
    import tqdm.auto  # noqa: F401

RecipeAtHand = str | Path | Mapping[str, Any] | Recipe


class StartedRun(Run):
    """A run that this notebook has started. It goes on while the notebook works, and ends with the kernel."""

    def __init__(self, folder: RunFolder, child: Child, planned: Plan):
        super().__init__(folder)
        self.child, self._planned = child, planned

    @property
    def status(self) -> str:
        """running | completed | failed | interrupted"""
        return self.child.status

    @property
    def plan(self) -> Plan:
        return super().plan or self._planned

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.child.log

    def wait(self, seconds: float | None = None) -> StartedRun:
        """Until the run has ended, or for so long; gives the run itself. The stop button ends the waiting, not the run.

        Raises what the command has said, as the same error, if the run failed.
        """
        self.child.wait(seconds)
        error = self._error()
        if error is not None:
            raise error
        return self

    def interrupt(self) -> None:
        """End after the current step with a checkpoint, from which `train(..., resume=True)` goes on; a second time: at once.

        Raises UsageError if the run has ended.
        """
        if self.status != "running":
            raise UsageError(f"{self.name}: nothing to interrupt, the run is {self.status}")
        self.child.interrupt()

    def facts(self) -> dict[str, str]:
        error = self._error()
        return super().facts() | ({} if error is None else {"error": error.message}) | {"output": shown_path(self.log)}

    def _error(self) -> TrainkitError | None:
        try:
            return self.child.error(self.summary)
        except UsageError:  # a damaged summary; the output says it as well
            return self.child.error(None)


def plan(recipe: RecipeAtHand, overrides: Sequence[str] | Mapping[str, Any] = (), gpu_memory: str | int | None = None) -> Plan:
    """Batch, steps, memory. `gpu_memory` ("80GiB") plans for GPUs that are elsewhere. What cannot be reached is in the plan's notes.

    Raises RecipeError or DataError for what is wrong, CapacityError if the model states exceed the device.
    """
    try:
        memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    except ValueError as error:
        raise UsageError(f"gpu_memory: {error}") from None
    decision = decide(read_recipe(recipe, overrides), _file_of(recipe), memory)
    return replace(decision.plan, notes=(*decision.plan.notes, *(f"unknown: {fact}" for fact in decision.unknown)))


def train(
    recipe: RecipeAtHand,
    data: Any = None,
    *,
    name: str | None = None,
    runs: str | Path | None = None,
    resume: bool = False,
    address: str | None = None,
) -> StartedRun:
    """Start `python -m trainkit.run` beside this process and give a handle of the run, without waiting for it.

    data: rows at hand instead of data.path: a datasets.Dataset, a pandas frame or a list of dicts, which are the split train, or a
    DatasetDict or dict of splits. name, runs, resume, address: as the command's options.
    Raises what the command would: RecipeError, DataError, UsageError or CapacityError, before anything is started.
    """
    path = _file_of(recipe)
    if resume and path is not None and path.is_dir():
        recipe = path = path / "recipe.yaml"
    wish = _wish(recipe, data, runs)
    opening = opened(wish, path, name, resume, cluster_address(address), lambda plan: None)
    folder = opening.folder()
    starting = folder.lock("starting")  # another command that works on it is told here, and below once it has begun
    try:
        if opening.before is None:
            folder.write_recipe(recipe_to_yaml(wish))
        else:
            folder.lock("driver").release()
            folder.clear_phase()  # of its end before
        asked = folder.ray / "asked.yaml"
        write_whole(asked, recipe_to_yaml(wish))
        child = Child(folder, asked, address, starting)
    except BaseException:
        starting.release()
        raise
    return StartedRun(folder, child, opening.decision.plan)


def open_run(path: str | Path) -> Run:
    """A run folder, finished or not. Raises UsageError for what is none."""
    return Run(open_folder(path))


def compare(*runs: str | Path | Run) -> Comparison:
    """Runs, folders of runs and globs side by side, those that failed or go on included.

    Raises UsageError for what is no run, or is damaged.
    """
    rows, notes = read_rows([run.path if isinstance(run, Run) else run for run in runs])
    return Comparison(tuple(rows), tuple(notes))


def _wish(recipe: RecipeAtHand, data: Any, runs: str | Path | None) -> Recipe:
    """The recipe as it shall be trained; rows at hand are written where its data.path then points."""
    changes: dict[str, Any] = {} if runs is None else {"run.storage_path": Path(runs).absolute()}
    if data is None:
        return read_recipe(recipe, changes)
    wish = read_recipe(recipe, changes | {"data.path": "data", "data.name": None, "data.revision": None})
    if Path(wish.data.train).is_absolute():
        raise UsageError(f"data.train: {wish.data.train} is a file, and data= brings rows of its own: name a split of these, such as train")
    return wish.with_({"data.path": save_rows(data, Path(wish.run.storage_path) / ".cache" / "at_hand")})


def _file_of(recipe: RecipeAtHand) -> Path | None:
    return Path(recipe) if isinstance(recipe, str | Path) else None
