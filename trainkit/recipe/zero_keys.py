"""The keys of a DeepSpeed 0.19.8 configuration, written out: DeepSpeed itself accepts misspelt top-level keys in silence.

Each key has the kind of its value; `"auto"` fits every kind. Taken from deepspeed/runtime: config.py, constants.py, precision_config.py,
zero/config.py, zero/offload_config.py, zero/leaf_module_config.py, lr_schedules.py, and from deepspeed/compile/config.py.
"""

from __future__ import annotations

import math

BOOL, TEXT, LIST, ANY = "true or false", "text", "a list", "any value"
INT, COUNT, SIZE = "a whole number", "a whole number of at least 1", "a whole number of at least 0"
AMOUNT, FACTOR, SHARE = "a number of at least 0", "a number above 0", "a number from 0 to 1"
DTYPE, TAG_CHECK = '"fp32", "fp16" or "bf16"', '"Ignore", "Warn" or "Fail"'

#: kind of a number: whole or not, the least and the most
NUMBERS: dict[str, tuple[bool, float, float]] = {
    INT: (True, -math.inf, math.inf),
    COUNT: (True, 1, math.inf),
    SIZE: (True, 0, math.inf),
    AMOUNT: (False, 0, math.inf),
    FACTOR: (False, math.ulp(0.0), math.inf),
    SHARE: (False, 0, 1),
}
#: kind of a word: those that DeepSpeed knows; a capitalized one may be written in any case
WORDS: dict[str, tuple[str, ...]] = {DTYPE: ("fp32", "fp16", "bf16"), TAG_CHECK: ("Ignore", "Warn", "Fail")}

Keys = dict[str, object]

OFFLOAD_OPTIMIZER: Keys = {
    "device": TEXT,
    "nvme_path": TEXT,
    "buffer_count": SIZE,
    "pin_memory": BOOL,
    "pipeline_read": BOOL,
    "pipeline_write": BOOL,
    "fast_init": BOOL,
    "ratio": SHARE,
    "super_offload": BOOL,
    "cpuadam_cores_perc": SHARE,
}
OFFLOAD_PARAM: Keys = {"device": TEXT, "nvme_path": TEXT, "buffer_count": SIZE, "buffer_size": SIZE, "max_in_cpu": SIZE, "pin_memory": BOOL}

_STAGE3: Keys = {
    "prefetch_bucket_size": SIZE,
    "param_persistence_threshold": SIZE,
    "model_persistence_threshold": SIZE,
    "max_live_parameters": SIZE,
    "max_reuse_distance": SIZE,
    "gather_16bit_weights_on_model_save": BOOL,
    "module_granularity_threshold": SIZE,
    "use_all_reduce_for_fetch_params": BOOL,
    "allgather_sequential": BOOL,
}

ZERO_OPTIMIZATION: Keys = {
    "stage": INT,
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": SIZE,
    "overlap_comm": BOOL,
    "compute_grad_norm": BOOL,
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ANY,
    "sub_group_size": SIZE,
    **_STAGE3,
    **{f"stage3_{key}": kind for key, kind in _STAGE3.items()},
    "stage3_gather_fp16_weights_on_model_save": BOOL,
    "ignore_unused_parameters": BOOL,
    "legacy_stage1": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": SIZE,
    "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL,
    "zero_quantized_gradients": BOOL,
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": {"classes": LIST, "names": LIST, "name_suffixes": LIST},
}

BF16: Keys = {
    "enabled": BOOL,
    "immediate_grad_update": BOOL,
    "check_grad_overflow": BOOL,
    "bf16_master_weights_and_grads": BOOL,
    "bf16_optimizer_states": BOOL,
}
FP16: Keys = {
    "enabled": BOOL,
    "auto_cast": BOOL,
    "loss_scale": AMOUNT,
    "initial_scale_power": SIZE,
    "loss_scale_window": COUNT,
    "hysteresis": COUNT,
    "consecutive_hysteresis": BOOL,
    "min_loss_scale": AMOUNT,
    "fp16_master_weights_and_grads": BOOL,
}
OPTIMIZER: Keys = {
    "type": TEXT,
    "legacy_fusion": BOOL,
    "params": {
        "lr": AMOUNT,
        "betas": LIST,
        "eps": AMOUNT,
        "weight_decay": AMOUNT,
        "torch_adam": BOOL,
        "adam_w_mode": BOOL,
        "fused": BOOL,
        "foreach": BOOL,
        "bias_correction": BOOL,
        "amsgrad": BOOL,
        "max_grad_norm": AMOUNT,
        "fp32_optimizer_states": BOOL,
    },
}
SCHEDULER: Keys = {
    "type": TEXT,
    "params": {
        "warmup_min_lr": AMOUNT,
        "warmup_max_lr": AMOUNT,
        "warmup_num_steps": SIZE,
        "warmup_type": TEXT,
        "total_num_steps": COUNT,
        "warmup_min_ratio": AMOUNT,
        "cos_min_ratio": AMOUNT,
        "last_batch_iteration": INT,
    },
}
CHECKPOINT: Keys = {
    "tag_validation": TAG_CHECK,
    "load_universal": BOOL,
    "use_node_local_storage": BOOL,
    "parallel_write": ANY,
    "checkpoint_serialization": BOOL,
    "writer": ANY,
}
DATA_TYPES: Keys = {"grad_accum_dtype": DTYPE, "param_dtype": DTYPE, "buffer_dtype": DTYPE, "keep_in_fp32_modules": LIST}
COMPILE: Keys = {
    "deepcompile": BOOL,
    "autoep_non_moe": BOOL,
    "free_activation": BOOL,
    "free_activation_threshold": SIZE,
    "offload_activation": BOOL,
    "offload_activation_pin_memory": BOOL,
    "offload_opt_states": BOOL,
    "double_buffer": BOOL,
    "symmetric_memory": BOOL,
    "debug_log": BOOL,
    "offload_parameters": BOOL,
    "sync_before_reduce": BOOL,
    "sync_after_reduce": BOOL,
    "sync_before_allgather": BOOL,
    "sync_after_allgather": BOOL,
    "keep_int_input_tensors": BOOL,
    "keep_all_input_tensors": BOOL,
    "passes": LIST,
    "disable": BOOL,  # of DeepSpeed before 0.15, and still in Axolotl's file
    "backend": TEXT,
}

