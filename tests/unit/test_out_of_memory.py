"""What is told of an allocation that failed: rank, device, bytes beside the plan, and the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainkit.cluster.decision import decide
from trainkit.cluster.hardware import oom_kills
from trainkit.planning.plan import Plan
from trainkit.recipe.reader import read_recipe
from trainkit.training.out_of_memory import device_without_memory, out_of_memory

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return decide(read_recipe(RECIPE), RECIPE).plan


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (MemoryError(), "host"),
        (ValueError("memory of an elephant"), None),
        (KeyError("out"), None),
    ],
)
def test_what_ran_out_is_read_off_the_error(error: Exception, device: str | None) -> None:
    assert device_without_memory(error) == device


def test_an_allocation_of_torch_that_the_host_cannot_serve_is_one(plan: Plan) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    told = out_of_memory(caught.value, plan, torch.device("cpu"), 1, 5, "forward and backward of micro-batch 2 of 4")
    assert told is not None and told.exit_code == 3 and told.facts == {"rank": 1, "step": 5, "device": "host", "in_micro_batches": True}
    first, planned, measured, way_out = told.message.splitlines()
    assert first.startswith("step 5: rank 1 ran out of host memory in forward and backward of micro-batch 2 of 4: ")
    assert planned.startswith("  the plan: ") and measured.startswith("  measured: this process holds ")
    assert "batch.tokens_per_device: 2048 (now 4096" in way_out and "train.halve_on_oom" in way_out


def test_the_plan_is_told_by_category(plan: Plan) -> None:
    assert plan.memory is not None
    told = out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), plan, torch.device("cpu"), 0, 1, "the optimizer step")
    assert told is not None
    for category in ("parameters", "gradients", "optimizer"):
        assert category in told.message


def test_where_nothing_is_left_to_halve_other_ways_are_named(plan: Plan) -> None:
    least = replace(plan, accumulation=plan.samples_per_step)
    for told in (
        out_of_memory(MemoryError(), least, torch.device("cpu"), 0, 1, "evaluating"),
        out_of_memory(MemoryError(), plan, torch.device("cpu"), 0, 1, "building the engine", in_micro_batches=False),
    ):
        assert told is not None and "halve_on_oom" not in told.message and "model.gradient_checkpointing: true" in told.message


def test_another_error_is_not_touched(plan: Plan) -> None:
    assert out_of_memory(ValueError("a bug"), plan, torch.device("cpu"), 0, 1, "evaluating") is None


def test_the_kernels_count_is_read_where_there_is_one(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    assert oom_kills(events) == 0
    events.write_text("low 0\nhigh 12\nmax 3\noom 2\noom_kill 2\n")
    assert oom_kills(events) == 2
    events.write_text("oom_kill many\n")
    assert oom_kills(events) == 0
