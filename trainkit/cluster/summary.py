"""summary.json: what a run came to, from its plan, its steps and rank 0's outcome. Written for every run, also a failed one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainkit.errors import TrainkitError
from trainkit.planning.planner import Plan
from trainkit.units import gib

MEASURED_ON_CPU = {"parameters": "parameter_bytes", "optimizer": "optimizer_bytes"}
MEASURED = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "buckets": "bucket_bytes",
    "activations": "activation_bytes",
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
    ranks: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[Mapping[str, Any]] = (),
    restarts: int = 0,
) -> dict[str, Any]:
    """`outcome` is rank 0's, empty if it left none; `ranks` what each measured last.

    `seconds` counts optimizer steps alone, `wall_seconds` the whole command, `worked_seconds` all commands that worked on this run.
    """
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
        "mfu": _mean_mfu(steps),
        "goodput": _rate(seconds, worked_seconds),
        "piece_seconds": _sums(step.get("piece_seconds", {}) for step in steps),  # earlier versions wrote none
        "peak_memory_gib": steps[-1]["peak_memory_gib"] if steps else None,
        "memory": _memory(plan, ranks),
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


def _mean_mfu(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the time of the steps; None where it is left out."""
    told = [step for step in steps if step.get("mfu") is not None]
    return _rate(sum(step["mfu"] * step["seconds"] for step in told), sum(step["seconds"] for step in told))


def _sums(all_pieces: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for pieces in all_pieces:
        for piece, seconds in pieces.items():
            total[piece] = total.get(piece, 0.0) + seconds
    return total


def _memory(plan: Plan, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """GiB by category on the device, as planned and as each rank measured; what cannot be told is left out."""
    planned = {} if plan.memory is None else {name: gib(size) for name, size in plan.memory.device.items()}
    expected = {"activations": plan.expected_activation_bytes, "peak": plan.expected_peak_bytes}
    planned |= {name: gib(size) for name, size in expected.items() if size is not None}
    told = MEASURED if plan.use_gpu else MEASURED_ON_CPU
    return {"planned": planned, "measured": [{name: gib(rank[key]) for name, key in told.items()} for rank in ranks]}


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def _error(error: TrainkitError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": error.message, "rank": error.facts.get("rank"), "step": error.facts.get("step")}
