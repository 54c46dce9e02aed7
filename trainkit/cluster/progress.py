"""What the person who waits sees: one live line in a terminal, plain lines in a pipe or a log file.

The driver reads it from the run folder (steps.jsonl, the phase), so the display costs training nothing and works for any cluster that
shares the folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from trainkit.markup import plain
from trainkit.runs.folder import RunFolder, StepTail
from trainkit.units import format_count, format_seconds, gib

TRAINING = "training"
_SMOOTHING = 0.1  # weight of the newest step in tokens/s and ETA
_PLAIN_SECONDS = 10.0
_MOST_WIDTH = 160  # of a table in a log


@dataclass(frozen=True)
class View:
    """One moment of a run, or of the work before it."""

    what: str  # "tokenizing", "building the engine", "training", ...
    seconds: float  # since this began
    unit: str = "step"
    done: int = 0
    total: int = 0  # 0: nothing is counted yet
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None  # of the fullest rank
    data_wait_fraction: float | None = None
    ranks: Sequence[Mapping[str, float]] = ()  # what each measured last, for the table
    eta_seconds: float | None = None

    def words(self) -> list[str]:
        """The parts of the line, without the bar."""
        words = [] if self.what == TRAINING and self.done else [f"{self.what} {format_seconds(int(self.seconds))}"]
        if self.done:
            words.append(f"{self.unit} {self.done:,}/{self.total:,}")
        if self.loss is not None:
            words.append(f"loss {self.loss:.4f}")
        if self.tokens_per_second is not None:
            words.append(f"{format_count(self.tokens_per_second)} tokens/s")
        if self.mfu is not None:
            words.append(f"MFU {100 * self.mfu:.1f} %")
        if self.peak_gib is not None:
            words.append(f"peak {self.peak_gib:.2f} GiB")
        if self.data_wait_fraction is not None:
            words.append(f"data wait {100 * self.data_wait_fraction:.1f} %")
        if self.eta_seconds is not None and self.done < self.total:
            words.append(f"ETA {format_seconds(math.ceil(self.eta_seconds))}")
        return words


class Watch:
    """Looks at a run folder and says where the run stands."""

    def __init__(self, folder: RunFolder, total_steps: int, clock: Callable[[], float] = time.monotonic, by_rank: bool = False):
        self.folder, self.total, self.clock, self.by_rank = folder, total_steps, clock, by_rank
        self.tail = StepTail(folder)
        self.phase, self.since = "", clock()
        self.step, self.loss = 0, float("nan")
        self.tokens = self.seconds = self.waited = 0.0  # of a step, smoothed
        self.mfu: float | None = None  # smoothed
        self.peak_gib = 0.0

    def look(self) -> View:
        for line in self.tail.new_steps():
            self._take(line)
        phase = self.folder.read_phase() or "starting the workers"
        if phase != self.phase:
            self.phase, self.since = phase, self.clock()
        elapsed = self.clock() - self.since
        if self.step == 0:
            return View(phase, elapsed)
        return View(
            phase,
            elapsed,
            done=self.step,
            total=self.total,
            loss=self.loss,
            tokens_per_second=self.tokens / max(self.seconds, 1e-9),
            mfu=self.mfu,
            peak_gib=self.peak_gib,
            data_wait_fraction=self.waited / max(self.seconds, 1e-9),
            ranks=self.folder.read_ranks() if self.by_rank else (),
            eta_seconds=(self.total - self.step) * self.seconds,
        )

    def _take(self, line: dict[str, Any]) -> None:
        weight = _SMOOTHING if self.step else 1.0
        self.step, self.loss = int(line["step"]), line["loss"]
        self.tokens += weight * (line["tokens"] - self.tokens)
        self.seconds += weight * (line["seconds"] - self.seconds)
        self.waited += weight * (line["data_wait_seconds"] - self.waited)
        self.peak_gib = max(line["peak_memory_gib"])
        if (mfu := line.get("mfu")) is not None:
            self.mfu = mfu if self.mfu is None else self.mfu + weight * (mfu - self.mfu)


class Display(Protocol):
    def show(self, view: View) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


class LiveLine:
    """One line that is drawn anew in place and disappears at the end."""

    def __init__(self, console: Console, others_print: bool):
        """others_print: what goes to stdout and stderr meanwhile stands above the line, instead of through it."""
        self.live = Live(console=console, refresh_per_second=8, transient=True, redirect_stdout=others_print, redirect_stderr=others_print)

    def show(self, view: View) -> None:
        self.live.update(Group(_line(view), rank_table(view.ranks)) if view.ranks else _line(view))

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()


class PlainLines:
    """A line every ten seconds and the last one, without control codes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self.printed_at = clock()
        self.waiting: View | None = None
        self.printed = ""

    def show(self, view: View) -> None:
        self.waiting = view
        if self.clock() - self.printed_at >= _PLAIN_SECONDS:
            self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._print()

    def _print(self) -> None:
        line = "" if self.waiting is None else "  ".join(self.waiting.words())
        if line not in ("", self.printed):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            if self.waiting is not None and self.waiting.ranks:
                self.console.print(plain(rank_table(self.waiting.ranks), width=_MOST_WIDTH), highlight=False, markup=False, soft_wrap=True)
            self.printed = line
        self.waiting, self.printed_at = None, self.clock()


def display(console: Console, others_print: bool = True) -> Display:
    """The kind that fits where the output goes."""
    return LiveLine(console, others_print) if console.is_terminal else PlainLines(console)


def counter(shown: Display, what: str, unit: str) -> Callable[[int, int], None]:
    """A callable (done, total) that shows how far a piece of work is."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        shown.show(View(what, time.monotonic() - began, unit=unit, done=done, total=total))

    return show


def rank_table(ranks: Sequence[Mapping[str, float]]) -> Table:
    """What each rank measured in the newest step; columns that no rank can tell are left out."""
    columns: dict[str, Callable[[Mapping[str, float]], str]] = {
        "peak GiB": lambda rank: f"{gib(rank['peak_bytes']):.2f}",
        "now GiB": lambda rank: f"{gib(rank['allocated_bytes']):.2f}",
        "host GiB": lambda rank: f"{gib(rank['host_bytes']):.2f}",
        "tokens": lambda rank: f"{rank['tokens']:,}",
        "padding": lambda rank: f"{100 * (1 - rank['tokens'] / max(1, rank['padded_tokens'])):.0f} %",
        "data wait": lambda rank: f"{1000 * rank['data_wait_seconds']:.1f} ms",
        "GPU": lambda rank: f"{100 * rank['gpu_utilization']:.0f} %",
        "W": lambda rank: f"{rank['gpu_watts']:.0f}",
        "°C": lambda rank: f"{rank['gpu_celsius']:.0f}",
    }
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("rank", style="dim", justify="right")
    told = [name for name, text in columns.items() if any("nan" not in text(rank) for rank in ranks)]
    for name in told:
        table.add_column(name, justify="right")
    for number, rank in enumerate(ranks):
        table.add_row(str(number), *(columns[name](rank) for name in told))
    return table


def _line(view: View) -> Table:
    """Spinner or bar, then the words; a narrow terminal loses the end of the words, never a second line."""
    line = Table.grid(padding=(0, 1))
    head = ProgressBar(total=view.total, completed=view.done, width=24) if view.done else Spinner("dots")
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_row(head, "  ".join(view.words()))
    return line
