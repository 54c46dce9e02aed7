"""The plan's arithmetic, the resolved DeepSpeed JSON, what is refused and what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_memory import recipe_of, t5_large

from trainkit.data import batches
from trainkit.data.catalogue import Catalogues
from trainkit.errors import DoesNotFit, RecipeError
from trainkit.planning import planner
from trainkit.planning.facts import DataFacts, Hardware, ModelFacts, Parameter
from trainkit.planning.flops import TrainingFlops
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.planning.revision import halved, with_micro_batches, without_graphs
from trainkit.planning.show import batch_equation, plan_text, step_equation
from trainkit.recipe.zero import SHIPPED, read_zero
from trainkit.units import GIB, format_bytes

CPU = Hardware("cpu", "CPU", None)
WIKISQL = DataFacts(56_344, 8_421)


def gpu(gib: float | None) -> Hardware:
    return Hardware("cuda", "GPU", None if gib is None else int(gib * GIB))


def plan_of(
    zero: str | dict[str, Any] | None = None,
    hardware: Hardware = CPU,
    facts: ModelFacts | None = None,
    counted: DataFacts = WIKISQL,
    most: int | None = None,
    **sections: Any,
) -> Plan:
    return make_plan(recipe_of(**sections), read_zero(zero), facts or t5_large(), counted, hardware, most)


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_the_reference_experiment() -> None:
    plan = plan_of("zero3", gpu(139))
    assert (plan.world_size, plan.micro_batches_per_step, plan.accumulation, plan.tokens_per_device) == (3, 3, 1, 32 * 192)
    assert (plan.steps_per_epoch, plan.total_steps, plan.last_step_samples, plan.epochs) == (587, 1761, 88, 3.0)
    assert batch_equation(plan) == "96 samples a step = 3 workers × 1 micro-batch × about 32 rows"
    assert step_equation(plan) == "1,761 steps = 3 epochs × 587 steps; the last step of an epoch has 88 samples"


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40))
def test_rows_per_device(samples: int, workers: int, rows: int) -> None:
    plan = plan_of(batch={"samples": samples, "samples_per_device": rows}, scaling={"num_workers": workers})
    k = plan.micro_batches_per_step
    assert k % workers == 0 and k * rows >= samples > (k - workers) * rows
    assert plan.accumulation * workers == k and plan.tokens_per_device is None
    assert k == len(batches.compose(np.full(samples, 96), np.full(samples, 96), workers, batches.Budget(rows=rows)))


@settings(max_examples=40)
@given(st.integers(1, 120), st.integers(1, 6), st.integers(1, 4000), st.integers(0, 2**32 - 1))
def test_a_token_budget_bounds_the_micro_batches(samples: int, workers: int, tokens: int, seed: int) -> None:
    """At full lengths the plan's k is the composed one; for shorter rows it is never exceeded."""
    plan = plan_of(batch={"samples": samples, "tokens_per_device": tokens}, scaling={"num_workers": workers})
    budget, random = batches.Budget(tokens=tokens), np.random.default_rng(seed)
    full, shorter = np.full((2, samples), 96), random.integers(1, 97, (2, samples))
    composed = [batches.compose(*step, workers, budget, Catalogues(*step, samples, budget)) for step in (full, shorter)]
    assert len(composed[0]) == plan.micro_batches_per_step >= len(composed[1])


