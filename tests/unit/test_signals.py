"""Ctrl-C and SIGTERM: once softly, twice at once, not at all while the summary is written."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from trainkit.cluster.signals import Signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_ends_the_command(number: int) -> None:
    with Signals(), pytest.raises(KeyboardInterrupt):
        send(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_training_the_first_signal_asks_and_the_second_ends(number: int) -> None:
    asked = []
    with Signals() as signals, signals.softly(lambda: asked.append(True)):
        send(number)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert asked == [True]


def test_what_must_end_is_not_interrupted() -> None:
    with Signals() as signals, signals.ignored():
        send(signal.SIGINT)
        assert signals.taken == 1, "it is known afterwards: no restart follows it"


def test_a_signal_after_the_end_of_training_does_not_discard_its_outcome() -> None:
    def train(signals: Signals) -> str:
        with signals.ignored():
            pass
        with signals.softly(lambda: None):
            outcome = "completed"
        send(signal.SIGINT)
        with signals.ignored():
            pass
        send(signal.SIGTERM)
        return outcome

    with Signals() as signals:
        assert train(signals) == "completed"


def test_after_training_that_failed_a_signal_ends_the_command() -> None:
    with Signals() as signals:
        with pytest.raises(ValueError, match="failed"), signals.softly(lambda: None):
            raise ValueError("failed")
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_of_others_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
