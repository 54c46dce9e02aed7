"""summary.json: what a run came to, from its plan, its steps and rank 0's outcome. Written for every run, also a failed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.errors import TrainkitError
from trainkit.planning.planner import Plan


def summarize(
    plan: Plan,
    steps: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, Any],
    error: TrainkitError | None,
    wall_seconds: float,
    failures: Sequence[Mapping[str, Any]] = (),
    restarts: int = 0,
) -> dict[str, Any]:
    """`outcome` is rank 0's, empty if it left none. `seconds` counts optimizer steps alone, `wall_seconds` the whole command."""
    samples, tokens, seconds, waited = (sum(step[key] for step in steps) for key in ("samples", "tokens", "seconds", "data_wait_seconds"))
    return {
        "status": status(outcome, error),
        "steps": len(steps),
        "epochs": round(samples / plan.rows, 4) if plan.rows else None,
        "samples": samples,
        "tokens": tokens,
        "train_loss": sum(step["loss"] for step in steps) / len(steps) if steps else None,
        "eval": outcome.get("eval"),
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "samples_per_second": _rate(samples, seconds),
        "tokens_per_second": _rate(tokens, seconds),
        "mfu": outcome.get("mfu"),
        "peak_memory_gib": steps[-1]["peak_memory_gib"] if steps else None,
        "data_wait_fraction": _rate(waited, seconds),
        "restarts": restarts,
        "failures": list(failures),
        "world_size": plan.world_size,
        "zero_stage": plan.zero_stage,
        "offload": {"optimizer": plan.offload_optimizer, "param": plan.offload_param},
        "precision": plan.precision,
        "order": steps[-1]["order"] if steps else None,
        "error": None if error is None else _error(error),
        **{key: outcome[key] for key in ("best_step", "stopped_early", "copy", "predictions") if key in outcome},
    }


def status(outcome: Mapping[str, Any], error: TrainkitError | None) -> str:
    """completed | failed | interrupted"""
    if error is not None:
        return "interrupted" if error.exit_code == 130 else "failed"
    return str(outcome["status"])


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def _error(error: TrainkitError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": error.message, "rank": error.facts.get("rank"), "step": error.facts.get("step")}
