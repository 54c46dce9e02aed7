"""What comes of a training beside its checkpoints: evaluations, the best weights, model/ and what is measured of it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.cluster.job import Job
from trainkit.data.feed import Feed
from trainkit.data.padding import MicroBatch
from trainkit.data.tokens import TokenArrays
from trainkit.errors import TrainingError
from trainkit.inference.evaluate import evaluate_loss, evaluate_metrics
from trainkit.inference.export import export_model, link_model
from trainkit.inference.predict import Rank, load_plain
from trainkit.planning.facts import DEFAULT_LENGTH
from trainkit.runs import checkpoints
from trainkit.runs.folder import RunFolder
from trainkit.training import loop
from trainkit.training.board import Board
from trainkit.training.checkpoint import read_state
from trainkit.training.engine import Engine

EVALUATING = "evaluating"
Examples = list[dict[str, str]]  # source, predicted and expected text


class Results:
    """One rank's part in them; all ranks call the same, in the same order. Rank 0 writes."""

    def __init__(
        self,
        job: Job,
        rank: int,
        device: torch.device,
        tokenizer: Any,
        feeds: Mapping[str, Feed],
        board: Board,
        phase: Callable[[str], None],
    ):
        """phase: told what is being done."""
        self.job, self.recipe, self.plan, self.path = job, job.recipe, job.plan, Path(job.run_folder)
        self.rank, self.device, self.tokenizer, self.feeds, self.board, self.phase = rank, device, tokenizer, feeds, board, phase
        self.examples: dict[int, Examples] = {}  # by the step of their evaluation

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """The loss over the whole evaluation set, and the metrics. At the end metrics come from model/ if it will hold these weights."""
        self.phase(EVALUATING)
        began = time.monotonic()
        values = evaluate_loss(engine, self.feeds["eval"], self.job.eval_steps)
        if self.recipe.train.metrics and not (step == self.plan.total_steps and self.model_is_last):
            measured, self.examples[step] = self.metrics(engine.model, self.device, in_step=self.plan.zero_stage == 3)
            values |= measured
        self.write({"step": step} | values)
        self.board.evaluation(step, values, time.monotonic() - began)
        self.board.predictions(step, self.examples.get(step, []))
        self.phase("training")
        return values

    def write(self, evaluation: Mapping[str, float]) -> None:
        if self.rank == 0:
            RunFolder(self.path).write_evaluation(evaluation)

    def metrics(self, model: Any, device: torch.device, in_step: bool) -> tuple[dict[str, float], Examples]:
        assert self.job.prepared.eval is not None
        return evaluate_metrics(
            model,
            metrics=self.recipe.train.metrics,
            task=self.recipe.model.task,
            arrays=TokenArrays.open(self.job.prepared.eval),
            tokenizer=self.tokenizer,
            label_names=self.job.prepared.label_names,
            where=Rank(self.rank, self.plan.world_size, device, in_step=in_step),
            max_new_tokens=self.recipe.data.max_target_length or self.recipe.data.max_length or DEFAULT_LENGTH,
        )

    def keep_best(self, engine: Engine, step: int, saved: int | None) -> None:
        """Export the weights of now to .best-<step>. Those that a checkpoint names stay: a restart may go back to it.

        saved: the best step by the last checkpoint, which may not be complete yet.
        """
        if not self.recipe.train.load_best_model_at_end:
            return
        self.phase("keeping the best model")
        self.export(engine, self.best(step))
        if self.rank == 0:
            kept = {self.best(named) for named in {step, saved, *self.best_named()} - {None}}
            for other in set(self.path.glob(".best-*")) - kept:
                shutil.rmtree(other)

    def best_named(self) -> Iterator[int | None]:
        """By complete checkpoints; one of them may just be removed."""
        for checkpoint in checkpoints.complete(self.path):
            with contextlib.suppress(TrainingError):
                yield read_state(checkpoint)["outcome"]["best_step"]

    def best(self, step: int | None) -> Path:
        return self.path / f".best-{step}"

    def export(self, engine: Engine, folder: Path) -> None:
        export_model(engine, self.tokenizer, folder, self.recipe, self.example_batch())

    def example_batch(self) -> MicroBatch:
        """A micro-batch whose logits are compared between the engine and the exported model."""
        return self.feeds["eval" if self.job.eval_steps else "train"].micro_batches(1).micro_batches[0]

    def finish(self, engine: Engine, outcome: loop.Outcome) -> Examples:
        """Export model/, then measure what the user gets: the metrics come from model/ where a worker may hold it whole.

        The curves of the evaluations get them only where the evaluation of that step left them to here: each step has one point.
        """
        self.phase("exporting the model")
        target, step = self.path / "model", outcome.steps
        if self.recipe.train.load_best_model_at_end and outcome.best_step is not None:
            step = outcome.best_step
            if self.rank == 0:
                link_model(self.best(step), target)
            outcome.evaluation = outcome.best_evaluation
        else:
            self.export(engine, target)
        evaluated, examples = outcome.evaluation or {}, self.examples.get(step, [])
        if self.loads_whole and self.job.eval_steps and self.recipe.train.metrics:
            self.phase("measuring model/")
            dist.barrier()  # rank 0 may still be moving it
            measured, examples = self.measure(engine, target)
            if not evaluated.keys() >= measured.keys():
                self.board.evaluation(step, measured)
                self.board.predictions(step, examples)
            outcome.evaluation = evaluated | measured
        if outcome.evaluation is not None:
            self.write(outcome.evaluation)
            self.board.final(step, {name: value for name, value in outcome.evaluation.items() if name != "step"})
        return examples

    @property
    def model_is_last(self) -> bool:
        """Whether model/ is measured, and is known to hold the last step's weights before those are measured: once is enough then."""
        train = self.recipe.train
        return self.loads_whole and not train.load_best_model_at_end and train.metric_for_best_model in (None, "loss")

    @property
    def loads_whole(self) -> bool:
        """Whether a worker's device may hold the whole model: no GPU does under ZeRO-3, where the engine itself generates, in step."""
        return self.plan.zero_stage < 3 or self.device.type == "cpu"

    def measure(self, engine: Engine, target: Path) -> tuple[dict[str, float], Examples]:
        """On the device where the whole model fits beside the engine, which trains no more, else on the CPU."""
        engine.close_graphs()
        device = self.device if self.fits_whole(engine) else torch.device("cpu")
        model = load_plain(target, self.recipe.model.task, self.recipe.model.precision).to(device)
        return self.metrics(model, device, in_step=False)

    def fits_whole(self, engine: Engine) -> bool:
        """Whether every rank's device has room for the whole model beside the engine."""
        if self.device.type == "cpu":
            return True
        num_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.model.parameters())
        free = torch.tensor(float(engine.free_bytes() > 2 * num_bytes), device=self.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        return bool(free.item())
