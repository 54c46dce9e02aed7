"""The command through a real local Ray: what a run leaves, how it ends, and that no process stays behind.

Each test costs a start of Ray and its workers, so each looks at all that its run shows.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs_under_test import ROOT, alive, environment, family, planted_path, ranks, started, summary, wait_for_steps, waited_for

from trainkit.runs.folder import RunFolder

SMALL = ["--set", "train.max_steps=4", "--set", "data.eval=null", "--set", "train.metrics=[]", "--set", "batch.samples=8",
         "--set", "batch.samples_per_device=2"]  # fmt: skip
LONG = ["--set", "train.max_steps=100000", "--set", "data.eval=null", "--set", "train.metrics=[]", "--set", "batch.samples=8"]


@dataclass(frozen=True)
class Finished:
    folder: RunFolder
    workers: list[psutil.Process]
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The quickstart's first steps, to their end."""
    runs = tmp_path_factory.mktemp("small")
    folder = RunFolder(runs / "it")
    with started(runs, [*SMALL, "--set", "train.profile={start: 2, steps: 1}"]) as process:
        wait_for_steps(folder, process, 1)
        workers = family(process)
        out, err = process.communicate(timeout=400)
    return Finished(folder, workers, process.returncode, out, err)


def test_a_run_leaves_what_it_promises_and_shows_no_noise(small_run: Finished, tmp_path: Path) -> None:
    folder, workers, out, err = small_run.folder, small_run.workers, small_run.out, small_run.err
    assert small_run.code == 0, out + err
    assert alive(workers) == []
    assert len(workers) > 4, "Ray and its workers were seen"
    assert err == ""
    assert "\x1b" not in out and "tensorboard --logdir" in out
    for noise in ("raylet", "(pid=", "WARNING", "Warning", "INFO", "deepspeed"):
        assert noise not in out
    for rank in (0, 1):
        with gzip.open(folder.path / "profile" / f"rank-{rank}.json.gz") as trace:
            pieces = {event["name"] for event in json.load(trace)["traceEvents"] if str(event.get("name")).startswith("step ")}
        assert "step 2: the optimizer step" in pieces and all(piece.startswith("step 2: ") for piece in pieces)
    steps, found = folder.read_steps(), summary(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [len(found["memory"]["measured"]), len(folder.read_ranks())] == [2, 2] and 0 < found["goodput"] < 1
    assert found["memory"]["measured"][0]["optimizer"] == pytest.approx(found["memory"]["planned"]["optimizer"], rel=1e-3)
    assert {"loss", "grad_norm", "lr", "samples", "tokens", "seconds", "data_wait_seconds", "order"} <= set(steps[0])
    assert (found["status"], found["steps"], found["world_size"], found["zero_stage"]) == ("completed", 4, 2, 2)
    assert found["samples"] == sum(step["samples"] for step in steps) and found["order"] == steps[-1]["order"]
    assert len(found["peak_memory_gib"]) == 2
    assert {"recipe.yaml", "plan.json", "environment.json", "tensorboard", "model"} <= {path.name for path in folder.path.iterdir()}
    assert not list(folder.ray.glob("*.safetensors")), "the first weights, as large as the model, are not kept"
    assert "RAY_AUTH_TOKEN" not in (folder.path / "environment.json").read_text()
    command = [sys.executable, "-m", "trainkit.run", str(folder.path / "recipe.yaml"), "--runs", str(folder.path.parent), "--name", "it"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert again.returncode == 2 and "this run exists" in again.stderr


@pytest.mark.parametrize(("workers", "stage"), [(1, 3), (4, 1)])
def test_other_workers_and_stages_train_the_same(small_run: Finished, tmp_path: Path, workers: int, stage: int) -> None:
    """Dropout is on: layouts with as many micro-batches a step train identical ones."""
    folder = RunFolder(tmp_path / "it")
    scaling = f"scaling={{num_workers: {workers}, use_gpu: false, resources_per_worker: {{CPU: 0.5}}}}"
    with started(tmp_path, [*SMALL, "--set", scaling, "--set", f"zero=zero{stage}"]) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    here, there = folder.read_steps(), small_run.folder.read_steps()
    assert [step["order"] for step in here] == [step["order"] for step in there]
    assert [step["loss"] for step in here] == pytest.approx([step["loss"] for step in there], rel=1e-6)
    assert (summary(folder)["world_size"], summary(folder)["zero_stage"]) == (workers, stage)


def waits(process: psutil.Process) -> bool:
    """Whether it has imported all it needs, which takes seconds, and does next to nothing now."""
    before = process.cpu_times().user
    time.sleep(1)
    return 2 < before <= process.cpu_times().user < before + 0.2


@pytest.mark.parametrize("end", ["a killed driver", "a killed worker", "Ctrl-C"])
def test_workers_that_wait_for_their_rows_do_not_stay_behind(tmp_path: Path, end: str) -> None:
    folder, rows = RunFolder(tmp_path / "it"), tmp_path / "rows"
    one = [*SMALL, "--set", "scaling.num_workers=1"]
    with started(tmp_path, one, PYTHONPATH=planted_path(), ROWS_WAIT_FOR=str(rows)) as process:
        (worker,) = waited_for(lambda: [rank for rank in ranks(family(process)) if waits(rank)], seconds=120)
        workers = family(process)
        if end == "a killed driver":
            process.kill()
            waited_for(lambda: not alive(ranks(workers)), seconds=30)  # Ray's own agents take a minute
            return
        if end == "a killed worker":
            worker.kill()
            rows.touch()
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert alive(workers) == [] and "Traceback" not in err
    found = summary(folder)
    if end == "Ctrl-C":
        assert (process.returncode, found["status"]) == (130, "interrupted")
    else:  # whether the rows were ready before the death was noticed, or not
        assert (process.returncode, found["status"], found["restarts"]) == (0, "completed", 1), err
        assert found["failures"][0]["from_outside"]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "it")
    with started(tmp_path, LONG) as process:
        wait_for_steps(folder, process)
        workers = family(process)
        for worker in ranks(workers):
            worker.suspend()  # it will not reach the end of its step
        process.terminate()
        time.sleep(1)
        assert process.poll() is None
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted at once" in err
    assert alive(workers) == []
    assert summary(folder)["status"] == "interrupted"


def test_sigterm_to_the_whole_process_group_ends_the_run_soon(tmp_path: Path) -> None:
    """As `timeout` and batch systems send it: Ray's own processes end as well."""
    folder = RunFolder(tmp_path / "it")
    with started(tmp_path, LONG) as process:
        wait_for_steps(folder, process)
        workers = family(process)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert alive(workers) == []
    assert summary(folder)["status"] == "interrupted"


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_no_model(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "it")
    with started(tmp_path, [*LONG, "--set", "optimizer.lr=1.0e+30", "--set", "optimizer.warmup_steps=0"]) as process:
        _, err = process.communicate(timeout=400)
    assert process.returncode == 4
    assert "error: step " in err and "optimizer.lr" in err and "Traceback" not in err
    found = summary(folder)
    assert (found["status"], found["error"]["kind"]) == ("failed", "NonFiniteError")
    assert found["steps"] <= found["error"]["step"] + 1
    assert not (folder.path / "model").exists()
    assert not list(folder.ray.glob("*.safetensors"))


CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, logging_level="error")
class Holder: pass
holder = ray.remote(num_cpus=float(sys.argv[1]))(Holder).remote()
ray.get(holder.__ray_ready__.remote())
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def joined(runs: Path, held: int = 0, **of_the_node: str) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A cluster of one node with 2 CPUs, `held` of them taken by another job; gives the command that joins it."""
    settings = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=settings | of_the_node)  # fmt: skip
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "trainkit.run", str(ROOT / "recipes/quickstart.yaml"), "--runs", str(runs), "--address", address]

        def run(name: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, "--name", name, *options, *SMALL],
                                  capture_output=True, text=True, timeout=100, check=False, env=settings | variables, cwd=ROOT)  # fmt: skip

        yield run
    finally:
        cluster.communicate("")
    assert cluster.returncode == 0


def test_what_a_joined_cluster_can_never_give_is_said_within_seconds(tmp_path: Path) -> None:
    with joined(tmp_path) as run:
        for name, words, options in [
            ("many", "9 workers × 1 CPU = 9 CPU, and the cluster has 2", ["scaling.num_workers=9"]),
            ("spread", "STRICT_SPREAD: one on each node), which have room for 1", ["scaling.placement_strategy=STRICT_SPREAD"]),
            ("accelerator", "2 workers ask for H100, and 0 of the cluster's 1 nodes have it", ["scaling.accelerator_type=H100"]),
            ("labels", "zone: a is asked for, and 0 of the cluster's 1 nodes have that", ["scaling.label_selector={zone: a}"]),
        ]:
            asked = run(name, *(word for option in options for word in ("--set", option)))
            assert asked.returncode == 3, asked.stdout + asked.stderr
            assert words in " ".join(asked.stderr.split())
            assert summary(RunFolder(tmp_path / name))["error"]["kind"] == "CapacityError"


def test_a_cluster_that_others_hold_ends_the_wait_in_time(tmp_path: Path) -> None:
    with joined(tmp_path, held=1) as run:
        asked = run("it", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3")
    assert asked.returncode == 3, asked.stdout + asked.stderr
    assert "2 workers found no place in time" in asked.stderr and "Traceback" not in asked.stderr
    assert not list((tmp_path / "it/.ray").glob("*.safetensors"))


def test_a_node_that_cannot_compile_is_named(tmp_path: Path) -> None:
    """The compiler fails on the node alone; a lock that a killed build left there is no obstacle."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/c++").write_text("#!/bin/sh\ncase $* in *.cpp*) echo 'Python.h: not found' >&2; exit 1;; esac\nexec g++ \"$@\"\n")
    (tmp_path / "bin/c++").chmod(0o755)
    (tmp_path / "extensions/deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions/deepspeed_shm_comm/lock").touch()
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    with joined(tmp_path, PATH=path, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")) as run:
        asked = run("it")
    assert asked.returncode == 2, asked.stdout + asked.stderr
    assert "error: node " in asked.stderr and "DeepSpeed's deepspeed_shm_comm cannot be compiled" in asked.stderr
    (log,) = (tmp_path / "it/.ray").glob("operators-*.log")
    assert "Python.h: not found" in log.read_text()


@pytest.fixture(autouse=True)
def no_ray_of_others() -> Iterator[None]:
    """Each test starts from a machine whose Ray, if any, is not ours, and leaves none."""
    before = {process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in ("raylet", "gcs_server")}
    yield
    after = {process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in ("raylet", "gcs_server")}
    assert after <= before
