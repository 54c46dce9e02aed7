"""Can the workers ever start on these nodes? Arithmetic on what Ray shows of them, before anything waits for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainkit.errors import CapacityError, UsageError
from trainkit.recipe.schema import Scaling

_ACCELERATOR = "accelerator_type:"  # Ray's prefix: a node with an H100 has 1.0 of accelerator_type:H100, a worker takes a thousandth


@dataclass(frozen=True)
class Node:
    """A machine as Ray shows it: all that it has, not what is free of it."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = "this machine"
    id: str = ""


def worker_resources(scaling: Scaling) -> dict[str, float]:
    """What one worker takes: one CPU, and one GPU where GPUs are used. What the recipe says counts instead, with a GPU, as in Ray's
    ScalingConfig."""
    given = {"CPU": 1.0} if scaling.resources_per_worker is None else scaling.resources_per_worker
    return given | ({"GPU": given.get("GPU", 1.0)} if scaling.use_gpu else {})


def label_selectors(scaling: Scaling, num_workers: int) -> list[Mapping[str, str]]:
    """The labels that each worker's node must have. Raises UsageError for a list of another length than the workers."""
    asked = scaling.label_selector or {}
    if isinstance(asked, Mapping):
        return [asked] * num_workers
    if len(asked) != num_workers:
        raise UsageError(f"scaling.label_selector: the list has {len(asked)} entries for {num_workers} workers. Write one for each worker")
    return list(asked)


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's selectors: `value`, `in(a, b)`, and either with `!` in front, which a node without the label satisfies."""
    return all((labels.get(key) in _values(wanted)) != wanted.startswith("!") for key, wanted in selector.items())


def room(node: Node, scaling: Scaling) -> int:
    """How many workers the node can hold, labels aside."""
    asked = _with_accelerator(scaling)
    return min(int(node.resources.get(name, 0) / amount + 1e-9) for name, amount in asked.items() if amount > 0)


