"""What to do after a failure: a pure policy, and the only owner of retries.

A process that ended from outside (a worker, an actor, Ray's own processes, a node) says nothing against the run: the group starts again
from the newest complete checkpoint. What the code itself raised may be a flaw of the moment or a bug: it gets one more try, unless nothing
was trained before it, and the same error at the same step twice is a bug. What is wrong by itself (recipe, data, a NaN) is not tried again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainkit.errors import ExportMismatch, NonFiniteError, PlanMismatch, TrainingError, TrainkitError

FINAL = (NonFiniteError, PlanMismatch, ExportMismatch)  # training errors that would come again


@dataclass(frozen=True)
class Failure:
    """How an attempt ended."""

    kind: str  # the error's class
    message: str
    from_outside: bool  # a process was ended; nothing in it went wrong
    final: bool  # it would come again
    began_at: int  # step of the checkpoint that the attempt began with; 0: from the start
    ended_at: int  # the last step it finished

    @classmethod
    def of(cls, error: TrainkitError, began_at: int, ended_at: int) -> Failure:
        final = not isinstance(error, TrainingError) or isinstance(error, FINAL)
        return cls(type(error).__name__, error.message, bool(error.facts.get("from_outside")), final, began_at, ended_at)


@dataclass(frozen=True)
class Verdict:
    """Whether to start again, and why (not): a sentence for the person who reads."""

    again: bool
    why: str


def decide(failures: Sequence[Failure], max_failures: int) -> Verdict:
    """What to do after the last of the failures of this command."""
    last = failures[-1]
    if last.final:
        return Verdict(False, "the same would happen again")
    if not last.from_outside and last.ended_at <= last.began_at:
        return Verdict(False, "it failed before its first step")
    if not last.from_outside and any(_same(last, other) for other in failures[:-1]):
        return Verdict(False, f"the same error after step {last.ended_at} twice")
    if len(failures) > max_failures:
        return Verdict(False, f"run.max_failures: {max_failures}")
    return Verdict(True, f"restart {len(failures)} of at most {max_failures}")


def _same(one: Failure, other: Failure) -> bool:
    return (one.kind, one.ended_at, _words(one)) == (other.kind, other.ended_at, _words(other))


def _words(failure: Failure) -> str:
    """The first line without its numbers: which rank came first, or how many bytes were free, is chance."""
    return re.sub(r"\d+", "", failure.message.partition("\n")[0])
