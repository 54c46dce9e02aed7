"""Bytes of the model states on one rank, device and host apart, as DeepSpeed 0.19.8 allocates them.

Read off runtime/zero/stage_1_and_2.py, stage3.py and runtime/fp16/unfused_optimizer.py. P: parameters, T: trainable ones,
W: world size, b: bytes of the training precision. Flat partitions are T/W, rounded up.

              parameters        gradients         optimizer   buckets
    stage 0   bP                bT                8T in fp32, else 12T (fp32 weights, two moments)
                                                              a flat copy for the all-reduce, if W > 1, save on flat tensors
    stage 1   bP                bT                12T/W       reduce_bucket_size, twice with overlap_comm
    stage 2   bP                2bT/W             12T/W       the same
    stage 3   bP/W + persistent bT/W              12T/W       reduce_bucket_size, gathered parameters
    on flat tensors, as with CUDA graphs
    stage 2   bP                bT/W              12T/W       a repeated block's gradients, twice
    stage 3   bP/W + in no block bT/W             12T/W       two repeated blocks, with two blocks' gradients

On flat tensors stage 1 has no bucket. Otherwise under stage 3, and with offload, the whole gradient of a weight that is used several times
is summed in two tensors: the largest weight's count as buckets. Optimizer offload moves gradient partitions and optimizer to the host and
keeps there an fp32 gradient and a 16 bit copy of the partition; on its way a gradient exists once more, in fp32. All of it but
stage 0 on flat tensors was compared with the peak of a tiny step on H200 (tests/gpu/test_gpu_memory.py), those on flat tensors on one.
Activations are not model states: `activation_bytes_per_token` bounds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainkit.planning.facts import ModelFacts
from trainkit.recipe.zero import ZeroConfig

PRECISION_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
CATEGORIES = ("parameters", "gradients", "optimizer", "buckets")
SELECTIVE = 0.75  # of a layer's activations that compiled blocks keep then: 0.70 of T5-large's on H200
ALLREDUCE_ELEMENTS = 500_000_000  # stage 0 flattens at most so many gradients at a time
BIASED_ATTENTION = ("t5", "mt5", "umt5", "longt5")  # a position bias keeps the kernels that never store the scores away


@dataclass(frozen=True)
class Memory:
    """Bytes per rank by category while a backward pass runs; `device_at_step` is the device's total inside the optimizer step.

    There the buckets are gone (stages 1 and 2) but the gradients of the partition exist a second time, in fp32. `device_at_start` is what
    building takes for a moment under stages 1 and 2, where DeepSpeed lays the parameters flat beside themselves. It does so on the host if
    the device has no room for it, so it counts in the peak that is expected, and not in what must fit.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    device_at_step: int = 0
    device_at_start: int = 0

    @property
    def device_total(self) -> int:
        """What must fit: the larger of the two moments in a step."""
        return max(sum(self.device.values()), self.device_at_step)

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class _Case:
    facts: ModelFacts
    offload_optimizer: bool
    offload_param: bool
    world_size: int
    width: int  # bytes of an element in the training precision
    section: Mapping[str, Any]  # zero_optimization, resolved
    accumulated: int  # bytes of an element in which gradients accumulate
    flat: bool

    @property
    def total(self) -> int:
        return self.facts.num_parameters

    @property
    def trained(self) -> int:
        return self.facts.num_trainable

    @property
    def partition(self) -> int:
        """Trainable elements of a rank under stages 1 and 2: one flat tensor, padded to equal parts."""
        return -(-self.trained // self.world_size)

    @property
    def fp32_copy(self) -> int:
        """Bytes of an element of the gradients that the optimizer sees, beside those that were summed."""
        return 0 if self.width == 4 else 4

    @property
    def in_flight(self) -> int:
        """Bytes of the largest gradient while it is summed, and in fp32 on its way to the host."""
        largest = max((p.numel for p in self.facts.parameters if p.trainable), default=0)
        return largest * (2 * self.width + (4 if self.offload_optimizer else 0))

    @property
    def bucket(self) -> int:
        """Elements of one reduce bucket, allocated in full whatever the model; none with contiguous_gradients off."""
        return self.size("reduce_bucket_size", ALLREDUCE_ELEMENTS) if self.section.get("contiguous_gradients", True) else 0

    def size(self, name: str, default: int) -> int:
        """DeepSpeed takes stage 3's sizes with and without the prefix."""
        return int(self.section.get(name, self.section.get(f"stage3_{name}", default)))


def model_state_bytes(
    facts: ModelFacts, zero: ZeroConfig, world_size: int, precision: str, ds_config: Mapping[str, Any], flat: bool = False
) -> Memory:
    """What one rank holds. ds_config is resolved (planning/deepspeed_config.py): its zero_optimization gives the sizes.

    flat: the plan is, as CUDA graphs need it (training/flat_zero0.py, flat_zero1.py, by_blocks.py)."""
    width = PRECISION_BYTES[precision]
    accumulated = PRECISION_BYTES.get(ds_config.get("data_types", {}).get("grad_accum_dtype", precision), width)
    section = ds_config["zero_optimization"]
    case = _Case(facts, zero.offload_optimizer, zero.offload_param, world_size, width, section, accumulated, flat)
    stages: dict[int, Callable[[_Case], Memory]] = {0: _stage_0, 1: _stage_1, 2: _stage_2, 3: _stage_3}
    if flat:
        stages |= {2: _stage_2_by_blocks, 3: _stage_3_by_blocks}
    memory = stages[zero.stage](case)
    laid_flat = _whole(case) + width * case.trained
    return replace(memory, device_at_start=laid_flat) if zero.stage in (1, 2) else memory


def _stage_0(case: _Case) -> Memory:
    """Plain torch in fp32; at 16 bit an fp32 copy of the weights, and at the step fp32 gradients beside the 16 bit ones. On flat tensors
    the gradients lie end to end already."""
    masters = 0 if case.width == 4 else 4 * case.trained
    flat = min(case.trained, ALLREDUCE_ELEMENTS) * case.width if case.world_size > 1 and not case.flat else 0
    device = _by_category(_whole(case), case.width * case.trained, masters + 8 * case.trained, flat)
    return Memory(device, _by_category(), sum(device.values()) - flat + masters)


def _stage_1(case: _Case) -> Memory:
    """Whole gradients until the step's end; twice where they accumulate in another type than they are computed in.

    On flat tensors they are reduced at once: there are no buckets, and at the step the partition's gradients exist beside all of them
    in fp32, and as they were unless one rank has them all.
    """
    extra = 0 if case.accumulated == case.width else case.accumulated
    memory = _partitioned_optimizer(case, (case.width + extra) * case.trained)
    if not case.flat:
        return memory
    device = memory.device | {"buckets": 0}
    reduced = case.width if case.world_size > 1 else 0
    return replace(memory, device=device, device_at_step=sum(device.values()) + (reduced + case.fp32_copy) * case.partition)


def _stage_2(case: _Case) -> Memory:
    """Gradients of the own partition: those accumulated so far and those of the running backward."""
    return _partitioned_optimizer(case, 0 if case.offload_optimizer else (case.width + case.accumulated) * case.partition)


def _partitioned_optimizer(case: _Case, gradients: int) -> Memory:
    buckets = case.width * case.bucket * (2 if case.section.get("overlap_comm", False) else 1)
    if case.offload_optimizer:
        staging = case.width * max((p.numel for p in case.facts.parameters if p.trainable), default=0)
        device = _by_category(_whole(case), gradients, 0, buckets + staging + case.in_flight)
        host = _by_category(0, (4 + case.width) * case.partition, 12 * case.partition, case.width * case.partition + staging)
        return Memory(device, host, sum(device.values()))
    device = _by_category(_whole(case), gradients, 12 * case.partition, buckets)
    at_step = device["parameters"] + device["optimizer"] + (2 * case.width + case.fp32_copy) * case.partition
    return Memory(device, _by_category(), at_step)


def _stage_3(case: _Case) -> Memory:
    """Each parameter is cut into W shards of its own. Gathered at once: at most stage3_max_live_parameters and what is prefetched.

    At the step the gradients exist three times: as they were, laid flat, and in fp32.
    """
    width = case.width
    threshold = case.size("param_persistence_threshold", 100_000)
    persistent = sum(p.numel for p in case.facts.parameters if p.numel <= threshold)
    shards = sum(-(-p.numel // case.world_size) for p in case.facts.parameters)
    trained = sum(-(-p.numel // case.world_size) for p in case.facts.parameters if p.trainable)
    live = min(case.total, case.size("max_live_parameters", 1_000_000_000) + case.size("prefetch_bucket_size", 50_000_000))
    gathered = width * max(0, live - persistent)
    masters, gradients = 12 * trained, case.accumulated * trained
    step_gradients = (width + case.fp32_copy) * min(trained, case.size("sub_group_size", 1_000_000_000))
    kept = width * persistent + case.facts.buffer_bytes
    shard_bytes = width * shards
    device = _by_category(
        kept + (0 if case.offload_param else shard_bytes),
        0 if case.offload_optimizer else gradients,
        0 if case.offload_optimizer else masters,
        width * case.bucket + gathered + case.in_flight,
    )
    host = _by_category(
        shard_bytes if case.offload_param else 0,
        gradients + 4 * trained if case.offload_optimizer else 0,
        masters if case.offload_optimizer else 0,
        width * trained if case.offload_optimizer else 0,
    )
    return Memory(device, host, sum(device.values()) - gathered - case.in_flight + (0 if case.offload_optimizer else step_gradients))


def _stage_2_by_blocks(case: _Case) -> Memory:
    """Gradients of the own partition, and beside them those of what is in no repeated block, which are summed at the end, and of a block,
    twice: laid end to end to be summed, while those of the next one come about. A weight that is used twice, as the largest of what is in
    no block often is, has two gradients and their sum meanwhile. At the step the partition's exist once more in fp32."""
    trained = [parameter for parameter in case.facts.parameters if parameter.trainable]
    rest = [parameter.numel for parameter in trained if parameter.block is None]
    block = _largest_block((parameter.block, parameter.numel) for parameter in trained)
    passing = case.width * (sum(rest) + 2 * block + 2 * max(rest, default=0))
    device = _by_category(_whole(case), case.width * case.partition, 12 * case.partition, passing)
    return Memory(device, _by_category(), sum(device.values()) - passing + case.fp32_copy * case.partition)


def _stage_3_by_blocks(case: _Case) -> Memory:
    """The shards, and beside them what is in no repeated block, whole. In backward a block is whole and the next one, too; there are its
    gradients, and those of the block before with their sum, beside the other gradients of what is in none; these are summed at the end, and
    come about as under stage 2. At the step the gradients exist once more in fp32."""
    parameters = [(parameter, -(-parameter.numel // case.world_size)) for parameter in case.facts.parameters]
    rest = [(parameter, shard) for parameter, shard in parameters if parameter.block is None]
    whole = sum(parameter.numel for parameter, _ in rest)
    gradients = [parameter.numel for parameter, _ in rest if parameter.trainable]
    sums = sum(shard for parameter, shard in rest if parameter.trainable)
    block = _largest_block((p.block, 2 * p.numel + (2 * p.numel + shard) * p.trainable) for p, shard in parameters)
    trained = sum(shard for parameter, shard in parameters if parameter.trainable)
    passing = case.width * max(sum(gradients) + block + 2 * max(gradients, default=0), 2 * sum(gradients) + sums)
    shards = sum(shard for _, shard in parameters)
    device = _by_category(case.width * (shards + whole) + case.facts.buffer_bytes, case.width * trained, 12 * trained, passing)
    return Memory(device, _by_category(), sum(device.values()) - passing + case.fp32_copy * trained)


def _largest_block(elements: Iterable[tuple[int | None, int]]) -> int:
    """Of (repeated block or None, elements) of each parameter."""
    blocks = Counter[int]()
    for block, count in elements:
        if block is not None:
            blocks[block] += count
    return max(blocks.values(), default=0)


def _whole(case: _Case) -> int:
    return case.width * case.total + case.facts.buffer_bytes


def _by_category(parameters: int = 0, gradients: int = 0, optimizer: int = 0, buckets: int = 0) -> dict[str, int]:
    return dict(zip(CATEGORIES, (parameters, gradients, optimizer, buckets), strict=True))


def activation_bytes_per_token(facts: ModelFacts, precision: str, gradient_checkpointing: bool | str, row_tokens: int) -> int:
    """An upper bound on what backward keeps per token of a micro-batch.

    A layer of width h with 12 h² weights keeps 34 h bytes a token at 16 bit (Korthikanti et al. 2022); wider layers and cross-attention
    in proportion to their weights. Attention that stores its scores adds 5 bytes per head and key, with heads of 64. Logits: the 16 bit
    ones, an fp32 copy and its gradient. Encoder and decoder layers both count for every token, which covers what T5 keeps beyond the
    formula (norms in fp32): measured for T5-large at 96 + 96 tokens, batch 128: 2.1 MB a token with its attention in
    fp32, 1.15 MB in bf16 and compiled; here 3.0 MB.
    gradient_checkpointing: true keeps each layer's input, "selective" what SELECTIVE says.
    """
    hidden, layers, width = max(1, facts.hidden_size), max(1, facts.num_layers), PRECISION_BYTES[precision]
    blocks = max(0, facts.num_parameters - facts.vocab_size * hidden)
    layer = 34 * hidden * max(1.0, blocks / (12 * hidden**2 * layers))
    if facts.attn_implementation == "eager" or facts.model_type in BIASED_ATTENTION:
        layer += 5 * max(1, hidden // 64) * row_tokens
    layer *= width / 2
    if gradient_checkpointing == "selective":
        layer *= SELECTIVE
    kept = layer + width * hidden * layers if gradient_checkpointing is True else layer * layers
    return int(kept + facts.vocab_size * (4 + width + 4))