def workers_that_fit(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> int:
    """The most of `num_workers` that can run at once. A worker lives on one node, so two halves of a free node do not make a whole one."""
    selectors = label_selectors(scaling, num_workers)
    rooms = [room(node, scaling) for node in nodes]
    if scaling.placement_strategy == "STRICT_PACK":
        wanted = [sum(matches(node.labels, selector) for selector in selectors) for node in nodes]
        return max(map(min, rooms, wanted), default=0)
    if scaling.placement_strategy == "STRICT_SPREAD":
        rooms = [min(room, 1) for room in rooms]
    return _most_placed([[i for i, node in enumerate(nodes) if matches(node.labels, selector)] for selector in selectors], rooms)


def worker_nodes(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> list[Node]:
    """Those on which a worker can come to run."""
    selectors = label_selectors(scaling, num_workers)
    return [node for node in nodes if room(node, scaling) and any(matches(node.labels, selector) for selector in selectors)]


def workers_here(resources: Mapping[str, float], scaling: Scaling, num_workers: int) -> int:
    """`workers_on` for a Ray that is still to be started here: only then are memory, accelerator types and labels known."""
    label_selectors(scaling, num_workers)
    here = scaling.model_copy(update={"accelerator_type": None, "label_selector": None})
    enough = {name: amount * num_workers for name, amount in worker_resources(scaling).items()}
    return workers_on([Node(enough | dict(resources))], here, num_workers)


def workers_on(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> int:
    """How many workers to start: `num_workers`, or of an elastic run as many of them as there is room for.

    Raises CapacityError or UsageError as `check_capacity` does.
    """
    count = num_workers
    if isinstance(scaling.num_workers, list):
        _check_worker(scaling)
        count = max(scaling.num_workers[0], workers_that_fit(nodes, scaling, num_workers))
    check_capacity(nodes, scaling, count)
    return count


def check_capacity(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> None:
    """Raises CapacityError, with the number asked for and the number there, if the workers can never all start.

    Raises UsageError for a scaling that no cluster could satisfy.
    """
    _check_worker(scaling)
    fit = workers_that_fit(nodes, scaling, num_workers)
    if fit >= num_workers:
        return
    _check_names(nodes, scaling, num_workers)
    _check_sums(nodes, scaling, num_workers)
    each = ", ".join(f"{amount:g} {name}" for name, amount in worker_resources(scaling).items())
    raise CapacityError(
        f"scaling.num_workers: {num_workers} workers of {each} do not fit the cluster's {len(nodes)} nodes{_restriction(scaling)}, "
        f"which have room for {fit}. {_way_out(nodes, scaling, num_workers, fit)}"
    )


def _with_accelerator(scaling: Scaling) -> dict[str, float]:
    accelerator = {f"{_ACCELERATOR}{scaling.accelerator_type}": 0.001} if scaling.accelerator_type else {}
    return worker_resources(scaling) | accelerator


def _values(wanted: str) -> list[str]:
    bare = wanted.removeprefix("!")
    return [value.strip() for value in bare[3:-1].split(",")] if bare.startswith("in(") and bare.endswith(")") else [bare]


def _most_placed(choices: Sequence[Sequence[int]], rooms: Sequence[int]) -> int:
    """The most workers that find a place when worker w may go to the nodes choices[w] and node i holds rooms[i] (augmenting paths)."""
    held: list[list[int]] = [[] for _ in rooms]

    def place(worker: int, seen: set[int]) -> bool:
        for node in choices[worker]:
            if node in seen or not rooms[node]:
                continue
            seen.add(node)
            if len(held[node]) < rooms[node]:
                held[node].append(worker)
                return True
            for index, other in enumerate(held[node]):
                if place(other, seen):
                    held[node][index] = worker
                    return True
        return False

    return sum(place(worker, set()) for worker in range(len(choices)))


def _check_worker(scaling: Scaling) -> None:
    """Raises UsageError for what Ray itself refuses, in words of its own and after it was started."""
    worker = worker_resources(scaling)
    gpus = worker.get("GPU", 0)
    if gpus and not scaling.use_gpu:
        raise UsageError(f"scaling: use_gpu is false, and resources_per_worker asks for {gpus:g} GPU. Write use_gpu: true, or no GPU there")
    if scaling.use_gpu and not gpus:
        raise UsageError("scaling: use_gpu is true, and resources_per_worker asks for 0 GPU. Write use_gpu: false or GPU: 1")
    if not any(worker.values()):
        raise UsageError("scaling.resources_per_worker: a worker must take a part of something. Write {CPU: 0.1}")


def _check_names(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> None:
    """Raises CapacityError for an accelerator or labels that no node has."""
    there = sorted({name.removeprefix(_ACCELERATOR) for node in nodes for name in node.resources if name.startswith(_ACCELERATOR)})
    if scaling.accelerator_type and scaling.accelerator_type not in there:
        raise CapacityError(
            f"scaling.accelerator_type: {num_workers} workers ask for {scaling.accelerator_type}, and 0 of the cluster's {len(nodes)} "
            f"nodes have it. Its accelerators: {', '.join(there) or 'none'}"
        )
    for selector in label_selectors(scaling, num_workers):
        if not any(matches(node.labels, selector) for node in nodes):
            labels = sorted({f"{key}: {node.labels[key]}" for node in nodes for key in selector if key in node.labels})
            raise CapacityError(
                f"scaling.label_selector: {_written(selector)} is asked for, and 0 of the cluster's {len(nodes)} nodes have that. "
                f"Of these labels there is {', '.join(labels) or 'none'}"
            )


def _check_sums(nodes: Sequence[Node], scaling: Scaling, num_workers: int) -> None:
    """Raises CapacityError for a resource of which the whole cluster has too little."""
    for name, amount in worker_resources(scaling).items():
        there = sum(node.resources.get(name, 0) for node in nodes)
        if amount * num_workers > there + 1e-9:
            raise _too_few(name, amount, num_workers, there)


def _restriction(scaling: Scaling) -> str:
    """What the recipe says of the nodes, in words that follow "the cluster's nodes"."""
    strategy = {"STRICT_PACK": " (STRICT_PACK: all on one node)", "STRICT_SPREAD": " (STRICT_SPREAD: one on each node)"}
    accelerator = f" with {scaling.accelerator_type}" if scaling.accelerator_type else ""
    labels = " under scaling.label_selector" if scaling.label_selector else ""
    return accelerator + labels + strategy.get(scaling.placement_strategy, "")


def _way_out(nodes: Sequence[Node], scaling: Scaling, num_workers: int, fit: int) -> str:
    soft = scaling.placement_strategy.removeprefix("STRICT_")
    softly = workers_that_fit(nodes, scaling.model_copy(update={"placement_strategy": soft}), num_workers)
    ways = [f"scaling.num_workers: {fit}"] if fit else []
    if softly >= num_workers:
        ways.append(f"scaling.placement_strategy: {soft}")
    return f"Write {' or '.join(ways)}" if ways else "Ask for less per worker"


def _written(selector: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in selector.items())


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
