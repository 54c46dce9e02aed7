"""A matplotlib figure that a notebook shows as it is, whether pyplot was loaded or not."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

PIXELS_PER_INCH = 110


class Picture(Figure):
    """Without pyplot nothing is global: it needs no closing, and is shown once."""

    def png(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=PIXELS_PER_INCH)
        return out.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()
