"""Many faults in one run, drawn with a seed: each is survived, and nothing of the training is lost, repeated or changed.

    scripts/chaos [--faults 50] [--seed 0] [--zero zero2]

The quickstart with dropout is trained twice, once undisturbed and once under faults. Each fault comes at a random moment after training
went on from the one before. The exit code is 1 unless every check at the end holds; then the folder of both runs is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from runs_under_test import ROOT, actors_in, alive, family, is_saving, planted_path, points, ranks, started, trained

from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import sha256
from trainkit.runs.folder import RunFolder

SAMPLES = 32  # of an optimizer step
STEPS_PER_FAULT = 24  # more than training gets ahead from one to the next, on average
SPARE_STEPS = 72  # ranks that were not struck train on until they are ended: 50 steps where gcs_server was killed
MOST_STEPS_BEFORE = 16  # from where training went on to the next fault: two saves
MOST_SECONDS_BEFORE = 0.2  # beside them: more than a step
SURVIVAL_SECONDS = 240.0  # until training has gone on
AGENTS_SECONDS = 90.0  # Ray's agents of a command that was killed look only once a minute whether it is there
LOOK_SECONDS = 0.004
WAIT_LESS = {"PLANTED": "", "HANG_SECONDS": "8"}  # that the driver waits for a rank that stands still
RESTART = re.compile(r"going on from step (\d+)|no checkpoint yet: beginning again")


class NotSurvivedError(Exception):
    """Training did not go on."""


@dataclass(frozen=True)
class Restart:
    """Where an attempt began, and how far the run had been seen to be saved by then."""

    step: int  # of its checkpoint; 0: from the start
    newest_seen: int  # step of the newest checkpoint that was ever seen complete

    @property
    def lost(self) -> bool:
        return self.step < self.newest_seen


class Watched:
    """The run under faults, over all commands that go on with it, seen from outside."""

    def __init__(self, runs: Path, options: Sequence[str]):
        self.runs, self.options, self.folder = runs, options, RunFolder(runs / "it")
        self.commands = contextlib.ExitStack()
        self.output = self.commands.enter_context((runs / "output.txt").open("a", encoding="utf-8"))
        self.told = self.commands.enter_context((runs / "output.txt").open(encoding="utf-8", errors="replace"))
        self.line = ""  # that is not yet told to its end
        self.start()
        self.members: list[psutil.Process] = []  # of its family when it was last looked at
        self.processes: set[psutil.Process] = set()  # that were ever seen
        self.complete: set[int] = set()  # steps of the checkpoints that were ever seen complete
        self.restarts: list[Restart] = []
        self.half_saves = 0  # that were left so

    def start(self, *more: str) -> None:
        """The command, in a process group of its own."""
        variables = WAIT_LESS | {"PYTHONPATH": planted_path()}
        self.process = self.commands.enter_context(started(self.runs, [*self.options, *more], self.output, **variables))

    def said(self) -> str:
        """By all commands so far."""
        return Path(self.output.name).read_text("utf-8")

    def meet(self) -> None:
        """Look who belongs to the command. All are remembered: none may be left at the end."""
        self.members = family(self.process)
        self.processes.update(self.members)

    def look(self) -> None:
        """Checkpoints first: what a new attempt says of itself comes before its own ones."""
        self.complete.update(checkpoint.step for checkpoint in checkpoints.complete(self.folder.path))
        *lines, self.line = (self.line + self.told.read()).split("\n")
        for begun in filter(None, map(RESTART.fullmatch, lines)):
            self.restarts.append(Restart(int(begun[1] or 0), max(self.complete, default=0)))

    def wait(self, what: str, until: Callable[[], bool], seconds: float = SURVIVAL_SECONDS) -> None:
        """Raises NotSurvivedError when it takes longer, or the command ends before."""
        deadline = time.monotonic() + seconds
        while not until():
            self.look()
            if self.process.poll() is not None and not until():
                raise NotSurvivedError(f"{what}: the command ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                raise NotSurvivedError(f"{what}: not within {seconds:.0f} s")
            time.sleep(LOOK_SECONDS)
        self.look()

    def wait_for_end(self, code: int, seconds: float = SURVIVAL_SECONDS) -> None:
        """Raises NotSurvivedError also when the command ends with another exit code."""
        self.wait("the end of the command", lambda: self.process.poll() is not None, seconds)
        if self.process.returncode != code:
            raise NotSurvivedError(f"the command ended with exit code {self.process.returncode} instead of {code}")

    def last_step(self) -> int:
        """Of steps.jsonl, whose end alone is read: it is looked at often."""
        with contextlib.suppress(FileNotFoundError), self.folder.steps_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            if whole := file.read().split(b"\n")[:-1]:
                return json.loads(whole[-1])["step"]
        return 0

    def is_training(self) -> bool:
        return self.folder.read_phase() in ("training", "saving a checkpoint")


@dataclass(frozen=True)
class Fault:
    kind: str
    after_steps: int  # that training went on
    after_seconds: float  # beside them
    rank: int  # of two, where the kind does not say


def rank_0(run: Watched, fault: Fault) -> None:
    ranks(run.members)[0].kill()


def another_rank(run: Watched, fault: Fault) -> None:
    ranks(run.members)[-1].kill()


def distributor(run: Watched, fault: Fault) -> None:
    for actor in actors_in(run.members):
        actor.kill()


def all_ranks(run: Watched, fault: Fault) -> None:
    for worker in ranks(run.members):
        worker.kill()
    run.half_saves += is_saving(run.folder)


def of_ray(name: str, number: signal.Signals) -> Callable[[Watched, Fault], None]:
    def strike(run: Watched, fault: Fault) -> None:
        (process,) = (process for process in run.members if process.name() == name)
        process.send_signal(number)

    return strike


def stand_still(run: Watched, fault: Fault) -> None:
    ranks(run.members)[fault.rank].suspend()


def ctrl_c(run: Watched, fault: Fault) -> None:
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_for_end(130)
    run.start("--resume")


def command(run: Watched, fault: Fault) -> None:
    """Its successor starts while the workers may still be there."""
    run.process.kill()
    run.wait_for_end(-signal.SIGKILL)
    run.start("--resume")


def training(run: Watched, fault: Fault) -> None:
    """The actor may just have been killed; it comes back while the ranks train what they have."""

    def all_there() -> bool:
        run.meet()
        return len(ranks(run.members)) == 2 and len(actors_in(run.members)) == 1

    run.wait("two ranks and the actor", all_there)
    time.sleep(fault.after_seconds)


def saving(run: Watched, fault: Fault) -> None:
    """A moment at which a save has begun and not ended."""
    training(run, fault)
    while True:
        run.wait("a save", lambda: is_saving(run.folder))
        time.sleep(fault.after_seconds / 4)
        if is_saving(run.folder):
            return


@dataclass(frozen=True)
class Kind:
    strike: Callable[[Watched, Fault], None]
    moment: Callable[[Watched, Fault], None] = training  # waits for it
    restarts: bool = True  # all ranks go on from a checkpoint


KINDS = {
    "SIGKILL rank 0": Kind(rank_0),
    "SIGKILL another rank": Kind(another_rank),
    "SIGKILL the DataDistributor": Kind(distributor, restarts=False),
    "SIGKILL all ranks in a save": Kind(all_ranks, moment=saving),
    "SIGKILL raylet": Kind(of_ray("raylet", signal.SIGKILL)),
    "SIGTERM raylet": Kind(of_ray("raylet", signal.SIGTERM)),
    "SIGKILL gcs_server": Kind(of_ray("gcs_server", signal.SIGKILL)),
    "SIGTERM gcs_server": Kind(of_ray("gcs_server", signal.SIGTERM)),
    "SIGSTOP a rank": Kind(stand_still),
    "Ctrl-C, --resume": Kind(ctrl_c),
    "SIGKILL the command, --resume": Kind(command),
}


@dataclass(frozen=True)
class Survived:
    kind: str
    at: int  # the last step before
    since: int  # step from which training went on; beyond `at` where the others still saved what they trained meanwhile
    seconds: float  # until the first step beyond both


def draw(count: int, seed: int) -> list[Fault]:
    """Round after round of all kinds, each in an order of its own."""
    rng, kinds = random.Random(seed), list[str]()
    while len(kinds) < count:
        kinds += rng.sample(list(KINDS), len(KINDS))
    return [Fault(kind, rng.randint(1, MOST_STEPS_BEFORE), rng.uniform(0, MOST_SECONDS_BEFORE), rng.randrange(2)) for kind in kinds[:count]]


def survive(run: Watched, fault: Fault, since: int) -> Survived:
    """Wait for the fault's moment after step `since`, strike, and wait until training has gone on."""
    kind, before = KINDS[fault.kind], len(run.restarts)
    run.wait("training", lambda: run.last_step() >= since + fault.after_steps and run.is_training())
    kind.moment(run, fault)
    at, began = run.last_step(), time.monotonic()
    kind.strike(run, fault)

    def began_at() -> int:
        return run.restarts[-1].step if len(run.restarts) > before else at

    def goes_on() -> bool:
        restarted = len(run.restarts) > before or not kind.restarts
        return restarted and run.last_step() > max(at, began_at())

    run.wait("training after the fault", goes_on)
    seconds = time.monotonic() - began
    run.meet()
    return Survived(fault.kind, at, began_at(), seconds)


