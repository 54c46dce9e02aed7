"""Which runs somebody means who names folders: runs, folders of runs, or globs that no shell has expanded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UsageError


@dataclass(frozen=True)
class Found:
    folder: Path
    is_named: bool  # itself, and not by the folder around it or by a glob


def find_runs(named: Sequence[str | Path]) -> tuple[list[Found], list[str]]:
    """Their folders, each once, in the order in which they are named, and what was left out.

    Raises UsageError for what is no run, and where nothing is named.
    """
    wrong = [repr(path) for path in named if not isinstance(path, str | Path) or path == ""]
    if wrong or not named:
        raise UsageError(f"{f'{wrong[0]} is no folder' if wrong else 'no run is named'}. Name run folders, or folders of run folders")
    notes: list[str] = []
    found: dict[Path, bool] = {}
    for path in map(Path, named):
        try:
            folders = [folder.resolve() for folder in _runs_at(path, notes.append)]
        except (OSError, ValueError) as error:  # a name that is too long, "**" within one, a folder that is closed to this user
            raise UsageError(f"{path}: no run folders can be looked for there: {getattr(error, 'strerror', None) or error}") from None
        for folder in folders:
            if folder in found:
                notes.append(f"{folder.name} is named twice and shown once")
            found[folder] = found.get(folder, False) or is_run(path)
    return [Found(folder, is_named) for folder, is_named in found.items()], notes


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "plan.json").is_file()


def _runs_at(path: Path, tell: Callable[[str], None]) -> Iterator[Path]:
    """The run at this path, the runs in this folder, or those that this glob meets. What else lies beside those is told."""
    if is_run(path):
        yield path
    elif path.is_dir():
        yield from _among(_naturally(path.iterdir()), f"{path}: no run folder (recipe.yaml and plan.json), and none in it", tell)
    elif path.exists():
        raise UsageError(f"{path}: a file. Name run folders, or a folder of run folders")
    elif re.search(r"[*?\[]", str(path)):
        top = Path(path.anchor or ".")
        matches = top.glob(str(path.relative_to(path.anchor) if path.anchor else path))
        yield from _among(_naturally(matches), f"{path}: no run folder matches", tell)
    else:
        raise UsageError(f"{path}: no such run folder{_near(path)}")


def _among(paths: Sequence[Path], no_runs: str, tell: Callable[[str], None]) -> Iterator[Path]:
    folders = [path for path in paths if path.is_dir() and not path.name.startswith(".")]
    if not any(is_run(folder) for folder in folders):
        raise UsageError(no_runs)
    for folder in folders:
        if is_run(folder):
            yield folder
        else:
            tell(f"{folder.name} is no run folder and left out")


def _naturally(paths: Iterable[Path]) -> list[Path]:
    """run-2 before run-10."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]

    return sorted(paths, key=parts)


def _near(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else ""
