"""What the meters cost: blocks of steps with them and without, by turns, on one engine in one run.

With: trainkit's loop as a run has it, meters, steps.jsonl, TensorBoard and the GPU's sensors. Without: the same forwards, backwards and
optimizer steps on the same micro-batches, and one all_gather of two numbers that is read a step late, which the training itself needs.

    python benchmarks/meters.py RECIPE [--set key=value]... [--steps 100]
    torchrun --nproc-per-node 2 benchmarks/meters.py RECIPE --set scaling.num_workers=2 ...
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.cluster.hardware import worker_device
from trainkit.data.batches import Budget
from trainkit.data.distributor import DataDistributor, Feeding
from trainkit.data.feed import Feed, Padding, Source
from trainkit.data.tokens import TokenArrays, load_tokenizer, prepare
from trainkit.planning.facts import DataFacts
from trainkit.planning.planner import Plan, make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import read_zero
from trainkit.runs.folder import RunFolder, StepLog
from trainkit.training import loop
from trainkit.training.board import Story, TensorBoard
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.meters import StepRecord, as_json
from trainkit.training.model import build_model, model_facts

BLOCKS = 5  # of each kind
WARM_UP = 10


def feed_of(recipe: Recipe, plan: Plan, arrays: Path, rank: int, device: torch.device) -> Feed:
    budget = Budget(tokens=plan.tokens_per_device) if plan.samples_per_device is None else Budget(rows=plan.samples_per_device)
    feeding = Feeding(str(arrays), recipe.model.task, recipe.train.seed, plan.samples_per_step, plan.world_size, budget, shuffle=True)
    distributor, tokenizer = DataDistributor({"train": feeding}), load_tokenizer(recipe).tokenizer
    padding = Padding(recipe.model.task, tokenizer.pad_token_id, tokenizer.eos_token_id)
    source = Source(lambda first, count: partial(distributor.steps, "train", first, count, rank))
    return Feed(source, padding, rank=rank, last_step=10**9, device=device)


def metered(engine: Engine, feed: Feed, plan: Plan, recipe: Recipe, folder: RunFolder | None) -> Callable[[int, int], None]:
    """(first step, count) trains so many steps as a run does; rank 0 alone has a folder."""
    board = TensorBoard(folder.path / "tensorboard", Story(plan.use_gpu, worked_seconds=time.monotonic)) if folder is not None else None
    log = StepLog(folder) if folder is not None else None

    def report(record: StepRecord) -> None:
        if board is not None and log is not None:
            board.step(record)
            log.append(as_json(record, "0" * 16))

    def train(first: int, count: int) -> None:
        around = loop.Surroundings(report, lambda step: {}, lambda step: None, lambda outcome: None, lambda: False)
        until = replace(plan, total_steps=first + count - 1, eval_every=0, save_every=0)
        loop.train(engine, feed, until, recipe, around, loop.Outcome(steps=first - 1))

    return train


def bare(engine: Engine, feed: Feed, plan: Plan, recipe: Recipe) -> Callable[[int, int], None]:
    def train(first: int, count: int) -> None:
        before: torch.Tensor | None = None
        for step in range(first, first + count):
            batch = feed.micro_batches(step)
            loss = loop.forward_and_backward(engine, batch, recipe.train.seed)
            norm, _ = engine.step(recipe.optimizer.lr)
            mine = torch.zeros(2, dtype=torch.float64, device=engine.device)
            mine[0], mine[1] = loss, norm
            everyone = torch.empty(2 * plan.world_size, dtype=torch.float64, device=engine.device)
            dist.all_gather_into_tensor(everyone, mine)
            if before is not None:
                before.tolist()
            before = everyone

    return train


def timed(train: Callable[[int, int], None], first: int, count: int, device: torch.device) -> float:
    """Seconds a step."""

    def wait() -> None:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    train(first, count)
    wait()
    return (time.perf_counter() - began) / count


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recipe", type=Path)
    asked.add_argument("--set", action="append", default=[], dest="overrides")
    asked.add_argument("--steps", type=int, default=100, help="of each kind")
    options = asked.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29544"}.items():
        os.environ.setdefault(name, value)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as runs:
        storage = f"run.storage_path={os.environ.get('METERS_RUNS', runs)}"
        own = [f"scaling.num_workers={world_size}", "data.eval=null", "train.metrics=[]", storage]
        recipe = read_recipe(options.recipe, [*options.overrides, *own])
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if recipe.scaling.use_gpu else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        folder = RunFolder.create(runs, "meters") if rank == 0 else None
        prepared = prepare(recipe)
        facts = model_facts(recipe, prepared.label_names)
        rows = DataFacts(TokenArrays.open(prepared.train).rows, None)
        plan = make_plan(recipe, read_zero(recipe.zero, options.recipe), facts, rows, worker_device(recipe.scaling.use_gpu))
        partitioning = Partitioning(plan)
        model = build_model(recipe, None, partitioning.gathered, prepared.label_names).to(device)
        torch.manual_seed(0)
        for parameter in model.parameters():  # zeros would keep a GPU cooler and quicker than weights do
            torch.nn.init.normal_(parameter, std=0.02)
        engine = Engine(model, plan, recipe.model.task, device)
        feed = feed_of(recipe, plan, prepared.train, rank, device)
        ways = {"without": bare(engine, feed, plan, recipe), "with": metered(engine, feed, plan, recipe, folder)}
        count, seconds = options.steps // BLOCKS, {name: list[float]() for name in ways}
        ways["without"](1, WARM_UP)
        step = WARM_UP + 1
        for block in range(BLOCKS):
            for name in list(ways) if block % 2 == 0 else list(ways)[::-1]:
                seconds[name].append(timed(ways[name], step, count, device))
                step += count
        feed.close()
        if rank == 0:
            print(json.dumps(result(seconds, count, plan)), flush=True)
        engine.close()


def result(seconds: dict[str, list[float]], count: int, plan: Plan) -> dict[str, Any]:
    pairs = [w / b for w, b in zip(seconds["with"], seconds["without"], strict=True)]
    milliseconds = {name: round(1000 * statistics.median(all_blocks), 2) for name, all_blocks in seconds.items()}
    ratios = {"ratio_median": round(statistics.median(pairs), 4), "ratios": [round(pair, 4) for pair in pairs]}
    return {"device": plan.device_name, "workers": plan.world_size, "steps_each": count * BLOCKS, "step_ms": milliseconds} | ratios


if __name__ == "__main__":
    main()
