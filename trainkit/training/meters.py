"""What a step cost and gave, gathered over all ranks without a host sync.

Once a step each rank contributes a few numbers to one small all_gather. A thread waits for the result and reports it as soon as it is
there; the loop looks at it one step late, when it has long arrived, so the GPU is never waited for. Every rank sees the same numbers and
therefore decides alike (stop, non-finite).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist

from trainkit.data.order import set_hash
from trainkit.data.padding import StepBatch
from trainkit.planning.flops import Work, mfu
from trainkit.planning.plan import Plan
from trainkit.training.rank_meters import RankMeters, RankNumbers, Stopwatch
from trainkit.units import gib

_OF_RANK = {field.name: float if field.type == "float" else int for field in fields(RankNumbers)}
_FIELDS = (
    *("loss_sum", "grad_norm", "applied", "stop", "save", "hash_low", "hash_high"),  # halves of 64 bits: a float64 holds 53 exactly
    *_OF_RANK,
)


@dataclass(frozen=True)
class Submitted:
    """One rank's numbers of one optimizer step, before they are gathered. Tensors stay where they are."""

    batch: StepBatch
    loss_sum: torch.Tensor  # sum of the cross-entropies of this rank's micro-batches
    grad_norm: torch.Tensor | float
    applied: bool  # DeepSpeed updated the weights
    lr: float
    data_wait_seconds: float
    began: float  # time.perf_counter() at the start of the step
    stopwatch: Stopwatch  # of the step, from when the data was there
    stop: bool  # somebody wants the run to end after this step
    save: bool = False  # a node will go away: a checkpoint now


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over all ranks."""

    step: int
    epoch: int  # from 0
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    padding_fraction: float
    tokens_imbalance: float  # largest over mean of the ranks' real tokens
    seconds: float  # from the end of the step before, or its own beginning after a pause, until its numbers were there
    data_wait_seconds: float  # of the rank that waited longest
    piece_seconds: Mapping[str, float]  # of rank 0: forward, backward, optimizer; on a GPU as its stream sees them
    mfu: float | None  # model FLOPs utilization of all ranks' devices (planning/flops.py); None where it would mislead
    skipped_ranks: tuple[int, ...]  # on which DeepSpeed did not update the weights
    stop: bool
    save: bool
    non_finite_ranks: tuple[int, ...]  # whose loss is NaN or infinite
    step_hash: int  # of the sample ids that the ranks trained
    ranks: tuple[RankNumbers, ...]


class StepLedger:
    """Takes a step's numbers, reports them when they have arrived, and gives back those of the step before. Close it at the end."""

    def __init__(self, device: torch.device, plan: Plan, meters: RankMeters, report: Callable[[StepRecord], None]):
        self.device, self.plan, self.meters, self.report = device, plan, meters, report
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="meters", initializer=self._on_device)
        self.pending: Future[StepRecord] | None = None
        self.ended = 0.0  # when the last step's numbers were there

    def submit(self, mine: Submitted) -> StepRecord | None:
        """Gather this step's numbers; returns the record of the previous step, None before the first."""
        before = self.flush()
        micro_batches = mine.batch.micro_batches
        trained = sum(set_hash(micro.sample_ids) for micro in micro_batches) % 2**64
        padded = sum(micro.padded_tokens for micro in micro_batches)
        work = reduce(add, (micro.work for micro in micro_batches), Work())
        of_rank = self.meters.numbers(work, padded, mine.data_wait_seconds, mine.stopwatch, mine.applied)
        numbers = [0, 0, mine.applied, mine.stop, mine.save, trained % 2**32, trained >> 32, *vars(of_rank).values()]
        local = torch.tensor(numbers, dtype=torch.float64, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        local[0] = mine.loss_sum
        local[1] = mine.grad_norm
        everyone = torch.empty(self.plan.world_size * len(_FIELDS), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(everyone, local)
        self.pending = self.reader.submit(self._read, mine, *_to_host(everyone))
        return before

    def flush(self) -> StepRecord | None:
        """The record of the last submitted step, waited for; None if there is none. Raises what its report raised."""
        pending, self.pending = self.pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """What was submitted is still reported."""
        self.reader.shutdown()
        self.meters.close()

    def _on_device(self) -> None:
        """In the reader's thread, which else begins on the first GPU, that of another rank."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _read(self, mine: Submitted, gathered: torch.Tensor, arrived: torch.cuda.Event | None) -> StepRecord:
        if arrived is not None:
            arrived.synchronize()
        before, self.ended = self.ended, time.perf_counter()
        record = _record(mine, gathered.view(self.plan.world_size, len(_FIELDS)), self.ended - max(before, mine.began), self.plan)
        self.report(record)
        return record


def _to_host(gathered: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if gathered.device.type == "cpu":
        return gathered, None
    host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
    host.copy_(gathered, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _record(mine: Submitted, gathered: torch.Tensor, seconds: float, plan: Plan) -> StepRecord:
    by_name: dict[str, list[float]] = dict(zip(_FIELDS, gathered.T.tolist(), strict=True))
    losses, batch = by_name["loss_sum"], mine.batch
    hashes = [int(low) + (int(high) << 32) for low, high in zip(by_name["hash_low"], by_name["hash_high"], strict=True)]
    tokens, padded = sum(by_name["tokens"]), sum(by_name["padded_tokens"])
    return StepRecord(
        step=batch.step,
        epoch=batch.epoch,
        loss=sum(losses) / max(1, batch.label_tokens),
        grad_norm=by_name["grad_norm"][0],
        lr=mine.lr,
        samples=batch.samples,
        tokens=int(tokens),
        padding_fraction=1 - tokens / max(1, padded),
        tokens_imbalance=max(by_name["tokens"]) * len(losses) / max(1, tokens),
        seconds=seconds,
        data_wait_seconds=max(by_name["data_wait_seconds"]),
        piece_seconds=mine.stopwatch.seconds(),
        mfu=None if plan.flops is None else mfu(sum(by_name["flops"]), seconds, plan.world_size, plan.peak_flops),
        skipped_ranks=tuple(rank for rank, applied in enumerate(by_name["applied"]) if not applied),
        stop=any(by_name["stop"]),
        save=any(by_name["save"]),
        non_finite_ranks=tuple(rank for rank, loss in enumerate(losses) if not math.isfinite(loss)),
        step_hash=sum(hashes) % 2**64,
        ranks=tuple(RankNumbers(*row) for row in zip(*([kind(n) for n in by_name[name]] for name, kind in _OF_RANK.items()), strict=True)),
    )


def as_json(record: StepRecord, order: str) -> dict[str, Any]:
    """The line of steps.jsonl: the contract's keys, and more: fractions, seconds by piece, GiB per rank (peak since the start, and now).

    `skipped` is there where DeepSpeed did not apply the step.
    """
    keys = ("step", "loss", "grad_norm", "lr", "samples", "tokens", "seconds", "data_wait_seconds")
    line = {key: getattr(record, key) for key in keys} | {"order": order, "padding_fraction": round(record.padding_fraction, 4)}
    line["data_wait_fraction"] = round(record.data_wait_seconds / record.seconds, 6)
    line["tokens_imbalance"] = round(record.tokens_imbalance, 4)
    line["piece_seconds"] = {piece: round(seconds, 6) for piece, seconds in record.piece_seconds.items()}
    line["mfu"] = None if record.mfu is None else round(record.mfu, 5)
    line["peak_memory_gib"] = [round(gib(rank.peak_bytes), 3) for rank in record.ranks]
    line["memory_gib"] = [round(gib(rank.allocated_bytes), 3) for rank in record.ranks]
    return line | {"skipped": True} if record.skipped_ranks else line
