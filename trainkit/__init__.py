"""trainkit: fine-tune Hugging Face models on many workers.

    recipe = trainkit.load_recipe("recipes/quickstart.yaml", ["optimizer.lr=3e-4"])
    plan = trainkit.plan("recipes/quickstart.yaml")

Names are loaded when they are first used: importing trainkit loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainkit.planning.planner import Plan
    from trainkit.recipe.reader import read_recipe as load_recipe
    from trainkit.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "plan"]


def plan(path: str | Path, overrides: Sequence[str] = (), gpu_memory: str | int | None = None) -> Plan:
    """The plan of a recipe file: batch, steps, memory. `gpu_memory` ("80GiB") plans for GPUs that are elsewhere."""
    from pathlib import Path

    from trainkit.cluster.decision import decide
    from trainkit.recipe.reader import read_recipe
    from trainkit.units import parse_bytes

    return decide(read_recipe(path, overrides), Path(path), None if gpu_memory is None else parse_bytes(gpu_memory)).plan


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from trainkit.recipe.schema import Recipe

        return Recipe
    if name == "load_recipe":
        from trainkit.recipe.reader import read_recipe

        return read_recipe
    raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
