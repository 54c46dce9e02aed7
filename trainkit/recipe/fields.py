"""What the schema says of a key: its field, the keys in it, its type in words, and whether a value is of that type."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from trainkit.recipe.document import KeyPath
from trainkit.recipe.schema import Recipe


def fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of a section's type; empty for anything that is no section."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part.model_fields
    return {}


def item_fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of the sections in a list; empty for anything else."""
    lists = (part for part in (annotation, *get_args(annotation)) if get_origin(part) is list)
    return next((fields for part in lists if (fields := fields_of(get_args(part)[0]))), {})


def field_of(path: KeyPath) -> FieldInfo | None:
    """The field of a key; an item of a list of sections, which stands by its number, has the list's."""
    fields, field = Recipe.model_fields, None
    for key in path:
        if field is not None and key.isdecimal() and item_fields_of(field.annotation):
            fields = item_fields_of(field.annotation)
            continue
        field = fields.get(key)
        if field is None:
            return None
        fields = {} if get_origin(field.annotation) is list else fields_of(field.annotation)
    return field


def all_keys() -> list[str]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        for inner, deep in fields_of(field.annotation).items():
            keys.append(f"{name}.{inner}")
            keys += [f"{name}.{inner}.{last}" for last in (fields_of(deep.annotation) if name == "model" else ())]
    return keys


def accepts(field: FieldInfo, value: Any) -> bool:
    """Whether the value is right by itself."""
    kind: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


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
        words += [f"of at most {bound.le}"] if hasattr(bound, "le") else []
    return " " + " and ".join(words) if words else ""
