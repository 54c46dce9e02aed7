"""The checks of a recipe: one key at a time against the schema, then (combinations.py) the keys that must fit each other.

A key whose value has the wrong type is left out of the combinations, so that every other combination is still reported in the same error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trainkit.errors import Fault
from trainkit.recipe.combinations import MISSING, combination_faults
from trainkit.recipe.document import Document, KeyPath, did_you_mean, in_shell, nearest, shown
from trainkit.recipe.fields import accepts, all_keys, expected, field_of, fields_of, item_fields_of
from trainkit.recipe.habits import answered_keys, habit_answer
from trainkit.recipe.schema import Recipe


class View:
    """What the combinations may ask: values that passed their own check, defaults filled in."""

    def __init__(self, document: Document):
        self.document = document
        self.faults: list[Fault] = []
        self.broken: set[KeyPath] = set()

    def value(self, key: str) -> Any:
        """The value or its default; MISSING where it is absent without a default, or wrong, or something in it is."""
        path = tuple(key.split("."))
        if any(path[: len(broken)] == broken or broken[: len(path)] == path for broken in self.broken):
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
        found_at = dict.fromkeys((_key_of(found["loc"]), found["type"] in ("missing", "extra_forbidden")) for found in error.errors())
        outer = {path[:length] for path, _ in found_at for length in range(len(path))}  # of a union, the forms that were not meant
        for path, kind in found_at:
            if path not in view.broken | outer:
                view.broken.add(path)
                view.faults += _fault_of(document, path, absent=kind and document.get(path) is None and path not in document.places)
    for path in _not_finite(document.values, ()):
        if path not in view.broken and path[0] != "zero":
            view.broken.add(path)
            view.fault(".".join(path), "must be a finite number")
    combination_faults(view)
    return recipe, view


def _key_of(location: tuple[int | str, ...]) -> KeyPath:
    """The recipe key of a pydantic location, which also names the members of unions and the items of lists."""
    path: KeyPath = ()
    fields: dict[str, FieldInfo] = Recipe.model_fields
    items: dict[str, FieldInfo] = {}
    for part in location:
        if isinstance(part, int) and items:
            path, fields, items = (*path, str(part)), items, {}
        elif part in fields:
            annotation = fields[str(part)].annotation
            path, fields, items = (*path, str(part)), fields_of(annotation), item_fields_of(annotation)
        elif fields:
            return (*path, str(part))
        elif not items:
            break
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
    elif path == ("zero",) and isinstance(document.get(path), bool):
        way_out = "zero: zero3 (or zero1, zero2, with _offload)" if document.get(path) else "zero: zero0, or leave it out"
        yield document.fault(path, f"expected a name, a file or a mapping, given {shown(document.get(path))}: write {way_out}")
    elif path == ("zero",) and document.get(path) in (0, 1, 2, 3):
        yield document.fault(
            path, f"expected a name, a file or a mapping, given {document.get(path)}: write zero: zero{document.get(path):d}"
        )
    elif path[-1].isdecimal():
        yield document.fault(
            path, f"expected a mapping of {', '.join(item_fields_of(field.annotation))}, given {shown(document.get(path))}"
        )
    elif braced := _braced(document.get(path), field):
        way_out = f"in YAML a brace begins a mapping: quote it, {json.dumps(braced, ensure_ascii=False)}"
        if document.place(path).file.startswith("--set "):
            way_out = f"{way_out}, and for the shell as well: --set {in_shell(path, braced)}"
        yield document.fault(path, way_out)
    else:
        yield document.fault(path, f"expected {expected(field.annotation, field.metadata)}, given {_given(document.get(path), field)}")


def _unknown(path: KeyPath, value: Any) -> str:
    parent = field_of(path[:-1]) if len(path) > 1 else None
    siblings = Recipe.model_fields if parent is None else fields_of(parent.annotation) or item_fields_of(parent.annotation)
    prefix = "".join(f"{part}." for part in path[:-1])
    near = nearest(path[-1], siblings)
    if near:
        return f"unknown key (did you mean {prefix}{near}?)"
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in all_keys()}
    found = elsewhere.get(path[-1]) or elsewhere.get(nearest(path[-1], elsewhere) or "")
    if found:
        return f"unknown key here (did you mean {found}?)"
    return f"unknown key; known here: {', '.join(siblings)}"


def _given(value: Any, field: FieldInfo) -> str:
    if isinstance(value, str) and field.annotation is bool:
        return f"{shown(value)}: write true or false"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        return f"the text {shown(value)}: write it without quotes"
    literals = [
        str(item) for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal for item in get_args(part)
    ]
    return shown(value) + (did_you_mean(value, literals) if isinstance(value, str) else "")


def _braced(value: Any, field: FieldInfo) -> Any:
    """The text that was meant by {column} without quotes, or a list of such texts; None for anything else."""
    if isinstance(value, list):
        texts = [item if isinstance(item, str) else _braced(item, field) for item in value]
        return texts if texts != value and all(isinstance(text, str) for text in texts) else None
    columns = isinstance(value, dict) and len(value) == 1 and [*value.values()] == [None]
    return f"{{{next(iter(value))}}}" if columns and accepts(field, "text") else None


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
