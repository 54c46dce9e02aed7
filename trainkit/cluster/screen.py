"""The last screen of a run: what was reached, what the model says, where things lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainkit.recipe.schema import Recipe
from trainkit.runs.folder import RunFolder
from trainkit.units import format_count, format_seconds


def show_result(console: Console, folder: RunFolder, recipe: Recipe, summary: Mapping[str, Any]) -> None:
    console.print()
    console.print(_numbers(summary, recipe.scaling.use_gpu))
    if summary.get("predictions"):
        console.print()
        console.print(_predictions(summary["predictions"]))
    console.print()
    console.print(_places(folder, recipe))


def _numbers(summary: Mapping[str, Any], use_gpu: bool) -> Table:
    table, what = _pairs(), "allocated on the GPU" if use_gpu else "resident in the process, libraries included,"
    for name, value in (summary["eval"] or {}).items():
        if name != "step":
            table.add_row(f"evaluation {name.replace('_', ' ')}", f"{value:.4f}")
    table.add_row("mean training loss", f"{summary['train_loss']:.4f}")
    table.add_row("trained", f"{summary['steps']:,} steps, {summary['samples']:,} samples, {format_count(summary['tokens'])} tokens")
    speed = f"{summary['samples_per_second']:,.1f} samples/s, {format_count(summary['tokens_per_second'])} tokens/s"
    table.add_row("speed", f"{speed} over {format_seconds(summary['seconds'])} of steps; {format_seconds(summary['wall_seconds'])} in all")
    if summary["peak_memory_gib"]:
        table.add_row("peak memory", f"{max(summary['peak_memory_gib']):.2f} GiB {what} on the fullest rank")
    return table


def _predictions(predictions: list[Mapping[str, str]]) -> Table:
    table = _pairs()
    for number, one in enumerate(predictions):
        right = one["predicted"] == one["expected"]
        table.add_row("source", Text(one["source"]))
        table.add_row("predicted", Text(one["predicted"], style="green" if right else "red"))
        table.add_row("expected", Text(one["expected"]))
        if number + 1 < len(predictions):
            table.add_row("", "")
    return table


def _places(folder: RunFolder, recipe: Recipe) -> Table:
    table = _pairs()
    table.add_row("model", Text(str(folder.path / "model"), overflow="fold"))
    table.add_row("curves", Text(f"tensorboard --logdir {recipe.run.storage_path}", overflow="fold"))
    return table


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
