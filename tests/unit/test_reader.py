"""Recipes, strictly read: every fault at once, each with file, line and what to write instead; nothing is ignored or repaired."""

from __future__ import annotations

import re
import shlex
import stat
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import RecipeError
from trainkit.recipe.document import Document, Place
from trainkit.recipe.fields import accepts, all_keys, field_of
from trainkit.recipe.habits import _SAME_VALUE, habit_answer
from trainkit.recipe.reader import read_recipe, read_values, recipe_to_yaml

ROOT = Path(__file__).parents[2]
SEQ2SEQ = """\
model:
  path: google-t5/t5-small
  task: seq2seq
data:
  path: some/set
  source: "{question}"
  target: "{sql}"
batch:
  samples: 96
optimizer:
  lr: 1e-4
train:
  epochs: 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes and, beside it, the working directory."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "recipes"


def write(folder: Path, text: str = SEQ2SEQ, name: str = "wish.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    return [str(fault).replace(f"{path.parent}/", "") for fault in caught.value.faults]


def test_the_smallest_recipe_gets_its_defaults(folder: Path) -> None:
    recipe = read_recipe(write(folder))
    assert recipe.name == "wish" and recipe.optimizer.lr == 1e-4 and recipe.scaling.num_workers == 1
    assert recipe.model.path == "google-t5/t5-small" and recipe.data.path == "some/set"
    assert recipe.run.storage_path == str(folder.parent / "work" / "runs")


def test_a_path_into_a_folder_that_is_closed_to_this_user_is_no_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_file(path: Path) -> bool:
        if path.name == "t5-small":
            raise PermissionError(13, "Permission denied", str(path))
        return stat.S_ISREG(path.stat().st_mode) if path.exists() else False

    monkeypatch.setattr(Path, "is_file", is_file)
    (found,) = faults(write(folder))
    assert "wish.yaml:2: model.path:" in found and "google-t5/t5-small cannot be read: permission denied" in found


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_shipped_recipe_reads_and_survives_writing(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    written = tmp_path / "again.yaml"
    written.write_text(recipe_to_yaml(recipe))
    assert read_recipe(written) == recipe


@given(
    st.text(min_size=1).filter(lambda text: text.strip()),
    st.floats(1e-12, 1, exclude_min=True),
    st.sampled_from(["no", "1e-4", "0x1", "~", "null", "2024-01-01", "<<"]),
)
def test_writing_and_reading_keeps_every_text_and_number(tmp_path_factory: pytest.TempPathFactory, text: str, lr: float, word: str) -> None:
    folder = tmp_path_factory.mktemp("round")
    base = read_recipe(write(folder))
    data = base.data.model_copy(update={"name": text, "revision": word})
    recipe = base.model_copy(update={"data": data, "optimizer": base.optimizer.model_copy(update={"lr": lr})})
    again = folder / "again.yaml"
    again.write_bytes(recipe_to_yaml(recipe).encode("utf-8", "surrogatepass"))
    assert read_recipe(again) == recipe


def test_every_fault_comes_at_once_in_the_order_of_lines(folder: Path) -> None:
    path = write(
        folder,
        """\
        model:
          path: m
          task: seq2sec
          precison: bf16
        data:
          path: d
          packing: no
          packing: true
        batch: {samples: many}
        optimizer: {lr: "1e-4", betas: [0.9]}
        train: {eval_steps: 1.5, metrics: [rogue]}
        """,
    )
    found = faults(path)
    assert found == [
        'wish.yaml:3: model.task: expected seq2seq, causal or classification, given "seq2sec" (did you mean seq2seq?)',
        "wish.yaml:4: model.precison: unknown key (did you mean model.precision?)",
        'wish.yaml:7: data.packing: expected true or false, given "no": write true or false',
        "wish.yaml:8: data.packing: stands twice (first on line 7): keep one",
        'wish.yaml:9: batch.samples: expected a whole number above 0 and of at most 2147483648, given "many"',
        'wish.yaml:10: optimizer.lr: expected a number above 0, given the text "1e-4": write it without quotes',
        "wish.yaml:10: optimizer.betas: expected a list of exactly 2 (a number of at least 0 and below 1 each), given [0.9]",
        "wish.yaml:11: train.eval_steps: expected epoch or a whole number above 0 or a number above 0 and below 1, given 1.5",
        "wish.yaml:11: train: how long? write train.epochs: 3 (passes over the rows) or train.max_steps: 1000 (optimizer steps)",
        "wish.yaml:11: train.metrics: unknown metric rogue (did you mean rouge?)",
        "wish.yaml:11: train.metrics: need rows to evaluate on: write data.eval (a split, a file or a held-out fraction such as 0.02)",
    ]


def test_missing_keys_say_what_they_are(folder: Path) -> None:
    found = faults(write(folder, "model:\n  task: causal\ndata:\n  target: '{t}'\n"))
    assert {line.split(": ")[1] for line in found} == {"model.path", "data.path", "batch.samples", "optimizer.lr", "train"}
    assert "wish.yaml:1: model.path: is missing: a hub id or a local folder" in "\n".join(found)


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1.0e-4", 1e-4), (".5", 0.5), ("1E-3", 1e-3), ("3", 3), ("+2.5e-1", 0.25)])
def test_numbers_are_those_of_yaml_1_2(folder: Path, text: str, value: float) -> None:
    assert read_recipe(write(folder, SEQ2SEQ.replace("1e-4", text))).optimizer.lr == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "Yes", "NO"])
def test_no_and_yes_stay_text(folder: Path, word: str) -> None:
    assert read_recipe(write(folder), [f"data.train={word}"]).data.train == word
    assert "write true or false" in faults(write(folder), f"scaling.use_gpu={word}")[0]


@pytest.mark.parametrize("number", [".inf", ".nan", "-1", "0", "true", "null"])
def test_a_learning_rate_is_a_finite_positive_number(folder: Path, number: str) -> None:
    (fault,) = faults(write(folder, SEQ2SEQ.replace("1e-4", number)))
    assert fault.startswith("wish.yaml:11: optimizer.lr: ")


@pytest.mark.parametrize(
    "change, said",
    [
        (["train.epochs=null"], "how long?"),
        (["batch.tokens_per_device=4096", "batch.samples_per_device=8"], "stands together with batch.samples_per_device"),
        (["data.max_length=128"], "only for causal and classification; model.task is seq2seq: write data.max_source_length"),
        (["model.task=causal", "data.max_source_length=9"], "only for seq2seq; model.task is causal: write data.max_length"),
        (["data.messages=chat", "data.source=null", "data.target=null"], "only for causal"),
        (["model.task=causal", "data.messages=chat"], "stands together with source or target"),
        (
            ["model.task=classification", "data.target=null"],
            "classification needs source (the text) and target (the label column); missing: data.target",
        ),
        (["data.target=null"], "seq2seq needs source and target together; missing: data.target"),
        (["data.source=null"], "seq2seq needs source and target together; missing: data.source"),
        (["model.task=causal", "data.target=null"], "causal needs target beside source"),
        (["data.source=['{a}', '{b}']"], "only for classification"),
        (["model.task=classification", "data.source=['{a}']"], "exactly two templates, given 1"),
        (["data.packing=true"], "only for causal"),
        (["batch.joint_shapes=true", "model.task=causal", "data.packing=true"], "not with data.packing"),
        (["model.compile=blocks", "train.deterministic=true"], "another kernel each time"),
        (["model.gradient_checkpointing=selective", "model.compile=false"], "compiled blocks, and model.compile: false has none"),
        (["model.gradient_checkpointing=selective", "train.deterministic=true"], "train.deterministic: true has none"),
        (["data.packing=true", "model.task=causal", "model.attn_implementation=flash_attention_2"], "write sdpa or eager"),
        (["scaling.num_workers=[4, 1]"], "write the fewest and the most workers"),
        (["scaling.num_workers=[4]"], "write the fewest and the most workers"),
        (["scaling.num_workers=[1, 4]", "scaling.label_selector=[{zone: a}]"], "write one mapping"),
        (["model.precision=fp16", "scaling.use_gpu=false"], "no fp16 training on a CPU"),
        (["train.metrics=[exact_mach]", "data.eval=0.1"], "did you mean exact_match?"),
        (
            ["train.metrics=[accuracy]", "data.eval=0.1"],
            "accuracy is for classification; model.task is seq2seq, which has exact_match, rouge",
        ),
        (["train.metrics=[rouge]"], "write data.eval"),
        (["train.metric_for_best_model=rouge1", "data.eval=0.1"], "add its metric to train.metrics"),
        (["train.metric_for_best_model=eval_loss", "data.eval=0.1"], "write loss"),
        (["train.metric_for_best_model=loss"], "write data.eval"),
        (["train.load_best_model_at_end=true", "data.eval=0.1"], "needs train.metric_for_best_model"),
        (["train.early_stopping_patience=3", "data.eval=0.1"], "needs train.metric_for_best_model"),
        (["name=../x"], "cannot name a run folder"),
        (["name=.x"], "cannot name a run folder"),
        (["name=a b"], "cannot name a run folder"),
        (["zero=3"], "write zero: zero3"),
        (["zero=true"], "given true: write zero: zero3 (or"),
        (["zero=false"], "given false: write zero: zero0"),
        (["model.lora.rank=4"], "write model.lora.r: 4"),
        (["run=!!python/object:os.system {}"], "the tag tag:yaml.org,2002:python/object:os.system is not read"),
        (["batch.samples=!!int abc"], "batch.samples: int cannot be read from 'abc'"),
        (["zero=zero3_offlod"], "did you mean zero3_offload?"),
        (["data.path=[]"], "data.path"),
        (["data.source=question"], 'data.source: "question" names no column and would be the same in every row: did you mean {question}?'),
        (["data.source='to SQL:'"], "write a column in braces, for example {question}"),
        (["data.target='{{sql}}'"], "names no column"),
        (["data.source='{zz'"], "data.source: '{zz': '{' is no column in braces"),
        (["model.task=classification", "data.target='{a} {b}'"], "data.target: '{a} {b}': name one column"),
        (["data.name=a", "data.path=."], "belongs to a set of the hub, and data.path is on this machine: leave it out"),
        (["data.revision=main", "data.path=[a.jsonl]"], "belongs to a set of the hub"),
        (["model.revision=main", "model.path=."], "belongs to a model of the hub, and model.path is on this machine: leave it out"),
        (["train.seed=9223372036854775808"], "expected a whole number of at least 0 and below 9223372036854775808"),
        (["batch.samples=2147483649"], "expected a whole number above 0 and of at most 2147483648"),
        (["optimizer.warmup_steps=11", "train.max_steps=10"], "11 steps of warm-up do not end within train.max_steps: 10"),
        (["scaling.use_gpu=false", "scaling.resources_per_worker={GPU: 1}"], "GPU: 1 beside scaling.use_gpu: false"),
        (["scaling.resources_per_worker={GPU: 0}"], "GPU: 0 beside scaling.use_gpu: true"),
        (["scaling.resources_per_worker={cpu: 1}"], "Ray knows no cpu (did you mean CPU?)"),
    ],
)
def test_keys_that_do_not_fit_each_other(folder: Path, change: list[str], said: str) -> None:
    (fault,) = faults(write(folder), *change)
    assert said in fault


@pytest.mark.parametrize(
    "change",
    [
        ["train.max_steps=10", "train.epochs=null"],
        ["batch.samples_per_device=8"],
        ["data.source=null", "data.target=null"],
        ["model.task=causal", "data.source=null"],
        ["model.task=causal", "data.source=null", "data.target=null", "data.messages=chat"],
        [
            "model.task=causal",
            "data.source=null",
            "data.target=null",
            "data.messages=[{role: system, content: brief}, {role: assistant, content: '{a}'}]",
        ],
        ["model.task=classification", "data.source=['{a}', '{b}']", "data.max_length=9"],
        [
            "train.metrics=[rouge, exact_match]",
            "train.metric_for_best_model=rougeL",
            "data.eval=validation",
            "train.load_best_model_at_end=true",
        ],
        ["train.metric_for_best_model=loss", "data.eval=0.1", "train.early_stopping_patience=2"],
        ["optimizer.warmup_steps=0.1", "train.eval_steps=0.25", "train.save_steps=100"],
        ["scaling.resources_per_worker={CPU: 0.5}"],
        ["scaling.use_gpu=false", "scaling.resources_per_worker={GPU: 0, my_label: 1}"],
        ["optimizer.warmup_steps=10", "train.max_steps=10"],
        ["data.name=a", "data.revision=main"],
        ["train.seed=9223372036854775807", "batch.samples=2147483648"],
        ["model.lora.r=4"],
        ["run=null", "scaling="],
    ],
)
def test_keys_that_fit(folder: Path, change: list[str]) -> None:
    read_recipe(write(folder), change)


MESSAGES = """\
  messages:
    - {role: user, content: "{q}"}
