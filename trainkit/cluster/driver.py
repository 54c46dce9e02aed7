"""A run from the recipe's file to the last screen, in the order in which things happen.

Everything that can be wrong with the recipe, the model's config, the data or the machine is said before the run folder is made; from then
on the folder gets a summary, whatever happens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trainkit.cluster import hardware, screen
from trainkit.cluster.capacity import check_machine
from trainkit.cluster.decision import Decision, decide
from trainkit.cluster.launch import Launch, launch
from trainkit.cluster.progress import counter, display
from trainkit.cluster.session import cluster_address, environment, environment_settings, ray_session
from trainkit.cluster.signals import Signals
from trainkit.cluster.summary import summarize
from trainkit.errors import DataError, Interrupted, TrainkitError
from trainkit.planning.planner import Plan
from trainkit.planning.show import plan_text
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.schema import Recipe
from trainkit.runs.folder import RunFolder, check_storage


@dataclass(frozen=True)
class Options:
    """Of the command `run`."""

    recipe: Path
    overrides: Sequence[str] = ()
    name: str | None = None
    address: str | None = None
    verbose: bool = False


def run(options: Options, console: Console) -> dict[str, Any]:
    """Plan, train, export. Returns the summary of a completed run.

    Raises RecipeError, DataError, UsageError or CapacityError before anything starts, TrainingError or Interrupted from a run that did
    not end well; its summary.json is written all the same.
    """
    began = time.monotonic()
    with Signals() as signals:
        try:
            address = cluster_address(options.address)
            recipe = read_recipe(options.recipe, options.overrides)
            check_storage(recipe.run.storage_path, recipe.name, options.name)
            decision = _decide(recipe, options.recipe, address, console)
            folder = RunFolder.create(recipe.run.storage_path, recipe.name, options.name)
        except KeyboardInterrupt:
            raise Interrupted("interrupted before anything was started") from None
        with folder.lock("driver"):
            return _recorded(_Run(address, options.verbose, recipe, decision.plan, folder, console, signals), began)


def _decide(recipe: Recipe, path: Path, address: str | None, console: Console) -> Decision:
    """Print the plan, and check that this machine has what the workers take. A run needs what a mere plan may leave unknown."""
    decision = decide(recipe, path)
    console.print(plan_text(decision.plan))
    if decision.unknown:
        raise DataError("\n".join(decision.unknown))
    if address is None:
        check_machine(hardware.local_resources(), recipe.scaling, decision.plan.world_size)
    return decision


@dataclass(frozen=True)
class _Run:
    address: str | None  # of a cluster to join
    verbose: bool
    recipe: Recipe
    plan: Plan
    folder: RunFolder
    console: Console
    signals: Signals

    def train(self) -> dict[str, Any]:
        """From the made folder to rank 0's outcome."""
        self.folder.write_recipe(recipe_to_yaml(self.recipe))
        self.folder.write_plan(self.plan.to_json())
        self.folder.write_environment(hardware.environment())
        self.console.print(f"run folder {self.folder.path}", style="dim", highlight=False, soft_wrap=True)
        try:
            return self._launch()
        finally:
            self._first_weights_path.unlink(missing_ok=True)  # a whole model in fp32, of no use to anybody now

    def _launch(self) -> dict[str, Any]:
        prepared = self._prepare()
        asked = Launch(
            recipe=self.recipe,
            plan=self.plan,
            folder=self.folder,
            prepared=prepared,
            first_weights=self._first_weights(prepared),
            address=self.address,
            verbose=self.verbose,
        )
        return launch(asked, display(self.console, self.verbose), self.signals, self._stopping)

    def _prepare(self) -> Any:
        from trainkit.data.tokens import prepare

        with display(self.console) as shown:
            prepared = prepare(self.recipe, counter(shown, "tokenizing", "row"), self._spread())
        for note in prepared.notes:
            self.console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
        return prepared

    def _spread(self) -> Any:
        """Where rows are encoded: on this machine, or on a joined cluster if they are many."""
        from trainkit.cluster.tokenizing import on_cluster
        from trainkit.data import chunks

        return chunks.here if self.address is None else on_cluster(self._joined)

    @contextlib.contextmanager
    def _joined(self) -> Iterator[None]:
        settings = environment_settings(self.recipe, local=False)
        with environment(settings), ray_session(self.address, settings, self.verbose, self.signals):
            yield

    def _first_weights(self, prepared: Any) -> Path | None:
        from trainkit.training.model import write_first_weights

        return write_first_weights(self.recipe, self._first_weights_path, prepared.label_names)

    @property
    def _first_weights_path(self) -> Path:
        return self.folder.ray / "first_weights.safetensors"

    def _stopping(self) -> None:
        if not self.folder.read_steps():  # nothing has been trained that an end after this step would keep
            raise KeyboardInterrupt
        self.folder.request_stop()
        self.console.print("Stopping at the end of this step. Once more stops at once.", style="yellow")


def _recorded(run: _Run, began: float) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    error: TrainkitError | None = None
    try:
        outcome = run.train()
        if outcome["status"] == "interrupted":
            error = Interrupted(f"interrupted after step {outcome['steps']} of {run.plan.total_steps}; its record is {run.folder.path}")
    except KeyboardInterrupt:
        error = Interrupted(f"interrupted at once; its record is {run.folder.path}")
    except Exception as failure:
        error = _unless_interrupted(_cause(failure, run), run)
    with run.signals.ignored():
        summary = summarize(run.plan, run.folder.read_steps(), outcome, error, time.monotonic() - began)
        try:
            run.folder.write_summary(summary)
        except TrainkitError as unwritten:  # the disk is full: what filled it is told first
            error = error or unwritten
    if error is not None:
        raise error
    screen.show_result(run.console, run.folder, run.recipe, summary)
    return summary


def _cause(failure: Exception, run: _Run) -> TrainkitError:
    if isinstance(failure, TrainkitError):
        return failure
    from trainkit.cluster.causes import first_cause

    return first_cause(failure, run.folder, run.plan.world_size)


def _unless_interrupted(error: TrainkitError, run: _Run) -> TrainkitError:
    """Batch systems send a signal to the whole process group: what it ended elsewhere was interrupted as well, not failed."""
    if run.signals.taken and error.facts.get("from_outside"):
        return Interrupted(f"interrupted at once: {error.message}; its record is {run.folder.path}")
    return error
