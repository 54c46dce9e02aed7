"""What the driver does between two attempts, and what it has the workers fed with, without Ray."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console
from test_budget import COUNTED, write_skewed
from test_memory import recipe_of, t5_large

from trainkit.cluster.capacity import Node
from trainkit.cluster.decision import Decision
from trainkit.cluster.driver import _Run
from trainkit.cluster.job import Job, hand_over, train_loop
from trainkit.cluster.launch import Launch, Ready, _feedings, _job
from trainkit.cluster.resume import kept_budget
from trainkit.data.batches import Shape
from trainkit.data.distributor import DataDistributor, Distributors
from trainkit.data.tokens import Prepared
from trainkit.errors import CaptureError, OutOfMemory, TrainkitError
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.planner import make_plan
from trainkit.planning.revision import halved
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.zero import read_zero
from trainkit.runs import startup
from trainkit.runs.folder import RunFolder
from trainkit.units import GIB

NODE = Node({"CPU": 8, "GPU": 2})
PREPARED = Prepared(train="tokens/a", eval="tokens/b", label_names=None)
FAILED = CaptureError("no CUDA graph can be made of forward and backward: operation not permitted")


def run_of(folder: Path, **model: Any) -> _Run:
    recipe = recipe_of(scaling={"num_workers": 2}, model={"path": "t5", "task": "seq2seq"} | model)
    facts = read_zero("zero1"), t5_large(), DataFacts(56_344, None), Hardware("cuda", "NVIDIA H200", 139 * GIB)
    decision = Decision(recipe, make_plan(recipe, *facts), facts)
    console = Console(file=io.StringIO(), width=200)
    signals = MagicMock(taken=False)
    made = RunFolder.create(folder, "t5")
    run = _Run(None, False, recipe, recipe, decision, decision.plan, made, console, signals, MagicMock(), False)
    run.preparation.rows = PREPARED
    return run


def told(run: _Run) -> str:
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


@pytest.mark.parametrize("error", [FAILED, OutOfMemory("rank 0: the GPU has no memory left", device="GPU")])
def test_a_run_goes_on_without_graphs_that_failed(tmp_path: Path, error: TrainkitError) -> None:
    run, without = run_of(tmp_path), run_of(tmp_path / "other", cuda_graphs=False).plan
    assert run.plan.cuda_graphs
    run._restart_or_raise(error, None)
    plan = run._plan_on([NODE])
    assert plan.no_graphs is not None and "failed before" in plan.no_graphs
    assert replace(plan, no_graphs=without.no_graphs, fits=without.fits) == without
    assert [fit for fit in plan.fits if fit.name == "zero1"] == [fit for fit in without.fits if fit.name == "zero1"]
    assert run.folder.read_plan()["cuda_graphs"] is False
    assert error.message in told(run) and "going on without CUDA graphs" in told(run) and "of 2 workers" not in told(run)
    assert run.folder.failures()[-1]["of_graphs"]
    with pytest.raises(type(error)):
        run._restart_or_raise(error, None)


def test_the_recipe_that_a_run_keeps_needs_no_zero_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, mine = run_of(tmp_path / "runs"), tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    run.wish = run.wish.model_copy(update={"zero": str(mine)})
    monkeypatch.setattr(_Run, "_attempt", lambda *asked: {"status": "completed"})
    run.train()
    mine.unlink()
    kept = read_recipe(run.folder.path / "recipe.yaml", ["model.path=m"])
    assert kept.zero == {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}} and read_zero(kept.zero).stage == 2


def test_graphs_that_were_asked_for_end_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, cuda_graphs=True)
    with pytest.raises(CaptureError):
        run._restart_or_raise(FAILED, None)
    assert run._plan_on([NODE]).cuda_graphs


def test_what_fails_before_there_are_rows_is_not_tried_again(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.preparation.rows = None
    failure = OSError(28, "No space left on device")
    with pytest.raises(OSError) as raised:
        run._restart_or_raise(failure, None)
    assert raised.value is failure and not run.folder.failures() and not run.ungraphed


def test_workers_that_are_started_early_wait_for_their_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    job = Job(run.recipe, run.plan, str(run.folder.path), PREPARED, None, Distributors("handle", {}, "node"), eval_steps=2)
    worker = SimpleNamespace(run_worker=lambda job: job)
    monkeypatch.setitem(sys.modules, "trainkit.cluster.worker", worker)
    assert train_loop({"job": job}) is job
    run.folder.begin_attempt()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(train_loop, {"job": run.folder.job_path})
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        hand_over(job, run.folder.job_path)
        assert waiting.result(timeout=30) == job
    run.folder.begin_attempt()
    assert not run.folder.job_path.exists(), "the next attempt's workers wait for their own"


@pytest.mark.parametrize(
    ("sections", "joined"),
    [
        ({}, True),
        ({"scaling": {"num_workers": 2, "use_gpu": False}}, False),
        ({"model": {"path": "t5", "task": "classification"}}, True),
        ({"model": {"path": "llama", "task": "causal", "precision": "fp16"}}, False),
        ({"batch": {"samples": 96, "joint_shapes": False}}, False),
        ({"batch": {"samples": 96, "joint_shapes": True}, "scaling": {"num_workers": 2, "use_gpu": False}}, True),
    ],
)
def test_rows_to_train_on_are_padded_to_joint_shapes_where_graphs_may_be_made(sections: dict[str, Any], joined: bool) -> None:
    """Under all stages, and never those to evaluate."""
    recipe = recipe_of(**({"scaling": {"num_workers": 2}} | sections))
    plan = make_plan(recipe, read_zero("zero3"), None, DataFacts(100, 50), Hardware("cuda", "GPU", None))
    asked: Any = SimpleNamespace(plan=plan, recipe=recipe)
    assert {split: feeding.joined for split, feeding in _feedings(asked, PREPARED).items()} == {"train": joined, "eval": False}


@pytest.mark.parametrize(("zero", "nodes", "splits"), [("zero1", 1, True), ("zero1", 2, True), ("zero3", 1, True), ("zero3", 2, False)])
def test_micro_batches_are_split_once_the_rows_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: str, nodes: int, splits: bool
) -> None:
    """The budget that the workers are fed by is the plan's, in plan.json too; a run that goes on keeps it, one without memory halves it."""
    run, hardware = run_of(tmp_path), Hardware("cuda", "NVIDIA H200", 600 * GIB, has_nvlink=True)
    recipe = run.recipe.model_copy(update={"batch": run.recipe.batch.model_copy(update={"samples": 512})})
    facts = read_zero(zero), COUNTED, DataFacts(1500, None), hardware
    decision = Decision(recipe, make_plan(recipe, *facts), facts)
    run.decision, run.recipe, run.plan, run.without_data = decision, recipe, decision.plan, decision.plan
    fed: list[DataDistributor] = []
    monkeypatch.setattr("trainkit.data.distributor.make_distributors", lambda feedings, _: fed.append(DataDistributor(feedings)) or fed[-1])
    monkeypatch.setattr("trainkit.cluster.launch.build_operators", lambda *_: None)
    startup.begin(run.folder, 0.0)
    prepared = Prepared(train=write_skewed(tmp_path / "rows"), eval=None, label_names=None)
    asked = Launch(
        recipe, run.plan, run._plan_on, run._data_known, run.folder, lambda check: Ready(prepared, None), None, False, run.preparation.say
    )
    asked, job = _job(asked, [NODE] * nodes, MagicMock(), MagicMock(), lambda: None)
    tokens = job.plan.tokens_per_device
    assert tokens is not None and decision.plan.tokens_per_device is not None and job.plan == asked.plan == run.plan
    assert (tokens < decision.plan.tokens_per_device / 2) == splits == (f"tokens_per_device: {tokens:,}" in " ".join(told(run).split()))
    assert fed[0].feedings["train"].budget.tokens == run.folder.read_plan()["tokens_per_device"] == tokens
    assert job.plan.largest_micro_batch_tokens is not None and job.plan.largest_micro_batch_tokens <= tokens
    run.folder.write_recipe(recipe_to_yaml(recipe))
    assert kept_budget(run.folder, recipe) == tokens and (halved(run.plan) or 0) <= tokens / 2
    run._restart_or_raise(FAILED, None)
    again = run._plan_on([NODE])
    assert not again.cuda_graphs and not again.splits_for_padding and again.tokens_per_device == tokens, "the same micro-batches go on"


def test_a_note_is_said_once_whatever_restarts(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for _ in range(2):
        run._data_known(run._plan_on([NODE]), {Shape(300, 96, 96): 60}, 30)
        run.restarts += 1
    assert told(run).count("no CUDA graphs") == 1
