"""Model FLOPs against torch's own count of what a forward and a backward do, and against the formula on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import recipe_of
from torch.utils.flop_counter import FlopCounterMode

from trainkit.planning.facts import DataFacts, Hardware, Matrices, ModelFacts
from trainkit.planning.flops import TrainingFlops, Work, mfu, peak_flops, training_flops, works
from trainkit.planning.planner import make_plan
from trainkit.recipe.zero import read_zero
from trainkit.training.model import _decoder_layers, _matrices, model_facts

SMALL = {
    "t5": transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0,
        dropout_rate=0,
    ),
    "gated-t5": transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0, dropout_rate=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
    "bart": transformers.BartConfig(
        d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=32, vocab_size=40, dropout=0, max_position_embeddings=512,
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40
    ),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64),
    "bert": transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40, max_position_embeddings=64
    ),
}  # fmt: skip


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = SMALL[kind]
    head = {"bert": transformers.AutoModelForMaskedLM}.get(
        kind, transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    return head.from_config(config, attn_implementation="eager").train()


def facts_of(model: torch.nn.Module, matrices: Matrices | None) -> ModelFacts:
    config = model.config
    layers = config.num_hidden_layers + _decoder_layers(config)
    return ModelFacts(config.model_type, (), 0, config.hidden_size, layers, config.vocab_size, "eager", matrices)


def task_of(model: torch.nn.Module) -> str:
    return "seq2seq" if model.config.is_encoder_decoder else "causal"


def planned(model: torch.nn.Module) -> TrainingFlops:
    flops = training_flops(facts_of(model, _matrices(model, model.config, task_of(model))))
    assert flops is not None
    return flops


LENGTHS = st.tuples(st.integers(0, 5000), st.integers(0, 5000))


@given(groups=st.lists(st.lists(LENGTHS, max_size=5), max_size=5))
def test_the_work_of_groups_is_the_sum_of_their_rows(groups: list[list[tuple[int, int]]]) -> None:
    lengths = np.array([row for group in groups for row in group], dtype=np.int64).reshape(-1, 2)
    found = works(lengths[:, 0], lengths[:, 1], np.array([len(group) for group in groups], dtype=np.int64))
    assert [Work(*row) for row in found.tolist()] == [sum((Work(s, t, s * s, t * t, s * t) for s, t in group), Work()) for group in groups]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(("source", "target"), [(7, 5), (32, 48)])
def test_a_row_costs_what_torch_counts(kind: str, source: int, target: int) -> None:
    model = model_of(kind)
    ids, labels = torch.randint(1, 40, (1, source)), torch.randint(1, 40, (1, target))
    with FlopCounterMode(display=False) as counted:
        if model.config.is_encoder_decoder:
            model(input_ids=ids, labels=labels).logits.float().sum().backward()
        else:
            model(input_ids=ids).logits.float().sum().backward()
    if not model.config.is_encoder_decoder:
        target = 0
    work = Work(source, target, source**2, target**2, source * target)
    assert planned(model).of(work) == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_the_formula_on_paper() -> None:
    """T5-large at 96 + 96 tokens: 302 M in 24 encoder layers and 50 M of cross-attention's keys and values on the source, 353 M in the
    decoder and 33 M in the head on the target; 3 × 24 attentions of 96 × 96 and width 1,024. Llama 1B: 6 × its 1,039 M and 12 L d s."""
    width, hidden, feed = 1024, 1024, 4096
    layer = 4 * hidden * width + 2 * hidden * feed
    source = 24 * (layer + 2 * hidden * width)
    target = 24 * (layer + 2 * hidden * width) + 32128 * hidden
    t5 = training_flops(ModelFacts("t5", (), 0, hidden, 48, 32128, "sdpa", Matrices(source, target, source, target, 24, width)))
    assert t5 is not None
    by_hand = 6 * 96 * (source + target) + 12 * width * 24 * 3 * 96**2
    assert t5.of(Work(96, 96, 96**2, 96**2, 96**2)) == by_hand == 432_978_001_920
    llama = training_flops(ModelFacts("llama", (), 0, 2048, 16, 32000, "sdpa", Matrices(1_038_614_528, 0, 1_038_614_528, 0, 0, 2048)))
    assert llama is not None
    assert llama.of(Work(4096, 0, 4096**2)) == 6 * 1_038_614_528 * 4096 + 12 * 16 * 2048 * 4096**2


def test_what_is_frozen_costs_no_gradient_of_its_own() -> None:
    trained = training_flops(ModelFacts("x", (), 0, 8, 1, 8, "sdpa", Matrices(100, 0, 100, 0, 0, 8)))
    frozen = training_flops(ModelFacts("x", (), 0, 8, 1, 8, "sdpa", Matrices(100, 0, 10, 0, 0, 8)))
    assert trained is not None and frozen is not None
    assert (trained.per_source_token, frozen.per_source_token) == (600, 420)


def test_experts_and_strange_layers_have_no_count() -> None:
    assert training_flops(facts_of(model_of("llama"), None)) is None
    experts = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=40,
        num_local_experts=4,
    )  # fmt: skip
    assert _matrices(transformers.AutoModelForCausalLM.from_config(experts), experts, "causal") is None
    model = model_of("llama")
    model.strange = torch.nn.Parameter(torch.zeros(64, 64))
    assert _matrices(model, model.config, task_of(model)) is None


SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
MISLEADING = {
    "shared layers": transformers.AlbertConfig(embedding_size=16, **SMALL_BERT),
    "disentangled attention": transformers.DebertaV2Config(**SMALL_BERT),
    "no attention": transformers.MambaConfig(hidden_size=256, num_hidden_layers=2, vocab_size=400, state_size=2),
    "a decoder that reads the source again": SMALL["bart"],
}


@pytest.mark.parametrize("why", MISLEADING)
def test_a_count_that_would_mislead_is_left_out_and_the_rest_is_planned(why: str, tmp_path: Path) -> None:
    MISLEADING[why].save_pretrained(tmp_path)
    task = "causal" if why == "no attention" else "classification"
    recipe = recipe_of(task, tmp_path, tmp_path, path="x")
    plan = make_plan(recipe, read_zero(recipe.zero), model_facts(recipe), DataFacts(100, None), Hardware("cuda", "NVIDIA H200", 140 << 30))
    assert plan.flops is None and plan.peak_flops == 989.4e12
    assert plan.memory is not None and plan.memory.device_total > 0 and plan.total_steps == 50


def test_models_that_decide_on_the_host_what_runs_are_known(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
    configs = {
        True: transformers.MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=2),
        False: transformers.LlamaConfig(**shape),
    }
    for decides, config in configs.items():
        config.save_pretrained(tmp_path / config.model_type)
        recipe = recipe_of("causal", tmp_path / config.model_type, tmp_path, path="x")
        assert model_facts(recipe).decides_on_host == decides
    bart = SMALL["bart"].to_dict()
    for rate in (0.0, 0.1):
        transformers.BartConfig(**bart | {"decoder_layerdrop": rate}).save_pretrained(tmp_path / "bart")
        assert model_facts(recipe_of("seq2seq", tmp_path / "bart", tmp_path, path="x")).decides_on_host == (rate > 0)


def test_a_module_that_peft_trains_a_copy_of_counts_once() -> None:
    model, settings = model_of("llama"), {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    alone = peft.get_peft_model(model, peft.LoraConfig(**settings))
    before = _matrices(alone.get_base_model(), model.config, "causal")
    model = model_of("llama")
    copied = peft.get_peft_model(model, peft.LoraConfig(**settings, modules_to_save=["lm_head"]))
    after = _matrices(copied.get_base_model(), model.config, "causal")
    assert before is not None and after is not None
    assert after.source == before.source and after.source_trained == before.source_trained + 16 * 40


def test_a_peak_is_named_only_where_it_is_one() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bf16") == 311.9e12
    assert (peak_flops("NVIDIA L4", "bf16"), peak_flops("NVIDIA L40S", "fp16")) == (121.0e12, 362.1e12)
    for name in ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA RTX A400", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 D",
                 "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):  # fmt: skip
        assert peak_flops(name, "bf16") is None, name
    assert peak_flops("NVIDIA H200", "fp32") is peak_flops("CPU", "bf16") is peak_flops("GPU", "bf16") is None
    assert mfu(500.0, 2.0, 5, 100.0) == 0.5 and mfu(1.0, 1.0, 1, None) is None
