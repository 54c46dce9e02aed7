"""The `trainkit` command: each verb reads its options and calls one function. Errors a user can cause become one readable message.

Verbs import what they need when they run, so that `trainkit plan` loads neither ray nor deepspeed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from trainkit.errors import Interrupted, TrainkitError, UsageError
from trainkit.units import parse_bytes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)]
RecipeOrRun = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; with --resume also a run folder.", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")]
Runs = Annotated[Path | None, typer.Option("--runs", metavar="DIR", help="Folder of the run folders; overrides run.storage_path.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def run(
    recipe: RecipeOrRun,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    name: Annotated[str | None, typer.Option("--name", help="Name of the run folder instead of <recipe's name>-<n>.")] = None,
    runs: Runs = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of an unfinished run.")] = False,
    address: Annotated[str | None, typer.Option("--address", metavar="RAY", help="Join this Ray cluster instead of starting one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's and DeepSpeed's own output.")] = False,
    debug: Debug = False,
) -> None:
    """Plan, print the plan, train, evaluate and export."""
    from trainkit.cluster import driver

    driver.run(driver.Options(recipe, _with_runs(overrides, runs), name, address, verbose, resume), Console(file=sys.stdout))


def plan(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Plan for GPUs of this size: 80GiB.")] = None,
    debug: Debug = False,
) -> None:
    """Print the plan alone: batch, steps, memory. Starts nothing and tokenizes nothing."""
    from trainkit.cluster.decision import decide
    from trainkit.planning.show import plan_text
    from trainkit.recipe.reader import read_recipe

    console = Console()
    memory = None if gpu_memory is None else _size(gpu_memory)
    decision = decide(read_recipe(recipe, overrides), recipe, memory)
    console.print(plan_text(decision.plan))
    for unknown in decision.unknown:
        console.print(f"unknown: {unknown}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the LoRA adapter of model/ into its base model.")] = False,
    debug: Debug = False,
) -> None:
    """Make a plain model of a run's LoRA adapter."""
    if not merge:
        raise UsageError(f"{run}: model/ is exported when a run ends. Write --merge to merge its LoRA adapter into the base model")
    from trainkit.inference.export import merge_adapter

    Console().print(f"merged model {merge_adapter(run)}", highlight=False, soft_wrap=True)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="Run folders, or folders of them.", show_default=False)],
    form: Annotated[Literal["text", "markdown", "csv"], typer.Option("--format", help="How the table is written.")] = "text",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also write losses, speed and memory as a PNG.")] = None,
    debug: Debug = False,
) -> None:
    """Print what runs came to, side by side: technique, seconds, samples/s, memory, loss. Runs that ran out of memory are rows too."""
    from trainkit.runs import tables
    from trainkit.runs.compare import read_rows
    from trainkit.runs.plot import write_plot

    rows, notes = read_rows(runs)
    if form == "text":
        console = Console() if sys.stdout.isatty() else Console(width=tables.MOST_WIDTH)
        console.print(tables.as_text(rows, notes, console.width), highlight=False)
    elif form == "markdown":
        print(tables.as_markdown(rows, notes), end="")
    else:
        print(tables.as_csv(rows), end="")
        for note in notes:
            print(note, file=sys.stderr)
    if plot is not None:
        write_plot(rows, plot)


VERBS: dict[str, Callable[..., None]] = {"run": run, "plan": plan, "export": export, "compare": compare}
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trainkit {metadata.version('trainkit')}")
        raise typer.Exit


@app.callback()
def trainkit(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")] = False) -> None:
    """Fine-tune Hugging Face models on many workers: a recipe, Ray Train, DeepSpeed ZeRO."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and leave with the exit code of the contract."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--verbose" not in arguments:
        warnings.simplefilter("ignore")
    try:
        app(arguments, prog_name="trainkit")
    except TrainkitError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        head = Text("") if isinstance(error, Interrupted) else Text("error: ", style="bold red")
        Console(stderr=True).print(head + Text(error.message), soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())
        end = "" if "--debug" in arguments else " (a fault of trainkit; --debug shows the traceback)"
        Console(stderr=True).print(Text("error: ", style="bold red") + Text(said + end), soft_wrap=True)
        sys.exit(TrainkitError.exit_code)
    sys.exit(0)


def command(arguments: list[str] | None = None) -> NoReturn:
    """`main` in a process of its own, which does what is registered for its end and then ends at once, whatever threads still do.

    Python would spend a second and more on taking apart what the end of the process frees.
    """
    try:
        main(arguments)
    except SystemExit as end:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _with_runs(overrides: list[str], runs: Path | None) -> list[str]:
    """The shell leaves ~ as it is in --runs=~/x; the recipe's reader does not."""
    return overrides if runs is None else [*overrides, f"run.storage_path={_quoted(str(runs))}"]


def _quoted(text: str) -> str:
    """For YAML, whatever letters a file system has taken."""
    return '"' + "".join(sign if sign.isprintable() and sign not in '"\\' else f"\\U{ord(sign):08x}" for sign in text) + '"'


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--gpu-memory: {error}") from None
