"""The loop with an engine of two lines: what it reports, when it evaluates, how it stops. One process, a process group of one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from trainkit.data.order import set_hash
from trainkit.data.padding import MicroBatch, StepBatch
from trainkit.errors import NonFiniteError
from trainkit.planning.flops import TrainingFlops, Work
from trainkit.training.loop import Outcome, Surroundings, forward_and_backward, learning_rate, train
from trainkit.training.meters import StepLedger, StepRecord
from trainkit.training.states import Held


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def micro_batch(index: int, rows: int) -> MicroBatch:
    ids = torch.ones(rows, 8, dtype=torch.long)
    return MicroBatch(index, np.arange(rows) + 10 * index, ids, ids, ids, None, Work(rows * 4, rows * 2), padded_tokens=rows * 16)


class Feed:
    def micro_batches(self, step: int) -> StepBatch:
        return StepBatch(step, 0, samples=5, label_tokens=20, num_micro_batches=2, micro_batches=[micro_batch(0, 3), micro_batch(1, 2)])


class Engine:
    """Each micro-batch's summed loss is its rows; `nan_at` makes a step's loss NaN, `skip_at` refuses its update."""

    device = torch.device("cpu")

    def __init__(self, nan_at: int = 0, skip_at: int = 0):
        self.nan_at, self.skip_at = nan_at, skip_at
        self.steps = 0
        self.backwards: list[tuple[int, bool]] = []
        self.draws: list[float] = []
        self.rates: list[float] = []
        self.saved: list[int] = []

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        self.draws.append(torch.rand(()).item())
        return torch.tensor(math.nan if self.steps + 1 == self.nan_at else float(len(batch.input_ids)))

    def backward(self, sum_loss: torch.Tensor, label_tokens: int, last: bool) -> None:
        self.backwards.append((label_tokens, last))

    def held(self) -> Held:
        return Held(parameters=4, optimizer=8)

    def step(self, lr: float) -> tuple[float, bool]:
        self.steps += 1
        self.rates.append(lr)
        return 2.0, self.steps != self.skip_at


def run(
    engine: Engine, records: list[StepRecord], *, steps: int = 5, evaluations: list[dict[str, float]] | None = None,
    save_every: int = 0, begin: Outcome | None = None, precision: str = "fp32", **train_keys: Any,
) -> Any:  # fmt: skip
    keys = {"seed": 1, "metric_for_best_model": None, "early_stopping_patience": None} | train_keys
    recipe = SimpleNamespace(train=SimpleNamespace(**keys), optimizer=SimpleNamespace(lr=0.1, lr_scheduler_type="constant"))
    plan = SimpleNamespace(
        world_size=1, total_steps=steps, warmup_steps=0, eval_every=2 if evaluations else 0, save_every=save_every, precision=precision,
        flops=TrainingFlops(5, 3, 0, 0, 0), peak_flops=1000.0,
    )  # fmt: skip
    kept: list[int] = []
    values = iter(evaluations or [])
    ended: list[int] = []

    def evaluated(step: int) -> dict[str, float]:
        assert ended[-1:] == [step] or (begin is not None and step == begin.steps), "a step has ended before its evaluation begins"
        return next(values)

    around = Surroundings(
        report=records.append,
        evaluate=evaluated,
        keep_best=kept.append,
        save=lambda outcome: engine.saved.append(outcome.steps),
        stop_requested=lambda: len(records) >= keys.get("stop_after", 99),
        ends=ended.append,
    )
    return train(engine, Feed(), plan, recipe, around, begin), kept  # type: ignore[arg-type]


def test_every_step_is_reported_once_with_the_sums_over_its_micro_batches() -> None:
    engine, records = Engine(), list[StepRecord]()
    outcome, _ = run(engine, records)
    assert [record.step for record in records] == [1, 2, 3, 4, 5] and outcome.status == "completed" and outcome.steps == 5
    record = records[-1]
    assert list(record.piece_seconds) == ["forward", "backward", "optimizer"]
    pieces, seconds = sum(sum(each.piece_seconds.values()) for each in records), sum(each.seconds for each in records)
    assert pieces <= seconds, "of all steps: one may have begun before the numbers of the step before were there"
    assert record.mfu == pytest.approx((5 * 20 + 3 * 10) / (record.seconds * 1000)), (
        "FLOPs of the real tokens over what the device could do"
    )
    assert [(rank.tokens, rank.parameter_bytes, rank.optimizer_bytes) for rank in record.ranks] == [(30, 4, 8)]
    record = records[0]
    assert (record.loss, record.samples, record.tokens, record.grad_norm) == (5 / 20, 5, 30, 2.0)
    assert record.padding_fraction == pytest.approx(1 - 30 / 80)
    assert record.step_hash == set_hash(np.array([0, 1, 2, 10, 11]))
    assert engine.backwards == [(20, False), (20, True)] * 5


@pytest.mark.parametrize("fault", [{"nan_at": 2}, {"skip_at": 2}])
def test_a_step_without_a_finite_update_is_recorded_and_stops_the_run_one_step_later(fault: dict[str, int]) -> None:
    engine, records = Engine(**fault), list[StepRecord]()
    with pytest.raises(NonFiniteError, match="step 2") as caught:
        run(engine, records)
    assert caught.value.facts["step"] == 2 and len(records) == engine.steps == 3
    assert math.isnan(records[1].loss) == ("nan_at" in fault) and records[1].skipped_ranks == ((0,) if "skip_at" in fault else ())
    assert "rank 0" in str(caught.value) and caught.value.facts["rank"] == 0
    assert str(caught.value).endswith("Look at the rows of this step, or lower optimizer.lr."), "it is fp32 already"
    with pytest.raises(NonFiniteError, match=r"lower optimizer\.lr, or use model\.precision: fp32\."):
        run(Engine(**fault), [], precision="bf16")


def test_a_stop_request_ends_the_run_after_a_whole_step() -> None:
    records: list[StepRecord] = []
    outcome, _ = run(Engine(), records, steps=50, stop_after=3)
    assert (
        outcome.status == "interrupted" and [record.step for record in records] == list(range(1, outcome.steps + 1)) and outcome.steps < 10
    )


def test_the_best_evaluation_is_kept_and_patience_ends_the_run() -> None:
    values = [{"loss": loss} for loss in (3.0, 2.0, 2.5, 2.0, 1.0)]
    records: list[StepRecord] = []
    outcome, kept = run(Engine(), records, steps=10, evaluations=values, metric_for_best_model="loss", early_stopping_patience=2)
    assert kept == [2, 4] and outcome.stopped_early and outcome.best_step == 4 and records[-1].step == 8


def test_an_evaluation_that_is_not_finite_is_never_the_best() -> None:
    values = [{"loss": loss} for loss in (math.nan, 2.0, 1.0)]
    outcome, kept = run(Engine(), [], steps=6, evaluations=values, metric_for_best_model="loss", early_stopping_patience=2)
    assert kept == [4, 6] and outcome.best_value == 1.0 and not outcome.stopped_early


def test_a_step_is_reported_before_the_next_one_ends() -> None:
    """A line of steps.jsonl does not wait for a slow step."""
    records, seen = list[StepRecord](), []

    class Slow(Engine):
        def step(self, lr: float) -> tuple[float, bool]:
            deadline = time.monotonic() + 10
            while len(records) < self.steps and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(len(records))
            return super().step(lr)

    run(Slow(), records, steps=4)
    assert seen == [0, 1, 2, 3]


def test_a_stop_that_comes_with_the_last_step_finds_the_run_complete() -> None:
    records: list[StepRecord] = []
    outcome, _ = run(Engine(), records, steps=3, stop_after=2)
    assert (outcome.status, outcome.steps) == ("completed", 3)


def test_seconds_leave_out_what_lies_between_steps() -> None:
    class Pausing(list):  # type: ignore[type-arg]
        def __next__(self) -> dict[str, float]:
            time.sleep(0.3)
            return {"loss": 1.0}

        def __iter__(self) -> Pausing:
            return self

    records: list[StepRecord] = []
    run(Engine(), records, steps=4, evaluations=Pausing([0]))
    assert sum(record.seconds for record in records) < 0.25


def test_a_metric_is_better_when_it_is_larger() -> None:
    values = [{"loss": 1.0, "accuracy": accuracy} for accuracy in (0.5, 0.4, 0.6)]
    _, kept = run(Engine(), [], steps=6, evaluations=values, metric_for_best_model="accuracy")
    assert kept == [2, 6]


def test_dropout_depends_on_step_and_micro_batch_and_on_nothing_else() -> None:
    def draws(order: list[int]) -> dict[int, float]:
        engine = Engine()
        batch = StepBatch(3, 0, 5, 20, 2, [micro_batch(index, 2) for index in order])
        forward_and_backward(engine, batch, seed=1)  # type: ignore[arg-type]
        return dict(zip(order, engine.draws, strict=True))

    assert draws([0, 1]) == draws([1, 0]) and len(set(draws([0, 1]).values())) == 2


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(
        schedule if schedule != "constant" else "constant_with_warmup", optimizer, num_warmup_steps=3, num_training_steps=11
    )
    for step in range(1, 12):
        assert learning_rate(step, 11, 3, 0.5, schedule) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_the_state_is_saved_when_due_and_at_every_end() -> None:
    engine = Engine()
    run(engine, [], steps=5, save_every=2)
    assert engine.saved == [2, 4, 5]
    engine = Engine()
    run(engine, [], steps=4, save_every=2)
    assert engine.saved == [2, 4], "once each"
    engine, records = Engine(), list[StepRecord]()
    run(engine, records, steps=50, stop_after=3)
    assert engine.saved == [len(records)], "of a run that was interrupted"
    engine = Engine(nan_at=3)
    with pytest.raises(NonFiniteError):
        run(engine, [], steps=5, save_every=3)
    assert engine.saved == [], "a state that is not finite is no checkpoint"


def test_it_goes_on_after_the_step_that_it_is_given() -> None:
    engine, records = Engine(), list[StepRecord]()
    outcome, _ = run(engine, records, steps=5, save_every=2, begin=Outcome(steps=3))
    assert [record.step for record in records] == [4, 5] and engine.saved == [4, 5] and outcome.steps == 5
    engine, records = Engine(), []
    outcome, _ = run(engine, records, steps=5, begin=Outcome(steps=5))
    assert records == [] and engine.saved == [] and outcome.status == "completed"


def test_an_evaluation_that_an_interrupt_came_before_is_made_up_for() -> None:
    engine, records = Engine(), list[StepRecord]()
    outcome, _ = run(engine, records, steps=4, stop_after=3, evaluations=[{"loss": 3.0}, {"loss": 2.0}])
    assert outcome.status == "completed" and outcome.evaluation == {"step": 4, "loss": 2.0} and engine.saved == [4]
    outcome, _ = run(Engine(), [], steps=4, evaluations=[{"loss": 3.0}, {"loss": 2.0}], begin=Outcome(steps=2))
    assert outcome.evaluation == {"step": 4, "loss": 2.0}
    done = Outcome(steps=4, evaluation={"step": 4, "loss": 2.0})
    assert run(Engine(), [], steps=4, evaluations=[{"loss": 9.0}], begin=done)[0].evaluation == {"step": 4, "loss": 2.0}


def test_a_run_that_stopped_early_stays_so() -> None:
    keys: dict[str, Any] = {"metric_for_best_model": "loss", "early_stopping_patience": 1}
    stopped = Outcome(steps=4, evaluation={"step": 4, "loss": 2.0}, best_step=2, best_value=1.0, evaluations_without_better=1)
    records: list[StepRecord] = []
    outcome, _ = run(Engine(), records, steps=9, evaluations=[{"loss": 9.0}] * 9, begin=stopped, **keys)
    assert outcome.stopped_early and records == []


def test_the_thread_that_reads_the_numbers_works_on_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr("torch.cuda.set_device", lambda device: chosen.append((threading.current_thread().name, device)))
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        ledger = StepLedger(device, SimpleNamespace(), MagicMock(), print)  # type: ignore[arg-type]
        ledger.reader.submit(lambda: None).result()
        ledger.close()
    assert [(name.split("_")[0], device) for name, device in chosen] == [("meters", torch.device("cuda", 1))]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_wait_for_data_behind_the_step_before_costs_nothing(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.training.loop.Stopwatch.runs_on", lambda self: hidden)
    records: list[StepRecord] = []
    run(Engine(), records, steps=3)
    assert all((record.data_wait_seconds == 0.0) is hidden for record in records) and len(records) == 3
