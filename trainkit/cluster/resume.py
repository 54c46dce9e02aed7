"""Which run goes on, and whether the recipe is still the one that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainkit.errors import CaptureError, RecipeError, UsageError
from trainkit.recipe.document import dotted
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Profile, Recipe
from trainkit.runs.copying import make_again
from trainkit.runs.finding import is_run
from trainkit.runs.folder import RunFolder, check_name

LAYOUT = (  # may differ from what the run began with: where and how often, not what is trained
    "name", "scaling", "zero", "run", "batch.tokens_per_device", "batch.samples_per_device",
    "model.gradient_checkpointing", "model.compile", "model.cuda_graphs",
    "train.max_steps", "train.epochs", "train.eval_steps", "train.save_steps", "train.save_total_limit", "train.early_stopping_patience",
    "train.halve_on_oom", "train.deterministic", "train.profile",
)  # fmt: skip


def run_to_resume(recipe: Recipe, path: Path | None, name: str | None) -> RunFolder:
    """The run folder of that name; that of the recipe, if `path` lies in one; else the newest unfinished run of a recipe of this name.

    A folder of that name that is lost is made again from its copy. Raises UsageError if there is none.
    """
    storage = Path(recipe.run.storage_path).absolute()
    if name is not None:
        folder = storage / check_name(name)
        url = recipe.run.copy_checkpoints_to
        if not (folder / "recipe.yaml").is_file() and (url is None or not make_again(url, folder)):
            raise UsageError(f"--resume: {folder} is no run folder. Without --resume a new run begins")
        return RunFolder(folder)
    if path is not None and path.name == "recipe.yaml" and ((path.parent / "plan.json").is_file() or (path.parent / ".ray").is_dir()):
        return RunFolder(path.parent.absolute())
    unfinished = [folder for folder in _runs(storage) if _recipe_name(folder) == recipe.name and _is_unfinished(folder)]
    if not unfinished:
        raise UsageError(
            f"--resume: no unfinished run of {recipe.name} lies in {storage}. Name one with --name, or start a new one without --resume"
        )
    return max(unfinished, key=lambda folder: (folder.path / "recipe.yaml").stat().st_mtime_ns)


def resumed_recipe(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe to go on with. CUDA graphs that could not be made are not tried again.

    Raises UsageError naming each changed key that defines the training.
    """
    before = _began_with(folder)
    old, new = dotted(before.model_dump(mode="json")), dotted(recipe.model_dump(mode="json"))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _is_layout(key)]
    if changed:
        listed = "\n".join(f"  {key}: began with {old.get(key)}, is now {new.get(key)}" for key in changed)
        raise UsageError(
            f"--resume: {folder.path} was begun with another training:\n{listed}\n"
            "Write them as they were, or begin a new run without --resume"
        )
    if recipe.model.cuda_graphs is None and any(failure["kind"] == CaptureError.__name__ for failure in folder.failures()):
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"cuda_graphs": False})})
    return recipe


def kept_budget(folder: RunFolder, recipe: Recipe) -> int | None:
    """Of a micro-batch, as the run's plan had it, so that a run that goes on with fewer workers trains the same micro-batches; None where
    the recipe asks for another one, or the run is elastic: it plans anew for the workers that it finds.
    """
    before = _began_with(folder).batch
    asked = "tokens_per_device" if recipe.batch.samples_per_device is None else "samples_per_device"
    if getattr(before, asked) != getattr(recipe.batch, asked) or not isinstance(recipe.scaling.num_workers, int):
        return None
    plan = folder.read_plan() if (folder.path / "plan.json").is_file() else {}  # a run may be killed before its plan is written
    unsettled = plan.get("splits_for_padding") and plan.get("largest_micro_batch_tokens") is None  # or before the rows' lengths were known
    return None if unsettled else plan.get(asked)


def check_unfinished(folder: RunFolder, total_steps: int) -> None:
    """Raises UsageError if the run is complete and the recipe asks for no more steps."""
    summary = folder.read_summary()
    if summary is not None and summary["status"] == "completed" and (summary.get("stopped_early") or summary["steps"] >= total_steps):
        how = "it stopped early" if summary.get("stopped_early") else "raise train.max_steps or train.epochs to go on"
        raise UsageError(f"--resume: {folder.path} is complete after {summary['steps']:,} steps: {how}")


def untraced(window: Profile | None, done: int) -> str | None:
    """A sentence on a window of train.profile that begins among the `done` steps, which are not taken again; None if it does not."""
    if window is None or window.start > done:
        return None
    last = window.start + window.steps - 1
    traced = "are not traced" if last <= done else f"are traced from step {done + 1:,} on"
    return f"train.profile: going on from step {done:,}, steps {window.start:,} to {last:,} {traced}. Write a start after {done:,}"


def _began_with(folder: RunFolder) -> Recipe:
    return read_recipe(folder.path / "recipe.yaml")


def _recipe_name(folder: RunFolder) -> str | None:
    """None for a recipe that is read no more, of another version or without its ZeRO file: another run's must not stand in the way."""
    try:
        return _began_with(folder).name
    except RecipeError:
        return None


def _runs(storage: Path) -> Iterator[RunFolder]:
    yield from map(RunFolder, filter(is_run, storage.iterdir() if storage.is_dir() else ()))


def _is_unfinished(folder: RunFolder) -> bool:
    summary = folder.read_summary()
    return summary is None or summary["status"] != "completed"


def _is_layout(key: str) -> bool:
    return any(key == layout or key.startswith(f"{layout}.") for layout in LAYOUT)
