"""Every TensorBoard scalar of a step: its tag, its unit, what it says, and where its number comes from. And the page that they make up.

A number that does not exist (no GPU, no known peak) has no point; a NaN that was measured is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainkit.training.meters import StepRecord
from trainkit.training.rank_meters import BACKWARD, FORWARD, OPTIMIZER, RankNumbers
from trainkit.units import gib

Number = float | None


@dataclass(frozen=True)
class StepTag:
    """One curve."""

    tag: str
    description: str  # markdown, with the unit
    value: Callable[[StepRecord], Number]


@dataclass(frozen=True)
class RankTag:
    """One curve per rank: <tag>/rank_<r>."""

    tag: str
    description: str
    value: Callable[[RankNumbers], Number]


def _piece(name: str) -> Callable[[StepRecord], Number]:
    return lambda record: record.piece_seconds.get(name)


def _measured(value: float) -> Number:
    return None if math.isnan(value) else value


STEP_TAGS = (
    StepTag("train/loss", "Cross-entropy in nats per label token (classification: per sample), over all ranks.", lambda r: r.loss),
    StepTag("train/grad_norm", "L2 norm of the gradient over all parameters, before clipping.", lambda r: r.grad_norm),
    StepTag("train/learning_rate", "Learning rate of the step.", lambda r: r.lr),
    StepTag("throughput/samples_per_second", "Rows per second over all ranks.", lambda r: r.samples / r.seconds),
    StepTag("throughput/tokens_per_second", "Real tokens per second over all ranks, without padding.", lambda r: r.tokens / r.seconds),
    StepTag(
        "throughput/mfu",
        "Share (0 to 1) of the devices' peak in dense 16 bit products that the model's FLOPs on real tokens make up (PaLM, appendix B).",
        lambda r: r.mfu,
    ),
    StepTag("throughput/padding_fraction", "Padding's share (0 to 1) of the tokens in the micro-batches.", lambda r: r.padding_fraction),
    StepTag("throughput/tokens_imbalance", "Real tokens of the most loaded rank over the mean of the ranks.", lambda r: r.tokens_imbalance),
    StepTag("time/step_seconds", "Seconds from the end of the step before to the end of this one.", lambda r: r.seconds),
    StepTag(
        "time/data_wait_fraction",
        "Share (0 to 1) of the step in which the rank that waited longest waited for data, its GPU having nothing left to do.",
        lambda r: r.data_wait_seconds / r.seconds,
    ),
    StepTag(
        "time/data_wait_seconds", "Seconds that the rank that waited longest waited for data, as above.", lambda r: r.data_wait_seconds
    ),
    StepTag("time/forward_seconds", "Seconds of all forwards of the step on rank 0; on a GPU as its stream sees them.", _piece(FORWARD)),
    StepTag(
        "time/backward_seconds",
        "Seconds of all backwards of the step on rank 0, the reduction of gradients included where it overlaps.",
        _piece(BACKWARD),
    ),
    StepTag("time/optimizer_seconds", "Seconds of the optimizer step on rank 0, with what is left of the reduction.", _piece(OPTIMIZER)),
)

_SO_FAR = "since the worker's start: in its steps and in evaluations and checkpoints between them, not in what follows the last step."
_GPU_TAGS = (
    RankTag("memory/peak_allocated_gib", f"GiB of tensors at the fullest moment {_SO_FAR}", lambda r: gib(r.peak_bytes)),
    RankTag("memory/peak_reserved_gib", f"GiB that torch's allocator held at most {_SO_FAR}", lambda r: gib(r.peak_reserved_bytes)),
    RankTag("memory/allocated_gib", "GiB of tensors between two steps.", lambda r: gib(r.allocated_bytes)),
    RankTag("memory/reserved_gib", "GiB that torch's allocator holds between two steps.", lambda r: gib(r.reserved_bytes)),
    RankTag("memory/parameters_gib", "GiB of parameters on the GPU.", lambda r: gib(r.parameter_bytes)),
    RankTag("memory/gradients_gib", "GiB of gradients after a step's last backward, at most so far.", lambda r: gib(r.gradient_bytes)),
    RankTag("memory/optimizer_gib", "GiB of optimizer states and fp32 weights on the GPU.", lambda r: gib(r.optimizer_bytes)),
    RankTag("memory/activations_gib", "GiB that a forward left for its backward, at most so far.", lambda r: gib(r.activation_bytes)),
    RankTag("memory/other_gib", "GiB of all else that stays between two steps.", lambda r: gib(r.other_bytes)),
    RankTag("memory/host_gib", "GiB of the worker process that are resident on the host.", lambda r: gib(r.host_bytes)),
    RankTag("gpu/utilization", "Share (0 to 1) of the last second in which a kernel ran, by NVML.", lambda r: _measured(r.gpu_utilization)),
    RankTag("gpu/power_watts", "Power in W, by NVML.", lambda r: _measured(r.gpu_watts)),
    RankTag("gpu/temperature_celsius", "Temperature in °C, by NVML.", lambda r: _measured(r.gpu_celsius)),
)
_CPU_TAGS = (
    RankTag(
        "memory/peak_rss_gib",
        f"GiB of the worker process that were resident at most {_SO_FAR}, rows mapped from disk included",
        lambda r: gib(r.peak_bytes),
    ),
    RankTag(
        "memory/rss_gib",
        "GiB of the worker process that are resident after the step, rows mapped from disk included.",
        lambda r: gib(r.host_bytes),
    ),
)
OTHER_TAGS = {
    "memory/planned_peak_gib": "GiB on one device that the plan expects at the fullest moment, from the first 32 steps' micro-batches.",
    "throughput/samples_per_second_smoothed": "Rows per second over the last 20 steps.",
    "throughput/tokens_per_second_smoothed": "Real tokens per second over the last 20 steps.",
    "throughput/goodput": "Share (0 to 1) of all the time that commands worked on this run, starts and repeated steps included, "
    "that went into steps that count.",
    "time/checkpoint_stall_seconds": "Seconds that training stood still for a checkpoint.",
    "time/evaluation_seconds": "Seconds of an evaluation.",
    "eval/loss": "Cross-entropy in nats per label token over the evaluation rows.",
}


def rank_tags(use_gpu: bool) -> tuple[RankTag, ...]:
    return _GPU_TAGS if use_gpu else _CPU_TAGS


def scalars(record: StepRecord, use_gpu: bool) -> Iterator[tuple[str, str, float]]:
    """(tag, description, value) of all curves of a step."""
    for step_tag in STEP_TAGS:
        if (value := step_tag.value(record)) is not None:
            yield step_tag.tag, step_tag.description, value
    for rank_tag in rank_tags(use_gpu):
        for rank, numbers in enumerate(record.ranks):
            if (value := rank_tag.value(numbers)) is not None:
                yield f"{rank_tag.tag}/rank_{rank}", rank_tag.description, value


def page(use_gpu: bool) -> dict[str, dict[str, list[object]]]:
    """The custom-scalars page: questions, each with charts; a chart lays curves over each other, ranks among them (regular expressions)."""

    def chart(*patterns: str) -> list[object]:
        return ["Multiline", [f"^{pattern}$" for pattern in patterns]]

    ranks = r"/rank_\d+"
    fits = {
        "peak memory of each rank, and the plan's (GiB)": chart(f"memory/peak_allocated_gib{ranks}", "memory/planned_peak_gib"),
        "reserved by the allocator (GiB)": chart(f"memory/peak_reserved_gib{ranks}", f"memory/reserved_gib{ranks}"),
        "what it holds (GiB)": chart(rf"memory/(parameters|gradients|optimizer|activations|other)_gib{ranks}"),
    }
    if not use_gpu:
        fits = {"resident memory of each rank (GiB)": chart(f"memory/peak_rss_gib{ranks}", f"memory/rss_gib{ranks}")}
    fast = {
        "real tokens per second": chart("throughput/tokens_per_second", "throughput/tokens_per_second_smoothed"),
        "samples per second": chart("throughput/samples_per_second", "throughput/samples_per_second_smoothed"),
    }
    if use_gpu:
        fast |= {"MFU": chart("throughput/mfu"), "GPU utilization": chart(f"gpu/utilization{ranks}")}
    return {
        "1 Is it learning?": {
            "loss": chart("train/loss", "eval/loss"),
            "gradient norm": chart("train/grad_norm"),
            "learning rate": chart("train/learning_rate"),
        },
        "2 Does it fit?": fits,
        "3 Is it fast?": fast,
        "4 What does it wait for?": {
            "seconds of a step": chart("time/step_seconds", "time/(forward|backward|optimizer|data_wait)_seconds"),
            "waiting for data (share)": chart("time/data_wait_fraction"),
            "padding (share)": chart("throughput/padding_fraction"),
            "goodput (share)": chart("throughput/goodput"),
        },
    }
