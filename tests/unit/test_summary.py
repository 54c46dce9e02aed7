"""summary.json has the contract's keys for every end, and its numbers follow from steps.jsonl."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainkit.cluster.summary import summarize
from trainkit.errors import CapacityError, Interrupted, NonFiniteError
from trainkit.planning.planner import Plan

CONTRACT = {
    *("status", "steps", "epochs", "samples", "tokens", "train_loss", "eval", "seconds", "samples_per_second", "tokens_per_second"),
    *("mfu", "peak_memory_gib", "data_wait_fraction", "restarts", "world_size", "zero_stage", "offload", "precision", "order", "error"),
}

PLAN = cast(Plan, SimpleNamespace(rows=100, world_size=2, zero_stage=3, offload_optimizer=True, offload_param=False, precision="fp32"))


def steps(*losses: float) -> list[dict[str, Any]]:
    return [
        {
            "step": n + 1,
            "loss": loss,
            "samples": 10,
            "tokens": 300,
            "seconds": 0.5,
            "data_wait_seconds": 0.1,
            "order": f"{n:016x}",
            "peak_memory_gib": [1.0, 2.0 + n],
        }
        for n, loss in enumerate(losses)
    ]


def test_a_completed_run_adds_up() -> None:
    outcome = {"status": "completed", "steps": 2, "eval": {"loss": 1.5}, "predictions": []}
    found = summarize(PLAN, steps(3.0, 2.0), outcome, None, 60.0)
    assert set(found) >= CONTRACT
    assert (found["status"], found["steps"], found["epochs"], found["samples"], found["tokens"]) == ("completed", 2, 0.2, 20, 600)
    assert (found["train_loss"], found["eval"], found["seconds"], found["wall_seconds"]) == (2.5, {"loss": 1.5}, 1.0, 60.0)
    assert (found["samples_per_second"], found["tokens_per_second"]) == (20.0, 600.0)
    assert found["data_wait_fraction"] == pytest.approx(0.2)
    assert found["peak_memory_gib"] == [1.0, 3.0]
    assert (found["order"], found["error"], found["offload"]) == (f"{1:016x}", None, {"optimizer": True, "param": False})


def test_a_run_that_failed_before_its_first_step_has_all_keys() -> None:
    found = summarize(PLAN, [], {}, CapacityError("too few"), 3.0)
    assert set(found) >= CONTRACT
    assert (found["status"], found["steps"], found["train_loss"], found["samples_per_second"]) == ("failed", 0, None, None)
    assert found["error"] == {"kind": "CapacityError", "message": "too few", "rank": None, "step": None}


def test_a_failed_run_keeps_its_steps_and_says_where() -> None:
    found = summarize(PLAN, steps(3.0, math.nan), {}, NonFiniteError("step 2: NaN", step=2, rank=1), 3.0)
    assert (found["status"], found["steps"]) == ("failed", 2)
    assert math.isnan(found["train_loss"]), "a NaN is shown as a NaN"
    assert (found["error"]["rank"], found["error"]["step"]) == (1, 2)


def test_an_interrupted_run_is_not_a_failed_one() -> None:
    assert summarize(PLAN, steps(3.0), {"status": "interrupted", "steps": 1}, Interrupted("stopped"), 3.0)["status"] == "interrupted"
    assert summarize(PLAN, steps(3.0), {}, Interrupted("stopped at once"), 3.0)["status"] == "interrupted"