TOP_LEVEL: Keys = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "gradient_clipping": AMOUNT,
    "bf16": BF16,
    "fp16": FP16,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "zero_optimization": ZERO_OPTIMIZATION,
    "checkpoint": CHECKPOINT,
    "zero_allow_untested_optimizer": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    "communication_data_type": DTYPE,
    "seq_parallel_communication_data_type": DTYPE,
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": FACTOR,
    "gradient_allreduce_op": TEXT,
    "disable_allgather": BOOL,
    "disable_python_gc": BOOL,
    "data_types": DATA_TYPES,
    "compile": COMPILE,
    "use_data_before_expert_parallelism": BOOL,
}

#: Read by DeepSpeed for its own reports, input pipeline or modules, none of which takes part in a run here: named, not applied.
UNUSED: dict[str, str] = dict.fromkeys(
    (
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "flops_profiler",
        "comms_logger",
        "timers",
        "log_level",
        "vocabulary_size",
    ),
    "every run writes steps.jsonl and TensorBoard itself",
) | {
    "autotuning": "a tool of DeepSpeed's own launcher",
    "aio": "only for NVMe",
    "compile": "the loop runs the model uncompiled",
    "activation_checkpointing": "the recipe has model.gradient_checkpointing",
    "dataloader_drop_last": "rows come from the DataDistributor, and the last, smaller step is kept",
}

REMOVED: dict[str, str] = {
    "nebula": "DeepSpeed 0.19.8 has removed Nebula checkpoints: delete the section",
    "amp": "DeepSpeed 0.19.8 has removed Apex AMP: delete the section and write model.precision: bf16 or fp16 in the recipe",
    "elasticity": "DeepSpeed 0.19.8 has removed elastic training: delete the section; batch.samples holds for any number of workers",
    "sparse_attention": "DeepSpeed 0.19.8 has removed sparse attention: delete the section",
    "sparse_gradients": "DeepSpeed 0.19.8 has removed sparse gradients: delete the key",
    "compression_training": "DeepSpeed 0.19.8 has removed compression: delete the section",
    "curriculum_learning": "DeepSpeed 0.19.8 has removed it: delete the section; the order of rows hangs on train.seed alone",
    "quantize_training": "DeepSpeed 0.19.8 has removed quantized training: delete the section",
    "eigenvalue": "DeepSpeed 0.19.8 has removed it together with quantized training: delete the section",
    "graph_harvesting": "DeepSpeed 0.19.8 has removed it: delete the key",
    "progressive_layer_drop": "DeepSpeed 0.19.8 has removed it: delete the section",
    "bfloat16": "the old name: write bf16",
    "monitor_config": "not a key of the file: every run writes TensorBoard itself; delete the section",
}
REMOVED_ZERO: dict[str, str] = {
    "mics_shard_size": "DeepSpeed 0.19.8 has removed MiCS: delete the key",
    "mics_hierarchical_params_gather": "DeepSpeed 0.19.8 has removed MiCS: delete the key",
    "zeropp_loco_param": "DeepSpeed 0.19.8 has removed LoCo: delete the key",
    "cpu_offload": 'deprecated: write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'deprecated: write "offload_param": {"device": "cpu"} (stage 3)',
    "cpu_offload_params": 'deprecated: write "offload_param": {"device": "cpu"} (stage 3)',
    "cpu_offload_use_pin_memory": 'deprecated: write "pin_memory": true in offload_optimizer or offload_param',
}
#: Known to DeepSpeed, but they would change the training behind the plan's back.
NOT_AVAILABLE: dict[str, str] = {
    "torch_autocast": "not available: model.precision in the recipe decides the type of the computation",
    "data_efficiency": "not available: the order of rows hangs on train.seed alone",
    "hybrid_engine": "not available: there is no reinforcement learning here",
    "pipeline": "not available: layers are not split over devices",
    "tensor_parallel": "not available: layers are not split over devices",
    "expert_parallel": "not available: experts are not split over devices",
    "sequence_parallel_size": "not available: rows are not split over devices",
    "weight_quantization": "not available: weights are trained in model.precision",
    "managed_gradient_accumulation": "not available: the training loop decides which micro-batch ends a step",
    "datastates_ckpt": "not available: the run writes its own checkpoints",
}
