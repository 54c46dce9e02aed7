"""Copies of complete checkpoints at an fsspec URL, for the day on which the run folder is gone. The only module that knows fsspec.

    <run.copy_checkpoints_to>/<run name>/
      .best-000050/                     models that a checkpoint calls the best so far
      steps.jsonl  plan.json  recipe.yaml
      checkpoints/step-000100/          the files of the run folder's, manifest.json last: without it nothing is complete

Every file system raises what it likes, and RunCopy lets it out; copying.py puts it into words.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from trainkit.errors import UsageError
from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import MANIFEST, Checkpoint, checkpoint_path, step_of
from trainkit.runs.files import linked

OF_THE_RUN = ("steps.jsonl", "plan.json", "recipe.yaml")  # fetched in this order: a folder with a recipe is a run's
_BEST = re.compile(r"\.best-\d+")
_SECRET = re.compile(r"://[^@]*:[^@]*@|[?]")


def fault_of(url: str) -> str | None:
    """What is wrong with it, as far as one knows without going there. The words do not show it: it may hold a secret."""
    from fsspec import available_protocols

    protocol, is_url, place = url.partition("://")
    if _SECRET.search(url):
        return "holds a password or a query, and recipe.yaml keeps it: leave that to the environment or to fsspec's own configuration"
    if not is_url or not place.strip("/") or (protocol in ("file", "local") and not place.startswith("/")):
        return "is no URL of a folder: write for example s3://bucket/folder, or file:///mnt/folder for one that all nodes see"
    if protocol not in available_protocols():
        return f"fsspec knows no {protocol}://, but s3, gs, abfs, hf, hdfs, sftp, file and more"
    return None


class RunCopy:
    """The copy of the run of this name."""

    def __init__(self, url: str, name: str):
        """Raises UsageError when the package of the protocol is not installed."""
        from fsspec import url_to_fs
        from fsspec.registry import known_implementations

        try:
            self.fs, root = url_to_fs(url)
        except ImportError as error:
            package = known_implementations[url.partition("://")[0]]["class"].partition(".")[0]
            raise UsageError(f"run.copy_checkpoints_to: {error}" + (f": pip install {package}" if package != "fsspec" else "")) from error
        self.root, self.url = f"{root.rstrip('/')}/{name}", f"{url.rstrip('/')}/{name}"
        self.best: dict[str, int] = {}  # models copied, and when they were written

    def steps(self) -> list[int]:
        """Of the complete checkpoints, the newest first. Their files are not looked at."""
        found = {name: step for name in self.names("checkpoints") if (step := step_of(name)) is not None}
        return sorted((step for name, step in found.items() if self._is_complete(name)), reverse=True)

    def upload(self, run: Path, checkpoint: Checkpoint, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Copy a checkpoint and what goes with it, the manifest last; False if it was given up, or removed before it was begun."""
        folder = f"checkpoints/{checkpoint.path.name}"
        with _beside(run / ".ray" / "copied") as held:
            best = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if _BEST.fullmatch(path.name)}
            new = [name for name in best if self.best.get(name) != best[name]]
            try:
                for name in [folder, *new]:
                    shutil.copytree(run / name, held / name, copy_function=linked)
                manifest = (held / folder / MANIFEST).read_bytes()
            except OSError:
                if checkpoint.is_complete():
                    raise
                return False
            if self._is_complete(checkpoint.path.name):
                if self.fs.cat_file(self._at(folder, MANIFEST)) == manifest:
                    return True
                self.fs.rm_file(self._at(folder, MANIFEST))
            for name in OF_THE_RUN:
                shutil.copy2(run / name, held)
            files = [path for path in held.rglob("*") if path.is_file() and path.name != MANIFEST]
            for path in [*files, held / folder / MANIFEST]:
                if given_up():
                    return False
                self._put(path, path.relative_to(held).as_posix())
        self.best = best
        return True

    def prune(self, run: Path, keep: set[int]) -> None:
        """Remove the checkpoints of other steps, manifests first, and models that neither the run has nor the last upload."""
        for name in self.names("checkpoints"):
            if step_of(name) not in {None, *keep}:
                if self._is_complete(name):
                    self.fs.rm_file(self._at("checkpoints", name, MANIFEST))
                self.fs.rm(self._at("checkpoints", name), recursive=True)
        for name in self.names():
            if _BEST.fullmatch(name) and name not in self.best and not (run / name).exists():
                self.fs.rm(self._at(name), recursive=True)

    def fetch(self, run: Path, step: int) -> Checkpoint:
        """Bring a checkpoint into the run folder, in one move once all of it holds. Raises UsageError when it does not."""
        target = checkpoint_path(run, step)
        folder = f"checkpoints/{target.name}"
        with _beside(run / ".ray" / "fetched") as held:
            place = held / target.name
            self._get(f"{folder}/{MANIFEST}", place / MANIFEST)
            try:
                for name in self.names(folder) & Checkpoint(place).files.keys():
                    self._get(f"{folder}/{name}", place / name)
                Checkpoint(place).check()
            except UsageError as error:
                raise UsageError(error.message.replace(str(place), f"{self.url}/{folder}")) from None
            checkpoints.remove(Checkpoint(target))
            target.parent.mkdir(exist_ok=True)
            place.rename(target)
        return Checkpoint(target)

    def fetch_rest(self, run: Path, *names: str) -> None:
        """Bring models that the run folder has not, then these files, in place of what lies there."""
        with _beside(run / ".ray" / "fetched") as held:
            for best in self.names():
                if _BEST.fullmatch(best) and not (run / best).exists():
                    for found in self.fs.find(self._at(best)):
                        name = found.rpartition(f"/{best}/")[2].lstrip("/")
                        self._get(f"{best}/{name}", held / best / name)
                    (held / best).rename(run / best)
            for name in names:
                self._get(name, held / name)
                (held / name).replace(run / name)

    def is_of(self, run: Path) -> bool:
        """Whether its first step is the run's, to the last digit of its seconds: two runs of one name are two runs."""
        with contextlib.suppress(FileNotFoundError):
            own = (run / "steps.jsonl").read_bytes().partition(b"\n")[0]
            return not own or self.fs.cat_file(self._at("steps.jsonl"), start=0, end=len(own)) == own
        return True

    def names(self, folder: str = "") -> set[str]:
        """Of what lies in a folder."""
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return {found.rstrip("/").rpartition("/")[2] for found in self.fs.ls(self._at(folder).rstrip("/"), detail=False)}
        return set()

    def _is_complete(self, name: str) -> bool:
        return MANIFEST in self.names(f"checkpoints/{name}")

    def _at(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _put(self, path: Path, place: str) -> None:
        """Under another name first: half of a file is never found under its own, except what no manifest names yet."""
        whole = self._at(place)
        part = whole if place.startswith("checkpoints/") and path.name != MANIFEST else self._at(f".{path.name}.part")
        self.fs.makedirs(whole.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(path), part)
        if part != whole:
            self.fs.mv(part, whole)

    def _get(self, place: str, path: Path) -> None:
        if ".." in PurePosixPath(place).parts:
            raise UsageError(f"{self.url}/{place} leaves its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._at(place), str(path))


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """An empty folder for a while."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
