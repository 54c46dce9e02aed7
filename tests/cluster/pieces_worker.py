"""One rank that compares the states put together from all ranks' pieces with what DeepSpeed itself gathers, for every asked stage.

RANK=0 WORLD_SIZE=3 MASTER_ADDR=localhost MASTER_PORT=29511 python pieces_worker.py recipe.yaml weights.safetensors zero1 zero3
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from parity_worker import CPU, feed_of, planned

from trainkit.data.tokens import prepare
from trainkit.recipe.reader import read_recipe
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.loop import forward_and_backward
from trainkit.training.model import build_model
from trainkit.training.states import STATES, WEIGHT, HostMemory, joined


def compare(recipe_file: str, weights: str, zero: str) -> None:
    recipe = read_recipe(recipe_file, [f"zero={zero}", f"scaling.num_workers={dist.get_world_size()}", "batch.samples=10"])
    prepared = prepare(recipe)
    plan = planned(recipe, prepared)
    engine = Engine(build_model(recipe, weights, Partitioning(plan).gathered), plan, recipe.model.task, CPU)
    feed = feed_of(recipe, plan, prepared, dist.get_rank())
    forward_and_backward(engine, feed.micro_batches(1), seed=1)
    feed.close()  # a thread that pads when Python ends takes the process with it
    engine.step(1e-3)
    memory = HostMemory(sum(piece.values.numel() for piece in engine.states.pieces()), CPU)
    mine, parameters = joined(memory.copied(engine.states.pieces()), None), dict(engine.model.named_parameters())
    seen = 0
    for number, (name, parameter) in enumerate(parameters.items()):
        for state in STATES:
            whole = safe_get_full_fp32_param(parameter) if state == WEIGHT else safe_get_full_optimizer_state(parameter, state)
            here = mine.pop(f"{name}/{state}", None)
            assert (here is not None) == (number % dist.get_world_size() == dist.get_rank()), name
            assert here is None or (here.shape == whole.shape and torch.equal(here, whole)), (zero, name, state)
            seen += here is not None
    assert not mine and seen and any(parameter.numel() % dist.get_world_size() for parameter in parameters.values()), (
        "pieces of unlike length"
    )
    engine.close()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for stage in sys.argv[3:]:
        compare(sys.argv[1], sys.argv[2], stage)
    dist.destroy_process_group()
