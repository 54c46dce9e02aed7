"""`python -m trainkit.run RECIPE` is `trainkit run RECIPE`."""

import sys

from trainkit.cli import command

if __name__ == "__main__":
    command(["run", *sys.argv[1:]])
