"""Bytes of the model states, checked by hand on T5-large, and their order between the stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.planning.deepspeed_config import resolve, sizes
from trainkit.planning.facts import Hardware, ModelFacts, Parameter
from trainkit.planning.memory import PRECISION_BYTES, Memory, activation_bytes_per_token, model_state_bytes
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import SHIPPED, read_zero
from trainkit.units import GIB

GPU = Hardware("cuda", "GPU", None)
T = 737_668_096  # T5-large


def t5_large() -> ModelFacts:
    """The shapes of google-t5/t5-large: 24 + 24 layers, d_model 1024, d_ff 4096, 16 heads, 32 buckets, tied embedding."""
    h = 1024
    matrices = {"encoder": [h * h] * 4 + [4 * h * h] * 2 + [h] * 2, "decoder": [h * h] * 8 + [4 * h * h] * 2 + [h] * 3}
    rest = [(32128 * h, None), (512, 0), (512, 24), (h, None), (h, None)]
    blocks = [(numel, 24 * (stack == "decoder") + number) for stack in matrices for number in range(24) for numel in matrices[stack]]
    parameters = tuple(Parameter(str(i), numel, True, block) for i, (numel, block) in enumerate([*rest, *blocks]))
    return ModelFacts("t5", parameters, 0, h, 48, 32128, "sdpa")


def recipe_of(**sections: dict[str, object]) -> Recipe:
    base: dict[str, dict[str, object]] = {
        "model": {"path": "m", "task": "seq2seq"},
        "data": {"path": "d", "source": "{a}", "target": "{b}", "max_source_length": 96, "max_target_length": 96},
        "batch": {"samples": 96},
        "optimizer": {"lr": 1e-4},
        "train": {"epochs": 3},
        "scaling": {"num_workers": 3},
    }
    return Recipe.model_validate({"name": "r", **{key: base.get(key, {}) | sections.get(key, {}) for key in {*base, *sections}}})


def states(
    name: str | dict[str, object], world_size: int, precision: str = "bf16", facts: ModelFacts | None = None, flat: bool = False
) -> Memory:
    facts, zero = facts or t5_large(), read_zero(name)
    config = resolve(recipe_of(model={"precision": precision}), zero, facts, world_size, GPU)
    return model_state_bytes(facts, zero, world_size, precision, config, flat)


def test_the_model_is_t5_large() -> None:
    assert t5_large().num_parameters == T


def test_stage_0_is_plain_training() -> None:
    fp32 = states("zero0", 1, "fp32")
    assert fp32.device == {"parameters": 4 * T, "gradients": 4 * T, "optimizer": 8 * T, "buckets": 0}
    assert fp32.device_total == 16 * T and fp32.host_total == 0
    bf16 = states("zero0", 1)
    assert bf16.device == {"parameters": 2 * T, "gradients": 2 * T, "optimizer": 12 * T, "buckets": 0}
    assert bf16.device_at_step == 20 * T, "fp32 gradients beside the bf16 ones"
    assert states("zero0", 2).device["buckets"] == 10**9 and states("zero0", 2, flat=True) == bf16, "the gradients lie end to end already"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_stage_1_cuts_the_optimizer(world_size: int) -> None:
    part, bucket = -(-T // world_size), 50_000_896
    memory = states("zero1", world_size)
    assert memory.device == {"parameters": 2 * T, "gradients": 2 * T, "optimizer": 12 * part, "buckets": 2 * bucket}
    assert memory.device_at_step == 2 * T + 12 * part + 8 * part


def test_stage_2_cuts_the_gradients_too() -> None:
    assert states("zero2", 4).device["gradients"] == 2 * 2 * (T // 4)
    assert states("zero2", 4).device["optimizer"] == states("zero1", 4).device["optimizer"]


def test_stage_3_cuts_everything_and_gathers() -> None:
    memory = states("zero3", 4)
    small = 512 * 2 + 1024 * (2 + 24 * 5)  # norms and position biases stay whole
    assert memory.device["parameters"] == 2 * (T // 4) + 2 * small
    assert memory.device["gradients"] == 2 * T // 4 and memory.device["optimizer"] == 12 * T // 4
    live, prefetched, embedding = -(-T // 4), -(-T // 48), 32128 * 1024
    assert memory.device["buckets"] == 2 * 50_000_896 + 2 * (live + prefetched - small) + 2 * 2 * embedding
    at_step = memory.device["parameters"] + (2 + 12 + 2 + 4) * T // 4 + 2 * 50_000_896
    assert memory.device_at_step == at_step
    assert memory.host_total == 0


def test_stage_1_with_graphs_has_the_gradients_once_more_in_fp32_at_the_step() -> None:
    """And the partition's as they were, if a rank has a part of them only."""
    alone, two = states("zero1", 1, flat=True), states("zero1", 2, flat=True)
    assert alone.device == {"parameters": 2 * T, "gradients": 2 * T, "optimizer": 12 * T, "buckets": 0}
    assert alone.device_total == alone.device_at_step == (2 + 2 + 12 + 4) * T
    assert two.device_total == two.device_at_step == (2 + 2) * T + (12 + 2 + 4) * T // 2


