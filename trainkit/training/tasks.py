"""What differs between tasks: the model's head, its logits for a micro-batch, and the sum of the losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import masking_utils

from trainkit.data.arrays import IGNORED_LABEL
from trainkit.data.padding import MicroBatch
from trainkit.errors import DataError
from trainkit.planning.flops import Work
from trainkit.training.loss import IN_CHUNKS, Kernels, cross_entropy_sum

CLASSIFYING_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert")  # whose masks are made here
CLASSIFYING_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # which need none


@dataclass(frozen=True)
class Task:
    """How a task's model is made and what its loss is. `logits` and `sum_loss` see the model and one micro-batch."""

    auto_class: Any
    peft_type: str
    logits: Callable[[torch.nn.Module, MicroBatch], torch.Tensor]
    sum_loss: Callable[..., torch.Tensor]  # of logits, labels and the Kernels that go over them


def _seq2seq_logits(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    inner: Any = base_model(model)
    shifted = inner.prepare_decoder_input_ids_from_labels(batch.labels)
    return model(input_ids=batch.input_ids, decoder_input_ids=shifted, use_cache=False, **_masks(inner, batch, shifted)).logits


def _masks(model: Any, batch: MicroBatch, decoder_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Attention masks with four dimensions. Given a mask of [rows, source], transformers checks on the GPU whether it is needed, and waits
    for the answer; so it does with the one of the decoder that BART and its kin make, and for "eager" it copies a number from the host."""
    mask, attention = batch.attention_mask, model.config._attn_implementation
    two_dimensional = attention not in ("sdpa", "eager") or not model._supports_sdpa or _has_windows(model.config)
    if mask is None or two_dimensional:  # older models, and those that make several masks of one
        return {"attention_mask": mask}
    place = torch.arange(decoder_ids.shape[1], device=mask.device)
    masks = [mask.bool()[:, None, None, :], (place[None, :] <= place[:, None])[None, None]]
    if attention == "eager":
        lowest = torch.finfo(model.dtype).min
        masks = [torch.where(seen, 0.0, lowest).to(model.dtype) for seen in masks]
    return dict(zip(("attention_mask", "decoder_attention_mask"), masks, strict=True))


def _has_windows(config: Any) -> bool:
    """Whether some layers attend to what is near only."""
    parts = (config, *(getattr(config, name, None) for name in ("encoder", "decoder")))
    return any(getattr(part, "sliding_window", None) for part in parts)


def _causal_logits(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Without a mask: padding stands at the right, where no real token looks, and masks keep the fastest attention kernels away.

    Packed rows keep to themselves: transformers reads the borders from positions that start anew.
    """
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    with _borders_known(packed=bool(positions)):
        return model(input_ids=batch.input_ids, use_cache=False, **positions).logits


@contextlib.contextmanager
def _borders_known(packed: bool) -> Iterator[None]:
    """Without a mask transformers looks in the positions for packed rows, and waits for the GPU to tell it whether there are any. A GPU
    that is waited for in each forward runs dry between micro-batches, and no CUDA graph can be made of it. And while one is made, older
    versions ask nothing and write a mask of all positions, which keeps the fastest kernels away."""
    known = {"find_packed_sequence_indices": _row_of_each_token if packed else lambda position_ids: None, "is_tracing": lambda *_: False}
    before = {name: getattr(masking_utils, name) for name in known}
    for name, function in known.items():
        setattr(masking_utils, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)


def _row_of_each_token(position_ids: torch.Tensor) -> torch.Tensor:
    """[sequences, length] in; out, for each token, the number of its row in its sequence, as a row begins where positions do not go on."""
    return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def _causal_sum(logits: torch.Tensor, labels: torch.Tensor, kernels: Kernels = IN_CHUNKS) -> torch.Tensor:
    """Labels move to the left, not logits to the right: those of all but the last position would be a copy."""
    return cross_entropy_sum(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL), kernels)


def _class_logits(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The masks of models that are known are ready, so that transformers waits for no GPU to look at them."""
    config, mask = base_model(model).config, batch.attention_mask
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    if config.model_type in CLASSIFYING_DECODERS and getattr(config, "is_causal", True):  # whose rows end where the class is read off
        with _borders_known(packed=False):
            return model(input_ids=batch.input_ids, use_cache=False).logits
    known = config.model_type in CLASSIFYING_ENCODERS and not getattr(config, "is_decoder", False)
    if known and config._attn_implementation == "sdpa" and mask is not None:
        mask = mask.bool()[:, None, None, :]
    return model(input_ids=batch.input_ids, attention_mask=mask, **types).logits


TASKS = {
    "seq2seq": Task(transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", _seq2seq_logits, cross_entropy_sum),
    "causal": Task(transformers.AutoModelForCausalLM, "CAUSAL_LM", _causal_logits, _causal_sum),
    "classification": Task(transformers.AutoModelForSequenceClassification, "SEQ_CLS", _class_logits, cross_entropy_sum),
}


def check_packing(logits: Callable[[MicroBatch], torch.Tensor], batch: MicroBatch) -> None:
    """Raises DataError if a row's logits depend on the row that is packed in front of it. Every rank must call it: under ZeRO-3 a forward
    is a collective.

    The batch's first sequence is taken as two rows, whose border is in its middle, so that all ranks do the same whatever their rows are.
    The first one is given other tokens; the second must not notice, beyond bf16's rounding.
    """
    ids = batch.input_ids[:1]
    border = ids.shape[1] // 2
    place = torch.arange(ids.shape[1], device=ids.device)
    positions = torch.where(place < border, place, place - border)[None]
    changed = ids.clone()
    changed[:, :border] = changed.max() - changed[:, :border]
    with torch.no_grad():
        before, after = (logits(replace(batch, input_ids=one, position_ids=positions))[:, border:].float() for one in (ids, changed))
    if (before - after).abs().max() > 2e-2 * before.abs().max():
        raise DataError(
            "data.packing: this model lets a row see the rows packed in front of it. "
            "Write data.packing: false, or model.attn_implementation: sdpa"
        )


def waits_for_device(model: torch.nn.Module, task: str) -> bool:
    """Whether a forward reads values of tensors, for which the host waits; model: on the meta device, which has no values to read."""
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    labels = ids[:, 0] if task == "classification" else ids
    batch = MicroBatch(0, np.arange(2), ids, torch.ones_like(ids), labels, None, Work(), 0)
    try:
        with torch.no_grad():
            TASKS[task].logits(model, batch)
    except Exception as error:  # what else a model cannot do there, it may do on a GPU
        return ".item() cannot be called on meta" in str(error)
    return False


def base_model(model: torch.nn.Module) -> Any:
    """The transformers model under an engine or a LoRA wrapper."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
