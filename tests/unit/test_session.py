"""What a run sets in the environment gives way to what the user has set, also on the nodes of a joined cluster; the end of a local Ray."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainkit.cluster.session import Head, cluster_address, end_processes, environment, environment_settings, job_environment
from trainkit.errors import TrainingError, UsageError
from trainkit.recipe.reader import read_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"


def test_the_users_value_goes_to_the_cluster_and_ours_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with environment(settings):
        sent = job_environment(settings)
    assert (sent["OMP_NUM_THREADS"], sent["TOKENIZERS_PARALLELISM"]) == ("7", "false")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize(("out", "err", "coloured"), [(True, True, True), (True, False, False), (False, True, False)])
def test_workers_lines_have_colours_in_a_terminal_only(
    out: bool, err: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private.worker import print_worker_logs

    monkeypatch.delenv("RAY_COLOR_PREFIX", raising=False)
    with monkeypatch.context() as terminals:
        terminals.setattr(sys.stdout, "isatty", lambda: out)
        terminals.setattr(sys.stderr, "isatty", lambda: err)
        settings = environment_settings(read_recipe(QUICKSTART), local=False)
    monkeypatch.setattr("ray._private.worker._worker_logs_enabled", True)
    with environment(settings):
        print_worker_logs({"pid": "7", "lines": ["loss 1.0"], "actor_name": "RayTrainWorker"}, sys.stdout)  # type: ignore[dict-item]
    printed = capsys.readouterr().out
    assert "(RayTrainWorker pid=7)" in printed and ("\x1b" in printed) == coloured


def test_each_node_keeps_its_own_path() -> None:
    assert job_environment({})["PATH"].endswith(":${PATH}")


def test_a_head_is_well_while_its_processes_live_and_its_port_answers() -> None:
    here = psutil.Process()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        Head([here], address).check()
        child = subprocess.Popen([sys.executable, "-c", ""])
        process = psutil.Process(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended and nobody has taken notice: a zombie
        for _ in range(2):
            with pytest.raises(TrainingError) as ended:
                Head([here, process], address).check()
            assert ended.value.facts["from_outside"]
            child.wait()
    with pytest.raises(TrainingError, match="was ended from outside"):
        Head([here], address).check()
    Head([], address).check()  # of a joined cluster: Ray itself finds out


def test_the_end_does_not_wait_for_those_that_nobody_takes_note_of() -> None:
    """A grandchild that has ended, whose parent does not care, and one that does not end by itself."""
    lives, dies = (
        f"import os, time; pid = os.fork(); pid or {does}; print(pid, flush=True); time.sleep(60)"
        for does in ("time.sleep(60)", "os._exit(0)")
    )
    parents = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for code in (lives, dies)]
    try:
        alive, ended = (psutil.Process(int(parent.stdout.readline())) for parent in parents if parent.stdout is not None)
        began = time.monotonic()
        end_processes([ended], seconds=30)
        assert time.monotonic() - began < 5
        end_processes([alive], seconds=0.1)
        assert not alive.is_running() or alive.status() == psutil.STATUS_ZOMBIE
    finally:
        for parent in parents:
            parent.kill()
            parent.communicate()


@pytest.mark.parametrize("address", ["a..b:1", f"{'x' * 300}:1", "[::1]:1", "127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_answers_is_named_as_it_was_given(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--address {address}: nobody answers there")):
        cluster_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=re.escape(f"RAY_ADDRESS {address}: nobody answers there")):
        cluster_address(None)


@pytest.mark.parametrize("address", ["nowhere", ":6379", "ray://head:10001", "head:²"])
def test_what_is_no_address_is_told_what_one_looks_like(address: str) -> None:
    with pytest.raises(UsageError, match=r"write the head node as host:port"):
        cluster_address(address)
