"""The checks of a recipe: one key at a time against the schema, then the keys that must fit each other.

A key whose value has the wrong type is left out of the combinations, so that every other combination is still reported in the same error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainkit.errors import Fault
from trainkit.recipe.document import Document, KeyPath, did_you_mean, nearest, shown
from trainkit.recipe.habits import answered_keys, habit_answer
from trainkit.recipe.schema import Recipe

METRICS = {"exact_match": ("seq2seq", "causal"), "rouge": ("seq2seq", "causal"), "accuracy": ("classification",), "f1": ("classification",)}
ROUGE = ("rouge1", "rouge2", "rougeL")
MISSING: Any = object()


class View:
    """What the combinations may ask: values that passed their own check, defaults filled in."""

    def __init__(self, document: Document):
        self.document = document
        self.faults: list[Fault] = []
        self.broken: set[KeyPath] = set()

    def value(self, key: str) -> Any:
        """The value or its default; MISSING where it is absent without a default or wrong."""
        path = tuple(key.split("."))
        if any(path[:length] in self.broken for length in range(1, len(path) + 1)):
            return MISSING
        section, name = (self.document.values if len(path) == 1 else self.document.get(path[:-1])), path[-1]
        if isinstance(section, dict) and name in section:
            return section[name]
        field = field_of(path)
        return MISSING if field is None or field.is_required() else field.get_default(call_default_factory=True)

    def given(self, key: str) -> bool:
        """Whether the key has a value, right or wrong."""
        return self.document.get(tuple(key.split("."))) is not None

    def fault(self, key: str, message: str) -> None:
        self.faults.append(self.document.fault(tuple(key.split(".")), message))


def check_recipe(document: Document) -> tuple[Recipe | None, View]:
    """The recipe, or None, and the view with all its faults. `document` has all sections, absolute paths and a name."""
    view = View(document)
    recipe = None
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        for path, kind in dict.fromkeys(
            (_key_of(found["loc"]), found["type"] in ("missing", "extra_forbidden")) for found in error.errors()
        ):
            if path not in view.broken:
                view.broken.add(path)
                view.faults += _fault_of(document, path, absent=kind and document.get(path) is None and path not in document.places)
    for path in _not_finite(document.values, ()):
        if path not in view.broken and path[0] != "zero":
            view.broken.add(path)
            view.fault(".".join(path), "must be a finite number")
    for check in (_name, _length, _batch, _limits, _columns, _not_yet, _metrics, _best):
        check(view)
    return recipe, view


def fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of a section's type; empty for anything that is no section."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part.model_fields
    return {}


def field_of(path: KeyPath) -> FieldInfo | None:
    fields, field = Recipe.model_fields, None
    for key in path:
        field = fields.get(key)
        if field is None:
            return None
        fields = {} if get_origin(field.annotation) is list else fields_of(field.annotation)
    return field


def _key_of(location: tuple[int | str, ...]) -> KeyPath:
    """The recipe key of a pydantic location, which also names the members of unions and the items of lists."""
    path: KeyPath = ()
    fields: dict[str, FieldInfo] | None = Recipe.model_fields
    for part in location:
        if not fields:
            break
        if part in fields:
            annotation = fields[str(part)].annotation
            path, fields = (*path, str(part)), (fields_of(annotation) if path != ("data",) else None)
        else:
            return (*path, str(part))
    return path


def _fault_of(document: Document, path: KeyPath, absent: bool) -> Iterator[Fault]:
    field = field_of(path)
    if field is None:
        yield document.fault(path, habit_answer(document, path) or _unknown(path, document.get(path)))
    elif absent:
        if ".".join(path) not in answered_keys(document):
            yield document.fault(
                path, f"is missing: {_lower(field.description or 'a section with ' + ', '.join(fields_of(field.annotation)))}"
            )
    elif path == ("zero",) and document.get(path) in (0, 1, 2, 3):
        yield document.fault(
            path, f"expected a name, a file or a mapping, given {document.get(path)}: write zero: zero{document.get(path):d}"
        )
    else:
        yield document.fault(path, f"expected {expected(field.annotation, field.metadata)}, given {_given(document.get(path), field)}")


def _unknown(path: KeyPath, value: Any) -> str:
    parent = field_of(path[:-1]) if len(path) > 1 else None
    siblings = Recipe.model_fields if parent is None else fields_of(parent.annotation)
    prefix = "".join(f"{part}." for part in path[:-1])
    near = nearest(path[-1], siblings)
    if near:
        return f"unknown key (did you mean {prefix}{near}?)"
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in all_keys()}
    found = elsewhere.get(path[-1]) or elsewhere.get(nearest(path[-1], elsewhere) or "")
    if found:
        return f"unknown key here (did you mean {found}?)"
    return f"unknown key; known here: {', '.join(siblings)}"


def all_keys() -> list[str]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        for inner, deep in fields_of(field.annotation).items():
            keys.append(f"{name}.{inner}")
            keys += [f"{name}.{inner}.{last}" for last in (fields_of(deep.annotation) if name == "model" else ())]
    return keys


def expected(annotation: Any, metadata: Any = ()) -> str:
    """A type and its bounds in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(arguments[0], [bound for part in arguments[1:] for bound in getattr(part, "metadata", [part])])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(expected(part, metadata) for part in arguments))
    if origin is Literal:
        return " or ".join(", ".join(str(item) for item in arguments).rsplit(", ", 1))
    if origin is list:
        exactly = next((f" of exactly {bound.max_length}" for bound in metadata if hasattr(bound, "max_length")), "")
        return f"a list{exactly} ({expected(arguments[0])} each)"
    if origin is dict:
        return "a mapping" if arguments[1] is Any else f"a mapping (each value {expected(arguments[1])})"
    if fields_of(annotation):
        return f"a mapping of {', '.join(fields_of(annotation))}"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    return words.get(annotation, "a value") + (_bounds(metadata) if annotation in (int, float) else "")


