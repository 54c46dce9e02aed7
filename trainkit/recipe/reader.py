"""From a recipe file, or from Python's values, to a Recipe: YAML with lines, overrides, and every fault in one error.

YAML is composed, not loaded, so that each key keeps its line. Scalars are read as in YAML 1.2: 1e-4 is a number, and no, yes, on and
off are text.
The only module that knows the yaml library. What a recipe may say stands in schema.py, the checks in checks.py, combinations.py and
habits.py, paths in paths.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainkit.errors import Fault, RecipeError
from trainkit.recipe.checks import check_recipe
from trainkit.recipe.document import Document, Place, in_shell, note_key
from trainkit.recipe.paths import resolve_paths
from trainkit.recipe.python import check_kinds, document_of, put_changes
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import check_zero, contradictions_with

_TAG = "tag:yaml.org,2002:"
_SECTIONS = ("model", "data", "batch", "optimizer", "train", "scaling", "run")
_MOST_DEPTH = 50
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  the library's own way: a class attribute, filled below


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _owner in (_Loader, _Dumper):
        _owner.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, fill in defaults and resolve paths.

    source: also a mapping of sections as in the file, whose name is "recipe" unless it says another, or a recipe that was read before.
    overrides: also a mapping of dotted keys to values.
    Paths that exist become absolute: relative to the recipe's folder, then to the working directory (for overrides the other way round);
    others stay as written. Raises RecipeError with every fault of the recipe, of the overrides and of the ZeRO configuration, UsageError
    where source or overrides are of another kind.
    """
    check_kinds(source, overrides)
    document, path, folder = _document_of(source)
    if document.faults and not document.values:
        raise RecipeError(faults=tuple(document.faults))
    if isinstance(overrides, Mapping):
        put_changes(document, overrides, "with_")
    else:
        for override in overrides:
            _override(document, override)
    _fill_in(document, "recipe" if path is None else path.stem)
    resolve_paths(document, folder)
    recipe, view = check_recipe(document)
    zero, zero_faults = check_zero(document.get(("zero",)), path, document)
    unread = {(fault.file, fault.line, fault.key) for fault in document.faults if "cannot be read" in fault.message}
    faults = [*document.faults, *(fault for fault in view.faults if (fault.file, fault.line, fault.key) not in unread), *zero_faults]
    if zero is not None:
        faults += contradictions_with(zero, view.value)
    if faults or recipe is None:
        raise RecipeError(faults=_in_order(faults, document.file))
    return recipe


def read_values(path: Path) -> dict[str, Any]:
    """The keys of a recipe file as they stand, unchecked: of a run that is only looked at, whose model or data may be elsewhere.

    Raises RecipeError for what is no YAML or no recipe at all.
    """
    document = _read_yaml(_read_text(path), str(path))
    if document.faults:
        raise RecipeError(faults=tuple(document.faults))
    return document.values


