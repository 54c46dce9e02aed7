"""The plan itself: what was decided, as plain numbers that are printed, written to plan.json and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainkit.markup import html, plain
from trainkit.planning.flops import TrainingFlops
from trainkit.planning.memory import Memory


@dataclass(frozen=True)
class Fit:
    """What a shipped ZeRO configuration takes per worker, and whether one micro-batch of one full row fits beside it."""

    name: str
    device: int
    host: int
    row: int  # activation bytes of one row of full length
    fits: bool | None  # None: the device's memory is not known


@dataclass(frozen=True)
class Plan:
    recipe_name: str
    world_size: int
    use_gpu: bool
    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    precision: str
    samples_per_step: int
    tokens_per_device: int | None  # budget of one micro-batch, padding included; None: samples_per_device rules, or unknown
    samples_per_device: int | None
    rows: int | None
    eval_rows: int | None
    steps_per_epoch: int | None
    last_step_samples: int | None  # rows of an epoch's last step
    total_steps: int  # 0: unknown
    epochs: float | None
    warmup_steps: int
    eval_every: int  # optimizer steps; 0: never, or unknown
    save_every: int
    micro_batches_per_step: int  # over all workers, with every row at its full length until the data is known; 0: unknown
    accumulation: int  # micro-batches of one worker
    ds_config: dict[str, Any]
    memory: Memory | None  # None: the model is not known
    memory_as_deepspeed: Memory | None = None  # the same, where the plan is flat, which may be given up
    evaluates: bool = True
    attention: str | None = None  # as transformers calls it; None: the model is not known
    compile_blocks: bool = False
    selective_checkpointing: bool = False  # what compiled blocks can compute again at little cost is not kept for backward
    compiled_shapes: tuple[tuple[int, int, int], ...] = ()  # rows, source and target of those that have kernels of their own
    flat: bool = False  # gradients are summed and weights updated on whole flat tensors, and not as DeepSpeed does it
    cuda_graphs: bool = False  # of forward and backward; only if flat
    no_graphs: str | None = None  # why there are none
    notes: tuple[str, ...] = ()
    zero_name: str = "zero0"
    device_name: str = "CPU"
    device_memory: int | None = None
    fits: tuple[Fit, ...] = ()  # of the shipped configurations, where the device's memory is known
    splits_for_padding: bool = False  # into smaller micro-batches than fit, once the rows' lengths are known
    num_layers: int = 0  # encoder plus decoder; 0: the model is not known
    activation_bytes_per_token: int | None = None  # at most, per padded token of a micro-batch; None: the model is not known
    expected_activation_bytes: int | None = None  # on the device, at most, in the first steps, once their micro-batches are known
    expected_peak_bytes: int | None = None  # with the model states
    largest_micro_batch_tokens: int | None = None  # padded, in the first steps, once they are known
    flops: TrainingFlops | None = None  # None: a count would mislead
    peak_flops: float | None = None  # of one device, per second; None: not known

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Of plan.json. Raises TypeError or KeyError for one of another version."""
        flops = values["flops"]
        parts = {
            **{name: Memory(**values[name]) for name in ("memory", "memory_as_deepspeed") if values.get(name) is not None},
            "flops": None if flops is None else TrainingFlops(**flops),
            "fits": tuple(Fit(**fit) for fit in values["fits"]),
            "notes": tuple(values["notes"]),
            "compiled_shapes": tuple(tuple(shape) for shape in values.get("compiled_shapes", ())),
        }
        return cls(**{**values, **parts})

    def __repr__(self) -> str:
        """The plan as `trainkit plan` prints it."""
        from trainkit.planning.show import plan_text

        return plain(plan_text(self))

    def _repr_html_(self) -> str:
        from trainkit.planning.show import plan_text

        return html(plan_text(self))
