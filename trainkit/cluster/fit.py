"""Ray Train's `fit`, and what the driver looks at as long as it runs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from trainkit.cluster.hangs import Stillnesses, signs
from trainkit.cluster.job import functions_by_value
from trainkit.cluster.progress import Display, View, Watch
from trainkit.cluster.session import Head, draining_nodes

if TYPE_CHECKING:
    from trainkit.cluster.launch import Launch

_LOOK_SECONDS = 0.2
_NOTICE_SECONDS = 2.0


class Fit:
    """`TorchTrainer.fit` in a thread of its own."""

    def __init__(self, trainer: Any):
        self.trainer, self.ended = trainer, threading.Event()
        self.result: list[Any] = []
        self.head = Head.found()
        threading.Thread(target=self._fit, name="fit", daemon=True).start()

    def _fit(self) -> None:
        try:
            with functions_by_value():
                self.result.append(self.trainer.fit().return_value)
        except BaseException as error:
            self.result.append(error)
        finally:
            self.ended.set()

    def check(self) -> None:
        """Raises what ended the workers, or TrainingError when Ray itself was ended."""
        self.head.check()
        self.outcome()

    def outcome(self) -> Any:
        """What `fit` has returned, None as long as it has not; raises what it raised."""
        result = self.result[0] if self.result else None
        if isinstance(result, BaseException):
            raise result
        return result

    def watched(self, asked: Launch, display: Display) -> dict[str, Any]:
        """To its end; raises what it raises, and the TrainingError of a rank that hangs."""
        from trainkit.cluster.causes import rank_error

        watch, notices = Watch(asked.folder, asked.plan.total_steps, by_rank=asked.verbose), _Notices(asked)
        stillnesses = Stillnesses(asked.plan.world_size, lambda: signs(asked.folder, asked.plan.world_size))
        with display:
            while not self.ended.wait(_LOOK_SECONDS):
                _say_notes(asked)
                still = stillnesses.look()
                if still is not None and still.hangs:
                    raise rank_error(asked.folder) or still.error()
                display.show(watch.look() if still is None else View(f"{still.text()},", still.seconds))
                self.check()
                notices.look()
            _say_notes(asked)
            display.show(watch.look())
        outcome: dict[str, Any] = self.outcome()
        return outcome


def _say_notes(asked: Launch) -> None:
    for note in asked.folder.take_notes():
        asked.say(note)


class _Notices:
    """Asks for a checkpoint when a node of a joined cluster is about to go away."""

    def __init__(self, asked: Launch):
        self.folder, self.joined = asked.folder, asked.address is not None
        self.known: set[str] = set()
        self.looked = time.monotonic()

    def look(self) -> None:
        if not self.joined or time.monotonic() - self.looked < _NOTICE_SECONDS:
            return
        self.looked = time.monotonic()
        leaving = draining_nodes()
        if leaving - self.known:
            self.folder.request_save()
        self.known |= leaving
