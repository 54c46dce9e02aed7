"""A rank of a recipe without Ray: the plan, the feed and the engine, for benchmarks that torchrun or python starts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.cluster.hardware import worker_device
from trainkit.data.batches import Budget
from trainkit.data.budget import split_for_padding
from trainkit.data.distributor import DataDistributor, Feeding
from trainkit.data.feed import Feed, Source
from trainkit.data.padding import Padding, moved
from trainkit.data.tokens import Prepared, TokenArrays, load_tokenizer, prepare
from trainkit.inference.evaluate import evaluate_loss
from trainkit.planning.facts import DataFacts
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.planning.revision import with_micro_batches
from trainkit.planning.speed import joins_shapes
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import read_zero
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.model import build_model, model_facts, write_first_weights
from trainkit.training.warm_up import steps_looked_at, warm_up


@dataclass(frozen=True)
class Rank:
    """What is the same for all who train here: the recipe, its rows and the plan."""

    number: int
    recipe: Recipe
    plan: Plan
    prepared: Prepared
    device: torch.device
    distributor: DataDistributor
    first_weights: str | None = None  # of the recipe's seed; None: `model` draws others

    @classmethod
    def join(cls, path: Path, overrides: list[str], runs: str, evaluates: bool = False) -> Rank:
        """Make the process group of torchrun's environment, or of one process, and plan the recipe for it.

        evaluates: the recipe's evaluation set is prepared, too, and the model begins with the weights that a run would begin with.
        """
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29544"}.items():
            os.environ.setdefault(name, value)
        world_size = int(os.environ["WORLD_SIZE"])
        own = [f"scaling.num_workers={world_size}", "train.metrics=[]", f"run.storage_path={runs}"]
        own += [] if evaluates else ["data.eval=null"]
        recipe = read_recipe(path, [*overrides, *own])
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if recipe.scaling.use_gpu else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():  # Ray Train has made one
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        prepared = prepare(recipe)
        rows = DataFacts(TokenArrays.open(prepared.train).rows, None)
        hardware = worker_device(recipe.scaling.use_gpu)
        plan = make_plan(recipe, read_zero(recipe.zero, path), model_facts(recipe, prepared.label_names), rows, hardware)
        plan = split_for_padding(plan, recipe.model.task, prepared.train)
        budget = Budget(tokens=plan.tokens_per_device) if plan.samples_per_device is None else Budget(rows=plan.samples_per_device)
        task, seed, joined = recipe.model.task, recipe.train.seed, joins_shapes(recipe)
        rows_of = {"train": (prepared.train, True, joined)} | ({"eval": (prepared.eval, False, False)} if prepared.eval else {})
        distributor = DataDistributor(
            {
                split: Feeding(str(arrays), task, seed, plan.samples_per_step, plan.world_size, budget, shuffle, joint)
                for split, (arrays, shuffle, joint) in rows_of.items()
            }
        )
        plan = with_micro_batches(plan, recipe, distributor.shapes("train", 1, 32).items(), 32, plan.total_steps)
        first = str(Path(runs) / f"first-{seed}.safetensors") if evaluates and recipe.model.weights == "random" else None
        if first is not None and dist.get_rank() == 0:
            write_first_weights(recipe, Path(first), prepared.label_names)
        dist.barrier()
        return cls(dist.get_rank(), recipe, plan, prepared, device, distributor, first)

    def feed(self, split: str = "train") -> Feed:
        tokenizer = load_tokenizer(self.recipe).tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        padding = Padding(self.recipe.model.task, pad, tokenizer.eos_token_id)
        source = Source(lambda first, count: partial(self.distributor.steps, split, first, count, self.number))
        return Feed(source, padding, rank=self.number, last_step=10**9, device=self.device)

    def warm_up(self, engine: Engine, feed: Feed) -> None:
        """As before the first step of a run."""
        columns = TokenArrays.open(self.prepared.train).columns
        uses = self.distributor.shapes("train", 1, steps_looked_at(self.plan, 1))
        warm_up(engine, uses, 1, lambda shape: moved(feed.padding.blank(shape, columns, packed=False), self.device))

    def model(self, partitioning: Partitioning | None = None) -> torch.nn.Module:
        """On the device, with random weights unless there are first ones: zeros would keep a GPU cooler and quicker than weights do."""
        gathered = (lambda parameter: contextlib.nullcontext(True)) if partitioning is None else partitioning.gathered
        model: torch.nn.Module = build_model(self.recipe, self.first_weights, gathered, self.prepared.label_names).to(self.device)
        if self.first_weights is not None:
            return model
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                torch.nn.init.normal_(getattr(parameter, "ds_tensor", parameter), std=0.02)
        return model

    def engine(self) -> Engine:
        partitioning = Partitioning(self.plan)
        engine = Engine(self.model(partitioning), self.plan, self.recipe.model.task, self.device)
        engine.partitioning = partitioning  # type: ignore[attr-defined]  # lives as long as the model
        return engine

    def evaluation_loss(self, engine: Any) -> float:
        """Of trainkit's engine, or of what behaves like it, over the whole evaluation set."""
        assert self.prepared.eval is not None
        feed, rows = self.feed("eval"), TokenArrays.open(self.prepared.eval).rows
        try:
            return evaluate_loss(engine, feed, -(-rows // self.plan.samples_per_step))["loss"]
        finally:
            feed.close()

    def wait(self) -> None:
        """For all ranks and what they have on their devices."""
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, train: Callable[[int, int], None], first: int, count: int) -> float:
        """Seconds a step of train(first step, count)."""
        self.wait()
        began = time.perf_counter()
        train(first, count)
        self.wait()
        return (time.perf_counter() - began) / count
