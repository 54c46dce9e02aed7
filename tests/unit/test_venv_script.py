"""scripts/_venv.sh where the system's Python cannot make a whole virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/_venv.sh"

WITHOUT_ENSUREPIP = f"""#!/bin/sh
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p "$3/bin"
ln -s {sys.executable} "$3/bin/python"
exit 1
"""


def test_half_a_virtual_environment_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(WITHOUT_ENSUREPIP)
    python.chmod(0o755)
    for _ in range(2):
        made = subprocess.run(["bash", "-c", ". scripts/_venv.sh"], cwd=tmp_path, env=os.environ | {"PYTHON": str(python)},
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert (made.returncode, made.stdout) == (2, "")
        assert "cannot make a virtual environment" in made.stderr and "apt install python3-venv" in made.stderr
        assert not (tmp_path / ".venv").exists()
