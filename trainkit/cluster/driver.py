"""A run from the recipe's file to the last screen, in the order in which things happen.

Everything that can be wrong with the recipe, the model's config, the data or the machine is said before the run folder is made; from then
on the folder gets a summary, whatever happens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainkit.cluster import hardware, screen
from trainkit.cluster.capacity import Node, workers_on
from trainkit.cluster.decision import Decision
from trainkit.cluster.faults import Allowed, Failure
from trainkit.cluster.faults import decide as decide_what_to_do
from trainkit.cluster.launch import Launch, launch
from trainkit.cluster.opening import opened
from trainkit.cluster.preparing import Preparation
from trainkit.cluster.progress import display
from trainkit.cluster.resume import untraced
from trainkit.cluster.session import cluster_address
from trainkit.cluster.signals import Signals
from trainkit.cluster.summary import summarize
from trainkit.errors import Interrupted, TrainingError, TrainkitError, UsageError
from trainkit.planning.plan import Plan
from trainkit.planning.revision import halved, split_budget, with_micro_batches, without_graphs
from trainkit.planning.show import batch_equation, plan_text
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import content_of
from trainkit.runs import checkpoints, copying, startup
from trainkit.runs.checkpoints import Checkpoint
from trainkit.runs.folder import LEASE_SECONDS, PREDECESSOR_SECONDS, RunFolder
from trainkit.runs.steps import keep_steps
from trainkit.runs.worked import WorkedTime
from trainkit.units import format_bytes

if TYPE_CHECKING:
    from trainkit.data.batches import Shape


@dataclass(frozen=True)
class Options:
    """Of the command `run`."""

    recipe: Path
    overrides: Sequence[str] = ()
    name: str | None = None
    address: str | None = None
    verbose: bool = False
    resume: bool = False


def run(options: Options, console: Console) -> dict[str, Any]:
    """Plan, train, export. Returns the summary of a completed run.

    Raises RecipeError, DataError, UsageError or CapacityError before anything starts, TrainingError or Interrupted from a run that did
    not end well, DataError from rows that cannot be tokenized; its summary.json is written all the same.
    """
    began = time.monotonic()
    with Signals() as signals:
        try:
            address = cluster_address(options.address)
            path = options.recipe / "recipe.yaml" if options.resume and options.recipe.is_dir() else options.recipe
            wish = read_recipe(path, options.overrides)
            opening = opened(wish, path, options.name, options.resume, address, lambda plan: console.print(plan_text(plan)))
            folder = opening.folder()
        except KeyboardInterrupt:
            raise Interrupted("interrupted before anything was started") from None
        resumed = opening.before is not None
        with folder.lock("driver", wait_seconds=PREDECESSOR_SECONDS if resumed else 0.0):
            worked, decision = WorkedTime(folder, time.time() - (time.monotonic() - began)), opening.decision
            asked = _Run(address, options.verbose, wish, opening.recipe, decision, decision.plan, folder, console, signals, worked, resumed)
            return _recorded(asked, began)


@dataclass
class _Run:
    address: str | None  # of a cluster to join
    verbose: bool
    wish: Recipe
    recipe: Recipe  # with what a resumed run keeps
    decision: Decision
    plan: Plan  # of the attempt: an elastic run may have fewer workers than was decided, and smaller micro-batches after want of memory
    folder: RunFolder
    console: Console
    signals: Signals
    worked: WorkedTime
    resumed: bool
    failures: list[Failure] = field(default_factory=list)  # of attempts of this command
    restarts: int = 0
    done: int = 0  # steps that this attempt began with
    most: int | None = None  # of a micro-batch's budget, after want of memory
    told: set[str] = field(default_factory=set)  # notes of the plans before
    ungraphed: bool = False  # CUDA graphs, or the memory they take, have failed
    most_workers: int | None = None  # of the next attempt
    oom_kills: int = field(default_factory=hardware.oom_kills)  # before this attempt
    without_data: Plan = field(init=False)  # `plan` before the shapes of micro-batches were known
    preparation: Preparation = field(init=False)

    def __post_init__(self) -> None:
        self.without_data = self.plan
        say = functools.partial(self._say, style="yellow")
        self.preparation = Preparation(self.recipe, self.folder, self.address, self.verbose, self.console, self.signals, say)

    def train(self) -> dict[str, Any]:
        """From the made folder to rank 0's outcome."""
        checkpoint = self._checkpoint() if self.resumed else None
        resolved = self.wish.model_copy(update={"zero": content_of(self.wish.zero)})
        self.folder.write_recipe(recipe_to_yaml(resolved))
        self.folder.write_plan(self.plan.to_json())
        self.folder.write_environment(hardware.environment())
        self._say(f"run folder {self.folder.path}", "dim")
        try:
            while True:
                try:
                    return self._attempt(checkpoint)
                except Exception as failure:
                    self._restart_or_raise(failure, checkpoint)
                checkpoint = self._checkpoint()
        finally:
            self.preparation.forget_weights()

    def _attempt(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        done = self.done = 0 if checkpoint is None else checkpoint.step
        startup.begin(self.folder, time.time() if self.failures else self.worked.began)
        startup.ended(self.folder, startup.PLAN)
        if self.resumed or checkpoint is not None or self.address is not None:  # before steps are dropped, or a cluster's processors taken
            self.preparation.check_rows(checkpoint)
            startup.ended(self.folder, startup.ROWS)
        attempt, self.oom_kills = self.folder.begin_attempt(done < self.plan.total_steps), hardware.oom_kills()
        for told in keep_steps(self.folder, done):
            self._say(told, "yellow")
        if done or attempt > 1 or self.failures:
            self._say(f"going on from step {done}" if done else "no checkpoint yet: beginning again", "dim")
        if (note := untraced(self.recipe.train.profile, done)) is not None:
            self._say(note, "yellow")
        asked = Launch(
            recipe=self.recipe,
            plan=self.plan,
            plan_on=self._plan_on,
            data_known=self._data_known,
            folder=self.folder,
            ready=lambda check: self.preparation.ready(check, checkpoint),
            address=self.address,
            verbose=self.verbose,
            say=self.preparation.say,
            attempt=attempt,
            checkpoint=checkpoint,
            worked=(self.worked.before, self.worked.began),
        )
        return launch(asked, display(self.console, self.verbose), self.signals, self._stopping)

    def _restart_or_raise(self, failure: Exception, checkpoint: Checkpoint | None) -> None:
        error = _cause(failure, self)
        if self.preparation.rows is None and not error.facts.get("from_outside"):  # what cannot be made ready is not the workers' fault
            raise failure
        steps = self.folder.read_steps()
        began_at, ended_at = 0 if checkpoint is None else checkpoint.step, steps[-1]["step"] if steps else 0
        unasked = self.recipe.model.cuda_graphs is None
        graphs, flat = self.plan.cuda_graphs and unasked, self.plan.flat and unasked
        self.failures.append(Failure.of(error, began_at, ended_at, graphs, flat))
        self.folder.append_failure(asdict(self.failures[-1]))
        verdict = decide_what_to_do(self.failures, self._allowed(error))
        if self.signals.taken or not verdict.again:
            raise error from failure
        self.restarts += 1
        self.most = halved(self.plan) if verdict.halve else self.most or split_budget(self.plan)
        self.ungraphed |= verdict.ungraph
        self.most_workers = self.plan.world_size - 1 if verdict.shrink else None
        self._say(f"{error.message}\n{verdict.why}", "yellow")

    def _allowed(self, error: TrainkitError) -> Allowed:
        workers = self.recipe.scaling.num_workers
        return Allowed(
            self.recipe.run.max_failures,
            halve=self.recipe.train.halve_on_oom and bool(error.facts.get("in_micro_batches")) and halved(self.plan) is not None,
            shrink=isinstance(workers, list) and self.plan.world_size > workers[0],
        )

    def _plan_on(self, nodes: Sequence[Node]) -> Plan:
        """For as many workers as these nodes have room for, and the budget that is left."""
        decided = self.decision.plan.world_size
        plan = self.decision.with_workers(workers_on(nodes, self.recipe.scaling, self.most_workers or decided), self.most).plan
        plan = without_graphs(plan, "they, or their memory, may be what failed before") if self.ungraphed else plan
        if plan != self.without_data:
            self.folder.write_plan(plan.to_json())
        if batch_equation(plan) != batch_equation(self.without_data):
            self._say(f"{plan.world_size} of {decided} workers; {batch_equation(plan)}", "yellow")
        self.plan = self.without_data = plan
        return plan

    def _data_known(self, plan: Plan, shapes: Mapping[Shape, int], steps: int) -> Plan:
        """Once the data's first micro-batches are known, the plan says what they will take on the device, and what makes them fast."""
        known = with_micro_batches(plan, self.recipe, shapes.items(), steps, plan.total_steps - self.done)
        if known != self.plan:
            self.folder.write_plan(known.to_json())
        if known.expected_peak_bytes is not None and not self.restarts:
            self._say(
                f"expected at the peak: {format_bytes(known.expected_peak_bytes)} per device; the largest micro-batch of the first steps "
                f"has {max(shape.cost for shape in shapes):,} padded tokens", "dim",
            )  # fmt: skip
        for note in known.notes[len(self.without_data.notes) :]:
            if note not in self.told:
                self._say(note, "dim")
        self.told |= set(known.notes)
        self.plan = known
        return known

    def _checkpoint(self) -> Checkpoint | None:
        """The newest one that holds, once nobody writes there any more."""
        self._wait_for_rank_0()
        checkpoints.clear_incomplete(self.folder.path)
        broken: list[str] = []
        sound = checkpoints.newest_sound(self.folder.path, broken.append)
        for text in broken:
            self._say(text, "yellow")
        url = self.recipe.run.copy_checkpoints_to
        if url is not None and (broken or not self.failures):  # after a failure of this command its own are as new, if they hold
            sound = copying.newest(url, self.folder.path, sound, lambda text: self._say(text, "yellow"))
        if sound is None and checkpoints.complete(self.folder.path):
            raise UsageError(
                f"{self.folder.path / 'checkpoints'}: none of the checkpoints can be used. Put one back as it was, or begin a new run"
            )
        for path in checkpoints.set_aside(self.folder.path, after=sound.step) if sound is not None else ():
            self._say(f"it is kept as {path}", "yellow")
        return sound

    def _wait_for_rank_0(self) -> None:
        """Of an attempt before. The locks of a node that died are held by the file server until it gives them up."""
        gone = bool(self.failures) and self.address is not None
        try:
            self.folder.lock("rank-0", wait_seconds=LEASE_SECONDS if gone else PREDECESSOR_SECONDS).release()
        except UsageError as error:
            if not self.failures:
                raise
            raise TrainingError(f"{error.message}. The workers could not be started again: --resume later") from None

    def _say(self, text: str, style: str) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _stopping(self) -> None:
        steps = self.folder.read_steps()
        if not steps or steps[-1]["step"] <= self.done:  # nothing has been trained that an end after this step would keep
            raise KeyboardInterrupt
        self.folder.request_stop()
        self.console.print("Stopping at the end of this step. Once more stops at once.", style="yellow")


def _recorded(run: _Run, began: float) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    error: TrainkitError | None = None
    try:
        outcome = run.train()
        if outcome["status"] == "interrupted":
            error = Interrupted(f"interrupted after step {outcome['steps']} of {run.plan.total_steps}; {_way_on(run)}")
    except KeyboardInterrupt:
        error = Interrupted(f"interrupted at once; {_way_on(run)}")
    except Exception as failure:
        error = _unless_interrupted(_cause(failure, run), run)
    with run.signals.ignored():
        steps = run.folder.read_steps()
        summary = summarize(
            run.plan, steps, outcome, error, time.monotonic() - began, worked_seconds=run.worked.seconds(),
            startup_seconds=startup.startup_seconds(run.folder), ranks=run.folder.read_ranks(), failures=run.folder.failures(),
            restarts=run.restarts, evaluation=run.folder.read_evaluation(steps[-1]["step"] if steps else 0),
        )  # fmt: skip
        try:
            run.folder.write_summary(summary)
            run.worked.close()
        except TrainkitError as unwritten:  # the disk is full: what filled it is told first
            error = error or unwritten
    lacks = (summary.get("copy") or {}).get("error")
    if lacks:
        run.console.print(lacks, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if error is not None:
        if error.exit_code != Interrupted.exit_code and checkpoints.complete(run.folder.path):
            run.console.print(_way_on(run), style="yellow", highlight=False, markup=False, soft_wrap=True)
        raise error
    screen.show_result(run.console, run.folder, run.recipe, summary)
    return summary


def _cause(failure: Exception, run: _Run) -> TrainkitError:
    if isinstance(failure, TrainkitError):
        return failure
    from trainkit.cluster.causes import first_cause

    return first_cause(failure, run.folder, run.plan.world_size, hardware.oom_kills() - run.oom_kills)


def _unless_interrupted(error: TrainkitError, run: _Run) -> TrainkitError:
    """Batch systems send a signal to the whole process group: what it ended elsewhere was interrupted as well, not failed."""
    if run.signals.taken and error.facts.get("from_outside"):
        return Interrupted(f"interrupted at once: {error.message}; {_way_on(run)}")
    return error


def _way_on(run: _Run) -> str:
    found = checkpoints.complete(run.folder.path)
    kept = (
        f"the checkpoint of step {found[0].step} is kept: --resume --name {run.folder.name} goes on"
        if found
        else "there is no checkpoint yet"
    )
    return f"{kept}. The record is {run.folder.path}"
