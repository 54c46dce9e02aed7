"""The DataDistributor as a Ray actor: killed while it serves, one on each node that sees the data."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from test_launch import ROOT, environment, family, started

from trainkit.cluster.tokenizing import by_ray_data
from trainkit.data import distributor
from trainkit.data.arrays import TokenArrays, Writer, ragged
from trainkit.data.batches import Budget
from trainkit.data.chunks import Encoder
from trainkit.data.distributor import DataDistributor, Feeding, make_distributors
from trainkit.data.tokens import prepare
from trainkit.errors import DataError
from trainkit.recipe.reader import read_recipe
from trainkit.runs.folder import RunFolder

STEPS = 120
RUN = ["--set", f"train.max_steps={STEPS}", "--set", "data.eval=null", "--set", "train.metrics=[]", "--set", "batch.samples=32"]


def actors_in(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if any("DataDistributor" in word for word in process.cmdline())]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killing_the_actor_changes_nothing(tmp_path: Path, kills: int) -> None:
    """Losses, gradient norms and the hash of the trained samples are bit-identical to an undisturbed run's."""
    left, killed_at = {}, []
    for name, times in (("undisturbed", 0), ("disturbed", kills)):
        folder, rng = RunFolder(tmp_path / name / "it"), random.Random(0)
        moments = sorted(rng.randrange(STEPS // 2) for _ in range(times))  # steps; beyond them everything is handed out already
        with started(tmp_path / name, RUN) as process:
            for moment in moments:
                killed_at.append(_killed(process, folder, moment, rng.uniform(0.0, 0.1)))
            _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        left[name] = [(step["loss"], step["grad_norm"], step["lr"], step["order"]) for step in folder.read_steps()]
    assert len(left["undisturbed"]) == STEPS and left["disturbed"] == left["undisturbed"]
    assert sum(0 < steps < STEPS for steps in killed_at) >= kills // 2, "while it was training"


def _killed(process: subprocess.Popen[str], folder: RunFolder, step: int, later: float) -> int:
    """Kill the actor some seconds after a step is done: the steps done then."""
    waited_for(lambda: len(folder.read_steps()) >= step)
    (actor,) = waited_for(lambda: actors_in(family(process)))
    time.sleep(later)
    actor.kill()
    actor.wait(10)
    return len(folder.read_steps())


def waited_for(look, seconds: float = 60, every: float = 0.02):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(every)
    return found


def feeding(folder: Path, tokens: int = 50) -> dict[str, Feeding]:
    rng = np.random.default_rng(tokens)
    rows = [rng.integers(3, 400, rng.integers(1, tokens)).tolist() for _ in range(200)]
    with Writer(folder) as writer:
        writer.append({"input_ids": ragged(rows), "labels": ragged(rows)}, np.array([len(row) for row in rows]))
        writer.finish(truncated={})
    return {"train": Feeding(str(folder), "causal", 7, 16, 2, Budget(tokens=512), shuffle=True)}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The id of the node that is not the driver's."""
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"})
    before = environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield other.node_id
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


def test_a_node_that_sees_the_data_has_an_actor_of_its_own(two_nodes: str, tmp_path: Path) -> None:
    feedings = feeding(tmp_path / "tokens")
    found = make_distributors(feedings)
    assert set(found.of_node) == {two_nodes} and found.nearest() is found.of_driver
    there, plain = found.of_node[two_nodes], DataDistributor(feedings)
    for rank in range(2):
        calls = [ray.get(actor.steps.remote("train", 3, 4, rank)) for actor in (there, found.of_driver)] + [
            plain.steps("train", 3, 4, rank)
        ]
        assert all(np.array_equal(call.sample_ids, calls[0].sample_ids) for call in calls)
        assert all(np.array_equal(call.columns["input_ids"][0], calls[0].columns["input_ids"][0]) for call in calls)


@pytest.mark.parametrize("there", ["other content", "nothing"])
def test_a_node_that_sees_something_else_is_served_by_the_drivers_actor(
    two_nodes: str, tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = distributor.make_distributor
    others = (
        feeding(tmp_path / "other", 40)
        if there == "other content"
        else {"train": Feeding("/nowhere", "causal", 7, 16, 2, Budget(rows=1), True)}
    )
    monkeypatch.setattr(distributor, "make_distributor", lambda feedings, node=None: make(others if node else feedings, node))
    assert make_distributors(feeding(tmp_path / "tokens")).of_node == {}


def test_ray_data_encodes_the_same_tokens(two_nodes: str, tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes/quickstart.yaml", ["data.train=train[:300]", f"run.storage_path={tmp_path}"])
    here = prepare(recipe)
    alone = TokenArrays.open(here.train)
    before = [alone.column(name).gather(np.arange(alone.rows))[0].tolist() for name in ("input_ids", "labels")]
    shutil.rmtree(here.train)
    spread = prepare(recipe, spread=by_ray_data)
    arrays = TokenArrays.open(spread.train)
    assert spread == here and arrays.manifest == alone.manifest
    assert [arrays.column(name).gather(np.arange(arrays.rows))[0].tolist() for name in ("input_ids", "labels")] == before
    with pytest.raises(DataError, match="row 7"):
        list(by_ray_data(Encoder(recipe, _with_a_null(7), None, None), range(0, 10, 5)))


def _with_a_null(row: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"question": None if number == row else "q", "sql": "s"} for number in range(10)])


def test_progress_is_counted_by_rank_and_names_the_slowest(two_nodes: str, tmp_path: Path) -> None:
    actor = distributor.make_distributor(feeding(tmp_path / "tokens"))
    ray.get([actor.steps.remote("train", 1, 8, 0), actor.steps.remote("train", 1, 2, 1)])
    progress = ray.get(actor.get_progress.remote(1))
    assert (progress["steps"], progress["steps_behind"], progress["slowest_rank"]) == (2, 6, 1)
    assert ray.get(actor.get_progress.remote(0))["samples"] > progress["samples"] > 0 and ray.get(actor.doing.remote()) == "nothing"