def test_stage_2_by_blocks_has_a_blocks_gradients_beside_the_partitions() -> None:
    memory, embedding, block = states("zero2", 4, flat=True), 32128 * 1024, 16 * 1024 * 1024 + 3 * 1024 + 512
    passing = 2 * (3 * embedding + 2 * 1024 + 2 * block)  # the embedding's two gradients and their sum, and those of two blocks
    assert memory.device == {"parameters": 2 * T, "gradients": 2 * T // 4, "optimizer": 12 * T // 4, "buckets": passing}
    assert memory.device_at_step == 2 * T + (2 + 12 + 4) * T // 4
    assert memory.device_total < states("zero2", 4).device_total


def test_stage_3_by_blocks_keeps_what_is_in_none_whole() -> None:
    memory, rest = states("zero3", 4, flat=True), 32128 * 1024 + 2 * 1024  # with the last norms
    assert memory.device["parameters"] == 2 * (T // 4) + 2 * rest
    assert memory.device["gradients"] == 2 * T // 4 and memory.device["optimizer"] == 12 * T // 4
    block = 16 * 1024 * 1024 + 3 * 1024 + 512  # the decoder's first, the next, the gradients of both, a quarter of their sum
    assert memory.device["buckets"] == 2 * (rest + 2 * 32128 * 1024 + 4 * block + block // 4)
    assert memory.device_at_step == memory.device["parameters"] + (2 + 12 + 4) * T // 4
    assert memory.device_total < states("zero3", 4).device_total


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offload_moves_the_optimizer_to_the_host(name: str) -> None:
    memory = states(name, 2)
    assert memory.device["optimizer"] == memory.device["gradients"] == 0
    assert memory.host["optimizer"] == 12 * T // 2
    assert memory.host["gradients"] == (4 + 2) * T // 2
    assert memory.host["parameters"] == (2 * T // 2 if name == "zero3_offload" else 0)
    assert memory.device_total < states(name.removesuffix("_offload"), 2).device_total


def test_what_building_takes_if_there_is_room_need_not_fit() -> None:
    """DeepSpeed lays the parameters flat on the host where the GPU has no room for them twice."""
    assert [states(name, 64).device_at_start for name in ("zero1", "zero2", "zero2_offload", "zero3")] == [4 * T, 4 * T, 4 * T, 0]
    for name in ("zero2", "zero2_offload"):
        assert states(name, 64).device_total < 4 * T


def test_deepspeeds_default_bucket_costs_what_it_costs() -> None:
    """5e8 elements, twice with overlap_comm: allocated in full even for a small model."""
    written = {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 500_000_000}}
    assert states(written, 1).device["buckets"] == 2 * 2 * 500_000_000
    alone = {"zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 500_000_000}}
    assert states(alone, 1).device["buckets"] == 2 * 500_000_000
    small = ModelFacts("t5", (Parameter("w", 60_506_624, True),), 0, 512, 12, 32128, "sdpa")
    assert states("zero1", 1, facts=small).device["buckets"] < 0.04 * GIB


def test_gradients_accumulated_in_fp32_are_counted() -> None:
    written = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert states(written, 2).device["gradients"] == 6 * T


def test_frozen_parameters_carry_neither_gradients_nor_states() -> None:
    facts = ModelFacts("llama", (Parameter("base", 10**9, False), Parameter("lora", 10**6, True)), 4096, 2048, 16, 32000, "sdpa")
    for name in SHIPPED:
        memory = states(name, 2, facts=facts)
        both = {key: memory.device[key] + memory.host[key] for key in memory.device}
        assert both["optimizer"] in (12 * 10**6, 12 * 10**6 // 2)
        assert both["gradients"] <= 6 * 10**6
    assert states("zero2", 2, facts=facts).device["parameters"] == 2 * (10**9 + 10**6) + 4096
    assert states("zero3", 2, facts=facts).device["parameters"] == 10**9 + 10**6 + 4096


def some_model(entries: list[tuple[int, bool]]) -> ModelFacts:
    parameters = [Parameter(str(index), numel, trained) for index, (numel, trained) in enumerate([*entries, (1000, True)])]
    return ModelFacts("llama", tuple(parameters), 7, 64, 4, 100, "sdpa")


FACTS = st.lists(st.tuples(st.integers(1, 10**7), st.booleans()), min_size=1, max_size=20).map(some_model)


@given(FACTS, st.integers(1, 64), st.sampled_from(["bf16", "fp16", "fp32"]), st.sampled_from(SHIPPED))
def test_partitions_hold_the_whole_state(facts: ModelFacts, world_size: int, precision: str, name: str) -> None:
    """All ranks together hold at least every weight and every optimizer state once; one rank never more than a rank of half the group."""
    memory, width = states(name, world_size, precision, facts), PRECISION_BYTES[precision]
    masters = 8 if (name, precision) == ("zero0", "fp32") else 12
    assert world_size * (memory.device["optimizer"] + memory.host["optimizer"]) >= masters * facts.num_trainable
    assert world_size * (memory.device["parameters"] + memory.host["parameters"]) >= width * facts.num_parameters
    if name != "zero0":
        assert states(name, 2 * world_size, precision, facts).device_total <= memory.device_total
    assert memory.device_total >= memory.device_at_step


@given(FACTS)
def test_sizes_come_from_the_model_and_are_aligned(facts: ModelFacts) -> None:
    for name in SHIPPED:
        planned = sizes(read_zero(name), facts)
        assert all(planned[key] % 2 == 0 and 0 < planned[key] < 5e8 for key in planned if "bucket_size" in key and "prefetch" not in key)
        assert planned.get("reduce_bucket_size", 0) <= max(1024, facts.num_trainable)


def test_activations_bound_what_was_measured() -> None:
    """T5-large, 128 rows of 96 + 96 tokens, eager, one GPU: 61.5 GiB with fp32 weights under autocast (16 + 2 bytes a parameter)."""
    measured = (61.5 * GIB - 18 * T) / (128 * 192)
    planned = activation_bytes_per_token(t5_large(), "bf16", False, 192)
    assert measured <= planned <= 1.5 * measured


def test_checkpointing_keeps_less_and_fp32_more() -> None:
    facts = t5_large()
    plain = activation_bytes_per_token(facts, "bf16", False, 192)
    assert activation_bytes_per_token(facts, "bf16", True, 192) < plain / 4
    assert 0.75 * plain < activation_bytes_per_token(facts, "bf16", "selective", 192) < 0.8 * plain, "logits are kept as they were"
    assert activation_bytes_per_token(facts, "fp32", False, 192) > 1.8 * plain
    assert activation_bytes_per_token(facts, "bf16", False, 1024) > plain, "scores grow with the row"


def test_shipped_t5_large_is_the_one_by_hand(shared: Path) -> None:
    """Against the published shape, read on the meta device."""
    from trainkit.training.model import model_facts

    read = model_facts(recipe_of(model={"path": str(shared / "models/t5-large"), "weights": "random"}))
    assert sorted(p.numel for p in read.parameters) == sorted(p.numel for p in t5_large().parameters)
    assert (read.hidden_size, read.num_layers, read.vocab_size) == (1024, 48, 32128)
