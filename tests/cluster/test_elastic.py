"""A node of a cluster gets a notice and goes away: a checkpoint is written, and training goes on with the workers that are left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runs_under_test import environment, started, summary, wait_for_steps, waited_for

from trainkit.runs import checkpoints
from trainkit.runs.folder import RunFolder

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8})
node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
print(cluster.address, node.node_id, flush=True)
for word in sys.stdin:
    if word.strip() == "kill":
        cluster.remove_node(node, allow_graceful=False)
cluster.shutdown()
"""
RUN = ["--set", "train.max_steps=60", "--set", "train.save_steps=1000", "--set", "data.eval=null", "--set", "train.metrics=[]",
       "--set", "batch.samples=32", "--set", "scaling.num_workers=[1, 2]"]  # fmt: skip


@contextmanager
def two_nodes() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """A cluster of two nodes with a CPU each: its address, the second node's id, and what kills that node."""
    settings = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)
    assert cluster.stdin is not None and cluster.stdout is not None

    def kill() -> None:
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()

    try:
        address, node = cluster.stdout.readline().split()
        yield address, node, kill
    finally:
        cluster.communicate(timeout=120)


def test_a_node_that_goes_away_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "it")
    with two_nodes() as (address, node, kill), started(tmp_path, [*RUN, "--address", address], RAY_AUTH_MODE="disabled") as process:
        wait_for_steps(folder, process, 5)
        drain = ["drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                 "--reason-message", "spot", "--deadline-remaining-seconds", "300"]  # fmt: skip
        subprocess.run([str(Path(sys.executable).parent / "ray"), *drain], check=True, capture_output=True, timeout=60,
                       env=environment() | {"RAY_AUTH_MODE": "disabled"})  # fmt: skip
        (noticed,) = waited_for(lambda: checkpoints.complete(folder.path), seconds=30)
        kill()
        gone = time.monotonic()
        waited_for(lambda: len(list(folder.ray.glob("attempt-*"))) == 2, seconds=200)
        waited_for(lambda: len(folder.read_steps()) > noticed.step, seconds=200)
        went_on = time.monotonic() - gone
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    found = summary(folder)
    assert (found["status"], found["steps"], found["world_size"], found["restarts"]) == ("completed", 60, 1, 1)
    assert "2 of 2 workers" not in out and "1 of 2 workers" in out and f"going on from step {noticed.step}" in out
    assert "Traceback" not in out + err
    assert [step["step"] for step in folder.read_steps()] == list(range(1, 61))
    assert folder.read_plan()["world_size"] == 1
    print(f"training went on {went_on:.0f} s after the node was gone")
