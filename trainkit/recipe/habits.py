"""Keys that people bring from other tools, each with its own answer: the recipe line that says the same, or why there is none.

transformers' TrainingArguments, accelerate, Axolotl and LLaMA-Factory are the usual homes. An answer never changes the recipe by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from trainkit.recipe.document import Document, KeyPath, shown
from trainkit.recipe.fields import accepts, expected, field_of

_PLAIN = re.compile(r"[A-Za-z/_]([\w/.~@:%=+\[\]-]*[\w/.~@%=+\]-])?")

_PER_DEVICE = (
    "per_device_train_batch_size",
    "micro_batch_size",
    "train_micro_batch_size_per_gpu",
    "batch_size",
    "per_gpu_train_batch_size",
)
_ACCUMULATION = ("gradient_accumulation_steps", "accumulate_grad_batches")

_SAME_VALUE = {
    "train_batch_size": "batch.samples",
    "learning_rate": "optimizer.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_train_steps": "train.max_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps",
    "adam_epsilon": "optimizer.eps",
    "lr_scheduler": "optimizer.lr_scheduler_type",
    "gradient_clipping": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "model_name_or_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "base_model": "model.path",
    "model_name": "model.path",
    "model_revision": "model.revision",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "torch_compile": "model.compile",
    "dataset": "data.path",
    "datasets": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "dataset_config_name": "data.name",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "val_set_size": "data.eval",
    "val_size": "data.eval",
    "test_split_ratio": "data.eval",
    "sample_packing": "data.packing",
    "deepspeed": "zero",
    "deepspeed_config": "zero",
    "ds_config": "zero",
    "eval_strategy": "train.eval_steps",
    "evaluation_strategy": "train.eval_steps",
    "save_strategy": "train.save_steps",
    "output_dir": "run.storage_path",
    "num_gpus": "scaling.num_workers",
    "n_gpus": "scaling.num_workers",
    "nproc_per_node": "scaling.num_workers",
    "num_processes": "scaling.num_workers",
    "world_size": "scaling.num_workers",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "rank": "model.lora.r",
    "lora_alpha": "model.lora.lora_alpha",
    "lora_dropout": "model.lora.lora_dropout",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    "lora_modules_to_save": "model.lora.modules_to_save",
}

_REFUSED = {
    "trust_remote_code": "refused: a recipe never runs code that comes with a model or a data set; leave it out and use a built-in model",
    "fsdp": "not available: parameters are sharded by DeepSpeed ZeRO; write zero: zero3",
    "load_in_8bit": "not available: weights are trained in model.precision; to train fewer of them write model.lora: {r: 8}",
    "load_in_4bit": "not available: weights are trained in model.precision; to train fewer of them write model.lora: {r: 8}",
    "logging_steps": "not needed: every optimizer step is recorded in steps.jsonl and TensorBoard; leave it out",
    "report_to": "not needed: every run writes steps.jsonl and TensorBoard; leave it out",
    "logging_dir": "not needed: TensorBoard's files lie in the run folder; leave it out",
    "tf32": "not available: write model.precision: bf16 for tensor cores, fp32 for exactness",
    "group_by_length": "not needed: micro-batches are composed by length already, and the rows of a step stay the seed's; leave it out",
    "dataloader_num_workers": "not needed: batches come from the DataDistributor; leave it out",
    "preprocessing_num_workers": "not needed: rows are tokenized once and kept; leave it out",
    "remove_unused_columns": "not needed: only the columns that the templates name are read; leave it out",
    "resume_from_checkpoint": "belongs to the command: trainkit run RECIPE --name NAME --resume",
    "overwrite_output_dir": "not available: every run has its own new folder; leave it out",
    "push_to_hub": "not available: the run folder's model/ is a plain Hugging Face folder; upload it afterwards",
    "local_rank": "not needed: Ray starts the workers; leave it out",
    "stage": "not a recipe key: write model.task (seq2seq, causal, classification), and the ZeRO stage as zero: zero3",
    "do_train": "not needed: a recipe always trains; leave it out",
    "do_eval": "not needed: a recipe with data.eval evaluates; leave it out",
    "full_determinism": "not a key: the order of rows and all seeds hang on train.seed already; leave it out",
    "max_train_samples": 'write the slice into the split: data.train: "train[:1000]"',
    "max_samples": 'write the slice into the split: data.train: "train[:1000]"',
    "template": "not needed: data.messages uses the tokenizer's own chat template; otherwise write data.source and data.target",
    "chat_template": "not needed: data.messages uses the tokenizer's own chat template",
    "per_device_eval_batch_size": "not needed: batch.tokens_per_device sizes the micro-batches of evaluation too; leave it out",
    "eval_batch_size": "not needed: batch.tokens_per_device sizes the micro-batches of evaluation too; leave it out",
}


_NEVER = {  # what a strategy "no" asks for
    "train.eval_steps": "write data.eval: null for a run without evaluation",
    "train.save_steps": "a run always keeps checkpoints, to go on from; leave it out, or write train.save_total_limit: 1 to keep one",
}


_UNSET = {"train.max_steps": (-1,), "data.name": (None,), "model.revision": (None,)}  # values that stand for none


def habit_answer(document: Document, path: KeyPath) -> str | None:
    """What to write instead of an unknown key that another tool knows; None for keys that no tool here knows."""
    name, value = path[-1], document.get(path)
    if name in _PER_DEVICE or name in _ACCUMULATION:
        return _batch_answer(document, name)
    if name in _SPECIAL:
        return _SPECIAL[name](document, value)
    if name in _SAME_VALUE:
        target = _SAME_VALUE[name]
        if target in _NEVER and value in ("no", False):
            return _NEVER[target]
        return _same_value(target, value)
    return _REFUSED.get(name)


def answered_keys(document: Document) -> set[str]:
    """Keys that are missing only because another tool's name stands for them: their absence needs no fault of its own."""
    names = {path[-1] for path in document.places if path[0] != "zero"}
    answered = {_SAME_VALUE[name] for name in names & set(_SAME_VALUE)}
    return answered | ({"batch.samples"} if names & {*_PER_DEVICE, *_ACCUMULATION} else set())


