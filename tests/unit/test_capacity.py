"""More than the cluster has is an error that names both numbers and the way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.cluster.capacity import check_capacity, worker_resources, workers_that_fit
from trainkit.errors import CapacityError
from trainkit.recipe.schema import Scaling

CPU_NODE = {"CPU": 2.0, "memory": 1e9}


def cpu(num_workers: int, **resources: float) -> Scaling:
    return Scaling(num_workers=num_workers, use_gpu=False, resources_per_worker=resources or None)


def test_a_worker_takes_what_ray_would_give_it() -> None:
    assert worker_resources(cpu(1)) == {"CPU": 1.0}
    assert worker_resources(Scaling()) == {"CPU": 1.0, "GPU": 1.0}
    assert worker_resources(Scaling(resources_per_worker={"CPU": 4.0})) == {"CPU": 4.0, "GPU": 1.0}


def test_more_workers_than_cpus_names_both_numbers_and_a_share_that_fits() -> None:
    with pytest.raises(CapacityError, match=r"5 workers × 1 CPU = 5 CPU, and the cluster has 2.*num_workers: 2 .*CPU: 0.4"):
        check_capacity([CPU_NODE], cpu(5), 5)
    check_capacity([CPU_NODE], cpu(5, CPU=0.4), 5)


def test_gpus_where_none_are_points_to_use_gpu_false() -> None:
    with pytest.raises(CapacityError, match=r"3 workers × 1 GPU = 3 GPU, and there are 0 here.*scaling.use_gpu: false"):
        check_capacity([CPU_NODE], Scaling(num_workers=3, resources_per_worker={"CPU": 0.5}), 3)


def test_more_gpus_than_there_are_names_both_numbers() -> None:
    with pytest.raises(CapacityError, match=r"4 workers × 1 GPU = 4 GPU, and the cluster has 2.*num_workers: 2"):
        check_capacity([{"CPU": 16.0, "GPU": 2.0}], Scaling(num_workers=4), 4)


def test_halves_on_two_nodes_do_not_make_a_worker() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
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
    assert workers_that_fit([{"CPU": float(cpus)} for cpus in nodes], {"CPU": float(each)}) == placed


def test_the_way_out_fits() -> None:
    for there in (1, 2, 3, 7):
        for num_workers in range(there + 1, 40):
            with pytest.raises(CapacityError) as raised:
                check_capacity([{"CPU": float(there)}], cpu(num_workers), num_workers)
            share = float(raised.value.message.rsplit("CPU: ", 1)[1].rstrip("}"))
            check_capacity([{"CPU": float(there)}], cpu(num_workers, CPU=share), num_workers)
