"""Command line: `python -m benchmarks.hopper --help`."""

import sys

from benchmarks.hopper.device import main

if __name__ == "__main__":  # the processes of `measure` import this module too
    sys.exit(main())
