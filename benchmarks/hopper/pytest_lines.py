"""A pytest plugin that writes a JSON line for each test as it ends, to the file $SMOOTHIE_TEST_LINES: of a run that is
killed, or whose workers die, everything that had ended is known."""

import json
import os
from pathlib import Path
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return  # the controller gets the reports of all workers
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        line["error"] = report.longreprtext
    with Path(os.environ["SMOOTHIE_TEST_LINES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
