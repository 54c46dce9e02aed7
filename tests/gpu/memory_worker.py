"""One rank of the memory table: builds every asked case, trains three steps of one tiny row, and writes what the GPU held.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29511 python memory_worker.py cases.json results.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainkit.data.padding import MicroBatch
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.flops import Work
from trainkit.planning.planner import make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.model import build_model, model_facts


def tiny_batch(device: torch.device) -> MicroBatch:
    """One row of 8 tokens: next to no activations, so that what is left are the model states."""
    ids = torch.full((1, 8), 5, device=device)
    return MicroBatch(0, np.zeros(1, np.int64), ids, torch.ones_like(ids), ids.clone(), None, Work(8, 8), 16)


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    recipe = read_recipe(case["recipe"], case["set"])
    facts = model_facts(recipe)
    plan = make_plan(recipe, read_zero(recipe.zero), facts, DataFacts(64, None), Hardware("cuda", "GPU", 140 << 30))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    partitioning = Partitioning(plan)
    model = build_model(recipe, case["first_weights"], partitioning.gathered)
    built = torch.cuda.max_memory_allocated(device) - before
    engine = Engine(model, plan, recipe.model.task, device)
    ready = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    batch = tiny_batch(device)
    if plan.cuda_graphs:
        engine.warm_up(replace(batch, labels=torch.full_like(batch.labels, -100)), capture=True)
        assert engine.graphs is not None and engine.graphs.made
    steps = 0
    while steps < 3:  # fp16 skips steps until its loss scale is found
        engine.backward(engine.sum_loss(batch), 8, last=True)
        steps += engine.step(1e-4)[1]
    peak = torch.cuda.max_memory_allocated(device) - before
    between = torch.cuda.memory_allocated(device) - before
    engine.close()
    del engine, model, partitioning
    gc.collect()
    torch.cuda.empty_cache()
    whole = facts.num_parameters * {"bf16": 2, "fp16": 2, "fp32": 4}[plan.precision]
    assert plan.memory is not None
    planned = {name: getattr(plan.memory, name) for name in ("device", "device_total", "device_at_step", "device_at_start")}
    return planned | {"built": built, "ready": ready, "peak": peak, "between": between, "whole": whole}


def run_cases(measured: Callable[[dict[str, Any], torch.device], Any], cases_file: str, results_file: str) -> None:
    """Joins the other ranks, goes through the cases, and writes what rank 0 found."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.ones(1, device=device).sum().item()  # the context and the first block of the allocator are no model states
    dist.barrier()
    results, began = {}, time.monotonic()
    for case in json.loads(Path(cases_file).read_text()):
        results[case["name"]] = measured(case, device)
        print(f"{time.monotonic() - began:6.1f} s  {case['name']}", results[case["name"]], flush=True)
    if dist.get_rank() == 0:
        Path(results_file).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_cases(measure, *sys.argv[1:])
