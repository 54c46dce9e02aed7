"""DeepSpeed's compiled operators, made on every node before a worker needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cluster.capacity import Node
from trainkit.cluster.progress import Display, View
from trainkit.errors import UsageError

if TYPE_CHECKING:
    from trainkit.cluster.launch import Launch

_LOOK_SECONDS = 0.2


def build_operators(nodes: Sequence[Node], asked: Launch, display: Display, check: Callable[[], None]) -> None:
    """Compile what DeepSpeed will load, on every node where a worker can come to run, before a worker needs it.

    Raises UsageError, with the node's name, if that fails on one of them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from trainkit.training import operators

    needed = operators.needed(asked.plan)
    names = needed if asked.address else operators.missing(needed)  # of other machines only a task there can know
    if not names:
        return
    build, logs = ray.remote(num_cpus=0, max_retries=0)(operators.build_missing), asked.folder.ray
    tasks = {
        build.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(names, _log(logs, node)): node
        for node in nodes
    }
    waiting, began = list(tasks), time.monotonic()
    with display:
        while waiting:
            display.show(View("preparing DeepSpeed's operators, compiled once per machine,", time.monotonic() - began))
            check()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK_SECONDS)
    for task, node in tasks.items():
        _check_built(task, node, names, _log(logs, node))


def _log(folder: Path, node: Node) -> Path:
    return folder / f"operators-{node.id[:8]}.log"


def _check_built(task: Any, node: Node, names: Sequence[str], log: Path) -> None:
    import ray

    try:
        built = ray.get(task)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise UsageError(
            f"node {node.name}: DeepSpeed's {', '.join(names)} cannot be built there: {type(cause).__name__}: {cause}"
        ) from error
    if not built:
        raise UsageError(
            f"node {node.name}: DeepSpeed's {', '.join(names)} cannot be compiled: g++ and the Python headers are needed. "
            f"The compiler says: {log}"
        )
