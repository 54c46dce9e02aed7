"""Runs beside each other in a notebook: the table and the picture of `trainkit compare`, and the same as a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType

from trainkit import markup
from trainkit.runs.compare import Row
from trainkit.runs.plot import figure
from trainkit.runs.tables import MOST_WIDTH, as_text, record

if TYPE_CHECKING:
    import pandas

    from trainkit.runs.picture import Picture

_TEXT_WIDTH = 140


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what a reader must know about them together

    @property
    def frame(self) -> pandas.DataFrame:
        """A row per run, with the columns of `trainkit compare --format csv`."""
        import pandas

        return pandas.DataFrame([record(row) for row in self.rows]).set_index("run")

    def plot(self) -> Picture:
        """Losses over the samples trained, and beside each other speed and memory, measured and planned."""
        return figure(self.rows)

    def __repr__(self) -> str:
        return markup.plain(self._text(_TEXT_WIDTH), width=_TEXT_WIDTH)

    def _repr_html_(self) -> str:
        return markup.html(self._text(MOST_WIDTH))

    def _text(self, width: int) -> RenderableType:
        return as_text(self.rows, self.notes, width)
