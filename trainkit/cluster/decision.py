"""Recipe to plan: gather the model's facts, the row count and the device, and let the planner decide. Loads neither ray nor deepspeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from trainkit.cluster.hardware import worker_device
from trainkit.data.files import globbed
from trainkit.errors import DataError, UsageError
from trainkit.planning.facts import DataFacts, Hardware, ModelFacts
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import ZeroConfig, read_zero
from trainkit.units import format_bytes

Read = TypeVar("Read")


@dataclass(frozen=True)
class Decision:
    """The wish, the plan for it, and a sentence for each thing that could not be reached."""

    recipe: Recipe
    plan: Plan
    facts: tuple[ZeroConfig, ModelFacts | None, DataFacts, Hardware]  # that the plan was made from
    unknown: tuple[str, ...] = ()
    most: int | None = None  # tokens of a micro-batch on one device, or rows where the recipe counts rows, as make_plan takes them

    def with_workers(self, num_workers: int, most: int | None = None) -> Decision:
        """The same on so many workers, and with so large micro-batches at most. Raises DoesNotFit if the model states exceed the device."""
        most = self.most if most is None else most
        if (num_workers, most) == (self.plan.world_size, self.most):
            return self
        scaling = self.recipe.scaling.model_copy(update={"num_workers": num_workers})
        return replace(self, plan=make_plan(self.recipe.model_copy(update={"scaling": scaling}), *self.facts, most), most=most)

    def with_all_rows(self) -> Decision:
        """The same with the rows themselves counted where a hub's record does not tell how many there are, which downloads them.

        Raises what `load_rows` raises.
        """
        zero, model, data, hardware = self.facts
        if data.train_rows is not None and (data.eval_rows is not None or self.recipe.data.eval is None):
            return self
        from trainkit.data.source import load_rows

        rows = load_rows(self.recipe)
        facts = zero, model, DataFacts(len(rows.train), None if rows.eval is None else len(rows.eval)), hardware
        return replace(self, plan=make_plan(self.recipe, *facts, self.most), facts=facts)


def decide(recipe: Recipe, path: Path | None, gpu_memory_bytes: int | None = None, most: int | None = None) -> Decision:
    """Plan a recipe that was read from `path`, or made in Python. `gpu_memory_bytes` plans for GPUs that are elsewhere; `most` is
    make_plan's.

    What is not here and not reached leaves its facts unknown. Raises DataError for what is here and is wrong, RecipeError for a ZeRO
    configuration or precision that cannot be, DoesNotFit if the model states exceed the device, UsageError for a GPU's memory where
    none is used.
    """
    if gpu_memory_bytes is not None and not recipe.scaling.use_gpu:
        raise UsageError(
            f"a GPU memory of {format_bytes(gpu_memory_bytes)} is of no use: the recipe trains on the CPU. "
            "Write scaling.use_gpu: true to plan for GPUs"
        )
    from trainkit.data.source import count_rows, hub_is_reached
    from trainkit.training.model import model_facts

    zero = read_zero(recipe.zero, path)
    if not Path(recipe.model.path).exists():
        hub_is_reached()  # probed once, so that nothing below waits for a hub that is not there
    data_paths = recipe.data.path if isinstance(recipe.data.path, list) else [recipe.data.path]
    model, no_model = _reached(lambda: model_facts(recipe), [recipe.model.path])
    data, no_data = _reached(lambda: count_rows(recipe), data_paths)
    hardware = worker_device(recipe.scaling.use_gpu, gpu_memory_bytes)
    facts = zero, model, data or DataFacts(None, None), hardware
    return Decision(recipe, make_plan(recipe, *facts, most), facts, tuple(fault for fault in (no_model, no_data) if fault), most)


def _reached(read: Callable[[], Read], paths: list[str]) -> tuple[Read | None, str | None]:
    try:
        return read(), None
    except DataError as error:
        if any(Path(path).exists() or globbed(path) for path in paths) or "no such folder" in error.message:
            raise
        return None, error.message
