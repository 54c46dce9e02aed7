"""What a rank measures of itself on a CPU, the trace of a window of steps, and the time that commands worked on a run."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from trainkit.errors import UsageError
from trainkit.planning.flops import Work
from trainkit.recipe.schema import Profile
from trainkit.runs.folder import RunFolder
from trainkit.runs.worked import WorkedTime
from trainkit.training.profiler import Profiler
from trainkit.training.rank_meters import BACKWARD, FORWARD, OPTIMIZER, RankMeters, Sensors, Stopwatch
from trainkit.training.states import Held, storage_bytes

CPU = torch.device("cpu")


def test_laps_of_one_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 13.5, 14.0, 18.0])
    monkeypatch.setattr("trainkit.training.rank_meters.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    stopwatch = Stopwatch(CPU)
    for piece in (FORWARD, BACKWARD, FORWARD, BACKWARD, OPTIMIZER):
        stopwatch.lap(piece)
    assert stopwatch.seconds() == {FORWARD: 1.5, BACKWARD: 2.5, OPTIMIZER: 4.0}


def test_a_gpu_runs_on_until_it_has_come_to_the_last_mark() -> None:
    stopwatch = Stopwatch(CPU)
    assert not stopwatch.runs_on()
    stopwatch.device = torch.device("cuda")
    for reached in (False, True):
        stopwatch.marks.append((OPTIMIZER, SimpleNamespace(query=lambda reached=reached: reached)))
        assert stopwatch.runs_on() is not reached


def test_a_process_tells_its_resident_memory_and_asks_what_is_held_until_a_step_was_applied() -> None:
    answers = iter([Held(parameters=40), Held(parameters=40, optimizer=120, activations=7)])

    meters = RankMeters(CPU, lambda: next(answers), flops=lambda work: 2.0 * work.tokens)
    for applied in (False, True, True):  # fp16 skips the first ones
        found = meters.numbers(Work(30, 12), 64, 0.5, Stopwatch(CPU), applied)
    meters.close()
    resident = psutil.Process().memory_info().rss
    assert found.host_bytes == pytest.approx(resident, rel=0.1) and found.peak_bytes >= 0.9 * found.host_bytes
    assert (found.tokens, found.padded_tokens, found.flops, found.data_wait_seconds) == (42, 64, 84.0, 0.5)
    assert (found.parameter_bytes, found.optimizer_bytes, found.activation_bytes) == (40, 120, 7)
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
        assert profiler.is_last(step) == (step == 3)
        profiler.ends(step)
        torch.ones(4, 4) + 1  # an evaluation, which is no part of a step
    profiler.close()
    with gzip.open(tmp_path / "profile" / "rank-0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == [
        f"step {step}: {piece}" for step in (2, 3) for piece in ("the wait for data", "the optimizer step")
    ]
    assert names.count("aten::mm") == 4 and names.count("aten::add") == 1, "what happens between two steps of the window is seen, no more"


def test_a_window_that_the_end_cuts_off_is_written(tmp_path: Path) -> None:
    profiler = Profiler(Profile(start=1, steps=9), tmp_path / "rank-0.json.gz", CPU)
    profiler.begins(1, "the optimizer step")
    profiler.close()
    assert (tmp_path / "rank-0.json.gz").stat().st_size > 0


def test_a_killed_command_worked_until_its_last_sign_of_life(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    first = WorkedTime(folder, time.time())
    assert first.before == 0
    folder.steps_path.write_text("")
    os.utime(folder.steps_path, (first.began + 30, first.began + 30))  # and then it was killed
    second = WorkedTime(folder, time.time())
    assert second.before == pytest.approx(30, abs=0.01) and second.seconds() == pytest.approx(30, abs=1)
    second.close()
    assert WorkedTime(folder, time.time()).before == pytest.approx(30, abs=1), "nothing is added for the time between two commands"


def test_steps_that_nobody_timed_leave_the_time_unknown(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.steps_path.write_text('{"step": 1, "loss": 1.0, "samples": 8, "tokens": 99, "seconds": 0.5}\n')
    for _ in range(2):
        worked = WorkedTime(folder, time.time() - 5)
        assert worked.before is None and worked.seconds() == 0.0
        worked.close()
    (folder.ray / "worked.json").write_text("")
    with pytest.raises(UsageError, match=r"worked\.json: damaged"):
        WorkedTime(folder, time.time())


def test_a_sensor_that_says_nothing_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception): ...

    def refuse(gpu: object) -> float:
        raise Refused

    driver = SimpleNamespace(
        NVMLError=Refused, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=75), nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetTemperature=lambda gpu, kind: 51,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr("trainkit.training.rank_meters._SENSOR_SECONDS", 0.01)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a-b"))
    sensors = Sensors(torch.device("cuda", 0))
    deadline = time.monotonic() + 10
    while math.isnan(sensors.last[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    sensors.close()
    assert (sensors.last[0], sensors.last[2]) == (0.75, 51.0) and math.isnan(sensors.last[1])
    assert not sensors.thread.is_alive()
