"""A ZeRO configuration: DeepSpeed's own JSON, read strictly, with `"auto"` left in for the plan.

What a user's file says is applied as it stands. What the recipe owns (batch sizes, accumulation, clipping, precision, optimizer,
schedule) may stand in the file as `"auto"` or as the recipe's own value; anything else is a contradiction (contradictions.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.errors import Fault, RecipeError
from trainkit.recipe import zero_keys as keys
from trainkit.recipe.contradictions import contradictions, contradictions_with
from trainkit.recipe.document import Document, Place, did_you_mean, nearest, read_json, shown

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
__all__ = ["FOLDER", "SHIPPED", "ZeroConfig", "check_zero", "contradictions", "contradictions_with", "is_shipped", "read_zero"]

_INSTALLED = Path(__file__).parents[1] / "zero_configs"  # a wheel brings them inside of the package
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "zero_configs"


@dataclass(frozen=True)
class ZeroConfig:
    """A checked configuration.

    `json` is what the user wrote, `"auto"` left in. `unused` names its sections that a run does not apply. `places` says where keys stand.
    """

    name: str
    stage: int
    offload_optimizer: bool
    offload_param: bool
    json: dict[str, Any]
    unused: tuple[str, ...] = ()
    places: dict[tuple[str, ...], Place] = field(default_factory=dict, compare=False, repr=False)


def is_shipped(name: str) -> bool:
    return name in SHIPPED


def read_zero(zero: str | dict[str, Any] | None, where: Path | None = None) -> ZeroConfig:
    """Read a shipped name, a JSON file, a mapping, or None (zero0). `where` is the recipe file, to which a relative path belongs.

    Raises RecipeError with every fault.
    """
    config, faults = check_zero(zero, where)
    if faults or config is None:
        raise RecipeError(
            faults=tuple(faults)
            or (Fault(str(where or "zero"), None, "zero", f"expected a name, a file or a mapping, given {shown(zero)}"),)
        )
    return config


def content_of(zero: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """`zero` of a recipe that needs no file beside it: what a JSON file says stands in the place of its path."""
    return zero if zero is None or isinstance(zero, dict) or is_shipped(zero) else read_zero(zero).json


def check_zero(zero: Any, where: Path | None, recipe: Document | None = None) -> tuple[ZeroConfig | None, list[Fault]]:
    """The configuration, or None, and its faults. `recipe` gives the lines of a mapping that stands in the recipe."""
    if zero is None:
        zero = "zero0"
    if isinstance(zero, dict):
        prefix: tuple[str, ...] = ("zero",)
        places = {} if recipe is None else {path: place for path, place in recipe.places.items() if path[0] == "zero"}
        document = Document(str(where or "zero"), {"zero": zero}, places)
        name = "zero"
    elif isinstance(zero, str):
        prefix = ()
        found = _read_file(zero, where, recipe)
        if isinstance(found, Fault):
            return None, [found]
        document, name = found, zero if is_shipped(zero) else Path(zero).stem
    else:
        return None, []
    values = document.get(prefix) if prefix else document.values
    faults = [*document.faults, *(() if document.faults and not values else _faults(document, prefix, values))]
    if faults:
        return None, faults
    return _config(name, values, {path[len(prefix) :]: place for path, place in document.places.items()}, document.file, prefix), []


def _read_file(zero: str, where: Path | None, recipe: Document | None) -> Document | Fault:
    place = recipe.place(("zero",)) if recipe is not None else Place(str(where) if where else "zero")
    for path in (FOLDER / f"{zero}.json",) if is_shipped(zero) else _candidates(zero, where):
        try:
            return read_json(path.read_bytes().decode("utf-8-sig"), str(path) if not is_shipped(zero) else f"zero_configs/{zero}.json")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
        except UnicodeDecodeError:
            return Fault(str(path), None, "", "not UTF-8 text")
        except (OSError, ValueError) as error:
            return Fault(str(path), None, "", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    near = did_you_mean(Path(zero).stem, SHIPPED)
    return Fault(
        place.file, place.line, "zero", f"{shown(zero)} is neither a shipped configuration ({', '.join(SHIPPED)}) nor a file{near}"
    )


def _candidates(zero: str, where: Path | None) -> list[Path]:
    folder = Path.cwd() if where is None else where if where.is_dir() else where.absolute().parent
    try:
        written = Path(zero).expanduser()
    except RuntimeError:
        written = Path(zero)
    return [folder / written, Path.cwd() / written]


def _config(name: str, values: dict[str, Any], places: dict[tuple[str, ...], Place], file: str, prefix: tuple[str, ...]) -> ZeroConfig:
    section = values.get("zero_optimization", {})
    offload = {
        part: section.get(part, {}).get("device", "none") == "cpu" for part in ("offload_optimizer", "offload_param") if section.get(part)
    }
    unused = tuple(key for key in values if key in keys.UNUSED)
    places = {(): Place(file), **{path: place for path, place in places.items() if path}, ("",): Place(".".join(prefix))}
    return ZeroConfig(
        name, section.get("stage", 0), offload.get("offload_optimizer", False), offload.get("offload_param", False), values, unused, places
    )


def _faults(document: Document, prefix: tuple[str, ...], values: dict[str, Any]) -> Iterator[Fault]:
    yield from _section(document, prefix, values, keys.TOP_LEVEL, {**keys.REMOVED, **keys.NOT_AVAILABLE}, keys.UNUSED)
    if values.get("gradient_allreduce_op", "mean") not in ("mean", "auto"):
        yield document.fault(
            (*prefix, "gradient_allreduce_op"), 'not available: gradients are averaged over all labels of a step; write "mean"'
        )
    both = [values.get(name, {}).get("enabled") for name in ("bf16", "fp16") if isinstance(values.get(name, {}), dict)]
    if both == [True, True]:
        yield document.fault((*prefix, "fp16", "enabled"), "bf16 and fp16 are both enabled: keep one")
    for section, key in (
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
    ):
        if isinstance(values.get(section), dict) and values[section].get(key) is True:
            yield document.fault((*prefix, section, key), "not available: the optimizer keeps fp32 weights and states; delete the key")
    compiled = values.get("compile")
    if isinstance(compiled, dict) and compiled.get("deepcompile") is True:
        yield document.fault((*prefix, "compile", "deepcompile"), "not available: the loop runs the model uncompiled; delete the key")
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _zero_section(document, (*prefix, "zero_optimization"), zero)


def _section(
    document: Document, prefix: tuple[str, ...], values: dict[str, Any], known: keys.Keys, answers: dict[str, str], unused: dict[str, str]
) -> Iterator[Fault]:
    for key, value in values.items():
        path = (*prefix, key)
        if key in answers:
            yield document.fault(path, answers[key])
        elif key in unused and key not in known:
            continue
        elif key not in known:
            near = nearest(key, [*known, *unused])
            yield document.fault(
                path, "DeepSpeed does not know this key" + (f" (did you mean {near}?)" if near else f"; known here: {', '.join(known)}")
            )
        elif isinstance(inner := known[key], dict):
            yield from _inner(document, path, value, inner)
        elif not _fits(value, str(inner)):
            yield document.fault(path, f'expected {inner} or "auto", given {shown(value)}')


def _inner(document: Document, path: tuple[str, ...], value: Any, known: keys.Keys) -> Iterator[Fault]:
    if isinstance(value, dict):
        answers = keys.REMOVED_ZERO if path[-1] == "zero_optimization" else {}
        yield from _section(document, path, value, known, answers, {})
    elif not (value is None and path[-1].startswith("offload_")):
        yield document.fault(path, f"expected an object with {', '.join(list(known)[:6])}, given {shown(value)}")


def _fits(value: Any, kind: str) -> bool:
    """DeepSpeed takes 5e8 for a whole number, and null where a key is left to it."""
    if value is None or value == "auto" or kind == keys.ANY:
        return True
    if kind in keys.NUMBERS:
        whole, least, most = keys.NUMBERS[kind]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and least <= value <= most and not (whole and value != int(value))
    if kind in keys.WORDS:
        return isinstance(value, str) and {value, value.capitalize()} & set(keys.WORDS[kind]) != set()
    return isinstance(value, {keys.BOOL: bool, keys.TEXT: str, keys.LIST: list}[kind])


def _zero_section(document: Document, path: tuple[str, ...], zero: dict[str, Any]) -> Iterator[Fault]:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        stage = None
        yield document.fault((*path, "stage"), f"expected 0, 1, 2 or 3, given {shown(zero.get('stage'))}")
    for part, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(part)
        if not isinstance(section, dict):
            continue
        device = section.get("device", "none")
        if device == "nvme":
            yield document.fault((*path, part, "device"), 'nvme is not supported yet: write "cpu"')
        elif device not in ("cpu", "none"):
            yield document.fault((*path, part, "device"), f'expected "cpu" or "none", given {shown(device)}')
        elif device == "cpu" and stage is not None and stage not in stages:
            allowed = "stage 3" if stages == (3,) else "stages 1, 2 and 3"
            yield document.fault((*path, part), f"only with {allowed}; this is stage {stage}")
        ratio = section.get("ratio")
        if isinstance(ratio, int | float) and ratio < 1 and stage in (1, 2):
            yield document.fault(
                (*path, part, "ratio"), f"a part of the optimizer can stay on the device with stage 3 only; this is stage {stage}"
            )
    if zero.get("zenflow") is not None:
        yield document.fault((*path, "zenflow"), "not available: it delays updates, which the plan does not know")
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("super_offload") is True:
        yield document.fault((*path, "offload_optimizer", "super_offload"), "not available: delete the key")
