"""Runs as a picture: their losses over the samples trained, and beside each other how fast they were and how much memory they took.

matplotlib is loaded when a picture is asked for, and writes it without any window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import UsageError
from trainkit.runs.compare import Row
from trainkit.runs.tables import OOM, ended, significant

if TYPE_CHECKING:
    from trainkit.runs.picture import Picture

SMOOTHED_PARTS = 50  # a curve of more steps is drawn as a running mean over one part, above the single steps
_LABEL = 28  # characters of a run's name
_NUM_COLORS = 10  # of tab10
_STYLES = ("-", "--", ":", "-.")  # for the runs beyond the colours


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Raises UsageError if it is no .png or cannot be written."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: the picture is a PNG. Name a file that ends in .png")
    try:
        figure(rows).savefig(path, format="png", dpi=130, bbox_inches="tight")
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written: {error.strerror or error}") from None


def figure(rows: Sequence[Row]) -> Picture:
    """A matplotlib figure: a notebook shows it as it is."""
    from trainkit.runs.picture import Picture

    bars_height = 0.9 + 0.45 * len(rows)
    drawn = Picture(figsize=(11, 4.2 + bars_height), layout="constrained")
    grid = drawn.add_gridspec(2, 2, height_ratios=(4.2, bars_height))
    _draw_losses(drawn.add_subplot(grid[0, :]), rows)
    speed = drawn.add_subplot(grid[1, 0])
    _draw_speed(speed, rows)
    _draw_memory(drawn.add_subplot(grid[1, 1], sharey=speed), rows)
    return drawn


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    """Runs of one training lie on each other: the lower ones are wider and show at the rim, and each has a mark where it ended.

    Where losses begin to be no numbers, a line says so.
    """
    lines, names = [], []
    for place, row in enumerate(rows):
        samples, losses = [point[0] for point in row.curve], [point[1] for point in row.curve]
        window = max(1, len(losses) // SMOOTHED_PARTS)
        middles, means = samples[(window - 1) // 2 : len(samples) - window // 2], _running_mean(losses, window)
        if window > 1:
            axes.plot(samples, losses, color=_color(place), alpha=0.2, linewidth=0.8)
        lines += axes.plot(
            middles,
            means,
            color=_color(place),
            linestyle=_STYLES[place // _NUM_COLORS % len(_STYLES)],
            linewidth=1.2 + 2.5 * (len(rows) - 1 - place) / len(rows),
        )
        names.append(_label(row) + ("" if row.status == "completed" else f": {ended(row)}") + ("" if losses else ", no steps"))
        _mark_no_numbers(axes, row, _color(place))
        ending = [point for point in zip(middles, means, strict=True) if math.isfinite(point[1])][-1:]
        mark = "o" if row.status == "completed" else "X"
        axes.plot(*zip(*ending, strict=True), color=_color(place), marker=mark, markersize=7, zorder=3)
    axes.set(xlabel="samples trained", ylabel="training loss", title=_losses_title(rows))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    numbers = [str(place) for place in range(len(rows))]  # the names follow: as labels, those with an underscore in front would be hidden
    legend = axes.legend(lines, numbers, fontsize="small", loc="upper right", ncols=1 + len(rows) // 12)  # where falling losses leave room
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def _mark_no_numbers(axes: Any, row: Row, color: str) -> None:
    before = 0.0
    for samples, loss in row.curve:
        if not math.isfinite(loss) and math.isfinite(before):
            axes.axvline(samples, color=color, linestyle=":")
            axes.annotate(f" {loss}", (samples, 0.5), xycoords=("data", "axes fraction"), color=color)
        before = loss


def _draw_speed(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        rate = None if row.out_of_memory else row.samples_per_second
        axes.barh(place, _length(rate), color=_color(place), height=0.6)
        _write_beside(axes, place, rate, OOM if row.out_of_memory else significant(rate))
    axes.set(xlabel="samples/s")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], parse_math=False)
    axes.invert_yaxis()  # the first run on top, as in the table
    _tidy(axes)


def _draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        measured = None if row.out_of_memory else row.peak_gib
        axes.barh(place - 0.17, _length(measured), color=_color(place), height=0.34)
        axes.barh(place + 0.17, _length(row.planned_gib), color="none", edgecolor=_color(place), hatch="////", height=0.34)
        _write_beside(axes, place - 0.17, measured, OOM if row.out_of_memory else significant(measured))
        _write_beside(axes, place + 0.17, row.planned_gib, significant(row.planned_gib))
    on_cpu = "" if all(row.on_gpu for row in rows) else " (on a CPU: resident memory)"
    axes.set(xlabel=f"GiB per worker: peak{on_cpu}, planned hatched")
    axes.tick_params(labelleft=False, left=False)
    _tidy(axes)


def _length(value: float | None) -> float:
    """Of a bar: none for what is not known, or no number."""
    return value if value is not None and math.isfinite(value) else 0.0


def _write_beside(axes: Any, place: float, value: float | None, text: str) -> None:
    axes.annotate(text, (_length(value), place), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small")


def _tidy(axes: Any) -> None:
    axes.margins(x=0.2)  # room for what is written beside the longest bar
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter("{x:,g}")


def _losses_title(rows: Sequence[Row]) -> str:
    compare = len({(row.model, row.data) for row in rows}) == 1
    return "training loss" if compare else "training loss (different models or data: the curves do not compare)"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Of each `window` values in a row; a NaN stays one in every mean it is part of."""
    return [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]


def _label(row: Row) -> str:
    """The end of a long name tells runs apart, the start says what they are."""
    if len(row.run) <= _LABEL:
        return row.run
    return f"{row.run[: _LABEL // 2]}…{row.run[-_LABEL // 2 + 1 :]}"


def _color(place: int) -> str:
    return f"C{place % _NUM_COLORS}"
