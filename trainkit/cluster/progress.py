"""What the person who waits sees: one live line in a terminal, plain lines in a pipe or a log file.

The driver reads it from the run folder (steps.jsonl, the phase), so the display costs training nothing and works for any cluster that
shares the folder.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from trainkit.markup import plain
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepTail, kept_steps
from trainkit.units import format_count, format_seconds, gib

TRAINING = "training"
_SMOOTHED_STEPS = 20  # tokens/s, MFU, data wait and ETA are those of so many last steps, as the smoothed curves of TensorBoard
_PLAIN_SECONDS = 10.0
_BAR_WIDTH = 24  # columns, where there is room
_LEAST_BAR = 4  # below which it says nothing
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
        return [forms[0] for forms in self.forms()]

    def forms(self) -> list[tuple[str, ...]]:
        """Each part in full, then shorter and shorter, for a narrow terminal."""
        parts: list[tuple[str, ...]] = []
        if self.what != TRAINING or not self.done:
            parts.append((f"{self.what} {format_seconds(int(self.seconds))}",))
        if self.done:
            position = f"{self.done:,}/{self.total:,}"
            parts.append((*(f"{self.unit} {position}",) * 3, position))
        if self.loss is not None:
            parts.append((f"loss {self.loss:.4f}", f"loss {self.loss:.4g}"))
        if self.tokens_per_second is not None:
            count = format_count(self.tokens_per_second)
            parts.append((f"{count} tokens/s", f"{count} tok/s", f"{count} tok/s".replace(" M", "M").replace(" B", "B")))
        if self.mfu is not None:
            percent = 100 * self.mfu
            parts.append((f"MFU {percent:.1f} %", f"MFU {percent:.1f}%", f"MFU {percent:.0f}%"))
        if self.peak_gib is not None:
            parts.append((f"peak {self.peak_gib:.2f} GiB", f"peak {self.peak_gib:.1f} GiB", f"peak {self.peak_gib:.3g} GiB"))
        if self.data_wait_fraction is not None:
            wait = f"wait {100 * self.data_wait_fraction:.1f}"
            parts.append((f"data {wait} %", f"{wait} %", f"{wait}%"))
        if self.eta_seconds is not None and self.done < self.total:
            eta = f"ETA {format_seconds(math.ceil(self.eta_seconds))}"
            parts.append((eta, eta.replace(" h ", "h").replace(" min ", "m").replace(" s", "s").replace(" min", "")))
        return parts


class SoFar:
    """What the lines of steps.jsonl say of a run until now.

    Rates are sums over the last steps of this attempt. Its first step also warms caches up, so it counts only while it is alone.
    """

    def __init__(self, kept: int):
        """kept: steps of attempts before, whose processes are gone, and their rates with them."""
        self.kept = kept
        self.step, self.loss, self.peak_gib, self.world_size = 0, float("nan"), 0.0, 0
        self.taken = 0  # steps of this attempt
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=_SMOOTHED_STEPS)

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line."""
        self.step, self.loss = int(line["step"]), line["loss"]
        peaks = line.get("peak_memory_gib", ())  # lines of earlier versions lack some keys
        before = self.peak_gib if len(peaks) == self.world_size else 0.0  # what other numbers of workers took is no measure of these
        self.peak_gib, self.world_size = max(before, *peaks, 0.0), len(peaks)
        if self.step > self.kept:
            self.taken += 1
            if self.taken == 2:
                self.recent.clear()
            self.recent.append(line)

    def view(self, what: str, seconds: float, total: int, ranks: Sequence[Mapping[str, float]] = ()) -> View:
        """Step and loss alone until this attempt has trained a step."""
        if self.step == 0 or not self.recent:
            return View(what, seconds, done=self.step, total=total, loss=self.loss if self.step else None)
        spent, tokens, waited = (sum(line.get(key, 0) for line in self.recent) for key in ("seconds", "tokens", "data_wait_seconds"))
        told = [line for line in self.recent if line.get("mfu") is not None]
        return View(
            what,
            seconds,
            done=self.step,
            total=total,
            loss=self.loss,
            tokens_per_second=tokens / max(spent, 1e-9),
            mfu=sum(line["mfu"] * line["seconds"] for line in told) / sum(line["seconds"] for line in told) if told else None,
            peak_gib=self.peak_gib,
            data_wait_fraction=waited / max(spent, 1e-9),
            ranks=ranks,
            eta_seconds=(total - self.step) * spent / len(self.recent),
        )


class Watch:
    """Looks at a run folder, for the length of one attempt, and says where the run stands."""

    def __init__(self, folder: RunFolder, total_steps: int, clock: Callable[[], float] = time.monotonic, by_rank: bool = False):
        self.folder, self.total, self.clock, self.by_rank = folder, total_steps, clock, by_rank
        self.tail, self.so_far = StepTail(folder), SoFar(kept_steps(folder))
        self.phase, self.since = "", clock()

    def look(self) -> View:
        for line in self.tail.new_steps():
            self.so_far.take(line)
        phase = self.folder.read_phase() or "starting the workers"
        if phase != self.phase:
            self.phase, self.since = phase, self.clock()
        ranks = self.folder.read_ranks() if self.by_rank else ()
        return self.so_far.view(phase, self.clock() - self.since, self.total, ranks)


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
        line = _Line(view)
        self.live.update(Group(line, rank_table(view.ranks)) if view.ranks else line)

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


@dataclass(frozen=True)
class _Line:
    """Bar or spinner, then the words. In a narrow terminal the bar goes first, then words get shorter, then the line loses its end."""

    view: View

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        line, view = Table.grid(padding=(0, 1)), self.view
        room = options.max_width - len("  ".join(view.words())) - 1
        heads: list[ProgressBar | Spinner] = [] if view.done else [Spinner("dots")]
        if view.done and room >= _LEAST_BAR:
            heads = [ProgressBar(total=view.total, completed=view.done, width=min(_BAR_WIDTH, room))]
        for _ in heads:
            line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(*heads, _fitting(view.forms(), options.max_width))
        yield line


def _fitting(parts: Sequence[Sequence[str]], width: int) -> str:
    """The parts in a line, the last ones shortened first and no more than need be."""
    shown, gap = [forms[0] for forms in parts], "  "
    for level in range(1, max(map(len, parts))):
        for place in reversed(range(len(parts))):
            if len(gap.join(shown)) <= width:
                return gap.join(shown)
            shown[place] = parts[place][min(level, len(parts[place]) - 1)]
        gap = gap if len(gap.join(shown)) <= width else " "
    return gap.join(shown)
