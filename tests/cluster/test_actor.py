"""The DataDistributor as a Ray actor: killed while it serves, one on each node that sees the data."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from runs_under_test import ROOT, actors_in, environment, family, planted_path, started, waited_for

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

RUN = ["--set", "data.eval=null", "--set", "train.metrics=[]", "--set", "batch.samples=32"]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killing_the_actor_changes_nothing(tmp_path: Path, kills: int) -> None:
    """Losses, gradient norms and the hash of the trained samples are bit-identical to an undisturbed run's.

    The ranks fetch so little ahead that each actor has steps left to hand out; else the first would have handed out all in a second.
    """
    left, killed_at, num_steps = {}, [], 12 * kills + 16
    command = [*RUN, "--set", f"train.max_steps={num_steps}", "--verbose"]
    planted = {"STEPS_AHEAD": "2", "PYTHONPATH": planted_path()}
    for name, times in (("undisturbed", 0), ("disturbed", kills)):
        folder, rng = RunFolder(tmp_path / name / "it"), random.Random(0)
        moments = sorted(rng.randrange(num_steps // 2) for _ in range(times))  # steps
        with started(tmp_path / name, command, **planted) as process:
            for moment in moments:
                killed_at.append(_killed(process, folder, moment, rng.uniform(0.0, 0.1)))
            out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        table = [line.split() for line in out[out.index("handed out ahead of training by the DataDistributor:") :].splitlines()[2:4]]
        assert [line[:2] + line[3:4] for line in table] == [[str(rank), str(num_steps), "0"] for rank in (0, 1)]
        handed = sum(int(line[2].replace(",", "")) for line in table)  # samples, by the last actor
        assert handed == 32 * num_steps if name == "undisturbed" else 0 < handed < 32 * num_steps
        left[name] = [(step["loss"], step["grad_norm"], step["lr"], step["order"]) for step in folder.read_steps()]
    assert len(left["undisturbed"]) == num_steps and left["disturbed"] == left["undisturbed"]
    assert sum(0 < steps < num_steps for steps in killed_at) >= kills // 2, "while it was training"


def _killed(process: subprocess.Popen[str], folder: RunFolder, step: int, later: float) -> int:
    """Kill the actor some seconds after a step is done: the steps done then."""
    waited_for(lambda: len(folder.read_steps()) >= step, 200)  # the start of Ray and of the workers included
    (actor,) = waited_for(lambda: actors_in(family(process)))
    time.sleep(later)
    actor.kill()
    actor.wait(10)
    return len(folder.read_steps())


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
    assert make_distributors(feedings, []).of_node == {}
    found = make_distributors(feedings, [two_nodes, ray.get_runtime_context().get_node_id()])
    assert set(found.of_node) == {two_nodes} and found.nearest() is found.of_driver
    hand = ray.remote(num_cpus=0)(lambda found, folder: sorted(found.rows_at_hand(folder) or {}))
    there = NodeAffinitySchedulingStrategy(two_nodes, soft=False)
    assert ray.get(hand.options(scheduling_strategy=there).remote(found, str(tmp_path / "tokens"))) == ["input_ids", "labels"]
    alone = make_distributors(feedings, [])
    assert ray.get(hand.options(scheduling_strategy=there).remote(alone, str(tmp_path / "tokens"))) == [], "nobody has looked there"
    assert sorted(alone.rows_at_hand(str(tmp_path / "tokens")) or {}) == ["input_ids", "labels"]
    assert alone.rows_at_hand(str(tmp_path / "gone")) is None
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
    assert make_distributors(feeding(tmp_path / "tokens"), [two_nodes]).of_node == {}


def test_nodes_that_do_not_answer_cost_one_deadline_together(two_nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(DataDistributor):
        def manifests(self) -> dict[str, dict[str, Any]]:
            time.sleep(60)
            return super().manifests()

    make = distributor.make_distributor
    silent = ["one", "two", "three"]

    def make_there(feedings: dict[str, Feeding], node: str | None = None):  # type: ignore[no-untyped-def]
        with monkeypatch.context() as patch:
            patch.setattr(distributor, "DataDistributor", Silent if node in silent else DataDistributor)
            return make(feedings, two_nodes if node else None)

    monkeypatch.setattr(distributor, "make_distributor", make_there)
    began = time.monotonic()
    found = make_distributors(feeding(tmp_path / "tokens"), ["answers", *silent], timeout=15.0)
    assert set(found.of_node) == {"answers"} and time.monotonic() - began < 40


def test_ray_data_encodes_the_same_tokens(two_nodes: str, tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes/quickstart.yaml", ["data.train=train[:300]", f"run.storage_path={tmp_path}"])
    here = prepare(recipe)
    alone = TokenArrays.open(here.train)
    before = [alone.by_column[name].select(np.arange(alone.rows)).gather().tolist() for name in ("input_ids", "labels")]
    shutil.rmtree(here.train)
    spread = prepare(recipe, spread=by_ray_data)
    arrays = TokenArrays.open(spread.train)
    assert spread == here and arrays.manifest == alone.manifest
    assert [arrays.by_column[name].select(np.arange(arrays.rows)).gather().tolist() for name in ("input_ids", "labels")] == before
    with pytest.raises(DataError, match="row 7"):
        list(by_ray_data(Encoder(recipe, _with_a_null(7), None, None), range(0, 10, 5)))


def _with_a_null(row: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"question": None if number == row else "q", "sql": "s"} for number in range(10)])


def test_progress_is_counted_by_rank_and_names_the_slowest(two_nodes: str, tmp_path: Path) -> None:
    actor = distributor.make_distributor(feeding(tmp_path / "tokens"))
    ray.get([actor.steps.remote("train", 1, 8, 0), actor.steps.remote("train", 1, 2, 1)])
    progress = ray.get(actor.get_progress.remote(1))
    assert (progress["steps"], progress["steps_behind"], progress["slowest_rank"]) == (2, 6, 1)
    assert ray.get(actor.get_progress.remote(0))["samples"] > progress["samples"] > 0
    behind = "rank 1 is furthest behind: it was handed train steps up to 2, others up to 8"
    assert distributor.activity_of(actor, timeout=10) == f"is idle; {behind}"


def test_the_ranks_of_all_actors_that_answer_are_told(two_nodes: str, tmp_path: Path) -> None:
    found = make_distributors(feeding(tmp_path / "tokens"), [two_nodes])
    ray.get([found.of_driver.steps.remote("train", 1, 8, 0), found.of_node[two_nodes].steps.remote("train", 1, 2, 1)])
    assert {rank: handed.last_step for rank, handed in found.handed_to("train", 10).items()} == {0: 8, 1: 2}
    ray.kill(found.of_node[two_nodes])
    with pytest.raises(ray.exceptions.RayActorError):  # ray.kill only asks for it
        while True:
            ray.get(found.of_node[two_nodes].doing.remote())
    assert set(found.handed_to("train", 10)) == {0}
