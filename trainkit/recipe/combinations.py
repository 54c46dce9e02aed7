"""Keys of a recipe that must fit each other. Each check looks only at values that are right by themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.recipe.document import Place, did_you_mean, shown
from trainkit.recipe.habits import answered_keys
from trainkit.recipe.wording import path_of, pieces_of
from trainkit.runs.copies import fault_of
from trainkit.runs.folder import NAME, NAMES

if TYPE_CHECKING:
    from trainkit.recipe.checks import View

METRICS = {"exact_match": ("seq2seq", "causal"), "rouge": ("seq2seq", "causal"), "accuracy": ("classification",), "f1": ("classification",)}
ROUGE = ("rouge1", "rouge2", "rougeL")
MISSING: Any = object()


def combination_faults(view: View) -> None:
    """Add to the view a fault for each combination that cannot be trained."""
    for check in (
        _name,
        _paths,
        _length,
        _warmup,
        _batch,
        _joint_shapes,
        _limits,
        _columns,
        _templates,
        _turns,
        _packing,
        _compiled,
        _resources,
        _fp16,
        _elastic,
        _metrics,
        _best,
        _copies,
    ):
        check(view)


def _name(view: View) -> None:
    name = view.value("name")
    if name is not MISSING and NAME.fullmatch(name) is None:
        own = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
        way_out = "" if ("name",) in view.document.places else f"; the file is named so, write name: {own or 'mine'} in it"
        view.fault("name", f"{shown(name)} cannot name a run folder: {NAMES}{way_out}")


def _paths(view: View) -> None:
    model, data = view.value("model.path"), view.value("data.path")
    for key, path in (("model.path", model), ("data.path", data)):
        if path is not MISSING and (not path or not all(part.strip() for part in ([path] if isinstance(path, str) else path))):
            view.fault(key, "is empty: write a hub id or a path")
    if view.given("model.revision") and view.value("model.revision") is not MISSING and _is_here(model):
        view.fault("model.revision", "belongs to a model of the hub, and model.path is on this machine: leave it out")
    for key in ("data.name", "data.revision"):
        if view.given(key) and view.value(key) is not MISSING and _is_here(data):
            view.fault(key, "belongs to a set of the hub, and data.path is on this machine: leave it out" + _inside(data, view.value(key)))


def _is_here(path: Any) -> bool:
    """The reader has made paths that exist absolute."""
    return isinstance(path, list) or (isinstance(path, str) and Path(path).is_absolute())


def _inside(folder: Any, name: str) -> str:
    try:
        inside = isinstance(folder, str) and (Path(folder) / name).is_dir()
    except (OSError, ValueError):  # no name of a folder
        inside = False
    return f", and write data.path: {folder}/{name}" if inside else ""


def _length(view: View) -> None:
    if (
        not view.given("train.epochs")
        and not view.given("train.max_steps")
        and not answered_keys(view.document) & {"train.epochs", "train.max_steps"}
    ):
        view.fault("train", "how long? write train.epochs: 3 (passes over the rows) or train.max_steps: 1000 (optimizer steps)")


def _warmup(view: View) -> None:
    warmup, most = view.value("optimizer.warmup_steps"), view.value("train.max_steps")
    if isinstance(warmup, int) and isinstance(most, int) and warmup > most:
        view.fault(
            "optimizer.warmup_steps",
            f"{warmup} steps of warm-up do not end within train.max_steps: {most}; write fewer, or a share below 1",
        )


def _batch(view: View) -> None:
    if isinstance(view.value("batch.tokens_per_device"), int) and view.given("batch.samples_per_device"):
        view.fault("batch.tokens_per_device", "stands together with batch.samples_per_device: one of them sizes the micro-batch, keep one")


def _joint_shapes(view: View) -> None:
    if view.value("batch.joint_shapes") is True and view.value("data.packing") is True:
        view.fault("batch.joint_shapes", "not with data.packing, whose sequences are filled to one length: write null")


def _limits(view: View) -> None:
    task = view.value("model.task")
    for key, tasks, instead in (
        ("data.max_source_length", ("seq2seq",), "data.max_length"),
        ("data.max_target_length", ("seq2seq",), "data.max_length"),
        ("data.max_length", ("causal", "classification"), "data.max_source_length and data.max_target_length"),
    ):
        if task is not MISSING and view.given(key) and task not in tasks:
            view.fault(key, f"only for {' and '.join(tasks)}; model.task is {task}: write {instead}")


def _columns(view: View) -> None:
    task = view.value("model.task")
    source, target, messages = (view.given(f"data.{name}") for name in ("source", "target", "messages"))
    if messages and (source or target):
        view.fault("data.messages", "stands together with source or target: a row is a dialogue or a pair, keep one form")
    if task is not MISSING and messages and task != "causal":
        view.fault("data.messages", f"only for causal; model.task is {task}: write source and target")
    if task is not MISSING and not messages:
        _pair(view, task, source, target)
    written = view.value("data.source")
    if isinstance(written, list) and len(written) != 2:
        view.fault("data.source", f"a list is a sentence pair and has exactly two templates, given {len(written)}")
    if isinstance(written, list) and task in ("seq2seq", "causal"):
        view.fault("data.source", f"a list of two is a sentence pair and only for classification; model.task is {task}: write one template")


def _pair(view: View, task: str, source: bool, target: bool) -> None:
    if task == "classification" and not (source and target):
        absent = " and ".join(name for name, there in (("data.source", source), ("data.target", target)) if not there)
        view.fault("data", f"classification needs source (the text) and target (the label column); missing: {absent}")
    elif task == "seq2seq" and source != target:
        view.fault("data", f"seq2seq needs source and target together; missing: data.{'target' if source else 'source'}")
    elif task == "causal" and source and not target:
        view.fault("data.source", "causal needs target beside source (loss on it alone); for plain text write data.target alone")


def _templates(view: View) -> None:
    """Each template can be read, and source and target name a column: without one every row would have the same words."""
    source, target = view.value("data.source"), view.value("data.target")
    named = [("data.source", text) for text in (source if isinstance(source, list) else [source])]
    if view.value("model.task") == "classification":
        _label(view, "data.target", target)
    else:
        named.append(("data.target", target))
    for key, text in named:
        if isinstance(text, str) and _columns_in(view, key, text) == 0:
            view.fault(key, _no_column(text))


def _label(view: View, key: str, text: Any) -> None:
    if isinstance(text, str):
        try:
            path_of(text)
        except ValueError as error:
            view.fault(key, str(error))


def _columns_in(view: View, key: str, text: str) -> int | None:
    """How many columns a template names; None, and a fault, where it cannot be read."""
    try:
        return sum(not isinstance(piece, str) for piece in pieces_of(text))
    except ValueError as error:
        view.fault(key, str(error))
        return None


def _no_column(text: str) -> str:
    hint = f"did you mean {{{text}}}?" if text.isidentifier() else "write a column in braces, for example {question}"
    return f"{shown(text)} names no column and would be the same in every row: {hint}"


def _turns(view: View) -> None:
    messages = view.value("data.messages")
    _label(view, "data.messages", messages)
    if not isinstance(messages, list):
        return
    counts = [_columns_in(view, f"data.messages.{number}.content", turn["content"]) for number, turn in enumerate(messages)]
    spoken = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not spoken:
        what = "has no turn of the assistant, whose words are learned" if messages else "is an empty list"
        view.fault("data.messages", f'{what}: write for example {{role: assistant, content: "{{answer}}"}}')
    elif all(counts[number] == 0 for number in spoken):
        view.fault(f"data.messages.{spoken[0]}.content", _no_column(messages[spoken[0]]["content"]))


def _packing(view: View) -> None:
    if view.value("data.packing") is not True:
        return
    task, attention = view.value("model.task"), view.value("model.attn_implementation")
    if task is not MISSING and task != "causal":
        view.fault("data.packing", f"only for causal; model.task is {task}: write false")
    if isinstance(attention, str) and attention not in ("sdpa", "eager"):
        view.fault("model.attn_implementation", f"{attention} does not keep packed rows apart in every batch: write sdpa or eager")


def _compiled(view: View) -> None:
    if view.value("model.compile") == "blocks" and view.value("train.deterministic") is True:
        view.fault("model.compile", "blocks beside train.deterministic: the compiler may take another kernel each time. Write false")
    if view.value("model.gradient_checkpointing") == "selective":
        because = "train.deterministic: true" if view.value("train.deterministic") is True else "model.compile: false"
        if view.value("model.compile") is False or view.value("train.deterministic") is True:
            view.fault("model.gradient_checkpointing", f"selective is done by compiled blocks, and {because} has none. Write true or false")


def _resources(view: View) -> None:
    key, use_gpu, resources = "scaling.resources_per_worker", view.value("scaling.use_gpu"), view.value("scaling.resources_per_worker")
    if not isinstance(resources, dict):
        return
    for name in resources:
        if name not in ("CPU", "GPU") and name.upper() in ("CPU", "GPU"):
            view.fault(key, f"Ray knows no {name} (did you mean {name.upper()}?)")
    gpus = resources.get("GPU")
    if use_gpu is False and gpus:
        view.fault(key, f"GPU: {shown(gpus)} beside scaling.use_gpu: false: delete it, or write use_gpu: true")
    if use_gpu is True and gpus == 0:
        view.fault(key, "GPU: 0 beside scaling.use_gpu: true: delete it, or write use_gpu: false")


def _elastic(view: View) -> None:
    workers = view.value("scaling.num_workers")
    if not isinstance(workers, list):
        return
    if len(workers) != 2 or workers[0] > workers[1]:
        view.fault("scaling.num_workers", f"{shown(workers)}: write the fewest and the most workers, [1, 4], or one number")
    if isinstance(view.value("scaling.label_selector"), list):
        view.fault("scaling.label_selector", "a list has one entry for each worker, and scaling.num_workers is elastic: write one mapping")


def _copies(view: View) -> None:
    key = "run.copy_checkpoints_to"
    url = view.value(key)
    fault = fault_of(url) if isinstance(url, str) else None
    if fault is not None:
        path = tuple(key.split("."))
        if view.document.place(path).file.startswith("--set "):
            view.document.places[path] = Place(f"--set {key}=...")  # it may hold a secret
        view.fault(key, fault)


def _fp16(view: View) -> None:
    if view.value("model.precision") == "fp16" and view.value("scaling.use_gpu") is False:
        view.fault("model.precision", "no fp16 training on a CPU (scaling.use_gpu: false): write bf16 or fp32")


def _metrics(view: View) -> None:
    metrics, task = view.value("train.metrics"), view.value("model.task")
    if metrics is MISSING or not metrics:
        return
    for metric in metrics:
        if metric not in METRICS:
            view.fault("train.metrics", f"unknown metric {metric}{did_you_mean(metric, METRICS) or '; known: ' + ', '.join(METRICS)}")
        elif task is not MISSING and task not in METRICS[metric]:
            fitting = ", ".join(name for name, tasks in METRICS.items() if task in tasks)
            view.fault("train.metrics", f"{metric} is for {' and '.join(METRICS[metric])}; model.task is {task}, which has {fitting}")
    if len(set(metrics)) < len(metrics):
        view.fault("train.metrics", "names a metric twice: keep one")
    if not view.given("data.eval"):
        view.fault("train.metrics", "need rows to evaluate on: write data.eval (a split, a file or a held-out fraction such as 0.02)")


def _best(view: View) -> None:
    best, metrics = view.value("train.metric_for_best_model"), view.value("train.metrics")
    listed = [name for metric in (metrics if isinstance(metrics, list) else []) for name in (ROUGE if metric == "rouge" else (metric,))]
    if isinstance(best, str):
        if metrics is not MISSING and best not in ("loss", *listed):
            near = (
                "; add its metric to train.metrics"
                if best in (*METRICS, *ROUGE) and best != "rouge"
                else did_you_mean(best, ("loss", *listed))
            )
            view.fault("train.metric_for_best_model", f"{best} is not measured: write {' or '.join(('loss', *listed))}{near}")
        if not view.given("data.eval"):
            view.fault("train.metric_for_best_model", "needs rows to evaluate on: write data.eval")
    needing: list[tuple[str, Callable[[Any], bool]]] = [
        ("load_best_model_at_end", lambda value: value is True),
        ("early_stopping_patience", lambda value: value is not MISSING and value is not None),
    ]
    for name, asked in needing:
        key = f"train.{name}"
        if asked(view.value(key)):
            if not view.given("train.metric_for_best_model"):
                view.fault(key, "needs train.metric_for_best_model: loss, or one of train.metrics, decides which evaluation is the best")
            if not view.given("data.eval"):
                view.fault(key, "needs rows to evaluate on: write data.eval")
