"""What the driver hands to the workers, and how it reaches them.

On one machine the workers' processes are started while the driver still tokenizes: they take most of the time to the first step, to import
what they need and to find each other. They wait for the job then, as a file in the run folder. A cluster's workers get it when they start:
its machines are not taken before there is something to do.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.planning.plan import Plan
from trainkit.recipe.schema import Recipe
from trainkit.runs.checkpoints import Checkpoint

if TYPE_CHECKING:
    from trainkit.data.distributor import Distributors
    from trainkit.data.tokens import Prepared

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """All that a worker needs; it travels by pickle."""

    recipe: Recipe
    plan: Plan
    run_folder: str
    prepared: Prepared
    first_weights: str | None
    distributors: Distributors
    eval_steps: int  # optimizer-step-sized pieces of the evaluation set; 0 without one
    attempt: int = 1  # from 1: how often the group was started
    checkpoint: Checkpoint | None = None  # to go on from
    worked_seconds: float | None = 0.0  # of commands before this one; None: not known
    began: float = field(default_factory=time.time)  # when this one began, in seconds since 1970


def train_loop(config: dict[str, Any]) -> Any:
    """Runs on every worker. config["job"]: a Job, or the path where it will lie."""
    from trainkit.cluster.worker import run_worker  # takes seconds, in which the driver makes the job

    job = config["job"]
    return run_worker(job if isinstance(job, Job) else _awaited(job))


def hand_over(job: Job, path: Path) -> None:
    """To workers of this machine."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(job))
    part.replace(path)


def _awaited(path: Path) -> Job:
    while not path.exists():
        time.sleep(_LOOK_SECONDS)
    job: Job = pickle.loads(path.read_bytes())
    return job


class ByValue:
    """What Ray Train takes for a reference to its training function: the function itself, which is small."""

    def __init__(self, value: Callable[[], Any]):
        self.value = value

    def get(self) -> Callable[[], Any]:
        return self.value


@contextlib.contextmanager
def functions_by_value() -> Iterator[None]:
    """Meanwhile `TorchTrainer.fit` puts no training function into the object store, of which this process would be the owner.

    Ray ends an owner (`_exit(1)`) within 0.1 s of hearing that the node is gone, when it tries to restore the object in a store that is
    gone as well; nobody could record or restart the run.
    """
    from ray.train.v2.api import data_parallel_trainer

    before = data_parallel_trainer.ObjectRefWrapper
    data_parallel_trainer.ObjectRefWrapper = ByValue
    try:
        yield
    finally:
        data_parallel_trainer.ObjectRefWrapper = before
