"""Start a script as the ranks of one process group on this machine, without Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(script: Path, arguments: list[str], world_size: int, logs: Path, timeout: float, **environment: str) -> None:
    """Run `script` in `world_size` processes to their end. A rank that fails shows the end of every rank's log; none stays behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    shared |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    files = [logs / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file.open("w"), stderr=subprocess.STDOUT,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, "\n".join(file.read_text()[-3000:] for file in files)
