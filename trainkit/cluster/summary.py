"""summary.json: what a run came to, from its plan, its steps and rank 0's outcome. Written for every run, also a failed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.errors import TrainkitError
from trainkit.planning.plan import Plan
from trainkit.runs.totals import rate, totals
from trainkit.units import gib

MEASURED_ON_CPU = {"parameters": "parameter_bytes", "optimizer": "optimizer_bytes"}
MEASURED = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activation_bytes",
    "other": "other_bytes",
    "peak": "peak_bytes",
}


def summarize(
    plan: Plan,
    steps: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, Any],
    error: TrainkitError | None,
    wall_seconds: float,
    *,
    worked_seconds: float = 0.0,
    startup_seconds: Mapping[str, float] | None = None,
    ranks: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[Mapping[str, Any]] = (),
    restarts: int = 0,
    evaluation: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`outcome` is rank 0's, empty if it left none; `ranks` what each measured last.

    evaluation: the last one of a run that left no outcome.
    startup_seconds: to the first step of the last attempt, by piece (runs/startup.py).
    `seconds` counts optimizer steps alone, `wall_seconds` the whole command, `worked_seconds` all commands on this run (0: not known).
    """
    added_up = totals(steps, plan.rows)
    return {
        "status": status(outcome, error),
        **added_up,
        "eval": outcome.get("eval", evaluation),
        "wall_seconds": wall_seconds,
        "startup_seconds": dict(startup_seconds or {}),
        "goodput": rate(added_up["seconds"], worked_seconds),
        "memory": _memory(plan, ranks),
        "restarts": restarts,
        "failures": list(failures),
        "world_size": plan.world_size,
        "zero_stage": plan.zero_stage,
        "offload": {"optimizer": plan.offload_optimizer, "param": plan.offload_param},
        "precision": plan.precision,
        "error": None if error is None else _error(error),
        **{key: outcome[key] for key in ("best_step", "stopped_early", "copy", "predictions") if key in outcome},
    }


def status(outcome: Mapping[str, Any], error: TrainkitError | None) -> str:
    """completed | failed | interrupted"""
    if error is not None:
        return "interrupted" if error.exit_code == 130 else "failed"
    return str(outcome["status"])


def _memory(plan: Plan, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """GiB by category on the device, as planned and as each rank measured; what cannot be told is left out."""
    planned = {} if plan.memory is None else {name: gib(size) for name, size in plan.memory.device.items()}
    expected = {"activations": plan.expected_activation_bytes, "peak": plan.expected_peak_bytes}
    planned |= {name: gib(size) for name, size in expected.items() if size is not None}
    told = MEASURED if plan.use_gpu else MEASURED_ON_CPU
    return {"planned": planned, "measured": [{name: gib(rank[key]) for name, key in told.items()} for rank in ranks]}


def _error(error: TrainkitError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": error.message, "rank": error.facts.get("rank"), "step": error.facts.get("step")}
