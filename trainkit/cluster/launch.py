"""Plan to TorchTrainer: check that the workers fit the cluster, run them, bring back rank 0's outcome.

`fit` runs in a thread of its own, because in the main thread it installs a SIGINT handler that aborts; the main thread makes what the
workers wait for, watches the run folder and takes the signals. Ray retries nothing, neither workers nor its own start of them: there is one
owner of retries, and it is not Ray.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cluster.building import build_operators
from trainkit.cluster.capacity import Node, worker_nodes, worker_resources
from trainkit.cluster.fit import Fit
from trainkit.cluster.job import Job, hand_over, train_loop
from trainkit.cluster.progress import Display
from trainkit.cluster.session import (
    environment,
    environment_settings,
    living_nodes,
    ray_session,
    undivided,
)
from trainkit.cluster.signals import Signals
from trainkit.errors import CapacityError, UsageError
from trainkit.planning.plan import Plan
from trainkit.planning.speed import joins_shapes
from trainkit.recipe.schema import Recipe
from trainkit.runs import startup
from trainkit.runs.checkpoints import Checkpoint
from trainkit.runs.folder import RunFolder

if TYPE_CHECKING:
    from trainkit.data.batches import Shape
    from trainkit.data.distributor import Distributors
    from trainkit.data.tokens import Prepared

_COLLECTIVE_SECONDS = 1800  # longer than the slowest export or build of an operator: a rank that failed is noticed by Ray, not by this
_STEPS_LOOKED_AT = 32  # for the shapes of their micro-batches; the ranks will ask for them anyway
_NOTICE_SECONDS = 2.0
_REPLACEMENT_SECONDS = 120.0  # for which a restart waits for nodes
_TELL_SECONDS = 2.0  # for all actors together


@dataclass(frozen=True)
class Ready:
    """What the workers begin with: the tokenized rows, and where the first weights lie, drawn or loaded; None with a checkpoint."""

    prepared: Prepared
    first_weights: Path | None


@dataclass(frozen=True)
class Launch:
    """All that an attempt needs."""

    recipe: Recipe
    plan: Plan  # for as many workers as there can be
    plan_on: Callable[[Sequence[Node]], Plan]  # for the nodes that there are; raises CapacityError if they are too few
    data_known: Callable[[Plan, Mapping[Shape, int], int], Plan]  # with how often each shape occurs in so many steps
    folder: RunFolder
    ready: Callable[[Callable[[], None]], Ready]  # makes it, and calls what it is given now and then
    address: str | None  # of an existing cluster; None starts a local Ray
    verbose: bool
    say: Callable[[str], None]  # to the person who waits
    attempt: int = 1  # from 1
    checkpoint: Checkpoint | None = None  # to go on from
    worked: tuple[float | None, float] = (0.0, 0.0)  # seconds of commands before this one, if known; when it began, since 1970


def launch(asked: Launch, display: Display, signals: Signals, stop: Callable[[], None]) -> dict[str, Any]:
    """Run the workers to their end; returns rank 0's outcome. `stop` is called on the first signal while they train.

    Raises CapacityError before anything starts, UsageError if no cluster answers at the address, what `ready` raises, and whatever `fit`
    raises.
    """
    settings = environment_settings(asked.recipe, local=asked.address is None)
    with environment(settings), _quiet(asked), ray_session(asked.address, settings, asked.verbose, signals) as nodes:
        startup.ended(asked.folder, startup.RAY)
        nodes = _enough(nodes, asked)
        asked = replace(asked, plan=asked.plan_on(nodes))
        nodes = worker_nodes(nodes, asked.recipe.scaling, asked.plan.world_size)
        early = asked.folder.job_path if asked.address is None else None
        fit = None if early is None else Fit(_trainer(asked, early))
        asked, job = _job(asked, nodes, display, settings, (lambda: None) if fit is None else fit.check)
        startup.ended(asked.folder, startup.DATA)
        if early is not None:
            hand_over(job, early)
        fit = fit or Fit(_trainer(asked, job))
        with signals.softly(stop), _ranks_told(asked, job.distributors):
            return fit.watched(asked, display)


@contextlib.contextmanager
def _quiet(asked: Launch) -> Iterator[None]:
    """What Ray prints in this process goes to <run>/.ray/output.log; the display writes to the terminal that it was made with."""
    if asked.verbose:
        yield
        return
    with (asked.folder.ray / "output.log").open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def _enough(nodes: list[Node], asked: Launch) -> list[Node]:
    """The cluster's nodes, after a restart waited for: one that died may come back, or be replaced."""
    deadline = time.monotonic() + _REPLACEMENT_SECONDS
    while asked.attempt > 1 and asked.address is not None and time.monotonic() < deadline:
        try:
            asked.plan_on(nodes)
            break
        except CapacityError:
            time.sleep(_NOTICE_SECONDS)
            nodes = living_nodes()
    return nodes


