"""What each Ray Train worker does: build the engine, train, evaluate, export. Rank 0 writes the run folder.

The process group is up when `run_worker` starts; everything else a rank needs travels in the job.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist

from trainkit.cluster.hangs import Heart
from trainkit.cluster.hardware import worker_device
from trainkit.cluster.job import Job
from trainkit.cluster.results import EVALUATING, Results
from trainkit.data.batches import Shape
from trainkit.data.distributor import activity_of
from trainkit.data.feed import CALL_BYTES, Feed, Source
from trainkit.data.order import chain, epoch_of_step
from trainkit.data.padding import MicroBatch, Padding, moved
from trainkit.data.tokens import TokenArrays, load_tokenizer
from trainkit.data.wire import WireCall
from trainkit.errors import OutOfMemory
from trainkit.markup import plain
from trainkit.planning.planner import check_precision
from trainkit.planning.show import plan_text
from trainkit.recipe.reader import recipe_to_yaml
from trainkit.runs import startup
from trainkit.runs.checkpoints import sha256
from trainkit.runs.copying import Copier, NoCopier
from trainkit.runs.folder import PREDECESSOR_SECONDS, RunFolder
from trainkit.runs.steps import StepLog
from trainkit.training import loop
from trainkit.training.board import Board, SilentBoard, Story, TensorBoard, hyperparameters
from trainkit.training.checkpoint import Saver, read_state, restore
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.meters import StepRecord, as_json
from trainkit.training.model import build_model
from trainkit.training.out_of_memory import out_of_memory
from trainkit.training.profiler import NoProfiler, Profiler
from trainkit.training.tasks import check_packing
from trainkit.training.warm_up import steps_looked_at, warm_up

_ANSWER_SECONDS = 5
_RANKS_SECONDS = 1.0  # between two writes of what each rank measured
_COPY_SECONDS = 1.0  # between two looks at the copy of the last checkpoint


def run_worker(job: Job) -> dict[str, Any] | None:
    """Runs on every rank. Returns rank 0's outcome, None elsewhere.

    An error is written to the run folder before it is raised: the first one is what the user reads, whatever follows it on other ranks.
    """
    worker: Worker | None = None
    with contextlib.ExitStack() as stack:
        try:
            worker = Worker(job, stack)
            return worker.run()
        except BaseException as error:
            step, told = 0 if job.checkpoint is None else job.checkpoint.step, error
            if worker is not None:
                step, told = worker.step, worker.as_out_of_memory(error) or error
            with contextlib.suppress(OSError):  # a folder that is not there; what is raised comes through Ray as well
                RunFolder(job.run_folder, job.attempt).write_error(dist.get_rank(), step, told, traceback.format_exc())
            raise


class Worker:
    """One rank of a run: its feeds, its place in the run folder, and the order of what is done."""

    def __init__(self, job: Job, stack: contextlib.ExitStack):
        """stack: closes at the rank's end, however it comes, what is opened here, the last first."""
        self.job, self.recipe, self.plan, self.stack = job, job.recipe, job.plan, stack
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = RunFolder(job.run_folder, job.attempt)
        self.folder.check_shared(self.rank, self.world_size, dist.barrier)
        self.device = ray.train.torch.get_device() if job.plan.use_gpu else torch.device("cpu")
        check_precision(job.recipe, None, worker_device(job.plan.use_gpu))  # of this node, which the driver may not have seen
        before = {} if job.checkpoint is None else read_state(job.checkpoint)
        self.begin = loop.Outcome(**before.get("outcome", {}))
        self.step, self.order = self.begin.steps, before.get("order", "")
        self.first_step = self.begin.steps + 1
        self.heart, self.phase_text = Heart(self.folder, self.rank), "training"
        self.heart.start()
        stack.callback(self.heart.stop)  # last: what is still being written is no hang
        window = job.recipe.train.profile
        trace = self.folder.path / "profile" / f"rank-{self.rank}.json.gz"
        self.profiler = NoProfiler() if window is None else Profiler(window, trace, self.device)
        stack.callback(self.profiler.close)
        self.board: Board = SilentBoard()
        self.log: StepLog | None = None
        self.untold: StepRecord | None = None  # of rank 0: what the ranks measured since they were told of
        self.ranks_told = 0.0
        if self.rank == 0:
            stack.callback(self.folder.lock("rank-0", wait_seconds=PREDECESSOR_SECONDS).release)
            self.board = TensorBoard(self.folder.path / "tensorboard", self.story())
            stack.callback(self.board.close)
            self.log = StepLog(self.folder)
            stack.callback(self.log.close)
            stack.callback(self.tell_ranks_last)
        self.tokenizer = load_tokenizer(job.recipe).tokenizer
        self.feeds = {"train": self._feed("train", job.plan.total_steps), "eval": self._feed("eval", job.eval_steps)}
        for feed in self.feeds.values():
            stack.callback(feed.close)
        url = job.recipe.run.copy_checkpoints_to
        self.copier = Copier(self.folder, url) if url is not None and self.rank == 0 else NoCopier()
        stack.callback(self.copier.close)
        if job.checkpoint is not None:
            self.copier.offer(self.step)  # an attempt before may have ended in the middle of its copy
        self.saver = Saver(self.folder.path, str(job.attempt), job.recipe.train.save_total_limit, self.copier.offer)
        stack.callback(self.saver.close)
        self.best_saved: int | None = self.begin.best_step  # by the last checkpoint, which may not be complete yet
        self.results = Results(job, self.rank, self.device, self.tokenizer, self.feeds, self.board, self.phase)

    def run(self) -> dict[str, Any] | None:
        if self.rank == 0:
            startup.ended(self.folder, startup.WORKERS)
        self.phase("building the engine")
        self.feeds["train"].begin(self.step + 1)
        if self.recipe.train.deterministic:
            torch.use_deterministic_algorithms(True)
        uses = self.coming_shapes()
        partitioning = Partitioning(self.plan)
        model = build_model(self.recipe, self.job.first_weights, partitioning.gathered, self.job.prepared.label_names)
        engine = Engine(model, self.plan, self.recipe.model.task, self.device, self.folder.write_note)
        self.stack.callback(close_graphs, engine)
        if self.recipe.data.packing:
            with engine.evaluating():
                check_packing(engine.logits, self.feeds["train"].micro_batches(1).micro_batches[0])
        if self.job.checkpoint is not None:
            self.phase(f"going on from step {self.step}")
            restore(engine, self.job.checkpoint, self.feeds["train"].micro_batches(min(self.step + 1, self.plan.total_steps)))
        self.saver.prepare(engine)
        if self.rank == 0:
            startup.ended(self.folder, startup.ENGINE)
        warm_up(engine, uses(), self.step + 1, self.blank, self.warms_up)
        if self.rank == 0:
            startup.ended(self.folder, startup.WARM_UP)
        self.phase("training")
        around = loop.Surroundings(
            report=self.report,
            evaluate=lambda step: self.results.evaluate(engine, step),
            keep_best=lambda step: self.results.keep_best(engine, step, self.best_saved),
            save=lambda outcome: self.save(engine, outcome),
            stop_requested=self.stop_requested,
            save_requested=self.folder.save_requested,
            begins=self.begins,
            ends=self.ends,
        )
        outcome = loop.train(engine, self.feeds["train"], self.plan, self.recipe, around, self.begin)
        self.tell_ranks()
        self.saver.wait()
        examples = self.results.finish(engine, outcome) if outcome.status == "completed" else []
        self.wait_for_copies()
        self.phase("ending the workers")
        if outcome.status == "completed":
            self.board.completed()
        if self.rank != 0:
            return None
        return {
            "status": outcome.status,
            "steps": outcome.steps,
            "eval": outcome.evaluation,
            "best_step": outcome.best_step,
            "stopped_early": outcome.stopped_early,
            "copy": self.copier.outcome(),
            "predictions": examples,
        }

    def coming_shapes(self) -> Callable[[], dict[Shape, int]]:
        """Asks which shapes the next steps have, and returns what waits for the answer."""
        first = self.step + 1
        count = steps_looked_at(self.plan, first)
        if not count:
            return dict
        answer = self.job.distributors.nearest().shapes.remote("train", first, count)
        return lambda: ray.get(answer)

    def warms_up(self, number: int, of: int) -> None:
        """Watched as the pieces of the first step are: compiling may take minutes, and ranks that wait for each other may hang."""
        text = f"compiling and warming up: shape {number} of {of}"
        self.phase(text)
        self.heart.begins(self.step + 1, text)

    def blank(self, shape: Shape) -> MicroBatch:
        columns = TokenArrays.open(self.job.prepared.train).columns
        return moved(self.feeds["train"].padding.blank(shape, columns, packed=self.recipe.data.packing), self.device)

    def begins(self, step: int, piece: str) -> None:
        self.profiler.begins(step, piece)
        self.heart.begins(step, piece, in_step=piece != loop.DATA_WAIT)

    def ends(self, step: int) -> None:
        if self.profiler.is_last(step):
            self.heart.begins(step, "writing the trace", in_step=False)
        self.profiler.ends(step)

    def report(self, record: StepRecord) -> None:
        self.step, self.order = record.step, chain(self.order, record.step_hash)
        self.board.step(record)
        if self.log is not None:
            self.log.append(as_json(record, self.order))
            if record.step == self.first_step:
                startup.ended(self.folder, startup.FIRST_STEP)
            self.untold = record
            if time.monotonic() - self.ranks_told > _RANKS_SECONDS:
                self.tell_ranks()

    def tell_ranks(self) -> None:
        """What each rank measured in the newest step, for those who watch and for the summary."""
        record, self.untold = self.untold, None
        if record is not None:
            self.ranks_told = time.monotonic()
            self.folder.write_ranks([asdict(rank) for rank in record.ranks])

    def tell_ranks_last(self) -> None:
        with contextlib.suppress(OSError):  # what ended the training is told, and the summary has a table that is a second old
            self.tell_ranks()

    def story(self) -> Story:
        """What TensorBoard says of this run beside its curves."""
        plan, recipe = self.plan, self.recipe
        kept = sum(step["seconds"] for step in self.folder.read_steps())
        return Story(
            use_gpu=plan.use_gpu,
            done=self.step,
            hyperparameters=hyperparameters(recipe, plan),
            metrics=recipe.train.metrics,
            has_mfu=plan.flops is not None and plan.peak_flops is not None,
            texts={"plan": f"```text\n{plain(plan_text(plan), width=110)}\n```", "recipe": f"```yaml\n{recipe_to_yaml(recipe)}```"},
            expected_peak_bytes=plan.expected_peak_bytes,
            kept_seconds=kept,
            worked_seconds=lambda: 0.0 if self.job.worked_seconds is None else self.job.worked_seconds + time.time() - self.job.began,
        )

    def stop_requested(self) -> bool:
        self.saver.check()
        return self.folder.stop_requested()

    def save(self, engine: Engine, outcome: loop.Outcome) -> None:
        self.phase("saving a checkpoint")
        self.folder.begin_save()
        if self.log is not None:
            self.log.sync()  # a checkpoint must not outlive its steps
        self.best_saved = outcome.best_step
        stall = self.saver.save(engine, outcome.steps, self.state(outcome), outcome.best_step)
        self.board.checkpoint(outcome.steps, stall)
        self.phase("training")

    def state(self, outcome: loop.Outcome) -> dict[str, Any]:
        """What state.json says beside the counters. The recipe hash is that of recipe.yaml, as this attempt began."""
        plan, rows = self.plan, TokenArrays.open(self.job.prepared.train).rows
        epoch, first = epoch_of_step(rows, plan.samples_per_step, outcome.steps)
        return {
            "epoch": epoch,
            "samples": epoch * rows + min(rows, first + plan.samples_per_step),
            "order": self.order,
            "outcome": asdict(outcome) | {"status": "completed"},
            "data": self.job.prepared.key,
            "recipe_sha256": sha256(self.folder.path / "recipe.yaml"),
            "layout": {"num_workers": plan.world_size, "zero_stage": plan.zero_stage, "offload_optimizer": plan.offload_optimizer,
                       "offload_param": plan.offload_param, "micro_batches": plan.micro_batches_per_step},
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "ray")},
        }  # fmt: skip

    def wait_for_copies(self) -> None:
        """All ranks together: one that has ended would look dead to those who watch."""
        ended = [False]
        while not ended[0]:
            ended = [self.copier.ended(_COPY_SECONDS)]
            dist.broadcast_object_list(ended, device=self.device)
            if not ended[0]:
                self.phase("copying the last checkpoint")

    def phase(self, text: str) -> None:
        self.heart.begins(self.step, text, in_step=False)
        self.phase_text = text
        if self.rank == 0:
            self.folder.write_phase(text)

    def as_out_of_memory(self, error: BaseException) -> OutOfMemory | None:
        at = self.heart.place
        in_micro_batches = at.in_step or at.piece == EVALUATING
        return out_of_memory(error, self.plan, self.device, self.rank, at.step, at.piece, in_micro_batches)

    def _feed(self, split: str, last_step: int) -> Feed:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        padding = Padding(self.recipe.model.task, pad, pad if eos is None else eos)
        folder = self.job.prepared.train if split == "train" else self.job.prepared.eval
        handle = self.job.distributors.nearest()
        rows = None if folder is None else self.job.distributors.rows_at_hand(folder)

        def ask(first: int, count: int) -> Callable[[], WireCall]:
            answer = handle.steps.remote(split, first, count, self.rank, CALL_BYTES, with_rows=rows is None)
            return lambda: ray.get(answer)

        def say(text: str) -> None:
            self.folder.write_phase(text or self.phase_text)

        source = Source(ask, lambda: activity_of(handle, _ANSWER_SECONDS), say, rows)
        return Feed(source, padding, rank=self.rank, last_step=last_step, device=self.device)


def close_graphs(engine: Engine) -> None:
    with contextlib.suppress(RuntimeError):  # the GPU may be what failed
        engine.close_graphs()
