"""TensorBoard, written by rank 0: the curves of tags.py, a page that puts the questions first, the recipe as hyperparameters and as text.

The other ranks have a silent board.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainkit.planning.plan import Plan
from trainkit.recipe.combinations import ROUGE
from trainkit.recipe.schema import Recipe
from trainkit.training import tags
from trainkit.training.meters import StepRecord
from trainkit.units import gib

_SMOOTHED_STEPS = 20
_HYPERPARAMETERS = "events.out.tfevents.0.hparams"  # sorts before the files of all writers, which TensorBoard reads one after another


class Board(Protocol):
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float], seconds: float | None = None) -> None: ...
    def final(self, step: int, values: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, stall_seconds: float) -> None: ...
    def predictions(self, step: int, examples: Sequence[Mapping[str, str]]) -> None: ...
    def completed(self) -> None: ...
    def close(self) -> None: ...


class SilentBoard:
    """Of ranks other than 0."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float], seconds: float | None = None) -> None: ...
    def final(self, step: int, values: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, stall_seconds: float) -> None: ...
    def predictions(self, step: int, examples: Sequence[Mapping[str, str]]) -> None: ...
    def completed(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Story:
    """What a board says once: of the run as it begins, or goes on."""

    use_gpu: bool
    done: int = 0  # steps that stay when a run is resumed; later points are hidden
    hyperparameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    metrics: Sequence[str] = ()  # tags of the evaluation, beside the loss
    has_mfu: bool = False  # the model's FLOPs and the device's peak are known
    texts: Mapping[str, str] = field(default_factory=dict)  # markdown by tag
    expected_peak_bytes: int | None = None
    kept_seconds: float = 0.0  # of the steps that are done
    worked_seconds: Callable[[], float] = lambda: 0.0  # of all commands on this run, until now


class TensorBoard:
    """Points over optimizer steps, in <run>/tensorboard."""

    def __init__(self, folder: Path, story: Story):
        from torch.utils.tensorboard import SummaryWriter

        # Each writer says where it starts: TensorBoard takes the first start in a folder for the beginning, and hides points at later ones.
        experiment, start, self.end = _hyperparameters(story)
        _replace_events(folder / _HYPERPARAMETERS, [experiment, start])
        self.writer = SummaryWriter(str(folder), flush_secs=10, purge_step=story.done + 1)
        self.story, self.kept_seconds = story, story.kept_seconds
        self.described: set[str] = set()
        self.recent: deque[StepRecord] = deque(maxlen=_SMOOTHED_STEPS)
        self.writer.add_custom_scalars(tags.page(story.use_gpu))
        for tag, text in story.texts.items():
            self.writer.add_text(tag, text, story.done)

    def step(self, record: StepRecord) -> None:
        self.recent.append(record)
        self.kept_seconds += record.seconds
        points = {tag: (value, description) for tag, description, value in tags.scalars(record, self.story.use_gpu)}
        seconds = sum(past.seconds for past in self.recent)
        others = {
            "throughput/samples_per_second_smoothed": sum(past.samples for past in self.recent) / seconds,
            "throughput/tokens_per_second_smoothed": sum(past.tokens for past in self.recent) / seconds,
        }
        if worked := self.story.worked_seconds():
            others["throughput/goodput"] = self.kept_seconds / worked
        if self.story.expected_peak_bytes is not None:
            others["memory/planned_peak_gib"] = gib(self.story.expected_peak_bytes)
        self._add(record.step, points | _described(others))

    def evaluation(self, step: int, values: Mapping[str, float], seconds: float | None = None) -> None:
        known, text = tags.OTHER_TAGS, "{} over the evaluation rows."
        points = {f"eval/{name}": (value, known.get(f"eval/{name}", text.format(name))) for name, value in values.items()}
        self._add(step, points | _described({} if seconds is None else {"time/evaluation_seconds": seconds}))

    def final(self, step: int, values: Mapping[str, float]) -> None:
        """Of the weights in model/, which those of `step` are."""
        text = "{} of model/ over the evaluation rows, at the step whose weights it holds."
        known = {"loss": "Cross-entropy in nats per label token"}
        self._add(step, {f"final/{name}": (value, text.format(known.get(name, name))) for name, value in values.items()})

    def checkpoint(self, step: int, stall_seconds: float) -> None:
        self._add(step, _described({"time/checkpoint_stall_seconds": stall_seconds}))

    def predictions(self, step: int, examples: Sequence[Mapping[str, str]]) -> None:
        rows = ["| source | predicted | expected |", "|---|---|---|"]
        rows += [f"| {' | '.join(_cell(one[name]) for name in ('source', 'predicted', 'expected'))} |" for one in examples]
        if examples:
            self.writer.add_text("predictions", "\n".join(rows), step)

    def completed(self) -> None:
        """Says in the HParams tab that this run has come to its end."""
        self._files.add_summary(self.end)

    def close(self) -> None:
        self.writer.close()

    @property
    def _files(self) -> Any:
        return self.writer.file_writer

    def _add(self, step: int, points: Mapping[str, tuple[float, str]]) -> None:
        """(value, description) by tag, in one event. A curve's first point brings its description, which SummaryWriter has no word for."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata

        values = [Summary.Value(tag=tag, simple_value=value) for tag, (value, _) in points.items()]
        for point in values:
            if point.tag not in self.described:
                self.described.add(point.tag)
                point.metadata.CopyFrom(create_summary_metadata(display_name="", description=points[point.tag][1]))
                point.metadata.data_class = DATA_CLASS_SCALAR  # without it TensorBoard's fast loader writes metadata of its own
        self._files.add_summary(Summary(value=values), step)


def _described(values: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    return {tag: (value, tags.OTHER_TAGS[tag]) for tag, value in values.items()}


def hyperparameters(recipe: Recipe, plan: Plan) -> dict[str, str | int | float | bool]:
    """What runs are compared by: the training, and its layout."""
    return {
        "model": Path(recipe.model.path).name if Path(recipe.model.path).is_absolute() else recipe.model.path,
        "precision": plan.precision,
        "lora rank": recipe.model.lora.r if recipe.model.lora is not None else 0,
        "zero": plan.zero_name,
        "workers": plan.world_size,
        "device": plan.device_name,
        "batch.samples": plan.samples_per_step,
        "micro-batches a step": plan.micro_batches_per_step,
        "optimizer.lr": recipe.optimizer.lr,
        "optimizer.lr_scheduler_type": recipe.optimizer.lr_scheduler_type,
        "optimizer.warmup_steps": plan.warmup_steps,
        "optimizer.weight_decay": recipe.optimizer.weight_decay,
        "train steps": plan.total_steps,
        "train.seed": recipe.train.seed,
    }


def _hyperparameters(story: Story) -> tuple[Any, Any, Any]:
    """Summaries that the HParams tab reads: what is compared, this run's values, and that it ended well."""
    from torch.utils.tensorboard.summary import hparams

    peak = "memory/peak_allocated_gib/rank_0" if story.use_gpu else "memory/peak_rss_gib/rank_0"
    measured = [name for metric in story.metrics for name in (ROUGE if metric == "rouge" else (metric,))]
    compared = ["train/loss", *(f"{stage}/{name}" for stage in ("eval", "final") for name in ("loss", *measured))]
    compared += ["throughput/samples_per_second_smoothed", "throughput/tokens_per_second_smoothed"]
    compared += ["throughput/mfu", peak] if story.has_mfu else [peak]
    return hparams(dict(story.hyperparameters), dict.fromkeys(compared, 0.0))


def _replace_events(path: Path, summaries: Sequence[Any]) -> None:
    """Write an event file as a whole. TensorBoard keeps the first summary of a tag in a folder: of hyperparameters, that of the first
    attempt, whatever layout the later ones have."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2"), *(Event(wall_time=now, summary=summary) for summary in summaries)]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(".hparams")
    with unfinished.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    unfinished.replace(path)


def _cell(text: str) -> str:
    """Text of a model in a markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
