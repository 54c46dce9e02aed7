"""The command `run` as a child process of a notebook: started beside it, interrupted like Ctrl-C, ended when the notebook's kernel ends.

It has a session of its own, so the notebook's stop button does not reach it. A kernel that ends tells it to end, with a checkpoint.
One that is killed can tell nothing: then the run goes on, open_run shows it, and SIGINT to the process whose command line has its
--name ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit import errors
from trainkit.errors import CapacityError, TrainingError, TrainkitError, UsageError
from trainkit.runs.files import Lock, is_locked
from trainkit.runs.folder import RunFolder

_TERMINAL_ONLY = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")  # a Jupyter kernel sets them; the output goes to a file
_BY_EXIT_CODE: dict[int, type[TrainkitError]] = {2: UsageError, 3: CapacityError, 4: TrainingError}
_LOOK_SECONDS = 0.1
_INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)  # the last two before it had begun to take signals


class Child:
    """A started command that works on `folder`; its output goes to <run>/.ray/command.log, after what earlier ones left there."""

    def __init__(self, folder: RunFolder, recipe: Path, address: str | None, starting: Lock):
        """starting: the folder's lock of that name, held here until the command, which first has to load, holds the driver's."""
        self.log = folder.ray / "command.log"
        self.interrupted = False
        command = [sys.executable, "-m", "trainkit.run", str(recipe), "--resume"]
        command += ["--name", folder.name, "--runs", str(folder.path.parent)]
        command += [] if address is None else ["--address", address]
        variables = {name: value for name, value in os.environ.items() if name not in _TERMINAL_ONLY}
        with self.log.open("a", encoding="utf-8") as log:
            self._log_begins = log.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=variables
            )
        atexit.register(self._end_with_kernel)
        threading.Thread(target=self._hand_over, args=(starting, folder.ray / "lock-driver"), name="hand-over", daemon=True).start()

    @property
    def status(self) -> str:
        """running | completed | failed | interrupted"""
        code = self.process.poll()
        if code is None:
            return "running"
        return "completed" if code == 0 else "interrupted" if code in _INTERRUPTED else "failed"

    def wait(self, seconds: float | None = None) -> None:
        """Until it ends, or for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def interrupt(self) -> None:
        """As Ctrl-C: after this step with a checkpoint; once more: at once.

        The command takes SIGTERM for the same, and it arrives where a second SIGINT would be one with the first, not yet taken.
        """
        self.process.send_signal(signal.SIGTERM if self.interrupted else signal.SIGINT)
        self.interrupted = True

    def error(self, summary: Mapping[str, Any] | None) -> TrainkitError | None:
        """Why it failed, in the words that it ended with, as the class of summary.json or of the exit code; None if it did not fail."""
        code = self.process.poll()
        if self.status != "failed" or code is None:
            return None
        _, told, said = self.output().rpartition("\nerror: ")
        if not told:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return TrainingError(f"the command ended with {how} and told no error; its output: {self.log}")
        recorded = (summary or {}).get("error")
        if recorded and recorded["message"] in said:
            kind = getattr(errors, recorded["kind"], TrainingError)
            return kind(recorded["message"], rank=recorded.get("rank"), step=recorded.get("step"))
        return _BY_EXIT_CODE.get(code, TrainingError)(said.strip())

    def output(self) -> str:
        """What it has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._log_begins)
            return "\n" + file.read().decode("utf-8", "replace")

    def _end_with_kernel(self) -> None:
        if self.status == "running" and not self.interrupted:
            self.interrupt()

    def _hand_over(self, starting: Lock, driver: Path) -> None:
        while self.process.poll() is None and not is_locked(driver):
            time.sleep(_LOOK_SECONDS)
        starting.release()
