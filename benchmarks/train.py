"""Training steps of trainkit and of its peers on the same rows, model, precision, clipping and samples a step: one JSON line a case.

    torchrun --nproc-per-node 2 benchmarks/train.py RECIPE --case ours [--set key=value]... [--full-rows] [--steps 60] [--warm-up 20]

ours      trainkit's engine, feed and loop, in the torchrun process; recipe keys choose ZeRO stage, compilation and graphs
ddp       the control: torch's DistributedDataParallel under bf16 autocast, fused AdamW, trainkit's micro-batches
deepspeed DeepSpeed's engine as it is, with trainkit's micro-batches and configuration, and the keys of --config over it: for its machinery
          that trainkit does not use. --coalesce reduces the gradients of a step at once
hf        Hugging Face's Trainer with the recipe's ZeRO stage, as the reference experiment has it: rows padded to their full length,
          32 rows a device and accumulation up to the samples of a step
hf-tuned  the same Trainer with rows grouped by length and padded to the longest of their batch, the whole share of a step in one
          micro-batch, and the bucket sizes that trainkit plans
hf-compiled   that with torch_compile

--full-rows trains rows that all have the recipe's full length. Time is taken over all steps between two waits for the GPU, so what a
step leaves to the next one counts. --evaluate begins with the weights of a run and adds the loss on the evaluation set at the end and,
of trainkit, that of each step. MFU is of the real tokens (planning/flops.py), busy the share of time in which the GPU runs a kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from in_process import Rank

from trainkit.data.arrays import IGNORED_LABEL
from trainkit.data.tokens import TokenArrays, load_tokenizer
from trainkit.planning.flops import Work, works
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero
from trainkit.training import loop
from trainkit.training.engine import Partitioning
from trainkit.training.meters import StepRecord
from trainkit.training.tasks import TASKS

TRACED = 3  # steps in which kernels are counted
ROWS_OF_THE_REFERENCE = 32  # on a device
LONG_ROWS = 4096


class Clock:
    """Told at the end of each step: warm-up, then those that count, then those that are traced."""

    def __init__(self, rank: Rank, warm_up: int, steps: int, began: float):
        self.rank, self.warm_up, self.steps, self.began = rank, warm_up, steps, began
        self.done, self.ticks, self.first_step = 0, list[float](), 0.0
        self.records: list[StepRecord] = []  # of trainkit's own loop
        self.graphs = 0  # that were made before its first step
        self.evaluation: dict[str, Any] = {}
        self.trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if rank.device.type == "cuda" else None

    def evaluate(self, engine: Any) -> None:
        """At the end, where the rank has an evaluation set; engine: trainkit's, or a model like one."""
        if self.rank.prepared.eval is not None:
            self.evaluation = {"eval_loss": round(self.rank.evaluation_loss(engine), 5)}
            self.evaluation |= {"losses": [round(record.loss, 5) for record in self.records]} if self.records else {}

    @property
    def total(self) -> int:
        return self.warm_up + self.steps + TRACED

    def tick(self) -> None:
        self.done += 1
        if self.done == 1:
            self.rank.wait()
            self.first_step = time.time() - self.began
        if self.done in (self.warm_up, self.warm_up + self.steps, self.total):
            self.rank.wait()
        if self.warm_up <= self.done <= self.warm_up + self.steps:
            self.ticks.append(time.perf_counter())
        if self.done == self.warm_up + self.steps and self.trace is not None:
            self.trace.start()
        if self.done == self.total and self.trace is not None:
            self.trace.stop()

    def result(self) -> dict[str, Any]:
        """Of this rank: rates are those of all."""
        rank, plan = self.rank, self.rank.plan
        seconds = (self.ticks[-1] - self.ticks[0]) / self.steps
        each = sorted(after - before for before, after in zip(self.ticks, self.ticks[1:], strict=False))
        samples = plan.samples_per_step / seconds
        work, rows = work_of(rank)
        found: dict[str, Any] = {
            "workers": plan.world_size, "device": plan.device_name, "samples_a_step": plan.samples_per_step,
            "step_ms": round(1000 * seconds, 1), "p50_ms": round(1000 * statistics.median(each), 1),
            "p90_ms": round(1000 * each[int(0.9 * len(each))], 1), "samples_per_second": round(samples, 1),
            "tokens_per_second": round(samples * work.tokens / rows), "first_step_seconds": round(self.first_step, 1),
        }  # fmt: skip
        if self.records:
            timed = self.records[self.warm_up : self.warm_up + self.steps]
            found["last_losses"] = round(statistics.mean(record.loss for record in self.records[-10:]), 5)
            found |= {
                f"{piece}_ms": round(1000 * statistics.median(record.piece_seconds[piece] for record in timed), 1)
                for piece in timed[0].piece_seconds
            }
        if plan.flops is not None and plan.peak_flops is not None:
            found["mfu"] = round(plan.flops.of(work) / rows * samples / plan.world_size / plan.peak_flops, 4)
        if self.trace is not None:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            found |= busy(self.trace)
        return found | self.evaluation


