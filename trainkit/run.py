"""`python -m trainkit.run RECIPE` is `trainkit run RECIPE`."""

import sys

from trainkit.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
