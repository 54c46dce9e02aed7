"""What the workers begin with, made once in a command: the tokenized rows, and the first weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainkit.cluster.launch import Ready
from trainkit.cluster.progress import View, counter, display
from trainkit.cluster.session import environment, environment_settings, ray_session
from trainkit.cluster.signals import Signals
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe
from trainkit.runs.checkpoints import Checkpoint
from trainkit.runs.folder import RunFolder

if TYPE_CHECKING:
    from trainkit.data.tokens import Prepared

_WAITS = "waiting for another run, which tokenizes the same rows,"


@dataclass
class Preparation:
    """Of one run. Its attempts share the rows; the weights are written anew for one that begins without a checkpoint."""

    recipe: Recipe
    folder: RunFolder
    address: str | None  # of a cluster to join, where many rows are tokenized
    verbose: bool
    console: Console
    signals: Signals
    say: Callable[[str], None]
    rows: Prepared | None = None  # once they are made

    def ready(self, check: Callable[[], None], checkpoint: Checkpoint | None) -> Ready:
        """check: called now and then, raises what makes going on useless. Raises DataError as `prepare` does."""
        rows = self.made(check)
        if checkpoint is not None:
            return Ready(rows, None)
        from trainkit.training.model import write_first_weights

        return Ready(rows, write_first_weights(self.recipe, self.weights, rows.label_names))

    def check_rows(self, checkpoint: Checkpoint | None) -> None:
        """Make them now. Raises DataError if they are not those that the checkpoint was trained on."""
        rows = self.made()
        if checkpoint is None:
            return
        from trainkit.training.checkpoint import read_state

        if read_state(checkpoint)["data"] != rows.key:
            raise DataError(
                f"data.train: {self.folder.path} was begun with other rows or another tokenizer: the order of its samples cannot go on. "
                "Put the data back as it was, or begin a new run without --resume"
            )

    @property
    def weights(self) -> Path:
        return self.folder.ray / "first_weights.safetensors"

    def forget_weights(self) -> None:
        """A whole model in fp32, of no use to anybody once the run has ended."""
        self.weights.unlink(missing_ok=True)

    def made(self, check: Callable[[], None] = lambda: None) -> Prepared:
        """The tokenized rows."""
        if self.rows is not None:
            return self.rows
        from trainkit.data.tokens import prepare

        with display(self.console, self.address is not None or self.verbose) as shown:
            show = counter(shown, "tokenizing", "row")

            def count(done: int, total: int) -> None:
                check()
                show(done, total)

            def wait(seconds: float) -> None:
                check()
                shown.show(View(_WAITS, seconds))

            self.rows = prepare(self.recipe, count, self._spread(), wait)
        for note in self.rows.notes:
            self.say(note)
        return self.rows

    def _spread(self) -> Any:
        """Where rows are encoded: on this machine, or on a joined cluster if they are many."""
        from trainkit.cluster.tokenizing import on_cluster
        from trainkit.data import chunks

        return chunks.here if self.address is None else on_cluster(self._joined)

    @contextlib.contextmanager
    def _joined(self) -> Iterator[None]:
        settings = environment_settings(self.recipe, local=False)
        with environment(settings), ray_session(self.address, settings, self.verbose, self.signals):
            yield