@settings(max_examples=60)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 20_000), st.booleans(), st.integers(1, 96), st.integers(0, 2**32 - 1))
def test_half_the_budget_makes_the_largest_micro_batch_smaller_until_it_is_a_row(
    samples: int, workers: int, budget: int, rows: bool, longest: int, seed: int
) -> None:
    key, lengths = "samples_per_device" if rows else "tokens_per_device", np.random.default_rng(seed).integers(1, longest + 1, (2, samples))
    sections: dict[str, Any] = {"batch": {"samples": samples, key: budget}, "scaling": {"num_workers": workers}}
    most, largest, rows_per_worker = None, None, -(-samples // workers)
    while True:
        plan = plan_of(most=most, **sections)
        asked = getattr(plan, key)
        assert asked >= 1 and plan.samples_per_step == samples and plan.accumulation <= rows_per_worker
        cut = batches.Budget(rows=asked) if rows else batches.Budget(tokens=asked)
        catalogues = None if rows else Catalogues(*lengths, samples, cut)
        uses = Counter(part.shape for part in batches.compose(*lengths, workers, cut, catalogues))
        plan = with_micro_batches(plan, recipe_of(**sections), uses.items(), 1, 1)
        before, largest = largest, max(uses, key=lambda shape: shape.rows if rows else shape.cost)
        if before is not None:
            assert largest.rows < before.rows if rows else largest.cost < before.cost or largest.rows == 1
        most = halved(plan)
        if most is None:
            break
    assert largest.rows == 1 or plan.accumulation == rows_per_worker


@given(st.integers(1, 10_000), st.integers(1, 500), st.integers(1, 5), st.none() | st.integers(1, 1000))
def test_steps_add_up_to_the_rows(rows: int, samples: int, epochs: int, max_steps: int | None) -> None:
    plan = plan_of(counted=DataFacts(rows, None), batch={"samples": samples}, train={"epochs": epochs, "max_steps": max_steps})
    assert plan.steps_per_epoch is not None and plan.last_step_samples is not None and plan.epochs is not None
    assert (plan.steps_per_epoch - 1) * samples + plan.last_step_samples == rows and 1 <= plan.last_step_samples <= samples
    assert plan.total_steps == (max_steps or epochs * plan.steps_per_epoch)
    assert plan.epochs * plan.steps_per_epoch == pytest.approx(plan.total_steps)


def test_padding_is_the_feeds() -> None:
    assert planner.row_tokens(recipe_of(data={"max_source_length": 97, "max_target_length": None})) == 104 + 512
    assert planner.row_tokens(recipe_of(model={"task": "causal"}, data={"max_length": 100})) == 104


@pytest.mark.parametrize("warmup, steps", [(0, 0), (20, 20), (0.02, 35), (0.5, 880)])
def test_warmup_is_steps_or_a_share(warmup: float, steps: int) -> None:
    assert plan_of(optimizer={"warmup_steps": warmup}).warmup_steps == steps


@pytest.mark.parametrize("every, steps", [("epoch", 587), (100, 100), (0.1, 176), (1e-6, 1)])
def test_every_is_an_epoch_steps_or_a_share(every: Any, steps: int) -> None:
    plan = plan_of(train={"eval_steps": every, "save_steps": every})
    assert (plan.eval_every, plan.save_every) == (0, steps), "without data.eval nothing is evaluated"
    with_eval = plan_of(train={"eval_steps": every}, data={"eval": "validation"})
    assert with_eval.eval_every == steps


def test_unknown_facts_stay_unknown() -> None:
    recipe = recipe_of(optimizer={"warmup_steps": 0.1})
    plan = make_plan(recipe, read_zero("zero3"), None, DataFacts(None, None), gpu(80))
    assert (plan.rows, plan.steps_per_epoch, plan.last_step_samples, plan.total_steps, plan.memory) == (None, None, None, 0, None)
    shown = printed(plan_text(plan))
    assert (
        "unknown steps = 3 epochs × unknown steps" in shown
        and "unknown warm-up steps, no evaluation" in shown
        and "memory unknown" in shown
        and "unknown rows" in shown
    )
    capped = plan_of(counted=DataFacts(None, None), train={"max_steps": 50})
    assert capped.total_steps == 50 and "50 steps" in step_equation(capped)


def test_auto_on_a_cpu_is_never_below_a_row() -> None:
    assert plan_of().tokens_per_device == 4096
    assert plan_of().micro_batches_per_step == 6, "96 rows, 21 in 4,096 tokens: 5, the next multiple of 3"
    long = plan_of(data={"max_source_length": 8000})
    assert long.tokens_per_device == 8096 and long.micro_batches_per_step == 96


@given(st.floats(18, 200), st.integers(1, 1000))
def test_auto_on_a_gpu_fits_or_is_one_row(gib: float, samples: int) -> None:
    plan = plan_of("zero1", gpu(gib), batch={"samples": samples}, scaling={"num_workers": 2})
    assert plan.memory is not None and plan.tokens_per_device is not None and plan.device_memory is not None
    per_token = planner._bytes_per_token(recipe_of(), t5_large())
    room = 0.8 * (plan.device_memory - sum(plan.memory.device.values()))
    assert plan.tokens_per_device % 192 == 0
    assert plan.tokens_per_device * per_token <= room or plan.tokens_per_device == 192
    if plan.accumulation > 1:  # one micro-batch fewer would not fit
        assert -(-samples // (plan.micro_batches_per_step - 2)) * 192 * per_token > room
    assert plan.micro_batches_per_step * (plan.tokens_per_device // 192) >= samples


def test_a_gpu_of_unknown_size_gets_one_micro_batch_and_a_note() -> None:
    plan = plan_of("zero1", gpu(None))
    assert plan.accumulation == 1 and "not known" in plan.notes[0] and plan.fits == ()


def test_too_small_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan_of("zero0", gpu(10))
    message = refused.value.message
    assert refused.value.exit_code == 3
    assert "parameters 1.37 GiB" in message and "optimizer 8.24 GiB" in message and "10 GiB" in message
    assert "zero3" in message and "zero0 (" not in message
    assert plan_of(refused.value.facts["fitting"][0], gpu(10)).device_memory == 10 * GIB, "what it names does fit"
    with pytest.raises(DoesNotFit, match="No shipped ZeRO configuration fits"):
        plan_of("zero3_offload", gpu(0.25))


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "longt5"])
def test_fp16_is_refused_for_t5(model_type: str) -> None:
    facts = ModelFacts(model_type, (Parameter("w", 10, True),), 0, 8, 2, 10, "sdpa")
    with pytest.raises(RecipeError, match="65,504") as refused:
        plan_of("zero1", gpu(80), facts, model={"precision": "fp16"})
    assert len(refused.value.faults) == 1 and refused.value.faults[0].key == "model.precision"


def test_fp16_trains_others() -> None:
    facts = ModelFacts("llama", (Parameter("w", 10**6, True),), 0, 8, 2, 10, "sdpa")
    config = plan_of({"fp16": {"enabled": "auto", "loss_scale_window": 50}}, gpu(80), facts, model={"precision": "fp16"}).ds_config
    assert config["fp16"]["enabled"] is True and config["fp16"]["loss_scale"] == 0, "dynamic"
    assert config["fp16"]["loss_scale_window"] == 50
    assert "bf16" not in config


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("hardware", [CPU, gpu(139)])
def test_the_resolved_config_leaves_nothing_open(name: str, hardware: Hardware) -> None:
    config = plan_of(name, hardware).ds_config
    assert "auto" not in json.dumps(config)
    batch = [config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert batch == [3, 1, 1] and config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False} and "fp16" not in config
    params = config["optimizer"]["params"]
    assert ("torch_adam" in params) == (not name.endswith("offload"))
    assert params.get("fused", False) == (not name.endswith("offload") and hardware.device == "cuda")
    for part in ("offload_optimizer", "offload_param"):
        if part in config["zero_optimization"]:
            assert config["zero_optimization"][part]["pin_memory"] == (hardware.device == "cuda")


@pytest.mark.parametrize("written, fused", [({}, True), ({"fused": False}, False), ({"foreach": True}, None), ({"fused": "auto"}, True)])
def test_a_zero_file_turns_the_fused_adamw_off(written: dict[str, Any], fused: bool | None) -> None:
    zero = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": written}}
    assert plan_of(zero, gpu(139)).ds_config["optimizer"]["params"].get("fused") is fused


def test_what_the_user_wrote_stands() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5e8, "prefetch_bucket_size": 7}
    open_ = {"stage3_max_live_parameters": "auto", "overlap_comm": "auto", "offload_param": None}
    written = {"zero_optimization": zero | open_, "train_batch_size": "auto", "steps_per_print": 10, "prescale_gradients": True}
    plan = plan_of(written, gpu(139))
    section = plan.ds_config["zero_optimization"]
    assert section["reduce_bucket_size"] == 5e8 and section["prefetch_bucket_size"] == 7
    assert "stage3_prefetch_bucket_size" not in section and "overlap_comm" not in section and "offload_param" not in section
    assert section["stage3_max_live_parameters"] == -(-t5_large().num_parameters // 4)
    assert plan.ds_config["prescale_gradients"] is True
    assert "steps_per_print" not in plan.ds_config and any("steps_per_print" in note for note in plan.notes)
    plain = plan.memory_as_deepspeed
    assert plain is not None and plain.device["buckets"] >= 2 * 5e8


def test_clipping_off_and_fp32_are_explicit() -> None:
    config = plan_of("zero2", model={"precision": "fp32"}, optimizer={"max_grad_norm": 0.0}).ds_config
    assert config["gradient_clipping"] == 0.0 and "bf16" not in config and "fp16" not in config


def test_deepspeed_takes_the_names() -> None:
    """Nested keys that DeepSpeed does not know raise there."""
    config_of = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    for name in SHIPPED:
        section = plan_of(name).ds_config["zero_optimization"]
        assert int(config_of(**section).stage) == section["stage"]


def test_the_plan_is_json() -> None:
    written = json.loads(json.dumps(plan_of("zero3", gpu(139)).to_json()))
    assert written["memory"]["device"]["parameters"] > 0 and written["ds_config"]["zero_optimization"]["stage"] == 3
    assert {"recipe_name", "total_steps", "tokens_per_device", "notes", "warmup_steps"} <= set(written)


def test_what_is_left_to_deepspeed_and_what_graphs_do_not_use_is_said() -> None:
    zero = {
        "zero_optimization": {"stage": 3, "overlap_comm": "auto", "stage3_max_live_parameters": 1_000_000, "reduce_bucket_size": "auto"}
    }
    plan = plan_of(zero | {"gradient_clipping": "auto"}, gpu(139))
    assert any("left to DeepSpeed: overlap_comm" in note and "reduce_bucket_size" not in note for note in plan.notes)
    shown = " ".join(printed(plan_text(plan)).split())
    assert "stage3_max_live_parameters 1 M" in shown.partition("not used on flat tensors: ")[2] and "gradients clipped at 1" in shown
    assert "gradients not clipped" in " ".join(printed(plan_text(plan_of("zero1", gpu(139), optimizer={"max_grad_norm": 0}))).split())
    without = plan_of(zero, gpu(139), model={"cuda_graphs": False})
    assert "not used on flat tensors" not in printed(plan_text(without))
    shipped = " ".join(printed(plan_text(plan_of("zero2", gpu(139)))).split())
    assert "overlap_comm, contiguous_gradients, reduce_scatter" in shipped.partition("not used on flat tensors: ")[2]
    factor = " ".join(printed(plan_text(plan_of(zero | {"gradient_predivide_factor": 0.5}, gpu(139)))).split())
    assert "gradient_predivide_factor 0.5" in factor.partition("not used on flat tensors: ")[2]


def test_the_moment_of_building_counts_where_there_is_room_for_it() -> None:
    """Of T5-large's parameters twice, 2.75 GiB; in training with the optimizer elsewhere there is less."""
    twice = 4 * t5_large().num_parameters
    for gib, peak in ((3, twice), (2.5, None)):
        plan = known_from(plan_of("zero2_offload", gpu(gib), batch={"samples": 3}), 1, 16, 16)
        assert plan.memory is not None and plan.expected_activation_bytes is not None
        assert plan.expected_peak_bytes == (peak or sum(plan.memory.device.values()) + plan.expected_activation_bytes)
        row = "for a moment while it is built, if there is room"
        assert printed(plan_text(plan)).index("  at most") < printed(plan_text(plan)).index(row)
    assert row not in printed(plan_text(plan_of("zero1", gpu(139))))


def test_what_fits_is_unknown_where_the_memory_is() -> None:
    assert "what fits: unknown" in printed(plan_text(plan_of("zero1", gpu(None), batch={"samples": 8, "samples_per_device": 2})))
    assert "attention sdpa" in printed(plan_text(plan_of("zero1", gpu(139))))


def test_the_printed_plan_says_what_counts() -> None:
    shown = printed(plan_text(plan_of("zero3", gpu(139))))
    for said in ("96 samples a step = 3 workers", "1,761 steps", "what fits", "zero3_offload", "reduce_bucket_size", "139 GiB"):
        assert said in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_table_of_what_fits_has_every_shipped_configuration() -> None:
    shown = printed(plan_text(plan_of("zero3_offload", gpu(8)))).partition("what fits")[2]
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip().startswith(SHIPPED)}
    assert set(lines) == set(SHIPPED)
    assert "does not fit" in lines["zero0"] and "not" not in lines["zero3_offload"]


