"""What a rank measures of itself on a CPU, the trace of a window of steps, and the time that commands worked on a run."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from trainkit.planning.flops import Work
from trainkit.recipe.schema import Profile
from trainkit.runs.folder import RunFolder
from trainkit.runs.worked import WorkedTime
from trainkit.training.profiler import Profiler
from trainkit.training.rank_meters import BACKWARD, FORWARD, OPTIMIZER, RankMeters, Stopwatch
from trainkit.training.states import Held, storage_bytes

CPU = torch.device("cpu")


def test_laps_of_one_name_add_up() -> None:
    stopwatch = Stopwatch(CPU)
    for piece in (FORWARD, BACKWARD, FORWARD, BACKWARD, OPTIMIZER):
        time.sleep(0.02 if piece == FORWARD else 0.001)
        stopwatch.lap(piece)
    seconds = stopwatch.seconds()
    assert list(seconds) == [FORWARD, BACKWARD, OPTIMIZER]
    assert seconds[FORWARD] >= 0.04 > seconds[BACKWARD] > seconds[OPTIMIZER] > 0


def test_a_process_tells_its_resident_memory_and_asks_once_what_is_held() -> None:
    asked: list[int] = []

    def held() -> Held:
        asked.append(1)
        return Held(parameters=40, optimizer=120)

    meters = RankMeters(CPU, held, flops=lambda work: 2.0 * work.tokens)
    for _ in range(2):
        found = meters.numbers(Work(30, 12), 64, 0.5, Stopwatch(CPU))
    meters.close()
    resident = psutil.Process().memory_info().rss
    assert found.host_bytes == pytest.approx(resident, rel=0.1) and found.peak_bytes >= 0.9 * found.host_bytes
    assert (found.tokens, found.padded_tokens, found.flops, found.data_wait_seconds) == (42, 64, 84.0, 0.5)
    assert (found.parameter_bytes, found.optimizer_bytes, len(asked)) == (40, 120, 1)
    assert math.isnan(found.gpu_utilization), "nothing is made up where no GPU says it"


def test_memory_that_tensors_share_counts_once() -> None:
    flat = torch.zeros(100)
    seen: set[int] = set()
    assert storage_bytes([flat[:50], flat[50:], torch.zeros(3, dtype=torch.float64)], seen) == {"cpu": 424}
    assert storage_bytes([flat], seen) == {}


def test_a_trace_of_the_window_opens_and_names_the_pieces(tmp_path: Path) -> None:
    profiler = Profiler(Profile(start=2, steps=2), tmp_path / "profile" / "rank-0.json.gz", CPU)
    for step in range(1, 6):
        for piece in ("the wait for data", "the optimizer step"):
            profiler.begins(step, piece)
            torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()
    with gzip.open(tmp_path / "profile" / "rank-0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == [
        f"step {step}: {piece}" for step in (2, 3) for piece in ("the wait for data", "the optimizer step")
    ]
    assert names.count("aten::mm") == 4


def test_a_window_that_the_end_cuts_off_is_written(tmp_path: Path) -> None:
    profiler = Profiler(Profile(start=1, steps=9), tmp_path / "rank-0.json.gz", CPU)
    profiler.begins(1, "the optimizer step")
    profiler.close()
    assert (tmp_path / "rank-0.json.gz").stat().st_size > 0


def test_a_killed_command_worked_until_its_last_sign_of_life(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    first = WorkedTime(folder)
    assert first.before == 0
    folder.steps_path.write_text("")
    os.utime(folder.steps_path, (first.began + 30, first.began + 30))  # and then it was killed
    second = WorkedTime(folder)
    assert second.before == pytest.approx(30, abs=0.01) and second.seconds() == pytest.approx(30, abs=1)
    second.close()
    assert WorkedTime(folder).before == pytest.approx(30, abs=1), "nothing is added for the time between two commands"
