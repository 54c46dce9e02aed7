"""The trained model as a plain Hugging Face folder, in the training precision, and the proof that it is the trained one.

Parameters are gathered one at a time; rank 0 holds the whole on the CPU, writes it beside its place, loads it back as a user would, and
compares: every tensor bit for bit, and the logits of one batch with those of the engine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from trainkit.data.padding import MicroBatch, moved
from trainkit.errors import ExportMismatch, TrainingError, TrainkitError, UsageError
from trainkit.inference.predict import exported_tokenizer, load_plain, load_run_model, open_run
from trainkit.planning.facts import DEFAULT_LENGTH
from trainkit.recipe.schema import Recipe
from trainkit.runs.files import linked, write_whole
from trainkit.training.model import DTYPES, persistent_buffers
from trainkit.training.tasks import TASKS, base_model

if TYPE_CHECKING:
    from trainkit.training.engine import Engine

LOGIT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}  # of the largest logit
COMPARED_ROWS = 4
SAME_SIZE_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Tensors = dict[str, torch.Tensor]


def export_model(engine: Engine, tokenizer: Any, folder: Path, recipe: Recipe, batch: MicroBatch) -> None:
    """Write and check `folder`, in place of what lies there. All ranks call it together, each with a micro-batch of its own.

    A LoRA run leaves the adapter; a base that was drawn at random lies in `<folder>/base`, since it is nowhere else.
    Raises, on all ranks: ExportMismatch naming the first tensor, or the logits, that differ (what was written stays beside the place,
    to be looked at); TrainingError when it cannot be written.
    """
    batch = _few_rows(batch)
    with engine.evaluating():
        logits = engine.logits(batch).float().cpu()
    whole = {name: tensor for name, tensor in engine.whole_parameters() if tensor is not None}
    verdict: list[TrainkitError | None] = [None]
    if dist.get_rank() == 0:
        whole |= _buffers(engine.model)
        device = torch.device("cpu") if engine.plan.zero_stage == 3 else _roomy_device(engine, whole, batch)
        verdict = [
            _error_of(lambda: _write_and_check(engine.model, whole, tokenizer, folder, recipe, moved(batch, device), logits), folder)
        ]
    dist.broadcast_object_list(verdict, device=engine.device)
    if verdict[0] is not None:
        raise verdict[0]


def write_model(model: Any, whole: Tensors, tokenizer: Any, folder: Path, recipe: Recipe) -> None:
    """Config, generation config, tokenizer and safetensors of a model whose tensors are given whole, by `named_parameters` name."""
    base = base_model(model)
    if recipe.model.task == "seq2seq":  # plain generate() would stop after 20 tokens
        base.generation_config.max_new_tokens = recipe.data.max_target_length or DEFAULT_LENGTH
    if recipe.model.lora is None:
        base.save_pretrained(folder, state_dict=dict(whole))  # a copy: it takes out what it has written
    else:
        if recipe.model.weights == "random":
            base.save_pretrained(folder / "base", state_dict=_base_tensors(whole))
        model.save_pretrained(folder, state_dict=dict(whole), save_embedding_layers=False)
        if recipe.model.task == "classification":  # labels, which the base's own config lacks; elsewhere it would look like a whole model
            base.config.dtype = DTYPES[recipe.model.precision]
            base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_exported(folder: Path, recipe: Recipe, whole: Tensors, batch: MicroBatch, logits: torch.Tensor) -> None:
    """Load the folder as a user does and compare with the gathered tensors and, on the batch's device, the engine's logits.

    Raises ExportMismatch.
    """
    try:
        loaded = load_plain(folder, recipe.model.task, recipe.model.precision, recipe.model.attn_implementation)
    except Exception as error:  # each format fails in its own way, and all mean that the user cannot load it
        raise ExportMismatch(f"{folder}: transformers cannot load the exported model: {error}", what="loading") from error
    compare_tensors(folder, dict(loaded.named_parameters()) | _buffers(loaded), whole)
    task = TASKS[recipe.model.task]
    with torch.no_grad():
        again = task.logits(loaded.to(batch.input_ids.device), batch).float().cpu()
    compare_logits(folder, _real(again, batch, recipe), _real(logits, batch, recipe), LOGIT_TOLERANCE[recipe.model.precision])


def compare_tensors(folder: Path, stored: Tensors, whole: Tensors) -> None:
    """The same names and the same bits; a tie that only one of the two has shows as a name too many. Raises ExportMismatch.

    transformers may keep a tensor in fp32 by a model's wish; rounded to the training precision it must be the gathered one.
    Modules that an adapter trains in full have an unused original beside them, which is in no forward and in no file.
    """
    whole, stored = ({name: tensor for name, tensor in part.items() if ".original_module." not in name} for part in (whole, stored))
    for name in [*whole, *stored]:
        if name not in stored:
            raise ExportMismatch(f"{folder}: the exported model has no tensor {name} of its own, the trained one has", what=name)
        if name not in whole:
            raise ExportMismatch(f"{folder}: the exported model has a tensor {name} of its own, which was not trained", what=name)
        if not _same_bits(stored[name].detach().to("cpu", whole[name].dtype), whole[name]):
            raise ExportMismatch(f"{folder}: tensor {name} of the exported model is not the trained one", what=name)


def compare_logits(folder: Path, again: torch.Tensor, logits: torch.Tensor, tolerance: float) -> None:
    """Largest difference against `tolerance` times the largest logit; NaN never passes. Raises ExportMismatch."""
    difference, largest = (again - logits).abs().max().item(), logits.abs().max().item()
    if not difference <= tolerance * largest:
        raise ExportMismatch(
            f"{folder}: the exported model's logits differ from the trained one's by {difference:.3g}, the largest logit is {largest:.3g}; "
            f"{tolerance:g} of it is allowed",
            what="logits",
        )


def move_model(folder: Path, target: Path) -> None:
    """Rename a model folder, in place of what lies at `target`. An adapter that brought its own base goes on naming it."""
    if (folder / "base").is_dir():
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": str(target.absolute() / "base"), "revision": None}
        write_whole(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.replace(before)
    folder.replace(target)
    shutil.rmtree(before, ignore_errors=True)


def link_model(folder: Path, target: Path) -> None:
    """Put a copy of a model folder, in hard links where the disk knows them, in place of what lies at `target`. `folder` stays."""
    beside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder, beside, copy_function=linked)
    move_model(beside, target)


def merge_adapter(run: Path) -> Path:
    """`trainkit export RUN --merge`: a run's LoRA adapter merged into its base, as a plain model folder, `<run>/model-merged`.

    Merged in the training precision. Raises UsageError where no adapter lies, DataError where the base cannot be loaded.
    """
    recipe, folder = open_run(run)
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: no LoRA adapter lies here, so there is nothing to merge: model/ is a whole model")
    target = run / "model-merged"
    beside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        load_run_model(recipe, folder).merge_and_unload().save_pretrained(beside)
        exported_tokenizer(recipe, folder).save_pretrained(beside)
        _as_the_umask_says(beside)
        move_model(beside, target)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{target}: the merged model cannot be written: {error}. Make room") from None
    return target


def _buffers(model: Any) -> Tensors:
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in persistent_buffers(model).items()}


def _write_and_check(
    model: Any, whole: Tensors, tokenizer: Any, folder: Path, recipe: Recipe, batch: MicroBatch, logits: torch.Tensor
) -> None:
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    write_model(model, whole, tokenizer, beside, recipe)
    _as_the_umask_says(beside)
    check_exported(beside, recipe, whole, batch, logits)
    move_model(beside, folder)


def _as_the_umask_says(folder: Path) -> None:
    """safetensors writes files that their owner alone may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _error_of(work: Callable[[], None], folder: Path) -> TrainkitError | None:
    """What went wrong, as an error that travels to the other ranks, which wait: rank 0 must not raise alone."""
    try:
        work()
    except TrainkitError as error:
        return error
    except (OSError, SafetensorError) as error:
        return TrainingError(f"{folder}: the model cannot be written: {error}. Make room or choose another folder with --runs")
    except Exception as error:
        wrapped = TrainingError(f"{folder}: the model cannot be exported: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return wrapped
    return None


def _base_tensors(whole: Tensors) -> Tensors:
    """The base model's tensors under their own names, out of those of a LoRA model."""
    names = {name: name.removeprefix("base_model.model.") for name in whole if "lora_" not in name and ".modules_to_save." not in name}
    return {own.replace(".base_layer.", ".").replace(".original_module.", "."): whole[name] for name, own in names.items()}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integer = SAME_SIZE_INTEGER[other.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def _real(logits: torch.Tensor, batch: MicroBatch, recipe: Recipe) -> torch.Tensor:
    """Logits [positions, classes] that mean something: causal ones at padding depend on the attention kernel and on nothing else."""
    mask = batch.attention_mask
    return logits[mask.bool().cpu()] if recipe.model.task == "causal" and mask is not None else logits


def _few_rows(batch: MicroBatch) -> MicroBatch:
    """The first rows of a micro-batch: enough to compare, small enough for any device."""
    rows: dict[str, Any] = {name: value[:COMPARED_ROWS] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **rows)


def _roomy_device(engine: Engine, whole: Tensors, batch: MicroBatch) -> torch.device:
    """The batch's device if the model fits there twice, else the CPU."""
    device = batch.input_ids.device
    if device.type == "cuda" and engine.free_bytes() < 2 * sum(tensor.nbytes for tensor in whole.values()):
        return torch.device("cpu")
    return device