"""
CHAT = SEQ2SEQ.replace("seq2seq", "causal").replace('  source: "{question}"\n  target: "{sql}"\n', MESSAGES)


@pytest.mark.parametrize(
    "turn, said",
    [
        ("{role: assistants, content: '{a}'}", '8: data.messages.1.role: expected system, user or assistant, given "assistants" (did'),
        ("{role: assistant, contents: '{a}'}", "8: data.messages.1.contents: unknown key (did you mean data.messages.1.content?)"),
        ("{role: assistant}", "8: data.messages.1.content: is missing: what is said, with columns in braces"),
        ("{role: assistant, content: 3}", "8: data.messages.1.content: expected text, given 3"),
        ("{role: assistant, content: '{a'}", "8: data.messages.1.content: '{a': '{' is no column in braces"),
        ("{role: assistant, content: answer}", '8: data.messages.1.content: "answer" names no column'),
        ("{role: system, content: brief}", "6: data.messages: has no turn of the assistant, whose words are learned"),
        ("answer", '8: data.messages.1: expected a mapping of role, content, given "answer"'),
    ],
)
def test_a_fault_in_a_turn_names_its_line(folder: Path, turn: str, said: str) -> None:
    found = faults(write(folder, CHAT.replace("batch:", f"    - {turn}\nbatch:", 1)))
    assert any(fault.startswith(f"wish.yaml:{said}") for fault in found) and len(found) == 1 + ("contents" in turn)


def test_faults_of_all_turns_come_at_once(folder: Path) -> None:
    found = faults(write(folder, CHAT.replace("user", "usr") + "name: ../x\n"))
    assert [line.split(": ")[1] for line in found] == ["data.messages.0.role", "name"]
    assert "data.messages: is an empty list" in faults(write(folder, CHAT.replace(MESSAGES, "  messages: []\n")))[0]


def test_the_batch_of_another_tool_is_one_number(folder: Path) -> None:
    text = (
        SEQ2SEQ.replace("  samples: 96\n", "  per_device_train_batch_size: 8\n  gradient_accumulation_steps: 4\n")
        + "scaling: {num_workers: 3}\n"
    )
    found = faults(write(folder, text))
    assert len(found) == 2 and all("write batch.samples: 96 " in line for line in found)
    assert "write batch.samples: 96 " in faults(write(folder, SEQ2SEQ + "per_device_train_batch_size: 96\n"))[0]


@pytest.mark.parametrize(
    "line, answer",
    [
        ("learning_rate: 3e-5", "write optimizer.lr: 3e-05"),
        ("num_train_epochs: 3", "write train.epochs: 3"),
        ("bf16: true", "write model.precision: bf16"),
        ("fp16: true", "write model.precision: fp16"),
        ("torch_dtype: bfloat16", "write model.precision: bf16"),
        ("torch_compile: true", "write model.compile: blocks"),
        ("dtype: float32", "write model.precision: fp32"),
        ("deepspeed: ds.json", "write zero: ds.json"),
        ("warmup_ratio: 0.03", "write optimizer.warmup_steps: 0.03"),
        ("sequence_len: 512", "write data.max_source_length: 512"),
        ("cutoff_len: 512", "write data.max_source_length: 512"),
        ("model_name_or_path: t5-small", "write model.path: t5-small"),
        ("trust_remote_code: true", "never runs code"),
        ("lora_r: 8", "write model.lora.r: 8"),
        ("adam_beta2: 0.95", "write optimizer.betas: [0.9, 0.95]"),
        ("eval_strategy: epoch", "write train.eval_steps: epoch"),
        ("eval_strategy: no", "write data.eval: null"),
        ("save_strategy: 'no'", "a run always keeps checkpoints"),
        ("load_in_4bit: true", "not available"),
        ("zero_stage: 2", "write zero: zero2"),
        ("optim: adafactor", "write optimizer.name: adamw"),
        ("max_samples: 100", "train[:1000]"),
        ("train_batch_size: 96", "write batch.samples: 96"),
        ("val_set_size: 0", "write data.eval: null"),
        ("val_set_size: 100", "write data.eval: text or a number above 0 and below 1 or null, not 100"),
        ("flash_attention: false", "write model.attn_implementation: null"),
        ("lr_scheduler: cosine_with_restarts", 'write optimizer.lr_scheduler_type: linear, cosine or constant, not "cosine_with_restarts"'),
        ("max_train_steps: -1", "leave it out"),
        ("gradient_clipping: null", "write optimizer.max_grad_norm: 0"),
        ("lora_alpha: 16.0", "write model.lora.lora_alpha: 16"),
        ("num_gpus: auto", 'not "auto"'),
        ("zero_stage: '2'", "write zero: zero2"),
        ("zero_stage: true", "write zero: zero0, zero1, zero2 or zero3"),
        ("deepspeed: 3", "write zero: zero3"),
        ("bf16: 'true'", "write model.precision: bf16"),
        ("train_file: 'a b.jsonl'", 'write data.train: "a b.jsonl"'),
        ("dataset_config_name: '2016'", 'write data.name: "2016"'),
        ("seed: 1", "did you mean train.seed?"),
        ("frobnicate: 1", "known here: name, model"),
    ],
)
def test_habits_from_other_tools_get_their_answer(folder: Path, line: str, answer: str) -> None:
    (fault,) = faults(write(folder, SEQ2SEQ + line + "\n"))
    assert fault.startswith("wish.yaml:14: ") and answer in fault
    (fault,) = faults(write(folder, SEQ2SEQ.replace("train:\n", f"train:\n  {line}\n") if "seed" not in line else SEQ2SEQ + line + "\n"))
    assert answer in fault or "known here: epochs" in fault


def test_a_habit_answers_for_the_key_that_is_missing(folder: Path) -> None:
    (fault,) = faults(write(folder, SEQ2SEQ.replace("lr: 1e-4", "learning_rate: 1e-4")))
    assert "write optimizer.lr: 0.0001" in fault


def test_answers_name_keys_that_exist() -> None:
    for target in _SAME_VALUE.values():
        assert target in all_keys() and field_of(tuple(target.split("."))) is not None


STRANGE = (
    True, False, None, -1, 0, 1, 2, 0.5, 2.0, 1e-5, "auto", "no", "2",
    "true", "null", "a b", "x: y", "~", "[a]", "{a}", "é", "a#b", "", [], {}, "cosine", "fp16", "adamw_torch",
)  # fmt: skip


@pytest.mark.parametrize("name", [*_SAME_VALUE, "zero_stage", "bf16", "torch_dtype", "max_seq_length", "adam_beta1", "optim", "adapter"])
def test_the_line_that_an_answer_names_is_taken(folder: Path, name: str) -> None:
    """Of whatever stood there; and it then is what was meant, or the answer names no value."""
    answered = 0
    for value in STRANGE:
        wish = Document("wish.yaml", {name: value}, {(name,): Place("wish.yaml", 1)})
        answer = habit_answer(wish, (name,))
        assert answer is not None
        line = re.fullmatch(r"write ([a-z_.]+): (.*)", answer)
        if line and ", not " not in answer and " or " not in answer:
            answered += 1
            field, file = field_of(tuple(line[1].split("."))), write(folder, f"value: {line[2]}\n")
            assert field is not None and accepts(field, read_values(file)["value"]), answer
    assert answered


def test_what_yaml_would_leave_out_of_a_change_is_asked_for_in_quotes(folder: Path) -> None:
    path = write(folder)
    assert faults(path, "data.source={question} # {table}") == [
        "--set data.source={question} # {table}: data.source: in YAML # {table} is a comment: quote it, "
        """--set 'data.source="{question} # {table}"'"""
    ]
    assert "is a comment" in faults(path, "model.path=#mine")[0]
    (fault,) = faults(path, "data.source='{question}' # c")
    *_, given = shlex.split(fault.partition("quote it, ")[2])
    assert read_recipe(path, [given]).data.source == "'{question}' # c"
    assert read_recipe(path, ['data.source="{question} # {table}"']).data.source == "{question} # {table}"
    assert read_recipe(path, ["data.source=ask#{question}"]).data.source == "ask#{question}"


def test_a_template_without_quotes_is_told_of_them(folder: Path) -> None:
    path = write(folder)
    assert faults(path, "data.target={text}")[0].endswith(
        """in YAML a brace begins a mapping: quote it, "{text}", and for the shell as well: --set 'data.target="{text}"'"""
    )
    unquoted = write(folder, SEQ2SEQ.replace('"{sql}"', "{sql}"), "unquoted.yaml")
    assert faults(unquoted)[0].endswith('in YAML a brace begins a mapping: quote it, "{sql}"')
    assert 'quote it, ["{a}", "b {c}"]' in faults(path, "data.source=[{a}, 'b {c}']")[0]
    assert "expected text or null, given" in faults(path, "data.target={a: 1}")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.storage_path=~nobody-at-all/x", "run.storage_path: ~nobody-at-all/x: ~ stands for a home folder, and this user has none"),
        (f"data.name={'x' * 300}", "belongs to a set of the hub"),
        (f"name={'x' * 129}", "cannot name a run folder: write up to 128 letters"),
    ],
)
def test_names_that_the_file_system_refuses_are_faults(folder: Path, change: str, said: str) -> None:
    assert said in faults(write(folder), "data.path=.", change)[0]


def test_set_is_checked_like_the_file(folder: Path) -> None:
    path = write(folder)
    assert faults(path, "optimizer.lrr=1") == ["--set optimizer.lrr=1: optimizer.lrr: unknown key (did you mean optimizer.lr?)"]
    assert "write --set section.key=value" in faults(path, "optimizer.lr")[0]
    assert "is a value, not a section" in faults(path, "name=x", "name.y=1")[0]
    assert "not YAML" in faults(path, "data.source={a")[0] and "not YAML" in faults(path, "data.source=[")[0]
    assert faults(path, "data.source={a} {b}")[0].endswith("""quote it, --set 'data.source="{a} {b}"'""")
    assert read_recipe(path, ["optimizer.lr=1", "optimizer.lr=2e-5"]).optimizer.lr == 2e-5
    assert read_recipe(path, ["zero.zero_optimization.stage=2"]).zero == {"zero_optimization": {"stage": 2}}
    assert read_recipe(write(folder, SEQ2SEQ + "scaling:\nzero: zero2\n"), ["scaling.num_workers=2", "zero=null"]).scaling.num_workers == 2


def test_a_file_that_cannot_name_its_runs_is_told_to_say_a_name(folder: Path) -> None:
    (fault,) = faults(write(folder, name="my recipe.yaml"))
    assert fault.endswith("the file is named so, write name: my-recipe in it")


def test_paths_that_exist_become_absolute(folder: Path) -> None:
    work = folder.parent / "work"
    for base in (folder, work):
        (base / "both").mkdir()
        (base / "z.json").write_text('{"zero_optimization": {"stage": 1}}')
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_text("{}\n")
    (work / "only").mkdir()
    (folder / "train").mkdir()
    path = write(folder)
    assert read_recipe(write(folder, SEQ2SEQ.replace("google-t5/t5-small", "both"), "b.yaml")).model.path == str(folder / "both")
    recipe = read_recipe(path, ["model.path=both", "data.path=[rows/a.jsonl, nobody/set]", "data.eval=rows/a.jsonl", "zero=z.json"])
    assert recipe.model.path == str(work / "both") and recipe.data.path == [str(folder / "rows/a.jsonl"), "nobody/set"]
    assert recipe.data.eval == str(folder / "rows/a.jsonl") and recipe.data.train == "train" and recipe.zero == str(work / "z.json")
    assert read_recipe(write(folder, SEQ2SEQ + "zero: z.json\n")).zero == str(folder / "z.json")
    assert read_recipe(path, ["model.path=only", "data.path=rows/*.jsonl"]).data.path == str(folder / "rows/*.jsonl")
    assert read_recipe(path, ["data.path=nothing/*.jsonl"]).data.path == "nothing/*.jsonl"
    assert read_recipe(path, ["run.storage_path=out"]).run.storage_path == str(work / "out")
    assert read_recipe(path, ["run.storage_path=/out"]).run.storage_path == "/out"


def test_a_missing_recipe_names_its_neighbours(folder: Path) -> None:
    write(folder, name="t5_small.yaml")
    (fault,) = faults(folder / "t5_smal.yaml")
    assert fault == "t5_smal.yaml: no such recipe (did you mean t5_small.yaml?)"
    assert "there is no folder" in faults(folder / "none" / "x.yaml")[0]
    assert "is a folder" in faults(folder)[0]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"model: [1,\n", "wish.yaml:2: not YAML"),
        (b"a: 1\n\xff\xfe", "wish.yaml:2: not UTF-8"),
        (b"a: 1\nb: \x00", "wish.yaml:2: not YAML"),
        (b"", "wish.yaml:1: a recipe is a mapping"),
        (b"- a\n", "wish.yaml:1: a recipe is a mapping"),
        (b"text", "wish.yaml:1: a recipe is a mapping"),
        (b"a: 1\n---\nb: 2\n", "wish.yaml:2: not YAML"),
        (b"a: *b\n", "wish.yaml:1: not YAML"),
        (b"a: &b [*b]\n", "wish.yaml:1: not YAML"),
        (b"a: " + b"[" * 5000, "wish.yaml"),
        (b"model: !!python/object:os.system x\n", "wish.yaml:1: model"),
        (b"{a: 1}: 2\nb: 1", "wish.yaml:1: a key must be plain text"),
    ],
)
def test_a_file_that_is_no_recipe_is_readable(folder: Path, content: bytes, said: str) -> None:
    path = folder / "wish.yaml"
    path.write_bytes(content)
    assert faults(path)[0].startswith(said)


def test_a_section_that_is_no_mapping_is_one_fault(folder: Path) -> None:
    (fault,) = faults(write(folder, SEQ2SEQ + "scaling: 3\n"))
    assert fault.startswith("wish.yaml:14: scaling: expected a mapping of num_workers, use_gpu")
    assert any(
        line.startswith("wish.yaml:4: data: expected a mapping") for line in faults(write(folder, SEQ2SEQ.split("data:")[0] + "data: x\n"))
    )
    assert any(
        line.startswith("wish.yaml:1: run: expected")
        for line in faults(write(folder, "run: []\nmodel: 1\ntrain: x\nbatch: 2\noptimizer: y"))
    )


def test_the_recipe_of_a_shell_variable_is_read_with_a_byte_order_mark(folder: Path) -> None:
    path = folder / "wish.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SEQ2SEQ.encode())
    assert read_recipe(str(path)).name == "wish"
