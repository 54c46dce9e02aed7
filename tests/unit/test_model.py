from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from trainkit.data.arrays import Selection
from trainkit.data.batches import Shape
from trainkit.data.padding import MicroBatch, Padding
from trainkit.data.wire import WireMicroBatch
from trainkit.errors import DataError
from trainkit.planning.flops import Work
from trainkit.recipe.schema import Recipe
from trainkit.training.model import build_model, load_config, model_facts, write_first_weights
from trainkit.training.tasks import CLASSIFYING_DECODERS, CLASSIFYING_ENCODERS, TASKS, check_packing

T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = BERT | {"num_key_value_heads": 2}


def whole(parameter: torch.nn.Parameter) -> Any:
    return contextlib.nullcontext(True)


def recipe_of(folder: Path, task: str, **model: Any) -> Recipe:
    keys: dict[str, Any] = {"path": str(folder), "task": task, "weights": "random", "precision": "fp32"} | model
    sections = {"batch": {"samples": 4}, "optimizer": {"lr": 1e-3}, "train": {"max_steps": 1, "seed": 7}}
    return Recipe.model_validate({"name": "x", "model": keys, "data": {"path": "x"}, **sections})


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    transformers.T5Config(**T5, dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_random_weights_are_the_same_bits_each_time_and_fill_the_model(t5: Path, tmp_path: Path) -> None:
    recipe = recipe_of(t5, "seq2seq")
    first, again = write_first_weights(recipe, tmp_path / "a.safetensors"), write_first_weights(recipe, tmp_path / "b.safetensors")
    assert first is not None and again is not None and first.read_bytes() == again.read_bytes()
    torch.manual_seed(99)  # what a rank has drawn before does not matter
    model = build_model(recipe, str(first), whole)
    weights = load_file(first)
    assert {name for name, _ in model.named_parameters()} == set(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert model.training


def test_a_missing_head_is_drawn_once_and_the_rest_stays_pretrained(bert: Path, tmp_path: Path) -> None:
    recipe = recipe_of(bert, "classification", weights="pretrained")
    path = write_first_weights(recipe, tmp_path / "head.safetensors", ["no", "yes", "maybe"])
    assert path is not None and set(load_file(path)) == {"classifier.weight", "classifier.bias"}
    models = [build_model(recipe, str(path), whole, ["no", "yes", "maybe"]) for _ in range(2)]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight) and models[0].config.id2label[2] == "maybe"
    stored = load_file(bert / "model.safetensors")
    assert torch.equal(models[0].bert.embeddings.word_embeddings.weight, stored["embeddings.word_embeddings.weight"])


def test_a_complete_checkpoint_needs_no_drawing(llama: Path, tmp_path: Path) -> None:
    assert write_first_weights(recipe_of(llama, "causal", weights="pretrained"), tmp_path / "none.safetensors") is None


def test_lora_draws_its_matrices_and_freezes_the_base(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(llama, "causal", weights="pretrained", lora={"r": 2, "lora_alpha": 4})
    path = write_first_weights(recipe, tmp_path / "lora.safetensors")
    assert path is not None
    model = build_model(recipe, str(path), whole)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(load_file(path)) and all("lora_" in name for name in trained)
    facts = model_facts(recipe)
    assert facts.num_trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind, task", [("t5", "seq2seq"), ("bert", "classification"), ("llama", "causal")])
def test_facts_from_the_meta_device_are_those_of_the_built_model(kind: str, task: str, request: pytest.FixtureRequest) -> None:
    recipe = recipe_of(request.getfixturevalue(kind), task)
    model, facts = build_model(recipe, None, whole), model_facts(recipe)
    assert [(p.name, p.numel, p.trainable) for p in facts.parameters] == [
        (n, p.numel(), p.requires_grad) for n, p in model.named_parameters()
    ]
    assert facts.num_layers == (4 if kind == "t5" else 2) and facts.hidden_size == 16 and facts.vocab_size == 64
    assert not any(p.any() for p in model.parameters())  # nobody draws what a checkpoint will overwrite, and nothing in it is NaN


def test_a_folder_without_a_model_and_a_task_without_a_head_are_named(bert: Path, t5: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no transformers config"):
        load_config(recipe_of(tmp_path, "causal"))
    with pytest.raises(DataError, match=r"seq2seq.*bert"):
        load_config(recipe_of(bert, "seq2seq"))
    with pytest.raises(DataError, match="weights: random"):
        write_first_weights(recipe_of(t5, "seq2seq", weights="pretrained"), tmp_path / "x")


def test_modules_to_save_that_are_not_there_are_named(llama: Path) -> None:
    recipe = recipe_of(llama, "causal", lora={"r": 2, "modules_to_save": ["lm_head", "lm_tail"]})
    with pytest.raises(DataError, match=r"modules_to_save: .* has no module lm_tail$"):
        model_facts(recipe)


@pytest.mark.parametrize(("kind", "task"), [("t5", "seq2seq"), ("llama", "causal"), ("bert", "classification")])
def test_the_sum_over_its_labels_is_the_loss_that_transformers_computes(
    kind: str, task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On one batch their mean over the labels is right; it is the mean of such means over batches that is not."""
    recipe, names = recipe_of(request.getfixturevalue(kind), task), ["a", "b", "c"]
    model = build_model(recipe, str(write_first_weights(recipe, tmp_path / "first", names)), whole, names).eval()
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 64, (4, 9), generator=generator), torch.ones(4, 9, dtype=torch.long)
    mask[1, 6:] = 0
    labels = torch.tensor([2, 0, 1, 1]) if task == "classification" else ids.masked_fill(mask == 0, -100)
    counted = (labels[:, 1:] if task == "causal" else labels) != -100
    batch = MicroBatch(0, np.arange(4), ids, mask, labels, None, Work(), 0)
    with torch.no_grad():
        ours = TASKS[task].sum_loss(TASKS[task].logits(model, batch), labels) / counted.sum()
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


class HostReads(TorchDispatchMode):
    """Which operations meanwhile brought values of tensors to Python: there a host waits for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique_consecutive"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ENCODERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["t5", "umt5", "bart", "marian", "mbart", "pegasus", "plbart"])
def test_seq2seq_logits_are_those_of_transformers_own_mask(kind: str, attention: str) -> None:
    shape = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2} if "t5" in kind else ENCODERS
    ids = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **ids, **shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention).eval()
    source, labels, mask = torch.randint(3, 64, (3, 16)), torch.randint(3, 64, (3, 8)), torch.ones(3, 16, dtype=torch.long)
    mask[1, 9:], mask[2, 1:] = 0, 0
    batch = MicroBatch(0, np.arange(3), source, mask, labels, None, Work(), 0)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        theirs = model(input_ids=source, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
        with HostReads() as reads:
            ours = TASKS["seq2seq"].logits(model, batch)
    has_other_kernel = attention == "sdpa" and "t5" not in kind  # a decoder's mask instead of is_causal
    assert torch.allclose(ours, theirs, atol=1e-6) if has_other_kernel else torch.equal(ours, theirs)
    assert not reads.seen


def test_no_mask_is_made_while_a_graph_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.17 writes one, of all positions."""
    skips = masking_utils._ignore_causal_mask_sdpa
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *asked: not masking_utils.is_tracing(asked[0]) and skips(*asked))
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*tensors: torch.Tensor, **keys: Any) -> torch.Tensor:
        masks.append(keys["attn_mask"])
        return attention(*tensors, **keys)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    ids = torch.arange(12).view(2, 6)
    batch = MicroBatch(0, np.arange(2), ids, torch.ones_like(ids), ids, None, Work(), 0)
    TASKS["causal"].logits(model, batch)
    model(input_ids=ids)
    assert masks[:2] == [None, None], "ours"
    assert len(masks) == 4 and masks[2] is not None, "transformers alone"


MASKED_ANYWAY = "gemma2"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2", "gemma2", "mistral"])
def test_padding_at_the_right_needs_no_mask(kind: str) -> None:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "head_dim": 8,
        "num_key_value_heads": 2,
    }
    names = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32,
             "num_hidden_layers": 2, "num_attention_heads": 2}}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, pad_token_id=None, **names.get(kind, shape))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, mask = torch.randint(3, 64, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:], mask[2, 1:] = 0, 0
    batch = MicroBatch(0, np.arange(3), ids.masked_fill(mask == 0, 0), mask, ids, None, Work(), 0)
    with torch.no_grad():
        with HostReads() as theirs_reads:
            theirs = model(input_ids=batch.input_ids, attention_mask=mask).logits
        with HostReads() as reads:
            ours = TASKS["causal"].logits(model, batch)
    assert torch.allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)
    assert not reads.seen and (theirs_reads.seen or kind in MASKED_ANYWAY)


OTHER_WAY = {"is_decoder": True, "is_causal": False}  # than models of the kind attend by default


@pytest.mark.parametrize("config", [{}, OTHER_WAY], ids=["as usual", "the other way"])
@pytest.mark.parametrize("kind", [*CLASSIFYING_ENCODERS, *CLASSIFYING_DECODERS, "mpnet", "modernbert", "gpt2"])
def test_classes_are_those_of_transformers_own_mask(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """No read of the host in those that are known; the others get the mask that they know. The plan knows which are which."""
    shape = BERT | {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3}
    names: dict[str, dict[str, Any]] = {
        "albert": {"embedding_size": 16},
        "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
        "electra": {"embedding_size": 16},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    }
    decoder = {"num_key_value_heads": 2, "head_dim": 8} if kind in CLASSIFYING_DECODERS else {}
    made = transformers.AutoConfig.for_model(kind, **shape | names.get(kind, {}) | decoder | config)
    made.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(made).eval()
    ids, mask = torch.randint(3, 64, (3, 24)), torch.ones(3, 24, dtype=torch.long)
    mask[1, 7:], mask[2, 2:] = 0, 0
    batch = MicroBatch(0, np.arange(3), ids.masked_fill(mask == 0, 0), mask, torch.arange(3), None, Work(), 0)
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=mask).logits
        with HostReads() as reads:
            ours = TASKS["classification"].logits(model, batch)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert bool(reads.seen) == model_facts(recipe_of(tmp_path, "classification")).waits_for_device
    assert config or bool(reads.seen) == (kind in ("mpnet", "modernbert", "gpt2"))


@pytest.mark.parametrize(
    ("config", "waits"),
    [
        (transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, pad_token_id=0), True),
        (transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64), False),
        (transformers.LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), True),
        (transformers.LlamaConfig(**LLAMA), False),
    ],
)
def test_the_plan_knows_which_models_wait_for_the_gpu(config: Any, waits: bool, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert model_facts(recipe_of(tmp_path, "causal")).waits_for_device == waits


def packed(first: list[int], second: list[int]) -> MicroBatch:
    row = np.array([*first, *second])
    columns = dict.fromkeys(("input_ids", "labels"), Selection.of(row, np.array([len(first), len(second)])))
    return Padding("causal", pad_id=0, eos_id=1).micro_batch(
        WireMicroBatch(0, Shape(1, len(row) + 2, 0), np.arange(2), columns, Work(), np.array([2]))
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(llama: Path, tmp_path: Path, attention: str) -> None:
    recipe = recipe_of(llama, "causal", attn_implementation=attention)
    model = build_model(recipe, str(write_first_weights(recipe, tmp_path / "first")), whole).eval()
    batch = packed([5, 6, 7], [8, 9, 10, 11])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[8, 9, 10, 11]])).logits[0]
        with HostReads() as reads:
            together = TASKS["causal"].logits(model, batch)[0, 3:7]
    assert torch.allclose(alone, together, atol=1e-5) and not reads.seen
    check_packing(partial(TASKS["causal"].logits, model), batch)


def test_a_model_that_mixes_packed_rows_is_refused(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(llama, "causal")
    model = build_model(recipe, str(write_first_weights(recipe, tmp_path / "first")), whole).eval()

    def mixing(batch: MicroBatch) -> torch.Tensor:
        return model(input_ids=batch.input_ids).logits

    with pytest.raises(DataError, match="packed in front"):
        check_packing(mixing, packed([5, 6, 7], [8, 9, 10, 11]))
    one_row = replace(packed([5, 6, 7], [8, 9, 10, 11]), position_ids=torch.arange(9)[None])
    with pytest.raises(DataError, match="packed in front"):  # the fullest sequence comes first, which may be a single row
        check_packing(mixing, one_row)


@pytest.mark.parametrize("ids", [{}, {"pad_token_id": 5, "eos_token_id": 1}, {"eos_token_id": [1, 2]}])
def test_a_class_does_not_depend_on_the_padding(ids: dict[str, Any], tmp_path: Path) -> None:
    """A decoder's is read at the last token that is not what the tokenizer pads with, whatever its config says."""
    transformers.LlamaConfig(**LLAMA | {"vocab_size": 300}, **ids).save_pretrained(tmp_path)
    tiny_tokenizers.make(tmp_path)
    recipe = recipe_of(tmp_path, "classification")
    config = load_config(recipe, ["no", "yes"])
    assert config.pad_token_id == tiny_tokenizers.PAD
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    rows = Selection.of(np.array([7, 8, 1, 9, 10, 11, 12]), np.array([3, 4]))
    columns = {"input_ids": rows, "labels": Selection.of(np.array([0, 1]), np.ones(2, np.int64))}
    logits = []
    for width in (8, 16, 24):
        wire = WireMicroBatch(0, Shape(2, width, 0), np.arange(2), columns, Work())
        with torch.no_grad():
            logits.append(TASKS["classification"].logits(model, Padding("classification", tiny_tokenizers.PAD, eos_id=1).micro_batch(wire)))
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2])
    alone = model(input_ids=torch.tensor([[7, 8, 1]])).logits
    torch.testing.assert_close(logits[0][:1], alone)


def test_a_pad_token_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    tiny_tokenizers.make(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[of its own]"})
    tokenizer.save_pretrained(tmp_path)
    transformers.LlamaConfig(**LLAMA | {"vocab_size": known}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"pads with token {known}, and the model knows {known} tokens"):
        load_config(recipe_of(tmp_path, "classification"))


def test_the_text_half_of_a_model_is_told_of_the_padding(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = transformers.Gemma3TextConfig(**shape, head_dim=16, vocab_size=300, pad_token_id=9)
    transformers.Gemma3Config(text_config=text.to_dict()).save_pretrained(tmp_path)
    tiny_tokenizers.make(tmp_path)
    config = load_config(recipe_of(tmp_path, "classification"))
    assert config.get_text_config().pad_token_id == config.pad_token_id == tiny_tokenizers.PAD != 9


def test_a_plan_of_a_classifier_needs_no_tokenizer(tmp_path: Path) -> None:
    transformers.LlamaConfig(**LLAMA, eos_token_id=[2, 3]).save_pretrained(tmp_path)
    assert model_facts(recipe_of(tmp_path, "classification")).model_type == "llama"


def test_models_whose_flops_would_be_wrong_have_none(tmp_path: Path) -> None:
    shape = LLAMA | {"head_dim": 4, "query_pre_attn_scalar": 4}
    half = transformers.T5GemmaModuleConfig(**shape)
    transformers.T5GemmaConfig(encoder=half, decoder=half, vocab_size=64).save_pretrained(tmp_path / "nested")
    facts = model_facts(recipe_of(tmp_path / "nested", "seq2seq"))
    assert facts.matrices is None and facts.num_layers == 4
    transformers.MistralConfig(**LLAMA, sliding_window=64).save_pretrained(tmp_path / "window")
    for length, known in ((64, True), (65, False)):
        recipe = recipe_of(tmp_path / "window", "causal")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
        assert (model_facts(recipe).matrices is not None) == known
