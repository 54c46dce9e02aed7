"""More than the cluster has is an error that names both numbers and the way out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.cluster.capacity import (
    Node,
    check_capacity,
    matches,
    worker_nodes,
    worker_resources,
    workers_here,
    workers_on,
    workers_that_fit,
)
from trainkit.errors import CapacityError, UsageError
from trainkit.recipe.schema import Scaling

CPU_NODE = Node({"CPU": 2.0, "memory": 1e9})


def cpu(num_workers: int, **resources: float) -> Scaling:
    return Scaling(num_workers=num_workers, use_gpu=False, resources_per_worker=resources or None)


def on_cpus(num_workers: int, **keys: Any) -> Scaling:
    return Scaling(num_workers=num_workers, use_gpu=False, **keys)


def test_a_worker_takes_what_ray_would_give_it() -> None:
    assert worker_resources(cpu(1)) == {"CPU": 1.0}
    assert worker_resources(Scaling()) == {"CPU": 1.0, "GPU": 1.0}
    assert worker_resources(Scaling(resources_per_worker={"CPU": 4.0})) == {"CPU": 4.0, "GPU": 1.0}
    assert worker_resources(Scaling(resources_per_worker={"GPU": 0.5})) == {"GPU": 0.5}


def test_more_workers_than_cpus_names_both_numbers_and_a_share_that_fits() -> None:
    with pytest.raises(CapacityError, match=r"5 workers × 1 CPU = 5 CPU, and the cluster has 2.*num_workers: 2 .*CPU: 0.4"):
        check_capacity([CPU_NODE], cpu(5), 5)
    check_capacity([CPU_NODE], cpu(5, CPU=0.4), 5)


def test_gpus_where_none_are_points_to_use_gpu_false() -> None:
    with pytest.raises(CapacityError, match=r"3 workers × 1 GPU = 3 GPU, and there are 0 here.*scaling.use_gpu: false"):
        check_capacity([CPU_NODE], Scaling(num_workers=3, resources_per_worker={"CPU": 0.5}), 3)


def test_more_gpus_than_there_are_names_both_numbers() -> None:
    with pytest.raises(CapacityError, match=r"4 workers × 1 GPU = 4 GPU, and the cluster has 2.*num_workers: 2"):
        check_capacity([Node({"CPU": 16.0, "GPU": 2.0})], Scaling(num_workers=4), 4)


def test_halves_on_two_nodes_do_not_make_a_worker() -> None:
    nodes = [Node({"CPU": 3.0}), Node({"CPU": 3.0})]
    check_capacity(nodes, cpu(2, CPU=3.0), 2)
    with pytest.raises(CapacityError, match=r"3 workers of 2 CPU do not fit the cluster's 2 nodes, which have room for 2"):
        check_capacity(nodes, cpu(3, CPU=2.0), 3)


def test_exit_code_of_too_little_is_3() -> None:
    assert CapacityError.exit_code == 3


@given(st.lists(st.integers(0, 64), max_size=5), st.integers(1, 16))
def test_as_many_fit_as_placing_them_one_by_one(nodes: list[int], each: int) -> None:
    free, placed = list(nodes), 0
    for index, cpus in enumerate(free):
        while cpus >= each:
            cpus, placed = cpus - each, placed + 1
        free[index] = cpus
    there = [Node({"CPU": float(cpus)}) for cpus in nodes]
    assert workers_that_fit(there, cpu(1, CPU=float(each)), 400) == placed


def test_the_way_out_fits() -> None:
    for there in (1, 2, 3, 7):
        for num_workers in range(there + 1, 40):
            with pytest.raises(CapacityError) as raised:
                check_capacity([Node({"CPU": float(there)})], cpu(num_workers), num_workers)
            share = float(raised.value.message.rsplit("CPU: ", 1)[1].rstrip("}"))
            check_capacity([Node({"CPU": float(there)})], cpu(num_workers, CPU=share), num_workers)


def test_strict_spread_needs_a_node_for_each_worker() -> None:
    spread = on_cpus(2, placement_strategy="STRICT_SPREAD")
    with pytest.raises(CapacityError, match=r"2 workers of 1 CPU do not fit.*STRICT_SPREAD.*room for 1\. .*num_workers: 1 or .*: SPREAD"):
        check_capacity([CPU_NODE], spread, 2)
    check_capacity([CPU_NODE, CPU_NODE], spread, 2)


def test_strict_pack_needs_one_node_for_all_workers() -> None:
    pack = on_cpus(3, placement_strategy="STRICT_PACK")
    with pytest.raises(CapacityError, match=r"3 workers of 1 CPU do not fit.*2 nodes.*STRICT_PACK.*room for 2\..*strategy: PACK"):
        check_capacity([CPU_NODE, CPU_NODE], pack, 3)
    check_capacity([CPU_NODE, Node({"CPU": 3.0})], pack, 3)


def test_an_accelerator_that_no_node_has_names_those_there_are() -> None:
    nodes = [Node({"CPU": 8.0, "GPU": 8.0, "accelerator_type:A100": 1.0}), Node({"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0})]
    with pytest.raises(CapacityError, match=r"2 workers ask for H100, and 0 of the cluster's 2 nodes have it. Its accelerators: A100, T4"):
        check_capacity(nodes, Scaling(num_workers=2, accelerator_type="H100"), 2)
    with pytest.raises(CapacityError, match="2 workers of 1 CPU, 1 GPU do not fit the cluster's 2 nodes with T4, which have room for 1"):
        check_capacity(nodes, Scaling(num_workers=2, accelerator_type="T4"), 2)
    check_capacity(nodes, Scaling(num_workers=2, accelerator_type="A100"), 2)


@pytest.mark.parametrize(
    ("wanted", "labelled", "unlabelled"),
    [("a", True, False), ("!a", False, True), ("in(a, b)", True, False), ("!in(a)", False, True), ("in(b)", False, False),
     ("!in(b)", True, True), ("!b", True, True)],
)  # fmt: skip
def test_labels_match_as_ray_matches_them(wanted: str, labelled: bool, unlabelled: bool) -> None:
    """Asked of Ray 2.60 with a placement group each."""
    assert matches({"zone": "a"}, {"zone": wanted}) is labelled
    assert matches({}, {"zone": wanted}) is unlabelled


def test_labels_that_no_node_has_name_those_there_are() -> None:
    nodes = [Node({"CPU": 4.0}, {"zone": "a"}), Node({"CPU": 4.0}, {"zone": "b"})]
    with pytest.raises(CapacityError, match=r"zone: c is asked for, and 0 of the cluster's 2 nodes .* there is zone: a, zone: b"):
        check_capacity(nodes, on_cpus(2, label_selector={"zone": "c"}), 2)
    with pytest.raises(CapacityError, match=r"5 workers of 1 CPU .* under scaling.label_selector, which have room for 4"):
        check_capacity(nodes, on_cpus(5, label_selector={"zone": "a"}), 5)
    check_capacity(nodes, on_cpus(5, label_selector={"zone": "in(a, b)"}), 5)


def test_a_list_of_labels_has_one_entry_for_each_worker() -> None:
    nodes = [Node({"CPU": 1.0}, {"zone": "a"}), Node({"CPU": 1.0}, {"zone": "b"})]
    selectors = [{"zone": "in(a,b)"}, {"zone": "a"}]
    check_capacity(nodes, on_cpus(2, label_selector=selectors), 2)
    for check in (lambda: check_capacity(nodes, on_cpus(3, label_selector=selectors), 3),
                  lambda: workers_here({"CPU": 9.0}, on_cpus(3, label_selector=selectors), 3)):  # fmt: skip
        with pytest.raises(UsageError, match=r"scaling.label_selector: the list has 2 entries for 3 workers"):
            check()


@given(st.data())
def test_workers_with_labels_find_as_many_places_as_trying_all(data: st.DataObject) -> None:
    nodes = data.draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc")), min_size=1, max_size=3))
    selectors = data.draw(st.lists(st.sampled_from(["a", "b", "!a", "in(a, c)"]), min_size=1, max_size=4))
    strategy = data.draw(st.sampled_from(["PACK", "STRICT_SPREAD", "STRICT_PACK"]))
    there = [Node({"CPU": float(cpus)}, {"zone": zone}) for cpus, zone in nodes]
    scaling = on_cpus(len(selectors), label_selector=[{"zone": value} for value in selectors], placement_strategy=strategy)
    best = 0
    for places in itertools.product([None, *range(len(nodes))], repeat=len(selectors)):
        taken = [place for place in places if place is not None]
        holds = all(taken.count(i) <= (min(cpus, 1) if strategy == "STRICT_SPREAD" else cpus) for i, (cpus, _) in enumerate(nodes))
        labels = all(place is None or matches(there[place].labels, {"zone": value}) for place, value in zip(places, selectors, strict=True))
        if holds and labels and (strategy != "STRICT_PACK" or len(set(taken)) <= 1):
            best = max(best, len(taken))
    assert workers_that_fit(there, scaling, len(selectors)) == best


def test_operators_are_needed_only_where_a_worker_can_come_to_run() -> None:
    nodes = [Node({"CPU": 0.0}, name="head"), Node({"CPU": 4.0}, {"zone": "a"}), Node({"CPU": 4.0}, {"zone": "b"})]
    assert worker_nodes(nodes, on_cpus(2), 2) == nodes[1:]
    assert worker_nodes(nodes, on_cpus(2, label_selector={"zone": "b"}), 2) == nodes[2:]


def test_an_elastic_run_takes_the_room_that_there_is() -> None:
    elastic = on_cpus(4).model_copy(update={"num_workers": [2, 4]})
    assert [workers_on([Node({"CPU": float(cpus)})], elastic, 4) for cpus in (2, 3, 4, 9)] == [2, 3, 4, 4]
    assert workers_on([Node({"CPU": 9.0})], elastic, 3) == 3, "fewer than the most, when those found no place"
    assert workers_here({"CPU": 3.0, "GPU": 0.0}, elastic, 4) == 3
    with pytest.raises(CapacityError, match="2 workers"):
        workers_on([Node({"CPU": 1.0})], elastic, 4)
    assert workers_on([Node({"CPU": 9.0})], on_cpus(4), 4) == 4
    with pytest.raises(CapacityError, match="4 workers"):
        workers_on([Node({"CPU": 3.0})], on_cpus(4), 4)


def test_what_ray_will_find_here_is_not_missed_before_it_runs() -> None:
    asked = Scaling(use_gpu=False, resources_per_worker={"memory": 1e9, "mine": 1}, accelerator_type="H100", label_selector={"a": "b"})
    workers_here({"CPU": 1.0, "GPU": 0.0}, asked, 1)
    with pytest.raises(CapacityError, match="STRICT_SPREAD"):
        workers_here({"CPU": 2.0}, on_cpus(2, placement_strategy="STRICT_SPREAD"), 2)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (cpu(1, GPU=1), "use_gpu is false, and resources_per_worker asks for 1 GPU"),
        (Scaling(resources_per_worker={"GPU": 0}), "use_gpu is true, and resources_per_worker asks for 0 GPU"),
        (cpu(1, CPU=0), "a worker must take a part of something"),
    ],
)
def test_what_no_cluster_could_satisfy_is_a_fault_of_the_recipe(scaling: Scaling, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_capacity([Node({"CPU": 8.0, "GPU": 8.0})], scaling, 1)
