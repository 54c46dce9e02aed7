"""The training loop of one rank: fetch, forward and backward, step, meter, evaluate.

It knows no cluster: it takes an engine, a feed and a few callables, so that it runs in a plain process. What the step gave is read one
step late (meters.py); every rank reads the same numbers and takes the same turn.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.data.order import combine
from trainkit.data.padding import StepBatch, StepFeed
from trainkit.errors import NonFiniteError
from trainkit.planning.plan import Plan
from trainkit.recipe.schema import Recipe
from trainkit.training.meters import StepLedger, StepRecord, Submitted
from trainkit.training.rank_meters import BACKWARD, FORWARD, OPTIMIZER, RankMeters, Stopwatch

if TYPE_CHECKING:
    from trainkit.training.engine import Engine


DATA_WAIT = "the wait for data"  # the feed itself says more about it, and ends it


@dataclass(frozen=True)
class Surroundings:
    """What the loop tells and asks the outside. Every rank calls all of them at the same steps."""

    report: Callable[[StepRecord], None]  # from a thread, as soon as a step's numbers are there
    evaluate: Callable[[int], dict[str, float]]  # step to {"loss": ..., metric: ...}
    keep_best: Callable[[int], None]  # the weights of now are the best so far
    save: Callable[[Outcome], None]  # the state after outcome.steps steps
    stop_requested: Callable[[], bool]
    save_requested: Callable[[], bool] = lambda: False  # a node will go away: save soon, until it is done
    begins: Callable[[int, str], None] = lambda step, piece: None  # a piece of work of a step: whoever begins no more of them hangs
    ends: Callable[[int], None] = lambda step: None  # all pieces of a step, before an evaluation or a checkpoint


@dataclass
class Outcome:
    """What is left of a run on this rank, and what a resumed one begins with."""

    status: str = "completed"  # completed | interrupted
    steps: int = 0  # that are done
    evaluation: dict[str, float] | None = None  # the last one
    best_step: int | None = None
    best_value: float | None = None
    best_evaluation: dict[str, float] | None = None
    evaluations_without_better: int = 0
    stopped_early: bool = False


def train(engine: Engine, feed: StepFeed, plan: Plan, recipe: Recipe, around: Surroundings, outcome: Outcome | None = None) -> Outcome:
    """Train up to plan.total_steps optimizer steps, from the step after those of `outcome`.

    Raises NonFiniteError, one step late at most, when a loss is not finite or DeepSpeed skipped a step.
    """
    outcome = outcome or Outcome()
    saved = outcome.steps
    _evaluate_if_due(outcome, plan, recipe, around)  # an interrupt came before it
    if _out_of_patience(outcome, recipe):
        return outcome
    meters = RankMeters(engine.device, engine.held, (lambda work: 0.0) if plan.flops is None else plan.flops.of)
    with contextlib.closing(StepLedger(engine.device, plan, meters, around.report)) as ledger:
        stopwatch = Stopwatch(engine.device)
        for step in range(outcome.steps + 1, plan.total_steps + 1):
            around.begins(step, DATA_WAIT)  # not in the step's time: a profiler that starts takes a second
            began = time.perf_counter()
            batch = feed.micro_batches(step)
            data_wait = 0.0 if stopwatch.runs_on() else time.perf_counter() - began  # behind the step before, a wait costs nothing

            stopwatch = Stopwatch(engine.device)
            loss_sum = forward_and_backward(engine, batch, recipe.train.seed, around.begins, stopwatch.lap)
            around.begins(step, "the optimizer step")
            lr = learning_rate(step, plan.total_steps, plan.warmup_steps, recipe.optimizer.lr, recipe.optimizer.lr_scheduler_type)
            grad_norm, applied = engine.step(lr)
            stopwatch.lap(OPTIMIZER)

            around.begins(step, "the exchange of the step's numbers")
            wishes = around.stop_requested(), around.save_requested()
            before = ledger.submit(Submitted(batch, loss_sum, grad_norm, applied, lr, data_wait, began, stopwatch, *wishes))
            around.ends(step)
            if _stops(before, plan, outcome):
                break
            if evaluation_due(step, plan):
                if _stops(ledger.flush(), plan, outcome):
                    break
                _evaluate_if_due(outcome, plan, recipe, around)
                if outcome.stopped_early:
                    break
            if save_due(step, plan) or (before is not None and before.save and saved < before.step):
                if _stops(ledger.flush(), plan, outcome):
                    break
                around.save(outcome)
                saved = step
        _stops(ledger.flush(), plan, outcome)
    if outcome.steps == plan.total_steps:
        outcome.status = "completed"  # a stop that came with the last step has nothing left to stop
        _evaluate_if_due(outcome, plan, recipe, around)
    if outcome.steps > saved:
        around.save(outcome)
    return outcome


def forward_and_backward(
    engine: Engine,
    batch: StepBatch,
    seed: int,
    begins: Callable[[int, str], None] = lambda step, piece: None,
    ended: Callable[[str], None] = lambda piece: None,
) -> torch.Tensor:
    """All micro-batches of this rank; returns the sum of their losses, a scalar on the device.

    Dropout is seeded by (seed, step, number of the micro-batch in the step), so it does not depend on which rank trains it.
    """
    total = torch.zeros((), device=engine.device)
    for number, micro in enumerate(batch.micro_batches, start=1):
        begins(batch.step, f"forward and backward of micro-batch {number} of {len(batch.micro_batches)}")
        torch.manual_seed(combine(seed, batch.step, micro.index) % 2**63)
        sum_loss = engine.sum_loss(micro)
        ended(FORWARD)
        engine.backward(sum_loss, batch.label_tokens, last=micro is batch.micro_batches[-1])
        ended(BACKWARD)
        total += sum_loss.detach()
        del sum_loss  # what is left of its graph would tie the gradients to its stream, and the next micro-batch may be captured on another
    return total


def evaluation_due(step: int, plan: Plan) -> bool:
    return plan.eval_every > 0 and (step % plan.eval_every == 0 or step == plan.total_steps)


def save_due(step: int, plan: Plan) -> bool:
    return plan.save_every > 0 and step % plan.save_every == 0


def _stops(record: StepRecord | None, plan: Plan, outcome: Outcome) -> bool:
    """Take in a finished step. Returns whether to stop."""
    if record is not None:
        outcome.steps = record.step
        _check_finite(record, plan)
        if record.stop:
            outcome.status = "interrupted"
    return outcome.status == "interrupted"


def _check_finite(record: StepRecord, plan: Plan) -> None:
    """fp16's search for a loss scale skips steps whose loss is finite; they are recorded, and only there is that no fault."""
    ranks = record.non_finite_ranks
    if record.non_finite_ranks:
        what = f"the loss of rank {_listed(ranks)} is not finite"
    elif record.skipped_ranks and plan.precision != "fp16":
        ranks = record.skipped_ranks
        what = f"DeepSpeed skipped the step on rank {_listed(ranks)}"
    elif not math.isfinite(record.grad_norm) and plan.precision != "fp16":
        what = f"the gradient norm over all ranks is {record.grad_norm}"
    else:
        return
    advice = "or lower optimizer.lr" if plan.precision == "fp32" else "lower optimizer.lr, or use model.precision: fp32"
    raise NonFiniteError(
        f"step {record.step}: {what} (loss {record.loss}, gradient norm {record.grad_norm}, learning rate {record.lr:.3g}). "
        f"Look at the rows of this step, {advice}.",
        step=record.step, rank=ranks[0] if ranks else None, what=what,
    )  # fmt: skip


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _evaluate_if_due(outcome: Outcome, plan: Plan, recipe: Recipe, around: Surroundings) -> None:
    """Evaluate after the steps that are done, unless that has been done."""
    step = outcome.steps
    if not step or not evaluation_due(step, plan) or (outcome.evaluation or {}).get("step") == step:
        return
    values = around.evaluate(step)
    outcome.evaluation = {"step": step, **values}
    metric = recipe.train.metric_for_best_model
    if metric is None:
        return
    value = values[metric]
    if math.isfinite(value) and (
        outcome.best_value is None or (value < outcome.best_value if metric == "loss" else value > outcome.best_value)
    ):
        outcome.best_step, outcome.best_value, outcome.evaluations_without_better = step, value, 0
        outcome.best_evaluation = outcome.evaluation
        around.keep_best(step)
    else:
        outcome.evaluations_without_better += 1
    _out_of_patience(outcome, recipe)


def _out_of_patience(outcome: Outcome, recipe: Recipe) -> bool:
    patience = recipe.train.early_stopping_patience
    outcome.stopped_early = patience is not None and outcome.evaluations_without_better >= patience
    return outcome.stopped_early


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Of optimizer step `step`, counted from 1: linear from 0 over the warm-up, then the schedule's decay, as transformers counts."""
    done = step - 1
    if done < warmup_steps:
        return peak * done / max(1, warmup_steps)
    return peak * SCHEDULES[schedule]((done - warmup_steps) / max(1, total_steps - warmup_steps))