@pytest.mark.parametrize("gib", [5, 8, 12, 139])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_table_of_what_fits_says_of_each_configuration_what_its_own_plan_says(gib: float, workers: int) -> None:
    for name in SHIPPED:
        try:
            plan = plan_of(name, gpu(gib), scaling={"num_workers": workers})
        except DoesNotFit as error:
            assert name not in error.facts["fitting"]
        else:
            assert plan.memory is not None
            assert {fit.name: fit.device for fit in plan.fits}[name] == plan.memory.device_total


def test_planning_loads_neither_torch_nor_ray() -> None:
    heavy = ("torch", "ray", "deepspeed", "datasets", "transformers")
    code = f"import sys, trainkit.planning.planner, trainkit.planning.show; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_gradients_in_round_robin_order_are_switched_off_and_said() -> None:
    """DeepSpeed would take one parameter's states for another's."""
    section = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    recipe = recipe_of()
    plan = make_plan(recipe, read_zero(section), t5_large(), DataFacts(1000, None), gpu(80))
    assert plan.ds_config["zero_optimization"]["round_robin_gradients"] is False
    assert any("round_robin_gradients" in note and "false here" in note for note in plan.notes)


def known_from(plan: Plan, rows: int, source: int = 512, target: int = 488, steps: int = 1, **wish: Any) -> Plan:
    """With one shape of micro-batches, one of which each worker trains in a step."""
    return with_micro_batches(plan, recipe_of(**wish), {(rows, source, target): plan.world_size * steps}.items(), steps, plan.total_steps)


