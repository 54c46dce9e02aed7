"""What the steps of a run add up to: for summary.json, and for runs that have none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def totals(steps: Sequence[Mapping[str, Any]], rows: int | None) -> dict[str, Any]:
    """Keys of summary.json that follow from steps.jsonl and the rows of an epoch. None: not known. Steps of earlier versions lack some.

    `steps` is the number of the last one, also where lines before it were lost; what is added up counts the lines that are there.
    `mfu` is the mean over the time of the steps that have one, `piece_seconds` is empty unless every step has them.
    `peak_memory_gib` is that of each rank over all steps with as many workers as the last one had.
    """
    samples, tokens, seconds = (sum(step[key] for step in steps) for key in ("samples", "tokens", "seconds"))
    waited = sum(step.get("data_wait_seconds", 0.0) for step in steps)
    told = [step for step in steps if step.get("mfu") is not None]
    last = steps[-1] if steps else {}
    return {
        "steps": last.get("step", 0),
        "epochs": round(samples / rows, 4) if rows else None,
        "samples": samples,
        "tokens": tokens,
        "train_loss": sum(step["loss"] for step in steps) / len(steps) if steps else None,
        "seconds": seconds,
        "samples_per_second": rate(samples, seconds),
        "tokens_per_second": rate(tokens, seconds),
        "mfu": rate(sum(step["mfu"] * step["seconds"] for step in told), sum(step["seconds"] for step in told)),
        "piece_seconds": _sums([step.get("piece_seconds", {}) for step in steps]),
        "peak_memory_gib": peaks(steps),
        "data_wait_fraction": rate(waited, seconds),
        "order": last.get("order"),
    }


def peaks(steps: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """GiB by rank. Each process measures from its own start, so a resumed run's highest peak may stand before its last step."""
    last = steps[-1].get("peak_memory_gib") if steps else None
    if last is None:
        return None
    of_these_workers = (step["peak_memory_gib"] for step in steps if len(step.get("peak_memory_gib", ())) == len(last))
    return [highest(of_rank) for of_rank in zip(*of_these_workers, strict=True)]


def highest(values: Iterable[float]) -> float:
    """A NaN among them is shown as a NaN."""
    known = list(values)
    return math.nan if any(math.isnan(value) for value in known) else max(known)


def rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def _sums(of_steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = of_steps[0] if of_steps and all(of_steps) else {}
    return {name: sum(pieces.get(name, 0.0) for pieces in of_steps) for name in names}