def _same_value(target: str, value: Any) -> str:
    """The line to write, which the reader takes; what kind of value it has where this one is of another."""
    if value in _UNSET.get(target, ()) and not isinstance(value, bool):
        return "leave it out: that is how it is without it"
    meant, field = _translated(target, value), field_of(tuple(target.split(".")))
    assert field is not None
    if accepts(field, meant):
        return f"write {target}: {_plain(meant)}"
    return f"write {target}: {expected(field.annotation, field.metadata)}, not {shown(value)}"


def _translated(target: str, value: Any) -> Any:
    if target in ("train.eval_steps", "train.save_steps"):
        return "epoch" if value == "epoch" else 500
    if target == "model.compile":
        return "blocks" if value is True else value
    if target == "model.attn_implementation":
        return "flash_attention_2" if value in (True, "fa2", "auto") else None if value is False else value
    if target == "optimizer.max_grad_norm" and value is None:
        return 0
    if target == "data.eval" and value in (0, False):
        return None
    if target == "optimizer.lr_scheduler_type" and value == "constant_with_warmup":
        return "constant"
    if target == "train.epochs" and isinstance(value, float):
        return max(1, math.ceil(value)) if math.isfinite(value) else 3
    if target in ("model.lora.r", "model.lora.lora_alpha") and isinstance(value, float) and value.is_integer():
        return int(value)
    if target == "zero":
        return _zero_of(value)
    if target == "data.path" and isinstance(value, list):
        return [item.get("path") if isinstance(item, dict) else item for item in value]
    if target == "model.lora.target_modules" and value == "all":
        return "all-linear"
    if target == "model.lora.target_modules" and isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return value


