"""How far the ranks are, for people to read: what each was handed of a split, and who is slowest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Handed:
    """What a rank was handed of a split. Steps are known by their number: those that are asked for once more add nothing.

    A restarted actor counts anew, but for the number of the last step.
    """

    samples: int = 0
    pieces: list[range] = field(default_factory=list)  # the steps: ascending, with gaps between
    since: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def take(self, samples_by_step: Mapping[int, int]) -> None:
        """Count the steps first .. last of a call; calls of one rank may end in another order than they were made."""
        new = [step for step in samples_by_step if not any(step in piece for piece in self.pieces)]
        if not new:
            return
        self.samples += sum(samples_by_step[step] for step in new)
        self.pieces = _joined([*self.pieces, range(min(samples_by_step), max(samples_by_step) + 1)])
        self.last = time.monotonic()

    @property
    def steps(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def last_step(self) -> int:
        """The highest, 0 before the first."""
        return self.pieces[-1][-1] if self.pieces else 0

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(1e-9, self.last - self.since)


def slowest(ranks: Mapping[int, Handed]) -> int:
    """The rank that is furthest behind; of several the one that took longest."""
    return min(ranks, key=lambda rank: (ranks[rank].last_step, ranks[rank].since - ranks[rank].last, rank))


def furthest(ranks: Mapping[int, Handed]) -> int:
    """The highest step that any rank was handed."""
    return max(handed.last_step for handed in ranks.values())


def lag(split: str, ranks: Mapping[int, Handed]) -> str:
    """Who is furthest behind; empty where nobody is."""
    if not ranks or ranks[rank := slowest(ranks)].last_step == furthest(ranks):
        return ""
    return f"rank {rank} is furthest behind: it was handed {split} steps up to {ranks[rank].last_step:,}, others up to {furthest(ranks):,}"


def table(ranks: Mapping[int, Handed]) -> str:
    """A line per rank. No rate: what is handed out ahead is faster than what is trained, and may never be."""
    lines = [f"{'rank':>4}  {'to step':>9}  {'samples':>12}  {'steps behind':>12}"]
    for rank, handed in sorted(ranks.items()):
        behind = furthest(ranks) - handed.last_step
        line = f"{rank:>4}  {handed.last_step:>9,}  {handed.samples:>12,}  {behind:>12,}"
        lines.append(line + ("  slowest" if len(ranks) > 1 and rank == slowest(ranks) else ""))
    return "\n".join(lines)


def _joined(pieces: list[range]) -> list[range]:
    joined: list[range] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if joined and piece.start <= joined[-1].stop:
            piece = range(joined[-1].start, max(joined.pop().stop, piece.stop))
        joined.append(piece)
    return joined
