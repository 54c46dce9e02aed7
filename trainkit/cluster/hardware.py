"""What this machine and this installation are: for the plan, for the capacity check, for environment.json."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from trainkit.planning.facts import Hardware

_PACKAGES = ("trainkit", "torch", "ray", "deepspeed", "transformers", "datasets", "accelerate", "peft", "tokenizers", "numpy")


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_names() -> list[str]:
    """Of the GPUs that torch sees here."""
    import torch

    return [torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())]


def worker_device(use_gpu: bool, gpu_memory_bytes: int | None = None) -> Hardware:
    """The device of one worker as far as this machine shows it; `gpu_memory_bytes` plans for a GPU that is elsewhere."""
    import torch

    if not use_gpu:
        return Hardware("cpu", "CPU", None)
    if gpu_memory_bytes is not None:
        return Hardware("cuda", "GPU", gpu_memory_bytes)
    if torch.cuda.device_count() == 0:
        return Hardware("cuda", "GPU", None)
    properties = torch.cuda.get_device_properties(0)
    return Hardware("cuda", properties.name, properties.total_memory, has_bf16=properties.major >= 8, has_nvlink=_has_nvlink())


def _has_nvlink() -> bool:
    """Whether the first GPU here says that it is linked to others."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):  # no driver library here, or a GPU without links
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetNvLinkState(pynvml.nvmlDeviceGetHandleByIndex(0), 0))
    return False


def local_resources() -> dict[str, float]:
    """What a Ray started on this machine has to give."""
    return {"CPU": float(cpu_count()), "GPU": float(len(gpu_names()))}


def oom_kills(events: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    """Processes of this machine or container that the kernel has ended for want of memory; 0 where it does not say (no cgroup v2)."""
    try:
        return int(dict(line.split() for line in events.read_text("utf-8").splitlines())["oom_kill"])
    except (OSError, ValueError, KeyError):
        return 0


def environment() -> dict[str, Any]:
    """Versions and machine, for the run folder. No environment variables, no user, no paths: none of them belongs in a file to share."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "git_commit": _git("rev-parse", "HEAD") or None,
        "git_dirty": None if (changed := _git("status", "--porcelain")) is None else changed != "",
        "platform": platform.platform(),
        "cpu_count": cpu_count(),
        "gpus": gpu_names(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*question: str) -> str | None:
    """Git's answer on the checkout that trainkit runs from; None for an installed package, without git, or where git refuses."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "-C", str(root), *question], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