def test_the_data_makes_the_peak_known() -> None:
    plan = plan_of("zero1", gpu(80))
    assert plan.expected_peak_bytes is None and plan.memory is not None and plan.activation_bytes_per_token is not None
    known = known_from(plan, 1)
    assert known.expected_activation_bytes == 1000 * plan.activation_bytes_per_token
    assert known.expected_peak_bytes == sum(plan.memory.device.values()) + 1000 * plan.activation_bytes_per_token
    assert known_from(plan, 1, 0, 0).expected_peak_bytes == plan.memory.device_total, "the optimizer step may be the fullest moment"
    on_cpu = plan_of("zero1", scaling={"num_workers": 2, "use_gpu": False})
    counted = {"largest_micro_batch_tokens": 1000, "accumulation": 1, "micro_batches_per_step": 2}
    assert known_from(on_cpu, 1) == replace(on_cpu, **counted), "a CPU has no memory of its own to fill"


def test_a_trace_after_the_end_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.profile\.start.*step 9 is traced first, and the run has 8 steps"):
        plan_of(train={"max_steps": 8, "profile": {"start": 9, "steps": 1}})
    assert plan_of(train={"max_steps": 9, "profile": {"start": 9, "steps": 5}}).total_steps == 9


@pytest.mark.parametrize("length", [{"max_steps": 8}, {"epochs": 1}])
def test_a_warm_up_that_does_not_end_is_refused(length: dict[str, Any]) -> None:
    rows = DataFacts(8 * 96, None)
    with pytest.raises(RecipeError, match=r"optimizer\.warmup_steps.*9 steps of warm-up do not end within the run's 8\. Write fewer"):
        plan_of(counted=rows, train=length, optimizer={"lr": 1e-4, "warmup_steps": 9})
    assert plan_of(counted=rows, train=length, optimizer={"lr": 1e-4, "warmup_steps": 8}).warmup_steps == 8


