"""Which rank hangs, and where: every rank leaves a sign of life in the run folder, and the driver compares them.

When one rank hangs, all others soon wait for it in a collective, and look just as still. The one to name is the one that has begun the
fewest pieces of work: all ranks of a training do the same pieces in the same order.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from trainkit.errors import TrainingError
from trainkit.runs.files import write_whole
from trainkit.runs.folder import RunFolder
from trainkit.units import format_seconds

BEAT_SECONDS = 2.0
NOTICE_SECONDS = 45.0  # stillness that is said
HANG_SECONDS = 100.0  # stillness that ends the attempt
FIRST_STEP_SECONDS = 600.0  # the same in the first step of an attempt, which warms up
PATIENCE = 10  # times the longest piece of a step: a run of slow steps gets longer
_DRIVER_WAS_AWAY_SECONDS = 10.0  # between two looks: the machine slept, and the ranks' stillness says nothing
_LIBRARY = Path(threading.__file__).parent  # a line there tells little: Condition.wait and the like
_WAITING_IN = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Sign:
    """Where a rank stands."""

    rank: int
    beat: int  # grows as long as the process runs at all
    step: int  # the optimizer step of the piece of work; the last finished one outside of steps
    pieces: int  # begun since the start of the attempt
    piece: str  # of work: "forward and backward of micro-batch 3", "evaluating"
    in_step: bool  # a computation of an optimizer step: those take about equally long, step after step; others take what they take
    longest: float  # seconds that pieces of this kind, or any after the first step, have taken; 0: nothing is known yet
    line: str  # of Python that the main thread is in
    waits: bool  # in a collective


class Place(NamedTuple):
    """Where a rank's main thread is, in the words of Sign."""

    step: int = 0
    pieces: int = 0
    piece: str = "starting"
    in_step: bool = False
    longest: float = 0.0


class Heart:
    """One rank's signs of life, written by a thread every BEAT_SECONDS between `start` and `stop`."""

    def __init__(self, folder: RunFolder, rank: int):
        self.path, self.rank = folder.sign_path(rank), rank
        self.place = Place()
        self.since, self.first_step = time.monotonic(), -1
        self.longest = 0.0  # seconds of a piece of a step after the first
        self.of_kind: dict[str, float] = {}  # the same of each kind of piece, in all steps
        self.stopped, self.main = threading.Event(), threading.get_ident()
        self.thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def begins(self, step: int, piece: str, in_step: bool = True) -> None:
        """Called by the main thread at the beginning of every piece of work."""
        now, ended = time.monotonic(), self.place
        if ended.in_step:
            seconds, kind = now - self.since, _kind(ended.piece)
            self.of_kind[kind] = max(self.of_kind.get(kind, 0.0), seconds)
            self.longest = max(self.longest, seconds if ended.step > self.first_step else 0.0)
        if in_step and self.first_step < 0:
            self.first_step = step
        first = step <= self.first_step  # in which one shape may be compiled in no time, and the next one in minutes
        longest = 0.0 if first else max(self.longest, self.of_kind.get(_kind(piece), 0.0))
        self.since = now
        self.place = Place(step, ended.pieces + 1, piece, in_step, longest)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()

    def _beat(self) -> None:
        beat = 0
        while True:
            beat += 1
            sign = Sign(self.rank, beat, *self.place, *standing(self.main))
            with contextlib.suppress(OSError):  # a disk that is full for a while is the checkpoints' business
                write_whole(self.path, json.dumps(asdict(sign)), durable=False)
            if self.stopped.wait(BEAT_SECONDS):
                return


def signs(folder: RunFolder, world_size: int) -> list[Sign]:
    """Of the ranks that have left one."""
    found = []
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Sign(**json.loads(folder.sign_path(rank).read_text("utf-8"))))
    return found


