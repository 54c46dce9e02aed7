"""Paths of a recipe: those that exist become absolute, everything else (hub ids, splits) stays as written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainkit.recipe.document import Document, KeyPath
from trainkit.recipe.zero import is_shipped


def resolve_paths(document: Document, folder: Path | None) -> None:
    """`folder` is the recipe's own: its paths start there, then at the working directory; those of overrides the other way round.

    Without a folder the recipe was resolved when it was read, and only its overrides still are.
    """
    for path, files_only in (
        (("model", "path"), False),
        (("data", "path"), False),
        (("data", "train"), True),
        (("data", "eval"), True),
        (("zero",), True),
    ):
        try:
            _resolve(document, path, _bases(folder, document.place(path).override), files_only)
        except PermissionError as error:
            text = f"{error.filename} cannot be read: permission denied. Let this user read it, or name another path"
            document.faults.append(document.fault(path, text))
    storage = document.get(("run", "storage_path"))
    if not isinstance(document.values["run"], dict) or not isinstance(storage, str | None):
        return
    try:
        document.values["run"]["storage_path"] = str((Path.cwd() / Path(storage or "runs").expanduser()).absolute())
    except RuntimeError:
        key = ("run", "storage_path")
        document.faults.append(document.fault(key, f"{storage}: ~ stands for a home folder, and this user has none. Write the whole path"))


def _resolve(document: Document, path: KeyPath, bases: Sequence[Path], files_only: bool) -> None:
    value = document.get(path)
    section = document.values if len(path) == 1 else document.values[path[0]]
    if isinstance(value, str) and not (path == ("zero",) and is_shipped(value)):
        section[path[-1]] = _absolute(value, bases, files_only)
    elif isinstance(value, list) and path == ("data", "path"):
        section[path[-1]] = [_absolute(item, bases, files_only) if isinstance(item, str) else item for item in value]


def _bases(folder: Path | None, override: bool) -> list[Path]:
    if folder is None:
        return [Path.cwd()] if override else []
    return [Path.cwd(), folder] if override else [folder, Path.cwd()]


def _absolute(written: str, bases: Sequence[Path], files_only: bool) -> str:
    """The path that exists, absolute; a name that exists nowhere as written (a hub id, a split). A glob exists when it finds something.

    Raises PermissionError for what lies in a folder into which this user may not look.
    """
    if not written.strip():
        return written
    for base in bases:
        try:
            candidate = base / Path(written).expanduser()
            if candidate.is_file() or (candidate.exists() and not files_only):
                return str(candidate.resolve())
            if not files_only and _finds_something(candidate):
                return str(candidate.absolute())
        except PermissionError:
            raise
        except (OSError, ValueError, RuntimeError, NotImplementedError):  # no path: too long, a NUL, an unknown ~user, a glob of a drive
            continue
    return written


def _finds_something(pattern: Path) -> bool:
    if not any(mark in str(pattern) for mark in "*?["):
        return False
    anchor = Path(pattern.anchor)
    return next(anchor.glob(str(pattern.relative_to(anchor))), None) is not None
