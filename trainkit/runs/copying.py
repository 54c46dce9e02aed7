"""When checkpoints are copied and fetched (copies.py does it), and what is said of it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainkit.errors import TrainkitError, UsageError
from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import Checkpoint, checkpoint_path
from trainkit.runs.copies import OF_THE_RUN, RunCopy
from trainkit.runs.folder import RunFolder, check_storage


def runs_at(url: str) -> set[str]:
    """Names that the runs copied there have. Raises UsageError when it cannot be read."""
    with _in_words(url):
        return RunCopy(url, "").names()


def make_again(url: str, run: Path) -> bool:
    """Make a lost run folder, without its checkpoints; False if it has no copy. Raises UsageError when the copy cannot be read."""
    with _in_words(url):
        copy = RunCopy(url, run.name)
        if not copy.steps():
            return False
        check_storage(run.parent, run.name)
        copy.fetch_rest(run, *OF_THE_RUN)
    return True


def newest(url: str, run: Path, sound: Checkpoint | None, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of the copy that holds, fetched, where it is newer than `sound`; else `sound`.

    Raises UsageError when the copy is another run's, or when it cannot be used and there is nothing else.
    """
    try:
        with _in_words(url):
            return _newest(RunCopy(url, run.name), run, sound, tell)
    except _Unreachable as error:
        if sound is None:
            raise
        tell(f"{error.message}. Going on with what lies in the run folder")
        return sound


def _newest(copy: RunCopy, run: Path, sound: Checkpoint | None, tell: Callable[[str], None]) -> Checkpoint | None:
    steps = copy.steps()
    if steps and not copy.is_of(run):
        raise UsageError(f"run.copy_checkpoints_to: {copy.url} is the copy of another run of this name: write another URL")
    newer = [step for step in steps if sound is None or step > sound.step]
    if newer:
        copy.fetch_rest(run, "steps.jsonl")  # first: a checkpoint must not outlive its steps
    for step in newer:
        try:
            fetched = copy.fetch(run, step)
        except UsageError as error:
            tell(error.message)
            continue
        tell(f"the checkpoint of step {step} comes from {copy.url}")
        return fetched
    if newer and sound is None:
        raise UsageError(f"{copy.url}: none of the copied checkpoints can be used. Put one back as it was, or begin a new run")
    return sound


class NoCopier:
    """Of ranks other than 0, and of a run whose checkpoints stay where they are."""

    def offer(self, step: int) -> None: ...

    def ended(self, seconds: float) -> bool:
        return True

    def outcome(self) -> dict[str, Any] | None:
        return None

    def close(self) -> None: ...


class Copier(NoCopier):
    """Copies the newest complete checkpoint in a thread of its own: a slow copy delays no save, and is followed by the newest one then.

    What fails does not end training: it is told once, and the next checkpoint is the next try.
    """

    def __init__(self, folder: RunFolder, url: str):
        self.folder, self.url = folder, url
        self.copy: RunCopy | None = None
        self.newest: int | None = None  # that is complete
        self.copied: int | None = None
        self.error, self.told, self.ending = "", False, False
        self.wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._work, name="copier", daemon=True)
        self.thread.start()

    def offer(self, step: int) -> None:
        """This checkpoint is complete now."""
        self.newest = step
        self.wakes.put(True)

    def ended(self, seconds: float) -> bool:
        """Whether the last copy is done, or has failed, within so many seconds. Nothing is offered any more."""
        if not self.ending:
            self.ending = True
            self.wakes.put(True)  # once more what failed
            self.wakes.put(False)
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def outcome(self) -> dict[str, Any]:
        """The newest step that is copied, and what is wrong if it is not the last one."""
        lacks = f"{self.url}/{self.folder.name}: the copy lacks the checkpoint of step {self.newest}: {self.error or 'it was removed'}"
        return {"step": self.copied, "error": None if self.copied == self.newest else lacks}

    def close(self) -> None:
        """What is being copied is given up at its next file: the process may end at once, or linger while another one goes on."""
        self.closed.set()
        self.wakes.put(False)

    def _work(self) -> None:
        while self.wakes.get() and not self.closed.is_set():
            if self.newest is not None and self.newest != self.copied:
                self._copy(self.newest)

    def _copy(self, step: int) -> None:
        run = self.folder.path
        try:
            self.copy = self.copy or RunCopy(self.url, self.folder.name)
            if self.copy.upload(run, Checkpoint(checkpoint_path(run, step)), self.closed.is_set):
                self.copied = step  # the run folder may have removed it since
                self.copy.prune(run, {step} | {it.step for it in checkpoints.complete(run) if it.step < step})
        except Exception as error:  # each file system fails in its own way
            self.error = _said(error)
            if not self.told:
                self.told = True
                note = f"run.copy_checkpoints_to: step {step} is not copied: {self.error}. Training goes on, and the next one is tried"
                with contextlib.suppress(OSError):
                    self.folder.write_note(note)


class _Unreachable(UsageError):
    """The copy may be there, but cannot be read now."""


@contextlib.contextmanager
def _in_words(url: str) -> Iterator[None]:
    try:
        yield
    except TrainkitError:
        raise
    except Exception as error:  # each file system fails in its own way
        raise _Unreachable(f"run.copy_checkpoints_to: {url} cannot be read: {_said(error)}") from error


def _said(error: Exception) -> str:
    return error.message if isinstance(error, TrainkitError) else f"{type(error).__name__}: {error}"