def test_intervals_longer_than_the_run_are_told() -> None:
    def told(**train: Any) -> list[str]:
        plan = plan_of(data={"eval": "validation"}, train={"max_steps": 8} | train)
        return [note for note in plan.notes if "only at the end" in note]

    assert told(save_steps=9, eval_steps=9) == ["train.save_steps and train.eval_steps: more than the run's 8 steps, so only at the end"]
    assert told(save_steps=9) == ["train.save_steps: more than the run's 8 steps, so only at the end"]
    assert told(save_steps=8, eval_steps=8) == []


def test_blocks_are_compiled_on_a_gpu_where_that_was_tried() -> None:
    gpus = {"num_workers": 2, "use_gpu": True}
    assert [plan_of(zero, gpu(139), scaling=gpus).compile_blocks for zero in ("zero0", "zero1", "zero2", "zero3")] == [
        True,
        True,
        True,
        False,
    ]
    assert not plan_of("zero1", CPU, scaling={"num_workers": 2, "use_gpu": False}).compile_blocks
    steady = {"epochs": 1, "deterministic": True}
    assert not plan_of("zero1", gpu(139), scaling=gpus, train=steady).compile_blocks
    model = {"path": "t5", "task": "seq2seq"}
    assert plan_of("zero3", gpu(139), scaling=gpus, model=model | {"compile": "blocks"}).compile_blocks
    assert not plan_of("zero1", gpu(139), scaling=gpus, model=model | {"compile": False}).compile_blocks