def _bounds(metadata: Any) -> str:
    words = []
    for bound in metadata:
        words += [f"above {bound.gt}"] if hasattr(bound, "gt") else []
        words += [f"of at least {bound.ge}"] if hasattr(bound, "ge") else []
        words += [f"below {bound.lt}"] if hasattr(bound, "lt") else []
    return " " + " and ".join(words) if words else ""


def _given(value: Any, field: FieldInfo) -> str:
    if isinstance(value, str) and field.annotation is bool:
        return f"{shown(value)}: write true or false"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        return f"the text {shown(value)}: write it without quotes"
    literals = [
        str(item) for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal for item in get_args(part)
    ]
    return shown(value) + (did_you_mean(value, literals) if isinstance(value, str) else "")


def _not_finite(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, (*path, key))
    elif isinstance(value, list):
        yield from dict.fromkeys(path for inner in value for _ in _not_finite(inner, path))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:].rstrip(".")


def _name(view: View) -> None:
    name = view.value("name")
    if name is not MISSING and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        view.fault("name", f"{shown(name)} cannot name a run folder: letters, digits, '.', '_' and '-', not starting with '.'")


def _length(view: View) -> None:
    if (
        not view.given("train.epochs")
        and not view.given("train.max_steps")
        and not answered_keys(view.document) & {"train.epochs", "train.max_steps"}
    ):
        view.fault("train", "how long? write train.epochs: 3 (passes over the rows) or train.max_steps: 1000 (optimizer steps)")


def _batch(view: View) -> None:
    if isinstance(view.value("batch.tokens_per_device"), int) and view.given("batch.samples_per_device"):
        view.fault("batch.tokens_per_device", "stands together with batch.samples_per_device: one of them sizes the micro-batch, keep one")


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


def _not_yet(view: View) -> None:
    if view.value("data.packing") is True:
        view.fault("data.packing", "is not available yet: write false; micro-batches by token budget already keep padding low")
    if isinstance(view.value("scaling.num_workers"), list):
        view.fault("scaling.num_workers", "a list (elastic) is not available yet: write one number of workers")
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
                did_you_mean(best, ("loss", *listed)) or "; add it to train.metrics"
                if best in METRICS or best in ROUGE
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