class Plain:
    """A model of torch's as `evaluate_loss` wants it."""

    def __init__(self, model: torch.nn.Module, rank: Rank):
        self.model, self.device, self.task = model, rank.device, TASKS[rank.recipe.model.task]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad():
            yield

    def sum_loss(self, micro: Any) -> torch.Tensor:
        return self.task.sum_loss(self.task.logits(self.model, micro), micro.labels)


def busy(trace: Any) -> dict[str, float]:
    """Kernels of a step, and the share of the traced time in which at least one runs."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    covered, until = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "kernels_a_step": len(spans) // TRACED,
        "busy": round(covered / (until - spans[0][0]), 3),
        "busy_ms": round(covered / 1000 / TRACED, 1),
    }


def longest_kernels(trace: Any, count: int) -> Iterator[str]:
    """Lines of a step's milliseconds and launches by kernel."""
    of_kernel: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            of_kernel.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
    for name, each in sorted(of_kernel.items(), key=lambda item: -sum(item[1]))[:count]:
        yield f"{sum(each) / TRACED:9.3f} ms {len(each) // TRACED:6} × {name[:120]}"


def work_of(rank: Rank) -> tuple[Work, int]:
    """All rows' tokens and their products, and the rows."""
    arrays = TokenArrays.open(rank.prepared.train)
    rows = np.arange(arrays.rows)
    source = arrays.by_column["input_ids"].lengths(rows)
    target = arrays.by_column["labels"].lengths(rows) if rank.recipe.model.task == "seq2seq" else np.zeros_like(source)
    return Work(*works(source, target, np.array([arrays.rows]))[0].tolist()), arrays.rows


def ours(rank: Rank, clock: Clock) -> None:
    engine, feed = rank.engine(), rank.feed()
    rank.warm_up(engine, feed)
    clock.graphs = 0 if engine.graphs is None else len(engine.graphs.made)
    until = replace(rank.plan, total_steps=clock.total, eval_every=0, save_every=0)
    around = loop.Surroundings(
        clock.records.append,
        lambda step: {},
        lambda step: None,
        lambda outcome: None,
        lambda: False,
        ends=lambda step: clock.tick(),
    )
    loop.train(engine, feed, until, rank.recipe, around)
    feed.close()
    clock.evaluate(engine)


def ddp(rank: Rank, clock: Clock) -> None:
    keys, task, feed = rank.recipe.optimizer, TASKS[rank.recipe.model.task], rank.feed()
    wrapped = torch.nn.parallel.DistributedDataParallel(rank.model().float(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=keys.lr, eps=keys.eps, fused=rank.device.type == "cuda")
    for step in range(1, clock.total + 1):
        batch = feed.micro_batches(step)
        for micro in batch.micro_batches:
            with contextlib.nullcontext() if micro is batch.micro_batches[-1] else wrapped.no_sync():
                with torch.autocast(rank.device.type, torch.bfloat16, enabled=rank.recipe.model.precision == "bf16"):
                    loss = task.sum_loss(task.logits(wrapped, micro), micro.labels)
                (loss * (rank.plan.world_size / batch.label_tokens)).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), keys.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    feed.close()
    clock.evaluate(Plain(wrapped.module, rank))


