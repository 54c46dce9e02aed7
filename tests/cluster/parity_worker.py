"""One rank of the parity table: trains every asked case for 8 steps and, on rank 0, writes losses and gradient norms.

The last row of a case is the evaluation loss over the whole set after training.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29511 python parity_worker.py cases.json results.json

No Ray: the DataDistributor is the plain class it is. A case is a recipe's overrides; "plain" is torch alone on one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.data.batches import Budget
from trainkit.data.distributor import DataDistributor, Feeding
from trainkit.data.encoding import limits
from trainkit.data.feed import Feed, Source
from trainkit.data.padding import MicroBatch, Padding, StepBatch
from trainkit.data.tokens import Prepared, TokenArrays, load_tokenizer, prepare
from trainkit.errors import NonFiniteError, PlanMismatch
from trainkit.inference.evaluate import evaluate_loss
from trainkit.inference.export import export_model
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import read_zero
from trainkit.runs.checkpoints import Checkpoint
from trainkit.training import blocks, loop
from trainkit.training.checkpoint import Saver, restore
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.meters import StepRecord
from trainkit.training.model import build_model, model_facts
from trainkit.training.tasks import TASKS
from trainkit.training.warm_up import steps_looked_at, warm_up

CPU = torch.device("cpu")
blocks.BACKEND = "aot_eager"  # all of torch.compile but the making of kernels, which takes minutes on two cores


def distributor_of(recipe: Recipe, plan: Plan, prepared: Prepared, shuffle: bool = True, joint: bool = False) -> DataDistributor:
    budget = Budget(tokens=plan.tokens_per_device) if plan.samples_per_device is None else Budget(rows=plan.samples_per_device)
    feeding = Feeding(str(prepared.train), recipe.model.task, recipe.train.seed, plan.samples_per_step, plan.world_size, budget, shuffle,
                      joint, limits(recipe)["max_length"] if recipe.data.packing else None)  # fmt: skip
    return DataDistributor({"train": feeding})


def feed_of(recipe: Recipe, plan: Plan, prepared: Prepared, rank: int, shuffle: bool = True, joint: bool = False) -> Feed:
    distributor = distributor_of(recipe, plan, prepared, shuffle, joint)
    tokenizer = load_tokenizer(recipe).tokenizer
    padding = Padding(recipe.model.task, tokenizer.pad_token_id, tokenizer.eos_token_id)
    source = Source(lambda first, count: partial(distributor.steps, "train", first, count, rank))
    return Feed(source, padding, rank=rank, last_step=plan.total_steps, device=CPU)


def planned(recipe: Recipe, prepared: Prepared) -> Plan:
    rows = TokenArrays.open(prepared.train).rows
    return make_plan(
        recipe, read_zero(recipe.zero), model_facts(recipe, prepared.label_names), DataFacts(rows, None), Hardware("cpu", "CPU", None)
    )


def train_with_trainkit(recipe: Recipe, prepared: Prepared, case: dict[str, Any], rank: int) -> list[list[float]]:
    apart = case.get("apart", False)
    plan = replace(planned(recipe, prepared), flat=apart, cuda_graphs=apart)  # without graphs on a CPU, but with their gradients
    shapes = distributor_of(recipe, plan, prepared, joint=case.get("joint", False)).shapes("train", 1, plan.total_steps)
    if case.get("own_kernels"):  # for some of the shapes, so that others stand beside them
        plan = replace(plan, compiled_shapes=tuple((*shape,) for shape in sorted(shapes)[: case["own_kernels"]]))
    if plan.selective_checkpointing or plan.compiled_shapes:
        torch._dynamo.reset()  # what other cases have compiled would be taken
    if case["fault"] == "no norm":
        section = plan.ds_config["zero_optimization"] | {"compute_grad_norm": False}
        plan = replace(plan, ds_config=plan.ds_config | {"zero_optimization": section})
    partitioning = Partitioning(plan)
    model = build_model(recipe, case["first_weights"], partitioning.gathered, prepared.label_names)
    engine = Engine(model, plan, recipe.model.task, CPU)
    if case["fault"] == "mean of means":
        _plant_mean_of_means(engine, plan.micro_batches_per_step)
    if case["fault"] == "NaN on rank 1" and rank == 1:
        _plant_nan(engine, step=3)
    records: list[StepRecord] = []
    feed = feed_of(recipe, plan, prepared, rank, joint=case.get("joint", False))
    outcome = loop.Outcome()
    if "resume" in case:
        found = Checkpoint(Path(case["resume"]))
        restore(engine, found, feed.micro_batches(found.step + 1))
        outcome.steps = found.step
    if ahead := steps_looked_at(plan, outcome.steps + 1):  # compiled, or with the gradients of graphs
        first, columns = outcome.steps + 1, TokenArrays.open(prepared.train).columns
        uses = distributor_of(recipe, plan, prepared, joint=case.get("joint", False)).shapes("train", first, ahead)
        warm_up(engine, uses, first, lambda shape: feed.padding.blank(shape, columns, recipe.data.packing))
    saver = Saver(Path(case["checkpoints"]), "1", keep=9) if "checkpoints" in case else None

    def save(outcome: loop.Outcome) -> None:
        if saver is not None:
            saver.save(engine, outcome.steps, {}, None)

    around = loop.Surroundings(records.append, lambda step: {}, lambda step: None, save, lambda: False)
    try:
        loop.train(engine, feed, plan, recipe, around, outcome)
    except NonFiniteError as error:
        return [[error.facts["step"], error.facts["rank"], record.loss] for record in records]
    except PlanMismatch as error:
        return [[float(error.facts["what"] == "gradient norm"), len(records)]]
    if saver is not None:
        saver.wait()
        saver.close()
        dist.barrier()  # rank 0 has put the manifest there
    if case["export"] is not None:  # straight after a step: under ZeRO-3 parameters may still be on their way
        batch = feed.micro_batches(1).micro_batches[0]
        export_model(engine, load_tokenizer(recipe).tokenizer, Path(case["export"]), recipe, batch)
    evaluation = feed_of(recipe, plan, prepared, rank, shuffle=False)
    loss = evaluate_loss(engine, evaluation, plan.steps_per_epoch or 0)["loss"]
    evaluation.close()
    feed.close()
    engine.close()
    return [*([record.loss, record.grad_norm, record.samples] for record in records), [loss, loss, plan.rows or 0]]


def _plant_mean_of_means(engine: Engine, num_micro_batches: int) -> None:
    """What most trainers do: every micro-batch is divided by its own label count, then the micro-batches are averaged."""
    exact_loss, exact_backward, counts = engine.sum_loss, engine.backward, []

    def sum_loss(batch: MicroBatch) -> torch.Tensor:
        counts.append(int((batch.labels != -100).sum()))
        return exact_loss(batch)

    engine.sum_loss = sum_loss  # type: ignore[method-assign]
    engine.backward = lambda loss, tokens, last: exact_backward(loss, counts[-1] * num_micro_batches, last)  # type: ignore[method-assign]


def _plant_nan(engine: Engine, step: int) -> None:
    exact_loss, calls = engine.sum_loss, iter(range(1, 100))
    engine.sum_loss = lambda batch: exact_loss(batch) * (float("nan") if next(calls) == step else 1.0)  # type: ignore[method-assign]


def train_with_torch(recipe: Recipe, prepared: Prepared, first_weights: str) -> list[list[float]]:
    """A slow, obvious loop: one process, one batch a step, torch.optim.AdamW."""
    plan = planned(recipe, prepared)
    task, keys = TASKS[recipe.model.task], recipe.optimizer
    model = build_model(recipe, first_weights, lambda parameter: contextlib.nullcontext(True), prepared.label_names)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=keys.lr, betas=tuple(keys.betas), eps=keys.eps, weight_decay=keys.weight_decay)  # type: ignore[arg-type]
    feed, results = feed_of(recipe, plan, prepared, 0), []
    for step in range(1, plan.total_steps + 1):
        batch: StepBatch = feed.micro_batches(step)
        (rows,) = batch.micro_batches
        counted = rows.labels[:, 1:] if recipe.model.task == "causal" else rows.labels
        loss = task.sum_loss(task.logits(model, rows), rows.labels) / (counted != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, keys.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, plan.total_steps, plan.warmup_steps, keys.lr, keys.lr_scheduler_type)
        optimizer.step()
        results.append([loss.item(), norm.item(), float(batch.samples)])
    feed.close()
    results.append(evaluate_with_torch(recipe, plan, prepared, model))
    return results


def evaluate_with_torch(recipe: Recipe, plan: Plan, prepared: Prepared, model: Any) -> list[float]:
    """The last row of a case: the loss over the whole set after training, twice, and the rows."""
    task, feed = TASKS[recipe.model.task], feed_of(recipe, plan, prepared, 0, shuffle=False)
    total = labels = 0.0
    with torch.no_grad():
        for step in range(1, (plan.steps_per_epoch or 0) + 1):
            batch = feed.micro_batches(step)
            total += sum(task.sum_loss(task.logits(model.eval(), rows), rows.labels).item() for rows in batch.micro_batches)
            labels += batch.label_tokens
    feed.close()
    return [total / labels, total / labels, float(plan.rows or 0)]


def main(cases_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for case in json.loads(Path(cases_file).read_text()):
        recipe = read_recipe(case["recipe"], [*case["set"], f"scaling.num_workers={world_size}"])
        if rank == 0:
            prepare(recipe)
        dist.barrier()
        prepared, began = prepare(recipe), time.monotonic()
        if case["plain"]:
            results[case["name"]] = train_with_torch(recipe, prepared, case["first_weights"])
        else:
            results[case["name"]] = train_with_trainkit(recipe, prepared, case, rank)
        print(f"{case['name']}: {time.monotonic() - began:.1f} s", flush=True)
    if rank == 0:
        Path(results_file).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