def test_a_run_with_graphs_is_compiled_where_that_pays() -> None:
    """60 rows of 20 + 16 tokens in 880 steps, of T5-large, take 31 ms a rank by the fit to an H200's times."""
    wish, flops = {"train": {"max_steps": 880}}, TrainingFlops(2_100_000_000, 2_500_000_000, 0, 0, 0)
    plan = replace(plan_of("zero1", gpu(139), **wish), flops=flops, peak_flops=989e12)
    model = {"path": "t5", "task": "seq2seq"}
    short, long = known_from(plan, 60, 20, 16), known_from(replace(plan, total_steps=9000), 60, 20, 16)
    assert plan.compile_blocks and not short.compile_blocks and "not compiled: about 32 s" in short.notes[-1]
    assert long.compile_blocks and long.notes == plan.notes
    assert known_from(plan, 60, 20, 16, model=model | {"compile": "blocks"}).compile_blocks, "who asks for it gets it"
    assert known_from(replace(plan, cuda_graphs=False), 60, 20, 16).compile_blocks, "without graphs it saves launches"
    assert known_from(replace(plan, peak_flops=None), 60, 20, 16).compile_blocks


def test_selective_checkpointing_is_asked_of_compiled_blocks() -> None:
    plain, model = plan_of("zero3", gpu(139)), {"path": "t5", "task": "seq2seq", "gradient_checkpointing": "selective"}
    plan = plan_of("zero3", gpu(139), model=model)
    assert plan.compile_blocks and plan.selective_checkpointing and plan.cuda_graphs and not plain.selective_checkpointing
    assert plan.activation_bytes_per_token is not None and plain.activation_bytes_per_token is not None
    assert plan.activation_bytes_per_token < 0.8 * plain.activation_bytes_per_token
    flops = TrainingFlops(2_100_000_000, 2_500_000_000, 0, 0, 0)
    assert known_from(replace(plan, flops=flops, peak_flops=989e12), 60, 20, 16, model=model).compile_blocks, "however short the run is"


