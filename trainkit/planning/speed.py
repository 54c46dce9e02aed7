"""Which fast paths a run takes: compiled blocks, CUDA graphs, few shapes; what keeps them away, and what a micro-batch takes in time."""

from __future__ import annotations

from typing import Any

from trainkit.planning.facts import Hardware, ModelFacts
from trainkit.planning.flops import training_flops
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import ZeroConfig

UNUSED_WHEN_FLAT = (  # sizes and ways of what DeepSpeed's hooks would do; those of zero_optimization without "stage3_"
    *("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "param_persistence_threshold"),
    *("model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"),
    *("ignore_unused_parameters", "prescale_gradients", "gradient_predivide_factor"),
)
# Forward and backward of a micro-batch in torch's own kernels in bf16, fitted to six models on an H200 (T5 of 60 M to 2.9 B parameters,
# Llamas of 136 M and 1.1 B) and 256 to 49,152 tokens: within 21 % of what was measured (LOG.md).
LAYER_SECONDS = 0.37e-3  # of one layer, however few tokens there are: its kernels begin one after the other
LAUNCHED_SECONDS = 3e-3  # of one layer at least, where Python launches them instead of a CUDA graph
TOKEN_SECONDS, TOKEN_POWER = 4.7e-6, 0.72  # of a token of one GFLOP; wide models come nearer to the peak
_MEASURED_PEAK = 989.4e12


def compiles_blocks(recipe: Recipe, zero: ZeroConfig) -> bool:
    """The compiler times kernels and takes the fastest, which may be another one the next time: not with train.deterministic."""
    if recipe.model.compile is None and recipe.model.gradient_checkpointing != "selective":
        return recipe.scaling.use_gpu and zero.stage < 3 and not recipe.train.deterministic
    return recipe.model.compile is not False


def what_keeps_deepspeeds_step(recipe: Recipe, zero: ZeroConfig, ds_config: dict[str, Any], hardware: Hardware) -> str | None:
    """Why gradients are summed and weights updated as DeepSpeed does it, parameter by parameter, while a GPU waits; without a reason that
    is done on whole flat tensors. Worded for CUDA graphs, which need those."""
    accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype", recipe.model.precision)
    reduced, section = ds_config.get("communication_data_type", recipe.model.precision), ds_config["zero_optimization"]
    reasons = {
        "a CPU has none": hardware.device == "cpu",
        "offloaded parameters come from the host in the middle of them": zero.offload_param,
        "ZeRO++ gathers and reduces in its own ways in the middle of them": _is_zero_plus_plus(section),
        "the optimizer's offload works on gradients in the middle of them": zero.offload_optimizer,
        "grad_accum_dtype sums gradients in another type": accumulated != recipe.model.precision,
        "communication_data_type reduces gradients in another type": reduced != recipe.model.precision,
        "fp16 searches its loss scale on the host": recipe.model.precision == "fp16",
        "check_grad_overflow looks at the gradients on the host": bool(ds_config.get("bf16", {}).get("check_grad_overflow")),
        "the recipe wants none": recipe.model.cuda_graphs is False,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def what_keeps_graphs_away(recipe: Recipe, model: ModelFacts | None) -> str | None:
    """Why there are no CUDA graphs of forward and backward, where DeepSpeed's step is none of the reasons."""
    reasons = {
        "model.gradient_checkpointing keeps random state on the host": recipe.model.gradient_checkpointing is True,
        "this model waits for the GPU in the middle of a forward": model is not None and model.waits_for_device,
        "a model with experts or LayerDrop decides on the host what runs": decides_on_host(model),
        "train.deterministic is true, and nobody asked for them": recipe.train.deterministic and recipe.model.cuda_graphs is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def decides_on_host(model: ModelFacts | None) -> bool:
    """Ranks may run other blocks than each other."""
    return model is not None and model.decides_on_host


def _is_zero_plus_plus(section: dict[str, Any]) -> bool:
    quantized = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    return any(section.get(key) for key in quantized) or section.get("zero_hpz_partition_size", 1) > 1


def micro_batch_seconds(flops: float, tokens: int, layers: int, graphs: bool, peak: float | None = None) -> float:
    """About what forward and backward take on one GPU.

    flops: model FLOPs of these padded tokens. layers: encoder plus decoder. peak: FLOP/s of the device in the training precision; an
    H200's where it is not known.
    """
    of_tokens = tokens * TOKEN_SECONDS * (flops / tokens / 1e9) ** TOKEN_POWER * _MEASURED_PEAK / (peak or _MEASURED_PEAK)
    seconds = LAYER_SECONDS * layers + of_tokens
    return seconds if graphs else max(seconds, LAUNCHED_SECONDS * layers)


def splits_for_padding(recipe: Recipe, zero: ZeroConfig, model: ModelFacts | None, world_size: int, hardware: Hardware) -> bool:
    """Whether micro-batches may be smaller than what fits, where that saves more padding than their number costs: only with auto budgets.

    Not with offload, nor between GPUs without links under stages 2 and 3: each micro-batch sends its gradients, and its weights, there.
    """
    asked_for = recipe.batch.samples_per_device is not None or recipe.batch.tokens_per_device != "auto"
    slow_links = zero.stage >= 2 and world_size > 1 and not hardware.has_nvlink
    if hardware.device == "cpu" or asked_for or recipe.data.packing or zero.offload_optimizer or zero.offload_param or slow_links:
        return False
    return model is not None and training_flops(model) is not None


def joins_shapes(recipe: Recipe) -> bool:
    """Whether micro-batches are padded to few shapes, for CUDA graphs: as the recipe says, else on GPUs, save for what never has graphs.

    Under all ZeRO stages, because dropout is drawn by shapes, and a run that is resumed may change its stage.
    """
    if recipe.batch.joint_shapes is not None:
        return recipe.batch.joint_shapes
    return recipe.scaling.use_gpu and recipe.model.precision != "fp16"
