"""The Hugging Face model: its facts without weights, its first weights, and the loss of each task.

Random weights, missing heads and LoRA matrices are drawn once, on the CPU, from train.seed, and written as safetensors; every rank
loads them like pretrained ones. So every ZeRO stage and world size starts from the same bits (drawn under ZeRO-3 they would differ).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from trainkit.data.encoding import limits
from trainkit.data.tokenizer import load_tokenizer
from trainkit.errors import DataError, first_line
from trainkit.planning.facts import Matrices, ModelFacts, Parameter
from trainkit.planning.memory import BIASED_ATTENTION
from trainkit.recipe.schema import Lora, Recipe
from trainkit.training.blocks import parameters_of_blocks
from trainkit.training.tasks import TASKS, base_model, waits_for_device

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
Gathered = Callable[[torch.nn.Parameter], AbstractContextManager[Any]]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how transformers' configs call them
_SHARED_LAYERS = ("albert", "zamba", "zamba2")  # a weight multiplies a token many times
_OTHER_ATTENTION = (  # disentangled: positions are attended to as well; or to what is near only
    *("deberta", "deberta-v2"),
    *("longt5", "longformer", "led", "big_bird", "bigbird_pegasus", "modernbert"),
)
_UNUSED = re.compile(r"(^|\.)original_module(\.|$)")  # what peft trains a copy of (modules_to_save)
_OF_THE_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|cross_?attention|cross_attn)\.(k|v|key|value)(_proj)?\b")
_ONCE_A_ROW = re.compile(r"(^|\.)(pooler|classifier|classification_head|score)(\.|$)")


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to a model's weights, such as Marian's final_logits_bias, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters and isinstance(value, torch.Tensor)}


def load_config(recipe: Recipe, label_names: Sequence[str] | None = None) -> Any:
    """The model's config.json; raises DataError when it is not there, is not a model's, or lacks the task's head."""
    labels: dict[str, Any] = {}
    if label_names is not None:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: index for index, name in enumerate(label_names)}}
    if not Path(recipe.model.path).exists() and recipe.model.path.startswith(("/", ".", "~")):
        raise DataError(f"model.path: {recipe.model.path}: no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision, **labels)
    except Exception as error:  # each kind of wrong config fails in its own way
        raise DataError(f"model.path: {recipe.model.path}: no transformers config can be read: {first_line(error)}") from None
    if type(config) not in TASKS[recipe.model.task].auto_class._model_mapping:
        raise DataError(f"model.task: {recipe.model.task}: {recipe.model.path} is a {config.model_type} model, which has no such head")
    if recipe.model.task == "classification" and _reads_last_token(config):
        config.pad_token_id = config.get_text_config().pad_token_id = _padding_id(recipe, config)  # the head reads the text's
    return config


def _reads_last_token(config: Any) -> bool:
    """Whether a head that classifies looks for the last token that is not padding, as those of decoders do."""
    return not config.is_encoder_decoder and type(config) not in transformers.AutoModelForMaskedLM._model_mapping


def _padding_id(recipe: Recipe, config: Any) -> int:
    """What the tokenizer pads rows with, so that the class does not depend on the padding; a plan may do without a tokenizer.

    Raises DataError for a token that the model does not have.
    """
    text = config.get_text_config()
    try:
        padding = int(load_tokenizer(recipe).tokenizer.pad_token_id)
    except DataError:
        known = (getattr(text, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in known if isinstance(token, int)), 0)
    if padding >= text.vocab_size:
        raise DataError(
            f"model.path: {recipe.model.path}: the tokenizer pads with token {padding}, and the model knows {text.vocab_size} tokens, "
            "counted from 0. Name one of these as pad_token in its tokenizer_config.json, for example the one of eos_token"
        )
    return padding


def model_facts(recipe: Recipe, label_names: Sequence[str] | None = None) -> ModelFacts:
    """Parameters, buffers and shape of the recipe's model, read on the meta device: no weights are loaded or drawn."""
    from accelerate import init_empty_weights

    config = load_config(recipe, label_names)
    with init_empty_weights(include_buffers=True):
        model = _add_lora(_from_config(recipe, config, torch.float32), recipe)
    text = config.get_text_config()
    block_of = {p: number for number, (_, parameters) in enumerate(parameters_of_blocks(model)) for p in parameters}
    return ModelFacts(
        model_type=config.model_type,
        parameters=tuple(Parameter(name, p.numel(), p.requires_grad, block_of.get(p)) for name, p in model.named_parameters()),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        hidden_size=text.hidden_size,
        num_layers=getattr(text, "num_hidden_layers", 0) + _decoder_layers(config),
        vocab_size=text.vocab_size,
        attn_implementation=str(base_model(model).config._attn_implementation),
        decides_on_host=_has_experts(text) or any(value for name, value in config.to_dict().items() if name.endswith("layerdrop")),
        waits_for_device=waits_for_device(model, recipe.model.task),
        matrices=None if _has_short_window(text, recipe) else _matrices(base_model(model), config, recipe.model.task),
    )


def _has_short_window(text: Any, recipe: Recipe) -> bool:
    """Whether a token attends to fewer than a row's."""
    window = getattr(text, "sliding_window", None)
    return window is not None and window < max(limits(recipe).values())


def _matrices(model: Any, config: Any, task: str) -> Matrices | None:
    """None where a token does not meet each weight of a linear layer once, or where other work than theirs and common attention's matters.

    That are experts, of which a token sees few; layers that share weights; disentangled attention, and models without heads (Mamba); an
    encoder-decoder that classifies, whose decoder reads the source once more, or whose halves have configurations of their own; and
    weights of other kinds (over 1 %).
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads or _has_experts(text) or config.model_type in _SHARED_LAYERS + _OTHER_ATTENTION:
        return None
    if config.is_encoder_decoder and (task == "classification" or getattr(config, "encoder", None) is not None):
        return None
    encoder = {id(module) for module in model.get_encoder().modules()} if config.is_encoder_decoder else set()
    counts = {"source": 0, "target": 0, "source_trained": 0, "target_trained": 0}
    known: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            known.add(id(module.weight))
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        known.add(id(module.weight))
        if _ONCE_A_ROW.search(name) or _UNUSED.search(name):
            continue
        stream = "target" if config.is_encoder_decoder and id(module) not in encoder and not _OF_THE_SOURCE.search(name) else "source"
        counts[stream] += module.weight.numel()
        counts[f"{stream}_trained"] += module.weight.numel() if module.weight.requires_grad else 0
    parameters = list(model.parameters())
    others = sum(p.numel() for p in parameters if id(p) not in known and p.ndim > 1)  # norms and biases are not counted anyway
    if others > 0.01 * sum(p.numel() for p in parameters):
        return None
    head_width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    return Matrices(**counts, decoder_layers=_decoder_layers(config), attention_width=heads * head_width)


def _has_experts(text: Any) -> bool:
    return any(getattr(text, name, None) for name in _EXPERTS)


def _decoder_layers(config: Any) -> int:
    """Beside num_hidden_layers, which are the encoder's where there is one; T5 and BART call them differently."""
    if not config.is_encoder_decoder:
        return 0
    text: Any = config.get_text_config()
    half = getattr(config, "decoder", None)  # with a configuration of its own
    return getattr(text, "num_decoder_layers", 0) or getattr(text, "decoder_layers", 0) or getattr(half, "num_hidden_layers", 0)


def write_first_weights(recipe: Recipe, path: Path, label_names: Sequence[str] | None = None) -> Path | None:
    """Draw what no checkpoint holds, on the CPU from train.seed, and write it to `path`, in the type of training; None if nothing had to
    be drawn."""
    torch.manual_seed(recipe.train.seed)
    config = load_config(recipe, label_names)
    if recipe.model.weights == "random":
        model, loaded = _from_config(recipe, config, torch.float32), set()
    else:
        model, missing = _from_pretrained(recipe, config, "auto")
        loaded = {id(p) for name, p in model.named_parameters() if name not in missing}
    model = _add_lora(model, recipe)
    drawn = {
        name: p.detach().to(DTYPES[recipe.model.precision]).contiguous() for name, p in model.named_parameters() if id(p) not in loaded
    }
    if not drawn:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(drawn, path)
    return path


def build_model(recipe: Recipe, first_weights: str | None, gathered: Gathered, label_names: Sequence[str] | None = None) -> Any:
    """The model to train, on the CPU or, inside an engine's ZeRO-3 context, partitioned from the start.

    first_weights: the file of write_first_weights; None where it wrote none, or where a checkpoint will be restored: then a model of
    random weights begins with zeros. gathered(parameter) is a context in which a whole parameter is written, by the rank that writes it.
    """
    config = load_config(recipe, label_names)
    dtype = DTYPES[recipe.model.precision]
    if recipe.model.weights == "pretrained":
        model = _from_pretrained(recipe, config, dtype)[0]
    else:
        with no_init_weights():  # all are written here or by a checkpoint: drawing a large model again takes most of a minute
            model = _from_config(recipe, config, dtype)
        model.tie_weights()
        if first_weights is None:
            _zero(model, gathered)
    model = _add_lora(model, recipe)
    if first_weights is not None:
        _overlay(model, first_weights, gathered)
    if recipe.model.gradient_checkpointing is True:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_exported(folder: str | Path, task: str, precision: str, attention: str | None = None) -> Any:
    """An exported model/ folder in plain transformers, in evaluation mode, on the CPU. An adapter loads over its base.

    attention: as in the recipe; the numbers of another kind differ by roundings.
    """
    folder, auto_class, dtype = Path(folder), TASKS[task].auto_class, DTYPES[precision]
    if not (folder / "adapter_config.json").exists():
        config = transformers.AutoConfig.from_pretrained(folder)
        return auto_class.from_pretrained(folder, config=config, dtype=dtype, **_attention(config, attention)).eval()
    import peft

    adapter = peft.PeftConfig.from_pretrained(str(folder))
    own_base = (folder / "base").is_dir()  # drawn at random, so it lies with its adapter
    name, revision = (folder / "base", None) if own_base else (adapter.base_model_name_or_path, adapter.revision)
    with_head = (folder / "config.json").exists()
    config = transformers.AutoConfig.from_pretrained(folder if with_head else name, revision=None if with_head else revision)
    base = auto_class.from_pretrained(name, revision=revision, config=config, dtype=dtype, **_attention(config, attention))
    return peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()


def _overlay(model: torch.nn.Module, path: str, gathered: Gathered) -> None:
    with safe_open(path, framework="pt") as weights:
        names = set(weights.keys())
        for name, parameter in model.named_parameters():
            if name in names:
                with gathered(parameter) as writes, torch.no_grad():
                    if writes:
                        parameter.copy_(weights.get_tensor(name))
                names.discard(name)
    assert not names, f"first weights without a parameter: {sorted(names)[:3]}"


def _zero(model: torch.nn.Module, gathered: Gathered) -> None:
    """Memory that nobody has written may hold NaN, and a step is trained with it before a checkpoint is restored."""
    for parameter in model.parameters():
        with gathered(parameter) as writes, torch.no_grad():
            if writes:
                parameter.zero_()


def _attention(config: Any, wish: str | None = None) -> dict[str, Any]:
    """What from_pretrained is told: the recipe's wish; else "eager" where a position bias leaves SDPA only its slowest kernel, in fp32."""
    chosen = wish or ("eager" if config.model_type in BIASED_ATTENTION else None)
    return {} if chosen is None else {"attn_implementation": chosen}


def _from_config(recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
    try:
        return TASKS[recipe.model.task].auto_class.from_config(config, dtype=dtype, **_attention(config, recipe.model.attn_implementation))
    except (ValueError, ImportError) as error:
        raise DataError(f"model.path: {recipe.model.path}: the model cannot be built: {first_line(error)}") from None


def _from_pretrained(recipe: Recipe, config: Any, dtype: torch.dtype | str) -> tuple[Any, set[str]]:
    """The model and the names of its parameters that the checkpoint does not hold."""
    try:
        model, info = TASKS[recipe.model.task].auto_class.from_pretrained(
            recipe.model.path, revision=recipe.model.revision, config=config, dtype=dtype, use_safetensors=True,
            output_loading_info=True, **_attention(config, recipe.model.attn_implementation),
        )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(
            f"model.path: {recipe.model.path}: no weights can be loaded: {first_line(error)}. "
            "Write model.weights: random to train from scratch"
        ) from None
    return model, set(info["missing_keys"])


def _add_lora(model: Any, recipe: Recipe) -> Any:
    lora: Lora | None = recipe.model.lora
    if lora is None:
        return model
    import peft

    settings = peft.LoraConfig(task_type=TASKS[recipe.model.task].peft_type, **lora.model_dump())
    settings.base_model_name_or_path, settings.revision = recipe.model.path, recipe.model.revision
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} | {name for name, _ in model.named_modules()}
    unknown = [name for name in lora.modules_to_save or () if name not in known]
    if unknown:  # peft would train the rest and say nothing
        raise DataError(f"model.lora.modules_to_save: {recipe.model.path} has no module {', '.join(unknown)}")
    try:  # peft would keep adapters in fp32, which DeepSpeed casts under some stages only
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise DataError(f"model.lora.target_modules: {lora.target_modules}: {first_line(error)}") from None
