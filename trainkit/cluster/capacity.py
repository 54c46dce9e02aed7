"""Does the cluster have what the workers ask for? Arithmetic on Ray's resource numbers, before anything waits for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainkit.errors import CapacityError
from trainkit.recipe.schema import Scaling

Resources = Mapping[str, float]


def worker_resources(scaling: Scaling) -> dict[str, float]:
    """What one worker takes, as in Ray's ScalingConfig: one CPU, and one GPU where GPUs are used, unless the recipe says otherwise."""
    standard = {"CPU": 1.0, "GPU": 1.0} if scaling.use_gpu else {"CPU": 1.0}
    return standard | (scaling.resources_per_worker or {})


def workers_that_fit(nodes: Sequence[Resources], worker: Resources) -> int:
    """A worker lives on one node, so two halves of a free node do not make a whole one."""
    asked = {name: amount for name, amount in worker.items() if amount > 0}
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items()) for node in nodes)


def check_capacity(nodes: Sequence[Resources], scaling: Scaling, num_workers: int) -> None:
    """Raises CapacityError, with the number asked for and the number there, if the workers can never all start."""
    worker = worker_resources(scaling)
    if workers_that_fit(nodes, worker) >= num_workers:
        return
    for name, amount in worker.items():
        there = sum(node.get(name, 0) for node in nodes)
        if amount * num_workers > there + 1e-9:
            raise _too_few(name, amount, num_workers, there)
    fit = workers_that_fit(nodes, worker)
    each = ", ".join(f"{amount:g} {name}" for name, amount in worker.items())
    raise CapacityError(
        f"scaling.num_workers: {num_workers} workers of {each} do not fit the cluster's {len(nodes)} nodes, which have room for {fit}. "
        f"Write scaling.num_workers: {fit} or ask for less per worker"
    )


def _too_few(name: str, amount: float, num_workers: int, there: float) -> CapacityError:
    asked = f"{num_workers} workers × {amount:g} {name} = {amount * num_workers:g} {name}"
    if name == "GPU" and there == 0:
        return CapacityError(f"scaling: the recipe asks for {asked}, and there are 0 here. Write scaling.use_gpu: false to train on CPUs")
    ways = [f"scaling.num_workers: {int(there / amount)}"] if there >= amount else []
    if name == "CPU" and amount > 0:
        ways.append(f"scaling.resources_per_worker: {{CPU: {_share(there, num_workers):g}}}")
    way = " or ".join(ways) or "scaling.resources_per_worker without it"
    return CapacityError(f"scaling: the recipe asks for {asked}, and the cluster has {there:g}. Write {way}")


def _share(there: float, num_workers: int) -> float:
    """A whole number of CPUs each where that is possible, else a fraction that fits."""
    each = there / num_workers
    return float(int(each)) if each >= 1 else int(each * 100) / 100
