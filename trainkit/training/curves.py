"""Reads back what board.py has written: the points of a run's TensorBoard curves."""

from __future__ import annotations

import logging
from pathlib import Path


def read_curves(folder: Path, prefix: str) -> dict[str, dict[int, float]]:
    """Tag without its prefix to {optimizer step: value}. Points that a resumed run has taken again are the later ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
    return {tag.removeprefix(prefix): {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