def _plain(value: Any) -> str:
    """As it would stand in the file: text without quotes where YAML reads the same text then."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return value if plain else json.dumps(value, ensure_ascii=False)


def _batch_answer(document: Document, name: str) -> str:
    """The product of what stands for the batch, as the one number that a recipe has."""
    per_device, accumulation = _number(document, _PER_DEVICE), _number(document, _ACCUMULATION)
    workers = document.get(("scaling", "num_workers"))
    workers = workers if isinstance(workers, int) and not isinstance(workers, bool) and workers > 0 else 1
    if per_device is None:
        return "write batch.samples: the rows of one optimizer step over all workers; how often gradients accumulate follows from it"
    answer = f"write batch.samples: {per_device * (accumulation or 1) * workers}"
    counted = f"{per_device} rows × {accumulation or 1} accumulation × {workers} worker{'s' if workers > 1 else ''}"
    if name in _ACCUMULATION:
        return f"{answer} ({counted}); how often gradients accumulate follows from it"
    return f"{answer} ({counted}), and batch.samples_per_device: {per_device} to keep the micro-batch"


def _number(document: Document, names: tuple[str, ...]) -> int | None:
    for name in names:
        for path in document.find(name):
            value = document.get(path)
            if path[0] != "zero" and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _precision_switch(precision: str) -> Callable[[Document, Any], str]:
    def answer(document: Document, value: Any) -> str:
        if str(value).lower() in ("true", "auto", "yes", "on"):
            return f"write model.precision: {precision}"
        return f"leave it out, and write model.precision: {'fp32' if precision == 'bf16' else 'bf16 or fp32'}"

    return answer


def _dtype(document: Document, value: Any) -> str:
    words = {
        "bfloat16": "bf16",
        "bf16": "bf16",
        "float16": "fp16",
        "fp16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "fp32": "fp32",
        "float": "fp32",
    }
    return f"write model.precision: {words.get(str(value).removeprefix('torch.'), 'bf16, fp32 or fp16')}"


def _row_length(document: Document, value: Any) -> str:
    if document.get(("model", "task")) == "seq2seq":
        return f"{_same_value('data.max_source_length', value)}, and data.max_target_length"
    return _same_value("data.max_length", value)


def _betas(document: Document, value: Any) -> str:
    found = [
        next((document.get(path) for path in document.find(name)), default)
        for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999))
    ]
    return _same_value("optimizer.betas", found)


def _optimizer(document: Document, value: Any) -> str:
    return "write optimizer.name: adamw" if "adamw" in str(value) else f"{shown(value)} is not available: write optimizer.name: adamw"


def _zero_of(value: Any) -> Any:
    """A stage, as a number or as text, by the name of its configuration."""
    return f"zero{value}" if str(value) in ("0", "1", "2", "3") else value


def _zero_stage(document: Document, value: Any) -> str:
    named = _zero_of(value)
    return f"write zero: {named}" if named != value else "write zero: zero0, zero1, zero2 or zero3"


def _adapter(document: Document, value: Any) -> str:
    return "leave it out: all parameters are trained" if value in ("full", None, False) else "write model.lora: {r: 8, lora_alpha: 16}"


_SPECIAL: dict[str, Callable[[Document, Any], str]] = {
    "bf16": _precision_switch("bf16"),
    "fp16": _precision_switch("fp16"),
    "torch_dtype": _dtype,
    "dtype": _dtype,
    "mixed_precision": _dtype,
    "sequence_len": _row_length,
    "cutoff_len": _row_length,
    "max_seq_length": _row_length,
    "max_seq_len": _row_length,
    "model_max_length": _row_length,
    "adam_beta1": _betas,
    "adam_beta2": _betas,
    "optim": _optimizer,
    "zero_stage": _zero_stage,
    "adapter": _adapter,
    "finetuning_type": _adapter,
}
