"""Ray for the length of one command: the environment it runs in, joined or started, and ended so that no process stays behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

from trainkit.cluster.capacity import Node, worker_resources
from trainkit.cluster.hardware import cpu_count
from trainkit.cluster.signals import Signals
from trainkit.errors import TrainingError, UsageError, first_line
from trainkit.recipe.schema import Recipe

_OBJECT_STORE_BYTES = 512 * 2**20  # batches on their way are small; /dev/shm often is, too
_PROBE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_SHARES = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
_OWN_BIN = str(Path(sys.executable).parent)


def cluster_address(address: str | None) -> str | None:
    """--address, else RAY_ADDRESS, else None: a bare ray.init() would join whatever cluster runs on this machine.

    Raises UsageError for what is no address and for one where nobody answers: Ray itself tries for minutes.
    """
    given = address or os.environ.get("RAY_ADDRESS") or "local"
    if given in ("local", "auto"):
        return None if given == "local" else given
    said, (host, _, port) = f"{'--address' if address else 'RAY_ADDRESS'} {given}", given.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"{said}: write the head node as host:port, for example 10.0.0.1:6379, or auto for the cluster of this machine")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except (OSError, UnicodeError, OverflowError) as error:  # no name of a host, no port
        raise UsageError(f"{said}: nobody answers there: {getattr(error, 'strerror', None) or error}") from None
    return given


def environment_settings(recipe: Recipe, local: bool) -> dict[str, str]:
    """Every environment variable that a run sets, here and for the workers; one that the user has set stays as it is."""
    settings = {
        "OMP_NUM_THREADS": str(max(1, int(worker_resources(recipe.scaling).get("CPU", 1)))),  # the worker's share, not all cores each
        "TOKENIZERS_PARALLELISM": "false",  # workers tokenize nothing; avoids the warning about forks
        "HF_HUB_DISABLE_TELEMETRY": "1",  # nobody is told what is trained
        "RAY_USAGE_STATS_ENABLED": "0",  # the same for Ray
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a dead rank is seen after 0.2 s instead of 2
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # a hung node after 2 minutes instead of 10
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _start_seconds(recipe),  # others' jobs get this long to free what they hold
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less: the driver itself looks for nodes that will go away
        "RAY_TRAIN_METRICS_ENABLED": "0",  # Ray's own dashboards are not started
        "RAY_prestart_worker_first_driver": "0",  # no idle Python for each core, which would hold up the few processes that are needed
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning about GPUs that an actor without GPUs could see
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call that comes after the end of a session starts no Ray of its own
    }
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        settings["RAY_COLOR_PREFIX"] = "0"  # Ray colours the prefixes of workers' lines without asking where they go
    if recipe.model.compile is not False:
        kept = Path(recipe.run.storage_path).absolute() / ".cache" / "compiled"
        settings["TORCHINDUCTOR_CACHE_DIR"] = str(kept)  # the next run compiles nothing anew
    if recipe.train.deterministic:
        settings["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may add in another order each time
    if recipe.scaling.use_gpu:
        settings["NCCL_GRAPH_REGISTER"] = "0"  # it has all ranks talk while one captures a CUDA graph
    else:
        settings["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it sees
    if local and (token := _own_token()) is not None:
        settings["RAY_AUTH_MODE"] = "token"  # other users of this machine cannot send tasks to this Ray
        settings["RAY_AUTH_TOKEN"] = token  # inherited and never written to a file
    return settings


def _start_seconds(recipe: Recipe) -> str:
    """An elastic run goes on with fewer workers instead of waiting long: the nodes that are large enough for them may just have died."""
    return "20" if isinstance(recipe.scaling.num_workers, list) else "300"


@functools.cache
def _own_token() -> str | None:
    """Of this process: Ray reads it once. None if Ray was imported before: it has read its token, one for all runs of this user."""
    return None if "ray" in sys.modules else secrets.token_hex(32)


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set what is not set, and put the folder of this Python first on PATH: operators are built with the ninja that lies there."""
    before = dict(os.environ)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    os.environ["PATH"] = os.pathsep.join([_OWN_BIN, os.environ.get("PATH", "")])
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def undivided(settings: dict[str, str]) -> Iterator[None]:
    """Take back, in this process, what makes a worker keep to its share of the processors: the driver tokenizes with all of them."""
    shares = {name: os.environ.pop(name) for name in _SHARES if os.environ.get(name) == settings[name]}
    try:
        yield
    finally:
        os.environ.update(shares)


def job_environment(settings: dict[str, str]) -> dict[str, str]:
    """What the processes of a joined cluster get: the user's value where there is one, ours elsewhere. Each node puts in its own PATH."""
    return {name: os.environ.get(name, value) for name, value in settings.items()} | {"PATH": f"{_OWN_BIN}{os.pathsep}${{PATH}}"}


@contextlib.contextmanager
def ray_session(address: str | None, settings: dict[str, str], verbose: bool, signals: Signals) -> Iterator[list[Node]]:
    """Ray, joined or started; gives its living nodes. At the end no process of ours stays behind."""
    import ray

    resource_tracker.ensure_running()  # of Python's process pools: it lives as long as this process
    already = set(psutil.Process().children(recursive=True))
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
        else:
            _join(address, settings, verbose)
        signals.install()
        yield living_nodes()
    finally:
        with signals.ignored():
            ours = [process for process in psutil.Process().children(recursive=True) if process not in already]
            ray.shutdown()
            end_processes(ours)


def _join(address: str, settings: dict[str, str], verbose: bool) -> None:
    import ray

    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": job_environment(settings)},
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--address {address}: no Ray cluster can be joined: {first_line(error)}") from None


def living_nodes() -> list[Node]:
    """Of the joined or started Ray, without those that will go away."""
    import ray

    leaving = draining_nodes()
    return [
        Node(node["Resources"], node["Labels"], name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", id=node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray was told will go away (`ray drain-node`, a cloud's notice). Ray has no public function for it."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


@dataclass(frozen=True)
class Head:
    """The processes of a local Ray without which nothing goes on, and where its gcs_server listens."""

    processes: Sequence[psutil.Process]
    address: tuple[str, int]

    @classmethod
    def found(cls) -> Head:
        """Of the Ray that this process has started; without processes when it has joined a cluster."""
        import ray

        processes = [process for process in psutil.Process().children() if process.name() in ("gcs_server", "raylet")]
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        return cls(processes, (host.strip("[]"), int(port)))

    def check(self) -> None:
        """Raises TrainingError when one has ended, or answers no more: Ray itself would wait a minute for it and then end this process."""
        if any(map(_ended, self.processes)) or (self.processes and _refuses(self.address)):
            raise TrainingError("a process of the local Ray was ended from outside, and the run with it", from_outside=True)


def _ended(process: psutil.Process) -> bool:
    """A zombie has ended, whoever has yet to take note of it: where the first process reaps nobody, that may be never."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _refuses(address: tuple[str, int]) -> bool:
    """As a gcs_server does that was told to end: it closes its port and, with workers connected, stays."""
    try:
        socket.create_connection(address, timeout=_PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # says nothing against it
        pass
    return False


def end_processes(processes: Sequence[psutil.Process], seconds: float = 5) -> None:
    """Give processes some time to end by themselves, then end them."""
    for process in _outlasting(processes, seconds):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _outlasting(processes, 5)
    psutil.wait_procs(processes, timeout=0)  # no zombies of ours are left


def _outlasting(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if not _ended(process)]) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return alive
