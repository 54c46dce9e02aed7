"""The last screen of a run: what was reached, what the model says, where things lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainkit.planning.memory import CATEGORIES
from trainkit.recipe.schema import Recipe
from trainkit.runs.folder import RunFolder
from trainkit.units import GIB, format_bytes, format_count, format_seconds

_CATEGORIES = (*CATEGORIES, "activations", "other", "peak")


def show_result(console: Console, folder: RunFolder, recipe: Recipe, summary: Mapping[str, Any]) -> None:
    console.print()
    console.print(_numbers(summary, recipe.scaling.use_gpu))
    if (memory := _memory(summary["memory"])) is not None:
        console.print()
        console.print(memory)
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
    if not summary["seconds"]:
        table.add_row("trained", "steps.jsonl holds no step: what they came to is not known")
        return table
    table.add_row("mean training loss", f"{summary['train_loss']:.4f}")
    table.add_row("trained", f"{summary['steps']:,} steps, {summary['samples']:,} samples, {format_count(summary['tokens'])} tokens")
    speed = f"{summary['samples_per_second']:,.1f} samples/s, {format_count(summary['tokens_per_second'])} tokens/s"
    table.add_row("speed", f"{speed} over {format_seconds(summary['seconds'])} of steps; {_in_all(summary)}")
    if summary["startup_seconds"]:
        pieces = ", ".join(f"{piece} {seconds:.0f} s" for piece, seconds in summary["startup_seconds"].items())
        table.add_row("start", f"{format_seconds(sum(summary['startup_seconds'].values()))}: {pieces}")
    table.add_row("time", _time(summary))
    if summary["peak_memory_gib"]:
        table.add_row("peak memory", f"{max(summary['peak_memory_gib']):.2f} GiB {what} on the fullest rank")
    return table


def _in_all(summary: Mapping[str, Any]) -> str:
    """The time around the steps: of all commands on this run, as the steps are, where that is known."""
    this = summary["wall_seconds"]
    if summary["goodput"] is None:
        return f"this command took {format_seconds(this)}, what those before it took is not known"
    worked = summary["seconds"] / summary["goodput"]
    alone = worked - this < 1.0
    return f"{format_seconds(worked)} in all" + ("" if alone else f", of which this command took {format_seconds(this)}")


def _time(summary: Mapping[str, Any]) -> str:
    """Where the time of the steps went, and how much of all the time they were."""
    seconds = summary["seconds"]
    shares = summary["piece_seconds"] | {"data wait": summary["data_wait_fraction"] * seconds}
    parts = [f"{name} {100 * share / seconds:.0f} %" for name, share in shares.items()]
    parts += [] if summary["mfu"] is None else [f"MFU {100 * summary['mfu']:.1f} %"]
    parts += [] if summary["goodput"] is None else [f"steps were {100 * summary['goodput']:.0f} % of the time worked on this run"]
    return ", ".join(parts)


def _memory(memory: Mapping[str, Any]) -> Table | None:
    """The plan beside what the fullest rank measured, on the device; None where nothing was measured."""
    if not memory["measured"]:
        return None
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("memory per worker", style="dim")
    table.add_column("planned", justify="right")
    table.add_column("measured", justify="right")
    for name in _CATEGORIES:
        if name not in memory["planned"] and name not in memory["measured"][0]:
            continue
        planned, measured = memory["planned"].get(name), max((rank[name] for rank in memory["measured"] if name in rank), default=None)
        table.add_row(name, *("" if number is None else format_bytes(number * GIB) for number in (planned, measured)))
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
