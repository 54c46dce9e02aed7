"""Ctrl-C and SIGTERM: before training it ends the command, during it all ranks end at the same step; twice ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Signals:
    """Takes SIGINT and SIGTERM while it is entered, in the main thread; elsewhere (a notebook's helper thread) it leaves them alone.

    A signal raises KeyboardInterrupt, which no library's `except Exception` swallows; inside `softly` the first one calls back instead.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.first: Callable[[], None] | None = None
        self.deaf = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Take the signals (again: ray.init puts a SIGTERM handler of its own in place)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._take)

    @contextlib.contextmanager
    def softly(self, first: Callable[[], None]) -> Iterator[None]:
        """The first signal calls `first`; the next one raises. What came to its end stays so: from then on no signal takes it away."""
        self.first = first
        try:
            yield
            self.deaf = True
        finally:
            self.first = None

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Signals wait for nothing and do nothing: what runs here is short and must end."""
        before, self.deaf = self.deaf, True
        try:
            yield
        finally:
            self.deaf = before

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.taken += 1
        if self.deaf:
            return
        if self.first is not None and self.taken == 1:
            self.first()
        else:
            raise KeyboardInterrupt