def deepspeed_alone(rank: Rank, clock: Clock, config: dict[str, Any], coalesce: bool) -> None:
    import deepspeed

    partitioning, task, feed = Partitioning(rank.plan), TASKS[rank.recipe.model.task], rank.feed()
    model = rank.model(partitioning)
    config = over(rank.plan.ds_config, config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, dist_init_required=False)
    if config.get("compile", {}).get("deepcompile"):
        engine.compile()
    for step in range(1, clock.total + 1):
        batch = feed.micro_batches(step)
        with engine.coalesce_grad_reduction() if coalesce else contextlib.nullcontext():
            for micro in batch.micro_batches:
                engine.set_gradient_accumulation_boundary(micro is batch.micro_batches[-1])
                loss = task.sum_loss(task.logits(engine, micro), micro.labels)
                engine.backward(loss * (rank.plan.world_size / batch.label_tokens), scale_wrt_gas=False)
        engine.step()
        clock.tick()
    feed.close()


def over(below: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, key by key."""
    merged = {key: over(below.get(key) or {}, value) if isinstance(value, dict) else value for key, value in keys.items()}
    return below | merged


def hf(rank: Rank, clock: Clock, tuned: bool, compiled: bool = False) -> None:
    import transformers

    recipe, plan = rank.recipe, rank.plan
    share = plan.samples_per_step // plan.world_size
    rows = share if tuned else min(share, ROWS_OF_THE_REFERENCE)
    written = read_zero(recipe.zero).json.get("zero_optimization", {"stage": 0})
    config = {
        "zero_optimization": plan.ds_config["zero_optimization"] if tuned else written,
        "bf16": {"enabled": recipe.model.precision == "bf16"},
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": share // rows,
        "train_batch_size": plan.samples_per_step,
    }

    class Ticking(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.Seq2SeqTrainingArguments(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=share // rows, max_steps=clock.total, report_to=[],
            bf16=recipe.model.precision == "bf16", deepspeed=config, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            learning_rate=recipe.optimizer.lr, max_grad_norm=recipe.optimizer.max_grad_norm, dataloader_num_workers=2,
            train_sampling_strategy="group_by_length" if tuned else "random", use_cpu=not recipe.scaling.use_gpu,
            torch_compile=compiled,
        )  # fmt: skip
        trainer = transformers.Seq2SeqTrainer(
            model=rank.model(), args=arguments, train_dataset=Rows(rank), data_collator=Collator(rank, tuned), callbacks=[Ticking()]
        )
        trainer.train()
        clock.evaluate(Plain(trainer.model, rank))


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rank: Rank):
        arrays = TokenArrays.open(rank.prepared.train)
        self.columns, self.rows = {name: arrays.by_column[name] for name in ("input_ids", "labels")}, arrays.rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: column.row(index).tolist() for name, column in self.columns.items()}
        return row | {"length": len(row["input_ids"])}


class Collator:
    """Rows to tensors, padded to their full length as the reference experiment does, or to the longest of the batch."""

    def __init__(self, rank: Rank, tuned: bool):
        data, self.tuned = rank.recipe.data, tuned
        self.lengths = {"input_ids": data.max_source_length or data.max_length, "labels": data.max_target_length or data.max_length}
        self.fill = {"input_ids": load_tokenizer(rank.recipe).tokenizer.pad_token_id or 0, "labels": IGNORED_LABEL}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: self.rectangle(name, [row[name] for row in rows]) for name in self.lengths}
        columns["attention_mask"] = self.rectangle("mask", [[1] * len(row["input_ids"]) for row in rows], columns["input_ids"].shape[1])
        return columns

    def rectangle(self, name: str, rows: list[list[int]], width: int | None = None) -> torch.Tensor:
        width = width or (max(map(len, rows)) if self.tuned else self.lengths[name]) or 0
        return torch.tensor([row + [self.fill.get(name, 0)] * (width - len(row)) for row in rows])


CASES: dict[str, Callable[..., None]] = {
    "ours": ours,
    "ddp": ddp,
    "deepspeed": deepspeed_alone,
    "hf": partial(hf, tuned=False),
    "hf-tuned": partial(hf, tuned=True),
    "hf-compiled": partial(hf, tuned=True, compiled=True),
}


def write_long_rows(path: Path, words: int) -> None:
    """Rows with so many words: cut at fewer tokens, they have all the full length."""
    source, target = (" ".join([word] * words) for word in ("ships", "count"))
    path.write_text((json.dumps({"question": source, "sql": target, "text": source}) + "\n") * LONG_ROWS)


def report(case: str, clock: Clock) -> str:
    """The line of a case. Compilation and graphs are trainkit's own."""
    rank, plan = clock.rank, clock.rank.plan
    keys = {"case": case, "model": Path(rank.recipe.model.path).name, "zero": plan.zero_name, "precision": plan.precision}
    own = {"compile": plan.compile_blocks, "cuda_graphs": clock.graphs if plan.cuda_graphs else False} if case == "ours" else {}
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "ray")}
    return json.dumps(keys | own | clock.result() | {"commit": commit()} | versions)


