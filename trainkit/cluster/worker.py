"""What each Ray Train worker does: build the engine, train, evaluate, export. Rank 0 writes the run folder.

The process group is up when `run_worker` starts; everything else a rank needs travels in the job.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist

from trainkit.cluster.hangs import Heart
from trainkit.cluster.hardware import worker_device
from trainkit.cluster.job import Job
from trainkit.data.batches import Shape
from trainkit.data.distributor import said
from trainkit.data.encoding import DEFAULT_LENGTH
from trainkit.data.feed import CALL_BYTES, Feed, MicroBatch, Padding, Source, moved
from trainkit.data.order import chain, epoch_of_step
from trainkit.data.tokens import TokenArrays, load_tokenizer
from trainkit.data.wire import WireCall
from trainkit.errors import OutOfMemory, TrainingError
from trainkit.inference.evaluate import evaluate_loss, evaluate_metrics
from trainkit.inference.export import export_model, link_model
from trainkit.inference.predict import Rank, load_plain
from trainkit.markup import plain
from trainkit.planning.planner import check_precision
from trainkit.planning.show import plan_text
from trainkit.recipe.reader import recipe_to_yaml
from trainkit.runs import checkpoints, startup
from trainkit.runs.checkpoints import sha256
from trainkit.runs.copying import Copier, NoCopier
from trainkit.runs.files import Lock
from trainkit.runs.folder import PREDECESSOR_SECONDS, RunFolder, StepLog
from trainkit.training import loop
from trainkit.training.board import Board, SilentBoard, Story, TensorBoard, hyperparameters
from trainkit.training.checkpoint import Saver, read_state, restore
from trainkit.training.engine import Engine, Partitioning
from trainkit.training.meters import StepRecord, as_json
from trainkit.training.model import build_model, check_packing
from trainkit.training.out_of_memory import out_of_memory
from trainkit.training.profiler import NoProfiler, Profiler
from trainkit.training.warm_up import steps_looked_at, warm_up

_ANSWER_SECONDS = 5
_EVALUATING = "evaluating"
_RANKS_SECONDS = 1.0  # between two writes of what each rank measured
_COPY_SECONDS = 1.0  # between two looks at the copy of the last checkpoint


def run_worker(job: Job) -> dict[str, Any] | None:
    """Runs on every rank. Returns rank 0's outcome, None elsewhere.

    An error is written to the run folder before it is raised: the first one is what the user reads, whatever follows it on other ranks.
    """
    worker: Worker | None = None
    try:
        worker = Worker(job)
        return worker.run()
    except BaseException as error:
        step, told = 0, error
        if worker is not None:
            step, told = worker.step, worker.as_out_of_memory(error) or error
        with contextlib.suppress(OSError):  # a folder that is not there; what is raised comes through Ray as well
            RunFolder(job.run_folder).write_error(dist.get_rank(), step, told, traceback.format_exc())
        raise
    finally:
        if worker is not None:
            worker.close()


class Worker:
    """One rank of a run: its feeds, its place in the run folder, and the order of what is done."""

    engine: Engine | None = None  # until it is built

    def __init__(self, job: Job):
        self.job, self.recipe, self.plan = job, job.recipe, job.plan
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = RunFolder(Path(job.run_folder))
        self.folder.check_shared(job.attempt, self.rank, self.world_size, dist.barrier)
        self.device = ray.train.torch.get_device() if job.plan.use_gpu else torch.device("cpu")
        check_precision(job.recipe, None, worker_device(job.plan.use_gpu))  # of this node, which the driver may not have seen
        self.tokenizer = load_tokenizer(job.recipe).tokenizer
        self.feeds = {"train": self._feed("train", job.plan.total_steps), "eval": self._feed("eval", job.eval_steps)}
        before = {} if job.checkpoint is None else read_state(job.checkpoint)
        self.begin = loop.Outcome(**before.get("outcome", {}))
        self.step, self.order = self.begin.steps, before.get("order", "")
        self.first_step = self.begin.steps + 1
        self.board: Board = SilentBoard()
        self.log: StepLog | None = None
        self.lock: Lock | None = None
        if self.rank == 0:
            self.lock = self.folder.lock("rank-0", wait_seconds=PREDECESSOR_SECONDS)
            self.board = TensorBoard(self.folder.path / "tensorboard", self.story())
            self.log = StepLog(self.folder)
        self.heart, self.now = Heart(self.folder, self.rank), "training"
        self.heart.start()
        window = job.recipe.train.profile
        trace = self.folder.path / "profile" / f"rank-{self.rank}.json.gz"
        self.profiler = NoProfiler() if window is None else Profiler(window, trace, self.device)
        self.ranks_told = 0.0
        self.untold: StepRecord | None = None  # of rank 0: what the ranks measured since then
        url = job.recipe.run.copy_checkpoints_to
        self.copier = Copier(self.folder, url) if url is not None and self.rank == 0 else NoCopier()
        if job.checkpoint is not None:
            self.copier.offer(self.step)  # an attempt before may have ended in the middle of its copy
        self.saver = Saver(self.folder.path, str(job.attempt), job.recipe.train.save_total_limit, self.copier.offer)
        self.best_saved: int | None = self.begin.best_step  # by the last checkpoint, which may not be complete yet
        self.examples: dict[int, list[dict[str, str]]] = {}  # by the step of their evaluation

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
        engine = self.engine = Engine(model, self.plan, self.recipe.model.task, self.device, self.folder.write_note)
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
            evaluate=lambda step: self.evaluate(engine, step),
            keep_best=lambda step: self.keep_best(engine, step),
            save=lambda outcome: self.save(engine, outcome),
            stop_requested=self.stop_requested,
            save_requested=self.folder.save_requested,
            begins=self.begins,
            ends=self.ends,
        )
        outcome = loop.train(engine, self.feeds["train"], self.plan, self.recipe, around, self.begin)
        self.tell_ranks()
        self.saver.wait()
        examples = self.finish(engine, outcome) if outcome.status == "completed" else []
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

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """The loss over the whole evaluation set, and the metrics. At the end metrics come from model/ if it will hold these weights."""
        self.phase(_EVALUATING)
        began = time.monotonic()
        values = evaluate_loss(engine, self.feeds["eval"], self.job.eval_steps)
        if self.recipe.train.metrics and not (step == self.plan.total_steps and self.model_is_last):
            measured, self.examples[step] = self.metrics(engine.model, self.device, in_step=self.plan.zero_stage == 3)
            values |= measured
        self.board.evaluation(step, values, time.monotonic() - began)
        self.board.predictions(step, self.examples.get(step, []))
        self.phase("training")
        return values

    def metrics(self, model: Any, device: torch.device, in_step: bool) -> tuple[dict[str, float], list[dict[str, str]]]:
        assert self.job.prepared.eval is not None
        return evaluate_metrics(
            model,
            metrics=self.recipe.train.metrics,
            task=self.recipe.model.task,
            arrays=TokenArrays.open(self.job.prepared.eval),
            tokenizer=self.tokenizer,
            label_names=self.job.prepared.label_names,
            where=Rank(self.rank, self.world_size, device, in_step=in_step),
            max_new_tokens=self.recipe.data.max_target_length or self.recipe.data.max_length or DEFAULT_LENGTH,
        )

    def keep_best(self, engine: Engine, step: int) -> None:
        """Export the weights of now to .best-<step>. Those that a checkpoint names stay: a restart may go back to it."""
        if not self.recipe.train.load_best_model_at_end:
            return
        self.phase("keeping the best model")
        self.export(engine, self.best(step))
        if self.rank == 0:
            kept = {self.best(named) for named in {step, self.best_saved, *self.best_named()} - {None}}
            for other in set(self.folder.path.glob(".best-*")) - kept:
                shutil.rmtree(other)

    def best_named(self) -> Iterator[int | None]:
        """By complete checkpoints; one of them may just be removed."""
        for checkpoint in checkpoints.complete(self.folder.path):
            with contextlib.suppress(TrainingError):
                yield read_state(checkpoint)["outcome"]["best_step"]

    def best(self, step: int | None) -> Path:
        return self.folder.path / f".best-{step}"

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

    def export(self, engine: Engine, folder: Path) -> None:
        export_model(engine, self.tokenizer, folder, self.recipe, self.example_batch())

    def example_batch(self) -> MicroBatch:
        """A micro-batch whose logits are compared between the engine and the exported model."""
        return self.feeds["eval" if self.job.eval_steps else "train"].micro_batches(1).micro_batches[0]

    def finish(self, engine: Engine, outcome: loop.Outcome) -> list[dict[str, str]]:
        """Export model/, then measure what the user gets: the metrics come from model/ where a worker may hold it whole.

        The curves of the evaluations get them only where the evaluation of that step left them to here: each step has one point.
        """
        self.phase("exporting the model")
        target, step = self.folder.path / "model", outcome.steps
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
            self.board.final(step, {name: value for name, value in outcome.evaluation.items() if name != "step"})
        return examples

    def wait_for_copies(self) -> None:
        """All ranks together: one that has ended would look dead to those who watch."""
        ended = [False]
        while not ended[0]:
            ended = [self.copier.ended(_COPY_SECONDS)]
            dist.broadcast_object_list(ended, device=self.device)
            if not ended[0]:
                self.phase("copying the last checkpoint")

    @property
    def model_is_last(self) -> bool:
        """Whether model/ is measured, and is known to hold the last step's weights before those are measured: once is enough then."""
        train = self.recipe.train
        return self.loads_whole and not train.load_best_model_at_end and train.metric_for_best_model in (None, "loss")

    @property
    def loads_whole(self) -> bool:
        """Whether a worker's device may hold the whole model: no GPU does under ZeRO-3, where the engine itself generates, in step."""
        return self.plan.zero_stage < 3 or self.device.type == "cpu"

    def measure(self, engine: Engine, target: Path) -> tuple[dict[str, float], list[dict[str, str]]]:
        """On the device where the whole model fits beside the engine, else on the CPU."""
        device = self.device if self.fits_whole(engine) else torch.device("cpu")
        model = load_plain(target, self.recipe.model.task, self.recipe.model.precision).to(device)
        return self.metrics(model, device, in_step=False)

    def fits_whole(self, engine: Engine) -> bool:
        """Whether every rank's device has room for the whole model beside the engine."""
        if self.device.type == "cpu":
            return True
        num_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.model.parameters())
        free = torch.tensor(float(torch.cuda.mem_get_info(self.device)[0] > 2 * num_bytes), device=self.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        return bool(free.item())

    def phase(self, text: str) -> None:
        self.heart.begins(self.step, text, in_step=False)
        self.now = text
        if self.rank == 0:
            self.folder.write_phase(text)

    def as_out_of_memory(self, error: BaseException) -> OutOfMemory | None:
        step, _, piece, in_step, _ = self.heart.place
        return out_of_memory(error, self.plan, self.device, self.rank, step, piece, in_micro_batches=in_step or piece == _EVALUATING)

    def close(self) -> None:
        if self.engine is not None:
            with contextlib.suppress(RuntimeError):  # the GPU may be what failed
                self.engine.close_graphs()
        self.saver.close()
        self.copier.close()
        for feed in self.feeds.values():
            feed.close()
        if self.log is not None:
            self.log.close()
        with contextlib.suppress(OSError):  # what ended the training is told, and the summary has a table that is a second old
            self.tell_ranks()
        if self.lock is not None:
            self.lock.release()
        self.board.close()
        self.profiler.close()  # a trace that cannot be written holds nothing else up
        self.heart.stop()  # last: what is still being written is no hang

    def _feed(self, split: str, last_step: int) -> Feed:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        padding = Padding(self.recipe.model.task, pad, pad if eos is None else eos)
        handle = self.job.distributors.nearest()

        def ask(first: int, count: int) -> Callable[[], WireCall]:
            answer = handle.steps.remote(split, first, count, self.rank, CALL_BYTES)
            return lambda: ray.get(answer)

        source = Source(ask, lambda: said(handle, _ANSWER_SECONDS), lambda text: self.folder.write_phase(text or self.now))
        return Feed(source, padding, rank=self.rank, last_step=last_step, device=self.device)
