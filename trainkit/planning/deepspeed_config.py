"""The whole DeepSpeed JSON, resolved: what the recipe says, what the ZeRO JSON says, and sizes for what both leave open.

DeepSpeed's own defaults are meant for models of tens of billions of parameters: `reduce_bucket_size` is 5e8 elements and allocated in
full, so a small model would carry gigabytes of empty buffers. Sizes come from the model instead. A number that the user wrote stands.
"""

from __future__ import annotations

from typing import Any

from trainkit.planning.facts import Hardware, ModelFacts
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import ZeroConfig

ALIGNMENT = 1024  # elements; DeepSpeed asks for a multiple of 2
MOST_BUCKET = 50_000_000  # elements: 100 MB at 16 bit, at which NCCL already runs at full bandwidth
MOST_LIVE = 1_000_000_000  # elements of gathered parameters: DeepSpeed's own default, more than a small model has
LIVE_SHARE = 4  # and no more than a quarter of the model, so that partitioning frees memory at any size
GRADIENT_BUCKETS = 8  # the gradients travel in about so many pieces, so that all but the last overlap with backward
OWNED = (  # sections that the plan writes; literals in them have been compared with the recipe
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "bfloat16", "fp16", "zero_optimization",
)  # fmt: skip


def resolve(recipe: Recipe, zero: ZeroConfig, model: ModelFacts | None, world_size: int, hardware: Hardware) -> dict[str, Any]:
    """The dict for `deepspeed.initialize(config=...)`. Without model facts, absent sizes stay absent.

    Batch sizes are placeholders: the plan owns the batch, and the engine's loop sets the accumulation boundary.
    """
    kept = {key: value for key, value in _literals(zero.json).items() if key not in OWNED and key not in zero.unused}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
        **_precision(recipe, zero),
        "optimizer": OPTIMIZERS["adamw"](recipe, zero, hardware),
        "zero_optimization": _zero(zero, model, hardware),
        **kept,
    }


def sizes(zero: ZeroConfig, model: ModelFacts) -> dict[str, int]:
    """Elements of buckets and thresholds under DeepSpeed's names, for this stage."""
    total, trainable = model.num_parameters, max(1, model.num_trainable)
    bucket = _aligned(min(MOST_BUCKET, -(-trainable // GRADIENT_BUCKETS)))
    if zero.stage == 0:
        return {}
    if zero.stage < 3:
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": _aligned(min(MOST_BUCKET, total))}
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": _aligned(min(MOST_BUCKET, total)),
        "stage3_prefetch_bucket_size": min(MOST_BUCKET, -(-total // max(1, model.num_layers))),  # about one layer ahead
        "stage3_param_persistence_threshold": 10 * model.hidden_size,  # norms and biases stay whole: they cost latency, not bytes
        "stage3_max_live_parameters": min(MOST_LIVE, -(-total // LIVE_SHARE)),
        "stage3_max_reuse_distance": min(MOST_LIVE, -(-total // LIVE_SHARE)),
    }


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _literals(section: Any) -> dict[str, Any]:
    """Without what is left to the plan ("auto") or to DeepSpeed (null), at any depth."""
    if not isinstance(section, dict):
        return {}
    return {
        key: _literals(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None and value != "auto"
    }


def _precision(recipe: Recipe, zero: ZeroConfig) -> dict[str, Any]:
    """bf16 without DeepSpeed's overflow check (an all-reduce and a host sync each step; the loop watches for non-finite values)."""
    if recipe.model.precision == "bf16":
        written = _literals(zero.json.get("bf16", zero.json.get("bfloat16")))
        return {"bf16": {"check_grad_overflow": False} | written | {"enabled": True}}
    if recipe.model.precision == "fp16":
        dynamic = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
        return {"fp16": dynamic | _literals(zero.json.get("fp16")) | {"enabled": True}}
    return {}


def _adamw(recipe: Recipe, zero: ZeroConfig, hardware: Hardware) -> dict[str, Any]:
    keys = recipe.optimizer
    params: dict[str, Any] = {"lr": keys.lr, "betas": list(keys.betas), "eps": keys.eps, "weight_decay": keys.weight_decay}
    written = _literals(_literals(zero.json.get("optimizer")).get("params"))
    if not zero.offload_optimizer:  # with offload, AdamW means DeepSpeed's CPUAdam
        params["torch_adam"] = True
        if hardware.device == "cuda" and "foreach" not in written:  # torch takes one of the two
            params["fused"] = True
    return {"type": "AdamW", "params": params | {key: written[key] for key in ("torch_adam", "fused", "foreach") if key in written}}


OPTIMIZERS = {"adamw": _adamw}  # name to the `optimizer` section; the recipe's default is the only one so far


def _zero(zero: ZeroConfig, model: ModelFacts | None, hardware: Hardware) -> dict[str, Any]:
    written = _literals(zero.json.get("zero_optimization"))
    for offload in ("offload_optimizer", "offload_param"):
        if isinstance(written.get(offload), dict):
            written[offload] = _offload(written[offload], hardware)
    if "round_robin_gradients" in written:
        written["round_robin_gradients"] = False  # with it DeepSpeed 0.19.8 takes one parameter's states for another's (LOG.md)
    planned = {} if model is None else sizes(zero, model)
    return {key: value for key, value in planned.items() if key.removeprefix("stage3_") not in written} | written | {"stage": zero.stage}


def _offload(section: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    """Pinned memory speeds copies to a GPU; without one there is nothing to copy to, and pinning fails."""
    literals = _literals(section)
    return literals | {"pin_memory": literals.get("pin_memory", True) and hardware.device == "cuda"}