def recipe_to_yaml(recipe: Recipe, defaults: bool = True) -> str:
    """The recipe with resolved paths; with all defaults, read_recipe makes an equal recipe of it."""
    values = recipe.model_dump(mode="json", exclude_defaults=not defaults)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def _document_of(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[Document, Path | None, Path | None]:
    """What the source says, its file if it has one, and the folder in which its relative paths start, unless they are resolved."""
    if isinstance(source, Recipe):
        return document_of(source.model_dump(exclude_unset=True), f"recipe {source.name}"), None, None
    if isinstance(source, Mapping):
        return document_of(source, "recipe"), None, Path.cwd()
    path = Path(source)
    return _read_yaml(_read_text(path), str(path)), path, path.absolute().parent


def _in_order(faults: Sequence[Fault], recipe_file: str) -> tuple[Fault, ...]:
    """The recipe's faults by line, then the overrides' and the ZeRO file's. The same fault found twice is told once."""

    def order(fault: Fault) -> tuple[bool, str, float]:
        return fault.file != recipe_file, fault.file, float("inf") if fault.line is None else fault.line

    return tuple(sorted(dict.fromkeys(faults), key=order))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(faults=(Fault(str(path), None, "", f"no such recipe{_near_files(path)}"),)) from None
    except IsADirectoryError:
        raise RecipeError(faults=(Fault(str(path), None, "", "is a folder: name a recipe file in it"),)) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(faults=(Fault(str(path), line, "", "not UTF-8 text: is this a recipe? Save it as UTF-8"),)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(faults=(Fault(str(path), None, "", f"cannot be read: {reason}"),)) from None


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or difflib.get_close_matches(path.stem, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else ""


def _read_yaml(text: str, file: str) -> Document:
    document = Document(file)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _value_of(node, (), document)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.faults.append(Fault(file, line, "", f"not YAML: {error.reason}"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        document.faults.append(Fault(file, mark.line + 1 if mark else None, "", f"not YAML: {said}"))
    except RecursionError:
        document.faults.append(Fault(file, None, "", "nested too deeply"))
    else:
        if isinstance(value, dict) and value:
            document.values = value
        else:
            found = "nothing" if value is None or value == {} else f"a {type(value).__name__}"
            message = f"a recipe is a mapping of keys such as model, data, batch; this file holds {found}"
            document.faults.append(Fault(file, 1, "", message))
    return document


def _value_of(node: yaml.Node, path: tuple[str, ...], document: Document) -> Any:
    if len(path) > _MOST_DEPTH:
        raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=node.start_mark)
    if isinstance(node, yaml.CollectionNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
        document.faults.append(
            Fault(document.file, node.start_mark.line + 1, ".".join(path), f"the tag {node.tag[:60]} is not read: delete it")
        )
    if isinstance(node, yaml.MappingNode):
        return _mapping_of(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.places.setdefault((*path, str(index)), Place(document.file, item.start_mark.line + 1))
        return [_value_of(item, (*path, str(index)), document) for index, item in enumerate(node.value)]
    try:
        return _scalar_of(node)
    except ValueError:
        line = node.start_mark.line + 1
        document.faults.append(
            Fault(document.file, line, ".".join(path), f"{node.tag.removeprefix(_TAG)} cannot be read from {node.value[:60]!r}")
        )
        return None


def _mapping_of(node: yaml.MappingNode, path: tuple[str, ...], document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            document.faults.append(
                Fault(document.file, line, ".".join(path), "a key must be plain text; quote a template that starts with a brace")
            )
            continue
        inner = (*path, str(key.value))
        known = inner in document.places
        note_key(document, inner, line)
        value = _value_of(item, inner, Document(document.file) if known else document)
        values.setdefault(str(key.value), value)
    return values


def _scalar_of(node: yaml.Node) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse()
    if kind == "int":
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text if kind == "str" else _refuse()


def _refuse() -> Any:
    raise ValueError


def _override(document: Document, override: str) -> None:
    """Put one `a.b=c` into the document. Absent and null sections on the way are made; anything else on the way is a fault."""
    file = f"--set {override}"
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        document.faults.append(Fault(file, None, "", "write --set section.key=value"))
        return
    written, quoted = Document(file), f"quote it, --set {in_shell(path, text.strip())}"
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _value_of(node, (), written)
        behind = text if node is None else text[node.end_mark.index :]
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        document.faults.append(Fault(file, None, ".".join(path), f"the value is not YAML: {reason}; {quoted}"))
        return
    if behind.lstrip().startswith("#"):
        document.faults.append(Fault(file, None, ".".join(path), f"in YAML {behind.strip()[:60]} is a comment: {quoted}"))
        return
    document.faults += [Fault(file, None, ".".join(path), fault.message) for fault in written.faults]
    document.put(path, value, Place(file, override=True))


def _fill_in(document: Document, name: str) -> None:
    """Sections left empty are sections full of defaults; a recipe without a name gets this one."""
    for section in _SECTIONS:
        if document.values.get(section) is None:
            document.values[section] = {}
    if document.values.get("name") is None:
        document.values["name"] = name
        document.places.pop(("name",), None)
