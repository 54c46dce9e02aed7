"""What a worker leaves at its end, in this process and without Ray's: the curves of its evaluations, and what each rank measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainkit.cluster import results
from trainkit.cluster.results import Results
from trainkit.cluster.worker import Worker
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepLog
from trainkit.training.board import SilentBoard, Story, TensorBoard
from trainkit.training.loop import Outcome
from trainkit.training.meters import StepRecord
from trainkit.training.rank_meters import RankNumbers

EVERY = 2  # steps between two evaluations
ENGINE: Any = SimpleNamespace(model=None)
METRIC = {2: 0.2, 4: 0.9, 6: 0.6}  # of each step's weights

NUMBERS = dict.fromkeys(RankNumbers.__dataclass_fields__, 0)
RECORD: dict[str, Any] = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {"seconds": 1.0, "piece_seconds": {}, "skipped_ranks": ()}


class Ended(Results):
    """Of a rank alone that has trained `last` of 6 steps and evaluated them; `outcome` is the loop's."""

    def __init__(self, path: Path, last: int, metric_for_best: str | None, load_best: bool, zero_stage: int = 1):
        train = SimpleNamespace(metrics=["exact_match"], metric_for_best_model=metric_for_best, load_best_model_at_end=load_best)
        plan, recipe = SimpleNamespace(total_steps=6, zero_stage=zero_stage), SimpleNamespace(train=train)
        job: Any = SimpleNamespace(eval_steps=1, recipe=recipe, plan=plan, run_folder=str(path))
        (path / ".ray").mkdir()
        board, feeds = TensorBoard(path / "tensorboard", Story(use_gpu=False)), {"eval": MagicMock()}
        super().__init__(job, 0, torch.device("cpu"), None, feeds, board, lambda text: None)
        self.outcome = Outcome(steps=last, best_step=None if metric_for_best is None else 4)
        for self.now_at in range(EVERY, last + 1, EVERY):
            self.outcome.evaluation = {"step": self.now_at, **self.evaluate(ENGINE, self.now_at)}
            if self.now_at == self.outcome.best_step:
                self.outcome.best_evaluation = self.outcome.evaluation

    def export(self, engine: Any, folder: Path) -> None: ...

    def metrics(self, model: Any, device: torch.device, in_step: bool) -> tuple[dict[str, float], list[dict[str, str]]]:
        return {"exact_match": METRIC[self.now_at]}, [{"source": "a", "predicted": "b", "expected": "c"}]

    def measure(self, engine: Any, target: Path) -> tuple[dict[str, float], list[dict[str, str]]]:
        loads_best = self.recipe.train.load_best_model_at_end
        self.now_at = self.outcome.best_step if loads_best and self.outcome.best_step else self.outcome.steps
        return self.metrics(None, self.device, in_step=False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "evaluate_loss", lambda engine, feed, steps: {"loss": 1.5})
    monkeypatch.setattr(results, "link_model", lambda best, target: None)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)


@pytest.mark.parametrize(
    ("last", "metric_for_best", "load_best", "final_step"),
    [
        (6, None, False, 6),  # the last step's metrics are measured on model/ alone
        (6, "loss", True, 4),  # model/ holds other weights than the last step's
        (6, "exact_match", True, 4),
        (6, "exact_match", False, 6),
        (4, "loss", False, 4),  # stopped early
    ],
)
def test_each_evaluation_has_one_point_and_the_model_a_tag_of_its_own(
    alone: None, tmp_path: Path, last: int, metric_for_best: str | None, load_best: bool, final_step: int
) -> None:
    ended = Ended(tmp_path, last, metric_for_best, load_best)
    examples = ended.finish(ENGINE, ended.outcome)
    ended.board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points["eval/loss"] == [(step, 1.5) for step in METRIC if step <= last]
    assert points["eval/exact_match"] == [(step, value) for step, value in METRIC.items() if step <= last]
    assert points["final/exact_match"] == [(final_step, METRIC[final_step])] and points["final/loss"] == [(final_step, 1.5)]
    assert ended.outcome.evaluation == {"step": final_step, "loss": 1.5, "exact_match": METRIC[final_step]} and examples
    shown = [event.step for event in events.Tensors("predictions/text_summary")]
    assert shown == [step for step in METRIC if step <= last]


class Reporting(Worker):
    """Rank 0 that has reported `steps` steps at once, far faster than one write a second."""

    def __init__(self, path: Path, steps: int):
        self.profiler = self.heart = MagicMock()
        self.order, self.ranks_told, self.untold, self.first_step = "", 0.0, None, 1
        self.board, self.folder, self.log = SilentBoard(), RunFolder(path), StepLog(RunFolder(path))
        for step in range(1, steps + 1):
            self.report(StepRecord(**RECORD | {"step": step, "ranks": (RankNumbers(**NUMBERS | {"peak_bytes": step}),)}))


def test_what_ranks_measured_last_is_kept_when_a_run_ends_or_fails(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "it")
    worker = Reporting(folder.path, steps=5)
    assert folder.read_ranks()[0]["peak_bytes"] == 1, "one write a second"
    worker.tell_ranks_last()
    assert folder.read_ranks()[0]["peak_bytes"] == 5
