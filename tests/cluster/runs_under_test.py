"""The command as the tests start, watch and disturb it, and what must not depend on that. `scripts/chaos` uses the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from trainkit.runs import checkpoints
from trainkit.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def planted_path() -> str:
    """PYTHONPATH with the faults and the shorter waiting of planted/sitecustomize.py."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent / "planted"), os.environ.get("PYTHONPATH")]))


@contextmanager
def started(
    runs: Path, options: Sequence[str], output: int | IO[str] = subprocess.PIPE, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a terminal starts it; whatever is left of it is ended.

    output: where stdout and stderr go, two pipes by default.
    """
    command = [sys.executable, "-m", "trainkit.run", str(ROOT / "recipes/quickstart.yaml"), "--runs", str(runs), "--name", "it", *options]
    process = subprocess.Popen(
        command, stdout=output, stderr=output, text=True, start_new_session=True, env=environment() | variables, cwd=ROOT
    )
    try:
        yield process
    finally:
        for left in family(process):
            left.kill()
        process.kill()
        process.communicate()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: Sequence[psutil.Process]) -> list[str]:
    """Names of those that still run a second later."""
    _, left = psutil.wait_procs(list(processes), timeout=1)
    return [process.name() for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The worker processes in the order of their start, which is that of their ranks."""
    return sorted(_titled(processes, "RayTrainWorker"), key=lambda process: process.create_time())


def actors_in(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return _titled(processes, "DataDistributor")


def _titled(processes: Sequence[psutil.Process], title: str) -> list[psutil.Process]:
    return [process for process in processes if any(title in word for word in _words(process))]


def _words(process: psutil.Process) -> list[str]:
    """Of its command line; none when it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def waited_for(look: Callable[[], T], seconds: float = 60, every: float = 0.02) -> T:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(every)
    return found


def wait_for_steps(folder: RunFolder, process: subprocess.Popen[str], count: int = 2) -> None:
    deadline = time.monotonic() + 200
    while len(folder.read_steps()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.1)


def is_saving(folder: RunFolder) -> bool:
    """Whether a checkpoint is half written. What is half removed is older than a complete one."""
    root = folder.path / "checkpoints"
    newest = max((path for path in root.iterdir() if checkpoints.step_of(path.name)), default=None) if root.exists() else None
    return newest is not None and not (newest / checkpoints.MANIFEST).exists()


def summary(folder: RunFolder) -> dict[str, Any]:
    found = folder.read_summary()
    assert found is not None
    return found


def trained(folder: RunFolder) -> list[dict[str, Any]]:
    """What must not depend on what happened meanwhile."""
    return [{key: step[key] for key in ("step", "loss", "grad_norm", "lr", "samples", "order")} for step in folder.read_steps()]


def points(folder: RunFolder) -> list[int]:
    """Steps of the loss curve as TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    events = EventAccumulator(str(folder.path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
