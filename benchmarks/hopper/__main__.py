"""Command line: `python -m benchmarks.hopper --help`."""

import sys

from benchmarks.hopper.device import main

sys.exit(main())
