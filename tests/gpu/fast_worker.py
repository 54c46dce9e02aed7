"""One rank of the table of fast paths: trains every asked case for some steps and, on rank 0, writes losses and gradient norms.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29511 python fast_worker.py cases.json results.json
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from memory_worker import run_cases

from trainkit.data.padding import MicroBatch, StepBatch
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.flops import Work
from trainkit.planning.planner import make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero
from trainkit.training import loop
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.model import build_model, model_facts
from trainkit.training.tasks import TASKS

STEPS, LR = 18, 1e-3
SHAPES = [(4, 24, 16), (6, 16, 16), (2, 40, 24)]  # each comes again and again, so that it is captured and replayed


def micro_batches(step: int, rank: int, device: torch.device, count: int = 2, rows_are: str = "pairs") -> list[MicroBatch]:
    """With padding and labels that do not count; drawn from (step, rank).

    rows_are: "pairs" of source and target, "texts", texts that are "packed" in twos, or texts of two "classes".
    """
    drawn = []
    for number in range(count):
        place = rank + (step if step <= len(SHAPES) else step + number)  # at first one is met twice in a step; each rank has others
        rows, source, target = SHAPES[place % len(SHAPES)]
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
        ids, labels = (torch.randint(3, 300, (rows, length), generator=generator) for length in (source, target))
        mask = torch.ones_like(ids)
        mask[0, source // 2 :], labels[0, target // 2 :] = 0, -100
        if rows_are == "classes":
            labels = labels[:, -1] % 2
        elif rows_are != "pairs":
            labels = torch.where(mask == 1, ids, -100)
        drawn.append(MicroBatch(rank * count + number, np.arange(rows), *(t.to(device) for t in (ids, mask, labels)), None, Work(), 0))
        if rows_are == "packed":
            place = torch.arange(source, device=device).expand(rows, -1)
            drawn[-1] = replace(drawn[-1], attention_mask=None, position_ids=place % (source // 2))
    return drawn


def step_batch(step: int, ranks: list[int], device: torch.device, count: int = 2, rows_are: str = "pairs") -> StepBatch:
    """The micro-batches of these ranks, with the label count of all."""
    everyone = [micro_batches(step, rank, device, count, rows_are) for rank in range(dist.get_world_size())]
    first = 1 if rows_are in ("texts", "packed") else 0  # label that is learned in a row
    counted = sum(int((micro.labels[..., first:] != -100).sum()) for own in everyone for micro in own)
    return StepBatch(step, 0, 0, counted, count * len(everyone), [micro for rank in ranks for micro in everyone[rank]])


def train_with_torch(case: dict[str, Any], device: torch.device) -> list[list[float]]:
    """A slow, obvious loop: every rank alone trains the micro-batches of all, with torch's AdamW parameter by parameter."""
    recipe = read_recipe(case["recipe"], case["set"])
    task, keys = TASKS[recipe.model.task], recipe.optimizer
    model = build_model(recipe, case["first_weights"], lambda parameter: contextlib.nullcontext(True)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=tuple(keys.betas), eps=keys.eps, weight_decay=keys.weight_decay, foreach=False, fused=False
    )  # type: ignore[arg-type]
    rows = []
    for step in range(1, STEPS + 1):
        batch = step_batch(step, [*range(dist.get_world_size())], device, rows_are=case["rows_are"])
        optimizer.zero_grad()
        losses = [task.sum_loss(task.logits(model, micro), micro.labels) / batch.label_tokens for micro in batch.micro_batches]
        torch.autograd.backward(losses)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), keys.max_grad_norm)
        optimizer.step()
        rows.append([float(sum(losses)), float(norm)])
    return rows


@contextlib.contextmanager
def waits_of_the_host(watched: bool) -> Iterator[list[str]]:
    """Where the host waits for the GPU meanwhile, as for `.item()`; nothing is looked for if not `watched`."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn" if watched else "default")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA operation" in str(one.message)]


def train(case: dict[str, Any], device: torch.device) -> list[list[float]]:
    if case.get("torch"):
        return train_with_torch(case, device)
    recipe = read_recipe(case["recipe"], case["set"])
    plan = make_plan(recipe, read_zero(recipe.zero), model_facts(recipe), DataFacts(64, None), Hardware("cuda", "GPU", 140 << 30))
    plan = replace(plan, compiled_shapes=tuple(SHAPES[: case.get("own_kernels", 0)]))
    if plan.selective_checkpointing or plan.compiled_shapes:
        torch._dynamo.reset()  # what other cases have compiled would be taken
    partitioning = Partitioning(plan)
    said: list[str] = []
    model = build_model(recipe, case["first_weights"], partitioning.gathered)
    if case.get("waits"):
        model.register_forward_pre_hook(lambda module, inputs: module.shared.weight.sum().item() and None)
    engine = Engine(model, plan, recipe.model.task, device, said.append)
    first = micro_batches(1, dist.get_rank(), device, rows_are=case["rows_are"])[0]
    engine.warm_up(replace(first, labels=torch.full_like(first.labels, -100)), capture=False)
    if case["captured"]:  # all shapes before the first step, as a run does; else when they have come often
        drawn = {micro.input_ids.shape: micro for step in range(1, 4) for rank in range(3) for micro in micro_batches(step, rank, device)}
        for micro in drawn.values():
            engine.warm_up(replace(micro, labels=torch.full_like(micro.labels, -100)), capture=True)
        assert engine.graphs is not None and len(engine.graphs.made) == len(SHAPES)
    rows = []
    for step in range(1, STEPS + 1):
        batch = step_batch(step, [dist.get_rank()], device, case["micro_batches"], case["rows_are"])
        replayed = engine.graphs is not None and len(engine.graphs.made) == len(SHAPES)
        with waits_of_the_host(replayed or bool(case.get("waits"))) as waits:
            loss = loop.forward_and_backward(engine, batch, recipe.train.seed)
            norm, _ = engine.step(LR)
        assert bool(waits) == bool(case.get("waits")), (case["name"], step, waits)
        dist.all_reduce(loss)
        rows.append([float(loss) / batch.label_tokens, float(norm)])
    if case.get("waits"):
        assert len(said) == 1 and "no CUDA graph" in said[0], said
        assert engine.graphs is not None and not engine.graphs.made
    else:
        assert not said, said
    if engine.graphs is not None and not case.get("waits"):
        assert len(engine.graphs.made) == len(SHAPES), "every shape was captured"
        assert engine.held().activations > 0
    engine.close()
    return rows


if __name__ == "__main__":
    run_cases(train, *sys.argv[1:])
