"""What the meters cost: blocks of steps with them and without, by turns, on one engine in one run.

With: trainkit's loop as a run has it, meters, steps.jsonl, TensorBoard and the GPU's sensors. Without: the same forwards, backwards and
optimizer steps on the same micro-batches, and one all_gather of two numbers that is read a step late, which the training itself needs.

    python benchmarks/meters.py RECIPE [--set key=value]... [--steps 100]
    torchrun --nproc-per-node 2 benchmarks/meters.py RECIPE --set scaling.num_workers=2 ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from in_process import Rank

from trainkit.data.feed import Feed
from trainkit.planning.plan import Plan
from trainkit.recipe.schema import Recipe
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepLog
from trainkit.training import loop
from trainkit.training.board import Story, TensorBoard
from trainkit.training.engine import Engine
from trainkit.training.meters import StepRecord, as_json

BLOCKS = 5  # of each kind
WARM_UP = 10


def metered(engine: Engine, feed: Feed, plan: Plan, recipe: Recipe, folder: RunFolder | None) -> Callable[[int, int], None]:
    """(first step, count) trains so many steps as a run does; rank 0 alone has a folder."""
    board = TensorBoard(folder.path / "tensorboard", Story(plan.use_gpu, worked_seconds=time.monotonic)) if folder is not None else None
    log, told = StepLog(folder) if folder is not None else None, [0.0]

    def report(record: StepRecord) -> None:
        if board is not None and log is not None:
            board.step(record)
            log.append(as_json(record, "0" * 16))
            if time.monotonic() - told[0] > 1.0 and folder is not None:
                told[0] = time.monotonic()
                folder.write_ranks([asdict(of_rank) for of_rank in record.ranks])

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


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recipe", type=Path)
    asked.add_argument("--set", action="append", default=[], dest="overrides")
    asked.add_argument("--steps", type=int, default=100, help=f"of each kind, at least {BLOCKS}")
    options = asked.parse_args()
    if options.steps < BLOCKS:
        asked.error(f"--steps {options.steps}: each kind has {BLOCKS} blocks")
    with tempfile.TemporaryDirectory() as runs:
        rank = Rank.join(options.recipe, options.overrides, runs)
        recipe, plan = rank.recipe, rank.plan
        folder = RunFolder.create(runs, "meters") if rank.number == 0 else None
        engine, feed = rank.engine(), rank.feed()
        rank.warm_up(engine, feed)
        ways = {"without": bare(engine, feed, plan, recipe), "with": metered(engine, feed, plan, recipe, folder)}
        count, seconds = options.steps // BLOCKS, {name: list[float]() for name in ways}
        ways["without"](1, WARM_UP)
        step = WARM_UP + 1
        for block in range(BLOCKS):
            for name in list(ways) if block % 2 == 0 else list(ways)[::-1]:
                seconds[name].append(rank.timed(ways[name], step, count))
                step += count
        feed.close()
        if rank.number == 0:
            print(json.dumps(result(seconds, count, plan)), flush=True)
        engine.close()
        dist.destroy_process_group()


def result(seconds: dict[str, list[float]], count: int, plan: Plan) -> dict[str, Any]:
    pairs = [w / b for w, b in zip(seconds["with"], seconds["without"], strict=True)]
    milliseconds = {name: round(1000 * statistics.median(all_blocks), 2) for name, all_blocks in seconds.items()}
    ratios = {"ratio_median": round(statistics.median(pairs), 4), "ratios": [round(pair, 4) for pair in pairs]}
    return {"device": plan.device_name, "workers": plan.world_size, "steps_each": count * BLOCKS, "step_ms": milliseconds} | ratios


if __name__ == "__main__":
    main()
