"""The peer "Ray Train with Ray Data and DeepSpeed", put together as in Ray's own example: one JSON line, as benchmarks/train.py prints it.

    python benchmarks/ray_data.py RECIPE --workers 2 [--set key=value]... [--steps 60] [--warm-up 20]

A TorchTrainer; each worker iterates its shard of a Ray Dataset of token ids, in batches padded to their longest row, and trains with
deepspeed.initialize, the model's own loss, and accumulation up to the samples of a step, 32 rows a device and micro-batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import ray
import ray.data
import ray.train
from in_process import Rank
from ray.train.torch import TorchTrainer
from train import ROWS_OF_THE_REFERENCE, Clock, Collator, report

from trainkit.data.tokens import TokenArrays, prepare
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero


def train(job: dict[str, Any]) -> None:
    """One worker; rank 0 writes the line to job["result"]."""
    rank = Rank.join(Path(job["recipe"]), job["overrides"], job["runs"])
    recipe, plan = rank.recipe, rank.plan
    share = plan.samples_per_step // plan.world_size
    rows = min(share, ROWS_OF_THE_REFERENCE)
    config = {
        "zero_optimization": read_zero(recipe.zero).json.get("zero_optimization", {"stage": 0}),
        "bf16": {"enabled": recipe.model.precision == "bf16"},
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": share // rows,
        "optimizer": {"type": "AdamW", "params": {"lr": recipe.optimizer.lr, "torch_adam": True}},
    }
    clock = Clock(rank, job["warm_up"], job["steps"], job["began"])
    model = rank.model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batches, collate = _forever(rows), Collator(rank, tuned=True)
    while clock.done < clock.total:
        for _ in range(share // rows):
            batch = {name: tensor.to(rank.device) for name, tensor in collate(next(batches)).items()}
            engine.backward(engine(**batch).loss)
            engine.step()
        clock.tick()
    if rank.number == 0:
        Path(job["result"]).write_text(report("ray-data", clock))


def _forever(rows: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of this worker's shard, epoch after epoch; a last, smaller one is dropped."""
    shard = ray.train.get_dataset_shard("train")
    while True:
        for columns in shard.iter_batches(batch_size=rows, batch_format="numpy", local_shuffle_buffer_size=8 * rows, drop_last=True):
            yield [dict(zip(columns, (value.tolist() for value in row), strict=True)) for row in zip(*columns.values(), strict=True)]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recipe", type=Path)
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--set", action="append", default=[], dest="overrides")
    asked.add_argument("--steps", type=int, default=60)
    asked.add_argument("--warm-up", type=int, default=20)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        own = ["data.eval=null", "train.metrics=[]", f"run.storage_path={runs}"]
        recipe = read_recipe(options.recipe, [*options.overrides, *own])
        arrays = TokenArrays.open(prepare(recipe).train)
        columns = {name: arrays.by_column[name] for name in ("input_ids", "labels")}
        rows = [{name: column.row(index).tolist() for name, column in columns.items()} for index in range(arrays.rows)]
        ray.init(address="local")
        job = {"recipe": str(options.recipe.absolute()), "overrides": options.overrides, "runs": runs, "result": f"{runs}/result.json",
               "steps": options.steps, "warm_up": options.warm_up, "began": psutil.Process().create_time()}  # fmt: skip
        scaling = ray.train.ScalingConfig(num_workers=options.workers, use_gpu=recipe.scaling.use_gpu, resources_per_worker={"CPU": 0.5})
        storage = ray.train.RunConfig(storage_path=runs)
        datasets = {"train": ray.data.from_items(rows, override_num_blocks=16)}
        TorchTrainer(train, train_loop_config=job, datasets=datasets, scaling_config=scaling, run_config=storage).fit()
        print(json.dumps(json.loads(Path(job["result"]).read_text())), flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
