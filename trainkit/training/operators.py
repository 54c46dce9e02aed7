"""DeepSpeed's compiled operators, built once per machine before any worker needs them.

Left to the workers, a build that is killed leaves a lock file on which every later run waits for ever. Here one process builds at a time,
under a lock that ends with it, and a torch lock file that nobody works behind is removed first.

    python -m trainkit.training.operators cpu_adam      # builds, in a process of its own: DeepSpeed stays out of the command's
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from torch.utils import cpp_extension

from trainkit.planning.plan import Plan

BUILDERS = {"deepspeed_shm_comm": "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder"}


def needed(plan: Plan) -> list[str]:
    """Operators that DeepSpeed loads for this plan: gloo's shortcut through shared memory, the optimizer of the CPU."""
    on_cpu = [] if plan.use_gpu else ["deepspeed_shm_comm"]
    return [*on_cpu, "cpu_adam"] if plan.offload_optimizer else on_cpu


def missing(names: Sequence[str]) -> list[str]:
    """Those that are not built on this machine, or whose build was broken off."""
    return [name for name in names if not (_folder(name) / f"{name}.so").exists() or (_folder(name) / "lock").exists()]


def build_missing(names: Sequence[str], log: Path) -> bool:
    """Build on this machine what is missing, in a process of its own; False if that failed.

    Its output, the compiler's errors included, goes to `log`. The ninja that lies beside this Python is found whatever PATH says.
    """
    wanted = missing(names)
    if not wanted:
        return True
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", __name__, *wanted]
    with log.open("wb") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path}, check=False).returncode == 0


def build(names: Sequence[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    with (_folder(names[0]).parent / ".trainkit-lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            remove_stale_lock(_folder(name))
            get_accelerator().create_op_builder(BUILDERS[name]).load(verbose=False)


def remove_stale_lock(folder: Path) -> None:
    """Remove torch's lock file unless a process (ninja, the compiler) works in the folder."""
    if (folder / "lock").exists() and not _somebody_works_in(folder):
        (folder / "lock").unlink(missing_ok=True)


def _somebody_works_in(folder: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):
            continue
    return False


def _folder(name: str) -> Path:
    """Where torch builds the extension; torch makes the folder."""
    return Path(cpp_extension._get_build_directory(name, verbose=False)).resolve()


if __name__ == "__main__":
    build(sys.argv[1:])
