"""Processes that are killed, and a run that is interrupted and resumed: nothing is lost, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs_under_test import (
    alive,
    family,
    is_saving,
    planted_path,
    points,
    ranks,
    started,
    summary,
    trained,
    wait_for_steps,
    waited_for,
)

from trainkit.runs import checkpoints
from trainkit.runs.folder import RunFolder

STEPS = 60
RUN = ["--set", f"train.max_steps={STEPS}", "--set", "train.save_steps=8", "--set", "data.eval=null", "--set", "train.metrics=[]",
       "--set", "batch.samples=32"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The steps of a run under a ZeRO configuration that nobody touched."""

    @cache
    def run(zero: str) -> list[dict[str, Any]]:
        runs = tmp_path_factory.mktemp(zero)
        with started(runs, [*RUN, "--set", f"zero={zero}"]) as process:
            _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        return trained(RunFolder(runs / "it"))

    return run


def kill_first(folder: RunFolder, processes: list[psutil.Process]) -> None:
    ranks(processes)[0].kill()


def kill_last(folder: RunFolder, processes: list[psutil.Process]) -> None:
    ranks(processes)[-1].kill()


def kill_in_a_save(folder: RunFolder, processes: list[psutil.Process]) -> None:
    workers = ranks(processes)
    waited_for(lambda: is_saving(folder), every=0.001)
    for worker in workers:
        worker.kill()


def end_raylet(folder: RunFolder, processes: list[psutil.Process]) -> None:
    """It signs off, and Ray ends a driver that owns anything in its object store."""
    (raylet,) = (process for process in processes if process.name() == "raylet")
    raylet.terminate()


@pytest.mark.parametrize("zero", ["zero3", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)])
def test_killed_workers_change_nothing(undisturbed: Callable[[str], list[dict[str, Any]]], tmp_path: Path, zero: str) -> None:
    """One rank, the other, both in the middle of a save, and Ray itself, with dropout."""
    folder, told = RunFolder(tmp_path / "it"), 0
    with started(tmp_path, [*RUN, "--set", f"zero={zero}", "--set", "run.max_failures=4"]) as process:
        for steps, kill in ((10, kill_first), (20, kill_last), (30, kill_in_a_save), (40, end_raylet)):
            waited_for(lambda steps=steps: len(folder.read_steps()) >= steps and len(ranks(family(process))) == 2, seconds=200)
            kill(folder, family(process))
            told += 1
            waited_for(lambda told=told: len(list(folder.ray.glob("attempt-*"))) > told, seconds=200)
        out, err = process.communicate(timeout=400)
        workers = family(process)
    assert process.returncode == 0, out + err
    assert trained(folder) == undisturbed(zero)
    assert (
        out.count("killed by a signal") == 3
        and re.search("a process of (the local )?Ray was ended", out)
        and "restart 4 of at most 4" in out
    )
    assert "Traceback" not in out + err
    found = summary(folder)
    assert (found["status"], found["restarts"], found["steps"]) == ("completed", 4, STEPS)
    assert [failure["from_outside"] for failure in found["failures"]] == [True] * 4
    assert alive(workers) == [] and (folder.path / "model").is_dir()
    assert points(folder) == list(range(1, STEPS + 1)), "TensorBoard shows each step once"
    kept = checkpoints.complete(folder.path)
    assert [checkpoint.step for checkpoint in kept] == [STEPS, 56] and not list((folder.path / "checkpoints").glob("*/.part*"))
    for checkpoint in kept:
        checkpoint.check()


def test_a_hanging_rank_and_a_full_memory_are_named_and_cost_nothing(
    undisturbed: Callable[[str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A rank that stands still in a line of Python, and one that runs out of memory. Stopped processes are among those of chaos.py."""
    folder = RunFolder(tmp_path / "it")
    planted = {"PLANTED": "hang:1:12 oom:0:40", "PLANTED_DONE": str(tmp_path), "HANG_SECONDS": "8", "PYTHONPATH": planted_path()}
    with started(tmp_path, [*RUN, "--set", "zero=zero3", "--set", "train.halve_on_oom=true"], **planted) as process:
        waited_for(lambda: len(list(folder.ray.glob("attempt-*"))) == 2, seconds=200)
        out, err = process.communicate(timeout=240)
        workers = family(process)
    assert process.returncode == 0, out + err
    found = summary(folder)
    assert (found["status"], found["restarts"], found["steps"]) == ("completed", 2, STEPS)
    stuck, full = found["failures"]
    assert "rank 1 stands at planted/sitecustomize.py:" in stuck["message"] and "in the optimizer step" in stuck["message"]
    assert stuck["message"].startswith("step 12: ") and not stuck["from_outside"]
    assert (full["kind"], full["message"].splitlines()[0]) == (
        "OutOfMemory",
        "step 40: rank 0 ran out of GPU memory in the optimizer step: CUDA out of memory. Tried to allocate 2.00 GiB.",
    )
    assert "with half the micro-batch budget" in out and "Traceback" not in out + err
    assert folder.read_plan()["tokens_per_device"] <= 2048
    same, steps = undisturbed("zero3"), trained(folder)
    assert steps[:32] == same[:32], "up to the last checkpoint before the budget was halved"
    assert [step["order"] for step in steps] == [step["order"] for step in same]
    assert alive(workers) == []


def test_ctrl_c_saves_and_resume_goes_on_from_the_copy_with_other_workers(
    undisturbed: Callable[[str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, copies = RunFolder(tmp_path / "it"), f"file://{tmp_path}/copies"
    zero3 = ["--set", "zero=zero3", "--set", f"run.copy_checkpoints_to={copies}"]
    with started(tmp_path, [*RUN, *zero3]) as process:
        wait_for_steps(folder, process, 20)
        workers = family(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err and alive(workers) == []
    found = summary(folder)
    assert found["status"] == "interrupted" and found["steps"] == len(folder.read_steps()) >= 20
    assert f"interrupted after step {found['steps']} of {STEPS}" in err and "--resume --name it" in err
    assert checkpoints.complete(folder.path)[0].step == found["steps"]
    assert found["copy"] == {"step": found["steps"], "error": None}
    kept = [path.name for path in sorted((folder.path / "checkpoints").iterdir())]
    assert [path.name for path in sorted((tmp_path / "copies" / "it" / "checkpoints").iterdir())] == kept and len(kept) == 2
    shutil.rmtree(folder.path)
    with started(tmp_path, [*RUN, *zero3, "--resume", "--set", "optimizer.lr=1.0e-5", "--set", "train.seed=1"]) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "optimizer.lr" in err and "train.seed" in err
    other = [*zero3, "--set", "zero=zero1", "--set", "scaling.num_workers=1", "--set", "batch.samples_per_device=16"]
    with started(tmp_path, [*RUN, *other, "--resume"]) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and f"going on from step {found['steps']}" in out, out + err
    assert f"the checkpoint of step {found['steps']} comes from {copies}/it" in out and summary(folder)["copy"]["step"] == STEPS
    same, steps = undisturbed("zero3"), trained(folder)
    assert [step["order"] for step in steps] == [step["order"] for step in same]
    assert steps[: found["steps"]] == same[: found["steps"]]
    assert [step["lr"] for step in steps] == [step["lr"] for step in same]
    with started(tmp_path, [*RUN, *other, "--resume"]) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "is complete after 60 steps" in err
    assert json.loads((folder.path / "summary.json").read_text())["status"] == "completed"