@dataclass(frozen=True)
class Stillness:
    """A rank that the others wait for, and for how long."""

    sign: Sign
    seconds: float
    silent: bool  # the process itself gives no sign: stopped, or its node is gone
    hangs: bool  # longer than anything that was none

    def text(self) -> str:
        where = "gives no sign of life" if self.silent else f"stands at {self.sign.line}"
        return f"step {self.sign.step}: rank {self.sign.rank} {where}, in {self.sign.piece}"

    def error(self) -> TrainingError:
        return TrainingError(
            f"{self.text()}, for {format_seconds(int(self.seconds))}; the other ranks wait for it",
            rank=self.sign.rank, step=self.sign.step, from_outside=self.silent,
        )  # fmt: skip


class Stillnesses:
    """What the driver makes of the signs, by its own clock."""

    def __init__(self, world_size: int, read: Callable[[], Iterable[Sign]], clock: Callable[[], float] = time.monotonic):
        self.world_size, self.read, self.clock = world_size, read, clock
        self.last: dict[int, Sign] = {}
        self.moved: dict[int, float] = {}  # rank to when it was seen to begin a piece of work
        self.alive: dict[int, float] = {}  # rank to when it was seen to beat
        self.looked = clock()
        self.found: Stillness | None = None

    def look(self) -> Stillness | None:
        """None while some rank moves, or has not yet left a sign. May be called as often as one likes."""
        now = self.clock()
        away = now - self.looked
        if away < BEAT_SECONDS and self.last:
            return self.found
        if away > _DRIVER_WAS_AWAY_SECONDS:
            for times in (self.moved, self.alive):
                times.update({rank: since + away for rank, since in times.items()})
        self.looked = now
        for sign in self.read():
            self._take(sign, now)
        self.found = self._judged(now) if len(self.last) == self.world_size else None
        return self.found

    def _take(self, sign: Sign, now: float) -> None:
        before = self.last.get(sign.rank)
        if before is None or sign.beat != before.beat:
            self.alive[sign.rank] = now
        if before is None or sign.pieces != before.pieces:
            self.moved[sign.rank] = now
        self.last[sign.rank] = sign

    def _judged(self, now: float) -> Stillness | None:
        seconds = now - max(self.moved.values())
        if seconds <= NOTICE_SECONDS:
            return None
        silent = [rank for rank in self.last if now - self.alive[rank] > NOTICE_SECONDS]
        behind = min(self.last.values(), key=lambda sign: (sign.rank not in silent, sign.pieces, sign.waits, sign.rank))
        if silent:
            seconds = now - self.alive[behind.rank]
            every = len(silent) == self.world_size  # for all that is known the folder stands still, to which all write
            return Stillness(behind, seconds, silent=True, hangs=seconds > HANG_SECONDS and not every)
        limit = max(HANG_SECONDS, PATIENCE * behind.longest) if behind.longest else FIRST_STEP_SECONDS
        return Stillness(behind, seconds, silent=False, hangs=seconds > limit and behind.in_step)


def standing(thread: int) -> tuple[str, bool]:
    """(the innermost line of a thread outside of Python's own library as "file:line in function", whether it waits in a collective)."""
    try:
        lines = _stack(thread)
    except OSError:  # no room for a temporary file
        lines = []
    if not lines:
        return "an unknown line", False
    file, number, function = next((line for line in lines if Path(line[0]).parent != _LIBRARY), lines[0])
    waits = any(part in file for file, _, _ in lines for part in _WAITING_IN)
    return f"{'/'.join(Path(file).parts[-2:])}:{number} in {function}", waits


def _stack(thread: int) -> list[tuple[str, str, str]]:
    """(file, line, function), innermost first; nothing of a thread after which 100 others were started.

    By faulthandler, which reads the stack while no other thread runs. Frames that Python hands out (sys._current_frames) are held while
    their thread goes on, which those of torch's compiler do not survive: the process dies of it.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file.fileno(), all_threads=True)
        file.seek(0)
        threads = file.read().decode().split("\n\n")
    heads = {int(head[1], 16): text for text in threads if (head := re.match(r"(?:Current t|T)hread 0x([0-9a-f]+)", text))}
    return re.findall(r'^  File "(.*)", line (\S+) in (.*)$', heads.get(thread, ""), flags=re.M)


def _kind(piece: str) -> str:
    return re.sub(r"\d+", "", piece)
