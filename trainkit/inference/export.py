"""The trained model as a plain Hugging Face folder, in the training precision, and the proof that it is the trained one.

Parameters are gathered one at a time; rank 0 holds the whole on the CPU, writes it beside its place, loads it back as a user would, and
compares: every tensor bit for bit, and the logits of one batch with those of the engine.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainkit.data.feed import MicroBatch, moved
from trainkit.data.tokens import load_tokenizer
from trainkit.errors import DataError, ExportMismatch, TrainkitError, UsageError
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.training.model import DTYPES, TASKS, base_model, load_exported

if TYPE_CHECKING:
    from trainkit.training.engine import Engine

LOGIT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}  # of the largest logit
COMPARED_ROWS = 4
Tensors = dict[str, torch.Tensor]


def export_model(engine: Engine, tokenizer: Any, folder: Path, recipe: Recipe, batch: MicroBatch) -> None:
    """Write and check `folder`. All ranks call it together, each with a micro-batch of its own.

    A LoRA run leaves the adapter; a base that was drawn at random lies in `<folder>/base`. Raises ExportMismatch, on all ranks, naming
    the first tensor, or the logits, that differ.
    """
    batch = _few_rows(batch)
    with engine.evaluating():
        logits = engine.logits(batch).float().cpu()
    whole = {name: tensor for name, tensor in engine.whole_parameters() if tensor is not None}
    verdict: list[TrainkitError | None] = [None]
    if dist.get_rank() == 0:
        try:
            beside = folder.with_name(f".{folder.name}.writing")
            shutil.rmtree(beside, ignore_errors=True)
            write_model(engine.model, whole, tokenizer, beside, folder, recipe)
            check_exported(beside, recipe, whole, batch, logits)
            shutil.rmtree(folder, ignore_errors=True)
            beside.replace(folder)
        except TrainkitError as error:
            verdict = [error]
        except OSError as error:
            verdict = [DataError(f"{folder}: the model cannot be written: {error.strerror or error}")]
    dist.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]


def write_model(model: Any, whole: Tensors, tokenizer: Any, folder: Path, final: Path, recipe: Recipe) -> None:
    """Config, generation config, tokenizer and safetensors of a model whose parameters are given whole, by `named_parameters` name.

    final: where the folder will lie in the end; an adapter names the place of its base by it.
    """
    base = base_model(model)
    base.config.dtype = DTYPES[recipe.model.precision]
    if recipe.model.lora is None:
        base.save_pretrained(folder, state_dict=whole)
    else:
        adapter = model.peft_config["default"]
        if recipe.model.weights == "random":
            base.save_pretrained(folder / "base", state_dict=_base_tensors(whole))
            adapter.base_model_name_or_path = str(final / "base")
        model.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
        base.config.save_pretrained(folder)  # labels and shape, which the base's own config may lack
    tokenizer.save_pretrained(folder)


def check_exported(folder: Path, recipe: Recipe, whole: Tensors, batch: MicroBatch, logits: torch.Tensor) -> None:
    """Load the folder as a user does and compare. Raises ExportMismatch."""
    loaded = load_exported(folder, recipe.model.task, recipe.model.precision)
    stored = dict(loaded.named_parameters())
    for name, tensor in whole.items():
        if name not in stored:
            raise ExportMismatch(f"{folder}: the exported model has no tensor {name}", what=name)
        if not torch.equal(stored[name].detach(), tensor):
            raise ExportMismatch(f"{folder}: tensor {name} of the exported model is not the trained one", what=name)
    device = _roomy_device(whole, batch)
    with torch.no_grad():
        again = TASKS[recipe.model.task].logits(loaded.to(device), moved(batch, device)).float().cpu()
    difference, largest = (again - logits).abs().max(), logits.abs().max()
    if not difference <= LOGIT_TOLERANCE[recipe.model.precision] * largest:
        raise ExportMismatch(
            f"{folder}: the exported model's logits differ from the trained one's by {difference:.3g}; the largest logit is {largest:.3g}",
            what="logits",
        )


def merge_adapter(run: Path, out: Path | None = None) -> Path:
    """`trainkit export RUN --merge`: a run's LoRA adapter merged into its base, as a plain model folder `<run>/model-merged`.

    Raises UsageError where no adapter lies.
    """
    folder = run / "model"
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: no LoRA adapter lies here; a merged model needs a finished run with model.lora")
    recipe = read_recipe(run / "recipe.yaml")
    merged = load_exported(folder, recipe.model.task, recipe.model.precision).merge_and_unload()
    target = out or run / "model-merged"
    merged.save_pretrained(target)
    load_tokenizer(recipe).tokenizer.save_pretrained(target)
    return target


def _base_tensors(whole: Tensors) -> Tensors:
    """The base model's tensors under their own names, out of those of a LoRA model."""
    names = {name: name.removeprefix("base_model.model.") for name in whole if "lora_" not in name and ".modules_to_save." not in name}
    return {own.replace(".base_layer.", ".").replace(".original_module.", "."): whole[name] for name, own in names.items()}


def _few_rows(batch: MicroBatch) -> MicroBatch:
    """The first rows of a micro-batch: enough to compare, small enough for any device."""
    return replace(batch, **{name: value[:COMPARED_ROWS] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})


def _roomy_device(whole: Tensors, batch: MicroBatch) -> torch.device:
    """The batch's device if the model fits there twice, else the CPU."""
    device = batch.input_ids.device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2 * sum(tensor.nbytes for tensor in whole.values()):
        return torch.device("cpu")
    return device
