"""Faults that no signal makes, planted into the processes of a run: put this folder on PYTHONPATH.

PLANTED="hang:1:12 oom:0:20" makes rank 1 stand still in step 12's update and rank 0 run out of memory in step 20's, once each; that is
remembered in the folder PLANTED_DONE. HANG_SECONDS shortens what the driver waits. ROWS_WAIT_FOR is a file without which no row is
tokenized. STEPS_AHEAD is how many steps a rank asks for at once, and how many wait for it.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path


def plant_faults(engine):
    """Wrap the optimizer step: the restored state's warm-up step has a learning rate of 0 and does not count."""
    import time

    import torch
    import torch.distributed as dist

    step, faults = engine.Engine.step, [fault.split(":") for fault in os.environ["PLANTED"].split()]

    def planted(self, lr):
        taken = step(self, lr)
        if lr > 0:
            now = int(self.states.counters()["optimizer_steps"])
            for kind, rank, at in faults:
                done = Path(os.environ["PLANTED_DONE"]) / f"{kind}-{at}"
                if int(rank) == dist.get_rank() and int(at) == now and not done.exists():
                    done.touch()
                    if kind == "oom":
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                    time.sleep(3600)
        return taken

    engine.Engine.step = planted


def wait_less(hangs):
    hangs.HANG_SECONDS = float(os.environ["HANG_SECONDS"])
    hangs.NOTICE_SECONDS = hangs.HANG_SECONDS / 2
    hangs.PATIENCE = 2


def hold_rows(chunks):
    import time

    here = chunks.here

    def held(encoder, firsts):
        while not Path(os.environ["ROWS_WAIT_FOR"]).exists():
            time.sleep(0.1)
        return here(encoder, firsts)

    chunks.here = held


def look_less_ahead(feed):
    feed.AHEAD_STEPS = feed.MOST_STEPS_PER_CALL = int(os.environ["STEPS_AHEAD"])


CHANGES = {
    "PLANTED": {"trainkit.training.engine": plant_faults},
    "HANG_SECONDS": {"trainkit.cluster.hangs": wait_less},
    "ROWS_WAIT_FOR": {"trainkit.data.chunks": hold_rows},
    "STEPS_AHEAD": {"trainkit.data.feed": look_less_ahead},
}
PLANTED = {module: change for variable, changes in CHANGES.items() if variable in os.environ for module, change in changes.items()}


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name not in PLANTED:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        self.loader, found.loader = found.loader, self
        return found

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.loader.exec_module(module)
        PLANTED[module.__name__](module)


sys.meta_path.insert(0, Planter())
