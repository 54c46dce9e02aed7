"""What is known of a run before its folder is made. Every fault of recipe, data, model and machine is told here.

The command and the notebook open a run alike, so a notebook gets the command's errors, and gets them before a process is started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainkit.cluster import hardware
from trainkit.cluster.capacity import workers_here
from trainkit.cluster.decision import Decision, decide
from trainkit.cluster.resume import check_unfinished, kept_budget, resumed_recipe, run_to_resume
from trainkit.errors import DataError, UsageError
from trainkit.planning.plan import Plan
from trainkit.recipe.schema import Recipe
from trainkit.runs import copying
from trainkit.runs.folder import RunFolder, check_storage


@dataclass(frozen=True)
class Opening:
    wish: Recipe
    recipe: Recipe  # with what a resumed run keeps
    decision: Decision
    name: str | None  # that the run folder shall have
    before: RunFolder | None  # of the run that goes on

    def folder(self) -> RunFolder:
        """The run that goes on, or a new folder. Raises UsageError if the name is taken, here or among the copies."""
        if self.before is not None:
            return self.before
        return RunFolder.create(self.recipe.run.storage_path, self.recipe.name, self.name, _copied_runs(self.recipe, self.name))


def opened(wish: Recipe, path: Path | None, name: str | None, resume: bool, address: str | None, show: Callable[[Plan], None]) -> Opening:
    """Decide about a recipe that was read from `path`, or made in Python, and show its plan. Makes nothing but the runs folder.

    Raises RecipeError, DataError, UsageError or CapacityError for what the command would raise.
    """
    before = run_to_resume(wish, path, name) if resume else None
    if before is not None:  # its folder may have been moved since
        wish = wish.model_copy(update={"run": wish.run.model_copy(update={"storage_path": str(before.path.parent)})})
    recipe = wish if before is None else resumed_recipe(before, wish)
    check_storage(recipe.run.storage_path, recipe.name, None if before else name)
    decision = decide(recipe, path, most=None if before is None else kept_budget(before, recipe))
    if not decision.unknown:
        decision = decision.with_all_rows()
        if address is None:
            decision = decision.with_workers(workers_here(hardware.local_resources(), recipe.scaling, decision.plan.world_size))
    show(decision.plan)
    if decision.unknown:  # a run needs what a mere plan may leave unknown
        raise DataError("\n".join(decision.unknown))
    if before is not None:
        check_unfinished(before, decision.plan.total_steps)
    return Opening(wish, recipe, decision, name, before)


def _copied_runs(recipe: Recipe, name: str | None) -> set[str]:
    """Raises UsageError if a run of the wished name has its copy already, or the copies cannot be read."""
    url = recipe.run.copy_checkpoints_to
    taken = set() if url is None else copying.runs_at(url)
    if name in taken:
        raise UsageError(f"{url}/{name}: a copy of a run of this name lies there. Go on with it with --resume, or choose another --name")
    return taken
