"""Run folders as trainkit writes them, with its own writers, of trainings that never were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from test_memory import t5_large

from trainkit.cluster.summary import summarize
from trainkit.errors import TrainkitError
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.zero import read_zero
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepLog
from trainkit.units import GIB

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = 56_344
H200 = Hardware("cuda", "NVIDIA H200", 139 * GIB)
CPU = Hardware("cpu", "CPU", None)
ENVIRONMENT = {
    "python": "3.12.3",
    "packages": {"trainkit": "0.1.0", "torch": "2.11.0+cu130", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.17.0"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": False,
    "platform": "Linux-6.1-x86_64-with-glibc2.39",
    "cpu_count": 16,
    "gpus": ["NVIDIA H200", "NVIDIA H200"],
}


def plant(
    runs: Path,
    name: str,
    *overrides: str,
    recipe: str = "t5_large_zero1",
    hardware: Hardware = H200,
    losses: Sequence[float] = (3.0, 2.0, 1.0),
    seconds: float = 0.5,
    peak_gib: float = 12.0,
    mfu: float | None = None,
    ended: bool = True,
    error: TrainkitError | None = None,
    environment: dict[str, Any] | None = ENVIRONMENT,
) -> RunFolder:
    """A run with these losses; `ended` False makes no summary.json, as a killed command leaves it. The last rank takes `peak_gib`."""
    workers = "scaling.use_gpu=true" if hardware.device == "cuda" else "scaling.use_gpu=false"
    wish = read_recipe(RECIPES / f"{recipe}.yaml", [f"train.max_steps={max(1, len(losses))}", workers, *overrides])
    plan = make_plan(wish, read_zero(wish.zero), t5_large(), DataFacts(ROWS, 100), hardware)
    folder = RunFolder.create(runs, wish.name, name)
    folder.write_recipe(recipe_to_yaml(wish))
    folder.write_plan(plan.to_json())
    if environment is not None:
        folder.write_environment(environment)
    log = StepLog(folder)
    for number, loss in enumerate(losses, start=1):
        log.append(_step(plan, number, loss, seconds, peak_gib, mfu))
    log.close()
    if ended:
        came_to = {} if error else {"status": "completed", "steps": len(losses), "eval": {"loss": 0.5, "step": len(losses)}}
        folder.write_summary(summarize(plan, folder.read_steps(), came_to, error, 60.0))
    return folder


def _step(plan: Plan, number: int, loss: float, seconds: float, peak_gib: float, mfu: float | None) -> dict[str, Any]:
    peaks = [peak_gib - 1] * (plan.world_size - 1) + [peak_gib]
    line = {"step": number, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "samples": plan.samples_per_step, "tokens": 3000}
    line |= {"seconds": seconds, "data_wait_seconds": 0.001, "order": f"{number:016x}", "peak_memory_gib": peaks}
    return line | {"mfu": mfu, "piece_seconds": {"forward": seconds / 2}}
