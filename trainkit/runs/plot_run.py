"""A run as a picture: is it learning, is it fast, does it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from trainkit.runs.picture import Picture

if TYPE_CHECKING:
    import pandas

SMOOTHED_STEPS = 10  # of tokens/s: the time over which an older step loses its weight
NAMED_RANKS = 8  # more are drawn alike
_BLUE, _ORANGE, _RED, _FAINT = "#1f6fb4", "#d9730d", "#c0392b", 0.3
_MEMORY = "peak_memory_gib/rank_"


def run_picture(
    steps: pandas.DataFrame, evaluations: pandas.DataFrame | None = None, *, planned_gib: float | None = None, resident: bool = False
) -> Picture:
    """Loss, tokens/s and memory of every rank over the optimizer steps.

    steps, evaluations: as Run.steps and Run.evaluations. planned_gib: of one worker's device, as the plan expects it.
    resident: the memory is that of whole processes, as on a CPU.
    """
    picture = Picture(figsize=(12, 3.2), layout="constrained")
    loss, speed, memory = picture.subplots(1, 3)
    _loss(loss, steps, evaluations)
    _speed(speed, steps)
    _memory(memory, steps, planned_gib, resident)
    for axes in (loss, speed, memory):
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.grid(alpha=_FAINT)
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def _loss(axes: Axes, steps: pandas.DataFrame, evaluations: pandas.DataFrame | None) -> None:
    axes.set_title("loss")
    axes.plot(steps.index, steps["loss"], color=_BLUE, label="training", marker=_marker(steps))
    if evaluations is not None and "loss" in evaluations:
        axes.plot(evaluations.index, evaluations["loss"], "o", color=_ORANGE, label="evaluation")
        axes.legend(frameon=False)
    for step in steps.index[~np.isfinite(steps["loss"].to_numpy(dtype=float))]:
        axes.axvline(step, color=_RED)
        axes.annotate(f" {steps['loss'][step]}", (step, 0.5), xycoords=("data", "axes fraction"), color=_RED)
    axes.ticklabel_format(axis="y", useOffset=False)


def _speed(axes: Axes, steps: pandas.DataFrame) -> None:
    axes.set_title("tokens/s")
    speed = steps["tokens"] / steps["seconds"]
    axes.plot(steps.index, speed, color=_BLUE, alpha=_FAINT, label="step", marker=_marker(steps))
    axes.plot(steps.index, speed.ewm(span=SMOOTHED_STEPS).mean(), color=_BLUE, label="smoothed")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")


def _memory(axes: Axes, steps: pandas.DataFrame, planned_gib: float | None, resident: bool) -> None:
    axes.set_title("peak resident memory, GiB" if resident else "peak GPU memory, GiB")
    ranks = [name for name in steps.columns if name.startswith(_MEMORY)]
    for number, column in enumerate(ranks):
        if len(ranks) <= NAMED_RANKS:
            axes.plot(steps.index, steps[column], label=f"rank {column.removeprefix(_MEMORY)}", marker=_marker(steps))
        else:
            label = "_" if number else f"{len(ranks)} ranks"  # "_" stays out of the legend
            axes.plot(steps.index, steps[column], color=_BLUE, alpha=_FAINT, label=label, marker=_marker(steps))
    if planned_gib is not None:
        axes.axhline(planned_gib, color="black", linestyle=":", label="planned")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right", ncols=2)


def _marker(steps: pandas.DataFrame) -> str:
    """One step alone makes no line."""
    return "o" if len(steps) == 1 else ""