def commit() -> str | None:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return asked.stdout.strip() or None


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recipe", type=Path)
    asked.add_argument("--case", choices=CASES, default="ours")
    asked.add_argument("--set", action="append", default=[], dest="overrides")
    asked.add_argument("--full-rows", action="store_true")
    asked.add_argument("--steps", type=int, default=60)
    asked.add_argument("--warm-up", type=int, default=20)
    asked.add_argument("--evaluate", action="store_true", help="the loss on data.eval at the end; not for --case deepspeed")
    asked.add_argument("--config", default="{}", help="keys of DeepSpeed's configuration, as JSON, for --case deepspeed")
    asked.add_argument("--coalesce", action="store_true", help="for --case deepspeed")
    asked.add_argument("--kernels", type=int, default=0, help="so many kernels are listed in which a step's time goes, on a GPU")
    options = asked.parse_args()
    if options.case == "deepspeed" and options.evaluate:
        asked.error("--evaluate: DeepSpeed's engine is only timed")
    if options.case != "deepspeed" and (options.coalesce or options.config != "{}"):
        asked.error(f"--config and --coalesce are for --case deepspeed, not for {options.case}")
    with tempfile.TemporaryDirectory() as runs:
        overrides = list(options.overrides)
        if options.full_rows:
            data = read_recipe(options.recipe, overrides).data
            write_long_rows(Path(runs) / "rows.jsonl", max(data.max_source_length or 0, data.max_target_length or 0, data.max_length or 0))
            overrides += [f"data.path={runs}/rows.jsonl", "data.train=train"]
        rank = Rank.join(options.recipe, overrides, os.environ.get("BENCHMARK_CACHE", runs), options.evaluate)
        clock = Clock(rank, options.warm_up, options.steps, psutil.Process().create_time())
        more = {"config": json.loads(options.config), "coalesce": options.coalesce} if options.case == "deepspeed" else {}
        CASES[options.case](rank, clock, **more)
        if rank.number == 0:
            print(report(options.case, clock), flush=True)
            if options.kernels and clock.trace is not None:
                print(*longest_kernels(clock.trace, options.kernels), sep="\n", flush=True)
        dist.barrier()
    os._exit(0)  # without what libraries do at the end, which takes seconds


if __name__ == "__main__":
    main()
