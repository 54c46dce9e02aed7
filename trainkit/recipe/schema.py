"""What a recipe may say: every key, its type, its default and one sentence on what it means.

A recipe is a wish. Nothing here computes; the plan (planning/planner.py) decides what the wish amounts to.
Keys with an exact counterpart in transformers' TrainingArguments, torch's AdamW, peft, `load_dataset` or Ray's ScalingConfig and
RunConfig carry that name. Checks of one value stand here, their messages in checks.py; what needs several keys stands in combinations.py.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
RowCount = Annotated[int, Field(gt=0, le=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Every = Literal["epoch"] | PositiveInt | Annotated[float, Field(gt=0, lt=1)]
Task = Literal["seq2seq", "causal", "classification"]
Precision = Literal["bf16", "fp32", "fp16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Lora(Section):
    r: PositiveInt = Field(8, description="Rank of the two matrices added to each target module.")
    lora_alpha: PositiveInt = Field(16, description="Scale: the added product is multiplied by lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout in front of the first matrix.")
    target_modules: str | list[str] = Field("all-linear", description="Names of the modules that get the matrices, as in peft.")
    modules_to_save: list[str] | None = Field(None, description="Modules trained in full beside the matrices, as in peft.")


class Model(Section):
    path: str = Field(description="A hub id or a local folder with config.json, tokenizer and, unless weights is random, safetensors.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    task: Task = Field(description="Which head: seq2seq and causal predict tokens, classification predicts one label a row.")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random draws all weights from train.seed.")
    precision: Precision = Field(
        "bf16", description="Type of forward, backward and gradients; the optimizer keeps fp32 weights and states."
    )
    attn_implementation: str | None = Field(None, description="As in from_pretrained; null takes the fastest that the model supports.")
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="true: compute the activations again in backward: far less memory, about a third more work. "
        "selective: compiled blocks keep what matrices need and compute the rest again: about a quarter less, for 3 to 8 % of the time.",
    )
    compile: Literal["blocks", False] | None = Field(
        None,
        description="blocks: torch.compile of the repeated blocks; null: on a GPU under ZeRO stages 0 to 2, where the run is long enough, "
        "and for selective checkpointing.",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="Forward and backward as two CUDA graphs a shape; null: where they can be made. false: sums of gradients and the "
        "optimizer step as DeepSpeed does them, too.",
    )
    lora: Lora | None = Field(None, description="Train low-rank matrices only; null trains all parameters.")


class Messages(Section):
    role: Literal["system", "user", "assistant"] = Field(description="Who speaks; what the assistant says is learned.")
    content: str = Field(description="What is said, with columns in braces.")


class Data(Section):
    path: str | list[str] = Field(description="Hub id, folder, save_to_disk folder, file, glob or list of files.")
    name: str | None = Field(None, description="Configuration of the data set, as in load_dataset(path, name).")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    train: str = Field("train", description="Split or file to train on; slices as in datasets: train[:200].")
    eval: str | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Split or file to evaluate on, a seeded held-out fraction of train, or null."
    )
    source: str | list[str] | None = Field(None, description="Input template with columns in braces; a list of two is a sentence pair.")
    target: str | None = Field(None, description="Template of the completion, or the label column; alone under causal: plain text.")
    messages: str | list[Messages] | None = Field(
        None, description="Chat column, or a list of {role, content} templates; loss on assistant turns."
    )
    max_source_length: PositiveInt | None = Field(
        None, description="seq2seq: most source tokens of a row, special tokens counted. Default 512."
    )
    max_target_length: PositiveInt | None = Field(
        None, description="seq2seq: most target tokens of a row, special tokens counted. Default 512."
    )
    max_length: PositiveInt | None = Field(None, description="causal, classification: most tokens of a row. Default 512.")
    packing: bool = Field(False, description="causal: several rows in one sequence, borders respected.")


class Batch(Section):
    samples: RowCount = Field(description="Rows in one optimizer step over all workers: part of the training, never of the layout.")
    tokens_per_device: Literal["auto"] | PositiveInt = Field(
        "auto", description="Budget of one micro-batch on one device, padding included."
    )
    samples_per_device: RowCount | None = Field(None, description="Rows of one micro-batch on one device, instead of tokens_per_device.")
    joint_shapes: bool | None = Field(
        None,
        description="Pad micro-batches to few shapes, at about 5 % more tokens, for CUDA graphs; null: on GPUs where there may be some.",
    )


class Optimizer(Section):
    name: Literal["adamw"] = Field("adamw", description="Optimizer; torch's AdamW, CPUAdam where ZeRO keeps its states on the CPU.")
    lr: PositiveFloat = Field(description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay on every trained parameter, as in torch.optim.AdamW.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="As in torch.optim.AdamW."
    )
    eps: PositiveFloat = Field(1e-8, description="As in torch.optim.AdamW.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay to 0 at the last optimizer step, or none."
    )
    warmup_steps: NonNegativeInt | Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="Optimizer steps of linear warm-up; below 1: a share of the run."
    )
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradients are scaled down to this global L2 norm; 0 switches clipping off.")


class Profile(Section):
    start: PositiveInt = Field(3, description="First optimizer step of the trace, counted from 1.")
    steps: Annotated[int, Field(gt=0, le=100)] = Field(3, description="How many optimizer steps are traced; a step can take some MB.")


class Train(Section):
    epochs: PositiveInt | None = Field(None, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps of the run and of the schedule; wins over epochs.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="Seeds weights, sample order, held-out rows and dropout.")
    eval_steps: Every = Field("epoch", description="Evaluate every epoch, every n optimizer steps, or every share of the run below 1.")
    save_steps: Every = Field("epoch", description="Save a checkpoint every epoch, every n optimizer steps, or every share of the run.")
    save_total_limit: PositiveInt = Field(2, description="How many newest checkpoints stay.")
    metrics: list[str] = Field([], description="Beside the loss: exact_match, rouge (by generation), accuracy, f1 (classification).")
    metric_for_best_model: str | None = Field(None, description="loss or one of the metrics: decides which evaluation is the best.")
    load_best_model_at_end: bool = Field(False, description="model/ holds the weights of the best evaluation instead of the last ones.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations in a row without a better metric."
    )
    halve_on_oom: bool = Field(False, description="After running out of memory, go on with half the micro-batch budget; same global batch.")
    profile: Profile | None = Field(None, description="Trace some optimizer steps of every rank into the run folder's profile/.")
    deterministic: bool = Field(False, description="Only kernels that give the same bits every time: slower, and exact resume on a GPU.")


class Scaling(Section):
    num_workers: PositiveInt | list[PositiveInt] = Field(
        1, description="Worker processes, one per GPU; [1, 4]: as many as there is room for, seen anew at each start of the workers."
    )
    use_gpu: bool = Field(True, description="One GPU per worker; false trains on the CPU with gloo.")
    resources_per_worker: dict[str, NonNegativeFloat] | None = Field(None, description="As in Ray's ScalingConfig.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field("PACK", description="As in Ray's ScalingConfig.")
    accelerator_type: str | None = Field(None, description="As in Ray's ScalingConfig.")
    label_selector: dict[str, str] | list[dict[str, str]] | None = Field(None, description="As in Ray's ScalingConfig.")


class Run(Section):
    storage_path: str = Field("runs", description="Folder of the run folders, seen by all nodes.")
    max_failures: NonNegativeInt = Field(
        3, description="How often a dead worker or node restarts the group; giving up CUDA graphs counts for nothing."
    )
    copy_checkpoints_to: str | None = Field(
        None, description="URL of a folder, as fsspec writes them (s3://bucket/folder), that gets a copy of each complete checkpoint."
    )


class Recipe(Section):
    """The whole recipe, defaults filled in. Paths are absolute or hub ids once the reader is through with it.

    `read_recipe` (trainkit.load_recipe) makes one of a file or of a mapping, with every check; `with_` changes it.
    """

    name: str = Field(description="Stem of the run folders; default: the recipe file's stem.")
    model: Model
    data: Data
    zero: str | dict[str, Any] | None = Field(None, description="A shipped ZeRO configuration, a JSON file, a mapping, or null (zero0).")
    batch: Batch
    optimizer: Optimizer
    train: Train
    scaling: Scaling = Scaling()
    run: Run = Run()

    def with_(self, changes: Mapping[str, Any]) -> Recipe:
        """A new recipe: `recipe.with_({"batch.samples": 64})`. The same dotted keys and checks as `--set`.

        Relative paths start at the working directory. Raises RecipeError with every fault.
        """
        from trainkit.recipe.reader import read_recipe

        return read_recipe(self, changes)

    def __str__(self) -> str:
        """YAML of the keys that differ from their defaults."""
        from trainkit.recipe.reader import recipe_to_yaml

        return recipe_to_yaml(self, defaults=False)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
