"""A run that is watched: curves drawn anew in the notebook's cell, or plain lines where there is no notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from trainkit.cluster.progress import PlainLines, SoFar, View
from trainkit.errors import UsageError
from trainkit.runs.picture import PIXELS_PER_INCH, Picture
from trainkit.runs.reading import read_steps
from trainkit.runs.steps import kept_steps

if TYPE_CHECKING:
    import pandas

    from trainkit.planning.plan import Plan
    from trainkit.runs.folder import RunFolder

_MOST_TIME = 0.2  # of one core, for drawing: the training may need it


class Run(Protocol):
    """What is asked of trainkit.runs.opened.Run, which says more of each."""

    folder: RunFolder

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def plan(self) -> Plan | None: ...
    @property
    def steps(self) -> pandas.DataFrame: ...
    @property
    def evaluations(self) -> pandas.DataFrame: ...
    def picture(self, evaluations: pandas.DataFrame | None = None) -> Picture | None: ...
    def _repr_html_(self) -> str: ...


class Surface(Protocol):
    """What is drawn upon."""

    def draw(self, run: Run) -> None: ...
    def close(self, run: Run, stopped: bool) -> None: ...


def watch(run: Run, every: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Draw the run until it has ended, or somebody presses stop, which leaves it going. Raises UsageError for an `every` of 0 or less."""
    if not every > 0:
        raise UsageError(f"watch(every={every}): write seconds above 0")
    surface: Surface = Cell() if in_notebook() else Lines()
    stopped = False
    try:
        while run.status == "running":
            began = time.monotonic()
            surface.draw(run)
            sleep(max(every, (time.monotonic() - began) / _MOST_TIME))
    except KeyboardInterrupt:
        stopped = True
    surface.close(run, stopped)


def in_notebook() -> bool:
    """Whether a kernel shows what is displayed. A plain Python has not loaded IPython, and IPython in a terminal has no kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Cell:
    """Facts above, curves below; both are replaced in place."""

    def __init__(self) -> None:
        self.facts: Any = None
        self.curves: Any = None
        self.drawn = 0  # steps

    def draw(self, run: Run) -> None:
        self._show_facts(run)
        steps = len(run.steps)
        if steps > self.drawn:
            self.drawn = steps
            self._show_curves(run.picture())

    def close(self, run: Run, stopped: bool) -> None:
        self._show_facts(
            run, "stopped watching, and the run goes on: run.interrupt() ends it, run.watch() watches again" if stopped else ""
        )
        self._show_curves(run.picture() if stopped else run.picture(run.evaluations))

    def _show_facts(self, run: Run, note: str = "") -> None:
        from IPython.display import HTML

        self.facts = _shown(self.facts, HTML(f"{run._repr_html_()}<div>{note}</div>"))

    def _show_curves(self, picture: Picture | None) -> None:
        from IPython.display import Image

        if picture is not None:
            self.curves = _shown(self.curves, Image(picture.png(), format="png", width=_width(picture)))


class Lines:
    """The lines that the command prints into a log file."""

    def __init__(self) -> None:
        self.lines = PlainLines(Console())
        self.began = time.monotonic()

    def draw(self, run: Run) -> None:
        self.lines.show(self._view(run))

    def close(self, run: Run, stopped: bool) -> None:
        self.lines.__exit__()
        print(f"{run.name}: stopped watching, the run goes on" if stopped else run)

    def _view(self, run: Run) -> View:
        """Damaged lines are told by `run.steps`, out of which the last words are."""
        steps, plan, phase = read_steps(run.folder.steps_path)[0], run.plan, run.folder.read_phase()
        so_far = SoFar(kept_steps(run.folder) if phase else sys.maxsize)  # without a phase no attempt of this command has begun
        for line in steps if plan is not None else ():
            so_far.take(line)
        return so_far.view(phase or "starting", time.monotonic() - self.began, 0 if plan is None else plan.total_steps)


def _shown(before: Any, content: Any) -> Any:
    from IPython.display import display as show

    if before is None:
        return show(content, display_id=True)
    before.update(content)
    return before


def _width(picture: Picture) -> int:
    return int(picture.get_figwidth() * PIXELS_PER_INCH)