def _first_step(asked: Launch) -> int:
    """Of this attempt, one of the run's."""
    return min(asked.plan.total_steps, 1 + (0 if asked.checkpoint is None else asked.checkpoint.step))


@contextlib.contextmanager
def _ranks_told(asked: Launch, distributors: Distributors) -> Iterator[None]:
    """With --verbose, how far each rank was fed, also in an attempt that failed; an interrupted one ends at once."""
    try:
        yield
    except Exception:
        _tell_ranks(asked, distributors)
        raise
    _tell_ranks(asked, distributors)


def _tell_ranks(asked: Launch, distributors: Distributors) -> None:
    from trainkit.data.handed import Handed, table

    if not asked.verbose:
        return
    with contextlib.suppress(Exception):  # whatever a dying cluster raises: what ended the attempt is told
        ranks = distributors.handed_to("train", _TELL_SECONDS)
        never = {rank: Handed() for rank in range(asked.plan.world_size)}
        asked.say(
            f"handed out ahead of training by the DataDistributor:\n{table(never | ranks)}"
            if ranks
            else "the DataDistributor does not answer"
        )


def _trainer(asked: Launch, job: Job | Path) -> Any:
    """job: or where it will lie."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=_scaling_config(asked),
        run_config=RunConfig(
            name=f"attempt-{asked.attempt}",
            storage_path=str(asked.folder.ray),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="INFO" if asked.verbose else "ERROR"),
        ),
        torch_config=TorchConfig(backend="nccl" if asked.plan.use_gpu else "gloo", timeout_s=_COLLECTIVE_SECONDS),
    )


def _scaling_config(asked: Launch) -> Any:
    """Raises UsageError for what only Ray knows to be wrong."""
    from ray.train import ScalingConfig

    scaling = asked.recipe.scaling
    try:
        return ScalingConfig(
            num_workers=asked.plan.world_size,
            use_gpu=scaling.use_gpu,
            resources_per_worker=worker_resources(scaling),
            placement_strategy=scaling.placement_strategy,
            accelerator_type=scaling.accelerator_type,
            label_selector=scaling.label_selector,
        )
    except ValueError as error:
        raise UsageError(f"scaling: Ray refuses it: {error}") from error


def _job(asked: Launch, nodes: Sequence[Node], display: Display, settings: dict[str, str], check: Callable[[], None]) -> tuple[Launch, Job]:
    """Makes all that the workers begin with; returns it, and the launch with the plan that the data's micro-batches led to.

    check: called now and then, raises what makes going on useless.
    """
    from trainkit.data.budget import split_for_padding
    from trainkit.data.distributor import make_distributors

    with undivided(settings):
        ready = asked.ready(check)
    startup.ended(asked.folder, startup.ROWS)
    build_operators(nodes, asked, display, check)
    check()
    if len(nodes) == 1 or asked.plan.zero_stage < 2:  # else each micro-batch has to be sent between nodes
        asked = replace(asked, plan=split_for_padding(asked.plan, asked.recipe.model.task, ready.prepared.train))
    distributors = make_distributors(_feedings(asked, ready.prepared), [node.id for node in nodes])
    shapes = distributors.shapes("train", _first_step(asked), _STEPS_LOOKED_AT)
    asked = replace(asked, plan=asked.data_known(asked.plan, shapes, _STEPS_LOOKED_AT))
    eval_rows = asked.plan.eval_rows or 0
    return asked, Job(
        recipe=asked.recipe,
        plan=asked.plan,
        run_folder=str(asked.folder.path),
        prepared=ready.prepared,
        first_weights=None if ready.first_weights is None else str(ready.first_weights),
        distributors=distributors,
        eval_steps=-(-eval_rows // asked.plan.samples_per_step) if ready.prepared.eval is not None else 0,
        attempt=asked.attempt,
        checkpoint=asked.checkpoint,
        worked_seconds=asked.worked[0],
        began=asked.worked[1],
    )


def _feedings(asked: Launch, prepared: Prepared) -> dict[str, Any]:
    from trainkit.data.batches import Budget
    from trainkit.data.distributor import Feeding
    from trainkit.data.encoding import limits

    plan = asked.plan
    budget = Budget(tokens=plan.tokens_per_device) if plan.samples_per_device is None else Budget(rows=plan.samples_per_device)
    splits = {"train": (prepared.train, True, joins_shapes(asked.recipe)), "eval": (prepared.eval, False, False)}
    task, seed, data = asked.recipe.model.task, asked.recipe.train.seed, asked.recipe.data
    longest = limits(asked.recipe)["max_length"] if data.packing else None
    return {
        split: Feeding(str(folder), task, seed, plan.samples_per_step, plan.world_size, budget, shuffle, joined, longest)
        for split, (folder, shuffle, joined) in splits.items()
        if folder is not None
    }
