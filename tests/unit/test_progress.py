"""What the person who waits sees, read from a run folder: step, loss, tokens/s, ETA; control codes only in a terminal."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trainkit.cluster.launch import _ranks_told
from trainkit.cluster.progress import LiveLine, PlainLines, View, Watch, counter, display
from trainkit.data.handed import Handed
from trainkit.errors import TrainingError
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepLog, keep_steps


class FakeDistributors:
    def __init__(self, ranks: dict[int, Handed] | None) -> None:
        self.ranks = ranks

    def handed_to(self, split: str, timeout: float) -> dict[int, Handed]:
        if self.ranks is None:
            raise ConnectionError("the cluster is gone")
        return self.ranks


def told(ranks: dict[int, Handed] | None, end: BaseException | None, verbose: bool = True) -> list[str]:
    said: list[str] = []
    asked: Any = SimpleNamespace(verbose=verbose, say=said.append, plan=SimpleNamespace(world_size=2))
    distributors: Any = FakeDistributors(ranks)
    with nullcontext() if end is None else pytest.raises(type(end), match=str(end)), _ranks_told(asked, distributors):
        if end is not None:
            raise end
    return said


def test_verbose_tells_how_far_each_rank_was_fed_also_when_the_attempt_failed() -> None:
    ranks = {0: Handed(samples=64, pieces=[range(1, 9)], since=0.0, last=2.0)}
    for end in (None, TrainingError("rank 1 died")):
        (text,) = told(ranks, end)
        title, _, one, other = text.splitlines()
        assert "ahead of training" in title and "samples/s" not in text, "what was handed out ahead was not all trained"
        assert one.split() == ["0", "8", "64", "0"] and other.split() == ["1", "0", "0", "8", "slowest"]
        assert told({}, end) == ["the DataDistributor does not answer"]
        assert told(None, end) == [], "a cluster that is gone hides nothing"
        assert told(ranks, end, verbose=False) == []
    assert told(ranks, KeyboardInterrupt("at once")) == []


def line(step: int, loss: float, tokens: int, seconds: float) -> dict[str, Any]:
    numbers = {"step": step, "loss": loss, "samples": 1, "tokens": tokens, "seconds": seconds, "data_wait_seconds": 0.0}
    return numbers | {"mfu": None, "peak_memory_gib": [1.0]}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "small")
    folder.begin_attempt()
    return folder


def test_before_the_first_step_it_shows_the_phase_and_how_long_it_takes(folder: RunFolder) -> None:
    clock = Clock()
    watch = Watch(folder, 10, clock)
    assert watch.look().words() == ["starting the workers 0 s"]
    folder.write_phase("building the engine")
    watch.look()
    clock.now += 12
    assert watch.look().words() == ["building the engine 12 s"]


def test_a_step_shows_step_loss_tokens_per_second_and_eta(folder: RunFolder) -> None:
    watch, log = Watch(folder, 10), StepLog(folder)
    folder.write_phase("training")
    log.append(line(1, 2.5, 1000, 0.5) | {"mfu": 0.412, "peak_memory_gib": [1.25, 3.5], "data_wait_seconds": 0.05})
    assert watch.look().words() == [
        *("step 1/10", "loss 2.5000", "2,000 tokens/s", "MFU 41.2 %", "peak 3.50 GiB", "data wait 10.0 %", "ETA 5 s")
    ]
    folder.write_phase("evaluating")
    assert watch.look().words()[0] == "evaluating 0 s"


def test_a_step_of_an_earlier_version_that_lacks_some_keys_is_shown(folder: RunFolder) -> None:
    folder.write_phase("training")
    watch, step = Watch(folder, 10), line(1, 2.5, 1000, 0.5)
    StepLog(folder).append({key: value for key, value in step.items() if key not in ("peak_memory_gib", "data_wait_seconds")})
    assert watch.look().words()[:3] == ["step 1/10", "loss 2.5000", "2,000 tokens/s"]


def test_verbose_has_a_table_per_rank_without_columns_that_nobody_can_tell(folder: RunFolder) -> None:
    rank = {"peak_bytes": 3 * 2**30, "allocated_bytes": 2**30, "host_bytes": 2**30, "tokens": 750, "padded_tokens": 1000}
    rank |= {"data_wait_seconds": 0.0021, "gpu_utilization": float("nan"), "gpu_watts": float("nan"), "gpu_celsius": float("nan")}
    StepLog(folder).append(line(1, 1.0, 10, 1.0))
    folder.write_ranks([rank, rank | {"peak_bytes": 4 * 2**30}])
    assert Watch(folder, 10).look().ranks == ()
    out = io.StringIO()
    with PlainLines(Console(file=out, width=120)) as lines:
        lines.show(Watch(folder, 10, by_rank=True).look())
    _, header, first, second = out.getvalue().splitlines()
    assert header.split("  ")[0].strip() == "rank" and "°C" not in header and "padding" in header
    assert first.split() == ["0", "3.00", "1.00", "1.00", "750", "25", "%", "2.1", "ms"] and second.split()[1] == "4.00"


def test_one_slow_step_moves_the_speed_little(folder: RunFolder) -> None:
    watch, log = Watch(folder, 100), StepLog(folder)
    for step in range(1, 50):
        log.append(line(step, 1.0, 1000, 1.0))
    log.append(line(50, 1.0, 1000, 6.0))
    view = watch.look()
    assert view.tokens_per_second == pytest.approx(1000 / 1.25), "one of the last 20 steps"
    assert view.eta_seconds == pytest.approx(50 * 1.25)


def test_the_slow_first_step_counts_only_while_it_is_alone(folder: RunFolder) -> None:
    watch, log = Watch(folder, 1000), StepLog(folder)
    log.append(line(1, 1.0, 1000, 20.0) | {"mfu": 0.003, "data_wait_seconds": 19.0})
    view = watch.look()
    assert (view.tokens_per_second, view.mfu, view.data_wait_fraction, view.eta_seconds) == pytest.approx((50, 0.003, 0.95, 999 * 20))
    for step in range(2, 11):
        log.append(line(step, 1.0, 1000, 0.2) | {"mfu": 0.3, "data_wait_seconds": 0.01})
    view = watch.look()
    assert (view.tokens_per_second, view.mfu, view.data_wait_fraction, view.eta_seconds) == pytest.approx((5000, 0.3, 0.05, 990 * 0.2))


def test_rates_of_an_attempt_that_is_gone_are_not_shown(folder: RunFolder) -> None:
    log = StepLog(folder)
    for step in range(1, 31):
        log.append(line(step, 2.0, 1000, 0.1) | {"peak_memory_gib": [7.0]})
    keep_steps(folder, 28)
    watch, log = Watch(folder, 110), StepLog(folder)
    assert watch.look().words() == ["starting the workers 0 s", "step 28/110", "loss 2.0000"]
    folder.write_phase("training")
    log.append(line(29, 1.5, 1000, 10.0))
    assert watch.look().words() == [*("step 29/110", "loss 1.5000", "100 tokens/s", "peak 7.00 GiB", "data wait 0.0 %", "ETA 13 min 30 s")]
    log.append(line(30, 1.5, 1000, 0.5))
    assert watch.look().tokens_per_second == 2000


def test_the_peak_is_the_highest_since_the_start_with_as_many_workers(folder: RunFolder) -> None:
    watch, log = Watch(folder, 10), StepLog(folder)
    for step, peaks in enumerate(([2.0, 5.0], [3.0, 1.0]), start=1):
        log.append(line(step, 1.0, 10, 1.0) | {"peak_memory_gib": peaks})
    assert watch.look().peak_gib == 5.0
    log.append(line(3, 1.0, 10, 1.0) | {"peak_memory_gib": [4.0]})
    assert watch.look().peak_gib == 4.0, "one worker's, which the peak of two does not measure"


def test_a_loss_that_is_not_a_number_is_shown_as_such(folder: RunFolder) -> None:
    watch, log = Watch(folder, 10), StepLog(folder)
    log.append(line(1, float("nan"), 10, 1.0))
    assert "loss nan" in watch.look().words()


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last_one_without_control_codes() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainLines(Console(file=out, width=40), clock) as lines:
        for step in range(1, 25):
            clock.now += 1
            lines.show(View("training", 1.0, done=step, total=24, loss=1.0, tokens_per_second=5.0, eta_seconds=60.0))
    printed = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in printed] == ["step 10/24", "step 20/24", "step 24/24"]
    assert "\x1b" not in out.getvalue()
    assert "ETA 1 min 00 s" in printed[0]


def test_a_terminal_gets_one_line_however_narrow_it_is() -> None:
    out = io.StringIO()
    with LiveLine(Console(file=out, force_terminal=True, width=44), others_print=False) as line:
        line.show(View("training", 1.0, done=3, total=1200, loss=1.25, tokens_per_second=1e6, eta_seconds=4000.0))
        line.live.refresh()
        drawn = out.getvalue()
    assert "step 3/1,200" in drawn
    assert "tokens/s" not in drawn and "\n" not in drawn, "the end of the words is cut off, not wrapped"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "1,200/10,000 loss 2.346 1.235M tok/s MFU 31% peak 132 GiB wait 0.1% ETA 1h23"),
        (100, "step 1,200/10,000  loss 2.3456  1.235 M tokens/s  MFU 31.2 %  peak 131.52 GiB  wait 0.1 %  ETA 1h23"),
        (120, "step 1,200/10,000  loss 2.3456  1.235 M tokens/s  MFU 31.2 %  peak 131.52 GiB  data wait 0.1 %  ETA 1 h 23 min"),
    ],
)
def test_a_terminal_of_80_columns_shows_all_numbers_of_a_gpu(width: int, shown: str) -> None:
    out, gpu = io.StringIO(), {"tokens_per_second": 1_234_567.0, "mfu": 0.312, "peak_gib": 131.52, "data_wait_fraction": 0.001}
    with LiveLine(Console(file=out, force_terminal=True, color_system=None, width=width), others_print=False) as line:
        line.show(View("training", 1.0, done=1200, total=10_000, loss=2.3456, eta_seconds=83 * 60.0, **gpu))
        line.live.refresh()
        drawn = out.getvalue()
    assert shown in drawn and "…" not in drawn and "\n" not in drawn
    assert ("━" in drawn) == (width == 120), "the bar takes what the words leave"


def test_the_display_fits_where_the_output_goes() -> None:
    assert isinstance(display(Console(file=io.StringIO(), force_terminal=True)), LiveLine)
    assert isinstance(display(Console(file=io.StringIO())), PlainLines)


def test_a_counter_shows_rows() -> None:
    out = io.StringIO()
    with PlainLines(Console(file=out)) as lines:
        counter(lines, "tokenizing", "row")(1500, 3000)
    assert out.getvalue().strip().endswith("row 1,500/3,000")