def disturb(run: Watched, faults: Sequence[Fault]) -> list[Survived]:
    """One after the other, then to the end of the run. Says why it ends before."""
    survived: list[Survived] = []
    try:
        for number, fault in enumerate(faults, start=1):
            it = survive(run, fault, run.last_step())
            survived.append(it)
            print(f"{number:3}  {it.kind:30} at step {it.at:5}, went on after {it.seconds:5.1f} s from step {it.since:5}", flush=True)
        run.wait_for_end(0, seconds=3600)
    except NotSurvivedError as error:
        print(f"{len(survived) + 1:3}  {error}\n{run.said()[-3000:]}", flush=True)
    return survived


@dataclass(frozen=True)
class Check:
    holds: bool
    text: str


def checks(run: Watched, faults: Sequence[Fault], survived: Sequence[Survived], untouched: RunFolder, steps: int) -> list[Check]:
    """What was promised, each with what was counted."""
    found, same, each = trained(run.folder), trained(untouched), list(range(1, steps + 1))
    samples, expected, again = sum(step["samples"] for step in found), samples_of(steps), sum(max(0, it.at - it.since) for it in survived)
    lost, half = sum(restart.lost for restart in run.restarts), run.half_saves
    psutil.wait_procs(list(run.processes), timeout=AGENTS_SECONDS)
    left = alive(list(run.processes))
    return [
        Check(len(survived) == len(faults), f"{len(faults)} faults, {len(survived)} survived"),
        Check(run.process.poll() == 0, f"exit code {run.process.poll()} of the last command"),
        Check([step["step"] for step in found] == each, f"{len(found):,} lines in steps.jsonl, each of {steps:,} steps once"),
        Check(_same(found, same, "order"), "order hashes as undisturbed, step by step: 0 samples missing or repeated"),
        Check(samples == expected, f"{samples:,} samples trained, {expected:,} expected; {again:,} steps were trained again"),
        Check(_same(found, same, "loss", "grad_norm", "lr"), "losses, gradient norms and learning rates as undisturbed, bit for bit"),
        Check(weights(run.folder) == weights(untouched) != {}, "the exported model as undisturbed, bit for bit"),
        Check(bool(found) and points(run.folder) == each, "each step once in TensorBoard"),
        Check(lost == 0, f"{lost} complete checkpoints lost: {len(run.complete)} seen, {len(run.restarts)} restarts, {half} saves cut off"),
        Check(not left, f"{len(left)} processes left over of {len(run.processes)} seen {' '.join(left)}".rstrip()),
        Check("Traceback" not in run.said(), "no traceback shown"),
    ]