def test_few_shapes_are_told_to_the_compiler() -> None:
    plan = plan_of("zero1", gpu(139))
    shapes = {(60, 20, 16): 9, (40, 32, 16): 2, (1, 90, 16): 1}

    def told(plan: Plan, count: int) -> tuple[tuple[int, int, int], ...]:
        known = with_micro_batches(plan, recipe_of(), list(shapes.items())[:count], 6, plan.total_steps)
        assert Plan.from_json(json.loads(json.dumps(known.to_json()))) == known
        return known.compiled_shapes

    assert [told(plan, count) for count in (1, 2, 3)] == [((60, 20, 16),), ((40, 32, 16), (60, 20, 16)), ()]
    assert told(replace(plan, compile_blocks=False), 1) == ()


def test_cuda_graphs_keep_the_gradients_where_they_are() -> None:
    model = {"path": "t5", "task": "seq2seq", "cuda_graphs": True}
    plan, without = (plan_of("zero1", gpu(139), scaling={"num_workers": 2}, model=m) for m in (model, model | {"cuda_graphs": False}))
    assert plan.cuda_graphs and not without.cuda_graphs
    assert plan.memory is not None and without.memory is not None
    assert plan.memory.device == without.memory.device | {"buckets": 0}
    partition = -(-t5_large().num_trainable // 2)
    assert plan.memory.device_at_step == sum(plan.memory.device.values()) + (2 + 4) * partition


def test_cuda_graphs_are_made_where_they_can_be_and_memory_allows() -> None:
    gpus = {"num_workers": 2, "use_gpu": True}
    made = [zero for zero in SHIPPED if plan_of(zero, gpu(139), scaling=gpus).cuda_graphs]
    assert made == ["zero0", "zero1", "zero2", "zero3"]
    assert not plan_of("zero1", gpu(139), scaling=gpus, train={"epochs": 1, "deterministic": True}).cuda_graphs
    plan = plan_of("zero1", gpu(48), scaling=gpus)
    few, many = known_from(plan, 1), known_from(plan, 12)
    assert few.cuda_graphs and not any("no CUDA graphs" in note for note in few.notes)
    assert not many.cuda_graphs and any("no CUDA graphs" in note for note in many.notes) and many.memory is not None
    without = plan_of("zero1", gpu(48), scaling=gpus, model={"path": "t5", "task": "seq2seq", "cuda_graphs": False})
    assert many.memory == without.memory, "as DeepSpeed does it"
    assert many.no_graphs is not None and "no CUDA graphs: micro-batches" in repr(many)
    assert "no CUDA graphs: the recipe wants none" in repr(without)
    wish = {"path": "t5", "task": "seq2seq", "cuda_graphs": True}
    asked = known_from(plan_of("zero1", gpu(48), scaling=gpus, model=wish), 12, model=wish)
    assert asked.cuda_graphs and "both may not fit" in asked.notes[-1], "who asks for them gets them, and is told"


def test_who_saves_memory_that_is_there_is_told() -> None:
    told = {zero: any("zero1 leaves half" in note for note in plan_of(zero, gpu(139)).notes) for zero in SHIPPED}
    assert told == {"zero0": False, "zero1": False, "zero2": False, "zero3": True, "zero2_offload": True, "zero3_offload": True}
    assert not any("zero1 leaves half" in note for note in plan_of("zero3", gpu(8)).notes)


def test_where_states_fit_without_graphs_alone_there_are_none() -> None:
    model = {"path": "t5", "task": "seq2seq"}
    assert plan_of("zero1", gpu(6.5)).memory == plan_of("zero1", gpu(6.5), model=model | {"cuda_graphs": False}).memory
    assert not plan_of("zero1", gpu(6.5)).cuda_graphs and plan_of("zero1", gpu(12)).cuda_graphs
    with pytest.raises(RecipeError, match=r"model states take .* per GPU. Write false"):
        plan_of("zero1", gpu(6.5), model=model | {"cuda_graphs": True})


def facts_of(model_type: str) -> ModelFacts:
    return replace(t5_large(), model_type=model_type, decides_on_host=model_type == "mixtral", waits_for_device=model_type == "modernbert")


@pytest.mark.parametrize(
    ("zero", "gib", "model", "reason"),
    [
        ("zero2_offload", 139, {}, "the optimizer's offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, 139, {}, "offloaded parameters"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, 139, {}, r"ZeRO\+\+"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, 139, {}, r"ZeRO\+\+"),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, 139, {}, "grad_accum_dtype"),
        ("zero1", 139, {"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"}, 139, {}, "communication_data_type"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True, "check_grad_overflow": True}}, 139, {}, "check_grad_overflow"),
        ("zero1", 139, {"precision": "fp16", "path": "llama"}, "fp16"),
        ("zero1", 139, {"task": "classification", "path": "modernbert"}, "this model waits for the GPU"),
        ("zero1", 139, {"path": "mixtral"}, "experts or LayerDrop decides on the host"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_its_reason(zero: Any, gib: float, model: dict[str, Any], reason: str) -> None:
    """And has none where nobody asks for them."""
    path = model.get("path", "t5")
    facts = facts_of(path)
    wish = {"path": path, "task": "seq2seq"} | model
    with pytest.raises(RecipeError, match=reason):
        plan_of(zero, gpu(gib), facts, scaling={"num_workers": 2}, model=wish | {"cuda_graphs": True})
    assert not plan_of(zero, gpu(gib), facts, scaling={"num_workers": 2}, model=wish).cuda_graphs


@pytest.mark.parametrize(
    ("zero", "model", "flat"),
    [
        ("zero3", {"gradient_checkpointing": True}, True),
        ("zero1", {"task": "classification", "path": "modernbert"}, True),
        ("zero0", {"gradient_checkpointing": True}, True),
        ("zero3", {"path": "mixtral"}, False),
        ("zero2", {"cuda_graphs": False}, False),
        ("zero2", {"precision": "fp16", "path": "llama"}, False),
        ("zero3_offload", {}, False),
    ],
)
def test_without_graphs_the_step_is_still_on_flat_tensors_unless_deepspeed_has_to_do_it(
    zero: str, model: dict[str, Any], flat: bool
) -> None:
    path = model.get("path", "t5")
    facts = facts_of(path)
    plan = plan_of(zero, gpu(139), facts, scaling={"num_workers": 2}, model={"path": path, "task": "seq2seq"} | model)
    as_deepspeed = without_graphs(plan, "it failed")
    assert plan.flat == flat and not plan.cuda_graphs and not as_deepspeed.flat
    assert (as_deepspeed.no_graphs == "it failed") == flat and (as_deepspeed.memory != plan.memory) == flat


@pytest.mark.parametrize(("family", "way_out"), [("t5", r"Write model\.precision: fp32"), ("llama", r"fp16 \(or fp32\)")])
def test_a_gpu_without_bf16_is_refused_with_what_it_can_train(family: str, way_out: str) -> None:
    t4 = Hardware("cuda", "Tesla T4", 15 << 30, has_bf16=False)
    with pytest.raises(RecipeError, match=rf"Tesla T4 has no bf16.*{way_out}"):
        plan_of("zero3", t4, replace(t5_large(), model_type=family))
    assert plan_of("zero3_offload", t4, model={"path": "t5", "task": "seq2seq", "precision": "fp32"}).precision == "fp32"


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(RecipeError, match="a CPU has none"):
        plan_of("zero1", CPU, scaling={"num_workers": 2, "use_gpu": False}, model={"path": "t5", "task": "seq2seq", "cuda_graphs": True})


@pytest.mark.parametrize(("size", "shown"), [(999.4, "999 GiB"), (999.7, "1,000 GiB"), (1023.9, "1,024 GiB"), (1024, "1 TiB")])
def test_bytes_have_three_digits_and_no_exponent(size: float, shown: str) -> None:
    assert format_bytes(size * GIB) == shown
