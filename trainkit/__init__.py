"""trainkit: fine-tune Hugging Face models on many workers.

    recipe = trainkit.load_recipe("recipes/quickstart.yaml").with_({"optimizer.lr": 3e-4})
    trainkit.plan(recipe)
    run = trainkit.train(recipe)      # beside this process
    run.watch()
    trainkit.open_run("runs/quickstart-1").plot()
    trainkit.compare("runs")

Names are loaded when they are first used: importing trainkit loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.recipe.reader import read_recipe as load_recipe
    from trainkit.recipe.schema import Recipe
    from trainkit.runs.notebook import compare, open_run, plan, train

__all__ = ["Recipe", "compare", "load_recipe", "open_run", "plan", "train"]

_HOMES = {
    "Recipe": ("trainkit.recipe.schema", "Recipe"),
    "compare": ("trainkit.runs.notebook", "compare"),
    "load_recipe": ("trainkit.recipe.reader", "read_recipe"),
    "open_run": ("trainkit.runs.notebook", "open_run"),
    "plan": ("trainkit.runs.notebook", "plan"),
    "train": ("trainkit.runs.notebook", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
    module, own_name = _HOMES[name]
    return getattr(import_module(module), own_name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
