"""What to do after a failure: a pure policy, and the only owner of retries.

A process that ended from outside (a worker, an actor, Ray's own processes, a node) says nothing against the run: the group starts again
from the newest complete checkpoint. What the code itself raised may be a flaw of the moment or a bug: it gets one more try, unless nothing
was trained before it, and the same error at the same step twice is a bug. What is wrong by itself (recipe, data, a NaN) is not tried again;
out of memory is tried again only with smaller micro-batches or without the CUDA graphs that nobody asked for, and want of room only with
fewer workers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainkit.errors import CaptureError, ExportMismatch, NonFiniteError, OutOfMemory, PlanMismatch, TrainingError, TrainkitError

FINAL = (NonFiniteError, OutOfMemory, PlanMismatch, ExportMismatch, CaptureError)  # training errors that would come again


@dataclass(frozen=True)
class Failure:
    """How an attempt ended."""

    kind: str  # the error's class
    message: str
    from_outside: bool  # a process was ended; nothing in it went wrong
    final: bool  # it would come again
    began_at: int  # step of the checkpoint that the attempt began with; 0: from the start
    ended_at: int  # the last step it finished
    no_place: bool = False  # the workers found none in time
    of_graphs: bool = False  # CUDA graphs, or what they need, which nobody asked for, may be what failed

    @classmethod
    def of(cls, error: TrainkitError, began_at: int, ended_at: int, graphs: bool = False, flat: bool = False) -> Failure:
        """graphs, flat: the plan has CUDA graphs, or is flat without them, and the recipe does not ask for it."""
        final = not isinstance(error, TrainingError) or isinstance(error, FINAL)
        outside, no_place = _is(error, "from_outside"), _is(error, "no_place")
        out_of_gpu = isinstance(error, OutOfMemory) and error.facts.get("device") == "GPU"
        before_any_step = not final and not outside and ended_at <= began_at  # whatever stands in the way, graphs may be new to this model
        of_graphs = graphs and (isinstance(error, CaptureError) or out_of_gpu or before_any_step)
        of_graphs |= flat and before_any_step and not out_of_gpu  # as DeepSpeed does it, more memory is taken
        return cls(type(error).__name__, error.message, outside, final, began_at, ended_at, no_place, of_graphs)


@dataclass(frozen=True)
class Verdict:
    """Whether to start again, and why (not): a sentence for the person who reads."""

    again: bool
    why: str
    halve: bool = False  # the budget of a micro-batch
    shrink: bool = False  # by a worker
    ungraph: bool = False  # go on without CUDA graphs


@dataclass(frozen=True)
class Allowed:
    """What a run may do about its failures."""

    max_failures: int
    halve: bool = False  # there is a budget of a micro-batch to halve, and the recipe allows it
    shrink: bool = False  # an elastic run has more workers than its fewest


def decide(failures: Sequence[Failure], allowed: Allowed) -> Verdict:
    """What to do after the last of the failures of this command. Want of room does not count, because an elastic run only shrinks to its
    fewest, nor do graphs, which fail once."""
    last, counted = failures[-1], [failure for failure in failures if not (failure.no_place or failure.of_graphs)]
    if last.no_place and allowed.shrink:
        return Verdict(True, "going on with a worker less", shrink=True)
    if last.of_graphs:
        return Verdict(True, "going on without CUDA graphs", ungraph=True)
    if last.kind == OutOfMemory.__name__ and allowed.halve and len(counted) <= allowed.max_failures:
        return Verdict(True, f"restart {len(counted)} of at most {allowed.max_failures}, with half the micro-batch budget", halve=True)
    if last.final:
        return Verdict(False, "the same would happen again")
    if not last.from_outside and last.ended_at <= last.began_at:
        return Verdict(False, "it failed before its first step")
    if not last.from_outside and any(_same(last, other) for other in failures[:-1]):
        return Verdict(False, f"the same error after step {last.ended_at} twice")
    if len(counted) > allowed.max_failures:
        return Verdict(False, f"run.max_failures: {allowed.max_failures}")
    return Verdict(True, f"restart {len(counted)} of at most {allowed.max_failures}")


def _is(error: TrainkitError, fact: str) -> bool:
    return bool(error.facts.get(fact))


def _same(one: Failure, other: Failure) -> bool:
    return (one.kind, one.ended_at, _words(one)) == (other.kind, other.ended_at, _words(other))


def _words(failure: Failure) -> str:
    """The first line without its numbers: which rank came first, or how many bytes were free, is chance."""
    return re.sub(r"\d+", "", failure.message.partition("\n")[0])
