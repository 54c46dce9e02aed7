"""Notebooks executed from a clean copy of what they need. `scripts/execute_notebooks` keeps the outputs in notebooks/."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("quickstart", "which_zero_stage")
_SECONDS = 600  # for one cell
_OF_A_MACHINE = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|mnt|data|opt|usr|var|Users|content|workspace)/[\w./-]*")


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def executed(name: str, into: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `<into>/notebooks`, beside which the recipes lie. Raises CellExecutionError."""
    if not (into / "recipes").is_dir():
        shutil.copytree(ROOT / "recipes", into / "recipes")
    (into / "notebooks").mkdir(exist_ok=True)
    notebook = nbformat.read(path_of(name), as_version=4)
    where = {"metadata": {"path": str(into / "notebooks")}}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    client = NotebookClient(notebook, timeout=_SECONDS, kernel_name="python3", resources=where, record_timing=False)
    return client.execute(env=environment)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts_of(notebook: nbformat.NotebookNode) -> list[str]:
    """What outputs say in words: printed, as plain text, as HTML."""
    texts = []
    for output in outputs_of(notebook):
        texts += [output.text] if output.output_type == "stream" else []
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return texts


def machine_paths(notebook: nbformat.NotebookNode) -> set[str]:
    """Absolute paths in the outputs: they belong to whoever executed it last."""
    return {path for text in texts_of(notebook) for path in _OF_A_MACHINE.findall(text)}


def main(names: list[str]) -> None:
    """Execute the named notebooks, all by default, and keep their outputs."""
    for name in names or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(name, Path(folder))
        found = machine_paths(notebook)
        if found:
            sys.exit(f"{name}: the outputs name paths of this machine, and were not kept: {', '.join(sorted(found))}")
        nbformat.write(notebook, path_of(name))
        print(f"kept the outputs of {path_of(name).relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
