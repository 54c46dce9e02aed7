"""summary.json has the contract's keys for every end, and its numbers follow from steps.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainkit.cluster import driver, screen
from trainkit.cluster.signals import Signals
from trainkit.cluster.summary import MEASURED, summarize
from trainkit.errors import CapacityError, ExportMismatch, Interrupted, NonFiniteError, TrainingError, TrainkitError, UsageError
from trainkit.markup import plain
from trainkit.planning.memory import Memory
from trainkit.planning.plan import Plan
from trainkit.runs.folder import RunFolder
from trainkit.runs.worked import WorkedTime

CONTRACT = {
    *("status", "steps", "epochs", "samples", "tokens", "train_loss", "eval", "seconds", "samples_per_second", "tokens_per_second"),
    *("mfu", "peak_memory_gib", "data_wait_fraction", "restarts", "world_size", "zero_stage", "offload", "precision", "order", "error"),
}

PLAN = cast(
    Plan,
    SimpleNamespace(
        rows=100, world_size=2, zero_stage=3, offload_optimizer=True, offload_param=False, precision="fp32", use_gpu=True,
        memory=Memory({"parameters": 2**30, "optimizer": 2**31}), expected_activation_bytes=2**29, expected_peak_bytes=2**32,
    ),
)  # fmt: skip


def steps(*losses: float) -> list[dict[str, Any]]:
    return [
        {
            "step": n + 1,
            "loss": loss,
            "samples": 10,
            "tokens": 300,
            "seconds": 0.5,
            "data_wait_seconds": 0.1,
            "order": f"{n:016x}",
            "peak_memory_gib": [1.0, 2.0 + n],
            "piece_seconds": {"forward": 0.1, "backward": 0.2},
            "mfu": 0.2 + n,
        }
        for n, loss in enumerate(losses)
    ]


def test_a_completed_run_adds_up() -> None:
    outcome = {"status": "completed", "steps": 2, "eval": {"loss": 1.5}, "predictions": []}
    found = summarize(PLAN, steps(3.0, 2.0), outcome, None, 60.0)
    assert set(found) >= CONTRACT
    assert (found["status"], found["steps"], found["epochs"], found["samples"], found["tokens"]) == ("completed", 2, 0.2, 20, 600)
    assert (found["train_loss"], found["eval"], found["seconds"], found["wall_seconds"]) == (2.5, {"loss": 1.5}, 1.0, 60.0)
    assert (found["samples_per_second"], found["tokens_per_second"]) == (20.0, 600.0)
    assert found["data_wait_fraction"] == pytest.approx(0.2)
    assert found["peak_memory_gib"] == [1.0, 3.0]
    assert (found["mfu"], found["goodput"], found["piece_seconds"]) == (0.7, None, {"forward": 0.2, "backward": 0.4})
    assert (found["order"], found["error"], found["offload"]) == (f"{1:016x}", None, {"optimizer": True, "param": False})


def test_measured_memory_stands_beside_the_plan() -> None:
    ranks = [dict.fromkeys(MEASURED.values(), 2**30 * (rank + 1)) for rank in range(2)]
    found = summarize(PLAN, steps(3.0, 2.0), {"status": "completed"}, None, 60.0, worked_seconds=4.0, ranks=ranks)
    assert found["memory"]["planned"] == {"parameters": 1.0, "optimizer": 2.0, "activations": 0.5, "peak": 4.0}
    assert [rank["activations"] for rank in found["memory"]["measured"]] == [1.0, 2.0]
    assert found["goodput"] == 0.25
    on_cpu = summarize(SimpleNamespace(**vars(PLAN) | {"use_gpu": False}), steps(3.0), {"status": "completed"}, None, 1.0, ranks=ranks)  # type: ignore[arg-type]
    assert set(on_cpu["memory"]["measured"][0]) == {"parameters", "optimizer"}, "what a CPU cannot tell is left out"


@pytest.mark.parametrize(
    ("wall_seconds", "worked_seconds", "words"),
    [
        (60.0, 60.0, "over 1 s of steps; 1 min 00 s in all"),
        (60.0, 100.0, "over 1 s of steps; 1 min 40 s in all, of which this command took 1 min 00 s"),
        (60.0, 0.0, "over 1 s of steps; this command took 1 min 00 s, what those before it took is not known"),
    ],
)
def test_the_last_screen_sets_the_steps_of_all_commands_against_the_time_of_all(
    wall_seconds: float, worked_seconds: float, words: str
) -> None:
    found = summarize(PLAN, steps(3.0, 2.0), {"status": "completed"}, None, wall_seconds, worked_seconds=worked_seconds)
    (speed,) = [line for line in plain(screen._numbers(found, use_gpu=True), width=200).splitlines() if line.startswith("speed")]
    assert speed.rstrip().endswith(words)


def test_the_last_screen_of_a_run_whose_steps_are_lost_says_so() -> None:
    found = summarize(PLAN, [], {"status": "completed", "eval": {"loss": 1.5}}, None, 60.0)
    shown = plain(screen._numbers(found, use_gpu=True), width=200)
    assert "1.5000" in shown and "holds no step" in shown


def test_a_run_that_failed_before_its_first_step_has_all_keys() -> None:
    found = summarize(PLAN, [], {}, CapacityError("too few"), 3.0)
    assert set(found) >= CONTRACT
    assert (found["status"], found["steps"], found["train_loss"], found["samples_per_second"]) == ("failed", 0, None, None)
    assert found["error"] == {"kind": "CapacityError", "message": "too few", "rank": None, "step": None}


def test_a_failed_run_keeps_its_steps_and_says_where() -> None:
    found = summarize(PLAN, steps(3.0, math.nan), {}, NonFiniteError("step 2: NaN", step=2, rank=1), 3.0)
    assert (found["status"], found["steps"]) == ("failed", 2)
    assert math.isnan(found["train_loss"]), "a NaN is shown as a NaN"
    assert (found["error"]["rank"], found["error"]["step"]) == (1, 2)


def test_a_failed_run_keeps_its_last_evaluation(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "it")
    assert folder.read_evaluation(9) is None
    folder.write_evaluation({"step": 2, "loss": 1.5})
    found = summarize(PLAN, steps(3.0, 2.0), {}, TrainingError("killed"), 60.0, evaluation=folder.read_evaluation(2))
    assert found["eval"] == {"step": 2, "loss": 1.5}
    assert folder.read_evaluation(1) is None, "its step was dropped"


def test_an_interrupted_run_is_not_a_failed_one() -> None:
    assert summarize(PLAN, steps(3.0), {"status": "interrupted", "steps": 1}, Interrupted("stopped"), 3.0)["status"] == "interrupted"
    assert summarize(PLAN, steps(3.0), {}, Interrupted("stopped at once"), 3.0)["status"] == "interrupted"


def ended(folder: RunFolder, train: Callable[[], Any], signals: int = 0) -> TrainkitError:
    """The error with which the driver ends a run whose `train` raises."""
    taken = Signals()
    taken.taken = signals
    run = SimpleNamespace(
        train=train, plan=PLAN, folder=folder, signals=taken, worked=WorkedTime(folder, time.time()), failures=[], restarts=0, oom_kills=0
    )
    with pytest.raises(TrainkitError) as raised:
        driver._recorded(cast(Any, run), 0.0)
    return raised.value


def raising(error: BaseException) -> Callable[[], Any]:
    def train() -> Any:
        raise error

    return train


def test_a_bug_leaves_a_summary_and_exit_code_4(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "small")
    error = ended(folder, raising(ZeroDivisionError("division by zero")))
    assert (type(error), error.exit_code, error.message) == (TrainingError, 4, "ZeroDivisionError: division by zero")
    assert isinstance(error.__cause__, ZeroDivisionError), "--debug shows where it came from"
    found = folder.read_summary()
    assert found is not None and (found["status"], found["error"]["message"]) == ("failed", error.message)


def test_a_summary_that_cannot_be_written_does_not_hide_the_first_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "small")

    def full(summary: object) -> None:
        raise UsageError("the run folder cannot be written")

    monkeypatch.setattr(folder, "write_summary", full)
    assert ended(folder, raising(NonFiniteError("step 2: NaN"))).message == "step 2: NaN"
    assert "cannot be written" in ended(folder, lambda: {"status": "completed", "steps": 1}).message


@pytest.mark.parametrize("failure", [NonFiniteError("step 2: NaN"), ExportMismatch("differs"), ValueError("a bug")])
def test_a_failure_after_one_signal_stays_a_failure(tmp_path: Path, failure: Exception) -> None:
    folder = RunFolder.create(tmp_path, "small")
    assert ended(folder, raising(failure), signals=1).exit_code == 4
    found = folder.read_summary()
    assert found is not None and found["status"] == "failed"


def test_a_process_that_a_signal_ended_was_interrupted(tmp_path: Path) -> None:
    killed = TrainingError("the process of rank 1 ended", from_outside=True)
    assert ended(RunFolder.create(tmp_path, "small"), raising(killed), signals=1).exit_code == 130
    assert ended(RunFolder.create(tmp_path, "small"), raising(killed)).exit_code == 4