def _same(found: Sequence[dict[str, Any]], same: Sequence[dict[str, Any]], *keys: str) -> bool:
    return [[step[key] for key in keys] for step in found] == [[step[key] for key in keys] for step in same]


def samples_of(steps: int) -> int:
    """Of so many steps: the last one of an epoch is smaller."""
    rows = len((ROOT / "recipes/quickstart/train.jsonl").read_text("utf-8").splitlines())
    epochs, rest = divmod(steps, -(-rows // SAMPLES))
    return epochs * rows + rest * SAMPLES


def weights(folder: RunFolder) -> dict[str, str]:
    """Hashes of the exported model's files; none without a model."""
    return {path.name: sha256(path) for path in (folder.path / "model").glob("*.safetensors")}


def table(survived: Sequence[Survived]) -> str:
    """By kind, in Markdown."""
    lines = ["| fault | survived | seconds until training went on: median | longest |", "|---|---|---|---|"]
    for kind in KINDS:
        if seconds := [it.seconds for it in survived if it.kind == kind]:
            lines.append(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return "\n".join(lines)


def model_with_dropout(folder: Path) -> Path:
    """The quickstart's shape and tokenizer."""
    shutil.copytree(ROOT / "recipes/quickstart/model", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"dropout_rate": 0.1}), encoding="utf-8")
    return folder


def undisturbed(runs: Path, options: Sequence[str]) -> RunFolder:
    runs.mkdir()
    with (runs / "output.txt").open("w", encoding="utf-8") as output, started(runs, options, output) as process:
        if process.wait() != 0:
            sys.exit(f"the undisturbed run ended with exit code {process.returncode}: {output.name}")
    return RunFolder(runs / "it")


def chaos(runs: Path, faults: Sequence[Fault], zero: str) -> bool:
    """Whether all checks hold."""
    steps = STEPS_PER_FAULT * len(faults) + SPARE_STEPS
    keys = [f"model.path={model_with_dropout(runs / 'model')}", f"zero={zero}", f"train.max_steps={steps}", "train.save_steps=8",
            f"batch.samples={SAMPLES}", "data.eval=null", "train.metrics=[]", "run.max_failures=1000000"]  # fmt: skip
    options = [word for key in keys for word in ("--set", key)]
    began = time.monotonic()
    untouched = undisturbed(runs / "undisturbed", options)
    print(f"undisturbed: {steps:,} steps in {time.monotonic() - began:.0f} s", flush=True)
    (runs / "disturbed").mkdir()
    run = Watched(runs / "disturbed", options)
    with run.commands:
        survived = disturb(run, faults)
        found = checks(run, faults, survived, untouched, steps)
    print(f"\n{table(survived)}\n\nin {time.monotonic() - began:.0f} s")
    for check in found:
        print(f"{'holds' if check.holds else 'FAILS'}  {check.text}")
    return all(check.holds for check in found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Train under faults, and compare with an undisturbed run.")
    parser.add_argument("--faults", type=int, default=50, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which faults at which moments (%(default)s)")
    parser.add_argument("--zero", default="zero2", help="the ZeRO configuration (%(default)s)")
    asked = parser.parse_args()
    runs = Path(tempfile.mkdtemp(prefix="trainkit-chaos-"))
    print(f"{asked.faults} faults, seed {asked.seed}, {asked.zero}, in {runs}", flush=True)
    holds = chaos(runs, draw(asked.faults, asked.seed), asked.zero)
    if holds:
        shutil.rmtree(runs)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
